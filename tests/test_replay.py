"""A replay compares two models on stored nights: what is asked, of whom, how it is shown, and what it allows."""
import json
import shutil
from datetime import timedelta

import pytest
import sqlalchemy as sa

from deerml.capture import schema
from deerml.capture.blind import Blind, held_frames, replays
from deerml.capture.retention import retain
from deerml.capture.store import NewFrame, Store, add_frames, frames, image_path
from deerml.capture.truth import FrameStatement, record
from deerml.core.clock import stamp
from deerml.core.errors import DeermlError
from deerml.core.settings import Home
from deerml.judge import collect, replay
from deerml.judge.collect import Origin, look
from deerml.judge.replay import make_replay, nights_of_span
from deerml.judge.replayed import accepting_replay, regressions_of, result_of, sentences_of, to_dict
from deerml.review.desk import open_desk
from deerml.review.items import View, build_item, item_name, plan_review
from yards import START, blob, replay_yard, say_what_is_there, spot_bundle

AFTER = START + timedelta(days=30)
BEFORE = START - timedelta(days=1)
SPAN = "2026-08-30..2026-09-30"


def origins(*bundles, until=BEFORE, nights=()):
    return [Origin(bundle.digest, frozenset(nights), until) for bundle in bundles]


def replayed(store, champion, challenger, span=SPAN, at=AFTER, known=None, **more):
    return make_replay(store, champion, challenger, known or origins(champion, challenger), span, at, **more)


def what_was_written(store) -> list:
    tables = (schema.replay, schema.replay_stratum, schema.replay_window)
    with store.read() as connection:
        return [[tuple(row) for row in connection.execute(sa.select(table))] for table in tables]


def code_of(call) -> str:
    with pytest.raises(DeermlError) as caught:
        call()
    assert caught.value.next_step and caught.value.what
    return caught.value.code


def test_only_windows_in_which_they_differ_are_all_asked(tmp_path):
    with replay_yard(tmp_path / "yard", nights=12) as store:
        found = replayed(store, spot_bundle(store), spot_bundle(store, 0.8))
        assert found.strata == {"differs": (12, 12), "alarm": (12, 10), "silent": (24, 10)}
        strata = [window.stratum for window in found.windows]
        assert strata != sorted(strata) and [window.position for window in found.windows] == list(range(32))
        with store.read() as connection:
            rows = connection.execute(sa.select(schema.replay_stratum.c.name, schema.replay_stratum.c.probability)).all()
        assert dict(rows) == {"differs": 1.0, "alarm": pytest.approx(10 / 12), "silent": pytest.approx(10 / 24)}


def test_an_agreed_alarm_beside_a_difference_is_asked_as_well(tmp_path):
    with Store.open(Home.create(tmp_path / "yard")) as store:
        add_frames(store, [NewFrame(blob(n, brightness), "test", str(n), camera="gate", taken_at=START + timedelta(minutes=5 + 8 * n)) for n, brightness in enumerate([215, 250, 0, 0])])
        more = [NewFrame(blob(50 + n, 250), "test", f"far{n}", camera="gate", taken_at=START + timedelta(minutes=120 + 30 * n)) for n in range(12)]
        add_frames(store, more)
        found = replayed(store, spot_bundle(store), spot_bundle(store, 0.8))
        beside = [window for window in found.windows if window.window == stamp(START + timedelta(minutes=10))]
        assert len(beside) == 1 and beside[0].role in ("drawn", "followed")
        say_what_is_there(store)
        result = result_of(store, found)
        assert result.pairs.found_by_champion == 0 and result.pairs.found_by_both >= 1  # the visit was found in its second window


@pytest.mark.parametrize("die_at", (1, 2, 4, 6, 8))
def test_an_interruption_at_any_batch_changes_nothing(tmp_path, monkeypatch, die_at):
    monkeypatch.setattr(collect, "BATCH", 3)
    with replay_yard(tmp_path / "whole") as store:
        pair = spot_bundle(store), spot_bundle(store, 0.8)
        shutil.copytree(tmp_path / "whole", tmp_path / "broken")
        replayed(store, *pair)
        whole = what_was_written(store)
    with Store.open(Home.open(tmp_path / "broken")) as store:
        calls = []

        def stop(*progress):
            calls.append(progress)
            if len(calls) == die_at:
                raise KeyboardInterrupt

        try:
            replayed(store, *pair, on_progress=stop)
            assert len(calls) < die_at, "it should have been interrupted"
        except KeyboardInterrupt:
            assert what_was_written(store)[0] == []
            again = []
            replayed(store, *pair, on_progress=lambda *progress: again.append(progress))
            assert len(again) < 8  # what was seen before is not looked at again
        assert what_was_written(store) == whole


