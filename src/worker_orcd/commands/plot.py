"""Line charts as SVG, one below the other over the same x values, readable on light and dark ground."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP = 640, 220, 64, 24, 40  # pixels; of one chart
STYLE = """text{font:12px system-ui,sans-serif;fill:#555}.title{font-weight:600;font-size:14px}
.grid{stroke:#8884;stroke-width:1}.line{fill:none;stroke:#1f8f88;stroke-width:2}.dot{fill:#1f8f88}
@media(prefers-color-scheme:dark){text{fill:#bbb}}"""


def draw_charts(title: str, x_label: str, xs: Sequence[int], charts: Sequence[tuple[str, Sequence[float]]]) -> str:
    """An SVG document; `charts` are names and values, one value for each of `xs`, which are spaced evenly."""
    height = TOP + len(charts) * HEIGHT + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
        f'<text class="title" x="{LEFT}" y="22">{escape(title)}</text>',
    ]
    for number, (name, values) in enumerate(charts):
        parts += _chart(TOP + number * HEIGHT, f"{name}, by {x_label}", xs, values)
    return "\n".join([*parts, "</svg>\n"])


def _chart(top: int, name: str, xs: Sequence[int], values: Sequence[float]) -> list[str]:
    high = _round_up(max(values))
    floor, tall = top + HEIGHT - 34, HEIGHT - 70
    at = [LEFT + (WIDTH - LEFT - RIGHT) * (i + 0.5) / len(xs) for i in range(len(xs))]
    level = [floor - tall * value / high for value in values]
    parts = [f'<text x="{LEFT}" y="{top + 18}">{escape(name)}</text>']
    for step in range(5):
        y = floor - tall * step / 4
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{high * step / 4:,.4g}</text>')
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(at, level, strict=True))
    parts.append(f'<polyline class="line" points="{points}"/>')
    for x, y, batch, value in zip(at, level, xs, values, strict=True):
        parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3.5"><title>{value:,.2f}</title></circle>')
        parts.append(f'<text x="{x:.1f}" y="{floor + 18}" text-anchor="middle">{batch}</text>')
    return parts


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 5, 8 or 10 times a power of ten."""
    if value <= 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(value))
    return next(unit * step for step in (1, 2, 4, 5, 8, 10) if unit * step >= value)
