"""How many samples a drop-path module drew for, kept and computed, in eager code, compiled code and on a GPU."""

import torch
from torch import Tensor


class SampleCounts:
    """Sums over the draws of one module.

    Eager code adds Python's numbers: tensors would cost it more than the draw itself. Compiled code adds to 0-dim tensors
    on the CPU, which it takes as inputs, so that no number is a constant of it. A mask's kept samples are summed where the
    mask is, so that nothing waits for a GPU. None of them is a buffer: state dicts, casts and EMA never see them.
    """

    def __init__(self) -> None:
        self.numbers = [0, 0, 0]  # seen, kept, computed
        with torch.inference_mode(False):  # all of them are changed in place, in any mode
            self.seen = torch.zeros((), dtype=torch.int64, device="cpu")
            self.kept = torch.zeros((), dtype=torch.int64, device="cpu")
            self.computed = torch.zeros((), dtype=torch.int64, device="cpu")
            self.kept_by_mask = torch.zeros((), dtype=torch.int64, device="cpu")

    def set(self, seen: int, dropped: int, computed: int) -> None:
        """Goes on from draws that were made elsewhere."""
        self.numbers[:] = seen, seen - dropped, computed
        for count in (self.seen, self.kept, self.computed, self.kept_by_mask):
            count.zero_()

    def add(self, seen: int, kept: int | Tensor, computed: int | Tensor) -> None:
        """Adds one draw.

        Args:
            seen: Samples drawn for.
            kept: A count, as a number or 0-dim on the CPU, or a mask (B,) on the activations' device.
            computed: Samples that the branch runs on, a number or 0-dim on the CPU.
        """
        if torch._C._functorch.maybe_current_level() is not None:  # type: ignore[attr-defined]
            return  # inside vmap or torch.func.grad a captured tensor must not be written to
        if isinstance(kept, Tensor) and kept.ndim:
            if self.kept_by_mask.device != kept.device:
                self.kept_by_mask = self.kept_by_mask.to(kept.device)
            self.kept_by_mask.add_(kept.sum())
            kept = 0
        if torch.compiler.is_compiling():
            self.seen.add_(seen)
            self.kept.add_(kept)
            self.computed.add_(computed)
        else:
            self.add_numbers(seen, int(kept), int(computed))

    def add_numbers(self, seen: int, kept: int, computed: int) -> None:
        """`add`, of numbers and in eager code."""
        numbers = self.numbers
        numbers[0] += seen
        numbers[1] += kept
        numbers[2] += computed

    def samples_seen(self) -> int:
        """Samples drawn for."""
        return self.numbers[0] + int(self.seen)

    def samples_dropped(self) -> int:
        """Samples dropped."""
        return self.samples_seen() - self.numbers[1] - int(self.kept) - int(self.kept_by_mask)

    def samples_computed(self) -> int:
        """Samples that the branch ran on."""
        return self.numbers[2] + int(self.computed)

    def follow(self, device: torch.device) -> None:
        """Compiled code finds the count where the mask is drawn."""
        if device.type != "meta" and device != self.kept_by_mask.device:
            self.kept_by_mask = self.kept_by_mask.to(device)
