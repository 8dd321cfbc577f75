"""The queue: draws that add up, prefixes that are samples, visits that are followed to their end, and words that are true."""
from datetime import timedelta

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deerml.capture import schema
from deerml.capture.store import NewFrame, Store, add_camera, add_frames, frames, record_inference
from deerml.capture.truth import BoxVerdict, FrameStatement, record
from deerml.core.box import Box
from deerml.core.clock import parse_time, stamp
from deerml.core.errors import DeermlError
from deerml.core.settings import Home
from deerml.judge.collect import evidence_of, window_probabilities
from deerml.judge.evidence import sample_of
from deerml.model.detector import Detection
from deerml.review.estimate import Cell, count_cells, estimate, estimate_for
from deerml.review.queue import (
    BALANCED_LABELS,
    SHARES,
    Answer,
    DrawnWindow,
    allocate,
    answers,
    close_due,
    close_night,
    draw_order,
    draw_strata,
    drawn_windows,
    follow,
    kind_of,
    probabilities,
    split_by_place,
    tonight,
)
from yards import START, picture

BUNDLE = "b" * 64
NIGHT = "2026-09-01"
NOON = parse_time("2026-09-02T12:00:00Z")
FIRST = START - timedelta(hours=4)  # 18:00

KINDS = st.sampled_from(["alarm", "low", "disagreement/alarm", "disagreement/silent", "nothing"])
SIZES = st.dictionaries(st.builds(lambda kind, camera: f"{kind}/{camera}", KINDS, st.sampled_from("abcdef")), st.integers(1, 300), max_size=20)


@pytest.fixture
def store(tmp_path):
    with Store.open(Home.create(tmp_path / "yard")) as opened:
        yield opened


def take(store: Store, count: int, camera: str = "gate", first=FIRST, minutes: int = 10, fired=()) -> list[int]:
    "A frame a window; an inference of the bundle on each"
    new = [NewFrame(picture(hash(camera) % 1000 + n), "test", f"{camera}/{stamp(first)}/{n}", camera=camera, taken_at=first + timedelta(minutes=minutes * n), trigger="scheduled") for n in range(count)]
    ids = add_frames(store, new)
    record_inference(store, BUNDLE, [(i, [Detection("deer", 0.9, Box(1, 1, 9, 9))] if n in fired else [], n in fired) for n, i in enumerate(ids)])
    return ids


def say(store: Store, frame_id: int, word: str) -> None:
    box = [BoxVerdict(frame_id, "missed", "deer", Box(40, 30, 48, 32))] if word == "all_boxed" else []
    record(store, "ann", [*box, FrameStatement(frame_id, word, ("deer",))])


def review_all(store: Store, animals: set[int], unsure: set[int] = frozenset(), at=NOON) -> int:
    "Answer the queue in its order until it is empty; returns how many windows were answered"
    for count in range(1000):
        waiting = tonight(store, at).waiting
        if not waiting:
            return count
        for frame_id in waiting[0].frame_ids:
            say(store, frame_id, "unsure" if frame_id in unsure else "all_boxed" if frame_id in animals else "nothing_here")
        follow(store, [waiting[0].key])
        assert follow(store) == []
    raise AssertionError("the queue does not end")


@given(SIZES, st.integers(0, 400), st.booleans())
def test_an_allocation_adds_up(sizes, budget, balanced):
    drawn = allocate(sizes, budget, balanced)
    assert sum(drawn.values()) == min(budget, sum(sizes.values()))
    assert all(0 <= drawn[name] <= sizes[name] for name in sizes)
    if budget >= len(sizes):
        assert all(drawn.values())


@given(st.lists(st.tuples(KINDS, st.sampled_from("abcdefgh"), st.sampled_from(["day", "infrared"])), min_size=1, max_size=120), st.integers(5, 60), st.booleans())
@settings(deadline=None)
def test_no_window_has_probability_zero_and_alarms_come_first(windows, budget, balanced):
    strata = {(camera, f"{n:03d}"): kind for n, (kind, camera, _) in enumerate(windows)}
    lights = {(camera, f"{n:03d}"): light for n, (_, camera, light) in enumerate(windows)}
    split = split_by_place(strata, budget, lights if balanced else None)
    order = draw_order(split, budget, np.random.default_rng(0), balanced)
    assert sorted(window for members in split.values() for window in members) == sorted(strata)
    assert {name for name, _ in order} == set(split) and len(set(order)) == len(order) == min(budget, len(strata))
    kinds = [kind_of(name) for name in split]
    assert kind_of(order[0][0]) == min(kinds, key=list(SHARES).index)


