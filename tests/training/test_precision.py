"""What `auto` comes to on a device, here by faked answers of torch; on several processes; and in evaluation."""

from typing import Any

import pytest
import torch

from files.errors import ConfigError
from tests.training.parts import WORLD, build_tiny
from training.config import RuntimeSection
from training.distributed import World
from training.precision import autocast_dtype, evaluation_dtype, fast_bfloat16, training_dtype
from training.setup import describe

CPU, CUDA, MPS = (torch.device(kind) for kind in ("cpu", "cuda", "mps"))
OLD = {"avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}  # AVX512, where oneDNN emulates it
NEW = {**OLD, "avx512_bf16": True}


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gives this machine the CPU that torch would report so."""

    def fake(told: dict[str, Any]) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told, raising=False)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)

    return fake


@pytest.mark.parametrize(
    ("told", "fast"),
    [
        (OLD, False),
        (NEW, True),
        ({**OLD, "amx_tile": True, "amx_bf16": True}, True),
        ({**OLD, "amx_tile": True}, False),  # without its bfloat16
        ({"architecture": "arm64", "bf16": True, "sve_bf16": True}, False),  # not measured
        ({}, False),
    ],
)
def test_auto_on_a_cpu(told: dict[str, Any], fast: bool, cpu: Any) -> None:
    cpu(told)
    assert fast_bfloat16(CPU) is fast
    assert autocast_dtype("auto", CPU, key="x") == (torch.bfloat16 if fast else torch.float32)
    assert autocast_dtype("float32", CPU, key="x") == torch.float32
    assert autocast_dtype("bfloat16", CPU, key="x") == torch.bfloat16
    with pytest.raises(ConfigError, match=r"x float16 needs a GPU; on a CPU use float32 or bfloat16"):
        autocast_dtype("float16", CPU, key="x")


def test_a_torch_that_cannot_say_or_has_no_onednn(cpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu(NEW)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not fast_bfloat16(CPU)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not fast_bfloat16(CPU)


def test_this_torch_answers() -> None:
    told = torch.cpu.get_capabilities()
    assert told["architecture"] != "x86_64" or {"avx512_bf16", "amx_bf16"} <= told.keys()
    assert fast_bfloat16(CPU) == (
        torch.backends.mkldnn.is_available() and bool(told.get("avx512_bf16") or told.get("amx_bf16"))
    )


@pytest.mark.parametrize(("has", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_on_other_devices(has: bool, expected: torch.dtype, cpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu(NEW)  # the CPU beside a GPU does not matter
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation: has and not including_emulation)
    assert autocast_dtype("auto", CUDA, key="x") == expected
    assert autocast_dtype("auto", MPS, key="x") == torch.float32


class Meeting(World):
    """Two processes, of which the other one says what it is told to."""

    others = False

    def any(self, flag: bool) -> bool:
        return flag or self.others


@pytest.mark.parametrize("other_is_slow", [False, True])
def test_all_processes_take_one_precision(other_is_slow: bool, cpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu(NEW)
    monkeypatch.setattr(Meeting, "others", other_is_slow)
    world = Meeting(rank=0, local_rank=0, size=2, device=CPU)
    assert training_dtype("auto", world) == (torch.float32 if other_is_slow else torch.bfloat16)
    assert training_dtype("bfloat16", world) == torch.bfloat16, "what was asked for"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    gpus = Meeting(rank=0, local_rank=0, size=2, device=CUDA)
    assert training_dtype("auto", gpus) == (torch.float16 if other_is_slow else torch.bfloat16)


@pytest.mark.parametrize(("told", "name"), [(OLD, "float32"), (NEW, "bfloat16")])
def test_a_run_says_what_auto_came_to(told: dict[str, Any], name: str, cpu: Any) -> None:
    cpu(told)
    setup = build_tiny("runtime.precision=auto")
    assert (setup.config.runtime.precision, setup.precision) == (name, getattr(torch, name))
    with setup.autocast():
        assert torch.is_autocast_enabled("cpu") == (name == "bfloat16")
    assert f"cpu x 1, {name}," in describe(setup)
    assert training_dtype(setup.config.runtime.precision, WORLD) == setup.precision


@pytest.mark.parametrize(
    ("asked", "own", "told", "expected"),
    [
        (None, None, NEW, "float32"),  # weights of no run
        (None, "float32", NEW, "float32"),
        (None, "bfloat16", NEW, "bfloat16"),  # its figures are found again
        (None, "bfloat16", OLD, "float32"),
        (None, "float16", NEW, "float32"),  # trained on a GPU
        (None, "auto", NEW, "float32"),  # a run of an older version
        ("auto", None, NEW, "bfloat16"),
        ("auto", "float32", OLD, "float32"),
        ("bfloat16", "float32", OLD, "bfloat16"),
        ("float32", "bfloat16", NEW, "float32"),
    ],
)
def test_evaluation_on_a_cpu(asked: str | None, own: Any, told: dict[str, Any], expected: str, cpu: Any) -> None:
    cpu(told)
    runtime = None if own is None else RuntimeSection(precision=own)
    assert evaluation_dtype(asked, runtime, CPU) == getattr(torch, expected)


def test_evaluation_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    for precision in ("float16", "bfloat16", "float32"):
        assert evaluation_dtype(None, RuntimeSection(precision=precision), CUDA) == getattr(torch, precision)
    assert evaluation_dtype(None, RuntimeSection(precision="auto"), CUDA) == torch.float16
    assert evaluation_dtype(None, None, CUDA) == torch.float32
    with pytest.raises(ConfigError, match="--precision float16 needs a GPU"):
        evaluation_dtype("float16", None, CPU)
