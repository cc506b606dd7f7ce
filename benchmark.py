"""Speed and memory side by side, in one process, in turns: `python benchmark.py --help`."""

import argparse
import copy
import gc
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import DropPath as TimmDropPath
from torch import Tensor, nn

from benchmarks.any_model import any_model_table
from benchmarks.busy import busy_benchmark
from benchmarks.digits import digits_seeds
from benchmarks.measure import interleaved, machine, step_time
from layers.drop_path import BREAK_EVEN, DropPath
from layers.rates import drop_path_rates
from models.config import MetaFormerConfig, PatchConfig
from models.export import compare_speed
from models.factory import create_model
from models.fold import fold_scales
from models.metaformer import build_block
from stochastic_depth.blocks import find_blocks
from stochastic_depth.proof import randomise_scales
from stochastic_depth.report import drop_path_report
from stochastic_depth.setting import set_drop_path
from training.threads import wait_passively

wait_passively()  # before torch loads


RATES = (0.0, 0.1, 0.2, 0.4, 0.6, 0.8)

FOLDED = [
    "poolformer_s12",
    "poolformerv2_s12",
    "convformer_s18",
    "caformer_s18",
    "deit3_small_patch16_224",
    "resmlp_12_224",
]


class FlooredDropPath(DropPath):
    """The scheme that DINOv2 describes: keep floor(B * keep_prob) samples, at least one, and scale by B / kept.

    Written from its description, for any shape of activations; the rate is not exact at small batches.
    """

    def residual(self, x: Tensor, branch: Callable[[Tensor], Tensor], shortcut: Tensor | None = None) -> Tensor:
        """As `DropPath.residual`."""
        shortcut = x if shortcut is None else shortcut
        if not self.training or self.drop_prob == 0.0:
            return shortcut + branch(x)
        batch = len(x)
        count = max(int(batch * (1.0 - self.drop_prob)), 1)
        self._count(batch, torch.tensor(count), count)
        kept = torch.randperm(batch, device=x.device)[:count]
        return torch.index_add(shortcut, 0, kept, branch(x[kept]).to(shortcut.dtype), alpha=batch / count)


class TimmResidual(DropPath):
    """timm's own `DropPath` in our block: the branch is computed, then masked."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.timm = TimmDropPath(self.drop_prob)

    def residual(self, x: Tensor, branch: Callable[[Tensor], Tensor], shortcut: Tensor | None = None) -> Tensor:
        """As `DropPath.residual`."""
        self.timm.drop_prob = self.drop_prob
        self.timm.train(self.training)
        return (x if shortcut is None else shortcut) + self.timm(branch(x))


def variants(model: nn.Module, rate: float, profile: str, break_even: float | None) -> dict[str, nn.Module]:
    """One model with the same weights in each way of doing stochastic depth."""
    built = {name: copy.deepcopy(model).train() for name in ("mask", "skip", "timm", "floored")}
    for name, other in built.items():
        mode = "skip" if name == "skip" else "mask"
        set_drop_path(other, rate, profile=profile, mode=mode, break_even=break_even)  # type: ignore[arg-type]
        if name in ("timm", "floored"):
            for module in list(other.modules()):
                for key, child in list(module.named_children()):
                    if isinstance(child, DropPath):
                        cls = TimmResidual if name == "timm" else FlooredDropPath
                        setattr(module, key, cls(child.drop_prob).train())
    return built


def block_model(mixer: str) -> tuple[nn.Module, tuple[int, ...]]:
    """Four blocks of one kind of token mixer at the third stage's width, and its input without the batch."""
    patch = PatchConfig(kernel_size=1, stride=1, padding=0)
    config = MetaFormerConfig(
        name=mixer, depths=[4], dims=[320], token_mixer=mixer, image_size=14, stem=patch, downsample=patch  # type: ignore[arg-type]
    )  # fmt: skip
    return nn.Sequential(*(build_block(config, 0, 0.0, "mask") for _ in range(4))), (14, 14, 320)


