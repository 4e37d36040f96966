"""`topoflow doctor` on a few forked processes, each of which takes itself for a node."""

import json
import multiprocessing
import socket
from dataclasses import dataclass
from pathlib import Path

import doctor_faults
import pytest
import yaml

from topoflow.tools.demo.world import make_demo_data

CONFIG = {
    "run": {"threads": 1},
    "data": {"path": "world", "train": [["2018-10-01", "2018-10-06"]], "lead_times_hours": [6, 12], "workers": 1},
    "model": {"embed_dim": 16, "depth": 1, "num_heads": 2, "decoder_depth": 1},
    "train": {"max_steps": 6, "global_batch_size": 12, "micro_batch_size": 2},
}


@dataclass
class Examined:
    """How all ranks ended, and what each said on stdout and on stderr."""

    statuses: list[int]
    out: list[str]
    err: list[str]

    @property
    def report(self):
        return json.loads(self.out[0])

    def findings(self, check):
        """{(verdict, node)} of a check."""
        [found] = [item for item in self.report["checks"] if item["check"] == check]
        return {(item["verdict"], item["node"]) for item in found["findings"]}


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with a small world and run.yaml, whose data path is relative."""
    folder = tmp_path_factory.mktemp("doctor")
    make_demo_data(folder / "world", days=8, grid=(8, 12), seed=0, progress=False)
    (folder / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder


@pytest.fixture(scope="session")
def examine(place):
    """Run the doctor on some ranks with a fault of `doctor_faults`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["doctor_faults", "xarray", "zarr", "torch._dynamo"])

    def run(fault=None, *arguments, world=3, started=3):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        output = place / (fault.__name__ if fault else "nothing")
        words = [str(place / "run.yaml"), f"run.dir={place / 'run'}", *arguments]
        ranks = [
            context.Process(target=doctor_faults.run_rank, args=(rank, world, port, str(output), words, fault))
            for rank in range(started)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(60)
            process.kill()
        out, err = ([Path(f"{output}-{n}.{name}").read_text() for n in range(started)] for name in ("out", "err"))
        return Examined([process.exitcode for process in ranks], out, err)

    return run
