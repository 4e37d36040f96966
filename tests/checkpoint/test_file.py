import hashlib
import io
import itertools
import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import tempfile
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from topoflow.checkpoint import file as checkpoint_file
from topoflow.checkpoint.file import named_tensors, read_checkpoint, verify_checkpoint, write_checkpoint
from topoflow.errors import MissingPath, ResumeRefused


def make_state(step=3):
    return {
        "format": checkpoint_file.FORMAT,
        "model": {"w": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1.5, dtype=torch.bfloat16)},
        "optimizer": {"groups": [{"name": "g", "betas": [0.9, 0.99]}], "state": {"w": {"step": torch.tensor(3.0)}}},
        "progress": {"step": step, "best_validation_loss": None},
    }


@pytest.fixture
def folder(tmp_path):
    write_checkpoint(tmp_path / "step-00000003", make_state())
    return tmp_path / "step-00000003"


def test_what_is_written_is_read(folder):
    state = read_checkpoint(folder)
    assert torch.equal(state["model"]["w"], torch.arange(6.0).reshape(2, 3))
    assert state["model"]["b"].dtype == torch.bfloat16
    assert state["optimizer"]["groups"] == [{"name": "g", "betas": [0.9, 0.99]}]
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "state.pt"]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("name", ["state.pt", "manifest.json"])
def test_every_flipped_byte_is_found(folder, name):
    path = folder / name
    whole = path.read_bytes()
    for position in range(0, len(whole), max(1, len(whole) // 97)):
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(ResumeRefused, match=name):
            read_checkpoint(folder)
    path.write_bytes(whole)
    read_checkpoint(folder)


@pytest.mark.parametrize("name", ["state.pt", "manifest.json"])
def test_truncation_and_absence_are_found(folder, name):
    path = folder / name
    length = path.stat().st_size
    for left in (length - 1, length // 2, 0):
        os.truncate(path, left)
        with pytest.raises(ResumeRefused, match=f"{name} has {left} bytes" if name == "state.pt" else name):
            read_checkpoint(folder)
    path.unlink()
    with pytest.raises(ResumeRefused, match=f"{name} is missing"):
        read_checkpoint(folder)


def test_a_path_that_is_not_there(tmp_path):
    with pytest.raises(MissingPath, match="step-00000009"):
        read_checkpoint(tmp_path / "step-00000009")


def test_hashes_are_those_of_the_bytes(tmp_path):
    shared = torch.randn(300, 200)
    tensors = {
        "large": torch.randn(200, 300),
        "small": torch.randn(3).bfloat16(),
        "strided": shared.t(),
        "part": shared[:150],
        "same": shared,
    }
    write_checkpoint(tmp_path / "step-00000004", {**make_state(4), "model": tensors})
    manifest = json.loads((tmp_path / "step-00000004" / "manifest.json").read_text())
    content = (tmp_path / "step-00000004" / "state.pt").read_bytes()
    assert manifest["files"]["state.pt"] == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    for name, tensor in tensors.items():
        entry = manifest["tensors"][f"model/{name}"]
        raw = tensor.float().numpy().tobytes() if name != "small" else tensor.view(torch.int16).numpy().tobytes()
        assert entry["sha256"] == hashlib.sha256(raw).hexdigest(), name
        assert (entry["dtype"], entry["shape"]) == (str(tensor.dtype), list(tensor.shape))
    assert manifest["tensors"].keys() == {f"model/{name}" for name in tensors} | {"optimizer/state/w/step"}
    state = read_checkpoint(tmp_path / "step-00000004")
    assert all(torch.equal(state["model"][name], tensor) for name, tensor in tensors.items())


def sign(folder, content, entry=None):
    """Write `content` as state.pt of the checkpoint, with a manifest that matches it or has `entry` for it."""
    (folder / "state.pt").write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["manifest_sha256"]
    whole = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest["files"]["state.pt"] = whole if entry is None else entry
    own = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({**manifest, "manifest_sha256": own}, indent=1))


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def zipped(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


@pytest.mark.parametrize("form", [zipped, pickle.dumps], ids=["zip", "bare pickle"])
def test_no_code_of_a_checkpoint_runs(tmp_path, folder, form):
    trap = tmp_path / "trap"
    content = form({**make_state(), "model": Malicious(str(trap))})
    sign(folder, content)
    with pytest.raises(ResumeRefused, match=r"state\.pt holds more than tensors and plain values"):
        read_checkpoint(folder)
    assert not trap.exists()
    torch.load(folder / "state.pt", weights_only=False) if form is zipped else pickle.loads(content)
    assert trap.exists()  # unrestricted loading would run it


def test_what_misleads_the_loader_is_refused_in_one_line(folder):
    """Files with valid hashes for which torch.load raises various errors."""
    whole = (folder / "state.pt").read_bytes()
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in records if name.endswith("data.pkl"))
    draw, kinds = random.Random(0), set()
    for _ in range(300):
        damaged = bytearray(records[pickled])
        for _ in range(draw.choice((1, 2, 4))):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in records.items():
                archive.writestr(name, bytes(damaged) if name == pickled else content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.load(io.BytesIO(file.getvalue()), map_location="cpu", weights_only=True)
        except Exception as error:  # noqa: BLE001 (any of them is fine)
            kinds.add(type(error))
            sign(folder, file.getvalue())
            with pytest.raises(ResumeRefused) as refusal:
                read_checkpoint(folder)
            assert "\n" not in str(refusal.value)
    assert len(kinds) >= 5, kinds


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (torch.zeros(3), "format Tensor"),
        ({"model": {}, "progress": {}}, "format None"),
        ({**make_state(), "format": 1}, "format 1"),
        ({**make_state(), "model": [1]}, "no model"),
        ({"format": (1, 1), "model": {}}, "no progress"),
        ({**make_state(), "progress": {}}, "of step None"),
    ],
)
def test_a_signed_file_that_is_no_checkpoint_is_refused(folder, content, words):
    sign(folder, zipped(content))
    with pytest.raises(ResumeRefused, match=words):
        read_checkpoint(folder)


def test_parts_that_a_reader_needs_are_required(folder):
    with pytest.raises(ResumeRefused, match=r"state\.pt has no data, config: expected a TopoFlow checkpoint"):
        read_checkpoint(folder, ("model", "data", "config"))


@pytest.mark.parametrize(
    ("entry", "words"),
    [([], "does not describe"), ({}, "does not describe"), ({"size": 5}, "expected 5"), ({"size": "SIZE"}, "describe"),
     ({"size": "SIZE", "sha256": "a"}, "hash"), ({"size": "SIZE", "pieces": []}, "hash"),
     ({"size": "SIZE", "pieces": [[9]]}, "describe"), ({"size": "SIZE", "pieces": [["9", "a"]]}, "describe"),
     ({"size": "SIZE", "pieces": 0}, "describe")],
)  # fmt: skip
def test_a_signed_manifest_that_does_not_describe_the_file_is_refused(folder, entry, words):
    content = (folder / "state.pt").read_bytes()
    if entry and entry["size"] == "SIZE":
        entry = {**entry, "size": len(content)}
    sign(folder, content, entry)
    with pytest.raises(ResumeRefused, match=words):
        read_checkpoint(folder)


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '{"a": 1}', "\x00", '{"files": {}}'])
def test_an_empty_manifest_is_refused(folder, text):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ResumeRefused, match=r"manifest\.json does not match its own hash"):
        read_checkpoint(folder)


