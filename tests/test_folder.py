"""Folders of photographs and videos: camera and time from every witness, and whatever else lies in a folder."""
import json
import os
import signal
import subprocess
import sys
import textwrap
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import pytest
import sqlalchemy as sa
from PIL import Image
from typer.testing import CliRunner

from deerml.app.cli import app
from deerml.capture import schema
from deerml.capture.store import Store, frames, image_bytes
from deerml.capture.truth import truths
from deerml.core.clock import parse_time, stamp
from deerml.core.errors import DeermlError
from deerml.core.settings import Home
from deerml.sources.folder import FolderSource, compile_pattern, read_exif, read_name
from deerml.sources.source import bring_in

ROOT = Path(__file__).resolve().parents[1]
CHICAGO = "America/Chicago"


def photograph(seed: int = 0, size=(64, 36), kind: str = "JPEG", outer=(), **inner: object) -> bytes:
    "A photograph with EXIF"
    file, tags = BytesIO(), Image.Exif()
    tags.update(outer)
    tags.get_ifd(0x8769).update({{"time": 0x9003, "offset": 0x9011, "fraction": 0x9291, "serial": 0xA431}[name]: value for name, value in inner.items()})
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1] // 4, size[0] // 4, 3), np.uint8)
    Image.fromarray(cv2.resize(pixels, size)).save(file, kind, exif=tags.tobytes())
    return file.getvalue()


def film(path: Path, seconds: float = 3, rate: float = 10) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*("MJPG" if path.suffix == ".avi" else "mp4v")), rate, (64, 48))
    for number in range(round(seconds * rate)):
        writer.write(np.full((48, 64, 3), number * 8 % 256, np.uint8))
    writer.release()


@pytest.fixture
def card(tmp_path) -> Path:
    (tmp_path / "card").mkdir()
    return tmp_path / "card"


@pytest.fixture
def store(tmp_path):
    with Store.open(Home.create(tmp_path / "home", zone=CHICAGO)) as store:
        yield store


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def rows(store: Store) -> list:
    with store.read() as connection:
        return connection.execute(sa.select(schema.frame.c.camera, schema.frame.c.taken_at, schema.frame.c.time_source, schema.frame.c.night).order_by(schema.frame.c.id)).all()


# -- witnesses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "camera", "moment"), [
    ("gate_20261031_221005.jpg", "gate", "2026-11-01T03:10:05.000Z"),
    ("gate/back-yard_2026-10-31_22-10-05.jpg", "back-yard", "2026-11-01T03:10:05.000Z"),
    ("Front Door 2026-10-31 22.10.05.png", "Front Door", "2026-11-01T03:10:05.000Z"),
    ("cam2-20261031T221005Z.jpg", "cam2", "2026-10-31T22:10:05.000Z"),
    ("cam2-20261031T221005+0100.jpg", "cam2", "2026-10-31T21:10:05.000Z"),
    ("gate_20261031_221005_250.jpg", "gate", "2026-11-01T03:10:05.250Z"),
    ("gate_20261031_221005_snapshot.jpg", "gate", "2026-11-01T03:10:05.000Z"),
    ("gate-1793506205.123456-k2x9qa.jpg", "gate", "2026-11-01T04:10:05.123Z"),
    ("gate_1793506205123.jpg", "gate", "2026-11-01T04:10:05.123Z"),
    ("20261031221005.jpg", None, "2026-11-01T03:10:05.000Z"),
    ("2026-10-31T22:10:05.jpg", None, "2026-11-01T03:10:05.000Z"),
    ("RingVideo_20261031_221005.mp4", None, "2026-11-01T03:10:05.000Z"),
    ("event_20261031_221005.jpg", None, "2026-11-01T03:10:05.000Z"),
    ("DSC00017_20261031_221005.jpg", None, "2026-11-01T03:10:05.000Z"),
    ("IMG_0017_20261031_221005.jpg", None, "2026-11-01T03:10:05.000Z"),
    ("IMG_20261031_2210.jpg", None, "2026-11-01T03:10:00.000Z"),
    ("gate_20261101_013000.jpg", "gate", "2026-11-01T06:30:00.000Z"),  # the hour that comes twice: the first
    ("IMG_0001.JPG", None, None), ("RCNX0017.JPG", None, None), ("gate_20261331_221005.jpg", None, None), ("gate_20261031_251005.jpg", None, None),
    ("gate_20261031.jpg", None, None), ("12345678901234567890.jpg", None, None), ("gate_20261031_2210057777.jpg", None, None), ("20260231_120000.jpg", None, None),
])
def test_what_a_name_says(name, camera, moment):
    found = read_name(name, CHICAGO)
    assert (found.camera, found.taken_at and stamp(found.taken_at)) == (camera, moment)


