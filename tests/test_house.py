"""The shape of the house: which room may import which, no circles, and how deep the imports go."""

import ast
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src"

# Each room, and the rooms that it may import. A room that nobody names here may not be there.
ROOMS = {
    "options": set(),
    "arithmetic": {"options"},
    "rows": {"arithmetic", "options"},
    "totals": {"rows", "arithmetic", "options"},
    "accumulate": {"totals", "rows", "arithmetic", "options"},
    "top": {"accumulate", "totals", "rows", "arithmetic", "options", "command"},  # `__main__` starts the command
    "saved": {"arithmetic", "options"},
    "lightning": {"top", "accumulate", "rows", "options"},
    "command": {"lightning", "top", "saved", "accumulate", "totals", "rows", "arithmetic", "options"},
}
TOP = {"__init__", "__main__", "_version", "bounds", "functional", "metric", "summary", "estimate", "distributed"}
MOST_LEVELS = 9


def modules() -> dict[str, Path]:
    files = sorted((SOURCE / "klmetric").rglob("*.py"))
    return {".".join(f.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


def room_of(module: str) -> str:
    name = [*module.split("."), "__init__"][1]
    return "top" if name in TOP else name


@cache
def imports_of(module: str, at_start_only: bool) -> frozenset[str]:
    """The modules of klmetric that a module imports: when it is imported itself, or ever."""
    known = modules()
    tree = ast.parse(known[module].read_text())
    nodes = _at_start(tree) if at_start_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{module} imports relatively"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            inner = names & known.keys()
            found |= inner or {node.module}
    return frozenset((found & known.keys()) - {module})


def _at_start(tree: ast.AST):
    """The statements that run on import: not those within functions, nor those for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            continue
        yield node
        yield from _at_start(node)


@pytest.mark.parametrize("module", modules())
def test_a_room_imports_what_is_below_it(module):
    room = room_of(module)
    assert room in ROOMS, f"{module} is in no room"
    others = {room_of(other) for other in imports_of(module, at_start_only=False)} - {room}
    assert others <= ROOMS[room], f"{module} imports from {sorted(others - ROOMS[room])}"


def levels(at_start_only: bool) -> dict[str, int]:
    """How deep the imports of each module go; raises where they go in a circle."""
    depth: dict[str, int] = {}

    def visit(module: str, way: tuple[str, ...]) -> int:
        assert module not in way, f"a circle: {' -> '.join((*way, module))}"
        if module not in depth:
            below = [visit(other, (*way, module)) for other in imports_of(module, at_start_only)]
            depth[module] = 1 + max(below, default=0)
        return depth[module]

    for module in modules():
        visit(module, ())
    return depth


def test_no_circle_and_few_levels():
    assert max(levels(at_start_only=False).values()) >= 1  # raises where there is a circle
    depth = levels(at_start_only=True)
    deepest = max(depth, key=depth.__getitem__)
    assert depth[deepest] <= MOST_LEVELS, f"{deepest} is on level {depth[deepest]}"


def test_no_file_is_long():
    lengths = {module: len(file.read_text().splitlines()) for module, file in modules().items()}
    longest = max(lengths, key=lengths.__getitem__)
    assert lengths[longest] <= 420, f"{longest} has {lengths[longest]} lines: is it one idea?"
