"""The zoo at a glance: a table of models, or one model stage by stage.

    python -m models [PATTERN ...]            models whose names match, all by default; a YAML of one's own works too
    python -m models 'NAME.*'                 its published weights by their tags
    python -m models NAME --stages            what each stage holds and costs

Parameters and multiply-accumulates are counted on the meta device, from a model with one block per stage: the blocks of
a stage are alike. Frozen parameters stand apart, behind a +. Published figures are those of the YAMLs.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase

from files.errors import ConfigError, nearest, run_command
from files.words import counted
from models.config import MetaFormerConfig
from models.counting import Part, count_parts
from models.registry import is_path, list_models, model_config


def zoo_table(configs: Sequence[MetaFormerConfig]) -> str:
    """One line per model."""
    rows = [("name", "params M", "MACs G", "input", "top-1", "drop path", "published weights")]
    for config in configs:
        parts, facts = count_parts(config), config.published
        rows.append(
            (
                config.name,
                _millions(parts, 1),
                f"{sum(p.macs for p in parts) / 1e9:.2f}",
                "x".join(map(str, (config.in_chans, *config.height_width))),
                _number(facts and facts.top1, "{:.1f}"),
                _number(facts and facts.drop_path_rate, "{:g}"),
                " ".join(config.pretrained),
            )
        )
    return _aligned(rows, left=(0, 6))


def stage_table(config: MetaFormerConfig) -> str:
    """One line per stage, and the sum."""
    parts = count_parts(config)
    total_macs = sum(p.macs for p in parts)
    rows = [("part", "positions", "channels", "token mixer", "norm", "blocks", "params M", "MACs G", "MACs")]
    for part in parts:
        rows.append(
            (
                part.name,
                "x".join(map(str, part.positions)) if part.positions else "",
                str(part.channels),
                part.mixer,
                part.norm,
                str(part.blocks or ""),
                _millions([part], 2),
                f"{part.macs / 1e9:.2f}",
                f"{part.macs / total_macs:.1%}",
            )
        )
    total = str(sum(config.depths)), _millions(parts, 2), f"{total_macs / 1e9:.2f}", "100.0%"
    rows.append(("total", "", "", "", "", *total))
    size = "x".join(map(str, (config.in_chans, *config.height_width)))
    return f"{config.name}, images of {size}, {counted(config.num_classes, 'class')}\n" + _aligned(rows, left=(0, 3, 4))


def _millions(parts: Sequence[Part], digits: int) -> str:
    """Parameters, and behind a + the frozen ones, which published figures leave out."""
    frozen = sum(p.frozen for p in parts)
    trained = f"{(sum(p.params for p in parts) - frozen) / 1e6:.{digits}f}"
    return f"{trained} + {frozen / 1e6:.{digits}f}" if frozen else trained


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _aligned(rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            f"{cell:{'<' if i in left else '>'}{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def find(patterns: Sequence[str]) -> list[MetaFormerConfig]:
    """Configs of the names that match, of names with a tag, and of YAML files, in the order given, each once.

    Raises:
        ConfigError: A pattern matches nothing, or a YAML is wrong.
    """
    found: dict[str, MetaFormerConfig] = {}
    for pattern in patterns or ["*"]:
        if is_path(pattern) or (not set(pattern) & set("*?[") and not list_models(pattern)):
            names = [pattern]  # model_config knows tags, and what to suggest
        else:
            names = list_models(pattern) or _list_tagged(pattern)
        if not names:
            plain = re.sub(r"[*?\[\]]", "", pattern)
            raise ConfigError(f"no model matches {pattern!r}{nearest(plain, list_models())}")
        for name in names:
            config = model_config(name)
            found[name] = config if is_path(name) else config.model_copy(update={"name": name})  # a tag is shown
    return list(found.values())


def _list_tagged(pattern: str) -> list[str]:
    """NAME.TAG of published weights, those that match; the tags of a model in its own order."""
    names = list_models(pattern.partition(".")[0]) if "." in pattern else []
    return [f"{n}.{tag}" for n in names for tag in model_config(n).pretrained if fnmatchcase(f"{n}.{tag}", pattern)]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, or 2 for a mistake."""
    parser = argparse.ArgumentParser(prog="python -m models", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help="names, such as 'caformer_*', or YAML files")
    parser.add_argument("--stages", action="store_true", help="show the models stage by stage")
    args = parser.parse_args(argv)

    def show() -> int:
        configs = find(args.patterns)
        print("\n\n".join(map(stage_table, configs)) if args.stages else zoo_table(configs), flush=True)
        return 0

    return run_command(show)


if __name__ == "__main__":
    sys.exit(main())
