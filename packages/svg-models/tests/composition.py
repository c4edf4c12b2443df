"""Features of diffusers together with a sparse run, family by family.

Used by the tests, which run the quick cells, and by `tools/composition_matrix.py`, which runs all
of them and writes the table of the documentation.
"""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import zoo
from diffusers import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.models.attention_dispatch import attention_backend
from torch import Tensor
from torch._dynamo.utils import counters

from svg_attention import SVG2, Dense, Method, Schedule, UnsupportedError
from svg_models import sparsify
from svg_models.families import transformers_of

ALWAYS_SPARSE = Schedule(dense_steps=0.0, dense_layers=0.0)
SPARSE = SVG2(q_clusters=4, k_clusters=12, top_p=0.6, first_iterations=2)
STEPS = 6
CASES = {
    "Wan": "wan t2v",
    "HunyuanVideo": "hunyuan_video t2v",
    "HunyuanVideo 1.5": "hunyuan_video15 t2v",
    "Cosmos": "cosmos predict2 v2w",
    "CogVideoX": "cogvideox 1.5 t2v",
    "LTX-Video": "ltx t2v",
}
"""One case of the zoo for each family whose processor differs from the others'."""


class Player:
    """A pipeline reduced to its denoising loop: a transformer, and the calls it gets.

    Attributes:
        transformer: the model; a copy may be put in its place.
        steps: how many of the recorded steps to play.
    """

    def __init__(self, transformer: Any, calls: list[dict[str, Any]], branch: str) -> None:
        self.transformer = transformer
        self.steps = len(calls)
        self._calls, self._branch = calls, branch
        self._current_timestep: float | None = None

    @property
    def _num_timesteps(self) -> int:
        return self.steps

    @property
    def current_timestep(self) -> float | None:
        """Return the timestep as PAB wants to know it."""
        return self._current_timestep

    def fresh(self, steps: int) -> Player:
        """Return a player with a model of its own."""
        return Player(copy.deepcopy(self.transformer), self._calls[:steps], self._branch)

    def play(self) -> Tensor:
        """Return what the model answers to each call, stacked."""
        outputs = []
        for step, call in enumerate(self._calls):
            self._current_timestep = 900.0 - 100.0 * step
            with torch.no_grad(), self._announce(step):
                outputs.append(self.transformer(**call)[0])
        return torch.stack(outputs)

    def _announce(self, step: int) -> Any:
        if not hasattr(self.transformer, "cache_context"):
            return nullcontext()
        return self.transformer.cache_context(
            self._branch, step_index=step, num_inference_steps=self.steps
        )


