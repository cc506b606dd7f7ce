"""An evaluation gives what the run's own validation gave, and what timm gives by hand."""

import csv
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from timm.data import create_transform

from files.errors import ConfigError, Failure
from models.factory import create_model
from models.weights import load_weights, save_weights
from tests.training.data.parts import write_image
from tests.training.evaluating.conftest import FLOWERS
from tests.training.parts import TINY
from training.config import load_config
from training.evaluating.corruptions import Corruption
from training.evaluating.part import WantedData
from training.evaluating.subject import Choice
from training.evaluating.validation import Compute, Evaluated, Evaluation, Request, validate
from training.run import run

CPU = Compute(device="cpu")


def evaluations(*models: Path | str, **request: Any) -> list[Evaluation]:
    return list(validate(Request([str(m) for m in models], **{"compute": CPU, **request})))


def one(*models: Path | str, **request: Any) -> Evaluation:
    (found,) = evaluations(*models, **request)
    return found


def by_hand(weights: Path, photos: Path, *, flip: bool = False) -> tuple[torch.Tensor, list[int]]:
    """Probabilities of all photos by timm's own transform and model, one by one; and their classes."""
    model = create_model("timm/test_resnet", checkpoint=weights, num_classes=3, image_size=32, crop_pct=0.8).eval()
    cfg = model.pretrained_cfg
    transform: Any = create_transform(
        32, is_training=False, crop_pct=0.8, interpolation=cfg["interpolation"], mean=cfg["mean"], std=cfg["std"]
    )
    paths = sorted(photos.rglob("*.png"))
    with torch.no_grad():
        images = torch.stack([transform(Image.open(path)) for path in paths])
        probabilities = model(images).softmax(1)
        if flip:
            probabilities = (probabilities + model(images.flip(3)).softmax(1)) / 2
    return probabilities, [FLOWERS.index(path.parent.name) for path in paths]


@pytest.mark.parametrize("flip", [False, True])
def test_equals_timm_by_hand(flip: bool, timm_weights: Path, photos: Path) -> None:
    found = one(timm_weights, data=WantedData(images=photos, batch_size=5, workers=0), flip=flip)
    probabilities, labels = by_hand(timm_weights, photos, flip=flip)
    rows = range(len(labels))
    seen, prediction, top, of_label = found.per_sample.table.float().T
    assert seen.sum() == 12 and prediction.tolist() == probabilities.argmax(1).tolist()
    assert torch.allclose(top, probabilities.max(1).values, atol=2e-5)
    assert torch.allclose(of_label, probabilities[rows, labels], atol=2e-5)
    hits = (probabilities.argmax(1) == torch.tensor(labels)).sum().item()
    assert found.metrics["top1"] == pytest.approx(100 * hits / 12)
    assert found.metrics["nll"] == pytest.approx(-probabilities[rows, labels].log().mean().item(), abs=1e-5)
    plain, _ = by_hand(timm_weights, photos)
    assert torch.allclose(plain, probabilities) != flip, "the mirror image changes something"


