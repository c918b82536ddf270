"""The config: what is refused, in which words."""

import dataclasses
import functools
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest

from dr_encoder.codecs import CODECS
from fedllm.combinations import AGGREGATIONS, CHAINS, SERVER_OPTIMIZERS, fit_rows, held_out_rows
from fedllm.config import Config, check_keys, load_config, save_config
from fedllm.errors import UserError
from fedllm.methods import METHODS

CONFIGS = Path(__file__).parents[2] / "configs"
EXAMPLE = ["privacy.unit=example", "federation.unit_sampling_rate=0.5"]
PLAIN_AVERAGE = "expected federation.server.optimizer=fedavg, lr=1 and schedule=constant"
PRODUCT = ["federation.server.optimizer=fedavg", "federation.server.lr=1", "privacy.noise=local"]
USER = ["privacy.unit=user", "task.columns.user=user", "federation.unit_sampling_rate=0.5"]


@pytest.fixture
def write(tmp_path):
    def make(text: str = "", name: str = "config.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return make


@pytest.fixture
def empty(write):
    return write()


# -- reading ---------------------------------------------------------------------------------------------------------------------------


def test_an_empty_file_is_the_defaults(empty):
    assert load_config(empty) == Config()


def test_later_wins_file_then_command_line(write):
    path = write("federation: {rounds: 7, clients: 50}\nlora: {targets: [k_proj]}\nseed: 3\n")
    config = load_config(path, ["federation.rounds=9", "federation.expected_cohort=5", "privacy.clip.norm=0.5", "lora.targets=[a,b]"])
    assert (config.federation.rounds, config.federation.clients, config.seed) == (9, 50, 3)
    assert config.privacy.clip.norm == 0.5 and config.lora.targets == ["a", "b"]
    assert load_config(path, ["seed=null", "federation.expected_cohort=5"]).seed is None


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configs_of_the_repository_are_right(path):
    assert load_config(path).task.source


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["method=full_noise"],
        ["method=fedit", "seed=4"],
        ["codec.family=autoencoder", "codec.code_size=null", "codec.prior=moments", "privacy.clip.mode=adaptive"],
        [*USER, "privacy.clip.norm=0.25", "task.words=[good,bad]", 'task.prompt="{text}: is it good?"'],
    ],
)
def test_a_saved_config_reads_back_as_it_was(overrides, empty, tmp_path):
    config = load_config(empty, overrides)
    save_config(config, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml") == config
    assert dataclasses.asdict(load_config(tmp_path / "again.yaml")) == dataclasses.asdict(config)


@pytest.mark.parametrize("name", list(METHODS))
def test_a_method_fixes_its_parts_and_no_more(name, empty):
    config = load_config(empty, [f"method={name}", "federation.rounds=3", *USER[1:]])
    for key, value in METHODS[name].parts.items():
        assert functools.reduce(getattr, key.split("."), config) == value
    assert config.federation.rounds == 3


def test_without_privacy_nothing_is_quantized(empty):
    assert load_config(empty, ["privacy.enabled=false"]).codec.bits == 32


@pytest.mark.parametrize(
    ("overrides", "space"),
    [
        ([], "code"),
        (["codec.family=kronecker"], "code"),
        (["privacy.enabled=false"], "code"),
        (["federation.server.optimizer=sgd"], "update"),
        (["codec.family=autoencoder", "codec.code_size=null"], "update"),
        (["codec.prior=moments"], "update"),
        (["codec.decode=each", "privacy.noise=local"], "update"),
        (["method=full_noise"], "update"),
        (["method=cg_fedllm", "codec.code_size=null"], "update"),
        (["method=dp_fedlora:published"], "update"),
    ],
)
def test_the_server_steps_along_codes_where_there_is_a_linear_one(overrides, space, empty):
    empty.write_text("federation: {server: {space: code}}")
    assert load_config(empty, overrides).federation.server.space == space


def test_public_rows_are_either_fitted_or_held_out():
    for count in range(5, 200):
        assert fit_rows(count) + held_out_rows(count) == count and held_out_rows(count) >= 1


# -- keys and types --------------------------------------------------------------------------------------------------------------------


def refusal(path, *overrides) -> str:
    with pytest.raises(UserError) as error:
        load_config(path, list(overrides))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("privacy.target.epsilom=3", "did you mean privacy.target.epsilon?"),
        ("federation.round=3", "did you mean federation.rounds?"),
        ("modell=x", "did you mean model?"),
        ("methd=x", "did you mean method?"),
        ("federation.server.learning=3", "expected one of optimizer, lr"),
        ("zzz=1", "expected one of model, task"),
        ("task.columns.txt=a", "did you mean task.columns.text?"),
    ],
)
def test_an_unknown_key_gets_the_nearest_right_one(override, hint, empty, write):
    key = override.split("=")[0]
    assert f"command line: unknown config key {key}; {hint}" in refusal(empty, override)
    nested = "1"
    for part in reversed(key.split(".")):
        nested = f"{{{part}: {nested}}}"
    path = write(nested, "file.yaml")
    assert f"{path}: unknown config key {key}; {hint}" in refusal(path)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("federation.rounds=many", "federation.rounds"),
        ("federation.rounds=2.5", "federation.rounds"),
        ("federation.rounds=true", "federation.rounds"),
        ("federation.rounds=", "federation.rounds"),
        ("federation.rounds=null", "federation.rounds"),
        ("privacy.enabled=maybe", "privacy.enabled"),
        ("privacy.target.epsilon=lots", "privacy.target.epsilon"),
        ("lora.targets=q_proj", "lora.targets"),
        ("federation.max_cohort=[3]", "federation.max_cohort"),
        ("seed=yes please", "seed"),
        ("model=smollm2-135m", "model"),
        ("privacy.clip=3", "privacy.clip"),
        ("federation.server.betas=[0.9,x]", "federation.server.betas"),
        ("model.name=null", "model.name"),
    ],
)
def test_a_wrong_type_names_the_key(override, key, empty):
    assert key in refusal(empty, override)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=abc", "a whole number"),
        ("lora.r=2,4", "a whole number"),
        ("federation.server.lr=fast", "a number"),
        ("privacy.enabled=maybe", "true or false"),
        ("lora.targets=q_proj", "a list in brackets, such as [q_proj,v_proj]"),
        ("federation.server.betas=3", "a list of numbers in brackets, such as [0.9,0.999]"),
    ],
)
def test_a_wrong_type_says_where_and_what_would_be_right(override, expected, empty, write):
    assert refusal(empty, override) == f"command line: {override}: expected {expected}"
    key, value = override.split("=")
    nested = f"{key.rpartition('.')[2]}: {value}"
    for section in reversed(key.split(".")[:-1]):
        nested = f"{section}: {{{nested}}}"
    path = write(nested.replace("2,4", '"2,4"'), "file.yaml")
    assert refusal(path) == f"{path}: {override}: expected {expected}"