def test_every_window_of_a_stratum_is_equally_likely_at_every_place():
    strata = {"alarm": [("a", str(n)) for n in range(4)], "nothing": [("a", str(n)) for n in range(4, 12)]}
    seen = np.zeros((12, 6))
    for seed in range(3000):
        for place, (_, window) in enumerate(draw_order(strata, 6, np.random.default_rng(seed))):
            seen[int(window[1]), place] += 1
    for members in (slice(0, 4), slice(4, 12)):
        share = seen[members] / seen[members].sum(0).clip(1)
        assert np.abs(share - share.mean(0)).max() < 0.04


WORDS = st.sampled_from(["boxes_complete", "verified_empty", "unsure", "disputed", "excluded", "unreviewed", "in_progress", "gone"])


@given(st.lists(WORDS, min_size=1, max_size=12))
def test_the_prefix_ends_at_the_first_open_window_and_passes_what_nobody_could_tell(words):
    drawn = [DrawnWindow("n", "a", str(n), f"nothing/{n % 2}", n, 10, 6) for n in range(len(words))]
    end = next((n for n, word in enumerate(words) if word in ("unreviewed", "in_progress")), len(words))
    found = probabilities(drawn, {one.key: [word] for one, word in zip(drawn, words)})
    assert {int(window) for _, window in found} == {n for n in range(end) if words[n] in ("boxes_complete", "verified_empty")}
    cells = count_cells(drawn, {one.key: Answer((word,)) for one, word in zip(drawn, words)}, {"n": {"nothing/0": 10, "nothing/1": 10}})
    assert sum(cell.judged for cell in cells) == len(found) and sum(cell.judged + cell.skipped for cell in cells) == end
    for cell in cells:
        assert {p for (_, window), p in found.items() if f"nothing/{int(window) % 2}" == cell.stratum} <= {cell.judged / 10}


def test_an_unsure_window_does_not_stop_the_prefix(store):
    ids = take(store, 6)
    close_night(store, NIGHT, BUNDLE, budget=3)
    first, second, third = (next(one.id for one in frames(store) if one.window == drawn.window) for drawn in drawn_windows(store))
    say(store, first, "unsure")
    say(store, second, "nothing_here")
    assert list(window_probabilities(store).values()) == [1 / 6]
    assert [answer.open for answer in answers(store, [one.key for one in drawn_windows(store)]).values()] == [False, False, True]
    assert len(ids) == 6 and tonight(store, NOON).drawn == 1


@pytest.mark.parametrize("seed", [0, 1, 2, 5])  # yards with visits of several windows
def test_following_ends_and_finds_every_touched_visit_whole(tmp_path, seed):
    rng = np.random.default_rng(seed)
    with Store.open(Home.create(tmp_path / "yard")) as store:
        ids = take(store, 80, minutes=5)
        there, unclear = rng.random(40) < 0.4, rng.random(40) < 0.05
        animals = {ids[2 * n + half] for n in range(40) for half in (0, 1) if there[n]}
        fog = {ids[2 * n] for n in range(40) if unclear[n]} - animals
        close_night(store, NIGHT, BUNDLE, budget=5)
        asked = review_all(store, animals, fog)
        roles = {row.window: row.role for row in tonight_rows(store)}
        windows = sorted({frame.window for frame in frames(store)})
        assert asked == len(roles) and sum(role == "drawn" for role in roles.values()) == 5
        for n, window in enumerate(windows):
            if window in roles and there[n]:
                assert all(windows[m] in roles for m in (n - 1, n + 1) if 0 <= m < 40)
        evidence = evidence_of(store, [f"gate/{NIGHT}"])
        assert {frame.role for frame in evidence.frames} <= {"drawn", "followed"}
        weights = dict(zip((visit.id for visit in evidence.visits), sample_of(evidence).visit_weight))
        chances = window_probabilities(store)
        assert any(len(visit.windows) > 1 for visit in evidence.visits)
        for visit in evidence.visits:
            wanted = sum(1 / (chances["gate", window] * len(visit.windows)) for window in visit.windows if ("gate", window) in chances)
            assert weights[visit.id] == pytest.approx(wanted)


def tonight_rows(store):
    with store.read() as connection:
        return connection.execute(schema.draw_window.select()).all()


