"""Names of weights in the checkpoints of the two programs, and the name of each here.

Every function that reads raises ResumeRefused where the file does not hold what it expects, naming what it found.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from topoflow.errors import ResumeRefused
from topoflow.text import shorten
from topoflow.tools.lightning.reading import show, take

MASK, TARGET_INDICES = "china_mask", "model.target_indices"
"""Buffers of the training module that are not part of the network."""

PUBLISHED_H_SCALE_M = 1931.40 * 1000
"""The published program divides normalized heights by 1000, and normalizes by a deviation of 1931.40 m."""

ALPHA, H_SCALE = "blocks.0.attn.elevation_alpha", "blocks.0.attn.H_scale"

_NAMES = re.compile(
    r"token_embeds\.(proj_weights|proj_biases|norm\.(weight|bias))"
    r"|var_embed|var_query|pos_embed"
    r"|var_agg\.(in_proj_weight|in_proj_bias|out_proj\.(weight|bias))"
    r"|blocks\.\d+\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)"
    r"|blocks\.0\.attn\.(elevation_alpha|H_scale|rel_pos_bias\.bias_table)"
    r"|(lead_time_embed|norm|head\.\d{1,3})\.(weight|bias)"
)


@dataclass(frozen=True)
class Dialect:
    """The names of one program: its prefix, and beginnings of names that differ from ours."""

    name: str
    prefix: str
    renamed: Mapping[str, str]

    def translate(self, source: str) -> str | None:
        """Return our name of a weight or buffer of the file; None if it has none."""
        name = source.removeprefix(self.prefix)
        for old, new in self.renamed.items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        return name if source.startswith(self.prefix) and _NAMES.fullmatch(name) else None


PREDECESSOR = Dialect("predecessor", "model.climax.", {"head.weight": "head.0.weight", "head.bias": "head.0.bias"})
PUBLISHED = Dialect("published", "model.", {"patch_embed.": "token_embeds.", "blocks.0.attn.alpha": ALPHA})


def detect_dialect(sources: Iterable[str]) -> Dialect:
    """Return the dialect that names of a state dict belong to."""
    sources = list(sources)
    climax = any(source.startswith(PREDECESSOR.prefix) for source in sources)
    if climax != ("model.patch_embed.proj_weights" in sources):
        return PREDECESSOR if climax else PUBLISHED
    raise ResumeRefused(
        f"weights {shorten(sources) or '(empty)'}: of no known program: "
        "expected model.climax.* (the predecessor) or model.patch_embed.proj_weights and so on (the published one)"
    )


def choose_state_dict(checkpoint: Mapping[str, Any], choice: str | None) -> Mapping[str, Any]:
    """Return the state dict of the trained weights, or of the averaged ones where both are in the file.

    Lightning's callback WeightAveraging moves the trained weights to `current_model_state` and puts the averaged ones
    into `state_dict`. choice: "trained", "averaged", or None where the user made none, which is refused then.
    """
    both = "current_model_state" in checkpoint or "averaging_state" in checkpoint
    if both and choice is None:
        raise ResumeRefused(
            "the file holds trained weights (current_model_state) and averaged ones (state_dict), from Lightning's "
            "WeightAveraging: expected --weights trained, as its training resumes, or --weights averaged"
        )
    if choice == "averaged" and not both:
        raise ResumeRefused("--weights averaged: the file holds no averaged weights (averaging_state)")
    return take(checkpoint, Mapping, "current_model_state" if both and choice == "trained" else "state_dict")


@dataclass(frozen=True)
class Weights:
    """The network in a file: `names` {name in the file: name here} in the file's order, `tensors` {name in the file}.

    last: the last layer of the head, which has `outputs`. kept: which of them stay, int64. mask: bool [H, W].
    """

    dialect: Dialect
    names: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    last: str
    outputs: int
    kept: Tensor
    mask: Tensor | None
    target_indices: list[int] | None

    @property
    def parameters(self) -> list[str]:
        """Names in the file of what an optimizer trains, in the file's order."""
        return [source for source, name in self.names.items() if name != H_SCALE]

    def adapt(self, source: str, tensor: Tensor) -> Tensor:
        """Return a weight, or a moment of it, in the shape that our network has."""
        name = self.names[source]
        if name.startswith(f"{self.last}."):
            return tensor[self.kept]
        scalar = {ALPHA: (1,), H_SCALE: ()}.get(name)
        return tensor if scalar is None or tensor.numel() != 1 else tensor.reshape(scalar)

    def model(self) -> dict[str, Tensor]:
        """Return weights and buffers by our names."""
        model = {name: self.adapt(source, self.tensors[source]) for source, name in self.names.items()}
        if self.dialect is PUBLISHED and ALPHA in model:
            model[H_SCALE] = torch.tensor(PUBLISHED_H_SCALE_M)
        return model


