"""Saving during a run: rank 0 captures and writes, all ranks learn whether it worked."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from topoflow.checkpoint.directory import CheckpointDirectory
from topoflow.config import CheckpointConfig
from topoflow.distributed import Context
from topoflow.errors import RunDirectoryError

log = logging.getLogger(__name__)


class CheckpointSaver:
    """Writes checkpoints of one run into its directory, and deletes those that need not stay.

    Args:
        capture: returns the whole content of a checkpoint; called on rank 0 only.
        resumed_from: a checkpoint that must stay until a newer one is whole.
    """

    def __init__(
        self,
        context: Context,
        directory: CheckpointDirectory,
        config: CheckpointConfig,
        capture: Callable[[], dict[str, Any]],
        resumed_from: Path | None = None,
    ):
        self._context, self._directory, self._config, self._capture = context, directory, config, capture
        self._keep = {resumed_from} if resumed_from is not None else set()

    @property
    def keeps_best(self) -> bool:
        """Whether a new lowest validation loss is worth a checkpoint of its own."""
        return self._config.keep_best

    def save(self, is_best: bool) -> Path | None:
        """Commit a checkpoint of the present state; call on every rank.

        Returns:
            Its folder, or None where the write failed and checkpoint.on_error is `continue`.

        Raises:
            RunDirectoryError: the write failed and checkpoint.on_error is `stop`. Older checkpoints are untouched.
        """
        folder, failure = None, None
        if self._context.is_main:
            try:
                folder = self._directory.save(self._capture(), is_best and self._config.keep_best)
                self._keep.clear()
            except OSError as error:
                failure = f"checkpoint in {self._directory.path}: not written: {error.strerror or error}"
            else:
                self._prune()
        folder, failure = self._context.broadcast_object((folder, failure))
        if failure is None:
            return folder
        if self._config.on_error == "continue":
            if self._context.is_main:
                log.error("%s; training goes on (checkpoint.on_error=continue)", failure)
            return None
        refusal = RunDirectoryError(f"{failure}; older checkpoints are as they were")
        refusal.shared = True
        raise refusal

    def _prune(self) -> None:
        try:
            self._directory.prune(self._config.keep_last, self._keep)
        except OSError as error:
            log.warning("%s: an old checkpoint could not be deleted: %s", self._directory.path, error)
