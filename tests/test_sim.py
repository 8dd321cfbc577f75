"""The simulated yard keeps its promises: same seed same bytes, true boxes, the cadence of a real camera, honest reviewers."""
import io
from datetime import date, timedelta
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from PIL import Image

from deerml.capture.cast import cast as cast_of
from deerml.capture.cast import group
from deerml.capture.reviewer import Reviewer
from deerml.capture.scene import KINDS, MARGIN_PX, make_scene
from deerml.capture.sim import MOVERS, QUIET_MINUTES, Yard, plan, watched
from deerml.core.box import Box, iou_matrix
from deerml.core.clock import night_of, window_of
from deerml.core.errors import DeermlError

ZONE = "America/Chicago"
BUSY = {"visits_mean": 5, "distractors_mean": 4}


@pytest.fixture(scope="module")
def yard():
    return Yard(seed=5)


@pytest.fixture(scope="module")
def busy_nights(yard):
    "Every frame of two nights at every camera"
    return {
        (camera.id, night): list(yard.night(camera.id, night, (17, 8), **BUSY))
        for camera in yard.cameras
        for night in ("2026-06-20", "2026-10-10")
    }


@pytest.fixture(scope="module")
def frames(busy_nights):
    return [frame for night in busy_nights.values() for frame in night]


def decoded(frame) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(frame.jpeg, np.uint8), cv2.IMREAD_COLOR)


def test_same_seed_same_bytes_in_any_order(busy_nights):
    again = Yard(seed=5)
    for key in reversed(list(busy_nights)[::3]):
        assert list(again.night(*key, (17, 8), **BUSY)) == busy_nights[key]


def test_another_seed_is_another_yard(yard):
    other = Yard(seed=6)
    assert not np.array_equal(yard.scene("cam1").day, other.scene("cam1").day)


def test_no_two_frames_share_bytes(frames):
    assert len({frame.jpeg for frame in frames}) == len(frames) > 500


def test_frames_are_jpegs_of_the_size_asked_for():
    yard = Yard(seed=1, cameras=6, image_size=(640, 360), label="hart")
    assert [camera.name for camera in yard.cameras][3:] == ["drive", "meadow 2", "woods 2"]
    found = list(yard.night("cam6", "2026-09-01", (19, 23), visits_mean=4))
    assert {Image.open(io.BytesIO(frame.jpeg)).size for frame in found} == {(640, 360)}
    assert {label for frame in found for label, _ in frame.boxes} == {"hart"}
    assert not np.array_equal(yard.scene("cam1").day, yard.scene("cam5").day)


def test_boxes_lie_inside_the_image_and_have_many_sizes(frames):
    boxes = [box for frame in frames for _, box in frame.boxes]
    for box in boxes:
        assert box == Box.from_xywh(box.xywh, (384, 288))
    widths = np.array([box.width for box in boxes])
    assert widths.min() > 6 and widths.max() < 384 * 0.6
    assert np.percentile(widths, 90) > 2.5 * np.percentile(widths, 10)


@pytest.mark.parametrize("seed", range(24))
def test_a_box_is_tight_around_what_changed_in_the_picture(seed):
    scene = make_scene(np.random.default_rng(seed % 4), kind=KINDS[seed % 4])
    actor = cast_of(np.random.default_rng(seed), "visit").actors[:1]
    picture, count = group(scene, True, actor, np.random.default_rng(seed), seed % 5 / 4)  # in infrared: no shadow
    assert count == 1
    view = slice(MARGIN_PX, MARGIN_PX + 288), slice(MARGIN_PX, MARGIN_PX + 384)
    changed = np.abs(picture.pixels[view].astype(int)[..., 0] - scene.infrared[view]) > 1
    box = picture.box(1, (MARGIN_PX, MARGIN_PX), (384, 288))
    ys, xs = np.nonzero(changed)
    seen = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
    assert np.abs(seen - box.xyxy).max() <= 2, (seen, box)


