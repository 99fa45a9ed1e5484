"""Run untrusted code in the gVisor sandboxes of a Boxer server.

    from pathlib import Path
    from boxer import BoxerClient

    with BoxerClient("http://localhost:8080") as client:  # without a URL: $BOXER_URL, or else this one
        result = client.run("python:3.12-slim", ["python3", "-c", "print('hello world')"])
        print(result.stdout, result.stderr, result.exit_code)

Files and standard input go in with the run, and outputs come back:

        result = client.run(
            "python:3.12-slim",
            ["python3", "main.py"],
            files={"main.py": "print(input())", "data": Path("data")},  # text, bytes, binary files, paths
            input="hello",
            outputs=["result.json"],  # what it wrote to /output: result.outputs["result.json"] is bytes
            limits={"wall_clock_secs": 10},
        )

Many runs: `client.run_many(requests)` takes any number of RunRequests and yields each with its RunResult or BoxerError.

Two clients have the same methods: BoxerClient blocks, and any number of threads may share one; those of
AsyncBoxerClient are coroutines.

    run, send, run_many                       run a command; run a RunRequest; run many of them
    upload_file, upload_path                  put content, or a local file or folder, into the server's store
    download_file, download_path              get a file from there, as bytes or to disk
    health, wait_until_ready                  ask whether the server is well

A program that ran is a RunResult, whatever its exit code; `check=True` makes a failure a BoxerExitError. Every fault of
the network or the server is a BoxerError:

    BoxerValidationError      what was asked for cannot be right; nothing was sent
    BoxerConnectionError      no complete answer came
    BoxerAPIError             the server refused; `status_code` says how
        BoxerTimeoutError         the program's time was up (408), or the client's own (0)
        BoxerOutputLimitError     the program wrote too much to stdout or stderr

A wrong type is a TypeError, a closed client a RuntimeError, and an unreadable local file an OSError.

On the command line: `python3 boxer.py --help`, or `boxer --help` where the package `boxer-sdk` is installed.

This file is the whole client. It needs nothing but Python 3.9 or later: copy it next to your code, or install the
package, which holds this same file.

For those who read on, the sections, each of which builds on those above it:

    Limits         every size, count and time that bounds something
    Data           what is asked for and what comes back; the names of the JSON
    Errors         the tree of exceptions, and which status code becomes which
    Files          local files: what is uploaded, and where a download goes
    Requests       one builder for each endpoint: checks, JSON, multipart
    Responses      one interpreter for each endpoint: a value or the right error
    Policy         base URL and proxy, deadlines, cancellation, and what is tried again
    Wire           HTTP/1.1 as a state machine over bytes: encode a request's head, decode a response
    Both clients   what is said over a connection, the pool of connections, and the tries of a call
    Sync client    a connection over a socket, and the handler for a urllib.request opener that drives it
    Async client   a connection over asyncio's StreamReader and StreamWriter
    Command line   the program `boxer`

How one text serves both clients: every decision is made once, in coroutines. What they await is a connection's few
verbs (`connect`, `start_tls`, `next_piece`, `write`, `drain`, `receive`) and a few of the pool's (`_resolve`, `pause`).
In AsyncBoxerClient those verbs wait on the event loop. In BoxerClient they block and return, so that one step runs a
whole coroutine to its end (`_run_to_completion`).
"""

# SPDX-License-Identifier: Apache-2.0
# Source: https://pypi.org/project/boxer-sdk/
# pyright: standard

from __future__ import annotations

import sys

if sys.version_info < (3, 9):  # noqa: UP036 - the file may have been copied anywhere
    text = "boxer.py needs Python 3.9 or later, and this is Python {}.{}"  # pragma: no cover
    raise ImportError(text.format(*sys.version_info))  # pragma: no cover - coverage needs a newer one, too

import asyncio
import binascii
import calendar
import collections
import concurrent.futures.thread  # noqa: F401 - asyncio imports it in a call, and then a fork may interrupt that
import contextlib
import contextvars
import copy
import email.message
import email.utils
import encodings.idna  # noqa: F401 - a name look-up needs it; imported here, since a fork may interrupt a later import
import enum
import errno
import fnmatch
import functools
import html
import http.client
import io
import ipaddress
import json
import logging
import math
import numbers
import operator
import os
import queue
import random
import re
import select
import signal
import socket
import ssl
import stat
import threading
import time
import traceback
import types
import urllib.error
import urllib.parse
import urllib.request
import warnings
import weakref
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, NamedTuple, Optional, TypeVar, Union, cast

__version__ = "1.0.0"

__all__ = [
    "AsyncBoxerClient",
    "BoxerAPIError",
    "BoxerClient",
    "BoxerConnectionError",
    "BoxerError",
    "BoxerExitError",
    "BoxerOutputLimitError",
    "BoxerTimeoutError",
    "BoxerValidationError",
    "ResourceLimits",
    "RunRequest",
    "RunResult",
]

_LOG = logging.getLogger("boxer")
_LOG.addHandler(logging.NullHandler())
_T = TypeVar("_T")


class _Default(enum.Enum):
    """The default of a parameter for which None has a meaning of its own."""

    CLIENT = "the client's own setting"


_UNSET = _Default.CLIENT

# The types that parameters accept.
Content = Union[bytes, bytearray, memoryview, str, IO[bytes]]
Environment = Union[Mapping[str, str], Iterable[str]]
Network = Union[Literal["none", "sandbox", "host"], str]  # noqa: PYI051 - an editor offers the three
Limits = Union["ResourceLimits", Mapping[str, Any]]
Files = Union[Sequence[str], Mapping[str, Union[Content, os.PathLike[str]]]]
Timeout = Union[float, None, _Default]

_Piece = Union[bytes, memoryview]  # of a request's body
_Upload = tuple[str, Union[Content, Path]]  # a remote path, and what to put there
_LocalPath = Union[str, os.PathLike[str]]
_IN_MEMORY = (bytes, bytearray, memoryview, str)  # the kinds of content that are not read from anywhere


# ---- Limits ----------------------------------------------------------------------------------------------------------

# Of a request.
_FILE_PIECE_SIZE = 2 * 1024 * 1024  # bytes to read from a file, or to write to it, at a time
_PIECE_SIZE = 1024 * 1024  # bytes of other content to handle at a time
_SEND_SIZE = 256 * 1024  # bytes of content to send at a time; the deadline starts again after each
_TLS_RECORD_SIZE = 16 * 1024  # bytes that fit into a record (RFC 8446, section 5.1)
_SMALL_UPLOAD = 64 * 1024  # bytes of a body that is made as a whole, and sent at once
_UPLOADS_AT_A_TIME = 8  # files, when a folder is uploaded
_MOUNT_LIMIT = 200  # paths of its own that a run names; about 250 are too many for the server
_INPUT_LIMIT = 64 * 1024  # bytes of standard input that travel with the command

# Of a response.
_RECEIVE_SIZE = 512 * 1024  # bytes to receive at a time; a TLS record, of at most 16 KiB, has to fit in
_HEAD_LIMIT = 64 * 1024  # bytes of a head, or of a trailer section
_FIELD_LIMIT = 100  # fields of a head, or of a trailer section
_INTERIM_LIMIT = 20  # 1xx responses before the final one
_CHUNK_HEAD_LIMIT = 4 * 1024  # bytes of a chunk's size and extensions
_ANSWER_LIMIT = 256 * 1024 * 1024  # bytes of JSON; the server's own limit on output is 20 MiB before escapes
_ERROR_LIMIT = 64 * 1024  # bytes of an error's content; the rest is of no use
_OUTPUT_LIMIT = 10_000  # files in /output
_NAME_LIMIT = 64 * 1024  # bytes of the path of one of them
_DEPTH_LIMIT = 64  # folders on the way to one of them, where they go into a local folder
_LIST_LIMIT = 48 * 1024 * 1024  # bytes of a list of that many names
_REASON_SIZE = 2_000  # characters of a server's reason that are worth showing
_SHOWN_SIZE = 500  # characters of a program's output that a repr shows, and an error at either end

