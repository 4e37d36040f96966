import dataclasses

import pytest

from topoflow.config import NOTHING, Alters, Config
from topoflow.config_io import changed_keys, config_from_dict, config_to_dict, override_config, without_replaced

TREE = {"data": {"path": "world", "train": [2013]}, "train": {"max_steps": 10}}


def changes(*overrides):
    saved = config_to_dict(config_from_dict(TREE))
    return changed_keys(saved, override_config(TREE, overrides, "a test"))


def test_every_key_states_what_a_change_of_it_alters():
    for section in dataclasses.fields(Config):
        for field in dataclasses.fields(section.type):
            assert isinstance(field.metadata["alters"], Alters), f"{section.name}.{field.name}"


@pytest.mark.parametrize(
    "override",
    [
        "train.max_steps=20", "train.max_epochs=7", "train.validate_every_steps=3", "train.log_every_steps=1",
        "checkpoint.every_steps=5", "run.dir=elsewhere", "data.path=elsewhere", "data.threads=0",
        "distributed.timeout_seconds=5",
    ],
)  # fmt: skip
def test_keys_that_alter_nothing_may_change(override):
    assert changes(override) == []


@pytest.mark.parametrize(
    ("override", "alters"),
    [
        ("optim.learning_rate=1e-3", Alters.RATES),
        ("run.seed=4", Alters.ORDER),
        ("data.train=[2014]", Alters.ORDER | Alters.RATES),
        ("data.lead_times_hours=[12]", Alters.ORDER | Alters.RATES),
        ("train.global_batch_size=64", Alters.ORDER | Alters.RATES),
        ("train.micro_batch_size=8", Alters.MATHEMATICS),
        ("train.precision=bf16", Alters.ARITHMETIC),
        ("model.drop_rate=0.2", Alters.MATHEMATICS),
        ("model.terrain=none", Alters.NETWORK | Alters.NAMES),
        ("model.leads=joint", Alters.ORDER | Alters.CHANNELS | Alters.NETWORK | Alters.NAMES),
        ("distributed.reduction=canonical", Alters.MATHEMATICS),
        ("train.tf32=true", Alters.ARITHMETIC),
        ("model.attn_drop_rate=0.1", Alters.MATHEMATICS),
    ],
)
def test_a_change_that_alters_the_run_is_listed_with_its_effect(override, alters):
    [change] = changes(override)
    assert (change.key, change.alters) == (override.partition("=")[0], alters)
    assert str(change).startswith(f"{change.key}: ")


def test_lead_times_are_channels_of_a_joint_network():
    joint = {**TREE, "model": {"leads": "joint"}}
    now = override_config(joint, ["data.lead_times_hours=[12, 24, 48, 72]"], "a test")
    [change] = changed_keys(config_to_dict(config_from_dict(joint)), now)
    assert change.alters == Alters.ORDER | Alters.RATES | Alters.CHANNELS | Alters.NETWORK


def test_a_key_that_is_younger_than_the_checkpoint_has_its_default_there():
    saved = config_to_dict(config_from_dict(TREE))
    del saved["distributed"]["reduction"]
    assert changed_keys(saved, config_from_dict(TREE)) == []
    [change] = changed_keys(saved, override_config(TREE, ["distributed.reduction=canonical"], "a test"))
    assert str(change) == "distributed.reduction: 'ddp' -> 'canonical'"


def test_a_key_that_the_program_no_longer_has_alters_the_mathematics():
    saved = config_to_dict(config_from_dict(TREE))
    saved["optim"]["momentum"] = 0.9
    [change] = changed_keys(saved, config_from_dict(TREE))
    assert (change.key, change.was, change.now, change.alters) == ("optim.momentum", 0.9, "absent", Alters.MATHEMATICS)
    assert change.alters != NOTHING


def test_a_checkpoint_may_have_the_replaced_key_for_loader_processes():
    config = config_from_dict(TREE)
    saved = config_to_dict(config)
    del saved["data"]["threads"]
    saved["data"]["workers"] = 7
    assert changed_keys(saved, config) == []
    assert config_from_dict(without_replaced(saved)) == config
    assert saved["data"]["workers"] == 7