def test_a_second_replay_costs_only_new_frames(tmp_path, monkeypatch):
    decoded = []
    real = collect.decode
    monkeypatch.setattr(collect, "decode", lambda data: (decoded.append(1), real(data))[1])
    with replay_yard(tmp_path / "yard") as store:
        pair = spot_bundle(store), spot_bundle(store, 0.8)
        replayed(store, *pair)
        assert len(decoded) == 12  # both see by the same model: only thresholds differ
        replayed(store, *pair)
        assert len(decoded) == 12
        add_frames(store, [NewFrame(blob(900, 250), "test", "new", camera="gate", taken_at=START + timedelta(hours=3))])
        replayed(store, *pair)
        assert len(decoded) == 13
        add_frames(store, [NewFrame(blob(900, 250), "again", str(n), camera=f"other{n}", taken_at=START + timedelta(hours=3)) for n in range(3)])
        seen = look(store, pair[0], frames(store))
        assert len(decoded) == 13  # the same picture under other names
        assert len({tuple((one.label, one.score, one.box) for one in seen[frame.id]) for frame in frames(store)[-4:]}) == 1


def test_one_picture_under_several_names_is_looked_at_once(tmp_path, monkeypatch):
    decoded = []
    real = collect.decode
    monkeypatch.setattr(collect, "decode", lambda data: (decoded.append(1), real(data))[1])
    with Store.open(Home.create(tmp_path / "yard")) as store:
        add_frames(store, [NewFrame(blob(n % 2, 250), "test", str(n), camera="gate", taken_at=START + timedelta(minutes=n)) for n in range(10)])
        progress = []
        seen = look(store, spot_bundle(store), frames(store), lambda *said: progress.append(said))
        assert len(decoded) == 2 and len(seen) == 10 and all(seen.values()) and progress[-1] == (10, 10)


def test_seen_nights_are_named_and_not_counted(tmp_path):
    with replay_yard(tmp_path / "yard", nights=6) as store:
        pair = spot_bundle(store), spot_bundle(store, 0.8)
        trained = origins(*pair, until=START + timedelta(days=3))
        found = replayed(store, *pair, known=trained)
        assert len(found.record["nights"]) + len(found.record["seen"]) == 6
        assert found.record["nights"] == ["gate/2026-09-02", "gate/2026-09-05", "gate/2026-09-06"], "a test night, and those that began after the data of both"
        counted = {night.split("/")[1] for night in found.record["nights"]}
        assert {window.window[:10] for window in found.windows} <= counted
        assert any("seen by one of the models" in sentence for sentence in sentences_of(result_of(store, found)))


def test_no_admissible_night_is_a_clear_answer(tmp_path):
    with replay_yard(tmp_path / "yard") as store:
        pair = spot_bundle(store), spot_bundle(store, 0.8)
        later = origins(*pair, until=AFTER - timedelta(days=1))
        assert code_of(lambda: replayed(store, *pair, known=later, span="2026-09-03..2026-09-30")) == "NO_NIGHTS"  # the second of September is a test night
        assert code_of(lambda: replayed(store, *pair, known=origins(*pair, nights=["gate/2026-09-02"]))) == "NIGHT_SEEN"
        assert code_of(lambda: replayed(store, *pair, span="2025-01-01..2025-01-31")) == "NO_FRAMES"
        assert code_of(lambda: replayed(store, *pair, span="soon")) == "BAD_SPAN"
        assert code_of(lambda: replayed(store, pair[0], pair[0])) == "SAME_MODEL"
        assert replays(store) == []
    with Store.open(Home.create(tmp_path / "empty")) as store:
        assert code_of(lambda: replayed(store, spot_bundle(store), spot_bundle(store, 0.8))) == "NO_FRAMES"