class Branches(nn.Module):
    """Four residual branches of one kind, norm and mixer or MLP, for the break-even rate of that kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        blocks: list[Any] = list(block_model("pooling" if kind == "mlp" else kind)[0].children())
        name = "mlp" if kind == "mlp" else "token_mixer"
        self.branches = nn.ModuleList(nn.Sequential(block.norm1, block.get_submodule(name)) for block in blocks)
        self.drop_paths = nn.ModuleList(DropPath(kind=kind) for _ in blocks)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        for branch, drop_path in zip(self.branches, self.drop_paths, strict=True):
            assert isinstance(drop_path, DropPath)
            x = drop_path.residual(x, branch)
        return x


def drop_path_benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Blocks and whole models over rates: mask, skip, timm's module and DINOv2's scheme."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    subjects: list[tuple[str, Callable[[], tuple[nn.Module, tuple[int, ...]]], int]] = []
    if "blocks" in args.subjects:
        for mixer in ("pooling", "sep_conv", "attention"):
            subjects.append((f"{mixer} block", lambda mixer=mixer: block_model(mixer), args.block_batch))
    if "branches" in args.subjects:
        for kind in BREAK_EVEN:
            subjects.append((f"{kind} branch", lambda kind=kind: (Branches(kind), (14, 14, 320)), args.block_batch))
    for name in args.subjects:
        if name not in ("blocks", "branches"):
            subjects.append((name, lambda name=name: (_whole(name), (3, 224, 224)), args.batch))
    for title, make, batch in subjects:
        model, shape = make()
        model.to(device)
        images = torch.randn(batch, *shape, device=device)
        break_even = 0.0 if title.endswith(" branch") else None  # of branches it is what we look for
        for profile in ["constant"] if " " in title else args.profiles:
            for rate in args.rates:
                built = variants(model, rate, profile, break_even)
                models = {k: v for k, v in built.items() if k in args.variants or k == "mask"}
                result = interleaved(models, images, args.rounds)
                dropped = dropped_compute(model, rate, profile, shape)
                row = {"subject": title, "batch": batch, "profile": profile, "rate": rate, "compute_dropped": dropped}
                if dropped and "skip" in result:  # of the time that the dropped compute took, the share that is saved
                    saved = (1.0 - 1.0 / result["skip"]["speedup_over_mask"]) / dropped
                    row["dropped_compute_saved"] = round(saved, 3)
                rows.append({**row, **result})
                text = "  ".join(
                    f"{k} {v['seconds'] * 1000:.1f} ms ({v['speedup_over_mask']:.3f}x, {v['peak_mb']:.0f} MiB)"
                    for k, v in result.items()
                )
                print(f"{title:<16} {profile:<9} rate {rate:<4} {text}", flush=True)
                del built, models
                gc.collect()
    return {"rows": rows}


def dropped_compute(model: nn.Module, rate: float, profile: str, shape: tuple[int, ...]) -> float:
    """Share of the model's multiply-accumulates in branches that are dropped, whether or not time is saved by it."""
    trial = copy.deepcopy(model)
    set_drop_path(trial, rate, profile=profile, mode="skip", break_even=0.0)  # type: ignore[arg-type]
    saved = drop_path_report(trial, input_size=shape).compute_saved
    return round(saved or 0.0, 4)


