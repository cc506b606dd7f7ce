"""Whole training steps on a GPU beside timm's, without a hand: goals met or not, and what a device of that kind could do.

A step is forward pass under bfloat16 autocast, cross-entropy, backward pass, optimizer step (AdamW as the trainer builds it)
and `zero_grad`, on random images that lie on the device. A row is one model at one rate, eager or compiled; its sides take
turns, each round beginning with another, and every ratio is of pairs of one round:

- `timm`: timm's model in channels-last memory, with its own drop path at the same rates;
- `masked`, `skipping`: ours in these modes. `timm/NAME` is timm's model with our stochastic depth;
- `timm compiled`: by torch.compile, the whole model; `skipping compiled`: ours, as `--compile` says.

Before the rows each kernel of ours is timed beside torch's form.
A side's first steps are not measured, in which cuDNN gets to know its shapes and what is compiled is.

cuDNN chooses algorithms by its rules, not by trials, on all sides, as it does in the trainer.

The JSON is written anew after every row, so a run that is killed keeps what is done; the run ends by itself within
`--budget` seconds and names the rows that are left. Rows that the goals are about come first.
"""

import argparse
import gc
import itertools
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from types import FrameType
from typing import Any, Literal, NamedTuple, TypeAlias
from unittest.mock import patch

import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath as TimmDropPath
from torch import Tensor, nn

from benchmarks.drop_path import Branches
from benchmarks.gpu_kernels import measure_kernels
from benchmarks.measure import Commands, add_threads, paired_ratio, seconds_of, take_turns, wait
from benchmarks.roofline import Peak, count_work, peaks
from benchmarks.sides import Side, autocast, check_rates, our_rates, their_rates
from files.errors import ConfigError
from layers.drop_path import BREAK_EVEN, DropPath
from models.factory import create_model
from models.fast_layers import use_fast_layers
from models.layouts import timm_head
from models.registry import model_config
from stochastic_depth.places import find_owners
from stochastic_depth.setting import set_drop_path
from training.compiling import compile_in_place, configure
from training.config import OptimSection
from training.optim import build_optimizer

MODELS = (
    "poolformer_s12",
    "caformer_s18",
    "vit_small_patch16_224",
    "timm/convnext_tiny",
    "poolformer_s36",
    "caformer_s36",
)
EAGER, COMPILED = ("timm", "masked", "skipping"), ("timm compiled", "skipping compiled")
GOALS = {"eager": 1.5, "compiled": 1.25}
"""At rate 0.4: how many times as fast as timm ours must be, skipping, eager against eager and compiled against compiled."""

OPTIM = OptimSection(name="adamw", lr=1e-5)  # so small that steps on noise cannot diverge; it costs no time
CLASSES = 1000
BRANCH_RATES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8)
Form = Literal["eager", "compiled"]
Setting: TypeAlias = tuple[float, Literal["linear", "constant"]]


class Row(NamedTuple):
    """What one row measures: a model at one rate, eager or compiled."""

    model: str
    rate: float
    profile: Literal["linear", "constant"]
    form: Form

    def __str__(self) -> str:
        return f"{self.model} {self.rate:g}{f' {self.profile}' if self.rate else ''} {self.form}"


class BudgetOver(Exception):
    """The time is over in the middle of something."""


