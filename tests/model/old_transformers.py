"""Run by test_loading.py in a process of its own, with an old release of transformers first on the path.

argv: the release's major.minor, a folder to write to. Writes <head>/theirs with that release's own classes and <head>/ours with
this package's, and checks that each loads as the other there.
"""

import sys
from pathlib import Path

import torch
import transformers

import mra_export.model as ours
from mra_export.model import TASKS, load

release, folder = sys.argv[1], Path(sys.argv[2])
assert transformers.__version__.startswith(release + "."), transformers.__version__

small = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "num_labels": 3,
}
torch.manual_seed(0)
tokens = torch.randint(5, 100, (2, 2, 40))
for task, model_class in TASKS.items():
    name = model_class.__name__
    theirs = getattr(transformers, name)(transformers.MraConfig(**small)).eval()
    theirs.save_pretrained(folder / name / "theirs")
    copy = load(folder / name / "theirs")
    assert type(copy) is getattr(ours, name)
    assert copy.state_dict().keys() == theirs.state_dict().keys()
    copy.save_pretrained(folder / name / "ours")
    back, info = type(theirs).from_pretrained(folder / name / "ours", output_loading_info=True)
    assert not any(info.values()), info
    for key, value in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key
    example = tokens if task == "multiple-choice" else tokens[0]
    logits = copy(example, output_hidden_states=True)[0]
    torch.save(logits, folder / name / "logits.pt")

# Training, checkpointing, tied weights and half precision there too.
model = ours.MraForMaskedLM(ours.MraConfig(**small)).train()
model.gradient_checkpointing_enable()
model(tokens[0], labels=tokens[0]).loss.backward()
assert all(parameter.grad is not None for parameter in model.mra.encoder.parameters())
assert model.cls.predictions.decoder.weight is model.mra.embeddings.word_embeddings.weight
assert model.cls.predictions.decoder.bias is model.cls.predictions.bias
assert load(folder / "MraForMaskedLM" / "ours", dtype=torch.bfloat16).dtype == torch.bfloat16
