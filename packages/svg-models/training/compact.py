"""Keep a network in few, small files: matrices at some 6 bits a weight, the rest in half precision.

A matrix is rounded row by row to steps of a twelfth of the row's root mean square, which is 2.4 %
of noise, and deflated, which takes the bits that no weight needs.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

LARGEST = 15_000_000
"""Bytes of a file."""
STEPS_PER_RMS = 12.0
FEWEST_WEIGHTS = 2**14
"""Smaller matrices are kept in half precision."""


def quantise(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Round `[M, N]` row by row to int8 steps; return the steps and their size, fp32 `[M, 1]`.

    A row with an entry beyond 127 steps takes larger ones.
    """
    wide = matrix.float()
    rms = wide.square().mean(dim=1, keepdim=True).sqrt() / STEPS_PER_RMS
    size = torch.maximum(rms, wide.abs().amax(dim=1, keepdim=True) / 127.0).clamp_min(1e-12)
    return (wide / size).round().to(torch.int8), size


def pack(tensors: Mapping[str, Tensor], folder: Path, *, largest: int = LARGEST) -> list[Path]:
    """Write tensors to `weights-0.npz` and so on, each of at most `largest` bytes or one tensor.

    Args:
        tensors: by name.
        folder: where to write; files of an earlier call are removed.
        largest: bytes.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("weights-*.npz"):
        old.unlink()
    shards: list[list[tuple[str, bytes]]] = [[]]
    taken = 0
    for name, tensor in tensors.items():
        members = _members(name, tensor.detach().cpu())
        size = sum(len(_zipped([member])) for member in members)
        if shards[-1] and taken + size > largest:
            shards.append([])
            taken = 0
        shards[-1] += members
        taken += size
    paths = [folder / f"weights-{index}.npz" for index in range(len(shards))]
    for path, members in zip(paths, shards, strict=True):
        path.write_bytes(_zipped(members))
    return paths


def unpack(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of `pack`, fp32.

    Raises:
        FileNotFoundError: if the folder has none.
    """
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("weights-*.npz")):
        with np.load(path) as arrays:
            found |= {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    if not found:
        raise FileNotFoundError(f"{folder} has no weights-*.npz; give the folder of a stored run")
    sizes = {name.removesuffix(":size"): found.pop(name) for name in list(found) if ":" in name}
    return {
        name: value.float() * sizes[name] if name in sizes else value.float()
        for name, value in found.items()
    }


def _members(name: str, tensor: Tensor) -> list[tuple[str, bytes]]:
    if tensor.ndim == 2 and tensor.numel() >= FEWEST_WEIGHTS:
        steps, size = quantise(tensor)
        return [(name, _array(steps)), (f"{name}:size", _array(size))]
    return [(name, _array(tensor.half()))]


def _array(tensor: Tensor) -> bytes:
    target = io.BytesIO()
    np.save(target, tensor.contiguous().numpy())
    return target.getvalue()


def _zipped(members: list[tuple[str, bytes]]) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in members:
            # A fixed date, so that the file follows from the weights alone.
            entry = zipfile.ZipInfo(f"{name}.npy")
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED, compresslevel=1)
    return target.getvalue()
