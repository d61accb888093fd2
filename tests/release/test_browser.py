"""Report and comparison in a real browser: nothing cut off, charts there, no message on the console."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import CHROMIUM, DRIVER, browser

from distill.pipeline.compare import COSTS, Run, render_comparison
from distill.release.report import render_report

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("browser")) as started:
        yield started


def comparison():
    data = {"measured_on": "rows", "examples": 50, "fingerprint": "0"}
    evaluation = {"primary": "accuracy", "higher_is_better": {"accuracy": True}, "data": data}
    names = ["a", "a-run-with-a-rather-long-name-that-somebody-chose", "third"]
    return render_comparison(
        [
            Run(name, 0.5 + place / 10, dict.fromkeys(COSTS, 10.0**place), 0.9, {"training.lr": place}, evaluation)
            for place, name in enumerate(names)
        ]
    )


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
