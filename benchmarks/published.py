"""The published program's network and training step, reimplemented from its source, for comparison.

Source: github.com/AmmarKheder/TopoFlow, topoflow/{model,topoflow,wind_embed,training}.py (commit 1ab24d8), without its
wind scan. The operations are the same: the same tensors are formed, held as long and kept for the backward pass, so
time and memory of a step are those of the original. Parameters have the original's names.

    python -m benchmarks.published

compares it, in float64 and including gradients, with the implementation that the tests of the Lightning import use.
"""

import math
import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.sizes import DECODER_DEPTH, INPUTS, MLP_RATIO, PATCH_SIZE, TARGETS, Size
from benchmarks.torchvision_operators import without_torchvision_operators
from tests.lightning.restated import Network

with without_torchvision_operators():
    from timm.layers import Mlp
    from timm.models.vision_transformer import Block

NUM_BUCKETS, MAX_DISTANCE, HEIGHT_SCALE = 32, 128, 1000.0


def bucket(offset: Tensor) -> Tensor:
    """Return the bucket of each offset on an axis, query minus key: 16 per sign, exact below 8, then logarithmic."""
    half, exact = NUM_BUCKETS // 2, NUM_BUCKETS // 4
    distance = offset.abs()
    far = exact + (torch.log(distance.float() / exact) / math.log(MAX_DISTANCE / exact) * (half - exact)).long()
    return half * (offset > 0) + torch.where(distance < exact, distance, far.clamp(max=half - 1))


class RelativePositionBias(nn.Module):
    """A learned number for each head and pair of buckets, of columns and of rows."""

    def __init__(self, num_heads: int):
        super().__init__()
        self.bias_table = nn.Parameter(torch.empty(NUM_BUCKETS**2, num_heads))
        nn.init.trunc_normal_(self.bias_table, std=0.02)

    def forward(self, places: Tensor) -> Tensor:
        """Map places [B, N, 2], (column, row) as fractions of the grid, to [B, heads, N, N], anew in every step."""
        columns, rows = (places * MAX_DISTANCE).long().unbind(-1)
        # named and thus held to the end as in the original, where they add to the peak of memory; each [B, N, N]
        across, down = columns[:, :, None] - columns[:, None, :], rows[:, :, None] - rows[:, None, :]
        across_bucket, down_bucket = bucket(across), bucket(down)
        entries = NUM_BUCKETS * across_bucket + down_bucket
        return self.bias_table[entries].permute(0, 3, 1, 2).contiguous()


