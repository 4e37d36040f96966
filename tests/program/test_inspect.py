"""`topoflow inspect` on a run of train.py."""

import json

from topoflow import cli


def test_a_run_and_two_of_its_checkpoints(program, capsys):
    assert program.train("train.max_steps=2", "checkpoint.every_steps=1").returncode == 0
    run = program.folder / "run"
    capsys.readouterr()
    assert cli.main(["inspect", str(run)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("whole") >= 2
    assert "next_samples" in printed
    loss = program.state(step=2)["certificate"]["probe"]["loss"]
    assert f"loss {loss!r}, loss_hex {loss.hex()}" in printed
    first, second = (run / "checkpoints" / f"step-{step:08d}" for step in (1, 2))
    assert cli.main(["inspect", str(first), str(second), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    before, after = program.state(step=1)["model"], program.state(step=2)["model"]
    changed = {name for name in before if not before[name].equal(after[name])}
    assert {item["name"] for item in report["differing"]} & set(before) == changed
    assert report["settings"]["config"] == []
