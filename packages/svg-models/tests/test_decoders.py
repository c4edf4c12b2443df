"""Decoders by kernels: as near to the truth as their classes, and only where they may be.

There is no GPU here, so the reference backend computes for the kernels where a test says it serves.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import pytest
import torch
import zoo
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.autoencoders import autoencoder_kl_hunyuan_video as diffusers_decoder
from torch import Tensor, nn

import svg_kernels
from svg_attention import Dense
from svg_models import restore, sparsify
from svg_models.families import fused
from svg_models.families.blocks import FusedForward
from svg_models.families.decoders import BLENDS, blend, find_decoder_blocks

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Say that kernels serve the CPU; return the layout of what each launch was given."""
    monkeypatch.setattr(fused, "serves", lambda device: True)
    launch, seen = svg_kernels.conv_input, []

    def call(x: Tensor, *args: Any, **options: Any) -> Tensor:
        kind = "norm" if options.get("groups") else "plain"
        seen.append(kind + (", offset" if options.get("offset") is not None else ""))
        return launch(x, *args, **options)

    monkeypatch.setattr(svg_kernels, "conv_input", call)
    return seen


@contextmanager
def fused_decoder(vae: Any) -> Iterator[list[FusedForward]]:
    found = [FusedForward.install(block, rule) for block, rule in find_decoder_blocks(vae)]
    forwards = [forward for forward in found if forward is not None]
    assert forwards
    yield forwards
    for forward in forwards:
        forward.remove()


def vae_of(**changes: Any) -> AutoencoderKLHunyuanVideo:
    torch.manual_seed(3)
    settings: dict[str, Any] = dict(
        latent_channels=4,
        block_out_channels=(16, 16, 32, 32),
        layers_per_block=1,
        norm_num_groups=4,
    )
    vae = AutoencoderKLHunyuanVideo(**(settings | changes)).eval()
    for name, weight in vae.named_parameters():
        if "norm" in name:
            weight.data += 0.3 * torch.randn(weight.shape)
    return vae


