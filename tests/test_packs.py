"""A review away from the server: the pack that leaves, the verdicts that come back, and everything that can go wrong."""
import io
import json
import os
import shutil
import tarfile
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import permutations
from pathlib import Path

import cv2
import numpy as np
import pytest
import sqlalchemy as sa
from PIL import Image
from typer.testing import CliRunner

from deerml.app.cli import app
from deerml.capture import schema
from deerml.capture.store import NewFrame, Store, add_frames, detections, frames, image_bytes, record_inference
from deerml.capture.truth import BoxVerdict, FrameStatement, TruthBox, Undo, all_correct, all_wrong, record, truths
from deerml.core.box import Box
from deerml.core.clock import now, stamp
from deerml.core.durable import canonical_json, sha256_bytes
from deerml.core.errors import DeermlError
from deerml.core.settings import Home
from deerml.data.packs import (
    NEWEST,
    make_review_pack,
    open_newest_review,
    open_review_pack,
    push_review_pack,
    read_review_pack,
    waiting_windows,
)
from deerml.data.privacy import left, outgoing_copy
from deerml.data.remote import FolderRemote
from deerml.data.verdicts import ReviewPlace, export_verdicts, merge_verdicts, push_verdicts, send_verdicts, sync_review
from deerml.model.bundle import Bundle, Thresholds, seal, spot_draft, spot_model
from deerml.model.detector import Detection
from deerml.review.queue import close_night, drawn_windows
from yards import SPOT, START, picture

CLASSES = ("deer",)
FRAMES = 8  # in four windows of one camera


class Server:
    "A home with one closed night, a bundle, and a folder that both sides see"

    def __init__(self, path: Path):
        self.path, self.folder = path, path / "drive"
        self.folder.mkdir(parents=True)
        self.remote = FolderRemote(self.folder)
        self.store = Store.open(Home.create(path / "yard", zone="America/Chicago", review_remote=str(self.folder), people="show"))
        (path / "model.onnx").write_bytes(spot_model(["deer"]))
        self.bundle = seal(path / "model.onnx", spot_draft(["deer"]), Thresholds(shared={"deer": 0.5}, cameras={"gate": {"deer": 0.6}}), "none", self.store.home.bundles)
        (self.store.home.models / "current").symlink_to(f"bundles/{self.bundle.digest}")
        new = [NewFrame(picture(n, n < 4), "test", str(n), camera="gate", taken_at=START + timedelta(minutes=5 * n), trigger="scheduled") for n in range(FRAMES)]
        self.ids = add_frames(self.store, new)
        # Other ids than a fresh database would give: what travels must be the server's.
        record_inference(self.store, "0" * 64, [(frame_id, [Detection("deer", 0.3, SPOT)], False) for frame_id in self.ids])
        record_inference(self.store, self.bundle.digest, [(frame_id, [Detection("deer", 0.9, SPOT), Detection("deer", 0.2, Box(5, 5, 20, 20))] if n < 6 else [], n < 6) for n, frame_id in enumerate(self.ids)])
        close_night(self.store, frames(self.store)[0].night, self.bundle.digest, budget=4)

    def push(self):
        pack = make_review_pack(self.store, waiting_windows(self.store), self.bundle)
        push_review_pack(self.store, pack, self.remote)
        return pack

    def away(self, name: str = "laptop") -> Store:
        return open_newest_review(self.remote, self.path / name)

    def seen(self, store: Store) -> dict:
        "The boxes that fire, by frame"
        return {frame_id: [one for one in found if one.score > 0.5] for frame_id, found in detections(store, self.bundle.digest).items()}

    def events(self) -> int:
        with self.store.read() as connection:
            return connection.scalar(sa.select(sa.func.count()).select_from(schema.review_event))


@pytest.fixture
def server(tmp_path):
    made = Server(tmp_path)
    yield made
    made.store.close()


@pytest.fixture(scope="module")
def standing(tmp_path_factory) -> Path:
    "A server that was pushed and reviewed: to be copied, which is quicker than making one"
    made = Server(tmp_path_factory.mktemp("standing"))
    made.push()
    with made.away() as away:
        seen = made.seen(away)
        pressed = all_correct(seen[made.ids[0]], CLASSES)
        record(away, "ann", pressed + all_correct(seen[made.ids[1]], CLASSES))
        record(away, "ann", [Undo(made.ids[0], pressed[1].operation_id)])
        (made.path / "written").write_bytes(export_verdicts(away, "ann").data)
    made.store.close()
    return made.path


