"""Fork warm sandboxes: the client of the offshoot daemon.

>>> from offshoot import Client
>>> with Client() as client, client.fork("py") as fork:
...     fork.eval("1 + 1")
2
"""

from ._aio.client import AsyncClient
from ._aio.events import AsyncEventStream
from ._aio.fork import AsyncFork
from ._aio.forks import AsyncForks
from ._aio.jobs import AsyncJob
from ._aio.stream import AsyncExecStream
from ._errors import (
    AckTimeout,
    Conflict,
    ConnectionFailed,
    EvalError,
    ExecError,
    Forbidden,
    GuestFailed,
    GuestTimeout,
    HostileArchive,
    InvalidRequest,
    NotFound,
    NotSupported,
    OffshootError,
    ProtocolError,
    RateLimited,
    ServerError,
    Unauthorized,
    Unavailable,
    WaitTimeout,
)
from ._exchange import Retry
from ._given import Child, File, Given, Limits, Mailbox, Network
from ._models import (
    Chunk,
    Evaluation,
    Event,
    ExecResult,
    ExitStatus,
    ForkInfo,
    JobInfo,
    LogChunk,
    Mailboxes,
    Moved,
    NewToken,
    Pong,
    Pool,
    Summary,
    Template,
    TokenInfo,
    Verdict,
    Version,
)
from ._secret import Secret
from ._sync.client import Client
from ._sync.events import EventStream
from ._sync.fork import Fork
from ._sync.forks import Forks
from ._sync.jobs import Job
from ._sync.stream import ExecStream

__version__ = "0.1.0"

__all__ = [
    "AckTimeout",
    "AsyncClient",
    "AsyncEventStream",
    "AsyncExecStream",
    "AsyncFork",
    "AsyncForks",
    "AsyncJob",
    "Child",
    "Chunk",
    "Client",
    "Conflict",
    "ConnectionFailed",
    "EvalError",
    "Evaluation",
    "Event",
    "EventStream",
    "ExecError",
    "ExecResult",
    "ExecStream",
    "ExitStatus",
    "File",
    "Forbidden",
    "Fork",
    "ForkInfo",
    "Forks",
    "Given",
    "GuestFailed",
    "GuestTimeout",
    "HostileArchive",
    "InvalidRequest",
    "Job",
    "JobInfo",
    "Limits",
    "LogChunk",
    "Mailbox",
    "Mailboxes",
    "Moved",
    "Network",
    "NewToken",
    "NotFound",
    "NotSupported",
    "OffshootError",
    "Pong",
    "Pool",
    "ProtocolError",
    "RateLimited",
    "Retry",
    "Secret",
    "ServerError",
    "Summary",
    "Template",
    "TokenInfo",
    "Unauthorized",
    "Unavailable",
    "Verdict",
    "Version",
    "WaitTimeout",
]
