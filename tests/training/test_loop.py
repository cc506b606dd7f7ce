"""The loop from inside: what a config builds, one step, one evaluation, stopping and going on. tests/test_train.py runs
the whole command."""

import csv
import json
import math
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from files.errors import ConfigError
from models.factory import class_names_of, create_model
from models.weights import weights_sha256
from stochastic_depth.compute import count_macs
from training import loop
from training import setup as setup_of_run
from training.checkpoint import latest_checkpoint, load_checkpoint
from training.config import dump_config, load_config
from training.console import StopSignals, drop_path_modules
from training.data.dataset import ReadError
from training.distributed import World
from training.evaluation import evaluate
from training.loop import NonFiniteError, dry_run, train, train_step
from training.optim import build_loss
from training.run_folder import RunFolder, describe_environment
from training.setup import Setup, build, describe
from training.state import Progress, restore, save

WORLD = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
# 1,437 digits in batches of 256 are 5 steps per epoch.
TINY = ["model={name: caformer_n4, in_chans: 1, image_size: 8, depths: [1, 1], dims: [16, 32]}",
        "data={dataset: digits, batch_size: 256, workers: 0}", "augment={hflip: 0, rotate: 10, label_smoothing: 0.1}",
        "optim={lr: 3e-3, epochs: 2, warmup_epochs: 1}", "drop_path={rate: 0.4, mode: skip}", "ema={enabled: false}",
        "runtime={device: cpu}", "checkpoint={every_epochs: 1}"]  # fmt: skip
# Weights move by the gradient itself, so that equal gradients give equal weights.
PLAIN = ["optim.name=sgd", "optim.lr=0.1", "optim.schedule=constant", "optim.warmup_epochs=0", "drop_path.rate=0"]
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

Batch = tuple[Tensor, Tensor, Tensor]


def build_tiny(*overrides: str, world: World = WORLD) -> Setup:
    return build(load_config(None, [*TINY, *overrides]), world)


def first_batches(setup: Setup, count: int = 1) -> list[Batch]:
    setup.sampler.set_position(0, 0)
    batches = iter(setup.train_loader)
    return [next(batches) for _ in range(count)]


def step(setup: Setup, batches: list[Batch], number: int = 0) -> float:
    loss_fn = build_loss(setup.config.augment, setup.mixer.enabled)
    return train_step(setup, setup.model.train(), batches, Progress(step=number), loss_fn)


def classifier(setup: Setup) -> nn.Linear:
    layer = setup.model.get_classifier()
    assert isinstance(layer, nn.Linear)
    return layer


def gradients(setup: Setup) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in setup.model.named_parameters() if p.grad is not None}
    assert len(found) == len(list(setup.model.parameters()))
    return found


def weights(setup: Setup) -> str:
    return weights_sha256(setup.model.state_dict())


# ---- the schedule in steps ------------------------------------------------------------------------------------------


def test_points_within_one_step_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"drop_path: .*rising steps"):
        build_tiny("drop_path.schedule={kind: piecewise, points: [[0, 0.0], [0.01, 1.0]]}")


# ---- building -------------------------------------------------------------------------------------------------------

PUBLISHED = ["model.name=poolformer_s12", "model.depths=[1,1,1,2]", "model.dims=[8,8,16,16]", "model.image_size=32",
             "drop_path.rate=null"]  # fmt: skip
RESOLVABLE = {
    "plain": [],
    "list of rates": ["drop_path.rate=null", "drop_path.profile=[0.1, 0.3]"],
    "compute": ["drop_path.rate=0.1", "drop_path.rate_is=expected_macs"],
    "break-even": ["drop_path.break_even=0.3", "drop_path.schedule={kind: early, cutoff_epochs: 1}"],
    "published": PUBLISHED,
    "published as a mean": [*PUBLISHED, "drop_path.rate_is=mean"],
    "data's size": ["model.image_size=null", "data.image_size=16"],
    "both sizes": ["model.image_size=[8, 8]", "data.image_size=8"],
    "more classes": ["model.num_classes=12", "ema.enabled=true", "optim.layer_decay=0.5"],
}


@pytest.mark.parametrize("name", RESOLVABLE)
def test_the_resolved_config_builds_the_same_run(name: str, tmp_path: Path) -> None:
    setup = build_tiny(*RESOLVABLE[name])
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(setup.config))
    config = load_config(file)
    assert config == setup.config
    again = build(config, WORLD)
    assert again.config == setup.config, "nothing is left to fill in"
    assert again.depth.rates == setup.depth.rates and again.depth.schedule == setup.depth.schedule
    assert weights(again) == weights(setup)
    assert again.model.config.model_dump() == setup.model.config.model_dump()
    settings = [[(m.drop_prob, m.mode, m.break_even) for m in drop_path_modules(s)] for s in (setup, again)]
    assert settings[0] == settings[1]
    groups = [[{k: v for k, v in g.items() if k != "params"} for g in s.optimizer.param_groups] for s in (setup, again)]
    assert groups[0] == groups[1]