# Of time, in seconds.
_LONGEST_WAIT = 1_000_000.0  # that every operating system can be asked to wait for: 11 days
_REMOVAL_TIME = 10.0  # to remove what a run has left of its own files
_ADDRESS_TIME = 5.0  # for one address of a name, as long as others remain
_IDLE_LIMIT = 4.0  # that a connection may have been idle: servers and proxies close theirs after 5 s or more
_KEEPALIVE = {"TCP_KEEPIDLE": 45, "TCP_KEEPALIVE": 45, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # dead after 60 s
# A timer may ring early, by the clock's resolution; a deadline as near as that counts as passed.
_TIMER_SLACK = max(0.002, time.get_clock_info("monotonic").resolution)
_SHORTEST_PAUSE = 0.02  # between two looks whether the server is ready
_LATE_TURNS = 4  # of an event loop, to handle what had happened by the deadline
_GRACE_TIME = 2.0  # to receive, after the deadline, what had arrived before it
_PROGRESS_DELAY = 0.5  # until work is long enough to show how far it is
_PROGRESS_PAUSE = 0.1  # between two looks how far it is

# Of caches.
_HEADS_KEPT = 32  # decoded heads, of up to _HEAD_LIMIT bytes each
_LOADED_LIMIT = 8  # clients whose pickles were loaded

# Of tries.
_RACE_TRIES = 15  # after the server lost an output: one try in three meets that, so one call in 10^7 uses up 15


class _ProcessState:
    """What this module keeps in a process. It stays behind if cloudpickle pickles the module by value."""

    def __init__(self) -> None:
        # Heads often repeat until the Date changes. The function is defined below, hence the lambda.
        self.decoded_head = functools.lru_cache(_HEADS_KEPT)(lambda data: _decoded_head(data))  # noqa: PLW0108
        self.pools: weakref.WeakSet[_Pool] = weakref.WeakSet()  # all there are
        self.originals: weakref.WeakValueDictionary[str, _Client] = weakref.WeakValueDictionary()  # by pickles' tokens
        self.loaded: collections.deque[_Client] = collections.deque(maxlen=_LOADED_LIMIT)  # nothing else keeps these

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


_PROCESS = _ProcessState()


# ---- Data ------------------------------------------------------------------------------------------------------------


@dataclass
class ResourceLimits:
    """What a run may use. A limit left out, None or 0 is the server's default.

    cpu_cores: processors, may be a fraction (the server's default, unless configured otherwise: 1.0).
    memory_mb: memory in MiB (256).
    pids_limit: processes and threads (64).
    wall_clock_secs: seconds until a program that still runs is killed (30).
    nofile: open file descriptors of a process (256).

    Raises BoxerValidationError for a limit that is negative, not finite, or not a number; all but `cpu_cores` are
    whole numbers. In its usual Docker set-up a server enforces the wall clock and `nofile` only.
    """

    cpu_cores: Optional[float] = None
    memory_mb: Optional[int] = None
    pids_limit: Optional[int] = None
    wall_clock_secs: Optional[int] = None
    nofile: Optional[int] = None

    def __post_init__(self) -> None:
        self.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """Return the limits that are set, by their JSON names; they are checked again, since they can be changed."""
        return {
            name: _real_number(name, value) if name == "cpu_cores" else _whole_number(name, value)
            for name in ResourceLimits.__dataclass_fields__
            if (value := getattr(self, name)) is not None
        }


def _whole_number(name: str, value: Any, least: int = 0) -> int:
    """Check a count: an int, a whole float, or what has `__index__`, such as numpy's integers."""
    try:
        number = operator.index(value)
    except TypeError:
        number = int(value) if isinstance(value, float) and value.is_integer() else -1
    if least <= number < 2**63 and not isinstance(value, bool):
        return number
    raise BoxerValidationError(f"{name} must be a whole number from {least} to 2**63 - 1, not {value!r}")


def _real_number(name: str, value: Any) -> float:
    """Check a number that may have a fraction; an int stays one."""
    if _is_real(value) and 0 <= value < 2**63:
        return value if isinstance(value, int) else float(value)
    raise BoxerValidationError(f"{name} must be a finite number from 0 to 2**63 - 1, not {value!r}")


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


@dataclass(frozen=True, repr=False)
class RunRequest:
    """What a run is asked to do: to keep, compare or show, to send with `client.send`, or many of them with `run_many`.

    The parameters are those of `BoxerClient.run`, and `tag`: anything of the caller's, which is not sent. `env` may be
    given as a mapping or a list of `K=V`, and is kept as a tuple; `limits`, as ResourceLimits or a mapping, are kept as
    ResourceLimits. Raises BoxerValidationError for what cannot be right, TypeError for a wrong type. The repr shows
    the names in `env` and in a mapping in `files`, not what they stand for, and no `input`.
    """

    image: str
    cmd: Sequence[str]
    env: Optional[Environment] = None
    cwd: Optional[str] = None
    limits: Optional[Limits] = field(default=None, hash=False)  # ResourceLimits have no hash
    files: Optional[Files] = field(default=None, hash=False)  # nor have mappings
    persist: bool = False
    network: Optional[Network] = None
    input: Union[str, bytes, None] = None
    outputs: Union[bool, Sequence[str]] = ()
    tag: Any = field(default=None, compare=False)

    def __post_init__(self) -> None:
        image = _text("image", self.image)
        if not image.strip():
            raise BoxerValidationError("image is empty; name one, for instance 'python:3.12-slim'")
        command = _texts("cmd", self.cmd)
        if not command or not command[0]:
            raise BoxerValidationError("cmd is empty; give the program and its arguments, for instance ['echo', 'hi']")
        self.__dict__.update(  # bypasses the frozen dataclass's __setattr__
            image=image,
            cmd=command,
            env=() if self.env is None else _environment(self.env),
            cwd=None if self.cwd is None else _text("cwd", self.cwd) or None,
            limits=None if self.limits is None else _limits(self.limits),
            files=() if self.files is None else _files(self.files) or (),
            network=None if self.network is None else _text("network", self.network) or None,
            input=None if self.input is None else _input(self.input),
            outputs=_output_names(self.outputs),
        )
        if self.input is not None or self.outputs is True:
            _check_shell_names(self.env)

    def __repr__(self) -> str:
        names = {"env": [entry.partition("=")[0] for entry in self.env or ()], "files": list(self.files or ())}
        shown = {name: value for name, value in vars(self).items() if name not in ("input", "tag")}
        return f"RunRequest({', '.join(f'{name}={value!r}' for name, value in {**shown, **names}.items())})"


def _text(name: str, value: Any) -> str:
    """Check a text: what it holds has to reach the server, and the program, as it is."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be str, not {type(value).__name__}")
    text: str = str.__str__(value)  # the text itself, where a subclass, such as an Enum's, has another str()
    if "\0" in text:
        raise BoxerValidationError(f"{name} has a NUL character in it, at which programs cut text off")
    if text.encode("utf-8", "replace").decode("utf-8") != text:
        raise BoxerValidationError(f"{name} has a lone surrogate in it, which is no character")
    return text


def _texts(name: str, values: Any) -> tuple[str, ...]:
    if isinstance(values, str):
        # An entry of env is not shown: it may be a secret.
        example = {"cmd": f"['sh', '-c', {values!r}]", "env": "['NAME=value']"}.get(name, f"[{values!r}]")
        raise BoxerValidationError(f"{name} must be a list of strings, not one string: write {example}")
    if isinstance(values, bytes) or hasattr(values, "keys") or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a list of strings, not {type(values).__name__}")
    return tuple([_text(f"each of {name}", text) for text in values])


def _environment(env: Any) -> tuple[str, ...]:
    if isinstance(env, Mapping):
        for name, value in env.items():
            if "=" in _text("each name in env", name):
                raise BoxerValidationError("a name in env has an '=' in it")
            _text(f"the value of {name!r} in env", value)
        env = ["=".join(item) for item in env.items()]
    entries = _texts("env", env)
    if any(entry.find("=") < 1 for entry in entries):
        # The entry is not shown: it may be a secret whose name was forgotten.
        raise BoxerValidationError("an entry of env is not of the form NAME=value")
    return entries


def _limits(limits: Any) -> ResourceLimits:
    if isinstance(limits, ResourceLimits):
        limits = limits.to_dict()
    if not isinstance(limits, Mapping):
        raise TypeError(f"limits must be ResourceLimits or a mapping, not {type(limits).__name__}")
    known = ResourceLimits.__dataclass_fields__
    for name in limits:
        if name not in known:
            raise BoxerValidationError(f"there is no limit {name!r}; the limits are {', '.join(known)}")
    return ResourceLimits(**limits)


def _files(files: Any) -> Any:
    """Check paths in the server's store, or a mapping from names in the run's own folder to content."""
    if not isinstance(files, Mapping):
        return tuple([_path("a path in files", path) for path in _texts("files", files)])
    contents = {_relative_path("each name in files", name): content for name, content in files.items()}
    for name in contents.keys() & _folders_of(contents):
        raise BoxerValidationError(f"files has {name!r}, and other files in a folder of this name")
    for name, content in contents.items():
        if not (isinstance(content, (*_IN_MEMORY, os.PathLike)) or hasattr(content, "read")):
            kind = type(content).__name__
            raise TypeError(f"files[{name!r}] must be bytes, str, a path or a binary file, not {kind}")
    objects = [id(content) for content in contents.values() if hasattr(content, "read")]
    if len(set(objects)) < len(objects):
        raise BoxerValidationError("files has one file object under two names; open the file twice, or give its path")
    return contents


def _input(value: Any) -> Any:
    if isinstance(value, str):
        _text("input", value.replace("\0", " "))  # NUL is fine here
    elif not isinstance(value, bytes):
        raise TypeError(f"input must be str or bytes, not {type(value).__name__}")
    return value


def _output_names(outputs: Any) -> Any:
    if isinstance(outputs, bool) or outputs is None:
        return outputs or ()
    return tuple(dict.fromkeys(_output_name("each of outputs", name) for name in _texts("outputs", outputs)))


def _output_name(name: str, path: Any) -> str:
    """Return the path of an output below /output."""
    return _relative_path(name, _path(name, path).removeprefix("/output/"))


def _check_shell_names(env: Any) -> None:
    for entry in env:
        if not re.match("[A-Za-z_][A-Za-z0-9_]*=", entry):
            why = "because a shell starts the program when `input` or all outputs are used"
            raise BoxerValidationError(f"each name in env must be a shell identifier, {why}")


def _path(name: str, path: Any) -> str:
    if not (checked := _text(name, path)):
        raise BoxerValidationError(f"{name} is empty; write a path, for instance 'data/input.txt'")
    return checked


def _clean_path(name: str, path: Any) -> str:
    """Check a path below a folder: it must not lead out of it."""
    checked = _path(name, path)
    if {".", ".."} & set(checked.split("/")):
        raise BoxerValidationError(f"{name} must have no '.' or '..' segment, as {path!r} has")
    return checked


def _relative_path(name: str, path: Any) -> str:
    """Check a path of a file below a folder: it must name one, and only one way."""
    checked = _clean_path(name, path)
    if "" in checked.split("/"):
        raise BoxerValidationError(f"{name} must be relative and have no empty segment, as {path!r} has")
    return checked


_RESULT_TYPES = {"exec_id": str, "exit_code": int, "stdout": str, "stderr": str, "wall_ms": int}


@dataclass(repr=False)
class RunResult:
    """What came of a run that ended by itself, whatever its exit code.

    exec_id: the name of the run, under which a run with `persist` keeps its outputs.
    exit_code: the program's; 128 + N after signal N; 128 if it could not be started (`stderr` says why), or 126 or 127
        where a shell starts it (with `input`, or all outputs).
    stdout, stderr: text; each byte that is not UTF-8 is U+FFFD. Binary results belong in /output.
    wall_ms: milliseconds from the start of the sandbox to its end.
    outputs: what the program wrote to /output, by name, as far as it was requested.
    """

    exec_id: str
    exit_code: int
    stdout: str
    stderr: str
    wall_ms: int
    outputs: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, kind in _RESULT_TYPES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kind):
                raise TypeError(f"RunResult.{name} must be {kind.__name__}, got {type(value).__name__}")

    def __repr__(self) -> str:
        """Show no more than the beginning of long text, and the names and sizes of outputs."""
        shown = ", ".join(f"{name}={_shortened(value)}" for name, value in vars(self).items() if value != {})
        return f"RunResult({shown})"

    @property
    def ok(self) -> bool:
        """True if the exit code is 0."""
        return self.exit_code == 0

    def check(self) -> RunResult:
        """Return this result; raise BoxerExitError if the exit code is not 0."""
        if self.exit_code != 0:
            raise BoxerExitError(self)
        return self

    def output_path(self, path: str) -> str:
        """Return where `download_file` finds what the run wrote to /output/`path` (with `persist=True`).

        path: below /output, such as "a/b.json" or "/output/a/b.json".
        """
        return f"output/{self.exec_id}/{_output_name('path', path)}"


def _shortened(value: Any) -> str:
    if isinstance(value, str) and len(value) > _SHOWN_SIZE:
        return f"{value[:_SHOWN_SIZE]!r}… ({len(value):,} characters)"
    if isinstance(value, dict):
        sizes = ", ".join([f"{name!r}: {len(content):,} bytes" for name, content in value.items()])
        more = f"… ({len(value):,} files)" if len(sizes) > _SHOWN_SIZE else ""
        return "{" + sizes[:_SHOWN_SIZE] + more + "}"
    return repr(value)


# ---- Errors ----------------------------------------------------------------------------------------------------------


class BoxerError(Exception):
    """The base of all errors of this module.

    result: the RunResult, where the run has ended and only its outputs could not be fetched.
    """

    result: Any = None


class BoxerValidationError(BoxerError, ValueError):
    """What was asked for cannot be right, so it was not sent."""


class BoxerConnectionError(BoxerError, ConnectionError):
    """No complete, well-formed HTTP answer came; the text names host and port, `__cause__` the reason.

    request_sent: False if no byte of the request has left, so that the server cannot have acted on it.
    """

    def __init__(self, message: str, request_sent: bool = True) -> None:
        super().__init__(message)
        self.request_sent = request_sent


class BoxerExitError(BoxerError):
    """A run with `check=True` ended with an exit code other than 0; the text shows what the program said.

    result: the RunResult.
    """

    result: RunResult

    def __init__(self, result: RunResult) -> None:
        super().__init__(result)
        self.result = result

    def __str__(self) -> str:
        said = _excerpt(self.result.stderr) or _excerpt(self.result.stdout)
        return f"exit code {self.result.exit_code}" + (f": {said}" if said else "")


class BoxerAPIError(BoxerError):
    """The server answered with an error, or with what makes no sense; the text is the server's own reason.

    status_code: the HTTP status code of the answer.
    """

    def __init__(self, message: str, status_code: int) -> None:
        super().__init__(message, status_code)
        self.status_code = status_code

    def __str__(self) -> str:
        return str(self.args[0])


class BoxerTimeoutError(BoxerAPIError):
    """Time was up: the program's wall clock limit (status_code 408) or the client's own deadline (status_code 0).

    Deliberately no TimeoutError: code that catches those tends to try again, and a program that ran out of time must
    not be run again.
    """


class BoxerOutputLimitError(BoxerAPIError):
    """The program wrote more to stdout or stderr than the server allows (507)."""


_ERROR_OF_STATUS = {408: BoxerTimeoutError, 507: BoxerOutputLimitError}


def _printable(text: str, keep: str = "") -> str:
    """Return text without colours, and with a space for each character that no terminal should get."""
    text = re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]", "", text)
    return "".join([char if char.isprintable() or char in keep else " " for char in text])


def _excerpt(output: str) -> str:
    """Return the beginning and the end of an output: what went wrong stands at the one or the other."""
    text = output.strip()
    parts = [text] if len(text) <= 2 * _SHOWN_SIZE else [text[:_SHOWN_SIZE], text[-_SHOWN_SIZE:]]
    return "\n…\n".join(_printable(part, keep="\n\t").strip() for part in parts)


# ---- Files -----------------------------------------------------------------------------------------------------------


def _read(file: Any, size: int) -> bytes:
    piece = file.read(size)
    if not isinstance(piece, bytes):
        raise TypeError(f"content must be a binary file, opened with mode 'rb': its read() gave {type(piece).__name__}")
    return piece


def _read_whole(file: IO[bytes], size: int) -> Iterator[bytes]:
    """Yield a file's content; fail if it is not what was announced, so that no complete body is ever sent."""
    file.seek(0)
    at = 0
    while at < size and file.tell() == at:
        piece = _read(file, min(_FILE_PIECE_SIZE, size - at))
        if not piece or len(piece) > size - at:
            break
        at += len(piece)
        yield piece
    if at != size or file.tell() != at or _read(file, 1):
        what = "the file changed its size while it was sent, or another call or thread was reading it"
        raise BoxerError(f"{what}; the upload was stopped")


def _content(name: str, content: Any) -> memoryview | IO[bytes]:
    if isinstance(content, str):
        _text(name, content.replace("\0", " "))  # NUL is fine in a file
        content = content.encode("utf-8")
    if isinstance(content, (bytes, bytearray, memoryview)):
        return memoryview(content).cast("B")
    if isinstance(content, os.PathLike):
        raise TypeError(f"{name} must be bytes, str or a binary file, not a path; `upload_path` sends what is there")
    if isinstance(content, io.TextIOBase):
        raise TypeError(f"{name} must be a binary file, opened with mode 'rb', not one in text mode")
    if not hasattr(content, "read"):
        raise TypeError(f"{name} must be bytes, str or a binary file, not {type(content).__name__}")
    if _read(content, 0):
        raise TypeError(f"{name} must be a binary file whose read() takes a size")
    return content  # type: ignore[no-any-return]  # something with read()


_CANNOT_TELL = (AttributeError, NotImplementedError, OSError, TypeError, ValueError)  # where a file stands


def _size(content: memoryview | IO[bytes]) -> int | None:
    """Return the content's size in bytes; None for a file that cannot be rewound."""
    if isinstance(content, memoryview):
        return len(content)
    try:
        start = content.tell()
    except _CANNOT_TELL:
        return None
    try:
        content.seek(0, os.SEEK_END)
        return content.tell()
    except _CANNOT_TELL:
        if content.tell() != start:
            content.seek(start)
        return None


def _local_path(name: str, path: Any) -> Path:
    """Check a path on this machine. An empty one comes from a variable that was not set, and is not the folder here."""
    text = os.fsdecode(path)
    if not text or "\0" in text:
        what = "has a NUL character in it" if text else "is empty; write '.' for the current folder"
        raise BoxerValidationError(f"{name} {what}")
    return Path(str.__str__(text))  # before Python 3.12, Path takes the str() of a subclass, such as an Enum's


def _resolved(path: Path) -> Path:
    """Return Path.resolve(), without its RuntimeError for a loop of links before Python 3.13."""
    return Path(os.path.realpath(path))


def _local_files(local_path: _LocalPath, remote_path: str | None, exclude: Iterable[str]) -> list[tuple[str, Path]]:
    """Return what `upload_path` is to send, in the order of the sorted local paths."""
    local = _local_path("local_path", local_path)
    root = _resolved(local)
    own_name = (root if local.name in ("", "..") else local).name
    patterns = [pattern.rstrip("/").split("/") for pattern in _texts("exclude", exclude)]
    for pattern in patterns:
        if {"", ".", "..", "**"} & set(pattern):  # these match nothing, and what they are to leave out may be secret
            what = "a pattern is a name, such as '.env', or a path below the folder, such as 'sub/.env'"
            raise BoxerValidationError(f"exclude has {'/'.join(pattern)!r}, and {what}")
    prefix = _clean_path("remote_path", own_name if remote_path is None else remote_path)
    if not root.is_dir():
        return [(prefix + own_name if prefix.endswith("/") else prefix, _regular_file(local, root))]
    prefix = _path("remote_path", prefix.rstrip("/"))
    uploads = []
    for parts in sorted(_walk(root, patterns)):
        path = root.joinpath(*parts)
        name = _clean_path(f"the name {str(path)!r}", "/".join(parts))
        uploads.append((f"{prefix}/{name}", _regular_file(path, _link_target(path, root))))
    return uploads


def _walk(root: Path, patterns: Sequence[Sequence[str]]) -> Iterator[tuple[str, ...]]:
    """Yield the path, as its parts, of everything below a folder that is neither a folder nor excluded."""
    folders: list[tuple[str, ...]] = [()]
    while folders:
        parents = folders.pop()
        with os.scandir(root.joinpath(*parents)) as entries:
            for entry in entries:
                parts = (*parents, entry.name)
                if any(_matches(some, pattern) for pattern in patterns for some in (parts, parts[-1:])):
                    continue
                is_junction = getattr(entry, "is_junction", bool)()  # Windows' kind of link, from Python 3.12 on
                if entry.is_dir(follow_symlinks=False) and not is_junction:
                    folders.append(parts)
                else:
                    yield parts


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    return len(parts) == len(pattern) and all(map(fnmatch.fnmatchcase, parts, pattern))


def _link_target(path: Path, root: Path) -> Path:
    """Return the file that a path leads to, through a link if that stays within the folder."""
    if not path.is_symlink():
        return path
    target = _resolved(path)
    if not target.exists():
        raise BoxerValidationError(f"{str(path)!r} is a link that leads nowhere; remove or exclude it")
    if target.is_dir():
        raise BoxerValidationError(f"{str(path)!r} is a link to a folder; exclude it, or copy the folder in its place")
    if root not in target.parents:
        raise BoxerValidationError(f"{str(path)!r} is a link that leaves the folder; exclude it, or copy the file")
    return target


def _regular_file(path: Path, target: Path) -> Path:
    if not stat.S_ISREG(target.stat().st_mode):
        raise BoxerValidationError(f"{str(path)!r} is neither a file nor a folder, and cannot be uploaded")
    return target


@contextlib.contextmanager
def _opened(content: Path | Content) -> Iterator[Any]:
    """Open content: of a path, give the open file, or its bytes if it is small; anything else as it is."""
    if not isinstance(content, Path):
        yield content
        return
    # Where the system has these flags: follow no link, and do not wait for a pipe's writer.
    more = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    with open(content, "rb", opener=lambda name, flags: os.open(name, flags | more)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):  # something else has been put in the file's place since it was seen
            raise BoxerValidationError(f"{str(content)!r} is no longer a file")
        yield file if status.st_size >= _SMALL_UPLOAD else file.read()


class _Sink:
    """The binary file that a download is written to, from where it stands."""

    def __init__(self, file: Any) -> None:
        if isinstance(file, io.TextIOBase):
            raise TypeError("the file must be a binary file, opened with mode 'wb', not one in text mode")
        self.is_abandoned = False  # set when the call has ended, perhaps while a thread still writes
        self._file = file
        self.written = 0  # bytes so far
        self.length = math.inf  # of the content in bytes; set once the response says it
        try:
            self._start = file.tell()
            file.seek(self._start)
            _ = file.truncate  # which a rewind needs
        except _CANNOT_TELL:
            self._start = None

    @property
    def can_be_rewound(self) -> bool:
        return self._start is not None or self.written == 0

    def rewind(self) -> None:
        """Begin anew, for another try."""
        if self.written:
            self._file.seek(self._start)
            self._file.truncate()
            self.written = 0

    def write(self, content: bytes) -> None:
        at = 0
        while at < len(content):
            if self.is_abandoned:
                raise BoxerError("the call has ended meanwhile")
            piece = content[at : at + _FILE_PIECE_SIZE]
            size = self._file.write(piece)
            if size == 0 or (size is None and isinstance(self._file, io.RawIOBase)):
                raise BlockingIOError("the file that the download is written to takes nothing more")
            size = len(piece) if size is None else size  # a file without a buffer may take a part
            self.written += size
            at += size


def _local_target(remote_path: str, local_path: Any) -> Path:
    """Return where `download_path` puts a file: at a path, or into a folder by its own name."""
    target = _local_path("local_path", local_path)
    if target.is_dir():
        name = remote_path.rpartition("/")[2]
        if Path(name).name != name:
            raise BoxerValidationError(f"{remote_path!r} ends in a name that no file can have; give the path of one")
        target /= name
    elif os.fsdecode(local_path).endswith(("/", os.sep)):
        raise BoxerValidationError(f"there is no folder {str(target)!r}")
    if target.is_symlink():
        target = _resolved(target)
    if os.path.lexists(target) and not target.is_file():
        what = "a folder" if target.is_dir() else "no ordinary file"
        raise BoxerValidationError(f"{str(target)!r} is {what}; nothing is written over it")
    return target


def _output_file(output_dir: _LocalPath, name: str) -> Path:
    """Return where an output goes below a local folder; make the folders on the way, and go through no link."""
    *parents, last = name.split("/")
    if len(parents) > _DEPTH_LIMIT:
        raise BoxerError(f"the output {name[:_SHOWN_SIZE]!r} lies more than {_DEPTH_LIMIT} folders deep")
    folder = Path(output_dir, *parents)
    if _resolved(folder) != _resolved(Path(output_dir)).joinpath(*parents):
        raise BoxerError(f"{str(folder)!r} is a link, or behind one; no output is written through it")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / last


@contextlib.contextmanager
def _written(target: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside the target, and put it in the target's place once it is whole."""
    temporary = target.with_name(f".boxer-{os.urandom(8).hex()}")
    try:
        with temporary.open("xb") as file:
            if target.exists():
                temporary.chmod(stat.S_IMODE(target.stat().st_mode))  # what was private stays so
            yield file
        os.replace(temporary, target)  # noqa: PTH105 - as in the documentation: an atomic step
    except OSError as error:
        # A system call has failed: it was about the target, as far as the caller knows.
        if error.errno is not None and _is_ours(error):
            error.filename = str(target)
        raise
    finally:
        with contextlib.suppress(OSError):  # it may have become the target, or could not be made
            temporary.unlink()


# ---- Requests --------------------------------------------------------------------------------------------------------


# A run leaves no trace, so it may be sent again; one with a network may have had effects outside, so it is sent once.
_Kind = Literal["run", "run with a network", "download", "other"]


class _Request(NamedTuple):
    """A request of one of the endpoints, short of what the client's settings add to it."""

    method: str
    target: str  # below the base URL's path
    headers: Mapping[str, str]  # this request's own fields
    body: Union[bytes, _Multipart]
    kind: _Kind = "other"
    extra_time: float = 0.0  # seconds that the server is entitled to on top of the timeout
    path: str = ""  # of the file in the server's store that it is about, for the texts of errors
    sink: Optional[_Sink] = None  # what a file is written to; without one, it is the response's content
    content_limit: float = _ANSWER_LIMIT  # bytes of a response's content that are taken into memory

    @property
    def name(self) -> str:
        """The method and the path, for the texts of errors and the log."""
        return f"{self.method} {self.target.partition('?')[0]}"


_HEALTH_REQUEST = _Request("GET", "/healthz", {}, b"")
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
_RUN_MEMBERS = ("image", "cmd", "env", "cwd", "limits", "files", "persist", "network")


def _run_request(run: RunRequest) -> _Request:
    limits = cast("ResourceLimits", run.limits).to_dict() if run.limits else {}
    members = {**vars(run), "limits": limits, "persist": bool(run.persist)}
    body = _JSON.encode({name: members[name] for name in _RUN_MEMBERS if members[name]}).encode()
    headers = {"Content-type": "application/json", "Content-length": str(len(body))}
    kind: _Kind = "run" if run.network in (None, "none") else "run with a network"
    return _Request("POST", "/run", headers, body, kind, min(limits.get("wall_clock_secs", 0), _LONGEST_WAIT))


def _upload_request(remote_path: str, content: Content) -> _Request:
    path = _clean_path("remote_path", remote_path)
    body = _Multipart(path, content)
    whole = b"".join([*body.pieces(), body.end]) if body.is_in_memory and (body.length or 0) < _SMALL_UPLOAD else None
    kind = f"multipart/form-data; boundary={body.boundary}"
    framing = {"Transfer-encoding": "chunked"} if body.length is None else {"Content-length": str(body.length)}
    return _Request("POST", "/files", {"Content-type": kind, **framing}, whole or body, path=path)


def _download_request(path: str, sink: _Sink | None = None, limit: float = math.inf) -> _Request:
    path = _path("path", path)
    target = f"/files?path={urllib.parse.quote(path, safe='/')}"
    return _Request("GET", target, {}, b"", "download", path=path, sink=sink, content_limit=limit)


class _Multipart:
    """A multipart/form-data body of one file and its path (RFC 7578), made as it is sent.

    The file's own name is left out, since the server goes by the part `path`. The value of a part may be any text:
    only the delimiter ends it, and that is random. Content that can be rewound is sent from its start at every try.
    """

    def __init__(self, path: str, content: Content) -> None:
        self.boundary = os.urandom(16).hex()
        part = f'--{self.boundary}\r\nContent-Disposition: form-data; name="'
        self._before = f'{part}file"; filename="file"\r\nContent-Type: application/octet-stream\r\n\r\n'.encode()
        self._after = f'\r\n{part}path"\r\n\r\n{path}\r\n--{self.boundary}--\r\n'.encode()
        self._content = _content("content", content)
        self._size = _size(self._content)
        # The length of the body in bytes; None if it cannot be known before it was sent.
        self.length = None if self._size is None else len(self._before) + self._size + len(self._after)
        self.can_be_sent = True  # False once content that cannot be rewound was read from
        self.is_in_memory = isinstance(self._content, memoryview)

    def __len__(self) -> int:  # what instruments urllib asks for it
        return self.length or 0

    def pieces(self) -> Iterator[_Piece]:
        """Yield the body without its `end`; content is first read for the second piece."""
        if not self.can_be_sent:
            raise BoxerError("the content has been read and cannot be rewound, so it cannot be sent again")
        yield self._coded(self._before)
        if isinstance(self._content, memoryview):
            yield from (self._content[at : at + _PIECE_SIZE] for at in range(0, len(self._content), _PIECE_SIZE))
        elif self._size is not None:
            yield from _read_whole(self._content, self._size)
        else:
            self.can_be_sent = False
            while piece := _read(self._content, _FILE_PIECE_SIZE):
                yield self._coded(piece)

    @property
    def end(self) -> bytes:
        return self._coded(self._after) + (b"0\r\n\r\n" if self.length is None else b"")

    def _coded(self, piece: bytes) -> bytes:
        """Return a piece in the chunked transfer coding (RFC 9112, section 7.1) if the length is not known."""
        return piece if self.length is not None else b"%x\r\n%b\r\n" % (len(piece), piece)


# What starts the program where a run has an input, or all of its outputs are fetched. `exec` keeps the shell's own
# commands from being run in the program's place, and the descriptors keep the shell's own words out of its stderr.
_WITH_TEXT = 'exec 3>&2 2>/dev/null; printf %s "$1" | { shift; exec "$@" 2>&3 3>&-; }'
_WITH_FILE = 'exec 3>&2 2>/dev/null; { shift; exec "$@" 2>&3 3>&-; } <"$1"'
_WITH_LIST = (
    'exec 3>&2 2>/dev/null; (exec "$@" 2>&3 3>&-); c=$?; '
    "cd /output && command -v find >&2 && find . -type f ! -name NAME -print0 >NAME; exit $c"
)


class _Plan:
    """The steps of a run that has files, an input or outputs: what to upload, to run, and to remove."""

    def __init__(self, run: RunRequest, lists_outputs: bool) -> None:
        folder = f"boxer-{os.urandom(16).hex()}"  # two runs at once never mix
        self.uploads: list[_Upload] = []
        # How far the uploads are, as `_upload_planned` notes it.
        self.uploaded: list[str] = []  # the remote paths that are there for certain
        self.begun: list[str] = []  # those that may be there
        self.failure: Exception | None = None  # the first error
        self.list_name = f"{folder}-list" if lists_outputs else ""  # of the list of outputs, in /output
        self.outputs: Sequence[str] = () if isinstance(run.outputs, bool) else run.outputs
        cmd, cwd, files = tuple(run.cmd), run.cwd, run.files
        if isinstance(files, Mapping):
            for name, content in files.items():
                path = f"{folder}/{name}"
                if isinstance(content, os.PathLike):
                    self.uploads += _local_files(content, path, ())
                else:
                    _content(f"files[{name!r}]", content)  # a wrong type is known before anything is sent
                    self.uploads.append((path, content))
            own = [path for path, _ in self.uploads]
            own += _folders_of(own)
            files = own if len(own) <= _MOUNT_LIMIT else [folder]
            cwd = str(PurePosixPath("/", folder, cwd or ""))  # a relative one is below the folder
        # The server removes what a run names when that ends with a result, but no folder with something in it.
        # Outputs are to be kept.
        persist = bool(run.persist or run.outputs or lists_outputs)
        self.server_removes = not persist and files != [folder]
        if run.input is not None:
            text = _short_text(run.input)
            if text is None:
                path = f"{folder}-input"
                self.uploads.append((path, run.input))
                files = [*(files or ()), path]
            script, argument = (_WITH_FILE, f"/{folder}-input") if text is None else (_WITH_TEXT, text)
            cmd = ("/bin/sh", "-c", script, "sh", argument, *cmd)
        if lists_outputs:
            cmd = ("/bin/sh", "-c", _WITH_LIST.replace("NAME", self.list_name), "sh", *cmd)
        self.run = RunRequest(run.image, cmd, run.env, cwd, run.limits, files, persist, run.network)

    def removals(self) -> Iterator[RunRequest]:
        """Yield runs that remove what is left on the server: any run without `persist` removes what it names."""
        uploaded = set(self.uploaded)
        groups: list[list[str]] = []
        for path in self.begun:
            if path not in uploaded:  # a run that names what is not there removes nothing: there may be folders alone
                folders = _folders_of([path])
                groups += [path, *folders], folders
        for paths in filter(None, [*groups, [*self.uploaded, *_folders_of(self.uploaded)]]):
            yield RunRequest(self.run.image, ["true"], files=paths)


def _folders_of(paths: Iterable[str]) -> list[str]:
    """Return all folders that paths go through, deepest first."""
    folders = {str(folder) for path in paths for folder in PurePosixPath(path).parents}
    return sorted(folders - {"."}, key=lambda folder: (-folder.count("/"), folder))


def _short_text(value: str | bytes) -> str | None:
    """Return an input as text that can be an argument; None: it must be a file."""
    content = value.encode("utf-8") if isinstance(value, str) else value
    if len(content) > _INPUT_LIMIT or b"\0" in content:
        return None
    text = content.decode("utf-8", "replace")
    return text if text.encode("utf-8") == content else None


# ---- Responses -------------------------------------------------------------------------------------------------------


class _Head(NamedTuple):
    """The decoded head of a response, and what it says of the content (RFC 9112, section 6.3)."""

    code: int
    reason: str
    field_lines: Sequence[tuple[str, str]]  # with names in lower case
    fields: Mapping[str, str]  # repeated fields are joined with ", " (RFC 9110, section 5.3)
    keeps_alive: bool = False  # another exchange may follow on the connection
    is_chunked: bool = False
    length: float = 0  # of the content in bytes; infinite: the last chunk ends it, or else the connection's end


class _Response:
    """A final response: its head, and as much of its content as was wanted.

    `code`, `getcode()`, `msg`, `headers` and `info()` are what urllib's handlers, and what wraps them, look for.
    """

    is_cut = False  # the content was longer than its limit
    asked = ""  # the method and the URL that it answers, for the texts of errors

    def __init__(self, head: _Head, content: bytes = b"") -> None:
        self.head, self.content = head, content
        self.code, self.msg, self.fields = head.code, head.reason, head.fields
        self.is_success = 200 <= head.code < 300
        self.coding = head.fields.get("content-encoding", "").lower() or "identity"
        self.is_whole_file = head.code == 200 and self.coding == "identity"

    def getcode(self) -> int:
        return self.code

    def info(self) -> email.message.Message:
        message = email.message.Message()
        for name, value in self.head.field_lines:
            message[name] = value
        return message

    headers = property(info)


def _is_success(response: _Response) -> bool:
    return response.is_success


def _run_result(response: _Response) -> RunResult:
    if response.code == 400 and _reason(response).startswith("file not found"):
        what = "a list in files names what was uploaded; local files go in as a mapping from names to paths"
        raise BoxerAPIError(f"{_reason(response)}; {what}", 400)
    members = _checked_json(response)
    try:
        result = RunResult(*[members[name] for name in _RESULT_TYPES])
        _text("exec_id", result.exec_id)
        return result
    except (BoxerValidationError, KeyError, TypeError) as error:
        what = f"has no {error}" if isinstance(error, KeyError) else f"is malformed: {error}"
        raise BoxerAPIError(f"the result {what}; {_no_boxer(response)}", response.code) from error


def _check_uploaded(response: _Response) -> None:
    if not isinstance(_checked_json(response).get("path"), str):
        raise BoxerAPIError(f"nothing says where the file went; {_no_boxer(response)}", response.code)


def _listed_names(response: _Response) -> Sequence[str]:
    """Return the names of outputs from the list that the run has made, and the program may have forged."""
    if _is_missing(response):
        raise BoxerAPIError("the run left no list of its outputs: its image may be without /bin/sh or find", 404)
    names, left_out = [], []
    listed = _file_content(response)
    if listed.count(b"\0") > _OUTPUT_LIMIT:
        raise BoxerAPIError(f"the run has more than {_OUTPUT_LIMIT:,} outputs; none was fetched", response.code)
    for line in listed.split(b"\0")[:-1]:
        name = line[:_NAME_LIMIT].decode("utf-8", "backslashreplace")[2:]
        parts = tuple(name.split("/"))
        is_as_listed = f"./{name}".encode("utf-8", "replace") == line
        if is_as_listed and ".." not in parts and Path(name).parts == parts:  # Path drops what is empty or "."
            names.append(name)
        else:
            left_out.append(name)
    if left_out:
        text = "outputs left out because of their names: %d, such as %r"
        _LOG.warning(text, len(left_out), left_out[0][:_SHOWN_SIZE])
    return names


def _file_content(response: _Response) -> bytes:
    if 300 <= response.code < 400 and response.fields.get("location", "").startswith("files/?path="):
        raise BoxerAPIError("the path is a folder; name a file in it", response.code)
    if _is_missing(response) and re.search(r"\?path=/?output/", response.asked):
        raise BoxerAPIError(f"{_reason(response)}; a run's outputs are kept only if it had persist=True", 404)
    if response.code != 200 and response.is_success:
        raise BoxerAPIError(f"{_status(response)} is no whole file", response.code)
    return _checked(response).content


def _is_missing(response: _Response) -> bool:
    """Tell whether the server says that a file is not there; another 404 may come from something on the way."""
    return response.code == 404 and _server_error(response) is not None


def _file_content_or_none(response: _Response) -> bytes | None:
    return None if _is_missing(response) else _file_content(response)


def _checked(response: _Response) -> _Response:
    """Return a successful response; raise the right error for any other."""
    if not response.is_success:
        reason = _reason(response) if _server_error(response) else f"{_reason(response)}; {_no_boxer(response)}"
        raise _ERROR_OF_STATUS.get(response.code, BoxerAPIError)(reason, response.code)
    if response.coding != "identity":
        message = f"the answer came with Content-Encoding {_printable(response.coding)[:40]!r}, which was not asked for"
        raise BoxerAPIError(message, response.code)
    if response.is_cut:
        limit = f"{_ANSWER_LIMIT >> 20} MiB, less what other outputs took"
        raise BoxerAPIError(f"the answer is longer than is taken into memory ({limit})", response.code)
    return response


def _checked_json(response: _Response) -> dict[str, Any]:
    content = _checked(response).content
    try:
        return _json_object(content)
    except _NO_JSON_OBJECT as error:
        shown = f"begins with {_printable(content[:80].decode('utf-8', 'replace'))!r}" if content else "is empty"
        message = f"the answer should be a JSON object, and {shown}; {_no_boxer(response)}"
        raise BoxerAPIError(message, response.code) from error


_NO_JSON_OBJECT = (MemoryError, RecursionError, ValueError)  # what `_json_object` raises


def _json_object(content: bytes) -> dict[str, Any]:
    value = json.loads(content.decode("utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"it is a {type(value).__name__}")
    return value


def _no_boxer(response: _Response) -> str:
    return f"this answer to {response.asked} is not a Boxer server's: look at the URL, and at proxies on the way"


# An unclosed comment or tag matches up to the end of the text, which keeps the regex linear.
_MARKUP = r"(?si)<!--.*?(?:-->|\Z)|<(style|script|title)\b.*?(?:</\1\s*>|\Z)|<[^<>]*>|&#\w{8,}"


def _reason(response: _Response) -> str:
    """Return what the server says for itself in an error, however it was sent, as one line of a sane length."""
    text = _server_error(response)
    if text is None:
        text = response.content[: 8 * _REASON_SIZE].decode("utf-8", "replace").lstrip("\ufeff")
        if text.lstrip()[:1] == "<":
            text = html.unescape(re.sub(_MARKUP, " ", text))
        text = f"{_status(response)}: {text}" if text.strip() else _status(response)
    if 300 <= response.code < 400:
        text += f" (redirects are not followed; Location: {response.fields.get('location', '')})"
    text = " ".join(_printable(text[: 8 * _REASON_SIZE]).split())
    return text if len(text) <= _REASON_SIZE else text[:_REASON_SIZE] + " …"


def _server_error(response: _Response) -> str | None:
    """Return the text of the server's own `{"error": text}`; None if the content is anything else."""
    try:
        error = _json_object(response.content).get("error")
    except _NO_JSON_OBJECT:
        return None
    return error if isinstance(error, str) and error.strip() else None


def _status(response: _Response) -> str:
    return f"{response.code} {_printable(response.msg[:_REASON_SIZE])}".strip()


# ---- Policy ----------------------------------------------------------------------------------------------------------


class _Route(NamedTuple):
    """A way to an origin; connections of one route can stand in for each other."""

    scheme: str
    next_hop: str  # the authority to connect to: the origin's own, or a proxy's
    tunnel: Optional[str]  # the authority to ask that proxy for, with CONNECT
    authorization: Optional[str]  # for the proxy at the entry of the tunnel
    origin: str  # the authority at its end, for the texts of errors

    @property
    def address(self) -> tuple[str, int]:
        """The host and port to connect to; a proxy is always spoken to in plain HTTP."""
        return _host_and_port(self.next_hop, _DEFAULT_PORTS["http" if self.tunnel else self.scheme])

    @property
    def peer(self) -> str:
        """The same for the texts of errors."""
        peer = "{}:{}".format(*self.address)
        return peer if self.next_hop == self.origin else f"the proxy {peer} (for {self.origin})"


class _Origin(NamedTuple):
    """Where a client's requests go, and what each of them says, as read from its base URL and the environment."""

    url: str  # without credentials
    scheme: str
    authority: str  # host, and port where it is not the scheme's own
    path: str  # what a request target begins with
    proxy: Optional[str]  # its authority
    fields: dict[str, str]  # of every request; names are spelt as urllib spells them


_DEFAULT_PORTS = {"http": 80, "https": 443}


def _origin(base_url: str | None, headers: Mapping[str, str]) -> _Origin:
    name = "base_url"
    if base_url is None:
        name, base_url = "BOXER_URL (an environment variable)", os.environ.get("BOXER_URL")
        base_url = base_url or "http://localhost:8080"
    parts = _split_url(_text(name, base_url), name)
    if parts.scheme not in _DEFAULT_PORTS:
        raise BoxerValidationError(f"{name} must begin with http:// or https://")
    if parts.query or parts.fragment:
        raise BoxerValidationError(f"{name} must have no query and no fragment")
    authority = _authority(parts, name)
    path = urllib.parse.quote(parts.path, safe="/%:@!$&'()*+,;=~").rstrip("/")
    proxy = _proxy(parts, authority)
    fields = {
        "Host": re.sub("%[^]]*", "", authority),  # without an IPv6 zone
        "User-agent": _USER_AGENT,
        "Accept-encoding": "identity",
        **_basic("Authorization", parts, name),
        **(_basic("Proxy-authorization", proxy, "the proxy's URL") if proxy else {}),
        **headers,
    }
    if proxy is None:
        fields.pop("Proxy-authorization", None)
    url = f"{parts.scheme}://{authority}{path}"
    next_hop = _authority(proxy, "the proxy") if proxy else None
    return _Origin(url, parts.scheme, authority, path, next_hop, fields)


def _split_url(url: str, name: str) -> urllib.parse.SplitResult:
    # The URL may hold a password, so no message shows it. urlsplit drops some controls silently: look first.
    if not url.isprintable() or " " in url or "\\" in url:
        raise BoxerValidationError(f"{name} has a space, a backslash or a control character in it")
    what = "is not a URL with a host, such as http://localhost:8080"
    with contextlib.suppress(ValueError):
        parts = urllib.parse.urlsplit(url)
        if parts.hostname:
            what = "has a port that is not a number from 1 to 65535"
            if parts.port != 0:
                return parts
    raise BoxerValidationError(f"{name} {what}")


_HOST = r"(?a)[\w-]{1,63}(\.[\w-]{1,63})*\.?"
_IPV6 = r"(?a)[0-9A-Fa-f:.]+(%[\w.~-]+)?"


def _authority(parts: urllib.parse.SplitResult, name: str) -> str:
    host = (parts.hostname or "").replace("%25", "%")  # of an IPv6 zone: RFC 6874
    try:
        host = host if host.isascii() else host.encode("idna").decode("ascii")
    except UnicodeError:
        host = ""
    is_bracketed = parts.netloc.rpartition("@")[2].startswith("[")
    if len(host) > 253 or is_bracketed != (":" in host) or not re.fullmatch(_IPV6 if is_bracketed else _HOST, host):
        raise BoxerValidationError(f"the host in {name} is not a name or address")
    host = f"[{host}]" if ":" in host else host
    return host if parts.port in (None, _DEFAULT_PORTS[parts.scheme]) else f"{host}:{parts.port}"


def _basic(field_name: str, parts: urllib.parse.SplitResult, name: str) -> dict[str, str]:
    """Return the field for the credentials in a URL (RFC 7617), if there are any."""
    if parts.username is None:
        return {}
    user, password = map(urllib.parse.unquote_to_bytes, (parts.username, parts.password or ""))
    if b":" in user:
        raise BoxerValidationError(f"the user name in {name} must have no colon")
    pair = user + b":" + password
    return {field_name: "Basic " + binascii.b2a_base64(pair, newline=False).decode("ascii")}


def _proxy(parts: urllib.parse.SplitResult, authority: str) -> urllib.parse.SplitResult | None:
    """Return the proxy that the environment names for a URL, as urllib reads it; none for this machine itself."""
    proxies = urllib.request.getproxies()
    url = proxies.get(parts.scheme)
    if not url or _is_reached_directly(parts.hostname or "", proxies.get("no", "")):
        return None
    if urllib.request.proxy_bypass(re.sub(r"\.(?=:\d|\Z)", "", authority)):
        return None
    proxy = _split_url(url if "://" in url else f"http://{url}", "the proxy")
    if proxy.scheme != "http":
        raise BoxerValidationError(f"{parts.scheme}_proxy must begin with http://: a proxy is spoken to in plain HTTP")
    return proxy


def _is_reached_directly(host: str, no_proxy: str) -> bool:
    """Tell whether a host is this machine, or an address in one of NO_PROXY's networks, which urllib does not know."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
        address = getattr(address, "ipv4_mapped", None) or address
    except ValueError:  # a name
        return re.fullmatch(r"(.*\.)?localhost\.?", host) is not None
    for entry in no_proxy.split(","):
        with contextlib.suppress(ValueError):
            if address in ipaddress.ip_network(re.sub(r"[\[\]\s]", "", entry), strict=False):
                return True
    return address.is_loopback


def _host_and_port(authority: str, default_port: int) -> tuple[str, int]:
    parts = urllib.parse.urlsplit(f"//{authority}")
    return parts.hostname or "", parts.port or default_port


_USER_AGENT = f"boxer-sdk/{__version__}"
# A user must not set these fields: the framing of a request depends on them, or the client promises what they say.
_OWN_FIELDS = {"accept-encoding", "connection", "content-length", "content-type", "expect", "host", "keep-alive", "te"}
_OWN_FIELDS |= {"trailer", "transfer-encoding", "upgrade"}
_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # RFC 9110, section 5.6.2  # noqa: S105


def _checked_fields(headers: Any) -> dict[str, str]:
    if not isinstance(headers, Mapping):
        raise TypeError(f"headers must be a mapping, not {type(headers).__name__}")
    fields: dict[str, str] = {}
    for name, value in headers.items():
        if not re.fullmatch(_TOKEN, _text("each name in headers", name)):  # not shown: it may be a whole line
            raise BoxerValidationError("a name in headers is not the name of a field")
        if name.lower() in _OWN_FIELDS or name.capitalize() in fields:
            raise BoxerValidationError(f"{name!r} in headers is there twice, or is set by the client itself")
        if not _text(f"the value of {name!r} in headers", value).isprintable() or max(value, default="") > "\xff":
            raise BoxerValidationError(f"the value of {name!r} in headers has a character that a field cannot hold")
        fields[name.capitalize()] = value.strip()
    return fields


def _seconds(name: str, value: Any) -> float:
    if value is None:
        return math.inf
    if not (_is_real(value) and value > 0):
        raise BoxerValidationError(f"{name} must be a number of seconds above 0, or None for no limit, not {value!r}")
    return float(value) if value < _LONGEST_WAIT else math.inf


class _Deadline:
    """The time by which a call has to be over.

    It bounds the wait for an answer as a whole, with all tries and pauses. While the content of a file is on its way,
    each piece of it pushes the deadline back.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.start_again("complete answer")

    @property
    def left(self) -> float:
        """Seconds left, at most what an operating system can wait for; 0 or less once the deadline has passed."""
        return min(self._end - time.monotonic(), _LONGEST_WAIT)

    def start_again(self, awaited: str) -> None:
        """Count from now: content has moved, or the next phase has begun."""
        self._end = time.monotonic() + self._seconds
        self._awaited = awaited

    def postpone(self, seconds: float) -> None:
        """Do not count this time, which was spent waiting for a free connection."""
        self._end += seconds

    def error(self, peer: str) -> BoxerTimeoutError:
        return BoxerTimeoutError(f"{peer}: no {self._awaited} within {self._seconds:g} s; the client gave up", 0)


class _Cancellation:
    """A handle with which another thread or task ends a call, by interrupting whatever it waits for."""

    def __init__(self) -> None:
        self.reason: str | None = None  # why the call was cancelled
        self._interrupt: Callable[[], Any] | None = None
        self._lock = threading.RLock()  # so that no interrupt outlives what it is for

    def cancel(self, reason: str) -> None:
        with self._lock:
            self.reason = self.reason or reason
            if self._interrupt is not None:
                self._interrupt()

    def interrupt_by(self, interrupt: Callable[[], Any] | None) -> Callable[[], Any] | None:
        """Set the function that ends a wait, and call it at once if the call is cancelled; return the one before it."""
        with self._lock:
            earlier, self._interrupt = self._interrupt, interrupt
            if self.reason is not None and interrupt is not None:
                interrupt()
            return earlier


class _Options(NamedTuple):
    """What a caller says of how a request is to be sent."""

    seconds: float  # of the timeout
    retries: Optional[int] = None  # None: the client's own setting
    cancellation: Optional[_Cancellation] = None


@dataclass(eq=False)
class _Call:
    """One call of a client's method, on its way through the pool and its connections."""

    request: _Request
    deadline: _Deadline
    cancellation: _Cancellation
    thread: int = field(default_factory=threading.get_ident)
    was_sent: bool = False  # some of the request, at any try
    tries: int = 0  # exchanges that have begun, for the log
    failure: Optional[BoxerError] = None  # of the last exchange; set by the handler of an opener

    def check(self, peer: str) -> None:
        """Raise the right error if the call was cancelled, or its deadline has passed."""
        if self.cancellation.reason is not None:
            raise BoxerConnectionError(f"{peer}: {self.cancellation.reason}", self.was_sent)
        if self.deadline.left <= _TIMER_SLACK:
            raise self.deadline.error(peer)


# The server's race: the output of a short program that did run is lost.
_RACE = r"read std(out|err): .*file already closed"
# Reasons of the server for a 500 that another try will meet again.
_PERMANENT = ("image pull failed", "spec build failed", "network setup failed", "start runsc: context")


class _Tries:
    """Decides what is tried again after a failure: only what the server says is over, or what it never began."""

    def __init__(self, call: _Call, retries: int) -> None:
        self._call = call
        self._retries = retries
        self._retried = 0
        self._races_left = _RACE_TRIES if retries and call.request.kind == "run" else 0

    def pause_after(self, outcome: _Response | BoxerConnectionError) -> float | None:
        """Return the seconds to wait before another try, which the log is told of; None: there is no other."""
        call, request = self._call, self._call.request
        error = _server_error(outcome) if isinstance(outcome, _Response) and outcome.code == 500 else None
        if self._races_left and error is not None and re.match(_RACE, error):
            self._races_left -= 1
            pause, log_level = random.uniform(0.01, 0.05), logging.DEBUG
        else:
            if isinstance(outcome, BoxerConnectionError):
                is_over = _is_harmless(request, outcome)
            else:
                is_over = outcome.code in (429, 503) or (error is not None and not error.startswith(_PERMANENT))
            if not is_over or self._retried >= self._retries:
                return None
            self._retried += 1
            pause, log_level = random.uniform(0.5, 1.0) * 0.25 * 2 ** min(self._retried, 5), logging.WARNING
            if isinstance(outcome, _Response):
                pause = max(pause, _retry_after(outcome.fields.get("retry-after", "")))
        if not _can_be_sent(request) or pause >= call.deadline.left:
            return None
        call.check(request.name)
        reason = _reason(outcome) if isinstance(outcome, _Response) else str(outcome)
        _LOG.log(log_level, "%s: %s; trying again in %.2f s", request.name, reason[:200], pause)
        return pause


def _is_harmless(request: _Request, error: BoxerConnectionError) -> bool:
    """Tell whether a request can be sent again after an error: it was not sent, or it is a GET that was lost."""
    cause = error.__cause__  # None: the client itself gave up
    if cause is None or isinstance(cause, ssl.SSLCertVerificationError) or _speaks_plain_http(cause):
        return False
    is_harmless = not error.request_sent or (request.method == "GET" and isinstance(cause, OSError))
    return is_harmless and _can_be_sent(request)


def _speaks_plain_http(error: BaseException | None) -> bool:
    """Tell whether TLS failed because the answer to its first message was not TLS."""
    reason = getattr(error, "reason", "") if isinstance(error, ssl.SSLError) else ""
    return reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE")


def _can_be_sent(request: _Request) -> bool:
    can_be_received = request.sink is None or request.sink.can_be_rewound
    return can_be_received and (isinstance(request.body, bytes) or request.body.can_be_sent)


def _retry_after(value: str) -> float:
    """Return the seconds that a Retry-After field asks to wait for (RFC 9110, section 10.2.3); 0 if it is invalid."""
    if re.fullmatch("[0-9]+", value):
        return float(value)
    date: Any = email.utils.parsedate(value)  # None: it is no date
    with contextlib.suppress(OverflowError, TypeError, ValueError):
        return calendar.timegm(date) - time.time()
    return 0.0


# ---- Wire ------------------------------------------------------------------------------------------------------------
#
# RFC 9112, strictly: what can be read in two ways is an error, since a proxy may have read it the other way.
# ----------------------------------------------------------------------------------------------------------------------

_TEXT = r"[^\x00-\x08\x0a-\x1f\x7f]*"
_STATUS_LINE = re.compile(rf"HTTP/1\.([0-9]) ([1-9][0-9]{{2}})(?: ({_TEXT}))?")
_FIELD_LINE = re.compile(rf"({_TOKEN}):({_TEXT})")
_CHUNK_HEAD = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[^\x00-\x08\x0a-\x1f\x7f]*)?")


class _ProtocolError(Exception):
    """What arrived is not a valid HTTP response."""


class _LostError(_ProtocolError, ConnectionError):
    """The connection ended before the response did. An OSError, since `_is_harmless` looks for one as the cause."""


class _ContentLimit(Exception):  # noqa: N818 - it ends a loop, and is no error
    """There is more content than is wanted."""


def _encoded_head(method: str, target: str, fields: Mapping[str, str]) -> bytes:
    """Encode a head whose parts have been checked before."""
    lines = "".join([f"{name}: {value}\r\n" for name, value in fields.items()])
    return f"{method} {target} HTTP/1.1\r\n{lines}\r\n".encode("latin-1")


class _Decoder:
    """Decode the response to one request from bytes as they arrive.

    `response` is there once its head is, with its content once `is_complete`. The decoding is a generator: each
    `feed` lets it go on until it needs more bytes.
    """

    response: _Response | None = None
    is_complete = False
    size = 0  # bytes of content so far
    received = 0  # bytes in all
    _data = b""  # what has arrived,
    _at = 0  # and how much of it is decoded
    _content: io.BytesIO  # its getvalue() shares the buffer: content is in memory once
    _decoding: Generator[None, None, None] | None = None

    def __init__(self, content_limit: float, is_tunnel: bool = False) -> None:
        self._content_limit = content_limit
        self._is_tunnel = is_tunnel  # the response is to a CONNECT, whose success has no content

    @property
    def is_success(self) -> bool:
        return self.response is not None and self.response.is_success

    @property
    def has_rest(self) -> bool:
        """More arrived than the response."""
        return self._at < len(self._data)

    def feed(self, data: bytes) -> None:
        self.received += len(data)
        if self._decoding is None:
            if self._decode_whole(data):
                return
            self._decoding = self._decode()
        self._data, self._at = self._data[self._at :] + data, 0
        next(self._decoding, None)

    def _decode_whole(self, data: bytes) -> bool:
        """Decode a successful response that came as a whole, the usual case, in a third of the time."""
        end = data.find(b"\r\n\r\n", 0, _HEAD_LIMIT)
        if end < 0 or not data.startswith(b"HTTP/1.1 200 "):
            return False
        head, content = _PROCESS.decoded_head(data[:end]), data[end + 4 :]
        if head.length != len(content) or head.length > self._content_limit or self._is_tunnel:
            return False
        self.response, self.is_complete = _Response(head, content), True
        return True

    def take(self) -> bytes:
        """Return what has come of the content, if it is a piece's worth, and forget it."""
        if self._content.tell() < _PIECE_SIZE:
            return b""
        content = self._content.getvalue()
        self._content = io.BytesIO()
        return content

    def end(self, loss: Exception | None) -> None:
        """Complete a response that goes on to the end of the connection; `loss` is the error that broke it, if any."""
        why = f" ({loss})" if loss else ""
        if self.response is None:
            where = "within the head of the answer" if self.has_rest else "before an answer came"
            raise _LostError(f"the connection ended {where}{why}") from loss
        head = self.response.head
        if head.is_chunked or head.length < math.inf or loss is not None:
            raise _LostError(f"the connection ended within the content, after {self.size} bytes of it{why}") from loss
        assert self._decoding is not None
        self._decoding.close()
        self._complete()

    def _decode(self) -> Generator[None, None, None]:
        for _ in range(_INTERIM_LIMIT + 1):  # of the interim responses, nothing is of use
            head = _PROCESS.decoded_head((yield from self._until(b"\r\n\r\n", _HEAD_LIMIT, "the head")))
            if head.code >= 200:
                break
        else:
            raise _ProtocolError("there were too many interim answers")
        response = self.response = _Response(head)
        self._content = io.BytesIO()
        if not response.is_whole_file:
            self._content_limit = _ERROR_LIMIT  # nobody wants more of it
        try:
            if head.is_chunked:
                yield from self._chunked_content()
            elif not (self._is_tunnel and response.is_success):
                yield from self._sized_content(head.length)
        except _ContentLimit:
            response.is_cut = True
        self._complete()

    def _complete(self) -> None:
        assert self.response is not None
        self.response.content = self._content.getvalue()
        self.is_complete = True

    def _sized_content(self, length: float) -> Generator[None, None, None]:
        """Decode so many bytes of content; infinity: up to the end of the connection."""
        if self.is_success and self._content_limit < length < math.inf:
            raise _ContentLimit  # there is no need to receive any of it
        while length > 0:
            if not self.has_rest:
                yield
            end = None if length == math.inf else self._at + int(length)
            piece = self._data[self._at : end]
            self._at += len(piece)
            length -= len(piece)
            self._content.write(piece)
            self.size += len(piece)
            if self.size > self._content_limit:
                raise _ContentLimit

    def _chunked_content(self) -> Generator[None, None, None]:
        """Decode content in the chunked transfer coding (RFC 9112, section 7.1)."""
        size = 1
        while size:
            head = yield from self._until(b"\r\n", _CHUNK_HEAD_LIMIT, "a chunk's head")
            match = _CHUNK_HEAD.fullmatch(head)
            if not match:
                raise _ProtocolError(f"the size of a chunk is malformed: {head[:40]!r}")
            size = int(match[1], 16)
            yield from self._sized_content(size)
            if size:
                yield from self._until(b"\r\n", 0, "what a chunk has beyond its size")
        self._at -= 2  # step back over the last chunk's CRLF, so that an empty trailer section also ends with CRLF CRLF
        section = yield from self._until(b"\r\n\r\n", _HEAD_LIMIT, "the trailer section")
        _field_lines(section[2:].decode("latin-1"))  # nothing in it is of use, but it has to be well-formed

    def _until(self, delimiter: bytes, limit: int, what: str) -> Generator[None, None, bytes]:
        """Return what comes before a delimiter, which is skipped."""
        most = limit + len(delimiter)
        while True:
            data = self._data[self._at : self._at + most]
            if self.response is None and not b"HTTP/1.".startswith(data[:7]):  # known at once, and not waited for
                raise _ProtocolError(f"the answer is not HTTP/1.1 but begins with {data[:16]!r}; is the URL right?")
            size = data.find(delimiter)
            if size >= 0:
                self._at += size + len(delimiter)
                return data[:size]
            if len(data) == most:
                raise _ProtocolError(f"{what} is longer than {limit} bytes")
            if data.count(b"\n") > data.count(b"\r\n"):
                raise _ProtocolError(f"a line of {what} does not end with CRLF")
            yield


def _decoded_head(data: bytes) -> _Head:
    line, _, section = data.decode("latin-1").partition("\r\n")
    match = _STATUS_LINE.fullmatch(line)
    if not match:
        raise _ProtocolError(f"the status line is malformed: {line[:80]!r}")
    is_old, code, reason, field_lines = match[1] == "0", int(match[2]), match[3] or "", _field_lines(section)
    if code == 101:
        raise _ProtocolError("the server switched to another protocol, which was not asked for")
    fields = _combined(field_lines)
    has_content = code >= 200 and code not in (204, 304)
    is_chunked, length = _framing(fields, is_old) if has_content else (False, 0.0)
    options = [option.strip() for option in fields.get("connection", "").lower().split(",")]
    keeps_alive = (is_chunked or length < math.inf) and not is_old and "close" not in options
    return _Head(code, reason, field_lines, fields, keeps_alive, is_chunked, length)


def _field_lines(section: str) -> list[tuple[str, str]]:
    """Decode field lines; replace each obsolete line fold with a space (RFC 9112, section 5.2)."""
    lines = re.sub("\r\n[ \t]+", " ", section).split("\r\n") if section else []
    if len(lines) > _FIELD_LIMIT:
        raise _ProtocolError(f"there are more than {_FIELD_LIMIT} fields")
    fields = []
    for line in lines:
        match = _FIELD_LINE.fullmatch(line)
        if not match:
            raise _ProtocolError(f"a field line is malformed: {line[:80]!r}")
        fields.append((match[1].lower(), match[2].strip(" \t")))
    return fields


def _combined(lines: Sequence[tuple[str, str]]) -> dict[str, str]:
    fields: dict[str, str] = {}
    for name, value in lines:
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    return fields


def _framing(fields: Mapping[str, str], is_old: bool) -> tuple[bool, float]:
    """Return whether content is chunked, and its length, infinite if that is not known (RFC 9112, section 6.3)."""
    coding, value = fields.get("transfer-encoding"), fields.get("content-length")
    if coding is not None:
        if is_old or value is not None or coding.lower() != "chunked":
            raise _ProtocolError(f"Transfer-Encoding {coding[:40]!r} cannot be decoded here")
        return True, math.inf
    if value is None:
        return False, math.inf
    length, *others = {length.strip(" \t") for length in value.split(",")}  # repeated, it is valid if it says the same
    if others or not (length.isascii() and length.isdecimal() and len(length) <= 18):
        raise _ProtocolError(f"Content-Length {value[:40]!r} is not a length")
    return False, int(length)


# ---- Both clients ----------------------------------------------------------------------------------------------------


class _ConnectionEnd(Exception):  # noqa: N818 - an end need not be an error
    """Nothing more can be received: the connection was closed, or lost, or could not be made.

    loss: why it was lost; None if it was closed properly.
    """

    def __init__(self, loss: Exception | None) -> None:
        super().__init__(loss)
        self.loss = loss


class _Connection:
    """A connection, and what is said over it. Each client has its own way to wait, in the verbs at the end."""

    call: _Call = None  # type: ignore[assignment]  # whose request is being exchanged; an idle connection has none

    def __init__(self, route: _Route) -> None:
        self.route = route
        self.peer = route.peer
        self.is_reusable = False  # the last exchange left the connection fit for another one
        self.idle_since = 0.0
        self.is_tls = False

    async def open(self, context: ssl.SSLContext | None) -> _Response | None:
        """Go through the proxy and TLS; return the proxy's refusal, if it refuses."""
        prefix = ""
        try:
            if self.route.tunnel is not None:
                refusal = await self._open_tunnel(self.route)
                if refusal is not None:
                    return refusal
            if context is not None:
                prefix = "TLS failed: "
                host, _ = _host_and_port(self.route.tunnel or self.route.next_hop, 443)
                await self.start_tls(context, host.partition("%")[0].rstrip("."))
                self.is_tls = True
        except _ConnectionEnd as end:
            self.call.check(self.peer)
            what = str(end.loss or "") or "the connection was closed"
            what += "; it seems to speak plain HTTP, not TLS" if _speaks_plain_http(end.loss) else ""
            raise BoxerConnectionError(f"{self.peer}: {prefix}{what}", request_sent=False) from end.loss or end
        except _ProtocolError as error:
            raise BoxerConnectionError(f"{self.peer}: {error}", request_sent=False) from error
        return None

    async def _open_tunnel(self, route: _Route) -> _Response | None:
        host, port = _host_and_port(route.tunnel or "", 443)
        authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        fields = {"Host": authority, "User-agent": _USER_AGENT}
        if route.authorization:
            fields["Proxy-authorization"] = route.authorization
        decoder = _Decoder(_ERROR_LIMIT, is_tunnel=True)
        self.send(_encoded_head("CONNECT", authority, fields))
        response = await self._receive_response(decoder)
        if not response.is_success:
            return response
        if decoder.has_rest:
            raise _ProtocolError("the proxy sent data of its own after it had opened the tunnel")
        return None

    async def exchange(self, head: bytes, body: bytes | _Multipart) -> _Response:
        """Send a request until it is sent or answered, and receive its response."""
        call, began, code = self.call, time.monotonic(), "no answer"
        decoder = _Decoder(call.request.content_limit)
        self.sent, self.is_reusable = 0, False
        call.tries += 1
        try:
            if call.request.sink is not None:
                call.request.sink.rewind()
            if isinstance(body, bytes):
                self.send(head + body)
                is_whole = True
            else:
                is_whole = await self._upload(head, body, decoder)
                call.deadline.start_again("complete answer")
            response = await self._receive_response(decoder)
            await self._save(decoder)
            code = str(response.code)
        except _ProtocolError as error:
            raise BoxerConnectionError(f"{self.peer}: {error}", self.sent > 0) from error.__cause__ or error
        finally:
            call.was_sent = call.was_sent or self.sent > 0
            figures = self.sent, decoder.received, time.monotonic() - began, call.tries
            text = "%s: %s; %d bytes sent, %d received in %.3f s; try %d"
            _LOG.debug(text, call.request.name, code, *figures)
        is_whole = is_whole and self.is_all_sent()
        if response.is_success and not is_whole:
            message = f"{self.peer}: it reported success before it had all of the request"
            raise BoxerConnectionError(message, self.sent > 0)
        self.is_reusable = is_whole and response.head.keeps_alive and not (response.is_cut or decoder.has_rest)
        return response

    async def _upload(self, head: bytes, body: _Multipart, decoder: _Decoder) -> bool:
        """Send a request until its answer comes, which may be early; return whether all of it was sent."""
        pieces, deadline = body.pieces(), self.call.deadline
        self.send(head + next(pieces))
        deadline.start_again("progress")
        try:
            while (piece := await self.next_piece(body, pieces)) is not None:
                for at in range(0, len(piece), _SEND_SIZE):
                    self.send(memoryview(piece)[at : at + _SEND_SIZE])
                    while data := await self.drain():
                        decoder.feed(data)
                        if decoder.response is not None:
                            return False
                    deadline.start_again("progress")
        except _ConnectionEnd:  # `receive` will raise it again, after any early answer
            self.call.check(self.peer)
            return False
        self.send(body.end)
        return True

    async def _receive_response(self, decoder: _Decoder) -> _Response:
        call, size, late_end = self.call, 0, math.inf
        try:
            while not decoder.is_complete:
                decoder.feed(await self.receive())
                if call.request.kind == "download" and decoder.size > size and decoder.is_success:
                    size = decoder.size
                    call.deadline.start_again("progress")
                    await self._save(decoder)
                elif call.deadline.left <= 0:  # what has arrived by the deadline counts, but a flood has to end
                    late_end = min(late_end, time.monotonic() + _GRACE_TIME)
                    if time.monotonic() >= late_end:
                        call.check(self.peer)
        except _ConnectionEnd as end:
            call.check(self.peer)
            loss = end.loss
            if self.is_tls and loss is None and decoder.response is not None:
                # asyncio cannot tell whether TLS was closed properly, so neither client counts on it.
                loss = _LostError("the answer has no length, and over TLS its end cannot be told from a cut")
            decoder.end(loss)
        assert decoder.response is not None
        return decoder.response

    async def _save(self, decoder: _Decoder) -> None:
        """Write what has come of a whole file to the request's sink, if it has one: piece by piece, and the rest."""
        sink, response = self.call.request.sink, decoder.response
        if sink is None or response is None or not response.is_whole_file:
            return
        sink.length = response.head.length
        if decoder.is_complete:
            await self.write(sink, response.content)
            response.content = b""
        elif content := decoder.take():
            await self.write(sink, content)
            self.call.deadline.start_again("progress")

    def attach(self, call: _Call) -> None:
        """Serve a call: the connection is aborted when that is cancelled."""
        self.call = call
        call.cancellation.interrupt_by(self.abort)

    # The verbs, which each client implements. Those that wait raise _ConnectionEnd if the connection ends first. If
    # `send` finds the connection lost, the next `drain` or `receive` says so, after returning what had arrived.

    connect: Callable[[Any, float], Awaitable[None]]  # to one of socket.getaddrinfo's addresses, within so many seconds
    start_tls: Callable[[ssl.SSLContext, str], Awaitable[None]]  # with the host of this name
    next_piece: Callable[[_Multipart, Iterator[_Piece]], Awaitable[Optional[_Piece]]]  # read it; None after the last
    write: Callable[[_Sink, bytes], Awaitable[None]]  # to a file
    send: Callable[[_Piece], None]  # begin to send
    drain: Callable[[], Awaitable[bytes]]  # wait until more can be sent, or something has arrived, which is returned
    receive: Callable[[], Awaitable[bytes]]  # wait for something to arrive, and return it
    is_quiet: Callable[[], bool]  # nothing has arrived, and the connection is open, as the socket itself tells
    abort: Callable[[], None]  # end whatever waits on the connection, from another thread or task
    close: Callable[[], None]  # at once; whether it is open or not
    fileno: Callable[[], int]  # the socket's descriptor; -1 if there is none
    is_all_sent: Callable[[], bool]  # the system has taken all that was to be sent
    sent = 0  # bytes of the request that is being exchanged


def _wait_for(descriptor: int, events: str, seconds: float) -> bool:
    """Wait until a socket can be read ("r") or written to ("w"), or has failed; return False if it takes too long."""
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(descriptor, (select.POLLIN if "r" in events else 0) | (select.POLLOUT if "w" in events else 0))
        return bool(poll.poll(1000 * seconds))
    # Windows has no poll(); its select() takes any socket and reports a failed connect in the third list.
    reading, writing = ([descriptor] if event in events else [] for event in "rw")
    return any(select.select(reading, writing, writing, seconds))


def _set_up(sock: socket.socket) -> None:
    """Make a socket non-blocking and prompt; let it notice within a minute that the peer, or a NAT between, is gone."""
    sock.setblocking(False)
    with contextlib.suppress(_ConnectionEnd), _system_errors():  # not OSError: a signal handler may raise one
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _look_up(host: str, port: int, flags: int = 0) -> Iterable[Any]:
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)


@contextlib.contextmanager
def _system_errors() -> Iterator[None]:
    """Turn the failure of a system call into the end of the connection."""
    try:
        yield
    except OSError as error:
        if not _is_system_error(error):
            raise
        # Without its frames, since the connection keeps it, and they would keep what was sent.
        raise _ConnectionEnd(error.with_traceback(None)) from error


def _is_system_error(error: OSError) -> bool:
    """Tell a failed system call from an OSError that code of the caller's raised during one."""
    is_for_certain = isinstance(error, (socket.gaierror, ssl.SSLError))
    return not isinstance(error, BoxerError) and (is_for_certain or _is_ours(error))


def _is_ours(error: BaseException) -> bool:
    """Tell an error of what this client does from one that code of the caller's has raised meanwhile.

    A signal handler, or a file object, leaves a frame of another module in the traceback, be it one of the package that
    holds this one, and even if it is an error of another client, which it uses.
    """
    modules = {str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)}
    others = {name.partition(".")[0] for name in modules - {__name__}}
    waiting = {"asyncio", "concurrent", "gevent", "socket", "ssl", "threading", "urllib", "uvloop", "winloop"}
    return others <= waiting | {"contextlib", "genericpath", "ntpath", "os", "pathlib", "posixpath"}


class _Pool:
    """The connections of a client: at most `size` are in use at a time; further calls wait, first come first served.

    A call has a turn while it is in `_busy`, with or without a connection as yet. `release` gives both back.
    """

    def __init__(self, size: int, context: ssl.SSLContext | None) -> None:
        self.is_closed = False
        self.was_forked = False  # this process is a forked child
        self.calls: set[_Call] = set()  # all that are going on, with a turn or not
        self._size = size
        self._context = context  # None: without TLS
        self._lock = threading.RLock()  # a signal handler may use the client that it interrupts
        self._busy: dict[_Call, _Connection | None] = {}
        self._queue: dict[_Call, Any] = {}  # first come, first served; with the event that ends the wait
        self._idle: collections.deque[_Connection] = collections.deque()  # the one that was used last at the right
        _PROCESS.pools.add(self)

    async def exchange(self, route: _Route, head: bytes, body: bytes | _Multipart, call: _Call) -> _Response:
        """Send a request over an idle connection or a new one, and receive its response."""
        try:
            await self._take_turn(call)
            connection = self._take_idle(route, call)
            if connection is not None:
                try:
                    connection.attach(call)
                    return await connection.exchange(head, body)
                except BoxerConnectionError as error:
                    if not (_is_ours(error) and _is_harmless(call.request, error)):
                        raise
                connection.close()
            connection = await self._connected(route, call)
            return await connection.open(self._context) or await connection.exchange(head, body)
        finally:
            self.release(call)

    async def _take_turn(self, call: _Call) -> None:
        """Give a call a turn: at once, or when `release` of another call hands over its own.

        Time spent waiting does not count against the timeout, unless the call is nested in another one of its thread.
        """
        with self._lock:
            if len(self._busy) < self._size:
                self._busy[call] = None
                return
            event = self._queue[call] = self._new_event()
        call.check(call.request.name)
        since, seconds = time.monotonic(), self._seconds_to_wait(call)
        call.cancellation.interrupt_by(event.set)
        await event.wait(seconds)
        if seconds is None:
            call.deadline.postpone(time.monotonic() - since)
        if call not in self._busy:
            call.check(call.request.name)
            raise AssertionError  # pragma: no cover

    def _take_idle(self, route: _Route, call: _Call) -> _Connection | None:
        """Give a call with a turn an idle connection, if there is one."""
        with self._lock:
            while (idle := self._pop_idle()) is not None:
                if idle.route == route and time.monotonic() < idle.idle_since + _IDLE_LIMIT and idle.is_quiet():
                    self._busy[call] = idle
                    return idle
                idle.close()
        return None

    def _pop_idle(self) -> _Connection | None:
        """Take the connection that was used last, in one step; None: there is none."""
        try:
            return self._idle.pop()
        except IndexError:
            return None

    def release(self, call: _Call) -> None:
        """Take back a call's turn and connection, or its place in the queue. Doing so twice does no harm."""
        with self._lock:
            call.cancellation.interrupt_by(None)
            self._queue.pop(call, None)
            connection = self._busy.pop(call, None)
            try:
                if connection is not None and connection.is_reusable and not self.is_closed:
                    self._keep(connection)
                elif connection is not None:
                    connection.close()
            finally:
                while self._queue and len(self._busy) < self._size:
                    following, event = next(iter(self._queue.items()))
                    self._busy[following] = None
                    event.set()
                    self._queue.pop(following, None)

    def _keep(self, connection: _Connection) -> None:
        """Keep an idle connection, and close the one that has been idle for longest, if that is too long."""
        connection.call = None  # type: ignore[assignment]  # forget what was sent
        connection.idle_since = time.monotonic()
        self._idle.append(connection)
        if self._idle[0].idle_since < connection.idle_since - _IDLE_LIMIT:
            self._idle.popleft().close()

    async def _connected(self, route: _Route, call: _Call) -> _Connection:
        """Return a new connection for a call, to the first address that accepts."""
        last: Exception | None = None
        call.check(route.peer)
        try:
            addresses = list(await self._resolve(route, call))
        except _ConnectionEnd as end:
            addresses, last = [], end.loss
        while addresses:
            call.check(route.peer)
            address = addresses.pop(0)
            connection = self._busy[call] = self._new_connection(route)
            connection.attach(call)
            try:
                await connection.connect(address, min(call.deadline.left, _ADDRESS_TIME if addresses else math.inf))
                call.check(route.peer)  # its timer may have rung while there was nothing to abort
                return connection
            except _ConnectionEnd as end:
                last = end.loss
                connection.close()
        call.check(route.peer)
        message = f"{route.peer}: no connection could be made: {last}"
        raise BoxerConnectionError(message, request_sent=False) from last

    def close_idle(self) -> None:
        while (connection := self._pop_idle()) is not None:
            connection.close()

    def close(self) -> None:
        """Close what is idle, and end the calls that are going on."""
        with self._lock:
            self.is_closed = True
            self.close_idle()
        for call in list(self.calls):
            call.cancellation.cancel("the client was closed")

    def leave_to_parent(self, null: int) -> None:
        """In a forked child, let go of the parent's connections, which the parent keeps using.

        /dev/null takes the place of each socket. Closing one would take it out of the epoll set of an event loop,
        which the child shares with its parent. Idle connections are dropped at their next use, since /dev/null is
        always readable. Of the calls, only the forking thread's continue here, and they fail.
        """
        self.was_forked = True
        self._lock = threading.RLock()  # a thread that is not here may hold the other one
        connections = filter(None, (*self._busy.values(), *self._idle))
        for descriptor in {connection.fileno() for connection in connections} - {-1}:
            os.dup2(null, descriptor, inheritable=False)
        self._parents_calls = self._busy  # kept for good: a connection that is collected would say that it is unclosed
        self._busy = {call: own for call, own in self._busy.items() if call.thread == threading.get_ident()}
        self._queue.clear()
        self.calls = {call for call in self.calls if call.thread == threading.get_ident()}

    # What each client has in its own way.

    _new_event: Callable[[], Any]  # to be set once, and waited for by one call
    _new_connection: Callable[[_Route], _Connection]
    _seconds_to_wait: Callable[[_Call], Optional[float]]  # for a turn; None: for ever, since that does not count
    _resolve: Callable[[_Route, _Call], Awaitable[Iterable[Any]]]  # look up a name
    pause: Callable[[_Call, float], Awaitable[None]]  # before the next try; it ends early if the call is cancelled


def _leave_to_parent() -> None:
    with Path(os.devnull).open("r+b", buffering=0) as null:
        for pool in list(_PROCESS.pools):
            pool.leave_to_parent(null.fileno())


if hasattr(os, "register_at_fork"):  # pragma: no branch - Windows has no forks
    os.register_at_fork(after_in_child=_leave_to_parent)


class _Client:
    """What both clients have: their settings, and the tries of a call."""

    def __init__(
        self,
        base_url: Optional[str] = None,
        timeout: Optional[float] = 120.0,
        *,
        retries: int = 2,
        max_connections: int = 100,
        headers: Optional[Mapping[str, str]] = None,
        ssl_context: Optional[ssl.SSLContext] = None,
    ) -> None:
        if not (ssl_context is None or isinstance(ssl_context, ssl.SSLContext)):
            raise TypeError(f"ssl_context must be an ssl.SSLContext, not {type(ssl_context).__name__}")
        self._settings: dict[str, Any] = {
            # A pickle goes to the same server, whatever the environment is where it is loaded.
            "base_url": os.environ.get("BOXER_URL") if base_url is None else base_url,
            "timeout": _seconds("timeout", timeout),
            "retries": _whole_number("retries", retries),
            "max_connections": _whole_number("max_connections", max_connections, least=1),
            "headers": _checked_fields({} if headers is None else headers),
            "ssl_context": ssl_context,
        }
        self._origin = _origin(base_url, self._settings["headers"])
        self._context = None if self._origin.scheme == "http" else ssl_context or ssl.create_default_context()
        self._pools: dict[Any, Any] = {}  # of the asyncio client, by event loop; here, so that its copies share it
        self._open_content: Callable[..., Any] = _opened  # the command line replaces it, to count what is read
        self._is_closed = False
        self._needs_closing = True
        self._token = os.urandom(8).hex()  # its copies in other processes have the same
        self._original: _Client | None = None  # of a copy: the client whose connections it uses

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._origin.url!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        if self._original is None:
            _PROCESS.originals[self._token] = self
        return _copy, (type(self), self._settings, self._token)

    def __del__(self) -> None:
        if not getattr(self, "_is_closed", True) and self._original is None:
            self._drop_connections()
            if self._needs_closing:
                warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)

    def _check_open(self) -> None:
        if self._is_closed or (self._original is not None and self._original._is_closed):  # noqa: SLF001 - a client
            raise RuntimeError(f"{self!r} is closed")

    def _options(self, timeout: Timeout = _UNSET, retries: int | None = None) -> _Options:
        """Begin a call of a public method. A client that is closed later ends it with BoxerConnectionError."""
        self._check_open()
        seconds = self._settings["timeout"] if isinstance(timeout, _Default) else _seconds("timeout", timeout)
        return _Options(seconds, None if retries is None else _whole_number("retries", retries))

    def _new_call(self, request: _Request, options: _Options) -> _Call:
        deadline = _Deadline(options.seconds + request.extra_time)
        return _Call(request, deadline, options.cancellation or _Cancellation())

    async def _exchange(self, request: _Request, interpret: Callable[[_Response], _T], options: _Options) -> _T:
        """Send a request, again if that is called for, and interpret the last response."""
        retries = options.retries
        if retries is None:
            retries = 0 if request.kind == "run with a network" else self._settings["retries"]
        call, pool = self._new_call(request, options), self._current_pool()
        asked = f"{request.method} {self._origin.url}{request.target}"
        pool.calls.add(call)
        try:
            if self._is_closed or pool.is_closed:  # `close` ends the calls that had begun before
                raise BoxerConnectionError("the client was closed", request_sent=False)
            response = await self._last_response(pool, call, _Tries(call, retries))
            response.asked = asked
            return interpret(response)
        except BoxerError as error:
            if not _is_ours(error):
                raise
            where = [asked] if isinstance(error, BoxerConnectionError) else []
            where += [f"file {request.path!r}"] if request.path else []
            error.args = (f"{error} ({', '.join(where)})" if where else str(error), *error.args[1:])
            raise
        finally:
            pool.calls.discard(call)
            if request.sink is not None:
                request.sink.is_abandoned = True

    async def _last_response(self, pool: _Pool, call: _Call, tries: _Tries) -> _Response:
        """Send a request until it succeeds, or may not be tried again."""
        while True:
            try:
                response = await self._send(pool, call)
                pause = tries.pause_after(response)
                if pause is None:
                    return response
            except BoxerConnectionError as error:
                if not _is_ours(error):
                    raise
                pause = tries.pause_after(error)
                error.request_sent = call.was_sent  # the policy asked about this try; the caller, about all of them
                if pause is None:
                    raise
            await pool.pause(call, pause)
            call.check(call.request.name)

    async def _wait_until_ready(self, timeout: float | None) -> None:
        call, pool, pause = self._new_call(_HEALTH_REQUEST, self._options(timeout)), self._current_pool(), 0.05
        reason: BoxerError | None = None
        pool.calls.add(call)  # so that `close` ends a pause
        try:
            while True:
                try:
                    seconds = max(_TIMER_SLACK, min(call.deadline.left, 5.0))
                    await self._exchange(_HEALTH_REQUEST, _checked, _Options(seconds, retries=0))
                    return
                except (BoxerAPIError, BoxerConnectionError) as error:
                    if not _is_ours(error):
                        raise
                    if reason is None or not isinstance(error, BoxerTimeoutError):  # the last try may have had no time
                        reason = error
                    if call.deadline.left < _SHORTEST_PAUSE:
                        raise BoxerTimeoutError(f"the server was not ready in time: {reason}", 0) from reason
                pause = min(1.5 * pause, 5.0)
                await pool.pause(call, min(pause, call.deadline.left / 2))  # more often towards the end
                if call.cancellation.reason is not None:
                    call.check(call.request.name)
        finally:
            pool.calls.discard(call)

    async def _upload(self, item: _Upload, options: _Options) -> None:
        path, content = item
        with self._open_content(content) as opened:
            await self._exchange(_upload_request(path, opened), _check_uploaded, options)

    async def _upload_all(
        self, uploads: Sequence[_Upload], options: _Options, upload: Callable[[_Upload, _Options], Awaitable[None]]
    ) -> list[str]:
        """Upload files, several at a time, and return their remote paths."""
        if len(uploads) == 1:
            await upload(uploads[0], options)  # one upload is not worth a thread
        elif uploads:
            workers = self._new_workers(
                lambda item, cancellation: upload(item, options._replace(cancellation=cancellation)), _UPLOADS_AT_A_TIME
            )
            if options.cancellation is not None:
                options.cancellation.interrupt_by(workers.cancel)
            async for _ in _each(workers, uploads, is_ordered=False):
                pass
        return [path for path, _ in uploads]

    async def _run(
        self, run: RunRequest, options: _Options, output_dir: _LocalPath | None = None, check: bool = False
    ) -> RunResult:
        """Run a command, with all that goes before and after it."""
        if not isinstance(run, RunRequest):
            raise TypeError(f"a request must be a RunRequest, not {type(run).__name__}")
        if isinstance(run.files, dict) or run.input is not None or run.outputs or output_dir is not None:
            result = await self._run_planned(run, options, output_dir)
        else:
            result = await self._exchange(_run_request(run), _run_result, options)
        return result.check() if check else result

    async def _run_planned(self, run: RunRequest, options: _Options, output_dir: _LocalPath | None) -> RunResult:
        """Upload what a run needs, run it, remove what is left, and fetch its outputs."""
        if output_dir is not None:
            if run.outputs:
                raise BoxerValidationError("outputs and output_dir exclude each other: the latter fetches everything")
            _check_shell_names(run.env)
            output_dir = _local_path("output_dir", output_dir)
            output_dir.mkdir(parents=True, exist_ok=True)
        contents = run.files.values() if isinstance(run.files, dict) else ()
        is_in_memory = all(isinstance(content, _IN_MEMORY) for content in contents)
        make_plan: Callable[[], _Plan] = functools.partial(_Plan, run, run.outputs is True or output_dir is not None)
        plan = make_plan() if is_in_memory else await self._do_blocking(options, make_plan)
        try:
            await self._upload_all(plan.uploads, options, functools.partial(self._upload_planned, plan))
            if plan.failure is not None:
                raise plan.failure  # noqa: TRY301 - the same is to be done after any error
            result = await self._exchange(_run_request(plan.run), _run_result, options)
        except Exception as error:
            is_known = error is plan.failure or _is_ours(error)  # else a signal handler, say, cancels the call
            plan.failure = None  # its frames hold the plan
            if is_known and not _may_be_in_use(error):
                await self._remove(plan, options)
            raise
        if not plan.server_removes:
            await self._remove(plan, options)
        try:
            await self._fetch_outputs(result, plan, output_dir, options)
        except BoxerError as error:
            error.result = result
            raise
        return result

    async def _upload_planned(self, plan: _Plan, item: _Upload, options: _Options) -> None:
        """Upload a file of a run. When one fails, those under way go on, or they might be stored after the removal."""
        if plan.failure is not None:
            return
        plan.begun.append(item[0])
        try:
            await self._upload(item, options)
            plan.uploaded.append(item[0])
        except Exception as error:
            is_known = _is_ours(error) or hasattr(item[1], "read")  # else a signal handler, say, cancels the call
            if _may_be_in_use(error) or not is_known:
                raise
            plan.failure = error

    async def _remove(self, plan: _Plan, options: _Options) -> None:
        """Have the server remove a run's own files. Whatever comes of it, the call's result or error stays."""
        deadline = _Deadline(_REMOVAL_TIME)
        for run in plan.removals():
            left = max(_TIMER_SLACK, deadline.left)
            try:
                await self._exchange(_run_request(run), _run_result, _Options(left, 2, options.cancellation))
            except BoxerError as error:
                if not _is_ours(error):
                    raise
                _LOG.debug("files of a run were left on the server: %s", error)

    async def _fetch_outputs(
        self, result: RunResult, plan: _Plan, output_dir: _LocalPath | None, options: _Options
    ) -> None:
        names, left = plan.outputs, _ANSWER_LIMIT
        if plan.list_name:
            request = _download_request(result.output_path(plan.list_name), limit=_LIST_LIMIT)
            names = await self._exchange(request, _listed_names, options)
        for name in names:
            path = result.output_path(name)
            if output_dir is not None:
                await self._save_output(path, output_dir, name, options)
                continue
            interpret = _file_content if plan.list_name else _file_content_or_none
            content = await self._exchange(_download_request(path, limit=left), interpret, options)
            if content is not None:  # else the program did not write it
                result.outputs[name] = content
                left -= len(content)

    async def _save_output(self, path: str, output_dir: _LocalPath, name: str, options: _Options) -> None:
        try:
            with _written(_output_file(output_dir, name)) as file:
                await self._exchange(_download_request(path, _Sink(file)), _file_content, options)
        except (OSError, UnicodeError) as error:
            if isinstance(error, OSError) and not _is_system_error(error):
                raise
            raise BoxerError(f"the output {name!r} could not be written to {output_dir}: {error}") from error

    async def _download_path(self, path: str, local: Any, options: _Options) -> None:
        is_file = hasattr(local, "write") and not isinstance(local, os.PathLike)
        with contextlib.nullcontext(local) if is_file else _written(_local_target(_path("path", path), local)) as file:
            await self._exchange(_download_request(path, _Sink(file)), _file_content, options)

    def _run_many(
        self, requests: Any, concurrency: int, is_ordered: bool, options: _Options
    ) -> AsyncGenerator[tuple[RunRequest, RunResult | BoxerError], None]:
        async def attempt(request: RunRequest, cancellation: _Cancellation) -> RunResult | BoxerError:
            try:
                return await self._run(request, options._replace(cancellation=cancellation))
            except (BoxerError, OSError) as error:
                no_connection = isinstance(error, BoxerConnectionError) and not error.request_sent
                if no_connection or not _is_ours(error):  # this goes for all that follow, too
                    raise
                if isinstance(error, BoxerError):
                    return error
                failure = BoxerError(str(error))  # a local file cannot be read: that goes for this run alone
                failure.__cause__ = error
                return failure

        workers = self._new_workers(attempt, _whole_number("concurrency", concurrency, least=1))
        return _each(workers, requests, is_ordered)

    # What each client has in its own way.

    _current_pool: Callable[[], _Pool]
    _drop_connections: Callable[[], None]
    _do_blocking: Callable[..., Awaitable[Any]]  # call a function that looks at local files, which takes time
    _new_workers: Callable[[Callable[[Any, _Cancellation], Awaitable[Any]], int], _Workers]
    _send: Callable[[Any, _Call], Awaitable[_Response]]  # over a connection of a pool


