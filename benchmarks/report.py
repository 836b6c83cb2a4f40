"""The output of a benchmark: figures with their targets, as a table and as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Figure:
    """A measured value and its target (``bar``); ``maximum`` for a value that can also be too high."""

    value: float
    bar: float
    better: Literal["lower", "higher"]
    maximum: float | None = None

    @property
    def ok(self) -> bool:
        if self.maximum is not None and self.value > self.maximum:
            return False
        return self.value <= self.bar if self.better == "lower" else self.value >= self.bar


@dataclass
class Result:
    """The result of one benchmark: figures by name, and other measurements (``details``)."""

    bench: str
    figures: dict[str, Figure]
    details: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> str:
        """One line: ``{bench, figures: {name: {value, bar, better, ok}}, details}``."""
        figures = {
            name: {"value": round(f.value, 4), "bar": f.bar, "better": f.better, "ok": f.ok}
            | ({} if f.maximum is None else {"maximum": f.maximum})
            for name, f in self.figures.items()
        }
        return json.dumps({"bench": self.bench, "figures": figures, "details": self.details})

    def show(self, console: Console) -> None:
        """Prints the figures as a table."""
        table = Table("figure", "value", "target", "", box=None, padding=(0, 2, 0, 0))
        for name, f in self.figures.items():
            sign = "≤" if f.better == "lower" else "≥"
            bar = f"{sign} {f.bar:g}" + ("" if f.maximum is None else f", ≤ {f.maximum:g}")
            table.add_row(name, f"{f.value:.4g}", bar, "[green]ok[/]" if f.ok else "[red]missed[/]")
        console.print(table)


def quantile(values: list[float], share: float) -> float:
    """The value that the given share of the values does not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]
