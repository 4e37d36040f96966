"""Runs of the two programs as Lightning would make them, with checkpoints of its form: plain torch, on random data."""

import copy
from dataclasses import dataclass, field

import torch
from torch import nn

from tests.lightning.restated import TARGETS, VARIABLES, Network

GROUPS = {"vit_blocks": 0.1, "wind_embedding": 2.0, "head": 0.5, "others": 1.0}
IMG_SIZE = (8, 12)
ELEVATION_MEAN, ELEVATION_STD = 1039.13, 1931.40


def scaled(network, seed):
    """The network with small weights of its own seed."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if not name.endswith("alpha"):
            nn.init.normal_(parameter, std=0.2, generator=generator)
            parameter.data += 1.0 if "norm" in name and name.endswith("weight") else 0.0
    return network


@dataclass
class LightningRun:
    """A program in training: AdamW, accumulation, clipping at 1, CosineAnnealingLR.

    groups: names in the order of the optimizer's groups; None for a single group. named: whether groups have a name.
    interval: after what the schedule is stepped, epoch or step; none for no schedule.
    """

    network: Network
    groups: tuple[str, ...] | None = tuple(GROUPS)
    named: bool = True
    batch_size: int = 2
    accumulation: int = 2
    batches_per_epoch: int = 6
    interval: str = "epoch"
    t_max: int = 4
    learning_rate: float = 1e-3
    seed: int = 0
    img_size: tuple[int, int] = IMG_SIZE
    batches: int = 0
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)

    def __post_init__(self):
        self.network = scaled(self.network, self.seed)
        self.generator = torch.Generator().manual_seed(self.seed + 1)
        self.elevation_m = torch.rand(self.img_size, generator=self.generator) * 4000
        self.mask = torch.rand(self.img_size, generator=self.generator) > 0.4
        self.optimizer = torch.optim.AdamW(self._groups(), lr=self.learning_rate, weight_decay=0.01)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR
        self.scheduler = cosine(self.optimizer, T_max=self.t_max, eta_min=1e-6)

    def _groups(self):
        if self.groups is None:
            return list(self.network.parameters())
        members = {name: [] for name in self.groups}
        for name, parameter in self.network.named_parameters():
            part = name.split(".")[0]
            group = {"blocks": "vit_blocks", "patch_embed": "wind_embedding", "token_embeds": "wind_embedding"}
            members[group.get(part, "head" if part == "head" else "others")].append(parameter)
        groups = [{"params": members[name], "lr": self.learning_rate * GROUPS[name]} for name in self.groups]
        for group, name in zip(groups, self.groups, strict=True):
            group.update({"name": name} if self.named else {})
        return groups

    @property
    def steps(self):
        whole, rest = divmod(self.batches, self.batches_per_epoch)
        return whole * -(-self.batches_per_epoch // self.accumulation) + rest // self.accumulation

    def draw(self):
        """A batch: x [B, V, H, W] with the terrain in its channel, y [B, T, H, W], lead times in hours."""
        x = torch.randn(self.batch_size, len(VARIABLES), *self.img_size, generator=self.generator)
        x[:, VARIABLES.index("elevation")] = (self.elevation_m - ELEVATION_MEAN) / ELEVATION_STD
        y = torch.randn(self.batch_size, len(TARGETS), *self.img_size, generator=self.generator)
        lead = torch.tensor([12.0, 24.0, 48.0, 96.0])[torch.randint(4, (self.batch_size,), generator=self.generator)]
        return x, y, lead

    def forecast(self, x, lead):
        chosen = [VARIABLES.index(target) for target in TARGETS]
        return self.network(x, lead, self.elevation_m)[:, chosen]

    def train(self, batches):
        """Train on so many more batches; returns them."""
        drawn = [self.draw() for _ in range(batches)]
        for x, y, lead in drawn:
            error = (self.forecast(x, lead) - y).square() * self.mask
            loss = error.sum() / self.mask.expand_as(error).sum()
            (loss / self.accumulation).backward()
            self.losses.append(loss.item())
            self.batches += 1
            in_epoch = (self.batches - 1) % self.batches_per_epoch + 1
            if in_epoch % self.accumulation == 0 or in_epoch == self.batches_per_epoch:
                self.grad_norms.append(nn.utils.clip_grad_norm_(self.network.parameters(), 1.0).item())
                self.optimizer.step()
                self.optimizer.zero_grad()
                if self.interval == "step":
                    self.scheduler.step()
            if in_epoch == self.batches_per_epoch and self.interval == "epoch":
                self.scheduler.step()
        return drawn

    def weights(self):
        """The network's, under the program's names, without `model.`"""
        return {name: tensor.clone() for name, tensor in self.network.state_dict().items()}

    def checkpoint(self, ended=True):
        """As Lightning 2.6 writes it after the last batch made; ended: at the end of the run, if that is an epoch's."""
        prefix = "model." if self.network.published else "model.climax."
        state_dict = {"china_mask": self.mask.float()}
        if not self.network.published:
            state_dict["model.target_indices"] = torch.tensor([VARIABLES.index(target) for target in TARGETS])
        state_dict |= {prefix + name: tensor for name, tensor in self.network.state_dict().items()}
        behind, current = divmod(self.batches, self.batches_per_epoch)
        is_last = self.batches > 0 and current == 0
        completed = behind if is_last and ended else behind - is_last
        entered, current = (behind, self.batches_per_epoch) if is_last else (behind + 1, current)
        in_flight = 0 if (is_last and ended) or not self.batches else 1
        steps_in_epoch = -(-current // self.accumulation) if is_last else current // self.accumulation
        content = {
            "epoch": completed,
            "global_step": self.steps,
            "pytorch-lightning_version": "2.6.6",
            "state_dict": state_dict,
            "loops": {
                "fit_loop": {
                    "epoch_loop.batch_progress": {
                        "total": _progress(self.batches, self.batches - in_flight),
                        "current": _progress(current, current - in_flight),
                        "is_last_batch": is_last,
                    },
                    "epoch_loop.automatic_optimization.optim_progress": {
                        "optimizer": {"step": {"current": _progress(steps_in_epoch, steps_in_epoch)}}
                    },
                    "epoch_progress": {"current": {**_progress(entered, completed), "processed": completed}},
                }
            },
            "callbacks": {},
            "optimizer_states": [self.optimizer.state_dict()],
            "lr_schedulers": [] if self.interval == "none" else [self.scheduler.state_dict()],
            "hparams_name": "kwargs",
            "hyper_parameters": {"config": self.config()},
        }
        return copy.deepcopy(content)

    def config(self):
        """The program's own."""
        return {
            "train": {"batch_size": self.batch_size, "accumulate_grad_batches": self.accumulation, "devices": 1,
                      "num_nodes": 1, "gradient_clip_val": 1.0},
            "data": {"variables": list(VARIABLES), "target_variables": list(TARGETS), "train_years": [2013]},
            "model": {"num_heads": self.network.var_agg.num_heads, "drop_rate": 0.0, "drop_path": 0.0,
                      "parallel_patch_embed": False},
        }  # fmt: skip


def _progress(started, completed):
    return {"ready": started, "completed": completed, "started": started, "processed": started}
