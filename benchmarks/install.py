"""What a device's install weighs: resolved by pip for the board's platform, unpacked, and summed by package.

Nothing is run here: tests/boards/test_device_install.py runs what is resolved here on emulated boards.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import tomllib

from benchmarks.measure import say
from outrider_exporters.rehearse.plan import RECIPES, pip_options

ROOT = Path(__file__).parents[1]
# Where numpy and cffi have no wheel, they come with Debian's python3-numpy and python3-cffi-backend.
FROM_DEBIAN = {"aarch64": (), "arm": ("numpy",)}
SUBJECTS = (
    ("ONNX Runtime, 64-bit ARM", "aarch64", ("onnx", "mqtt")),
    ("LiteRT, 64-bit ARM", "aarch64", ("tflite", "mqtt")),
    ("tflite-runtime, 32-bit ARM", "arm", ("tflite-legacy", "mqtt")),
)
NOT_ON_A_BOARD = {"torch", "onnx", "tensorflow", "jax", "triton", "onnxscript", "rich", "matplotlib"}


def run(folder: Path) -> dict[str, Any]:
    """Resolve and weigh. Returns what is stored as ``results/install.json``."""
    found = {}
    for name, machine, extras in SUBJECTS:
        say(f"install: {name}")
        sizes = _sizes(folder / name.replace(" ", "-"), machine, extras)
        unwanted = sorted(NOT_ON_A_BOARD.intersection(sizes))
        found[name] = {
            "extras": list(extras),
            "megabytes": round(sum(sizes.values()) / 1e6, 1),
            "packages_mb": {package: round(size / 1e6, 2) for package, size in sorted(sizes.items())},
            "from_debian": list(FROM_DEBIAN[machine]),
            "unwanted": unwanted,
            "kept": not unwanted,
        }
    return {"python": "3.11", "installs": found}


def unpack(site: Path, machine: str, extras: tuple[str, ...]) -> None:
    """Have pip resolve and unpack what Outrider with these extras needs on that machine, from wheels alone."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(item for extra in extras for item in project["optional-dependencies"][extra])]
    by_hand = FROM_DEBIAN[machine]
    wanted = [item for item in wanted if not item.startswith(by_hand)] if by_hand else wanted
    options = [option for option in pip_options(RECIPES[machine]) if by_hand or option != "--no-deps"]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    subprocess.run([*pip, *options, "--target", site, *wanted], check=True)


def _sizes(site: Path, machine: str, extras: tuple[str, ...]) -> dict[str, int]:
    """Bytes by top-level folder of what pip unpacks for that machine, and of Outrider's own device packages."""
    unpack(site, machine, extras)
    sizes = {entry.name: _weight(entry) for entry in site.iterdir() if not entry.name.endswith(".dist-info")}
    return sizes | {
        name: _weight(ROOT / at / name) for at, name in (("sdk", "outrider"), ("runtimes", "outrider_runtimes"))
    }


def _weight(entry: Path) -> int:
    files = [entry] if entry.is_file() else entry.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file() and "__pycache__" not in file.parts)
