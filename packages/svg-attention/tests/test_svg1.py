from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from svg_attention import SVG1, LayerMemory, SparsePlan, TokenLayout, sparse_attention
from svg_attention.methods.band import Band, band_runs, head_order, solve_width
from svg_attention.tiles import TILE_ROWS

LAYOUTS = [
    TokenLayout(grid=(5, 10, 13)),
    TokenLayout(grid=(4, 12, 16)),
    TokenLayout(grid=(1, 15, 20)),
    TokenLayout(grid=(300, 1, 1)),
    TokenLayout(grid=(5, 10, 13), text_tokens=37),
    TokenLayout(grid=(4, 12, 16), text_tokens=200),
    TokenLayout(grid=(5, 10, 13), text_tokens=37, text_position="first"),
]


def oracle(layout: TokenLayout, temporal: bool, width: int, text: int) -> Tensor:
    """Write the mask of one head over all valid tokens, from the definition."""
    frames, fs, video = layout.num_frames, layout.frame_tokens, layout.video_tokens
    token = torch.arange(video)
    position = token % fs * frames + token // fs if temporal else token
    first = position // TILE_ROWS * TILE_ROWS
    end = (first + TILE_ROWS).clamp(max=video)
    near = (position >= first[:, None] - width) & (position < end[:, None] + width)
    reads_video = near | (token < fs)
    if text:
        reads_video |= (first + TILE_ROWS > video)[:, None]
    valid = torch.cat([token + layout.video_start, torch.arange(text) + layout.text_start])
    seen = torch.ones(video + text, video + text, dtype=torch.bool)
    seen[:video, :video] = reads_video
    mask = torch.zeros(layout.tokens, layout.tokens, dtype=torch.bool)
    mask[valid[:, None], valid] = seen
    return mask


