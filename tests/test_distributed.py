import os
import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
from torch.distributed import TCPStore

from topoflow.config import DistributedConfig
from topoflow.distributed import (
    Launch,
    choose_device,
    distributed_context,
    expand_node_list,
    expand_tasks_per_node,
    read_launch,
    require_distinct_ranks,
)
from topoflow.errors import ConfigError, DataError, RanksDisagree

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "n1", "MASTER_PORT": "29500",
}  # fmt: skip
JOB = {"SLURM_JOB_ID": "17", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
STEP = JOB | {
    "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "6", "SLURM_LOCALID": "0", "SLURM_NODEID": "2",
    "SLURM_STEP_NODELIST": "nid[005001-005003,005010],login1", "SLURM_STEP_TASKS_PER_NODE": "4,2,1(x2)",
}  # fmt: skip


AGENT = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "2"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, ("single process", 0, 1, 0, 1)),
        (JOB, ("single process", 0, 1, 0, 1)),
        ({"MASTER_ADDR": "n1"}, ("single process", 0, 1, 0, 1)),
        (TORCHRUN, ("torchrun", 3, 8, 1, 2)),
        (STEP | TORCHRUN | AGENT, ("torchrun", 3, 8, 1, 2)),
        # a wrapper that puts the step's numbers under the usual names
        (STEP | TORCHRUN | {"RANK": "6"}, ("torchrun", 6, 8, 1, 2)),
        (STEP, ("srun", 6, 8, 0, 1)),
    ],
)
def test_who_am_i(environ, expected):
    launch = read_launch(environ)
    found = (launch.launcher, launch.rank, launch.world_size, launch.local_rank, launch.local_world_size)
    assert found == expected


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, (None, 0)),
        (TORCHRUN | AGENT | {"TORCHELASTIC_RUN_ID": "my run"}, (None, 0)),  # a name that users choose, and use again
        (JOB, ("17", 0)),
        (JOB | TORCHRUN | AGENT, ("17", 0)),
        (STEP | {"SLURM_RESTART_COUNT": "3"}, ("17", 3)),
        (STEP | TORCHRUN | AGENT | {"SLURM_RESTART_COUNT": "3"}, ("17", 3)),
        (JOB | {"SLURM_RESTART_COUNT": ""}, ("17", 0)),
        ({"SLURM_RESTART_COUNT": "3"}, (None, 0)),
    ],
)
def test_the_job_and_how_often_it_was_restarted(environ, expected):
    launch = read_launch(environ)
    assert (launch.job, launch.restart) == expected


def test_a_slurm_step_meets_at_its_first_node_on_a_port_of_its_own():
    launch = read_launch(STEP)
    assert launch.address == "nid005001"
    assert 20000 <= launch.port < 52000
    assert launch.port != read_launch(STEP | {"SLURM_JOB_ID": "18"}).port
    assert launch.port != read_launch(STEP | {"SLURM_STEP_ID": "3"}).port


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"RANK": "0"}, ["RANK", "WORLD_SIZE", "MASTER_PORT"]),
        (TORCHRUN | {"RANK": "eight"}, ["RANK", "'eight'", "integer"]),
        (TORCHRUN | {"RANK": "8"}, ["rank 8", "world size 8"]),
        # exported in the batch shell, and inherited by every task
        (STEP | {"RANK": "0"}, ["RANK=0", "SLURM_PROCID=6"]),
        (STEP | TORCHRUN, ["RANK=3", "SLURM_PROCID=6"]),
        (STEP | TORCHRUN | {"RANK": "6", "WORLD_SIZE": "4"}, ["WORLD_SIZE=4", "SLURM_STEP_NUM_TASKS=8"]),
        (STEP | {"WORLD_SIZE": "1"}, ["WORLD_SIZE=1", "SLURM_STEP_NUM_TASKS=8"]),
        (STEP | {"RANK": "6"}, ["RANK", "WORLD_SIZE", "all of them or none"]),
        (STEP | {"SLURM_RESTART_COUNT": "two"}, ["SLURM_RESTART_COUNT", "'two'", "integer"]),
        (STEP | {"SLURM_NODEID": "4"}, ["SLURM_NODEID=4", "4 nodes"]),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "4,x"}, ["SLURM_STEP_TASKS_PER_NODE", "'4,x'"]),
    ],
)
def test_an_environment_that_contradicts_itself_is_refused(environ, words):
    with pytest.raises(ConfigError) as refusal:
        read_launch(environ)
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ["n1"]),
        ("n1,n2", ["n1", "n2"]),
        ("nid[005001-005003,005010],login1", ["nid005001", "nid005002", "nid005003", "nid005010", "login1"]),
        ("r[1-2]n[08-10]", [f"r{r}n{n}" for r in (1, 2) for n in ("08", "09", "10")]),
        ("n[1,3]-ib", ["n1-ib", "n3-ib"]),
    ],
)
def test_node_lists_are_expanded(text, names):
    assert expand_node_list(text) == names


