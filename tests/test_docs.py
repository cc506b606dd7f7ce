"""README and docs/: what a page shows is run, or parsed where it would take long."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm.models
import timm.optim
import torch

import models
import predict
import train
import tune
import validate
from export import parse_args
from files import strict_yaml
from files.strict_yaml import parse_yaml
from models.__main__ import stage_table
from models.factory import model_facts
from models.registry import model_config, unregister_model
from training.config import DEFAULT_CONFIG, TrainConfig, load_config
from training.evaluating.blocks import parse_wanted
from training.evaluating.corruptions import CORRUPTIONS
from training.evaluating.part import find_data
from training.run import COMPARED, FREE_TO_CHANGE
from tuning import advice_command
from tuning.config import load_study

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "models.md").read_text()


def test_what_the_digits_take_is_one_measurement_on_one_machine() -> None:
    """README and the config's header say what benchmarks/results has, and name processor and threads."""
    results = ROOT / "benchmarks" / "results"
    digits, busy = (json.loads((results / f"{name}.json").read_text()) for name in ("digits", "busy"))
    tops = [row["final_top1"] for row in digits["rows"]]
    mean = digits["mean"]
    facts = [digits["machine"].removesuffix(", CPU"), f"{mean['final_top1']:.2f} %", f"{mean['seconds']:.0f} s",
             f"({min(tops):.2f} to {max(tops):.2f})"]  # fmt: skip
    assert ", 1 thread" in facts[0], "what the config says"
    header = DEFAULT_CONFIG.read_text().partition("\nseed:")[0]
    readme = " ".join((ROOT / "README.md").read_text().split())
    for fact in facts:
        assert fact in header and fact in readme, fact
    assert f"about {round(mean['images_per_second'], -2):,.0f} images/s" in readme
    assert f"**{busy['median']['ratio']:.2f}** of that" in readme and busy["machine"] == digits["machine"]


def blocks(language: str, page: str = PAGE) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)


# docs/models.md has tests of its own below, docs/contributing.md in test_contributing.py
PAGES = (
    "README.md",
    *(
        f"docs/{name}.md"
        for name in (
            "stochastic-depth",
            "any-model",
            "data",
            "training",
            "tuning",
            "evaluation",
            "reliability",
            "performance",
        )
    ),
)
TEXTS = {name: (ROOT / name).read_text() for name in PAGES}


def test_every_page_is_read() -> None:
    mine = {*PAGES, "docs/models.md", "docs/contributing.md"}
    assert mine == {"README.md", *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))}
    languages = {word for text in TEXTS.values() for word in re.findall(r"^```(\w+)", text, flags=re.MULTILINE)}
    assert languages == {"python", "bash", "yaml"}, "a test for each"


@pytest.mark.parametrize(
    ("page", "number"), [(page, n) for page, text in TEXTS.items() for n in range(len(blocks("python", text)))]
)
def test_python_of_other_pages(page: str, number: int, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(blocks("python", TEXTS[page])[number], page, "exec"), {"__name__": "page"})


def test_yaml_of_other_pages() -> None:
    study, text = (b for name in ("docs/tuning.md", "docs/stochastic-depth.md") for b in blocks("yaml", TEXTS[name]))
    assert sum(len(blocks("yaml", page)) for page in TEXTS.values()) == 2
    shipped = parse_yaml((ROOT / "configs" / "tune" / "mnist5k_few.yaml").read_text()).data
    assert parse_yaml(study).data == shipped, "what the page shows is the file it names"
    whole = {"model": {"name": "any"}, "data": {"dataset": "digits"}, **parse_yaml(text).data}
    assert strict_yaml.validate(TrainConfig, whole).drop_path.schedule.kind == "early"


def commands(page: str) -> list[list[str]]:
    """The commands of a page's blocks, word by word."""
    lines = [line for block in blocks("bash", page) for line in block.replace("\\\n", "").splitlines()]
    return [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]


def test_commands_of_other_pages() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    found = [words for text in TEXTS.values() for words in commands(text)]
    assert len(found) >= 10
    for words in found:
        match words:
            case ["git", "clone", *_] | ["cd", _] | ["mkdir", "-p", _] | [".", ".venv/bin/activate"]:
                pass
            case ["make", target]:
                assert target in targets
            case ["python", "train.py", "--config", "FILE", *rest]:  # how the command is made up, not one to run
                known = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True)
                options = re.findall(r"--[a-z-]+", " ".join(rest))
                assert len(options) == 4 and all(option in known.stdout for option in options)
            case (
                ["python", "train.py", *arguments]
                | ["torchrun", "--nproc-per-node", _, "train.py", *arguments]
                | ["torchrun", "--nproc-per-node", _, "--max-restarts", _, "train.py", *arguments]
            ):
                args = train.parse_args(arguments)
                load_config(args.config and ROOT / args.config, args.overrides)
            case ["python", "tune.py", "advise", *arguments]:
                args = advice_command.parse_args(arguments)
                load_config(args.config and ROOT / args.config, args.overrides)
            case ["python", "tune.py", *arguments]:
                args = tune.parse_args(arguments)
                load_study(args.config and ROOT / args.config, args.overrides)
            case ["python", "-m", "tuning.report", _]:
                pass
            case ["python", "validate.py", *arguments] | ["torchrun", "--nproc-per-node", _, "validate.py", *arguments]:
                args = validate.parse_args(arguments)
                assert args.drop_blocks is None or parse_wanted(args.drop_blocks)
                request = validate.request_of(args)
                find_data(request.data, load_config(None))
                texts = [text for text in request.models if not text.startswith("runs/")]
                assert all(model_facts(text).pretrained_cfg for text in texts)
            case ["python", "predict.py", *arguments] | [
                "find",
                _,
                "-name",
                _,
                "|",
                "python",
                "predict.py",
                *arguments,
            ]:
                assert predict.request_of(predict.parse_args(arguments)).model
            case ["python", "-c", code]:
                compile(code, "page", "exec")
            case _:
                raise AssertionError(f"{shlex.join(words)}: not known to this test")


