"""The house's database and folders, with every shape and fault they are known to have, brought in without a trace."""
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from deerml.app.cli import app
from deerml.capture import schema
from deerml.capture.store import Store, detections, frames
from deerml.capture.truth import COMPLETE, complete_truths, truths
from deerml.core.errors import DeermlError
from deerml.core.settings import Home
from deerml.sources.house import HouseSource, house_time
from deerml.sources.source import Report, bring_in

ROOT = Path(__file__).resolve().parents[1]
CHICAGO = "America/Chicago"
MODEL = "YOLO26s v4.0"
EVENTS = """create table ring_events (id integer primary key autoincrement, camera_id text, event_type text, timestamp text, snapshot_available integer, snapshot_size integer,
    snapshot_path text, recording_url text, processed integer, deer_detected integer, detection_confidence real, error_message text, created_at text, archived integer,
    detection_bboxes text, false_positive integer, model_version text, user_confirmed integer, irrigation_activated integer)"""
VIDEOS = """create table videos (id integer primary key, filename text, camera_name text, captured_at text);
    create table frames (id integer primary key, video_id integer, frame_number integer, timestamp_in_video real, image_path text, reviewed integer, review_type text, selected_for_training integer);
    create table detections (id integer primary key, frame_id integer, bbox_x1 real, bbox_y1 real, bbox_x2 real, bbox_y2 real, confidence real);
    create table annotations (id integer primary key, frame_id integer, bbox_x real, bbox_y real, bbox_width real, bbox_height real)"""
CORNERS = (100, 80, 300, 240)
NESTED = {"x1": 100, "y1": 80, "x2": 300, "y2": 240}


def boxes(score: float | None = 0.83, shape: str = "nested", corners=CORNERS) -> str:
    names = ("x1", "y1", "x2", "y2")
    inner = dict(zip(names, corners))
    one = {"nested": {"confidence": score, "bbox": inner}, "flat": {"confidence": score, **inner}, "prefixed": {"confidence": score} | {f"bbox_{name}": value for name, value in inner.items()}}
    return json.dumps([one[shape]])


def jpeg(seed: int, size=(640, 360)) -> bytes:
    width, height = size
    small = np.random.default_rng(seed).integers(0, 255, (9, 16, 3), np.uint8)
    return cv2.imencode(".jpg", cv2.resize(small, (width, height)), [cv2.IMWRITE_JPEG_QUALITY, 60])[1].tobytes()


class House:
    "A house in a folder of its own"

    def __init__(self, folder: Path, mode: str = "delete", tables: str = f"{EVENTS};{VIDEOS}"):
        self.path, self.pictures = folder / "training.db", folder / "pictures"
        (self.pictures / "snapshots").mkdir(parents=True)
        self.database = sqlite3.connect(self.path, timeout=30, check_same_thread=False)
        self.database.execute(f"pragma journal_mode={mode}")
        self.database.executescript(tables)
        self.seed = 0

    def add(self, table: str = "ring_events", **values: object) -> int:
        names = ", ".join(values)
        row = self.database.execute(f"insert into {table} ({names}) values ({', '.join('?' * len(values))})", list(values.values())).lastrowid
        self.database.commit()
        return row

    def picture(self, size=(640, 360), content: bytes | None = None) -> str:
        self.seed += 1
        (self.pictures / f"snapshots/event_{self.seed}.jpg").write_bytes(jpeg(self.seed, size) if content is None else content)
        return f"data/snapshots/event_{self.seed}.jpg"

    def event(self, **values: object) -> int:
        minute = self.seed
        clock = f"2026-03-{10 + minute // 600:02d} 20:{minute // 10 % 60:02d}:{minute % 10:02d}"
        usual = {"camera_id": "gate", "event_type": "motion", "timestamp": clock.replace(" ", "T"), "created_at": clock, "snapshot_available": 1, "model_version": MODEL}
        return self.add(**usual | {"snapshot_path": values.get("snapshot_path") or self.picture()} | values)

    def frame(self, detected: bool = False, drawn=(), **values: object) -> int:
        frame = self.add("frames", **{"video_id": 1, "image_path": self.picture()} | values)
        if detected:
            self.add("detections", frame_id=frame, confidence=0.7, **dict(zip(("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2"), CORNERS)))
        for one in drawn:
            self.add("annotations", frame_id=frame, **dict(zip(("bbox_x", "bbox_y", "bbox_width", "bbox_height"), one)))
        return frame

    def source(self, **options: object) -> HouseSource:
        return HouseSource(self.path, [self.pictures], **{"zone": CHICAGO} | options)

    def state(self) -> dict:
        "Everything about the folder that an import could change; reading a file may change when it was last read"
        return {str(path): (path.stat().st_size, path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None) for path in sorted(self.path.parent.rglob("*"))}


