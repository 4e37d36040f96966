"""The recipe: a short YAML file that says which files to prepare and how."""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from topoflow.errors import ConfigError, MissingPath

Stamp = Literal["start", "middle", "end"]
Kind = Literal["grid", "stations"]
Method = Literal["area", "bilinear"]


@dataclass(frozen=True)
class Source:
    """Files that are read in the same way."""

    path: str | tuple[str, ...]
    """A path or glob, or a list of them; relative to the recipe's folder."""
    kind: Kind | None = None
    """grid: fields; stations: time series at points. By default what the file's dimensions say."""
    names: Mapping[str, str] = field(default_factory=dict)
    """{our name: name in the file}; also for variables that the table of names does not know, and coordinates
    (time, lat, lon, station)."""
    units: Mapping[str, str] = field(default_factory=dict)
    """{our name: unit of the file}, where the file states none, or a wrong one."""
    time_zone: str | None = None
    """Zone of stamps that state none: an IANA name (Asia/Shanghai) or an offset (UTC+8). By default UTC, unless an
    attribute of the file states another one."""
    stamp: Stamp | None = None
    """Whether a stamp is the start, middle or end of the hour that a mean is taken over; by default the end. Prepared
    data have the end, when the mean is known; stamps of values at an instant are `end` too: they stay as they are."""
    time_in_name: str | None = None
    """Where the names of the files have their times: as strptime writes them, such as `CN-Reanalysis%Y%m%d%H`."""
    dates: Literal["day first", "month first"] | None = None
    """Order of day and month in dates such as 05/01/2019 of a table, where no date of the file tells."""
    off_hour: Literal["refuse", "nearest"] = "refuse"
    """What to do with stamps that all lie at the same minute between two hours of UTC, as those of zones such as
    UTC+5:30. nearest: move them to the nearest hour (half an hour: to the later one)."""
    levels: Mapping[str, str] = field(default_factory=dict)
    """{dimension of the file: position from 0}, where a variable has dimensions beside time and place, as in
    `levels: {bottom_top: 0}`."""
    stations: str | None = None
    """Table with the position of each station (id, latitude, longitude), where the file has none."""
    ratio: Literal["20 degC", "25 degC", "file"] = "file"
    """Conditions at which mixing ratios (ppb, kg kg-1) become ug m-3, at 1013.25 hPa. file: temperature and pressure
    of the same source. 20 degC is the EU's (2008/50/EC, Annex VI), 25 degC the US EPA's."""


@dataclass(frozen=True)
class GridSpec:
    """The grid to write. One of: native (nothing set), like, degrees with box, shape."""

    like: str | None = None
    """A file (grid, prepared data or NetCDF) whose cells are used."""
    degrees: float | None = None
    """Side of a cell of a regular latitude-longitude grid."""
    box: tuple[float, float, float, float] | None = None
    """South, north, west, east edge in degrees, with `degrees`. By default the extent of the data."""
    shape: tuple[int, int] | None = None
    """Rows and columns over the extent of the gridded source."""
    method: Method = "area"
    """area: mean over what a cell covers; bilinear: between the four nearest centres."""


@dataclass(frozen=True)
class Rules:
    """What to drop, and how far to go."""

    longest_gap: str = "31d"
    """Longest gap in time that is filled with missing values, in hours (48h) or days (31d)."""
    drop: tuple[str, ...] = ()
    """Values to treat as missing: our name and a comparison or number, as in `pm25 < -50`, `o3 == 0`, `pm10 > 5000`,
    or `any == -999` for every variable. Each is counted by variable and year in the report."""
    keep: tuple[str, ...] = ()
    """Values that are right although they look like marks of missing values or cannot be, as in `pm10 > 20000`."""
    positions: Literal["refuse", "drop"] = "refuse"
    """Stations whose position cannot be."""
    constant: Literal["refuse", "keep", "drop"] = "refuse"
    """Hours in which a whole field has one value, where its neighbours in time have not."""
    duplicates: Literal["refuse", "first", "last", "mean"] = "refuse"
    """A station (or field) with several values for one hour."""
    incomplete: Literal["refuse", "missing", "fill"] = "refuse"
    """Chunks of a Zarr array that were never written. fill: they hold the array's fill value, as where the program that
    wrote them left out chunks of zeros."""
    sea: Literal["refuse", "zero"] = "zero"
    """Cells of the terrain without a height: 0 m, as over the sea, and counted."""


@dataclass(frozen=True)
class Advect:
    """Variables to carry along the wind, in advance for `data.advect`."""

    tracers: tuple[str, ...]
    """Variables that change in time, and fields that do not."""
    leads: tuple[int, ...]
    """Lead times in hours, increasing."""