def add_parsers(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Adds `gpu` to the command line."""
    parser = commands.add_parser(
        "gpu", help="training steps on a GPU: ours beside timm's, eager and compiled", parents=[common]
    )
    parser.add_argument("--budget", type=float, default=520.0, help="seconds after which it ends by itself")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu for a trial of this script")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--forms", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"])
    parser.add_argument("--branches", nargs="*", default=list(BREAK_EVEN), help="kinds to find the break-even rate of")
    parser.add_argument(
        "--kernels", action=argparse.BooleanOptionalAction, default=True, help="time our kernels beside torch's forms"
    )
    parser.add_argument("--compile", choices=["whole", "blocks"], default="blocks", help="how ours is compiled")
    parser.add_argument("--batch", type=int, default=256, help="halved for a row that does not fit into memory")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="of a side in each round")
    add_threads(parser)
    parser.set_defaults(run=gpu_benchmark)


def plan(models: Sequence[str], forms: Sequence[str], branches: Sequence[str]) -> list[Row | str]:
    """What to measure, in order: rows, and kinds of branches by name.

    The goals' rows come first, and of them the eager ones, which take seconds; then branches, then all other rows.
    """
    first: list[Setting] = [(0.4, "linear")]
    others: list[Setting] = [(0.4, "constant"), (0.1, "linear"), (0.0, "linear")]

    def rows(form: Form, settings: list[Setting]) -> list[Row | str]:
        return [Row(m, rate, profile, form) for rate, profile in settings for m in models if form in forms]

    return [
        *rows("eager", first), *branches, *rows("compiled", first), *rows("eager", others), *rows("compiled", others)
    ]  # fmt: skip


def gpu_benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that fits into the budget; `args.save` is given the result so far after every row.

    Raises:
        ConfigError: The device is not there.
    """
    started = time.monotonic()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {args.device}: no GPU is there; --device cpu --batch 2 tries this script out")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = False
    left = plan(args.models, args.forms, args.branches)
    result: dict[str, Any] = {"rows": [], "break_even": [], "goals": [], "left": []}

    def save() -> None:
        result["goals"] = judge(result["rows"])
        result["left"] = [str(task) for task in left]
        result["seconds"] = round(time.monotonic() - started, 1)
        args.save(result)

    longest = {"eager": 5.0, "compiled": 30.0, "branch": 2.0}  # a first guess at what one takes, in seconds
    try:
        with time_limit(args.budget):
            result["empty_batches"] = empty_batches(device)
            peak, result["peak"] = peaks(device)
            print(f"empty batches: {result['empty_batches']}\npeak: {result['peak']}", flush=True)
            save()
            if args.kernels:
                try:
                    result["kernels"] = measure_kernels(device, args.batch, args.rounds)
                except Exception as error:
                    result["errors"] = [_failed("kernels", error, args.budget - (time.monotonic() - started))]
                for kernel in result.get("kernels") or result["errors"]:
                    print(", ".join(f"{key} {value}" for key, value in kernel.items()), flush=True)
                save()
            for task in list(left):
                kind = "branch" if isinstance(task, str) else task.form
                begun = time.monotonic()
                if args.budget - (begun - started) < longest[kind]:
                    continue  # a shorter one may still fit
                try:
                    if isinstance(task, str):
                        done, into = measure_branch(task, args, device), "break_even"
                    else:
                        done, into = measure_row(task, args, device, peak), "rows"
                except Exception as error:  # nobody is there to start it again: the other rows are worth having
                    done, into = _failed(str(task), error, args.budget - (time.monotonic() - started)), "errors"
                left.remove(task)
                result.setdefault(into, []).append(done)
                longest[kind] = max(longest[kind], time.monotonic() - begun)
                print(in_words(task, done), flush=True)
                save()
                torch._dynamo.reset()
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
    except BudgetOver:
        print("the time is over")
    save()
    for goal in result["goals"]:
        print(f"{'met    ' if goal['met'] else 'NOT met'} {goal['what']}: {goal['measured']}, goal {goal['goal']}")
    if left:
        print(f"not measured: {', '.join(result['left'])}")
    return result


def _failed(what: str, error: Exception, seconds: float) -> dict[str, str]:
    """What is told of something that could not be measured.

    Raises:
        BudgetOver: No seconds are left, which may be why.
    """
    if seconds <= 0:
        raise BudgetOver from error
    return {"what": what, "error": f"{type(error).__name__}: {error}".strip()[:600]}


@contextmanager
def time_limit(seconds: float, again: float = 10.0) -> Iterator[None]:
    """Raises `BudgetOver` inside when the time is over, and again where something swallows it.

    Raises:
        BudgetOver: The time is over.
    """

    def ring(_number: int, _frame: FrameType | None) -> None:
        raise BudgetOver

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, again)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


