"""Ranks: what travels between them, who does what, and how they end."""

import os
import pickle
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedllm import ranks
from fedllm.errors import UserError
from fedllm.parallel import worker
from fedllm.schema import Config, ParallelConfig

COMMON = """
import importlib, os, signal, sys
import numpy as np, torch
from fedllm import ranks
from fedllm.errors import UserError

def fail(line, status):
    print(f"error: {line}", file=sys.stderr)
    return status

def made(team):
    module, _, name = WORKER.rpartition(".")
    return getattr(importlib.import_module(module), name)(team) if module else globals()[name](team)

class Worker:
    def __init__(self, team):
        self.team = team
    def square(self, value):
        return self.team.rank, value**2
    def wrong(self):
        raise UserError("this can be mended")
    def broken(self):
        raise KeyError("this cannot")
    def die(self):
        os.kill(os.getpid(), signal.SIGKILL)
    def say(self):
        print("noise"); print("noise", file=sys.stderr)
    def total(self, value):
        return self.team.all_reduce(value)
    def come(self):
        self.team.meet(UserError("no data here") if self.team.rank == 2 else None)
"""


def start(work: str, size: int = 2, worker: str = "Worker") -> list[subprocess.Popen]:
    """`work`: the body of rank 0's function, which has `team`; `worker`: the class of the others' workers, by its whole name."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    body = "\n".join("    " + line for line in work.strip().splitlines())
    code = f"{COMMON}\nWORKER = {worker!r}\ndef work():\n    team = ranks.team()\n{body}\nsys.exit(ranks.among(work, made, fail))"
    place = {"WORLD_SIZE": str(size), "LOCAL_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | place | {"RANK": str(rank), "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def ended(processes: list[subprocess.Popen], timeout: float = 60) -> list[tuple[int, str, str]]:
    """Status, standard output and standard error of each."""
    found = [process.communicate(timeout=timeout) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, found, strict=True)]


def test_values_travel_whole_and_the_others_stay_silent():
    first, *others = ended(
        start(
            """
big = torch.arange(100_000.0).reshape(100, 1000)
value = {"a": big.T, "b": [np.zeros((0, 3)), None, "text"], "c": torch.ones(3, dtype=torch.bfloat16), "d": torch.tensor(2.5)}
for rank, got in team.ask("square", big):
    assert rank in (1, 2) and torch.equal(got, big**2)
assert team.ask("square", shares=[0, torch.tensor(3), 5])[0] == (1, 9)
assert team.ask("square", shares=[0, 3, 5]) == [(1, 9), (2, 25)]
team.tell("total", torch.ones(3))
assert team.all_reduce(torch.ones(3)).tolist() == [3, 3, 3]
assert [each.tolist() for each in team.replies()] == [[3, 3, 3]] * 2
team.ask("say")
return 0
""",
            3,
        )
    )
    assert first == (0, first[1], ""), first
    assert all(other[0] == 0 and "noise" not in other[1] + other[2] for other in others)


@pytest.mark.parametrize("what", [os.system, subprocess.Popen, eval, ranks.lost])
def test_unpacking_calls_nothing_of_others(what):
    class Bad:
        def __reduce__(self):
            return what, ("exit 0",)

    with pytest.raises(pickle.UnpicklingError, match="expected arrays, tensors, containers"):
        ranks.unpack(ranks.pack(Bad()))


def test_packing_keeps_values_as_they_are(tmp_path):
    value = {"t": torch.arange(6).reshape(2, 3).T, "e": torch.empty(0), "n": np.arange(3.0), "s": slice(1, 2), "p": tmp_path}
    value["h"] = torch.ones(2, dtype=torch.bfloat16)
    parts = ranks.pack(value)
    back = ranks.unpack([part.clone() for part in parts])
    assert torch.equal(back["t"], value["t"]) and back["e"].shape == (0,) and back["n"].tolist() == [0, 1, 2]
    assert back["s"] == slice(1, 2) and back["h"].dtype is torch.bfloat16
    assert len(parts[0]) < 2000  # the pickle holds no numbers,
    assert back["h"].tolist() == [1, 1] and back["p"] == tmp_path
    many = torch.zeros(1000)
    assert ranks.pack(many)[1].data_ptr() == many.data_ptr()  # and these are not copied


def test_errors_of_other_ranks_are_told_by_rank_0():
    first, other = ended(
        start(
            """
for command in ("wrong", "broken"):
    try:
        team.ask(command)
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
return 2
"""
        )
    )
    assert first[0] == 2 and "UserError: this can be mended\nRuntimeError: rank 1: KeyError: 'this cannot'\n" in first[1]
    assert other == (0, "", "")


def test_ranks_meet_and_rank_0_tells_what_kept_another():
    work = """
team.tell("come")
try:
    team.meet()
except UserError as error:
    return fail(str(error), 2)
return len(list(team.replies()))
"""
    first, *others = ended(start(work, 3))
    assert first == (2, first[1], "error: no data here\n")
    assert others == [(ranks.LOST, "", "")] * 2
    assert [each[0] for each in ended(start(work))] == [1, 0]


def test_a_rank_that_cannot_build_says_so_where_rank_0_waits(monkeypatch):
    error, met = UserError("no data here"), []

    def failing(config, public_seed):
        raise error

    def meet(found):
        met.append(found)
        raise ranks.RankLost("rank 0 ended")

    monkeypatch.setattr(worker, "build", failing)
    for mode, raised in (("clients", UserError), ("data", ranks.RankLost)):
        with pytest.raises(raised):
            worker.Worker(SimpleNamespace(meet=meet)).build(Config(parallel=ParallelConfig(mode=mode)), 0)
    assert met == [error]


def test_a_killed_rank_ends_rank_0_with_one_line():
    first, other = ended(start("try:\n    team.ask('die')\nexcept ranks.RankLost as error:\n    return fail(str(error), 1)"))
    assert other[0] == -signal.SIGKILL
    assert first[0] == 1 and first[2].count("\n") == 1 and "another rank ended" in first[2]


def test_a_killed_rank_0_ends_the_others():
    first, other = ended(start("os.kill(os.getpid(), signal.SIGKILL)"))
    assert first[0] == -signal.SIGKILL and other == (ranks.LOST, "", "")


def test_rank_0_fails_while_the_others_work():
    first, other = ended(start("team.tell('square', 3)\nprint('out')\nreturn fail('wrong', 2)"))
    assert first[0] == 2 and first[1].endswith("out\n") and first[2] == "error: wrong\n"
    assert other == (ranks.LOST, "", "")


def test_a_team_of_one_is_a_process_on_its_own(monkeypatch):
    monkeypatch.setattr(ranks, "_team", ranks.Team(0, 1))
    assert ranks.team() is None and ranks.join().size == 1


def test_a_process_without_launcher_has_no_ranks():
    code = "import sys; from fedllm import ranks; assert not ranks.launched() and ranks.team() is None and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
