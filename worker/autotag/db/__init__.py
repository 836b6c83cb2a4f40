"""Every call of the database that the product makes. No other module of it holds SQL, but for `autotag.install`."""

from autotag.db.calls import Database
from autotag.db.listening import can_listen, listen
from autotag.db.messages import Batch, BatchClaim, Claim, Image, NotHeld, Refused, Settled, VersionsDiffer
from autotag.db.operator import Operator

__all__ = [
    "Batch", "BatchClaim", "Claim", "Database", "Image", "NotHeld", "Operator", "Refused", "Settled", "VersionsDiffer",
    "can_listen", "listen",
]  # fmt: skip
