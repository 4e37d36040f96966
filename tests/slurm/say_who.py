"""Run under a launcher by the tests: meets the other processes as train.py does, and says who each of them is.

With a number N: rank 0 also waits until N such groups are there at once, each with a file in the working folder.
"""

import json
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from topoflow.config import DistributedConfig
from topoflow.errors import Refusal
from topoflow.launch import choose_device, read_launch
from topoflow.rendezvous import distributed_context
from topoflow.run_dir import report_refusal


def main() -> int:
    launch = None
    try:
        launch = read_launch()
        config = DistributedConfig(setup_timeout_seconds=60)
        with distributed_context(launch, config, choose_device("cpu", launch)) as context:
            who = [launch.rank, launch.local_rank, launch.local_world_size, launch.node, socket.gethostname()]
            everyone = context.gather_objects(who)
            if launch.is_main and len(sys.argv) > 1:
                wait_for_groups(int(sys.argv[1]), f"group-{launch.job}-{launch.port}")
            context.gather_objects(None)
        if launch.is_main:
            print(json.dumps({"said": str(launch), "reason": launch.reason, "everyone": everyone}), flush=True)
    except Refusal as refusal:
        report_refusal(refusal, launch)
        return refusal.exit_status
    return 0


def wait_for_groups(number: int, own: str) -> None:
    Path(own).touch()
    deadline = time.monotonic() + 60
    while len(list(Path().glob("group-*"))) < number:
        assert time.monotonic() < deadline, "the others did not come"
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())
