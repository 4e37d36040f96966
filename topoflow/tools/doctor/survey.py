"""Asking all processes the same question, so that none waits for one that fails or hangs."""

import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from topoflow.errors import Refusal
from topoflow.ranks import Context
from topoflow.tools.doctor.report import FAIL, Finding


@dataclass(frozen=True)
class Answer:
    """What one process said: a value, or why there is none. is_late: because its time was over."""

    rank: int
    value: Any = None
    error: str | None = None
    is_late: bool = False


class Survey:
    """All processes of the launch, by node. Every process makes the same calls in the same order.

    ranks_of: {host name: its ranks}. is_leader: whether this process is the first of its node, which alone answers
    what is asked of nodes. left_behind: whether a question is still unanswered in a thread of this process.
    """

    def __init__(self, context: Context):
        self.context = context
        self.left_behind = False
        self.node_of: list[str] = context.gather_objects(socket.gethostname())
        self.ranks_of: dict[str, list[int]] = {}
        for rank, node in enumerate(self.node_of):
            self.ranks_of.setdefault(node, []).append(rank)
        self.leaders = [ranks[0] for ranks in self.ranks_of.values()]
        self.is_leader = context.rank in self.leaders

    def ask_ranks(self, question: Callable[[], Any], seconds: float = 10.0) -> list[Answer]:
        """The answers of all processes, in the order of ranks, on every process.

        `question` must call no collective operation. Whatever it raises, or a time longer than `seconds`, becomes an
        answer with an error.
        """
        return self.context.gather_objects(self._answer(question, seconds))

    def ask_nodes(self, question: Callable[[], Any], seconds: float = 10.0) -> list[Answer]:
        """The same of the first process of each node."""
        answer = self._answer(question, seconds) if self.is_leader else None
        return [said for said in self.context.gather_objects(answer) if said is not None]

    def _answer(self, question: Callable[[], Any], seconds: float) -> Answer:
        said: list[Answer] = []
        rank = self.context.rank

        def ask() -> None:
            try:
                if self.context.device.type == "cuda":
                    torch.cuda.set_device(self.context.device)  # each thread has a current device of its own
                said.append(Answer(rank, question()))
            except Refusal as refusal:
                said.append(Answer(rank, error=str(refusal)))
            except OSError as error:
                where = f"{error.filename}: " if error.filename else ""
                said.append(Answer(rank, error=f"{where}{error.strerror or error}"))
            except Exception as error:  # noqa: BLE001 (a check that breaks is a finding, and nobody may wait for it)
                text = (str(error).splitlines() or [""])[0]
                said.append(Answer(rank, error=f"{type(error).__name__}: {text}"))

        # a dead file system answers no system call: only the thread that made it waits
        thread = threading.Thread(target=ask, name="doctor", daemon=True)
        thread.start()
        thread.join(seconds)
        if said:
            return said[0]
        self.left_behind = True
        error = f"no answer within {seconds:g} s: does a file system or a device hang?"
        return Answer(rank, error=error, is_late=True)

    def barrier(self) -> None:
        """Return when all processes are here."""
        self.context.gather_rows(torch.zeros(1))

    def finding(self, verdict: str, rank: int, text: str, whole_node: bool = False) -> Finding:
        """A finding about a process, or about the whole node that it is on."""
        node = self.node_of[rank]
        return Finding(verdict, node, tuple(self.ranks_of[node]) if whole_node else (rank,), text)

    def about_all(self, verdict: str, text: str) -> Iterator[Finding]:
        """The same finding for every node."""
        return (Finding(verdict, node, tuple(ranks), text) for node, ranks in self.ranks_of.items())

    def failures(self, answers: Iterable[Answer], whole_node: bool = False) -> Iterator[Finding]:
        """A finding for each answer that is none."""
        return (
            self.finding(FAIL, answer.rank, answer.error, whole_node) for answer in answers if answer.error is not None
        )


def values(answers: Iterable[Answer]) -> dict[int, Any]:
    """{rank: what it said}, of those who did."""
    return {answer.rank: answer.value for answer in answers if answer.error is None}
