"""From a value as YAML gives it to the type that the schema declares."""

import math
import types
import typing
from typing import Any, Literal

from topoflow.errors import ConfigError


def describe(kind: Any) -> str:
    """The type in a user's words, for help and errors."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is type(None):
        return "null"
    if kind in _WORDS:
        return _WORDS[kind]
    if origin is Literal:
        return " | ".join(str(value) for value in arguments)
    if origin in (types.UnionType, typing.Union):
        return " | ".join(describe(option) for option in arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        item = describe(arguments[0])
        return f"list of ({item})" if "|" in item else f"list of {item}"
    if origin is tuple:
        return "[" + ", ".join(describe(item) for item in arguments) + "]"
    if origin is dict:
        return "{name: " + describe(arguments[1]) + "}"
    raise AssertionError(f"the schema uses a type that the loader does not know: {kind}")


_WORDS = {bool: "true | false", int: "integer", float: "number", str: "text"}


def coerce(kind: Any, value: Any, key: str) -> Any:
    """`value` as the type `kind` of the schema.

    Integers pass as numbers, whole numbers such as 1e3 as integers, lists become tuples. Nothing else is converted.

    Raises:
        ConfigError: the value is of another type, or a number is not finite.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return _coerce_union(kind, arguments, value, key)
    if origin is Literal:
        if any(value == option and type(value) is type(option) for option in arguments):
            return value
    elif origin is tuple and isinstance(value, list | tuple):
        if arguments[-1] is Ellipsis:
            return tuple(coerce(arguments[0], item, key) for item in value)
        if len(value) == len(arguments):
            return tuple(coerce(item_kind, item, key) for item_kind, item in zip(arguments, value, strict=True))
    elif origin is dict and isinstance(value, dict):
        return {coerce(str, name, key): coerce(arguments[1], item, f"{key}.{name}") for name, item in value.items()}
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    elif kind is int and isinstance(value, int | float) and not isinstance(value, bool) and value % 1 == 0:
        return int(value)
    elif kind in (bool, str, type(None)) and type(value) is kind:
        return value
    raise ConfigError(f"{key}: {value!r} is not usable: expected {describe(kind)}")


def _coerce_union(kind: Any, options: tuple[Any, ...], value: Any, key: str) -> Any:
    for option in options:
        try:
            return coerce(option, value, key)
        except ConfigError:
            continue
    raise ConfigError(f"{key}: {value!r} is not usable: expected {describe(kind)}")


def takes_text(kind: Any) -> bool:
    """Whether a key of this type takes free text, so that `run.dir=2019` means the text 2019."""
    return kind is str or (typing.get_origin(kind) in (types.UnionType, typing.Union) and str in typing.get_args(kind))
