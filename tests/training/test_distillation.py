"""Distillation: the loss against its formulas, what the teacher sees, and which teachers are refused."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from files.errors import ConfigError
from layers.fast import FastLinear
from models.factory import create_model, saved_config
from models.weights import save_weights, weights_sha256
from tests.training.parts import TINY, build_tiny, first_batches, step, weights
from training.config import load_config
from training.distillation import Distillation, NoTeacher
from training.recipe import DistillSection
from training.report import page
from training.run import run

LOGITS = torch.tensor([[1.0, 2.0, 0.0], [0.5, -1.0, 0.3]])
OPINION = torch.tensor([[3.0, 0.0, 1.0], [0.0, 0.0, 2.0]])
TARGETS = torch.tensor([0, 2])


class Fixed(nn.Module):
    """A teacher with one opinion; keeps what it was shown."""

    def __init__(self, **cfg: Any) -> None:
        super().__init__()
        self.opinion = nn.Parameter(OPINION.clone())
        self.pretrained_cfg = {"input_size": (3, 4, 4), "mean": (0.0,) * 3, "std": (1.0,) * 3} | cfg

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training and not torch.is_grad_enabled()
        self.seen = images
        return self.opinion


def distillation(teacher: nn.Module | None = None, cfg: dict[str, Any] | None = None, **settings: Any) -> Distillation:
    section = DistillSection.model_validate({"teacher": "some", **settings})
    cfg = cfg or {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    return Distillation(section, teacher or Fixed(), cfg, contextlib.nullcontext())


def test_soft_is_the_divergence_at_a_temperature_times_its_square() -> None:
    images, loss = torch.zeros(2, 3, 4, 4), nn.CrossEntropyLoss()
    own, theirs = (LOGITS / 2).softmax(1), (OPINION / 2).softmax(1)
    divergence = (theirs * (theirs / own).log()).sum() / 2  # a mean over images
    expected = 0.7 * F.cross_entropy(LOGITS, TARGETS) + 0.3 * 4 * divergence
    found = distillation(alpha=0.3, temperature=2.0)(loss, images, LOGITS, TARGETS)
    torch.testing.assert_close(found, expected)


def test_hard_is_the_class_that_the_teacher_gives() -> None:
    found = distillation(alpha=1.0, kind="hard")(nn.CrossEntropyLoss(), torch.zeros(2, 3, 4, 4), LOGITS, TARGETS)
    torch.testing.assert_close(found, F.cross_entropy(LOGITS, torch.tensor([0, 2])))


def test_no_gradient_reaches_the_teacher() -> None:
    teacher, logits = Fixed().train(), LOGITS.clone().requires_grad_()
    distillation(teacher)(nn.CrossEntropyLoss(), torch.zeros(2, 3, 4, 4), logits, TARGETS).backward()
    assert logits.grad is not None and teacher.opinion.grad is None


def test_without_a_teacher_the_loss_is_as_it_is() -> None:
    found = NoTeacher()(nn.CrossEntropyLoss(), torch.zeros(1), LOGITS, TARGETS)
    assert torch.equal(found, F.cross_entropy(LOGITS, TARGETS)) and NoTeacher().describe() == ""


def test_the_teacher_sees_images_in_its_own_normalisation_and_size() -> None:
    pixels = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    ours = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    theirs = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}

    def normalised(images: Tensor, cfg: dict[str, Any]) -> Tensor:
        mean, std = (torch.tensor(cfg[key]).reshape(-1, 1, 1) for key in ("mean", "std"))
        return (images - mean) / std

    teacher = Fixed(**theirs)
    distillation(teacher, ours)(nn.CrossEntropyLoss(), normalised(pixels, ours), LOGITS, TARGETS)
    torch.testing.assert_close(teacher.seen, normalised(pixels, theirs))
    larger = Fixed(**theirs, input_size=(3, 8, 8))
    distillation(larger, ours)(nn.CrossEntropyLoss(), normalised(pixels, ours), LOGITS, TARGETS)
    assert larger.seen.shape == (2, 3, 8, 8)
    grey = Fixed(**theirs)
    one = {"mean": (0.5,), "std": (0.2,)}
    distillation(grey, one)(nn.CrossEntropyLoss(), normalised(pixels[:, :1], one), LOGITS, TARGETS)
    torch.testing.assert_close(grey.seen, normalised(pixels[:, :1].expand(-1, 3, -1, -1), theirs))


def test_the_same_images_and_normalisation_pass_unchanged() -> None:
    teacher, images = Fixed(), torch.rand(2, 3, 4, 4)
    distillation(teacher)(nn.CrossEntropyLoss(), images, LOGITS, TARGETS)
    assert torch.equal(teacher.seen, images)


# ---- teachers -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose best weights teach."""
    folder = tmp_path_factory.mktemp("taught") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "write_report", lambda _: None)
        run(load_config(None, [*TINY, "optim.epochs=1", "optim.warmup_epochs=0", "seed=7"]), folder)
    return folder


