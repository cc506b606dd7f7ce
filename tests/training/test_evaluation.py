"""The measures of a model over batches, against a computation in other words."""

from typing import Any

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, f1_score
from torch import nn
from torch.nn.functional import cross_entropy

from tests.training.parts import build_tiny, first_batches, image_path, plain_ece, step
from training.data.dataset import ReadError
from training.evaluation import evaluate, evaluate_each
from training.loop import validate
from training.metrics import Mean, among_top, summed_loss
from training.setup import Setup

MACRO: dict[str, Any] = {"average": "macro", "zero_division": 0}


def direct(setup: Setup, model: nn.Module) -> dict[str, float]:
    """The measures from all validation images at once, in other words than the loop's."""
    samples = [setup.data.val[i] for i in range(len(setup.data.val))]
    images, targets = torch.stack([s[0] for s in samples]), torch.tensor([s[1] for s in samples])
    with torch.no_grad():
        logits = model.eval()(images)
    place = (logits > logits.gather(1, targets[:, None])).sum(dim=1)  # classes before the right one
    return {"val_loss": cross_entropy(logits, targets).item(), "val_top1": 100 * (place < 1).double().mean().item(),
            "val_top5": 100 * (place < 5).double().mean().item(),
            "val_balanced": 100 * balanced_accuracy_score(targets, logits.argmax(1)),
            "val_macro_f1": 100 * f1_score(targets, logits.argmax(1), **MACRO),
            "val_ece": 100 * plain_ece(logits, targets)}  # fmt: skip


def test_evaluation_equals_a_direct_computation() -> None:
    setup = build_tiny("data.eval_batch_size=100", "data.batch_size=64")
    for batch in first_batches(setup, 6):
        step(setup, [batch], 5)
    assert [len(targets) for _, targets, _ in setup.val_loader] == [100, 100, 100, 60], "the last batch is short"
    setup.model.train()
    random = torch.get_rng_state()
    found = validate(setup)
    assert setup.model.training, "left as it was"
    assert torch.equal(torch.get_rng_state(), random), "nothing is drawn: validation does not move the run"
    assert found == pytest.approx(direct(setup, setup.model), rel=1e-5)
    assert 15 < found["val_top1"] < found["val_top5"] < 100
    assert not any(p.grad is not None and p.grad.isnan().any() for p in setup.model.parameters())


def test_several_models_in_one_pass_are_what_each_is_alone() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Flatten(), nn.Linear(4, 3)) for _ in range(2)]
    batches = [(torch.randn(5, 1, 2, 2), torch.randint(3, (5,))) for _ in range(3)]
    read: list[int] = []

    def metrics() -> list[Any]:
        return [Mean("loss", "", summed_loss), Mean("top1", "", among_top(1), percent=True)]

    once = (batch for i, batch in enumerate(batches) if read.append(i) is None)
    found = evaluate_each(models, once, [metrics(), metrics()])
    assert found == [evaluate(model, batches, metrics()) for model in models] and found[0] != found[1]
    assert read == [0, 1, 2]


def test_fewer_than_five_classes() -> None:
    setup = build_tiny()
    setup.model.reset_classifier(3)
    setup.val_loader = [(torch.zeros(4, 1, 8, 8), torch.tensor([0, 1, 2, 2]), torch.arange(4))]  # type: ignore[assignment]
    assert validate(setup)["val_top5"] == 100.0


def test_the_average_is_evaluated_where_there_is_one() -> None:
    setup = build_tiny("ema.enabled=true", "ema.decay=0.9", "data.batch_size=64")
    for number, batch in enumerate(first_batches(setup, 8)):
        step(setup, [batch], number)
    assert setup.ema is not None and setup.evaluated is setup.ema.module
    found = validate(setup)
    assert found == pytest.approx(direct(setup, setup.ema.module), rel=1e-5)
    assert found["val_loss"] != pytest.approx(direct(setup, setup.model)["val_loss"], rel=1e-3)


def test_validation_without_some_images_equals_that_of_the_others(images: list[str]) -> None:
    setup = build_tiny(*images, "data.on_error=skip", "data.eval_batch_size=2")
    others = build_tiny(*images)
    for name in ("cat/1", "dog/0", "dog/2"):  # one of each batch
        image_path(images, f"val/{name}.png").write_bytes(b"")
    found = validate(setup)
    others.val_loader = [tuple(torch.utils.data.default_collate([others.data.val[i] for i in (0, 2, 4)]))]  # type: ignore[assignment]
    assert found == pytest.approx(validate(others), rel=1e-6)


def test_a_model_some_batches_and_metrics_are_enough() -> None:
    """Any model and any iterable; what the metrics held before is forgotten."""
    model = nn.Linear(4, 6).train()
    batches = [(torch.randn(size, 4), torch.randint(6, (size,))) for size in (5, 2)]
    images, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    metrics = [Mean("loss", "loss", summed_loss), Mean("top3", "top-3", among_top(3), percent=True)]
    for _ in range(2):
        found = evaluate(model, iter(batches), metrics)
        logits = model(images)
        assert list(found) == ["loss", "top3"]
        assert found["loss"] == pytest.approx(cross_entropy(logits, targets).item(), rel=1e-6)
        assert found["top3"] == pytest.approx(
            100 * sum(int(t in row.topk(3).indices) for row, t in zip(logits, targets, strict=True)) / 7
        )
    assert model.training


def test_nothing_to_evaluate_on_is_an_error() -> None:
    with pytest.raises(ReadError, match="no image of the validation data could be read"):
        evaluate(nn.Linear(4, 6), [], [Mean("loss", "loss", summed_loss)])