def pieces_of(content):
    """Return the entry of state.pt as in early format 1.1: a hash for each piece."""
    cuts = [0, 100, 700, len(content)]
    pieces = [content[start:end] for start, end in itertools.pairwise(cuts)]
    return {
        "size": len(content), "pieces": [[len(piece), hashlib.sha256(piece).hexdigest()] for piece in pieces],
    }  # fmt: skip


def test_a_file_with_hashes_of_pieces_is_read_and_verified(folder):
    content = (folder / "state.pt").read_bytes()
    sign(folder, content, pieces_of(content))
    assert read_checkpoint(folder)["progress"]["step"] == 3
    for position in (50, 99, 100, 699, 700, len(content) - 1):
        damaged = bytearray(content)
        damaged[position] ^= 1
        (folder / "state.pt").write_bytes(damaged)
        with pytest.raises(ResumeRefused, match=r"state\.pt does not match its hash"):
            read_checkpoint(folder)
    lacks_the_end = pieces_of(content)
    lacks_the_end["pieces"].pop()
    sign(folder, content, lacks_the_end)
    with pytest.raises(ResumeRefused, match=r"state\.pt does not match its hash"):
        read_checkpoint(folder)


def test_a_file_of_format_1_0_is_read(folder):
    content = zipped({**make_state(), "format": (1, 0)})
    sign(folder, content)
    assert read_checkpoint(folder)["progress"]["step"] == 3
    (folder / "state.pt").write_bytes(content[:-1] + b"?")
    with pytest.raises(ResumeRefused, match="damaged"):
        read_checkpoint(folder)


