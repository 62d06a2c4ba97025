"""What a Model or a Hybrid told its watchers of its calls."""

from __future__ import annotations

from outrider.hybrid import Hybrid
from outrider.model import Model
from outrider.prediction import Failure, Prediction


class Told:
    """Listens until ``end``."""

    def __init__(self, source: Model | Hybrid) -> None:
        self.predictions: list[Prediction] = []
        self.failures: list[Failure] = []
        self._ends = [source.on_prediction(self.predictions.append), source.on_failure(self.failures.append)]

    @property
    def names(self) -> list[str]:
        """Of the failures: the error's class, and whether it is the caller's own doing."""
        return ["refused: " * failure.refused + type(failure.error).__name__ for failure in self.failures]

    def forget(self) -> None:
        self.predictions.clear()
        self.failures.clear()

    def end(self) -> None:
        for end in self._ends:
            end()
