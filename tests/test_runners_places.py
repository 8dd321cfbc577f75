"""Trainings on machines of others: Colab's command line, SkyPilot's, GitHub's interface, each as it really answers."""
import json
import os
import stat
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from colab_places import executable, local_colab, stand_in
from deerml.app.away import main as away
from deerml.app.cli import app
from deerml.app.places import jobs_at
from deerml.core.durable import write_json
from deerml.core.errors import DeermlError
from deerml.core.settings import Home
from deerml.data.push import push_dataset
from deerml.data.remote import FolderRemote
from deerml.data.version import freeze
from deerml.train import colab as colab_room
from deerml.train.actions import Actions, GitHub
from deerml.train.away import ask, bring, read_asked
from deerml.train.cloud import Budget, Cloud, price_of, task_for
from deerml.train.colab import Colab, drive
from deerml.train.local import at_work, wait_for
from deerml.train.recipe import Recipe
from deerml.train.runners import ENDED, JOB, REQUEST
from yards import AFTER, yard

ROOT = Path(__file__).resolve().parents[1]
COLAB_PYTHON = os.environ.get("COLAB_CLI_PYTHON")
SKY_PYTHON = os.environ.get("SKYPILOT_PYTHON")

# Stands for the Python of the machine: does, instead of training, what `does.txt` says, a word for each start.
MACHINE = '''#!{python}
import hashlib, io, json, os, pathlib, sys, tarfile, time
place = pathlib.Path({place!r})
arguments = sys.argv[1:]
run, out = arguments[2], pathlib.Path(arguments[arguments.index("--out") + 1])
assert pathlib.Path(arguments[arguments.index("--folder") + 1]).is_absolute()
key = pathlib.Path(arguments[arguments.index("--account") + 1]).read_text() if "--account" in arguments else ""
words = (place / "does.txt").read_text().split()
(place / "does.txt").write_text(" ".join(words[1:]))
attempt = json.loads((place / "drive/runs" / run / "asked.json").read_text())["attempt"]
print("training with", key or "no key", flush=True)
if words[0] == "vanishes":
    os.kill(os.getppid(), 9)
if words[0] == "sleeps":
    time.sleep(600)
if words[0] == "fails":
    (out / "result.json").write_text(json.dumps(dict(attempt=attempt, error=dict(code="NO_SPACE", what="The disk is full."))))
    sys.exit(1)
if words[0] == "succeeds":
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in (("result.json", b'{{"candidate": {{}}, "finished_at": "2030-01-01T00:00:00.000Z"}}'), ("candidate/model.onnx", b"weights")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    (out / "result.tar").write_bytes(file.getvalue())
    (out / "result.json").write_text(json.dumps(dict(attempt=attempt, sha256=hashlib.sha256(file.getvalue()).hexdigest())))
'''


@pytest.fixture
def remote(tmp_path) -> FolderRemote:
    (tmp_path / "drive").mkdir()
    return FolderRemote(tmp_path / "drive")


@pytest.fixture
def run(tmp_path) -> Path:
    path = tmp_path / "yard/runs/r1"
    path.mkdir(parents=True)
    write_json(path / REQUEST, {"dataset": "v0001", "recipe": {"base": "tiny", "epochs": 2}})
    return path


def refused(function, *args, **kwargs) -> DeermlError:
    with pytest.raises(DeermlError) as caught:
        function(*args, **kwargs)
    return caught.value


def until(true, seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.05)
    return true()


# -- Colab ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path):
    "Options of a plan whose machine is this one"
    (tmp_path / "content").mkdir()
    executable(tmp_path / "python", MACHINE.format(python=sys.executable, place=str(tmp_path)))
    return {"python": str(tmp_path / "python"), "install": (), "folder": str(tmp_path / "content"), "beat_s": 0.2, "auth": "adc"}


