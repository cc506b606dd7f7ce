"""training/config.py: types, ranges, rules between keys, overrides, and that a dumped config reads back equal."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from configs import CONFIGS
from files.errors import ConfigError
from layers.schedule import SETTINGS, DropPathSchedule, Kind
from training import config as config_module
from training.config import (
    DropPathSection,
    ScheduleSection,
    TrainConfig,
    build_schedule,
    dump_config,
    json_schema,
    load_config,
)

MINIMAL = """\
model:
  name: some_model
data:
  dataset: digits
optim:
  epochs: 10
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def fault(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert message.count("\n") < 3
    assert "pydantic" not in message
    return message


def test_defaults(path: Path) -> None:
    config = load_config(path)
    assert (config.seed, config.optim.name, config.optim.lr, config.data.batch_size) == (0, "adamw", 1e-3, 128)
    assert config.drop_path.model_dump() == {
        "rate": None, "profile": "linear", "rate_is": "max", "mode": "mask", "break_even": None,
        "schedule": {"kind": "constant"} | dict.fromkeys(["cutoff_epochs", "shape", "start", "end", "points"]),
    }  # fmt: skip
    assert config.augment.crop_ratio == [3 / 4, 4 / 3]
    assert config.model.overrides == {}


def test_no_path_is_the_embedded_default(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert config_module.DEFAULT_CONFIG == CONFIGS / "train" / "digits.yaml"
    monkeypatch.setattr(config_module, "DEFAULT_CONFIG", path)
    assert load_config(None, ["seed=3"]).seed == 3


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("seed=3", 3), ("optim.lr=1e-4", 1e-4), ("optim.lr=1", 1.0), ("optim.clip_grad=null", None),
        ("optim.clip_grad=", None), ("model.checkpoint=runs/a=b", "runs/a=b"),
        ("ema.enabled=true", True), ("runtime.channels_last=false", False), ("runtime.channels_last=auto", "auto"),
        ("runtime.compile=true", True), ("runtime.compile=blocks", "blocks"),
        ("runtime.device=cuda:3", "cuda:3"), ("drop_path.rate=0", 0.0), ("drop_path.rate=1", 1.0),
        ("drop_path.profile=cosine", "cosine"), ("drop_path.profile=[0, 0.5]", [0.0, 0.5]),
        ("augment.auto_augment=rand-m9-mstd0.5-inc1", "rand-m9-mstd0.5-inc1"), ("augment.auto_augment=3a", "3a"),
        ("augment.auto_augment=augmix-m5-w4", "augmix-m5-w4"),
        ("augment.crop_scale=[0.08, 1]", [0.08, 1.0]), ("optim.betas=[0.9, 0.95]", [0.9, 0.95]),
        ("optim.name=sgd", "sgd"),
        ("data.root=", None), ("data.root=null", None), ("model.name=yes", "yes"), ("model.name=1e3", "1e3"),
        ("model.name=null", "null"), ("model.checkpoint=/x/run #2", "/x/run #2"), ("model.checkpoint=010", "010"),
        ("model.checkpoint=null", None), ("model.checkpoint=~", "~"),
        ("runtime.threads=auto", "auto"), ("runtime.threads=3", 3),
        (" optim.epochs = 20", 20), ("checkpoint.every_epochs=null", None),
    ],
)  # fmt: skip
def test_override(path: Path, override: str, value: object) -> None:
    found: Any = load_config(path, [override])
    for key in override.partition("=")[0].strip().split("."):
        found = getattr(found, key)
    assert found == value
    assert type(found) is type(value)


def test_the_last_override_wins(path: Path) -> None:
    assert load_config(path, ["optim.epochs=7", "optim.epochs=8"]).optim.epochs == 8
    # Also one of a section over one of its keys, and the other way round.
    assert load_config(path, ["ema.decay=0.5", "ema={enabled: true}"]).ema.decay == 0.9999
    config = load_config(path, ["ema={enabled: true}", "ema.decay=0.5"])
    assert (config.ema.enabled, config.ema.decay) == (True, 0.5)
    # A wrong value that is overridden does no harm.
    assert load_config(path, ["optim.epochs=abc", "optim.epochs=8"]).optim.epochs == 8