@pytest.fixture(scope="module")
def members(standing) -> dict[str, bytes]:
    "What is in the pack of that server"
    [path] = (standing / "drive/review").glob("*.tar")
    return members_of(path.read_bytes())


def rewrite(file: bytes, header=None, event=None, number: int = 0) -> bytes:
    "A verdict file with changes to its header and to one of its events"
    lines = [json.loads(line) for line in file.splitlines()]
    lines[0] |= header or {}
    lines[1 + number] |= event or {}
    return b"".join(map(canonical_json, lines))


def judge(server: Server, store: Store, reviewer: str = "ann") -> None:
    "One of everything that can be said"
    seen, ids = server.seen(store), server.ids
    record(store, reviewer, all_correct(seen[ids[0]], CLASSES), source="queue")
    record(store, reviewer, [BoxVerdict(ids[1], "adjusted", "deer", Box(41, 31, 46.5, 30.25), seen[ids[1]][0].id), FrameStatement(ids[1], "all_boxed", CLASSES)])
    record(store, reviewer, [BoxVerdict(ids[2], "missed", "deer", Box(100.5, 12, 30, 20)), FrameStatement(ids[2], "all_boxed", CLASSES)])
    record(store, reviewer, all_wrong(ids[3], seen[ids[3]], CLASSES, nothing_here=True))
    record(store, reviewer, [FrameStatement(ids[4], "unsure", CLASSES)])
    pressed = all_correct(seen[ids[5]], CLASSES)
    record(store, reviewer, pressed)
    record(store, reviewer, [Undo(ids[5], one.operation_id) for one in pressed])
    record(store, reviewer, [FrameStatement(ids[6], "settled", CLASSES, (TruthBox("deer", Box(1.0, 2.0, 30.0, 40.0)),))])


# -- what leaves ---------------------------------------------------------------------------------------------------


def test_a_review_makes_the_same_truth_there_and_here(server):
    pack = server.push()
    away = server.away()
    assert [one.key for one in drawn_windows(away)] == [one.key for one in drawn_windows(server.store)]
    assert detections(away, server.bundle.digest) == detections(server.store, server.bundle.digest, server.ids)
    known = [(frame.id, frame.camera, frame.taken_at, frame.night, frame.window, frame.trigger, frame.size) for frame in frames(server.store)]
    assert known == [(frame.id, frame.camera, frame.taken_at, frame.night, frame.window, frame.trigger, frame.size) for frame in frames(away)]
    judge(server, away)
    sent = push_verdicts(away, server.remote)
    report = merge_verdicts(server.store, server.remote)
    assert (report.files, report.events, report.problems, report.reviewers) == (1, sent, (), ("ann",))
    assert truths(server.store, CLASSES) == truths(away, CLASSES)
    with away.read() as there, server.store.read() as here:
        columns = [column for column in schema.review_event.c if column.name not in ("id", "undoes")]
        query = sa.select(*columns).order_by(schema.review_event.c.operation_id)
        assert there.execute(query).all() == here.execute(query).all()
    assert pack.digest != server.push().digest  # less waits now
    away.close()


def test_the_same_queue_gives_the_same_bytes(server):
    first, second = (make_review_pack(server.store, waiting_windows(server.store), server.bundle) for _ in range(2))
    assert first.data == second.data and first.name == second.name
    server.push(), server.push()
    assert [entry.name for entry in server.remote.list("review/")] == sorted([first.name, NEWEST])


def test_nothing_leaves_unless_the_owner_says_so(server):
    silent = Store(Home(server.store.home.path, server.store.home.settings.model_copy(update={"review_remote": ""})), server.store.engine)
    pack = make_review_pack(silent, waiting_windows(silent), server.bundle)
    for step in (lambda: sync_review(silent, server.bundle), lambda: push_review_pack(silent, pack, server.remote)):
        with pytest.raises(DeermlError, match="unless you say so") as caught:
            step()
        assert caught.value.code == "NOTHING_LEAVES"
    assert server.remote.list("") == [] and left(server.store.home) == []


