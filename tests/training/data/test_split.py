"""Parts of a source: by fraction, by folds, by classes, by number; pure functions of names, classes and seed."""

import pickle
import random
from collections import Counter
from hashlib import sha256
from typing import Any

import pytest
import torch
from PIL import Image

from tests.training.data.parts import COLOUR, GREY, augment_section, data_section, digits, fails
from training.data.build import build_datasets, class_names_of_data
from training.data.digits import sources as digit_sources
from training.data.source import Batched, Source, Sources
from training.data.split import by_fold, by_fraction, divide, kept_classes, of_classes, sample, subset


class Named:
    """A source of names alone; a picture's first pixel is its index."""

    def __init__(self, samples: list[tuple[str, int]], class_names: list[str], location: str = "") -> None:
        self.names = [name for name, _ in samples]
        self.targets = [target for _, target in samples]
        self.class_names = class_names
        self.location = location

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    def open(self, index: int) -> Image.Image:
        return Image.new("L", (4, 4), index)


def named(*counts: int, order: int | None = None) -> Named:
    samples = [(f"{'abcdefgh'[c]}/{i}.jpg", c) for c, count in enumerate(counts) for i in range(count)]
    if order is not None:
        random.Random(order).shuffle(samples)
    return Named(samples, list("abcdefgh"[: len(counts)]))


def names(source: Source, indices: list[int]) -> set[str]:
    return {source.name(i) for i in indices}


def counts(source: Source, indices: list[int]) -> list[int]:
    found = Counter(source.targets[i] for i in indices)
    return [found[c] for c in range(len(source.class_names))]


def plain(source: Named, seed: int | None = None) -> list[tuple[int, bytes, int]]:
    """Class, digest and index of each sample, in this order: what the parts are taken from."""
    prefix = "" if seed is None else f"{seed} "
    digests = [sha256((prefix + name).encode("utf-8", "surrogateescape")).digest() for name in source.names]
    return sorted((target, digest, i) for i, (target, digest) in enumerate(zip(source.targets, digests, strict=True)))


def several() -> Named:
    """Classes of very different sizes and one without samples, names that come again in one class or in another."""
    rng = random.Random(0)
    samples = [(f"{rng.randrange(150)}\udce9.jpg", min(int(rng.expovariate(1)), 3)) for _ in range(400)]
    return Named(samples, list("abcde"))


def test_parts_are_those_of_a_plain_sort() -> None:
    source = several()
    rank: dict[tuple[int, bytes], int] = {}
    held = {0.3: set[int](), 0.5: set[int]()}
    ordered = plain(source)
    sizes = Counter(target for target, _ in {(target, digest) for target, digest, _ in ordered})
    for target, digest, i in ordered:
        place = rank.setdefault((target, digest), sum(t == target for t, _ in rank))
        for fraction, chosen in held.items():
            if place < int(sizes[target] * fraction + 0.5):
                chosen.add(i)
    four = Named(list(zip(source.names, source.targets, strict=True)), list("abcd"))  # each class needs samples here
    for fraction, chosen in held.items():
        assert set(by_fraction(four, fraction)[1]) == chosen


def test_a_sample_is_that_of_a_plain_sort() -> None:
    source, seen, sizes = several(), Counter[int](), Counter(several().targets)
    keys = []
    for target, digest, i in plain(source, seed=5):
        keys.append((seen[target] > 0, (2 * seen[target] + 1) / sizes[target], digest, i))
        seen[target] += 1
    for count in (4, 50, 399):
        assert sample(source, count, seed=5) == sorted(i for *_, i in sorted(keys)[:count])


def test_a_fraction_of_each_class_whatever_the_order() -> None:
    source = named(20, 7, 3)
    train, val = by_fraction(source, 0.25)
    assert counts(source, val) == [5, 2, 1] and counts(source, train) == [15, 5, 2]
    assert sorted(train + val) == list(range(30)) and train == sorted(train) and val == sorted(val)
    for order in range(3):
        other = named(20, 7, 3, order=order)
        assert names(other, by_fraction(other, 0.25)[1]) == names(source, val)
    assert names(source, val) < names(source, by_fraction(source, 0.5)[1])
    more = named(20, 7, 3, 9)  # another class changes nothing in these
    assert {name for name in names(more, by_fraction(more, 0.25)[1]) if name[0] != "d"} == names(source, val)


def test_what_is_held_back_is_not_what_comes_first() -> None:
    source = named(200)
    val = [int(name[2:-4]) for name in names(source, by_fraction(source, 0.5)[1])]
    assert 40 < sum(number < 100 for number in val) < 60


