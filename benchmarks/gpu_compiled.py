"""Compiles the CUDA kernels for every architecture and writes what came out: registers, spills, shared memory, occupancy.

    python benchmarks/gpu_compiled.py

writes benchmarks/results/cuda-compiled.json and renders the tables of docs/kernels-cuda.md again. Needs nvcc, a C++ compiler and no
GPU: threads are from the PTX, registers and spills from ptxas, CTAs and shared memory from launches of the emulated kernels.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu_cost

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cuda-compiled.json"
PAGE = ROOT / "docs" / "kernels-cuda.md"
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "emulator")]

LAUNCHES = {
    3: ("pool", "select", "attend"),
    4: ("pool", "logits", "select", "attend"),
    5: ("pool", "logits", "select", "low resolution", "attend"),
}
"""Number of launches of a call -> what they are, in order."""
KERNELS = {"pool": "Pool", "logits": "Logit", "select": "Select", "low resolution": "Low", "attend": "Attend"}
"""Launch -> how its kernel's name begins."""
CALLS = (("float16", 512), ("float32", 512), ("float16", 4096), ("float16", 4128))
"""Type and N of the calls whose launches are recorded; twelve heads of 64, four exact blocks a row."""
HEADS = 12

Results = dict[str, Any]


def short_name(demangled: str) -> str:
    """ "void mra::AttendKernel<__half, 64>(mra::Problem)" -> "Attend<__half, 64>"."""
    name = re.sub(r"^void |\(anonymous namespace\)::|mra::|\(mra::.*\)$|\(int\)|\(bool\)", "", demangled).strip()
    return re.sub(r"\(.*\)$", "", name).replace("Kernel", "", 1)


def entries(text: str, mark: str, pattern: str) -> Iterator[tuple[str, list[int]]]:
    """Mangled name and the pattern's numbers of each part of `text` that `mark` begins."""
    for part in text.split(mark)[1:]:
        name = re.search(r"_Z\w+", part)
        numbers = re.search(pattern, part, re.DOTALL)
        if name is None or numbers is None:
            raise SystemExit(f"nothing like {pattern!r} in what the compiler says of a kernel: {part[:200]}")
        yield name[0], [int(number) for number in numbers.groups()]


def demangled(names: list[str]) -> dict[str, str]:
    out = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    return {name: short_name(text) for name, text in zip(names, out, strict=True)}


def compile_all(architectures: tuple[str, ...]) -> Results:
    """nvcc's version and every kernel: name, threads, and by architecture registers, stack and spilled bytes of a thread."""
    import test_cuda_build as cuda_build  # what the tests gate on is what is shown

    nvcc = cuda_build.find_nvcc()
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernels.ptx"
        arguments = ["-ptx", "-arch=compute_80", "-o", str(ptx), str(cuda_build.SOURCE)]
        subprocess.run([nvcc, *cuda_build.FLAGS, *arguments], capture_output=True, check=True)
        threads = dict(entries(ptx.read_text(), ".entry ", r"\.maxntid (\d+)"))
    kernels: dict[str, dict[str, Any]] = {name: {"threads": count, "compiled": {}} for name, (count,) in threads.items()}
    frame = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    for architecture in architectures:
        log = cuda_build.compile_log("-cubin", f"-arch=sm_{architecture}", "-Xptxas=-v")
        for name, (stack, stores, loads, registers) in entries(log, "Compiling entry function", frame):
            kernels[name]["compiled"][architecture] = {"registers": registers, "stack": stack, "spilled": stores + loads}
    names = demangled(list(kernels))
    rows = [{"name": names[name], **kernel} for name, kernel in kernels.items()]
    rows.sort(key=lambda row: row["name"])
    return {"nvcc": re.findall(r"release (\S+),", version)[0], "kernels": rows}


