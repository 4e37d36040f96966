"""Read a config from YAML and `section.key=value` overrides, write it, compare two, and document the keys."""

import argparse
import ast
import copy
import dataclasses
import difflib
import functools
import inspect
import itertools
import math
import operator
import re
import sys
import textwrap
import types
import typing
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import yaml

from topoflow import config as schema
from topoflow.config import Alters, Config
from topoflow.errors import ConfigError, MissingPath, Refusal
from topoflow.terminal import prepare_process, print_error

_SECTIONS: dict[str, Any] = {section.name: section.type for section in dataclasses.fields(Config)}
_KEYS = {f"{name}.{key.name}": key for name, kind in _SECTIONS.items() for key in dataclasses.fields(kind)}
"""Each `section.key` as a field of its dataclass."""
_REPLACED = {
    "data.workers": "did you mean data.threads?",
    "data.mask": "the mask is prepared with the data (`mask:` in the recipe of `topoflow prepare`)",
    "data.in_memory": "prepared data are mapped into memory, nothing has to be chosen",
    "data.cache": "prepared data come with what it kept, nothing has to be chosen",
}
"""Keys of earlier versions that altered nothing, and what to do now. Configs of checkpoints may still have them."""


def describe(kind: Any) -> str:
    """Return the type in a user's words, for help and errors."""
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
    """Return `value` as the type `kind` of the schema.

    Integers pass as numbers, whole numbers such as 1e3 as integers, lists become tuples. Nothing else is converted.

    Raises:
        ConfigError: the value is of another type, or a number is not finite.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        for option in arguments:
            with suppress(ConfigError):
                return coerce(option, value, key)
    elif origin is Literal:
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
    expected = describe(kind)
    if isinstance(value, float) and not math.isfinite(value):
        expected = expected.replace("number", "a finite number")
    raise ConfigError(f"{key}: {value!r} is not usable: expected {expected}")


def takes_text(kind: Any) -> bool:
    """Return whether a key of this type takes free text, so that `run.dir=2019` means the text 2019."""
    return kind is str or (typing.get_origin(kind) in (types.UnionType, typing.Union) and str in typing.get_args(kind))


class _Loader(yaml.SafeLoader):
    """YAML whose scalars are those of YAML 1.2's core: 1e-4 is a number, a date is text, `on` and `no` are text."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise ConfigError(f"{twice[0]}: given twice, line {node.start_mark.line + 1}: expected once")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that `_Loader` would take for something else."""


