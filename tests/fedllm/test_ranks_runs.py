"""Whole runs on two ranks (`parallel.mode: clients`) beside the same runs in one process: adapters, ledgers, epsilons."""

import json

import pytest
import torch
from safetensors.torch import load_file

from fedllm import run
from fedllm.config import load_config
from fedllm.federation import Federation
from fedllm.privacy.ledger import counted, read_ledger
from tests.fedllm.runs import AUTOENCODER, EXAMPLES, FEDAVG, IDENTITY, LOSSY, MOMENTS, PRODUCTS, USERS, Killed
from tests.fedllm.test_ranks import ended, start

pytestmark = pytest.mark.usefixtures("one_thread")

ATOL = 2e-6  # adapters are of the size 0.1 .. 1, in float32; gradients of clients are summed in other batches
OF_PRODUCTS = 1e-4  # these are factors of a whole matrix again, by its singular vectors; one process with its clients reversed moves 2e-5
SGD = ["federation.server.optimizer=sgd", "federation.server.lr=0.02"]
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
    "state": ["method=dp_fedlora:published"],
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
    found, expected = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (two, one))
    assert found.keys() == expected.keys()
    atol = OF_PRODUCTS if name in ("stack", "residual") else ATOL
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=atol, rtol=1e-4)
