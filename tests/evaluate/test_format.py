import math

import pytest

from jaxquant.evaluate import format as fmt
from jaxquant.evaluate.bootstrap import Interval
from jaxquant.evaluate.svg import Axis, log_axis, nice_step, power_label


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"), (0.0, "0"), (1.0, "1.00"), (12.345, "12.3"), (1234.5, "1234"),
        (0.001234, "0.00123"), (1.234e-5, "1.23e-5"), (2.5e7, "2.50e7"), (math.inf, "inf"),
        (-0.5, "-0.500"), (9.999, "10.00"),
    ],
)  # fmt: skip
def test_number(value, text):
    assert fmt.number(value) == text


def test_units():
    assert [fmt.megabytes(n) for n in (12, 1500, 2_500_000, 3 * 10**9)] == [
        "12 B", "1.50 KB", "2.50 MB", "3.00 GB",
    ]  # fmt: skip
    assert [fmt.milliseconds(s) for s in (2.0, 0.0123, 4.5e-5)] == ["2.00 s", "12.3 ms", "45.0 µs"]
    assert [fmt.rate(r) for r in (12.0, 4500.0, 2.5e6)] == ["12.0", "4.50k", "2.50M"]
    assert fmt.signed(0.25) == "+0.250" and fmt.signed(-0.25) == "-0.250" and fmt.signed(0.0) == "0"
    assert fmt.percent(0.98765) == "98.77%"
    assert fmt.ratio(1, 4) == "0.250" and fmt.ratio(1, 0) == "–"
    assert fmt.with_range(Interval(1.0, 0.5, 2.0)) == ("1.00", "[0.500, 2.00]")
    assert fmt.with_range(Interval(1.0)) == ("1.00", "")
    assert fmt.with_range(None) == ("–", "")


def test_axes_map_ends_to_ends_and_tick_round_numbers():
    axis = Axis(0, 7.3, 10, 110)
    assert (axis(0), axis(7.3)) == (10, 110)
    assert [v for v, _ in axis.ticks(6)] == [0, 2, 4, 6]
    log = Axis(1e-5, 1e-1, 200, 0, log=True)
    assert log(1e-3) == pytest.approx(100)
    assert [label for _, label in log.ticks()] == ["10⁻⁵", "10⁻⁴", "10⁻³", "0.01", "0.1"]
    narrow = Axis(0.9, 30, 0, 1, log=True)
    assert [label for _, label in narrow.ticks()] == ["1", "2", "5", "10", "20"]
    assert log_axis([0.0, math.inf, math.nan], 0, 1) is None
    held = log_axis([0.01, 5.0], 0, 100)
    assert 0 < held(0.01) < held(5.0) < 100
    assert nice_step(0.3) == pytest.approx(0.5) and nice_step(20) == 20
    assert power_label(-7) == "10⁻⁷" and power_label(2) == "100"
