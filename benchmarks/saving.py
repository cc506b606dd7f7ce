"""What saving costs training: steps with a checkpoint every N of them, written beside training, in it, or not at all."""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Commands, add_threads, paired_ratio
from training.config import TrainConfig, load_config
from training.console import StopSignals
from training.distributed import init_world
from training.loop import train_step
from training.run_folder import RunFolder
from training.saving import Saver
from training.setup import Setup, build
from training.state import RunState

SIDES = ("none", "background", "foreground")


def add_parsers(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Adds `saving` to the command line."""
    parser = commands.add_parser(
        "saving", help="steps with checkpoints in a thread, in line, without", parents=[common]
    )
    parser.add_argument("--model", default="convformer_s18")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--every", type=int, default=10, help="optimizer steps between checkpoints")
    parser.add_argument("--rounds", type=int, default=7, help="of `every` steps, per side")
    parser.add_argument(
        "--runs", type=Path, help="where checkpoints are written; default: the system's temporary folder"
    )
    add_threads(parser)
    parser.set_defaults(run=saving_benchmark)


def config_of(args: argparse.Namespace) -> TrainConfig:
    """A training config of that model with AdamW and an average, so that four times its weights are saved."""
    return load_config(
        None,
        [
            f"model={{name: {args.model}}}",
            f"data={{dataset: digits, batch_size: {args.batch_size}, workers: 0, image_size: {args.image_size}}}",
            "augment={hflip: 0}",
            "ema={enabled: true}",
            f"runtime={{threads: {args.threads}, precision: float32}}",
            "checkpoint={keep: 1}",
        ],
    )


def saving_benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step, on average over `every` steps of which the first begins a save; and of the pause that it makes."""
    setup = build(config_of(args), init_world())
    channels, height, width = setup.model.pretrained_cfg["input_size"]
    images = torch.randn(args.batch_size, channels, height, width)
    targets = torch.randint(setup.model.num_classes, (args.batch_size,))
    step = Stepper(setup, images, targets)
    step()
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    pauses: dict[str, list[float]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory(dir=args.runs) as folder:
        saver = Saver(step.state, RunFolder(Path(folder)), on_failure=print)
        saves = {"none": lambda: None, "background": saver.save, "foreground": saver.save_and_wait}
        for number in range(args.rounds):
            for side in SIDES[number % 3 :] + SIDES[: number % 3]:  # no side is always the one behind a certain other
                pause, seconds = one_round(step, saves[side], args.every)
                pauses[side].append(pause)
                times[side].append(seconds)
                saver.wait()  # not timed: what is left of a write would slow another side down
            print({side: round(times[side][-1], 4) for side in SIDES}, flush=True)
        size = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
    rows = {}
    for side in SIDES:
        over_none, quartiles = paired_ratio(times[side], times["none"])
        rows[side] = {
            "seconds_per_step": round(statistics.median(times[side]), 4),
            "over_none": over_none,
            "quartiles": quartiles,
            "pause": round(statistics.median(pauses[side]), 4),
        }
        print(side, rows[side])
    return {
        "model": args.model,
        "batch_size": args.batch_size,
        "image_size": args.image_size,
        "every": args.every,
        "rounds": args.rounds,
        "checkpoint_mb": round(size / 2**20, 1),
        "rows": rows,
    }


class Stepper:
    """A callable that takes one optimizer step of a run on the same batch, as the training loop does."""

    def __init__(self, setup: Setup, images: Tensor, targets: Tensor) -> None:
        self.state = RunState(setup)
        self.batch = (images, targets, torch.arange(len(images)))
        self.loss_fn = setup.loss_fn

    def __call__(self) -> None:
        setup, progress = self.state.setup, self.state.progress
        train_step(setup, setup.model.train(), [self.batch], progress, loss_fn=self.loss_fn, signals=StopSignals())
        progress.step += 1


def one_round(step: Callable[[], None], save: Callable[[], object], steps: int) -> tuple[float, float]:
    """Seconds that the save makes training wait, and seconds per step, that included."""
    start = time.perf_counter()
    save()
    pause = time.perf_counter() - start
    for _ in range(steps):
        step()
    return pause, (time.perf_counter() - start) / steps
