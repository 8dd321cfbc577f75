"""The detector beside its peers (torchvision, Ultralytics, Pillow) and under strain."""
import importlib.util
import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from deerml.core.box import iou_matrix
from deerml.core.errors import DeermlError
from deerml.model.bundle import Candidate, Input, Output, ServingDraft, spot_draft, spot_model
from deerml.model.detector import Detector, decode, suppress

with_ultralytics = pytest.mark.skipif(importlib.util.find_spec("ultralytics") is None, reason="ultralytics is absent")
ROOT = Path(__file__).resolve().parents[1]
CLASSES = ["deer", "fox"]
SHAPES = [(360, 640), (480, 640), (640, 360), (100, 333), (320, 320), (1080, 1920), (361, 639)]


def test_serving_needs_no_torch():
    program = "import sys, deerml.model.detector; print({'torch', 'ultralytics', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"


def test_the_runtime_reports_to_nobody(tmp_path):
    environ = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environ |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", "import deerml.model.detector"], check=True, cwd=ROOT, env=environ)
    assert not list(tmp_path.rglob("*onnxruntime*")), "ONNX Runtime keeps what it means to send"


# -- decoding -----------------------------------------------------------------------------------------------------

def photo(format: str, **options) -> bytes:
    random = np.random.default_rng(3)
    small = random.integers(0, 256, (9, 16, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(cv2.resize(small, (160, 90), interpolation=cv2.INTER_CUBIC)).save(file, format, **options)
    return file.getvalue()


KINDS = {
    "jpeg": ("JPEG", {}), "progressive": ("JPEG", {"progressive": True}),
    "restarts": ("JPEG", {"restart_marker_rows": 1}), "png": ("PNG", {}),
    "webp": ("WEBP", {}), "lossless": ("WEBP", {"lossless": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_truncation_is_refused(kind, request):
    format, options = KINDS[kind]
    whole = photo(format, **options)
    step = 1 if request.config.getoption("--slow") else 7
    for length in (*range(0, len(whole), step), len(whole) - 1):
        with pytest.raises(DeermlError) as caught:
            decode(whole[:length])
        assert caught.value.code == "BAD_IMAGE" and caught.value.next_step
    assert decode(whole + b"\xff\xd8\xff notes").shape == (90, 160, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_damage_gives_pixels_or_a_refusal(kind):
    format, options = KINDS[kind]
    whole, random = photo(format, **options), np.random.default_rng(4)
    for _ in range(300):
        broken = bytearray(whole)
        for place in random.integers(0, len(whole), 3):
            broken[place] = random.integers(256)
        try:
            pixels = decode(bytes(broken))
        except DeermlError as error:
            assert error.code == "BAD_IMAGE"
        else:
            assert pixels.dtype == np.uint8 and pixels.ndim == 3


@pytest.mark.data
def test_real_photographs_decode_as_opencv_does(sample_data):
    paths = sorted(path for path in sample_data.rglob("*") if path.suffix.lower() in (".jpg", ".png"))[::4]
    assert len(paths) > 50
    for path in paths:
        data = path.read_bytes()
        assert (decode(data) == cv2.imread(str(path))).all(), path
        with pytest.raises(DeermlError):
            decode(data[:-1])


# -- suppression --------------------------------------------------------------------------------------------------

def test_suppression_is_that_of_torchvision():
    torch, torchvision = pytest.importorskip("torch"), pytest.importorskip("torchvision")
    random = np.random.default_rng(0)
    for turn in range(100):
        count = int(random.integers(1, 400))
        corner = random.uniform(0, 200, (count, 2))
        corners = np.concatenate((corner, corner + random.uniform(0, 80, (count, 2))), 1).astype(np.float32)
        if turn % 3 == 0:
            corners = np.round(corners / 8) * 8  # many equal boxes, many without an area, overlaps of exactly the limit
        scores = np.round(random.uniform(0, 1, count), turn % 4 + 1).astype(np.float32)  # many ties
        classes, limit = random.integers(0, 3, count), float(random.choice([0.3, 0.5, 0.7]))
        shifted = torch.from_numpy(corners + classes[:, None].astype(np.float32) * 7680)
        wanted = torchvision.ops.nms(shifted, torch.from_numpy(scores), limit)
        assert suppress(corners, scores, classes, limit, 10**6) == wanted.tolist()
        assert suppress(corners, scores, classes, limit, 5) == wanted.tolist()[:5]


def test_a_model_gone_mad_costs_milliseconds():
    random = np.random.default_rng(0)
    corner = random.uniform(0, 2000, (90_000, 2)).astype(np.float32)
    corners = np.concatenate((corner, corner + 5), 1)
    kept = suppress(corners, random.uniform(0, 1, 90_000).astype(np.float32), np.zeros(90_000, int), 0.7, 100)
    assert len(kept) == 100


# -- beside Ultralytics -------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("yolo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEERML_CACHE", str(folder))
        yield folder


def pictures() -> list[np.ndarray]:
    from benchmarks.detect import scene
    random = np.random.default_rng(5)
    return [scene(random, *shape) for shape in SHAPES]


def peer_and_ours(folder, name, *, size=320, rect=True, kind="raw", dynamic=True):
    "Ultralytics' predict as an array [N, 6], and a Detector of the same checkpoint"
    from benchmarks.detect import exported, random_yolo
    from deerml.train.checkpoint import quiet_ultralytics
    quiet_ultralytics()
    from ultralytics import YOLO

    options = {"nms": False} if kind == "end2end" else {}
    settings = {"imgsz": size, "conf": 0.05, "iou": 0.7, "max_det": 100, "rect": rect, "device": "cpu", **options}
    checkpoint = folder / f"{name}.pt"
    if not checkpoint.exists():
        random_yolo(folder, name, CLASSES, spread=1.5)
    model = exported(checkpoint, size, dynamic=dynamic, **options)
    draft = ServingDraft(classes=CLASSES, input=Input(size=size, rect=rect), output=Output(kind=kind))
    yolo = YOLO(checkpoint)

    def predict(image):
        return yolo.predict(image, verbose=False, **settings)[0].boxes.data.numpy()

    return predict, Detector(Candidate(model, draft), threads=1)


def agree(theirs: np.ndarray, ours: list) -> None:
    theirs = theirs[(theirs[:, 2:4] > theirs[:, :2]).all(1)]  # in the padding Ultralytics keeps boxes without an area
    assert len(theirs) == len(ours)
    if len(ours):
        sizes = np.concatenate((theirs[:, :2], theirs[:, 2:4] - theirs[:, :2]), 1)
        assert np.diag(iou_matrix(sizes, np.array([found.box.xywh for found in ours]))).min() > 0.99
        assert abs(theirs[:, 4] - [found.score for found in ours]).max() < 1e-3
        assert [CLASSES[int(label)] for label in theirs[:, 5]] == [found.label for found in ours]


@with_ultralytics
@pytest.mark.parametrize("name, kind, rect", [
    ("yolov8n", "raw", True), ("yolo26n", "end2end", True),
    pytest.param("yolov8n", "raw", False, marks=pytest.mark.slow),
    pytest.param("yolo26n", "raw", True, marks=pytest.mark.slow),
    pytest.param("yolo11n", "raw", True, marks=pytest.mark.slow),
])
def test_the_boxes_are_those_of_ultralytics(folder, name, kind, rect):
    predict, detector = peer_and_ours(folder, name, kind=kind, rect=rect)
    total = 0
    for picture in pictures():
        theirs, ours = predict(picture), detector(picture)
        agree(theirs, ours)
        total += len(ours)
    assert total > 100  # an agreement on nothing would prove nothing
    singles, together = [detector(picture) for picture in pictures()], detector.batch([*pictures(), *pictures()])
    for single, first, second in zip(singles, together, together[len(SHAPES):]):
        assert len(single) == len(first) == len(second)
        assert np.allclose([found.score for found in single], [found.score for found in first], atol=1e-4)


@with_ultralytics
def test_a_model_of_one_fixed_shape_serves_squares(folder):
    predict, detector = peer_and_ours(folder, "yolov8n", size=160, rect=False, dynamic=False)
    for picture in pictures():
        agree(predict(picture), detector(picture))
    assert [len(found) for found in detector.batch(pictures())] == [len(detector(picture)) for picture in pictures()]


@with_ultralytics
@pytest.mark.data
def test_the_boxes_are_those_of_ultralytics_on_photographs(folder, sample_data):
    predict, detector = peer_and_ours(folder, "yolov8n")
    for path in sorted((sample_data / "carpathia_traps" / "images").iterdir()):
        image = decode(path.read_bytes())
        agree(predict(image), detector(image))


# -- strain -------------------------------------------------------------------------------------------------------

def test_threads_share_a_detector(tmp_path):
    (tmp_path / "model.onnx").write_bytes(spot_model(["deer"]))
    detector = Detector(Candidate(tmp_path / "model.onnx", spot_draft(["deer"])), threads=1)
    images = []
    for place in range(8):
        image = np.full((360, 640, 3), 30, np.uint8)
        cv2.ellipse(image, (80 + 60 * place, 180), (50, 33), 0, 0, 360, (230, 230, 230), -1)
        images.append(image)
    wanted = [detector(image) for image in images]
    assert all(len(found) >= 1 for found in wanted)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            assert list(pool.map(detector, images)) == wanted


def test_boxes_are_inside_the_image_and_sorted(tmp_path):
    (tmp_path / "model.onnx").write_bytes(spot_model(["red", "green", "blue"]))
    draft = spot_draft(["red", "green", "blue"])
    detector = Detector(Candidate(tmp_path / "model.onnx", draft), threads=1)
    random, total = np.random.default_rng(0), 0
    for _ in range(60):
        high, wide = (int(side) for side in random.integers(20, 900, 2))
        coarse = random.integers(0, 256, (high // 60 + 1, wide // 60 + 1, 3)).astype(np.uint8)
        found = detector(cv2.resize(coarse, (wide, high), interpolation=cv2.INTER_NEAREST))
        total += len(found)
        scores = [detection.score for detection in found]
        assert scores == sorted(scores, reverse=True) and all(score >= draft.keep_score for score in scores)
        for detection in found:
            left, top, right, bottom = detection.box.xyxy
            assert 0 <= left < right <= wide and 0 <= top < bottom <= high
    assert total > 50
