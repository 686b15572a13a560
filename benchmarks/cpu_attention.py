"""Times the CPU attention kernel beside torch's scaled_dot_product_attention, on the same inputs, threads and pool, in one run.

The kernel's answer is checked before it is timed. The two take turns, so that whatever else the machine does hits both.

    python benchmarks/cpu_attention.py --lengths 512 --lengths 4096 --threads 2 --json results.json
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import torch
from measure import Timing, machine, matmul_gflops, take_turns

from mra_export import kernel
from mra_export.contract import BLOCK_SIZE, Attributes, attention_scale
from mra_export.model.attention import Selection, mra_attention

CHECK_TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
"""Largest absolute error beside the reference in float32, for inputs of unit size: rounding of the output type, and a floor."""


@dataclass(frozen=True)
class Row:
    """One length and dtype. exact_gflop: multiply-adds (times two) of the exact blocks alone. peer: None where it is left out."""

    length: int
    dtype: str
    num_blocks: int
    max_error: float
    ours: Timing
    peer: Timing | None
    exact_gflop: float

    @property
    def speedup(self) -> float | None:
        return self.peer.median / self.ours.median if self.peer else None


def measure(
    length: int, dtype: torch.dtype, heads: int, size: int, blocks_per_row: int, threads: int, seconds: float, peer: bool
) -> Row:
    """Batch 1. Checks the kernel against the reference with the same selection, then times it and its peer."""
    name = str(dtype).removeprefix("torch.")
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, length, heads * size).to(dtype) for _ in range(3))
    mask = torch.ones(1, length, dtype=torch.int32)
    context = torch.empty_like(query)
    num_blocks = blocks_per_row * -(-length // BLOCK_SIZE)
    attributes = Attributes(heads, num_blocks, attention_scale(size))

    def ours() -> None:
        addresses = (x.data_ptr() for x in (query, key, value, mask, context))
        kernel.attention_cpu(attributes, name, 1, length, size, *addresses, num_threads=threads)

    def dense() -> torch.Tensor:
        q, k, v = (x.view(1, length, heads, size).transpose(1, 2) for x in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=attributes.scale)

    ours()
    max_error = check(query, key, value, mask, context, attributes, name)
    timings = take_turns([ours, dense] if peer else [ours], seconds)
    exact_gflop = num_blocks * BLOCK_SIZE**2 * 4 * size * heads / 1e9
    return Row(length, name, num_blocks, max_error, timings[0], timings[1] if peer else None, exact_gflop)


def check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    context: torch.Tensor,
    attributes: Attributes,
    dtype: str,
) -> float:
    """Largest error of context, (1, N, H * D), beside the float32 reference given the kernel's selection. Exits if too large."""
    wide = [x.float() for x in (query, key, value)]
    # Through float32 arrays, which round nothing: numpy has no bfloat16, and selection is made in float32 whatever the type is.
    chosen, excluded, score = (
        torch.from_numpy(x) for x in kernel.selection(wide[0].numpy(), wide[1].numpy(), mask.numpy(), attributes)
    )
    selection = Selection(chosen, excluded, torch.zeros_like(score, dtype=torch.int64), score, torch.zeros(chosen.shape[:2]))
    expected = mra_attention(*wide, mask, attributes, selection=selection)
    error = float(np.abs((context.float() - expected).numpy()).max())
    if not error <= CHECK_TOLERANCE[dtype]:
        raise click.ClickException(f"N {query.shape[1]} {dtype}: error {error:.3g} is above {CHECK_TOLERANCE[dtype]}: not timed")
    return error


@click.command(help=__doc__)
@click.option("--lengths", multiple=True, type=int, help="N; repeat for several. Default: 512 1024 4096.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(sorted(CHECK_TOLERANCE)), help="Default: float32.")
@click.option("--threads", type=int, default=torch.get_num_threads(), show_default=True)
@click.option("--heads", type=int, default=12, show_default=True)
@click.option("--head-size", type=int, default=64, show_default=True)
@click.option(
    "--blocks-per-row", type=int, default=4, show_default=True, help="K / nb, the exact blocks of a block row on average."
)
@click.option("--seconds", type=float, default=2.0, show_default=True, help="Time for each length and dtype.")
@click.option("--dense-up-to", type=int, default=8192, show_default=True, help="Leave the dense peer out above this length.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write everything to this file.")
def main(
    lengths: tuple[int, ...],
    dtypes: tuple[str, ...],
    threads: int,
    heads: int,
    head_size: int,
    blocks_per_row: int,
    seconds: float,
    dense_up_to: int,
    json_path: Path | None,
) -> None:
    torch.set_num_threads(threads)
    about = machine() | {"threads": threads, "batch": 1, "heads": heads, "head_size": head_size, "blocks_per_row": blocks_per_row}
    about["matmul_gflops"] = round(matmul_gflops(min(seconds, 1.0)), 1)
    for name, value in about.items():
        print(f"{name:16} {value}")
    titles = ("N", "dtype", "ours ms (quartiles)", "sdpa ms (quartiles)", "faster", "GFLOP/s", "max error")
    print("\n{:>6} {:9} {:>26} {:>26} {:>7} {:>8} {:>10}".format(*titles))
    rows = []
    for length in lengths or (512, 1024, 4096):
        for dtype in dtypes or ("float32",):
            row = measure(length, getattr(torch, dtype), heads, head_size, blocks_per_row, threads, seconds, length <= dense_up_to)
            rows.append(row)
            shown = [f"{t.median:.2f} ({t.lower_quartile:.2f}-{t.upper_quartile:.2f})" if t else "-" for t in (row.ours, row.peer)]
            faster = f"{row.speedup:.1f}x" if row.speedup else "-"
            rate = row.exact_gflop / row.ours.median * 1e3
            print(f"{row.length:>6} {row.dtype:9} {shown[0]:>26} {shown[1]:>26} {faster:>7} {rate:>8.0f} {row.max_error:>10.1e}")
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        results = [asdict(row) | {"speedup": row.speedup} for row in rows]
        json_path.write_text(json.dumps({"machine": about, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
