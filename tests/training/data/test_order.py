"""The samples of an epoch: counts of classes, copies, and that nothing but seed and epoch decides."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training.data.parts import EVERYTHING, digits, folder, skipping
from training.data.dataset import Unreadable
from training.data.loading import EpochSampler
from training.data.order import Balanced, Shuffled
from training.data.source import place

TARGETS = np.repeat([0, 1, 3, 4], [70, 20, 9, 1]).tolist()  # 100 samples; class 2 has none


def epoch_of(order: Balanced, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices, and which time each comes."""
    index, which = order(epoch).numpy().T
    return index, which


def test_shuffled_is_a_permutation() -> None:
    order = Shuffled(50, seed=3)
    assert sorted(order(0).flatten().tolist()) == list(range(50))
    assert torch.equal(order(4), Shuffled(50, seed=3)(4))
    assert not torch.equal(order(0), order(1)) and not torch.equal(order(0), Shuffled(50, seed=4)(0))


@pytest.mark.parametrize("epoch", range(4))
def test_each_class_comes_equally_often(epoch: int) -> None:
    order = Balanced(TARGETS, power=1.0, seed=0)
    index, which = epoch_of(order, epoch)
    assert len(index) == 100
    assert np.bincount(np.asarray(TARGETS)[index]).tolist() == [25, 25, 0, 25, 25] == order.counts(epoch).tolist()
    for target, size in ((0, 70), (1, 20), (3, 9), (4, 1)):
        own = index[np.asarray(TARGETS)[index] == target]
        times = np.bincount(own - own.min() if size == 1 else own - TARGETS.index(target), minlength=size)
        assert times.sum() == 25 and times.max() - times.min() <= 1, "once more only when each has come as often"
    pairs = set(zip(index.tolist(), which.tolist(), strict=True))
    assert len(pairs) == 100, "no two copies are alike"
    for i in set(index.tolist()):
        assert sorted(which[index == i]) == list(range((index == i).sum())), "counted from 0"


def test_what_does_not_divide_is_rounded_and_exact_on_average() -> None:
    targets = np.repeat([0, 1, 2], [80, 19, 4]).tolist()
    for power in (1.0, 0.5, 0.25):
        shares = np.array([80.0, 19.0, 4.0]) ** (1 - power)
        shares *= 103 / shares.sum()
        order = Balanced(targets, power=power, seed=0)
        counts = np.stack([order.counts(epoch) for epoch in range(400)])
        assert (counts.sum(axis=1) == 103).all() and (np.abs(counts - shares) < 1).all()
        assert counts.mean(axis=0) == pytest.approx(shares, abs=0.1)
        index, _ = epoch_of(order, 7)
        assert np.bincount(np.asarray(targets)[index]).tolist() == counts[7].tolist()


def test_power_0_is_every_sample_once() -> None:
    index, which = epoch_of(Balanced(TARGETS, power=0.0, seed=0), 2)
    assert sorted(index) == list(range(100)) and not which.any()


def test_seed_and_epoch_decide_alone_and_all_samples_get_their_turn() -> None:
    order = Balanced(TARGETS, power=1.0, seed=0)
    first = order(5)
    order(6)
    torch.manual_seed(9)
    np.random.seed(9)
    assert torch.equal(Balanced(TARGETS, power=1.0, seed=0)(5), first) and torch.equal(order(5), first)
    assert not torch.equal(order(6), first) and not torch.equal(Balanced(TARGETS, power=1.0, seed=1)(5), first)
    seen = {int(i) for epoch in range(20) for i in epoch_of(order, epoch)[0]}
    assert seen == set(range(100)), "those left out in one epoch come in another"


def test_the_sampler_deals_it_out_and_starts_anywhere() -> None:
    order = Balanced(TARGETS, power=1.0, seed=1)

    def batches(rank: int, world_size: int, start: int = 0) -> list[list[tuple[int, ...]]]:
        sampler = EpochSampler(100, 24 // world_size, seed=1, rank=rank, world_size=world_size, order=order)
        sampler.set_position(3, start)
        return list(sampler)

    whole = batches(0, 1)
    assert [len(batch) for batch in whole] == [24] * 4
    assert [p for batch in whole for p in batch] == [(3, *sample) for sample in order(3)[:96].tolist()]
    ranks = [batches(rank, 3) for rank in range(3)]
    dealt = [position for batches_of_rank in ranks for batch in batches_of_rank for position in batch]
    assert len(set(dealt)) == 96, "no position twice"
    assert [sorted(p for rank in ranks for p in rank[b]) for b in range(4)] == [sorted(batch) for batch in whole]
    for start in range(5):
        assert batches(0, 1, start) == whole[start:] and batches(2, 3, start) == ranks[2][start:]


@pytest.mark.parametrize("kind", ["digits", "folder"])
def test_copies_of_a_sample_are_augmented_each_in_its_own_way(kind: str, image_root: Path) -> None:
    """The first is what the sample is without copies; each is the same wherever it stands in a batch."""
    train = (digits(**EVERYTHING) if kind == "digits" else folder(image_root, **EVERYTHING)).train
    plain = train[2, 7][0]
    copies = [train[2, 7, which] for which in range(4)]
    assert torch.equal(copies[0][0], plain)
    assert len({image.numpy().tobytes() for image, *_ in copies}) == 4
    assert {(target, index) for _, target, index in copies} == {(train.targets[7], 7)}
    batch = train.__getitems__([(2, 7, 3), (2, 1, 0), (2, 7, 0), (2, 7, 1)])
    images = [sample[0] for sample in batch if isinstance(sample, tuple)]
    for image, wanted in zip(images, (copies[3][0], train[2, 1][0], plain, copies[1][0]), strict=True):
        torch.testing.assert_close(image, wanted)
    assert not torch.equal(train[3, 7, 1][0], copies[1][0]), "another epoch"


def test_a_copy_that_cannot_be_read_is_replaced_as_its_sample_is(image_root: Path) -> None:
    bundle, _ = skipping(image_root)
    train = bundle.train
    Path(place(train.source, 7)).write_bytes(b"")
    *samples, first, second = train.__getitems__([(2, 7, 0), (2, 1, 2), (2, 7, 1)])
    assert all(isinstance(fault, Unreadable) and fault.replaced for fault in (first, second))
    (image, _, index), (other, *_), (again, _, index_again) = (s for s in samples if isinstance(s, tuple))
    assert index == index_again != 7 and not torch.equal(image, again), "the same stands in, augmented anew"
    assert torch.equal(other, train[2, 1, 2][0])