def test_a_clock_that_jumped_is_named(tmp_path):
    with replay_yard(tmp_path / "yard") as store:
        pair = spot_bundle(store), spot_bundle(store, 0.8)
        with pytest.raises(DeermlError, match="clock jumped") as caught:
            replayed(store, *pair, at=START - timedelta(days=1))
        assert caught.value.code == "NO_NIGHTS"
        with pytest.raises(DeermlError, match="data of .* end after now"):
            replayed(store, *pair, known=origins(*pair, until=AFTER + timedelta(days=9)), span="2026-09-03..2026-09-30")
        add_frames(store, [NewFrame(blob(77, 250), "test", "ahead", camera="gate", taken_at=START + timedelta(days=3000))])
        found = replayed(store, *pair, span="2026-08-30..2036-09-30")
        assert found.record["not_over"] == ["gate/2034-11-18"] and all("2034" not in window.window for window in found.windows)


def test_a_frame_that_expired_is_counted_and_left_out(tmp_path):
    with replay_yard(tmp_path / "yard") as store:
        pair = spot_bundle(store), spot_bundle(store, 0.8)
        first, second, third = frames(store)[:3]
        with store.write() as connection:
            connection.execute(sa.update(schema.image).where(schema.image.c.sha256 == first.image).values(expired_at=stamp(AFTER)))
        for frame in (first, second):
            image_path(store.home.images, frame.image, frame.media_type).unlink()
        found = replayed(store, *pair)
        assert found.record["expired_frames"] == 2 and sum(windows for windows, _ in found.strata.values()) == 10
        assert any("2 frames without a picture" in sentence for sentence in sentences_of(result_of(store, found)))
        image_path(store.home.images, third.image, third.media_type).unlink()  # after it was asked: nobody can answer it any more
        say_what_is_there(store, {frame.id for frame in frames(store)[3:]})
        result = result_of(store, found)
        assert result.complete and result.unknown == 1


def test_a_picture_that_goes_while_a_model_looks_stops_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "BATCH", 4)
    with replay_yard(tmp_path / "yard", nights=5) as store:
        pair, last = (spot_bundle(store), spot_bundle(store, 0.8, size=640)), frames(store)[-1]

        def lose(name, *_):
            if name.startswith("challenger"):
                image_path(store.home.images, last.image, last.media_type).unlink(missing_ok=True)

        found = replayed(store, *pair, on_progress=lose)
        assert found.record["expired_frames"] == 1 and found.record["windows"] == 19


def test_models_of_other_sizes_and_classes(tmp_path):
    with replay_yard(tmp_path / "yard", classes=["deer", "fox"]) as store:
        deer, wide, fox, both = spot_bundle(store), spot_bundle(store, 0.5, size=640), spot_bundle(store, 0.5, ("fox",)), spot_bundle(store, 0.5, ("deer", "fox"))
        assert replayed(store, deer, wide).record["windows"] == 12
        with pytest.raises(DeermlError, match="no animal in common"):
            replayed(store, deer, fox)
        found = replayed(store, deer, both)
        assert found.record["classes"] == ["deer"] and found.record["classes_left_out"] == ["fox"]


def test_a_partial_review_gives_bounds_and_allows_nothing(tmp_path):
    with replay_yard(tmp_path / "yard") as store:
        champion, challenger = spot_bundle(store, 0.8), spot_bundle(store)
        found = replayed(store, champion, challenger)
        empty = result_of(store, found)
        assert (empty.waiting, empty.visits, empty.bounds.visits_worst, empty.bounds.visits_best, empty.bounds.alarms_worst) == (12, 0, 0, 3, 3)
        assert code_of(lambda: accepting_replay(store, champion.digest, challenger.digest)) == "NO_REPLAY"
        say_what_is_there(store, {frame.id for frame in frames(store)[:4]})
        part = result_of(store, found)
        assert part.waiting == 8 and part.pairs.found_by_challenger == 1 and (part.bounds.visits_worst, part.bounds.visits_best) == (1, 3)
        assert "8 windows wait: about 3 minutes: `deerml review`." in sentences_of(part) and json.dumps(to_dict(part))
        assert code_of(lambda: accepting_replay(store, champion.digest, challenger.digest)) == "NO_REPLAY"
        say_what_is_there(store)
        whole = result_of(store, found)
        assert whole.complete and whole.words == "3 more visits" and regressions_of(whole) == [] and whole.recall.lower < 0.5 < whole.recall.upper
        assert accepting_replay(store, champion.digest, challenger.digest) == found.id
        assert code_of(lambda: accepting_replay(store, challenger.digest, champion.digest)) == "NO_REPLAY"  # exactly this pair


