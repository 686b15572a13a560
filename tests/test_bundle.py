"""The bundle's folder: published whole or not at all, and refused by name when anything in it is not what the manifest says."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from processes import started

from mra_export.bundle import (
    GOLDEN,
    MANIFEST,
    Bundle,
    Manifest,
    ModelInfo,
    Tensor,
    check_target,
    list_files,
    staged,
    write_golden,
    write_manifest,
)
from mra_export.contract import Attributes
from mra_export.errors import BundleError

BATCHES = [{"input_ids": np.arange(6).reshape(2, 3)}, {"input_ids": np.ones((1, 1), np.int64)}]
ANSWERS = [{"logits": np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3)}, {"logits": np.zeros((1, 1), np.float32)}]


def manifest_of(folder, **changes) -> Manifest:
    values = {
        "model": ModelInfo(
            architecture="MraForMaskedLM",
            model_type="mra",
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=256,
            vocab_size=261,
            type_vocab_size=1,
            num_labels=2,
        ),
        "task": "fill-mask",
        "dtype": "fp32",
        "opset": 20,
        "padding_invariant": False,
        "attributes": Attributes(2, 16, 0.1767766952966369).as_dict(),
        "inputs": [Tensor(name="input_ids", dtype="int64", axes=["batch", "sequence"])],
        "outputs": [Tensor(name="logits", dtype="float32", axes=["batch", "sequence", 261])],
        "files": list_files(folder),
        "versions": {"torch": "2.0"},
        "source": "somewhere",
    }
    return Manifest(**{**values, **changes})


def fill(folder) -> None:
    (folder / "model.onnx").write_bytes(b"graph" * 100)
    (folder / "config.json").write_text("{}")
    (folder / "lib").mkdir()
    (folder / "lib" / "libmra_ort.so").write_bytes(b"\x7fELF")
    write_golden(folder / GOLDEN, BATCHES, ANSWERS)
    write_manifest(folder, manifest_of(folder))


@pytest.fixture
def bundle(tmp_path):
    with staged(tmp_path / "bundle") as folder:
        fill(folder)
    return tmp_path / "bundle"


def rewrite(bundle, change) -> None:
    raw = json.loads((bundle / MANIFEST).read_text())
    change(raw)
    (bundle / MANIFEST).write_text(json.dumps(raw))


def test_round_trip(bundle):
    loaded = Bundle.load(bundle)
    assert loaded.path == bundle
    assert set(loaded.manifest.files) == {"model.onnx", "config.json", "golden.npz", "lib/libmra_ort.so"}
    assert loaded.manifest.operator_attributes() == Attributes(2, 16, 0.1767766952966369)
    entry = loaded.manifest.files["model.onnx"]
    assert (entry.sha256, entry.size) == (hashlib.sha256(b"graph" * 100).hexdigest(), 500)
    assert loaded.file("lib/libmra_ort.so").read_bytes() == b"\x7fELF"
    inputs, outputs = loaded.golden()
    for stored, given in ((inputs, BATCHES), (outputs, ANSWERS)):
        assert len(stored) == len(given)
        for left, right in zip(stored, given, strict=True):
            assert left.keys() == right.keys()
            for name, array in right.items():
                assert left[name].dtype == array.dtype
                np.testing.assert_array_equal(left[name], array)


def test_every_reader_may_read_what_was_published(bundle):
    umask = os.umask(0)
    os.umask(umask)
    for path in bundle.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask


def test_a_file_that_the_bundle_does_not_have(bundle):
    with pytest.raises(
        BundleError, match=r"has no file model\.plan: it has config\.json, golden\.npz, lib/libmra_ort\.so, model\.onnx"
    ):
        Bundle.load(bundle).file("model.plan")


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz", "lib/libmra_ort.so"])
def test_missing_truncated_and_altered_files_are_named(bundle, name):
    path = bundle / name
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    for verify_hashes in (True, False):
        with pytest.raises(BundleError, match=rf"{name} is truncated: {len(content) - 1} bytes, the manifest says {len(content)}"):
            Bundle.load(bundle, verify_hashes=verify_hashes)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BundleError, match=f"{name} is altered"):
        Bundle.load(bundle)
    path.write_bytes(content + b"x")
    with pytest.raises(BundleError, match=f"{name} is altered"):
        Bundle.load(bundle)
    path.unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        Bundle.load(bundle)


def test_without_hashes_only_presence_and_size_are_checked(bundle):
    (bundle / "model.onnx").write_bytes(b"GRAPH" * 100)
    Bundle.load(bundle, verify_hashes=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(schema_version=2), "has schema_version 2, this package knows 1: install a newer mra-export"),
        (lambda raw: raw.update(contract_version=2), "has contract_version 2, this package knows 1: install a newer mra-export"),
        (lambda raw: raw.update(contract_version=0), "has contract_version 0, this package needs 1: export the bundle again"),
        (lambda raw: raw.pop("schema_version"), "has schema_version None, this package needs 1: export the bundle again"),
        (lambda raw: raw.update(schema_version=True), "has schema_version True, this package needs 1"),
        (lambda raw: raw.pop("opset"), "opset: Field required"),
        (lambda raw: raw.update(extra=1), "extra: Extra inputs are not permitted"),
        (lambda raw: raw.update(dtype="int4"), "dtype: .*use one of fp32, fp16, bf16"),
        (lambda raw: raw["attributes"].pop("scale"), "attributes: .*the operator's attributes are num_heads"),
        (lambda raw: raw["attributes"].update(num_heads=0), "attributes: .*num_heads is 0"),
        (lambda raw: raw["attributes"].update(num_heads="two"), "attributes: "),
        (lambda raw: raw["files"].pop("model.onnx"), "does not list model.onnx"),
        (lambda raw: raw["files"]["model.onnx"].update(sha256="0"), "sha256"),
    ],
)
def test_manifests_that_do_not_fit_are_refused(bundle, change, message):
    rewrite(bundle, change)
    with pytest.raises(BundleError, match=message):
        Bundle.load(bundle)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "a\\..\\b", "C:/x", "./model", "a//b", "", MANIFEST])
def test_file_names_cannot_leave_the_bundle(bundle, name):
    rewrite(bundle, lambda raw: raw["files"].update({name: raw["files"]["model.onnx"]}))
    with pytest.raises(BundleError, match="does not stay inside the bundle"):
        Bundle.load(bundle)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_unreadable_manifests(bundle, content):
    (bundle / MANIFEST).write_bytes(content)
    with pytest.raises(BundleError, match=MANIFEST):
        Bundle.load(bundle)


def test_what_is_not_a_bundle(tmp_path):
    with pytest.raises(BundleError, match=r"has no manifest\.json, so it is not a complete bundle"):
        Bundle.load(tmp_path)
    with pytest.raises(BundleError, match="is not a folder"):
        Bundle.load(tmp_path / "nowhere")


def test_golden_that_cannot_be_read(tmp_path):
    for content in (b"", b"PK\x03\x04 no zip", b"nothing"):
        with staged(tmp_path / "bundle", force=True) as folder:
            fill(folder)
            (folder / GOLDEN).write_bytes(content)
            write_manifest(folder, manifest_of(folder))
        with pytest.raises(BundleError, match=r"golden\.npz cannot be read"):
            Bundle.load(tmp_path / "bundle").golden()


def test_golden_never_unpickles(tmp_path):
    with staged(tmp_path / "bundle") as folder:
        fill(folder)
        np.savez(folder / GOLDEN, **{"inputs/0/x": np.array([print], dtype=object)})
        write_manifest(folder, manifest_of(folder))
    with pytest.raises(BundleError, match=r"golden\.npz cannot be read"):
        Bundle.load(tmp_path / "bundle").golden()


def test_the_manifest_is_replaced_in_one_step(bundle):
    manifest = Bundle.load(bundle).manifest
    manifest.engines = [{"file": "engines/a.plan"}]
    write_manifest(bundle, manifest)
    assert Bundle.load(bundle).manifest.engines == [{"file": "engines/a.plan"}]
    assert sorted(path.name for path in bundle.iterdir()) == ["config.json", "golden.npz", "lib", MANIFEST, "model.onnx"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing(tmp_path, error):
    def write():
        with staged(tmp_path / "deep" / "er" / "bundle") as folder:
            fill(folder)
            raise error

    with pytest.raises(error):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_manifest_is_not_published(tmp_path):
    with pytest.raises(BundleError, match="no manifest was written"), staged(tmp_path / "bundle") as folder:
        (folder / "model.onnx").write_bytes(b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_staged_folder_loads_for_its_own_process_only(tmp_path):
    with staged(tmp_path / "bundle") as folder:
        fill(folder)
        assert Bundle.load(folder).manifest.task == "fill-mask"
        script = f"from mra_export.bundle import Bundle; Bundle.load({str(folder)!r})"
        other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert "is not a complete bundle" in other.stderr


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_writer_leaves_nothing_that_loads(tmp_path, signal_number):
    script = f"""
