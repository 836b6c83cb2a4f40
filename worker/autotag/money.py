"""Amounts in dollars as text. An unknown amount is never shown as zero."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import ROUND_HALF_EVEN, Decimal

DECIMALS = 8  # of a dollar; one token costs at least 0.00000001
MAX_NAMED_MODELS = 3  # models without a price that a line names

Amount = Decimal | float | int


def dollars(amount: Amount) -> str:
    """An amount for people: cents from a dollar on, four decimals from a cent on, two significant digits below."""
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
    """The amount with at most eight decimals."""
    return Decimal(str(amount)).quantize(Decimal(1).scaleb(-DECIMALS), ROUND_HALF_EVEN)


def total(known: Amount, unpriced: int, models: Sequence[str]) -> str:
    """A sum of which a part is unknown: "$0.0123 + 40 answers of unknown cost (my-model)"."""
    if not unpriced:
        return dollars(known)
    names = ", ".join(models[:MAX_NAMED_MODELS]) + (", …" if len(models) > MAX_NAMED_MODELS else "")
    answers = "1 answer" if unpriced == 1 else f"{unpriced:,} answers"
    unknown = f"{answers} of unknown cost" + (f" ({names})" if names else "")
    return f"{dollars(known)} + {unknown}" if known else unknown