def test_a_false_alarm_more_and_a_window_nobody_can_tell_are_regressions(tmp_path):
    with replay_yard(tmp_path / "yard") as store:
        champion, challenger = spot_bundle(store, 0.8), spot_bundle(store)
        found = replayed(store, champion, challenger)
        say_what_is_there(store, animal_from=230)  # the pale thing is a wheelbarrow
        result = result_of(store, found)
        assert result.words == "3 more false alarms" and regressions_of(result)[0] == "It raises 3 false alarms more."
        assert code_of(lambda: accepting_replay(store, champion.digest, challenger.digest)) == "NO_REPLAY"
    with replay_yard(tmp_path / "other") as store:
        champion, challenger = spot_bundle(store), spot_bundle(store, 0.8)  # it may only lose
        found = replayed(store, champion, challenger)
        pale = {frame.id for frame in frames(store)[1::4]}
        say_what_is_there(store, {frame.id for frame in frames(store)} - pale)
        record(store, "ann", [FrameStatement(frame_id, "unsure", ("deer",)) for frame_id in pale])
        result = result_of(store, found)
        assert result.complete and result.unknown == 3 and regressions_of(result) == ["It may find 3 visits fewer."]


def test_an_older_replay_with_a_regression_is_not_forgotten(tmp_path):
    with replay_yard(tmp_path / "yard") as store:
        champion, challenger = spot_bundle(store), spot_bundle(store, 0.8)
        replayed(store, champion, challenger)
        say_what_is_there(store)
        add_frames(store, [NewFrame(blob(900 + n, 250), "test", f"new{n}", camera="gate", taken_at=START + timedelta(days=9, minutes=30 * n)) for n in range(2)])
        say_what_is_there(store, {frame.id for frame in frames(store)[-2:]})
        kind = replayed(store, champion, challenger, span="2026-09-10..2026-09-10")
        assert regressions_of(result_of(store, kind)) == []
        assert code_of(lambda: accepting_replay(store, champion.digest, challenger.digest)) == "NO_REPLAY"


# What the reviewer is shown

def pages(store: Store) -> list[dict]:
    "All that a browser is told of a replay"
    view = View(store, "ann", None)
    return [build_item(view, item_name(name)) for name in plan_review(view, "strip", "replay").items]


def test_the_page_is_the_same_whoever_is_the_champion(tmp_path):
    with replay_yard(tmp_path / "yard") as store:
        pair = spot_bundle(store), spot_bundle(store, 0.8, size=640)
        shown = []
        for models in (pair, pair[::-1]):
            replayed(store, *models)
            shown.append(sorted(pages(store), key=lambda item: item["id"]))
        assert shown[0] == shown[1] and any(frame["boxes"] for item in shown[0] for frame in item["frames"])


def test_no_message_of_a_replay_tells_which_model_spoke(tmp_path):
    with replay_yard(tmp_path / "yard") as store:
        champion, challenger = spot_bundle(store), spot_bundle(store, 0.8, size=640)
        found = replayed(store, champion, challenger)
        desk = open_desk(store, "ann", lambda: AFTER)
        messages = [message for message, _ in desk.handle({"type": "ready", "client": "x"})]
        messages += [message for message, _ in desk.handle({"type": "need", "after": desk.agenda.plan.items[1], "items": 12, "generation": desk.agenda.generation})]
        hello, items = messages[0], [item for message in messages if message["type"] == "items" for item in message["items"]]
        assert hello["choice"]["what"] == "replay" and items and "not told which" in hello["words"]
        boxes = [box for item in items for frame in item["frames"] for box in frame["boxes"]]
        assert boxes and {(box["score"], box["kind"]) for box in boxes} == {(None, "suggestion")}
        told = json.dumps(messages)
        assert not any(name in told for name in (champion.digest, challenger.digest, *found.sights, "differs", "silent", "champion"))


