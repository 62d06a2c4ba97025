"""The commands as a user runs them: in a process of their own, by exit code, standard output and standard error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from support.realbundles import expected, images, make_real_bundle

BUNDLE_COMMANDS = ("inspect", "verify", "keygen", "sign")
COMMANDS = (*BUNDLE_COMMANDS, "install", "rollback", "doctor", "infer", "serve", "watch", "demo", "export", "package")


class Cli:
    """Runs `outrider` with a state directory of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "state"

    def run(self, *args: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "outrider.cli", *map(str, args)],
            capture_output=True,
            text=True,
            cwd=self.folder,
            env={**os.environ, "STATE_DIRECTORY": str(self.state), **(env or {})},
            timeout=250,
        )

    def done(self, *args: str | Path, env: dict[str, str] | None = None) -> dict[str, Any]:
        """Run with --json; it must succeed, and print one object."""
        result = self.run(*args, "--json", env=env)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    def refused(self, *args: str | Path, env: dict[str, str] | None = None) -> str:
        """It must end with 1, an error and a hint, and no traceback; gives standard error."""
        result = self.run(*args, env=env)
        assert result.returncode == 1, (result.stdout, result.stderr)
        assert any(line.startswith("error: ") for line in result.stderr.splitlines())
        assert "Traceback" not in result.stderr
        assert result.stdout == ""
        return result.stderr


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    return Cli(tmp_path)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.outrider"
    make_real_bundle(path, formats=("onnx", "tflite"))
    return path


def save_images(cli: Cli, count: int = 5) -> Path:
    path = cli.folder / "in.npz"
    np.savez(path, image=images(count))
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(cli: Cli, command: str) -> None:
    result = cli.run(command, "--help")
    assert result.returncode == 0
    assert f"example:\n  outrider {command}" in result.stdout


def test_no_command_is_wrong_usage(cli: Cli) -> None:
    assert cli.run().returncode == 2
    assert cli.run("inspect").returncode == 2
    assert cli.run("nothing").returncode == 2


def test_help_lists_every_command(cli: Cli) -> None:
    out = cli.run("--help").stdout
    assert all(command in out for command in COMMANDS)


def test_inspect_tells_what_the_bundle_says(cli: Cli, bundle: Path) -> None:
    told = cli.done("inspect", bundle)
    assert told["name"] == "tiny"
    assert [variant["name"] for variant in told["variants"]] == ["onnx-float32", "tflite-float32"]
    assert told["interface"]["inputs"][0]["name"] == "image"
    text = cli.run("inspect", bundle).stdout
    assert "image: float32 [N, 1, 8, 8]" in text
    assert told["digest"] in text


def test_a_flipped_bit_is_refused(cli: Cli, bundle: Path) -> None:
    data = bytearray(bundle.read_bytes())
    data[200] ^= 1
    bundle.write_bytes(data)
    assert "hint: " in cli.refused("inspect", bundle)
    assert "hint: " in cli.refused("install", bundle)
    assert not list(cli.state.glob("names/*"))


def test_a_failure_with_json_is_an_object_too(cli: Cli, tmp_path: Path) -> None:
    result = cli.run("inspect", tmp_path / "absent.outrider", "--json")
    assert result.returncode == 1
    assert json.loads(result.stdout)["error"]["message"]


def test_debug_shows_the_traceback(cli: Cli, tmp_path: Path) -> None:
    result = cli.run("inspect", tmp_path / "absent.outrider", "--debug")
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_keys_signatures_and_trust(cli: Cli, bundle: Path) -> None:
    made = cli.done("keygen", "release", "--folder", "keys")
    assert "exists" in cli.refused("keygen", "release", "--folder", "keys")
    assert "not signed" in cli.refused("verify", bundle, "--trust", made["public"])
    signed = cli.done("sign", bundle, "--key", made["private"])
    assert signed["signatures"] == [made["key_id"]]
    assert cli.done("verify", bundle, "--trust", made["public"])["verified"] is True
    assert cli.done("verify", bundle)["verified"] is False
    other = cli.done("keygen", "other", "--folder", "keys")
    assert other["key_id"] in cli.refused("verify", bundle, env={"OUTRIDER_TRUST": other["public"]})


def test_install_infer_and_rollback(cli: Cli, bundle: Path) -> None:
    first = cli.done("install", bundle)
    assert first["choice"]["variant"] in {"onnx-float32", "tflite-float32"}
    second = cli.folder / "second.outrider"
    make_real_bundle(second, version=2, seed=1)
    assert cli.done("install", second)["version"] == 2
    source = save_images(cli)
    cli.done("infer", "tiny", "--input", source, "--output", "second.npz")
    assert cli.done("rollback", "tiny")["digest"] == first["digest"]
    cli.done("infer", "tiny", "--input", source, "--output", "first.npz")
    for name, seed in (("first.npz", 0), ("second.npz", 1)):
        with np.load(cli.folder / name) as out:
            np.testing.assert_allclose(out["logits"], expected(images(5), seed), atol=1e-4)