def test_corruptions_are_as_the_page_says() -> None:
    found = re.findall(r"^\| `(\w+)` \| ([^|]+) \| (.+) \|$", TEXTS["docs/evaluation.md"], flags=re.MULTILINE)
    told = {name: (strength, values.split(" | ")) for name, strength, values in found if values.count("|") == 4}
    assert told == {n: (kind.strength, [f"{v:.3g}" for v in kind.values]) for n, kind in CORRUPTIONS.items()}


SRUN = """#!/bin/bash
trap 'kill $!; echo "told" >> log; exit 0' USR1
echo "$@" >> log
touch started
[ "$FATE" = ends ] && exit 0
sleep 60 &
wait
"""


@pytest.mark.parametrize("fate", ["told", "ends"])
def test_the_job_script_of_slurm(fate: str, tmp_path: Path) -> None:
    """With stand-ins for SLURM's commands: the processes are told, and the job is queued again, only if its time is up."""
    (script,) = re.findall(r"^```\n(#!/bin/bash\n.*?)^```$", TEXTS["docs/training.md"], flags=re.MULTILINE | re.DOTALL)
    stubs = {"srun": SRUN, "scontrol": '#!/bin/bash\n[ "$1" = show ] && echo node7 || echo "$@" >> log\n'}
    for name, text in {**stubs, "job": script}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "42", "FATE": fate,
                   "SLURM_JOB_NODELIST": "node[7-8]"}  # fmt: skip
    with subprocess.Popen(["bash", "job"], cwd=tmp_path, env=environment) as job:
        deadline = time.monotonic() + 30
        while not (tmp_path / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        if fate == "told":
            job.send_signal(signal.SIGUSR1)
        job.wait(timeout=30)
    log = (tmp_path / "log").read_text()
    assert log.startswith("bash -c export RANK=$SLURM_PROCID")
    assert log.endswith("told\nrequeue 42\n") if fate == "told" else "requeue" not in log
    arguments = shlex.split(re.findall(r"exec python train\.py ([^']*)'", script)[0])
    args = train.parse_args(arguments)
    assert load_config(ROOT / args.config, args.overrides).model.name and args.resume == "auto"
    names = re.findall(r"export ([^\n]*)", script)
    assert {name for line in names for name in re.findall(r"\b([A-Z_]+)=", line)} == {
        "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"
    }, "what training.distributed reads"  # fmt: skip


def test_links_of_other_pages() -> None:
    for page, text in TEXTS.items():
        for target in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


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
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", "").splitlines()]
    found = [line.partition("#")[0] for line in lines if line != TIMM_COMMAND]
    exports = [shlex.split(c)[2:] for c in found if c.startswith("python export.py")]
    assert {parse_args(arguments).format for arguments in exports} == {"zoo", "timm", "onnx", "torch", "folded"}
    trained = [c for c in found if c.startswith("python train.py ")]
    assert [load_config(None, shlex.split(c)[2:]).model.name for c in trained] == ["timm/convnext_atto"]
    assert all(c.startswith(("python export.py ", "python -m models")) for c in found if c not in trained)


(TIMM_COMMAND,) = re.findall(r"^python -c .*$", PAGE.replace("\\\n", ""), flags=re.MULTILINE)
TIMM_SCRIPT = """
import argparse
import timm
import timm.utils

parser = argparse.ArgumentParser()
parser.add_argument("--data-dir")
parser.add_argument("--model")
parser.add_argument("--drop-path", type=float)
parser.add_argument("--model-kwargs", nargs="*", default={}, action=timm.utils.ParseKwargs)
args = parser.parse_args()
model = timm.create_model(
    args.model, pretrained=False, in_chans=3, num_classes=None, drop_rate=0.0, drop_path_rate=args.drop_path,
    drop_block_rate=None, global_pool=None, bn_momentum=None, bn_eps=None, scriptable=False, checkpoint_path="",
    **args.model_kwargs,
)
last = list(model.stages[-1].blocks)[-1].drop_path2
print(type(model).__module__, model.num_classes, last.drop_prob, last.mode)
"""


def test_a_script_of_timm_finds_our_models(tmp_path: Path) -> None:
    """The page's command, on a script that calls timm as timm's train.py does: that one is not in the wheel."""
    (tmp_path / "train.py").write_text(TIMM_SCRIPT)
    python, *arguments = shlex.split(TIMM_COMMAND)
    assert python == "python" and "../pytorch-image-models/train.py" in arguments[1]
    arguments[1] = arguments[1].replace("../pytorch-image-models/train.py", str(tmp_path / "train.py"))
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["models.metaformer", "1000", "0.15", "skip"]


def test_what_the_zoo_holds() -> None:
    names = models.list_models()
    published = [name for name in names if not name.endswith("_n4")]
    assert f"{len(names)} YAMLs: {len(published)} published models" in PAGE
    groups = [int(n) for n in re.findall(r"^\| (\d+): ", PAGE, flags=re.MULTILINE)]
    families = (
        ("poolformer_", "poolformerv2_", "convformer_", "caformer_"),
        ("identityformer_", "randformer_"),
        ("vit_", "deit_", "deit3_", "eva_", "flexivit_"),
        ("mixer_", "resmlp_"),
    )
    assert groups == [sum(name.startswith(prefixes) for name in published) for prefixes in families]
    assert sum(groups) == len(published)
    tests = ROOT / "tests" / "models" / "test_metaformer.py"
    (distinct,) = re.findall(r"\*\*(\d+) distinct architectures\*\*", PAGE)
    assert f"assert len(found) == {distinct} and" in tests.read_text()
    for test in re.findall(r"`(test_\w+)`", PAGE):
        assert f"def {test}(" in tests.read_text()


def decay_factors(name: str) -> dict[str, str]:
    """Learning-rate factors of a model's parts at a layer decay of 0.75, as timm groups them."""
    with torch.device("meta"):
        model = timm.create_model(name)
    names = {id(parameter): key.split(".") for key, parameter in model.named_parameters()}
    found: dict[str, set[float]] = {}
    for group in timm.optim.param_groups_layer_decay(model, layer_decay=0.75):
        for key in (names[id(parameter)] for parameter in group["params"]):
            length = {"stem": 1, "head": 2}.get(key[0], 4 if key[2] == "blocks" else 3)
            found.setdefault(".".join(key[:length]), set()).add(group["lr_scale"])
    return {part: " to ".join(f"{factor:.3f}" for factor in sorted(factors)) for part, factors in found.items()}


def test_layer_decay() -> None:
    models.register_with_timm()
    ours, theirs = decay_factors("dpz_poolformer_s12"), decay_factors("poolformer_s12")
    assert ours.keys() == theirs.keys()
    table = "\n".join(f"| `{part}` | {ours[part]} | {theirs[part]} |" for part in ours)
    assert f"| | ours: {len(set(ours.values()))} levels |" in PAGE and f"\n{table}\n\n" in PAGE
    levels = {factor for factors in theirs.values() for factor in factors.split(" to ")}
    assert f"| timm's: {len(levels)} levels |" in PAGE
    assert theirs["stem"] == theirs["stages.0.blocks.0"] and ours["stem"] != ours["stages.0.blocks.0"]


# words about weights that look like names of models
WEIGHT_WORDS = {"state_dict", "state_dict_ema", "model_ema", "ema_state_dict", "swa_model", "push_to_hf_hub",
                "safe_serialization"}  # fmt: skip


def test_names_and_links() -> None:
    for pattern in re.findall(r"`((?!test_)[a-z0-9]+_(?:\w+|\*))`", PAGE):
        known = models.list_models(pattern) or pattern in PAGE_WORDS | WEIGHT_WORDS or timm.models.is_model(pattern)
        assert known, f"`{pattern}` is no model"
    for target in re.findall(r"\]\((?!http)([^)#]+)", PAGE):
        assert (ROOT / "docs" / target).exists(), target


# words of the page that look like names of models
PAGE_WORDS = {"num_classes", "in_chans", "drop_path_rate", "drop_path_mode", "img_size", "checkpoint_path", "to_timm",
              "from_timm", "global_pool", "head_dim", "class_names", "label_names", "num_heads",
              "drop_rate", "image_size", "crop_pct", "pretrained_cfg", "set_drop_path"}  # fmt: skip


def test_what_may_change_on_a_resume_is_all_told() -> None:
    (told,) = re.findall(r"\*\*What may change\.\*\*(.*?)\n\nWith ", TEXTS["docs/training.md"], flags=re.DOTALL)
    keys = {f"{section}.{key}" for section, free in FREE_TO_CHANGE.items() for key in free} - {"data.class_names"}
    assert keys == set(re.findall(r"`((?:data|runtime|optim|distill|early_stopping)\.\w+)`", told))
    assert set(TrainConfig.model_fields) - set(COMPARED) == {"checkpoint", "log"}, "sections that are told of"