def test_every_photograph_that_left_is_written_down(server):
    pack = server.push()
    server.push()
    rows = left(server.store.home)
    assert {(row["image"], row["outgoing"]) for row in rows} == {(one.image, one.outgoing) for one in pack.copies} and len(rows) == FRAMES
    assert {row["image"] for row in rows} == {frame.image for frame in frames(server.store)} and {row["pack"] for row in rows} == {pack.digest}


def test_a_pack_holds_no_originals_and_no_database_leaves(server):
    server.push()
    away = server.away()
    judge(server, away)
    push_verdicts(away, server.remote)
    sync_review(server.store, server.bundle)
    content = [server.remote.get(entry.name) for entry in server.remote.list("")]
    assert not any(b"SQLite format 3" in data for data in content)
    assert not any(frame.image.encode() in data or image_bytes(server.store, frame) in data for data in content for frame in frames(server.store))
    assert {entry.name.split("/")[0] for entry in server.remote.list("")} == {"review", "verdicts"}
    away.close()


def photograph(orientation: int) -> bytes:
    "A JPEG with a place, a maker, a comment and something behind its end; upright 96 x 160, the animal at (20, 100, 40, 30)"
    upright = np.random.default_rng(1).integers(0, 40, (160, 96, 3)).astype(np.uint8)
    upright[100:130, 20:60] = 250
    stored = np.rot90(upright, 1) if orientation == 6 else upright  # 6 says: turn me a quarter to the right
    exif = Image.Exif()
    exif[274], exif[271], exif[305] = orientation, "Trailmaster", "Serial 4711"
    exif[34853] = {1: "N", 2: (46.0, 30.0, 12.0), 3: "W", 4: (93.0, 10.0, 5.0)}
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(stored)).save(buffer, "JPEG", quality=95, exif=exif, comment=b"backyard of number 12")
    return buffer.getvalue() + b"hidden behind the end"


@pytest.mark.parametrize("orientation", [1, 6])
def test_exif_is_gone_and_a_box_drawn_there_is_right_here(tmp_path, orientation):
    data = photograph(orientation)
    for secret in (b"Exif", b"Trailmaster", b"4711", b"backyard", b"hidden"):
        assert secret in data and secret not in outgoing_copy(data)
    assert set(jpeg_segments(outgoing_copy(data))) & set(range(0xE1, 0xF0)) == set()
    server = Server(tmp_path)
    [frame_id] = add_frames(server.store, [NewFrame(data, "test", "turned", camera="lawn", taken_at=START + timedelta(days=1), trigger="scheduled")])
    close_night(server.store, frames(server.store)[-1].night, server.bundle.digest)
    server.push()
    away = server.away()
    [frame] = [frame for frame in frames(away) if frame.id == frame_id]
    assert frame.size == (96, 160)
    seen = cv2.imdecode(np.frombuffer(image_bytes(away, frame), np.uint8), cv2.IMREAD_COLOR)
    bright = np.argwhere(seen.min(2) > 150)
    (top, leftmost), (bottom, right) = bright.min(0), bright.max(0) + 1
    drawn = Box(float(leftmost), float(top), float(right - leftmost), float(bottom - top))
    assert np.allclose(drawn.xywh, (20, 100, 40, 30), atol=1)
    record(away, "ann", [BoxVerdict(frame_id, "missed", "deer", drawn), FrameStatement(frame_id, "all_boxed", CLASSES)])
    push_verdicts(away, server.remote)
    assert merge_verdicts(server.store, server.remote).problems == ()
    assert truths(server.store, CLASSES, [frame_id])[frame_id].of["deer"].boxes == (drawn,)
    away.close()
    server.store.close()


def jpeg_segments(data: bytes) -> list[int]:
    "The markers before the pixels"
    found, position = [], 2
    while data[position] == 0xFF and data[position + 1] != 0xDA:
        found.append(data[position + 1])
        position += 2 + int.from_bytes(data[position + 2:position + 4], "big")
    return found


def test_a_broken_frame_is_left_out_and_named(server):
    path = next(server.store.home.images.rglob("*.jpg"))
    path.unlink()
    pack = server.push()
    assert len(pack.left_out) == 1 and len(pack.content.frames) == FRAMES - 1
    assert "1 frame without a usable image" in sync_review(server.store, server.bundle).sentence


