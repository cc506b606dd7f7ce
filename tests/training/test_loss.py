"""The losses against their formulas and the libraries' own; weights of classes, in one batch and in parts of it."""

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from sklearn.utils.class_weight import compute_class_weight
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from files.errors import ConfigError
from tests.training.parts import build_tiny, first_batches, step
from training.data.augment import AugmentSection
from training.loss import LossSection, build_loss, class_weights
from training.setup import describe

K = 5
RANDOM = torch.Generator().manual_seed(0)
LOGITS = 3 * torch.randn(12, K, generator=RANDOM)
TARGETS = torch.randint(K, (12,), generator=RANDOM)
SHARES = torch.rand(12, K, generator=RANDOM).softmax(dim=1)
WEIGHTS = torch.tensor([0.5, 0.0, 3.0, 1.0, 2.0])
LOSSES: list[dict[str, Any]] = [{"name": "cross_entropy"}, {"name": "bce"}, {"name": "bce", "bce_sum_classes": True},
                                {"name": "focal"}]  # fmt: skip


def loss(targets: Tensor, *, smoothing: float = 0.0, weights: Tensor | None = None, **section: Any) -> Tensor:
    augment, mixed = AugmentSection(label_smoothing=smoothing), targets.ndim == 2
    built = build_loss(LossSection(**section), augment, mixed=mixed, num_classes=K, weights=weights)
    return built(LOGITS[: len(targets)], targets)


def one_hot(smoothing: float = 0.0) -> Tensor:
    return nn.functional.one_hot(TARGETS, K) * (1 - smoothing) + smoothing / K


def test_the_default_is_torch_s_cross_entropy() -> None:
    assert isinstance(build_loss(LossSection(), AugmentSection(), mixed=False, num_classes=K), nn.CrossEntropyLoss)
    assert torch.equal(loss(TARGETS, smoothing=0.1), nn.CrossEntropyLoss(label_smoothing=0.1)(LOGITS, TARGETS))
    torch.testing.assert_close(loss(SHARES), SoftTargetCrossEntropy()(LOGITS, SHARES))


@pytest.mark.parametrize("section", LOSSES, ids=str)
def test_label_smoothing_is_applied_once(section: dict[str, Any]) -> None:
    """By the loss to classes, or by the mixer to the shares it makes."""
    smooth = loss(TARGETS, smoothing=0.2, **section)
    torch.testing.assert_close(smooth, loss(one_hot(0.2).float(), smoothing=0.2, **section))
    torch.testing.assert_close(smooth, loss(one_hot(0.2).float(), **section))
    assert (smooth - loss(TARGETS, **section)).abs() > 1e-3


@pytest.mark.parametrize("options", [{}, {"target_threshold": 0.21}, {"sum_classes": True}, {"pos_weight": 3.0},
                                     {"target_threshold": 0.0, "sum_classes": True}], ids=str)  # fmt: skip
def test_bce_is_timm_s(options: dict[str, Any]) -> None:
    section = {f"bce_{key}": value for key, value in options.items()}
    theirs = BinaryCrossEntropy(smoothing=0.1, **options)
    for targets in (TARGETS, SHARES):
        found = loss(targets, smoothing=0.1, name="bce", **section)
        torch.testing.assert_close(found, theirs(LOGITS, targets))
    if options:
        assert not torch.allclose(found, loss(SHARES, name="bce"))


@pytest.mark.parametrize(("gamma", "alpha"), [(2.0, 0.25), (0.0, -1.0), (1.5, -1.0), (0.0, 0.9)])
def test_focal_is_the_paper_s_formula(gamma: float, alpha: float) -> None:
    """-alpha_t (1 - p_t)^gamma log(p_t), of each class against all others, equation 5 of Lin et al. 2017."""
    right = one_hot().bool()
    p_t = torch.where(right, LOGITS.sigmoid(), 1 - LOGITS.sigmoid())
    alpha_t = torch.ones(()) if alpha < 0 else torch.where(right, alpha, 1 - alpha)
    expected = -(alpha_t * (1 - p_t) ** gamma * p_t.log()).sum(dim=1).mean()
    torch.testing.assert_close(loss(TARGETS, name="focal", gamma=gamma, alpha=alpha), expected, rtol=1e-4, atol=1e-4)


