"""Sparse VideoGen inside engines: vLLM-Omni, SGLang, xDiT and ComfyUI.

Each engine has a module of its own; what they share is here. Nothing of an engine is imported
before the engine itself asks for it.
"""

from svg_engines.generation import Generation, Reasons
from svg_engines.settings import Settings

__all__ = ["Generation", "Reasons", "Settings"]

__version__ = "0.1.0"
