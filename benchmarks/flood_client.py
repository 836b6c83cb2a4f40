"""Floods a port with slow connections and invalid requests until it is killed.

Usage: python -m benchmarks.flood_client PORT CONNECTIONS REQUESTS_PER_SECOND. A separate program, so that it does not
slow down the process that measures.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys

HOST = "127.0.0.1"
POST = b"POST /webhooks/openai HTTP/1.1\r\nHost: x\r\n"
INVALID_REQUESTS = (
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) * 2,
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n",
    POST + b"Content-Length: 2\r\n\r\n{}",
    POST + b"Transfer-Encoding: chunked\r\n\r\nnot a size\r\n",
    POST + b"Upgrade: websocket\r\nConnection: upgrade\r\nContent-Length: 0\r\n\r\n",
)


async def send_slowly(port: int) -> None:
    """Sends a header one byte per second; reconnects when the connection is closed."""
    while True:
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection(HOST, port)
            writer.write(b"GET /healthz HTTP/1.1\r\nX-Slow: ")
            try:
                while not reader.at_eof():
                    writer.write(b"a")
                    await writer.drain()
                    await asyncio.sleep(1)
            finally:
                writer.transport.abort()
        await asyncio.sleep(1)


async def send_invalid(port: int, data: bytes) -> None:
    """Sends one invalid request."""
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(2):
            reader, writer = await asyncio.open_connection(HOST, port)
            writer.write(data)
            await reader.read(1000)
            writer.transport.abort()


async def main(port: int, slow: int, rate: int) -> None:
    """Runs until the process is killed."""
    async with asyncio.TaskGroup() as group:
        for _ in range(slow):
            group.create_task(send_slowly(port))
        number = 0
        while True:
            group.create_task(send_invalid(port, INVALID_REQUESTS[number % len(INVALID_REQUESTS)]))
            number += 1
            await asyncio.sleep(1 / rate)


if __name__ == "__main__":
    asyncio.run(main(*(int(argument) for argument in sys.argv[1:4])))
