"""`python tune.py advise --config FILE [key=value ...]`: a drop-path rate to start from, with what it rests on."""

import argparse
import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs import CONFIGS
from files.errors import ConfigError, run_command
from files.strict_yaml import dump_yaml
from files.words import counted
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
    command = next_command(args.config, args.overrides, config, advice)
    study = next_study(args.config, args.overrides, config, advice)
    print(json.dumps(as_json(advice, command, study), indent=2) if args.json else describe(advice, command, study))
    return 0


def as_json(advice: Advice, command: str, study: dict[str, Any]) -> dict[str, Any]:
    """All of the advice as plain data."""
    rows = [row.model_dump(exclude_none=True) for row in advice.rows]
    return {**asdict(advice), "rows": rows, "command": command, "study": study}


def describe(advice: Advice, command: str, study: dict[str, Any]) -> str:
    """All of the advice for people."""
    facts = advice.facts
    images = "unknown number of training images" if facts.images is None else counted(facts.images, "training image")
    steps = "" if facts.steps is None else f", {counted(facts.steps, 'optimizer step')}"
    start = f" from {facts.pretraining} weights" if facts.pretraining else ""
    published = "nothing is published for this very model and purpose"
    if advice.published is not None:
        published = f"{advice.published:g}, {advice.published_profile}"
    lines = [
        f"model      {facts.model}: {counted(facts.blocks, 'residual block')}, {facts.params:.3g} M parameters with "
        "1,000 classes",
        f"data       {images} ({facts.images_from})",
        f"length     {counted(facts.epochs, 'epoch')}{steps}",
        f"purpose    {_PURPOSES[facts.purpose]}{start}",
        f"published  {published}",
        f"advice     start at drop_path.rate {advice.rate:g}, profile {advice.profile}; search from {advice.low:g} to "
        f"{advice.high:g}",
        "",
        *(f"- {reason}" for reason in advice.reasons),
        "",
        *table(advice.rows),
        *(f"warning: {warning}" for warning in advice.warnings),
        *([""] if advice.warnings else []),
        f"next       {command}",
    ]
    if study:
        text = dump_yaml(study).rstrip().replace("\n", "\n             ")
        lines += [f"or search  python tune.py --config study.yaml, and in study.yaml:\n             {text}"]
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


def next_command(file: Path | None, overrides: list[str], config: TrainConfig, advice: Advice) -> str:
    """The training command of a config with what is advised."""
    settings = {"drop_path.rate": f"{advice.rate:g}", **_settings(config, advice)}
    kept = [word for word in overrides if word.partition("=")[0].strip() not in settings]
    words = ["python", "train.py", *([] if file is None else ["--config", str(file)])]
    return shlex.join([*words, *kept, *(f"{key}={value}" for key, value in settings.items())])


def next_study(file: Path | None, overrides: list[str], config: TrainConfig, advice: Advice) -> dict[str, Any]:
    """A study of the advised range; empty where no rate has an effect."""
    if advice.low == advice.high:
        return {}
    given: dict[str, Any] = {}
    plain = config.model_dump(exclude_unset=True)
    for key in dict.fromkeys(word.partition("=")[0].strip() for word in overrides):
        value: Any = plain
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if key != "drop_path.rate" and value is not None:
            given[key] = value
    given |= _settings(config, advice)
    study: dict[str, Any] = {"train": str(file or DEFAULT_CONFIG.relative_to(CONFIGS.parent))}
    study |= {"overrides": given} if given else {}
    return study | {"space": {"drop_path.rate": {"low": advice.low, "high": advice.high}}}


def _settings(config: TrainConfig, advice: Advice) -> dict[str, str]:
    """What must be set beside the rate for it to be what is advised."""
    settings = {}
    if config.drop_path.profile != advice.profile:
        settings["drop_path.profile"] = advice.profile
    if config.drop_path.rate_is != "max":
        settings["drop_path.rate_is"] = "max"
    return settings


if __name__ == "__main__":
    sys.exit(main())
