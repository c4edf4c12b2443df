"""Tensors between two pages that nobody may touch: a kernel that leaves them ends the process."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_PRIVATE_ANONYMOUS = 0x22
_FORBIDDEN = 0


def guarded(tensor: Tensor) -> Tensor:
    """Return a contiguous copy that ends where an unreadable page begins; never freed."""
    used = tensor.numel() * tensor.element_size()
    page = mmap.PAGESIZE
    pages = -(-used // page) * page
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    base = _libc.mmap(None, pages + 2 * page, protection, _PRIVATE_ANONYMOUS, -1, 0)
    for wall in (base, base + page + pages):
        if _libc.mprotect(wall, page, _FORBIDDEN):
            raise OSError(ctypes.get_errno(), "mprotect failed")
    memory = (ctypes.c_char * used).from_address(base + page + pages - used)
    copy = torch.frombuffer(memory, dtype=torch.uint8).view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)