def test_no_rate_means_the_published_one() -> None:
    setup = build_tiny(*PUBLISHED)
    published = setup.model.config.published
    assert published is not None and published.drop_path_rate == 0.1
    assert setup.depth.rates == pytest.approx([0.0, 0.025, 0.05, 0.075, 0.1])
    assert setup.config.drop_path.rate == 0.1
    ours = build_tiny("drop_path.rate=null")  # a model that was never published
    assert ours.depth.rates == [0.0, 0.0] and ours.config.drop_path.rate == 0.0


def test_expected_macs_is_reached() -> None:
    setup = build_tiny("drop_path.rate=0.15", "drop_path.rate_is=expected_macs", "drop_path.profile=constant")
    macs = count_macs(setup.model)
    blocks = setup.depth.blocks
    dropped = sum(r * macs.block(b) for r, b in zip(setup.depth.rates, blocks, strict=True)) / macs.total
    assert dropped == pytest.approx(0.15)
    assert setup.depth.rates[0] > 0.16, "stem and head cannot be dropped, so the blocks are dropped more often"
    with pytest.raises(ConfigError, match=r"drop_path: .*cannot reach expected_macs 0\.99"):
        build_tiny("drop_path.rate=0.99", "drop_path.rate_is=expected_macs")


@pytest.mark.parametrize(
    ("overrides", "size"),
    [
        (["model.image_size=12"], 12),
        (["model.image_size=8", "data.image_size=8"], 8),
        (["model.image_size=null", "data.image_size=10"], 10),
    ],
)
def test_image_size_comes_from_the_data_or_the_model(overrides: list[str], size: int) -> None:
    setup = build_tiny(*overrides)
    assert setup.model.config.image_size == size == setup.config.data.image_size
    assert first_batches(setup)[0][0].shape == (256, 1, size, size)
    assert next(iter(setup.val_loader))[0].shape[1:] == (1, size, size)


def test_a_run_computes_with_its_threads() -> None:
    for threads in (2, 1):
        setup = build_tiny(f"runtime.threads={threads}")
        assert torch.get_num_threads() == threads == describe_environment(WORLD)["threads"]
        assert f"cpu x 1, float32, {threads} CPU thread" in describe(setup)
    torch.set_num_threads(3)
    build_tiny("runtime.threads=auto")
    assert torch.get_num_threads() == 1, "OMP_NUM_THREADS, whatever a run before it had"


def test_classes_come_from_the_data_or_the_model() -> None:
    assert build_tiny().config.model.num_classes == 10
    setup = build_tiny("model.num_classes=12")
    assert setup.model(torch.zeros(1, 1, 8, 8)).shape == (1, 12)
    with pytest.raises(ConfigError, match=r"model.num_classes: 9 is fewer than the data's 10 classes"):
        build_tiny("model.num_classes=9")


def test_a_tag_of_published_weights_sets_the_image_size_and_the_rate() -> None:
    small = "{name: caformer_s18.sail_in1k_384, depths: [1, 1, 1, 1], dims: [8, 8, 16, 16], head_dim: 8}"
    setup = build_tiny(f"model={small}", "data.batch_size=4", "drop_path.rate=null")
    assert setup.config.data.image_size == 384
    assert setup.config.drop_path.rate == 0.3, "of that fine-tuning, not the 0.15 of the training at 224"


@pytest.mark.parametrize(
    ("key", "instead"), [("drop_path_rate", "drop_path.rate"), ("drop_path_mode", "drop_path.mode")]
)
def test_a_drop_path_key_in_the_wrong_place_is_refused(key: str, instead: str) -> None:
    """create_model takes these, so they would pass and have no effect."""
    with pytest.raises(ConfigError, match=rf"model\.{key}: .*did you mean '{instead}'"):
        build_tiny(f"model.{key}=0.3")


def test_seeds_decide_the_weights() -> None:
    assert weights(build_tiny()) == weights(build_tiny()) != weights(build_tiny("seed=1"))


