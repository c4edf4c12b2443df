"""What a model family declares."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from svg_models.families.blocks import BlockRule, find_blocks
from svg_models.families.dense import DenseKernel, dense_attention
from svg_models.families.processors import SparseProcessor, original_of
from svg_models.families.published import Published
from svg_models.families.sharing import Sharing

__all__ = ["Family", "parameter_names", "patch_grid", "plain_path", "unwrap"]


_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}
_INFIXES = r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."


def unwrap(module: nn.Module) -> nn.Module:
    """Return the model inside wrappers: of `torch.compile`, `DataParallel`, DDP and FSDP."""
    while True:
        name = _WRAPPERS.get(type(module).__name__)
        inner = None if name is None else getattr(module, name, None)
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def plain_path(path: str) -> str:
    """Return the path of a module without what wrappers put into it."""
    return re.sub(_INFIXES, "", path)


def parameter_names(kind: type) -> list[str]:
    """Return the names of what a module's forward takes by position.

    A subclass may pass on what it is given, whatever that is; then its parent knows the names.
    """
    forwards = [vars(cls)["forward"] for cls in kind.__mro__ if "forward" in vars(cls)]
    known = [list(inspect.signature(forward).parameters.values())[1:] for forward in forwards]
    whole = [found for found in known if not any(p.kind is p.VAR_POSITIONAL for p in found)]
    return [p.name for p in (whole or known)[0] if p.kind is not p.VAR_POSITIONAL]


def text_to_video(transformer: Any) -> str:
    """Return the only task of a transformer that has one."""
    return "t2v"


def no_padding(transformer: Any, arguments: Mapping[str, Any]) -> Tensor | None:
    """Return None: all text tokens count."""
    return None


def no_conditions(transformer: Any, arguments: Mapping[str, Any]) -> int:
    """Return 0: nothing stands beside the clip and its text."""
    return 0


def no_objection(transformer: Any) -> str:
    """Return nothing against making a transformer sparse."""
    return ""


def patch_grid(transformer: Any, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return the token grid of `[B, C, F, H, W]` latents: their sizes over those of a patch.

    Args:
        transformer: has three numbers as `config.patch_size`, or one beside `config.patch_size_t`,
            without which a patch is of one frame.
        arguments: of its forward pass, with `hidden_states`.

    Returns:
        Latent frames, rows and columns of tokens.
    """
    frames, rows, columns = arguments["hidden_states"].shape[2:]
    patch = transformer.config.patch_size
    if isinstance(patch, int):
        patch = (transformer.config.get("patch_size_t") or 1, patch, patch)
    return frames // patch[0], rows // patch[1], columns // patch[2]


def nothing_unusual(transformer: Any) -> Mapping[str, Any]:
    """Return nothing: the pipeline says what a clip is like by default."""
    return {}


@dataclass(frozen=True, kw_only=True)
class Family:
    """Everything that one kind of transformer has of its own.

    Attributes:
        name: short name, for example `"wan"`.
        title: the models it covers, for people.
        transformers: class names of the transformers; subclasses count too.
        attentions: regular expression that the module path of each video self-attention matches;
            or several, where modules run in another order than the model lists them.
        original_processors: class names of the processors that `processor` reproduces; any other is
            refused, because replacing it would lose what it does.
        processor: the attention processor that takes their place.
        grid: latent frames, rows and columns of tokens, from the transformer and the arguments of
            its forward pass by name.
        blocks: how its blocks are computed by kernels that join what stands between their products.
        task: names what a transformer was trained for, `"t2v"` or `"i2v"`: which recipes fit it.
        checkpoints: names on the hub of those whose attentions were checked.
        recipes: published settings; without any, those that most models share.
        text_position: where text tokens stand in the self-attention's sequence; None if nowhere.
        conditions: where tokens of conditions may stand beside the clip's, in one stream with
            them; they are attended to exactly, as text is. None if nowhere.
        condition_tokens: how many of them there are, from the transformer and the arguments of its
            forward pass by name; asked only where text stands behind the clip, too.
        text_lengths: valid text tokens of each sample, integers `[B]` on the model's device, from
            the transformer and the arguments of its forward pass by name; None if all count. The
            valid ones come first.
        sharing: how ranks share its sequence; None if they cannot.
        dense: the kernel of dense steps.
        usual: what a clip is like by default, from the transformer, where the pipeline's call does
            not say it or says it for another checkpoint; fields of `svg_models.loading.Defaults`.
        objection: says in one sentence why a certain transformer of these classes cannot be made
            sparse; empty where nothing speaks against it.
    """

    name: str
    title: str
    transformers: tuple[str, ...]
    attentions: str | tuple[str, ...]
    original_processors: tuple[str, ...]
    processor: type[SparseProcessor]
    grid: Callable[[Any, Mapping[str, Any]], tuple[int, int, int]]
    blocks: tuple[BlockRule, ...] = ()
    task: Callable[[Any], str] = text_to_video
    checkpoints: tuple[str, ...] = ()
    recipes: tuple[Published, ...] = ()
    text_position: Literal["first", "last"] | None = None
    conditions: Literal["first", "last"] | None = None
    condition_tokens: Callable[[Any, Mapping[str, Any]], int] = no_conditions
    text_lengths: Callable[[Any, Mapping[str, Any]], Tensor | None] = no_padding
    sharing: Sharing | None = None
    dense: DenseKernel = dense_attention
    usual: Callable[[Any], Mapping[str, Any]] = nothing_unusual
    objection: Callable[[Any], str] = no_objection

    def __post_init__(self) -> None:
        if self.text_lengths is not no_padding and self.text_position != "last":
            raise ValueError(
                f"family {self.name!r} has padded text, which must stand last, "
                f"got text_position {self.text_position!r}"
            )

    def covers(self, transformer: nn.Module) -> bool:
        """Return whether `transformer` is of this family."""
        return any(cls.__name__ in self.transformers for cls in type(transformer).__mro__)

    def find_blocks(self, transformer: nn.Module) -> list[tuple[nn.Module, BlockRule]]:
        """Return each block that a rule computes, with its rule."""
        return find_blocks(transformer, self.blocks)

    def blocks_of(self, transformer: nn.Module) -> list[nn.Module]:
        """Return the modules around the video self-attentions, in the order of the model."""
        paths = {path.rpartition(".")[0] for path, _ in self._matching(transformer)}
        return [module for path, module in transformer.named_modules() if path in paths]

    def find_attentions(self, transformer: nn.Module) -> list[tuple[str, Any]]:
        """Return path and module of each video self-attention, in the order they run.

        Raises:
            ValueError: if there is none, or one has a processor that is not reproduced.
        """
        found = self._matching(transformer)
        if not found:
            raise ValueError(
                f"{type(transformer).__name__} has no module matching {self.attentions!r}, "
                f"so family {self.name!r} cannot make it sparse"
            )
        for path, module in found:
            processor = type(original_of(module.processor)).__name__
            if processor not in self.original_processors:
                raise ValueError(
                    f"expected {' or '.join(self.original_processors)} at {path}, got {processor}; "
                    "call sparsify before installing other attention processors"
                )
        return found

    def _matching(self, transformer: nn.Module) -> list[tuple[str, Any]]:
        patterns = (self.attentions,) if isinstance(self.attentions, str) else self.attentions
        return [
            (path, module)
            for pattern in patterns
            for path, module in transformer.named_modules()
            if re.fullmatch(pattern, plain_path(path))
        ]
