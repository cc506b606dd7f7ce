"""How each architecture of timm and torchvision skips, as a table."""

import argparse
import gc
import json
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import nn

from benchmarks.measure import ROOT, Commands
from layers.drop_path import DropPath
from stochastic_depth.graft import grafted
from stochastic_depth.places import find_owners, foreign_rate, misplaced
from stochastic_depth.proof import randomise_scales, verify_skip
from stochastic_depth.report import drop_path_report
from stochastic_depth.setting import set_drop_path

# Small architectures of many families of timm and torchvision, one a line.
ARCHITECTURES = ROOT / "benchmarks" / "architectures.txt"

RULES = {
    "CrossVit": "two rows of blocks side by side there, which count their depth once",
    "NextViT": "three branches of a block share out its rate there",
    "VOLO": "as ours but for its outlook blocks, which ignore the rate there",
}
"""Families whose own rule is neither linear over blocks nor constant."""


def add_parsers(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Adds `any-model` to the command line."""
    parser = commands.add_parser(
        "any-model", help="set_drop_path on architectures of timm and torchvision", parents=[common]
    )
    parser.add_argument("--architectures", nargs="+")
    parser.add_argument("--markdown", type=Path)
    parser.set_defaults(run=any_model_table)


def any_model_table(args: argparse.Namespace) -> dict[str, Any]:
    """set_drop_path on others' architectures: what skips how, rates against a fresh build, skip against mask."""
    rows = []
    for name in args.architectures or ARCHITECTURES.read_text().split():
        row: dict[str, Any] = {"architecture": name}
        try:
            row |= _check_architecture(name)
        except Exception as error:  # every refusal belongs into the table, whatever raised it
            row["refused"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
        rows.append(row)
        print(json.dumps(row), flush=True)
        gc.collect()
    if args.markdown:
        args.markdown.write_text(_markdown(rows))
    return {"rows": rows}


def _build(name: str, rate: float | None = None) -> tuple[nn.Module, tuple[int, int, int]]:
    """A model of timm, or of torchvision where the name begins with `torchvision/`, and its input size."""
    source, _, inner = name.rpartition("/")
    if source == "torchvision":
        more: dict[str, Any] = {} if rate is None else {"stochastic_depth_prob": rate}
        return torchvision.models.get_model(inner, num_classes=4, **more), (3, 224, 224)
    more = {} if rate is None else {"drop_path_rate": rate}
    model = timm.create_model(name, num_classes=4, **more)
    return model, model.pretrained_cfg["input_size"]  # type: ignore[index, return-value]


def _check_architecture(name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model, size = _build(name)
    model.train()
    randomise_scales(model)
    keys = list(model.state_dict())
    images = torch.randn(4, *size)
    set_drop_path(model, 0.2, input_size=size)
    agreement = _compare_rates(model, name, 0.2)
    for mode in ("mask", "batch", "skip"):
        set_drop_path(model, 0.6, profile="constant", mode=mode, input_size=size)  # type: ignore[arg-type]
        model.zero_grad()
        model(images).sum().backward()
    assert list(model.state_dict()) == keys, "state-dict keys changed"
    alarms = drop_path_report(model, input_size=size).warnings
    applied = [m for m in grafted(model) if m.applied]
    roles = [m.role for m in applied]
    for module in model.modules():  # what another batch does to statistics is not what is compared
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)):
            module.eval()
    deviation = float(f"{verify_skip(model, images):.2g}")
    return {
        "class": type(model).__name__,
        "modules": len(roles),
        "branch": roles.count("branch"),
        "block": roles.count("block") + roles.count("silent"),
        "mask": roles.count("mask"),
        "no_shortcut": len(list(grafted(model))) - len(applied),
        "reasons": sorted({m.reason for m in applied if m.role == "mask" and m.reason}),
        "rates": agreement,
        "alarms": alarms,
        "max_relative_deviation": deviation,
    }


def _compare_rates(model: nn.Module, name: str, rate: float) -> str:
    """How the rates that `set_drop_path` gave differ from those of a fresh build at that rate, in words."""
    try:
        fresh, _ = _build(name, rate)
    except TypeError:
        return "takes no rate there"
    ours = [[s.drop_prob for s in o.slots.values() if isinstance(s, DropPath)] for o in find_owners(model)]
    built = [[foreign_rate(s) for s in o.slots.values()] for o in find_owners(fresh)]
    if any(misplaced(o) for o in find_owners(fresh)):  # its own place is another one than ours
        built = [[foreign_rate(getattr(o.module, "drop_path", None))] for o in find_owners(fresh)]
    pairs = [p for a, b in zip(ours, built, strict=True) for p in zip(a, b, strict=True)]
    if all(abs(a - b) < 1e-6 for a, b in pairs):
        return "equal"
    if not any(b for _, b in pairs):
        return "takes no rate there"
    if len({b for _, b in pairs}) == 1:
        return "constant there"
    blocks = len(pairs)
    if all(abs(b - rate * i / blocks) < 1e-6 for i, (_, b) in enumerate(pairs)):
        return f"rate * i / {blocks} there, so that no block reaches the rate"
    return RULES.get(type(model).__name__, "another rule there")


def _markdown(rows: list[dict[str, Any]]) -> str:
    good = [r for r in rows if "refused" not in r]
    lines = [
        "# Stochastic depth on architectures of timm and torchvision",
        "",
        "Made by `python benchmark.py any-model --markdown docs/any-model.md`. Each model was built at rate 0; "
        "`set_drop_path` set",
        "its rates, forward and backward ran in the modes mask, batch and skip, and skip was compared with masking the same",
        "samples, outputs and gradients, with randomised scales. The report raised "
        + ("no alarm." if not any(r["alarms"] for r in good) else "the alarms named below."),
        "",
        "Columns: drop-path modules that skip per branch, with their whole block, or only mask; places in blocks without a",
        "shortcut; rates (`linear`) against a fresh build at that rate; the largest deviation, relative to each tensor's",
        "largest value.",
        "",
        f"{len(good)} architectures of {len({r['class'] for r in good})} classes; {len(rows) - len(good)} refused.",
        "",
        "| architecture | class | branch | block | mask | no shortcut | rates | deviation | why masked |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in good:
        lines.append(
            f"| {r['architecture']} | {r['class']} | {r['branch']} | {r['block']} | {r['mask']} | {r['no_shortcut']} | "
            f"{r['rates']} | {r['max_relative_deviation']:g} | {'; '.join(r['reasons'])} |"
        )
    if alarms := [f"- `{r['architecture']}`: {alarm}" for r in good for alarm in r["alarms"]]:
        lines += ["", "Alarms:", "", *alarms]
    refused = [r for r in rows if "refused" in r]
    if refused:
        lines += ["", "Refused:", ""] + [f"- `{r['architecture']}`: {r['refused']}" for r in refused]
    return "\n".join(lines) + "\n"
