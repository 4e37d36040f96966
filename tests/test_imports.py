"""The rules of the design on who may import whom, stated on the imports themselves."""

import ast
import functools
import graphlib
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in [ROOT / "train.py", *sorted((ROOT / "topoflow").rglob("*.py"))]
}
# A module imports from lower lines of this list and from its own package, and from nowhere else.
LAYERS = [
    ["__main__"],
    ["cli"],
    ["tools"],
    ["train"],
    ["resume"],
    ["trainer", "evaluation"],
    ["build", "plots"],
    ["bases"],
    ["certificate", "baselines"],
    ["train_state", "metrics", "forecast_case", "spread"],
    ["checkpoint", "reduction", "loss", "rendezvous"],
    ["physics"],
    ["ranks", "data", "model", "optim"],
    ["watch_server"],
    ["watch", "run_dir", "reproducibility"],
    ["data.variables", "physics.advection", "config_io", "logs", "launch", "lease", "activity"],
    ["config", "files", "slurm"],
    ["terminal", "environment"],
    ["errors", "text"],
]
TRAINER_FRAMEWORKS = {"lightning", "pytorch_lightning", "lightning_fabric", "accelerate", "transformers", "ignite"}
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_names(path: Path) -> Iterator[str]:
    """Full dotted names that a file imports, wherever in it: `from a.b import c` is a.b.c."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(name: str) -> str | None:
    """The module of ours that a dotted name is, or is in: topoflow.data.grid.Grid is topoflow.data.grid."""
    while name and name not in FILES:
        name = name.rpartition(".")[0]
    return name or None


@functools.cache
def import_edges() -> set[tuple[str, str]]:
    """(module, module that it imports) of the whole program, without the prefix `topoflow.`."""
    edges = {(module, module_of(name)) for module, path in FILES.items() for name in imported_names(path)}
    short = {
        (importer.removeprefix("topoflow."), (imported or "").removeprefix("topoflow.")) for importer, imported in edges
    }
    return {(importer, imported) for importer, imported in short if imported not in {"", "topoflow", importer}}


MODULES = sorted({module.removeprefix("topoflow.") for module in FILES} - {"topoflow"})


def layer_of(name: str) -> int:
    """Number of the line of LAYERS that names a module or, if none does, the package that it is in."""
    module = name
    while module:
        for number, layer in enumerate(LAYERS):
            if module in layer:
                return number
        module = module.rpartition(".")[0]
    raise AssertionError(f"{name} is in no line of LAYERS")


def violations(edges: set[tuple[str, str]]) -> list[str]:
    """The imports that LAYERS does not allow, and circles of imports."""
    found = []
    for importer, imported in sorted(edges):
        same_package = importer.partition(".")[0] == imported.partition(".")[0]
        if not same_package and layer_of(importer) >= layer_of(imported):
            found.append(f"{importer} imports {imported}")
    graph: dict[str, set[str]] = {}
    for importer, imported in edges:
        graph.setdefault(importer, set()).add(imported)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found.append(" -> ".join(error.args[1]))
    return found


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute access, or an empty text."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_the_files_are_found():
    assert {"train", "topoflow", "topoflow.optim", "topoflow.config", "topoflow.data.grid"} <= set(FILES)
    assert ("optim", "config") in import_edges()


def test_every_module_has_a_layer_and_every_layer_a_module():
    layers = [layer_of(module) for module in MODULES]
    assert set(layers) == set(range(len(LAYERS)))
    named = [part for layer in LAYERS for part in layer]
    assert sorted(named) == sorted(set(named))
    assert set(named) <= set(MODULES)


def test_imports_point_one_way():
    assert violations(import_edges()) == []


@pytest.mark.parametrize("module", MODULES)
def test_an_import_of_a_higher_layer_is_found(module):
    edges, layer, package = import_edges(), layer_of(module), module.partition(".")[0]
    higher = [other for other in MODULES if layer_of(other) < layer and other.partition(".")[0] != package]
    for other in higher:
        assert f"{module} imports {other}" in violations({*edges, (module, other)})
    importers = [importer for importer, imported in edges if imported == module]
    assert all(violations({*edges, (module, importer)}) for importer in importers), "a circle is not found"


def test_nothing_imports_the_composition_roots():
    assert {importer for importer, imported in import_edges() if imported in {"train", "cli"}} <= {"__main__", "cli"}


KNOW_COLLECTIVES = {"topoflow.ranks", "topoflow.rendezvous", "topoflow.watch", "topoflow.reduction"}
KNOW_LAUNCHERS = {"topoflow.launch", "topoflow.slurm"}


def test_few_modules_know_launchers_and_collectives():
    offenders = []
    for module, path in FILES.items():
        if module in KNOW_COLLECTIVES:
            continue
        offenders += [f"{module} imports {n}" for n in imported_names(path) if n.startswith("torch.distributed")]
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Attribute) and dotted(node).startswith("torch.distributed"):
                offenders.append(f"{module}:{node.lineno} uses {dotted(node)}")
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                words = node.value.split("=")[0]
                if module not in KNOW_LAUNCHERS and (words in LAUNCHER_VARIABLES or words.startswith("SLURM_")):
                    offenders.append(f"{module}:{node.lineno} names {words}")
    assert not offenders


def test_few_modules_touch_the_environment():
    """launch and environment read and set launchers' and torch's variables; reproducibility sets that of cuBLAS."""
    touching = {
        module
        for module, path in FILES.items()
        for node in ast.walk(parse(path))
        if dotted(node) in {"os.environ", "os.getenv", "os.putenv", "os.environb"}
    }
    assert touching == {"topoflow.launch", "topoflow.environment", "topoflow.reproducibility"}


def third_party_packages() -> set[str]:
    top_level = {name.split(".")[0] for path in FILES.values() for name in imported_names(path)}
    return top_level - sys.stdlib_module_names - {"topoflow", "train"}


def test_no_trainer_framework_is_imported():
    assert not third_party_packages() & TRAINER_FRAMEWORKS


def test_every_package_that_is_imported_is_declared():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options"]["install_requires"].split("\n")
    declared = {line.split(">")[0].strip().lower() for line in lines if line and not line.startswith("#")}
    distributions = importlib.metadata.packages_distributions()
    imported = {package: {name.lower() for name in distributions[package]} for package in third_party_packages()}
    assert not [package for package, names in imported.items() if not names & declared]


def test_config_needs_no_torch():
    code = "import sys, topoflow.config_io; print({'torch', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "set()\n"


IMPORT_ALL = """
import gc, importlib, json, logging, os, random, signal, sys, threading, warnings

