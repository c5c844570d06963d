"""Real processes, forked off one that has imported everything already: importing is what takes long."""

import contextlib
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from klmetric.__main__ import main

# So long that a busy machine does not reach it: it ends what would hang.
TIMEOUT = timedelta(minutes=5)
CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "klmetric.metric",
        "klmetric.summary",
        "lightning.pytorch",
        "pyarrow.parquet",
        "torch.distributed",
        "typer.testing",
    ]
)


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """Call `function(*args)` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=CONTEXT) as pool:
        return pool.submit(function, *args).result()


def forked(*arguments: object, cwd: Path, first: Callable[[], object] = int) -> subprocess.CompletedProcess[str]:
    """Run `klmetric` in a process of its own, in which `first()` is called before."""
    pipes = [CONTEXT.Pipe(duplex=False) for _ in range(2)]
    ends = [write for _, write in pipes]
    process = CONTEXT.Process(target=_forked, args=([str(x) for x in arguments], cwd, first, *ends))
    process.start()
    for end in ends:
        end.close()
    out, err = (open(read.fileno(), closefd=False).read() for read, _ in pipes)  # noqa: SIM115
    process.join()
    return subprocess.CompletedProcess(arguments, process.exitcode, out, err)


def _forked(arguments: list[str], cwd: Path, first: Callable[[], object], *ends: Connection) -> None:
    for name, end in zip(("stdout", "stderr"), ends, strict=True):
        stream = getattr(sys, name)
        os.dup2(end.fileno(), stream.fileno())
        setattr(sys, name, open(stream.fileno(), "w", closefd=False))  # noqa: SIM115
        end.close()
    os.chdir(cwd)
    sys.argv = ["klmetric", *arguments]
    first()
    main()


@contextlib.contextmanager
def as_launched(rank: int, size: int) -> Iterator[None]:
    """What torchrun sets, for Lightning to see that its processes are there already, and their group, too."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "GROUP_RANK": 0, "LOCAL_WORLD_SIZE": size}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1, "TORCHELASTIC_RUN_ID": "here"}
    with patch.dict(os.environ, {name: str(value) for name, value in names.items()}):
        yield


class Processes:
    """A gloo process group. It calls `function(rank, size, *args)` in all its processes, and returns what they do."""

    def __init__(self, size: int, store: str) -> None:
        self.size = size
        self.connections: list[Connection] = []
        self.processes = []
        for rank in range(size):
            here, there = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_serve, args=(rank, size, store, there), daemon=True)
            process.start()
            there.close()
            self.connections.append(here)
            self.processes.append(process)

    def __call__(self, function: Callable[..., Any], *args: Any, dying: tuple[int, ...] = ()) -> list[Any]:
        for connection in self.connections:
            connection.send((function, args))
        replies = [self._reply(rank, rank in dying) for rank in range(self.size)]
        failed = [reply for ok, reply in replies if not ok]
        assert not failed, "\n".join(failed)
        return [reply for _, reply in replies]

    def _reply(self, rank: int, dies: bool) -> tuple[bool, Any]:
        try:
            return self.connections[rank].recv()
        except EOFError:
            return (True, None) if dies else (False, f"rank {rank} died")

    def stop(self) -> None:
        for connection in self.connections:
            with contextlib.suppress(BrokenPipeError):  # it has died
                connection.send(None)
        for process in self.processes:
            process.join(30)


def _serve(rank: int, size: int, store: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=TIMEOUT)
    while (call := connection.recv()) is not None:
        function, args = call
        try:
            connection.send((True, function(rank, size, *args)))
        except BaseException:
            connection.send((False, f"rank {rank}:\n{traceback.format_exc()}"))
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def peak_from_now() -> float:
    """The MiB that this process holds, from which on its peak is measured."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> float:
    """The most that this process held, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
