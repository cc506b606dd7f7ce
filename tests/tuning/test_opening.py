"""What is wrong with a study is found before anything is trained, and a folder keeps its study."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from files.errors import ConfigError
from tests.tuning.parts import STUDY, links, opened, study
from tuning.config import load_study
from tuning.links import Links
from tuning.opening import (
    check_base,
    check_folder,
    default_folder,
    describe_study,
    find_starts,
    open_study,
    published_beside,
)
from tuning.space import Space, digest_of

ADVICE: Any = SimpleNamespace(rate=0.1, profile="linear", published=0.2, published_profile="constant")
TEST_PART = STUDY.replace("dataset: digits", "dataset: mnist5k").replace("image_size: 8", "image_size: 28")


def test_the_folder_holds_the_study(tmp_path: Path) -> None:
    one = opened(tmp_path)
    assert one.folder.config.exists() and one.folder.train.exists() and one.folder.journal.exists()
    opened(tmp_path)
    assert default_folder(one.study) == Path("runs/tune-some")


def test_the_folder_s_own_config_is_the_whole_study(tmp_path: Path, monkeypatch) -> None:
    """It is what the report says to start to repeat the study."""
    one = opened(tmp_path, "optim.epochs=3", "space.drop_path.profile=[linear, constant]")
    monkeypatch.chdir(tmp_path)
    again = load_study(Path("out/study.yaml"))
    assert again.base == one.study.base and again.tune.space == one.study.tune.space
    values = {"drop_path.rate": 0.3, "drop_path.profile": "constant"}
    assert digest_of(Space(again).candidate(values)) == digest_of(Space(one.study).candidate(values))
    open_study(again, one.folder.path, links())


@pytest.mark.parametrize(
    ("word", "told"),
    [
        (
            "optim.lr=0.1",
            r"the training config: optim\.lr is 0\.1 in what was given and 0\.003 in the folder\nchoose",
        ),
        ("space.drop_path.rate=[0.0, 0.1]", r"space\.drop_path\.rate is \[0\.0, 0\.1\]"),
        ("search.seed=4", r"search\.seed is 4"),
        ("search.sampler=gp", r"search\.sampler is 'gp'"),
        ("objective.metric=val_loss", r"objective\.metric is 'val_loss'"),
        ("storage=sqlite:///x.db", "storage is 'sqlite"),
    ],
)
def test_a_study_of_another_config_is_refused(tmp_path: Path, word: str, told: str) -> None:
    one = opened(tmp_path)
    before = {path: path.read_bytes() for path in one.folder.path.iterdir()}
    with pytest.raises(ConfigError, match=f"out holds a study of another config; {told}"):
        opened(tmp_path, word)
    with pytest.raises(ConfigError, match=told):
        check_folder(study(tmp_path, word), one.folder.path)
    assert {path: path.read_bytes() for path in one.folder.path.iterdir()} == before


@pytest.mark.parametrize("word", ["jobs=2", "search.trials=9", "race={seeds: [1]}", "verdict={split: val}"])
def test_what_nothing_trained_depends_on_may_change(tmp_path: Path, word: str) -> None:
    opened(tmp_path)
    opened(tmp_path, word)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "holiday.jpg").touch()
    with pytest.raises(ConfigError, match="is not empty and holds no study; choose another --output"):
        opened(tmp_path)
    assert [path.name for path in out.iterdir()] == ["holiday.jpg"]
    (out / "holiday.jpg").unlink()
    out.rmdir()
    out.touch()
    for check in (lambda: opened(tmp_path), lambda: check_folder(study(tmp_path), out)):
        with pytest.raises(ConfigError, match=r"cannot write to .*choose another --output"):
            check()
    (tmp_path / "loop").symlink_to("loop")
    for place in (out / "a" / "b", tmp_path / "loop"):  # a dry run says what the study would
        for look in (check_folder, open_study):
            with pytest.raises(ConfigError, match=r"cannot write to .*choose another --output"):
                look(study(tmp_path), place)
    check_folder(study(tmp_path), tmp_path / "new" / "study")
    assert not (tmp_path / "new").exists()


def test_a_study_that_was_killed_while_it_was_made_is_made(tmp_path: Path) -> None:
    one = opened(tmp_path)
    one.folder.config.unlink()
    opened(tmp_path)


def test_it_starts_with_what_is_known(tmp_path: Path) -> None:
    words = ["search.start=[zero, published, advice]", "space.drop_path.profile=[linear, constant]"]
    read = study(tmp_path, *words, "search.enqueue=[{drop_path.rate: 0.4}]", "verdict={split: val}")
    starts, finalists, left_out = find_starts(read, Space(read), links(advise=lambda config: ADVICE))
    assert [(start.origin, *start.values.values()) for start in starts] == [
        ("zero", 0.0, "linear"),
        ("published", 0.2, "constant"),
        ("advice", 0.1, "linear"),
        ("given", 0.4, "linear"),
    ]
    assert not left_out
    assert [(f.role, f.config.drop_path.rate, f.config.drop_path.profile) for f in finalists] == [
        ("zero", 0.0, "linear"),
        ("published", 0.2, "constant"),
    ]


def test_one_configuration_is_started_with_once(tmp_path: Path) -> None:
    """At rate 0 the profile does not matter."""
    advice: Any = SimpleNamespace(rate=0.0, profile="constant", published=None, published_profile=None)
    read = study(tmp_path, "space.drop_path.profile=[linear, constant]", "search.enqueue=[{drop_path.rate: 0.0}]")
    starts, _, left_out = find_starts(read, Space(read), links(advise=lambda config: advice))
    assert [start.origin for start in starts] == ["zero"]
    assert [decision.what for decision in left_out][1:] == ["not tried again: advice", "not tried again: given"]
    assert "the same configuration as zero" in left_out[-1].why


def test_what_the_space_does_not_hold_is_left_out_and_said(tmp_path: Path) -> None:
    read = study(tmp_path, "space.drop_path.rate={low: 0.15, high: 0.5}", "verdict={split: val}")
    starts, finalists, left_out = find_starts(read, Space(read), links(advise=lambda config: ADVICE))
    assert [start.origin for start in starts] == ["published"]
    assert [decision.what for decision in left_out] == ["not tried first: zero", "not tried first: advice"]
    assert [f.role for f in finalists] == ["zero", "published"], "compared with all the same"


@pytest.mark.parametrize(
    "words", [[], ["drop_path.rate_is=mean"], ["drop_path.profile=[0.1, 0.3]", "drop_path.rate=null"]]
)
def test_the_published_finalist_is_as_strong_as_is_published(words: list[str], tmp_path: Path) -> None:
    """Also where profile and meaning of the rate are the training config's, not varied, and others."""
    read = study(tmp_path, *words, "verdict={split: val}", "space={optim.lr: [0.001, 0.003]}")
    _, finalists, _ = find_starts(read, Space(read), links(advise=lambda config: ADVICE))
    (found,) = [f.config.drop_path for f in finalists if f.role == "published"]
    assert (found.rate, found.profile, found.rate_is) == (0.2, "constant", "max")


