#!/usr/bin/env python3
"""Train TopoFlow: `python train.py CONFIG [section.key=value ...]`, or the same under torchrun or srun.

This file is the table of contents: it builds every part in order and hands each to the next.
"""

import argparse
import dataclasses
import logging
import sys
from contextlib import ExitStack

import torch

from topoflow.build import (
    build_plan,
    build_state,
    build_train_data,
    capture_with,
    open_data,
    require_same_data,
    require_same_program,
    resolve,
    total_steps,
)
from topoflow.certificate import Certifier
from topoflow.checkpoint.directory import CheckpointDirectory, find_checkpoint
from topoflow.checkpoint.saver import CheckpointSaver
from topoflow.checkpoint.state import deliver, plan_weights, read_everywhere
from topoflow.config import Config
from topoflow.config_io import HelpfulParser, config_help, load_config
from topoflow.data.assembly import ForecastData
from topoflow.data.normalization import Normalization
from topoflow.data.sampling import BatchPlan
from topoflow.errors import Refusal
from topoflow.evaluation import evaluate_model
from topoflow.launch import choose_device, read_launch
from topoflow.logs import MetricsWriter, format_summary, setup_logging
from topoflow.ranks import Context, distributed_context
from topoflow.reduction import CanonicalReduction, DdpReduction, build_reduction
from topoflow.reproducibility import set_deterministic
from topoflow.resume import (
    Start,
    adopt_saved,
    keep_or_forget_best,
    keeps_normalization,
    prove,
    read_start,
    require_resumable,
    require_same_channels,
    restore_start,
    say_restored,
    set_later_aside,
)
from topoflow.run_dir import RunDirectory, StopFlag, run_to_exit, say_refusal
from topoflow.train_state import TrainData, TrainState, verify_ranks
from topoflow.trainer import Trainer
from topoflow.watch import StartClock

log = logging.getLogger("topoflow.train")


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    clock = StartClock(with_imports=arguments is None)
    parser = HelpfulParser(
        description=__doc__, epilog=config_help, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, such as configs/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="what differs from the file")
    options = parser.parse_args(arguments)
    launch = None
    try:
        launch = read_launch()
        config = load_config(options.config, options.overrides)
    except Refusal as refusal:
        refusal.shared = True  # all processes read the same file and the same words
        say_refusal(refusal, launch)
        return refusal.exit_status
    directory = RunDirectory(config.run.dir, launch.job, launch.restart)

    def body() -> None:
        device = choose_device(config.run.device, launch)
        set_deterministic(config.run, config.train.compile)
        with distributed_context(launch, config.distributed, device, directory.leave) as context:
            context.watch.clock = clock
            with context.together("run directory"):
                notes = directory.hold() if context.is_main else []
                setup_logging(directory.path, context.is_main, directory.writing)
            for note in notes:
                log.warning("%s", note)
            require_same_program(context, config)
            train(config, context, directory, stop)

    with StopFlag().listening() as stop:  # to the last word: a signal must not end a process that is about to say 75
        return run_to_exit(body, launch, directory)


