"""The tick: what is due is done once, by one, whatever fails and wherever it is killed; the units that call it; a training over the wire."""
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from shutil import which

import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from deerml.app import tick as room
from deerml.app.cli import app
from deerml.app.server import make_app
from deerml.app.tick import STEPS, Turn, judge_step, new_visits, read_memory, resume_step, tick, why_train
from deerml.app.training import list_jobs, prepare, recipe_for, request_run
from deerml.app.units import install_units, make_units
from deerml.app.trial import last_judgement
from deerml.capture.store import Store
from deerml.core.clock import now, stamp
from deerml.core.durable import folder_lock, write_file, write_json
from deerml.core.errors import DeermlError
from deerml.core.settings import Home
from deerml.data.manifest import list_versions
from deerml.data.shelf import POINTER
from deerml.model.bundle import spot_draft, spot_model
from deerml.review.queue import undrawn_nights
from deerml.train.export import Candidate
from deerml.train.recipe import RECORD
from deerml.train.runners import JOB, describe, write_begin
from yards import START, yard

ROOT = Path(__file__).resolve().parents[1]
AT = START + timedelta(days=21)
LEAVES = {"leave": "labelled", "people": "show"}


class Place:
    "A place that takes trainings and never does anything"

    name = "local"

    def __init__(self):
        self.submitted = []

    def submit(self, run):
        self.submitted.append(run.name)
        write_begin(run, self.name)
        return describe(run, True)


@pytest.fixture
def place(monkeypatch):
    found = Place()
    monkeypatch.setattr(room, "runner_for", lambda _name: found)
    monkeypatch.setattr("deerml.app.training_api.runner_for", lambda _name: found)
    return found


def small(path: Path, **settings) -> Store:
    return yard(path, nights=20, **{"base_model": "tiny", "epochs": 1, "image_size": 160} | settings)


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
    write_candidate(run / "candidate", version)
    write_json(run / "request.json", {"dataset": version.name, "recipe": {}, "asked_at": stamp(now())})
    write_json(run / "result.json", {"dataset": version.name, "finished_at": stamp(now()), "seconds": 1.0})
    return run


def write_candidate(folder: Path, version) -> None:
    from deerml.train import export
    write_json(folder / "candidate.json", json.loads(json.dumps(export_record(export, folder, version))))


def export_record(_export, folder: Path, version) -> dict:
    raise NotImplementedError
