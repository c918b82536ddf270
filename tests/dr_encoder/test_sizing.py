"""The automatic code size against spectra whose optimum is known."""

import pytest
import torch

from dr_encoder.codecs import CODECS
from dr_encoder.layout import AdapterLayout
from dr_encoder.priors import from_public_gradients
from dr_encoder.sizing import code_size_auto, expected_errors, wiener_error

pytestmark = pytest.mark.usefixtures("one_thread")

N = 64
MEAN = 1.3 ** -torch.arange(N, dtype=torch.float64)  # squares: the signal's spectrum
BASIS_ROWS = torch.diag(1.1 ** -torch.arange(N)).float()  # their principal directions are the coordinates, in order
HELD_OUT = (MEAN.sqrt() + torch.zeros(5, 1)).float()
SIGNAL = float(MEAN.sum())
CANDIDATES = [1, 2, 4, 8, 12, 16, 24, 32, 48, 64]


def by_hand(noise: float, rounds: int = 1) -> dict[int, float]:
    total = float(MEAN.sum())
    errors = {}
    for size in CANDIDATES:
        signal, added = float(MEAN[:size].sum()), size * noise / rounds
        errors[size] = (total - signal + signal * added / (signal + added)) / total
    return errors


@pytest.mark.parametrize(("noise", "rounds"), [(1e-6, 1), (0.002, 1), (0.02, 1), (0.02, 10), (0.3, 1), (50.0, 1)])
def test_it_picks_the_optimum_of_a_known_spectrum(noise, rounds):
    expected = by_hand(noise, rounds)
    found = expected_errors(BASIS_ROWS, HELD_OUT, noise, rounds, CANDIDATES, SIGNAL)
    assert list(found) == CANDIDATES and list(found.values()) == pytest.approx(list(expected.values()), rel=1e-4, abs=1e-6)
    assert code_size_auto(BASIS_ROWS, HELD_OUT, noise, rounds, CANDIDATES, SIGNAL) == min(expected, key=expected.get)


def test_more_noise_wants_a_shorter_code_and_more_rounds_a_longer():
    by_noise = [code_size_auto(BASIS_ROWS, HELD_OUT, noise, 1, CANDIDATES, SIGNAL) for noise in (1e-6, 1e-3, 0.01, 0.1, 1.0)]
    assert by_noise == sorted(by_noise, reverse=True) and len(set(by_noise)) >= 4
    by_rounds = [code_size_auto(BASIS_ROWS, HELD_OUT, 0.1, rounds, CANDIDATES, SIGNAL) for rounds in (1, 10, 100)]
    assert by_rounds == sorted(by_rounds) and len(set(by_rounds)) == 3


def test_of_equals_the_smallest():
    rows = HELD_OUT.clone()
    rows[:, 4:] = 0
    assert code_size_auto(BASIS_ROWS, rows, 0.0, 1, [64, 8, 4, 16], SIGNAL) == 4


def test_noise_may_follow_the_code_size():
    constant = code_size_auto(BASIS_ROWS, HELD_OUT, 0.01, 1, CANDIDATES, SIGNAL)
    rising = code_size_auto(BASIS_ROWS, HELD_OUT, lambda size: 0.01 * size, 1, CANDIDATES, SIGNAL)
    assert rising < constant


def test_any_orthonormal_codec_can_be_sized():
    layout = AdapterLayout.of([("v", torch.zeros(N))])
    prior = from_public_gradients(layout, BASIS_ROWS)

    def fit(size):
        return CODECS["coordinate"].fit(prior, layout, size, 0.0, 0)

    assert expected_errors(BASIS_ROWS, HELD_OUT, 0.02, 1, CANDIDATES, SIGNAL, fit) == pytest.approx(by_hand(0.02), rel=1e-4)
    with pytest.raises(ValueError, match="linear codec to size, got topk"):
        code_size_auto(BASIS_ROWS, HELD_OUT, 0.02, 1, [4], SIGNAL, lambda size: CODECS["topk"].fit(None, layout, size, 0.0, 0))


def test_the_sign_of_a_gradient_does_not_matter():
    """Random public labels turn gradients round: their mean vanishes, their squares do not."""
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0])[:, None]
    assert code_size_auto(BASIS_ROWS, signs * HELD_OUT, 0.02, 1, CANDIDATES, SIGNAL) == code_size_auto(
        BASIS_ROWS, HELD_OUT, 0.02, 1, CANDIDATES, SIGNAL
    )


def test_a_weaker_signal_wants_a_shorter_code():
    sizes = [code_size_auto(BASIS_ROWS, HELD_OUT, 0.02, 1, CANDIDATES, share * SIGNAL) for share in (1.0, 0.1, 0.01)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3


def test_signals_that_leave_their_range_are_pulled_back():
    assert wiener_error(-0.1, 0.5) == 1.0 and wiener_error(1.2, 0.0) == 0.0 and wiener_error(0.0, 0.0) == 1.0
    assert wiener_error(0.5, 0.5) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((BASIS_ROWS, HELD_OUT, 0.1, 1, [], 1.0), "at least one candidate"),
        ((BASIS_ROWS, HELD_OUT, 0.1, 1, [0, 4], 1.0), "at least one candidate, all >= 1"),
        ((BASIS_ROWS, HELD_OUT, 0.1, 0, [4], 1.0), "rounds=0 >= 1"),
        ((BASIS_ROWS, HELD_OUT[:0], 0.1, 1, [4], 1.0), "above 0, got 0 rows of energy"),
        ((BASIS_ROWS, HELD_OUT, 0.1, 1, [4], 0.0), "signal_energy=0.0 above 0"),
        ((BASIS_ROWS[:10], HELD_OUT, 0.1, 1, [4, 11], 1.0), "code_size=11 <= 10"),
    ],
)
def test_what_cannot_be_sized_is_refused_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        code_size_auto(*arguments)
    assert "\n" not in str(caught.value)
