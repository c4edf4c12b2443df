"""The shared fixtures can fail: what they let through and what they refuse."""

from __future__ import annotations

import pytest
import torch


def test_tolerance_accepts_what_plain_torch_reaches(assert_accurate, generator):
    exact = torch.randn(64, 33, dtype=torch.float64, generator=generator)
    plain = exact.half() * torch.tensor(1.001, dtype=torch.float16)
    assert_accurate(plain, plain, exact)
    assert_accurate(exact.half(), plain, exact)


def test_tolerance_refuses_a_wrong_element(assert_accurate, generator):
    exact = torch.randn(64, 33, dtype=torch.float64, generator=generator)
    plain = exact.float()
    wrong = plain.clone()
    wrong[3, 4] += 1e-3
    with pytest.raises(AssertionError, match="largest error"):
        assert_accurate(wrong, plain, exact)


def test_tolerance_refuses_a_small_error_everywhere(assert_accurate, generator):
    exact = torch.randn(64, 33, dtype=torch.float64, generator=generator)
    plain = exact.float()
    plain[0, 0] += 1.0
    with pytest.raises(AssertionError, match="root mean square"):
        assert_accurate(exact.float() + 0.5, plain, exact)


def test_tolerance_refuses_nan_and_misplaced_infinity(assert_accurate):
    exact = torch.tensor([1.0, float("-inf"), 2.0], dtype=torch.float64)
    plain = exact.float()
    assert_accurate(plain, plain, exact)
    with pytest.raises(AssertionError):
        assert_accurate(torch.tensor([float("nan"), float("-inf"), 2.0]), plain, exact)
    with pytest.raises(AssertionError, match="infinite"):
        assert_accurate(torch.tensor([1.0, 0.0, 2.0]), plain, exact)


def test_tolerance_wants_a_fp64_reference(assert_accurate):
    values = torch.ones(3)
    with pytest.raises(AssertionError, match="fp64"):
        assert_accurate(values, values, values)


def test_generator_starts_alike_in_every_test(generator):
    again = torch.Generator().manual_seed(generator.initial_seed())
    assert torch.equal(torch.rand(5, generator=generator), torch.rand(5, generator=again))


def test_interpreter_runs_fp32_and_refuses_bf16(triton_interpreter):
    import triton
    import triton.language as tl

    @triton.jit
    def double(x, y, count, BLOCK: tl.constexpr):
        offsets = tl.arange(0, BLOCK)
        mask = offsets < count
        tl.store(y + offsets, tl.load(x + offsets, mask=mask) * 2, mask=mask)

    source = torch.arange(5, dtype=torch.float32)
    target = torch.zeros(5)
    double[(1,)](source, target, 5, BLOCK=8)
    assert torch.equal(target, source * 2)
    with pytest.raises(TypeError, match="bf16"):
        double[(1,)](source.bfloat16(), target.bfloat16(), 5, BLOCK=8)


@pytest.mark.gpu
def test_device_is_cuda_in_gpu_tests(device):
    assert device.type == "cuda"


def test_device_is_the_cpu_elsewhere(device):
    assert device.type == "cpu"


def test_poisoned_fills_what_torch_leaves_uninitialised():
    like = torch.zeros(3)
    made = [
        torch.empty(2, 3),
        torch.empty(4, dtype=torch.bfloat16),
        torch.empty_like(like),
        torch.empty_strided((3,), (1,)),
        like.new_empty(3),
    ]
    assert all(x.isnan().all() for x in made)
    assert (torch.empty(3, dtype=torch.int32) == -(2**31)).all()
    assert torch.empty(0).shape == (0,)
    assert torch.nn.Parameter(torch.empty(3)).requires_grad


def test_poisoned_leaves_the_device_of_a_context_alone():
    with torch.device("meta"):
        assert torch.empty(2, 3).device.type == "meta"
        assert torch.nn.Linear(4, 5).weight.device.type == "meta"
    assert torch.empty(2, 3).isnan().all()
