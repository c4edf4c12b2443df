from __future__ import annotations

import pytest
import torch

from svg_attention.planning.order import long_tiles_first


def test_long_tiles_first_keeps_heads_together(planner, device):
    lengths = torch.tensor([[[[3, 0], [2, 0], [40, 50], [3, 0]], [[1, 0]] * 4]], device=device)
    order = long_tiles_first(lengths.int(), backend=planner)
    assert order.dtype == torch.int32
    assert order.tolist() == [2, 0, 1, 3, 4, 5, 6, 7]


def test_long_tiles_first_keeps_the_order_of_long_tiles(planner, device, generator):
    lengths = torch.randint(0, 50, (2, 3, 37, 4), generator=generator, device=device) ** 2
    order = long_tiles_first(lengths.int(), ratio=1.2, backend=planner).view(6, 37)
    rows = lengths.sum(-1).flatten(0, 1).double()
    for head in range(6):
        long = (rows[head] > 1.2 * rows[head].mean()).tolist()
        want = sorted(range(37), key=lambda tile: not long[tile])
        assert (order[head] - head * 37).tolist() == want


def test_long_tiles_first_names_wrong_arguments():
    with pytest.raises(ValueError, match="run_lengths must be"):
        long_tiles_first(torch.zeros(2, 3, 4, dtype=torch.int32))
