"""The classes of images: which paths, in which order, and what the model says of them."""

import shutil
from pathlib import Path

import pytest
import torch

from files.errors import ConfigError
from layers.fast import FastLinear
from tests.training.data.parts import write_image
from tests.training.evaluating.conftest import FLOWERS
from tests.training.evaluating.test_validation import by_hand
from training.evaluating.prediction import NoPrediction, Prediction, Predictor, PredictRequest, find_images
from training.evaluating.subject import Choice
from training.evaluating.validation import Compute


def predictor(model: Path | str, *paths: Path | str, stdin: tuple[str, ...] = (), **request) -> Predictor:
    request = {"compute": Compute("cpu"), "workers": 0, **request}
    return Predictor(PredictRequest(str(model), [str(path) for path in paths], **request), stdin)


@pytest.mark.parametrize(("batch_size", "workers"), [(64, 0), (5, 0), (5, 1)])
@pytest.mark.parametrize("flip", [False, True])
def test_equals_timm_by_hand(batch_size: int, workers: int, flip: bool, timm_weights: Path, photos: Path) -> None:
    if workers and flip:
        return
    found = list(predictor(timm_weights, photos, batch_size=batch_size, workers=workers, flip=flip).predictions())
    probabilities, _ = by_hand(timm_weights, photos, flip=flip)
    assert [p.path for p in found] == [str(path) for path in sorted(photos.rglob("*.png"))]
    for row, expected in zip(found, probabilities, strict=True):
        assert isinstance(row, Prediction)
        order = expected.argsort(descending=True)
        assert row.classes == [FLOWERS[i] for i in order] and sum(row.probabilities) == pytest.approx(1, abs=1e-5)
        assert row.probabilities == pytest.approx(expected[order].tolist(), abs=2e-5)


def test_paths_in_the_order_given(photos: Path, tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "deep/er/c.webp", ".hidden.png", ".git/x.png", "__MACOSX/y.png"):
        write_image(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    below = [str(tmp_path / name) for name in ("a.jpg", "b.PNG", "deep/er/c.webp")]
    assert find_images([str(tmp_path)]) == below
    given = [str(photos / "aster" / "1.png"), "-", str(tmp_path), str(tmp_path / "notes.txt")]
    assert find_images(given, ["x y.png\n", "\n", "z\r\n"]) == [given[0], "x y.png", "z", *below, given[3]]


@pytest.mark.parametrize(
    ("given", "stdin", "told"),
    [
        (["nowhere.png"], [], "nowhere.png: no such file or folder"),
        (["EMPTY"], [], "has no images"),
        (["-"], [], "standard input has no paths"),
        (["-"], ["\n", " \n"], "standard input has no paths"),
        ([], [], "which images?"),
    ],
)
def test_paths_that_are_none(given: list[str], stdin: list[str], told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told.replace("?", r"\?")):
        find_images([str(tmp_path) if path == "EMPTY" else path for path in given], stdin)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_cannot_be_read_is_named_in_its_place(
    workers: int, timm_weights: Path, photos: Path, tmp_path: Path
) -> None:
    good = shutil.copy(photos / "aster" / "0.png", tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes(Path(good).read_bytes()[:60])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    paths = [str(tmp_path / name) for name in ("text.png", "good.png", "gone.png", "cut.png", "good.png", "empty.png")]
    found = list(predictor(timm_weights, "-", stdin=tuple(paths), batch_size=4, workers=workers).predictions())
    assert [row.path for row in found] == paths
    assert [isinstance(row, Prediction) for row in found] == [False, True, False, False, True, False]
    reasons = [row.reason for row in found if isinstance(row, NoPrediction)]
    assert "no format that Pillow reads" in reasons[0] and reasons[1] == "No such file or directory"


def test_outputs_that_are_not_finite_are_no_prediction(timm_weights: Path, photos: Path) -> None:
    ready = predictor(timm_weights, photos / "aster")
    with torch.no_grad():
        for parameter in ready.model.parameters():
            parameter.fill_(float("nan"))
    rows = list(ready.predictions())
    assert rows and all(isinstance(row, NoPrediction) and "not finite" in row.reason for row in rows)


def test_more_classes_than_there_are(timm_weights: Path, photos: Path) -> None:
    plan = predictor(timm_weights, photos, topk=9).plan
    assert plan.topk == 3 and plan.class_names == FLOWERS and "--topk 9: the model has 3 classes" in plan.notes[0]
    assert predictor(timm_weights, photos, topk=2).plan.notes == []


def test_a_batch_larger_than_any(timm_weights: Path, photos: Path) -> None:
    assert len(list(predictor(timm_weights, photos / "aster", batch_size=10**30).predictions())) == 4


def test_a_model_without_names(photos: Path) -> None:
    made = predictor("timm/test_resnet", photos / "aster", topk=1, choice=Choice(image_size=32))
    assert "numbers stand for them" in made.plan.notes[0]
    assert any(isinstance(module, FastLinear) for module in made.model.modules()), "it takes the fast paths"
    assert all(row.classes[0].isdecimal() for row in made.predictions() if isinstance(row, Prediction))


def test_a_run_takes_grey_images(digits_run: Path, photos: Path) -> None:
    rows = list(predictor(digits_run, photos / "aster").predictions())
    assert all(isinstance(row, Prediction) and len(row.classes) == 5 for row in rows) and len(rows) == 4


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        ({"topk": 0}, "--topk: must be at least 1, got 0"),
        ({"topk": -3}, "--topk: must be at least 1, got -3"),
        ({"batch_size": 0}, "--batch-size: must be at least 1"),
        ({"workers": -1}, "--workers: must be at least 0"),
        ({"compute": Compute("cdua")}, "did you mean 'cuda'"),
        ({"compute": Compute("cpu", "float16")}, "float16 needs a GPU"),
        ({"choice": Choice(image_size=3)}, "takes no images|Sizes|size"),
    ],
)
def test_mistakes(request_: dict, told: str, timm_weights: Path, photos: Path) -> None:
    model = "torchvision/squeezenet1_1" if "choice" in request_ else timm_weights
    with pytest.raises(ConfigError, match=told):
        predictor(model, photos, **request_)


def test_many_paths_are_not_held_as_images(timm_weights: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows come before the last image is opened."""
    opened: list[int] = []
    from training.evaluating import prediction

    real = prediction.Paths.open
    monkeypatch.setattr(prediction.Paths, "open", lambda self, i: (opened.append(i), real(self, i))[1])
    path = str(photos / "aster" / "0.png")
    rows = predictor(timm_weights, "-", stdin=(path,) * 40, batch_size=4).predictions()
    next(rows)
    assert len(opened) == 4
    assert len(list(rows)) == 39 and torch.is_grad_enabled()