def test_a_whole_section_as_override(path: Path) -> None:
    config = load_config(path, ["drop_path.schedule={kind: early, cutoff_epochs: 3}"])
    assert (config.drop_path.schedule.cutoff_epochs, config.drop_path.schedule.shape) == (3.0, "linear")
    assert fault(path, "drop_path.schedule={kind: early, cutof_epochs: 3}") == (
        "on the command line: drop_path.schedule={kind: early, cutof_epochs: 3}: drop_path.schedule.cutof_epochs: "
        "unknown key; did you mean 'drop_path.schedule.cutoff_epochs'?"
    )


def test_further_model_keys_are_overrides_of_the_model(path: Path) -> None:
    path.write_text(MINIMAL.replace("some_model", "some_model\n  head: {norm: none}"))
    config = load_config(path, ["model.depths=[1, 1, 1, 1]", "model.head.kind=mlp", "model.num_classes=5"])
    assert config.model.overrides == {"head": {"norm": "none", "kind": "mlp"}, "depths": [1, 1, 1, 1]}
    assert config.model.num_classes == 5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.epochs", "expected KEY=VALUE, for example optim.epochs=3"),
        ("=3", "expected KEY=VALUE, for example optim.epochs=3"),
        ("optim.epocs=3", "unknown key; did you mean 'optim.epochs'?"),
        ("optm.epochs=3", "unknown key; did you mean 'optim.epochs'?"),
        ("epochs=3", "unknown key; did you mean 'optim.epochs'?"),
        ("xyz.xyz=1", "unknown key; known here: seed, model, drop_path, data, augment, loss, optim, ema, "),
        ("model..x=1", "unknown key; did you mean 'model'?"),
        ("optim.epochs=abc", 'expected an integer, got "abc"'),
        ("optim.epochs=3.0", "expected an integer, got 3.0"),
        ("optim.epochs=true", "expected an integer, got true"),
        ("optim.epochs='3'", 'expected an integer, got "3"'),
        ("optim.epochs=0", "must be at least 1, got 0"),
        ("optim.lr=true", "expected a number, got true"),
        ("optim.lr=[1", "not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("optim=3", "expected a section with keys of name, lr, weight_decay, epochs, "),
        ("optim.lr.x=3", "unknown key; did you mean 'optim.lr'?"),
        ("model.name.x=3", "'model.name' is not a section, it is \"some_model\""),
        ("seed=-1", "must be at least 0, got -1"),
        ("seed=4294967296", "must be less than 4294967296, got 4294967296"),
        ("drop_path.rate=nan", 'expected a number, got "nan"'),
        ("drop_path.rate=.nan", "expected a finite number, got NaN"),
        ("drop_path.rate=1.1", "must be at most 1, got 1.1"),
        ("drop_path.rate=-0.1", "must be at least 0, got -0.1"),
        ("drop_path.profile=[0.1, 2]", "drop_path.profile[1]: must be at most 1, got 2"),
        ("drop_path.profile=[0.1, .nan]", "drop_path.profile[1]: expected a finite number, got NaN"),
        ("drop_path.profile=[0.1, true]", "drop_path.profile[1]: expected a number, got true"),
        ("drop_path.profile=stagewize",
         "expected 'linear', 'linear_from_first', 'constant', 'stagewise', 'cosine' or 'reversed' or a list, "
         "got \"stagewize\"; did you mean 'stagewise'?"),
        ("drop_path.mode=skp", "expected 'mask', 'skip' or 'batch', got \"skp\"; did you mean 'skip'?"),
        ("drop_path.break_even=2", "must be at most 1 or a section of keys, got 2"),
        ("data.dataset=folder", "dataset 'folder' needs a root, for example data.root=/path/to/imagenet"),
        ("data.root=x", "has no effect with dataset 'digits'; leave it out or set it to null"),
        ("data.on_error=skip", "'skip' has no effect with dataset 'digits'"),
        ("data.on_error=skpi", "expected 'stop' or 'skip', got \"skpi\"; did you mean 'skip'?"),
        ("data.max_skipped=5", "has no effect with on_error 'stop'; set data.on_error=skip"),
        ("data.class_names=cat", 'expected a list, got "cat"'),
        ("data.batch_size=0", "must be at least 1, got 0"),
        ("augment.label_smoothing=1", "must be less than 1, got 1"),
        ("augment.crop_scale=[0.5]", "needs at least 2 entries, got [0.5]"),
        ("augment.crop_scale=[0.5, 0.6, 1]", "takes at most 2 entries, got [0.5, 0.6, 1]"),
        ("augment.crop_scale=[0.5, 2]", "expected 0 < smallest <= largest <= 1, got [0.5, 2.0]"),
        ("augment.crop_scale=[0, 1]", "expected 0 < smallest <= largest <= 1, got [0.0, 1.0]"),
        ("augment.crop_ratio=[2, 1]", "expected 0 < smallest <= largest, got [2.0, 1.0]"),
        ("augment.auto_augment=rand-m9-foo1", "'foo1' is not a setting of rand\nallowed: rand[-mN]"),
        ("augment.auto_augment=nonsense", "unknown policy 'nonsense'\nallowed: rand[-mN]"),
        ("optim.name=adamww", "unknown optimizer 'adamww'; did you mean 'adamw'?"),
        ("optim.betas=[0.9, 1]", "each must be in [0, 1), got [0.9, 1.0]"),
        ("optim.warmup_epochs=11", "must be at most optim.epochs (10), got 11"),
        ("ema.decay=1", "must be less than 1, got 1"),
        ("ema.enabled=yes", 'expected true or false, got "yes"'),
        ("runtime.device=gpu", "expected auto, cpu, cuda, cuda:N or mps, got 'gpu'; did you mean 'cpu'?"),
        ("runtime.device=cuda:x", "expected auto, cpu, cuda, cuda:N or mps, got 'cuda:x'"),
        ("runtime.channels_last=ato", "expected 'auto' or true or false, got \"ato\"; did you mean 'auto'?"),
        ("runtime.compile=block", "expected 'blocks' or true or false, got \"block\"; did you mean 'blocks'?"),
        ("runtime.threads=0", "expected 'auto' or must be at least 1, got 0"),
        ("runtime.threads=1025", "expected 'auto' or must be at most 1024, got 1025"),
        ("runtime.threads=1.5", "expected 'auto' or an integer, got 1.5"),
        ("runtime.threads=true", "expected 'auto' or an integer, got true"),
        ("runtime.threads=all", "expected 'auto' or an integer, got \"all\""),
        ("optim.epochs=3 # three", "' #' begins a comment"),
        ("model.dims=[8, 16] # small", "' #' begins a comment"),
        ("model.further=a #1", "' #' begins a comment"),
        ("data={dataset: folder, root: /x/run #2}", "' #' begins a comment"),
        ("optim.name=adamw #", "unknown optimizer 'adamw #'; did you mean 'adamw'?"),
        ("checkpoint.keep=0", "must be at least 1, got 0"),
        ("loss.gamma=2", "has no effect with name 'cross_entropy', only with 'focal'"),
        ("loss.class_weights=[1, -1]", "each must be at least 0, got -1"),
        ("data.balance_power=0.5", "has no effect with sampler 'shuffle'"),
    ],
)  # fmt: skip
def test_override_refused(path: Path, override: str, message: str) -> None:
    assert fault(path, override).startswith(f"on the command line: {override}: {message}")


