"""Any text from outside is shown as text on the operator's terminal, and as a cell in a spreadsheet."""

from __future__ import annotations

import io
import json
import logging
import re
import unicodedata
from datetime import date
from decimal import Decimal
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text
from typer.testing import CliRunner

from autotag.cli import app as cli
from autotag.cli import compare, doctor, usage, watch
from autotag.cli.console import cell, fail, say, say_json, tame_libraries
from autotag.cli.screen import render
from autotag.doctor.findings import Finding
from autotag.operate.follow import read_payload
from autotag.texts import one_line, printable, spreadsheet_cell

HOSTILE = {
    "colour": "\x1b[31mred\x1b[0m", "clear the screen": "\x1b[2J\x1b[H", "title": "\x1b]0;owned\x07",
    "link": "\x1b]8;;https://evil.example\x1b\\click\x1b]8;;\x1b\\", "clipboard": "\x1b]52;c;cm0gLXJm\x07",
    "line": "a\nautotag: all is well", "return": "bad\rgood", "both": "bad\r\ngood", "nul": "a\0b", "C1": "\x9b31mred",
    "C1 OSC": "\x9d0;owned\x9c", "next line": "a\x85b", "line separator": "a\u2028b", "override": "a\u202ebmit",
    "isolate": "a\u2066b\u2069", "mark": "a\u200fb", "backspaces": "bad\x08\x08\x08good", "delete": "a\x7fb",
    "tags": "a\U000e0041b", "surrogate": "a\ud800b", "zero width": "a\u200bb", "markup": "[red]x[/red][/]",
    "markup link": "[link=https://evil.example]here[/link]", "broken markup": "[/nothing]", "backslash": "x\\",
    "backslash markup": "\\[red]x", "emoji code": ":bomb:", "megabyte": "\x1b[31m" * 200_000, "blanks": "a" + " " * 500,
}  # fmt: skip
every_hostile_text = pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)


def is_harmless(shown: str) -> bool:
    """Whether a text has no control character but the newline, and none that is invisible or changes the direction."""
    return all(c == "\n" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in shown)


def printed(renderable: Any, width: int = 250) -> str:
    """The output on a terminal without colours."""
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=True, no_color=True, color_system=None).print(renderable)
    return out.getvalue()


@every_hostile_text
def test_a_text_becomes_one_harmless_line(text: str) -> None:
    shown = printable(text, 100)
    assert is_harmless(shown)
    assert "\n" not in shown
    assert len(shown) <= 100
    assert printable(shown, 100) == shown, "it is shown the same however often it passes"


@given(st.text(alphabet=st.characters(), max_size=50))
def test_any_text_does(text: str) -> None:
    assert is_harmless(printable(text))
    assert "\n" not in printable(text) + one_line(text)
    assert is_harmless(one_line(text))


def test_plain_words_stay_as_they_are() -> None:
    for text in ("A red bus, 3 × 4.", "naïve façade", "日本語", "می\u200cخواهم", "👩\u200d👧", "[bold] is markup"):
        assert printable(text) == text
    assert printable("\x1b[31m") == "\\x1b[31m"
    assert printable("a\u202eb\U000e0041") == "a\\u202eb\\U000e0041"
    assert printable(" a \n\t b ") == "a b"
    assert printable("x" * 11, 10) == "x" * 9 + "…"


@every_hostile_text
def test_markup_is_text_to_rich(text: str) -> None:
    assert printed(cell(text, length=100)).replace("\n", "") == printable(text, 100)
    assert isinstance(cell(text), Text)


def status_of(text: str) -> dict[str, Any]:
    """A result of ``autotag.status`` with this text in every place for texts from outside."""
    now = "2026-11-28T12:00:00+00:00"
    return {
        "at": now, "queue": {"live": 1, "queued": 2, "workspaces": 1, "delayed": 0},
        "today": {"images": 1, "requests": 1, "input_tokens": 1, "output_tokens": 1, "cost": 0.1,
                  "unpriced_requests": 2, "unpriced_models": [text]},
        "limits": {"account_error": text, "account_error_from": text, "blocked_until": None, "requests_per_minute": 10,
                   "requests_left": 1, "tokens_per_minute": 10, "tokens_left": 1, "queued_batch_tokens": 10,
                   "queued_batch_tokens_used": 1, "requests_per_day": None, "requests_left_today": None},
        "model": {"name": text, "reasoning_effort": text, "service_tier": text, "prompt_tokens": 1, "output_tokens": 1,
                  "reserved": 1, "cap": 1, "cost_per_1000": None, "priced": False, "proven": True,
                  "shutdown": {"level": text, "message": text},
                  "provider": {"batches": None, "rate_headers": None, "keep_files": 1}},
        "workers": [{"worker": text, "host": text, "version": text, "held": 1, "listening": True, "alive": False,
                     "started_at": now, "last_heartbeat_at": now}],
        "jobs": [{"job_id": text, "workspace_id": text, "strategy": text, "fallback": True, "image_count": 1,
                  "failed": 1, "progress": 1, "created_at": now, "eta": None, "eta_p90": None}],
        "batches": [{"batch": text, "openai_batch_id": text, "state": text, "openai_status": text, "images": 1,
                     "done": 1, "submitted_at": None, "created_at": now, "eta": None, "eta_p90": None, "error": text}],
        "waiting": [{"kind": text, "workspace_id": text, "id": text, "images": 1, "reason": text, "until": None}],
        "errors": [{"images": 1, "code": text, "message": text, "last_at": now}],
    }  # fmt: skip


