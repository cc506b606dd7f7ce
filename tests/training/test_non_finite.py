"""Steps that are not finite: left out on all ranks, listed, and the same after a resume; the scaler's own ones as well."""

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from files.errors import ConfigError
from models.weights import weights_sha256
from tests.training.parts import TINY, Batch, build_tiny, classifier, first_batches, weights
from training import loop
from training.checkpoint import latest_checkpoint
from training.config import load_config
from training.console import StopSignals
from training.loop import Stepped, train, train_step
from training.non_finite import COLUMNS, NonFiniteError, suspects, ways_out
from training.report import page
from training.run import check_same_run, describe_result
from training.run_folder import RunFolder
from training.setup import Setup
from training.state import Progress

SKIP = "optim.on_non_finite=skip"


def take(setup: Setup, batch: Batch, progress: Progress) -> Stepped:
    setup.model.train()
    return train_step(setup, setup.model, [batch], progress, loss_fn=nn.CrossEntropyLoss(), signals=StopSignals())


def poisoned(batch: Batch) -> Batch:
    images = batch[0].clone()
    images[2] = math.nan
    return images, batch[1], batch[2]


def test_a_step_left_out_changes_nothing_but_the_random_streams() -> None:
    setup = build_tiny(SKIP, "ema.enabled=true", "model={name: timm/resnet10t, in_chans: 1, image_size: 32}")
    (good,) = first_batches(setup)
    good = (good[0][:4], good[1][:4], good[2][:4])
    assert setup.ema is not None and any("running_mean" in name for name, _ in setup.model.named_buffers())
    take(setup, good, Progress())
    before, average = weights(setup), weights_sha256(setup.ema.module.state_dict())
    moments = {name: value.clone() for state in setup.optimizer.state.values() for name, value in state.items()}
    progress = Progress(step=1)
    loss, stop = take(setup, poisoned(good), progress)
    assert math.isnan(loss) and not stop
    assert weights(setup) == before and weights_sha256(setup.ema.module.state_dict()) == average
    after = {name: value for state in setup.optimizer.state.values() for name, value in state.items()}
    assert all(torch.equal(after[name], moments[name]) for name in moments)
    progress.advance([good], loss, 1.0)
    assert (progress.step, progress.batch, progress.samples, progress.loss_sum, progress.non_finite) == (
        2,
        1,
        0,
        0.0,
        1,
    )
    assert math.isfinite(take(setup, good, progress).loss) and weights(setup) != before


def test_the_policy_stop_names_what_skip_leaves_out(capsys: pytest.CaptureFixture[str]) -> None:
    setup = build_tiny("data.batch_size=8")
    (batch,) = first_batches(setup)
    with pytest.raises(NonFiniteError, match="stopped before the optimizer step") as caught:
        take(setup, poisoned(batch), Progress(step=3))
    assert f"rank 0: in training samples {int(batch[2][2])}\n" in str(caught.value)
    setup = build_tiny("data.batch_size=8", SKIP, "optim.max_non_finite=2")
    progress = Progress()
    for _ in range(2):
        progress.advance([batch], take(setup, poisoned(batch), progress).loss, 1.0)
    assert (
        "warning: step 1: loss or gradient is not finite on rank 0; left out (2 of at most 2)"
        in capsys.readouterr().err
    )
    before = weights(setup)
    with pytest.raises(NonFiniteError, match=r"2 steps were left out before it, optim.max_non_finite is 2"):
        take(setup, poisoned(batch), progress)
    assert weights(setup) == before


def test_suspects() -> None:
    rows, none = torch.tensor([False, True]), torch.tensor([False, False])
    bad, fine = torch.tensor(math.inf), torch.tensor(1.0)
    first, second = torch.tensor([3, 4]), torch.tensor([5, 6])
    assert suspects([(bad, rows, first), (fine, none, second)]) == [4]
    assert suspects([(bad, none, first), (fine, none, second)]) == [3, 4]
    assert suspects([(fine, none, first), (fine, none, second)]) == [3, 4, 5, 6]


