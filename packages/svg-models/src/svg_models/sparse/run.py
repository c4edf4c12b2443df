"""Make a diffusers pipeline sparse, and dense again."""

from __future__ import annotations

import os
import shlex
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from svg_attention import Method, Schedule
from svg_models import attention_op, embedded
from svg_models.errors import shortened
from svg_models.families import family_of, transformers_of
from svg_models.families.base import unwrap
from svg_models.method_names import MethodSpec, read_method
from svg_models.recipe import From, Layers, Precision, Recipe
from svg_models.sparse.checks import (
    check_backend,
    check_flag,
    check_schedule,
    check_seed,
    device_and_dtype,
)
from svg_models.sparse.engine import Engine
from svg_models.sparse.hooks import Installation, owner_of
from svg_models.sparse.layers import FastDecoder, FastLayers, check_layers, slow_in_fp8
from svg_models.sparse.pairs import DensePairs
from svg_models.spelling import checks_names
from svg_models.stats import RunStats
from svg_models.summary import Summarised

__all__ = ["SparseRun", "restore", "sparsify"]

_INSTALLING = threading.Lock()  # of two threads, one makes a pipeline sparse; the other is told


@checks_names()
def sparsify(
    pipe: Any,
    method: Method | MethodSpec | str | None = None,
    schedule: Schedule | None = None,
    *,
    density: float | None = None,
    top_p: float | None = None,
    recipe: Recipe | str | os.PathLike[str] | None = None,
    preset: str | None = None,
    backend: str = "auto",
    exact_dense: bool | None = None,
    fuse: bool | None = None,
    linears: Precision | None = None,
    attention: Precision | None = None,
    fp8_from: From | None = None,
    cache: str | None = None,
    seed: int = 0,
    profile: bool = True,
) -> SparseRun:
    """Make the self-attention of a diffusers video pipeline sparse until `restore`.

    Only this instance changes: its self-attentions get processors of this package, its
    transformers a hook, and blocks that `fuse` joins a `forward`. Nothing of diffusers is patched
    and no global is set. Use the result as a context manager, or call `restore` on it.

        with sparsify(pipe) as run:
            frames = pipe(prompt, num_frames=81).frames[0]
        print(run.stats().mean_density)

    Args:
        pipe: a pipeline of a known family, with one or two transformers, or a transformer alone.
            For a transformer alone, tell the step with diffusers' own
            `transformer.cache_context("cond", step_index=i, num_inference_steps=n)`; without it
            every call stays dense.
        method: `SVG2(...)`, `SVG1(...)`, `Dense()` or another method of svg_attention, or a name as
            `generate` takes it, such as `"svg2"` or `"svg2-error@0.25"`; its other settings are
            those of the model's recipe. None takes the recipe for the clip's size, see
            `recipe_for`.
        schedule: steps and layers that stay dense. None takes the recipe's.
        density: share of query-key pairs that a method given by name computes on sparse calls.
        top_p: attention mass that an svg2 method given by name keeps, in place of a density.
        recipe: a recipe file, as `svg tune` and `run.recipe.save` write them, or a `Recipe`; in
            place of a method and a density. It runs as it is, whatever the model; of its schedule
            and of the options below, what is given here comes first.
        preset: "quality", "balanced" or "fast": settings whose price was measured, in place of a
            method and a density; `run.recipe` tells which, and on what.
        backend: who computes sparse attention, see `svg_attention.sparse_attention`.
        exact_dense: compute calls that stay dense by the kernel of the model's own processor, for
            results equal to the last bit. Otherwise svg-kernels computes them where it is faster
            (compute capability 9.0), as exactly, unless `set_attention_backend` chose a kernel.
            False, unless the recipe says otherwise.
        fuse: on a GPU, compute norms, modulation and residuals of a block by kernels that join
            them, and norms, activations and padding between the convolutions of HunyuanVideo's
            VAE; each rounds once where the model rounds after every step. A block that something
            else has put itself over, or that is compiled, is left as it is. On any device, tiles
            of a VAE are blended by fewer operations, bit for bit. True, unless the recipe says
            otherwise.
        linears: "fp8" computes the matrix products of all blocks but the first and the last in
            fp8, from copies of the weights that lie beside them and are rounded anew at each step.
            It changes the picture; see the documentation for how much. "bf16", unless the recipe
            says otherwise.
        attention: "fp8" computes self-attention in fp8 (compute capability 9.0; with
            `backend="reference"` keys and values are rounded alike, slowly and anywhere). It
            changes the picture more than `linears`. "bf16", unless the recipe says otherwise.
        fp8_from: "sparse" leaves dense steps, which decide the picture, as they are, and so the
            last two steps (of up to ten the last one), whose errors no later step takes away;
            "start" computes all steps in fp8. For `linears` and `attention` alike. "sparse", unless
            the recipe says otherwise.
        cache: "first-block@0.1" or "taylor@2" has diffusers leave out the blocks of steps that
            change little, see `svg_models.caching`; they compute neither attention nor anything
            else. It changes the picture. "none", unless the recipe says otherwise.
        seed: seed of every random choice; each video starts from it again.
        profile: time each attention call: on a GPU by two events a call, which take microseconds,
            and a synchronisation when they are read.

    Returns:
        The run.

    Raises:
        TypeError: if `pipe` has no transformer, or an argument is of another type or unknown.
        ValueError: if no family covers it, it is sparse already, its attention processors were
            replaced by some that this package cannot reproduce, or a name or number is wrong.
        UnsupportedError: if `backend` or fp8 cannot run here, or the pipeline runs ring attention
            over several devices (Ulysses is supported).
    """
    spec = read_method(method, density=density, top_p=top_p, recipe=recipe, preset=preset)
    check_schedule(schedule)
    layers = spec.layers.changed(
        exact_dense=exact_dense,
        fuse=fuse,
        linears=linears,
        attention=attention,
        fp8_from=fp8_from,
        cache=cache,
    )
    options = {
        "backend": backend,
        "seed": check_seed(seed),
        "profile": check_flag("profile", profile),
        "layers": layers,
    }
    with _INSTALLING:
        return SparseRun(pipe, spec, schedule, options=options)


