"""The linear layer is torch's, whoever multiplies."""

import pytest
import torch
from torch import nn

from topoflow.model import linear
from topoflow.model.linear import Linear

pytestmark = pytest.mark.skipif(not linear._HAS_ONEDNN, reason="this build of torch is without oneDNN")


@pytest.fixture
def layers():
    """Ours, large enough for oneDNN, and torch's, with the same weights."""
    ours, reference = Linear(320, 256), nn.Linear(320, 256)
    reference.load_state_dict(ours.state_dict())
    return ours, reference


@pytest.fixture
def products(monkeypatch):
    """Shapes of the weights that oneDNN has multiplied by."""
    seen, multiply = [], linear._multiply

    def note(x, weight, bias):
        seen.append(tuple(weight.shape))
        return multiply(x, weight, bias)

    monkeypatch.setattr(linear, "_multiply", note)
    return seen


def outputs_and_gradients(layer, x, seed):
    y = layer(x)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], seed)]


@pytest.mark.parametrize("kind", ["contiguous", "strided", "expanded gradient"])
def test_values_and_gradients_are_torchs(layers, products, kind):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 7, 320, generator=generator)
    seed = torch.randn(3, 7, 256, generator=generator)
    if kind == "strided":
        x, seed = x.transpose(0, 1), seed.transpose(0, 1)
    if kind == "expanded gradient":
        seed = seed[:, :1].expand(3, 7, 256)
    x.requires_grad_()
    expected = outputs_and_gradients(layers[1], x, seed)
    for ours, theirs in zip(outputs_and_gradients(layers[0], x, seed), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert products == [(256, 320), (320, 256)]


def test_no_gradient_is_made_that_is_not_asked_for(layers, products):
    layer = layers[0].requires_grad_(False)
    layer.bias.requires_grad_()
    layer(torch.randn(5, 320)).sum().backward()
    assert layer.bias.grad.tolist() == [5.0] * 256
    assert layer.weight.grad is None
    assert products == [(256, 320)]


def test_a_row_has_the_same_bits_in_any_batch(layers):
    x = torch.randn(64, 320, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = layers[0](x)
        assert torch.equal(whole, layers[0](x))
        for rows in (16, 32):
            assert torch.equal(whole[:rows], layers[0](x[:rows]))


def test_what_is_small_or_of_another_type_is_left_to_torch(layers, products):
    with torch.autocast("cpu", torch.bfloat16):
        assert layers[0](torch.randn(5, 320)).dtype == torch.bfloat16
    layers[0].double()(torch.randn(5, 320, dtype=torch.float64))
    Linear(16, 16)(torch.randn(5, 16))
    assert products == []
