"""Trainings as jobs: two who ask, a killed process, a cancelled one, bad input; two candidates; another machine."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deerml.app import training
from deerml.app.cli import app
from deerml.app.training import (
    carry_out,
    find_run,
    list_runs,
    recipe_for,
    request_candidates,
    request_run,
    submit_candidate,
    submit_training,
)
from deerml.app.trial import choose_candidate
from deerml.core.durable import write_json
from deerml.core.errors import DeermlError
from deerml.core.settings import Home
from deerml.data.remote import FolderRemote
from deerml.data.version import freeze
from deerml.train import local as local_room
from deerml.train.copies import spot_dataset
from deerml.train.jobs import find_job, list_jobs, resume_run
from deerml.train.local import Local, at_work, wait_for
from deerml.train.mirror import mirrored, push_state, read_pointer
from deerml.train.recipe import Recipe, choose_device, read_training, train
from yards import yard

ROOT = Path(__file__).resolve().parents[1]
SMALLEST = """
nc: 1
reg_max: 4
backbone: [[-1, 1, Conv, [8, 3, 2]], [-1, 1, Conv, [16, 3, 2]], [-1, 1, Conv, [16, 3, 2]], [-1, 1, Conv, [24, 3, 2]]]
head: [[[2, 3], 1, Detect, [nc]]]
"""
SLEEPS = "import time\nprint('begun', flush=True)\ntime.sleep(600)"
WORKS = "import json, pathlib\nprint('seconds', seconds)\npathlib.Path('result.json').write_text(json.dumps({'finished_at': '2030-01-01T00:00:00.000Z', 'dataset': 'v0001'}))"


@pytest.fixture
def home(tmp_path, monkeypatch) -> Home:
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    monkeypatch.setenv("DEERML_CACHE", str(tmp_path / "cache"))
    found = Home.create(tmp_path / "yard", classes=["spot"], image_size=96, base_model="tiny", epochs=2, batch=4)
    spot_dataset(found.datasets / "v0001", train=4, val=2)
    return found


def notebook(folder: Path, code: str) -> Path:
    cells = [{"cell_type": "code", "id": name, "metadata": {"tags": tags}, "outputs": [], "execution_count": None, "source": source}
             for name, tags, source in (("a", ["parameters"], "seconds = 0\nhome = run = ''"), ("b", [], code))]
    path = folder / "asked.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}, "nbformat": 4, "nbformat_minor": 5}))
    return path


def code_of(function, *args, **kwargs) -> str:
    with pytest.raises(DeermlError) as caught:
        function(*args, **kwargs)
    return caught.value.code


def recipe(**chosen) -> Recipe:
    return Recipe("tiny", **{"image_size": 96, "epochs": 2, "batch": 4, "reserve_mb": 10, "threads": 1} | chosen)


def until(true, seconds=90.0) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.05)
    return true()


# -- jobs -----------------------------------------------------------------------------------------------------------


def test_a_job_lives_through_restarts_is_found_again_and_is_cancelled_with_all_its_processes(home, tmp_path):
    asked = notebook(tmp_path, SLEEPS)
    job = submit_training(home, Local(), recipe(), notebook=asked)
    assert job.state == "running" and submit_training(home, Local(), recipe(), notebook=asked).id == job.id, "the same wish, the same job"
    assert code_of(submit_training, home, Local(), recipe(seed=1), notebook=asked) == "BUSY"
    assert until(lambda: "begun" in Local().logs(job.path)), Local().logs(job.path)
    elsewhere = subprocess.run([sys.executable, "-c", "import sys; from deerml.app.cli import main; main()", "runs", "--json", "--home", str(home.path)], capture_output=True, text=True)
    assert [one["state"] for one in json.loads(elsewhere.stdout)["runs"]] == ["running"], elsewhere.stderr
    pids = local_room._processes(job.path)
    assert len(pids) >= 2 and all(os.getpriority(os.PRIO_PROCESS, pid) >= 10 for pid in pids), "papermill and its kernel, both gentle"
    assert all(len(os.sched_getaffinity(pid)) <= Local().cpus for pid in pids)
    assert Local().cancel(job.path).state == "cancelled" and not at_work(job.path) and not local_room._processes(job.path)
    assert Local().cancel(job.path).state == "cancelled" and [one.state for one in list_jobs(home)] == ["cancelled"]


def test_a_job_whose_process_was_killed_is_noticed_and_goes_on(home, tmp_path):
    asked = notebook(tmp_path, SLEEPS)
    job = submit_training(home, Local(), recipe(), notebook=asked, parameters={"seconds": 7})
    assert until(lambda: len(local_room._processes(job.path)) >= 2)
    worker, kernel = sorted(local_room._processes(job.path))[:2]
    os.kill(worker, signal.SIGKILL)
    assert until(lambda: find_job(home, job.id).state == "died") and code_of(Local().fetch, job.path) == "NOT_FINISHED"
    notebook(tmp_path, WORKS)
    assert resume_run(home, job.id, Local()).state == "running" and not Path(f"/proc/{kernel}/cwd").exists(), "a kernel that is left over is ended"
    assert wait_for(Local(), job.path, 120).state == "finished" and "seconds 7" in Local().logs(job.path), Local().logs(job.path)
    assert code_of(resume_run, home, job.id, Local()) == "RUN_FINISHED" and Local().fetch(job.path) == job.path


def test_two_who_ask_at_once_begin_one_job(home, tmp_path):
    "Two threads take the lock as two processes do: it belongs to the opened file"
    asked = notebook(tmp_path, SLEEPS)
    with ThreadPoolExecutor(4) as pool:
        jobs = list(pool.map(lambda _: submit_training(home, Local(), recipe(), notebook=asked).id, range(4)))
    assert len(set(jobs)) == 1 == len(list_jobs(home)) and Local().cancel(home.runs / jobs[0]).state == "cancelled"


def test_what_cannot_begin_leaves_no_job(home, tmp_path, monkeypatch):
    asked = notebook(tmp_path, WORKS)
    assert code_of(submit_training, home, Local(), recipe(), notebook=asked, parameters={"secnds": 1}) == "UNKNOWN_PARAMETER"
    assert code_of(submit_candidate, home, Local(), recipe(), ["fresh", "warm"], notebook=asked) == "NO_CHAMPION"
    assert code_of(submit_candidate, home, Local(), recipe(), ["frsh"], notebook=asked) == "BAD_CANDIDATES"
    monkeypatch.setattr(local_room, "find_spec", lambda name: None)
    with pytest.raises(DeermlError) as caught:
        submit_training(home, Local(), recipe(), notebook=asked)
    assert caught.value.code == "NO_PAPERMILL" and "pip install 'deerml[train]'" in caught.value.next_step
    assert list_jobs(home) == [] and not [path for path in home.runs.iterdir() if path.is_dir()]


def test_runs_says_what_became_of_them(home):
    for name, files in (("a", {}), ("b", {"job.json": {"place": "local", "begun_at": "2030-01-01T00:00:00.000Z"}, "ended.json": {"state": "failed", "error": {"code": "NO_RESULT", "what": "It left no result."}, "ended_at": "2030-01-01T02:00:00.000Z"}})):
        for file, content in [*files.items(), ("request.json", None)]:
            (home.runs / name).mkdir(exist_ok=True)
            write_json(home.runs / name / file, content or {"dataset": "v0001"})
    answer = CliRunner().invoke(app, ["runs", "--home", str(home.path)])
    assert answer.exit_code == 0 and "asked" in answer.stdout and "failed" in answer.stdout and "2 h" in answer.stdout and "b: It left no result." in answer.stdout
    assert CliRunner().invoke(app, ["runs", "cancel", "a", "--home", str(home.path)]).exit_code == 0 and find_job(home, "a").state == "cancelled"
    assert "NO_RUN" in CliRunner().invoke(app, ["runs", "logs", "c", "--home", str(home.path), "--json"]).stdout


@pytest.mark.slow
def test_the_notebook_of_the_badge_trains_a_candidate_of_a_home_as_a_job(home):
    command = ["train", "--on", "local", "--home", str(home.path), "--json"]
    answer = CliRunner().invoke(app, command)
    assert answer.exit_code == 0, answer.output
    told = json.loads(answer.stdout)
    job = wait_for(Local(), Path(told["path"]), 240)
    assert job.state == "finished", Local().logs(job.path)
    assert [run.id for run in list_runs(home)] == [job.id] and (job.path / "candidate/model.onnx").is_file() and job.epochs_done == 2
    assert until(lambda: not at_work(job.path)), "the result is there first, then the notebook ends"
    assert told["estimate"]["seconds"] > 0 and "Its home judges it" in Local().logs(job.path)


# -- bad input ------------------------------------------------------------------------------------------------------


def test_a_gpu_that_is_not_there_is_refused_before_anything_is_written(home):
    assert code_of(choose_device, "63") == "NO_GPU"
    assert code_of(train, home.datasets / "v0001", home.runs / "a", recipe(device="63")) == "NO_GPU" and not (home.runs / "a" / "training.json").exists()
    answer = CliRunner().invoke(app, ["train", "--device", "63", "--home", str(home.path), "--json"])
    assert json.loads(answer.stdout)["error"]["code"] == "NO_GPU" and not list_jobs(home)


def test_no_weights_and_no_network_says_where_the_file_goes_or_from_scratch(home, monkeypatch, tmp_path):
    monkeypatch.setattr("deerml.train.checkpoint.WEIGHTS_URL", "http://127.0.0.1:9")
    answer = CliRunner().invoke(app, ["train", "--base", "yolo26n", "--home", str(home.path), "--json"])
    error = json.loads(answer.stdout)["error"]
    assert error["code"] == "DOWNLOAD" and str(tmp_path / "cache/weights/yolo26n.pt") in error["next_step"] and "--from-scratch" in error["next_step"]
    assert recipe_for(home, True, base="yolo26n").base == "yolo26n.yaml" and recipe_for(home, True).base == "tiny" and not list_jobs(home)


# -- another machine ------------------------------------------------------------------------------------------------


class Lost(BaseException):
    "The machine is taken away"


def test_a_training_goes_on_on_another_machine(home, tmp_path, monkeypatch):
    monkeypatch.setattr("deerml.train.session.CHECKPOINT_S", 0.0)
    (tmp_path / "drive").mkdir()
    drive, model = FolderRemote(tmp_path / "drive"), tmp_path / "smallest.yaml"
    model.write_text(SMALLEST)
    wanted = Recipe(str(model), **{name: value for name, value in asdict(recipe(epochs=4)).items() if name not in ("base", "preset")}, preset="tiny")
    name = request_run(home, wanted, name="lost").name

    def lose(_what, done, _total):
        push_state(drive, home.runs / name)
        if done == 3:
            raise Lost

    with pytest.raises(Lost):
        carry_out(home, name, lose)
    there = Home.create(tmp_path / "there", classes=["spot"], image_size=96)
    shutil.copytree(home.datasets / "v0001", there.datasets / "v0001")
    shutil.rmtree(home.path)
    told = []
    run = carry_out(there, name, lambda _what, done, _total: told.append(done), drive)
    assert told[0] == 4 and read_training(run.path)["epochs_done"] == 4 and read_training(run.path)["resumes"] == 1, "three epochs came from the drive"
    assert read_pointer(drive, name)["files"]["training.json"]["sha256"] and run.candidate.is_dir()


def test_a_full_drive_does_not_end_a_training(tmp_path, monkeypatch):
    (tmp_path / "drive").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/last.pt").write_bytes(b"weights")
    drive = FolderRemote(tmp_path / "drive")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("deerml.data.remote.write_file", full)
    with mirrored(drive, tmp_path / "run", 0.01) as trouble:
        assert until(lambda: bool(trouble))
    assert trouble[0].code == "NO_REMOTE" and not drive.list("")
    monkeypatch.undo()
    assert push_state(drive, tmp_path / "run")


# -- two candidates -------------------------------------------------------------------------------------------------


def finished_pair(home, monkeypatch) -> list[str]:
    "Two candidates whose trainings are done, as far as their files tell"
    monkeypatch.setattr(training, "champion_checkpoint", lambda home: home.path / "best.pt")
    (home.path / "best.pt").touch()
    names = request_candidates(home, recipe(), ["fresh", "warm"])
    for number, name in enumerate(names):
        write_json(home.runs / name / "result.json", {"dataset": "v0001", "finished_at": f"2030-01-0{number + 1}T00:00:00.000Z"})
    return names


def test_of_two_candidates_the_better_one_is_judged_and_the_other_never(home, monkeypatch):
    from deerml.app import trial
    fresh, warm = names = finished_pair(home, monkeypatch)
    asked = {name: json.loads((home.runs / name / "request.json").read_bytes()) for name in names}
    assert asked[warm]["recipe"]["base"].endswith("best.pt") and asked[warm]["recipe"]["learning_rate"] == asked[fresh]["recipe"]["learning_rate"] / 4
    assert list_runs(home) == [] and code_of(find_run, home) == "NO_RUN" and code_of(find_run, home, fresh) == "NOT_CHOSEN", "nobody has chosen yet"
    looked = []
    monkeypatch.setattr(trial, "calibrate_candidate", lambda store, run, show: looked.append(run.id) or run.id)
    monkeypatch.setattr(trial, "better_on_val", lambda found: trial.Chosen(fresh, "fresh is better", {name: {"recall": 1.0} for name in found}))
    store = type("Store", (), {"home": home})()
    assert choose_candidate(store, names).name == fresh and looked == names
    assert choose_candidate(store, names).name == fresh and looked == names, "once and for all"
    assert find_run(home).id == fresh and code_of(find_run, home, warm) == "NOT_CHOSEN" and [run.id for run in list_runs(home)] == [fresh]


def test_candidates_are_compared_when_all_of_them_are_trained(home, monkeypatch):
    names = finished_pair(home, monkeypatch)
    (home.runs / names[1] / "result.json").unlink()
    assert code_of(choose_candidate, type("Store", (), {"home": home})(), names) == "NOT_FINISHED" and list_runs(home) == []


@pytest.mark.slow
def test_two_candidates_are_trained_compared_and_one_is_left(tmp_path, monkeypatch):
    monkeypatch.setenv("DEERML_CACHE", str(tmp_path / "cache"))
    with yard(tmp_path / "yard", nights=8, image_size=96, base_model="tiny", epochs=2, batch=4) as store:
        freeze(store, at=datetime(2027, 1, 1, tzinfo=UTC))
        home = store.home

    def deerml(*words) -> dict:
        answer = CliRunner().invoke(app, [*words, "--home", str(home.path), "--json"])
        return json.loads(answer.stdout)

    assert deerml("train", "--candidates", "fresh,warm")["error"]["code"] == "NO_CHAMPION"
    first = deerml("train")
    deerml("adopt", str(home.runs / first["run"] / "last.pt"))
    (home.runs / first["run"] / "last.pt").unlink()
    told = deerml("train", "--candidates", "fresh,warm", "--epochs", "2")
    assert set(told["chosen"]["figures"]) == {f"{told['run'].rpartition('-')[0]}-{kind}" for kind in ("fresh", "warm")}, told
    loser = next(name for name in told["chosen"]["figures"] if name != told["run"])
    assert find_run(home).id == told["run"] and deerml("gate", "--run", loser)["error"]["code"] == "NOT_CHOSEN"
    warm = next(name for name in told["chosen"]["figures"] if name.endswith("warm"))
    recipe = json.loads((home.runs / warm / "training.json").read_bytes())["recipe"]
    assert Path(recipe["base"]).parent.name.endswith("adopted") and recipe["replay"] and recipe["epochs"] == 1


def test_a_run_that_only_the_remote_has_is_resumed_from_there_at_the_prompt(home, tmp_path):
    (tmp_path / "drive").mkdir()
    words = ["train", "--resume", "nobody", "--remote", str(tmp_path / "drive"), "--home", str(home.path), "--json"]
    assert json.loads(CliRunner().invoke(app, words).stdout)["error"]["code"] == "NOT_THERE"
    words[4] = str(tmp_path / "not mounted")
    assert json.loads(CliRunner().invoke(app, words).stdout)["error"]["code"] == "NO_REMOTE" and not list_jobs(home)