def _may_be_in_use(error: Exception) -> bool:
    """Tell whether the server may still be using what was sent, as far as an error tells."""
    return isinstance(error, BoxerConnectionError) or getattr(error, "status_code", None) == 0


def _copy(kind: type[_Client], settings: dict[str, Any], token: str) -> _Client:
    """Unpickle a client. All its copies in a process share its connections, and need no closing."""
    original = _PROCESS.originals.get(token)
    if original is None or original._is_closed:  # noqa: SLF001 - a client of this module
        original = kind(**settings)
        original._token, original._needs_closing = token, False  # noqa: SLF001
        _PROCESS.originals[token] = original
        _PROCESS.loaded.append(original)
    client = object.__new__(kind)
    client.__dict__.update(original.__dict__, _original=original)
    return client


@dataclass(eq=False)
class _Job:
    """A call of many, and what came of it."""

    item: Any = None  # what it is called with
    result: Any = None
    error: BaseException | None = None
    is_done: bool = False

    def take(self, what: Literal["result", "error"]) -> Any:
        """Return what came of it, and forget that: an error keeps frames, and those keep the job."""
        value = getattr(self, what)
        setattr(self, what, None)
        return value


class _Workers:
    """Calls of one function, several at a time: in threads or, in the asyncio client, in tasks."""

    fetch: Callable[[AsyncIterator[Any]], _Job]  # ask for an item, which will be the result
    start: Callable[[Any], _Job]  # call the function with an item
    next_done: Callable[[], Awaitable[_Job]]  # wait for the next one that is done
    cancel: Callable[[], None]  # the calls that are going on
    end: Callable[[], Awaitable[None]]  # cancel them, and wait until they have ended

    passed_on: tuple[type[BaseException], ...] = ()  # the exceptions that end an event loop, too, or come with its end

    def __init__(self, function: Callable[[Any, _Cancellation], Awaitable[Any]], count: int) -> None:
        self.count = count
        self._function = function
        self._active: set[Any] = set()  # what cancels each call that is going on
        self._done: Any = None  # the queue of jobs that are done

    async def _do(self, job: _Job, function: Callable[..., Awaitable[Any]], *args: Any) -> None:
        try:
            job.result = await function(*args)
        except BaseException as error:
            job.error = error
            if isinstance(error, self.passed_on):
                raise
        finally:
            job.is_done = True
            with contextlib.suppress(RuntimeError):  # the event loop is closed
                self._done.put_nowait(job)


