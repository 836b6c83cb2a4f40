"""The local edge's websocket takes any frame: it answers, ignores it, and goes on."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.asyncio.client import connect

from support import Library

words = st.sampled_from(
    ["phoenix", "heartbeat", "phx_join", "phx_leave", "broadcast", "access_token", "realtime:a", "realtime:\x00", "1"]
)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10) | words
anything = st.recursive(
    scalars, lambda x: st.lists(x, max_size=5) | st.dictionaries(words | st.text(max_size=8), x), max_leaves=8
)
config = st.fixed_dictionaries({}, optional={
    "private": st.booleans(), "broadcast": anything, "presence": anything, "postgres_changes": anything})  # fmt: skip
payload = st.fixed_dictionaries({}, optional={"config": config | anything, "access_token": scalars, "event": scalars,
                                              "payload": anything}) | anything  # fmt: skip
arrays = st.tuples(scalars, scalars, words | anything, words | anything, payload).map(list)
objects = st.fixed_dictionaries(
    {"topic": words | anything, "event": words | anything},
    optional={"payload": payload, "ref": anything, "join_ref": anything},
)


@pytest.mark.parametrize("version", ["1.0.0", "2.0.0"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    frames=st.lists(
        st.one_of(arrays, objects, anything).map(json.dumps) | st.binary(max_size=60) | st.text(), max_size=12
    )
)
async def test_the_socket_survives_any_frame(library: Library, version: str, frames: list[str | bytes]) -> None:
    stack = library.stack
    url = stack.supabase_url.replace("http", "ws") + f"/realtime/v1/websocket?apikey={stack.anon_key}&vsn={version}"
    beat: Any = {"topic": "phoenix", "event": "heartbeat", "payload": {}, "ref": "last"}
    if version == "2.0.0":
        beat = [None, "last", "phoenix", "heartbeat", {}]
    async with connect(url) as socket:
        for frame in frames:
            await socket.send(frame)
        await socket.send(json.dumps(beat))
        async for answer in socket:
            if isinstance(answer, str) and '"last"' in answer and "phoenix" in answer:
                return
    pytest.fail("the server closed the socket")
