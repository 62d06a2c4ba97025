"""Every error that Outrider raises on purpose.

OutriderError                      what went wrong, where; ``hint`` says what to do
├── InputError (ValueError)        a tensor that a caller passed
│   ├── UnknownTensor              a name that the interface does not have, or one that is missing
│   ├── DtypeError                 another dtype than the interface's
│   ├── ShapeError                 another shape than the interface's
│   └── NotFiniteError             NaN or infinity where numbers were expected
├── BundleError                    a .outrider file
│   ├── FormatError                bytes that the format does not allow
│   ├── IntegrityError             bytes that are not the ones that were signed or hashed
│   ├── UnsupportedBundle          needs something that this version does not know
│   └── TrustError                 not signed by a key that is trusted here
├── StoreError                     the state directory
│   ├── StateDirectoryError        cannot be created, read or written
│   └── NotInstalled               no bundle of that name, or nothing to go back to
├── AdmissionError                 a bundle that failed its first run on this board
│   ├── AdmissionCrash             it killed the process that tried it
│   │   └── AdmissionIllegal       ... by an instruction that this CPU does not have
│   ├── AdmissionHang              it did not end
│   ├── AdmissionLimit             it used more memory or processor time than it may
│   ├── AdmissionAnswer            it answered its golden inputs otherwise than when it was packed
│   │   └── AdmissionNaN           ... with NaN
│   └── AdmissionSlow              nothing in it answers within the bound that the caller set
├── EngineError                    an inference engine
│   ├── NoEngine                   none here can run any variant; says why, one by one
│   ├── ModelLoadError             an engine refused the model file
│   ├── InferenceError             an engine failed on valid inputs
│   └── RolledBack                 a fresh bundle failed; what is current now has another interface
├── InterfaceMismatch              two sides that should stand in for each other do not
├── DeadlineExceeded (TimeoutError)
├── RunnerError                    a worker or an endpoint could not take or finish the request
│   ├── QueueFull                  refused at once; nothing was run
│   │   └── RunnerStuck            ... because a call is stuck in the engine
│   ├── RunnerClosed               it was closed before the answer
│   ├── UnknownModel               an endpoint offers no model, or no version, of that name
│   ├── RemoteUnavailable          no connection, or the connection broke
│   ├── RemoteRefused              the server answered with an error status
│   └── ReplyError                 the server's answer is not what the protocol or the interface allows
├── TelemetryError                 the spool or the reporter
├── AgentError                     the daemon of a board: a second one, or a command that it does not take
│   └── SourceError                what it reads from: a folder, a camera, a sensor, a topic
├── ConfigError                    a recipe, a policy or a configuration file
├── RehearsalError                 a board's userland that cannot be made or started on this machine
├── ExportError                    an export that could not be finished
│   └── GateMissed                 a bound that the user set was not met; no bundle was written
└── MissingExtra (ImportError)     an optional dependency; names the exact pip command
"""

from __future__ import annotations


class OutriderError(Exception):
    """The root of the tree.

    Args:
        message: what went wrong and where, in one line.
        hint: what the user can do about it, in one line; empty when there is nothing to say.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class InputError(OutriderError, ValueError):
    """A tensor that a caller passed is not what the interface says. ``tensor`` is its name."""

    def __init__(self, message: str, *, tensor: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.tensor = tensor


class UnknownTensor(InputError):
    """A name that the interface does not have, or one of its names that is missing."""


class DtypeError(InputError):
    """Another dtype than the interface's."""


class ShapeError(InputError):
    """Another shape than the interface's."""


class NotFiniteError(InputError):
    """NaN or infinity where finite numbers were expected."""


class BundleError(OutriderError):
    """Something is wrong with a bundle file."""


class FormatError(BundleError):
    """The bytes break a rule of docs/bundle-format.md."""


class IntegrityError(BundleError):
    """The bytes are well-formed but are not the ones that were hashed or signed."""


class UnsupportedBundle(BundleError):
    """A newer format version, or a name under ``requires`` that this version does not know."""


class TrustError(BundleError):
    """No valid signature by a key that is trusted here."""


class StoreError(OutriderError):
    """The store of installed bundles."""


