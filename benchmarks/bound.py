"""The theoretical minimum of a mix of uploads: the derivation is in docs/scheduling.md.

Whoever admits as early as every limit allows admits the k-th call at the earliest moment at which any schedule can that
sends calls of these sizes; and no call is over before its own latency has passed. A call's size is what the provider
counted for it at admission: the prompt and the cap of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Upload:
    """So many images of one workspace, arriving at a moment (seconds)."""

    workspace: int
    images: int
    at: float = 0.0


@dataclass(frozen=True)
class Limits:
    """What binds; times in seconds."""

    requests_per_minute: float = 500
    tokens_per_minute: float = 200_000
    tokens_per_call: float = 3397  # what the provider counts: 2,833 of the image, 164 of text, 400 of the answer's cap
    window_requests: int = 10_000  # of one workspace, in any minute; wide, because the peers have none
    chunk: int = 5
    chunk_delay: float = 2.0
    all_at_once: int = 5  # images up to which nothing is paced


def available(upload: Upload, limits: Limits) -> list[float]:
    """When each image of an upload may be released at the earliest: chunks, and the workspace's window."""
    paced = limits.chunk_delay if upload.images > limits.all_at_once else 0.0
    moments: list[float] = []
    for i in range(upload.images):
        moment = upload.at
        if i >= limits.chunk:
            moment = max(moment, moments[i - limits.chunk] + paced)
        if i >= limits.window_requests:
            moment = max(moment, moments[i - limits.window_requests] + 60.0)
        moments.append(moment)
    return moments


def admissions(uploads: Sequence[Upload], limits: Limits, sizes: Sequence[float] = ()) -> list[float]:
    """The earliest moment of the k-th admission, for every k; ``sizes[k]`` are the tokens of the k-th accepted call
    (none: each has ``tokens_per_call``)."""
    ready = sorted(moment for upload in uploads for moment in available(upload, limits))
    requests, tokens, now = limits.requests_per_minute, limits.tokens_per_minute, 0.0
    result = []
    for k, moment in enumerate(ready):
        size = sizes[k] if sizes else limits.tokens_per_call
        elapsed = max(moment - now, 0.0)
        now += elapsed
        requests = min(limits.requests_per_minute, requests + elapsed * limits.requests_per_minute / 60)
        tokens = min(limits.tokens_per_minute, tokens + elapsed * limits.tokens_per_minute / 60)
        wait = max(
            0.0, (1 - requests) * 60 / limits.requests_per_minute,
            (size - tokens) * 60 / limits.tokens_per_minute,
        )  # fmt: skip
        now += wait
        requests += wait * limits.requests_per_minute / 60 - 1
        tokens += wait * limits.tokens_per_minute / 60 - size
        result.append(now)
    return result


def minimum(
    uploads: Sequence[Upload], limits: Limits, latencies: Sequence[float], sizes: Sequence[float] = ()
) -> float:
    """Seconds in which no schedule can finish earlier; ``latencies[k]`` and ``sizes[k]`` are those of the k-th accepted
    call."""
    earliest = admissions(uploads, limits, sizes)
    return max(moment + latency for moment, latency in zip(earliest, latencies, strict=True))


def fair_finishes(
    uploads: Sequence[Upload], limits: Limits, latencies: Sequence[float], sizes: Sequence[float] = ()
) -> dict[int, float]:
    """When each workspace would be done if every admission, as early as possible, went to the one that had got
    least: the fair share that nobody should fall behind."""
    ready = {u.workspace: available(u, limits) for u in uploads}
    served = dict.fromkeys(ready, 0)
    done: dict[int, float] = {}
    for moment, latency in zip(admissions(uploads, limits, sizes), latencies, strict=True):
        waiting = [
            w for w, moments in ready.items() if served[w] < len(moments) and moments[served[w]] <= moment + 1e-9
        ]
        workspace = min(waiting, key=lambda w: (served[w], w))
        served[workspace] += 1
        done[workspace] = max(done.get(workspace, 0.0), moment + latency)
    return done
