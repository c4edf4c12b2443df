"""Self-contained HTML pages about a run or a comparison."""

from __future__ import annotations

from svg_models.report.comparison import comparison_page
from svg_models.report.run import run_page, write_run_report

__all__ = ["comparison_page", "run_page", "write_run_report"]
