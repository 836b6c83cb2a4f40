"""Workers die at every step, the provider fails in every known way, Postgres restarts, and other tenants are hostile.
Still, the books agree."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from lab.chaos.doomed import POINTS
from lab.chaos.run import Chaos
from lab.postgres import LocalPostgres, install_autotag, local_postgres, machine_binaries
from lab.stack import Stack, local_stack

KILLS = 20  # of each run
#: The runs share the points, and come by most of them together: one dies before a step, the other one after it.
SHARES = [[point for n, point in enumerate(POINTS) if (n + n // 2) % 2 == run] for run in range(2)]


@pytest.fixture
async def own_stack(machine_postgres: bool) -> AsyncIterator[tuple[Stack, LocalPostgres]]:
    """A server that may be restarted without disturbing other tests."""
    with local_postgres(machine_binaries() if machine_postgres else None) as server:
        install_autotag(server)
        async with local_stack(server) as stack:
            yield stack, server


@pytest.mark.long
@pytest.mark.parametrize("neighbours", [False, True], ids=["alone", "beside hostile tenants"])
async def test_whatever_dies_nothing_is_lost_and_nothing_paid_twice(
    own_stack: tuple[Stack, LocalPostgres], neighbours: bool
) -> None:
    stack, server = own_stack
    chaos = Chaos(stack, server, seed=1 + neighbours, points=SHARES[neighbours])
    report = await chaos.run(kills=KILLS, neighbours=neighbours)
    assert report.violations == []
    assert report.kills >= KILLS
    assert report.restarts > 0
    assert (len(report.hostilities) > 0) is neighbours
