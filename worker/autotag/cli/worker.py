"""``autotag worker``: runs one worker."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from autotag.cli.console import fail
from autotag.cli.errors import FAILED, explain_errors
from autotag.cli.options import PROVIDER_AND_STORAGE, WORKER_URL, help_end, read_settings
from autotag.config import Settings
from autotag.observability.logs import configure_logs
from autotag.observability.traces import TracesError, configure_traces

HELP_END = help_end(
    environment=(WORKER_URL, *PROVIDER_AND_STORAGE, ("OPENAI_WEBHOOK_SECRET", "for --webhook, or @FILE")),
    exit_codes={
        0: "stopped by SIGTERM or Ctrl-C", 1: "failed; the message says why", 2: "wrong option or setting",
        3: "the versions of worker and schema differ",
    },
    examples=["autotag worker --http 0.0.0.0:8080"],
)  # fmt: skip

Http = Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Serve /healthz, /readyz and /metrics here.")]
Webhook = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT", help="Serve POST /webhooks/openai here, for OpenAI. Needs OPENAI_WEBHOOK_SECRET."
    ),
]


def worker(http: Http = None, webhook: Webhook = None) -> None:
    """Run one worker until SIGTERM or Ctrl-C.

    It takes images from the database, asks the AI provider, and stores the tags.
    Start as many as you like, on as many machines as you like.
    """
    from autotag.worker.run import run_worker

    given = {name: value for name, value in (("http", http), ("webhook", webhook)) if value}
    settings = read_settings(Settings, given)
    configure_logs(settings.log_level, settings.log_format)
    with explain_errors("autotag_worker"):
        try:
            configure_traces()
            asyncio.run(run_worker(settings))
        except TracesError as error:
            raise fail(str(error), FAILED) from None
        except OSError as error:  # a port is taken, for example
            reason = error.strerror or str(error)
            raise fail(f"The worker cannot start: {reason}; check --http and --webhook.", FAILED) from None
