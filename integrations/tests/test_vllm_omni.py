"""The plug-in in vLLM-Omni 0.30.0: its real registry, layer, context, SDPA and plug-in loader."""

import ast
import dataclasses
import importlib
import logging
import sys
import types
from importlib.metadata import EntryPoint

import pytest
import torch
import torch.nn.functional as F
from distributions import ROOT, read_toml
from stubs import Stub, install, remove

from svg_attention import SVG2

GRID, HEADS, DIM, LAYERS = (3, 8, 8), 2, 16, 2
VIDEO = 3 * 8 * 8
FEW_ROUNDS = SVG2(compensate=True, first_iterations=3)
NAMES = read_toml(ROOT / "integrations/svg-engines/pyproject.toml")["project"]["entry-points"]


def platform(npu=False):
    kinds = {f"is_{kind}": (lambda k=kind: k == ("npu" if npu else "cuda")) for kind in
             ("rocm", "cuda", "npu", "xpu", "musa")}  # fmt: skip
    return types.SimpleNamespace(
        **kinds, device_name="cuda", supports_diffusion_dense_flash_attention=lambda: False
    )


@pytest.fixture
def omni(wheel, monkeypatch):
    """Return a way to import the real modules; what is below them and needs a GPU is stubbed."""
    root = wheel("vllm-omni==0.30.0", "vllm_omni/diffusion/", "vllm_omni/plugins/") / "vllm_omni"
    attention = root / "diffusion" / "attention"

    def resolve(path):
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)

    def index_of(prefix):
        return int(prefix.split(".")[1])

    def metadata_of(_):
        return types.SimpleNamespace(attention_mask_free=True)

    chosen = {}

    def backend_for_role(role, **_):
        registry = importlib.import_module("vllm_omni.diffusion.attention.backends.registry")
        return registry.DiffusionAttentionBackendEnum["RAINFUSION_ATTN"].get_class(), chosen["spec"]

    strategy = Stub("strategy")
    modules = {
        "vllm": Stub("vllm"),
        "vllm.logger": Stub("l", init_logger=logging.getLogger),
        "vllm.utils": Stub("u"),
        "vllm.utils.import_utils": Stub("i", resolve_obj_by_qualname=resolve),
        "vllm.envs": Stub("e", VLLM_PLUGINS=None),
        "vllm.ir": Stub("ir"),
        "vllm.plugins": Stub("p", load_general_plugins=lambda: None),
        "vllm.config": Stub("c", VllmConfig=object, set_current_vllm_config=None),
        "vllm.model_executor": Stub("m"),
        "vllm.model_executor.models": Stub("m"),
        "vllm.model_executor.models.utils": Stub("m", extract_layer_index=index_of),
        "vllm.v1": Stub("v"),
        "vllm.v1.kv_cache_interface": Stub("k", FullAttentionSpec=object, KVCacheSpec=object),
        "vllm_omni": Stub("vllm_omni", root),
        "vllm_omni.platforms": Stub("p", current_omni_platform=platform()),
        "vllm_omni.diffusion": Stub("d", root / "diffusion"),
        "vllm_omni.diffusion.data": Stub("d", OmniDiffusionConfig=object),
        "vllm_omni.diffusion.model_metadata": Stub(
            "m", get_diffusion_model_metadata=metadata_of
        ),
        "vllm_omni.diffusion.attention": Stub("a", attention),
        "vllm_omni.diffusion.attention.backends": Stub("b", attention / "backends"),
        "vllm_omni.diffusion.attention.backends.utils": Stub("u", attention / "backends" / "utils"),
        "vllm_omni.diffusion.attention.selector": Stub(
            "s", get_attn_backend_for_role=backend_for_role
        ),
        "vllm_omni.diffusion.attention.parallel": Stub(
            "p", attention / "parallel", build_parallel_attention_strategy=lambda **_: strategy
        ),
        "vllm_omni.diffusion.attention.parallel.ring": Stub("r", RingParallelAttention=object),
        "vllm_omni.diffusion.diffusion_kv": Stub("kv"),
        "vllm_omni.diffusion.diffusion_kv.config": Stub(
            "c", DiffusionKVCacheMode=types.SimpleNamespace(DENSE_LEGACY=0, PAGED_SCHEDULER=1)
        ),
        "vllm_omni.diffusion.diffusion_kv.layout": Stub("l", assert_backend_layout_supported=None),
        "vllm_omni.diffusion.distributed": Stub("d"),
        "vllm_omni.diffusion.distributed.parallel_state": Stub("s", get_sp_group=None),
    }  # fmt: skip
    tops = install(monkeypatch, modules)
    for name in [n for n in sys.modules if n.startswith("svg_engines.vllm_omni")]:
        monkeypatch.delitem(sys.modules, name)
    entries = [EntryPoint(n, v, group) for group, names in NAMES.items() for n, v in names.items()]
    real = importlib.metadata.entry_points

    def entry_points(**where):
        ours = [entry for entry in entries if entry.group == where.get("group")]
        return ours or real(**where)

    monkeypatch.setattr("importlib.metadata.entry_points", entry_points)
    yield types.SimpleNamespace(
        load=lambda name: importlib.import_module(f"vllm_omni.{name}"), chosen=chosen, root=root,
        modules=modules,
    )  # fmt: skip
    remove({*tops} | {"svg_engines.vllm_omni"})
    for name in [n for n in sys.modules if n.startswith("svg_engines.vllm_omni")]:
        del sys.modules[name]


