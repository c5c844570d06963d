import os
from collections.abc import Iterator

# Before torch is imported, here and in the processes that tests start. Their tensors are small, and threads that share
# operations on them wait for one another for long where other programs hold the cores. Tests of threads ask for more.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from processes import Processes


def _processes(size: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    processes = Processes(size, str(tmp_path_factory.mktemp(f"group_of_{size}") / "store"))
    yield processes
    processes.stop()


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    yield from _processes(2, tmp_path_factory)


@pytest.fixture(scope="session")
def three_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    yield from _processes(3, tmp_path_factory)


@pytest.fixture(params=[2, 3])
def processes(request: pytest.FixtureRequest) -> Processes:
    return request.getfixturevalue({2: "two_processes", 3: "three_processes"}[request.param])
