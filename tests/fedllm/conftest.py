"""A made-up finished run, for the tests of what users see; real runs of a tiny model, and their sudden ends."""

import itertools
import json

import pytest

from fedllm import run
from fedllm.config import load_config
from fedllm.monitor import Monitor
from fedllm.privacy.ledger import read_ledger
from tests.fedllm.runs import SETTINGS, Killed, adapter_of

RAW = 1_843_200
SHARE = "each message is protected by its own noise share alone"


def answer(epsilon, relation, accountant, reason=None):
    return {"epsilon": epsilon, "relation": relation, "accountant": accountant, "kind": "bound", "reason": reason}


def history(rounds, accuracy, epsilon, server):
    """Round 0 has no privacy figures yet."""
    records = [{"round": 0, "accuracy": 0.755 if accuracy else None, "loss": 0.55}]
    for done in range(1, rounds + 1):
        share = done / rounds
        records.append(
            {
                "round": done,
                "accuracy": 0.755 + (accuracy - 0.755) * share if accuracy else None,
                "loss": 0.55 - 0.1 * share,
                "epsilon_release": epsilon and epsilon * share,
                "epsilon_server": server and server * share,
                "noise_to_signal": epsilon and 2 / done,
                "aggregate_norm": 0.3 / done,
                "clip": epsilon and 0.02,
                "uplink_bytes_per_client": 611,
                "downlink_bytes_per_client": RAW,
                "seconds": 31.25,
            }
        )
    return records


@pytest.fixture
def fake_results():
    """make(method, epsilon, server, accuracy, up, why, rounds): what results.json holds."""

    def make(method="dr_encoder", epsilon=7.999, server=900.0, accuracy=0.824, up=611, why=(), rounds=4):
        no_noise = None if epsilon else "no noise"
        no_server = SHARE if server else no_noise or "none: trusted"
        seconds = {"setup": 40.0, "stage1": 0.0, "local_training": 90.0, "codec": 4.0, "privacy": 3.0, "messages": 2.0}
        return {
            "method": method,
            "task": "movie-reviews",
            "model": "smollm2-135m",
            "rounds": rounds,
            "accuracy": accuracy,
            "loss": 0.41,
            "accuracy_before": 0.762 if accuracy else None,
            "loss_before": 0.5512,
            "epsilon": {
                "delta": 1e-4,
                "unit": "client",
                "private": not why,
                "why_not_private": list(why),
                "release": answer(epsilon, "add-or-remove-one", "pld", no_noise),
                "server": answer(server, "replace-one", "gdp", no_server),
            },
            "uplink_bytes_per_client_round": up,
            "downlink_bytes_per_client_round": RAW,
            "update_bytes": RAW,
            "compression_ratio": RAW / up,
            "parameters": RAW // 4,
            "code_size": 128,
            "codec_bytes": 235_929_600,
            "clients": 2000,
            "expected_cohort": 100,
            "diagnostics": None,
            "seconds": seconds | {"server": 1.0, "evaluation": 60.0, "total": 200.0},
            "peak_memory_bytes": 2_310_000_000,
            "seed": None,
            "versions": {"torch": "2.13.0"},
            "history": history(rounds, accuracy, epsilon, server),
        }

    return make


@pytest.fixture
def run_folder(tmp_path):
    """make(name, results): a finished run's folder; without results an unfinished one."""

    def make(name, results=None):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("seed: null\n")
        if results is not None:
            (folder / "results.json").write_text(json.dumps(results))
        return folder

    return make


@pytest.fixture
def configured(tiny, tmp_path):
    """configured(name, overrides...): the tiny config, to be run into tmp_path/name."""

    def make(name="run", *overrides):
        return load_config(tiny / "config.yaml", [f"output_dir={tmp_path / name}", *overrides])

    return make


@pytest.fixture
def no_plot(monkeypatch):
    monkeypatch.setattr(Monitor, "finish", lambda self, results, history: None)


@pytest.fixture
def kill_at(monkeypatch):
    """kill_at(owner, name, call, after): the numbered call (from 1) of owner.name dies, before or after its work."""

    def arm(owner, name, call=1, after=False):
        real, calls = getattr(owner, name), itertools.count(1)

        def wrapped(*args, **kwargs):
            now = next(calls) == call
            if now and not after:
                raise Killed
            result = real(*args, **kwargs)
            if now:
                raise Killed
            return result

        monkeypatch.setattr(owner, name, wrapped)
        return lambda: monkeypatch.setattr(owner, name, real)

    return arm


REFERENCE = {}


@pytest.fixture
def reference(configured, tmp_path, no_plot):
    """reference(setting): adapter, results and ledger entries of an uninterrupted seeded run; its folder is that of whoever asked first."""

    def get(setting):
        if setting not in REFERENCE:
            results = run.train(configured(f"whole-{setting}", *SETTINGS[setting]))
            folder = tmp_path / f"whole-{setting}"
            REFERENCE[setting] = adapter_of(folder), results, read_ledger(folder / "ledger.jsonl")[1]
        return REFERENCE[setting]

    return get


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache folder of the test's own: what is written in it is written by the test."""
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path / "cache"))
