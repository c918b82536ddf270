"""Both sides of a private sum: how long a unit's vector can be, and how much noise there is, whoever takes part."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from dr_encoder.message import Duplicate, Inbox, pack, unpack
from fedllm.client import message, unit_vectors
from fedllm.data.partition import make_partition
from fedllm.privacy.calibration import update_multiplier
from fedllm.privacy.events import message_multiplier, sum_multiplier
from fedllm.privacy.noise import Noise
from fedllm.release import PrivateSum
from fedllm.schema import Config, ServerConfig
from fedllm.server import SCHEDULES, ServerOptimizer, decoded_mean, noisy_mean
from fedllm.stopwatch import Stopwatch
from fedllm.training.engine import Encoded
from fedllm.transports.simulation import Simulation

pytestmark = pytest.mark.usefixtures("one_thread")

SHARES, SIZE, UPDATE = 20, 400, 900
MODES = ("distributed", "local", "central")


def spec(**changes) -> PrivateSum:
    values = {
        "run": "r", "stage": 2, "round": 0, "codec": "c", "prior": "p", "size": SIZE, "clip": 0.5, "noise": "distributed",
        "noise_in": "code", "noise_multiplier": 2.0, "shares": SHARES, "sampling_rate": 0.1, "max_cohort": SHARES, "expected": 10.0,
        "unit": "client", "clients": 100, "bits": 16,
    }  # fmt: skip
    return PrivateSum(**(values | changes))


def basis() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(UPDATE, SIZE, generator=generator)).Q.T.contiguous()


def encode(updates: torch.Tensor) -> torch.Tensor:
    return updates @ BASIS.T


BASIS = basis()


def same(updates: torch.Tensor) -> torch.Tensor:
    return updates


def sent_by(spec, clients, noise, vector=None):
    """Messages of these clients, all with the same vector (default zero)."""
    length = UPDATE if spec.noise_in == "update" else spec.size
    vector = torch.zeros(length) if vector is None else vector
    return [message(vector, spec, client, noise, encode) for client in clients]


def has_std(values: np.ndarray, std: float) -> bool:
    """Whether a large sample is N(0, std^2): by its distribution (Kolmogorov-Smirnov) and by its variance."""
    values = np.ravel(values)
    off = abs(np.mean(values**2) / std**2 - 1)
    return stats.kstest(values / std, "norm").pvalue > 1e-4 and off < 5 * math.sqrt(2 / len(values))


def assert_std(values: np.ndarray, std: float) -> None:
    assert has_std(values, std)
    assert not has_std(values, std * 2 / 3) and not has_std(values, std * 3 / 2)


# -- noise -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise_in", ["code", "update"])
@pytest.mark.parametrize(("mode", "std"), [("distributed", 2.0 * 0.5 / math.sqrt(SHARES)), ("local", 2.0 * 0.5)])
def test_each_message_carries_its_share(mode, std, noise_in):
    what = spec(noise=mode, noise_in=noise_in)
    assert what.share_std == pytest.approx(std, rel=1e-12)
    noise = Noise(seed=1)
    lattice = [unpack(sent, what.expects())[1] for sent in sent_by(what, range(50), noise)]
    assert_std(np.array(lattice) * what.scale, std)


def test_a_message_to_a_trusted_server_carries_none():
    what = spec(noise="central")
    vector = torch.linspace(-0.02, 0.02, SIZE)
    sent = sent_by(what, [3], Noise(seed=1), vector)[0]
    assert np.abs(unpack(sent, what.expects())[1] * what.scale - vector.numpy()).max() <= what.scale


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("cohort", [0, 1, SHARES])
@pytest.mark.parametrize("mode", MODES)
def test_the_sum_has_one_and_the_same_noise_whatever_the_cohort(mode, cohort, bits):
    of_sum = 2.0 * 0.5 * (math.sqrt(SHARES) if mode == "local" else 1.0)
    means = []
    for draw in range(40):
        what = spec(noise=mode, bits=bits, round=draw)
        noise = Noise(seed=2)
        means.append(noisy_mean(sent_by(what, range(cohort), noise), what, noise).numpy())
    assert what.sum_std == pytest.approx(of_sum, rel=1e-12) and what.mean_std == pytest.approx(of_sum / 10, rel=1e-12)
    assert_std(np.array(means) * what.expected, of_sum)


@pytest.mark.parametrize("cohort", [1, SHARES])
def test_noise_in_the_update_is_the_same_noise_in_the_code(cohort):
    means = []
    for draw in range(40):
        what, noise = spec(noise_in="update", round=draw), Noise(seed=3)
        means.append(noisy_mean(sent_by(what, range(cohort), noise), what, noise).numpy())
    assert_std(np.array(means) * what.expected, 1.0)


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("cohort", [0, 1, SHARES])
def test_decoded_one_by_one_every_slot_carries_one_noise(cohort, bits):
    """A decoder that squares shows that each message is decoded on its own: the mean of squares is that of single noises."""
    means, squares = [], []
    for draw in range(40):
        what, noise = spec(noise="local", bits=bits, round=draw, each=True), Noise(seed=6)
        sent = sent_by(what, range(cohort), noise)
        means.append(decoded_mean(sent, what, noise, lambda code: code).numpy())
        squares.append(decoded_mean(sent, what, noise, torch.square).numpy())
    assert_std(np.array(means) * what.expected, 1.0 * math.sqrt(SHARES))
    assert np.mean(squares) * what.expected == pytest.approx(SHARES, rel=0.05)
    assert what.ledger_entry("os")["mechanism"] == "gaussian_each"


def test_decoded_one_by_one_a_linear_code_gives_the_same_mean():
    what, noise = spec(noise_multiplier=0.0, clip=math.inf, bits=32, each=True), Noise(seed=6)
    sent = sent_by(what, range(5), noise, torch.linspace(-1, 1, SIZE))
    whole = noisy_mean(sent, what, noise)
    assert torch.allclose(decoded_mean(sent, what, noise, lambda code: 3 * code), 3 * whole, rtol=1e-6)
    assert torch.equal(decoded_mean([], what, noise, lambda code: 3 * code), torch.zeros(SIZE))


@pytest.mark.parametrize("cohort", [2, SHARES])
def test_the_top_up_alone_is_what_is_missing(cohort, monkeypatch):
    """All but the server's own draw set to zero."""
    real = Noise.gaussian

    def only_server(self, shape, std, *, purpose, **key):
        return real(self, shape, std if purpose == "server" else 0.0, purpose=purpose, **key)

    monkeypatch.setattr(Noise, "gaussian", only_server)
    sums = []
    for draw in range(40):
        what, noise = spec(round=draw, bits=32), Noise(seed=4)
        sums.append(noisy_mean(sent_by(what, range(cohort), noise), what, noise).numpy() * what.expected)
    missing = math.sqrt((SHARES - cohort) / SHARES)
    assert not np.any(sums) if missing == 0 else has_std(np.array(sums), missing)