@pytest.fixture
def house(tmp_path) -> House:
    return House(tmp_path / "house")


@pytest.fixture
def store(tmp_path):
    with Store.open(Home.create(tmp_path / "home", zone=CHICAGO)) as store:
        yield store


def contents(store: Store) -> dict[str, list]:
    with store.read() as connection:
        return {table.name: [tuple(row) for row in connection.execute(sa.select(table))] for table in schema.metadata.sorted_tables}


def states(store: Store) -> dict[str, str]:
    "State of the frames by the row they came from"
    found = truths(store, ["deer"], [frame.id for frame in frames(store)])
    with store.read() as connection:
        seen = connection.execute(sa.select(schema.sighting.c.external_id, schema.sighting.c.frame_id)).all()
    return {"/".join(name.split("/")[:2]): found[frame_id].state(["deer"]) for name, frame_id in seen}


def state_of(store: Store, house: House, **event: object) -> str:
    row = house.event(**event)
    bring_in(store, house.source())
    return states(store)[f"ring_events/{row}"]


# -- what a mark means -----------------------------------------------------------------------------------------------


def test_what_nobody_looked_at_stays_unreviewed(store, house):
    for detected in (None, 0, 1):
        for shown in (None, "", "[]", "null", boxes(), boxes(shape="flat"), boxes(shape="prefixed")):
            for unmarked in (None, 0):
                house.event(deer_detected=detected, detection_bboxes=shown, user_confirmed=unmarked, false_positive=unmarked, processed=1, archived=1)
    report = bring_in(store, house.source())
    assert report.new == report.unreviewed == 42 and set(states(store).values()) == {"unreviewed"}
    assert not complete_truths(store, ["deer"])


def test_no_column_of_an_event_makes_a_negative(store, house):
    "Every combination of marks: none is an empty frame, and only drawn boxes that were confirmed are complete"
    expected = {}
    for detected in (None, 0, 1):
        for confirmed in (None, 0, 1):
            for wrong in (None, 0, 1):
                for name, shown in {"none": None, "model": boxes(), "hand": boxes(None), "both": json.dumps([*json.loads(boxes()), *json.loads(boxes(None))]), "broken": '[{"bbox'}.items():
                    row = house.event(deer_detected=detected, user_confirmed=confirmed, false_positive=wrong, detection_bboxes=shown)
                    complete = confirmed == 1 and wrong != 1 and name == "hand"
                    expected[f"ring_events/{row}"] = complete
    report = bring_in(store, house.source())
    assert report.looked_at == report.new == 135 and report.empty == 0 and report.complete == sum(expected.values()) == 6
    found = states(store)
    assert all((found[row] == "boxes_complete") == complete for row, complete in expected.items())
    assert "verified_empty" not in found.values()


def test_yes_a_deer_without_a_drawn_box_is_in_progress(store, house):
    assert state_of(store, house, user_confirmed=1, deer_detected=0) == "in_progress"
    assert state_of(store, house, user_confirmed=1, deer_detected=1, detection_bboxes=boxes()) == "in_progress"


def test_two_rows_of_one_picture_never_complete_it_together(store, house):
    "One row says yes, the other has the box: nobody has said that this box is all"
    same = {"snapshot_path": house.picture(), "timestamp": "2026-03-10T20:00:00"}
    house.event(**same, user_confirmed=1, deer_detected=1)
    house.event(**same, detection_bboxes=boxes(None))
    bring_in(store, house.source())
    assert len(frames(store)) == 1 and set(states(store).values()) == {"in_progress"}


