"""Faults: each function here breaks one thing in the process that calls it, before train.main.

Each fault is one that a careless trainer makes on a resume. They are injected right after the restore, or into the
loop, so that the program does not know about them.
"""

import dataclasses
import sys

import torch

import topoflow.certificate
import topoflow.resume
import train
from topoflow.data.normalization import Normalization
from topoflow.trainer import Trainer

STEP_OF_DRIFT = 8
"""The optimizer step after which the state of rank 1 drifts."""


def after_restore(spoil):
    """Call spoil(model, optimizer, scheduler, is_main) once everything has been restored."""
    plan = topoflow.resume.plan_state

    def plan_state(state, model, optimizer, scheduler, *arguments, **options):
        restore = plan(state, model, optimizer, scheduler, *arguments, **options)
        finish = restore.finish

        def finish_and_spoil():
            finish()
            with torch.no_grad():
                spoil(model, optimizer, scheduler, train.read_launch().is_main)

        restore.finish = finish_and_spoil
        return restore

    topoflow.resume.plan_state = plan_state


def after_step(spoil):
    """Call spoil(model, optimizer) on rank 1 after a certain step."""
    train_step = Trainer.train_step

    def step_and_spoil(self, *arguments, **options):
        result = train_step(self, *arguments, **options)
        if self.state.progress.step + 1 == STEP_OF_DRIFT and self.context.rank == 1:
            with torch.no_grad():
                spoil(self.state.model, self.state.optimizer)
        return result

    Trainer.train_step = step_and_spoil


def add_one_ulp(tensor):
    element = tensor.view(-1)[3:4]
    element.copy_(torch.nextafter(element, torch.full_like(element, torch.inf)))


def moments_of(optimizer, name):
    for group in optimizer.param_groups:
        if name in group["param_names"]:
            return optimizer.state[group["params"][group["param_names"].index(name)]]
    raise KeyError(name)


def weights_on_rank_0_only():
    def spoil(model, optimizer, scheduler, is_main):
        if not is_main:
            for parameter in model.parameters():
                parameter.mul_(1.5)

    after_restore(spoil)


def moments_on_rank_0_only():
    def spoil(model, optimizer, scheduler, is_main):
        if not is_main:
            optimizer.state.clear()

    after_restore(spoil)


def two_moments_of_one_shape_swapped():
    def spoil(model, optimizer, scheduler, is_main):
        one, other = (moments_of(optimizer, f"blocks.{n}.attn.qkv.weight") for n in (0, 1))
        one["exp_avg_sq"], other["exp_avg_sq"] = other["exp_avg_sq"], one["exp_avg_sq"]

    after_restore(spoil)


def moments_zeroed():
    def spoil(model, optimizer, scheduler, is_main):
        for entry in optimizer.state.values():
            entry["exp_avg"].zero_()

    after_restore(spoil)


def steps_of_adam_restarted():
    def spoil(model, optimizer, scheduler, is_main):
        for entry in optimizer.state.values():
            entry["step"].zero_()

    after_restore(spoil)


def rates_reset():
    def spoil(model, optimizer, scheduler, is_main):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"]

    after_restore(spoil)


def scheduler_not_restored():
    def spoil(model, optimizer, scheduler, is_main):
        scheduler.last_epoch = 0

    after_restore(spoil)


def one_ulp_in_one_weight_of_rank_1():
    def spoil(model, optimizer, scheduler, is_main):
        if not is_main:
            add_one_ulp(model.get_parameter("head.0.weight"))

    after_restore(spoil)


def best_loss_forgotten():
    """Any next validation would count as the best."""
    restore = topoflow.resume.Resume.restore

    def restore_and_forget(self, state, context):
        restore(self, state, context)
        state.progress.best_validation_loss = None

    topoflow.resume.Resume.restore = restore_and_forget


def another_activation():
    """The weights are right but the network is not: ReLU in place of GELU, with other hashes of the sources."""
    torch.nn.functional.gelu = lambda x, **_: torch.relu(x)
    topoflow.certificate.hash_sources = lambda *parts: "the hash of other sources"


def stale_buffer():
    def spoil(model, optimizer, scheduler, is_main):
        model.get_buffer("blocks.0.attn.H_scale").fill_(500.0)

    after_restore(spoil)


def wrong_normalization():
    from_dict = Normalization.from_dict

    def wrong(content):
        right = from_dict(content)
        return dataclasses.replace(right, mean={**right.mean, "pm25": right.mean["pm25"] + 1.0})

    Normalization.from_dict = wrong


def another_data_set_unnoticed():
    """The data that the config names are not checked, so that only the proof can detect the change."""
    topoflow.resume.Resume._check_changes = lambda self, changes: []


def order_of_another_seed():
    build_plan = train.build_plan
    train.build_plan = lambda *arguments: dataclasses.replace(build_plan(*arguments), seed=99)


def one_ulp_in_the_run_on_rank_1():
    after_step(lambda model, optimizer: add_one_ulp(model.get_parameter("pos_embed")))


def one_ulp_in_a_moment_in_the_run_on_rank_1():
    after_step(lambda model, optimizer: add_one_ulp(moments_of(optimizer, "head.0.bias")["exp_avg_sq"]))


def run_directory_out_of_reach():
    """No fault: ranks other than 0 cannot open anything in the run directory."""
    if train.read_launch().is_main:
        return
    folder = next(word.removeprefix("run.dir=") for word in sys.argv if word.startswith("run.dir="))

    def forbid(event, arguments):
        if event in ("open", "os.listdir", "os.scandir") and str(arguments[0]).startswith(f"{folder}/"):
            raise PermissionError(f"{event} {arguments[0]} on a rank other than 0")

    sys.addaudithook(forbid)


def nothing():
    """Change nothing."""
