"""Run in a child process by test_kernel.py: all hostile cases on the instruction set that the environment asks for."""

import sys

import numpy as np
from kernel_cases import DTYPES, cast, hostile_cases

from mra_export import kernel

sys.stdout.write(kernel.cpu_target())
results = {}
for number, made in enumerate(hostile_cases()):
    for dtype in DTYPES:
        rounded = cast(made, dtype)
        chosen, excluded, score = kernel.selection(rounded.query, rounded.key, rounded.mask, rounded.attributes, num_threads=2)
        context = kernel.attention(*rounded.arrays, rounded.attributes, num_threads=2)
        for name, array in (("chosen", chosen), ("excluded", excluded), ("score", score), ("context", context.astype(np.float32))):
            results[f"{number} {dtype} {name}"] = array
np.savez(sys.argv[1], **results)