def train(config: Config, context: Context, directory: RunDirectory, stop: StopFlag) -> None:
    """Data, model, optimizer, restore, fit, evaluate."""
    launch = context.launch
    log.info("%s, on %s (%s)", launch, context.device, launch.reason)
    checkpoints = CheckpointDirectory(directory.checkpoints, directory.writing, context.watch.breathe)
    start = read_start(config.checkpoint, checkpoints, context)

    data = open_data(config, context)
    with context.together("order of samples"):
        plan = build_plan(config, data, context)
    require_same_data(context, data, plan)
    with context.together("config"):
        config = adopt_saved(start, config) if start.kind == "resume" else config
        config = resolve(config, data, plan)
        require_same_channels(start, config)
        changed = require_resumable(start, config, data, plan.steps_per_epoch)
    normalization = agree_on_normalization(data, start, config, context)
    state = build_state(config, data, plan, context)
    if start.kind != "new":
        context.watch.enter(start.kind)
    report = restore_start(start, state, config, changed, context)
    train_data = build_train_data(config, data, normalization, plan, context.device)
    certifier = Certifier(state, train_data, config.train)
    proof = prove(start, certifier, report, config.checkpoint, changed, context)
    start = dataclasses.replace(start, state=None)  # it is in the model and the optimizer now
    verify_ranks(context, state, train_data, "before the first step")
    reduction = build_reduction(config.distributed, state.model, context, plan.accumulation)
    with ExitStack() as stack:
        resume_step = state.progress.step if start.kind == "resume" else None
        with context.together("run directory"):
            if context.is_main:
                set_later_aside(start, state, checkpoints)
            run_dir = directory.path if context.is_main else None
            writer = MetricsWriter(run_dir, resume_step, directory.writing, state.progress.validation_owed)
            stack.callback(writer.close)
            if context.is_main:
                directory.write_config(config)
                say_restored(start, state, report, proof, config.checkpoint, directory, writer)
        if start.kind == "resume":
            keep_or_forget_best(state.progress, checkpoints, config.checkpoint, context)
        capture = capture_with(certifier, config, data, context)
        saver = CheckpointSaver(context, checkpoints, config.checkpoint, capture, writer.checkpoint)
        trainer = build_trainer(config, context, state, reduction, train_data, saver, writer, stop)
        if context.is_main:
            announce(config, data, state, plan, context)
        stop.require_unasked(context.gather_objects, "the set-up, before the first step")
        if start.kind == "resume" and not checkpoints.is_parent_of(start.path):
            saver.save(state.progress.step, is_best=False)  # from here on this run stands on its own
        if start.kind == "resume" and config.checkpoint.validate_on_resume:
            trainer.validate_restored()
        trainer.fit()
    evaluate_best(config, context, state, data, normalization, directory, stop)


def agree_on_normalization(data: ForecastData, start: Start, config: Config, context: Context) -> Normalization:
    """The checkpoint's when a run resumes, unless the config asks for others, else rank 0's, broadcast."""
    if keeps_normalization(start, config):
        return Normalization.from_dict(start.state["data"]["normalization"])
    constants = None
    with context.together("normalization"):
        if context.is_main:
            constants = data.build_normalization(context.watch.tick).to_dict()
    return Normalization.from_dict(context.broadcast_object(constants))


def build_trainer(
    config: Config,
    context: Context,
    state: TrainState,
    reduction: DdpReduction | CanonicalReduction,
    data: TrainData,
    saver: CheckpointSaver,
    writer: MetricsWriter,
    stop: StopFlag,
) -> Trainer:
    """The loop over its data."""
    return Trainer(
        context,
        state,
        reduction,
        data,
        config.train,
        seed=config.run.seed,
        grad_clip_norm=config.optim.grad_clip_norm,
        total_steps=total_steps(config, data.plan),
        save_every_steps=config.checkpoint.every_steps,
        verify_every_steps=config.distributed.verify_every_steps,
        saver=saver,
        writer=writer,
        stop=stop,
    )


def announce(config: Config, data: ForecastData, state: TrainState, plan: BatchPlan, context: Context) -> None:
    """The summary at the start, line by line."""
    lines = data.summary()
    if plan.dropped:
        lines.append(f"{plan.dropped} samples at the end of each epoch's order do not fill a global batch: not used")
    summary = format_summary(
        device=f"{context.device}, {config.train.precision}, {torch.get_num_threads()} thread(s) a process",
        param_groups=state.optimizer.param_groups,
        splits={},
        global_batch_size=plan.global_batch_size,
        micro_batch_size=plan.micro_batch_size,
        world_size=plan.world_size,
        accumulation=plan.accumulation,
        steps_per_epoch=plan.steps_per_epoch,
        total_steps=total_steps(config, plan),
        first_step=state.progress.step,
    )
    for line in (*lines, *summary.splitlines()):
        log.info("%s", line)


def evaluate_best(
    config: Config,
    context: Context,
    state: TrainState,
    data: ForecastData,
    normalization: Normalization,
    directory: RunDirectory,
    stop: StopFlag,
) -> None:
    """Score the best checkpoint of the run (its last, without a validation split) on the test split."""
    if "test" not in data.splits:
        return
    context.watch.enter("evaluation")
    with context.together("run directory"):
        if context.is_main:
            directory.require_held()  # a run that another job goes on with is that job's to score
    path, saved = read_everywhere(context, lambda: find_checkpoint(directory.path), parts=("model",))
    with context.together("restoring the weights"):
        restore = plan_weights(state.model, saved["model"])
    deliver(context, restore.pairs)
    log.info("scoring %s on the test split", path)
    evaluate_model(context, state.model, data, normalization, "test", config.train, directory.evaluation, stop)


if __name__ == "__main__":
    sys.exit(main())
