"""Datasets on their way to a trainer: what leaves and what must not, what a broken line leaves behind, what it costs."""
import gzip
import io
import json
import os
import shutil
import socket
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import cv2
import numpy as np
import pytest
import sqlalchemy as sa
from PIL import Image
from typer.testing import CliRunner

from deerml.app.cli import app
from deerml.capture import schema
from deerml.capture.store import NewFrame, Store, add_frames, frames, image_bytes, record_inference
from deerml.capture.truth import BoxVerdict, FrameStatement, record
from deerml.core.box import Box
from deerml.core.durable import canonical_json, sha256_bytes
from deerml.core.errors import DeermlError
from deerml.core.settings import Home
from deerml.data import push as pushing
from deerml.data import shelf as shelf_module
from deerml.data.bucket import FsspecRemote, open_remote
from deerml.data.custody import sync_status, verify_remote, what_left
from deerml.data.manifest import open_version, verify_version
from deerml.data.packs import make_review_pack
from deerml.data.privacy import HOURS, NEVER, OVER_ANIMAL, PEOPLE, UNLOOKED, departures, left, outgoing_copy
from deerml.data.pull import pull_dataset
from deerml.data.push import push_dataset
from deerml.data.remote import FolderRemote
from deerml.data.shelf import POINTER, Pack, read_pack, read_shelf, step_name
from deerml.data.split import split_of, splits
from deerml.data.version import freeze
from deerml.model.bundle import Thresholds, seal, spot_draft, spot_model
from deerml.model.detector import Detection, decode
from deerml.train.copies import copy_material, read_material
from yards import AFTER, SPOT, START, picture, yard

COCO = "c0" * 32  # digest of a bundle that knows people
OPERATIONS = ("list", "get", "get_to", "put", "replace")


class Watched:
    """A remote that counts calls and bytes, and can break on one of them: before anything happened, or after it happened
    but before the caller heard of it."""

    def __init__(self, inner, break_at: int = 0, heard: bool = False, on_call=None):
        self.inner, self.place, self.break_at, self.heard, self.on_call = inner, inner.place, break_at, heard, on_call
        self.calls: list[str] = []
        self.sent = self.received = 0

    def _call(self, operation, *arguments):
        self.calls.append(operation)
        breaks = len(self.calls) == self.break_at
        if breaks and not self.heard:
            raise self.broken()
        result = getattr(self.inner, operation)(*arguments)
        if self.on_call:
            self.on_call()
        if breaks:
            raise self.broken()
        return result

    def broken(self) -> DeermlError:
        return DeermlError("NO_REMOTE", f"Call {self.break_at} failed.", exit_code=75)

    def list(self, prefix):
        return self._call("list", prefix)

    def get(self, name):
        data = self._call("get", name)
        self.received += len(data)
        return data

    def get_to(self, name, path):
        self._call("get_to", name, path)
        self.received += path.stat().st_size

    def put(self, name, data):
        self._call("put", name, data)
        self.sent += data.stat().st_size if isinstance(data, Path) else len(data)

    def replace(self, name, data):
        self._call("replace", name, data)
        self.sent += len(data)


