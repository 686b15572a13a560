"""The mra-export command. Each subcommand is a few lines over the library; heavy imports happen inside them."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mra_export import __version__
from mra_export.contract import INT8, PRECISIONS
from mra_export.errors import MraExportError, ParityError

if TYPE_CHECKING:
    from rich.console import Console

    from mra_export.engine import EngineOptions
    from mra_export.plan import EngineEntry

_Function = TypeVar("_Function", bound=Callable[..., Any])

INTERRUPTED = 130
TERMINATED = 143
_PLAIN_WIDTH = 200
"""Columns of a table that goes to a file or pipe."""
_VERIFY_BACKENDS = (
    "torch",
    "torch-reference",
    "onnxruntime",
    "onnxruntime-function",
    "onnxruntime-cuda",
    "onnx-reference",
    "tensorrt",
)
_BENCH_BACKENDS = ("auto", "torch", "onnxruntime", "onnxruntime-function", "tensorrt")
_PRESETS = ("base-512-4", "base-4096-8-d3", "tiny")
_TASKS = (
    "auto",
    "fill-mask",
    "text-classification",
    "multiple-choice",
    "token-classification",
    "question-answering",
    "feature-extraction",
)


class _TerminatedError(BaseException):
    """SIGTERM came."""


@contextlib.contextmanager
def _cleaning_up_on_sigterm() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does: nothing half-written stays, nor a child. Ctrl-C reaches no job in the background.

    A signal that whoever started us handles or ignores stays as it is, as Python has it with Ctrl-C.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def end(*_: object) -> None:
        raise _TerminatedError

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Command(click.Command):
    """A subcommand with -v, -q and --debug, whose errors become one line on stderr and an exit code (errors.py)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += [
            click.Option(["-v", "--verbose"], is_flag=True, help="Say more: what was chosen and why."),
            click.Option(["-q", "--quiet"], is_flag=True, help="No progress, only results and errors."),
            click.Option(["--debug"], is_flag=True, help="Show the traceback of an error."),
        ]

    def invoke(self, context: click.Context) -> Any:
        verbose, quiet, debug = (context.params.pop(name) for name in ("verbose", "quiet", "debug"))
        if verbose and quiet:
            raise click.UsageError("--verbose and --quiet contradict each other: pass one of them.", context)
        context.obj = Talker(verbose, quiet)
        try:
            with _cleaning_up_on_sigterm():
                return super().invoke(context)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except (KeyboardInterrupt, click.Abort):
            click.echo("interrupted", err=True)
            context.exit(INTERRUPTED)
        except _TerminatedError:
            click.echo("terminated", err=True)
            context.exit(TERMINATED)
        except BrokenPipeError:  # the reader of our output went away
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # keeps the interpreter's last flush quiet
            context.exit(1)
        except MraExportError as error:
            self._show(error, debug)
            context.exit(error.exit_code)
        except Exception as error:
            self._show(error, debug)
            if not debug:
                click.echo("This is unexpected: run the same command with --debug to see where it comes from.", err=True)
            context.exit(1)
        finally:
            context.obj.close()

    @staticmethod
    def _show(error: Exception, debug: bool) -> None:
        if debug:
            import traceback

            click.echo("".join(traceback.format_exception(error)), err=True)
        name = "" if isinstance(error, MraExportError) else f"{type(error).__name__}: "
        click.echo(f"error: {name}{error}", err=True)


