"""The health of a version beyond its boxes: gaps in coverage, labels that the champion disputes, what changed, the pages."""
import json
from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from deerml.app.cli import app
from deerml.capture import store as capture
from deerml.capture.store import NewFrame, add_camera, add_frames, frames, record_inference
from deerml.capture.truth import BoxVerdict, FrameStatement, record
from deerml.core.box import Box
from deerml.data.audit import Found, audit, tendencies
from deerml.data.coverage import seasons_of
from deerml.data.diff import diff_versions
from deerml.data.gallery import illustrate
from deerml.data.health import Labelled
from deerml.data.version import freeze, list_versions
from deerml.model.detector import Detection
from yards import AFTER, SPOT, START, picture, yard

BUSH = Box(100, 20, 30, 30)


class Champion:
    "As much of a bundle as an audit asks for"

    digest = "c" * 64

    class serving:
        class thresholds:
            shared = {"deer": 0.5}

    def threshold(self, camera: str, label: str) -> float:
        return 0.5


class Page(HTMLParser):
    "Collects tags and text, and checks that what is opened is closed"

    def __init__(self, html: str):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(html)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text += data


def looked_at(store, said):
    "Let the champion have found `said(frame number of the night)` on every frame"
    every = frames(store)
    record_inference(store, Champion.digest, [(frame.id, said(number % 6), False) for number, frame in enumerate(every)])
    return every


@pytest.fixture
def reviewed(tmp_path):
    with yard(tmp_path / "home", nights=12) as store:
        yield store


def test_the_audit_reads_what_is_stored(reviewed):
    looked_at(reviewed, lambda n: [Detection("deer", 0.9, SPOT)] if n == 0 else [Detection("deer", 0.8, BUSH)] if n == 2 else [Detection("deer", 0.3, BUSH)] if n == 3 else [])
    found = freeze(reviewed, at=AFTER, champion=Champion()).facts.audit
    assert found.looked == found.of > 0 and found.denied == 0
    kinds = {kind: {one.frame_id % 6 for one in found.frames(kind)} for kind in ("extra", "unfound", "loose")}
    assert kinds["unfound"] == {2} and not kinds["loose"]  # ids begin with 1: the second frame of each night
    assert kinds["extra"] == {3}  # the confident bush and not the weak one


def test_a_bush_that_somebody_called_false_is_not_shown_again(reviewed):
    every = looked_at(reviewed, lambda n: [Detection("deer", 0.8, BUSH)] if n == 2 else [])
    beside = Box(102, 21, 30, 30)  # the model before drew it a little elsewhere
    record(reviewed, "ann", [BoxVerdict(frame.id, "false_positive", "deer", beside, box_key="old") for n, frame in enumerate(every) if n % 6 == 2])
    found = freeze(reviewed, at=AFTER, champion=Champion()).facts.audit
    assert not found.frames("extra") and found.denied > 0


def test_a_frame_that_the_champion_never_saw_accuses_nobody(reviewed):
    found = freeze(reviewed, at=AFTER, champion=Champion()).facts.audit
    assert found.looked == 0 and found.of > 0 and not found.contradictions


def test_boxes_that_a_hand_shifts_are_told_by_reviewer(reviewed):
    moved = Box(SPOT.x + 12, SPOT.y, SPOT.width, SPOT.height)
    looked_at(reviewed, lambda n: [Detection("deer", 0.9, moved)])
    [one] = freeze(reviewed, at=AFTER, champion=Champion()).facts.audit.tendencies
    assert one.reviewer == "ann" and one.beyond == ("right",) and one.right == pytest.approx(-0.25)
    assert "25% of a box too far left" in one.sentence


def test_confirmed_boxes_say_nothing_of_a_hand():
    frame = Labelled("a", "gate", "train", (640, 360), (("deer", SPOT),), 1)
    said = {"a": [Found("deer", SPOT, 0.9)]}
    assert audit([frame] * 20, said).tendencies == ()
    assert len(audit([frame] * 20, said, {(1, "deer", SPOT): "ann"}).tendencies) == 1


def test_chance_is_no_tendency():
    rng = np.random.default_rng(0)
    def pairs(shift, spread, count=40):
        boxes = [Box(*place, 50.0, 40.0) for place in rng.uniform(50, 300, (count, 2))]
        return [(Box(box.x + rng.normal(shift, spread), box.y, box.width, box.height), box) for box in boxes]
    calm, loud, few = (tendencies({"ann": of_one}) for of_one in (pairs(0, 20), pairs(15, 4), pairs(15, 4, 7)))
    assert calm[0].beyond == () and loud[0].beyond == ("right",) and few == []