def spec_of(omni, **block_sparse):
    """Return the real `AttentionSpec`, whose module imports too much to be loaded as a whole."""
    tree = ast.parse((omni.root / "diffusion" / "data.py").read_text(encoding="utf-8"))
    wanted = {"AttentionSpec", "BlockSparseSpec", "RainFusionPrecision", "SkipSoftmaxSpec",
              "AttnQuantSpec", "BLOCK_SPARSE_BACKENDS", "_in_range"}  # fmt: skip
    kept = [
        node
        for node in tree.body
        if getattr(node, "name", None) in wanted
        or (isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in wanted)
    ]
    module = types.ModuleType("kept")
    sys.modules["kept"] = module
    exec(
        "from __future__ import annotations\nfrom dataclasses import dataclass, field\n"
        "from enum import Enum\nfrom typing import Any, ClassVar\n"
        "from collections.abc import Mapping\nimport math\n"
        "def parse_kv_cache_skip_selector(x): return {int(n) for n in (x or [])}\n",
        module.__dict__,
    )
    exec(compile(ast.Module(kept, []), "data.py", "exec"), module.__dict__)
    try:
        return module.AttentionSpec(backend="RAINFUSION_ATTN", block_sparse=block_sparse)
    finally:
        del sys.modules["kept"]


def start(omni):
    omni.load("plugins").load_omni_general_plugins()


def make_layers(omni, count=LAYERS, **block_sparse):
    """Return the real `Attention` layers of a model, made as Wan makes its own."""
    omni.chosen["spec"] = spec_of(omni, **block_sparse)
    attention = omni.load("diffusion.attention.layer").Attention
    made = [
        attention(
            num_heads=HEADS, head_size=DIM, num_kv_heads=HEADS, softmax_scale=DIM**-0.5,
            causal=False, role="self", qkv_layout="BSND", prefix=f"blocks.{n}.attn1",
        )
        for n in range(count)
    ]  # fmt: skip
    for layer in made:
        ours = layer.attention.layer
        ours.settings = dataclasses.replace(ours.settings, min_tokens=0, method=FEW_ROUNDS)
    return made


def generate(
    omni, layers, steps=range(6), total=None, branches=2, mask=None, layout=True, tokens=VIDEO
):
    """Run calls as a pipeline does: one context a request, a step, a branch, the layers in turn."""
    context_module = omni.load("diffusion.forward_context")
    abstract = omni.load("diffusion.attention.backends.abstract")
    config = types.SimpleNamespace(parallel_config=types.SimpleNamespace(sequence_parallel_size=1))
    video = abstract.VideoTokenLayout(prefix_len=tokens - VIDEO, latent_grid=GRID, used_len=tokens)
    outs = {}
    with context_module.set_forward_context(omni_diffusion_config=config):
        for step in steps:
            context_module.DenoiseProgressMixin().record_denoise_step(step, total_steps=total)
            for branch in range(branches):
                for n, layer in enumerate(layers):
                    generator = torch.Generator().manual_seed(100 * step + 10 * branch + n)
                    q, k, v = torch.randn(3, 1, tokens, HEADS, DIM, generator=generator)
                    metadata = abstract.AttentionMetadata(
                        attn_mask=mask, video_layout=video if layout else None
                    )
                    outs[step, branch, n] = layer(q, k, v, metadata), dense(q, k, v)
        held = getattr(context_module.get_forward_context(), "_sparse_videogen", None)
    return outs, [] if held is None else held[0].records()


