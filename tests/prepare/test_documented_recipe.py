"""docs/data.md names what a recipe can say: all of it, and nothing else."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from topoflow.tools.prepare.recipe import GridSpec, Recipe, Rules, Source, read_recipe

TEXT = (Path(__file__).parents[2] / "docs/data.md").read_text()
RECIPE = TEXT[TEXT.index("## A recipe") : TEXT.index("## What it does")]
ROWS = dict(re.findall(r"^\| `(\w+)`.*?\| (.*) \|$", RECIPE, re.MULTILINE))
FINDINGS = TEXT[TEXT.index("## What findings mean") :]
LINES = [
    line for row in re.findall(r"^\| .*? \| (.*) \|$", FINDINGS, re.MULTILINE) for line in re.findall(r"`([^`]+)`", row)
]


def words_of(row):
    return set(re.findall(r"`(\w+)", row))


def keys_of(kind):
    return {field.name for field in dataclasses.fields(kind)}


def test_the_keys_of_a_recipe_are_documented():
    heads = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", RECIPE, re.MULTILINE))))
    assert heads == keys_of(Recipe)


@pytest.mark.parametrize(("row", "kind"), [("sources", Source), ("rules", Rules)])
def test_the_keys_of_its_parts_are_documented(row, kind):
    assert words_of(ROWS[row]) == keys_of(kind)


def test_the_keys_of_the_grid_are_documented():
    assert words_of(ROWS["grid"]) == keys_of(GridSpec) - {"box", "method"} | {"box", "method"} & words_of(ROWS["grid"])
    assert {"box", "method"} <= set(re.findall(r"\w+", ROWS["grid"]))


@pytest.mark.parametrize("line", [line for line in LINES if re.match(r"\w+: \S", line) and "FILE" not in line])
def test_each_line_that_settles_a_finding_is_one_of_a_recipe(tmp_path, line):
    content = yaml.safe_load(line)
    [key] = content
    of_recipe = key in keys_of(Recipe)
    recipe = {"sources": [{"path": "a.nc"}]} if key != "sources" else {}
    if of_recipe:
        recipe |= content
    elif key in keys_of(Source):
        recipe["sources"][0] |= content
    else:
        recipe["rules" if key in keys_of(Rules) else "grid"] = content
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    read_recipe(tmp_path / "recipe.yaml")
