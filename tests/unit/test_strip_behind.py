"""TFLite files whose weights stand behind the flatbuffer, as AI Edge Quantizer writes them from 256 kB on."""

from __future__ import annotations

import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

from outrider_exporters.convert.strip import strip_tflite
from support.tflitefiles import packed_tflite, parsed_tflite
from support.tinymodels import classifier_tflite, images, weights

ALIGNMENT = 16


def padded(content):
    return content + bytes(-len(content) % ALIGNMENT)


def with_weights_behind(content):
    model = parsed_tflite(content)
    behind = {at: buffer.data.tobytes() for at, buffer in enumerate(model.buffers) if buffer.data is not None}
    for at in behind:
        model.buffers[at].data, model.buffers[at].offset, model.buffers[at].size = None, 2, 2
    whole = padded(packed_tflite(model))
    for at, data in behind.items():
        model.buffers[at].offset, model.buffers[at].size = len(whole), len(data)
        whole = padded(whole + data)
    front = padded(packed_tflite(model))
    return front + whole[len(front) :]


def answers(content, x):
    interpreter = Interpreter(model_content=content, num_threads=1)
    interpreter.allocate_tensors()
    (given,), (wanted,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.set_tensor(given["index"], x)
    interpreter.invoke()
    return interpreter.get_tensor(wanted["index"])


def test_weights_behind_the_flatbuffer_come_into_it():
    plain = classifier_tflite(weights())
    behind = with_weights_behind(plain)
    x = images(1).transpose(0, 2, 3, 1).copy()
    wanted = answers(plain, x)
    assert answers(behind, x).tobytes() == wanted.tobytes()
    assert any(buffer.offset > 1 for buffer in parsed_tflite(behind).buffers)
    small = strip_tflite(behind)
    assert answers(small, x).tobytes() == wanted.tobytes()
    assert not any(buffer.offset > 1 for buffer in parsed_tflite(small).buffers)
    assert small == strip_tflite(plain)


def test_weights_in_another_file_are_refused():
    model = parsed_tflite(classifier_tflite(weights()))
    model.externalBuffers = [schema.ExternalBufferT()]
    with pytest.raises(ValueError, match="outside of it"):
        strip_tflite(packed_tflite(model))


def test_weights_that_stand_nowhere_are_refused():
    model = parsed_tflite(classifier_tflite(weights()))
    model.buffers[1].data, model.buffers[1].offset, model.buffers[1].size = None, 2**20, 36
    with pytest.raises(ValueError, match="offset"):
        strip_tflite(packed_tflite(model))
