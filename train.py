#!/usr/bin/env python3
"""Train TopoFlow: `python train.py CONFIG [section.key=value ...]`, or the same under torchrun or srun.

This file is the table of contents: it builds every part in order and passes each to the next.
"""

if __name__ == "__main__":
    from topoflow.terminal import prepare_process

    prepare_process()  # before the imports below, which take seconds

import argparse
import logging
import sys

from topoflow.activity import StartClock
from topoflow.build import (
    build_normalization,
    build_plan,
    build_state,
    build_train_data,
    capture_with,
    describe_run,
    open_data,
    require_same_program,
)
from topoflow.certificate import Certifier
from topoflow.checkpoint.directory import CheckpointDirectory
from topoflow.checkpoint.saver import CheckpointSaver
from topoflow.config import Config
from topoflow.config_io import config_help, load_config
from topoflow.errors import Refusal
from topoflow.evaluation import evaluate_best
from topoflow.launch import choose_device, read_launch
from topoflow.logs import setup_logging
from topoflow.ranks import Context
from topoflow.reduction import build_reduction
from topoflow.rendezvous import distributed_context
from topoflow.reproducibility import set_deterministic, set_tf32
from topoflow.resume import read_start
from topoflow.run_dir import RunDirectory, StopFlag, report_refusal, run_to_exit
from topoflow.terminal import run_program
from topoflow.train_state import verify_ranks
from topoflow.trainer import RunOutput, Trainer

log = logging.getLogger("topoflow.train")


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    clock = StartClock(with_imports=arguments is None)
    options = parse_arguments(arguments)
    launch = None
    try:
        launch = read_launch()
        config = load_config(options.config, options.overrides)
    except Refusal as refusal:
        refusal.shared = True  # all processes read the same file and the same arguments
        report_refusal(refusal, launch)
        return refusal.exit_status
    directory = RunDirectory(config.run.dir, launch.job, launch.restart)

    def run() -> None:
        device = choose_device(config.run.device, launch)
        set_deterministic(config.run, config.train.compile)
        set_tf32(config.train.tf32)
        with distributed_context(launch, config.distributed, device, directory.finish, stop) as context:
            context.watch.clock = clock
            with context.together("run directory"):
                notes = directory.hold() if context.is_main else []
                setup_logging(directory.path, context.is_main, directory.writing)
            for note in notes:
                log.warning("%s", note)
            require_same_program(context, config)
            train(config, context, directory)

    # until the end: no signal may kill a process that is about to exit with 0 or 75
    with StopFlag().listening(until_exit=arguments is None) as stop:
        return run_to_exit(run, launch, directory)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line; --help lists every key of the config."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=config_help(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, such as configs/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override a value of the file")
    return parser.parse_args(arguments)


def train(config: Config, context: Context, directory: RunDirectory) -> None:
    """Build data, network and optimizer, restore and prove, fit, evaluate."""
    log.info("%s, on %s (%s)", context.launch, context.device, context.launch.reason)
    checkpoints = CheckpointDirectory(directory.checkpoints, directory.writing, context.watch.tick)
    start = read_start(config.checkpoint, checkpoints, context)

    data = open_data(config, context)
    plan = build_plan(config, data, context)
    with context.together("config"):
        config = start.complete_config(config, data, plan)
    normalization = start.saved_normalization(config, context) or build_normalization(config, data, context)
    state = build_state(config, data, normalization.base, plan, context)
    train_data = build_train_data(config, data, normalization, plan, context)

    start.restore(state, context)
    certifier = Certifier(state, train_data, config.train)
    start.prove(certifier, context)
    verify_ranks(context, state, train_data, "before the first step")

    reduction = build_reduction(config.distributed, state.model, context, plan.accumulation)
    with context.together("run directory"):
        writer = start.open_metrics(directory, checkpoints, context)
        if context.is_main:
            directory.write_config(config)
    with writer:
        capture = capture_with(certifier, config, data, context)
        saver = CheckpointSaver(context, checkpoints, config.checkpoint, capture, writer.checkpoint)
        trainer = Trainer(context, state, reduction, train_data, config.train, RunOutput(saver, writer))
        for line in describe_run(config, data, state, plan, context):
            log.info("%s", line)
        context.raise_if_stop_requested("the set-up, before the first step")
        start.begin(trainer, checkpoints, context)
        trainer.fit()
    evaluate_best(context, state.model, data, normalization, config.train, directory)


if __name__ == "__main__":
    sys.exit(run_program(main))