def test_focal_without_its_own_is_bce() -> None:
    for targets in (TARGETS, SHARES):
        plain = loss(targets, smoothing=0.1, name="bce", bce_sum_classes=True)
        torch.testing.assert_close(loss(targets, smoothing=0.1, name="focal", gamma=0.0, alpha=-1.0), plain)


# ---- weights of classes ---------------------------------------------------------------------------------------------


def test_automatic_weights_are_scikit_learn_s_balanced_ones() -> None:
    counts = [40, 10, 5, 1]
    weights = class_weights(LossSection(class_weights="auto"), counts, 4)
    assert weights is not None
    targets = np.repeat(np.arange(4), counts)
    wanted = compute_class_weight("balanced", classes=np.arange(4), y=targets)
    assert weights.numpy() == pytest.approx(wanted)
    assert weights[targets].mean().item() == pytest.approx(1.0), "over samples"
    # a class without samples, and outputs of the model that the data has no class for
    weights = class_weights(LossSection(class_weights="auto"), [30, 0, 10], 5)
    assert weights is not None and weights.tolist() == pytest.approx([2 / 3, 0, 2, 0, 0])


def test_weights_given_and_none() -> None:
    assert class_weights(LossSection(), [1, 2], 2) is None
    given = class_weights(LossSection(class_weights=[1, 0.25]), [1, 2], 2)
    assert given is not None and given.tolist() == [1, 0.25] and given.dtype == torch.float32
    for weights in ([1.0], [1.0, 2.0, 3.0]):
        with pytest.raises(ConfigError, match=rf"loss.class_weights: {len(weights)} numbers? for 2 classes"):
            class_weights(LossSection(class_weights=weights), [1, 2], 2)


@pytest.mark.parametrize("section", LOSSES, ids=str)
def test_each_sample_counts_as_its_class_does(section: dict[str, Any]) -> None:
    """The mean of weight times loss over the samples: the sum of the weights is not divided by."""
    each = torch.stack([alone(i, section) for i in range(12)])
    torch.testing.assert_close(loss(TARGETS, weights=WEIGHTS, **section), (each * WEIGHTS[TARGETS]).mean())
    torch.testing.assert_close(loss(one_hot().float(), weights=WEIGHTS, **section), (each * WEIGHTS[TARGETS]).mean())
    torch.testing.assert_close(loss(TARGETS, weights=torch.ones(K), **section), loss(TARGETS, **section))


def alone(i: int, section: dict[str, Any]) -> Tensor:
    built = build_loss(LossSection(**section), AugmentSection(), mixed=False, num_classes=K)
    return built(LOGITS[i : i + 1], TARGETS[i : i + 1])


def test_weights_of_shares() -> None:
    """Cross entropy weighs the term of each class, as torch does; bce and focal weigh a sample by its shares."""
    theirs = nn.functional.cross_entropy(LOGITS, SHARES, WEIGHTS)
    torch.testing.assert_close(loss(SHARES, weights=WEIGHTS), theirs)
    each = BinaryCrossEntropy(reduction="none")(LOGITS, SHARES).mean(dim=1)
    torch.testing.assert_close(loss(SHARES, weights=WEIGHTS, name="bce"), (each * (SHARES @ WEIGHTS)).mean())


@pytest.mark.parametrize("section", LOSSES, ids=str)
@pytest.mark.parametrize("targets", [TARGETS, SHARES], ids=["classes", "shares"])
def test_a_batch_in_parts_has_the_same_loss(section: dict[str, Any], targets: Tensor) -> None:
    """Accumulated, or dealt out to processes: the mean over equal parts is the whole."""
    built = build_loss(
        LossSection(**section), AugmentSection(), mixed=targets.ndim == 2, num_classes=K, weights=WEIGHTS
    )
    parts = [built(*part) for part in zip(LOGITS.split(4), targets.split(4), strict=True)]
    torch.testing.assert_close(torch.stack(parts).mean(), built(LOGITS, targets))


