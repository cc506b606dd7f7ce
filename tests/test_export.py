"""export.py as a user runs it: what it writes and prints, and what each mistake costs."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import timm
import torch

from export import main, parse_args, parse_overrides
from files.errors import ConfigError
from models.factory import class_names_of, create_model
from models.fold import load_folded
from models.metaformer import MetaFormer
from models.weights import save_weights
from stochastic_depth.removal import removed, residual_blocks

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str | Path, cwd: Path) -> tuple[int, str, str]:
    with contextlib.chdir(cwd), redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = main([str(a) for a in arguments])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture
def best(tmp_path: Path) -> tuple[Path, MetaFormer]:
    """A folder as a run leaves it, of a model that differs from the zoo's."""
    torch.manual_seed(0)
    model = create_model("caformer_n4", num_classes=7, in_chans=1, depths=[1, 1], image_size=16).eval()
    save_weights(tmp_path / "best", model.state_dict(), {"model": model.config.model_dump()})
    return tmp_path / "best", model


@pytest.mark.parametrize("words", [(), ("pretrained=false",), ("pretrained=true", "pretrained=false")])
def test_weights_that_nobody_trained_are_warned_of(words: tuple[str, ...], tmp_path: Path) -> None:
    model = ("--model", "caformer_n4", "depths=[1, 1]", "image_size=16")
    code, _, err = run(*model, *words, "--format", "folded", "--output", "out", cwd=tmp_path)
    assert code == 0 and "the weights are freshly initialised" in err


def test_a_runs_folder_says_which_model_it_is(best, tmp_path: Path) -> None:
    folder, model = best
    code, out, err = run("--checkpoint", folder, "--format", "folded", "--output", "out", cwd=tmp_path)
    assert (code, err) == (0, "")
    assert "out (0." in out and "largest relative error" in out and "at batch 1 and 3" in out
    again = load_folded(tmp_path / "out")
    images = torch.randn(2, 1, 16, 16)
    assert again.config == model.config
    torch.testing.assert_close(again(images), model(images))


def test_class_names_of_a_run_are_exported_and_may_be_given(best, tmp_path: Path) -> None:
    folder, model = best
    names = [f"digit {i}" for i in range(7)]
    save_weights(folder, model.state_dict(), {"model": model.config.model_dump(), "class_names": names})
    export = ("--checkpoint", folder, "--format", "folded", "--output", "out")
    assert run(*export, cwd=tmp_path)[0] == 0
    assert class_names_of(load_folded(tmp_path / "out")) == names
    code, out, _ = run(*export, "--force", "class_names=[a, b, c, d, e, f, g]", cwd=tmp_path)
    assert code == 0 and "replaced" not in out
    renamed = load_folded(tmp_path / "out")
    assert class_names_of(renamed) == list("abcdefg")
    images = torch.randn(2, 1, 16, 16)
    torch.testing.assert_close(renamed(images), model(images))
    code, _, err = run(*export, "--force", "class_names=[a, b, c, d, e, f, g, h]", cwd=tmp_path)
    assert code == 2 and "8 names for a model of 7 classes" in err