def limits_benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """What skipping could gain at most: each block's share of a training step, timed by leaving the block out."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for name in args.models:
        model = _whole(name).train().to(device)
        images = torch.randn(args.batch, 3, 224, 224, device=device)
        count = len(find_blocks(model))
        step_time(model, images)
        whole: list[float] = []
        without: list[list[float]] = [[] for _ in range(count)]
        for _ in range(args.rounds):
            for i in range(count):
                set_drop_path(model, 0.0, mode="mask")
                whole.append(step_time(model, images))
                set_drop_path(model, None, profile=[float(i == k) for k in range(count)], mode="batch")
                without[i].append(whole[-1] - step_time(model, images))
        shares = [statistics.median(saved) / statistics.median(whole) for saved in without]
        row: dict[str, Any] = {"model": name, "batch": args.batch, "shares": [round(s, 4) for s in shares]}
        for profile in ("linear", "constant"):
            rates = drop_path_rates(args.rate, [count], profile)
            limit = 1.0 / (1.0 - sum(rate * share for rate, share in zip(rates, shares, strict=True)))
            row[f"limit_{profile}_{args.rate:g}"] = round(limit, 3)
        rows.append(row)
        print(row, flush=True)
    return {"rows": rows}


def _whole(name: str) -> nn.Module:
    return create_model(name, num_classes=1000)


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


def main(argv: list[str] | None = None) -> int:
    """Runs one benchmark and writes its JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--output", type=Path, help="JSON; default benchmarks/results/NAME.json")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser(
        "drop-path",
        help="blocks, branches or models: mask, skip, timm's and DINOv2's scheme over rates",
        parents=[common],
    )
    one.add_argument(
        "--subjects",
        nargs="+",
        help="blocks, branches, or models of the zoo",
        default=["blocks", "poolformer_s12", "caformer_s18", "vit_small_patch16_224"],
    )
    one.add_argument("--variants", nargs="+", default=["mask", "skip", "timm", "floored"])
    one.add_argument("--rates", nargs="+", type=float, default=list(RATES))
    one.add_argument("--profiles", nargs="+", default=["linear", "constant"])
    one.add_argument("--batch", type=int, default=16, help="of whole models")
    one.add_argument("--block-batch", type=int, default=32)
    one.add_argument("--rounds", type=int, default=7)
    one.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU; default all")
    one.set_defaults(run=drop_path_benchmark)
    two = commands.add_parser(
        "any-model", help="set_drop_path on architectures of timm and torchvision", parents=[common]
    )
    two.add_argument("--architectures", nargs="+")
    two.add_argument("--markdown", type=Path)
    two.set_defaults(run=any_model_table)
    five = commands.add_parser("limits", help="what skipping could gain at most, by blocks' times", parents=[common])
    five.add_argument("--models", nargs="+", default=["poolformer_s12", "caformer_s18", "vit_small_patch16_224"])
    five.add_argument("--rate", type=float, default=0.4)
    five.add_argument("--batch", type=int, default=16)
    five.add_argument("--rounds", type=int, default=3)
    five.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU; default all")
    five.set_defaults(run=limits_benchmark)
    four = commands.add_parser("fold", help="the inference form with folded scales", parents=[common])
    four.add_argument("--models", nargs="+", default=FOLDED)
    four.add_argument("--batch", type=int, default=4)
    four.add_argument("--rounds", type=int, default=25)
    four.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU; default all")
    four.set_defaults(run=fold_benchmark)
    three = commands.add_parser("digits", help="the default run over seeds", parents=[common])
    three.add_argument("--seeds", type=int, default=5)
    three.add_argument("--runs", type=Path, default=Path("runs"))
    three.add_argument("overrides", nargs="*")
    three.set_defaults(run=digits_seeds)
    six = commands.add_parser("busy", help="the default run beside a busy process, over alone", parents=[common])
    six.add_argument("--rounds", type=int, default=3)
    six.add_argument("--epochs", type=int, default=5, help="of each run")
    six.add_argument("overrides", nargs="*")
    six.set_defaults(run=busy_benchmark)
    args = parser.parse_args(argv)
    if "threads" in args:
        torch.set_num_threads(args.threads)

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    about = {
        "command": f"python benchmark.py {' '.join(argv if argv is not None else sys.argv[1:])}",
        "commit": commit,
        "machine": machine(torch.get_num_threads()),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    output = args.output or Path("benchmarks/results") / f"{args.command}.json"
    try:  # before what may take hours
        output.parent.mkdir(parents=True, exist_ok=True)
        output.open("a").close()
    except OSError as error:
        parser.error(f"--output {output}: {error.strerror}")
    result = {**about, **args.run(args)}
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written {output}")
    return 0


if __name__ == "__main__":
    # glibc gives large blocks back to the system and fetches them again, and page faults then swamp the differences: keep
    # them, for all sides alike. The C library reads these before Python starts.
    keep = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**28)}
    if sys.platform == "linux" and not keep.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**keep, **os.environ})
    sys.exit(main())
