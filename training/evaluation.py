"""Metrics of a model over batches; needs no optimizer."""

import torch
from torch import nn

from training.data.dataset import ReadError
from training.distributed import stop_together
from training.setup import Setup


@torch.no_grad()
def evaluate(setup: Setup) -> dict[str, float]:
    """Validation loss and top-1 and top-5 in percent, over all ranks and all images that could be read.

    Raises:
        ReadError: On every rank, see `SkipList.read`; or where no image is left.
    """
    model = setup.evaluated
    training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    problem = None
    try:
        for images, targets, _ in setup.skips.read(setup.val_loader):
            images, targets = setup.to_device(images), targets.to(setup.world.device, non_blocking=True)
            with setup.autocast():
                logits = model(images)
            logits = logits.float()
            top = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]  # (B, 5)
            loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
            counts = [top[:, 0].sum(), top.any(dim=1).sum(), torch.tensor(len(targets), device=loss.device)]
            sums += torch.stack([loss, *counts]).cpu().double()  # MPS has no float64
    except ReadError as error:
        problem = error
    model.train(training)
    stop_together(setup.world, problem)
    loss, top1, top5, count = setup.world.sum(sums).tolist()
    if not count:
        raise ReadError("no image of the validation data could be read, so there is nothing to evaluate on")
    return {"val_loss": loss / count, "val_top1": 100 * top1 / count, "val_top5": 100 * top5 / count}
