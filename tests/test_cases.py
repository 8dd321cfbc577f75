"""Starred frames block regressions, and are never evidence."""
import json
import shutil
from dataclasses import replace
from datetime import timedelta

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from deerml.app import trial
from deerml.app.cli import app
from deerml.app.conductor import publish, replay_judged
from deerml.app.training import remember
from deerml.app.trial import judge_bundle
from deerml.capture import schema
from deerml.capture.store import Store, frames, image_path
from deerml.capture.truth import FrameStatement, record
from deerml.core.clock import stamp
from deerml.core.errors import DeermlError
from deerml.core.settings import Home
from deerml.judge import gate as gate_room
from deerml.judge.cases import add_case, list_cases, remove_case, run_cases, with_cases
from deerml.judge.collect import evidence_of
from deerml.judge.gate import Verdict
from deerml.model.bundle import Bundle
from deerml.ship.deploy import adopt_current
from yards import START, replay_yard, say_what_is_there, spot_bundle

AFTER = START + timedelta(days=30)
PROMOTED = Verdict("promote", "full", "Promote.", ("Better.",), (), (), {})


def known(store: Store, bundle: Bundle) -> Bundle:
    "A bundle whose data end before the yard's first night"
    remember(store, bundle, "trained", None, {}, dataset=None, data_until=stamp(START - timedelta(days=1)), nights_known=True)
    return bundle


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Reviewed, with a champion that finds all, and a challenger that does not act on the pale animals (frames 2, 6, 10)"
    home = tmp_path_factory.mktemp("cases") / "yard"
    with replay_yard(home) as store:
        say_what_is_there(store)
        champion, challenger = known(store, spot_bundle(store)), known(store, spot_bundle(store, 0.8))
        adopt_current(store.home, champion.digest, "a test")
    return home, champion.digest, challenger.digest


@pytest.fixture
def yard(made, tmp_path, monkeypatch):
    "A copy of it, with a gate that draws fewer samples"
    rules = trial.gate_settings
    monkeypatch.setattr(trial, "gate_settings", lambda *asked: replace(rules(*asked), draws=50))
    shutil.copytree(made[0], tmp_path / "yard", symlinks=True)
    with Store.open(Home.open(tmp_path / "yard")) as store:
        store.champion, store.challenger = (Bundle.load(store.home.bundles / digest, digest) for digest in made[1:])
        yield store


def test_a_lost_case_caps_the_gate_and_names_the_frame(yard, monkeypatch):
    monkeypatch.setattr("deerml.app.trial.judge", lambda *_: PROMOTED)
    assert judge_bundle(yard, yard.challenger, AFTER).verdict.verdict == "promote"
    add_case(yard, 2, "behind the fence")
    add_case(yard, 1)
    verdict = judge_bundle(yard, yard.challenger, AFTER).verdict
    assert (verdict.verdict, verdict.max_stage, verdict.caps) == ("not_enough_evidence", "shadow", ("case_regression",))
    assert "frames 2" in verdict.summary and verdict.numbers["cases"]["regressions"] == [2] and json.dumps(verdict.to_dict())
    with yard.read() as connection:
        assert connection.scalars(sa.select(schema.judgement.c.verdict)).all() == ["promote", "not_enough_evidence"]
    remove_case(yard, 2)
    assert judge_bundle(yard, yard.challenger, AFTER).verdict.verdict == "promote"


def test_a_case_is_no_evidence(yard):
    nights = ["gate/2026-09-01", "gate/2026-09-02", "gate/2026-09-03"]
    before, verdict = evidence_of(yard, nights), judge_bundle(yard, yard.challenger, AFTER).verdict
    for frame_id in range(3, 9):
        add_case(yard, frame_id)
    after = judge_bundle(yard, yard.challenger, AFTER).verdict
    assert evidence_of(yard, nights) == before and after.verdict == verdict.verdict
    assert {name: number for name, number in after.numbers.items() if name != "cases"} == {name: number for name, number in verdict.numbers.items() if name != "cases"}


def test_nothing_better_than_before_comes_from_cases(yard):
    add_case(yard, 1), add_case(yard, 2)
    backward = run_cases(yard, {"champion": yard.challenger, "challenger": yard.champion})
    assert (backward.regressions, backward.gains) == ((), (2,))
    poor = replace(PROMOTED, verdict="not_enough_evidence", max_stage="shadow", caps=("few_visits",))
    assert with_cases(poor, backward).verdict == "not_enough_evidence" and with_cases(poor, backward).caps == ("few_visits",)
    lost = with_cases(replace(poor, verdict="reject", max_stage="none"), run_cases(yard, {"champion": yard.champion, "challenger": yard.challenger}))
    assert lost.verdict == "reject" and lost.max_stage == "none" and "case_regression" in lost.caps
    assert gate_room.MAX_STAGE["reject"] == "none"


def test_a_case_that_cannot_be_checked_is_said_to_be(yard):
    add_case(yard, 1), add_case(yard, 2)
    gone = frames(yard)[0]
    image_path(yard.home.images, gone.image, gone.media_type).unlink()
    record(yard, "bob", [FrameStatement(2, "nothing_here", ("deer",))])  # now it is disputed
    suite = run_cases(yard, {"champion": yard.champion, "challenger": yard.challenger})
    assert suite.left_out == (1, 2) and suite.checked == () and suite.regressions == ()
    assert any("2 cases could not be checked" in warning for warning in with_cases(PROMOTED, suite).warnings)


