"""One training run with one of five loops: the process that `benchmarks.compare_trainers` starts.

    [torchrun ...] python -m benchmarks.trainer_loops LOOP CONFIG FOLDER WARM_UP_STEPS

All five train the same network on the same data set with the same loss, AdamW, schedule and clipping, and all but the
bare one write loss and rate to TensorBoard every 10 steps, the loss as the mean over processes. Each loop
keeps its other defaults. Rank 0 writes the seconds per step to FOLDER/seconds.json: from the end of one optimizer step
to the end of a later one, over the number of steps, measured by torch's hook on all optimizers.
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader

import train
from benchmarks.torchvision_operators import without_torchvision_operators
from topoflow.build import build_network
from topoflow.config import Config
from topoflow.config_io import load_config
from topoflow.data.assembly import open_forecast_data
from topoflow.data.dataset import ForecastDataset
from topoflow.launch import read_launch
from topoflow.loss import loss_sums
from topoflow.optim import build_optimizer, build_scheduler

LEARNING_RATE, LOSS = "learning_rate/others", "loss/train"
BARE_BATCHES = 8


@dataclass(frozen=True)
class Job:
    """The arguments of a loop, and where it may write."""

    config: Config
    config_file: Path
    folder: Path
    processes: int

    @property
    def steps(self) -> int:
        return self.config.train.max_steps

    @property
    def clip_norm(self) -> float:
        return self.config.optim.grad_clip_norm

    def logs_at(self, step: int) -> bool:
        return step % self.config.train.log_every_steps == 0


class StepClock:
    """Times at which each optimizer step of this process ended."""

    def __init__(self):
        self.ticks: list[float] = []
        self.hook = register_optimizer_step_post_hook(lambda *_: self.ticks.append(time.perf_counter()))

    def seconds_per_step(self, first: int, steps: int) -> float:
        """Return the mean from the end of step number `first` to that of the last; steps: the expected number."""
        if len(self.ticks) != steps:
            raise RuntimeError(f"{len(self.ticks)} optimizer steps seen: expected {steps}")
        return (self.ticks[-1] - self.ticks[first - 1]) / (steps - first)


class Parts:
    """What a user of another loop builds: the data loader, the network, AdamW, its schedule, and the loss."""

    def __init__(self, job: Job):
        config = job.config
        torch.set_num_threads(config.run.threads)
        data = open_forecast_data(config.data, with_wind=True, with_terrain=True)
        self.dataset: ForecastDataset = data.dataset("train", data.build_normalization())
        self.elevation_m = torch.from_numpy(data.source.heights_m())
        self.network = build_network(config, data.grid).train()
        self.optimizer = build_optimizer(self.network, config.optim)
        steps_per_epoch = len(self.dataset) // config.train.global_batch_size
        self.scheduler = build_scheduler(self.optimizer, config.optim, steps_per_epoch, job.steps)
        self.loader = DataLoader(
            self.dataset,
            batch_size=config.train.micro_batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=config.data.threads,
        )

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Return the mean loss over the valid values of the batch, with the network or its wrapper."""
        sums, counts = loss_sums(network, batch, self.elevation_m, "fp32")
        return sums.sum() / counts.sum()


class BareStep:
    """Forward, backward, clip and step on batches in memory, in turn: nothing is loaded, logged or checked.

    network: a wrapper of parts.network; by default parts.network itself.
    """

    def __init__(self, parts: Parts, clip_norm: float, network: nn.Module | None = None):
        self.parts, self.clip_norm = parts, clip_norm
        self.network = parts.network if network is None else network
        self.parameters = list(parts.network.parameters())
        self.batches = itertools.cycle([batch for batch, _ in zip(parts.loader, range(BARE_BATCHES), strict=False)])

    def __call__(self) -> None:
        self.parts.loss(self.network, next(self.batches)).backward()
        nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.parts.optimizer.step()
        self.parts.scheduler.step()
        self.parts.optimizer.zero_grad()


def run_ours(job: Job) -> None:
    """Run the program itself as a user starts it: train.py, whose body is `Trainer.fit`."""
    if status := train.main([str(job.config_file)]):
        raise RuntimeError(f"train.py ended with status {status}")


