"""A chart of losses as SVG, for notebooks: no plotting library is needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 14, 32
SMOOTHED = 12  # steps that the bold line averages over


def loss_chart(losses: Sequence[float], evaluations: Sequence[dict[str, Any]]) -> str:
    """Loss over steps (thin: each step, bold: a running mean), and a dot per evaluation."""
    dots = [(e["step"], e["loss"]) for e in evaluations if math.isfinite(e["loss"])]
    values = [*losses, *(y for _, y in dots)] or [0.0]
    low, high = min(values), max(values)
    if high == low:
        low, high = low - 0.5, high + 0.5
    last = max(2, len(losses))

    def at(step: float, value: float) -> str:
        x = LEFT + (step - 1) / (last - 1) * (WIDTH - LEFT - RIGHT)
        y = TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return f"{x:.1f},{y:.1f}"

    means = [sum(losses[max(0, i - SMOOTHED) : i + 1]) / (i + 1 - max(0, i - SMOOTHED)) for i in range(len(losses))]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">',
        '<g font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for i in range(5):
        value = low + (high - low) * i / 4
        height = at(1, value).split(",")[1]
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height}" y2="{height}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{float(height) + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 10}">step 1</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 10}" text-anchor="end">{len(losses)}</text>')
    for series, color, width in ((losses, "#9ecae1", 1), (means, "#08519c", 2)):
        points = " ".join(at(i + 1, value) for i, value in enumerate(series))
        parts.append(f'<polyline fill="none" stroke="{color}" stroke-width="{width}" points="{points}"/>')
    for step, value in dots:
        x, y = at(step, value).split(",")
        parts.append(f'<circle cx="{x}" cy="{y}" r="4" fill="#e6550d"><title>evaluation: {value:.4f}</title></circle>')
    return "\n".join([*parts, "</g></svg>"])
