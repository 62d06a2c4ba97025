"""What is wrong with this installation: one check a thing that can be wrong, each with its cause and cure."""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from outrider._version import __version__
from outrider.admit.strangers import ask_child, broken_strangers
from outrider.bundle import find_trust, key_id
from outrider.installer import admissions_of
from outrider.store import Store, find_state_dir
from outrider.store.blobs import is_whole
from outrider_runtimes.board import this_board
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.engines import Engine, find_engines
from outrider_runtimes.engines.onnxruntime import ACCELERATED, has_nvidia_gpu
from outrider_runtimes.errors import OutriderError, StateDirectoryError
from outrider_runtimes.heat import read_heat

if TYPE_CHECKING:
    from outrider_runtimes.tls import Tls

Status = Literal["ok", "warning", "broken"]

NETWORK_MS = 5000.0
SOONEST_S = 1_735_689_600.0  # 2025-01-01: a clock that says an earlier time was never set
HOT_C = 80.0  # where a Raspberry Pi begins to slow down
LITTLE_SPACE, NO_SPACE = 200 * 2**20, 20 * 2**20
LITTLE_MEMORY = 64 * 2**20
ABSENT = "not installed"
_WORKS = """
from outrider_runtimes.engines import engine_named
engine = engine_named(sys.argv[1])
reason = engine.check()
print(reason or engine.version())
sys.exit(REFUSED if reason else 0)
"""
ENGINE_PACKAGES = ("onnxruntime", "ai_edge_litert", "tflite_runtime")


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what; ``engine onnxruntime``, ``clock``, ...
        status: ``broken`` where something will fail, ``warning`` where it may, or where a figure suffers.
        found: what is there.
        cause: what is wrong, and cure, what to do about it; both empty where nothing is.
    """

    name: str
    status: Status
    found: str
    cause: str = ""
    cure: str = ""

    def to_dict(self) -> dict[str, str]:
        """As JSON has it."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Patient:
    """What is examined.

    Attributes:
        state, trust: as in ``outrider.load``.
        broker: ``mqtt://...``; not looked at where it is None.
        login: who logs in there, and the password; None for nobody.
        tls: the certificates for ``mqtts://``; None for the system's.
        endpoint: a URL, with a model's name at its end or without; not looked at where it is None.
        token: the endpoint's.
        root: where ``proc``, ``sys`` and ``dev`` are.
        environ: the environment.
        now_s: the time since 1970.
        synchronised: whether something keeps the clock right; None where that cannot be told.
    """

    state: Path | None = None
    trust: Path | None = None
    broker: str | None = None
    login: tuple[str, str | None] | None = None
    tls: Tls | None = None
    endpoint: str | None = None
    token: str | None = None
    root: Path = Path("/")
    environ: Mapping[str, str]
    now_s: Callable[[], float] = time.time
    synchronised: Callable[[], bool | None]


def examine(patient: Patient) -> list[Check]:
    """Every check, in the order of what rests on what. A check that fails itself is a broken one; nothing is raised."""
    checks: list[Check] = []
    for name, (look, cure) in _CHECKS.items():
        try:
            checks += look(patient)
        except Exception as error:
            hint = error.hint if isinstance(error, OutriderError) else ""
            checks.append(
                Check(name=name, status="broken", found="", cause=str(error) or repr(error), cure=hint or cure)
            )
    return checks


def _python(_: Patient) -> Iterable[Check]:
    found = f"Python {platform.python_version()}, outrider {__version__}, numpy {np.__version__}"
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        yield Check(
            name="python",
            status="warning",
            found=found,
            cause="Outrider is tested with Python 3.10 to 3.13",
            cure="use one of those: python3.12 -m venv .venv",
        )
    else:
        yield Check(name="python", status="ok", found=found)


def _engines(patient: Patient) -> Iterable[Check]:
    """Each engine in a child of its own: importing one may be what kills a process."""
    broken = broken_strangers()
    engines = find_engines(patient.root, left_out=broken)
    checks = [_engine(engine) for engine in engines]
    working = {
        format
        for engine, check in zip(engines, checks, strict=True)
        if check.status == "ok"
        for format in engine.formats
    }
    checks = [
        Check(name=check.name, status="ok", found=check.found)
        if check.found == ABSENT and working.issuperset(engine.formats)
        else check
        for engine, check in zip(engines, checks, strict=True)
    ]
    if not working:
        yield Check(
            name="engines",
            status="broken",
            found="none that works",
            cause="without an engine no model runs",
            cure="pip install 'outrider[onnx]' or 'outrider[tflite]'",
        )
    yield from checks
    for name, (cause, cure) in broken.items():
        yield Check(name=f"engine {name}", status="broken", found="", cause=cause, cure=cure)
    yield from duplicates(metadata.packages_distributions())


