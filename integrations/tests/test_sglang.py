"""The plug-in in SGLang 0.5.23: its real plug-in loader, hook registry, resolver and backend."""

import ast
import enum
import functools
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

GRID, HEADS, DIM, TEXT = (3, 8, 8), 2, 16, 10
VIDEO = 3 * 8 * 8
GROUP = "sglang.multimodal_gen.plugins"
ENTRIES = read_toml(ROOT / "integrations/svg-engines/pyproject.toml")["project"]["entry-points"]
BACKENDS = "sglang.multimodal_gen.runtime.layers.attention.backends"
BACKEND = f"{BACKENDS}.sparse_video_gen_2_attn"


def kept(path, *names):
    """Return a module of some classes of a file that imports too much to be loaded as a whole."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = [node for node in tree.body if getattr(node, "name", None) in names]
    assert len(nodes) == len(names)
    module = Stub(path.stem, enum=enum, logger=logging.getLogger("cuda"))
    # What stands in annotations is not evaluated.
    code = "from __future__ import annotations\nfrom functools import lru_cache\n"
    exec(compile(ast.Module(ast.parse(code).body + nodes, []), str(path), "exec"), module.__dict__)
    return module


@pytest.fixture
def sglang(wheel, monkeypatch):
    runtime = "sglang/multimodal_gen/runtime"
    root = wheel(
        "sglang==0.5.23",
        "sglang/srt/plugins/",
        f"{runtime}/platforms/",
        f"{runtime}/layers/attention/backends/",
    )
    runtime = root / runtime
    interface = kept(runtime / "platforms" / "interface.py", "AttentionBackendEnum")
    cuda = Stub("cuda", logger=logging.getLogger("cuda"))
    cuda.__dict__["AttentionBackendEnum"] = interface.AttentionBackendEnum
    tree = ast.parse((runtime / "platforms" / "cuda.py").read_text(encoding="utf-8"))
    resolvers = ("_CudaAttentionBackendResolver", "_SparseVideoGen2AttentionBackendResolver")
    nodes = [node for node in tree.body if getattr(node, "name", None) in resolvers]
    future = ast.parse("from __future__ import annotations").body
    exec(compile(ast.Module(future + nodes, []), "cuda.py", "exec"), cuda.__dict__)
    backends = runtime / "layers" / "attention" / "backends"
    envs = types.SimpleNamespace(SGLANG_PLUGINS=types.SimpleNamespace(get=lambda: None))
    modules = {
        "sglang": Stub("sglang", root / "sglang"),
        "sglang.kernels": Stub("k"),
        "sglang.kernels.kernel_api_logging": Stub("l", wrap_method_with_debug_kernel_once=None),
        "sglang.srt": Stub("srt", root / "sglang" / "srt"),
        "sglang.srt.environ": Stub("e", envs=envs),
        "sglang.srt.plugins": Stub("p", root / "sglang" / "srt" / "plugins"),
        "sglang.multimodal_gen": Stub("m"),
        "sglang.multimodal_gen.runtime": Stub("r", runtime),
        "sglang.multimodal_gen.runtime.utils": Stub("u"),
        "sglang.multimodal_gen.runtime.utils.logging_utils": Stub(
            "l", init_logger=logging.getLogger
        ),
        "sglang.multimodal_gen.runtime.platforms": Stub(
            "p",
            runtime / "platforms",
            AttentionBackendEnum=interface.AttentionBackendEnum,
            PLATFORM_PLUGINS_GROUP="sglang.multimodal_gen.platforms",
            get_selected_platform_dist=lambda: None,
        ),
        "sglang.multimodal_gen.runtime.platforms.cuda": cuda,
        "sglang.multimodal_gen.runtime.layers": Stub("l"),
        "sglang.multimodal_gen.runtime.layers.attention": Stub("a"),
        BACKENDS: Stub("b", backends),
    }
    tops = install(monkeypatch, modules)
    monkeypatch.delitem(sys.modules, "svg_engines.sglang", raising=False)
    real = importlib.metadata.entry_points
    ours = [EntryPoint(name, value, GROUP) for name, value in ENTRIES[GROUP].items()]
    for entry in ours:
        vars(entry).update(dist=types.SimpleNamespace(name="svg-engines"))

    def entry_points(**where):
        if where.get("group") == GROUP:
            return ours
        return () if str(where.get("group")).startswith("sglang") else real(**where)

    monkeypatch.setattr("importlib.metadata.entry_points", entry_points)
    yield types.SimpleNamespace(cuda=cuda, load=importlib.import_module)
    remove(tops)
    sys.modules.pop("svg_engines.sglang", None)


@pytest.fixture
def hooked(sglang):
    """Return SGLang with the plug-in found, loaded and its hooks applied, as a worker does."""
    plugins = sglang.load("sglang.multimodal_gen.runtime.platforms.plugins")
    plugins.load_plugins()
    plugins.apply_plugin_hooks()
    return sglang


def make_layers(sglang, count=2):
    path = sglang.cuda._SparseVideoGen2AttentionBackendResolver.resolve(None)
    module, _, name = path.rpartition(".")
    backend = getattr(sglang.load(module), name)
    impl = backend.get_impl_cls()
    layers = [
        impl(num_heads=HEADS, head_size=DIM, causal=False, softmax_scale=DIM**-0.5,
             prefix=f"blocks.{n}.attn1.impl")
        for n in range(count)
    ]  # fmt: skip
    return backend, layers


def metadata(backend, cache, timestep, text=0, prompt=None, **settings):
    values = {
        "num_q_centroids": 3,
        "num_k_centroids": 12,
        "top_p_kmeans": 0.5,
        "min_kc_ratio": 0.1,
        "kmeans_iter_init": 3,
        "kmeans_iter_step": 2,
        "zero_step_kmeans_init": False,
        "first_layers_fp": 0,
        "first_times_fp": 899.0,
    }
    return backend.get_builder_cls()().build(
        current_timestep=timestep,
        raw_latent_shape=(1, 4, 3, 16, 16),
        patch_size=(1, 2, 2),
        cache=cache,
        context_length=text,
        prompt_length=prompt,
        **(values | settings),
    )


def run(
    sglang, backend, layers, timesteps=(1000, 900, 800, 700), branches=2, tokens=None, **kwargs
):
    module = sglang.load(BACKEND)
    cache, outs = module.Svg2Cache(), {}
    for timestep in timesteps:
        for branch in range(branches):
            data = metadata(backend, cache, timestep, **kwargs)
            for n, layer in enumerate(layers):
                generator = torch.Generator().manual_seed(timestep + 10 * branch + n)
                size = (3, 1, tokens or VIDEO + kwargs.get("text", 0), HEADS, DIM)
                q, k, v = torch.randn(size, generator=generator)
                full = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
                outs[timestep, branch, n] = layer.forward(q, k, v, data), full.transpose(1, 2)
    held = getattr(cache, "_sparse_videogen", None)
    return outs, [] if held is None else held.records()


def dense_keys(outs):
    return {key for key, (out, full) in outs.items() if torch.allclose(out, full, atol=1e-5)}


def test_without_the_plug_in_the_backend_asks_for_the_package_svg(sglang):
    with pytest.raises(ImportError, match="is not installed"):
        sglang.cuda._SparseVideoGen2AttentionBackendResolver.resolve(None)


def test_register_imports_nothing_of_the_runtime(sglang):
    plugins = sglang.load("sglang.multimodal_gen.runtime.platforms.plugins")
    plugins.load_plugins()
    assert BACKEND not in sys.modules
    assert len(plugins.HookRegistry._hooks) == 3


def test_hooks_are_applied_to_all_their_targets(hooked):
    plugins = hooked.load("sglang.multimodal_gen.runtime.platforms.plugins")
    assert plugins.HookRegistry._patched == {*plugins.HookRegistry._hooks}
    backend, layers = make_layers(hooked)
    assert backend.get_enum().name == "SPARSE_VIDEO_GEN_2_ATTN"
    assert [layer.layer_idx for layer in layers] == [0, 1]
    assert isinstance(layers[0], hooked.load(BACKEND).SparseVideoGen2AttentionImpl)


def test_a_generation_is_dense_above_the_timestep_and_sparse_below(hooked):
    outs, records = run(hooked, *make_layers(hooked))
    assert dense_keys(outs) == {(t, b, n) for t in (1000, 900) for b in (0, 1) for n in (0, 1)}
    assert len(records) == 2 * 2 * 2
    assert all(record.density < 0.9 for record in records)
    assert {(record.step, record.branch) for record in records} == {
        (step, f"branch {branch}") for step in (0, 1) for branch in (0, 1)
    }


def test_first_layers_stay_dense(hooked):
    _, records = run(hooked, *make_layers(hooked), first_layers_fp=1)
    assert {record.layer for record in records} == {1}


def test_memory_is_of_one_request(hooked):
    backend, layers = make_layers(hooked)
    first, _ = run(hooked, backend, layers)
    again, _ = run(hooked, backend, layers)
    assert all(torch.equal(first[key][0], again[key][0]) for key in first)


def test_text_behind_the_video_is_read_and_its_padding_is_not(hooked):
    backend, layers = make_layers(hooked, count=1)
    outs, records = run(hooked, backend, layers, timesteps=[700], branches=1, text=TEXT, prompt=4)
    assert records[0].tokens == VIDEO + TEXT
    generator = torch.Generator().manual_seed(700)
    q, k, v = torch.randn(3, 1, VIDEO + TEXT, HEADS, DIM, generator=generator)
    used = slice(0, VIDEO + 4)
    valid = F.scaled_dot_product_attention(*(t[:, used].transpose(1, 2) for t in (q, k, v)))
    out = outs[700, 0, 0][0]
    torch.testing.assert_close(
        out[:, VIDEO : VIDEO + 4], valid.transpose(1, 2)[:, VIDEO:], rtol=1e-4, atol=1e-5
    )


def test_top_p_of_1_equals_dense_attention(hooked):
    outs, records = run(hooked, *make_layers(hooked), top_p_kmeans=1.0)
    assert dense_keys(outs) == {*outs}
    assert len(records) == 8


def test_tokens_that_are_not_the_video_stay_dense_with_a_reason_said_once(hooked, caplog):
    with caplog.at_level("WARNING"):
        outs, records = run(hooked, *make_layers(hooked), tokens=VIDEO - 8)
    assert dense_keys(outs) == {*outs}
    assert records == []
    (line,) = [r.getMessage() for r in caplog.records if "Sparse VideoGen" in r.getMessage()]
    assert "184 tokens are not 192 of video and 0 of text" in line


def test_initialize_refuses_causal_layers(hooked):
    backend, _ = make_layers(hooked)
    make = functools.partial(
        backend.get_impl_cls(), HEADS, DIM, softmax_scale=0.25, prefix="blocks.0.attn1.impl"
    )
    with pytest.raises(ValueError, match="no causal attention"):
        make(causal=True)
