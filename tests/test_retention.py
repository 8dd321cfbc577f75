"""Pictures that must not go do not go, and a run that is killed at any step leaves a store that is whole."""
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from deerml.capture import retention, schema
from deerml.capture.backup import verify
from deerml.capture.retention import KEEP, chance, keeping_empties, retain
from deerml.capture.store import NewFrame, Store, add_frames, frames, image_bytes, image_path, record_inference
from deerml.capture.truth import BoxVerdict, FrameStatement, Undo, record
from deerml.core.box import Box
from deerml.core.clock import now
from deerml.core.settings import Home
from deerml.model.detector import Detection
from yards import START, picture

MONTH = now() + timedelta(days=30)


@pytest.fixture
def store(tmp_path):
    with Store.open(Home.create(tmp_path / "yard")) as opened:
        yield opened


@pytest.fixture(autouse=True)
def nothing_stays_by_chance(monkeypatch):
    monkeypatch.setattr(retention, "KEEP", dict.fromkeys(KEEP, 0.0))


def take(store: Store, count: int = 1, seed: int = 0, minutes: float = 10, camera: str | None = "gate") -> list[int]:
    new = [NewFrame(picture(seed + n), "test", f"{camera}/{seed}/{n}", camera=camera, taken_at=START + timedelta(minutes=minutes * n) if camera else None) for n in range(count)]
    return add_frames(store, new)


def alive(store: Store) -> set[int]:
    return {frame.id for frame in frames(store) if not frame.expired}


def is_sound(store: Store) -> bool:
    "Every frame that is not expired has its bytes"
    return verify(store).whole and all(image_bytes(store, frame) for frame in frames(store) if not frame.expired)


def test_nothing_goes_within_three_weeks(store):
    take(store, 5)
    assert retain(store, now() + timedelta(days=21, minutes=-1)).expired == 0
    assert retain(store, now() + timedelta(days=21, minutes=1)).expired == 5


def test_the_settings_cannot_say_less(tmp_path):
    with pytest.raises(Exception, match="retention_days"):
        Home.create(tmp_path / "hasty", retention_days=20)


@pytest.mark.parametrize("saying", [
    lambda i: FrameStatement(i, "nothing_here", ("deer",), operation_id="x"), lambda i: FrameStatement(i, "unsure", ("deer",), operation_id="x"),
    lambda i: FrameStatement(i, "exclude", ("deer",), operation_id="x"), lambda i: BoxVerdict(i, "missed", "deer", Box(1, 1, 9, 9), operation_id="x"),
])
def test_a_reviewed_frame_never_goes(store, saying):
    first, second = take(store, 2)
    record(store, "ann", [saying(first)])
    assert retain(store, MONTH + timedelta(days=9999)).expired == 1 and alive(store) == {first}
    record(store, "ann", [Undo(first, "x")])
    retain(store, MONTH)
    assert alive(store) == set()


def test_an_open_draw_holds_its_windows_and_their_neighbours_until_all_is_answered(store):
    from deerml.review.queue import close_night, drawn_windows
    ids = take(store, 9)
    close_night(store, "2026-09-01", None, budget=2)
    asked = {(one.camera, one.window) for one in drawn_windows(store)}
    drawn = [frame for frame in frames(store) if (frame.camera, frame.window) in asked]
    retain(store, MONTH)
    places = {ids.index(frame.id) for frame in drawn}
    assert alive(store) == {frame_id for n, frame_id in enumerate(ids) if {n - 1, n, n + 1} & places}
    record(store, "ann", [FrameStatement(drawn[0].id, "unsure", ("deer",))])
    assert retain(store, MONTH).expired == 0  # the other window of the draw waits
    record(store, "ann", [FrameStatement(drawn[1].id, "nothing_here", ("deer",))])
    retain(store, MONTH)
    assert alive(store) == {frame.id for frame in drawn}


def test_what_others_hold_and_what_has_no_time_stays(store):
    first, second, third = take(store, 3)
    [loose] = take(store, seed=50, camera=None)
    [elsewhere] = take(store, seed=60, camera="lawn")
    retain(store, MONTH, held=[second, "lawn/2026-09-01"])
    assert alive(store) == {second, loose, elsewhere}


def test_a_shared_picture_goes_only_when_all_of_its_frames_may(store):
    data = picture(1)
    shared = add_frames(store, [NewFrame(data, "test", name, camera=name, taken_at=START) for name in ("gate", "lawn")])
    record(store, "ann", [FrameStatement(shared[1], "nothing_here", ("deer",), operation_id="x")])
    assert retain(store, MONTH).expired == 0 and image_bytes(store, frames(store)[0]) == data
    record(store, "ann", [Undo(shared[1], "x")])
    assert retain(store, MONTH).expired == 1 and alive(store) == set()