def test_a_second_opening_goes_on_where_the_first_stopped(server):
    server.push()
    away = server.away()
    judge(server, away)
    away.close()
    again = server.away()
    assert truths(again, CLASSES) and push_verdicts(again, server.remote)
    again.close()


def test_a_pack_is_never_opened_in_another_database(server, monkeypatch):
    server.push()
    monkeypatch.setenv("DEERML_DATABASE_URL", f"sqlite:///{server.store.home.path / 'deerml.db'}")
    with pytest.raises(DeermlError) as caught:
        server.away()
    assert caught.value.code == "DATABASE_SET" and [path.suffix for path in (server.path / "laptop").iterdir()] == [".tar"]


# -- a pack that was tampered with -----------------------------------------------------------------------------------


def members_of(data: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}


def packed(folder: Path, members: dict[str, bytes], *more: tarfile.TarInfo) -> Path:
    "A tar under the name of its content"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info in more:
            archive.addfile(info, io.BytesIO(bytes(info.size)))
    path = folder / f"{sha256_bytes(buffer.getvalue())}.tar"
    path.write_bytes(buffer.getvalue())
    return path


def content_with(**changes):
    return lambda content: content.update(changes)


def in_frame(**changes):
    return lambda content: content["frames"][0].update(changes)


def in_detection(**changes):
    return lambda content: content["frames"][0]["detections"][0].update(changes)


@pytest.mark.parametrize(("change", "code"), [
    (content_with(schema_version=2), "NEWER_PACK"),
    (content_with(schema_version=0), "BAD_PACK"),
    (content_with(schema_version="1; drop table"), "BAD_PACK"),
    (content_with(format="other"), "BAD_PACK"),
    (content_with(classes=[]), "BAD_PACK"),
    (content_with(classes=["deer", "deer"]), "BAD_PACK"),
    (content_with(settings={"zone": "Mars/One"}), "BAD_PACK"),
    (content_with(settings={"weekly_windows": -3}), "BAD_PACK"),
    (content_with(cameras=[]), "BAD_PACK"),
    (content_with(cameras=[{"id": "gate", "name": "gate", "zone": "Nowhere"}]), "BAD_PACK"),
    (content_with(cameras=[{"id": "gate", "name": "gate", "zone": "UTC"}] * 2), "BAD_PACK"),
    (content_with(bundle="f" * 64), "BAD_PACK"),
    (content_with(serving="{}"), "BAD_PACK"),
    (content_with(serving=None), "BAD_PACK"),
    (content_with(frames=[]), "BAD_PACK"),
    (content_with(more="fields"), "BAD_PACK"),
    (in_frame(id=2), "BAD_PACK"),
    (in_frame(id=-1), "BAD_PACK"),
    (in_frame(id=1 << 70), "BAD_PACK"),
    (in_frame(key="../../x"), "BAD_PACK"),
    (in_frame(image="0" * 64), "BAD_PACK"),
    (in_frame(width=161), "BAD_PACK"),
    (in_frame(width=10**9), "BAD_PACK"),
    (in_frame(taken_at="yesterday"), "BAD_PACK"),
    (in_frame(taken_at="2026-09-01T22:00:00+02:00"), "BAD_PACK"),
    (in_frame(camera="lawn"), "BAD_PACK"),
    (in_frame(night="x" * 300), "BAD_PACK"),
    (in_frame(fired=None), "BAD_PACK"),
    (in_detection(box=[1, 2, -3, 4]), "BAD_PACK"),
    (in_detection(box=[1, 2, 3]), "BAD_PACK"),
    (in_detection(score=7), "BAD_PACK"),
    (in_detection(id=0), "BAD_PACK"),
    (lambda content: content["draws"][0].update(windows=content["draws"][0]["windows"] * 2), "BAD_PACK"),
    (lambda content: content["draws"][0].update(strata=content["draws"][0]["strata"] * 2), "BAD_PACK"),
    (lambda content: content["draws"][0].update(strata=[]), "BAD_PACK"),
    (lambda content: content["draws"][0].update(closed_at="late"), "BAD_PACK"),
    (lambda content: content["draws"][0]["windows"][0].update(camera="lawn"), "BAD_PACK"),
])
def test_a_pack_whose_content_lies_is_refused(tmp_path, members, change, code):
    content = json.loads(members["review.json"])
    change(content)
    path = packed(tmp_path, {**members, "review.json": json.dumps(content).encode()})
    refused(path, tmp_path / "laptop", code)