def test_a_false_positive_speaks_of_its_boxes_only(store, house):
    row = house.event(false_positive=1, deer_detected=1, detection_bboxes=boxes(), detection_confidence=0.83)
    bring_in(store, house.source())
    assert states(store)[f"ring_events/{row}"] == "in_progress"
    [frame] = frames(store)
    [seen] = detections(store, f"house:{MODEL}")[frame.id]
    with store.read() as connection:
        [event] = connection.execute(sa.select(schema.review_event)).all()
    assert (event.verdict, event.detection_id, event.reviewer, event.source) == ("false_positive", seen.id, "house", "import")
    assert seen.box.xyxy == CORNERS and seen.score == 0.83


def test_a_drawn_box_arrives_where_it_was_drawn(store, house):
    for shape in ("nested", "flat", "prefixed"):
        house.event(user_confirmed=1, detection_bboxes=boxes(None, shape), deer_detected=0)
    bring_in(store, house.source())
    found = complete_truths(store, ["deer"]).values()
    assert len(found) == 3 and all([one.box.xyxy for one in truth.boxes] == [CORNERS] for truth in found)


def test_an_image_of_4k_keeps_its_boxes(store, house):
    house.event(snapshot_path=house.picture((3840, 2160)), user_confirmed=1, detection_bboxes=boxes(None, corners=(3000, 1500, 3800, 2100)))
    bring_in(store, house.source())
    [truth] = complete_truths(store, ["deer"]).values()
    assert truth.boxes[0].box.xyxy == (3000, 1500, 3800, 2100)


BAD = [(600, 300, 900, 500), (0.1, 0.2, 0.4, 0.5), (300, 240, 100, 80), (10, 10, 10, 10), ("a", 1, 2, 3), (float("nan"), 1, 2, 3)]
BROKEN = ['[{"bbox": {"x1"', "deer", "[1, 2]", '[{"confidence": 0.5}]', '{"x1": 1}', "[[[[", "3", '[{"bbox": null, "confidence": null}]', b"\xff\xfe"]


def test_a_box_that_cannot_be_leaves_its_frame_unfinished(store, house):
    for bad in BAD:
        house.event(user_confirmed=1, detection_bboxes=json.dumps([*json.loads(boxes(None)), *json.loads(boxes(None, corners=bad))]))
    report = bring_in(store, house.source())
    assert report.new == len(BAD) and set(states(store).values()) == {"in_progress"}
    assert report.problems["A box of it does not lie on its image."]["count"] == len(BAD)


def test_broken_boxes_are_named_and_complete_nothing(store, house):
    for text in BROKEN:
        house.event(user_confirmed=1, detection_bboxes=text)
    report = bring_in(store, house.source())
    assert report.new == len(BROKEN) and set(states(store).values()) == {"in_progress"}
    assert {reason: found["count"] for reason, found in report.problems.items()} == {"Its boxes are not JSON.": 4, "Its boxes are not in a shape that is known.": 5}
    assert report.problems["Its boxes are not JSON."]["examples"][0] == "ring_events/1: data/snapshots/event_1.jpg"


def test_a_box_without_any_score_is_nobodys(store, house):
    assert state_of(store, house, user_confirmed=1, detection_bboxes=json.dumps([NESTED])) == "in_progress"
    row = house.event(detection_confidence=0.6, detection_bboxes=json.dumps([NESTED]), deer_detected=1)
    bring_in(store, house.source())
    assert states(store)[f"ring_events/{row}"] == "unreviewed"
    assert [one.score for found in detections(store, f"house:{MODEL}").values() for one in found] == [0.6]


DRAWN = (0.5, 0.5, 0.25, 0.25)


