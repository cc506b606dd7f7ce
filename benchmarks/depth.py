"""Depth afterwards: what removing blocks costs, and what MC drop-path says, after training with and without drop path."""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import Commands
from benchmarks.seeds import score
from files.durable import save_text
from training.config import TrainConfig, load_config
from training.evaluating.blocks import BlockStudy, Wanted, study_blocks
from training.evaluating.mc import MonteCarlo
from training.evaluating.part import WantedData
from training.evaluating.validation import Compute, Evaluation, Request, validate

MODEL = (
    "{name: convformer_n4, in_chans: 1, image_size: 28, depths: [3, 6], "
    "stem: {kernel_size: 5, stride: 4, padding: 2, norm: layer_norm_no_bias}}"
)
FIGURES = ("top1", "nll", "ece")


def add_parsers(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Adds `depth` to the command line."""
    parser = commands.add_parser("depth", help="blocks removed after training, with a control", parents=[common])
    parser.add_argument("--rate", type=float, default=0.3, help="drop-path rate beside the control's 0; linear")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each rate")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--passes", type=int, default=10, help="of MC drop-path")
    parser.add_argument("--work", type=Path, default=Path("runs/depth"), help="finished runs in it are kept")
    parser.set_defaults(run=depth_benchmark)


def config_of(rate: float, seed: int, epochs: int) -> TrainConfig:
    """A ConvFormer of 9 blocks on all 1,000 training digits of mnist5k, without augmentation."""
    return load_config(
        None,
        [
            f"seed={seed}",
            f"model={MODEL}",
            f"drop_path={{rate: {rate}, profile: linear, mode: skip}}",
            "data={dataset: mnist5k, batch_size: 32, workers: 0}",
            "augment={hflip: 0}",
            f"optim={{epochs: {epochs}, lr: 1e-3, warmup_epochs: {min(3, epochs - 1)}}}",
            "ema={enabled: false}",
            "runtime={device: cpu, precision: float32, threads: 1}",
            f"log={{validate_every: {epochs}, report: false}}",
        ],
    )


def train(work: Path, rate: float, seed: int, epochs: int) -> Path:
    """The folder of a finished run, see `benchmarks.seeds.score`."""
    folder = work / f"rate-{rate:g}-seed-{seed}"
    score(config_of(rate, seed, epochs), folder, split="val")
    return folder


def depth_benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Trains at rate 0 and at another; removes blocks greedily, chosen on val and scored on test; passes of MC drop-path."""
    rows = []
    for seed in range(args.seeds):
        for rate in (0.0, args.rate):
            folder = train(args.work, rate, seed, args.epochs)
            row = {"rate": rate, "seed": seed, **measure(folder, args.rate, args.passes)}
            print(rate, seed, row["top1"], {key: row[key] for key in ("plain", "mc")}, flush=True)
            rows.append(row)
    summary = [summarise([row for row in rows if row["rate"] == rate]) for rate in (0.0, args.rate)]
    lost = [compare(rows, args.rate, count) for count in range(len(summary[0]["top1"]))]
    return {
        "model": MODEL,
        "data": "mnist5k: 1,000 digits to train, 1,000 to choose blocks on (val), 3,000 to score (test)",
        "epochs": args.epochs,
        "passes": args.passes,
        "rows": rows,
        "summary": summary,
        "extra_loss_of_control": lost,
    }


def measure(folder: Path, rate: float, passes: int) -> dict[str, Any]:
    """What is measured of one run; kept beside it, and taken from there where it is of the same weights and settings."""
    kept = folder / "depth.json"
    weights = json.loads((folder / "summary.json").read_text())["weights_sha256"]
    asked = {"weights": weights, "rate": rate, "passes": passes}
    if kept.exists() and (found := json.loads(kept.read_text()))["asked"] == asked:
        return found["row"]
    row = {**_removed(folder), **_passes(folder, rate, passes)}
    save_text(kept, json.dumps({"asked": asked, "row": row}, indent=1) + "\n")
    return row


def _request(folder: Path, **more: Any) -> Request:
    return Request(
        [str(folder)], data=WantedData(split="test", batch_size=250, workers=0), compute=Compute("cpu"), **more
    )


def _removed(folder: Path) -> dict[str, Any]:
    """Top-1 on test over the number of removed blocks, from none to all but one, with what was removed."""
    study: BlockStudy
    (study,) = study_blocks(_request(folder), Wanted("greedy", _most(folder)), rounds=1)  # its times are not used
    return {
        "order": list(study.rows[-1].removed),
        "compute": [None if row.compute is None else round(row.compute, 4) for row in study.rows],
        **{key: [round(row.metrics[key], 4) for row in study.rows] for key in FIGURES},
    }


def _most(folder: Path) -> int:
    depths = load_config(folder / "config.yaml").model.overrides["depths"]
    return sum(depths) - 1


def _passes(folder: Path, rate: float, passes: int) -> dict[str, Any]:
    """Plain and MC figures on test; the control is given the other's rates, having none."""
    own = load_config(folder / "config.yaml").drop_path.rate
    wanted = MonteCarlo(passes, None if own else rate)
    found: list[Evaluation] = list(validate(_request(folder, mc=wanted)))
    return {
        name: {key: round(each.metrics[key], 4) for key in FIGURES}
        for name, each in zip(("plain", "mc"), found, strict=True)
    }


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds of one rate."""
    return {
        "rate": rows[0]["rate"],
        "seeds": len(rows),
        "top1": [round(statistics.mean(values), 3) for values in zip(*(row["top1"] for row in rows), strict=True)],
        **{
            name: {key: round(statistics.mean(row[name][key] for row in rows), 4) for key in FIGURES}
            for name in ("plain", "mc")
        },
    }


def compare(rows: Sequence[dict[str, Any]], rate: float, count: int) -> dict[str, Any]:
    """How much more top-1 the control loses by `count` blocks than what was trained at `rate`, seed by seed."""
    lost = {(row["rate"], row["seed"]): row["top1"][0] - row["top1"][count] for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    extra = [round(lost[0.0, seed] - lost[rate, seed], 3) for seed in seeds]
    return {"removed": count, "by_seed": extra, "mean": round(statistics.mean(extra), 3)}
