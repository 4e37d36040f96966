"""Where the ranks of a test meet: a store hosted by the test's own process, as torchrun's agent hosts one.

The listening process chooses the port, so no other process can take it first.
"""

import torch.distributed as dist


def host_store() -> dist.TCPStore:
    """Return a store that listens on a free port of this machine for as long as the object lives."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def rank_variables(port: int, rank: int, world_size: int) -> dict[str, str]:
    """Return the environment of one rank that connects to the others through a store on this machine."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": f"test-{port}",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }
