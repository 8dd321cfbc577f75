"""The tick: what is due is done once, by one, whatever fails and wherever it is killed; the units that call it; a training over the wire."""
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from deerml.app import tick as room
from deerml.app.cli import app
from deerml.app.server import make_app
from deerml.app.tick import STEPS, Turn, new_visits, read_memory, tick, why_train
from deerml.app.training import prepare, recipe_for
from deerml.app.trial import last_judgement
from deerml.app.units import install_units, make_units
from deerml.capture.store import Store
from deerml.core.clock import now, stamp
from deerml.core.durable import folder_lock, sha256_file, write_json
from deerml.core.errors import DeermlError
from deerml.core.settings import Home, Settings
from deerml.data.manifest import list_versions
from deerml.data.shelf import POINTER
from deerml.model.bundle import spot_draft, spot_model
from deerml.review.queue import undrawn_nights
from deerml.train.jobs import list_jobs, request_run
from deerml.train.runners import describe, write_begin
from yards import START, yard

ROOT = Path(__file__).resolve().parents[1]
AT = START + timedelta(days=21)
LATER = AT + timedelta(days=8)  # no night of the first dataset is an exam any more
LEAVES = {"leave": "labelled", "people": "show"}


class Place:
    "A place that takes trainings, seems to be at work on them, and never does anything"

    name = "local"

    def __init__(self):
        self.submitted, self.locks = [], []

    def submit(self, run):
        self.submitted.append(run.name)
        write_begin(run, self.name)
        self.locks.append(open(run / ".job.lock", "w"))
        fcntl.flock(self.locks[-1], fcntl.LOCK_EX)
        return describe(run, True)

    def die(self):
        while self.locks:
            self.locks.pop().close()


@pytest.fixture
def place(monkeypatch):
    found = Place()
    monkeypatch.setattr(room, "runner_for", lambda _name: found)
    monkeypatch.setattr("deerml.app.training_api.runner_for", lambda _name: found)
    yield found
    found.die()


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    "A reviewed yard, made once"
    path = tmp_path_factory.mktemp("template") / "yard"
    yard(path, nights=20, base_model="tiny", epochs=1, image_size=160).close()
    return path


@pytest.fixture
def small(template):
    "Makes a copy of that yard, with other settings"
    def made(path: Path, **settings) -> Store:
        home = Home.open(Path(shutil.copytree(template, path)))
        return Store.open(Home(home.path, Settings(**home.settings.model_dump() | settings)))
    return made


def said(store: Store, at=AT, dry_run=False) -> dict[str, tuple[str, str]]:
    return {one.step: (one.state, one.text) for one in tick(store, at, dry_run).steps}


def tree(path: Path) -> dict[str, int]:
    return {str(one.relative_to(path)): one.stat().st_mtime_ns for one in path.rglob("*") if one.is_file() and "deerml.db" not in one.name}


def result(store: Store, name: str = "run-1") -> Path:
    "A finished run: a detector of bright spots instead of what a training makes"
    version = list_versions(store.home.datasets)[-1]
    run = store.home.runs / name
    (run / "candidate").mkdir(parents=True)
    (run / "candidate" / "model.onnx").write_bytes(spot_model(["deer"]))
    draft = spot_draft(["deer"]).model_dump(mode="json")
    write_json(run / "candidate" / "candidate.json", draft | {"model_sha256": sha256_file(run / "candidate" / "model.onnx")})
    write_json(run / "request.json", {"dataset": version.name, "recipe": {}, "asked_at": stamp(now())})
    write_json(run / "result.json", {"dataset": version.name, "finished_at": stamp(now()), "seconds": 1.0})
    return run



# -- what is due ----------------------------------------------------------------------------------------------------


def test_a_tick_walks_the_loop_and_the_next_one_has_nothing_to_do(tmp_path, place, small):
    (tmp_path / "drive").mkdir()
    with small(tmp_path / "yard", train_every="weekly", remote=str(tmp_path / "drive"), **LEAVES) as store:
        before = tree(store.home.path)
        told = said(store, dry_run=True)
        assert {name: state for name, (state, _) in told.items()} == {"draw": "would", "freeze": "would"}
        assert tree(store.home.path) == before and not list_versions(store.home.datasets) and undrawn_nights(store, AT).due
        done = said(store)
        assert {name: state for name, (state, _) in done.items()} == dict.fromkeys(("draw", "freeze", "push", "train"), "done"), done
        assert not undrawn_nights(store, AT).due and (tmp_path / "drive" / POINTER).exists() and len(place.submitted) == 1
        assert said(store) == {}, "once is enough"
        assert place.submitted == [job.id for job in list_jobs(store.home)]