def test_a_root_with_a_sharp_sign(path: Path) -> None:
    config = load_config(path, ["data.dataset=folder", "data.root=/x/run #2"])
    assert config.data.root == "/x/run #2"
    path.write_text(dump_config(config))
    assert load_config(path).data.root == "/x/run #2"


def test_classes_are_balanced_once(path: Path) -> None:
    told = fault(path, "data.sampler=balanced", "loss.class_weights=auto")
    assert told.endswith("'auto' would do again what data.sampler 'balanced' does; choose one")
    assert load_config(path, ["data.sampler=balanced", "loss.class_weights=[1, 2]"]).data.balance_power == 1


def test_two_image_sizes(path: Path) -> None:
    both = "is 32, but model.image_size is {}; give one of them, or both alike"
    word = "data.image_size=32"
    for size in ("16", "[16, 32]"):
        expected = f"on the command line: {word}: {both.format(size)}"
        assert fault(path, f"model.image_size={size}", word) == expected
        assert fault(path, word, f"model.image_size={size}") == expected
    path.write_text(MINIMAL.replace("digits", "digits\n  image_size: 32"))
    other = "\nwhere model.image_size is given: on the command line: model.image_size=16"
    assert fault(path, "model.image_size=16") == f"{path}:5: data.image_size: {both.format(16)}{other}"
    for size in ("32", "[32, 32]", "null"):
        assert load_config(path, [f"model.image_size={size}"]).data.image_size == 32
    assert load_config(path, ["model.image_size=16", "data.image_size=null"]).data.image_size is None


