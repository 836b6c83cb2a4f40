"""The theoretical minimum time for a mix of uploads; docs/scheduling.md has the derivation.

A schedule that admits every call as early as the limits allow admits the k-th call no later than any other schedule
with calls of the same sizes. A call ends no earlier than its latency after its admission. The size of a call is what
the provider counts at admission: the tokens of the prompt and the cap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Upload:
    """An upload of one workspace, and the second at which it arrives."""

    workspace: int
    images: int
    at: float = 0.0


@dataclass(frozen=True)
class Limits:
    """The limits that apply; times in seconds."""

    requests_per_minute: float = 500
    tokens_per_minute: float = 200_000
    tokens_per_call: float = 3397  # counted at admission: 2,833 for the image, 164 for the text, 400 for the cap
    window_requests: int = 10_000  # per workspace and minute; not binding, because the peers have no such limit
    chunk: int = 5  # images
    chunk_delay: float = 2.0
    unpaced_images: int = 5  # uploads of up to this many images are not paced


def available(upload: Upload, limits: Limits) -> list[float]:
    """The earliest release of each image of an upload under its pacing and the workspace's window."""
    paced = limits.chunk_delay if upload.images > limits.unpaced_images else 0.0
    times: list[float] = []
    for i in range(upload.images):
        time = upload.at
        if i >= limits.chunk:
            time = max(time, times[i - limits.chunk] + paced)
        if i >= limits.window_requests:
            time = max(time, times[i - limits.window_requests] + 60.0)
        times.append(time)
    return times


def admissions(uploads: Sequence[Upload], limits: Limits, sizes: Sequence[float] = ()) -> list[float]:
    """The earliest time of the k-th admission, for every k.

    Args:
        uploads: the mix.
        limits: the limits that apply.
        sizes: tokens of the k-th accepted call; empty: ``tokens_per_call`` for each.
    """
    ready = sorted(time for upload in uploads for time in available(upload, limits))
    requests, tokens, now = limits.requests_per_minute, limits.tokens_per_minute, 0.0
    result = []
    for k, time in enumerate(ready):
        size = sizes[k] if sizes else limits.tokens_per_call
        elapsed = max(time - now, 0.0)
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
    """Seconds that every schedule needs; ``latencies[k]`` and ``sizes[k]`` belong to the k-th accepted call."""
    earliest = admissions(uploads, limits, sizes)
    return max(time + latency for time, latency in zip(earliest, latencies, strict=True))


def fair_finishes(
    uploads: Sequence[Upload], limits: Limits, latencies: Sequence[float], sizes: Sequence[float] = ()
) -> dict[int, float]:
    """The finish of each workspace under fair sharing: each admission is as early as possible and goes to the waiting
    workspace with the fewest so far."""
    ready = {u.workspace: available(u, limits) for u in uploads}
    served = dict.fromkeys(ready, 0)
    done: dict[int, float] = {}
    for time, latency in zip(admissions(uploads, limits, sizes), latencies, strict=True):
        waiting = [w for w, times in ready.items() if served[w] < len(times) and times[served[w]] <= time + 1e-9]
        workspace = min(waiting, key=lambda w: (served[w], w))
        served[workspace] += 1
        done[workspace] = max(done.get(workspace, 0.0), time + latency)
    return done
