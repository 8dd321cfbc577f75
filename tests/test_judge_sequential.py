"""A monitor that is looked at after every event: how often it errs, how soon it finds, and what must not matter to it."""
import itertools
import math

import numpy as np
import pytest

from deerml.judge.sequential import (
    EProcess,
    clear,
    confidence_sequence,
    is_no_worse,
    is_worse,
    log_e,
    prior_of,
    share_at,
    stopping_counts,
)


def alarms(monitor: EProcess, share: float, lives: int, events: int, alpha: float = 0.05, seed: int = 0) -> tuple[float, float]:
    "Share of lives that reject, with a look after every event, and the mean number of events until then"
    counts = np.cumsum(np.random.default_rng(seed).random((lives, events), dtype=np.float32) < share, 1, dtype=np.int32)
    hit = counts >= np.array(stopping_counts(monitor, events, alpha))[1:]
    stopped = hit.any(1)
    return float(stopped.mean()), float(np.where(stopped, hit.argmax(1) + 1, events).mean())


def monitor_of(p0: float) -> EProcess:
    return EProcess(p0, *prior_of(p0))


@pytest.mark.parametrize("p0", [0.05, 0.5])
def test_peeking_seldom_raises_an_alarm(p0):
    assert alarms(monitor_of(p0), p0, 400, 600)[0] <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("p0", [0.02, 0.05, 0.1, 0.5])
def test_peeking_holds_its_error_rate(p0):
    false, _ = alarms(monitor_of(p0), p0, 2000, 4000)
    print(f"p0 {p0}: {false:.4f} of 2,000 lives of 4,000 events")
    assert false <= 0.05


@pytest.mark.parametrize("p0, most", [(0.05, 220), (0.1, 110)])
def test_a_doubled_rate_is_found(p0, most):
    found, events = alarms(monitor_of(p0), 2 * p0, 400, 1500)
    assert found == 1.0 and events <= most


@pytest.mark.parametrize("exposure", [0.5, 0.2])
def test_a_candidate_at_the_margin_is_seldom_called_no_worse(exposure):
    "The reverse test: the events of the other one, where the candidate has 1.25 times the rate"
    monitor = is_no_worse(exposure)
    assert alarms(monitor, 1 - share_at(1.25, exposure), 400, 600)[0] <= 0.05
    assert alarms(monitor, 1 - share_at(0.4, exposure), 400, 600)[0] >= 0.95
    assert alarms(is_worse(exposure), share_at(1.0, exposure), 400, 600, seed=1)[0] <= 0.05


def test_the_order_of_events_does_not_matter():
    "Of the wealth; which batches were looked at decides only whether a peak was seen"
    orders = set(itertools.permutations([(3, 4), (0, 6), (2, 2), (1, 5)]))
    ends = set()
    for order in orders:
        monitor = is_worse()
        for batch in order:
            monitor = monitor.add(*batch)
        ends.add((monitor.k, monitor.n, log_e(monitor.k, monitor.n, monitor.p0)))
    assert len(orders) == 24 and len(ends) == 1


def test_a_restart_goes_on_where_it_was():
    rng = np.random.default_rng(2)
    events = (rng.random(80) < 0.6).tolist()
    whole = is_worse()
    for x in events:
        whole = whole.add(x)
    half = is_worse()
    for x in events[:37]:
        half = half.add(x)
    again = EProcess(**{name: getattr(half, name) for name in ("p0", "a", "b", "k", "n", "peak")})
    for x in events[37:]:
        again = again.add(x)
    assert again == whole


def test_a_decision_stays():
    monitor = is_worse().add(12, 12)
    assert monitor.rejects() and monitor.add(0, 1000).rejects() and monitor.add(0, 1000).p_value == monitor.p_value
    assert log_e(12, 1012, 0.5) < 0


def test_long_silence_is_no_alarm():
    "The part of the prior above p0 is far below the smallest number here"
    for n in (1_000, 100_000):
        for p0 in (0.05, 0.5, 0.9):
            assert log_e(0, n, p0, *prior_of(p0)) < 0


@pytest.mark.parametrize("p0", [0.02, 0.1, 0.5])
def test_the_wealth_is_fair(p0):
    "Its expectation under p0 is one, after any number of events"
    for n in (1, 7, 40):
        chance = [math.comb(n, k) * p0**k * (1 - p0) ** (n - k) for k in range(n + 1)]
        assert math.isclose(math.fsum(c * math.exp(log_e(k, n, p0, *prior_of(p0))) for k, c in enumerate(chance)), 1.0, rel_tol=1e-9)


def test_stopping_counts_are_the_least_that_reject():
    monitor = monitor_of(0.1)
    for n, k in enumerate(stopping_counts(monitor, 60)):
        assert k > n or monitor.add(k, n).rejects()
        assert k == 0 or not monitor.add(k - 1, n).rejects()


def test_clear_says_each_thing():
    assert (clear(0, 0), clear(12, 1), clear(1, 12), clear(8, 8)) == ("open", "worse", "no_worse", "open")
    assert clear(12, 12, exposure=0.1) == "worse"


def test_the_confidence_sequence_covers_at_all_times_at_once():
    rng = np.random.default_rng(4)
    for share in (0.05, 0.4):
        missed = 0
        for _ in range(60):
            counts = np.cumsum(rng.random(300) < share)
            missed += any(not low <= share <= high for low, high in (confidence_sequence(int(counts[n - 1]), n) for n in range(5, 301, 5)))
        assert missed <= 6
    assert confidence_sequence(0, 0) == (0.0, 1.0) and confidence_sequence(3, 3)[1] == 1.0 and confidence_sequence(0, 3)[0] == 0.0