def test_precision() -> None:
    assert build_tiny().precision == torch.float32
    with pytest.raises(ConfigError, match=r"runtime.precision: float16 needs a GPU"):
        build_tiny("runtime.precision=float16")
    setup = build_tiny("runtime.precision=bfloat16")
    seen: list[torch.dtype] = []
    setup.model.register_forward_hook(lambda _module, _inputs, logits: seen.append(logits.dtype))
    assert math.isfinite(step(setup, first_batches(setup)))
    evaluate(setup)
    assert set(seen) == {torch.bfloat16}, "in training and in evaluation"
    assert {p.dtype for p in setup.model.parameters()} == {torch.float32}


# ---- one step -------------------------------------------------------------------------------------------------------


def test_two_accumulated_batches_equal_one_twice_as_large() -> None:
    whole, halves = build_tiny(*PLAIN), build_tiny(*PLAIN, "data.batch_size=128", "optim.accumulate=2")
    before = weights(whole)
    assert weights(halves) == before and whole.steps_per_epoch == 5 and halves.steps_per_epoch == 6
    batches = first_batches(halves, 2)
    images, targets, indices = (torch.cat(parts) for parts in zip(*batches, strict=True))
    losses = step(whole, [(images, targets, indices)]), step(halves, batches)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert weights(whole) != before
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(gradients(halves)[name], gradient, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            halves.model.state_dict()[name], whole.model.state_dict()[name], rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("clip", ["0.01", "null"])
def test_clipping_limits_the_norm_of_all_gradients(clip: str) -> None:
    setup = build_tiny(*PLAIN, f"optim.clip_grad={clip}")
    step(setup, first_batches(setup))
    norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients(setup).values()]))
    if clip == "null":
        assert norm > 0.1
    else:
        assert norm.item() == pytest.approx(0.01, rel=1e-3)


def test_a_step_sets_the_rates_of_its_number() -> None:
    setup = build_tiny("drop_path.schedule={kind: ramp}")
    for number in (0, 7, 3):
        step(setup, first_batches(setup), number)
        assert setup.optimizer.param_groups[0]["lr"] == pytest.approx(
            1e-6 + (3e-3 - 1e-6) * number / 5
            if number < 5
            else 1e-6 + (3e-3 - 1e-6) * (1 + math.cos(0.4 * math.pi)) / 2
        )
        assert [m.rate for m in setup.depth.blocks[-1].drop_paths.values()] == pytest.approx([0.4 * number / 9] * 2)


def test_mixed_targets_reach_the_loss() -> None:
    setup = build_tiny("augment.mixup=1.0")
    seen: list[Tensor] = []

    class Spy(nn.CrossEntropyLoss):
        def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
            seen.append(targets)
            return super().forward(logits, targets)

    batch = first_batches(setup)[0]
    images, targets, indices = (part.clone() for part in batch)
    train_step(setup, setup.model, [(images, targets, indices)], Progress(epoch=1, batch=2, step=7), Spy())
    _, expected = setup.mixer(batch[0].clone(), batch[1], 7, epoch=1)
    assert torch.equal(seen[0], expected), "batch 2 of epoch 1 is the run's batch 7"
    assert not torch.equal(seen[0], setup.mixer(batch[0].clone(), batch[1], 2)[1])


# ---- what is not finite ---------------------------------------------------------------------------------------------


def poisoned(batch: Batch, row: int) -> Batch:
    images, targets, indices = batch
    images = images.clone()
    images[row, 0, 3, 3] = math.nan
    return images, targets, indices


def samples_named(error: BaseException) -> list[int]:
    found = re.search(r"rank 0: in training samples ([\d, ]+)", str(error))
    assert found, str(error)
    return [int(i) for i in found[1].split(",")]


@pytest.mark.parametrize("mode", ["mask", "skip"])
def test_a_poisoned_image_is_named_and_no_step_is_taken(mode: str) -> None:
    setup = build_tiny(f"drop_path.mode={mode}", "data.batch_size=16", "optim.accumulate=3", "ema.enabled=true")
    good, bad, other = first_batches(setup, 3)
    before = weights(setup)
    with pytest.raises(NonFiniteError, match=r"step 7: .*not finite on rank 0; stopped before the optimizer") as caught:
        step(setup, [good, poisoned(bad, 5), other], 7)
    assert samples_named(caught.value) == [int(bad[2][5])], "this sample, of the second batch, and no other"
    assert len(str(caught.value).splitlines()) <= 3
    assert weights(setup) == before
    assert setup.ema is not None and weights_sha256(setup.ema.module.state_dict()) == before
    assert not setup.optimizer.state


def test_poison_in_several_batches() -> None:
    setup = build_tiny("data.batch_size=16", "optim.accumulate=2")
    first, second = first_batches(setup, 2)
    with pytest.raises(NonFiniteError) as caught:
        step(setup, [poisoned(poisoned(first, 0), 9), poisoned(second, 3)])
    assert samples_named(caught.value) == [int(first[2][0]), int(first[2][9]), int(second[2][3])]


