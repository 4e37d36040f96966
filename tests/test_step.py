"""What the host waits for in an optimizer step, and what it sends to other ranks."""

import contextlib
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.bare_trainer import build_bare_trainer
from tests.test_ranks import run_on_ranks
from topoflow.config import ModelConfig
from topoflow.launch import Launch
from topoflow.model.topoflow import build_model
from topoflow.ranks import Context
from topoflow.reduction import DdpReduction

# operators whose result the host must read, so that the queue of a GPU runs empty
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "allclose"}


class CountWaits(TorchDispatchMode):
    """Counts operators at which the host waits for a device."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[-1]
        indexed_by_mask = name in {"index", "index_put_"} and any(
            t is not None and t.dtype == torch.bool for t in args[1]
        )
        if name in WAITS or indexed_by_mask:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


class CountedContext(Context):
    """A single process that counts transfers to other ranks and to the host."""

    def __init__(self, device="cpu"):
        super().__init__(Launch("a test", "a test"), torch.device(device))
        self.calls = Counter()

    def agree(self, *tensors):
        self.calls["agree"] += 1
        before = torch.cuda.get_sync_debug_mode() if torch.cuda.is_available() else None
        if before is not None:
            torch.cuda.set_sync_debug_mode("default")
        result = super().agree(*tensors)
        if before is not None:
            torch.cuda.set_sync_debug_mode(before)
        return result

    def gather_rows(self, rows):
        self.calls["gather_rows"] += 1
        return super().gather_rows(rows)


def trainer_and_batches(context, reduction="ddp", accumulation=2):
    """Return a small network with terrain and wind, and the micro-batches of one step."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape):
        return torch.randn(2, *shape, 8, 12, generator=generator).to(context.device)

    config = ModelConfig(patch_size=2, embed_dim=16, depth=2, num_heads=2, drop_rate=0.0, drop_path=0.0)
    y_km, x_km = (km.flatten() for km in torch.meshgrid(torch.arange(4) * 50.0, torch.arange(6) * 50.0, indexing="ij"))
    model = build_model(config, ("u", "v", "pm25"), ("pm25", "o3"), (8, 12), x_km, y_km, seed=0).to(context.device)
    batches = [
        {
            "x": noise(3),
            "y": noise(2),
            "valid": noise(2) > -1,
            "lead_time_hours": torch.full((2,), 24.0, device=context.device),
            "wind_ms": noise(2),
        }
        for _ in range(accumulation)
    ]
    return build_bare_trainer(model, 1000 * noise()[0].abs(), 2, accumulation, reduction, context), batches


@pytest.mark.parametrize("reduction", ["ddp", "canonical"])
def test_a_step_waits_once_and_reduces_its_loss_only_where_it_is_logged(reduction):
    context = CountedContext()
    trainer, batches = trainer_and_batches(context, reduction)
    trainer.train_step(batches)  # from now on the moments exist
    context.calls.clear()
    with CountWaits() as waits:
        result = trainer.train_step(batches, with_loss=False)
    assert result.loss is None
    assert not waits.found
    assert context.calls == {"agree": 1}
    with CountWaits() as waits:
        result = trainer.train_step(batches, with_loss=True)
    assert result.loss > 0
    assert context.calls == {"agree": 2, "gather_rows": 1}


def test_waits_are_seen():
    with CountWaits() as waits:
        _ = torch.ones(3).sum().item(), bool(torch.ones(1)), torch.ones(3)[torch.ones(3) > 0]
    assert sum(waits.found.values()) == 3


def test_with_and_without_the_loss_a_step_is_the_same():
    weights = []
    for with_loss in (True, False):
        trainer, batches = trainer_and_batches(CountedContext())
        for _ in range(2):
            trainer.train_step(batches, with_loss)
        weights.append(trainer.state.model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_torch_sees_no_other_wait():
    context = CountedContext("cuda")
    trainer, batches = trainer_and_batches(context)
    trainer.train_step(batches)
    with contextlib.ExitStack() as stack:
        torch.cuda.set_sync_debug_mode("error")
        stack.callback(torch.cuda.set_sync_debug_mode, "default")
        trainer.train_step(batches, with_loss=False)


def ddp_communicates_with_the_last_micro_batch_only(context):
    accumulation, buckets = 3, []
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    reduction = DdpReduction(model, context, accumulation)
    ddp = reduction.forward
    assert ddp.gradient_as_bucket_view
    assert not ddp.broadcast_buffers

    def average(state, bucket):
        buckets.append(index)
        done = torch.futures.Future()
        done.set_result(context.all_reduce_sum(bucket.buffer()) / context.world_size)
        return done

    ddp.register_comm_hook(None, average)
    for _ in range(2):
        for index in range(accumulation):
            with reduction.micro_batch(index):
                ddp(torch.full((1, 4), float(index + 1))).sum().backward()
    # all in one bucket, once per step in two steps
    assert buckets == [accumulation - 1] * 2
    # 1 + 2 + 3 of the ranks, in each of two steps
    assert model[1].bias.grad.item() * reduction.finish() == 2 * accumulation * context.world_size
    # gradients are views of the buckets: nothing is copied
    pieces = {parameter.grad.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert len(pieces) == 1


def agree_sums_over_ranks_and_shows_the_rest(context):
    shares = torch.tensor([1.0, float(context.rank)], dtype=torch.float64)
    assert context.agree(shares, torch.tensor(0.5), torch.tensor([7])) == [context.world_size, 3.0, 0.5, 7.0]


@pytest.mark.parametrize(
    "body", [ddp_communicates_with_the_last_micro_batch_only, agree_sums_over_ranks_and_shows_the_rest]
)
def test_between_three_processes(body, store_port):
    run_on_ranks(store_port, body)
