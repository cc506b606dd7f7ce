"""Blocks that are switched off: what is left is the shortcut, nothing of the branch runs, and afterwards all is as before."""

from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from layers.drop_path import DropPath
from models import create_model
from stochastic_depth import set_drop_path
from stochastic_depth.blocks import NoBlocksError
from stochastic_depth.proof import randomise_scales
from stochastic_depth.removal import Removed, removed, residual_blocks, take_out
from tests.stochastic_depth.parts import PlainNet


def ours() -> Any:
    torch.manual_seed(0)
    model = create_model("caformer_n4", depths=[2, 2], dims=[16, 32], image_size=16, res_scale=1.0).eval()
    randomise_scales(model)
    return model


def at_rate_one(model: nn.Module, images: Tensor, gone: list[int]) -> Tensor:
    """What stochastic depth itself gives at rate 1 in some blocks and 0 in the others."""
    count = len(residual_blocks(model, images.shape[1:]))
    rates = [float(number in gone) for number in range(1, count + 1)]
    set_drop_path(model, None, profile=rates, mode="mask", input_size=images.shape[1:])
    for module in model.modules():
        module.training = isinstance(module, DropPath)
    with torch.no_grad():
        out = model(images)
    model.eval()
    return out


@pytest.mark.parametrize("gone", [[1], [2, 3], [1, 2, 3, 4]])
def test_it_is_drop_path_at_rate_1(gone: list[int]) -> None:
    model, images = ours(), torch.randn(3, 3, 16, 16)
    blocks = residual_blocks(model)
    assert [b.name for b in blocks] == [f"stages.{s}.blocks.{i}" for s in (0, 1) for i in (0, 1)]
    with torch.no_grad():
        before = model(images)
        with removed([blocks[number - 1] for number in gone]):
            without = model(images)
        assert torch.equal(model(images), before), "afterwards it is as before"
    assert torch.allclose(without, at_rate_one(model, images, gone), atol=1e-6)
    assert not torch.allclose(without, before, atol=1e-3)


def test_branches_are_not_computed() -> None:
    model = PlainNet().eval()
    calls: list[int] = []
    for number, block in enumerate(b for stage in model.stages for b in stage):  # type: ignore[union-attr]
        block.fc.register_forward_hook(lambda *_, n=number: calls.append(n))
    with removed(residual_blocks(model)[1:3]):
        model(torch.randn(2, 3, 8, 8))
    assert calls == [0, 3]


def test_a_block_that_adds_drop_path_of_its_branch_is_the_shortcut_too() -> None:
    class Adding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.drop_path = nn.Linear(4, 4), DropPath()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.drop_path(self.fc(x))

    model, x = nn.Sequential(Adding(), Adding()), torch.randn(2, 4)
    with removed(residual_blocks(model)[:1]):
        assert torch.equal(model(x), model[1](x))


def test_one_module_in_two_blocks_cannot_be_switched_off_for_one() -> None:
    model = PlainNet()
    model.stages[0][1].drop_path = model.stages[0][0].drop_path  # type: ignore[index, union-attr]
    first = residual_blocks(model)[0]
    assert first.reason == "its DropPath serves stages.0.1 too"
    with pytest.raises(ValueError, match=r"stages\.0\.0 cannot be removed: its DropPath serves"), removed([first]):
        pass


FOREIGN = {
    "test_resnet": (lambda: timm.create_model("test_resnet"), {"layer2.0", "layer3.0", "layer4.0"}),
    "test_vit": (lambda: timm.create_model("test_vit"), set()),
    "test_convnext": (lambda: timm.create_model("test_convnext"), set()),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=4), {"layer2.0", "layer3.0", "layer4.0"}),
    "vit": (
        lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=4),
        set(),
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "resnet18" else []) for name in FOREIGN]
)
def test_foreign_blocks(name: str) -> None:
    build, stay = FOREIGN[name]
    torch.manual_seed(0)
    model = build().eval()
    randomise_scales(model)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)  # torchvision's classifier begins at 0
    size = (3, 32, 32)
    keys, state = list(model.state_dict()), torch.get_rng_state()
    images = torch.randn(2, *size)
    torch.set_rng_state(state)
    before = model(images)
    blocks = residual_blocks(model, size)
    assert torch.equal(torch.get_rng_state(), state) and list(model.state_dict()) == keys and not model.training
    if stay is not None:
        assert {b.name for b in blocks if not b.removable} == stay
    for block in blocks:
        if not block.removable:
            assert block.reason == "its output has another shape than its input"
            continue
        with removed([block]):
            without = model(images)
        assert torch.allclose(without, at_rate_one(model, images, [block.number]), atol=1e-5)
        assert not torch.equal(without, before)
    assert torch.equal(model(images), before)


def test_a_foreign_block_whose_shortcut_is_no_identity_stays() -> None:
    class Block(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.fc, self.drop_path, self.factor = nn.Linear(4, 4), nn.Identity(), factor

        def forward(self, x: Tensor) -> Tensor:
            return self.factor * x + self.drop_path(self.fc(x))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(Block(1.0), Block(0.5))

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(x.mean(dim=(2, 3)))

    first, second = residual_blocks(Net(), (4, 8, 8))
    assert first.removable and second.reason == "its shortcut is no identity"


def test_what_is_taken_out_is_gone() -> None:
    model = timm.create_model("test_vit").eval()
    randomise_scales(model)
    blocks, images = residual_blocks(model), torch.randn(1, 3, 160, 160)
    with torch.no_grad(), removed(blocks[:1]):
        without = model(images)
    take_out(model, blocks[:1])
    assert torch.equal(model(images), without) and not any(key.startswith("blocks.0.") for key in model.state_dict())
    with pytest.raises(ValueError, match="it is no foreign block"):
        take_out(own := ours(), residual_blocks(own)[:1])


def test_removed_returns_as_many_values_as_the_block_did() -> None:
    x = torch.ones(1)
    assert Removed()(x, 3, mask=None) is x and Removed(2)(x, (4, 4)) == (x, (4, 4)) and Removed(1)(x, 3) == (x,)


def test_models_without_blocks_and_of_other_sizes_are_told() -> None:
    with pytest.raises(NoBlocksError, match="no residual block"):
        residual_blocks(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"\(3, 30, 30\) failed .*give input_size"):
        residual_blocks(timm.create_model("test_vit"), (3, 30, 30))
