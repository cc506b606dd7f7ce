"""What a person sees of a run, and the signals they send it."""

import signal
import sys
from typing import Any

from torch.utils.tensorboard.writer import SummaryWriter
from tqdm import tqdm

from training.distributed import World
from training.run_folder import RunFolder
from training.setup import Setup
from training.state import Progress


class StopSignals:
    """Notes SIGTERM, SIGUSR1 and Ctrl-C, so that the loop finishes its step; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: Any) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


def drop_path_modules(setup: Setup) -> list[Any]:
    return [module for block in setup.depth.blocks for module in block.drop_paths.values()]


class ProgressBar:
    """A bar over all steps of the run on the main process, and a line per epoch."""

    def __init__(self, setup: Setup, progress: Progress) -> None:
        self.setup = setup
        self.epochs = setup.config.optim.epochs
        self.top1 = ""
        self.bar = tqdm(
            total=setup.total_steps,
            initial=progress.step,
            disable=not setup.world.is_main,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.2 if sys.stderr.isatty() else 30.0,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}",
        )

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def write(self, line: str) -> None:
        if self.setup.world.is_main:
            self.bar.write(line)

    def step(self, progress: Progress, loss: float) -> None:
        self.bar.set_description(f"epoch {progress.epoch + 1}/{self.epochs}", refresh=False)
        rate = progress.samples * self.setup.world.size / max(progress.epoch_seconds, 1e-9)
        lr = max(group["lr"] for group in self.setup.optimizer.param_groups)
        drop = max((block.rate for block in drop_path_modules(self.setup)), default=0.0)
        top1 = f" top-1 {self.top1}" if self.top1 else ""
        self.bar.set_postfix_str(
            f"loss {loss:.3f}{top1} {rate:.0f} images/s lr {lr:.2e} drop path {drop:.3f}", refresh=False
        )
        self.bar.update()

    def epoch(self, row: dict[str, float]) -> None:
        self.top1 = f"{row['val_top1']:.2f}"
        self.write(
            f"epoch {row['epoch']:>3}/{self.epochs}  train loss {row['train_loss']:.4f}  val loss {row['val_loss']:.4f}"
            f"  top-1 {row['val_top1']:6.2f}  top-5 {row['val_top5']:6.2f}  {row['images_per_second']:.0f} images/s"
            f"  lr {row['lr']:.2e}  drop path {row['drop_path_rate']:.3f}  {row['seconds']:.1f} s"
        )


class Board:
    """TensorBoard scalars of the main process."""

    def __init__(self, folder: RunFolder, world: World, progress: Progress) -> None:
        # purge_step hides what was written from the step on that a run is resumed from: that of a checkpoint at the end of
        # an epoch, saved before its validation, is written again
        purge = progress.step or None
        self.writer = SummaryWriter(str(folder.tensorboard), purge_step=purge) if world.is_main else None

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, *_: object) -> None:
        if self.writer is not None:
            self.writer.close()

    def write(self, row: dict[str, float], step: int) -> None:
        if self.writer is not None:
            for key, value in row.items():
                if key not in ("epoch", "step"):
                    self.writer.add_scalar(key, value, step)
            self.writer.flush()
