import socket

import pytest
import torch

from topoflow.errors import RanksDisagree
from topoflow.launch import Launch
from topoflow.ranks import Context, require_agreement


class ManyRanks(Context):
    """Hears the same from rank 0 as from others, but for the facts of `odd` ranks."""

    def __init__(self, world_size, odd):
        super().__init__(Launch("a test", "a test"), torch.device("cpu"))
        self.world_size, self.odd = world_size, odd

    def are_same(self, values):
        return not self.odd

    def gather_objects(self, item):
        host, facts = item
        others = {rank: (f"n{rank}", {**facts, **changed}) for rank, changed in self.odd.items()}
        return [others.get(rank, (host, facts)) for rank in range(self.world_size)]


def test_agreement_is_silent():
    require_agreement(ManyRanks(8, odd={}), {"torch": "2.13.0"}, "at the start")


def test_disagreement_is_a_table_of_who_has_what():
    odd = {3: {"torch": "2.12.1"}, 5: {"torch": "2.12.1", "numpy": "1"}}
    with pytest.raises(RanksDisagree) as refusal:
        require_agreement(ManyRanks(8, odd), {"torch": "2.13.0", "numpy": "2", "python": "3.11"}, "at the start")
    here = socket.gethostname()
    assert str(refusal.value).splitlines() == [
        "ranks disagree at the start: expected one program on one data set",
        "  numpy",
        f"    2 on rank(s) 0-4, 6-7 ({', '.join(sorted([here, 'n3']))})",
        "    1 on rank(s) 5 (n5)",
        "  torch",
        f"    2.13.0 on rank(s) 0-2, 4, 6-7 ({here})",
        "    2.12.1 on rank(s) 3, 5 (n3, n5)",
    ]
    assert refusal.value.shared