def record_launches() -> list[dict[str, Any]]:
    """CTAs, threads and bytes of shared memory of each launch of CALLS."""
    import emulated
    import numpy as np

    from mra_export.contract import Attributes

    rows = []
    for dtype, length in CALLS:
        x = np.random.default_rng(0).standard_normal((1, length, HEADS * 64)).astype(dtype)
        emulated.launches()
        emulated.attention(x, x, x, np.ones((1, length), np.int32), Attributes(HEADS, length // 8, 0.125), seed=0)
        found = emulated.launches()
        if len(found) not in LAUNCHES:
            raise SystemExit(f"N {length}: {len(found)} launches; LAUNCHES of {Path(__file__).name} knows {sorted(LAUNCHES)}")
        for name, (ctas, threads, shared) in zip(LAUNCHES[len(found)], found, strict=True):
            rows.append({"dtype": dtype, "length": length, "launch": name, "ctas": ctas, "threads": threads, "shared": shared})
    return rows


def kernels_of(launch: dict[str, Any], kernels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The variants of a kernel that a launch may have run: of its name, its type and head size where they have them, and compiled
    for as few threads as hold those of the launch."""
    own = {"float16": "__half", "float32": "float"}[launch["dtype"]]

    def fits(kernel: dict[str, Any]) -> bool:
        arguments = set(re.findall(r"\w+", kernel["name"].partition("<")[2]))
        types, sizes = arguments & {"__half", "float", "__nv_bfloat16"}, arguments & {"64", "128", "256"}
        named = kernel["name"].startswith(KERNELS[launch["launch"]]) and kernel["threads"] >= launch["threads"]
        return named and types <= {own} and sizes <= {"64"}

    found = [kernel for kernel in kernels if fits(kernel)]
    if not found:
        known = ", ".join(kernel["name"] for kernel in kernels)
        raise SystemExit(f"no kernel for {launch}: KERNELS of {Path(__file__).name} has to name it; there are {known}")
    fewest = min(kernel["threads"] for kernel in found)
    return [kernel for kernel in found if kernel["threads"] == fewest]


def registers_table(results: Results) -> str:
    """Registers of a thread by architecture, the most over the types of a kernel."""
    architectures = sorted({a for kernel in results["kernels"] for a in kernel["compiled"]}, key=int)
    families: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for kernel in results["kernels"]:
        family = re.sub(r"(__half|__nv_bfloat16|float)(, )?", "", kernel["name"]).replace("<>", "")
        families.setdefault((family, kernel["threads"]), []).append(kernel)
    rows = []
    for (family, threads), kernels in sorted(families.items(), key=lambda item: _natural(item[0][0])):
        most = [str(max(kernel["compiled"][a]["registers"] for kernel in kernels)) for a in architectures]
        spilled = max(row["spilled"] + row["stack"] for kernel in kernels for row in kernel["compiled"].values())
        rows.append([f"`{family}`", str(threads), *most, str(spilled)])
    head = ["kernel", "threads", *(f"sm_{a}" for a in architectures), "spilled or stack bytes"]
    return _table(head, rows) + f"\n\nnvcc {results['nvcc']}."


def occupancy_table(results: Results) -> str:
    """CTAs and warps that an SM holds at once, by architecture, of each recorded launch that differs from the ones before it."""
    architectures = sorted({a for kernel in results["kernels"] for a in kernel["compiled"]}, key=int)
    rows: list[list[str]] = []
    for launch in results["launches"]:
        kernels = kernels_of(launch, results["kernels"])
        cells = []
        for a in architectures:
            registers = max(kernel["compiled"][a]["registers"] for kernel in kernels)
            ctas = gpu_cost.ARCHITECTURES[a].resident(launch["threads"], registers, launch["shared"])
            cells.append(f"{ctas} ({ctas * launch['threads'] // 32} warps)")
        row = [launch["launch"], f"`{kernels[0]['name'].partition('<')[0]}`, {launch['dtype']}"]
        row += [*(str(launch[name]) for name in ("length", "threads", "shared")), *cells]
        if not any(row[0] == other[0] and row[3:] == other[3:] for other in rows):
            rows.append(row)
    return _table(["launch", "kernel", "N", "threads", "shared bytes", *(f"sm_{a}" for a in architectures)], rows)


def differences(results: Results) -> list[str]:
    """Where the cost model's launches are not those that were recorded: CTAs and threads."""
    found = []
    for dtype, length in CALLS:
        recorded = [launch for launch in results["launches"] if (launch["dtype"], launch["length"]) == (dtype, length)]
        shape = gpu_cost.Shape(1, length, length // 8, heads=HEADS)
        model = gpu_cost.launches(shape, dtype, gpu_cost.GPUS["H200"])
        kernels = [(launch["launch"], launch["ctas"], launch["threads"]) for launch in recorded]
        modelled = [(launch.name, launch.ctas, launch.threads) for launch in model]
        if kernels != modelled:
            found.append(f"{dtype}, N {length}: the kernels have {kernels}, gpu_cost.py {modelled}")
    return found


TABLES: dict[str, Callable[[Results], str]] = {"registers": registers_table, "occupancy": occupancy_table}


def _natural(text: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def main(arguments: list[str] | None = None) -> None:
    import tables

    parser = argparse.ArgumentParser(description="Compile the CUDA kernels for every architecture and write the tables.")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    results = compile_all(tuple(gpu_cost.ARCHITECTURES)) | {"launches": record_launches()}
    options.json.write_text(json.dumps(results, indent=1) + "\n")
    options.page.write_text(tables.updated(options.page.read_text()))
    print(f"wrote {options.json} and {options.page}")
    for difference in differences(results):
        print(f"the cost model is of other launches: {difference}")


if __name__ == "__main__":
    main()
