"""Whatever the gate is given, it answers clearly, and it promotes nothing that it cannot judge."""
import itertools
import json
import shutil
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import onnx
import pytest
import sqlalchemy as sa

from deerml.app import trial
from deerml.app.status import status_of
from deerml.app.training import Run
from deerml.app.trial import judge_bundle, judged_in_words, last_judgement
from deerml.capture import schema
from deerml.capture.store import NewFrame, Store, add_frames, frames, image_path
from deerml.capture.truth import BoxVerdict, FrameStatement, record
from deerml.core.box import Box
from deerml.core.clock import parse_time
from deerml.core.durable import sha256_bytes
from deerml.core.errors import DeermlError
from deerml.core.settings import Home
from deerml.data.split import assign_nights, split_of
from deerml.data.version import freeze, open_version
from deerml.judge.collect import Origin, admissible_nights, evidence_of, evidence_rate, look, notes_on
from deerml.judge.compare import Contestant
from deerml.judge.evidence import Mark, Thresholds, practice_evidence, practice_predictions
from deerml.judge.gate import GateContext, GateSettings, judge
from deerml.judge.ledger import frozen_tests, log_use, models_judged
from deerml.model.bundle import Bundle, Input, seal, spot_draft, spot_model
from deerml.model.bundle import Thresholds as BundleThresholds
from deerml.review.queue import close_night
from deerml.ship.deploy import adopt_current
from yards import SPOT, START, picture

FAST = GateSettings(draws=300)
AT_HALF = Thresholds({"deer": 0.5})


# -- numbers that are none, and evidence that says nothing --------------------------------------------------------


def pair(yard, old=0.0, new=3.5):
    return [Contestant(practice_predictions(yard, skill, 0.05, seed), AT_HALF) for seed, skill in enumerate((old, new))]


def scored(model, score):
    return replace(model, predictions={i: [mark._replace(score=score) for mark in marks] for i, marks in model.predictions.items()})


@pytest.mark.parametrize("score", [float("nan"), float("inf"), 87.0])
@pytest.mark.parametrize("which", [0, 1])
def test_scores_that_are_no_shares_are_refused(score, which):
    yard = practice_evidence(visits=60)
    models = pair(yard)
    models[which] = scored(models[which], score)
    for champion in (models[0], None) if which else (models[0],):
        with pytest.raises(DeermlError, match="BAD_SCORES|no numbers between 0 and 1"):
            judge(yard, champion, models[1], FAST)


def test_a_single_nan_among_good_scores_is_refused():
    yard = practice_evidence(visits=60)
    champion, challenger = pair(yard)
    challenger.predictions[yard.frames[-1].frame_id].append(Mark("deer", Box(0, 0, 10, 10), float("nan")))
    with pytest.raises(DeermlError, match="no numbers"):
        judge(yard, champion, challenger, FAST)


@pytest.mark.parametrize("score", [0.3, 0.5])
def test_equal_scores_everywhere_promote_nothing(score):
    yard = practice_evidence(visits=60)
    champion, challenger = pair(yard)
    verdict = judge(yard, champion, scored(champion, score), FAST)
    assert verdict.verdict in ("reject", "not_enough_evidence") and verdict.summary
    both = judge(yard, scored(champion, score), scored(challenger, score), FAST)
    assert both.verdict != "promote" and json.loads(json.dumps(both.to_dict(), allow_nan=False))


@pytest.mark.parametrize("champion_there", [True, False])
@pytest.mark.parametrize("floor", [0.0, 0.5])
def test_a_test_without_an_animal_promotes_nothing(champion_there, floor):
    yard = practice_evidence(visits=0, empty_windows=60)
    champion, challenger = pair(yard)
    verdict = judge(yard, champion if champion_there else None, challenger, replace(FAST, floor_recall=floor, min_visits=1))
    assert verdict.verdict == "not_enough_evidence" and verdict.missing_visits >= 1 and "would be needed" in verdict.reasons[-1]


