import socket
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from topoflow.config import DistributedConfig
from topoflow.environment import VISIBLE_DEVICES
from topoflow.errors import ConfigError, DataError
from topoflow.launch import Launch, choose_device, device_identity, read_launch
from topoflow.rendezvous import distributed_context
from topoflow.slurm import expand_node_list, expand_tasks_per_node, port_of_step

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "n1", "MASTER_PORT": "29500",
}  # fmt: skip
AGENT = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "2", "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "4"}
# a batch script's, as SLURM 22.05 sets them
JOB = {
    "SLURM_JOB_ID": "17", "SLURM_NTASKS": "8", "SLURM_TASKS_PER_NODE": "4,2,1(x2)", "SLURM_JOB_NUM_NODES": "4",
    "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_GTIDS": "0", "SLURMD_NODENAME": "nid005001",
    "SLURM_JOB_NODELIST": "nid[005001-005003,005010],login1",
}  # fmt: skip
# an salloc shell's: it runs where salloc was called
SHELL = {name: value for name, value in JOB.items() if name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_JOB_NUM_NODES")}
NODES = {"SLURM_STEP_NODELIST": "nid[005001-005003],login1", "SLURM_STEP_TASKS_PER_NODE": "4,2,1(x2)"}
STEP = JOB | NODES | {
    "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "6", "SLURM_LOCALID": "0", "SLURM_NODEID": "2",
    "SLURM_GTIDS": "6", "SLURMD_NODENAME": "nid005003", "SLURM_DISTRIBUTION": "block",
}  # fmt: skip
FIRST = STEP | {"SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_GTIDS": "0,1,2,3", "SLURMD_NODENAME": "nid005001"}
# srun --pty bash, which is told of its own task alone, and salloc's shell where that is a step ("interactive step")
ONE = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "nid005001", "SLURM_STEP_TASKS_PER_NODE": "1"}
PTY = JOB | ONE | {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "1", "SLURM_TASKS_PER_NODE": "1"}
INTERACTIVE = JOB | ONE | {"SLURM_STEP_ID": "4294967290"}


