"""Draw inline SVG from numbers. Pure functions; text is escaped, and colours are classes of the page's stylesheet.

A shape with `class="line teacher"` takes its colour from `.teacher { color: … }`, so one rule serves light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from distill.models.plan import LayerPlan
from distill.release.wording import as_number, format_number, one_line

Point = tuple[float, float]
WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 58, WIDTH - 132, 26, HEIGHT - 40
"""Edges of what is drawn between axes; beside and below it stand words."""
BESIDE = 16
"""Letters of a name that fit beside a chart."""
MOST_POINTS = 240
BROKEN = 8
"""A bar that is longer than the next by more than this factor is drawn broken."""
BAR = 220
"""Pixels of the widest MLP in the picture of the architecture."""


@dataclass(frozen=True)
class Series:
    """One line of a line chart."""

    name: str
    points: Sequence[Point]
    style: str


@dataclass(frozen=True)
class Bar:
    """One value: a bar, or a horizontal reference in a line chart."""

    name: str
    value: float
    style: str


@dataclass(frozen=True)
class Dot:
    """One named point of a scatter chart."""

    name: str
    x: float
    y: float
    style: str
    solid: bool = True


@dataclass(frozen=True)
class Scale:
    """Maps [low, high] to [start, end] in pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Return the pixel of a value."""
        bend = math.log10 if self.log else float
        low, high = bend(self.low), bend(self.high)
        return self.start + (self.end - self.start) * (bend(value) - low) / (high - low)


def tag(name: str, *children: str, **attributes: object) -> Markup:
    """Write one element. Attribute `class_` is written `class`, and `aria_label` `aria-label`."""
    pairs = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items())
    written = ((key, f"{value:.1f}" if isinstance(value, float) else one_line(value)) for key, value in pairs)
    inside = Markup("").join(child if isinstance(child, Markup) else one_line(child) for child in children)
    return Markup("<{0}{1}>{2}</{0}>").format(
        name, Markup("").join(Markup(' {}="{}"').format(*p) for p in written), inside
    )


def drawing(width: float, height: float, title: str, description: str, *children: str) -> Markup:
    """Write a picture with a name and a description for those who cannot see it."""
    head = (tag("title", title), tag("desc", description))
    return tag("svg", *head, *children, viewBox=f"0 0 {width:.0f} {height:.0f}", role="img", aria_label=title)


def text(x: float, y: float, content: str, style: str = "note", anchor: str = "start", most: int = 28) -> Markup:
    """Write a label of at most so many letters; the whole of it shows when the pointer rests on it."""
    short = one_line(content)
    whole = [tag("title", short)] if len(short) > most else []
    cut = short[: most - 1] + "…" if whole else short
    return tag("text", *whole, cut, x=x, y=y, class_=style, text_anchor=anchor)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Choose round values that cover [low, high], in steps of 1, 2, 2.5 or 5 times a power of ten.

    >>> nice_ticks(0.13, 0.78)
    [0.0, 0.2, 0.4, 0.6, 0.8]
    """
    if high - low <= max(abs(low), abs(high), 1e-30) * 1e-9:
        margin = max(abs(low), 1e-30) / 2 if low else 0.5
        low, high = low - margin, high + margin
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Choose up to nine powers of ten that cover [low, high].

    >>> log_ticks(0.3, 7)
    [0.1, 1.0, 10.0]
    """
    first, last = math.floor(math.log10(low)), math.floor(math.log10(high)) + 1
    stride = math.ceil((last - first) / 8)
    return [10.0**power for power in range(first, last + stride, stride)]


def space_out(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Place near the wanted positions, in the same order and at least `gap` apart, inside [low, high] if they fit."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    placed = list(wanted)
    floor = low
    for index in order:
        placed[index] = floor = max(placed[index], floor)
        floor += gap
    ceiling = high
    for index in reversed(order):
        placed[index] = ceiling = min(placed[index], ceiling)
        ceiling -= gap
    return placed


def drawable(value: float, log: bool = False) -> bool:
    """Tell whether a value has a place on a scale."""
    return as_number(value) is not None and (value > 0 or not log)


def clean(points: Iterable[Point], log: bool) -> list[Point]:
    """Keep the points that can be drawn; long lines become means of equal stretches, so that a page stays small."""
    known = [(x, y) for x, y in points if drawable(x) and drawable(y, log)]
    size = math.ceil(len(known) / MOST_POINTS)
    parts = [known[start : start + size] for start in range(0, len(known), size)] if size > 1 else [[p] for p in known]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    description: str,
    levels: Sequence[Bar] = (),
    log: bool = False,
    write: Callable[[float], str] = format_number,
) -> Markup:
    """Draw values over steps, named at their right ends; empty when there is no point to draw."""
    drawn = [line for line in (replace(line, points=clean(line.points, log)) for line in series) if line.points]
    marks = [mark for mark in levels if drawable(mark.value, log)]
    if not drawn:
        return Markup("")
    values = [y for line in drawn for _, y in line.points] + [mark.value for mark in marks]
    rows = log_ticks(min(values), max(values)) if log else nice_ticks(min(values), max(values))
    last = max(x for line in drawn for x, _ in line.points) or 1.0
    x = Scale(0, last, LEFT, RIGHT)
    y = Scale(rows[0], rows[-1], BOTTOM, TOP, log)
    columns = [step for step in nice_ticks(0, last) if step <= last]
    ends = [Dot(mark.name, RIGHT, y.at(mark.value), mark.style) for mark in marks]
    ends += [Dot(line.name, RIGHT, y.at(line.points[-1][1]), line.style) for line in drawn]
    shapes = _axes({x.at(v): format_number(v) for v in columns}, "step", {y.at(v): write(v) for v in rows})
    shapes += [_across(y.at(mark.value), f"level {mark.style}") for mark in marks]
    shapes += [shape for line in drawn for shape in _line(line, x, y)]
    return drawing(WIDTH, HEIGHT, title, description, *shapes, *_names_beside(ends))


def _axes(columns: Mapping[float, str], across: str, rows: Mapping[float, str]) -> list[Markup]:
    """Draw a grid with the words at its lines, by their pixels, and the name of the horizontal axis."""
    shapes = [_across(height, "grid") for height in rows]
    shapes += [text(LEFT - 8, height + 4, words, anchor="end") for height, words in rows.items()]
    shapes += [text(left, BOTTOM + 20, words, anchor="middle") for left, words in columns.items()]
    return [*shapes, text((LEFT + RIGHT) / 2, HEIGHT - 4, across, anchor="middle")]


def _across(height: float, style: str) -> Markup:
    return tag("line", x1=LEFT, x2=RIGHT, y1=height, y2=height, class_=style)


def _line(line: Series, x: Scale, y: Scale) -> list[Markup]:
    """Draw the line, a dot on each point while they are few, and one at the end."""
    pixels = [(x.at(step), y.at(value)) for step, value in line.points]
    path = "M" + "L".join(f"{left:.1f} {top:.1f}" for left, top in pixels)
    dots = pixels if len(pixels) <= 12 else pixels[-1:]
    drawn = [tag("path", d=path, class_=f"line {line.style}")] if len(pixels) > 1 else []
    return drawn + [tag("circle", cx=left, cy=top, r=3, class_=f"dot {line.style}") for left, top in dots]


def _names_beside(dots: Sequence[Dot]) -> list[Markup]:
    """Write the names of points, in pixels, at the right with a line to each, pushed apart where they would overlap."""
    shapes = []
    for dot, place in zip(dots, space_out([dot.y for dot in dots], 15, TOP, BOTTOM), strict=True):
        path = f"M{dot.x:.1f} {dot.y:.1f}L{RIGHT + 12} {place:.1f}"
        shapes.append(tag("path", d=path, class_=f"leader {dot.style}"))
        shapes.append(text(RIGHT + 16, place + 4, dot.name, f"name {dot.style}", most=BESIDE))
    return shapes


def bar_chart(
    bars: Sequence[Bar],
    *,
    title: str,
    description: str,
    mark: Bar | None = None,
    write: Callable[[float], str] = format_number,
    dots: bool = False,
) -> Markup:
    """Draw horizontal bars, or dots, with their values, and a reference as a line through all; empty without values.

    One value far above the rest is drawn broken, so that the others can still be told apart.
    """
    known = [bar for bar in bars if drawable(bar.value)]
    if not known:
        return Markup("")
    values = sorted(bar.value for bar in known)
    low, high = min(0.0, values[0]), max(0.0, values[-1])
    if len(values) > 1 and high > BROKEN * values[-2] > 0:
        high = 1.6 * values[-2]
    x = Scale(low, high if high > low else 1.0, 150, WIDTH - 90)
    row, height = 36, 36 * len(known) + 8
    shapes = []
    if mark is not None and drawable(mark.value):
        at = x.at(min(mark.value, x.high))
        shapes.append(tag("line", x1=at, x2=at, y1=2, y2=height - 2, class_=f"level {mark.style}"))
    for index, bar in enumerate(known):
        y = 8.0 + row * index
        left, right = sorted((x.at(0), x.at(min(bar.value, x.high))))
        shapes.append(text(140, y + 17, bar.name, f"name {bar.style}", "end", BESIDE))
        box = {"x": left, "y": y, "width": max(right - left, 1.5), "height": 24, "rx": 3}
        spot = {"cx": right, "cy": y + 12, "r": 6}
        kind, place, style = ("circle", spot, "dot") if dots else ("rect", box, "bar")
        shapes.append(tag(kind, class_=f"{style} {bar.style}", **place))
        if bar.value > x.high:
            shapes.append(tag("path", d=f"M{right - 22:.1f} {y + 28:.1f}l8 -32", class_="break"))
        shapes.append(text(right + 8, y + 17, write(bar.value), "value"))
    return drawing(WIDTH, height, title, description, *shapes)


def scatter_chart(
    dots: Sequence[Dot],
    across: str,
    *,
    title: str,
    description: str,
    write_x: Callable[[float], str] = format_number,
    write_y: Callable[[float], str] = format_number,
) -> Markup:
    """Draw named points, solid or hollow; `across` names the horizontal axis. Empty without points."""
    known = [dot for dot in dots if drawable(dot.x) and drawable(dot.y)]
    if not known:
        return Markup("")
    rows = nice_ticks(min(dot.y for dot in known), max(dot.y for dot in known), 4)
    columns = nice_ticks(0, max(dot.x for dot in known), 4)
    x = Scale(columns[0], columns[-1], LEFT, RIGHT)
    y = Scale(rows[0], rows[-1], BOTTOM, TOP)
    shapes = _axes({x.at(v): write_x(v) for v in columns}, across, {y.at(v): write_y(v) for v in rows})
    placed = [replace(dot, x=x.at(dot.x), y=y.at(dot.y)) for dot in known]
    shapes += _names_beside([replace(dot, x=dot.x + 6) for dot in placed])
    shapes += [
        tag("circle", cx=dot.x, cy=dot.y, r=5, class_=f"{'dot' if dot.solid else 'ring'} {dot.style}") for dot in placed
    ]
    return drawing(WIDTH, HEIGHT, title, description, *shapes)


def pair(teacher: float, student: float) -> Markup:
    """Draw two thin bars to the same scale: how much smaller, faster or better. The numbers stand beside it."""
    most = max(teacher, student)
    bars = [
        tag("rect", x=0, y=y, width=max(200 * value / most, 1.0), height=6, rx=3, class_=f"bar {style}")
        for y, value, style in ((0, teacher, "teacher"), (10, student, "distilled"))
        if most > 0 and value >= 0
    ]
    return tag("svg", *bars, viewBox="0 0 200 16", aria_hidden="true", class_="pair")


def architecture(teacher_layers: int, kept: Sequence[LayerPlan], *, title: str, description: str) -> Markup:
    """Draw the teacher's layers on the left, the student's on the right, to one scale, and the origin of each."""
    row = max(9.0, min(34.0, 640 / teacher_layers))
    height, thick = row * teacher_layers + 56, row * 0.68
    widest = max(layer.teacher_width for layer in kept)
    sources = {layer.teacher_layer: layer for layer in kept}
    first = 44 + row * (teacher_layers - len(kept)) / 2
    shapes = [text(300, 20, "Teacher", "head teacher", "end"), text(420, 20, "Student", "head distilled")]
    for index in range(teacher_layers):
        shapes += _teacher_layer(index, sources.get(index), 44 + row * index, thick, widest)
    for index, layer in enumerate(kept):
        start, end = 44 + row * layer.teacher_layer + thick / 2, first + row * index + thick / 2
        bend = f"M306 {start:.1f}C360 {start:.1f} 360 {end:.1f} 414 {end:.1f}"
        shapes.append(tag("path", d=bend, class_="flow distilled"))
        length = BAR * layer.width / widest
        top = first + row * index
        shapes.append(tag("rect", x=420, y=top, width=length, height=thick, rx=3, class_="bar distilled"))
        if thick >= 9:
            shapes.append(text(428 + length, top + thick / 2 + 4, f"{index} · {layer.width}", "note"))
    return drawing(510 + BAR * max(layer.width for layer in kept) / widest, height, title, description, *shapes)


def _teacher_layer(index: int, kept: LayerPlan | None, top: float, thick: float, widest: int) -> list[Markup]:
    """Draw a bar that ends at the middle: coloured the neurons kept, pale those pruned, dashed a dropped layer."""
    # The plan knows no width for dropped layers; they are drawn as wide as the widest and carry no number.
    length = BAR * (kept.teacher_width if kept else widest) / widest
    style = "bar pruned" if kept else "dropped"
    shapes = [tag("rect", x=300 - length, y=top, width=length, height=thick, rx=3, class_=style)]
    if kept:
        inside = BAR * kept.width / widest
        shapes.append(tag("rect", x=300 - inside, y=top, width=inside, height=thick, rx=3, class_="bar distilled"))
    if thick >= 9:
        label = f"{index} · {kept.teacher_width}" if kept else f"{index} · dropped"
        shapes.append(text(292 - length, top + thick / 2 + 4, label, "note", "end"))
    return shapes
