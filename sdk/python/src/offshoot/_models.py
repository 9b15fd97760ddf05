"""What the daemon tells of templates, forks, jobs and itself. Times are in the units that their names end in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Engine:
    """What runs a machine: ``qemu`` or ``kvm``, its version, and ``kvm`` or ``tcg``."""

    name: str
    version: str
    accel: str


@dataclass(frozen=True)
class FoundProcess:
    """A process of a template; ``service`` is the recipe's, or ``runtime``, or None."""

    pid: int
    name: str
    service: str | None


@dataclass(frozen=True)
class Finding:
    """What the audit of a template found: what ``process`` does (None: no process), and what to do about it."""

    kind: str
    process: FoundProcess | None
    reason: str
    cure: str


@dataclass(frozen=True)
class Template:
    """A captured warm sandbox."""

    tag: str
    id: str
    recipe: str
    engine: Engine
    memory_bytes: int
    vcpus: int
    network: bool
    kernel: str
    disk_bytes: int
    created_ms: int
    build_ms: int
    warnings: list[str]
    findings: list[Finding] = field(default_factory=list)
    findings_left_out: int = 0


@dataclass(frozen=True)
class TemplateMailbox:
    """A mailbox that a fork request can address; ``capacity`` is in bytes."""

    name: str
    capacity: int
    planted_by: str
    needs_token: bool


@dataclass(frozen=True)
class AmbiguousMailbox:
    """A mailbox that can not be addressed, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Mailboxes:
    """The mailboxes of a template."""

    mailboxes: list[TemplateMailbox]
    ambiguous: list[AmbiguousMailbox]


@dataclass(frozen=True)
class Step:
    """One step on the way to a fork, what was really done, and how long it took."""

    step: str
    outcome: str
    micros: int


@dataclass(frozen=True)
class MailboxReport:
    """A mailbox that was written to; ``acknowledged`` is None where nobody waited for it."""

    name: str
    acknowledged: bool | None


@dataclass(frozen=True)
class Standby:
    """What is known of a fork that is on disk."""

    since_ms: int
    dirty_bytes: int
    disk_bytes: int
    captured_micros: int


@dataclass(frozen=True)
class ForkNetwork:
    """A fork's network as it is."""

    mode: str
    mac: str
    ipv4: str | None
    ipv6: str | None
    gateway: str | None
    dns: list[str]
    state: str
    way: str | None
    troubles: list[str]


@dataclass(frozen=True)
class Summary:
    """A fork, as lists show it. ``state`` is ``running``, ``standby`` or ``dead``."""

    id: str
    name: str
    state: str
    template: str
    template_id: str
    created_ms: int
    labels: dict[str, str]
    ipv4: str | None


@dataclass(frozen=True)
class ForkInfo(Summary):
    """A fork with its identity report. Of variables, secrets and files only names are known."""

    hostname: str
    engine: Engine
    source: str | None
    standby: Standby | None
    pid: int | None
    machine_id: str
    boot_id: str
    env: list[str]
    secrets: list[str]
    files: list[str]
    mailboxes: list[MailboxReport]
    network: ForkNetwork | None
    devtools_port: int | None
    limits: dict[str, int]
    acked_micros: int
    host_steps: list[Step]
    guest_steps: list[Step]
    private_bytes: int | None
    shared_bytes: int | None


@dataclass(frozen=True)
class Moved:
    """What it took to put a fork to disk or bring it back; ``data_bytes`` is what standby wrote."""

    fork: ForkInfo
    micros: int
    data_bytes: int | None


@dataclass(frozen=True)
class Pong:
    """How a fork is; ``clock_ahead_ms`` is how far its clock is ahead of the host's."""

    fork: str
    state: str
    agent: str
    uptime_ms: int
    clock_ahead_ms: int
    micros: int


@dataclass(frozen=True)
class ExecResult:
    """What became of a command. ``code`` is 128 and the signal's number after a signal, 126 or 127 if it could not be started.

    ``stdout`` and ``stderr`` are texts in which bytes that are no UTF-8 are replaced; ``truncated``: more than 4 MiB of one were written.
    """

    code: int
    timed_out: bool
    error: str | None
    truncated: bool
    stdout: str = field(repr=False)
    stderr: str = field(repr=False)
    stdout_bytes: bytes = field(repr=False)
    stderr_bytes: bytes = field(repr=False)


@dataclass(frozen=True)
class Evaluation:
    """What became of code: its value, how the runtime prints it, and what the code printed.

    ``value`` is None also where the value has no JSON form; ``repr`` tells.
    """

    value: Any
    repr: str
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Chunk:
    """Output of a command as it came; ``source`` is ``stdout`` or ``stderr``. With a terminal all is ``stdout``."""

    source: str
    data: bytes


@dataclass(frozen=True)
class ExitStatus:
    """How a streamed command ended."""

    code: int
    timed_out: bool
    error: str | None


@dataclass(frozen=True)
class LogChunk:
    """Something that a service or the runtime of a fork wrote."""

    source: str
    data: bytes


@dataclass(frozen=True)
class Event:
    """Something that happened.

    ``kind`` is ``fork.created``, ``fork.removed``, ``fork.died``, ``fork.standby``, ``fork.resumed``, ``fork.reaped``, ``template.created``,
    ``template.removed``, ``job.progress``, ``job.done``, ``job.failed``, or ``missed``: some are lost, look at the lists. ``subject`` is the id of
    the fork or job, or the template's tag.
    """

    id: int
    time_ms: int
    kind: str
    subject: str
    data: Any


@dataclass(frozen=True)
class JobInfo:
    """Long work. ``state`` is ``running``, ``done`` or ``failed``."""

    id: str
    kind: str
    template: str
    state: str
    step: str
    done: int | None
    total: int | None
    begun_ms: int
    ended_ms: int | None
    result: Any
    error: Any


@dataclass(frozen=True)
class VerdictRow:
    """What one subject, the template or a fork, answered for each field."""

    subject: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Shared:
    """A value that more than one subject has, and must not."""

    field: str
    value: str
    subjects: list[str]


@dataclass(frozen=True)
class Verdict:
    """Whether forks of a template share nothing that they must not."""

    passed: bool
    rows: list[VerdictRow]
    shared: list[Shared]
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Pool:
    """Machines of a template that are kept started."""

    template: str
    size: int
    network: str
    ready: int
    private_bytes: int


@dataclass(frozen=True)
class TokenInfo:
    """A token, without what makes it one. ``scope`` is ``read``, ``fork`` or ``admin``."""

    id: str
    name: str
    scope: str
    created_ms: int
    expires_ms: int | None


@dataclass(frozen=True)
class NewToken(TokenInfo):
    """A token that was made. The daemon shows it this once."""

    token: str = field(repr=False)


@dataclass(frozen=True)
class Version:
    """The daemon's version and that of its routes."""

    version: str
    api: str
