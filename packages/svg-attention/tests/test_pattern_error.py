from __future__ import annotations

import pytest
import torch

from svg_attention.planning.pattern_error import pattern_error


def example(generator, device, *, rows=9, keys=203, key_heads=1, dtype=torch.float32, width=12):
    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    valid = torch.rand(2, rows, keys, generator=generator, device=device) < 0.9
    patterns = [
        valid & (torch.rand(valid.shape, generator=generator, device=device) < share)
        for share in (0.5, 0.2)
    ]
    # Keys are held as a model keeps them, heads after tokens.
    key, value = (normal(2, keys, key_heads, w).transpose(1, 2) for w in (width, 8))
    reads = valid.byte() + 2 * patterns[0].byte() + 4 * patterns[1].byte()
    return normal(2, 2, rows, width) * 2, key, value, reads, [valid, *patterns]


@pytest.mark.parametrize(("rows", "keys", "key_heads"), [(9, 203, 1), (70, 64, 2), (1, 300, 1)])
def test_pattern_error_is_that_of_masked_attention(
    planner, device, generator, rows, keys, key_heads
):
    *arguments, masks = example(generator, device, rows=rows, keys=keys, key_heads=key_heads)
    errors = pattern_error(*arguments, scale=0.4, backend=planner)
    query, key, value = (x.double() for x in arguments[:3])
    outs = [
        torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask[:, None], scale=0.4, enable_gqa=True
        )
        for mask in masks
    ]
    want = torch.stack([(out - outs[0]).square().mean(dim=(-1, -2)) for out in outs[1:]])
    assert errors.shape == (2, 2, 2)
    torch.testing.assert_close(errors.double(), want, rtol=1e-4, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pattern_error_in_sixteen_bits_at_the_size_of_a_model(device, generator, dtype):
    *arguments, _ = example(generator, device, rows=64, keys=20_000, dtype=dtype, width=128)
    got = pattern_error(*arguments, scale=0.05, backend="triton")
    want = pattern_error(*arguments, scale=0.05, backend="reference")
    torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-9)


def test_pattern_error_names_wrong_arguments(generator):
    rows, key, value, reads, _ = example(generator, torch.device("cpu"))
    with pytest.raises(TypeError, match="reads uint8"):
        pattern_error(rows, key, value, reads.bool(), scale=1.0)
    with pytest.raises(ValueError, match="reads must be"):
        pattern_error(rows, key, value, reads[:1], scale=1.0)
    with pytest.raises(ValueError, match="value must be"):
        pattern_error(rows, key, value[:, :, 1:], reads, scale=1.0)
    with pytest.raises(TypeError, match="key must be"):
        pattern_error(rows, key.half(), value, reads, scale=1.0)