def executed(layout: TokenLayout, temporal: bool, width: int, text: int) -> SparsePlan:
    """Build the plan of one head of known kind and width."""
    valid = torch.tensor([text])
    bands = tuple(
        Band(layout=layout, temporal=kind, text=valid, width=torch.tensor([width]))
        for kind in (False, True)
    )
    kind = torch.tensor([[temporal]])
    starts, lengths = band_runs(bands, kind)

    def whole(order: Tensor) -> Tensor:
        tail = torch.arange(layout.text_tokens, dtype=torch.int32) + layout.text_start
        return torch.cat([order + layout.video_start, tail[None, None]], dim=-1)

    return SparsePlan(
        query_length=layout.tokens,
        key_length=layout.tokens,
        query_order=whole(head_order(layout, kind)),
        key_order=whole(head_order(layout, kind, sink_first=True)),
        run_starts=starts,
        run_lengths=lengths,
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("temporal", [False, True])
@pytest.mark.parametrize("width", [0, 70, 128, 10_000])
def test_svg1_computes_the_mask_of_the_oracle(
    layout: TokenLayout, temporal: bool, width: int
) -> None:
    text = layout.text_tokens * 2 // 3
    expected = oracle(layout, temporal, width, text)
    video = slice(layout.video_start, layout.video_start + layout.video_tokens)
    rows = torch.arange(layout.tokens)
    padding = (rows >= layout.text_start + text) & (rows < layout.text_start + layout.text_tokens)
    mask = executed(layout, temporal, width, text).to_mask()[0, 0]
    assert torch.equal(mask[~padding], expected[~padding])
    band = Band(
        layout=layout,
        temporal=temporal,
        text=torch.tensor([text]),
        width=torch.tensor([width]),
    )
    tokens = torch.arange(layout.video_tokens)
    assert torch.equal(band.reads(tokens)[0], expected[video]), "the profile uses another mask"


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_head_order_is_a_permutation_and_none_for_spatial_heads(layout: TokenLayout) -> None:
    kinds = torch.tensor([[False, True]])
    tokens = torch.arange(layout.video_tokens, dtype=torch.int32)
    for sink_first in (False, True):
        order = head_order(layout, kinds, sink_first=sink_first)
        assert torch.equal(order[0, 0], tokens)
        assert torch.equal(order[0, 1].sort().values, tokens)
    assert torch.equal(order[0, 1, : layout.frame_tokens], tokens[: layout.frame_tokens])


@pytest.mark.parametrize("text_position", ["first", "last"])
@pytest.mark.parametrize("text", [0, 60])
@pytest.mark.parametrize("density", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("temporal", [False, True])
def test_svg1_meets_the_density_asked_for(
    temporal: bool, density: float, text: int, text_position: str
) -> None:
    layout = TokenLayout(grid=(9, 16, 20), text_tokens=text, text_position=text_position)
    width = solve_width(layout, temporal=temporal, text=torch.tensor([text]), density=density)
    assert executed(layout, temporal, int(width), text).density().item() == pytest.approx(
        density, abs=2e-3
    )


def test_solve_width_gives_the_narrowest_band_below_the_first_frame() -> None:
    layout = TokenLayout(grid=(3, 16, 16))
    assert solve_width(layout, temporal=False, text=torch.tensor([0]), density=0.1).item() == 0


def patterned(layout: TokenLayout, *, temporal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Make a head whose queries find the keys of their own frame, or of their own patch."""
    draw = torch.Generator().manual_seed(0)
    token = torch.arange(layout.video_tokens)
    group = token % layout.frame_tokens if temporal else token // layout.frame_tokens
    codes = torch.nn.functional.normalize(
        torch.randn(int(group.max()) + 1, 64, generator=draw), dim=-1
    )
    base = 12.0 * codes[group]
    noise = torch.randn(3, layout.video_tokens, 64, generator=draw)
    return tuple(x[None, None] for x in (base + 0.3 * noise[0], base + 0.3 * noise[1], noise[2]))


def test_profile_tells_temporal_from_spatial_heads() -> None:
    layout = TokenLayout(grid=(10, 16, 16))
    heads = [patterned(layout, temporal=kind) for kind in (True, False, False, True)]
    query, key, value = (torch.cat(parts, dim=1) for parts in zip(*heads, strict=True))
    plan = SVG1(density=0.3).plan(
        query,
        key,
        value,
        layout=layout,
        memory=LayerMemory(),
        generator=torch.Generator().manual_seed(0),
    )
    frame_major = torch.arange(layout.video_tokens, dtype=torch.int32)
    found = [not torch.equal(order, frame_major) for order in plan.query_order[0]]
    assert found == [True, False, False, True]
    out = sparse_attention(query, key, value, plan)
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    error = (out - exact).square().mean(dim=(0, 2, 3)) / exact.square().mean(dim=(0, 2, 3))
    assert error.max() < 0.02


def test_svg1_samples_rows_over_the_whole_clip() -> None:
    """The head is temporal only in the last frames: rows of the first could not tell."""
    layout = TokenLayout(grid=(10, 16, 16))
    spatial, temporal = (patterned(layout, temporal=kind) for kind in (False, True))
    cut = 2 * layout.frame_tokens
    query, key, value = (
        torch.cat([early[:, :, :cut], late[:, :, cut:]], dim=2)
        for early, late in zip(spatial, temporal, strict=True)
    )
    plan = SVG1(density=0.3).plan(
        query,
        key,
        value,
        layout=layout,
        memory=LayerMemory(),
        generator=torch.Generator().manual_seed(0),
    )
    assert not torch.equal(
        plan.query_order[0, 0], torch.arange(layout.video_tokens, dtype=torch.int32)
    )


def test_svg1_heads_that_share_keys_share_their_order() -> None:
    layout = TokenLayout(grid=(6, 16, 16))
    query, key, value = patterned(layout, temporal=True)
    plan = SVG1(density=0.4).plan(
        query.expand(-1, 4, -1, -1),
        key.expand(-1, 2, -1, -1),
        value.expand(-1, 2, -1, -1),
        layout=layout,
        memory=LayerMemory(),
    )
    assert plan.query_order.shape[1] == 4
    assert plan.key_order.shape[1] == 2
    out = sparse_attention(query.expand(-1, 4, -1, -1), key, value, plan_of_one(plan))
    assert out.shape == (1, 4, layout.tokens, 64)


def plan_of_one(plan: SparsePlan) -> SparsePlan:
    """Let four query heads share one key head; both key heads had the same order."""
    return replace(plan, key_order=plan.key_order[:, :1])


def test_svg1_refuses_bad_settings() -> None:
    with pytest.raises(ValueError, match="density must lie"):
        SVG1(density=0.0)
    with pytest.raises(ValueError, match="sampled_rows"):
        SVG1(sampled_rows=0)
