"""Exact sliding windows, compared with a brute-force oracle: random traces, and concurrent callers with connections of
their own."""

from __future__ import annotations

import json
import os
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import psycopg
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lab.postgres import LocalPostgres
from lab.stack import Stack
from support import Library

EXAMPLES = int(os.environ.get("AUTOTAG_EXAMPLES", "2000"))
WINDOW = 60_000_000  # microseconds
WORKSPACE = "00000000-0000-4000-8000-000000000001"

#: Plays a trace in one round trip: a moment, and what is done then; what came back of each.
PLAY = """
create function pg_temp.play(p_trace jsonb) returns jsonb language plpgsql as $$
declare
  v_step jsonb;
  v_out jsonb := '[]';
  v_got record;
begin
  delete from public.workspace_rate_limits;
  insert into public.workspace_rate_limits (workspace_id, request_type, max_requests, max_units)
  values (%(ws)s, 'realtime', (p_trace -> 0 ->> 'requests')::integer, (p_trace -> 0 ->> 'units')::integer);
  for v_step in select * from jsonb_array_elements(p_trace) loop
    perform set_config('autotag.now',
      (timestamptz '2030-01-01' + ((v_step ->> 'at')::bigint || ' microseconds')::interval)::text, true);
    if v_step ? 'limit' then
      update public.workspace_rate_limits set max_requests = (v_step ->> 'requests')::integer,
        max_units = (v_step ->> 'units')::integer;
    elsif v_step ? 'correct' then
      perform autotag.correct_window(%(ws)s, 'realtime', timestamptz '2030-01-01'
        + ((v_step ->> 'correct')::bigint || ' microseconds')::interval, 0, (v_step ->> 'delta')::integer);
    else
      select * into v_got from autotag.admit(%(ws)s, 'realtime', (v_step ->> 'wanted')::integer,
        (v_step ->> 'each')::integer, (v_step ->> 'partial')::boolean, (v_step ->> 'take')::boolean);
      v_out := v_out || jsonb_build_object('admitted', v_got.admitted, 'at',
        (extract(epoch from v_got.at - timestamptz '2030-01-01') * 1000000)::bigint, 'retry_at',
        (extract(epoch from v_got.retry_at - timestamptz '2030-01-01') * 1000000)::bigint);
    end if;
  end loop;
  return v_out;
end $$
"""


@dataclass
class Oracle:
    """The definition of a window, implemented in the simplest way: a list of admissions that every question counts."""

    requests: int
    units: int
    log: list[list[int]] = field(default_factory=list)  # [moment, requests, units]

    def used(self, at: int) -> tuple[int, int]:
        inside = [entry for entry in self.log if at - WINDOW < entry[0] <= at]
        return sum(e[1] for e in inside), sum(e[2] for e in inside)

    def fits(self, at: int, wanted: int, each: int) -> bool:
        requests, units = self.used(at)
        return requests + wanted <= self.requests and units + wanted * each <= self.units

    def admit(self, at: int, wanted: int, each: int, *, partial: bool, take: bool) -> tuple[int, int | None]:
        """The number of admitted images and, if that is not all, the first moment at which the next one fits (None:
        never)."""
        options = range(wanted, -1, -1) if partial else (wanted, 0)
        admitted = next(n for n in options if n == 0 or self.fits(at, n, each))
        kept = [list(entry) for entry in self.log]
        if admitted:
            self.log.append([at, admitted, admitted * each])
        retry = None
        if admitted < wanted:
            least = 1 if partial else wanted
            if least <= self.requests and least * each <= self.units:
                moments = sorted({at, *(entry[0] + WINDOW for entry in self.log)})
                retry = next(m for m in moments if m >= at and self.fits(m, least, each))
        if not take:
            self.log = kept
        return admitted, retry


moments = st.integers(0, 70_000_000)
admissions = st.fixed_dictionaries({
    "wanted": st.integers(1, 12), "each": st.sampled_from([0, 1, 3, 10, 50]), "partial": st.booleans(),
    "take": st.sampled_from([True, True, True, False]),
})  # fmt: skip
corrections = st.fixed_dictionaries({"which": st.integers(0, 20), "delta": st.integers(-60, 120)})
limits = st.fixed_dictionaries({"limit": st.just(True), "requests": st.integers(1, 20), "units": st.integers(1, 200)})
gaps = st.sampled_from([0, 1, 999, 1000, 10_000_000, 20_000_000, 29_999_999, 30_000_000, 60_000_000, 61_000_000])
traces = st.lists(
    st.tuples(gaps | moments, st.one_of(admissions, admissions, admissions, corrections, limits)),
    min_size=3,
    max_size=25,
)


@pytest.fixture(scope="module")
def connection(postgres: LocalPostgres) -> Iterator[psycopg.Connection[Any]]:
    """One connection in a transaction that never commits, with a clock that the test sets."""
    with psycopg.connect(postgres.url()) as one:
        one.execute("update autotag.settings set test_clock = true")
        one.execute(PLAY % {"ws": f"'{WORKSPACE}'"})
        yield one
        one.rollback()


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
          phases=(Phase.explicit, Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck))  # fmt: skip
