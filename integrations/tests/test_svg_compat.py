"""The package `svg`: its functions, and SGLang's unhooked backend on top of them."""

import importlib
import inspect
import sys

import pytest
import torch
import torch.nn.functional as F
from distributions import ROOT
from test_sglang import BACKEND, dense_keys, make_layers, run, sglang  # noqa: F401


@pytest.fixture
def svg(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "integrations/svg-compat/src"))
    yield importlib.import_module("svg")
    for name in [n for n in sys.modules if n.split(".")[0] == "svg"]:
        del sys.modules[name]


def clustered(batch=2, heads=2, clusters=(5, 6), length=300, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = [torch.randint(n, (batch * heads, length), generator=generator) for n in clusters]
    sizes = [
        torch.stack([row.bincount(minlength=n) for row in rows]).view(batch, heads, n)
        for rows, n in zip(labels, clusters, strict=True)
    ]
    q, k, v = torch.randn(3, batch, heads, length, 16, generator=generator)
    return q, k, v, *labels, *sizes, generator


def test_dynamic_block_sparse_fwd_flashinfer_is_masked_attention(svg):
    from svg.kernels.triton.permute import (
        apply_inverse_permutation_triton,
        permute_tensor_by_labels_triton,
    )
    from svg.kmeans_utils import density_calculation, dynamic_block_sparse_fwd_flashinfer

    q, k, v, q_labels, k_labels, q_sizes, k_sizes, generator = clustered()
    read = torch.rand(2, 2, 5, 6, generator=generator) < 0.5
    read[..., 0] = True
    ours, order = permute_tensor_by_labels_triton(q, q_labels, dim=2)
    keys, key_order = permute_tensor_by_labels_triton(k, k_labels, dim=2)
    values, _ = permute_tensor_by_labels_triton(v, None, dim=2, sorted_indices=key_order)
    out = dynamic_block_sparse_fwd_flashinfer(
        ours, keys, values, read, q_sizes, k_sizes, is_cpu=False
    )
    out = apply_inverse_permutation_triton(out, order, dim=2)
    rows, columns = q_labels.view(2, 2, -1), k_labels.view(2, 2, -1)
    mask = torch.stack(
        [read[b, h][rows[b, h]][:, columns[b, h]] for b in (0, 1) for h in (0, 1)]
    ).view(2, 2, 300, 300)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    density = density_calculation(read, q_sizes, k_sizes)
    torch.testing.assert_close(density, mask.float().mean(dim=(2, 3)))


def test_dynamic_block_sparse_fwd_flashinfer_takes_empty_and_long_clusters(svg):
    from svg.kmeans_utils import dynamic_block_sparse_fwd_flashinfer

    q, k, v = torch.randn(3, 1, 1, 260, 16, generator=torch.Generator().manual_seed(2))
    sizes = torch.tensor([[[0, 200, 0, 60]]])
    read = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    read[..., 1, 3] = read[..., 3, 1] = True
    out = dynamic_block_sparse_fwd_flashinfer(q, k, v, read, sizes, sizes)
    first = F.scaled_dot_product_attention(q[:, :, :200], k[:, :, 200:], v[:, :, 200:])
    last = F.scaled_dot_product_attention(q[:, :, 200:], k[:, :, :200], v[:, :, :200])
    torch.testing.assert_close(out, torch.cat([first, last], dim=2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("p", "least", "expected"), [(0.0, 0.0, 1), (0.75, 0.0, 2), (0.0, 0.75, 3)]
)
def test_identify_dynamic_map_reads_until_p_of_the_mass(svg, p, least, expected):
    from svg.kmeans_utils import identify_dynamic_map

    # Equal logits: the mass of a cluster is its share of the keys.
    sizes = torch.tensor([[[50, 30, 15, 5]]])
    read = identify_dynamic_map(
        torch.ones(1, 1, 2, 8), torch.ones(1, 1, 4, 8), None, sizes, p, least
    )
    assert read.sum(dim=-1).unique().tolist() == [expected]
    assert read[0, 0, 0].tolist() == [True] * expected + [False] * (4 - expected)


def test_batch_kmeans_returns_what_sglang_unpacks(svg):
    from svg.kmeans_utils import batch_kmeans_Euclid

    x = torch.randn(4, 50, 8, generator=torch.Generator().manual_seed(1))
    labels, centroids, sizes, _ = batch_kmeans_Euclid(x, n_clusters=3, max_iters=4)
    assert (labels.shape, centroids.shape, sizes.shape) == ((4, 50), (4, 3, 8), (4, 3))
    again = batch_kmeans_Euclid(x, n_clusters=3, max_iters=1, init_centroids=centroids)
    assert len(again) == 4
    assert torch.equal(sizes.sum(dim=1), torch.full((4,), 50, dtype=sizes.dtype))


def test_permute_refuses_other_dimensions(svg):
    from svg.kernels.triton import permute

    with pytest.raises(ValueError, match="rows in dimension 2"):
        permute.permute_tensor_by_labels_triton(torch.zeros(1, 1, 4, 2), torch.zeros(1, 4), dim=1)
    with pytest.raises(ValueError, match="rows in dimension 2"):
        permute.apply_inverse_permutation_triton(torch.zeros(1, 1, 4, 2), torch.zeros(1, 4), dim=3)


@pytest.fixture
def cudnn_is_any(monkeypatch, sglang):  # noqa: F811
    """Let the backend's request for cuDNN attention, which a CPU lacks, be for any attention."""
    import contextlib

    backend = sglang.load(BACKEND)
    monkeypatch.setattr(backend, "sdpa_kernel", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.backends.cuda, "preferred_linalg_library", lambda backend: None)


@pytest.mark.parametrize("text", [0, 10])
def test_the_unhooked_backend_of_sglang_runs_on_these_names(svg, sglang, cudnn_is_any, text):  # noqa: F811
    backend, layers = make_layers(sglang)
    assert "svg_engines" not in inspect.getmodule(type(layers[0]).forward).__name__
    outs, _ = run(sglang, backend, layers, text=text, prompt=text)
    assert dense_keys(outs) == {(t, b, n) for t in (1000, 900) for b in (0, 1) for n in (0, 1)}
    whole, _ = run(sglang, backend, layers, text=text, prompt=text, top_p_kmeans=1.0)
    assert dense_keys(whole) == {*whole}
