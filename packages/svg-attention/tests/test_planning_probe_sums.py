from __future__ import annotations

import pytest
import torch

from svg_attention.planning import reference
from svg_attention.planning.dispatch import LARGEST_BIAS
from svg_attention.planning.probe_sums import probe_sums


def example(generator, device, *, heads=2, key_heads=1, length=150, probe_rows=16, spread=1.0):
    """Draw clusters with 0, 1, 63, 64, 65 keys and more, and probes."""
    size = torch.tensor([0, 1, 63, 64, 65, 5, 0, 30], device=device)
    keys, width, depth = int(size.sum()), 12, 8

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device)

    sizes = size.expand(1, key_heads, -1).int().contiguous()
    owner = torch.arange(len(size), device=device).repeat_interleave(size)
    base_key, base_value = normal(1, key_heads, 8, width), normal(1, key_heads, 8, depth)
    key = base_key[:, :, owner] + spread * normal(1, key_heads, keys, width)
    value = base_value[:, :, owner] + spread * normal(1, key_heads, keys, depth)
    share = torch.nn.functional.one_hot(owner, 8).float().T
    share = share / share.sum(-1, keepdim=True).clamp(min=1)
    order = torch.rand(1, key_heads, keys, generator=generator, device=device).argsort(-1)
    place = order.argsort(-1)[..., None]
    # Row order[i] of the shuffled tensors is key i of the sorted ones.
    shuffled = [x.gather(2, place.expand_as(x)) for x in (key, value)]
    tiles = (length + 127) // 128
    means = normal(1, heads, tiles * 128 // probe_rows, width)
    return (means, *shuffled, order.int(), share @ key, share @ value, sizes), (key, value, owner)


def by_key(means, key, value, owner, centroids, value_means, sizes, scale):
    """Return each probe's error, mass and bias of every cluster, its output and lse, in fp64."""
    means, key, value, centroids, value_means = (
        x.double() for x in (means, key, value, centroids, value_means)
    )
    constant = value.mean(0)
    logits = means @ key.T * scale
    lse = torch.logsumexp(logits, -1, keepdim=True)
    centre_logits = means @ centroids.T * scale
    centre = torch.exp(centre_logits - lse)[:, owner]
    weights = torch.exp(logits - lse)
    gap = centre[..., None] * (value_means[owner] - constant) - weights[..., None] * (
        value - constant
    )
    zero = torch.zeros(len(means), len(sizes), dtype=torch.float64, device=means.device)
    error = zero.index_add(1, owner, gap.square().sum(-1)) / sizes.clamp(min=1)
    mass, bias = zero.clone(), zero.clone()
    for c in owner.unique().tolist():
        mine = owner == c
        mass[:, c] = weights[:, mine].sum(-1)
        bias[:, c] = torch.logsumexp(logits[:, mine], -1) - mine.sum().log() - centre_logits[:, c]
    return error, mass, bias.clamp(0, LARGEST_BIAS), weights @ value, lse[:, 0]


@pytest.mark.parametrize(("length", "probe_rows"), [(150, 16), (300, 128), (128, 4)])
@pytest.mark.parametrize(("heads", "key_heads"), [(2, 1), (2, 2)])
def test_probe_sums_is_the_sum_over_keys(
    planner, device, generator, length, probe_rows, heads, key_heads
):
    arguments, (key, value, owner) = example(
        generator, device, heads=heads, key_heads=key_heads, length=length, probe_rows=probe_rows
    )
    means, _, _, _, centroids, value_means, sizes = arguments
    found = probe_sums(
        *arguments, length=length, probe_rows=probe_rows, scale=0.3, return_output=True,
        backend=planner,
    )  # fmt: skip
    tiles = (length + 127) // 128
    assert found.error.shape == found.bias.shape == (1, heads, tiles, 8)
    probe = torch.arange(length, device=device) // probe_rows
    shares = torch.nn.functional.one_hot(probe, means.shape[2]).double()
    shares = torch.stack([part.mean(0) for part in shares.split(128)])
    for h in range(heads):
        k = h * key_heads // heads
        error, mass, bias, output, lse = by_key(
            means[0, h], key[0, k], value[0, k], owner, centroids[0, k], value_means[0, k],
            sizes[0, k], 0.3,
        )  # fmt: skip
        want = shares @ error
        torch.testing.assert_close(found.error[0, h].double(), want, rtol=2e-3, atol=1e-9)
        want = (shares @ (mass * bias) / (shares @ mass)).nan_to_num(0.0)
        torch.testing.assert_close(found.bias[0, h].double(), want, rtol=2e-3, atol=1e-4)
        torch.testing.assert_close(found.output[0, h].double(), output, rtol=2e-3, atol=1e-4)
        torch.testing.assert_close(found.lse[0, h].double(), lse, rtol=1e-4, atol=1e-4)
        empty = sizes[0, k] == 0
        assert (found.error[0, h][:, empty] == 0).all()
        assert (found.bias[0, h][:, empty] == 0).all()


def test_probe_sums_vanishes_where_centroids_are_exact(planner, device, generator):
    arguments, _ = example(generator, device, spread=0.0)
    found = probe_sums(*arguments, length=150, scale=0.3, backend=planner)
    assert found.output is None
    assert found.error.max() < 1e-6
    assert found.bias.max() < 1e-4


def test_probe_sums_stays_finite_at_logits_of_a_thousand(planner, device, generator):
    arguments, _ = example(generator, device)
    found = probe_sums(
        arguments[0] * 300, *arguments[1:], length=150, scale=1.0, return_output=True,
        backend=planner,
    )  # fmt: skip
    assert all(x.isfinite().all() for x in found)
    assert (found.error.amax(-1) > 0).all()


def test_probe_sums_does_not_depend_on_the_chunk(generator, monkeypatch):
    arguments, _ = example(generator, torch.device("cpu"))
    whole = probe_sums(*arguments, length=150, scale=0.3)
    monkeypatch.setattr(reference, "ERROR_LOGITS", 1)
    chunked = probe_sums(*arguments, length=150, scale=0.3)
    torch.testing.assert_close(chunked.error, whole.error, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(chunked.bias, whole.bias, rtol=1e-4, atol=1e-6)


def test_probe_sums_does_not_depend_on_a_constant_added_to_every_value(planner, device, generator):
    arguments, _ = example(generator, device)
    found = probe_sums(*arguments, length=150, scale=0.3, backend=planner)
    means, key, value, order, centroids, value_means, sizes = arguments
    shift = torch.linspace(-3, 5, value.shape[-1], device=device)
    filled = (sizes > 0)[..., None]
    moved = probe_sums(
        *(means, key, value + shift, order, centroids, value_means + shift * filled, sizes),
        length=150, scale=0.3, backend=planner,
    )  # fmt: skip
    torch.testing.assert_close(moved.error, found.error, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(moved.bias, found.bias, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_probe_sums_in_sixteen_bits_at_the_size_of_a_model(device, generator, dtype):
    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    sizes = torch.randint(0, 150, (1, 2, 100), generator=generator, device=device).int()
    rows = int(sizes.sum(-1).max())
    sizes[..., -1] += rows - sizes.sum(-1).int()
    order = torch.rand(1, 2, rows, generator=generator, device=device).argsort(-1).int()
    arguments = (
        normal(1, 4, 80, 128), normal(1, 2, rows, 128), normal(1, 2, rows, 128), order,
        normal(1, 2, 100, 128) * 0.1, normal(1, 2, 100, 128) * 0.1, sizes,
    )  # fmt: skip
    keywords = {"length": 1200, "scale": 128**-0.5}
    got = probe_sums(*arguments, backend="triton", **keywords)
    want = probe_sums(*arguments, backend="reference", **keywords)
    torch.testing.assert_close(got.error, want.error, rtol=2e-2, atol=1e-9)
    torch.testing.assert_close(got.bias, want.bias, rtol=2e-2, atol=1e-2)


def test_probe_sums_names_wrong_arguments(generator):
    arguments, _ = example(generator, torch.device("cpu"))
    keywords = {"length": 150, "scale": 1.0}
    with pytest.raises(ValueError, match="value_means must be"):
        probe_sums(*arguments[:5], arguments[5][:, :, 1:], arguments[6], **keywords)
    with pytest.raises(TypeError, match=r"order must be torch\.int32"):
        probe_sums(*arguments[:3], arguments[3].long(), *arguments[4:], **keywords)
    with pytest.raises(ValueError, match="key must be"):
        probe_sums(arguments[0], arguments[1][:, :, 1:], *arguments[2:], **keywords)