@given(first=limits, steps=traces)
def test_never_over_never_refused_when_it_fits_and_retry_after_to_the_microsecond(
    connection: psycopg.Connection[Any], first: dict[str, Any], steps: list[tuple[int, dict[str, Any]]]
) -> None:
    oracle = Oracle(first["requests"], first["units"])
    trace, expected, at = [{"at": 0, **first}], [], 0
    for gap, step in steps:
        at += gap
        if "limit" in step:
            oracle.requests, oracle.units = step["requests"], step["units"]
            trace.append({"at": at, **step})
        elif "which" in step:
            live = [e for e in oracle.log if e[0] > at - WINDOW]
            if not live:
                continue
            moment = live[step["which"] % len(live)][0]
            same = [e for e in oracle.log if e[0] == moment]
            total = sum(e[2] for e in same)
            delta = max(step["delta"], -total)
            same[0][2] += delta
            trace.append({"at": at, "correct": moment, "delta": delta})
        else:
            trace.append({"at": at, **step})
            expected.append(
                (*oracle.admit(at, step["wanted"], step["each"], partial=step["partial"], take=step["take"]), at)
            )
    row = connection.execute("select pg_temp.play(%s)", (json.dumps(trace),)).fetchone()
    assert row is not None
    got = [(step["admitted"], step["retry_at"], step["at"]) for step in row[0]]
    assert got == expected


def test_the_oracle_itself_knows_the_edges() -> None:
    oracle = Oracle(2, 100)
    assert oracle.admit(0, 2, 10, partial=False, take=True) == (2, None)
    assert oracle.admit(1, 1, 10, partial=False, take=True) == (0, WINDOW)
    assert oracle.admit(WINDOW - 1, 1, 10, partial=True, take=True) == (0, WINDOW)
    assert oracle.admit(WINDOW, 3, 10, partial=True, take=True) == (2, 2 * WINDOW)
    assert oracle.admit(WINDOW, 3, 10, partial=False, take=True) == (0, None)


def test_many_callers_at_once_never_exceed_any_window(stack: Stack) -> None:
    """Eight connections ask as fast as they can, on the real clock. Afterwards every window is counted."""
    speed, seconds = 60.0, 4.0  # a window takes a second
    workspace = str(uuid.uuid4())
    with psycopg.connect(stack.database_url(), autocommit=True) as owner:
        owner.execute("update autotag.settings set test_clock = true")
        owner.execute("insert into public.workspace_rate_limits values (%s, 'realtime', 30, 1000)", (workspace,))
    book: list[tuple[Any, int, int]] = []
    refused = [0]
    done = threading.Event()

    def ask(number: int) -> None:
        with psycopg.connect(stack.database_url(), autocommit=True) as one:
            one.execute(f"set autotag.speed = {speed}")
            while not done.is_set():
                wanted, each = 1 + number % 3, 20 + number
                row = one.execute(
                    "select admitted, at from autotag.admit(%s, 'realtime', %s, %s, %s)",
                    (workspace, wanted, each, number % 2 == 0),
                ).fetchone()
                assert row is not None
                if row[0]:
                    book.append((row[1], row[0], row[0] * each))
                else:
                    refused[0] += 1

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    done.wait(seconds)
    done.set()
    for thread in threads:
        thread.join()
    book.sort(key=lambda entry: entry[0])
    assert refused[0] > 0
    assert len(book) > 2 * 10, "several windows' worth"
    for i, (start, _, _) in enumerate(book):
        inside = [entry for entry in book[i:] if (entry[0] - start).total_seconds() < 60]
        assert sum(entry[1] for entry in inside) <= 30
        assert sum(entry[2] for entry in inside) <= 1000


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("realtime", 0), "no_images"), (("realtime", -1), "no_images"), (("realtime", None), "no_images"),
        (("realtime", 2**31 - 1), "too_many_images"), ((None, 1), "unknown_request_type"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("function", ["check_rate_limit", "peek_rate_limit"])
def test_nonsense_is_a_clear_error_and_counts_nothing(
    library: Library, function: str, arguments: tuple[Any, ...], code: str
) -> None:
    with pytest.raises(psycopg.Error) as caught:
        library.rpc(f"public.{function}", library.member.workspace, *arguments)
    assert json.loads(caught.value.diag.message_detail or "{}")["code"] == code
    assert caught.value.diag.message_hint
    for word in ("hourly", ""):
        with pytest.raises(psycopg.errors.InvalidTextRepresentation, match="tagging_request_type"):
            library.rpc(f"public.{function}", library.member.workspace, word, 1)
    assert library.sql("select * from public.workspace_rate_limits") == []


async def test_absurd_sizes_and_other_tenants_count_nothing(library: Library, stack: Stack) -> None:
    headers = {"apikey": stack.anon_key, "authorization": f"Bearer {library.member.token}"}
    body = {"workspace_id": library.member.workspace, "request_type": "realtime", "image_count": 2**31}
    async with httpx.AsyncClient(base_url=stack.supabase_url, headers=headers) as client:
        answer = await client.post("/rest/v1/rpc/check_rate_limit", json=body)
    assert (answer.status_code, answer.json()["code"]) == (400, "22003")
    assert "out of range" in answer.json()["message"]
    stranger = stack.add_member("stranger")
    for function in ("check_rate_limit", "peek_rate_limit"):
        with pytest.raises(psycopg.Error) as caught:
            library.rpc(f"public.{function}", stranger.workspace, "realtime", 1)
        assert caught.value.diag.sqlstate == "PT403"
    assert library.sql("select * from public.workspace_rate_limits") == []


def test_a_look_takes_nothing(library: Library) -> None:
    for _ in range(40):
        told = library.rpc("public.peek_rate_limit", library.member.workspace, "realtime", 30)
        assert told["allowed"] is True
    assert library.sql("select * from public.workspace_rate_limits") == []
