"""What a config builds: sizes, classes, rates, threads, precision, data; and the plan of a run."""

import math
from pathlib import Path

import pytest
import torch

from files.errors import ConfigError
from stochastic_depth.compute import count_macs
from tests.training.parts import TINY, WORLD, build_tiny, first_batches, step, weights
from training.config import dump_config, load_config
from training.loop import validate
from training.run_folder import describe_environment
from training.setup import build, describe


def test_points_within_one_step_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"drop_path: .*rising steps"):
        build_tiny("drop_path.schedule={kind: piecewise, points: [[0, 0.0], [0.01, 1.0]]}")


PUBLISHED = ["model.name=poolformer_s12", "model.depths=[1,1,1,2]", "model.dims=[8,8,16,16]", "model.image_size=32",
             "drop_path.rate=null"]  # fmt: skip

RESOLVABLE = {
    "plain": [],
    "list of rates": ["drop_path.rate=null", "drop_path.profile=[0.1, 0.3]"],
    "compute": ["drop_path.rate=0.1", "drop_path.rate_is=expected_macs"],
    "break-even": ["drop_path.break_even=0.3", "drop_path.schedule={kind: early, cutoff_epochs: 1}"],
    "published": PUBLISHED,
    "published as a mean": [*PUBLISHED, "drop_path.rate_is=mean"],
    "data's size": ["model.image_size=null", "data.image_size=16"],
    "both sizes": ["model.image_size=[8, 8]", "data.image_size=8"],
    "more classes": ["model.num_classes=12", "ema.enabled=true", "optim.layer_decay=0.5"],
}


@pytest.mark.parametrize("name", RESOLVABLE)
def test_the_resolved_config_builds_the_same_run(name: str, tmp_path: Path) -> None:
    setup = build_tiny(*RESOLVABLE[name])
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(setup.config))
    config = load_config(file)
    assert config == setup.config
    again = build(config, WORLD)
    assert again.config == setup.config, "nothing is left to fill in"
    assert again.depth.rates == setup.depth.rates and again.depth.schedule == setup.depth.schedule
    assert weights(again) == weights(setup)
    assert again.model.config.model_dump() == setup.model.config.model_dump()
    settings = [
        [(m.drop_prob, m.mode, m.break_even) for block in s.depth.blocks for m in block.drop_paths.values()]
        for s in (setup, again)
    ]
    assert settings[0] == settings[1]
    groups = [[{k: v for k, v in g.items() if k != "params"} for g in s.optimizer.param_groups] for s in (setup, again)]
    assert groups[0] == groups[1]


def test_no_rate_means_the_published_one() -> None:
    setup = build_tiny(*PUBLISHED)
    published = setup.model.config.published
    assert published is not None and published.drop_path_rate == 0.1
    assert setup.depth.rates == pytest.approx([0.0, 0.025, 0.05, 0.075, 0.1])
    assert setup.config.drop_path.rate == 0.1
    ours = build_tiny("drop_path.rate=null")  # a model that was never published
    assert ours.depth.rates == [0.0, 0.0] and ours.config.drop_path.rate == 0.0


def test_expected_macs_is_reached() -> None:
    setup = build_tiny("drop_path.rate=0.15", "drop_path.rate_is=expected_macs", "drop_path.profile=constant")
    macs = count_macs(setup.model)
    blocks = setup.depth.blocks
    dropped = sum(r * macs.block(b) for r, b in zip(setup.depth.rates, blocks, strict=True)) / macs.total
    assert dropped == pytest.approx(0.15)
    assert setup.depth.rates[0] > 0.16, "stem and head cannot be dropped, so the blocks are dropped more often"
    with pytest.raises(ConfigError, match=r"drop_path: .*cannot reach expected_macs 0\.99"):
        build_tiny("drop_path.rate=0.99", "drop_path.rate_is=expected_macs")