def test_no_value_below_a_section_says_which_key(empty):
    assert refusal(empty, "privacy=false") == "command line: privacy expected a mapping, got False; set privacy.enabled, say"


def test_epsilon_infinity_says_how_to_train_without_privacy(empty):
    assert "privacy.enabled=false trains without privacy" in refusal(empty, "privacy.target.epsilon=inf")
    assert refusal(empty, "federation.server.lr=inf") == "federation.server.lr=inf: expected a finite number, 0 < federation.server.lr"


def test_clients_by_a_column_need_its_name_before_anything_is_loaded(empty):
    told = refusal(empty, "federation.partition.kind=column")
    assert told.endswith("expected task.columns.user, the column that names the client, got null")
    assert refusal(empty, "lora.targets=[]").startswith("lora.targets=[]: expected the names")


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words", "a: [1, 2", "a: b: c", "\x00", "seed: ${nowhere.to.be.found}"])
def test_a_file_that_is_no_config_is_one_line(text, write):
    assert "config.yaml" in refusal(write(text))


def test_a_file_that_is_not_text_is_one_line(tmp_path):
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00seed")
    assert "config.yaml" in refusal(tmp_path / "config.yaml")


def test_no_file(tmp_path):
    assert "no such config file" in refusal(tmp_path / "none.yaml")
    assert "no such config file" in refusal(tmp_path)


def test_a_mapping_over_a_list_is_one_line(write):
    refusal(write("task: {words: [a, b]}"), "task.words.x=1")


@pytest.mark.parametrize("override", ["rounds", "=3", "--rounds", ""])
def test_an_override_without_key_or_value(override, empty):
    assert "expected key=value" in refusal(empty, override)


def test_the_schema_is_checked_to_the_bottom():
    check_keys({"privacy": {"target": {"epsilon": 1}}}, Config, "here")
    with pytest.raises(UserError, match=r"here: unknown config key privacy\.target\.epsilo"):
        check_keys({"privacy": {"target": {"epsilo": 1}}}, Config, "here")


# -- values ----------------------------------------------------------------------------------------------------------------------------

NAMES = {
    "model.dtype": "float31", "task.kind": "lables", "lora.train": "a", "federation.partition.kind": "idd",
    "federation.server.optimizer": "adm", "federation.aggregation": "stak", "lora.init": "publik",
    "federation.transport": "simulate", "codec.bits": "12", "codec.family": "linaer",
    "codec.prior": "publik", "codec.fit_at": "clients", "privacy.unit": "clients", "privacy.noise": "centrl", "privacy.noise_in": "codes",
    "codec.public_labels": "models",
    "privacy.clip.mode": "fix", "privacy.target.adversary": "servr", "engine.name": "torche", "parallel.mode": "non", "method": "dr_encodr",
}  # fmt: skip


@pytest.mark.parametrize("key", list(NAMES))
def test_a_wrong_name_lists_the_right_ones(key, empty):
    said = refusal(empty, f"{key}={NAMES[key]}")
    assert said.startswith(f"{key}={NAMES[key]}: expected one of ")


@pytest.mark.parametrize(("value", "shown"), [("dr_encoder:", "dr_encoder:"), ("null", "null"), ("[a]", '["a"]')])
def test_a_method_that_is_no_name_is_told_which_there_are(value, shown, empty, write):
    for said in (refusal(empty, f"method={value}"), refusal(write(f"method: {{{value} }}" if ":" in value else f"method: {value}"))):
        assert said.startswith(f"method={shown}: expected one of dr_encoder, dr_encoder:published, ")


RANGES = [
    ("federation.clients", "0"), ("federation.rounds", "0"), ("federation.rounds", "-3"), ("federation.expected_cohort", "0"),
    ("federation.expected_cohort", "2001"), ("federation.max_cohort", "99"), ("federation.max_cohort", "2001"),
    ("federation.local.steps", "0"), ("federation.local.lr", "0"), ("federation.local.lr", "-1"), ("federation.local.lr", ".inf"),
    ("federation.local.prox", "-0.1"), ("federation.local.prox", ".inf"), ("federation.server.tau", "0"),
    ("federation.server.lr", "0"), ("federation.server.lr", ".inf"), ("federation.server.lr", ".nan"),
    ("federation.server.momentum", "1"), ("federation.server.momentum", "-0.1"), ("federation.server.betas", "[0.9]"),
    ("federation.server.betas", "[0.9,1.0]"), ("federation.partition.alpha", "0"), ("lora.r", "0"), ("lora.alpha", "0"),
    ("federation.local.batch", "0"), ("task.train_examples", "0"),
    ("task.eval_examples", "0"), ("task.monitor_examples", "0"), ("task.max_length", "7"), ("engine.batch_tokens", "63"),
    ("task.generate.count", "0"), ("task.generate.max_new_tokens", "0"),
    ("codec.refresh", "-1"), ("codec.public_examples", "4"), ("codec.warmup_rounds", "0"), ("codec.public_memory", "-1"),
    ("codec.warmup_public_steps", "-1"),
    ("codec.fit_steps", "0"), ("codec.code_size", "0"), ("codec.code_size", "-8"), ("privacy.target.epsilon", "0"),
    ("privacy.target.epsilon", "-1"), ("privacy.target.epsilon", ".inf"), ("privacy.target.epsilon", ".nan"),
    ("privacy.target.delta", "0"), ("privacy.target.delta", "1"), ("privacy.target.delta", "1.5"), ("privacy.target.delta", "-1e-5"),
    ("privacy.stage1_share", "-0.1"), ("privacy.stage1_share", "1"), ("privacy.clip.quantile", "0"), ("privacy.clip.quantile", "1"),
    ("privacy.clip.lr", "0"), ("privacy.clip.bit_multiplier", "0.5"), ("privacy.clip.norm", "0"), ("privacy.clip.norm", "-2"),
    ("privacy.clip.norm", "true"), ("privacy.clip.norm", "big"), ("privacy.clip.norm", ".inf"), ("privacy.clip.norm", ".nan"),
    ("privacy.clip.norm", "[1]"), ("seed", "-1"), ("seed", str(2**80)),
]  # fmt: skip


def test_what_noises_the_update_is_orthonormal(empty):
    """The noise of absent shares and the sensitivity are those of the code only where encoding keeps lengths and noise as they are."""
    update = ["privacy.noise_in=update"]
    for name, codec in CODECS.items():
        if codec.summable and not codec.orthonormal and name != "chain":
            assert "expected code" in refusal(empty, *update, f"codec.family={name}", "codec.code_size=null")
    for first, second in itertools.product(*CHAINS):
        overrides = [*update, "codec.family=chain", f"codec.parts=[{first},{second}]"]
        if CODECS[first].orthonormal and CODECS[second].orthonormal:
            load_config(empty, overrides)
        else:
            assert "expected code" in refusal(empty, *overrides)


def test_the_plain_average_has_no_rate(empty):
    assert refusal(empty, "federation.server.optimizer=fedavg").startswith(
        "federation.server.optimizer=fedavg: expected federation.server.lr=1 with it, the plain average, not 0.001"
    )
    load_config(empty, ["federation.server.optimizer=fedavg", "federation.server.lr=1"])


def test_a_proximal_term_needs_a_second_step(empty):
    said = refusal(empty, "federation.local.prox=0.1")
    assert said == "federation.local.prox=0.1: expected 0 with one local step, which nothing draws back"
    load_config(empty, ["federation.local.prox=0.1", "federation.local.steps=2"])


@pytest.mark.parametrize(("key", "value"), RANGES)
def test_a_value_out_of_range_names_key_and_range(key, value, empty):
    said = refusal(empty, f"{key}={value}")
    assert said.startswith(f"{key}=") and "expected" in said


COMBINATIONS = [
    (["codec.family=linear", "codec.code_size=null"], "codec.code_size=null"),
    (["codec.family=coordinate", "codec.code_size=null"], "codec.code_size=null"),
    (["codec.family=autoencoder"], "codec.code_size=128: expected null"),
    (["codec.family=identity"], "codec.code_size=128: expected null"),
    (["codec.family=linear", "codec.prior=none"], "codec.prior=none: expected one of public[+released][+random], moments"),
    (["codec.code_size=129"], "codec.code_size=129: expected at most 128"),
    (["codec.family=autoencoder", "codec.code_size=null", "privacy.noise_in=update"], "privacy.noise_in=update: expected code"),
    (["codec.family=allocation", "codec.code_size=null", "privacy.noise_in=update"], "privacy.noise_in=update: expected code"),
    (["codec.family=chain", "codec.parts=[allocation,linear]", "privacy.noise_in=update"], "privacy.noise_in=update: expected code"),
    (["codec.prior=public+moments"], "codec.prior=public+moments: expected one of"),
    (["codec.fit_at=client", "codec.prior=moments"], "codec.fit_at=client: expected server with codec.prior=moments"),
    (["codec.fit_at=client", "codec.prior=public+released"], "codec.fit_at=client: expected server with codec.prior=public+released"),
    (["codec.prior=released"], "codec.prior=released: expected one of"),
    (["codec.prior=public+released", "codec.weights=[1]"], "codec.weights=[1.0]: expected 2 numbers"),
    (["codec.family=chain", "codec.prior=moments"], "codec.prior=moments: expected one of"),
    (["codec.family=topk"], "codec.family=topk: expected privacy.enabled=false"),
    (["codec.family=powersgd"], "codec.family=powersgd: expected privacy.enabled=false"),
    (["codec.error_feedback=true"], "codec.error_feedback=true: expected false with privacy.enabled=true"),
    (["codec.code_size=most"], "codec.code_size=most: expected a number >= 1 or auto"),
    (["codec.code_size=0"], "codec.code_size=0: expected a number >= 1 or auto"),
    (["codec.code_size=auto", "codec.family=sketch"], "codec.code_size=auto: expected codec.family linear"),
    (["codec.code_size=auto", "privacy.enabled=false"], "codec.code_size=auto: expected codec.family linear"),
    (["codec.decode=each"], "codec.decode=each: expected privacy.noise=local"),
    (["codec.decode=each", "privacy.noise=local", "privacy.clip.mode=adaptive"], "codec.decode=each: expected privacy.noise_in=code"),
    (["codec.decode=once"], "codec.decode"),
    (["privacy.clip.mode=adaptive", "privacy.noise_in=update"], "privacy.clip.mode=adaptive: expected fixed"),
    (["privacy.noise=central", "privacy.target.adversary=server"], "privacy.target.adversary=server: expected release"),
    ([*USER, "privacy.noise=central"], "codec.bits=16: expected 32"),
    ([*EXAMPLE, "privacy.noise=central"], "codec.bits=16: expected 32"),
    (["privacy.unit=example", "federation.expected_cohort=0"], "federation.unit_sampling_rate=null: expected a rate in (0, 1]"),
    ([*EXAMPLE, "federation.local.steps=2"], "federation.local.steps=2: expected 1 with privacy.unit=example"),
    ([*USER, "privacy.enabled=false", "codec.family=topk"], "privacy.unit=user: expected client with codec.family=topk"),
    ([*EXAMPLE, "privacy.enabled=false", "codec.error_feedback=true"], "privacy.unit=example: expected client"),
    ([*EXAMPLE, "privacy.noise=local", "codec.decode=each"], "codec.decode=each: expected privacy.noise=local and privacy.unit=client"),
    (["privacy.unit=patient"], "privacy.unit=patient: expected one of client, user, example"),
    ([*USER, "federation.partition.kind=dirichlet"], "federation.partition.kind=dirichlet: expected iid or column"),
    (["privacy.unit=user", "task.columns.user=user", "federation.expected_cohort=5000"], "federation.unit_sampling_rate=null: "),
    (["lora.r=[4,8]"], "lora.r=[4, 8]: expected one rank for all clients; adapters of mixed ranks have no average"),
    (["lora.r=[4,8]", "method=flora"], "lora.r=[4, 8]: expected one rank for all clients; stacking takes one rank here"),
    (["lora.r=[4,8]", "federation.aggregation=stack"], "lora.r=[4, 8]: expected one rank for all clients; stacking takes one rank here"),
    (["method=flora:published"], "method=flora:published: expected flora, which has one form alone"),
    (["method=dp_lora:publish"], "method=dp_lora:publish: expected one of dp_lora, dp_lora:published; did you mean dp_lora:published?"),
    (["codec.decode=each", "codec.prior=public+released", "privacy.noise=local"], "codec.decode=each: expected mean with codec.prior"),
    (["privacy.unit=user", "federation.unit_sampling_rate=0.5"], "task.columns.user: expected the column"),
    ([*USER, "federation.unit_sampling_rate=0"], "federation.unit_sampling_rate=0"),
    ([*USER, "federation.unit_sampling_rate=1.1"], "federation.unit_sampling_rate=1.1"),
    (["task.public=movie-reviews"], "task.public=movie-reviews: expected a source other than"),
    (["task.public=generated", "task.kind=classify"], "task.public=generated: expected task.generate.model with task.kind=classify"),
    (["task.public=generated", "task.generate.count=159"], "task.generate.count=159: expected at least codec.public_examples=160"),
    (["codec.fit_at=client", "codec.public_memory=1"], "codec.fit_at=client: expected server with codec.public_memory=1"),
    (["codec.prior=moments", "codec.public_memory=1"], "codec.public_memory=1: expected 0 with codec.prior=moments"),
    (["codec.public_labels=model", "task.kind=text"], "codec.public_labels=model: expected random with task.kind=text"),
    (["codec.public_labels=given"], "codec.public_labels=given: expected task.public=generated and {label} in task.generate.prompt"),
    (["task.kind=text", "task.generate.prompt=a {label}"], "task.generate.prompt: expected no {label} with task.kind=text"),
    (["federation.warm_start.steps=1"], "federation.warm_start.steps: expected codec.public_labels=given, not random"),
    (["federation.warm_start.steps=-1"], "federation.warm_start.steps"),
    (["federation.warm_start.lr=0"], "federation.warm_start.lr"),
    (["task.public=null"], "task.public: expected a source of public text for codec.prior=public"),
    (
        ["task.public=null", "codec.prior=moments", "privacy.clip.norm=1"],
        "task.public: expected a source of public text for codec.prior=mom",
    ),
    (["method=full_noise", "task.public=null"], "privacy.clip.norm=auto: expected task.public"),
    (["method=fedit", "task.public=null", "lora.init=public"], "lora.init=public: expected task.public"),
    (["federation.server.space=codes"], "federation.server.space=codes: expected one of update, code"),
    ([*PRODUCT, "federation.aggregation=stack", "lora.init=public"], "federation.aggregation=stack: expected lora.init=random"),
    ([*PRODUCT, "federation.aggregation=stack", "lora.train=b"], "federation.aggregation=stack: expected lora.train=both, not b"),
    ([*PRODUCT, "federation.aggregation=residual", "lora.train=core"], "federation.aggregation=residual: expected lora.train=both"),
    (
        [*PRODUCT, "federation.aggregation=stack", "federation.server.schedule=linear"],
        f"federation.aggregation=stack: {PLAIN_AVERAGE} (here fedavg, 1, linear)",
    ),
    (
        [*PRODUCT, "federation.aggregation=stack", "federation.server.lr=0.5"],
        f"federation.aggregation=stack: {PLAIN_AVERAGE} (here fedavg, 0.5, constant)",
    ),
    (
        [*PRODUCT, "federation.aggregation=residual", "federation.server.optimizer=adam"],
        f"federation.aggregation=residual: {PLAIN_AVERAGE} (here adam, 1, constant)",
    ),
    (
        [*PRODUCT, "federation.aggregation=residual", "privacy.noise=distributed"],
        "federation.aggregation=residual: expected privacy.noise=local, not distributed",
    ),
    ([*PRODUCT, *USER, "federation.aggregation=stack"], "federation.aggregation=stack: expected privacy.unit=client, not user"),
    (["federation.server.optimizer=scaffold"], "federation.server.optimizer=scaffold: its control variates are a second release"),
    (["method=full_noise", "federation.server.space=code"], "federation.server.space=code: expected update with method=full_noise"),
    (["codec.family=sketch", "codec.prior=public"], "codec.prior=public: expected none with method=dr_encoder, codec.family=sketch"),
    (["method=scaffold"], "method=scaffold: its control variates are a second release"),
    (["federation.local.batch=4", "privacy.unit=user", "task.columns.user=who"], "federation.local.batch=4: expected null"),
    (["federation.aggregation=SCAFFOLD"], "federation.aggregation=SCAFFOLD: its control variates are a second release"),
]


@pytest.mark.parametrize(("overrides", "says"), COMBINATIONS)
def test_what_makes_no_sense_together_is_refused(overrides, says, empty):
    assert refusal(empty, *overrides).startswith(says)


def test_what_makes_sense_is_not_refused(empty):
    for aggregation in AGGREGATIONS:
        assert load_config(empty, [*PRODUCT, f"federation.aggregation={aggregation}"]).codec.decode == (
            "mean" if aggregation == "mean" else "each"
        )
    load_config(empty, ["method=full_noise", "task.public=null", "privacy.clip.norm=1"])
    load_config(empty, ["method=fedit", "task.public=null"])
    load_config(empty, [*USER, "privacy.noise=central", "codec.bits=32"])
    load_config(empty, ["codec.fit_at=client", "codec.prior=public+random"])
    load_config(empty, [*EXAMPLE, "federation.clients=1", "privacy.noise=central", "codec.bits=32"])
    load_config(empty, [*EXAMPLE, "privacy.enabled=false", "federation.partition.kind=dirichlet"])
    load_config(empty, ["federation.expected_cohort=2000", "federation.max_cohort=2000"])
    load_config(empty, ["privacy.target.delta=0.01"])  # above 1/clients: a warning when it runs, no refusal


def test_the_allow_lists_are_the_tables(empty):
    """The lists stand apart from the tables only so that a config is checked without loading torch."""
    from fedllm import adapters, aggregation, server_optimizers

    assert set(SERVER_OPTIMIZERS) == set(server_optimizers.OPTIMIZERS)
    assert set(AGGREGATIONS) == set(aggregation.AGGREGATIONS)
    for train in adapters.TRAINED:
        load_config(empty, [f"lora.train={train}"])


def test_a_delta_above_one_over_clients_is_a_warning(empty, capsys):
    from fedllm.run import check_population

    setting = SimpleNamespace(partition=SimpleNamespace(unit_count=2000))
    for override, warns in (("delta=5e-4", True), ("delta=6e-4", True), ("delta=4.9e-4", False)):
        check_population(load_config(empty, [f"privacy.target.{override}"]), setting)
        err = capsys.readouterr().err
        assert err.startswith("warning: privacy.target.delta") == warns and err.count("\n") == warns
    check_population(load_config(empty, ["privacy.target.delta=0.5", "privacy.enabled=false"]), setting)
    assert capsys.readouterr().err == ""