_Loader.yaml_implicit_resolvers = {}
_Dumper.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|false|True|False", "tfTF"),
    ("null", r"null|Null|~|", ["n", "N", "~", ""]),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf)|\.(nan|NaN)", "-+.0123456789"),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read the config from a YAML file and apply `section.key=value` overrides in order.

    Raises:
        MissingPath: the file does not exist.
        ConfigError: unknown key, wrong type, value out of range, or text that is not YAML. The message names the key,
            the value, what was expected and where the value was given.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingPath(f"config file {path}: not found: expected a YAML file, such as configs/demo.yaml")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {path}: not YAML: {' '.join(str(error).split())}") from None
    except ConfigError as error:
        raise ConfigError(f"{error} (in {path})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"config file {path}: not text: expected YAML in UTF-8") from None
    return override_config({} if tree is None else tree, overrides, f"{path}")


def override_config(tree: Any, overrides: Sequence[str], where: str) -> Config:
    """Build the config from nested dicts that came from `where`, with overrides applied in order; see `load_config`."""
    given: dict[str, str] = {}
    tree = copy.deepcopy(tree)
    try:
        _require_sections(tree)
        for override in overrides:
            _apply_override(tree, override, given)
        return config_from_dict(tree)
    except ConfigError as error:
        raise ConfigError(f"{error} ({_where(str(error).partition(':')[0], tree, given, where)})") from None


def _where(key: str, tree: Any, given: dict[str, str], path: str) -> str:
    """Return where the key that an error message begins with was given: the command line, the file or its defaults."""
    for key_given, override in given.items():
        if key_given.startswith(key) or key.startswith(key_given):
            return f"from the command line, {override}"
    section, _, name = key.partition(".")
    in_file = isinstance(tree, dict) and section in tree and (not name or name in (tree[section] or {}))
    return f"in {path}" if in_file else f"with {path}"


def config_from_dict(tree: Any) -> Config:
    """Build the config from nested dicts {section: {key: value}}; see `load_config` for what is refused."""
    _require_sections(tree)
    for name in tree:
        _require_known(str(name), "", _SECTIONS)
    return Config(**{name: _build_section(name, {} if tree.get(name) is None else tree[name]) for name in _SECTIONS})


def config_to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Return the config as plain nested dicts, lists and scalars, every key present."""
    return _plain(dataclasses.asdict(config))


def dump_config(config: Config) -> str:
    """Return the config as YAML; loading it gives the same config."""
    return yaml.dump(config_to_dict(config), Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=100)


@dataclasses.dataclass(frozen=True)
class Change:
    """A key whose value differs from the checkpoint's, and what that alters."""

    key: str
    was: Any
    now: Any
    alters: Alters

    def __str__(self) -> str:
        return f"{self.key}: {self.was!r} -> {self.now!r}"


def changed_keys(saved: dict, config: Config) -> list[Change]:
    """Return the keys that alter anything and differ between a checkpoint's config and this one, sorted by name.

    A key that the checkpoint does not have had its default value. One that this version no longer has is a change of
    the mathematics.
    """
    old, new = {**_defaults(), **_flatten(saved)}, _flatten(config_to_dict(config))
    changes = []
    for key in sorted(old.keys() | new.keys()):
        was, now, alters = old.get(key, "absent"), new.get(key, "absent"), alters_of(key)
        if key == "data.lead_times_hours" and config.model.leads == "joint":
            alters |= Alters.CHANNELS | Alters.NETWORK  # each lead time has outputs of its own
        if key == "data.forecast" and was and now:
            alters = Alters(0)  # as with data.path, contents are compared
        if was != now and alters:
            changes.append(Change(key, was, now, alters))
    return changes


def combined_effect(changes: Iterable[Change]) -> Alters:
    """Return all that some changes alter together."""
    return functools.reduce(operator.or_, (change.alters for change in changes), Alters(0))


def alters_of(key: str) -> Alters:
    """Return what a change of `section.key` alters; of an unknown key, the mathematics."""
    if key in _REPLACED:
        return schema.NOTHING
    return _KEYS[key].metadata["alters"] if key in _KEYS else Alters.MATHEMATICS


def without_replaced(tree: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the config of a checkpoint without the keys of earlier versions that altered nothing."""
    return {
        section: {key: value for key, value in values.items() if f"{section}.{key}" not in _REPLACED}
        for section, values in tree.items()
    }


def _require_sections(tree: Any) -> None:
    if not isinstance(tree, dict):
        raise ConfigError(f"config: {tree!r} is not usable: expected sections {', '.join(_SECTIONS)}")


def _require_known(name: str, prefix: str, known: Collection[str]) -> None:
    if name in known:
        return
    near = [f"{prefix}{match}" for match in difflib.get_close_matches(name, known, n=1, cutoff=0.5)]
    if prefix and not near:  # the key of another section
        keys = {key.partition(".")[2]: key for key in _KEYS}
        near = [keys[match] for match in difflib.get_close_matches(name, keys, n=1, cutoff=0.8)]
    what = "key" if prefix else "section"
    hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
    hint = _REPLACED.get(f"{prefix}{name}", hint)
    raise ConfigError(f"{prefix}{name}: unknown {what}: {hint}")


def _build_section(name: str, values: Any) -> Any:
    fields = {field.name: field for field in dataclasses.fields(_SECTIONS[name])}
    if not isinstance(values, dict):
        raise ConfigError(f"{name}: {values!r} is not usable: expected keys {', '.join(fields)}")
    for key in values:
        _require_known(str(key), f"{name}.", fields)
    for key, field in fields.items():
        if key not in values and _default_of(field) is dataclasses.MISSING:
            raise ConfigError(f"{name}.{key}: missing: expected a value (see --help)")
    return _SECTIONS[name](**{key: coerce(fields[key].type, value, f"{name}.{key}") for key, value in values.items()})


def _apply_override(tree: dict, override: str, given: dict[str, str]) -> None:
    """Set `section.key=value` (or `section.key.name=value` in a key that holds names) in the tree."""
    path, equals, text = override.partition("=")
    path = path.strip()
    given[path] = repr(override)
    if not equals or "." not in path:
        raise ConfigError(f"{path}: not an override: expected section.key=value")
    section, key, *names = path.split(".")
    _require_known(section, "", _SECTIONS)
    _require_known(key, f"{section}.", [field.name for field in dataclasses.fields(_SECTIONS[section])])
    field = _KEYS[f"{section}.{key}"]
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise ConfigError(f"{path}: {text!r} is not a valid value: check its brackets and quotes") from None
    if takes_text(field.type) and isinstance(value, bool | int | float):
        value = text.strip()
    if tree.get(section) is None:
        tree[section] = {}
    if not isinstance(tree[section], dict):
        return  # refused where the section is built
    if names:
        whole = tree[section].get(key, _default_of(field))
        if not isinstance(whole, dict) or len(names) > 1:
            raise ConfigError(f"{path}: unknown key: {section}.{key} holds no names")
        value = {**whole, names[0]: value}
    tree[section][key] = value


def _default_of(field: dataclasses.Field) -> Any:
    """Return the default of a key; MISSING where it is required."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _defaults() -> dict[str, Any]:
    """Return {section.key: default} for all keys that have a default."""
    defaults = {key: _default_of(field) for key, field in _KEYS.items()}
    return {key: _plain(default) for key, default in defaults.items() if default is not dataclasses.MISSING}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _flatten(tree: dict) -> dict[str, Any]:
    return {f"{name}.{key}": value for name, section in tree.items() for key, value in section.items()}


def field_docstrings() -> dict[str, dict[str, str]]:
    """Return the string below each field of each class of the schema: {class: {field: docstring}}."""
    docstrings: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(schema)).body:
        if isinstance(node, ast.ClassDef):
            found = docstrings.setdefault(node.name, {})
            for field, text in itertools.pairwise(node.body):
                match field, text:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(docstring))):
                        found[name] = inspect.cleandoc(docstring)
    return docstrings