def test_every_frame_of_a_visit_shows_an_animal_and_no_other_frame_does(frames):
    for frame in frames:
        assert (frame.visit is not None) == bool(frame.boxes)
        if frame.distractor in MOVERS:
            assert not frame.boxes
    assert {frame.distractor for frame in frames} >= {"dog", "person", "branch", "insect"}
    assert not any(frame.distractor == "insect" and not frame.infrared for frame in frames)


def test_infrared_frames_are_grey_and_by_night(frames):
    for frame in frames[::9]:
        blue, _, red = cv2.split(decoded(frame).astype(int))
        assert (np.abs(blue - red).max() <= 2) == frame.infrared
    hours = {frame.taken_at.hour for frame in frames if frame.infrared}
    assert {3, 4, 5, 6} <= hours and not hours & {14, 15, 16, 21, 22}  # UTC: six hours ahead, five in summer


def test_cadence(busy_nights):
    for (camera, night), frames in busy_nights.items():
        times = [frame.taken_at for frame in frames]
        assert all(earlier < later for earlier, later in zip(times, times[1:]))
        assert all(frame.camera == camera and night_of(frame.taken_at, ZONE) == night for frame in frames)
        assert all(time.microsecond % 1000 == 0 for time in times)
        windows = [window_of(frame.taken_at, ZONE) for frame in frames if frame.trigger == "scheduled"]
        assert len(windows) == len(set(windows)) == 15 * 6
        start, end = watched(night, ZONE, (17, 8))
        assert all(start <= time < end for time in times)


def test_visits_are_bursts_far_apart(busy_nights):
    count = 0
    for frames in busy_nights.values():
        by_visit = {}
        for frame in frames:
            if frame.visit is not None:
                by_visit.setdefault(frame.visit, []).append(frame.taken_at)
        assert list(by_visit) == list(range(len(by_visit)))
        visits = list(by_visit.values())
        for times in visits:
            steps = [(later - earlier).total_seconds() for earlier, later in zip(times, times[1:])]
            assert 3 <= len(times) <= 6 and all(30 <= step <= 90 for step in steps)
        for earlier, later in zip(visits, visits[1:]):
            assert later[0] - earlier[-1] >= timedelta(minutes=QUIET_MINUTES)
        count += len(visits)
    assert 20 < count < 60  # 8 nights, 5 a night


@pytest.mark.parametrize("night, hours", [("2026-09-01", 14), ("2026-10-31", 15), ("2027-03-13", 13)])
def test_the_night_the_clocks_change_has_an_hour_more_or_less(yard, night, hours):
    frames = list(yard.night("cam2", night, visits_mean=0, distractors_mean=0))
    assert len(frames) == hours * 6
    assert len({window_of(frame.taken_at, ZONE) for frame in frames}) == len(frames)
    assert {night_of(frame.taken_at, ZONE) for frame in frames} == {night}


@pytest.mark.parametrize("hours, length", [((19, 23), 4), ((1, 5.5), 4.5), ((12, 11.5), 23.5), ((18, 12), 18)])
def test_hours_on_either_side_of_midnight(hours, length):
    start, end = watched("2026-09-01", ZONE, hours)
    assert (end - start) / timedelta(hours=1) == length
    assert night_of(start, ZONE) == night_of(end - timedelta(seconds=1), ZONE) == "2026-09-01"


def test_what_cannot_be_asked_for(yard):
    for arguments, code in ((("cam9", "2026-09-01"), "UNKNOWN_CAMERA"), (("cam1", "2026-09-01", (8, 18)), "BAD_HOURS")):
        with pytest.raises(DeermlError) as refusal:
            yard.night(*arguments)
        assert refusal.value.code == code


def test_a_full_night_keeps_its_gaps_and_its_share_of_visits():
    start, end = watched("2026-09-01", ZONE, (18, 8))
    events = plan(np.random.default_rng(0), start, end, visits_mean=60, distractors_mean=60)
    assert len(events) > 25 and start <= events[0].start and events[-1].end <= end
    assert all(later.start - earlier.end >= timedelta(minutes=QUIET_MINUTES) for earlier, later in zip(events, events[1:]))
    assert 0.25 < np.mean([event.kind == "visit" for event in events]) < 0.75


