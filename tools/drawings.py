"""The drawings of the guide, docs/images/{data-way,launches,lane,blocks}.svg: `python tools/drawings.py` writes them.

Each is 400 units wide, so that its smallest text is still readable on a phone, and has its own background and both
colour schemes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import torch
from tokenizers import Tokenizer

from mra_export import MraForMaskedLM
from mra_export.contract import BLOCK_SIZE, Attributes, attention_scale
from mra_export.model.attention import mra_attention

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
WIDTH = 400
SHOWN = 480  # pixels wide where the page has the room

STYLE = """
svg { --paper: #ffffff; --edge: #d0d7de; --ink: #1f2328; --soft: #59636e; --strong: #3552c8; --on-strong: #ffffff;
  --blue: #dde6ff; --blue-line: #3552c8; --amber: #ffe9cf; --amber-line: #a85400;
  --green: #d8f3de; --green-line: #1a7f37 }
@media (prefers-color-scheme: dark) { svg { --paper: #1b1e27; --edge: #454c5c; --ink: #e9ebf1; --soft: #a8b0c0;
  --strong: #9db3ff; --on-strong: #12172a; --blue: #27345f; --blue-line: #8ea6ff; --amber: #4a351c; --amber-line: #f0ab62;
  --green: #1d4029; --green-line: #6ed08c } }
text { font: 13px system-ui, sans-serif; fill: var(--ink) }
.title { font-size: 15px; font-weight: 600 }
.bold { font-weight: 600 }
.soft { fill: var(--soft) }
.name { font: 12px ui-monospace, monospace }
.cell text { font: 11px ui-monospace, monospace }
.on-strong text { fill: var(--on-strong); font-weight: 700 }
.blue { fill: var(--blue); stroke: var(--blue-line) }
.amber { fill: var(--amber); stroke: var(--amber-line) }
.green { fill: var(--green); stroke: var(--green-line) }
.strong { fill: var(--strong) }
.paper { fill: var(--paper); stroke: var(--edge) }
.frame { fill: none; stroke: var(--soft); stroke-dasharray: 5 4 }
.mark { fill: none; stroke: var(--ink); stroke-width: 2.5 }
.low { fill: var(--blue) }
.grid { fill: none; stroke: var(--edge) }
.hatch { fill: url(#hatch) }
.hatch-line { stroke: var(--soft); stroke-width: 1.5 }
.arrow { fill: none; stroke: var(--soft); stroke-width: 1.5 }
.head { fill: var(--soft) }
""".strip()


class Drawing:
    def __init__(self, title: str, description: str) -> None:
        self._title, self._description = title, description
        self.parts: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, look: str, corner: float = 6, at: int | None = None) -> None:
        """at: below this part and those after it; otherwise above all."""
        box = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{corner:g}" class="{look}"/>'
        self.parts.insert(len(self.parts) if at is None else at, box)

    def text(self, x: float, y: float, words: str, look: str = "", anchor: str = "start") -> None:
        looks = f' class="{look}"' if look else ""
        place = "" if anchor == "start" else f' text-anchor="{anchor}"'
        self.parts.append(f'<text x="{x:g}" y="{y:g}"{looks}{place}>{escape(words)}</text>')

    def lines(self, x: float, y: float, lines: Sequence[str], look: str = "", anchor: str = "start") -> None:
        for number, words in enumerate(lines):
            self.text(x, y + 18 * number, words, look, anchor)

    def grid(self, x: float, y: float, columns: int, rows: int, width: float, height: float) -> None:
        """The lines of a table whose fields have this width and height."""
        across = "".join(f"M{x:g} {y + height * n:g}h{width * columns:g}" for n in range(rows + 1))
        down = "".join(f"M{x + width * n:g} {y:g}v{height * rows:g}" for n in range(columns + 1))
        self.parts.append(f'<path d="{across}{down}" class="grid"/>')

    def cells(self, cells: Sequence[tuple[float, float, str]], look: str = "") -> None:
        """Short texts, each in the middle of its place."""
        texts = "\n".join(f'<text x="{x:g}" y="{y:g}">{escape(words)}</text>' for x, y, words in cells)
        self.parts.append(f'<g class="cell {look}" text-anchor="middle">\n{texts}\n</g>')

    def arrow(self, *points: tuple[float, float]) -> None:
        """Along the points; the last piece goes straight down or straight to the side."""
        (x0, y0), (x, y) = points[-2:]
        way = " ".join(f"{a:g},{b:g}" for a, b in points)
        self.parts.append(f'<polyline points="{way}" class="arrow"/>')
        dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
        corners = [(x, y), (x - 7 * dx - 4 * dy, y - 7 * dy - 4 * dx), (x - 7 * dx + 4 * dy, y - 7 * dy + 4 * dx)]
        self.parts.append(f'<polygon points="{" ".join(f"{a:g},{b:g}" for a, b in corners)}" class="head"/>')

    def card(self, x: float, y: float, width: float, height: float, look: str, head: str, lines: Sequence[str] = ()) -> None:
        """A box with its text in the middle."""
        self.box(x, y, width, height, look)
        top = y + height / 2 - 9 * len(lines) + 4.5
        self.text(x + width / 2, top, head, "bold", "middle")
        self.lines(x + width / 2, top + 18, lines, "", "middle")

    def tags(self, x: float, y: float, width: float, label: str, names: Sequence[str]) -> float:
        """A label and names in small boxes, in as many lines as they need; where the next line begins."""
        self.text(x, y + 15, label, "soft")
        at = x + 44
        for name in names:
            size = 7.3 * len(name) + 10
            if at + size > x + width:
                at, y = x, y + 24
            self.box(at, y, size, 20, "amber" if name in TENSORS else "blue", 4)
            self.text(at + size / 2, y + 14, name, "name", "middle")
            at += size + 5
        return y + 24

    def svg(self, height: float) -> str:
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{SHOWN}" '
                f'height="{height * SHOWN / WIDTH:g}" role="img" aria-labelledby="title description">',
                f'<title id="title">{escape(self._title)}</title>',
                f'<desc id="description">{escape(self._description)}</desc>',
                f"<style>\n{STYLE}\n</style>",
                '<defs><pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
                '<line y2="6" class="hatch-line"/></pattern></defs>',
                f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1:g}" rx="8" class="paper"/>',
                *self.parts,
                "</svg>\n",
            ]
        )


def data_way() -> str:
    d = Drawing(
        "The data's way: from a checkpoint to answers",
        "A checkpoint becomes a model in PyTorch; mra-export export writes it into a bundle as model.safetensors and "
        "model.onnx, and mra-export engine adds TensorRT plans. PyTorch, ONNX Runtime and TensorRT run one of the three each, "
        "with attention from one kernel library. All give answers, and mra-export verify writes the parity report: how far "
        "each is from PyTorch.",
    )
    left, middle, right, third = 14, 141, 268, 118
    d.card(70, 16, 260, 48, "amber", "checkpoint", ["a folder or a hub id"])
    d.arrow((200, 64), (200, 88))
    d.card(70, 88, 260, 48, "blue", "model in PyTorch", ["mra_export/model"])
    d.arrow((200, 136), (200, 172))
    d.text(210, 158, "mra-export export", "name")

    d.box(8, 172, 384, 170, "frame", 8)
    d.text(left, 193, "the bundle: one folder", "bold")
    d.lines(left, 211, ["with tokenizer, op library, golden outputs and", "a manifest that has the hash of every file"], "soft")
    d.card(left, 242, third, 48, "green", "weights", ["safetensors"])
    d.card(middle, 242, third, 48, "green", "model.onnx")
    d.card(right, 242, third, 48, "green", "engines", ["*.plan"])
    d.arrow((235, 290), (235, 308), (300, 308), (300, 290))
    d.text(212, 325, "mra-export engine", "name")
    for x in (left + 40, 166, 360):
        d.arrow((x, 290), (x, 394))

    d.box(8, 366, 384, 130, "frame", 8)
    d.text(180, 385, "the runtimes", "bold")
    d.card(left, 394, third, 48, "blue", "PyTorch", ["CPU, CUDA"])
    d.card(middle, 394, third, 48, "blue", "ONNX Runtime", ["CPU, CUDA"])
    d.card(right, 394, third, 48, "blue", "TensorRT", ["or TensorRT-RTX"])
    d.lines(left, 463, ["Attention comes from one kernel library with", "a C API, in all three."], "soft")
    d.arrow((103, 496), (103, 526))
    d.arrow((297, 496), (297, 526))
    d.card(left, 526, 178, 66, "amber", "answers", ["mra-export run, serve;", "Python, C, C++"])
    d.card(208, 526, 178, 66, "amber", "parity report", ["mra-export verify: how", "far each is from PyTorch"])
    return d.svg(608)


TENSORS = ("query", "key", "value", "mask", "context")
"""The operator's own inputs and output; every other name of LAUNCHES is a section of the workspace."""
LAUNCHES = {
    "pool": (("query", "key", "value", "mask"), ("real", "query_mean", "key_mean", "value_sum", "row_key", "arrivals")),
    "select": (
        ("real", "query_mean", "key_mean", "value_sum"),
        ("excluded", "row_start", "column", "work", "low_vector", "low_total", "low_largest"),
    ),
    "logits": (("query_mean", "key_mean", "real"), ("logit", "row_key")),
    "select, large": (("real", "logit", "row_key"), ("excluded", "row_start", "column", "work", "low_largest")),
    "low resolution": (("real", "logit", "excluded", "value_sum", "low_largest"), ("low_vector", "low_total")),
    "attend": (
        ("query", "key", "value", "real", "work", "row_start", "column", "low_vector", "low_total", "low_largest"),
        ("context", "partial", "arrivals"),
    ),
}
"""Launch -> what it reads and what it writes."""


def launches() -> str:
    d = Drawing(
        "The CUDA operator's launches: three up to 4096 tokens, five above",
        "What each launch reads and writes. "
        + " ".join(f"{name} reads {', '.join(reads)} and writes {', '.join(writes)}." for name, (reads, writes) in LAUNCHES.items())
        + " Up to 4096 tokens: pool, select, attend. Above: pool, logits, select, low resolution, attend.",
    )

    def launch(x: float, y: float, width: float, name: str, lines: Sequence[str]) -> float:
        """One launch's box; where it ends."""
        at = len(d.parts)
        d.text(x + 10, y + 20, name, "bold")
        d.lines(x + 10, y + 38, lines)
        end = y + 46 + 18 * (len(lines) - 1)
        for label, names in zip(("reads", "writes"), LAUNCHES[name], strict=True):
            end = d.tags(x + 10, end, width - 20, label, names)
        d.box(x, y, width, end + 6 - y, "paper", at=at)
        return end + 6

    left, right, half = 100, 298, 184
    d.text(16, 26, "Three launches; five above N = 4096", "title")
    d.box(16, 38, 20, 14, "amber", 4)
    d.text(42, 50, "its tensors")
    d.box(210, 38, 20, 14, "blue", 4)
    d.text(236, 50, "its workspace")

    end = launch(12, 64, 376, "pool", ["a CTA: 32 tokens of query, key or value"])
    start = end + 44
    for x, words in ((left, "N up to 4096"), (right, "above")):
        d.arrow((x, end), (x, start))
        d.text(x + 8, end + 26, words)
    alone = launch(8, start, half, "select", ["a CTA: one head, with all", "of its logits on chip and", "its low-resolution part"])
    end = launch(208, start, half, "logits", ["a CTA: 128 x 128 pairs"])
    for name, words in (("select, large", "a CTA: one head"), ("low resolution", "a CTA: 64 block rows")):
        d.arrow((right, end), (right, end + 22))
        end = launch(208, end + 22, half, name, [words])
    d.arrow((left, alone), (left, end + 24))
    d.arrow((right, end), (right, end + 24))
    end = launch(12, end + 24, 376, "attend", ["a CTA: 32 queries and their chosen key blocks"])
    d.lines(
        12,
        end + 22,
        [
            "partial, arrivals: only where a long row is cut into chunks.",
            "Mode sparse: no value_sum, no low-resolution part.",
        ],
        "soft",
    )
    return d.svg(end + 52)


LANE = 5
QUERY_PAIR = ("16 * warp + lane / 4 + 8 * (e % 2)", "16 * k + 2 * (lane % 4) + 8 * (e / 2)")
"""Query token and first dimension of pair e of a lane, as LoadQuery in mra_attention_attend_mma.cuh has them."""


def lane() -> str:
    d = Drawing(
        "What a lane holds of a product of 16 queries, 16 dimensions and 8 keys",
        f"Lane {LANE} of 32 holds, of the queries, tokens 1 and 9 in dimensions 2, 3, 10 and 11; of the keys, token 1 in the "
        "same dimensions; of the logits, query tokens 1 and 9 at key tokens 2 and 3. In general: query tokens lane / 4 and "
        "lane / 4 + 8, key token lane / 4, dimensions and logit columns 2 (lane % 4) and the next, dimensions also 8 further.",
    )
    high, dim_width, key_width = 14, 13.5, 18
    x_query, x_key, y_key = 12, 244, 78
    y_query = y_key + 16 * high + 30
    others: list[tuple[float, float, str]] = []
    own: list[tuple[float, float, str]] = []

    def pair(x: float, y: float, width: float, height: float, owner: int, register: str) -> None:
        if owner // 4 == LANE // 4:
            d.box(x, y, width, height, "strong" if owner == LANE else "low", 0)
        (own if owner == LANE else others).append((x + width / 2, y + height / 2 + 4, register if owner == LANE else str(owner)))

    for owner in range(32):
        group, member = owner // 4, owner % 4
        for e in range(4):
            x, y = x_query + dim_width * (2 * member + 8 * (e // 2)), y_query + high * (group + 8 * (e % 2))
            pair(x, y, 2 * dim_width, high, owner, f"q{e}")
        for e in range(2):
            pair(x_key + key_width * group, y_key + high * (2 * member + 8 * e), key_width, 2 * high, owner, f"k{e}")
        for r in range(2):
            x, y = x_key + 2 * key_width * member, y_query + high * (group + 8 * r)
            pair(x, y, 2 * key_width, high, owner, f"s{2 * r},{2 * r + 1}")
    d.grid(x_query, y_query, 8, 16, 2 * dim_width, high)
    d.grid(x_key, y_key, 8, 8, key_width, 2 * high)
    d.grid(x_key, y_query, 4, 16, 2 * key_width, high)
    d.cells(others)
    d.cells(own, "on-strong")

    d.text(12, 26, f"What lane {LANE} holds of an m16n8k16 product", "title")
    d.lines(x_key + 8 * key_width, 50, ["keys: 8 tokens across,", "16 dimensions down"], "bold", "end")
    d.lines(12, 92, ["Numbers are lanes. A field", "is two neighbours: 16-bit", "elements of one register,", "or float32 logits."])
    d.box(12, 166, 20, 14, "strong", 0)
    d.text(38, 178, f"lane {LANE}: q0 to q3, k0, k1,")
    d.text(38, 196, "and logits s0 to s3")
    d.box(12, 208, 20, 14, "low", 0)
    d.text(38, 220, "its group of four: their")
    d.lines(38, 238, ["row maxima and sums", "take two shuffles"])
    d.lines(12, y_query - 30, ["queries: 16 tokens down,", "16 dimensions across"], "bold")
    d.text(x_key + 8 * key_width, y_query - 12, "logits", "bold", "end")
    below = y_query + 16 * high
    d.text(12, below + 24, "Pair q[e] of a warp, for dimensions 16 k to 16 k + 15:")
    d.text(12, below + 43, f"token {QUERY_PAIR[0]}", "name")
    d.text(12, below + 61, f"dims  {QUERY_PAIR[1]}, + 1", "name")
    d.lines(
        12,
        below + 84,
        [
            "Logits of 8 keys and of the next 8, side by side, lie as",
            "the queries do. So the weights, rounded to 16 bits, are",
            "the left factor of weights x values where they are.",
        ],
    )
    return d.svg(below + 134)


TOKENS, LENGTH, LAYER, HEAD, ROW = 440, 512, 0, 1, 2


def chosen_blocks() -> torch.Tensor:
    """(nb, nb) bool: what the shipped checkpoint's first layer chooses, in one head, for the beginning of LICENSE.

    The last pair chosen is 0.019 logits above the first that is not: no machine's rounding changes the choice.
    """
    folder = ROOT / "examples" / "mra-tiny-python"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = MraForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    config = model.config
    text = tokenizer.encode((ROOT / "LICENSE").read_text(encoding="utf-8"), add_special_tokens=False).ids
    ids = torch.full((1, LENGTH), config.pad_token_id)
    ids[0, :TOKENS] = torch.tensor([config.bos_token_id, *text[: TOKENS - 2], config.eos_token_id])
    mask = (torch.arange(LENGTH) < TOKENS).long()[None]

    seen: dict[str, torch.Tensor] = {}
    attention = model.mra.encoder.layer[LAYER].attention.self
    for name in ("query", "key"):
        getattr(attention, name).register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: output}))
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
        head_size = config.hidden_size // config.num_attention_heads
        attributes = Attributes(config.num_attention_heads, LENGTH // BLOCK_SIZE * config.block_per_row, attention_scale(head_size))
        _, selection = mra_attention(seen["query"], seen["key"], seen["key"], mask, attributes, return_selection=True)
    return selection.chosen[0, HEAD]


def blocks() -> str:
    chosen = chosen_blocks()
    nb, live = len(chosen), -(-TOKENS // BLOCK_SIZE)
    exact = int(chosen.sum())
    low, skipped = live * live - exact, nb * nb - live * live
    row = [j for j in range(nb) if chosen[ROW, j]]
    d = Drawing(
        "Which block pairs one head computes exactly, at low resolution, or not at all",
        f"A grid of {nb} x {nb} block pairs of {BLOCK_SIZE} x {BLOCK_SIZE} tokens. {exact} are exact, {low} at low "
        f"resolution, {skipped} skipped because one block holds only padding. Row {ROW} has {len(row)} exact blocks: "
        f"{', '.join(map(str, row))}.",
    )
    cell, x0, y0 = 20, 38, 88
    d.text(12, 26, f"{nb} x {nb} block pairs, budget {nb} x 4 = {exact}", "title")
    d.text(12, 46, f"A row of {LENGTH} tokens, {TOKENS} of them real; one head", "soft")
    d.text(x0, 66, "key block j", "soft")
    d.text(392, 66, "exact", "soft", "end")
    d.text(x0 - 26, y0 - 6, "i", "soft")
    d.box(x0, y0, cell * live, cell * live, "low", 0)
    d.box(x0 + cell * live, y0, cell * (nb - live), cell * nb, "hatch", 0)
    d.box(x0, y0 + cell * live, cell * live, cell * (nb - live), "hatch", 0)
    for i, j in chosen.nonzero().tolist():
        d.box(x0 + cell * j, y0 + cell * i, cell, cell, "strong", 0)
    d.grid(x0, y0, nb, nb, cell, cell)
    for n in range(nb):
        middle = cell * n + 15
        d.cells([(x0 - 14, y0 + middle, str(n)), (x0 + middle - 5, y0 - 6, str(n)), (376, y0 + middle, str(int(chosen[n].sum())))])
    d.box(x0 - 2, y0 + cell * ROW - 2, cell * nb + 4, cell + 4, "mark", 3)

    y = y0 + cell * nb + 20
    for look, count, words, more in (
        ("strong", exact, "exact", "every query with every key: exp(scale q·k)"),
        ("low", low, "low resolution", "one weight for its 1024 token pairs: exp(l_ij)"),
        ("hatch", skipped, "skipped", "key or query block of padding only: 0"),
    ):
        d.box(12, y, 20, 20, look, 0)
        d.text(40, y + 15, f"{count} {words}", "bold")
        d.text(40, y + 33, more)
        y += 44
    d.lines(
        12,
        y + 12,
        [
            f"Row {ROW}, framed: {len(row)} pairs are exact, {live - len(row)} at low resolution,",
            f"{nb - live} skipped. The budget is the head's, not a row's:",
            f"the rows here have {int(chosen[:live].sum(1).min())} to {int(chosen.sum(1).max())} exact pairs.",
        ],
    )
    d.text(12, y + 72, f"examples/mra-tiny-python on LICENSE, layer {LAYER}, head {HEAD}", "soft")
    return d.svg(y + 86)


DRAWINGS = {"data-way": data_way, "launches": launches, "lane": lane, "blocks": blocks}


def main() -> None:
    for name, draw in DRAWINGS.items():
        (IMAGES / f"{name}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
