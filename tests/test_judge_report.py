"""The page for every kind of verdict: complete, self-contained, and safe whatever a camera is called."""
import re
from dataclasses import replace
from datetime import date
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest

from deerml.core.clock import parse_time
from deerml.judge.compare import Contestant
from deerml.judge.evidence import Evidence, Thresholds, practice_evidence, practice_predictions
from deerml.judge.gate import GateContext, GateSettings, judge
from deerml.judge.report import Side, curve_of, draw_frame, exhibits_of, report_html, write_report

FAST = GateSettings(draws=100)
AT = parse_time("2026-10-31T09:00:00Z")
GREY = cv2.imencode(".jpg", np.full((360, 640, 3), 90, np.uint8))[1].tobytes()


class Page(HTMLParser):
    "Collects tags, checks that they close, and keeps the text"

    def __init__(self, html: str):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(html)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "line", "path", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text.append(data)


def case(visits=60, camera="east", **context):
    yard = practice_evidence(visits=visits, cameras=(camera, "west"), nights=80)
    models = [Contestant(practice_predictions(yard, skill, 0.05, seed), Thresholds({"deer": 0.5})) for skill, seed in ((0.5, 1), (2.5, 2))]
    return yard, *models, GateContext(**context)


def page_of(yard, champion, challenger, context, read=lambda frame_id: GREY):
    verdict = judge(yard, champion, challenger, FAST, context)
    shown = exhibits_of(yard, champion, challenger, read, each=2) if champion else []
    side = Side("v7", curve_of(yard, champion)) if champion else None
    return verdict, report_html(verdict, Side("v8", curve_of(yard, challenger), "Trained on v0008."), side, shown, made_at=AT)


@pytest.mark.parametrize("kind", ["promote", "reject", "not_enough_evidence", "first", "unknown"])
def test_every_verdict_has_a_page(kind):
    yard, champion, challenger, context = case(26 if kind == "not_enough_evidence" else 150, champion_nights_known=False, visits_per_day=1.0, today=date(2026, 10, 31))
    if kind == "reject":
        champion, challenger = challenger, champion
    if kind == "unknown":
        yard = replace(yard, frames=tuple(replace(frame, role="volunteered", p=None) for frame in yard.frames))
    verdict, html = page_of(yard, None if kind == "first" else champion, challenger, context)
    page = Page(html)
    text = " ".join("".join(page.text).split())
    assert verdict.verdict == ("not_enough_evidence" if kind == "unknown" else kind)
    sentence = verdict.summary.partition(": ")[2]
    assert sentence[1:] in text and all(reason in text for reason in (*verdict.reasons, *verdict.warnings))
    if kind == "not_enough_evidence":
        assert "26 of 40 visits" in text and "14 November 2026" in text
    if kind == "unknown":
        assert "selection unknown" in text and "a camera and night" not in text.split("How to read")[0].split("Champion and challenger")[1].split("Why this verdict")[0]


def test_the_page_asks_for_nothing():
    _, html = page_of(*case(60))
    page = Page(html)
    sources = [attributes.get("src") or attributes.get("href") for _, attributes in page.tags]
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources if source)
    assert not any(tag in ("script", "link", "iframe", "object") for tag, _ in page.tags)
    assert not re.search(r"https?://|@import|url\(", html)
    assert "default-src 'none'" in html


def test_without_exhibits_no_photograph_leaves():
    yard, champion, challenger, context = case(60)
    html = report_html(judge(yard, champion, challenger, FAST, context), Side("v8"), Side("v7"))
    assert "data:image" not in html and "<img" not in html


def test_names_cannot_become_markup():
    yard, champion, challenger, context = case(60, camera="<script>alert(1)</script>")
    verdict = judge(yard, champion, challenger, FAST, context)
    html = report_html(verdict, Side('"><b>v8', curve_of(yard, challenger)), Side("<i>v7", curve_of(yard, champion)), exhibits_of(yard, champion, challenger, lambda i: GREY))
    assert "<script" not in html and "<b>v8" not in html and "<i>v7" not in html
    Page(html)


def test_an_expired_picture_is_passed_over():
    yard, champion, challenger, _ = case(60)
    assert exhibits_of(yard, champion, challenger, lambda frame_id: None) == []
    only = exhibits_of(yard, champion, challenger, lambda frame_id: GREY if frame_id % 2 else None, each=100)
    assert only and all(one.difference.frame_id % 2 for one in only)


@pytest.mark.parametrize("champion_there", [True, False])
def test_a_page_about_nothing(champion_there):
    nothing, blank = Evidence((), (), {}, ("deer",)), Contestant({}, Thresholds({"deer": 0.5}))
    verdict = judge(nothing, blank if champion_there else None, blank, FAST)
    Page(report_html(verdict, Side("v8"), Side("v7") if champion_there else None))


def test_the_same_verdict_gives_the_same_bytes(tmp_path):
    first, second = (page_of(*case(60))[1] for _ in range(2))
    assert first == second
    yard, champion, challenger, context = case(60)
    path = write_report(tmp_path / "report.html", judge(yard, champion, challenger, FAST, context), Side("v8"), Side("v7"), made_at=AT)
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize("size", [(64, 48), (640, 360), (3840, 2160)])
def test_frames_of_any_size(size):
    picture = cv2.imencode(".png", np.zeros((size[1], size[0], 3), np.uint8))[1].tobytes()
    drawn = cv2.imdecode(np.frombuffer(draw_frame(picture, [], []), np.uint8), cv2.IMREAD_COLOR)
    assert drawn.shape[1] == min(640, 2 * size[0])
