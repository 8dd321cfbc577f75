"""The promises of the design that this milestone holds, each with a test that tries to break it.

`test_mutants.py` runs these against a deerml in which one guard was taken out, and expects them to fail.
"""
import os
import sqlite3
import sys
from dataclasses import replace

import numpy as np
import pytest
import sqlalchemy as sa

from deerml.capture.backup import verify
from deerml.capture.store import NewFrame, Store, add_frames, frames, frames_by_id, image_bytes
from deerml.capture.truth import BoxVerdict, CompleteTruth, FrameStatement, record, truths
from deerml.core.box import Box
from deerml.core.errors import DeermlError
from deerml.core.settings import Home
from deerml.data.split import assign_nights, splits
from deerml.data.version import Sample, freeze, samples_of
from deerml.judge.collect import Origin, look
from deerml.judge.compare import Contestant, answers_of, compare
from deerml.judge.evidence import Evidence, JudgedFrame, Mark, Visit
from deerml.judge.evidence import Thresholds as GateThresholds
from deerml.judge.gate import GateSettings, judge
from deerml.judge.replay import make_replay
from deerml.model.bundle import Bundle, Thresholds, seal, spot_draft, spot_model
from deerml.model.detector import Detector, decode
from deerml.review.items import View, build_item, item_name, plan_review
from yards import AFTER, SPOT, START, picture, replay_yard, spot_bundle, yard


def test_an_unreviewed_frame_never_becomes_a_label(tmp_path):
    with yard(tmp_path / "yard") as store:
        version = freeze(store, at=AFTER).version
        complete = {frame.image for frame in frames(store) if truths(store, ["deer"], [frame.id])[frame.id].state(["deer"]) in ("boxes_complete", "verified_empty")}
        assert version.manifest["images"] and set(version.manifest["images"]) <= complete
        unfinished = {frame.image for frame in frames(store)} - complete
        exported = {path.stem for path in version.path.rglob("*") if path.is_file()}
        assert len(unfinished) == 40 and not unfinished & exported


def test_only_complete_truth_can_be_a_sample(tmp_path):
    with yard(tmp_path / "yard", nights=1) as store:
        frame = frames(store)[0]
        with pytest.raises(TypeError):
            CompleteTruth(frame.id, ("deer",), ())
        with pytest.raises(TypeError):
            Sample(frame, truths(store, ["deer"])[frame.id], "train")


def test_a_night_lies_in_one_split_for_ever(tmp_path):
    with yard(tmp_path / "yard", cameras=("gate", "lawn")) as store:
        before = {}
        for sample in samples_of_frozen(store):
            before.setdefault(sample.frame.night_key, set()).add(sample.split)
        assert all(len(found) == 1 for found in before.values()) and len(set.union(*before.values())) == 3
    with yard(tmp_path / "larger", nights=24, cameras=("lawn", "gate", "pond")) as larger:
        after = {sample.frame.night_key: sample.split for sample in samples_of_frozen(larger)}
        assert all(after[night] in found for night, found in before.items())


def samples_of_frozen(store: Store) -> list[Sample]:
    freeze(store, at=AFTER)
    return samples_of(store, AFTER, 0)


def test_no_image_lies_in_two_splits(tmp_path):
    "Copies of one photograph in folders of all splits. The first folder decides, also while its own copy is not reviewed."
    with yard(tmp_path / "yard") as store:
        ids = [add_frames(store, [NewFrame(picture(5, True), "copy", str(n), folder=f"folder{n}", sequence="one")])[0] for n in range(30)]
        for frame_id in ids[1:]:
            record(store, "ann", [BoxVerdict(frame_id, "missed", "deer", SPOT), FrameStatement(frame_id, "all_boxed", ("deer",))])
        copies = frames_by_id(store, ids)
        found = freeze(store, at=AFTER).version.manifest["images"].get(copies[0].image)
        assert len({splits(store)[frame.night_key] for frame in copies}) == 3, "the copies must lie in all splits, or this test shows nothing"
        assert found is None
        record(store, "ann", [BoxVerdict(ids[0], "missed", "deer", SPOT), FrameStatement(ids[0], "all_boxed", ("deer",))])
        version = freeze(store, at=AFTER).version
        assert version.manifest["images"][copies[0].image] == splits(store)[copies[0].night_key]
        assert len(list(version.path.rglob(copies[0].file_name))) == 1


