"""One self-contained HTML page about a run: what it learned, what it cost, and where each paid second went.

Tables and figures are in the HTML itself; `page.js` draws the curves. Nothing is loaded from a network.
"""

import math
import time
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from string import Template

import yaml

from cluster.cost import get_usd_per_mtoken
from cluster.ledger import STATES, check_tiling
from cluster.report.curves import build_curves
from cluster.report.story import Row, Story, read_story
from cluster.waste import split_dollars
from elastic.ports import Phase
from elastic.records.rundir import RunDir, format_utc
from elastic.redact import redact
from elastic.strict_json import dump_json

_HERE = Path(__file__).parent


def build_report(run_dir: RunDir, *, now_s: float | None = None) -> Path:
    """Write `report.html` and return its path; a run that still trains or has crashed is shown as far as it came.

    Args:
        now_s: Unix time that "running" is judged by; the present unless given.
    """
    story = read_story(run_dir)
    page = render(story, now_s=time.time() if now_s is None else now_s)
    run_dir.report.write_text(page, encoding="utf-8")
    return run_dir.report


def render(story: Story, *, now_s: float) -> str:
    """Return the page."""
    # "<" never appears in the data, so no string of the run can close its script element
    data = dump_json(build_curves(story), separators=(",", ":")).replace("<", "\\u003c")
    config = yaml.safe_dump(redact(story.config), sort_keys=False) if story.config else "config.yaml is missing."
    return Template((_HERE / "page.html").read_text()).substitute(
        css=(_HERE / "page.css").read_text(),
        js=(_HERE / "page.js").read_text(),
        name=escape(story.name),
        state=escape(story.get_state(now_s)),
        subtitle=escape(_describe(story)),
        cards=_render_cards(story),
        legend="".join(f"<span>{_swatch(state)}{state}</span>" for state in _get_used_states(story)),
        money=_render_money(story),
        incidents=_render_incidents(story),
        attempts=_render_attempts(story),
        config=escape(config),
        made_utc=format_utc(now_s),
        data=data,
    )


def _describe(story: Story) -> str:
    model, parts = story.config.get("model", {}), list[str]()
    if model:
        parts.append(
            f"{model.get('kind')}: {model.get('num_layers')} layers"
            + (f" of width {model['dim']}" if "dim" in model else "")
        )
    parts += [str(story.config[key]) for key in ("strategy", "precision") if key in story.config]
    if story.rows:
        parts.append(f"last step at {story.all_rows[-1]['time_utc']}")
    return " \u00b7 ".join(parts)


def _render_cards(story: Story) -> str:
    last: Row = story.rows[-1] if story.rows else {}
    val_loss, tokens, totals = story.get_last("val_loss"), last.get("tokens", 0), story.totals
    lost_steps = sum(row["lost_steps"] for row in story.attempts)
    booked = bool(story.tiles)
    usd_per_mtoken = get_usd_per_mtoken(totals.usd, tokens) if booked else None
    cards = (
        (
            "steps",
            _count(last.get("step", 0)),
            f"of {_count(story.total_steps or last.get('step', 0))}, {_count(lost_steps)} done again"
            + (f", {_count(len(story.bad_steps))} not applied" if story.bad_steps else ""),
        ),
        ("tokens", _compact(tokens), f"{_compact(last.get('tokens_per_s'))} per second at the end"),
        ("loss", _number(last.get("loss"), 4), f"validation {_number(val_loss, 4)}"),
        ("cost", _usd(totals.usd if booked else None), f"{_usd(usd_per_mtoken)} per million tokens"),
        ("goodput", f"{totals.goodput:.1%}" if booked else "-", "of the paid time was new steps"),
        ("paid time", _duration(totals.paid_gpu_s if booked else None), "summed over all GPUs"),
    )
    return "".join(
        f'<div class="card"><small>{name}</small><b>{escape(value)}</b><small>{escape(note)}</small></div>'
        for name, value, note in cards
    )


