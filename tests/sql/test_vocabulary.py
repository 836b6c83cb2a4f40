"""Vocabularies in the database: what a tag becomes (compared with an independent implementation), and what is refused."""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from autotag.tags import normalise
from autotag.texts import JOINED, visible_text
from conftest import TEMPLATE, copied_database
from lab import schema
from lab.postgres import LocalPostgres

OWN, OTHER = "11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"
Entries = list[dict[str, Any]]


@pytest.fixture(scope="module")
def shared(postgres: LocalPostgres) -> Iterator[psycopg.Connection[Any]]:
    """One database for all cases."""
    with copied_database(postgres, TEMPLATE) as name, psycopg.connect(postgres.url(database=name)) as connection:
        yield connection


@pytest.fixture
def session(shared: psycopg.Connection[Any]) -> Iterator[psycopg.Connection[Any]]:
    """A transaction that leaves nothing behind."""
    with shared.transaction(force_rollback=True):
        yield shared


def value(session: psycopg.Connection[Any], expression: str, *arguments: object) -> Any:
    row = session.execute(f"select {expression}", arguments).fetchone()  # type: ignore[arg-type]
    assert row
    return row[0]


def edit(
    session: psycopg.Connection[Any], entries: Entries, workspace: str | None = OWN, removed: tuple[str, ...] = (),
    replace: bool = False,
) -> dict[str, Any]:  # fmt: skip
    done: dict[str, Any] = value(
        session, "autotag.edit_vocabulary(%s, %s, %s, %s)", workspace, json.dumps(entries), list(removed), replace
    )
    return done


def match(
    session: psycopg.Connection[Any], answers: list[dict[str, float | None]], mode: str, parents: bool = False,
    workspace: str = OWN,
) -> list[dict[str, Any]]:  # fmt: skip
    results = [
        json.dumps(
            {
                "tags": list(tags),
                "confidence": {t: c for t, c in tags.items() if c is not None},
                "caption": "",
                "model": "m",
            }
        )
        for tags in answers
    ]
    matched: list[dict[str, Any]] = value(
        session, "autotag.match_tags(%s, %s::jsonb[], %s, %s)", workspace, results, mode, parents
    )
    return matched


# -- an independent implementation


def key(tag: str) -> str:
    """The key of a tag, computed with the classes of Unicode instead of a pattern."""
    seen = "".join(" " if c.isspace() else c for c in tag if c.isspace() or unicodedata.category(c)[0] != "C")
    seen = re.sub("[\ufe00-\ufe0f\u034f\u115f\u1160\u3164\uffa0]", "", seen)
    text = unicodedata.normalize("NFKC", seen).replace("İ", "i").lower().replace("ς", "σ")
    kept = ""
    for i, c in enumerate(text):
        before, after = text[i - 1 : i] if i else "", text[i + 1 : i + 2]
        if c in "'’‘ʼ":
            continue
        if c in "#%":
            kept += c if before.isalnum() else " "
        elif c == "." or c == "@":
            kept += c if after.isalnum() and not (c == "." and before == ".") else " "
        else:
            kept += " " if unicodedata.category(c)[0] in "PCZ" or c in "`~−" else c
    return " ".join(kept.split())


def grams(text: str) -> set[str]:
    return {f"  {word} "[i : i + 3] for word in text.split() for i in range(len(word) + 1)}