def test_the_split_is_the_same_in_every_version() -> None:
    """Results of runs are compared over years: the choice itself is fixed here."""
    source = named(10, 10)
    assert names(source, by_fraction(source, 0.2)[1]) == {"a/2.jpg", "a/6.jpg", "b/2.jpg", "b/9.jpg"}
    assert names(source, by_fold(source, 5, 0)[1]) == {"a/4.jpg", "a/6.jpg", "b/5.jpg", "b/9.jpg"}
    assert names(source, sample(source, 2, seed=0)) == {"a/1.jpg", "b/2.jpg"}


@pytest.mark.parametrize(("sizes", "folds"), [((20, 20), 5), ((7, 7, 7, 8), 5), ((5, 11, 6), 5), ((3, 2), 2)])
def test_folds_are_disjoint_together_everything_and_alike(sizes: tuple[int, ...], folds: int) -> None:
    source = named(*sizes)
    parts = [by_fold(source, folds, fold) for fold in range(folds)]
    assert sorted(i for _, val in parts for i in val) == list(range(len(source)))
    for train, val in parts:
        assert sorted(train + val) == list(range(len(source)))
    lengths = [len(val) for _, val in parts]
    assert max(lengths) - min(lengths) <= 1
    for per_class in zip(*(counts(source, val) for _, val in parts), strict=True):
        assert min(per_class) >= 1 and max(per_class) - min(per_class) <= 1
    other = named(*sizes, order=1)
    assert [names(other, by_fold(other, folds, k)[1]) for k in range(folds)] == [names(source, v) for _, v in parts]


def test_samples_of_one_name_stay_together() -> None:
    once = named(8, 8)
    twice = Named([(name, t) for name, t in zip(once.names, once.targets, strict=True) for _ in range(2)], ["a", "b"])
    train, val = by_fraction(twice, 0.25)
    assert names(twice, val) == names(once, by_fraction(once, 0.25)[1]) and len(val) == 8
    assert not names(twice, train) & names(twice, val)
    train, val = by_fold(twice, 4, 3)
    assert not names(twice, train) & names(twice, val)


@pytest.mark.parametrize(
    ("sizes", "fraction", "words"),
    [
        ((20, 4), 0.1, ["0.1 leaves class 'b' without samples for validation: 4 of 4 for training, 0 for validation"]),
        ((20, 1, 20, 1), 0.5, ["class 'b' without samples for training: 0 of 1", "(and so of 1 more classes)"]),
    ],
)
def test_a_class_without_samples_in_a_part_is_named(sizes: tuple[int, ...], fraction: float, words: list[str]) -> None:
    with fails("data.val_fraction", *words):
        by_fraction(named(*sizes), fraction)


def test_a_class_with_fewer_samples_than_folds_is_named() -> None:
    with fails("data.folds: class 'b' has 4 samples, fewer than 5 folds, so that 1 would have none"):
        by_fold(named(20, 4, 5), 5, 0)
    with fails("class 'a' has 1 sample, fewer than 3 folds, so that 2 would have none", "(and so of 1 more classes)"):
        by_fold(named(1, 2), 3, 0)


def test_a_training_subset_is_exact_stratified_nested_and_seeded() -> None:
    source = named(100, 50, 10, 1)
    found = {count: names(source, sample(source, count, seed=3)) for count in (4, 16, 32, 100, 161)}
    assert [len(chosen) for chosen in found.values()] == [4, 16, 32, 100, 161]
    assert found[4] < found[16] < found[32] < found[100] < found[161] == set(source.names)
    assert counts(source, sample(source, 4, seed=3)) == [1, 1, 1, 1]
    assert counts(source, sample(source, 32, seed=3)) == [19, 10, 2, 1]
    even = named(50, 50, 50, 50)
    assert counts(even, sample(even, 40, seed=0)) == [10] * 4
    assert found[32] != names(source, sample(source, 32, seed=4))
    other = named(100, 50, 10, 1, order=7)
    assert names(other, sample(other, 32, seed=3)) == found[32]


def test_a_training_subset_that_cannot_be() -> None:
    with fails("data.train_samples: 12 is more than the 11 training samples"):
        sample(named(6, 5), 12, seed=0)
    with fails("data.train_samples: 1 is fewer than the 2 classes; each needs one"):
        sample(named(6, 5), 1, seed=0)


