"""Whether training in bfloat16 costs accuracy: paired runs over seeds, scored on the test part; and how fast it is here."""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.finetune import CHEAP, at_its_end
from benchmarks.measure import Commands, machine, paired_ratio, seconds_of, take_turns
from benchmarks.saving import Stepper
from benchmarks.seeds import compare, score, spread
from configs import CONFIGS
from training.config import TrainConfig, load_config
from training.distributed import init_world
from training.precision import fast_bfloat16
from training.setup import build

CONFIG = CONFIGS / "train" / "mnist5k.yaml"
SHORTER = ("optim.epochs=20",)
"""Changed of CONFIG: a third of its epochs, so that 16 runs take minutes."""
PRECISIONS = ("bfloat16", "float32")
MODELS: dict[str, tuple[str, ...]] = {
    "that of the runs": (),
    "convformer_s18": ("model={name: convformer_s18, in_chans: 1, image_size: 224}", "data.batch_size=8"),
}
"""What the speed is measured of: changes of CONFIG by name."""


def add_parsers(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Adds `precision` to the command line."""
    parser = commands.add_parser("precision", help="accuracy in bfloat16 and in float32, over seeds", parents=[common])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--work", type=Path, default=Path("runs/precision"), help="finished runs in it are kept")
    parser.add_argument("--rounds", type=int, default=21, help="training steps timed of each precision; 0: none")
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE of all runs")
    parser.set_defaults(run=precision_benchmark)


def precision_benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Trains at each seed in both precisions, scores both on the test part, and times steps of both in turns."""
    scores: dict[str, dict[int, float]] = {precision: {} for precision in PRECISIONS}
    for seed in range(args.seeds):
        for precision in PRECISIONS:
            config = config_of(precision, [*args.overrides, f"seed={seed}"])
            scores[precision][seed] = score(config, folder_of(args.work, precision, seed), split="test")["top1"]
        print(seed, {precision: round(values[seed], 2) for precision, values in scores.items()}, flush=True)
    comparison = compare(*scores.items())
    print(comparison["sentence"])
    told: dict[str, Any] = {
        "machine": machine(1),
        "bfloat16_in_hardware": fast_bfloat16(torch.device("cpu")),
        "config": CONFIG.name,
        "changes": [*SHORTER, *args.overrides],
        "precisions": {precision: spread(values) for precision, values in scores.items()},
        "comparison": comparison,
    }
    return told | ({"steps": steps(args.rounds)} if args.rounds else {})


def config_of(precision: str, overrides: Sequence[str]) -> TrainConfig:
    """A run that is validated at its end alone, in that precision."""
    return at_its_end(load_config(CONFIG, [*SHORTER, *overrides, f"runtime.precision={precision}", *CHEAP]))


def folder_of(work: Path, precision: str, seed: int) -> Path:
    """Where that run lies."""
    return work / f"{precision}-seed-{seed}"


def steps(rounds: int) -> dict[str, Any]:
    """Seconds of a training step, optimizer included, in each precision, in turns; by name of MODELS."""
    told: dict[str, Any] = {}
    for name, changes in MODELS.items():
        taken = {precision: step_of(config_of(precision, changes)) for precision in PRECISIONS}
        timed = {key: partial(seconds_of, step, torch.device("cpu")) for key, step in taken.items()}
        times = take_turns(timed, rounds, warmup=3)
        ratio, quartiles = paired_ratio(times["float32"], times["bfloat16"])
        milliseconds = {key: round(1000 * sorted(each)[len(each) // 2], 2) for key, each in times.items()}
        told[name] = {"milliseconds": milliseconds, "float32_over_bfloat16": ratio, "quartiles": quartiles}
        print(name, told[name], flush=True)
    return told


def step_of(config: TrainConfig) -> Callable[[], None]:
    """A callable that takes one optimizer step of that run on random images."""
    setup = build(config, init_world("cpu"))
    _, height, width = setup.model.pretrained_cfg["input_size"]
    images = torch.randn(config.data.batch_size, 1, height, width)
    return Stepper(setup, images, torch.randint(setup.model.num_classes, (len(images),)))
