"""Attempts at Realtime: joins, broadcasts over websocket and HTTP, frames of any form."""

from __future__ import annotations

import asyncio
import json
import struct
from typing import Any

from websockets.exceptions import WebSocketException

from attacks.attempt import ANY, Answer, Attempt, Do, http
from attacks.scene import Scene, open_socket

PATIENCE = 5.0  # seconds


def join(token: str, topic: str, *, private: bool, version: str = "2.0.0", then: tuple[Any, ...] = ()) -> Do:
    """Joins a topic, sends frames, and reads until a heartbeat comes back."""

    async def do(scene: Scene) -> Answer:
        sent = f"{topic} {then} {token}"
        try:
            socket = await open_socket(scene.stack, token, version)
        except WebSocketException as error:
            return Answer("403 refused", str(error), sent)
        config = {"private": private, "broadcast": {"ack": True, "self": False}}
        payload = {"config": config, **({"access_token": token} if token else {})}
        frames: list[Any] = [
            ["1", "1", f"realtime:{topic}", "phx_join", payload],
            *then,
            [None, "end", "phoenix", "heartbeat", {}],
        ]
        received, status = "", "none"
        async with asyncio.timeout(PATIENCE):
            for frame in frames:
                if isinstance(frame, list) and version == "1.0.0":
                    frame = dict(zip(("join_ref", "ref", "topic", "event", "payload"), frame, strict=True))
                await socket.send(frame if isinstance(frame, (bytes, str)) else json.dumps(frame))
            while True:
                message = await socket.recv()
                text = message.decode(errors="replace") if isinstance(message, bytes) else message
                received += text
                ref, reply = _read(message)
                if ref == "1" and isinstance(reply, dict) and status == "none":
                    status = "joined" if reply.get("status") == "ok" else "403 refused"
                if ref == "end":
                    break
        await socket.close()
        return Answer(status, received, sent)

    return do


def _read(message: str | bytes) -> tuple[Any, Any]:
    """The reference and the payload of an answer."""
    if isinstance(message, bytes):
        return None, None
    answer = json.loads(message)
    return (answer.get("ref"), answer.get("payload")) if isinstance(answer, dict) else (answer[1], answer[4])


def push(topic: str, event: str, payload: bytes, encoding: int = 1, kind: int = 3) -> bytes:
    """A binary frame of a client, as supabase-js sends broadcasts."""
    parts = [b"1", b"2", f"realtime:{topic}".encode(), event.encode(), b"{}"]
    return struct.pack("BBBBBBB", kind, *(min(len(part), 255) for part in parts), encoding) + b"".join(parts) + payload


def forged(topic: str, event: str = "job-complete", payload: Any = None) -> list[Any]:
    """A client's broadcast."""
    return [
        "1",
        "2",
        f"realtime:{topic}",
        "broadcast",
        {"type": "broadcast", "event": event, "payload": payload or {"job_id": "forged"}},
    ]


def private_topics(scene: Scene, caller: str) -> list[Attempt]:
    """Attempts to join other people's private topics, and to send messages there."""
    token, workspace = scene.token(caller), scene.ids["workspace"]
    victim, found = f"tagging:{workspace}", []
    names = [
        victim, victim.upper(), f"{victim} ", f"{victim}\n", f" {victim}", f"{victim}:x", f"{victim}/", f"tagging:{{{workspace}}}",
        f"tagging:{workspace.replace('-', '')}", f"realtime:{victim}", "tagging:*", "tagging:%", "tagging:", "tagging", "*", "",
        "batch-updates", f"TAGGING:{workspace}", f"tagging:{workspace}' or '1'='1", f"tagging::{workspace}", "phoenix", "x" * 250,
        f"tagging:{workspace}\u200b", "tagging:00000000-0000-0000-0000-000000000000",
    ]  # fmt: skip
    for i, name in enumerate(names):
        for version in ("1.0.0", "2.0.0")[i % 2 :][: 1 if i else 2]:
            found.append(Attempt(f"{caller} joins private {name[:60]!r} by {version}",
                                 join(token, name, private=True, version=version), r"403 refused|none"))  # fmt: skip
        if i > 5:
            continue
        found.append(Attempt(f"{caller} speaks on private {name[:60]!r}",
                             join(token, name, private=True, then=(forged(name), push(name, "job-complete", b'{"job_id": "forged"}'))), r"403 refused|none"))  # fmt: skip
        message = {"topic": name, "event": "job-complete", "payload": {"job_id": "forged"}, "private": True}
        found.append(Attempt(f"{caller} broadcasts over HTTP to private {name[:60]!r}",
                             http(token, "POST", "/realtime/v1/api/broadcast", body={"messages": [message]}), ANY))  # fmt: skip
    for name in (victim, f"realtime:{victim}"):
        # A public topic may have any name; who listens to the private one hears nothing of it.
        found.append(Attempt(f"{caller} speaks on a public namesake {name[:20]}",
                             join(token, name, private=False, then=(forged(name),)), r"joined"))  # fmt: skip
        found.append(Attempt(f"{caller} broadcasts over HTTP to a public namesake {name[:20]}",
                             http(token, "POST", "/realtime/v1/api/broadcast", body={"messages": [{
                                 "topic": name, "event": "job-complete", "payload": {"job_id": "forged"}}]}), ANY))  # fmt: skip
    without_joining: tuple[Any, ...] = (forged(victim), ["1", "3", f"realtime:{victim}", "access_token", {"access_token": token}],
                                        ["1", "4", f"realtime:{victim}", "phx_leave", {}], ["1", "5", f"realtime:{victim}", "presence", {}])  # fmt: skip
    found.append(
        Attempt(
            f"{caller} speaks without having joined",
            join(token, "elsewhere", private=False, then=without_joining),
            "joined",
        )
    )
    for odd in ({"private": "yes"}, {"private": 1}, {"private": [True]}, {"private": {}}, {"private": "false"}):
        found.append(Attempt(f"{caller} joins with an odd config {odd}", join(token, victim, private=False, then=(
            ["1", "7", f"realtime:{victim}", "phx_join", {"config": odd}], forged(victim))), ANY))  # fmt: skip
    return found
