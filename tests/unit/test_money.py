"""Dollars are readable, plain for programs, and never zero when they are unknown."""

from __future__ import annotations

from decimal import Decimal

import pytest

from autotag.money import dollars, plain, total


@pytest.mark.parametrize(
    ("amount", "shown"),
    [
        (0, "$0"), (Decimal("0.000028740000"), "$0.000029"), (0.0051, "$0.0051"), (Decimal("0.0123456"), "$0.0123"),
        (0.5, "$0.5000"), (1234.567, "$1,234.57"), (1e-7, "$0.0000001"),
    ],
)  # fmt: skip
def test_people_see_what_an_amount_is_worth(amount: Decimal | float, shown: str) -> None:
    assert dollars(amount) == shown


@pytest.mark.parametrize(
    ("amount", "shown"),
    [
        (Decimal("0.000287400000000000000"), "0.0002874"), (Decimal("0E-21"), "0"), (Decimal("20.00"), "20"),
        (1e-7, "0.0000001"), (Decimal("0.123456789123"), "0.12345679"), (100, "100"),
    ],
)  # fmt: skip
def test_programs_get_plain_numbers(amount: Decimal | float, shown: str) -> None:
    assert plain(amount) == shown


@pytest.mark.parametrize(
    ("known", "unpriced", "models", "shown"),
    [
        (0.0123, 0, [], "$0.0123"),
        (0, 0, [], "$0"),
        (0.0123, 40, ["my-model"], "$0.0123 + 40 answers of unknown cost (my-model)"),
        (0, 1, ["my-model"], "1 answer of unknown cost (my-model)"),
        (0, 4000, ["a", "b", "c", "d"], "4,000 answers of unknown cost (a, b, c, …)"),
    ],
)
def test_a_sum_says_what_it_leaves_out(known: float, unpriced: int, models: list[str], shown: str) -> None:
    assert total(known, unpriced, models) == shown
