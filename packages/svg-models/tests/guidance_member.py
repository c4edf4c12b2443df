"""One of two teams that split guidance, a rank each, over gloo on the CPU.

Each check compares with the same pipeline on one process. Started by `test_guidance.py`.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
import zoo
from processes import join_ranks
from torch import Tensor

from svg_attention import SVG2, Schedule
from svg_models import sparsify
from svg_models.families import family_of, transformers_of
from svg_models.parallel import SplitGuidance

SPARSE = SVG2(q_clusters=4, k_clusters=12, top_p=0.6, first_iterations=2)
ALWAYS_SPARSE = Schedule(dense_steps=0.0, dense_layers=0.0)

# Pipelines by how their passes are shared: the second of a step beside the first, ...
FORETOLD = (
    "wan t2v",
    "wan v2v",
    "wan 2.2 t2v",
    "wan 2.2 ti2v, image",
    "wan vace",
    "wan animate",
    "hunyuan_video t2v",
    "hunyuan_video i2v latent_concat",
    "hunyuan_video15 i2v",
    "cosmos 1.0 t2w",
    "cosmos predict2 v2w",
    "cosmos predict2.5 t2w",
    "skyreels v2 t2v",
    "chronoedit i2v",
)
# ... half of the batch of each ...
IN_ONE_BATCH = (
    "cogvideox 1.5 i2v",
    "ltx i2v",
    "ltx2 t2v",
    "mochi t2v",
    "allegro t2v",
    "consisid i2v",
    "easyanimate t2v",
)
# ... and not at all: one pass a step, and latents that differ between the branches.
NOT_SHARED = ("hunyuan_video i2v token_replace", "cosmos 1.0 v2w")
CASES = (*FORETOLD, *IN_ONE_BATCH, *NOT_SHARED)


def pairs() -> dist.ProcessGroup:
    """Return this rank and the one with its place in the other team."""
    return dist.group.WORLD


def split(pipe: Any) -> SplitGuidance:
    return SplitGuidance(pipe, transformers_of(pipe), pair=pairs(), team=dist.get_rank())


def run(case: zoo.Case, pipe: Any, passes: list[int] | None = None) -> Tensor:
    """Generate; count what the first block of each transformer is called for."""
    hooks = []
    for transformer in transformers_of(pipe).values():
        block = family_of(transformer).blocks_of(transformer)[0]
        if passes is not None:
            hooks.append(block.register_forward_hook(lambda *_: passes.append(1)))
    latents = case.run(pipe, num_inference_steps=4)
    for hook in hooks:
        hook.remove()
    return latents


def check_case(name: str) -> None:
    case = zoo.case(name)
    pipe = case.build()
    # One of each kind also without sparse attention, under which a branch has a memory of its own.
    for sparse in (False, True)[name not in ("wan t2v", "cogvideox 1.5 i2v") :]:
        taken = [sparsify(pipe, SPARSE, ALWAYS_SPARSE)] if sparse else []
        passes: list[int] = []
        alone = run(case, pipe, passes)
        asked = len(passes)
        guidance = split(pipe)
        # What the second branch is given is known from the first evaluation on, and in a second
        # video from the first one.
        for repeated in (False, True)[: 1 + sparse]:
            passes.clear()
            shared = run(case, pipe, passes)
            if name in IN_ONE_BATCH:  # products of a smaller batch are rounded differently
                torch.testing.assert_close(shared, alone, rtol=1e-3, atol=1e-3)
            else:
                assert torch.equal(shared, alone), (sparse, float((shared - alone).abs().max()))
            foretold = asked // 2 + (not repeated)
            assert len(passes) == (foretold if name in FORETOLD else asked), (sparse, len(passes))
        guidance.restore()
        for one in taken:
            one.restore()


def check_other_prompts() -> None:
    """What is foretold wrongly is computed again: another prompt, another negative prompt."""
    pipe, other = tiny.pipeline(), {"prompt": "a green square", "negative_prompt": "bad blue"}
    prompts = [{}, other, {**other, "negative_prompt": "moving left"}, {}]
    alone = [tiny.generate(pipe, **prompt) for prompt in prompts]
    guidance = split(pipe)
    for prompt, expected in zip(prompts, alone, strict=True):
        assert torch.equal(tiny.generate(pipe, **prompt), expected)
    guidance.restore()


def check_batches() -> None:
    """Two videos at once are one for each team, guided or not; three are not shared out."""
    pipe = tiny.pipeline()
    for changes in ({}, {"guidance_scale": 1.0}, {"prompt": ["a", "red", "square"]}):
        changes = {"prompt": ["a red circle", "a blue square"], **changes}
        changes["negative_prompt"] = ["bad"] * len(changes["prompt"])
        alone = tiny.generate(pipe, **changes)
        guidance = split(pipe)
        torch.testing.assert_close(tiny.generate(pipe, **changes), alone, rtol=1e-3, atol=1e-4)
        guidance.restore()


def check_no_seed() -> None:
    """Without a seed all ranks still make one video: that of the latents of the first."""
    pipe = tiny.pipeline()
    guidance = split(pipe)
    latents = tiny.generate(pipe, seed=dist.get_rank())
    both = [torch.empty_like(latents) for _ in range(2)]
    dist.all_gather(both, latents)
    assert not torch.equal(*both)  # each adds its own noise to what all have denoised alike
    guidance.restore()


def check_guidance_stops() -> None:
    """A branch that is not asked for in some evaluations does no harm."""
    model, inputs = tiny.transformer(), tiny.forward_inputs()
    other = torch.randn(inputs["encoder_hidden_states"].shape, generator=torch.Generator())

    def loop() -> list[Tensor]:
        outs = []
        for step, guided in enumerate((True, True, False, True, True)):
            given = {**inputs, "timestep": torch.full((1,), 900 - step)}
            for name in ("cond", "uncond")[: 1 + guided]:
                if name == "uncond":
                    given["encoder_hidden_states"] = other
                details = {"step_index": step, "num_inference_steps": 5}
                with torch.no_grad(), model.cache_context(name, **details):
                    outs.append(model(**given)[0])
        return outs

    for sparse in (False, True):
        taken = [sparsify(model, SPARSE, ALWAYS_SPARSE)] if sparse else []
        alone = loop()
        guidance = split(model)
        shared = loop()
        guidance.restore()
        assert len(shared) == len(alone) == 9
        for place, (one, two) in enumerate(zip(shared, alone, strict=True)):
            # After the pause the clusters of a sparse run have had a round more.
            assert torch.equal(one, two) or (sparse and place > 5), place
            both = [torch.empty_like(one) for _ in range(2)]
            dist.all_gather(both, one.contiguous())
            assert torch.equal(*both)
        for one in taken:
            one.restore()


def check_branches_alike() -> None:
    """A branch that reads what the other chose waits for it."""
    pipe = tiny.pipeline()
    method = replace(SPARSE, share_branches=True)
    with sparsify(pipe, method, ALWAYS_SPARSE):
        alone = tiny.generate(pipe)
        guidance = split(pipe)
        assert torch.equal(tiny.generate(pipe), alone)
        guidance.restore()


def check_copies() -> None:
    """It leaves no trace, and a copy is a plain model."""
    pipe = tiny.pipeline()
    plain = type(pipe.transformer)
    guidance = split(pipe)
    assert isinstance(pipe.transformer, plain)
    assert type(pipe.transformer) is not plain
    assert type(pipe.transformer).__name__ == plain.__name__
    for made in (copy.deepcopy(pipe.transformer), pickle.loads(pickle.dumps(pipe.transformer))):
        assert type(made) is plain
    with pytest.raises(ValueError, match="split already"):
        split(pipe)
    assert type(pipe.transformer) is not plain
    guidance.restore()
    guidance.restore()
    assert type(pipe.transformer) is plain


CHECKS = (
    check_other_prompts,
    check_batches,
    check_no_seed,
    check_guidance_stops,
    check_branches_alike,
    check_copies,
)


def main() -> None:
    warnings.filterwarnings("ignore")
    join_ranks(seconds=60)
    for check in CHECKS:
        check()
        print(check.__name__, flush=True)
    for name in CASES:
        check_case(name)
        print(name, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
