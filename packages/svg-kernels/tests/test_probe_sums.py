from __future__ import annotations

import math

import pytest
import torch

import svg_kernels
from svg_kernels import UnsupportedError, probe_sums
from svg_kernels.probe_sums import reference, unsupported

SIZES = [0, 1, 63, 64, 65, 5, 0, 30, 2]


def call(generator, device="cpu", *, heads=2, key_heads=1, length=150, probe_rows=16, width=16,
         spread=1.0, scores=1.0, sizes=SIZES, dtype=torch.float32, batch=1):  # fmt: skip
    """Draw segments of many sizes, shuffled keys, and probes."""
    size = torch.tensor(sizes)
    keys = int(size.sum())

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=generator.device)

    owner = torch.arange(len(size)).repeat_interleave(size).to(generator.device)
    base = normal(2, batch, key_heads, len(size), width)
    rows = base[:, :, :, owner] + spread * normal(2, batch, key_heads, keys, width)
    share = torch.nn.functional.one_hot(owner, len(size)).float().T
    share = share / share.sum(-1, keepdim=True).clamp(min=1)
    means = share @ rows
    order = torch.rand(batch, key_heads, keys, generator=generator, device=generator.device)
    order = order.argsort(-1)
    place = order.argsort(-1)[..., None].expand_as(rows[0])
    key, value = (x.gather(2, place) for x in rows)
    probes = scores * normal(batch, heads, (length + 127) // 128 * 128 // probe_rows, width)
    tensors = [x.to(device, dtype) for x in (probes, key, value, *means)]
    tensors.insert(3, order.int().to(device))
    sizes = size.int().to(device).expand(batch, key_heads, -1).contiguous()
    return (*tensors, sizes), {"length": length, "probe_rows": probe_rows}


def key_by_key(probe, key, value, order, centroids, value_means, sizes, scale, limit=8.0):
    """Return a probe's error, mass and bias of every segment, output and lse: loops of fp64."""
    key, value = key[order.long()].double(), value[order.long()].double()
    scores = key @ probe.double() * scale
    lse = torch.logsumexp(scores, 0)
    weights = torch.exp(scores - lse)
    constant = value.mean(0)
    rows = []
    first = 0
    for c, size in enumerate(sizes.tolist()):
        mine = slice(first, first + size)
        first += size
        if not size:
            rows.append((0.0, 0.0, 0.0))
            continue
        center = centroids[c].double() @ probe.double() * scale
        wrong = (
            torch.exp(center - lse) * (value_means[c].double() - constant)
            - weights[mine, None] * (value[mine] - constant)
        )  # fmt: skip
        bias = torch.logsumexp(scores[mine], 0) - math.log(size) - center
        rows.append(
            (wrong.square().sum().item() / size, weights[mine].sum().item(),
             bias.clamp(0, limit).item())
        )  # fmt: skip
    error, mass, bias = torch.tensor(rows, dtype=torch.float64, device=key.device).T
    return error, mass, bias, weights @ value, lse


def by_tiles(arguments, length, probe_rows, scale, b, h):
    """Return a head's errors and biases, tile by tile, and its probes' outputs and lse."""
    probes, key, value, order, centroids, value_means, sizes = arguments
    k = h * key.shape[1] // probes.shape[1]
    found = [
        key_by_key(
            probe, key[b, k], value[b, k], order[b, k], centroids[b, k], value_means[b, k],
            sizes[b, k], scale,
        )
        for probe in probes[b, h]
    ]  # fmt: skip
    errors, masses, biases, outputs, lses = (torch.stack(x) for x in zip(*found, strict=True))
    rows = torch.arange(length) // probe_rows
    shares = torch.nn.functional.one_hot(rows, len(found)).double().to(errors.device)
    shares = torch.stack([part.mean(0) for part in shares.split(128)])
    mass = shares @ masses
    bias = torch.where(mass > 0, shares @ (masses * biases) / mass, 0.0)
    return shares @ errors, bias, outputs, lses


def squares(arguments, length, probe_rows, scale):
    """Return the sum of squares of which each error is a difference, fp64 `[B, H, T, C]`.

    `sum w^2 |v|^2 + n w_c^2 |v_c|^2` over the `n` keys of a segment, divided by `n`, mean of the
    rows of a tile: what the kernel adds up in products of rounded numbers.
    """
    probes, key, value, order, centroids, value_means, sizes = arguments
    index = order.long()[..., None].expand_as(key)
    key, value = key.gather(2, index).double(), value.gather(2, index).double()
    value_means = value_means.double() - value.mean(2, keepdim=True)
    value = value - value.mean(2, keepdim=True)
    group = probes.shape[1] // key.shape[1]
    key, value, centroids, value_means = (
        x.double().repeat_interleave(group, 1) for x in (key, value, centroids, value_means)
    )
    scores = probes.double() @ key.mT * scale
    lse = scores.logsumexp(-1, keepdim=True)
    whole = (scores - lse).exp().square() * value.square().sum(-1)[:, :, None]
    owner = torch.arange(sizes.shape[-1], device=key.device).repeat_interleave(sizes[0, 0].long())
    share = torch.nn.functional.one_hot(owner, sizes.shape[-1]).double()
    share = share / share.sum(0).clamp(min=1)
    centers = (probes.double() @ centroids.mT * scale - lse).exp().square()
    each = whole @ share + centers * value_means.square().sum(-1)[:, :, None]
    tiles = each.repeat_interleave(probe_rows, 2)[:, :, :length].split(128, 2)
    return torch.stack([rows.mean(2) for rows in tiles], 2) * (sizes[0, 0] > 0)


@pytest.mark.parametrize(("length", "probe_rows"), [(150, 16), (300, 128), (128, 4), (1, 8)])
@pytest.mark.parametrize(("heads", "key_heads"), [(2, 1), (2, 2)])
def test_probe_sums_are_sums_over_keys(generator, length, probe_rows, heads, key_heads):
    arguments, keywords = call(
        generator, heads=heads, key_heads=key_heads, length=length, probe_rows=probe_rows, batch=2
    )
    found = probe_sums(*arguments, scale=0.3, return_output=True, **keywords)
    for b in range(2):
        for h in range(heads):
            error, bias, output, lse = by_tiles(arguments, length, probe_rows, 0.3, b, h)
            torch.testing.assert_close(found.error[b, h].double(), error, rtol=1e-5, atol=1e-12)
            torch.testing.assert_close(found.bias[b, h].double(), bias, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found.output[b, h].double(), output, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found.lse[b, h].double(), lse, rtol=1e-6, atol=1e-6)
    empty = arguments[6][0, 0] == 0
    assert (found.error[..., empty] == 0).all()
    assert (found.bias[..., empty] == 0).all()


def test_probe_sums_without_outputs_finds_the_same_and_says_none(generator):
    arguments, keywords = call(generator)
    short = probe_sums(*arguments, **keywords)
    whole = probe_sums(*arguments, return_output=True, **keywords)
    assert short.output is None
    assert short.lse is None
    torch.testing.assert_close(short.error, whole.error, rtol=0, atol=0)
    torch.testing.assert_close(short.bias, whole.bias, rtol=0, atol=0)


def test_squares_bound_the_errors_of_the_reference(generator):
    arguments, keywords = call(generator, batch=2, scores=4.0)
    found = probe_sums(*arguments, scale=0.3, **keywords)
    bound = squares(arguments, keywords["length"], keywords["probe_rows"], 0.3)
    assert (found.error <= 2 * bound * (1 + 1e-5)).all()
    assert (found.error > 0.1 * bound)[bound > 0].any()


def test_probe_sums_vanish_where_means_are_exact(generator):
    arguments, keywords = call(generator, spread=0.0)
    found = probe_sums(*arguments, **keywords)
    assert found.error.max() < 1e-10
    assert found.bias.max() < 1e-5


def test_the_bias_of_a_segment_that_one_key_dominates_is_cut_off(generator):
    arguments, keywords = call(generator, heads=1, length=128, probe_rows=128)
    probes, key, value, order, _, value_means, sizes = arguments
    key = key.clone()
    key[0, 0, order[0, 0, 5].long()] = 80 * probes[0, 0, 0] / probes[0, 0, 0].square().sum()
    owner = torch.arange(len(SIZES)).repeat_interleave(torch.tensor(SIZES))
    share = torch.nn.functional.one_hot(owner, len(SIZES)).float().T
    share = share / share.sum(-1, keepdim=True).clamp(min=1)
    centroids = share @ key.gather(2, order.long()[..., None].expand_as(key))
    found = probe_sums(
        probes, key, value, order, centroids, value_means, sizes, scale=1.0, **keywords
    )
    assert found.bias[0, 0, 0, 2] == 8.0  # the sixth key is of the third segment
    assert all(x.isfinite().all() for x in found[:2])


def test_probe_sums_stay_finite_at_scores_of_a_thousand(generator):
    arguments, keywords = call(generator, scores=300.0)
    found = probe_sums(*arguments, scale=1.0, return_output=True, **keywords)
    assert all(x.isfinite().all() for x in found)
    assert (found.error.amax(-1) > 0).all()


def test_probe_sums_do_not_depend_on_the_group(generator, monkeypatch):
    arguments, keywords = call(generator, length=300)
    whole = probe_sums(*arguments, **keywords)
    monkeypatch.setattr(reference, "GROUP_SCORES", 1)
    parts = probe_sums(*arguments, **keywords)
    torch.testing.assert_close(parts.error, whole.error)
    torch.testing.assert_close(parts.bias, whole.bias)


def test_probe_sums_of_no_rows_are_empty(generator):
    arguments, _ = call(generator)
    found = probe_sums(arguments[0][:, :, :0], *arguments[1:], length=0)
    assert found.error.shape == (1, 2, 0, len(SIZES))


def test_probe_sums_is_an_operator_with_a_fake_kernel(generator):
    arguments, _ = call(generator)
    for wanted in (True, False):
        torch.library.opcheck(
            torch.ops.svg_kernels.probe_sums.default,
            (*arguments, 150, 16, 0.3, wanted, 8.0, "auto"),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_probe_sums_names_wrong_arguments(generator):
    arguments, keywords = call(generator)
    probes, key, value, order, *rest = arguments
    with pytest.raises(ValueError, match="probe_rows must divide 128, got 24"):
        probe_sums(*arguments, length=150, probe_rows=24)
    with pytest.raises(ValueError, match="200 rows are 16 probes of 16 rows, got"):
        probe_sums(probes[:, :, 1:], *arguments[1:], length=200)
    with pytest.raises(ValueError, match="value must be"):
        probe_sums(probes, key, value[:, :, 1:], order, *rest, **keywords)
    with pytest.raises(TypeError, match=r"order must be torch\.int32"):
        probe_sums(probes, key, value, order.long(), *rest, **keywords)
    with pytest.raises(ValueError, match="scale must be a finite number above 0"):
        probe_sums(*arguments, scale=0.0, **keywords)
    with pytest.raises(UnsupportedError, match="needs tensors on a CUDA device"):
        probe_sums(*arguments, backend="cuda", **keywords)
    with pytest.raises(UnsupportedError, match="not written in Triton"):
        probe_sums(*arguments, backend="triton", **keywords)


def test_unsupported_says_what_the_compiled_kernel_wants():
    cpu = torch.device("cpu")
    assert unsupported("reference", cpu, torch.float16, (80, 80), 1) is None
    assert "must be fp16, bf16 or fp32" in unsupported("cuda", cpu, torch.int8, (64, 64), 16)
    assert "CUDA device" in unsupported("cuda", cpu, torch.bfloat16, (64, 64), 16)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"length": 1000, "probe_rows": 32, "batch": 2, "heads": 4, "key_heads": 2},
        {"length": 513, "probe_rows": 8, "scores": 8.0},
        {"length": 700, "probe_rows": 128, "sizes": [400, 0, 3, 900, 1]},
        {"length": 1, "sizes": [1]},
        {"length": 300, "spread": 0.0},
        {"length": 300, "scores": 40.0, "sizes": [1] * 200 + [300]},
    ],
    ids=str,
)
def test_the_compiled_kernel_agrees_with_fp64(device, generator, options, width, wanted):
    arguments, keywords = call(generator, device, width=width, dtype=torch.bfloat16, **options)
    if unsupported("cuda", device, torch.bfloat16, (width, width), keywords["probe_rows"]):
        pytest.skip("no compiled kernel for this GPU")
    got = probe_sums(*arguments, return_output=wanted, backend="cuda", **keywords)
    wide = [x.float() if x.is_floating_point() else x for x in arguments]
    want = probe_sums(*wide, return_output=True, backend="reference", **keywords)
    # Weights and their squares are rounded to bf16 before they are added up. An error is a
    # difference of sums, which keep their rounding where it is small.
    rounding = squares(arguments, keywords["length"], keywords["probe_rows"], width**-0.5)
    allowed = 1e-2 * want.error + 2**-7 * rounding + 1e-12
    assert ((got.error - want.error).abs() / allowed).max() <= 1
    largest = want.error.amax(-1, keepdim=True)
    rare = want.error < 1e-6 * largest
    assert ((got.bias - want.bias).abs()[~rare] <= 2e-2).all()
    if wanted:
        rows = -(-keywords["length"] // keywords["probe_rows"])
        difference = (got.output - want.output)[:, :, :rows].norm()
        assert difference <= 5e-3 * want.output[:, :, :rows].norm()
        torch.testing.assert_close(got.lse, want.lse, rtol=1e-4, atol=2**-8)


@pytest.mark.gpu
def test_the_compiled_kernel_runs_in_a_graph(device, generator):
    arguments, keywords = call(generator, device, width=128, dtype=torch.bfloat16)
    if unsupported("cuda", device, torch.bfloat16, (128, 128), 16):
        pytest.skip("no compiled kernel for this GPU")
    want = probe_sums(*arguments, return_output=True, **keywords)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = probe_sums(*arguments, return_output=True, **keywords)
    for x in got:
        x.fill_(torch.nan)
    graph.replay()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_probe_sums_is_public():
    assert "probe_sums" in svg_kernels.__all__
