"""Times whole encoders on the CPU, batch 1, side by side in one run: MRA in ONNX Runtime and torch, dense RoBERTa in both.

The dense peers have the same dimensions and random weights; the fastest one at each length is what ours is held against. Answers
are checked before they are timed: MRA's beside PyTorch's reference attention, each dense graph's beside its torch model. All take
turns, with a pause before each, so that no peer's waiting threads spin during another's time.

    python benchmarks/cpu_model.py --length 512 --threads 2 --json results.json --plot times.svg
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
import transformers
from dense_roberta import dense_model
from measure import Timing, machine, matmul_gflops, take_turns, why_not_compiled
from onnxruntime.transformers.fusion_options import FusionOptions
from onnxruntime.transformers.optimizer import optimize_model
from transformers import RobertaModel

from mra_export import MraRuntime, parity
from mra_export.backends.onnx_runtime import session_options
from mra_export.bundle import MODEL, OP_LIBRARY
from mra_export.contract import TOLERANCES
from mra_export.export import export_bundle
from mra_export.onnx_model import unaliased_rows
from mra_export.presets import PRESETS, init_checkpoint

Array = npt.NDArray[np.generic]
OURS = "mra onnxruntime"
MRA_TORCH = "mra torch"
DENSE_COMPILED = "dense torch.compile"
DENSE_GRAPHS = ("dense default", "dense no mask", "dense multi-head", "dense tuned")
"""Dense RoBERTa, exported and through onnxruntime.transformers.optimizer, in the forms that a user may choose from:

