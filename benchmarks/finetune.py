"""What fine-tuning is worth with few labels: digits 5 to 9 from a model of the digits 0 to 4, and from scratch."""

import argparse
import statistics
from pathlib import Path
from typing import Any

from benchmarks.measure import Commands, machine
from benchmarks.seeds import compare, score, spread
from configs import CONFIGS
from training.config import TrainConfig, load_config

PRETRAINING = CONFIGS / "train" / "mnist5k.yaml"
FINE_TUNING = CONFIGS / "finetune" / "mnist5k_new_classes.yaml"
LINEAR_PROBE = CONFIGS / "finetune" / "mnist5k_linear_probe.yaml"
FIRST_CLASSES = ["data.classes=[0, 1, 2, 3, 4]", "optim.epochs=30"]  # as the head of FINE_TUNING says

ARMS: dict[str, tuple[Path, list[str]]] = {
    "fine-tuned": (FINE_TUNING, []),
    "fine-tuned at rate 0.1": (FINE_TUNING, ["drop_path.rate=0.1"]),
    "linear probe": (LINEAR_PROBE, []),
    # what belongs to trained weights is off: nothing is worth keeping, and all layers learn at one rate
    "from scratch at rate 0.1": (
        FINE_TUNING,
        ["model.checkpoint=null", "freeze.epochs=0", "optim.layer_decay=null", "drop_path.rate=0.1"],
    ),
}
"""Each setting's config, and what is changed of it. All see the same labels for as many steps at a seed."""

COMPARED = (
    ("fine-tuned", "linear probe"),
    ("fine-tuned", "fine-tuned at rate 0.1"),
    ("fine-tuned at rate 0.1", "from scratch at rate 0.1"),
)

CHEAP = ["log.report=false", "runtime.threads=1", "checkpoint.keep=1"]
"""Changes nothing that is learned."""


def add_parsers(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Adds `finetune` to the command line."""
    parser = commands.add_parser(
        "finetune", help="new classes with 50 labels, from a run and from scratch, over seeds", parents=[common]
    )
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--work", type=Path, default=Path("runs/finetune"), help="finished runs in it are kept")
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE of all runs")
    parser.set_defaults(run=finetune_benchmark)


def finetune_benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Pre-trains and fine-tunes at each seed, and scores each setting on the test part."""
    scores: dict[str, dict[int, float]] = {name: {} for name in ["pre-training", *ARMS]}
    cpu: dict[str, list[float]] = {name: [] for name in scores}
    for seed in range(args.seeds):
        folder = args.work / f"seed-{seed}"
        weights = f"model.checkpoint={folder / 'pre-training' / 'best'}"
        units = {"pre-training": (PRETRAINING, FIRST_CLASSES)}
        units |= {arm: (file, [weights, *changes]) for arm, (file, changes) in ARMS.items()}
        for name, (file, changes) in units.items():
            config = at_its_end(load_config(file, [*changes, f"seed={seed}", *args.overrides, *CHEAP]))
            found = score(config, folder / name.replace(" ", "-"), split="test")
            scores[name][seed] = found["top1"]
            cpu[name].append(found["cpu_seconds"])
        print(seed, {name: round(values[seed], 2) for name, values in scores.items()}, flush=True)
    comparisons = [compare((a, scores[a]), (b, scores[b])) for a, b in COMPARED]
    for comparison in comparisons:
        print(comparison["sentence"])
    told = {"pre-training": (PRETRAINING, FIRST_CLASSES), **ARMS}
    return {
        "machine": machine(1),
        "cpu_minutes": round(sum(map(sum, cpu.values())) / 60, 1),
        "settings": {
            name: {
                "config": file.name,
                "changes": changes,
                "cpu_seconds": round(statistics.median(cpu[name]), 1),
                **spread(scores[name]),
            }
            for name, (file, changes) in told.items()
        },
        "comparisons": comparisons,
    }


def at_its_end(config: TrainConfig) -> TrainConfig:
    """The config validated after its last epoch alone, so that no epoch is chosen by its accuracy."""
    log = config.log.model_copy(update={"validate_every": config.optim.epochs})
    return config.model_copy(update={"log": log})
