"""The rate of a run that names none: of training, or of fine-tuning where it starts from weights; and the reason is said."""

from pathlib import Path

import pytest

from models.factory import create_model, model_facts, saved_config
from models.weights import save_weights
from tests.training.parts import WORLD, build_tiny
from training.config import DropPathSection, ModelSection, dump_config, load_config
from training.default_rate import with_default_rate
from training.setup import build, describe

SMALL = "depths: [1, 1, 1, 1], dims: [8, 8, 16, 16], head_dim: 8, image_size: 32"


def rate_of(name: str, **model) -> tuple[float | None, str]:
    facts = model_facts(name)
    section, words = with_default_rate(DropPathSection(), ModelSection(name=name, **model), facts)
    return section.rate, words


@pytest.mark.parametrize(
    ("name", "model", "rate", "words"),
    [
        ("caformer_s18", {}, 0.15, "0.15 by default: published for training it;"),
        ("caformer_s18", {"pretrained": True}, 0.3, "0.3 by default: published for fine-tuning it"),
        ("caformer_s18", {"checkpoint": "x"}, 0.3, "0.3 by default: published for fine-tuning it"),
        ("convformer_b36", {"checkpoint": "x"}, 0.8, "published for fine-tuning it"),
        ("caformer_s18.sail_in1k_384", {"pretrained": True}, 0.3, "published for training it"),
        ("poolformer_s36", {"pretrained": True}, 0.2, "for fine-tuning it none is known"),
        ("convformer_n4", {"checkpoint": "x"}, 0.0, "0 by default: none is published for this model"),
        ("timm/convnext_atto", {"checkpoint": "x"}, 0.0, "none is published"),
        ("torchvision/resnet18", {}, 0.0, "none is published"),
    ],
)
def test_what_is_published_for_such_a_run(name: str, model: dict, rate: float, words: str) -> None:
    found, said = rate_of(name, **model)
    assert found == rate and words in said and "drop_path.rate says another" in said


@pytest.mark.parametrize("given", [{"rate": 0.0}, {"rate": 0.2}, {"profile": [0.1, 0.2]}])
def test_what_was_given_stays(given: dict) -> None:
    section = DropPathSection.model_validate(given)
    model = ModelSection(name="caformer_s18", pretrained=True)
    assert with_default_rate(section, model, model_facts("caformer_s18")) == (section, "")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Of a small caformer_s18 of 5 classes, as a run would leave them."""
    model = create_model("caformer_s18", num_classes=5, in_chans=1, depths=[1] * 4, dims=[8, 8, 16, 16], head_dim=8,
                         image_size=32)  # fmt: skip
    save_weights(tmp_path / "best", model.state_dict(), saved_config(model))
    return tmp_path / "best"


def test_a_run_from_weights_has_the_rate_of_fine_tuning_and_says_so(weights: Path) -> None:
    model = f"model={{name: caformer_s18, {SMALL}, in_chans: 1"
    scratch = build_tiny(f"{model}}}", "drop_path.rate=null")
    assert scratch.config.drop_path.rate == 0.15
    assert "rate      0.15 by default: published for training it" in describe(scratch)
    tuned = build_tiny(f"{model}, checkpoint: {weights}}}", "drop_path.rate=null")
    assert tuned.config.drop_path.rate == 0.3 == max(tuned.depth.rates)
    assert "rate      0.3 by default: published for fine-tuning it" in describe(tuned)
    assert "by default" not in describe(build_tiny(f"{model}, checkpoint: {weights}}}", "drop_path.rate=0.1"))


def test_a_resumed_run_has_the_rate_it_began_with(weights: Path, tmp_path: Path) -> None:
    """The weights are not loaded again then; the rate is the same from the run's file and from its own config."""
    overrides = [f"model={{name: caformer_s18, {SMALL}, in_chans: 1, checkpoint: {weights}}}", "drop_path.rate=null"]
    begun = build_tiny(*overrides)
    again = build(begun.config.model_copy(), WORLD, load_checkpoint=False)
    assert again.config.drop_path == begun.config.drop_path
    (tmp_path / "config.yaml").write_text(dump_config(begun.config))
    assert load_config(tmp_path / "config.yaml").drop_path.rate == 0.3