default     the optimizer's own choice: one Attention node a layer, with the padding mask
no mask     the same without a padding mask
multi-head  MultiHeadAttention nodes (ONNX Runtime's flash attention), without a padding mask
tuned       that, and what our exporter and sessions do: no SkipLayerNormalization, feed-forward rows 16 columns wider
"""
PEERS = (OURS, *DENSE_GRAPHS, MRA_TORCH, DENSE_COMPILED)
PRODUCTS = {"MatMul", "Gemm", "FusedMatMul"}
DENSE_TOLERANCE = 1e-3
"""Largest absolute error of a dense graph beside its torch model, outputs of unit size."""
PAUSE = 0.02
"""Seconds for the last peer's threads to go to sleep."""


@dataclass(frozen=True)
class Row:
    """One peer at one length.

    vs_dense: its median / that of the fastest dense graph which a user gets. kernels: milliseconds by operator, from a profile.
    """

    length: int
    peer: str
    timing: Timing
    vs_dense: float | None
    kernels: dict[str, float] | None

    @property
    def products(self) -> float | None:
        """Milliseconds of the matrix products. An Attention node hides three of them; MultiHeadAttention and MraAttention none."""
        if not self.kernels or "Attention" in self.kernels:
            return None
        return sum(time for name, time in self.kernels.items() if name in PRODUCTS)

    @property
    def other_share(self) -> float | None:
        return None if self.products is None or not self.kernels else 1 - self.products / sum(self.kernels.values())


@dataclass(frozen=True)
class Peer:
    """run: takes input_ids and attention_mask, (1, N) int64. profiled: a session like the one that runs, or None."""

    run: Callable[[Array, Array], Array]
    profiled: Callable[[Path], ort.InferenceSession] | None = None


def mra_bundle(preset: str, folder: Path) -> Path:
    target = folder / "bundle"
    if not target.exists():
        with tempfile.TemporaryDirectory() as scratch:
            export_bundle(init_checkpoint(preset, Path(scratch) / "checkpoint"), target, task="feature-extraction")
    return target


def mra_peer(bundle: Path, backend: str, threads: int, reference: bool = False) -> Peer:
    onnx_runtime = backend == "onnxruntime"
    runtime = MraRuntime.load(bundle, backend, use_op_library=not reference, intra_op_threads=threads if onnx_runtime else None)

    def run(ids: Array, mask: Array) -> Array:
        return runtime.run(input_ids=ids, attention_mask=mask)["last_hidden_state"]

    def profiled(prefix: Path) -> ort.InferenceSession:
        return session(bundle / MODEL, session_options(bundle / OP_LIBRARY, threads), prefix)

    return Peer(run, profiled if onnx_runtime else None)


class _Forward(torch.nn.Module):
    def __init__(self, model: RobertaModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def dense_graph(model: RobertaModel, form: str, target: Path) -> None:
    """Write the optimised graph of one of DENSE_GRAPHS. Exits where a fusion did not fire: that peer would be slow for nothing."""
    tuned = form == "dense tuned"
    multi_head = tuned or form == "dense multi-head"
    example = (torch.full((2, 40), 7), torch.ones(2, 40, dtype=torch.int64))
    names = ["input_ids", "attention_mask"]
    exported = target.with_suffix(".exported.onnx")
    with warnings.catch_warnings(), torch.no_grad(), unaliased_rows(model) if tuned else nullcontext():
        warnings.simplefilter("ignore")
        # The TorchScript exporter: the optimizer finds no attention in what torch.export makes of transformers 5.
        torch.onnx.export(
            _Forward(model).eval(),
            example,
            str(exported),
            dynamo=False,
            opset_version=17,
            input_names=names,
            output_names=["last_hidden_state"],
            dynamic_axes={name: {0: "batch", 1: "sequence"} for name in (*names, "last_hidden_state")},
        )
    options = FusionOptions("bert")
    options.use_multi_head_attention = multi_head
    options.enable_skip_layer_norm = not tuned
    options.enable_bias_skip_layer_norm = not tuned
    config = model.config
    optimized = optimize_model(
        str(exported),
        model_type="bert",
        num_heads=config.num_attention_heads,
        hidden_size=config.hidden_size,
        opt_level=0,
        optimization_options=options,
    )
    exported.unlink()
    attention = "MultiHeadAttention" if multi_head else "Attention"
    layers = config.num_hidden_layers
    fused = optimized.get_fused_operator_statistics()
    wanted = {attention: layers, "BiasGelu": layers, "SkipLayerNormalization": 0 if tuned else 2 * layers}
    if any(fused[name] != count for name, count in wanted.items()):
        raise click.ClickException(f"{form}: onnxruntime {ort.__version__}'s optimizer fused {fused}, not {wanted}")
    if form != "dense default":
        for node in optimized.model.graph.node:
            if node.op_type == attention:
                del node.input[4 if multi_head else 3 :]  # the padding mask
        optimized.prune_graph()
    optimized.save_model_to_file(str(target))


def dense_peer(model: RobertaModel, form: str, folder: Path, threads: int) -> Peer:
    graph = folder / f"{form.replace(' ', '-')}.onnx"
    if not graph.exists():
        dense_graph(model, form, graph)
    options = session_options(None, threads) if form == "dense tuned" else ort.SessionOptions()
    options.intra_op_num_threads = threads
    running = session(graph, options)
    names = [value.name for value in running.get_inputs()]

    def run(ids: Array, mask: Array) -> Array:
        given = {"input_ids": ids, "attention_mask": mask}
        return running.run(None, {name: given[name] for name in names})[0]

    def profiled(prefix: Path) -> ort.InferenceSession:
        own = session_options(None, threads) if form == "dense tuned" else ort.SessionOptions()
        own.intra_op_num_threads = threads
        return session(graph, own, prefix)

    return Peer(run, profiled)


def session(graph: Path, options: ort.SessionOptions, profile: Path | None = None) -> ort.InferenceSession:
    options.log_severity_level = 3
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def compiled_peer(model: RobertaModel) -> Peer:
    """torch.compile of the dense model with torch's own attention (SDPA) and no padding mask."""
    model.set_attn_implementation("sdpa")
    compiled = torch.compile(model, dynamic=False)

    def run(ids: Array, mask: Array) -> Array:
        with torch.inference_mode():
            return compiled(input_ids=torch.from_numpy(ids)).last_hidden_state.numpy()

    return Peer(run)


def kernel_times(peer: Peer, ids: Array, mask: Array, folder: Path, calls: int) -> dict[str, float] | None:
    """Milliseconds of one call by operator: medians over `calls` profiled ones."""
    if peer.profiled is None:
        return None
    profiled = peer.profiled(folder / "profile")
    given = {"input_ids": ids, "attention_mask": mask}
    feeds = {value.name: given[value.name] for value in profiled.get_inputs()}
    for _ in range(calls + 1):
        profiled.run(None, feeds)
    path = Path(profiled.end_profiling())
    events = json.loads(path.read_text())
    path.unlink()
    nodes: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            nodes[event["args"]["op_name"], event["name"]].append(event["dur"] / 1e3)
    times: Counter[str] = Counter()
    for (operator, _), durations in nodes.items():
        times[operator] += statistics.median(durations[1:])
    return dict(times.most_common())


def check_mra(name: str, actual: Array, expected: Array, length: int) -> None:
    """Blocks are chosen freely here: a near-tie may move a few values (docs/parity.md)."""
    case = f"1x{length}"
    row = parity.judge(
        "benchmark", name, "fp32", case, "last_hidden_state", actual, expected, TOLERANCES["fp32"].model_free, free=True
    )
    if row.status != parity.PASS:
        raise click.ClickException(f"{name}, N {length}: {row.reason}: not timed")


def check_dense(name: str, actual: Array, expected: Array, length: int) -> None:
    error = float(np.abs(actual - expected).max())
    if not error <= DENSE_TOLERANCE:
        raise click.ClickException(f"{name}, N {length}: error {error:.3g} is above {DENSE_TOLERANCE}: not timed")


def open_peers(preset: str, wanted: tuple[str, ...], threads: int, lengths: list[int], folder: Path) -> dict[str, Peer]:
    """The peers, each checked at each length. folder: where their files are, or are made."""
    folder.mkdir(parents=True, exist_ok=True)
    bundle = mra_bundle(preset, folder)
    dense = dense_model(preset)
    peers = {form: dense_peer(dense, form, folder, threads) for form in DENSE_GRAPHS if form in wanted}
    if OURS in wanted:
        peers[OURS] = mra_peer(bundle, "onnxruntime", threads)
    if MRA_TORCH in wanted:
        peers[MRA_TORCH] = mra_peer(bundle, "torch", threads)
    reference = mra_peer(bundle, "torch", threads, reference=True)
    dense.set_attn_implementation("sdpa")
    for length in lengths:
        ids, mask = tokens(length)
        expected = reference.run(ids, mask)
        with torch.inference_mode():
            dense_expected = dense(input_ids=torch.from_numpy(ids)).last_hidden_state.numpy()
        for name, peer in peers.items():
            if name in (OURS, MRA_TORCH):
                check_mra(name, peer.run(ids, mask), expected, length)
            else:
                check_dense(name, peer.run(ids, mask), dense_expected, length)
    if DENSE_COMPILED in wanted:
        peers[DENSE_COMPILED] = compiled_peer(dense)
    return {name: peers[name] for name in PEERS if name in peers}


def tokens(length: int) -> tuple[Array, Array]:
    """Random ids, (1, N), none of them padding, and a mask of ones."""
    ids = np.random.default_rng(length).integers(5, 260, (1, length))
    return ids, np.ones_like(ids)


def measure(peers: dict[str, Peer], length: int, seconds: float, folder: Path) -> list[Row]:
    ids, mask = tokens(length)

    def pause() -> None:
        time.sleep(PAUSE)

    calls: list[Callable[[], object]] = []
    for peer in peers.values():
        calls += [pause, lambda peer=peer: peer.run(ids, mask)]
    timings = dict(zip(peers, take_turns(calls, seconds)[1::2], strict=True))
    dense = [timings[form].median for form in DENSE_GRAPHS[:-1] if form in timings]
    fastest = min(dense) if dense else None
    calls_profiled = 3 if length > 1024 else 10
    kernels = {name: kernel_times(peer, ids, mask, folder, calls_profiled) for name, peer in peers.items()}
    return [
        Row(length, name, timing, timing.median / fastest if fastest else None, kernels[name]) for name, timing in timings.items()
    ]


def plot(rows: list[Row], target: Path, title: str) -> None:
    """Milliseconds over N, both axes logarithmic; a line for each peer."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name in PEERS:
        own = sorted((row.length, row.timing.median) for row in rows if row.peer == name)
        if own:
            axes.plot(*zip(*own, strict=True), marker="o", label=name, linewidth=2.5 if name == OURS else 1.2)
    lengths = sorted({row.length for row in rows})
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms", title=title)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)
    pyplot.close(figure)


@click.command(help=__doc__)
@click.option("--length", "lengths", multiple=True, type=int, help="N; repeat for several. Default: 32 128 512 1024 4096.")
@click.option("--peer", "chosen", multiple=True, type=click.Choice(PEERS), help="Default: all.")
@click.option(
    "--preset",
    type=click.Choice(sorted(PRESETS)),
    help="Default: base-512-4 up to 512 tokens, base-4096-8-d3 above.",
)
@click.option("--threads", type=int, default=torch.get_num_threads(), show_default=True)
@click.option("--seconds", type=float, default=30.0, show_default=True, help="Time for each length; at least five rounds.")
@click.option("--compile-up-to", type=int, default=512, show_default=True, help="Leave torch.compile out above this length.")
@click.option("--folder", type=click.Path(path_type=Path), help="Keep the bundles and graphs here, and take those that are there.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write everything to this file.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="Also draw time over N (.svg or .png).")
def main(
    lengths: tuple[int, ...],
    chosen: tuple[str, ...],
    preset: str | None,
    threads: int,
    seconds: float,
    compile_up_to: int,
    folder: Path | None,
    json_path: Path | None,
    plot_path: Path | None,
) -> None:
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    if DENSE_COMPILED in (chosen or PEERS) and (reason := why_not_compiled()):
        raise click.ClickException(f"{reason}, or name the other peers with --peer")
    about = machine() | {
        "threads": threads,
        "batch": 1,
        "onnxruntime": ort.__version__,
        "transformers": transformers.__version__,
        "matmul_gflops": round(matmul_gflops(1.0), 1),
    }
    for name, value in about.items():
        print(f"{name:16} {value}")
    by_preset: dict[str, list[int]] = defaultdict(list)
    for length in lengths or (32, 128, 512, 1024, 4096):
        by_preset[preset or ("base-512-4" if length <= 512 else "base-4096-8-d3")].append(length)
    titles = ("N", "peer", "ms (quartiles)", "vs dense", "products ms", "other")
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        for name, own in by_preset.items():
            print(f"\n{name}\n" + "{:>6} {:20} {:>28} {:>9} {:>12} {:>7}".format(*titles))
            peers = open_peers(name, chosen or PEERS, threads, own, (folder or scratch) / name)
            for length in own:
                running = {key: peer for key, peer in peers.items() if key != DENSE_COMPILED or length <= compile_up_to}
                for row in measure(running, length, seconds, scratch):
                    results.append((name, row))
                    show(row)
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        written = [
            {"preset": name} | asdict(row) | {"products": row.products, "other_share": row.other_share} for name, row in results
        ]
        json_path.write_text(json.dumps({"machine": about, "results": written}, indent=2) + "\n")
    if plot_path:
        plot([row for _, row in results], plot_path, f"{about['cpu']}, {threads} threads, batch 1, float32")


def show(row: Row) -> None:
    timing = row.timing
    spread = f"{timing.median:.1f} ({timing.lower_quartile:.1f}-{timing.upper_quartile:.1f})"
    ratio = f"{row.vs_dense:.2f}x" if row.vs_dense else "-"
    products = "-" if row.products is None else f"{row.products:.1f}"
    share = "-" if row.other_share is None else f"{row.other_share:.1%}"
    print(f"{row.length:>6} {row.peer:20} {spread:>28} {ratio:>9} {products:>12} {share:>7}", flush=True)


if __name__ == "__main__":
    main()
