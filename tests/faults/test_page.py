"""docs/reliability.md: every promise names tests that are there, and every test of a fault stands on the page."""

import ast
import re

from tests.faults.parts import ROOT

PAGE = (ROOT / "docs" / "reliability.md").read_text()
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", PAGE)


def names_in(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_test_on_the_page_is_there() -> None:
    assert len(NAMED) > 50
    for path in {path for path, _ in NAMED}:
        missing = {name for file, name in NAMED if file == path} - names_in(path)
        assert not missing, f"{path} has no {missing}"


def test_every_test_of_a_fault_is_on_the_page() -> None:
    for path in sorted((ROOT / "tests" / "faults").glob("test_*.py")):
        name = path.relative_to(ROOT).as_posix()
        if path.stem != "test_page":
            missing = names_in(name) - {test for file, test in NAMED if file == name}
            assert not missing, f"the page leaves out {missing} of {name}"


def test_at_least_thirty_kinds_of_fault_each_with_a_test() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| fault")]
    assert len(rows) >= 30
    for row in rows:
        cells = re.split(r"(?<!\\)\|", row)[1:-1]
        assert len(cells) == 4 and all(cell.strip() for cell in cells[:3]) and "::test_" in cells[2], row
