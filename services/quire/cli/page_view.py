"""The KV pages as a map: a character for a page, or for some neighbouring ones if there are more than fit."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from operator import itemgetter

from rich.text import Text

from quire.cli.figures import BARS
from quire.v1 import engine_pb2

# A character and its style.
Cell = tuple[str, str]

_USED, _SHARED, _CACHED, _FREE = "green", "cyan", "blue", "bright_black"


def page_lines(seen: engine_pb2.InspectResponse, width: int, rows: int) -> list[Text]:
    """A line of numbers, and the map in at most `rows` lines of `width` characters."""
    pages = seen.pages
    total = seen.status.load.pages_total
    merged = max(1, -(-len(pages.used) // max(1, width * rows)))
    size = merged * pages.pages_per_cell
    cells = []
    for first in range(0, len(pages.used), merged):
        used, shared, cached = (
            sum(values[first : first + merged]) for values in (pages.used, pages.shared, pages.cached)
        )
        # The last cell may stand for fewer pages than the others.
        cells.append(_cell(used, shared, cached, max(1, min(size, total - first * pages.pages_per_cell))))
    lines = [_line(cells[start : start + width]) for start in range(0, len(cells), width)]
    return [_caption(pages, total, size), *lines]


def _line(cells: Iterable[Cell]) -> Text:
    # Neighbours are alike more often than not, and rich takes its time for each piece.
    pieces = (("".join(mark for mark, _ in run), style) for style, run in groupby(cells, key=itemgetter(1)))
    return Text.assemble(*pieces)


def _caption(pages: engine_pb2.PageMap, total: int, size: int) -> Text:
    used, shared, cached = sum(pages.used), sum(pages.shared), sum(pages.cached)
    each = f", {size} to a mark" if size > 1 else ""
    return Text.assemble(
        (f"{total:,} pages{each}  ", "dim"),
        ("█", _USED), f" {used - shared:,} used  ",
        ("▓", _SHARED), f" {shared:,} shared  ",
        ("░", _CACHED), f" {cached:,} cached  ",
        ("·", _FREE), f" {total - used - cached:,} free",
    )  # fmt: skip


def _cell(used: int, shared: int, cached: int, size: int) -> Cell:
    """Used pages as a bar whose height is their share; cached or free ones only where there are none of those."""
    if used:
        mostly_shared = 2 * shared > used
        level = -(-8 * used // size)
        mark = "▓" if mostly_shared and level == 8 else BARS[level - 1]
        style = _SHARED if mostly_shared else _USED
        return mark, f"{style} on {_CACHED}" if cached and level < 8 else style
    return ("░", _CACHED) if cached else ("·", _FREE)
