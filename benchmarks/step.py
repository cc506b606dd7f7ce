"""A whole training step side by side with timm's, over drop rates, and beside the limit of the machine.

A step is forward pass, cross-entropy, backward pass, optimizer step and `zero_grad`. The sides take turns in one process,
each round beginning with another; ratios are of pairs of one round. In float32 or under autocast to bfloat16, all sides
alike:

- `masked` and `skipping`: our model, modes `mask` and `skip`, with the optimizer that the trainer builds. A model of timm
  (`timm/NAME`) has `skipping` alone: timm's model with our stochastic depth, in channels-last memory.
- `timm` and `timm channels_last`: timm's model with its own drop path at the same rates and its own AdamW.
- `limit`: see `benchmarks.limit`.

Nothing is measured before both sides were seen to compute the same, logits and gradients, with equal weights
(`benchmarks.sides`).
"""

import argparse
import gc
import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.limit import Limit, Placed, Pool, Ways, find_operations
from benchmarks.measure import Commands, add_threads, facts, paired_ratio, peak_allocated, seconds_of, take_turns
from benchmarks.sides import (
    CLASSES,
    LOGITS_TOLERANCE,
    OURS,
    PRECISIONS,
    THEIRS,
    Pair,
    Precision,
    Setting,
    autocast,
    build_model,
    build_side,
    check_name,
    check_rates,
    make_pair,
    our_rates,
    their_rates,
)
from files.errors import ConfigError, Failure
from models.fold import fold_scales
from stochastic_depth.blocks import find_blocks

MODELS = (
    "poolformer_s12",
    "convformer_s18",
    "caformer_s18",
    "vit_small_patch16_224",
    "timm/convnext_tiny",
    "timm/swin_tiny_patch4_window7_224",
)
INFERENCE_BATCHES = (1, 32)


class Case(NamedTuple):
    """One row of the table."""

    model: str
    precision: Precision
    setting: Setting


SETTINGS = (Setting(0.0), Setting(0.1), Setting(0.4), Setting(0.4, "constant"))
QUICK = (
    Case("poolformer_s12", "float32", Setting(0.0)),
    Case("poolformer_s12", "float32", Setting(0.4)),
    Case("poolformer_s12", "bfloat16", Setting(0.4)),
    Case("vit_small_patch16_224", "float32", Setting(0.0)),
    Case("vit_small_patch16_224", "float32", Setting(0.4)),
    Case("timm/convnext_tiny", "float32", Setting(0.4)),
)


class Limits:
    """The limits of one model over its settings; what is found out for one precision serves all.

    Args:
        pair: The model.
        batch: Samples of a step.
        device: That it runs on.
    """

    def __init__(self, pair: Pair, batch: int, device: torch.device) -> None:
        self.operations: list[Placed] = find_operations(build_model(pair, "skipping", Setting(0.5)), pair.size)
        dtypes = {precision: getattr(torch, precision) for precision in PRECISIONS}
        self.ways = {precision: Ways(Pool(device, dtype), batch) for precision, dtype in dtypes.items()}

    def build(self, model: nn.Module, precision: Precision) -> Limit:
        """The limit for the rates that a model of ours has."""
        rates = [next(iter(block.drop_paths.values())).drop_prob for block in find_blocks(model)]
        return Limit(self.operations, rates, self.ways[precision])


def measure_case(pair: Pair, limits: Limits, case: Case, batch: int, rounds: int, memory: bool) -> dict[str, Any]:
    """One row: milliseconds of all sides and of the limit, and the ratios of paired rounds.

    Raises:
        Failure: The sides have different drop rates.
    """
    torch.manual_seed(0)
    device = limits.ways[case.precision].pool.device
    images, targets = torch.randn(batch, *pair.size, device=device), torch.randint(CLASSES, (batch,), device=device)
    names = [*(OURS[1:] if pair.foreign else OURS), *THEIRS]
    sides = {name: build_side(pair, name, case.setting, case.precision, images, targets) for name in names}
    rates = our_rates(sides["skipping"].model)
    for name in THEIRS:
        check_rates(case.model, rates, their_rates(sides[name].model))
    limit = limits.build(sides["skipping"].model, case.precision)
    steps: dict[str, Callable[[], Any]] = {name: side.step for name, side in sides.items()}
    runs = {name: partial(seconds_of, run, device) for name, run in {**steps, "limit": limit.run}.items()}
    times = take_turns(runs, rounds, warmup=2)  # by then most numbers of kept samples were seen once
    row: dict[str, Any] = {
        "model": case.model,
        "precision": case.precision,
        "rate": case.setting.rate,
        "profile": case.setting.profile,
        "batch": batch,
        "limit_gmacs": round(limit.macs / 1e9, 2),
        "times": {name: spread(seconds) for name, seconds in times.items()},
        "timm_over": {},
        "over_limit": {name: ratio(times[name], times["limit"]) for name in names},
    }
    for name in names:
        if name in OURS:
            row["timm_over"][name] = {theirs: ratio(times[theirs], times[name]) for theirs in THEIRS}
    if memory:
        row["peak_mb"] = {name: peak_allocated(run, device) for name, run in steps.items()}
    return row


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and minimum, in milliseconds."""
    several = list(seconds) * (2 if len(seconds) == 1 else 1)
    low, middle, high = (1000 * q for q in statistics.quantiles(several, n=4, method="inclusive"))
    return {
        "ms": round(middle, 2),
        "quartiles": [round(low, 2), round(high, 2)],
        "min": round(1000 * min(seconds), 2),
    }


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles of paired ratios."""
    middle, quartiles = paired_ratio(above, below)
    return {"median": middle, "quartiles": quartiles}


