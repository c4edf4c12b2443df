"""What generate and compare take, and what they refuse before anything is loaded."""

from __future__ import annotations

import dataclasses
import inspect
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import svg_models
from svg_attention import SVG1, SVG2, Dense, UnsupportedError
from svg_models.errors import SettingError
from svg_models.generation.request import CompareRequest, GenerateRequest
from svg_models.generation.settings import options_of
from svg_models.loading import LoadedPipeline
from svg_models.loading.inputs import Inputs
from svg_models.method_names import MethodSpec, read_method
from svg_models.tuning.request import TuneRequest

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("svg_models.generation.sample.load_pipeline", load)


def test_generate_states_its_settings_in_its_signature() -> None:
    parameters = inspect.signature(svg_models.generate).parameters
    assert next(iter(parameters)) == "prompt"
    wanted = {"method", "steps", "guidance", "frames", "seed", "backend", "density", "profile"}
    assert wanted <= set(parameters)
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    compared = set(inspect.signature(svg_models.compare).parameters)
    own = {"method", "top_p", "compensate", "preset", "recipe", "gpus", "profile"}
    assert set(parameters) - compared == own
    assert compared - set(parameters) == {"methods", "presets", "recipes"}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"step": 3}, "generate has no setting 'step'; did you mean 'steps'"),
        ({"guidence_scale": 3}, "did you mean 'guidance_scale'"),
        ({"qqq": 3}, "no setting 'qqq'; known are prompt, "),
        ({"frames": 9, "num_frames": 13}, "frames and num_frames are the same setting"),
        ({"method": "svg3"}, "did you mean 'svg2'"),
        ({"method": "svg2@0.3", "density": 0.2}, "names its density, and density 0.2 was given"),
        ({"method": "svg2@0.3", "top_p": 0.9}, "give one of them"),
        ({"method": "svg2", "density": 0.2, "top_p": 0.9}, "give one of them"),
        ({"method": "dense", "density": 0.2}, "dense computes everything and has no density"),
        ({"method": "svg1", "compensate": True}, "only the svg2 methods can compensate"),
        ({"method": SVG2(), "density": 0.2}, "beside a method that has its own settings"),
        ({"steps": 2.5}, "steps must be a whole number, got 2.5"),
        ({"steps": True}, "steps must be a whole number, got True"),
        ({"frames": "9"}, "frames must be a whole number, got '9'"),
        ({"guidance": float("nan")}, "guidance must be a finite number"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"backend": "cuda9"}, "got 'cuda9'; did you mean 'cuda'"),
    ],
)
def test_generate_refuses_before_it_loads(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingError) as refusal:
        svg_models.generate("a circle", **settings)
    assert sentence in str(refusal.value)


def test_an_unknown_setting_is_a_type_error_too() -> None:
    with pytest.raises(TypeError, match="compare has no setting 'method'; did you mean 'methods'"):
        svg_models.compare("a circle", method="svg2")  # type: ignore[call-arg]


def test_generate_understands_the_names_of_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[GenerateRequest] = []

    def prepare(request: GenerateRequest, spec: MethodSpec) -> None:
        asked.append(request)
        raise StopIteration

    monkeypatch.setattr("svg_models.generation.sample.prepare", prepare)
    names: dict[str, Any] = {"num_frames": 13, "num_inference_steps": 7, "guidance_scale": 2}
    with pytest.raises(StopIteration):
        svg_models.generate("a circle", **names)
    (request,) = asked
    assert (request.frames, request.steps, request.guidance) == (13, 7, 2.0)


def test_numbers_of_numpy_become_those_of_python() -> None:
    request = GenerateRequest(steps=np.int64(7), guidance=np.float32(2.5), seed=np.uint8(3))
    values = (request.steps, request.guidance, request.seed)
    assert values == (7, 2.5, 3)
    assert [type(value) for value in values] == [int, float, int]