def restore(pipe: Any) -> None:
    """Make a sparse pipeline dense again, without the run that `sparsify` returned.

    Does what `SparseRun.restore` does, also for a run whose transformer was replaced by another; a
    pipeline that is not sparse stays as it is.

    Args:
        pipe: a diffusers pipeline, or its transformer.

    Raises:
        TypeError: if it has no transformer.
    """
    with _INSTALLING:
        numbers = {owner_of(transformer) for transformer in transformers_of(pipe).values()}
        inner = unwrap(pipe) if isinstance(pipe, nn.Module) else pipe
        for engine in attention_op.owners():
            if isinstance(engine, Engine) and (engine.number in numbers or engine.is_of(inner)):
                engine.restore()


class SparseRun(Summarised):
    """A pipeline made sparse; made by `sparsify`, whose arguments it takes, checked."""

    def __init__(
        self,
        pipe: Any,
        spec: MethodSpec,
        schedule: Schedule | None,
        *,
        options: dict[str, Any],
    ) -> None:
        layers: Layers = options["layers"]
        found = [(name, model, family_of(model)) for name, model in transformers_of(pipe).items()]
        for _, transformer, _ in found:
            device, dtype = device_and_dtype(pipe, transformer)
            backend, head_dim = options["backend"], _head_dim(transformer)
            check_layers(layers, device, dtype, backend=backend, head_dim=head_dim)
            check_backend(backend, device, dtype, head_dim=head_dim)
        self._title = type(pipe).__name__
        self._model = _model_name(pipe)
        # A wrapper may be gone before its model.
        inner = unwrap(pipe) if isinstance(pipe, nn.Module) else pipe
        self._engine = Engine(inner, spec, schedule, **options)
        try:
            self._engine.fast_decoder = FastDecoder(getattr(inner, "vae", None), layers)
            for name, transformer, family in found:
                first = len(self._engine.slots)
                installed = Installation(self._engine, name, transformer, family, first)
                self._engine.installations.append(installed)
                self._engine.slots.extend(installed.slots)
                fast = self._engine.fast_layers[name] = FastLayers(transformer, family, layers)
                slow = slow_in_fp8(layers, options["backend"], _head_dim(transformer))
                if slow:
                    self._engine.tell(slow)
                if fast.linears is not None and not fast.linears.layers:
                    self._engine.tell(
                        f"linears='fp8' found no layer of {name} that it can compute: they hold no "
                        "bf16 weights of their own, or something else has put itself over them"
                    )
        except BaseException:
            self.restore()
            raise

    def __enter__(self) -> SparseRun:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.restore()

    @property
    def active(self) -> bool:
        """Return whether the pipeline is sparse through this run."""
        return bool(self._engine.installations)

    @property
    def recipe(self) -> Recipe | None:
        """Return what the last video ran with; None before the first forward pass."""
        return self._engine.recipe

    @property
    def messages(self) -> tuple[str, ...]:
        """Return the warnings given so far."""
        return tuple(self._engine.messages)

    def release(self) -> None:
        """Let go of the memory that only further steps need, such as to decode after the last one.

        That is what is remembered of the steps so far, and fp8 copies of weights. What was recorded
        stays; a further step begins a new video, and makes the copies again.
        """
        self._engine.release()

    def restore(self) -> None:
        """Put back the very processors that were there and remove every hook.

        What the run recorded stays readable. Calling it twice does no harm. Processors that
        somebody else put in place meanwhile are left there.
        """
        self._engine.restore()

    def beside_dense(
        self, *, now: Callable[[], float], leave_out: Callable[[float], None]
    ) -> DensePairs:
        """Return what times some sparse steps of the next video beside the same steps dense.

        Args:
            now: returns the time once the device has finished.
            leave_out: is told the seconds of each dense pass.

        With a cache it times none: a second pass would be a step to the cache.
        """
        held = ((one.name, one.transformer) for one in self._engine.installations)
        transformers = {name: module for name, module in held if module is not None}
        if self._engine.caches:
            transformers = {}
        return DensePairs(self._engine, transformers, now=now, leave_out=leave_out)

    def stats(self) -> RunStats:
        """Return what the last video did; waits for the device once."""
        recipe = {} if self.recipe is None else self.recipe.to_dict()
        return RunStats(
            records=self._engine.records(),
            recipe=recipe,
            messages=self.messages,
            grid=self._engine.grid,
            facts=self._facts(),
        )

    def _facts(self) -> dict[str, Any]:
        """Return model, machine and what was asked for, and the command that does it again."""
        asked = self._engine.asked
        where = [next(iter(m.parameters()), None) for m in self._transformers()]
        device = next((p.device for p in where if p is not None), torch.device("cpu"))
        gpu = device.type == "cuda"
        facts = {
            "model": self._model,
            "pipeline": self._title,
            **asked,
            "device": torch.cuda.get_device_name(device) if gpu else f"CPU, {_threads()}",
            "torch": torch.__version__,
        }
        words = self._engine.method_words
        if self._model and words and {"prompt", "num_frames", "height", "width"} <= set(asked):
            facts["command"] = _command(self._model, asked, words)
        return facts

    def _transformers(self) -> list[Any]:
        held = (installation.transformer for installation in self._engine.installations)
        return [transformer for transformer in held if transformer is not None]

    def report(self, path: str | os.PathLike[str]) -> Path:
        """Write a self-contained HTML page about the last video.

        Args:
            path: where to write it.

        Returns:
            The path written.

        Raises:
            SettingError: if it cannot be written.
        """
        from svg_models.report import write_run_report

        return write_run_report(self.stats(), path)

    def _summary(self) -> tuple[str, list[tuple[str, str]]]:
        held = self._engine.installations
        where = ", ".join(f"{len(one.slots)} attentions of {one.name}" for one in held)
        state = f"sparse ({where})" if self.active else "restored"
        rows = []
        if self.recipe is None:
            rows.append(("last video", "none yet"))
        else:
            stats = self.stats()
            rows += [
                ("method", f"{self.recipe.method}"),
                ("source", shortened(self.recipe.source, 100)),
                (
                    "last video",
                    f"{stats.sparse_calls:,} of {stats.calls:,} attention calls sparse, at "
                    f"{stats.mean_density:.1%} of the query-key pairs",
                ),
            ]
        if self.messages:
            rows.append(("messages", " | ".join(self.messages)))
        return f"SparseRun: {self._title} is {state}", rows