FRAMES = [
    ({"reviewed": 1, "review_type": "no_deer"}, "verified_empty"),
    ({"reviewed": 1, "review_type": "no_deer", "detected": True}, "verified_empty"),
    ({"reviewed": 1, "review_type": "no_deer", "drawn": [DRAWN]}, "in_progress"),
    ({"reviewed": 1, "review_type": "no_deer", "drawn": [(2, 2, 5, 5)]}, "in_progress"),
    ({"reviewed": 1, "review_type": "correct", "detected": True}, "boxes_complete"),
    ({"reviewed": 1, "review_type": "correct", "drawn": [DRAWN]}, "boxes_complete"),
    ({"reviewed": 1, "review_type": "correct", "drawn": [DRAWN, DRAWN]}, "boxes_complete"),
    ({"reviewed": 1, "review_type": "correct", "detected": True, "drawn": [DRAWN]}, "boxes_complete"),
    ({"reviewed": 1, "review_type": "correct", "detected": True, "drawn": [(0.2, 0.2, 0.25, 0.25)]}, "in_progress"),
    ({"reviewed": 1, "review_type": "correct"}, "in_progress"),
    ({"reviewed": 1, "review_type": None, "drawn": [DRAWN]}, "in_progress"),
    ({"reviewed": 1, "review_type": "perhaps", "detected": True}, "in_progress"),
    ({"reviewed": 0, "review_type": "no_deer"}, "unreviewed"),
    ({"reviewed": None, "review_type": "no_deer", "detected": True}, "unreviewed"),
    ({"reviewed": 0, "review_type": "correct", "detected": True}, "unreviewed"),
    ({"reviewed": 0, "drawn": [DRAWN]}, "in_progress"),
    ({"selected_for_training": 1}, "unreviewed"),
]


def test_frames_of_videos(store, house):
    rows = [house.frame(**frame) for frame, _ in FRAMES]
    bring_in(store, house.source())
    found = states(store)
    assert [(frame, found[f"frames/{row}"]) for row, (frame, _) in zip(rows, FRAMES)] == FRAMES
    places = [one.box.xywh for truth in complete_truths(store, ["deer"]).values() for one in truth.boxes]
    assert places.count((320, 180, 160, 90)) == 3, "annotations are shares of the image from its top left corner"
    assert places.count((100, 80, 200, 160)) == 2, "detections are pixels"


def test_frames_of_one_video_stay_together(store, house):
    house.add("videos", id=1, filename="a.mp4", camera_name="pond")
    house.add("videos", id=2, filename="b.mp4", camera_name="pond", captured_at="2026-03-10T20:00:00")
    for seconds in (0.0, 1.5):
        house.frame(video_id=1, timestamp_in_video=seconds)
        house.frame(video_id=2, timestamp_in_video=seconds)
    bring_in(store, house.source())
    undated, dated = frames(store)[0::2], frames(store)[1::2]
    assert {frame.night for frame in undated} == {"house video 1"} and {frame.camera for frame in undated} == {"import:house"}
    assert [(frame.taken_at - dated[0].taken_at).total_seconds() for frame in dated] == [0, 1.5] and {frame.camera for frame in dated} == {"pond"}


def test_marks_that_change_there_change_here(store, house):
    row = house.event(deer_detected=1, detection_bboxes=boxes())
    seen = []
    for change in ("user_confirmed = 1", f"detection_bboxes = '{boxes(None)}'", "false_positive = 1", "false_positive = 0", "user_confirmed = 0", "detection_bboxes = null"):
        house.database.execute(f"update ring_events set {change}")
        house.database.commit()
        bring_in(store, house.source())
        assert bring_in(store, house.source()).events == 0
        seen.append(states(store)[f"ring_events/{row}"])
    assert seen == ["in_progress", "boxes_complete", "in_progress", "boxes_complete", "in_progress", "unreviewed"]


