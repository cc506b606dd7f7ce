"""Measures: interleaved timings, peak memory, realised rates; and what machine and versions they were taken on."""

import argparse
import itertools
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import timm
import torch
from torch import Tensor, nn

from layers.drop_path import DropPath
from stochastic_depth.graft import GraftedDropPath
from training.run_folder import describe_processor

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""The subcommands of benchmark.py."""

ROOT = Path(__file__).resolve().parents[1]


def step_time(model: nn.Module, images: Tensor) -> float:
    """Seconds of one forward and backward pass."""
    model.zero_grad(set_to_none=True)
    return seconds_of(lambda: model(images).float().square().mean().backward(), images.device)


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds that a call takes, until the device is done with it."""
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Returns when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(model: nn.Module, images: Tensor) -> float:
    """MiB that one forward and backward pass allocates at its highest point, beside weights and images."""
    model.zero_grad(set_to_none=True)
    return peak_allocated(lambda: step_time(model, images), images.device)


def peak_allocated(run: Callable[[], Any], device: torch.device) -> float:
    """MiB that a call allocates at its highest point, above the level before it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]  # type: ignore[attr-defined]
    return round(max(itertools.accumulate(changes)) / 2**20, 1)


def realised_rate(model: nn.Module, batch: int, draws: int = 400) -> float | None:
    """Share of samples that the model's drop-path modules drop, read off their outputs, over blocks; of our own models."""
    ones, zeros = torch.ones(batch, 1), torch.zeros(batch, 1)
    modules = [m for m in model.modules() if isinstance(m, DropPath) and not isinstance(m, GraftedDropPath)]
    if not modules:
        return None
    with torch.no_grad():
        kept = sum(
            int(m.residual(ones, lambda x: x, zeros).count_nonzero()) for m in modules for _ in range(draws)
        )  # fmt: skip
    return round(1.0 - kept / (batch * draws * len(modules)), 4)


def take_turns(runs: Mapping[str, Callable[[], float]], rounds: int, *, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds that each call returns, in rounds, each of which begins one further in the order.

    Args:
        runs: By name.
        rounds: That count.
        warmup: Rounds before them.
    """
    names = list(runs)
    for name in names * warmup:
        runs[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(runs[name]())
    return times


def paired_ratio(above: Sequence[float], below: Sequence[float], *, digits: int = 4) -> tuple[float, list[float]]:
    """Median and quartiles of the ratio of paired rounds: what slows the machine down for a while slows both."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    if len(ratios) == 1:
        ratios *= 2
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return round(middle, digits), [round(low, digits), round(high, digits)]


def interleaved(models: dict[str, nn.Module], images: Tensor, rounds: int) -> dict[str, dict[str, Any]]:
    """Median seconds per step of each, its ratio to mask with quartiles, peak memory and realised rate."""

    def step(model: nn.Module) -> float:
        seconds = step_time(model, images)
        model.zero_grad(set_to_none=True)
        return seconds

    times = take_turns({name: partial(step, model) for name, model in models.items()}, rounds)
    results = {}
    for name, model in models.items():
        speedup, quartiles = paired_ratio(times["mask"], times[name])
        results[name] = {
            "seconds": round(statistics.median(times[name]), 5),
            "speedup_over_mask": speedup,
            "quartiles": quartiles,
            "peak_mb": peak_memory(model, images),
            "realised_rate": realised_rate(model, len(images)),
        }
        model.zero_grad(set_to_none=True)
    return results


def machine(threads: int) -> str:
    """Processor, cores, threads in use, and GPU."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"{describe_processor()}, {os.cpu_count()} cores, {threads} thread{'s' if threads > 1 else ''}, {device}"


def facts() -> dict[str, str]:
    """What a benchmark's JSON says of where its figures come from: commit, machine and versions."""
    command = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "commit": commit,
        "machine": machine(torch.get_num_threads()),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


def add_threads(parser: argparse.ArgumentParser) -> None:
    """The option of benchmarks that compute in this process; benchmark.py sets what it says."""
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU; default all")