@pytest.mark.parametrize("champion_there", [True, False])
def test_one_visit_promotes_nothing(champion_there):
    yard = practice_evidence(visits=1, empty_windows=60)
    champion, challenger = pair(yard)
    verdict = judge(yard, scored(champion, 0.1) if champion_there else None, challenger, replace(FAST, min_visits=1))
    assert verdict.verdict == "not_enough_evidence" and verdict.missing_visits >= 1 and verdict.max_stage == "shadow"


def test_a_model_of_other_classes_is_no_silent_model():
    yard = practice_evidence(visits=60)
    champion, challenger = pair(yard)
    with pytest.raises(DeermlError, match="no threshold for 'deer'"):
        judge(yard, champion, replace(challenger, thresholds=Thresholds({"fox": 0.5})), FAST)


# -- what it costs, and when there will be enough -----------------------------------------------------------------


def test_prices_are_put_beside_the_verdict_and_change_none():
    yard = practice_evidence(visits=150, nights=60)
    champion, challenger = pair(yard)
    plain, priced = judge(yard, champion, challenger, FAST), judge(yard, champion, challenger, replace(FAST, cost_missed_visit=10, cost_false_alarm=1))
    assert (plain.verdict, plain.reasons, plain.numbers["cost"]) == (priced.verdict, priced.reasons, None)
    cost = priced.numbers["cost"]
    assert priced.summary.startswith(plain.summary) and f"{cost['challenger']['estimate']:.1f} (" in priced.summary and f"champion {cost['champion']['estimate']:.1f} (" in priced.summary
    by_hand = 30 * (10 * (1 - plain.numbers["champion"]["visit_recall"]) * 150 / 0.25 / 120 + plain.numbers["champion"]["per_camera_night"])
    assert cost["champion"]["lower"] < cost["champion"]["estimate"] < cost["champion"]["upper"] and cost["difference"]["upper"] < 0
    assert 0.5 * by_hand < cost["champion"]["estimate"] < 2 * by_hand  # visits in two windows weigh less than four
    assert judge(yard, champion, challenger, replace(FAST, cost_missed_visit=10)).numbers["cost"] is None
    first = judge(yard, None, challenger, replace(FAST, cost_missed_visit=10, cost_false_alarm=1))
    assert first.verdict == "first" and "your prices" in first.summary and "champion" not in first.numbers["cost"]


@pytest.mark.parametrize("context, words", [
    (GateContext(visits_per_day=0.5, today=parse_time("2026-10-31T00:00:00Z").date()), "0.5 a day on nights that may judge, they will have come by 2026-11-20"),
    (GateContext(visits_per_day=0.0001), "more than ten years"),
    (GateContext(rate_unknown="no night is over yet"), "rate is not known: no night is over yet."),
])
def test_what_lacks_comes_with_a_date_or_with_a_reason(context, words):
    yard = practice_evidence(visits=30)
    verdict = judge(yard, *pair(yard), FAST, context)
    assert verdict.missing_visits == 10 and words in verdict.reasons[-1]


# -- through the conductor, on a small home -----------------------------------------------------------------------

NIGHTS = 24


def small_home(path: Path, nights: int = NIGHTS, **settings: object) -> Store:
    "Every night of one camera was drawn and reviewed: a visit of two frames, and two empty windows"
    store, data = Store.open(Home.create(path, min_visits=10, **settings)), []
    for night, n in itertools.product(range(nights), range(6)):
        taken_at = START + timedelta(days=night, minutes=5 * n)
        data.append(NewFrame(picture(100 * night + n, n < 2), "test", f"{night}/{n}", camera="gate", taken_at=taken_at, trigger="scheduled"))
    ids = add_frames(store, data)
    for night in range(nights):
        close_night(store, (START + timedelta(days=night)).date().isoformat(), None, budget=99)
    visits = [frame_id for number, frame_id in enumerate(ids) if number % 6 < 2]
    said = [FrameStatement(frame_id, "all_boxed" if frame_id in visits else "nothing_here", ("deer",)) for frame_id in ids]
    record(store, "ann", [*(BoxVerdict(frame_id, "missed", "deer", SPOT) for frame_id in visits), *said])
    return store


