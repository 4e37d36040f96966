"""Multi-head self-attention with torch's fused kernels, and the transformer block: timm's ViT `Block`, same names.

Biases may be added to the scores (`topoflow.model.bias`). The kernels do not compute the gradient of a bias, but one
more forward pass gives that of a strength s. With b the bias, c >= 0 minus its derivative by s, p the softmax and
out = p v,

    d out_i / d s = -lambda_i (m_i - out_i),    lambda_i = sum_j p_ij c_ij,    m_i = sum_j p_ij c_ij v_j / lambda_i.

m is what the kernel returns for the bias b + log c, and log lambda_i the difference of the two log-sum-exps.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from topoflow.model.bias import ScoreBias

QUERIES_AT_ONCE = 1024
"""Number of queries whose bias is formed at once on CPU. Below 768, torch's kernel uses smaller, slower blocks."""

ScoreFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(sample, head, query, key) -> bias of the score at that place."""

Kernel = Callable[[Tensor, Tensor, Tensor, ScoreFunction], tuple[Tensor, Tensor]]
"""(q, k, v, added) -> (output [B, heads, N, d], log-sum-exp of the scores [B, heads, N]), with gradients of q, k, v."""


class Attention(nn.Module):
    """Multi-head self-attention with dropout on the projection.

    For imported weights: attn_drop_rate drops attention weights; rel_pos_bias returns a bias [heads, N, N] with a
    gradient. These, and biases on a GPU with flex=False, use torch's plain path, which needs several [B, heads, N, N].
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        drop_rate: float,
        attn_drop_rate: float = 0.0,
        rel_pos_bias: nn.Module | None = None,
        flex: bool = True,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.attn_drop_rate = attn_drop_rate
        self.flex = flex
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(drop_rate)
        self.rel_pos_bias = rel_pos_bias

    def forward(self, x: Tensor, *biases: ScoreBias) -> Tensor:
        """Attend: x [B, N, D] -> [B, N, D], with the sum of the biases added to the scores."""
        B, N, D = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each [B, heads, N, D/heads]
        drop_rate = self.attn_drop_rate if self.training else 0.0
        if self.rel_pos_bias is not None or (biases and (drop_rate or not (x.device.type == "cpu" or self.flex))):
            mask = _rows(_sum_of(biases), q, slice(0, N)) if biases else q.new_zeros(())
            if self.rel_pos_bias is not None:
                mask = mask + self.rel_pos_bias()
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype), dropout_p=drop_rate)
        elif biases:
            x = attend_with_biases(q, k, v, biases, cpu_kernel if x.device.type == "cpu" else compiled_flex_kernel())
        else:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=drop_rate)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, N, D)))


def attend_with_biases(q: Tensor, k: Tensor, v: Tensor, biases: Sequence[ScoreBias], kernel: Kernel) -> Tensor:
    """Return softmax(q k^T / sqrt(d) + biases) v, with gradients of q, k, v and of the strengths of the biases.

    q, k, v [B, heads, N, d] of one dtype -> [B, heads, N, d]. kernel: `cpu_kernel` or `compiled_flex_kernel()`.
    """
    constants = [bias.detached() for bias in biases]
    out, lse = kernel(q, k, v, _sum_of(constants))
    strengths = [strength for bias in biases for strength in bias.strengths]
    if not (torch.is_grad_enabled() and any(strength.requires_grad for strength in strengths)):
        return out
    results = (out.detach(), lse.detach(), q.detach(), k.detach(), v.detach())
    return _WithStrengthGradients.apply(out, *results, constants, kernel, *strengths)


def _sum_of(biases: Sequence[ScoreBias]) -> ScoreFunction:
    def added(*place: Tensor) -> Tensor:
        return functools.reduce(torch.add, [bias.added(*place) for bias in biases])

    return added


def _with_log_slope(biases: Sequence[ScoreBias], bias: ScoreBias, number: int) -> ScoreFunction:
    """Return b + log c for a strength of one of the biases, given by its number among that bias's strengths."""

    def added(*place: Tensor) -> Tensor:
        slope = bias.slopes(*place)[number]
        # log 0 would be -inf, and kernels differ in what they return for a query whose scores are all -inf. A weight
        # of 1e-38 is lost in every sum, and a query without slopes gets a lambda that is as small.
        return _sum_of(biases)(*place) + slope.clamp(min=torch.finfo(torch.float32).tiny).log()

    return added


class _WithStrengthGradients(torch.autograd.Function):
    """Return `out` unchanged; in the backward pass, compute the gradients of the strengths too."""

    @staticmethod
    def forward(ctx, out: Tensor, values: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest) -> Tensor:
        ctx.biases, ctx.kernel = rest[:2]
        ctx.save_for_backward(values, lse, q, k, v)
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  (torch: *grads)
        out, lse, q, k, v = ctx.saved_tensors
        grads = []
        for bias in ctx.biases:
            for number, strength in enumerate(bias.strengths):
                means, lse_slope = ctx.kernel(q, k, v, _with_log_slope(ctx.biases, bias, number))
                change = (grad.to(lse.dtype) * (out.to(lse.dtype) - means)).sum(dim=-1)  # [B, heads, N]
                change = (lse_slope - lse).exp() * change
                grads.append(change.double().sum_to_size(strength.shape).to(strength.dtype))
        return grad, *[None] * 7, *grads


