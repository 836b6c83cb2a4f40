"""API keys and user tokens: JWTs signed with the project's secret."""

from __future__ import annotations

import time
from typing import Any

import jwt


class TokenError(Exception):
    """A token is invalid; ``reason`` is ``expired`` or ``malformed``."""

    def __init__(self, reason: str, message: str, expired_for: int = 0) -> None:
        super().__init__(message)
        self.reason = reason
        self.expired_for = expired_for


def sign(secret: str, role: str, *, subject: str | None = None, lifetime: float = 3600 * 24, **claims: Any) -> str:
    """A token for a role (``anon``, ``authenticated``, ``service_role``), valid for ``lifetime`` seconds."""
    now = time.time()
    payload: dict[str, Any] = {"role": role, "iss": "supabase-local", "iat": int(now), "exp": int(now + lifetime)}
    if subject:
        payload |= {"sub": subject, "aud": "authenticated"}
    return jwt.encode(payload | claims, secret, algorithm="HS256")


def verify(secret: str, token: str) -> dict[str, Any]:
    """The claims of a token.

    Raises:
        TokenError: the token has expired, is malformed, or has a different signature.
    """
    try:
        return dict(jwt.decode(token, secret, algorithms=["HS256"], options={"verify_aud": False}))
    except jwt.ExpiredSignatureError:
        claims = jwt.decode(token, options={"verify_signature": False})
        raise TokenError("expired", "JWT expired", int(time.time() - claims["exp"])) from None
    except jwt.PyJWTError as error:
        raise TokenError("malformed", str(error)) from None


def bearer(header: str | None) -> str:
    """The token of an Authorization header, or the empty string."""
    scheme, _, token = (header or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""