def test_a_result_is_calibrated_judged_and_explained_once(tmp_path, small):
    with small(tmp_path / "yard") as store:
        said(store)
        run = result(store)
        assert said(store, dry_run=True).keys() == {"judge"} and last_judgement(store) is None
        state, text = said(store)["judge"]
        judged = last_judgement(store)
        assert state == "done" and run.name in text and judged["verdict"].replace("_", " ") in text
        assert (store.home.reports / f"{judged['challenger'][:12]}.html").is_file() and said(store) == {}
        (store.home.reports / f"{judged['challenger'][:12]}.html").unlink()
        assert said(store)["judge"][0] == "done", "a judgement without its page is made again"


def test_of_rivals_one_is_chosen_when_all_are_done_and_it_alone_is_judged(tmp_path, small):
    with small(tmp_path / "yard") as store:
        said(store)
        for name in ("fresh", "warm"):
            request = result(store, name) / "request.json"
            write_json(request, json.loads(request.read_bytes()) | {"rivals": ["fresh", "warm"]})
            assert ("choose" in said(store, dry_run=True)) is (name == "warm"), "only when both are done"
        done = said(store)
        assert done.keys() == {"choose", "judge"} and {state for state, _ in done.values()} == {"done"}, done
        assert sum((store.home.runs / name / "chosen.json").exists() for name in ("fresh", "warm")) == 1 and said(store) == {}


def test_nothing_leaves_and_nothing_trains_by_itself(tmp_path, place, small):
    "Without a remote, or with one to which nothing may go, the tick does not even look there"
    with small(tmp_path / "yard", remote=str(tmp_path / "not there")) as store:
        assert said(store).keys() == {"draw", "freeze"} and not place.submitted
    with small(tmp_path / "never", export_days=0) as store:
        assert said(store).keys() == {"draw"}
    with Store.open(Home.create(tmp_path / "new")) as store:
        assert tick(store, AT).sentence == "Nothing is due."


def test_a_change_of_what_may_leave_is_pushed(tmp_path, small):
    (tmp_path / "drive").mkdir()
    with small(tmp_path / "yard", remote=str(tmp_path / "drive"), **LEAVES) as store:
        assert "photographs went" in said(store)["push"][1]
        strict = Store.open(Home(store.home.path, store.home.settings.model_copy(update={"never_leave": ["gate 00:00-23:59"]})))
        with strict:
            assert said(strict)["push"][0] == "failed", "all photographs would vanish from the remote: a person must agree"


def test_the_second_dataset_waits_until_it_holds_the_nights_of_the_first(tmp_path, small):
    "The first one has no exam nights. A second one soon after would lose a week, and its push would be braked."
    with small(tmp_path / "yard") as store:
        first = prepare(store, AT).version
        for days in (1, 3):
            assert "freeze" not in said(store, AT + timedelta(days=days))
        assert "Nothing was to be added" in said(store, LATER)["freeze"][1] and list_versions(store.home.datasets)[-1].name == first.name
        assert "freeze" not in said(store, LATER + timedelta(hours=12)) and "freeze" in said(store, LATER + timedelta(hours=24))


# -- when to train --------------------------------------------------------------------------------------------------


def asked(store: Store, days_ago: float, state: str = "finished") -> None:
    run = request_run(store.home, recipe_for(store.home), name=f"r{days_ago}-{state}", wish="w")
    request = json.loads((run / "request.json").read_bytes())
    write_json(run / "request.json", request | {"asked_at": stamp(now() - timedelta(days=days_ago))})
    if state == "finished":
        write_json(run / "result.json", {"dataset": request["dataset"], "finished_at": stamp(now())})
    elif state != "asked":
        write_json(run / "ended.json", {"state": state, "error": None, "ended_at": stamp(now())})


@pytest.mark.parametrize(("settings", "before", "due"), [
    ({"train_every": "weekly"}, [], True),
    ({"train_every": "weekly"}, [(8, "failed")], True),
    ({"train_every": "weekly"}, [(8, "finished")], False),  # on the newest version: there is nothing new to learn
    ({"train_every": "weekly"}, [(0, "failed")], False),
    ({"train_every": "monthly"}, [(8, "cancelled")], None),
    ({"train_every": "monthly"}, [(32, "cancelled")], True),
    ({"train_every": "never"}, [], False),
    ({"train_visits": 5}, [], True),
    ({"train_visits": 10_000}, [], False),
    ({"train_visits": 5}, [(1, "failed")], False),  # would fail again
])
def test_trainings_begin_by_the_calendar_and_by_evidence(tmp_path, settings, before, due, small):
    with small(tmp_path / "yard", **settings) as store:
        prepare(store, AT)
        for days, state in before:
            asked(store, days, state)
        why = why_train(Turn(store, now()))
        assert (why is not None) is (now().day <= 8 if due is None else due), why