def save(folder: Path, name: str, **options: Any) -> Path:
    model = create_model(name, **options)
    if "class_names" not in options:
        model.pretrained_cfg.pop("label_names", None)
    save_weights(folder, model.state_dict(), saved_config(model))
    return folder


def test_a_run_its_best_folder_and_a_name_with_weights_teach_the_same(taught: Path) -> None:
    ways = [f"{{teacher: {taught}}}", f"{{teacher: {taught}/best}}"]
    setups = [build_tiny(f"distill={way}") for way in ways]
    hashes = {(setup.distillation.identity or {})["weights_sha256"] for setup in setups}
    assert len(hashes) == 1 and weights(setups[0]) == weights(build_tiny()), "the student's weights are as without"
    batch = first_batches(setups[0])
    plain, with_teacher = step(build_tiny(), batch), step(setups[0], batch)
    assert plain != with_teacher
    assert "teacher   " in setups[0].distillation.describe() and "temperature 1" in setups[0].distillation.describe()
    assert not any("teacher" in key for key in setups[0].model.state_dict())


def test_a_teacher_of_timm(tmp_path: Path) -> None:
    folder = save(tmp_path / "t", "timm/resnet10t", num_classes=10, in_chans=3, image_size=32)
    setup = build_tiny(f"distill={{teacher: {folder}, kind: hard}}", "data.batch_size=8")
    assert isinstance(setup.distillation, Distillation) and list(setup.distillation.size) == [32, 32]
    assert isinstance(setup.distillation.teacher.get_submodule("fc"), FastLinear), "it takes the fast paths too"
    step(setup, first_batches(setup))
    assert weights_sha256(setup.distillation.teacher.state_dict()) == setup.distillation.identity["weights_sha256"]  # pyright: ignore[reportOptionalSubscript]


def test_mistakes_with_teachers(taught: Path, tmp_path: Path) -> None:
    seven = save(tmp_path / "seven", "convformer_n4", num_classes=7, in_chans=1, image_size=8)
    other = save(tmp_path / "other", "convformer_n4", in_chans=1, image_size=8, class_names=list("abcdefghij"))
    bare = tmp_path / "bare" / "model.safetensors"
    bare.parent.mkdir()
    shutil.copy(taught / "best" / "model.safetensors", bare)
    cases = {
        "{teacher: caformer_n4}": "caformer_n4 is no file or folder, and as a model's name it needs weights",
        "{teacher: caformer_n5, pretrained: true}": "did you mean 'caformer_n4'",
        f"{{teacher: {taught}, pretrained: true}}": "has weights; leave out pretrained and checkpoint",
        f"{{teacher: {seven}}}": "has 7 classes, this run 10; fine-tune the teacher",
        f"{{teacher: {other}}}": "was trained on other classes: classes gone: 'a'",
        f"{{teacher: {bare}}}": "does not say of which model it is; give its name, and distill.checkpoint=",
        "{kind: hard}": "has no effect without distill.teacher",
        "{teacher: x, kind: hard, temperature: 2}": "no effect with kind 'hard'",
        "{teacher: x, alpha: 0}": "greater than 0",
        "{teacher: x, pretrained: true, checkpoint: y}": "two sources of weights",
    }
    for given, message in cases.items():
        with pytest.raises(ConfigError) as caught:
            build_tiny(f"distill={given}")
        assert message in str(caught.value) and len(str(caught.value).splitlines()) <= 3, given


def test_the_channels_of_teacher_and_student_differ(tmp_path: Path) -> None:
    grey = save(tmp_path / "grey", "convformer_n4", num_classes=10, in_chans=1, image_size=8)
    with pytest.raises(ConfigError, match="takes 1 channels, this run's images have 3"):
        build_tiny(f"distill={{teacher: {grey}}}", "model.in_chans=3")


def test_a_run_goes_on_with_the_same_teacher_only(taught: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(page, "write_report", lambda _: None)
    settings = [*TINY, "optim.epochs=1", "optim.warmup_epochs=0"]
    summary = run(load_config(None, [*settings, f"distill.teacher={taught}"]), tmp_path / "run")
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert set(environment["teacher"]) == {"name", "weights_sha256"}
    moved = tmp_path / "moved"
    shutil.copytree(taught / "best", moved)
    again = run(load_config(None, [*settings, f"distill.teacher={moved}"]), tmp_path / "run", resume=tmp_path / "run")
    assert again["weights_sha256"] == summary["weights_sha256"], "the same weights elsewhere"
    other = save(tmp_path / "other", "convformer_n4", num_classes=10, in_chans=1, image_size=8)
    for given, now in ((f"distill.teacher={other}", "is now .*other with weights"), ("seed=0", "is now none")):
        with pytest.raises(ConfigError, match=rf"--resume: distill\.teacher was .*{now}"):
            run(load_config(None, [*settings, given]), tmp_path / "run", resume=tmp_path / "run")