def test_torch_s_own_mean_has_not() -> None:
    theirs = nn.CrossEntropyLoss(WEIGHTS)
    parts = [theirs(*part) for part in zip(LOGITS.split(4), TARGETS.split(4), strict=True)]
    assert (torch.stack(parts).mean() - theirs(LOGITS, TARGETS)).abs() > 0.01


# ---- the section ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"gamma": 2.0}, "has no effect with name 'cross_entropy', only with 'focal'"),
        ({"name": "bce", "alpha": 0.5}, "has no effect with name 'bce', only with 'focal'"),
        ({"name": "focal", "bce_sum_classes": False}, "has no effect with name 'focal', only with 'bce'"),
        ({"bce_target_threshold": 0.2}, "has no effect with name 'cross_entropy', only with 'bce'"),
        ({"name": "focal", "alpha": -0.5}, "must be in [0, 1], or -1 for none, got -0.5"),
        ({"name": "focal", "alpha": 1.5}, "must be in [0, 1], or -1 for none, got 1.5"),
        ({"name": "focal", "gamma": 0.5}, "must be 0 or at least 1, got 0.5"),
        ({"class_weights": [1.0, -2.0]}, "each must be at least 0, got -2"),
        ({"class_weights": [0.0, 0.0]}, "one of them must be greater than 0"),
        ({"class_weights": []}, "one of them must be greater than 0"),
        ({"class_weights": [1.0, float("inf")]}, "finite"),
        ({"class_weights": "balanced"}, "auto"),
        ({"name": "hinge"}, "cross_entropy"),
    ],
)
def test_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        LossSection(**section)
    assert message in str(caught.value)


def test_defaults_of_a_loss_are_filled_in() -> None:
    assert LossSection().model_dump(exclude_none=True) == {"name": "cross_entropy"}
    assert LossSection(name="bce").model_dump(exclude_none=True) == {"name": "bce", "bce_sum_classes": False}
    focal = LossSection(name="focal", alpha=0).model_dump(exclude_none=True)
    assert focal == {"name": "focal", "gamma": 2.0, "alpha": 0.0}
    assert LossSection(**focal).model_dump() == LossSection(name="focal", alpha=0).model_dump(), "read back as it is"


@pytest.mark.parametrize("gamma", [0.0, 1.0, 1.5])
def test_focal_has_a_gradient_where_a_class_is_sure(gamma: float) -> None:
    logits = torch.tensor([[40.0, -40.0], [-40.0, 40.0]], requires_grad=True)
    section = LossSection(name="focal", gamma=gamma)
    build_loss(section, AugmentSection(), mixed=False, num_classes=2)(logits, torch.tensor([0, 0])).backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all() and logits.grad[1].abs().min() > 0


def test_the_plan_tells_of_another_loss_only() -> None:
    assert LossSection().in_words == ""
    assert LossSection(class_weights=[1.0, 0.5]).in_words == "cross_entropy, class weights from 0.5 to 1"
    assert LossSection(name="focal").in_words == "focal, gamma 2.0, alpha 0.25"
    setup = build_tiny("loss={name: bce, class_weights: auto}")
    assert "\nloss      bce, class weights auto, bce sum classes False\n" in describe(setup)
    assert "\nloss " not in describe(build_tiny())


def test_a_run_has_the_loss_of_its_config() -> None:
    with pytest.raises(ConfigError, match=r"loss.class_weights: 2 numbers for 10 classes"):
        build_tiny("loss.class_weights=[1, 2]")
    found = {}
    for override in ("loss.name=cross_entropy", "loss.name=bce", "loss.name=focal", "loss.class_weights=auto",
                     "loss.class_weights=[1, 1, 1, 1, 1, 1, 1, 1, 1, 9]"):  # fmt: skip
        setup = build_tiny(override, "augment.mixup=0.2")
        found[override] = step(setup, first_batches(setup))
    assert len(set(found.values())) == 5 and all(value > 0 for value in found.values())
    assert found["loss.class_weights=auto"] == pytest.approx(found["loss.name=cross_entropy"], rel=0.05)