class House:
    "A reviewed yard with a frozen version, and a folder that a trainer sees too"

    def __init__(self, path: Path, **settings):
        self.path = path
        (path / "drive").mkdir(exist_ok=True)
        self.remote = FolderRemote(path / "drive")
        self.store = Store.open(Home.open(path / "yard"))
        self.set(remote=str(path / "drive"), leave="labelled", people="show", **settings)

    def set(self, **changes) -> None:
        home = self.store.home
        self.store.home = Home(home.path, home.settings.model_copy(update=changes))

    def push(self, remote=None, **options):
        return push_dataset(self.store, remote or self.remote, **options)

    def pull(self, name: str = "trainer"):
        return pull_dataset(self.remote, self.path / name)

    def add(self, data: bytes, name: str, night: int, camera: str = "gate", box: Box = SPOT, minutes: int = 0) -> int:
        "A reviewed frame with an animal, on another night than those that are there"
        [frame_id] = add_frames(self.store, [NewFrame(data, "new", name, camera=camera, taken_at=START + timedelta(days=night, minutes=minutes), trigger="scheduled")])
        record(self.store, "ann", [BoxVerdict(frame_id, "missed", "deer", box), FrameStatement(frame_id, "all_boxed", ("deer",))])
        return frame_id

    def training_night(self, start: int = 30) -> int:
        "A night that will be in the train split"
        salt = self.store.home.settings.split_salt
        return next(n for n in range(start, 400) if split_of(salt, f"gate/{(START + timedelta(days=n)).date()}") == "train")

    def freeze(self):
        return freeze(self.store, AFTER + timedelta(days=100), force=True).version

    def frame_ids(self, split: str) -> list[int]:
        images = {image for image, where in open_version(self.store.home.datasets).manifest["images"].items() if where == split}
        return [frame.id for frame in frames(self.store) if frame.image in images]

    def there(self) -> dict[str, bytes]:
        "Every photograph on the remote, from all its packs"
        import tarfile
        found = {}
        for entry in self.remote.list("data/packs/"):
            with tarfile.open(fileobj=io.BytesIO(self.remote.get(entry.name))) as archive:
                found |= {member.name[7:-4]: archive.extractfile(member).read() for member in archive}
        return found


