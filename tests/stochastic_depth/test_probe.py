"""What a probe sees of a model, and that it leaves the model as it was."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

import random

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from layers.drop_path import Mode
from stochastic_depth.graft import grafted
from stochastic_depth.report import drop_path_report
from stochastic_depth.setting import set_drop_path
from tests.stochastic_depth.parts import Net, Residual, build, traces


def test_a_wrong_input_size_is_said() -> None:
    with pytest.raises(ValueError, match=r"forward pass on images of \(1, 8, 8\) failed.*give input_size"):
        set_drop_path(build("vit_tiny_patch16_224"), 0.1, input_size=(1, 8, 8))


class TrainOnly(Residual):
    """Calls drop path only in training, behind a norm that counts."""

    def __init__(self) -> None:
        super().__init__(timm.layers.DropPath(0.5))
        self.norm, self.dropout = nn.BatchNorm1d(8), nn.Dropout(0.1)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        branch = self.dropout(self.mlp(self.norm(x)))
        if not self.training:
            return x + branch
        self.passes += 1 + 0 * random.random() + 0 * np.random.rand()
        return x + self.drop_path(branch)


@pytest.mark.parametrize("training", [True, False])
def test_blocks_that_drop_in_training_only(training: bool) -> None:
    model = Net(*(TrainOnly() for _ in range(3))).train(training)
    model.blocks[1].norm.eval()  # as a part frozen for fine-tuning
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = {name: m.training for name, m in model.named_modules()}
    draws = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    result = set_drop_path(model, 0.3, mode="skip", input_size=Net.size)
    assert result.notes[0] == "3 drop-path modules: skips per branch" and result.rates == pytest.approx([0, 0.15, 0.3])
    assert "3 branches hold a batch norm" in result.notes[1]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()), "statistics are left alone"
    assert flags == {name: m.training for name, m in model.named_modules()}
    assert torch.equal(torch.get_rng_state(), draws[0]) and random.getstate() == draws[1]
    assert np.random.get_state()[1].tolist() == draws[2]
    assert all(m.samples_seen == 0 for m in grafted(model))


class WantsTargets(Net):
    """Runs in evaluation only, unless it is given targets."""

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        assert targets is not None or not self.training, "targets are needed in training"
        return super().forward(x)


class TrainsOnly(Net):
    """Runs in training only."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.training
        return super().forward(x)


@pytest.mark.parametrize("kind", [WantsTargets, TrainsOnly])
def test_models_that_run_in_one_mode_only(kind: type[Net]) -> None:
    model = kind(Residual(timm.layers.DropPath(0.5)), Residual(nn.Identity()))
    assert set_drop_path(model, 0.3, mode="skip", input_size=Net.size).notes == [
        "2 drop-path modules: skips per branch"
    ]


class TokensFirst(Net):
    """Blocks on (L, B, C)."""

    def tokens(self, x: Tensor) -> Tensor:
        return x.permute(2, 0, 1)


class Windowed(Net):
    """Blocks on (B * L, C)."""

    def tokens(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize("mode", ["mask", "skip", "batch"])
@pytest.mark.parametrize(
    "size", [(3, 8, 8), (3, 8, 16), (3, 8, 24), (3, 32, 32)], ids=lambda s: f"{s[1] * s[2] // 64} tokens"
)
def test_tokens_first_drops_samples_and_no_tokens(mode: Mode, size: tuple[int, int, int]) -> None:
    model = TokensFirst(Residual(timm.layers.DropPath(0.5)), Residual(nn.Identity())).train()
    result = set_drop_path(model, 0.5, profile="constant", mode=mode, input_size=size)
    if mode == "skip":
        assert result.notes == ["2 drop-path modules: masks, since samples lie in dimension 1 there, behind tokens"]
    block, tokens = model.blocks[0], size[1] * size[2] // 64
    for batch in (1, 2, 3, 6, 16):  # as many as tokens, too
        block.drop_path.reset_counts()
        x = torch.randn(tokens, batch, 8)
        dropped = (block(x) == x).all(2)  # (L, B)
        assert torch.equal(dropped.all(0), dropped.any(0)), "all tokens of a sample, or none"
        assert block.drop_path.samples_seen == batch and block.drop_path.samples_dropped == int(dropped[0].sum())
    model(torch.randn(4, *size)).sum().backward()
    assert not drop_path_report(model, input_size=size).warnings


def test_parts_of_samples_are_said() -> None:
    model = Windowed(Residual(timm.layers.DropPath(0.5)), Residual(nn.Identity()))
    result = set_drop_path(model, 0.5, mode="skip", input_size=(3, 32, 32))
    assert result.notes == [
        "2 drop-path modules: skips per branch",
        "2 drop-path modules: draw for each of 16 parts of an image, as their blocks do",
    ]


class Unbatched(Residual):
    """Drops a part of what all samples share."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mlp(x.new_ones(4, 8))).sum(0)


def test_drop_path_of_what_is_no_sample_is_refused() -> None:
    model = Net(Residual(timm.layers.DropPath(0.5)), Unbatched(timm.layers.DropPath(0.5)))
    before = traces(model)
    with pytest.raises(
        ValueError, match=r"blocks\.1\.drop_path: no dimension of what it is given grows with the number"
    ):
        set_drop_path(model, 0.5, input_size=Net.size)
    assert traces(model) == before
