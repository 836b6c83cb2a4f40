"""The page of a comparison: one HTML file with every image and both answers. It has no scripts and loads nothing.

Tags and captions come from outside. So `text` escapes all of them, and the page's Content-Security-Policy allows only
inline styles and pictures.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from autotag.compare.figures import Difference, basis, compare_tags, latency, model_name, price, share
from autotag.images.sent import data_url

if TYPE_CHECKING:
    from autotag.compare.ask import ComparedOutcome

STYLE = """
:root { color-scheme: light dark; --ground: #f6f7f9; --card: #fff; --ink: #1a1f2b; --soft: #5b6475; --line: #dfe3ea;
  --chip: #eef1f5; --more: #0b6b3a; --more-ground: #dcf5e6; --less: #a3231f; --less-ground: #fde6e4; --warn: #8a5a00;
  --warn-ground: #fff3d6; }
@media (prefers-color-scheme: dark) { :root { --ground: #12151b; --card: #1b2028; --ink: #e8ebf0; --soft: #9aa4b5;
  --line: #2d3542; --chip: #28303c; --more: #7fe0a8; --more-ground: #123423; --less: #ff9e97; --less-ground: #3d1a1a;
  --warn: #ffcf70; --warn-ground: #3a2c0c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; letter-spacing: -.01em; }
h2 { font-size: 18px; margin: 40px 0 12px; }
h3 { font-size: 12px; font-weight: 600; margin: 0 0 6px; color: var(--soft); overflow-wrap: anywhere; }
p { margin: 0; }
.soft { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px; margin: 24px 0 0; }
.tile, .card, .panel { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.tile { padding: 14px 16px; }
.tile b { display: block; font-size: 23px; line-height: 1.3; font-weight: 650; font-variant-numeric: tabular-nums; }
.tile span { display: block; color: var(--soft); font-size: 13px; }
.warn { background: var(--warn-ground); color: var(--warn); border-radius: 8px; padding: 8px 12px; margin-top: 12px; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 12px; align-items: start; }
.panel { padding: 14px 16px; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 12px 5px 0; vertical-align: top; border-top: 1px solid var(--line); }
tr:first-child > * { border-top: 0; }
th { font-weight: 600; color: var(--soft); font-size: 13px; }
.count { text-align: right; padding-right: 0; }
.card { display: grid; grid-template-columns: 240px 1fr 1fr; gap: 20px; padding: 16px; margin-bottom: 12px; }
.card figure { margin: 0; }
.card img { display: block; width: 100%; max-height: 240px; object-fit: contain; border-radius: 8px;
  background: var(--chip); }
.none { display: grid; place-items: center; height: 150px; border-radius: 8px; background: var(--chip);
  color: var(--soft); font-size: 13px; }
figcaption { color: var(--soft); font-size: 12px; margin-top: 8px; overflow-wrap: anywhere; }
.caption { margin-bottom: 10px; overflow-wrap: anywhere; }
ul { list-style: none; display: flex; flex-wrap: wrap; gap: 6px; margin: 0; padding: 0; }
li { background: var(--chip); border-radius: 99px; padding: 2px 11px; font-size: 14px; overflow-wrap: anywhere; }
li small { color: var(--soft); font-size: 11px; margin-inline-start: 5px; font-variant-numeric: tabular-nums; }
li.more { background: var(--more-ground); color: var(--more); }
li.less { background: var(--less-ground); color: var(--less); }
li.more small, li.less small { color: inherit; }
li.more::before { content: "+ "; font-weight: 700; }
li.less::before { content: "− "; font-weight: 700; }
.failed { background: var(--warn-ground); color: var(--warn); border-radius: 8px; padding: 8px 12px; }
@media (max-width: 760px) { .card { grid-template-columns: 1fr; } .card img { max-height: 320px; } }
@media print { .card { break-inside: avoid; } }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def make_page(figures: Mapping[str, Any], outcomes: Sequence[ComparedOutcome]) -> str:
    """The page as HTML. Images without an answer come first, then those whose tags differ most.

    Args:
        figures: the result of `figures.summarise`.
        outcomes: of `Comparison`.
    """
    title = f"{figures['model']} compared with {_stored_by(figures)}"
    cards = [_card(one, figures) for one in sorted(outcomes, key=_agreement) if one.result or one.error]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{text(title)}</h1>\n{_head(figures)}\n{_tiles(figures)}\n{_warnings(figures)}\n"
        f"{_tables(figures)}\n"
        f"<h2>Image by image</h2>\n{_legend()}\n{''.join(cards)}</main>\n</body>\n</html>\n"
    )


def text(value: object) -> str:
    """Text from outside, escaped for HTML."""
    return html.escape(str(value), quote=True)


def _stored_by(figures: Mapping[str, Any]) -> str:
    """The models that gave the stored tags."""
    names = [name for name in figures["stored_models"] if name != "unknown"]
    if not names:
        return "the stored tags"
    return names[0] if len(names) == 1 else f"{names[0]} and others"


def _agreement(outcome: ComparedOutcome) -> tuple[bool, float, str]:
    difference = compare_tags(outcome)
    return difference is not None, difference.jaccard if difference else 0.0, outcome.sample.asset_id


def _head(figures: Mapping[str, Any]) -> str:
    new = model_name(figures["model"], figures["reasoning_effort"])
    old = model_name(figures["current_model"], figures["current_reasoning_effort"])
    return (
        f'<p class="soft">{figures["answered"]} of {figures["sample"]} images answered by {text(new)}; '
        f"the model in use is {text(old)}.</p>"
    )


def _tiles(figures: Mapping[str, Any]) -> str:
    seconds, agreement = figures["seconds"], figures["agreement"]
    tiles = [
        (price(figures["cost_per_1000"]), "for 1,000 images as single calls"),
        (
            price(figures["current_cost_per_1000"]),
            f"for 1,000 images with {figures['current_model']} ({basis(figures)})",
        ),
        (share(agreement["jaccard"]), "of all tags are the same (mean Jaccard)"),
        (share(agreement["kept"]), "of the stored tags are in the new answers"),
        (latency(seconds["p50"]), f"for an answer; 95 % within {latency(seconds['p95'])}"),
        (figures["failed"], f"images without an answer; {figures['cut_off']} cut off"),
    ]
    inside = "".join(
        f'<div class="tile"><b>{text(value)}</b><span>{text(label)}</span></div>' for value, label in tiles
    )
    return f'<div class="tiles">{inside}</div>'


def _warnings(figures: Mapping[str, Any]) -> str:
    warnings = [f"{figures['model']} shuts down on {figures['shutdown_date']}."] if figures["shutdown_date"] else []
    warnings += [f"The comparison ended early: {figures['stopped']}"] if figures["stopped"] else []
    warnings += [f"{failure['images']} × {failure['code']}: {failure['message']}" for failure in figures["failures"]]
    return "".join(f'<p class="warn">{text(sentence)}</p>' for sentence in warnings)


def _tables(figures: Mapping[str, Any]) -> str:
    """The tags that only one side has, the most frequent first."""
    tables = []
    for name, title in (("added", "only the new answers have"), ("missing", "only the stored tags have")):
        rows = "".join(
            f'<tr><td><bdi>{text(one["tag"])}</bdi></td><td class="count">{one["images"]}</td></tr>'
            for one in figures[name]
        )
        head = f'<tr><th>{title}</th><th class="count">images</th></tr>'
        tables += [f'<div class="panel"><table>{head}{rows}</table></div>'] if rows else []
    return f'<h2>Tags that differ most often</h2><div class="panels">{"".join(tables)}</div>' if tables else ""


def _legend() -> str:
    return (
        '<ul style="margin-bottom:14px"><li>both have it</li><li class="more">only the new answer has it</li>'
        '<li class="less">only the stored tags have it</li></ul>'
    )


def _card(outcome: ComparedOutcome, figures: Mapping[str, Any]) -> str:
    sample, difference = outcome.sample, compare_tags(outcome)
    picture = (
        f'<img src="{data_url(outcome.thumbnail)}" alt="{text(sample.caption or "")}">'
        if outcome.thumbnail
        else '<div class="none">no picture</div>'
    )
    notes = [share(difference.jaccard) + " the same" if difference else "no answer"]
    notes += [latency(outcome.seconds[-1])] if outcome.seconds else []
    notes += ["cut off once"] if outcome.cut_off and outcome.result else []
    return (
        f'<article class="card"><figure>{picture}<figcaption>{text(" · ".join(notes))}<br>{text(sample.asset_id)}'
        f"</figcaption></figure>\n{_stored(outcome, difference)}\n{_new(outcome, difference, figures)}</article>\n"
    )


def _stored(outcome: ComparedOutcome, difference: Difference | None) -> str:
    sample = outcome.sample
    marked = dict.fromkeys(difference.missing, "less") if difference else {}
    return _answer(sample.model or "stored", sample.caption, _chips(outcome.stored_tags, sample.confidence, marked))


def _new(outcome: ComparedOutcome, difference: Difference | None, figures: Mapping[str, Any]) -> str:
    if outcome.result is None or difference is None:
        reason = outcome.error.message if outcome.error else ""
        return _answer(figures["model"], None, f'<p class="failed">{text(reason)}</p>')
    result = outcome.result
    marked = dict.fromkeys(difference.added, "more")
    return _answer(
        result["model"] or figures["model"], result["caption"], _chips(result["tags"], result["confidence"], marked)
    )


def _answer(title: str, caption: str | None, inside: str) -> str:
    shown = f'<p class="caption" dir="auto">{text(caption)}</p>' if caption else ""
    return f"<section><h3>{text(title)}</h3>{shown}{inside}</section>"


def _chips(tags: Iterable[str], confidence: object, marked: Mapping[str, str]) -> str:
    """Tags with their confidence in percent. The host's column can hold any JSON, so only numbers from 0 to 1 are
    used."""
    by_tag = confidence if isinstance(confidence, dict) else {}
    chips = []
    for tag in tags:
        value = by_tag.get(tag)
        number = f"<small>{100 * value:.0f}</small>" if isinstance(value, (int, float)) and 0 <= value <= 1 else ""
        chips.append(f'<li class="{marked.get(tag, "")}"><bdi>{text(tag)}</bdi>{number}</li>')
    return f"<ul>{''.join(chips)}</ul>"