import sys, time
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_bundle import fill
from mra_export.bundle import staged
with staged({str(tmp_path / "bundle")!r}) as folder:
    fill(folder)
    print("filled", flush=True)
    time.sleep(60)
"""
    with started([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as writer:
        assert writer.stdout.readline() == "filled\n"
        writer.send_signal(signal_number)
        writer.wait(timeout=30)
    assert not (tmp_path / "bundle").exists()
    if signal_number == signal.SIGINT:
        assert list(tmp_path.iterdir()) == []
    for left in tmp_path.iterdir():
        with pytest.raises(BundleError, match="is not a complete bundle"):
            Bundle.load(left)
    with staged(tmp_path / "bundle") as folder:
        fill(folder)
    Bundle.load(tmp_path / "bundle")


def test_an_existing_bundle_needs_force(bundle):
    before = (bundle / MANIFEST).read_bytes()
    with pytest.raises(BundleError, match="already holds a bundle: pass --force"), staged(bundle):
        pytest.fail("must not start")
    with staged(bundle, force=True) as folder:
        fill(folder)
        (folder / "model.onnx").write_bytes(b"new")
        write_manifest(folder, manifest_of(folder))
        assert (bundle / MANIFEST).read_bytes() == before  # the old one is there until the new one is complete
        Bundle.load(bundle)
    assert Bundle.load(bundle).file("model.onnx").read_bytes() == b"new"
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_force_keeps_the_old_bundle_when_the_new_one_fails(bundle):
    def write():
        with staged(bundle, force=True) as folder:
            fill(folder)
            raise ValueError("parity")

    with pytest.raises(ValueError, match="parity"):
        write()
    Bundle.load(bundle)
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_force_restores_the_old_bundle_when_the_last_rename_fails(bundle, monkeypatch):
    original = type(bundle).replace

    def replace(self, target):
        if self.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return original(self, target)

    def write():
        with staged(bundle, force=True) as folder:
            fill(folder)
            monkeypatch.setattr(type(bundle), "replace", replace)

    with pytest.raises(BundleError, match="cannot be replaced"):
        write()
    monkeypatch.undo()
    Bundle.load(bundle)
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


@pytest.mark.parametrize("force", [False, True])
def test_other_peoples_files_are_never_deleted(tmp_path, bundle, force):
    folder = tmp_path / "photos"
    (folder / "2019").mkdir(parents=True)
    with pytest.raises(BundleError, match="photos holds 2019, which no bundle lists"):
        check_target(folder, force)
    (folder / "cat.jpg").write_bytes(b"meow")
    with pytest.raises(BundleError, match=r"photos holds cat\.jpg, which no bundle lists"):
        check_target(folder, force)
    (bundle / "lib" / "notes.txt").write_text("mine")
    with pytest.raises(BundleError, match=r"holds lib/notes\.txt, which no bundle lists"), staged(bundle, force=force):
        pytest.fail("must not start")
    assert (bundle / "lib" / "notes.txt").read_text() == "mine"


def test_a_file_that_appears_during_the_export_is_kept(bundle):
    def write():
        with staged(bundle, force=True) as folder:
            fill(folder)
            (bundle / "notes.txt").write_text("mine")

    with pytest.raises(BundleError, match=r"holds notes\.txt"):
        write()
    assert (bundle / "notes.txt").read_text() == "mine"


def test_an_empty_folder_will_do(tmp_path):
    (tmp_path / "bundle").mkdir()
    with staged(tmp_path / "bundle") as folder:
        fill(folder)
    Bundle.load(tmp_path / "bundle")


def test_a_link_to_an_empty_folder_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with staged(tmp_path / "link") as folder:
        fill(folder)
    assert (tmp_path / "link").is_symlink()
    Bundle.load(tmp_path / "real")


@pytest.mark.parametrize("force", [False, True])
def test_places_that_cannot_be_written(tmp_path, force):
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match="file is a file: choose a folder"):
        check_target(tmp_path / "file", force)
    with pytest.raises(BundleError, match="file cannot be written to"):
        check_target(tmp_path / "file" / "bundle", force)
    with pytest.raises(BundleError, match="cannot be written to"), staged("/proc/bundle", force):
        pytest.fail("must not start")


def test_two_writers_and_one_place(tmp_path):
    barrier = threading.Barrier(2)
    errors = []

    def write():
        try:
            with staged(tmp_path / "bundle") as folder:
                fill(folder)
                barrier.wait(timeout=30)
        except BundleError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 1
    Bundle.load(tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
