import dataclasses
import typing

import pytest

from topoflow.config import Config
from topoflow.config_io import config_help, field_docstrings

SECTIONS = typing.get_type_hints(Config)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_has_a_docstring_and_is_shown_with_it(section):
    docstrings, text = field_docstrings()[SECTIONS[section].__name__], " ".join(config_help().split())
    for field in dataclasses.fields(SECTIONS[section]):
        assert docstrings[field.name]
        assert f"{section}.{field.name} (" in text
        assert " ".join(docstrings[field.name].split()) in text
