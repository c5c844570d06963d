import os
from collections.abc import Callable, Iterator

# Before torch is imported, here and in the processes that tests start. Their tensors are small, and threads that share
# operations on them wait for one another for long where other programs hold the cores. Tests of threads ask for more.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from processes import Processes

# Where there is no accelerator, an interpreter runs the kernels of Triton, on the CPU. Triton asks when it is imported.
if not (torch.cuda.is_available() or torch.xpu.is_available()):
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow ones first, so that the workers end together."""
    for item in items:
        if "group" in getattr(item, "fixturenames", ()):
            item.add_marker("slow")
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Processes]]:
    """The group of so many processes, which is made once."""
    groups: dict[int, Processes] = {}

    def of_size(size: int) -> Processes:
        if size not in groups:
            groups[size] = Processes(size, str(tmp_path_factory.mktemp(f"group_of_{size}") / "store"))
        return groups[size]

    yield of_size
    for processes in groups.values():
        processes.stop()


@pytest.fixture
def two_processes(group: Callable[[int], Processes]) -> Processes:
    return group(2)


@pytest.fixture
def three_processes(group: Callable[[int], Processes]) -> Processes:
    return group(3)


@pytest.fixture(params=[2, 3])
def processes(request: pytest.FixtureRequest, group: Callable[[int], Processes]) -> Processes:
    return group(request.param)
