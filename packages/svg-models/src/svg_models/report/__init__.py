"""Self-contained HTML pages about a run, and what all pages share."""

from __future__ import annotations

from svg_models.report.run import run_page, write_run_report

__all__ = ["run_page", "write_run_report"]
