"""The plug-in in xDiT 0.7.0: its real registry of attention functions and its real `USP`."""

import collections
import importlib
import logging
import types

import pytest
import torch
import torch.nn.functional as F
from stubs import Stub, install, remove
from torch import nn

from svg_attention import SVG2
from svg_engines import Settings
from svg_engines.xdit import attach

GRID, HEADS, DIM = (3, 8, 8), 2, 16
VIDEO = 3 * 8 * 8
SETTINGS = Settings(
    method=SVG2(q_clusters=3, k_clusters=12, first_iterations=3), density=0.3, min_tokens=0
)


@pytest.fixture
def xfuser(wheel, monkeypatch):
    root = wheel("xfuser==0.7.0", "xfuser/core/distributed/", "xfuser/model_executor/layers/")
    root = root / "xfuser"
    sizes = {"ring": 1}
    packages = types.SimpleNamespace(get_packages_info=lambda: collections.defaultdict(bool))
    state = types.SimpleNamespace(
        attention_backend=None,
        fp8_comms=None,
        runtime_config=types.SimpleNamespace(use_spargeattn_head_balance=False),
    )
    absent = collections.defaultdict(lambda: lambda: None)
    # Sparse attention of others, which these calls do not reach.
    names = (
        "setup_ssta get_sparse_mask untile_ssta_output expand_block_mask setup_sparge "
        "compute_sparge_block_mask restore_sparge_output mask_padded_kv_blocks revert_head_balance"
    )
    anything = dict.fromkeys(names.split())
    anything["apply_head_balance"] = lambda q, k, v, *_, attention_kwargs, **__: (
        q, k, v, False, attention_kwargs,
    )  # fmt: skip
    cache = types.SimpleNamespace(has_cache_entry=lambda layer: False)
    distributed = Stub(
        "d",
        root / "core" / "distributed",
        get_ulysses_parallel_world_size=lambda: 1,
        get_ring_parallel_world_size=lambda: sizes["ring"],
        get_sequence_parallel_world_size=lambda: 1,
        get_sequence_parallel_rank=lambda: 0,
        get_ulysses_parallel_rank=lambda: 0,
        get_runtime_state=lambda: state,
    )
    modules = {
        "xfuser": Stub("xfuser", root),
        "xfuser.envs": Stub(
            "e", PACKAGES_CHECKER=packages, environment_variables=absent, _is_npu=lambda: False
        ),
        "xfuser.logger": Stub("l", init_logger=logging.getLogger),
        "xfuser.compat": Stub("c", version_at_least=lambda *_: True),
        "xfuser.core": Stub("core"),
        "xfuser.core.distributed": distributed,
        "xfuser.core.distributed.ssta": Stub("s", **anything),
        "xfuser.core.distributed.fp8_comms": Any(
            "f", fp8_attention_kwargs=lambda *_, **__: {}, fp8_observe_output=lambda *_: None
        ),
        "xfuser.core.sparge_attention": Stub("s"),
        "xfuser.core.sparge_attention.sparge": Stub("s", **anything),
        "xfuser.core.sparge_attention.head_balance": Stub("h", COST_SINK_KEY="cost", **anything),
        "xfuser.core.cache_manager": Stub("c"),
        "xfuser.core.cache_manager.cache_manager": Stub("c", get_cache_manager=lambda: cache),
        "xfuser.model_executor": Stub("m"),
        "xfuser.model_executor.layers": Stub("l", root / "model_executor" / "layers"),
    }
    tops = install(monkeypatch, modules)
    backend = importlib.import_module("xfuser.core.distributed.attention_backend")
    usp = importlib.import_module("xfuser.model_executor.layers.usp")
    state.attention_backend = backend.AttentionBackendType.SDPA_MATH
    yield types.SimpleNamespace(backend=backend, usp=usp, state=state, sizes=sizes)
    remove(tops)


class Any(Stub):
    """A module that has every name."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class Attention(nn.Module):
    """Calls `USP` as xDiT's Wan processor does."""

    def __init__(self, usp, seed, text=0):
        super().__init__()
        self.usp, self.seed, self.text = usp, seed, text
        self.kwargs = {"thw": None}

    def forward(self, step):
        generator = torch.Generator().manual_seed(100 * step + self.seed)
        q, k, v = torch.randn(3, 1, HEADS, VIDEO, DIM, generator=generator)
        k, v = (t[:, :, : self.text] if self.text else t for t in (k, v))
        out = self.usp(q, k, v, backend=None, attention_kwargs=self.kwargs, head_balance_layer=self,
                       attn_layer=None if self.text else self)  # fmt: skip
        return out, F.scaled_dot_product_attention(q, k, v)


