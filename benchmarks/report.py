"""What a bench prints: figures with their bars, for people and for programs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Figure:
    """A measured value and the bar it is held against; ``most`` where a value can also be too good to be honest."""

    value: float
    bar: float
    better: Literal["lower", "higher"]
    most: float | None = None

    @property
    def ok(self) -> bool:
        if self.most is not None and self.value > self.most:
            return False
        return self.value <= self.bar if self.better == "lower" else self.value >= self.bar


@dataclass
class Result:
    """One bench: its figures by name, and whatever else was measured."""

    bench: str
    figures: dict[str, Figure]
    details: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> str:
        """One line: ``{bench, figures: {name: {value, bar, better, ok}}, details}``."""
        figures = {
            name: {"value": round(f.value, 4), "bar": f.bar, "better": f.better, "ok": f.ok}
            | ({} if f.most is None else {"most": f.most})
            for name, f in self.figures.items()
        }
        return json.dumps({"bench": self.bench, "figures": figures, "details": self.details})

    def show(self, console: Console) -> None:
        """A table of the figures."""
        table = Table("figure", "value", "bar", "", box=None, padding=(0, 2, 0, 0))
        for name, f in self.figures.items():
            sign = "≤" if f.better == "lower" else "≥"
            bar = f"{sign} {f.bar:g}" + ("" if f.most is None else f", ≤ {f.most:g}")
            table.add_row(name, f"{f.value:.4g}", bar, "[green]ok[/]" if f.ok else "[red]missed[/]")
        console.print(table)


def quantile(values: list[float], share: float) -> float:
    """The value that so large a share of them does not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]