def duplicates(distributions: Mapping[str, Iterable[str]]) -> Iterable[Check]:
    """Engines whose import package several distributions own: whichever was installed last has overwritten the other's.

    ``distributions``: by import package, as ``importlib.metadata.packages_distributions`` gives it.
    """
    for package in ENGINE_PACKAGES:
        owners = sorted({name.lower().replace("_", "-") for name in distributions.get(package, ())})
        if len(owners) > 1:
            yield Check(
                name=f"package {package}",
                status="broken",
                found=" and ".join(owners),
                cause=f"{len(owners)} distributions own the package {package}; their files are mixed",
                cure=f"pip uninstall -y {' '.join(owners)}, then install the one that this board needs",
            )


def _engine(engine: Engine) -> Check:
    name = f"engine {engine.name}"
    heard = ask_child(_WORKS, engine.name)
    if heard.cause:
        return Check(name=name, status="broken", found="", cause=heard.cause, cure=heard.cure)
    if not heard.refused:
        return Check(name=name, status="ok", found=f"version {heard.said}")
    reason, _, cure = heard.said.partition("; ")
    absent = reason.endswith("is not installed")
    return Check(
        name=name,
        # A way onto a GPU that does not start costs speed; the processor answers.
        status="warning" if absent or engine.name in {way.name for way in ACCELERATED} else "broken",
        found=ABSENT if absent else "",
        cause=reason,
        cure=cure,
    )


def _processor(patient: Patient) -> Iterable[Check]:
    board = this_board(patient.root)
    features = ", ".join(sorted(board.features))
    if features or board.machine not in ("x86_64", "aarch64", "arm"):
        yield Check(name="processor", status="ok", found=f"{board.machine}: {features or 'no features known'}")
    else:
        yield Check(
            name="processor",
            status="warning",
            found=board.machine,
            cause="what the CPU can do is not known: /proc is not readable, or an emulator's",
            cure="mount /proc; figures of an emulator are not a board's",
        )
    if has_nvidia_gpu(patient.root):
        yield Check(name="gpu", status="ok", found="an NVIDIA device; see the engines onnxruntime-cuda and -tensorrt")
    online = os.cpu_count() or board.cpus
    yield Check(name="threads", status="ok", found=f"{board.cpus} of {online} CPUs may be used at once")
    yield _memory(patient, board.memory_bytes)


def _memory(patient: Patient, total_bytes: int) -> Check:
    free = None
    for line in _text(patient.root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    found = f"{total_bytes / 2**20:.0f} MiB, {'unknown' if free is None else f'{free / 2**20:.0f} MiB'} free"
    if free is not None and free < LITTLE_MEMORY:
        return Check(
            name="memory",
            status="warning",
            found=found,
            cause="an engine alone takes some 40 MiB",
            cure="stop what is not needed, or add swap (zram)",
        )
    return Check(name="memory", status="ok", found=found)


def _heat(patient: Patient) -> Iterable[Check]:
    heat = read_heat(patient.root)
    known = [] if heat.celsius is None else [f"{heat.celsius:.0f} C"]
    known += [] if heat.ceiling is None else [f"allowed {heat.ceiling:.0%} of the highest frequency"]
    found = ", ".join(known) or "no sensor"
    cause, cure = "", ""
    if heat.undervolted:
        cause, cure = "the supply is too weak, so the board slows down", "use the board's own supply and a short cable"
    elif heat.throttled:
        cause, cure = "the processor is slowed down for its heat", "cool it, or give it less to do"
    elif heat.celsius is not None and heat.celsius >= HOT_C:
        cause, cure = f"at {HOT_C:g} C a Raspberry Pi begins to slow down", "cool it, or give it less to do"
    yield Check(name="heat", status="warning" if cause else "ok", found=found, cause=cause, cure=cure)


def _clock(patient: Patient) -> Iterable[Check]:
    now_s = patient.now_s()
    found = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now_s))
    cure = "timedatectl set-ntp true; a board without a clock of its own needs the network for it"
    if now_s < SOONEST_S:
        cause = "it was never set: certificates are not valid yet, and records carry a wrong time"
        yield Check(name="clock", status="broken", found=found, cause=cause, cure=cure)
        return
    synchronised = patient.synchronised()
    if synchronised is False:
        cause = "nothing synchronises it, so the times of records drift"
        yield Check(name="clock", status="warning", found=f"{found}, not synchronised", cause=cause, cure=cure)
    else:
        known = "synchronised" if synchronised else "whether it is synchronised cannot be told"
        yield Check(name="clock", status="ok", found=f"{found}, {known}")


