"""What the tests of whole runs share: settings, and what is read back from a run folder."""

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

MOMENTS = ["codec.family=coordinate", "codec.prior=moments"]
AUTOENCODER = ["codec.family=autoencoder", "codec.code_size=null"]
USERS = ["privacy.unit=user", "task.columns.user=user", "federation.unit_sampling_rate=0.5", "federation.clients=4"]
EXAMPLES = ["privacy.unit=example", "federation.unit_sampling_rate=0.2", "federation.clients=4"]
ONE_CLIENT = ["federation.clients=1", "privacy.noise=central", "codec.bits=32"]
LOSSY = ["privacy.enabled=false", "codec.error_feedback=true"]
IDENTITY = ["codec.family=identity", "codec.code_size=null"]
FEDAVG = ["federation.server.optimizer=fedavg", "federation.server.lr=1", "federation.local.steps=2", "federation.local.lr=0.5"]
PRODUCTS = [*IDENTITY, *FEDAVG, "privacy.noise=local"]
SETTINGS = {
    "client fit": ["seed=5", "codec.fit_at=client", "codec.refresh=2", "federation.rounds=3"],
    "mixture": ["seed=5", "codec.prior=public+released+random", "codec.refresh=1", "federation.rounds=3"],
    "feedback": ["seed=5", "codec.family=topk", "codec.code_size=60", *LOSSY, "federation.rounds=3"],
    "public": ["seed=5", "codec.refresh=2", "federation.rounds=3"],
    "code space": ["seed=5", "federation.server.space=code", "codec.refresh=1", "federation.rounds=3"],
    "memory": ["seed=5", "codec.public_memory=2", "codec.refresh=1", "federation.rounds=3"],
    "core": ["seed=5", "lora.train=core", "lora.init=public", "codec.code_size=4"],
    "stack": ["seed=5", *PRODUCTS, "federation.aggregation=stack", "federation.rounds=3"],
    "residual": ["seed=5", *PRODUCTS, "federation.aggregation=residual", "federation.rounds=3"],
    "moments": ["seed=5", *MOMENTS, "privacy.clip.mode=adaptive", "federation.server.optimizer=momentum"],
}


class Killed(BaseException):
    """Stands for a kill: nothing in the project may catch it."""


def adapter_of(run_dir):
    return (run_dir / "adapter" / "adapter_model.safetensors").read_bytes()


def scalars(run_dir):
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def told(results):
    """What a run says apart from times, memory."""
    kept = {key: value for key, value in results.items() if key not in ("seconds", "peak_memory_bytes", "history")}
    return kept, [{key: value for key, value in record.items() if key != "seconds"} for record in results["history"]]
