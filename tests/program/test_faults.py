"""The fault campaign: each fault of a resume is detected before the next optimizer step, and named."""

import json
import shutil
from dataclasses import dataclass

import faults
import numpy as np
import pytest
import torch

from tests.support.prepared import prepare_world
from topoflow.certificate import Certifier
from topoflow.checkpoint.file import read_checkpoint, write_checkpoint
from topoflow.checkpoint.fingerprint import seal
from topoflow.data.prepared.manifest import read_manifest
from topoflow.model.topoflow import TopoFlow

SAVED_STEP = 6


@pytest.fixture(scope="module")
def saved(tmp_path_factory, make_program):
    """A run that stopped after six steps."""
    program = make_program(tmp_path_factory.mktemp("saved"))
    done = program.train(f"train.max_steps={SAVED_STEP}")
    assert done.returncode == 0, done.stderr
    return program


@dataclass
class Ended:
    returncode: int
    others: list[int]
    stderr: str


@pytest.fixture
def resume(saved, program, forked):
    """A function that resumes a copy of that run with a fault; returns how rank 0 ended and all logs."""

    def start(fault, *overrides, processes=1, before=lambda: None):
        shutil.copytree(saved.folder / "run", program.folder / "run")
        before()
        options = [f"run.dir={program.folder / 'run'}", "distributed.verify_every_steps=1", "train.max_steps=10"]
        arguments = [str(program.config), *options, *overrides]
        ending = forked.run(arguments, processes, prepare=getattr(faults, fault))
        return Ended(ending.statuses[0], ending.statuses[1:], ending.output)

    return start


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_stopped(program, done, status, words, steps=SAVED_STEP):
    record = program.exit_record()
    assert (done.returncode, record["status"]) == (status, status), (record, done.stderr)
    for word in words:
        assert word in record["reason"]
    assert record["reason"] in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(program.losses()) == list(range(1, steps + 1))


ON_ONE_PROCESS = {
    "two_moments_of_one_shape_swapped": [
        "exp_avg_sq of blocks.0.attn.qkv.weight",
        "expected float32[48, 16]",
    ],
    "moments_zeroed": ["exp_avg of "],
    "steps_of_adam_restarted": ["step of "],
    "rates_reset": ["learning rate of group ", ", expected "],
    "scheduler_not_restored": ["scheduler position is 0, expected 6"],
    "best_loss_forgotten": ["progress.best_validation_loss is None, expected "],
    "another_activation": ["probe loss ", "allowed 1e-05 because of sources of the network "],
    "stale_buffer": ["blocks.0.attn.H_scale"],
    "wrong_normalization": ["normalization fingerprint"],
    "order_of_another_seed": ["next sample 1 is 2018-10-", "expected 2018-10-"],
}
ON_TWO_PROCESSES = {
    "weights_on_rank_0_only": ["rank 1, proof of the resume", "var_embed is float32", "expected float32"],
    "moments_on_rank_0_only": ["rank 1, proof of the resume", "step of ", " is absent, expected "],
    "one_ulp_in_one_weight_of_rank_1": ["rank 1, proof of the resume", "head.0.weight is float32"],
}


@pytest.mark.parametrize("fault", ON_ONE_PROCESS)
def test_a_wrong_resume_does_not_start(fault, resume, program):
    assert_stopped(program, resume(fault), 3, ON_ONE_PROCESS[fault])


@pytest.mark.parametrize("fault", ON_TWO_PROCESSES)
def test_a_wrong_resume_on_one_rank_does_not_start(fault, resume, program):
    assert_stopped(program, resume(fault, processes=2), 3, ON_TWO_PROCESSES[fault])


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        ("one_ulp_in_the_run_on_rank_1", "pos_embed"),
        ("one_ulp_in_a_moment_in_the_run_on_rank_1", "exp_avg_sq of head.0.bias"),
    ],
)
def test_drift_on_one_rank_stops_the_run_before_the_next_step(fault, name, resume, program):
    words = [f"ranks disagree after step {faults.STEP_OF_DRIFT}", f"  {name}\n", " on rank(s) 1 ("]
    assert_stopped(program, resume(fault, processes=2), 5, words, steps=faults.STEP_OF_DRIFT)


