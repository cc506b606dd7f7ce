"""Everything a run is made of, built from its config before anything is written."""

import math
import os
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader

from files.errors import ConfigError
from files.words import counted
from models.counting import count_parameters
from models.factory import class_difference, create_model, model_facts
from stochastic_depth.blocks import NoBlocksError
from stochastic_depth.compute import Macs, count_macs
from stochastic_depth.report import drop_path_report
from stochastic_depth.setting import StochasticDepth, break_even_of, set_drop_path
from training.compiling import check_blocks, configure
from training.config import ModelSection, TrainConfig, build_schedule
from training.data.build import build_datasets
from training.data.dataset import DataBundle
from training.data.identity import check_same_data
from training.data.images import check_images
from training.data.loading import EpochSampler, build_train_loader, build_val_loader
from training.data.mixing import BatchMixer
from training.data.skipping import SkipList
from training.data.transforms import ImageSpec
from training.default_rate import with_default_rate
from training.distillation import Distillation, NoTeacher, build_distillation
from training.distributed import World
from training.freezing import Freezing
from training.image_sizes import check_sizes
from training.loss import build_loss, class_weights
from training.lr_schedule import build_scheduler
from training.non_finite import NonFiniteSteps, ways_out
from training.optim import build_ema, build_optimizer
from training.precision import training_dtype
from training.prefetch import Feed, build_feed
from training.processor import set_up_processor, speed_up
from training.sharding import shard
from training.tracking import check_log


