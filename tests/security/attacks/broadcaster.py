"""Attempts of a person with the publishable key, who may broadcast anything on the public topic."""

from __future__ import annotations

import json
from typing import Any

from attacks.attempt import ANY, Attempt, http
from attacks.scene import Scene
from attacks.topics import forged, join, private_topics, push

TOPIC, EVENTS = "batch-updates", ("batch-complete", "job-progress", "job-complete")
TEXTS = {
    "colour": "\x1b[31mred\x1b[0m", "clear": "\x1b[2J\x1b[H", "title": "\x1b]0;owned\x07", "clipboard": "\x1b]52;c;cm0gLXJm\x07",
    "line": "a\nautotag: all is well", "return": "bad\rgood", "nul": "a\0b", "C1": "\x9b31mred", "override": "a\u202ebmit",
    "surrogate": "a\ud800b", "zero width": "a\u200bb", "markup": "[red]x[/red][/]", "link": "[link=https://evil.example]x[/link]",
    "megabyte": "\x1b[31m" * 100_000, "html": "<img src=x onerror=alert(1)>", "formula": "=cmd|' /C calc'!A0", "tags": "a\U000e0041b",
    "separator": "a\u2028b", "backspaces": "bad\x08\x08good", "proto": "__proto__",
}  # fmt: skip
PAYLOADS: list[Any] = [
    None, 7, -1e308, "text", [], {}, True, [["a", 1]], [{"batch_id": 1}], {"batch_id": None}, {"batch_id": {"a": 1}}, {"": ""},
    {"id": "x", "meta": {"id": 1}}, {"payload": {"payload": {}}}, {str(i): i for i in range(2000)}, [[]] * 2000, {"batch_id": "x" * 500_000},
    {"type": "broadcast", "event": "system", "status": "error"}, {"constructor": {"prototype": {}}}, {"then": "x"},
]  # fmt: skip


# Long: a table of what a broadcaster may try.
def attempts(scene: Scene) -> list[Attempt]:
    found = []

    def add(
        name: str, expect: str, *frames: Any, version: str = "2.0.0", topic: str = TOPIC, private: bool = False
    ) -> None:
        found.append(
            Attempt(f"broadcaster {name}", join("", topic, private=private, then=frames, version=version), expect)
        )

    for i, (name, text) in enumerate(TEXTS.items()):
        add(
            f"says {name}",
            "joined",
            forged(TOPIC, EVENTS[i % 3], {text[:200]: text, "nested": [text], "batch_id": text}),
            version=("2.0.0", "1.0.0")[i % 2],
        )
        data = json.dumps({"batch_id": text}).encode()
        add(f"says {name} in a binary frame", "joined", push(TOPIC, EVENTS[i % 3], data))
    for i, payload in enumerate(PAYLOADS):
        add(f"sends the payload {i}", "joined", forged(TOPIC, EVENTS[i % 3], payload))
        message = {
            "topic": TOPIC,
            "event": EVENTS[i % 3],
            "payload": payload if isinstance(payload, dict) else {"payload": payload},
        }
        found.append(Attempt(f"broadcaster sends the payload {i} over HTTP",
                             http("", "POST", "/realtime/v1/api/broadcast", body={"messages": [message]}), ANY))  # fmt: skip
    for event in (
        "",
        "x" * 250,
        "phx_close",
        "phx_error",
        "phx_reply",
        "system",
        "*",
        "presence_state",
        "postgres_changes",
        "\x1b[2J",
        "constructor",
    ):
        add(f"sends the event {event[:20]!r}", "joined", forged(TOPIC, event))
        add(
            f"sends a frame of the kind {event[:20]!r}",
            "joined",
            ["1", "2", f"realtime:{TOPIC}", event, {"status": "error"}],
        )
    for i, frame in enumerate((
        "", "x", "null", "[]", "{}", "[1,2,3,4,5]", '[null,null,"t","e",{}', "[" * 3000, json.dumps([1, 2, 3, 4, 5, 6]), b"", b"\x03", b"\xff" * 300,
        b"\x03\xff\xff\xff\xff\xff\x01", push(TOPIC, "batch-complete", b"{"), push(TOPIC, "batch-complete", b"{}", encoding=9),
        push(TOPIC, "batch-complete", b"{}", kind=4), push(TOPIC, "batch-complete", b"\xff\xfe"), '["1","2","realtime:batch-updates","phx_join",7]',
    )):  # fmt: skip
        add(f"sends the frame {i}", "joined", frame)
    add(
        "sends a thousand at once",
        "joined",
        *[forged(TOPIC, "batch-complete", {"batch_id": f"forged-{i}"}) for i in range(1000)],
    )
    for body in ({}, {"messages": None}, {"messages": "x"}, {"messages": [None]}, {"messages": [{}]}, {"messages": [{"topic": 7, "event": 7, "payload": 7}]},
                 {"messages": [{"topic": TOPIC, "event": "x", "payload": {}}] * 101}, [], 7):  # fmt: skip
        found.append(
            Attempt(
                f"broadcaster posts {json.dumps(body)[:60]}",
                http("", "POST", "/realtime/v1/api/broadcast", body=body),
                r"4\d\d .*|202 .*",
            )
        )
    return [*found, *private_topics(scene, "anon")]
