"""`tune.py advise`: what it prints, as text and as JSON, and what it says to mistakes."""

import json
import shlex
from pathlib import Path

import pytest

import tune
from files.strict_yaml import parse_yaml
from training.config import load_config
from tuning.advice_command import main

ROOT = Path(__file__).resolve().parents[2]
POOLFORMER = "configs/train/imagenet_poolformer_s12.yaml"


def told(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> str:
    assert main(list(argv)) == code
    out, err = capsys.readouterr()
    return out if code == 0 else err


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_what_it_tells(capsys: pytest.CaptureFixture[str]) -> None:
    out = told(capsys, "--config", POOLFORMER, "data.root=no where", "drop_path.rate=0.6", "model.name=poolformer_s36")
    for line in (
        "model      poolformer_s36: 36 residual blocks, 30.9 M parameters",
        "data       1,281,167 training images (taken for imagenet-1k",
        "purpose    training from scratch",
        "published  0.2, linear",
        "advice     start at drop_path.rate 0.2, profile linear; search from 0.1 to 0.3",
        "warning: drop_path.rate 0.6 (linear) is far above the range from 0.1 to 0.3",
    ):
        assert line in out
    header, row = (line for line in out.splitlines() if "  profile  " in line or line.startswith("PoolFormer s36"))
    for column in ("profile", "conditions", "source"):
        at = header.index(column)
        assert row[at - 1] == " " and row[at] != " ", "aligned"
    assert "sail-sg/poolformer" in row and "300 epochs" in row


def test_the_next_command_is_the_advised_run(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["data.root=no where", "drop_path={rate: 0.6, profile: [0.5], rate_is: mean}", "optim.epochs=300"]
    out = told(capsys, "--config", POOLFORMER, *given)
    command = next(line for line in out.splitlines() if line.startswith("next "))
    words = shlex.split(command)[1:]
    assert words[:4] == ["python", "train.py", "--config", POOLFORMER]
    config = load_config(words[3], words[4:])
    assert config.data.root == "no where"
    assert (config.drop_path.rate, config.drop_path.profile, config.drop_path.rate_is) == (0.1, "linear", "max")


def test_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(told(capsys, "--json", "optim.epochs=20", "optim.warmup_epochs=1", "drop_path.profile=constant"))
    assert found["rate"] == 0 and found["low"] == 0 < found["high"]
    assert found["facts"]["images"] == 1437 and found["facts"]["purpose"] == "train"
    assert [(r["family"], r["size"]) for r in found["rows"]] == [("convformer", "s18")]
    assert found["published"] is None and any("our inference" in reason for reason in found["reasons"])
    study = found["study"]
    assert study["train"] == "configs/train/digits.yaml"
    assert study["space"] == {"drop_path.rate": {"low": 0, "high": found["high"]}}
    assert study["overrides"] == {"optim.epochs": 20, "optim.warmup_epochs": 1, "drop_path.profile": "constant"}


def test_the_study_can_be_copied(capsys: pytest.CaptureFixture[str]) -> None:
    out = told(capsys, "optim.epochs=20", "augment={hflip: 0, mixup: 0.1}")
    lines = out.partition("in study.yaml:\n")[2].splitlines()
    text = "\n".join(line.removeprefix(" " * 13) for line in lines)
    found = parse_yaml(text).data
    assert found["overrides"] == {"optim.epochs": 20, "augment": {"hflip": 0.0, "mixup": 0.1}}
    assert set(found["space"]) == {"drop_path.rate"}


def test_no_study_where_no_rate_has_an_effect(capsys: pytest.CaptureFixture[str]) -> None:
    out = told(capsys, "freeze={epochs: all}")
    assert "a linear probe" in out and "study.yaml" not in out and "drop_path.rate=0\n" in out


def test_the_number_of_images_can_be_told(capsys: pytest.CaptureFixture[str]) -> None:
    missing = ["--config", "configs/train/mnist5k_timm.yaml", "data={dataset: folder, root: nowhere}"]
    assert "unknown number of training images" in told(capsys, *missing)
    assert "50,000 training images (as given)" in told(capsys, *missing, "--images", "50000")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["optim.epoch=3"], "on the command line: optim.epoch=3: unknown key; did you mean 'optim.epochs'?"),
        (["--config", "configs/train/digit.yaml"], "no such file; did you mean 'digits.yaml'?"),
        (["model.name=poolformer_s13"], "unknown model 'poolformer_s13'; did you mean"),
        (["model.depth=[1, 1]"], "did you mean 'depths'?"),
        (["model.drop_path_rate=0.1"], "has no effect in a training config; did you mean 'drop_path.rate'?"),
        (["drop_path.rate=1.5"], "must be at most 1, got 1.5"),
        (["--images", "0"], "--images: must be at least 1, got 0"),
    ],
)
def test_mistakes(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    err = told(capsys, *argv, code=2)
    assert err.startswith("error: ") and message in err and len(err.splitlines()) <= 3


def test_it_is_a_word_of_tune(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["advise", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["facts"]["model"] == "convformer_n4"
    assert tune.main(["advise", "optim.epoch=3"]) == 2 and "did you mean" in capsys.readouterr().err


def test_other_usage_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--resume"])
    assert caught.value.code == 2 and "tune.py advise" in capsys.readouterr().err
