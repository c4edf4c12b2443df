"""What a search found, made up, for the tests of its page."""

from __future__ import annotations

import dataclasses
import math

from svg_models.generation.settings import Settings
from svg_models.recipe import Layers, Measured
from svg_models.tuning.journal import Trial
from svg_models.tuning.result import Tuned
from svg_models.tuning.search import Target
from svg_models.tuning.space import CORRECTIONS, START, Point

PROMPTS = ("a large red star moving right on a plain navy background", "a blue circle")
MACHINE = {
    "device": "somebody's GPU",
    "threads": None,
    "dtype": "bfloat16",
    "torch": "2.13",
    "diffusers": "0.42",
    "svg-attention": "0.1.0",
    "svg-models": "0.1.0",
}


def trial(point: Point, prompt: int, *, timed: bool) -> Trial:
    """Return a trial by formulas: 5 dB for twice the density."""
    work = point.density + 0.03
    lift = list(CORRECTIONS).index(point.corrections)
    return Trial(
        point=point,
        prompt=prompt,
        psnr=38 + 5 * math.log2(point.density) + lift - prompt,
        ssim=0.9,
        flip=0.12,
        flicker=0.8,
        work=work,
        seconds=4 + 6 * work if timed else None,
        dense_seconds=10.0 if timed else None,
        share=0.6 if timed else None,
    )


def made_up(*, timed: bool = True, found: bool = True, prompt: str = PROMPTS[0]) -> Tuned:
    """Return the outcome of a search with trials on one prompt and on both."""
    prompts = (prompt, PROMPTS[1])
    trials = [trial(START.replace(corrections=c), 0, timed=timed) for c in CORRECTIONS]
    taken = START.replace(density=0.25)
    for density in (0.1, 0.25, 0.4):
        point = START.replace(density=density)
        trials += [trial(point, index, timed=timed) for index in range(2)]
    means = [t for t in trials if t.point == taken]
    measured = Measured(
        model="embedded",
        frames=49,
        height=128,
        width=128,
        tokens=3328,
        steps=20,
        guidance=4.0,
        prompts=2,
        psnr=sum(t.psnr or 0.0 for t in means) / 2,
        flip=0.12,
        flicker=0.8,
        work=means[0].work,
        seconds=5.68 if timed else None,
        dense_seconds=10.0 if timed else None,
        machine="somebody's GPU, bfloat16",
    )
    recipe = dataclasses.replace(taken.recipe(Layers()), measured=(measured,))
    return Tuned(
        recipe=recipe if found else None,
        point=taken if found else None,
        target=Target(psnr=33.0 if found else 80.0),
        closest=START.replace(density=0.4),
        trials=tuple(trials),
        prompts=prompts,
        settings=Settings(
            prompt=prompt, steps=20, guidance=4.0, height=128, width=128, frames=49, fps=16.0
        ),
        model="embedded",
        loras=(),
        tokens=3328,
        noise_floor=44.0,
        machine=MACHINE,
        time_by="seconds" if timed else "density",
    )
