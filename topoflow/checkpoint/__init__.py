"""Checkpoints: the file, the folder that holds them, and the state in them by name."""

from topoflow.checkpoint.broadcast import broadcast_state, read_everywhere
from topoflow.checkpoint.directory import CheckpointDirectory, find_checkpoint
from topoflow.checkpoint.file import FORMAT, read_checkpoint, write_checkpoint
from topoflow.checkpoint.saver import CheckpointSaver
from topoflow.checkpoint.state import (
    RestoreReport,
    capture_state,
    restore_state,
    restore_weights,
    state_digests,
)

__all__ = [
    "FORMAT",
    "CheckpointDirectory",
    "CheckpointSaver",
    "RestoreReport",
    "broadcast_state",
    "capture_state",
    "find_checkpoint",
    "read_checkpoint",
    "read_everywhere",
    "restore_state",
    "restore_weights",
    "state_digests",
    "write_checkpoint",
]
