"""Trainings that are killed at any moment go on and end as if nothing had happened."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deerml.core.settings import Home
from deerml.train.copies import spot_dataset
from deerml.train.export import load_candidate

ROOT = Path(__file__).resolve().parents[1]
EPOCHS = 4

SMALLEST = """
nc: 1
reg_max: 4
backbone: [[-1, 1, Conv, [8, 3, 2]], [-1, 1, Conv, [16, 3, 2]], [-1, 1, Conv, [16, 3, 2]], [-1, 1, Conv, [24, 3, 2]]]
head: [[[2, 3], 1, Detect, [nc]]]
"""

# One process imports PyTorch; every training is a fork of it, which begins at once. A kill hits anything from the first
# file to the last: the requests, the copies, the epochs, the checkpoints, the export, the result.
KILLER = """
import json, os, random, signal, sys, time, traceback
from pathlib import Path
from deerml.app.training import carry_out, request_run
from deerml.core.settings import Home
from deerml.train import export, session
from deerml.train.recipe import Recipe
home, kills, chance = Home.open(Path(sys.argv[1])), int(sys.argv[2]), random.Random(sys.argv[3])
recipe = Recipe(sys.argv[5], preset="tiny", image_size=96, epochs=int(sys.argv[4]), batch=4, validate=True, reserve_mb=10, threads=1)
session.preload()
import onnxslim, torch.onnx, ultralytics.engine.exporter  # noqa: E401: what an export would import
session.CHECKPOINT_S = 0.0

def begin(name):
    pid = os.fork()
    if pid:
        return pid
    try:
        carry_out(home, name)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)

def told(name):
    path = home.runs / name
    rows = (path / "results.csv").read_text().count("\\n") - 1 if (path / "results.csv").exists() else 0
    return [rows, sorted(one.name for one in path.iterdir() if one.suffix in (".pt", ".json"))]

request_run(home, recipe, name="whole")
started = time.monotonic()
assert os.waitpid(begin("whole"), 0)[1] == 0
lasts = time.monotonic() - started
done = 0
while done < kills:
    name = f"killed-{done}"
    (home.runs / name).exists() or request_run(home, recipe, name=name)
    victim = begin(name)
    time.sleep((done + chance.random()) / kills * lasts)
    os.kill(victim, signal.SIGKILL)
    if os.WIFEXITED(os.waitpid(victim, 0)[1]):
        lasts *= 0.9  # it was quicker than the first one: nothing was killed
        (home.runs / name).rename(home.runs / f"spared-{time.monotonic_ns()}")
        continue
    print(json.dumps(told(name)), flush=True)
    assert os.waitpid(begin(name), 0)[1] == 0
    done += 1
"""


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_training_that_is_killed_at_a_random_moment_ends_like_any_other(tmp_path, kills):
    home = Home.create(tmp_path / "yard", classes=["spot"], image_size=96)
    spot_dataset(home.datasets / "v0001", train=8, val=4)
    model = tmp_path / "smallest.yaml"
    model.write_text(SMALLEST)
    environ = os.environ | {"PYTHONPATH": str(ROOT), "DEERML_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    seed = os.environ.get("PYTEST_XDIST_TESTRUNUID", "") + str(os.getpid())  # other moments in every run; it is shown when one fails
    ran = subprocess.run([sys.executable, "-c", KILLER, str(home.path), str(kills), seed, str(EPOCHS), str(model)], env=environ, capture_output=True, text=True, timeout=60 + 30 * kills)
    assert ran.returncode == 0, f"seed {seed}\n{ran.stdout}\n{ran.stderr[-4000:]}"
    moments = ran.stdout.splitlines()
    assert len(moments) == kills
    whole = load_candidate(home.runs / "whole/candidate")
    for number, moment in enumerate(moments):
        run = home.runs / f"killed-{number}"
        record = json.loads((run / "training.json").read_bytes())
        epochs = [row.split(",")[0] for row in (run / "results.csv").read_text().splitlines()[1:]]
        assert record["state"] == "finished" and epochs == [str(epoch + 1) for epoch in range(EPOCHS)], (seed, moment)
        assert load_candidate(run / "candidate").serving == whole.serving and (run / "result.json").is_file(), (seed, moment)
        assert not [path for path in run.iterdir() if path.name.endswith((".tmp", ".old"))] and not (run / "data").exists(), (seed, moment)
