from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import svg_kernels
from svg_kernels import UnsupportedError

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BACKENDS = [
    pytest.param("reference", id="reference"),
    pytest.param("triton", marks=pytest.mark.gpu, id="triton"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("shape", [(5,), (2, 3, 130), (1, 2, 5000), (0, 4), (2, 3, 4, 8)])
def test_gelu_is_as_exact_as_torch(
    backend, dtype, approximate, shape, device, generator, assert_accurate
):
    x = (4 * torch.randn(shape, device=device, generator=generator)).to(dtype)
    found = svg_kernels.gelu(x, approximate=approximate, backend=backend)
    assert found.dtype == dtype
    assert found.is_contiguous()
    plain = F.gelu(x, approximate=approximate)
    assert_accurate(found, plain, F.gelu(x.double(), approximate=approximate))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gelu_writes_beside_what_is_there(backend, device, generator):
    x = torch.randn(2, 5, 48, device=device, generator=generator)
    both = torch.full((2, 5, 64), 7.0, device=device)
    found = svg_kernels.gelu(x, out=both[..., 16:], backend=backend)
    assert found.data_ptr() == both[..., 16:].data_ptr()
    torch.testing.assert_close(found, F.gelu(x))
    assert (both[..., :16] == 7.0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gelu_of_extremes(backend, device):
    x = torch.tensor([-torch.inf, -1e30, -100.0, 0.0, 100.0, 1e30, torch.inf, torch.nan])
    for approximate in ("none", "tanh"):
        found = svg_kernels.gelu(x.to(device), approximate=approximate, backend=backend).cpu()
        torch.testing.assert_close(found[1:6], torch.tensor([-0.0, -0.0, 0.0, 100.0, 1e30]))
        assert found[7].isnan()


def test_gelu_refuses_what_it_cannot():
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match="approximate must be one of"):
        svg_kernels.gelu(x, approximate="sigmoid")
    with pytest.raises(ValueError, match=r"out must be \[2, 4\]"):
        svg_kernels.gelu(x, out=torch.empty(2, 5))
    with pytest.raises(ValueError, match="last axis contiguous"):
        svg_kernels.gelu(x, out=torch.empty(4, 2).t())
    with pytest.raises(UnsupportedError, match="there is no compiled kernel"):
        svg_kernels.gelu(x, backend="cuda")


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_kernel_interpreted(approximate):
    x = torch.randn(2, 3, 70, generator=torch.Generator().manual_seed(1))
    both = torch.zeros(2, 3, 80)
    svg_kernels.gelu(x, approximate=approximate, out=both[..., 10:], backend="triton")
    torch.testing.assert_close(both[..., 10:], F.gelu(x, approximate=approximate))
    assert (both[..., :10] == 0).all()