def bundle_of(store: Store, threshold: float, classes=("deer",), size: int = 160, data_until: str | None = None) -> Bundle:
    "A sealed detector of bright spots that acts from this score on, known to the home"
    model, classes = store.home.path / "spot.onnx", list(classes)
    model.write_bytes(spot_model(classes))
    draft = spot_draft(classes).model_copy(update={"input": Input(size=size)})
    bundle = seal(model, draft, BundleThresholds(shared=dict.fromkeys(classes, threshold)), "drawn", store.home.bundles)
    with store.write() as connection:
        connection.execute(schema.model.insert().values(digest=bundle.digest, origin="trained", dataset=None, data_until=data_until, nights_known=True, parent=None, record="{}", made_at="t"))
    return bundle


AFTER = START + timedelta(days=NIGHTS + 1)
BLIND, SEEING = 0.999, 0.5


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    "A home with a blind champion"
    path = tmp_path_factory.mktemp("gate") / "yard"
    with small_home(path) as store:
        blind = bundle_of(store, BLIND)
        adopt_current(store.home, blind.digest, "for this test")
        look(store, blind, frames(store))  # remembered for every model that differs only in its threshold
    return path


@pytest.fixture
def store(prepared, tmp_path, monkeypatch):
    "A copy of that home, judged with fewer draws"
    rules = trial.gate_settings
    monkeypatch.setattr(trial, "gate_settings", lambda *asked: replace(rules(*asked), draws=100))
    shutil.copytree(prepared, tmp_path / "yard", symlinks=True)
    current = tmp_path / "yard/models/current"
    if current.is_symlink() and current.readlink().is_absolute():  # the copy's own bundle acts
        target = tmp_path / "yard" / current.readlink().relative_to(prepared)
        current.unlink()
        current.symlink_to(target)
    with Store.open(Home.open(tmp_path / "yard")) as opened:
        yield opened


def test_the_better_model_of_this_home_is_promoted(store):
    "Or the tests below would show nothing"
    judged = judge_bundle(store, bundle_of(store, SEEING), AFTER)
    assert judged.verdict.verdict == "promote" and judged.verdict.numbers["visits"] == NIGHTS


def test_a_model_of_another_size_is_judged_as_it_serves(store):
    "This one sees twice as large, where its boxes cover a quarter of the animal"
    judged = judge_bundle(store, bundle_of(store, SEEING, size=320), AFTER)
    assert judged.verdict.verdict == "reject" and judged.verdict.numbers["challenger"]["visits_found"] == 0


@pytest.mark.parametrize("classes", [("fox",), ("deer", "fox")])
def test_a_model_of_other_classes_is_refused(store, classes):
    with pytest.raises(DeermlError, match="WRONG_CLASSES|was made for"):
        judge_bundle(store, bundle_of(store, SEEING, classes), AFTER)
    assert last_judgement(store) is None


def test_a_model_whose_scores_are_nan_is_refused(store):
    graph = onnx.load_from_string(spot_model(["deer"]))
    scale = next(node for node in graph.graph.node if node.op_type == "Concat")
    graph.graph.initializer.append(onnx.helper.make_tensor("nan", onnx.TensorProto.FLOAT, [1], [np.nan]))
    graph.graph.node.insert(list(graph.graph.node).index(scale), onnx.helper.make_node("Mul", ["scores", "nan"], ["broken"]))
    scale.input[list(scale.input).index("scores")] = "broken"
    (store.home.path / "nan.onnx").write_bytes(graph.SerializeToString())
    bundle = seal(store.home.path / "nan.onnx", spot_draft(["deer"]), BundleThresholds(shared={"deer": 0.5}), "drawn", store.home.bundles)
    with store.write() as connection:
        connection.execute(schema.model.insert().values(digest=bundle.digest, origin="trained", nights_known=True, record="{}", made_at="t"))
    with pytest.raises(DeermlError, match="scores are not between 0 and 1"):
        judge_bundle(store, bundle, AFTER)
    assert last_judgement(store) is None