def _state(patient: Patient) -> Iterable[Check]:
    root = find_state_dir(patient.state, patient.environ)
    with (root / f".doctor-{secrets.token_hex(4)}").open("xb") as file:
        Path(file.name).unlink()
    free = shutil.disk_usage(root).free
    found = f"{root}, {free / 2**20:.0f} MiB free"
    if free < LITTLE_SPACE:
        status: Status = "broken" if free < NO_SPACE else "warning"
        cause = "a bundle takes tens of MiB while it is installed, and the spool grows while the broker is away"
        yield Check(name="state", status=status, found=found, cause=cause, cure=f"free space on the disk of {root}")
    else:
        yield Check(name="state", status="ok", found=found)
    store = Store(root)
    for name in store.names():
        yield _installed(store, name)


def _installed(store: Store, name: str) -> Check:
    cure = "install the bundle again: `outrider install BUNDLE`"
    try:
        installed = store.installed(name)
        admissions_of(installed)
    except OutriderError as error:
        return Check(name=f"bundle {name}", status="broken", found="", cause=str(error), cure=error.hint or cure)
    found = f"version {installed.manifest.version}"
    for member in sorted(installed.present):
        if not is_whole(installed.blob_path(member), installed.manifest.member(member).sha256):
            cause = f"member {member!r} was damaged in the store"
            return Check(name=f"bundle {name}", status="broken", found=found, cause=cause, cure=cure)
    return Check(name=f"bundle {name}", status="ok", found=found)


def _trust(patient: Patient) -> Iterable[Check]:
    state = None
    with contextlib.suppress(StateDirectoryError):  # another check says so
        state = find_state_dir(patient.state, patient.environ)
    trust = find_trust(patient.trust, state, patient.environ)
    counting = sum(key_id(key) not in trust.revoked for key in trust.keys)
    cure = "put the maker's .pub file into the folder `trust` of the state directory, or set OUTRIDER_TRUST"
    if counting:
        yield Check(name="trust", status="ok", found=f"{counting} key{'s' if counting > 1 else ''} in {trust.origin}")
    elif trust.required:
        cause = "no bundle is loaded: every key is revoked"
        yield Check(name="trust", status="broken", found=trust.origin, cause=cause, cure=cure)
    else:
        cause = "any bundle is loaded, whoever made it"
        yield Check(name="trust", status="warning", found="no key", cause=cause, cure=cure)


def _broker(patient: Patient) -> Iterable[Check]:
    if patient.broker is None:
        return
    from outrider.telemetry.linked import connection_to
    from outrider.telemetry.mqtt import Handlers

    up = threading.Event()
    connection = connection_to(
        patient.broker,
        tls=patient.tls,
        credentials=patient.login,
        client_id=f"outrider-doctor-{secrets.token_hex(4)}",
        handlers=Handlers(up=up.set),
        subscriptions=(),
    )
    broker = connection.broker
    connection.start()
    try:
        reached = up.wait(NETWORK_MS / 1000)
        cause = connection.last_error or "no answer from the broker"
    finally:
        connection.close()
    if reached:
        yield Check(name="broker", status="ok", found=f"{broker} answers")
        return
    cure = "check address, port, credentials and that the broker runs; records wait in the spool meanwhile"
    yield Check(name="broker", status="broken", found=str(broker), cause=cause, cure=cure)


def _endpoint(patient: Patient) -> Iterable[Check]:
    if patient.endpoint is None:
        return
    from outrider_runtimes.http import HttpClient, Origin
    from outrider_runtimes.remote import Remote

    deadline = Deadline.after_ms(NETWORK_MS)
    scheme, _, rest = patient.endpoint.rstrip("/").partition("://")
    host, _, model = rest.partition("/")
    url = f"{scheme}://{host}"
    if model:
        with contextlib.closing(Remote(url, model=model, token=patient.token)) as remote:
            remote.connect(deadline)
            found = f"{url} serves {model} ({remote.variant or 'variant unknown'})"
    else:
        with contextlib.closing(HttpClient(Origin.from_url(url))) as client:
            reply = client.get("/v2/health/ready", deadline=deadline, max_reply_bytes=65536)
        if reply.status != 200:
            cause = f"it answers {reply.status} to /v2/health/ready"
            cure = "look at its log; it may still be loading its models"
            yield Check(name="endpoint", status="broken", found=url, cause=cause, cure=cure)
            return
        found = f"{url} is ready"
    yield Check(name="endpoint", status="ok", found=found)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


_Look = Callable[[Patient], Iterable[Check]]
_REPORT = "this is a fault of Outrider's; report it with what is said here"
_CHECKS: Mapping[str, tuple[_Look, str]] = {  # what looks, and the cure where an error has none
    "python": (_python, "pip install --force-reinstall outrider"),
    "engines": (_engines, _REPORT),
    "processor": (_processor, _REPORT),
    "heat": (_heat, _REPORT),
    "clock": (_clock, _REPORT),
    "state": (_state, "pass --state, a directory that this user can write"),
    "trust": (_trust, "name a .pub file or a folder of them"),
    "broker": (_broker, "check the address"),
    "endpoint": (_endpoint, "check address, model and token, and that `outrider serve` runs there"),
}
