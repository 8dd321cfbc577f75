"""How often the gate is right on simulated yards whose windows were drawn by the queue, which looks where the champion fired.

The slow tier prints each share with its Monte Carlo interval: run it with `--slow -s`.
"""
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from deerml.core.box import Box
from deerml.judge.bootstrap import clopper_pearson, recall_bounds
from deerml.judge.compare import Contestant, figures_of, multiplicities
from deerml.judge.evidence import Evidence, JudgedFrame, Mark, Thresholds, Visit, sample_of
from deerml.judge.gate import judge
from deerml.judge.power import (
    CHANGES,
    QUICK,
    Change,
    Ground,
    Yard,
    drawn_share,
    ground_of,
    is_promoted,
    is_rejected,
    may_accept,
    nights_of,
    power_of,
    power_table,
    replayed_share,
    table_of,
    yard_power,
)
from deerml.review.queue import draw_order, split_by_place, stratum_of

EQUAL, WORSE, BETTER = Change(), Change(dropped=0.1), Change(gain=0.1)
PRIMARIES = {"visit_recall": QUICK, "false_alarms": replace(QUICK, primary="false_alarms")}


def grounds(yard: Yard, change: Change, seed: int, months: int = 6, test_nights: bool = False) -> Ground:
    "The evidence of one simulated yard"
    rng = np.random.default_rng([seed, 11])
    nights = nights_of(yard, change, 30 * months, rng)
    share, watched = drawn_share(nights, yard.nightly_windows, rng), np.ones(30 * months * yard.cameras, bool)
    return ground_of(nights, share, rng.random(len(watched)) < 0.15 if test_nights else watched)


def promotions(yard: Yard, change: Change, runs: int, months: int = 6, test_nights: bool = False, seed: int = 0) -> Counter:
    "How many of so many yards promote, for each goal that a release may have"
    found = Counter()
    for run in range(runs):
        ground = grounds(yard, change, seed + run, months, test_nights)
        for name, settings in PRIMARIES.items():
            found[name] += is_promoted(ground, settings)
    return found


def shown(what: str, count: int, runs: int) -> tuple[float, float]:
    "Print a share with its Monte Carlo interval (95 %, two-sided), and give its upper bound (95 %, one-sided)"
    low, high = clopper_pearson(count, runs, 0.025)
    print(f"{what}: {count} of {runs}, {100 * count / runs:.2f} % ({100 * low:.2f} to {100 * high:.2f})")
    return count / runs, clopper_pearson(count, runs)[1]


# -- error rates --------------------------------------------------------------------------------------------------


def test_equal_and_worse_models_are_seldom_promoted():
    assert max(promotions(Yard(48), EQUAL, 40, months=3).values()) <= 6
    assert max(promotions(Yard(48), WORSE, 40, months=3).values()) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("visits, months, test_nights", [(24, 6, False), (24, 12, False), (48, 6, False), (48, 12, True)])
def test_equal_models_are_promoted_in_at_most_5_percent(visits, months, test_nights):
    found = promotions(Yard(visits), EQUAL, 2000, months, test_nights)
    for name in PRIMARIES:
        assert shown(f"equal, {visits} visits a month, {months} months, test nights only: {test_nights}, goal {name}", found[name], 2000)[0] <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("visits, months, test_nights", [(24, 6, False), (24, 12, False), (48, 6, False), (48, 12, True)])
def test_a_model_that_drops_a_tenth_of_its_visits_is_promoted_in_at_most_half_a_percent(visits, months, test_nights):
    found = promotions(Yard(visits), WORSE, 2000, months, test_nights)
    assert shown(f"drops 10 %, {visits} visits a month, {months} months, test nights only: {test_nights}", found["visit_recall"], 2000)[1] <= 0.005


def rejections(yard: Yard, change: Change, runs: int, months: int = 6, test_nights: bool = False) -> int:
    return sum(is_rejected(grounds(yard, change, run, months, test_nights), QUICK) for run in range(runs))


def test_an_equal_model_is_seldom_rejected():
    "What only the champion finds is seen sooner than what only the challenger finds"
    assert rejections(Yard(48), EQUAL, 20, months=3) <= 4