def test_operating_system_noise_has_the_same_figures():
    means = []
    for draw in range(40):
        what, noise = spec(round=draw), Noise()
        means.append(noisy_mean(sent_by(what, range(3), noise), what, noise).numpy())
    assert_std(np.array(means) * what.expected, 1.0)


@pytest.mark.parametrize("mode", MODES)
def test_the_signal_comes_through_unscaled(mode):
    vector = torch.zeros(SIZE)
    vector[7] = 0.4
    means = []
    for draw in range(60):
        what, noise = spec(noise=mode, noise_multiplier=0.2, round=draw), Noise(seed=5)
        means.append(noisy_mean(sent_by(what, range(12), noise, vector), what, noise).numpy())
    mean, error = np.mean(means, 0), what.mean_std / math.sqrt(60)
    assert abs(mean[7] - 12 * 0.4 / 10) < 5 * error
    assert np.abs(np.delete(mean, 7)).max() < 5 * error


def test_without_privacy_the_mean_is_exact():
    what, noise = spec(clip=math.inf, noise_multiplier=0.0, bits=32), Noise()
    vector = torch.linspace(-3, 3, SIZE)
    mean = noisy_mean(sent_by(what, range(5), noise, vector), what, noise)
    assert torch.allclose(mean, vector / 2, atol=1e-6)


@pytest.mark.parametrize("unit", ["client", "user"])
def test_a_trusted_server_clips_a_client_but_not_a_sum_of_users(unit):
    what, noise = spec(noise="central", unit=unit, noise_multiplier=1e-6, bits=32), Noise(seed=6)
    vector = torch.full((SIZE,), 2.0 / math.sqrt(SIZE))  # norm 2: four users of norm C
    mean = noisy_mean(sent_by(what, [0], noise, vector), what, noise)
    assert float(mean.norm()) * what.expected == pytest.approx(0.5 if unit == "client" else 2.0, rel=1e-3)


