import copy
import sys
import types

import pytest
import torch
from torch import nn

from topoflow.model.attention import Attention, Block, drop_path


@pytest.fixture(scope="module")
def timm_block():
    """timm's Block. It imports torchvision, whose operators do not load with a CPU build of torch (PyPI's wheel is
    linked to CUDA); none of them is used here, so the registration that fails is skipped."""
    name = "torchvision._meta_registrations"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, name, types.ModuleType(name))
        from timm.models.vision_transformer import Block

        yield Block


def same_blocks(timm_block, drop_rate=0.0, drop_path_rate=0.0):
    torch.manual_seed(0)
    D, heads = 32, 4
    options = {"proj_drop": drop_rate, "attn_drop": 0.0, "drop_path": drop_path_rate}
    reference = timm_block(D, heads, mlp_ratio=4.0, qkv_bias=True, norm_layer=nn.LayerNorm, **options)
    for parameter in reference.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = Block(Attention(D, heads, drop_rate), D, 4.0, drop_rate, drop_path_rate)
    ours.load_state_dict(reference.state_dict())  # strict: the names and shapes are the same
    return ours, reference


def outputs_and_gradients(block, x, seed):
    torch.manual_seed(7)  # of the dropout
    y = block(x)
    return [y, *torch.autograd.grad(y, [x, *block.parameters()], seed)]


@pytest.mark.parametrize(("drop_rate", "drop_path_rate"), [(0.0, 0.0), (0.3, 0.0), (0.2, 0.5)])
def test_block_is_timms_block(timm_block, drop_rate, drop_path_rate):
    # in training mode with the same random state: dropouts are in the same places and draw in the same order
    ours, reference = same_blocks(timm_block, drop_rate, drop_path_rate)
    x, seed = torch.randn(6, 10, 32, requires_grad=True), torch.randn(6, 10, 32)
    for modes in (True, False):
        expected = outputs_and_gradients(reference.train(modes), x, seed)
        actual = outputs_and_gradients(ours.train(modes), x, seed)
        for ours_value, expected_value in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours_value, expected_value, rtol=1e-5, atol=1e-5)


def test_values_and_gradients_are_those_of_the_formula_in_float64():
    torch.manual_seed(0)
    B, N, D, heads = 2, 40, 32, 4
    attention, x, seed = Attention(D, heads, drop_rate=0.0), torch.randn(B, N, D), torch.randn(B, N, D)
    x.requires_grad_()
    actual = outputs_and_gradients(attention, x, seed)
    exact, exact_x = copy.deepcopy(attention).double(), x.detach().double().requires_grad_()
    q, k, v = exact.qkv(exact_x).reshape(B, N, 3, heads, D // heads).unbind(2)
    weights = (torch.einsum("bihd,bjhd->bhij", q, k) / (D // heads) ** 0.5).softmax(-1)
    y = exact.proj(torch.einsum("bhij,bjhd->bihd", weights, v).reshape(B, N, D))
    expected = [y, *torch.autograd.grad(y, [exact_x, *exact.parameters()], seed.double())]
    for ours, plain in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.double(), plain, rtol=1e-4, atol=1e-5)


def test_attn_drop_rate_drops_attention_weights_in_training_only():
    torch.manual_seed(0)
    attention, x = Attention(12, 3, drop_rate=0.0, attn_drop_rate=0.5), torch.randn(2, 5, 12)
    attention.eval()
    assert torch.equal(attention(x), attention(x))
    attention.train()
    assert not torch.equal(attention(x), attention(x))


def test_bias_is_added_to_the_scores_of_every_sample():
    torch.manual_seed(0)
    B, N, D, heads = 2, 5, 12, 3
    bias = nn.Parameter(torch.randn(heads, N, N))
    attention = Attention(D, heads, drop_rate=0.0, rel_pos_bias=Constant(bias))
    x = torch.randn(B, N, D)
    q, k, v = attention.qkv(x).reshape(B, N, 3, heads, D // heads).unbind(2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / (D // heads) ** 0.5 + bias
    expected = attention.proj(torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).reshape(B, N, D))
    torch.testing.assert_close(attention(x), expected)


class Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self):
        return self.value


def test_drop_path_drops_whole_samples():
    torch.manual_seed(0)
    x = torch.rand(4000, 2, 3) + 0.5
    y = drop_path(x, 0.25, training=True)
    kept = y.flatten(1).ne(0).all(1)
    assert torch.equal(kept, y.flatten(1).ne(0).any(1))
    torch.testing.assert_close(y[kept], x[kept] / 0.75)
    assert abs(kept.float().mean().item() - 0.75) < 0.03  # 4 standard errors
    assert drop_path(x, 0.25, training=False) is x


def test_nothing_is_drawn_without_dropout():
    block = Block(Attention(8, 2, 0.0), 8, 4.0, 0.0, 0.0).train()
    before = torch.get_rng_state()
    block(torch.ones(1, 3, 8))
    assert torch.equal(torch.get_rng_state(), before)
