"""docs/: what a page shows is run."""

import re
import shlex
from pathlib import Path

import pytest
import timm.models
import torch

import models
from export import parse_args
from models.__main__ import stage_table
from models.registry import model_config, unregister_model

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "models.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """my.yaml as the page writes it."""
    (text,) = blocks("yaml")
    assert len(text.splitlines()) <= 15
    (tmp_path / "my.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    return "my.yaml"


def test_a_model_of_ones_own(mine: str) -> None:
    model = models.create_model(mine, num_classes=10, image_size=64).eval()
    with torch.no_grad():
        assert model(torch.randn(2, 3, 64, 64)).shape == (2, 10)
    config = model_config(mine)
    assert config.token_mixer == ["pooling", "pooling", "sep_conv", "attention"]
    assert "sep_conv" in stage_table(config)


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python(number: int, mine: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = blocks("python")[number]
    if "pretrained=True" in code:
        pytest.skip("needs the network")
    try:
        exec(compile(code, "docs/models.md", "exec"), {})
    finally:
        unregister_model("my")


def test_commands() -> None:
    commands = [line.partition("#")[0] for block in blocks("bash") for line in block.splitlines()]
    exports = [shlex.split(c)[2:] for c in commands if c.startswith("python export.py")]
    assert {parse_args(arguments).format for arguments in exports} == {"timm", "onnx", "torch", "folded"}
    assert all(c.startswith(("python export.py ", "python -m models")) for c in commands)


def test_names_and_links() -> None:
    for pattern in re.findall(r"`([a-z0-9]+_(?:\w+|\*))`", PAGE):
        known = models.list_models(pattern) or pattern in PAGE_WORDS or timm.models.is_model(pattern)
        assert known, f"`{pattern}` is no model"
    for target in re.findall(r"\]\((?!http)([^)#]+)", PAGE):
        assert (ROOT / "docs" / target).exists(), target


# words of the page that look like names of models
PAGE_WORDS = {"num_classes", "in_chans", "drop_path_rate", "drop_path_mode", "img_size", "checkpoint_path", "to_timm",
              "from_timm"}  # fmt: skip
