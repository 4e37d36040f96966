"""Compare fingerprints with the formula in Python integers, and test which changes they detect."""

import pytest
import torch

from topoflow.checkpoint.fingerprint import CHUNK, fingerprints, state_tensors, tensor_fingerprint
from topoflow.config import OptimConfig
from topoflow.optim import build_optimizer


def splitmix64(index):
    """Entry `index` of the generator that starts at 0 (Steele, Lea and Flood 2014), made odd."""
    z = (index + 1) * 0x9E3779B97F4A7C15 % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return (z ^ (z >> 31)) | 1


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.randn(CHUNK + 100, generator=torch.Generator().manual_seed(0)), torch.int32),
        (torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), torch.int64),
        (torch.randn(7, generator=torch.Generator().manual_seed(2)).bfloat16(), torch.int16),
        (torch.tensor([True, False, True]), torch.uint8),
        (torch.tensor(3.0), torch.int32),
        (torch.arange(12.0).reshape(3, 4).t(), torch.int32),
    ],
)
def test_the_sum_is_that_of_the_formula(tensor, words):
    values = tensor.contiguous().reshape(-1).view(words).tolist()
    total = 0
    for position, word in enumerate(values):
        chunk, place = divmod(position, CHUNK)
        total += splitmix64(place) * splitmix64(CHUNK + chunk) * word
    assert tensor_fingerprint(tensor).item() % 2**64 == total % 2**64


def test_any_single_changed_bit_is_noticed():
    tensor = torch.randn(50, generator=torch.Generator().manual_seed(0))
    before = tensor_fingerprint(tensor).item()
    for element in range(50):
        for bit in range(32):
            changed = tensor.clone()
            changed.view(torch.int32)[element] ^= 1 << bit if bit < 31 else -(2**31)
            assert tensor_fingerprint(changed).item() != before


@pytest.mark.parametrize("places", [(0, 1), (3, CHUNK + 3), (5, 2 * CHUNK + 9)])
def test_two_swapped_elements_are_noticed(places):
    tensor = torch.randn(2 * CHUNK + 10, generator=torch.Generator().manual_seed(0))
    swapped = tensor.clone()
    swapped[list(places)] = tensor[list(reversed(places))]
    assert tensor_fingerprint(swapped).item() != tensor_fingerprint(tensor).item()


def test_zero_and_minus_zero_empty_and_reshaped_differ_or_are_told_apart():
    zeros = torch.zeros(4)
    prints = fingerprints({"a": zeros, "b": -zeros, "c": zeros.reshape(2, 2), "d": zeros.double(), "e": zeros[:0]})
    assert len(set(prints.values())) == 5


def test_the_tensors_of_a_state_are_named():
    model = torch.nn.BatchNorm1d(2)
    model.register_buffer("derived", torch.ones(1), persistent=False)
    optimizer = build_optimizer(model, OptimConfig())
    held = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert set(state_tensors(model, optimizer, persistent=True)) == held
    assert set(state_tensors(model, optimizer, persistent=False)) == held | {"derived"}
    model(torch.randn(3, 2)).sum().backward()
    optimizer.step()
    moments = {f"{key} of {name}" for key in ("step", "exp_avg", "exp_avg_sq") for name in ("weight", "bias")}
    assert set(state_tensors(model, optimizer, persistent=True)) == held | moments


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gives_the_same():
    tensor = torch.randn(3 * CHUNK + 5, generator=torch.Generator().manual_seed(0))
    assert tensor_fingerprint(tensor.cuda()).item() == tensor_fingerprint(tensor).item()