def test_equals_the_runs_own_validation(digits_run: Path) -> None:
    with (digits_run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    best = max(rows, key=lambda row: float(row["val_top1"]))  # the first of equal ones, as the run keeps it
    for choice, row in ((Choice(), best), (Choice(checkpoint="last"), rows[-1])):
        metrics = one(digits_run, choice=choice).metrics
        for column in ("top1", "top5", "macro_f1"):
            assert f"{metrics[column]:.8g}" == row[f"val_{column}"], column
        assert f"{metrics['nll']:.8g}" == row["val_loss"]
    assert one(digits_run, choice=Choice(ema=False)).metrics["nll"] != metrics["nll"]


def test_batches_and_workers_change_nothing(digits_run: Path) -> None:
    found = [one(digits_run, data=WantedData(batch_size=b, workers=w)) for b, w in ((360, 0), (97, 1))]
    assert torch.allclose(found[0].per_sample.table, found[1].per_sample.table, atol=1e-5)


def test_a_part_of_the_models_classes_is_matched_by_name(timm_weights: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "some").mkdir()
    for name in ("tulip", "daisy"):
        (tmp_path / "some" / name).symlink_to(photos / name)
    found = one(timm_weights, data=WantedData(images=tmp_path / "some", workers=0))
    assert found.part.class_names == ["daisy", "tulip"] == found.logit_names
    assert any("2 of the model's 3 classes" in note for note in found.notes)
    probabilities, _ = by_hand(timm_weights, photos)
    expected = probabilities[4:, 1:] / probabilities[4:, 1:].sum(1, keepdim=True)
    assert torch.allclose(found.per_sample.table[:, 2].float(), expected.max(1).values, atol=2e-5)


def test_names_that_differ_are_refused(timm_weights: Path, tmp_path: Path) -> None:
    for name in ("aster", "rose"):
        write_image(tmp_path / name / "0.png")
    with pytest.raises(ConfigError, match="classes that the weights do not know: 'rose'"):
        one(timm_weights, data=WantedData(images=tmp_path))


def test_an_image_that_cannot_be_read(timm_weights: Path, photos: Path, tmp_path: Path) -> None:
    for name in FLOWERS:
        for i, path in enumerate(sorted((photos / name).iterdir())):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{i}.png").write_bytes(path.read_bytes()[: 50 if (name, i) == ("daisy", 1) else None])
    with pytest.raises(Failure) as caught:
        one(timm_weights, data=WantedData(images=tmp_path, workers=0))
    assert "daisy/1.png" in str(caught.value) and "data.on_error=skip" in str(caught.value)
    found = one(timm_weights, data=WantedData(images=tmp_path, workers=0, overrides=["data.on_error=skip"]))
    whole = one(timm_weights, data=WantedData(images=photos, workers=0))
    assert (found.samples, found.skipped, found.predictions.samples.tolist()) == (11, 1, [4, 3, 4])
    kept = [i for i in range(12) if i != 5]
    assert torch.allclose(found.per_sample.table[kept], whole.per_sample.table[kept], atol=2e-5)


def test_several_models_and_corruptions(digits_run: Path, tmp_path: Path) -> None:
    state, saved = load_weights(digits_run / "best")
    save_weights(tmp_path / "best", state, {k: v for k, v in (saved or {}).items() if not k.endswith("sha256")})
    bad = [Corruption("contrast", 5), Corruption("gaussian_noise", 1)]
    data = WantedData(overrides=["data.dataset=digits", "data.workers=0"])
    found = evaluations(digits_run, tmp_path / "best", data=data, corruptions=bad)
    assert [e.name.rpartition("/")[2] for e in found] == [f"{m} ({c})" for m in ("digits", "best") for c in bad]
    assert torch.equal(found[1].per_sample.table, found[3].per_sample.table), "the same noise for both"
    clean = one(digits_run)
    assert found[0].metrics["nll"] > clean.metrics["nll"]


def test_a_mistake_in_the_last_model_is_found_before_the_first_is_measured(
    digits_run: Path, timm_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.evaluating.validation.evaluate_each", lambda *_, **__: pytest.fail("too early"))
    with pytest.raises(ConfigError, match="classes that the weights do not know"):
        evaluations(digits_run, timm_weights, data=WantedData(overrides=["data.dataset=digits"]))
    assert logging.root.manager.disable == logging.NOTSET


def test_precision_and_device(digits_run: Path) -> None:
    found = one(digits_run, compute=Compute("cpu", "bfloat16"))
    assert found.precision == "bfloat16"
    assert found.metrics["nll"] == pytest.approx(one(digits_run).metrics["nll"], abs=0.05)
    for compute, told in (
        (Compute("cpu", "float16"), "float16 needs a GPU"),
        (Compute("cdua"), "did you mean 'cuda'?"),
    ):
        with pytest.raises(ConfigError) as caught:
            one(digits_run, compute=compute)
        assert told in str(caught.value)


def test_the_figures_of_a_run_in_bfloat16_are_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    settings = ["runtime.precision=auto", "log.report=false", "optim.epochs=1", "optim.warmup_epochs=0"]
    run(load_config(None, [*TINY, *settings]), tmp_path)
    found, plain = one(tmp_path), one(tmp_path, compute=Compute("cpu", "float32"))
    with (tmp_path / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert found.precision == "bfloat16" and plain.precision == "float32"
    for name in ("top1", "macro_f1"):
        assert f"{found.metrics[name]:.8g}" == row[f"val_{name}"]
    assert f"{found.metrics['nll']:.8g}" == row["val_loss"]
    assert plain.metrics["nll"] != found.metrics["nll"]


def test_the_mean_of_probabilities_stays_one(digits_run: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
    images = torch.randn(4, 3, 2, 2)
    mean = Evaluated(model, flip=True)(images).exp()
    expected = (model(images).softmax(1) + model(images.flip(3)).softmax(1)) / 2
    assert torch.allclose(mean, expected, atol=2e-5) and torch.allclose(mean.sum(1), torch.ones(4))
    picked = Evaluated(model, columns=[3, 1])(images)
    assert torch.equal(picked, model(images)[:, [3, 1]])
