"""Profiles at an equal mean rate: the candidate's rates, what is compared, and that a run is made once."""

import itertools
import json
import statistics
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmark import main, parse_args
from benchmarks import profiles, seeds
from benchmarks.profiles import (
    PROFILES,
    compare,
    config_of,
    measure_sensitivities,
    paired,
    rates_by_sensitivity,
    rates_of,
    with_rates,
)
from files.errors import ConfigError
from layers.drop_path import DropPath
from stochastic_depth.setting import set_drop_path


class Net(nn.Module):
    """Three residual blocks, each adding a multiple of its input, and nothing else."""

    class Block(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor
            self.drop_path = DropPath()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.drop_path.residual(x, lambda y: self.factor * y)

    def __init__(self, *factors: float) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(self.Block(factor) for factor in factors))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x)


def test_the_command() -> None:
    args = parse_args(["profiles", "--output", "/dev/null", "--settings", "plain", "--seeds", "2", "optim.epochs=1"])
    assert args.run is profiles.profiles_benchmark
    assert (args.settings, args.seeds, args.overrides) == (["plain"], 2, ["optim.epochs=1"])


def test_profiles_have_the_same_mean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def probe(config, folder, *, split):
        asked.append((config.optim.epochs, config.drop_path.rate, folder, split))

    monkeypatch.setattr(profiles, "score", probe)
    monkeypatch.setattr(profiles, "trained_model", lambda folder: (folder,))
    monkeypatch.setattr(profiles, "measure_sensitivities", lambda folder: [0.0, 0.5, 1.0] * 3)
    config = config_of("plain", ["optim.epochs=7"], seed=3)
    rates = {name: rates_of(name, config, 0.1, tmp_path) for name in PROFILES}
    assert rates.pop("none") == [0.0] * 9
    assert all(statistics.fmean(r) == pytest.approx(0.1) for r in rates.values())
    assert rates["linear"] == pytest.approx([0.025 * i for i in range(9)])
    assert rates["reversed"] == pytest.approx([0.025 * i for i in range(8, -1, -1)])
    assert rates["constant"] == pytest.approx([0.1] * 9)
    assert rates["sensitivity"] == pytest.approx([0.2, 0.1, 0.0] * 3)
    assert asked == [(profiles.PROBE_EPOCHS, 0.0, tmp_path, "val")]
    for name in rates:
        section = with_rates(config, rates[name]).drop_path
        assert section.rate is None and section.profile == rates[name]


def test_a_setting_is_a_run_that_is_validated_once() -> None:
    config = config_of("augmented", ["optim.epochs=7"], seed=3)
    assert (config.seed, config.optim.epochs, config.log.validate_every) == (3, 7, 7)
    assert config.augment.rotate == 15 and config_of("plain", [], seed=0).augment.rotate == 0


@pytest.mark.parametrize(
    ("sensitivities", "rates"),
    [
        ([0.0, 1.0, 3.0], [0.36, 0.24, 0.0]),  # what is missing to the largest: 1, 2/3, 0
        ([-2.0, 1.0, 3.0], [0.36, 0.24, 0.0]),  # without the first the loss falls: as if it did nothing
        ([2.0, 2.0, 2.0], [0.2, 0.2, 0.2]),
        ([-1.0, 0.0, -3.0], [0.2, 0.2, 0.2]),
    ],
)
def test_rates_by_sensitivity(sensitivities: list[float], rates: list[float]) -> None:
    assert rates_by_sensitivity(sensitivities, 0.2) == pytest.approx(rates)


def test_a_mean_that_sensitivities_cannot_have() -> None:
    with pytest.raises(ConfigError, match=r"--mean 0\.5: by sensitivity one block would have the rate 1\.5"):
        rates_by_sensitivity([0.0, 1.0, 1.0], 0.5)


def test_sensitivities_are_what_the_loss_rises_by() -> None:
    model = Net(1.0, 0.0, 0.5).eval()
    set_drop_path(model, 0.7, input_size=(2,))
    images, targets = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4
    whole = F.cross_entropy(3 * images, targets)
    expected = [F.cross_entropy(f * images, targets) - whole for f in (1.5, 3.0, 2.0)]
    assert measure_sensitivities(model, images, targets) == pytest.approx([e.item() for e in expected], abs=1e-6)
    assert not model.training and all(m.drop_prob == 0 for m in model.modules() if isinstance(m, DropPath))


def test_paired_differences_are_tested_exactly() -> None:
    differences = [0.5, -0.1, 0.3, 0.8, 0.2, 0.4, -0.3, 0.6]
    flipped = [abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
               for signs in itertools.product((1, -1), repeat=8)]  # fmt: skip
    expected = statistics.fmean(total >= sum(differences) - 1e-9 for total in flipped)
    result = paired(differences)
    assert result["p"] == pytest.approx(expected, abs=1e-4) and result["difference"] == 0.3
    low, high = result["interval"]
    assert -0.3 < low < 0.3 < high < 0.8 and result == paired(differences)
    assert paired([1.0] * 7 + [2.0])["p"] == round(2 / 2**8, 4)
    assert paired([0.4]) == {"difference": 0.4}


def test_a_comparison_pairs_seeds() -> None:
    def row(profile: str, seed: int, top1: float, setting: str = "plain") -> dict:
        return {"setting": setting, "profile": profile, "seed": seed, "top1": top1, "nll": -top1}

    rows = [row("linear", 0, 1.0), row("linear", 1, 9.0), row("none", 1, 7.0), row("none", 0, 2.0)]
    rows += [row("linear", 0, 50.0, "augmented"), row("none", 0, 0.0, "augmented")]
    result = compare(rows, "plain", "linear", "none")
    assert (result["top1"]["difference"], result["nll"]["difference"]) == (0.5, -0.5)
    assert profiles.means(rows, "plain", "linear") == {"top1": 5.0, "nll": -5.0}


@pytest.mark.slow
def test_profiles_over_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "PROBE_EPOCHS", 1)
    output = tmp_path / "profiles.json"
    command = ["profiles", "--settings", "plain", "--seeds", "2", "--work", str(tmp_path / "runs"), "--output"]
    tiny = ["optim.epochs=1", "optim.warmup_epochs=0", "model.depths=[1, 2]"]
    assert main([*command, str(output), *tiny]) == 0
    told = json.loads(output.read_text())
    assert {(row["profile"], row["seed"]) for row in told["rows"]} == set(itertools.product(PROFILES, (0, 1)))
    assert ", 1 thread, " in told["machine"]
    assert {(c["profile"], c["over"]) for c in told["comparisons"]} == {
        (a, b) for a, b in itertools.product(PROFILES, ("linear", "none")) if a != b and (a, b) != ("none", "linear")
    }

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(seeds, "run", refuse)
    assert main([*command, str(output), *tiny]) == 0
    assert json.loads(output.read_text()) == told
    assert main([*command, str(output), *tiny, "optim.lr=1e-3"]) == 2, "never another setting's score"
