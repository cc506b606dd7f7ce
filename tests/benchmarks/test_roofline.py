"""The limit of a device: peaks by name, and FLOPs and bytes of a step that can be counted by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.roofline import Peak, Work, count_work, peaks, sheet_peak


@pytest.mark.parametrize(
    ("name", "tflops", "tbytes"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4, 3.35),
        ("NVIDIA H100 PCIe", 756.5, 2.0),
        ("NVIDIA H100 NVL", 835.5, 3.9),
        ("NVIDIA H200", 989.4, 4.8),
        ("NVIDIA A100-SXM4-80GB", 312.0, 2.039),
        ("NVIDIA A100 80GB PCIe", 312.0, 1.935),
        ("NVIDIA A100-PCIE-40GB", 312.0, 1.555),
    ],
)
def test_peaks_of_known_devices(name: str, tflops: float, tbytes: float) -> None:
    assert sheet_peak(name) == Peak(tflops, tbytes, "data sheet")


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3 MIG 3g.40gb", "NVIDIA GeForce RTX 4090"])
def test_other_devices_are_measured(name: str) -> None:
    assert sheet_peak(name) is None


def test_a_peak_is_measured_where_there_is_no_data_sheet() -> None:
    peak, told = peaks(torch.device("cpu"))
    assert peak.source == told["used"] == "measured" and peak.tflops > 0 and peak.tbytes > 0


def test_the_limit_is_the_larger_of_both() -> None:
    peak = Peak(tflops=1.0, tbytes=0.5, source="measured")
    assert Work(flops=3e9, product_bytes=1e9).limit_ms(peak) == pytest.approx(3.0)
    assert Work(flops=1e9, product_bytes=1e9).limit_ms(peak) == pytest.approx(2.0)


def test_work_of_a_linear_layer_and_an_activation() -> None:
    layer = nn.Linear(8, 16, bias=False)
    x = torch.randn(4, 8)
    work = count_work(lambda: layer(x).relu())
    assert work.flops == 2 * 4 * 8 * 16
    product, relu = 4 * (4 * 8 + 8 * 16 + 4 * 16), 4 * (2 * 4 * 16)  # bytes of float32
    assert work.product_bytes == product and work.eager_bytes == product + relu
    work = count_work(lambda: layer(x).sum().backward())
    assert work.flops == 2 * 2 * 4 * 8 * 16, "no gradient of the input"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_work_of_attention_and_pooling(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 3, 5, 8, dtype=dtype, requires_grad=True) for _ in range(3))

    def attend() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    forward = 2 * (2 * 3 * 5 * 5 * 8) * 2  # two products
    with torch.no_grad():
        assert count_work(attend).flops == forward
    assert count_work(lambda: attend().sum().backward()).flops >= 3 * forward, "products of the forward pass, and twice"
    image = torch.randn(2, 3, 4, 4)
    work = count_work(lambda: F.avg_pool2d(image, 3, stride=1, padding=1))
    assert work.flops == 0 and work.product_bytes == 2 * 4 * 2 * 3 * 4 * 4
