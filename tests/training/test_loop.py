"""The loop from inside: one step, stopping and going on. tests/test_train.py runs the whole command."""

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
from torch import Tensor, nn

from models.factory import class_names_of, create_model
from models.weights import weights_sha256
from tests.training.parts import CUDA, Batch, build_tiny, classifier, first_batches, image_path, step, weights
from training import loop
from training import setup as building
from training.checkpoint import latest_checkpoint
from training.config import load_config
from training.console import StopSignals
from training.data.dataset import ReadError
from training.data.loading import end_workers
from training.distributed import World
from training.loop import Stepped, dry_run, train, train_step, validate
from training.non_finite import NonFiniteError
from training.report import page
from training.run_folder import RunFolder
from training.setup import Setup
from training.state import Progress

# Weights move by the gradient itself, so that equal gradients give equal weights.
PLAIN = ["optim.name=sgd", "optim.lr=0.1", "optim.schedule=constant", "optim.warmup_epochs=0", "drop_path.rate=0"]


def gradients(setup: Setup) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in setup.model.named_parameters() if p.grad is not None}
    assert len(found) == len(list(setup.model.parameters()))
    return found


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
    progress = Progress(epoch=1, batch=2, step=7)
    train_step(setup, setup.model, [(images, targets, indices)], progress, loss_fn=Spy(), signals=StopSignals())
    _, expected = setup.mixer(batch[0].clone(), batch[1], 7, epoch=1)
    assert torch.equal(seen[0], expected), "batch 2 of epoch 1 is the run's batch 7"
    assert not torch.equal(seen[0], setup.mixer(batch[0].clone(), batch[1], 2)[1])


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


class Ranks(World):
    """The first of two processes, beside one that says what it is told; counts what they exchange."""

    theirs = (0.0, 0.0)  # its fault, and whether it was told to stop
    exchanges = 0

    def sum(self, values: Tensor) -> Tensor:
        object.__setattr__(self, "exchanges", self.exchanges + 1)
        return values.double() + torch.tensor([0.0, *self.theirs], dtype=torch.float64)


def two_ranks(fault: float = 0.0, stop: float = 0.0) -> Ranks:
    world = Ranks(rank=0, local_rank=0, size=2, device=torch.device("cpu"))
    object.__setattr__(world, "theirs", (fault, stop))
    return world


@pytest.mark.parametrize(("own", "theirs", "named"), [(2, 1, "0"), (1, 2, "1"), (1, 1, "0, 1"), (0, 1, "1")])
def test_ranks_agree_on_where_it_began(own: int, theirs: int, named: str) -> None:
    """2: a loss is not finite; 1: only a gradient, perhaps by the exchange with a rank whose loss is not."""
    setup = build_tiny("data.batch_size=8")
    setup.world = two_ranks(theirs)
    batch = first_batches(setup)[0]
    if own == 1:
        classifier(setup).weight.register_hook(lambda gradient: gradient * math.inf)
    before = weights(setup)
    with pytest.raises(NonFiniteError, match=rf"step 3: .*is not finite on rank {named}; stopped") as caught:
        step(setup, [poisoned(batch, 5) if own == 2 else batch], 3)
    assert ("rank 0: in training samples" in str(caught.value)) == ("0" in named)
    if own == 2:
        assert samples_named(caught.value) == [int(batch[2][5])]
    assert weights(setup) == before


@pytest.mark.parametrize("stop", [0.0, 1.0])
def test_a_step_asks_the_other_ranks_once(stop: float) -> None:
    setup = build_tiny("data.batch_size=8", "optim.accumulate=3")
    setup.world = world = two_ranks(stop=stop)
    before = weights(setup)
    stepped = train_step(
        setup, setup.model, first_batches(setup, 3), Progress(), loss_fn=nn.CrossEntropyLoss(), signals=StopSignals()
    )
    assert world.exchanges == 1 and stepped.stop == bool(stop) and math.isfinite(stepped.loss)
    assert weights(setup) != before, "a step is finished before a run stops"