@pytest.mark.parametrize("clip", ["0.5", "null"])
def test_a_gradient_that_is_not_finite_is_found_though_the_loss_is(clip: str) -> None:
    setup = build_tiny("data.batch_size=8", f"optim.clip_grad={clip}")
    batch = first_batches(setup)[0]
    classifier(setup).weight.register_hook(lambda gradient: gradient * math.inf)
    before = weights(setup)
    with pytest.raises(NonFiniteError, match="step 0: loss or gradient") as caught:
        step(setup, [batch])
    assert samples_named(caught.value) == batch[2].tolist(), "any of them"
    assert weights(setup) == before


def test_many_samples_are_counted() -> None:
    setup = build_tiny("data.batch_size=32")
    nn.init.constant_(classifier(setup).weight, math.nan)
    with pytest.raises(NonFiniteError, match="and 16 more"):
        step(setup, first_batches(setup))


# ---- evaluation -----------------------------------------------------------------------------------------------------


def direct(setup: Setup, model: nn.Module) -> dict[str, float]:
    """The measures from all validation images at once, in other words than the loop's."""
    samples = [setup.data.val[i] for i in range(len(setup.data.val))]
    images, targets = torch.stack([s[0] for s in samples]), torch.tensor([s[1] for s in samples])
    with torch.no_grad():
        logits = model.eval()(images)
    place = (logits > logits.gather(1, targets[:, None])).sum(dim=1)  # classes before the right one
    return {"val_loss": cross_entropy(logits, targets).item(), "val_top1": 100 * (place < 1).double().mean().item(),
            "val_top5": 100 * (place < 5).double().mean().item()}  # fmt: skip


def test_evaluation_equals_a_direct_computation() -> None:
    setup = build_tiny("data.eval_batch_size=100", "data.batch_size=64")
    for batch in first_batches(setup, 6):
        step(setup, [batch], 5)
    assert [len(targets) for _, targets, _ in setup.val_loader] == [100, 100, 100, 60], "the last batch is short"
    setup.model.train()
    random = torch.get_rng_state()
    found = evaluate(setup)
    assert setup.model.training, "left as it was"
    assert torch.equal(torch.get_rng_state(), random), "nothing is drawn: validation does not move the run"
    assert found == pytest.approx(direct(setup, setup.model), rel=1e-5)
    assert 15 < found["val_top1"] < found["val_top5"] < 100
    assert not any(p.grad is not None and p.grad.isnan().any() for p in setup.model.parameters())


def test_fewer_than_five_classes() -> None:
    setup = build_tiny()
    setup.model.reset_classifier(3)
    setup.val_loader = [(torch.zeros(4, 1, 8, 8), torch.tensor([0, 1, 2, 2]), torch.arange(4))]  # type: ignore[assignment]
    assert evaluate(setup)["val_top5"] == 100.0


def test_the_average_is_evaluated_where_there_is_one() -> None:
    setup = build_tiny("ema.enabled=true", "ema.decay=0.9", "data.batch_size=64")
    for number, batch in enumerate(first_batches(setup, 8)):
        step(setup, [batch], number)
    assert setup.ema is not None and setup.evaluated is setup.ema.module
    found = evaluate(setup)
    assert found == pytest.approx(direct(setup, setup.ema.module), rel=1e-5)
    assert found["val_loss"] != pytest.approx(direct(setup, setup.model)["val_loss"], rel=1e-3)


# ---- a run ----------------------------------------------------------------------------------------------------------


def run(folder: Path, *overrides: str, resume: bool = False) -> tuple[Setup, dict[str, Any]]:
    setup = build_tiny(*overrides)
    run_folder = RunFolder(folder)
    run_folder.make(fresh=not resume)
    checkpoint = latest_checkpoint(run_folder.checkpoints) if resume else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "write_report", lambda _: None)  # its pictures take longer than all the rest
        return setup, train(setup, run_folder, checkpoint)


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        rows = csv.DictReader(file)
        return [{k: v for k, v in row.items() if k not in ("images_per_second", "seconds")} for row in rows]


