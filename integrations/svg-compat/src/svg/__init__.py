"""What SGLang imports of the package `svg` of the published code, and nothing else of it."""

__all__: list[str] = []

__version__ = "0.1.0"
