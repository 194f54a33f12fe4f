"""What `quire top` draws: engines as lines of text that fill a screen of any size, or a page of any length.

Knows neither gRPC calls nor the terminal: `top` hands it what the watches saw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

from quire.cli.batch_view import batch_lines
from quire.cli.engine_watch import EngineWatch, State
from quire.cli.figures import BARS, bar, count, duration, elapsed, fit, percent
from quire.cli.history import Drafts, Quantiles, Speed
from quire.cli.page_view import page_lines

# Below this many columns pages and batch stand one above the other.
_WIDE = 120

# An engine answers between two steps: one that does not is busy with a long one.
_LATE_SECONDS = 2.0

_STATE_STYLES = {
    State.CONNECTING: "yellow",
    State.LOADING: "yellow",
    State.READY: "green",
    State.DRAINING: "yellow",
    State.FAILED: "red",
    State.LOST: "red",
}


@dataclass(frozen=True, slots=True)
class Size:
    """Of what is drawn on, in characters; without `height` there is room for everything."""

    width: int
    height: int | None


def screen(watches: Sequence[EngineWatch], selected: int, size: Size, hint: str) -> Text:
    """One screen: what all engines do, and the one that is `selected` in full. `hint` says which keys there are."""
    lines = [_title(watches, size.width, hint)]
    if not watches:
        lines += [Text(), Text(" nothing is served on this machine any more: waiting for `quire serve`", "yellow")]
    else:
        if len(watches) > 1:
            lines += _overview(watches, selected, size)
        left = None if size.height is None else size.height - len(lines)
        lines += engine_lines(watches[selected], Size(size.width, left))
    return _joined(lines[: size.height], size.width)


def page(watches: Sequence[EngineWatch], width: int) -> Text:
    """Everything of every engine, one below the other."""
    lines = [_title(watches, width, "")]
    for watch in watches:
        lines += [*engine_lines(watch, Size(width, None)), Text()]
    return _joined(lines[:-1], width)


def _joined(lines: Sequence[Text], width: int) -> Text:
    # What is too wide is cut off: a line that wraps pushes another one out of the window.
    for line in lines:
        line.truncate(width, overflow="crop")
    return Text("\n", no_wrap=True, overflow="crop").join(lines)


def engine_lines(watch: EngineWatch, size: Size) -> list[Text]:
    """One engine: speeds and times, its pages, its batch and queue; or why there is nothing to show."""
    lines = [_rule(watch, size.width)]
    if not watch.steps:
        return [*lines, Text(), *_absent(watch, size.width)]
    roomy = size.height is None or size.height >= 28
    lines += _figures(watch, size.width)
    if roomy:
        lines.append(Text())
    left = None if size.height is None else max(0, size.height - len(lines))
    if size.width >= _WIDE and left is not None:
        return lines + _side_by_side(watch, size.width, left)
    pages = page_lines(watch.seen, size.width - 2, 8 if left is None else max(1, (left - 2) // 3))
    lines += [_indent(line) for line in pages]
    if roomy:
        lines.append(Text())
    rows = None if size.height is None else max(0, size.height - len(lines) - 1)
    return lines + [_indent(line) for line in batch_lines(watch.seen, size.width - 2, rows)]


def _side_by_side(watch: EngineWatch, width: int, rows: int) -> list[Text]:
    half = width // 2 - 2
    left = page_lines(watch.seen, half, max(1, rows - 1))
    right = batch_lines(watch.seen, width - half - 5, rows - 1)
    lines = []
    for index in range(min(rows, max(len(left), len(right)))):
        line = fit(left[index] if index < len(left) else Text(), half)
        lines.append(Text.assemble(" ", line, "   ", right[index] if index < len(right) else Text()))
    return lines


def _title(watches: Sequence[EngineWatch], width: int, hint: str) -> Text:
    facts = [text for watch in watches for text in (watch.seen.status.model, watch.url) if text]
    right = Text(hint, "dim")
    left = Text.assemble((" quire top ", "bold reverse"), "  ", "  ".join(dict.fromkeys(facts)))
    return Text.assemble(fit(left, width - len(right) - 2), "  ", right)


def _rule(watch: EngineWatch, width: int) -> Text:
    status = watch.seen.status
    parts = [(watch.name, "bold"), (watch.state.value, _STATE_STYLES[watch.state])]
    if status.device:
        parts.append((f"{status.device} {status.dtype}", ""))
    if watch.steps and watch.seconds_unanswered > _LATE_SECONDS:
        parts.append((f"in a step for {elapsed(watch.seconds_unanswered)}", "yellow"))
    line = Text.assemble(("─", "dim"))
    for text, style in parts:
        line.append_text(Text.assemble(" ", (text, style), " ", ("─", "dim")))
    line.truncate(width, overflow="ellipsis")
    return line.append_text(Text("─" * (width - len(line)), "dim"))


def _absent(watch: EngineWatch, width: int) -> list[Text]:
    status = watch.seen.status
    since = elapsed(watch.seconds_in_state)
    match watch.state:
        case State.LOADING:
            cells = max(10, min(40, width - 40))
            done = bar(status.progress, cells)
            return [Text.assemble(" ", done, f" {percent(status.progress)}  ", status.activity)]
        case State.FAILED:
            return [Text.assemble(" it failed: ", (status.failure, "red"))]
        case State.LOST:
            what = f" lost {since} ago ({watch.problem}): it is shown again when it is back"
        case _ if watch.problem:
            what = f" {watch.problem} at {watch.address}, for {since}"
        case _:
            what = f" connecting to {watch.address}"
    return [Text(what, "yellow")]


def _figures(watch: EngineWatch, width: int) -> list[Text]:
    """Speeds, batch and queue on the left; times on the right."""
    load, window = watch.seen.status.load, watch.history.window()
    half = width // 2 - 1
    speeds = watch.history.speeds
    over = "since the start" if window.seconds is None else f"last {elapsed(window.seconds)}"
    slots = watch.seen.status.max_num_seqs
    per_step = "" if window.tokens_per_step is None else f"{window.tokens_per_step:,.1f}"
    hits = "–" if window.hit_rate is None else percent(window.hit_rate)
    left = [
        _speed("prefill", [speed.prefill for speed in speeds], half, "yellow"),
        _speed("decode", [speed.decode for speed in speeds], half, "green"),
        Text.assemble(
            _label("batch", 9), f"{f'{load.running} of {slots}':>12} ", bar(load.running / max(1, slots), half - 23)
        ),
        Text.assemble(
            _label("queue", 9), (f"{count(load.waiting):>12}", "yellow" if load.waiting else ""),
            (_queued(load.pending_prefill_tokens), "dim"),
        ),
        Text.assemble(_label("hit rate", 9), f"{hits:>12}", (" of prompt tokens", "dim")),
    ]  # fmt: skip
    right = [
        Text.assemble(_label(over, 20), (f"{'p50':>9}{'p99':>9}", "dim")),
        _times("time to first token", window.first_token),
        _times("inter-token time", window.inter_token),
        _times("step", window.step, f"  {per_step} tokens" if per_step and half >= 52 else ""),
        Text.assemble(
            _label("preemptions", 20),
            (f"{count(watch.history.preemptions):>9}", "red" if watch.history.preemptions else ""),
        ),
    ]
    if window.drafts is not None:
        left.append(_drafts(window.drafts, half))
        right.append(Text.assemble(_label("tokens drawn a step", 20), f"{window.drafts.drawn_per_step:>9.2f}"))
    return [Text.assemble(fit(one, half), "  ", other) for one, other in zip(left, right, strict=True)]


def _drafts(drafts: Drafts, width: int) -> Text:
    """The share of drafts that were right, of all and by their place in a step's drafts."""
    names = "+".join(drafts.drafters)
    places = "".join(BARS[min(7, int(share * 8))] for share in drafts.accepted_at)[: max(0, width - 40 - len(names))]
    note = (f" of drafts right ({names}) ", "dim")
    return Text.assemble(_label("drafts", 9), f"{percent(drafts.accepted):>12}", note, (places, "green"))


