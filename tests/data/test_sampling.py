"""The order of samples, its division among ranks, and the loaders."""

import itertools
import time
import tracemalloc

import numpy as np
import pytest
import torch

from tests.support.prepared import write_prepared
from topoflow.data.dataset import ForecastDataset
from topoflow.data.normalization import Normalization
from topoflow.data.prepared.reader import PreparedData, index_prepared
from topoflow.data.sampling import BatchPlan, TrainBatches, build_eval_loader, build_train_loader
from topoflow.errors import ConfigError, DataError


def plan_of(num_samples=50, seed=3, global_batch_size=8, micro_batch_size=2, rank=0, world_size=1):
    return BatchPlan(num_samples, seed, global_batch_size, micro_batch_size, rank, world_size)


def global_batches(world_size, epoch=0, first_step=0):
    """Return the global batch of each step, assembled from those of the ranks."""
    ranks = [plan_of(rank=rank, world_size=world_size) for rank in range(world_size)]
    taken = [list(plan.micro_batches(epoch, first_step)) for plan in ranks]
    accumulation = ranks[0].accumulation
    return [
        [i for rank in taken for batch in rank[step * accumulation : (step + 1) * accumulation] for i in batch]
        for step in range(len(taken[0]) // accumulation)
    ]


def test_no_sample_twice_and_none_lost_but_the_tail():
    plan = plan_of()
    assert (plan.steps_per_epoch, plan.dropped, plan.accumulation) == (6, 2, 4)
    batches = list(plan.micro_batches(0))
    assert len(batches) == 24
    taken = [i for batch in batches for i in batch]
    assert len(set(taken)) == len(taken) == 48
    assert set(taken) < set(range(50))
    assert all(type(i) is int for i in taken)


def test_order_is_a_permutation_that_changes_with_epoch_and_seed():
    orders = [plan_of(seed=seed).order(epoch) for seed in (3, 4, 2**63 - 1, 3 + 2**32) for epoch in (0, 1, 7)]
    for order in orders:
        assert order.dtype == np.int64
        np.testing.assert_array_equal(np.sort(order), np.arange(50))
    assert len({order.tobytes() for order in orders}) == len(orders)
    np.testing.assert_array_equal(plan_of().order(7), plan_of().order(7))


def test_order_never_changes():
    # NumPy keeps the stream of Philox; another order here would break every resume
    assert plan_of(num_samples=12, seed=3).order(1).tolist() == [8, 0, 6, 11, 5, 3, 9, 4, 1, 2, 7, 10]


def test_order_is_uniform():
    places = np.array([np.flatnonzero(plan_of(num_samples=20).order(epoch) == 0)[0] for epoch in range(2000)])
    counts = np.bincount(places, minlength=20)
    assert np.sum((counts - 100) ** 2 / 100) < 43.8  # chi-squared, 19 degrees of freedom, p = 0.001


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_global_batches_do_not_depend_on_the_number_of_ranks(world_size):
    for epoch in (0, 1):
        order = plan_of().order(epoch).tolist()
        assert global_batches(world_size, epoch) == [order[8 * step : 8 * step + 8] for step in range(6)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_an_epoch_continues_at_any_step(world_size):
    assert global_batches(world_size, epoch=2, first_step=4) == global_batches(world_size, epoch=2)[4:]
    assert global_batches(world_size, epoch=2, first_step=6) == []


def test_batches_continue_from_epoch_to_epoch():
    plan = plan_of(rank=1, world_size=2)
    batches = itertools.islice(TrainBatches(plan, epoch=3, first_step=4), 2 * 2 + 12 + 12 + 1)
    expected = [*plan.micro_batches(3, 4), *plan.micro_batches(4), *plan.micro_batches(5), next(plan.micro_batches(6))]
    assert list(batches) == expected


def test_the_order_takes_a_few_bytes_per_sample():
    """A list of all batches of an epoch would take about 70."""

    def held(num_samples):
        tracemalloc.start()
        batches = iter(TrainBatches(plan_of(num_samples=num_samples), 0, 0))
        next(batches)
        bytes_held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return bytes_held

    assert (held(400_000) - held(100_000)) / 300_000 <= 8.1


def test_world_sizes_that_do_not_divide_are_refused_with_those_that_do():
    with pytest.raises(
        ConfigError, match=r"world size 5 .*global_batch_size = 24.*expected a world size of 1, 2, 3, 4, 6, 12"
    ):
        plan_of(global_batch_size=24, rank=0, world_size=5)
    with pytest.raises(ConfigError, match=r"train.global_batch_size: 9 .*micro_batch_size = 2"):
        plan_of(global_batch_size=9)


def test_too_few_samples_are_refused_with_both_numbers():
    with pytest.raises(ConfigError, match=r"7 samples.*train.global_batch_size = 8"):
        plan_of(num_samples=7)
    assert plan_of(num_samples=8).steps_per_epoch == 1


# --- loaders ----------------------------------------------------------------------------------------------------------

NAMES = ("u", "v", "pm25", "co", "elevation", "population")
NORMALIZATION = Normalization(dict.fromkeys(NAMES, 1.0), dict.fromkeys(NAMES, 2.0))


@pytest.fixture
def build(make_fields, make_config, tmp_path):
    """Return a data set of 50 samples."""

    def build_dataset(dtype="float32"):
        folder = write_prepared(make_fields(), tmp_path / dtype, dtype)
        data = PreparedData(index_prepared(str(folder)))
        return ForecastDataset(data, NORMALIZATION, np.arange(25), make_config(folder), with_wind=True)

    return build_dataset


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_loaded_batches_are_the_samples_of_the_plan(build, dtype, threads):
    dataset = build(dtype)
    plan = plan_of(rank=1, world_size=2)
    wanted = [*plan.micro_batches(1, first_step=2), *plan.micro_batches(2), *plan.micro_batches(3)]
    endless = build_train_loader(dataset, plan, epoch=1, first_step=2, threads=threads)
    batches = list(itertools.islice(endless, len(wanted)))
    assert [batch["index"].tolist() for batch in batches] == wanted
    for batch, indices in zip(batches, wanted, strict=True):
        for row, i in enumerate(indices):
            sample = dataset[i]
            assert sample.keys() == batch.keys()
            assert all(torch.equal(batch[name][row], sample[name]) for name in sample)


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_counts_every_sample_once(build, world_size, threads):
    dataset = build()
    seen = {}
    for rank in range(world_size):
        loader = build_eval_loader(dataset, 7, rank, world_size, threads)
        pairs = [(index, batch["index"].tolist()) for index, batch in loader]
        assert len(pairs) == len(loader)
        assert all(index % world_size == rank for index, _ in pairs)
        seen.update(pairs)
    assert seen == {j: list(range(7 * j, min(7 * j + 7, 50))) for j in range(8)}


def test_a_rank_may_have_no_evaluation_batches(build):
    assert list(build_eval_loader(build(), 50, rank=1, world_size=2)) == []


def test_the_micro_batches_of_a_whole_step_are_loaded_in_advance(build, monkeypatch):
    dataset, filled, plan = build(), [], plan_of()
    fill = dataset.fill
    monkeypatch.setattr(dataset, "fill", lambda indices, batch: fill(indices, batch) or filled.append(indices))
    batches = iter(build_train_loader(dataset, plan, epoch=0, threads=1))
    for _ in range(plan.accumulation):  # of the first step
        next(batches)
    deadline = time.monotonic() + 10
    while len(filled) < 2 * plan.accumulation and time.monotonic() < deadline:
        time.sleep(0.002)
    assert filled == list(itertools.islice(plan.micro_batches(0), 2 * plan.accumulation))


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_loading_leaves_the_global_random_state_alone(build, threads):
    dataset = build()
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(itertools.islice(build_train_loader(dataset, plan_of(), epoch=0, threads=threads), 24))
    list(build_eval_loader(dataset, 7, threads=threads))
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_before)


@pytest.mark.parametrize("threads", [0, 1])
def test_a_refusal_in_a_thread_is_raised_unchanged(build, threads):
    dataset = build()

    def refuse(names, index):
        raise DataError("data.path: gone")

    dataset.data.at = refuse
    with pytest.raises(DataError) as refusal:
        list(build_train_loader(dataset, plan_of(), epoch=0, threads=threads))
    assert str(refusal.value) == "data.path: gone"
