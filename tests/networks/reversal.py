"""Item 5: a Transformer with encoder and decoder, on sequence reversal, decoded greedily through the bundle."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from networks.case import JUDGED, PREDICT_ROWS, Case, Metric, Predict, Trained, held_out_rows
from outrider_exporters import Data

VOCABULARY, LENGTH, WIDTH, HEADS, LAYERS = 100, 8, 64, 8, 6
BEGIN = 0
TOKEN_ACCURACY = Metric(name="token accuracy", in_points=True)


class Reverser(nn.Module):
    """source, begun: int64 [N, 8] -> scores: float32 [N, 8, 100]: of the token after each of ``begun``."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(0.5 * torch.randn(2, LENGTH, WIDTH))
        self.transformer = nn.Transformer(
            WIDTH, HEADS, LAYERS, LAYERS, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.dense = nn.Linear(WIDTH, VOCABULARY)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, source: torch.Tensor, begun: torch.Tensor) -> torch.Tensor:
        read, written = self.tokens(source) + self.positions[0], self.tokens(begun) + self.positions[1]
        return self.dense(self.transformer(read, written, tgt_mask=self.mask, tgt_is_causal=True))


def sequences(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens and the same backwards, int64 [N, 8]."""
    source = rng.integers(1, VOCABULARY, (count, LENGTH))
    return source, np.ascontiguousarray(source[:, ::-1])


def begun_with(wanted: np.ndarray) -> np.ndarray:
    """What the decoder has before each token of an answer."""
    return np.concatenate([np.full((len(wanted), 1), BEGIN), wanted[:, :-1]], 1)


def greedy(predict: Predict, source: np.ndarray) -> np.ndarray:
    """The answer, token by token, each given the ones that were answered before it."""
    answer = np.full((len(source), LENGTH + 1), BEGIN)
    for at in range(LENGTH):
        scores = predict({"source": source, "begun": np.ascontiguousarray(answer[:, :-1])})["scores"]
        answer[:, at + 1] = scores[:, at].argmax(-1)
    return answer[:, 1:]


def token_accuracy(predict: Predict, test: Any) -> dict[str, float]:
    inputs, wanted = test
    source = inputs["source"]
    answers = [greedy(predict, source[at : at + PREDICT_ROWS]) for at in range(0, len(source), PREDICT_ROWS)]
    return {"token accuracy": float((np.concatenate(answers) == wanted).mean())}


def train(held_out: int = JUDGED) -> Trained:
    """Until 97 % of a batch's tokens are right, 600 steps at the most."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    network = Reverser()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    recent = 0.0
    for step in range(600):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 40)
        source, wanted = (torch.from_numpy(array) for array in sequences(64, rng))
        begun = torch.from_numpy(begun_with(wanted.numpy()))
        scores = network(source, begun)
        optimizer.zero_grad()
        nn.functional.cross_entropy(scores.flatten(0, 1), wanted.flatten()).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        recent = 0.8 * recent + 0.2 * float((scores.argmax(-1) == wanted).float().mean())
        if recent >= 0.97:
            break
    source, wanted = sequences(250, held_out_rows(held_out))
    inputs = {"source": source, "begun": begun_with(wanted)}
    calibration, answers = sequences(100, rng)
    return Trained(
        module=network.eval(),
        example={name: array[:2] for name, array in inputs.items()},
        outputs=("scores",),
        data=Data(calibration={"source": calibration, "begun": begun_with(answers)}, test=(inputs, wanted)),
        evaluate=token_accuracy,
        baseline=float((source == wanted).mean()),
        decide=lambda outputs, _: outputs["scores"].argmax(-1),
        live=True,
        samples=wanted.size,
    )


CASES = (
    Case(
        name="reversal",
        item=5,
        network="Transformer, token and position embeddings, vocabulary 100, 6 + 6 layers, 8 heads, d_model 64",
        data="sequences of 8 random tokens, to be said backwards; 2,000 tokens by greedy decoding",
        parameters=516_452,
        metric=TOKEN_ACCURACY,
        rule="the sequence as it is",
        baseline=0.01,
        floor=0.95,
        ceiling=0.9995,
        forms={"onnx": "dynamic", "tflite": "dynamic"},
        train=train,
    ),
)
