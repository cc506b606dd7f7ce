"""Profiles over depth at an equal mean rate, on few labels: paired runs over seeds, scored on the test part.

Beside profiles that a config knows stands a candidate from the literature, `sensitivity`, after the idea of Hayou & Ayed
2021 (https://arxiv.org/abs/2106.03091): within a budget, the blocks that the loss depends on most are kept most often.
What it depends on is measured here by leaving each block out of a model after a short run.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import Commands, machine
from benchmarks.seeds import score
from configs import CONFIGS
from files.errors import ConfigError
from layers.rates import drop_path_rates
from stochastic_depth.blocks import find_blocks
from stochastic_depth.setting import set_drop_path
from training.config import TrainConfig, load_config
from training.evaluating.part import WantedData, build_part, find_data
from training.evaluating.reading import ModelInput, build_loader
from training.evaluating.subject import Choice, find_subject, image_spec
from training.threads import number_of_threads
from tuning.statistics import bootstrap_interval, sign_flip_p

PROFILES = ("none", "linear", "constant", "reversed", "sensitivity")
PROBE_EPOCHS = 5
"""Of the run after which sensitivities are measured: beyond the warm-up, at a small part of the cost."""
SETTINGS = {
    "plain": "augment={rotate: 0, translate: 0, zoom: 0, hflip: 0, label_smoothing: 0}",
    "augmented": "augment={rotate: 15, translate: 0.1, zoom: 0.15, hflip: 0, label_smoothing: 0.1}",
}
BASE = (
    "model={name: convformer_n4, in_chans: 1, image_size: 28, depths: [3, 6], "
    "stem: {kernel_size: 5, stride: 4, padding: 2, norm: layer_norm_no_bias}}",
    "data.train_samples=200",
    "optim.epochs=45",
    "drop_path.mode=mask",  # images as small as these gain nothing from skipping
    "checkpoint.every_epochs=null",
    "log.report=false",
)


def add_parsers(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Adds `profiles` to the command line."""
    parser = commands.add_parser("profiles", help="profiles at an equal mean rate, over seeds", parents=[common])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--mean", type=float, default=0.1, help="mean rate over blocks")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--work", type=Path, default=Path("runs/profiles"), help="finished runs in it are kept")
    parser.add_argument("overrides", nargs="*")
    parser.set_defaults(run=profiles_benchmark)