def _model_name(pipe: Any) -> str:
    """Return the folder or hub id that a pipeline was loaded from; empty if it does not say."""
    config = getattr(pipe, "config", None)
    name = config.get("_name_or_path") if isinstance(config, Mapping) else None
    if not isinstance(name, str) or not name:
        return ""
    return "embedded" if Path(name) == Path(embedded.__file__).parent / "model" else name


def _threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'s' if count > 1 else ''}"


def _command(model: str, asked: Mapping[str, Any], method: list[str]) -> str:
    """Return the command that generates the same clip."""
    words = ["svg", "generate", asked["prompt"]]
    if model != "embedded":
        words += ["--model", model]
    options = {
        "--negative-prompt": asked.get("negative_prompt"),
        "--frames": asked["num_frames"],
        "--size": f"{asked['width']}x{asked['height']}",
        "--steps": asked.get("num_inference_steps"),
        "--guidance": asked.get("guidance_scale"),
        "--seed": asked.get("seed"),
    }
    for name, value in options.items():
        if value is not None and value != "":
            words += [name, f"{value:g}" if isinstance(value, float) else str(value)]
    return shlex.join([*words, *method])


def _head_dim(transformer: Any) -> int | None:
    size = getattr(getattr(transformer, "config", None), "attention_head_dim", None)
    return size if isinstance(size, int) else None
