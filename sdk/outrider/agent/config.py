"""What an agent's configuration file says, as listed in docs/agent.md. Only ``load_config`` and secrets read files."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

from outrider.agent.fields import Location, as_table, check_keys, flag, read_table
from outrider.agent.sourceconfig import SOURCES, SourceConfig
from outrider.policy import Budget, Policy
from outrider.telemetry import inputs, publisher, reporter, spool
from outrider.telemetry.mqtt import Broker, Credentials, parse_broker
from outrider.telemetry.record import MAX_BATCH_RECORDS, check_device
from outrider.telemetry.sparkplug import check_group
from outrider_runtimes.deadline import LONGEST_MS
from outrider_runtimes.errors import ConfigError
from outrider_runtimes.processing.fields import Choice, Many, Number, Text, Whole
from outrider_runtimes.tls import Tls, verifying_context

if sys.version_info >= (3, 11):
    import tomllib
else:  # the interpreter of Debian 11 and of JetPack
    import tomli as tomllib

MAX_CONFIG_BYTES: Final = 256 * 1024
MAX_SECRET_BYTES: Final = 4096
TABLES: Final = (
    *("model", "source", "output", "broker", "inputs", "sparkplug", "cloud", "policy", "budget", "commands"),
)

_Name = Text(1, 256)
_Url = Text(1, 2048)


def sparkplug_group(value: Any) -> str:
    """A rule: a group id of Sparkplug."""
    try:
        return check_group(value)
    except ConfigError as error:
        raise ValueError(f"{error}; {error.hint}") from None


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The table ``[model]``."""

    bundle: Annotated[str, _Name, "the name of what is installed; or a bundle file, which is installed when it is new"]
    trust: Annotated[Path | None, Location(), "a .pub file or a folder of them; then bundles must be signed"] = None
    engine: Annotated[str | None, _Name, "instead of what was chosen at install"] = None
    variant: Annotated[str | None, _Name, "instead of what was chosen at install"] = None
    threads: Annotated[int | None, Whole(1, 1024), "instead of what was chosen at install"] = None
    isolation: Annotated[str, Choice(("thread", "process")), "`process` runs the engine in a child process"] = "thread"
    finite: Annotated[str, Choice(("reject", "clip", "pass")), "what becomes of NaN and infinity in inputs"] = "reject"
    deadline_ms: Annotated[
        float | None, Number(0.001, LONGEST_MS), "a request is given up after this; without `[cloud]` only"
    ] = None
    ladder: Annotated[tuple[str, ...] | None, Many(_Name, 1, 16), "variants for when the board is hot, best first"] = (
        None
    )
    latency_ms: Annotated[float | None, Number(0.001, LONGEST_MS), "what the median call may take, for the ladder"] = (
        None
    )


@dataclass(frozen=True, kw_only=True)
class BrokerConfig:
    """The table ``[broker]``."""

    url: Annotated[str, _Url, "mqtt://host:1883, or mqtts://host:8883 for TLS"]
    ca_file: Annotated[Path | None, Location(), "PEM certificates to trust; without it the system's"] = None
    cert_file: Annotated[Path | None, Location(), "PEM certificate of this device, for mutual TLS"] = None
    key_file: Annotated[Path | None, Location(), "PEM key of that certificate"] = None
    username: Annotated[str | None, _Name, "the broker's user"] = None
    password_file: Annotated[Path | None, Location(), "a file whose first line is the password"] = None
    password_env: Annotated[str | None, _Name, "an environment variable that holds the password"] = None
    commit_interval_ms: Annotated[
        float, Number(1, 600_000), "how long a record is in memory alone: what a power cut can take"
    ] = reporter.DEFAULT_COMMIT_INTERVAL_MS
    sample: Annotated[
        float, Number(0, 1), "the share of answers that are reported one by one; all are counted in the metrics"
    ] = 1.0
    metrics_interval_s: Annotated[float, Number(1, 86_400), "how often the metrics are reported"] = (
        reporter.DEFAULT_METRICS_INTERVAL_S
    )
    home_assistant: Annotated[bool, flag, "have Home Assistant find this device"] = False
    spool_max_age_s: Annotated[float | None, Number(1, 1e9), "what waited longer is dropped; without it nothing is"] = (
        None
    )
    spool_max_bytes: Annotated[int, Whole(65_536, 2**40), "what waits on disk for the broker, at most"] = (
        spool.DEFAULT_MAX_BYTES
    )
    drain_bytes_per_s: Annotated[
        float | None, Number(1, 1e9), "what the records that wait may take of the link, on average; without it all"
    ] = None
    batch_records: Annotated[int, Whole(1, MAX_BATCH_RECORDS), "records in one message, at most"] = (
        publisher.DEFAULT_BATCH_RECORDS
    )


