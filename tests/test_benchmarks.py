"""The benchmarks of speed: they run, what they compare with is the published program, and their arithmetic is right."""

import importlib.util
import os
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import compare_trainers, model_step, run
from benchmarks.embedding import WAYS, Embedding
from benchmarks.flops import forward_flops, step_flops
from benchmarks.fresh import alternate, run_fresh
from benchmarks.loop import WARM_UP_STEPS, AlternatingBlocks, WaitClock
from benchmarks.published import PublishedNetwork, PublishedStep
from benchmarks.sizes import INPUTS, SIZES, TARGETS, Size, build_sized_model, synthetic_batch
from benchmarks.tables import print_table, ratio, significant, spread
from benchmarks.terminal import run_in_terminal
from benchmarks.trainer_loops import StepClock
from benchmarks.training_data import run_config
from tests.lightning.restated import VARIABLES, Network
from topoflow.trainer import Trainer

ROOT = Path(__file__).parents[1]
# all but `start`, whose tables tests/test_start.py prints
MODULES = [name for name in run.BENCHMARKS if name != "start"]
SMALL = Size("small", (8, 12), 16, 3, 2, 3)


def build_pair():
    """The published network of the benchmark and another restatement of it, in float64, with the same weights."""
    assert VARIABLES == INPUTS
    torch.manual_seed(0)
    reference = Network(True, SMALL.grid, width=16, depth=3, decoder_depth=2, heads=2).double()
    network = PublishedNetwork(SMALL).double()
    network.load_state_dict(reference.state_dict())  # strict: the same names and shapes
    return network, reference


def same_terrain_batch():
    """A batch whose samples have one terrain, as that restatement takes it, in kilometres: alpha then damps some."""
    batch = synthetic_batch(SMALL.grid, SMALL.batch_size, seed=1)
    channel = INPUTS.index("elevation")
    batch["x"][:, channel] = batch["x"][0, channel] * 10
    return {name: tensor if tensor.dtype == torch.bool else tensor.double() for name, tensor in batch.items()}


def test_the_published_network_is_the_published_function():
    network, reference = build_pair()
    batch = same_terrain_batch()
    ours = network(batch["x"], batch["lead_time_hours"])
    theirs = reference(batch["x"], batch["lead_time_hours"])
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    seed = torch.randn_like(ours)
    names, parameters = zip(*reference.named_parameters(), strict=True)
    gradients = torch.autograd.grad(ours, list(network.parameters()), seed)
    expected = dict(zip(names, torch.autograd.grad(theirs, parameters, seed), strict=True))
    for (name, _), gradient in zip(network.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, expected[name], rtol=1e-8, atol=1e-11)
    assert expected["blocks.0.attn.alpha"].abs() > 1e-8
    assert expected["blocks.0.attn.rel_pos_bias.bias_table"].abs().max() > 1e-3


def test_without_its_priors_the_published_network_has_neither_relative_position_nor_token_norm():
    whole, without = dict(PublishedNetwork(SMALL).named_parameters()), PublishedNetwork(SMALL, with_priors=False)
    missing = whole.keys() - dict(without.named_parameters()).keys()
    assert missing == {"blocks.0.attn.rel_pos_bias.bias_table", "patch_embed.norm.weight", "patch_embed.norm.bias"}
    batch = same_terrain_batch()
    assert without.double()(batch["x"], batch["lead_time_hours"]).isfinite().all()


def test_the_published_step_descends_the_error_of_the_targets():
    step, batch = PublishedStep(SMALL), synthetic_batch(SMALL.grid, SMALL.batch_size, seed=1)
    seen = {}
    register = step.optimizer.register_step_pre_hook
    register(lambda *_: seen.update({n: p.grad.clone() for n, p in step.network.named_parameters()}))
    rows = [INPUTS.index(name) for name in TARGETS]
    loss = torch.nn.functional.mse_loss(step.network(batch["x"], batch["lead_time_hours"])[:, rows], batch["y"])
    names, parameters = zip(*step.network.named_parameters(), strict=True)
    expected = torch.autograd.grad(loss, parameters)
    before = [parameter.detach().clone() for parameter in parameters]
    step(batch)
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(seen[name], gradient, rtol=1e-4, atol=1e-7)
    assert all(parameter.grad is None for parameter in parameters)
    # AdamW's first step moves each weight by the rate, whatever the size of its gradient
    moved = torch.cat([(old - new.detach()).abs().flatten() for old, new in zip(before, parameters, strict=True)])
    assert moved.max() <= 1.1e-4
    assert (moved > 0.9e-4).float().mean() > 0.5