def dense(q, k, v):
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def test_register_takes_one_name_and_is_idempotent(omni):
    start(omni)
    registry = omni.load("diffusion.attention.backends.registry")
    omni.load("plugins").omni_plugins_loaded = False
    start(omni)
    members = registry.DiffusionAttentionBackendEnum
    assert [m.name for m in members if m.is_overridden()] == ["RAINFUSION_ATTN"]
    backend = members.RAINFUSION_ATTN.get_class()
    assert backend.get_name() == "SPARSE_VIDEO_GEN"
    assert backend.supports_head_size(128)
    assert backend.supports_attention_mask()
    backend.validate_available()


def test_register_leaves_the_name_to_npus(omni, monkeypatch):
    monkeypatch.setattr(
        omni.modules["vllm_omni.platforms"], "current_omni_platform", platform(npu=True)
    )
    start(omni)
    members = omni.load("diffusion.attention.backends.registry").DiffusionAttentionBackendEnum
    assert not any(m.is_overridden() for m in members)


def test_a_generation_is_sparse_from_start_step_on(omni):
    start(omni)
    layers = make_layers(omni, sparsity=0.7, start_step=2)
    outs, records = generate(omni, layers)
    same = {key for key, (out, full) in outs.items() if torch.allclose(out, full, atol=1e-5)}
    assert same == {(s, b, n) for s in (0, 1) for b in (0, 1) for n in range(LAYERS)}
    assert len(records) == 4 * 2 * LAYERS
    assert all(0.1 < record.density < 0.5 for record in records)
    assert {record.branch for record in records} == {"branch 0", "branch 1"}


def test_memory_is_of_one_request(omni):
    start(omni)
    layers = make_layers(omni, sparsity=0.7, start_step=1)
    first, _ = generate(omni, layers, steps=range(3))
    again, _ = generate(omni, layers, steps=range(3))
    assert all(torch.equal(first[key][0], again[key][0]) for key in first)


def test_layers_and_last_steps_stay_dense_as_asked(omni):
    start(omni)
    layers = make_layers(omni, sparsity=0.7, start_step=1, end_step=1, skip_layers=[1])
    _, records = generate(omni, layers, steps=range(4), total=4, branches=1)
    assert {record.step for record in records} == {1, 2}
    assert {record.layer for record in records} == {0}


def test_text_before_the_video_is_read_by_all(omni):
    start(omni)
    layers = make_layers(omni, count=1, sparsity=0.7, start_step=1)
    outs, records = generate(omni, layers, steps=[1], branches=1, tokens=VIDEO + 10)
    assert records[0].tokens == VIDEO + 10
    out, full = outs[1, 0, 0]
    assert torch.allclose(out[:, :10], full[:, :10], atol=1e-5)


def test_total_steps_make_start_step_unnecessary(omni):
    start(omni)
    layers = make_layers(omni, count=1, sparsity=0.7)
    _, records = generate(omni, layers, steps=range(10), total=10, branches=1)
    assert {record.step for record in records} == {*range(3, 10)}


@pytest.mark.parametrize(
    ("settings", "kwargs", "sentence"),
    [
        ({}, {}, "set start_step"),
        ({"start_step": 1}, {"layout": False}, "publishes no video_layout"),
        ({"start_step": 1}, {"steps": [None]}, "which step this is"),
    ],
)
def test_calls_stay_dense_with_a_reason_said_once(omni, settings, kwargs, sentence, caplog):
    start(omni)
    layers = make_layers(omni, sparsity=0.7, **settings)
    seeds = {"steps": range(3)} | kwargs
    with caplog.at_level("WARNING"):
        outs, records = generate_unknown(omni, layers, **seeds)
    assert records == []
    assert all(torch.allclose(out, full, atol=1e-5) for out, full in outs.values())
    lines = [r.getMessage() for r in caplog.records if "Sparse VideoGen" in r.getMessage()]
    assert len(lines) == 1
    assert sentence in lines[0]


