"""A replay of stored frames against the bare detector on the same frames, and a second replay against the first.

    python benchmarks/replay.py                    # 600 frames of 640x360 in six nights, two models
    python benchmarks/replay.py --frames 10000     # what the target speaks of

The floor reads each file, decodes it and asks the serving `Detector`, for both models, and keeps nothing. A replay does
the same and keeps what was seen, batch by batch, draws what is to be asked, and writes it down. Night by night one runs
after the other, so that a machine that others use slows down both; the ratio is the median of the nights.
The networks are two YOLO26n with random weights: their time does not depend on what they learned.
"""
import argparse
import json
import os
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from statistics import median

import cv2
import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from detect import CLASSES, bundle_of, random_yolo, scene  # noqa: E402

from deerml.capture.store import Frame, NewFrame, Store, add_frames, frames, image_bytes  # noqa: E402
from deerml.core.clock import parse_time  # noqa: E402
from deerml.core.settings import Home  # noqa: E402
from deerml.judge.collect import BATCH, Origin  # noqa: E402
from deerml.judge.replay import make_replay  # noqa: E402
from deerml.model.bundle import Bundle  # noqa: E402
from deerml.model.detector import Detector, decode  # noqa: E402

NIGHTS, WIDE, HIGH = 6, 640, 360
START = parse_time("2026-09-01T18:00:00Z")
AT = START + timedelta(days=60)
OVERHEAD, CACHED = 1.10, 10.0  # at most 10 % over the bare detector; a second look at least ten times as fast


def filled_store(folder: Path, count: int) -> Store:
    "A home with so many frames, in nights of equal length"
    store, random = Store.open(Home.create(folder / "yard", classes=CLASSES)), np.random.default_rng(0)
    for night in range(NIGHTS):
        new = []
        for n in range(count // NIGHTS):
            data = cv2.imencode(".jpg", scene(random, HIGH, WIDE), [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()
            taken_at = START + timedelta(days=night, seconds=(16 * 3600 * n) / max(count // NIGHTS, 1))
            new.append(NewFrame(data, "bench", f"{night}/{n}", camera="gate", taken_at=taken_at, trigger="scheduled"))
        for start in range(0, len(new), 100):
            add_frames(store, new[start:start + 100])
    return store


def bare(store: Store, bundles: list[Bundle], of_night: list[Frame]) -> None:
    for bundle in bundles:
        detector = Detector(bundle)
        for start in range(0, len(of_night), BATCH):
            detector.batch([decode(image_bytes(store, frame)) for frame in of_night[start:start + BATCH]])


def seconds(work, *arguments) -> float:
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def measure(folder: Path, count: int, size: int) -> list[dict]:
    import torch
    checkpoints = []
    for name in ("first", "second"):
        (folder / name).mkdir()
        checkpoints.append(random_yolo(folder / name, spread=1.3 if name == "first" else 1.25))
    bundles = [bundle_of(checkpoint, folder, size) for checkpoint in checkpoints]
    torch.set_num_threads(1)
    times = {"replay": [], "floor": [], "again": []}
    with filled_store(folder, count) as store:
        origins = [Origin(bundle.digest, data_until=START - timedelta(days=2)) for bundle in bundles]
        for night in range(NIGHTS):
            date = f"{START + timedelta(days=night):%Y-%m-%d}"
            of_night, span = [frame for frame in frames(store) if frame.night == date], f"{date}..{date}"
            for name in ("floor", "replay") if night % 2 else ("replay", "floor"):
                times[name].append(seconds(bare, store, bundles, of_night) if name == "floor" else seconds(make_replay, store, *bundles, origins, span, AT))
            times["again"].append(seconds(make_replay, store, *bundles, origins, span, AT))
    each = count // NIGHTS * len(bundles) / 1000
    ours, floor, again = (median(times[name]) / each for name in ("replay", "floor", "again"))
    ratio, faster = median(a / b for a, b in zip(times["replay"], times["floor"])), median(a / b for a, b in zip(times["replay"], times["again"]))
    return [
        row("replay, over the bare detector", ours, floor, ratio, OVERHEAD, ratio <= OVERHEAD, f"{count} frames of {WIDE}x{HIGH}, two models at {size} px, {os.cpu_count()} cores, batches of {BATCH}"),
        row("the same replay again", again, None, faster, CACHED, faster >= CACHED, "against the first: everything that was seen is kept"),
    ]


def row(name: str, ours: float, floor: float | None, ratio: float, target: float, ok: bool, note: str) -> dict:
    return {"name": name, "ours": round(ours, 2), "peer": None, "peer_name": "", "floor": floor and round(floor, 2), "ratio": round(ratio, 3),
            "target": target, "ok": bool(ok), "unit": "ms an image and model", "note": f"{note}; no peer replays"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=600)
    parser.add_argument("--size", type=int, default=640, help="long side of the image as the models see it")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        os.environ["YOLO_CONFIG_DIR"] = name
        rows = measure(Path(name), max(asked.frames, NIGHTS), asked.size)
    print(f"{'':34}{'ours':>8}{'floor':>8}{'ratio':>8}{'target':>8}")
    for line in rows:
        floor = f"{line['floor']:8.2f}" if line["floor"] else f"{'-':>8}"
        print(f"{line['name']:34}{line['ours']:8.2f}{floor}{line['ratio']:8.2f}{line['target']:8.2f}  {'ok' if line['ok'] else 'MISSED'}")
    print("\n".join(f"{line['name']}: {line['note']}" for line in rows))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
