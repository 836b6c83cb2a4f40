"""Each role can do what the documentation says and nothing else: attempts of every kind of attacker, and controls that
break one defence each and are found."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from attacks import api, member, topics
from attacks.attempt import Attempt, run
from attacks.scene import Scene, set_scene
from autotag_local.stack import Stack
from support import paid, until, worker

LEAST = 60  # attempts of each role


@pytest.fixture
async def scene(stack: Stack) -> AsyncIterator[Scene]:
    async with set_scene(stack) as furnished:
        yield furnished


def assert_nothing(findings: list[str]) -> None:
    assert not findings, f"{len(findings)} attempts had an effect or an odd answer:\n" + "\n".join(findings[:5000])


def outsiders(scene: Scene, caller: str) -> list[Attempt]:
    """What somebody tries who has nothing to do with the victim's workspace."""
    kinds = (api.rpcs, api.rows, api.storage, api.tokens, topics.private_topics, api.statements)
    return [attempt for kind in kinds for attempt in kind(scene, caller)]


@pytest.mark.parametrize("caller", ["anon", "nobody", "neighbour"])
async def test_outsiders(scene: Scene, caller: str) -> None:
    attempts = outsiders(scene, caller)
    assert len(attempts) >= LEAST
    before = scene.snapshot(caller)
    async with scene.victim_listens():
        found = await run(scene, attempts)
    assert_nothing(found + await scene.findings(before, caller))


async def test_a_member(scene: Scene) -> None:
    """Who may use five images a day gets five, whatever they try, by the provider's book too."""
    assets = await member.furnish(scene)
    before = scene.snapshot("member")
    attempts = [*member.tables(scene), *member.rpcs(scene), *member.limits(scene, assets)]
    assert len(attempts) >= LEAST
    async with scene.victim_listens():
        found = await run(scene, attempts)
    found += await scene.findings(before, "member") + member.cheating(scene)
    assert_nothing(found)
    async with worker(scene.stack):
        await until(lambda: not scene.member.sql("select id from autotag.jobs where finished_at is null"), "every upload")
    assert len(paid(scene.stack)) <= member.QUOTA + 1, "the victim's one image is paid for, too"
    scene.victim.check_tags([scene.ids["live asset"]])
