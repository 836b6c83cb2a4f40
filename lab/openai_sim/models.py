"""The models of the simulator: their parameters, token counts and prices.

The arithmetic and the prices are independent of the product, so that a test can compare the two. Where OpenAI publishes
no figure (for example the tokens of an image on gpt-6-luna), the figure here deliberately differs from the product's
initial guess, because the product has to learn it from ``usage``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

PATCH_SIDE = 32  # pixels
MAX_PATCHES = 1536  # of one image
CHARACTERS_PER_TOKEN = 4  # of text: the rule of thumb of OpenAI's guide "What are tokens"
EFFORTS = ("none", "low", "medium", "high", "xhigh", "max")
FASTER = frozenset({"priority", "fast"})  # service tiers at twice the price
MILLION = 1_000_000  # tokens that a price is for


@dataclass(frozen=True)
class Prices:
    """Dollars per million tokens."""

    input: Decimal
    cached: Decimal
    output: Decimal
    cache_write: Decimal | None = None  # None: writing to the cache costs the same as other input


@dataclass(frozen=True)
class Model:
    """One model as OpenAI offers it."""

    name: str
    snapshot: str = ""  # suffix of the dated snapshot's name
    efforts: tuple[str, ...] = ()  # reasoning efforts; empty: the model does not reason
    default_effort: str | None = None  # the effort of a request that sets none
    vision: bool = True
    patch: Decimal | None = Decimal(1)  # tokens per 32-pixel patch of an image; or:
    tile: tuple[int, int] | None = None  # tokens per image and per 512-pixel tile
    prices: Prices | None = None
    shutdown_date: str | None = None  # YYYY-MM-DD
    tiers: frozenset[str] = frozenset()  # service tiers besides "default"

    @property
    def reasons(self) -> bool:
        """Whether the model is a reasoning model."""
        return bool(self.efforts)

    @property
    def dated(self) -> str:
        """The name of the dated snapshot, which answers name as their model."""
        return self.name + self.snapshot

    @property
    def writes_cache(self) -> bool:
        """Whether ``usage`` counts the tokens written to the prompt cache."""
        return self.prices is not None and self.prices.cache_write is not None

    def image_tokens(self, detail: str, width: int, height: int) -> int:
        """Input tokens of one image; sizes in pixels. Only models that count tiles use ``detail``."""
        if self.tile is None:
            patches = math.ceil(width / PATCH_SIDE) * math.ceil(height / PATCH_SIDE)
            return math.ceil(min(patches, MAX_PATCHES) * (self.patch or 0))
        base, per_tile = self.tile
        if detail == "low":
            return base
        scale = min(1.0, 2048 / max(width, height))
        scale = min(scale, 768 / min(width, height))
        return base + per_tile * math.ceil(width * scale / 512) * math.ceil(height * scale / 512)


def _prices(uncached: str, cached: str, output: str, *, writes: bool = False) -> Prices:
    """``writes``: the model charges 1.25 times the input price for tokens that it writes to the cache."""
    return Prices(
        Decimal(uncached), Decimal(cached), Decimal(output), Decimal(uncached) * Decimal("1.25") if writes else None
    )


_SHUTDOWN = "2027-01-14"  # gpt-4o, gpt-4o-mini, gpt-4.1 and gpt-4.1-mini
_ALL_TIERS = frozenset({"flex", "priority", "fast"})
_PRIORITY = frozenset({"priority"})

# Prices are from OpenAI's pages, autumn 2026. Image tokens are users' measurements where OpenAI's guide differs.
MODELS: dict[str, Model] = {model.name: model for model in (
    Model("gpt-6-luna", "-2026-10-06", EFFORTS, "medium", patch=Decimal("1.2"), tiers=_ALL_TIERS,
          prices=_prices("0.10", "0.01", "0.50", writes=True)),
    Model("gpt-6.1-terra", "-2026-11-03", EFFORTS, "medium", patch=Decimal("1.1"), tiers=_ALL_TIERS,
          prices=_prices("1.00", "0.05", "5.00", writes=True)),
    Model("gpt-5.6-luna", "-2026-06-18", EFFORTS, "medium", patch=Decimal("1.2"), tiers=_ALL_TIERS,
          prices=_prices("0.20", "0.02", "1.20", writes=True)),
    Model("gpt-5.6-terra", "-2026-06-18", EFFORTS, "medium", patch=Decimal("1.1"), tiers=_ALL_TIERS,
          prices=_prices("2.00", "0.20", "12.00", writes=True)),
    Model("gpt-5.6-sol", "-2026-06-18", EFFORTS, "medium", patch=Decimal("1.0"), tiers=_ALL_TIERS,
          prices=_prices("4.00", "0.40", "20.00", writes=True)),
    Model("gpt-5.4-mini", "-2026-03-17", EFFORTS, "medium", patch=Decimal("1.2"), tiers=_ALL_TIERS,
          prices=_prices("0.75", "0.075", "4.50")),
    Model("gpt-4.1-mini", "-2025-04-14", patch=Decimal("1.62"), shutdown_date=_SHUTDOWN, tiers=_PRIORITY,
          prices=_prices("0.40", "0.10", "1.60")),
    Model("gpt-4.1-nano", "-2025-04-14", patch=Decimal("2.46"), shutdown_date="2026-10-23", tiers=_PRIORITY,
          prices=_prices("0.10", "0.025", "0.40")),
    Model("gpt-4o-mini", "-2024-07-18", tile=(2833, 5667), shutdown_date=_SHUTDOWN, tiers=_PRIORITY,
          prices=_prices("0.15", "0.075", "0.60")),
    Model("gpt-4o", "-2024-08-06", tile=(85, 170), shutdown_date=_SHUTDOWN, tiers=_PRIORITY,
          prices=_prices("2.50", "1.25", "10.00")),
    Model("gpt-4.1", "-2025-04-14", tile=(85, 170), shutdown_date=_SHUTDOWN, tiers=_PRIORITY,
          prices=_prices("2.00", "0.50", "8.00")),
    Model("o3-mini", "-2025-01-31", ("low", "medium", "high"), "medium", vision=False, patch=None,
          prices=_prices("1.10", "0.55", "4.40")),
)}  # fmt: skip
_DATED = {model.dated: model for model in MODELS.values()}


def find(name: object) -> Model | None:
    """The model of this name or of this dated snapshot."""
    return MODELS.get(str(name)) or _DATED.get(str(name))


def text_tokens(characters: int) -> int:
    """Tokens of a text with this many characters."""
    return math.ceil(characters / CHARACTERS_PER_TOKEN)


def dollars(model: str, usage: Mapping[str, Any], tier: str = "default", batch: bool = False) -> Decimal:
    """What OpenAI charges for one answer.

    Args:
        model: name of the model or of its dated snapshot.
        usage: the answer's usage object.
        tier: the service tier that is billed: flex costs half, priority and fast cost double.
        batch: whether the answer is from the Batch API, which costs half.

    Raises:
        KeyError: the simulator has no price for this model.
    """
    found = find(model)
    if found is None or found.prices is None:
        raise KeyError(model)
    prices = found.prices
    details = usage.get("prompt_tokens_details") or {}
    cached, written = int(details.get("cached_tokens") or 0), int(details.get("cache_write_tokens") or 0)
    standard = (
        (int(usage["prompt_tokens"]) - cached - written) * prices.input
        + cached * prices.cached
        + written * (prices.input if prices.cache_write is None else prices.cache_write)
        + int(usage["completion_tokens"]) * prices.output
    ) / MILLION
    if batch or tier == "flex":
        return standard / 2
    return standard * 2 if tier in FASTER else standard