@cache
def recorded(family: str) -> Player:
    """Record the first guidance branch of a pipeline of the zoo, once for each family."""
    case = zoo.case(CASES[family])
    pipe = case.build()
    calls: list[dict[str, Any]] = []
    transformer = transformers_of(pipe)["transformer"]

    def record(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if arguments:
            raise TypeError(f"{case.name} calls its transformer with positional arguments")
        calls.append(dict(named))

    hook = transformer.register_forward_pre_hook(record, with_kwargs=True)
    case.run(pipe, num_inference_steps=STEPS)
    hook.remove()
    return Player(transformer, calls[:: len(case.branches)], case.branches[0])


@dataclass(frozen=True, kw_only=True)
class Feature:
    """Something that diffusers can do to a transformer.

    Attributes:
        title: for the table.
        apply: does it to a player's transformer.
        steps: how many it takes to show.
        changes: whether a dense model's output must differ with it.
        skips: whether it leaves out calls of the attention.
        around: a context in which all of it runs.
        exact: whether it leaves kernels as they are, so that dense bits must agree.
        tolerance: how far dense results may be off where they need not agree.
    """

    title: str
    apply: Callable[[Player], None]
    steps: int = 2
    changes: bool = False
    skips: bool = False
    around: Callable[[], Any] = nullcontext
    exact: bool = True
    tolerance: float = 1e-5


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What came of one feature in one family.

    Attributes:
        verdict: `"yes"`; `"before"` if it must come before `sparsify`; `"no"` if a sparse run
            refuses it; `"absent"` if diffusers itself has it not for this transformer.
        sentence: what is said where the verdict is not `"yes"`.
    """

    verdict: str
    sentence: str = ""


def lora(player: Player) -> None:
    from peft import LoraConfig

    torch.manual_seed(11)
    layers = ["to_q", "to_k", "to_v", "to_out.0"]
    config = LoraConfig(r=2, target_modules=layers, init_lora_weights=False)
    player.transformer.add_adapter(config)


def fused(player: Player) -> None:
    player.transformer.fuse_qkv_projections()
    if not any(getattr(m, "fused_projections", False) for m in player.transformer.modules()):
        name = type(player.transformer).__name__
        raise NotImplementedError(f"fuse_qkv_projections leaves {name} as it is")


def sequential_offload(player: Player) -> None:
    from accelerate import cpu_offload

    cpu_offload(player.transformer, execution_device=torch.device("cpu"))
    if not any(p.device.type == "meta" for p in player.transformer.parameters()):
        raise RuntimeError("nothing was offloaded")


def group_offload(kind: str) -> Callable[[Player], None]:
    def apply(player: Player) -> None:
        player.transformer.enable_group_offload(
            onload_device=torch.device("cpu"),
            offload_device=torch.device("cpu"),
            offload_type=kind,
            num_blocks_per_group=1,
        )

    return apply


def layerwise_casting(player: Player) -> None:
    player.transformer.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )


def caching(config: Callable[[Player], Any]) -> Callable[[Player], None]:
    def apply(player: Player) -> None:
        player.transformer.enable_cache(config(player))

    return apply


def compiled_whole(player: Player) -> None:
    torch._dynamo.reset()
    player.transformer = torch.compile(player.transformer, backend="aot_eager")


def compiled(player: Player) -> None:
    torch._dynamo.reset()
    player.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")


ATTENTIONS = [r"blocks\.\d+\.attn1", r"(single_)?transformer_blocks\.\d+\.attn1?"]
FEATURES = (
    Feature(title="LoRA (PEFT)", apply=lora, changes=True),
    Feature(title="Fused projections", apply=fused),
    Feature(title="Sequential CPU offload", apply=sequential_offload),
    Feature(title="Group offload by block", apply=group_offload("block_level")),
    Feature(title="Group offload by leaf", apply=group_offload("leaf_level")),
    Feature(title="fp8 layerwise casting", apply=layerwise_casting, changes=True),
    Feature(
        title="bf16 autocast",
        apply=lambda player: None,
        around=lambda: torch.autocast("cpu", torch.bfloat16),
        tolerance=1e-2,
    ),
    Feature(
        title="`set_attention_backend`",
        apply=lambda p: p.transformer.set_attention_backend("_native_math"),
        # diffusers also sets the backend for the whole process; this puts it back.
        around=lambda: attention_backend("native"),
    ),
    Feature(
        title="FirstBlockCache",
        apply=caching(lambda player: FirstBlockCacheConfig(threshold=10.0)),
        steps=STEPS,
        changes=True,
        skips=True,
    ),
    Feature(
        title="MagCache",
        apply=caching(
            lambda player: MagCacheConfig(
                num_inference_steps=STEPS,
                mag_ratios=[1.0] * STEPS,
                threshold=0.9,
                retention_ratio=0.2,
            )
        ),
        steps=STEPS,
        changes=True,
        skips=True,
    ),
    Feature(
        title="Pyramid attention broadcast",
        apply=caching(
            lambda player: PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2,
                spatial_attention_timestep_skip_range=(100, 850),
                current_timestep_callback=lambda: player.current_timestep,
            )
        ),
        steps=STEPS,
        changes=True,
        skips=True,
    ),
    Feature(
        title="TaylorSeer",
        apply=caching(
            lambda player: TaylorSeerCacheConfig(
                cache_interval=2, disable_cache_before_step=1, cache_identifiers=ATTENTIONS
            )
        ),
        steps=STEPS,
        changes=True,
        skips=True,
        tolerance=1e-3,  # extrapolates, rounding errors included
    ),
)
BLOCKS = Feature(title="`compile_repeated_blocks`", apply=compiled, exact=False)
WHOLE = Feature(title="`torch.compile` of the transformer", apply=compiled_whole, exact=False)


def check(family: str, feature: Feature) -> Cell:
    """Run one cell.

    The stock model with the feature is the reference. A sparse run whose calls are all dense must
    agree with it, to the last bit where the kernels are the same, whether the feature comes before
    `sparsify` or after it; one with a sparse method must be finite and different; and after
    `restore` the reference comes back.

    Raises:
        AssertionError: if the cell neither passes nor is refused with a sentence.
    """
    with feature.around():
        player = recorded(family).fresh(feature.steps)
        plain = player.play() if feature.changes else None
        try:
            feature.apply(player)
        except (AttributeError, NotImplementedError, ValueError) as error:
            return Cell(verdict="absent", sentence=first_line(error))
        reference = player.play()
        assert plain is None or not torch.equal(reference, plain), "the feature does nothing"
        for method in (Dense(), SPARSE):
            try:
                said = compare(family, feature, method, reference, before=True)
            except UnsupportedError as error:
                return Cell(verdict="no", sentence=first_line(error))
            assert said == (), said
        for method in (Dense(), SPARSE):
            said = compare(family, feature, method, reference, before=False)
            if said:
                return Cell(verdict="before", sentence=said[0])
    return Cell(verdict="yes")


def compare(
    family: str, feature: Feature, method: Method, reference: Tensor, *, before: bool
) -> tuple[str, ...]:
    """Hold a run with the feature against `reference`; return what the run had to say instead."""
    player = recorded(family).fresh(feature.steps)
    if before:
        feature.apply(player)
    with warnings.catch_warnings(), sparsify(player, method, ALWAYS_SPARSE) as run:
        warnings.simplefilter("ignore", UserWarning)
        if not before:
            feature.apply(player)
        video = player.play()
    if run.messages:
        return run.messages
    records = run.stats().records
    layers = zoo.case(CASES[family]).layers["transformer"]
    assert {record.layer for record in records} == set(range(layers))
    assert (len(records) < feature.steps * layers) == feature.skips, f"{len(records)} calls"
    assert torch.isfinite(video).all()
    if isinstance(method, Dense):
        exact = feature.exact and zoo.case(CASES[family]).dense_is_exact
        assert_same(video, reference, 0.0 if exact else feature.tolerance)
    else:
        assert not torch.allclose(video, reference, rtol=1e-4, atol=1e-4)
        assert run.stats().mean_density < 1.0
        if before and not feature.skips:  # caches would go on from where they are
            assert_same(player.play(), reference, 0.0 if feature.exact else feature.tolerance)
    return ()


def assert_same(video: Tensor, reference: Tensor, tolerance: float) -> None:
    """Fail unless both agree, to the last bit if the tolerance is 0."""
    if tolerance == 0.0:
        assert torch.equal(video, reference)
    else:
        torch.testing.assert_close(video, reference, rtol=10 * tolerance, atol=tolerance)


def check_graphs(family: str) -> Cell:
    """Run the cell of the compiler, and count that a sparse run makes no more graphs."""
    player = recorded(family).fresh(2)
    try:
        BLOCKS.apply(player)
    except ValueError as error:
        return Cell(verdict="absent", sentence=first_line(error))
    counts = []
    for sparse in (False, True):
        counters.clear()
        player = recorded(family).fresh(2)
        with sparsify(player, SPARSE, ALWAYS_SPARSE) if sparse else nullcontext():
            BLOCKS.apply(player)
            player.play()
        counts.append(counters["stats"]["unique_graphs"])
    assert counts[1] <= counts[0], f"{counts[1]} graphs instead of {counts[0]}"
    return check(family, BLOCKS)


def check_model_offload(family: str) -> Cell:
    """Run the cell of `enable_model_cpu_offload`, which takes a whole pipeline, twice in a row."""
    case = zoo.case(CASES[family])
    pipe = case.build()
    reference = case.run(pipe)
    with sparsify(pipe, Dense(), ALWAYS_SPARSE):
        pipe.enable_model_cpu_offload(device="cpu")
        for _ in range(2):  # the pipeline sets its hooks anew after each video
            assert_same(case.run(pipe), reference, 0.0 if case.dense_is_exact else 1e-4)
    with sparsify(pipe, SPARSE, ALWAYS_SPARSE) as run:
        assert not torch.equal(case.run(pipe), reference)
        assert run.messages == ()
    assert torch.equal(case.run(pipe), reference)
    return Cell(verdict="yes")


def ulysses_cells() -> dict[str, Cell]:
    """Run Ulysses context parallelism in two processes, for all families at once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("ulysses.py"))],
            env=environment | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=240) for rank in ranks]
    for rank, (_, errors) in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, errors
    cells = json.loads(outputs[0][0].splitlines()[-1])
    return {family: Cell(**cell) for family, cell in cells.items()}


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return str(error).strip().splitlines()[0]


QUICK: dict[str, Callable[[str], Cell]] = {
    "Model CPU offload": check_model_offload,
    **{feature.title: partial(check, feature=feature) for feature in FEATURES},
}
"""Rows of the table that take about a second for each family."""
SLOW: dict[str, Callable[[str], Cell]] = {
    BLOCKS.title: check_graphs,
    WHOLE.title: partial(check, feature=WHOLE),
}
"""Rows that take the compiler some ten seconds for each family."""
ULYSSES = "Ulysses context parallelism"
"""The row that two processes fill for all families at once."""