def test_only_visits_that_are_new_and_can_be_learnt_count(tmp_path, small):
    with small(tmp_path / "yard") as store:
        version = prepare(store, AT).version
        test = sum(split == "test" for split in version.nights.values())
        assert 0 < new_visits(store, version, None) == 20 - test and new_visits(store, version, version) == 0


def test_an_interrupted_job_goes_on_three_times(tmp_path, place, small):
    with small(tmp_path / "yard", train_every="weekly") as store:
        said(store)
        [name] = place.submitted
        for _ in range(3):
            assert said(store) == {}, "it runs"
            place.die()
            assert said(store)["resume"][0] == "done"
        place.die()
        assert said(store) == {} and place.submitted == [name] * 4 and len(list_jobs(store.home)) == 1


# -- what goes wrong ------------------------------------------------------------------------------------------------


def test_a_failed_step_is_told_hides_no_other_and_is_tried_again(tmp_path, place, monkeypatch, small):
    with small(tmp_path / "yard", train_every="weekly", remote=str(tmp_path / "drive"), **LEAVES) as store:
        monkeypatch.setattr(room, "close_due", lambda *_: 1 / 0)
        done = tick(store, AT)
        states = {one.step: (one.state, one.code) for one in done.steps}
        assert states == {"draw": ("failed", "BUG"), "freeze": ("done", ""), "push": ("failed", "NO_REMOTE"), "train": ("done", "")} and done.failed
        monkeypatch.undo()
        monkeypatch.setattr(room, "runner_for", lambda _name: place)
        (tmp_path / "drive").mkdir()
        assert {name: state for name, (state, _) in said(store).items() if name != "resume"} == {"draw": "done", "push": "done"}


class Killed(BaseException):
    "As a kill: nothing catches it"


def killed_at(monkeypatch, nth: int) -> None:
    "Be killed before or after the n-th thing that a step does to the disk"
    count = iter(range(1, 1000))

    def watched(function):
        def call(*args, **kwargs):
            if next(count) == nth:
                raise Killed
            answer = function(*args, **kwargs)
            if next(count) == nth:
                raise Killed
            return answer
        return call

    for name in ("close_due", "prepare", "push_dataset", "_keep", "seal_candidate", "judge_bundle", "write_judgement_page", "submit_training"):
        monkeypatch.setattr(room, name, watched(getattr(room, name)))


def test_killed_between_any_two_steps_the_next_tick_repairs(tmp_path, place, small):
    (tmp_path / "drive").mkdir()
    settings = {"train_every": "weekly", "remote": str(tmp_path / "drive"), **LEAVES}
    with small(tmp_path / "yard", **settings) as store:
        prepare(store, AT)
        request = result(store) / "request.json"
        write_json(request, json.loads(request.read_bytes()) | {"dataset": "v0000", "asked_at": stamp(START)})  # so that a training of v0001 is due
        kills = 0
        for nth in range(1, 100):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(room, "runner_for", lambda _name: place)
                killed_at(patch, nth)
                known = read_memory(store.home)
                write_json(store.home.path / room.MEMORY, {name: known[name] for name in ("judging", "resumed") if name in known})  # freeze and push are due again
                try:
                    tick(store, LATER)
                    break
                except Killed:
                    kills += 1
        assert kills >= 14
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(room, "runner_for", lambda _name: place)
            while (done := tick(store, LATER)).steps:
                assert not done.failed, done.sentence
                kills -= 1
                assert kills, "it comes to an end"
        judged = last_judgement(store)
        assert len(place.submitted) == 1 == sum(job.state == "running" for job in list_jobs(store.home))
        assert not undrawn_nights(store, LATER).due and len(list_versions(store.home.datasets)) == 1
        assert (tmp_path / "drive" / POINTER).exists() and (store.home.reports / f"{judged['challenger'][:12]}.html").exists()


