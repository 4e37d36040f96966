"""The table of names and units in docs/data.md is what the program knows."""

from pathlib import Path

from topoflow.tools.prepare.names import AUXILIARY, KNOWN

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def table() -> str:
    """The table as it must be."""
    lines = [
        "| variable | unit | possible values | CF standard names, and names in archives |",
        "|---|---|---|---|",
    ]
    for name, known in KNOWN.items():
        names = [f"`{text}`" for text in (*known.standard_names, *known.exact, *known.names)]
        ours = f"`{name}`*" if name in AUXILIARY else f"`{name}`"
        lines.append(f"| {ours} | {known.unit} | {known.low:g} to {known.high:g} | {' '.join(names)} |")
    return "\n".join(lines)


def test_the_table_of_names_and_units_is_that_of_the_program():
    assert table() in PAGE.read_text(), f"{PAGE.name} must have\n{table()}"