def test_install_shows_what_it_chose(cli: Cli, bundle: Path) -> None:
    text = cli.run("install", bundle).stdout
    lines = text.splitlines()
    told = cli.done("install", bundle)
    choice = told["choice"]
    assert f"serves     {choice['variant']} on {choice['engine']}, {choice['threads']} thread" in text
    assert f"because    {choice['reason']}" in text
    cells = [line for line in lines if line.startswith(("* ", "  ")) and line.endswith(" calls")]
    assert len(cells) == len(told["measured"])
    (chosen,) = [line for line in cells if line.startswith("*")]
    assert choice["variant"] in chosen and choice["engine"] in chosen
    assert "left out" in text


def test_a_bundle_that_is_too_slow_for_its_bound_is_refused(cli: Cli, bundle: Path) -> None:
    assert "the bound is 1e-06 ms" in cli.refused("install", bundle, "--latency-ms", "1e-6")
    assert cli.done("install", bundle, "--latency-ms", "1e6")["admitted"]


def test_infer_with_a_named_variant(cli: Cli, bundle: Path) -> None:
    source = save_images(cli)
    for variant in ("onnx-float32", "tflite-float32"):
        told = cli.done("infer", bundle, "--input", source, "--output", "out.npz", "--variant", variant)
        assert told["variant"] == variant
    assert "onnx-float32" in cli.refused(
        "infer", bundle, "--input", source, "--output", "out.npz", "--variant", "onnx-int4"
    )


def test_bad_inputs_name_the_tensor(cli: Cli, bundle: Path) -> None:
    for wrong, said in (
        ({"picture": images(1)}, "picture"),
        ({"image": images(1)[:, :, :4]}, "shape"),
        ({"image": images(1).astype(np.float64)}, "float64"),
        ({"image": np.full((1, 1, 8, 8), np.nan, np.float32)}, "NaN"),
    ):
        np.savez(cli.folder / "in.npz", **wrong)
        assert said in cli.refused("infer", bundle, "--input", "in.npz", "--output", "out.npz")
        assert not (cli.folder / "out.npz").exists()


def test_an_input_file_is_never_unpickled(cli: Cli, bundle: Path) -> None:
    np.savez(cli.folder / "in.npz", image=np.array([{"a": 1}], dtype=object))
    assert "plain arrays" in cli.refused("infer", bundle, "--input", "in.npz", "--output", "out.npz")


def test_an_endpoint_that_is_not_there(cli: Cli) -> None:
    source = save_images(cli)
    said = cli.refused("infer", "http://127.0.0.1:9/tiny", "--input", source, "--output", "out.npz")
    assert "127.0.0.1:9" in said


def test_an_endpoint_without_a_model_or_a_server_says_what_to_do(cli: Cli) -> None:
    source = save_images(cli)
    said = cli.refused("infer", "http://127.0.0.1:9", "--input", source, "--output", "out.npz")
    assert "http://127.0.0.1:9 names no model" in said and "URL/MODEL" in said
    assert "hint: " in cli.refused("infer", "http://127.0.0.1:9/tiny", "--input", source, "--output", "out.npz")


def test_nobody_is_told_how_to_load_a_file_unsafely(cli: Cli, bundle: Path) -> None:
    said = cli.refused("infer", bundle, "--input", bundle, "--output", "out.npz")
    assert "is not an .npz file" in said and "pickle" not in said and "hint: " in said


def test_a_name_that_is_not_installed(cli: Cli) -> None:
    source = save_images(cli)
    assert "nothing-here" in cli.refused("infer", "nothing-here", "--input", source, "--output", "out.npz")
    assert "nothing-here" in cli.refused("rollback", "nothing-here")


def test_a_state_directory_that_cannot_be_written(cli: Cli, bundle: Path) -> None:
    cli.state.write_text("a file where the folder should be")
    assert str(cli.state) in cli.refused("install", bundle)


