"""Where kernels are tested: interpreted on the CPU, or compiled on a GPU, but never both in one process."""

import pytest
import torch

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")
on_devices = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]
)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EXACT = {"atol": 1e-5, "rtol": 1e-4}
"""For what is computed in float32, whatever comes in."""
OUTPUT = {
    torch.float32: EXACT,
    torch.float16: {"atol": 4e-3, "rtol": 4e-3},
    torch.bfloat16: {"atol": 3e-2, "rtol": 3e-2},
}
"""For outputs: the probabilities that values are multiplied with have the dtype of the values."""