def test_a_subset_is_a_source() -> None:
    source = named(3, 3, 3)
    part = subset(source, [8, 0, 4])
    assert len(part) == 3 and part.targets == [2, 0, 1] and part.name(0) == "c/2.jpg"
    opened = part.open(2)
    assert isinstance(opened, Image.Image) and opened.getpixel((0, 0)) == 4
    assert not isinstance(part, Batched) and part.location == "" and part.class_names == ["a", "b", "c"]
    copy = pickle.loads(pickle.dumps(part))  # as workers that are started anew get it
    assert copy.targets == part.targets and copy.name(1) == "a/0.jpg"


def test_a_subset_of_a_source_that_makes_batches_makes_the_same() -> None:
    train = digit_sources(data_section()).train
    part = subset(train, [5, 900, 17])
    assert isinstance(part, Batched) and isinstance(train, Batched)
    whole = digits(rotate=10.0).train.pipeline
    mine = part.pipeline(augment_section(rotate=10.0), GREY)
    streams = torch.arange(2).numpy().astype("uint64")
    assert torch.equal(mine.plain([2, 1]), whole.plain([17, 900]))
    assert torch.equal(mine.augmented([2, 0], streams), whole.augmented([17, 5], streams))


def test_classes_are_kept_in_the_order_of_the_data() -> None:
    source = named(2, 2, 2, 2)
    kept = kept_classes(source.class_names, ["d", "b"])
    part = of_classes(source, kept)
    assert part.class_names == ["b", "d"] and part.targets == [0, 0, 1, 1]
    assert names(part, [0, 1, 2, 3]) == {"b/0.jpg", "b/1.jpg", "d/0.jpg", "d/1.jpg"}
    with fails("data.classes: the data have no class 'cc'; did you mean 'c'?"):
        kept_classes(source.class_names, ["a", "cc"])


def divided(sources: Sources, *, seed: int = 0, **data: Any) -> Sources:
    return divide(sources, data_section(**data), seed=seed)


def test_what_is_asked_for_is_made_of_what_a_kind_gives() -> None:
    train, test = named(10, 10), named(2, 2)
    parts = divided(Sources(train, None), val_fraction=0.2)
    assert parts.val is not None and (len(parts.train), len(parts.val), parts.test) == (16, 4, None)
    parts = divided(Sources(train, None, "3 files", test), folds=2, fold=1, train_samples=4, classes=["a", "b"])
    assert parts.val is not None and parts.test is not None and parts.left_out == "3 files"
    assert (len(parts.train), len(parts.val), len(parts.test)) == (4, 10, 4)
    parts = divided(Sources(train, None, "", test))
    assert parts.val is test and parts.test is None
    assert divided(Sources(train, test)) == Sources(train, test), "nothing asked for, nothing wrapped"
    seeds = [{part.name(i) for i in range(6)} for s in (1, 1, 2)
             if (part := divided(Sources(train, test), seed=s, train_samples=6).train)]  # fmt: skip
    assert seeds[0] == seeds[1] != seeds[2]


def test_a_split_without_need_and_none_where_one_is_needed() -> None:
    train, val = named(10, 10), Named([("a/0.jpg", 0)], ["a", "b"], "somewhere/val")
    with fails("data.val_fraction: has no effect, the data have a part for validation, 'somewhere/val'"):
        divided(Sources(train, val), val_fraction=0.2)
    with fails("data.folds: has no effect"):
        divided(Sources(train, val), folds=3, fold=1)
    with fails("data.val_fraction: dataset 'digits' has no part for validation", "data.folds=5 data.fold=0"):
        divided(Sources(train, None))


def built(**data: Any) -> Any:
    return build_datasets(data_section(**data), augment_section(), COLOUR, seed=data.pop("seed", 0))


def test_subsets_reach_the_data_sets_and_their_identity() -> None:
    whole, odd, few = built(), built(classes=[3, 1, 7]), built(train_samples=50)
    assert odd.class_names == class_names_of_data(data_section(classes=["3", "1", "7"])) == ["1", "3", "7"]
    assert odd.num_classes == 3 and set(odd.train.targets) == set(odd.val.targets) == {0, 1, 2}
    assert len(few.train) == 50 and min(few.identity["train"]["samples_per_class"]) == 5
    assert few.identity["val"] == whole.identity["val"] and few.identity["train"] != whole.identity["train"]
    index = next(i for i in range(len(whole.val)) if whole.val.source.name(i) == odd.val.source.name(4))
    assert torch.equal(odd.val[4][0], whole.val[index][0])
    other = build_datasets(data_section(train_samples=50), augment_section(), COLOUR, seed=1)
    assert other.identity["train"]["names_sha256"] != few.identity["train"]["names_sha256"]
