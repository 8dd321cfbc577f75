"""What a person can get wrong: one clear error, a non-zero exit, and a home that is as it was."""
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sqlalchemy as sa
from PIL import Image
from typer.testing import CliRunner

from deerml.app.cli import app
from deerml.app.training import recipe_for, train_candidate
from deerml.capture.store import Store, frames
from deerml.core.errors import DeermlError
from deerml.core.settings import Home
from deerml.data.version import freeze
from deerml.model.bundle import Bundle, Thresholds, seal, spot_draft, spot_model
from yards import AFTER, picture, yard


def snapshot(folder: Path) -> dict[str, str]:
    "Every file of a home by its content; locks and the database's own bookkeeping apart"
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"}


def run(home: Path, *words: str) -> tuple[int, dict]:
    "A command of the line, asked for JSON; its exit code and answer"
    result = CliRunner().invoke(app, [*words, "--home", str(home), "--json"])
    return result.exit_code, json.loads(result.stdout)


def refused(home: Path, code: str, *words: str) -> dict:
    "The command fails with that code, says what to do, and changes nothing"
    before = snapshot(home)
    status, answer = run(home, *words)
    error = answer["error"]
    assert status != 0 and error["code"] == code, answer
    assert error["what"] and error["next_step"] and "Traceback" not in json.dumps(answer)
    assert snapshot(home) == before
    return error


@pytest.fixture
def home(tmp_path) -> Path:
    path = Home.create(tmp_path / "home").path
    Store.open(Home.open(path)).close()
    return path


def coco(folder: Path, **changes: object) -> Path:
    (folder / "images").mkdir(parents=True)
    for number in range(2):
        (folder / f"images/{number}.jpg").write_bytes(picture(number, True))
    document = {"images": [{"id": n, "file_name": f"images/{n}.jpg", "width": 160, "height": 96} for n in range(2)],
                "annotations": [{"id": n, "image_id": n, "category_id": 1, "bbox": [40, 30, 48, 32]} for n in range(2)], "categories": [{"id": 1, "name": "deer"}]}
    (folder / "annotations.json").write_text(json.dumps(document | changes))
    return folder


def box(*values: float) -> dict:
    return {"annotations": [{"id": 0, "image_id": 0, "category_id": 1, "bbox": list(values)}]}