def test_one_unit_more_moves_a_trusted_servers_sum_by_the_sensitivity(monkeypatch):
    """A sum of 2,000 aligned units: float32 in the message would round it by more than the accountant allows for."""
    monkeypatch.setattr(Noise, "gaussian", lambda self, shape, std, **key: np.zeros(shape))  # rounding alone
    noise, what = Noise(seed=6), spec(noise="central", unit="example", bits=32)
    unit = torch.rand(SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    unit *= what.clip / unit.norm()

    def received(units):
        (sent,) = sent_by(what, [0], noise, units * unit)
        return unpack(sent, what.expects())[1].astype(np.float64)

    moved = [np.linalg.norm(received(units + 1) - received(units)) for units in range(1990, 2010)]
    assert max(moved) <= what.sensitivity * (1 + 1e-9)


# -- clip groups, weights --------------------------------------------------------------------------------------------------------------

GROUPS = tuple(((start, start + 100),) for start in range(0, SIZE, 100))  # 4 groups: the sensitivity is 2 C


@pytest.mark.parametrize("mode", ["distributed", "local"])
def test_noise_is_relative_to_all_groups_at_once(mode):
    what, noise = spec(noise=mode, groups=GROUPS, bits=32), Noise(seed=1)
    assert what.sensitivity == 1.0 and what.ledger_entry("os")["clip"] == 0.5 and what.ledger_entry("os")["clip_groups"] == 4
    codes = [unpack(sent, what.expects())[1] for sent in sent_by(what, range(50), noise)]
    assert_std(np.array(codes), 2.0 * 2 * 0.5 / (1 if mode == "local" else math.sqrt(SHARES)))


WEIGHTS = tuple(2.0 if client < 4 else 0.5 for client in range(SHARES))


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("cohort", [range(0), range(4), range(2, SHARES), range(SHARES)])
def test_weighted_the_noise_is_that_of_the_heaviest_clients_whatever_the_cohort(cohort, bits):
    means = []
    for draw in range(40):
        what, noise = spec(noise="local", bits=bits, round=draw, weights=WEIGHTS, clients=SHARES), Noise(seed=2)
        means.append(noisy_mean(sent_by(what, cohort, noise), what, noise).numpy())
    of_sum = 2.0 * 0.5 * math.sqrt(4 * 4 + 16 / 4)
    assert what.sum_std == pytest.approx(of_sum, rel=1e-12)
    assert_std(np.array(means) * what.expected, of_sum)
    few = dataclasses.replace(what, shares=5)
    assert few.sum_std == pytest.approx(math.sqrt(4 * 4 + 1 / 4), rel=1e-12)


def test_a_weighted_sum_is_accounted_by_the_heaviest_client():
    """The noise of the sum over how far the heaviest client moves it; a message against the server is its own noise alone."""
    what = spec(noise="local", weights=WEIGHTS, clients=SHARES)
    entry = what.ledger_entry("os")
    assert (entry["largest_weight"], entry["noise_multiplier"]) == (2.0, 2.0)
    truth = what.sum_std / (max(WEIGHTS) * what.sensitivity)
    assert sum_multiplier("local", entry["noise_multiplier"], entry["shares"]) == pytest.approx(truth, rel=1e-12)
    assert message_multiplier("local", entry["noise_multiplier"], entry["shares"]) == what.share_std / what.sensitivity
    plain = spec(noise="local").ledger_entry("os")
    assert (plain["shares"], plain["largest_weight"], plain["clip_groups"]) == (SHARES, 1.0, 1)


@pytest.mark.parametrize("each", [False, True])
def test_without_privacy_the_weighted_mean_is_exact(each):
    what, noise = spec(clip=math.inf, noise_multiplier=0.0, bits=32, weights=WEIGHTS, clients=SHARES, each=each), Noise()
    vectors = torch.linspace(-3, 3, SHARES)[:, None] * torch.linspace(0.5, 1, SIZE)
    sent = [message(vector, what, client, noise, encode) for client, vector in enumerate(vectors)]
    mean = decoded_mean(sent, what, noise, lambda code: code) if each else noisy_mean(sent, what, noise)
    assert torch.allclose(mean, (torch.tensor(WEIGHTS)[:, None] * vectors).sum(0) / what.expected, atol=1e-6)


# -- refused messages ------------------------------------------------------------------------------------------------------------------


def refused(what: PrivateSum, noise: Noise) -> dict[str, bytes]:
    """One message for each way of being refused."""
    header, code = what.header(9), np.full(what.size, 1000, np.int16)
    good = pack(header, code)

    def other(**changes):
        return pack(dataclasses.replace(header, **changes), code)

    body = bytearray(good)
    body[-1] ^= 1
    return {
        "WrongVersion": other(protocol="2"),
        "WrongRun": other(run="q"),
        "WrongRound": other(round=what.round + 1),
        "WrongCodec": other(codec="d"),
        "WrongScale": other(scale=2 * what.scale),
        "WrongClient": other(client=what.clients),
        "WrongDtype": pack(header, code.astype(np.int8)),
        "WrongLength": pack(header, code[:-1]),
        "WrongChecksum": bytes(body),
        "Truncated": good[:-1],
        "Oversized": good + b"\0" * 2000,
        "Malformed": good.replace(b'"code"', b'"cod3"'),
        "empty": b"",
        "Duplicate": sent_by(what, [0], noise, torch.full((what.size,), 0.02))[0],
    }


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", refused(spec(), Noise(seed=0)))
def test_a_refused_message_is_the_zero_code_and_the_noise_stays(kind, mode):
    """The mean is bit for bit that of the round without it: nothing of it gets in, nobody can tell."""
    what = spec(noise=mode)
    noise = Noise(seed=7)
    good = sent_by(what, range(3), noise, torch.full((SIZE,), 0.01))
    bad = refused(what, noise)[kind]
    expected = noisy_mean(good, what, noise)
    for place in (1, 3) if kind == "Duplicate" else (0, 1, 3):
        assert torch.equal(noisy_mean([*good[:place], bad, *good[place:]], what, noise), expected)


def test_a_float_message_with_nan_is_the_zero_code():
    what, noise = spec(bits=32), Noise(seed=8)
    good = sent_by(what, [0], noise)
    code = np.zeros(SIZE, np.float32)
    sent = bytearray(pack(what.header(1), code))
    for value in (np.nan, np.inf):
        code[5] = value
        sent[-4 * SIZE :] = code.tobytes()
        assert torch.equal(noisy_mean([*good, bytes(sent)], what, noise), noisy_mean(good, what, noise))


def test_the_noise_of_a_round_with_only_refused_messages_is_whole():
    means = []
    for draw in range(40):
        what, noise = spec(round=draw), Noise(seed=9)
        means.append(noisy_mean(list(refused(what, noise).values())[:-1], what, noise).numpy())
    assert_std(np.array(means) * what.expected, 1.0)


def test_a_hostile_message_is_bounded_by_the_lattice():
    what, noise = spec(bits=8), Noise(seed=10)
    hostile = pack(what.header(1), np.full(SIZE, -128, np.int8))
    moved = noisy_mean([hostile], what, noise) - noisy_mean([pack(what.header(1), np.zeros(SIZE, np.int8))], what, noise)
    assert float(moved.abs().max()) * what.expected <= 128 / 127 * (what.sensitivity + 6 * what.share_std) * (1 + 1e-6)


def test_the_first_of_two_messages_of_a_client_counts():
    what, noise = spec(noise_multiplier=1e-6), Noise(seed=11)
    first, second = (sent_by(what, [4], noise, torch.full((SIZE,), value))[0] for value in (0.01, -0.01))
    assert noisy_mean([first, second], what, noise).mean() > 0
    inbox = Inbox(what.expects())
    inbox.accept(first)
    with pytest.raises(Duplicate):
        inbox.accept(second)


# -- sensitivity -----------------------------------------------------------------------------------------------------------------------


def adversarial() -> torch.Tensor:
    """[units, UPDATE]: what could break a clip."""
    generator = torch.Generator().manual_seed(12)
    normal = torch.randn(300, UPDATE, generator=generator)
    sizes = torch.logspace(-42, 38, 60)
    rows = [
        normal,
        normal / normal.double().norm(dim=1, keepdim=True).float() * 0.5,  # norms of just about C
        normal[:60] * sizes[:, None].clamp(max=1e37),
        torch.full((1, UPDATE), 1e38),
        torch.full((1, UPDATE), -3.4e38),
        torch.full((1, UPDATE), 1e-45),
        torch.zeros(1, UPDATE),
    ]
    for value in (math.nan, math.inf, -math.inf, 1e38, 1e-40):
        one = torch.zeros(1, UPDATE)
        one[0, 3] = value
        rows.append(one)
        mixed = normal[:1].clone()
        mixed[0, 3] = value
        rows.append(mixed)
    return torch.cat(rows)


@pytest.mark.parametrize("clip", [0.5, 1e-3, 0.1, 7.3, 1e6])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("noise_in", ["code", "update"])
def test_no_unit_is_longer_than_the_sensitivity(clip, adaptive, noise_in):
    """In float64, without any tolerance."""
    weight = clip * update_multiplier(2.0, 3.3) / 3.3 if adaptive else 0.0
    what = spec(clip=clip, noise_in=noise_in, bit_weight=weight)
    for encoder in (encode, same):
        vectors = unit_vectors(adversarial(), encoder, what)
        norms = vectors.double().norm(dim=1)
        assert torch.isfinite(vectors).all()
        assert float(norms.max()) <= what.sensitivity
        assert float(norms.max()) > 0.999 * what.sensitivity


@pytest.mark.parametrize("clip", [0.5, 1e-3, 7.3])
@pytest.mark.parametrize("noise_in", ["code", "update"])
def test_no_unit_is_longer_than_all_its_groups_allow(clip, noise_in):
    groups = (((0, 100), (500, UPDATE)), ((100, 500),))
    vectors = unit_vectors(adversarial(), same, spec(clip=clip, noise_in=noise_in, groups=groups))
    norms = vectors.double().norm(dim=1)
    assert torch.isfinite(vectors).all()
    assert float(norms.max()) <= clip * math.sqrt(2) and float(norms.max()) > 0.999 * clip * math.sqrt(2)
    assert float(vectors[:, 100:500].double().norm(dim=1).max()) <= clip


def test_a_unit_that_is_not_finite_is_zero_and_the_others_are_not_touched():
    updates = adversarial()
    spoiled = updates.clone()
    spoiled[5, 17] = math.nan
    what = spec(bit_weight=0.3)
    before, after = unit_vectors(updates, encode, what), unit_vectors(spoiled, encode, what)
    assert not after[5].any()
    others = torch.arange(len(updates)) != 5
    assert torch.allclose(after[others], before[others], atol=1e-7)


def test_the_bits_tell_who_is_within_the_clip():
    updates = torch.zeros(4, UPDATE)
    updates[:, 0] = torch.tensor([0.1, 0.49, 0.51, math.inf])
    bits = unit_vectors(updates, same, spec(bit_weight=0.3))[:, -1]
    assert bits.tolist() == [0.15, 0.15, -0.15, 0.0]


def test_without_privacy_a_non_finite_update_is_an_error():
    updates = torch.ones(2, UPDATE)
    what = spec(clip=math.inf, noise_multiplier=0.0, bits=32)
    assert torch.equal(unit_vectors(updates, same, what), updates)
    updates[1, 1] = math.nan
    with pytest.raises(FloatingPointError):
        unit_vectors(updates, same, what)


@pytest.mark.parametrize("mode", MODES)
def test_code_and_bit_share_one_event(mode):
    """Noise on the code over C and on the bit over its weight: together the configured multiplier (Andrew et al. 2021, theorem 1)."""
    clip, sigma_bit = 0.5, 3.0
    of_sum = spec(noise=mode).sum_std / clip
    left = update_multiplier(of_sum, sigma_bit * 10)
    what = spec(noise=mode, bit_weight=clip * left / (sigma_bit * 10))
    assert what.sum_std / clip == pytest.approx(left, rel=1e-12)
    assert what.sum_std / what.bit_weight == pytest.approx(sigma_bit * 10, rel=1e-12)
    assert (what.sum_std / clip) ** -2 + (2 * what.sum_std / what.bit_weight) ** -2 == pytest.approx(of_sum**-2, rel=1e-12)


# -- the server's step -----------------------------------------------------------------------------------------------------------------


def test_sgd_descends_along_the_update():
    assert torch.allclose(
        ServerOptimizer(torch.ones(2), ServerConfig("sgd", 0.5)).step(torch.tensor([1.0, -2.0])), torch.tensor([0.5, 2.0])
    )


@pytest.mark.parametrize("update", [[math.nan, 0.0], [math.inf, 0.0], [3e38, 1.0]])
def test_a_step_that_is_not_finite_leaves_the_adapter_alone(update):
    optimizer = ServerOptimizer(torch.ones(2), ServerConfig("sgd", 100.0))
    with pytest.raises(FloatingPointError):
        optimizer.step(torch.tensor(update))
    assert torch.equal(optimizer.state()["adapter"], torch.ones(2))


def test_on_a_coarse_lattice_a_drawn_share_weighs_what_a_sent_one_does():
    """Rounding adds a third to a share's variance here: were it missing from the top-up, the cohort's size would show."""
    coarse = {"clip": 50.0, "noise_multiplier": 0.02, "bits": 8}
    variances = []
    for cohort in (2, SHARES):
        sums = []
        for draw in range(100):
            what, noise = spec(round=draw, **coarse), Noise(seed=cohort)
            sums.append(noisy_mean(sent_by(what, range(cohort), noise), what, noise).numpy() * what.expected)
        variances.append(np.var(sums))
    assert abs(variances[0] / variances[1] - 1) < 0.05
    alone = what.share_std**2 * SHARES
    assert abs(variances[1] / alone - 1) > 0.3  # the effect is there to be seen


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [8, 16])
def test_what_is_released_lies_on_the_lattice(mode, bits):
    what, noise = spec(noise=mode, bits=bits), Noise(seed=1)
    steps = noisy_mean(sent_by(what, range(7), noise), what, noise).double() * what.expected / what.scale
    assert (steps - steps.round()).abs().max() < 1e-2 * steps.abs().max().clamp(min=1) / 100