def test_chance_is_the_same_everywhere_and_its_probability_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(retention, "KEEP", KEEP)
    outcomes = []
    for name in ("a", "b"):
        with Store.open(Home.create(tmp_path / name)) as store:
            ids = take(store, 60, minutes=1)
            record_inference(store, "b" * 64, [(i, [Detection("deer", 0.1, Box(1, 1, 9, 9))] if n < 40 else [], n < 20) for n, i in enumerate(ids)])
            dry = retain(store, MONTH, dry_run=True)
            assert len(alive(store)) == 60 and verify(store).images == 60
            done = retain(store, MONTH)
            assert (dry.expired, dry.kept) == (done.expired, done.kept) and retain(store, MONTH).expired == 0
            with store.read() as connection:
                kept = {row.sha256: (row.expired_at is None, row.keep_probability) for row in connection.execute(sa.select(schema.image))}
            for n, frame in enumerate(frames(store)):
                probability = KEEP["alarm" if n < 20 else "low" if n < 40 else "nothing"]
                assert kept[frame.image] == (chance("deerml", frame.image) < probability, probability)
            outcomes.append(kept)
    assert outcomes[0] == outcomes[1]


def test_the_bound_takes_the_oldest_empties_then_warns_then_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(retention, "KEEP", dict.fromkeys(KEEP, 1.0))
    with Store.open(Home.create(tmp_path / "yard", images_gb=4e-5)) as store:  # 40 kB, some five pictures
        ids = []
        for n in range(12):  # one by one, so that each has its own age
            ids += take(store, 1, seed=n)
        record_inference(store, "b" * 64, [(i, [Detection("deer", 0.1, Box(1, 1, 9, 9))], n == 0) for n, i in enumerate(ids[:2])])
        assert not keeping_empties(store)
        done = retain(store, MONTH)
        assert done.for_space == done.expired > 0 and done.over_mb == 0 and keeping_empties(store)
        gone = sorted(set(ids) - alive(store))
        assert gone == ids[2:2 + len(gone)]  # the oldest, but nothing in which a model saw something
        for frame_id in alive(store):
            record(store, "ann", [FrameStatement(frame_id, "nothing_here", ("deer",))])
        take(store, 8, seed=100)
        done = retain(store, now())
        assert done.expired == 0 and "images_gb" in done.sentence and not keeping_empties(store)


class Killed(Exception):
    pass


@pytest.mark.parametrize("step", range(8))
def test_a_run_that_is_killed_at_any_step_leaves_no_row_without_its_bytes(store, monkeypatch, step):
    monkeypatch.setattr(retention, "GROUP", 2)
    take(store, 6)
    calls = []

    def kill_at(real):
        def step_or_die(*args, **kwargs):
            calls.append(real)
            if len(calls) > step:
                raise Killed
            return real(*args, **kwargs)
        return step_or_die

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", kill_at(Path.unlink))
        patch.setattr(retention, "_touched", kill_at(retention._touched))
        with pytest.raises(Killed):
            retain(store, MONTH)
    assert is_sound(store)
    assert retain(store, MONTH).left_alone == 0 and is_sound(store) and verify(store).orphans == () and alive(store) == set()


@pytest.mark.parametrize("meanwhile", ["reviewed", "drawn", "came again"])
def test_what_happens_between_plan_and_deed_is_seen(store, monkeypatch, meanwhile):
    ids = take(store, 3)
    real = retention._plan

    def plan_and_then(*args):
        plan = real(*args)
        if meanwhile == "reviewed":
            record(store, "ann", [FrameStatement(ids[1], "nothing_here", ("deer",))])
        elif meanwhile == "drawn":
            from deerml.review.queue import close_night
            close_night(store, "2026-09-01", None, budget=1)
        else:
            add_frames(store, [NewFrame(picture(1), "test", "again", camera="lawn", taken_at=START)])
        return plan

    monkeypatch.setattr(retention, "_plan", plan_and_then)
    done = retain(store, MONTH)
    assert (done.expired, done.left_alone) == (2, 1) and is_sound(store)
    assert meanwhile == "drawn" or ids[1] in alive(store)


def test_bytes_that_come_again_while_they_are_deleted_are_there_when_it_is_acknowledged(store, monkeypatch):
    "The file still lies there when the ingest looks, is deleted, and is named by a new row afterwards"
    take(store, 1)
    real = retention._delete_files
    from deerml.capture import store as store_module
    write = store_module.write_images

    def write_then_lose(*args):
        write(*args)
        monkeypatch.setattr(store_module, "write_images", write)
        real(store)

    monkeypatch.setattr(retention, "_delete_files", lambda _store: 0)  # killed after the tombstone
    retain(store, MONTH)
    monkeypatch.setattr(store_module, "write_images", write_then_lose)
    add_frames(store, [NewFrame(picture(0), "test", "again", camera="lawn", taken_at=START)])
    assert is_sound(store) and len(alive(store)) == 2
    assert image_path(store.home.images, frames(store)[0].image, "jpeg").is_file()


def test_the_command_tells_and_does(store):
    import json

    from typer.testing import CliRunner

    from deerml.app.cli import app
    take(store, 2)
    runner = CliRunner()
    told = runner.invoke(app, ["retain", "--dry-run", "--json", "--home", str(store.home.path)])
    assert told.exit_code == 0 and json.loads(told.stdout)["kept"] == {"young": 2}
    assert "Deleted 0 pictures" in runner.invoke(app, ["retain", "--home", str(store.home.path)]).stdout
