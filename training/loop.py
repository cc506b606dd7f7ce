"""The training loop: train, evaluate, save, stop and go on. It reads from top to bottom.

A run is a sequence of optimizer steps. Everything that changes with time is a pure function of the step (learning rate,
drop-path rates, sample order, augmentation, mixing) or part of the checkpoint (`training.state.RunState`); so a run that
was killed and resumed ends with the weights of one that was not.
"""

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from files.durable import remove, save_text
from files.strict_json import finite
from models.factory import saved_config
from models.weights import save_weights, weights_sha256
from stochastic_depth.report import drop_path_report
from training.checkpoint import Checkpoint
from training.compiling import compile_in_place
from training.config import dump_config
from training.console import Board, ProgressBar, StopSignals
from training.data.dataset import ReadError
from training.distributed import World, data_parallel, stop_together
from training.early_stopping import note_epoch, stop_reason
from training.evaluation import evaluate
from training.metrics import METRICS
from training.overfit import overfit
from training.rates import rates_row
from training.reporting import write_report
from training.run_folder import RunFolder, describe_environment
from training.saving import Saver
from training.setup import Setup, seed_everything
from training.sharding import gathered, gradients_exchanged, is_sharded, whole, whole_state
from training.state import Progress, RunState


class Stepped(NamedTuple):
    """What became of a step: this rank's mean loss, NaN for one left out, and whether any process was told to stop."""

    loss: float
    stop: bool


def train(
    setup: Setup, folder: RunFolder, checkpoint: Checkpoint | None = None, signals: StopSignals | None = None
) -> dict[str, Any]:
    """Trains to the end, or until a signal.

    Args:
        setup: Built from the config.
        folder: Made and checked.
        checkpoint: Where to go on, or `None` from the start.
        signals: Of the caller, who takes them from before this begins until after it ends; `None`: its own.

    Returns:
        The content of summary.json and `report_made`, whether this process made report.html; with the key `stopped_by`
        instead when a signal ended the run early.

    Raises:
        NonFiniteError: See `train_step`.
        ReadError: Data could not be read; the run is saved as it was before.
    """
    config, world, model = setup.config, setup.world, setup.model
    seed_everything(config.seed + 1_000_003 * (world.rank + 1))  # ranks drop different samples
    state = RunState(setup)
    if checkpoint is not None:
        state.restore(checkpoint)
    progress = state.progress
    setup.skips.path, setup.non_finite.path = folder.skipped, folder.non_finite
    if world.is_main:
        _start_files(setup, folder, progress)
    trained: nn.Module = model
    compile_in_place(model, config.runtime.compile)
    loss_fn = setup.loss_fn
    metrics: dict[str, float] = {}
    saved_step = progress.step  # saved, or on its way to the disk; nothing has to be at step 0
    on_disk = saved_step > 0  # the run's first checkpoint

    taken = contextlib.nullcontext(signals) if signals is not None else StopSignals()
    with (
        taken as signals,
        Saver(state, folder, on_failure=signals.ask) as saver,
        Board(setup, folder, progress) as board,
        ProgressBar(setup, progress) as bar,
    ):
        try:
            while progress.epoch < config.optim.epochs and not stop_reason(config.early_stopping, progress):
                model.train()
                if setup.freezing.set_epoch(progress.epoch):
                    trained = data_parallel(model, world)
                setup.sampler.set_position(progress.epoch, progress.batch)
                batches = setup.feed.read(setup.skips.read(setup.train_loader))
                state.random.put_back()  # nothing may draw between here and the first step
                clock = time.perf_counter()
                for group in _groups(batches, config.optim.accumulate, world):
                    loss, stop = train_step(setup, trained, group, progress, loss_fn=loss_fn, signals=signals)
                    progress.advance(group, loss, time.perf_counter() - clock, waited=setup.feed.waited())
                    bar.step(progress, loss)
                    if stop:
                        saver.save_and_wait()
                        return _stop(setup, folder, progress, metrics, signals, bar)
                    every = config.checkpoint.every_steps
                    if every and progress.step % every == 0 and progress.batch < setup.sampler.batches_per_epoch:
                        saver.save()
                        saved_step = progress.step
                    clock = time.perf_counter()

                # Before the validation, which may fail: a run resumed from here begins with it.
                every, epoch = config.checkpoint.every_epochs, progress.epoch + 1
                if progress.step > saved_step and (epoch == config.optim.epochs or (every and epoch % every == 0)):
                    saver.save()
                    saved_step = progress.step
                if not on_disk and saved_step:
                    saver.wait()  # so that rows behind a save are rows of a run with a checkpoint (`training.resuming`)
                    on_disk = True
                ended = _end_epoch(setup, folder, progress, signals=signals)
                if ended is None:
                    if progress.step > saved_step:
                        saver.save()
                    saver.wait()
                    return _stop(setup, folder, progress, metrics, signals, bar)
                metrics = ended
                note_epoch(config.early_stopping, progress, metrics, world)
                bar.epoch(metrics)
                board.write(metrics, progress.step)
            if reason := stop_reason(config.early_stopping, progress):
                if progress.step > saved_step:
                    saver.save()
                bar.write(reason)
            saver.wait()
        except ReadError as error:
            if progress.step > saved_step:
                saver.save_and_wait()
            kept = f"\nthe run is saved at step {progress.step}: go on with --resume" if progress.step else ""
            raise ReadError(f"{error}{kept}") from error
    if not metrics:  # resumed when nothing was left to do
        metrics = validate(setup)
    summary = _write_results(setup, folder, progress, metrics)
    return summary | {"report_made": write_report(setup, folder, progress, signals=signals)}