COLOURS = ["blue", "green", "red"]


def colour_bundle(folder, store: Store) -> Bundle:
    "A detector with a class for each channel: it tells when the channels or the preprocessing are not the server's"
    folder.mkdir(exist_ok=True)
    (folder / "model.onnx").write_bytes(spot_model(COLOURS))
    draft = spot_draft(COLOURS)
    return seal(folder / "model.onnx", draft, Thresholds(shared=dict.fromkeys(COLOURS, 0.5)), "none", store.home.bundles)


def test_what_is_judged_is_what_serves(tmp_path):
    with Store.open(Home.create(tmp_path / "yard", classes=COLOURS)) as store:
        colours = [(250, 20, 20), (20, 250, 20), (20, 20, 250)]
        new = [NewFrame(picture(n, True, colours[n % 3]), "test", str(n), camera="gate", taken_at=START, trigger="motion") for n in range(6)]
        add_frames(store, new)
        bundle = colour_bundle(tmp_path / "model", store)
        serving = Detector(Bundle.load(store.home.bundles / bundle.digest))
        judged = look(store, bundle, frames(store))
        for frame in frames(store):
            served = serving(decode(image_bytes(store, frame)))
            assert served, "the detector must see something, or this test shows nothing"
            assert [(one.label, one.score, one.box) for one in judged[frame.id]] == [(one.label, one.score, one.box) for one in served]
        assert len({found[0].label for found in judged.values()}) == 3


def test_a_row_is_committed_only_after_its_file_is_durable(tmp_path, monkeypatch):
    with Store.open(Home.create(tmp_path / "yard")) as store:
        log = []
        real_replace, real_fsync = os.replace, os.fsync
        monkeypatch.setattr(os, "replace", lambda *names: (real_replace(*names), log.append("rename"))[0])
        monkeypatch.setattr(os, "fsync", lambda descriptor: (real_fsync(descriptor), log.append("fsync"))[0])
        sa.event.listen(store.engine, "commit", lambda _: log.append("commit"))
        add_frames(store, [NewFrame(picture(1), "test", "1", camera="gate", taken_at=START)])
        assert log.index("fsync") < log.index("rename") < len(log) - 1 - log[::-1].index("fsync") < log.index("commit")


def ingest_in_a_child(path, die_at: int) -> int:
    "Store three frames in a forked child that ends at its n-th file operation or commit; its exit code (0: it finished)"
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    count = 0

    def step(function):
        def wrapped(*arguments, **options):
            nonlocal count
            count += 1
            if count == die_at:
                os._exit(9)
            try:
                return function(*arguments, **options)
            finally:
                if count + 0.5 == die_at:
                    os._exit(9)
        return wrapped

    try:
        for name in ("replace", "fsync", "mkdir"):
            setattr(os, name, step(getattr(os, name)))
        store = Store.open(Home.open(path))
        sa.event.listen(store.engine, "commit", step(lambda _: None))
        add_frames(store, [NewFrame(picture(n), "test", str(n), camera="gate", taken_at=START) for n in range(3)])
        os._exit(0)
    except BaseException:
        os._exit(1)


def test_a_crash_at_any_operation_leaves_no_row_without_its_file(tmp_path):
    path = Home.create(tmp_path / "yard").path
    Store.open(Home.open(path)).close()
    points, die_at = 0, 1.0
    while True:
        code = ingest_in_a_child(path, die_at)
        with Store.open(Home.open(path)) as store:
            found = verify(store, remove_orphans=True)
            assert found.whole and found.images in (0, 3), (die_at, found)
        if code == 0:
            break
        assert code == 9, f"point {die_at} ended with {code}"
        points, die_at = points + 1, die_at + 0.5
    assert points >= 20 and found.images == 3


