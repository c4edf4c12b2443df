"""The program `svg`, also as `python -m svg_models`."""

from __future__ import annotations

import signal

from svg_models.interrupts import listening

__all__ = ["main"]


def main() -> None:
    """Run the command line."""
    try:
        with listening():
            from svg_models.cli import app

            app()
    finally:  # while the interpreter closes down nothing is left to clean up
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)


if __name__ == "__main__":
    main()
