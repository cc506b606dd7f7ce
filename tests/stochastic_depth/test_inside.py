"""Modules inside a branch that somebody replaces or adds after `set_drop_path`."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false

import copy
import pickle
import re
import types
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from stochastic_depth.graft import grafted
from stochastic_depth.hooks import TrainingHooks, Way
from stochastic_depth.inside import Parts
from stochastic_depth.proof import verify_skip
from stochastic_depth.setting import set_drop_path
from tests.stochastic_depth.parts import Net

SETTINGS: dict = {"profile": "constant", "mode": "skip", "input_size": Net.size}


class Branch(nn.Module):
    """A branch of several modules, some of them in a sequence, without anything that mixes samples."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act, self.fc = nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        self.drop_path = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.fc(self.mlp(self.act(self.norm(x)))))


class Whole(Branch):
    """The same, which no module begins, so that it skips with its block."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(torch.relu(x) * self.fc(self.mlp(self.act(self.norm(x)))))


class Bare(Branch):
    """The same with a batch norm in the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp[1] = nn.BatchNorm1d(8)


class Mixing(nn.Module):
    """Takes the batch's mean off: what it makes of a sample hangs on the others."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return x - x.mean(0, keepdim=True)


class FrozenNorm(nn.Module):
    """A batch norm that uses its statistics and takes none."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.running_mean) / self.running_var.sqrt()


def mixing_forward(self: nn.Module, x: Tensor) -> Tensor:
    branch = self.fc(self.mlp(self.norm(x)))
    return x + self.drop_path(branch - branch.mean(0, keepdim=True))


def put_norm_behind(block: nn.Module) -> None:
    block.fc = nn.Sequential(block.fc, nn.BatchNorm1d(8))


def append_norm(block: nn.Module) -> None:
    block.mlp.append(nn.BatchNorm1d(8))


def other_norm(block: nn.Module) -> None:
    block.mlp[1] = nn.BatchNorm1d(8)


def wrap(block: nn.Module) -> None:
    block.fc = Mixing(block.fc)


def take_apart(block: nn.Module) -> None:
    block.mlp = nn.Linear(8, 8)


def patch_forward(block: nn.Module) -> None:
    block.forward = types.MethodType(mixing_forward, block)


# what is done to a block, and the place that the warning names
SURGERY: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "norm behind": (put_norm_behind, "fc of a .*, inside its branch, was replaced"),
    "norm appended": (append_norm, "mlp.2 of a .*, inside its branch, was added"),
    "norm for layer norm": (other_norm, "mlp.1 of a .*, inside its branch, was replaced"),
    "mixing": (wrap, "fc of a .*, inside its branch, was replaced"),
    "fewer": (take_apart, "mlp.* of a .*, inside its branch, was replaced"),
    "forward": (patch_forward, "forward of a .* was replaced"),
}


def converted(kind: type[nn.Module]) -> Net:
    torch.manual_seed(0)
    model = Net(kind(), kind()).train()
    set_drop_path(model, 0.5, **SETTINGS)
    return model


def keep(model: nn.Module, kept: int) -> None:
    for module in grafted(model):
        module._draw_count = lambda _batch: kept
        module.reset_counts()


def clones() -> list[Callable[[nn.Module], nn.Module]]:
    return [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]


