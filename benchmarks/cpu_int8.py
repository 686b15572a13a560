"""Times a model in int8 beside the same model in fp32, both through ONNX Runtime with the op library, taking turns, in one run.

Each bundle is validated against PyTorch's golden outputs before it is timed.

    python benchmarks/cpu_int8.py --preset base-512-4 --threads 2 --json results.json
"""

from __future__ import annotations

import functools
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import click
import numpy as np
from measure import machine, take_turns

from mra_export import MraRuntime
from mra_export.doctor import cpu
from mra_export.export import export_bundle
from mra_export.presets import PRESETS, init_checkpoint


def bundles(preset: str, calibration: Path | None, scratch: Path) -> dict[str, Path]:
    """fp32, int8 with dynamic scales and, with calibration text, int8 with static ones, of one checkpoint with random weights.

    Those that are in `scratch` already are taken as they are.
    """
    if not (scratch / "checkpoint").exists():
        init_checkpoint(preset, scratch / "checkpoint", 0)
    kinds: dict[str, dict[str, object]] = {"fp32": {}, "int8 dynamic": {"dtype": "int8"}}
    if calibration is not None:
        kinds["int8 static"] = {"dtype": "int8", "calibration": calibration}
    folders = {name: scratch / name.replace(" ", "-") for name in kinds}
    for name, options in kinds.items():
        if not folders[name].exists():
            export_bundle(scratch / "checkpoint", folders[name], **options)  # type: ignore[arg-type]
    return folders


@click.command(help=__doc__)
@click.option("--preset", type=click.Choice(sorted(PRESETS)), default="base-512-4", show_default=True)
@click.option(
    "--calibration", type=click.Path(path_type=Path, exists=True), help="Text to calibrate with: times static scales too."
)
@click.option("--bundles", "kept", type=click.Path(path_type=Path), help="Make the bundles there and keep them. Default: nowhere.")
@click.option("--lengths", multiple=True, type=int, help="N; repeat for several. Default: 32 64 128 256 512.")
@click.option("--batch", type=int, default=1, show_default=True)
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--seconds", type=float, default=4.0, show_default=True, help="Time for each length.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write everything to this file.")
def main(
    preset: str,
    calibration: Path | None,
    kept: Path | None,
    lengths: tuple[int, ...],
    batch: int,
    threads: int,
    seconds: float,
    json_path: Path | None,
) -> None:
    about = machine() | {"int8 products": cpu()["int8"], "preset": preset, "threads": threads, "batch": batch}
    for name, value in about.items():
        print(f"{name:16} {value}")
    results = []
    with tempfile.TemporaryDirectory(prefix="mra-int8-") as folder:
        runtimes = {}
        for name, path in bundles(preset, calibration, kept or Path(folder)).items():
            runtimes[name] = MraRuntime.load(path, "onnxruntime", intra_op_threads=threads)
            runtimes[name].validate()
        print(f"\n{'N':>6} " + " ".join(f"{name + ' ms (quartiles)':>32}" for name in runtimes) + "   faster than fp32")
        for length in lengths or (32, 64, 128, 256, 512):
            ids = np.random.default_rng(0).integers(5, runtimes["fp32"].bundle.manifest.model.vocab_size, (batch, length))
            timings = take_turns([functools.partial(runtime.run, input_ids=ids) for runtime in runtimes.values()], seconds)
            faster = {name: timings[0].median / timing.median for name, timing in zip(runtimes, timings, strict=True)}
            shown = " ".join(f"{t.median:>14.1f} ({t.lower_quartile:.1f}-{t.upper_quartile:.1f})".rjust(32) for t in timings)
            print(f"{length:>6} {shown}   {', '.join(f'{value:.2f}x' for value in list(faster.values())[1:])}")
            results += [
                {"length": length, "precision": name, **asdict(timing), "speedup": faster[name]}
                for name, timing in zip(runtimes, timings, strict=True)
            ]
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps({"machine": about, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
