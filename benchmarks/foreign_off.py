"""What stochastic depth costs a foreign model where it is off: at rate 0 in training, and in evaluation; and what
`set_drop_path` itself takes on large models."""

import argparse
import copy
import random
import statistics
import time
from typing import Any

import timm
import torch
from torch import Tensor, nn

from benchmarks.measure import Commands, add_threads, machine, paired_ratio, seconds_of, step_time
from stochastic_depth import set_drop_path

MODELS = ["vit_tiny_patch16_224", "convnext_atto", "resnet18"]
SIZES = {"small": (1, 64), "normal": (16, 224)}
"""Images and pixels: of one small image a step is little else than Python."""

LARGE = ["vit_large_patch16_224", "convnext_large", "swin_large_patch4_window7_224"]

WANTED = {"training": 1.01, "evaluation": 1.0, "set_drop_path": 20.0}
"""Seconds over those of the untouched model, at most, at normal size; and seconds of `set_drop_path`."""


def add_parsers(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Adds `foreign-off` to the command line."""
    parser = commands.add_parser(
        "foreign-off", help="timm models at rate 0 and in evaluation, over untouched ones", parents=[common]
    )
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--large", nargs="*", default=LARGE, help="models for the time of set_drop_path")
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=list(SIZES))
    parser.add_argument("--seconds", type=float, default=3.0, help="of each row, at least 11 rounds")
    add_threads(parser)
    parser.set_defaults(run=foreign_off_benchmark)


def sides(name: str, pixels: int) -> dict[str, nn.Module]:
    """The untouched model, a copy of it as a control, and copies at rate 0 that would mask and that would skip."""
    sized: dict[str, Any] = {"img_size": pixels} if name.startswith("vit_") else {}
    untouched = timm.create_model(name, num_classes=10, **sized)
    found = {"untouched": untouched, "copy": copy.deepcopy(untouched)}
    for mode in ("mask", "skip"):
        found[mode] = copy.deepcopy(untouched)
        set_drop_path(found[mode], 0.0, mode=mode, input_size=(3, pixels, pixels))  # type: ignore[arg-type]
    return found


def pass_time(model: nn.Module, images: Tensor) -> float:
    """Seconds of one forward pass."""
    with torch.inference_mode():
        return seconds_of(lambda: model(images), images.device)


def compare(models: dict[str, nn.Module], images: Tensor, *, training: bool, seconds: float) -> dict[str, Any]:
    """Median seconds of the first, and of each other its ratio to the first by round, with quartiles."""
    once = step_time if training else pass_time
    for model in models.values():
        model.train(training)
        once(model, images)
    times: dict[str, list[float]] = {name: [] for name in models}
    shuffled, order = random.Random(0), list(models)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[order[0]]) < 11:
        shuffled.shuffle(order)  # who comes first has the colder caches
        for name in order:
            times[name].append(once(models[name], images))
    reference, *others = models
    row: dict[str, Any] = {
        "milliseconds": round(1000 * statistics.median(times[reference]), 3),
        "rounds": len(times[reference]),
    }
    for name in others:
        middle, (low, high) = paired_ratio(times[name], times[reference])
        row[name] = [low, middle, high]
    return row


def set_time(name: str) -> dict[str, float]:
    """Seconds of `set_drop_path` in mode skip on a model that has not seen it, and of a second call."""
    model = timm.create_model(name)
    seconds = []
    for rate in (0.4, 0.2):
        start = time.perf_counter()
        set_drop_path(model, rate, mode="skip")
        seconds.append(round(time.perf_counter() - start, 3))
    return {"first": seconds[0], "second": seconds[1]}


def foreign_off_benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """A row per model, size and mode of running; then `set_drop_path` on the large models, one at a time."""
    rows = []
    for name in args.models:
        for size in args.sizes:
            batch, pixels = SIZES[size]
            models, images = sides(name, pixels), torch.randn(batch, 3, pixels, pixels)
            for what in ("training", "evaluation"):
                row = compare(models, images, training=what == "training", seconds=args.seconds)
                rows.append({"model": name, "size": size, "batch": batch, "pixels": pixels, "what": what, **row})
                print(rows[-1], flush=True)
    large = {}
    for name in args.large:
        large[name] = set_time(name)
        print(f"set_drop_path on {name}: {large[name]} s (wanted: {WANTED['set_drop_path']})", flush=True)
    return {"machine": machine(args.threads), "rows": rows, "set_drop_path": large, "wanted": WANTED}
