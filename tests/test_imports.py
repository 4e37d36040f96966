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
# imports point from a higher number to a lower one, or stay
LAYERS = [
    {"errors", "disk", "config", "data.variables"},
    {"data", "model", "loss", "metrics", "distributed", "tracking"},
    {"optim", "checkpoint", "reduction", "lightning_import"},
    {"trainer", "evaluation", "prediction"},
    {"train", "cli", "__main__"},
]
NEVER = {
    "config": {"data", "model", "distributed", "tracking", "checkpoint", "optim"},
    "data": {"model", "distributed", "tracking", "checkpoint", "optim", "trainer"},
    "model": {"data", "distributed", "tracking", "checkpoint", "optim", "trainer"},
    "optim": {"model", "data", "distributed"},
    "checkpoint": {"model", "data", "optim"},
    "tracking": {"model", "data", "distributed", "checkpoint", "optim"},
    "lightning_import": {"config", "data", "model", "distributed", "tracking", "checkpoint", "optim", "trainer"},
}
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


def part_of(name: str) -> str | None:
    """The part of the program that a module or name of ours belongs to: topoflow.data.grid.Grid is `data`."""
    if name == "train":
        return "train"
    if not name.startswith("topoflow."):
        return None
    inner = name.removeprefix("topoflow.")
    return "data.variables" if inner.startswith("data.variables") else inner.split(".")[0]


def import_edges() -> set[tuple[str, str]]:
    """(part, part that it imports) of the whole program."""
    edges = {(part_of(module), part_of(name)) for module, path in FILES.items() for name in imported_names(path)}
    return {(importer, imported) for importer, imported in edges if importer and imported and importer != imported}


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute access, or an empty text."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_the_files_are_found():
    assert {"train", "topoflow", "topoflow.optim", "topoflow.config.schema", "topoflow.data.grid"} <= set(FILES)
    assert ("optim", "config") in import_edges()


def test_imports_point_one_way():
    layer_of = {part: number for number, layer in enumerate(LAYERS) for part in layer}
    upward = [
        f"{importer} -> {imported}"
        for importer, imported in sorted(import_edges())
        if layer_of.get(importer, len(LAYERS)) < layer_of.get(imported, -1)
    ]
    assert not upward


def test_no_part_imports_itself_round_a_circle():
    graph: dict[str, set[str]] = {}
    for importer, imported in import_edges():
        # data.variables belongs to data in this respect
        importer, imported = importer.split(".")[0], imported.split(".")[0]
        if importer != imported:
            graph.setdefault(importer, set()).add(imported)
    assert list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("part", NEVER)
def test_parts_that_never_see_each_other(part):
    seen = {imported for importer, imported in import_edges() if importer == part}
    assert not seen & NEVER[part]


def test_nothing_imports_the_composition_roots():
    importers = {importer for importer, imported in import_edges() if imported in {"train", "cli"}}
    assert importers <= {"__main__"}


def test_only_distributed_knows_launchers_and_collectives():
    offenders = []
    for module, path in FILES.items():
        if part_of(module) == "distributed":
            continue
        offenders += [f"{module} imports {n}" for n in imported_names(path) if n.startswith("torch.distributed")]
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Attribute) and dotted(node).startswith("torch.distributed"):
                offenders.append(f"{module}:{node.lineno} uses {dotted(node)}")
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                words = node.value.split("=")[0]
                if words in LAUNCHER_VARIABLES or words.startswith("SLURM_"):
                    offenders.append(f"{module}:{node.lineno} names {words}")
    assert not offenders


def test_only_two_parts_touch_the_environment():
    """distributed reads the launcher's variables; reproducibility sets the one that cuBLAS looks for."""
    touching = {
        module
        for module, path in FILES.items()
        for node in ast.walk(parse(path))
        if dotted(node) in {"os.environ", "os.getenv", "os.putenv", "os.environb"}
    }
    assert touching <= {
        "topoflow.distributed.launch",
        "topoflow.distributed.environment",
        "topoflow.reproducibility",
    }


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
    code = "import sys, topoflow.config.__main__, topoflow.config.help; print({'torch', 'numpy'} & set(sys.modules))"
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
    """They take as long as half of torch, and a run on packed data needs none of them."""
    code = "import sys, train; print(sorted({'xarray', 'pandas', 'zarr', 'netCDF4', 'numcodecs'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