@dataclass(frozen=True, kw_only=True)
class InputsConfig:
    """The table ``[inputs]``."""

    flagged_only: Annotated[
        bool, flag, "those of answers that the board was unsure of, or gave for want of the cloud, no others"
    ] = True
    max_bytes: Annotated[int, Whole(1, inputs.MOST_BYTES), "of one input's tensors together; larger ones stay"] = (
        inputs.DEFAULT_MAX_BYTES
    )
    per_hour: Annotated[int, Whole(1, inputs.MOST_PER_HOUR), "so many at once, and as many an hour"] = (
        inputs.DEFAULT_PER_HOUR
    )


@dataclass(frozen=True, kw_only=True)
class SparkplugConfig:
    """The table ``[sparkplug]``."""

    group: Annotated[str, sparkplug_group, "the group id; the edge node's is the device"]


@dataclass(frozen=True, kw_only=True)
class CloudConfig:
    """The table ``[cloud]``."""

    url: Annotated[str, _Url, "http://host:8000 or https://host, of `outrider serve` or another v2 endpoint"]
    model: Annotated[str, _Name, "the model's name there"]
    ca_file: Annotated[Path | None, Location(), "PEM certificates to trust; without it the system's"] = None
    cert_file: Annotated[Path | None, Location(), "PEM certificate of this device, for mutual TLS"] = None
    key_file: Annotated[Path | None, Location(), "PEM key of that certificate"] = None
    token_file: Annotated[Path | None, Location(), "a file whose first line is the bearer token"] = None
    token_env: Annotated[str | None, _Name, "an environment variable that holds the bearer token"] = None


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """The table ``[output]``."""

    file: Annotated[str, Text(1, 4096), "answers as JSON lines, appended; `-` is standard output"]
    values: Annotated[
        str, Choice(("summary", "all", "none")), "of outputs: up to 64 numbers each and the label; all; or none"
    ] = "summary"
    max_bytes: Annotated[int, Whole(4096, 2**40), "then the file becomes `<file>.1` and a new one begins"] = 67_108_864


@dataclass(frozen=True, kw_only=True)
class CommandsConfig:
    """The table ``[commands]``."""

    enabled: Annotated[bool, flag, "whether commands are taken over MQTT at all"] = True
    keys: Annotated[Path | None, Location(), "a .pub file or a folder of them: who may command; else the trust's"] = (
        None
    )
    bundles: Annotated[Path | None, Location(), "the folder out of which `install` takes bundles"] = None


@dataclass(frozen=True, kw_only=True)
class Config:
    """One agent.

    Attributes:
        policy: when to ask the cloud; None without ``[cloud]``.
        budget: what offloading and telemetry may send together; None for any amount.
        cloud: None where the board is on its own.
        output: None where answers are only reported.
        inputs: None where no input leaves the board as a record.
        sparkplug: None where the device is no edge node of Sparkplug.
    """

    device: str
    state: Path | None
    log_level: str
    model: ModelConfig
    source: SourceConfig
    broker: BrokerConfig
    output: OutputConfig | None
    inputs: InputsConfig | None
    sparkplug: SparkplugConfig | None
    cloud: CloudConfig | None
    policy: Policy | None
    budget: Budget | None
    commands: CommandsConfig


