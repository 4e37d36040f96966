"""The transformer block: pre-norm attention and MLP, the function of timm's ViT `Block` with the same names."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from topoflow.model.linear import Linear
from topoflow.model.tiled_attention import tiled_attention

LARGEST_TILED_HEAD = 64
"""Channels of a head; of 96, torch's own backward pass takes as long as ours, and less where the machine is shared."""


class Attention(nn.Module):
    """Multi-head self-attention; drop_rate applies to the attention weights and to the projection.

    rel_pos_bias, if given, returns what position adds to the scores of each head, [heads, N, N].
    """

    def __init__(self, embed_dim: int, num_heads: int, drop_rate: float, rel_pos_bias: nn.Module | None = None):
        super().__init__()
        self.num_heads = num_heads
        self.drop_rate = drop_rate
        self.qkv = Linear(embed_dim, 3 * embed_dim)
        self.proj = Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(drop_rate)
        self.rel_pos_bias = rel_pos_bias

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        """x [B, N, D] -> [B, N, D]; context is what the kind of attention looks at beside the tokens."""
        B, N, D = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each [B, heads, N, D/heads]
        x = self._attend(q, k, v, self.drop_rate if self.training else 0.0, *context)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, N, D)))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, drop_rate: float) -> Tensor:
        """q, k, v [B, heads, N, D/heads], drop_rate of the weights -> [B, heads, N, D/heads]."""
        if self.rel_pos_bias is not None:
            return attend_with_bias(q, k, v, drop_rate, self.rel_pos_bias())
        # torch's fused attention has dropout on GPUs alone, and on CPU a slower backward pass for narrow heads
        is_slower = q.dtype == torch.float32 and q.shape[-1] <= LARGEST_TILED_HEAD
        if q.device.type == "cpu" and (drop_rate or is_slower):
            return tiled_attention(q, k, v, drop_rate=drop_rate)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=drop_rate)


def attend_with_bias(q: Tensor, k: Tensor, v: Tensor, drop_rate: float, bias: Tensor) -> Tensor:
    """q, k, v [B, heads, N, d], bias [heads, N, N] or [N, N] added to the scores [query, key] -> [B, heads, N, d].

    A bias with a gradient takes torch's plain path, in memory of several [B, heads, N, N]: imported weights alone do.
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), dropout_p=drop_rate)


class Mlp(nn.Module):
    """Two linear layers with GELU between, dropout after each."""

    def __init__(self, embed_dim: int, hidden_dim: int, drop_rate: float):
        super().__init__()
        self.fc1 = Linear(embed_dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, embed_dim)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Stochastic depth (arXiv 1603.09382): each sample of x [B, N, D] is zeroed at this rate, the others scaled up."""
    if rate == 0.0 or not training:
        return x
    keep = torch.empty(x.shape[0], 1, 1, dtype=x.dtype, device=x.device).bernoulli_(1.0 - rate)
    return x * (keep / (1.0 - rate))


class Block(nn.Module):
    """Pre-norm transformer block around the attention that it is given."""

    def __init__(self, attn: nn.Module, embed_dim: int, mlp_ratio: float, drop_rate: float, drop_path_rate: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim)
        self.attn = attn
        self.norm2 = nn.LayerNorm(embed_dim)
        self.mlp = Mlp(embed_dim, int(embed_dim * mlp_ratio), drop_rate)
        self.drop_path_rate = drop_path_rate

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        """x [B, N, D] -> [B, N, D]; context is passed on to the attention."""
        x = x + drop_path(self.attn(self.norm1(x), *context), self.drop_path_rate, self.training)
        return x + drop_path(self.mlp(self.norm2(x)), self.drop_path_rate, self.training)