RAMP = ["drop_path.schedule={kind: ramp, start: 0.5}", "checkpoint.every_epochs=5", "augment.mixup=0.2"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, run(folder, *RAMP)[1]


def signal_at(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Sends SIGUSR1 during that step, counted from 1."""
    real = loop.train_step

    def sending(setup: Setup, trained: nn.Module, batches: list[Any], progress: Progress, loss_fn: nn.Module) -> float:
        if progress.step == steps - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(setup, trained, batches, progress, loss_fn)

    monkeypatch.setattr(loop, "train_step", sending)


def test_the_drop_path_schedule_is_applied_at_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers, rates = [], []
    real = setup_of_run.build

    def spying(*arguments: Any, **options: Any) -> Setup:
        setup = real(*arguments, **options)
        set_step = setup.depth.set_step
        monkeypatch.setattr(setup.depth, "set_step", lambda number: (numbers.append(number), set_step(number))[1])
        last = next(iter(setup.depth.blocks[-1].drop_paths.values()))
        setup.model.register_forward_pre_hook(lambda module, _: rates.append(last.rate) if module.training else None)
        return setup

    monkeypatch.setattr(f"{__name__}.build", spying)
    run(tmp_path / "run", "drop_path.schedule={kind: late, cutoff_epochs: 1.4}")
    assert numbers == list(range(10))
    assert rates == [0.0] * 7 + [0.4] * 3
    assert [row["drop_path_rate"] for row in metrics(tmp_path / "run")] == ["0", "0.4"]


@pytest.mark.parametrize("steps", [3, 5, 10])
def test_stopped_by_a_signal_and_resumed(whole: tuple, tmp_path: Path, monkeypatch, steps: int) -> None:
    """In mid-epoch, and at the last step of an epoch and of the run, where only the evaluation is left to do."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_at(patch, steps)
        _, summary = run(folder, *RAMP)
    assert summary["stopped_by"] == "SIGUSR1" and summary["steps"] == steps
    _, summary = run(folder, *RAMP, resume=True)
    assert summary["weights_sha256"] == whole[1]["weights_sha256"]
    assert metrics(folder) == metrics(whole[0])
    assert summary["final_top1"] == whole[1]["final_top1"] and summary["best_top1"] == whole[1]["best_top1"]


def test_an_epoch_is_noted_once_though_its_checkpoint_came_before(whole: tuple, tmp_path: Path, monkeypatch) -> None:
    """Stopped at the last step of an epoch, resumed, and killed before the next checkpoint: its row is there already."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_at(patch, 5)
        run(folder, *RAMP)

    def kill(*_: object) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(loop, "train_step", kill)
        run(folder, *RAMP, resume=True)
    assert len(metrics(folder)) == 1
    run(folder, *RAMP, resume=True)
    assert metrics(folder) == metrics(whole[0])


def test_resuming_a_finished_run_keeps_its_result(tmp_path: Path) -> None:
    _, first = run(tmp_path / "run", "optim.epochs=1", "optim.warmup_epochs=0")
    before = metrics(tmp_path / "run")
    _, again = run(tmp_path / "run", "optim.epochs=1", "optim.warmup_epochs=0", resume=True)
    for key in ("final_top1", "best_top1", "weights_sha256", "steps", "epochs"):
        assert again[key] == first[key] is not None
    assert metrics(tmp_path / "run") == before


def test_a_checkpoint_of_another_model_does_not_fit(tmp_path: Path) -> None:
    setup = build_tiny()
    saved = load_checkpoint(save(setup, RunFolder(tmp_path), Progress()))
    with pytest.raises(ConfigError, match=r"step-00000000: does not fit this run's config"):
        restore(build_tiny("model.dims=[16,48]"), saved)
    with pytest.raises(ConfigError, match="does not fit"):
        restore(build_tiny("optim.layer_decay=0.5"), saved)


def test_signals_are_noted_and_given_back() -> None:
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(n) for n in numbers]
    for number in numbers:
        with StopSignals() as signals:
            assert signals.received is None
            signal.raise_signal(number)
            assert signals.received == number.name
    assert [signal.getsignal(n) for n in numbers] == before
    with pytest.raises(ZeroDivisionError), StopSignals():
        raise ZeroDivisionError
    assert [signal.getsignal(n) for n in numbers] == before, "after an error as well"


def test_a_second_ctrl_c_stops_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopSignals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.received == "SIGINT"
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


# ---- data that cannot be read ---------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    """12 training and 6 validation images of two classes; what makes a run on them, 3 epochs of 3 steps."""
    for part, count in (("train", 6), ("val", 3)):
        for label, name in enumerate(("cat", "dog")):
            for i in range(count):
                path = tmp_path / "images" / part / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (8, 8), 100 * label + 9 * i).save(path)
    return [f"data={{dataset: folder, root: {tmp_path / 'images'}, batch_size: 4, workers: 0}}", "optim.epochs=3",
            "augment.random_erasing=0.5"]  # fmt: skip


def image_path(settings: list[str], name: str) -> Path:
    return Path(load_config(None, [*TINY, *settings]).data.root or "") / name


def damaging(monkeypatch: pytest.MonkeyPatch, epoch: int, path: Path) -> None:
    """Cuts an image short when that epoch, counted from 0, has been trained and before it is validated."""
    real = loop._end_epoch

    def end_epoch(setup: Setup, folder: RunFolder, progress: Progress, **options: Any) -> dict[str, float]:
        if progress.epoch == epoch:
            path.write_bytes(path.read_bytes()[:40])
        return real(setup, folder, progress, **options)

    monkeypatch.setattr(loop, "_end_epoch", end_epoch)


@pytest.mark.parametrize("every", ["1", "null"])
def test_a_validation_image_that_breaks_loses_nothing(
    images: list[str], tmp_path: Path, monkeypatch, every: str
) -> None:
    """The trained epoch is saved before it is validated; mended and resumed, the run ends as one without the fault."""
    settings = [*images, f"checkpoint.every_epochs={every}"]
    _, expected = run(tmp_path / "whole", *settings)
    path = image_path(images, "val/dog/1.png")
    content = path.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(ReadError) as caught:
        damaging(patch, 1, path)
        run(tmp_path / "run", *settings)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"cannot read image '{path}'") and "saved at step 6" in lines[-1] and len(lines) == 3
    assert len(metrics(tmp_path / "run")) == 1
    with pytest.raises(ReadError, match="saved at step 6"):
        train_unchecked(tmp_path / "run", *settings, resume=True)
    path.write_bytes(content)
    _, found = run(tmp_path / "run", *settings, resume=True)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole") and len(metrics(tmp_path / "run")) == 3
    for key in ("weights_sha256", "best_top1", "final_top1"):
        assert found[key] == expected[key]


def test_the_checkpoint_of_an_epoch_comes_before_its_validation(tmp_path: Path, monkeypatch) -> None:
    _, expected = run(tmp_path / "whole")

    def kill(_: Setup) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(loop, "evaluate", kill)
        run(tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.csv").exists()
    checkpoint = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None and checkpoint.step == 5
    _, found = run(tmp_path / "run", resume=True)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert found["weights_sha256"] == expected["weights_sha256"]


def test_a_training_image_that_breaks_saves_the_steps_before_it(images: list[str], tmp_path: Path, monkeypatch) -> None:
    settings = [*images, "checkpoint.every_epochs=null"]
    _, expected = run(tmp_path / "whole", *settings)
    setup = build_tiny(*settings)
    index = list(setup.sampler)[2][1][1]  # read by the third step
    path = Path(setup.data.train.source.paths[index])
    content = path.read_bytes()
    path.write_bytes(b"")
    with pytest.raises(ReadError, match=r"saved at step 2") as caught:
        train_unchecked(tmp_path / "run", *settings)
    assert str(path) in str(caught.value)
    path.write_bytes(content)
    _, found = run(tmp_path / "run", *settings, resume=True)
    assert found["weights_sha256"] == expected["weights_sha256"]
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def train_unchecked(folder: Path, *overrides: str, resume: bool = False) -> dict[str, Any]:
    """As `run`, on data whose damage is not looked for first, as in a folder of more images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "check_images", lambda *_, **__: None)
        return run(folder, *overrides, resume=resume)[1]


def test_skipping_is_exact_after_a_resume(images: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    settings = [*images, "data.on_error=skip", "data.max_skipped=2", "checkpoint.every_steps=1", "checkpoint.keep=9"]
    path = image_path(images, "train/cat/2.png")
    path.write_bytes(b"")
    image_path(images, "val/dog/0.png").write_bytes(b"")
    expected = train_unchecked(tmp_path / "whole", *settings)
    assert expected["skipped_images"] == {"train": 1, "val": 1}
    assert capsys.readouterr().err.count("warning: cannot read image") == 2, "once per file, not once per epoch"
    listed = (tmp_path / "whole" / "skipped.csv").read_text()
    assert [line.split(",")[:2] for line in listed.splitlines()[1:]] == [
        ["train", "train/cat/2.png"], ["val", "val/dog/0.png"]
    ]  # fmt: skip
    with monkeypatch.context() as patch:
        signal_at(patch, 5)
        assert train_unchecked(tmp_path / "run", *settings)["stopped_by"] == "SIGUSR1"
    again = train_unchecked(tmp_path / "run", *settings, "data.workers=2", resume=True)
    assert again["weights_sha256"] == expected["weights_sha256"]
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert (tmp_path / "run" / "skipped.csv").read_text() == listed
    with pytest.raises(ReadError, match="no image of the validation data could be read"):
        for file in image_path(images, "val").glob("*/*.png"):
            file.write_bytes(b"")
        train_unchecked(tmp_path / "all", *settings, "data.max_skipped=20")


def test_validation_without_some_images_equals_that_of_the_others(images: list[str]) -> None:
    setup = build_tiny(*images, "data.on_error=skip", "data.eval_batch_size=2")
    others = build_tiny(*images)
    for name in ("cat/1", "dog/0", "dog/2"):  # one of each batch
        image_path(images, f"val/{name}.png").write_bytes(b"")
    found = evaluate(setup)
    others.val_loader = [tuple(torch.utils.data.default_collate([others.data.val[i] for i in (0, 2, 4)]))]  # type: ignore[assignment]
    assert found == pytest.approx(evaluate(others), rel=1e-6)


def test_resuming_a_finished_run_keeps_its_drop_path_counts(tmp_path: Path) -> None:
    run(tmp_path / "run")
    before = (tmp_path / "run" / "drop_path.csv").read_text()
    assert before.splitlines()[-1].split(",")[4], "a realised rate"
    run(tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "drop_path.csv").read_text() == before


# ---- the data of a run ----------------------------------------------------------------------------------------------


def test_the_data_is_noted_beside_the_config_and_in_checkpoints(images: list[str], tmp_path: Path) -> None:
    setup, _ = run(tmp_path / "run", *images)
    told = json.loads((tmp_path / "run" / "data.json").read_text())
    assert told == setup.data.identity and told["class_names"] == ["cat", "dog"]
    checkpoint = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None and checkpoint.shared["data"] == told
    assert load_config(tmp_path / "run" / "config.yaml").data.class_names == ["cat", "dog"]
    assert json.loads((tmp_path / "run" / "best" / "config.json").read_text())["class_names"] == ["cat", "dog"]
    model = create_model(setup.model.config, checkpoint=tmp_path / "run" / "best")
    assert class_names_of(model) == ["cat", "dog"]


def test_other_data_than_the_runs_is_refused_before_all_else(images: list[str]) -> None:
    config = load_config(None, [*TINY, *images])
    identity = build(config, WORLD).data.identity
    build(config, WORLD, same_data=identity)
    other = identity | {"class_names": ["cat", "fox"]}
    with pytest.raises(ConfigError, match=r"--resume: .*classes gone: 'fox', new: 'dog'"):
        build(load_config(None, [*TINY, *images, "model.num_classes=1"]), WORLD, same_data=other)


def test_class_names_that_the_data_has_not(images: list[str]) -> None:
    assert build_tiny(*images, "data.class_names=[cat, dog]").config.data.class_names == ["cat", "dog"]
    for names, words in (("[dog, cat]", "in another order: class 0 was 'dog', is 'cat'"), ("[cat]", "new: 'dog'")):
        with pytest.raises(ConfigError, match=rf"data\.class_names: .*{words}\nleave the key out"):
            build_tiny(*images, f"data.class_names={names}")
    with pytest.raises(ConfigError, match=r"model\.class_names: .*did you mean 'data.class_names'"):
        build_tiny("model.class_names=[a]")


def test_a_checkpoint_behind_the_end_of_an_epoch_is_refused(images: list[str], tmp_path: Path) -> None:
    """Of a run that noted no data."""
    setup = build_tiny(*images)
    saved = load_checkpoint(save(setup, RunFolder(tmp_path / "run"), Progress(batch=4, step=4)))
    with pytest.raises(ConfigError, match="behind batch 4 of its epoch, which has only 3"):
        restore(setup, saved)


# ---- what a person sees ---------------------------------------------------------------------------------------------


def test_the_plan_says_what_will_happen() -> None:
    setup = build_tiny("optim.accumulate=2", "drop_path.schedule={kind: early, cutoff_epochs: 1}")
    plan = describe(setup)
    count = sum(p.numel() for p in setup.model.parameters())
    for words in (f"caformer_n4: {count / 1e6:.2f} M parameters", "1 x 8 x 8", "1437 training and 360 validation images",
                  "10 classes", "2 epochs of 3 steps, batch 512, adamw, lr 0.003, cosine", "cpu x 1, float32",
                  "drop path up to 0.4, linear, mode skip, schedule early", "expected depth 1.60 of 2 blocks"):  # fmt: skip
        assert words in plan, plan
    assert "warning" not in plan
    assert "warning: rates fall" in describe(build_tiny("drop_path.rate=null", "drop_path.profile=[0.3, 0.1]"))


def test_a_dry_run_takes_one_step_and_one_validation_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    setup = build_tiny("optim.accumulate=2", "data.eval_batch_size=90")
    seen: list[tuple[bool, int]] = []

    def note(module: nn.Module, inputs: tuple[Tensor], _: Tensor) -> None:
        if not inputs[0].is_meta:  # counting compute
            seen.append((module.training, len(inputs[0])))

    setup.model.register_forward_hook(note)
    before = weights(setup)
    told = dry_run(setup)
    assert seen == [(True, 256), (True, 256), (False, 90)]
    assert weights(setup) != before
    assert "stages.1.blocks.0" in told and re.search(r"one step: loss \d\.\d{4}", told)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_finds_a_loss_that_is_not_finite() -> None:
    setup = build_tiny()
    nn.init.constant_(classifier(setup).bias, math.inf)
    with pytest.raises(NonFiniteError, match="step 0"):
        dry_run(setup)


# ---- scaler and CUDA ------------------------------------------------------------------------------------------------


def scaled(device: str) -> Setup:
    """A run with a working gradient scaler; on a CPU, where float16 is refused, in float32."""
    if device == "cuda":
        world = World(rank=0, local_rank=0, size=1, device=torch.device("cuda", 0))
        setup = build_tiny("runtime.precision=float16", "data.batch_size=32", world=world)
        assert setup.precision == torch.float16
        return setup
    setup = build_tiny("data.batch_size=32")
    setup.scaler = torch.amp.GradScaler("cpu")
    return setup


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
def test_the_scaler_skips_an_overflow_and_is_restored(device: str, tmp_path: Path) -> None:
    setup = scaled(device)
    assert setup.scaler.is_enabled()
    batches = first_batches(setup, 4)
    step(setup, [batches[0]])  # makes the scale
    setup.scaler.update(1024.0)
    before = weights(setup)
    step(setup, [batches[1]], 1)
    assert weights(setup) != before and setup.scaler.get_scale() == 1024.0

    before = weights(setup)
    handle = classifier(setup).weight.register_hook(lambda gradient: gradient * math.inf)
    assert math.isfinite(step(setup, [batches[2]], 2)), "no error: float16 overflows now and then"
    handle.remove()
    assert weights(setup) == before and setup.scaler.get_scale() == 512.0
    step(setup, [batches[2]], 2)

    saved = load_checkpoint(save(setup, RunFolder(tmp_path), Progress(step=3)))
    again = scaled(device)
    assert again.scaler.get_scale() != 512.0
    assert restore(again, saved).step == 3
    assert again.scaler.state_dict() == setup.scaler.state_dict()
    assert weights(again) == weights(setup)
    for resumed in (setup, again):
        torch.manual_seed(0)
        step(resumed, [batches[3]], 3)
    assert again.scaler.state_dict() == setup.scaler.state_dict()
    for name, value in setup.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], value)