@pytest.mark.parametrize(
    ("word", "other"),
    [
        ("data.image_size=32", "model.image_size"),
        ("optim.decay_rate=0.5", "optim.schedule"),
        ("data.root=x", "data.dataset"),
        ("drop_path.schedule.end=0.5", "drop_path.schedule.kind"),
        ("freeze.epochs=99", "optim.epochs"),
        ("optim.warmup_epochs=99", "optim.epochs"),
    ],
)
def test_the_default_file_is_named_where_it_has_the_other_key(word: str, other: str) -> None:
    """Who gives one key on the command line has not read there what it does not go with."""
    with pytest.raises(ConfigError) as caught:
        load_config(None, [word])
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"on the command line: {word}: ")
    found = re.fullmatch(
        rf"where {re.escape(other)} is given: {re.escape(str(config_module.DEFAULT_CONFIG))}:(\d+)", second
    )
    assert (
        found and other.rpartition(".")[2] in config_module.DEFAULT_CONFIG.read_text().splitlines()[int(found[1]) - 1]
    )


def test_the_digits_take_one_thread() -> None:
    """A small model gains nothing from more, and its weights are then the same on every machine of one kind."""
    assert load_config(None).runtime.threads == 1


@pytest.mark.parametrize(
    ("policy", "problem"),
    [
        ("randaugment", "unknown policy 'randaugment'; did you mean 'rand'?"),
        ("orginal", "unknown policy 'orginal'; did you mean 'original'?"),
        ("rand-magnitude9", "'magnitude9' is not a setting of rand"),
        ("rand-m", "'m' is not a setting of rand"),
        ("rand-m9.5", "'m9.5' is not a setting of rand"),
        ("rand-tfoo", "'tfoo' is not a setting of rand"),
        ("rand-m9-", "'' is not a setting of rand"),
        ("rand-m101", "'m' must be from 0 to 100, got 101"),
        ("rand-n0", "'n' must be from 1 to 100, got 0"),
        ("rand-m9-p2", "'p' must be from 0 to 1, got 2"),
        ("rand-p1.5", "'p' must be from 0 to 1, got 1.5"),
        ("rand-mmax0", "'mmax' must be from 1 to 100, got 0"),
        ("rand-inc2", "'inc' must be from 0 to 1, got 2"),
        ("rand-m9-m5", "'m' is given twice"),
        ("rand-n16-tweights", "'n' must be from 1 to 15 with tweights, got 16"),
        ("rand-t3aw-n15", "'n' must be from 1 to 14 with t3aw, got 15"),
        ("augmix-n2", "'n2' is not a setting of augmix"),
        ("augmix-a0", "'a' must be from 0.1 to 1000, got 0"),
        ("augmix-w0", "'w' must be from 1 to 100, got 0"),
        ("v0-m9", "'m9' is not a setting of v0"),
        ("3a-mstd1e3", "'mstd1e3' is not a setting of 3a"),
    ],
)
def test_a_policy_is_refused_when_the_config_is_read(path: Path, policy: str, problem: str) -> None:
    message = fault(path, f"augment.auto_augment={policy}")
    assert message.startswith(f"on the command line: augment.auto_augment={policy}: {problem}\nallowed: rand[-mN]")
    assert len(message.splitlines()) == 3


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("{kind: early}", "kind: 'early' needs cutoff_epochs: epochs, greater than 0"),
        ("{kind: late}", "kind: 'late' needs cutoff_epochs: epochs, greater than 0"),
        ("{kind: early, cutoff_epochs: 0}", "cutoff_epochs: must be greater than 0, got 0"),
        ("{kind: early, cutoff_epochs: 11}", "cutoff_epochs: ends at epoch 11, beyond optim.epochs (10)"),
        ("{kind: early, cutoff_epochs: 3, start: 0}",
         "start: has no effect with kind 'early'; its keys are cutoff_epochs, shape"),
        ("{kind: late, cutoff_epochs: 3, shape: linear}",
         "shape: has no effect with kind 'late'; its keys are cutoff_epochs"),
        ("{cutoff_epochs: 3}", "cutoff_epochs: has no effect with kind 'constant'; it takes no further key"),
        ("{kind: ramp, points: [[0, 1]]}",
         "points: has no effect with kind 'ramp'; its keys are cutoff_epochs, start, end"),
        ("{kind: cosine, end: 2}", "end: must be at most 1, got 2"),
        ("{kind: piecewise}", "kind: 'piecewise' needs points"),
        ("{kind: piecewise, points: []}", "points: needs at least 1 entry, got []"),
        ("{kind: piecewise, points: [[0, 1], [3]]}", "points[1]: needs at least 2 entries, got [3]"),
        ("{kind: piecewise, points: [[1, 1]]}", "points: epochs must rise strictly from 0, got [1.0]"),
        ("{kind: piecewise, points: [[0, 1], [0, 0]]}", "points: epochs must rise strictly from 0, got [0.0, 0.0]"),
        ("{kind: piecewise, points: [[0, 1.5]]}", "points: multipliers must be in [0, 1], got [1.5]"),
        ("{kind: piecewise, points: [[0, 1], [11, 0]]}", "points: ends at epoch 11, beyond optim.epochs (10)"),
        ("{kind: erly}", "kind: expected 'constant', 'ramp', 'early', 'late', 'cosine' or 'piecewise', got \"erly\""),
    ],
)  # fmt: skip
def test_schedule_refused(path: Path, schedule: str, message: str) -> None:
    path.write_text(MINIMAL + f"drop_path:\n  rate: 0.1\n  schedule: {schedule}\n")
    assert fault(path).startswith(f"{path}:9: drop_path.schedule.{message}")


