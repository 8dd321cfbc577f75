"""What the gate computes, beside others: the paired bootstrap of average precision, and COCO's twelve numbers once.

    python benchmarks/gate.py              # 1,000 images, 2,000 draws; about three minutes
    python benchmarks/gate.py --images 200 --draws 200 --peer-draws 3

The peer of the bootstrap is pycocotools, run again for every draw. It is timed on a few draws and multiplied up, which
the note of its row says. All sides start from the same detections in memory, and must agree to 1e-12. Of plain average
precision no speed is promised: numpy matches image by image, once. faster-coco-eval and hotcoco are no dependencies; where
they are not installed, their rows say so.
"""
import argparse
import contextlib
import copy
import io
import json
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from deerml.judge.bootstrap import multiplicities  # noqa: E402
from deerml.judge.metrics import average_precision, coco_summary, from_coco, rank  # noqa: E402

WIDE, HIGH = 1280, 720


def generate(images: int, classes: int = 1, seed: int = 0, crowd: float = 0.02, decimals: int | None = None, empty: float = 0.2):
    "A dataset in COCO's format with boxes of all sizes, and the results of one model"
    rng = np.random.default_rng(seed)
    annotations, results = [], []

    def side() -> float:
        return float(np.exp(rng.uniform(np.log(8), np.log(300))))

    def detected(image: int, label: int, box, noise: float, score: float) -> dict:
        dx, dy, dw, dh = rng.normal(0, noise, 4)
        x, y, wide, high = box
        moved = [x + dx * wide, y + dy * high, wide * np.exp(dw), high * np.exp(dh)]
        return {"image_id": image, "category_id": label, "bbox": [float(v) for v in moved], "score": score}

    for image in range(1, images + 1):
        for _ in range(0 if rng.random() < empty else rng.poisson(3 / (1 - empty))):
            wide, high, label = side(), side(), int(rng.integers(1, classes + 1))
            box = [float(rng.uniform(0, WIDE - wide)), float(rng.uniform(0, HIGH - high)), wide, high]
            annotations.append({"id": len(annotations) + 1, "image_id": image, "category_id": label, "bbox": box, "area": wide * high * rng.uniform(0.6, 1), "iscrowd": int(rng.random() < crowd)})
            if rng.random() < 0.85:
                results.append(detected(image, label, box, 0.06, rng.beta(4, 2)))
            if rng.random() < 0.15:
                results.append(detected(image, label, box, 0.15, rng.beta(2, 3)))
        for _ in range(rng.poisson(7)):
            size = side()
            box = [rng.uniform(0, WIDE - size), rng.uniform(0, HIGH - size), size, size]
            results.append(detected(image, int(rng.integers(1, classes + 1)), box, 0.0, rng.beta(1, 6)))
    for result in results if decimals is not None else []:
        result["score"] = round(result["score"], decimals)
    names = [{"id": label, "name": f"class {label}"} for label in range(1, classes + 1)]
    listed = [{"id": image, "width": WIDE, "height": HIGH, "file_name": f"{image}.jpg"} for image in range(1, images + 1)]
    return {"images": listed, "annotations": annotations, "categories": names, "info": {}}, results


def resampled(truth: dict, results: list[dict], counts: np.ndarray) -> tuple[dict, list[dict]]:
    "The dataset with image i in it counts[i] times, as pycocotools needs it: copied"
    copies = [(image["id"], number) for image, count in zip(truth["images"], counts) for number in range(int(count))]
    by_image = {image["id"]: ([], []) for image in truth["images"]}
    for annotation in truth["annotations"]:
        by_image[annotation["image_id"]][0].append(annotation)
    for result in results:
        by_image[result["image_id"]][1].append(result)
    annotations, seen = [], []
    for new, (old, _) in enumerate(copies, 1):
        annotations += [{**annotation, "image_id": new} for annotation in by_image[old][0]]
        seen += [{**result, "image_id": new} for result in by_image[old][1]]
    annotations = [{**annotation, "id": number} for number, annotation in enumerate(annotations, 1)]
    listed = [{"id": new, "width": WIDE, "height": HIGH} for new in range(1, len(copies) + 1)]
    return {**truth, "images": listed, "annotations": annotations}, seen


