"""Messages and exit codes of commands that cannot continue.

A message is one sentence: what is wrong, and what to do about it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import psycopg_pool

from autotag.cli.console import fail
from autotag.connection_string import how_to_reach
from autotag.db import Refused, VersionsDiffer
from autotag.install.answers import HostError
from autotag.redact import safe_message
from autotag.texts import printable

FAILED = 1
WRONG_USAGE = 2  # of options, of settings, or of a project's tables
VERSIONS_DIFFER = 3
INTERRUPTED = 130  # what shells expect after Ctrl-C

LOCAL_DATABASE = "postgresql://postgres:postgres@127.0.0.1:54322/postgres"  # what `supabase start` serves

MAX_REASON = 300  # characters of a driver's message
NO_SCHEMA = (
    "The database lacks autotag's schema, or has an older one than this command; apply the migrations (autotag migrate,"
    " or supabase db push, with --remote for the linked project)."
)


def unreachable(error: BaseException, *, local: bool = False) -> str:
    """The message for a database that does not answer. ``local``: no database was named, so it is the local stack's."""
    reason = printable(safe_message(error), MAX_REASON).rstrip(".")
    fix = "start it with supabase start, or set DATABASE_URL" if local else how_to_reach(str(error))
    return f"The database cannot be reached ({reason}); {fix}."


def not_permitted(error: psycopg.Error, role: str) -> str:
    """The message for a login without a privilege that ``role`` has."""
    reason = error.diag.message_primary
    return f"The login may not do this ({reason}); run as the database's owner: grant {role} to <login>;"


@contextmanager
def explain_errors(role: str) -> Iterator[None]:
    """Turns the errors of a command that works on an installed schema into one sentence.

    Args:
        role: the database role that the command needs.

    Raises:
        typer.Exit: with the exit code of the error. The message has been printed.
    """
    try:
        yield
    except VersionsDiffer as error:
        raise fail(f"{str(error).rstrip('.')}. {error.hint}", VERSIONS_DIFFER) from None
    except Refused as refused:
        raise fail(f"{refused} {refused.hint or ''}".strip(), FAILED) from None
    except (psycopg.OperationalError, psycopg_pool.PoolTimeout) as error:
        raise fail(unreachable(error), FAILED) from None
    except psycopg.errors.InsufficientPrivilege as error:
        raise fail(not_permitted(error, role), FAILED) from None
    except (psycopg.errors.UndefinedFunction, psycopg.errors.InvalidSchemaName):
        raise fail(NO_SCHEMA, FAILED) from None
    except (psycopg.errors.InvalidTextRepresentation, psycopg.errors.NumericValueOutOfRange) as error:
        # invalid input syntax for type uuid: "mine", for example
        raise fail(f"An option has a wrong value: {error.diag.message_primary}.", WRONG_USAGE) from None
    except UnicodeEncodeError:
        raise fail("An option has a wrong value: it is not UTF-8.", WRONG_USAGE) from None


@contextmanager
def explain_install_errors(url: str, failed: str = "The migrations were not applied") -> Iterator[None]:
    """Like `explain_errors`, for commands that install or drop the schema as the database's owner.

    Args:
        url: the connection URL.
        failed: the state after Postgres has refused, as a sentence.

    Raises:
        typer.Exit: with the exit code of the error. The message has been printed.
    """
    try:
        yield
    except HostError as error:
        raise fail(str(error), WRONG_USAGE) from None
    except psycopg.errors.LockNotAvailable as error:
        who = next(iter(getattr(error, "__notes__", [])), "another session locks a table that it needs")
        raise fail(f"{failed}, or not all: {printable(who, MAX_REASON)}; run the command again.", FAILED) from None
    except psycopg.errors.InsufficientPrivilege as error:
        raise fail(
            f"The login may not do this ({error.diag.message_primary}); connect as the database's owner (postgres).",
            FAILED,
        ) from None
    except psycopg.errors.ReadOnlySqlTransaction:
        raise fail(
            f"{failed}: the database is read-only (a replica, or it has no space left); connect to one that can be"
            " written.",
            FAILED,
        ) from None
    except psycopg.errors.InvalidSchemaName as error:
        raise fail(
            f"{failed} ({error.diag.message_primary}); the database must be that of a Supabase project.",
            FAILED,
        ) from None
    except psycopg.OperationalError as error:
        raise fail(unreachable(error, local=url == LOCAL_DATABASE), FAILED) from None
    except psycopg.Error as error:
        raise fail(f"{failed}: {safe_message(error)}", FAILED) from None
    except OSError as error:
        raise fail(f"{error.filename or 'A file'} cannot be read or written ({error.strerror}).", FAILED) from None
