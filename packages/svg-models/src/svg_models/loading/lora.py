"""Load low-rank adapters (LoRA) into a pipeline."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svg_models.errors import ModelUnavailableError, SettingError, first_line
from svg_models.files import user_path
from svg_models.loading.folder import check_safetensors
from svg_models.loading.hub import HUB_ID, hub_errors
from svg_models.numeric import as_number

__all__ = ["Lora", "load_loras"]


@dataclass(frozen=True, kw_only=True)
class Lora:
    """One adapter and how strongly it applies.

    Attributes:
        source: a file or folder, or the id of a repository on the hub.
        weight: 1 applies it as it was trained.

    Raises:
        SettingError: if the source is neither, or the weight is not a finite number.
    """

    source: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", as_number("the weight of a LoRA", self.weight))
        if not isinstance(self.source, str) or "\0" in self.source:
            raise SettingError(f"the source of a LoRA is a path or a hub id, got {self.source!r}")
        if not self.local and (os.path.isabs(self.source) or not HUB_ID.fullmatch(self.source)):
            raise SettingError(
                f"no LoRA at '{self.source}': expected a file, a folder or a hub id, with a weight "
                "if you like, as in style.safetensors:0.8"
            )

    @classmethod
    def parse(cls, text: str) -> Lora:
        """Read `SOURCE` or `SOURCE:WEIGHT`.

        Raises:
            SettingError: as the class.
        """
        if not isinstance(text, str):
            return cls(source=text)  # says what is wrong with it
        source, colon, weight = text.rpartition(":")
        try:
            return cls(source=source, weight=float(weight)) if colon else cls(source=text)
        except ValueError as error:
            if isinstance(error, SettingError):
                raise
            return cls(source=text)  # the colon is part of the path

    def __str__(self) -> str:
        return f"{self.source}:{self.weight:g}"

    @property
    def local(self) -> bool:
        """Return whether it is on this machine."""
        try:
            return user_path(self.source).exists()
        except (OSError, ValueError):  # no name that a file could have
            return False


def load_loras(pipe: Any, loras: Sequence[Lora]) -> None:
    """Load adapters into the transformer of a pipeline and switch them on.

    Where a pipeline has two transformers they go to the first, which denoises the early steps.

    Args:
        pipe: a diffusers pipeline.
        loras: in any order; their effects add.

    Raises:
        ModelUnavailableError: if one cannot be read or does not match the transformer.
    """
    if not loras:
        return
    if importlib.util.find_spec("peft") is None:
        raise ModelUnavailableError("a LoRA needs the package peft; run pip install peft")
    if not hasattr(pipe, "load_lora_weights"):
        raise ModelUnavailableError(f"diffusers.{type(pipe).__name__} takes no LoRA")
    names = [f"lora_{index}" for index in range(len(loras))]
    for name, lora in zip(names, loras, strict=True):
        _load(pipe, name, lora)
    pipe.set_adapters(names, [lora.weight for lora in loras])


def _load(pipe: Any, name: str, lora: Lora) -> None:
    kind = type(pipe.transformer).__name__
    if lora.local:
        source = str(_local_weights(lora))
    try:
        # An adapter in another format may run code when it is read.
        options = {"adapter_name": name, "use_safetensors": True}
        if lora.local:
            pipe.load_lora_weights(source, **options)
        else:
            with hub_errors(lora.source) as offline:
                pipe.load_lora_weights(lora.source, local_files_only=offline, **options)
    except ModelUnavailableError:
        raise
    except Exception as error:
        raise ModelUnavailableError(
            f"LoRA {lora.source} does not fit {kind}: {_reason(error)}"
        ) from error
    if name not in getattr(pipe.transformer, "peft_config", {}):
        raise ModelUnavailableError(f"LoRA {lora.source} holds no weights for {kind}")


def _local_weights(lora: Lora) -> Path:
    """Return the file or folder of a LoRA, whose headers hold what they say."""
    path = user_path(lora.source)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or any(file.suffix != ".safetensors" for file in files):
        raise ModelUnavailableError(
            f"LoRA {lora.source} is no safetensors file, and other formats can run code; convert it"
        )
    for file in files:
        check_safetensors(file)
    return path


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # torch puts a heading above the tensors that do not match
    telling = [line for line in lines if not line.endswith(":")]
    return telling[0][:160] if telling else first_line(error)