def test_history_cannot_be_rewritten(tmp_path):
    with yard(tmp_path / "yard", nights=1) as store:
        freeze(store, at=AFTER, force=True)
        database = tmp_path / "yard" / "deerml.db"
    connection = sqlite3.connect(database)
    for table in ("review_event", "frame", "sighting", "night_split", "exposure", "image_night"):
        for statement in (f"delete from {table}", f"update {table} set rowid = rowid"):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                connection.execute(statement)
    connection.close()


def test_a_flipped_byte_in_a_bundle_is_refused_before_it_is_parsed(tmp_path):
    with Store.open(Home.create(tmp_path / "yard", classes=COLOURS)) as store:
        bundle = colour_bundle(tmp_path / "model", store)
    for name in ("model.onnx", "serving.json"):
        path = bundle.path / name
        good = path.read_bytes()
        path.chmod(0o644)
        for offset in np.random.default_rng(0).integers(0, len(good), 50).tolist():
            path.write_bytes(good[:offset] + bytes([good[offset] ^ 1]) + good[offset + 1:])
            with pytest.raises(DeermlError) as caught:
                Bundle.load(bundle.path, expect_digest=bundle.digest)
            assert caught.value.code == "DIGEST"
        path.write_bytes(good)
    assert Bundle.load(bundle.path).digest == bundle.digest


def two_models(store: Store) -> tuple[Bundle, Bundle]:
    "The second does not act on what is pale"
    return spot_bundle(store), spot_bundle(store, 0.8)


def test_a_replay_counts_no_night_that_a_model_was_trained_on(tmp_path):
    with replay_yard(tmp_path / "yard", nights=4) as store:
        pair = two_models(store)
        assign_nights(store)
        taught = {night for night, split in splits(store).items() if split != "test"} - {"gate/2026-09-04"}
        known = [Origin(pair[0].digest), Origin(pair[1].digest, frozenset(taught))]
        replay = make_replay(store, *pair, known, "2026-08-30..2026-09-30", AFTER)
        shown = {f"{window.camera}/{window.window[:10]}" for window in replay.windows}
        assert len(taught) >= 2 and "gate/2026-09-04" in shown and not shown & taught and set(replay.record["seen"]) == taught


def test_a_replay_does_not_tell_which_model_spoke(tmp_path):
    with replay_yard(tmp_path / "yard", nights=2) as store:
        pair, pages = two_models(store), []
        for champion, challenger in (pair, pair[::-1]):
            make_replay(store, champion, challenger, [Origin(champion.digest), Origin(challenger.digest)], "2026-08-30..2026-09-30", AFTER)
            view = View(store, "ann", champion)
            pages.append(sorted((build_item(view, item_name(name)) for name in plan_review(view, "strip", "replay").items), key=lambda item: item["id"]))
        boxes = [box for item in pages[0] for frame in item["frames"] for box in frame["boxes"]]
        assert pages[0] == pages[1] and boxes and {(box["score"], box["kind"]) for box in boxes} == {(None, "suggestion")}


def test_serving_loads_no_torch():
    import subprocess
    code = "import sys, deerml.model.detector; sys.exit(bool({'torch', 'ultralytics', 'pickle5'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_yard_of_these_tests_has_what_it_says(tmp_path):
    with yard(tmp_path / "yard", nights=1) as store:
        known = truths(store, ["deer"], [frame.id for frame in frames(store)])
        assert [truth.state(["deer"]) for truth in known.values()] == ["boxes_complete"] * 2 + ["verified_empty"] * 2 + ["in_progress", "unreviewed"]
        assert known[1].of["deer"].boxes == (SPOT,)


# -- 6: a point estimate never promotes ---------------------------------------------------------------------------


