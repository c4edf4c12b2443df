"""One video on several GPUs."""

from __future__ import annotations

from svg_models.parallel.ulysses import attend_over_ranks, context_config, refuse_parallel

__all__ = ["attend_over_ranks", "context_config", "refuse_parallel"]