def test_stars_are_history(yard):
    add_case(yard, 2, "first")
    assert not add_case(yard, 2) and len(list_cases(yard)) == 1
    remove_case(yard, 2)
    add_case(yard, 2, "again")
    assert [(case.frame_id, case.note) for case in list_cases(yard)] == [(2, "again")]
    with yard.read() as connection:
        assert connection.scalars(sa.select(schema.case_event.c.action)).all() == ["add", "remove", "add"]
    for statement in (sa.delete(schema.case_event), sa.update(schema.case_event).values(note="x")):
        with pytest.raises(sa.exc.IntegrityError, match="append-only"), yard.write() as connection:
            connection.execute(statement)


def run(store, *words, code=0) -> dict:
    result = CliRunner().invoke(app, [*map(str, words), "--home", str(store.home.path), "--json"])
    assert result.exit_code == code, result.output
    return json.loads(result.output)


def test_the_commands_of_cases(yard):
    assert run(yard, "case", "add", 2, "--note", "[b]doe[/b]")["new"] and run(yard, "case", "list")["cases"][0]["frame_id"] == 2
    assert "[b]doe[/b]" in CliRunner().invoke(app, ["case", "list", "--home", str(yard.home.path)]).output
    assert run(yard, "case", "add", 999, code=1)["error"]["code"] == "NO_FRAME"
    run(yard, "case", "remove", 2)
    assert run(yard, "case", "remove", 2, code=1)["error"]["code"] == "NO_CASE" and run(yard, "case", "list")["cases"] == []


# The owner's decision

def test_a_reason_alone_lets_nothing_act(yard):
    assert judge_bundle(yard, yard.challenger, AFTER).verdict.verdict == "not_enough_evidence"
    with pytest.raises(DeermlError) as caught:
        publish(yard, yard.challenger.digest, "I like it")
    assert caught.value.code == "NO_REPLAY" and not list(yard.home.releases.glob("*/release.json"))
    replay_judged(yard, "40d", at=AFTER)  # it loses the pale ones
    with pytest.raises(DeermlError, match="fewer") as caught:
        publish(yard, yard.challenger.digest, "I like it")
    assert caught.value.code == "NO_REPLAY"
    assert publish(yard, yard.challenger.digest).owner_decision is None  # without a reason nothing changes


def test_a_replay_without_regression_is_named_in_the_release(yard):
    adopt_current(yard.home, yard.challenger.digest, "the poorer one acts")
    judge_bundle(yard, yard.champion, AFTER)
    found = replay_judged(yard, "40d", at=AFTER)
    assert replay_judged(yard, "40d", at=AFTER + timedelta(days=3)).id == found.id != replay_judged(yard, "40d", again=True, at=AFTER).id
    release = publish(yard, yard.champion.digest, "it finds the pale ones")
    assert release.owner_decision.replay == found.id + 1 and release.max_stage == "shadow"


def test_never_after_a_reject(yard, monkeypatch):
    adopt_current(yard.home, yard.challenger.digest, "the poorer one acts")
    monkeypatch.setattr("deerml.app.trial.judge", lambda *_: replace(PROMOTED, verdict="reject", max_stage="none"))
    judge_bundle(yard, yard.champion, AFTER)
    replay_judged(yard, "40d", at=AFTER)
    with pytest.raises(DeermlError) as caught:
        publish(yard, yard.champion.digest, "I like it")
    assert caught.value.code == "REJECTED"


def test_a_replay_of_another_pair_does_not_count(yard):
    adopt_current(yard.home, yard.challenger.digest, "the poorer one acts")
    judge_bundle(yard, yard.champion, AFTER)
    replay_judged(yard, "40d", at=AFTER)
    third = known(yard, spot_bundle(yard, 0.55))
    judge_bundle(yard, third, AFTER)
    with pytest.raises(DeermlError) as caught:
        publish(yard, third.digest, "they are alike")
    assert caught.value.code == "NO_REPLAY"


def test_the_replay_command_says_what_waits_and_then_what_it_showed(tmp_path):
    with replay_yard(tmp_path / "yard") as store:
        champion, challenger = known(store, spot_bundle(store, 0.8)), known(store, spot_bundle(store))
        assert run(store, "gate", "--replay", "14d", code=1)["error"]["code"] == "NOT_JUDGED"
        adopt_current(store.home, champion.digest, "a test")
        judge_bundle(store, challenger, AFTER)
        first = run(store, "gate", "--replay", "2026-09-01..2026-09-30")
        assert first["waiting"] == 12 and first["sentences"][0].startswith("12 windows wait: about 5 minutes: `deerml review`")
        say_what_is_there(store)
        second = run(store, "gate", "--replay", "2026-09-01..2026-09-30")
        assert second["replay"] == first["replay"] and second["words"] == "3 more visits" and second["regressions"] == []
        text = CliRunner().invoke(app, ["gate", "--replay", "2026-09-01..2026-09-30", "--home", str(store.home.path)]).output
        assert "3 more visits." in text.lower() and "No regression" in text and "points" in text