def judged_yard(visits: int, windows_each: int = 1, p: float = 1.0, empty: int = 120) -> Evidence:
    "So many visits, each with one frame in each of its windows, and empty windows, one camera"
    frames = [(visit, step) for visit in range(visits) for step in range(windows_each)] + [(visits + place, 0) for place in range(empty)]
    judged = tuple(JudgedFrame(place, "gate", f"{block // 10:03d}", f"{block:04d}.{step}", "day", p, "drawn", (Mark("deer", SPOT),) if block < visits else (), (160, 96))
                   for place, (block, step) in enumerate(frames))
    found = tuple(Visit(f"{visit}", "gate", f"{visit // 10:03d}", tuple(range(visit * windows_each, (visit + 1) * windows_each)), tuple(f"{visit:04d}.{step}" for step in range(windows_each)))
                  for visit in range(visits))
    return Evidence(judged, found, {("gate", f"{night:03d}"): 10.0 for night in range((visits + empty) // 10 + 1)}, ("deer",))


def contestant(evidence: Evidence, missed: set[int], false: set[int] = frozenset()) -> Contestant:
    "A model that misses these visits, and puts a box beside the animal, or where there is none, in the frames of these windows"
    visit = {frame: number for number, one in enumerate(evidence.visits) for frame in one.frame_ids}
    seen = {}
    for frame in evidence.frames:
        block = int(frame.window[:4])
        seen[frame.frame_id] = [Mark("deer", SPOT, 0.9)] * (frame.frame_id in visit and block not in missed) + [Mark("deer", Box(110, 5, 30, 20), 0.8)] * (block in false)
    return Contestant(seen, GateThresholds({"deer": 0.5}))


@pytest.mark.parametrize("visits, won, lost", [(240, 2, 0), (60, 10, 2)])
def test_a_point_estimate_never_promotes(visits, won, lost):
    "Two visits more of 240 may be luck; and ten more, for two lost of 60, may hide a loss beyond the margin"
    evidence = judged_yard(visits)
    models = contestant(evidence, set(range(won))), contestant(evidence, set(range(won, won + lost)))
    verdict = judge(evidence, *models, GateSettings(draws=300))
    assert verdict.numbers["recall_bootstrap"]["estimate"] > 0 and verdict.verdict == "not_enough_evidence"
    better = contestant(evidence, set(range(40))), contestant(evidence, set())
    assert judge(evidence, *better, GateSettings(draws=300)).verdict == "promote", "or this test shows nothing"


def test_what_belongs_to_one_visit_is_resampled_together():
    "Forty visits of five windows that always agree tell no more than forty visits of one window"
    widths = []
    for windows_each in (1, 5):
        evidence = judged_yard(40, windows_each, empty=0)
        champion, challenger = contestant(evidence, set(), set(range(0, 40, 4))), contestant(evidence, set(range(0, 40, 3)), set(range(1, 40, 4)))
        found = compare(evidence, answers_of(evidence, champion), answers_of(evidence, challenger), draws=400)
        widths.append([(found.ap50.upper - found.ap50.lower), (found.false_alarm_difference.upper - found.false_alarm_difference.lower) / windows_each])
    assert np.allclose(widths[1], widths[0], rtol=0.25), widths


def test_a_window_that_stands_for_ten_counts_ten_times():
    "The queue looks where the champion fired; what it missed is seldom drawn, and stands for more"
    evidence = judged_yard(60)
    rare = set(range(50, 60)) | set(range(60, 70))
    frames = tuple(replace(frame, p=0.1) if int(frame.window[:4]) in rare else frame for frame in evidence.frames)
    evidence = replace(evidence, frames=frames)
    models = contestant(evidence, set(range(50, 60))), contestant(evidence, set(), {60, 61, 100})
    found = compare(evidence, *(answers_of(evidence, one) for one in models), draws=50)
    assert found.champion.visit_recall == pytest.approx(50 / (50 + 10 * 10)) and found.challenger.visit_recall == 1.0
    assert found.challenger.per_camera_night * found.sample.camera_nights == pytest.approx(10 + 10 + 1)