@pytest.mark.slow
@pytest.mark.parametrize("visits, months, test_nights", [(24, 6, False), (48, 12, True)])
def test_equal_and_better_models_are_seldom_rejected(visits, months, test_nights):
    for change, most in ((EQUAL, 0.06), (BETTER, 0.03)):
        assert shown(f"rejected, {change}, {visits} visits a month, test nights only: {test_nights}", rejections(Yard(visits), change, 400, months, test_nights), 400)[0] <= most


# -- intervals ----------------------------------------------------------------------------------------------------


def coverage(runs: int, yard: Yard = Yard(24), months: int = 6) -> dict[str, float]:
    "How often each one-sided 95 % bound holds: of the champion's recall, and of its change"
    held = Counter()
    for run in range(runs):
        ground = grounds(yard, BETTER, run, months)
        figures = figures_of(ground.sample, ground.answers[0], multiplicities(ground.sample.units, 20))
        change = recall_bounds(ground.sample, *ground.models)
        held["recall, lower"] += figures.recall_lower <= yard.recall
        held["recall, upper"] += figures.recall_upper >= yard.recall
        held["change, lower"] += change.lower <= BETTER.gain
        held["change, upper"] += change.upper >= BETTER.gain
    return {name: count / runs for name, count in held.items()}


def test_the_bounds_of_recall_hold():
    assert min(coverage(40).values()) >= 0.85


@pytest.mark.slow
def test_the_bounds_of_recall_hold_their_level():
    "Nominal 95 % each; 1,000 yards leave 0.7 points of Monte Carlo error"
    found = coverage(1000)
    print(found)
    assert min(found.values()) >= 0.94


# -- power --------------------------------------------------------------------------------------------------------


def test_a_better_model_passes_sooner_with_exam_nights_than_on_test_nights():
    power = power_of(Yard(48), Change(gain=0.2), 12, months=(1, 6))
    assert power.shares["exams"][1] >= 0.25 > power.shares["gate"][1] and power.shares["exams"][0] <= power.shares["exams"][1]


@pytest.mark.slow
def test_the_power_table():
    powers = power_table(runs=200)
    print(table_of({f"{power.yard.visits_per_month} visits a month": power for power in powers}))
    small, middle, large = (power.shares for power in powers)
    assert large["exams"][3] >= 0.4 and small["exams"][3] <= middle["exams"][3] <= large["exams"][3]
    for shares in (small, middle, large):
        assert all(gate <= exams for gate, exams in zip(shares["gate"], shares["exams"]))


@pytest.mark.slow
def test_what_a_yard_can_show_of_each_change():
    powers = yard_power(Yard(24), runs=200)
    print(table_of(powers))
    better, equal, worse = (powers[name].shares for name in CHANGES)
    assert max(equal["exams"]) <= 0.09 and max(worse["exams"]) <= 0.02
    assert better["replay"][-1] > equal["replay"][-1] > worse["replay"][-1]


# -- the simulation is what it says -------------------------------------------------------------------------------


def as_evidence(nights, share, watched) -> tuple[Evidence, list[Contestant]]:
    "The same evidence as frames and boxes: one frame a window, one box where a model fires"
    where = nights.camera_night
    drawn = (share > 0) & watched[where]
    touched = np.unique(nights.visit[drawn[nights.window]])
    beside = np.zeros(len(drawn), bool)
    beside[nights.window[np.isin(nights.visit, touched)]] = True
    animal, elsewhere = Box(10, 10, 100, 100), Box(400, 200, 60, 60)
    at = {int(window): set(nights.visit[nights.window == window].tolist()) for window in nights.window}
    frames, seen = [], [{}, {}]
    for window in np.flatnonzero(drawn | beside):
        camera, night = str(where[window] % nights.cameras), f"{where[window] // nights.cameras:04d}"
        truth = (Mark("deer", animal),) if int(window) in at else ()
        role = ("drawn", float(share[window])) if drawn[window] else ("followed", None)
        frames.append(JudgedFrame(int(window), camera, night, f"{window:06d}", "unknown", role[1], role[0], truth, (640, 360)))
        for model in range(2):
            on = any(nights.hits[model, visit] for visit in at.get(int(window), ()))
            seen[model][int(window)] = [Mark("deer", animal, 0.9)] * on + [Mark("deer", elsewhere, 0.8)] * bool(nights.false[model, window])
    visits = [Visit(str(visit), str(where[windows[0]] % nights.cameras), f"{where[windows[0]] // nights.cameras:04d}", tuple(map(int, windows)), tuple(f"{window:06d}" for window in windows))
              for visit in touched for windows in [nights.window[nights.visit == visit]]]
    hours = {(str(one % nights.cameras), f"{one // nights.cameras:04d}"): 10.0 for one in np.flatnonzero(watched)}
    return Evidence(tuple(frames), tuple(visits), hours, ("deer",)), [Contestant(one, Thresholds({"deer": 0.5})) for one in seen]