async def _each(workers: _Workers, items: Any, is_ordered: bool) -> AsyncGenerator[tuple[Any, Any], None]:
    """Call a function for each item, and yield both the item and the result, in the order of the items or as they come.

    When one call fails, or the iteration does, yield what had finished, end the other calls, and raise the error.
    """
    source = items.__aiter__() if hasattr(items, "__aiter__") else _as_async(items)
    started: dict[_Job, None] = {}  # those whose result was not yielded yet, in their order
    running, fetching, has_more = 0, None, True
    try:
        while has_more or started:
            if has_more and fetching is None and running < workers.count and len(started) < 5 * workers.count:
                fetching = workers.fetch(source)  # a job as any other: its result is the next item
            done = await workers.next_done()
            if done is not fetching:
                running -= 1
            elif done.error is None:
                fetching, running = None, running + 1
                started[workers.start(done.result)] = None
            elif isinstance(done.error, StopAsyncIteration):
                fetching, has_more, done.error = None, False, None  # its traceback would keep requests alive
                continue
            for job in list(started):
                if job.is_done and job.error is None:
                    del started[job]
                    yield job.item, job.take("result")
                elif is_ordered and done.error is None:
                    break
            if done.error is not None:
                raise done.take("error")
    finally:
        await workers.end()


async def _as_async(items: Iterable[_T]) -> AsyncGenerator[_T, None]:
    for item in items:
        yield item


