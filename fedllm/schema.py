"""The config's schema: what can be set, and what it is when it is not. The README and `configs/` show it in use."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

GENERATED = "generated"  # task.public: text that a language model writes, see `data/generated.py`
LABEL = "{label}"  # in task.generate.prompt


@dataclass
class ModelConfig:
    name: str = "smollm2-135m"  # demo asset, hub id, folder or GGUF file
    dtype: str = "auto"  # auto (the faster of the two, measured) | float32 | bfloat16


@dataclass
class ColumnsConfig:
    text: str = "text"
    label: str = "label"
    user: str | None = None
    public: str = "text"  # text column of task.public


@dataclass
class GenerateConfig:
    # Asked of the writer; {words} becomes two everyday words, {label} each label's word in turn, which the text then is an example of.
    prompt: str = "Write a few sentences about {words}."
    model: str | None = None  # the writer: a causal LM, null for the base model itself
    count: int = 400
    max_new_tokens: int = 48


@dataclass
class TaskConfig:
    kind: str = "labels"  # labels (label words of a causal LM) | classify (a head) | text (next token)
    source: str = "movie-reviews"  # demo asset, hub id, or a csv, tsv, jsonl or parquet file
    test: str | None = None  # held-out file; without it the source's own test part, or a seeded split
    public: str | None = "newsgroups"  # a source, or GENERATED
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    train_examples: int | None = None  # the first so many of a source alone; null: all
    eval_examples: int = 2000
    monitor_examples: int = 200  # of these, how many are looked at after each round
    max_length: int = 64
    prompt: str | None = None
    words: list[str] | None = None
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)


@dataclass
class LoraConfig:
    r: int = 8
    alpha: float = 16
    targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    train: str = "both"  # both | b (A stays at its start) | core (r x r numbers between fixed A and B)
    init: str = "random"  # random | public (A, with train: core also B, from the leading singular vectors of public gradients)


@dataclass
class PartitionConfig:
    kind: str = "iid"  # iid | dirichlet | column
    alpha: float = 0.5


@dataclass
class LocalConfig:
    steps: int = 1  # 1: the gradient itself; more: steps of SGD, the update is the weight delta
    lr: float = 1.0
    batch: int | None = None  # examples that a client draws anew for each of its steps; null: all that it has
    prox: float = 0.0  # FedProx's mu: each step is drawn back to the model that the round began with


@dataclass
class ServerConfig:
    optimizer: str = "adam"  # sgd | momentum | adam | adagrad | yogi | fedavg | fedavgm | fedadam | fedadagrad | fedyogi
    lr: float = 1e-3
    momentum: float = 0.9
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    tau: float = 1e-8  # adaptive ones: added to the root of the second moment; Reddi et al. take 1e-3 for weight deltas
    # update | code: Adam's moments are of the numbers of a linear code (code_adam.py), and codec.shrink has no say; of updates elsewhere.
    space: str = "update"
    schedule: str = "constant"  # constant | linear (down to lr / rounds in the last round)


@dataclass
class WarmStartConfig:
    steps: int = 0  # of Adam on public text before the first round, at a rate that falls to lr / steps
    lr: float = 1e-3
    examples: int = 50  # of each step


@dataclass
class FederationConfig:
    clients: int = 2000
    expected_cohort: int = 100
    # Where a larger cohort is cut, and shares of noise in a round; null: a size that is hardly ever exceeded, or with a :published method
    # whose clients noise their own messages the expected cohort, since papers' cohorts are of one size.
    max_cohort: int | None = None
    # Unit user or example: Poisson rate at which every client samples its own; null: expected_cohort / clients.
    unit_sampling_rate: float | None = None
    rounds: int = 10
    weights: str = "uniform"  # uniform | examples (by each client's number; under privacy :published methods alone)
    transport: str = "simulation"
    aggregation: str = "mean"  # mean | stack (FLoRA) | residual (FedEx-LoRA): of A and B apart | exact for the product BA
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    local: LocalConfig = field(default_factory=LocalConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)


@dataclass
class CodecConfig:
    family: str = "linear"
    parts: list[str] = field(default_factory=lambda: ["coordinate", "linear"])  # of a chain: two families, the first one's code coded again
    prior: str = "public"  # public | moments | parts joined by +: public+released+random | none
    weights: list[float] | None = None  # of the prior's parts: shares of its second moment
    code_size: Any = 128  # a number, auto (from a held-out public spectrum), or null: what the family fixes (identity, autoencoder)
    refresh: int = 3  # refit every this many rounds (prior: public); 0: never
    fit_at: str = "server"  # server: clients fetch the codec | client: they fit their own, and fetch it only where fingerprints differ
    decode: str = "mean"  # mean: once, the mean code | each: every message, then the mean (noise: local, or no privacy)
    bits: int = 16  # 8 | 16 | 32 (float32, not quantized; float64 for sums of units with noise: central)
    public_examples: int = 160  # public gradients at each fit; a fifth is held out for the clip norm
    public_labels: str = "random"  # of these: random | model (drawn from its prediction at each fit) | given (by {label} in a request)
    public_memory: int = 0  # earlier refits whose public gradients stay in the prior, weighing half as much with every refit
    warmup_rounds: int = 2  # stage 1 (prior: moments)
    warmup_public_steps: int = 3  # steps on public text before stage 1: at LoRA's start B = 0 and A's gradient is exactly zero
    fit_steps: int = 200  # auto-encoder
    fit_lr: float = 1e-3  # of these steps; CG-FedLLM's is 2e-4, over far more steps
    shrink: bool = True  # of a noisy mean code each number by its prior variance, where that is known: free post-processing
    # prior: real, of all examples, on whose raw gradients the codec is fitted (public_examples of them at most): never private
    real_share: float = 0.3
    error_feedback: bool = False  # lossy codecs without privacy: a client adds what its last code dropped


@dataclass
class TargetConfig:
    adversary: str = "release"  # release | server
    epsilon: float = 8.0
    delta: float = 1e-4


@dataclass
class ClipConfig:
    mode: str = "fixed"  # fixed | adaptive
    norm: Any = "auto"  # auto: the median norm of public pseudo-units' codes, shared out over the groups; or a number, of each group
    quantile: float = 0.5
    lr: float = 0.2
    bit_multiplier: float = 10.0  # noise multiplier of the adaptive clip's bits
    groups: str = "joint"  # joint | matrix | layer | kind (all A, all B, a head): what is clipped to the norm together
    of: str = "update"  # update | state (the new adapter itself, as DP-FedLoRA has it)


@dataclass
class PrivacyConfig:
    enabled: bool = True
    target: TargetConfig = field(default_factory=TargetConfig)
    unit: str = "client"  # client | user | example: who takes part or not is one client, or one user or example inside every client
    noise: str = "distributed"  # distributed | local | central
    noise_in: str = "code"  # code | update
    clip: ClipConfig = field(default_factory=ClipConfig)
    calibration: str = "exact"  # exact | pld | rdp | rdp_classic; a :published method also classic, gdp, edgeworth_1 ...
    stage1_share: float = 0.05  # of the budget, for the moments of stage 1; 0: no noise on them, as published and never private


@dataclass
class EngineConfig:
    name: str = "torch"  # torch | deepspeed
    batch_tokens: int = 2048  # of one forward pass, on each rank
    deepspeed: str | None = None  # engine.name=deepspeed: a DeepSpeed file, such as configs/deepspeed/zero2.json


@dataclass
class ParallelConfig:
    mode: str = "none"  # none | clients (each rank of a launch trains its share of the cohort) | data (all work on the same clients)


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    method: str = "dr_encoder"
    federation: FederationConfig = field(default_factory=FederationConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    seed: int | None = None
    output_dir: str = "runs/quickstart"