def test_another_data_set_is_refused_by_its_fingerprint_and_by_its_contents(resume, program, tmp_path):
    other = tmp_path / "other"
    prepare_world(other, days=10, seed=1)
    done = resume("another_data_set_unnoticed", f"data.path={other}")
    assert_stopped(program, done, 3, ["contents of next sample 2018-10-", ", expected "])
    again = program.train(f"data.path={other}")
    assert again.returncode == 3
    assert "data.fingerprint" in again.stderr


def test_changed_values_outside_the_hashed_hours_are_found(resume, program, world, tmp_path):
    """PM2.5 is three times as high on some days of training; the first samples and the hashed hours are unchanged."""
    other = tmp_path / "other"
    shutil.copytree(world, other)
    fields = np.load(other / "fields_2018.npy", mmap_mode="r+")
    names = [variable.name for variable in read_manifest(other).variables]
    fields[30:115, names.index("pm25")] *= 3
    fields.flush()
    done = resume("nothing", f"data.path={other}")
    assert_stopped(program, done, 3, ["contents of next sample 2018-10-"])


def test_only_what_an_allowed_change_affects_is_not_compared(resume, program):
    """data.validation does not affect the order of samples, the normalization or the probe."""
    shorter = ("data.validation=[[2018-10-07, 2018-10-07]]", "checkpoint.allow_changed=[data.validation]")
    assert_stopped(program, resume("order_of_another_seed", *shorter), 3, ["next sample 1 is"])


def test_rates_from_the_config_are_proved_too(resume, program):
    other = ("optim.eta_min=1e-5", "checkpoint.allow_changed=[optim.eta_min]")
    assert_stopped(program, resume("rates_reset", *other), 3, ["learning rate of group "])


def test_a_checkpoint_whose_moments_never_had_an_update_is_refused(resume, program):
    """Like an import from a file without moments: consistent, but useless to the optimizer."""

    def strip_moments():
        folder = program.folder / "run" / "checkpoints" / f"step-{SAVED_STEP:08d}"
        state = read_checkpoint(folder)
        for entry in state["optimizer"]["state"].values():
            for tensor in entry.values():
                tensor.zero_()
        seal(state)
        write_checkpoint(folder, state)

    done = resume("nothing", before=strip_moments)
    expected = f"the weights have had {SAVED_STEP} updates but the optimizer's moments have had none"
    assert_stopped(program, done, 3, [expected])


def test_a_refused_resume_changes_nothing_but_its_exit_record_and_log(resume, saved, program):
    before = contents(saved.folder / "run")
    assert resume("moments_zeroed").returncode == 3
    after = contents(program.folder / "run")
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed <= {"exit.json", "train.log", ".lease"}


def test_without_a_fault_the_same_command_resumes(resume, program):
    done = resume("nothing")
    assert done.returncode == 0, done.stderr
    proof = json.loads((program.folder / "run" / "resume.json").read_text())["proof"]
    assert proof["probe_same_bits"] is True
    assert (proof["tensors"], proof["samples"]) == (193, 32)


def test_everything_is_in_place_before_the_first_forward_pass(saved, program, monkeypatch):
    """The first call of a forward hook sees the restored weights, moments, rates and position."""
    shutil.copytree(saved.folder / "run", program.folder / "run")
    state = saved.state(step=SAVED_STEP)
    seen, held = [], {}
    build, forward = faults.train.build_state, TopoFlow.forward

    def build_and_hold(*arguments):
        held["state"] = build(*arguments)
        return held["state"]

    def look(self, *arguments):
        if not seen:
            run = held["state"]
            names = dict(self.named_parameters())
            seen.append(all(torch.equal(names[name], state["model"][name]) for name in names))
            moments = state["optimizer"]["state"]
            seen.append(
                all(
                    torch.equal(run.optimizer.state[names[name]][key], moments[name][key])
                    for name in names
                    for key in ("step", "exp_avg", "exp_avg_sq")
                )
            )
            seen.append(
                [g["lr"] for g in run.optimizer.param_groups] == [g["lr"] for g in state["optimizer"]["groups"]]
            )
            seen.append((run.scheduler.last_epoch, run.progress.step) == (SAVED_STEP, SAVED_STEP))
        return forward(self, *arguments)

    monkeypatch.setattr(faults.train, "build_state", build_and_hold)
    monkeypatch.setattr(TopoFlow, "forward", look)
    assert program.train("train.max_steps=7").returncode == 0
    assert seen == [True] * 4


