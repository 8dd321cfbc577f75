"""JPEG bytes in, boxes out: deerml's Detector beside Ultralytics' predict and beside the least that any detector does.

    python benchmarks/detect.py

One thread, the same network, the same rectangle, interleaved; medians. Needs `deerml[train]`.
The network is a YOLO26n, the default base on a CPU, with random weights: its time does not depend on what it learned.
"""
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median

os.environ["OMP_NUM_THREADS"] = "1"  # OpenMP reads it when torch loads it

import cv2
import numpy as np

from deerml.core.box import iou_matrix
from deerml.model.bundle import Bundle, Input, Output, ServingDraft, Thresholds, seal
from deerml.model.detector import Detector, decode, preprocess
from deerml.train.checkpoint import quiet_ultralytics

SIZES = {320: 1.5, 640: 1.15}  # pixels -> how many times faster than predict it should be
OVER_FLOOR = 1.10  # decoding and the network alone, plus a tenth
IMAGES, ROUNDS = 16, 6
CLASSES = ["deer"]


def scene(random: np.random.Generator, height: int = 360, width: int = 640) -> np.ndarray:
    "A picture with structure at several scales, BGR"
    coarse = random.integers(0, 255, (height // 16 + 1, width // 16 + 1, 3)).astype(np.uint8)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(6):
        centre = int(random.integers(width)), int(random.integers(height))
        axes = int(random.integers(8, width // 4)), int(random.integers(8, height // 4))
        colour = tuple(map(int, random.integers(0, 255, 3)))
        cv2.ellipse(image, centre, axes, int(random.integers(180)), 0, 360, colour, -1)
    noise = random.normal(0, 6, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def random_yolo(
    folder: Path,
    name: str = "yolo26n",
    classes: list[str] = CLASSES,
    spread: float = 1.3,  # of the last weights: decides how many boxes there are, here a few in an image
) -> Path:
    "A checkpoint whose layers are normalised to pictures, so that scores and boxes differ from place to place"
    quiet_ultralytics()
    import torch
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(1)
    random = np.random.default_rng(0)
    network = DetectionModel(f"{name}.yaml", nc=len(classes), verbose=False).train()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.5
    with torch.no_grad():
        for _ in range(4):
            pictures = np.stack([scene(random, 160, 160) for _ in range(2)])
            network.predict(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255)
        for part in ("cv3", "one2one_cv3"):
            for branch in getattr(network.model[-1], part, None) or []:
                branch[-1].weight.normal_(0, spread)
                branch[-1].bias.fill_(-4)
    network.names, network.args = dict(enumerate(classes)), {}
    path = folder / f"{name}.pt"
    torch.save({"model": network.eval(), "train_args": {}, "epoch": -1}, path)
    return path


def exported(checkpoint: Path, size: int, **options) -> Path:
    from ultralytics import YOLO
    return Path(YOLO(checkpoint).export(format="onnx", imgsz=size, verbose=False, **{"dynamic": True, **options}))


def bundle_of(checkpoint: Path, folder: Path, size: int) -> Bundle:
    draft = ServingDraft(classes=CLASSES, input=Input(size=size), output=Output(kind="raw"))
    return seal(exported(checkpoint, size), draft, Thresholds(shared={"deer": 0.5}), "none", folder / "bundles")


def contenders(checkpoint: Path, bundle: Bundle) -> dict:
    "Functions from JPEG bytes to boxes; the floor stops at the network's answer"
    import onnxruntime
    from ultralytics import YOLO

    size = bundle.serving.input.size
    detector, peer = Detector(bundle, threads=1), YOLO(checkpoint)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(bundle.model(), options, providers=["CPUExecutionProvider"])
    tensor = preprocess(scene(np.random.default_rng(0)), bundle.serving)[0][None]

    def ours(data: bytes) -> np.ndarray:
        return np.array([(*found.box.xyxy, found.score) for found in detector(decode(data))]).reshape(-1, 5)

    def predict(data: bytes) -> np.ndarray:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        answer = peer.predict(image, imgsz=size, conf=0.05, iou=0.7, max_det=100, device="cpu", verbose=False)
        return answer[0].boxes.data.numpy()[:, :5]

    def floor(data: bytes) -> None:
        cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        session.run(None, {"images": tensor})

    return {"ours": ours, "peer": predict, "floor": floor}


def same_boxes(ours: np.ndarray, theirs: np.ndarray) -> bool:
    "Box for box in the same order, IoU above 0.99 and scores within 0.001"
    if len(ours) != len(theirs):
        return False
    first, second = (np.concatenate((found[:, :2], found[:, 2:4] - found[:, :2]), 1) for found in (ours, theirs))
    return bool((np.diag(iou_matrix(first, second)) > 0.99).all() and (abs(ours[:, 4] - theirs[:, 4]) < 1e-3).all())


def measure(size: int, checkpoint: Path, folder: Path) -> list[dict]:
    import torch

    random = np.random.default_rng(7)
    photos = [cv2.imencode(".jpg", scene(random), [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes() for _ in range(IMAGES)]
    runners = contenders(checkpoint, bundle_of(checkpoint, folder, size))
    times, agreed, boxes = {name: [] for name in runners}, 0, 0
    for photo in photos:  # also warms everything up
        answer = runners["ours"](photo)
        boxes, agreed = boxes + len(answer), agreed + same_boxes(answer, runners["peer"](photo))
        runners["floor"](photo)
    torch.set_num_threads(1)  # predict chose its own number when it was first called
    cv2.setNumThreads(1)
    order = list(runners)
    for _ in range(ROUNDS):
        for photo in photos:
            order.append(order.pop(0))  # none of them always comes after the same other one
            for name in order:
                start = time.perf_counter()
                runners[name](photo)
                times[name].append(1000 * (time.perf_counter() - start))
    ours, peer, floor = (median(times[name]) for name in ("ours", "peer", "floor"))
    note = f"same boxes on {agreed} of {IMAGES} images ({boxes} boxes), {len(photos[0]) // 1000} kB a JPEG"
    return [
        row(f"detect at {size} px", ours, peer, "Ultralytics predict(.pt)", floor, peer / ours, SIZES[size],
            peer / ours >= SIZES[size] and agreed == IMAGES and boxes > 0, note),
        row(f"detect at {size} px, over the floor", ours, None, "", floor, ours / floor, OVER_FLOOR,
            ours / floor <= OVER_FLOOR, "floor: cv2.imdecode and ONNX Runtime alone; no peer, it is a floor"),
    ]


def row(name, ours, peer, peer_name, floor, ratio, target, ok, note) -> dict:
    ours, floor, peer = round(ours, 2), round(floor, 2), peer and round(peer, 2)
    return {"name": name, "ours": ours, "peer": peer, "peer_name": peer_name, "floor": floor, "ratio": round(ratio, 3),
            "target": target, "ok": bool(ok), "unit": "ms", "note": note}


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["YOLO_CONFIG_DIR"] = name
        checkpoint = random_yolo(folder)
        rows = [line for size in SIZES for line in measure(size, checkpoint, folder)]
    print(f"{'':34}{'ours':>8}{'peer':>8}{'floor':>8}{'ratio':>8}{'target':>8}")
    for line in rows:
        peer = f"{line['peer']:8.2f}" if line["peer"] else f"{'-':>8}"
        figures = f"{line['floor']:8.2f}{line['ratio']:8.2f}{line['target']:8.2f}"
        print(f"{line['name']:34}{line['ours']:8.2f}{peer}{figures}  {'ok' if line['ok'] else 'MISSED'}")
    print("\n".join(f"{line['name']}: {line['note']}" for line in rows))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