def without(environ, *names):
    return {name: value for name, value in environ.items() if name not in names}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, ("single process", 0, 1, 0, 1, 0)),
        (JOB, ("single process", 0, 1, 0, 1, 0)),
        (SHELL, ("single process", 0, 1, 0, 1, 0)),
        (PTY, ("srun", 0, 1, 0, 1, 0)),
        (INTERACTIVE, ("srun", 0, 1, 0, 1, 0)),
        ({"MASTER_ADDR": "n1"}, ("single process", 0, 1, 0, 1, 0)),
        (TORCHRUN, ("torchrun", 3, 8, 1, 2, 0)),
        (without(TORCHRUN, "LOCAL_WORLD_SIZE"), ("torchrun", 3, 8, 1, 2, 0)),
        (TORCHRUN | AGENT, ("torchrun", 3, 8, 1, 2, 1)),
        (JOB | TORCHRUN | AGENT, ("torchrun", 3, 8, 1, 2, 1)),
        (STEP | TORCHRUN | AGENT, ("torchrun", 3, 8, 1, 2, 1)),
        (STEP | TORCHRUN | AGENT | {"SLURM_LOCALID": ""}, ("torchrun", 3, 8, 1, 2, 1)),  # whatever SLURM says
        # a wrapper that puts the step's numbers under the usual names
        (STEP | TORCHRUN | {"RANK": "6"}, ("torchrun", 6, 8, 1, 2, 2)),
        (STEP, ("srun", 6, 8, 0, 1, 2)),
        (FIRST, ("srun", 0, 8, 0, 4, 0)),
        (FIRST | {"SLURM_PROCID": "3", "SLURM_LOCALID": "3"}, ("srun", 3, 8, 3, 4, 0)),
        # tasks dealt to the nodes in turn
        (STEP | {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_GTIDS": "1,5",
                 "SLURMD_NODENAME": "nid005002", "SLURM_DISTRIBUTION": "cyclic"}, ("srun", 5, 8, 1, 2, 1)),
        (without(STEP, "SLURM_GTIDS", "SLURMD_NODENAME", "SLURM_DISTRIBUTION"), ("srun", 6, 8, 0, 1, 2)),
        (STEP | {"SLURM_DISTRIBUTION": "arbitrary", "MASTER_ADDR": "login1"}, ("srun", 6, 8, 0, 1, 2)),
    ],
)  # fmt: skip
def test_who_am_i(environ, expected):
    launch = read_launch(environ)
    found = (launch.launcher, launch.rank, launch.world_size, launch.local_rank, launch.local_world_size, launch.node)
    assert found == expected


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({}, "single process, 1 process(es) (neither torchrun's variables nor a SLURM step's)"),
        (
            JOB,
            "single process, 1 process(es) (a batch script or shell of SLURM job 17, not a task of a step, "
            "although the job has 8 tasks: srun launch/srun.sh starts that many)",
        ),
        (PTY, "srun, 1 process(es) (SLURM step 17.0 of 1 task)"),
        (
            TORCHRUN,
            "torchrun, 8 process(es), meeting at n1:29500 "
            "(RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set)",
        ),
        (
            STEP | TORCHRUN | AGENT,
            "torchrun, 8 process(es) on 4 node(s), meeting at n1:29500 (TORCHELASTIC_RUN_ID, RANK, WORLD_SIZE, "
            "LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set, which take precedence over SLURM's)",
        ),
        (STEP, "srun, 8 process(es) on 4 node(s), meeting at nid005001:21923 (SLURM step 17.2 of 8 tasks)"),
        (
            STEP | {"MASTER_ADDR": "nid005001-hsn0", "MASTER_PORT": "29400"},
            "srun, 8 process(es) on 4 node(s), meeting at nid005001-hsn0:29400 "
            "(SLURM step 17.2 of 8 tasks, with MASTER_ADDR and MASTER_PORT)",
        ),
    ],
)
def test_which_launcher_was_believed_and_why(environ, said):
    launch = read_launch(environ)
    assert f"{launch} ({launch.reason})" == said


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
    assert (launch.address, launch.port) == (read_launch(FIRST).address, read_launch(FIRST).port)
    assert launch.address == "nid005001"
    assert launch.port != read_launch(STEP | {"SLURM_JOB_ID": "18"}).port
    assert launch.port != read_launch(STEP | {"SLURM_STEP_ID": "3"}).port
    assert launch.port != read_launch(STEP | {"SLURM_RESTART_COUNT": "1"}).port


