"""What ranks send each other, with three real processes."""

import os
import resource
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.multiprocessing.spawn import start_processes

from tests.support.forked_runs import start_fork_server
from topoflow.checkpoint import state as broadcast
from topoflow.checkpoint.file import named_tensors
from topoflow.checkpoint.fingerprint import state_fingerprints
from topoflow.checkpoint.saver import CheckpointSaver
from topoflow.checkpoint.state import deliver, read_everywhere, share_outline
from topoflow.config import CheckpointConfig, DistributedConfig, OptimConfig
from topoflow.errors import DataError, MissingPath, RanksDisagree, RunDirectoryError
from topoflow.launch import Launch
from topoflow.optim import build_optimizer, build_scheduler
from topoflow.reduction import build_reduction
from topoflow.rendezvous import distributed_context

WORLD = 3


def run_on_ranks(port, body, *arguments):
    """Call `body(context, *arguments)` on every rank; a failing assertion of any rank fails the test."""
    start_fork_server()
    start_processes(_enter, (port, body, arguments), nprocs=WORLD, start_method="forkserver")


def _enter(rank, port, body, arguments):
    torch.set_num_threads(1)
    launch = Launch(
        "a test", "a test", rank=rank, world_size=WORLD, address="127.0.0.1", port=port, has_agent_store=True
    )
    with distributed_context(launch, DistributedConfig(timeout_seconds=20), torch.device("cpu")) as context:
        body(context, *arguments)
    # threads that live on while the interpreter ends have been seen to abort it
    for thread in os.listdir("/proc/self/task"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            assert "gloo" not in Path(f"/proc/self/task/{thread}/comm").read_text()


def build_parts():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(model, OptimConfig())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer, build_scheduler(optimizer, OptimConfig(), 10, 100)


def equal_state_is_proved_and_one_ulp_is_found(context):
    parts = build_parts()
    context.require_same(state_fingerprints(*parts), "in a test")
    if context.rank == 2:
        with torch.no_grad():
            weight = parts[0].weight
            weight[1, 2] = torch.nextafter(weight[1, 2], torch.tensor(9.0))
    with pytest.raises(
        RanksDisagree,
        match=r"ranks disagree in a test: .*\n  weight\n    .+ on rank\(s\) 0-1 .*\n    .+ on rank\(s\) 2 \(",
    ):
        context.require_same(state_fingerprints(*parts), "in a test")


def moments_on_rank_0_only_are_found(context):
    parts = build_parts()
    if context.rank > 0:
        parts[1].state.clear()
    with pytest.raises(
        RanksDisagree, match=r"exp_avg of bias\n    .+ on rank\(s\) 0 .*\n    nothing on rank\(s\) 1-2 "
    ):
        context.require_same(state_fingerprints(*parts), "in a test")


def what_one_refuses_all_refuse(context):
    with pytest.raises(DataError) as refusal, context.together("data"):  # noqa: PT012
        if context.rank == 1:
            raise DataError("data.path: gone")
    assert str(refusal.value) == "rank 1, data: data.path: gone"
    assert refusal.value.shared
    with pytest.raises(DataError) as refusal, context.together("data"):
        raise DataError("data.path: gone")
    assert str(refusal.value) == "data.path: gone"


def a_state_arrives_whole_in_pieces(context):
    broadcast.PIECE_BYTES = 64  # 16 floats, so that tensors are cut and joined
    generator = torch.Generator().manual_seed(1)
    state = {
        "model": {
            name: torch.randn(size, generator=generator) for name, size in (("a", (5, 7)), ("b", (3,)), ("c", ()))
        },
        "half": {"h": torch.randn(9, generator=generator).to(torch.bfloat16), "n": torch.arange(4)},
        "plain": {"step": 3, "names": ["x"], "loss": None},
        "empty": torch.zeros(0, 4),
    }
    outline = share_outline(context, state if context.is_main else None)
    assert outline["plain"] == state["plain"]
    wanted, got = dict(named_tensors(state)), dict(named_tensors(outline))
    assert [(t.shape, t.dtype) for t in got.values()] == [(t.shape, t.dtype) for t in wanted.values()]
    assert context.is_main or all(tensor.is_meta for tensor in got.values())
    received = {name: torch.full_like(tensor, 7) for name, tensor in wanted.items()}
    deliver(context, [(got[name], received[name]) for name in got])
    for name, tensor in wanted.items():
        assert torch.equal(received[name], tensor), name


def host_memory_of_the_others_stays_flat(context):
    length, count = 4_000_000, 8  # 128 MB in all, pieces of 4 MB
    broadcast.PIECE_BYTES = 4 * 2**20
    state = {str(n): torch.full((length,), float(n)) for n in range(count)} if context.is_main else None
    destination = torch.zeros(count, length)
    destination.fill_(-1.0)  # its pages exist
    first = share_outline(context, {"first": torch.zeros(10)} if context.is_main else None)
    deliver(context, [(first["first"], torch.zeros(10))])  # a forked process counts the code it touches, once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outline = share_outline(context, state)
    deliver(context, [(outline[name], destination[int(name)]) for name in outline])
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert destination[:, -1].tolist() == list(range(count))
    assert context.is_main or grown_mb < 40, grown_mb


def a_failed_read_on_rank_0_ends_every_rank_with_the_same_message(context):
    def find():
        assert context.is_main, "another rank touched the file"
        raise MissingPath("run: not found")

    with pytest.raises(MissingPath, match="rank 0, reading the checkpoint: run: not found"):
        read_everywhere(context, find, ("model",))


class FailingDirectory:
    """Where rank 0, and no other, fails to write a checkpoint."""

    path = "checkpoints"

    def __init__(self, error):
        self.error = error

    def save(self, state, is_best):
        raise self.error

    def steps(self):
        return [7]


def a_save_that_failed_on_rank_0_ends_all_ranks_or_none(context):
    def save_on_rank_0(error, on_error):
        def capture():
            assert context.is_main, "another rank captured its state"
            return {"model": {}, "optimizer": {"state": {}}, "certificate": {}}

        config = CheckpointConfig(on_error=on_error)
        saver = CheckpointSaver(context, FailingDirectory(error), config, capture, on_commit=None)
        saver.save(1, is_best=False)
        while context.is_main and not saver.poll():
            pass
        flags = context.gather_rows(torch.tensor([saver.poll()]))  # as in a step: one flag, no further collective
        assert flags.tolist() == [True, False, False]
        try:
            saver.handle_failed_save()
        finally:
            saver.close()

    save_on_rank_0(OSError(28, "No space left on device"), "continue")
    for error, words in ((OSError(28, "No space"), "not written: No space"), (RunDirectoryError("lost"), "^lost")):
        with pytest.raises(RunDirectoryError, match=words) as refusal:
            save_on_rank_0(error, "stop")
        assert refusal.value.shared
    with pytest.raises(RuntimeError if context.is_main else RanksDisagree, match=r"rank 0: .*KeyError") as defect:
        save_on_rank_0(KeyError("a defect"), "continue")
    assert isinstance(defect.value.__cause__, KeyError) == context.is_main


def gradients_are_averaged(context):
    model = nn.BatchNorm1d(2).eval()
    reduction = build_reduction(DistributedConfig(), model, context, accumulation=1)
    with reduction.micro_batch(0):
        reduction.forward(torch.full((1, 2), float(context.rank))).sum().backward()
    assert model.bias.grad.tolist() == [1.0, 1.0]
    rows = context.gather_rows(torch.tensor([[float(context.rank), 1.0]]))
    assert rows.tolist() == [[0.0, 1.0], [1.0, 1.0], [2.0, 1.0]]


@pytest.mark.parametrize(
    "body",
    [
        equal_state_is_proved_and_one_ulp_is_found,
        moments_on_rank_0_only_are_found,
        what_one_refuses_all_refuse,
        a_state_arrives_whole_in_pieces,
        host_memory_of_the_others_stays_flat,
        a_failed_read_on_rank_0_ends_every_rank_with_the_same_message,
        a_save_that_failed_on_rank_0_ends_all_ranks_or_none,
        gradients_are_averaged,
    ],
    ids=lambda body: body.__name__,
)
def test_on_three_ranks(store_port, body):
    run_on_ranks(store_port, body)
