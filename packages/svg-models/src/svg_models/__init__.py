"""One line makes a diffusers video pipeline sparse: Wan, HunyuanVideo, Cosmos, CogVideoX."""

__version__ = "0.1.0"
