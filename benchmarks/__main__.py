"""``python -m benchmarks [overhead|variants ...]``: measure, store the results, rewrite the README's figures."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from benchmarks import overhead, readme, variants
from benchmarks.measure import say, write_results

SUITES = {"overhead": overhead.run, "variants": variants.run}


def main(names: list[str]) -> int:
    """Run the named suites, or all."""
    if unknown := set(names) - set(SUITES):
        print(f"error: no suite {sorted(unknown)}\nhint: the suites are {sorted(SUITES)}", file=sys.stderr)
        return 2
    for name in names or SUITES:
        with tempfile.TemporaryDirectory() as folder:
            say(str(write_results(name, SUITES[name](Path(folder)))))
    readme.rewrite()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
