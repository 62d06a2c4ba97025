"""What the tests of a Hybrid pass to it: inputs of a known margin, and one that looks at no board."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from outrider.hybrid import hybrid as hybrid_module

NOWHERE = Path("/nowhere")
Hybrid = partial(hybrid_module.Hybrid, root=NOWHERE)  # how hot this machine is decides no test
SURE = np.array([[9.0, 0.0, 0.0, 0.0]], dtype=np.float32)
UNSURE = np.array([[0.1, 0.0, 0.0, 0.0]], dtype=np.float32)
GENEROUS_MS = 120_000.0  # where no deadline should be met by chance on a loaded machine