third_party, ours = json.loads(sys.argv[1])
for name in third_party:
    importlib.import_module(name)
import numpy, torch


def global_state():
    loggers = {name: logging.getLogger(name) for name in ("root", "topoflow")}
    return {
        "torch random state": torch.get_rng_state().tolist(),
        "numpy random state": repr(numpy.random.get_state()),
        "python random state": repr(random.getstate()),
        "torch settings": [torch.get_num_threads(), str(torch.get_default_dtype()), str(torch.get_default_device()),
                           torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled()],
        "log handlers": {name: [repr(handler) for handler in logger.handlers] for name, logger in loggers.items()},
        "log levels": {name: logger.level for name, logger in loggers.items()},
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "signal handlers": {str(number): repr(signal.getsignal(number)) for number in signal.valid_signals()},
        "warning filters": repr(warnings.filters),
        "threads": threading.active_count(),
        "collector": [gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()],
    }


before = global_state()
for name in ours:
    importlib.import_module(name)
    after = global_state()
    changed = [key for key in before if before[key] != after[key]]
    if changed:
        print(name, "changes", *changed)
        before = after
"""


def test_importing_changes_nothing():
    """No seed, no logger, no device, no environment: whatever module of ours is imported."""
    names = {name for path in FILES.values() for name in imported_names(path)}
    modules = {name.rpartition(".")[0] or name for name in names} | {name.split(".")[0] for name in names}
    packages = third_party_packages()
    third_party = sorted(name for name in modules if name.split(".")[0] in packages)
    ours = [name for name in FILES if not name.endswith("__main__")]
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, json.dumps([third_party, ours])], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_the_readers_of_files_are_imported_when_files_are_read():
    """They take as long as half of torch, and a run needs none of them."""
    code = "import sys, train; print(sorted({'xarray', 'pandas', 'zarr', 'netCDF4', 'numcodecs'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
