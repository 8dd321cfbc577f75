"""Error rates of the tests on yards whose truth is known."""
import numpy as np
import pytest

from benchmarks.gate import generate, measure, measure_plain, printed
from deerml.judge.bootstrap import (
    alarm_gain,
    clopper_pearson,
    multiplicities,
    paired_bootstrap,
    recall_bounds,
    recall_gain,
    swap_test,
)
from deerml.judge.compare import Answers, compare_on
from deerml.judge.evidence import Sample, Thresholds, practice_evidence, practice_predictions, sample_of
from deerml.judge.metrics import Decisions, decide, peaks_of

AT_HALF = Thresholds({"deer": 0.5})


def compared(seed: int, visits: int = 60, skill: float = 1.0):
    "A yard, and two models of which the second has its own luck"
    yard = practice_evidence(visits=visits, empty_windows=120, seed=seed)
    models = [decide(yard, peaks_of(yard, practice_predictions(yard, level, 0.1, 2 * seed + number)), AT_HALF) for number, level in enumerate((1.0, skill))]
    return sample_of(yard), *models


def false_promotions(simulations: int) -> tuple[float, float]:
    "Share of yards in which an equal model seems better: in recall, in false alarms"
    found = []
    for seed in range(simulations):
        sample, champion, challenger = compared(seed)
        found.append([swap_test(gain(sample, champion, challenger), 500, seed) <= 0.05 for gain in (recall_gain, alarm_gain)])
    return tuple(np.mean(found, 0))


def test_the_swap_test_seldom_favours_an_equal_model():
    assert max(false_promotions(60)) <= 0.10


@pytest.mark.slow
def test_the_swap_test_holds_its_error_rate():
    assert max(false_promotions(200)) <= 0.08


def test_the_swap_test_finds_a_clear_gain():
    sample, champion, challenger = compared(3, skill=4.0)
    assert swap_test(recall_gain(sample, champion, challenger)) < 0.01
    assert swap_test(recall_gain(sample, challenger, champion)) > 0.9


@pytest.mark.slow
def test_exact_bounds_cover_the_true_change():
    large = compared(1, visits=6000, skill=1.6)
    truth = recall_bounds(*large).estimate
    bounds = [recall_bounds(*compared(seed, skill=1.6)) for seed in range(100, 300)]
    assert np.mean([bound.lower <= truth for bound in bounds]) >= 0.95
    assert np.mean([bound.upper >= truth for bound in bounds]) >= 0.95


def test_bounds_for_effective_numbers_lie_between_those_of_whole_ones():
    for k in np.linspace(0, 9.5, 20):
        lower, upper = clopper_pearson(k, 10.5)
        assert clopper_pearson(np.floor(k), 10.5)[0] <= lower <= k / 10.5 <= upper <= clopper_pearson(np.ceil(k), 10.5)[1]
        assert clopper_pearson(k, 21)[1] < clopper_pearson(k / 2, 10.5)[1]


def test_the_same_seed_gives_the_same_intervals():
    sample, champion, challenger = compared(5)
    once = [paired_bootstrap(sample, champion, challenger, multiplicities(sample.units, 300, seed=9)) for _ in range(2)]
    assert once[0] == once[1]


def test_swapped_models_mirror_the_intervals():
    sample, champion, challenger = compared(6)
    counts = multiplicities(sample.units, 400)
    one, other = (paired_bootstrap(sample, *pair, counts)["recall"] for pair in ((champion, challenger), (challenger, champion)))
    assert np.allclose([one.estimate, one.lower, one.upper], [-other.estimate, -other.upper, -other.lower])


@pytest.mark.parametrize("silent_weight, seen_as_worse", [(1.0, True), (30.0, False)])
def test_what_only_the_champion_does_proves_little_while_the_rest_is_hardly_drawn(silent_weight, seen_as_worse):
    "Six visits of 80 lost and none won; six false alarms gone and none new. Where the champion was silent one window in 30 is drawn."
    weights, units = np.append(np.ones(100), np.full(20, silent_weight)), np.arange(120)
    sample = Sample("drawn", weights, np.ones(80), units, units[:80], units, 120, 100.0, frozenset({("gate", "1")}), 0, 0)
    champion, challenger = (Decisions(np.arange(80) >= lost, (units >= 80) & (units < 80 + alarms)) for lost, alarms in ((0, 6), (6, 0)))
    found = compare_on(sample, {}, *(Answers(one, np.zeros((0, 0, 2)), ()) for one in (champion, challenger)), draws=400)
    assert (found.recall_loss_p <= 0.05) == (found.alarm_gain_p <= 0.05) == seen_as_worse
    assert found.recall_gain_p > 0.9 and found.alarm_loss_p > 0.9


def test_the_benchmark_agrees_with_pycocotools():
    pytest.importorskip("pycocotools")
    rows = measure(images=60, draws=20, peer_draws=1, repeats=1)
    assert all(float(row["note"].rsplit(" ", 1)[1]) <= 1e-12 for row in rows)
    assert len(generate(60)[0]["images"]) == 60


def test_the_benchmark_has_a_row_for_every_peer_installed_or_not():
    pytest.importorskip("pycocotools")
    rows = measure_plain(40, repeats=1)
    assert [row["peer_name"] for row in rows] == ["pycocotools", "faster-coco-eval", "hotcoco"] and all(row["ok"] for row in rows)
    assert rows[0]["peer"] > 0 and all((row["peer"] is None) == (row["note"] == "not installed") for row in rows)
    assert all(row["peer_name"] in printed(row) for row in rows)
