from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings

import pytest

from outrider_exporters.convert.quiet import quiet


def shout(word: str) -> None:
    print(word)
    print(word, file=sys.stderr)
    os.write(1, word.encode())
    os.write(2, word.encode())
    logging.getLogger("torch.onnx").warning(word)
    warnings.warn(word, stacklevel=1)


def test_nothing_gets_out_and_then_everything_does(capfd):
    with quiet():
        shout("inside")
        os.system("echo inside")
    assert capfd.readouterr() == ("", "")
    print("after")
    os.write(2, b"after")
    assert capfd.readouterr() == ("after\n", "after")


def test_what_was_held_back_is_in_the_debug_log(caplog):
    with caplog.at_level(logging.DEBUG, logger="outrider_exporters.convert.quiet"), quiet():
        os.write(2, b"from C++")
    assert "from C++" in caplog.text


def test_an_error_passes_through_and_output_comes_back(capfd):
    with pytest.raises(ValueError, match="broken"), quiet():
        raise ValueError("broken")
    print("after")
    assert capfd.readouterr().out == "after\n"


def test_it_nests(capfd):
    with quiet():
        with quiet():
            shout("inner")
        shout("outer")
    assert capfd.readouterr() == ("", "")


def test_handlers_that_a_library_adds_do_not_stay():
    root = logging.getLogger()
    before, levels = list(root.handlers), (root.level, logging.getLogger("absl").level)
    with quiet():
        logging.basicConfig(force=True, level=logging.DEBUG)
    assert root.handlers == before
    assert (root.level, logging.getLogger("absl").level) == levels


def test_a_handler_made_inside_writes_to_the_real_stream_afterwards(capsys):
    with quiet():
        handler = logging.StreamHandler()
    logger = logging.getLogger("made.inside")
    logger.addHandler(handler)
    try:
        logger.warning("later")
    finally:
        logger.removeHandler(handler)
    assert capsys.readouterr().err == "later\n"


def test_a_process_without_standard_streams_works():
    code = """
import os
from outrider_exporters.convert.quiet import quiet
os.close(0), os.close(1), os.close(2)
with quiet():
    pass
os._exit(7)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=250).returncode == 7
