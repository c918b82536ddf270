"""Many processes, one brain: rank 0 decides and writes everything, the others wait for its word and do a share of the work.

The process group is torch's (gloo for tensors in memory, NCCL for those on GPUs), found by what a launcher such as `deepspeed` or
`torchrun` leaves in the environment. Ranks are one job of one user. What they say to each
other is pickled, unlike messages between clients and servers, and read back by an unpickler that knows data and this project's classes
alone. Without a launcher nothing of this is imported or opened.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from fedllm.errors import RunStopped, UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

MEET = timedelta(minutes=2)  # for all ranks to come
PATIENCE = timedelta(days=30)  # for a word: fitting a codec may take hours, and a dead rank is noticed by its closed connection
GRACE = 5.0  # seconds that a rank who lost another leaves to the launcher, which tells the death and ends them all
LOST = 3  # exit status of a rank that lost another and has nothing to say of it

STOP = "stop"
SHOWN = (UserError, RunStopped, FloatingPointError)  # raised on rank 0 as they were on the rank that met them

_team: Team | None = None


class RankLost(RunStopped):
    """Another rank ended without a word."""


def lost() -> RankLost:
    """What to raise where the connection to another rank is closed, once the launcher has had its time to tell why."""
    time.sleep(GRACE)
    return RankLost("another rank ended; everything up to the last round is kept: resume the run")


def launched() -> bool:
    """Whether a launcher started several ranks, of which this process is one."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def team() -> Team | None:
    """The ranks that this process has joined; None for a process on its own, though it be a team of one."""
    return _team if _team is not None and _team.size > 1 else None


def join() -> Team:
    """Meet the other ranks, once; a process that no launcher started becomes a team of one.

    Raises RankLost where they do not all come.
    """
    global _team
    if _team is None:
        import torch
        import torch.distributed as dist

        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if launched():
            share_cores()
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            try:
                store, rank, size = next(dist.rendezvous("env://", timeout=MEET))
                dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
            except (RuntimeError, ValueError) as error:
                what = str(error).splitlines()[0]
                raise RankLost(f"{os.environ['WORLD_SIZE']} ranks did not meet at {where} within {MEET.seconds} s: {what}") from None
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        _team = Team(dist.get_rank(), dist.get_world_size())
    return _team


def share_cores() -> None:
    """Give this rank its part of the machine's cores, unless OMP_NUM_THREADS says how many."""
    import torch

    here = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or os.environ["WORLD_SIZE"])
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here))


class Team:
    """This rank among all: collectives for any value, and rank 0's way to have work done.

    Every collective is called by all ranks in the same order. Values may hold tensors in memory of any size; these are not copied.
    All raise RankLost where another rank is gone.
    """

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size
        self._owed: list[int] = []  # ranks that rank 0 has yet to hear from
        self._whole = True  # no collective was broken off
        self.left = False

    # -- collectives -----------------------------------------------------------------------------------------------------------------

    def broadcast(self, value: Any = None) -> Any:
        """Rank 0's value, on every rank."""
        import torch.distributed as dist

        return self._travel(value, self.rank == 0, lambda part: dist.broadcast(part, 0))

    def send(self, value: Any, to: int) -> None:
        """Hand a value to one rank, which must `receive` it."""
        import torch.distributed as dist

        self._travel(value, True, lambda part: dist.send(part, to))

    def receive(self, source: int) -> Any:
        """What `source` sends."""
        import torch.distributed as dist

        return self._travel(None, False, lambda part: dist.recv(part, source))

    def scatter(self, values: Sequence[Any] | None = None) -> Any:
        """This rank's one of rank 0's values, one a rank."""
        if self.rank != 0:
            return self.receive(0)
        for rank in range(1, self.size):
            self.send(values[rank], rank)
        return values[0]

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's value, on rank 0; None elsewhere."""
        if self.rank != 0:
            self.send(value, 0)
            return None
        return [value, *(self.receive(rank) for rank in range(1, self.size))]

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        import torch.distributed as dist

        with self._together():
            dist.all_reduce(tensor)
        return tensor

    def meet(self, error: Exception | None = None) -> None:
        """Go on when all ranks have come as far as this; `error`: what kept this one from it.

        Raises on rank 0 what another rank met, which must end it: the others get no answer.
        """
        for found in self.gather(None if error is None else self._told(error)) or ():
            if found is not None:
                raise found
        self.broadcast()

    # -- rank 0's word, and the others' answers ------------------------------------------------------------------------------------------

    def tell(self, name: str, *arguments: Any, shares: Sequence[Any] | None = None) -> None:
        """Rank 0: have every other rank call its worker's method `name`; `replies` must follow.

        shares: one a rank, rank 0's among them: each rank gets its own as the last argument.
        """
        self.broadcast((name, arguments, shares is not None))
        if shares is not None:
            self.scatter(shares)
        self._owed = list(range(1, self.size))

    def replies(self) -> Iterator[Any]:
        """Rank 0: what the others' methods returned, rank 1's first, each as it is asked for.

        Raises what a method raised; an exception that no user can mend comes as a RuntimeError that names the rank.
        """
        while self._owed:
            answer = self.receive(self._owed[0])
            self._owed.pop(0)
            if isinstance(answer, Exception):
                raise answer
            yield answer

    def ask(self, name: str, *arguments: Any, shares: Sequence[Any] | None = None) -> list[Any]:
        """`tell` and all `replies`."""
        self.tell(name, *arguments, shares=shares)
        return list(self.replies())

    def serve(self, worker: Any) -> None:
        """Ranks above 0: do what rank 0 tells, until it says stop."""
        while True:
            name, arguments, shared = self.broadcast()
            if name == STOP:
                self.leave()
                return
            if shared:
                arguments = (*arguments, self.scatter())
            try:
                answer = getattr(worker, name)(*arguments)
            except RankLost:
                raise
            except Exception as error:
                answer = self._told(error)
            self.send(answer, 0)

    def _told(self, error: Exception) -> Exception:
        """What rank 0 is to raise."""
        return error if isinstance(error, SHOWN) else RuntimeError(f"rank {self.rank}: {type(error).__name__}: {error}")

    def stop(self) -> None:
        """Rank 0: let the others end. Those that are still at work learn it from the closed connection."""
        if self._whole and not self._owed:
            with contextlib.suppress(RankLost):  # the work is done without them
                self.broadcast((STOP, (), False))
                self.leave()

    def leave(self) -> None:
        """Close the connections, which gloo's threads would otherwise find closed by the other side, and abort."""
        import torch
        import torch.distributed as dist

        self.all_reduce(torch.zeros(1))
        dist.destroy_process_group()
        self.left = True

    def _travel(self, value: Any, has: bool, move: Callable[[Tensor], Any]) -> Any:
        """Move a value as sizes and bytes; whoever `has` it packs it, the others make room and unpack."""
        import torch

        with self._together():
            parts = pack(value) if has else []
            count = torch.tensor([len(parts)])
            move(count)
            sizes = torch.tensor([len(part) for part in parts] if has else [0] * int(count))
            move(sizes)
            if not has:
                parts = [torch.empty(size, dtype=torch.uint8) for size in sizes.tolist()]
            for part in parts:
                if len(part):
                    move(part)
        return value if has else unpack(parts)

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        self._whole = False
        try:
            yield
        except RuntimeError as error:  # gloo: the connection was closed
            if os.environ.get("FEDLLM_DEBUG") == "1":
                print(f"rank {self.rank}: {error}", file=sys.stderr, flush=True)
            raise lost() from None
        self._whole = True