def _speed(label: str, values: Sequence[float], width: int, style: str) -> Text:
    now = count(values[-1]) if values else "–"
    spark = sparkline(values, width - 23)
    return Text.assemble(_label(label, 9), f"{now:>6} ", ("tok/s ", "dim"), (spark, style))


def _times(label: str, quantiles: Quantiles | None, note: str = "") -> Text:
    p50, p99 = ("–", "–") if quantiles is None else (duration(quantiles.p50), duration(quantiles.p99))
    return Text.assemble(_label(label, 20), f"{p50:>9}{p99:>9}", (note, "dim"))


def _queued(pending: int) -> str:
    return f" {count(pending)} to prefill" if pending else ""


def _label(text: str, width: int) -> Text:
    return Text(f" {text:<{width}}"[: width + 1], "dim")


def sparkline(values: Sequence[float], width: int) -> str:
    """The last `width` values, each against the largest of them."""
    shown = list(values)[-max(0, width) :] if width > 0 else []
    top = max(shown, default=0.0)
    # Nothing at all and next to nothing must not look alike.
    return "".join(" " if value <= 0 else BARS[min(7, int(value / top * 8))] for value in shown)


def _overview(watches: Sequence[EngineWatch], selected: int, size: Size) -> list[Text]:
    """A line for each engine, or for those around the selected one if there are too many."""
    rows = len(watches) if size.height is None else max(1, min(len(watches), size.height // 3))
    first = max(0, min(selected - rows // 2, len(watches) - rows))
    head = f"   {'engine':<16}{'prefill/s':>10}{'decode/s':>10}{'batch':>7}{'queue':>7}{'hits':>6}  pages"
    lines = [Text(head, "dim")]
    for index in range(first, first + rows):
        marker = ("▸ ", "bold") if index == selected else "  "
        lines.append(Text.assemble(" ", marker, _overview_row(watches[index], size.width - 3)))
    return lines


def _overview_row(watch: EngineWatch, width: int) -> Text:
    name = fit(Text(watch.name, _STATE_STYLES[watch.state]), 15)
    if not watch.steps:
        return fit(Text.assemble(name, " ", *_absent(watch, width - 16)), width)
    speed = (watch.history.speeds or [Speed(0.0, 0.0)])[-1]
    load, window = watch.seen.status.load, watch.history.window()
    hits = "–" if window.hit_rate is None else percent(window.hit_rate)
    numbers = f"{count(speed.prefill):>10}{count(speed.decode):>10}{load.running:>7}{count(load.waiting):>7}{hits:>6}  "
    used = (load.pages_total - load.pages_available) / max(1, load.pages_total)
    return Text.assemble(name, " ", numbers, bar(used, max(0, width - 16 - len(numbers) - 6)), f" {percent(used):>4}")


def _indent(line: Text) -> Text:
    return Text.assemble(" ", line)
