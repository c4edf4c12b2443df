"""`svg doctor`."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer
from rich.table import Table

from svg_models.cli.output import escaped, out, spoken_errors


def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON for a program to read.")
    ] = False,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """List what this machine can run, and why not."""
    with spoken_errors():
        from svg_models.loading.device import check_device

        check_device(device)
        from svg_models.doctor import diagnose, to_dict
        from svg_models.loading import pick_device

        checks = diagnose(pick_device(device))
        if as_json:
            json.dump(to_dict(checks), sys.stdout, indent=1)
            sys.stdout.write("\n")
            return
        table = Table(title="What this machine can run", title_justify="left")
        for name in ("", "what", "", "detail"):
            table.add_column(name, overflow="fold")
        marks = {True: "[green]✓[/]", False: "[red]✗[/]", None: ""}
        part = ""
        for check in checks:
            if check.part != part:
                table.add_section()
            shown, part = ("" if check.part == part else check.part), check.part
            table.add_row(
                f"[bold]{shown}[/]", check.name, marks[check.works], escaped(check.detail)
            )
        out().print(table)
