"""What is measured, against whom. ``make bench`` runs all of it; results are committed with their environment."""

import sys
from pathlib import Path

# The networks that the tests train are measured here; they are written down once, as ``networks`` under ``tests``.
sys.path.append(str(Path(__file__).parents[1] / "tests"))