def test_the_worst_come_first():
    frames_ = [Labelled(f"{n}", "gate", "train", (640, 360), (), n) for n in range(5)]
    scores = [0.6, 0.95, 0.7, 0.51, 0.8]
    found = audit(frames_, {str(n): [Found("deer", BUSH, scores[n])] for n in range(5)})
    assert [one.score for one in found.frames("extra")] == sorted(scores, reverse=True)
    large, small = (Labelled(name, "gate", "train", (640, 360), (("deer", Box(10, 10, side, side)),), 1) for name, side in (("large", 90.0), ("small", 20.0)))
    assert [one.image for one in audit([small, large], {"large": [], "small": []}).frames("unfound")] == ["large", "small"]


def seen_by(store, camera, zone, nights, reviewed):
    "Four scheduled frames a night, an hour apart; their animals reviewed or not"
    add_camera(store, camera, zone=zone)
    new = [NewFrame(picture(1_000_000 + 10_000 * len(camera) + 10 * night + n, True), "test", f"{camera}-{night}-{n}", camera=camera, taken_at=START + timedelta(days=night, hours=n), trigger="scheduled") for night in range(nights) for n in range(4)]
    ids = add_frames(store, new)
    if reviewed:
        record(store, "ann", [saying for frame_id in ids for saying in (BoxVerdict(frame_id, "missed", "deer", SPOT), FrameStatement(frame_id, "all_boxed", ("deer",)))])


def test_a_camera_nobody_reviewed_is_named_as_a_gap(tmp_path):
    with yard(tmp_path / "home", nights=2) as store:
        seen_by(store, "ridge", "Europe/Berlin", 12, reviewed=False)
        seen_by(store, "lawn", "Pacific/Auckland", 12, reviewed=True)
        facts = freeze(store, at=AFTER).facts
        gaps = facts.balance.gaps()
        assert [gap.camera for gap in gaps] == ["ridge"] and gaps[0].hours == 8
        sentence = facts.balance.sentence(gaps[0])
        assert sentence.startswith("Camera ridge in unknown light in autumn: 47 % of") and sentence.endswith("0 % of the labels.")
        assert {cell.camera: cell.season for cell in facts.balance.cells} == {"gate": "Sep–Nov", "ridge": "autumn", "lawn": "spring"}
        page = Page((list_versions(store.home.datasets)[-1].path / "health.html").read_text())
        assert sentence in page.text


@pytest.mark.parametrize("zone, july", [("Europe/London", "summer"), ("America/Chicago", "summer"), ("Australia/Sydney", "winter"), ("America/Santiago", "winter"), ("Europe/Dublin", "summer"), ("Asia/Kolkata", "Jun–Aug"), ("Etc/GMT+3", "Jun–Aug")])
def test_the_clocks_tell_the_season(zone, july):
    assert seasons_of(zone)[2] == july


def test_two_versions_differ_in_what_was_said(reviewed):
    freeze(reviewed, at=AFTER)
    before = list_versions(reviewed.home.datasets)[0]
    kept = [frame for frame in frames(reviewed) if before.manifest["images"].get(frame.image) == "train"]
    with_animal, empty = ([frame for frame in kept if frame.id % 6 in of] for of in ((1, 2), (3, 4)))
    shifted = Box(SPOT.x + 4, SPOT.y, SPOT.width, SPOT.height)
    settled = FrameStatement(with_animal[0].id, "nothing_here", ("deer",)), BoxVerdict(with_animal[0].id, "false_positive", "deer", SPOT, box_key=f"drawn:{name_of(reviewed, with_animal[0].id)}")
    record(reviewed, "ann", [BoxVerdict(with_animal[1].id, "adjusted", "deer", shifted, box_key=f"drawn:{name_of(reviewed, with_animal[1].id)}"), *reversed(settled), FrameStatement(empty[0].id, "exclude", ("deer",))])
    after = freeze(reviewed, at=AFTER).version
    found = diff_versions(before, after)
    changed = {one.image: one for one in found.changed}
    assert changed[with_animal[1].image].adjusted == 1 and not changed[with_animal[1].image].added
    assert empty[0].image in {entry.image for entry in found.removed} and not found.moved
    gone = {entry.image for entry in found.removed} | {one.image for one in found.changed if one.became == "empty"}
    assert with_animal[0].image in gone
    assert json.loads(json.dumps(found.to_dict()))["old"] == "v0001"
    backwards = diff_versions(after, before)
    assert {one.image for one in backwards.added} == {one.image for one in found.removed} and not diff_versions(after, after).changed
    assert "What changed since v0001" in (after.path / "health.html").read_text()