def _rows(added: ScoreFunction, q: Tensor, queries: slice) -> Tensor:
    """Return the bias of the scores of these queries: [B or 1, heads or 1, queries, N]."""
    B, heads, N, _ = q.shape
    samples, head, place = (torch.arange(length, device=q.device) for length in (B, heads, N))
    rows = added(samples.view(B, 1, 1, 1), head.view(heads, 1, 1), place[queries, None], place)
    rows = rows.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
    return rows.expand(*[1] * (4 - rows.dim()), *rows.shape[:-2], len(place[queries]), N)


def cpu_kernel(q: Tensor, k: Tensor, v: Tensor, added: ScoreFunction) -> tuple[Tensor, Tensor]:
    """Attend by the kernel of F.scaled_dot_product_attention on CPU, forming the bias in chunks of queries."""
    return _CpuKernel.apply(q, k, v, added)


class _CpuKernel(torch.autograd.Function):
    """torch has no public function that returns the log-sum-exp on CPU, nor one that recomputes a bias in the backward
    pass instead of keeping it, so the operators below F.scaled_dot_product_attention are called here."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, added: ScoreFunction) -> tuple[Tensor, Tensor]:
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        chunks = [attend(q[:, :, c], k, v, attn_mask=_rows(added, q, c)) for c in _chunks(q)]
        out, lse = (
            torch.cat([part.transpose(1, 2) for part in parts], 1).transpose(1, 2)
            for parts in zip(*chunks, strict=True)
        )
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.added = added
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  (torch: *grads)
        q, k, v, out, lse = ctx.saved_tensors
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grad_q, grad_k, grad_v = [], torch.zeros_like(k), torch.zeros_like(v)
        for c in _chunks(q):
            rows = [tensor[:, :, c] for tensor in (out, lse)]
            part = backward(grad[:, :, c], q[:, :, c], k, v, *rows, 0.0, False, attn_mask=_rows(ctx.added, q, c))
            grad_q.append(part[0])
            grad_k += part[1]
            grad_v += part[2]
        return torch.cat(grad_q, dim=2), grad_k, grad_v, None


def _chunks(q: Tensor) -> list[slice]:
    N = q.shape[2]
    return [slice(start, min(start + QUERIES_AT_ONCE, N)) for start in range(0, N, QUERIES_AT_ONCE)]


def flex_kernel(q: Tensor, k: Tensor, v: Tensor, added: ScoreFunction) -> tuple[Tensor, Tensor]:
    """Attend by FlexAttention (arXiv 2412.05496), in which the bias is part of the score: for GPUs, compiled.

    It could also compute the gradient of a captured strength, but with an atomic addition from each score to one
    address, which is slow and in no fixed order (torch 2.13). So `added` must depend only on constants.
    """
    # imported here, because it imports torch's compiler, which takes seconds
    from torch.nn.attention import flex_attention as flex

    def score_mod(score: Tensor, *place: Tensor) -> Tensor:
        return score + added(*place)

    if hasattr(flex, "AuxRequest"):  # torch 2.9
        out, auxiliary = flex.flex_attention(q, k, v, score_mod=score_mod, return_aux=flex.AuxRequest(lse=True))
        return out, auxiliary.lse  # pyright: ignore[reportReturnType]  (a Tensor, as requested)
    return flex.flex_attention(q, k, v, score_mod=score_mod, return_lse=True)


@functools.cache
def compiled_flex_kernel() -> Kernel:
    """Return `flex_kernel`, to be compiled in its first call."""
    return torch.compile(flex_kernel)


class Mlp(nn.Module):
    """Two linear layers with GELU between, dropout after each."""

    def __init__(self, embed_dim: int, hidden_dim: int, drop_rate: float):
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, embed_dim)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., D] -> [..., D]."""
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Zero each sample of x [B, N, D] at this rate and scale the others up (stochastic depth, arXiv 1603.09382)."""
    if rate == 0.0 or not training:
        return x
    keep = torch.empty(x.shape[0], 1, 1, dtype=x.dtype, device=x.device).bernoulli_(1.0 - rate)
    return x * (keep / (1.0 - rate))


class Block(nn.Module):
    """Pre-norm transformer block around a given attention module."""

    def __init__(self, attn: nn.Module, embed_dim: int, mlp_ratio: float, drop_rate: float, drop_path_rate: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim)
        self.attn = attn
        self.norm2 = nn.LayerNorm(embed_dim)
        self.mlp = Mlp(embed_dim, int(embed_dim * mlp_ratio), drop_rate)
        self.drop_path_rate = drop_path_rate

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        """Map x [B, N, D] -> [B, N, D]; context is passed to the attention."""
        x = x + drop_path(self.attn(self.norm1(x), *context), self.drop_path_rate, self.training)
        return x + drop_path(self.mlp(self.norm2(x)), self.drop_path_rate, self.training)