def test_features_are_exported_without_the_classifier(best, tmp_path: Path) -> None:
    folder, model = best
    arguments = ("--checkpoint", folder, "--format", "torch", "--output", "out.pt2", "num_classes=0")
    code, out, _ = run(*arguments, cwd=tmp_path)
    assert code == 0 and "features (batch, 64)" in out and "classifier of 7 classes left out" in out
    images = torch.randn(2, 1, 16, 16)
    expected = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(torch.export.load(tmp_path / "out.pt2").module()(images), expected)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("poolformer_s12", {"in_chans": 1}), ("deit_tiny_patch16_224", {"img_size": 64}), ("caformer_s18", {})],
)
def test_a_timm_folder_says_which_model_it_is(name: str, settings: dict, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model(name, num_classes=7, **settings).eval()
    timm.models.save_for_hf(theirs, str(tmp_path / "theirs"), safe_serialization=True)  # type: ignore[attr-defined]
    code, _, err = run("--checkpoint", "theirs", "--format", "folded", "--output", "out", cwd=tmp_path)
    assert (code, err) == (0, ""), err
    again = load_folded(tmp_path / "out")
    images = torch.randn(2, *again.pretrained_cfg["input_size"])
    assert again.num_classes == 7 and images.shape[1] == settings.get("in_chans", 3)
    torch.testing.assert_close(again(images), theirs(images), rtol=1e-4, atol=1e-5)


def test_a_torch_program_and_its_speed(best, tmp_path: Path) -> None:
    folder, model = best
    code, out, err = run(
        "--model", "caformer_n4", "--checkpoint", folder, "--format", "torch", "--output", "new/out.pt2", "--benchmark",
        "num_classes=7", "in_chans=1", "depths=[1,1]", "image_size=16", cwd=tmp_path,
    )  # fmt: skip
    assert (code, err) == (0, "") and "weights from" in out
    assert "batch 8" in out.splitlines()[-1] and "images/s" in out.splitlines()[-1]
    images = torch.randn(5, 1, 16, 16)
    program = torch.export.load(tmp_path / "new" / "out.pt2").module()
    torch.testing.assert_close(program(images), model(images))


@pytest.mark.slow
def test_onnx_says_its_opset_and_nothing_else(best, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    command = [
        sys.executable,
        str(ROOT / "export.py"),
        "--checkpoint",
        str(best[0]),
        "--format",
        "onnx",
        "--output",
        "a.onnx",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 2 and "ONNX opset 20" in done.stdout and "onnxruntime" in done.stdout


def test_a_yaml_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text((ROOT / "configs/models/poolformer_n4.yaml").read_text())
    code, out, err = run("--model", "mine.yaml", "--format", "folded", "--output", "out", cwd=tmp_path)
    assert code == 0 and out.startswith("out (")
    assert err.startswith("warning: no --checkpoint") and err.count("\n") == 1


def test_force(best, tmp_path: Path) -> None:
    arguments = ("--checkpoint", best[0], "--format", "folded", "--output", "out")
    assert run(*arguments, cwd=tmp_path)[0] == 0
    code, out, err = run(*arguments, cwd=tmp_path)
    assert (code, out) == (
        2,
        "",
    ) and err == "error: --output out exists already; name another, or replace it with --force\n"
    assert run(*arguments, "--force", cwd=tmp_path)[0] == 0


FOLDED = ("--format", "folded", "--output", "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (FOLDED, "give --model NAME|YAML, or --checkpoint"),
        (("--model", "caformer_n5", *FOLDED), "did you mean 'caformer_n4'?"),
        (("--model", "nowhere.yaml", *FOLDED), "no such file"),
        (("--model", "caformer_n4", *FOLDED, "depth=[1,1]"), "depth: unknown key; did you mean 'depths'?"),
        (("--model", "caformer_n4", *FOLDED, "head.ordr=x"), "ordr"),
        (("--model", "caformer_n4", *FOLDED, "num_classes"), "expected KEY=VALUE"),
        (("--model", "caformer_n4", *FOLDED, "num_classes=many"), "num_classes"),
        (("--model", "caformer_n4", *FOLDED, "checkpoint=best"), "this is what --checkpoint is for"),
        (("--model", "caformer_n4", *FOLDED, "name=best"), "this is what --model is for"),
        (("--model", "caformer_n4", *FOLDED, "class_names=3"), "class_names: must be a list of names, got 3"),
        (("--model", "caformer_n4", *FOLDED, "class_names=true"), "class_names: must be a list of names, got True"),
        (("--checkpoint", "best", *FOLDED, "class_names={a: 1}"), "class_names: must be a list of names, got {'a': 1}"),
        (("--model", "caformer_n4", *FOLDED, "pretrained=maybe"), "pretrained: must be true or false, got 'maybe'"),
        (("--model", "caformer_n4", *FOLDED, "pretrained=1"), "pretrained: must be true or false, got 1"),
        (("--model", "caformer_n4", *FOLDED, "depths=[1"), "on the command line: depths=[1"),
        (("--model", "caformer_n4", *FOLDED, "--checkpoint", "nowhere"), "nowhere: no such file or folder"),
        (("--model", "caformer_n4", *FOLDED, "--checkpoint", "best", "pretrained=true"), "two sources of weights"),
        (("--model", "poolformer_n4", *FOLDED, "--checkpoint", "best"), "another architecture"),
        (("--model", "caformer_n4", *FOLDED, "--checkpoint", "best"), "do not fit"),
        (("--checkpoint", "alone.safetensors", *FOLDED), "does not say which model it is of"),
        (("--checkpoint", "best", *FOLDED, "num_classes=4"), "the weights have 7 classes, a classifier of 4 would be"),
        (("--model", "caformer_n4", "--checkpoint", "best", *FOLDED, "num_classes=4"), "have 7 classes, a classifier of 4"),
        (("--checkpoint", "best/model.safetensors", "--model", "caformer_n4", *FOLDED, "num_classes=4"), "have 7 classes"),
        (("--model", "caformer_s18", *FOLDED, "pretrained=true", "num_classes=4"), "the weights have 1,000 classes, a class"),
        (("--model", "caformer_s18.sail_in22k", *FOLDED, "pretrained=true", "num_classes=4"), "weights have 21,841 classes"),
        (("--checkpoint", "wrong", *FOLDED), "wrong/config.json: model: dims: has 1 entry, depths has 2 stages"),
        (("--checkpoint", "unknown", *FOLDED), "unknown/config.json: weights of 'cafromer_s18', which is not in the zoo"),
        (("--checkpoint", "silent", *FOLDED), "silent does not say which model it is of; give --model NAME|YAML"),
        (("--checkpoint", "damaged", *FOLDED), "damaged"),
        (("--checkpoint", "evil.pt", "--model", "caformer_n4", *FOLDED), "only tensors and plain Python values are read"),
        (("--model", "caformer_n4", "--format", "onnx", "--output", "out.pt2"), "is a file ending in .onnx"),
        (("--model", "caformer_n4", "--format", "timm", "--output", "out.onnx"), "is a folder"),
        (("--model", "caformer_n4", "--format", "timm", "--output", "out"), "has no model 'caformer_n4'; use --format torch"),
    ],
)  # fmt: skip
def test_mistakes(arguments: tuple[str, ...], message: str, best, tmp_path: Path) -> None:
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/config.json").write_bytes((best[0] / "config.json").read_bytes())
    content = bytearray((best[0] / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "damaged/model.safetensors").write_bytes(content)
    saved = best[1].config.model_dump() | {"dims": [32]}
    for name, config in {"wrong": {"model": saved}, "unknown": {"architecture": "cafromer_s18"}, "silent": {}}.items():
        save_weights(tmp_path / name, best[1].state_dict(), config)
    torch.save({"weight": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "alone.safetensors").write_bytes(content)
    code, out, err = run(*arguments, cwd=tmp_path)
    errors = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert code == 2 and errors[0].startswith("error: ") and len(errors) <= 3
    assert message in err
    assert "Traceback" not in out + err and not (tmp_path / "executed").exists()
    given = {"alone.safetensors", "best", "damaged", "wrong", "unknown", "silent", "evil.pt"}
    assert {p.name for p in tmp_path.iterdir()} == given


class Evil:
    """Leaves a file where it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_a_folded_export_is_not_exported_again(best, tmp_path: Path) -> None:
    run("--checkpoint", best[0], *FOLDED, cwd=tmp_path)
    code, _, err = run("--checkpoint", "out", "--format", "torch", "--output", "a.pt2", cwd=tmp_path)
    assert code == 2 and "is an export (folded)" in err


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ("file/out", "not all of its folders are folders"),
        ("n" * 255, "File name too long"),
        ("loop", "a link that leads in a circle"),
    ],
)
def test_an_unwritable_place_is_told_before_the_weights_are_read(output: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    code, _, err = run("--checkpoint", "nowhere", "--format", "folded", "--output", output, cwd=tmp_path)
    assert (code, err) == (2, f"error: --output {output}: cannot be written: {told}\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


def test_missing_folders_are_made_only_for_an_export(best, tmp_path: Path) -> None:
    words = ("--format", "folded", "--output", "a/b/out")
    assert run("--checkpoint", "nowhere", *words, cwd=tmp_path)[0] == 2 and not (tmp_path / "a").exists()
    assert run("--checkpoint", best[0], *words, cwd=tmp_path)[0] == 0 and (tmp_path / "a" / "b" / "out").is_dir()


def test_what_an_export_is_made_from_is_not_replaced(best, tmp_path: Path) -> None:
    folder, _ = best
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "link").symlink_to("best")
    shutil.copy(folder / "model.safetensors", tmp_path / "w.pt2")
    os.link(tmp_path / "w.pt2", tmp_path / "w.bin")
    shutil.copytree(folder, tmp_path / "zoo")
    (tmp_path / "zoo" / "model.yaml").write_text((ROOT / "configs/models/poolformer_n4.yaml").read_text())
    for words in (
        ("--checkpoint", "best", "--format", "zoo", "--output", "best"),
        ("--checkpoint", "best/model.safetensors", "--format", "folded", "--output", "link"),
        ("--checkpoint", "w.bin", "--model", "caformer_n4", "--format", "torch", "--output", "w.pt2"),
        ("--checkpoint", "best", "--model", "zoo/model.yaml", "--format", "zoo", "--output", "zoo"),
    ):
        code, _, err = run(*words, "--force", cwd=tmp_path)
        assert (code == 2 and "holds the weights that" in err) or "holds the YAML that" in err, err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("arguments", [[], ["--format", "pickle", "--output", "out"], ["--format", "torch"]])
def test_the_command_line_itself(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_args(arguments)
    assert end.value.code == 2 and "usage:" in capsys.readouterr().err


def test_overrides() -> None:
    words = ["head.order=pool_norm", "head.norm=layer_norm", "num_classes=5", "layer_scale=1e-5"]
    assert parse_overrides(words) == {
        "head": {"order": "pool_norm", "norm": "layer_norm"}, "num_classes": 5, "layer_scale": 1e-5}  # fmt: skip
    with pytest.raises(ConfigError, match="is not a section"):
        parse_overrides(["head=1", "head.order=x"])
    for word, message in {"num_classes=5 # five": "begins a comment", "checkpoint=x": "what --checkpoint is for",
                          "num_classes": "for example num_classes=10"}.items():  # fmt: skip
        with pytest.raises(ConfigError, match=f"^on the command line: {word}: .*{message}"):
            parse_overrides([word])
    assert parse_overrides(["published.source=page #2"]) == {"published": {"source": "page #2"}}


@pytest.mark.slow
def test_a_timm_folder(tmp_path: Path) -> None:
    arguments = ("--model", "poolformerv2_s12", "--format", "timm", "--output", "out", "num_classes=5")
    code, out, _ = run(*arguments, cwd=tmp_path)
    assert code == 0 and "local-dir:FOLDER" in out
    assert json.loads((tmp_path / "out/config.json").read_text())["num_classes"] == 5


def test_blocks_are_dropped_and_the_smaller_model_is_trained_and_exported_again(best, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("caformer_n4", num_classes=7, in_chans=1, depths=[2, 2], image_size=16).eval()
    save_weights(tmp_path / "four", model.state_dict(), {"model": model.config.model_dump()})
    small = ("--checkpoint", tmp_path / "four", "--drop-blocks", "2,stages.1.blocks.0")
    code, out, err = run(*small, "--format", "zoo", "--output", "small", cwd=tmp_path)
    assert (code, err) == (0, "") and "without blocks 2 (stages.0.blocks.1), 3 (stages.1.blocks.0)" in out
    again = create_model(tmp_path / "small" / "model.yaml", checkpoint=tmp_path / "small").eval()
    images = torch.randn(2, 1, 16, 16)
    with torch.no_grad(), removed([residual_blocks(model)[1], residual_blocks(model)[2]]):
        torch.testing.assert_close(again(images), model(images))
    code, out, err = run("--checkpoint", "small", "--format", "folded", "--output", "folded", cwd=tmp_path)
    assert (code, err) == (0, "") and load_folded(tmp_path / "folded").config.depths == [1, 1]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("3", "there is no block 3: the model's blocks are 1 to 2"),
        ("1", "stage 1 of 2 would have no block"),
        ("1,2", "these are all blocks"),
        ("blocks.json", "there is no such file"),
        ("stages.0.blocks.O", "did you mean 'stages.0.blocks.0'?"),
    ],
)
def test_blocks_that_cannot_be_dropped(words: str, told: str, best, tmp_path: Path) -> None:
    arguments = ("--checkpoint", best[0], "--format", "zoo", "--output", "out", "--drop-blocks", words)
    code, _, err = run(*arguments, cwd=tmp_path)
    assert code == 2 and told in err and len(err.splitlines()) <= 3 and not (tmp_path / "out").exists()


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36))  # 69 GB, so that no machine gives more, whatever it has
import export
sys.exit(export.main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of memory that is kept")
@pytest.mark.parametrize("words", [("caformer_n4", "dims=[262144,262144]"), ("timm/test_vit", "embed_dim=262144")])
def test_a_model_that_does_not_fit_into_memory_costs_a_line(words: tuple[str, str], tmp_path: Path) -> None:
    name, size = words
    command = [
        sys.executable,
        "-c",
        LIMITED,
        "--model",
        name,
        size,
        "--format",
        "zoo",
        "--output",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    told = f"error: model {name}: its weights do not fit into memory: "
    assert done.returncode == 1 and done.stderr.startswith(told) and len(done.stderr.splitlines()) == 1, done.stderr