@pytest.fixture(params=["stand-in", "real"])
def colab(request, tmp_path, machine, remote, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    if request.param == "stand-in":
        yield Colab(remote, str(remote.path), options=tuple((machine | {"command": (str(stand_in(tmp_path)),)}).items()))
    elif not COLAB_PYTHON:
        pytest.skip("COLAB_CLI_PYTHON names no Python with google-colab-cli")
    else:
        with local_colab(tmp_path, COLAB_PYTHON) as (command, server):
            yield Colab(remote, str(remote.path), options=tuple((machine | {"command": (str(command),)}).items()))
            assert server.live == [] and all("accelerator=T4" in path for path in server.asked), "every machine was stopped, and each had a T4"


def does(tmp_path, *words: str) -> None:
    (tmp_path / "does.txt").write_text(" ".join(words))


def test_colab_trains_and_only_a_result_is_success(colab, run, tmp_path):
    does(tmp_path, "succeeds")
    assert colab.submit(run).state == "running"
    assert wait_for(colab, run, 180).state == "finished", colab.logs(run)
    assert (colab.fetch(run) / "candidate/model.onnx").read_bytes() == b"weights" and "training with no key" in colab.logs(run)
    assert until(lambda: not at_work(run)) and not (run / ".colab").exists(), "the keys of the session are gone"


def test_colab_an_error_of_the_training_is_told_and_not_repeated(colab, run, tmp_path):
    does(tmp_path, "fails", "succeeds")
    colab.submit(run)
    job = wait_for(colab, run, 180)
    assert job.state == "failed" and job.error["code"] == "NO_SPACE", colab.logs(run)
    assert (tmp_path / "does.txt").read_text() == "succeeds" and refused(colab.fetch, run).code == "NOT_FINISHED"


def test_colab_a_cancelled_training_leaves_no_process_and_no_machine(colab, run, tmp_path):
    does(tmp_path, "sleeps")
    colab.submit(run)
    assert until(lambda: "deerml is at work" in colab.logs(run)), "the heartbeat, without which the machine is taken away"
    assert colab.submit(run).state == "running" and colab.logs(run).count("Creating session") == 1, "asking twice begins once"
    assert colab.cancel(run).state == "cancelled" and not at_work(run) and not (run / ".colab").exists()


@pytest.fixture
def driven(tmp_path, machine, remote, run, monkeypatch):
    "Sees a job through in this process, with the stand-in"
    command = stand_in(tmp_path)

    def go(*words: str, told: dict | None = None, lend_key=None, **options) -> tuple[bool, list[str]]:
        does(tmp_path, *words)
        write_json(tmp_path / "told.json", told or {})
        plan = colab_room.Plan(**{"remote": str(remote.path), "attempt": ask(remote, run), "command": (str(command),)} | machine | options)
        write_json(run / colab_room.PLAN, vars(plan))
        good = drive(run, lend_key, retry_s=0)
        return good, (tmp_path / "calls.txt").read_text().splitlines()
    return go


def ended(run: Path) -> dict:
    return json.loads((run / ENDED).read_text())["error"]


def test_a_machine_that_was_lost_is_replaced_and_each_one_is_stopped(driven, run):
    good, calls = driven("vanishes", "ends", "succeeds")
    assert not good and ended(run)["code"] == "NO_RESULT", "a training that only ended is no success"
    good, calls = driven("vanishes", "vanishes", "vanishes", "succeeds")
    assert good and sum(" new " in call for call in calls) == sum(" stop " in call for call in calls) == 2 + 4


def test_three_resumes_are_enough(driven, run):
    good, calls = driven(*["vanishes"] * 5)
    assert not good and ended(run)["code"] == "MACHINES_LOST" and sum(" new " in call for call in calls) == 4 == sum(" stop " in call for call in calls)


def test_another_gpu_than_a_t4_is_given_back(driven, run):
    good, calls = driven("succeeds", told={"gives": "A100"})
    assert not good and ended(run)["code"] == "WRONG_GPU" and "A100" in ended(run)["why"] and not any(" exec " in call for call in calls) and " stop " in calls[-1]


def test_no_machine_to_be_had(driven, run):
    good, calls = driven("succeeds", told={"refuse": True})
    assert not good and ended(run)["code"] == "NO_GPU" and "Allocation refused" in ended(run)["why"] and " stop " in calls[-1]


def test_a_lent_key_goes_there_as_a_file_and_into_no_argument(driven, run, tmp_path):
    good, calls = driven("succeeds", remote="", lend_key=lambda: b"lent-for-an-hour")
    assert good and not any("lent-for-an-hour" in call for call in calls) and "lent-for-an-hour" not in (run / colab_room.PLAN).read_text()
    assert (tmp_path / "content" / colab_room.KEY).read_text() == "lent-for-an-hour"


def test_colab_without_its_command_line_or_a_login(remote, run, tmp_path, monkeypatch):
    error = refused(Colab(remote, "", options=(("command", ("colab-not-there",)),)).submit, run)
    assert error.code == "NO_COLAB_CLI" and "uv tool install google-colab-cli" in error.next_step and not (run / JOB).exists()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert refused(Colab(remote, "", options=(("command", (sys.executable,)),)).submit, run).code == "NO_ACCOUNT"
    assert refused(Colab(remote, "", options=(("command", (sys.executable,)), ("gpu", "H999"))).submit, run).code == "BAD_GPU"


# -- a rented machine -------------------------------------------------------------------------------------------------

SKY = '''#!{python}
import json, pathlib, sys
place = pathlib.Path({place!r})
with open(place / "calls.txt", "a") as file:
    print(*sys.argv[1:], file=file)
told = json.loads((place / "sky.json").read_text())
command = sys.argv[1]
if command == "gpus":
    print("Starting the API server...")
    print(json.dumps({{sys.argv[3]: told["prices"].get(sys.argv[3], [])}}))
if command == "launch":
    sys.exit(told.get("launch", 0))
if command == "status":
    print(json.dumps([dict(name=sys.argv[2], status=told["state"])] if told.get("state") else []))
if command == "logs":
    print("epoch 1 of 2")
    sys.exit(told.get("job", 0) if "--status" in sys.argv else 0)
if command == "down":
    told["state"] = None
    (place / "sky.json").write_text(json.dumps(told))
'''
PRICES = {"T4": [{"cloud": "aws", "accelerator_name": "T4", "accelerator_count": 1, "price": 0.53, "spot_price": 0.19, "region": "us-east-1"}], "L4": [{"cloud": "gcp", "accelerator_count": 1, "spot_price": 0.28}]}


@pytest.fixture
def cloud(tmp_path, remote) -> Cloud:
    write_json(tmp_path / "sky.json", {"prices": PRICES, "state": "UP", "job": 101})
    return Cloud(remote, "s3://bucket/yard", command=(str(executable(tmp_path / "sky", SKY.format(python=sys.executable, place=str(tmp_path)))),))


def told(tmp_path, **changes) -> None:
    write_json(tmp_path / "sky.json", json.loads((tmp_path / "sky.json").read_text()) | changes)


def long_ago(run: Path) -> None:
    write_json(run / JOB, json.loads((run / JOB).read_text()) | {"begun_at": "2020-01-01T00:00:00.000Z"})


def test_a_rented_machine_from_its_price_to_its_end(cloud, run, tmp_path):
    assert cloud.submit(run).state == "running" and cloud.submit(run).state == "running"
    calls = (tmp_path / "calls.txt").read_text().splitlines()
    assert sum(call.startswith("launch -y -d") for call in calls) == 1, "asking twice rents once"
    task, begun = json.loads((run / "task.sky.yaml").read_text()), json.loads((run / JOB).read_text())
    assert begun["prices"] == {"T4": 0.19, "L4": 0.28, "most": 3.0} and cloud.logs(run) == "epoch 1 of 2\n"
    assert task["resources"]["autostop"] == {"idle_minutes": 5, "down": True} and all(one["use_spot"] for one in task["resources"]["any_of"])
    assert task["resources"]["max_hourly_cost"] * (cloud.budget.minutes + 5) / 60 <= cloud.budget.usd, "the most that it can cost"
    long_ago(run)
    assert cloud.status(run).state == "running"
    told(tmp_path, job=100)
    assert cloud.status(run).state == "died" and refused(cloud.fetch, run).code == "NOT_FINISHED"
    assert cloud.cancel(run).state == "cancelled" and json.loads((tmp_path / "sky.json").read_text())["state"] is None


def test_a_machine_that_was_taken_away_is_noticed_once_it_should_be_there(cloud, run, tmp_path):
    cloud.submit(run)
    told(tmp_path, state=None)
    assert cloud.status(run).state == "running", "it may take minutes until it is in the list"
    long_ago(run)
    assert cloud.status(run).state == "died"


def test_what_a_budget_forbids_is_never_begun(cloud, run, tmp_path):
    assert refused(price_of, Budget(1.0, 0.1), cloud.command).code == "TOO_DEAR"
    told(tmp_path, prices={})
    assert refused(cloud.submit, run).code == "TOO_DEAR" and not (run / JOB).exists()
    assert "launch" not in (tmp_path / "calls.txt").read_text()
    error = refused(Cloud(cloud.remote, cloud.there, command=("sky-not-there",)).submit, run)
    assert error.code == "NO_SKY" and "uv tool install" in error.next_step
    assert refused(Cloud(cloud.remote, "/mnt/drive").submit, run).code == "NO_BUCKET"


def test_the_task_is_one_that_skypilot_knows(tmp_path):
    "By the words of its schema; where SKYPILOT_PYTHON names a Python with SkyPilot, by SkyPilot itself"
    task = task_for("20300101T020304-v0007-o'neil; rm -rf", "s3://bucket/yard", Budget())
    assert set(task) <= {"name", "resources", "num_nodes", "setup", "run", "envs", "workdir", "file_mounts"}
    assert set(task["resources"]) <= {"any_of", "disk_size", "autostop", "max_hourly_cost"} and task["num_nodes"] == 1
    assert task["name"].replace("-", "").isalnum() and "'\"'\"'" in task["run"], "a name is a word of the shell, whatever it holds"
    if SKY_PYTHON:
        (tmp_path / "task.yaml").write_text(json.dumps(task))
        code = "import sys, sky; print(sorted((str(one.accelerators), one.use_spot, one.autostop_config.down, one.autostop_config.idle_minutes) for one in sky.Task.from_yaml(sys.argv[1]).resources))"
        ran = subprocess.run([SKY_PYTHON, "-c", code, tmp_path / "task.yaml"], capture_output=True, text=True, env=os.environ | {"HOME": str(tmp_path), "PYTHONPATH": ""})
        assert ran.stdout.strip() == "[(\"{'L4': 1}\", True, True, 5), (\"{'T4': 1}\", True, True, 5)]", ran.stderr[-500:]


# -- a workflow -------------------------------------------------------------------------------------------------------

TOKEN = "github_pat_secret"


class Answers(BaseHTTPRequestHandler):
    "GitHub's interface for workflow runs, with the fields that are used of its real answers"

    def log_message(self, *_):
        return

    def _answer(self):
        server, body = self.server, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server.heard.append((self.command, self.path, self.headers.get("Authorization"), json.loads(body or b"null")))
        code, answer = self._about(self.path.split("?")[0], json.loads(body or b"null"))
        data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode() if answer is not None else b""
        self.send_response(code)
        if code == 302:
            self.send_header("Location", f"http://127.0.0.1:{server.server_port}/logs-elsewhere")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _about(self, path, body):
        server = self.server
        if path == "/logs-elsewhere":
            return 200, "2030-01-01T00:00:00.0000000Z epoch 2 of 2\n"
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, {"message": "Bad credentials", "documentation_url": "https://docs.github.com/rest", "status": "401"}
        path = path.removeprefix("/repos/owner/yard/actions")
        if path == "/workflows/train.yml/dispatches":
            title = f"train {body['inputs']['run']} {body['inputs']['attempt']}"
            server.runs.insert(0, {"id": 30433642 + len(server.runs), "name": "train", "display_title": title, "event": "workflow_dispatch", "status": "queued", "conclusion": None, "html_url": "https://github.com/owner/yard/actions/runs/30433642"})
            return 204, None
        if path == "/workflows/train.yml/runs":
            return 200, {"total_count": len(server.runs), "workflow_runs": server.runs}
        if path.endswith("/jobs") and path.startswith("/runs/"):
            return 200, {"total_count": 1, "jobs": [{"id": 399444496, "status": server.runs[0]["status"], "conclusion": server.runs[0]["conclusion"], "steps": [{"name": "Train", "status": "completed", "conclusion": "success", "number": 1}]}]}
        if path == "/jobs/399444496/logs":
            return 302, None
        if path.endswith("/cancel"):
            server.runs[0] |= {"status": "completed", "conclusion": "cancelled"}
            return 202, {}
        return 404, {"message": "Not Found", "documentation_url": "https://docs.github.com/rest", "status": "404"}

    do_GET = do_POST = _answer


@pytest.fixture
def github(tmp_path, monkeypatch):
    for name in ("GITHUB_TOKEN", "DEERML_GITHUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.runs, server.heard = [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "token").write_text(TOKEN + "\n")
    (tmp_path / "token").chmod(0o600)
    yield server, GitHub("owner/yard", tmp_path / "token", f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()


def test_a_workflow_is_found_by_its_attempt_among_others(github, remote, run):
    server, told = github
    server.runs.append({"id": 1, "display_title": "train r1 of another", "status": "completed", "conclusion": "success", "html_url": ""})
    actions = Actions(remote, "s3://bucket/yard", told)
    assert actions.submit(run).state == "running" and actions.submit(run).state == "running"
    asked = [body for method, path, _, body in server.heard if path.endswith("/dispatches")]
    attempt = read_asked(remote, "r1")["attempt"]
    assert asked == [{"ref": "main", "inputs": {"run": "r1", "attempt": attempt, "remote": "s3://bucket/yard", "runner": "ubuntu-24.04"}}], "asking twice dispatches once"
    server.runs[0] |= {"status": "completed", "conclusion": "failure"}
    job = actions.status(run)
    assert job.state == "failed" and "ended with failure" in job.error["what"] and "actions/runs" in job.error["next_step"]
    assert actions.logs(run) == "Train: success\n2030-01-01T00:00:00.0000000Z epoch 2 of 2\n"
    assert [authorization for _, path, authorization, _ in server.heard if path == "/logs-elsewhere"] == [None], "the token stays with GitHub"


def test_a_workflow_is_cancelled(github, remote, run):
    server, told = github
    actions = Actions(remote, "gs://bucket/yard", told)
    actions.submit(run)
    assert actions.cancel(run).state == "cancelled" == actions.status(run).state and server.runs[0]["conclusion"] == "cancelled"


def test_a_token_that_is_refused_missing_or_open_is_never_printed(github, remote, run, tmp_path):
    server, told = github
    actions = Actions(remote, "s3://bucket/yard", told)
    (tmp_path / "token").write_text("revoked_token")
    error = refused(actions.submit, run)
    assert error.code == "NOT_ALLOWED" and "Bad credentials" in error.why and "revoked_token" not in str(error) and not (run / JOB).exists()
    (tmp_path / "token").chmod(0o644)
    assert refused(actions.submit, run).code == "OPEN_SECRET"
    (tmp_path / "token").unlink()
    assert refused(actions.submit, run).code == "NO_TOKEN"
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0o600)
    assert refused(Actions(remote, "s3://b/y", GitHub("owner/other", told.token_file, told.api)).submit, run).code == "NO_WORKFLOW"
    server.shutdown()
    server.server_close()
    assert refused(actions.submit, run).code == "NO_GITHUB"


def test_the_workflow_takes_what_is_sent():
    text = (ROOT / ".github/workflows/train.yml").read_text()
    assert "run-name: train ${{ inputs.run }} ${{ inputs.attempt }}" in text and "cancel-in-progress: false" in text
    assert "${{ inputs." not in text.split("run: python -c")[1], "what is sent is never part of a script"


# -- from a home to a machine and back --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sent(tmp_path_factory):
    "A home whose dataset lies on a remote"
    place = tmp_path_factory.mktemp("sent")
    (place / "drive").mkdir()
    with yard(place / "home", nights=12, remote=str(place / "drive"), leave="labelled", people="show", image_size=96, github_repository="owner/yard") as store:
        version = freeze(store, AFTER).version
        push_dataset(store, FolderRemote(place / "drive"))
    return Home.open(place / "home"), version


def request(home: Home, version, name: str) -> Path:
    run = home.runs / name
    run.mkdir()
    write_json(run / REQUEST, {"dataset": version.name, "recipe": asdict(Recipe("tiny", image_size=96, epochs=1, batch=8, reserve_mb=10, threads=1))})
    return run


def test_another_machine_trains_and_its_candidate_comes_home(sent, tmp_path, monkeypatch):
    monkeypatch.setenv("DEERML_CACHE", str(tmp_path / "cache"))
    home, version = sent
    run, remote = request(home, version, "r1"), FolderRemote(Path(home.settings.remote))
    attempt = ask(remote, run)
    assert bring(remote, run, attempt) is None and not (run / "result.json").exists()
    assert away(["r1", str(remote.path), "--folder", str(tmp_path / "machine"), "--out", str(tmp_path)]) == 0
    assert bring(remote, run, attempt) is None
    result = json.loads((run / "result.json").read_text())
    assert result["dataset"] == version.name and (run / "candidate").is_dir() and any((run / "candidate").glob("*.onnx"))
    assert json.loads((tmp_path / "result.json").read_text())["attempt"] == attempt
    assert jobs_at(home)[0].state == "finished"


def test_a_newer_dataset_on_the_remote_is_not_trained_in_its_place(sent, tmp_path):
    home, version = sent
    run, remote = request(home, version, "r2"), FolderRemote(Path(home.settings.remote))
    write_json(run / REQUEST, json.loads((run / REQUEST).read_text()) | {"dataset": "v0042"})
    attempt = ask(remote, run)
    assert away(["r2", str(remote.path), "--folder", str(tmp_path / "machine")]) == 1
    assert bring(remote, run, attempt)["code"] == "OTHER_DATASET" and not (run / "result.json").exists()


def test_the_command_line_says_what_a_place_lacks(sent):
    home, before = sent[0], set(sent[0].runs.iterdir())
    for place, code in (("colab", "ONLY_DRIVE"), ("actions", "NO_BUCKET"), ("moon", "UNKNOWN_PLACE")):
        answer = CliRunner().invoke(app, ["train", "--base", "tiny", "--on", place, "--home", str(home.path), "--json"])
        assert answer.exit_code != 0 and code in answer.stdout, answer.stdout
    assert {path for path in home.runs.iterdir() if path.is_dir()} <= before, "nothing was begun"


def test_the_keys_of_a_session_are_for_its_user_alone(tmp_path, run, machine):
    plan = colab_room.Plan("", "a1", **machine | {"command": (str(stand_in(tmp_path)),)})
    with colab_room.Session(run, plan) as session:
        assert stat.S_IMODE(session.home.stat().st_mode) == 0o700
        session.call("new", "-s", session.name, "--gpu", "T4")
    assert not session.home.exists() and " stop " in (tmp_path / "calls.txt").read_text()
