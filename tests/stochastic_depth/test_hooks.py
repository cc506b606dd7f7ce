"""Hooks by which models of others skip: on in training, off in evaluation, however that is set."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from layers.draw import Draw
from stochastic_depth.graft import grafted
from stochastic_depth.hooks import TrainingHooks, Way
from stochastic_depth.setting import set_drop_path
from tests.stochastic_depth.parts import build, output_and_gradients, quiet_norms, size_of

NAMES = ["vit_tiny_patch16_224", "convnext_atto", "resnet18", "swin_tiny_patch4_window7_224"]


def hooks_of(model: nn.Module) -> int:
    """How many forward hooks the modules of a model have."""
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def skipping(name: str) -> nn.Module:
    """A model in training that skips half of its samples."""
    torch.manual_seed(0)
    model = build(name).train()
    set_drop_path(model, 0.5, profile="constant", mode="skip", input_size=size_of(name))
    return quiet_norms(model)


def by_methods(model: nn.Module) -> None:
    """Evaluation and back, as most do it."""
    model.eval()
    assert hooks_of(model) == 0
    quiet_norms(model.train())


def by_flags(model: nn.Module) -> None:
    """Back as Lightning does it: the flag of each module is set."""
    flags = [(m, m.training) for m in model.modules()]
    for module in model.modules():
        module.training = False
    assert hooks_of(model) == 0
    for module, flag in flags:
        module.training = flag


@pytest.mark.filterwarnings("ignore:mode 'skip'. the batch norm")
@pytest.mark.parametrize("evaluated", [by_methods, by_flags])
@pytest.mark.parametrize("name", NAMES)
def test_hooks_are_off_in_evaluation_and_skip_as_before_afterwards(
    name: str, evaluated: Callable[[nn.Module], None]
) -> None:
    model, images = skipping(name), torch.randn(4, *size_of(name))
    on, results = hooks_of(model), []
    assert on > 0
    for twin in (copy.deepcopy(model), model):
        if twin is model:
            evaluated(model)
            assert hooks_of(model) == on
        results.append(output_and_gradients(twin, images, seed=1))
        computed = [m.samples_computed for m in grafted(twin)]
        assert sum(computed) < 4 * len(computed), "samples were skipped"
    assert all(map(torch.equal, *results))


@pytest.mark.filterwarnings("ignore:mode 'skip'. the batch norm")
@pytest.mark.parametrize("name", NAMES)
def test_copies_that_were_made_in_evaluation_skip_in_training(name: str) -> None:
    model, images = skipping(name).eval(), torch.randn(4, *size_of(name))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = hooks_of(model)
        assert hooks_of(twin) == before == 0
        twin.train()
        assert hooks_of(model) == 0 < hooks_of(twin), "hooks of a copy are on the copy"
        twin(images)
        computed = [m.samples_computed for m in grafted(twin)]
        assert sum(computed) < 4 * len(computed)
        twin.eval()
        assert hooks_of(twin) == 0
        assert torch.equal(twin(images), model(images)) or "resnet" in name  # whose norms have seen a batch


def test_a_model_that_was_given_rates_in_evaluation_has_hooks_in_training() -> None:
    name = "vit_tiny_patch16_224"
    model = build(name).eval()
    set_drop_path(model, 0.5, profile="constant", mode="skip", input_size=size_of(name))
    assert hooks_of(model) == 0
    model.train()
    on = hooks_of(model)
    assert on == hooks_of(skipping(name))
    set_drop_path(model.eval(), 0.2, mode="skip", input_size=size_of(name))
    assert hooks_of(model.train()) == on


def test_others_hooks_stay_in_both() -> None:
    model, seen = skipping("vit_tiny_patch16_224"), []
    on = hooks_of(model)
    model.get_submodule("blocks.0").register_forward_hook(lambda *_: seen.append(1))
    images = torch.randn(2, *size_of("vit_tiny_patch16_224"))
    for training, count in ((False, 1), (True, on + 1), (False, 1)):
        model.train(training)
        assert hooks_of(model) == count
        model(images)
    assert len(seen) == 3


def test_a_draw_that_an_exception_left_behind_is_forgotten_in_evaluation() -> None:
    model, images, wanted = skipping("convnext_atto"), torch.randn(2, 3, 64, 64), []
    for leave in (False, True):
        model.train()
        for module in grafted(model):
            module.way.draw = Draw(9, kept=torch.tensor([0])) if leave else None
        wanted.append(model.eval()(images))
    assert torch.equal(*wanted) and all(module.way.draw is None for module in grafted(model))


def test_a_copy_has_nothing_on_its_way() -> None:
    way = Way(Draw(2), 3)
    assert copy.deepcopy(way) == pickle.loads(pickle.dumps(way)) == Way()


@pytest.mark.parametrize("name", NAMES[:2])
def test_evaluation_in_between_compiles_nothing_anew(name: str, compilations: Callable[[], tuple[int, int]]) -> None:
    model, images = skipping(name), torch.randn(8, *size_of(name))
    compiled, counts = torch.compile(model, backend="eager"), []
    for _ in range(3):
        compiled.train()
        compiled(images).sum().backward()
        compiled.eval()
        with torch.no_grad():
            torch.testing.assert_close(compiled(images), model(images))
        counts.append(compilations())
    assert counts == [(2, 0)] * 3, "one graph of training, one of evaluation"


def test_numbers_of_hooks_from_another_process_are_not_given_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = skipping("vit_tiny_patch16_224")
    on = hooks_of(model)
    for training in (True, False):
        saved = pickle.dumps(model.train(training))
        monkeypatch.setattr(RemovableHandle, "next_id", 0)
        other = pickle.loads(saved)
        for module in other.modules():
            module.register_forward_pre_hook(lambda *_: None)
        assert hooks_of(other.train()) == on + len(list(other.modules()))


def test_hooks_are_put_on_in_their_order_and_cleared() -> None:
    module, hooks, calls = nn.Identity(), TrainingHooks(), []
    hooks.put(True)
    for number in (1, 2):
        hooks.add(module, lambda *_, n=number: calls.append(n), before=True)
    hooks.add(module, lambda *_: calls.append(3), before=False, always_call=True)
    for on in (True, True, False, False, True):
        hooks.put(on)
        calls.clear()
        module(torch.zeros(1))
        assert calls == ([1, 2, 3] if on else [])
    hooks.clear()
    module(torch.zeros(1))
    assert len(calls) == 3 and hooks_of(module) == 0
    hooks.add(module, lambda *_: calls.append(4), before=True)
    module(torch.zeros(1))
    assert calls[-1] == 4, "they were on when they were cleared"


def test_hooks_are_as_before_when_setting_rates_fails() -> None:
    name = "vit_tiny_patch16_224"
    model = skipping(name)
    on = hooks_of(model)
    model.get_submodule("blocks.0").drop_path1 = nn.Identity()  # tried anew, hooks and all
    with pytest.raises(ValueError, match="multiplier must be"):
        set_drop_path(model, 0.3, mode="skip", input_size=size_of(name), schedule=lambda step: 2.0)  # type: ignore[arg-type]
    assert hooks_of(model) == on
    assert hooks_of(model.eval()) <= 4, "but those of the module that was replaced by hand"
    assert hooks_of(model.train()) == on


def test_a_hook_of_the_other_kind_with_the_same_number_stays() -> None:
    """As one that came with a module from another process may have it."""
    module, hooks, calls = nn.Identity(), TrainingHooks(), []
    hooks.put(True)
    hooks.add(module, lambda *_: calls.append("ours"), before=True)
    (number,) = module._forward_pre_hooks
    module._forward_hooks[number] = lambda *_: calls.append("theirs")
    for on in (False, True):
        hooks.put(on)
        module(torch.zeros(1))
    hooks.clear()
    module(torch.zeros(1))
    assert calls == ["theirs", "ours", "theirs", "theirs"]
