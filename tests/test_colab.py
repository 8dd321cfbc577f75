"""The notebook that people open on Colab runs as papermill runs it, on a small folder of photographs."""
import json
from pathlib import Path

import pytest

from yards import SPOT, picture


@pytest.mark.slow
def test_the_training_notebook_runs_from_photographs_to_a_judged_model(tmp_path):
    papermill = pytest.importorskip("papermill")
    notebook = Path(__file__).resolve().parents[1] / "colab" / "train.ipynb"
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
