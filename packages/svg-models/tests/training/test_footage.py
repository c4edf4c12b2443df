"""The judge of real footage at toy size: data file, windows, compact weights, resuming, export."""

import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from training import footage, train_footage
from training.build import make_tokenizer, make_transformer
from training.card import CARD
from training.compact import STEPS_PER_RMS, pack, quantise, unpack
from training.loop import Clock, Slice, run
from training.optim import make_optimisers
from training.train import TOY_SHAPE
from training.train_footage import TOY_PLAN, Options, export, fix_cross_attention, train
from training.windows import Footage, Latents, Window, prompt, windows

from svg_models.loading import load_pipeline

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("footage") / "toy.zip"
    train_footage.write_toy(path)
    return path


@pytest.fixture
def options(data, tmp_path):
    return Options(
        data=data, out=tmp_path / "judge", work=tmp_path / "work", vae_steps=2, steps=4,
        shape=TOY_SHAPE, plan=TOY_PLAN,
    )  # fmt: skip


def test_cover_fills_the_rows_and_keeps_the_middle():
    frames = np.zeros((2, 100, 300, 3), np.uint8)
    frames[:, :, 150:] = 255
    covered = footage.cover(frames, rows=48, columns=64)
    assert covered.shape == (2, 48, 144, 3)
    assert covered[:, :, :66].max() <= 4
    assert covered[:, :, 78:].min() >= 251
    tall = footage.cover(np.zeros((1, 90, 60, 3), np.uint8), rows=48, columns=64)
    assert tall.shape == (1, 48, 64, 3)


def test_write_and_read_keep_the_pictures_and_the_order(data, tmp_path):
    again = tmp_path / "again.zip"
    train_footage.write_toy(again)
    assert again.read_bytes() == data.read_bytes()
    clips = list(footage.read(data))
    assert [source.name for source, _ in clips] == ["toy-0", "toy-1", "toy-2"]
    assert [source.held_out for source, _ in clips] == [False, False, True]
    for number, (source, frames) in enumerate(clips):
        rng = np.random.default_rng(number)
        texture = np.kron(rng.integers(0, 256, (16, 24, 3)), np.ones((4, 4, 1)))
        assert frames.shape == (source.frames, source.height, source.width, 3) == (9, 48, 64, 3)
        grey = frames.mean(-1) - texture[None, :48, :64].mean(-1)
        assert np.abs(grey[0]).mean() < 16
        assert np.abs(grey[4]).mean() > 32, "the texture drifts"


def test_windows_spread_over_a_source():
    assert windows(45, 15.0, length=45) == [Window(0, 1)]
    assert windows(44, 15.0, length=45) == []
    assert windows(47, 15.0, length=45) == [Window(0, 1), Window(1, 1), Window(2, 1)]
    fast = windows(90, 30.0, length=45)
    assert fast == [Window(s, 1) for s in (0, 15, 30, 45)] + [Window(0, 2), Window(1, 2)]
    assert all(w.start + 44 * w.stride < 90 for w in fast)


def test_pieces_come_from_training_clips_and_follow_from_the_step(data):
    clips = Footage(data, "cpu")
    clips.frames[2].fill_(255)
    clock = Clock(Slice(out=data.parent, steps=9, lr=1.0))
    batches = clips.pieces(TOY_PLAN, 0, clock)
    seen = []
    for step in (3, 3, 4):
        clock.step = step
        seen.append(next(batches).video)
    assert seen[0].shape == (2, 3, 5, 16, 16)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert all(video.mean() < 0.9 for video in seen), "the clip held out is white"


def test_clock_follows_whichever_of_steps_and_seconds_is_spent_faster(tmp_path):
    clock = Clock(Slice(out=tmp_path, steps=10, lr=1.0, seconds=1000.0, spent=300.0))
    assert clock.progress == pytest.approx(0.3, abs=0.01)
    clock.step = 5
    assert clock.progress == 0.5
    assert not clock.over
    clock.step = 10
    assert clock.over
    assert Clock(Slice(out=tmp_path, steps=10, lr=1.0, max_seconds=-1.0)).over


