"""The two programs whose checkpoints are read: told apart by the names of their weights, each with its name here."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from topoflow.errors import ResumeRefused

BESIDE = ("china_mask", "model.target_indices")
"""Buffers of the training module that are no part of the network."""

PUBLISHED_H_SCALE_M = 1931.40 * 1000
"""The published program divides normalized heights by 1000, and normalizes by a deviation of 1931.40 m."""

ALPHA, H_SCALE = "blocks.0.attn.elevation_alpha", "blocks.0.attn.H_scale"

_NAMES = re.compile(
    r"token_embeds\.(proj_weights|proj_biases|norm\.(weight|bias))"
    r"|var_embed|var_query|pos_embed"
    r"|var_agg\.(in_proj_weight|in_proj_bias|out_proj\.(weight|bias))"
    r"|blocks\.\d+\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)"
    r"|blocks\.0\.attn\.(elevation_alpha|H_scale|rel_pos_bias\.bias_table)"
    r"|(lead_time_embed|norm|head\.\d+)\.(weight|bias)"
)


@dataclass(frozen=True)
class Dialect:
    """One program's names: its prefix, and what is called otherwise here (beginnings of the rest of a name)."""

    name: str
    prefix: str
    renamed: Mapping[str, str]

    def translate(self, source: str) -> str | None:
        """The name here of a weight or buffer of the file; None if it has none."""
        if not source.startswith(self.prefix):
            return None
        name = source.removeprefix(self.prefix)
        for old, new in self.renamed.items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        return name if _NAMES.fullmatch(name) else None


PREDECESSOR = Dialect("predecessor", "model.climax.", {"head.weight": "head.0.weight", "head.bias": "head.0.bias"})
PUBLISHED = Dialect("published", "model.", {"patch_embed.": "token_embeds.", "blocks.0.attn.alpha": ALPHA})


def tell_dialect(sources: Iterable[str]) -> Dialect:
    """The dialect that names of a state dict belong to.

    Raises:
        ResumeRefused: neither, naming what was found.
    """
    sources = list(sources)
    climax = any(source.startswith(PREDECESSOR.prefix) for source in sources)
    if climax != ("model.patch_embed.proj_weights" in sources):
        return PREDECESSOR if climax else PUBLISHED
    raise ResumeRefused(
        f"weights {shorten(sources)}: of no program that is known here: "
        "expected model.climax.* (the predecessor) or model.patch_embed.proj_weights and so on (the published one)"
    )


@dataclass(frozen=True)
class Weights:
    """The network in a file: `names` {name in the file: name here} in the file's order, `tensors` {name in the file}.

    kept: for the last layer of the head, which of its outputs stay (those of the targets), int64.
    """

    dialect: Dialect
    names: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    last: str
    kept: Tensor

    @property
    def parameters(self) -> list[str]:
        """Names in the file of what an optimizer trains, in the file's order."""
        return [source for source, name in self.names.items() if name != H_SCALE]

    @property
    def last_bias(self) -> str:
        return f"{self.last}.bias"

    def adapt(self, source: str, tensor: Tensor) -> Tensor:
        """A weight, or a moment of it, as it stands in our network."""
        name = self.names[source]
        if name.startswith(f"{self.last}."):
            return tensor[self.kept]
        scalar = {ALPHA: (1,), H_SCALE: ()}.get(name)
        return tensor if scalar is None or tensor.numel() != 1 else tensor.reshape(scalar)

    def model(self) -> dict[str, Tensor]:
        """Weights and buffers by their names here."""
        model = {name: self.adapt(source, self.tensors[source]) for source, name in self.names.items()}
        if self.dialect is PUBLISHED and ALPHA in model:
            model[H_SCALE] = torch.tensor(PUBLISHED_H_SCALE_M)
        return model


def read_weights(state_dict: Mapping[str, Tensor], inputs: list[str], targets: list[str]) -> Weights:
    """The network in a state dict, for a config with these input channels and targets.

    Raises:
        ResumeRefused: names that neither program has, or a head whose outputs are neither those of all inputs nor
            those of the targets.
    """
    dialect = tell_dialect(state_dict)
    names = {source: dialect.translate(source) for source in state_dict if source not in BESIDE}
    unknown = [source for source, name in names.items() if name is None]
    if unknown:
        raise ResumeRefused(f"weights {shorten(unknown)}: unknown in a checkpoint of the {dialect.name} program")
    here = {name: source for source, name in names.items()}
    heads = sorted(int(name.split(".")[1]) for name in names.values() if re.fullmatch(r"head\.\d+\.weight", name))
    needed = ["token_embeds.proj_weights", *([] if heads else ["head.*"])]
    missing = [name for name in needed if name not in here]
    if missing:
        raise ResumeRefused(f"weights {', '.join(missing)}: not in the file: expected those of a whole network")
    patches, last = state_dict[here["token_embeds.proj_weights"]].shape, f"head.{heads[-1]}"
    outputs = state_dict[here[f"{last}.weight"]].shape[0]
    kept = _outputs_of_targets(outputs, patches[0], patches[-2:].numel(), inputs, targets)
    return Weights(dialect, names, state_dict, last, kept)


def _outputs_of_targets(outputs: int, variables: int, cells: int, inputs: list[str], targets: list[str]) -> Tensor:
    """Which outputs of a head stay: ordered (cell of the patch, variable), for all inputs or for the targets alone."""
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
        f"head: {outputs} outputs for patches of {cells} cells: expected {cells * variables}, one of each input "
        f"variable and cell, or {cells * len(targets)}, one of each target and cell"
    )


def shorten(names: Iterable[str], most: int = 6) -> str:
    """Names for a message, the first few of many."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more
