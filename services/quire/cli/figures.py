"""Numbers as a person reads them in a column: short, with a unit."""

from __future__ import annotations

from rich.text import Text

BARS = "▁▂▃▄▅▆▇█"

_EIGHTHS = " ▏▎▍▌▋▊▉"


def count(value: float) -> str:
    """At most six characters: 7, 1,234, 56.7k, 8.9M."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if value >= scale:
            scaled = value / (1e3 if unit == "k" else scale)
            return f"{scaled:.1f}{unit}" if scaled < 1000 else f"{scaled:.0f}{unit}"
    return f"{value:,.0f}"


def percent(share: float) -> str:
    """A share of 1."""
    return f"{share:.0%}"


def duration(seconds: float) -> str:
    """A time that was measured: 0.4 ms, 23 ms, 1.2 s, 45 s, 2:05, 1:02:03."""
    if seconds < 0.00995:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    return elapsed(seconds)


def elapsed(seconds: float) -> str:
    """How long ago something was: 0.3 s, 45 s, 2:05, 1:02:03."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def bar(share: float, width: int) -> Text:
    """A bar of `width` characters that is filled to `share`."""
    eighths = round(min(1.0, max(0.0, share)) * max(0, width) * 8)
    full, part = divmod(eighths, 8)
    filled = "█" * full + (_EIGHTHS[part] if part else "")
    return Text.assemble((filled, "green"), ("─" * (max(0, width) - len(filled)), "dim"))


def fit(text: Text, width: int) -> Text:
    """`text` in exactly `width` characters."""
    copy = text.copy()
    copy.truncate(max(0, width), overflow="ellipsis", pad=True)
    return copy