@pytest.mark.parametrize("first_job", [1, 12_700, 67_043_328, 4_294_901_760])
def test_ports_of_steps_that_may_run_at_once_differ(first_job):
    jobs, steps = range(first_job, first_job + 113), range(100)
    ports = {port_of_step(job, step) for job in jobs for step in steps}
    assert len(ports) == len(jobs) * len(steps)
    # Linux takes 32768 and above for outgoing connections
    assert min(ports) >= 20000
    assert max(ports) < 32768
    assert 20000 <= port_of_step(first_job, 4294967290) < 32768


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        # half set
        ({"RANK": "0"}, ["RANK", "WORLD_SIZE", "MASTER_PORT", "all of them or none"]),
        ({"LOCAL_RANK": "0"}, ["LOCAL_RANK set without RANK"]),
        (JOB | {"WORLD_SIZE": "8"}, ["WORLD_SIZE set without RANK"]),
        (without(TORCHRUN, "MASTER_ADDR"), ["set without MASTER_ADDR"]),
        (STEP | {"RANK": "6"}, ["RANK", "WORLD_SIZE", "all of them or none"]),
        *(
            (without(STEP, name), [f"set without {name}:"])
            for name in (
                "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST",
                "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_ID", "SLURM_JOB_ID",
            )
        ),
        (JOB | {"SLURM_PROCID": "3"}, ["SLURM_PROCID=3", "without SLURM_STEP_NUM_TASKS"]),
        # not numbers
        (TORCHRUN | {"RANK": "eight"}, ["RANK='eight'", "integer"]),
        (TORCHRUN | {"RANK": "-1"}, ["RANK='-1'", "integer of 0 or more"]),
        (TORCHRUN | {"LOCAL_RANK": ""}, ["LOCAL_RANK=''", "integer"]),
        (TORCHRUN | {"MASTER_PORT": "65536"}, ["MASTER_PORT=65536", "1 to 65535"]),
        (STEP | {"MASTER_PORT": "any"}, ["MASTER_PORT='any'", "integer"]),
        (STEP | {"MASTER_PORT": "0"}, ["MASTER_PORT=0", "1 to 65535"]),
        (STEP | {"SLURM_PROCID": "six"}, ["SLURM_PROCID='six'", "integer"]),
        (STEP | {"SLURM_NODEID": "two"}, ["SLURM_NODEID='two'", "integer"]),
        (STEP | {"SLURM_LOCALID": "-1"}, ["SLURM_LOCALID='-1'", "integer"]),
        (STEP | {"SLURM_STEP_ID": "batch"}, ["SLURM_STEP_ID='batch'", "integer"]),
        (STEP | {"SLURM_JOB_ID": "17_1"}, ["SLURM_JOB_ID='17_1'", "integer"]),
        (STEP | {"SLURM_RESTART_COUNT": "two"}, ["SLURM_RESTART_COUNT='two'", "integer"]),
        (JOB | {"SLURM_NTASKS": "all"}, ["SLURM_NTASKS='all'", "integer"]),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "4,x"}, ["SLURM_STEP_TASKS_PER_NODE", "'4,x'"]),
        (STEP | {"SLURM_STEP_NODELIST": "n[1-"}, ["node list 'n[1-'"]),
        # torchrun's own
        (TORCHRUN | {"RANK": "8"}, ["RANK=8", "WORLD_SIZE=8"]),
        (TORCHRUN | {"LOCAL_RANK": "2"}, ["LOCAL_RANK=2", "LOCAL_WORLD_SIZE=2"]),
        (without(TORCHRUN, "LOCAL_WORLD_SIZE") | {"LOCAL_RANK": "8"}, ["LOCAL_RANK=8", "WORLD_SIZE=8"]),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, ["LOCAL_WORLD_SIZE=9", "WORLD_SIZE=8"]),
        # exported in the batch shell, and inherited by every task
        (STEP | {"RANK": "0"}, ["RANK=0", "SLURM_PROCID=6"]),
        (STEP | TORCHRUN, ["RANK=3", "SLURM_PROCID=6"]),
        (STEP | TORCHRUN | {"RANK": "6", "WORLD_SIZE": "4"}, ["WORLD_SIZE=4", "SLURM_STEP_NUM_TASKS=8"]),
        (STEP | {"WORLD_SIZE": "1"}, ["WORLD_SIZE=1", "SLURM_STEP_NUM_TASKS=8"]),
        # srun called from a worker of torchrun: half of what torchrun gives
        (STEP | {"TORCHELASTIC_RUN_ID": "none"}, ["TORCHELASTIC_RUN_ID", "RANK", "all of them or none"]),
        ({"OMPI_COMM_WORLD_SIZE": "8"}, ["OMPI_COMM_WORLD_SIZE=8", "mpirun", "srun launch/srun.sh"]),
        (
            STEP | TORCHRUN | {"RANK": "6", "MASTER_ADDR": "127.0.0.1"},
            ["MASTER_ADDR=127.0.0.1", "4 nodes", "nid005001"],
        ),
        (STEP | {"MASTER_ADDR": "127.0.0.1"}, ["MASTER_ADDR=127.0.0.1", "4 nodes", "nid005001"]),
        (STEP | {"MASTER_ADDR": "localhost"}, ["MASTER_ADDR=localhost", "4 nodes"]),
        # a step that contradicts itself
        (STEP | {"SLURM_PROCID": "8"}, ["SLURM_PROCID=8", "SLURM_STEP_NUM_TASKS=8"]),
        (STEP | {"SLURM_NODEID": "4"}, ["SLURM_NODEID=4", "4 nodes"]),
        (STEP | {"SLURM_LOCALID": "1"}, ["SLURM_LOCALID=1", "SLURM_STEP_TASKS_PER_NODE=4,2,1(x2)", "the 1 tasks"]),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "4,2,1(x3)"}, ["=4,2,1(x3) with SLURM_STEP_NUM_TASKS=8"]),
        (STEP | {"SLURM_STEP_NODELIST": "nid[005001-005003]"}, ["nid[005001-005003] with", "=4,2,1(x2)"]),
        # rank 0 is elsewhere than on the first node
        (STEP | {"SLURM_DISTRIBUTION": "arbitrary"}, ["SLURM_DISTRIBUTION=arbitrary", "MASTER_ADDR"]),
        (STEP | {"SLURM_PROCID": "0", "SLURM_GTIDS": "0"}, ["rank 0 not on SLURM_NODEID=0", "MASTER_ADDR"]),
        # a batch script that was sent from inside a step, with that step's variables
        (FIRST | {"SLURM_GTIDS": "0"}, ["SLURM_GTIDS=0", "SLURM_STEP_TASKS_PER_NODE=4,2,1(x2)", "sbatch inside"]),
        (STEP | {"SLURMD_NODENAME": "n7"}, ["SLURMD_NODENAME=n7", "SLURM_STEP_NODELIST=nid", "sbatch inside"]),
    ],
)  # fmt: skip
def test_an_environment_that_contradicts_itself_is_refused(environ, words):
    with pytest.raises(ConfigError) as refusal:
        read_launch(environ)
    assert "\n" not in str(refusal.value)
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
        ("a[9-11],b[099-100]c,d.e-f", ["a9", "a10", "a11", "b099c", "b100c", "d.e-f"]),
        ("[1-2]", ["1", "2"]),
    ],
)
def test_node_lists_are_expanded(text, names):
    assert expand_node_list(text) == names


