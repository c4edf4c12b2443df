"""What `bench_video.py` times: short runs, each of which shows what some kinds of steps cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from _video_subjects import Video

from svg_attention import SVG2, Dense, Method
from svg_models.recipes import ROUNDS

DENSITY = 0.25
STOCK, DENSE, FIRST, SPARSE = ("stock", "dense", "first sparse", "sparse")
OUT = "left out"  # by a cache
# What a step of a kind is expected to take, relative to one of diffusers.
EXPECTED = {STOCK: 1.0, DENSE: 0.8, FIRST: 0.85, SPARSE: 0.43, OUT: 0.02}
COMPILING = 60.0
QUANTISING = 8.0
WARMING = 3.0
LONG = 20.0
OURS, FP8, FEW, SHARED = "SVG2", "SVG2, fp8", "SVG2 corrected, fp8", "SVG2, shared plans"


def svg2(video: Video) -> Method:
    """Return SVG2 at the density that is measured, its k-means as in recipes."""
    queries, keys = video.clusters
    return SVG2(
        q_clusters=queries,
        k_clusters=keys,
        density=DENSITY,
        **ROUNDS,
    )


def shared(video: Video) -> Method:
    """Return SVG2 whose guidance branches, and each two steps, read what one of them chose."""
    return replace(svg2(video), share_branches=True, share_steps=2)


def corrected(video: Video) -> Method:
    """Return SVG2 with every correction that pays, for runs without a dense step."""
    queries, keys = video.clusters
    # Of a toy, probes and exact rows read more than a quarter.
    density = DENSITY if math.prod(video.grid) > 5000 else 0.9
    return SVG2.corrected(density, q_clusters=queries, k_clusters=keys)


def dense(video: Video) -> Method:
    """Return dense attention by our kernels."""
    return Dense()


@dataclass(frozen=True, kw_only=True)
class Part:
    """A short run that shows what kinds of steps cost.

    Attributes:
        name: under which it is stored.
        kinds: of its steps, in order.
        method: what attention computes; None leaves the pipeline as it is.
        linears: whether products are in fp8.
        attention: precision of attention, where heads have 128 channels; "" for the model's.
        compiled: whether the blocks are compiled first.
        quantised: whether torchao converts the linear layers first, for good.
        guided: whether its steps are guided, since its branches do not compute the same.
        cache: see `svg_models.sparsify`.
        varied: whether steps of a kind take turns to plan, so that none of them speaks for all.
        decodes: whether the clip is decoded, once by the classes of diffusers and once by ours.
    """

    name: str
    kinds: tuple[str, ...]
    method: Callable[[Video], Method] | None = None
    linears: bool = False
    attention: str = ""
    compiled: bool = False
    quantised: bool = False
    guided: bool = False
    cache: str | None = None
    varied: bool = False
    decodes: bool = False

    def steps(self, video: Video) -> tuple[str, ...]:
        """Return the kinds of the steps of a run; a pass of half a minute is its own average."""
        if video.pass_s <= LONG or self.cache is not None or self.varied:
            return self.kinds
        return tuple(dict.fromkeys(self.kinds))

    def expected(self, video: Video, factor: float) -> float:
        """Return the seconds that this part is expected to take."""
        passes = video.passes if self.guided else 1
        work = passes * sum(EXPECTED[kind] for kind in self.steps(video)) * video.pass_s * factor
        seconds = WARMING + work + (video.decode_s if self.decodes else 0.0)
        if self.compiled:  # the same run compiles
            seconds += COMPILING + work
        return seconds + (QUANTISING if self.quantised else 0.0)


# In the order of their worth; what changes the pipeline for good stands last.
PARTS = (
    Part(name="diffusers", kinds=(STOCK, STOCK), decodes=True),
    Part(name=OURS, kinds=(DENSE, FIRST, SPARSE, SPARSE), method=svg2, decodes=True),
    Part(
        name=FP8,
        kinds=(DENSE, FIRST, SPARSE, SPARSE),
        method=svg2,
        linears=True,
        attention="fp8",
    ),
    Part(name="SVG2, fp8 products", kinds=(FIRST, SPARSE, SPARSE), method=svg2, linears=True),
    Part(
        name=FEW,
        kinds=(FIRST, SPARSE),
        method=corrected,
        linears=True,
        attention="fp8",
        guided=True,
    ),
    Part(
        name=SHARED,
        kinds=(FIRST, SPARSE, SPARSE),
        method=shared,
        guided=True,
        varied=True,
    ),
    Part(name="diffusers, compiled", kinds=(STOCK,), compiled=True),
    Part(name="diffusers, torchao fp8", kinds=(STOCK,), quantised=True),
)
# Asked for by name; stands before what changes the pipeline for good.
MORE = (
    Part(name="SVG2, compiled", kinds=(FIRST, SPARSE), method=svg2, compiled=True),
    Part(
        name="SVG2, fp8 products, compiled",
        kinds=(FIRST, SPARSE),
        method=svg2,
        linears=True,
        compiled=True,
    ),
    Part(
        name=f"{SHARED}, compiled",
        kinds=(FIRST, SPARSE, SPARSE),
        method=shared,
        compiled=True,
        guided=True,
        varied=True,
    ),
    Part(
        name=f"{SHARED}, fp8 products",
        kinds=(FIRST, SPARSE, SPARSE),
        method=shared,
        linears=True,
        guided=True,
        varied=True,
    ),
    Part(
        name="SVG2, fp8, taylor@2",
        kinds=(FIRST, SPARSE, SPARSE, OUT, SPARSE, OUT, SPARSE),
        method=svg2,
        linears=True,
        attention="fp8",
        cache="taylor@2",
    ),
)
ALL_PARTS = (*PARTS[:-1], *MORE, PARTS[-1])