# -- times, places ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("said", "created", "moment"), [
    ("2026-07-01T03:00:00Z", "2026-06-30 22:00:02", "2026-07-01T03:00:00"),
    ("2026-06-30T22:00:00-05:00", None, "2026-07-01T03:00:00"),
    ("2026-06-30T22:00:00", "2026-06-30 22:00:02", "2026-07-01T03:00:00"),
    ("2026-07-01T03:00:00", "2026-06-30 22:00:02", "2026-07-01T03:00:00"),  # naive UTC, as its row shows
    ("2026-06-30 22:00:00.123456", None, "2026-07-01T03:00:00.123"),
    ("2026-06-30T22:00:00", "2026-09-01 12:00:00", "2026-07-01T03:00:00"),  # entered later: the habit
    ("1782874800", None, "2026-07-01T03:00:00"),
    ("1782874800123", None, "2026-07-01T03:00:00.123"),
    ("2026-11-01T00:30:00", "2026-11-01 00:30:01", "2026-11-01T05:30:00"),  # before the hour that comes twice
    ("2026-11-01T01:30:00", "2026-11-01 01:30:01", "2026-11-01T06:30:00"),  # in it: the first
    ("2026-11-01T07:30:00", "2026-11-01 01:30:01", "2026-11-01T07:30:00"),  # in it, and UTC says which
    ("2026-11-01T02:30:00", "2026-11-01 02:30:01", "2026-11-01T08:30:00"),  # after it
    ("2026-03-08T02:30:00", None, "2026-03-08T08:30:00"),  # in the hour that does not exist
    ("yesterday", "2026-06-30 22:00:02", "2026-07-01T03:00:02"),
    ("", "2026-06-30 22:00:02", "2026-07-01T03:00:02"),
    ("0001-01-01T00:00:00", None, None), ("99999999999", None, None), (None, None, None), (b"\x00", "x", None),
])
def test_times(said, created, moment):
    found, _ = house_time(said, created, CHICAGO)
    assert (found.isoformat(timespec="milliseconds")[:23].removesuffix(".000") if found else None) == moment


def test_the_text_of_a_time_is_kept(store, house):
    house.event(timestamp="2026-07-01T03:00:00", created_at="2026-06-30 22:00:02", recording_url="https://example.org/signed?secret")
    bring_in(store, house.source())
    with store.read() as connection:
        kept = json.loads(connection.scalar(sa.select(schema.sighting.c.provenance)))
    assert kept["row"]["timestamp"] == "2026-07-01T03:00:00" and kept["time"] == "naive, UTC by created_at" and "secret" not in json.dumps(kept)


def test_null_everywhere(store, house):
    house.add(id=1)
    house.add(snapshot_path=house.picture())
    house.add("frames", id=1)
    house.add("frames", image_path=house.picture())
    report = bring_in(store, house.source())
    assert (report.looked_at, report.new, report.unreadable, report.unreviewed) == (4, 2, 2, 2)
    assert {frame.camera for frame in frames(store)} == {"import:house"} and report.problems["No picture was kept of this event."]["count"] == 2


