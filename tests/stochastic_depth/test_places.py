"""Where stochastic depth belongs in others' blocks, and rates as a fresh build has them."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from layers.drop_path import DropPath
from stochastic_depth.graft import grafted
from stochastic_depth.places import block_names, find_owners, foreign_rate
from stochastic_depth.report import drop_path_report
from stochastic_depth.setting import set_drop_path
from tests.stochastic_depth.parts import SIZE, Net, Residual, build, size_of, torchvision_model


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto", "caformer_s18"]
)
def test_rates_equal_those_of_a_fresh_build(name: str) -> None:
    model, fresh = build(name), build(name, drop_path_rate=0.3)
    set_drop_path(model, 0.3, input_size=size_of(name))
    expected = [[getattr(s, "drop_prob", 0.0) for s in owner.slots.values()] for owner in find_owners(fresh)]
    got = [[s.drop_prob for s in owner.slots.values() if isinstance(s, DropPath)] for owner in find_owners(model)]
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a == pytest.approx(b, abs=1e-6)


@pytest.mark.parametrize("name", ["convnext_tiny", "swin_t"])
def test_rates_of_torchvision_equal_those_of_a_fresh_build(name: str) -> None:
    model = torchvision_model(name)
    set_drop_path(model, 0.3, input_size=SIZE)
    if name == "swin_t":  # its function fixes the rate
        fresh: nn.Module = torchvision.models.SwinTransformer(
            [4, 4], 96, [2, 2, 6, 2], [3, 6, 12, 24], [7, 7], stochastic_depth_prob=0.3
        )
    else:
        fresh = torchvision.models.get_model(name, stochastic_depth_prob=0.3)
    expected = [foreign_rate(s) for owner in find_owners(fresh) for s in owner.slots.values()]
    assert [m.drop_prob for m in grafted(model)] == pytest.approx(expected, abs=1e-6)


def test_timms_resnest_drops_its_branch_here_and_not_its_input() -> None:
    name = "resnest14d"
    model = build(name, drop_path_rate=0.5)
    report = drop_path_report(model, input_size=SIZE)
    assert any("ResNestBottleneck drops its input, not its branch" in w for w in report.warnings)
    set_drop_path(model, 1.0, profile="constant", input_size=SIZE)
    assert not drop_path_report(model, input_size=SIZE).warnings
    model.train()(torch.randn(4, *SIZE)).square().sum().backward()
    for key, parameter in model.named_parameters():
        if "conv1" in key and key.startswith("layer"):
            assert parameter.grad is not None and not parameter.grad.any(), key
        if "downsample" in key and parameter.ndim > 1:
            assert parameter.grad is not None and parameter.grad.any(), key


def test_class_attention_blocks_are_left_alone() -> None:
    sizes: dict = {"layers": (1, 1, 2, 1), "embed_dims": (32,) * 4, "num_heads": (2,) * 4, "num_classes": 5}
    model = timm.models.volo.VOLO(**sizes, img_size=64)
    result = set_drop_path(model, 0.3, input_size=SIZE)
    assert result.notes[-1] == "2 class-attention blocks: left alone, as their authors do"
    assert result.rates == pytest.approx([0.0, 0.075, 0.15, 0.225, 0.3])
    fresh = timm.models.volo.VOLO(**sizes, img_size=64, drop_path_rate=0.3)
    expected = [getattr(s, "drop_prob", 0.0) for owner in find_owners(fresh) for s in owner.slots.values()]
    assert [m.drop_prob for m in grafted(model)] == pytest.approx(expected, abs=1e-6)


def test_a_model_without_residual_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="AlexNet has no residual block"):
        set_drop_path(torchvision.models.alexnet(num_classes=2), 0.1)


def test_places_without_a_shortcut_are_no_blocks() -> None:
    model = timm.create_model("ghostnet_100", num_classes=2)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"GhostNet has places .* only in blocks without a shortcut \(blocks"):
            set_drop_path(model, 0.1, input_size=SIZE)


def test_owners_of_one_block_share_a_rate() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop_path = nn.Identity()

    class Other(Named):
        pass

    model = nn.Module()
    model.blocks = nn.ModuleList([nn.ModuleDict({"attn": Named(), "grid": Named()}) for _ in range(2)])
    assert block_names(find_owners(model)) == ["blocks.0", "blocks.0", "blocks.1", "blocks.1"]
    model.blocks = nn.ModuleList([nn.Sequential(Named(), Other()) for _ in range(2)])
    assert block_names(find_owners(model)) == ["blocks.0", "blocks.0", "blocks.1", "blocks.1"]
    model.blocks = nn.ModuleList([nn.Sequential(Named(), Named()) for _ in range(2)])
    assert block_names(find_owners(model)) == ["blocks.0.0", "blocks.0.1", "blocks.1.0", "blocks.1.1"]


def test_sequences() -> None:
    dropout = nn.Sequential(nn.Dropout(0.1), timm.layers.DropPath(0.1))
    ends = [nn.Sequential(), nn.Sequential(nn.Identity()), nn.Sequential(timm.layers.DropPath(0.1)), dropout]
    model = Net(*(Residual(end) for end in ends))
    result = set_drop_path(model, 0.3, profile="constant", mode="skip", input_size=Net.size)
    assert [b.name for b in result.blocks] == ["blocks.0", "blocks.1", "blocks.2", "blocks.3"]
    assert result.notes == ["4 drop-path modules: skips per branch"] and len(list(grafted(model))) == 4
    rows: list[int] = []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda _m, args, _o: rows.append(len(args[0])))
    model.train()(torch.randn(10, *Net.size))
    assert rows == [7] * 4


class Listed(nn.Module):
    """Two branches whose drop-path modules stand in a list, one of them at rate 0."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)
        self.drop_paths = nn.ModuleList([nn.Identity(), timm.layers.DropPath(0.2)])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_paths[0](self.fc1(x))
        return x + self.drop_paths[1](self.fc2(x))


class Beside(Net):
    """A model with one list of blocks and one of drop-path modules."""

    def __init__(self, count: int) -> None:
        super().__init__(*(nn.Linear(8, 8) for _ in range(count)))
        self.drop_paths = nn.ModuleList(nn.Identity() if not i else timm.layers.DropPath(0.1) for i in range(count))

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(self.stem(x).flatten(2))
        for block, drop_path in zip(self.blocks, self.drop_paths, strict=True):
            x = x + drop_path(block(x))
        return x


def test_lists_of_drop_path_modules() -> None:
    model = Net(Listed(), Listed())
    result = set_drop_path(model, 0.4, mode="skip", input_size=Net.size)
    assert [list(b.drop_paths) for b in result.blocks] == [["drop_paths.0", "drop_paths.1"]] * 2
    assert result.rates == [0.0, 0.4] and result.notes == ["4 drop-path modules: skips per branch"]
    model = Beside(3)
    result = set_drop_path(model, 0.4, mode="skip", input_size=Net.size)
    assert [b.name for b in result.blocks] == ["drop_paths.0", "drop_paths.1", "drop_paths.2"]
    assert result.rates == pytest.approx([0.0, 0.2, 0.4])
    assert result.notes == ["3 drop-path modules: masks, since it stands beside its block, not in it"]
    model.train()(torch.randn(5, *Net.size))
    assert not drop_path_report(model, input_size=Net.size).warnings
