"""The judge of the kill campaign sees what differs, and its kills are drawn from all there are, the same for a seed."""

import json
import random

import pytest
import torch

from benchmarks.kill_campaign import STEPS, differences, draw_attack
from benchmarks.kill_points import POINTS
from topoflow.checkpoint.file import FORMAT, write_checkpoint


def events():
    lines = [{"event": "train", "step": step, "loss_hex": float(step).hex()} for step in range(1, STEPS + 1)]
    return [*lines, {"event": "validation", "step": STEPS, "loss_hex": "0x1p-1"}, {"event": "end", "step": STEPS}]


def state():
    return {
        "format": FORMAT,
        "model": {"w": torch.zeros(3)},
        "optimizer": {"groups": [{"name": "g", "lr": 0.5}], "state": {"w": {"step": torch.tensor(20.0)}}},
        "scheduler": {"steps": STEPS},
        "progress": {"step": STEPS, "best_step": 5},
    }


@pytest.fixture
def make_run(tmp_path):
    def make(name, events, state):
        folder = tmp_path / name / "checkpoints"
        folder.mkdir(parents=True)
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        write_checkpoint(folder / f"step-{STEPS:08d}", state)
        return tmp_path / name

    return make


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda e, s: None, []),
        (lambda e, s: e[3].update(loss_hex="0x1.0000000000001p+2"), ["loss ('train', 4, '0x1.0000000000001p+2')"]),
        (lambda e, s: e.insert(3, e[2]), ["loss ('train', 3"]),
        (lambda e, s: e.pop(STEPS), ["loss None"]),
        (lambda e, s: s["model"]["w"].fill_(-0.0), ["model/w"]),
        (lambda e, s: s["model"].update(v=torch.zeros(1)), ["model/v"]),
        (lambda e, s: s["optimizer"]["groups"][0].update(lr=0.25), ["optimizer/groups"]),
        (lambda e, s: s["optimizer"]["state"]["w"]["step"].fill_(21), ["optimizer/state/w/step"]),
        (lambda e, s: s["progress"].update(best_step=6), ["progress/best_step"]),
    ],
)
def test_what_differs_from_the_untouched_run_is_found(make_run, spoil, found):
    spoiled = (events(), state())
    spoil(*spoiled)
    names = differences(make_run("spoiled", *spoiled), make_run("untouched", events(), state()))
    assert len(names) == len(found)
    assert all(name.startswith(start) for name, start in zip(names, found, strict=True))


def test_kills_are_drawn_from_all_there_are():
    def draw(seed):
        source = random.Random(seed)
        return [draw_attack(source, world_size=4, saved_step=12, seconds=9.0) for _ in range(2000)]

    attacks = draw(seed=1)
    assert attacks == draw(seed=1)
    assert attacks != draw(seed=2)
    kills = [(attack, attack.kill) for attack in attacks if attack.kill is not None]
    assert {kill.point for _, kill in kills} == set(POINTS)
    assert {attack.rank for attack in attacks} == {0, 1, 2, 3}
    assert {attack.everyone for attack in attacks} == {True, False}
    for attack, kill in kills:
        point = POINTS[kill.point]
        assert 1 <= kill.count <= point.times
        assert kill.step in ([0] if point.before_the_first_step else range(13, STEPS + 1))
        assert attack.rank == 0 or not point.only_on_rank_0
    timed = [attack.seconds for attack in attacks if attack.kill is None]
    assert 0 < len(timed) < 300
    assert 0 <= min(timed) < max(timed) <= 9.0