@pytest.mark.parametrize(("words", "rate"), [((), 0.15), (("model.checkpoint=weights",), 0.3)])
def test_the_published_rate_is_that_for_the_purpose(tmp_path: Path, words: tuple[str, ...], rate: float) -> None:
    """Of CAFormer-S18: for training it, and for fine-tuning it from weights."""
    text = STUDY.replace("name: convformer_n4, in_chans: 1, image_size: 8, depths: [1, 1], dims: [16, 32]",
                         "name: caformer_s18, in_chans: 1, image_size: 32")  # fmt: skip
    read = study(tmp_path, *words, text=text)
    starts, _, _ = find_starts(read, Space(read), Links())
    assert [s.values["drop_path.rate"] for s in starts if s.origin == "published"] == [rate]


@pytest.mark.parametrize(("names", "rate"), [("[caformer_s18, caformer_s36]", 0.15), ("[caformer_s36]", 0.3)])
def test_what_is_published_is_of_the_model_that_is_tried_first(tmp_path: Path, names: str, rate: float) -> None:
    """The training config's own, unless the space does not hold that."""
    text = STUDY.replace("name: convformer_n4, in_chans: 1, image_size: 8, depths: [1, 1], dims: [16, 32]",
                         "name: caformer_s18, in_chans: 1, image_size: 32")  # fmt: skip
    read = study(tmp_path, f"space.model.name={names}", "verdict={split: val}", text=text)
    space = Space(read)
    starts, _, _ = find_starts(read, space, Links())
    (first,) = [start.values for start in starts if start.origin == "published"]
    assert first == {"drop_path.rate": rate, "model.name": "caformer_s18" if rate == 0.15 else "caformer_s36"}
    published = [
        published_beside(read, space, Links(), {"model.name": name}) for name in ("caformer_s18", "caformer_s36")
    ]
    strength = {"drop_path.profile": "linear", "drop_path.rate_is": "max"}
    assert published == [{"drop_path.rate": 0.15, **strength}, {"drop_path.rate": 0.3, **strength}]


