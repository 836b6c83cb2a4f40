"""Special behaviour of Supabase's services that a test or benchmark can turn on in the local edge."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.websockets import WebSocket

BAD_GATEWAY = "<html><head><title>502 Bad Gateway</title></head><body><center>nginx</center></body></html>"


@dataclass(eq=False)
class Manners:
    """Behaviours of the real services, each off by default. They may be changed while the edge runs.

    Attributes:
        penalty: share of Realtime's delays before it refuses (2 s for a connection, 5 s for a join), 0 to 1.
        cold_start: seconds after the first join until Realtime's replication runs. Broadcasts from the database before
            that are lost: the server answers the first join of a tenant before it reads the tenant's messages.
        private_only: the project has switched off "Allow public access" in Realtime's settings.
        down: the gateway answers 502 with a page of HTML to everything.
        failures: it does so to this number of HTTP requests.
    """

    penalty: float = 0.0
    cold_start: float = 0.0
    private_only: bool = False
    down: bool = False
    failures: int = 0
    reads_from: float | None = field(default=None, repr=False)  # time.monotonic() at which the replication runs
    sockets: set[WebSocket] = field(default_factory=set, repr=False)

    def forget(self) -> None:
        """Makes the next join count as the tenant's first, as after a quiet time."""
        self.reads_from = None

    async def go_down(self) -> None:
        """Starts an outage: closes open sockets and refuses requests until `down` is reset."""
        self.down = True
        await asyncio.gather(*(socket.close(1012) for socket in list(self.sockets)), return_exceptions=True)