@every_hostile_text
def test_status(text: str) -> None:
    shown = printed(render(status_of(text)))
    assert is_harmless(shown)
    assert shown.count("\nautotag: all is well") == 0
    assert len(shown) < 60_000


def test_status_says_what_waits_and_why_but_not_for_the_next_minute() -> None:
    status = status_of("w")
    status["waiting"] = [
        {"kind": kind, "workspace_id": "w" * 36, "id": of, "images": 1200, "reason": reason, "until": until}
        for kind, of, reason, until in (
            ("batch", "b" * 36, "The hour is used up.", "2026-11-28T12:42:00+00:00"),
            ("workspace", None, "The minute is used up.", "2026-11-28T12:00:30+00:00"),
            ("workspace", None, "It never fits.", None),
            ("outcomes", None, "The rows are held.", "2026-11-28T12:00:05+00:00"),
        )
    ]
    lines = [re.split(r" {2,}", line.strip()) for line in printed(render(status)).splitlines()]
    assert ["a batch", "wwwwwwww", "bbbbbbbb", "1,200", "42 min", "The hour is used up."] in lines
    assert ["single calls", "wwwwwwww", "1,200", "ever", "It never fits."] in lines
    assert ["tags to store", "wwwwwwww", "1,200", "5 s", "The rows are held."] in lines
    assert not any("The minute is used up." in line for line in lines)


@every_hostile_text
def test_doctor(text: str) -> None:
    assert is_harmless(printed(doctor.table_of([Finding(text, "error", text, text), Finding("api", "ok", text)])))


def figures_of(text: str) -> dict[str, Any]:
    return {
        "model": text, "reasoning_effort": text, "current_model": text, "current_reasoning_effort": text,
        "current_cost_per_1000": None, "current_answers": 0, "cost_per_1000": None, "sample": 1, "failed": 1,
        "cut_off": 0, "seconds": {"p50": None, "p95": None}, "agreement": {"jaccard": None, "kept": None},
        "failures": [{"code": text, "message": text, "images": 1}], "shutdown_date": text,
        "added": [{"tag": text, "images": 2}], "missing": [{"tag": text, "images": 1}, {"tag": "plain", "images": 1}],
    }  # fmt: skip


@every_hostile_text
def test_compare(text: str) -> None:
    assert is_harmless(printed(compare.render(figures_of(text))))


def usage_of(text: str, cost: Decimal | None = Decimal("0.5")) -> dict[str, Any]:
    return {
        "user_id": text, "day": date(2026, 11, 28), "model": text, "service_tier": text, "images": -3, "requests": 1,
        "input_tokens": 1, "cached_tokens": 1, "cache_write_tokens": 1, "output_tokens": 1, "reasoning_tokens": 1,
        "cost": cost,
    }  # fmt: skip


@every_hostile_text
@pytest.mark.parametrize("form", ["--csv", "--json", None])
def test_usage(text: str, form: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "run_as_operator", lambda _: [usage_of(text), usage_of(text, None)])
    done = CliRunner().invoke(cli.app, ["usage", "--workspace", "w", *([form] if form else [])])
    assert done.exit_code == 0, done.exception
    assert is_harmless(done.output.replace("\r\n", "\n"))


@every_hostile_text
def test_watch_shows_what_anybody_broadcasts(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    payload = {text: text, "nested": {"deep": [text]}, **{f"{text[:100]}{i}": i for i in range(100)}}
    say(f"12:00:00  batch-updates  {watch.describe_payload(payload)}")
    say_json({"payload": payload})
    shown = capsys.readouterr().out
    assert is_harmless(shown)
    assert shown.count("\n") == 2, "one line a message"
    line, as_json = shown.splitlines()
    assert len(line) < 20_000
    assert json.loads(as_json)["payload"]["nested"] == {"deep": [text]}, "JSON is what was sent"


@pytest.mark.parametrize("payload", [None, 3, "text", ["a"], [["a", 1]], {"a": 1}])
def test_a_broadcast_of_any_form_is_read(payload: object) -> None:
    expected = payload if isinstance(payload, dict) else {"payload": payload}
    assert read_payload({"event": "batch-complete", "payload": payload}) == expected
    assert read_payload({}) == {"payload": None}


@every_hostile_text
def test_errors_and_the_lines_of_libraries(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(fail(text), typer.Exit)
    tame_libraries()
    assert logging.lastResort
    shown = logging.lastResort.format(logging.LogRecord("realtime", logging.ERROR, "", 1, f"odd {text}", (), None))
    assert is_harmless(capsys.readouterr().err.replace("\x1b[31m", "", 1).replace("\x1b[0m", "", 1) + shown)
    assert "\n" not in shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("=1+1", "'=1+1"), ("+1", "'+1"), ("-1", "'-1"), ("@SUM(A1)", "'@SUM(A1)"), ("\t=1", "'=1"), ("\r=1", "'=1"),
        ("\tx", "'x"), ("\rx", "'x"), (" =1", "'=1"), ("＝1", "'＝1"), ("=cmd|' /C calc'!A0", "'=cmd|' /C calc'!A0"),
        ("gpt-6-luna", "gpt-6-luna"), ("", ""), ("a=b", "a=b"),
    ],
)  # fmt: skip
def test_a_spreadsheet_takes_no_text_for_a_formula(text: str, shown: str) -> None:
    assert spreadsheet_cell(text) == shown
    row = usage.csv_row(usage_of(text))
    assert (row["model"], row["user_id"], row["service_tier"]) == (shown, shown, shown)
    assert (row["images"], row["cost"], str(row["day"])) == (-3, "0.5", "2026-11-28"), "numbers stay numbers"
