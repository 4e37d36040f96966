import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from topoflow.model.embedding import (
    PatchEmbedding,
    VariableAggregation,
    sincos_1d,
    sincos_2d,
    split_patches,
    unpatchify,
)


def random_aggregation(embed_dim, num_heads, dtype):
    """Our aggregation and torch's attention with the same random weights, biases included."""
    reference = nn.MultiheadAttention(embed_dim, num_heads, batch_first=True, dtype=dtype)
    for parameter in reference.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours = VariableAggregation(embed_dim, num_heads).to(dtype)
    ours.load_state_dict(reference.state_dict())  # strict: the names and shapes are the same
    return ours, reference


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_aggregation_is_multihead_attention(dtype, tolerance):
    torch.manual_seed(0)
    B, N, V, D = 2, 6, 5, 32
    ours, reference = random_aggregation(D, 4, dtype)
    query = torch.randn(1, 1, D, dtype=dtype, requires_grad=True)
    tokens = torch.randn(B, N, V, D, dtype=dtype, requires_grad=True)
    seed = torch.randn(B, N, D, dtype=dtype)

    flat = tokens.flatten(0, 1)
    expected = reference(query.expand(B * N, 1, D), flat, flat, need_weights=False)[0].reshape(B, N, D)
    expected_grads = torch.autograd.grad(expected, [query, tokens, *reference.parameters()], seed)
    actual = ours(query, tokens, torch.eye(D, dtype=dtype).expand(V, D, D))
    actual_grads = torch.autograd.grad(actual, [query, tokens, *ours.parameters()], seed)

    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in reference.named_parameters()]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    for ours_grad, expected_grad in zip(actual_grads, expected_grads, strict=True):
        torch.testing.assert_close(ours_grad, expected_grad, rtol=tolerance, atol=tolerance)


def embed(x, embedding, var_embed, aggregation, query, patch_size):
    patches = F.pad(split_patches(x, patch_size), (0, 1), value=1.0)
    return aggregation(query, patches, embedding(var_embed))


def test_embedding_and_aggregation_are_convolution_and_multihead_attention():
    torch.manual_seed(1)
    B, V, H, W, D, p = 2, 3, 4, 8, 16, 2
    aggregation, reference = random_aggregation(D, 2, torch.float32)
    embedding = PatchEmbedding(V, p, D)
    weights = [nn.init.normal_(embedding.proj_weights), nn.init.normal_(embedding.proj_biases)]
    x, var_embed, query = [torch.randn(s, requires_grad=True) for s in ([B, V, H, W], [1, V, D], [1, 1, D])]
    seed = torch.randn(B, 8, D)

    tokens = F.conv2d(x, weights[0].flatten(0, 1), weights[1].flatten(), stride=p, groups=V)
    tokens = tokens.reshape(B, V, D, 8).permute(0, 3, 1, 2) + var_embed  # [B, N, V, D]
    flat = tokens.flatten(0, 1)
    expected = reference(query.expand(B * 8, 1, D), flat, flat, need_weights=False)[0].reshape(B, 8, D)
    expected_grads = torch.autograd.grad(expected, [x, var_embed, query, *weights, *reference.parameters()], seed)
    actual = embed(x, embedding, var_embed, aggregation, query, p)
    actual_grads = torch.autograd.grad(actual, [x, var_embed, query, *weights, *aggregation.parameters()], seed)

    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    for ours_grad, expected_grad in zip(actual_grads, expected_grads, strict=True):
        torch.testing.assert_close(ours_grad, expected_grad, rtol=1e-5, atol=2e-5)


def test_tokens_of_single_variables_are_never_kept():
    B, V, H, W, D, p = 1, 15, 8, 16, 64, 2
    aggregation, embedding = VariableAggregation(D, 4), PatchEmbedding(V, p, D)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        embed(torch.randn(B, V, H, W), embedding, torch.randn(1, V, D), aggregation, torch.randn(1, 1, D), p)
    assert max(saved) < B * V * (H // p) * (W // p) * D / 2


def test_patches_are_those_of_unfold():
    x = torch.randn(2, 3, 6, 9)
    expected = F.unfold(x, kernel_size=3, stride=3).reshape(2, 3, 9, 6).permute(0, 3, 1, 2)
    assert torch.equal(split_patches(x, 3), expected)


def test_unpatchify_orders_features_row_column_variable():
    h, w, p, T = 2, 3, 2, 5
    tokens = torch.randn(1, h * w, p * p * T)
    fields = unpatchify(tokens, (h, w), p)
    assert fields.shape == (1, T, h * p, w * p)
    for t in range(T):
        for row in range(h * p):
            for column in range(w * p):
                token = (row // p) * w + column // p
                feature = ((row % p) * p + column % p) * T + t
                assert fields[0, t, row, column] == tokens[0, token, feature]


def test_sincos_values():
    features = sincos_1d(4, torch.tensor([0.0, 3.0]))
    expected = [[0, 0, 1, 1], [math.sin(3), math.sin(0.03), math.cos(3), math.cos(0.03)]]
    torch.testing.assert_close(features, torch.tensor(expected, dtype=torch.float64))


def test_sincos_positions_encode_column_then_row():
    features = sincos_2d(8, (3, 5))
    row, column = 2, 4
    expected = torch.cat([sincos_1d(4, torch.tensor([column])), sincos_1d(4, torch.tensor([row]))], dim=1)[0]
    assert features.shape == (15, 8)
    assert torch.equal(features[row * 5 + column], expected)
