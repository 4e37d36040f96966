"""How gradients are summed over ranks.

The canonical tree is run by ranks that are threads here, and compared with its definition in NumPy float32. DDP is run
by three real processes.
"""

import copy
import queue
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tests.test_ranks import run_on_ranks
from topoflow.build import build_plan
from topoflow.config import DistributedConfig
from topoflow.config_io import config_from_dict
from topoflow.errors import ConfigError
from topoflow.launch import Launch
from topoflow.ranks import Context
from topoflow.reduction import CanonicalReduction, DdpReduction, require_whole_subtrees
from topoflow.rendezvous import distributed_context

SHAPES = ((3, 5), (1,), (), (2, 17), (16,))
LENGTH = sum(np.prod(shape, dtype=int) for shape in SHAPES)
MICRO_BATCHES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 20, 24, 40, 64)


class Weights(nn.Module):
    """Parameters whose gradient is what the module is called with: [LENGTH]."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ParameterList(torch.ones(shape) for shape in SHAPES)

    def forward(self, gradient):
        return torch.cat([part.flatten() for part in self.parts]) @ gradient

    def gradient(self):
        return torch.cat([part.grad.flatten() for part in self.parts]).numpy()


class ThreadContext:
    """A rank among threads: `exchange` goes through a queue for each pair and direction."""

    def __init__(self, rank, world_size, queues):
        self.rank, self.world_size, self.queues = rank, world_size, queues

    def exchange(self, partner, sent, received):
        self.queues[self.rank, partner].put(sent.clone())
        received.copy_(self.queues[partner, self.rank].get(timeout=10))


def alone():
    return ThreadContext(0, 1, {})


def on_every_rank(world_size, body):
    """What `body(context)` returns on each rank."""
    ranks = range(world_size)
    queues = {(one, other): queue.SimpleQueue() for one in ranks for other in ranks}
    results = {}

    def run(rank):
        results[rank] = body(ThreadContext(rank, world_size, queues))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[rank] for rank in ranks]


def reduced(context, steps):
    """The gradient after each of `steps`, [M, LENGTH] the gradients of its micro-batches."""
    weights, gradients = Weights(), []
    accumulation = len(steps[0]) // context.world_size
    reduction = CanonicalReduction(weights, context, accumulation)
    for leaves in steps:
        for index in range(accumulation):
            with reduction.micro_batch(index):
                reduction.forward(torch.from_numpy(leaves[context.rank * accumulation + index])).backward()
        assert reduction.finish() == 1.0
        gradients.append(weights.gradient())
        weights.zero_grad()
    return gradients


def odd_part(number):
    return number if number % 2 else odd_part(number // 2)


def tree_sum(leaves, odd):
    """[n, LENGTH] float32 -> [LENGTH]: halves while there are more than `odd`, those from left to right."""
    if len(leaves) > odd:
        half = len(leaves) // 2
        return tree_sum(leaves[:half], odd) + tree_sum(leaves[half:], odd)
    total = leaves[0]
    for leaf in leaves[1:]:
        total = total + leaf
    return total


def subtrees(first, count, odd):
    """(first, count) of each node of the tree from runs of `odd` up."""
    yield first, count
    if count > odd:
        yield from subtrees(first, count // 2, odd)
        yield from subtrees(first + count // 2, count // 2, odd)


def leaves_of(micro_batches, seed):
    """[M, LENGTH] float32 over nine orders of magnitude, so that each order of adding rounds in its own way."""
    random = np.random.default_rng([micro_batches, seed])
    values = random.standard_normal((micro_batches, LENGTH)) * 10.0 ** random.uniform(-4, 5, (micro_batches, LENGTH))
    return values.astype(np.float32)


@pytest.mark.parametrize("micro_batches", MICRO_BATCHES)
def test_any_number_of_ranks_sums_along_the_tree(micro_batches):
    steps = [leaves_of(micro_batches, seed) for seed in range(3)]
    expected = [tree_sum(leaves, odd_part(micro_batches)) for leaves in steps]
    for world_size in (size for size in (1, 2, 4, 8, 16) if micro_batches % size == 0):
        for gradients in on_every_rank(world_size, lambda context: reduced(context, steps)):
            for ours, theirs in zip(gradients, expected, strict=True):
                np.testing.assert_array_equal(ours, theirs)


def test_a_gradient_smaller_than_the_number_of_ranks():
    def body(context):
        model = nn.Linear(1, 1, bias=False)
        reduction = CanonicalReduction(model, context, 1)
        with reduction.micro_batch(0):
            model(torch.full((1, 1), float(context.rank))).sum().backward()
        reduction.finish()
        return model.weight.grad.item()

    assert on_every_rank(32, body) == [sum(range(32))] * 32


def test_other_orders_have_other_bits():
    leaves = leaves_of(8, 0)
    tree = tree_sum(leaves, 1)
    assert (tree != tree_sum(leaves, 8)).any()
    assert (tree != tree_sum(leaves[[0, 4, 1, 5, 2, 6, 3, 7]], 1)).any()


@pytest.mark.parametrize("micro_batches", MICRO_BATCHES)
def test_world_sizes_that_fit_hold_whole_subtrees(micro_batches):
    nodes = set(subtrees(0, micro_batches, odd_part(micro_batches)))
    fitting = []
    for world_size in range(1, micro_batches + 1):
        share = micro_batches // world_size
        if micro_batches % world_size == 0 and {(rank * share, share) for rank in range(world_size)} <= nodes:
            fitting.append(world_size)
            require_whole_subtrees(micro_batches, world_size)
    named = ", ".join(map(str, fitting))
    for world_size in set(range(1, micro_batches + 3)) - set(fitting):
        with pytest.raises(ConfigError, match=f"world size {world_size} .* expected a world size of {named}$"):
            require_whole_subtrees(micro_batches, world_size)


@pytest.mark.parametrize("ranks", [3, 5, 8])
def test_a_run_refuses_world_sizes_that_do_not_fit(ranks):
    tree = {
        "data": {"path": "world", "train": [2013]},
        "train": {"max_steps": 1, "global_batch_size": 24, "micro_batch_size": 2},
        "distributed": {"reduction": "canonical"},
    }
    data = SimpleNamespace(splits={"train": SimpleNamespace(starts=range(100))})
    context = Context(Launch("a test", "a test", world_size=ranks), torch.device("cpu"))
    context.together = lambda phase: nullcontext()  # the other ranks, which raise the same, are not there
    with pytest.raises(ConfigError, match=r"canonical with 12 micro-batches .* expected a world size of 1, 2, 4$"):
        build_plan(config_from_dict(tree), data, context)


def test_a_parameter_that_is_not_used_has_no_part_in_the_sum():
    def body(context):
        model = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(1, 1), "frozen": nn.Linear(2, 1)})
        model["frozen"].requires_grad_(False)
        reduction = CanonicalReduction(model, context, 2)
        for index in range(2):
            with reduction.micro_batch(index):
                # the last micro-batch of the last rank uses nothing else
                if index == 1 and context.rank == context.world_size - 1:
                    model["unused"](torch.full((1, 1), 3.0)).sum().backward()
                else:
                    (model["used"](torch.ones(1, 2)) + model["frozen"](torch.ones(1, 2))).sum().backward()
        reduction.finish()
        assert model["frozen"].weight.grad is None
        return model["used"].bias.grad.item(), model["unused"].weight.grad.item()

    assert on_every_rank(1, body) == [(1.0, 3.0)]
    assert on_every_rank(2, body) == [(3.0, 3.0)] * 2
    weights = Weights()
    reduction = CanonicalReduction(weights, alone(), 1)
    with reduction.micro_batch(0):
        weights.parts[0].sum().backward()
    assert weights.parts[3].grad.count_nonzero() == 0


@pytest.mark.parametrize(
    ("accumulation", "gradients"), [(1, 1), (2, 1), (4, 2), (8, 3), (64, 6), (3, 1), (6, 2), (12, 3)]
)
def test_memory_grows_with_the_logarithm_of_the_accumulation(accumulation, gradients):
    weights = Weights()
    reduction = CanonicalReduction(weights, alone(), accumulation)
    pieces = set()
    for index in range(accumulation):
        with reduction.micro_batch(index):
            pieces |= {part.grad.untyped_storage().data_ptr() for part in weights.parts}
            reduction.forward(torch.ones(LENGTH)).backward()
    assert len(pieces) == gradients


def test_gloo_on_gpus_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    launch = Launch("a test", "a test", rank=1, world_size=2, port=1)
    config = DistributedConfig(backend="gloo", reduction="canonical", setup_timeout_seconds=1)
    with (
        pytest.raises(ConfigError, match=r"distributed\.backend: 'gloo' .* expected nccl or auto"),
        distributed_context(launch, config, torch.device("cuda")),
    ):
        pass


WIDTH = 600
"""A layer has 1.4 MB, more than DDP's first bucket takes."""


