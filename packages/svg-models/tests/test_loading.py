"""Loading: which pipeline, which sizes, which adapters, where."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import torch
from diffusers import (
    CogVideoXPipeline,
    HunyuanVideo15Pipeline,
    LTXConditionPipeline,
    WanAnimatePipeline,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVideoToVideoPipeline,
)
from peft import LoraConfig, get_peft_model_state_dict
from zoo import CASES, Case, case

from svg_models import generate
from svg_models.errors import ModelUnavailableError, SettingError
from svg_models.loading import Geometry, Inputs, Lora, load_pipeline
from svg_models.loading.defaults import defaults_for
from svg_models.loading.folder import read_index
from svg_models.loading.inputs import choose_pipeline
from svg_models.loading.lora import load_loras
from svg_models.loading.memory import weight_bytes
from svg_models.loading.pipeline import _correct_scale, _outline
from svg_models.loading.placement import OFFLOAD, check_offload, compile_transformers, place
from svg_models.model_names import PIPELINES

pytestmark = pytest.mark.usefixtures("one_thread")
SIZED = [
    case
    for case in CASES
    if "height" in case.arguments and not {"reference_images", "pose_video"} & set(case.arguments)
]


@pytest.mark.parametrize("case", SIZED, ids=lambda c: c.name)
def test_geometry_counts_the_tokens_that_the_transformer_sees(case: Case) -> None:
    geometry = Geometry.of(case.build())
    call = case.arguments
    frames = call.get("num_frames") or len(call["video"])
    size = {"height": call["height"], "width": call["width"], "frames": frames}
    geometry.check(**size)
    latent, rows, columns = case.grid
    assert geometry.tokens(**size) == latent * rows * columns


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_geometry_is_known_before_the_weights(case: Case) -> None:
    pipe = case.build()
    networks = {n: x for n, x in pipe.components.items() if isinstance(x, torch.nn.Module)}
    outline = _outline(type(pipe), networks)
    _correct_scale(pipe)
    assert Geometry.of(outline) == Geometry.of(pipe)


@pytest.mark.parametrize(
    "size", [{"height": 33}, {"width": 40, "height": None}, {"frames": 6}, {"num_frames": 6}]
)
def test_load_pipeline_a_wrong_size_is_refused_before_weights_are_read(
    size: dict[str, int | None], tmp_path: Path
) -> None:
    folder = tmp_path / "wan"
    tiny.pipeline().save_pretrained(folder)
    weights = list(folder.rglob("*.safetensors"))
    assert weights
    for file in weights:
        file.unlink()
    with pytest.raises(SettingError, match="nearest valid"):
        load_pipeline(folder, device="cpu", **size)
    with pytest.raises(SettingError, match="nearest valid"):
        generate(model=folder, device="cpu", **size)
    with pytest.raises(ModelUnavailableError):
        load_pipeline(folder, device="cpu", height=32)


def test_load_pipeline_words_are_those_of_generate(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="height must be a whole number, got '480'"):
        load_pipeline(device="cpu", height="480")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="did you mean 'height'"):
        load_pipeline(device="cpu", heigth=480)  # type: ignore[call-arg]
    with pytest.raises(SettingError, match="frames and num_frames are the same setting"):
        load_pipeline(device="cpu", frames=9, num_frames=9)  # type: ignore[call-arg]
    with pytest.raises(SettingError, match="no LoRA at"):
        load_pipeline(device="cpu", loras=[str(tmp_path / "style.safetensors:0.8")])
    with pytest.raises(SettingError, match="loras must be a list"):
        load_pipeline(device="cpu", loras="style.safetensors")
    with pytest.raises(SettingError, match="a path or a hub id, got 5"):
        load_pipeline(device="cpu", loras=[5])  # type: ignore[list-item]
    with pytest.raises(SettingError, match="got 'float64'"):
        load_pipeline(device="cpu", dtype=torch.float64)
    half = load_pipeline(device="cpu", torch_dtype=torch.bfloat16)  # type: ignore[call-arg]
    assert half.pipe.transformer.dtype is half.dtype is torch.bfloat16


@pytest.mark.parametrize("make", [generate, load_pipeline])
def test_load_pipeline_what_is_no_name_is_told_what_to_give(make: Callable[..., Any]) -> None:
    with pytest.raises(SettingError, match="got a WanPipeline; sparsify"):
        make(model=tiny.pipeline(), device="cpu")
    with pytest.raises(SettingError, match="what load_pipeline returned, got a int"):
        make(model=3, device="cpu")


def test_load_pipeline_frames_that_the_vae_would_change_are_refused() -> None:
    found = case("cogvideox 1.0 t2v")
    pipe = found.build()
    geometry = Geometry.of(pipe)
    size = {"height": 32, "width": 32}
    with pytest.raises(SettingError, match=r"multiple of 8 plus 1, got 13; .* is 17"):
        geometry.check(**size, frames=13)
    call = {**found.arguments, "num_frames": 13, "num_inference_steps": 1, "output_type": "np"}
    assert pipe(**call).frames.shape[1] != 13
    assert [geometry.most_frames(n) for n in (1, 8, 9, 16, 17, 40)] == [1, 1, 9, 9, 17, 33]


def test_load_pipeline_a_model_with_learned_positions_knows_one_size() -> None:
    pipe = case("cogvideox 1.0 t2v").build()
    pipe.transformer.register_to_config(
        use_learned_positional_embeddings=True, sample_height=8, sample_width=12
    )
    geometry = Geometry.of(pipe)
    assert geometry.nearest_size(height=100, width=900) == {"height": 32, "width": 48}
    with pytest.raises(SettingError, match="32 and 48, the one size this model knows, got 32 x 32"):
        geometry.check(height=32, width=32, frames=9)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("wan t2v", (50, 5.0, 480, 832, 81, 16)),
        ("hunyuan_video t2v", (50, 6.0, 720, 1280, 129, 24)),
        ("hunyuan_video15 t2v", (50, 4.0, 480, 832, 121, 24)),
        ("cosmos 1.0 t2w", (36, 7.0, 704, 1280, 121, 30)),
        ("cosmos predict2 v2w", (35, 7.0, 704, 1280, 93, 16)),
        ("ltx t2v", (50, 3, 512, 704, 161, 25)),
        ("cogvideox 1.0 t2v", (50, 6, 480, 720, 49, 8)),
        ("cogvideox 1.5 t2v", (50, 6, 768, 1360, 81, 16)),
    ],
)
def test_defaults_for_are_those_of_the_model(name: str, expected: tuple[float, ...]) -> None:
    pipe = case(name).build()
    if name.startswith("cogvideox"):  # real sizes, which CogVideoX has in its configuration
        rows, columns = (60, 90) if "1.0" in name else (96, 170)
        pipe.transformer.register_to_config(sample_height=rows, sample_width=columns)
    found = defaults_for(name, pipe)
    sizes = (found.height, found.width, found.frames, found.fps)
    assert (found.steps, found.guidance, *sizes) == expected


def test_defaults_for_wan_22_5b_are_its_own() -> None:
    pipe = tiny.pipeline(tiny.transformer(in_channels=48, out_channels=48))
    found = defaults_for("wan", pipe)
    assert (found.height, found.width, found.frames, found.fps) == (704, 1280, 121, 24)


@pytest.mark.parametrize(
    ("pipeline", "image", "video", "needs"),
    [
        (WanPipeline, "", "", ""),
        (WanImageToVideoPipeline, "image", "", "image"),
        (WanVideoToVideoPipeline, "", "redraw", "video"),
        (WanVACEPipeline, "reference_images", "follow", ""),
        (LTXConditionPipeline, "image", "continue", ""),
        (HunyuanVideo15Pipeline, "", "", ""),
        (CogVideoXPipeline, "", "", ""),
    ],
)
def test_inputs_of_reads_the_pipeline(pipeline: type, image: str, video: str, needs: str) -> None:
    found = Inputs.of(pipeline)
    assert (found.image, found.video, found.needs) == (image, video, needs)


def test_inputs_check_refuses_a_pipeline_that_wants_what_a_clip_has_no_setting_for() -> None:
    inputs = Inputs.of(WanAnimatePipeline)
    assert inputs.lacks == ("pose_video", "face_video")
    with pytest.raises(SettingError, match=r"must be given pose_video and face_video, .* Python"):
        inputs.check("Wan-AI/Wan2.2-Animate-14B-Diffusers", image=True, video=False)


@pytest.mark.parametrize("name", [n for names in PIPELINES.values() for n in names])
def test_inputs_check_lets_the_pipelines_of_the_catalog_pass(name: str) -> None:
    inputs = Inputs.of(getattr(diffusers, name))
    if name != "WanAnimatePipeline":
        inputs.check("model", image="image" in inputs.needs, video=inputs.needs == "video")


def checkpoint(folder: Path, pipeline: str, **index: Any) -> Path:
    names = {"_class_name": pipeline, "transformer": ["diffusers", "WanTransformer3DModel"]}
    (folder / "model_index.json").write_text(json.dumps(names | index))
    return folder


@pytest.mark.parametrize(
    ("pipeline", "index", "given", "expected"),
    [
        ("WanPipeline", {}, {}, "WanPipeline"),
        ("WanPipeline", {}, {"video"}, "WanVideoToVideoPipeline"),
        ("WanPipeline", {"expand_timesteps": True}, {"image"}, "WanImageToVideoPipeline"),
        ("WanImageToVideoPipeline", {}, {"image"}, "WanImageToVideoPipeline"),
        ("WanVACEPipeline", {}, {"image", "video"}, "WanVACEPipeline"),
        ("CogVideoXPipeline", {}, {"video"}, "CogVideoXVideoToVideoPipeline"),
        ("LTXPipeline", {}, {"image"}, "LTXImageToVideoPipeline"),
        ("CosmosVideoToWorldPipeline", {}, {"video"}, "CosmosVideoToWorldPipeline"),
    ],
)
def test_choose_pipeline_takes_the_one_that_takes_what_is_given(
    pipeline: str, index: dict[str, Any], given: set[str], expected: str, tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path, pipeline, **index)
    kinds = {"image": "image" in given, "video": "video" in given}
    assert choose_pipeline("it", read_index(folder), **kinds).__name__ == expected


@pytest.mark.parametrize(
    ("pipeline", "index", "given", "sentence"),
    [
        ("WanPipeline", {}, {"image"}, "cannot start from an image .WanPipeline takes none"),
        ("LTXPipeline", {}, {"video"}, "cannot start from a video .LTXPipeline takes none"),
        ("WanImageToVideoPipeline", {}, set(), "does not start from a prompt alone; add --image"),
        ("CosmosVideoToWorldPipeline", {}, set(), "add --image PATH or --video PATH"),
        ("CosmosVideoToWorldPipeline", {}, {"image", "video"}, "give one of them"),
        (
            "WanPipeline",
            {"transformer_2": ["diffusers", "WanTransformer3DModel"]},
            {"video"},
            "has transformer_2, which diffusers.WanVideoToVideoPipeline would leave out",
        ),
    ],
)
def test_choose_pipeline_refuses_what_none_takes(
    pipeline: str, index: dict[str, Any], given: set[str], sentence: str, tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path, pipeline, **index)
    kinds = {"image": "image" in given, "video": "video" in given}
    with pytest.raises(SettingError, match=sentence):
        choose_pipeline("it", read_index(folder), **kinds)


def test_choose_pipeline_names_one_that_diffusers_does_not_have(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "WanPipelineOfTomorrow")
    with pytest.raises(ModelUnavailableError, match=r"needs diffusers\.WanPipelineOfTomorrow"):
        choose_pipeline("it", read_index(folder), image=False, video=False)


def test_load_pipeline_a_vae_that_joins_pixels_counts_them(tmp_path: Path) -> None:
    loaded = load_pipeline(video=True)
    stages = 2 ** len(loaded.pipe.vae.temperal_downsample)
    assert stages != loaded.pipe.vae_scale_factor_spatial == loaded.geometry.space == 8


@pytest.mark.parametrize(
    ("name", "vae"),
    [
        ("wan t2v", torch.float32),
        ("allegro t2v", torch.float32),
        ("hunyuan_video t2v", torch.bfloat16),
        ("mochi t2v", torch.bfloat16),  # its pipeline decodes what the transformer's dtype holds
    ],
)
def test_load_pipeline_a_vae_is_as_precise_as_its_pipeline_allows(
    name: str, vae: torch.dtype, tmp_path: Path
) -> None:
    case(name).build().save_pretrained(tmp_path)
    pipe = load_pipeline(tmp_path, device="cpu", dtype="bfloat16").pipe
    assert (pipe.transformer.dtype, pipe.vae.dtype) == (torch.bfloat16, vae)


def test_weight_bytes_counts_what_stays_in_float32() -> None:
    sizes = {"transformer": 10, "vae": 3}
    assert weight_bytes(sizes, torch.bfloat16) == {"transformer": 20, "vae": 6}
    assert weight_bytes(sizes, torch.bfloat16, {"vae"}) == {"transformer": 20, "vae": 12}


def test_load_pipeline_layers_come_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, seen = tiny.pipeline(), []
    monkeypatch.setattr(pipe, "enable_sequential_cpu_offload", lambda device: seen.append(device))
    monkeypatch.setattr(pipe, "to", lambda device: pytest.fail("moved whole"))
    place(pipe, "cuda:1", "sequential")
    assert seen == ["cuda:1"]


@pytest.mark.parametrize("offload", [kind for kind in OFFLOAD if kind != "sequential"])
def test_place_leaves_the_clip_the_same(offload: str) -> None:
    stock = tiny.generate(tiny.pipeline())
    pipe = tiny.pipeline()
    place(pipe, "cpu", offload)
    assert torch.equal(tiny.generate(pipe), stock)


def test_check_offload_refuses_it_without_a_gpu() -> None:
    with pytest.raises(SettingError, match="this runs on the CPU; leave --offload out"):
        check_offload("group", "cpu")
    with pytest.raises(SettingError, match="one of none, model, group, sequential, got 'disk'"):
        check_offload("disk", "cuda")
    check_offload("none", "cpu")
    check_offload("sequential", "cuda:1")


def save_lora(folder: Path, model: WanTransformer3DModel | None = None) -> Path:
    model = tiny.transformer() if model is None else model
    torch.manual_seed(7)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = get_peft_model_state_dict(model)
    WanPipeline.save_lora_weights(folder, transformer_lora_layers=layers)
    return folder / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("form", ["file", "folder"])
def test_load_pipeline_a_lora_changes_the_clip_by_its_weight(form: str, tmp_path: Path) -> None:
    path = save_lora(tmp_path)
    source = str(path if form == "file" else path.parent)
    stock = tiny.generate(tiny.pipeline())
    clips = []
    for weight in (1.0, 0.5, 0.0):
        pipe = tiny.pipeline()
        load_loras(pipe, [Lora(source=source, weight=weight)])
        clips.append(tiny.generate(pipe))
    whole, half, none = ((clip - stock).norm() for clip in clips)
    assert whole > half > 0 == none


def test_load_pipeline_two_loras_add_up(tmp_path: Path) -> None:
    source = str(save_lora(tmp_path))
    twice, once = tiny.pipeline(), tiny.pipeline()
    load_loras(twice, [Lora(source=source, weight=0.5)] * 2)
    load_loras(once, [Lora(source=source)])
    assert torch.allclose(tiny.generate(twice), tiny.generate(once), atol=1e-5)


def test_load_pipeline_a_lora_for_another_model_is_refused(tmp_path: Path) -> None:
    wide = tiny.transformer(num_attention_heads=3)
    source = str(save_lora(tmp_path, wide))
    with pytest.raises(ModelUnavailableError, match="WanTransformer3DModel: size mismatch"):
        load_loras(tiny.pipeline(), [Lora(source=source)])
    (tmp_path / "text.safetensors").write_text("no weights at all")
    with pytest.raises(ModelUnavailableError, match="is cut off or is no safetensors"):
        load_loras(tiny.pipeline(), [Lora(source=str(tmp_path / "text.safetensors"))])


def test_load_pipeline_a_lora_without_weights_for_the_transformer_is_refused(
    tmp_path: Path,
) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "unet.safetensors"
    names = ("unet.down.to_q.lora_A.weight", "unet.down.to_q.lora_B.weight")
    save_file({name: torch.ones(2, 2) for name in names}, path)
    with pytest.raises(ModelUnavailableError, match="holds no weights for WanTransformer3DModel"):
        load_loras(tiny.pipeline(), [Lora(source=str(path))])


def test_lora_is_named_by_source_and_weight(tmp_path: Path) -> None:
    path = tmp_path / "a:b.safetensors"
    path.touch()
    assert Lora.parse(str(path)) == Lora(source=str(path))
    assert Lora.parse(f"{path}:0.5") == Lora(source=str(path), weight=0.5)
    assert Lora.parse("somebody/style:-1") == Lora(source="somebody/style", weight=-1.0)
    assert Lora.parse(str(Lora(source="somebody/style", weight=0.25))).weight == 0.25
    with pytest.raises(SettingError, match=r"no LoRA at '/missing/style\.safetensors'"):
        Lora.parse("/missing/style.safetensors:0.8")
    with pytest.raises(SettingError, match="must be a finite number, got nan"):
        Lora.parse("somebody/style:nan")


def test_load_pipeline_blocks_are_compiled_and_what_names_none_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        WanTransformer3DModel,
        "compile_repeated_blocks",
        lambda self, **how: seen.append((type(self).__name__, how)),
    )
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **how: seen.append((type(self).__name__, how))
    )
    for name in ("wan 2.2 t2v", "cosmos 1.0 t2w"):
        compile_transformers(case(name).build())
    blocks = ("WanTransformer3DModel", {"fullgraph": True})
    assert seen == [blocks, blocks, ("CosmosTransformer3DModel", {})]


@pytest.mark.parametrize("offload", ["group", "sequential"])
def test_check_offload_refuses_to_move_compiled_layers(offload: str) -> None:
    with pytest.raises(SettingError, match="leave --compile out, or take --offload model"):
        check_offload(offload, "cuda", compiled=True)
    check_offload(offload, "cuda")
    check_offload("model", "cuda", compiled=True)
