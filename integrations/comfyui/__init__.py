"""Sparse VideoGen for ComfyUI: one node that makes self-attention of video models sparse."""

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
