"""A run of ours that takes a Lightning checkpoint and trains on batches that it is given: no data set, no folder."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch

from tests.lightning.restated import TARGETS, VARIABLES
from topoflow.checkpoint.state import restore_state
from topoflow.config_io import config_from_dict
from topoflow.data.sampling import BatchPlan
from topoflow.launch import Launch
from topoflow.model.topoflow import build_model
from topoflow.optim import build_optimizer, build_scheduler
from topoflow.ranks import Context
from topoflow.reduction import DdpReduction
from topoflow.tools.lightning.conversion import convert
from topoflow.train_state import TrainProgress, TrainState
from topoflow.trainer import RunOutput, Trainer


def build_config(model, optim=None, batch=(4, 2), **checkpoint):
    """A config: sections `model`, `optim`, `checkpoint`; batch, (global_batch_size, micro_batch_size)."""
    model = {"patch_size": 2, "drop_rate": 0.0, "drop_path": 0.0, "wind": "none", "relative_position": True,
             "patch_norm": True, **model}  # fmt: skip
    return config_from_dict(
        {
            "data": {"path": "nowhere", "train": [2013], "variables": list(VARIABLES), "targets": list(TARGETS)},
            "model": model,
            "optim": {"learning_rate": 1e-3, "schedule_length": 4, **(optim or {})},
            "train": {"max_epochs": 4, "global_batch_size": batch[0], "micro_batch_size": batch[1]},
            "checkpoint": checkpoint,
        }
    )


@dataclass
class ImportingRun:
    """elevation_m [H, W] and mask, bool [H, W], are those of the data."""

    config: object
    elevation_m: torch.Tensor
    mask: torch.Tensor
    steps_per_epoch: int = 3

    def __post_init__(self):
        config, nowhere = self.config, torch.zeros(self.mask.numel() // self.config.model.patch_size**2)
        img_size = tuple(self.mask.shape)
        self.model = build_model(config.model, VARIABLES, TARGETS, img_size, nowhere, nowhere, seed=0)
        self.optimizer = build_optimizer(self.model, config.optim)
        self.scheduler = build_scheduler(self.optimizer, config.optim, self.steps_per_epoch, 4 * self.steps_per_epoch)

    def convert(self, content, choice=None):
        state = TrainState(self.model, self.optimizer, self.scheduler, TrainProgress(), None)
        source = SimpleNamespace(mask=self.mask.numpy())
        data = SimpleNamespace(input_names=VARIABLES, target_names=TARGETS, source=source)
        size = self.config.train.global_batch_size
        plan = BatchPlan(self.steps_per_epoch * size, 0, size, self.config.train.micro_batch_size, 0, 1)
        return convert(content, state, self.config, data, plan, choice)

    def take(self, content, choice=None):
        """Convert and restore; returns the conversion and the report of the restore."""
        conversion = self.convert(content, choice)
        allow_new = self.config.checkpoint.allow_new
        parts = (self.model, self.optimizer, self.scheduler)
        report = restore_state(conversion.state, *parts, allow_new, conversion.rates_from_config)
        self.progress = TrainProgress(**conversion.state["progress"])
        return conversion, report

    def train(self, batches):
        """Train on (x, y, lead_hours) by the program's own step; returns their losses, and norms and rates of steps."""
        context = Context(Launch("single process", "a test"), torch.device("cpu"))
        train = self.config.train
        accumulation = train.global_batch_size // train.micro_batch_size
        reduction = DdpReduction(self.model, context, accumulation)
        state = TrainState(self.model, self.optimizer, self.scheduler, self.progress, self.config.optim.grad_clip_norm)
        plan = BatchPlan(train.global_batch_size, 0, train.global_batch_size, train.micro_batch_size, 0, 1)
        data = SimpleNamespace(elevation_m=self.elevation_m, plan=plan)
        output = RunOutput(SimpleNamespace(poll=lambda: False), writer=None)
        trainer = Trainer(context, state, reduction, data, train, output)
        forecasts, norms, rates = [], [], []
        hook = self.model.register_forward_hook(lambda model, inputs, output: forecasts.append(output.detach()))
        for first in range(0, len(batches), accumulation):
            result = trainer.train_step([self._batch(*batch) for batch in batches[first : first + accumulation]])
            self.progress.step += 1
            norms.append(result.grad_norm)
            rates.append(list(result.learning_rates.values()))
        hook.remove()
        pairs = zip(forecasts, batches, strict=True)
        losses = [(forecast - y)[..., self.mask].double().square().mean().item() for forecast, (_, y, _) in pairs]
        return losses, norms, rates

    def forecast(self, x, lead_hours):
        self.model.eval()
        with torch.no_grad():
            return self.model(x, lead_hours, self.elevation_m)

    def _batch(self, x, y, lead_hours):
        return {"x": x, "y": y, "lead_time_hours": lead_hours, "valid": self.mask.expand_as(y)}