def train_step(
    setup: Setup,
    trained: nn.Module,
    batches: list[Any],
    progress: Progress,
    *,
    loss_fn: nn.Module,
    signals: StopSignals,
) -> Stepped:
    """One optimizer step over `accumulate` batches. Waits for the device, and asks the other ranks, once.

    Raises:
        NonFiniteError: On every rank, before the optimizer step.
    """
    config, world = setup.config, setup.world
    setup.non_finite.keep(setup.model)
    setup.scheduler.step_update(progress.step)
    setup.depth.set_step(progress.step)
    setup.optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=world.device)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []  # loss, (B,) rows of logits that are not finite, (B,) sample indices
    for i, (images, targets, indices) in enumerate(batches):
        images, targets = setup.to_device(images), targets.to(world.device, non_blocking=True)
        micro_step = progress.epoch * setup.sampler.batches_per_epoch + progress.batch + i
        images = setup.data.erase(images, indices, epoch=progress.epoch, batch=micro_step)
        images, targets = setup.mixer(images, targets, micro_step, epoch=progress.epoch)
        last = i == len(batches) - 1
        # gradients are exchanged between ranks once, with the last batch of the step
        with gradients_exchanged(trained, now=last):
            with setup.autocast():
                logits = trained(images)
            loss = setup.distillation(loss_fn, images, logits.float(), targets) / len(batches)
            setup.scaler.scale(loss).backward()
        total += loss.detach()
        seen.append((loss.detach(), ~torch.isfinite(logits.detach()).all(dim=1), indices))
    setup.scaler.unscale_(setup.optimizer)
    parameters = [p for p in setup.model.parameters() if p.grad is not None]
    norm = whole(torch.nn.utils.clip_grad_norm_(parameters, config.optim.clip_grad or math.inf))
    if (
        setup.scaler.is_enabled()
    ):  # float16 overflows now and then, and the scaler skips that step; elsewhere it is a fault
        norm = torch.zeros_like(norm)
    mean_loss, faults, stop = _agree(world, total, norm, stop=signals.received is not None)
    if any(faults):
        setup.non_finite.meet(world, setup.model, progress, faults, seen)
        setup.optimizer.zero_grad(set_to_none=True)
        setup.scaler.update()
        return Stepped(math.nan, stop)
    scale = setup.scaler.get_scale()
    setup.scaler.step(setup.optimizer)
    setup.scaler.update()
    if setup.ema is not None and setup.scaler.get_scale() >= scale:  # lower: the scaler left out a step that overflowed
        setup.ema.update(setup.model, step=progress.step)
    return Stepped(mean_loss, stop)