@dataclass(frozen=True, kw_only=True)
class TopConfig:
    """What stands above the first table."""

    device: Annotated[str, Text(1, 64), "this board's name in MQTT topics, such as pi-07"]
    state: Annotated[Path | None, Location(), "the state directory; without it $STATE_DIRECTORY, then the user's"] = (
        None
    )
    log_level: Annotated[str, Choice(("debug", "info", "warning", "error")), "what is logged"] = "info"


def load_config(path: Path) -> Config:
    """Read a configuration file. Raises ConfigError that names the file, and the key where there is one."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path} cannot be read: {reason}", hint="check the path and its rights") from None
    try:
        return parse_config(raw, base=path.absolute().parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}", hint=error.hint) from None


def parse_config(raw: bytes, *, base: Path) -> Config:
    """The configuration in TOML text.

    Args:
        base: the folder that relative paths are seen from.

    Raises:
        ConfigError: names the key, what was expected and, as the hint, what the key is.
    """
    if len(raw) > MAX_CONFIG_BYTES:
        raise ConfigError(f"it has more than {MAX_CONFIG_BYTES} bytes", hint="an agent's configuration is a page")
    try:
        data = tomllib.loads(raw.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"it is not TOML: {error}", hint='TOML is lines such as device = "pi-07"') from None
    except RecursionError:
        raise ConfigError("it is not TOML: nested too deep", hint="an agent's configuration is flat") from None
    known = {field.name: None for field in dataclasses.fields(TopConfig)} | dict.fromkeys(TABLES)
    check_keys(data, known, "")
    top = read_table(TopConfig, {key: value for key, value in data.items() if key not in TABLES}, at="", base=base)
    cloud = _optional(CloudConfig, data, "cloud", base)
    return _checked(
        Config(
            device=check_device(top.device),
            state=top.state,
            log_level=top.log_level,
            model=read_table(ModelConfig, data.get("model", {}), at="model", base=base),
            source=_source(data, base),
            broker=read_table(BrokerConfig, data.get("broker", {}), at="broker", base=base),
            output=_output(data, base),
            inputs=_optional(InputsConfig, data, "inputs", base),
            sparkplug=_optional(SparkplugConfig, data, "sparkplug", base),
            cloud=cloud,
            policy=_policy(data, cloud),
            budget=_budget(data["budget"], "budget") if "budget" in data else None,
            commands=read_table(CommandsConfig, data.get("commands", {}), at="commands", base=base),
        ),
        base,
    )


def policy_from(table: Mapping[str, Any]) -> Policy:
    """A Policy from its fields, as a file or a command names them. Raises ConfigError that names the key."""
    check_keys(table, {field.name: None for field in dataclasses.fields(Policy)}, "policy")
    values = dict(table)
    try:
        if values.get("budget") is not None:
            values["budget"] = _budget(values["budget"], "policy.budget")
        return Policy(**{"deadline_ms": None, **values})
    except (TypeError, OverflowError) as error:
        raise ConfigError(f"policy: {error}") from None


def read_secret(file: Path | None, variable: str | None, environ: Mapping[str, str] = os.environ) -> str | None:
    """The first line of a file, or an environment variable. Raises ConfigError, which does not show it."""
    if file is not None:
        try:
            with file.open("rb") as opened:
                text = opened.read(MAX_SECRET_BYTES).decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not text"
            raise ConfigError(f"{file} cannot be read: {reason}", hint="check the path and its rights") from None
        secret = text.split("\n", maxsplit=1)[0].rstrip("\r")
        if not secret:
            raise ConfigError(f"{file} is empty", hint="its first line is the secret")
        return secret
    if variable is None:
        return None
    if not environ.get(variable):
        raise ConfigError(f"the environment variable {variable} is not set", hint="systemd: EnvironmentFile=")
    return environ[variable]


def credentials_of(broker: BrokerConfig, environ: Mapping[str, str] = os.environ) -> Credentials | None:
    """What the broker asks for; None for nothing. Raises ConfigError."""
    if broker.username is None:
        return None
    password = read_secret(broker.password_file, broker.password_env, environ)
    return Credentials(username=broker.username, password=password)


def broker_of(broker: BrokerConfig, url: str | None = None) -> Broker:
    """Where the broker is, with its certificates; another one by ``url``. Raises ConfigError."""
    if url is not None and url != broker.url:
        return parse_broker(url)
    tls = tls_of(broker)
    return parse_broker(broker.url, tls=None if tls is None else verifying_context(tls))


def tls_of(files: BrokerConfig | CloudConfig) -> Tls | None:
    """The certificates that a table names; None where it names none."""
    if files.ca_file is None and files.cert_file is None:
        return None
    return Tls(authority=files.ca_file, certificate=files.cert_file, key=files.key_file)


def _source(data: Mapping[str, Any], base: Path) -> SourceConfig:
    table = as_table(data.get("source", {}), "source")
    kind = table.get("kind")
    if not isinstance(kind, str) or kind not in SOURCES:
        problem = "is missing" if kind is None else f"is {kind!r:.40}"
        raise ConfigError(f"source.kind {problem}", hint=f"it is one of {', '.join(SOURCES)}")
    rest = {key: value for key, value in table.items() if key != "kind"}
    source: SourceConfig = read_table(SOURCES[kind], rest, at="source", base=base)
    return source


def _output(data: Mapping[str, Any], base: Path) -> OutputConfig | None:
    output: OutputConfig | None = _optional(OutputConfig, data, "output", base)
    if output is None or output.file == "-":
        return output
    return dataclasses.replace(output, file=str(base / output.file))


def _policy(data: Mapping[str, Any], cloud: CloudConfig | None) -> Policy | None:
    if "policy" not in data:
        return None if cloud is None else Policy(deadline_ms=None)
    if cloud is None:
        raise ConfigError(
            "policy stands without [cloud]", hint="name the endpoint in [cloud]; a deadline alone is model.deadline_ms"
        )
    return policy_from(as_table(data["policy"], "policy"))


def _budget(value: Any, at: str) -> Budget:
    table = as_table(value, at)
    check_keys(table, {field.name: None for field in dataclasses.fields(Budget)}, at)
    return Budget(**table)


def _optional(kind: type[Any], data: Mapping[str, Any], at: str, base: Path) -> Any:
    return read_table(kind, data[at], at=at, base=base) if at in data else None


def _checked(config: Config, base: Path) -> Config:
    """What several keys say together. Gives the same with the bundle's path made absolute."""
    model, broker, cloud = config.model, config.broker, config.cloud
    if cloud is not None and model.deadline_ms is not None:
        raise ConfigError("model.deadline_ms stands beside [cloud]", hint="write it as policy.deadline_ms")
    if config.budget is not None and config.policy is not None and config.policy.budget is not None:
        raise ConfigError(
            "policy.budget stands beside [budget]", hint="[budget] counts offloading and telemetry together"
        )
    if (model.ladder is None) != (model.latency_ms is None):
        raise ConfigError("model.ladder and model.latency_ms stand together or not at all")
    for at, files in (("broker", broker), ("cloud", cloud)):
        if files is not None and (files.cert_file is None) != (files.key_file is None):
            raise ConfigError(f"{at}.cert_file and {at}.key_file stand together or not at all")
    parsed = parse_broker(broker.url.replace("mqtts://", "mqtt://", 1))
    assert parsed.port
    if not broker.url.startswith("mqtts://") and (broker.ca_file or broker.cert_file):
        raise ConfigError(f"broker.url is {broker.url}, which is not encrypted", hint="write mqtts:// in it")
    _one_secret("broker.password", broker.password_file, broker.password_env)
    if broker.username is None and (broker.password_file or broker.password_env):
        raise ConfigError("broker.username is missing", hint="a password belongs to a user")
    if cloud is not None:
        _one_secret("cloud.token", cloud.token_file, cloud.token_env)
    is_file = model.bundle.endswith(".outrider") or "/" in model.bundle
    bundle = str(base / model.bundle) if is_file else model.bundle
    return dataclasses.replace(config, model=dataclasses.replace(model, bundle=bundle))


def _one_secret(what: str, file: Path | None, variable: str | None) -> None:
    if file is not None and variable is not None:
        raise ConfigError(f"{what}_file and {what}_env are both given", hint="one of them is enough")
