"""Drop-path modules that somebody replaces by hand in a model that was converted already."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

from layers.drop_path import DropPath
from stochastic_depth.graft import ApplyAfter, grafted
from stochastic_depth.proof import verify_skip
from stochastic_depth.report import drop_path_report
from stochastic_depth.setting import set_drop_path
from stochastic_depth.standing import Standing
from tests.stochastic_depth.parts import SIZE, Net, Residual, build, quiet_norms, size_of, torchvision_model


class Whole(nn.Module):
    """Two branches that can be skipped with their block only, since no module begins them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop_path1, self.drop_path2 = nn.Linear(8, 8), nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(torch.relu(x) @ self.fc.weight)
        return x + self.drop_path2(torch.relu(x) @ self.fc.weight)


MODELS: dict[str, tuple[Callable[[], nn.Module], str, str, tuple[int, int, int]]] = {
    "branch": (lambda: build("vit_tiny_patch16_224"), "blocks.0", "drop_path1", size_of("vit_tiny_patch16_224")),
    "block": (lambda: Net(Whole(), Whole()), "blocks.0", "drop_path1", Net.size),
    "silent": (lambda: Net(Whole(), Whole()), "blocks.0", "drop_path2", Net.size),
    "bare": (lambda: torchvision_model("resnet18"), "layer1.0", "drop_path_bn2", SIZE),
}

NEW: dict[str, Callable[[], nn.Module]] = {
    "nothing": nn.Identity,
    "timm's": lambda: timm.layers.DropPath(0.9),
    "ours": lambda: DropPath(0.9),
    "ours, skip": lambda: DropPath(0.9, mode="skip"),
}


def converted(name: str) -> tuple[nn.Module, nn.Module, str, tuple[int, int, int]]:
    torch.manual_seed(0)
    make, block, key, size = MODELS[name]
    model = quiet_norms(make().train())
    set_drop_path(model, 0.5, profile="constant", mode="skip", input_size=size)
    return model, model.get_submodule(block), key, size


def outcome(model: nn.Module, images: Tensor) -> Tensor:
    torch.manual_seed(1)
    return model(images)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("new", NEW)
@pytest.mark.parametrize("training", [True, False])
def test_what_somebody_puts_in_works_as_it_is(name: str, new: str, training: bool) -> None:
    model, block, key, size = converted(name)
    plain = MODELS[name][0]()
    plain.load_state_dict(model.state_dict())
    quiet_norms(model.train(training))
    setattr(block, key, NEW[new]())
    block.get_submodule(key).train(training)
    images = torch.randn(8, *size)
    if not training:  # the module that was taken out does not hear of eval()
        torch.testing.assert_close(outcome(model.eval(), images), plain.eval()(images))
        return
    for module in grafted(model):
        module.reset_counts()
    with pytest.warns(
        UserWarning, match=f"^{key} of a .* was replaced after set_drop_path: .* call set_drop_path again"
    ):
        outcome(model, images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outcome(model, images)
    module = block.get_submodule(key)
    if isinstance(module, DropPath):
        assert (module.samples_seen, module.samples_computed) == (16, 16), "it sees all samples, and masks"
    assert {m.samples_seen for m in grafted(model)} - {0} == {16}
    assert 8 in {m.samples_computed for m in grafted(model)}, "others go on skipping"
    drop_path_report(model, input_size=size)
    # with all others off it is the plain model, dropped by the new module alone
    for other in grafted(model):
        other.drop_prob = 0.0
    if new == "nothing":
        torch.testing.assert_close(outcome(model, images), quiet_norms(plain.train())(images))
    else:
        assert not torch.equal(outcome(model, images), quiet_norms(plain.train())(images))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("new", ["nothing", "timm's"])
def test_set_again_the_block_is_tried_anew(name: str, new: str) -> None:
    model, block, key, size = converted(name)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    images = torch.randn(8, *size)
    setattr(block, key, NEW[new]())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_drop_path(model, 0.5, profile="constant", mode="skip", input_size=size)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert sum(isinstance(h, ApplyAfter) for m in block.modules() for h in m._forward_hooks.values()) == (
        name == "bare"
    )
    assert all(m.skips for m in grafted(model) if m.applied)
    assert max(verify_skip(model, images, seed=seed) for seed in range(3)) < 2e-5
    outcome(model, images)
    assert {m.samples_computed for m in grafted(model)} <= {4, 0}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_know_their_own_modules(name: str, clone: Callable[[nn.Module], nn.Module]) -> None:
    model, _, key, size = converted(name)
    model = clone(model)
    images = torch.randn(8, *size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outcome(model, images)
    setattr(model.get_submodule(MODELS[name][1]), key, nn.Identity())
    with pytest.warns(UserWarning, match="was replaced"):
        outcome(model, images)


def test_compiled_code_leaves_a_replaced_module_alone_too() -> None:
    model, block, key, size = converted("block")
    images = torch.randn(8, *size)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(outcome(compiled, images), outcome(model, images))
    setattr(block, key, nn.Identity())
    replaced = outcome(compiled, images)
    with pytest.warns(UserWarning, match="was replaced"):
        torch.testing.assert_close(replaced, outcome(model, images))


def test_places_may_be_lists_and_may_be_gone() -> None:
    block = nn.Module()
    block.drop_paths = nn.ModuleList([DropPath(), DropPath()])
    standing = Standing(block, list(block.drop_paths))
    assert not standing.replaced()
    block.drop_paths[1] = DropPath()
    with pytest.warns(UserWarning, match="drop_paths.1 of a Module was replaced"):
        assert standing.replaced()
    del block.drop_paths
    assert standing.replaced()
    residual = Residual(DropPath())
    standing = Standing(residual, [residual.drop_path])
    residual.drop_path = None
    with pytest.warns(UserWarning, match="drop_path of a Residual"):
        assert standing.replaced()


@pytest.mark.parametrize("mode", ["mask", "skip"])
def test_batch_norms_converted_afterwards_are_found_again(mode: str) -> None:
    """torch puts synchronised batch norms into the place of those that called the drop-path modules."""
    model = torchvision_model("resnet18").train()
    set_drop_path(model, 0.5, profile="constant", mode=mode, input_size=SIZE)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for _ in range(2):
        set_drop_path(model, 0.5, profile="constant", input_size=SIZE)
        hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
        assert sum(isinstance(hook, ApplyAfter) for hook in hooks) == 8
    for norm in model.modules():
        if isinstance(norm, nn.SyncBatchNorm):
            norm.eval()  # on a CPU it takes no statistics
    model(torch.randn(8, *SIZE))
    counts = [(module.samples_seen, module.samples_dropped) for module in grafted(model)]
    assert len(counts) == 8 and all(seen == 8 for seen, _ in counts) and sum(dropped for _, dropped in counts) > 0