def test_a_pattern_of_ones_own():
    pattern = compile_pattern(r"(?P<camera>\w+)/(?P<year>\d{4})/(?P<month>\d+)-(?P<day>\d+)/(?P<hour>\d+)h(?P<minute>\d+)")
    assert read_name("pond/2026/7-4/9h5.jpg", "Europe/Berlin", pattern).taken_at == parse_time("2026-07-04T07:05:00Z")
    assert read_name("pond/2026/13-4/9h5.jpg", "Europe/Berlin", pattern).camera == "pond"
    assert read_name("elsewhere.jpg", "UTC", pattern).camera is None
    assert read_name("a/1793506205.jpg", "UTC", compile_pattern(r"(?P<epoch>\d+)")).taken_at == parse_time("2026-11-01T04:10:05Z")


@pytest.mark.parametrize("text", ["(", r"\d", r"(?P<lens>\w)", r"(?P<year>\d{4})(?P<month>\d\d)", r"(?P<hour>\d)"])
def test_a_pattern_that_cannot_be_used(text, card):
    with pytest.raises(DeermlError, match=r"group|expression|time needs"):
        FolderSource(card, pattern=text)


@pytest.mark.parametrize(("exif", "moment"), [
    ({"time": "2026:10:31 22:10:05"}, "2026-11-01T03:10:05.000Z"),
    ({"time": "2026:10:31 22:10:05", "offset": "+01:00"}, "2026-10-31T21:10:05.000Z"),
    ({"time": "2026:10:31 22:10:05", "fraction": "25"}, "2026-11-01T03:10:05.250Z"),
    ({"time": "2026:10:31 22:10:05", "fraction": "123456", "offset": "Z"}, "2026-10-31T22:10:05.123Z"),
    ({"time": "2026:10:31 22:10:05", "offset": "   :  "}, "2026-11-01T03:10:05.000Z"),
    ({"outer": {0x0132: "2026:10:31 22:10:05"}}, "2026-11-01T03:10:05.000Z"),
    ({"time": "0000:00:00 00:00:00"}, None), ({"time": "2026:02:30 00:00:00"}, None), ({"time": "0001:01:01 00:00:00", "offset": "+14:00"}, None), ({"time": "soon"}, None), ({}, None),
])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_what_exif_says(exif, moment, kind):
    found, _ = read_exif(photograph(kind=kind, **exif), CHICAGO)
    assert (found.taken_at and stamp(found.taken_at)) == moment


@pytest.mark.filterwarnings("error")
def test_broken_exif_says_nothing_and_stops_nothing():
    whole = bytearray(photograph(time="2026:10:31 22:10:05", outer={0x0110: "Trail 3"}))
    start = whole.index(b"Exif")
    random = np.random.default_rng(0)
    for _ in range(300):
        broken = whole.copy()
        for place in random.integers(start, start + 150, 4):
            broken[place] = random.integers(0, 256)
        read_exif(bytes(broken), CHICAGO)


def test_who_is_believed(store, card):
    exif = {"outer": {0x010F: "Acme", 0x0110: "Trail 3"}, "serial": "17", "time": "2026:10:30 20:00:00"}
    write(card / "a/IMG_0001.jpg", photograph(1, **exif))
    write(card / "a/pond_20261031_221005.jpg", photograph(2, **exif))
    write(card / "b/pond_20261031_221005.jpg", photograph(3))
    old = write(card / "c/IMG_0004.jpg", photograph(4))
    os.utime(old, (1793500000, 1793500000))
    bring_in(store, FolderSource(card, CHICAGO))
    assert [tuple(row)[:3] for row in rows(store)] == [
        ("Acme Trail 3 17", "2026-10-31T01:00:00.000Z", "exif"), ("pond", "2026-10-31T01:00:00.000Z", "exif"), ("pond", "2026-11-01T03:10:05.000Z", "name"), ("import:card", None, "none")]


def test_the_persons_word_comes_first(store, card):
    write(card / "b/pond_20261031_221005.jpg", photograph(3, time="2026:10:30 20:00:00"))
    old = write(card / "c/IMG_0004.jpg", photograph(4))
    os.utime(old, (1793500000, 1793500000))
    pattern = r"_(?P<year>\d{4})(?P<month>\d\d)(?P<day>\d\d)_(?P<hour>\d\d)(?P<minute>\d\d)(?P<second>\d\d)"
    report = bring_in(store, FolderSource(card, CHICAGO, camera="meadow", pattern=pattern, file_time=True))
    assert [tuple(row)[:3] for row in rows(store)] == [("meadow", "2026-11-01T03:10:05.000Z", "name"), ("meadow", "2026-11-01T02:26:40.000Z", "time")]
    assert report.times == {"name": 1, "time": 1} and report.cameras == {"meadow": 2}


