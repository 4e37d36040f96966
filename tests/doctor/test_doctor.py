"""What the doctor finds wrong is wrong, and is where it says."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import doctor_faults
import pytest

import topoflow
from topoflow import cli
from topoflow.lease import Lease
from topoflow.reproducibility import hash_sources
from topoflow.tools.doctor import storage
from topoflow.tools.doctor.address import judge_interfaces
from topoflow.tools.doctor.network import pair_up

ROOT = Path(__file__).parents[2]
FAIL, WARNING = "FAIL", "WARNING"


@pytest.fixture(scope="module")
def spoiled(examine):
    return examine(doctor_faults.one_fault_in_each_check, "--json")


@pytest.mark.parametrize(
    ("check", "found", "words"),
    [
        ("ranks", set(), ""),
        ("devices", {(FAIL, "c")}, "ValueError: a driver of another age"),
        ("software", {(FAIL, "c")}, "topoflow is .* on 2 other"),
        ("addresses", {(FAIL, "b"), (FAIL, "c"), (WARNING, "a")}, "GLOO_SOCKET_IFNAME=nowhere0"),
        ("addresses", {(FAIL, "b"), (FAIL, "c"), (WARNING, "a")}, "127.0.0.1 is 127.0.0.1 on this node"),
        ("clocks", {(FAIL, "b"), (WARNING, "c")}, r"0\.\d+ s behind most others"),
        ("clocks", {(FAIL, "b"), (WARNING, "c")}, r"[45]\.\d+ s ahead of most others"),
        ("caches", {(FAIL, "c"), (WARNING, "a"), (WARNING, "b")}, "TMPDIR, /proc: cannot be written"),
        ("caches", {(FAIL, "c"), (WARNING, "a"), (WARNING, "b")}, "a shared cache of MIOpen"),
        ("data", {(FAIL, "b"), (FAIL, "c"), (WARNING, "c")}, "world does not exist"),
        ("data", {(FAIL, "b"), (FAIL, "c"), (WARNING, "c")}, "other contents"),
        ("data", {(FAIL, "b"), (FAIL, "c"), (WARNING, "c")}, "reads 0.01 samples/s"),
        ("limits", {(FAIL, "b")}, "at most 100 open files"),
        ("run directory", {(FAIL, "b"), (FAIL, "c"), (WARNING, "c")}, "there is no "),
        ("run directory", {(FAIL, "b"), (FAIL, "c"), (WARNING, "c")}, "1 kB free"),
        ("run directory", {(FAIL, "b"), (FAIL, "c"), (WARNING, "c")}, "flock is not seen"),
        ("run directory", {(FAIL, "b"), (FAIL, "c"), (WARNING, "c")}, "writes 1 B/s"),
        ("network", {(FAIL, "c")}, "the median node"),
        ("model", {(FAIL, "c"), (WARNING, "b")}, "rank 2 computes a loss"),
        ("model", {(FAIL, "c"), (WARNING, "b")}, "rank 1 takes 1"),
    ],
)
def test_each_fault_is_found_on_its_node(spoiled, check, found, words):
    assert spoiled.findings(check) == found
    [texts] = [[one["text"] for one in item["findings"]] for item in spoiled.report["checks"] if item["check"] == check]
    assert re.search(words, "\n".join(texts)), texts


def test_a_fault_fails_its_node_all_ranks_and_no_other_node(spoiled):
    assert spoiled.statuses == [1, 1, 1]
    verdicts = {item["node"]: item["verdict"] for item in spoiled.report["nodes"]}
    assert (verdicts["b"], verdicts["c"]) == (FAIL, FAIL)
    assert verdicts["a"] != FAIL
    assert spoiled.out[1:] == ["", ""]


def test_the_figures_of_each_node_are_told(spoiled):
    figures = {item["node"]: item["figures"] for item in spoiled.report["nodes"]}
    assert figures["b"]["clock_offset_seconds"] == pytest.approx(5, abs=0.2)
    assert figures["c"]["clock_offset_seconds"] == pytest.approx(-0.5, abs=0.2)
    assert figures["c"]["network_bytes_per_second"] < figures["a"]["network_bytes_per_second"] / 5
    assert figures["b"]["pass_seconds"][0] >= 1 > figures["a"]["pass_seconds"][0]
    assert figures["c"]["free_bytes"] == 1000
    assert figures["b"]["open_files"] == 100
    assert figures["a"]["data_samples_per_second"] > 0
    assert "data_samples_per_second" not in figures["b"]


def test_a_check_that_hangs_is_a_finding_and_nobody_waits(examine):
    examined = examine(doctor_faults.a_clock_of_rank_0_a_check_that_hangs_and_no_device, "--json")
    assert examined.statuses == [1, 1, 1]
    assert examined.findings("software") == {(FAIL, "b")}
    assert examined.findings("devices") == {(FAIL, "c")}
    assert examined.findings("clocks") == {(FAIL, "a")}
    assert examined.report["checks"][-1]["check"] == "model"


def test_a_rank_that_dies_is_named_below_what_was_found(examine):
    examined = examine(doctor_faults.b_dies_in_a_check)
    assert examined.statuses[0] == 1
    assert examined.statuses[1] == 9
    assert re.search(r"^connection +FAIL +lost after 3 check", examined.out[0], re.M)
    assert "rank 1" in examined.out[0]
    assert re.search("^FAIL: ", examined.out[0].splitlines()[-1])


def test_where_not_all_come_rank_0_says_so_and_others_why_they_may_not_have(examine):
    examined = examine(doctor_faults.nobody_is_patient, started=2)
    assert examined.statuses == [1, 1]
    assert re.search(r"^ranks +FAIL +the processes did not come together", examined.out[0], re.M)
    assert "did not arrive within" in " ".join(examined.out[0].split())
    assert "topoflow: rank 1: environment: local rank 8 with 4 visible devices" in examined.err[1]


def test_what_two_processes_of_a_node_share_is_found(examine):
    words = ("train.global_batch_size=8", "model.img_size=[8, 10]")
    examined = examine(doctor_faults.two_processes_share_what_is_one_s_own, "--json", *words)
    assert examined.findings("devices") == {(FAIL, "b")}
    assert examined.findings("ranks") == {(FAIL, "a"), (FAIL, "b")}
    assert "world size 3 does not divide" in examined.out[0]
    assert "the launcher says 1 process(es) on this node, 2 are here" in examined.out[0]
    assert examined.findings("CPUs") == {(WARNING, "a"), (WARNING, "b")}
    assert "1 CPU(s) a process for the training and data.workers=1: give 2" in examined.out[0]
    assert "ranks 1, 2 share CPU(s) 2:" in examined.out[0]
    assert examined.findings("data") == {(FAIL, "a"), (FAIL, "b")}
    assert "model.img_size: [8, 10]: expected the data's [8, 12]" in examined.out[0]
    assert examined.findings("limits") == {(FAIL, "a"), (WARNING, "b")}
    assert "/dev/shm has 1 kB free" in examined.out[0]


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


def test_torchrun_is_examined_and_the_table_can_be_read(place):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "topoflow"]
    done = subprocess.run(
        [*command, "doctor", "run.yaml", f"run.dir={place / 'run'}"],
        cwd=place, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 120
    named = [line.split("  ")[0] for line in lines if re.match(r"[a-zA-Z ]+  +(ok|WARNING) ", line)]
    assert named == [
        "ranks", "devices", "CPUs", "software", "addresses", "clocks", "caches", "data", "limits", "run directory",
        "network", "model",
    ]  # fmt: skip
    assert "2 process(es) on 1 node(s), 2 on each; launcher: torchrun" in done.stdout
    header, row = lines[-4:-2]
    assert header.startswith("node")
    assert "0-1" in row.split()
    assert not list(place.rglob(".topoflow-doctor-*"))


def contents(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_a_run_directory_that_is_in_use_stays_as_it_is(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(place)
    run = tmp_path / "run"
    run.mkdir()
    lease = Lease(run)
    lease.take()
    try:
        before = {path: size for path, size in contents(run).items() if path.name != ".lease"}
        assert cli.main(["doctor", "run.yaml", f"run.dir={run}", "--json"]) == 0
        after = {path: size for path, size in contents(run).items() if path.name != ".lease"}
    finally:
        lease.release()
    assert before == after
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"] != FAIL
    assert report["run_directory"] == str(run)


def test_a_run_directory_that_is_not_there_is_not_made(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(place)
    assert cli.main(["doctor", "run.yaml", f"run.dir={tmp_path / 'a/b'}", "--json"]) == 0
    assert not list(tmp_path.iterdir())
    assert "is not there yet" in capsys.readouterr().out


def test_a_stop_in_the_middle_leaves_nothing_behind(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(place)
    seen = []

    def stop(path):
        seen.extend(tmp_path.iterdir())
        os.kill(os.getpid(), signal.SIGTERM)  # as scancel and torchrun do
        time.sleep(0.5)

    monkeypatch.setattr(storage, "measure_write", stop)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert cli.main(["doctor", "run.yaml", f"run.dir={tmp_path}"]) == 130
    assert seen
    assert not list(tmp_path.iterdir())
    assert signal.signal(signal.SIGTERM, before) == signal.SIG_DFL


def test_where_nothing_can_be_used_each_check_says_so(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    assert cli.main(["doctor", "run.yaml", "run.dir=run.yaml/run", "data.path=nowhere", "model.patch_size=3"]) == 1
    said = capsys.readouterr().out
    assert re.search(r"^data +FAIL ", said, re.M)
    assert re.search(r"^run directory +FAIL ", said, re.M)
    assert "Not a directory" in " ".join(said.split())
    assert re.search(r"^model +ok +forward and backward of 2 sample\(s\) of 36 x 48 cells", said, re.M)


def test_without_a_config_it_says_what_is_not_examined(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "no data set" in said.splitlines()[0]
    assert re.search(r"^data +ok +no CONFIG was given: not examined", said, re.M)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["run.yaml", "model.embed_dim=many"], ["nowhere.yaml"], ["run.yaml", "--yaml"]])
def test_what_cannot_be_used_is_status_2(place, capsys, monkeypatch, words):
    monkeypatch.chdir(place)
    try:
        status = cli.main(["doctor", *words])
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "value", "verdict"),
    [
        ("NCCL_SOCKET_IFNAME", "hsn", "ok"),
        ("NCCL_SOCKET_IFNAME", "hsn0,hsn9", WARNING),
        ("NCCL_SOCKET_IFNAME", "ib", FAIL),
        ("NCCL_SOCKET_IFNAME", "=hsn", FAIL),
        ("NCCL_SOCKET_IFNAME", "=hsn1", "ok"),
        ("NCCL_SOCKET_IFNAME", "^docker", "ok"),
        ("GLOO_SOCKET_IFNAME", "hsn", FAIL),
        ("GLOO_SOCKET_IFNAME", "hsn0,hsn1", "ok"),
        ("GLOO_SOCKET_IFNAME", "hsn0,hsn9", FAIL),
    ],
)
def test_interface_variables_mean_what_nccl_and_gloo_take_them_for(name, value, verdict):
    assert judge_interfaces(name, value, ["lo", "hsn0", "hsn1"])[0] == verdict


@pytest.mark.parametrize("count", range(2, 10))
def test_in_each_round_a_node_meets_one_other_and_in_all_rounds_everyone(count):
    rounds = pair_up(list(range(count)))
    assert all(
        len({rank for pair in pairs for rank in pair}) == 2 * len(pairs) == count - count % 2 for pairs in rounds
    )
    met = [frozenset(pair) for pairs in rounds for pair in pairs]
    assert len(met) == len(set(met)) == count * (count - 1) // 2