# ---- Sync client -----------------------------------------------------------------------------------------------------


def _run_to_completion(coroutine: Awaitable[_T]) -> _T:
    """Run a coroutine of the blocking client in one step: whatever it awaits blocks, and does not suspend it."""
    try:
        coroutine.__await__().send(None)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]  # what the coroutine returns
    raise AssertionError("a coroutine of the blocking client was suspended")  # pragma: no cover


def _blocking_iterator(results: AsyncGenerator[_T, None]) -> Generator[_T, None, None]:
    try:
        with contextlib.suppress(StopAsyncIteration):
            while True:
                yield _run_to_completion(results.__anext__())
    finally:
        _run_to_completion(results.aclose())


_WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class _SyncConnection(_Connection):
    """A connection over a non-blocking socket, or ssl's socket, which is waited for by poll()."""

    def __init__(self, route: _Route) -> None:
        super().__init__(route)
        self._socket: Any = None
        self._unsent = memoryview(b"")
        self._loss: Exception | None = None  # why nothing can be sent any more

    async def connect(self, address: Any, seconds: float) -> None:
        family, kind, protocol, _, socket_address = address
        with _system_errors():
            sock = self._socket = socket.socket(family, kind, protocol)
            _set_up(sock)
        code = sock.connect_ex(socket_address)
        if code in (0, errno.EINPROGRESS, errno.EWOULDBLOCK):
            is_done = self._loss is None and _wait_for(sock.fileno(), "w", max(0.001, seconds))
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if is_done else errno.ETIMEDOUT
        if code or self._loss is not None:
            text = getattr(socket, "errorTab", {}).get(code) or os.strerror(code)  # Windows has a table of its own
            raise _ConnectionEnd(self._loss or OSError(code, text))

    async def start_tls(self, context: ssl.SSLContext, host: str) -> None:
        with _system_errors():
            tls = self._socket = context.wrap_socket(
                self._socket, server_hostname=host, do_handshake_on_connect=False, suppress_ragged_eofs=False
            )
            if self._loss is not None:  # `abort` came while there was no socket to shut down
                raise _ConnectionEnd(self._loss)
            while True:
                try:
                    return tls.do_handshake()
                except ssl.SSLWantReadError:
                    self._wait("r")
                except ssl.SSLWantWriteError:
                    self._wait("w")

    async def next_piece(self, body: _Multipart, pieces: Iterator[_Piece]) -> _Piece | None:
        return next(pieces, None)

    async def write(self, sink: _Sink, content: bytes) -> None:
        sink.write(content)

    def is_all_sent(self) -> bool:
        return not self._unsent

    def send(self, data: _Piece) -> None:
        self._unsent = memoryview(b"".join((self._unsent, data)) if self._unsent else data)  # a head may be unsent yet
        self._send_unsent()

    def _send_unsent(self) -> str:
        """Send as much as the system takes; return what `_wait` must wait for, besides "r", before more can be sent."""
        try:
            while self._unsent and self._loss is None:
                # A call that sends several TLS records tells nothing of those before one that fails.
                sent = self._socket.send(self._unsent[:_TLS_RECORD_SIZE] if self.is_tls else self._unsent)
                self.sent += sent
                self._unsent = self._unsent[sent:] if sent < len(self._unsent) else memoryview(b"")
        except OSError as error:
            if not _is_system_error(error):
                raise
            if isinstance(error, _WOULD_BLOCK):
                return "" if isinstance(error, ssl.SSLWantReadError) else "w"  # "": TLS must receive before it can send
            self._loss = self._loss or error.with_traceback(None)
        return ""

    async def drain(self) -> bytes:
        while True:
            events = self._send_unsent()
            data = self._received()
            if data or not self._unsent:
                return data
            self._wait("r" + events)

    async def receive(self) -> bytes:
        while True:
            events = self._send_unsent()
            if self._loss is None:
                self._wait("r" + events)
            if data := self._received():
                return data

    def _received(self) -> bytes:
        """Return what has arrived, b"" if nothing has."""
        try:
            data: bytes = self._socket.recv(_RECEIVE_SIZE)
        except OSError as error:
            if not _is_system_error(error):
                raise
            if isinstance(error, _WOULD_BLOCK) and self._loss is None:
                return b""
            # If it was lost before, nothing more arrives than has.
            self._loss = self._loss or error.with_traceback(None)
            raise _ConnectionEnd(self._loss) from error
        if not data:
            raise _ConnectionEnd(self._loss)
        return data

    def _wait(self, events: str) -> None:
        """Wait for the socket, until the deadline."""
        while not _wait_for(self.fileno(), events, max(0.0, self.call.deadline.left)):
            self.call.check(self.peer)

    def is_quiet(self) -> bool:
        return not _wait_for(self.fileno(), "r", 0)

    def close(self) -> None:
        try:
            self.abort()
        finally:
            if self._socket is not None:
                self._socket.close()

    def abort(self) -> None:
        self._loss = self._loss or ConnectionAbortedError("broken off by this client")
        if self._socket is not None:
            with contextlib.suppress(_ConnectionEnd), _system_errors():  # the connection may be closed already
                # SSLSocket's own shutdown would forget its TLS, which another thread may be using.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def fileno(self) -> int:
        return -1 if self._socket is None else self._socket.fileno()