def _agree(world: World, loss: Tensor, norm: Tensor, *, stop: bool) -> tuple[float, list[int], bool]:
    """What all ranks must know before the optimizer step, by one all-reduce and one wait for the device.

    Returns:
        This rank's loss as a number; of each rank 2 where its loss is not finite, 1 where only its gradient is not, else
        0; and whether any rank was told to stop.
    """
    flags = torch.zeros(world.size + 1, device=world.device)
    flags[world.rank] = torch.where(torch.isfinite(loss), (~torch.isfinite(norm)).float(), 2.0)
    flags[-1] = float(stop)
    if world.size > 1:
        flags = world.sum(flags)
    *faults, stops, number = torch.cat([flags, loss[None].to(flags.device)]).tolist()
    return number, [int(fault) for fault in faults], stops > 0


def _groups(batches: Iterator[Any], size: int, world: World) -> Iterator[list[Any]]:
    """Lists of `size` batches; the last of an epoch may be shorter.

    Raises:
        ReadError: On every rank, before any of them begins the step that one cannot take part in.
    """
    while True:
        group, problem = [], None
        try:
            group = list(islice(batches, size))
        except ReadError as error:
            problem = error
        stop_together(world, problem)
        if not group:
            return
        yield group


def _stop(
    setup: Setup,
    folder: RunFolder,
    progress: Progress,
    metrics: dict[str, float],
    signals: StopSignals,
    bar: ProgressBar,
) -> dict[str, Any]:
    """Says that the run stops at a signal, where it was saved; returns the summary."""
    summary = _write_results(setup, folder, progress, metrics)
    write_report(setup, folder, progress, signals=signals)
    reason = signals.received or "a signal"
    saved = folder.checkpoints / f"step-{progress.step:08d}"
    bar.write(f"{reason}: saved {saved} at step {progress.step}; go on with --resume auto")
    return summary | {"stopped_by": reason}


def _end_epoch(setup: Setup, folder: RunFolder, progress: Progress, *, signals: StopSignals) -> dict[str, float] | None:
    """Evaluates where it is time, notes the epoch in metrics.csv, keeps the best weights, and moves on to the next epoch.

    Args:
        setup: The run.
        folder: Its folder.
        progress: At the end of the epoch.
        signals: May end the evaluation early.

    Returns:
        The row of metrics.csv, with NaN for what was not measured after this epoch. `None` where a process was told to
        stop before the evaluation was done: nothing is noted then, and a resumed run begins with it.
    """
    world = setup.world
    clock = time.perf_counter()
    loss_sum, samples = world.sum(torch.tensor([progress.loss_sum, progress.samples], dtype=torch.float64)).tolist()
    times = torch.tensor([progress.epoch_data_seconds, progress.epoch_seconds], dtype=torch.float64)
    data_seconds, train_seconds = world.sum(times).tolist()
    every, epoch = setup.config.log.validate_every, progress.epoch + 1
    validated = epoch % every == 0 or epoch == setup.config.optim.epochs
    metrics = validate(setup, signals=signals) if validated else {metric.column: math.nan for metric in METRICS}
    if world.any(signals.received is not None):
        return None
    progress.seconds += time.perf_counter() - clock
    row: dict[str, float] = {
        "epoch": progress.epoch + 1,
        "step": progress.step,
        "train_loss": loss_sum / samples if samples else math.nan,  # all steps were left out
        **metrics,
        "lr": setup.lr,
        "drop_path_rate": setup.drop_path_rate,
        "images_per_second": samples / progress.epoch_seconds,
        "seconds": progress.seconds,
        "data_share": data_seconds / train_seconds,  # no column of metrics.csv
    }
    better = metrics["val_top1"] > progress.best_top1  # NaN is not
    progress.best_top1 = metrics["val_top1"] if better else progress.best_top1
    rates = rates_row(setup.depth, epoch=progress.epoch, steps_per_epoch=setup.steps_per_epoch)
    progress.next_epoch()
    weights = whole_state(setup.evaluated) if better else {}
    if world.is_main:
        folder.append_metrics(row)
        folder.append_rates(rates)
        save_text(folder.drop_path, drop_path_report(setup.model, macs=setup.macs).to_csv())
        if better:
            save_weights(folder.best, weights, saved_config(setup.model))
    return row


