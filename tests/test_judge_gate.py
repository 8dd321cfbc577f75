"""What the gate must never do, and how often it is right on yards whose truth is known."""
import json
from dataclasses import replace
from datetime import date

import numpy as np
import pytest

from deerml.core.errors import DeermlError
from deerml.judge.compare import Contestant
from deerml.judge.evidence import (
    Evidence,
    JudgedFrame,
    Mark,
    Thresholds,
    Visit,
    drawn_only,
    practice_evidence,
    practice_predictions,
)
from deerml.judge.gate import GateContext, GateSettings, judge

AT_HALF = Thresholds({"deer": 0.5})
FAST = GateSettings(draws=300)


def contestant(yard, skill=1.0, alarm_rate=0.05, seed=0, thresholds=AT_HALF):
    return Contestant(practice_predictions(yard, skill, alarm_rate, seed), thresholds)


def better_pair(visits, **more):
    "Evidence on which the second model is clearly better"
    yard = practice_evidence(visits=visits, nights=max(20, visits // 2), **more)
    return yard, contestant(yard, 0.0, 0.1, 1), contestant(yard, 3.5, 0.02, 2)


def dropped(model, share, seed=0):
    "The model without that share of its boxes"
    rng = np.random.default_rng(seed)
    return replace(model, predictions={i: [mark for mark in marks if rng.random() >= share] for i, marks in model.predictions.items()})


def test_a_clearly_better_model_is_promoted():
    verdict = judge(*better_pair(150), FAST)
    assert (verdict.verdict, verdict.max_stage, verdict.missing_visits, verdict.when) == ("promote", "full", None, None)


@pytest.mark.parametrize("visits, expected", [(39, "not_enough_evidence"), (40, "promote")])
def test_forty_visits_are_the_least(visits, expected):
    yard, champion, challenger = better_pair(visits)
    verdict = judge(yard, champion, challenger, FAST, GateContext(visits_per_day=0.5, today=date(2026, 10, 31)))
    assert verdict.verdict == expected
    if visits == 39:
        assert (verdict.max_stage, verdict.missing_visits, verdict.when, verdict.caps) == ("shadow", 1, date(2026, 11, 2), ("few_visits",))


@pytest.mark.parametrize("visits", [39, 60, 150])
def test_identical_models_are_never_promoted(visits):
    yard, champion, _ = better_pair(visits)
    for primary in ("visit_recall", "false_alarms"):
        verdict = judge(yard, champion, champion, replace(FAST, primary=primary))
        assert verdict.verdict == "not_enough_evidence" and verdict.missing_visits > 0
        assert verdict.numbers["recall"]["estimate"] == verdict.numbers["ap"]["upper"] == 0.0


@pytest.mark.parametrize("share", [0.4, 0.7, 1.0])
@pytest.mark.parametrize("visits", [60, 150])
def test_a_model_that_lost_boxes_is_rejected(visits, share):
    yard = practice_evidence(visits=visits)
    champion = contestant(yard, 2.0)
    verdict = judge(yard, champion, dropped(champion, share), FAST)
    assert (verdict.verdict, verdict.max_stage) == ("reject", "none")


def test_below_forty_visits_nothing_is_rejected():
    yard = practice_evidence(visits=30)
    champion = contestant(yard, 2.0)
    assert judge(yard, champion, dropped(champion, 1.0), FAST).verdict == "not_enough_evidence"


def test_a_provisional_calibration_promotes_nothing():
    verdict = judge(*better_pair(150), FAST, GateContext(provisional=True))
    assert verdict.verdict == "not_enough_evidence" and verdict.caps == ("provisional_calibration",) and verdict.missing_visits == 0


def volunteered(frame):
    return replace(frame, role="volunteered", p=None)


@pytest.mark.parametrize("champion_there", [True, False])
def test_visits_without_probabilities_promote_nothing(champion_there):
    yard, champion, challenger = better_pair(150)
    chosen = replace(yard, frames=tuple(map(volunteered, yard.frames)))
    verdict = judge(chosen, champion if champion_there else None, challenger, FAST)
    assert verdict.verdict == "not_enough_evidence" and "selection_unknown" in verdict.caps and verdict.missing_visits > 0
    assert verdict.numbers["challenger"]["per_image"] is not None and verdict.numbers["challenger"]["per_camera_night"] is None


def test_one_volunteered_visit_caps_until_it_is_left_out():
    yard, champion, challenger = better_pair(150)
    last = yard.visits[-1]
    frames = tuple(volunteered(frame) if frame.frame_id in last.frame_ids else frame for frame in yard.frames)
    mixed = replace(yard, frames=frames)
    assert judge(mixed, champion, challenger, FAST).caps == ("selection_unknown",)
    verdict = judge(drawn_only(mixed), champion, challenger, FAST)
    assert verdict.verdict == "promote" and verdict.numbers["visits"] == 149


def test_more_false_alarms_are_rejected_however_good_the_recall():
    yard = practice_evidence(visits=100)
    verdict = judge(yard, contestant(yard, 0.0, 0.05, 1), contestant(yard, 4.0, 0.7, 2), FAST)
    assert verdict.verdict == "reject" and "false alarms" in verdict.summary


def test_one_false_alarm_more_on_a_quiet_yard_does_not_block():
    yard = practice_evidence(visits=120, empty_windows=200, p=1.0, nights=30)
    champion, challenger = contestant(yard, 0.0, 0.0, 1), contestant(yard, 3.5, 0.0, 2)
    empty = next(frame.frame_id for frame in yard.frames if not frame.truth)
    challenger.predictions[empty].append(Mark("deer", yard.frames[0].truth[0].box, 0.9))
    verdict = judge(yard, champion, challenger, FAST)
    assert verdict.numbers["false_alarm_ratio"]["upper"] is None and verdict.verdict == "promote"


def test_a_release_that_fixes_false_alarms_may_name_them_as_its_goal():
    yard = practice_evidence(visits=160, nights=30)
    champion = contestant(yard, 1.5, 0.3, 1)
    quiet = {i: [mark for mark in marks if mark.box.xywh[:2] != (500, 250)] for i, marks in champion.predictions.items()}
    challenger = replace(champion, predictions=quiet)
    assert judge(yard, champion, challenger, replace(FAST, primary="false_alarms")).verdict == "promote"
    assert judge(yard, champion, challenger, FAST).verdict == "not_enough_evidence"


def shifted(model):
    "The same boxes, a third of their width to the side: still a hit at IoU 0.3, no longer at 0.5 to 0.95"
    def moved(mark):
        return mark._replace(box=replace(mark.box, x=mark.box.x + mark.box.width * 0.35))
    return replace(model, predictions={i: [moved(mark) for mark in marks] for i, marks in model.predictions.items()})


@pytest.mark.parametrize("visits, by_hand, expected", [(120, True, "reject"), (120, False, "not_enough_evidence"), (90, True, "not_enough_evidence")])
def test_ap_binds_from_a_hundred_visits_boxed_by_hand(visits, by_hand, expected):
    yard = practice_evidence(visits=visits)
    yard = replace(yard, visits=tuple(replace(visit, hand_boxed=by_hand) for visit in yard.visits))
    champion = contestant(yard, 2.0)
    verdict = judge(yard, champion, shifted(champion), FAST)
    assert verdict.verdict == expected
    assert any(check["name"] == "ap50" for check in verdict.numbers["checks"]) == (visits >= 100 and by_hand)
    assert expected == "reject" or any("AP50" in warning for warning in verdict.warnings)


def test_a_loss_at_one_camera_blocks():
    yard = practice_evidence(visits=240, nights=120, cameras=("a", "b", "c", "d"))
    yard = replace(yard, visits=tuple(replace(visit, hand_boxed=False) for visit in yard.visits))
    champion, challenger, rng = contestant(yard, 0.5, 0.1, 1), contestant(yard, 3.5, 0.02, 2), np.random.default_rng(0)
    lost = {i for visit in yard.visits if visit.camera == "d" and rng.random() < 0.7 for i in visit.frame_ids}
    partly_blind = {i: [] if i in lost else marks for i, marks in challenger.predictions.items()}
    assert judge(yard, champion, challenger, FAST).verdict == "promote"
    verdict = judge(yard, champion, replace(challenger, predictions=partly_blind), FAST)
    assert verdict.verdict == "not_enough_evidence" and verdict.summary.startswith("Not enough evidence: it loses visits here: camera d")


def test_the_first_model_needs_its_floors():
    yard = practice_evidence(visits=12)
    good = judge(yard, None, contestant(yard, 3.0), FAST, GateContext(provisional=True))
    assert (good.verdict, good.max_stage) == ("first", "full") and any("provisional" in warning for warning in good.warnings)
    assert judge(yard, None, contestant(yard, 3.0, 1.0), FAST).verdict == "reject"
    assert judge(yard, None, contestant(yard, -5.0), FAST).verdict == "reject"
    few = practice_evidence(visits=3)
    verdict = judge(few, None, contestant(few, 5.0), FAST)
    assert (verdict.verdict, verdict.max_stage, verdict.missing_visits) == ("not_enough_evidence", "shadow", 2)


def test_unknown_training_nights_are_said():
    assert any("trained on" in warning for warning in judge(*better_pair(50), FAST, GateContext(champion_nights_known=False)).warnings)
    assert any("12 models" in warning for warning in judge(*better_pair(50), FAST, GateContext(earlier_judgements=12)).warnings)


@pytest.mark.parametrize("champion_there", [True, False])
def test_no_evidence_at_all(champion_there):
    nothing, blank = Evidence((), (), {}, ("deer",)), Contestant({}, AT_HALF)
    verdict = judge(nothing, blank if champion_there else None, blank, FAST, GateContext(visits_per_day=0.0))
    assert verdict.verdict == "not_enough_evidence" and verdict.missing_visits > 0 and verdict.when is None


def test_only_empty_windows():
    yard = practice_evidence(visits=0, empty_windows=50)
    verdict = judge(yard, contestant(yard), contestant(yard, seed=3), FAST)
    assert verdict.verdict == "not_enough_evidence" and verdict.missing_visits == 40 and verdict.numbers["ap"] is None


def test_frames_that_only_motion_brought_have_no_hours():
    yard, champion, challenger = better_pair(60)
    verdict = judge(replace(yard, exposure_hours={}), champion, challenger, FAST)
    assert verdict.numbers["challenger"]["per_camera_hour"] is None and verdict.numbers["camera_nights"] > 0
    assert any("No hours" in warning for warning in verdict.warnings)


def test_what_a_verdict_needs():
    yard, champion, challenger = better_pair(50)
    with pytest.raises(DeermlError, match="were not shown"):
        judge(yard, champion, replace(challenger, predictions={}), FAST)
    with pytest.raises(DeermlError, match="no threshold"):
        judge(yard, champion, replace(challenger, thresholds=Thresholds({"fox": 0.5})), FAST)


def test_a_verdict_is_plain_and_repeatable():
    pair = better_pair(60)
    first, second = (judge(*pair, FAST).to_dict() for _ in range(2))
    assert first == second
    assert json.loads(json.dumps(first, allow_nan=False)) == first


def test_several_classes_and_cameras_with_own_thresholds():
    yard, champion, challenger = better_pair(60)
    both = replace(yard, classes=("deer", "fox"))
    thresholds = Thresholds({"deer": 0.9, "fox": 0.5}, {"east": {"deer": 0.5}, "west": {"deer": 0.5}})
    verdict = judge(both, replace(champion, thresholds=thresholds), replace(challenger, thresholds=thresholds), FAST)
    assert verdict.numbers["recall"] == judge(yard, champion, challenger, FAST).numbers["recall"]


def test_followed_visits_are_left_out_and_said():
    yard, champion, challenger = better_pair(60)
    extra = JudgedFrame(9999, "east", "night001", "beside", "infrared", None, "followed", yard.frames[0].truth, (640, 360))
    more = replace(yard, frames=(*yard.frames, extra), visits=(*yard.visits, Visit("beside", "east", "night001", (9999,), ("beside",))))
    for model in (champion, challenger):
        model.predictions[9999] = []
    verdict = judge(more, champion, challenger, FAST)
    assert verdict.numbers["visits"] == 60 and verdict.numbers["followed_visits"] == 1 and any("left out" in warning for warning in verdict.warnings)


@pytest.mark.slow
def test_equal_models_are_seldom_promoted_or_rejected():
    verdicts = []
    for seed in range(200):
        yard = practice_evidence(visits=60 + 60 * (seed % 2), seed=seed)
        verdicts.append(judge(yard, contestant(yard, 1.5, 0.1, 2 * seed), contestant(yard, 1.5, 0.1, 2 * seed + 1), FAST).verdict)
    # Recall, false alarms and AP50 may each reject one equal model in twenty.
    assert verdicts.count("promote") <= 6 and verdicts.count("reject") <= 30


@pytest.mark.slow
def test_better_and_worse_models_are_usually_recognised():
    found = {}
    for name, skill in (("better", 3.0), ("worse", 0.0)):
        verdicts = []
        for seed in range(60):
            yard = practice_evidence(visits=150, nights=60, seed=seed)
            verdicts.append(judge(yard, contestant(yard, 1.2, 0.05, 2 * seed), contestant(yard, skill, 0.05, 2 * seed + 1), FAST).verdict)
        found[name] = verdicts
    assert found["better"].count("promote") >= 30 and found["better"].count("reject") <= 3
    assert found["worse"].count("reject") >= 40 and found["worse"].count("promote") == 0
