"""Settings on a page: against the defaults, between runs, and the command to repeat."""

import json
import shlex
from pathlib import Path

from training.report.runs import read_run
from training.report.settings import between, command_to_repeat, flat, from_defaults


def test_what_differs_from_the_defaults(run: Path, config_text: str) -> None:
    more = "runtime: {tf32: true, compile: true}\naugment: {cutmix: 1.0}\nfuture: {key: 3}\n"
    (run / "config.yaml").write_text(
        config_text.replace("num_classes: 10", "num_classes: 10, act: relu, norm: batch_norm") + more
    )
    told = {each.key: each.values for each in from_defaults(read_run(run))}
    assert told["model.name"] == ["poolformer_s12", "\u2013"] and told["optim.epochs"] == ["4", "300"]
    assert told["model.act"] == ["relu", "gelu"] and told["model.norm"][0] == "batch_norm"
    assert told["runtime.compile"] == ["true", "false"] and told["augment.cutmix"] == ["1.0", "0.0"]
    assert told["drop_path.schedule.kind"] == ["ramp", "constant"] and told["future.key"] == ["3", "\u2013"]
    assert not {"runtime.tf32", "seed", "drop_path.profile", "drop_path.break_even", "drop_path.break_even.mlp"} & set(
        told
    )


def test_a_model_that_is_not_known_here_shows_no_keys_of_its_own(run: Path, config_text: str) -> None:
    for name in ("nowhere.yaml", "timm/nothing", "3"):
        (run / "config.yaml").write_text(config_text.replace("poolformer_s12, num", f"{name}, act: relu, num"))
        assert "model.act" not in {each.key for each in from_defaults(read_run(run))}


def test_what_differs_between_runs(tmp_path: Path, make_run, config_text: str) -> None:
    other = config_text.replace("rate: 0.3", "rate: 0.1").replace("epochs: 4", "epochs: 4, lr: 0.01")
    runs = [read_run(make_run(tmp_path / "a")), read_run(make_run(tmp_path / "b", config=other))]
    assert [(each.key, each.values) for each in between(runs)] == [
        ("drop_path.rate", ["0.3", "0.1"]),
        ("optim.lr", ["\u2013", "0.01"]),
    ]
    assert between([runs[0], runs[0]]) == []


def test_long_lists_are_counted() -> None:
    assert flat({"a": {"b": [1, 2]}, "c": {}}) == {"a.b": [1, 2], "c": {}}


def test_the_command_repeats_the_run(tmp_path: Path, make_run) -> None:
    run = make_run(tmp_path / "my run")
    words = shlex.split(command_to_repeat(read_run(run)))
    assert words == ["python", "train.py", "--config", str(run / "config.yaml"), "--output", f"{run}-again"]
    (run / "environment.json").write_text(json.dumps({"processes": 4}))
    assert command_to_repeat(read_run(run)).startswith("torchrun --nproc-per-node 4 train.py --config ")
