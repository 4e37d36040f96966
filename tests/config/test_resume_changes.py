import pytest

from topoflow.config_io import changed_on_resume, config_from_dict, config_to_dict, override_config

TREE = {"data": {"path": "world", "train": [2013]}, "train": {"max_steps": 10}}


def changes(*overrides, allowed=()):
    saved = config_to_dict(config_from_dict(TREE))
    return changed_on_resume(saved, override_config(TREE, overrides, "a test"), allowed)


@pytest.mark.parametrize(
    "override",
    [
        "train.max_steps=20", "train.max_epochs=7", "train.validate_every_steps=3", "train.log_every_steps=1",
        "checkpoint.every_steps=5", "run.dir=elsewhere", "data.path=elsewhere", "data.workers=0",
        "distributed.timeout_seconds=5",
    ],
)  # fmt: skip
def test_what_does_not_alter_the_mathematics_may_change(override):
    assert changes(override) == ([], [])


@pytest.mark.parametrize(
    "override",
    [
        "optim.learning_rate=1e-3", "run.seed=4", "data.train=[2014]", "data.lead_times_hours=[12]",
        "train.global_batch_size=64", "train.micro_batch_size=8", "train.precision=bf16", "model.drop_rate=0.2",
        "distributed.reduction=canonical",
    ],
)  # fmt: skip
def test_what_alters_the_mathematics_is_refused_unless_listed(override):
    key = override.partition("=")[0]
    refused, accepted = changes(override)
    assert [line.partition(":")[0] for line in refused] == [key]
    assert accepted == []
    refused, accepted = changes(override, allowed=[key])
    assert refused == []
    assert [line.partition(":")[0] for line in accepted] == [key]
    assert changes(override, allowed=[key.partition(".")[0] + ".*"])[0] == []


def test_a_key_that_is_younger_than_the_checkpoint_has_its_default_there():
    saved = config_to_dict(config_from_dict(TREE))
    del saved["distributed"]["reduction"]
    assert changed_on_resume(saved, config_from_dict(TREE)) == ([], [])
    other = override_config(TREE, ["distributed.reduction=canonical"], "a test")
    assert changed_on_resume(saved, other) == (["distributed.reduction: 'ddp' -> 'canonical'"], [])