@dataclass(frozen=True)
class Recipe:
    """A whole recipe. Built by `read_recipe` or `recipe_of_paths`."""

    sources: tuple[Source, ...]
    grid: GridSpec = GridSpec()
    frequency: str | None = None
    """1h, 3h or 6h; by default the longest step of the sources."""
    variables: tuple[str, ...] | None = None
    """Names of the variables to write, in this order; by default all that the sources have."""
    elevation: str | None = None
    """File with the terrain height; by default that of a source."""
    population: str | None = None
    """File with the number of people in each cell; by default that of a source."""
    mask: str | None = None
    """File with the cells that count; by default all."""
    steps: tuple[int, ...] | None = None
    """For weather forecasts (`data.forecast`): the hours after the issue to write, such as [0, 6, 12]. The times are
    then those of issue, and `u+6h` is u 6 hours later."""
    advect: Advect | None = None
    """Further variables, `pm25_advected+12h` and so on, that `data.advect` then does not compute while training."""
    dtype: Literal["float32", "float16"] = "float32"
    """float32 holds values exactly; float16 takes half the space, and the report states the error."""
    rules: Rules = Rules()


def read_recipe(path: Path) -> Recipe:
    """Read a recipe from YAML; paths in it are relative to its folder.

    Raises:
        MissingPath: there is no such file.
        ConfigError: it is not YAML, has an unknown key (the nearest is named) or a value of another type.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingPath(f"{path} does not exist: expected a recipe (YAML) or data files") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: is not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not content.get("sources"):
        raise ConfigError(f"{path}: has no sources: expected a recipe with `sources: [{{path: ...}}]`")
    recipe = _build(Recipe, content, str(path))
    return _resolve(recipe, path.parent)


def recipe_of_paths(paths: list[str]) -> Recipe:
    """Return the recipe that `prepare PATH...` starts from: one source for each path, all else by default."""
    return Recipe(sources=tuple(Source(path=path) for path in paths))


def recipe_text(recipe: Recipe) -> str:
    """Return a recipe as YAML, without the keys that have their default."""
    return yaml.safe_dump(_plain(recipe), sort_keys=False, allow_unicode=True, width=110)


def _build(kind: type, content: Any, where: str) -> Any:
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: {content!r}: expected a mapping with {', '.join(_fields(kind))}")
    known, hints = _fields(kind), typing.get_type_hints(kind)
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.4)
            hint = f" (nearest: {near[0]})" if near else ""
            raise ConfigError(f"{where}: {key!r} is no key of a recipe here{hint}: expected one of {', '.join(known)}")
    return kind(**{key: _convert(hints[key], value, f"{where}: {key}") for key, value in content.items()})


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        is_list = isinstance(value, list)
        fitting = [k for k in arguments if k is not type(None) and (get_origin(k) is tuple) == is_list]
        if not fitting:
            raise ConfigError(f"{where}: {value!r}: expected {_words(kind)}")
        return _convert(fitting[0], value, where)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{where}: {value!r}: expected one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        element = arguments[0]
        is_any_length = arguments[-1] is Ellipsis
        if not isinstance(value, list) or not (is_any_length or len(value) == len(arguments)):
            number = "" if is_any_length else f" of {len(arguments)}"
            raise ConfigError(f"{where}: {value!r}: expected a list{number}")
        return tuple(_convert(element, item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict) or not all(isinstance(v, str | int | float) for v in value.values()):
            raise ConfigError(f"{where}: {value!r}: expected a mapping of names to text")
        return {str(key): str(item) for key, item in value.items()}
    if dataclasses.is_dataclass(kind):
        return _build(typing.cast(type, kind), value, where)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    raise ConfigError(f"{where}: {value!r}: expected {_words(kind)}")


def _words(kind: Any) -> str:
    return {str: "text", float: "a number", int: "a whole number"}.get(kind) or str(kind).replace("typing.", "")


def _fields(kind: type) -> list[str]:
    return [f.name for f in dataclasses.fields(kind)]


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kept = {}
        for f in dataclasses.fields(value):
            item = getattr(value, f.name)
            has_default = f.default is not dataclasses.MISSING and item == f.default
            if not has_default and item not in ({}, ()):
                kept[f.name] = _plain(item)
        return kept
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return dict(value) if isinstance(value, Mapping) else value


_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def is_url(path: str) -> bool:
    """Return whether a path names something on another machine (s3://, https://)."""
    return _URL.match(path) is not None


def _resolve(recipe: Recipe, folder: Path) -> Recipe:
    def at(path: str | None) -> str | None:
        return path if path is None or is_url(path) else str(folder / Path(path).expanduser())

    sources = tuple(
        dataclasses.replace(
            source,
            path=at(source.path) if isinstance(source.path, str) else tuple(at(p) or "" for p in source.path),
            stations=at(source.stations),
        )
        for source in recipe.sources
    )
    grid = dataclasses.replace(recipe.grid, like=at(recipe.grid.like))
    statics = {key: at(getattr(recipe, key)) for key in ("elevation", "population", "mask")}
    return dataclasses.replace(recipe, sources=sources, grid=grid, **statics)