def bomb() -> bytes:
    file = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(("name", "content"), [("empty", lambda good: b""), ("truncated", lambda good: good[: len(good) // 2]), ("text", lambda good: b"deer"), ("30000x30000", lambda good: bomb())])
def test_images_that_are_none(home, tmp_path, name, content):
    folder = coco(tmp_path / "photos")
    path = folder / "images/1.jpg"
    path.write_bytes(content(path.read_bytes()))
    error = refused(home, "BAD_IMAGE", "import", "coco", str(folder))
    assert "1.jpg" in error["what"]


@pytest.mark.parametrize(("change", "word"), [
    (box(0.1, 0.2, 0.3, 0.3), "shares of the image"), (box(140, 30, 60, 32), "beyond its image"), (box(10, 10, -5, 5), "not positive"), (box(10, 10, float("nan"), 5), "finite"),
    ({"categories": [{"id": 1, "name": "moose"}]}, "moose"), ({"images": [{"id": 0, "file_name": "images/none.jpg", "width": 160, "height": 96}]}, "missing"),
    ({"images": [{"id": 0, "file_name": f"images/{n}.jpg", "width": 160, "height": 96} for n in range(2)]}, "occurs 2 times"),
    ({"annotations": [{"id": 0, "image_id": 77, "category_id": 1, "bbox": [1, 1, 9, 9]}]}, "unknown image"),
])
def test_coco_files_that_are_wrong(home, tmp_path, change, word):
    error = refused(home, "BAD_COCO", "import", "coco", str(coco(tmp_path / "photos", **change)))
    assert word in error["why"]


def test_a_folder_that_is_none(home, tmp_path):
    refused(home, "NOT_A_FOLDER", "import", "coco", str(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("x")
    refused(home, "NOT_A_FOLDER", "import", "coco", str(tmp_path / "file"))
    status, answer = run(tmp_path, "prepare")
    assert (status, answer["error"]["code"]) == (1, "NO_HOME")


@pytest.mark.data
def test_boxes_that_all_cover_the_whole_frame(tmp_path, sample_data):
    source = sample_data / "bad_labels_fullframe"
    names = [category["name"] for category in json.loads((source / "annotations.json").read_text())["categories"]]
    path = Home.create(tmp_path / "home", classes=names).path
    assert run(path, "import", "coco", str(source))[0] == 0
    status, answer = run(path, "prepare")
    assert status == 1 and answer["error"]["code"] == "UNHEALTHY" and "cover their whole frame" in answer["error"]["why"]
    assert not list((path / "datasets").glob("v*"))
    status, answer = run(path, "prepare", "--force")
    assert status == 0 and json.loads((Path(answer["path"]) / "manifest.json").read_text())["forced"] is True


def test_nothing_to_learn(home, tmp_path):
    error = refused_after_ledger(home, "UNHEALTHY", "prepare")
    assert "nothing to learn" in error["why"]
    refused(home, "NO_DATASET", "train")
    refused(home, "NO_RUN", "gate")


def refused_after_ledger(home: Path, code: str, *words: str) -> dict:
    "As `refused`, for a step that may note the nights it has seen"
    before = {name: content for name, content in snapshot(home).items() if not name.startswith("deerml.db")}
    status, answer = run(home, *words)
    assert status != 0 and answer["error"]["code"] == code, answer
    assert {name: content for name, content in snapshot(home).items() if not name.startswith("deerml.db")} == before
    return answer["error"]


def test_a_class_that_occurs_nowhere(tmp_path):
    with yard(tmp_path / "yard") as store:
        freeze(store, at=AFTER)
    home = Home(tmp_path / "yard", store.home.settings.model_copy(update={"classes": ["deer", "fox"]}))
    with Store.open(home) as store, pytest.raises(DeermlError) as caught:
        freeze(store, at=AFTER)
    assert caught.value.code == "UNHEALTHY"


def test_training_on_a_full_disk_says_so(tmp_path, monkeypatch):
    with yard(tmp_path / "yard", image_size=96, base_model="tiny") as store:
        freeze(store, at=AFTER)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type(usage)(usage.total, usage.total, 2**20))
    with pytest.raises(DeermlError) as caught:
        train_candidate(store.home, recipe_for(store.home, epochs=1))
    assert caught.value.code == "NO_SPACE"


def test_a_home_made_by_a_newer_deerml(home):
    with Store.open(Home.open(home)) as store, store.write() as connection:
        connection.execute(sa.text("update alembic_version set version_num = 'r9999'"))
    refused(home, "NEWER_HOME", "prepare")
    settings = home / "deerml.toml"
    settings.write_text(settings.read_text().replace("schema_version = 1", "schema_version = 99"))
    refused(home, "NEWER_HOME", "prepare")


def test_bundles_that_are_not_what_they_say(tmp_path):
    model = tmp_path / "model.onnx"
    model.write_bytes(spot_model(["deer"]))
    bundle = seal(model, spot_draft(["deer"]), Thresholds(shared={"deer": 0.5}), "none", tmp_path / "bundles")
    with pytest.raises(DeermlError) as caught:
        Bundle.load(bundle.path, expect_classes=["fox"])
    assert caught.value.code == "WRONG_CLASSES"
    with pytest.raises(DeermlError) as caught:
        seal(model, spot_draft(["deer", "fox"]), Thresholds(shared={"deer": 0.5, "fox": 0.5}), "none", tmp_path / "bundles")
    assert caught.value.code in ("WRONG_CLASSES", "WRONG_SHAPE", "BAD_BUNDLE")


def test_ctrl_c_in_the_middle_of_an_import(home, tmp_path):
    "Interrupted at many moments: all of it or nothing, and it can be run again"
    folder = tmp_path / "photos"
    (folder / "images").mkdir(parents=True)
    for number in range(150):
        (folder / f"images/{number}.jpg").write_bytes(picture(number))
    images = [{"id": n, "file_name": f"images/{n}.jpg", "width": 160, "height": 96} for n in range(150)]
    (folder / "annotations.json").write_text(json.dumps({"images": images, "annotations": [], "categories": [{"id": 1, "name": "deer"}]}))
    command = [sys.executable, "-c", "from deerml.app.cli import main; main()", "import", "coco", str(folder), "--absent", "deer", "--home", str(home)]
    counts = set()
    for seconds in (1.2, 1.5, 1.8, 2.1):
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])})
        time.sleep(seconds)
        child.send_signal(signal.SIGINT)
        _, complaint = child.communicate(timeout=60)
        assert child.returncode in (0, 130, -signal.SIGINT) and "sqlalchemy" not in complaint, complaint
        with Store.open(Home.open(home)) as store:
            counts.add(len(frames(store)))
    assert counts <= {0, 150}
    status, answer = run(home, "import", "coco", str(folder), "--absent", "deer")
    assert status == 0 and answer["empty"] == 150
    assert run(home, "verify", "--remove-orphans")[1]["whole"]
