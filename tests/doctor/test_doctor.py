"""The doctor on one machine: what it needs, what it leaves behind, and how it ends."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import topoflow
from topoflow import cli
from topoflow.lease import Lease
from topoflow.reproducibility import hash_sources
from topoflow.tools.doctor.network import missing_interfaces

ROOT = Path(__file__).parents[2]
FAIL, WARNING = "FAIL", "WARNING"


def run_doctor(own_mounts, prepare, place, *arguments):
    """Status and report of a doctor that is alone, after shell commands that mount something."""
    words = [*own_mounts, f'set -e; {prepare}; exec "$@"', "bash", sys.executable, "-m", "topoflow", "doctor"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words += ["run.yaml", f"run.dir={place}/run", "--json", *arguments]
    done = subprocess.run(words, cwd=place, env=environ, capture_output=True, text=True)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def findings(report, check):
    [found] = [item for item in report["checks"] if item["check"] == check]
    return [(item["verdict"], item["text"]) for item in found["findings"]]


def test_loading_needs_no_shared_memory(place, own_mounts):
    status, report = run_doctor(own_mounts, "mount -t tmpfs -o size=16k tmpfs /dev/shm", place)
    assert (status, findings(report, "limits")) == (0, [])
    [node] = report["nodes"]
    assert node["figures"]["shared_memory_bytes"] <= 16 * 1024
    assert node["figures"]["shared_memory_needed_bytes"] == 0


def test_a_run_directory_without_room_fails(place, own_mounts):
    status, report = run_doctor(own_mounts, f"mount -t tmpfs -o size=48k tmpfs {place}/run", place)
    [(verdict, text)] = findings(report, "run directory")
    assert (status, verdict) == (1, FAIL)
    assert "kB free: a checkpoint takes" in text
    [node] = report["nodes"]
    assert node["figures"]["free_bytes"] < 48 * 1024
    assert node["figures"]["write_bytes_per_second"] > 0


def test_a_run_directory_that_cannot_be_written_fails(place, own_mounts):
    status, report = run_doctor(own_mounts, f"mount -t tmpfs -o ro tmpfs {place}/run", place)
    [(verdict, text)] = findings(report, "run directory")
    assert (status, verdict) == (1, FAIL)
    assert "Read-only file system" in text


def test_any_change_of_the_source_files_is_another_version(tmp_path, monkeypatch):
    package = tmp_path / "topoflow"
    (package / "data").mkdir(parents=True)
    monkeypatch.setattr(topoflow, "__file__", str(package / "__init__.py"))

    def hash_of(**contents):
        for path in package.rglob("*.py"):
            path.unlink()
        for name, content in contents.items():
            (package / f"{name.replace('_', '/')}.py").write_text(content)
        return hash_sources()

    same = hash_of(a="x = 1", data_b="y")
    assert hash_of(data_b="y", a="x = 1") == same
    others = [
        hash_of(a="x = 2", data_b="y"),
        hash_of(a="x = 1", b="y"),
        hash_of(a="x = 1"),
        hash_of(a="x = 1y", data_b=""),
    ]
    assert len({same, *others}) == 5


def contents(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*") if path.name != ".lease"}


def test_a_run_directory_that_is_in_use_stays_as_it_is(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(place)
    run = tmp_path / "run"
    run.mkdir()
    lease = Lease(run)
    lease.take()
    try:
        before = contents(run)
        assert cli.main(["doctor", "run.yaml", f"run.dir={run}", "--json"]) == 0
        assert contents(run) == before
    finally:
        lease.release()
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"] != FAIL
    assert report["run_directory"] == str(run)


def test_a_run_directory_that_does_not_exist_is_not_made(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(place)
    assert cli.main(["doctor", "run.yaml", f"run.dir={tmp_path / 'a/b'}", "--json"]) == 0
    assert not list(tmp_path.iterdir())
    assert "does not exist: examined" in capsys.readouterr().out


def test_the_trial_of_a_joint_network_has_its_lead_times(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(place)
    assert cli.main(["doctor", "run.yaml", f"run.dir={tmp_path}", "model.leads=joint", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert findings(report, "model") == findings(report, "data") == []


def test_a_stop_in_the_middle_leaves_nothing_behind(place, tmp_path):
    words = [sys.executable, "-m", "topoflow", "doctor", f"{place}/run.yaml", f"run.dir={tmp_path}"]
    doctor = subprocess.Popen(words, cwd=place, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)
    while not list(tmp_path.iterdir()):
        assert doctor.poll() is None
    doctor.terminate()  # as scancel and torchrun do
    doctor.communicate(timeout=60)
    assert doctor.returncode == 130
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_used_each_check_reports_it(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    assert cli.main(["doctor", "run.yaml", "run.dir=run.yaml/run", "data.path=nowhere", "model.patch_size=3"]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"^data +FAIL ", printed, re.M)
    assert re.search(r"^run directory +FAIL ", printed, re.M)
    assert "Not a directory" in " ".join(printed.split())
    assert re.search(r"^model +ok +forward and backward of 2 sample\(s\) of 36 x 48 cells", printed, re.M)


def test_a_backend_that_training_refuses_fails(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    assert cli.main(["doctor", "run.yaml", f"run.dir={place}/run", "distributed.backend=nccl", "--json"]) == 1
    [(verdict, text)] = findings(json.loads(capsys.readouterr().out), "devices")
    assert verdict == FAIL
    assert "'nccl' is not usable on CPU" in text


def test_without_a_config_it_tells_what_is_not_examined(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "no data set" in printed.splitlines()[0]
    assert re.search(r"^data +ok +no CONFIG: not examined", printed, re.M)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "environ", "check", "text"),
    [
        (["run.yaml", "model.embed_dim=many"], {}, "config", "model.embed_dim"),
        (["nowhere.yaml"], {}, "config", "nowhere.yaml"),
        (["run.yaml"], {"RANK": "0"}, "environment", "RANK set without"),
    ],
)
def test_what_cannot_be_used_is_status_2_with_json(place, capsys, monkeypatch, words, environ, check, text):
    monkeypatch.chdir(place)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["doctor", *words, "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"] == report["nodes"][0]["verdict"] == FAIL
    [[(verdict, found)]] = [findings(report, item["check"]) for item in report["checks"]]
    assert (report["checks"][0]["check"], verdict) == (check, FAIL)
    assert text in found
    assert cli.main(["doctor", *words]) == 2
    assert re.search(f"^{check} +FAIL +cannot be used", capsys.readouterr().out, re.M)


def test_help_lists_the_statuses(capsys):
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--help"])
    assert re.search(r"^ +5 +the processes did not connect", capsys.readouterr().out, re.M)


@pytest.mark.parametrize(
    ("name", "value", "missing", "is_fatal"),
    [
        ("NCCL_SOCKET_IFNAME", "hsn", [], False),
        ("NCCL_SOCKET_IFNAME", "hsn0,hsn9", ["hsn9"], False),
        ("NCCL_SOCKET_IFNAME", "ib", ["ib"], True),
        ("NCCL_SOCKET_IFNAME", "=hsn", ["hsn"], True),
        ("NCCL_SOCKET_IFNAME", "=hsn1", [], False),
        ("NCCL_SOCKET_IFNAME", "^docker", [], False),
        ("GLOO_SOCKET_IFNAME", "hsn", ["hsn"], True),
        ("GLOO_SOCKET_IFNAME", "hsn0,hsn1", [], False),
        ("GLOO_SOCKET_IFNAME", "hsn0,hsn9", ["hsn9"], True),
    ],
)
def test_interface_variables_are_read_as_nccl_and_gloo_read_them(name, value, missing, is_fatal):
    assert missing_interfaces(name, value, ["lo", "hsn0", "hsn1"]) == (missing, is_fatal)
