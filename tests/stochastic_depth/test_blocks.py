"""The residual blocks of a model, wrapped or not."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from layers.rates import drop_path_rates
from stochastic_depth.blocks import NoBlocksError, find_blocks, stage_depths, unwrap
from stochastic_depth.compute import count_macs
from stochastic_depth.report import drop_path_report
from stochastic_depth.setting import set_drop_path
from tests.stochastic_depth.parts import DEPTHS, PlainNet, poolformer, rates_of


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_blocks_and_stages_of_a_model() -> None:
    blocks = find_blocks(poolformer())
    assert [b.name for b in blocks] == [
        "stages.0.blocks.0",
        "stages.1.blocks.0",
        "stages.2.blocks.0",
        "stages.2.blocks.1",
        "stages.3.blocks.0",
    ]
    assert all(list(b.drop_paths) == ["drop_path1", "drop_path2"] for b in blocks)
    assert stage_depths(poolformer(), blocks) == DEPTHS


def test_blocks_compiled_one_by_one_are_the_same_blocks() -> None:
    plain, compiled = PlainNet(), PlainNet()
    for stage in compiled.stages:
        assert isinstance(stage, nn.Sequential)
        for i in range(2):
            stage[i] = torch.compile(stage[i], backend="eager")  # type: ignore[assignment]
    assert [b.name for b in find_blocks(compiled)] == [b.name for b in find_blocks(plain)]
    assert set_drop_path(compiled, 0.4, profile="stagewise").rates == [0.0, 0.0, 0.4, 0.4]


@pytest.mark.parametrize("use", [find_blocks, lambda model: set_drop_path(model, 0.1)])
def test_a_model_without_blocks_is_refused(use: Any) -> None:
    with pytest.raises(NoBlocksError, match="Sequential has no residual block with a DropPath"):
        use(nn.Sequential(nn.Linear(2, 2)))


def test_a_report_on_a_model_without_blocks_says_so() -> None:
    report = drop_path_report(nn.Sequential(nn.Linear(2, 2)))
    assert report.blocks == [] and report.warnings == [] and report.expected_depth == 0
    assert "Sequential has no residual block" in str(report) and report.to_csv().startswith("block,name,")


@pytest.mark.parametrize("wrapping", ["ddp", "compile", "compiled ddp", "ddp of compiled", "compiled in place"])
def test_wrapped_models(wrapping: str, process_group: None) -> None:
    model = poolformer()
    wrapped: Any = model
    if wrapping == "compiled in place":
        model.compile(backend="eager")
    if "compile" in wrapping and wrapping not in ("compiled ddp", "compiled in place"):
        wrapped = torch.compile(wrapped, backend="eager")
    if "ddp" in wrapping:
        wrapped = DistributedDataParallel(wrapped)
    if wrapping == "compiled ddp":
        wrapped = torch.compile(wrapped, backend="eager")
    assert unwrap(wrapped) is model
    set_drop_path(wrapped, 0.4, profile="stagewise", mode="skip")
    assert rates_of(model) == drop_path_rates(0.4, DEPTHS, "stagewise")
    assert count_macs(wrapped).total == count_macs(poolformer()).total
    assert [b.name for b in drop_path_report(wrapped).blocks] == [b.name for b in find_blocks(model)]
