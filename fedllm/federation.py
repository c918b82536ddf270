"""The rounds: the one stateful loop, to be read beside the paper (DR-Encoder, arXiv 2412.17053).

    stage 1   W warm-up rounds of private moments -> Gaussian prior -> codec         (or a prior from public text, at no cost)
    stage 2   T rounds: cohort -> local update -> code -> clip -> noise -> sum -> decode once -> server step

The ledger entry of a round is on disk before its cohort is drawn. Nothing here prints or stores a value that depends on private data
otherwise than through a noisy mean.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from torch import Tensor

from dr_encoder import moments
from dr_encoder.codecs import Codec
from dr_encoder.priors import GaussianPrior, factor_rms, from_moments
from fedllm import evaluation, priors, public, real, records
from fedllm.aggregation import AGGREGATIONS
from fedllm.checkpoint import Checkpoints
from fedllm.client import Encode, UnitMoments, code_of
from fedllm.code_adam import CodeAdam
from fedllm.codec_fit import Announcement, choose_size, fit_codec, whole
from fedllm.errors import RunStopped
from fedllm.mechanism import Mechanism
from fedllm.monitor import Monitor
from fedllm.privacy import guard
from fedllm.privacy.clipping import next_clip, noisy_fraction
from fedllm.privacy.ledger import Ledger
from fedllm.privacy.noise import Noise
from fedllm.release import PrivateSum
from fedllm.schema import Config
from fedllm.server import SCHEDULES, ServerOptimizer, decoded_mean, noisy_mean
from fedllm.setting import Setting
from fedllm.stopwatch import Stopwatch
from fedllm.sums import Sums
from fedllm.training.engine import Evaluation
from fedllm.transports import TRANSPORTS, transport_of

FIXED = "fixed."  # in a checkpoint: LoRA factors that no seed gives back


@dataclasses.dataclass
class Progress:
    """What a checkpoint carries besides tensors; JSON-able, and all of it public."""

    rounds: int = 0
    warmup_rounds: int = 0
    started: bool = False  # the model before training has been evaluated
    clip: float | None = None
    codec: str | None = None  # fingerprint
    code_size: int | None = None  # where it was chosen here
    codec_download: int = 0  # bytes of the codec for a client that has not got it; 0 where clients fitted their own
    prior: str = "none"
    before: dict[str, float | None] = dataclasses.field(default_factory=dict)
    start: dict[str, float | None] = dataclasses.field(default_factory=dict)  # after federation.warm_start, where there is one
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    stopped: str | None = None  # why fewer rounds than planned were run


class Federation:
    """One run from its first round, or from its last checkpoint, to its end."""

    def __init__(
        self,
        config: Config,
        setting: Setting,
        ledger: Ledger,
        checkpoints: Checkpoints,
        monitor: Monitor,
        watch: Stopwatch,
    ):
        self.config, self.setting, self.ledger, self.checkpoints = config, setting, ledger, checkpoints
        self.monitor, self.watch = monitor, watch
        self.engine = setting.engine
        self.run_id: str = ledger.header["run"]
        self.mechanism = Mechanism.of(config, self.engine.layout, setting.partition)
        multipliers = ledger.header["noise_multipliers"]
        stage1, stage2 = multipliers["stage1"] or 0.0, multipliers["stage2"] or 0.0
        self.sums = Sums(config, setting.partition, self.mechanism, self.run_id, stage1, stage2)
        self.noise = Noise(config.seed)
        self.transport = TRANSPORTS[transport_of(config)](setting, config, self.noise, watch)
        self.optimizer = self.new_optimizer(self.engine.adapter())
        self.aggregation = AGGREGATIONS[config.federation.aggregation](self.engine.model, self.engine.layout, self.public_seed)
        self.codec: Codec | None = None
        self.moments: Tensor | None = None
        self.past = priors.Past()
        self.progress = Progress()
        self.warned = False  # of clients whose codec differs

    # -- the run -----------------------------------------------------------------------------------------------------------------

    def run(self, before: Evaluation | None = None) -> Progress:
        """Everything that is left to do; the adapter is in the engine afterwards. `before`: see `run.train`."""
        if not self.progress.started:
            self.look_before(before)
        if self.config.codec.prior == "moments" and self.codec is None and not self.stage1():
            return self.progress
        while self.progress.rounds < self.config.federation.rounds:
            if not self.stage2_round():
                break
        return self.progress

    def look_before(self, known: Evaluation | None) -> None:
        """Loss and accuracy of the untrained model; then what public text teaches it."""
        with self.watch.phase("evaluation"):
            if known is None:
                whole, part = evaluation.look(self.setting, self.config, self.monitor.phase, "evaluating the untrained model")
            else:
                whole, part = known, evaluation.look_part(self.setting, self.config)
        self.progress.before = dataclasses.asdict(whole)
        if self.config.federation.warm_start.steps:
            whole, part = self.warm_start()
            self.progress.start = dataclasses.asdict(whole)
        self.progress.history = [{"round": 0, **dataclasses.asdict(part)}]
        self.progress.started = True
        self.save()

    def warm_start(self) -> tuple[Evaluation, Evaluation]:
        """Train on public text, and look at the model that the rounds begin with."""
        steps = self.config.federation.warm_start.steps
        with self.watch.phase("local_training"), self.monitor.phase(f"{steps} steps on public text", total=steps) as advance:
            try:
                adapter = public.warm_start(self.setting, self.config, self.public_seed, advance)
            except FloatingPointError as error:
                raise RunStopped(f"federation.warm_start: {error}; expected a smaller lr there") from None
            self.optimizer = self.new_optimizer(adapter)
        with self.watch.phase("evaluation"):
            return evaluation.look(self.setting, self.config, self.monitor.phase, "evaluating the model after public text")

    def stage1(self) -> bool:
        """Private moments over warm-up rounds -> prior -> codec; False where the budget allowed no warm-up round at all."""
        settings = self.config.codec
        if self.progress.warmup_rounds == 0:
            with self.watch.phase("stage1"), self.monitor.phase(f"{settings.warmup_public_steps} steps on public text"):
                # At LoRA's start B = 0, and the gradient of A is exactly zero: there would be nothing to take moments of.
                public.warm_up(self.setting, self.config, self.public_seed, self.optimizer)
        with self.watch.phase("stage1"):
            rows = public.gradients(self.setting, self.config, self.public_seed, 0)
        scale = factor_rms(self.engine.layout, rows.fit).clamp_min(1e-12)
        encode = UnitMoments(self.engine.layout, scale)
        clip = public.clip_norm(rows, encode, self.config, self.unit_examples)
        size = 2 * len(self.engine.layout.factors)
        while self.progress.warmup_rounds < settings.warmup_rounds:
            spec = self.sums.stage1(self.progress.warmup_rounds, size, clip)
            if not self.allowed(spec):  # after repeated attempts: the prior is then made of fewer rounds
                self.monitor.say(f"stage 1 stopped: the budget allows no warm-up round after {self.progress.warmup_rounds}")
                break
            with self.monitor.phase(f"stage 1, round {self.progress.warmup_rounds + 1} of {settings.warmup_rounds}: private moments"):
                mean = self.private_mean(spec, encode)
            self.moments = mean if self.moments is None else self.moments + mean
            self.progress.warmup_rounds += 1
            self.save()
        done = self.progress.warmup_rounds
        if done == 0:
            self.progress.stopped = "the budget allows no warm-up round"
            return False
        with self.watch.phase("codec"):
            noise_std = self.sums.stage1(0, size, clip).mean_std / done**0.5
            mean, std = moments.moments_to_std(self.moments / done, scale, noise_std=noise_std)
            prior = from_moments(self.engine.layout, mean, std)
        self.fit(prior, rows)
        self.save()
        return True

    def stage2_round(self) -> bool:
        """One round; False where the budget does not allow it."""
        fed, begun = self.config.federation, time.perf_counter()
        number = self.progress.rounds
        if self.config.codec.prior != "moments" and self.due(number):
            self.refit(number)
        spec = self.sums.stage2(number, self.progress.codec, self.progress.prior, self.codec.code_size, self.progress.clip or float("inf"))
        if not self.allowed(spec):
            self.progress.stopped = f"the budget allows no round after {number}"
            self.monitor.say(f"stopped: {self.progress.stopped}; round {number + 1} would exceed the target")
            return False
        self.aggregation.begin(self.engine.adapter(), self.mechanism.of_state)
        with self.monitor.phase(f"round {number + 1} of {fed.rounds}: local training"):
            mean = self.private_mean(spec)
        code = update = mean
        if not spec.each:
            code = self.adapt_clip(mean, spec)
            with self.watch.phase("codec"):
                if not self.in_code:
                    update = self.codec.decode(code, spec.mean_std if self.config.codec.shrink else 0.0)
                if "released" in self.config.codec.prior:
                    self.past.add(self.codec, code, spec.mean_std)
        if self.mechanism.of_state:  # what was sent is the way from zero to the new adapter
            update = self.engine.adapter() + update
        with self.watch.phase("server"):
            try:
                rate = SCHEDULES[fed.server.schedule](number, fed.rounds)
                along = code if self.in_code else self.aggregation.finish(update, spec.expected, number)
                self.engine.load(self.optimizer.step(along, rate))
            except FloatingPointError as error:
                raise RunStopped(f"round {number + 1}: {error}; the state after round {number} is kept") from None
        self.progress.rounds += 1
        self.record(spec, code, begun)
        self.save()
        return True

    # -- parts of a round ----------------------------------------------------------------------------------------------------------

    def private_mean(self, spec: PrivateSum, encode: Encode | None = None) -> Tensor:
        """One private sum over the clients: ledger, then cohort, messages, noise; the noisy mean [size], or of decoded messages [n].

        encode: None for the codec's.
        """
        with self.watch.phase("privacy"):
            self.ledger.append(spec.ledger_entry(self.noise.rng))
        with self.watch.phase("server"):
            try:
                messages = self.transport.messages(spec, encode)
                if spec.each:
                    return decoded_mean(messages, spec, self.noise, self.decode_one, self.aggregation.add)
                return noisy_mean(messages, spec, self.noise)
            except FloatingPointError as error:
                raise RunStopped(f"round {spec.round + 1}: {error}; the state after round {spec.round} is kept") from None

    def refit(self, number: int) -> None:
        """A new codec from public text; its gradients are let go of before clients train."""
        with self.watch.phase("local_training"), self.monitor.phase(f"round {number + 1}: public gradients"):
            rows = public.gradients(self.setting, self.config, self.public_seed, number)
        self.fit(self.prior(rows), rows)

    def real_gradients(self, number: int) -> Tensor | None:
        """Clients' raw gradients, where the codec is to learn from them: entered as the release that it is."""
        if self.config.codec.prior != "real":
            return None
        self.ledger.append(self.sums.raw_gradients(number).ledger_entry(self.noise.rng))
        return real.gradients(self.setting, self.config, self.public_seed)

    def decode_one(self, code: Tensor) -> Tensor:
        """The update [n] that one message's code [k] stands for."""
        with self.watch.phase("codec"):
            return self.codec.decode(code)

    def prior(self, rows: public.PublicGradients | None) -> GaussianPrior | None:
        """What the codec is fitted on: `codec.prior`, of public gradients and what earlier rounds left."""
        if rows is None:
            return None
        with self.watch.phase("codec"):
            number = self.progress.rounds
            real_rows = self.real_gradients(number)
            found = priors.of_config(self.config, self.engine.layout, rows.fit, self.past, self.public_seed + number, real_rows)
            self.past.keep(rows.fit, self.config.codec.public_memory)
            return found

    def fit(self, prior: GaussianPrior | None, rows: public.PublicGradients | None) -> None:
        """Fit the codec to a prior, and take the clip norm from held-out public gradients."""
        settings, layout = self.config.codec, self.engine.layout
        parts = max(1, len(self.mechanism.groups))
        noise_std = self.sums.code_noise
        seed, size = self.public_seed + self.progress.rounds, settings.code_size
        with self.watch.phase("codec"), self.monitor.phase(f"fitting the {settings.family} codec"):
            if size == "auto":
                if self.progress.code_size is None:  # once, before any private data is touched
                    self.progress.code_size = choose_size(self.config, layout, prior, rows, noise_std, seed, self.unit_examples, parts)
                    self.monitor.say(f"code of {self.progress.code_size} numbers, chosen from public gradients")
                size = self.progress.code_size
            self.codec = fit_codec(self.config, layout, prior, size, noise_std, seed)
            self.progress.codec = self.codec.fingerprint()
            if self.in_code:
                self.optimizer.use(self.codec)
            self.progress.prior = f"{prior.name}:{prior.fingerprint()}" if prior is not None else "none"
            first = self.progress.clip is None
            if self.config.privacy.enabled and (first or self.config.privacy.clip.mode == "fixed"):
                origin = self.engine.adapter() if self.mechanism.of_state else None
                encode = whole if self.config.privacy.noise_in == "update" else code_of(self.codec, origin)
                self.progress.clip = public.clip_norm(rows, encode, self.config, self.unit_examples, parts)
            self.checkpoints.save_codec(self.codec, self.progress.codec)
            self.hand_over(Announcement(self.progress.codec, self.progress.rounds, size, noise_std, self.public_seed), rows)

    def hand_over(self, announced: Announcement, rows: public.PublicGradients | None) -> None:
        """Clients take the codec over; what that costs them is counted."""
        fetched = self.transport.refit(announced, lambda: self.codec, rows)
        self.progress.codec_download = self.checkpoints.codec_path(announced.codec).stat().st_size if fetched else 0
        if fetched and self.config.codec.fit_at == "client" and not self.warned:
            self.monitor.say("warning: the codec that clients fitted is not the server's; they fetch its copy, which counts as downlink")
            self.warned = True

    def adapt_clip(self, mean: Tensor, spec: PrivateSum) -> Tensor:
        """The code part of a mean; with an adaptive clip the bit's noisy mean moves the next round's clip norm."""
        if spec.bit_weight == 0:
            return mean
        clip = self.config.privacy.clip
        below = noisy_fraction(float(mean[-1]) / spec.bit_weight, 1.0)
        self.progress.clip = next_clip(spec.clip, below, clip.quantile, clip.lr)
        return mean[:-1]

    def new_optimizer(self, adapter: Tensor) -> ServerOptimizer | CodeAdam:
        """The server's optimiser, which begins at an adapter [n]."""
        return (CodeAdam if self.in_code else ServerOptimizer)(adapter, self.config.federation.server)

    @property
    def in_code(self) -> bool:
        """Whether the server steps along codes, not along what they are decoded to."""
        return self.config.federation.server.space == "code"

    @property
    def unit_examples(self) -> int:
        """Examples of a typical unit, from the public sizes of the federation."""
        return max(1, round(len(self.setting.train) / self.setting.partition.unit_count))

    @property
    def public_seed(self) -> int:
        return public_seed(self.run_id, self.config)

    def due(self, number: int) -> bool:
        """Whether this round has a new codec."""
        codec = self.config.codec
        return number == 0 or (codec.prior != "moments" and codec.refresh > 0 and number % codec.refresh == 0)

    def allowed(self, spec: PrivateSum) -> bool:
        """Whether the target still holds after this release."""
        if not self.config.privacy.enabled:
            return True
        with self.watch.phase("privacy"):
            return guard.may_run(self.ledger.header, self.ledger.entries, spec.ledger_entry(self.noise.rng))

    # -- what is told and kept -----------------------------------------------------------------------------------------------------

    def record(self, spec: PrivateSum, code: Tensor, begun: float) -> None:
        """Tell and remember the round: public held-out figures and functions of the noisy mean."""
        with self.watch.phase("evaluation"):
            looked = evaluation.look_part(self.setting, self.config)
        if not evaluation.finite(looked):
            raise RunStopped(f"round {self.progress.rounds}: the public loss is not finite; the state after round {spec.round} is kept")
        with self.watch.phase("privacy"):
            entry = {
                "round": self.progress.rounds,
                "accuracy": looked.accuracy,
                "loss": looked.loss,
                **records.epsilons(self.ledger),
                **records.noise(spec, code),
                "uplink_bytes_per_client": evaluation.message_bytes(spec),
                "downlink_bytes_per_client": evaluation.downlink_bytes(
                    self.broadcast(spec), self.progress.codec_download, spec.unit, self.due(spec.round)
                ),
                "seconds": round(time.perf_counter() - begun, 3),
            }
        self.progress.history.append(entry)
        self.monitor.round(entry)

    def broadcast(self, spec: PrivateSum) -> dict[str, Tensor]:
        """What of the model a client downloads: fixed factors from public gradients as it does a codec, unless clients fit these."""
        fetched = self.config.codec.fit_at == "server" and (spec.unit == "client" or spec.round == 0)
        return {"adapter": self.engine.adapter()} | self.aggregation.state() | (self.setting.fixed if fetched else {})

    def save(self) -> None:
        """Checkpoint: all a resumed run needs."""
        with self.watch.phase("server"):
            tensors = self.optimizer.state() | self.aggregation.state() | self.past.state() | self.transport.state()
            tensors |= {FIXED + name: value.detach() for name, value in self.setting.fixed.items()}
            if self.moments is not None:
                tensors["moments"] = self.moments
            self.progress.seconds = self.watch.total()
            self.progress.seconds.pop("total")
            step = self.progress.warmup_rounds + self.progress.rounds + int(self.codec is not None)
            self.checkpoints.save(step, tensors, dataclasses.asdict(self.progress))
            self.checkpoints.keep_codec(self.progress.codec)

    def restore(self) -> None:
        """Back to the last checkpoint, where there is one."""
        found = self.checkpoints.latest()
        if found is None:
            return
        tensors, facts = found
        self.progress = Progress(**facts)
        for phase, seconds in self.progress.seconds.items():
            self.watch.seconds[phase] += seconds
        if self.progress.codec is not None:
            self.codec = self.checkpoints.load_codec(self.progress.codec)
        self.optimizer.restore(tensors, self.codec)
        self.aggregation.restore(tensors)
        for name, value in self.setting.fixed.items():
            value.detach().copy_(tensors[FIXED + name])
        self.engine.load(tensors["adapter"])  # last: with all that it stands on
        self.moments = tensors.get("moments")
        self.past = priors.Past.from_state(tensors)
        if self.codec is not None:
            self.transport.restore(self.codec, tensors)


def public_seed(run_id: str, config: Config) -> int:
    """Seed of everything public: LoRA's start, the choice of public examples, the codec's fit."""
    return config.seed if config.seed is not None else int(run_id[:8], 16)