def test_read_method_takes_a_name_an_object_or_none() -> None:
    assert read_method(None) == MethodSpec(name="auto")
    assert read_method("svg2@0.25") == MethodSpec(name="svg2", density=0.25)
    assert read_method("svg2", density=0.25) == MethodSpec(name="svg2", density=0.25)
    method = SVG2(q_clusters=3, k_clusters=4, density=0.5)
    spec = read_method(method)
    assert (spec.label, spec.slug) == ("SVG2", "svg2-50")
    assert spec.build(Dense()) is method


def test_compare_takes_objects_and_tells_equal_budgets_apart() -> None:
    wide, narrow = (SVG2(q_clusters=n, k_clusters=8, density=0.3) for n in (4, 2))
    request = CompareRequest(methods=[wide, narrow, SVG1(density=0.3), "svg2"], density=0.3)
    assert [spec.slug for spec in request.specs] == [
        "svg2-30",
        "svg2-30-n2",
        "svg1-30",
        "svg2-30-n3",
    ]
    with pytest.raises(SettingError, match="compared once, got svg2-30 more than once"):
        CompareRequest(methods=[wide, wide])
    with pytest.raises(SettingError, match=r"for methods that name none, and all of them do"):
        CompareRequest(methods=[wide, "svg1@0.4"], density=0.3)
    with pytest.raises(SettingError, match=r"must be a list, such as \['svg2'\]"):
        CompareRequest(methods="svg2")


def test_a_loaded_pipeline_is_not_loaded_again_with_other_options() -> None:
    with pytest.raises(SettingError, match="dtype 'float16' was given beside a pipeline"):
        GenerateRequest(model=SimpleNamespace(geometry=None), dtype="float16")  # type: ignore[arg-type]


def test_every_option_of_the_command_line_says_what_it_is() -> None:
    for kind in (GenerateRequest, CompareRequest):
        for name, about in options_of(kind).items():
            assert about.help.endswith((".", "]")), name


@pytest.mark.parametrize("kind", [GenerateRequest, CompareRequest, TuneRequest])
def test_what_is_true_or_false_is_a_flag_of_the_command_line(kind: type) -> None:
    options = options_of(kind)
    flags = {f.name for f in dataclasses.fields(kind) if isinstance(f.default, bool)}
    assert {name for name, about in options.items() if about.kind is bool} == flags & {*options}


def test_a_request_is_read_without_torch() -> None:
    code = (
        "import sys\n"
        "from svg_models.generation.request import GenerateRequest\n"
        "GenerateRequest('a', method='svg2@0.3', steps=3)\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == 0, done.stderr


def test_dir_shows_what_one_needs() -> None:
    names = dir(svg_models)
    assert {"SVG2", "Schedule", "Dense", "sparsify", "restore", "generate", "compare"} <= set(names)
    assert not any(name.startswith("_") and name != "__version__" for name in names)
    for name in names:
        assert getattr(svg_models, name) is not None
    assert svg_models.sparsify.__name__ == "sparsify"


def test_linears_are_checked_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svg_models.generation.sample.load_pipeline", None)
    with pytest.raises(SettingError, match="linears must be one of bf16, fp8, got 'int8'"):
        svg_models.generate("a circle", linears="int8")
    with pytest.raises(UnsupportedError, match="needs a CUDA device"):
        svg_models.compare("a circle", linears="fp8", device="cpu")


@pytest.mark.parametrize("name", ["negative_prompt", "max_sequence_length"])
def test_prepare_refuses_what_the_pipeline_would_not_read(name: str) -> None:
    class Pipeline:
        def __call__(self, prompt: str) -> None: ...

    unread = dict.fromkeys(field.name for field in dataclasses.fields(LoadedPipeline))
    known = dict(pipe=Pipeline(), name="a model", inputs=Inputs.of(Pipeline), device="cpu")
    loaded = LoadedPipeline(**unread | known | dict(dtype=torch.float32))
    value = {"negative_prompt": "bad", "max_sequence_length": 64}[name]
    with pytest.raises(SettingError, match=f"a model takes no {name}, so it would change nothing"):
        svg_models.generate("a circle", model=loaded, **{name: value})