def _render_money(story: Story) -> str:
    totals = story.totals
    if not story.tiles:
        return '<p class="muted">Nothing was booked yet.</p>'
    shares: dict[Phase, float] = {
        state: totals.get_gpu_seconds(state) / (totals.paid_gpu_s or 1) for state in _get_used_states(story)
    }
    bar = "".join(
        f'<span style="flex:{share:.6f};background:var(--{state})" title="{state} {share:.1%}"></span>'
        for state, share in shares.items()
    )
    cents = max(2, 3 - math.floor(math.log10(totals.usd))) if totals.usd else 2
    rows = [
        (
            f"{_swatch(state)}{state}",
            _duration(totals.get_gpu_seconds(state)),
            f"{share:.2%}",
            f"${totals.usd_by_state[state]:,.{cents}f}",
        )
        for state, share in shares.items()
    ]
    rows.append(("<b>all</b>", _duration(totals.paid_gpu_s), "100%", f"${totals.usd:,.{cents}f}"))
    problems = "".join(f'<p class="muted">Warning: {escape(problem)}</p>' for problem in check_tiling(story.tiles))
    return f'<div class="bar">{bar}</div>' + _table(("state", "GPU time>", "share>", "USD>"), rows) + problems


def _render_incidents(story: Story) -> str:
    waste = split_dollars(story.tiles, story.incidents)
    cells: list[Sequence[str]] = [
        (
            escape(str(row.get("kind"))),
            escape(str(row.get("node"))),
            _duration(row.get("outage_s")),
            _count(row.get("lost_steps")),
            escape(str(row.get("resumed_from") or "-")),
            _usd(share.outage_usd),
            _usd(share.redo_usd),
        )
        for row, share in zip(story.incidents, waste.incidents, strict=True)
    ]
    heads = ("kind", "node", "outage>", "lost steps>", "resumed from", "outage USD>", "redone USD>")
    return _table(heads, cells) if cells else '<p class="muted">None: no node was lost.</p>'


def _render_attempts(story: Story) -> str:
    cells: list[Sequence[str]] = [
        (
            str(row["attempt"]),
            str(row["world_size"]),
            escape(row["start_utc"][:19].replace("T", " ")),
            f"{_count(row['first_step'])} \u2013 {_count(row['last_step'])}",
            escape(str(row["resumed_from"] or "-")),
            _count(row["lost_steps"]),
            _duration(row["outage_s"]),
            escape(row["end"]),
            escape(row["reason"]),
        )
        for row in story.attempts
    ]
    heads = (
        *("#", "ranks>", "start (UTC)", "steps", "resumed from"),
        *("lost steps>", "outage>", "end", "reason*"),
    )
    return _table(heads, cells) if cells else '<p class="muted">None has ended yet.</p>'


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of ready HTML cells; a head that ends in > holds numbers, one that ends in * long text."""
    classes = [{">": ' class="number"', "*": ' class="wide"'}.get(head[-1], "") for head in heads]
    head = "".join(f"<th{c}>{name.rstrip('>*')}</th>" for c, name in zip(classes, heads, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{c}>{cell}</td>" for c, cell in zip(classes, row, strict=True)) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _get_used_states(story: Story) -> list[Phase]:
    return [state for state in STATES if story.totals.gpu_ms.get(state)]


def _swatch(state: str) -> str:
    return f'<i style="background:var(--{state})"></i>'


def _or_dash(show: Callable[[float], str]) -> Callable[[float | None], str]:
    return lambda value: "-" if value is None else show(value)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


_count = _or_dash(lambda value: f"{value:,.0f}")
_usd = _or_dash(lambda value: f"${value:,.2f}" if value >= 1 or value == 0 else f"${value:.3g}")


@_or_dash
def _compact(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g}"


@_or_dash
def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{minutes / 60:,.0f} h" if minutes >= 60_000 else f"{minutes // 60} h {minutes % 60:02d} min"
