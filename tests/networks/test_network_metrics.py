"""The table's own measures, on answers whose score is known."""

from __future__ import annotations

import numpy as np
import pytest

from networks.case import ACCURACY, RMSE, nearest_mean_accuracy
from networks.detector import CASES, KINDS, MAP, decoded, encoded, mean_average_precision, scenes
from networks.keras_networks import tokenize, word
from networks.reversal import LENGTH, VOCABULARY, greedy, sequences
from networks.running import snr_db
from outrider_exporters.gates import Figures


@pytest.fixture(scope="module")
def known():
    return scenes(20, np.random.default_rng(3))[1]


def perfect(known):
    """Boxes and scores that say exactly what is there."""
    targets = encoded(known)
    return targets[..., 1:], 20.0 * np.eye(1 + len(KINDS))[targets[..., 0].astype(int)]


def test_a_perfect_detector_scores_one(known):
    assert mean_average_precision(decoded(*perfect(known)), known) > 0.97


def test_a_detector_that_misses_half_of_the_pictures_scores_about_half(known):
    boxes, scores = perfect(known)
    scores[::2] = 20.0 * np.eye(1 + len(KINDS))[0]
    half = mean_average_precision(decoded(boxes, scores), known)
    assert 0.3 < half < 0.7
    figures = Figures(variant="onnx-int8", metrics={MAP.name: half}, size_bytes=1)
    assert [gate.judge(figures, {MAP.name: 0.9}).passed for gate in CASES[0].gates] == [False, False]


def test_boxes_in_the_wrong_place_score_nothing(known):
    boxes, scores = perfect(known)
    assert mean_average_precision(decoded(boxes - [0, 0, 3, 3], scores), known) < 0.05


def test_greedy_decoding_gives_the_network_its_own_answers():
    source, wanted = sequences(5, np.random.default_rng(0))

    def reverser(inputs):
        """Right as long as what it was given is its own answer so far."""
        begun, answer = inputs["begun"], inputs["source"][:, ::-1]
        own = np.array([[(begun[r, 1 : t + 1] == answer[r, :t]).all() for t in range(LENGTH)] for r in range(5)])
        return {"scores": np.eye(VOCABULARY)[np.where(own, answer, 0)]}

    assert np.array_equal(greedy(reverser, source), wanted)


def test_the_tokenizer_knows_its_words():
    tokens = tokenize([f"{word(0)} {word(399).upper()} nonsense", ""])
    assert tokens[0, :4].tolist() == [2, 401, 1, 0]
    assert not tokens[1].any()


def test_losses_are_in_allowed_drops():
    assert ACCURACY.loss(0.95, 0.94) == pytest.approx(1.0)
    assert RMSE.loss(0.50, 0.51) == pytest.approx(1.0)
    assert RMSE.loss(0.50, 0.49) < 0


def test_snr_is_in_decibels():
    before = {"a": np.ones((4, 2), np.float32)}
    assert snr_db(before, {"a": np.full((4, 2), 1.1, np.float32)}) == pytest.approx(20.0, abs=1e-3)
    assert snr_db(before, before) == float("inf")


def test_the_nearest_mean_is_found():
    train, labels = np.array([[0.0], [1.0], [10.0]], np.float32), np.array([0, 0, 1])
    assert nearest_mean_accuracy(train, labels, np.array([[2.0], [8.0]], np.float32), np.array([0, 0])) == 0.5