def refused(path: Path, folder: Path, code: str) -> None:
    folder.mkdir(exist_ok=True)
    with pytest.raises(DeermlError) as caught:
        open_review_pack(path, folder)
    assert caught.value.code == code and list(folder.iterdir()) == []


def link(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


@pytest.mark.parametrize("more", [
    tarfile.TarInfo("../../outside"), tarfile.TarInfo("/etc/cron.d/x"), tarfile.TarInfo("review.json"), tarfile.TarInfo("images/../../../x/" + "a" * 46 + ".jpg"),
    link(f"images/{'a' * 64}.jpg", tarfile.SYMTYPE), link(f"images/{'a' * 64}.jpg", tarfile.LNKTYPE), link("images", tarfile.DIRTYPE), link(f"images/{'a' * 64}.jpg", tarfile.FIFOTYPE),
    tarfile.TarInfo(f"images/{'a' * 64}.jpg"),
])
def test_a_pack_with_something_else_in_it_is_refused(tmp_path, members, more):
    refused(packed(tmp_path, members, more), tmp_path / "laptop", "BAD_PACK")
    assert not (tmp_path.parent / "outside").exists()


@pytest.mark.parametrize("edit", [
    lambda data: data[:len(data) // 2], lambda data: data[:700], lambda data: b"", lambda data: b"not a tar" * 100, lambda data: data[512:], lambda data: os.urandom(4096)])
def test_a_pack_that_was_not_delivered_whole_is_refused(tmp_path, members, edit):
    data = edit(packed(tmp_path, members).read_bytes())
    path = tmp_path / f"{sha256_bytes(data)}.tar"
    path.write_bytes(data)
    refused(path, tmp_path / "laptop", "BAD_PACK")


def test_a_name_that_is_not_the_content_is_refused(tmp_path, members):
    path = packed(tmp_path, members).rename(tmp_path / f"{'0' * 64}.tar")
    refused(path, tmp_path / "laptop", "BAD_PACK")


@pytest.mark.parametrize("image", [b"", b"\xff\xd8\xff\xe0 cut off", photograph(6), picture(1)[:-40]], ids=["empty", "nonsense", "turned", "torn"])
def test_an_image_in_a_pack_that_is_none_is_refused(tmp_path, members, image):
    content, name = json.loads(members["review.json"]), sha256_bytes(image)
    members = {name: data for name, data in members.items() if content["frames"][0]["image"] not in name}
    content["frames"][0].update(image=name, width=96, height=160)
    refused(packed(tmp_path, {**members, f"images/{name}.jpg": image, "review.json": json.dumps(content).encode()}), tmp_path / "laptop", "BAD_PACK")


def test_a_half_delivered_pack_is_fetched_again(server):
    pack = server.push()
    (server.folder / pack.name).write_bytes(pack.data[:1000])
    with pytest.raises(DeermlError):
        server.away()
    (server.folder / pack.name).write_bytes(pack.data)
    server.away().close()


# -- verdicts that come back -----------------------------------------------------------------------------------------


@dataclass
class Arrived:
    "A copy of that server, with an empty folder beside it"

    store: Store
    remote: FolderRemote
    folder: Path
    bundle: Bundle

    events = Server.events


@pytest.fixture
def arrived(standing, tmp_path):
    shutil.copytree(standing / "yard", tmp_path / "yard", symlinks=True)
    (tmp_path / "drive").mkdir()
    toml = tmp_path / "yard/deerml.toml"
    toml.write_text(toml.read_text().replace(str(standing), str(tmp_path)))
    home = Home.open(tmp_path / "yard")
    with Store.open(home) as store:
        yield Arrived(store, FolderRemote(tmp_path / "drive"), tmp_path / "drive", Bundle.load(home.models / "current"))


@pytest.fixture(scope="module")
def written(standing) -> bytes:
    "A whole verdict file of five events: two boxes and two statements, one undo"
    return (standing / "written").read_bytes()


FUTURE = stamp(now() + timedelta(days=3))


@pytest.mark.parametrize(("spoil", "code"), [
    (lambda data: data[:-1], "BAD_FILE"),
    (lambda data: data[:-30], "BAD_FILE"),
    (lambda data: b"".join(data.splitlines(True)[:-1]), "BAD_FILE"),
    (lambda data: b"".join(data.splitlines(True)[1:]), "BAD_FILE"),
    (lambda data: b"", "BAD_FILE"),
    (lambda data: b"\n", "BAD_FILE"),
    (lambda data: b"[" * 100_000 + b"\n", "BAD_FILE"),
    (lambda data: bytes(range(256)) + b"\n", "BAD_FILE"),
    (lambda data: data.replace(b'"kind":"box"', b'"kind":"boxes"', 1), "BAD_FILE"),
    (lambda data: rewrite(data, event={"more": 1}), "BAD_FILE"),
    (lambda data: rewrite(data, header={"schema_version": 2}), "OTHER_SCHEMA"),
    (lambda data: rewrite(data, header={"schema_version": 0}), "OTHER_SCHEMA"),
    (lambda data: rewrite(data, header={"format": "other"}), "BAD_FILE"),
    (lambda data: rewrite(data, header={"reviewer": ""}), "BAD_FILE"),
    (lambda data: rewrite(data, header={"events": 6}), "BAD_FILE"),
    (lambda data: rewrite(data, event={"frame": "a" * 64}), "UNKNOWN_FRAME"),
    (lambda data: rewrite(data, event={"detection": 10_000}), "UNKNOWN_DETECTION"),
    (lambda data: rewrite(data, event={"bundle": "0" * 64}), "UNKNOWN_DETECTION"),
    (lambda data: rewrite(data, event={"box": [150, 30, 48, 32]}), "BAD_FILE"),
    (lambda data: rewrite(data, event={"box": [40, 30, 0, 32]}), "BAD_FILE"),
    (lambda data: rewrite(data, event={"box": None, "verdict": "missed"}), "BAD_FILE"),
    (lambda data: rewrite(data, event={"verdict": "perhaps"}), "BAD_FILE"),
    (lambda data: rewrite(data, event={"made_at": "noon"}), "BAD_FILE"),
    (lambda data: rewrite(data, event={"made_at": FUTURE}), "BAD_FILE"),
    (lambda data: rewrite(data, event={"undoes": "never said"}, number=4), "WAITS"),
])
def test_a_file_that_cannot_be_used_is_named_and_nothing_of_it_stored(arrived, written, spoil, code):
    arrived.remote.put("verdicts/0-bad.jsonl", spoil(written))
    report = merge_verdicts(arrived.store, arrived.remote)
    assert [(problem.file, problem.code) for problem in report.problems] == [("verdicts/0-bad.jsonl", code)] and report.problems[0].text
    assert arrived.events() == report.events == 0
    arrived.remote.put("verdicts/1-good.jsonl", written)
    report = merge_verdicts(arrived.store, arrived.remote)
    assert arrived.events() == report.events == 5 and len(report.problems) == 1  # the others go on, and it is told again


def test_an_operation_that_is_known_as_something_else_is_refused(arrived, written):
    arrived.remote.put("verdicts/a.jsonl", written)
    merge_verdicts(arrived.store, arrived.remote)
    arrived.remote.put("verdicts/b.jsonl", rewrite(written, event={"verdict": "false_positive"}))
    assert [problem.code for problem in merge_verdicts(arrived.store, arrived.remote).problems] == ["OTHER_EVENT"] and arrived.events() == 5


def test_a_file_that_is_too_large_is_not_read(arrived, monkeypatch):
    monkeypatch.setattr("deerml.data.verdicts.MAX_VERDICT_BYTES", 10)
    arrived.remote.put("verdicts/a.jsonl", b"x" * 11)
    assert merge_verdicts(arrived.store, arrived.remote).problems[0].code == "BAD_FILE"


def test_merging_again_or_twice_the_same_stores_nothing_twice(arrived, written):
    arrived.remote.put("verdicts/a.jsonl", written)
    arrived.remote.put("verdicts/copy-of-a.jsonl", written)
    arrived.remote.put("verdicts/b.jsonl", rewrite(written, header={"client": "pushed again after a crash"}))
    first = merge_verdicts(arrived.store, arrived.remote)
    assert (first.files, first.events, first.repeated) == (2, 5, 5) and arrived.events() == 5
    known = truths(arrived.store, CLASSES)
    for _ in range(2):
        again = merge_verdicts(arrived.store, arrived.remote)
        assert (again.files, again.events, again.problems) == (0, 0, ()) and truths(arrived.store, CLASSES) == known


def test_a_dry_run_changes_nothing(arrived, written):
    arrived.remote.put("verdicts/a.jsonl", written)
    before = arrived.remote.list(""), left(arrived.store.home)
    report = sync_review(arrived.store, arrived.bundle, dry_run=True)
    assert report.merged.events == 5 and report.frames == FRAMES and arrived.events() == 0
    assert (arrived.remote.list(""), left(arrived.store.home)) == before
    assert sync_review(arrived.store, arrived.bundle).merged.events == 5


@pytest.mark.parametrize(("order", "together"), [*((order, False) for order in permutations(range(3))), ((2, 1, 0), True), ((1, 2, 0), True)])
def test_files_in_any_order_give_the_same_truth(server, order, together):
    server.push()
    away = server.away()
    pressed = all_correct(server.seen(away)[server.ids[0]], CLASSES)
    undone = [Undo(server.ids[0], one.operation_id) for one in pressed]
    redone = all_wrong(server.ids[0], server.seen(away)[server.ids[0]], CLASSES, nothing_here=True)
    again = all_wrong(server.ids[1], server.seen(away)[server.ids[1]], CLASSES, nothing_here=True)
    files = []
    for said in (pressed + all_correct(server.seen(away)[server.ids[1]], CLASSES), undone + redone, [Undo(server.ids[0], one.operation_id) for one in undone] + again):
        record(away, "ann", said)
        files.append(export_verdicts(away, "ann"))
        push_verdicts(away, server.remote)
    wanted = truths(away, CLASSES)
    for entry in server.remote.list("verdicts/"):
        (server.folder / entry.name).unlink()
    for place in order:
        server.remote.put(f"verdicts/{order.index(place)}-{place}.jsonl", files[place].data)
        if not together:
            merge_verdicts(server.store, server.remote)
    report = merge_verdicts(server.store, server.remote)
    assert report.problems == () and truths(server.store, CLASSES) == wanted and server.events() == 12
    away.close()


def test_a_late_word_does_not_outvote_a_newer_one(server):
    server.push()
    away, frame_id = server.away(), server.ids[0]
    record(away, "ann", all_correct(server.seen(away)[frame_id], CLASSES))
    push_verdicts(away, server.remote)
    record(server.store, "ann", all_wrong(frame_id, server.seen(server.store)[frame_id], CLASSES, nothing_here=True))
    merge_verdicts(server.store, server.remote)
    assert truths(server.store, CLASSES)[frame_id].state(CLASSES) == "verified_empty"
    away.close()


def test_two_reviewers_away_make_a_dispute_here(server):
    server.push()
    frame_id = server.ids[0]
    for name, said in (("ann", lambda seen: all_correct(seen, CLASSES)), ("ben", lambda seen: all_wrong(frame_id, seen, CLASSES, nothing_here=True))):
        away = server.away(name)
        record(away, name, said(server.seen(away)[frame_id]))
        push_verdicts(away, server.remote)
        away.close()
    report = merge_verdicts(server.store, server.remote)
    assert report.reviewers == ("ann", "ben") and truths(server.store, CLASSES)[frame_id].state(CLASSES) == "disputed"


def test_only_what_was_not_pushed_is_pushed(server):
    server.push()
    away = server.away()
    assert export_verdicts(away, "ann") is None and push_verdicts(away, server.remote) == 0
    for number in range(3):
        record(away, "ann", all_correct(server.seen(away)[server.ids[number]], CLASSES))
        assert push_verdicts(away, server.remote) == 2
    assert len(server.remote.list("verdicts/")) == 3 and merge_verdicts(server.store, server.remote).repeated == 0
    away.close()


# -- a remote that fails ---------------------------------------------------------------------------------------------


class Failing:
    "A remote whose n-th call fails, before or after it did its work"

    def __init__(self, remote: FolderRemote, fails_at: int, after: bool):
        self.remote, self.fails_at, self.after, self.calls = remote, fails_at, after, 0
        self.place = remote.place

    def __getattr__(self, name):
        def call(*arguments):
            self.calls += 1
            failing = self.calls == self.fails_at
            if failing and not self.after:
                raise DeermlError("NO_REMOTE", "The drive went away.")
            answer = getattr(self.remote, name)(*arguments)
            if failing:
                raise DeermlError("NO_REMOTE", "The drive went away.")
            return answer
        return call


def everything(server: Server, remote) -> None:
    "All that is done with a remote, each step once"
    sync_review(server.store, server.bundle, remote)
    with open_newest_review(remote, server.path / "laptop") as away:
        if not truths(away, CLASSES) and len(frames(away)) == FRAMES:
            judge(server, away)
        send_verdicts(ReviewPlace(away, remote))
    sync_review(server.store, server.bundle, remote)


def test_a_failure_at_any_call_loses_nothing_and_the_repeat_succeeds(tmp_path, request):
    "The fast tier takes every fifth point, `--slow` takes all"
    whole = Server(tmp_path / "whole")
    counting = Failing(whole.remote, 0, False)
    everything(whole, counting)
    wanted = {frame_id: truth.of for frame_id, truth in truths(whole.store, CLASSES).items()}
    whole.store.close()
    points = [(at, after) for at in range(1, counting.calls + 1) for after in (False, True)]
    assert counting.calls > 8 and len(wanted) == 7
    for at, after in points if request.config.getoption("--slow") else points[::5]:
        server = Server(tmp_path / f"{at}-{after}")
        try:
            everything(server, Failing(server.remote, at, after))
        except DeermlError as error:
            assert error.code == "NO_REMOTE"
        everything(server, server.remote)
        assert merge_verdicts(server.store, server.remote).problems == ()
        assert {frame_id: truth.of for frame_id, truth in truths(server.store, CLASSES).items()} == wanted
        out = {name.removeprefix("images/").removesuffix(".jpg") for entry in server.remote.list("review/") if entry.name.endswith(".tar")
               for name in members_of(server.remote.get(entry.name)) if name != "review.json"}
        assert out <= {row["outgoing"] for row in left(server.store.home)}
        server.store.close()


def test_verdicts_of_a_pack_that_is_no_longer_the_newest_are_sent_too(server):
    server.push()
    with server.away() as away:
        record(away, "ann", all_correct(server.seen(away)[server.ids[0]], CLASSES))
    record(server.store, "ben", [FrameStatement(frame_id, "nothing_here", CLASSES) for frame_id in server.ids[6:]])
    server.push()
    with server.away() as newer:
        assert len(frames(newer)) < FRAMES
        assert send_verdicts(ReviewPlace(newer, server.remote)).startswith("Sent: 2 review events.")
    assert merge_verdicts(server.store, server.remote).events == 2


def test_a_crash_while_opening_leaves_no_half_home(server, monkeypatch):
    server.push()
    monkeypatch.setattr("deerml.data.packs._insert", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        server.away()
    monkeypatch.undo()
    server.away().close()


# -- the command -----------------------------------------------------------------------------------------------------


def command(home: Path, *words: str) -> tuple[int, dict]:
    result = CliRunner().invoke(app, ["sync", "review", "--home", str(home), "--json", *words])
    return result.exit_code, json.loads(result.stdout)


def test_the_command_goes_both_ways(arrived, written):
    home = arrived.store.home.path
    arrived.remote.put("verdicts/a.jsonl", written)
    code, said = command(home, "--dry-run")
    assert code == 0 and said["merged"]["events"] == 5 and arrived.events() == 0
    code, said = command(home)
    assert code == 0 and said["merged"]["events"] == 5 and said["frames"] and read_review_pack(arrived.folder / said["pack"])
    arrived.remote.put("verdicts/torn.jsonl", written[:-9])
    code, said = command(home)
    assert code == 1 and said["merged"]["problems"][0]["file"] == "verdicts/torn.jsonl"
    shutil.rmtree(arrived.folder)
    code, said = command(home)
    assert code == 75 and said["error"]["code"] == "NO_REMOTE"


def test_the_report_is_for_people(server):
    report = sync_review(server.store, server.bundle)
    assert report.sentence.startswith("No new verdicts arrived. The review pack: 4 windows with 8 photographs (")
    assert "so no pack was made" in replace(report, pack=None).sentence
