"""A line chart with a logarithmic axis as an SVG file that can be read on light and on dark pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 76, 170, 64, 62
LABEL_GAP = 16
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #24292f } .title { font-size: 16px; font-weight: 600 }
.note { fill: #57606a } .grid { stroke: #d0d7de } .axis { stroke: #57606a }
.a { stroke: #0969da; fill: #0969da } .b { stroke: #bc4c00; fill: #bc4c00 }
polyline.a, polyline.b { fill: none; stroke-width: 2.5 } text.a, text.b { stroke: none }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .note { fill: #9198a1 } .grid { stroke: #30363d } .axis { stroke: #9198a1 }
  .a { stroke: #58a6ff; fill: #58a6ff } .b { stroke: #f0883e; fill: #f0883e }
}
"""


@dataclass(frozen=True, slots=True)
class Line:
    label: str
    values: Sequence[float]
    hue: str
    """`a` or `b`."""
    dashed: bool = False


def log_chart(
    lines: Sequence[Line], x_values: Sequence[object], *, title: str, note: str, x_label: str, y_label: str,
) -> str:
    """One point per entry of `x_values` and line, all above zero; each line's label stands at its end."""
    values = [value for line in lines for value in line.values]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def x(place: int) -> float:
        return LEFT + (place + 0.5) * (right - LEFT) / len(x_values)

    def y(value: float) -> float:
        return bottom - (math.log10(value) - low) / max(1, high - low) * (bottom - TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">', f"<style>{STYLE}</style>",
        _text(LEFT, 26, title, "title"), _text(LEFT, 46, note, "note")]
    for power in range(low, high + 1):
        height = y(10.0**power)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{height:.1f}" y2="{height:.1f}"/>')
        parts.append(_text(LEFT - 8, height + 4, f"{10.0**power:g}", anchor="end"))
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts += [_text(x(place), bottom + 20, str(value), anchor="middle") for place, value in enumerate(x_values)]
    parts.append(_text((LEFT + right) / 2, HEIGHT - 16, x_label, anchor="middle"))
    middle = (TOP + bottom) / 2
    parts.append(f'<text x="22" y="{middle:.1f}" text-anchor="middle" transform="rotate(-90 22 {middle:.1f})">'
                 f"{escape(y_label)}</text>")
    free_from = -math.inf
    for line in sorted(lines, key=lambda line: y(line.values[-1])):
        points = [(x(place), y(value)) for place, value in enumerate(line.values)]
        dash = ' stroke-dasharray="6 4"' if line.dashed else ""
        parts.append(f'<polyline class="{line.hue}"{dash} points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in points)}"/>')
        parts += [f'<circle class="{line.hue}" cx="{a:.1f}" cy="{b:.1f}" r="3.5"/>' for a, b in points]
        label_y = max(points[-1][1] + 4, free_from)
        free_from = label_y + LABEL_GAP
        parts.append(_text(points[-1][0] + 12, label_y, line.label, line.hue))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, name: str = "", anchor: str = "start") -> str:
    return f'<text class="{name}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