def pycocotools_summary(truth: dict, results: list[dict], all_areas: bool = True) -> np.ndarray:
    "COCOeval's twelve numbers; without the areas only the first six places of `all` mean anything"
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = copy.deepcopy(truth)
        reference.createIndex()
        evaluation = COCOeval(reference, reference.loadRes(copy.deepcopy(results)), "bbox")
        if not all_areas:
            evaluation.params.areaRng, evaluation.params.areaRngLbl = evaluation.params.areaRng[:1], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
        if all_areas:
            evaluation.summarize()
            return evaluation.stats
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    return np.array([precision[precision > -1].mean(), precision[0][precision[0] > -1].mean()])


def paired_draws(truth: dict, models: list[list[dict]], counts: np.ndarray) -> tuple[np.ndarray, float, float]:
    "Our AP and AP50 of both models for every draw [draws, models, 2], and the seconds for matching and for drawing"
    start = time.perf_counter()
    ranked = [[rank(images) for images in from_coco(truth, results).values()] for results in models]
    matched = time.perf_counter()
    values = np.empty((len(counts), len(models), 2))
    for draw, weights in enumerate(counts):
        for model, one in enumerate(ranked):
            by_threshold = average_precision(one, weights)
            values[draw, model] = by_threshold.mean(), by_threshold[0]
    return values, matched - start, time.perf_counter() - matched


def floor_seconds(truth: dict, models: list[list[dict]], counts: np.ndarray) -> float:
    "The least that any exact method does: read every detection's weight once a draw and add them up"
    start = time.perf_counter()
    for results in models:
        image = np.array([result["image_id"] - 1 for result in results])
        for weights in counts:
            np.cumsum(weights[image])
    return time.perf_counter() - start


def peer_seconds(truth: dict, models: list[list[dict]], counts: np.ndarray, all_areas: bool) -> tuple[float, np.ndarray]:
    "Median seconds for one draw of both models, and the AP and AP50 it found; the copying is not timed"
    seconds, values = [], []
    for weights in counts:
        sets = [resampled(truth, results, weights) for results in models]
        start = time.perf_counter()
        values.append([pycocotools_summary(*one, all_areas)[:2] for one in sets])
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), np.array(values)


def measure(images: int, draws: int, peer_draws: int, repeats: int = 3) -> list[dict]:
    truth, champion = generate(images, seed=1)
    noise = np.random.default_rng(2).normal(0, 0.05, len(champion))
    models = [champion, [{**result, "score": float(result["score"] + shift)} for result, shift in zip(champion, noise)]]
    counts = multiplicities(images, draws, seed=0).astype(float)
    runs = [paired_draws(truth, models, counts) for _ in range(repeats)]
    ours = statistics.median(match + draw for _, match, draw in runs)
    floor = statistics.median(floor_seconds(truth, models, counts) for _ in range(repeats))
    worst_summary = max(abs(np.array(list(coco_summary(from_coco(truth, results)).values())) - pycocotools_summary(truth, results)).max() for results in models)
    rows = []
    for name, all_areas, work in [("same work", False, "AP and AP50, all sizes"), ("as it is run", True, "COCOeval's twelve numbers on its side")]:
        once, values = peer_seconds(truth, models, counts[:peer_draws], all_areas)
        worst = float(abs(values - runs[0][0][:peer_draws]).max())
        peer = once * draws
        note = f"{work}; two models; pycocotools extrapolated from {peer_draws} draws; largest difference {max(worst, worst_summary):.1e}"
        rows.append({"name": f"paired bootstrap, {draws} draws, {images} images, {name}", "ours": round(ours, 4), "peer": round(peer, 1), "peer_name": "pycocotools", "floor": round(floor, 4), "ratio": round(peer / ours, 1), "target": 300, "ok": bool(peer / ours >= 300 and max(worst, worst_summary) <= 1e-12), "unit": "s", "note": note})
    return rows


