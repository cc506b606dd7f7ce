"""MC drop-path: masks that belong to the samples, their mean, the rates of the run, and what has no such rates."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from files.errors import ConfigError
from layers.drop_path import DropPath
from models.factory import create_model
from stochastic_depth import set_drop_path
from stochastic_depth.proof import randomise_scales
from tests.stochastic_depth.parts import PlainNet
from tests.training.parts import TINY
from training.config import load_config
from training.evaluating.mc import McDropPath, MonteCarlo, set_rates
from training.evaluating.part import WantedData
from training.evaluating.validation import Compute, Evaluation, Request, validate


def evaluations(folder: Path, mc: MonteCarlo, **data: Any) -> list[Evaluation]:
    return list(validate(Request([str(folder)], data=WantedData(**data), compute=Compute("cpu"), mc=mc)))


def plain_net(rate: float) -> PlainNet:
    torch.manual_seed(0)
    model = PlainNet().eval()
    set_drop_path(model, rate, profile="constant", mode="mask")
    return model


def mean_of(model: nn.Module, images: torch.Tensor, indices: list[int], **wanted: Any) -> torch.Tensor:
    mc = McDropPath(model, MonteCarlo(**wanted))
    ((given, _),) = [(batch[0], batch[1]) for batch in mc.watch([(images, None, torch.tensor(indices))])]
    with torch.no_grad():
        return mc(given).exp()


def test_it_is_the_mean_over_the_states_of_a_chain() -> None:
    """With two blocks alike in rate there are 4 states; over many passes their shares are those of the rates."""
    model, image = plain_net(0.0), torch.randn(1, 3, 8, 8)
    blocks = [b for stage in model.stages for b in stage]  # type: ignore[union-attr]
    with torch.no_grad():
        for block in blocks[:2]:
            block.drop_path.drop_prob = 0.4
            block.fc.weight *= 8
    expected = torch.zeros(1, 5)
    for first in (0, 1):
        for second in (0, 1):
            for block, kept in zip(blocks[:2], (first, second), strict=True):
                block.drop_path.residual = lambda x, branch, _=None, kept=kept: x + kept / 0.6 * branch(x)
            with torch.no_grad():
                share = (0.6 if first else 0.4) * (0.6 if second else 0.4)
                expected += share * model(image).softmax(1)
    for block in blocks[:2]:
        del block.drop_path.residual
    found = mean_of(model, image, [7], passes=2000)
    assert torch.allclose(found, expected, atol=0.015) and torch.allclose(found.sum(), torch.tensor(1.0), atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(found, model(image).softmax(1), atol=0.05), "the test can fail"


def test_masks_depend_on_seed_sample_and_nothing_else() -> None:
    model, images = plain_net(0.5), torch.randn(6, 3, 8, 8)
    state = torch.get_rng_state()
    whole = mean_of(model, images, [0, 1, 2, 3, 4, 5], passes=3)
    assert torch.equal(torch.get_rng_state(), state), "no generator is drawn from"
    parts = torch.cat([mean_of(model, images[i : i + 2], [i, i + 1], passes=3) for i in (0, 2, 4)])
    assert torch.allclose(whole, parts, atol=1e-6)
    assert not torch.allclose(whole, mean_of(model, images, [0, 1, 2, 3, 4, 5], passes=3, seed=1), atol=1e-3)
    assert not torch.allclose(whole, mean_of(model, images, [6, 7, 8, 9, 10, 11], passes=3), atol=1e-3)
    same = mean_of(model, images[:1].expand(6, -1, -1, -1), list(range(6)), passes=1)
    assert len({tuple(row) for row in same.tolist()}) > 1, "each sample has masks of its own"


def test_only_drop_path_is_in_training_and_afterwards_nothing_is() -> None:
    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.norm, self.drop = plain_net(0.5), nn.BatchNorm2d(3), nn.Dropout(0.5)
            self.flags: list[tuple[bool, ...]] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kinds = (nn.BatchNorm2d, nn.Dropout, DropPath)
            self.flags.append(tuple(any(m.training for m in self.modules() if isinstance(m, k)) for k in kinds))
            return self.model(self.drop(self.norm(x)))

    watched, images = Watched().eval(), torch.randn(2, 3, 8, 8)
    before = watched(images)
    mean_of(watched, images, [0, 1], passes=2)
    assert watched.flags == [(False, False, False), (False, False, True), (False, False, True)]
    assert not any(m.training for m in watched.modules()) and torch.equal(watched(images), before)
    assert int(watched.norm.num_batches_tracked or 0) == 0


def test_a_foreign_model_whose_blocks_work_on_windows() -> None:
    torch.manual_seed(0)
    model = create_model("timm/test_vit", num_classes=4).eval()
    randomise_scales(model)
    images = torch.randn(2, 3, 160, 160)
    before = model(images)
    told = set_rates(model, None, MonteCarlo(4, 0.5))
    assert told.rates == tuple(pytest.approx(0.5 * i / (len(told.rates) - 1)) for i in range(len(told.rates)))
    assert torch.equal(model(images), before)
    assert not torch.allclose(mean_of(model, images, [0, 1], passes=4), before.softmax(1), atol=1e-3)


def test_beside_an_evaluation(digits_run: Path) -> None:
    plain, mc = evaluations(digits_run, MonteCarlo(8))
    assert plain.mc is None and mc.mc is not None
    assert mc.mc.rates == (0.0, 0.4) and mc.mc.told == "mean of 8 passes with drop path, rates up to 0.4 (linear)"
    (alone,) = list(validate(Request([str(digits_run)], compute=Compute("cpu"))))
    assert plain.metrics == alone.metrics and torch.equal(plain.per_sample.table, alone.per_sample.table)
    assert (
        mc.metrics["nll"] != plain.metrics["nll"] and mc.samples == plain.samples and mc.name.endswith("(MC drop-path)")
    )
    again = evaluations(digits_run, MonteCarlo(8), batch_size=64, workers=0)[1]
    assert torch.allclose(mc.per_sample.table, again.per_sample.table, atol=1e-5)
    assert evaluations(digits_run, MonteCarlo(1, 0.1))[1].mc.rates == (0.0, 0.1)  # type: ignore[union-attr]


def test_rates_follow_the_run() -> None:
    model = create_model("convformer_n4", in_chans=1, image_size=8, depths=[1, 2])
    run = load_config(None, [*TINY, "drop_path={rate: 0.2, profile: constant, mode: skip}"])
    assert set_rates(model, run, MonteCarlo(1)).rates == (0.2,) * 3
    assert set_rates(model, run, MonteCarlo(1, 0.3)).rates == (0.3,) * 3, "with its profile"
    listed = load_config(None, [*TINY, "drop_path={rate: null, profile: [0.1, 0.0, 0.3]}"])
    assert set_rates(model, listed, MonteCarlo(1)).rates == (0.1, 0.0, 0.3)
    assert set_rates(model, listed, MonteCarlo(1, 0.2)).rates == (0.0, 0.1, 0.2)


@pytest.mark.parametrize(
    ("model", "overrides", "rate", "told"),
    [
        ("convformer_n4", ["drop_path.rate=0"], None, "trained with drop-path rate 0.*give --mc-rate RATE"),
        ("convformer_n4", None, None, "do not say which drop-path rates.*give --mc-rate RATE"),
        ("timm/vgg11", None, 0.1, "VGG has no residual block"),
    ],
)
def test_nothing_to_draw(model: str, overrides: list[str] | None, rate: float | None, told: str) -> None:
    with torch.device("meta"):
        built = create_model(model, num_classes=2)
    run = None if overrides is None else load_config(None, [*TINY, *overrides])
    with pytest.raises(ConfigError, match=rf"--mc: .*{told}"):
        set_rates(built, run, MonteCarlo(1, rate))


@pytest.mark.parametrize(("passes", "rate"), [(0, None), (-1, 0.1), (3, 0.0), (3, 1.0), (3, float("nan"))])
def test_numbers_without_meaning(passes: int, rate: float | None) -> None:
    with pytest.raises(ConfigError, match=r"--mc.*: must be (at least 1 pass|above 0 and below 1)"):
        MonteCarlo(passes, rate)
