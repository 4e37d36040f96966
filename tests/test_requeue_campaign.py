"""The requeue campaign draws disturbances from all there are, the same for a seed, and sees steps that were lost."""

import json
import random
import threading
import time

from benchmarks.disturbed_job import AT_A_RANDOM_TIME, CRASH, REQUEUE, SIGNALS, draw_disturbance, lost_steps
from benchmarks.dwelling import PlanFolder
from benchmarks.dwelling_points import PLACES
from benchmarks.requeue_campaign import main


def test_disturbances_are_drawn_from_all_there_are():
    def draw(seed, saved_step=12, crash=False):
        source = random.Random(seed)
        return [draw_disturbance(source, 4, saved_step, seconds=9.0, crash=crash) for _ in range(2000)]

    drawn = draw(seed=1)
    assert drawn == draw(seed=1)
    assert drawn != draw(seed=2)
    kinds = {f"SIG{signal} to {whom}" for signal in SIGNALS for whom in ("all tasks", "one rank")}
    assert {one.kind for one in drawn} == kinds | {REQUEUE}
    assert {one.kind for one in draw(seed=1, crash=True)} == {CRASH}
    assert {one.rank for one in drawn} == {None, 0, 1, 2, 3}
    assert {len(one.again) for one in drawn} == {0, 1, 2, 3}
    assert {one.phase for one in drawn} == {*PLACES, AT_A_RANDOM_TIME}
    assert "loading" not in {one.phase for one in draw(seed=1, saved_step=None)}  # there is nothing to load
    names = {name for points in PLACES.values() for name in points}
    assert {one.plan.point for one in drawn} == names | {None}
    for one in drawn:
        if one.plan.point is not None:
            point = PLACES[one.phase][one.plan.point]
            assert one.plan.step in ([0] if point.before_the_first_step else range(13, 20))
            assert 1 <= one.plan.count <= point.times
            assert one.plan.rank in ([0] if point.only_on_rank_0 else range(4))


def test_steps_past_the_newest_checkpoint_are_lost(tmp_path):
    assert lost_steps(tmp_path) == 0
    events = [{"event": "train", "step": step} for step in range(1, 10)] + [{"event": "end", "step": 11}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert lost_steps(tmp_path) == 9
    for step in (4, 8):
        (tmp_path / f"checkpoints/step-{step:08d}").mkdir(parents=True)
        assert lost_steps(tmp_path) == 9 - step


def test_one_process_dwells_until_it_is_let_go(tmp_path):
    files = PlanFolder(tmp_path, "job", restart=1)
    dwelling = threading.Thread(target=files.dwell)
    dwelling.start()
    while not files.dwells:
        time.sleep(0.01)
    PlanFolder(tmp_path, "job", restart=1).dwell()  # another comes by, and goes on
    assert dwelling.is_alive()
    files.let_go()
    dwelling.join(10)
    assert not dwelling.is_alive()


def test_where_there_is_no_slurm_the_campaign_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["--folder", str(tmp_path / "runs")]) == 2
    said = capsys.readouterr().err
    assert said == "requeue_campaign: no sbatch on the PATH: expected a machine that can send jobs to SLURM\n"
    assert not (tmp_path / "runs").exists()