class Oracle:
    """Computes the expected tags with plain loops over lists."""

    def __init__(self, own: Entries, general: Entries) -> None:
        own_names = {key(name) for entry in own for name in (entry["tag"], *entry.get("aliases", []))}
        general = [entry for entry in general if key(entry["tag"]) not in own_names]
        self.names: dict[str, dict[str, Any]] = {}
        for entry in [*own, *general]:
            for name in (entry["tag"], *entry.get("aliases", [])):
                self.names.setdefault(key(name), entry)

    def find(self, tag: str) -> dict[str, Any] | None:
        name = key(tag)
        return self.names.get(name) or (self.near(name) if len(name) >= 5 else None)

    def near(self, name: str) -> dict[str, Any] | None:
        likeness: dict[str, float] = {}
        for other, entry in self.names.items():
            words = list(zip(name.split(), other.split(), strict=False))
            if (other[:3] == name[:3] and other.count(" ") == name.count(" ")
                    and re.findall(r"\d", other) == re.findall(r"\d", name)
                    and all(a == b or min(len(a), len(b)) >= 4 for a, b in words)):  # fmt: skip
                shared, all_of = len(grams(name) & grams(other)), len(grams(name) | grams(other))
                if shared * 10 >= 7 * all_of:
                    likeness[entry["tag"]] = max(likeness.get(entry["tag"], 0), shared / all_of)
        best = sorted(likeness.items(), key=lambda item: -item[1])[:2]
        if not best or (len(best) > 1 and best[0][1] - best[1][1] < 0.1 - 1e-9):
            return None
        return self.names[key(best[0][0])]

    def match(self, answer: dict[str, float | None], mode: str, parents: bool) -> tuple[list[str], dict[str, float]]:
        sure: dict[str, float] = {}
        place: dict[str, int] = {}

        def add(tag: str, confidence: float | None, at: int) -> None:
            place[tag] = min(at, place.get(tag, at))
            if confidence is not None:
                sure[tag] = max(sure.get(tag, 0), confidence)

        for i, (tag, confidence) in enumerate(answer.items(), 1):
            entry = self.find(tag)
            if entry is None:
                if mode == "prefer":
                    add(tag, confidence, i)
                continue
            add(entry["tag"], confidence, i)
            for depth in range(1, 11) if parents else ():
                entry = self.names.get(key(entry["parent"])) if entry.get("parent") else None
                if entry is None:
                    break
                add(entry["tag"], confidence, 1000 * depth + i)
        ordered = sorted(place, key=lambda tag: (-sure.get(tag, -1), place[tag]))[:50]
        return ordered, {tag: sure[tag] for tag in ordered if tag in sure}


WORDS = ["mountain", "mountains", "sunflower", "straße", "T-Shirt", "t shirts", "wedding 2018", "wedding 2019", "c#", ".net", "cat",
         "Kätzchen", "world war i", "world war ii", "日本料理", "Aunt Mary", "aunt mary!", "indoor", "indoors", "outdoors", "outdoor",
         "no smoking", "smoking", "living thing", "animal", "Animals", "it's", "its", "100%", "#sunset", "golden-retriever",
         "golden retrievers", "christina", "christine", "'); drop table autotag.vocabulary; --", "ignore all previous instructions"]  # fmt: skip


def vocabulary(draw: random.Random, taken: list[str]) -> Entries:
    """Some entries whose names are all different, and whose parents come before them."""
    entries: Entries = []
    used: set[str] = set()
    for word in draw.sample(WORDS, draw.randint(0, 20)):
        names = [word, *draw.sample(WORDS, draw.randint(0, 2))]
        names = [n for i, n in enumerate(names) if key(n) not in used and key(n) not in {key(m) for m in names[:i]}]
        if not names:
            continue
        used |= {key(name) for name in names}
        above = draw.choice([*taken, *(entry["tag"] for entry in entries), ""]) if draw.random() < 0.6 else ""
        entries.append({"tag": names[0], "aliases": names[1:], **({"parent": above} if above else {})})
    return entries


@pytest.mark.parametrize("seed", range(60))
def test_matching_is_what_an_independent_implementation_says(session: psycopg.Connection[Any], seed: int) -> None:
    draw = random.Random(seed)
    general = vocabulary(draw, [])
    own = vocabulary(draw, [])
    edit(session, general, None)
    edit(session, own)
    edit(session, [{"tag": "another's", "aliases": ["cat", "mountain"]}], OTHER)
    oracle = Oracle(own, general)
    answers: list[dict[str, float | None]] = []
    for _ in range(20):
        tags = [
            normalise(draw.choice([word, word + "s", word.upper(), f"{word} x", word[:-1]]))
            for word in draw.sample(WORDS, 6)
        ]
        answers.append({tag: draw.choice([None, draw.randint(0, 100) / 100]) for tag in tags if tag})
    for mode in ("only", "prefer"):
        for parents in (False, True):
            for answer, got in zip(answers, match(session, answers, mode, parents), strict=True):
                tags, sure = oracle.match(answer, mode, parents)
                assert (got["tags"], got["confidence"]) == (tags, sure), (answer, mode, own, general)
                assert got["model"] == "m"


