"""What --help shows of every key: its type, its default and its docstring."""

import argparse
import ast
import dataclasses
import inspect
import itertools
import textwrap
import typing

from topoflow.config import schema
from topoflow.config.coercion import describe


class HelpfulParser(argparse.ArgumentParser):
    """A parser whose epilog may be a function that makes the text: called when help is asked for, not at each start."""

    def format_help(self) -> str:
        if callable(self.epilog):
            self.epilog = self.epilog()
        return super().format_help()


def field_docstrings(kind: type) -> dict[str, str]:
    """The string below each field of a dataclass: {field: docstring}."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body
    return {
        field.target.id: inspect.cleandoc(text.value.value)
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def config_help(width: int = 112) -> str:
    """Every section and key of the config as lines of text."""
    lines = ["config keys (in CONFIG, or as section.key=value on the command line):"]
    for section, kind in typing.get_type_hints(schema.Config).items():
        lines += ["", f"{section}: {inspect.getdoc(kind)}"]
        hints, docstrings = typing.get_type_hints(kind), field_docstrings(kind)
        for field in dataclasses.fields(kind):
            lines.append(f"  {section}.{field.name}  ({describe(hints[field.name])}; {_default(field)})")
            lines += textwrap.wrap(docstrings[field.name], width, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return f"default {_as_written(field.default)}"
    if field.default_factory is not dataclasses.MISSING:
        return f"default {_as_written(field.default_factory())}"
    return "required"


def _as_written(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return "[" + ", ".join(_as_written(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_as_written(item)}" for name, item in value.items()) + "}"
    return str(value)
