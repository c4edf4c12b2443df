"""`svg doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from svg_models.cli.output import escaped, out, say_json, spoken_errors

if TYPE_CHECKING:
    from svg_models.doctor import Check


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Hub id: also report if it fits, where measured."),
    ] = None,
) -> None:
    """Report what this machine can run, and why not the rest."""
    with spoken_errors():
        from svg_models.loading.device import check_device

        check_device(device)
        from svg_models.doctor import conclude, diagnose, to_dict
        from svg_models.loading import pick_device

        place = pick_device(device)
        checks = diagnose(place, model)
        if as_json:
            say_json(to_dict(checks, place))
            return
        table = Table(title="What this machine can run", title_justify="left")
        for name in ("", "what", "", "detail"):
            table.add_column(name, overflow="fold")
        part = ""
        for check in checks:
            if check.part != part:
                table.add_section()
            shown, part = ("" if check.part == part else check.part), check.part
            table.add_row(
                f"[bold]{escaped(shown)}[/]", check.name, _mark(check), escaped(check.detail)
            )
        out().print(table)
        conclusion = conclude(checks, place)
        out().print(f"[bold]{escaped(conclusion.sentence)}[/]", highlight=False)
        if conclusion.command:
            out().print("This would make it faster:", highlight=False)
            out().print(f"  {escaped(conclusion.command)}", highlight=False, soft_wrap=True)


def _mark(check: Check) -> str:
    if check.works is None:
        return ""
    if check.works:
        return "[green]✓[/]"
    return "[red]✗[/]" if check.matters else "[dim]–[/]"
