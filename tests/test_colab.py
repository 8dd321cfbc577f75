"""The notebooks that people open on Colab run as papermill runs them, on small folders of photographs."""
import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
from execnb.nbio import read_nb, write_nb

from deerml.capture.store import frames
from deerml.capture.truth import FrameStatement, record
from deerml.data.packs import make_review_pack, open_newest_review, push_review_pack, waiting_windows
from deerml.data.remote import FolderRemote
from deerml.data.verdicts import merge_verdicts
from deerml.model.bundle import champion
from deerml.review.queue import close_night
from yards import SPOT, START, picture, yard

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_training_notebook_runs_from_photographs_to_a_judged_model(tmp_path):
    papermill = pytest.importorskip("papermill")
    notebook = ROOT / "colab" / "train.ipynb"
    photos = tmp_path / "photos"
    (photos / "images").mkdir(parents=True)
    for number in range(40):
        (photos / f"images/{number}.jpg").write_bytes(picture(number, number < 30))
    images = [{"id": n, "file_name": f"images/{n}.jpg", "width": 160, "height": 96} for n in range(40)]
    boxes = [{"id": n, "image_id": n, "category_id": 1, "bbox": list(SPOT.xywh)} for n in range(30)]
    (photos / "annotations.json").write_text(json.dumps({"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "deer"}]}))
    asked = {"photos": str(photos), "base": "tiny", "epochs": 2, "image_size": 96, "home": str(tmp_path / "yard")}
    done = papermill.execute_notebook(notebook, tmp_path / "done.ipynb", asked, progress_bar=False, cwd=tmp_path)
    said = "".join("".join(output.get("text", "")) for cell in done.cells for output in cell.get("outputs", []))
    assert "30 with boxes, 10 empty" in said and "The model:" in said
    assert (tmp_path / "yard/reports/judgement.html").is_file()


def run_review(folder: Path, asked: dict[str, object]) -> tuple[str, int]:  # what it printed, and how many pictures it shows
    "The review notebook under papermill; without its widget where this deerml has none"
    papermill = pytest.importorskip("papermill")
    pytest.importorskip("matplotlib")
    notebook = read_nb(ROOT / "colab/review.ipynb")
    if find_spec("deerml.review.widget") is None:
        notebook.cells = [cell for cell in notebook.cells if "review" not in cell.get("metadata", {}).get("tags", [])]
    write_nb(notebook, folder / "review.ipynb")
    done = papermill.execute_notebook(folder / "review.ipynb", folder / "done.ipynb", {"reviewer": "ann", **asked}, progress_bar=False, cwd=folder, kernel_name="python3")
    outputs = [output for cell in done.cells for output in cell.get("outputs", [])]
    return "".join("".join(output.get("text", "")) for output in outputs), sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.fixture
def reviewed(tmp_path, monkeypatch):
    "A yard of two nights, the second of them drawn and not reviewed, that lets packs go to a folder"
    monkeypatch.delenv("DEERML_HOME", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)  # the kernel must find this deerml, and must not install another
    (tmp_path / "drive").mkdir()
    store = yard(tmp_path / "yard", nights=2, review_remote=str(tmp_path / "drive"), people="show")
    close_night(store, START.date().isoformat(), None)
    yield store
    store.close()


def test_the_review_notebook_works_on_the_home_where_there_is_one(reviewed, tmp_path):
    said, pictures = run_review(tmp_path, {"home": str(reviewed.home.path), "shared_folder": ""})
    assert "This is the server's home" in said and "No model acts yet" in said and pictures == 2
    assert "stored already" in said


def test_the_review_notebook_works_on_a_pack_elsewhere_and_sends_the_verdicts(reviewed, tmp_path):
    drive, work = FolderRemote(tmp_path / "drive"), tmp_path / "elsewhere"
    push_review_pack(reviewed, make_review_pack(reviewed, waiting_windows(reviewed), champion(reviewed.home)), drive)
    work.mkdir()
    with open_newest_review(drive, work / "review") as away:
        record(away, "ann", [FrameStatement(frames(away)[0].id, "nothing_here", ("deer",))])
    said, pictures = run_review(work, {"shared_folder": str(tmp_path / "drive")})
    assert "This is a copy from the review pack" in said and "Sent: 1 review event." in said and pictures == 2
    assert merge_verdicts(reviewed, drive).events == 1


def test_the_review_notebook_holds_no_secret_and_no_logic():
    cells = [cell.source for cell in read_nb(ROOT / "colab/review.ipynb").cells if cell.cell_type == "code"]
    code = "\n".join(cells)
    assert not any(word in code.lower() for word in ("token", "password", "secret", "api_key"))
    assert not any(word in code for word in ("def ", "for ", "while ", "class ", "lambda"))