@pytest.fixture(scope="module")
def standing(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("standing")
    store = yard(path / "yard", nights=12, exam_nights=0)
    freeze(store, AFTER, force=True)
    store.close()
    return path


@pytest.fixture
def house(standing, tmp_path):
    made = House(Path(shutil.copytree(standing, tmp_path / "house")))
    yield made
    made.store.close()


def state(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def code_of(what) -> str:
    with pytest.raises(DeermlError) as caught:
        what()
    return caught.value.code


# -- what leaves ---------------------------------------------------------------------------------------------------


def test_no_test_photograph_leaves(house):
    house.push()
    there = house.there()
    split = splits(house.store)
    images = {frame.image: (split[frame.night_key], outgoing_copy(image_bytes(house.store, frame))) for frame in frames(house.store) if frame.night_key in split}
    assert Counter(where for where, _ in images.values()).keys() == {"train", "val", "test"}
    for where, copy in images.values():
        assert where != "test" or (sha256_bytes(copy) not in there and copy not in there.values())
    assert set(there) <= {sha256_bytes(copy) for where, copy in images.values() if where != "test"}
    assert there and not set(there) & set(images)  # copies, never originals


def test_a_test_photograph_in_the_wrong_folder_stops_everything(house):
    version = open_version(house.store.home.datasets)
    name = "annotations/train.json"
    document, test = (json.loads((version.path / f"annotations/{split}.json").read_bytes()) for split in ("train", "test"))
    stray = test["images"][0]
    document["images"].append({**stray, "id": 9999, "file_name": stray["file_name"].replace("images/test", "images/train")})
    path = version.path / name
    path.chmod(0o644)
    path.write_bytes(canonical_json(document))
    assert code_of(house.push) == "DATASET_DAMAGED"
    manifest = version.manifest | {"files": version.manifest["files"] | {name: sha256_bytes(path.read_bytes())}}
    (version.path / "manifest.json").write_bytes(canonical_json(manifest))
    assert code_of(house.push) == "TEST_IMAGE"
    assert house.remote.list("") == [] and left(house.store.home) == []


@pytest.mark.parametrize(("settings", "code"), [
    ({"remote": ""}, "NOTHING_LEAVES"), ({"leave": "nothing"}, "NOTHING_LEAVES"), ({"people": "withhold"}, "PEOPLE_UNKNOWN"), ({"people": "blur"}, "PEOPLE_UNKNOWN"),
    ({"never_leave": ["gaet"]}, "BAD_SETTINGS"), ({"people": "withhold", "people_hours": ["gate 6-22"]}, "BAD_SETTINGS")])
def test_nothing_leaves_before_the_owner_has_said_everything(house, settings, code):
    house.set(**settings)
    assert code_of(house.push) == code
    assert house.remote.list("") == [] and left(house.store.home) == []


def test_every_photograph_on_the_remote_is_written_down(house):
    house.push()
    rows = left(house.store.home)
    assert {row["outgoing"] for row in rows} == set(house.there()) and {row["for"] for row in rows} == {"training"}
    copies = {frame.image: outgoing_copy(image_bytes(house.store, frame)) for frame in frames(house.store)}
    assert all(sha256_bytes(copies[row["image"]]) == row["outgoing"] for row in rows)
    assert {gone.camera for gone in what_left(house.store)} == {"gate"}


def photograph(orientation: int, seed: int = 1) -> bytes:
    "A JPEG with a place and a maker; upright 160 x 96, the animal at SPOT"
    upright = np.random.default_rng(seed).integers(0, 40, (96, 160, 3)).astype(np.uint8)
    upright[30:62, 40:88] = 250
    exif = Image.Exif()
    exif[274], exif[271] = orientation, "Trailmaster"
    exif[34853] = {1: "N", 2: (46.0, 30.0, 12.0)}
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(np.rot90(upright, 1) if orientation == 6 else upright)).save(buffer, "JPEG", quality=95, exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize("side", [0, 80])
def test_orientation_is_baked_in_and_boxes_fit_the_copy(house, side):
    house.set(leave_side=side)
    night = house.training_night()
    house.add(photograph(6), "turned", night)
    house.freeze()
    house.push()
    version = house.pull().version
    assert all(b"Exif" not in data and b"Trailmaster" not in data for data in house.there().values())
    document = json.loads((version.path / "annotations/train.json").read_bytes())
    [shown] = [one for one in document["images"] if one["night"] == (START + timedelta(days=night)).date().isoformat()]
    [note] = [one for one in document["annotations"] if one["image_id"] == shown["id"]]
    pixels = decode((version.path / shown["file_name"]).read_bytes())
    assert pixels.shape[:2] == (shown["height"], shown["width"]) == ((96, 160) if not side else (48, 80))
    bright = np.argwhere(pixels.min(2) > 150)
    (top, leftmost), (bottom, right) = bright.min(0), bright.max(0) + 1
    assert np.allclose(note["bbox"], (leftmost, top, right - leftmost, bottom - top), atol=1.01)
    label = (version.path / "labels/train" / f"{Path(shown['file_name']).stem}.txt").read_text().split()
    assert np.allclose([float(value) for value in label[1:]], SPOT.to_yolo((160, 96)), atol=1e-6)


def test_people_are_withheld_or_blurred_and_a_stricter_policy_replaces_the_copy(house):
    chosen = house.frame_ids("train")
    every = [frame.id for frame in frames(house.store)]
    person = Box(110, 20, 30, 60)
    record_inference(house.store, COCO, [(frame_id, [Detection("person", 0.5, person)] if frame_id in chosen[:2] else [Detection("dog", 0.9, person)], False) for frame_id in every if frame_id != chosen[2]], role="judge")
    before = house.push()
    house.set(people="withhold", people_bundle=COCO)
    plan = house.push(dry_run=True, allow_removal=True)
    assert plan.withheld == {PEOPLE: 2, UNLOOKED: 1} and plan.removed == 3
    house.set(people="blur")
    blurred = house.push(allow_removal=True)
    assert (blurred.new, blurred.withheld, blurred.images) == (2, {UNLOOKED: 1}, before.images - 1)
    images = {frame.id: frame for frame in frames(house.store)}
    shelf = read_shelf(house.remote)
    for frame_id in chosen[:2]:
        old, new = (outgoing_copy(image_bytes(house.store, images[frame_id]), people) for people in ((), (person,)))
        assert sha256_bytes(old) not in shelf.labels and sha256_bytes(new) in shelf.labels
        part = decode(new)[25:75, 114:136]
        assert part.std() < 0.5 * decode(old)[25:75, 114:136].std()
    house.set(people="withhold", people_bundle="", people_hours=["gate"])
    assert house.push(dry_run=True, allow_removal=True).withheld == {HOURS: before.images}


def test_the_bundle_for_people_looks_before_anything_leaves(house):
    path = house.path / "model.onnx"
    path.write_bytes(spot_model(["person"]))
    bundle = seal(path, spot_draft(["person"]), Thresholds(shared={"person": 0.5}), "none", house.store.home.bundles)
    house.set(people="withhold", people_bundle=bundle.digest)
    assert set(house.push(dry_run=True).withheld) == {UNLOOKED}
    counts = open_version(house.store.home.datasets).manifest["counts"]
    done = house.push()  # the bundle takes each bright rectangle for a person
    assert done.withheld == {PEOPLE: counts["train"]["animals"] + counts["val"]["animals"]} and done.new == counts["train"]["empty"] + counts["val"]["empty"] > 0


def test_a_blur_that_hides_the_animal_withholds_the_photograph(house):
    [frame_id] = house.frame_ids("train")[:1]
    every = [frame.id for frame in frames(house.store)]
    record_inference(house.store, COCO, [(one, [Detection("person", 0.5, SPOT)] if one == frame_id else [], False) for one in every], role="judge")
    house.set(people="blur", people_bundle=COCO)
    assert house.push().withheld == {OVER_ANIMAL: 1}


def test_a_photograph_that_came_twice_leaves_only_if_both_may(house):
    frame = frames(house.store)[0]
    add_frames(house.store, [NewFrame(image_bytes(house.store, frame), "test", "again", camera="terrace", taken_at=frame.taken_at)])
    house.set(never_leave=["terrace"])
    assert departures(house.store, [frame])[frame.id].why_not == NEVER


def test_a_review_pack_obeys_the_same_policy(house):
    night = frames(house.store)[:6]
    windows = sorted({(frame.camera, frame.window) for frame in night})
    whole = make_review_pack(house.store, windows, None)
    record_inference(house.store, COCO, [(frame.id, [Detection("person", 0.5, SPOT)] if number == 0 else [], False) for number, frame in enumerate(night)], role="judge")
    house.set(people="withhold", people_bundle=COCO)
    pack = make_review_pack(house.store, windows, None)
    assert pack.withheld == ((night[0].id, PEOPLE),) and {frame.id for frame in pack.content.frames} == {frame.id for frame in whole.content.frames} - {night[0].id}
    house.set(people="blur")
    blurred = make_review_pack(house.store, windows, None)
    changed = {one.image for one in blurred.copies} - {one.image for one in whole.copies if one in blurred.copies}
    assert changed == {night[0].image} and blurred.withheld == ()
    house.set(never_leave=["gate"])
    assert make_review_pack(house.store, windows, None).content.frames == []


# -- what arrives --------------------------------------------------------------------------------------------------


def test_what_is_pulled_is_what_was_frozen_less_the_test_split(house):
    house.push()
    version, home = house.pull().version, open_version(house.store.home.datasets)
    assert verify_version(version) == [] and list((version.path / "images/test").iterdir()) == []
    for split in ("train", "val"):
        ours, theirs = (json.loads((one.path / f"annotations/{split}.json").read_bytes()) for one in (version, home))
        assert ours["categories"] == theirs["categories"] and len(ours["images"]) == len(theirs["images"]) == sum(home.manifest["counts"][split].values())
        assert Counter((one["night"], one["datetime"], one["width"]) for one in ours["images"]) == Counter((one["night"], one["datetime"], one["width"]) for one in theirs["images"])
        assert sorted(one["bbox"] for one in ours["annotations"]) == sorted(one["bbox"] for one in theirs["annotations"])
    assert version.manifest["data_until"] == home.manifest["data_until"] and version.manifest["pulled"]["manifest_sha256"] == home.digest
    assert set(version.nights.values()) <= {"train", "val"} and set(version.nights.items()) <= set(home.nights.items())


def test_a_trainer_takes_it(house):
    house.push()
    version = house.pull().version
    material = read_material(version.path)
    assert material.validates and len(material.splits["train"].images) == sum(version.manifest["counts"]["train"].values())
    assert copy_material(material, house.path / "copies").is_file()


@pytest.mark.slow
def test_a_training_runs_on_what_was_pulled(house, tmp_path):
    pytest.importorskip("ultralytics")
    from deerml.train.recipe import Recipe, train
    house.push()
    assert train(house.pull().version.path, tmp_path / "run", Recipe("tiny", epochs=2)).is_file()


def test_a_new_label_travels_without_its_photograph(house):
    house.push()
    [frame_id] = house.frame_ids("train")[:1]
    record(house.store, "ann", [BoxVerdict(frame_id, "missed", "deer", Box(5, 5, 20, 20)), FrameStatement(frame_id, "all_boxed", ("deer",))])
    house.freeze()
    done = house.push()
    assert done.new == done.removed == 0 and done.byte_count < 2000
    house.pull("before")
    document = json.loads((house.pull("after").version.path / "annotations/train.json").read_bytes())
    assert [5.0, 5.0, 20.0, 20.0] in [one["bbox"] for one in document["annotations"]]


def test_a_second_pull_fetches_only_what_is_new(house):
    house.push()
    house.pull()
    house.add(picture(107001, True), "new", house.training_night())
    house.freeze()
    house.push()
    again = house.pull()
    assert (again.packs, again.version.name) == (1, "v0002") and again.byte_count < 20_000
    assert verify_version(again.version) == [] and verify_version(replace(again.version, path=house.path / "trainer/v0001", manifest=json.loads((house.path / "trainer/v0001/manifest.json").read_bytes()))) == []


# -- what it costs -------------------------------------------------------------------------------------------------


def big(seed: int) -> bytes:
    return cv2.imencode(".jpg", np.random.default_rng(seed).integers(0, 255, (360, 640, 3), np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 60])[1].tobytes()


def test_ten_new_photographs_cost_ten_photographs(house):
    house.push()
    night, before = house.training_night(), set(house.there())
    for number in range(10):
        house.add(big(number), f"big {number}", night, minutes=number)
    house.freeze()
    watched = Watched(house.remote)
    done = house.push(watched)
    copies = sum(len(data) for name, data in house.there().items() if name not in before)
    delta = len(house.remote.get(step_name(read_shelf(house.remote).digest)))
    assert done.new == 11 and done.byte_count == watched.sent  # one more empty frame belongs to ten more with an animal
    assert 0.5 * copies < watched.sent <= 1.05 * copies + delta and delta < 6000
    assert watched.calls == ["get", "put", "put", "replace"]
    again = Watched(house.remote)
    assert house.push(again).byte_count == again.sent == 0 and again.calls == ["get"] and again.received < 400


def test_small_packs_are_put_together_and_it_says_so(house, monkeypatch):
    monkeypatch.setattr(pushing, "MAX_SMALL_PACKS", 3)
    house.push()
    night, sentences = house.training_night(), []
    for number in range(4):
        house.add(picture(108000 + number, True), f"new {number}", night, minutes=number)
        house.freeze()
        sentences.append(house.push().sentence)
    assert [("put together" in text) for text in sentences] == [False, False, True, False]
    shelf = read_shelf(house.remote)
    assert len(shelf.packs) == 3 and len(shelf.chain) == 2
    assert verify_version(house.pull().version) == [] and verify_remote(house.remote, house.store.home).problems == ()
    assert len(verify_remote(house.remote).unneeded) > 0


def test_a_snapshot_ends_the_chain(house, monkeypatch):
    monkeypatch.setattr(pushing, "MAX_CHAIN", 3)
    house.push()
    night, chains = house.training_night(), []
    for number in range(4):
        house.add(picture(108100 + number, True), f"new {number}", night, minutes=number)
        house.freeze()
        done = house.push()
        chains.append((done.snapshot, len(read_shelf(house.remote).chain)))
    assert chains == [(False, 2), (False, 3), (True, 1), (False, 2)]
    assert verify_version(house.pull().version) == []


def test_a_push_that_would_drop_a_tenth_stops(house):
    images = house.push().images
    house.set(never_leave=["gate 22:00-22:04"])
    before = state(house.path / "drive")
    with pytest.raises(DeermlError, match="would vanish") as caught:
        house.push()
    assert caught.value.code == "MANY_REMOVED" and "--allow-removal" in caught.value.next_step
    assert state(house.path / "drive") == before
    done = house.push(allow_removal=True)
    assert done.removed > 0.1 * images and done.images == images - done.removed


# -- what breaks ---------------------------------------------------------------------------------------------------


def sweep(house: House, heard: bool) -> int:
    "Break each remote call of a push in turn, each time from the same beginning; returns how many there were"
    begin = house.path / "begin"
    shutil.copytree(house.path / "drive", begin / "drive")
    shutil.copytree(house.path / "yard", begin / "yard", ignore=shutil.ignore_patterns("images"))
    clean = Watched(house.remote)
    house.push(clean)
    wanted = read_shelf(house.remote).newest.content
    with house.store.read() as connection:
        rows = connection.scalar(sa.select(sa.func.count()).select_from(schema.review_event))
    for number in range(1, len(clean.calls) + 1):
        shutil.rmtree(house.path / "drive")
        shutil.copytree(begin / "drive", house.path / "drive")
        for name in ("left.jsonl", "sync"):
            path, was = house.path / "yard" / name, begin / "yard" / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            (shutil.copytree if was.is_dir() else shutil.copyfile)(was, path)
        old = read_shelf(house.remote).newest.content
        broken = Watched(house.remote, number, heard)
        assert code_of(lambda broken=broken: house.push(broken)) == "NO_REMOTE"
        seen = read_shelf(house.remote)  # a reader sees the version before or the version after
        assert seen.newest.content in (old, wanted)
        assert verify_version(house.pull(f"reader-{heard}-{number}").version) == []
        assert set(house.there()) <= {row["outgoing"] for row in left(house.store.home)}
        repeat = Watched(house.remote)
        house.push(repeat)
        assert read_shelf(house.remote).newest.content == wanted and len(repeat.calls) <= len(clean.calls)
        assert verify_remote(house.remote, house.store.home).problems == ()
        assert house.push().byte_count == 0
    with house.store.read() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(schema.review_event)) == rows
    assert verify_version(open_version(house.store.home.datasets)) == []
    return len(clean.calls)


@pytest.mark.parametrize("heard", [False, True])
def test_a_fault_on_each_call_of_a_push(house, heard):
    house.push()
    house.add(picture(109000, True), "new", house.training_night())
    house.freeze()
    assert sweep(house, heard) == 4


@pytest.mark.parametrize("heard", [False, True])
def test_a_fault_on_each_call_of_a_push_that_compacts(house, heard, monkeypatch):
    monkeypatch.setattr(pushing, "MAX_SMALL_PACKS", 2)
    night = house.training_night()
    for number in range(3):
        house.push()
        house.add(picture(109100 + number, True), f"new {number}", night, minutes=number)
        house.freeze()
    assert sweep(house, heard) >= 7


def test_a_fault_on_each_call_of_a_pull(house):
    house.push()
    house.add(picture(109200, True), "new", house.training_night())
    house.freeze()
    house.push()
    clean = Watched(house.remote)
    pull_dataset(clean, house.path / "clean")
    assert len(clean.calls) == 5
    for number in range(1, len(clean.calls) + 1):
        to = house.path / f"broken-{number}"
        assert code_of(lambda number=number, to=to: pull_dataset(Watched(house.remote, number), to)) == "NO_REMOTE"
        assert not list(to.glob("*")) or [path.name for path in to.iterdir()] == [".lock"]
        assert verify_version(pull_dataset(house.remote, to).version) == []


def test_a_reader_sees_a_whole_version_at_every_moment_of_a_push(house):
    house.push()
    for number in range(3):
        house.add(picture(109300 + number, True), f"new {number}", house.training_night(), minutes=number)
    house.freeze()
    seen = []

    def look():
        shelf = read_shelf(house.remote)
        seen.append(shelf.newest.version)
        assert set(shelf.labels) <= set(house.there())

    house.push(Watched(house.remote, on_call=look))
    assert seen == ["v0001", "v0001", "v0001", "v0002"]


def test_a_damaged_remote_is_named_and_pushed_afresh(house):
    house.push()
    [pack], [step] = house.remote.list("data/packs/"), house.remote.list("data/steps/")
    folder = house.path / "drive"
    whole = {name: (folder / name).read_bytes() for name in (pack.name, step.name, POINTER)}
    for name, damage, code in ((pack.name, whole[pack.name][:5000], "BAD_PACK"), (pack.name, None, "NOT_THERE"), (step.name, whole[step.name][:-9], "BAD_SHELF"), (step.name, None, "BAD_SHELF"), (POINTER, b"{}", "BAD_SHELF")):
        (folder / name).unlink() if damage is None else (folder / name).write_bytes(damage)
        assert code_of(house.pull) == code
        assert verify_remote(house.remote).problems != ()
        (folder / name).write_bytes(whole[name])
    (folder / POINTER).unlink()
    assert code_of(house.push) == "SHELF_LOST" and code_of(lambda: sync_status(house.store, house.remote)) == "SHELF_LOST"
    (folder / pack.name).unlink()
    assert house.push(afresh=True).snapshot and verify_version(house.pull().version) == []


def test_a_pack_that_grows_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shelf_module, "MAX_UNPACKED_BYTES", 1 << 16)
    bomb = gzip.compress(bytes(1 << 20))
    (tmp_path / "pack").write_bytes(bomb)
    claimed = Pack(digest=sha256_bytes(bomb), size=len(bomb), images=["0" * 64])
    assert code_of(lambda: read_pack(tmp_path / "pack", claimed)) == "BAD_PACK"


