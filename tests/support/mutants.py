"""Model files that were cut short or had bytes changed, and their first run in the real admission child."""

from __future__ import annotations

import json
import platform
import random
import struct
import subprocess
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

from outrider.admit.admit import admit, default_limits
from outrider.admit.supervise import Limits
from outrider.bundle import Manifest, open_bundle
from outrider.installer import install, rollback
from outrider.model import Model, load
from outrider_runtimes.errors import AdmissionError, NoEngine
from support.realbundles import images, make_real_bundle

RESULTS = Path(__file__).parents[1] / "trials" / "results"
ROOT = Path(__file__).parents[2]
FIELDS = (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)  # what a length or an offset is least ready for
KINDS = ("truncated", "bytes", "field")
INSTALL_EVERY = 10  # mutants, of which one goes the whole way; of each kind, since there are three


def mutants(sources: Iterable[bytes], count: int, *, seed: int) -> Iterator[tuple[str, bytes]]:
    """``count`` of them with their kind, in turn: cut short; 1 to 8 bytes changed; one 32-bit word made extreme."""
    rng = random.Random(seed)
    originals = list(sources)
    for number in range(count):
        kind, data = KINDS[number % len(KINDS)], bytearray(originals[number // len(KINDS) % len(originals)])
        if kind == "truncated":
            del data[rng.randrange(len(data)) :]
        elif kind == "bytes":
            for _ in range(rng.randint(1, 8)):
                data[rng.randrange(len(data))] ^= rng.randint(1, 255)
        else:
            struct.pack_into("<I", data, rng.randrange(len(data) - 3), rng.choice(FIELDS))
        yield kind, bytes(data)


class Active:
    """A bundle that is installed and loaded, in a state directory in which others are installed over it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._state = folder / "state"
        self._turn = threading.Lock()
        make_real_bundle(folder / "good.outrider", formats=("onnx", "tflite"))
        install(folder / "good.outrider", state=self._state)
        self._model = load("tiny", state=self._state)
        self._before = _bits(self._model)

    def answers(self) -> bool:
        """Whether what is loaded gives the bits that it gave."""
        return _bits(self._model) == self._before

    def install(self, format_: str, data: bytes) -> str:
        """What an install of a next version with that model file makes of it, as ``Ground.admitted`` says it. What was
        active is loaded again and answers: at once where the install was refused, else after a rollback."""
        assert data, "a bundle has no empty member"
        with self._turn:
            path = self._folder / "next.outrider"
            make_real_bundle(path, version=2, formats=(format_,), files={format_: data})
            try:
                install(path, state=self._state, limits=tight_limits())
            except (AdmissionError, NoEngine) as error:
                outcome = _refusal(error)
            else:
                outcome = "admitted"
                rollback("tiny", state=self._state)
            with load("tiny", state=self._state) as again:
                assert again.bundle == self._model.bundle
                assert _bits(again) == self._before, f"a bundle that was {outcome} changed what is active"
            return outcome

    def __enter__(self) -> Active:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._model.close()


def _bits(model: Model) -> bytes:
    return model.predict(images(3))["logits"].tobytes()


def _refusal(error: AdmissionError | NoEngine) -> str:
    assert str(error) and "\n" not in str(error)
    return type(error).__name__


@dataclass(frozen=True, kw_only=True)
class Ground:
    """A good bundle of one variant, taken apart, whose model file is replaced before each try."""

    folder: Path
    manifest: Manifest
    members: Mapping[str, Path]

    @classmethod
    def make(cls, folder: Path, format_: str) -> Ground:
        path = folder / f"{format_}.outrider"
        make_real_bundle(path, formats=(format_,))
        with open_bundle(path) as bundle:
            members = {member: folder / member.replace("/", "-") for member in bundle.present}
            for member, file in members.items():
                file.write_bytes(bundle.read(member))
            return cls(folder=folder, manifest=bundle.manifest, members=members)

    @property
    def model(self) -> bytes:
        """The good file."""
        return self.members[self.manifest.variants[0].member].read_bytes()

    def admitted(self, path: Path, *, limits: Limits | None = None) -> str:
        """What admission makes of that file: ``admitted``, or its error's name; any other error is raised."""
        members = {**self.members, self.manifest.variants[0].member: path}
        try:
            admit(self.manifest, members, builds={}, limits=limits or tight_limits())
        except (AdmissionError, NoEngine) as error:
            return _refusal(error)
        return "admitted"

    def outcomes(self, tries: Iterable[tuple[str, bytes]], active: Active, *, side_by_side: int) -> Counter[str]:
        """How many of the tries ended how. After each, what is active answers."""

        def one(numbered: tuple[int, tuple[str, bytes]]) -> str:
            number, (kind, data) = numbered
            if number % INSTALL_EVERY == 0:
                outcome = active.install(self.manifest.variants[0].format, data)
            else:
                path = self.folder / f"{number}.model"
                path.write_bytes(data)
                outcome = self.admitted(path)
                path.unlink()
            assert active.answers(), f"mutant {number}, which was {outcome}, changed what is loaded"
            return f"{kind}: {outcome}"

        with ThreadPoolExecutor(side_by_side) as pool:
            return Counter(pool.map(one, enumerate(tries)))


def tight_limits(*, wall_s: float = 30.0) -> Limits:
    """What a mutant may use: the good model takes a second."""
    return Limits(wall_s=wall_s, cpu_s=60.0, rss_bytes=min(2 * 2**30, default_limits().rss_bytes))


def write_results(name: str, figures: Mapping[str, Any]) -> None:
    """Write ``tests/trials/results/<name>.json`` with the commit that was tried."""
    # The results themselves do not count: the trial before this one wrote its own.
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    status = ["git", "status", "--porcelain", "--", ".", f":(exclude){RESULTS.relative_to(ROOT)}"]
    changed = subprocess.run(status, cwd=ROOT, capture_output=True, text=True, check=True)
    RESULTS.mkdir(exist_ok=True)
    tried = {
        "commit": commit.stdout.strip(),
        "uncommitted_changes": bool(changed.stdout.strip()),
        "python": platform.python_version(),
        "packages": {package: version(package) for package in ("onnxruntime", "ai-edge-litert", "numpy")},
    }
    (RESULTS / f"{name}.json").write_text(json.dumps({**tried, **figures}, indent=2) + "\n", encoding="utf-8")
