"""What skipping saves: branches, blocks and models, and what it could save at most."""

import argparse
import copy
import gc
import statistics
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import DropPath as TimmDropPath
from torch import Tensor, nn

from benchmarks.measure import Commands, add_threads, interleaved, step_time
from benchmarks.sides import PRECISIONS, autocast
from layers.drop_path import BREAK_EVEN, DropPath
from layers.rates import drop_path_rates
from models.config import MetaFormerConfig, PatchConfig
from models.factory import create_model
from models.fast_layers import use_fast_layers
from models.metaformer import build_block
from stochastic_depth.blocks import find_blocks
from stochastic_depth.report import drop_path_report
from stochastic_depth.setting import set_drop_path

RATES = (0.0, 0.1, 0.2, 0.4, 0.6, 0.8)

FOREIGN = ("timm/convnext_tiny", "timm/vit_small_patch16_224", "timm/efficientnet_b0")
"""For the break-even rate of other libraries' branches."""


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
        self._counts.add(batch, count, count)
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


class UnderAutocast(nn.Module):
    """A model whose forward pass runs in a precision."""

    def __init__(self, model: nn.Module, precision: str) -> None:
        super().__init__()
        self.model, self.precision = model, precision

    def forward(self, x: Tensor) -> Tensor:
        """The model's own."""
        with autocast(x.device, self.precision):
            return self.model(x)


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


def add_parsers(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Adds `drop-path` and `limits` to the command line."""
    savings = commands.add_parser(
        "drop-path",
        help="blocks, branches or models: mask, skip, timm's and DINOv2's scheme over rates",
        parents=[common],
    )
    savings.add_argument(
        "--subjects",
        nargs="+",
        help="blocks, branches (also foreign: of other libraries' models), or models of the zoo",
        default=["blocks", "poolformer_s12", "caformer_s18", "vit_small_patch16_224"],
    )
    savings.add_argument("--variants", nargs="+", default=["mask", "skip", "timm", "floored"])
    savings.add_argument("--rates", nargs="+", type=float, default=list(RATES))
    savings.add_argument("--profiles", nargs="+", default=["linear", "constant"])
    savings.add_argument("--precision", choices=PRECISIONS, default="float32")
    savings.add_argument("--batch", type=int, default=16, help="of whole models")
    savings.add_argument("--block-batch", type=int, default=32)
    savings.add_argument("--rounds", type=int, default=7)
    add_threads(savings)
    savings.set_defaults(run=drop_path_benchmark)
    limits = commands.add_parser("limits", help="what skipping could gain at most, by blocks' times", parents=[common])
    limits.add_argument("--models", nargs="+", default=["poolformer_s12", "caformer_s18", "vit_small_patch16_224"])
    limits.add_argument("--rate", type=float, default=0.4)
    limits.add_argument("--batch", type=int, default=16)
    limits.add_argument("--rounds", type=int, default=3)
    add_threads(limits)
    limits.set_defaults(run=limits_benchmark)


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
    if "foreign" in args.subjects:
        for name in FOREIGN:
            subjects.append((f"{name} branches", lambda name=name: (_whole(name), (3, 224, 224)), args.batch))
    for name in args.subjects:
        if name not in ("blocks", "branches", "foreign"):
            subjects.append((name, lambda name=name: (_whole(name), (3, 224, 224)), args.batch))
    for title, make, batch in subjects:
        model, shape = make()
        model.to(device)
        images = torch.randn(batch, *shape, device=device)
        break_even = 0.0 if " branch" in title else None  # of branches it is what we look for
        for profile in ["constant"] if " " in title else args.profiles:
            for rate in args.rates:
                built = variants(model, rate, profile, break_even)
                chosen = [key for key in built if key in args.variants or key == "mask"]
                models: dict[str, nn.Module] = {key: UnderAutocast(built[key], args.precision) for key in chosen}
                result = interleaved(models, images, args.rounds)
                dropped = dropped_compute(model, rate, profile, shape)
                row = {
                    "subject": title,
                    "precision": args.precision,
                    "batch": batch,
                    "profile": profile,
                    "rate": rate,
                    "compute_dropped": dropped,
                }
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
    model = create_model(name, num_classes=1000)
    use_fast_layers(model)
    return model