def run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str, bad: tuple[int, ...], resume: bool = False
) -> dict:
    """A tiny run in which the batches of some steps are poisoned."""
    real = loop.train_step

    def poisoning(setup: Setup, trained: nn.Module, batches: list[Any], progress: Progress, **options: Any) -> Stepped:
        batches = [poisoned(batch) for batch in batches] if progress.step in bad else batches
        return real(setup, trained, batches, progress, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", poisoning)
        patch.setattr(page, "write_report", lambda _: None)
        setup = build_tiny(*overrides)
        run_folder = RunFolder(folder)
        run_folder.make(fresh=not resume)
        checkpoint = latest_checkpoint(run_folder.checkpoints) if resume else None
        return train(setup, run_folder, checkpoint)


def rows(path: Path) -> list[list[str]]:
    with path.open() as file:
        return list(csv.reader(file))


def losses(folder: Path) -> list[tuple[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return [(row["train_loss"], row["val_loss"]) for row in csv.DictReader(file)]


def test_a_run_that_leaves_steps_out_is_exact_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [SKIP, "ema.enabled=true", "checkpoint.every_steps=2", "checkpoint.keep=9"]
    whole = run(tmp_path / "whole", monkeypatch, *settings, bad=(1, 3, 6))
    listed = rows(tmp_path / "whole" / "non_finite.csv")
    assert listed[0] == list(COLUMNS) and [row[:3] for row in listed[1:]] == [
        ["1", "1", "0"],
        ["1", "3", "0"],
        ["2", "6", "0"],
    ]
    assert all(len(row[3].split()) == 1 for row in listed[1:])
    assert whole["non_finite_steps"] == 3 and whole["steps"] == 10
    told = describe_result({**whole, "folder": tmp_path / "whole"})
    assert told.endswith(f"steps left out as not finite: 3: {tmp_path / 'whole' / 'non_finite.csv'}")
    # killed after step 6 was listed, before the checkpoint behind it: the row is written again, not twice
    with pytest.raises(NonFiniteError):
        run(tmp_path / "run", monkeypatch, *settings, "optim.max_non_finite=2", bad=(1, 3, 6))
    assert len(rows(tmp_path / "run" / "non_finite.csv")) == 4
    again = run(tmp_path / "run", monkeypatch, *settings, bad=(1, 3, 6), resume=True)
    for key in ("weights_sha256", "ema_sha256", "non_finite_steps", "best_top1"):
        assert again[key] == whole[key]
    assert rows(tmp_path / "run" / "non_finite.csv") == listed and losses(tmp_path / "run") == losses(
        tmp_path / "whole"
    )
    other = run(tmp_path / "other", monkeypatch, *settings, bad=())
    assert other["weights_sha256"] != whole["weights_sha256"] and other["non_finite_steps"] == 0


def test_an_epoch_without_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "run", monkeypatch, SKIP, bad=(0, 1, 2, 3, 4))
    assert losses(tmp_path / "run")[0][0] == "nan" and losses(tmp_path / "run")[1][0] != "nan"
    page.write_report(tmp_path / "run")


def test_a_damaged_list_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    setup = build_tiny(SKIP)
    policy = setup.non_finite
    policy.path = tmp_path / "non_finite.csv"
    policy.path.write_bytes(b"epoch,step,rank,samples\n1,3,0,5\n\x00\xff,\n2,4,0,5 6\n1,2")
    policy.start(4)
    assert policy.path.read_text() == "epoch,step,rank,samples\n1,3,0,5\n"
    policy.path.unlink()
    build_tiny().non_finite.start(4)
    assert not policy.path.exists()


def test_the_keys(tmp_path: Path) -> None:
    assert load_config(None, [*TINY, SKIP]).optim.max_non_finite == 10
    for words in (["optim.max_non_finite=3"], [SKIP, "optim.max_non_finite=0"]):
        with pytest.raises(ConfigError, match=r"optim\.max_non_finite"):
            load_config(None, [*TINY, *words])
    (tmp_path / "config.yaml").write_text("model: {name: a}\ndata: {dataset: digits}\n")
    skipping = load_config(tmp_path / "config.yaml", [SKIP])
    check_same_run(RunFolder(tmp_path), skipping)  # a run that stopped may go on with skipping


def test_a_step_that_the_scaler_leaves_out_leaves_the_average() -> None:
    """float16's overflow, on a CPU: the scaler halves its scale and takes no step; rates go by the step's number."""
    setup = build_tiny("ema.enabled=true", "ema.decay=0.5", "data.batch_size=16", "optim.warmup_epochs=0")
    setup.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    overflow: list[bool] = []

    def hook(gradient: Tensor) -> Tensor:
        return gradient * math.inf if overflow else gradient

    classifier(setup).weight.register_hook(hook)
    batches, progress = first_batches(setup, 3), Progress()
    assert setup.ema is not None
    for batch in (
        batches[0],
        batches[1],
        batches[0],
    ):  # timm's average begins as a copy and differs from the third step on
        progress.advance([batch], take(setup, batch, progress).loss, 1.0)
    before, average = weights(setup), weights_sha256(setup.ema.module.state_dict())
    assert average != before
    overflow.append(True)
    loss, _ = take(setup, batches[1], progress)
    assert math.isfinite(loss) and setup.scaler.get_scale() == 512.0
    assert weights(setup) == before and weights_sha256(setup.ema.module.state_dict()) == average
    progress.advance([batches[1]], loss, 1.0)
    overflow.clear()
    take(setup, batches[2], progress)
    assert weights(setup) != before and weights_sha256(setup.ema.module.state_dict()) != average
    reference = build_tiny("ema.enabled=true", "optim.warmup_epochs=0", "data.batch_size=16")
    reference.scheduler.step_update(progress.step)
    assert setup.lr == reference.lr and progress.step == 4


@pytest.mark.parametrize(
    ("overrides", "ways"),
    [
        ((), ["lower optim.lr", "set optim.clip_grad"]),
        (
            ("optim.clip_grad=1", "runtime.precision=bfloat16"),
            ["lower optim.lr", "use runtime.precision=float32"],
        ),
    ],
)
def test_nothing_is_advised_that_is_so_already(overrides: tuple[str, ...], ways: list[str]) -> None:
    setup = build_tiny("runtime.precision=float32", "optim.clip_grad=null", *overrides)
    assert ways_out(setup.config, setup.model, setup.precision) == ways == setup.non_finite.ways


@pytest.mark.parametrize(("mode", "rate", "told"), [("skip", 0.5, True), ("mask", 0.5, False), ("skip", 0, False)])
def test_batch_norms_that_see_few_samples_are_told(mode: str, rate: float, told: bool) -> None:
    """A batch norm over two samples of one position multiplies gradients by up to 300, in each block anew."""
    model = "model={name: timm/resnet10t, in_chans: 1, image_size: 32}"
    setup = build_tiny(model, f"drop_path.mode={mode}", f"drop_path.rate={rate}")
    assert any("drop_path.mode=mask" in way for way in setup.non_finite.ways) == told


def test_the_last_checkpoint_is_told_where_there_is_one(tmp_path: Path) -> None:
    setup = build_tiny()
    (batch,) = first_batches(setup)
    setup.non_finite.path = tmp_path / "non_finite.csv"
    with pytest.raises(NonFiniteError) as before:
        take(setup, poisoned(batch), Progress())
    assert "checkpoint" not in str(before.value) and "lower optim.lr" in str(before.value)
    (tmp_path / "checkpoints" / "step-00000004").mkdir(parents=True)
    with pytest.raises(NonFiniteError, match="; the last checkpoint is good"):
        take(setup, poisoned(batch), Progress())
