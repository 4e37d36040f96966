"""All commands except training: `python -m topoflow COMMAND ...`, installed as `topoflow`.

Each command imports what it needs when it runs, so that those without torch start quickly.
"""

import argparse
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path

from topoflow.config_io import config_help
from topoflow.errors import ConfigError, Refusal, ResumeRefused
from topoflow.terminal import print_error, print_output


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit status."""
    parser = argparse.ArgumentParser(prog="topoflow", description="Air pollution forecasts: data, scores and tools.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_demo_data(commands)
    _add_prepare(commands)
    _add_evaluate(commands)
    _add_inspect(commands)
    _add_import_lightning(commands)
    _add_doctor(commands)
    # argparse accepts overrides only before the first option; those after it end up in `rest`
    options, rest = parser.parse_known_args(sys.argv[1:] if arguments is None else arguments)
    if rest and ("overrides" not in options or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if "overrides" in options:
        options.overrides += rest
    try:
        return options.run(options)
    except Refusal as refusal:
        print_error(str(refusal))
        return refusal.exit_status


def _add_demo_data(commands) -> None:
    parser = commands.add_parser("demo-data", help="simulate a small world and write it as NetCDF files")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to create, with world_YYYY.nc")
    parser.add_argument("--days", type=int, default=180, metavar="N", help="days (default %(default)s)")
    parser.add_argument("--grid", type=_grid_size, default=(24, 32), metavar="HxW", help="cells (default 24x32)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of terrain, towns and weather (default 0)"
    )
    parser.add_argument(
        "--forecasts",
        metavar="OUT",
        type=Path,
        help="another folder to create, with the weather as it was forecast every 12 hours, and its recipe",
    )
    parser.set_defaults(run=_demo_data)


def _demo_data(options: argparse.Namespace) -> int:
    from topoflow.tools.demo.world import make_demo_data

    _log_to_terminal()
    rows, columns = options.grid
    make_demo_data(
        options.out,
        options.days,
        options.grid,
        options.seed,
        progress=sys.stderr.isatty(),
        forecasts=options.forecasts,
    )
    print_output(f"{options.out}: {options.days} days on {rows} x {columns} cells, seed {options.seed}")
    return 0


def _add_prepare(commands) -> None:
    parser = commands.add_parser(
        "prepare",
        help="read data files as they are and write the format that training reads fastest",
        epilog="If interrupted, run the same command again to resume. With more data in the files, it appends them.",
    )
    parser.add_argument("paths", nargs="*", metavar="RECIPE.yaml | PATH", help="a recipe, or files, globs and folders")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("-o", "--output", metavar="OUT", type=Path, help="folder to create, or to append to")
    target.add_argument("--check", action="store_true", help="only look; exit with 1 if anything needs a decision")
    target.add_argument("--verify", metavar="OUT", type=Path, help="compare prepared data with its hashes")
    parser.set_defaults(run=lambda options: _prepare(options, parser))


def _prepare(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from topoflow.tools.prepare.command import run, run_verify

    if options.verify is not None:
        if options.paths:
            parser.error("expected --verify OUT alone")
        return run_verify(options.verify)
    if not options.paths:
        parser.error("expected a recipe or data files")
    _log_to_terminal()
    return run(options.paths, options.output, options.check)


def _add_with_config_help(commands, name: str, help: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name, help=help, epilog=config_help(), formatter_class=argparse.RawDescriptionHelpFormatter
    )


def _add_evaluate(commands) -> None:
    parser = _add_with_config_help(commands, "evaluate", "score a checkpoint and compare it with the baselines")
    parser.add_argument("source", metavar="CHECKPOINT-OR-RUN", type=Path, help="of a run: the best, else the last")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the checkpoint's config")
    parser.add_argument("--split", choices=("train", "validation", "test"), default="test", help="default: test")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: the run's evaluation folder")
    parser.add_argument(
        "--forecast-error",
        metavar="H:R,...",
        help="hours ahead and correlation with the truth of the weather after the start, such as 0:1,24:0.95,96:0.65",
    )
    parser.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    from topoflow.config import DistributedConfig
    from topoflow.launch import choose_device, read_launch
    from topoflow.logs import setup_logging
    from topoflow.rendezvous import distributed_context
    from topoflow.run_dir import StopFlag, run_to_exit
    from topoflow.tools.evaluate import score_checkpoint

    launch = read_launch()
    device = choose_device(options.device, launch)

    def run() -> None:
        with ExitStack() as stack:
            stop = stack.enter_context(StopFlag().listening())
            context = stack.enter_context(distributed_context(launch, DistributedConfig(), device, stop=stop))
            setup_logging(None, context.is_main)
            score_checkpoint(
                context, options.source, options.split, options.overrides, options.output, options.forecast_error
            )

    return run_to_exit(run, launch)


def _add_inspect(commands) -> None:
    parser = commands.add_parser(
        "inspect",
        help="report what a checkpoint or a run holds, or compare two checkpoints",
        epilog="Exit status: 0 even if the two differ; 2 if a path is missing; 3 if anything is damaged.",
    )
    parser.add_argument("path", metavar="PATH", type=Path, help="a checkpoint, its state.pt, or a run directory")
    parser.add_argument("other", nargs="?", metavar="B", type=Path, help="compare PATH with this; of a run: the last")
    parser.add_argument("--json", action="store_true", help="print JSON (null for a number that is not finite)")
    parser.set_defaults(run=_inspect)


def _inspect(options: argparse.Namespace) -> int:
    from topoflow.tools.inspect import compare, inspect

    found = inspect(options.path) if options.other is None else compare(options.path, options.other)
    print_output(found.as_json() if options.json else "\n".join(found.lines))
    if found.damage is not None:
        raise ResumeRefused(found.damage)
    return 0


def _add_import_lightning(commands) -> None:
    parser = _add_with_config_help(
        commands, "import-lightning", "turn a checkpoint of the Lightning programs into a run that can be resumed"
    )
    parser.add_argument(
        "source", metavar="IN.ckpt", type=Path, help="checkpoint of the published program or its predecessor"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to CONFIG")
    parser.add_argument("--config", required=True, metavar="CONFIG", help="for the run to resume, with its data")
    parser.add_argument("-o", "--output", required=True, metavar="RUN", help="run directory to create")
    parser.add_argument(
        "--weights",
        choices=("trained", "averaged"),
        help="which weights to import from a file of Lightning's WeightAveraging, which holds both",
    )
    parser.set_defaults(run=_import_lightning)


def _import_lightning(options: argparse.Namespace) -> int:
    from topoflow.config_io import load_config
    from topoflow.launch import choose_device, read_launch
    from topoflow.rendezvous import distributed_context
    from topoflow.reproducibility import set_deterministic, set_tf32
    from topoflow.tools.lightning.conversion import import_run

    config = load_config(options.config, [*options.overrides, f"run.dir={options.output}"])
    launch = read_launch()
    if launch.world_size > 1:
        raise ConfigError(f"import-lightning: started as {launch.world_size} processes: expected one")
    _log_to_terminal()
    set_deterministic(config.run, config.train.compile)
    set_tf32(config.train.tf32)  # as the resume sets it, which compares the probe loss to the bit
    with distributed_context(launch, config.distributed, choose_device(config.run.device, launch)) as context:
        print_output("\n".join(import_run(options.source, config, context, options.weights)))
    words = ["python", "train.py", options.config, *options.overrides, f"run.dir={options.output}"]
    print_output(f"resume with: {shlex.join(words)}")
    return 0


def _add_doctor(commands) -> None:
    parser = commands.add_parser(
        "doctor",
        help="check the nodes of a job before training: under srun, torchrun, or alone",
        epilog=f"{_DOCTOR_STATUSES}\n\n{config_help()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="default: a small model, no data set")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to CONFIG")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.set_defaults(run=_doctor)


_DOCTOR_STATUSES = """\
exit status:
  0   every check passed, perhaps with warnings
  1   at least one check failed
  2   the launcher's variables or the config cannot be used (also: bad usage)
  5   the processes did not connect within a minute, or one was lost later
With --json, rank 0 prints the object for each of these, except for bad usage."""


def _doctor(options: argparse.Namespace) -> int:
    from topoflow.environment import silence_torch

    silence_torch()  # before its import
    from topoflow.tools.doctor.command import doctor

    return doctor(Path(options.config) if options.config else None, options.overrides, options.json)


def _log_to_terminal() -> None:
    from topoflow.logs import setup_logging

    setup_logging(None, is_main=True)


def _grid_size(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r}: expected ROWSxCOLUMNS, such as 24x32")
    return int(rows), int(columns)


def _box(text: str) -> tuple[float, float, float, float]:
    try:
        south, north, west, east = (float(edge) for edge in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected S,N,W,E in degrees, such as 18,54,73,135") from None
    return south, north, west, east