def test_a_newer_schema_is_refused(house):
    house.push()
    shelf = read_shelf(house.remote)
    data = house.remote.get(step_name(shelf.digest)).replace(b'"schema_version":1', b'"schema_version":2')
    house.remote.put(step_name(sha256_bytes(data)), data)
    house.remote.replace(POINTER, canonical_json({"step": sha256_bytes(data)}))
    assert code_of(house.pull) == "NEWER_SHELF" and not (house.path / "trainer").exists()


def test_two_pushes_at_once_are_one(house):
    def second():
        assert code_of(house.push) == "BUSY"

    house.push(Watched(house.remote, on_call=second))


def test_the_commands_say_the_same(house):
    home = str(house.path / "yard")
    with (house.path / "yard/deerml.toml").open("a") as file:
        file.write(f'remote = "{house.path / "drive"}"\nleave = "labelled"\npeople = "show"\n')

    def deerml(*words, code=0):
        done = CliRunner().invoke(app, ["sync", *map(str, words), "--json"])
        assert done.exit_code == code, done.output
        return json.loads(done.stdout)

    assert deerml("push", "--dry-run", "--home", home)["dry_run"] and house.remote.list("") == []
    pushed = deerml("push", "--home", home)
    assert deerml("push", "--home", home)["byte_count"] == 0 < pushed["byte_count"]
    pulled = deerml("pull", "--from", house.path / "drive", "--to", house.path / "trainer")
    assert pulled["images"] == pushed["images"] and (Path(pulled["path"]) / "data.yaml").is_file()
    assert len(deerml("status", "--left", "--home", home)["left"]) == pushed["images"]
    assert deerml("status", "--home", home)["status"]["new"] == 0
    assert deerml("verify", "--home", home)["problems"] == []
    next((house.path / "drive/data/packs").iterdir()).unlink()
    assert deerml("verify", "--from", house.path / "drive", code=1)["problems"]
    assert deerml("pull", "--from", "ftp://yard", code=1)["error"]["code"] == "BAD_REMOTE"


