"""Compiled runs: as a whole or by blocks the same modules, rates and draws as eager ones, and the same after a resume."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from files.errors import ConfigError
from layers.drop_path import DropPath
from models.factory import create_model
from stochastic_depth.blocks import find_blocks
from stochastic_depth.setting import set_drop_path
from tests.training.parts import build_tiny, first_batches, step, weights
from training.checkpoint import load_checkpoint
from training.compiling import check_blocks, compile_in_place, configure
from training.run_folder import RunFolder
from training.setup import describe
from training.state import RunState

Count = Callable[[], tuple[int, int]]


@pytest.fixture
def as_before(compilations: Count) -> Iterator[Count]:
    """Counts of graphs and breaks; torch's settings are put back at the end."""
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):
        yield compilations


def compiled_pair(name: str, how: bool | str) -> tuple[nn.Module, nn.Module, tuple[int, ...]]:
    """A model that skips, compiled and not, with equal weights, and the size of its images."""
    more: dict[str, Any] = {"depths": [2, 3], "dims": [16, 32]} if name == "caformer_n4" else {}
    side = 64 if name == "timm/convnext_atto" else 32  # at 32 its last stage is one position, of more than one layout
    torch.manual_seed(0)
    models = [create_model(name, num_classes=5, image_size=side, **more).train() for _ in range(2)]
    for model in models:
        set_drop_path(model, 0.4, mode="skip", input_size=(3, side, side))
    models[1].load_state_dict(models[0].state_dict())
    configure(how)  # type: ignore[arg-type]
    compile_in_place(models[0], how, backend="eager")  # type: ignore[arg-type]
    return models[0], models[1], (models[0].pretrained_cfg["input_size"][0], side, side)


def counts(model: nn.Module) -> list[tuple[int, int]]:
    return [(m.samples_seen, m.samples_dropped) for m in model.modules() if isinstance(m, DropPath)]


@pytest.mark.parametrize(
    ("name", "how", "graphs"),
    [
        ("caformer_n4", "blocks", 2),  # of five blocks in two stages
        ("caformer_n4", True, 1),
        ("caformer_n4", False, 0),
        ("timm/test_vit", "blocks", 1),
        ("timm/convnext_atto", "blocks", 4),
    ],
)
def test_blocks_that_are_alike_share_a_graph(name: str, how: bool | str, graphs: int, as_before: Count) -> None:
    """At all rates, with the draws, the outputs, the gradients and the counts of eager code."""
    compiled, eager, size = compiled_pair(name, how)
    images = torch.randn(4, *size)
    for number, rate in enumerate((0.4, 0.0, 0.8)):
        results: list[list[Tensor]] = []
        for model in (compiled, eager):
            set_drop_path(model, rate, input_size=size)
            model.zero_grad()
            torch.manual_seed(number)
            out = model(images)
            out.square().sum().backward()
            results.append([out, *(p.grad for p in model.parameters() if p.grad is not None)])
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert counts(compiled) == counts(eager)
    assert as_before() == (graphs, 0)
    assert list(compiled.state_dict()) == list(eager.state_dict())
    assert [block.name for block in find_blocks(compiled)] == [block.name for block in find_blocks(eager)]


def test_blocks_of_many_shapes_are_all_compiled(as_before: Count) -> None:
    """Beyond torch's limit, where it would go on in eager code without a word of it in the run."""
    compiled, _, size = compiled_pair("caformer_n4", "blocks")
    for batch in range(1, 8):
        compiled(torch.randn(batch, *size))
    assert as_before() == (14, 0)


def test_a_plan_says_how_it_is_compiled(as_before: Count) -> None:
    told = {how: describe(build_tiny(f"runtime.compile={how}")) for how in ("false", "true", "blocks")}
    assert "float32, compiled, " in told["true"] and "float32, compiled by blocks, " in told["blocks"]
    assert "compiled" not in told["false"]
    assert torch._dynamo.config.recompile_limit >= 64


def test_a_model_without_blocks_is_compiled_as_a_whole_or_not_at_all(as_before: Count) -> None:
    model = ["model={name: torchvision/squeezenet1_1, image_size: 32, in_chans: 3}", "drop_path={rate: 0}"]
    with pytest.raises(ConfigError, match=r"runtime\.compile: 'blocks' has no effect .*; true compiles"):
        build_tiny(*model, "runtime.compile=blocks")
    check_blocks(True, [])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["blocks", "true"])
def test_a_compiled_run_goes_on_as_if_nothing_had_been(how: str, tmp_path: Path, as_before: Count) -> None:
    overrides = [f"runtime.compile={how}", "data.batch_size=16"]
    whole, again = build_tiny(*overrides), build_tiny(*overrides)
    keys = list(whole.model.state_dict())
    batches = first_batches(whole, 6)
    compile_in_place(whole.model, whole.config.runtime.compile)
    for number, batch in enumerate(batches[:3]):
        step(whole, [batch], number)
    saved = load_checkpoint(RunState(whole).save(RunFolder(tmp_path)))
    RunState(again).restore(saved)
    torch._dynamo.reset()  # the other process compiles anew
    compile_in_place(again.model, again.config.runtime.compile)
    for resumed in (again, whole):
        torch.set_rng_state(saved.rank_state["random"]["torch"])
        for number, batch in enumerate(batches[3:], 3):
            step(resumed, [batch], number)
    assert weights(again) == weights(whole) and list(again.model.state_dict()) == keys
    assert as_before()[1] == 0