class TerrainAttention(nn.Module):
    """Attention with explicit scores, biased by relative position and by the height of the key above the query."""

    def __init__(self, embed_dim: int, num_heads: int, relative_position: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(0.0)
        self.rel_pos_bias = RelativePositionBias(num_heads) if relative_position else None
        self.alpha = nn.Parameter(torch.full((1,), 2.0))

    def forward(self, x: Tensor, places: Tensor, heights: Tensor) -> Tensor:
        """Map x [B, N, D], places [B, N, 2], heights [B, N] (of the normalized input) to [B, N, D]."""
        B, N, D = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) * (D // self.num_heads) ** -0.5
        if self.rel_pos_bias is not None:
            scores = scores + self.rel_pos_bias(places)
        climb = F.relu((heights.unsqueeze(1) - heights.unsqueeze(2)) / HEIGHT_SCALE)  # [B, N, N], rows are queries
        damping = torch.clamp(-self.alpha * climb, min=-10.0, max=0.0)
        scores = scores + damping.unsqueeze(1).expand(-1, self.num_heads, -1, -1)
        scores = scores.softmax(dim=-1)
        scores = self.attn_drop(scores)
        return self.proj_drop(self.proj((scores @ v).transpose(1, 2).reshape(B, N, D)))


class TerrainBlock(nn.Module):
    """timm's block around this attention."""

    def __init__(self, embed_dim: int, num_heads: int, relative_position: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim)
        self.attn = TerrainAttention(embed_dim, num_heads, relative_position)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.mlp = Mlp(embed_dim, int(embed_dim * MLP_RATIO))

    def forward(self, x: Tensor, places: Tensor, heights: Tensor) -> Tensor:
        """Map x [B, N, D] to [B, N, D]."""
        x = x + self.attn(self.norm1(x), places, heights)
        return x + self.mlp(self.norm2(x))


class PatchEmbedding(nn.Module):
    """A convolution for each variable, as one grouped convolution, and a norm of each variable's tokens."""

    def __init__(self, num_variables: int, embed_dim: int, normed: bool):
        super().__init__()
        self.proj_weights = nn.Parameter(torch.empty(num_variables, embed_dim, 1, PATCH_SIZE, PATCH_SIZE))
        self.proj_biases = nn.Parameter(torch.zeros(num_variables, embed_dim))
        nn.init.trunc_normal_(self.proj_weights, std=0.02)
        self.norm = nn.LayerNorm(embed_dim) if normed else nn.Identity()

    def forward(self, x: Tensor, variables: Tensor) -> Tensor:
        """Map x [B, V, H, W], variables int64 [V] to tokens [B, V, N, D]."""
        weights, biases = self.proj_weights[variables].flatten(0, 1), self.proj_biases[variables].flatten()
        tokens = F.conv2d(x, weights, biases, stride=PATCH_SIZE, groups=len(variables))  # [B, V*D, rows, columns]
        tokens = tokens.unflatten(1, (len(variables), -1)).flatten(3).transpose(2, 3)
        return self.norm(tokens)


class PublishedNetwork(nn.Module):
    """The network at a size: all its variables are inputs, and it forecasts all of them.

    with_priors=False leaves out relative position and the norm of variables' tokens, which TopoFlow does not have.
    """

    def __init__(self, size: Size, with_priors: bool = True):
        super().__init__()
        self.size = size
        V, D, heads = len(INPUTS), size.embed_dim, size.num_heads
        self.patch_embed = PatchEmbedding(V, D, normed=with_priors)
        self.var_embed = nn.Parameter(torch.randn(1, V, D) * 0.02)
        self.var_query = nn.Parameter(torch.zeros(1, 1, D))
        self.var_agg = nn.MultiheadAttention(D, heads, batch_first=True)
        self.pos_embed = nn.Parameter(torch.randn(1, size.num_patches, D) * 0.02)
        self.lead_time_embed = nn.Linear(1, D)
        plain = (Block(D, heads, MLP_RATIO, qkv_bias=True, norm_layer=nn.LayerNorm) for _ in range(size.depth - 1))
        self.blocks = nn.ModuleList([TerrainBlock(D, heads, relative_position=with_priors), *plain])
        self.norm = nn.LayerNorm(D)
        hidden = [layer for _ in range(DECODER_DEPTH) for layer in (nn.Linear(D, D), nn.GELU())]
        self.head = nn.Sequential(*hidden, nn.Linear(D, V * PATCH_SIZE**2))
        self.register_buffer("variables", torch.arange(V), persistent=False)

    def forward(self, x: Tensor, lead_time_hours: Tensor) -> Tensor:
        """Map x [B, V, H, W] normalized, lead_time_hours [B] to [B, V, H, W]."""
        B, (H, W) = x.shape[0], self.size.grid
        heights = F.avg_pool2d(x[:, INPUTS.index("elevation"), None], PATCH_SIZE).flatten(1)  # [B, N]
        tokens = self.patch_embed(x, self.variables) + self.var_embed[:, self.variables].unsqueeze(2)
        tokens = self._aggregate(tokens) + self.pos_embed
        tokens = tokens + self.lead_time_embed(lead_time_hours.unsqueeze(-1)).unsqueeze(1)
        tokens = self.blocks[0](tokens, self._places().expand(B, -1, -1), heights)
        for block in self.blocks[1:]:
            tokens = block(tokens)
        p = PATCH_SIZE
        fields = self.head(self.norm(tokens)).reshape(B, H // p, W // p, p, p, -1)
        return fields.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, H, W)

    def _aggregate(self, tokens: Tensor) -> Tensor:
        """Map [B, V, N, D] to [B, N, D]. As in the original, attention weights are requested, though not used."""
        B, _, N, _ = tokens.shape
        tokens = tokens.transpose(1, 2).flatten(0, 1)  # [B*N, V, D]
        query = self.var_query.repeat_interleave(B * N, dim=0)
        return self.var_agg(query, tokens, tokens)[0].squeeze(1).unflatten(0, (B, N))

    def _places(self) -> Tensor:
        """Return [1, N, 2]: (column, row) of each patch, as fractions of the grid."""
        rows, columns = (cells // PATCH_SIZE for cells in self.size.grid)
        y, x = torch.meshgrid(torch.arange(rows) / rows, torch.arange(columns) / columns, indexing="ij")
        return torch.stack([x.flatten(), y.flatten()], dim=1).unsqueeze(0)


class PublishedStep:
    """The published training step: masked squared error of the targets, AdamW with one group, no clipping."""

    def __init__(self, size: Size, with_priors: bool = True):
        self.network = PublishedNetwork(size, with_priors).train()
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-4, weight_decay=1e-2)
        self.targets = torch.tensor([INPUTS.index(name) for name in TARGETS])
        self.mask = torch.ones(1, 1, *size.grid, dtype=torch.bool)

    def __call__(self, batch: dict[str, Tensor]) -> None:
        """Take one optimizer step on a batch of `benchmarks.sizes.synthetic_batch`."""
        prediction = self.network(batch["x"], batch["lead_time_hours"])[:, self.targets]
        mask = self.mask.expand_as(prediction)
        loss = ((prediction - batch["y"]) ** 2 * mask).sum() / mask.sum()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def main() -> int:
    """Compare the two implementations; raise AssertionError if they are not the same function."""
    size = Size("small", (8, 12), 16, 3, 2, 3)
    torch.manual_seed(0)
    reference = Network(True, size.grid, width=16, depth=3, decoder_depth=2, heads=2).double()
    network = PublishedNetwork(size).double()
    network.load_state_dict(reference.state_dict())
    x = torch.randn(3, len(INPUTS), *size.grid, dtype=torch.float64)
    # one terrain for all samples, in kilometres, as the reference expects it
    x[:, INPUTS.index("elevation")] = 10 * x[0, INPUTS.index("elevation")]
    lead_time_hours = torch.full((3,), 24.0, dtype=torch.float64)
    ours, theirs = network(x, lead_time_hours), reference(x, lead_time_hours)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    seed = torch.randn_like(ours)
    names, parameters = zip(*reference.named_parameters(), strict=True)
    gradients = dict(
        zip(
            [n for n, _ in network.named_parameters()],
            torch.autograd.grad(ours, list(network.parameters()), seed),
            strict=True,
        )
    )
    for name, expected in zip(names, torch.autograd.grad(theirs, parameters, seed), strict=True):
        torch.testing.assert_close(gradients[name], expected, rtol=1e-8, atol=1e-11)
    print(f"same outputs and {len(names)} same gradients")
    return 0


if __name__ == "__main__":
    sys.exit(main())
