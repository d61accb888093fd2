from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

from distill.models.plan import KeptUnits, LayerPlan
from distill.release import charts
from distill.release.evidence import Evidence
from distill.release.report import held_out_figure, loss_figure, points, render_report
from distill.release.wording import format_metric


class Page(HTMLParser):
    """Tags, attributes and text of a page, as a browser would see them."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def pictures(html: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]


@pytest.fixture(params=["evidence", "bare", "hostile"])
def any_evidence(request: pytest.FixtureRequest) -> Evidence:
    found: Evidence = request.getfixturevalue(request.param)
    return found


def test_page_fetches_and_runs_nothing(any_evidence: Evidence) -> None:
    page = Page(render_report(any_evidence))
    assert not {"script", "link", "img", "iframe", "object", "embed", "a", "form", "base", "use"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in {"src", "href", "style"}]
    assert not [value for _, value in page.attributes if "://" in value or value.startswith("//")]
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in page.attributes


def test_style_has_no_reference(evidence: Evidence) -> None:
    style = re.search(r"<style>(.*?)</style>", render_report(evidence), re.DOTALL)
    assert style is not None
    assert not re.search(r"url\(|@import|http", style.group(1))


def test_every_picture_is_xml_and_is_described(any_evidence: Evidence) -> None:
    found = pictures(render_report(any_evidence))
    assert found
    for picture in found:
        named = picture.get("role") == "img" and picture.findtext("title") and picture.findtext("desc")
        assert named or picture.get("aria-hidden") == "true"


def test_hostile_text_is_shown_and_not_obeyed(hostile: Evidence) -> None:
    html = render_report(hostile)
    assert "<script" not in html
    assert "<script>alert(1)</script>" in Page(html).text


def test_page_of_a_full_run_shows_all_figures(evidence: Evidence) -> None:
    text = Page(render_report(evidence)).text
    for arm in evidence.evaluation["arms"]:
        for name, value in arm["metrics"].items():
            assert format_metric(name, value) in text
    for figure in ("15.6 M", "22.7 M", "2.47x", "97.3 %", "logits.forward_kl", "c0ffee12", "distill run recipe.yaml"):
        assert figure in text
    assert evidence.recipe_text.strip() in text


def test_no_path_of_this_machine_is_shown(evidence: Evidence) -> None:
    assert "/home" not in render_report(evidence)


def test_page_of_a_bare_run_says_so(bare: Evidence) -> None:
    text = Page(render_report(bare)).text
    assert "No training record was kept." in text
    assert "Size and speed" not in text
    assert "nothing is known about its quality" in text


def test_one_record_is_enough_for_a_picture(evidence: Evidence) -> None:
    record = {"event": "train", "step": 1, "lr": 1e-4, "loss": 2.0, "terms": None}
    one = replace(evidence, records={"distilled": [record]})
    assert "circle" in loss_figure(one).picture
    assert not held_out_figure(one).picture
    assert render_report(one)


def test_control_and_references_are_in_the_held_out_picture(evidence: Evidence) -> None:
    names = {"distilled", "labels_only", "teacher", "cut"}
    for drawn, expected in (
        (held_out_figure(evidence), names),
        (
            held_out_figure(replace(evidence, records={"distilled": evidence.records["distilled"]})),
            names - {"labels_only"},
        ),
    ):
        shown = {text.text for text in ElementTree.fromstring(drawn.picture).iter("text")}
        assert shown & names == expected


def test_a_wide_range_of_losses_is_drawn_on_a_logarithmic_scale(evidence: Evidence) -> None:
    assert "logarithmic" in loss_figure(evidence).caption
    flat = [record | {"terms": {}} for record in evidence.records["distilled"]]
    assert "logarithmic" not in loss_figure(replace(evidence, records={"distilled": flat})).caption


def test_a_logarithmic_scale_is_named_with_what_has_no_place_on_it(evidence: Evidence) -> None:
    values = {50: 0.0, 100: 0.01, 150: 0.9}
    records = [{"event": "evaluate", "step": step, "metrics": {"accuracy": own}} for step, own in values.items()]
    drawn = held_out_figure(replace(evidence, records={"distilled": records}))
    assert drawn.caption.endswith("are horizontal lines, logarithmic scale, without values of 0 or less.")
    assert held_out_figure(evidence).caption.endswith("are horizontal lines.")


def test_the_last_record_of_a_step_counts() -> None:
    steps = [(10, 5.0), (20, 4.0), (10, 3.0), (None, 1.0), (30, None), (40, math.nan)]
    records: list[dict[str, Any]] = [{"event": "train", "step": step, "loss": loss} for step, loss in steps]
    assert points(records, "train", "loss") == [(10, 3.0), (20, 4.0)]


def test_long_runs_make_small_pages(evidence: Evidence) -> None:
    records = [{"event": "train", "step": step, "lr": 1e-4, "loss": 1 / step} for step in range(1, 50_001)]
    assert len(render_report(replace(evidence, records={"distilled": records}))) < 80_000


def test_deep_teachers_fit(evidence: Evidence) -> None:
    widths = {i: 128 * (1 + i % 8) for i in range(0, 120, 2)}
    kept = {i: KeptUnits(of=1024, units=list(range(width))) for i, width in widths.items()}
    layers = [LayerPlan(teacher_layer=i, kept={"mlp": units}) for i, units in kept.items()]
    plan = evidence.plan.model_copy(update={"teacher_layers": 120, "layers": layers})
    html = render_report(replace(evidence, plan=plan))
    assert "60 of 120 layers kept" in html
    assert html.count('class="flow distilled"') == 60


@pytest.mark.parametrize("log", [False, True])
def test_values_that_cannot_be_drawn_are_skipped(log: bool) -> None:
    values = [1.0, math.nan, math.inf, -math.inf, 1e300, 200.0, 0.0, -1.0]
    line = charts.Series("loss", list(enumerate(values)), "total")
    mark = charts.Bar("teacher", math.nan, "teacher")
    picture = charts.line_chart([line], title="t", description="d", levels=[mark], log=log)
    assert not re.search(r"\b(nan|inf)\b", picture)
    assert picture.count("<circle") == (2 if log else 4)
    bars = charts.bar_chart([charts.Bar(str(v), v, "cut") for v in values], title="t", description="d", mark=mark)
    assert bars.count("<rect") == 4


def test_a_chart_without_values_is_empty() -> None:
    nothing = charts.Bar("a", math.nan, "cut")
    assert not charts.bar_chart([nothing], title="t", description="d")
    assert not charts.line_chart([charts.Series("a", [], "cut")], title="t", description="d")


def test_a_bar_far_above_the_rest_is_broken() -> None:
    bars = [charts.Bar("teacher", 8.0, "teacher"), charts.Bar("cut", 48_000.0, "cut")]
    assert "break" in charts.bar_chart(bars, title="t", description="d")
    assert "break" not in charts.bar_chart(bars[:1], title="t", description="d")


def test_bars_of_negative_values_stay_inside_the_picture() -> None:
    bars = [charts.Bar("cut", -0.5, "cut"), charts.Bar("distilled", -0.2, "distilled")]
    picture = ElementTree.fromstring(charts.bar_chart(bars, title="t", description="d"))
    boxes = [(float(box.get("x", "")), float(box.get("width", ""))) for box in picture.iter("rect")]
    assert boxes == [(150.0, 320.0), (342.0, 128.0)]  # of a scale from -0.5 to 0 between 150 and 470


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.13, 0.78), (0, 300), (5, 5), (0, 0), (-3.2, 4.1), (1e-9, 1.1e-9), (1e16, 1e16 + 4), (0, 5e-324)],
)
def test_ticks_are_few_and_cover_the_range(low: float, high: float) -> None:
    ticks = charts.nice_ticks(low, high)
    assert ticks[0] <= low <= high <= ticks[-1]
    assert ticks == sorted(set(ticks))
    assert 2 <= len(ticks) <= 9


@pytest.mark.parametrize(("low", "high"), [(1, 1), (0.001, 1000), (0.07, 6.1), (1e-20, 1e20), (3, 400), (1e-3, 0.999)])
def test_logarithmic_ticks_are_few_and_cover_the_range(low: float, high: float) -> None:
    ticks = charts.log_ticks(low, high)
    assert ticks[0] <= low <= high <= ticks[-1]
    assert ticks == sorted(set(ticks))
    assert 2 <= len(ticks) <= 12


def test_labels_keep_their_distance_and_their_order() -> None:
    placed = charts.space_out([100, 101, 20, 299], 15, 26, 260)
    assert placed[2] < placed[0] < placed[1] < placed[3]
    assert min(b - a for a, b in zip(sorted(placed), sorted(placed)[1:], strict=False)) >= 15
    assert min(placed) >= 26 and max(placed) <= 260


def contrast(one: str, other: str) -> float:
    """WCAG 2 contrast ratio of two #rgb or #rrggbb colours."""

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_text_stands_out_in_light_and_in_dark(evidence: Evidence) -> None:
    modes = [
        dict(re.findall(r"--(\w+): (#\w+)", block))
        for block in re.findall(r":root {(.*?)}", render_report(evidence), re.S)
    ]
    assert len(modes) == 2
    for colours in modes:
        for name in colours.keys() - {"page", "card", "tint", "edge"}:
            assert contrast(colours[name], colours["card"]) >= 4.5, name
        for name in ("ink", "muted", "distilled", "careful"):
            assert contrast(colours[name], colours["tint"]) >= 4.5, name
