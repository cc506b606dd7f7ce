"""How fast a training step could be on a device at most: its FLOPs at the peak, or its bytes at full bandwidth.

FLOPs are those of matrix products, convolutions and attention, by torch.utils.flop_counter. Bytes are estimated from the
operands and results of every operation as it runs, each read or written once; views cost nothing:

- `eager_bytes`: of all operations, which is what eager code moves;
- `product_bytes`: of matrix products, convolutions, attention and pooling alone, as if all that stands between them were
  fused into them. The limit takes these.

Both hold for the samples that a step really kept, and for the types that autocast really chose.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.measure import seconds_of

PEAKS: tuple[tuple[str, float, float], ...] = (
    (r"H200", 989.4, 4.8),
    (r"H100 NVL", 835.5, 3.9),
    (r"H100 PCIe", 756.5, 2.0),
    (r"H100", 989.4, 3.35),
    (r"A100.*PCI.*80GB|A100 80GB PCI", 312.0, 1.935),
    (r"A100.*80GB", 312.0, 2.039),
    (r"A100", 312.0, 1.555),
)
"""Of NVIDIA's data sheets: pattern of the device's name, dense bfloat16 TFLOP/s, TB/s of memory. The first that fits."""

_PRODUCTS = re.compile(
    r"^aten\.(_?convolution|mm|addmm|bmm|baddbmm|_?scaled_dot_product|_flash_att|_efficient_att|.*pool)"
)


@dataclass(frozen=True)
class Peak:
    """What a device can do.

    Attributes:
        tflops: 10^12 bfloat16 operations per second; a multiply-accumulate is two.
        tbytes: 10^12 bytes per second.
        source: `data sheet`, or `measured` by one large product and one large copy.
    """

    tflops: float
    tbytes: float
    source: str


@dataclass
class Work:
    """What one training step does, for all its samples: FLOPs and bytes, as the module says."""

    flops: float = 0.0
    product_bytes: float = 0.0
    eager_bytes: float = 0.0

    def limit_ms(self, peak: Peak) -> float:
        """Milliseconds that the step takes at least: the larger of what its FLOPs and its products' bytes take."""
        return 1e3 * max(self.flops / (peak.tflops * 1e12), self.product_bytes / (peak.tbytes * 1e12))


def sheet_peak(name: str) -> Peak | None:
    """Of a device by its name; `None` where it is not known, or is a part of one (MIG)."""
    if "MIG" in name.split():
        return None
    for pattern, tflops, tbytes in PEAKS:
        if re.search(pattern, name, flags=re.IGNORECASE):
            return Peak(tflops, tbytes, "data sheet")
    return None


def measured_peak(device: torch.device) -> Peak:
    """The best of some runs of one large bfloat16 product and of one large copy, which reads and writes."""
    side, copied = (8192, 2**30) if device.type == "cuda" else (512, 2**25)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = _fastest(lambda: a @ b, device)
    source, target = (torch.empty(copied, dtype=torch.uint8, device=device) for _ in range(2))
    copy = _fastest(lambda: target.copy_(source), device)
    return Peak(round(2e-12 * side**3 / product, 4), round(2e-12 * copied / copy, 5), "measured")


def _fastest(run: Callable[[], object], device: torch.device, runs: int = 6) -> float:
    return min(seconds_of(run, device) for _ in range(runs))


def peaks(device: torch.device) -> tuple[Peak, dict[str, Any]]:
    """The peak to compare with, by data sheet where there is one, and for a JSON both that and what was measured."""
    measured = measured_peak(device)
    sheet = sheet_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    peak = sheet or measured
    return peak, {"used": peak.source, "measured": asdict(measured), **({"data sheet": asdict(sheet)} if sheet else {})}


def count_work(step: Callable[[], object]) -> Work:
    """Runs a step once, in eager code, and counts its FLOPs and bytes."""
    aten = torch.ops.aten
    on_cpu = {  # which torch knows on CUDA only
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
        ),
    }
    bytes_moved = _CountBytes()
    with FlopCounterMode(display=False, custom_mapping=on_cpu) as flops, bytes_moved:
        step()
    return Work(float(flops.get_total_flops()), float(bytes_moved.products), float(bytes_moved.all))


class _CountBytes(TorchDispatchMode):
    """Bytes of operands and results of what runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.all = 0
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func)
        if not func.is_view and not name.startswith(
            ("aten.detach", "aten.empty", "aten._unsafe_view", "aten.new_empty")
        ):
            moved = sum(t.numel() * t.element_size() for t in _tensors((args, kwargs, out)))
            self.all += moved
            if _PRODUCTS.match(name):
                self.products += moved
        return out


def _tensors(values: Any) -> Iterator[Tensor]:
    return (value for value in tree_leaves(values) if isinstance(value, Tensor))