# -- buckets -------------------------------------------------------------------------------------------------------


def cycle(house: House, remote) -> None:
    "Push, push again, a night more, pull"
    assert house.push(remote).new > 0 and house.push(remote).byte_count == 0
    house.add(picture(109400, True), "new", house.training_night())
    house.freeze()
    watched = Watched(remote)
    assert house.push(watched).new == 1 and len(watched.calls) <= 6
    assert verify_version(pull_dataset(remote, house.path / "trainer").version) == []
    assert verify_remote(remote, house.store.home).problems == ()
    shelf = read_shelf(remote)
    name = step_name(shelf.digest)
    remote.put(name, remote.get(name))
    assert code_of(lambda: remote.put(name, b"other")) == "EXISTS" and code_of(lambda: remote.get("data/none")) == "NOT_THERE"
    remote.replace(POINTER, b"x"), remote.replace(POINTER, b"y")
    assert remote.get(POINTER) == b"y" and {entry.name for entry in remote.list("data/steps/")} >= {name}


def test_a_bucket_in_memory(house):
    pytest.importorskip("fsspec")
    cycle(house, FsspecRemote(f"memory://{house.path.parent.name}/deerml"))


@pytest.fixture(scope="module")
def s3():
    "moto's server, which speaks S3"
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'deerml[s3]'")
    server = pytest.importorskip("moto.server", reason="moto is not installed: pip install 'moto[s3,server]'")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=port)
    running.start()
    before = {name: os.environ.get(name) for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION")}
    os.environ.update(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}", AWS_DEFAULT_REGION="us-east-1")
    import s3fs
    s3fs.S3FileSystem().mkdir("yard")
    yield "s3://yard/deerml"
    running.stop()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


def test_a_bucket_of_s3(house, s3):
    cycle(house, FsspecRemote(s3))


def test_a_bucket_that_does_not_exist_or_does_not_answer(house, s3):
    nowhere = FsspecRemote("s3://no-such-bucket/deerml")
    assert code_of(lambda: nowhere.put("x", b"y")) == "NO_REMOTE"
    silent = FsspecRemote(s3, endpoint_url="http://127.0.0.1:9", config_kwargs={"retries": {"max_attempts": 0}, "connect_timeout": 1})
    assert code_of(lambda: silent.get("x")) == "NO_REMOTE"


def test_a_client_that_is_missing_says_what_to_install(monkeypatch):
    import builtins
    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *rest, **more: (_ for _ in ()).throw(ImportError(f"No module named {name!r}")) if name == "fsspec" else real(name, *rest, **more))
    with pytest.raises(DeermlError, match=r"deerml\[gcs\]"):
        FsspecRemote("gs://yard/deerml")


def test_a_google_drive(house):
    for needed in ("pydrive2", "stamina", "google_auth_oauthlib"):
        pytest.importorskip(needed, reason="Google Drive is not installed: pip install 'deerml[drive]'")
    from deerml.data.drive_account import ACCOUNT_FILE, Account, write_account
    from deerml.data.packs import allowed_remote
    from drive_server import OWN, ROOT, SEE, DriveServer
    with DriveServer() as server:
        folder = server.add("deerml", ROOT, "server", folder=True).id
        info = {"refresh_token": server.login("server", (OWN, SEE)), "client_id": "server", "client_secret": "hush", "token_uri": f"{server.address}/token"}
        write_account(house.store.home.path / ACCOUNT_FILE, Account("user", info, (OWN, SEE), folder, email=server.email, api=server.address))
        house.set(remote="drive", review_remote="drive")
        remote = pushing.allowed_training_remote(house.store.home)
        assert allowed_remote(house.store.home).place == remote.place != ""
        cycle(house, remote)


def test_a_drive_without_a_login_says_so(house):
    house.set(remote="drive")
    assert code_of(house.push) == "NO_ACCOUNT"
    assert code_of(lambda: open_remote("drive")) == "BAD_REMOTE"