def test_tasks_per_node_are_expanded():
    assert expand_tasks_per_node("4,2,1(x2)") == [4, 2, 1, 1]
    assert expand_tasks_per_node("8(x50)") == [8] * 50


def test_device_binding(monkeypatch):
    def visible(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    launch = Launch("torchrun", "a test", rank=5, world_size=8, local_rank=1, local_world_size=4)
    visible(0)
    assert choose_device("auto", launch) == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"run\.device"):
        choose_device("cuda", launch)
    visible(1)  # one device per task
    assert choose_device("auto", launch) == torch.device("cuda", 0)
    visible(4)  # all devices visible
    assert choose_device("auto", launch) == torch.device("cuda", 1)
    assert choose_device("cpu", launch) == torch.device("cpu")
    visible(1 + 1)
    with pytest.raises(ConfigError, match="local rank 2 with 2 visible devices"):
        choose_device("auto", Launch("srun", "a test", rank=2, world_size=3, local_rank=2))


def test_nccl_is_refused_on_cpu():
    launch = Launch("torchrun", "a test", rank=0, world_size=2)
    with (
        pytest.raises(ConfigError, match=r"distributed\.backend"),
        distributed_context(launch, DistributedConfig(backend="nccl"), torch.device("cpu")),
    ):
        pass


def test_one_process_needs_no_group():
    with distributed_context(read_launch({}), DistributedConfig(), torch.device("cpu")) as context:
        assert context.gather_objects("x") == ["x"]
        assert context.broadcast_object(3) == 3
        rows = torch.arange(4.0).reshape(2, 2)
        assert torch.equal(context.gather_rows(rows), rows)
        assert torch.equal(context.all_reduce_sum(rows), rows)
        with pytest.raises(DataError, match="gone"), context.together("data"):
            raise DataError("gone")
        context.require_same({"a": "1"}, "test")
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_do_not_meet_are_told_who_and_where(rank):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = Launch("srun", "a test", rank=rank, world_size=2, address="127.0.0.1", port=port)
    config = DistributedConfig(setup_timeout_seconds=1)
    with (
        pytest.raises(RanksDisagree, match=rf"rank {rank} of 2 .* 127\.0\.0\.1:{port} within 1 s") as refusal,
        distributed_context(launch, config, torch.device("cpu")),
    ):
        pass
    assert refusal.value.exit_status == 5


@pytest.mark.parametrize(("ranks", "said"), [((2, 0, 1), None), ((0, 2, 2), "rank 2"), ((0, 0, 2), "rank 0")])
def test_two_processes_with_one_rank_are_found_by_all(ranks, said):
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def meet(rank):
        store = TCPStore("127.0.0.1", server.port, timeout=timedelta(seconds=60))
        try:
            require_distinct_ranks(store, Launch("srun", "a test", rank=rank, world_size=3))
        except ConfigError as refusal:
            return str(refusal)

    with ThreadPoolExecutor(3) as pool:
        refusals = set(pool.map(meet, ranks))
    if said is None:
        assert refusals == {None}
        return
    [refusal] = refusals
    assert f"{said} is that of process {os.getpid()} on {socket.gethostname()} and of process" in refusal