def test_schedules(path: Path) -> None:
    def schedule(text: str) -> dict[str, Any]:
        return load_config(path, [f"drop_path.schedule={text}"]).drop_path.schedule.model_dump(exclude_none=True)

    assert schedule("{kind: ramp}") == {"kind": "ramp", "start": 0.0, "end": 1.0}
    assert schedule("{kind: cosine, start: 1, end: 0, cutoff_epochs: 10}") == {
        "kind": "cosine", "start": 1.0, "end": 0.0, "cutoff_epochs": 10.0,
    }  # fmt: skip
    assert schedule("{kind: early, cutoff_epochs: 0.5, shape: constant}")["shape"] == "constant"
    assert schedule("{kind: piecewise, points: [[0, 1], [10, 0]]}")["points"] == [[0.0, 1.0], [10.0, 0.0]]
    assert tuple(SETTINGS) == get_args(Kind)
    keys = {name for names in SETTINGS.values() for name in names} - {"cutoff"} | {"cutoff_epochs", "kind"}
    assert keys == set(ScheduleSection.model_fields)


def test_faults_in_the_file_name_its_line(path: Path) -> None:
    path.write_text(MINIMAL + "  lrr: 0.1\n")
    assert fault(path) == f"{path}:7: optim.lrr: unknown key; did you mean 'optim.lr'?"
    path.write_text("data: {dataset: digits}\n")
    assert fault(path) == f"{path}:1: model: required key is missing"
    path.write_text("model: {num_classes: 3}\ndata: {dataset: digits}\n")
    assert fault(path) == f"{path}:1: model.name: required key is missing"
    # The default warm-up of 5 epochs stands in no line; the section does.
    path.write_text(MINIMAL)
    told = f"{path}:5: optim.warmup_epochs: must be at most optim.epochs (3), got 5"
    other = "where optim.epochs is given: on the command line: optim.epochs=3"
    assert fault(path, "optim.epochs=3") == f"{told}\n{other}"
    assert fault(path.with_name("runn.yaml")).endswith("no such file; did you mean 'run.yaml'?")


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["drop_path.schedule={kind: ramp}", "drop_path.profile=[0.0, 0.25, 1]", "optim.eps=1e-8"],
        ["drop_path.schedule={kind: piecewise, points: [[0, 0.5], [9, 1]]}", "model.dims=[1, 2]", "model.act=yes"],
        ["model={name: '1e-3', head: {norm: null, scales: [[1, 2], []]}, tag: '010'}", "optim.betas=[0.9, 0.999]"],
    ],
)  # fmt: skip
def test_dump_reads_back_equal(path: Path, overrides: list[str]) -> None:
    config = load_config(path, overrides)
    copy = path.with_name("copy.yaml")
    copy.write_text(dump_config(config))
    again = load_config(copy)
    assert again == config
    assert again.model.overrides == config.model.overrides
    assert dump_config(again) == dump_config(config)
    assert list(yaml.safe_load(dump_config(config))) == list(TrainConfig.model_fields)


