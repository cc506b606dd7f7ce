"""Who is missing: told from what processes left at the place where they met. tests/faults/test_ranks.py loses real ones."""

import datetime
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from files.errors import Failure
from tests.faults.parts import free_port
from tests.training.parts import WORLD
from training import lost_rank
from training.distributed import World
from training.lost_rank import describe_lost, is_lost, report

BROKEN = RuntimeError("[/x/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:7")


def rank(number: int, size: int = 3) -> World:
    return World(rank=number, local_rank=number, size=size, device=torch.device("cpu"))


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[dist.TCPStore]:
    """A place to meet, and a process that believes it met others there."""
    port = free_port()
    made = dist.TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=datetime.timedelta(seconds=5)
    )
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setattr(lost_rank.dist, "is_initialized", lambda: True)
    yield made


def test_what_is_an_exchange_that_failed() -> None:
    assert is_lost(BROKEN) and is_lost(dist.DistNetworkError("x")) and is_lost(dist.DistBackendError("x"))
    assert not is_lost(RuntimeError("shape mismatch")) and not is_lost(ValueError("gloo/"))


def test_a_rank_that_said_why(store: dist.TCPStore) -> None:
    report(rank(2), Failure("the cable is cut\nand more"))
    assert describe_lost(rank(0), BROKEN, patience=5) == (
        "rank 0 waited for the others in vain: rank 2 stopped: Failure: the cable is cut"
    )
    # one that only lost the others as well is not the cause
    assert "rank 2 stopped" in describe_lost(rank(1), BROKEN, patience=0.1)


def test_ranks_that_say_nothing(store: dist.TCPStore) -> None:
    told = describe_lost(rank(1), BROKEN, patience=0.1)
    assert told.endswith("ranks 0, 2 do not answer: hanging, or killed")
    report(rank(0), BROKEN)
    assert describe_lost(rank(1), BROKEN, patience=0.1).endswith("rank 2 does not answer: hanging, or killed")
    report(rank(2), BROKEN)
    assert "the connection between the processes broke: [/x/third_party" in describe_lost(rank(1), BROKEN, patience=0.1)


def test_an_earlier_attempt_says_nothing(store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    report(rank(2), ValueError("of the first attempt"))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert "first attempt" not in describe_lost(rank(0), BROKEN, patience=0.1)


def test_the_place_to_meet_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lost_rank, "_store", lambda world: None)
    assert describe_lost(rank(1), BROKEN).endswith("rank 0 does not answer: hanging, or killed")
    assert describe_lost(rank(0, 2), BROKEN).endswith("rank 1 does not answer: hanging, or killed")


def test_alone_nobody_is_told() -> None:
    report(WORLD, ValueError("a"))
