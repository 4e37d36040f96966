"""The network's weights in a Lightning checkpoint of either program, under its names and ours.

Every function raises ResumeRefused where the file does not hold what it expects, naming what it found.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from topoflow.text import shorten
from topoflow.tools.lightning.reading import require, show, take

MASK, TARGET_INDICES = "china_mask", "model.target_indices"
"""Buffers of the training module that are not part of the network."""

PUBLISHED_H_SCALE_M = 1931.40 * 1000
"""The published program divides normalized heights by 1000, and normalizes by a deviation of 1931.40 m."""

ALPHA, H_SCALE = "blocks.0.attn.elevation_alpha", "blocks.0.attn.H_scale"

PROGRAMS = {
    "predecessor": {
        "model.climax.head.weight": "head.0.weight", "model.climax.head.bias": "head.0.bias", "model.climax.": ""
    },
    "published": {"model.patch_embed.": "token_embeds.", "model.blocks.0.attn.alpha": ALPHA, "model.": ""},
}  # fmt: skip
"""{program: {beginning of a name in its files: beginning of ours}}; the first that fits."""

NEEDS = {
    r"token_embeds\.norm\.": "model.patch_norm=true",
    r"blocks\.0\.attn\.rel_pos_bias\.": "model.relative_position=true",
    r"blocks\.0\.attn\.(elevation_alpha|H_scale)": "model.terrain=endpoint",
    r"blocks\.\d+\.(norm[12]|attn\.qkv|attn\.proj|mlp\.fc[12])\.": "a larger model.depth",
    r"head\.\d+\.": "a larger model.decoder_depth",
    r"lead_time_embed\.": "model.leads=conditioned",
    "": "only weights that the two programs have",
}
"""{pattern of a name: the config key that gives a network such a weight}; the first that matches the beginning."""


@dataclass(frozen=True)
class Weights:
    """The network in a file: `names` {name in the file: name here} in the file's order, `tensors` {name here} as saved.

    last: the last layer of the head, which has `outputs`. kept: which of them stay, int64. mask: bool [H, W].
    """

    program: str
    names: dict[str, str]
    tensors: dict[str, Tensor]
    last: str
    outputs: int
    kept: Tensor
    mask: Tensor | None
    target_indices: list[int] | None

    def adapt(self, name: str, tensor: Tensor) -> Tensor:
        """Return a weight, or a moment of it, as our network has it: outputs that are kept, scalars in our shape."""
        if name.startswith(f"{self.last}."):
            shape = tuple(tensor.shape)
            require(
                shape[:1] == (self.outputs,), f"{name}: shape {shape}: expected {self.outputs} outputs, in moments too"
            )
            return tensor[self.kept]
        scalar = {ALPHA: (1,), H_SCALE: ()}.get(name)
        return tensor if scalar is None or tensor.numel() != 1 else tensor.reshape(scalar)

    def model(self) -> dict[str, Tensor]:
        """Return weights and buffers as our network has them."""
        model = {name: self.adapt(name, tensor) for name, tensor in self.tensors.items()}
        if self.program == "published" and ALPHA in model:
            model[H_SCALE] = torch.tensor(PUBLISHED_H_SCALE_M)
        return model


def read_weights(
    checkpoint: Mapping[str, Any], choice: str | None, known: Iterable[str], inputs: list[str], targets: list[str]
) -> Weights:
    """Return the network in a file. Names that it lacks, and shapes, are left to the restore.

    Args:
        choice: "trained" or "averaged" weights, where the file holds both.
        known: the names of our network's weights and buffers.
        inputs, targets: the config's channels.
    """
    sets = _sets_of_weights(checkpoint, choice)
    chosen = sets[choice or "trained"]
    state_dict = take(checkpoint, Mapping, chosen)
    program, names = _translate(state_dict)
    here = {name: source for source, name in names.items()}
    last = [name for name in known if name.startswith("head.")][-1].rpartition(".")[0]
    required = ("token_embeds.proj_weights", f"{last}.weight")
    foreign = {source: name for source, name in names.items() if name not in known}
    needs = {next(need for part, need in NEEDS.items() if re.match(part, name)) for name in foreign.values()}
    for wrong, problem in (
        (list(foreign), f"not in the config's network: expected {' and '.join(sorted(needs))}"),
        ([source for source, name in names.items() if here[name] != source], "under two names: expected one"),
        ([name for name in required if name not in here], "not in the file: expected all of the config's network"),
    ):
        require(not wrong, f"weights {shorten(wrong)}: {problem}")
    # the other set, too: values that are not finite come from a run that diverged
    found = {
        key: {name: take(checkpoint, torch.float32, key, source) for source, name in names.items()}
        for key in sets.values()
    }
    patches, weight = (found[chosen][name].shape for name in required)
    require(
        len(patches) == 5 and len(weight) == 2,
        f"weights {', '.join(required)}: {[*patches]}, {[*weight]}: expected 5 and 2 axes",
    )
    kept = _outputs_of_targets(weight[0], patches[0], patches[-2:].numel(), inputs, targets)
    mask = take(state_dict, torch.float32, MASK) > 0.5 if MASK in state_dict else None
    if mask is not None:
        size = f"shape {tuple(mask.shape)}, {int(mask.sum())} cells used"
        require(mask.dim() == 2 and bool(mask.any()), f"{MASK}: {size}: expected rows and columns, at least 1")
    indices = take(state_dict, torch.int64, TARGET_INDICES).tolist() if TARGET_INDICES in state_dict else None
    return Weights(program, names, found[chosen], last, weight[0], kept, mask, indices)


def _sets_of_weights(checkpoint: Mapping[str, Any], choice: str | None) -> dict[str, str]:
    """Return {choice: key in the file} for each set of weights.

    Lightning's WeightAveraging moves the trained ones to `current_model_state`, and the averaged to `state_dict`.
    """
    if "current_model_state" in checkpoint or "averaging_state" in checkpoint:
        require(
            choice is not None,
            "the file holds trained weights (current_model_state) and averaged ones (state_dict), from Lightning's "
            "WeightAveraging: expected --weights trained, as its training resumes, or --weights averaged",
        )
        return {"trained": "current_model_state", "averaged": "state_dict"}
    require(choice != "averaged", "--weights averaged: the file holds no averaged weights (averaging_state)")
    return {"trained": "state_dict"}


def _translate(state_dict: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """Return the program that wrote a state dict, and {name in the file: name here}, empty if it has none."""
    unreadable = [name for name in state_dict if not isinstance(name, str) or not name.isprintable()]
    require(not unreadable, f"weights {show(unreadable)}: expected names")
    is_predecessor = any(name.startswith("model.climax.") for name in state_dict)
    require(
        is_predecessor != ("model.patch_embed.proj_weights" in state_dict),
        f"weights {shorten(state_dict) or '(empty)'}: not of a known program: "
        "expected model.climax.* (the predecessor) or model.patch_embed.proj_weights and so on (the published one)",
    )
    program, names = "predecessor" if is_predecessor else "published", {}
    for source in state_dict:
        if source not in (MASK, TARGET_INDICES):
            beginnings = (old for old in PROGRAMS[program] if source.startswith(old))
            names[source] = next((PROGRAMS[program][old] + source.removeprefix(old) for old in beginnings), "")
    return program, names


def _outputs_of_targets(outputs: int, variables: int, cells: int, inputs: list[str], targets: list[str]) -> Tensor:
    """Return which outputs of a head stay: ordered (cell of the patch, variable), for all inputs or the targets."""
    require(
        len(inputs) == variables,
        f"data.variables: {len(inputs)} input channels ({', '.join(inputs)}), but the file's network has {variables}: "
        "expected the same, in the order of its training",
    )
    if outputs == cells * variables and set(targets) <= set(inputs):
        chosen = torch.tensor([inputs.index(target) for target in targets])
        return (torch.arange(cells).unsqueeze(1) * variables + chosen).flatten()
    require(
        outputs == cells * len(targets),
        f"head: {outputs} outputs for patches of {cells} cells and data.targets {', '.join(targets)}: expected "
        f"{cells * variables}, one per cell and input (targets among them), or {cells * len(targets)}, one per target",
    )
    return torch.arange(outputs)
