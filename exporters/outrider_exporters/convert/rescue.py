"""An int8 file that misses a bound, made again with the layers in float that lose most."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from outrider_exporters.convert.files import ModelFile, check_file, parity, predict_file
from outrider_exporters.convert.losers import Loser, find_losers, keep_until, pairs_of
from outrider_exporters.convert.quantize import (
    CALIBRATION_BATCH,
    check_share,
    check_trained,
    encoded_rows,
    trained_ranges,
    write_file,
)
from outrider_exporters.convert.quiet import quiet
from outrider_exporters.convert.trained import Trained
from outrider_exporters.convert.write_onnx import examine_onnx
from outrider_exporters.convert.write_tflite import examine_tflite
from outrider_exporters.data import draw_rows
from outrider_exporters.passes.quantize import Quantize
from outrider_runtimes.errors import ExportError, InferenceError, ModelLoadError
from outrider_runtimes.tensors import Interface, Tensors

_log = logging.getLogger(__name__)
EXAMINED_ROWS = 32  # rows on which one pair against another is compared
OnTrial = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Rescue:
    """A mixed file that meets the bound.

    Attributes:
        file: int8 but for what was kept.
        rule: the rule that makes it at once: its ``keep_float`` names the operators.
        kept: what is in float, the worst first.
        losers: every operator with weights, the worst first.
    """

    file: ModelFile
    rule: Quantize
    kept: tuple[Loser, ...]
    losers: tuple[Loser, ...]

    @property
    def text(self) -> str:
        """What was kept in words: ``kept in float, ...: features.0 (0.31), head (0.12)``."""
        named = ", ".join(f"{loser.label} ({loser.error:.2g})" for loser in self.kept)
        return f"kept in float, with the output's error where it is quantized: {named}"


class _Bench:
    """One float file whose ranges were observed once, made again with other operators in float."""

    def __init__(
        self,
        source: ModelFile,
        calibration: Sequence[Tensors],
        interface: Interface,
        rule: Quantize,
        trained: Trained | None = None,
    ) -> None:
        self._source, self._interface, self.rule = source, interface, rule
        self._rows = encoded_rows(source, calibration, interface, batch=CALIBRATION_BATCH)
        self._inputs = draw_rows(calibration[0], interface, rows=EXAMINED_ROWS, seed=0)
        self._exact = predict_file(source, interface)(self._inputs)
        with quiet():
            examine = examine_onnx if source.format == "onnx" else examine_tflite
            self.operators, self._ranges = examine(source.path, self._rows, rule)
        if trained is not None:
            self._ranges = trained_ranges(source, interface, trained)

    def make(self, names: Sequence[str], path: Path) -> ModelFile:
        """The file with these operators in float besides those that the rule names."""
        rule = self.rule_with(names)
        return write_file(self._source, self._rows, self._interface, path, rule=rule, ranges=self._ranges)

    def rule_with(self, names: Sequence[str]) -> Quantize:
        """The rule with these operators in float too."""
        kept = (f"{self._source.format}:{name}" for name in names)
        return replace(self.rule, keep_float=(*self.rule.keep_float, *kept))

    def error_of_only(self, names: frozenset[str], path: Path) -> float:
        """The output's error where all but these are in float; none where such a file cannot be made."""
        try:
            file = self.make([o.name for o in self.operators if o.name not in names], path)
            return parity(self._exact, predict_file(file, self._interface)(self._inputs))
        except (ExportError, ModelLoadError, InferenceError):
            _log.debug("cannot quantize %s alone", sorted(names), exc_info=True)
            return 0.0


def losers_of(
    source: ModelFile,
    calibration: Sequence[Tensors],
    interface: Interface,
    *,
    rule: Quantize | None = None,
    on_trial: OnTrial | None = None,
) -> tuple[Loser, ...]:
    """What static int8 loses where: every operator with weights of a float32 file, the worst first.

    Errors are shares of the output's range, on at most ``EXAMINED_ROWS`` of the calibration rows.

    Args:
        on_trial: called before each trial with how many were made, how many there are to make, and what is tried.

    Raises:
        InputError, ExportError: as ``quantize_file``.
    """
    return _losers(_Bench(source, calibration, interface, rule or Quantize()), on_trial)


def rescue(
    source: ModelFile,
    calibration: Sequence[Tensors],
    interface: Interface,
    path: Path,
    *,
    holds: Callable[[ModelFile], bool],
    rule: Quantize | None = None,
    trained: Trained | None = None,
    on_trial: OnTrial | None = None,
) -> Rescue | None:
    """An int8 file with the fewest layers in float with which a bound holds.

    Args:
        source, calibration, interface: as ``quantize_file`` takes them.
        path: of the file; written in one step, nothing is left there where no such file was found.
        holds: whether a file meets the bound; the file is gone afterwards.
        rule: of scheme ``int8``; what it keeps in float already stays.
        trained: see ``quantize_file``.
        on_trial: see ``losers_of``.

    Returns:
        None where the bound holds with no file that has a share of its weights in int8.

    Raises:
        InputError, ExportError: as ``quantize_file``.
    """
    bench = _Bench(source, calibration, interface, rule or Quantize(), trained)
    losers = _losers(bench, on_trial)
    if not losers:
        return None

    def enough(kept: Sequence[Loser]) -> bool:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            try:
                file = bench.make(_names(kept), Path(folder) / path.name)
                check_share(file, source, bench.rule)
            except ExportError:
                _log.debug("cannot keep %s in float", [loser.label for loser in kept], exc_info=True)
                return False
            return holds(file)

    kept = keep_until(losers, enough)
    if kept is None:
        return None
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        file = bench.make(_names(kept), Path(folder) / path.name)
        if trained is not None:
            check_trained(file, trained)
        check_file(file, interface, calibration[0])
        file.path.replace(path)
    rule = bench.rule_with(_names(kept))
    scheme = file.scheme if trained is None else f"{file.scheme}-trained"
    return Rescue(file=replace(file, path=path, scheme=scheme), rule=rule, kept=kept, losers=losers)


def _losers(bench: _Bench, on_trial: OnTrial | None) -> tuple[Loser, ...]:
    total = len(pairs_of(bench.operators))
    done = 0
    with tempfile.TemporaryDirectory() as folder:

        def error_of(names: frozenset[str]) -> float:
            nonlocal done
            if on_trial is not None:
                on_trial(done, total, "what is lost where only two neighbours are quantized")
            done += 1
            return bench.error_of_only(names, Path(folder) / "only")

        return find_losers(bench.operators, error_of)


def _names(kept: Sequence[Loser]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for loser in kept for name in loser.names))
