"""Speed of the inference form over the training form."""

import argparse
from typing import Any

import torch

from benchmarks.measure import Commands, add_threads
from models.export import compare_speed
from models.factory import create_model
from models.fold import fold_scales
from stochastic_depth.proof import randomise_scales

FOLDED = [
    "poolformer_s12",
    "poolformerv2_s12",
    "convformer_s18",
    "caformer_s18",
    "deit3_small_patch16_224",
    "resmlp_12_224",
]


def add_parsers(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Adds `fold` to the command line."""
    parser = commands.add_parser("fold", help="the inference form with folded scales", parents=[common])
    parser.add_argument("--models", nargs="+", default=FOLDED)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=25)
    add_threads(parser)
    parser.set_defaults(run=fold_benchmark)


def fold_benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """The inference form with folded scales against the model itself, in evaluation."""
    torch.manual_seed(0)
    rows = []
    for name in args.models:
        model = create_model(name).eval()
        randomise_scales(model)
        folded = fold_scales(model).eval()
        images = torch.randn(2, *model.pretrained_cfg["input_size"])
        with torch.inference_mode():
            expected, got = model(images), folded(images)
        before, after = compare_speed(model, folded, batch=args.batch, rounds=args.rounds)
        rows.append(
            {
                "model": name,
                "batch": args.batch,
                "images_per_second": round(before, 2),
                "folded": round(after, 2),
                "speedup": round(after / before, 4),
                "largest_relative_error": float(f"{float((got - expected).abs().max() / expected.abs().max()):.2g}"),
            }
        )
        print(rows[-1], flush=True)
    return {"rows": rows}
