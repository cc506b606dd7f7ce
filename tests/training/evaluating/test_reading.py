"""Batches for a model: in order, normalised once."""

import pytest
import torch

from tests.training.data.parts import COLOUR, CPU, GREY, digits
from training.evaluating.reading import ModelInput, build_loader


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_come_in_order(workers: int) -> None:
    dataset = digits(GREY).val
    loader = build_loader(dataset, range(1, 9, 2), batch_size=3, workers=workers, device=CPU)
    before = torch.get_rng_state()
    batches = list(loader)
    assert [batch[2].tolist() for batch in batches] == [[1, 3, 5], [7]]
    assert torch.equal(batches[1][0][0], dataset[7][0]) and torch.equal(before, torch.get_rng_state())


def test_no_more_workers_than_batches() -> None:
    assert build_loader(digits(GREY).val, range(5), batch_size=3, workers=4, device=CPU).num_workers == 2
    assert build_loader(digits(GREY).val, [], batch_size=3, workers=4, device=CPU).num_workers == 0


def test_bytes_become_numbers_and_numbers_stay() -> None:
    to_input = ModelInput(COLOUR, CPU)
    eight = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8)
    mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in (COLOUR.mean, COLOUR.std))
    ready = (eight / 255 - mean) / std
    assert torch.allclose(to_input(eight), ready, atol=1e-6) and torch.equal(to_input(ready), ready)
    across = eight.contiguous(memory_format=torch.channels_last)
    assert torch.equal(to_input(across), to_input(eight)) and to_input(across).is_contiguous()
