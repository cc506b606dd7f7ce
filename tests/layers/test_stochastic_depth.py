"""The old address of `stochastic_depth` hands on its names, and says where they are now."""

import importlib

import pytest

import layers.stochastic_depth as old
from stochastic_depth import blocks, compute, report, setting


@pytest.mark.parametrize(
    ("name", "now"),
    [
        ("set_drop_path", setting.set_drop_path),
        ("StochasticDepth", setting.StochasticDepth),
        ("break_even_of", setting.break_even_of),
        ("drop_path_report", report.drop_path_report),
        ("DropPathReport", report.DropPathReport),
        ("find_blocks", blocks.find_blocks),
        ("unwrap", blocks.unwrap),
        ("count_macs", compute.count_macs),
    ],
)
def test_a_name_is_handed_on_with_a_warning(name: str, now: object) -> None:
    with pytest.warns(DeprecationWarning, match=f"layers.stochastic_depth has moved: from stochastic_depth.* {name}$"):
        assert getattr(old, name) is now


def test_what_the_warning_says_can_be_typed() -> None:
    for name in ("set_drop_path", "break_even_of", "count_macs", "unwrap"):
        with pytest.warns(DeprecationWarning) as caught:
            getattr(old, name)
        line = str(caught[0].message).partition(": ")[2]
        exec(line, {})


def test_an_unknown_name_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match=r"module 'layers.stochastic_depth' has no attribute 'set_drop_pth'"):
        old.set_drop_pth  # noqa: B018
    with pytest.raises(ImportError):
        exec("from layers.stochastic_depth import nothing", {})
    assert importlib.reload(old) is old
