"""What a run asks of processor and C library: threads, fast paths, and memory that stays."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from layers.fast import FastLinear, fast_paths, set_fast_paths
from tests.training.parts import build_tiny
from training.config import RuntimeSection
from training.processor import keep_freed_memory, set_up_processor, speed_up
from training.setup import Setup

ROOT = Path(__file__).resolve().parents[2]
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")

# Page faults of an operation whose result was freed before, thus once with what the allocator had and once again.
FAULTS = """
import resource, sys, torch
from training.processor import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "true":
    keep_freed_memory()
x = torch.ones(2**23)  # 32 MiB
for _ in range(3):
    y = x + 1
    del y
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    y = x + 1
    del y
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep: str, **settings: str) -> int:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"))}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, keep], cwd=ROOT, env=clean | settings, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.slow
@glibc
def test_freed_memory_is_used_again_without_page_faults() -> None:
    pages = 4 * 2**25 // os.sysconf("SC_PAGE_SIZE")
    assert min(faults("true") for _ in range(3)) < pages / 100  # a busy system takes pages away for its own reasons
    assert faults("false") > pages / 2
    assert faults("true", MALLOC_MMAP_THRESHOLD_="1000000") > pages / 2  # the user's own setting is left as it is


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "LD_PRELOAD"])
def test_who_set_up_the_allocator_keeps_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "")
    assert not keep_freed_memory()


def test_another_system_or_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("training.processor.ctypes.CDLL", lambda name: object())
    assert not keep_freed_memory()
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr("training.processor.ctypes.CDLL", None)  # not even asked
    assert not keep_freed_memory()


def test_threads_and_fast_paths_are_the_configs() -> None:
    set_up_processor(RuntimeSection(threads=3, fast_paths=False))
    assert torch.get_num_threads() == 3 and not fast_paths()
    set_up_processor(RuntimeSection(threads=2))
    assert torch.get_num_threads() == 2 and fast_paths()
    set_fast_paths(False)
    set_up_processor(None)
    assert fast_paths()


def has_fast_layers(model: nn.Module) -> bool:
    return any(isinstance(module, FastLinear) for module in model.modules())


def test_layers_are_fast_where_that_can_pay() -> None:
    def sped_up(runtime: RuntimeSection | None, device: str, *, compiled: bool = False) -> bool:
        model = nn.Sequential(nn.Linear(2, 2))
        speed_up(model, runtime, torch.device(device), compiled=compiled)
        return has_fast_layers(model)

    assert sped_up(None, "cpu") and sped_up(RuntimeSection(), "cpu")
    assert not sped_up(RuntimeSection(fast_paths=False), "cpu")
    assert sped_up(None, "cuda") and not sped_up(None, "mps") and not sped_up(None, "cpu", compiled=True)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("fast", [True, False])
def test_a_run_of_another_librarys_model(fast: bool, compiled: bool) -> None:
    setup: Setup = build_tiny(
        "model={name: timm/resnet10t}", "data.image_size=32", f"runtime.fast_paths={str(fast).lower()}",
        f"runtime.compile={str(compiled).lower()}", "ema={enabled: true, decay: 0.9}",
    )  # fmt: skip
    assert has_fast_layers(setup.model) == (fast and not compiled) == has_fast_layers(setup.evaluated)
    set_fast_paths(True)


@pytest.mark.parametrize("keep", [True, False])
def test_the_script_keeps_memory_where_the_config_says(keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import train

    kept: list[str] = []
    monkeypatch.setattr(train, "keep_freed_memory", lambda: kept.append("kept"))
    monkeypatch.setattr(train, "run", lambda *args, **options: {})
    monkeypatch.setattr(train, "describe_result", lambda result: "")
    assert train.main([f"runtime.keep_memory={str(keep).lower()}"]) == 0
    assert kept == ["kept"] * keep
