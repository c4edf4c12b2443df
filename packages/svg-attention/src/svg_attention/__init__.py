"""Model-agnostic sparse attention for video diffusion: SVG1, SVG2 and beyond."""

__version__ = "0.1.0"
