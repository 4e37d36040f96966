import dataclasses
import typing

import pytest

from topoflow.config import Config
from topoflow.config_io import HelpfulParser, config_help, field_docstrings

SECTIONS = typing.get_type_hints(Config)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_has_a_docstring_and_is_shown_with_it(section):
    docstrings, text = field_docstrings(SECTIONS[section]), " ".join(config_help().split())
    for field in dataclasses.fields(SECTIONS[section]):
        assert docstrings[field.name]
        assert f"{section}.{field.name} (" in text
        assert " ".join(docstrings[field.name].split()) in text


def test_the_epilog_is_made_when_help_is_asked_for(capsys):
    asked = []
    parser = HelpfulParser(epilog=lambda: asked.append("help") or "the keys")
    parser.add_argument("word")
    parser.parse_args(["word"])
    assert asked == []
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    assert capsys.readouterr().out.endswith("\n\nthe keys\n")
    assert asked == ["help"]