def test_a_frame_that_expired_is_left_out_for_both_and_said(store):
    gone = frames(store)[0]
    with store.write() as connection:
        connection.execute(schema.image.update().where(schema.image.c.sha256 == gone.image).values(expired_at="2026-09-30T00:00:00.000Z", keep_probability=0.5))
    image_path(store.home.images, gone.image, gone.media_type).unlink()
    judged = judge_bundle(store, bundle_of(store, SEEING), AFTER)
    assert gone.id not in judged.evidence.position and len(judged.evidence.frames) == 6 * NIGHTS - 1
    assert any("1 reviewed frame of these nights had expired" in text for text in judged.verdict.warnings)


def test_a_lost_file_stops_the_gate(store):
    gone = frames(store)[0]
    image_path(store.home.images, gone.image, gone.media_type).unlink()
    with pytest.raises(DeermlError, match="The file is missing"):
        judge_bundle(store, bundle_of(store, SEEING, size=192), AFTER)
    assert last_judgement(store) is None and frozen_tests(store) == []


def test_a_clock_of_this_computer_that_jumped_back_judges_nothing(store):
    judged = judge_bundle(store, bundle_of(store, SEEING), START - timedelta(days=400))
    assert judged.verdict.verdict == "not_enough_evidence" and judged.verdict.numbers["visits"] == 0
    assert any("nights lie ahead" in text for text in judged.verdict.warnings) and "no night with a time is over yet" in judged.verdict.reasons[-1]


def test_a_model_from_the_future_has_no_exams_and_it_is_said(store):
    judged = judge_bundle(store, bundle_of(store, SEEING, data_until="2031-01-01T00:00:00.000Z"), AFTER)
    assert judged.verdict.verdict == "not_enough_evidence" and any("data of the challenger end on 2031-01-01" in text for text in judged.verdict.warnings)
    splits = {split_of("deerml", f"{frame.camera}/{frame.night}") for frame in judged.evidence.frames}
    assert splits == {"test"}


def test_a_camera_whose_clock_jumped_ahead_judges_later(store):
    [frame_id] = add_frames(store, [NewFrame(picture(9999, True), "test", "jump", camera="gate", taken_at=parse_time("2040-01-01T22:00:00Z"), trigger="scheduled")])
    record(store, "ann", [BoxVerdict(frame_id, "missed", "deer", SPOT), FrameStatement(frame_id, "all_boxed", ("deer",))])
    judged = judge_bundle(store, bundle_of(store, SEEING), AFTER)
    assert frame_id not in judged.evidence.position and any("gate/2040-01-01" in text for text in judged.verdict.warnings)


# -- nights that were seen ----------------------------------------------------------------------------------------


def test_a_night_of_either_manifest_never_judges(store):
    assign_nights(store)
    every = admissible_nights(store, [Origin("a")], AFTER)
    assert len(every) == NIGHTS and set(every.values()) == {"test", "exam"}
    exam, test = (next(night for night, kind in every.items() if kind == wanted) for wanted in ("exam", "test"))
    for models in ([Origin("a", frozenset({exam})), Origin("b")], [Origin("a"), Origin("b", frozenset({exam}))]):
        assert exam not in admissible_nights(store, models, AFTER)
    for models in ([Origin("a", frozenset({test})), Origin("b")], [Origin("a"), Origin("b", frozenset({test}))]):
        with pytest.raises(DeermlError, match="was in a model's training data"):
            admissible_nights(store, models, AFTER)


def test_a_night_is_an_exam_only_after_both(store):
    assign_nights(store)
    early, late = (START + timedelta(days=days) for days in (4, 12))
    exams = [{night for night, kind in admissible_nights(store, [Origin("a", data_until=one), Origin("b", data_until=other)], AFTER).items() if kind == "exam"} for one, other in ((early, late), (late, early))]
    assert exams[0] == exams[1] and exams[0] and min(exams[0]) > f"gate/{late.date()}"


# -- rates --------------------------------------------------------------------------------------------------------


