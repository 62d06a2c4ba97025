"""Every network of the list."""

from __future__ import annotations

from networks import attention, convolution, detector, generator, keras_networks, recurrent, reversal, tiny
from networks.case import Case

CASES: tuple[Case, ...] = (
    *convolution.CASES,
    *recurrent.CASES,
    *attention.CASES,
    *reversal.CASES,
    *keras_networks.CASES,
    *generator.CASES,
    *tiny.CASES,
    *detector.CASES,
)
