"""What of a run is saved comes back, and fits nowhere else."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from timm.optim import list_optimizers

from files.errors import ConfigError
from tests.training.parts import CUDA, build_tiny, classifier, first_batches, step, weights
from training.checkpoint import load_checkpoint
from training.distributed import World
from training.run_folder import RunFolder
from training.setup import Setup
from training.state import RunState


def test_a_checkpoint_of_another_model_does_not_fit(tmp_path: Path) -> None:
    setup = build_tiny()
    saved = load_checkpoint(RunState(setup).save(RunFolder(tmp_path)))
    with pytest.raises(ConfigError, match=r"step-00000000: does not fit this run's config"):
        RunState(build_tiny("model.dims=[16,48]")).restore(saved)
    with pytest.raises(ConfigError, match="does not fit"):
        RunState(build_tiny("optim.layer_decay=0.5")).restore(saved)


def test_a_checkpoint_behind_the_end_of_an_epoch_is_refused(images: list[str], tmp_path: Path) -> None:
    """Of a run that noted no data."""
    setup = build_tiny(*images)
    state = RunState(setup)
    state.progress.batch, state.progress.step = 4, 4
    saved = load_checkpoint(state.save(RunFolder(tmp_path)))
    with pytest.raises(ConfigError, match="behind batch 4 of its epoch, which has only 3"):
        RunState(setup).restore(saved)


def test_nothing_is_dropped_in_silence(tmp_path: Path) -> None:
    """A checkpoint that lacks what the run has, or has what the run lacks, is refused by that name."""
    setup = build_tiny("ema.enabled=true")
    saved = load_checkpoint(RunState(setup).save(RunFolder(tmp_path)))
    RunState(setup).restore(saved)
    assert saved.shared.keys() | saved.rank_state.keys() == RunState(setup).table.keys() | set(RunState.FACTS)
    for name in RunState(setup).table:
        part = "rank_state" if name in RunState(setup).per_rank else "shared"
        states = {key: value for key, value in getattr(saved, part).items() if key != name}
        with pytest.raises(ConfigError, match=f"does not fit this run's config: it lacks the state '{name}'$"):
            RunState(setup).restore(replace(saved, **{part: states}))
    with pytest.raises(ConfigError, match="it holds the state 'ema', which would be dropped"):
        RunState(build_tiny()).restore(saved)
    for name, what, missing in (("progress", "progress", "best_top1"), ("random", "random state", "numpy")):
        state = dict(saved.rank_state[name])
        for changed, words in (
            ({k: v for k, v in state.items() if k != missing}, f"it lacks the {what} '{missing}'"),
            ({**state, "news": 1}, f"it holds the {what} 'news', which would be dropped"),
        ):
            with pytest.raises(ConfigError, match=words):
                RunState(setup).restore(replace(saved, rank_state={**saved.rank_state, name: changed}))


def test_random_states_take_effect_once_and_late(tmp_path: Path) -> None:
    setup = build_tiny()
    state = RunState(setup)
    torch.manual_seed(3)
    saved = load_checkpoint(state.save(RunFolder(tmp_path)))
    expected = torch.rand(3)
    state.restore(saved)
    torch.rand(5)  # what is built after the state was loaded may draw
    state.random.put_back()
    assert torch.equal(torch.rand(3), expected)
    state.random.put_back()
    assert not torch.equal(torch.rand(3), expected)


def usable_optimizers() -> list[str]:
    """All that this machine can use; those of APEX and bitsandbytes need a GPU, one second derivatives."""
    return [str(n) for n in list_optimizers() if not str(n).startswith(("bnb", "fused")) and n != "adahessian"]


@pytest.mark.slow
@pytest.mark.parametrize("name", usable_optimizers())
def test_every_optimizer_goes_on_as_if_nothing_had_been(name: str, tmp_path: Path) -> None:
    """Some keep a state beside that of torch's own: counters, a generator, averages of weights."""
    overrides = [f"optim.name={name}", "data.batch_size=16", "drop_path.rate=0"]
    whole, again = build_tiny(*overrides), build_tiny(*overrides)
    batches = first_batches(whole, 8)
    for number, batch in enumerate(batches[:5]):
        step(whole, [batch], number)
    saved = load_checkpoint(RunState(whole).save(RunFolder(tmp_path)))
    RunState(again).restore(saved)
    for resumed in (again, whole):
        torch.set_rng_state(saved.rank_state["random"]["torch"])
        for number, batch in enumerate(batches[5:], 5):
            step(resumed, [batch], number)
    assert weights(again) == weights(whole)


def scaled(device: str) -> Setup:
    """A run with a working gradient scaler; on a CPU, where float16 is refused, in float32."""
    if device == "cuda":
        world = World(rank=0, local_rank=0, size=1, device=torch.device("cuda", 0))
        setup = build_tiny("runtime.precision=float16", "data.batch_size=32", world=world)
        assert setup.precision == torch.float16
        return setup
    setup = build_tiny("data.batch_size=32")
    setup.scaler = torch.amp.GradScaler("cpu")
    return setup


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
def test_the_scaler_skips_an_overflow_and_is_restored(device: str, tmp_path: Path) -> None:
    setup = scaled(device)
    assert setup.scaler.is_enabled()
    batches = first_batches(setup, 4)
    step(setup, [batches[0]])  # makes the scale
    setup.scaler.update(1024.0)
    before = weights(setup)
    step(setup, [batches[1]], 1)
    assert weights(setup) != before and setup.scaler.get_scale() == 1024.0

    before = weights(setup)
    handle = classifier(setup).weight.register_hook(lambda gradient: gradient * math.inf)
    assert math.isfinite(step(setup, [batches[2]], 2)), "no error: float16 overflows now and then"
    handle.remove()
    assert weights(setup) == before and setup.scaler.get_scale() == 512.0
    step(setup, [batches[2]], 2)

    state = RunState(setup)
    state.progress.step = 3
    saved = load_checkpoint(state.save(RunFolder(tmp_path)))
    again = scaled(device)
    assert again.scaler.get_scale() != 512.0
    state = RunState(again)
    state.restore(saved)
    assert state.progress.step == 3
    assert again.scaler.state_dict() == setup.scaler.state_dict()
    assert weights(again) == weights(setup)
    for resumed in (setup, again):
        torch.manual_seed(0)
        step(resumed, [batches[3]], 3)
    assert again.scaler.state_dict() == setup.scaler.state_dict()
    for name, value in setup.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], value)