def test_ranks_other_than_0_need_no_file(resume, program):
    """Only rank 0 opens the checkpoint; the other ranks cannot access the folder at all."""
    done = resume("run_directory_out_of_reach", processes=2)
    assert done.returncode == 0, done.stderr
    assert sorted(program.losses()) == list(range(1, 11))


TERRAIN = ("blocks.0.attn.elevation_alpha", "blocks.0.attn.H_scale")


def test_ninety_one_parameters_into_a_model_with_terrain(program):
    """The original use case: names that the checkpoint lacks start fresh if they are listed."""
    large = ("model.depth=6", "model.embed_dim=16", "data.availability=false", "model.wind=none")
    assert program.train(*large, "model.terrain=none", "train.max_steps=2").returncode == 0
    before = contents(program.folder / "run" / "checkpoints")
    refused = program.train(*large, "train.max_steps=3")
    assert refused.returncode == 3
    assert "model.terrain" in refused.stderr
    refused = program.train(*large, "train.max_steps=3", "checkpoint.allow_changed=[model.terrain]")
    assert refused.returncode == 3
    assert all(name in refused.stderr for name in TERRAIN)
    assert contents(program.folder / "run" / "checkpoints") == before

    done = program.train(*large, "train.max_steps=3", f"checkpoint.allow_new=[{', '.join(TERRAIN)}]")
    assert done.returncode == 0, done.stderr
    report = json.loads((program.folder / "run" / "resume.json").read_text())
    assert (report["weights"], report["weights_expected"], report["moments"], report["moments_expected"]) == (91,) * 4
    assert sorted(report["new"]) == sorted(TERRAIN)
    assert "weights 91/91, buffers 0/0, moments 91/91" in done.stderr
    assert "because of new names" in report["proof"]["judged_by"]
    steps = {name: entry["step"].item() for name, entry in program.state(step=3)["optimizer"]["state"].items()}
    assert steps.pop(TERRAIN[0]) == 1
    assert set(steps.values()) == {3}


@pytest.mark.parametrize(("factor", "status"), [(1.04, 0), (0.96, 0), (1.06, 3), (0.94, 3)])
def test_with_new_names_the_probe_may_differ_by_five_percent(factor, status, program, monkeypatch):
    assert program.train("model.terrain=none", "train.max_steps=2").returncode == 0
    probe = Certifier.probe
    monkeypatch.setattr(Certifier, "probe", lambda self: (factor * probe(self)[0], []))
    done = program.train(f"checkpoint.allow_new=[{', '.join(TERRAIN)}]", "train.max_steps=3")
    assert done.returncode == status, done.stderr
    assert ("the resume is not proved: probe loss " in done.stderr) == (status == 3)


@pytest.mark.parametrize(("factor", "status"), [(1.000005, 0), (1.00002, 3)])
def test_on_another_machine_the_probe_may_differ_by_the_tolerance(factor, status, saved, program, monkeypatch):
    shutil.copytree(saved.folder / "run", program.folder / "run")
    probe, conditions = Certifier.probe, Certifier._conditions
    monkeypatch.setattr(Certifier, "probe", lambda self: (factor * probe(self)[0], []))
    assert program.train("train.max_steps=7").returncode == 3  # not if software, device and threads are the same
    monkeypatch.setattr(Certifier, "_conditions", lambda self: {**conditions(self), "device": "another"})
    done = program.train("train.max_steps=7")
    assert done.returncode == status, done.stderr
    assert "-> another" in done.stderr


def test_a_damaged_checkpoint_ends_both_ranks_with_the_same_message(resume, saved, program):
    def damage():
        state = program.folder / "run" / "checkpoints" / f"step-{SAVED_STEP:08d}" / "state.pt"
        content = bytearray(state.read_bytes())
        content[len(content) // 2] ^= 1
        state.write_bytes(content)

    done = resume("nothing", processes=2, before=damage)
    assert_stopped(program, done, 3, ["none of 1 checkpoints is intact"])
    assert done.others == [3]