def profiles_benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Accuracy and loss on the test part of each profile and seed, and each profile against `linear` and `none`."""
    rows = []
    for seed in range(args.seeds):  # outermost: what is there when time is up is paired
        for setting in args.settings:
            for profile in PROFILES:
                folder = args.work / f"{setting}-mean-{args.mean:g}" / f"{profile}-seed-{seed}"
                config = config_of(setting, args.overrides, seed=seed)
                rates = rates_of(profile, config, args.mean, folder.with_name(f"probe-seed-{seed}"))
                row = {"setting": setting, "profile": profile, "seed": seed, "rates": [round(r, 4) for r in rates]}
                found = score(with_rates(config, rates), folder, split="test")
                rows.append(row | {"top1": round(found["top1"], 3), "nll": round(found["nll"], 4)})
                print(rows[-1], flush=True)
    comparisons = [
        {"setting": setting, "profile": profile, "over": other, **compare(rows, setting, profile, other)}
        for setting in args.settings
        for other in ("linear", "none")
        for profile in PROFILES
        if profile != other and (profile, other) != ("none", "linear")
    ]
    for comparison in comparisons:
        print(comparison)
    summary = [
        {"setting": setting, "profile": profile, **means(rows, setting, profile)}
        for setting in args.settings
        for profile in PROFILES
    ]
    threads = number_of_threads(config_of(args.settings[0], args.overrides, seed=0).runtime.threads)  # of the runs
    tables = {"summary": summary, "comparisons": comparisons, "rows": rows}
    return {"machine": machine(threads), "mean_rate": args.mean, **tables}


def config_of(setting: str, overrides: Sequence[str], *, seed: int) -> TrainConfig:
    """The run of a setting without stochastic depth, which is validated once, at its end."""
    given = [*BASE, SETTINGS[setting], "drop_path.rate=0", *overrides, f"seed={seed}"]
    file = CONFIGS / "train" / "mnist5k.yaml"
    return load_config(file, [*given, f"log.validate_every={load_config(file, given).optim.epochs}"])


def with_rates(config: TrainConfig, rates: Sequence[float]) -> TrainConfig:
    """The same run at these rates, one per block."""
    section = config.drop_path.model_copy(update={"rate": None, "profile": list(rates)})
    return config.model_copy(update={"drop_path": section})


def rates_of(profile: str, config: TrainConfig, mean: float, probe: Path) -> list[float]:
    """One rate per block of a profile by its name here, all with the same mean but `none`.

    Args:
        profile: One of PROFILES.
        config: What is trained.
        mean: Over blocks.
        probe: Folder of the short run that `sensitivity` needs.
    """
    depths = config.model.overrides["depths"]
    if profile == "sensitivity":
        epochs = {"epochs": PROBE_EPOCHS, "warmup_epochs": min(config.optim.warmup_epochs, PROBE_EPOCHS)}
        short = config.model_copy(
            update={
                "optim": config.optim.model_copy(update=epochs),
                "log": config.log.model_copy(update={"validate_every": PROBE_EPOCHS}),
            }
        )
        score(short, probe, split="val")
        return rates_by_sensitivity(measure_sensitivities(*trained_model(probe)), mean)
    if profile == "none":
        return drop_path_rates(0.0, depths)
    return drop_path_rates(mean, depths, profile, "mean")  # type: ignore[arg-type]


def rates_by_sensitivity(sensitivities: Sequence[float], mean: float) -> list[float]:
    """Rates with that mean which fall linearly with a block's sensitivity.

    The block on which the loss depends most is always kept, one on which it does not depend is dropped most often; a
    sensitivity below 0 (the loss falls without the block) counts as 0.

    Raises:
        ConfigError: The mean asks for a rate above 1.
    """
    largest = max(sensitivities)
    lack = [1.0 - max(s, 0.0) / largest if largest > 0 else 1.0 for s in sensitivities]
    if not any(lack):  # all alike
        lack = [1.0] * len(lack)
    rates = [mean * x / statistics.fmean(lack) for x in lack]
    if max(rates) > 1:
        raise ConfigError(f"--mean {mean:g}: by sensitivity one block would have the rate {max(rates):.3g}")
    return rates


def measure_sensitivities(model: nn.Module, images: Tensor, targets: Tensor) -> list[float]:
    """By how much the loss on a batch rises without each block, in order; the model is left without stochastic depth."""
    count = len(find_blocks(model))
    training = model.training
    model.train()  # where rates hold

    def loss(without: int | None) -> float:
        set_drop_path(model, None, profile=[float(i == without) for i in range(count)], mode="batch")
        return F.cross_entropy(model(images).float(), targets).item()

    with torch.no_grad():
        whole = loss(None)
        rises = [loss(i) - whole for i in range(count)]
    set_drop_path(model, 0.0)
    model.train(training)
    return rises


def trained_model(folder: Path) -> tuple[nn.Module, Tensor, Tensor]:
    """The model of a run, and all its training images and their classes as it would be evaluated on them."""
    subject = find_subject(str(folder), Choice())
    assert subject.config is not None
    wanted = WantedData(split="train")
    model = subject.build()
    spec = image_spec(model)
    part = build_part(wanted, find_data(wanted, subject.config), spec, seed=subject.config.seed)
    count, device = len(part.source), torch.device("cpu")
    ((images, targets, _),) = build_loader(part.dataset, range(count), batch_size=count, workers=0, device=device)
    return model, ModelInput(spec, device)(images), targets


def means(rows: Sequence[dict[str, Any]], setting: str, profile: str) -> dict[str, float]:
    """Means over seeds of a profile."""
    chosen = [row for row in rows if (row["setting"], row["profile"]) == (setting, profile)]
    return {"top1": round(statistics.fmean(r["top1"] for r in chosen), 3),
            "nll": round(statistics.fmean(r["nll"] for r in chosen), 4)}  # fmt: skip


def compare(rows: Sequence[dict[str, Any]], setting: str, profile: str, other: str) -> dict[str, Any]:
    """How a profile does against another over the same seeds: in accuracy, points, and in loss."""
    scores = {(row["profile"], row["seed"]): row for row in rows if row["setting"] == setting}
    seeds = sorted({seed for _, seed in scores})
    return {
        key: paired([scores[profile, seed][key] - scores[other, seed][key] for seed in seeds])
        for key in ("top1", "nll")
    }


def paired(differences: Sequence[float]) -> dict[str, Any]:
    """Mean of paired differences, its 95 % interval and p, see `tuning.statistics`."""
    result: dict[str, Any] = {"difference": round(statistics.fmean(differences), 4)}
    if len(differences) > 1:
        low, high = bootstrap_interval(differences)
        result |= {"interval": [round(low, 4), round(high, 4)], "p": round(sign_flip_p(differences), 4)}
    return result
