"""Example-level DP-SGD: who is sampled, what is summed, and that the size of the sample stays a secret."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel
from scipy import stats
from transformers import AutoModelForCausalLM

from dr_encoder.message import unpack
from fedllm import federation, run
from fedllm.data.batches import make_batches
from fedllm.data.partition import make_partition
from fedllm.privacy.clipping import clip_units
from fedllm.privacy.ledger import read_ledger
from fedllm.privacy.noise import Noise
from fedllm.release import PrivateSum
from fedllm.schema import Config
from fedllm.server import noisy_mean
from fedllm.setting import build
from fedllm.stopwatch import Stopwatch
from fedllm.training.engine import Encoded
from fedllm.transports.simulation import Simulation
from tests.fedllm.runs import EXAMPLES, ONE_CLIENT, USERS, adapter_of, scalars, told

pytestmark = pytest.mark.usefixtures("one_thread")


def spec(size, clients, rate, records, **changes):
    values = {
        "run": "r", "stage": 2, "round": 0, "codec": "c", "prior": "p", "size": size, "clip": 0.05, "noise": "central",
        "noise_in": "code", "noise_multiplier": 1e-9, "shares": clients, "sampling_rate": rate, "max_cohort": None,
        "expected": rate * records, "unit": "example", "clients": clients, "bits": 32,
    }  # fmt: skip
    return PrivateSum(**(values | changes))


def same(updates):
    return updates


@pytest.fixture
def simulation(configured):
    """simulation(overrides...): the tiny model and its clients, with a seeded source of randomness."""

    def make(*overrides):
        config = configured("run", *EXAMPLES, *overrides)
        setting = build(config, 0)
        return Simulation(setting, config, Noise(seed=4), Stopwatch())

    return make


def test_every_example_is_in_the_sample_by_its_own_coin():
    clients, records, rate, rounds = 3, 60, 0.3, 600
    partition = make_partition("iid", records=records, clients=clients, unit="example", seed=0)
    taken = np.zeros((rounds, records), bool)

    def updates(data, units, *_):
        assert all(len(unit) == 1 for unit in units)
        assert not taken[number, [unit[0] for unit in units]].any()  # each once
        taken[number, [unit[0] for unit in units]] = True
        return iter(())

    def halves(data, units):
        return [np.arange(len(units))[::2], np.arange(len(units))[1::2]]

    engine = SimpleNamespace(layout=SimpleNamespace(size=2), updates=updates, batches=halves)
    setting = SimpleNamespace(partition=partition, train=Encoded([[1]] * records, np.zeros(records)), engine=engine)
    simulation = Simulation(setting, Config(), Noise(seed=1), Stopwatch())
    for number in range(rounds):
        assert len(list(simulation.messages(spec(2, clients, rate, records, round=number), same))) == clients
    counts, sizes = taken.sum(0), taken.sum(1)
    spread = rounds * rate * (1 - rate)
    assert stats.chi2(records).cdf(((counts - rounds * rate) ** 2 / spread).sum()) < 0.9999
    assert abs(sizes.var() / (records * rate * (1 - rate)) - 1) < 5 * np.sqrt(2 / rounds)  # no fixed size, no pairs that go together
    assert abs(np.corrcoef(taken.T) - np.eye(records)).max() < 5.5 / np.sqrt(rounds)
    assert len({tuple(row) for row in taken}) == rounds


def test_the_mean_is_clipped_examples_over_the_expected_batch(simulation):
    made = simulation()
    engine, train, partition = made.setting.engine, made.setting.train, made.setting.partition
    engine.load(engine.adapter() + 0.1 * torch.randn(engine.layout.size, generator=torch.Generator().manual_seed(1)))
    what = spec(engine.layout.size, partition.clients, 0.4, len(train), round=3)
    found = noisy_mean(made.messages(what, same), what, made.noise)
    total, norms = torch.zeros(engine.layout.size, dtype=torch.float64), []
    for client in range(partition.clients):
        ids = partition.unit_ids(client)
        draws = Noise(seed=4).uniform((len(ids),), purpose="units", stage=2, round=3, client=client)
        for example in ids[draws < 0.4]:
            losses, _ = engine.objective(
                engine.model, next(make_batches([train.tokens[example]])), torch.tensor([int(train.targets[example])])
            )
            losses.sum().backward()
            gradient = engine.layout.flatten({name: value.grad for name, value in engine.parameters.items()})
            for value in engine.parameters.values():
                value.grad = None
            norms.append(float(gradient.norm()))
            total += clip_units(gradient[None], what.clip)[0].double()
    assert min(norms) < what.clip < max(norms) and len(norms) != round(what.expected)
    assert (found.double() * what.expected - total).norm() <= 1e-4 * total.norm()


def test_slices_and_chunks_change_nothing(simulation, monkeypatch):
    made = simulation()
    size = made.setting.engine.layout.size
    what = spec(size, made.setting.partition.clients, 0.5, len(made.setting.train))
    whole = noisy_mean(made.messages(what, same), what, made.noise)
    monkeypatch.setattr("fedllm.transports.simulation.SLICE_BYTES", 4 * size * 3)
    assert torch.allclose(noisy_mean(made.messages(what, same), what, made.noise), whole, atol=1e-7)
    monkeypatch.setattr("fedllm.transports.simulation.SLICE_BYTES", 8 * size)  # one client at a time
    assert torch.allclose(noisy_mean(made.messages(what, same), what, made.noise), whole, atol=1e-7)
    monkeypatch.setattr("fedllm.training.engine.CHUNK_BYTES", 4 * size * 7)
    assert torch.allclose(noisy_mean(made.messages(what, same), what, made.noise), whole, atol=1e-7)


@pytest.mark.parametrize("noise", ["central", "distributed", "local"])
def test_an_empty_sample_is_a_message_like_any_other(noise, simulation):
    """Same number of bytes, and the whole noise: nobody sees that there was nothing in it."""
    made = simulation()
    size, clients = made.setting.engine.layout.size, made.setting.partition.clients
    full, empty = (
        spec(size, clients, rate, 120, expected=50.0, noise=noise, noise_multiplier=3.0, bits=bits)
        for rate, bits in ((1.0, 16 if noise != "central" else 32), (1e-12, 16 if noise != "central" else 32))
    )
    sent = [list(made.messages(what, same)) for what in (full, empty)]
    assert [len(each) for each in sent[0]] == [len(each) for each in sent[1]] and len(sent[1]) == clients
    if noise == "central":
        assert not any(unpack(each, empty.expects())[1].any() for each in sent[1])
    values = noisy_mean(sent[1], empty, made.noise).numpy() / empty.mean_std
    assert stats.kstest(values, "norm").pvalue > 1e-4 and abs(values.var() - 1) < 5 * np.sqrt(2 / size)


def test_a_run_whose_samples_are_empty(configured, tmp_path, no_plot):
    results = run.train(configured("run", *EXAMPLES, "federation.unit_sampling_rate=1e-6", "privacy.target.epsilon=1"))
    assert results["rounds"] == 2 and results["expected_cohort"] == pytest.approx(120e-6)


def test_no_output_depends_on_the_sample_but_through_the_noisy_mean(configured, tmp_path, monkeypatch, capfd):
    """Nobody sampled, everybody sampled, and one and the same noisy mean: everything a run tells is equal."""
    monkeypatch.setattr(federation, "noisy_mean", lambda messages, spec, noise: list(messages) and torch.linspace(-0.1, 0.2, spec.size))
    drawn, everything, sizes = Noise.uniform, [], []
    for value in (0.0, 0.999):
        monkeypatch.setattr(run, "new_run_id", lambda config, value=value: f"{value:016.3f}".replace(".", "0"))

        def draw(self, shape, *, purpose, value=value, **key):
            if purpose == "units":
                sizes.append(value)
                return np.full(shape, value)
            return drawn(self, shape, purpose=purpose, **key)

        monkeypatch.setattr(Noise, "uniform", draw)
        results = run.train(configured("run", *EXAMPLES, "seed=1"))
        folder = tmp_path / "run"
        shown = re.sub(r"[\d.]+ (s|min)\b", "TIME", re.sub(r"about .* left", "", capfd.readouterr().err))
        board = {tag: values for tag, values in scalars(folder).items() if tag != "seconds/round"}
        everything.append((told(results), read_ledger(folder / "ledger.jsonl")[1], shown, board, adapter_of(folder)))
        folder.rename(tmp_path / f"run{value}")
    assert set(sizes) == {0.0, 0.999}
    assert everything[0] == everything[1]


def test_one_client_alone_trains_and_its_adapter_reloads(tiny, configured, tmp_path, no_plot, monkeypatch):
    """EW-Tune's setting: all data in one place, the noise added there. The adapter on disk is the one that learned."""
    built = []
    real = run.build
    monkeypatch.setattr(run, "build", lambda *args, **kwargs: built.append(real(*args, **kwargs)) or built[-1])
    settings = [
        *EXAMPLES, *ONE_CLIENT, "federation.rounds=10", "federation.unit_sampling_rate=0.5", "federation.server.lr=0.05", "codec.refresh=0",
        "codec.family=identity", "codec.code_size=null", "privacy.target.epsilon=300", "seed=2",
        "lora.r=4", "lora.targets=[q_proj,v_proj,o_proj,up_proj,down_proj]",
    ]  # fmt: skip
    results = run.train(configured("run", *settings))
    assert results["clients"] == 1 and results["expected_cohort"] == 60 and results["epsilon"]["unit"] == "example"
    assert results["loss"] < 0.6 * results["loss_before"] and results["accuracy"] > results["accuracy_before"] + 0.2
    header, entries = read_ledger(tmp_path / "run" / "ledger.jsonl")
    assert (header["units"], header["clients"]) == (120, 1) and len(entries) == 10
    assert {(entry["unit"], entry["sampling_rate"], entry["max_cohort"]) for entry in entries} == {("example", 0.5, None)}
    ids = torch.tensor([[5, 9, 2, 7], [1, 3, 3, 8]])
    base = AutoModelForCausalLM.from_pretrained(tiny / "model", attn_implementation="eager").eval()
    with torch.no_grad():
        untrained, trained = base(ids).logits, built[0].engine.model(input_ids=ids).logits
        reloaded = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()(ids).logits
    assert torch.allclose(reloaded, trained, atol=1e-5) and (trained - untrained).abs().max() > 0.1
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results


