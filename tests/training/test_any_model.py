"""Models of timm and torchvision in the trainer: three steps of skip, a stop, the same weights after going on, an export."""

import copy
import signal
from pathlib import Path

import pytest
import timm
import torch

from files.errors import ConfigError
from models.export import export_model
from models.factory import create_model, saved_config
from models.fast_layers import use_fast_layers
from models.loading import trained_foreign
from models.weights import load_weights, weights_sha256
from training import loop
from training.checkpoint import latest_checkpoint
from training.config import dump_config, load_config
from training.distributed import World
from training.loop import train
from training.report import page
from training.run_folder import RunFolder
from training.setup import Setup, build, describe

WORLD = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
# 1,437 digits in batches of 16, and never all of them: a run is stopped after 3 steps
RUN = ["data={dataset: digits, batch_size: 4, eval_batch_size: 64, workers: 0}", "augment={hflip: 0}",
       "optim={lr: 1e-3, epochs: 1, accumulate: 2, layer_decay: 0.8, warmup_epochs: 0}", "drop_path={rate: 0.5, mode: skip}",
       "ema={enabled: true}", "runtime={device: cpu, precision: float32}", "checkpoint={every_steps: null}"]  # fmt: skip
FAST = ["timm/convnext_atto"]
SLOW = ["timm/resnet18", "timm/vit_tiny_patch16_224", "timm/swin_tiny_patch4_window7_224", "timm/efficientnet_b0",
        "timm/caformer_s18", "torchvision/resnet18", "torchvision/convnext_tiny"]  # fmt: skip
NAMES = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


def build_run(name: str, *overrides: str) -> Setup:
    return build(load_config(None, [f"model={{name: {name}, in_chans: 1, image_size: 32}}", *RUN, *overrides]), WORLD)


def no_report(_: Path) -> None:
    pass


def run_steps(
    setup: Setup, folder: RunFolder, until: int, monkeypatch: pytest.MonkeyPatch, checkpoint=None, report=no_report
) -> None:
    """Trains to a step, where a signal comes."""
    real = loop.train_step

    def train_step(setup, trained, group, progress, *args, **more):
        if progress.step == until - 1:
            signal.raise_signal(signal.SIGUSR1)
        return real(setup, trained, group, progress, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", train_step)
        patch.setattr(page, "write_report", report)
        assert "stopped_by" in train(setup, folder, checkpoint)


@pytest.mark.parametrize("name", NAMES)
def test_steps_stop_resume_and_export(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build_run(name)
    assert name in describe(whole) and whole.depth.rates[-1] == 0.5
    straight, stopped = RunFolder(tmp_path / "straight"), RunFolder(tmp_path / "stopped")
    for folder in (straight, stopped):
        folder.make(fresh=True)
    run_steps(whole, straight, 3, monkeypatch)
    run_steps(build_run(name), stopped, 1, monkeypatch)
    again = build(load_config(stopped.config), WORLD, load_checkpoint=False)
    assert dump_config(again.config) == dump_config(whole.config)
    checkpoint = latest_checkpoint(stopped.checkpoints, rank=0, world_size=1, warn=print)
    run_steps(again, stopped, 3, monkeypatch, checkpoint)
    assert weights_sha256(again.model.state_dict()) == weights_sha256(whole.model.state_dict())
    assert again.ema is not None and whole.ema is not None
    assert weights_sha256(again.ema.module.state_dict()) == weights_sha256(whole.ema.module.state_dict())
    first = weights_sha256(build_run(name).model.state_dict())
    assert weights_sha256(whole.model.state_dict()) != first, "something was learned"

    loop.save_weights(straight.best, whole.evaluated.state_dict(), saved_config(whole.model))
    found = trained_foreign(load_weights(straight.best)[1] or {})
    assert found is not None
    model = create_model(found[0], checkpoint=straight.best, **found[1]).eval()
    images = torch.randn(2, 1, 32, 32)
    fast = copy.deepcopy(model)
    use_fast_layers(fast)  # as the run's own model has them, and whoever evaluates it
    assert torch.equal(fast(images), whole.evaluated.eval()(images))
    torch.testing.assert_close(fast(images), model(images))
    if name.startswith("timm/"):
        theirs = timm.create_model(f"local-dir:{straight.best}", pretrained=True).eval()
        assert torch.equal(theirs(images), model(images))
    assert export_model(model, "onnx", tmp_path / "model.onnx").error <= 1e-4
    with pytest.raises(ConfigError, match="format folded is for models of the zoo"):
        export_model(model, "folded", tmp_path / "folded")
    tuned = build_run(name, f"model.checkpoint={straight.best}", "optim.lr=1e-5")
    assert torch.equal(tuned.model.eval()(images), fast(images)), "fine-tuning begins where the run ended"


def test_a_model_without_a_residual_block_trains_at_rate_0_and_says_so(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(ConfigError, match=r"SqueezeNet has no residual block.*\n.*drop_path.rate=0"):
        build_run("torchvision/squeezenet1_1")
    setup = build_run("torchvision/squeezenet1_1", "drop_path.rate=null", "optim.layer_decay=null")
    assert "has no residual block" in describe(setup) and "trained without stochastic depth" in describe(setup)
    folder = RunFolder(tmp_path / "run")
    folder.make(fresh=True)
    run_steps(setup, folder, 1, monkeypatch, report=page.write_report)
    assert folder.summary.exists() and (folder.path / "report.html").exists()


def test_the_model_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **more: built.append(args) or real(*args, **more))
    build_run("timm/resnet18")
    assert len(built) == 1


def test_mistakes_in_a_config_are_found() -> None:
    with pytest.raises(ConfigError, match="did you mean 'timm/resnet18'"):
        build_run("timm/resnet19")
    with pytest.raises(ConfigError, match="unknown argument 'num_head'"):
        build_run("timm/vit_tiny_patch16_224", "model.num_head=3")
