"""What the database stores of anybody's text is what the worker would show of it."""

from __future__ import annotations

import unicodedata

import psycopg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autotag.texts import printable
from lab.postgres import LocalPostgres


def test_every_character_is_printed_as_the_worker_prints_it(postgres: LocalPostgres) -> None:
    """Those that no version of Unicode has given a meaning may also be kept: which ones that are changes every year."""
    kept = 0
    with psycopg.connect(postgres.url()) as connection:
        for first in range(0, 0x110000, 0x400):
            codes = [code for code in range(first, first + 0x400) if code and not 0xD800 <= code < 0xE000]
            rows = connection.execute(
                "select autotag.printable('a' || chr(c) || 'b', 20) from unnest(%s::int[]) with ordinality u (c, i) order by i",
                (codes,),
            ).fetchall()
            for code, (shown,) in zip(codes, rows, strict=True):
                text = f"a{chr(code)}b"
                if unicodedata.category(chr(code)) == "Cn" and shown == text:
                    kept += 1
                    continue
                assert shown == printable(text, 20), hex(code)
    assert kept < 0x110000 - 900_000, "whole planes that nobody uses are spelled out"


@given(
    st.text(st.characters(exclude_categories=["Cs", "Cn"], exclude_characters="\0"), max_size=200), st.integers(1, 60)
)
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_text_is_printed_as_the_worker_prints_it(postgres: LocalPostgres, text: str, length: int) -> None:
    with psycopg.connect(postgres.url()) as connection:
        row = connection.execute("select autotag.printable(%s, %s)", (text, length)).fetchone()
    assert row == (printable(text, length),)
