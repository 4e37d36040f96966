import subprocess
import sys
from pathlib import Path

import pytest

from topoflow.config_io import config_from_dict, config_to_dict, dump_config, load_config
from topoflow.errors import ConfigError, MissingPath

MINIMAL = "data: {path: world, train: [2013]}\ntrain: {max_steps: 10}\n"
CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def test_defaults_are_filled_in(file):
    config = load_config(file)
    assert config.data.lead_times_hours == (12, 24, 48, 96)
    assert config.optim.group_multipliers == {"vit_blocks": 0.1, "wind_embedding": 2.0, "head": 0.5, "others": 1.0}
    assert config.train.max_steps == 10


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("optim.learning_rate=1e-4", "optim", "learning_rate", 1e-4),
        ("optim.learning_rate=1", "optim", "learning_rate", 1.0),
        ("train.max_steps=1e3", "train", "max_steps", 1000),
        ("data.lead_times_hours=[6, 12]", "data", "lead_times_hours", (6, 12)),
        ("data.train=[2013, [2014-01-01, 2014-02-03T05]]", "data", "train", (2013, ("2014-01-01", "2014-02-03T05"))),
        ("optim.grad_clip_norm=null", "optim", "grad_clip_norm", None),
        ("train.compile=true", "train", "compile", True),
        ("run.dir=2019", "run", "dir", "2019"),
        ("run.dir=a=b", "run", "dir", "a=b"),
        ("checkpoint.init_from=no", "checkpoint", "init_from", "no"),
        ("model.img_size=[36, 62]", "model", "img_size", (36, 62)),
        ("data.normalization={u: [0, 10]}", "data", "normalization", {"u": (0.0, 10.0)}),
    ],
)
def test_overrides_are_typed(file, override, section, key, value):
    found = getattr(getattr(load_config(file, [override]), section), key)
    assert found == value
    assert type(found) is type(value)


def test_override_of_one_name_in_a_key_that_holds_names(file):
    config = load_config(file, ["optim.group_multipliers.head=0.25"])
    assert config.optim.group_multipliers == {"vit_blocks": 0.1, "wind_embedding": 2.0, "head": 0.25, "others": 1.0}


