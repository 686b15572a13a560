"""Train the small masked language model in examples/mra-tiny-python from text that every Python installation has.

    python examples/train_tiny.py --out build/mra-tiny-python --minutes 45

Text: the running interpreter's standard library sources and the language reference inside `pydoc_data`. Most steps use
sequences of at most 128 tokens, where the budget of exact blocks covers all of them; the last fifth of the time goes to 512, where
it covers a quarter, so that the trained attention has met block selection. Ctrl-C keeps a snapshot: `--resume` goes on from it,
and `--resume --minutes 0` writes what there is.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import math
import os
import platform
import shutil
import sysconfig
import time
import tokenize
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

from mra_export.model import MraConfig, MraForMaskedLM

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
BOS, PAD, EOS, UNK, MASK = range(5)

EXCLUDED_FOLDERS = {
    "__phello__",
    "__pycache__",
    "dist-packages",
    "encodings",  # tables of characters
    "idle_test",
    "lib-dynload",
    "site-packages",
    "test",
    "tests",
}
EXCLUDED_PREFIXES = ("_sysconfigdata", "config-")  # generated: paths and compiler flags of one machine

SHORT, LONG = 128, 512
PHASES = (  # until this share of the training: rows of this length, this many a step
    (0.25, 32, 64),  # few neighbours: what they tell is learned sooner
    (0.55, SHORT, 16),
    (0.80, SHORT, 32),
    (1.00, LONG, 8),
)
WARMUP_SHARE, DECAY_SHARE = 0.03, 0.3
MASK_RATE = 0.15
HELD_OUT_PERCENT = 4

console = Console()


# ------------------------------------------------------------------------------------------------ text


@dataclass(frozen=True)
class Document:
    """One text. `name` is its path inside the standard library, or pydoc_data/topics.py#topic."""

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Decided by the name alone, so that the split is the same on every machine and run."""
        return int(hashlib.sha256(self.name.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def excluded(relative: Path) -> bool:
    return any(part in EXCLUDED_FOLDERS or part.startswith(EXCLUDED_PREFIXES) for part in relative.parts)


def documents(root: Path | None = None) -> list[Document]:
    """The standard library's sources and the language reference's topics, in the order of their names."""
    root = root or Path(sysconfig.get_path("stdlib"))
    found = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if excluded(relative) or relative.parts[0] == "pydoc_data":
            continue
        try:
            with tokenize.open(path) as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError) as error:
            raise click.ClickException(f"{path} cannot be read as Python source ({error}): reinstall Python") from error
        if text.strip():
            found.append(Document(relative.as_posix(), text))
    from pydoc_data.topics import topics

    found += [Document(f"pydoc_data/topics.py#{name}", text) for name, text in topics.items()]
    return sorted(found, key=lambda document: document.name)


# ------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; the special tokens have the ids of RoBERTa and of the published MRA checkpoints, except <mask>."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=24,  # no tokens for rulers of dashes
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=LONG,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        cls_token="<s>",
        sep_token="</s>",
        mask_token=AddedToken("<mask>", lstrip=True),  # "import <mask>": the predicted token brings the space
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """As `save_pretrained`, in a form that transformers 4.51 to 5 all load."""
    tokenizer.save_pretrained(str(folder))
    special = {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    write_json(folder / "special_tokens_map.json", special)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(path, config)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


# ---------------------------------------------------------------------------------------------- batches


def stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts as one row of token ids, each ended by </s>: (T,) int64."""
    encoded = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return torch.from_numpy(np.concatenate([np.array([*one.ids, EOS], dtype=np.int64) for one in encoded]))


def wrap(tokens: torch.Tensor) -> torch.Tensor:
    """(B, N - 2) tokens -> (B, N) with <s> before and </s> after each row."""
    return nn.functional.pad(nn.functional.pad(tokens, (1, 0), value=BOS), (0, 1), value=EOS)