def test_all_ways_from_fields_to_tokens_are_one_function():
    embedding, x = Embedding(SMALL), synthetic_batch(SMALL.grid, SMALL.batch_size, seed=1)["x"]
    results = {name: way(embedding, x) for name, way in WAYS.items()}
    assert results["tokens"].std() > 0.01
    for name, tokens in results.items():
        torch.testing.assert_close(tokens, results["tokens"], rtol=1e-4, atol=1e-5, msg=name)


def test_operations_of_a_step_are_what_torch_counts():
    size = Size("counted", (16, 32), 128, 3, 4, 2)
    # terrain adds no multiplication of matrices; in float64 all others are torch's own, and the attention that is
    # written out is the one whose operations it counts on CPU
    model = build_sized_model(size, terrain="none").double()
    batch = {name: t.double() for name, t in synthetic_batch(size.grid, size.batch_size, seed=1).items()}
    elevation_m = torch.zeros(size.grid, dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        output = model(batch["x"], batch["lead_time_hours"], elevation_m, batch["wind_ms"])
    assert forward_flops(size) == pytest.approx(forward.get_total_flops(), rel=0.01)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as backward:
        output.sum().backward()
    # no gradient goes into the fields, so the first layer's backward pass is a little less than twice its forward
    both = forward.get_total_flops() + backward.get_total_flops()
    assert step_flops(size) == pytest.approx(both, rel=0.02)


def test_a_figure_has_its_spread_and_a_ratio_its_quartiles():
    assert spread([3.0, 1.0, 2.0]) == "2.00 (1.00 - 3.00)"
    assert spread([0.25], scale=1e3) == "250"
    assert [significant(value) for value in (0, 1234.4, 12.34, 0.01234)] == ["0", "1234", "12.3", "0.0123"]
    over, under = [2.0, 4.0, 9.0, 8.0, 5.0], [1.0, 2.0, 3.0, 2.0, 2.5]
    low, high = np.quantile([2.0, 2.0, 3.0, 4.0, 2.0], [0.25, 0.75])
    assert ratio(over, under) == f"2.50 ({low:.2f} - {high:.2f})"  # 5 over 2
    assert ratio([1.0], [0.0]) == ""


def test_a_table_is_markdown(capsys):
    print_table(["step", "s"], [["ours", "1.5"], ["published", "12"]])
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["| step      |   s |", "|-----------|----:|", "| ours      | 1.5 |", "| published |  12 |", ""]


def test_measurements_take_turns_and_every_other_round_is_reversed():
    order = []
    measured, killed = alternate(["a", "b", "c"], 3, lambda name: order.append(name) or len(order))
    assert "".join(order) == "abccbaabc"
    assert measured == {"a": [1, 6, 7], "b": [2, 5, 8], "c": [3, 4, 9]}
    assert killed == {}


def test_a_killed_measurement_is_told_and_not_repeated():
    calls = {"fine": (os.getpid,), "too large": (signal.raise_signal, signal.SIGKILL)}
    started = []
    measured, killed = alternate(list(calls), 2, lambda name: started.append(name) or run_fresh(*calls[name]))
    assert started == ["fine", "too large", "fine"]
    assert list(measured) == ["fine"]
    assert len({os.getpid(), *measured["fine"]}) == 3  # each in a process of its own
    assert "killed" in killed["too large"]


def test_peak_memory_is_what_was_held_at_once_and_let_go():
    code = """
import numpy as np
from benchmarks.fresh import ResidentMemory
memory = ResidentMemory()
for _ in range(2):
    held = np.ones(8_000_000)  # 64 MB, touched
    del held
print(memory.peak_bytes())
"""
    # of its own, because here something may be freed in the meantime that earlier tests have left
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 60e6 < int(done.stdout) < 80e6


def test_a_step_is_timed_from_its_end_to_the_end_of_a_later_one(monkeypatch):
    times = iter([10.0, 11.0, 13.0, 16.0])
    monkeypatch.setattr("benchmarks.trainer_loops.time.perf_counter", lambda: next(times))
    clock, optimizer = StepClock(), torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    for _ in range(4):
        optimizer.step()
    assert clock.seconds_per_step(2, 4) == (16.0 - 11.0) / 2
    with pytest.raises(RuntimeError, match="4 optimizer steps seen: expected 5"):
        clock.seconds_per_step(2, 5)
    clock.hook.remove()


def test_bare_blocks_stand_between_blocks_of_fit_and_outside_their_time(monkeypatch):
    now, bare_steps = [0.0], []
    monkeypatch.setattr("benchmarks.loop.time.perf_counter", lambda: now[0])
    bare_optimizer, optimizer = (torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1) for _ in range(2))

    def bare():
        bare_steps.append(now[0])
        bare_optimizer.step()  # seen by the hook, too
        now[0] += 100

    bare.parts = SimpleNamespace(optimizer=bare_optimizer)
    clock = SimpleNamespace(seconds=0.0)
    blocks = AlternatingBlocks(bare, 2, clock)
    for number in range(WARM_UP_STEPS + 5):  # the fifth begins a block that is not complete
        now[0] += 1 if number < WARM_UP_STEPS + 2 else 3
        clock.seconds += 0.25 if number < WARM_UP_STEPS + 2 else 0.5
        optimizer.step()
    blocks.hook.remove()
    assert blocks.fit_seconds == [1, 3]
    assert blocks.wait_seconds == [0.25, 0.5]
    assert blocks.bare_seconds == [100, 100]
    assert len(bare_steps) == 2 + 2 + 2  # those after the warm-up are not timed