def test_a_verdict_on_a_replay_counts_and_is_not_asked_again(tmp_path):
    with replay_yard(tmp_path / "yard", nights=1) as store:
        found = replayed(store, spot_bundle(store), spot_bundle(store, 0.8, size=640))
        desk = open_desk(store, "ann", lambda: AFTER)
        list(desk.handle({"type": "ready", "client": "x"}))
        for number, name in enumerate(desk.agenda.plan.items):
            item = build_item(desk.view, item_name(name))
            [frame] = item["frames"]
            boxes = [{"box_key": box["box_key"], "detection_id": box["detection_id"], "word": "correct", "label": box["label"], "box": box["box"]} for box in frame["boxes"]]
            said = {"frame_id": frame["id"], "revision": frame["revision"], "statement": "all_boxed" if boxes else "nothing_here", "boxes": boxes}
            [(answer, _), *_] = desk.handle({"type": "verdict", "op_id": f"op{number}", "item_id": name, "source": "strip", "shown_ms": 900.0, "frames": [said]})
            assert answer["type"] == "ack", answer
        result = result_of(store, found)
        assert result.complete and result.visits == 2 and held_frames(store) == []
        with store.read() as connection:
            assert set(connection.scalars(sa.select(schema.review_event.c.source))) == {"strip:replay"}
        assert plan_review(desk.view, "strip", "replay").items == () and open_desk(store, "ann", lambda: AFTER).agenda.choice.what == "queue"


def test_other_pages_do_not_give_a_replay_away(tmp_path):
    with replay_yard(tmp_path / "yard", nights=1) as store:
        champion = spot_bundle(store)
        found = replayed(store, champion, spot_bundle(store, 0.8))
        look(store, champion, frames(store))
        view = View(store, "ann", champion)
        assert plan_review(view, "grid", "queue").items == () and Blind(store).windows == {window.key for window in found.windows}
        night = plan_review(view, "strip", "night", "2026-09-01").items
        assert all(box["score"] is None for name in night for frame in build_item(view, item_name(name))["frames"] for box in frame["boxes"])


def test_retention_keeps_what_a_replay_waits_for(tmp_path):
    with replay_yard(tmp_path / "yard") as store:
        replayed(store, spot_bundle(store), spot_bundle(store, 0.8))
        held = held_frames(store)
        assert len(held) == 12 and retain(store, at=AFTER + timedelta(days=900), held=held, dry_run=True).expired == 0
        say_what_is_there(store)
        assert held_frames(store) == []


def test_what_was_asked_cannot_be_rewritten(tmp_path):
    with replay_yard(tmp_path / "yard") as store:
        replayed(store, spot_bundle(store), spot_bundle(store, 0.8))
        for table in (schema.replay, schema.replay_stratum, schema.replay_window):
            for statement in (sa.delete(table), sa.update(table).values({table.primary_key.columns[0].name: 99})):
                with pytest.raises(sa.exc.IntegrityError, match="append-only"), store.write() as connection:
                    connection.execute(statement)


def test_an_older_home_is_migrated_after_a_backup(tmp_path):
    store = replay_yard(tmp_path / "yard", nights=1)
    with store.write() as connection:
        for name in ("test_use", "test_version", "case_event", "replay_window", "replay_stratum", "replay"):
            connection.exec_driver_sql(f"drop table {name}")
        connection.exec_driver_sql("update alembic_version set version_num = 'r0001'")
    store.close()
    with Store.open(Home.open(tmp_path / "yard")) as store:
        assert list(store.home.backups.glob("before-migration-*.db")) and len(frames(store)) == 4
        assert replayed(store, spot_bundle(store), spot_bundle(store, 0.8)).strata["differs"] == (1, 1)
        with pytest.raises(sa.exc.IntegrityError, match="append-only"), store.write() as connection:
            connection.execute(sa.delete(schema.replay))


def test_nights_are_sorted_by_what_they_are_good_for(tmp_path):
    with replay_yard(tmp_path / "yard", nights=4) as store:
        model = spot_bundle(store)
        found = nights_of_span(store, origins(model, until=START + timedelta(days=1)), "2026-09-01", "2026-09-30", START + timedelta(days=2, hours=20))
        assert "gate/2026-09-04" in found.not_over and "gate/2026-09-03" in found.counted and set(found.counted) | set(found.seen) | set(found.not_over) == {f"gate/2026-09-0{n}" for n in range(1, 5)}
        assert replay.LONGEST_SPAN > 365
