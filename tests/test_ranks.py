"""What ranks say to each other, with three real processes."""

import socket

import pytest
import torch
from torch import nn
from torch.multiprocessing import spawn

from topoflow.checkpoint import broadcast, broadcast_state, read_everywhere, state_digests
from topoflow.config import DistributedConfig, OptimConfig
from topoflow.distributed import Launch, distributed_context, wrap_for_training
from topoflow.errors import DataError, MissingPath, RanksDisagree
from topoflow.optim import build_optimizer, build_scheduler

WORLD = 3


def run_on_ranks(body, *arguments):
    """Call `body(context, *arguments)` on every rank; a failing assertion of any rank fails the test."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(_enter, (port, body, arguments), nprocs=WORLD)


def _enter(rank, port, body, arguments):
    torch.set_num_threads(1)
    launch = Launch("a test", "a test", rank=rank, world_size=WORLD, address="127.0.0.1", port=port)
    with distributed_context(launch, DistributedConfig(timeout_seconds=60), torch.device("cpu")) as context:
        body(context, *arguments)


def build_parts():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(model, OptimConfig())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer, build_scheduler(optimizer, OptimConfig(), 10, 100)


def equal_state_is_proved_and_one_ulp_is_found(context):
    parts = build_parts()
    context.require_same(state_digests(*parts), "a test")
    if context.rank == 2:
        with torch.no_grad():
            weight = parts[0].weight
            weight[1, 2] = torch.nextafter(weight[1, 2], torch.tensor(9.0))
    with pytest.raises(RanksDisagree, match=r"a test: weight differs between rank 0 and rank\(s\) 2"):
        context.require_same(state_digests(*parts), "a test")


def moments_on_rank_0_only_are_found(context):
    parts = build_parts()
    if context.rank > 0:
        parts[1].state.clear()
    with pytest.raises(RanksDisagree, match=r"exp_avg of bias differs between rank 0 and rank\(s\) 1, 2"):
        context.require_same(state_digests(*parts), "a test")


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
    received = broadcast_state(context, state if context.is_main else None)
    assert received["plain"] == state["plain"]
    for part in ("model", "half"):
        for name, tensor in state[part].items():
            assert received[part][name].dtype == tensor.dtype
            assert torch.equal(received[part][name], tensor)
    assert received["empty"].shape == (0, 4)


def a_failed_read_on_rank_0_ends_every_rank_with_the_same_message(context):
    def find():
        assert context.is_main, "another rank touched the file"
        raise MissingPath("run: not found")

    with pytest.raises(MissingPath, match="rank 0, reading the checkpoint: run: not found"):
        read_everywhere(context, find, ("model",))


def gradients_are_averaged_and_buffers_are_rank_0s(context):
    model = nn.BatchNorm1d(2)
    model.running_mean.fill_(context.rank)
    wrapped = wrap_for_training(model, context)
    assert model.running_mean.tolist() == [0.0, 0.0]
    model.eval()
    wrapped(torch.full((1, 2), float(context.rank))).sum().backward()
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
        a_failed_read_on_rank_0_ends_every_rank_with_the_same_message,
        gradients_are_averaged_and_buffers_are_rank_0s,
    ],
    ids=lambda body: body.__name__,
)
def test_on_three_ranks(body):
    run_on_ranks(body)