def validate(setup: Setup, batches: int | None = None, *, signals: StopSignals | None = None) -> dict[str, float]:
    """The metrics of the model whose accuracy counts, on all validation images or some batches, or until a signal.

    Raises:
        ReadError: See `evaluate`.
    """
    # each process has BatchNorm statistics of its own batches; those of the main one are saved, so they are measured
    setup.world.share(setup.evaluated.buffers())
    images = islice(setup.val_batches(), batches)
    images = images if signals is None else signals.until_told(images)
    with gathered(setup.evaluated):
        return evaluate(setup.evaluated, images, METRICS, world=setup.world, autocast=setup.autocast())


def _start_files(setup: Setup, folder: RunFolder, progress: Progress) -> None:
    if progress.step == 0:
        if folder.best.exists():  # of a run that ended before its first checkpoint
            remove(folder.best)
        for path in (folder.metrics, folder.rates, folder.skipped, folder.evaluation):
            path.unlink(missing_ok=True)
    setup.non_finite.start(progress.step)
    folder.cut_metrics(progress.epoch)
    save_text(folder.config, dump_config(setup.config))
    folder.write_json(folder.data, setup.data.identity)
    teacher = setup.distillation.identity
    environment = describe_environment(setup.world, decoder=setup.data.decoder)
    folder.write_json(folder.environment, environment | ({} if teacher is None else {"teacher": teacher}))


def _write_results(setup: Setup, folder: RunFolder, progress: Progress, metrics: dict[str, float]) -> dict[str, Any]:
    """summary.json, on the main process; returns it, with None for what is not finite."""
    weights = whole_state(setup.model)
    average = None if setup.ema is None else whole_state(setup.ema.module)
    if not setup.world.is_main:
        return {}
    device = setup.world.device
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else _peak_rss_mb()
    told = {
        "best_top1": progress.best_top1 if progress.best_top1 >= 0 else None,
        "final_top1": metrics.get("val_top1"),
        "epochs": progress.epoch,
        "steps": progress.step,
        "skipped_images": {part: setup.skips.count(part) for part in ("train", "val")},
        "non_finite_steps": progress.non_finite,
        "seconds": progress.seconds,
        "train_seconds": progress.train_seconds,
        "images_per_second": metrics.get("images_per_second"),
        "data_share": round(progress.data_seconds / progress.train_seconds, 4) if progress.train_seconds else None,
        "peak_memory_mb": round(peak, 1),
        "weights_sha256": weights_sha256(weights),
        "ema_sha256": None if average is None else weights_sha256(average),
        "stopped_early": stop_reason(setup.config.early_stopping, progress),
    }
    summary = finite(told)
    folder.write_json(folder.summary, summary)
    return summary


def _peak_rss_mb() -> float:
    """Largest resident memory of this process so far; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def dry_run(setup: Setup) -> str:
    """Runs one training step and one validation batch, and learns one batch by heart; nothing is kept.

    Returns:
        What to print.
    """
    setup.non_finite.limit = None  # what a run would leave out, a plan names
    setup.sampler.set_position(0, 0)
    setup.model.train()
    setup.freezing.set_epoch(0)
    batches = setup.feed.read(setup.skips.read(setup.train_loader))
    group = next(_groups(batches, setup.config.optim.accumulate, setup.world))
    start = time.perf_counter()
    loss, _ = train_step(setup, setup.model, group, Progress(), loss_fn=setup.loss_fn, signals=StopSignals())
    seconds = time.perf_counter() - start
    learned = overfit(setup) if setup.world.is_main and not is_sharded(setup.model) else ""
    validate(setup, batches=1)
    report = drop_path_report(setup.model, macs=setup.macs)
    return f"{report}\none step: loss {loss:.4f}, {seconds:.2f} s, all finite\n{learned}\nnothing was written"
