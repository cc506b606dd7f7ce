"""What tests of kernels for GPUs share."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where they run: on a CPU Triton's interpreter takes them, operation by operation."""
