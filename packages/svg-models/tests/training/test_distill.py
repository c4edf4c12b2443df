"""The distilled judge at toy size: the teacher's way, the student's steps, resuming, export."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from safetensors.torch import load_file
from training import distill
from training.build import make_tokenizer
from training.card import CARD
from training.data import choose_size, make_batch
from training.distill import STEPS, SUBSTEPS, TOY_SIZES, WEIGHTS, Options, Scenes, Student, Teacher
from training.loop import Clock, Slice
from training.ranks import Ranks

from svg_models import embedded_path

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[4]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "model"
    distill.write_toy_teacher(folder)
    return folder


@pytest.fixture
def options(teacher, tmp_path):
    return Options(
        out=tmp_path / "few", work=tmp_path / "work", teacher=teacher, steps=4, sizes=TOY_SIZES
    )


def _student(teacher):
    found = Teacher(teacher, "cpu")
    return Student(distill.load_transformer(teacher, "cpu", compiled=False), found), found


def _batch(step):
    return make_batch(step, sizes=TOY_SIZES, steps=4, seed=0, tokenizer=make_tokenizer())


def test_few_step_scheduler_takes_eulers_step_between_sigmas_of_the_teacher():
    config = UniPCMultistepScheduler.from_pretrained(embedded_path() / "scheduler").config
    few = distill.few_step_scheduler(config)
    few = type(few).from_config(json.loads(few.to_json_string()))  # as an exported folder has it
    few.set_timesteps(STEPS)
    whole = Teacher(embedded_path(), "cpu")
    assert torch.equal(few.sigmas, whole.sigmas[::SUBSTEPS])
    assert torch.equal(few.timesteps, whole.timesteps[::SUBSTEPS])
    assert few.sigmas.tolist() == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0], abs=2e-3)
    generator = torch.Generator().manual_seed(0)
    x = want = torch.randn(1, 2, 3, 4, 4, generator=generator)
    for number, timestep in enumerate(few.timesteps):
        velocity = torch.randn(x.shape, generator=generator)
        x = few.step(velocity, timestep, x, return_dict=False)[0]
        want = want + (few.sigmas[number + 1] - few.sigmas[number]) * velocity
        torch.testing.assert_close(x, want, rtol=1e-4, atol=1e-4)


def test_teacher_follows_what_its_pipeline_makes_in_20_steps_with_guidance():
    teacher, tokenizer = Teacher(embedded_path(), "cpu"), make_tokenizer()
    prompt = "a large red star moving right on a plain navy background"
    tokens = tokenizer([prompt], padding="max_length", max_length=64, return_tensors="pt")
    x = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    pipe = WanPipeline.from_pretrained(str(embedded_path()))
    pipe.set_progress_bar_config(disable=True)

    def sample(steps):
        return pipe(
            prompt, height=32, width=32, num_frames=5, num_inference_steps=steps,
            guidance_scale=distill.GUIDANCE, latents=x, output_type="latent",
            max_sequence_length=64,
        ).frames  # fmt: skip

    whole = sample(distill.TEACHER_STEPS)
    with torch.no_grad():
        text = teacher.embed(tokens.input_ids, tokens.attention_mask, length=64)
        here = x
        for number in range(STEPS):
            here = teacher.follow(here, torch.tensor([number]), text)
    distance = (here - whole).norm() / whole.norm()
    assert distance < 0.05
    assert distance < 0.25 * (sample(STEPS) - whole).norm() / whole.norm()


def test_student_reaches_what_its_pipeline_passes_through(teacher, options):
    student, found = _student(teacher)
    batch = _batch(0)
    noise = torch.randn(2, 4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        text = found.embed(batch.ids, batch.mask, length=64)[0]
        starts = [student.reach(noise, torch.full((2,), n), text) for n in range(STEPS)]
        mixed = student.reach(noise, torch.tensor([0, 3]), text)
        last = torch.full((2,), STEPS - 1)
        end = starts[-1] + student.width(last) * student.velocity(starts[-1], last, text)
    assert torch.equal(starts[0], noise)
    assert torch.equal(mixed[0], noise[0])
    torch.testing.assert_close(mixed[1], starts[3][1])
    weights = {name: v.detach() for name, v in student.transformer.named_parameters()}
    distill.store(options.out, weights, {})
    pipe = distill.student_pipeline(options.out, teacher)
    with torch.no_grad():
        made = pipe(
            prompt_embeds=text, height=64, width=64, num_frames=5, num_inference_steps=STEPS,
            guidance_scale=1.0, latents=noise, output_type="latent",
        ).frames  # fmt: skip
    torch.testing.assert_close(made, end, rtol=1e-3, atol=1e-3)


def test_student_noised_is_noise_first_and_between_after(teacher):
    student, _ = _student(teacher)
    latents, noise = torch.zeros(4, 1, 1, 1, 1), torch.ones(4, 1, 1, 1, 1)
    levels = student.noised(latents, noise, torch.arange(4)).flatten().tolist()
    assert levels == pytest.approx([1.0, 0.9, 0.75, 0.5], abs=2e-3)


@pytest.mark.parametrize("step", [0, 1])
def test_step_loss_reaches_every_weight_under_autocast(teacher, options, monkeypatch, step):
    """Weights cast without gradients, for the student's own way, must not be used again."""
    monkeypatch.setattr(
        distill, "autocast", lambda device: torch.autocast(device, dtype=torch.bfloat16)
    )
    student, found = _student(teacher)
    generator = torch.Generator().manual_seed(0)
    loss, extra = distill.step_loss(student, found, _batch(step), generator, options)
    loss.backward()
    assert extra["mse"] > 0
    missing = [name for name, value in student.named_parameters() if value.grad is None]
    assert missing == []
    assert all(value.grad is None for value in found.transformer.parameters())


