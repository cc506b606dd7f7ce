"""The limit: which products and convolutions a model has, and that all ways to do them do all of the work."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.limit import (
    DIRECTIONS,
    Attention,
    Convolution,
    Direction,
    Limit,
    Linear,
    Operation,
    Placed,
    Pool,
    Product,
    Ways,
    find_operations,
    kept_samples,
)
from models.factory import create_model
from stochastic_depth.compute import count_macs
from stochastic_depth.setting import set_drop_path

OPERATIONS = [
    Linear(6, 8, 4),
    Convolution(3, 9, 8, 4, kernel=(3, 3), stride=(2, 2), padding=(1, 1)),
    Convolution(8, 5, 5, 8, kernel=(3, 3), padding=(1, 1), groups=8),
    Product(3, 4, 5, 6),
    Attention(2, 5, 5, 4),
]


def pool(dtype: torch.dtype = torch.float32) -> Pool:
    return Pool(torch.device("cpu"), dtype)


def test_kept_samples_are_whole_and_their_sum_is_right() -> None:
    assert kept_samples([0.4] * 5, 16) == [10, 9, 10, 9, 10]  # 9.6 each
    assert kept_samples([0.0, 1.0, 0.5], 3) == [3, 0, 2]
    rates = [0.4 * i / 11 for i in range(12)]
    for batch in (1, 8, 16, 31):
        assert sum(kept_samples(rates, batch)) == round(sum(batch * (1 - rate) for rate in rates))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operation", [*OPERATIONS, Linear(2048, 256, 64)], ids=str)
def test_a_way_chosen_for_a_batch_is_there_for_fewer_samples(operation: Operation, dtype: torch.dtype) -> None:
    for direction in DIRECTIONS:
        if operation.passes(direction):
            named = [list(operation.ways(direction, samples, pool(dtype))) for samples in (16, 1)]
            assert named[0] == named[1] and named[0]


@pytest.mark.parametrize("name", ["caformer_n4", "timm/test_convnext", "timm/test_vit"])
def test_the_operations_are_all_that_the_model_computes(name: str) -> None:
    model: Any = create_model(name)
    depth = set_drop_path(model, 0.1, mode="skip")
    counted = count_macs(model)
    shares = [counted.block(block) for block in depth.blocks]
    operations = find_operations(model, model.pretrained_cfg["input_size"])
    assert sum(each.operation.macs for each in operations) == counted.total
    for index, share in enumerate(shares):
        assert sum(each.operation.macs for each in operations if each.block == index) == share > 0
    assert operations[0].on_images and operations[0].block is None
    assert not any(each.on_images for each in operations[1:])


def test_windows_and_channels_are_rows_of_a_sample() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(*self.fc(x.reshape(-1, 2, 8, 4)).chunk(3, -1))

    block = create_model("caformer_n4")  # gives a block to find; only what runs is recorded
    block.forward = lambda x: Windows().to("meta")(x)
    found = [each.operation for each in find_operations(block, (3, 8, 8))]
    assert found == [Linear(48, 4, 6), Attention(6, 8, 8, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("direction", ["forward", "input", "weight"])
def test_every_way_does_the_work_that_is_counted(
    operation: Operation, direction: Direction, dtype: torch.dtype
) -> None:
    if not operation.passes(direction):
        return
    ways = operation.ways(direction, 3, pool(dtype))
    # torch's counter takes a weight's gradient for one over all groups; not where it is a convolution of its own
    groups = operation.groups if isinstance(operation, Convolution) and direction == "weight" else 1
    assert len(ways) > isinstance(operation, Convolution)
    for name, run in ways.items():
        if name == "fused":
            continue  # not known to the counter; see below
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run()
        counted = 2 * 3 * operation.macs * operation.passes(direction) * (1 if name.startswith("depthwise") else groups)
        assert counter.get_total_flops() == counted, name


def test_a_1x1_convolution_is_the_linear_layer() -> None:
    linear, buffers = Linear(6, 8, 4), pool()
    with torch.no_grad():
        forward = linear.ways("forward", 3, buffers)
        out = forward["convolution channels_last"]().permute(0, 2, 3, 1).reshape(18, 4)
        torch.testing.assert_close(out, forward["linear"]())
        back = linear.ways("input", 3, buffers)
        gradient = back["convolution channels_last"]()[0].permute(0, 2, 3, 1).reshape(18, 8)
        torch.testing.assert_close(gradient, back["product"]())
        weight = linear.ways("weight", 3, buffers)
        torch.testing.assert_close(weight["convolution channels_last"]()[1].reshape(4, 8), weight["product"]())
        torch.testing.assert_close(weight["product transposed"]().t(), weight["product"]())


def test_fused_attention_gives_its_three_gradients() -> None:
    run = Attention(2, 5, 5, 4).ways("input", 3, pool())["fused"]
    for _ in range(2):  # it can be done again and again
        assert [g.shape for g in run()] == [(3, 2, 5, 4)] * 3


def test_ways_are_tried_once_and_the_fastest_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(Ways, "_try", lambda self, run: next(seconds))
    ways = Ways(pool(), 3)
    assert [ways.best(Linear(6, 8, 4), "forward") for _ in range(2)] == ["convolution channels_last"] * 2
    (fact,) = ways.facts()
    assert fact["pass"] == "forward" and next(iter(fact["ms"].items())) == ("convolution channels_last", 1000.0)


def test_a_limit_computes_for_the_kept_samples_only(monkeypatch: pytest.MonkeyPatch) -> None:
    stem, linear, attention = Convolution(3, 8, 8, 8, (4, 4), (4, 4)), Linear(4, 8, 8), Attention(2, 4, 4, 4)
    operations = [Placed(stem, None, on_images=True), Placed(linear, 0), Placed(attention, 1), Placed(linear, 2)]
    limit = Limit(operations, [0.0, 0.5, 1.0], Ways(pool(), 4))
    # the stem: forward and weight; a linear layer: three passes; attention: forward and twice as much backward
    assert limit.macs == 4 * 2 * stem.macs + 4 * 3 * linear.macs + 2 * 3 * attention.macs
    monkeypatch.setattr(Ways, "best", lambda self, operation, direction: "products")
    products = Limit([Placed(attention, 0)], [0.25], Ways(pool(), 4))
    with FlopCounterMode(display=False) as counter:
        products.run()
    assert counter.get_total_flops() == 2 * products.macs == 2 * 3 * 3 * attention.macs


def test_operands_share_buffers() -> None:
    buffers = pool()
    large, small = buffers.take("x", 4, 5), buffers.take("x", 2, 3)
    assert large.data_ptr() == small.data_ptr() != buffers.take("g", 2, 3).data_ptr()
    image = buffers.take_image("x", "channels_last", 2, 3, 4, 5)
    assert image.shape == (2, 3, 4, 5) and image.is_contiguous(memory_format=torch.channels_last)
