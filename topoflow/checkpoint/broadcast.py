"""A checkpoint that rank 0 read, put into what every rank has built: by broadcast, in large flat pieces."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from topoflow.checkpoint.file import read_checkpoint
from topoflow.checkpoint.state import Pair, copy_pairs
from topoflow.distributed import Context

PIECE_BYTES = 64 * 2**20


def share_outline(context: Context, state: dict[str, Any] | None) -> dict[str, Any]:
    """Rank 0's `state` (nested dicts of tensors and plain values), in outline on the others, which pass None.

    There every tensor is on the meta device: it has a shape and a dtype and takes no memory. `deliver` fills what is
    made after it.
    """
    outline = context.broadcast_object(_outline(state) if context.is_main else None)
    return state if context.is_main else outline


def read_everywhere(context: Context, find: Callable[[], Path], parts: Sequence[str]) -> tuple[Path, dict[str, Any]]:
    """The checkpoint that `find` names, read by rank 0: its path, and those parts of its state, see `share_outline`.

    Raises:
        MissingPath, ResumeRefused: on every rank alike, as `find` and `read_checkpoint` raise them.
    """
    path, state = None, None
    with context.together("reading the checkpoint"):
        if context.is_main:
            path = find()
            whole = read_checkpoint(path, parts)
            state = {part: whole[part] for part in parts}
    return context.broadcast_object(path), share_outline(context, state)


def deliver(context: Context, pairs: Sequence[Pair]) -> None:
    """Copy rank 0's sources into every rank's destinations, which may lie on any device.

    The pairs are the same on all ranks, in the same order; the sources of other ranks may be without contents. What a
    rank needs beside its destinations is one piece of at most PIECE_BYTES.
    """
    if context.world_size == 1:
        return copy_pairs(pairs)
    with torch.no_grad():
        for dtype in sorted({destination.dtype for _, destination in pairs}, key=str):
            _broadcast_flat(context, [pair for pair in pairs if pair[1].dtype == dtype], dtype)


def _broadcast_flat(context: Context, pairs: list[Pair], dtype: torch.dtype) -> None:
    length = max(1, PIECE_BYTES // dtype.itemsize)
    taken: list[Pair] = []
    room = length
    for source, destination in pairs:
        # a parameter is contiguous, so its flat view is the parameter itself
        parts = zip(source.reshape(-1).split(length), destination.view(-1).split(length), strict=True)
        for part in parts:
            if part[1].numel() > room:
                _broadcast_piece(context, taken, dtype)
                taken, room = [], length
            taken.append(part)
            room -= part[1].numel()
    _broadcast_piece(context, taken, dtype)


def _broadcast_piece(context: Context, parts: list[Pair], dtype: torch.dtype) -> None:
    sizes = [destination.numel() for _, destination in parts]
    piece = torch.empty(sum(sizes), dtype=dtype, device=context.device)
    if context.is_main:
        copy_pairs(list(zip([source for source, _ in parts], piece.split(sizes), strict=True)))
    context.broadcast_tensor(piece)
    copy_pairs(list(zip(piece.split(sizes), [destination for _, destination in parts], strict=True)))


def _outline(tree: Any) -> Any:
    """The tree with every tensor replaced by one without storage."""
    if isinstance(tree, torch.Tensor):
        return torch.empty(tree.shape, dtype=tree.dtype, device="meta")
    return {key: _outline(value) for key, value in tree.items()} if isinstance(tree, dict) else tree