# ---- what an empty batch does ------------------------------------------------------------------------------------------


def empty_batches(device: torch.device) -> dict[str, str]:
    """`ok` or the error of operations that mode `skip` gives an empty batch when no sample is kept, forward and backward."""

    def attention(dtype: torch.dtype) -> Tensor:
        q, k, v = (torch.randn(0, 4, 49, 32, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
        return F.scaled_dot_product_attention(q, k, v)

    x = torch.randn(0, 64, 7, 7, device=device, dtype=torch.bfloat16, requires_grad=True)  # (B, C, H, W)
    weight = torch.randn(64, 1, 7, 7, device=device, dtype=torch.bfloat16, requires_grad=True)
    matrix = torch.randn(64, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    trials: dict[str, Callable[[], Tensor]] = {
        "attention bfloat16": lambda: attention(torch.bfloat16),
        "attention float32": lambda: attention(torch.float32),
        "depthwise convolution": lambda: F.conv2d(x, weight, padding=3, groups=64),
        "group norm": lambda: F.group_norm(x.float(), 1),
        "layer norm": lambda: F.layer_norm(x.permute(0, 2, 3, 1).float(), (64,)),
        "average pooling": lambda: F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False),
        "linear": lambda: F.linear(x.permute(0, 2, 3, 1), matrix),
    }
    found = {}
    for name, trial in trials.items():
        try:
            trial().float().sum().backward()
            wait(device)
            found[name] = "ok"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"[:300]
    return found


# ---- one row -----------------------------------------------------------------------------------------------------------


def measure_row(row: Row, args: argparse.Namespace, device: torch.device, peak: Peak) -> dict[str, Any]:
    """One row; where it does not fit into memory, all its sides get half the batch.

    Raises:
        Failure: The sides have different drop rates.
        torch.OutOfMemoryError: One sample alone does not fit.
    """
    batch = args.batch
    while True:
        try:
            return measure_at(row, args, device, peak, batch)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        batch //= 2
        torch._dynamo.reset()  # which would keep what was compiled, with its weights
        gc.collect()  # outside of the handler, whose traceback held tensors
        if device.type == "cuda":
            torch.cuda.empty_cache()


def measure_at(row: Row, args: argparse.Namespace, device: torch.device, peak: Peak, batch: int) -> dict[str, Any]:
    """`measure_row` at one batch size."""
    torch.manual_seed(0)
    images = torch.randn(batch, 3, args.image_size, args.image_size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    targets = torch.randint(CLASSES, (batch,), device=device)
    sides = {}
    for name in EAGER if row.form == "eager" else COMPILED:
        model = build(row, name, args.image_size).train()
        model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        sides[name] = Side(model, images, targets, build_optimizer(model, OPTIM, device), autocast(device, "bfloat16"))
    theirs, ours = (sides[name].model for name in (next(iter(sides)), next(reversed(sides))))
    check_rates(row.model, our_rates(ours), their_rates(theirs))
    told: dict[str, Any] = {**row._asdict(), "batch": batch, "image_size": args.image_size}
    if batch < args.batch:
        told["note"] = f"batch {args.batch} does not fit into memory"
    work = {name: count_work(sides[name].step) for name in (next(iter(sides)), next(reversed(sides)))}
    limit = work[next(reversed(sides))].limit_ms(peak)
    if row.form == "compiled":
        configure("blocks")
    found = {name: warm_up(name, side, args.compile) for name, side in sides.items()}
    graphs = graphs_so_far()
    times = seconds_per_step(sides, args.rounds, args.steps, device)
    recompiled = graphs_so_far() - graphs
    for name, seconds in times.items():
        found[name] |= {
            "ms": round(1e3 * statistics.median(seconds), 3),
            "over_limit": round(1e3 * statistics.median(seconds) / limit, 3),
            **{
                f"{other}_over_it": paired_ratio(times[other], seconds)[0]
                for other in times
                if other.startswith("timm")
            },
        }
    told |= {"sides": found, "limit_ms": round(limit, 3)}
    told["work"] = {name: {key: float(f"{value:.4g}") for key, value in asdict(w).items()} for name, w in work.items()}
    return told | ({"recompiled_while_timed": recompiled} if row.form == "compiled" else {})


def build(row: Row, side: str, image_size: int) -> nn.Module:
    """The model of one side on the CPU, not compiled, with its drop rates."""
    name = row.model.removeprefix("timm/")
    if side.startswith("timm"):
        fixed = timm.get_pretrained_cfg(name)
        size: dict[str, Any] = {"img_size": image_size} if fixed is not None and fixed.fixed_input_size else {}
        model = timm.create_model(name, num_classes=CLASSES, drop_path_rate=row.rate, **size)
        if row.rate and row.profile == "constant":
            for owner in find_owners(model):
                for key in owner.slots:
                    setattr(owner.module, key, TimmDropPath(row.rate))
        return model
    more: dict[str, Any] = {"image_size": image_size}
    if name == row.model and (head := timm_head(model_config(name))):
        more["head"] = head  # with which equal weights give timm's logits
    model = create_model(row.model, num_classes=CLASSES, **more)
    mode = "mask" if side == "masked" else "skip"
    set_drop_path(model, row.rate, profile=row.profile, mode=mode, input_size=(3, image_size, image_size))
    if "compiled" not in side:
        use_fast_layers(model)  # as the trainer does
    return model


def warm_up(name: str, side: Side, how: str) -> dict[str, Any]:
    """Compiles a side whose name says so, takes its first steps, and says what that took.

    Args:
        name: Of the side.
        side: Not compiled yet.
        how: `whole` or `blocks`, of ours; timm's is compiled as a whole.
    """
    device = side.images.device
    found: dict[str, Any] = {}
    if name.startswith("skipping"):
        for rounded_up in (False, True):
            with kept_samples(rounded_up):
                side.step()
    if "compiled" in name:
        graphs, breaks, start = graphs_so_far(), breaks_so_far(), time.perf_counter()
        compile_in_place(side.model, "blocks" if how == "blocks" and name.startswith("skipping") else True)
        side.step()
        wait(device)
        found |= {
            "compiled": how if name.startswith("skipping") else "whole",
            "first_step_seconds": round(time.perf_counter() - start, 2),
            "graphs": graphs_so_far() - graphs,
            "graph_breaks": breaks_so_far() - breaks,
        }
    side.step()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        side.step()
        found["peak_mb"] = round((torch.cuda.max_memory_allocated(device) - before) / 2**20, 1)
    return found


@contextmanager
def kept_samples(rounded_up: bool) -> Iterator[None]:
    """Inside it every module keeps as many samples as the rounding says, not as chance does.

    Each of the two batch sizes that a module hands on at one rate is new to cuDNN once, and then costs it some 20 ms for
    each convolution: in the first steps of a run, which are not what is measured.
    """

    def count(module: DropPath, batch: int) -> Tensor:
        return torch.tensor(min(batch, int(batch * (1.0 - module.rate)) + rounded_up))

    with patch.object(DropPath, "_draw_count", count):
        yield


def graphs_so_far() -> int:
    """Graphs that torch.compile made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def breaks_so_far() -> int:
    """Places where torch.compile gave up on one graph."""
    return sum(torch._dynamo.utils.counters["graph_break"].values())


def seconds_per_step(sides: Mapping[str, Any], rounds: int, steps: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of a step of each side, on average over `steps` between two waits for the device, in every round."""

    def several(side: Any) -> float:
        return seconds_of(lambda: [side.step() for _ in range(steps)], device) / steps

    return take_turns({name: partial(several, side) for name, side in sides.items()}, rounds, warmup=0)


# ---- break-even rates --------------------------------------------------------------------------------------------------


@dataclass
class BranchSide:
    """Four branches of one kind, `benchmarks.drop_path.Branches`, in one mode at one rate."""

    model: Branches
    x: Tensor
    mode: Literal["mask", "skip"]
    rate: float

    def step(self) -> None:
        """Forward and backward pass, with the gradient of the input."""
        for module in self.model.drop_paths:
            assert isinstance(module, DropPath)
            module.mode, module.break_even, module.drop_prob = self.mode, 0.0, self.rate
        with torch.autocast(self.x.device.type, dtype=torch.bfloat16):
            out = self.model(self.x)
        out.float().square().mean().backward()
        self.model.zero_grad(set_to_none=True)


def measure_branch(kind: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Mask over skip at several rates, for branches of one kind under autocast, and the rate from which skipping pays."""
    torch.manual_seed(0)
    model = Branches(kind).to(device).train()
    x = torch.randn(args.batch, 14, 14, 320, device=device, dtype=torch.bfloat16, requires_grad=True)
    speedups = {}
    for rate in BRANCH_RATES:
        sides = {mode: BranchSide(model, x, mode, rate) for mode in ("mask", "skip")}
        for side in sides.values():
            side.step()
        times = seconds_per_step(sides, args.rounds, args.steps, device)
        speedups[rate] = paired_ratio(times["mask"], times["skip"])[0]
    return {"kind": kind, "batch": args.batch, "mask_over_skip": speedups, "break_even": crossing(speedups)}


def crossing(speedups: Mapping[float, float]) -> float | None:
    """The rate from which the ratio stays at 1 or above, between two rates by a straight line; `None`: never."""
    found: float | None = None
    for (low, below), (high, above) in itertools.pairwise(sorted(speedups.items())):
        if above < 1.0:
            found = None
        elif below < 1.0:
            found = low + (high - low) * (1.0 - below) / (above - below)
    rates = sorted(speedups)
    if all(speedups[rate] >= 1.0 for rate in rates):
        return rates[0]
    return None if found is None else round(found, 3)


# ---- goals -------------------------------------------------------------------------------------------------------------


def judge(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each goal for each row that it is about."""
    goals = []
    for row in rows:
        name = str(Row(row["model"], row["rate"], row["profile"], row["form"]))
        theirs, ours = ("timm", "skipping") if row["form"] == "eager" else COMPILED
        if row["rate"] == 0.4:
            ratio = row["sides"][ours][f"{theirs}_over_it"]
            goal = GOALS[row["form"]]
            goals.append({"what": f"{name}: {theirs} / {ours}", "goal": goal, "measured": ratio, "met": ratio >= goal})
        if row["form"] == "compiled":
            breaks = row["sides"][ours]["graph_breaks"] + row["recompiled_while_timed"]
            goals.append(
                {"what": f"{name}: graph breaks and recompilations", "goal": 0, "measured": breaks, "met": breaks == 0}
            )
    return goals


def in_words(task: Row | str, done: dict[str, Any]) -> str:
    """A line about what was measured."""
    if "error" in done:
        return f"{task}: {done['error']}"
    if isinstance(task, str):
        return f"{task} branch: break-even {done['break_even']}, mask over skip {done['mask_over_skip']}"
    sides = [
        f"{name} {told['ms']:.1f} ms ({told['over_limit']:.2f} of the limit" for name, told in done["sides"].items()
    ]
    first = next(iter(done["sides"]))
    for i, told in enumerate(done["sides"].values()):
        sides[i] += f", {told[f'{first}_over_it']:.3f}x)"
    return f"{task}, batch {done['batch']}: {', '.join(sides)}"
