"""Batches on the device: order, errors in their place, and the time waited for them."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.training.parts import CUDA, WORLD, build_tiny
from training.data.dataset import ReadError
from training.loop import train
from training.prefetch import CudaFeed, Feed, build_feed, one_ahead
from training.run_folder import RunFolder

CPU = torch.device("cpu")


def batches(count: int, *, seconds: float = 0.0, fail_at: int = -1) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for i in range(count):
        time.sleep(seconds)
        if i == fail_at:
            raise ReadError("no such file")
        yield torch.full((2, 3, 4, 4), float(i)), torch.tensor([i, i]), torch.tensor([2 * i, 2 * i + 1])


def test_batches_are_prepared_in_their_order() -> None:
    feed = build_feed(lambda images: images + 1, CPU)
    assert type(feed) is Feed
    for i, (images, targets, indices) in enumerate(feed.read(batches(3))):
        assert images.unique().tolist() == [i + 1] and targets.tolist() == [i, i] and indices[0] == 2 * i
    assert i == 2


def test_an_error_is_raised_in_the_place_of_its_batch() -> None:
    seen = []
    with pytest.raises(ReadError, match="no such file"):
        for images, *_ in Feed(lambda images: images, CPU).read(batches(5, fail_at=2)):
            seen.append(images[0, 0, 0, 0].item())
    assert seen == [0, 1]


def test_what_was_waited_is_the_time_of_fetching_and_not_of_computing() -> None:
    feed = Feed(lambda images: images, CPU)
    waits = []
    for _ in feed.read(batches(3, seconds=0.02)):
        time.sleep(0.05)
        waits.append(feed.waited())
    assert all(wait >= 0.02 for wait in waits) and feed.waited() < 0.02, "nothing is counted twice"
    assert min(waits) < 0.05, "computing is not counted"
    next(feed.read(batches(1, seconds=0.02)))
    reading = feed.read(batches(1))
    next(reading)
    assert feed.waited() < 0.02, "a new reading begins at 0"


def test_one_ahead_keeps_the_order_and_the_place_of_an_error() -> None:
    fetched: list[int] = []

    def items(fail_at: int) -> Iterator[int]:
        for i in range(5):
            if i == fail_at:
                raise ReadError("no such file")
            fetched.append(i)
            yield i

    seen = []
    for item in one_ahead(items(9)):
        assert fetched[-1] == min(item + 1, 4), "the next one is there already"
        seen.append(item)
    assert seen == [0, 1, 2, 3, 4] and list(one_ahead(iter([]))) == []
    for fail_at in (0, 1, 3):
        seen = []
        with pytest.raises(ReadError):
            for item in one_ahead(items(fail_at)):
                seen.append(item)
        assert seen == list(range(fail_at))


def test_a_run_tells_the_share_of_time_that_it_waited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup = build_tiny("optim.epochs=1", "optim.warmup_epochs=0")
    folder = RunFolder(tmp_path / "run")
    folder.make(fresh=True)
    summary = train(setup, folder)
    assert 0 < summary["data_share"] < 1
    assert "% waiting for data" in capsys.readouterr().out
    assert "data_share" not in folder.metrics.read_text(), "no column, so that resumed runs can be compared"


@CUDA
def test_batches_come_on_a_side_stream() -> None:
    device = torch.device("cuda", 0)
    feed = build_feed(lambda images: images.to(device, non_blocking=True) * 2, device)
    assert isinstance(feed, CudaFeed)
    work = torch.randn(2048, 2048, device=device)
    shares = []
    for seconds in (0.0, 0.05):
        sums, waited, start = [], 0.0, time.perf_counter()
        for images, targets, _ in feed.read(batches(8, seconds=seconds)):
            for _ in range(20):
                work = (work @ work).clamp(-1, 1)
            sums.append(images.sum() / targets.sum().clamp(min=1))
            waited += feed.waited()
        torch.cuda.synchronize()
        shares.append(waited / (time.perf_counter() - start))
        assert [round(s.item()) for s in sums] == [0] + [96] * 7
    assert 0 <= shares[0] < shares[1] <= 1
    with pytest.raises(ReadError):
        list(feed.read(batches(3, fail_at=2)))


@CUDA
def test_a_run_on_cuda_reads_ahead() -> None:
    from dataclasses import replace

    setup = build_tiny(world=replace(WORLD, device=torch.device("cuda", 0)))
    assert isinstance(setup.feed, CudaFeed)
    images, targets, indices = next(setup.feed.read(iter(setup.train_loader)))
    assert images.is_cuda and targets.is_cuda and not indices.is_cuda
