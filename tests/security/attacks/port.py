"""Attempts of a client of a worker's ports, without the webhook's secret and with the stolen secret."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import time
from dataclasses import dataclass

from attacks.attempt import Answer, Attempt
from attacks.scene import Scene

HOST = "127.0.0.1"
PATIENCE = 3.0  # seconds; what no answer comes to is over by then
METHODS = (
    b"GET",
    b"HEAD",
    b"POST",
    b"PUT",
    b"PATCH",
    b"DELETE",
    b"OPTIONS",
    b"TRACE",
    b"CONNECT",
    b"PROPFIND",
    b"get",
    b"X" * 50,
)
PATHS = (
    b"/", b"/healthz", b"/readyz", b"/metrics", b"/webhooks/openai", b"//healthz", b"/healthz/", b"/healthz/../metrics",
    b"/%2e%2e/etc/passwd", b"/healthz?a=%00", b"http://evil.example/healthz", b"*", b"/openapi.json", b"/webhooks/openai/",
    b"/webhooks/openai/..%2f..%2fmetrics", b"/HEALTHZ", b"/metrics%0d%0aSet-Cookie:x", b"/\xff\xfe", b"/" + b"a" * 9000,
)  # fmt: skip
OPEN = {b"/healthz", b"/readyz", b"/metrics", b"/healthz?a=%00"}
DELIVERY = "/webhooks/openai"


@dataclass(frozen=True)
class Ports:
    http: int
    webhook: int


async def exchange(port: int, *parts: bytes) -> bytes:
    """Sends these bytes, and returns everything that comes back until the connection ends."""
    reader, writer = await asyncio.open_connection(HOST, port)
    answer = b""
    with contextlib.suppress(ConnectionError, TimeoutError):
        async with asyncio.timeout(PATIENCE):
            for part in parts:
                writer.write(part)
                await writer.drain()
            while more := await reader.read(65536):
                answer += more
    writer.transport.abort()
    return answer


def raw(name: str, port: int, expect: str, *parts: bytes) -> Attempt:
    async def do(scene: Scene) -> Answer:
        answer = await exchange(port, *parts)
        status = answer.split(b" ", 2)[1].decode() + " answer" if answer.startswith(b"HTTP/1.1 ") else "closed"
        return Answer(status, answer.decode(errors="replace"), repr(parts))

    return Attempt(f"somebody {name}"[:150], do, expect)


def _request(method: bytes, path: bytes, *headers: bytes, body: bytes = b"") -> bytes:
    lines = [method + b" " + path + b" HTTP/1.1", b"Host: x", b"Connection: close", *headers]
    return b"\r\n".join([*lines, b"", b""]) + body


REFUSED, TAKEN = r"4\d\d answer", r"200 answer"


def requests(ports: Ports) -> list[Attempt]:
    """Every method × every path at both ports, and bytes that are not a request."""
    found = []
    for name, port in (("health", ports.http), ("the webhook", ports.webhook)):
        for path in PATHS:
            # Every method at a few paths; at the others the two that matter most.
            for method in (
                METHODS if path in (b"/healthz", b"/metrics", b"/webhooks/openai", b"/") else (b"GET", b"POST")
            ):
                taken = port == ports.http and path in OPEN and method in (b"GET", b"HEAD")
                found.append(
                    raw(
                        f"asks {name} {method[:9]!r} {path[:40]!r}",
                        port,
                        TAKEN if taken else REFUSED,
                        _request(method, path),
                    )
                )
    get, post = b"GET /healthz", b"POST /webhooks/openai"
    for what, expect, parts in (
        ("TLS", REFUSED, [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) * 2 + b"\r\n\r\n"]),
        ("HTTP/2", REFUSED, [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]), ("HTTP/0.9", REFUSED, [b"GET /healthz\r\n\r\n"]),
        ("a proxy's line", REFUSED, [b"PROXY TCP4 1.1.1.1 2.2.2.2 1 2\r\n" + get + b" HTTP/1.1\r\nHost: x\r\n\r\n"]),
        ("SSH", REFUSED, [b"SSH-2.0-x\r\n\r\n"]), ("Postgres", REFUSED, [b"\x00\x00\x00\x08\x04\xd2\x16\x2f\r\n\r\n"]),
        ("two lengths", REFUSED, [_request(b"POST", b"/webhooks/openai", b"Content-Length: 2", b"Content-Length: 5", body=b"{}abc")]),
        ("a length and chunks", REFUSED, [_request(b"POST", b"/webhooks/openai", b"Content-Length: 3", b"Transfer-Encoding: chunked", body=b"0\r\n\r\nGET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")]),
        ("a negative length", REFUSED, [_request(b"POST", b"/webhooks/openai", b"Content-Length: -1")]),
        ("a length that is none", REFUSED, [_request(b"POST", b"/webhooks/openai", b"Content-Length: 1_0")]),
        ("odd encodings", r"(4\d\d|501) answer", [_request(b"POST", b"/webhooks/openai", b"Transfer-Encoding: xchunked", body=b"0\r\n\r\n")]),
        ("folded headers", r"[24]\d\d answer", [_request(b"GET", b"/healthz", b"X: a\r\n b")]),
        ("a header without a colon", REFUSED, [_request(b"GET", b"/healthz", b"nonsense")]),
        ("a NUL in a header", REFUSED, [_request(b"GET", b"/healthz", b"X: a\0b")]),
        ("a blank before the colon", REFUSED, [_request(b"GET", b"/healthz", b"X : a")]),
        ("bare line feeds", r"[24]\d\d answer|closed", [b"GET /healthz HTTP/1.1\nHost: x\nConnection: close\n\n"]),
        ("two hosts", REFUSED, [get + b" HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"]), ("no host", REFUSED, [get + b" HTTP/1.1\r\n\r\n"]),
        ("another version", TAKEN, [get + b" HTTP/9.9\r\nConnection: close\r\n\r\n"]), ("a host that is none", TAKEN, [get + b" HTTP/1.1\r\nHost: [\r\nConnection: close\r\n\r\n"]),
        ("a websocket", r"[24]\d\d answer", [_request(b"GET", b"/healthz", b"Upgrade: websocket", b"Connection: upgrade", b"Sec-WebSocket-Key: x", b"Sec-WebSocket-Version: 13")]),
        ("h2c", r"[24]\d\d answer", [_request(b"GET", b"/healthz", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABk")]),
        ("17 KB of headers", r"431 answer", [_request(b"GET", b"/healthz", b"X: " + b"x" * 17_000)]),
        ("2,000 headers", r"4\d\d answer|closed", [_request(b"GET", b"/healthz", *[b"X: y"] * 2000)]),
        ("a body of 100 KB", r"413 answer", [_request(b"POST", b"/webhooks/openai", b"Content-Length: 100000", body=b"x" * 100_000)]),
        ("a body that is said to be huge", r"413 answer", [_request(b"POST", b"/webhooks/openai", b"Content-Length: 99999999999999999999")]),
        ("100-continue", r"(100|4\d\d) answer", [_request(b"POST", b"/webhooks/openai", b"Content-Length: 2", b"Expect: 100-continue"), b"{}"]),
        ("two requests at once", r"200 answer", [get + b" HTTP/1.1\r\nHost: x\r\n\r\n" + _request(b"GET", b"/healthz")]),
        ("a smuggled one", r"4\d\d answer", [_request(b"POST", b"/webhooks/openai", b"Content-Length: 0") + _request(b"GET", b"/metrics")]),
        ("gzip", REFUSED, [_request(b"POST", b"/webhooks/openai", b"Content-Encoding: gzip", b"Content-Length: 4", body=b"\x1f\x8b\x08\x00")]),
        ("escape codes in its agent", TAKEN, [_request(b"GET", b"/healthz", b"User-Agent: \x9b2J")]),
        ("forged proxies", TAKEN, [_request(b"GET", b"/healthz", b"X-Forwarded-For: 127.0.0.1", b"X-Forwarded-Host: evil.example", b"X-Original-URL: /admin")]),
    ):  # fmt: skip
        port = ports.webhook if any(part.startswith(post) for part in parts) else ports.http
        found.append(raw(f"sends {what}", port, expect, *parts))
    return found


def _sign(secret: str, body: bytes, webhook_id: str, moment: str) -> str:
    try:
        key = base64.b64decode(secret.removeprefix("whsec_"))
    except ValueError:
        key = secret.encode()
    signed = f"{webhook_id}.{moment}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()


def _delivery(port: int, name: str, expect: str, headers: dict[str, str], body: bytes) -> Attempt:
    lines = [f"{key}: {value}".encode("latin-1", "replace") for key, value in headers.items()]
    return raw(
        f"delivers {name}",
        port,
        expect,
        _request(b"POST", DELIVERY.encode(), *lines, f"Content-Length: {len(body)}".encode(), body=body),
    )


# Long: a table of deliveries.
def deliveries(ports: Ports, secret: str) -> list[Attempt]:
    """Deliveries that OpenAI has not signed; all of them are refused."""
    port, now = ports.webhook, str(int(time.time()))
    body = json.dumps(
        {"id": "evt", "type": "batch.completed", "data": {"id": "batch_forged"}, "object": "event", "created_at": 1}
    ).encode()
    good = {
        "webhook-id": "wh_forged",
        "webhook-timestamp": now,
        "webhook-signature": _sign(secret, body, "wh_forged", now),
    }
    found = []

    def add(name: str, body: bytes = body, **changes: str | None) -> None:
        headers = {
            key: value
            for key, value in (good | {k.replace("_", "-"): v for k, v in changes.items()}).items()
            if value is not None
        }
        found.append(_delivery(port, name, r"400 answer", headers, body))

    for header in good:
        add(f"without {header}", **{header.replace("-", "_"): None})
        add(f"an empty {header}", **{header.replace("-", "_"): ""})
    for guess in (
        "whsec_",
        "",
        "whsec_" + base64.b64encode(b"x" * 32).decode(),
        "secret",
        "whsec_AAAA",
        secret.upper(),
        secret[:-4],
    ):
        add(f"signed with {guess[:12]!r}", webhook_signature=_sign(guess, body, "wh_forged", now))
    signature = good["webhook-signature"]
    for odd in (signature.replace("v1,", "v1a,"), signature.replace("v1,", "v2,"), signature[:-4], signature.upper(), "v1,", "v1",
                " ".join(["v1,AAAA"] * 1000), "v1," + "A" * 8000, "v1,\xff", "v1,é", ",", signature.replace("v1,", "v1,,"), "v1," + "=" * 44):  # fmt: skip
        add(f"signed {odd[:14]!r}", webhook_signature=odd)
    for moment in (
        "0",
        "-1",
        "NaN",
        "Infinity",
        "1e9",
        "",
        " ",
        "9" * 400,
        str(int(now) - 400),
        str(int(now) + 400),
        f"{now}.5x",
        "٣",
        "0x10",
        "None",
    ):
        forged = _sign(
            secret if moment in (str(int(now) - 400), str(int(now) + 400)) else "whsec_AAAA", body, "wh_forged", moment
        )
        add(f"of the moment {moment[:14]!r}", webhook_timestamp=moment, webhook_signature=forged)
    for other in (
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff\xfe",
        body + b" ",
        body.replace(b"forged", b"others"),
        b"{" * 5000,
        b"\0" * 100,
    ):
        add(f"another body {other[:12]!r}", body=other)
    add("under another id", webhook_id="wh_others")
    add("under an id of 2,000 characters", webhook_id="w" * 2000)
    return found


def stolen(ports: Ports, secret: str) -> list[Attempt]:
    """Attempts with the stolen secret of the webhook. Any delivery can only trigger a look at OpenAI and add a row."""
    port, found = ports.webhook, []

    def add(name: str, event: object, webhook_id: str = "", raw_body: bytes | None = None) -> None:
        body, now = raw_body if raw_body is not None else json.dumps(event).encode(), str(int(time.time()))
        webhook_id = webhook_id or f"wh_stolen_{len(found)}"
        headers = {
            "webhook-id": webhook_id,
            "webhook-timestamp": now,
            "webhook-signature": _sign(secret, body, webhook_id, now),
        }
        found.append(_delivery(port, f"with the secret {name}", r"(204|400) answer", headers, body))

    def event(kind: object = "batch.completed", batch: object = "batch_1") -> dict[str, object]:
        return {"id": "evt", "type": kind, "data": {"id": batch}, "object": "event", "created_at": 1}

    add("a batch that is not there", event())
    add("the same again", event(), "wh_stolen_0")
    for kind in (
        "batch.failed",
        "batch.cancelled",
        "response.completed",
        "",
        "x" * 5000,
        None,
        7,
        [],
        {},
        "batch.completed\n",
        "'; drop table x",
    ):
        add(f"the kind {str(kind)[:20]!r}", event(kind=kind))
    for batch in (
        "",
        "x" * 500,
        "x" * 60_000,
        None,
        7,
        [],
        {"a": 1},
        "batch\0x",
        "\x1b[2J",
        "../../files",
        "'; drop table x",
        "batch_1\r\nX: y",
    ):
        add(f"the batch {str(batch)[:20]!r}", event(batch=batch))
    for name, body in (("no JSON", b"{"), ("a list", b"[]"), ("a number", b"7"), ("nothing", b""), ("no text", b"\xff"), ("deep JSON", b"[" * 5000 + b"]" * 5000),
                       ("no data", b'{"type": "batch.completed"}'), ("data that is text", b'{"type": "batch.completed", "data": "x"}'),
                       ("a number that is huge", b'{"type": "batch.completed", "data": {"id": 1' + b"0" * 5000 + b"}}")):  # fmt: skip
        add(name, None, raw_body=body)
    for webhook_id in ("x" * 201, "w" * 5000, "é" * 100, "'; drop table x; --", "\x80\x9b2J", " "):
        add(f"under the id {webhook_id[:10]!r}", event(), webhook_id)
    return found
