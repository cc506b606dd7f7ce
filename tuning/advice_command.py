"""`python tune.py advise --config FILE [key=value ...]`: a drop-path rate to start from, with what it rests on."""

import argparse
import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from files.errors import ConfigError, run_command
from training.config import DEFAULT_CONFIG, TrainConfig, load_config
from tuning.advice import Advice, advise
from tuning.published import Row, load_published

_PURPOSES = {"train": "training from scratch", "finetune": "fine-tuning", "probe": "a linear probe"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of `tune.py advise`."""
    parser = argparse.ArgumentParser(prog="tune.py advise", description=__doc__, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a value of the config")
    parser.add_argument(
        "--config", type=Path, help="a training config, as for train.py; default: the handwritten digits"
    )
    parser.add_argument("--images", type=int, metavar="N", help="training images, where the data are not at hand")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0 done, 1 failed while running, 2 a mistake in what was given."""
    args = parse_args(argv)
    return run_command(lambda: tell(args))


def tell(args: argparse.Namespace) -> int:
    """Prints the advice for a config."""
    if args.images is not None and args.images < 1:
        raise ConfigError(f"--images: must be at least 1, got {args.images}")
    config = load_config(args.config, args.overrides)
    advice = advise(config, images=args.images)
    commands = next_commands(args.config, args.overrides, config, advice)
    print(json.dumps(as_json(advice, commands), indent=2) if args.json else describe(advice, commands))
    return 0


def as_json(advice: Advice, commands: list[str]) -> dict[str, Any]:
    """All of the advice as plain data."""
    rows = [row.model_dump(exclude_none=True) for row in advice.rows]
    return {**asdict(advice), "rows": rows, "commands": commands}


def describe(advice: Advice, commands: list[str]) -> str:
    """All of the advice for people."""
    facts = advice.facts
    images = "unknown number of" if facts.images is None else f"{facts.images:,}"
    steps = "" if facts.steps is None else f", {facts.steps:,} optimizer steps by this number of processes"
    start = f" from {facts.pretraining} weights" if facts.pretraining else ""
    published = "nothing is published for this very model and purpose"
    if advice.published is not None:
        published = f"{advice.published:g}, {advice.published_profile}"
    lines = [
        f"model      {facts.model}: {facts.blocks} residual blocks, {facts.params:.3g} M parameters with 1,000 classes",
        f"data       {images} training images ({facts.images_from})",
        f"length     {facts.epochs} epochs{steps}",
        f"purpose    {_PURPOSES[facts.purpose]}{start}",
        f"published  {published}",
        f"advice     start at drop_path.rate {advice.rate:g}, profile {advice.profile}; search from {advice.low:g} to "
        f"{advice.high:g}",
        "",
        *(f"- {reason[0].upper()}{reason[1:]}." for reason in advice.reasons),
        "",
        *table(advice.rows),
        *(f"warning: {warning}" for warning in advice.warnings),
        *([""] if advice.warnings else []),
        "next:",
        *(f"  {command}" for command in commands),
    ]
    return "\n".join(lines)


def table(rows: list[Row]) -> list[str]:
    """The published rates as aligned lines; none for none."""
    if not rows:
        return []
    known = load_published()
    cells = [("model", "rate", "profile", "conditions", "source")]
    for row in rows:
        profile = row.profile if row.schedule == "constant" else f"{row.profile}, {row.schedule}"
        label = f"{known.families[row.family].label} {row.size}"
        cells.append((label, f"{row.rate:g}", profile, row.conditions, row.source))
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells] + [""]


def next_commands(file: Path | None, overrides: list[str], config: TrainConfig, advice: Advice) -> list[str]:
    """Commands to go on with: the advised run."""
    settings = [f"drop_path.rate={advice.rate:g}"]
    if advice.rate and config.drop_path.profile != advice.profile:
        settings.append(f"drop_path.profile={advice.profile}")
    elif isinstance(config.drop_path.profile, list):
        settings.append("drop_path.profile=linear")
    if config.drop_path.rate_is != "max":
        settings.append("drop_path.rate_is=max")
    replaced = {setting.partition("=")[0] for setting in settings}
    kept = [word for word in overrides if word.partition("=")[0].strip() not in replaced]
    words = ["python", "train.py", "--config", str(file or DEFAULT_CONFIG), *kept, *settings]
    return [shlex.join(words if file else words[:2] + words[4:])]


if __name__ == "__main__":
    sys.exit(main())