def test_neighbours_without_a_camera_stay_in_one_group(store, card):
    for number, clock in enumerate(("20261031_235900", "20261101_000110", "20261101_130000")):
        write(card / f"{clock}.jpg", photograph(number))
    bring_in(store, FolderSource(card, CHICAGO))
    nights = [row.night for row in rows(store)]
    assert nights[0] == nights[1] != nights[2]


def test_a_new_camera_gets_the_zone_of_the_import(store, card):
    write(card / "pond_20261031_235959.jpg", photograph())
    bring_in(store, FolderSource(card, "Europe/Berlin"))
    with store.read() as connection:
        assert connection.scalar(sa.select(schema.camera.c.zone)) == "Europe/Berlin"
    assert rows(store)[0].night == "2026-10-31"


# -- whatever lies in a folder -----------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_named_and_the_rest_comes_in(store, card):
    whole = photograph(1, (640, 360))
    bad = {"cut.jpg": whole[: len(whole) // 2], "empty.jpg": b"", "text.png": b"deer", "page.jpeg": b"<html>", "head.webp": photograph(2, kind="WEBP")[:60], "zeros.jpg": bytes(2000), "video.mp4": b"no video", "short.avi": b"RIFF"}
    for name, content in bad.items():
        write(card / "deep" / name, content)
    (card / "link.jpg").symlink_to(card / "nowhere.jpg")
    os.mkfifo(card / "pipe.jpg")
    for name in ("notes.txt", "clip.gif", "README", ".hidden.jpg", ".thumbs/a.jpg", "photo.heic"):
        write(card / name, whole)
    (card / "folder.jpg").mkdir()
    for name in ("good.JPG", "großes Reh \n 🦌.jpg"):
        write(card / name, photograph(len(name)))
    with open(os.path.join(os.fsencode(card), b"latin-\xe9.jpg"), "wb") as file:
        file.write(photograph(9))
    report = bring_in(store, FolderSource(card, CHICAGO))
    assert (report.looked_at, report.new, report.unreadable) == (12, 3, 9)
    assert len(frames(store)) == 3 and bring_in(store, FolderSource(card, CHICAGO)).new == 0
    named = json.dumps(report.problems)
    assert "deep/cut.jpg" in named and "deep/video.mp4" in named and "link.jpg" in named
    assert report.notes["passed over: not a photograph or a video (.txt)"] == 1 and report.notes["passed over: not an ordinary file"] == 1 and report.notes["passed over: hidden"] == 1


def test_a_home_is_not_imported_into_itself(store, card):
    write(card / "a.jpg", photograph())
    bring_in(store, FolderSource(card, CHICAGO))
    assert bring_in(store, FolderSource(store.home.path.parent, CHICAGO)).looked_at == 1


def test_everything_stays_unreviewed_and_untouched(store, card):
    paths = [write(card / f"pond_20261031_22100{number}.jpg", photograph(number, outer={274: 6})) for number in range(3)]
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths]
    report = bring_in(store, FolderSource(card, CHICAGO))
    assert report.unreviewed == 3 and report.events == 0
    assert {truth.state(["deer"]) for truth in truths(store, ["deer"], [frame.id for frame in frames(store)]).values()} == {"unreviewed"}
    assert {frame.size for frame in frames(store)} == {(36, 64)} and [image_bytes(store, frame) for frame in frames(store)] == [content for content, _ in before]
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths] == before


def test_an_empty_folder_and_none(store, card, tmp_path):
    assert bring_in(store, FolderSource(card)).sentence == "There is nothing to bring in."
    for path in (tmp_path / "nowhere", write(tmp_path / "file.jpg", b"")):
        with pytest.raises(DeermlError) as caught:
            FolderSource(path)
        assert caught.value.code == "NOT_A_FOLDER"


def test_a_moved_folder_gives_no_second_frame(store, card):
    write(card / "pond_20261031_221005.jpg", photograph())
    bring_in(store, FolderSource(card, CHICAGO))
    moved = card.rename(card.with_name("moved"))
    report = bring_in(store, FolderSource(moved, CHICAGO))
    assert (report.new, report.known, len(frames(store))) == (0, 1, 1)