def latents(frames: int = 3, height: int = 3, width: int = 5) -> Tensor:
    return torch.randn(1, 4, frames, height, width, generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def decoded(vae: Any, z: Tensor) -> Tensor:
    out: Tensor = vae.decode(z).sample
    return out


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("batch", [1, 2])
def test_decoder_is_as_near_to_fp64_as_the_class_in_bf16(launches: list[str], batch: int) -> None:
    vae, z = vae_of(), latents().repeat(batch, 1, 1, 1, 1)
    exact = decoded(copy.deepcopy(vae).double(), z.double())
    narrow = copy.deepcopy(vae).bfloat16()
    stock = error(decoded(narrow, z.bfloat16()), exact)
    with fused_decoder(narrow):
        ours = error(decoded(narrow, z.bfloat16()), exact)
    assert launches.count("norm") == 2 + 4 * 2 + 1
    assert launches.count("norm, offset") == 2 + 4 * 2
    assert ours <= 1.1 * stock, (ours, stock)


def test_decoder_gives_the_clip_of_the_class_in_fp32_and_then_its_bits(launches: list[str]) -> None:
    vae, z = vae_of(), latents(frames=6, height=9)
    vae.enable_tiling(
        tile_sample_min_height=32, tile_sample_min_width=32, tile_sample_stride_height=24,
        tile_sample_stride_width=24, tile_sample_min_num_frames=8, tile_sample_stride_num_frames=4,
    )  # fmt: skip
    before = decoded(vae, z)
    attributes = [dict(module.__dict__) for module in vae.modules()]
    with fused_decoder(vae):
        during = decoded(vae, z)
    assert launches
    torch.testing.assert_close(during, before, rtol=1e-3, atol=1e-4)
    assert during.is_contiguous()
    assert [dict(module.__dict__) for module in vae.modules()] == attributes
    launches.clear()
    assert torch.equal(decoded(vae, z), before)
    assert not launches


def test_decoder_needs_no_mask_of_all_pairs(
    launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("a mask of all pairs of positions was made")

    monkeypatch.setattr(diffusers_decoder, "prepare_causal_attention_mask", refuse)
    vae = vae_of()
    with fused_decoder(vae):
        decoded(vae, latents())
    with pytest.raises(AssertionError, match="mask of all pairs"):
        decoded(vae, latents())


def hook(vae: Any) -> None:
    vae.decoder.mid_block.resnets[0].norm1.register_forward_hook(lambda *_: None)


def hook_convolution(vae: Any) -> None:
    vae.decoder.mid_block.resnets[0].conv1.conv.register_forward_hook(lambda *_: None)


def drop(vae: Any) -> None:
    vae.decoder.mid_block.resnets[0].dropout.p = 0.5
    vae.decoder.mid_block.resnets[0].dropout.train()


def replace_processor(vae: Any) -> None:
    vae.decoder.mid_block.attentions[0].set_processor(AttnProcessor())


def hook_dropout(vae: Any) -> None:
    vae.decoder.mid_block.resnets[0].dropout.register_forward_hook(lambda *args: 2 * args[2])


def hook_dropout_of_attention(vae: Any) -> None:
    to_out = vae.decoder.mid_block.attentions[0].to_out
    to_out[1].register_forward_hook(lambda *args: 2 * args[2])


def activate_otherwise(vae: Any) -> None:
    vae.decoder.mid_block.resnets[0].nonlinearity = nn.GELU()


def pad_otherwise(vae: Any) -> None:
    vae.decoder.mid_block.resnets[0].conv2.pad_mode = "constant"


def replace_forward(vae: Any) -> None:
    block = vae.decoder.mid_block.resnets[0]
    plain = type(block).forward
    block.forward = lambda *args, **kwargs: plain(block, *args, **kwargs)


@pytest.mark.parametrize(
    "change",
    [
        hook,
        hook_convolution,
        hook_dropout,
        hook_dropout_of_attention,
        drop,
        replace_processor,
        replace_forward,
        activate_otherwise,
        pad_otherwise,
    ],
)
def test_decoder_leaves_to_its_class_what_others_have_changed(
    change: Callable[[Any], None], launches: list[str]
) -> None:
    def result(changed: bool) -> tuple[Tensor, int]:
        vae = vae_of()
        if changed:
            change(vae)
        launches.clear()
        with fused_decoder(vae):
            torch.manual_seed(5)
            return decoded(vae, latents()), launches.count("norm, offset")

    (whole, all_launches), (part, fewer) = result(False), result(True)
    # Attention of a middle block that is left to its class launches nothing of its own.
    assert fewer < all_launches or change in (replace_processor, hook_dropout_of_attention)
    if change in (hook, hook_convolution, replace_processor, replace_forward):
        torch.testing.assert_close(part, whole, rtol=1e-3, atol=1e-4)
    vae = vae_of()
    change(vae)
    torch.manual_seed(5)
    plain = decoded(vae, latents())
    torch.testing.assert_close(part, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("place", ["conv_out", "up_blocks.0.upsamplers.0.conv"])
def test_decoder_pads_as_its_convolutions_do(launches: list[str], place: str) -> None:
    vae = vae_of()
    vae.decoder.get_submodule(place).pad_mode = "constant"
    stock = decoded(vae, latents())
    with fused_decoder(vae):
        found = decoded(vae, latents())
    assert launches
    torch.testing.assert_close(found, stock, rtol=1e-3, atol=1e-4)


def test_decoder_takes_a_block_without_dropout(launches: list[str]) -> None:
    vae = vae_of()
    vae.decoder.mid_block.resnets[0].dropout = nn.Identity()
    stock = decoded(vae, latents())
    with fused_decoder(vae):
        found = decoded(vae, latents())
    assert launches.count("norm, offset") == 2 + 4 * 2
    torch.testing.assert_close(found, stock, rtol=1e-3, atol=1e-4)


def test_sparsify_makes_decoding_faster_unless_told_otherwise(launches: list[str]) -> None:
    pipe = zoo.case("hunyuan_video t2v").build()
    stock = decoded(pipe.vae, latents())
    with sparsify(pipe, Dense(), fuse=False):
        assert torch.equal(decoded(pipe.vae, latents()), stock)
    assert not launches
    with sparsify(pipe, Dense()):
        torch.testing.assert_close(decoded(pipe.vae, latents()), stock, rtol=1e-3, atol=1e-4)
    assert launches
    launches.clear()
    run = sparsify(pipe, Dense())
    restore(pipe)
    assert not run.active
    assert torch.equal(decoded(pipe.vae, latents()), stock)
    assert not launches


def test_runs_that_share_a_vae_leave_it_when_the_last_one_does(launches: list[str]) -> None:
    first, second = (zoo.case("hunyuan_video t2v").build() for _ in range(2))
    vae = second.vae = first.vae
    before = [dict(module.__dict__) for module in vae.modules()]

    def launched() -> bool:
        launches.clear()
        decoded(vae, latents())
        return bool(launches) and {"blend_t", "blend_v", "blend_h"} <= vars(vae).keys()

    earlier, later = sparsify(first, Dense()), sparsify(second, Dense())
    earlier.restore()
    earlier.restore()
    assert launched()
    later.restore()
    assert [dict(module.__dict__) for module in vae.modules()] == before
    with sparsify(second, Dense()):
        assert launched()
    assert not launched()


def test_sparsify_lets_a_vae_go_with_its_run_and_the_run_with_its_pipeline(
    launches: list[str],
) -> None:
    pipe, other = (zoo.case("hunyuan_video t2v").build() for _ in range(2))
    other.vae = pipe.vae
    sparsify(pipe, Dense())
    del pipe
    gc.collect()  # a run and its pipeline refer to each other
    with sparsify(other, Dense(), fuse=False):
        decoded(other.vae, latents())
    assert not launches
    run, held = sparsify(other, Dense()), weakref.ref(other.vae)
    del other
    gc.collect()
    assert held() is None
    run.restore()


def test_restore_of_a_pipeline_whose_transformer_was_replaced_leaves_its_vae(
    launches: list[str],
) -> None:
    pipe, other = (zoo.case("hunyuan_video t2v").build() for _ in range(2))
    before = [dict(module.__dict__) for module in pipe.vae.modules()]
    run = sparsify(pipe, Dense())
    pipe.transformer = other.transformer
    restore(pipe)
    assert not run.active
    assert [dict(module.__dict__) for module in pipe.vae.modules()] == before


def test_copy_of_a_vae_amid_a_run_is_that_of_none(launches: list[str]) -> None:
    pipe = zoo.case("hunyuan_video t2v").build()
    stock, before = decoded(pipe.vae, latents()), {*vars(pipe.vae)}
    with sparsify(pipe, Dense()):
        pipe.vae = copy.deepcopy(pipe.vae)
        assert torch.equal(decoded(pipe.vae, latents()), stock)
    assert not launches
    with sparsify(pipe, Dense()):
        decoded(pipe.vae, latents())
    assert launches
    assert {*vars(pipe.vae)} == before
    assert torch.equal(decoded(pipe.vae, latents()), stock)


VAES = (
    diffusers.AutoencoderKLWan,
    diffusers.AutoencoderKLHunyuanVideo,
    diffusers.AutoencoderKLHunyuanVideo15,
    diffusers.AutoencoderKLCogVideoX,
    diffusers.AutoencoderKLLTXVideo,
    diffusers.AutoencoderKLMochi,
)


@pytest.mark.parametrize("kind", VAES)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("extent", [0, 3, 5, 9])
def test_blend_gives_the_bits_of_diffusers(kind: type, dtype: torch.dtype, extent: int) -> None:
    a, b = torch.randn(2, 1, 3, 7, 6, 8).to(dtype).unbind(0)
    names = [name for name in BLENDS if hasattr(kind, name)]
    assert {"blend_v", "blend_h"} <= {*names}
    for name in names:
        stock = getattr(kind, name)(None, a, b.clone(), extent)
        found = b.clone()
        assert blend(a, found, extent, axis=BLENDS[name]) is found
        assert torch.equal(found, stock), name


def test_blend_asks_no_float64_of_a_device_that_may_have_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arange = torch.arange

    def refuse(*args: Any, **options: Any) -> Tensor:
        assert torch.device(options["device"]).type == "cpu"
        return arange(*args, **options)

    monkeypatch.setattr(torch, "arange", refuse)
    a, b = torch.empty(2, 1, 3, 7, 6, 8, device="meta").unbind(0)
    assert blend(a, b, 3, axis=-1) is b


def test_sparsify_blends_tiles_by_few_launches() -> None:
    pipe = zoo.case("wan t2v").build()
    before = dict(vars(pipe.vae))
    with sparsify(pipe, Dense()):
        assert {"blend_v", "blend_h"} <= vars(pipe.vae).keys()
    assert vars(pipe.vae) == before
    with sparsify(pipe, Dense(), fuse=False):
        assert vars(pipe.vae) == before


def test_find_decoder_blocks_of_what_it_does_not_know() -> None:
    assert find_decoder_blocks(None) == []
    assert find_decoder_blocks(zoo.case("wan t2v").build().vae) == []
