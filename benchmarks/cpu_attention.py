"""Times the CPU attention kernel beside its peers, on the same inputs and threads, in one run.

Peers: torch's dense attention (sdpa), ONNX Runtime's (ort_mha), torch's flex_attention on the same blocks (flex), this package's
reference in plain torch (reference), and that through torch.compile. A large matrix product takes its turns with them.

Every answer is checked before it is timed. All take turns, so that whatever else the machine does hits each of them.

    python benchmarks/cpu_attention.py --lengths 512 --lengths 4096 --threads 2 --json results.json

    python benchmarks/cpu_attention.py --scaling --peer sdpa --threads 1 --threads 2 --json results.json --plots docs/images

    python benchmarks/cpu_attention.py --preset base-4096-8-d3 --dtype float32 --dtype bfloat16
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import tables
import torch
from cpu_peers import PEERS, TOLERANCE, LeftOutError, Problem, open_peer
from measure import MATMUL_GFLOP, REST, Timing, large_matmul, machine, take_turns

from mra_export import kernel
from mra_export.contract import BLOCK_SIZE, Attributes, attention_scale, block_budget
from mra_export.model.attention import Selection, mra_attention

SCALING = tuple(512 << n for n in range(6))
_TURN = 0.05


@dataclass(frozen=True)
class Row:
    """One length, dtype and number of threads. shape: what decides K.

    exact_gflop: multiply-adds (times two) of the exact blocks alone. timings: "mra" (the kernel), "matmul" (a large float32 product
    of matmul_gflop) and the peers. left_out: peer -> why it was not timed. max_error: the kernel's, beside the float32 reference.
    """

    shape: str
    length: int
    dtype: str
    threads: int
    num_blocks: int
    max_error: float
    exact_gflop: float
    matmul_gflop: float
    timings: dict[str, Timing]
    left_out: dict[str, str]


@dataclass(frozen=True)
class Shape:
    """attributes(length) of what is timed. budget: K; None: blocks_per_row for each block row."""

    name: str
    heads: int
    head_size: int
    blocks_per_row: int
    budget: int | None = None
    first: int = 0
    diagonal: int = 0

    def attributes(self, length: int) -> Attributes:
        budget = self.budget or self.blocks_per_row * -(-length // BLOCK_SIZE)
        return Attributes(self.heads, budget, attention_scale(self.head_size), "full", self.first, self.diagonal)


def preset_shape(name: str) -> Shape:
    from mra_export.model import MraConfig
    from mra_export.presets import PRESETS

    config = MraConfig(**PRESETS[name])
    return Shape(
        name,
        config.num_attention_heads,
        config.hidden_size // config.num_attention_heads,
        config.block_per_row,
        block_budget(config.max_position_embeddings, config.block_per_row),
        config.initial_prior_first_n_blocks,
        config.initial_prior_diagonal_n_blocks,
    )


@dataclass(frozen=True)
class Limits:
    """Lengths above which a peer is left out, and seconds that a compiler gets."""

    dense: int
    reference: int
    compiled: int
    compile_seconds: float

    def reason(self, peer: str, length: int) -> str | None:
        limit = {"reference": self.reference, "reference_compiled": self.compiled}.get(peer, self.dense)
        return f"N above {limit}" if length > limit else None


def measure(shape: Shape, length: int, dtype: str, threads: int, peers: tuple[str, ...], limits: Limits, seconds: float) -> Row:
    """Batch 1. Checks everything, then times it in turns."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, length, shape.heads * shape.head_size).to(getattr(torch, dtype)) for _ in range(3))
    mask = torch.ones(1, length, dtype=torch.int32)
    context = torch.empty_like(query)
    attributes = shape.attributes(length)

    def ours() -> torch.Tensor:
        addresses = (x.data_ptr() for x in (query, key, value, mask, context))
        kernel.attention_cpu(attributes, dtype, 1, length, shape.head_size, *addresses, num_threads=threads)
        return context

    problem = Problem(query, key, value, mask, attributes, selected(query, key, mask, attributes), threads, limits.compile_seconds)
    max_error = check(ours(), problem)
    calls = {"mra": ours, "matmul": large_matmul()}
    left_out = {}
    for peer in peers:
        try:
            if reason := limits.reason(peer, length):
                raise LeftOutError(reason)
            calls[peer] = open_peer(peer, problem)
        except LeftOutError as error:
            left_out[peer] = str(error)
    with torch.no_grad():
        timings = take_turns(list(calls.values()), seconds, rest=REST, turn=_TURN)
    exact_gflop = (
        min(attributes.num_blocks, (-(-length // BLOCK_SIZE)) ** 2) * BLOCK_SIZE**2 * 4 * shape.head_size * shape.heads / 1e9
    )
    return Row(
        shape.name,
        length,
        dtype,
        threads,
        attributes.num_blocks,
        max_error,
        exact_gflop,
        MATMUL_GFLOP,
        dict(zip(calls, timings, strict=True)),
        left_out,
    )


def selected(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor, attributes: Attributes) -> Selection:
    """The kernel's own selection."""
    # Through float32 arrays, which round nothing: numpy has no bfloat16, and selection is made in float32 whatever the type is.
    arrays = (x.float().numpy() for x in (query, key))
    chosen, excluded, score = (torch.from_numpy(x) for x in kernel.selection(*arrays, mask.numpy(), attributes))
    return Selection(chosen, excluded, torch.zeros_like(score, dtype=torch.int64), score, torch.zeros(chosen.shape[:2]))


def check(context: torch.Tensor, problem: Problem) -> float:
    """Largest error of context, (1, N, H * D), beside the float32 reference given the kernel's selection. Exits if too large."""
    wide = (x.float() for x in (problem.query, problem.key, problem.value))
    with torch.no_grad():
        expected = mra_attention(*wide, problem.mask, problem.attributes, selection=problem.selection)
    error = float((context.float() - expected).abs().max())
    limit = TOLERANCE[problem.dtype]
    if not error <= limit:
        raise click.ClickException(f"N {context.shape[1]} {problem.dtype}: error {error:.3g} is above {limit}: not timed")
    return error


@click.command(help=__doc__)
@click.option("--lengths", multiple=True, type=click.IntRange(min=1), help="N; repeat for several. Default: 512 1024 4096.")
@click.option("--scaling", is_flag=True, help=f"N = {SCALING[0]}, twice that, ... {SCALING[-1]}.")
@click.option(
    "--dtype", "dtypes", multiple=True, type=click.Choice(sorted(TOLERANCE)), help="Repeat for several. Default: float32."
)
@click.option("--threads", multiple=True, type=click.IntRange(min=1), help="Repeat for several. Default: torch's own number.")
@click.option("--peer", "peers", multiple=True, type=click.Choice((*PEERS, "none")), help="Repeat for several. Default: all.")
@click.option("--preset", type=click.Choice(("base-512-4", "base-4096-8-d3")), help="Attributes of a published checkpoint.")
@click.option("--heads", type=int, default=12, show_default=True)
@click.option("--head-size", type=int, default=64, show_default=True)
@click.option(
    "--blocks-per-row", type=int, default=4, show_default=True, help="K / nb, the exact blocks of a block row on average."
)
@click.option("--seconds", type=float, default=4.0, show_default=True, help="Time for each row, all peers together.")
@click.option(
    "--dense-up-to", type=int, default=8192, show_default=True, help="Leave sdpa, ort_mha and flex out above this length."
)
@click.option("--reference-up-to", type=int, default=4096, show_default=True, help="Leave the reference out above this length.")
@click.option("--compiled-up-to", type=int, default=1024, show_default=True, help="Leave reference_compiled out above this length.")
@click.option("--compile-seconds", type=float, default=120.0, show_default=True, help="What a compiled peer gets to compile.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write everything to this file.")
@click.option("--plots", "plots_folder", type=click.Path(path_type=Path, file_okay=False), help="Also draw it, into this folder.")
def main(
    lengths: tuple[int, ...],
    scaling: bool,
    dtypes: tuple[str, ...],
    threads: tuple[int, ...],
    peers: tuple[str, ...],
    preset: str | None,
    heads: int,
    head_size: int,
    blocks_per_row: int,
    seconds: float,
    dense_up_to: int,
    reference_up_to: int,
    compiled_up_to: int,
    compile_seconds: float,
    json_path: Path | None,
    plots_folder: Path | None,
) -> None:
    if plots_folder:
        try:
            import plots
        except ImportError as error:
            raise click.UsageError(f"--plots needs matplotlib ({error}): pip install matplotlib") from error
    shape = preset_shape(preset) if preset else Shape(f"K = {blocks_per_row} a row", heads, head_size, blocks_per_row)
    limits = Limits(dense_up_to, reference_up_to, compiled_up_to, compile_seconds)
    names = tuple(peer for peer in peers or PEERS if peer != "none")
    default = {"base-512-4": (512,), "base-4096-8-d3": (4096,)}.get(preset or "", (512, 1024, 4096))
    about = machine() | {"batch": 1, "heads": shape.heads, "head_size": shape.head_size}
    for name, fact in about.items():
        print(f"{name:16} {fact}")
    rows = []
    for count in threads or (torch.get_num_threads(),):
        torch.set_num_threads(count)
        for length in sorted({*lengths, *(SCALING if scaling else ())}) or default:
            for dtype in dtypes or ("float32",):
                row = measure(shape, length, dtype, count, names, limits, seconds)
                rows.append(asdict(row))
                print(tables.line(rows[-1]), flush=True)
    results = {"machine": about, "results": rows}
    print("\n" + tables.markdown(results))
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(results, indent=2) + "\n")
    if plots_folder:
        for path in plots.draw(results, plots_folder):
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