def test_a_step_waits_for_its_loss_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # fast paths are of the CPU, where reading a number waits for nothing
    setup = build_tiny(*PLAIN, "data.batch_size=8", "optim.accumulate=3", "runtime.fast_paths=false")
    batches = first_batches(setup, 3)
    waits: list[str] = []

    def counted(name: str) -> None:
        real = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda tensor: (waits.append(name), real(tensor))[1])

    for name in ("item", "tolist", "__bool__", "__float__"):
        counted(name)
    step(setup, batches)
    assert waits == ["tolist"]


def run(folder: Path, *overrides: str, resume: bool = False) -> tuple[Setup, dict[str, Any]]:
    setup = build_tiny(*overrides)
    run_folder = RunFolder(folder)
    run_folder.make(fresh=not resume)
    checkpoint = latest_checkpoint(run_folder.checkpoints) if resume else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "write_report", lambda _: None)  # its pictures take longer than all the rest
        try:
            return setup, train(setup, run_folder, checkpoint)
        finally:
            for loader in (setup.train_loader, setup.val_loader):
                end_workers(loader)  # as run() does; the garbage collector would wait for each


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

    def sending(setup: Setup, trained: nn.Module, batches: list[Any], progress: Progress, **options: Any) -> Stepped:
        if progress.step == steps - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(setup, trained, batches, progress, **options)

    monkeypatch.setattr(loop, "train_step", sending)


def test_the_drop_path_schedule_is_applied_at_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers, rates = [], []
    real = building.build

    def spying(*arguments: Any, **options: Any) -> Setup:
        setup = real(*arguments, **options)
        set_step = setup.depth.set_step
        monkeypatch.setattr(setup.depth, "set_step", lambda number: (numbers.append(number), set_step(number))[1])
        last = next(iter(setup.depth.blocks[-1].drop_paths.values()))
        setup.model.register_forward_pre_hook(lambda module, _: rates.append(last.rate) if module.training else None)
        return setup

    monkeypatch.setattr("tests.training.parts.build", spying)
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

    def kill(*_: object, **__: object) -> None:
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


def damaging(monkeypatch: pytest.MonkeyPatch, epoch: int, path: Path) -> None:
    """Cuts an image short when that epoch, counted from 0, has been trained and before it is validated."""
    real = loop._end_epoch

    def end_epoch(setup: Setup, folder: RunFolder, progress: Progress, **options: Any) -> dict[str, float] | None:
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

    def kill(*_: object, **__: object) -> None:
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
    path = Path(setup.data.train.source.location, setup.data.train.source.name(index))
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
        patch.setattr(building, "check_images", lambda *_, **__: None)
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


def test_resuming_a_finished_run_keeps_its_drop_path_counts(tmp_path: Path) -> None:
    run(tmp_path / "run")
    before = (tmp_path / "run" / "drop_path.csv").read_text()
    assert before.splitlines()[-1].split(",")[4], "a realised rate"
    run(tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "drop_path.csv").read_text() == before


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


def test_a_dry_run_takes_one_step_and_one_validation_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "overfit", lambda _: "learned by heart")
    setup = build_tiny("optim.accumulate=2", "data.eval_batch_size=90")
    seen: list[tuple[bool, int]] = []

    def note(module: nn.Module, inputs: tuple[Tensor], _: Tensor) -> None:
        if not inputs[0].is_meta:  # counting compute
            seen.append((module.training, len(inputs[0])))

    setup.model.register_forward_hook(note)
    before = weights(setup)
    told = dry_run(setup)
    assert "learned by heart" in told
    assert seen == [(True, 256), (True, 256), (False, 90)]
    assert weights(setup) != before
    assert "stages.1.blocks.0" in told and re.search(r"one step: loss \d\.\d{4}", told)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_finds_a_loss_that_is_not_finite() -> None:
    setup = build_tiny()
    nn.init.constant_(classifier(setup).bias, math.inf)
    with pytest.raises(NonFiniteError, match="step 0"):
        dry_run(setup)


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
    found = validate(setup)
    assert found["val_loss"] == pytest.approx(validate(host)["val_loss"], rel=0.02)
    with pytest.raises(NonFiniteError) as caught:
        step(setup, [poisoned(batch, 5)], 1)
    assert samples_named(caught.value) == [int(batch[2][5])]
