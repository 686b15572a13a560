"""A whole MRA model on the GPU against the same in PyTorch on the CPU, float32. Needs torch, numpy, transformers, safetensors.

    python tests/gpu/model_check.py [--checkpoint FOLDER] [--library PATH] [--json FILE]

Three ways to run its attention on the GPU: the torch reference; the compiled kernel through the C API; and mra::attention as the
model calls it. The first two say which blocks they chose, so the CPU takes the same ones and the comparison is tight; their choice
is judged apart, and may differ from the CPU's in near-ties only. One line for each comparison; exit status 1 if one failed, 0 if
all passed, 77 if there is nothing to run on. `--device cpu` with the library of tests/emulator is how this script is tested.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import needs

NEEDED = {"numpy": "numpy", "torch": "torch", "transformers": "transformers", "safetensors": "safetensors"}
CHECKPOINT = Path(__file__).resolve().parents[2] / "examples" / "mra-tiny-python"
SHAPES = ((1, 1), (2, 33), (3, 100), (2, 300))
"""Batch and length; the model's longest is added. The second and third row of a batch are padded."""
EMULATED_SHAPES = ((2, 33), (1, 200))


def main(arguments: list[str] | None = None, write: Callable[[str], Any] = sys.stdout.write) -> int:
    parser = argparse.ArgumentParser(description="Compare a model on the GPU with the CPU.")
    parser.add_argument("--checkpoint", type=Path, help=f"folder; default: {CHECKPOINT.name}, and random weights without it")
    parser.add_argument("--library", type=Path, help="libmra_attention built with CUDA; default: the installed one")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for the emulated library, on short inputs")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args(arguments)
    gone = needs.missing(NEEDED)
    if gone:
        return needs.skip(gone, write)
    return _Check(options, write).run()


class _Check:
    """The comparisons of one call of the script. What needs torch is imported here."""

    def __init__(self, options: argparse.Namespace, write: Callable[[str], Any]) -> None:
        self.options = options
        self.write = write
        self.rows: list[dict[str, Any]] = []
        self.failed = 0

    def run(self) -> int:
        import torch

        from mra_export import libraries

        device = self.options.device
        if device == "cuda" and not torch.cuda.is_available():
            return needs.skip(f"torch {torch.__version__} finds no CUDA GPU", self.write)
        path = self.options.library or libraries.find("kernels")
        if path is None:
            return needs.skip("libmra_attention is not built", self.write)
        model, name, longest = self._model()
        place = torch.cuda.get_device_name() if device == "cuda" else "emulated"
        self.write(f"{name} on {place}, torch {torch.__version__}\n")
        shapes = EMULATED_SHAPES if device == "cpu" else (*SHAPES, (1, longest))
        for dtype in ("fp32", "fp16", "bf16"):
            for batch, length in shapes:
                self._compare(model, path, dtype, batch, length)
        if self.options.json:
            self.options.json.write_text(json.dumps({"checkpoint": name, "rows": self.rows}, indent=1) + "\n")
        self.write(f"{len(self.rows)} comparisons, {self.failed} failed\n")
        return 1 if self.failed else 0

    def _model(self) -> tuple[Any, str, int]:
        """The model in float32 on the CPU, what it is, and its longest input."""
        import torch

        from mra_export.model import MraConfig, MraForMaskedLM, load

        folder = self.options.checkpoint or CHECKPOINT
        if self.options.checkpoint or folder.is_dir():
            model, name = load(folder), folder.name
        else:
            torch.manual_seed(0)
            config = MraConfig(
                vocab_size=512, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256, block_per_row=2
            )
            model, name = MraForMaskedLM(config).eval(), f"random weights (no {folder.name})"
            for module in model.modules():
                if hasattr(module, "query"):  # as uneven a block selection as after training
                    module.query.weight.data *= 4
                    module.key.weight.data *= 4
        return model, name, int(model.config.max_position_embeddings)

    def _compare(self, model: Any, library: Path, dtype: str, batch: int, length: int) -> None:
        import copy

        import torch

        from mra_export.contract import DTYPES, TOLERANCES

        device = torch.device(self.options.device)
        inputs = _inputs(model, batch, length)
        there = {key: tensor.to(device) for key, tensor in inputs.items()}
        moved = copy.deepcopy(model).to(device, getattr(torch, DTYPES[dtype]))
        tolerance = TOLERANCES[dtype]
        case = f"{dtype} {batch}x{length}"
        with torch.inference_mode():
            for subject, answer in (("torch", _reference), ("kernel", _Kernel(library, device))):
                with _probe(answer) as probe:
                    actual = _logits(moved(**there))
                with _probe(_forced(probe.layers)) as own:
                    expected = _logits(model(**inputs))
                self._judge("outputs", subject, dtype, case, actual, expected, inputs, tolerance.model)
                self._selection(subject, dtype, case, model, probe.layers, own.layers, tolerance.near_tie)
            actual = _logits(moved(**there))
            with _probe(_reference):
                expected = _logits(model(**inputs))
            self._judge("outputs", "mra::attention", dtype, case, actual, expected, inputs, tolerance.model_free, free=True)

    def _judge(
        self,
        check: str,
        subject: str,
        dtype: str,
        case: str,
        actual: Any,
        expected: Any,
        inputs: Any,
        tolerance: float,
        free: bool = False,
    ) -> None:
        from mra_export import parity

        keep = inputs["attention_mask"].numpy() != 0
        row = parity.judge(check, subject, dtype, case, "logits", actual, expected, tolerance, keep=keep, free=free)
        assert row.difference is not None
        found = row.difference
        text = (
            f"max {found.max_abs:.1e}, argmax {found.argmax_agreement:.4f}, needs {found.smallest_tolerance:.1e} of {tolerance:.0e}"
        )
        self._report(row.as_dict(), f"{subject}, {case}: {text}")

    def _selection(
        self, subject: str, dtype: str, case: str, model: Any, layers: Sequence[Any], own: Sequence[Any], limit: float
    ) -> None:
        from mra_export.selection import Choice, block_scores, overlap

        attributes = model.config.attributes()
        found = [
            overlap(block_scores(mine.query, mine.key, mine.mask, attributes), attributes.num_blocks, Choice(*layer.choice))
            for mine, layer in zip(own, layers, strict=True)
        ]
        differing, margin = sum(layer.differing for layer in found), max(layer.largest_margin for layer in found)
        row = {
            "check": "selection",
            "backend": subject,
            "dtype": dtype,
            "case": case,
            "status": "pass" if margin <= limit else "fail",
            "differing": differing,
            "largest_margin": margin if margin < float("inf") else None,
        }
        self._report(row, f"{subject}, {case}: {differing} blocks chosen otherwise, widest margin {margin:.1e} of {limit:.0e}")

    def _report(self, row: dict[str, Any], text: str) -> None:
        self.rows.append(row)
        passed = row["status"] == "pass"
        self.failed += not passed
        self.write(f"{'ok  ' if passed else 'FAIL'} {row['check']}: {text}\n")


