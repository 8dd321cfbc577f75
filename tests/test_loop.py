"""The whole loop through the command line, in small: a demo of a few nights, then the commands on its home."""
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deerml.app import demo
from deerml.app.cli import app
from deerml.core.settings import Home
from deerml.model.bundle import Bundle

NUMBERS = ("ap50", "ap", "visit_recall", "false_alarms_per_camera_hour")


def run(*words: str, code: int = 0) -> dict:
    result = CliRunner().invoke(app, [*map(str, words), "--json"])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, dict]:
    "The home and the answer of a demo with few nights and hardly any training"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "FIRST_NIGHTS", 6)
        patch.setattr(demo, "LATER_NIGHTS", 8)
        patch.setattr(demo, "Yard", partial(demo.Yard, cameras=3))
        patch.setattr(demo, "SETTINGS", demo.SETTINGS | {"epochs": 2, "image_size": 96})
        patch.setattr(demo, "WARM", {"epochs": 2, "batch": 16})
        home = tmp_path_factory.mktemp("loop") / "yard"
        return home, run("demo", "--seed", 3, "--home", home)


@pytest.fixture
def home(small, tmp_path) -> Path:
    "A copy of that home, so that each test may do with it what it likes"
    return Path(shutil.copytree(small[0], tmp_path / "yard", symlinks=True))


def test_the_demo_answers_with_one_object(small):
    home, answer = small
    for name in ("champion", "challenger"):
        assert {"digest", "dataset", *NUMBERS} <= answer[name].keys()
    assert answer["verdict"] in ("promote", "reject", "not_enough_evidence") and answer["seconds"] > 0
    assert answer["champion"]["dataset"] == "v0001" and answer["challenger"]["dataset"] == "v0002"
    assert answer["deployed"] == Bundle.load((home / "models/current").resolve()).digest
    page = Path(answer["report"]).read_text()
    assert "<svg" in page and "http://" not in page and "https://" not in page


def test_enough_visits_for_a_verdict(small):
    home, _ = small
    judged = json.loads(sqlite(home, "select result from judgement order by id desc limit 1"))
    assert judged["numbers"]["visits"] >= 40  # the whole demo, with more nights, has at least 60


def sqlite(home: Path, query: str) -> str:
    import sqlite3
    with sqlite3.connect(f"file:{home / 'deerml.db'}?mode=ro", uri=True) as connection:
        return connection.execute(query).fetchone()[0]


def test_state_names_the_next_step(home):
    found = run("--home", home)
    assert found["lines"]["dataset"] == "v0002" and found["next_step"] and found["because"]


def test_a_second_demo_is_refused_in_the_same_home(home):
    assert run("demo", "--home", home, code=1)["error"]["code"] == "HOME_EXISTS"


def test_house_keeping(home):
    assert run("verify", "--home", home)["whole"]
    saved = run("backup", "--home", home)["backup"]
    assert saved in run("backup", "--list", "--home", home)["backups"]
    assert Path(run("restore", saved, "--home", home)["kept"]).is_file()
    assert {one["state"] for one in run("doctor", "--home", home)["findings"]} <= {"ok", "warn"}
    image = next((home / "images").rglob("*.jpg"))
    image.chmod(0o644)
    image.write_bytes(b"rot")
    assert not run("verify", "--home", home, code=1)["whole"]


def test_gate_publish_deploy_and_back(home, monkeypatch):
    again = run("gate", "--run", "second", "--home", home)
    assert Path(again["report"]).is_file()
    assert again["test_version"].startswith("test-v") and again["calibration"]["calibration"] in ("drawn", "provisional")
    assert "On the val nights it raises" in again["calibration"]["change"]["sentence"]
    before = Bundle.load((home / "models/current").resolve()).digest
    if again["verdict"] == "reject":
        assert run("publish", "--reason", "I like it", "--home", home, code=1)["error"]["code"] == "REJECTED"
        return
    if before != again["digest"]:  # the owner's wish is not enough
        assert run("publish", again["digest"][:12], "--reason", "a test", "--home", home, code=1)["error"]["code"] == "NO_REPLAY"
    monkeypatch.setattr("deerml.app.conductor.accepting_replay", lambda *_: 7)  # as after a replay without regression, see test_replay.py
    released = run("publish", again["digest"][:12], "--reason", "a test", "--home", home)
    done = run("deploy", released["version"], "--now", "--home", home)
    assert done["slot"] == "current" and Bundle.load((home / "models/current").resolve()).digest == again["digest"]
    if before != again["digest"]:
        assert run("rollback", "--reason", "a test", "--home", home)["digest"] == before


def test_adopting_a_checkpoint(home):
    adopted = run("adopt", home / "runs/second/last.pt", "--image-size", 96, "--home", home)
    assert Bundle.load((home / "models/current").resolve()).digest == adopted["digest"]
    judged = run("gate", "--run", "second", "--home", home)
    assert any("which nights the champion trained on" in sentence for sentence in judged["warnings"]), judged["warnings"]


@pytest.mark.parametrize("words", [(name,) for name in ("init", "import", "prepare", "train", "gate", "case", "publish", "deploy", "rollback", "adopt", "doctor", "backup", "restore", "verify", "demo")] + [()])
def test_every_command_explains_itself(words):
    result = CliRunner().invoke(app, [*words, "--help"])
    assert result.exit_code == 0 and "--help" in result.stdout and len(result.stdout) > 200


def test_init_shows_and_makes(tmp_path):
    assert "classes" in CliRunner().invoke(app, ["init", "--show"]).stdout
    run("init", tmp_path / "yard", "--classes", "fox, badger", "--zone", "Europe/Berlin")
    assert Home.open(tmp_path / "yard").settings.classes == ["fox", "badger"]
    assert run("init", tmp_path / "yard", code=1)["error"]["code"] == "HOME_EXISTS"
    assert run("--home", tmp_path / "yard")["next_step"].startswith("deerml import")


def test_errors_are_told_to_people(tmp_path):
    result = CliRunner().invoke(app, ["prepare", "--home", str(tmp_path)])
    assert result.exit_code == 1 and "NO_HOME" in result.stderr and "deerml init" in result.stderr and "Traceback" not in result.output


@pytest.mark.slow
def test_the_whole_demo_has_sixty_visits(tmp_path):
    answer = run("demo", "--seed", 0, "--home", tmp_path / "yard")
    judged = json.loads(sqlite(tmp_path / "yard", "select result from judgement order by id desc limit 1"))
    assert "data:image/jpeg;base64," in Path(answer["report"]).read_text()
    assert judged["numbers"]["visits"] >= 60 and answer["verdict"] == judged["verdict"]