def test_a_killed_process_leaves_no_lock(tmp_path, small):
    "A real kill, between freezing and what follows"
    small(tmp_path / "yard").close()
    code = f"""
import os, signal, sys
from pathlib import Path
from deerml.app import tick as room
from deerml.capture.store import Store
from deerml.core.clock import parse_time
from deerml.core.settings import Home, Settings
room.STEPS["push"] = lambda turn: os.kill(os.getpid(), signal.SIGKILL)
room.tick(Store.open(Home.open(Path(sys.argv[1]))), parse_time("{stamp(AT)}"))
"""
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path / "yard")], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    with Store.open(Home.open(tmp_path / "yard")) as store:
        assert [version.name for version in list_versions(store.home.datasets)] == ["v0001"] and not undrawn_nights(store, AT).due
        assert said(store) == {} and read_memory(store.home)["frozen_at"]


def test_two_at_once_do_one_thing(tmp_path, small):
    with small(tmp_path / "yard") as store, folder_lock(store.home.path, room.LOCK):
        assert tick(store, AT).busy and not list_versions(store.home.datasets)
        ran = CliRunner().invoke(app, ["tick", "--home", str(store.home.path)])
        assert ran.exit_code == 0 and "Another tick" in ran.stdout


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff"])
def test_a_memory_that_cannot_be_read_is_no_memory(tmp_path, text):
    home = Home.create(tmp_path / "yard")
    (home.path / room.MEMORY).write_bytes(text)
    assert read_memory(home) == {}


def test_the_owner_is_told_once_and_again_when_it_could_not_be_told(tmp_path, monkeypatch, small):
    heard = []
    with small(tmp_path / "yard", ntfy="https://ntfy.example/deer") as store:
        monkeypatch.setattr(room, "push_step", None)
        monkeypatch.setitem(STEPS, "push", lambda turn: (_ for _ in ()).throw(DeermlError("NO_REMOTE", "The drive is gone.")))
        monkeypatch.setattr(room, "notify", lambda *_: (_ for _ in ()).throw(DeermlError("NOT_TOLD", "No network.")))
        assert [one.step for one in tick(store, AT).steps if one.state == "failed"] == ["push", "notify"]
        monkeypatch.setattr(room, "notify", lambda topic, title, text: heard.append((topic, text)))
        for _ in range(3):
            tick(store, AT)
        assert len(heard) == 1 and "The drive is gone" in heard[0][1]
        monkeypatch.setitem(STEPS, "push", lambda turn: None)
        result(store)
        tick(store, AT)
        assert len(heard) == 2 and "Judged" in heard[1][1] and str(tmp_path) not in heard[1][1]


def test_the_command(tmp_path, small):
    small(tmp_path / "yard").close()
    ran = CliRunner().invoke(app, ["tick", "--dry-run", "--json", "--home", str(tmp_path / "yard")])
    assert ran.exit_code == 0 and [one["step"] for one in json.loads(ran.stdout)["steps"]] == ["freeze"], "the nights of the yard are too old to be drawn today"


# -- units ----------------------------------------------------------------------------------------------------------


def parsed(text: str) -> dict[str, list[tuple[str, str]]]:
    sections: dict[str, list[tuple[str, str]]] = {}
    for line in text.splitlines():
        if line.startswith("["):
            section = sections.setdefault(line.strip("[]"), [])
        elif line:
            name, equals, value = line.partition("=")
            assert equals and name.isalpha(), line
            section.append((name, value))
    return sections


@pytest.mark.parametrize("system", [False, True])
def test_systemd_takes_the_units(tmp_path, system):
    home = Home.create(tmp_path / 'a "yard" of 5% $HOME')
    units = make_units(home, system, "daemon" if system else "", 20, "0.0.0.0", 8461)
    paths = install_units(units, tmp_path / "units")
    assert [path.name for path in paths] == ["deerml-tick.service", "deerml-tick.timer", "deerml-review.service"]
    services = [dict(parsed(unit.text)["Service"]) for unit in units if unit.name.endswith("service")]
    assert all(one["NoNewPrivileges"] == "yes" and one["UMask"] == "0077" for one in services)
    assert all((one.get("ProtectSystem") == "strict" and one["User"] == "daemon") is system for one in services)
    assert all(one["KillMode"] == "process" and "PrivateTmp" not in one for one in services), "a training that was begun lives on"
    assert "OnUnitInactiveSec=20min" in units[1].text and '"8461"' in units[2].text
    if shutil.which("systemd-analyze"):
        ran = subprocess.run(["systemd-analyze", *([] if system else ["--user"]), "verify", *map(str, paths)], capture_output=True, text=True, env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)})
        ours = [line for line in ran.stderr.splitlines() if "deerml" in line and "Failed to" not in line]
        assert not ours, ran.stderr


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here")
def test_the_services_of_the_system_have_few_rights(tmp_path):
    home = Home.create(tmp_path / "yard")
    for path in install_units(make_units(home, True, "daemon"), tmp_path / "units"):
        if path.suffix == ".service":
            ran = subprocess.run(["systemd-analyze", "security", "--offline=true", "--threshold=30", str(path)], capture_output=True, text=True)
            assert ran.returncode == 0, ran.stdout[-300:] + ran.stderr


