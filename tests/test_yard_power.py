"""`deerml gate --power`: what a yard is measured as, and what a person is told."""
import functools
import json

import pytest
from typer.testing import CliRunner

from deerml.app.cli import app
from deerml.capture.store import Store, frames, record_inference
from deerml.capture.truth import FrameStatement, record
from deerml.core.box import Box
from deerml.core.errors import DeermlError
from deerml.judge import power
from deerml.judge.yard import yard_of
from deerml.model.bundle import Thresholds, seal, spot_draft, spot_model
from deerml.model.detector import Detection
from deerml.review.queue import close_night
from yards import yard

RUN = CliRunner()


@pytest.fixture
def reviewed(tmp_path):
    "Six nights of two cameras, drawn and judged: two visits a camera and night"
    with yard(tmp_path / "yard", nights=6, cameras=("gate", "lawn"), weekly_windows=70) as store:
        left = [frame.id for frame in sorted(frames(store), key=lambda one: (one.camera, one.taken_at)) if frame.taken_at.minute >= 20]
        record(store, "ann", [FrameStatement(frame_id, "all_boxed" if place % 2 == 0 else "nothing_here", ("deer",)) for place, frame_id in enumerate(left)])
        for night in sorted({frame.night for frame in frames(store)}):
            close_night(store, night, None)
    return tmp_path / "yard"


def test_a_yard_is_measured_on_what_was_drawn(reviewed):
    with Store.open(power_home(reviewed)) as store:
        measured = yard_of(store, None)
    assert (measured.nights, measured.visits, measured.yard.cameras, measured.yard.nightly_windows) == (6, 24, 2, 10)
    assert measured.yard.visits_per_month == pytest.approx(120) and len(measured.notes) == 1
    assert (measured.yard.recall, measured.yard.false_alarms_per_night) == (0.75, 0.5)


def test_the_champion_is_measured_by_what_it_said_when_it_acted(reviewed, tmp_path):
    model = tmp_path / "model.onnx"
    model.write_bytes(spot_model(["deer"]))
    with Store.open(power_home(reviewed)) as store:
        bundle = seal(model, spot_draft(["deer"]), Thresholds(shared={"deer": 0.5}), "none", store.home.bundles)
        record_inference(store, bundle.digest, [(frame.id, [], False) for frame in frames(store)], role="judge")
        measured = yard_of(store, bundle)
    assert (measured.yard.recall, measured.yard.false_alarms_per_night, measured.notes) == (0.3, 0.02, ())  # the least that is simulated


def test_nights_before_the_champion_acted_do_not_hide_what_it_did(reviewed, tmp_path):
    model = tmp_path / "model.onnx"
    model.write_bytes(spot_model(["deer"]))
    with Store.open(power_home(reviewed)) as store:
        bundle = seal(model, spot_draft(["deer"]), Thresholds(shared={"deer": 0.5}), "none", store.home.bundles)
        newest = max(frame.night for frame in frames(store))
        later = [frame for frame in frames(store) if frame.night == newest]
        loud = [(frame.id, [Detection("deer", 0.9, Box(1, 1, 9, 9))], True) for frame in later]  # nowhere near an animal
        record_inference(store, bundle.digest, loud)
        measured = yard_of(store, bundle)
    assert measured.yard.false_alarms_per_night > 1 and measured.yard.recall == 0.75
    assert [note.startswith("Too few visits") for note in measured.notes] == [True]


def power_home(path):
    from deerml.core.settings import Home
    return Home.open(path)


def test_the_command_prints_the_table(reviewed, monkeypatch):
    monkeypatch.setattr(power, "yard_power", functools.partial(power.yard_power, runs=1))
    shown = RUN.invoke(app, ["gate", "--power", "--home", str(reviewed)])
    assert shown.exit_code == 0, shown.output
    assert "120 visits a month come to 2 cameras, 10 windows a night" in shown.stdout and "with exam nights" in shown.stdout and "finds 10 points more" in shown.stdout
    told = json.loads(RUN.invoke(app, ["gate", "--power", "--json", "--home", str(reviewed)]).stdout)
    assert set(told["powers"]) == set(power.CHANGES) and told["powers"]["is equal"]["months"] == [1, 2, 3, 6, 12]
    assert set(told["powers"]["is equal"]["shares"]) == {"gate", "exams", "replay"} and told["yard"]["visits"] == 24


def test_without_a_reviewed_draw_there_is_no_rate(tmp_path):
    with yard(tmp_path / "yard", nights=1) as store, pytest.raises(DeermlError, match="not known") as refused:
        yard_of(store, None)
    assert refused.value.code == "RATE_UNKNOWN"
    answer = RUN.invoke(app, ["gate", "--power", "--home", str(tmp_path / "yard")])
    assert answer.exit_code != 0 and "RATE_UNKNOWN" in answer.stderr
