"""Every float32 that there is, as a reply in JSON writes it, read back through a float64."""

from __future__ import annotations

import numpy as np
import orjson
import pytest

from outrider_runtimes._oip_tensors import numbers
from support.mutants import write_results

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

INFINITY = 0x7F800000  # below it are the bits of all finite positive float32
AT_ONCE = 1 << 20


@pytest.mark.trials
def test_each_of_all_positive_float32_reads_back_as_itself() -> None:
    wrong = 0
    for start in range(0, INFINITY, AT_ONCE):
        bits = np.arange(start, min(start + AT_ONCE, INFINITY), dtype=np.uint32)
        listed = orjson.loads(f"[{numbers(bits.view(np.float32))}]")
        back = np.array(listed, np.float64).astype(np.float32).view(np.uint32)
        wrong += int(np.count_nonzero(back != bits))
    write_results("json-floats", {"tried": INFINITY, "wrong": wrong, "orjson": orjson.__version__})
    assert wrong == 0
