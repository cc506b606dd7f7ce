"""What the report shows of data and predictions: counts against those of a plain loop, pictures against training's."""

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.data.parts import write_image
from tests.training.parts import build_tiny, plain_ece
from training.console import StopSignals
from training.evaluating import evidence
from training.evaluating.evidence import MOST_OF_BATCH, measure
from training.setup import Setup


def pixels(address: str) -> np.ndarray:
    head, _, content = address.partition(",")
    assert head in ("data:image/png;base64", "data:image/jpeg;base64")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


def measured(setup: Setup) -> dict[str, Any]:
    found = measure(setup, signals=StopSignals())
    assert found is not None
    return json.loads(json.dumps(found))


def test_pairs_and_bins_are_those_of_a_plain_loop() -> None:
    setup = build_tiny()
    found = measured(setup)
    val = setup.data.val
    images = setup.to_device(torch.stack([val[i][0] for i in range(len(val))]))
    with torch.no_grad():
        logits = setup.model.eval()(images)
    predicted = logits.argmax(1).tolist()
    counts: dict[tuple[int, int], int] = {}
    for pair in zip(val.targets, predicted, strict=True):
        counts[pair] = counts.get(pair, 0) + 1
    assert {(label, prediction): count for label, prediction, count in found["pairs"]} == counts
    samples, hits, confidences = torch.tensor(found["bins"], dtype=torch.float64).T
    assert ((hits - confidences).abs().sum() / samples.sum()).item() == pytest.approx(
        plain_ece(logits, torch.tensor(val.targets)), abs=1e-6
    )
    assert found["samples"] == 360 and found["classes"] == [str(i) for i in range(10)] and found["notes"] == []
    first = found["mistakes"][0]
    assert first["label"] != first["prediction"] and 0 < first["probability"] <= 1
    assert pixels(first["image"]).shape == (8, 8)


@pytest.mark.parametrize(
    "mixing",
    [
        ["augment.mixup=0.8"],
        ["augment.cutmix=1.0", "augment.random_erasing=0.5", "data.batch_size=33"],
        ["augment.mixup=0.4", "augment.cutmix=1.0"],
        [],
    ],
)
def test_the_batch_is_what_training_saw_at_its_first_step(mixing: list[str]) -> None:
    setup = build_tiny(*mixing)
    found = measured(setup)["batch"]
    setup.sampler.set_position(0, 0)
    images, targets, indices = next(iter(setup.train_loader))
    images = setup.data.erase(setup.to_device(images), indices, epoch=0, batch=0)
    images, targets = setup.mixer(images, targets, 0, epoch=0)
    even, half = len(images) // 2 * 2, MOST_OF_BATCH // 2
    rows = [*range(half), *range(even - half, even)]
    cfg = setup.model.pretrained_cfg
    seen = (images[rows, 0] * cfg["std"][0] + cfg["mean"][0]).clamp(0, 1).mul(255).round().byte().numpy()
    assert len(found) == MOST_OF_BATCH
    for row, each in zip(seen, found, strict=True):
        assert np.array_equal(pixels(each["image"]), row)
    for i, each in zip(rows, found, strict=True):
        if not mixing:
            assert each["labels"] == [[str(int(targets[i])), 1]]
            continue
        excess = targets[i] - 0.1 / 10  # without the smoothing's share
        shares = {str(c): float(excess[c] / excess.sum()) for c in range(10) if excess[c] > 0.005}
        assert dict(map(tuple, each["labels"])) == pytest.approx(shares, abs=1e-3)


def test_nothing_moves() -> None:
    setup = build_tiny("augment.mixup=0.5")
    setup.model.train()
    weights = {name: tensor.clone() for name, tensor in setup.model.state_dict().items()}
    before = torch.random.get_rng_state(), np.random.get_state(legacy=False)
    counts = [m.samples_seen for block in setup.depth.blocks for m in block.drop_paths.values()]
    measured(setup)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert str(before[1]) == str(np.random.get_state(legacy=False))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in setup.model.state_dict().items())
    assert counts == [m.samples_seen for block in setup.depth.blocks for m in block.drop_paths.values()]
    assert setup.model.training


def test_photos_are_small_jpegs_and_names_may_be_any_bytes(tmp_path) -> None:
    for part, count in (("train", 4), ("val", 2)):
        for name in ("cat", "dog"):
            for i in range(count):
                write_image(tmp_path / part / name / f"{i}\udcff.png", size=(300, 280), seed=i)
    setup = build_tiny(f"data.root={tmp_path}", "data.dataset=folder", "data.batch_size=4", "model.in_chans=3",
                       "model.image_size=224", "augment.rotate=0")  # fmt: skip
    found = measured(setup)
    assert [pixels(each["image"]).shape for each in found["batch"]] == [(112, 112, 3)] * 4
    assert found["mistakes"] and found["mistakes"][0]["name"].endswith("\ufffd.png")
    assert sum(len(each["image"]) for each in found["batch"]) < 40_000


def test_pictures_that_cannot_be_made_cost_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("encoder error")

    monkeypatch.setattr(evidence, "_picture", fail)
    found = measured(build_tiny())
    assert found["mistakes"] == found["batch"] == [] and sum(count for *_, count in found["pairs"]) == 360
    assert found["notes"] == [
        "Pictures of mistakes cannot be shown: encoder error",
        "Pictures of the training batch cannot be shown: encoder error",
    ]


def test_logits_without_a_class() -> None:
    found = measured(build_tiny("model.num_classes=12"))
    assert found["classes"][-3:] == ["9", "unnamed 10", "unnamed 11"]


def test_a_signal_ends_it() -> None:
    signals = StopSignals()
    signals.ask("SIGTERM")
    assert measure(build_tiny(), signals=signals) is None


def test_a_model_without_finite_outputs_has_no_predictions() -> None:
    setup = build_tiny()
    with torch.no_grad():
        for parameter in setup.model.parameters():
            parameter.fill_(float("nan"))
    found = measured(setup)
    assert found["samples"] == 360 and found["pairs"] == [] and found["mistakes"] == []
    assert not torch.tensor(found["bins"]).any()
