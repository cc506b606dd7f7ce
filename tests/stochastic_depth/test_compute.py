"""Multiply-accumulates against counts by hand, and that counting leaves no trace."""

import pytest
import torch
from torch import Tensor, nn

from layers.drop_path import DropPath
from models import create_model
from stochastic_depth.blocks import find_blocks
from stochastic_depth.compute import count_macs
from tests.stochastic_depth.parts import BRANCH_MACS, NET_MACS, PlainNet, drop_paths, poolformer, settings_of


def test_macs_by_hand() -> None:
    model = PlainNet()
    macs = count_macs(model, (3, 8, 8))
    assert macs.total == NET_MACS
    assert [macs.block(b) for b in find_blocks(model)] == [BRANCH_MACS] * 4
    assert macs.branch(DropPath()) == 0.0


def test_macs_of_pooling_blocks_are_their_mlps() -> None:
    model = poolformer()
    macs = count_macs(model)
    positions = [64, 16, 4, 4, 1]  # a stride of 4, then 2 between stages
    dims = [16, 32, 48, 48, 64]
    by_hand = [n * 2 * 4 * c * c for n, c in zip(positions, dims, strict=True)]
    assert [macs.block(b) for b in find_blocks(model)] == by_hand
    assert all(macs.branch(b.drop_paths["drop_path1"]) == 0 for b in find_blocks(model))


def test_macs_of_sep_conv_and_attention() -> None:
    blocks = find_blocks(model := create_model("caformer_n4", num_classes=5))
    macs = count_macs(model)
    n, c = 256, 32
    sep_conv = 2 * n * c * 2 * c + n * 2 * c * 9  # two linear layers, a depthwise 3 x 3
    assert macs.branch(blocks[0].drop_paths["drop_path1"]) == sep_conv
    n, c = 64, 64
    attention = 4 * n * c * c + 2 * n * n * c  # qkv and output, then q k and its product with v
    assert macs.branch(blocks[2].drop_paths["drop_path1"]) == attention
    assert macs.branch(blocks[2].drop_paths["drop_path2"]) == 2 * n * c * 2 * c


def test_macs_of_a_module_that_adds_two_branches() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.drop_path = nn.Linear(4, 4), nn.Linear(4, 4), DropPath()

        def forward(self, x: Tensor) -> Tensor:
            return self.drop_path.residual(self.drop_path.residual(x, self.fc1), self.fc2, x)

    model = Shared()
    macs = count_macs(model, (3, 4))
    assert macs.block(find_blocks(model)[0]) == macs.total == 2 * 3 * 4 * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_macs_do_not_depend_on_dtype(dtype: torch.dtype) -> None:
    assert count_macs(PlainNet().to(dtype), (3, 8, 8)).total == NET_MACS


@pytest.mark.parametrize("training", [True, False])
def test_counting_leaves_no_trace(training: bool) -> None:
    torch.manual_seed(0)
    model = poolformer(drop_path_rate=0.4).train(training)
    model.get_submodule("stem").train(not training)  # as a part frozen for fine-tuning
    flags = {name: m.training for name, m in model.named_modules()}
    state, settings, draws = (
        {k: v.clone() for k, v in model.state_dict().items()},
        settings_of(model),
        torch.get_rng_state(),
    )
    count_macs(model)
    assert {name: m.training for name, m in model.named_modules()} == flags
    assert all("residual" not in vars(m) for m in drop_paths(model))
    assert settings_of(model) == settings
    assert torch.equal(torch.get_rng_state(), draws)
    after = model.state_dict()
    assert all(v.device.type == "cpu" and torch.equal(v, after[k]) for k, v in state.items())


@pytest.mark.parametrize("fails", [False, True])
def test_counting_leaves_shared_modules_and_tied_weights_alone(fails: bool) -> None:
    model = PlainNet()
    model.stages[1][0].fc = model.stages[0][0].fc  # type: ignore[index, union-attr]
    model.stages[1][1].fc.weight = model.stages[0][1].fc.weight  # type: ignore[index, union-attr]
    before = [(m, key, value) for m in model.modules() for key, value in m._parameters.items()]
    if fails:
        with pytest.raises(ValueError, match="counting compute at"):
            count_macs(model, (4, 8, 8))
    else:
        assert count_macs(model, (3, 8, 8)).total == NET_MACS
    assert all(m._parameters[key] is value for m, key, value in before)
    assert not any(p.is_meta for p in model.parameters())


def test_counting_leaves_no_trace_when_it_fails() -> None:
    model = PlainNet()
    model.head = nn.Linear(9, 5)
    model.stages[0].eval()
    with pytest.raises(ValueError, match="counting compute at"):
        count_macs(model, (3, 8, 8))
    assert model.training and not model.stages[0].training
    assert model.stages[1].training
    assert all("residual" not in vars(m) for m in drop_paths(model))
    assert {p.device.type for p in model.parameters()} == {"cpu"}
