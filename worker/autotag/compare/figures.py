"""Summarises the answers of a comparison, and writes the figures as text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autotag.db.operator_messages import ComparisonPreview, ModelQuestion
from autotag.money import dollars

if TYPE_CHECKING:
    from autotag.compare.ask import ComparedOutcome

MAX_SHOWN_TAGS = 10  # how many of the most frequent added and missing tags are shown
MIN_ANSWERS = 10  # the answers that an estimate needs (``autotag.estimate_tokens``)
PER = 1000  # costs are given for this many images


@dataclass(frozen=True)
class Difference:
    """The tags of one image.

    Attributes:
        both: tags that are stored and in the new answer, in the stored order.
        missing: tags that are only stored, in the stored order.
        added: tags that are only in the new answer, in its order.
    """

    both: list[str]
    missing: list[str]
    added: list[str]

    @property
    def jaccard(self) -> float:
        """The number of common tags, as a share (0 to 1) of all different tags."""
        return len(self.both) / max(1, len(self.both) + len(self.missing) + len(self.added))


def compare_tags(outcome: ComparedOutcome) -> Difference | None:
    """The difference between the stored and the new tags; None: there is no new answer."""
    if outcome.result is None:
        return None
    stored, new = outcome.stored_tags, outcome.result["tags"]
    return Difference(
        [tag for tag in stored if tag in new], [tag for tag in stored if tag not in new],
        [tag for tag in new if tag not in stored],
    )  # fmt: skip


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that at least this share (0 to 1) of the values does not exceed; None: there is no value."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None


def summarise(
    outcomes: Sequence[ComparedOutcome], preview: ComparisonPreview, question: ModelQuestion, stopped: str | None
) -> dict[str, Any]:
    """All figures as one JSON object (docs/models.md).

    Args:
        outcomes: of `Comparison`.
        preview: the result of ``autotag.preview_comparison``.
        question: the question at the end of the run.
        stopped: why the comparison ended early; None: it did not.
    """
    differences = [difference for one in outcomes if (difference := compare_tags(one))]
    seconds = [second for one in outcomes for second in one.seconds]
    costs = [one.cost for one in outcomes if one.billed]
    # Without a billed call the cost is unknown, not zero.
    cost = sum(one for one in costs if one is not None) if costs and None not in costs else None
    stored = sum(len(d.both) + len(d.missing) for d in differences)
    failures = Counter((one.error.code, one.error.message) for one in outcomes if one.error and one.result is None)
    return {
        "model": question["model"], "reasoning_effort": question["reasoning_effort"],
        "shutdown_date": preview["shutdown_date"],
        "current_model": preview["current_model"], "current_reasoning_effort": preview["current_effort"],
        "stored_models": dict(Counter(one.sample.model or "unknown" for one in outcomes).most_common()),
        "sample": len(outcomes), "answered": len(differences), "failed": sum(failures.values()),
        "not_asked": sum(one.result is None and one.error is None for one in outcomes),
        "stopped": stopped,
        "cut_off": sum(one.cut_off for one in outcomes), "calls_billed": sum(one.billed for one in outcomes),
        "cost": cost, "cost_per_1000": PER * cost / len(differences) if cost is not None and differences else None,
        "current_cost_per_1000": preview["current_cost_per_1000"], "current_answers": preview["current_answers"],
        "seconds": {"p50": percentile(seconds, 0.5), "p95": percentile(seconds, 0.95)},
        "agreement": {
            "jaccard": sum(d.jaccard for d in differences) / len(differences) if differences else None,
            "kept": sum(len(d.both) for d in differences) / stored if stored else None,
        },
        "added": _frequent(tag for d in differences for tag in d.added),
        "missing": _frequent(tag for d in differences for tag in d.missing),
        "failures": [{"code": c, "message": m, "images": n} for (c, m), n in failures.most_common()],
        "images": [describe(one) for one in outcomes],
    }  # fmt: skip


def describe(outcome: ComparedOutcome) -> dict[str, Any]:
    """One image as a JSON object."""
    sample, difference = outcome.sample, compare_tags(outcome)
    answer = {name: outcome.result[name] for name in ("tags", "confidence", "caption")} if outcome.result else None
    error = outcome.error if outcome.result is None else None
    return {
        "asset_id": sample.asset_id,
        "stored": {
            "tags": sample.tags, "confidence": sample.confidence, "caption": sample.caption, "model": sample.model,
        },
        "answer": answer,
        "error": {"kind": error.kind, "code": error.code, "message": error.message} if error else None,
        "jaccard": round(difference.jaccard, 4) if difference else None,
        "added": difference.added if difference else [], "missing": difference.missing if difference else [],
        "cut_off": outcome.cut_off, "seconds": [round(second, 3) for second in outcome.seconds], "cost": outcome.cost,
    }  # fmt: skip


def _frequent(tags: Iterable[str]) -> list[dict[str, Any]]:
    return [{"tag": tag, "images": images} for tag, images in Counter(tags).most_common(MAX_SHOWN_TAGS)]


# -- as text, for the terminal and the page


def price(amount: float | None) -> str:
    """Dollars; None: unknown."""
    return "unknown" if amount is None else dollars(amount)


def share(value: float | None) -> str:
    """A share (0 to 1) in percent; None: there is none."""
    return "–" if value is None else f"{100 * value:.0f} %"


def latency(seconds: float | None) -> str:
    """Seconds; None: there are none."""
    return "–" if seconds is None else f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"


def model_name(model: str, effort: str | None) -> str:
    """A model with its reasoning effort, if it has one."""
    return f"{model} (effort {effort})" if effort else model


def basis(figures: Mapping[str, Any]) -> str:
    """The basis for the cost of the model in use. With fewer than `MIN_ANSWERS` answers, the cost is a guess."""
    answers = figures["current_answers"]
    return f"from {answers:,} answers" if answers >= MIN_ANSWERS else "a first guess"


def lines(figures: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The figures of both models: name, value of the new model, value of the model in use (empty: unknown)."""
    current = figures["current_cost_per_1000"]
    return [
        ("cost of 1,000 images", price(figures["cost_per_1000"]),
         f"{dollars(current)} ({basis(figures)})" if current is not None else "unknown"),
        ("seconds for an answer, p50 / p95",
         f"{latency(figures['seconds']['p50'])} / {latency(figures['seconds']['p95'])}", ""),
        ("answers cut off", f"{figures['cut_off']} of {figures['sample']}", ""),
        ("images without an answer", f"{figures['failed']} of {figures['sample']}", ""),
        ("tags that agree (mean Jaccard)", share(figures["agreement"]["jaccard"]), ""),
        ("stored tags that it gives too", share(figures["agreement"]["kept"]), ""),
    ]  # fmt: skip