# -- videos ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".avi", ".mp4"])
def test_a_video_gives_a_frame_every_few_seconds(store, card, suffix):
    film(card / f"pond_20261031_235959{suffix}", seconds=3)
    report = bring_in(store, FolderSource(card, CHICAGO, every=0.5))
    assert report.new == 6 and [row.taken_at[17:] for row in rows(store)] == ["59.000Z", "59.500Z", "00.000Z", "00.500Z", "01.000Z", "01.500Z"]
    brightness = [round(cv2.imdecode(np.frombuffer(image_bytes(store, frame), np.uint8), 1).mean()) for frame in frames(store)]
    assert all(abs(found - number * 5 * 8) < 8 for number, found in enumerate(brightness)), brightness
    assert bring_in(store, FolderSource(card, CHICAGO, every=0.5)).known == 6


def test_the_frames_of_an_undated_video_stay_together(store, card):
    film(card / "clip.avi", seconds=2)
    bring_in(store, FolderSource(card, CHICAGO, every=1))
    assert len(frames(store)) == 2 and {frame.night for frame in frames(store)} == {"clip.avi"}


def test_a_video_that_ends_early(store, card):
    film(card / "pond_20261031_221005.avi", seconds=6)
    path = card / "pond_20261031_221005.avi"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    write(card / "z.jpg", photograph())
    report = bring_in(store, FolderSource(card, CHICAGO, every=1))
    assert report.new >= 2 and report.new + report.unreadable == report.looked_at and frames(store)[-1].camera == "import:card"


# -- interruptions -----------------------------------------------------------------------------------------------------


def test_stopped_and_killed_imports_go_on(card, tmp_path):
    for number in range(40):
        write(card / f"pond_20261031_22{number:02d}00.jpg", photograph(number))
    film(card / "video/pond_20261031_235959.avi", seconds=4)
    home = Home.create(tmp_path / "home", zone=CHICAGO)
    code = f"""
        import os, signal
        from pathlib import Path
        from deerml.capture.store import Store
        from deerml.core.settings import Home
        from deerml.sources.folder import FolderSource
        from deerml.sources.source import bring_in
        def show(done, total):
            if done == 27:
                os.kill(os.getpid(), signal.SIGKILL)
        with Store.open(Home.open(Path({str(home.path)!r}))) as store:
            bring_in(store, FolderSource(Path({str(card)!r}), {CHICAGO!r}, every=1), on_progress=show, batch=10)
        """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ran.returncode == -signal.SIGKILL, ran.stderr

    def interrupt(done: int, _total: int) -> None:
        if done == 43:  # within the video
            raise KeyboardInterrupt

    with Store.open(home) as store:
        assert len(frames(store)) == 20
        with pytest.raises(KeyboardInterrupt):
            bring_in(store, FolderSource(card, CHICAGO, every=1), on_progress=interrupt, batch=2)
        assert len(frames(store)) == 42
        report = bring_in(store, FolderSource(card, CHICAGO, every=1))
        assert report.resumed and (report.looked_at, report.new, len(frames(store))) == (44, 44, 44)
        assert bring_in(store, FolderSource(card, CHICAGO, every=1)).known == 44


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command(card, tmp_path):
    home = Home.create(tmp_path / "home", zone=CHICAGO).path
    write(card / "a/1.jpg", photograph(1))
    write(card / "b/cut.jpg", b"cut")
    film(card / "c/clip.avi", seconds=2)

    def run(*words: object) -> tuple[int, dict]:
        result = CliRunner().invoke(app, ["import", "folder", *map(str, words), "--home", str(home), "--json"])
        return result.exit_code, json.loads(result.stdout)

    status, dry = run(card, "--every", 1, "--camera", "pond", "--dry-run")
    assert status == 0 and (dry["new"], dry["unreadable"], dry["dry_run"]) == (3, 1, True)
    status, done = run(card, "--every", 1, "--camera", "pond", "--zone", "Europe/Berlin", "--file-time")
    assert status == 0 and done["new"] == 3 and done["cameras"] == {"pond": 3}
    assert run(card / "b")[0] == 1
    for words, code in (([card / "nowhere"], "NOT_A_FOLDER"), ([card, "--zone", "Mars"], "BAD_ZONE"), ([card, "--pattern", "("], "BAD_PATTERN"), ([card, "--every", "0"], "BAD_OPTION")):
        assert run(*words)[1]["error"]["code"] == code
    text = CliRunner().invoke(app, ["import", "folder", str(card / "b"), "--home", str(home)]).stdout
    assert "1 could not be read" in text and "cut.jpg" in text
