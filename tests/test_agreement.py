from topoflow.ranks import describe_differences

USUAL = {"torch": "2.13.0", "numpy": "2", "python": "3.11"}


def test_disagreement_is_a_table_of_values_per_rank():
    odd = {3: {"torch": "2.12.1"}, 5: {"torch": "2.12.1", "numpy": "1"}}
    gathered = [(f"n{rank // 4}", USUAL | odd.get(rank, {})) for rank in range(8)]
    assert describe_differences(gathered, "at the start").splitlines() == [
        "ranks disagree at the start: expected the same values on all",
        "  numpy",
        "    2 on rank(s) 0-4, 6-7 (n0, n1)",
        "    1 on rank(s) 5 (n1)",
        "  torch",
        "    2.13.0 on rank(s) 0-2, 4, 6-7 (n0, n1)",
        "    2.12.1 on rank(s) 3, 5 (n0, n1)",
    ]


def test_of_many_differences_the_first_are_shown():
    gathered = [("n0", {str(n): "a" for n in range(20)}), ("n0", {})]
    lines = describe_differences(gathered, "after step 3").splitlines()
    assert lines[1:4] == ["  0", "    a on rank(s) 0 (n0)", "    nothing on rank(s) 1 (n0)"]
    assert lines[-1] == "  and 12 more"
