"""The training script at toy size: whole-clip codec, resuming, optimiser, export."""

from dataclasses import replace

import pytest
import torch
from diffusers import WanPipeline
from training import train
from training.build import (
    Shape,
    encode_text,
    make_text_encoder,
    make_tokenizer,
    make_vae,
)
from training.codec import WholeClip
from training.data import Size, choose_size, make_batch
from training.optim import Average, Muon, learning_rate, orthogonalise

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def options(tmp_path):
    sizes = (Size(frames=5, side=16, batch=2, weight=1.0),)
    return train.Options(out=tmp_path / "run", steps=4, lr=1e-3, shape=train.TOY_SHAPE, sizes=sizes)


def test_whole_clip_equals_the_chunked_pass():
    torch.manual_seed(0)
    vae = make_vae(Shape(encoder_dim=8, decoder_dim=8, latent_channels=4)).eval()
    with torch.no_grad():
        for value in vae.parameters():
            value.add_(0.05 * torch.randn_like(value))
        video = torch.rand(2, 3, 13, 32, 16) * 2 - 1
        chunked = vae.encode(video).latent_dist
        decoded = vae.decode(chunked.mean).sample
        codec = WholeClip(vae)
        mean, logvar = codec.moments(video)
        torch.testing.assert_close(mean, chunked.mean, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(logvar, chunked.logvar, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(codec.decode(mean).clamp(-1, 1), decoded, atol=1e-4, rtol=1e-3)
        codec.restore()
        assert torch.equal(vae.encode(video).latent_dist.mean, chunked.mean)


def test_whole_clip_refuses_other_autoencoders():
    from diffusers import AutoencoderKLWan

    plain = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    with pytest.raises(ValueError, match="is_residual"):
        WholeClip(plain)


def test_train_resumed_is_bit_equal_to_an_unbroken_run(options, tmp_path):
    whole, parts = options, replace(options, out=tmp_path / "parts")
    train.train_vae(whole)
    train.train_vae(replace(parts, stop_at=2))
    train.train_vae(parts)
    train.train_transformer(whole)
    train.train_transformer(replace(parts, stop_at=2))
    train.train_transformer(parts)
    for name in ("vae", "transformer"):
        left = torch.load(whole.out / f"{name}.pt", weights_only=True)
        right = torch.load(parts.out / f"{name}.pt", weights_only=True)
        assert left["step"] == right["step"] == 4
        assert all(torch.equal(left["model"][k], right["model"][k]) for k in left["model"])
        assert all(map(torch.equal, left["average"], right["average"]))
    size = train.export(whole.out, tmp_path / "model")
    assert 0 < size < 1_000_000
    pipe = WanPipeline.from_pretrained(str(tmp_path / "model"))
    pipe.set_progress_bar_config(disable=True)
    frames = pipe(
        "a red circle", height=16, width=16, num_frames=5, num_inference_steps=1, output_type="np"
    ).frames
    assert frames.shape == (1, 5, 16, 16, 3)

    again = replace(options, out=tmp_path / "again", init=tmp_path / "model", first=3)
    again.out.mkdir()
    (whole.out / "vae").rename(again.out / "vae")
    train.train_transformer(again)
    assert torch.load(again.out / "transformer.pt", weights_only=True)["step"] == 4


def test_make_batch_is_a_function_of_its_step():
    sizes = (Size(frames=5, side=16, batch=3, weight=1.0),)
    given = {"sizes": sizes, "steps": 10, "seed": 0, "tokenizer": make_tokenizer()}
    first, again, other = make_batch(3, **given), make_batch(3, **given), make_batch(4, **given)
    assert torch.equal(first.ids, again.ids)
    assert torch.equal(first.params.bodies, again.params.bodies)
    assert not torch.equal(first.params.bodies, other.params.bodies)


def test_choose_size_takes_sizes_only_in_their_part_of_the_run():
    early = Size(frames=5, side=16, batch=1, weight=1.0, stop=0.5)
    late = Size(frames=9, side=16, batch=1, weight=1.0, start=0.5)
    chosen = [choose_size((early, late), step=i, steps=10, seed=0) for i in range(10)]
    assert chosen == [early] * 5 + [late] * 5


def test_encode_text_is_zero_after_the_prompt():
    tokenizer = make_tokenizer()
    encoder = make_text_encoder(train.TOY_SHAPE, 192)
    tokens = tokenizer(["a red star", ""], padding=True, return_tensors="pt")
    hidden = encode_text(encoder, tokens.input_ids, tokens.attention_mask, length=7)
    assert hidden.shape == (2, 7, 16)
    assert hidden[0, 3].abs().sum() > 0
    assert hidden[0, 4:].abs().sum() == 0
    assert hidden[1, 1:].abs().sum() == 0


def test_orthogonalise_makes_singular_values_near_one():
    for shape in ((2, 8, 24), (1, 24, 8), (3, 16, 16)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert values.min() > 0.3
        assert values.max() < 1.3


def test_muon_descends_and_leaves_parameters_without_gradient():
    torch.manual_seed(0)
    target, weight = torch.randn(8, 4), torch.nn.Parameter(torch.zeros(8, 4))
    idle = torch.nn.Parameter(torch.ones(8, 4))
    muon = Muon([weight, idle], lr=0.2)
    before = (weight - target).square().sum().item()
    for _ in range(40):
        muon.zero_grad()
        (weight - target).square().sum().backward()
        muon.step()
    assert (weight - target).square().sum().item() < 0.2 * before
    assert torch.equal(idle, torch.ones(8, 4))


def test_learning_rate_warms_up_and_falls():
    rates = [learning_rate(step, 100, peak=1.0, warmup=10) for step in range(101)]
    assert rates[0] == pytest.approx(0.1, rel=0.01)
    assert max(rates) == pytest.approx(1.0, rel=0.03)
    assert rates[-1] == pytest.approx(0.01)


def test_average_follows_the_weights():
    model = torch.nn.Linear(2, 2)
    average = Average(model, decay=0.5)
    with torch.no_grad():
        model.weight.fill_(1.0)
    for step in range(100, 130):
        average.update(model, step)
    average.copy_to(other := torch.nn.Linear(2, 2))
    torch.testing.assert_close(other.weight, model.weight)
