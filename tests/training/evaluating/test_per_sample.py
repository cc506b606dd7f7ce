"""What a model said of each sample, and which labels look wrong."""

import torch

from training.distributed import ALONE
from training.evaluating.per_sample import Mistake, PerSample
from training.evaluation import evaluate

TARGETS = [0, 1, 0, 1, 0, 1]
PROBABILITIES = torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.4, 0.6], [0.2, 0.8], [0.1, 0.9], [0.95, 0.05]])


def measured(*batches: list[int]) -> PerSample:
    """The samples of some batches, with sample i predicted by row i."""
    per_sample = PerSample(len(TARGETS))
    watched = per_sample.watch((PROBABILITIES[b].log(), torch.tensor(TARGETS)[b], torch.tensor(b)) for b in batches)
    evaluate(torch.nn.Identity(), watched, [per_sample], world=ALONE)
    return per_sample


def test_each_sample_has_its_row_whatever_the_batches() -> None:
    tables = [measured(*batches).table for batches in ([[0, 1, 2, 3, 4, 5]], [[5, 0], [2], [4, 1, 3]])]
    assert torch.equal(tables[0], tables[1])
    assert tables[0][:, 1].tolist() == [0, 0, 1, 1, 1, 0]
    assert torch.allclose(tables[0][:, 3].float(), PROBABILITIES[range(6), TARGETS])


def test_likely_wrong_labels_come_first() -> None:
    found = measured([0, 1, 2, 3, 4, 5]).mistakes(TARGETS)
    assert [m.index for m in found] == [5, 4, 1, 2]
    assert found[0] == Mistake(5, 1, 0, found[0].probability, found[0].label_probability)
    assert round(found[0].probability, 6) == 0.95 and round(found[0].label_probability, 6) == 0.05


def test_of_equal_ones_the_surer_comes_first() -> None:
    per_sample = PerSample(3)
    rows = torch.tensor([[0.1, 0.5, 0.4], [0.1, 0.8, 0.1], [0.1, 0.6, 0.3]]).log()
    watched = per_sample.watch([(rows, torch.zeros(3, dtype=torch.int64), torch.arange(3))])
    evaluate(torch.nn.Identity(), watched, [per_sample])
    assert [m.index for m in per_sample.mistakes([0, 0, 0])] == [1, 2, 0]


def test_what_was_not_read_is_no_mistake() -> None:
    per_sample = measured([0, 5], [2])
    assert per_sample.value() == 3
    assert [m.index for m in per_sample.mistakes(TARGETS)] == [5, 2]


def test_what_has_no_prediction_is_no_sure_mistake() -> None:
    per_sample = PerSample(2)
    per_sample.indices = torch.tensor([0, 1])
    per_sample.update(torch.tensor([[float("nan"), 0.0], [0.0, 2.0]]), torch.tensor([1, 0]))
    per_sample.merge(ALONE)
    assert [mistake.index for mistake in per_sample.mistakes([1, 0])] == [1]
    assert per_sample.table[:, 1].tolist() == [-1, 1]