def config_help() -> str:
    """Return a text with every section and key of the config: type, default, what a change alters, docstring."""
    lines = ["config keys, in CONFIG or as section.key=value, and what changing each affects on resume:"]
    docstrings = field_docstrings()
    for section, kind in _SECTIONS.items():
        lines += ["", f"{section}: {inspect.getdoc(kind)}"]
        for field in dataclasses.fields(kind):
            default = _default_of(field)
            shown = "required" if default is dataclasses.MISSING else f"default {_as_written(default)}"
            alters = "|".join(str(effect.name).lower() for effect in field.metadata["alters"]) or "nothing"
            lines.append(f"  {section}.{field.name}  ({describe(field.type)}; {shown}; alters {alters})")
            docstring = docstrings[kind.__name__][field.name]
            lines += textwrap.wrap(docstring, 112, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def _as_written(value: Any) -> str:
    """Return a value as YAML in one line."""
    options: dict[str, Any] = {"default_flow_style": True, "sort_keys": False, "width": math.inf}
    return yaml.dump([_plain(value)], Dumper=_Dumper, **options).strip().removeprefix("[").removesuffix("]")


def main(arguments: list[str] | None = None) -> int:
    """Print one resolved value of a config, for launch scripts; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m topoflow.config_io", description="Print one value of a config.")
    parser.add_argument("--print", required=True, dest="key", metavar="SECTION.KEY", help="the key to print")
    parser.add_argument("config", help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args(arguments)
    try:
        values = _flatten(config_to_dict(load_config(options.config, options.overrides)))
        if options.key not in values:
            raise ConfigError(f"{options.key}: unknown key: expected section.key, such as run.dir")
    except Refusal as refusal:
        print_error(str(refusal))
        return refusal.exit_status
    print(values[options.key])
    return 0


if __name__ == "__main__":
    prepare_process()
    sys.exit(main())
