"""Running one feature in one family, and saying what came of it."""

from __future__ import annotations

import json
import warnings
from contextlib import nullcontext
from dataclasses import dataclass

import processes
import torch
import zoo
from torch import Tensor
from torch._dynamo.utils import counters

from composition.features import BLOCKS, Feature
from composition.player import CASES, recorded
from svg_attention import SVG2, Dense, Method, Schedule, UnsupportedError
from svg_models import sparsify

ALWAYS_SPARSE = Schedule(dense_steps=0.0, dense_layers=0.0)
SPARSE = SVG2(q_clusters=4, k_clusters=12, top_p=0.6, first_iterations=2)


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
    output = processes.run_ranks("ulysses.py")
    cells = json.loads(output.splitlines()[-1])
    return {family: Cell(**cell) for family, cell in cells.items()}


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return str(error).strip().splitlines()[0]