def test_a_linear_schedule_shortens_steps_to_a_last_one_of_lr_over_rounds():
    optimizer = ServerOptimizer(torch.zeros(2), ServerConfig("sgd", lr=0.5))
    steps = [optimizer.step(torch.tensor([1.0, -2.0]), SCHEDULES["linear"](number, 4)) for number in range(4)]
    assert torch.allclose(torch.stack(steps)[:, 0], -0.5 * torch.tensor([1.0, 1.75, 2.25, 2.5]))
    assert SCHEDULES["linear"](3, 4) == 0.25 and SCHEDULES["constant"](3, 4) == 1.0


@pytest.mark.parametrize("steps", [1, 3])
def test_a_client_draws_a_batch_for_each_of_its_steps(steps):
    """Each of its examples in a step's batch as often as any other, none twice, anew in every round; few enough are all taken."""
    records, batch, rounds = 10, 4, 400
    partition = make_partition("iid", records=2 * records, clients=2, unit="client", seed=0)
    seen = []
    engine = SimpleNamespace(layout=SimpleNamespace(size=2), updates=lambda data, units, *_: seen.extend(units) or iter(()))
    setting = SimpleNamespace(partition=partition, train=Encoded([[1]] * 2 * records, np.zeros(2 * records)), engine=engine)

    def drawn(size, rounds):
        seen.clear()
        config = Config()
        config.federation.local.steps, config.federation.local.batch = steps, size
        simulation = Simulation(setting, config, Noise(seed=1), Stopwatch())
        for number in range(rounds):
            list(simulation.messages_of(np.array([1]), spec(round=number), same))
        return list(seen)

    own = partition.records(1)
    batches = np.stack(drawn(batch, rounds)).reshape(-1, batch)
    assert len(batches) == steps * rounds and all(len(set(row)) == batch for row in batches.tolist())
    counts = np.array([(batches == record).sum() for record in own])
    spread = len(batches) * batch / records * (1 - batch / records)
    assert counts.sum() == batches.size  # nobody else's
    assert stats.chi2(records - 1).cdf(((counts - batches.size / records) ** 2 / spread).sum() * (records - 1) / records) < 0.9999
    assert len({tuple(sorted(row)) for row in batches.tolist()}) > 150  # of 210 there are
    assert all(np.array_equal(unit, own) for unit in (*drawn(records, 2), *drawn(None, 2)))
