"""A state that rank 0 read, on every rank, by broadcast in large flat pieces."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from topoflow.checkpoint.file import named_tensors, read_checkpoint
from topoflow.distributed import Context

PIECE_BYTES = 64 * 2**20


def broadcast_state(context: Context, state: dict[str, Any] | None) -> dict[str, Any]:
    """Rank 0's `state` (nested dicts of tensors and plain values) on every rank; the others pass None.

    Tensors arrive on the context's device; on rank 0 the state itself is returned.
    """
    if context.world_size == 1:
        assert state is not None, "one process reads its own state"
        return state
    skeleton = context.broadcast_object(_skeleton(state) if context.is_main else None)
    received = state if context.is_main else _allocate(skeleton, context.device)
    tensors = sorted(named_tensors(received), key=lambda item: item[0])
    for dtype in sorted({tensor.dtype for _, tensor in tensors}, key=str):
        _broadcast_flat(context, [tensor for _, tensor in tensors if tensor.dtype == dtype], dtype)
    return received


def read_everywhere(context: Context, find: Callable[[], Path], parts: Sequence[str]) -> tuple[Path, dict[str, Any]]:
    """The checkpoint that `find` names, read by rank 0 and sent to all: its path, and those parts of its state.

    Raises:
        MissingPath, ResumeRefused: on every rank alike, as `find` and `read_checkpoint` raise them.
    """
    path, state = None, None
    with context.together("reading the checkpoint"):
        if context.is_main:
            path = find()
            whole = read_checkpoint(path)
            state = {part: whole[part] for part in parts}
    return context.broadcast_object(path), broadcast_state(context, state)


def _broadcast_flat(context: Context, tensors: list[torch.Tensor], dtype: torch.dtype) -> None:
    """Overwrite tensors of one dtype by rank 0's, packed into pieces of PIECE_BYTES."""
    length = max(1, PIECE_BYTES // dtype.itemsize)
    chunks = [chunk for tensor in tensors for chunk in tensor.reshape(-1).split(length) if chunk.numel()]
    while chunks:
        taken, total = [], 0
        while chunks and total + chunks[0].numel() <= length:
            total += chunks[0].numel()
            taken.append(chunks.pop(0))
        piece = torch.empty(total, dtype=dtype, device=context.device)
        if context.is_main:
            torch.cat([chunk.to(context.device) for chunk in taken], out=piece)
        context.broadcast_tensor(piece)
        if not context.is_main:
            for chunk, part in zip(taken, piece.split([chunk.numel() for chunk in taken]), strict=True):
                chunk.copy_(part)


def _skeleton(tree: Any) -> Any:
    """The tree with every tensor replaced by one without storage."""
    if isinstance(tree, torch.Tensor):
        return torch.empty(tree.shape, dtype=tree.dtype, device="meta")
    return {key: _skeleton(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def _allocate(tree: Any, device: torch.device) -> Any:
    if isinstance(tree, torch.Tensor):
        return torch.empty(tree.shape, dtype=tree.dtype, device=device)
    return {key: _allocate(value, device) for key, value in tree.items()} if isinstance(tree, dict) else tree
