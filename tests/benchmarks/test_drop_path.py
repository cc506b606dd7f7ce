"""What skipping saves: the ways of doing stochastic depth are what they are said to be."""

import pytest
import torch

from benchmarks.drop_path import Branches, FlooredDropPath, TimmResidual, block_model, dropped_compute, variants
from layers.drop_path import BREAK_EVEN, DropPath


def test_floored_keeps_the_count_that_dinov2_keeps() -> None:
    torch.manual_seed(0)
    x = torch.ones(16, 3)
    for rate, kept in ((0.1, 14), (0.2, 12), (0.4, 9), (0.99, 1)):
        out = FlooredDropPath(rate).train().residual(x, lambda x: x) - x
        assert int(out[:, 0].count_nonzero()) == kept
        assert float(out.max()) == pytest.approx(16 / kept)
    assert torch.equal(FlooredDropPath(0.5).eval().residual(x, lambda x: x), 2 * x)


def test_timms_module_masks_in_our_block() -> None:
    torch.manual_seed(0)
    x, seen = torch.ones(64, 3), []
    out = TimmResidual(0.5).train().residual(x, lambda x: seen.append(len(x)) or x)
    assert seen == [64] and set(out.unique().tolist()) == {1.0, 3.0}


def test_variants_have_the_same_weights_and_rates() -> None:
    model, shape = block_model("pooling")
    built = variants(model, 0.4, "constant", None)
    kinds = {name: {type(m) for m in other.modules() if isinstance(m, DropPath)} for name, other in built.items()}
    assert kinds == {"mask": {DropPath}, "skip": {DropPath}, "timm": {TimmResidual}, "floored": {FlooredDropPath}}
    for other in built.values():
        assert {m.drop_prob for m in other.modules() if isinstance(m, DropPath)} == {0.4}
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert 0.0 < dropped_compute(model, 0.4, "constant", shape) <= 0.4


@pytest.mark.parametrize("kind", BREAK_EVEN)
def test_a_branch_of_every_kind_with_a_break_even_rate(kind: str) -> None:
    model = Branches(kind)
    assert {m.kind for m in model.modules() if isinstance(m, DropPath)} == {kind}
    assert model.train()(torch.randn(2, 14, 14, 320)).shape == (2, 14, 14, 320)