def test_the_wait_of_a_step_is_that_for_its_batches(monkeypatch):
    now = [0.0]

    def two_steps(trainer):
        for seconds in (1, 2):
            now[0] += seconds
            yield [seconds]

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr(Trainer, "_steps_of_epoch", two_steps)
    clock, seen = WaitClock(), []
    for batches in Trainer._steps_of_epoch(None):
        seen.append((batches, clock.seconds))
        now[0] += 100  # the step itself
    assert seen == [([1], 1), ([2], 3)]


def test_a_run_that_would_leave_its_epoch_is_refused(tmp_path):
    options = {"processes": 2, "threads": 1, "workers": 0}
    assert run_config(SIZES["a"], tmp_path, tmp_path, steps=96, **options).train.global_batch_size == 8
    with pytest.raises(ValueError, match=r"97 steps of 8 samples: expected at most one epoch of 768"):
        run_config(SIZES["a"], tmp_path, tmp_path, steps=97, **options)


def test_a_command_sees_a_terminal_and_its_failure_is_told():
    code = "import os, sys; sys.exit(0 if sys.stderr.isatty() and os.get_terminal_size(2).columns > 80 else 3)"
    run_in_terminal([sys.executable, "-c", code], threads=1)
    with pytest.raises(RuntimeError, match=r"(?s)ended with status 7:\n.*no such loop"):
        run_in_terminal([sys.executable, "-c", "print('no such loop'); raise SystemExit(7)"], threads=1)


def test_what_is_not_installed_is_left_out_and_the_table_says_so(monkeypatch, capsys):
    installed = importlib.util.find_spec
    absent = {"timm", "lightning", "accelerate"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else installed(name))
    assert model_step.main(["--quick", "--variants", "published"]) == 0
    assert "| published: needs timm, of the extra `benchmark` |" in capsys.readouterr().out
    monkeypatch.setattr(compare_trainers, "measure_loop", lambda *_, **__: 0.5)
    assert compare_trainers.main(["--quick"]) == 0
    rows = capsys.readouterr().out
    assert rows.count("needs the extra `benchmark`") == 3
    assert "| bare loop " in rows


def test_options_reach_the_benchmarks_that_take_them():
    options = Namespace(sizes="a,b", rounds=2, quick=True)
    commands = {name: run.build_command(name, options)[2:] for name in run.BENCHMARKS}
    assert commands["model"] == ["benchmarks.model_step", "--rounds", "2", "--sizes", "a,b", "--quick"]
    assert commands["trainers"] == ["benchmarks.compare_trainers", "--rounds", "2", "--quick"]
    assert commands["start"] == ["benchmarks.start", "--quick"]
    assert run.build_command("data", Namespace(sizes=None, rounds=None, quick=False))[2:] == ["benchmarks.loading"]


def test_a_size_that_is_none_is_bad_usage(capsys):
    with pytest.raises(SystemExit) as refusal:
        model_step.main(["--sizes", "a,d"])
    assert refusal.value.code == 2
    assert "--sizes: 'd': expected some of a, b, c" in capsys.readouterr().err


def test_all_benchmarks_run_from_any_folder_without_a_path(tmp_path):
    """The smoke run: a table from each, with a row for all that is measured."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "--quick", "--only", *MODULES]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("|")]
    assert {"published", "published, same function", "ours", "terrain none", "activation checkpointing"} <= set(rows)
    assert {"bf16", "dropout"} <= set(rows)
    assert {"fused", "fit", "bare loop", "topoflow", "ours, packed, float32", "plain array, mapped"} <= set(rows)
    assert sum(row.startswith("(tiny)") for row in rows) == 2  # terrain and FLOP/s
    assert "processor  " in done.stdout


def test_a_benchmark_that_fails_does_not_hide_the_others(monkeypatch, capfd):
    monkeypatch.setattr(
        run, "BENCHMARKS", {"first": ("First", "benchmarks.none", set()), "last": ("Last", run.MACHINE, set())}
    )
    monkeypatch.setattr(run, "build_command", lambda name, _: [sys.executable, "-m", run.BENCHMARKS[name][1]])
    assert run.main([]) == 1
    said = capfd.readouterr()
    assert said.out.count("processor  ") == 2
    assert "failed: first (status 1)" in said.err
