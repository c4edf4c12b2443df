import itertools
import json
import logging

import pytest
import torch
from distributions import ROOT

from svg_attention import SVG2, Schedule, TokenLayout
from svg_engines import Generation, Reasons, Settings
from svg_engines.settings import PRESETS, layers

LAYOUT = TokenLayout(grid=(3, 8, 8))
TABLE = "packages/svg-models/src/svg_models/presets/presets.json"


def few(**settings):
    method = SVG2(q_clusters=3, k_clusters=12, first_iterations=2)
    return Settings(method=method, density=0.3, min_tokens=0, **settings)


SETTINGS = few()


def attend(generation, tokens=192, dtype=torch.float32, **kwargs):
    generator = torch.Generator().manual_seed(1)
    tensors = torch.randn(3, 1, 2, tokens, 16, generator=generator).to(dtype)
    call = {"layout": LAYOUT, "step": 5, "num_steps": 10, "layer": 0} | kwargs
    return generation.attend(*tensors, **call)


def is_sparse(settings, **kwargs):
    return attend(Generation(settings, Reasons("test")), **kwargs) is not None


def suits(row, **clip):
    return all(low <= clip[name] <= high for name, (low, high) in row.get("conditions", {}).items())


def test_presets_are_those_of_svg_models():
    table = json.loads((ROOT / TABLE).read_text(encoding="utf-8"))["presets"]
    assert [*table] == [*PRESETS]
    for name, steps in itertools.product(PRESETS, (1, 4, 5, 6, 8, 9, 50)):
        rows = [row for row in table[name] if suits(row, steps=steps, tokens=75_600, width=5_120)]
        found = SVG2(**rows[0]["settings"]), Schedule.from_dict(rows[0]["schedule"])
        assert rows[0]["method"] == "SVG2"
        chosen = Settings(preset=name).choose(num_steps=steps)
        assert found == chosen, f"change svg_engines.settings.PRESETS[{name!r}], too"
    for name in PRESETS:
        usual = Settings(preset=name)
        assert usual.choose(num_steps=None) == usual.choose(num_steps=50)


def test_choose_leaves_few_steps_dense_unless_something_is_asked_for():
    assert Settings().choose(num_steps=8) is None
    assert Settings().choose(num_steps=9) == Settings(preset="balanced").choose(num_steps=9)
    method, schedule = Settings(density=0.4).choose(num_steps=4)
    assert (method.density, schedule) == (0.4, Schedule.sparse())
    assert Settings(method=SVG2(density=0.3)).choose(num_steps=4)[0] == SVG2(density=0.3)


def test_attend_says_what_to_ask_for_where_steps_are_few(caplog):
    generation = Generation(Settings(min_tokens=0), Reasons("test"))
    with caplog.at_level(logging.WARNING):
        assert attend(generation, num_steps=8) is None
    assert "8 steps are few; name a preset or a density" in caplog.text


@pytest.mark.parametrize(
    ("settings", "dense"),
    [
        (SETTINGS, {0, 1, 2}),
        (few(dense_steps=0.0), set()),
        (few(dense_steps=0.25), {0, 1}),
        (few(start_step=1), {0}),
        (few(start_step=1, end_steps=2), {0, 8, 9}),
        (few(dense_steps=0.0, end=0.8), {9}),
        (few(dense_layers=frozenset({0})), {*range(10)}),
    ],
)
def test_attend_is_dense_in_the_steps_and_layers_asked_for(settings, dense):
    assert {step for step in range(10) if not is_sparse(settings, step=step)} == dense


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"tokens": 100}, "100 tokens are not the 192 of a video of (3, 8, 8)"),
        ({"step": None}, "which step this is"),
        ({"num_steps": None}, "set start_step"),
        ({"dtype": torch.float64}, "torch.float64"),
    ],
)
def test_attend_says_once_why_it_declines(kwargs, sentence, caplog):
    generation = Generation(SETTINGS, Reasons("test"))
    with caplog.at_level(logging.WARNING):
        assert attend(generation, **kwargs) is None
        assert attend(generation, **kwargs) is None
    (record,) = caplog.records
    assert sentence in record.getMessage()


def test_attend_needs_no_number_of_steps_where_the_first_sparse_one_is_named():
    settings = few(start_step=4)
    assert is_sparse(settings, num_steps=None, step=4)
    assert not is_sparse(settings, num_steps=None, step=3)


def test_branch_numbers_the_calls_of_a_step():
    generation = Generation(SETTINGS, Reasons("test"))
    calls = [(0, 0), (0, 1), (0, 0), (0, 1), (1, 0), (1, 0)]
    names = [generation.branch(step, "t", layer) for step, layer in calls]
    assert [name[-1] for name in names] == ["0", "0", "1", "1", "0", "1"]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"preset": "best"}, "quality, balanced, fast"),
        ({"density": 1.5}, "density must be"),
        ({"dense_steps": -0.1}, "dense_steps must be a share"),
        ({"min_tokens": -1}, "min_tokens must not be negative"),
    ],
)
def test_settings_refuses_what_is_out_of_range(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        Settings(**wrong)


def test_from_mapping_names_what_it_does_not_know():
    with pytest.raises(ValueError, match="unknown setting 'sparsity'; known are preset, density"):
        Settings.from_mapping({"sparsity": 0.7})
    assert Settings.from_mapping({"dense_layers": "0, 2-3"}).dense_layers == {0, 2, 3}


@pytest.mark.parametrize("text", ["a", "1-", "-1", "1-2-3", "0.5"])
def test_layers_refuses_what_names_none(text):
    with pytest.raises(ValueError, match="expected layers"):
        layers(text)


@pytest.mark.gpu
def test_attend_on_a_gpu_is_near_dense_attention_where_most_is_read(device, generator):
    """Peaked attention, of which SVG2 with compensation finds nearly all at half of the pairs."""
    layout = TokenLayout(grid=(8, 32, 32), text_tokens=256, text_position="first")
    settings = Settings(density=0.5, dense_steps=0.0, min_tokens=0)
    generation = Generation(settings, Reasons("test"))
    shape = (1, 4, layout.tokens, 128)
    centers = torch.randn(1, 4, 16, 128, generator=generator, device=device)
    labels = torch.randint(16, (layout.tokens,), generator=generator, device=device)
    noise = torch.randn(3, *shape, generator=generator, device=device)
    query, key, value = (3 * centers[:, :, labels] + noise).bfloat16()
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    for step in range(3):
        out = generation.attend(query, key, value, layout=layout, step=step, num_steps=3, layer=0)
        assert out is not None
        error = (out.float() - exact.float()).norm() / exact.float().norm()
        assert error < 0.02, f"step {step}: {error:.3f}"
    assert all(0.4 < record.density < 0.6 for record in generation.records())