def test_files_that_are_no_arrays_are_refused_and_nothing_is_written(cli: Cli, bundle: Path) -> None:
    from outrider.cli.infer import read_arrays
    from outrider_runtimes.errors import InputError

    np.save(cli.folder / "one.npy", np.zeros(3))
    header = b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': "
    members = {"huge": header + b"(10000000000000,), }", "open": header + b"((((("}
    for name, content in members.items():
        with zipfile.ZipFile(cli.folder / f"{name}.npz", "w") as archive:
            archive.writestr("image.npy", content.ljust(128))
    np.savez_compressed(cli.folder / "flipped.npz", image=images(4))
    content = bytearray((cli.folder / "flipped.npz").read_bytes())
    content[100] ^= 0xFF
    (cli.folder / "flipped.npz").write_bytes(content)
    (cli.folder / "empty.npz").write_bytes(b"")
    for name in ("one.npy", "huge.npz", "open.npz", "flipped.npz", "empty.npz", "not-there.npz", "."):
        with pytest.raises(InputError):
            read_arrays(cli.folder / name)
    assert "flipped.npz" in cli.refused("infer", bundle, "--input", "flipped.npz", "--output", "out.npz")
    assert not (cli.folder / "out.npz").exists()


def test_answers_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    from outrider.cli.infer import read_arrays, write_arrays
    from outrider_runtimes.errors import OutriderError

    named = {"file": images(1), "a/b": np.arange(3), "allow_pickle": np.bool_([True])}
    write_arrays(tmp_path / "out.npz", named)
    back = read_arrays(tmp_path / "out.npz")
    assert {name: array.tolist() for name, array in back.items()} == {n: a.tolist() for n, a in named.items()}
    before = (tmp_path / "out.npz").read_bytes()
    with pytest.raises(ValueError, match="Object arrays"):
        write_arrays(tmp_path / "out.npz", {"good": images(1), "bad": np.array([object()])})
    assert (tmp_path / "out.npz").read_bytes() == before
    os.mkfifo(tmp_path / "pipe")
    for name in ("not-there/out.npz", ".", "pipe"):
        with pytest.raises(OutriderError, match="cannot be written"):
            write_arrays(tmp_path / name, named)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npz", "pipe"]


def test_an_option_of_the_board_is_refused_for_an_endpoint(cli: Cli) -> None:
    source = save_images(cli)
    for option in (("--variant", "onnx-float32"), ("--threads", "2"), ("--trust", "keys")):
        said = cli.refused("infer", "http://127.0.0.1:9/tiny", "--input", source, "--output", "out.npz", *option)
        assert option[0] in said


def test_a_deadline_of_zero_is_refused_for_an_endpoint_too(cli: Cli) -> None:
    source = save_images(cli)
    done = cli.run("infer", "http://127.0.0.1:9/tiny", "--input", source, "--output", "out.npz", "--deadline-ms", "0")
    assert done.returncode == 2
    assert "--deadline-ms: '0' is not a number from 1e-06 to 1e+09" in done.stderr


def test_answers_are_not_written_over_their_inputs(cli: Cli, bundle: Path) -> None:
    before = save_images(cli).read_bytes()
    (cli.folder / "link.npz").symlink_to("in.npz")
    for output in ("in.npz", "link.npz"):
        assert "would be lost" in cli.refused("infer", bundle, "--input", "in.npz", "--output", output)
    assert (cli.folder / "in.npz").read_bytes() == before


def test_a_pipe_is_no_input(cli: Cli) -> None:
    os.mkfifo(cli.folder / "pipe")
    assert "not a regular file" in cli.refused("infer", "tiny", "--input", "pipe", "--output", "out.npz")


@pytest.mark.parametrize("measured", [{"metrics": 5}, {"metrics": ["a"]}, {"metrics": {"accuracy": "high"}}, {}])
def test_whatever_was_measured_can_be_shown(measured: dict[str, Any]) -> None:
    from outrider.cli.bundles import _metrics_text

    assert _metrics_text(measured.get("metrics")) == ""
    assert _metrics_text({"accuracy": 0.97312}) == "accuracy 0.9731"


def test_serve_and_infer_through_it_with_a_token(cli: Cli, bundle: Path) -> None:
    source = save_images(cli, 3)
    token = {"OUTRIDER_TOKEN": "s3cret"}
    server = subprocess.Popen(
        [sys.executable, "-m", "outrider.cli", "serve", str(bundle), "--port", "0"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "STATE_DIRECTORY": str(cli.state), **token},
    )
    try:
        assert server.stderr is not None
        url = next(line.split()[-1] for line in server.stderr if line.startswith("serving "))
        answer = cli.done("infer", f"{url}/tiny", "--input", source, "--output", "out.npz", env=token)
        assert answer["source"] == "cloud"
        np.testing.assert_allclose(np.load(cli.folder / "out.npz")["logits"], expected(images(3)), atol=1e-4)
        assert "401" in cli.refused("infer", f"{url}/tiny", "--input", source, "--output", "no.npz")
        assert not (cli.folder / "no.npz").exists()
    finally:
        server.terminate()
        out, _ = server.communicate(timeout=200)
    lines = out.splitlines()
    assert server.returncode == 0 and lines[0].startswith("stopped; in ")
    assert "1 of 1 requests answered, availability 100.00 %" in lines[0]
    assert lines[1].startswith("  tiny version 1: 1 of 1 requests answered")
    assert len(lines) == 2


