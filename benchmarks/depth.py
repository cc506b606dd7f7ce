"""Depth afterwards: what removing blocks costs, and what MC drop-path says, after training with and without drop path."""

import argparse
from pathlib import Path

from benchmarks.measure import Commands
from training.config import TrainConfig, load_config
from training.run import run

MODEL = (
    "{name: convformer_n4, in_chans: 1, image_size: 28, depths: [3, 6], "
    "stem: {kernel_size: 5, stride: 4, padding: 2, norm: layer_norm_no_bias}}"
)
EPOCHS = 40


def add_parsers(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Adds `depth` to the command line."""
    parser = commands.add_parser("depth", help="blocks removed after training, with a control", parents=[common])


def config_of(rate: float, seed: int, epochs: int = EPOCHS) -> TrainConfig:
    """A ConvFormer of 9 blocks on all 1,000 training digits of mnist5k, without augmentation."""
    return load_config(
        None,
        [
            f"seed={seed}",
            f"model={MODEL}",
            f"drop_path={{rate: {rate}, profile: linear, mode: skip}}",
            "data={dataset: mnist5k, batch_size: 32, workers: 0}",
            "augment={hflip: 0}",
            f"optim={{epochs: {epochs}, lr: 1e-3, warmup_epochs: 3}}",
            "ema={enabled: false}",
            "runtime={device: cpu, threads: 1}",
            f"log={{validate_every: {epochs}, report: false}}",
        ],
    )


def train(runs: Path, rate: float, seed: int, epochs: int = EPOCHS) -> Path:
    """The folder of a run; one that is whole is not repeated, one that was cut off goes on."""
    folder = runs / f"depth-rate-{rate:g}-seed-{seed}"
    if not (folder / "summary.json").exists():
        run(config_of(rate, seed, epochs), folder, resume="auto")
    return folder
