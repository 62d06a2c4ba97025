"""The figures from which floors are set, on the rows that judge nothing: ``python -m networks.floors [NAME...]``.

A floor lies between the baseline and the trained network's figure, a ceiling between that figure and a perfect one.
"""

from __future__ import annotations

import sys

import torch

from networks.case import VALIDATION, Case, in_chunks
from networks.running import opened
from networks.table import CASES


def figures(case: Case) -> tuple[float, float]:
    """The baseline and the trained network's metric on the validation rows, in PyTorch."""
    trained = case.train(VALIDATION)
    reference, _ = opened(trained)

    def predict(inputs):
        return in_chunks(reference, inputs)

    return trained.baseline, trained.evaluate(predict, trained.data.test)[case.metric.name]


def main(names: list[str]) -> int:
    """Print each case's figures beside what the table states; 1 where the table is wrong on these rows."""
    torch.set_num_threads(1)
    wrong = 0
    for case in CASES:
        if names and case.name not in names:
            continue
        baseline, reached = figures(case)
        better = case.metric.better
        good = better(reached, case.floor) and better(case.ceiling, reached) and better(case.floor, baseline)
        wrong += not good
        print(
            f"{case.name:<18} {case.metric.name}: {case.rule} {baseline:.4f} (stated {case.baseline}), "
            f"floor {case.floor}, trained {reached:.4f}, ceiling {case.ceiling}{'' if good else '   WRONG'}",
            flush=True,
        )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