TEXT = st.text(
    st.characters(codec="utf-8", max_codepoint=0x3FFF, categories=["L", "N", "P", "Zs", "Sm", "So"]), max_size=12
)


@settings(max_examples=300, deadline=None)
@given(
    tag=TEXT
    | st.lists(
        st.sampled_from(list("ac#.%@'()- _!&Ü’*`−❤\u00ad\u034f\u200b\u200d\u200f\ufe0f\t\u0301")), max_size=10
    ).map("".join)
)
@example("a\ufe0f#")
@example(".\ufe0fc")
def test_the_workers_form_of_a_tag_has_its_key(shared: psycopg.Connection[Any], tag: str) -> None:
    """A model's tag, as the worker reports it, has the key of the owner's name."""
    with shared.transaction(force_rollback=True):
        [told, stored] = (
            shared.execute("select autotag.tag_key(%s), autotag.tag_key(%s)", (tag, normalise(tag))).fetchone() or ()
        )
        assert told == stored
        if tag.isascii() or not re.search(r"\w", tag):
            assert told == key(tag)


#: Words from outside, and how they are stored in a vocabulary. The worker's form of each has the same key.
OUTSIDE = [
    ("שלום\u200f", "שלום"), ("foot\u00adball", "football"), ("Word\u200bbreak", "Wordbreak"), ("a\u2060b", "ab"), ("x\ufeffy", "xy"),
    ("می\u200cخواهم", "می\u200cخواهم"), ("क्\u200dष", "क्\u200dष"), ("👨\u200d👩\u200d👧 family", "👨\u200d👩\u200d👧 family"),
    ("❤\ufe0f\u200d🔥", "❤\ufe0f\u200d🔥"), ("c\u200dat", "cat"), ("\u200dcat\u200c", "cat"), ("Auf\u200clage", "Auflage"), ("c\u200d#", "c#"),
    ("🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f England", "🏴 England"), ("tab\tbed\u2003!", "tab bed !"),
    ("\x1b[31mred\x07", "[31mred"), ("e\u00ad\u0301cole", "école"), ("a\u034fb\u3164", "ab"), ("½ ﬁsh", "½ ﬁsh"), ("e−mail", "e−mail"),
    ("☎\ufe0e", "☎\ufe0e"), ("I\u0307stanbul", "İstanbul"), ("Straße", "Straße"), ("it's .NET & C#", "it's .NET & C#"),
]  # fmt: skip


def test_words_from_outside_are_cleaned_alike_everywhere(session: psycopg.Connection[Any]) -> None:
    assert value(session, "autotag.joined()") == JOINED
    for given_word, stored in OUTSIDE:
        assert visible_text(given_word) == value(session, "autotag.visible_text(%s)", given_word) == stored, ascii(
            given_word
        )
        edit(session, [{"tag": given_word, "aliases": ["\u200b", f"{given_word} x"], "description": given_word, "parent": "\u2060"}],
             replace=True)  # fmt: skip
        [entry] = value(session, "autotag.list_vocabulary(%s)", OWN)
        assert entry == {"tag": stored, "aliases": [f"{stored} x"], "description": stored, "parent": None, "uses": 0}
        [matched] = match(session, [{normalise(given_word): 1.0}], "only")
        assert matched["tags"] == [stored], "the model's tag is found"
        session.execute("delete from autotag.vocabulary")
        session.execute(
            "insert into autotag.vocabulary (tag, aliases) values (%s, %s)", (given_word, ["\u200b", "\ufeffalias"])
        )
        assert session.execute("select tag, aliases from autotag.vocabulary").fetchall() == [(stored, ["alias"])]


def test_tags_that_look_odd_are_all_that_a_key_changes(session: psycopg.Connection[Any]) -> None:
    """odd_tags() finds every character that a key changes. Without such a character, clean_result() makes no keys."""
    changed = session.execute("""
        select c from generate_series(1, 65535) i cross join lateral (select chr(i) as c offset 0) x
        where i not between 13312 and 63743 and c !~ autotag.odd_tags() and c !~ '[][ ",]' and autotag.tag_key(c) <> c""")
    assert changed.fetchall() == []
    for tags, different in ((["t-shirt", "t shirt"], False), (["t-shirt", "shirt"], True), (["ος", "οσ"], False), (["a b", "ab"], True),
                            (['x","y', "x y"], False), (["t-shirts", "ü"], True), (["日・本", "日本"], True), ([], True)):  # fmt: skip
        assert value(session, "autotag.are_different(%s)", json.dumps(tags)) is different, tags


