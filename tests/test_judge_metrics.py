"""AP against pycocotools, which defines it: published files, and generated data with everything that is awkward."""
import json

import numpy as np
import pytest

from benchmarks.gate import generate, pycocotools_summary, resampled
from deerml.judge.metrics import average_precision, coco_summary, from_coco, rank

pytest.importorskip("pycocotools")
EXACT = 1e-12


def ours(truth, results) -> np.ndarray:
    return np.array(list(coco_summary(from_coco(truth, results)).values()))


def assert_equal(truth, results) -> np.ndarray:
    mine, theirs = ours(truth, results), pycocotools_summary(truth, results)
    assert np.abs(mine - theirs).max() <= EXACT, (mine, theirs)
    return mine


@pytest.mark.data
def test_the_documented_numbers_of_cocoapi(sample_data):
    folder = sample_data / "peers" / "cocoapi"
    truth = json.loads((folder / "instances_val2014_100.json").read_text())
    results = json.loads((folder / "instances_val2014_fakebbox100_results.json").read_text())
    documented = [0.505, 0.697, 0.573, 0.586, 0.519, 0.501, 0.387, 0.594, 0.595, 0.640, 0.566, 0.564]
    assert assert_equal(truth, results).round(3).tolist() == documented


@pytest.mark.data
@pytest.mark.parametrize("name", ["dataset", "ignore_test"])
def test_the_files_of_faster_coco_eval(sample_data, name):
    folder = sample_data / "peers" / "faster_coco_eval"
    truth = json.loads((folder / f"gt_{name}.json").read_text())
    results = json.loads((folder / f"dt_{name}.json").read_text())
    for image in truth["images"]:  # one of the files writes its image id as text, which pycocotools refuses
        image["id"] = int(image["id"])
    assert assert_equal(truth, results)[0] > 0


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("crowd", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("decimals", [None, 2, 1, 0])
def test_generated_data(classes, crowd, decimals):
    assert_equal(*generate(60, classes, seed=classes + 10 * int(10 * crowd), crowd=crowd, decimals=decimals))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_much_generated_data(seed):
    assert_equal(*generate(300, 1 + seed % 4, seed=seed, crowd=0.1 * (seed % 3), decimals=(None, 3, 1)[seed % 3], empty=(0.2, 0.9)[seed % 2]))


@pytest.mark.parametrize("decimals", [None, 1])
def test_everything_awkward_at_once(decimals):
    "Groups, truth outside the sizes, `ignore` marks, most images empty, equal scores, a class without truth and one without detections"
    truth, results = generate(120, 4, seed=21, crowd=0.15, decimals=decimals, empty=0.7)
    rng = np.random.default_rng(0)
    for annotation in truth["annotations"]:
        annotation["ignore"] = int(rng.random() < 0.3)
        annotation["area"] = float(rng.choice([0.0, 32.0**2, 96.0**2, annotation["area"]]))
    truth["annotations"] = [annotation for annotation in truth["annotations"] if annotation["category_id"] != 2]
    results = [result for result in results if result["category_id"] != 3]
    assert sum(annotation["iscrowd"] for annotation in truth["annotations"]) > 5
    assert_equal(truth, results)


@pytest.mark.parametrize("score", [0.5, 0.0, 1.0])
def test_all_scores_equal(score):
    truth, results = generate(40, 2, seed=6, crowd=0.1)
    assert_equal(truth, [{**result, "score": score} for result in results])


def test_absent_class_and_no_detections_of_a_class():
    truth, results = generate(40, 3, seed=5)
    truth["categories"].append({"id": 9, "name": "never there"})
    assert_equal(truth, [result for result in results if result["category_id"] != 2])
    assert_equal({**truth, "annotations": [a for a in truth["annotations"] if a["category_id"] != 1]}, results)


def test_only_empty_images():
    truth, results = generate(10, seed=1, empty=1.0)
    assert set(ours(truth, results)) == {-1.0}
    assert_equal(truth, results)


def test_more_than_a_hundred_detections_in_an_image():
    truth, results = generate(3, seed=2, empty=0.0)
    rng = np.random.default_rng(0)
    crowded = [{**results[rng.integers(len(results))], "score": float(score)} for score in rng.random(400)]
    assert_equal(truth, crowded)


def test_equal_overlaps_take_the_last_truth_box():
    def annotation(number, box, **more):
        return {"id": number, "image_id": 1, "category_id": 1, "bbox": box, "area": 400.0, "iscrowd": 0, **more}

    truth = {"images": [{"id": 1}], "categories": [{"id": 1}], "info": {}}
    truth["annotations"] = [annotation(1, [0, 0, 20, 20]), annotation(2, [10, 0, 20, 20]), annotation(3, [5, 0, 20, 20], iscrowd=1)]
    results = [{"image_id": 1, "category_id": 1, "bbox": box, "score": score} for box, score in [([5, 0, 20, 20], 0.9), ([0, 0, 20, 20], 0.8), ([11, 0, 20, 20], 0.7), ([5, 0, 20, 20], 0.6)]]
    assert_equal(truth, results)


def test_the_order_of_images_in_the_file_does_not_matter():
    truth, results = generate(30, 2, seed=8)
    assert (ours(truth, results) == ours({**truth, "images": truth["images"][::-1]}, results)).all()


@pytest.mark.parametrize("crowd", [0.0, 0.08])
def test_weights_equal_copies(crowd):
    truth, results = generate(80, 2, seed=3, crowd=crowd)
    ranked = [rank(images) for images in from_coco(truth, results).values()]
    rng = np.random.default_rng(0)
    for _ in range(3):
        counts = np.bincount(rng.integers(0, 80, 80), minlength=80)
        theirs = pycocotools_summary(*resampled(truth, results, counts))
        mine = average_precision(ranked, counts.astype(float))
        assert np.abs(np.array([mine.mean(), mine[0], mine[5]]) - theirs[:3]).max() <= EXACT