def test_only_nights_that_may_judge_make_the_rate(store):
    assign_nights(store)
    until = START + timedelta(days=NIGHTS - 10, hours=-8)
    nights = admissible_nights(store, [Origin("a", data_until=until)], AFTER)
    tests, exams = (sum(kind == wanted for kind in nights.values()) for wanted in ("test", "exam"))
    rate = evidence_rate(store, evidence_of(store, nights), nights, AFTER)
    days = NIGHTS - min(int((parse_time(f"{night[5:]}T22:00:00Z") - START).days) for night, kind in nights.items() if kind == "exam")
    assert 9 <= days <= 10 and exams < days and rate.visits_per_day == pytest.approx(tests / NIGHTS + exams / days)
    only_tests = {night: kind for night, kind in nights.items() if kind == "test"}
    assert evidence_rate(store, evidence_of(store, only_tests), only_tests, AFTER).visits_per_day == pytest.approx(tests / NIGHTS)
    one = max(night for night, kind in nights.items() if kind == "exam")
    assert evidence_rate(store, evidence_of(store, [one]), {one: "exam"}, AFTER).visits_per_day == pytest.approx(1 / 7)


def test_an_unknown_rate_says_why(store):
    assign_nights(store)
    nights = admissible_nights(store, [Origin("a")], AFTER)
    assert "no visit has come" in evidence_rate(store, evidence_of(store, []), {}, AFTER).why_unknown
    chosen = evidence_of(store, nights)
    chosen = replace(chosen, frames=tuple(replace(frame, role="volunteered", p=None) for frame in chosen.frames))
    assert "came from a draw" in evidence_rate(store, chosen, nights, AFTER).why_unknown
    assert notes_on(store, nights, {"challenger": Origin("a")}, AFTER) == ()


# -- test versions ------------------------------------------------------------------------------------------------


def uses(store):
    with store.read() as connection:
        return connection.execute(sa.select(schema.test_use.c.challenger, schema.test_version.c.name).join(schema.test_version, schema.test_version.c.id == schema.test_use.c.version_id).order_by(schema.test_use.c.id)).all()


def test_every_use_of_a_test_is_logged(store):
    bundle = bundle_of(store, SEEING)
    for _ in range(2):
        judged = judge_bundle(store, bundle, AFTER)
    assert uses(store) == [(bundle.digest, "test-v1")] * 2 and last_judgement(store)["numbers"]["test_version"] == "test-v1"
    [version] = frozen_tests(store)
    assert version.nights == {f"{frame.camera}/{frame.night}" for frame in judged.evidence.frames if split_of("deerml", f"{frame.camera}/{frame.night}") == "test"}


def test_a_corrected_label_makes_another_version_and_other_figures(store):
    bundle = bundle_of(store, SEEING)
    judge_bundle(store, bundle, AFTER)
    [before] = frozen_tests(store)
    wrong = next(frame for frame in frames(store) if frame.night_key in before.nights)
    call_empty(store, wrong.id)
    judged = judge_bundle(store, bundle, AFTER)
    first, second = frozen_tests(store)
    assert first == before and second.nights == first.nights and second.digest != first.digest and second.parent == "test-v1"
    assert judged.verdict.numbers["challenger"]["false_alarm_windows"] > 0 and uses(store)[-1].name == "test-v2"


def test_versions_only_grow(store):
    judge_bundle(store, bundle_of(store, SEEING), START + timedelta(days=NIGHTS - 8))
    judge_bundle(store, bundle_of(store, SEEING + 0.1), AFTER)
    first, second = frozen_tests(store)
    assert first.nights < second.nights and second.frames > first.frames


def test_a_test_that_judged_many_models_is_worn_out(store):
    first, last = bundle_of(store, SEEING), bundle_of(store, SEEING + 0.1)
    judge_bundle(store, first, AFTER)
    [version] = frozen_tests(store)
    with store.write() as connection:
        for number in range(9):
            log_use(connection, version, f"model {number}", None, 1)
    assert len(models_judged(store, version)) == 10
    for bundle, warned in ((first, False), (last, True)):  # the first is one of the ten, the last is the eleventh
        judged = judge_bundle(store, bundle, AFTER)
        assert any("(test-v1) have judged 10 models" in text for text in judged.verdict.warnings) == warned
    assert len(uses(store)) == 12


def test_the_goal_of_a_release_may_be_named(store):
    judged = judge_bundle(store, bundle_of(store, SEEING), AFTER, primary="false_alarms")
    assert judged.verdict.numbers["settings"]["primary"] == "false_alarms" and judged.verdict.verdict == "not_enough_evidence"
    assert "in false alarms" in " ".join(judged.verdict.reasons)
    with pytest.raises(DeermlError, match="cannot be the goal"):
        judge_bundle(store, judged.bundle, AFTER, primary="ap")