class _SyncEvent:
    """An event that is set once. Unlike threading.Event, it can be set by a signal handler within its own wait."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[None] = queue.SimpleQueue()

    def set(self) -> None:
        self._queue.put(None)

    async def wait(self, seconds: float | None) -> None:
        with contextlib.suppress(queue.Empty):
            self._queue.get(timeout=seconds)


class _SyncPool(_Pool):
    """The connections of a BoxerClient."""

    _new_event = _SyncEvent
    _new_connection = _SyncConnection

    def _seconds_to_wait(self, call: _Call) -> float | None:
        """Let the wait count if the call was made within another one of its thread, which it keeps from going on."""
        outer = [other for other in list(self.calls) if other.thread == call.thread and other is not call]
        if sum(other in self._busy for other in outer) == self._size:
            what = "calls of this same thread hold every connection, so that this one would wait for ever"
            raise BoxerConnectionError(f"{call.request.name}: {what}", request_sent=False)
        return max(0.0, call.deadline.left) if outer else None

    async def pause(self, call: _Call, seconds: float) -> None:
        event = _SyncEvent()
        call.cancellation.interrupt_by(event.set)
        await event.wait(seconds)

    async def _resolve(self, route: _Route, call: _Call) -> Iterable[Any]:
        with _system_errors():
            return _look_up(*route.address)


_STOPPED = "stopped, because another call failed or the caller gave up"


class _SyncWorkers(_Workers):
    """Calls in threads, which have the context variables of the thread that starts them.

    Between the threads there are only queues of the `queue.SimpleQueue` kind. The locks of `concurrent.futures` are
    written in Python: an interrupt at the wrong moment leaves one taken, and the call would never end.
    """

    def __init__(self, function: Callable[[Any, _Cancellation], Awaitable[Any]], count: int) -> None:
        super().__init__(function, count)
        self._threads: list[threading.Thread] = []
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()  # with what each needs; None: there will be no more
        self._done = queue.SimpleQueue()
        self._is_cancelled = False

    def start(self, item: Any) -> _Job:
        job, cancellation = _Job(item), _Cancellation()
        self._active.add(cancellation)
        if self._is_cancelled:
            cancellation.cancel(_STOPPED)
        if threading.main_thread().is_alive():
            if len(self._threads) < min(self.count, len(self._active)):
                # A daemon, so that an iteration that is never ended does not keep the interpreter from its exit.
                self._threads.append(threading.Thread(target=self._work, daemon=True))
                self._threads[-1].start()
            self._jobs.put((contextvars.copy_context(), job, cancellation))
        else:  # no thread can start at the exit of the interpreter
            self._call(job, cancellation)  # pragma: no cover - coverage is not measured any more by then
        return job

    def _work(self) -> None:
        while (given := self._jobs.get()) is not None:
            context, job, cancellation = given
            context.run(self._call, job, cancellation)
            del given, context, job, cancellation  # while it waits, it keeps nothing of the caller's
        self._jobs.put(None)  # for the next thread

    def _call(self, job: _Job, cancellation: _Cancellation) -> None:
        _run_to_completion(self._do(job, self._function, job.item, cancellation))
        self._active.discard(cancellation)

    def fetch(self, source: AsyncIterator[Any]) -> _Job:
        job = _Job()
        _run_to_completion(self._do(job, source.__anext__))
        if not isinstance(job.error, (Exception, type(None))):
            raise job.error  # an interrupt of this thread
        return job

    async def next_done(self) -> Any:
        return self._done.get()

    def cancel(self) -> None:
        self._is_cancelled = True
        for cancellation in list(self._active):
            cancellation.cancel(_STOPPED)

    async def end(self) -> None:
        self.cancel()
        self._jobs.put(None)
        for thread in self._threads:
            if thread.is_alive():  # an interrupt may have kept one from its start
                thread.join()


class _OpenerRequest(urllib.request.Request):
    """A request of a call, as the handlers of an opener know requests."""

    def __init__(self, origin: _Origin, call: _Call) -> None:
        request = call.request
        super().__init__(origin.url + request.target, method=request.method)
        self.host = origin.authority  # again, since urllib decodes it, and with it the zone of an IPv6 address
        self.data: Any = request.body if request.method == "POST" else None
        self.headers = {**origin.fields, **request.headers}
        if origin.proxy is not None:
            self.set_proxy(origin.proxy, "http")
        self.call = call


class _ConnectionHandler(urllib.request.BaseHandler):
    """The handler of an opener that sends requests over a client's connections."""

    handler_order = 1000  # behind handlers that a user adds, any of which may answer in its place

    def __init__(self, pool: _SyncPool, origin: _Origin) -> None:
        self._pool = pool
        self._origin = origin

    def http_open(self, request: _OpenerRequest) -> _Response:
        """Send a request as other handlers have left it."""
        if not isinstance(request, _OpenerRequest):
            raise TypeError("a handler may change or answer a request, but must not send one of its own")
        if request.type != self._origin.scheme:
            raise BoxerValidationError("a handler has changed the scheme of a request")
        fields = {**request.headers, **request.unredirected_hdrs}
        if not all(map(str.isprintable, (request.selector, *fields, *fields.values()))):
            raise BoxerValidationError("a part of the request's head has a control character in it")
        tunnel = request._tunnel_host  # type: ignore[attr-defined]  # noqa: SLF001 - set_proxy() sets it
        authorization = fields.pop("Proxy-authorization", None) if tunnel else None  # the origin must not see it
        route = _Route(request.type, request.host, tunnel, authorization, self._origin.authority)
        body = b"" if request.data is None else request.data
        if isinstance(body, bytes) and body:  # urllib drops the length when a handler sets other content
            fields.setdefault("Content-length", str(len(body)))
        head = _encoded_head(request.get_method(), request.selector, fields)
        try:
            return _run_to_completion(self._pool.exchange(route, head, body, request.call))
        except BoxerError as error:
            request.call.failure = error if _is_ours(error) else None
            raise

    https_open = http_open

    def http_response(self, request: urllib.request.Request, response: Any) -> Any:
        """Offer an error to the handlers that a user has added, such as one that answers a 401."""
        if 200 <= response.code < 300:
            return response
        try:
            reason = getattr(response, "msg", "")
            return self.parent.error("http", request, response, response.code, reason, response.info())
        except (IndexError, ValueError) as error:
            if not _is_ours(error):
                raise
            return response  # urllib's own handlers raise these for a challenge that they cannot read

    https_response = http_response

    def http_error_default(self, _request: Any, response: Any, *_: Any) -> Any:
        return response