def test_verification_alone_finds_what_reading_finds(folder):
    verify_checkpoint(folder)
    (folder / "state.pt").write_bytes(b"x")
    with pytest.raises(ResumeRefused, match=r"state\.pt has 1 bytes"):
        verify_checkpoint(folder)
    with pytest.raises(MissingPath):
        verify_checkpoint(folder.with_name("step-00000099"))


@pytest.mark.parametrize("read", [read_checkpoint, verify_checkpoint])
def test_a_renamed_checkpoint_is_refused_by_name(folder, read):
    renamed = folder.rename(folder.with_name("step-00000020"))
    words = r"folder step-00000020, manifest\.json of step 3"
    with pytest.raises(ResumeRefused, match=words):
        read(renamed)
    aside = renamed.rename(folder.with_name("abandoned-step-00000003-2"))
    read(aside)
    read(aside.rename(folder.with_name("pretrained")))  # a copy by a user, under a name without a step


def test_a_state_of_another_step_than_its_manifest_is_refused(folder):
    sign(folder, zipped(make_state(4)))
    with pytest.raises(ResumeRefused, match=r"folder step-00000003, manifest\.json of step 3 and state\.pt of step 4"):
        read_checkpoint(folder)


def test_progress_is_reported_while_a_checkpoint_is_written(tmp_path):
    calls = []
    write_checkpoint(tmp_path / "step-00000004", large_state(), on_progress=lambda: calls.append(1))
    assert len(calls) > len(list(named_tensors(large_state())))


def test_another_format_is_refused(tmp_path):
    write_checkpoint(tmp_path / "step-00000004", {**make_state(4), "format": (2, 0)})
    with pytest.raises(ResumeRefused, match=r"format \(2, 0\)"):
        read_checkpoint(tmp_path / "step-00000004")


@pytest.mark.parametrize("function", ["save", "rename"])
def test_a_failed_write_leaves_what_was_there(folder, monkeypatch, function):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_file.torch if function == "save" else checkpoint_file.os, function, fail)
    with pytest.raises(OSError, match="No space"):
        write_checkpoint(folder.with_name("step-00000004"), make_state(4))
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    monkeypatch.undo()
    assert read_checkpoint(folder)["progress"]["step"] == 3


def large_state(step=4):
    state = make_state(step)
    state["model"]["large"] = torch.arange(300_000.0)
    return state


@contextmanager
def small_disk(tmp_path):
    """A file system of one megabyte."""
    mount = tmp_path / "disk"
    mount.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", mount], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("a small file system can be mounted by root only")
    try:
        yield mount
    finally:
        subprocess.run(["umount", mount], check=True)


@contextmanager
def limited_file_size(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        yield tmp_path
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def read_only_disk(tmp_path):
    with small_disk(tmp_path) as mount:
        write_checkpoint(mount / "step-00000003", make_state())
        subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
        yield mount


@contextmanager
def no_permission(tmp_path):
    """A folder that only its owner may write; root, which ignores permissions, becomes another user."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder / "step-00000003", make_state())
        folder.chmod(0o555)
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            if is_root:
                os.seteuid(0)
            folder.chmod(0o755)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (small_disk, "No space left on device"),
        (limited_file_size, "File too large"),
        (read_only_disk, "Read-only file system"),
        (no_permission, "Permission denied"),
    ],
)
def test_errors_of_the_operating_system_are_reported_in_its_words(tmp_path, place, words):
    with place(tmp_path) as parent:
        if not list(parent.glob("step-*")):
            write_checkpoint(parent / "step-00000003", make_state())
        with pytest.raises(OSError, match=words):
            write_checkpoint(parent / "step-00000004", large_state())
        assert [path.name for path in parent.iterdir()] == ["step-00000003"]
        assert read_checkpoint(parent / "step-00000003")["progress"]["step"] == 3


def test_a_folder_that_vanishes_while_it_is_written(folder, tmp_path, monkeypatch):
    whole = torch.save

    def save(state, file):
        whole(state, file)
        folder.parent.rename(tmp_path.with_name("elsewhere"))

    monkeypatch.setattr(checkpoint_file.torch, "save", save)
    with pytest.raises(FileNotFoundError):
        write_checkpoint(folder.with_name("step-00000004"), make_state(4))
    assert not folder.parent.exists()
    assert read_checkpoint(tmp_path.with_name("elsewhere") / folder.name)["progress"]["step"] == 3
    shutil.rmtree(tmp_path.with_name("elsewhere"))


def test_a_checkpoint_of_the_same_step_is_replaced(folder):
    state = make_state()
    state["model"]["w"] += 1
    write_checkpoint(folder, state)
    assert torch.equal(read_checkpoint(folder)["model"]["w"], torch.arange(6.0).reshape(2, 3) + 1)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