def _with_hotcoco(truth: dict, results: list[dict]) -> np.ndarray:
    import hotcoco

    reference = hotcoco.COCO(truth)
    return _evaluated(hotcoco.COCOeval(reference, reference.load_res(results), "bbox"))


def _with_faster_coco_eval(truth: dict, results: list[dict]) -> np.ndarray:
    from faster_coco_eval import COCO, COCOeval_faster

    reference = COCO(truth)
    return _evaluated(COCOeval_faster(reference, reference.loadRes(results), "bbox"))


def _evaluated(evaluation) -> np.ndarray:
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return np.array(evaluation.stats)[:12]


PEERS = {"pycocotools": pycocotools_summary, "faster-coco-eval": _with_faster_coco_eval, "hotcoco": _with_hotcoco}


def timed(compute, truth: dict, results: list[dict], repeats: int) -> tuple[float, np.ndarray]:
    "Median seconds, and what came out; each run gets a copy, since evaluators write into what they are given"
    seconds = []
    for _ in range(repeats):
        own = copy.deepcopy(truth), copy.deepcopy(results)
        start = time.perf_counter()
        with silence():
            value = compute(*own)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), value


@contextlib.contextmanager
def silence():
    "Evaluators print their tables, some of them past Python"
    sys.stdout.flush()
    kept, sink = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
        os.close(sink)


def measure_plain(images: int, repeats: int = 3) -> list[dict]:
    "COCO's twelve numbers of one model, beside everyone who is installed"
    truth, results = generate(images, seed=1)
    ours, mine = timed(lambda one, other: np.array(list(coco_summary(from_coco(one, other)).values())), truth, results, repeats)
    floor, _ = timed(lambda one, other: np.sort([result["score"] for result in other]), truth, results, repeats)
    rows = []
    for name, compute in PEERS.items():
        row = {"name": f"twelve numbers of COCO, {images} images", "ours": round(ours, 4), "peer": None, "peer_name": name, "floor": round(floor, 6), "ratio": None, "target": None, "ok": True, "unit": "s", "note": "not installed"}
        with contextlib.suppress(ImportError):
            peer, theirs = timed(compute, truth, results, repeats)
            worst = float(abs(mine - theirs).max())
            row |= {"peer": round(peer, 4), "ratio": round(peer / ours, 3), "ok": worst <= 1e-12, "note": f"one model, one class, from memory; floor: sorting the scores; largest difference {worst:.1e}"}
        rows.append(row)
    return rows


def printed(row: dict) -> str:
    def number(value, form: str, unit: str, width: int) -> str:
        return " " * (width - 1) + "-" if value is None else f"{value:{form}}{unit}"

    return (f"{row['name']:58} {row['peer_name']:16} {row['ours']:8.3f}s {number(row['peer'], '10.3f', 's', 11)} {row['floor']:9.4f}s "
            f"{number(row['ratio'], '8.2f', 'x', 9)} {number(row['target'], '6.0f', 'x', 7)}  {'ok' if row['ok'] else 'MISSED'}\n    {row['note']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--peer-draws", type=int, default=5)
    arguments = parser.parse_args()
    try:
        import pycocotools  # noqa: F401
    except ImportError:
        raise SystemExit("pycocotools is not installed: pip install 'deerml[train]'") from None
    rows = measure(arguments.images, arguments.draws, arguments.peer_draws) + measure_plain(arguments.images)
    print(f"{'what':58} {'peer':16} {'ours':>9} {'peer':>11} {'floor':>10} {'ratio':>9} {'target':>7}")
    print("\n".join(map(printed, rows)))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
