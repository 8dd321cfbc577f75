"""The page for every kind of verdict: complete, self-contained, and safe whatever a camera is called."""
import hashlib
import json
import re
from dataclasses import replace
from datetime import date
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest

from deerml.core.clock import parse_time
from deerml.core.errors import DeermlError
from deerml.data.picture import draw_frame
from deerml.judge.compare import Contestant
from deerml.judge.evidence import Evidence, Thresholds, practice_evidence, practice_predictions, sample_of
from deerml.judge.exhibits import exhibits_of, ranked_differences
from deerml.judge.gate import GateContext, GateSettings, judge, plain
from deerml.judge.report import Side, curve_of, curves_to_keep, published_page, report_html, verdict_of, write_report
from deerml.model.bundle import Thresholds as BundleThresholds
from deerml.model.bundle import seal, spot_draft, spot_model
from deerml.ship.release import publish, refuse_pictures, verify_release

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
    shown = exhibits_of(yard, champion, challenger, read, each=2)
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


def recorded(yard, champion, challenger, context):
    "A judgement as it is written down, after a journey through JSON"
    verdict = judge(yard, champion, challenger, FAST, context)
    curves = curves_to_keep({"champion": curve_of(yard, champion) if champion else None, "challenger": curve_of(yard, challenger)})
    facts = {"made_at": "2026-10-31T09:00:00.000Z", "challenger": "8" * 64, "champion": "7" * 64 if champion else None, "dataset": "v0008", "nights": ["east/2026-10-01"], "curves": curves}
    return verdict, json.loads(json.dumps(verdict.to_dict() | facts))


@pytest.mark.parametrize("kind", ["pair", "few", "first", "unknown"])
def test_the_published_copy_says_the_same_without_a_frame(kind):
    yard, champion, challenger, context = case(26 if kind == "few" else 60, visits_per_day=1.0, today=date(2026, 10, 31))
    if kind == "unknown":
        yard = replace(yard, frames=tuple(replace(frame, role="volunteered", p=None) for frame in yard.frames))
    verdict, record = recorded(yard, None if kind == "first" else champion, challenger, context)
    assert verdict_of(record) == replace(verdict, numbers=plain(verdict.numbers))
    public = published_page(record)
    assert published_page(json.loads(json.dumps(record))) == public
    refuse_pictures(public)
    page = Page(public.decode())
    assert not [tag for tag, _ in page.tags if tag == "img"] and b"data:image" not in public and b"jpeg" not in public
    text = " ".join("".join(page.text).split())
    assert all(reason in text for reason in verdict.reasons) and "8" * 12 in text
    assert len([tag for tag, _ in page.tags if tag == "path"]) == (2 if kind == "first" else 3)


def test_a_record_without_curves_is_a_page_as_well():
    _, record = recorded(*case(60))
    del record["curves"]
    assert b"<path" not in published_page(record)


def test_a_release_carries_the_report(tmp_path):
    (tmp_path / "model.onnx").write_bytes(spot_model(["deer"]))
    (tmp_path / "releases").mkdir()
    bundle = seal(tmp_path / "model.onnx", spot_draft(["deer"]), BundleThresholds(shared={"deer": 0.5}), "drawn", tmp_path / "bundles")
    _, record = recorded(*case(60))
    release = publish(bundle, tmp_path / "releases", verdict="promote", report=published_page(record))
    [named] = [file for file in release.files if file.name == "report.html"]
    content = (release.path / "report.html").read_bytes()
    assert named.sha256 == hashlib.sha256(content).hexdigest() and verify_release(release.path) == release
    with_frames = page_of(*case(60))[1].encode()
    with pytest.raises(DeermlError) as caught:
        publish(bundle, tmp_path / "releases", verdict="first", report=with_frames)
    assert caught.value.code == "HAS_PICTURES"


@pytest.mark.parametrize("rival", [True, False])
def test_the_worst_come_first(rival):
    yard, champion, challenger, _ = case(60)
    ranks = ranked_differences(yard, champion if rival else None, challenger)
    weight = {visit.id: worth for visit, worth in zip(yard.visits, sample_of(yard).visit_weight)}
    for kind in ("missed", "new_false_alarm", "found"):
        of_kind = [(-worth, -score) for one, worth, score in ranks if one.kind == kind]
        assert of_kind == sorted(of_kind) and (of_kind or kind == "missed")
    assert all(worth == pytest.approx(weight[one.subject]) for one, worth, _ in ranks if one.kind in ("missed", "found"))
    shown = exhibits_of(yard, champion if rival else None, challenger, lambda frame_id: GREY, each=3)
    assert [(one.difference, one.weight) for one in shown if one.difference.kind == "found"] == [(one, worth) for one, worth, _ in ranks if one.kind == "found"][:3]


def test_a_first_model_shows_what_it_does():
    yard, _, challenger, context = case(60)
    verdict, html = page_of(yard, None, challenger, context)
    text = " ".join("".join(Page(re.sub("<style>.*?</style>", "", html, flags=re.DOTALL)).text).split())
    assert "Visits missed" in text and "Visits found" in text and "champion" not in text.split("How to read")[0].lower()
    assert f"{verdict.numbers['challenger']['visits_found']}visits found" in "".join(Page(html).text).replace("\n", "")


def test_pictures_are_cut_to_the_animal():
    yard, champion, challenger, _ = case(60)
    shown = exhibits_of(yard, champion, challenger, lambda frame_id: GREY)
    cut = [one for one in shown if one.place]
    assert cut and all(len(one.place) < len(GREY) * 40 for one in cut)
    for one in cut:
        before, after, place = (cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR).shape for picture in (one.before, one.after, one.place))
        assert before == after and place[1] == 320


def test_what_only_some_homes_know_is_told_only_there():
    yard, champion, challenger, context = case(60)
    verdict = judge(yard, champion, challenger, FAST, context)
    assert "What to expect" not in report_html(verdict, Side("v8"), Side("v7"))
    more = {
        "calibration": {"change": {"sentence": "On the val nights it raises 0.12 fewer false alarms."}},
        "cost": {name: {"estimate": 12.24, "lower": 8.0, "upper": None} for name in ("challenger", "champion", "difference")},
        "cases": {"checked": [1, 2, 3], "regressions": [2], "gains": [], "left_out": []}, "test_version": "test-v0002"}
    told = replace(verdict, numbers=verdict.numbers | more, caps=("case_regression",), reasons=("It fails 1 case that the champion passes: frames 2.", *verdict.reasons))
    priced = judge(yard, champion, challenger, replace(FAST, cost_missed_visit=5.0, cost_false_alarm=1.0), context)
    html = report_html(priced, Side("v8"), Side("v7"))
    assert "It costs " in html and "prices" in priced.summary and "prices" not in html.partition("<h1>")[2].partition("</h1>")[0]
    text = " ".join("".join(Page(report_html(told, Side("v8"), Side("v7"))).text).split())
    for words in ("0.12 fewer false alarms", "It costs 12.2 (8.0 to –) a camera and month, the champion 12.2", "3 known cases checked: 1 lost.", "test-v0002", "It fails 1 case"):
        assert words in text, words


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