class Block(nn.Module):
    def __init__(self, usp, seed):
        super().__init__()
        self.attn1, self.attn2 = Attention(usp, seed), Attention(usp, seed, text=7)


class Wan(nn.Module):
    config = types.SimpleNamespace(patch_size=(1, 2, 2))

    def __init__(self, usp, layers=2):
        super().__init__()
        self.blocks = nn.ModuleList([Block(usp, seed) for seed in range(layers)])

    def forward(self, hidden_states, timestep, encoder_hidden_states=None):
        step = int(timestep[0])
        return [attn(step) for block in self.blocks for attn in (block.attn1, block.attn2)]


def sample(model, timesteps=range(1000, 0, -100), branches=2):
    outs = {}
    for timestep in timesteps:
        for branch in range(branches):
            rows, columns = 2 * GRID[1], 2 * GRID[2]
            latents = torch.zeros(1, 4, GRID[0], rows, columns)
            found = model(hidden_states=latents, timestep=torch.tensor([float(timestep)]))
            outs |= {(timestep, branch, n): pair for n, pair in enumerate(found)}
    return outs


def sparse_keys(outs):
    return {key for key, (out, full) in outs.items() if not torch.allclose(out, full, atol=1e-5)}


def test_attach_makes_self_attention_sparse_after_the_dense_steps(xfuser):
    model = Wan(xfuser.usp.USP)
    attached = attach(model, num_steps=10, settings=SETTINGS)
    outs = sample(model)
    expected = {(t, b, n) for t in range(700, 0, -100) for b in (0, 1) for n in (0, 2)}
    assert sparse_keys(outs) == expected
    records = attached.generation.records()
    assert len(records) == len(expected)
    assert {r.branch for r in records} == {"branch 0", "branch 1"}


def test_a_rising_timestep_begins_a_new_video(xfuser):
    model = Wan(xfuser.usp.USP)
    attach(model, num_steps=10, settings=SETTINGS)
    first, again = sample(model), sample(model)
    assert all(torch.equal(first[key][0], again[key][0]) for key in first)


def test_two_transformers_count_the_same_steps(xfuser):
    high, low = Wan(xfuser.usp.USP), Wan(xfuser.usp.USP)
    attached = attach(high, low, num_steps=10, settings=SETTINGS)
    sample(high, range(1000, 500, -100), branches=1)
    sample(low, range(500, 0, -100), branches=1)
    names = {r.transformer: {*()} for r in attached.generation.records()}
    for record in attached.generation.records():
        names[record.transformer].add(record.step)
    assert names == {"transformer 0": {3, 4}, "transformer 1": {5, 6, 7, 8, 9}}


def test_detach_puts_everything_back(xfuser):
    registry, name = xfuser.backend.ATTENTION_FUNCTION_REGISTRY, xfuser.state.attention_backend
    before, model = registry[name], Wan(xfuser.usp.USP)
    attached = attach(model, num_steps=10, settings=SETTINGS)
    assert registry[name] == attached.attend
    attached.detach()
    assert registry[name] is before
    assert sparse_keys(sample(model)) == set()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_calls_outside_an_attached_model_are_dense(xfuser):
    attach(Wan(xfuser.usp.USP), num_steps=10, settings=SETTINGS)
    assert sparse_keys(sample(Wan(xfuser.usp.USP))) == set()


def test_masked_calls_stay_dense_with_a_reason_said_once(xfuser, caplog):
    model = Wan(xfuser.usp.USP)
    mask = torch.ones(VIDEO, VIDEO, dtype=torch.bool)
    for block in model.blocks:
        block.attn1.kwargs["attn_mask"] = mask
    attach(model, num_steps=10, settings=SETTINGS)
    with caplog.at_level("WARNING"):
        assert sparse_keys(sample(model)) == set()
    (line,) = [r.getMessage() for r in caplog.records if "Sparse VideoGen" in r.getMessage()]
    assert "masked" in line


def test_attach_refuses_ring_attention_and_other_models(xfuser):
    with pytest.raises(ValueError, match="no blocks with attn1"):
        attach(nn.Linear(2, 2), num_steps=10)
    xfuser.sizes["ring"] = 2
    with pytest.raises(ValueError, match="ring_degree to 1"):
        attach(Wan(xfuser.usp.USP), num_steps=10)