@pytest.mark.parametrize("clone", clones(), ids=["itself", "deepcopy", "pickle"])
@pytest.mark.parametrize("kind", [Branch, Whole])
@pytest.mark.parametrize("name", SURGERY)
def test_what_was_changed_inside_masks_and_says_so(
    name: str, kind: type[nn.Module], clone: Callable[[nn.Module], nn.Module]
) -> None:
    model = clone(converted(kind))
    change, message = SURGERY[name]
    images = torch.randn(8, *Net.size)
    keep(model, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images)
    assert [m.samples_computed for m in grafted(model)] == [4, 4], "it skips until then"
    change(model.blocks[0])
    for i, kept in enumerate((4, 1, 0)):
        keep(model, kept)
        torch.manual_seed(1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(images).sum().backward()
        found = [str(w.message) for w in caught if "set_drop_path" in str(w.message)]
        assert len(found) == (1 if i == 0 else 0), found
        assert i or re.match(f"{message} after set_drop_path: .* called again", found[0]), found[0]
        assert [m.samples_computed for m in grafted(model)] == [8, kept]
    keep(model, 4)
    assert verify_skip(model, images) < 1e-5


@pytest.mark.parametrize("kind", [Branch, Whole])
@pytest.mark.parametrize("name", SURGERY)
def test_what_was_changed_inside_is_tried_anew_by_the_next_call(name: str, kind: type[nn.Module]) -> None:
    model = converted(kind)
    SURGERY[name][0](model.blocks[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        depth = set_drop_path(model, 0.5, **SETTINGS)
    mixes = name in ("mixing", "forward")
    assert any("outputs or gradients differ" in note for note in depth.notes) == mixes
    keep(model, 4)
    images = torch.randn(8, *Net.size)
    model(images)
    assert [m.samples_computed for m in grafted(model)] == [8 if mixes else 4, 4]
    for norm in model.modules():
        norm.train(not isinstance(norm, nn.BatchNorm1d))
    assert verify_skip(model, images) < 1e-5
    if not mixes:
        model.train()
        keep(model, 0)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        model(images)
        torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_a_block_that_could_not_skip_is_tried_anew_once_it_can() -> None:
    torch.manual_seed(0)
    model = Net(Branch(), Branch()).train()
    wrap(model.blocks[0])
    depth = set_drop_path(model, 0.5, **SETTINGS)
    assert any("outputs or gradients differ" in note for note in depth.notes)
    model.blocks[0].fc = model.blocks[0].fc.inner
    set_drop_path(model, 0.5, **SETTINGS)
    assert [m.role for m in grafted(model)] == ["branch", "branch"]


def test_a_change_of_another_branch_is_none_of_this() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Sequential(nn.Linear(8, 8), nn.ReLU())
            self.drop_path1, self.drop_path2 = nn.Identity(), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.drop_path1(self.fc1(x))
            return x + self.drop_path2(self.fc2(x))

    torch.manual_seed(0)
    model = Net(Two()).train()
    set_drop_path(model, 0.5, **SETTINGS)
    model.blocks[0].fc2.append(nn.BatchNorm1d(8))
    keep(model, 4)
    with pytest.warns(UserWarning, match="fc2.2 of a Two, inside its branch, was added") as caught:
        model(torch.randn(8, *Net.size))
        model(torch.randn(8, *Net.size))
    assert len(caught) == 1
    assert [m.samples_computed for m in grafted(model)] == [8, 16]
    del model.blocks[0].fc2[2]
    keep(model, 4)
    model(torch.randn(8, *Net.size))
    assert [m.samples_computed for m in grafted(model)] == [4, 4], "what was taken out again is no change"


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d, nn.SyncBatchNorm, FrozenNorm], ids=["other", "synchronised", "frozen"]
)
@pytest.mark.parametrize("clone", clones(), ids=["itself", "deepcopy", "pickle"])
def test_a_norm_in_the_place_of_a_batch_norm_is_spared_as_that_was(
    norm: Callable[[int], nn.Module], clone: Callable[[nn.Module], nn.Module]
) -> None:
    model = converted(Bare)
    model.blocks[0].mlp[1] = norm(8)
    model = clone(model)
    images = torch.randn(8, *Net.size)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for kept in (0, 4, 0):
        keep(model, kept)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*set_drop_path")
            warnings.filterwarnings("ignore", message=".*sees the kept samples only")
            model(images)
        assert [m.samples_computed for m in grafted(model)] == [kept, kept]
        unchanged = all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert unchanged == (kept == 0)
        before = {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", [Branch, Whole])
def test_compiled_code_sees_a_change_too(kind: type[nn.Module]) -> None:
    model = converted(kind)
    images = torch.randn(8, *Net.size)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        compiled(images)
        for module in grafted(model):
            module.reset_counts()
        append_norm(model.blocks[0])
        for seed in range(4):
            torch.manual_seed(seed)
            compiled(images)
    first, second = grafted(model)
    assert first.samples_computed == 32 and second.samples_computed < 32


def test_parts_know_norms_by_their_place() -> None:
    block, hooks = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), TrainingHooks()
    parts = Parts(block, ["0", "1"], Way(), hooks)
    assert parts.norms() == [block[1]] and not hooks.modules(), "the first are spared by who makes this"
    block[1] = nn.BatchNorm1d(8)
    assert parts.norms() == [block[1]] and hooks.modules() == [block[1]] * 2
    assert parts.norms() == [block[1]] and len(hooks.modules()) == 2, "once"
    block[1].eval()
    assert parts.norms() == []