@pytest.mark.parametrize("text", ["", "n[1-", "n1]", "n[]", "n[a-b]", "n[3-1]", "n[1-2-3]", "n1,,n2", "n1,", "n1 n2"])
def test_what_is_no_node_list_is_refused(text):
    with pytest.raises(ConfigError, match=r"node list .* expected a form such as"):
        expand_node_list(text)


def test_tasks_per_node_are_expanded():
    assert expand_tasks_per_node("4,2,1(x2)") == [4, 2, 1, 1]
    assert expand_tasks_per_node("8(x50)") == [8] * 50


ONE_PROCESS, FOUR_TASKS = Launch("srun", "a test"), {"rank": 5, "world_size": 8, "local_rank": 1, "local_world_size": 4}
TASK = Launch("srun", "a test", **FOUR_TASKS)
LAST = replace(TASK, local_rank=3)
ALONE = replace(ONE_PROCESS, idle_tasks=7)  # a batch script of a job of 8 tasks


@pytest.fixture
def see(monkeypatch):
    """Makes PyTorch see a number of GPUs, with these variables set."""

    def see(count, **variables):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        for name in VISIBLE_DEVICES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return see


@pytest.mark.parametrize(
    ("name", "launch", "visible", "device"),
    [
        ("auto", TASK, 0, "cpu"),
        ("cpu", TASK, 4, "cpu"),
        ("auto", ONE_PROCESS, 1, "cuda:0"),
        ("auto", ONE_PROCESS, 8, "cuda:0"),  # a workstation
        ("auto", TASK, 1, "cuda:0"),  # one device per task
        ("cuda", LAST, 1, "cuda:0"),
        ("auto", TASK, 4, "cuda:1"),  # all devices visible
        ("cuda", LAST, 4, "cuda:3"),
        ("auto", LAST, 8, "cuda:3"),
        ("cpu", ALONE, 8, "cpu"),
        ("auto", ALONE, 0, "cpu"),
        ("auto", ALONE, 1, "cuda:0"),  # all that the job has
    ],
)
def test_device_binding(see, name, launch, visible, device):
    see(visible)
    assert choose_device(name, launch) == torch.device(device)