@pytest.mark.parametrize("package", ["uvicorn", "starlette", "httptools", "prometheus_client"])
def test_serve_without_its_extra_names_the_pip_command(cli: Cli, bundle: Path, package: str) -> None:
    script = f"import sys; sys.modules[{package!r}] = None; from outrider.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", script, "serve", str(bundle), "--port", "0", "--state", str(cli.state)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 1
    assert package in done.stderr and "pip install 'outrider[serve]'" in done.stderr
    assert "Traceback" not in done.stderr and not cli.state.exists()


def test_a_strangers_names_cannot_command_the_terminal() -> None:
    from outrider.cli.text import shown

    assert shown("a\x1b]0;b\x07c\u202ed\udcff\ne \u00fc") == "a\\x1b]0;b\\x07c\\u202ed\\udcff\ne \u00fc"


SHELL = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}  # as a user's shell has it
ABSENT = ["error: absent: there is no such file", "hint: check the path"]


def unread() -> BinaryIO:
    """A pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "wb")


def run_into(cli: Cli, stdout: int, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "outrider.cli", *words]
    return subprocess.run(
        command, stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=cli.folder, env=SHELL, timeout=250
    )


@pytest.mark.parametrize("words", ["--help", "serve --help", "inspect tiny.outrider", "inspect absent --json"])
def test_a_reader_that_has_gone_sees_no_traceback(cli: Cli, bundle: Path, words: str) -> None:
    with unread() as pipe:
        done = run_into(cli, pipe.fileno(), *words.split())
    assert done.returncode == 1
    assert done.stderr.splitlines() == (ABSENT if "absent" in words else [])


@pytest.mark.parametrize("words", ["--help", "inspect tiny.outrider", "inspect tiny.outrider --json"])
def test_a_full_disk_under_standard_output_is_named(cli: Cli, bundle: Path, words: str) -> None:
    with Path("/dev/full").open("wb") as full:
        done = run_into(cli, full.fileno(), *words.split())
        failed = run_into(cli, full.fileno(), "inspect", "absent", "--json")
    assert done.returncode == failed.returncode == 1
    what, hint = done.stderr.splitlines()
    assert what == "error: standard output cannot be written: No space left on device" and hint.startswith("hint: ")
    assert failed.stderr.splitlines() == ABSENT


def test_a_stream_that_is_closed_is_not_the_other_one(cli: Cli, bundle: Path) -> None:
    def closed(redirection: str, *words: str) -> subprocess.CompletedProcess[str]:
        line = f'exec "$0" -m outrider.cli "$@" {redirection}'
        command = ["sh", "-c", line, sys.executable, *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=cli.folder, env=SHELL, timeout=250)

    assert closed(">&-", "inspect", "tiny.outrider").returncode == 0
    assert closed(">&-", "watch", "mqtt://127.0.0.1:1", "--seconds", "0.01").returncode == 0
    failed = closed("2>&-", "inspect", "absent", "--json")
    assert failed.returncode == 1
    assert json.loads(failed.stdout)["error"]["hint"]


def test_what_a_terminal_has_no_letters_for_is_no_failure(cli: Cli) -> None:
    done = cli.run("keygen", "gr\u00fcn", env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert "gr?n.key" in done.stdout


@pytest.mark.parametrize("disk_is_full", [False, True])
def test_answers_on_a_standard_output_that_is_gone_end_as_a_failure(cli: Cli, bundle: Path, disk_is_full: bool) -> None:
    (cli.folder / "agent.toml").write_text(
        f'device = "pi-07"\nstate = "state"\n[model]\nbundle = "{bundle.name}"\n[source]\nkind = "stdin"\n'
        '[output]\nfile = "-"\n[broker]\nurl = "mqtt://127.0.0.1:1"\n'
    )
    command = [sys.executable, "-m", "outrider.cli", "agent", "agent.toml"]
    with Path("/dev/full").open("wb") if disk_is_full else unread() as out:
        done = subprocess.run(
            command,
            input=json.dumps(images(1)[0].tolist()),
            stdout=out,
            stderr=-1,
            text=True,
            cwd=cli.folder,
            env=SHELL,
        )
    assert done.returncode == 1, done.stderr
    assert '"answered": 1' in done.stderr and '"answer_lost"' in done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
