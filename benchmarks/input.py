"""Images per second of one core: decoding, random resized crop, flip, policy and normalising, beside timm's pipeline."""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.dataset_factory import create_dataset
from timm.data.loader import create_loader
from torch import Tensor

from benchmarks.measure import Commands, machine
from training.config import AugmentSection, DataSection
from training.data.build import build_datasets
from training.data.decoding import decoder_problem
from training.data.loading import EpochSampler, build_train_loader
from training.data.transforms import ImageSpec, recolour_steps

POLICY = "rand-m9-mstd0.5-inc1"
WANTED = {"none": 1.6, POLICY: 1.3}
"""Ours over timm's, by policy."""

CPU = torch.device("cpu")
SCALE = (0.08, 1.0)

Side = Callable[[], Iterator[Tensor]]
"""One pass over the images, as batches that a model takes."""


def add_parsers(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Adds `input` to the command line."""
    parser = commands.add_parser("input", help="images per second of one core, beside timm", parents=[common])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--images", type=int, default=96, help="JPEG files that are made")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--size", type=int, default=224, help="of the crops")
    parser.add_argument("--interpolation", choices=["bicubic", "bilinear"], default="bicubic", help="of both sides")
    parser.set_defaults(run=input_benchmark, threads=1)


def photograph(seed: int, width: int = 500, height: int = 375) -> Image.Image:
    """Shapes at four scales under noise: at quality 90 a JPEG of about 80 kB, as ImageNet's are."""
    rng = np.random.default_rng(seed)
    total = np.full((height, width, 3), 128.0)
    for across, strength in ((4, 60), (16, 40), (64, 25), (200, 12)):
        coarse = rng.normal(0, strength, (3, max(2, across * height // width), across)).astype(np.float32)
        smooth = [np.asarray(Image.fromarray(c).resize((width, height), Image.Resampling.BICUBIC)) for c in coarse]
        total += np.stack(smooth, axis=-1)
    total += rng.normal(0, 6, (height, width, 1))
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


def make_images(root: Path, count: int) -> float:
    """Writes the files in two classes; returns their mean size in kB."""
    sizes = []
    for part, number in (("train", count), ("val", 2)):
        for i in range(number):
            path = root / part / "ab"[i % 2] / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            photograph(i).save(path, quality=90)
            sizes.append(path.stat().st_size / 1000)
    return round(statistics.mean(sizes), 1)


def timm_side(root: Path, args: argparse.Namespace, spec: ImageSpec, policy: str, *, prefetcher: bool) -> Side:
    """timm's loader: with its prefetcher images are collated in uint8 and normalised by the batch, without it one by one."""
    dataset: Any = create_dataset("", str(root), split="train")
    loader = create_loader(
        dataset,
        spec.input_size,
        args.batch_size,
        is_training=True,
        scale=SCALE,
        color_jitter=0.0,
        interpolation=args.interpolation,
        mean=spec.mean,
        std=spec.std,
        num_workers=0,
        persistent_workers=False,
        use_prefetcher=prefetcher,
        device=CPU,
    )
    if policy != "none":
        # timm's own policy, as ours calls it; behind crop and flip, where timm has it
        dataset.transform.transforms[2:2] = recolour_steps(AugmentSection(auto_augment=policy), spec)
    return lambda: (images for images, _ in loader)


def our_side(root: Path, args: argparse.Namespace, spec: ImageSpec, policy: str, *, decoder: Any) -> Side:
    """The loader of a run, and the normalising that its loop does."""
    section = DataSection(dataset="folder", root=str(root), batch_size=args.batch_size, workers=0, decoder=decoder)
    augment = AugmentSection(crop_scale=list(SCALE), auto_augment=None if policy == "none" else policy)
    bundle = build_datasets(section, augment, spec, seed=0)
    loader = build_train_loader(bundle, section, seed=0, device=CPU)
    sampler = loader.batch_sampler
    assert isinstance(sampler, EpochSampler)

    def batches() -> Iterator[Tensor]:
        sampler.set_position(sampler.epoch + 1)
        return (bundle.normalise(images) for images, _, _ in loader)

    return batches


def cpu_seconds(side: Side) -> float:
    """CPU seconds per image of one pass: on a busy machine they tell more than those on the wall."""
    count, start = 0, time.process_time()
    for images in side():
        count += len(images)
    return (time.process_time() - start) / count


def input_benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Each side's images per CPU second by policy, and its ratio to timm's of paired rounds."""
    spec = ImageSpec((3, args.size, args.size), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), args.interpolation)
    decoders = ["pillow"] if decoder_problem() else ["torchcodec", "pillow"]
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        kilobytes = make_images(root, args.images)
        for policy in WANTED:
            sides = {
                "timm": timm_side(root, args, spec, policy, prefetcher=True),
                "timm without prefetcher": timm_side(root, args, spec, policy, prefetcher=False),
                **{f"ours, {d}": our_side(root, args, spec, policy, decoder=d) for d in decoders},
            }
            results[policy] = compare(sides, args.rounds)
            for name, row in results[policy].items():
                print(f"{policy:>20}  {name:24} {row}", flush=True)
    for policy, wanted in WANTED.items():
        best = results[policy][f"ours, {decoders[0]}"]["over_timm"]
        print(f"{policy}: {best:.2f} of timm's images per second with {decoders[0]} (wanted: {wanted})")
    return {"machine": machine(args.threads), "jpeg_kilobytes": kilobytes, "results": results, "wanted": WANTED}


def compare(sides: dict[str, Side], rounds: int) -> dict[str, dict[str, Any]]:
    """The sides in turns: medians, and ratios to the first two by round, with quartiles for the first."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        cpu_seconds(side)
    for _ in range(rounds):
        for name, side in sides.items():
            times[name].append(cpu_seconds(side))
    rows = {}
    for name in sides:
        first, second = (
            [a / b for a, b in zip(times[reference], times[name], strict=True)] for reference in list(sides)[:2]
        )
        low, middle, high = statistics.quantiles(first, n=4, method="inclusive")
        rows[name] = {
            "images_per_cpu_second": round(1 / statistics.median(times[name]), 1),
            "over_timm": round(middle, 3),
            "quartiles": [round(low, 3), round(high, 3)],
            "over_timm_without_prefetcher": round(statistics.median(second), 3),
        }
    return rows