class Talker:
    """Progress on stderr and results on stdout: rich on a terminal, plain lines otherwise."""

    def __init__(self, verbose: bool, quiet: bool) -> None:
        self._quiet = quiet
        self.verbose = verbose
        self._status: Any = None
        self._started = time.monotonic()
        logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        if not verbose:
            os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

    def progress(self, text: str, passing: bool = False) -> None:
        """Say what is being done now. passing: of interest only while it lasts, so not for a log."""
        if self._quiet:
            return
        if not sys.stderr.isatty():
            if passing:
                return
            click.echo(f"[{time.monotonic() - self._started:6.1f} s] {text}", err=True)
            return
        if self._status is None:
            self._status = _console(stderr=True).status(text)
            self._status.start()
        self._status.update(text)

    def print(self, thing: Any) -> None:
        """Print a table or text to stdout."""
        self.close()
        _console().print(thing)

    def close(self) -> None:
        """Take the progress line away."""
        if self._status is not None:
            self._status.stop()
            self._status = None


class OutputFile(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.2 on
    """A file to be written: refused before any work if it could not be."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Path:
        path = Path(value)
        if path.is_dir():
            self.fail(f"{path} is a folder: name a file in it.", param, context)
        if not path.absolute().parent.is_dir():
            self.fail(f"{path.parent} does not exist: make that folder first.", param, context)
        if not os.access(path.absolute().parent, os.W_OK | os.X_OK):
            self.fail(f"{path.parent} cannot be written to: choose another folder.", param, context)
        return path


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="mra-export")
def main() -> None:
    """Take an MRA checkpoint to ONNX and on to every runtime, and prove that they agree with PyTorch.

    \b
    mra-export export CHECKPOINT BUNDLE     make a bundle and check it
    mra-export engine BUNDLE                add a TensorRT engine to it
    mra-export run BUNDLE --text "..."      try it
    mra-export verify BUNDLE                compare every runtime with PyTorch
    mra-export bench BUNDLE                 time them
    mra-export triton BUNDLE REPO           serve it with Triton

    Exit codes: 0 done, 2 wrong usage, 3 a runtime differs, 4 a bundle or library does not fit, 130 interrupted, 143 terminated,
    1 anything else.
    """


def engine_options(backend_flags: tuple[str, ...], default: str, extra: tuple[str, ...]) -> Callable[[_Function], _Function]:
    """The options that say how to build an engine, for the commands that build one; engine.EngineOptions explains them."""
    flags = [
        click.option(
            *backend_flags,
            "engine_backend",
            type=click.Choice((*extra, "auto", "tensorrt", "tensorrt-rtx")),
            default=default,
            show_default=True,
            help="auto: TensorRT where it and a GPU are, else TensorRT-RTX, which builds anywhere.",
        ),
        click.option("--min-shapes", multiple=True, metavar="SHAPE", help="Least shape, as input_ids:1x1; once per profile."),
        click.option("--opt-shapes", multiple=True, metavar="SHAPE", help="Shape to be fastest at; once per profile."),
        click.option("--max-shapes", multiple=True, metavar="SHAPE", help="Largest shape, as input_ids:8x512; once per profile."),
        click.option("--no-plugin", is_flag=True, help="Build the operator's definition in: no plugin needed, N x N memory."),
        click.option("--embed-plugin", is_flag=True, help="Put the plugin library inside the plan."),
        click.option(
            "--compute-capability",
            "compute_capabilities",
            multiple=True,
            metavar="CC",
            help="TensorRT-RTX: a GPU to build for, as 8.9; may be given several times; default all it knows.",
        ),
        click.option("--version-compatible", is_flag=True, help="TensorRT: also for later releases of this major version."),
        click.option(
            "--hardware-compatibility",
            type=click.Choice(("ampere-plus", "same-compute-capability")),
            is_flag=False,
            flag_value="ampere-plus",
            help="TensorRT: not only for this GPU; without a value: ampere-plus.",
        ),
        click.option("--timing-cache", type=OutputFile(), help="TensorRT: file to read tactic timings from and write them to."),
        click.option("--workspace-mb", type=click.IntRange(min=1), help="MiB of scratch memory that a layer may take."),
        click.option("--builder-opt-level", type=click.IntRange(0, 5), help="0 builds fast, 5 looks longest for fast code."),
    ]

    def add(function: _Function) -> _Function:
        for flag in reversed(flags):
            function = flag(function)
        return function

    return add


def _engine_options(
    engine_backend: str,
    no_plugin: bool,
    min_shapes: tuple[str, ...],
    opt_shapes: tuple[str, ...],
    max_shapes: tuple[str, ...],
    **others: Any,
) -> EngineOptions:
    """What the options of `engine_options` ask for."""
    from mra_export.engine import EngineOptions

    return EngineOptions(
        backend=engine_backend,
        plugin=not no_plugin,
        min_shapes=min_shapes,
        opt_shapes=opt_shapes,
        max_shapes=max_shapes,
        **others,
    )


def _say_engine(talker: Talker, entry: EngineEntry) -> None:
    from mra_export.profiles import describe

    plugin = f"{entry.plugin_layers} MraAttention plugin layers" if entry.plugin else "no plugin"
    talker.print(f"{entry.file}: {entry.dtype}, {plugin}, shapes {describe(entry.profiles)}")


@main.command("export", cls=Command)
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--task", type=click.Choice(_TASKS), default="auto", show_default=True, help="auto: from the checkpoint's architecture."
)
@click.option(
    "--dtype",
    type=click.Choice(PRECISIONS),
    default="fp32",
    show_default=True,
    help="Of weights and outputs; int8: matrix products on 8-bit integers, for CPUs, outputs float32.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path, exists=True),
    help="int8: text file, or folder of them, to fix the scales of activations with; default: each call's own scales.",
)
@click.option(
    "--evaluate",
    type=click.Path(path_type=Path, exists=True),
    help="Held-out text file or folder: also compare masked-token accuracy with PyTorch's.",
)
@click.option("--opset", type=int, default=20, show_default=True, help="ONNX opset, 18 to 23.")
@click.option(
    "--padding-invariant", is_flag=True, help="A text gives the same alone and in any batch; published models were trained without."
)
@click.option("--force", is_flag=True, help="Overwrite a bundle that is at OUT.")
@click.option("--no-verify", is_flag=True, help="Publish without comparing the runtimes with PyTorch.")
@click.option(
    "--no-weights",
    is_flag=True,
    help="Leave model.safetensors out, half of the bundle: for servers. The torch backend and verify need it.",
)
@engine_options(("--engine",), "none", ("none",))
@click.pass_obj
def export_command(
    talker: Talker,
    /,
    model: str,
    out: Path,
    task: str,
    dtype: str,
    calibration: Path | None,
    evaluate: Path | None,
    opset: int,
    padding_invariant: bool,
    force: bool,
    no_verify: bool,
    no_weights: bool,
    engine_backend: str,
    **engine: Any,
) -> None:
    """Turn the checkpoint MODEL, a folder or hub id, into the bundle OUT.

    The bundle is published only when its runtimes agree with PyTorch; an interrupted export leaves nothing.

    \b
    Examples:
      mra-export export uw-madison/mra-base-512-4 mra-base
      mra-export export my-checkpoint my-bundle --dtype fp16 --force
      mra-export export my-checkpoint my-bundle --no-weights
      mra-export export my-checkpoint my-bundle --dtype int8 --calibration some-text/ --evaluate other-text/
      mra-export export my-checkpoint my-bundle --engine tensorrt-rtx --max-shapes input_ids:16x512
    """
    _share_processors()
    from mra_export.export import export_bundle

    if evaluate is not None and no_verify:
        raise click.UsageError("--evaluate is part of what --no-verify leaves out: pass one of them.")
    if evaluate is not None and calibration is not None:
        from mra_export.corpus import check_apart

        check_apart(calibration, evaluate)
    finish = None
    if engine_backend == "none":
        _refuse_engine_options(engine)
    elif dtype == INT8:
        from mra_export.engine import check_dtype

        check_dtype(dtype)
    else:
        finish = _engine_builder(talker, _engine_options(engine_backend, **engine))

    def check(folder: Path) -> list[dict[str, Any]]:
        from mra_export.bundle import Bundle
        from mra_export.verify import verify

        report = verify(Bundle.load(folder), quick=True, held_out=evaluate, progress=talker.progress)
        talker.print(report.table())
        if not report.passed:
            first = report.failed_rows[0]
            raise ParityError(
                f"{out} was not written: {first.backend} differs from PyTorch in {first.check} ({first.case}): {first.reason}. "
                "Pass --no-verify to write it all the same and study it with mra-export verify"
            )
        return [{name: value for name, value in row.as_dict().items() if name != "layers"} for row in report.rows]

    export_bundle(
        model,
        out,
        task=task,
        dtype=dtype,
        calibration=calibration,
        opset=opset,
        padding_invariant=padding_invariant,
        force=force,
        weights=not no_weights,
        finish=finish,
        check=None if no_verify else check,
        progress=talker.progress,
    )
    talker.print(f"{out}: {_megabytes(out)} MB, ready for mra-export run and verify")


def _refuse_engine_options(engine: dict[str, Any]) -> None:
    given = [name for name, value in engine.items() if value]
    if given:
        raise click.UsageError(f"--{given[0].replace('_', '-')} says how to build an engine: add --engine auto, for one.")


def _engine_builder(talker: Talker, options: EngineOptions) -> Callable[[Path], None] | None:
    """What builds the engine into the folder of an export. With "auto", None where none can be built; the reason is said."""
    from mra_export.engine import build_engine, check_can_build
    from mra_export.errors import EngineError, PluginLoadError

    try:
        check_can_build(options)
    except (EngineError, PluginLoadError) as error:
        if options.backend != "auto":
            raise
        talker.print(f"No engine: {error}")
        return None

    def build(folder: Path) -> None:
        from mra_export.bundle import Bundle

        _say_engine(talker, build_engine(Bundle.load(folder), options, talker.progress))

    return build


@main.command("engine", cls=Command)
@click.argument("bundle", type=click.Path(path_type=Path))
@engine_options(("--backend", "--engine"), "auto", ())
@click.pass_obj
def engine_command(talker: Talker, /, bundle: Path, engine_backend: str, **engine: Any) -> None:
    """Build a TensorRT engine from BUNDLE's graph and add it to BUNDLE.

    The engine has one plugin layer per MRA layer. An engine of the same TensorRT, GPU and dtype is replaced; an interrupted build
    leaves BUNDLE as it was.

    \b
    Examples:
      mra-export engine my-bundle
      mra-export engine my-bundle --min-shapes input_ids:1x1 --opt-shapes input_ids:8x128 --max-shapes input_ids:32x512
      mra-export engine my-bundle --backend tensorrt-rtx --compute-capability 8.9 --no-plugin
    """
    from mra_export.bundle import Bundle
    from mra_export.engine import build_engine

    options = _engine_options(engine_backend, **engine)
    talker.progress(f"checking the files of {bundle}")
    _say_engine(talker, build_engine(Bundle.load(bundle), options, talker.progress))


@main.command(cls=Command)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--backend", "backends", multiple=True, type=click.Choice(_VERIFY_BACKENDS), help="May be given several times; default all."
)
@click.option("--json", "json_file", type=OutputFile(), help="Write every row as JSON.")
@click.option("--junit", "junit_file", type=OutputFile(), help="Write every row as a JUnit test case.")
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="Sets of random inputs.")
@click.option("--quick", is_flag=True, help="Four shapes instead of the whole sweep.")
@click.option(
    "--evaluate",
    type=click.Path(path_type=Path, exists=True),
    help="Held-out text file or folder: also compare masked-token accuracy with PyTorch's.",
)
@click.pass_obj
def verify(
    talker: Talker,
    bundle: Path,
    backends: tuple[str, ...],
    json_file: Path | None,
    junit_file: Path | None,
    seeds: int,
    quick: bool,
    evaluate: Path | None,
) -> None:
    """Compare every runtime of BUNDLE with PyTorch: outputs, block selection, the operator alone.

    Exits with 0 when all agree, with 3 when one does not.

    \b
    Examples:
      mra-export verify my-bundle
      mra-export verify my-bundle --backend onnxruntime --seeds 5 --json parity.json --junit parity.xml
    """
    from mra_export.bundle import Bundle

    _share_processors()
    talker.progress(f"checking the files of {bundle}")
    loaded = Bundle.load(bundle)
    from mra_export.report import write_atomically
    from mra_export.verify import verify as compare

    report = compare(loaded, backends, seeds=seeds, quick=quick, held_out=evaluate, progress=talker.progress)
    if json_file is not None:
        write_atomically(json_file, report.json())
    if junit_file is not None:
        write_atomically(junit_file, report.junit())
    talker.print(report.table())
    failed = report.failed_rows
    if failed:
        raise ParityError(f"{len(failed)} of {len(report.rows)} comparisons failed")
    if not report.passed:
        raise ParityError("nothing could be compared: see the reasons in the table")


@main.command("bench", cls=Command)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--backend",
    "backends",
    multiple=True,
    type=click.Choice(_BENCH_BACKENDS),
    help="May be given several times: they take turns. Default auto.",
)
@click.option(
    "--length", "lengths", multiple=True, type=click.IntRange(min=1), help="Tokens, several times; default 128 and the longest."
)
@click.option("--batch", "batches", multiple=True, type=click.IntRange(min=1), help="Rows of a call, several times; default 1.")
@click.option(
    "--mask", type=click.Choice(("full", "ragged")), default="full", show_default=True, help="ragged: rows of random lengths."
)
@click.option("--device", type=click.Choice(("cpu", "cuda")), help="Default cuda for tensorrt, cpu for the others.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of one call on a CPU; default the runtime's own.")
@click.option("--concurrency", type=click.IntRange(min=1), default=1, show_default=True, help="Callers at once, on one runtime.")
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), default=3.0, show_default=True, help="For each row.")
@click.option("--warmup", type=click.FloatRange(min=0), default=0.5, show_default=True, help="Seconds before that, not counted.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the random tokens.")
@click.option("--engine", help="With --backend tensorrt: file name of the engine, where BUNDLE has several.")
@click.option("--allow-embedded-plugin", is_flag=True, help="With --backend tensorrt: let the engine bring its own plugin code.")
@click.option("--cuda-graphs", is_flag=True, help="tensorrt, or onnxruntime on a GPU: capture each shape once and replay it.")
@click.option("--json", "json_file", type=OutputFile(), help="Write everything as JSON.")
@click.option("--csv", "csv_file", type=OutputFile(), help="Write the table as CSV.")
@click.option("--plot", "plot_file", type=OutputFile(), help="Draw it: a .png or .svg file; needs matplotlib.")
@click.pass_obj
def bench_command(
    talker: Talker,
    /,
    bundle: Path,
    backends: tuple[str, ...],
    json_file: Path | None,
    csv_file: Path | None,
    plot_file: Path | None,
    **options: Any,
) -> None:
    """Time BUNDLE: latency percentiles and throughput of its runtimes.

    Each runtime is first compared with PyTorch's golden outputs; one that differs is not timed (exit code 3).

    \b
    Examples:
      mra-export bench my-bundle
      mra-export bench my-bundle --backend onnxruntime --backend torch --length 128 --length 512 --batch 1 --batch 8
      mra-export bench my-bundle --threads 2 --concurrency 4 --mask ragged --json bench.json --plot bench.svg
    """
    from mra_export.bench import bench
    from mra_export.bundle import Bundle
    from mra_export.report import write_atomically

    if plot_file is not None:
        from mra_export.bench_plot import check_plot

        check_plot(plot_file)
    talker.progress(f"checking the files of {bundle}")
    report = bench(Bundle.load(bundle), backends=backends or ("auto",), **options, progress=talker.progress)
    if json_file is not None:
        write_atomically(json_file, report.json())
    if csv_file is not None:
        write_atomically(csv_file, report.csv())
    if plot_file is not None:
        from mra_export.bench_plot import draw

        write_atomically(plot_file, draw(report, plot_file.suffix))
    talker.print(report.table())


@main.command(cls=Command)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--text", "texts", multiple=True, help="May be given several times: one batch.")
@click.option("--question", help="For question-answering, with --context.")
@click.option("--context", help="For question-answering: the text that holds the answer.")
@click.option("--choice", "choices", multiple=True, help="For multiple-choice, several times, with one --text.")
@click.option("--npz", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Inputs by name, such as input_ids.")
@click.option("--out", type=OutputFile(), help="With --npz: write the outputs there, as npz.")
@click.option("--backend", type=click.Choice(("auto", "torch", "onnxruntime", "tensorrt")), default="auto", show_default=True)
@click.option("--device", type=click.Choice(("cpu", "cuda")), help="Default cuda for tensorrt, cpu for the others.")
@click.option("--engine", help="With --backend tensorrt: file name of the engine, where BUNDLE has several.")
@click.option("--allow-embedded-plugin", is_flag=True, help="With --backend tensorrt: let the engine bring its own plugin code.")
@click.option("--no-op-library", is_flag=True, help="Run the operator's definition in place of its compiled library.")
@click.option("--json", "as_json", is_flag=True, help="Answer as JSON.")
@click.pass_obj
def run(
    talker: Talker,
    bundle: Path,
    texts: tuple[str, ...],
    question: str | None,
    context: str | None,
    choices: tuple[str, ...],
    npz: Path | None,
    out: Path | None,
    backend: str,
    device: str | None,
    engine: str | None,
    allow_embedded_plugin: bool,
    no_op_library: bool,
    as_json: bool,
) -> None:
    """Run BUNDLE once, on text or on arrays.

    \b
    Examples:
      mra-export run my-bundle --text "for i in range(<mask>):"
      mra-export run my-qa-bundle --question "Who wrote it?" --context "It was written by Ada."
      mra-export run my-choice-bundle --text "It rains, so" --choice "he is wet." --choice "he is dry."
      mra-export run my-bundle --npz inputs.npz --out outputs.npz
    """
    asked = [bool(texts), question is not None or context is not None, npz is not None]
    if sum(asked) != 1:
        raise click.UsageError("Pass one of --text, --question with --context, or --npz.")
    if (question is None) != (context is None):
        raise click.UsageError("--question and --context go together.")
    if choices and len(texts) != 1:
        raise click.UsageError("--choice goes with one --text.")
    if out is not None and npz is None:
        raise click.UsageError("--out goes with --npz; add --json for the answers to text.")
    from mra_export.runtime import MraRuntime

    with MraRuntime.load(
        bundle,
        backend,
        device,
        use_op_library=not no_op_library,
        engine=engine,
        allow_embedded_plugin=allow_embedded_plugin,
    ) as runtime:
        talker.progress(f"{runtime.backend} on {runtime.device}")
        if npz is not None:
            from mra_export.arrays import read_arrays, write_arrays

            outputs = runtime.run(**read_arrays(npz))
            if out is not None:
                write_arrays(out, outputs)
            answers: Any = {name: {"shape": list(value.shape), "dtype": str(value.dtype)} for name, value in outputs.items()}
            _tell(talker, answers, as_json, "outputs")
            return
        from mra_export.predict import Predictor

        predictor = Predictor(runtime)
        if question is not None and context is not None:
            answers = predictor.answer(question, context)
        elif choices:
            answers = predictor.choose(texts[0], choices)
        else:
            answers = predictor.texts(texts)
        _tell(talker, answers, as_json, predictor.task)


@main.command("triton", cls=Command)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("repository", type=click.Path(path_type=Path), metavar="REPO")
@click.option(
    "--backend",
    type=click.Choice(("onnxruntime", "tensorrt", "python")),
    required=True,
    help="Of Triton. python: our own runtime in Triton, which puts requests of different lengths into one batch.",
)
@click.option("--name", default="mra", show_default=True, help="The model's name in Triton.")
@click.option("--device", type=click.Choice(("cpu", "cuda")), help="Default cuda for tensorrt, cpu for the others.")
@click.option(
    "--runtime",
    type=click.Choice(("auto", "torch", "onnxruntime", "tensorrt")),
    default="auto",
    show_default=True,
    help="With --backend python: what runs the model.",
)
@click.option("--engine", help="File name of the engine, where BUNDLE has several.")
@click.option("--no-op-library", is_flag=True, help="Run the operator's definition in place of its compiled library.")
@click.option("--max-batch-size", type=click.IntRange(min=1), help="Rows of one call; default 8, or what the engine takes.")
@click.option("--max-delay-ms", type=click.FloatRange(min=0), default=2.0, show_default=True, help="Wait for a larger batch.")
@click.option("--max-queue", type=click.IntRange(min=1), default=256, show_default=True, help="Requests that may wait.")
@click.option("--instances", type=click.IntRange(min=1), default=1, show_default=True, help="Copies of the model, per GPU.")
@click.option(
    "--threads", type=click.IntRange(min=1), help="Threads of one call in ONNX Runtime; default its own, for python a share."
)
@click.option("--tokenizer", is_flag=True, help="Also write NAME-text, an ensemble that takes text.")
@click.option("--mount", default="/models", show_default=True, help="Where the server sees REPO: an absolute path.")
@click.option("--force", is_flag=True, help="Overwrite a model repository that is at REPO.")
@click.pass_obj
def triton_command(talker: Talker, /, bundle: Path, repository: Path, force: bool, no_op_library: bool, **options: Any) -> None:
    """Write BUNDLE as the model repository REPO of Triton Inference Server. REPO/README.md says how to start it.

    \b
    Examples:
      mra-export triton my-bundle repository --backend python --tokenizer
      mra-export triton my-bundle repository --backend onnxruntime --max-batch-size 16 --mount "$PWD/repository"
      mra-export triton my-bundle repository --backend tensorrt --instances 2
    """
    from mra_export.bundle import Bundle
    from mra_export.serve.triton import TritonOptions, write_repository

    wanted = TritonOptions(op_library=not no_op_library, **options)
    talker.progress(f"checking the files of {bundle}")
    written = write_repository(Bundle.load(bundle), repository, wanted, force=force, progress=talker.progress)
    talker.print(
        f"{repository}: {', '.join(written.models)}, {_megabytes(repository)} MB. {repository}/README.md says how to start it"
    )


@main.command("serve", cls=Command)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for every network.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: a free one; the log says which.")
@click.option("--name", help="The model's name in URLs; default BUNDLE's.")
@click.option("--backend", type=click.Choice(("auto", "torch", "onnxruntime", "tensorrt")), default="auto", show_default=True)
@click.option("--device", type=click.Choice(("cpu", "cuda")), help="Default cuda for tensorrt, cpu for the others.")
@click.option("--workers", type=click.IntRange(min=1), help="Calls of the model at once; default 2 with ONNX Runtime on a CPU.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of one call on a CPU; default the processors by the workers.")
@click.option("--max-batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Rows of one call.")
@click.option("--max-batch-tokens", type=click.IntRange(min=1), help="Tokens of one call; default 512, on a GPU 16384.")
@click.option("--max-delay-ms", type=click.FloatRange(min=0), default=0.0, show_default=True, help="Wait for batch mates.")
@click.option("--max-queue", type=click.IntRange(min=1), default=256, show_default=True, help="Requests that may wait.")
@click.option("--length-bucket", "length_buckets", multiple=True, type=click.IntRange(min=1), help="Several times, ascending.")
@click.option("--max-body", type=click.IntRange(min=1), default=4 << 20, show_default=True, help="Bytes of a request.")
@click.option(
    "--timeout", type=click.FloatRange(min=0, min_open=True), default=30.0, show_default=True, help="Seconds of a request."
)
@click.option(
    "--drain", type=click.FloatRange(min=0, min_open=True), default=30.0, show_default=True, help="Seconds after SIGTERM."
)
@click.option(
    "--token-file", type=click.Path(path_type=Path), help="Bearer token; default the variable MRA_EXPORT_TOKEN's, if set."
)
@click.pass_context
def serve_command(
    context: click.Context,
    /,
    bundle: Path,
    host: str,
    port: int,
    token_file: Path | None,
    length_buckets: tuple[int, ...],
    **options: Any,
) -> None:
    """Serve BUNDLE over HTTP: the Open Inference Protocol v2, text by task, metrics.

    Ready once the model agrees with the golden outputs of BUNDLE. SIGTERM answers what is in flight and ends.

    \b
    Examples:
      mra-export serve my-bundle
      mra-export serve my-bundle --host 0.0.0.0 --port 8080 --token-file token.txt
    """
    from mra_export.serve.server import check_packages, serve
    from mra_export.serve.settings import Settings, read_token

    check_packages()
    settings = Settings(length_buckets=length_buckets or None, token=read_token(token_file), **options)
    serve(bundle, settings, host, port, verbose=context.obj.verbose)


@main.command("inspect", cls=Command)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Everything, as JSON.")
@click.pass_obj
def inspect_command(talker: Talker, bundle: Path, as_json: bool) -> None:
    """Show what is in BUNDLE: model, graph, operator, files, engines.

    \b
    Examples:
      mra-export inspect my-bundle
      mra-export inspect my-bundle --json
    """
    from mra_export.bundle import Bundle
    from mra_export.describe import describe

    _tell(talker, describe(Bundle.load(bundle)), as_json, "inspect")


@main.command(cls=Command)
@click.option("--json", "as_json", is_flag=True, help="Everything, as JSON.")
@click.pass_obj
def doctor(talker: Talker, as_json: bool) -> None:
    """Show what this installation has and what is missing, with the command that gets it.

    \b
    Examples:
      mra-export doctor
      mra-export doctor --json
    """
    from mra_export.doctor import examine

    _tell(talker, examine(), as_json, "doctor")


@main.command(cls=Command)
@click.argument("preset", type=click.Choice(_PRESETS))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="The same seed gives the same weights.")
@click.pass_obj
def init(talker: Talker, preset: str, out: Path, seed: int) -> None:
    """Write a checkpoint of the size PRESET with random weights to the folder OUT.

    \b
    Examples:
      mra-export init tiny my-checkpoint --seed 1
      mra-export init base-512-4 full-size
    """
    from mra_export.presets import init_checkpoint

    talker.progress(f"making {preset}")
    init_checkpoint(preset, out, seed)
    talker.print(f"{out}: {_megabytes(out)} MB, random weights")


def _share_processors() -> None:
    """Where several runtimes take turns in one process, the threads of the one that waits must not spin: it is 2 to 3 times slower.

    OpenMP reads this when torch is loaded.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _tell(talker: Talker, answers: Any, as_json: bool, kind: str) -> None:
    if as_json:
        talker.close()
        click.echo(json.dumps(answers, indent=1, ensure_ascii=False))
        return
    from mra_export.show import shown

    show: Callable[[Any], list[Any]] = shown(kind)
    for thing in show(answers):
        talker.print(thing)


def _megabytes(folder: Path) -> int:
    return round(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6)


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else _PLAIN_WIDTH, highlight=False, markup=False, emoji=False)