class Layers(nn.Module):
    """Four layers with dropout between them, and a buffer."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(4)])
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        for layer in self.layers:
            x = nn.functional.dropout(layer(x), 0.1, self.training)
        return self.scale * x


def warm_up(reduction):
    reduction.warm_up(lambda network: network(torch.zeros(4, WIDTH)).square().sum())


def a_resumed_run_adds_gradients_in_the_same_order(context):
    accumulation = 2

    def train(steps, weights=None):
        torch.manual_seed(0)
        model = Layers()
        if weights is not None:
            model.load_state_dict(weights)
        reduction = DdpReduction(model, context, accumulation)
        warm_up(reduction)
        for step in steps:
            for index in range(accumulation):
                torch.manual_seed(1000 * step + 10 * context.rank + index)
                with reduction.micro_batch(index):
                    reduction.forward(torch.randn(4, WIDTH)).square().mean().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * reduction.finish() * parameter.grad
            model.zero_grad()
        return model.state_dict()

    whole, resumed = train(range(4)), train(range(2, 4), weights=train(range(2)))
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name


def gradients_are_summed_in_several_buckets_in_the_order_in_which_they_are_ready(context):
    model, buckets = Layers(), []
    names = {parameter: name for name, parameter in model.named_parameters()}
    reduction = DdpReduction(model, context, 1)

    def average(state, bucket):
        buckets.append([names[parameter] for parameter in bucket.parameters()])
        done = torch.futures.Future()
        done.set_result(context.all_reduce_sum(bucket.buffer()) / context.world_size)
        return done

    reduction.forward.register_comm_hook(None, average)
    warm_up(reduction)
    buckets.clear()
    ready = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: ready.append(names[parameter]))
    for _ in range(2):
        with reduction.micro_batch(0):
            reduction.forward(torch.ones(4, WIDTH)).sum().backward()
    first, second = buckets[: len(buckets) // 2], buckets[len(buckets) // 2 :]
    assert first == second
    assert len(first) > 1
    assert [name for bucket in buckets for name in bucket] == ready


def the_warm_up_leaves_everything_as_it_was(context):
    torch.manual_seed(0)
    model = Layers()
    before, random = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
    reduction = DdpReduction(model, context, 3)
    warm_up(reduction)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def a_parameter_that_the_loss_does_not_use_is_named(context):
    model = Layers()
    model.forgotten = nn.Linear(2, 1, bias=False)
    model.frozen = nn.Linear(2, 1).requires_grad_(False)
    with pytest.raises(ValueError, match=r"^parameters without a gradient: forgotten\.weight: expected"):
        warm_up(DdpReduction(model, context, 2))


def a_compiled_model_is_cut_at_the_buckets(context):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.manual_seed(0)
    plain, gradients = Layers().eval(), []
    compiled = copy.deepcopy(plain)
    compiled.compile(backend=count)
    with torch.inference_mode():
        compiled(torch.ones(4, WIDTH))
    assert len(graphs) == 1  # in an evaluation there are no buckets
    for model in (plain, compiled):
        reduction = DdpReduction(model, context, 1)
        warm_up(reduction)
        with reduction.micro_batch(0):
            reduction.forward(torch.ones(4, WIDTH)).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert len(graphs) > 2
    for name, gradient in gradients[0].items():  # the names are those of the model alone
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-5)


def ddp_keeps_its_promises(context):
    a_resumed_run_adds_gradients_in_the_same_order(context)
    gradients_are_summed_in_several_buckets_in_the_order_in_which_they_are_ready(context)
    the_warm_up_leaves_everything_as_it_was(context)
    a_parameter_that_the_loss_does_not_use_is_named(context)
    a_compiled_model_is_cut_at_the_buckets(context)


def test_ddp_between_three_processes(store_port):
    run_on_ranks(store_port, ddp_keeps_its_promises)
