"""The same run on many ranks (`parallel.mode`): one name a mode. Rank 0 runs what it runs alone; what it needs done is shared out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from fedllm import ranks, setting
from fedllm.errors import UserError
from fedllm.monitor import Phase
from fedllm.parallel.shared_engine import SharedEngine
from fedllm.ranks import Team
from fedllm.schema import Config
from fedllm.setting import Setting


def by_clients(made: Setting, team: Team) -> Setting:
    """`clients`: public work is shared out by the engine, the cohort by the transport (transports/ranks.py)."""
    engine = SharedEngine(made.engine, team)
    engine.load(engine.adapter())  # start and fixed factors as they are here, to the bit
    return dataclasses.replace(made, engine=engine)


def by_data(made: Setting, team: Team) -> Setting:
    """`data`: the engine does all of it, and tells the others (training/deepspeed_engine.py)."""
    return made


MODES: dict[str, Callable[[Setting, Team], Setting]] = {"clients": by_clients, "data": by_data}


def check(config: Config) -> None:
    """Raise UserError where the ranks that a launcher started have nothing to do; a process on its own runs every mode by itself."""
    team, mode = ranks.team(), config.parallel.mode
    if team is None:
        return
    if mode not in MODES:
        raise UserError(
            f"parallel.mode={mode}: expected {' or '.join(MODES)} for the {team.size} ranks that were launched, or a run without launcher"
        )
    fed, of_clients = config.federation, config.privacy.unit == "client"
    most = fed.expected_cohort if of_clients else fed.clients
    if mode == "clients" and team.size > most:
        key = "expected_cohort" if of_clients else "clients"
        raise UserError(f"parallel.mode=clients: {team.size} ranks, expected at most federation.{key}={most}")


def taken_up(config: Config) -> Config:
    """The config of a run that is taken up on any number of ranks: one that began on its own goes on with its work shared out."""
    if ranks.team() is None or config.parallel.mode != "none":
        return config
    mode = "data" if config.engine.name == "deepspeed" else "clients"
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, mode=mode))


def build(config: Config, public_seed: int, phase: Phase) -> Setting:
    """`setting.build` on every rank at once, from rank 0's word."""
    team = ranks.team()
    if team is None:
        return setting.build(config, public_seed, phase=phase)
    team.tell("build", config, public_seed)
    made = setting.build(config, public_seed, phase=phase)
    list(team.replies())
    return MODES[config.parallel.mode](made, team)