def test_noon_and_gaps_bound_a_visit(store):
    last = parse_time("2026-09-02T11:50:00Z")
    [alone] = take(store, 1, first=last)
    take(store, 1, first=last + timedelta(minutes=10))  # the next night
    take(store, 1, camera="lawn", first=last - timedelta(minutes=20))
    close_night(store, NIGHT, BUNDLE)
    say(store, alone, "all_boxed")
    assert follow(store) == []


def test_a_reviewed_neighbour_is_part_of_the_visit_and_not_volunteered(store):
    ids = take(store, 30, fired=(10,))
    for n in (10, 11, 12):
        say(store, ids[n], "all_boxed" if n < 12 else "nothing_here")
    close_night(store, NIGHT, BUNDLE, budget=2)
    assert len(follow(store)) == 3  # 9, 11 and 12; 11 was known to hold the animal
    review_all(store, {ids[10], ids[11]})
    evidence = evidence_of(store, [f"gate/{NIGHT}"])
    assert [visit.frame_ids for visit in evidence.visits] == [(ids[10],), (ids[11],)]  # ten minutes apart
    assert {frame.role for frame in evidence.frames} == {"drawn", "followed"} and sample_of(evidence).selection == "drawn"


def test_what_somebody_chose_has_no_probability(store):
    ids = take(store, 30)
    close_night(store, NIGHT, BUNDLE, budget=3)
    asked = {one.window for one in drawn_windows(store)}
    chosen = next(frame.id for frame in frames(store) if frame.window not in asked)
    say(store, chosen, "nothing_here")
    review_all(store, set())
    frame = next(one for one in evidence_of(store, [f"gate/{NIGHT}"]).frames if one.frame_id == chosen)
    assert (frame.role, frame.p) == ("volunteered", None) and len(ids) == 30


def test_the_first_hundred_labels_are_spread_and_later_ones_are_not(store):
    for camera in ("gate", "lawn", "pond"):
        take(store, 40, camera)
    close_night(store, NIGHT, None, budget=12)
    assert {kind_of(one.stratum) for one in drawn_windows(store)} == {"nothing"}
    assert all(name.endswith(("/day", "/infrared")) for name in draw_strata(store)[NIGHT])
    per_camera = [sum(one.camera == camera for one in drawn_windows(store)) for camera in ("gate", "lawn", "pond")]
    assert max(per_camera) - min(per_camera) <= 1
    for frame in frames(store)[:BALANCED_LABELS]:
        say(store, frame.id, "nothing_here")
    take(store, 40, first=FIRST + timedelta(days=1))
    close_night(store, "2026-09-02", None, budget=12)
    assert set(draw_strata(store)["2026-09-02"]) == {"nothing/gate"}


def test_where_a_model_loses_an_animal_between_two_alarms_people_are_asked(store):
    take(store, 8, fired=(0, 2, 5))  # a gap of one window, then one of two
    take(store, 8, "lawn", fired=(1,))
    close_night(store, NIGHT, BUNDLE, budget=99)
    gaps = [window for window in drawn_windows(store) if window.stratum.startswith("disagreement/silent")]
    assert [(window.camera, window.window) for window in gaps] == [("gate", stamp(FIRST + timedelta(minutes=10)))]
    assert kind_of(gaps[0].stratum) == "disagreement" and gaps[0].stratum_windows == 1


def test_due_nights_are_drawn_once_and_old_ones_are_left(store):
    add_camera(store, "west", zone="America/Los_Angeles")
    for day in (-40, -1, 0):
        take(store, 3, first=FIRST + timedelta(days=day))
    assert close_due(store, BUNDLE, NOON - timedelta(minutes=1)).running == (NIGHT,)
    take(store, 1, camera="west", first=FIRST + timedelta(days=-40, hours=6))
    done = close_due(store, BUNDLE, NOON)  # noon in the west comes seven hours later
    assert done.drawn == {} and done.old == ("2026-07-23",) and done.running == (NIGHT,)
    assert close_due(store, BUNDLE, NOON + timedelta(hours=7)).drawn == {NIGHT: 3}
    assert close_due(store, BUNDLE, NOON + timedelta(hours=7)).drawn == {}
    assert "raise draw_days" in tonight_after_review(store)
    assert close_due(store, BUNDLE, NOON + timedelta(hours=7), days=100).drawn == {"2026-07-23": 4}


def tonight_after_review(store):
    review_all(store, set(), at=NOON + timedelta(hours=7))
    return tonight(store, NOON + timedelta(hours=7)).words


