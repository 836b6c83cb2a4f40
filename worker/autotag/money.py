"""Amounts in dollars as text. An unknown amount is never shown as zero."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import ROUND_HALF_EVEN, Decimal

DECIMALS = 8  # a token costs at least 0.00000001 dollars
MAX_NAMED_MODELS = 3  # models without a price that one line names

Amount = Decimal | float | int


def dollars(amount: Amount) -> str:
    """An amount for people: two decimals from $1, four decimals from $0.01, two significant digits below."""
    value = Decimal(str(amount))
    if value >= 1:
        return f"${value:,.2f}"
    if value == 0:
        return "$0"
    if value >= Decimal("0.01"):
        return f"${value:.4f}"
    return "$" + plain(value.quantize(Decimal(1).scaleb(value.adjusted() - 1), ROUND_HALF_EVEN))


def plain(amount: Amount) -> str:
    """An amount for programs: at most eight decimals, no exponent, no trailing zeros."""
    text = f"{round_dollars(amount):f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def round_dollars(amount: Amount) -> Decimal:
    """Rounds an amount to eight decimals."""
    return Decimal(str(amount)).quantize(Decimal(1).scaleb(-DECIMALS), ROUND_HALF_EVEN)


def total(known: Amount, unpriced: int, models: Sequence[str]) -> str:
    """A sum with an unknown part: "$0.0123 + 40 answers of unknown cost (my-model)".

    Args:
        known: dollars of the answers that have a price.
        unpriced: number of answers whose model has no price.
        models: names of these models.
    """
    if not unpriced:
        return dollars(known)
    names = ", ".join(models[:MAX_NAMED_MODELS]) + (", …" if len(models) > MAX_NAMED_MODELS else "")
    answers = "1 answer" if unpriced == 1 else f"{unpriced:,} answers"
    unknown = f"{answers} of unknown cost" + (f" ({names})" if names else "")
    return f"{dollars(known)} + {unknown}" if known else unknown