def test_means_are_kept():
    start, end = watched("2026-09-01", ZONE, (18, 8))
    nights = [plan(np.random.default_rng(seed), start, end, 1.5, 2.0) for seed in range(800)]
    visits = np.mean([sum(event.kind == "visit" for event in night) for night in nights])
    assert abs(visits - 1.5) < 4 * np.sqrt(1.5 / 800)


def detection(number: int, box: Box, label: str = "deer"):
    return SimpleNamespace(id=number, label=label, score=0.5, box=box)


SOMEWHERE, ELSEWHERE = Box(40, 60, 100, 80), Box(250, 90, 60, 50)


def test_a_careful_reviewer_is_right():
    truth = [("deer", SOMEWHERE), ("deer", ELSEWHERE)]
    shown = [detection(1, Box(45, 60, 100, 80)), detection(2, Box(42, 60, 100, 80)), detection(3, Box(252, 90, 60, 50), "fox")]
    review = Reviewer(0).judge(truth, shown)
    assert [(judgement.kind, judgement.detection_id) for judgement in review.judgements] == [
        ("false_positive", 1),
        ("correct", 2),
        ("false_positive", 3),
        ("missed", None),
    ]
    assert review.judgements[3].box == ELSEWHERE and review.statement == "all_boxed"
    assert Reviewer(0).judge([], []) == ([], "nothing_here")


def test_the_error_rate_is_the_rate_of_errors():
    reviewer = Reviewer(seed=3, error_rate=0.2)
    forgotten = sum(not reviewer.judge([("deer", SOMEWHERE)], []).judgements for _ in range(2000))
    waved = sum(reviewer.judge([], [detection(1, SOMEWHERE)]).judgements[0].kind == "correct" for _ in range(2000))
    for errors in (forgotten, waved):
        assert abs(errors - 400) < 4 * np.sqrt(2000 * 0.2 * 0.8)
    assert all(reviewer.judge([("deer", SOMEWHERE)], [detection(1, SOMEWHERE)]).statement == "all_boxed" for _ in range(50))


def test_a_statement_never_contradicts_the_boxes_left_standing():
    rng, reviewer = np.random.default_rng(1), Reviewer(seed=1, error_rate=0.5, box_noise=0.1)
    for _ in range(300):
        truth = [("deer", box) for box in (SOMEWHERE, ELSEWHERE) if rng.random() < 0.5]
        shown = [detection(number, box) for number, box in enumerate((SOMEWHERE, Box(5, 200, 70, 60))) if rng.random() < 0.5]
        judgements, statement = reviewer.judge(truth, shown)
        standing = [judgement for judgement in judgements if judgement.kind != "false_positive"]
        assert statement == ("all_boxed" if standing else "nothing_here")


def test_drawn_boxes_are_as_good_as_a_hand_and_stay_inside_the_image():
    reviewer, corner = Reviewer(seed=2, box_noise=0.05), Box(0, 0, 60, 50)
    drawn = [reviewer.judge([("deer", corner)], []).judgements[0].box for _ in range(300)]
    assert all(box == Box.from_xywh(box.xywh, (384, 288)) for box in drawn)
    overlap = iou_matrix([corner.xywh], [box.xywh for box in drawn])[0]
    assert 0.85 < overlap.mean() < 0.97 and overlap.min() > 0.6
    assert Reviewer(seed=2).judge([("deer", corner)], []).judgements[0].box == corner


def test_reviewers_of_one_seed_agree_with_themselves():
    truth = [("deer", SOMEWHERE), ("deer", ELSEWHERE)]
    first, second = (Reviewer(seed=9, error_rate=0.4, box_noise=0.05) for _ in range(2))
    assert [first.judge(truth, []) for _ in range(20)] == [second.judge(truth, []) for _ in range(20)]


def test_a_week_apart_the_same_camera_sees_the_same_yard(yard):
    days = [date(2026, 9, 1) + timedelta(days=7 * week) for week in range(2)]
    pictures = [decoded(next(yard.night("cam3", day.isoformat(), (15, 17), visits_mean=0, distractors_mean=0))) for day in days]
    flat = [cv2.blur(picture, (25, 25)).astype(float).ravel() for picture in pictures]
    assert np.corrcoef(*flat)[0, 1] > 0.9
