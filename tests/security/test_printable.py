"""The database stores texts from outside just as the worker would show them."""

from __future__ import annotations

import unicodedata

import psycopg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autotag.texts import printable
from lab.postgres import LocalPostgres

TOGETHER = 64  # characters of one text: a call for each of the 1.1 million takes ten times as long


def test_every_character_is_printed_as_the_worker_prints_it(postgres: LocalPostgres) -> None:
    """Unassigned characters may also be kept, because which ones these are depends on the version of Unicode."""
    kept = 0
    with psycopg.connect(postgres.url()) as connection:

        def shown_of(texts: list[str]) -> list[str]:
            statement = "select autotag.printable(t, 1000) from unnest(%s::text[]) with ordinality u (t, i) order by i"
            return [shown for (shown,) in connection.execute(statement, (texts,))]

        for first in range(0, 0x110000, 0x4000):
            characters = [chr(code) for code in range(first, first + 0x4000) if code and not 0xD800 <= code < 0xE000]
            groups = [characters[at : at + TOGETHER] for at in range(0, len(characters), TOGETHER)]
            texts = [f"a{'b'.join(group)}b" for group in groups]
            alone: list[str] = []  # of groups that differ: each character by itself
            for group, text, shown in zip(groups, texts, shown_of(texts), strict=True):
                if shown == text and all(unicodedata.category(character) == "Cn" for character in group):
                    kept += len(group)
                elif shown != printable(text, 1000):
                    alone += [f"a{character}b" for character in group]
            for text, shown in zip(alone, shown_of(alone), strict=True):
                if unicodedata.category(text[1]) == "Cn" and shown == text:
                    kept += 1
                    continue
                assert shown == printable(text, 1000), hex(ord(text[1]))
    assert kept < 0x110000 - 900_000, "whole planes that nobody uses are spelled out"


@given(
    st.text(st.characters(exclude_categories=["Cs", "Cn"], exclude_characters="\0"), max_size=200), st.integers(1, 60)
)
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_text_is_printed_as_the_worker_prints_it(postgres: LocalPostgres, text: str, length: int) -> None:
    with psycopg.connect(postgres.url()) as connection:
        row = connection.execute("select autotag.printable(%s, %s)", (text, length)).fetchone()
    assert row == (printable(text, length),)
