"""The whole network: fields -> tokens -> transformer -> fields."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from topoflow.config import ModelConfig
from topoflow.errors import ConfigError
from topoflow.model.attention import Attention, Block
from topoflow.model.embedding import PatchEmbedding, VariableAggregation, split_patches, unpatchify
from topoflow.model.initialization import initialize_weights
from topoflow.model.legacy import NormedPatchEmbedding, RelativePositionBias, require_regional_grid, scan_regionally
from topoflow.model.terrain import TerrainAttention, patch_heights
from topoflow.model.wind import WindMean, WindRank


class TopoFlow(nn.Module):
    """ClimaX encoder (arXiv 2301.10343) with the mean wind and terrain attention (arXiv 2602.16821).

    input_names and target_names are the channels of the input and of the output; img_size is (rows, columns) of the
    grid; patch_x_km, patch_y_km [N] are the patch centres in raster order, x east and y north, used if config.wind is
    rank. activation_checkpointing: recompute blocks in the backward pass. flex_attention: attend with biases by
    FlexAttention on GPUs, else by torch's plain path. num_leads: lead times of one forecast, if config.leads is joint.
    Weights are those of torch's layers: `build_model` sets the initial ones. Raises ConfigError if the patch size does
    not divide the grid or the wind scan is not defined on it, ValueError if the patch centres are not N finite numbers.
    """

    def __init__(
        self,
        config: ModelConfig,
        input_names: Sequence[str],
        target_names: Sequence[str],
        img_size: tuple[int, int],
        patch_x_km: Sequence[float] | np.ndarray,
        patch_y_km: Sequence[float] | np.ndarray,
        activation_checkpointing: bool = False,
        flex_attention: bool = True,
        num_leads: int = 1,
    ):
        super().__init__()
        self.config = config
        self.input_names = tuple(input_names)
        self.target_names = tuple(target_names)
        self.img_size = (img_size[0], img_size[1])
        self.activation_checkpointing = activation_checkpointing
        self.flex_attention = flex_attention
        self.joint = config.leads == "joint"
        self.num_leads = num_leads if self.joint else 1
        D, p = config.embed_dim, config.patch_size
        if any(cells % p for cells in self.img_size):
            raise ConfigError(f"model.patch_size: {p} does not divide the grid of {img_size[0]} x {img_size[1]} cells")
        self.grid_size = (self.img_size[0] // p, self.img_size[1] // p)
        if config.wind == "legacy_regional":
            require_regional_grid(self.img_size, p)

        embedding = NormedPatchEmbedding if config.patch_norm else PatchEmbedding
        self.token_embeds = embedding(len(self.input_names), p, D)
        self.var_embed = nn.Parameter(torch.empty(1, len(self.input_names), D))
        self.var_query = nn.Parameter(torch.empty(1, 1, D))
        self.var_agg = VariableAggregation(D, config.num_heads)
        self.pos_embed = nn.Parameter(torch.empty(1, self.num_patches, D))
        if not self.joint:
            self.lead_time_embed = nn.Linear(1, D)
        if config.wind == "mean":
            self.wind_mean = WindMean(D)
        if config.wind == "rank":
            centres = [self._patch_centres("patch_x_km", patch_x_km), self._patch_centres("patch_y_km", patch_y_km)]
            self.wind_rank = WindRank(D, *centres)
        self.pos_drop = nn.Dropout(config.drop_rate)
        self.blocks = nn.ModuleList(self._build_block(index) for index in range(config.depth))
        self.norm = nn.LayerNorm(D)
        self.kept: Tensor | None = None
        hidden = [layer for _ in range(config.decoder_depth) for layer in (nn.Linear(D, D), nn.GELU())]
        self.head = nn.Sequential(*hidden, nn.Linear(D, p * p * self.num_leads * len(self.target_names)))

    @property
    def num_patches(self) -> int:
        return self.grid_size[0] * self.grid_size[1]

    def keep_patches(self, cells: np.ndarray) -> None:
        """Compute only the patches with one of `cells` (bool [H, W], any) from now on; the output of others is 0.

        Raises:
            ConfigError: there is no such cell.
        """
        has_cell = split_patches(torch.from_numpy(cells)[None, None], self.config.patch_size).any(dim=(0, 2, 3))
        if not has_cell.any():
            raise ConfigError("model.tokens: with_data, but no cell of the mask has a target in the training split")
        del self.kept
        self.register_buffer("kept", has_cell.nonzero()[:, 0], persistent=False)

    def _patch_centres(self, name: str, centres_km: Sequence[float] | np.ndarray) -> Tensor:
        centres = torch.as_tensor(centres_km, dtype=torch.float64)
        if centres.shape != (self.num_patches,) or not bool(torch.isfinite(centres).all()):
            raise ValueError(f"{name}: shape {tuple(centres.shape)}, expected {self.num_patches} finite numbers")
        return centres

    def _build_block(self, index: int) -> Block:
        config = self.config
        D, heads = config.embed_dim, config.num_heads
        published = config.patch_norm or config.relative_position
        dropping = config.block_dropout or ("first" if published else "all")
        drops = dropping == "all" or (dropping == "first" and index == 0)
        options = {
            "attn_drop_rate": config.attn_drop_rate if drops else 0.0,
            "rel_pos_bias": RelativePositionBias(heads, self.grid_size)
            if index == 0 and config.relative_position
            else None,
            "flex": self.flex_attention,
        }
        drop_rate = config.drop_rate if drops else 0.0
        if index == 0 and config.terrain == "endpoint":
            attn = TerrainAttention(D, heads, drop_rate, config.elevation_alpha_init, **options)
        else:
            attn = Attention(D, heads, drop_rate, **options)
        drop_path_rate = config.drop_path * index / max(config.depth - 1, 1)
        return Block(attn, D, config.mlp_ratio, drop_rate, drop_path_rate)

    def forward(self, x: Tensor, lead_time_hours: Tensor, elevation_m: Tensor, wind_ms: Tensor | None = None) -> Tensor:
        """Forecast the targets.

        x [B, V, H, W]: normalized inputs, channels as input_names, no NaN. lead_time_hours [B], used if config.leads is
        conditioned. elevation_m [H, W]: terrain height in metres, no NaN, used if config.terrain is endpoint.
        wind_ms [B, 2, H, W]: (u, v) in m/s, used and required unless config.wind is none.
        Returns [B, T, H, W], normalized, channels as target_names; if config.leads is joint [B, L, T, H, W], the lead
        times in the order of the data. Raises ValueError for other shapes.
        """
        self._check_shapes(x, lead_time_hours, elevation_m, wind_ms)
        x = self._embed(x, lead_time_hours, wind_ms)  # [B, N, D]
        for index, block in enumerate(self.blocks):
            damped = index == 0 and self.config.terrain == "endpoint"
            context = (self._keep(patch_heights(elevation_m, self.config.patch_size), 0),) if damped else ()
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, *context, use_reentrant=False)
            else:
                x = block(x, *context)
        x = self.head(self.norm(x))  # [B, N, p*p*L*T]
        if self.kept is not None:
            x = x.new_zeros(x.shape[0], self.num_patches, x.shape[2]).index_copy(1, self.kept, x)
        fields = unpatchify(x, self.grid_size, self.config.patch_size)  # [B, L*T, H, W]
        return fields.unflatten(1, (self.num_leads, -1)) if self.joint else fields

    def _embed(self, x: Tensor, lead_time_hours: Tensor, wind_ms: Tensor | None) -> Tensor:
        """Return the tokens [B, N, D] of the fields [B, V, H, W], in raster order; only those kept."""
        patches = self._keep(split_patches(x, self.config.patch_size), 1)  # [B, N, V, p*p]
        patches = F.pad(patches, (0, 1), value=1.0)  # the 1 that carries biases and variable embedding
        if isinstance(self.token_embeds, NormedPatchEmbedding):
            tokens = self.var_agg(self.var_query, self.token_embeds.tokens(patches, self.var_embed), None)
        else:
            tokens = self.var_agg(self.var_query, patches, self.token_embeds(self.var_embed))
        if self.config.wind == "legacy_regional":
            assert wind_ms is not None  # by _check_shapes
            tokens = scan_regionally(tokens, wind_ms)  # all later code treats them as tokens in raster order
        tokens = tokens + self._keep(self.pos_embed, 1)
        if not self.joint:
            tokens = tokens + self.lead_time_embed(lead_time_hours.unsqueeze(-1)).unsqueeze(1)  # [B, 1, D]
        if self.config.wind == "mean":
            tokens = tokens + self.wind_mean(wind_ms)
        if self.config.wind == "rank":
            tokens = tokens + self._keep(self.wind_rank(wind_ms), 1)
        return self.pos_drop(tokens)

    def _keep(self, tokens: Tensor, axis: int) -> Tensor:
        """Return the kept ones of all patches, which lie along `axis`."""
        return tokens if self.kept is None else tokens.index_select(axis, self.kept)

    def _check_shapes(self, x: Tensor, lead_time_hours: Tensor, elevation_m: Tensor, wind_ms: Tensor | None) -> None:
        if self.config.wind != "none" and wind_ms is None:
            raise ValueError(f"wind_ms: None, expected (u, v) in m/s [B, 2, H, W] for model.wind={self.config.wind}")
        B, (H, W) = x.shape[0], self.img_size
        expected = {
            "x": (x, (B, len(self.input_names), H, W), f"[B, V, H, W] with the channels {', '.join(self.input_names)}"),
            "elevation_m": (elevation_m, (H, W), "[H, W]"),
        }
        if not self.joint:
            expected["lead_time_hours"] = (lead_time_hours, (B,), "[B]")
        if self.config.wind != "none":
            expected["wind_ms"] = (wind_ms, (B, 2, H, W), "[B, 2, H, W]")
        for name, (tensor, shape, meaning) in expected.items():
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected {shape}: {meaning}")


def build_model(
    config: ModelConfig,
    input_names: Sequence[str],
    target_names: Sequence[str],
    img_size: tuple[int, int],
    patch_x_km: Sequence[float] | np.ndarray,
    patch_y_km: Sequence[float] | np.ndarray,
    seed: int,
    activation_checkpointing: bool = False,
    flex_attention: bool = True,
    num_leads: int = 1,
) -> TopoFlow:
    """Return a TopoFlow on CPU with its initial weights, a pure function of the arguments.

    The global random state is left unchanged. Arguments and errors as for `TopoFlow`.
    """
    with torch.random.fork_rng(devices=[]):  # torch's layers draw values of their own, all replaced below
        model = TopoFlow(
            config,
            input_names,
            target_names,
            img_size,
            patch_x_km,
            patch_y_km,
            activation_checkpointing,
            flex_attention,
            num_leads,
        )
    initialize_weights(model, model.grid_size, seed, zero_output=config.base != "none")
    return model
