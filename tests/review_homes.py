"""Homes with windows to review and a model that has looked, for the tests and measurements in a browser."""
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from deerml.capture.store import NewFrame, Store, add_camera, add_frames, record_inference
from deerml.core.box import Box
from deerml.core.clock import parse_time
from deerml.core.settings import Home
from deerml.model.bundle import Thresholds, seal, spot_draft, spot_model
from deerml.model.detector import Detection
from deerml.review.queue import close_night

NIGHT = "2026-11-03"
START = parse_time(f"{NIGHT}T17:00:00", "America/Chicago")
MARK = (255, 0, 255)  # RGB of what `marked` paints: nothing else in it has this colour


@dataclass(frozen=True)
class Shot:
    "A frame to be, and what the model has found on it"

    data: bytes
    found: Sequence[tuple[float, Box]] = ()  # scores and places
    window: int = 0  # of ten minutes each, from 17:00 on
    camera: str = "porch"


def scene(seed: int, width: int = 640, height: int = 360, noise: int = 12, quality: int = 88) -> bytes:
    "A JPEG with large shapes and fine noise, which decides how many bytes it has"
    random = np.random.default_rng(seed)
    coarse = cv2.resize(random.integers(20, 200, (6, 9, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    grain = cv2.randn(np.empty_like(coarse, np.int16), 0, noise) if noise else 0
    return cv2.imencode(".jpg", np.clip(coarse + grain, 0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def marked(width: int, height: int, box: Box, orientation: int = 1, seed: int = 0) -> bytes:
    "A grey JPEG with a rectangle at `box`, in pixels after turning; stored turned where `orientation` is 6"
    pixels = np.random.default_rng(seed).integers(60, 90, (height, width, 1), np.uint8).repeat(3, 2)
    x, y, wide, high = (int(value) for value in box.xywh)
    pixels[y:y + high, x:x + wide] = MARK
    stored = np.rot90(pixels, 1) if orientation == 6 else pixels  # whoever turns it clockwise sees it upright
    buffer, exif = BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(buffer, "JPEG", quality=95, subsampling=0, exif=exif)
    return buffer.getvalue()


def review_home(path: Path, shots: Iterable[Shot], **settings: object) -> Store:
    "A home whose one night is over and drawn: every window waits for a person"
    store = Store.open(Home.create(path, zone="America/Chicago", **settings))
    shots = list(shots)
    for camera in dict.fromkeys(shot.camera for shot in shots):
        add_camera(store, camera, camera.capitalize())
    counts: dict[tuple[str, int], int] = {}
    new = []
    for number, shot in enumerate(shots):
        place = counts[shot.camera, shot.window] = counts.get((shot.camera, shot.window), -1) + 1
        taken_at = START + timedelta(minutes=10 * shot.window, seconds=4 * place)
        new.append(NewFrame(shot.data, "test", str(number), camera=shot.camera, taken_at=taken_at, trigger="scheduled"))
    ids = add_frames(store, new)
    bundle = with_champion(store.home)
    record_inference(store, bundle, [(one, [Detection("deer", score, box) for score, box in shot.found], bool(shot.found)) for one, shot in zip(ids, shots)])
    close_night(store, NIGHT, bundle, budget=len(counts))
    return store


def with_champion(home: Home) -> str:
    "Deploys a model that finds nothing; its digest"
    candidate = home.path / "candidate.onnx"
    candidate.write_bytes(spot_model(["deer"]))
    bundle = seal(candidate, spot_draft(["deer"]), Thresholds(shared={"deer": 0.6}), "none", home.bundles)
    (home.models / "current").symlink_to(Path("bundles") / bundle.path.name)
    return bundle.digest


def windows(number: int, frames: int = 1, camera: str = "porch", **options: int) -> list[Shot]:
    "So many windows with so many frames, each with one alarm"
    found = [(0.8, Box(options.get("width", 640) * 0.3, 100, 120, 90))]
    return [Shot(scene(1000 * window + n, **options), found, window, camera) for window in range(number) for n in range(frames)]
