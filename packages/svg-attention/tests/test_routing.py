from __future__ import annotations

import pytest
import torch
from torch import Tensor

from svg_attention.methods import routing
from svg_attention.methods.routing import probe_error


def example(spread: float = 1.0) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    sizes = torch.tensor([[[4, 0, 7, 1, 8], [10, 2, 0, 3, 5]]])
    base_keys = torch.randn(1, 2, 5, 6, generator=draw)
    base_values = torch.randn(1, 2, 5, 3, generator=draw)
    owner = torch.stack([torch.arange(5).repeat_interleave(sizes[0, h]) for h in range(2)])
    keys = torch.stack([base_keys[0, h, owner[h]] for h in range(2)])[None]
    values = torch.stack([base_values[0, h, owner[h]] for h in range(2)])[None]
    keys = keys + spread * torch.randn(keys.shape, generator=draw)
    values = values + spread * torch.randn(values.shape, generator=draw)
    share = torch.nn.functional.one_hot(owner, 5).float().mT[None]
    share = share / share.sum(dim=-1, keepdim=True).clamp(min=1)
    means = torch.randn(1, 2, 9, 6, generator=draw)
    return means, keys, values, share @ keys, share @ values, sizes, owner


@pytest.mark.parametrize("probe", [1, 2**24])
def test_the_error_equals_the_sum_over_keys(probe: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "PROBE_LOGITS", probe)
    means, keys, values, centroids, value_means, sizes, owner = example()
    found = probe_error(means, keys, values, centroids, value_means, sizes, 0.5)
    constant = values.mean(dim=2, keepdim=True)
    values, value_means = values - constant, value_means - constant
    for h in range(2):
        for t in range(9):
            logits = keys[0, h].double() @ means[0, h, t].double() * 0.5
            top = logits.max()
            denominator = torch.exp(logits - top).sum()
            for c in range(5):
                mine = owner[h] == c
                centre = torch.exp(
                    centroids[0, h, c].double() @ means[0, h, t].double() * 0.5 - top
                )
                gap = (
                    centre * value_means[0, h, c]
                    - torch.exp(logits[mine] - top)[:, None] * (values[0, h, mine])
                )
                expected = gap.square().sum() / denominator**2 / max(int(mine.sum()), 1)
                assert float(found[0, h, t, c]) == pytest.approx(float(expected), abs=1e-6)


def test_errors_vanish_where_centroids_are_exact() -> None:
    means, keys, values, centroids, value_means, sizes, _ = example(spread=0.0)
    found = probe_error(means, keys, values, centroids, value_means, sizes, 0.5)
    assert found.max() < 1e-6


def test_large_logits_do_not_overflow() -> None:
    means, keys, values, centroids, value_means, sizes, _ = example()
    found = probe_error(means * 1e3, keys, values, centroids, value_means, sizes, 1.0)
    assert found.isfinite().all()
    assert (found.amax(dim=-1) > 0).any()


def test_a_constant_added_to_every_value_changes_nothing() -> None:
    means, keys, values, centroids, value_means, sizes, _ = example()
    found = probe_error(means, keys, values, centroids, value_means, sizes, 0.5)
    shift = torch.tensor([3.0, -2.0, 5.0])
    moved = probe_error(means, keys, values + shift, centroids, value_means + shift, sizes, 0.5)
    assert torch.allclose(moved, found, atol=1e-4)