def name_of(store, frame_id):
    "The operation that drew the box of a frame of the yard"
    from deerml.capture.truth import events_on
    with store.read() as connection:
        return next(event.operation_id for event in events_on(connection, [frame_id])[frame_id] if event.verdict == "missed")


def test_freezing_opens_no_picture_and_the_illustrated_page_a_few(reviewed, monkeypatch):
    looked_at(reviewed, lambda n: [Detection("deer", 0.8, BUSH)] if n == 2 else [])
    opened = []
    def reading(store, frame):
        opened.append(frame.id)
        return capture.image_path(store.home.images, frame.image, frame.media_type).read_bytes()
    monkeypatch.setattr("deerml.data.gallery.image_bytes", reading)
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: opened.append(path) if path.suffix == ".jpg" else read(path))
    frozen = freeze(reviewed, at=AFTER, champion=Champion())
    assert opened == []
    monkeypatch.setattr(Path, "read_bytes", read)
    page = Page(illustrate(reviewed, frozen.facts).read_text())
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert 0 < len(opened) <= 16 and len(pictures) == len(opened)
    assert all(one["src"].startswith("data:image/jpeg;base64,") and one["alt"] for one in pictures)


def test_the_page_of_a_version_is_the_same_for_the_same_home(tmp_path):
    pages = []
    for name in ("here", "there"):
        with yard(tmp_path / name, nights=5) as store:
            looked_at(store, lambda n: [Detection("deer", 0.8, BUSH)] if n == 2 else [])
            version = freeze(store, at=AFTER, champion=Champion()).version
            illustrate(store, freeze(store, at=AFTER, champion=Champion()).facts)
            pages.append((version.path / "health.html").read_bytes())
            assert not list(version.path.glob("**/*health-*"))
    assert pages[0] == pages[1] and b"<img" not in pages[0] and b"data:image" not in pages[0]


@pytest.mark.parametrize("camera", ["<script>alert(1)</script>", 'a" onload="x'])
def test_names_cannot_become_markup(tmp_path, camera):
    with yard(tmp_path / "home", nights=8, cameras=(camera,)) as store:
        looked_at(store, lambda n: [Detection("deer", 0.8, BUSH)] if n == 2 else [])
        page = Page(illustrate(store, freeze(store, at=AFTER, champion=Champion()).facts).read_text())
        assert camera in page.text and not [tag for tag, _ in page.tags if tag == "script"]
        assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]


def test_the_command_prepares_and_compares(reviewed, monkeypatch):
    monkeypatch.setattr("deerml.data.version.now", lambda: AFTER)
    home = str(reviewed.home.path)
    first = json.loads(CliRunner().invoke(app, ["prepare", "--home", home, "--json"]).stdout)
    assert first["version"] == "v0001" and first["audit"] is None and Path(first["health"]).name == "health-v0001.html" and Path(first["health"]).is_file()
    [frame, *_] = [frame for frame in frames(reviewed) if frame.id % 6 == 5 and first["path"]]  # one that nobody had completed
    record(reviewed, "ann", [FrameStatement(frame.id, "all_boxed", ("deer",))])
    second = json.loads(CliRunner().invoke(app, ["prepare", "--home", home, "--json"]).stdout)
    assert second["version"] == "v0002" and second["changes"]
    told = json.loads(CliRunner().invoke(app, ["prepare", "--diff", "v0001", "--home", home, "--json"]).stdout)
    assert (told["old"], told["new"], told["summary"]) == ("v0001", "v0002", second["changes"])
    assert [version.name for version in list_versions(reviewed.home.datasets)] == ["v0001", "v0002"]
    text = CliRunner().invoke(app, ["prepare", "--diff", "v0001", "--home", home]).stdout
    assert "v0001 to v0002" in text and "1 frame added: 1 with an animal, 0 negatives." in text
    wrong = CliRunner().invoke(app, ["prepare", "--diff", "v0009", "--home", home, "--json"])
    assert wrong.exit_code != 0 and "NO_DATASET" in wrong.output
