"""The order of samples, sharding, and loaders with workers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.data.parts import (
    AFFINE,
    CPU,
    EVERYTHING,
    data_section,
    digits,
    fails,
    folder,
    sampler_of,
    train_loader,
)
from training.data.dataset import Position
from training.data.loading import EpochSampler, build_val_loader, end_workers


@pytest.mark.parametrize("source", ["digits", "folder"])
def test_worker_counts_do_not_matter(source: str, image_root: Path) -> None:
    bundle = digits(**EVERYTHING) if source == "digits" else folder(image_root, **EVERYTHING)
    bundle.train.targets = bundle.train.targets[:15]  # fewer digits, for speed

    def epochs(workers: int) -> list[list[torch.Tensor]]:
        loader = train_loader(bundle, batch_size=4, workers=workers)
        batches = []
        for epoch in (0, 1):
            sampler_of(loader).set_position(epoch)
            batches += list(loader)
        return batches

    expected = epochs(0)
    assert len(expected) == 6
    for workers in (1, 2):
        for batch, reference in zip(epochs(workers), expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(batch, reference, strict=True))


@pytest.mark.parametrize("source", ["digits", "folder"])
def test_fetching_batches_leaves_the_global_random_states_alone(
    source: str, image_root: Path, unmoved_random_states: None
) -> None:
    bundle = digits(**EVERYTHING) if source == "digits" else folder(image_root, **EVERYTHING)
    loader = train_loader(bundle, batch_size=6)
    next(iter(loader))
    next(iter(build_val_loader(bundle, data_section(), device=CPU)))
    next(iter(train_loader(bundle, batch_size=6, workers=1)))


def test_too_few_images_for_one_batch_everywhere(image_root: Path) -> None:
    bundle = folder(image_root)
    with fails("data.batch_size: 16 is more than the 15 training images", "at most 15"):
        train_loader(bundle, batch_size=16)
    with fails("data.batch_size: 8 x 2 processes = 16", "15 training images", "at most 7"):
        train_loader(bundle, batch_size=8, world_size=2)
    with fails("15 training images", "at most 15 processes"):
        train_loader(bundle, batch_size=1, world_size=16)
    assert len(train_loader(bundle, batch_size=15)) == 1


def batches_of(sampler: EpochSampler, epoch: int, batch: int = 0) -> list[list[Position]]:
    sampler.set_position(epoch, batch)
    return list(sampler)


def test_the_order_is_a_pure_function_of_seed_and_epoch() -> None:
    sampler = EpochSampler(100, 8, seed=1)
    first = batches_of(sampler, 0)
    assert len(first) == len(sampler) == sampler.batches_per_epoch == 12
    assert all(len(batch) == 8 and {e for e, _ in batch} == {0} for batch in first)
    assert [i for batch in first for _, i in batch] != sorted(i for batch in first for _, i in batch)

    def indices(batches: list[list[Position]]) -> list[int]:
        return [i for batch in batches for _, i in batch]

    assert batches_of(sampler, 1)[0][0][0] == 1
    assert indices(batches_of(sampler, 1)) != indices(first)
    assert batches_of(EpochSampler(100, 8, seed=2), 0) != first
    torch.manual_seed(7)
    assert batches_of(EpochSampler(100, 8, seed=1), 0) == first


def test_ranks_share_an_epoch_without_duplicates() -> None:
    for length in (96, 103):
        ranks = [batches_of(EpochSampler(length, 8, seed=0, rank=r, world_size=3), 5) for r in range(3)]
        assert [len(batches) for batches in ranks] == [4, 4, 4]
        indices = [i for batches in ranks for batch in batches for _, i in batch]
        assert len(indices) == len(set(indices)) == 96
    one = batches_of(EpochSampler(103, 24, seed=0), 5)
    together = [sorted(position for batches in ranks for position in batches[b]) for b in range(4)]
    assert together == [sorted(batch) for batch in one], "a step covers the same samples at any number of ranks"


def test_starting_in_mid_epoch_gives_the_tail_of_the_epoch() -> None:
    sampler = EpochSampler(100, 8, seed=0, rank=1, world_size=2)
    full = batches_of(sampler, 3)
    for start in range(len(full) + 1):
        assert batches_of(sampler, 3, start) == full[start:]
        assert len(sampler) == len(full) - start
    started = iter(sampler)
    sampler.set_position(4)
    assert list(started) == [], "an iterator keeps the position it was made at"


@pytest.mark.parametrize(("epoch", "batch"), [(-1, 0), (0, -1), (0, 13)])
def test_a_position_outside_the_epoch_is_refused(epoch: int, batch: int) -> None:
    with pytest.raises(ValueError, match="outside an epoch of 12 batches"):
        EpochSampler(100, 8, seed=1).set_position(epoch, batch)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_starts_in_mid_epoch(workers: int) -> None:
    loader = train_loader(digits(**AFFINE), batch_size=200, workers=workers)
    sampler = sampler_of(loader)
    full = list(loader)
    assert len(full) == 7
    for start in (5, 2):  # the second time round, persistent workers have run ahead already
        sampler.set_position(0, start)
        tail = list(loader)
        assert len(tail) == len(full) - start
        for batch, reference in zip(tail, full[start:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(batch, reference, strict=True))
    sampler.set_position(1, 6)
    assert not torch.equal(next(iter(loader))[2], full[6][2])


def test_validation_samples_are_dealt_out_without_duplicates(image_root: Path) -> None:
    bundle = folder(image_root)

    def indices(rank: int, world_size: int, **data: Any) -> list[list[int]]:
        section = data_section(**data)
        loader = build_val_loader(bundle, section, rank=rank, world_size=world_size, device=CPU)
        assert len(loader) == len(list(loader))
        return [batch[2].tolist() for batch in loader]

    assert indices(0, 1, batch_size=4) == [[0, 1, 2, 3], [4, 5]]
    assert indices(0, 1, batch_size=4, eval_batch_size=5) == [[0, 1, 2, 3, 4], [5]]
    assert [indices(r, 4, batch_size=4) for r in range(4)] == [[[0, 4]], [[1, 5]], [[2]], [[3]]]
    assert indices(7, 8, workers=2) == [], "more ranks than images"
    assert indices(1, 2, batch_size=2, workers=2) == [[1, 3], [5]]


def test_workers_end_when_they_are_told(image_root: Path) -> None:
    loader = train_loader(folder(image_root), batch_size=5, workers=1)
    iterator = iter(loader)
    next(iterator)
    (worker,) = iterator._workers  # type: ignore[attr-defined]
    assert worker.is_alive()
    end_workers(loader)
    assert not worker.is_alive()
    end_workers(loader)
    assert len(list(loader)) == len(loader), "the loader may be used again"
    end_workers(loader)
    end_workers(train_loader(folder(image_root), batch_size=5))
