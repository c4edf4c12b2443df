"""Everything else that diffusers can do to a model, together with a sparse run.

Each feature is set up on a stock pipeline and on a sparse one whose calls are all dense: the two
must agree to the last bit, whether the feature comes before `sparsify` or after it. Then the same
with a sparse method, which must agree with itself without the feature where the feature is exact.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from torch import Tensor

from svg_attention import SVG2, Dense, Schedule
from svg_models import sparsify

pytestmark = pytest.mark.usefixtures("one_thread")
ALWAYS_SPARSE = Schedule(dense_steps=0.0, dense_layers=0.0)
SPARSE = SVG2(q_clusters=6, k_clusters=12, top_p=0.6, first_iterations=2)


def lora(pipe: Any) -> None:
    from peft import LoraConfig

    torch.manual_seed(11)
    layers = ["to_q", "to_k", "to_v", "to_out.0"]
    config = LoraConfig(r=2, target_modules=layers, init_lora_weights=False)
    pipe.transformer.add_adapter(config)


def fused(pipe: Any) -> None:
    pipe.transformer.fuse_qkv_projections()


def sequential_offload(pipe: Any) -> None:
    from accelerate import cpu_offload

    cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))
    assert pipe.transformer.blocks[0].attn1.norm_q.weight.device.type == "meta"


def group_offload(kind: str) -> Callable[[Any], None]:
    def apply(pipe: Any) -> None:
        pipe.transformer.enable_group_offload(
            onload_device=torch.device("cpu"),
            offload_device=torch.device("cpu"),
            offload_type=kind,
            num_blocks_per_group=1,
        )

    return apply


def layerwise_casting(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )


def named_backend(pipe: Any) -> None:
    for block in pipe.transformer.blocks:
        block.attn1.set_attention_backend("_native_math")


EXACT = {
    "LoRA": lora,
    "fused projections": fused,
    "sequential offload": sequential_offload,
    "group offload, blocks": group_offload("block_level"),
    "group offload, leaves": group_offload("leaf_level"),
    "fp8 layerwise casting": layerwise_casting,
    "attention backend": named_backend,
}

CACHES = {
    "FirstBlockCache": lambda pipe: FirstBlockCacheConfig(threshold=0.5),
    "MagCache": lambda pipe: MagCacheConfig(
        num_inference_steps=6, mag_ratios=[1.0] * 6, threshold=0.9, retention_ratio=0.2
    ),
    "PAB": lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 950),
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
    "TaylorSeer": lambda pipe: TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=1, cache_identifiers=[r"blocks\.\d+\.attn1"]
    ),
}


def stock(feature: Callable[[Any], None], **settings: Any) -> Tensor:
    pipe = tiny.pipeline()
    feature(pipe)
    return tiny.generate(pipe, **settings)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("order", ["feature first", "sparsify first"])
def test_dense_bits_agree_and_sparse_runs(name: str, order: str) -> None:
    feature = EXACT[name]
    reference = stock(feature, num_inference_steps=2)
    results = []
    for method in (Dense(), SPARSE):
        pipe = tiny.pipeline()
        if order == "feature first":
            feature(pipe)
        with sparsify(pipe, method, ALWAYS_SPARSE) as run:
            if order == "sparsify first":
                feature(pipe)
            results.append(tiny.generate(pipe, num_inference_steps=2))
            assert run.messages == ()
        again = tiny.generate(pipe, num_inference_steps=2)
        assert torch.equal(again, reference), "the feature is lost after restore"
    dense, sparse = results
    assert torch.equal(dense, reference)
    assert torch.isfinite(sparse).all()
    assert not torch.equal(sparse, reference)
    assert run.stats().mean_density < 1.0


@pytest.mark.parametrize("name", CACHES)
def test_caches_that_skip_calls(name: str) -> None:
    def enable(pipe: Any) -> None:
        pipe.transformer.enable_cache(CACHES[name](pipe))

    reference = stock(enable, num_inference_steps=6)
    pipe = tiny.pipeline()
    with sparsify(pipe, Dense(), ALWAYS_SPARSE) as run:
        enable(pipe)
        assert torch.equal(tiny.generate(pipe, num_inference_steps=6), reference)
        assert 0 < len(run.stats().records) < 6 * 2 * 3
    assert torch.equal(tiny.generate(pipe, num_inference_steps=6), reference)
    with sparsify(pipe, SPARSE, ALWAYS_SPARSE) as run:
        video = tiny.generate(pipe, num_inference_steps=6)
        pipe.transformer.disable_cache()
        tiny.generate(pipe, num_inference_steps=6)
        assert len(run.stats().records) == 6 * 2 * 3
    assert torch.isfinite(video).all()


def test_model_offloading_through_the_pipeline() -> None:
    reference = tiny.generate(tiny.pipeline(), num_inference_steps=2)
    pipe = tiny.pipeline()
    with sparsify(pipe, Dense(), ALWAYS_SPARSE) as run:
        pipe.enable_model_cpu_offload(device="cpu")
        for _ in range(2):  # the pipeline sets its hooks anew after each video
            assert torch.equal(tiny.generate(pipe, num_inference_steps=2), reference)
            assert len(run.stats().records) == 12
    assert torch.equal(tiny.generate(pipe, num_inference_steps=2), reference)


def graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


@pytest.fixture
def fresh_compiler() -> Any:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


def test_repeated_blocks_compile_to_one_graph(fresh_compiler: None) -> None:
    model, inputs = tiny.transformer(num_layers=10), tiny.forward_inputs()

    def forward(step: int) -> Tensor:
        with torch.no_grad(), model.cache_context("cond", step_index=step, num_inference_steps=4):
            return model(**inputs)[0]

    expected = forward(0)
    with sparsify(model, SPARSE, ALWAYS_SPARSE):
        eager = [forward(step) for step in range(2)]
    with sparsify(model, SPARSE, Schedule(dense_steps=0.5, dense_layers=0.0)) as run:
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(forward(0), expected, rtol=0.0, atol=1e-6)
        forward(1), forward(2), forward(3)  # steps 2 and 3 are sparse
        assert graphs() == 1
        assert {r.method for r in run.stats().records if r.step == 3} == {"SVG2"}
    with sparsify(model, SPARSE, ALWAYS_SPARSE):
        compiled = [forward(step) for step in range(2)]
    for mine, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(forward(0), expected, rtol=0.0, atol=1e-6)


def test_a_wholly_compiled_pipeline(fresh_compiler: None) -> None:
    pipe = tiny.pipeline()
    reference = tiny.generate(pipe, num_inference_steps=2)
    pipe.transformer = torch.compile(pipe.transformer, backend="aot_eager")
    with sparsify(pipe, Dense(), ALWAYS_SPARSE) as run:
        video = tiny.generate(pipe, num_inference_steps=2)
        assert [record.step for record in run.stats().records] == [0] * 6 + [1] * 6
    torch.testing.assert_close(video, reference, rtol=0.0, atol=1e-5)


def test_the_operator_is_well_formed() -> None:
    class Answer:
        def attend(self, slot: int, query: Tensor, *others: Tensor) -> Tensor:
            return query.flip(1) * slot

    from svg_models import operator

    answer = Answer()
    handle = operator.make_handle(operator.register(answer), 3)
    query, key, value = torch.randn(3, 2, 7, 2, 4).unbind(0)
    assert torch.equal(operator.attention(query, key, value, handle), query.flip(1) * 3)
    torch.library.opcheck(
        torch.ops.svg_models.self_attention.default,
        (query, key, value, handle),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


ULYSSES = Path(__file__).parent / "ulysses.py"


def test_two_processes_share_the_heads_and_ring_attention_is_refused() -> None:
    if not torch.distributed.is_available():
        pytest.skip("torch was built without distributed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(ULYSSES)],
            env=environment | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    for rank, output in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, output
        assert "agrees" in output