def test_two_processes_that_close_at_once_make_one_draw(store, monkeypatch):
    import deerml.review.queue as queue
    take(store, 5)
    real = queue.strata_of

    def while_another_draws(*args):
        strata = real(*args)
        monkeypatch.setattr(queue, "strata_of", real)
        with Store.open(store.home) as other:
            assert close_due(other, BUNDLE, NOON).drawn == {NIGHT: 5}
        return strata

    monkeypatch.setattr(queue, "strata_of", while_another_draws)
    done = close_due(store, BUNDLE, NOON)
    assert (done.drawn, done.elsewhere) == ({}, (NIGHT,)) and len(drawn_windows(store)) == 5
    with pytest.raises(DeermlError, match="drawn already"):
        close_night(store, NIGHT, BUNDLE)


def test_a_night_without_the_model_is_drawn_as_one_without(store):
    take(store, 3)
    close_due(store, "c" * 64, NOON)
    with store.read() as connection:
        assert connection.scalar(schema.draw.select().with_only_columns(schema.draw.c.bundle)) is None


def test_the_words_are_true(store):
    assert tonight(store, NOON).words == "Nothing to review, because there are no frames."
    add_frames(store, [NewFrame(picture(9999), "test", "loose")])
    assert "no frame has a time" in tonight(store, NOON).words and "1 frames" in tonight(store, NOON).words
    take(store, 30, fired=(4, 9, 14))
    assert "no night has ended yet" in tonight(store, NOON - timedelta(hours=1)).words
    assert "1 night that ended was not drawn yet" in tonight(store, NOON).words
    assert "no night is recent enough" in tonight(store, NOON + timedelta(days=60)).words
    close_due(store, BUNDLE, NOON)
    assert tonight(store, NOON).words == "Tonight: 12 windows, about 5 minutes, because 3 alarms and 9 silent ones were drawn (night of 2026-09-01)."
    first = tonight(store, NOON).windows[0]
    say(store, first.frame_ids[0], "all_boxed")
    pulled = follow(store, [first.key])
    found = tonight(store, NOON)
    assert (found.drawn, found.followed, found.minutes) == (11, len(pulled), round((11 + len(pulled)) * 25 / 60))
    take(store, 3, first=FIRST + timedelta(days=1))
    close_due(store, BUNDLE, NOON + timedelta(days=1))
    assert "Tonight: 3 windows, about 1 minute" in tonight(store, NOON).words and "of 1 earlier night wait behind" in tonight(store, NOON).words
    assert [one.night for one in tonight(store, NOON).windows][0] == "2026-09-02"
    review_all(store, set())
    assert tonight(store, NOON).words == "Nothing to review, because everything that was drawn is judged."


def test_an_expired_picture_is_not_asked_for(store):
    take(store, 3)
    close_night(store, NIGHT, BUNDLE)
    with store.write() as connection:
        connection.execute(schema.image.update().values(expired_at="2026-10-01T00:00:00.000Z"))
    assert tonight(store, NOON).waiting == () and window_probabilities(store) == {}


def test_the_estimate_of_a_store_is_that_of_its_counts(store):
    ids = take(store, 100, minutes=10, fired=range(0, 100, 25))
    close_night(store, NIGHT, BUNDLE, budget=80)
    review_all(store, {ids[0], ids[25], ids[60]})
    found = estimate_for(store, BUNDLE)
    assert found.precision.median == 0.5 and found.silent[1] >= 50 and found.recall.lower < 2 / 3 <= found.recall.upper
    assert estimate_for(store, "c" * 64).recall is None


@given(st.lists(st.tuples(st.sampled_from(["alarm", "low", "nothing/a", "nothing/b", "disagreement/silent"]), st.integers(1, 200), st.integers(0, 60), st.integers(0, 60), st.integers(0, 10)), max_size=20))
@settings(deadline=None, max_examples=60)
def test_an_estimate_never_leaves_its_bounds(rows):
    cells = [Cell(str(n % 3), name, judged + skipped + windows, judged, min(animals, judged), skipped) for n, (name, windows, judged, animals, skipped) in enumerate(rows)]
    found = estimate(cells)
    for figure, bounds in ((found.precision, found.precision_bounds), (found.recall, found.recall_bounds)):
        if figure is None:
            assert found.because and bounds is None
        else:
            assert 0 <= figure.lower <= figure.median <= figure.upper <= 1 and 0 <= bounds[0] <= bounds[1] <= 1
    assert found.words
