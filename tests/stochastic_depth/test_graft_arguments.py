"""Calls of a block with more that has a row for each sample than it was tried with."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false

import pytest
import timm
import torch
from torch import Tensor, nn

from stochastic_depth.graft import beside_samples, grafted
from stochastic_depth.proof import verify_skip
from stochastic_depth.setting import set_drop_path


class Shifted(nn.Module):
    """A branch that is shifted by something of each sample."""

    def __init__(self, *, whole: bool) -> None:
        super().__init__()
        self.fc, self.drop_path, self.whole = nn.Linear(8, 8), nn.Identity(), whole

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        h = torch.relu(x) @ self.fc.weight if self.whole else self.fc(x)
        return x + self.drop_path(h if shift is None else h + shift)


class Conditioned(nn.Module):
    """Tells its blocks the classes, if it is told them; by name or by position."""

    def __init__(self, *, whole: bool = False, by_name: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Shifted(whole=whole) for _ in range(2))
        self.embed, self.by_name = nn.Embedding(9, 8), by_name

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:
        x, shift = x.flatten(1)[:, :8], None if classes is None else self.embed(classes)
        for block in self.blocks:
            x = block(x, shift=shift) if self.by_name else block(x, shift)
        return x


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("by_name", [False, True])
def test_what_comes_beside_samples_masks_in_that_call(whole: bool, by_name: bool) -> None:
    torch.manual_seed(0)
    model = Conditioned(whole=whole, by_name=by_name).train()
    set_drop_path(model, 0.5, profile="constant", mode="skip", input_size=(3, 4, 4))
    assert all(m.skips for m in grafted(model))
    images, classes = torch.randn(6, 3, 4, 4), torch.arange(6)
    for given, computed in (((images,), 3), ((images, classes), 6), ((images,), 3)):
        outs = []
        for masks in (True, False):
            for module in grafted(model):
                module.masks_all = masks
                module.reset_counts()
            torch.manual_seed(1)
            outs.append(model(*given))
        torch.testing.assert_close(*outs)
        assert {m.samples_computed for m in grafted(model)} <= {computed, 0}
    assert verify_skip(model, images) < 1e-5
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    outs = []
    for run in (model, compiled):
        torch.manual_seed(1)
        outs.append(run(images, classes))
    torch.testing.assert_close(*outs)


def test_a_mask_of_attention_for_each_image() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, depth=2).train()
    set_drop_path(model, 0.5, profile="constant", mode="skip", input_size=(3, 32, 32))
    mask = torch.ones(4, 1, 5, 5, dtype=torch.bool)
    assert model(torch.randn(4, 3, 32, 32), attn_mask=mask).shape == (4, 3)
    assert {m.samples_computed for m in grafted(model)} == {4}


def test_which_arguments_hold_a_row_for_each_sample() -> None:
    x, rows, other = torch.zeros(3, 2), torch.zeros(3), torch.zeros(4)
    assert beside_samples((x, rows, 3, other), {"a": (other, rows), "b": None, "c": other}) == [1, "a"]
    assert beside_samples((x[:1], rows[:1]), {}) == beside_samples((), {"a": x}) == []
