import math

import pytest

from fedllm import formats


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (611, "611 B"),
        (999.6, "1.00 kB"),
        (12_340, "12.3 kB"),
        (1_843_200, "1.84 MB"),
        (2.31e9, "2.31 GB"),
        (7e12, "7.00 TB"),
    ],
)
def test_bytes(count, text):
    assert formats.bytes_text(count) == text


@pytest.mark.parametrize(
    ("epsilon", "text"),
    [
        *((8.0, "8.00"), (7.9901, "8.00"), (7.99, "7.99"), (0.1231, "0.124"), (900.2, "901"), (12345.6, "12,346")),
        *((1e40, "1.000e+40"), (1.0001e40, "1.001e+40")),
    ],
)
def test_epsilon_is_rounded_up(epsilon, text):
    assert formats.epsilon_text(epsilon) == text


def test_a_shown_epsilon_never_understates():
    for step in range(1, 4000):
        epsilon = math.exp(step / 400 - 3)
        assert float(formats.epsilon_text(epsilon).replace(",", "")) >= epsilon - 1e-6


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.421, "0.42 s"), (12.34, "12.3 s"), (99.96, "1:40 min"), (245, "4:05 min"), (7380, "2:03:00 h")],
)
def test_seconds(seconds, text):
    assert formats.seconds_text(seconds) == text


@pytest.mark.parametrize(("delta", "text"), [(1e-4, "1e-4"), (2.5e-5, "2.5e-5"), (0.05, "5e-2"), (0, "0")])
def test_delta(delta, text):
    assert formats.delta_text(delta) == text


@pytest.mark.parametrize(("why", "text"), [(None, ""), ("fixed seed", "fixed seed"), (["a", "b"], "a, b"), ([], "")])
def test_why(why, text):
    assert formats.why_text(why) == text