def random_windows(tokens: torch.Tensor, batch: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """(batch, length) int64, each row from a random place of the stream."""
    starts = torch.randint(len(tokens) - length + 3, (batch, 1), generator=generator)
    return wrap(tokens[starts + torch.arange(length - 2)])


def all_windows(tokens: torch.Tensor, length: int) -> torch.Tensor:
    """(B, length) int64: the stream cut into rows one after the other, the short rest dropped."""
    rows = len(tokens) // (length - 2)
    return wrap(tokens[: rows * (length - 2)].view(rows, length - 2))


def choose(tokens: torch.Tensor, rate: float, generator: torch.Generator) -> torch.Tensor:
    """Where to predict: (B, N) bool, this share of the positions that hold no special token."""
    return (torch.rand(tokens.shape, generator=generator) < rate) & (tokens >= len(SPECIAL_TOKENS))


def corrupt(tokens: torch.Tensor, chosen: torch.Tensor, vocab_size: int, generator: torch.Generator) -> torch.Tensor:
    """The input with 80% of the chosen tokens masked, 10% replaced by random ones and 10% kept: (B, N) int64."""
    fate = torch.rand(tokens.shape, generator=generator)
    noise = torch.randint(len(SPECIAL_TOKENS), vocab_size, tokens.shape, generator=generator)
    return torch.where(chosen & (fate < 0.8), MASK, torch.where(chosen & (fate < 0.9), noise, tokens))


# ------------------------------------------------------------------------------------------------ model


def build_model(vocab_size: int) -> MraForMaskedLM:
    return MraForMaskedLM(
        MraConfig(
            vocab_size=vocab_size,
            hidden_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=1024,
            max_position_embeddings=LONG,
            hidden_dropout_prob=0.0,  # a few passes over the text: it does not overfit
            attention_probs_dropout_prob=0.0,
            block_per_row=4,
            approx_mode="full",
            bos_token_id=BOS,
            pad_token_id=PAD,
            eos_token_id=EOS,
        )
    )


def logits_at(
    model: MraForMaskedLM, tokens: torch.Tensor, chosen: torch.Tensor, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """(number chosen, vocab_size): logits at the chosen positions only, which saves most of the head's cost."""
    hidden = model.mra(input_ids=tokens, position_ids=positions)[0]
    logits: torch.Tensor = model.cls(hidden[chosen])
    return logits


def wave_positions(model: MraForMaskedLM) -> None:
    """Start the position table as waves: a shift is then the same linear map everywhere, soon learned."""
    table = model.mra.embeddings.position_embeddings.weight
    waves = table.shape[1] // 2
    frequency = torch.exp(-math.log(1000.0) * torch.arange(waves) / waves)
    angle = torch.arange(LONG)[:, None] * frequency
    with torch.no_grad():
        # The first two rows belong to padding and are never used.
        table[2:] = torch.cat([angle.sin(), angle.cos()], dim=1) * math.sqrt(2 / table.shape[1])


def neighbour_vectors(tokens: torch.Tensor, vocab_size: int, width: int) -> torch.Tensor:
    """Word vectors from counts: (vocab_size, width), rows of length 1, near each other for tokens that have the same neighbours.

    The positive pointwise mutual information of tokens at most 3 apart, nearer ones weighing more, cut to its largest components.
    Some seconds of counting save the model many steps of learning the same.
    """
    counts = torch.zeros(vocab_size * vocab_size)
    for distance in (1, 2, 3):
        pair = tokens[:-distance] * vocab_size + tokens[distance:]
        counts += torch.bincount(pair, minlength=len(counts)) / distance
    counts = counts.view(vocab_size, vocab_size)
    counts = counts + counts.T
    total = counts.sum(1) + 1e-3
    smooth = total**0.75  # so that rare neighbours do not rule
    information = torch.log(counts * smooth.sum() / (total[:, None] * smooth[None, :])).clamp(min=0.0)
    left, strength, _ = torch.svd_lowrank((information + information.T) / 2, q=width, niter=3)
    return nn.functional.normalize(left * strength.sqrt(), dim=1)


def count_words(model: MraForMaskedLM, tokens: torch.Tensor) -> None:
    """Start the word table from `neighbour_vectors` and the output's bias from the tokens' frequencies.

    Rows of length 1, three times the usual: the table is the output's matrix too, and from short rows no sure prediction can come.
    """
    table = model.mra.embeddings.word_embeddings.weight
    vocab_size, width = table.shape
    frequency = (tokens.bincount(minlength=vocab_size) + 0.5) / len(tokens)
    with torch.no_grad():
        vectors = neighbour_vectors(tokens, vocab_size, width)
        table[len(SPECIAL_TOKENS) :] = vectors[len(SPECIAL_TOKENS) :]
        table[[BOS, EOS, MASK]] *= 1 / (model.config.initializer_range * math.sqrt(width))
        model.cls.predictions.bias.copy_(frequency.log())


def start_near(model: MraForMaskedLM) -> None:
    """Let each key projection start as its query projection: a token then first listens to those with a position like its own."""
    with torch.no_grad():
        for layer in model.mra.encoder.layer:
            attention = layer.attention.self
            attention.query.weight.mul_(2.0)
            attention.key.weight.copy_(attention.query.weight)


def _exact(attention: nn.Module, hidden: torch.Tensor, mask: torch.Tensor, head_mask: torch.Tensor | None) -> torch.Tensor:
    batch, length, width = hidden.shape
    heads = attention.attributes.num_heads

    def split(x: torch.Tensor) -> torch.Tensor:
        return x.view(batch, length, heads, -1).transpose(1, 2)

    query, key, value = (split(x) for x in (attention.query(hidden), attention.key(hidden), attention.value(hidden)))
    context = nn.functional.scaled_dot_product_attention(query, key, value, scale=attention.attributes.scale)
    return context.transpose(1, 2).reshape(batch, length, width)


@contextmanager
def exact_attention(model: MraForMaskedLM) -> Iterator[None]:
    """Inside, attention is torch's own: the same numbers as MRA where the budget covers all blocks, in a third of the time."""
    modules = [layer.attention.self for layer in model.mra.encoder.layer]
    for module in modules:
        module.forward = functools.partial(_exact, module)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


@torch.no_grad()
def accuracy(model: MraForMaskedLM, rows: torch.Tensor, seed: int = 0) -> float:
    """Share of chosen tokens of `rows` (B, N) that the model names, all of them replaced by <mask>."""
    model.eval()
    chosen = choose(rows, MASK_RATE, torch.Generator().manual_seed(seed))
    right = 0
    per_batch = max(1, 4096 // rows.shape[1])
    for batch, where in zip(rows.split(per_batch), chosen.split(per_batch), strict=True):
        right += int((logits_at(model, batch.masked_fill(where, MASK), where).argmax(-1) == batch[where]).sum())
    return right / int(chosen.sum())


def unigram_accuracy(tokens: torch.Tensor, rows: torch.Tensor, seed: int = 0) -> float:
    """The same share for always naming the most frequent token of the training text."""
    commonest = int(tokens[tokens >= len(SPECIAL_TOKENS)].bincount().argmax())
    chosen = choose(rows, MASK_RATE, torch.Generator().manual_seed(seed))
    return float((rows[chosen] == commonest).double().mean())


def without_attention(model: MraForMaskedLM) -> MraForMaskedLM:
    """A copy in which no token hears of another: each layer's attention adds nothing but its bias."""
    deaf = copy.deepcopy(model)
    for layer in deaf.mra.encoder.layer:
        nn.init.zeros_(layer.attention.output.dense.weight)
    return deaf


# --------------------------------------------------------------------------------------------- training


def phase(progress: float) -> tuple[int, int]:
    """Length and number of a step's rows."""
    return next(((length, rows) for until, length, rows in PHASES if progress < until), PHASES[-1][1:])


def rate_factor(progress: float) -> float:
    """Factor on the peak learning rates: up, level, then linearly to 0."""
    return min(progress / WARMUP_SHARE, 1.0, (1 - progress) / DECAY_SHARE)


def make_optimizers(model: MraForMaskedLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices: it leaves the plateau of word frequencies in fewer steps than AdamW, which does the rest."""
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and ".encoder." in name]
    seen = {id(weight) for weight in matrices}
    rest = [weight for weight in model.parameters() if id(weight) not in seen]
    return [
        torch.optim.Muon(matrices, lr=4e-3, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01),
    ]


@dataclass
class Trainer:
    """The model, its optimizers and how far the training is. A step's batch depends on the seed and the step's number alone."""

    model: MraForMaskedLM
    tokens: torch.Tensor  # (T,) the training text
    seed: int
    train_mask_rate: float
    steps: int | None  # the end, or
    minutes: float | None  # the end by the clock
    step: int = 0
    elapsed: float = 0.0  # seconds of training, those of resumed runs included

    def __post_init__(self) -> None:
        self.model.set_reference_attention(True)  # its backward need not compute the forward again
        self.optimizers = make_optimizers(self.model)
        self.peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]

    @property
    def progress(self) -> float:
        """0 at the start, 1 at the end."""
        done, whole = (self.step, self.steps) if self.steps is not None else (self.elapsed, 60 * (self.minutes or 0.0))
        return min(1.0, done / whole) if whole else 1.0

    def train_step(self) -> float:
        """One batch; returns the mean cross-entropy of its chosen tokens."""
        began = time.monotonic()
        length, count = phase(self.progress)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        rows = random_windows(self.tokens, count, length, generator)
        chosen = choose(rows, self.train_mask_rate, generator)
        corrupted = corrupt(rows, chosen, self.model.config.vocab_size, generator)
        # Short rows start anywhere, so that every position is trained.
        offset = torch.randint(LONG - length + 1, (len(rows), 1), generator=generator)
        positions = 2 + offset + torch.arange(length)
        self._set_rates()
        self.model.train()
        with ExitStack() as stack:
            if length <= SHORT:
                stack.enter_context(exact_attention(self.model))
            stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
            logits = logits_at(self.model, corrupted, chosen, positions)
        loss = nn.functional.cross_entropy(logits.float(), rows[chosen])
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.elapsed += time.monotonic() - began
        if not math.isfinite(loss.item()):
            raise click.ClickException(f"the loss is {loss.item()} at step {self.step}: resume with another --seed")
        return loss.item()

    def _set_rates(self) -> None:
        factor = rate_factor(self.progress)
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor

    def save(self, path: Path) -> None:
        """Write a snapshot; a kill at any moment leaves the old one or the new one, whole."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "elapsed": self.elapsed,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.elapsed = state["step"], state["elapsed"]


def train(trainer: Trainer, snapshot: Path, every_seconds: float) -> None:
    """Run to the end, with a snapshot now and then and at an interruption."""
    saved, losses = time.monotonic(), []
    try:
        while trainer.progress < 1:
            losses.append(trainer.train_step())
            if len(losses) == 50:
                console.print(
                    f"{100 * trainer.progress:5.1f}%  step {trainer.step}  {trainer.elapsed / 60:.1f} min  "
                    f"loss {sum(losses) / len(losses):.3f}",
                    highlight=False,
                )
                losses.clear()
            if time.monotonic() - saved > every_seconds:
                trainer.save(snapshot)
                saved = time.monotonic()
    except KeyboardInterrupt:
        trainer.save(snapshot)
        raise click.ClickException(
            f"interrupted at step {trainer.step}: --resume goes on, --resume --minutes 0 writes the model as it is"
        ) from None
    trainer.save(snapshot)


# ------------------------------------------------------------------------------------------------ output


@dataclass(frozen=True)
class Score:
    """Share of masked held-out tokens named right, over `predictions` of them."""

    what: str
    predictions: int
    share: float


def evaluate(model: MraForMaskedLM, tokens: torch.Tensor, held_out: torch.Tensor, rows_limit: int) -> list[Score]:
    """The table of the README. tokens, held_out: (T,) the two streams."""
    scores = []
    for length in (SHORT, LONG):
        rows = all_windows(held_out, length)[: rows_limit * SHORT // length]
        count = int(choose(rows, MASK_RATE, torch.Generator().manual_seed(0)).sum())
        for what, share in (
            (f"length {length}", accuracy(model, rows)),
            (f"length {length}, attention cut", accuracy(without_attention(model), rows)),
            (f"length {length}, most frequent token", unigram_accuracy(tokens, rows)),
        ):
            scores.append(Score(what, count, share))
    return scores


def save_model(model: MraForMaskedLM, folder: Path) -> None:
    """float16 weights, half the size; config.json says float32, which is what they load as."""
    copy.deepcopy(model).half().save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = "float32"
    write_json(path, config)


README = """\
# mra-tiny-python

A small masked language model with MRA attention, trained on Python's standard library by `examples/train_tiny.py`. It exists so
that exporting, running and comparing can be tried and tested with trained attention; it is not a model to build on.

4 layers, 256 wide, 4 heads of 64, 512 positions, block_per_row 4 (64 exact blocks a head), approx_mode full, byte-level BPE of
{vocab_size} tokens, {parameters:.1f} million parameters, stored as float16.

## Data

The standard library of Python {python}: {train_documents} documents to train on ({train_characters:.1f} million characters,
{train_tokens:.2f} million tokens) and {held_documents} held out ({held_characters:.2f} million characters, {held_tokens} tokens).
A document is a source file or a topic of the language reference in `pydoc_data`; a hash of its name decides whether it is held
out. Tests, character tables, generated files and installed packages are left out. The text is under the Python Software
Foundation's licence and is not part of this folder.

## Training

{steps} steps in {minutes:.0f} minutes on {cores} shared cores ({machine}), seed {seed}, torch {torch}, bfloat16.{unfinished}
Sequences of 32, then {short} tokens, where the budget covers every block, then of {long}, where it covers a quarter.
{train_mask:.0%} of the tokens chosen (of these 80% `<mask>`, 10% random, 10% kept). Muon for the layers' matrices, AdamW for the
rest. To train another like it (the clock sets the pace; with `--steps N` in its place every run takes the same steps):

    python examples/train_tiny.py --out OUT {again}

## Held-out accuracy

Share of masked tokens named right: 15% of the tokens of the held-out documents, all replaced by `<mask>`. "Attention cut" is this
model with every layer's attention output set to nothing; "most frequent token" is the unigram baseline.

| | predictions | accuracy |
|---|---|---|
{scores}
"""


UNFINISHED = "\n**Ended early**: an intermediate state, before the learning rate fell."


def score_lines(scores: list[Score]) -> str:
    return "\n".join(f"| {score.what} | {score.predictions} | {100 * score.share:.1f}% |" for score in scores)


def publish(staged: Path, out: Path) -> None:
    """Put a finished folder in place of `out`, which is never seen half-written."""
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)
    os.replace(staged, out)
    shutil.rmtree(old, ignore_errors=True)


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder to write.")
@click.option("--minutes", type=click.FloatRange(min=0), help="Train this long (default 45).")
@click.option("--steps", type=click.IntRange(min=0), help="Train this many steps instead: the same weights on every run.")
@click.option("--vocab-size", type=click.IntRange(min=300), default=6000, show_default=True)
@click.option("--mask-rate", type=click.FloatRange(0.01, 0.9), default=0.3, show_default=True, help="While training.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="Of torch (default: its own choice).")
@click.option("--work", type=click.Path(path_type=Path, file_okay=False), default=Path("build/train"), show_default=True)
@click.option("--snapshot-minutes", type=click.FloatRange(min=0), default=3.0, show_default=True)
@click.option("--resume", is_flag=True, help="Go on from the snapshot in --work.")
@click.option("--evaluation-rows", type=click.IntRange(min=4), default=512, show_default=True, help="Of 128 held-out tokens.")
def main(
    out: Path,
    minutes: float | None,
    steps: int | None,
    vocab_size: int,
    mask_rate: float,
    seed: int,
    threads: int | None,
    work: Path,
    snapshot_minutes: float,
    resume: bool,
    evaluation_rows: int,
) -> None:
    if minutes is not None and steps is not None:
        raise click.UsageError("--minutes and --steps both say when to end: pass one of them")
    if out.exists() and not (out / "config.json").exists() and any(out.iterdir()):
        raise click.UsageError(f"--out {out} holds something that is not a checkpoint: name another folder")
    snapshot = work / "snapshot.pt"
    if resume and not snapshot.exists():
        raise click.UsageError(f"--resume: there is no {snapshot}: leave --resume out, or name its folder with --work")
    if steps is None and minutes is None:
        minutes = 45.0
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)

    texts = documents()
    kept, held = [d.text for d in texts if not d.held_out], [d.text for d in texts if d.held_out]
    console.print(f"{len(kept)} documents to train on, {len(held)} held out")
    tokenizer = train_tokenizer(kept, vocab_size)
    tokens, held_out = stream(tokenizer, kept), stream(tokenizer, held)
    console.print(f"{len(tokens)} tokens to train on, {len(held_out)} held out, vocabulary {len(tokenizer)}")

    model = build_model(len(tokenizer))
    trainer = Trainer(model, tokens, seed, mask_rate, steps, minutes)
    if resume:
        trainer.load(snapshot)
    else:
        wave_positions(model)
        count_words(model, tokens)
        start_near(model)
    ended_early = resume and minutes == 0
    train(trainer, snapshot, 60 * snapshot_minutes)

    staged = out.with_name(f".{out.name}.new")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    save_tokenizer(tokenizer, staged)
    save_model(model, staged)
    scores = evaluate(MraForMaskedLM.from_pretrained(staged, dtype=torch.float32), tokens, held_out, evaluation_rows)
    readme = README.format(
        vocab_size=len(tokenizer),
        parameters=sum(weight.numel() for weight in model.parameters()) / 1e6,
        python=platform.python_version(),
        train_documents=len(kept),
        train_characters=sum(map(len, kept)) / 1e6,
        train_tokens=len(tokens) / 1e6,
        held_documents=len(held),
        held_characters=sum(map(len, held)) / 1e6,
        held_tokens=len(held_out),
        steps=trainer.step,
        minutes=trainer.elapsed / 60,
        cores=os.cpu_count(),
        machine=platform.machine(),
        seed=seed,
        torch=torch.__version__,
        unfinished="\n**Ended early**: these weights are an intermediate state, before the learning rate fell."
        if ended_early
        else "",
        short=SHORT,
        long=LONG,
        train_mask=mask_rate,
        again=f"--seed {seed} " + (f"--minutes {minutes:g}" if steps is None else f"--steps {steps}"),
        scores=score_lines(scores),
    )
    (staged / "README.md").write_text(readme)
    publish(staged, out)

    table = Table("held-out tokens", "predictions", "accuracy", title=str(out))
    for score in scores:
        table.add_row(score.what, str(score.predictions), f"{100 * score.share:.1f}%")
    console.print(table)


if __name__ == "__main__":
    main()
