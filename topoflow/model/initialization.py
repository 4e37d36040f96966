"""Initial weights: each parameter has a generator of its own, keyed by (seed, name).

So the bits of one parameter depend on nothing else: not on other options of the model, the global random state, the
world size or the device. Values are drawn in float64 and then rounded, which hides differences between processors.
"""

import hashlib
import math

import torch
from torch import Tensor, nn

from topoflow.model.embedding import sincos_1d, sincos_2d

LINEAR_STD = 0.02
"""Standard deviation of queries and relative positions, and of linear weights at REFERENCE_WIDTH (ClimaX, timm)."""

REFERENCE_WIDTH = 768
"""Width of the paper scale. At other widths, the variance of linear weights is scaled so that signals keep their size.

With 0.02 at width 96, a signal shrinks by a factor of 5 in each layer of the head, and training starts slowly.
"""

LARGEST_LEAD_HOURS = 100.0

LARGEST_DEVIATION = 9.0
"""In standard deviations, beyond any draw: Box and Muller's method reaches sqrt(2 * 53 ln 2) = 8.6 with 53 bits."""


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:4], "little"))


def _truncated_normal(parameter: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """Draw from a normal distribution truncated to [-2, 2], as timm does; for a small `std` nothing is truncated."""
    value = torch.empty(parameter.shape, dtype=torch.float64)
    if LARGEST_DEVIATION * std < 2:
        return value.normal_(0.0, std, generator=generator)
    return nn.init.trunc_normal_(value, std=std, generator=generator)


def _uniform(parameter: Tensor, bound: float, generator: torch.Generator) -> Tensor:
    return torch.empty(parameter.shape, dtype=torch.float64).uniform_(-bound, bound, generator=generator)


def _initial_value(
    name: str, parameter: Tensor, embed_dim: int, grid_size: tuple[int, int], generator: torch.Generator
) -> Tensor:
    last = name.rpartition(".")[2]
    if name == "pos_embed":
        return sincos_2d(parameter.shape[-1], grid_size)
    if name == "var_embed":
        return sincos_1d(parameter.shape[-1], torch.arange(parameter.shape[1]))
    if name == "token_embeds.proj_weights":
        return _uniform(parameter, 1 / math.sqrt(parameter[0, 0].numel()), generator)  # nn.Conv2d's, fan-in p*p
    if name == "var_agg.in_proj_weight":
        return _uniform(parameter, math.sqrt(6 / sum(parameter.shape)), generator)  # nn.MultiheadAttention's
    if name == "lead_time_embed.weight":
        # its input is hours, up to about 100: at the usual scale the embedding would dwarf the tokens
        return _truncated_normal(parameter, LINEAR_STD / LARGEST_LEAD_HOURS, generator)
    if last in ("bias", "in_proj_bias", "proj_biases") or name.startswith(("wind_mean.fc2.", "wind_rank.fc2.")):
        return torch.zeros_like(parameter)
    if name in ("wind_mean.fc1.weight", "wind_rank.fc1.weight"):
        return _truncated_normal(parameter, 1 / math.sqrt(parameter.shape[1]), generator)
    if last == "weight" and parameter.ndim == 1:
        return torch.ones_like(parameter)  # of a LayerNorm
    if name == "var_query" or last == "bias_table":
        return _truncated_normal(parameter, LINEAR_STD, generator)
    if last == "weight" and parameter.ndim == 2:
        return _truncated_normal(parameter, LINEAR_STD * math.sqrt(REFERENCE_WIDTH / embed_dim), generator)
    raise AssertionError(f"no rule for the initial value of {name}")


@torch.no_grad()
def initialize_weights(model: nn.Module, grid_size: tuple[int, int], seed: int, zero_output: bool = False) -> None:
    """Set all parameters of a TopoFlow on CPU except elevation_alpha, whose initial value is configured.

    `grid_size` is (rows, columns) of patches. zero_output: the last layer starts at 0, so that the network adds nothing
    to its base.
    """
    embed_dim = model.get_parameter("pos_embed").shape[-1]
    for name, parameter in model.named_parameters():
        if not name.endswith(".elevation_alpha"):
            value = _initial_value(name, parameter, embed_dim, grid_size, _generator(seed, name))
            parameter.copy_(value.reshape(parameter.shape))
    if zero_output:
        list(model.get_submodule("head").parameters())[-2].zero_()  # weight, before the bias
