"""The points at which chaos kills workers: every call of the database passes one."""

from __future__ import annotations

import os
from typing import Any

import pytest
from openai import AsyncOpenAI

from autotag.db.connections import Connections
from autotag.db.readers import nothing
from lab.chaos.doomed import doom


@pytest.mark.parametrize("retried", [True, False])
async def test_every_call_of_the_database_is_a_point(monkeypatch: pytest.MonkeyPatch, retried: bool) -> None:
    ended = []

    async def call(self: Connections, *arguments: Any, **named: Any) -> None:
        ended.append("called")

    monkeypatch.setattr(Connections, "_call", call)
    monkeypatch.setattr(AsyncOpenAI, "request", AsyncOpenAI.request)  # both are put back
    monkeypatch.setattr(os, "kill", lambda pid, number: ended.append("killed"))
    doom("before:settle:2")
    connections = Connections("postgresql://")
    make_call = connections.call if retried else connections.call_once
    for _ in range(2):
        await make_call("settle", nothing, "select autotag.settle(%s)", 1)
    assert ended[:2] == ["called", "killed"], "the second call is its end, before it is made"