class StateDirectoryError(StoreError):
    """The state directory cannot be created, read or written."""


class NotInstalled(StoreError):
    """No bundle of that name is installed, or there is nothing to go back to."""


class AdmissionError(OutriderError):
    """A bundle crashed, hung or answered wrongly in its first run on this board; it was not activated."""


class AdmissionCrash(AdmissionError):
    """A variant killed the process that tried it. ``signal`` is the signal's number, 0 where it exited by itself."""

    def __init__(self, message: str, *, signal: int = 0, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.signal = signal


class AdmissionIllegal(AdmissionCrash):
    """A variant, or its engine, used an instruction that this CPU does not have."""


class AdmissionHang(AdmissionError):
    """A variant did not end within the wall clock that it may take."""


class AdmissionLimit(AdmissionError):
    """A variant used more memory or processor time than it may."""


class AdmissionAnswer(AdmissionError):
    """A variant's answers to the golden inputs are not those that the bundle was packed with."""


class AdmissionNaN(AdmissionAnswer):
    """A variant answered golden inputs with NaN."""


class AdmissionSlow(AdmissionError):
    """No variant answers within the latency bound that the caller set."""


class EngineError(OutriderError):
    """An inference engine could not do its work."""


class NoEngine(EngineError):
    """No engine on this machine can run any variant of the bundle."""


class ModelLoadError(EngineError):
    """An engine refused the model file."""


class InferenceError(EngineError):
    """An engine failed on inputs that the interface allows."""


class RolledBack(EngineError):
    """A fresh bundle failed and was rolled back to one with another interface, so this model cannot go on."""


class InterfaceMismatch(OutriderError):
    """Two sides that should stand in for each other have different interfaces."""


class DeadlineExceeded(OutriderError, TimeoutError):
    """No answer within the deadline."""


class RunnerError(OutriderError):
    """A worker or an endpoint could not take or finish a request."""


class QueueFull(RunnerError):
    """The bounded queue is full; the request was refused at once and nothing was run."""


class RunnerStuck(QueueFull):
    """A call is stuck in the engine: what would wait for it was refused at once, whatever room there is."""


class RunnerClosed(RunnerError):
    """The runner was closed before the request was answered."""


class UnknownModel(RunnerError):
    """An endpoint offers no model of that name, or not in that version."""


class RemoteUnavailable(RunnerError):
    """The endpoint cannot be reached, or the connection broke before the reply was whole.

    ``unsent`` is true where there is an address and no connection to it came about: nothing of the request has left,
    and a moment later it may.
    """

    def __init__(self, message: str, *, unsent: bool = False, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.unsent = unsent


class RemoteRefused(RunnerError):
    """The endpoint answered with an error status.

    ``status`` is the HTTP status code; ``retry_after_s`` is when the endpoint says to come again, None if it does not.
    """

    def __init__(self, message: str, *, status: int, retry_after_s: float | None = None, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.retry_after_s = retry_after_s

    @property
    def busy(self) -> bool:
        """Whether a sound endpoint said that it has enough to do now, and ran nothing."""
        return self.status in (429, 503) and self.retry_after_s is not None


class ReplyError(RunnerError):
    """The endpoint's reply is not what the protocol, its metadata or the interface allows."""


class TelemetryError(OutriderError):
    """The telemetry spool or the reporter."""


class AgentError(OutriderError):
    """The daemon of a board: another one runs already, or it did not take a command."""


class SourceError(AgentError):
    """What an agent reads from is not there, went away, or gives what cannot be read."""


class ConfigError(OutriderError):
    """A recipe, a policy or a configuration file; the message names the key's path."""


class RehearsalError(OutriderError):
    """A board cannot be rehearsed on this machine: a tool, a package or the network is missing."""


class ExportError(OutriderError):
    """An export that could not be finished; nothing was written."""


class GateMissed(ExportError):
    """A bound that the user set was not met; no bundle was written."""


class MissingExtra(OutriderError, ImportError):
    """An optional dependency is not installed; the hint is the exact pip command."""

    def __init__(self, package: str, *, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed",
            hint=f"pip install 'outrider[{extra}]'",
        )
        self.extra = extra