class BoxerClient(_Client):
    """A client of a Boxer server that blocks. Any number of threads may share it; use it with `with`, or close it.

    base_url: of the server, as http:// or https://. It may have credentials (sent as `Authorization: Basic`), a path
        prefix, an IPv6 address. Default: $BOXER_URL, then http://localhost:8080.
    timeout: seconds to wait for an answer as a whole; a run's `wall_clock_secs` is added. For the content of a file,
        up or down, it bounds the time without progress instead. None waits for ever.
    retries: how often to try again after the server has said that a request is over or never began (429, 503, its own
        500), or could not be reached. 0 also turns off what makes up for the server's race between short runs.
    max_connections: how many there may be at once; further calls wait, which does not count against their timeout.
    headers: header fields to add to each request.
    ssl_context: for https, in place of the default one: with a private CA, say, or a client certificate.
    handlers: urllib.request handlers to add to the opener that sends each request: for digest authentication, say.

    The proxy for the server, if any, is what the environment names (http_proxy, https_proxy, no_proxy).

    BoxerValidationError is raised before anything is sent, BoxerConnectionError if no complete answer came,
    BoxerTimeoutError when time is up, and BoxerAPIError if the server refused. Each call may pass its own `timeout`
    and `retries`; `health` is not tried again unless asked to be.
    """

    def __init__(
        self,
        base_url: Optional[str] = None,
        timeout: Optional[float] = 120.0,
        *,
        retries: int = 2,
        max_connections: int = 100,
        headers: Optional[Mapping[str, str]] = None,
        ssl_context: Optional[ssl.SSLContext] = None,
        handlers: Iterable[urllib.request.BaseHandler] = (),
    ) -> None:
        handlers = tuple(handlers)
        if not all(hasattr(handler, "add_parent") for handler in handlers):
            raise TypeError("each of handlers must be a urllib.request.BaseHandler")
        if any(hasattr(handler, "redirect_request") for handler in handlers):
            raise BoxerValidationError("redirects are not followed: leave out the HTTPRedirectHandler")
        super().__init__(
            base_url,
            timeout,
            retries=retries,
            max_connections=max_connections,
            headers=headers,
            ssl_context=ssl_context,
        )
        self._settings["handlers"] = handlers
        pool = self._pool = _SyncPool(self._settings["max_connections"], self._context)
        self._opener = urllib.request.OpenerDirector()
        for handler in (_ConnectionHandler(pool, self._origin), *map(copy.copy, handlers)):
            self._opener.add_handler(handler)  # a handler belongs to one opener, hence the copies

    def __enter__(self) -> BoxerClient:
        self._check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections; calls that are going on in other threads end with BoxerConnectionError."""
        self._is_closed = True
        if self._original is None:
            self._drop_connections()
        else:
            self._pool.close_idle()

    def health(self, *, timeout: Timeout = _UNSET, retries: int = 0) -> bool:
        """Return True if the server says that it is well, False if it answers anything else."""
        return _run_to_completion(self._exchange(_HEALTH_REQUEST, _is_success, self._options(timeout, retries)))

    def wait_until_ready(self, timeout: Optional[float] = 60.0) -> None:
        """Ask for the server's health, with growing pauses, until it is well.

        Raises BoxerTimeoutError with the last reason after `timeout` seconds; None waits for ever.
        """
        _run_to_completion(self._wait_until_ready(timeout))

    def run(
        self,
        image: str,
        cmd: Sequence[str],
        *,
        env: Optional[Environment] = None,
        cwd: Optional[str] = None,
        limits: Optional[Limits] = None,
        files: Optional[Files] = None,
        persist: bool = False,
        network: Optional[Network] = None,
        input: Union[str, bytes, None] = None,  # noqa: A002 - as subprocess.run names it
        outputs: Union[bool, Sequence[str]] = (),
        output_dir: Union[str, os.PathLike[str], None] = None,
        tag: Any = None,
        check: bool = False,
        timeout: Timeout = _UNSET,
        retries: Optional[int] = None,
    ) -> RunResult:
        """Run a command in a new sandbox and return what came of it.

        image: a container image, such as "python:3.12-slim". It is pulled first if need be, outside of all limits.
        cmd: the program and its arguments.
        env: environment variables, as a mapping or a list of `NAME=value`.
        cwd: the working directory, made if it does not exist; a relative one is below the default. Default: /.
        limits: ResourceLimits, or a mapping with the same keys.
        files: paths of uploaded files or folders, which the sandbox has read-only at /<path>; or a mapping from names
            to content (bytes, text, a path of a local file or folder, a binary file). That is uploaded first, into a
            read-only folder of this run's own, which is the working directory unless `cwd` is given, and removed after.
        persist: keep `files` and what was written to /output; otherwise both are deleted when the run ends by itself.
        network: "none" (the default), "sandbox" or "host". With a network a run is sent only once, unless `retries`
            is given here, since it may have been seen from outside.
        input: the program's standard input. It needs /bin/sh in the image, as all outputs do.
        outputs: names of files below /output, returned in `result.outputs`, at most 256 MiB in all; those that the
            program did not write are left out. True: everything there, at most 10,000 files. They stay on the server.
        output_dir: a local folder, to be made if need be, for everything from /output, whatever its size.
        tag: not sent; a RunRequest has it, and `run(**vars(request))` does what `send(request)` does.
        check: raise BoxerExitError if the exit code is not 0.

        Raises BoxerTimeoutError with status_code 408 when `wall_clock_secs` is over, and BoxerOutputLimitError when
        stdout or stderr is too long. Closing the connection, as an interrupt does, makes the server kill the run. Where
        the run has ended but its outputs cannot be had, the BoxerError has it as `result`.
        """
        request = RunRequest(image, cmd, env, cwd, limits, files, persist, network, input, outputs, tag)
        return _run_to_completion(self._run(request, self._options(timeout, retries), output_dir, check))

    def send(
        self, request: RunRequest, *, check: bool = False, timeout: Timeout = _UNSET, retries: Optional[int] = None
    ) -> RunResult:
        """Run what a RunRequest asks for, and return what came of it, as `run` does.

        A client, its requests, results and errors can be pickled, so `executor.map(client.send, requests)` works with
        processes on this machine and others.
        """
        return _run_to_completion(self._run(request, self._options(timeout, retries), check=check))

    def run_many(
        self,
        requests: Iterable[RunRequest],
        *,
        concurrency: int = 8,
        ordered: bool = True,
        timeout: Timeout = _UNSET,
        retries: Optional[int] = None,
    ) -> Generator[tuple[RunRequest, Union[RunResult, BoxerError]], None, None]:
        """Run many requests, `concurrency` at a time, and yield each with what came of it: a RunResult or a BoxerError.

        requests: any iterable; it is asked for the next request, in this thread, when there is room for it.
        ordered: yield in the order of the requests; at most 4 * `concurrency` results wait for one before them. False:
            yield as they end.

        Leaving the loop ends the runs that are going on. When no connection can be made any more, it yields what had
        finished, and raises BoxerConnectionError. What `requests` raises is raised, too. A local file that cannot be
        read is a BoxerError of its run, with the OSError as `__cause__`.
        """
        results = self._run_many(_as_async(iter(requests)), concurrency, ordered, self._options(timeout, retries))
        return _blocking_iterator(results)

    def upload_file(
        self, remote_path: str, content: Content, *, timeout: Timeout = _UNSET, retries: Optional[int] = None
    ) -> None:
        """Upload content into the server's store.

        remote_path: below the store, with `/` between folders, which are made; what is there is replaced.
        content: bytes, text (sent as UTF-8), or a binary file, streamed from its start if it can be rewound. The path
            of a local file is text, too, and would be sent as such: `upload_path` sends the file.

        Raises TypeError for a file in text mode, BoxerError if a file changes its size while it is sent.
        """
        request = _upload_request(remote_path, content)
        _run_to_completion(self._exchange(request, _check_uploaded, self._options(timeout, retries)))

    def upload_path(
        self,
        local_path: Union[str, os.PathLike[str]],
        remote_path: Optional[str] = None,
        *,
        exclude: Iterable[str] = (),
        timeout: Timeout = _UNSET,
        retries: Optional[int] = None,
    ) -> list[str]:
        """Upload a file, or a folder with everything in it, and return the remote paths in sorted order.

        remote_path: of the file, or of the folder. Default: the name of either.
        exclude: patterns of what to leave out of a folder, each for a name or for a path below the folder, such as
            ".git", "*.pyc" or "data/*.csv".

        Raises BoxerValidationError, before anything is sent, for what is neither file nor folder, and for a link that
        leaves the folder, leads nowhere, or leads to a folder. Several files are sent at a time; each has a
        deadline of its own.
        """
        options = self._options(timeout, retries)
        uploads = _local_files(local_path, remote_path, exclude)
        return _run_to_completion(self._upload_all(uploads, options, self._upload))

    def download_file(self, path: str, *, timeout: Timeout = _UNSET, retries: Optional[int] = None) -> bytes:
        """Return the content of a file in the server's store, for instance of `result.output_path("a.json")`."""
        return _run_to_completion(
            self._exchange(_download_request(path), _file_content, self._options(timeout, retries))
        )

    def download_path(
        self,
        path: str,
        local_path: Union[str, os.PathLike[str], IO[bytes]],
        *,
        timeout: Timeout = _UNSET,
        retries: Optional[int] = None,
    ) -> None:
        """Download a file from the server's store to a local path, into a local folder, or into a binary file.

        It is streamed, whatever its size. One that fails leaves a path as it was; a folder is not written over.
        """
        _run_to_completion(self._download_path(path, local_path, self._options(timeout, retries)))

    async def _do_blocking(self, _: _Options, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    _new_workers = _SyncWorkers

    def _drop_connections(self) -> None:
        self._pool.close()

    def _current_pool(self) -> Any:
        return self._pool

    async def _send(self, _pool: Any, call: _Call) -> _Response:
        """Send a request through the opener; its handlers may change it, or answer it themselves."""
        try:
            response = self._opener.open(_OpenerRequest(self._origin, call), timeout=call.deadline.left)
        except urllib.error.HTTPError as error:  # raised by a handler that the user has added; it is a response
            response = error
        except urllib.error.URLError as error:
            raise BoxerConnectionError(f"{self._origin.authority}: {error.reason}") from error
        except BoxerError as error:
            is_ours, call.failure = error is call.failure, None
            if is_ours:  # forget the frames of what wraps the opener, which `_is_ours` would take for a user's
                error.with_traceback(None)
            raise error  # noqa: TRY201 - a bare `raise` brings the frames back before Python 3.11
        if isinstance(response, _Response):
            return response
        adopted, sink = _from_urllib(response, self._origin.authority), call.request.sink
        if sink is not None and adopted.is_whole_file:
            sink.rewind()
            sink.write(adopted.content)
        return adopted


def _from_urllib(response: Any, authority: str) -> _Response:
    """Return a response of one of urllib's own classes as one of ours."""
    lines = [(name.lower(), value) for name, value in response.headers.items()]
    reason = getattr(response, "reason", None) or getattr(response, "msg", "")
    content = b""
    try:
        if getattr(response, "fp", None) is not None:
            with response:
                content = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise BoxerConnectionError(f"{authority}: {error}") from error
    return _Response(_Head(response.code, str(reason or ""), lines, _combined(lines)), content)


# ---- Async client ----------------------------------------------------------------------------------------------------


class _Protocol(asyncio.StreamReaderProtocol):
    """A stream's protocol that keeps what arrived before the connection was lost, and wakes a waiting task.

    asyncio's own hides what has arrived as soon as the connection is lost.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.reader = asyncio.StreamReader(_PIECE_SIZE, loop)
        super().__init__(self.reader, loop=loop)
        self.sock: socket.socket | None = None  # of a TCP connection, as soon as there is one
        self.transport: Any = None  # an asyncio.Transport, once connected
        self.writer: asyncio.StreamWriter  # over it; if that is collected, it closes the connection
        self.unread = 0  # bytes that came from the transport, and were not read yet
        self.has_ended = False
        self.loss: Exception | None = None
        self.can_take_more = True
        self.change = asyncio.Event()  # something arrives, the connection ends, or the transport can take more

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        if self.sock is not None:  # over TCP, so that `can_take_more` means: the system has taken everything
            self.transport.set_write_buffer_limits(0)
        self.writer = asyncio.StreamWriter(self.transport, self, self.reader, asyncio.get_running_loop())
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        self.unread += len(data)
        super().data_received(data)
        self.change.set()

    def eof_received(self) -> bool | None:
        self.has_ended = True
        self.change.set()
        return super().eof_received() and self.transport is not None  # before it is made, TLS takes no True

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            self._receive_rest()
        self.has_ended, self.loss = True, self.loss or exc
        super().connection_lost(None)
        self.change.set()

    def _receive_rest(self) -> None:
        """Read the rest from the socket: a write failed before the transport had. Over TLS this is impossible."""
        if self.sock is None:
            return
        with contextlib.suppress(OSError):
            while self.unread < _HEAD_LIMIT + _ERROR_LIMIT and (data := self.sock.recv(_RECEIVE_SIZE)):
                self.unread += len(data)  # pragma: no cover - it takes an answer between a look and a write
                self.reader.feed_data(data)  # pragma: no cover

    def pause_writing(self) -> None:
        self.can_take_more = False
        super().pause_writing()

    def resume_writing(self) -> None:
        self.can_take_more = True
        super().resume_writing()
        self.change.set()


class _AsyncConnection(_Connection):
    """A connection over asyncio's streams."""

    def __init__(self, route: _Route) -> None:
        super().__init__(route)
        self._loop = asyncio.get_running_loop()
        self._tcp = self._protocol = _Protocol(self._loop)  # of TCP, and of TLS over it, if there is any
        self._is_closed = False
        self._send_failed = False  # some of the request could not be sent
        self._timer: asyncio.TimerHandle | None = None  # rings at the call's deadline

    async def connect(self, address: Any, seconds: float) -> None:
        family, kind, protocol, _, socket_address = address
        is_connected = False

        async def connect() -> None:
            nonlocal is_connected
            sock = self._tcp.sock = socket.socket(family, kind, protocol)
            try:
                _set_up(sock)
                await self._loop.sock_connect(sock, socket_address)
            except BaseException:
                sock.close()
                raise
            is_connected = True
            await self._loop.create_connection(lambda: self._tcp, sock=sock)
            if self._is_closed:
                self.close()

        def end(task: Any) -> None:
            # The last step takes no time, and uvloop before 0.23 closes the descriptor twice if that is cancelled.
            if not is_connected:
                task.cancel()

        with _system_errors():
            await _within(seconds, connect, self.call, end)

    async def start_tls(self, context: ssl.SSLContext, host: str) -> None:
        if context.protocol == ssl.PROTOCOL_TLS_SERVER:
            raise _ConnectionEnd(ssl.SSLError(1, "ssl_context is one for servers"))
        tcp, protocol = self._tcp.transport, _Protocol(self._loop)

        async def start() -> None:
            # Looked at in the same turn of the loop as TLS is begun, which never hears of an end that came before it.
            if self._tcp.unread:
                raise ssl.SSLError(1, "the server did not wait for TLS to begin")
            if self._tcp.has_ended or tcp.is_closing():
                raise self._tcp.loss or ConnectionAbortedError("the connection was closed")
            transport = await self._loop.start_tls(
                tcp, protocol, context, server_hostname=host, ssl_handshake_timeout=_LONGEST_WAIT
            )
            # asyncio itself does not call the new protocol's connection_made.
            if transport is not None:  # it may be None before Python 3.11, if the connection was aborted meanwhile
                protocol.connection_made(transport)
                self._protocol = protocol
            if transport is None or self._tcp.loss is not None:
                raise ConnectionAbortedError("the connection was closed")

        with _system_errors():
            # A cancelled start could lose a transport that has just been made, so what ends it is the end of TCP.
            await _within(self.call.deadline.left, start, self.call, lambda _: tcp.abort())

    async def next_piece(self, body: _Multipart, pieces: Iterator[_Piece]) -> _Piece | None:
        piece: _Piece | None
        if body.is_in_memory:
            await asyncio.sleep(0)  # let other tasks run
            piece = next(pieces, None)
        else:
            piece = await _in_thread(self.call, self.peer, next, pieces, None)
        if not self.is_quiet():  # let the loop receive an early answer: a write that fails would lose it
            await asyncio.sleep(0)  # the loop looks for what has arrived
            await asyncio.sleep(0)  # and hands it to the protocol
        return piece

    async def write(self, sink: _Sink, content: bytes) -> None:
        await _in_thread(self.call, self.peer, sink.write, content)

    def send(self, data: _Piece) -> None:
        if not self._send_failed and not self._tcp.transport.is_closing():
            self._protocol.writer.write(data)
        if self._tcp.transport.is_closing() or (self.is_tls and self._protocol.has_ended):
            self._send_failed = True
        else:
            self.sent += len(data)

    def is_all_sent(self) -> bool:
        if self._send_failed or not self._protocol.can_take_more:
            return False
        transports = (self._tcp.transport, self._protocol.transport)  # closed TLS cannot be asked before Python 3.11
        return self._tcp.transport.is_closing() or not any(each.get_write_buffer_size() for each in transports)

    async def drain(self) -> bytes:
        while not self._protocol.can_take_more and not self._has_arrived:
            self._protocol.change.clear()
            await self._protocol.change.wait()
        return await self.receive() if self._has_arrived else b""

    async def receive(self) -> bytes:
        data = await self._protocol.reader.read(_PIECE_SIZE)
        if not data:
            raise _ConnectionEnd(self._protocol.loss)
        self._protocol.unread -= len(data)
        return data

    @property
    def _has_arrived(self) -> bool:
        """Something can be received, or the end of the connection."""
        return self._protocol.unread > 0 or self._protocol.has_ended

    def is_quiet(self) -> bool:
        # The loop may have been too busy to look.
        return not self._has_arrived and self.fileno() >= 0 and not _wait_for(self.fileno(), "r", 0)

    def attach(self, call: _Call) -> None:
        super().attach(call)
        self._send_failed = False
        left = max(0.0, call.deadline.left)
        # A timer of an earlier call is kept if it rings early enough: `_ring` then sees the new deadline.
        if self._timer is None or self._timer.when() > self._loop.time() + left:
            self._stop_timer()
            self._timer = self._loop.call_later(left, self._ring)

    def _ring(self, turns: int = _LATE_TURNS) -> None:
        """Abort the connection at the deadline, but not before a busy loop has handled what had happened by then."""
        self._timer = None
        if self.call is not None:  # else the connection is idle
            left = self.call.deadline.left
            if left > 0 or not self.is_quiet():
                self._timer = self._loop.call_later(max(0.0, left), self._ring)
            elif turns:
                self._timer = self._loop.call_later(0, self._ring, turns - 1)
            else:
                self.abort()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def close(self) -> None:
        self._is_closed = True
        self._stop_timer()
        for protocol in (self._protocol, self._tcp):
            if protocol.transport is not None:
                with contextlib.suppress(RuntimeError):  # the loop may be closed
                    protocol.transport.abort()
        if self._tcp.sock is not None:  # the loop closes it later, or not at all
            if hasattr(os, "fork"):  # pragma: no branch - a child may have it by then
                with contextlib.suppress(OSError):
                    self._tcp.sock.shutdown(socket.SHUT_RDWR)
            if self._loop.is_closed():
                self._tcp.sock.close()

    def abort(self) -> None:
        self._protocol.loss = self._protocol.loss or ConnectionAbortedError("broken off by this client")
        self.close()

    def fileno(self) -> int:
        if self._tcp.sock is None or (self._tcp.transport is not None and self._tcp.transport.is_closing()):
            return -1
        return self._tcp.sock.fileno()


async def _within(
    seconds: float,
    function: Callable[[], Awaitable[_T]],
    call: _Call,
    end: Callable[[Any], Any] = operator.methodcaller("cancel"),
) -> _T:
    """Do what asyncio.wait_for does, which can lose a cancellation before Python 3.12; let the call be cancelled, too.

    Raises _ConnectionEnd if it takes too long or is cancelled. `end` ends the task; by default it cancels.
    """
    task = asyncio.ensure_future(_outcome(function))

    def interrupt() -> None:
        if not task.done() and not task.get_loop().is_closed():
            end(task)

    earlier = call.cancellation.interrupt_by(interrupt)
    try:
        done, _ = await asyncio.wait((task,), timeout=max(0.0, seconds))
    except BaseException as error:
        interrupt()
        if not isinstance(error, GeneratorExit):  # with that, nobody waits for the call any more, so it cannot wait
            await asyncio.wait((task,))
        raise
    finally:
        call.cancellation.interrupt_by(earlier)
    if not done:
        interrupt()
        await asyncio.wait((task,))
    if not done or call.cancellation.reason is not None:
        raise _ConnectionEnd(TimeoutError("timed out"))
    return _result_of(task.result())


async def _outcome(function: Callable[[], Awaitable[_T]]) -> tuple[Optional[_T], Optional[Exception]]:
    """Return what a coroutine function returns, and what it raises.

    An error that left the task itself would pass through the code that a program's own task factory may have put
    around it, and `_is_ours` would take it for the program's.
    """
    try:
        return await function(), None
    except Exception as error:  # noqa: BLE001 - `_result_of` raises it
        return None, error


def _result_of(outcome: tuple[Optional[_T], Optional[Exception]]) -> _T:
    result, failure = outcome
    if failure is not None:
        raise failure
    return cast("_T", result)


async def _in_thread(call: _Call, peer: str, function: Callable[..., _T], *args: Any) -> _T:
    """Call a function that blocks: in a thread, but right here at the exit of the interpreter, when none can start."""

    async def do() -> _T:  # a coroutine turns StopIteration, which no future can hold, into RuntimeError
        return function(*args)

    def do_all() -> tuple[Optional[_T], Optional[Exception]]:
        return _run_to_completion(_outcome(do))  # no error leaves the thread itself, as none leaves a task

    if not threading.main_thread().is_alive():
        return await do()  # pragma: no cover - coverage is not measured any more by then
    try:
        outcome = await _within(call.deadline.left, lambda: asyncio.to_thread(do_all), call)
    except _ConnectionEnd as end:
        call.check(peer)
        raise BoxerConnectionError(f"{peer}: {end.loss}") from end  # pragma: no cover - nothing else ends it
    return _result_of(outcome)


class _AsyncEvent:
    """An event that is set once, perhaps when its loop has been closed and nobody waits any more."""

    def __init__(self) -> None:
        self._future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def set(self) -> None:
        if not self._future.done():
            with contextlib.suppress(RuntimeError):
                self._future.set_result(None)

    async def wait(self, _: None) -> None:
        await self._future


class _AsyncPool(_Pool):
    """The connections of an AsyncBoxerClient within one event loop."""

    def __init__(self, size: int, context: ssl.SSLContext | None, origin: _Origin) -> None:
        super().__init__(size, context)
        tunnel = origin.authority if origin.proxy and origin.scheme == "https" else None
        self.fields = dict(origin.fields)
        authorization = self.fields.pop("Proxy-authorization", None) if tunnel else None  # the origin must not see it
        self.route = _Route(origin.scheme, origin.proxy or origin.authority, tunnel, authorization, origin.authority)
        # A proxy is asked for a whole URL (RFC 9112, section 3.2.2), unless it has opened a tunnel.
        self.prefix = origin.url if origin.proxy and not tunnel else origin.path
        self.loop = asyncio.get_running_loop()
        self._end_of_loop = self._close_with_loop()

    _new_event = _AsyncEvent
    _new_connection = _AsyncConnection

    def _seconds_to_wait(self, call: _Call) -> None:
        return None

    async def pause(self, call: _Call, seconds: float) -> None:
        with contextlib.suppress(_ConnectionEnd):
            await _within(_LONGEST_WAIT, lambda: asyncio.sleep(seconds), call)

    async def _resolve(self, route: _Route, call: _Call) -> Iterable[Any]:
        host, port = route.address
        await self._end_of_loop.__anext__()  # start the generator here, so that the loop, at its end, closes it
        with _system_errors():
            with contextlib.suppress(socket.gaierror):  # an address, or localhost, takes no time and no thread
                return _look_up(host, port, 0 if host == "localhost" else socket.AI_NUMERICHOST)
            return await _in_thread(call, route.peer, _look_up, host, port)

    async def _close_with_loop(self) -> AsyncGenerator[None, None]:
        """Close the connections of a client that was not closed before the loop is.

        A loop that ends as asyncio.run ends it closes the asynchronous generators that have begun in it.
        """
        try:
            while True:
                yield
        finally:
            self.close()

    async def aclose(self) -> None:
        await self._end_of_loop.aclose()
        self.close()

    def abandon(self) -> None:
        """Close everything from another loop, or after the end of this one."""
        if self.was_forked:  # call_soon_threadsafe would write to the parent's loop
            return
        if self.loop.is_running():
            with contextlib.suppress(RuntimeError):  # it has been closed meanwhile
                self.loop.call_soon_threadsafe(self.close)
                return
        self.close()


class _AsyncWorkers(_Workers):
    """Calls in tasks."""

    passed_on = (GeneratorExit, KeyboardInterrupt, SystemExit)

    def fetch(self, source: AsyncIterator[Any]) -> _Job:
        return self._begin(_Job(), source.__anext__)

    def start(self, item: Any) -> _Job:
        return self._begin(_Job(item), self._function, item, _Cancellation())

    def _begin(self, job: _Job, function: Callable[..., Awaitable[Any]], *args: Any) -> _Job:
        self._done = self._done or asyncio.Queue()  # made in the loop, as Python 3.9 wants it
        task = asyncio.ensure_future(self._do(job, function, *args))
        self._active.add(task)
        task.add_done_callback(self._active.discard)
        return job

    async def next_done(self) -> Any:
        return await self._done.get()

    def cancel(self) -> None:
        for task in self._active:
            task.cancel()

    async def end(self) -> None:
        self.cancel()
        await asyncio.gather(*self._active, return_exceptions=True)  # the loop reports those that nobody asks for


class AsyncBoxerClient(_Client):
    """A client of a Boxer server for asyncio; its parameters are those of BoxerClient, less `handlers`.

    Use it with `async with`, or `await client.aclose()`. Any number of tasks may share it. Each event loop that it is
    used in has connections of its own, which are closed when the client is next used in another loop. A
    cancelled call closes its connection at once, whereupon the server kills the run.
    """

    async def __aenter__(self) -> AsyncBoxerClient:
        self._check_open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections; calls that are going on in other tasks end with BoxerConnectionError."""
        self._is_closed = True
        if self._original is not None:
            self._current_pool().close_idle()
            return
        pool = self._pools.pop(asyncio.get_running_loop(), None)
        self._drop_connections()
        if pool is not None:
            await pool.aclose()

    async def health(self, *, timeout: Timeout = _UNSET, retries: int = 0) -> bool:
        """Return True if the server says that it is well, False if it answers anything else."""
        return await self._exchange(_HEALTH_REQUEST, _is_success, self._options(timeout, retries))

    async def wait_until_ready(self, timeout: Optional[float] = 60.0) -> None:
        """Ask for the server's health, with growing pauses, until it is well.

        Raises BoxerTimeoutError with the last reason after `timeout` seconds; None waits for ever.
        """
        await self._wait_until_ready(timeout)

    async def run(
        self,
        image: str,
        cmd: Sequence[str],
        *,
        env: Optional[Environment] = None,
        cwd: Optional[str] = None,
        limits: Optional[Limits] = None,
        files: Optional[Files] = None,
        persist: bool = False,
        network: Optional[Network] = None,
        input: Union[str, bytes, None] = None,  # noqa: A002 - as subprocess.run names it
        outputs: Union[bool, Sequence[str]] = (),
        output_dir: Union[str, os.PathLike[str], None] = None,
        tag: Any = None,
        check: bool = False,
        timeout: Timeout = _UNSET,
        retries: Optional[int] = None,
    ) -> RunResult:
        """Run a command in a new sandbox and return what came of it.

        The parameters and the errors are those of `BoxerClient.run`: `image` and `cmd`, `env` as a mapping or a list
        of `NAME=value`, `cwd`, `limits`, `files` that were uploaded or a mapping from names to content, `persist` to
        keep files and outputs, `network`, standard `input`, `outputs` to fetch (names, or True for all), `output_dir`
        to fetch them into, and `check` to raise BoxerExitError if the exit code is not 0. A cancelled run is killed.
        """
        request = RunRequest(image, cmd, env, cwd, limits, files, persist, network, input, outputs, tag)
        return await self._run(request, self._options(timeout, retries), output_dir, check)

    async def send(
        self, request: RunRequest, *, check: bool = False, timeout: Timeout = _UNSET, retries: Optional[int] = None
    ) -> RunResult:
        """Run what a RunRequest asks for, and return what came of it, as `run` does."""
        return await self._run(request, self._options(timeout, retries), check=check)

    def run_many(
        self,
        requests: Union[Iterable[RunRequest], AsyncIterable[RunRequest]],
        *,
        concurrency: int = 8,
        ordered: bool = True,
        timeout: Timeout = _UNSET,
        retries: Optional[int] = None,
    ) -> AsyncGenerator[tuple[RunRequest, Union[RunResult, BoxerError]], None]:
        """Run many requests, `concurrency` at a time, and yield each with what came of it: a RunResult or a BoxerError.

        `requests` may be asynchronous, and is asked for the next one when there is room for it. By default they come in
        the order of the requests, and at most 4 * `concurrency` results wait; with `ordered=False`, as they end.

        Leaving the loop ends the runs that are going on. When no connection can be made any more, it yields what had
        finished, and raises BoxerConnectionError. What `requests` raises is raised, too. A local file that cannot be
        read is a BoxerError of its run, with the OSError as `__cause__`.
        """
        return self._run_many(requests, concurrency, ordered, self._options(timeout, retries))

    async def upload_file(
        self, remote_path: str, content: Content, *, timeout: Timeout = _UNSET, retries: Optional[int] = None
    ) -> None:
        """Upload content into the server's store: bytes, text (sent as UTF-8), or a binary file.

        The path of a local file is text, too, and would be sent as such: `upload_path` sends the file. A file is read
        in a thread, and streamed from its start if it can be rewound. What is at `remote_path` is replaced.

        Raises TypeError for a file in text mode, BoxerError if a file changes its size while it is sent.
        """
        await self._exchange(_upload_request(remote_path, content), _check_uploaded, self._options(timeout, retries))

    async def upload_path(
        self,
        local_path: Union[str, os.PathLike[str]],
        remote_path: Optional[str] = None,
        *,
        exclude: Iterable[str] = (),
        timeout: Timeout = _UNSET,
        retries: Optional[int] = None,
    ) -> list[str]:
        """Upload a file, or a folder with everything in it, and return the remote paths in sorted order.

        `exclude` has patterns for names and paths to leave out, such as ".git", "*.pyc" or "data/*.csv". Several files
        are sent at a time. Raises BoxerValidationError, before anything is sent, for what is neither file nor folder,
        and for a link that leaves the folder, leads nowhere, or leads to a folder.
        """
        options = self._options(timeout, retries)
        uploads = await self._do_blocking(options, _local_files, local_path, remote_path, exclude)
        return await self._upload_all(uploads, options, self._upload)

    async def download_file(self, path: str, *, timeout: Timeout = _UNSET, retries: Optional[int] = None) -> bytes:
        """Return the content of a file in the server's store, for instance of `result.output_path("a.json")`."""
        return await self._exchange(_download_request(path), _file_content, self._options(timeout, retries))

    async def download_path(
        self,
        path: str,
        local_path: Union[str, os.PathLike[str], IO[bytes]],
        *,
        timeout: Timeout = _UNSET,
        retries: Optional[int] = None,
    ) -> None:
        """Download a file from the server's store to a local path, into a local folder, or into a binary file.

        It is streamed, whatever its size. One that fails leaves a path as it was; a folder is not written over.
        """
        await self._download_path(path, local_path, self._options(timeout, retries))

    async def _do_blocking(self, options: _Options, function: Callable[..., Any], *args: Any) -> Any:
        call = self._new_call(_HEALTH_REQUEST, options)  # no request is sent: it is for the deadline and cancellation
        call.deadline.start_again("end of reading")
        return await _in_thread(call, "local files", function, *args)

    _new_workers = _AsyncWorkers

    def _drop_connections(self) -> None:
        for pool in list(self._pools.values()):
            pool.abandon()

    def _current_pool(self) -> _AsyncPool:
        loop = asyncio.get_running_loop()
        pool = self._pools.get(loop)
        if pool is None or pool.is_closed:
            for other in list(self._pools):  # of keys: to copy items makes tuples, which lets other threads run
                if other is loop or not other.is_running():
                    stale = self._pools.pop(other, None)  # another thread may have been here
                    if stale is not None:
                        stale.abandon()
            pool = self._pools[loop] = _AsyncPool(self._settings["max_connections"], self._context, self._origin)
        return pool

    async def _send(self, pool: _AsyncPool, call: _Call) -> _Response:
        request = call.request
        head = _encoded_head(request.method, pool.prefix + request.target, {**pool.fields, **request.headers})
        return await pool.exchange(pool.route, head, request.body, call)


# ---- Command line ----------------------------------------------------------------------------------------------------

_FAILURES = (BoxerError, MemoryError, OSError, RuntimeError, ValueError)  # RuntimeError: no thread can be started
_HINTS = {
    0: "; --timeout (or --wait) waits longer",
    408: "; --time-limit gives it more time; if it printed a lot, have it write to /output, and fetch that with -o",
    507: "; what a program writes to a file in /output can be fetched with -o",
}
_OPTIONS = {  # by the parameters that the texts of errors name
    "base_url": "--url",
    "cpu_cores": "--cpus",
    "local_path": "LOCAL",
    "memory_mb": "--memory",
    "output_dir": "-o",
    "pids_limit": "--pids",
    "remote_path": "the remote name",
    "wall_clock_secs": "--time-limit",
}
_ERASE = "\r\x1b[K"  # the line in which a terminal's cursor is


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Do what a command line asks for, by default that of this program, and return the exit code."""
    try:
        options = _command_line(arguments)
        return int(options.function(options) or 0)
    except SystemExit as ended:
        if ended.code:  # a signal handler has raised it
            raise
        return 0  # argparse has shown its help, or the version
    except (*_FAILURES, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt) and arguments is None:  # the program ends, and another must not stop it
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        elif not isinstance(error, (BrokenPipeError, KeyboardInterrupt)):  # the former is what `| head` leads to
            _say(f"boxer: {_explained(error)}\n")
        return _exit_code(error)


def _command_line(arguments: Sequence[str] | None) -> Any:
    """Return the options, and the other arguments as `words`; raise BoxerValidationError for a wrong usage."""
    parser = _parser()
    options, more = parser.parse_known_args(arguments)
    if options.command is None:
        parser.error("name a command: run, upload, download or health")
    if options.command == "run":  # nothing behind IMAGE is an option, not even `--`
        options.words = options.words[options.words[:1] == ["--"] :]
    else:  # argparse leaves over the words behind an option that follows a word
        options.words += [word for word in more if word == "-" or not word.startswith("-")]
        more = [word for word in more if word != "-" and word.startswith("-")]
    if more:
        options.error(f"there is no option {more[0].partition('=')[0]}")  # what follows it may be a secret
    if len(options.words) not in options.counts:
        options.error("too few arguments" if len(options.words) < options.counts.start else "too many arguments")
    options.env = _pairs(options, "-e", options.env, "=", "K=V")
    options.headers = _pairs(options, "--header", options.headers_before + options.headers, ":", "'NAME: VALUE'")
    return options


def _pairs(options: Any, option: str, texts: Iterable[str], separator: str, form: str) -> dict[str, str]:
    pairs = [text.partition(separator) for text in texts]
    if not all(name and found for name, found, _ in pairs):
        options.error(f"{option} takes {form}")  # what was given is not shown: it may be a secret
    return {name: value for name, _, value in pairs}


def _parser() -> Any:
    import argparse  # here, since it takes time, and few who import this module need it

    class Parser(argparse.ArgumentParser):
        def _print_message(self, message: str, file: Any = None) -> None:  # of --help and --version
            _write(sys.stdout, message.encode())

        def error(self, message: str) -> Any:
            raise BoxerValidationError(f"{message}; see `{self.prog} --help`")

    settings: dict[str, Any] = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser, examples = Parser(prog="boxer", usage="boxer [options] COMMAND ...", **settings), ["examples:"]
    parser.description = "Run untrusted code in the sandboxes of a Boxer server."
    parser.add_argument("--version", action="version", version=f"boxer {__version__}", help="show the version")
    _add_common_options(parser.add_argument, "headers_before", None)
    parser.set_defaults(timeout=120.0, env=[])
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", prog="boxer")
    for name, function, words, counts, add_options, example in _COMMANDS:
        text = function.__doc__ or "(python -OO drops this text)."
        examples.append(f"  boxer {name} {example}")
        settings.update(usage=f"boxer {name} [options] {words}", epilog=f"example:\n{examples[-1]}", description=text)
        command = commands.add_parser(name, help=text[0].lower() + text[1:-1], **settings)
        command.set_defaults(function=function, error=command.error, counts=counts)
        command.add_argument("words", nargs="..." if name == "run" else "*", help=argparse.SUPPRESS)
        add_options(command.add_argument)
        _add_common_options(command.add_argument, "headers", argparse.SUPPRESS)
    codes = "exit code: that of the program; 124: its time limit; 125: any other error; 130: Ctrl-C"
    parser.epilog = "\n".join([*examples, "", codes])
    return parser


def _add_common_options(add: Any, headers: str, default: Any) -> None:
    """Add what may stand before the command and behind it; there, the default is what was said before."""
    add("--url", default=default, help="of the server; default: $BOXER_URL, or else http://localhost:8080")
    add("--timeout", type=float, default=default, metavar="S", help="seconds without answer or progress; default: 120")
    add("--header", action="append", dest=headers, default=[], metavar="'N: V'", help="a header field; repeatable")
    add("--ca", default=default, metavar="FILE", help="for https: certificates to trust in place of the system's")
    text = "how often to try again if the server is busy or cannot be reached; default: 2"
    add("--retries", type=int, default=default, metavar="N", help=text)
    add("-v", action="store_true", dest="is_verbose", default=default, help="say more: a line for each request")
    add("-q", action="store_true", dest="is_quiet", default=default, help="say nothing but errors")


def _add_run(add: Any) -> None:
    add("-e", action="append", dest="env", default=[], metavar="K=V", help="an environment variable; repeatable")
    text = "a file or folder for the run's own folder, where it starts; `-f .` is what is in that folder; repeatable"
    add("-f", action="append", dest="files", default=[], metavar="LOCAL[:NAME]", help=text)
    _add_exclude(add)
    add("-o", dest="output_dir", metavar="DIR", help="a local folder for all that the program writes to /output")
    add("-i", action="store_true", dest="has_input", help="give standard input to the program; it is read whole first")
    add("-w", dest="cwd", metavar="DIR", help="the working directory; where there are files, relative to their folder")
    add("--time-limit", type=int, dest="wall_clock_secs", metavar="S", help="seconds; past it, the exit code is 124")
    add("--memory", type=int, dest="memory_mb", metavar="MB", help="MiB of memory")
    add("--cpus", type=float, dest="cpu_cores", metavar="N", help="processors; may be a fraction")
    add("--pids", type=int, dest="pids_limit", metavar="N", help="processes and threads")
    add("--nofile", type=int, metavar="N", help="open files")
    add("--network", metavar="NAME", help="none (the default), sandbox or host")
    add("--json", action="store_true", help="print one JSON object, for errors too (but not for a wrong usage)")


def _add_exclude(add: Any) -> None:
    add("--exclude", action="append", default=[], metavar="PATTERN", help="a name or path to leave out; repeatable")


def _do_run(options: Any) -> int:
    """Run a command in a new sandbox: its output and exit code become this program's own."""
    result, error = None, None
    try:
        result = _result(options)
    except (*_FAILURES, KeyboardInterrupt) as caught:
        result, error = getattr(caught, "result", None), caught
    members: dict[str, Any] = {name: getattr(result, name) for name in _RESULT_TYPES} if result else {}
    if options.json and error is not None:
        status_code = getattr(error, "status_code", None)
        members["error"] = {"type": type(error).__name__, "message": _explained(error), "status_code": status_code}
    streams = [(sys.stdout, members.get("stdout", "")), (sys.stderr, members.get("stderr", ""))]
    for stream, text in [(sys.stdout, json.dumps(members) + "\n")] if options.json else streams:
        with contextlib.suppress(BrokenPipeError):  # the program has run, and its exit code is what counts
            _write(stream, text.encode("utf-8", "replace"))
    if error is None:
        return members["exit_code"] if 0 <= members["exit_code"] <= 255 else 255
    if options.json and not isinstance(error, KeyboardInterrupt):
        return _exit_code(error)
    raise error


def _result(options: Any) -> RunResult:
    files = _named_files(options)
    given = {name: getattr(options, name) for name in ("env", "cwd", "network", "output_dir")}
    given["limits"] = {name: getattr(options, name) for name in ResourceLimits.__dataclass_fields__}
    content = given["input"] = _standard_input() if options.has_input else None
    size = sum(file.stat().st_size for file in files.values())
    size += len(content) if content is not None and _short_text(content) is None else 0  # it goes as a file
    with _client_with_progress(options, "running") as (client, progress):
        progress.total = functools.partial(int, size)
        return client.run(options.words[0], options.words[1:], files=files, **given)


def _standard_input() -> bytes:
    if sys.stdin is None:
        raise BoxerValidationError("there is no standard input for -i")
    with contextlib.suppress(AttributeError, OSError, ValueError):  # what is not a descriptor's needs none of this
        os.set_blocking(sys.stdin.fileno(), True)
    return sys.stdin.buffer.read()


def _named_files(options: Any) -> dict[str, Path]:
    """Return the files that each LOCAL[:NAME] stands for, by their names in the run's own folder."""
    files: dict[str, Path] = {}
    for argument in options.files:
        local, colon, name = argument.rpartition(":")
        if not colon or os.path.lexists(argument):  # a colon may be part of a name, or follow a drive's letter
            local, name = argument, Path(argument).name
            name = "." if name in ("", "..") else name
        for path, file in _local_files(local, "content" if name == "." else name, options.exclude):
            key = path if name != "." else path.partition("/")[2] or Path(local).name
            if key in files:
                raise BoxerValidationError(f"-f gives two files the name {key!r}; rename one, as LOCAL:NAME")
            files[key] = file
    return files


def _do_upload(options: Any) -> None:
    """Upload a file or folder into the server's store, and print the remote paths."""
    local, remote = [*options.words, None][:2]
    with _client_with_progress(options, "uploading") as (client, progress):
        files = _local_files(local, remote, options.exclude)
        progress.total = functools.partial(int, sum(file.stat().st_size for _, file in files))
        paths = _run_to_completion(client._upload_all(files, client._options(), client._upload))  # noqa: SLF001 - its own
    _write(sys.stdout, "".join(f"{path}\n" for path in paths).encode())


def _do_download(options: Any) -> None:
    """Download a file from the server's store; LOCAL may be a folder, or - for standard output."""
    remote, local = [*options.words, "."][:2]
    with _client_with_progress(options, "downloading") as (client, progress):
        if local == "-":  # it has no position, since it cannot be rewound: a file that it is appended to would be cut
            place: Any = contextlib.nullcontext(types.SimpleNamespace(write=functools.partial(_write, sys.stdout)))
            progress.is_shown &= not getattr(sys.stdout, "isatty", bool)()  # it would be mixed with the file
        else:
            place = _written(_local_target(_path("REMOTE", remote), local))
        with place as file:
            request = _download_request(remote, sink := _Sink(file))
            progress.total, progress.positions[sink] = lambda: sink.length, lambda: sink.written
            _run_to_completion(client._exchange(request, _file_content, client._options()))  # noqa: SLF001 - its own


def _do_health(options: Any) -> None:
    """Ask whether the server is well, or wait until it is."""
    with _client_with_progress(options, "waiting") as (client, _):
        if options.wait is None:
            call = client._exchange(_HEALTH_REQUEST, _checked, client._options(retries=options.retries or 0))  # noqa: SLF001
            _run_to_completion(call)
        else:
            client.wait_until_ready(options.wait)
    _write(sys.stdout, b"ok\n")


def _add_wait(add: Any) -> None:
    add("--wait", type=float, metavar="S", help="wait up to S seconds until it is")


# Of each command: its name, function, arguments and their number, options, and an example.
_COMMANDS: Any = [
    ("run", _do_run, "IMAGE COMMAND [ARG...]", range(2, sys.maxsize), _add_run, "-f . python:3.12 python3 main.py"),
    ("upload", _do_upload, "LOCAL [REMOTE]", range(1, 3), _add_exclude, "src lib/src --exclude .git --exclude '*.pyc'"),
    ("download", _do_download, "REMOTE [LOCAL]", range(1, 3), lambda _: None, "output/ID/result.json"),
    ("health", _do_health, "", range(1), _add_wait, "--wait 60"),
]


@contextlib.contextmanager
def _client_with_progress(options: Any, work: str) -> Iterator[tuple[BoxerClient, _Progress]]:
    """Give a client with the settings of a command line; what it logs, and how far it is, is shown meanwhile."""
    try:
        context = None
        if options.ca is not None:
            context = ssl.create_default_context(cafile=str(_local_path("--ca", options.ca)))
    except OSError as error:
        raise BoxerValidationError(f"--ca {options.ca}: {error.strerror}") from error
    retries = 2 if options.retries is None else options.retries
    settings = {"headers": options.headers, "retries": retries, "ssl_context": context}
    progress = _Progress(getattr(sys.stderr, "isatty", bool)() and not options.is_quiet)
    level, is_over = _LOG.level, threading.Event()
    thread = threading.Thread(target=progress.show, args=(work, is_over), daemon=True)
    if progress.is_shown:
        thread.start()
    _LOG.addHandler(progress)
    _LOG.setLevel(logging.DEBUG if options.is_verbose else logging.ERROR if options.is_quiet else logging.WARNING)
    try:
        with BoxerClient(options.url, options.timeout, **settings) as client:
            if progress.is_shown:
                client._open_content = progress.opened  # noqa: SLF001 - its own
            yield client, progress
    finally:
        is_over.set()
        if thread.ident is not None:
            thread.join()
        _LOG.removeHandler(progress)
        _LOG.setLevel(level)


class _Progress(logging.Handler):
    """Says what the log says and, on a terminal, how far long work is: content that has moved, its rate, the time."""

    def __init__(self, is_shown: bool) -> None:
        super().__init__()
        self.is_shown = is_shown
        self.positions: dict[Any, Callable[[], int]] = {}  # how much of each file has moved
        self.total: Callable[[], float] = int  # how much there is to move

    def emit(self, record: logging.LogRecord) -> None:
        _say(f"{_ERASE if self.is_shown else ''}boxer: {record.getMessage()}\n")

    @contextlib.contextmanager
    def opened(self, content: Any) -> Iterator[Any]:
        """Open what is to be uploaded, and follow how far it is read."""
        with _opened(content) as opened:
            file, key = io.BytesIO(opened) if isinstance(opened, bytes) else opened, object()
            self.positions[key] = file.tell
            yield file
            self.positions[key] = functools.partial(int, file.tell())

    def show(self, work: str, is_over: threading.Event) -> None:
        """Show how far some work is while it goes on, once it has taken a moment."""
        begin, line = time.monotonic(), ""
        while not is_over.wait(_PROGRESS_PAUSE if line else _PROGRESS_DELAY) and self.is_shown:
            seconds = time.monotonic() - begin
            with contextlib.suppress(OSError, ValueError):  # a file has just been closed, or has no position
                done = sum(position() for position in list(self.positions.values())) / 2**20
                of = self.total() / 2**20
                moved = f"{done:.1f}{f' of {of:.1f}' if of < math.inf else ''} MiB, {done / seconds:.1f} MiB/s, "
                line = f"{work}: {moved if done != of else ''}{seconds:.0f} s"
                width = os.get_terminal_size(sys.stderr.fileno()).columns or 80
                _say(_ERASE + line[: width - 1])  # a longer one would wrap
        _say(line and _ERASE)


def _write(stream: Any, content: bytes) -> None:
    """Write to a standard stream past its buffer, whose rest Python would try to write once more as it exits."""
    if stream is None:  # it was closed when this program began
        return
    stream.flush()
    if not hasattr(stream, "buffer"):  # something of the caller's, such as a StringIO
        stream.write(content.decode("utf-8", "replace"))
        return
    raw, left = getattr(stream.buffer, "raw", stream.buffer), memoryview(content)
    try:
        while left:
            size = raw.write(left)
            if size is None:  # it does not block, and is full
                _wait_for(raw.fileno(), "w", 1.0)
            left = left[size or 0 :]
    except OSError as error:
        error.filename = "standard output" if stream is sys.stdout else "standard error"
        raise


def _say(text: str) -> None:
    """Write to standard error; where that fails, there is nobody to be told."""
    with contextlib.suppress(OSError, ValueError):
        _write(sys.stderr, text.encode(getattr(sys.stderr, "encoding", None) or "utf-8", "backslashreplace"))


def _explained(error: BaseException) -> str:
    """Return what an error says, and what can be done about it, as one line."""
    text = str(error) or ("not enough memory" if isinstance(error, MemoryError) else "interrupted")
    if isinstance(error, BoxerValidationError):  # but not within the name of a file
        text = re.sub(rf"(?<![\w/.'])({'|'.join(_OPTIONS)})(?![\w/.'])", lambda match: _OPTIONS[match[0]], text)
    if isinstance(error, BoxerConnectionError) and not error.request_sent:
        is_proxys = text.startswith("the proxy")
        hint = "http_proxy names it" if is_proxys else "is a server there? --url or BOXER_URL says where"
        is_untrusted = isinstance(error.__cause__, ssl.SSLCertVerificationError)
        text += "; --ca FILE trusts the certificates in FILE" if is_untrusted else f"; {hint}"
    elif isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror or text}"
    return " ".join(_printable(text + _HINTS.get(getattr(error, "status_code", -1), "")).split())


def _exit_code(error: BaseException) -> int:
    """Return an exit code that is not the program's own; `docker run` and `timeout` have the same."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 124 if getattr(error, "status_code", None) == 408 else 125  # 124: the program's time limit is over


if __name__ == "__main__":
    raise SystemExit(main())
