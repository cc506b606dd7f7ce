"""Freezing: which parameters, which modes and rates in which epoch; a probe moves the classifier alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from files.errors import ConfigError
from models.factory import create_model
from stochastic_depth.setting import StochasticDepth, set_drop_path
from tests.training.parts import build_tiny, first_batches, step
from training.config import load_config
from training.freezing import Freezing
from training.loop import validate
from training.recipe import FreezeSection

ROOT = Path(__file__).resolve().parents[2]


def freezing(name: str, stages, **overrides) -> tuple[nn.Module, Freezing]:
    with torch.device("meta"):
        model = create_model(name, **overrides)
    model.train()
    return model, Freezing(FreezeSection(epochs=1, stages=stages), model, StochasticDepth([], []))


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("caformer_n4", "head.fc."),
        ("timm/resnet18", "fc."),
        ("timm/convnext_atto", "head.fc."),
        ("timm/deit_tiny_distilled_patch16_224", "head"),
        ("torchvision/resnet18", "fc."),
        ("torchvision/mobilenet_v3_small", "classifier.3."),
    ],
)
def test_all_but_the_classifier(name: str, head: str) -> None:
    model, frozen = freezing(name, "all")
    before = trained(model)
    assert frozen.set_epoch(0) and not frozen.set_epoch(0)
    assert trained(model) == {n for n in before if n.startswith(head)} and len(trained(model)) >= 2
    for key, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert not module.training, f"{key} would move its statistics"
    model.train()
    assert frozen.set_epoch(1) and not frozen.set_epoch(2)
    assert trained(model) == before and all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("name", "stages", "first_trained"),
    [
        ("caformer_n4", 1, "stages.1.downsample.conv.weight"),
        ("timm/resnet18", 2, "layer3.0.conv1.weight"),
        ("timm/vit_tiny_patch16_224", 5, "blocks.5.norm1.weight"),
        ("timm/efficientnet_b0", 0, "blocks.0.0.conv_dw.weight"),
        ("torchvision/resnet18", ["conv1", "bn1", "layer1", "layer2.0"], "layer2.1.conv1.weight"),
    ],
)
def test_the_first_stages_or_parts_by_name(name: str, stages, first_trained: str) -> None:
    model, frozen = freezing(name, stages)
    frozen.set_epoch(0)
    names = [n for n, _ in model.named_parameters()]
    in_order = [n for n in names if n in trained(model)]
    assert first_trained in in_order
    assert sorted(in_order) == sorted(names[names.index(in_order[0]) :]), "all behind it"


def test_dropout_goes_with_what_is_behind_it() -> None:
    """Off in the frozen part, on in front of the classifier."""
    model, frozen = freezing("torchvision/mobilenet_v3_small", "all")
    frozen.set_epoch(0)
    modes = {key: module.training for key, module in model.named_modules()}
    assert modes["classifier.2"] and modes["classifier.3"], "dropout and classifier"
    assert not modes["classifier.0"] and not modes["features.3"]
    vit, frozen = freezing("timm/vit_tiny_patch16_224", "all", drop_rate=0.1)
    frozen.set_epoch(0)
    modes = {key: module.training for key, module in vit.named_modules()}
    assert modes["head_drop"] and not modes["pos_drop"]


@pytest.mark.parametrize(("name", "options"), [("timm/resnet18", {}), ("caformer_n4", {"depths": [2, 2]})])
def test_drop_path_is_off_while_frozen_and_on_afterwards(name: str, options: dict) -> None:
    model = create_model(name, **options)
    depth = set_drop_path(model, 0.4)
    frozen = Freezing(FreezeSection(epochs=2, stages=1), model, depth)
    own, last = (list(depth.blocks[i].drop_paths.values()) for i in (1, -1))
    rates = [m.drop_prob for m in own]
    assert rates[0] > 0
    frozen.set_epoch(1)
    assert [m.drop_prob for m in own] == [0.0] * len(own) and last[0].drop_prob == 0.4
    depth.set_step(3)
    assert own[0].rate == 0.0, "a schedule changes nothing of it"
    frozen.set_epoch(2)
    assert [m.drop_prob for m in own] == rates


PROBE = ["ema.enabled=true", "freeze.epochs=1"]


@pytest.mark.parametrize("settings", [["optim.name=adamw"], ["optim.name=sgd", "optim.lr=0.3"]])
def test_a_probe_moves_the_classifier_alone_and_the_optimizer_holds_all(settings: list[str]) -> None:
    setup = build_tiny(*PROBE, "optim.weight_decay=0.5", *settings)
    before = {k: v.clone() for k, v in setup.model.state_dict().items()}
    setup.model.train()
    setup.freezing.set_epoch(0)
    assert setup.drop_path_rate == 0.0
    batch = first_batches(setup)
    mode = {key: module.training for key, module in setup.model.named_modules()}
    assert mode["head.fc"] and not mode["stages.0"] and not mode["stem"]
    train = setup.model.train
    setup.model.train = lambda mode=True: setup.model  # the step of tests/training/parts.py sets the mode
    step(setup, batch, 3)
    setup.model.train = train
    moved = {k for k, v in setup.model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"head.fc.weight", "head.fc.bias"}, "no weight decay on the rest either"
    held = {id(p) for group in setup.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in setup.model.parameters()}
    assert len(setup.optimizer.state) == 2
    validate(setup, batches=1)  # sets all modes
    setup.model.train()
    assert setup.freezing.set_epoch(1) and setup.drop_path_rate == 0.4
    step(setup, batch, 5)
    moved = {k for k, v in setup.model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == set(before) and len(setup.optimizer.state) == len(list(setup.model.parameters()))


def test_off_nothing_is_frozen() -> None:
    setup = build_tiny()
    assert setup.freezing.set_epoch(0) and not setup.freezing.set_epoch(1)
    assert not setup.freezing.parameters and not setup.freezing.modules and not setup.freezing.drop_paths
    assert setup.freezing.describe() == ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["freeze.epochs=3"], "freeze.epochs=3: 3 is beyond optim.epochs (2)"),
        (["freeze.stages=1"], "no effect without freeze.epochs"),
        (["freeze={epochs: 1, stages: 7}"], "must be from 0 (the stem) to 2 in this model, got 7"),
        (
            ["freeze={epochs: all, stages: [stages.0, stagess.1]}"],
            "no part 'stagess.1' to freeze; did you mean 'stages.1'",
        ),
        (["freeze={epochs: 1, stages: [stem, stages, head]}"], "nothing would be left to train"),
        (["freeze.epochs=half"], "expected 'all' or an integer"),
        (["freeze={epochs: 1, stages: some}"], "expected 'all' or an integer or a list"),
    ],
)
def test_mistakes(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_tiny(*settings)
    assert message in str(caught.value) and len(str(caught.value).splitlines()) <= 3


def test_a_model_that_does_not_say_its_stages() -> None:
    with pytest.raises(ConfigError, match=r"name parts of it: conv1, bn1, .*layer1"):
        freezing("torchvision/resnet18", 1)


def test_the_plan_says_it() -> None:
    assert load_config(None, ["freeze.epochs=all"]).freeze.epochs == "all"
    _, frozen = freezing("caformer_n4", "all")
    assert "in epochs 1 to 1, where" in frozen.describe() and "M parameters" in frozen.describe()


SCRIPT = """
import sys, torch
from pathlib import Path
from training.config import load_config
from training.distributed import close_world, init_world
from training.loop import train
from training.report import page
from training.run_folder import RunFolder
from training.setup import build
from tests.training.parts import TINY
page.write_report = lambda _: None
world = init_world("cpu")
setup = build(load_config(None, [*TINY, "freeze.epochs=1", "data.batch_size=64", "drop_path.mode=skip"]), world)
folder = RunFolder(Path(sys.argv[1]))
if world.is_main:
    folder.make(fresh=True)
world.barrier()
train(setup, folder)
own = torch.cat([p.detach().flatten().double() for p in setup.model.parameters()])
assert torch.equal(world.sum(own), 2 * own), "the ranks' weights are equal"
assert all(p.grad is not None for p in setup.model.parameters())
print("equal", flush=True)
close_world(world)
"""


@pytest.mark.slow
def test_two_processes_thaw_together(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(tmp_path / "run")], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal") == 2