def among(work: Callable[[], int], worker: Callable[[Team], Any], fail: Callable[[str, int], int]) -> int:
    """The exit status of this rank: rank 0's is that of `work`; the others serve a `worker`, and say nothing.

    fail: tells one line and returns the status.
    """
    first = os.environ["RANK"] == "0"
    if not first:
        hush()
    try:
        found = join()
    except RankLost as error:
        return fail(str(error), 1) if first else LOST
    if first:
        try:
            status = work()
        finally:
            found.stop()
    else:
        try:
            found.serve(worker(found))
            status = 0
        except (RankLost, KeyboardInterrupt):
            status = LOST
    if not found.left:  # gloo's threads find connections closed while Python winds up, and abort: the status would be theirs
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def hush() -> None:
    """From here on this process writes nothing: what there is to tell goes through rank 0 (FEDLLM_DEBUG=1 lets it speak)."""
    if os.environ.get("FEDLLM_DEBUG") != "1":
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(nowhere, stream)


# -- values as flat bytes ------------------------------------------------------------------------------------------------------------


_PLAIN = {
    ("fedllm.ranks", "_tensor"), ("numpy", "dtype"), ("numpy", "ndarray"), ("numpy._core.numeric", "_frombuffer"),
    ("numpy._core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "scalar"), ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"), ("pathlib", "WindowsPath"),
    *(("builtins", name) for name in ("set", "frozenset", "slice", "range", "complex", "bytearray")),
}  # fmt: skip


def _tensor(numbers: np.ndarray, half: bool, device: str, trained: bool | None) -> Tensor:
    """A tensor on an array's memory. half: of bfloat16, held as int16. trained: a Parameter's requires_grad, else None."""
    import torch

    found = torch.from_numpy(numbers)
    found = (found.view(torch.bfloat16) if half else found).to(device)
    return found if trained is None else torch.nn.Parameter(found, requires_grad=trained)


class _Pickler(pickle.Pickler):
    """Leaves the numbers of tensors where they are, as it does those of arrays."""

    def reducer_override(self, value: Any) -> Any:
        import torch

        if type(value) in (torch.Tensor, torch.nn.Parameter):
            half = value.dtype is torch.bfloat16
            plain = value.detach().cpu().contiguous()
            trained = value.requires_grad if isinstance(value, torch.nn.Parameter) else None
            return _tensor, ((plain.view(torch.int16) if half else plain).numpy(), half, str(value.device), trained)
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    """Knows arrays, tensors, containers, paths, exceptions and this project's own classes: bytes of anyone else's making call nothing."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN:
            return super().find_class(module, name)
        if module.partition(".")[0] in ("fedllm", "dr_encoder", "builtins") and "." not in name:
            found = super().find_class(module, name)
            ours = module != "builtins" or (isinstance(found, type) and issubclass(found, BaseException))
            if ours and isinstance(found, type) and found.__module__ == module:
                return found
        raise pickle.UnpicklingError(f"{module}.{name}: expected arrays, tensors, containers and classes of this project between ranks")


def pack(value: Any) -> list[Tensor]:
    """A value as bytes: its pickle, then the buffers of its arrays and tensors, which are not copied."""
    import torch

    buffers: list[pickle.PickleBuffer] = []
    file = io.BytesIO()
    _Pickler(file, protocol=5, buffer_callback=buffers.append).dump(value)
    views = [file.getbuffer(), *(buffer.raw() for buffer in buffers)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of arrays that may not be written to: nobody does
        return [torch.frombuffer(view, dtype=torch.uint8) if view.nbytes else torch.empty(0, dtype=torch.uint8) for view in views]


def unpack(parts: Sequence[Tensor]) -> Any:
    """Inverse of `pack`. Raises pickle.UnpicklingError for what does not travel between ranks."""
    return _Unpickler(io.BytesIO(parts[0].numpy()), buffers=[part.numpy() for part in parts[1:]]).load()