def run_bare(job: Job) -> None:
    """Run `BareStep` repeatedly."""
    parts = Parts(job)
    network: nn.Module = parts.network
    if job.processes > 1:
        torch.distributed.init_process_group("gloo")
        network = DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)
    step = BareStep(parts, job.clip_norm, network)
    for _ in range(job.steps):
        step()


def run_lightning(job: Job) -> None:
    """Run Lightning's Trainer with a LightningModule, as in its documentation."""
    with without_torchvision_operators():
        import lightning
        from lightning.pytorch.loggers import TensorBoardLogger
    parts = Parts(job)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = parts.network

        def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
            loss = parts.loss(self.network, batch)
            self.log(LOSS, loss, prog_bar=True, sync_dist=job.processes > 1)
            self.log(LEARNING_RATE, parts.scheduler.get_last_lr()[-1])
            return loss

        def configure_optimizers(self) -> dict:
            return {"optimizer": parts.optimizer, "lr_scheduler": {"scheduler": parts.scheduler, "interval": "step"}}

    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=job.processes,
        strategy="ddp" if job.processes > 1 else "auto",
        max_steps=job.steps,
        logger=TensorBoardLogger(job.folder),
        log_every_n_steps=job.config.train.log_every_steps,
        gradient_clip_val=job.clip_norm,
        default_root_dir=job.folder,
    )
    trainer.fit(Module(), parts.loader)


def run_fabric(job: Job) -> None:
    """Run a loop around the wrappers of Lightning Fabric."""
    with without_torchvision_operators():
        from lightning.fabric import Fabric
        from lightning.fabric.loggers import TensorBoardLogger
    parts = Parts(job)
    strategy = "ddp" if job.processes > 1 else "auto"
    fabric = Fabric(accelerator="cpu", devices=job.processes, strategy=strategy, loggers=TensorBoardLogger(job.folder))
    fabric.launch()
    network, optimizer = fabric.setup(parts.network, parts.optimizer)
    loader = fabric.setup_dataloaders(parts.loader)
    for step, batch in zip(range(1, job.steps + 1), loader, strict=False):
        loss = parts.loss(network, batch)
        fabric.backward(loss)
        fabric.clip_gradients(network, optimizer, max_norm=job.clip_norm)
        optimizer.step()
        parts.scheduler.step()
        optimizer.zero_grad()
        if job.logs_at(step):
            mean = fabric.all_reduce(loss.detach(), reduce_op="mean").item()
            fabric.log_dict({LOSS: mean, LEARNING_RATE: parts.scheduler.get_last_lr()[-1]}, step=step)


def run_accelerate(job: Job) -> None:
    """Run a loop around the wrappers of Hugging Face Accelerate."""
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    set_seed(0)  # its samplers need one stream on all processes
    parts = Parts(job)
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=str(job.folder))
    accelerator.init_trackers("accelerate")
    network, optimizer, loader, scheduler = accelerator.prepare(
        parts.network, parts.optimizer, parts.loader, parts.scheduler
    )
    for step, batch in zip(range(1, job.steps + 1), loader, strict=False):
        loss = parts.loss(network, batch)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(network.parameters(), job.clip_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if job.logs_at(step):
            mean = accelerator.gather(loss.detach()).mean().item()
            accelerator.log({LOSS: mean, LEARNING_RATE: scheduler.get_last_lr()[-1]}, step=step)
    accelerator.end_training()


LOOPS: dict[str, Callable[[Job], None]] = {
    "bare": run_bare,
    "ours": run_ours,
    "lightning": run_lightning,
    "fabric": run_fabric,
    "accelerate": run_accelerate,
}


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run one loop, write the seconds per step, and end the process at once.

    A loop that leaves its process group to the interpreter's exit may hang there forever: a thread of gloo waits for
    the lock that its destructor holds.
    """
    loop, config_file, folder, warm_up_steps = sys.argv[1:] if arguments is None else arguments
    launch = read_launch()
    job = Job(load_config(config_file), Path(config_file), Path(folder), launch.world_size)
    clock = StepClock()
    LOOPS[loop](job)
    seconds = clock.seconds_per_step(int(warm_up_steps), job.steps)
    if launch.is_main:
        (job.folder / "seconds.json").write_text(json.dumps(seconds))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