@pytest.mark.parametrize(
    ("overrides", "size"),
    [
        (["model.image_size=12"], 12),
        (["model.image_size=8", "data.image_size=8"], 8),
        (["model.image_size=null", "data.image_size=10"], 10),
    ],
)
def test_image_size_comes_from_the_data_or_the_model(overrides: list[str], size: int) -> None:
    setup = build_tiny(*overrides)
    assert setup.model.config.image_size == size == setup.config.data.image_size
    assert first_batches(setup)[0][0].shape == (256, 1, size, size)
    assert next(iter(setup.val_loader))[0].shape[1:] == (1, size, size)


def test_a_run_computes_with_its_threads() -> None:
    for threads in (2, 1):
        setup = build_tiny(f"runtime.threads={threads}")
        assert torch.get_num_threads() == threads == describe_environment(WORLD)["threads"]
        assert f"cpu x 1, float32, {threads} CPU thread" in describe(setup)
    torch.set_num_threads(3)
    build_tiny("runtime.threads=auto")
    assert torch.get_num_threads() == 1, "OMP_NUM_THREADS, whatever a run before it had"


def test_classes_come_from_the_data_or_the_model() -> None:
    assert build_tiny().config.model.num_classes == 10
    setup = build_tiny("model.num_classes=12")
    assert setup.model(torch.zeros(1, 1, 8, 8)).shape == (1, 12)
    with pytest.raises(ConfigError, match=r"model.num_classes: 9 is fewer than the data's 10 classes"):
        build_tiny("model.num_classes=9")


def test_a_tag_of_published_weights_sets_the_image_size_and_the_rate() -> None:
    small = "{name: caformer_s18.sail_in1k_384, depths: [1, 1, 1, 1], dims: [8, 8, 16, 16], head_dim: 8}"
    setup = build_tiny(f"model={small}", "data.batch_size=4", "drop_path.rate=null")
    assert setup.config.data.image_size == 384
    assert setup.config.drop_path.rate == 0.3, "of that fine-tuning, not the 0.15 of the training at 224"


@pytest.mark.parametrize(
    ("key", "instead"), [("drop_path_rate", "drop_path.rate"), ("drop_path_mode", "drop_path.mode")]
)
def test_a_drop_path_key_in_the_wrong_place_is_refused(key: str, instead: str) -> None:
    """create_model takes these, so they would pass and have no effect."""
    with pytest.raises(ConfigError, match=rf"model\.{key}: .*did you mean '{instead}'"):
        build_tiny(f"model.{key}=0.3")


def test_seeds_decide_the_weights() -> None:
    assert weights(build_tiny()) == weights(build_tiny()) != weights(build_tiny("seed=1"))


def test_precision() -> None:
    assert build_tiny().precision == torch.float32
    with pytest.raises(ConfigError, match=r"runtime.precision: float16 needs a GPU"):
        build_tiny("runtime.precision=float16")
    setup = build_tiny("runtime.precision=bfloat16")
    seen: list[torch.dtype] = []
    setup.model.register_forward_hook(lambda _module, _inputs, logits: seen.append(logits.dtype))
    assert math.isfinite(step(setup, first_batches(setup)))
    validate(setup)
    assert set(seen) == {torch.bfloat16}, "in training and in evaluation"
    assert {p.dtype for p in setup.model.parameters()} == {torch.float32}


def test_other_data_than_the_runs_is_refused_before_all_else(images: list[str]) -> None:
    config = load_config(None, [*TINY, *images])
    identity = build(config, WORLD).data.identity
    build(config, WORLD, same_data=identity)
    other = identity | {"class_names": ["cat", "fox"]}
    with pytest.raises(ConfigError, match=r"--resume: .*classes gone: 'fox', new: 'dog'"):
        build(load_config(None, [*TINY, *images, "model.num_classes=1"]), WORLD, same_data=other)


