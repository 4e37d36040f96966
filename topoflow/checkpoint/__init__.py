"""Checkpoints: the file, the folder that holds them, and the state in them by name."""

from topoflow.checkpoint.broadcast import deliver, read_everywhere, share_outline
from topoflow.checkpoint.directory import CheckpointDirectory, find_checkpoint
from topoflow.checkpoint.file import FORMAT, read_checkpoint, write_checkpoint
from topoflow.checkpoint.fingerprint import (
    captured_tensors,
    fingerprints,
    seal,
    state_fingerprints,
    state_tensors,
    tensor_fingerprint,
)
from topoflow.checkpoint.saver import CheckpointSaver
from topoflow.checkpoint.state import (
    Restore,
    RestoreReport,
    capture_state,
    plan_state,
    plan_weights,
    restore_state,
)

__all__ = [
    "FORMAT",
    "CheckpointDirectory",
    "CheckpointSaver",
    "Restore",
    "RestoreReport",
    "capture_state",
    "captured_tensors",
    "deliver",
    "find_checkpoint",
    "fingerprints",
    "plan_state",
    "plan_weights",
    "read_checkpoint",
    "read_everywhere",
    "restore_state",
    "seal",
    "share_outline",
    "state_fingerprints",
    "state_tensors",
    "tensor_fingerprint",
    "write_checkpoint",
]
