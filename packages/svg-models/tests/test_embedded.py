"""The packaged pipeline itself: it loads unmodified, is small, finite and deterministic."""

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file

from svg_models.embedded import embedded_path

pytestmark = pytest.mark.usefixtures("one_thread")

MAX_BYTES = 15_000_000


@pytest.fixture(scope="module")
def pipe():
    pipe = WanPipeline.from_pretrained(str(embedded_path()))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make(pipe, *, seed, prompt="a red circle moving left", guidance=4.0):
    return pipe(
        prompt,
        height=32,
        width=48,
        num_frames=5,
        num_inference_steps=2,
        guidance_scale=guidance,
        max_sequence_length=32,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).frames[0]


def test_embedded_path_the_folder_is_at_most_15_megabytes():
    size = sum(file.stat().st_size for file in embedded_path().rglob("*") if file.is_file())
    assert 5_000_000 < size <= MAX_BYTES


def test_embedded_path_every_weight_is_finite_and_bf16():
    files = sorted(embedded_path().rglob("*.safetensors"))
    assert [file.parent.name for file in files] == ["text_encoder", "transformer", "vae"]
    for file in files:
        for name, value in load_file(file).items():
            assert value.dtype == torch.bfloat16, name
            assert torch.isfinite(value).all(), name


def test_embedded_path_it_has_the_sizes_that_sparse_attention_needs(pipe):
    config = pipe.transformer.config
    assert config.attention_head_dim == 64
    assert config.num_attention_heads * config.attention_head_dim == 256
    assert config.num_layers == 6
    assert tuple(config.patch_size) == (1, 1, 1)
    factors = pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial
    assert factors == (4, 8)


def test_embedded_path_equal_seeds_give_equal_clips_and_others_do_not(pipe):
    first, again, other = make(pipe, seed=1), make(pipe, seed=1), make(pipe, seed=2)
    assert first.shape == (5, 32, 48, 3)
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.05


def test_embedded_path_the_prompt_changes_the_clip(pipe):
    red, blue = make(pipe, seed=1), make(pipe, seed=1, prompt="a blue circle moving left")
    assert np.abs(red - blue).max() > 0.05


def test_embedded_path_the_latent_statistics_are_those_of_its_own_vae(pipe):
    mean, std = pipe.vae.config.latents_mean, pipe.vae.config.latents_std
    assert len(mean) == len(std) == pipe.vae.config.z_dim == 16
    assert all(value > 0.01 for value in std)


def test_embedded_path_no_word_of_the_grammar_is_unknown(pipe):
    from training.clips import vocabulary

    words = [word for word in vocabulary() if word != ","]
    ids = pipe.tokenizer(" ".join(words), add_special_tokens=False).input_ids
    assert len(ids) == len(words)
    assert pipe.tokenizer.unk_token_id not in ids
    assert max(ids) < pipe.text_encoder.config.vocab_size


def test_embedded_path_a_missing_model_is_one_clear_sentence(monkeypatch, tmp_path):
    import svg_models.embedded as embedded

    monkeypatch.setattr(embedded, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(FileNotFoundError, match="install svg-models from its wheel"):
        embedded_path()