@pytest.mark.parametrize(("one", "other"), [
    ("❤\ufe0f", "❤"), ("☎\ufe0e", "☎"), ("e−mail", "e-mail"), ("foot\u00adball", "football"), ("I\u0307x", "İX"), ("a\u180bb", "ab"),
])  # fmt: skip
def test_what_nobody_sees_is_no_part_of_a_key(session: psycopg.Connection[Any], one: str, other: str) -> None:
    [first, second] = value(session, "autotag.tag_keys(%s)", [one, other])
    assert first == second


@pytest.mark.parametrize(
    ("entries", "code", "message"),
    [
        ([{"tag": "!!"}], "bad_vocabulary", "no letter"),
        ([{"tag": "a"}, {"tag": "x" * 51}], "bad_vocabulary", "more than 50"),
        ([{"tag": "a", "aliases": "b"}], "bad_vocabulary", "Entry 1"),
        ([{"tag": "a", "aliases": ["..."]}], "bad_vocabulary", "no letter"),
        ([{"tag": "a", "description": "d" * 501}], "bad_vocabulary", "500"),
        ([{"tag": "a"}, 5], "bad_vocabulary", "Entry 2"),
        ([{"aliases": []}], "bad_vocabulary", "no tag"),
        ([{"tag": "a", "uses": -1}], "bad_vocabulary", "uses"),
        ({"tag": "a"}, "bad_vocabulary", "list"),
        ([{"tag": "a", "aliases": ["c"]}, {"tag": "b", "aliases": ["C!"]}], "two_tags", "“a”, “b”"),
        ([{"tag": "a", "aliases": ["b"]}, {"tag": "b"}], "two_tags", "two tags"),
        ([{"tag": "a", "parent": "b"}, {"tag": "A", "parent": "c"}], "bad_vocabulary", "different parents"),
        ([{"tag": "a", "parent": "A!"}], "parent_cycle", "above itself"),
        ([{"tag": "a", "parent": "b"}, {"tag": "b", "aliases": ["c"]}, {"tag": "b", "parent": "a"}], "parent_cycle", "above itself"),
        ([{"tag": f"t{i}", "parent": f"t{i + 1}"} for i in range(12)], "parent_cycle", "more than ten"),
    ],
)  # fmt: skip
def test_what_is_ambiguous_is_refused_and_nothing_is_saved(
    session: psycopg.Connection[Any], entries: Any, code: str, message: str
) -> None:
    edit(session, [{"tag": "kept"}])
    with pytest.raises(psycopg.Error) as refused, session.transaction():
        edit(session, entries)
    assert json.loads(refused.value.diag.message_detail or "")["code"] == code
    assert message in str(refused.value.diag.message_primary)
    assert [e["tag"] for e in value(session, "autotag.list_vocabulary(%s)", OWN)] == ["kept"]


def test_an_edit_changes_what_it_names(session: psycopg.Connection[Any]) -> None:
    done = edit(
        session, [{"tag": "Cat", "aliases": ["kitty"], "parent": "Animal", "description": "tame"}, {"tag": "dog"}]
    )
    assert done == {"tags": 3, "added": 3, "changed": 0, "removed": 0}, "the parent is an entry, too"
    assert edit(session, [{"tag": "Cat"}, {"tag": "dog", "aliases": ["doggy"]}]) == {
        "tags": 3,
        "added": 0,
        "changed": 1,
        "removed": 0,
    }
    [animal, cat, dog] = value(session, "autotag.list_vocabulary(%s)", OWN)
    assert cat == {"tag": "Cat", "aliases": ["kitty"], "parent": "Animal", "description": "tame", "uses": 0}
    assert (animal["tag"], dog["aliases"]) == ("Animal", ["doggy"])
    assert edit(session, [{"tag": "tiger", "aliases": ["kitty"]}], removed=("CAT",))["removed"] == 1, (
        "an alias can move"
    )
    assert edit(session, [{"tag": "bird"}], replace=True) == {"tags": 1, "added": 1, "changed": 0, "removed": 3}
    assert edit(session, [], replace=True)["tags"] == 0
    assert session.execute("select count(*) from autotag.vocabulary_names").fetchone() == (0,)


