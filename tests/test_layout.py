"""The shape of the project: imports run one way, every YAML is what it claims to be."""

import ast
from pathlib import Path

import pytest
import torch

from configs import CONFIGS
from models.factory import create_model
from training.config import load_config

ROOT = Path(__file__).resolve().parents[1]
# What each package may import of ours.
ALLOWED = {
    "layers": {"layers"},
    "configs": set(),
    "models": {"models", "layers", "configs"},
    "training": {"training", "models", "layers", "configs"},
}
OURS = {*ALLOWED, *(path.stem for path in ROOT.glob("*.py"))}


def imported(path: Path) -> set[str]:
    """Top-level names of all that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_run_one_way(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        wrong = imported(path) & OURS - ALLOWED[package]
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_layers_import_torch_only() -> None:
    for path in (ROOT / "layers").rglob("*.py"):
        foreign = imported(path) & {"timm", "torchvision", "numpy", "pydantic", "yaml", "sklearn"}
        assert not foreign, f"{path.name} imports {sorted(foreign)}"


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


def test_every_source_file_is_tested() -> None:
    for package in ("layers", "models", "training"):
        for path in (ROOT / package).glob("[a-z]*.py"):
            assert (ROOT / "tests" / package / f"test_{path.name}").exists(), f"no test for {package}/{path.name}"
