"""Weights for use elsewhere: `python export.py --model NAME|YAML --checkpoint PATH --format onnx --output FILE`."""

from training.threads import wait_passively

wait_passively()  # before torch loads

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

import torch

from files.errors import ConfigError, run_command
from files.outputs import Kept, refuse_overwriting
from files.strict_yaml import Document, annotation_at, set_overrides
from files.words import counted
from models.config import MetaFormerConfig
from models.export import (
    FORMATS,
    Exported,
    check_output,
    compare_speed,
    count_classes,
    export_model,
)
from models.factory import create_model, model_facts, set_class_names
from models.loading import trained_config, trained_foreign
from models.metaformer import MetaFormer
from models.pruning import blocks_of, chosen_blocks, named_blocks, without_blocks
from models.registry import is_path, model_config, published_config
from models.timm_facts import is_foreign
from models.weights import CONFIG, files_read, load_weights


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of export.py."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="an argument of create_model, a config key")
    parser.add_argument("--model", metavar="NAME|YAML", help="default: the model that a run's best folder names")
    parser.add_argument("--checkpoint", type=Path, metavar="PATH", help="weights: a run's best folder, or a file")
    parser.add_argument("--format", required=True, choices=FORMATS, help="what to write")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="PATH", help="a folder; for onnx and torch a file"
    )
    parser.add_argument(
        "--drop-blocks",
        metavar="LIST|FILE",
        help="without these residual blocks: 4,5, or blocks.json[:N] of validate.py",
    )
    parser.add_argument("--force", action="store_true", help="replace an export that is there")
    parser.add_argument("--benchmark", action="store_true", help="compare speed with the model's, on this CPU")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0 done, 1 failed while running, 2 a mistake in what was given."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout, force=True)
    logging.getLogger("models").setLevel(logging.INFO)  # ours, not what every pass of an exporter has to say
    return run_command(lambda: export(args))


def export(args: argparse.Namespace) -> int:
    """Builds the model, writes it, and says what was written."""
    check_output(args.format, args.output, force=args.force)  # before the weights are read
    refuse_own_source(args)
    wanted = None if args.drop_blocks is None else named_blocks(args.drop_blocks)
    overrides = parse_overrides(args.overrides)
    model = build(args, overrides)
    dropped = [] if wanted is None else chosen_blocks(wanted, blocks_of(model))
    if dropped:
        model = without_blocks(model, dropped)
    if args.checkpoint is None and not overrides.get("pretrained"):
        print("warning: no --checkpoint, no pretrained=true: the weights are freshly initialised", file=sys.stderr)
    exported = export_model(model, args.format, args.output, force=args.force)
    print(describe(args.output, exported))
    if dropped:
        told = ", ".join(f"{block.number} ({block.name})" for block in dropped)
        print(f"  without block{'s' * (len(dropped) > 1)} {told}; logits are those of the model with them switched off")
    if args.benchmark:
        before, after = compare_speed(model, exported.run)
        print(
            f"batch 8, torch {torch.__version__}, threads {torch.get_num_threads()}: model {before:.1f} images/s, "
            f"export {after:.1f} images/s ({after / before:.2f} x), medians of 15 rounds in turns"
        )
    return 0


def refuse_own_source(args: argparse.Namespace) -> None:
    """Refuses to replace what the export is made from.

    Raises:
        ConfigError: Naming the output.
    """
    kept: list[Kept] = []
    if args.checkpoint is not None:
        kept += [(file, "holds the weights that --checkpoint names") for file in files_read(args.checkpoint)]
    if args.model is not None and is_path(args.model):
        kept.append((args.model, "holds the YAML that --model names"))
    for file in [args.output, *(args.output.iterdir() if args.output.is_dir() else ())]:
        refuse_overwriting(f"--output {args.output}", file, kept)


def build(args: argparse.Namespace, overrides: dict[str, Any]) -> MetaFormer | Any:
    """The model to export, with its weights and no classifier but theirs."""
    names = overrides.get("class_names")  # create_model would replace the classifier where they differ
    overrides = {key: value for key, value in overrides.items() if key != "class_names"}
    source, described = args.model, {}
    if args.checkpoint is not None:
        state, saved = load_weights(args.checkpoint)
        if source is None:
            source, described = _read_config(args.checkpoint, saved)
            overrides = described | overrides
        trained, wanted = count_classes(state, _classifier(source, described)), overrides.get("num_classes")
    elif source is None:
        raise ConfigError("give --model NAME|YAML, or --checkpoint with a run's best folder, which names its model")
    else:
        published = source
        if overrides.get("pretrained") and not is_foreign(source) and (config := model_config(source)).pretrained:
            published = published_config(config, config.pretrained[0])
        wanted = overrides.get("num_classes")
        trained = model_facts(published).pretrained_cfg["num_classes"] if overrides.get("pretrained") else wanted
    if wanted and trained is not None and wanted != trained:
        raise ConfigError(
            f"the weights have {counted(trained, 'class')}, a classifier of {wanted} would be untrained; "
            f"give num_classes={trained}, or num_classes=0 to export the features before it"
        )
    model = create_model(source, checkpoint=args.checkpoint, **overrides)
    if names is not None:
        set_class_names(model, names)
    return model


def _classifier(source: str | MetaFormerConfig, arguments: dict[str, Any]) -> str:
    """The name of a model's classifier, the first of several."""
    found = model_facts(source, **arguments).pretrained_cfg.get("classifier")
    if found is None:  # torchvision does not tell
        with torch.device("meta"):
            found = create_model(source, **arguments).pretrained_cfg["classifier"]
    return found if isinstance(found, str) else found[0]


def _read_config(checkpoint: Path, saved: dict[str, Any] | None) -> tuple[str | MetaFormerConfig, dict[str, Any]]:
    """The model that a folder of weights is of: what `create_model` takes first, and further arguments."""
    if saved is not None and saved.get("format") == "folded":
        raise ConfigError(f"--checkpoint {checkpoint} is an export (folded); give the weights it was made from")
    origin = f"{checkpoint / CONFIG if checkpoint.is_dir() else checkpoint}"
    if (foreign := trained_foreign(saved or {})) is not None:
        return foreign
    config = trained_config(saved or {}, origin)
    if config is None:
        raise ConfigError(f"--checkpoint {checkpoint} does not say which model it is of; give --model NAME|YAML")
    return config, {}


def parse_overrides(words: list[str]) -> dict[str, Any]:
    """`head.order=pool_norm` -> {"head": {"order": "pool_norm"}}; see `set_overrides`.

    Raises:
        ConfigError: A word that cannot be.
    """

    def annotation(key: str) -> Any:
        if key in ("name", "checkpoint"):
            raise ConfigError(f"this is what --{key.replace('name', 'model')} is for")
        return annotation_at(MetaFormerConfig, key)  # other keys are create_model's, none of them text

    document = Document({}, "")
    set_overrides(document, words, annotation=annotation, example="num_classes=10")
    if not isinstance(pretrained := document.data.get("pretrained", False), bool):
        raise ConfigError(f"pretrained: must be true or false, got {pretrained!r}")
    return document.data


def describe(output: Path, exported: Exported) -> str:
    """What was written, in one line."""
    files = [exported.path] if exported.path.is_file() else list(exported.path.iterdir())
    size = sum(file.stat().st_size for file in files) / 1e6
    return f"{output} ({size:.1f} MB): {exported.about}; largest relative error {exported.error:.1e} at batch 1 and 3"


if __name__ == "__main__":
    sys.exit(main())
