from topoflow.text import format_table, matches, number_ranges, shorten


def test_a_list_is_shortened_after_so_many_names():
    assert shorten(["a", "b"]) == "a, b"
    assert shorten(range(10), most=3) == "0, 1, 2 and 7 more"
    assert shorten([], most=3) == ""


def test_consecutive_numbers_are_written_as_a_range():
    assert number_ranges([7, 0, 1, 2, 3]) == "0-3, 7"
    assert number_ranges([5]) == "5"
    assert number_ranges([]) == ""


def test_a_table_has_aligned_columns():
    assert format_table(["name", "n"], [["a", "100"], ["longer", "2"]]) == ["name      n", "a       100", "longer    2"]


def test_names_match_globs_by_case():
    assert matches("model.wind", ["optim.*", "model.w*"])
    assert not matches("model.wind", ["MODEL.*"])
    assert not matches("model.wind", [])
