"""All database calls of the product. No other module contains SQL, except `autotag.install`."""

from autotag.db.calls import Database
from autotag.db.errors import CALL_ERRORS, Busy, Lost, NotHeld, Refused, TooSlow, VersionsDiffer
from autotag.db.listening import can_listen, listen
from autotag.db.messages import Batch, BatchClaim, Claim, DatabaseSettings, Image, Question, Registered, Settled
from autotag.db.operator import Operator
from autotag.db.operator_messages import Diagnosis, ModelStatus, StoredFile

__all__ = [
    "CALL_ERRORS", "Batch", "BatchClaim", "Busy", "Claim", "Database", "DatabaseSettings", "Diagnosis", "Image", "Lost",
    "ModelStatus", "NotHeld", "Operator", "Question", "Refused", "Registered", "Settled", "StoredFile", "TooSlow",
    "VersionsDiffer", "can_listen", "listen",
]  # fmt: skip
