"""A study's YAML is read strictly, and what is wrong in it is named with its place."""

from pathlib import Path

import pytest

from configs import CONFIGS
from files.errors import ConfigError
from files.strict_yaml import parse_yaml, validate
from tests.tuning.parts import STUDY, study
from tuning.config import (
    RaceSection,
    TuneConfig,
    dump_study,
    first_difference,
    json_schema,
    load_study,
)


@pytest.mark.parametrize("path", sorted((CONFIGS / "tune").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_study_yaml_is_valid_and_says_what_it_is_for(path: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # the training config is found from anywhere
    assert load_study(path).tune.space
    assert path.read_text().startswith("#")


def test_defaults(tmp_path: Path) -> None:
    tune = study(tmp_path).tune
    assert (tune.objective.metric, tune.jobs, tune.storage) == ("val_top1", 1, None)
    tune = study(tmp_path, "race={}", "search={}", "verdict={}").tune
    assert (tune.race.seeds, tune.race.kept(12), tune.race.kept(5)) == ([1, 2, 4], [6, 3], [3, 2])
    assert tune.verdict is not None and (tune.verdict.seeds, tune.verdict.split) == (8, "test")
    assert tune.search.start == ["zero", "published", "advice"]
    assert RaceSection(seeds=[3]).kept(12) == []


@pytest.mark.parametrize(
    "words, sign",
    [("{metric: val_top5, mode: max}", 1), ("{metric: val_ece, mode: min}", -1), ("{metric: val_loss}", -1)],
)
def test_the_direction_is_the_metric_s(tmp_path: Path, words: str, sign: int) -> None:
    assert study(tmp_path, f"objective={words}").tune.objective.sign == sign


def test_what_is_dumped_is_read_back(tmp_path: Path) -> None:
    tune = study(tmp_path, "space.drop_path.schedule=[{kind: constant}, {kind: early, cutoff_epochs: 1}]").tune
    assert validate(TuneConfig, parse_yaml(dump_study(tune))) == tune
    assert "space" in json_schema()["properties"]


def test_overrides_of_the_study_and_of_its_training_config(tmp_path: Path) -> None:
    words = ["search.trials=3", "optim.epochs=7", "overrides.drop_path.mode=skip", "space.optim.lr=[1e-3, 3e-3]"]
    read = study(tmp_path, *words)
    assert read.tune.search.trials == 3
    assert read.tune.overrides == {"optim.epochs": 7, "drop_path.mode": "skip"}
    assert (read.base.optim.epochs, read.base.drop_path.mode) == (7, "skip")
    assert read.tune.space["optim.lr"] == [1e-3, 3e-3]
    with pytest.raises(ConfigError, match=r"on the command line: optim.epochs=0: must be at least 1"):
        study(tmp_path, "optim.epochs=0")


def test_the_training_config_may_lie_beside_the_study(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("model: {name: convformer_n4}\ndata: {dataset: digits}\nseed: 5\n")
    text = "train: base.yaml\nspace: {drop_path.rate: [0.0, 0.1]}\n"
    assert study(tmp_path, text=text).base.seed == 5
    with pytest.raises(ConfigError, match=r"some\.yaml:1: train: bose\.yaml: no such file"):
        study(tmp_path, text=text.replace("base", "bose"))
    (tmp_path / "base.yaml").write_text("model: {name: convformer_n4}\ndata: {dataset: digitz}\n")
    with pytest.raises(ConfigError, match=r"base\.yaml:2: data\.dataset: .*did you mean 'digits'"):
        study(tmp_path, text=text)


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("space={}", r"space={}: is empty; name what to vary"),
        ("space.drop_path.rate={low: 0.5, high: 0.1}", "low: 0.5 is above high, 0.1; swap them"),
        ("space.optim.lr={low: 0, high: 1, log: true}", "a logarithm needs low above 0, got 0"),
        ("space.optim.lr={low: 1e-4, high: 1, log: true, step: 0.1}", "step: has no effect with log"),
        ("space.optim.lr={low: 1e-4, high: 1, stop: 1}", r"stop: unknown key; did you mean 'step'\?$"),
        ("space.optim.lr={lo: 1e-4, high: 1}", r"lo: unknown key; did you mean 'low'\?$"),
        ("space.optim.lr={from: 1e-4, high: 1}", "from: unknown key; known here: low, high, log, step$"),
        ("space.optim.lr=3", r"expected a range, as in {low: 0.0, high: 0.5}, or a list of values, got 3$"),
        ("search.sampler=gq", "expected 'auto', 'gp', 'tpe', 'grid' or 'random', got \"gq\""),
        ("search.trials=0", "must be at least 1, got 0"),
        ("search={sampler: grid, trials: 3}", "trials: has no effect with sampler 'grid'"),
        ("search={sampler: grid, start: [zero]}", "start: has no effect with sampler 'grid'"),
        ("race.seeds=[2, 2]", "must rise from round to round"),
        ("race={seeds: [1, 2], keep: [3, 2]}", "needs 1 entry"),
        ("race={seeds: [1, 2, 3], keep: [3, 4]}", "must not rise"),
        ("objective.metric=val_top3", "got 'val_top3'; did you mean 'val_top5'"),
        ("objective.metric=train_loss", "expected 'val_loss'"),
        (
            "objective.mode=min",
            r"objective\.mode=min: 'min' would look for the worst model: more of val_top1 is better; leave it out, or",
        ),
        ("objective={metric: val_loss, mode: max}", "less of val_loss is better; leave it out, or give 'min'"),
        ("verdict={split: tast}", "expected 'test' or 'val'"),
        ("verdict={first_seed: 3}", "must be at least 1000"),
        ("jobs=0", "must be at least 1, got 0"),
        ("spaze=1", "unknown key; did you mean 'space'"),
        ("search.trails=1", "unknown key; did you mean 'search.trials'"),
        ("optim.epoch=1", "unknown key; did you mean 'optim.epochs'"),
        ("overrides.optim.epoch=1", "unknown key; did you mean 'optim.epochs'"),
        ("nothing", "expected KEY=VALUE"),
        ("seed=3", "has no effect: seeds are given by race.seeds"),
        ("log.validate_every=3", "has no effect: a study validates at the end"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, word: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        study(tmp_path, word)
    assert len(str(caught.value).splitlines()) <= 3


def test_mistakes_in_the_file_have_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"some\.yaml:9: search\.trails: unknown key"):
        study(tmp_path, text=STUDY.replace("trials:", "trails:"))
    with pytest.raises(ConfigError, match=r"some\.yaml:6: optim\.lrr: unknown key"):
        study(tmp_path, text=STUDY.replace("lr:", "lrr:"))
    with pytest.raises(ConfigError, match="required key is missing"):
        study(tmp_path, text="train: {}\n")


def test_the_first_difference_is_named() -> None:
    a = {"search": {"seed": 0, "trials": 3}, "jobs": 1, "space": {"x": [1]}}
    assert first_difference(a, a) is None
    assert first_difference(a, a | {"jobs": 2}) == "jobs is 2 here and 1 there"
    assert first_difference(a, a | {"jobs": 2}, ["jobs"]) is None
    other = a | {"search": {"seed": 1, "trials": 4}}
    assert first_difference(a, other, ["search.trials"]) == "search.seed is 1 here and 0 there"
    assert first_difference(a, a | {"search": {"seed": 0, "trials": 4}}, ["search.trials"]) is None
    assert first_difference(a, a | {"space": {"y": [1]}}) == "space.x is None here and [1] there"
