"""How many tokens an image costs, by the arithmetic of each model family.

Source of the figures: OpenAI's guide "Images and vision", section "Calculating costs".
"""

from __future__ import annotations

import math
from typing import Literal

Detail = Literal["low", "high"]

LOW_DETAIL_SIDE = 512  # pixels: what a model sees of an image with detail "low"
PATCH_SIDE = 32  # pixels
MOST_PATCHES = 1536
PROMPT_TOKENS = 250  # instructions and schema, measured with o200k and rounded up

#: Tokens per 32-pixel patch, of the models that count patches.
PATCH_FACTORS = {
    "gpt-4.1-mini": 1.62, "gpt-4.1-nano": 2.46, "gpt-5-mini": 1.62, "gpt-5-nano": 2.46, "o4-mini": 1.72,
}  # fmt: skip
#: (base, per 512-pixel tile), of the models that count tiles.
TILE_COSTS = {"gpt-4o-mini": (2833, 5667), "gpt-4o": (85, 170), "gpt-4.1": (85, 170), "gpt-5": (70, 140)}


def _family(model: str, families: dict[str, object]) -> str | None:
    """The longest family name that the model's name starts with (dated snapshots included)."""
    return max((name for name in families if model.startswith(name)), key=len, default=None)


def image_tokens(model: str, detail: Detail, width: int, height: int) -> int:
    """Input tokens of one image of so many pixels; an unknown model counts as the dearest known one."""
    patch, tile = _family(model, {**PATCH_FACTORS}), _family(model, {**TILE_COSTS})
    if patch and len(patch) >= len(tile or ""):
        patches = math.ceil(width / PATCH_SIDE) * math.ceil(height / PATCH_SIDE)
        return math.ceil(min(patches, MOST_PATCHES) * PATCH_FACTORS[patch])
    base, per_tile = TILE_COSTS[tile or "gpt-4o-mini"]
    if detail == "low":
        return base
    scale = min(1.0, 2048 / max(width, height))
    scale = min(scale, 768 / min(width, height))
    tiles = math.ceil(width * scale / 512) * math.ceil(height * scale / 512)
    return base + per_tile * tiles


def largest_side(detail: Detail) -> int:
    """Pixels of an image's longer side beyond which the model sees no more."""
    return LOW_DETAIL_SIDE if detail == "low" else 2048


def tokens_per_image(model: str, detail: Detail, max_output_tokens: int) -> int:
    """The most one image can cost: what is reserved before the call. Square images are the dearest."""
    side = largest_side(detail)
    return image_tokens(model, detail, side, side) + PROMPT_TOKENS + max_output_tokens