def generate_unknown(omni, layers, steps, **kwargs):
    if [*steps] != [None]:
        return generate(omni, layers, steps=steps, **kwargs)
    context_module = omni.load("diffusion.forward_context")
    original = context_module.DenoiseProgressMixin.record_denoise_step
    context_module.DenoiseProgressMixin.record_denoise_step = lambda *_, **__: None
    try:
        return generate(omni, layers, steps=[3], **kwargs)
    finally:
        context_module.DenoiseProgressMixin.record_denoise_step = original


def test_masked_calls_are_computed_densely_with_their_mask(omni, caplog):
    start(omni)
    layers = make_layers(omni, count=1, sparsity=0.7, start_step=1)
    mask = torch.ones(1, VIDEO, dtype=torch.bool)
    mask[:, -20:] = False
    outs, records = generate(omni, layers, steps=[2], branches=1, mask=mask)
    assert records == []
    out, full = outs[2, 0, 0]
    assert not torch.allclose(out, full, atol=1e-3)


def test_settings_from_refuses_a_precision(omni):
    start(omni)
    with pytest.raises(ValueError, match="precision must be 'bf16'"):
        make_layers(omni, sparsity=0.7, precision="fp8")


# The unreleased function form; `merge_sparse_params` gives one flat dictionary.


def call(omni, step, generator, context_step=True, **params):
    from svg_engines.vllm_omni import attend

    context = omni.load("diffusion.forward_context").get_forward_context()
    if context_step:
        context.denoise_step_idx, context.total_denoise_steps = step, 10
    q, k, v = torch.randn(3, 1, VIDEO, HEADS, DIM, generator=generator)
    given = {"density": 0.3, "min_tokens": 0, "some_kernel": 1} | params
    return attend(q, k, v, given, is_causal=False, softmax_scale=DIM**-0.5), dense(q, k, v)


GEOMETRIES = (
    {"total_latent_frames": 3, "patches_per_frame": 64},
    {"latent_shape": torch.tensor([[3, 16, 16]]), "patch_size": torch.tensor([[1, 2, 2]])},
)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=["derived", "raw"])
def test_attend_is_sparse_as_a_function(omni, geometry):
    generator = torch.Generator().manual_seed(3)
    with omni.load("diffusion.forward_context").set_forward_context():
        for step in range(5):
            for _ in range(2):
                out, full = call(omni, step, generator, **geometry)
                assert torch.allclose(out, full, atol=1e-5) == (step < 3)


def test_attend_reads_the_step_of_params_as_tensors(omni):
    state = {"denoise_step_idx": torch.tensor([5]), "total_denoise_steps": torch.tensor([10])}
    with omni.load("diffusion.forward_context").set_forward_context():
        params = GEOMETRIES[0] | state
        out, full = call(omni, 5, torch.Generator().manual_seed(1), context_step=False, **params)
    assert not torch.allclose(out, full, atol=1e-3)


def test_attend_honours_a_mask_that_it_advertises(omni):
    from svg_engines.vllm_omni import attend

    assert attend.capabilities == {"supports_attention_mask": True}
    mask = torch.zeros(1, VIDEO, dtype=torch.bool)
    mask[:, 7] = True
    with omni.load("diffusion.forward_context").set_forward_context():
        generator = torch.Generator().manual_seed(1)
        out, _ = call(omni, 5, generator, attn_mask=mask, **GEOMETRIES[0])
    assert torch.equal(out, out[:, :1].expand_as(out))  # every query reads the one key


def test_attend_refuses_layers_which_it_is_not_told(omni):
    with omni.load("diffusion.forward_context").set_forward_context():
        with pytest.raises(ValueError, match="needs the backend"):
            call(omni, 5, torch.Generator(), dense_layers=[0], **GEOMETRIES[0])
