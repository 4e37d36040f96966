"""The doctor on several nodes, some of which have faults."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# n2 has its own file system in place of the shared one, n3 a low limit and a variable that names no interface
TASK = """#!/bin/bash
export PYTHONPATH=PROJECT OMP_NUM_THREADS=1
doctor=(INTERPRETER -m topoflow doctor run.yaml run.dir=runs/run train.global_batch_size=12 --json)
case $SLURMD_NODENAME in
  n2) exec unshare --mount bash -c 'mount -t tmpfs tmpfs "$PWD/runs" && exec "$@"' mounted "${doctor[@]}" ;;
  n3) ulimit -n 100; export GLOO_SOCKET_IFNAME=hsn0; exec "${doctor[@]}" ;;
  *) exec "${doctor[@]}" ;;
esac
"""


def test_the_faults_of_each_node_are_found(cluster):
    (cluster.folder / "runs").mkdir()
    script = cluster.folder / "task.sh"
    script.write_text(TASK.replace("PROJECT", str(ROOT)).replace("INTERPRETER", sys.executable))
    script.chmod(0o755)
    srun = cluster.run("srun", "-N3", "-n3", "--gpus-per-task=1", str(script))
    assert srun.returncode == 1, srun.stdout + srun.stderr
    assert srun.stdout, srun.stderr
    report = json.loads(srun.stdout)
    assert (report["launcher"], report["processes"]) == ("srun", 3)
    assert [(item["node"], item["ranks"]) for item in report["nodes"]] == [("n1", [0]), ("n2", [1]), ("n3", [2])]
    found = {item["check"]: {(one["node"], one["verdict"]) for one in item["findings"]} for item in report["checks"]}
    # the nodes share one disk, so which of them writes slowest is chance; nothing else is left out
    [of_directory] = [item["findings"] for item in report["checks"] if item["check"] == "run directory"]
    rates = [one for one in of_directory if one["verdict"] == "WARNING" and "B/s, the median node" in one["text"]]
    assert found["run directory"] - {(one["node"], "WARNING") for one in rates} == {("n2", "FAIL")}
    assert len(of_directory) == 1 + len(rates)
    assert found["addresses"] == {("n3", "FAIL")}
    assert found["limits"] == {("n3", "FAIL")}
    # the cluster's GPUs are not real: training would refuse to run on CPU instead
    assert found["devices"] == {(node, "FAIL") for node in ("n1", "n2", "n3")}
    assert found["software"] == found["clocks"] == found["data"] == set()
    figures = {item["node"]: item["figures"] for item in report["nodes"]}
    assert figures["n2"]["interface"] == "eth0"
    assert all(figures[node]["network_bytes_per_second"] > 0 for node in figures)
    assert not list((cluster.folder / "runs").iterdir())