def test_clock_of_a_run_without_seconds_is_over(tmp_path):
    clock = Clock(Slice(out=tmp_path, steps=5, lr=1e-3, seconds=0.0))
    assert clock.progress == 1.0
    assert clock.over


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("footage prepare none.whl --out x.zip", "cannot read none.whl (No such file"),
        ("footage table page.md", "cannot read page.md (it is no zip)"),
        ("footage table empty.zip", "empty.zip has no index of clips"),
        ("train_footage run --data none.zip --out a --work b", "cannot read none.zip"),
        ("train_footage show --model a --data none.zip --sheet s.jpg", "a has no judge.json"),
        ("train_footage export --out a --model b", "a holds no trained transformer"),
    ],
)
def test_main_refuses_wrong_paths_in_a_sentence(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("page.md").write_text("# a page")
    zipfile.ZipFile("empty.zip", "w").close()
    stage, *arguments = words.split()
    with pytest.raises(SystemExit) as stopped:
        {"footage": footage, "train_footage": train_footage}[stage].main(arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"page.md", "empty.zip"}


def test_run_stops_at_a_loss_that_is_not_finite_and_keeps_the_checkpoint(tmp_path):
    model = torch.nn.Linear(2, 2)
    batch = Latents(*[torch.ones(1, 2)] * 3, 64, "size")

    def go(steps, factor):
        options = Slice(out=tmp_path, steps=steps, lr=1e-3)
        run(
            model, "stage", options, lambda clock: [batch] * (steps - clock.step),
            lambda batch, generator: (factor * model(batch.latents).square().mean(), {}), decay=0.9,
        )  # fmt: skip

    go(2, 1.0)
    kept = (tmp_path / "stage.pt").read_bytes()
    with pytest.raises(FloatingPointError, match="lower lr"):
        go(3, float("nan"))
    assert (tmp_path / "stage.pt").read_bytes() == kept


def test_run_keeps_the_averages_while_it_goes_on(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2)
    options = Slice(out=tmp_path, steps=3, lr=1e-2, keep_seconds=0.0)
    kept = []
    run(
        model, "stage", options, lambda clock: [Latents(*[torch.ones(1, 2)] * 3, 64, "size")] * 3,
        lambda batch, generator: (model(batch.latents).square().mean(), {}), decay=0.9,
        keep=lambda clock, values, log: kept.append((clock.step, [v.clone() for v in values])),
    )  # fmt: skip
    assert [step for step, _ in kept] == [1, 2, 3]
    assert not torch.equal(kept[0][1][0], kept[1][1][0])
    assert torch.equal(kept[-1][1][0], model.weight)


RANKS = """
import sys
import torch
from training.ranks import join
ranks, device = join("cpu")
values = [torch.full((3,), 1.0 + ranks.rank), torch.full((2, 2), 10.0 * ranks.rank)]
assert ranks.agree(7.0 + ranks.rank) == 7.0
assert ranks.drift(values) == 20.0 * 2
ranks.average(values)
assert [v.unique().tolist() for v in values] == [[1.5], [5.0]], values
assert ranks.drift(values) == 0.0
assert (ranks.count, device) == (2, "cpu")
ranks.leave()
"""


def _torchrun(*arguments):
    training = Path(train_footage.__file__).parents[1]
    path = os.pathsep.join([str(training), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", *map(str, arguments)),
        ],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_ranks_agree_and_average(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    _torchrun(script)


@pytest.mark.slow
def test_ranks_train_the_same_weights(tmp_path):
    out = tmp_path / "judge"
    printed = _torchrun(
        *("-m", "training.train_footage", "run", "--toy", "--device", "cpu"),
        *("--out", out, "--work", tmp_path / "work", "--max-seconds", "200", "--later", "0"),
    )
    card = json.loads((out / CARD).read_text())
    assert card["transformer"]["step"] == 6
    logs = card["autoencoder"]["log"] + card["transformer"]["log"]
    assert [entry["drift"] for entry in logs] == [0.0, 0.0]
    assert printed.count("transformer: step 6") == 1, "the first rank alone speaks"
    assert any(name.startswith("transformer/") for name in unpack(out))


def test_store_replaces_all_files_of_an_earlier_call(tmp_path):
    store = train_footage.Store(tmp_path)
    (tmp_path / "weights-7.npz").write_bytes(b"of an earlier call")
    weights = {"vae/a": torch.ones(3)}
    store.begin(weights, {"step": 1})
    weights["vae/a"].fill_(5.0)  # training goes on while the copy is written
    store.finish()
    assert unpack(tmp_path)["vae/a"].tolist() == [1.0] * 3
    assert json.loads((tmp_path / CARD).read_text()) == {"step": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["judge.json", "weights-0.npz"]


@pytest.mark.slow
def test_show_puts_what_was_seen_above_what_is_generated(options, tmp_path):
    from PIL import Image

    train(options)
    export(options.out, tmp_path / "model")
    sheet = tmp_path / "sheet.jpg"
    train_footage.show(tmp_path / "model", sheet, options.data, device="cpu", steps=2)
    with Image.open(sheet) as picture:
        pixels = torch.from_numpy(np.asarray(picture).copy()).float()
    # Two prompts and one clip held out, two rows each, six frames of 32 x 48 pixels.
    assert pixels.shape == (6 * 32, 6 * 48, 3)
    seen = Footage(options.data, "cpu")
    expected = train_footage._row(train_footage._middle(seen, 0, (5, 32, 48))).float()
    assert (pixels[:32] - expected).abs().mean() < 12, "JPEG alone is between them"


def test_quantise_keeps_2_percent_of_noise_and_large_entries():
    torch.manual_seed(0)
    matrix = torch.randn(32, 768) * torch.logspace(-4, 2, 32)[:, None]
    matrix[3, 5] = 100 * matrix[3].std()
    steps, size = quantise(matrix)
    error = (steps.float() * size - matrix).square().mean(1).sqrt()
    rms = matrix.square().mean(1).sqrt()
    plain = torch.arange(32) != 3
    expected = 1 / (STEPS_PER_RMS * 12**0.5)
    torch.testing.assert_close(
        (error / rms)[plain].mean(), torch.tensor(expected), rtol=0.05, atol=0
    )
    assert steps[3, 5] == 127
    assert (steps[3, 5] * size[3] / matrix[3, 5]).item() == pytest.approx(1.0)


def test_pack_splits_into_files_that_unpack_joins(tmp_path):
    torch.manual_seed(0)
    tensors = {f"part/{i}": torch.randn(128, 200) for i in range(4)}
    tensors["part/bias"] = torch.randn(7)
    (tmp_path / "weights-9.npz").write_bytes(b"of an earlier call")
    paths = pack(tensors, tmp_path, largest=50_000)
    assert len(paths) == 2
    assert all(path.stat().st_size < 52_000 for path in paths)
    found = unpack(tmp_path)
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        torch.testing.assert_close(found[name], value, atol=0.05, rtol=0.01)
    with pytest.raises(FileNotFoundError, match=r"weights-\*\.npz"):
        unpack(tmp_path / "nothing")


def test_fix_cross_attention_leaves_nothing_to_train_there():
    transformer = make_transformer(TOY_SHAPE)
    fix_cross_attention(transformer)
    optimised = {
        id(value)
        for optimiser in make_optimisers(transformer, lr=1.0, fused=False)
        for group in optimiser.param_groups
        for value in group["params"]
    }
    trained = {id(value) for value in transformer.parameters() if value.requires_grad}
    assert optimised == trained
    for block in transformer.blocks:
        assert not any(layer.weight.requires_grad for layer in (block.attn2.to_q, block.attn2.to_v))
        assert block.attn1.to_q.weight.requires_grad
        x = torch.randn(3, 24)
        torch.testing.assert_close(block.attn2.to_out[0](x), x)


@pytest.mark.slow
def test_train_goes_on_exactly_from_its_work_and_closely_from_compact_weights(options, tmp_path):
    whole = train(options)
    parts = replace(options, out=tmp_path / "parts", work=tmp_path / "parts_work")
    assert train(replace(parts, stop_at=2))["transformer"]["step"] == 2
    card = train(parts)
    assert card["transformer"]["step"] == 4
    assert card["transformer"]["loss"] == whole["transformer"]["loss"]
    left, right = unpack(options.out), unpack(parts.out)
    assert all(torch.equal(left[name], right[name]) for name in left)

    # The folder of whole checkpoints is lost: weights and the card's step are what is left.
    lost = replace(parts, work=tmp_path / "fresh", steps=6)
    card = train(lost)
    assert card["transformer"]["step"] == 6
    assert [entry["step"] for entry in card["transformer"]["log"]] == [4, 6]
    assert not (lost.work / "vae.pt").exists(), "a stored autoencoder is not trained again"
    assert all(
        torch.equal(value, right[name])
        for name, value in unpack(parts.out).items()
        if name.startswith("vae/")
    )


@pytest.mark.slow
def test_export_gives_a_pipeline_that_generates(options, tmp_path):
    card = train(options)
    assert card["prompts"] == ["clip 0", "clip 1"]
    assert (card["frames"], card["height"], card["width"]) == (5, 32, 48)
    assert card["transformer"]["loss"].keys() == {"seen", "held out"}
    target = tmp_path / "model"
    assert 0 < export(options.out, target) < 1_000_000
    assert json.loads((target / CARD).read_text()) == json.loads(json.dumps(card))
    loaded = load_pipeline(target, device="cpu")
    attention = loaded.pipe.transformer.blocks[0].attn2
    assert torch.equal(attention.to_q.weight.float(), torch.eye(24))
    kept = unpack(options.out)["transformer/blocks.1.attn1.to_q.weight"]
    found = loaded.pipe.transformer.blocks[1].attn1.to_q.weight.float()
    torch.testing.assert_close(found, kept, rtol=2**-7, atol=1e-6)
    frames = loaded.pipe(
        card["prompts"][0], height=card["height"], width=card["width"],
        num_frames=card["frames"], num_inference_steps=2, output_type="np",
        guidance_scale=card["guidance"], generator=torch.Generator().manual_seed(0),
    ).frames  # fmt: skip
    assert frames.shape == (1, 5, 32, 48, 3)
    assert np.isfinite(frames).all()
    assert frames.std() > 0


def test_prompt_has_no_unknown_piece():
    tokenizer = make_tokenizer()
    ids = tokenizer([prompt(80, mirrored=True)]).input_ids[0]
    assert tokenizer.unk_token_id not in ids
