"""A small reviewed yard, made in a second, for the tests of several rooms."""
import itertools
from datetime import timedelta
from pathlib import Path

import cv2
import numpy as np

from deerml.capture.store import NewFrame, Store, add_frames
from deerml.capture.truth import BoxVerdict, FrameStatement, record
from deerml.core.box import Box
from deerml.core.clock import parse_time
from deerml.core.settings import Home

START = parse_time("2026-09-01T22:00:00Z")
SPOT = Box(40, 30, 48, 32)  # where `picture` puts its animal, pixels
AFTER = START + timedelta(days=365)


def picture(seed: int, animal: bool = False, colour: tuple[int, int, int] = (250, 250, 250)) -> bytes:
    "A dark JPEG of 160 x 96 pixels, with a bright rectangle for an animal"
    pixels = np.random.default_rng(seed).integers(0, 40, (96, 160, 3)).astype(np.uint8)
    if animal:
        pixels[30:62, 40:88] = colour
    return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()


def yard(path: Path, nights: int = 20, cameras: tuple[str, ...] = ("gate",), **settings: object) -> Store:
    """Every night and camera has six frames: two with an animal, two verified empty, one with a drawn box that nobody
    completed (in progress), one that nobody looked at (unreviewed)."""
    store = Store.open(Home.create(path, **settings))
    new, said = [], []
    for night, (number, camera), n in itertools.product(range(nights), enumerate(cameras), range(6)):
        data, taken_at = picture(1000 * night + 100 * number + n, n < 2), START + timedelta(days=night, minutes=5 * n)
        new.append(NewFrame(data, "test", f"{camera}/{night}/{n}", camera=camera, taken_at=taken_at, trigger="scheduled"))
    for frame_id, name in zip(add_frames(store, new), (one.external_id for one in new)):
        n = int(name[-1])
        boxes = [BoxVerdict(frame_id, "missed", "deer", SPOT, operation_id=f"{name}/box")] if n in (0, 1, 4) else []
        words = [FrameStatement(frame_id, "all_boxed" if boxes else "nothing_here", ("deer",), operation_id=f"{name}/word")] if n < 4 else []
        said += [*boxes, *words]
    record(store, "ann", said)
    return store


BLOB = Box(40, 32, 26, 18)  # an animal of the size that `spot_model` looks for, pixels


def blob(seed: int, brightness: int) -> bytes:
    "The same dark picture, with something as bright as this at `BLOB`; 0 for nothing"
    pixels = np.random.default_rng(seed).integers(0, 40, (96, 160, 3)).astype(np.uint8)
    if brightness:
        pixels[32:50, 40:66] = brightness
    return cv2.imencode(".png", pixels)[1].tobytes()


def replay_yard(path: Path, nights: int = 3, pattern: tuple[int, ...] = (250, 215, 0, 0), **settings: object) -> Store:
    "One camera; in every night a frame each half hour, as bright as the pattern says. Nobody has reviewed anything."
    store = Store.open(Home.create(path, **settings))
    add_frames(store, [
        NewFrame(blob(100 * night + n, brightness), "test", f"{night}/{n}", camera="gate", taken_at=START + timedelta(days=night, minutes=30 * n), trigger="scheduled")
        for night in range(nights) for n, brightness in enumerate(pattern)])
    return store


def spot_bundle(store: Store, threshold: float = 0.5, classes: tuple[str, ...] = ("deer",), size: int = 320):
    "A detector of bright spots. One with a threshold of 0.8 does not act on a brightness of 215; the other acts on both."
    from deerml.model.bundle import Input, Thresholds, seal, spot_draft, spot_model
    model = store.home.path / "spot.onnx"
    model.write_bytes(spot_model(list(classes)))
    draft = spot_draft(list(classes)).model_copy(update={"input": Input(size=size)})
    return seal(model, draft, Thresholds(shared=dict.fromkeys(classes, threshold)), "none", store.home.bundles)


def say_what_is_there(store: Store, frame_ids=None, animal_from: int = 100, reviewer: str = "ann") -> None:
    "Complete truth for frames of a `replay_yard`: whatever is bright is an animal"
    from deerml.capture.store import frames, image_bytes
    for frame in frames(store):
        if frame_ids is not None and frame.id not in frame_ids:
            continue
        pixels = cv2.imdecode(np.frombuffer(image_bytes(store, frame), np.uint8), cv2.IMREAD_COLOR)
        said = [BoxVerdict(frame.id, "missed", "deer", BLOB)] if pixels[41, 53].mean() >= animal_from else []
        record(store, reviewer, [*said, FrameStatement(frame.id, "all_boxed" if said else "nothing_here", ("deer",))])