@CUDA
def test_a_step_on_cuda() -> None:
    """bfloat16, channels_last, pinned batches, a fused optimizer: the config's defaults there, and the CPU's result."""
    world = World(rank=0, local_rank=0, size=1, device=torch.device("cuda", 0))
    overrides = [*PLAIN, "optim.name=adamw", "optim.lr=1e-3", "model.in_chans=3", "ema.enabled=true"]
    setup = build_tiny(*overrides, "runtime.precision=bfloat16", world=world)
    host = build_tiny(*overrides)
    assert setup.channels_last and not setup.scaler.is_enabled()
    convolutions = [m.weight for m in setup.model.modules() if isinstance(m, nn.Conv2d) and m.weight.shape[1] > 1]
    assert convolutions and all(w.is_contiguous(memory_format=torch.channels_last) for w in convolutions)
    assert setup.optimizer.defaults["fused"] is True

    batch = first_batches(setup)[0]
    assert all(part.is_pinned() for part in batch)
    images = setup.to_device(batch[0])
    assert images.is_cuda and images.is_contiguous(memory_format=torch.channels_last)
    seen: list[torch.dtype] = []
    setup.model.register_forward_hook(lambda _module, _inputs, logits: seen.append(logits.dtype))
    losses = step(setup, [batch]), step(host, [batch])
    assert seen == [torch.bfloat16]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    mine = torch.cat([g.flatten().cpu() for g in gradients(setup).values()])
    theirs = torch.cat([g.flatten() for g in gradients(host).values()])
    assert torch.cosine_similarity(mine, theirs, dim=0) > 0.99
    found = evaluate(setup)
    assert found["val_loss"] == pytest.approx(evaluate(host)["val_loss"], rel=0.02)
    with pytest.raises(NonFiniteError) as caught:
        step(setup, [poisoned(batch, 5)], 1)
    assert samples_named(caught.value) == [int(batch[2][5])]
