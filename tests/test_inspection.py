"""`topoflow inspect`: statistics and differences equal numpy's; any damage ends with status 3 and one line."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from topoflow import cli
from topoflow.checkpoint.directory import CheckpointDirectory
from topoflow.checkpoint.file import FORMAT, read_checkpoint, write_checkpoint
from topoflow.checkpoint.state import capture_state
from topoflow.config import OptimConfig
from topoflow.config_io import config_from_dict, config_to_dict
from topoflow.optim import build_optimizer, build_scheduler
from topoflow.tools.inspect import compare

ROOT = Path(__file__).parents[1]
LONG_NAME = "blocks.10.attn.rel_pos_bias.bias_table"


def make_state(steps=3):
    """Return the state of a small model after a few updates by torch."""
    torch.manual_seed(0)
    model = nn.Module()
    for name in ("blocks", "token_embeds", "head", "norm"):
        model.add_module(name, nn.Linear(3, 2))
    model.register_buffer("scale", torch.tensor(7.0))
    optimizer = build_optimizer(model, OptimConfig())
    scheduler = build_scheduler(optimizer, OptimConfig(), steps_per_epoch=5, total_steps=20)
    for _ in range(steps):
        sum(parameter.square().sum() for parameter in model.parameters()).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    progress = {"step": steps, "updates": steps, "epoch": 0, "samples_in_epoch": 48, "validation_loss": 0.75}
    return {
        "format": FORMAT,
        **copy.deepcopy(capture_state(model, optimizer, scheduler)),
        "progress": {**progress, "best_validation_loss": 0.5, "best_step": 2, "validations_since_best": 1},
        "random": {"seed": 5},
        "data": {"fingerprint": "ab" * 32, "normalization": {"pm25": [50.0, 20.0]}},
        "config": config_to_dict(config_from_dict({"data": {"path": "x", "train": [2018]}, "train": {"max_steps": 9}})),
        "software": {"torch": "2.13.0", "world_size": 2, "device": "x86_64 cpu"},
        "certificate": {"tensors": {f"t{n}": "0" * 16 for n in range(40)}, "probe": {"loss_hex": "0x1.8p-1"}},
    }


@pytest.fixture
def folder(tmp_path):
    write_checkpoint(tmp_path / "step-00000003", make_state())
    return tmp_path / "step-00000003"


@pytest.fixture
def run_inspect(capsys):
    """Return a function that runs the command and returns status, stdout and stderr."""

    def run(*arguments):
        status = cli.main(["inspect", *map(str, arguments)])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return status, printed.out, printed.err

    return run


def changed(folder, name, change):
    """Write a checkpoint next to `folder` whose state was changed."""
    state = make_state()
    change(state)
    write_checkpoint(folder.with_name(name), state)
    return folder.with_name(name)


def test_an_intact_checkpoint_is_described(folder, run_inspect):
    state = make_state()
    for path in (folder, folder / "state.pt"):
        status, out, _ = run_inspect(path)
        assert status == 0
    for words in (
        "whole",
        "step 3 (3 updates)",
        "loss 0.75, best 0.5 at step 2",
        "torch 2.13.0",
        "world_size 2",
        "seed 5",
    ):
        assert words in out
    for words in ("population", "max_steps=9", "ab" * 32, "pm25 [50.0, 20.0]", "and 39 more", "0x1.8p-1", "steps 3"):
        assert words in out
    rates = {line.split()[0]: line.split()[3] for line in out.splitlines() if line.startswith(("vit_blocks", "head "))}
    expected = {group["name"]: f"{group['lr']:.6g}" for group in state["optimizer"]["groups"]}
    assert rates == {name: expected[name] for name in ("vit_blocks", "head")}


def test_statistics_of_tensors_equal_numpys(folder, run_inspect):
    state = make_state()
    report = json.loads(run_inspect(folder, "--json")[1])
    assert {entry["name"] for entry in report["parameters"]} == {n for n in state["model"] if n != "scale"}
    for entry in report["parameters"]:
        values, moments = state["model"][entry["name"]].numpy(), state["optimizer"]["state"][entry["name"]]
        assert entry["shape"] == list(values.shape)
        assert (entry["dtype"], entry["elements"], entry["step"]) == ("float32", values.size, 3)
        assert entry["mean"] == pytest.approx(values.mean(dtype=np.float64))
        assert entry["std"] == pytest.approx(values.std(dtype=np.float64))
        for key in ("exp_avg", "exp_avg_sq"):
            assert entry[f"{key}_norm"] == pytest.approx(np.linalg.norm(moments[key].numpy().astype(np.float64)))
    assert [(entry["name"], entry["mean"]) for entry in report["buffers"]] == [("scale", 7.0)]


def test_output_is_ascii_of_at_most_120_columns(folder, run_inspect):
    def with_long_names(state):
        state["model"][LONG_NAME] = torch.zeros(8192, 768, dtype=torch.bfloat16)
        state["optimizer"]["groups"][0]["params"].append(LONG_NAME)
        state["model"]["norm.weight"] = torch.full((2, 3), -1e-30)

    other = changed(folder, "long", with_long_names)
    for paths in ([folder], [other], [folder.parent], [folder, other]):
        lines = run_inspect(*paths)[1].splitlines()
        assert max(len(line.replace(str(folder.parent), "")) for line in lines) <= 120
        assert all(line.isascii() and line == line.rstrip() for line in lines)


def test_elements_that_are_not_finite_are_counted(folder, run_inspect):
    def spoil(state):
        state["model"]["head.weight"][0, 1] = torch.nan
        state["model"]["head.weight"][1, 1] = torch.inf

    other = changed(folder, "spoiled", spoil)
    assert "not finite: 2 of 6 elements of head.weight" in run_inspect(other)[1]
    status, out, _ = run_inspect(other, "--json")
    assert status == 0
    [entry] = [e for e in json.loads(out)["parameters"] if e["name"] == "head.weight"]
    assert (entry["mean"], entry["not_finite"]) == (None, 2)


def test_a_parameter_without_moments(folder, run_inspect):
    other = changed(folder, "fresh", lambda state: state["optimizer"]["state"].pop("head.bias"))
    [entry] = [e for e in json.loads(run_inspect(other, "--json")[1])["parameters"] if e["name"] == "head.bias"]
    assert (entry["step"], entry["exp_avg_norm"]) == (None, None)
    assert run_inspect(other)[0] == 0


def cut(path, size=100):
    path.write_bytes(path.read_bytes()[:size])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [cut, flip, replace_by_folder, lambda p: p.unlink(), lambda p: p.write_bytes(b"")])
@pytest.mark.parametrize("name", ["state.pt", "manifest.json"])
def test_damage_is_named_and_readable_facts_are_shown(folder, run_inspect, name, damage):
    damage(folder / name)
    size = f"{(folder / name).stat().st_size:,} bytes" if (folder / name).is_file() else "missing or not a file"
    status, out, err = run_inspect(folder)
    assert status == 3
    assert len(err.strip().splitlines()) == 1
    assert name in err or "Is a directory" in err
    assert out.splitlines()[1].startswith("damaged")
    [line] = [line for line in out.splitlines() if line.startswith(name)]
    assert line.endswith(size)
    known = "step 3" in out and "tensors 33" in out
    assert known == (name == "state.pt")


def test_a_state_with_unexpected_contents_is_damaged(folder, run_inspect):
    for number, change in enumerate([
        lambda state: state.pop("optimizer"),
        lambda state: state.update(optimizer=[1, 2]),
        lambda state: state["optimizer"]["groups"][0].pop("params"),
        lambda state: state["optimizer"]["groups"][0].update(params=["no such name"]),
        lambda state: state.update(progress={"step": 3, "validation_loss": "low"}),
        lambda state: state.update(config=7),
        lambda state: state["model"].update({"head.bias": "text"}),
    ]):  # fmt: skip
        other = changed(folder, f"odd-{number}", change)
        status, _, err = run_inspect(other)
        assert status == 3
        assert len(err.strip().splitlines()) == 1
        assert "unexpected contents" in err
        for pair in ([other, folder], [folder, other]):
            assert run_inspect(*pair)[0] in (0, 3)  # the contents may still be equal


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_code_in_a_checkpoint_never_runs(folder, run_inspect):
    trap = folder.with_name("trap")
    other = changed(folder, "evil", lambda state: state.update(extra=Malicious(str(trap))))
    for arguments in ([other], [other, folder]):
        status, _, err = run_inspect(*arguments)
        assert status == 3
        assert "more than tensors and plain values" in err
    assert not trap.exists()


def test_paths_without_a_checkpoint_are_refused(tmp_path, folder, run_inspect):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    for path, expected, word in (
        ("nowhere", 2, "not found"),
        ("empty", 2, "no checkpoint"),
        ("notes.txt", 3, "a file"),
        ("x" * 300, 2, "not found"),
    ):
        for arguments in ([tmp_path / path], [folder, tmp_path / path]):
            status, out, err = run_inspect(*arguments)
            assert (status, out) == (expected, "")
            assert word in err


@pytest.fixture
def run_dir(tmp_path):
    directory = CheckpointDirectory(tmp_path / "run" / "checkpoints")
    directory.path.mkdir(parents=True)
    for step in (1, 2, 3):
        directory.save(make_state(step), is_best=step == 2)
    return tmp_path / "run"


def rows_of(out):
    return {line.split()[0]: line for line in out.splitlines() if line.startswith("step-")}


def test_a_run_lists_its_checkpoints_and_shows_last_and_best(run_dir, run_inspect):
    for path in (run_dir, run_dir / "checkpoints"):
        status, out, _ = run_inspect(path)
        assert status == 0
        rows = rows_of(out)
        assert list(rows) == ["step-00000001", "step-00000002", "step-00000003"]
        assert rows["step-00000002"].split()[-2:] == ["whole", "best"]
        assert rows["step-00000003"].split()[-2:] == ["whole", "last"]
        shown = [line.split("/")[-1] for line in out.splitlines() if line.startswith("checkpoint /")]
        assert shown == ["step-00000002", "step-00000003"]


def test_a_run_with_damage(run_dir, run_inspect):
    flip(run_dir / "checkpoints" / "step-00000001" / "state.pt")
    flip(run_dir / "checkpoints" / "best")
    status, out, err = run_inspect(run_dir)
    assert status == 3
    assert "DAMAGED" in rows_of(out)["step-00000001"]
    assert "whole" in rows_of(out)["step-00000002"]
    assert "checkpoint pointer" in err
    assert err.rstrip().endswith(" and 1 more")
    assert sum(line.startswith("damaged: ") for line in out.splitlines()) == 2


@pytest.mark.parametrize("gone", [1, 2])
def test_a_checkpoint_that_a_running_job_deletes_meanwhile_is_left_out(run_dir, run_inspect, monkeypatch, gone):
    folder = run_dir / "checkpoints" / f"step-0000000{gone}"

    def read_late(path):
        if path == folder:
            shutil.rmtree(path)
        return read_checkpoint(path)

    def read_half(path):
        if path == folder:
            for file in path.iterdir():
                file.unlink()
            try:
                return read_checkpoint(path)
            finally:
                path.rmdir()
        return read_checkpoint(path)

    monkeypatch.setattr("topoflow.tools.inspect.read_checkpoint", read_late if gone == 1 else read_half)
    status, out, _ = run_inspect(run_dir)
    assert status == 0
    assert list(rows_of(out)) == [f"step-0000000{step}" for step in (1, 2, 3) if step != gone]


def test_two_checkpoints_with_the_same_bits(folder, run_inspect):
    other = changed(folder, "other", lambda state: None)
    status, out, _ = run_inspect(folder, other)
    assert status == 0
    assert out.splitlines()[-1] == "all 33 tensors are bit-identical"


def test_one_ulp_in_one_element_is_found_and_measured(folder, run_inspect):
    def nudge(state):
        moment = state["optimizer"]["state"]["norm.weight"]["exp_avg_sq"]
        moment[1, 2] = torch.nextafter(moment[1, 2], torch.tensor(1.0))

    other = changed(folder, "other", nudge)
    a, b = (make_state()["optimizer"]["state"]["norm.weight"]["exp_avg_sq"].double().numpy() for _ in range(2))
    b[1, 2] = np.nextafter(np.float32(b[1, 2]), np.float32(1))
    status, out, _ = run_inspect(folder, other)
    assert status == 0
    relative = np.abs(a - b).max() / np.abs(b).max()
    assert out.splitlines()[-1] == (
        f"1 of 33 tensors differ, largest relative difference {relative:.3g} in exp_avg_sq of norm.weight"
    )
    [difference] = compare(folder, other).report["differing"]
    assert difference["absolute"] == np.abs(a - b).max()


def test_bits_that_differ_where_values_do_not(folder):
    zero = changed(folder, "zero", lambda state: state["model"]["head.bias"].zero_())
    minus = changed(folder, "minus", lambda state: state["model"]["head.bias"].fill_(-0.0))
    report = compare(zero, minus).report
    assert report["differing"] == [{"name": "head.bias", "absolute": 0.0, "relative": 0.0}]
    nan = changed(folder, "nan", lambda state: state["model"]["head.bias"].fill_(torch.nan))
    assert compare(nan, nan).report["verdict"].startswith("all ")
    assert compare(zero, nan).report["differing"][0]["relative"] == np.inf
    assert compare(zero, nan).report["verdict"].endswith("inf in head.bias")


def test_all_other_differences_are_named(folder, run_inspect):
    def change(state):
        state["model"]["extra"] = state["model"].pop("scale")
        state["model"]["head.weight"] = torch.zeros(2, 4)
        state["model"]["head.bias"] = torch.zeros(2, dtype=torch.float64)
        state["optimizer"]["groups"][1]["lr"] *= 2
        state["optimizer"]["groups"][2]["params"].remove("head.bias")
        state["optimizer"]["groups"][3]["params"].append("head.bias")
        state["scheduler"]["steps"] = 9
        state["progress"]["step"] = 9
        state["config"]["train"]["max_steps"] = 10
        state["software"]["torch"] = "2.14.0"

    other = changed(folder, "other", change)
    out = run_inspect(folder, other)[1]
    for words in (
        "only in a            scale", "only in b            extra",
        "head.weight: float32 [2, 3] | float32 [2, 4]", "head.bias: float32 [2] | float64 [2]",
        "wind_embedding.lr: ", "group of.head.bias: head | others", "steps: 3 | 9", "step: 3 | 9",
        "train.max_steps: 9 | 10", "torch: 2.13.0 | 2.14.0", "4 of 34 tensors differ",
    ):  # fmt: skip
        assert words in out, words


def test_equal_tensors_with_another_setting(folder):
    other = changed(folder, "other", lambda state: state["optimizer"]["groups"][0].update(lr=1.0))
    assert compare(folder, other).report["verdict"] == "all 33 tensors are bit-identical; groups differ"


def test_a_compared_run_means_its_last_checkpoint(run_dir, run_inspect):
    out = run_inspect(run_dir, run_dir / "checkpoints" / "step-00000003")[1]
    assert "bit-identical" in out.splitlines()[-1]


def test_a_damaged_checkpoint_is_described_instead_of_compared(folder, run_inspect):
    other = changed(folder, "other", lambda state: None)
    cut(other / "state.pt")
    for pair in ((folder, other), (other, folder)):
        status, out, err = run_inspect(*pair)
        assert status == 3
        assert out.startswith(f"checkpoint {other}\ndamaged")
        assert str(other) in err


def test_a_closed_pipe_ends_the_output_without_error(folder):
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "topoflow", "inspect", str(folder)]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, "")