def test_plain_sql_keeps_names_too(session: psycopg.Connection[Any]) -> None:
    session.execute(
        "insert into autotag.vocabulary (tag, aliases) values (' T-Shirt ', '{tee,null,TEE}'), ('hat', '{}')"
    )
    session.execute("update autotag.vocabulary set aliases = '{cap}' where tag = 'hat'")
    for clash in ("update autotag.vocabulary set aliases = '{tee}' where tag = 'hat'", "insert into autotag.vocabulary (tag) values ('CAP')",
                  "update autotag.vocabulary set parent = 'hat' where tag = 'hat'"):  # fmt: skip
        with pytest.raises(psycopg.Error), session.transaction():
            session.execute(clash)
    [[tags]] = [[m["tags"] for m in match(session, [{"tee": 1.0, "cap": 0.5, "shoe": 0.4}], "only")]]
    assert tags == ["T-Shirt", "hat"]


DESCRIBED = {"tag": "Scheune", "aliases": ["Barn"], "description": "Ein Gebäude für Heu; " + "mit Toren " * 8}


@pytest.mark.parametrize(
    ("given", "known"),
    [("scheune: ein gebäude für heu", True), ("scheune (ein gebäude für heu; mit toren)", True), ("barn: ein gebäude", True),
     ("Scheune:ein Gebäude für Heu; mit Toren mit To…", True), ("scheune: für heu", False), ("scheune (auto)", False),
     ("haus: ein gebäude für heu", False), ("scheune: ", True), ("jaguar (car)", False)],
)  # fmt: skip
def test_a_tag_with_its_description_is_that_tag(session: psycopg.Connection[Any], given: str, known: bool) -> None:
    """Models copy a tag together with its description from the prompt."""
    edit(session, [DESCRIBED, {"tag": "jaguar", "description": "the animal"}])
    assert match(session, [{given: 0.9}], "only")[0]["tags"] == (["Scheune"] if known else [])
    assert match(session, [{given: 0.9}], "prefer")[0]["tags"] == (["Scheune"] if known else [given])


def test_the_list_for_the_prompt_is_short_and_stays_the_same(session: psycopg.Connection[Any]) -> None:
    edit(session, [{"tag": f"general {i}", "uses": 9} for i in range(300)], None)
    edit(
        session,
        [{"tag": f"Tag {i:03}", "description": "d" * 90 if i == 3 else None, "uses": i % 7} for i in range(400)],
    )
    first = value(session, "autotag.vocabulary_for_prompt(%s)", OWN)
    assert len(first) == 500
    tags = [entry if isinstance(entry, str) else entry[0] for entry in first]
    assert sum(tag.startswith("Tag ") for tag in tags) == 400, "a workspace's own come first"
    assert [entry for entry in first if not isinstance(entry, str)] == [["Tag 003", "d" * 79 + "…"]]
    assert tags == sorted(tags, key=key)
    edit(session, [{"tag": "zebra"}], OTHER)
    edit(session, [{"tag": "Tag 000", "aliases": ["null"]}])
    assert value(session, "autotag.vocabulary_for_prompt(%s)", OWN) == first
    assert value(session, "autotag.vocabulary_for_prompt(%s)", OTHER)[-1] == "zebra"


def test_counts_of_the_library_become_a_vocabulary(session: psycopg.Connection[Any]) -> None:
    edit(session, [{"tag": "Cat", "aliases": ["kitty"]}])
    counts = {
        "kitty": 3,
        "cat": 4,
        "Dog": 2,
        "dog": 5,
        "rare": 1,
        "!": 7,
        "x" * 60: 9,
        "d\u200eog": 0,
        "\x1b": 9,
        "\u0958" * 30: 9,
    }
    assert value(session, "autotag.count_uses(%s, %s, 2)", OWN, json.dumps(counts)) == {
        "tags": 2,
        "added": 1,
        "counted": 1,
        "new": [{"tag": "dog", "uses": 7}],
    }
    listed = {e["tag"]: e["uses"] for e in value(session, "autotag.list_vocabulary(%s)", OWN)}
    assert listed == {"Cat": 7, "dog": 7}