def test_class_names_that_the_data_has_not(images: list[str]) -> None:
    assert build_tiny(*images, "data.class_names=[cat, dog]").config.data.class_names == ["cat", "dog"]
    for names, words in (("[dog, cat]", "in another order: class 0 was 'dog', is 'cat'"), ("[cat]", "new: 'dog'")):
        with pytest.raises(ConfigError, match=rf"data\.class_names: .*{words}\nleave the key out"):
            build_tiny(*images, f"data.class_names={names}")
    with pytest.raises(ConfigError, match=r"model\.class_names: .*did you mean 'data.class_names'"):
        build_tiny("model.class_names=[a]")


def test_the_plan_says_what_will_happen() -> None:
    setup = build_tiny("optim.accumulate=2", "drop_path.schedule={kind: early, cutoff_epochs: 1}")
    plan = describe(setup)
    count = sum(p.numel() for p in setup.model.parameters())
    for words in (f"caformer_n4: {count / 1e6:.2f} M parameters", "1 x 8 x 8", "1437 training and 360 validation images",
                  "10 classes", "2 epochs of 3 steps, batch 512, adamw, lr 0.003, cosine", "cpu x 1, float32",
                  "drop path up to 0.4, linear, mode skip, schedule early (25% of the rate on average over the run), at the "
                  "whole rate: expected depth 1.60 of 2 blocks"):  # fmt: skip
        assert words in plan, plan
    assert "warning" not in plan
    assert "mode skip, schedule constant: expected depth" in describe(build_tiny())
    for falling in (["drop_path.rate=null", "drop_path.profile=[0.3, 0.1]"], ["drop_path.profile=reversed"]):
        assert "warning" not in describe(build_tiny(*falling)), "it was asked for"


def test_more_accumulated_than_an_epoch_has_is_said() -> None:
    setup = build_tiny("optim.accumulate=8", "optim.epochs=3")
    assert setup.steps_per_epoch == 1, "of all batches there are"
    plan = describe(setup)
    assert "3 epochs of 1 step, batch 1280, adamw" in plan
    assert (
        "warning: optim.accumulate: 8 is more than the 5 batches of an epoch, so that its only step takes all 5" in plan
    )
    assert "1,280 images and not 2,048; give optim.accumulate=5 at most" in plan
    assert "takes that one" in describe(build_tiny("optim.accumulate=2", "data.batch_size=1437"))
    assert "warning" not in describe(build_tiny("optim.accumulate=5"))
    first, last = (setup.scheduler._get_lr(step)[0] for step in (1, setup.total_steps))
    assert last < first, "the schedule goes by the steps there are"


def test_a_plan_of_one_step_counts_in_the_singular() -> None:
    plan = describe(build_tiny("optim.epochs=1", "optim.warmup_epochs=0", "data.batch_size=1437", "model.depths=[1]",
                               "model.dims=[16]", "model.token_mixer=pooling", "runtime.threads=1"))  # fmt: skip
    for words in ("training  1 epoch of 1 step, batch 1437", "of 1 block,", "1 CPU thread"):
        assert words in plan, plan


def test_raw_batches_reach_the_model_normalised_and_erased(images: list[str]) -> None:
    setup = build_tiny(*images, "augment.random_erasing=0.6", "model.image_size=8")
    (batch,) = first_batches(setup)
    assert batch[0].dtype == torch.uint8
    seen: list[torch.Tensor] = []
    setup.model.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].clone()))
    step(setup, [batch])
    plain = setup.to_device(batch[0])
    assert plain.dtype == torch.float32 and plain.is_contiguous() and abs(plain.mean().item()) < 5
    expected = setup.data.erase(plain.clone(), batch[2], epoch=0)
    assert torch.equal(seen[0], expected) and not torch.equal(expected, plain)
    step(setup, [(plain, *batch[1:])])
    assert torch.equal(seen[1], seen[0]), "what is ready is not normalised again"
    validation = next(setup.val_batches())[0]
    assert torch.equal(validation, setup.data.normalise(next(iter(setup.val_loader))[0])), "nothing is erased there"