def read_weights(state_dict: Mapping[str, Any], inputs: list[str], targets: list[str]) -> Weights:
    """Return the network in a state dict, for a config with these input channels and targets."""
    odd = [name for name in state_dict if not isinstance(name, str) or not name.isprintable()]
    if odd:
        raise ResumeRefused(f"weights {show(odd)}: expected names")
    dialect = detect_dialect(state_dict)
    known = {source: dialect.translate(source) for source in state_dict if source not in (MASK, TARGET_INDICES)}
    names = {source: name for source, name in known.items() if name is not None}
    unknown = [source for source in known if source not in names]
    if unknown:
        raise ResumeRefused(f"weights {shorten(unknown)}: unknown in a checkpoint of the {dialect.name} program")
    here = {name: source for source, name in names.items()}
    twice = [source for source, name in names.items() if here[name] != source]
    if twice:
        raise ResumeRefused(f"weights {shorten(twice)}: in the file under two names")
    heads = sorted(int(name.split(".")[1]) for name in here if re.fullmatch(r"head\.\d+\.weight", name))
    last = f"head.{heads[-1]}" if heads else "head.*"
    missing = [name for name in ("token_embeds.proj_weights", f"{last}.weight", f"{last}.bias") if name not in here]
    if missing:
        raise ResumeRefused(f"weights {', '.join(missing)}: not in the file: expected those of a whole network")
    tensors = {source: take(state_dict, Tensor, source) for source in names}
    patches, shape = tensors[here["token_embeds.proj_weights"]].shape, tensors[here[f"{last}.weight"]].shape
    if len(patches) != 5 or len(shape) != 2 or tensors[here[f"{last}.bias"]].shape != shape[:1]:
        raise ResumeRefused(f"weights: {last}.weight {tuple(shape)} does not fit its bias or patches {tuple(patches)}")
    kept = _outputs_of_targets(shape[0], patches[0], patches[-2:].numel(), inputs, targets)
    mask = take(state_dict, Tensor, MASK) > 0.5 if MASK in state_dict else None
    if mask is not None and mask.dim() != 2:
        raise ResumeRefused(f"{MASK}: shape {tuple(mask.shape)}: expected rows and columns")
    indices = state_dict.get(TARGET_INDICES)
    if indices is not None:
        if type(indices) is not Tensor or indices.dtype is not torch.int64 or indices.dim() != 1 or indices.is_meta:
            raise ResumeRefused(f"{TARGET_INDICES}: {show(indices)}: expected int64 numbers of variables")
        indices = indices.tolist()
    return Weights(dialect, names, tensors, last, shape[0], kept, mask, indices)


def _outputs_of_targets(outputs: int, variables: int, cells: int, inputs: list[str], targets: list[str]) -> Tensor:
    """Return which outputs of a head stay: ordered (cell of the patch, variable), for all inputs or the targets."""
    if len(inputs) != variables:
        raise ResumeRefused(
            f"data.variables: {len(inputs)} input channels ({', '.join(inputs)}), but the file's network has "
            f"{variables}: expected the same, in the order of its training"
        )
    if outputs == cells * variables:
        strangers = [target for target in targets if target not in inputs]
        if strangers:
            raise ResumeRefused(f"data.targets: {', '.join(strangers)}: the file's head forecasts its inputs only")
        chosen = torch.tensor([inputs.index(target) for target in targets])
        return (torch.arange(cells).unsqueeze(1) * variables + chosen).flatten()
    if outputs == cells * len(targets):
        return torch.arange(outputs)
    raise ResumeRefused(
        f"head: {outputs} outputs for patches of {cells} cells: expected {cells * variables}, one per input "
        f"variable and cell, or {cells * len(targets)}, one per target and cell"
    )
