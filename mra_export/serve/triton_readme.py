"""The README.md of a Triton model repository: how to start a server on it, and how to ask it."""

from __future__ import annotations

import json
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from mra_export import profiles
from mra_export.bundle import Bundle

if TYPE_CHECKING:
    from mra_export.plan import EngineEntry
    from mra_export.serve.triton import TritonOptions

IMAGE = "nvcr.io/nvidia/tritonserver:25.08-py3"
_PORTS = "-p 8000:8000 -p 8001:8001 -p 8002:8002"


def readme(
    bundle: Bundle, options: TritonOptions, entry: EngineEntry | None, models: list[str], register: PurePosixPath | None
) -> str:
    """Markdown.

    models: names, the model first, then the tokenizer and the ensemble where there are. register: where the server sees the library
    that registers the engine's plugin, None where the engine needs none.
    """
    manifest = bundle.manifest
    image, extra = IMAGE, ""
    notes = []
    if options.backend == "onnxruntime" and options.op_library:
        notes.append(
            f"`config.pbtxt` names the op library by its path below `{options.mount}`: mount the repository there, or write "
            "it again with `--mount`. The image needs ONNX Runtime 1.17 or later, and a C library as new as the bundle's machine."
        )
    if options.backend == "tensorrt" and entry is not None:
        image = "nvcr.io/nvidia/tritonserver:<release>-py3"
        gpu = ", ".join(entry.compute_capabilities)
        notes.append(
            f"`<release>`: one whose TensorRT is {entry.builder}, which built the engine. It is for compute capability {gpu} and "
            f"takes {profiles.describe(entry.profiles)}."
        )
        if entry.plugin is not None and entry.plugin.embedded:
            extra = " --backend-config=tensorrt,version-compatible=true"
            notes.append(
                "`version-compatible=true` lets engines bring code, which is how this one brings its attention plugin. It holds "
                "for every engine of that server: start it on engines that you trust."
            )
        if register is not None:
            extra = f" --backend-config=tensorrt,plugins={register}"
            notes += [
                f"`plugins=` has Triton open `{register.name}`, which registers the attention plugin, from the library beside it: "
                f"mount the repository at `{options.mount}`, or write it again with `--mount`. Several libraries go into one such "
                "option, in quotes and with `;` between them. Both need a C library as new as that of the machine that built them.",
                "`LD_PRELOAD` does the same, where the server's options are not yours to choose; every process that the server "
                f"starts then loads TensorRT as well: `env LD_PRELOAD={register} tritonserver --model-repository={options.mount}`",
                f"Where the plugin cannot be registered, one line on stderr that begins with `{register.stem}` says "
                "why, and the model does not load.",
            ]
    if options.backend == "python" or len(models) > 1:
        image = "mra-triton"
        notes.append(
            "`mra-triton` is Triton's image with mra_export in its Python; in mra_export's repository: "
            "`docker build -f examples/deploy/triton.Dockerfile -t mra-triton .`"
        )
    if options.backend == "python":
        notes.append(
            "Requests of different lengths share a batch where that changes no answer. Each instance compares itself with "
            "PyTorch's golden outputs before it is ready."
        )
    else:
        notes.append(
            "Triton batches requests of equal length only: pad to a few lengths, with `attention_mask` 0, to get larger batches."
        )
    gpus = "--gpus all " if options.where == "cuda" else ""
    server = f"tritonserver --model-repository={options.mount}{extra}"
    ids = np.ones((1, *([2] if len(manifest.inputs[0].axes) == 3 else []), 5), dtype=np.int64)
    request = _request({tensor.name: ids for tensor in manifest.inputs}, "INT64")
    lines = [
        f"# {options.name}: {manifest.model.architecture}, {manifest.task}, {manifest.dtype}, Triton's {options.backend} backend",
        "Start, in this folder:",
        f'```\ndocker run --rm {gpus}--shm-size=1g {_PORTS} -v "$PWD:{options.mount}:ro" {image} \\\n  {server}\n```',
        f"Without a container, with this folder at `{options.mount}`:",
        f"```\n{server}\n```",
        "\n".join(f"- {note}" for note in notes),
        "Ask, once `curl -f localhost:8000/v2/health/ready` succeeds:",
        f"```\ncurl localhost:8000/v2/models/{options.name}/infer -d '{request}'\n```",
    ]
    if len(models) > 1:
        text = _request({"TEXT": np.array([["for i in range(<mask>):"]])}, "BYTES")
        lines += [f"Text, through `{models[1]}`:", f"```\ncurl localhost:8000/v2/models/{models[2]}/infer -d '{text}'\n```"]
    lines.append(
        f"At most {options.max_queue} requests wait; one more is answered with 503. `config.pbtxt` is Triton's format: edit it."
    )
    return "\n\n".join(lines) + "\n"


def _request(inputs: dict[str, np.ndarray], datatype: str) -> str:  # type: ignore[type-arg]
    tensors = [
        {"name": name, "shape": list(array.shape), "datatype": datatype, "data": array.reshape(-1).tolist()}
        for name, array in inputs.items()
    ]
    return json.dumps({"inputs": tensors})
