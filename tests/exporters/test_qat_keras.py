from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from outrider_exporters import QAT, Data, Quantize
from outrider_exporters.convert.quantize import check_trained
from outrider_exporters.passes.base import PassContext
from outrider_exporters.sources.module import PositionalModule, interface_from_module, torch_predict, trainable_copy
from outrider_runtimes.errors import ConfigError, ExportError
from support import keras_models
from support.networks import digits
from support.training import CONVERTERS, TRAIN_ROWS, accuracy, float_file, int8_file

pytestmark = pytest.mark.slow
keras, layers = keras_models.keras, keras_models.layers


def fit(model: keras.Model, train: tuple[dict[str, np.ndarray], np.ndarray]) -> None:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.Adam(3e-3), loss=loss)
    model.fit(train[0]["image"], train[1], epochs=5, batch_size=64, verbose=0, shuffle=False)


def prepared(*middle: keras.Layer) -> tuple[PositionalModule, PassContext]:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((8, 8, 1)), *middle, layers.Flatten(), layers.Dense(10, name="scores")])
    images, targets = digits()
    images = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    example = {"image": images[:50]}
    interface = interface_from_module(model, example, ["logits"])
    data = Data(
        train=({"image": images[:TRAIN_ROWS]}, targets[:TRAIN_ROWS]),
        calibration=example,
        test=({"image": images[TRAIN_ROWS:]}, targets[TRAIN_ROWS:]),
    )
    network = trainable_copy(model, ["image"], ["logits"])
    return network, PassContext(interface=interface, example=example, data=data, fit=fit, network=network)


def test_keras_s_own_fit_trains_for_the_files(tmp_path):
    convolutions = layers.Conv2D(8, 3, padding="same", activation="relu"), layers.Conv2D(8, 3), layers.ReLU()
    network, work = prepared(convolutions[0], layers.MaxPooling2D(), *convolutions[1:], layers.Dropout(0.1))
    QAT().requires(work)
    detail = QAT().call(network, work)
    assert detail["layers"] == 3
    assert "scores matmul" in detail["ranges"]
    inputs, targets = work.data.test
    exact = float((torch_predict(network.module, work.interface)(inputs)["logits"].argmax(-1) == targets).mean())
    assert exact > 0.7
    wide = (dataclasses.replace(t, bounds=(t.bounds[0], 2 * t.bounds[1])) for t in network.trained.tensors)
    widened = dataclasses.replace(network.trained, tensors=tuple(wide))
    for kind in CONVERTERS:
        file = int8_file(float_file(kind, network.module, work, tmp_path), work, tmp_path, Quantize(), network.trained)
        assert exact - 0.02 < accuracy(file, work) < exact + 0.02
        with pytest.raises(ExportError, match="which no tensor was trained with"):
            check_trained(file, widened)


def test_batch_norm_of_keras_is_refused():
    _, work = prepared(layers.Conv2D(4, 3), layers.BatchNormalization())
    with pytest.raises(ConfigError, match="batch norm of Keras is not folded"):
        QAT().requires(work)