def test_folders_are_tried_in_order(store, house, tmp_path):
    for name, seed in (("first", 1), ("second", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "one.jpg").write_bytes(jpeg(seed))
    (tmp_path / "second/two.jpg").write_bytes(jpeg(3))
    (tmp_path / "secret.jpg").write_bytes(jpeg(4))
    for path in ("/app/snapshots/one.jpg", "two.jpg", "../secret.jpg", str(tmp_path / "secret.jpg")):
        house.event(snapshot_path=path)
    report = bring_in(store, HouseSource(house.path, [tmp_path / "first", tmp_path / "second"], zone=CHICAGO))
    stored = {(store.home.images / frame.image[:2] / frame.image[2:4] / frame.file_name).read_bytes() for frame in frames(store)}
    assert stored == {jpeg(1), jpeg(3)} and report.unreadable == 2


# -- the whole house, its faults, and an import that is cut off --------------------------------------------------------

ROWS = 300


def furnish(house: House) -> None:
    "About 300 rows: a deer now and then, and every fault"
    for number in range(ROWS):
        shown = {0: boxes(), 1: boxes(None), 2: boxes(shape="flat"), 3: boxes(shape="prefixed")}.get(number % 20)
        house.event(camera_id=("gate", "pond")[number % 2], deer_detected=(None, 0, 1)[number % 3], detection_bboxes=shown, user_confirmed=int(number % 40 == 1), false_positive=int(number % 20 == 2))
    house.event(snapshot_path=house.picture(content=jpeg(1)[:900]))
    house.event(snapshot_path=house.picture(content=b""))
    house.event(snapshot_path="data/snapshots/gone.jpg")
    house.event(detection_bboxes="[{")


@pytest.fixture(scope="module")
def furnished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("furnished")
    house = House(folder / "house")
    furnish(house)
    house.database.close()
    return folder / "house"


@pytest.fixture
def year(furnished, tmp_path) -> HouseSource:
    shutil.copytree(furnished, tmp_path / "year")
    return HouseSource(tmp_path / "year/training.db", [tmp_path / "year/pictures"], zone=CHICAGO)


def check_whole(report: Report, store: Store) -> None:
    assert (report.looked_at, report.new + report.known, report.unreadable) == (ROWS + 4, ROWS + 1, 3)
    assert len(frames(store)) == ROWS + 1
    found = list(states(store).values())
    assert found.count("boxes_complete") == 8 and "verified_empty" not in found and found.count("unreviewed") > 250


def test_a_year_comes_in_and_a_second_run_adds_nothing(store, year):
    began = time.perf_counter()
    dry = bring_in(store, year, dry_run=True)
    assert not frames(store) and dry.new == ROWS + 1 and dry.unreadable == 3 and not list(store.home.images.rglob("*.jpg"))
    report = bring_in(store, year)
    check_whole(report, store)
    assert report.new == dry.new and report.complete == dry.complete and report.unreviewed == dry.unreviewed
    before = contents(store)
    again = bring_in(store, year)
    assert (again.new, again.events, again.known) == (0, 0, ROWS + 1) and contents(store) == before
    assert time.perf_counter() - began < 60
    assert "gone.jpg" in json.dumps(report.problems) and not any(key.startswith("import:") for key, _ in before["meta"])


class Stop(Exception):
    pass


def stopping(at: int):
    def show(done: int, _total: int) -> None:
        if done == at:
            raise Stop
    return show


def test_an_import_that_is_stopped_goes_on_where_it_was(store, year):
    for at in (70, 150):
        with pytest.raises(Stop):
            bring_in(store, year, on_progress=stopping(at), batch=20)
        assert len(frames(store)) == at // 20 * 20 - (20 if at % 20 == 0 else 0)
    looked = []
    report = bring_in(store, year, on_progress=lambda done, total: looked.append(done))
    assert report.resumed and looked[0] == 141
    check_whole(report, store)
    assert report.new == ROWS + 1
    assert not bring_in(store, year).resumed


def test_without_its_cursor_nothing_is_doubled(store, year):
    with pytest.raises(Stop):
        bring_in(store, year, on_progress=stopping(150), batch=20)
    with store.write() as connection:
        connection.execute(schema.meta.delete().where(schema.meta.c.key.startswith("import:")))
    check_whole(bring_in(store, year), store)


def test_a_killed_import_goes_on(tmp_path, year):
    home = Home.create(tmp_path / "killed", zone=CHICAGO)
    code = f"""
        import os, signal
        from pathlib import Path
        from deerml.capture.store import Store
        from deerml.core.settings import Home
        from deerml.sources.house import HouseSource
        from deerml.sources.source import bring_in
        def show(done, total):
            if done == 130:
                os.kill(os.getpid(), signal.SIGKILL)
        with Store.open(Home.open(Path({str(home.path)!r}))) as store:
            bring_in(store, HouseSource(Path({str(year.database)!r}), [Path({str(year.snapshots[0])!r})], zone={CHICAGO!r}), on_progress=show, batch=20)
        """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    with Store.open(home) as store:
        assert len(frames(store)) == 120
        report = bring_in(store, year)
        assert report.resumed
        check_whole(report, store)


# -- without a trace -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["delete", "wal", "truncate", "persist"])
@pytest.mark.parametrize("is_open", [True, False])
def test_nothing_is_written_to_the_house(store, tmp_path, mode, is_open):
    house = House(tmp_path / "quiet", mode)
    for _ in range(5):
        house.event(deer_detected=0)
    if not is_open:
        house.database.close()
    before = house.state()
    assert (f"{house.path}-wal" in before) == (mode == "wal" and is_open)
    assert bring_in(store, house.source()).new == bring_in(store, house.source()).known == 5
    assert house.state() == before


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_a_folder_that_may_not_be_written(store, tmp_path, mode):
    house = House(tmp_path / "locked", mode)
    house.event()
    left = shutil.copytree(house.path.parent, tmp_path / "left")  # with the log of a house that was cut off
    for folder in (left, left / "pictures", left / "pictures/snapshots"):
        folder.chmod(0o555)
    (left / "training.db").chmod(0o444)
    try:
        assert bring_in(store, HouseSource(left / "training.db", [left / "pictures"])).new == 1
    finally:
        for folder in (left, left / "pictures", left / "pictures/snapshots"):
            folder.chmod(0o755)


def test_a_crashed_house_is_read_from_a_copy(store, tmp_path):
    "A journal that waits to be rolled back: only a writer may do that, so it happens in the copy"
    house = House(tmp_path / "crashed")
    for _ in range(5):
        house.event(error_message="x" * 5000)
    house.database.execute("pragma cache_size=1")
    house.database.execute("begin")
    house.database.execute("update ring_events set deer_detected = 0, user_confirmed = 1, error_message = error_message || 'y'")
    left = shutil.copytree(house.path.parent, tmp_path / "left")
    assert (left / "training.db-journal").stat().st_size
    before = {path.name: path.read_bytes() for path in left.iterdir() if path.is_file()}
    report = bring_in(store, HouseSource(left / "training.db", [left / "pictures"]))
    assert report.new == report.unreviewed == 5
    assert {path.name: path.read_bytes() for path in left.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_while_the_house_writes(store, tmp_path, mode):
    house = House(tmp_path / "busy", mode)
    for _ in range(60):
        house.event(deer_detected=0)
    done, paths = threading.Event(), [house.picture() for _ in range(20)]

    def write() -> None:
        second = sqlite3.connect(house.path, timeout=30)
        while not done.is_set():
            second.execute("insert into ring_events (camera_id, timestamp, snapshot_path) values ('pond', '2026-03-11T20:00:00Z', ?)", [paths[int(time.monotonic() * 100) % 20]])
            second.execute("update ring_events set processed = 1 where id < 10")
            second.commit()
            time.sleep(0.02)
        second.close()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        report = bring_in(store, house.source(), on_progress=lambda done, total: time.sleep(0.002), batch=10)
    finally:
        done.set()
        writer.join()
    assert report.unreadable == 0 and report.looked_at >= 60
    assert house.database.execute("pragma integrity_check").fetchone() == ("ok",)
    bring_in(store, house.source())
    assert len(contents(store)["sighting"]) == len({(name, when) for name, when in house.database.execute("select id, timestamp from ring_events")})


def test_a_house_that_never_lets_go_is_busy(store, house, monkeypatch):
    monkeypatch.setattr("deerml.sources.house.BUSY_SECONDS", 0.1)
    house.event()
    house.database.execute("begin exclusive")
    with pytest.raises(DeermlError) as caught:
        bring_in(store, house.source())
    assert (caught.value.code, caught.value.exit_code) == ("BUSY", 75)


# -- what is missing -------------------------------------------------------------------------------------------------


def test_missing_columns_read_as_null_and_are_named(store, tmp_path):
    house = House(tmp_path / "old", tables="create table ring_events (id integer primary key, camera_id, timestamp, snapshot_path, deer_detected)")
    house.add(camera_id="gate", timestamp="2026-03-10T20:00:00", snapshot_path=house.picture(), deer_detected=0)
    report = bring_in(store, house.source())
    assert report.new == report.unreviewed == 1 and "ring_events has no column user_confirmed" in report.notes and "there is no table frames" in report.notes


@pytest.mark.parametrize(("tables", "why"), [
    ("create table ring_events (id integer primary key, camera_id)", "no column snapshot_path"),
    ("create table ring_events (snapshot_path)", "no column id"),
    ("create table frames (id integer primary key, video_id)", "no column image_path"),
    ("create table other (id)", "neither a table"),
])
def test_without_ids_or_paths_there_is_a_clear_error(store, tmp_path, tables, why):
    house = House(tmp_path / "other", tables=tables)
    with pytest.raises(DeermlError) as caught:
        bring_in(store, house.source())
    assert caught.value.code == "BAD_HOUSE" and why in str(caught.value) and not frames(store)


def test_the_command(tmp_path, year):
    home = Home.create(tmp_path / "home", zone=CHICAGO, classes=["roe", "fox"]).path

    def run(*words: object) -> tuple[int, dict]:
        result = CliRunner().invoke(app, ["import", "house", *map(str, words), "--home", str(home), "--json"])
        return result.exit_code, json.loads(result.stdout)

    status, dry = run(year.database, "--snapshots", year.snapshots[0], "--dry-run")
    assert status == 0 and dry["new"] == ROWS + 1 and dry["dry_run"]
    status, done = run(year.database, "--snapshots", year.snapshots[0], "--snapshots", tmp_path, "--class", "fox")
    assert status == 0 and done["new"] == ROWS + 1 and done["problems"] and "looked at" in done["sentence"]
    with Store.open(Home.open(home)) as store:
        with store.read() as connection:
            assert set(connection.scalars(sa.select(schema.detection.c.label))) == {"fox"}
    assert run(year.database, "--class", "deer")[1]["error"]["code"] == "UNKNOWN_CLASS"
    assert run(tmp_path / "nowhere.db")[1]["error"]["code"] in ("BAD_HOUSE", "NOT_A_FOLDER")
    text = CliRunner().invoke(app, ["import", "house", str(year.database), "--snapshots", str(year.snapshots[0]), "--home", str(home)]).stdout
    assert "gone.jpg" in text and "cameras" not in text


# -- the guard, taken out --------------------------------------------------------------------------------------------

MUTANTS = {
    "a model's silence is a negative": (
        "    if wrong:\n        if boxes.drawn:", "    if not boxes.found and not confirmed and not wrong:\n        return [FrameStatement(0, 'nothing_here', (label,), operation_id='')]\n    if wrong:\n        if boxes.drawn:",
        "test_what_nobody_looked_at_stays_unreviewed or test_no_column_of_an_event_makes_a_negative"),
    "a false positive empties the frame": (
        'return _verdicts("false_positive", boxes, label) or [unsure]', "return [*_verdicts('false_positive', boxes, label), FrameStatement(0, 'nothing_here', (label,), operation_id='')]",
        "test_a_false_positive_speaks_of_its_boxes_only"),
    "a confirmation vouches for the model's box": (
        "if confirmed and drawn and not boxes.found", "drawn = drawn or _verdicts('correct', boxes, label)\n    if confirmed and drawn", "test_yes_a_deer_without_a_drawn_box_is_in_progress"),
    "a frame counts that was not reviewed": (
        'if _yes(row["reviewed"]) else None', 'if row["review_type"] else None', "test_frames_of_videos"),
    "reading leaves files": ('"mode=ro&nolock=1"', '"mode=ro"', "test_nothing_is_written_to_the_house and False and wal"),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if number >= 2 else []) for number, name in enumerate(MUTANTS)])
def test_the_loss_of_a_guard_is_noticed(name, tmp_path):
    before, after, chosen = MUTANTS[name]
    shutil.copytree(ROOT / "deerml", tmp_path / "deerml", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(__file__, tmp_path)
    module = tmp_path / "deerml/sources/house.py"
    assert module.read_text().count(before) == 1, f"the guard of this mutant is not where it was: {before}"
    module.write_text(module.read_text().replace(before, after))
    command = [sys.executable, "-m", "pytest", "-x", "-q", Path(__file__).name, "-k", chosen, "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(tmp_path), "--basetemp", str(tmp_path / "base")]
    ran = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 1 and " failed" in ran.stdout, ran.stdout[-2000:]


def test_complete_states_are_what_they_were():
    assert COMPLETE == ("boxes_complete", "verified_empty")