@pytest.mark.parametrize(
    ("name", "launch", "visible", "variables", "words"),
    [
        ("cuda", TASK, 0, {}, ["run.device", "no GPU is visible to this process: expected cpu or auto"]),
        ("cuda", TASK, 0, {"CUDA_VISIBLE_DEVICES": ""}, ["no GPU is visible", "(CUDA_VISIBLE_DEVICES='')"]),
        # a CPU build of torch, or no driver
        ("auto", TASK, 0, {"SLURM_STEP_GPUS": "0,1"}, ["given GPUs (SLURM_STEP_GPUS=0,1)", "run.device=cpu"]),
        ("auto", TASK, 0, {"CUDA_VISIBLE_DEVICES": "3"}, ["given GPUs (CUDA_VISIBLE_DEVICES=3)", "sees none"]),
        # HIP counts within what ROCr leaves
        ("cuda", TASK, 0, {"ROCR_VISIBLE_DEVICES": "3", "HIP_VISIBLE_DEVICES": "3"},
         ["(HIP_VISIBLE_DEVICES='3', ROCR_VISIBLE_DEVICES='3')"]),
        # more tasks than devices: all of the node are told, not just those that go away empty-handed
        ("auto", TASK, 3, {}, ["local rank 1 of 4", "3 visible devices on " + socket.gethostname()]),
        ("auto", LAST, 2, {"ROCR_VISIBLE_DEVICES": "0,1"}, ["local rank 3 of 4", "(ROCR_VISIBLE_DEVICES='0,1')"]),
        ("cuda", replace(LAST, local_world_size=1), 2, {}, ["local rank 3", "2 visible devices"]),
        # a batch script or an salloc shell, alone with the devices of many
        ("auto", ALONE, 8, {}, ["one process", "8 visible device(s)", "SLURM_NTASKS=8", "srun launch/srun.sh"]),
        ("cuda", replace(ALONE, job_nodes=4), 1, {}, ["1 visible device(s)", "on 4 node(s)", "srun launch/srun.sh"]),
    ],
)  # fmt: skip
def test_a_binding_that_cannot_be_is_refused(see, name, launch, visible, variables, words):
    see(visible, **variables)
    with pytest.raises(ConfigError) as refusal:
        choose_device(name, launch)
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.parametrize(("environ", "idle_tasks"), [(JOB, 7), (SHELL, 7), (INTERACTIVE, 7), (PTY, 0), (STEP, 0)])
def test_who_may_be_alone_with_the_devices_of_many(environ, idle_tasks):
    launch = read_launch(environ)
    assert (launch.idle_tasks, launch.job_nodes) == (idle_tasks, 4)


def gpu(monkeypatch, uuid, **pci):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuid, **pci))
    return device_identity(torch.device("cuda", 0))


def test_a_device_is_known_by_what_it_is_and_not_by_its_index(monkeypatch):
    uuid, place = "ffc79498-8ff3-c2dc-3b0d-fafd804516ae", {"pci_domain_id": 0, "pci_bus_id": 0xC1, "pci_device_id": 0}
    assert gpu(monkeypatch, uuid, **place) == f"{uuid} at 0000:c1:00 on {socket.gethostname()}"
    assert gpu(monkeypatch, uuid, **place | {"pci_bus_id": 0xC6}) != gpu(monkeypatch, uuid, **place)
    assert gpu(monkeypatch, uuid) == uuid  # PyTorch 2.6 does not tell the place
    assert gpu(monkeypatch, "00000000-0000-0000-0000-000000000000") == ""
    assert device_identity(torch.device("cpu")) == ""


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="no GPU")
def test_a_real_gpu_has_an_identity_and_two_have_two():
    identities = [device_identity(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]
    assert "" not in identities
    assert len(set(identities)) == len(identities)


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
