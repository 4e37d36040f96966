"""`topoflow prepare`: read files as people have them, write the one format that training reads."""

import dataclasses
import hashlib
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from topoflow.data.channels import Channel
from topoflow.data.prepared.manifest import Manifest, read_manifest
from topoflow.errors import ConfigError, DataError
from topoflow.terminal import print_output
from topoflow.tools.prepare.advected import WithAdvected
from topoflow.tools.prepare.by_step import ByStep, require_steps
from topoflow.tools.prepare.findings import Findings
from topoflow.tools.prepare.joined import JoinedSource
from topoflow.tools.prepare.provenance import describe
from topoflow.tools.prepare.recipe import Recipe, read_recipe, recipe_of_paths, recipe_text
from topoflow.tools.prepare.regridding import Target
from topoflow.tools.prepare.report import finding_lines, write_report
from topoflow.tools.prepare.scan import Opener, Scan, scan
from topoflow.tools.prepare.target import DEFAULT_DEGREES, Statics, build_target
from topoflow.tools.prepare.verification import verify
from topoflow.tools.prepare.writing import Fields, write


@dataclass(frozen=True)
class Prepared:
    """What `prepare` did. lines: of the report. is_decided: nothing needs a decision. findings: all, one a line."""

    recipe: Recipe
    lines: list[str]
    is_decided: bool
    findings: list[str]


def load_recipe(paths: list[str]) -> Recipe:
    """Return the recipe of a YAML file, or that of data files.

    Raises:
        MissingPath, ConfigError: see `read_recipe`.
    """
    if len(paths) == 1 and paths[0].endswith((".yaml", ".yml")):
        return read_recipe(Path(paths[0]))
    if any(path.endswith((".yaml", ".yml")) for path in paths):
        raise ConfigError(f"{' '.join(paths)}: expected one recipe, or data files")
    return recipe_of_paths(paths)


def prepare(recipe: Recipe, output: Path | None, progress: bool = True) -> Prepared:
    """Prepare the data of `recipe` in the folder `output`; None: only look at all of it.

    Nothing is written to `output` while a finding needs a decision.

    Raises:
        ConfigError, DataError: see `write`.
    """
    findings = Findings()
    opener = Opener(recipe, findings)
    try:
        steps = require_steps(recipe) if recipe.steps is not None else (None,)
        scans = [found for step in steps if (found := scan(recipe, opener, findings, step)) is not None]
        target = build_target(recipe.grid, scans[0].pieces, opener, findings) if len(scans) == len(steps) else None
        if target is None:
            return _undecided(recipe, findings)
        recipe = _completed(recipe, scans)
        pieces = scans[0].pieces
        statics = Statics(recipe, target, pieces, opener, findings).build()
        joined = [JoinedSource(recipe, found, target, opener, findings) for found in scans]
        source: Fields = joined[0]
        if recipe.steps is not None:
            source = ByStep(recipe.steps, joined, findings)
        elif recipe.advect is not None:
            source = WithAdvected(source, statics, recipe.advect)
        how = {
            Channel(name, step or 0).name: next(p.readers[name].text for p in found.pieces if name in p.readers)
            for step, found in zip(steps, scans, strict=True)
            for name in found.names
        }
        manifest = None

        def report(folder: Path, manifest: Manifest) -> None:
            write_report(folder, manifest, findings.sorted(), how)

        if output is None:
            _look(source, progress)
        else:
            paths = sorted({piece.path for found in scans for piece in found.pieces})
            settings = _settings(recipe, source, target, statics)
            provenance = partial(describe, recipe, paths)
            manifest = write(source, statics, settings, provenance, output, progress, report)
    finally:
        opener.close()
    if manifest is None or output is None:
        return _undecided(recipe, findings)
    text = output / "report.txt"
    if not text.exists():
        report(output, manifest)
    lines = text.read_text(encoding="utf-8").splitlines()
    return Prepared(recipe, lines, True, [finding.line() for finding in findings.sorted()])


def _undecided(recipe: Recipe, findings: Findings) -> Prepared:
    """What was only looked at, or may not be written."""
    found = findings.sorted()
    lines = finding_lines(found)
    if len(lines) < len(found):
        lines[-1] += ": --check prints all"
    return Prepared(recipe, lines, not findings.open(), [finding.line() for finding in found])


def _look(source: Fields, progress: bool) -> None:
    """Read and check everything."""
    from tqdm import tqdm

    from topoflow.data.moments import day_pieces

    pieces = day_pieces(source.times, np.arange(len(source.times)))
    with tqdm(total=len(source.times), desc="check", unit="hour", disable=not progress) as bar:
        for piece, _, _ in source.days(pieces):
            bar.update(len(piece))
    source.finish()


def _completed(recipe: Recipe, scans: list[Scan]) -> Recipe:
    """With what was chosen by default, as it is to be kept."""
    grid = recipe.grid
    kinds = {piece.place.kind for piece in scans[0].pieces if piece.readers}
    if grid == type(grid)() and kinds == {"stations"}:
        grid = dataclasses.replace(grid, degrees=DEFAULT_DEGREES)
    frequency = recipe.frequency or (f"{scans[0].step_hours}h" if recipe.steps is None else None)
    variables = recipe.variables or tuple(dict.fromkeys(name for found in scans for name in found.names))
    return dataclasses.replace(recipe, grid=grid, frequency=frequency, variables=variables)


def _settings(recipe: Recipe, source: Fields, target: Target, statics: dict[str, np.ndarray]) -> dict[str, str]:
    """What must stay the same in data that are appended."""
    mask = statics.get("mask")
    return {
        "variables": ", ".join(f"{name} {unit}" for name, unit in source.units.items()),
        "frequency": f"{source.step_hours}h",
        "grid": f"{target.shape[0]}x{target.shape[1]} {recipe.grid.method}",
        "dtype": recipe.dtype,
        "mask": "none" if mask is None else hashlib.sha256(mask.tobytes()).hexdigest()[:16],
        "rules.drop": ", ".join(recipe.rules.drop),
    }


def run(paths: list[str], output: Path | None, check: bool) -> int:
    """Prepare or check, print the report, and return the exit status."""
    recipe = load_recipe(paths)
    done = prepare(recipe, None if check else output, progress=sys.stderr.isatty())
    is_new = not paths[0].endswith((".yaml", ".yml"))
    if is_new:
        print_output(f"# the recipe of these files; keep it as recipe.yaml to change it\n{recipe_text(done.recipe)}")
    print_output("\n".join(done.findings if check else done.lines))
    if done.is_decided:
        return 0
    if check:
        return 1
    raise DataError(f"{output}: not written: expected a recipe that settles what is listed above")


def run_verify(folder: Path) -> int:
    """Read a prepared data set again, compare it with its hashes, and return the exit status.

    Raises:
        DataError: it is damaged.
    """
    _, damage = verify(folder, sys.stderr.isatty())
    if damage:
        print_output("\n".join(damage))
        raise DataError(f"{folder}: damaged in {len(damage)} place(s), the first: {damage[0]}")
    print_output(f"{folder}: {len(read_manifest(folder).files())} files match the manifest")
    return 0