@pytest.mark.parametrize("seed", [4, 12, 17])
def test_the_simulated_evidence_is_judged_like_real_evidence(seed):
    rng = np.random.default_rng(seed)
    nights = nights_of(Yard(60), Change(gain=0.15), 60, rng)
    assert len(np.unique(nights.window)) == len(nights.window), "two visits in one window would share their frames: take another seed"
    share, watched = drawn_share(nights, 12, rng), rng.random(180) < 0.7
    ground = ground_of(nights, share, watched)
    evidence, models = as_evidence(nights, share, watched)
    real = sample_of(evidence)
    assert (real.visits, real.units, real.camera_nights, real.camera_hours) == (ground.sample.visits, ground.sample.units, ground.sample.camera_nights, ground.sample.camera_hours)
    assert np.allclose(np.sort(real.visit_weight), np.sort(ground.sample.visit_weight)) and np.allclose(np.sort(real.window_weight), np.sort(ground.sample.window_weight))
    verdict = judge(evidence, *models, QUICK)
    exact = recall_bounds(ground.sample, *ground.models)
    assert np.isclose(verdict.numbers["recall"]["lower"], exact.lower) and np.isclose(verdict.numbers["recall"]["estimate"], exact.estimate)
    assert (verdict.verdict == "promote", verdict.verdict == "reject") == (is_promoted(ground, QUICK), is_rejected(ground, QUICK))


def test_the_draw_is_the_queues():
    "The simulated shares of a night are those of `draw_order` on the same windows"
    rng = np.random.default_rng(8)
    nights = nights_of(Yard(90), EQUAL, 5, rng)
    share = drawn_share(nights, 12, rng).reshape(5, -1)
    for night in range(5):
        part = slice(night * 180, (night + 1) * 180)
        strata = {(str(place // 60), f"{place:03d}"): stratum_of(bool(fired), bool(faint), None) for place, (fired, faint) in enumerate(zip(nights.fired[0, part], nights.faint[part]))}
        named = split_by_place(strata, 12)
        counts = Counter(name for name, _ in draw_order(named, 12, np.random.default_rng(0)))
        for name, windows in named.items():
            mine = share[night][[int(window) for _, window in windows]]
            assert (mine > 0).sum() == counts[name] and np.allclose(mine[mine > 0], counts[name] / len(windows))
        assert (share[night] > 0).sum() == 12


def test_weights_are_fair_on_the_average():
    "The estimated number of visits is right over many draws of the same nights"
    rng = np.random.default_rng(2)
    nights = nights_of(Yard(60), EQUAL, 30, rng)
    totals = [ground_of(nights, drawn_share(nights, 12, rng), np.ones(90, bool)).sample.visit_weight.sum() for _ in range(300)]
    assert abs(np.mean(totals) - len(nights.first)) <= 4 * np.std(totals) / np.sqrt(300)


def test_a_replay_sees_every_difference():
    rng = np.random.default_rng(3)
    nights = nights_of(Yard(60), EQUAL, 30, rng)
    share = replayed_share(nights, 20 * 180, rng)
    differs = nights.fired[0] != nights.fired[1]
    assert (share[:3600][differs[:3600]] == 1).all() and not share[3600:].any() and 10 < (share > 0).sum() - differs[:3600].sum() <= 20
    ground = ground_of(nights, share, np.arange(90) < 60)
    pairs_lost = [(nights.hits[0] > nights.hits[1]) & (nights.window[nights.first] < 3600), (ground.models[0].hits > ground.models[1].hits)]
    assert pairs_lost[0].sum() == pairs_lost[1].sum() > 0


def test_a_yard_without_visits_shows_nothing():
    ground = grounds(Yard(0), EQUAL, 0, months=1)
    assert ground.sample.visits == 0 and not is_promoted(ground, QUICK) and not is_rejected(ground, QUICK) and not may_accept(ground)