@dataclass(frozen=True)
class _Layer:
    """query, key: (B, N, H * D) float32; mask: (B, N) bool; choice: chosen and excluded, (B, H, nb, nb) bool. On the CPU, numpy."""

    query: Any
    key: Any
    mask: Any
    choice: tuple[Any, Any]


def _probe(answer: Callable[..., Any]) -> Any:
    """A context in which each mra::attention is answered by `answer`, and what it got and chose is kept in `.layers`.

    answer: (layer's index, query, key, value, mask, attributes) -> context, chosen, excluded.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from mra_export.contract import Attributes

    class Probe(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.layers: list[_Layer] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is not torch.ops.mra.attention.default:
                return func(*args, **(kwargs or {}))
            query, key, value, mask, *rest = args
            context, *choice = answer(len(self.layers), query, key, value, mask, Attributes(*rest, **(kwargs or {})))
            seen = [tensor.float().cpu().numpy() for tensor in (query, key)]
            self.layers.append(_Layer(*seen, (mask != 0).cpu().numpy(), tuple(x.cpu().numpy() for x in choice)))
            return context

    return Probe()


def _reference(index: int, query: Any, key: Any, value: Any, mask: Any, attributes: Any) -> tuple[Any, Any, Any]:
    from mra_export.model.attention import mra_attention

    context, used = mra_attention(query, key, value, mask, attributes, return_selection=True)
    return context, used.chosen, used.excluded


def _forced(layers: Sequence[_Layer]) -> Callable[..., Any]:
    """The reference with the blocks that these layers chose."""
    import torch

    from mra_export.model.attention import Selection, mra_attention

    def answer(index: int, query: Any, key: Any, value: Any, mask: Any, attributes: Any) -> tuple[Any, Any, Any]:
        chosen, excluded = (torch.from_numpy(array).to(query.device) for array in layers[index].choice)
        unused = torch.zeros(())
        forced = Selection(chosen, excluded, unused, unused, unused)
        return mra_attention(query, key, value, mask, attributes, selection=forced), chosen, excluded

    return answer


class _Kernel:
    """The compiled kernel on the tensors' own memory."""

    def __init__(self, library: Path, device: Any) -> None:
        import kernel_check

        self.check = kernel_check
        self.device = kernel_check.Device(kernel_check.load(library), device, small=False)

    def __call__(self, index: int, query: Any, key: Any, value: Any, mask: Any, attributes: Any) -> tuple[Any, Any, Any]:
        import torch

        inputs = self.check.Inputs(*(x.contiguous() for x in (query, key, value)), (mask != 0).to(torch.int32).contiguous())
        states, _ = self.check.selection(self.device, inputs, attributes)
        return self.check.run(self.device, inputs, attributes), states == 2, states > 0


def _inputs(model: Any, batch: int, length: int) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(1000 * batch + length)
    ids = torch.randint(5, model.config.vocab_size, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[1, length * 3 // 5 :] = 0
    if batch > 2:
        mask[2, : length // 3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _logits(outputs: Any) -> Any:
    return outputs[0].float().cpu().numpy()


if __name__ == "__main__":
    raise SystemExit(main())
