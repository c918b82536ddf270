"""Whole runs on two ranks (`parallel.mode: clients`) beside the same runs in one process: adapters, ledgers, epsilons."""

import json

import pytest
from safetensors.torch import load_file

from fedllm import run
from fedllm.config import load_config
from fedllm.federation import Federation
from fedllm.privacy.ledger import counted, read_ledger
from fedllm.setting import build
from tests.fedllm.runs import AUTOENCODER, EXAMPLES, FEDAVG, IDENTITY, LOSSY, MOMENTS, PRODUCTS, USERS, Killed
from tests.fedllm.test_ranks import ended, start

pytestmark = pytest.mark.usefixtures("one_thread")

# Largest difference beside the way that training moved a factor: gradients of clients are summed in other batches. Never beside the numbers
# themselves, which LoRA's random start makes large.
OFF = 1e-4
ROUNDING = 1e-7  # of the largest number, in float32
SGD = ["federation.server.optimizer=sgd", "federation.server.lr=0.5"]
SETTINGS = {
    "public": ["codec.refresh=1"],
    "client fit": ["codec.fit_at=client", "lora.init=public"],
    "model's labels": ["codec.public_labels=model"],
    "moments": [*MOMENTS, "privacy.clip.mode=adaptive"],
    "autoencoder": [*AUTOENCODER, "privacy.noise=local"],
    "mixture": ["codec.prior=public+released+random", "codec.refresh=1"],
    "core": ["lora.train=core", "lora.init=public", "codec.code_size=4"],
    "central": [*IDENTITY, "privacy.noise=central", "privacy.noise_in=update"],
    "users": [*USERS],
    "examples": [*EXAMPLES],
    "steps": ["federation.local.steps=2", "federation.local.lr=0.5", "federation.local.prox=0.1"],
    "feedback": ["codec.family=topk", "codec.code_size=60", *LOSSY, "federation.rounds=3"],
    "state": ["method=dp_fedlora:published", "federation.server.optimizer=fedavg", "federation.server.lr=1"],
    # Under noise the products of adapters are so large that the order of clients alone moves the fourth digit.
    "stack": [*PRODUCTS, "federation.aggregation=stack", "privacy.enabled=false"],
    "residual": [*PRODUCTS, "federation.aggregation=residual", "privacy.enabled=false"],
    "fedavg": [*IDENTITY, *FEDAVG, "privacy.noise=local"],
}
INTERRUPTED = ["feedback", "core", "residual"]  # with something else to take up than the adapter
WHOLE = """
import json
from fedllm import run
from fedllm.config import load_config
for name, overrides in json.loads({settings!r}).items():
    run.train(load_config({config!r}, [*overrides, "parallel.mode=clients", "output_dir=" + {folder!r} + "/" + name]))
for name in {interrupted!r}:
    run.resume({folder!r} + "/interrupted-" + name)
return 0
"""


def overrides(name: str) -> list[str]:
    return ["seed=5", *SGD, *SETTINGS[name]]


@pytest.fixture(scope="module")
def two_ranks(tiny, tmp_path_factory):
    """The folder of all settings' runs, each on two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    settings = json.dumps({name: overrides(name) for name in SETTINGS})
    for name in INTERRUPTED:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Federation, "record", killed_in_round(2, Federation.record))
            with pytest.raises(Killed):
                run.train(load_config(tiny / "config.yaml", [*overrides(name), f"output_dir={folder / f'interrupted-{name}'}"]))
    work = WHOLE.format(settings=settings, config=str(tiny / "config.yaml"), folder=str(folder), interrupted=INTERRUPTED)
    (status, _, error), other = ended(start(work, worker="fedllm.parallel.worker.Worker"), timeout=300)
    assert status == 0, error
    assert other == (0, "", "")
    return folder


def killed_in_round(number: int, record):
    """A `Federation.record` that dies in that round, after the server's step and before the checkpoint."""

    def call(self, spec, code, begun):
        if spec.round + 1 == number:
            raise Killed
        return record(self, spec, code, begun)

    return call


def begun(tiny, given, folder):
    """The numbers that a run begins with."""
    build(load_config(tiny / "config.yaml", given), 5).engine.save(folder)
    return numbers(folder)


def numbers(folder):
    """An adapter's factors, and the product of each pair, by name."""
    factors = load_file(folder / "adapter_model.safetensors")
    firsts = [key for key in factors if "lora_A" in key]
    return factors | {key.replace("lora_A", "product"): factors[key.replace("lora_A", "lora_B")] @ factors[key] for key in firsts}


@pytest.mark.parametrize("name", [*SETTINGS, *(f"interrupted-{name}" for name in INTERRUPTED)])
def test_two_ranks_do_what_one_process_does(name, two_ranks, tiny, tmp_path, no_plot):
    two, name = two_ranks / name, name.removeprefix("interrupted-")
    alone = run.train(load_config(tiny / "config.yaml", [*overrides(name), f"output_dir={tmp_path / 'one'}"]))
    one = tmp_path / "one"
    (header, spent), (expected_header, expected_spent) = (read_ledger(folder / "ledger.jsonl") for folder in (two, one))
    assert header == expected_header and counted(spent) == expected_spent
    results = json.loads((two / "results.json").read_text())
    assert results["epsilon"] == alone["epsilon"]
    assert results["loss"] == pytest.approx(alone["loss"], rel=1e-4)
    start = begun(tiny, overrides(name), tmp_path / "start")
    found, expected = (numbers(folder / "adapter") for folder in (two, one))
    assert found.keys() == expected.keys() == start.keys()
    for key, value in expected.items():
        if name in ("stack", "residual") and "product" not in key:
            continue  # factors of a whole matrix again, by its singular vectors
        moved = (value - start[key]).abs().max()
        assert moved > 0 or "lora_A" in key  # which stands still as long as B is zero
        assert (found[key] - value).abs().max() <= OFF * moved + ROUNDING * value.abs().max()
