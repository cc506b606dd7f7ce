"""What `DropPath` is given: words for its settings, and branches that change their input in place."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layers.drop_path import DropPath, Mode
from stochastic_depth import set_drop_path, verify_skip


class Plain(nn.Module):
    """A block of ours whose branch is one linear layer."""

    def __init__(self, mode: Mode) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"fc": nn.Linear(5, 5)})
        self.drop_path = DropPath(0.5, mode=mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop_path.residual(x, self.block["fc"])


class TimmsBlock(nn.Module):
    """The same, written as timm does."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop_path = nn.Linear(5, 5), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.fc(x))


class Timms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = TimmsBlock()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class Method(nn.Module):
    """A branch by itself, a method whose first operation is in place."""

    def __init__(self, mode: Mode) -> None:
        super().__init__()
        self.fc, self.drop_path = nn.Linear(8, 8), DropPath(0.5, mode=mode)
        self.calls = 0

    def branch(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.fc(x.relu_())

    def forward(self, x: Tensor) -> Tensor:
        return self.drop_path.residual(x * 1, self.branch)


class Module(Method):
    """The same by modules."""

    def forward(self, x: Tensor) -> Tensor:
        branch = nn.Sequential(nn.ReLU(inplace=True), self.fc)
        return self.drop_path.residual(x * 1, branch)


class Beside(Method):
    """With another shortcut, which the branch leaves alone."""

    def forward(self, x: Tensor) -> Tensor:
        return self.drop_path.residual(x * 1, self.branch, x)


WARNING = "mode 'skip': this residual branch changes its input in place"


@pytest.mark.parametrize("kind", [Method, Module])
def test_a_branch_that_changes_the_shortcut_masks(kind: Callable[[Mode], Method]) -> None:
    torch.manual_seed(0)
    model, x = kind("skip"), torch.randn(8, 8)
    other = copy.deepcopy(model)
    other.drop_path.masks_all = True  # the same draws, applied as masks
    for step in range(4):
        results = []
        for module in (model, other):
            torch.manual_seed(step)
            module.zero_grad()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                out = module(x)
            assert [str(w.message)[: len(WARNING)] for w in caught] == [WARNING] * (module is model and step == 0)
            out.square().sum().backward()
            results.append([out.detach(), *(p.grad for p in module.parameters())])
        torch.testing.assert_close(*results)
    assert not model.drop_path.skips
    assert (model.drop_path.samples_seen, model.drop_path.samples_dropped) == (32, 16)
    assert model.drop_path.samples_computed == 32
    with pytest.warns(UserWarning, match=WARNING):
        assert verify_skip(kind("skip"), x) < 1e-6
    model.drop_path.drop_prob = 0.3
    assert not model.drop_path.skips, "nor at another rate"
    model.drop_path.drop_prob = 0.0
    torch.testing.assert_close(model(x), model.eval()(x))


def test_an_input_that_is_not_the_shortcut_may_be_changed() -> None:
    torch.manual_seed(0)
    model, x = Beside("skip"), torch.randn(8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x).sum().backward()
        assert verify_skip(model, x) < 1e-6
    assert model.drop_path.skips and model.drop_path.samples_computed == 4 and model.calls == 1


def test_with_no_sample_kept_it_is_seen_too() -> None:
    model, x = Method("batch"), torch.randn(3, 8)
    model.drop_path.drop_prob = 1.0
    with pytest.warns(UserWarning, match="mode 'batch': this residual branch"):
        torch.testing.assert_close(model(x), x.relu())


def test_inside_torch_func_and_in_inference_mode() -> None:
    model, x = Method("skip"), torch.randn(8, 8)
    weights = dict(model.named_parameters())
    with torch.inference_mode():
        assert model(x).shape == x.shape  # nobody counts changes there
    with pytest.warns(UserWarning, match=WARNING):
        found = torch.func.grad(lambda w: torch.func.functional_call(model, w, (x,)).sum())(weights)
    assert all(g.shape == weights[key].shape for key, g in found.items())


@pytest.mark.parametrize("mode", ["skip", "batch"])
@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("of_gradients", [False, True])
def test_vmap_that_draws_for_each_call(mode: Mode, foreign: bool, of_gradients: bool) -> None:
    """Each of its calls keeps samples of its own, as many as the law allows, and every other is its shortcut."""
    torch.manual_seed(0)
    module: nn.Module = Timms() if foreign else Plain(mode)
    if foreign:
        set_drop_path(module, 0.5, profile="constant", mode=mode, input_size=(5,))
    module.train()
    weights = {key: value.detach() for key, value in module.named_parameters()}
    x, calls = torch.randn(6, 5), 40

    def branch(w: dict[str, Tensor], shift: Tensor) -> Tensor:
        return torch.func.functional_call(module, w, (x + shift,)) - x - shift

    shifts = torch.zeros(calls)
    if of_gradients:
        of_bias = torch.func.grad(lambda w, shift: branch(w, shift)[:, 0].sum())
        found = torch.func.vmap(of_bias, in_dims=(None, 0), randomness="different")(weights, shifts)
        kept = found["block.fc.bias"][:, 0] / 2.0  # each kept sample gives its factor, 2
    else:
        found = torch.func.vmap(branch, in_dims=(None, 0), randomness="different")(weights, shifts)
        expected = 2.0 * nn.functional.linear(x, weights["block.fc.weight"], weights["block.fc.bias"])
        is_kept = (found - expected).abs().amax(-1) < 1e-5  # (calls, 6)
        assert torch.equal(found.abs().amax(-1) > 1e-5, is_kept)
        assert len({tuple(row.tolist()) for row in is_kept}) > (1 if mode == "batch" else 10)
        kept = is_kept.sum(-1)
    counts = {round(float(n), 4) for n in kept}
    assert counts == ({0.0, 6.0} if mode == "batch" else {3.0})


@pytest.mark.parametrize("kind", [None, 3, ["mlp"]])
def test_a_kind_is_a_word(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"kind must be a word, one of pooling, .* or another, got"):
        DropPath(kind=kind)
    assert DropPath(0.1, kind="mine", mode="skip").skips


def test_a_mistyped_mode_is_told_the_nearest() -> None:
    with pytest.raises(ValueError, match="mode must be one of mask, skip, batch, got 'skpi'; did you mean 'skip'"):
        DropPath(mode="skpi")  # type: ignore[arg-type]
