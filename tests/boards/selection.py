"""Which tests go along to an emulated board: those that need nothing that it does not have."""

from __future__ import annotations

import ast
import sys
from collections.abc import Collection
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parents[1]
ON_EVERY_BOARD = frozenset(
    ["numpy", "cryptography", "outrider", "outrider_runtimes", "pytest", "hypothesis", *sys.stdlib_module_names]
)
SERVER = "outrider.endpoint"  # stands on packages of the extra [serve]
# Minutes of an emulator, for what has nothing to do with the processor; or what is of this machine.
LEFT_OUT = {
    "unit/test_agent_doc.py": "is about a page of this repository",
    "unit/test_bundle_flips.py": "hashes 100,000 flipped bits",
    "unit/test_cli_numbers.py": "asks an installed distribution for its commands",
    "unit/test_effort.py": "is about this repository's Makefile",
    "unit/test_public_names.py": "is about an installed distribution",
    "unit/test_setup.py": "is about this repository's scripts",
}
DESELECTED = {
    "unit/test_engine_registry.py::test_for_a_format": "asks for both engines",
    "unit/test_engine_registry.py::test_require_engines_gives_what_engines_for_gives": "asks for both engines",
}
# Property tests try hundreds of cases each; the loop has them.
MARKERS = "not slow and not hypothesis"


def device_tests(has: Collection[str]) -> list[str]:
    """The paths below ``tests`` of the test files that need no more than every board has, and the packages ``has``."""
    allowed = ON_EVERY_BOARD | set(has)
    suite = [file for file in _files("conformance") if _loads(file, allowed)]
    units = [file for file in _files("unit") if _loads(file, allowed, everywhere=True)]
    names = [file.relative_to(TESTS).as_posix() for file in (*suite, *units)]
    return [name for name in names if name not in LEFT_OUT]


def _files(folder: str) -> list[Path]:
    return sorted((TESTS / folder).glob("test_*.py"))


def _loads(file: Path, allowed: Collection[str], *, everywhere: bool = False) -> bool:
    """Whether all that a file and its helpers import is allowed; in their functions too where ``everywhere``."""
    if not file.is_file():
        return True  # the package of helpers, or a name in a module that is looked at by its own import
    names = _imported(file, everywhere=everywhere)
    if any(name == SERVER or name.startswith(f"{SERVER}.") for name in names):
        return False
    helpers = {name for name in names if name.split(".")[0] == "support"}
    return all(name.split(".")[0] in allowed for name in names - helpers) and all(
        _loads(TESTS / f"{name.replace('.', '/')}.py", allowed, everywhere=everywhere) for name in helpers
    )


@cache
def _imported(file: Path, *, everywhere: bool) -> frozenset[str]:
    """The dotted names that a file imports; of ``from support import x`` also ``support.x``."""
    found: set[str] = set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
            if node.module == "support":
                found.update(f"support.{alias.name}" for alias in node.names)
    return frozenset(found)