def test_an_example_is_the_same_one_whoever_holds_it(configured):
    """What `privacy report` composes by; for clients the split decides who is who."""
    column = ["federation.partition.kind=column", "task.columns.user=user"]
    iid = ["federation.partition.kind=iid", "task.columns.user=user"]
    assert run.population(configured("a", *EXAMPLES, *iid)) == run.population(configured("b", *EXAMPLES, *column))
    assert run.population(configured("c", *iid)) != run.population(configured("d", *column))


def test_where_public_text_stands_says_nothing_of_who_is_who(configured):
    assert run.population(configured("a")) == run.population(configured("b", "task.columns.public=body"))


@pytest.mark.parametrize("unit", [EXAMPLES, USERS])
def test_clients_share_batches_and_keep_their_own_sums(unit, simulation):
    """Many clients of few units train at the speed of full batches; each message is the sum of its own client's units."""
    made = simulation(*unit, "federation.unit_sampling_rate=0.9", "federation.clients=7")
    engine = made.setting.engine
    size = engine.layout.size
    what = spec(size, 7, 0.9, len(made.setting.train), unit=unit[0].partition("=")[2], clip=1e6)
    passes = []
    engine.model.get_base_model().model.register_forward_hook(lambda *_: passes.append(1))
    sent = [unpack(each, what.expects())[1] for each in made.messages(what, same)]
    together = len(passes)
    assert together < 4 and len(sent) == 7
    alone = np.zeros((7, size))
    for client in range(7):
        units = made._sampled(client, what)
        for _, updates in engine.updates(made.setting.train, units):
            alone[client] += updates.double().sum(0).numpy()
    assert len(passes) - together > 4  # what it would be client by client
    np.testing.assert_allclose(sent, alone, atol=1e-5)
    assert sum(row.any() for row in alone) > 4
