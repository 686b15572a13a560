"""Run in a child process by test_ort.py under another ONNX Runtime: only numpy and onnxruntime are there.

ort_probe.py LIBRARY MODEL INPUTS OUTPUTS: runs MODEL on the arrays of INPUTS (.npz) at 1 and 2 threads.
Prints the version and any error.
"""

import sys

import numpy as np
import onnxruntime

library, model, inputs, outputs = sys.argv[1:]
sys.stdout.write(onnxruntime.__version__ + "\n")
results = {}
for threads in (1, 2):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    try:
        options.register_custom_ops_library(library)
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        results[f"threads {threads}"] = session.run(None, dict(np.load(inputs)))[0]
    except Exception as error:
        sys.stdout.write(f"{error}\n")
        sys.exit(3)
np.savez(outputs, **results)