def test_json_schema_describes_every_key() -> None:
    schema = json_schema()
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert set(schema["properties"]) == set(TrainConfig.model_fields)
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["ModelSection"]["additionalProperties"] is True
    for section in schema["$defs"].values():
        assert section["description"]
        for name, key in section["properties"].items():
            assert "description" in key or "$ref" in key, name


def test_the_ceiling_of_skipping_is_filled_in(path: Path) -> None:
    folder = ["data.dataset=folder", "data.root=x", "data.on_error=skip"]
    assert load_config(path, folder).data.max_skipped == 100
    assert load_config(path, [*folder, "data.max_skipped=3"]).data.max_skipped == 3
    assert load_config(path).data.max_skipped is None
    assert "max_skipped" in fault(path, *folder, "data.max_skipped=0")


def test_the_published_poolformer_recipe() -> None:
    path = CONFIGS / "train" / "imagenet_poolformer_s12.yaml"
    config = load_config(path)
    assert (config.drop_path.rate, config.drop_path.mode, config.optim.epochs, config.optim.lr) == (
        0.1,
        "skip",
        300,
        1e-3,
    )
    header = re.split(r"^[^#\n]", path.read_text(), maxsplit=1, flags=re.MULTILINE)[0]
    assert all(word in header for word in ("arxiv.org/abs/2111.11418", "torchrun", "NOT been trained"))


SCHEDULES: dict[str, tuple[dict[str, Any], DropPathSchedule]] = {
    "constant": ({}, DropPathSchedule()),
    "ramp": ({"start": 0.2}, DropPathSchedule(kind="ramp", cutoff=50, start=0.2, end=1.0)),
    "ramp to a cutoff": ({"cutoff_epochs": 1.5}, DropPathSchedule(kind="ramp", cutoff=8)),
    "cosine": ({"start": 1.0, "end": 0.5}, DropPathSchedule(kind="cosine", cutoff=50, start=1.0, end=0.5)),
    "early": ({"cutoff_epochs": 3}, DropPathSchedule(kind="early", cutoff=15)),
    "early at once": ({"cutoff_epochs": 0.01, "shape": "constant"},
                      DropPathSchedule(kind="early", cutoff=1, shape="constant")),
    "late": ({"cutoff_epochs": 2}, DropPathSchedule(kind="late", cutoff=10)),
    "piecewise": ({"points": [[0, 0.0], [0.5, 1.0], [10, 0.3]]},
                  DropPathSchedule(kind="piecewise", points=[(0, 0.0), (2, 1.0), (50, 0.3)])),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_in_epochs_becomes_one_in_steps(name: str) -> None:
    settings, expected = SCHEDULES[name]
    section = DropPathSection.model_validate({"schedule": {"kind": name.partition(" ")[0], **settings}})
    made = build_schedule(section, steps_per_epoch=5, epochs=10)
    assert made.kind == expected.kind
    assert [made(s) for s in range(60)] == [expected(s) for s in range(60)]
