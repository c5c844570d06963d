"""Real processes with a gloo process group, kept for the whole test run: starting them is what takes long."""

import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class Processes:
    """Call `function(rank, size, *args)` in every process, at once; return the results in the order of the ranks."""

    def __init__(self, size: int, store: str, timeout: timedelta = timedelta(minutes=2)) -> None:
        self.size = size
        context = mp.get_context("spawn")
        self.connections: list[Connection] = []
        self.processes = []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, store, timeout, there), daemon=True)
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
        for connection, process in zip(self.connections, self.processes, strict=True):
            if process.is_alive():
                connection.send(None)
        for process in self.processes:
            process.join(30)


def _serve(rank: int, size: int, store: str, timeout: timedelta, connection: Connection) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout)
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
