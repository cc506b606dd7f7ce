"""models/__main__.py: the tables count what the models hold, the picture is drawn the same each time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.__main__ import find, main, stage_table, zoo_table
from models.counting import count_parts
from models.factory import create_model
from models.registry import list_models, model_config

ROOT = Path(__file__).resolve().parents[2]


def test_the_table() -> None:
    lines = zoo_table(find(["caformer_s18", "caformer_n4"])).splitlines()
    assert lines[0].split() == [
        "name",
        "params",
        "M",
        "MACs",
        "G",
        "input",
        "top-1",
        "drop",
        "path",
        "published",
        "weights",
    ]
    assert lines[1].split()[:6] == ["caformer_s18", "26.3", "4.11", "3x224x224", "83.6", "0.15"]
    assert lines[1].endswith("sail_in22k") and lines[2].split()[4:] == ["-", "-"]
    assert lines[0].index("  top-1") + len("  top-1") == lines[1].index("83.6") + len("83.6"), "right-aligned"


def test_the_stages() -> None:
    lines = stage_table(model_config("randformer_s12")).splitlines()
    assert lines[0] == "randformer_s12, images of 3x224x224, 1,000 classes"
    assert [line.split()[0] for line in lines[1:]] == ["part", "stem", *["stage"] * 4, "head", "total"]
    assert "random_mixing  group_norm_no_bias" in lines[5]
    assert lines[-1].split() == ["total", "12", "11.89", "+", "0.24", "1.89", "100.0%"], "frozen matrices stand apart"
    shares = [float(line.split()[-1].rstrip("%")) for line in lines[2:-1]]
    assert sum(shares) == pytest.approx(100, abs=0.4)


def test_patterns(tmp_path: Path) -> None:
    assert [c.name for c in find(["caformer_s*", "poolformer_s12", "caformer_s18"])] == [
        "caformer_s18", "caformer_s36", "poolformer_s12"]  # fmt: skip
    assert [c.name for c in find([])] == list_models()
    mine = tmp_path / "mine.yaml"
    mine.write_text((ROOT / "configs/models/caformer_n4.yaml").read_text())
    assert [c.name for c in find([str(mine)])] == ["mine"]


def test_frozen_parameters_stand_apart_as_in_what_was_published() -> None:
    configs = find(["randformer_s36", "poolformer_s12"])
    facts = configs[0].published
    assert facts is not None and (facts.params, facts.frozen_params) == (30.8, 0.7)
    lines = zoo_table(configs).splitlines()
    assert lines[1].split()[:4] == ["randformer_s36", "30.8", "+", "0.7"] and lines[2].split()[1:3] == ["11.9", "1.81"]
    parts = count_parts(configs[0])
    with torch.device("meta"):
        model = create_model("randformer_s36")
    frozen = [sum(p.numel() for p in stage.parameters() if not p.requires_grad) for stage in model.stages]
    assert [p.frozen for p in parts] == [0, *frozen, 0] and any(frozen)


def test_a_tag_has_its_own_size_and_the_figures_of_its_weights() -> None:
    configs = find(["caformer_s18.sail_in1k_384", "caformer_s18.sail_in1k", "caformer_s18.sail_in22k_ft_in1k"])
    assert configs[0].name == "caformer_s18.sail_in1k_384" and configs[0].image_size == 384
    lines = [line.split()[2:6] for line in zoo_table(configs).splitlines()[1:]]
    assert lines == [
        ["13.37", "3x384x384", "85.0", "0.3"],
        ["4.11", "3x224x224", "83.6", "0.15"],
        ["4.11", "3x224x224", "-", "-"],  # nothing is recorded of them
    ]


def test_a_pattern_with_a_dot_lists_tags() -> None:
    tags = model_config("caformer_s18").pretrained
    assert [c.name for c in find(["caformer_s18.*"])] == [f"caformer_s18.{tag}" for tag in tags]
    assert [c.name for c in find(["c*_s18.sail_in1k_384"])] == [
        f"{n}.sail_in1k_384" for n in ("caformer_s18", "convformer_s18")
    ]


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["caformer_n4", "convformer_n4"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert main(["caformer_n4", "--stages"]) == 0
    assert "stage 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["caformer_s19"], "did you mean 'caformer_s18'?"),
        (["caformer_s18.nope*"], "no model matches 'caformer_s18.nope*'"),
        (["cafromer_s1*"], "no model matches 'cafromer_s1*'; did you mean"),
        (["nowhere.yaml"], "no such file"),
        (["caformer_s18.nope"], "has no published weights 'nope'"),
    ],
)
def test_mistakes(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") <= 3
    assert not list(tmp_path.iterdir())


def test_a_reader_that_stops_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        command = [sys.executable, "-m", "models", "caformer_n4"]
        done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_as_a_module_all_is_listed_without_matplotlib() -> None:
    script = "import sys, runpy; sys.argv = ['models']\ntry: runpy.run_module('models', run_name='__main__')\n"
    script += "except SystemExit as end: assert not end.code\nassert 'matplotlib' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[1:]] == list_models()
