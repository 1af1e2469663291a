import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.evaluate import latency
from jaxquant.evaluate.latency import LatencyOptions, Timing, measure_latency, speedup, timed


def sleeper(seconds):
    return lambda: time.sleep(seconds)


def test_medians_quartiles_and_rounds_are_those_of_the_samples():
    found = measure_latency({"a": sleeper(0.004)}, LatencyOptions(rounds=9, min_sample_s=0))["a"]
    assert len(found.samples_s) == 9
    assert found.median_s == statistics.median(found.samples_s)
    assert (found.q25_s, found.q75_s) == tuple(np.quantile(found.samples_s, [0.25, 0.75]))
    assert found.min_s == min(found.samples_s) >= 0.004
    assert found.calls_per_sample == 1


def orders(seed):
    """The order of every round of three candidates."""
    ran = []
    calls = {name: (lambda name=name: ran.append(name)) for name in "abc"}
    measure_latency(calls, LatencyOptions(rounds=12, warmup=2, min_sample_s=0, seed=seed))
    warm = 3 * 5  # two warm-up calls, and three that decide how often to repeat
    runs = list(zip(ran[warm::2], ran[warm + 1 :: 2], strict=True))
    assert all(untimed == timed for untimed, timed in runs)
    names = [name for name, _ in runs]
    return [tuple(names[i : i + 3]) for i in range(0, len(names), 3)]


def test_every_round_runs_every_candidate_once_in_changing_order():
    rounds = orders(seed=0)
    assert len(rounds) == 12
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 1
    assert rounds == orders(seed=0) != orders(seed=1)


def test_nobody_always_follows_the_same_candidate():
    names = [name for order in orders(seed=0) for name in order]
    pairs = set(zip(names, names[1:], strict=False))
    assert {(a, b) for a in "abc" for b in "abc" if a != b} <= pairs


def test_a_run_does_not_pay_for_what_the_one_before_left_behind(monkeypatch):
    """A call takes longer once after another candidate ran, as with cold caches."""
    clock, last = [0.0], [""]
    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock[0])

    def candidate(name):
        def call():
            clock[0] += 1.0 if last[0] == name else 5.0
            last[0] = name

        return call

    options = LatencyOptions(rounds=4, min_sample_s=0, max_seconds=1e9)
    found = measure_latency({name: candidate(name) for name in "abc"}, options)
    assert all(timing.samples_s == (1.0,) * 4 for timing in found.values())


def test_short_calls_are_repeated_within_a_sample(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock[0])

    def quick():
        calls.append(1)
        clock[0] += 0.0005

    options = LatencyOptions(rounds=3, warmup=0, min_sample_s=0.01)
    found = measure_latency({"quick": quick}, options)["quick"]
    assert found.calls_per_sample == 20
    assert len(calls) == 3 + 3 * (1 + 20)
    assert found.median_s == pytest.approx(0.0005)  # per call, not per sample


def test_time_limit_ends_the_rounds_but_not_before_three():
    options = LatencyOptions(rounds=1000, warmup=0, min_sample_s=0, max_seconds=0.0)
    assert len(measure_latency({"a": sleeper(0.001)}, options)["a"].samples_s) == 3


def test_results_are_waited_for():
    class Result:
        ready = 0

        def block_until_ready(self):
            Result.ready += 1
            return self

    measure_latency({"a": Result}, LatencyOptions(rounds=2, warmup=1, min_sample_s=0))
    assert Result.ready == 1 + 3 + 2 * 2


def test_timed_gives_the_result():
    result, seconds = timed(lambda: jax.jit(lambda x: x + 1)(jnp.arange(3)))
    np.testing.assert_array_equal(result, [1, 2, 3])
    assert seconds > 0


def test_speedup_is_paired_by_round():
    def timing(*samples):
        return Timing(statistics.median(samples), 0.0, 0.0, min(samples), samples, 1)

    found = speedup(timing(2.0, 4.0, 9.0), timing(1.0, 4.0, 3.0))
    assert (found.q25, found.median, found.q75) == (1.5, 2.0, 2.5)


def test_nothing_to_time_and_bad_options_are_errors():
    with pytest.raises(ValueError, match="no candidates"):
        measure_latency({})
    with pytest.raises(ValueError, match="rounds=0"):
        LatencyOptions(rounds=0)
