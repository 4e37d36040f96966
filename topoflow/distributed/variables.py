"""Variables of the environment as numbers, and in whole sets."""

from collections.abc import Mapping, Sequence

from topoflow.errors import ConfigError


def read_integer(environ: Mapping[str, str], name: str) -> int:
    """A number of 0 or more.

    Raises:
        ConfigError: anything else.
    """
    value = environ[name].strip()
    if not (value.isascii() and value.isdigit()):
        raise ConfigError(f"environment: {name}={environ[name]!r}: expected an integer of 0 or more")
    return int(value)


def refuse_half_set(environ: Mapping[str, str], marks: Sequence[str], names: Sequence[str]) -> None:
    """If one of `marks` is set, all `names` must be.

    Raises:
        ConfigError: naming those that are set and those that are missing.
    """
    missing = [name for name in names if name not in environ]
    if missing and any(name in environ for name in marks):
        there = ", ".join(name for name in names if name in environ)
        raise ConfigError(f"environment: {there} set without {', '.join(missing)}: expected all of them or none")