@dataclass
class Setup:
    """Everything a run is made of, built from its config."""

    config: TrainConfig
    world: World
    model: Any  # what create_model gives: an nn.Module with pretrained_cfg, num_classes and a classifier
    depth: StochasticDepth
    macs: Macs | None  # None where the model's own code cannot be counted
    data: DataBundle
    train_loader: DataLoader
    val_loader: DataLoader
    skips: SkipList
    non_finite: NonFiniteSteps
    mixer: BatchMixer
    loss_fn: nn.Module
    precision: torch.dtype
    channels_last: bool
    steps_per_epoch: int
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    freezing: Freezing
    distillation: Distillation | NoTeacher
    rate_origin: str = ""  # where a drop-path rate comes from that the config did not name

    def __post_init__(self) -> None:
        self.feed: Feed = build_feed(self.to_device, self.world.device)

    @property
    def sampler(self) -> EpochSampler:
        """The training loader's sampler, which knows the position in the epoch."""
        assert isinstance(self.train_loader.batch_sampler, EpochSampler)
        return self.train_loader.batch_sampler

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.config.optim.epochs * self.steps_per_epoch

    @property
    def total_batch(self) -> int:
        """Samples of an optimizer step as the config has it, over all processes; the last step of an epoch may have fewer."""
        return self.config.data.batch_size * self.world.size * self.config.optim.accumulate

    @property
    def too_much_accumulated(self) -> str:
        """What becomes of an `optim.accumulate` that no epoch has the batches for; empty where all is well.

        Such a run is sound, with one step of all its batches per epoch and schedules to suit, but not the one asked for.
        """
        wanted, batches = self.config.optim.accumulate, self.sampler.batches_per_epoch
        if wanted <= batches:
            return ""
        all_of_them = f"all {batches}" if batches > 1 else "that one"
        return (
            f"optim.accumulate: {wanted:,} is more than the {counted(batches, 'batch')} of an epoch, so that its only step "
            f"takes {all_of_them}, {self.total_batch // wanted * batches:,} images and not {self.total_batch:,}; give "
            f"optim.accumulate={batches} at most, or a smaller data.batch_size"
        )

    @property
    def evaluated(self) -> nn.Module:
        """The model whose accuracy counts: the average where there is one."""
        return self.model if self.ema is None else self.ema.module

    @property
    def lr(self) -> float:
        """The largest learning rate over parameters, at this step."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    @property
    def drop_path_rate(self) -> float:
        """The largest rate over blocks, at this step; 0 where there is none."""
        return max((module.rate for block in self.depth.blocks for module in block.drop_paths.values()), default=0.0)

    def val_batches(self) -> Iterator[tuple[Tensor, ...]]:
        """Images, targets and indices of this process for validation, images and targets on its device.

        What cannot be read is skipped, or stops it.
        """
        yield from self.feed.read(self.skips.read(self.val_loader))

    def autocast(self) -> torch.autocast:
        """Mixed precision where the config asks for it; does nothing in float32."""
        device = self.world.device.type
        return torch.autocast(device, dtype=self.precision, enabled=self.precision != torch.float32)

    def to_device(self, images: Tensor) -> Tensor:
        """A loader's batch of images as the model's input: on the device without waiting, normalised, in its layout."""
        images = self.data.normalise(images.to(self.world.device, non_blocking=True))
        return images.contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)


def build(
    config: TrainConfig, world: World, *, load_checkpoint: bool = True, same_data: Mapping[str, Any] | None = None
) -> Setup:
    """Builds model, data and optimizer of a run. Nothing is written.

    Args:
        config: The run; values that depend on model or data are filled in (`num_classes`, `image_size`, rates).
        world: The processes it runs on.
        load_checkpoint: Load `model.checkpoint` or published weights; false where a resumed run replaces them anyway.
        same_data: Identity of the data that a resumed run began with; others are refused.

    Raises:
        ConfigError: Whatever the user gave that cannot work.
    """
    set_up_processor(config.runtime, processes=world.local_size)  # first: all that is computed rounds as the run does
    _check_parallel(config, world)
    check_log(config.log)
    section = config.model
    check_model_keys(section)
    overrides = config.model_arguments
    facts = model_facts(section.name, num_classes=section.num_classes, **overrides)
    overrides |= {key: facts.arguments[key] for key in ("image_size", "in_chans")}
    spec = ImageSpec.of(facts.pretrained_cfg)
    data = build_datasets(config.data, config.augment, spec, seed=config.seed)
    if same_data is not None:
        check_same_data(same_data, data.identity, root=config.data.root)
    if config.data.class_names not in (None, data.class_names):
        raise ConfigError(
            f"data.class_names: the data has others: {class_difference(config.data.class_names, data.class_names)}\n"
            "leave the key out, or set it to null, to take the data's"
        )
    if section.num_classes is not None and section.num_classes < data.num_classes:
        raise ConfigError(
            f"model.num_classes: {section.num_classes} is fewer than the data's {data.num_classes} classes"
        )
    num_classes = section.num_classes or data.num_classes

    weights = class_weights(config.loss, data.identity["train"]["samples_per_class"], num_classes)

    seed_everything(config.seed)  # the same weights on every rank
    model = create_model(
        section.name,
        pretrained=section.pretrained and load_checkpoint,
        checkpoint=section.checkpoint if load_checkpoint else None,
        num_classes=num_classes,
        class_names=data.class_names,
        **overrides,
    )
    speed_up(model, config.runtime, world.device, compiled=bool(config.runtime.compile))
    check_sizes(model, config.data.image_size_schedule)
    train_loader = build_train_loader(
        data, config.data, seed=config.seed, rank=world.rank, world_size=world.size, device=world.device
    )
    val_loader = build_val_loader(data, config.data, rank=world.rank, world_size=world.size, device=world.device)
    on_main(world, lambda: check_images(data, allowed=config.data.max_skipped or 0))
    assert isinstance(train_loader.batch_sampler, EpochSampler)
    steps_per_epoch = math.ceil(train_loader.batch_sampler.batches_per_epoch / config.optim.accumulate)
    drop_path, rate_origin = with_default_rate(config.drop_path, config.model, facts)
    config = config.model_copy(update={"drop_path": drop_path})
    depth = _set_drop_path(model, config, steps_per_epoch)
    check_blocks(config.runtime.compile, depth.blocks)
    precision = training_dtype(config.runtime.precision, world)
    config = _resolved(config, facts.arguments, model.num_classes, depth, data, precision)
    channels_last = (
        world.device.type == "cuda" if config.runtime.channels_last == "auto" else config.runtime.channels_last
    )
    _set_backends(config, world.device)
    memory_format = torch.channels_last if channels_last else torch.preserve_format
    model.to(world.device, memory_format=memory_format)  # type: ignore[call-overload]
    macs = _count(model)
    ema = build_ema(model, config.ema)
    if config.runtime.parallel == "fsdp":
        for each in (model, *([] if ema is None else [ema.module])):
            shard(each, [block.name for block in depth.blocks])
    optimizer = build_optimizer(model, config.optim, world.device, thaws=config.freeze.epochs not in (0, "all"))
    mixer = BatchMixer(config.augment, num_classes, seed=config.seed, rank=world.rank)
    loss_fn = build_loss(config.loss, config.augment, mixed=mixer.enabled, num_classes=num_classes, weights=weights)
    return Setup(
        config=config,
        world=world,
        model=model,
        depth=depth,
        macs=macs,
        data=data,
        train_loader=train_loader,
        val_loader=val_loader,
        skips=SkipList(config.data),
        non_finite=NonFiniteSteps(config.optim, ways_out(config, model, precision)),
        mixer=mixer,
        loss_fn=loss_fn.to(world.device),
        precision=precision,
        channels_last=channels_last,
        steps_per_epoch=steps_per_epoch,
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, config.optim, steps_per_epoch),
        scaler=torch.amp.GradScaler(world.device.type, enabled=precision == torch.float16),
        ema=ema,
        freezing=Freezing(config.freeze, model, depth),
        distillation=build_distillation(
            config.distill,
            model,
            data.class_names,
            device=world.device,
            memory_format=memory_format,
            runtime=config.runtime,
            autocast=torch.autocast(world.device.type, dtype=precision, enabled=precision != torch.float32),
        ),
        rate_origin=rate_origin,
    )


def check_model_keys(section: ModelSection) -> None:
    """Refuses what `create_model` takes and a run would replace.

    Raises:
        ConfigError: Naming the key that is meant.
    """
    elsewhere = {
        "drop_path_rate": "drop_path.rate", "drop_path_mode": "drop_path.mode", "class_names": "data.class_names"
    }  # fmt: skip
    for key, instead in elsewhere.items():
        if key in section.overrides:
            raise ConfigError(f"model.{key}: has no effect in a training config; did you mean {instead!r}?")


def _count(model: nn.Module) -> Macs | None:
    """Compute of the model, counted before it is sharded; None where its own code does not run on the meta device."""
    try:
        return count_macs(model)
    except ValueError:
        return None


def _check_parallel(config: TrainConfig, world: World) -> None:
    if config.runtime.parallel == "fsdp" and world.size == 1:
        raise ConfigError(
            "runtime.parallel: 'fsdp' shards over several processes, and there is one; start it with torchrun, or use ddp"
        )
    if config.runtime.parallel == "fsdp" and config.runtime.compile:
        raise ConfigError("runtime.compile: does not go with runtime.parallel 'fsdp' here; leave one of them out")


def on_main(world: World, check: Callable[[], None]) -> None:
    """Runs a check on the main process alone; where it fails, all processes stop with exit code 2."""
    problem = None
    if world.is_main:
        try:
            check()
        except ConfigError as error:
            problem = error
    if world.any(problem is not None):
        raise problem or ConfigError("stopped, because rank 0 found a mistake")


def seed_everything(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _set_drop_path(model: nn.Module, config: TrainConfig, steps_per_epoch: int) -> StochasticDepth:
    section = config.drop_path
    try:
        schedule = build_schedule(section, steps_per_epoch, config.optim.epochs)
        return set_drop_path(
            model,
            section.rate,
            profile=section.profile,
            rate_is=section.rate_is,
            mode=section.mode,
            schedule=schedule,
            break_even=section.break_even,
        )
    except NoBlocksError as error:
        if section.rate == 0 and not isinstance(section.profile, list):
            return StochasticDepth([], [], notes=[f"{error}; trained without stochastic depth"])
        raise ConfigError(f"drop_path: {error}\nto train it without stochastic depth: drop_path.rate=0") from None
    except ValueError as error:
        raise ConfigError(f"drop_path: {error}") from None


def _resolved(
    config: TrainConfig,
    arguments: Mapping[str, Any],
    num_classes: int,
    depth: StochasticDepth,
    bundle: DataBundle,
    precision: torch.dtype,
) -> TrainConfig:
    """The config with what was left open filled in, so that it says all about the run."""
    named = {k: getattr(config.model, k) for k in ("name", "pretrained", "checkpoint")}
    section = type(config.model)(**named, num_classes=num_classes, **arguments)
    drop_path = config.drop_path.model_copy(update={"break_even": break_even_of(depth.blocks)})
    size = arguments["image_size"]
    data = config.data.model_copy(update={"class_names": bundle.class_names})
    if isinstance(size, int):
        data = data.model_copy(update={"image_size": size})
    runtime = config.runtime.model_copy(update={"precision": str(precision).removeprefix("torch.")})
    return config.model_copy(update={"model": section, "drop_path": drop_path, "data": data, "runtime": runtime})


def _set_backends(config: TrainConfig, device: torch.device) -> None:
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = config.runtime.tf32
        torch.backends.cudnn.allow_tf32 = config.runtime.tf32
        # choosing algorithms by timing would choose others after a resume
        torch.backends.cudnn.benchmark = False
    if config.runtime.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    configure(config.runtime.compile)


def _in_full(setup: Setup) -> str:
    """The drop-path schedule, and of one that changes the rates how much of them a step has on average: what the plan says of
    depth and compute holds while they are whole."""
    kind, schedule, steps = setup.config.drop_path.schedule.kind, setup.depth.schedule, setup.total_steps
    if kind == "constant" or not setup.depth.blocks:
        return kind
    looked_at = range(0, steps, max(1, steps // 10_000))
    mean = math.fsum(map(schedule, looked_at)) / len(looked_at)
    return f"{kind} ({mean:.0%} of the rate on average over the run), at the whole rate"


def describe(setup: Setup) -> str:
    """The plan of a run in a few lines: model, data, schedule, device, and what stochastic depth will do."""
    config, world = setup.config, setup.world
    trainable, frozen = count_parameters(setup.model)
    report = drop_path_report(setup.model, macs=setup.macs)
    macs = "unknown" if setup.macs is None else f"{setup.macs.total / 1e9:.3g}"
    frozen_text = f" + {frozen / 1e6:.2f} M frozen" if frozen else ""
    section = config.drop_path
    channels, height, width = setup.model.pretrained_cfg["input_size"]
    threads = torch.get_num_threads()
    profile = section.profile if isinstance(section.profile, str) else "as listed"
    sizes = ", ".join(f"{size} from epoch {epoch + 1}" for epoch, size in config.data.image_size_schedule or ())
    compiled = {False: "", True: ", compiled", "blocks": ", compiled by blocks"}[config.runtime.compile]
    optim = config.optim
    accumulated = min(optim.accumulate, setup.sampler.batches_per_epoch)
    lines = [
        f"model     {config.model.name}: {trainable / 1e6:.2f} M parameters{frozen_text}, {macs} GMACs at "
        f"{channels} x {height} x {width}",
        f"data      {config.data.dataset}: {len(setup.data.train)} training and {len(setup.data.val)} validation images, "
        f"{counted(setup.data.num_classes, 'class')}{', balanced' if config.data.sampler == 'balanced' else ''}",
        *([f"left out  {setup.data.left_out}"] if setup.data.left_out else []),
        *([f"sizes     {sizes}"] if sizes else []),
        f"training  {counted(optim.epochs, 'epoch')} of {counted(setup.steps_per_epoch, 'step')}, "
        f"batch {setup.total_batch // optim.accumulate * accumulated}, {optim.name}, lr {optim.lr:g}, {optim.schedule}",
        *([f"loss      {words}"] if (words := config.loss.in_words) else []),
        *filter(None, [setup.distillation.describe(), setup.freezing.describe()]),
        f"device    {world.device} x {world.size}{', sharded' if config.runtime.parallel == 'fsdp' else ''}, "
        f"{str(setup.precision).removeprefix('torch.')}"
        f"{', channels_last' if setup.channels_last else ''}{compiled}, "
        f"{counted(threads, 'CPU thread')}{' each' if world.size > 1 else ''}",
        f"drop path up to {max(setup.depth.rates, default=0.0):.3g}, {profile}, mode {section.mode}, "
        f"schedule {_in_full(setup)}: "
        f"expected depth {report.expected_depth:.2f} of {counted(len(report.blocks), 'block')}, "
        f"{report.compute_saved or 0.0:.1%} of training compute saved",
        *([f"rate      {setup.rate_origin}"] if setup.rate_origin else []),
    ]
    notes = setup.depth.notes if not setup.depth.blocks else []
    warnings = [*filter(None, [setup.too_much_accumulated]), *report.warnings]
    return "\n".join(lines + [f"warning: {w}" for w in warnings] + [f"note      {note}" for note in notes])