def test_the_terminal_says_what_was_used(store):
    words = judged_in_words(judge_bundle(store, bundle_of(store, SEEING), AFTER))
    tests = len(frozen_tests(store)[0].nights)
    assert words.startswith("Promote: ") and words.endswith(f"Judged on {tests} nights of test-v1 and {NIGHTS - tests} exam nights.")
    assert f"camera gate +100 points of {NIGHTS} visits" in words


# -- sealing ------------------------------------------------------------------------------------------------------


def run_of(store: Store) -> Run:
    "A finished training whose candidate is the detector of bright spots"
    version = freeze(store, at=AFTER).version
    folder = store.home.runs / "first/candidate"
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(spot_model(["deer"]))
    draft = spot_draft(["deer"]).model_copy(update={"input": Input(size=160)})
    (folder / "candidate.json").write_text(json.dumps(draft.model_dump(mode="json") | {"model_sha256": sha256_bytes(spot_model(["deer"]))}))
    return Run(folder.parent, {"dataset": version.name, "finished_at": "t"})


def test_a_seal_says_what_is_expected_to_change(store):
    bundle = trial.seal_candidate(store, run_of(store))
    calibration = trial.calibration_of(store, bundle.digest)
    assert calibration["recall"] == 1.0 and calibration["change"]["recall"]["estimate"] == 1.0 and calibration["expected_cost"] is None
    assert "as many false alarms as the champion" in calibration["change"]["sentence"] and "finds 100.0 points more of the visits" in calibration["change"]["sentence"]
    assert trial.calibration_of(store, "unknown") is None


def call_empty(store: Store, frame_id: int) -> None:
    "The same reviewer takes the box of this frame back"
    with store.read() as connection:
        key = connection.scalar(sa.select(schema.review_event.c.box_key).where(schema.review_event.c.frame_id == frame_id, schema.review_event.c.kind == "box"))
    record(store, "ann", [BoxVerdict(frame_id, "false_positive", "deer", SPOT, box_key=key), FrameStatement(frame_id, "nothing_here", ("deer",))])


def test_what_a_candidate_was_made_of_never_judges_it(store):
    "Its training nights and the val nights of its thresholds are seen; what is left are the test nights"
    run = run_of(store)
    judged = trial.gate(store, run, AFTER)
    used, made_of = {f"{frame.camera}/{frame.night}" for frame in judged.evidence.frames}, open_version(store.home.datasets).nights
    assert {split for night, split in made_of.items() if night not in used} == {"train", "val"} and len(made_of) == NIGHTS
    assert used == {night for night, split in made_of.items() if split == "test"} == frozen_tests(store)[-1].nights
    assert judged.verdict.verdict == "not_enough_evidence" and judged.verdict.missing_visits == 10 - len(used)
    assert status_of(store).lines["test"] == f"test-v1, {len(used)} nights, has judged 1 model"


def test_prices_choose_a_higher_threshold_within_the_budget(store):
    assign_nights(store)
    call_empty(store, next(number for number, frame in enumerate(frames(store), 1) if number % 6 == 2 and split_of("deerml", frame.night_key) == "val"))
    run, found = run_of(store), {}
    for missed in (0.0, 100.0, 0.001):  # not said, a visit is worth any alarm, hardly worth one
        bundle = trial.seal_candidate(replace_settings(store, cost_missed_visit=missed, cost_false_alarm=1.0), run)
        found[missed] = bundle.serving.thresholds.shared["deer"], trial.calibration_of(store, bundle.digest)
    assert found[0.0][0] == found[100.0][0] == 0.05 and found[0.001][0] > 0.5
    assert found[0.0][1]["expected_false_alarms"] > 0 == found[0.001][1]["expected_false_alarms"] and found[0.001][1]["expected_cost"] is not None


def replace_settings(store: Store, **chosen: object) -> Store:
    store.home = replace(store.home, settings=store.home.settings.model_copy(update=chosen))
    return store
