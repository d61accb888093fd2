"""Report and comparison in a real browser: nothing cut off, charts there, no message on the console."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import CHROMIUM, DRIVER, browser

from distill.pipeline.compare import Run, render_comparison
from distill.release.figures import Figures
from distill.release.report import render_report

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("browser")) as started:
        yield started


def comparison():
    def run(place, name):
        size = 10.0**place
        models = {"student": {"parameters": size, "flops_per_example": size, "latency_ms": {"p50": size}}}
        evaluation = {
            "primary": "accuracy",
            "higher_is_better": {"accuracy": True},
            "data": {"measured_on": "rows", "source": "rows", "examples": 50, "fingerprint": "0"},
            "arms": [{"name": "distilled", "metrics": {"accuracy": 0.5 + place / 10}, "retained": {"accuracy": 0.9}}],
            "efficiency": {"models": models},
        }
        return Run(name, Figures(evaluation), {"training.lr": place})

    names = ["a", "a-run-with-a-rather-long-name-that-somebody-chose", "third"]
    return render_comparison([run(place, name) for place, name in enumerate(names)])


@pytest.fixture(params=["evidence", "bare", "hostile", "comparison"])
def page(request, tmp_path) -> Path:
    html = comparison() if request.param == "comparison" else render_report(request.getfixturevalue(request.param))
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    return tmp_path / "page.html"


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_a_page_is_whole_at_both_widths_in_light_and_dark(chromium, page, width, dark):
    found = chromium.show(page, width, dark=dark)
    assert found["console"] == []
    assert found["page"] <= found["wide"] == width, found
    assert found["cut"] == []
    assert found["charts"] and all(wide > 200 and high > 30 for wide, high in found["charts"])
    light = sum(map(int, found["paper"].strip("rgb()").split(","))) > 3 * 128
    assert light is not dark
