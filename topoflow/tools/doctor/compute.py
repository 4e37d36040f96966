"""One forward and backward pass of the configured model on every process."""

import math
import resource
import statistics
import time

import torch

from topoflow.config import Config
from topoflow.data.dataset import input_names
from topoflow.loss import loss_sums
from topoflow.model.topoflow import TopoFlow, build_model
from topoflow.reproducibility import seed_draws
from topoflow.tools.doctor.amounts import show_bytes, show_seconds
from topoflow.tools.doctor.reading import plain_grid
from topoflow.tools.doctor.report import FAIL, WARNING, Check
from topoflow.tools.doctor.survey import Survey, values

BUILD_SECONDS, STEP_SECONDS, ENOUGH_SECONDS = 20.0, 20.0, 5.0
"""What building the model and all passes may take; after ENOUGH_SECONDS no further pass is made."""
PASSES = 3
SLOW_FACTOR, SLOW_SECONDS = 1.5, 0.05
"""A process that takes so much longer than the median, and at least so many seconds more, stands out."""
SAME_LOSS = {"fp32": 1e-3, "bf16": 2e-2}
"""Relative difference of the loss over processes, all of which compute the same, that arithmetic explains."""
FULL_SHARE = 0.9
"""Of the device's memory; optimizer and communication need some too."""


class ModelTrial:
    """The configured model on random fields of the grid's shape, the same on all processes."""

    def __init__(self, config: Config, grid_shape: tuple[int, int], device: torch.device):
        self.config, self.grid_shape, self.device = config, grid_shape, device
        self._model: TopoFlow | None = None

    def build(self) -> int:
        """Build the model; returns what its parameters, and so its gradient, take in bytes.

        Raises:
            ConfigError: the grid does not divide into patches, or a part of the model does not fit.
        """
        config = self.config
        self._model = build_model(
            config.model,
            input_names(config.data),
            config.data.targets,
            self.grid_shape,
            *plain_grid(self.grid_shape).patch_centres_km(config.model.patch_size),
            seed=config.run.seed,
            activation_checkpointing=config.train.activation_checkpointing,
            flex_attention=config.train.flex_attention,
        )
        return sum(parameter.nbytes for parameter in self._model.parameters())

    def run(self) -> dict[str, float | None]:
        """A few forward and backward passes of a micro-batch: seconds of the best and the first, loss, memory."""
        model = self._model.to(self.device).train()
        batch, heights = self._random_batch()
        taken: list[float] = []
        loss = math.nan
        while len(taken) < PASSES and sum(taken) < ENOUGH_SECONDS:
            seed_draws(self.config.run.seed, "doctor")
            start = time.monotonic()
            sums, counts = loss_sums(model, batch, heights, self.config.train.precision)
            sums.sum().backward()
            loss = (sums.detach().sum() / counts.sum()).item()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            taken.append(time.monotonic() - start)
            model.zero_grad()
        used, total = self._memory()
        return {"seconds": min(taken), "first": taken[0], "loss": loss, "memory_bytes": used, "total_bytes": total}

    def _random_batch(self) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """A micro-batch as the data set gives it, and terrain heights in metres."""
        size, data = self.config.train.micro_batch_size, self.config.data
        draws = torch.Generator().manual_seed(self.config.run.seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, *self.grid_shape, generator=draws)

        batch = {
            "x": draw(size, len(input_names(data))),
            "y": draw(size, len(data.targets)),
            "valid": torch.ones(size, len(data.targets), *self.grid_shape, dtype=torch.bool),
            "lead_time_hours": torch.full((size,), float(data.lead_times_hours[0])),
        }
        if self.config.model.wind != "none":
            batch["wind_ms"] = 5 * draw(size, 2)
        heights = 1000 * draw().abs()
        return {name: tensor.to(self.device) for name, tensor in batch.items()}, heights.to(self.device)

    def _memory(self) -> tuple[int, int | None]:
        """(most that was in use, what the device has): of the GPU, else of this process on the host."""
        if self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory
            return torch.cuda.max_memory_allocated(self.device), total
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, None


def check_compute(survey: Survey, trial: ModelTrial, is_built: bool) -> Check:
    """Every process computes the same loss, in about the same time."""
    check, device = Check("model"), survey.context.device
    if not is_built:
        check.summary = "not built: no pass is made"
        return check
    answers = survey.ask_ranks(trial.run, STEP_SECONDS)
    said = values(answers)
    check.findings += survey.failures([answer for answer in answers if not answer.is_late])
    for answer in answers:
        if answer.is_late:
            text = f"no forward and backward pass ended within {STEP_SECONDS:g} s, on {device.type}"
            # a model that was made for GPUs takes minutes on a CPU
            check.findings.append(survey.finding(WARNING if device.type == "cpu" else FAIL, answer.rank, text))
    if not said:
        check.summary = "no pass was measured"
        return check
    _judge_passes(survey, check, trial, said)
    for node, ranks in survey.ranks_of.items():
        mine = [said[rank] for rank in ranks if rank in said]
        if mine:
            check.note(
                node,
                pass_seconds=[found["seconds"] for found in mine],
                memory_bytes=[found["memory_bytes"] for found in mine],
            )
    seconds = [found["seconds"] for found in said.values()]
    memory = max(found["memory_bytes"] for found in said.values())
    rows, columns = trial.grid_shape
    compiled = ", not compiled" if trial.config.train.compile else ""
    check.summary = (
        f"forward and backward of {trial.config.train.micro_batch_size} sample(s) of {rows} x {columns} cells in "
        f"{trial.config.train.precision}{compiled}: median {show_seconds(statistics.median(seconds))}, slowest "
        f"{show_seconds(max(seconds))}; up to {show_bytes(memory)} of memory a process, without the optimizer"
    )
    return check


def _judge_passes(survey: Survey, check: Check, trial: ModelTrial, said: dict[int, dict]) -> None:
    usual = statistics.median(found["seconds"] for found in said.values())
    loss = statistics.median(found["loss"] for found in said.values())
    for rank, found in said.items():
        if not abs(found["loss"] - loss) <= SAME_LOSS[trial.config.train.precision] * abs(loss):
            text = f"rank {rank} computes a loss of {found['loss']:.6g}, others {loss:.6g}: is its device broken?"
            check.findings.append(survey.finding(FAIL, rank, text))
        if found["seconds"] > max(SLOW_FACTOR * usual, usual + SLOW_SECONDS):
            text = (
                f"rank {rank} takes {show_seconds(found['seconds'])}, the median process {show_seconds(usual)}: all "
                "wait for it; look at its device's clock and at what else runs there"
            )
            check.findings.append(survey.finding(WARNING, rank, text))
        total = found["total_bytes"]
        if total is not None and found["memory_bytes"] > FULL_SHARE * total:
            text = f"{show_bytes(found['memory_bytes'])} of {show_bytes(total)}: lower train.micro_batch_size"
            check.findings.append(survey.finding(WARNING, rank, text))
