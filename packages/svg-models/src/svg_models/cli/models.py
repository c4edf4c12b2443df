"""`svg models`."""

from __future__ import annotations

from rich.table import Table

from svg_models.cli.output import escaped, out, spoken_errors


def models() -> None:
    """List the models: the embedded one, and the families that can be made sparse."""
    with spoken_errors():
        from svg_models.families import known_families

        out().print(
            "[bold]embedded[/]  a small Wan model of moving shapes in this package; the default\n"
        )
        table = Table(title="Published settings by family", title_justify="left")
        for name in ("family", "settings published for", "clusters", "dense first"):
            table.add_column(name)
        table.add_column("tokens", justify="right")
        for family in known_families():
            for index, row in enumerate(family.recipes):
                table.add_row(
                    f"[bold]{family.name}[/]" if index == 0 else "",
                    row.title,
                    f"{row.q_clusters} x {row.k_clusters}",
                    f"{row.schedule.dense_steps:.0%} of steps",
                    f"{row.tokens:,}",
                )
            table.add_section()
        out().print(table)
        titles = "; ".join(f"{f.name}: {f.title}" for f in known_families())
        out().print(
            f"Any diffusers pipeline of these families loads with --model ({escaped(titles)}). "
            "Short clips get fewer clusters.",
            highlight=False,
        )
