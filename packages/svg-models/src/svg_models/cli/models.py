"""`svg models`."""

from __future__ import annotations

from rich.table import Table

from svg_models.cli.output import out, spoken_errors


def models() -> None:
    """List the models: the embedded one, and the families that can be made sparse."""
    with spoken_errors():
        from svg_models.families import known_families

        out().print(
            "[bold]embedded[/]  a small Wan model of moving shapes in this package; the default\n"
        )
        known = Table(title="Families, and checkpoints that were checked", title_justify="left")
        for name in ("family", "covers", "checkpoints"):
            known.add_column(name)
        for family in known_families():
            known.add_row(f"[bold]{family.name}[/]", family.title, "\n".join(family.checkpoints))
            known.add_section()
        out().print(known)
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
        out().print(
            "Any diffusers pipeline of these families loads with --model. A family without "
            "settings of its own runs with those of Wan 2.1 14B; short clips get fewer clusters.",
            highlight=False,
        )