def test_a_tag_in_either_workspace_stays_there(session: psycopg.Connection[Any]) -> None:
    edit(session, [{"tag": "secret project"}], OTHER)
    assert match(session, [{"secret project": 1.0, "secret projects": 1.0}], "only")[0]["tags"] == []
    assert match(session, [{"secret projects": 1.0}], "only", workspace=OTHER)[0]["tags"] == ["secret project"]


def test_general_cycles_end(session: psycopg.Connection[Any]) -> None:
    edit(session, [{"tag": "a"}, {"tag": "b"}], None)
    edit(session, [{"tag": "b", "parent": "a"}], OTHER)
    edit(session, [{"tag": "c", "parent": "a"}], OWN)
    edit(session, [{"tag": "a", "parent": "b"}], None)  # in the other workspace b is above a, and a above b
    assert match(session, [{"c": 1.0}], "only", parents=True)[0]["tags"] == ["c", "a", "b"]
    assert match(session, [{"b": 1.0}], "only", parents=True, workspace=OTHER)[0]["tags"] == ["b", "a"]


def test_only_one_place_writes_tags() -> None:
    """Every answer passes match_results() on its way to the host's rows."""
    calls = {s.key.split("(")[0]: s for s in schema.engine() if "autotag.store_tags(" in s.text}
    assert set(calls) == {"function autotag.write_outcomes", "function autotag.try_write"}  # which takes it back
    assert (
        "autotag.store_tags(array(select i.asset_id from unnest(v_tagged) i), p_workspace_id,\n        autotag.match_results("
        in calls["function autotag.write_outcomes"].text
    )


@pytest.mark.parametrize(("role", "editors", "expected"), [
    ("member", False, "not_an_editor"), ("member", True, None), ("stranger", True, "not_a_member"), ("service", False, None),
])  # fmt: skip
def test_who_may_change_it(session: psycopg.Connection[Any], role: str, editors: bool, expected: str | None) -> None:
    user = "33333333-3333-4333-8333-333333333333"
    session.execute("insert into public.workspaces (id, name) values (%s, 'own') on conflict do nothing", (OWN,))
    if role == "member":
        session.execute("insert into auth.users (id) values (%s) on conflict do nothing", (user,))
        session.execute("insert into public.workspace_members (workspace_id, user_id) values (%s, %s)", (OWN, user))
    if editors:
        session.execute("create or replace function autotag.is_editor(p_workspace_id autotag.workspace_id) returns boolean"
                        " language sql stable security definer as 'select autotag.is_member(p_workspace_id)'")  # fmt: skip
    edit(session, [{"tag": "general"}], None)
    claims = {"role": "service_role"} if role == "service" else {"role": "authenticated", "sub": user}
    session.execute("select set_config('request.jwt.claims', %s, true)", (json.dumps(claims),))
    session.execute(f"set local role {claims['role']}".encode())
    calls: list[tuple[str, tuple[object, ...]]] = [
        ("public.set_tagging_vocabulary(%s, %s)", (OWN, '[{"tag": "a"}]')),
        ("public.edit_tagging_vocabulary(%s, %s, %s)", (OWN, '[{"tag": "b"}]', ["a"])),
    ]
    for call, arguments in calls:
        if expected is None:
            assert value(session, f"to_jsonb({call})", *arguments)["tags"] == 1
        else:
            with pytest.raises(psycopg.Error) as refused, session.transaction():
                value(session, call, *arguments)
            assert json.loads(refused.value.diag.message_detail or "")["code"] == expected
    if expected != "not_a_member":
        told = value(session, "to_jsonb(public.tagging_vocabulary(%s))", OWN)
        assert (told["may_edit"], told["mode"]) == (expected is None, "open")
        own = [("b", False)] if expected is None else []
        assert [(tag["tag"], tag["general"]) for tag in told["tags"]] == [*own, ("general", True)]