def test_advice_that_cannot_be_had_is_no_mistake(tmp_path: Path) -> None:
    def refuse(config: Any) -> Any:
        raise ConfigError("no such data")

    read = study(tmp_path)
    starts, _, left_out = find_starts(read, Space(read), links(advise=refuse))
    assert [start.origin for start in starts] == ["zero"]
    assert (left_out[0].what, left_out[0].why) == ("no advice", "no such data")


def test_the_base_is_built_before_anything_is_searched(tmp_path: Path) -> None:
    assert check_base(study(tmp_path)).total_steps == 10
    with pytest.raises(ConfigError, match="depth: unknown key; did you mean 'depths'"):
        check_base(study(tmp_path, "model.depth=[1]"))
    with pytest.raises(ConfigError, match="nowhere"):
        check_base(study(tmp_path, "data={dataset: folder, root: /nowhere/at/all}"))


def test_a_verdict_needs_a_test_part(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"verdict\.split: 'test', but dataset 'digits' has no test part.*\ngive the data one"
    ):
        check_base(study(tmp_path, "verdict={}"))
    check_base(study(tmp_path, "verdict={split: val}"))
    check_base(study(tmp_path, "verdict={}", text=TEST_PART))


def test_the_plan_of_a_study(tmp_path: Path) -> None:
    read = study(tmp_path, "verdict={split: val, seeds: 5}", "space.optim.lr={low: 1e-4, high: 1e-2, log: true}")
    plan = describe_study(read, tmp_path / "out", check_base(read), links())
    lines = plan.splitlines()
    assert "10 steps a run" in lines[0]
    assert lines[1:3] == [
        "varied    drop_path.rate: 0 to 0.5",
        "varied    optim.lr: 0.0001 to 0.01, evenly over the logarithm",
    ]
    assert "6 trials, sampler random, seed 0; val_top1 of the last epoch" in plan
    assert "first     zero: drop_path.rate 0, optim.lr 0.003" in lines
    assert "below 6 seeds no significance" in plan and "warning" not in plan
    more = study(tmp_path, "optim.accumulate=99")
    assert "\nwarning   optim.accumulate: 99 is more than" in describe_study(more, tmp_path, check_base(more), links())
    # 6 trials with 1 seed, 3 with one more, 2 with a third; two configurations in the final
    assert lines[-1].startswith("runs      at most 11 of search and race and 10 of the verdict: 210 steps")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "run", "total"),
    [
        (["space.optim.epochs={low: 2, high: 6}"], "2 to 6 epochs, 10 to 30 steps a run", "110 to 330 steps"),
        (["space.optim.epochs=[4, 2, 6]", "space.data.batch_size=[256, 128]"], "2 to 6 epochs, 10 to 66", "110 to 726"),
        (["space.optim.accumulate=[1, 5]"], "2 epochs, 2 to 10 steps a run", "22 to 110 steps"),
        (["space.optim.epochs=[6]"], "6 epochs, 30 steps a run", ": 330 steps"),
        (["space.data.train_samples=[256, 512]"], "2 epochs, 2 to 4 steps a run", "22 to 44 steps"),
        (["space.data.batch_size=[256, 257]", "space.drop_path.rate=[0.0]"], ", 10 steps a run", ": 110 steps"),
        (
            ["space.optim.epochs=[1, 2]", "space.optim.warmup_epochs=[0, 1]"],  # one epoch goes with no warmup alone
            "1 to 2 epochs, 5 to 10 steps a run",
            "55 to 110 steps",
        ),
    ],
)
def test_the_plan_s_steps_are_those_of_what_is_varied(tmp_path: Path, words: list[str], run: str, total: str) -> None:
    read = study(tmp_path, *words)
    lines = describe_study(read, tmp_path / "out", check_base(read), links()).splitlines()
    assert run in lines[0] and total in lines[-1]


def test_the_folder_may_be_moved(tmp_path: Path) -> None:
    one = opened(tmp_path)
    one.plan.search.ask()
    (tmp_path / "out").rename(tmp_path / "moved")
    again = open_study(study(tmp_path), tmp_path / "moved", links())
    assert len(again.plan.search.proposals()) == 1