def test_step_loss_falls_where_one_batch_is_learned(teacher, options):
    student, found = _student(teacher)
    adam = torch.optim.Adam(student.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss, _ = distill.step_loss(
            student, found, _batch(0), torch.Generator().manual_seed(0), options
        )
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_scenes_of_ranks_differ_and_their_sizes_do_not(options):
    sizes = tuple(replace(TOY_SIZES[0], side=side) for side in (32, 64))
    both = [
        Scenes(replace(options, sizes=sizes, steps=20, ranks=Ranks(rank, 2)), _clock(options))
        for rank in range(2)
    ]
    for step in range(20):
        first, second = (scenes[step] for scenes in both)
        assert first.size == second.size == choose_size(sizes, step=step, steps=20, seed=0)
        assert first.step == step
        assert not torch.equal(first.params.bodies, second.params.bodies)
    assert len({both[0][step].size for step in range(20)}) == 2


def _clock(options):
    return Clock(Slice(out=options.work, steps=options.steps, lr=1.0))


@pytest.mark.slow
def test_train_goes_on_exactly_from_its_work_and_from_weights_alone(options, tmp_path):
    whole = distill.train(options)
    parts = replace(options, out=tmp_path / "parts", work=tmp_path / "parts_work")
    assert distill.train(replace(parts, stop_at=2))["step"] == 2
    card = distill.train(parts)
    assert (card["step"], card["psnr"]) == (4, whole["psnr"])
    left, right = load_file(options.out / WEIGHTS), load_file(parts.out / WEIGHTS)
    assert all(torch.equal(left[name], right[name]) for name in left)

    # The folder of whole checkpoints is lost: weights and the card's step are what is left.
    lost = replace(parts, work=tmp_path / "fresh", steps=6)
    card = distill.train(lost)
    assert card["step"] == 6
    assert [entry["step"] for entry in card["log"]] == [4, 6]
    after = load_file(parts.out / WEIGHTS)
    change = sum((after[n].float() - right[n].float()).square().sum() for n in right) ** 0.5
    size = sum(value.float().square().sum() for value in right.values()) ** 0.5
    assert 0 < change < 0.1 * size, "it went on from the weights, and not from the teacher's"


@pytest.fixture
def model(options, tmp_path):
    distill.train(options)
    target = tmp_path / "model"
    assert 0 < distill.export(options.out, target, options.teacher) < 1_000_000
    return target


@pytest.mark.slow
def test_export_gives_a_pipeline_of_four_steps(options, model, tmp_path):
    card = json.loads((model / CARD).read_text("utf-8"))
    assert card == json.loads((options.out / CARD).read_text("utf-8"))
    assert (card["name"], card["steps"], card["guidance"]) == ("embedded4", 4, 1.0)
    assert len(card["prompts"]) == 16
    assert card["psnr"]["tiny"].keys() == {"teacher 4", "student 4"}
    pipe = WanPipeline.from_pretrained(str(model))
    pipe.scheduler.set_timesteps(STEPS)
    assert torch.equal(pipe.scheduler.sigmas, Teacher(options.teacher, "cpu").sigmas[::SUBSTEPS])
    kept = load_file(options.out / WEIGHTS)
    found = pipe.transformer.state_dict()
    assert all(torch.equal(found[name], value.float()) for name, value in kept.items())
    frames = pipe(
        card["prompts"][0], height=64, width=64, num_frames=card["frames"],
        num_inference_steps=card["steps"], guidance_scale=card["guidance"], output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).frames  # fmt: skip
    assert frames.shape == (1, 5, 64, 64, 3)
    assert np.isfinite(frames).all()
    sheet = tmp_path / "sheet.jpg"
    distill.show(model, sheet, options.teacher, device="cpu", clips=2)
    assert sheet.stat().st_size > 1000


@pytest.mark.slow
def test_export_is_a_judge_of_four_steps_for_quality(model, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    quality = importlib.import_module("quality")
    output = tmp_path / "quality.json"
    arguments = ["run", "--model", model, "--output", output, "--prompts", 2, "--device", "cpu"]
    arguments += ["--dtype", "float32", "--cases", "0.35, compensation", "0.5, compensation"]
    monkeypatch.setattr(sys, "argv", ["quality.py", *map(str, arguments)])
    quality.main()
    found = json.loads(output.read_text("utf-8"))
    assert found["failures"] == {}
    assert (found["judge"], found["steps"], found["guidance"]) == ("embedded4", 4, 1.0)
    assert len(found["cases"]) == 2
    for row in found["cases"].values():
        assert (row["size"], row["steps"], row["schedule"]) == ("tiny", 4, "no dense step")
        assert row["total_density"] == pytest.approx(row["density"], abs=0.05)
        assert len(row["per_clip"]["psnr"]) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "--out", "few"), "run needs --work"),
        (("run", "--out", "few", "--work", "w", "--teacher", "none"), "holds no pipeline"),
        (("export", "--out", "few", "--model", "m"), "holds no trained student"),
        (("show", "--model", "m", "--sheet", "s.jpg"), "that `export` wrote"),
    ],
)
def test_main_refuses_what_it_cannot_read_in_a_sentence(
    arguments, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        distill.main(list(arguments))
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