def measure_inference(
    pair: Pair, precision: Precision, batch: int, rounds: int, device: torch.device
) -> dict[str, Any]:
    """Images per second in evaluation: ours with folded scales, and timm's in both layouts.

    Raises:
        Failure: They compute different logits.
    """
    torch.manual_seed(0)
    images = torch.randn(batch, *pair.size, device=device)
    models: dict[str, nn.Module] = {
        "folded": fold_scales(pair.ours),
        **{name: pair.theirs() for name in THEIRS},
    }
    with torch.inference_mode():
        folded, expected = (models[name].eval()(images[:2].cpu()) for name in ("folded", "timm"))
    error = float((folded - expected).abs().max() / expected.abs().max())
    if not error <= LOGITS_TOLERANCE:
        raise Failure(f"{pair.name}: folded, its logits differ from timm's by {error:.1e} of the largest")
    runs: dict[str, Callable[[], float]] = {}
    repeats, context = max(1, 8 // batch), autocast(device, precision)
    for name, model in models.items():
        channels_last = name == THEIRS[1] or (name == "folded" and device.type == "cuda")
        layout = torch.channels_last if channels_last else torch.contiguous_format
        model.eval().to(device, memory_format=layout)  # type: ignore[call-overload]

        def passes(model: nn.Module, images: Tensor) -> None:
            with torch.inference_mode(), context:
                for _ in range(repeats):
                    model(images)

        runs[name] = partial(seconds_of, partial(passes, model, images.contiguous(memory_format=layout)), device)
    times = take_turns(runs, rounds)
    better = min(THEIRS, key=lambda name: statistics.median(times[name]))
    return {
        "model": pair.name,
        "precision": precision,
        "batch": batch,
        "images_per_second": {
            name: round(batch * repeats / statistics.median(seconds), 2) for name, seconds in times.items()
        },
        "better_layout": better,
        "timm_over_folded": ratio(times[better], times["folded"]),
    }


def parse_setting(text: str) -> Setting:
    """`RATE` or `RATE:PROFILE`.

    Raises:
        argparse.ArgumentTypeError: It is neither.
    """
    rate, _, profile = text.partition(":")
    try:
        value = float(rate)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < 1.0 or profile not in ("", "linear", "constant"):
        raise argparse.ArgumentTypeError(f"{text!r} is no RATE, RATE:linear or RATE:constant with a rate in [0, 1)")
    return Setting(value, "constant" if profile == "constant" else "linear")


def add_parsers(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Adds `step` to the command line."""
    parser = commands.add_parser(
        "step", help="a whole training step beside timm's and the machine's limit", parents=[common]
    )
    parser.add_argument("--models", nargs="+", metavar="NAME", help=f"default: {' '.join(MODELS)}")
    parser.add_argument(
        "--settings", nargs="+", type=parse_setting, metavar="RATE[:PROFILE]", help="default: 0 0.1 0.4 0.4:constant"
    )
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, help="default: both")
    parser.add_argument("--batch", type=int, help="images of a step; default 16, with --quick 8")
    parser.add_argument("--rounds", type=int, help="default 7, with --quick 3")
    parser.add_argument("--memory", action="store_true", help="the peak memory of a step as well")
    parser.add_argument("--infer", action="store_true", help="images per second in evaluation as well")
    parser.add_argument("--quick", action="store_true", help="six rows, in less than 5 minutes on 2 cores")
    parser.add_argument(
        "--append", action="store_true", help="keep what else the output holds, of the same commit, machine and batch"
    )
    add_threads(parser)
    parser.set_defaults(run=step_benchmark)


def chosen_cases(args: argparse.Namespace) -> list[Case]:
    """The rows to measure, in order.

    Raises:
        ConfigError: `--quick` together with an option that says what it says.
    """
    if not args.quick:
        names, settings = args.models or MODELS, args.settings or SETTINGS
        return [Case(n, p, s) for n in names for p in args.precision or PRECISIONS for s in settings]
    for option in ("models", "settings", "precision"):
        if getattr(args, option) is not None:
            raise ConfigError(f"--quick: chooses models, settings and precisions itself; leave out --{option}")
    return list(QUICK)


def earlier_result(path: Path, cases: Sequence[Case], batch: int, infer: bool) -> dict[str, Any]:
    """What a JSON of this benchmark holds beside what is measured now; nothing where it is empty.

    Args:
        path: Of the JSON.
        cases: That are measured now.
        batch: Images of a step.
        infer: Whether their inference is.

    Raises:
        ConfigError: It was measured at another commit, on another machine, with other versions or another batch.
    """
    text = path.read_text(encoding="utf-8")
    if not text:
        return {"earlier_commands": [], "rows": [], "inference": [], "ways": []}
    old = json.loads(text)
    now = {**facts(), "batch": batch}
    for key, before in ((key, row["batch"] if key == "batch" else old.get(key)) for key in now for row in old["rows"]):
        if before != now[key]:
            raise ConfigError(f"--append: {path} was measured with {key} {before!r}, now it is {now[key]!r}")
    again = {(case.model, case.precision) for case in cases}
    return {
        "earlier_commands": [*old["earlier_commands"], old["command"]],
        "rows": [row for row in old["rows"] if case_of(row) not in cases],
        **{
            key: [each for each in old[key] if not measured or (each["model"], each["precision"]) not in again]
            for key, measured in (("inference", infer), ("ways", True))
        },
    }


def case_of(row: dict[str, Any]) -> Case:
    """What a row is of."""
    return Case(row["model"], row["precision"], Setting(row["rate"], row["profile"]))


def step_benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Training steps of all sides and the limit, row by row; see the module."""
    cases = chosen_cases(args)
    names = list(dict.fromkeys(case.model for case in cases))
    for name in names:
        check_name(name)
    batch, rounds = args.batch or (8 if args.quick else 16), args.rounds or (3 if args.quick else 7)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = True  # as in the trainer, and in convolutions: one precision for all sides
    result: dict[str, Any] = {"earlier_commands": [], "rows": [], "inference": [], "ways": []}
    if args.append:
        result = earlier_result(args.output, cases, batch, args.infer)
    print(HEADER)
    for name in names:
        pair = make_pair(name)
        limits = Limits(pair, batch, device)
        own = [case for case in cases if case.model == name]
        for case in own:
            result["rows"].append(measure_case(pair, limits, case, batch, rounds, args.memory))
            print(line_of(result["rows"][-1]), flush=True)
            gc.collect()
        precisions: dict[Precision, None] = dict.fromkeys(case.precision for case in own)
        for precision in precisions:
            result["ways"].append({"model": name, "precision": precision, "trials": limits.ways[precision].facts()})
            if args.infer and not pair.foreign:  # of a model of timm there is nothing to fold
                for size in INFERENCE_BATCHES:
                    result["inference"].append(measure_inference(pair, precision, size, rounds, device))
                    print(line_of_inference(result["inference"][-1]), flush=True)
    return result


_TIMED, _GAINED, _ABOVE = (*OURS, *THEIRS, "limit"), OURS, (*OURS, THEIRS[1])
_SHORT = {THEIRS[1]: "timm c.l."}
HEADER = (
    f"{'':47}{'ms':<50}{'timm channels_last over':<44}over the limit\n"
    + f"{'model':<24}{'precision':<10}{'setting':<13}"
    + "".join(f"{_SHORT.get(name, name):<10}" for name in _TIMED)
    + "".join(f"{name:<22}" for name in _GAINED)
    + "".join(f"{_SHORT.get(name, name):<10}" for name in _ABOVE)
)


def line_of(row: dict[str, Any]) -> str:
    """A row of the table; ratios with quartiles."""
    case = case_of(row)
    text = f"{case.model.removeprefix('timm/')[:23]:<24}{case.precision:<10}{case.setting!s:<13}"
    for name in _TIMED:
        text += f"{row['times'][name]['ms']:<10.1f}" if name in row["times"] else f"{'-':<10}"
    for name in _GAINED:
        found = row["timm_over"].get(name, {}).get(THEIRS[1])
        text += f"{_in_words(found) if found else '-':<22}"
    for name in _ABOVE:
        text += f"{row['over_limit'][name]['median']:<10.3f}" if name in row["over_limit"] else f"{'-':<10}"
    if "peak_mb" in row:
        text += (
            "\n"
            + " " * 34
            + "peak MiB     "
            + "".join(
                f"{row['peak_mb'][name]:<10.0f}" if name in row["peak_mb"] else f"{'-':<10}" for name in _TIMED[:-1]
            )
        )
    return text


def line_of_inference(row: dict[str, Any]) -> str:
    """A row of the table."""
    speeds = ", ".join(f"{name} {value:.1f}" for name, value in row["images_per_second"].items())
    return (
        f"{row['model'][:23]:<24}{row['precision']:<10}inference at batch {row['batch']}, images/s: {speeds}; "
        f"folded over {row['better_layout']} {_in_words(row['timm_over_folded'])}"
    )


def _in_words(found: dict[str, Any]) -> str:
    return f"{found['median']:.3f} [{found['quartiles'][0]:.3f} {found['quartiles'][1]:.3f}]"