def test_units_are_shown_before_they_are_written(tmp_path):
    Home.create(tmp_path / "yard")
    words = ["install", "units", "--to", str(tmp_path / "units"), "--home", str(tmp_path / "yard")]
    shown = CliRunner().invoke(app, [*words, "--dry-run"])
    assert shown.exit_code == 0 and "deerml-tick.timer" in shown.stdout and not (tmp_path / "units").exists()
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0 and set(json.loads(done.stdout)["units"]) == {str(path) for path in (tmp_path / "units").iterdir()}
    (tmp_path / "file").write_text("")
    refused = CliRunner().invoke(app, ["install", "units", "--to", str(tmp_path / "file"), "--json", "--home", str(tmp_path / "yard")])
    assert json.loads(refused.stdout)["error"]["code"] == "CANNOT_WRITE"
    root = CliRunner().invoke(app, ["install", "units", "--system", "--user", "root", "--dry-run", "--json", "--home", str(tmp_path / "yard")])
    assert json.loads(root.stdout)["error"]["code"] == "ROOT"


# -- a training over the wire ---------------------------------------------------------------------------------------


@pytest.fixture
def wire(tmp_path, place, small):
    with small(tmp_path / "yard") as store:
        prepare(store, AT)
        home = store.home
    with TestClient(make_app(home), base_url="http://localhost", client=("127.0.0.1", 5)) as client:
        client.home = home
        yield client


def test_a_training_over_the_wire_begins_once(wire, place):
    first = wire.post("/api/training-runs", json={"epochs": 3}, headers={"Idempotency-Key": "k1"})
    assert first.status_code == 202 and first.json()["dataset"] == "v0001" and first.json()["epochs"] == 3
    again = wire.post("/api/training-runs", json={"epochs": 3}, headers={"Idempotency-Key": "k1"})
    assert again.status_code == 202 and again.json()["id"] == first.json()["id"] and len(place.submitted) == 1
    other = wire.post("/api/training-runs", json={"epochs": 4}, headers={"Idempotency-Key": "k1"})
    assert (other.status_code, other.json()["error"]["code"]) == (409, "KEY_REUSED")
    asked = wire.get(f"/api/training-runs/{first.json()['id']}")
    assert asked.status_code == 200 and asked.json()["id"] == first.json()["id"] and str(wire.home.path) not in asked.text
    assert {job.id for job in list_jobs(wire.home)} == {first.json()["id"]}, "the notes of the keys are no runs"


@pytest.mark.parametrize(("body", "status", "code"), [
    ({"base": "/etc/passwd"}, 422, "BAD_REQUEST"), ({"notebook": "x.ipynb"}, 422, "BAD_REQUEST"), ({"dataset": "../v0001"}, 422, "BAD_REQUEST"),
    ({"epochs": 0}, 422, "BAD_REQUEST"), ({"dataset": "v0099"}, 409, "NO_DATASET")])
def test_a_wish_that_cannot_be(wire, place, body, status, code):
    answer = wire.post("/api/training-runs", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code) and not place.submitted and not list_jobs(wire.home)


def test_what_the_place_refuses_is_told(wire, place, monkeypatch):
    def refuse(_run):
        raise DeermlError("NO_PAPERMILL", "The packages that run notebooks are not installed.", next_step="Install them.")

    monkeypatch.setattr(place, "submit", refuse)
    answer = wire.post("/api/training-runs", json={}, headers={"Idempotency-Key": "k2"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "CANNOT_TRAIN") and not list_jobs(wire.home)
    monkeypatch.undo()


def test_another_training_is_under_way(wire):
    assert wire.post("/api/training-runs", json={}).status_code == 202
    answer = wire.post("/api/training-runs", json={"seed": 5})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "TRAINING_RUNS")


@pytest.mark.parametrize("name", ["nothing", "..", "..%2Ftoken", ".keys", "a" * 200])
def test_a_run_that_is_none(wire, name):
    answer = wire.get(f"/api/training-runs/{name}")
    assert answer.status_code in (404, 405, 422) and str(wire.home.path) not in answer.text