def test_later_override_wins_over_earlier_and_over_the_file(file):
    assert load_config(file, ["train.max_steps=20", "train.max_steps=30"]).train.max_steps == 30


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.learning_rat=3", ["optim.learning_rat", "did you mean optim.learning_rate?", "command line"]),
        ("trian.max_steps=3", ["trian", "did you mean train?"]),
        ("data.learning_rate=3", ["data.learning_rate", "did you mean optim.learning_rate?"]),
        ("data.workers=3", ["data.workers", "unknown key", "did you mean data.threads?", "command line"]),
        ("data.mask=a.npy", ["data.mask", "unknown key", "topoflow prepare", "command line"]),
        ("data.hours={o2: [0]}", ["data.hours", "for o2: hours, none twice, of one of data.variables"]),
        ("data.hours={pm25: [0, 0]}", ["data.hours", "for pm25: hours, none twice"]),
        ("data.hours={pm25: [0, 12]}", ["data.hours", "for pm25: hours <= 0, because it is forecast"]),
        ("max_steps=3", ["max_steps", "expected section.key=value"]),
        ("optim.learning_rate=fast", ["optim.learning_rate", "'fast'", "expected number"]),
        ("optim.learning_rate=true", ["optim.learning_rate", "True", "expected number"]),
        ("optim.learning_rate=.inf", ["optim.learning_rate", "inf", "expected a finite number"]),
        ("optim.grad_clip_norm=.nan", ["optim.grad_clip_norm", "nan", "expected a finite number | null"]),
        ("distributed.timeout_seconds=1e8", ["distributed.timeout_seconds", "at most 1e7"]),
        ("distributed.setup_timeout_seconds=1e8", ["distributed.setup_timeout_seconds", "at most 1e7"]),
        ("optim.learning_rate=-1", ["optim.learning_rate", "-1.0", "expected a number > 0"]),
        ("train.max_steps=.inf", ["train.max_steps", "inf", "expected integer"]),
        ("train.max_steps=1.5", ["train.max_steps", "1.5", "expected integer"]),
        ("train.compile=on", ["train.compile", "'on'", "true | false"]),
        ("train.precision=fp16", ["train.precision", "'fp16'", "fp32 | bf16"]),
        ("data.train=2013", ["data.train", "2013", "expected list"]),
        ("data.train=[[2013-01-01]]", ["data.train", "2013-01-01"]),
        ("data.train=[2013", ["data.train", "brackets"]),
        ("data.path=null", ["data.path", "None", "expected text"]),
        ("data.lead_times_hours=[24, 12]", ["data.lead_times_hours", "increasing"]),
        ("data.targets=[o3, o3]", ["data.targets", "no entry twice"]),
        ("data.variables=[pm25]", ["data.variables", "u and v"]),
        ("model.num_heads=7", ["model.embed_dim", "768", "multiple of model.num_heads = 7"]),
        ("train.micro_batch_size=5", ["train.global_batch_size", "32", "micro_batch_size = 5"]),
        ("optim.group_multipliers={head: 1}", ["optim.group_multipliers", "vit_blocks"]),
        ("optim.learning_rate.head=1", ["optim.learning_rate.head", "holds no names"]),
        ("train.early_stopping_patience=3", ["train.early_stopping_patience", "data.validation"]),
        ("checkpoint.keep_last=0", ["checkpoint.keep_last", "0", ">= 1"]),
    ],
)
def test_refusals_name_key_value_and_expectation(file, override, words):
    with pytest.raises(ConfigError) as refusal:
        load_config(file, [override])
    message = str(refusal.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {max_steps: 10}\ndata: {train: [2013]}", ["data.path", "missing"]),
        ("data: {path: x, train: [2013]}", ["train.max_steps", "max_epochs"]),
        ("data: [1]", ["data", "[1]"]),
        ("- 1", ["config", "sections"]),
        ("data: {path: x", ["not YAML"]),
        (MINIMAL + "train: {max_steps: 11}", ["train", "twice"]),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(file, text, words):
    file.write_text(text)
    for overrides in ([], ["run.seed=1"]):
        with pytest.raises(ConfigError) as refusal:
            load_config(file, overrides)
        for word in [*words, str(file)]:
            assert word in str(refusal.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(MissingPath, match=r"nothing\.yaml"):
        load_config(tmp_path / "nothing.yaml")


def test_the_resolved_config_is_the_same_config(file):
    texts = ["run.dir=1e5", "checkpoint.init_from='12e3'", "data.path='null'"]
    config = load_config(file, ["optim.learning_rate=3.3e-7", "data.validation=[[2014-01-01, 2014-01-05]]", *texts])
    file.write_text(dump_config(config))
    assert load_config(file) == config
    assert config_from_dict(config_to_dict(config)) == config


def test_config_dicts_hold_plain_values_only(file):
    def walk(value):
        assert type(value) in (dict, list, str, int, float, bool, type(None))
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            walk(item)

    walk(config_to_dict(load_config(file)))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_configs_that_we_ship_load(path):
    load_config(path)


def test_scripts_can_ask_for_a_value_without_torch(file):
    code = "import sys; sys.modules['torch'] = None; from topoflow.config_io import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "--print", "run.dir", str(file), "run.dir=runs/x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "runs/x\n", "")
    done = subprocess.run([*command, "run.dri=x"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "did you mean run.dir?" in done.stderr


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_the_batch_of_the_demo_divides_among_1_2_4_and_8_processes(processes):
    train = load_config(Path(__file__).parents[2] / "configs" / "demo.yaml").train
    assert train.global_batch_size % (train.micro_batch_size * processes) == 0
