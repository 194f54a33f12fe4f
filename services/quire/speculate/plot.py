"""Acceptance by position in the chain, as a picture: SVG, so that nothing is needed to draw it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT, _MARGIN = 640, 360, 48
_COLORS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626")


def acceptance_svg(title: str, rates: Mapping[str, Sequence[float]]) -> str:
    """Bars of `rates`, shares of 1, one group for each position and in it one bar for each name."""
    positions = max(map(len, rates.values()))
    group = (_WIDTH - 2 * _MARGIN) / positions
    bar = group * 0.8 / len(rates)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>'
        f'<text x="{_MARGIN}" y="20" font-size="14">{escape(title)}</text>'
    ]
    for percent in range(0, 101, 25):
        y = _y(percent / 100)
        parts.append(f'<path d="M{_MARGIN} {y:.1f}H{_WIDTH - _MARGIN}" stroke="#ddd"/>')
        parts.append(f'<text x="{_MARGIN - 6}" y="{y + 4:.1f}" text-anchor="end">{percent}%</text>')
    for index, (name, shares) in enumerate(rates.items()):
        color = _COLORS[index % len(_COLORS)]
        for position, share in enumerate(shares):
            x, y = _MARGIN + position * group + group * 0.1 + index * bar, _y(share)
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{bar:.1f}" height="{_y(0) - y:.1f}" fill="{color}">'
                f"<title>{escape(name)}, draft {position + 1}: {share:.1%}</title></rect>"
            )
        parts.append(f'<rect x="{_MARGIN + index * 110}" y="28" width="10" height="10" fill="{color}"/>')
        parts.append(f'<text x="{_MARGIN + 14 + index * 110}" y="37">{escape(name)}</text>')
    for position in range(positions):
        x = _MARGIN + (position + 0.5) * group
        parts.append(f'<text x="{x:.1f}" y="{_y(0) + 18:.1f}" text-anchor="middle">draft {position + 1}</text>')
    return "".join(parts) + "</svg>\n"


def _y(share: float) -> float:
    return _HEIGHT - _MARGIN - share * (_HEIGHT - 2 * _MARGIN)
