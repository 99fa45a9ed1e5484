"""The client of Boxer, a service that runs untrusted code in gVisor sandboxes over HTTP.

    from boxer import BoxerClient

    with BoxerClient("http://localhost:8080") as client:
        result = client.run(image="python:3.12-slim", cmd=["python3", "-c", "print('hello world')"])
        print(result.stdout, result.exit_code)

This file is the whole client. It needs nothing but Python 3.9 or later: copy it next to your code, or install the
package `boxer-sdk`, which holds this same file. There are two clients with the same methods: `BoxerClient` blocks,
and any number of threads may share one; `AsyncBoxerClient` is for asyncio.

The sections, each of which builds on those above it (and raises what Errors defines):

    Data           what is asked for and what comes back; the names of the JSON
    Errors         the tree of exceptions, and which status code becomes which
    Requests       a builder for each endpoint: checks, JSON, multipart
    Responses      an interpreter for each endpoint: a value or the right error
    Policy         base URL, proxy, deadline, and what may be sent again
    Wire           HTTP/1.1 and TLS as state machines over bytes
    Both clients   what is said over a connection, a pool of them, and the tries of a call
    Sync client    waits for a socket by poll(); and urllib's opener for those who add handlers to it
    Async client   waits for a socket by asyncio's event loop

What is above the clients makes every decision once, in coroutines. The seam is `_Connection._arrival`, and a few more
leaves like it (`_Connection.connect`, `_Pool._pause`): in AsyncBoxerClient they wait, in BoxerClient they block
instead, so that its coroutines end at their first step (`_now`). The clients differ in nothing else.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import binascii
import collections
import contextlib
import copy
import functools
import html
import io
import itertools
import json
import logging
import math
import operator
import os
import queue
import random
import re
import select
import socket
import stat
import sys
import threading
import time
import urllib.parse
import warnings
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, Union

# Nearly half of the time to import this file would be theirs: see `_load`.
if TYPE_CHECKING:
    import asyncio
    import email.message
    import email.utils
    import ssl
    import urllib.error
    import urllib.request

try:
    import fcntl
    import termios
except ImportError:  # pragma: no cover - as on Windows
    fcntl = termios = None  # type: ignore[assignment]

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
_T = TypeVar("_T")
_C = TypeVar("_C", bound="_Connection")


def _load(*modules: str) -> None:
    """Import what a client needs, itself or in what it calls: when it is made, and not when it is used.

    For a child that is forked while another thread imports a module waits for it in vain.
    """
    globals().update({module.partition(".")[0]: __import__(module) for module in modules})


# What a file's content may be given as.
Content = Union[bytes, bytearray, memoryview, str, IO[bytes]]


# ---- Data ------------------------------------------------------------------------------------------------------------


@dataclass
class ResourceLimits:
    """What a run may use. A limit left out, None or 0 is the server's default.

    cpu_cores: processors, may be a fraction (the server's default, unless configured otherwise: 1.0).
    memory_mb: memory in MiB (256).
    pids_limit: processes and threads (64).
    wall_clock_secs: seconds from the start of the program to its end by force (30).
    nofile: open file descriptors of a process (256).

    Raises BoxerValidationError for a limit that is negative, not finite, or not a number; all but `cpu_cores` are
    whole numbers. In its usual Docker set-up a server enforces the wall clock and `nofile` only.
    """

    cpu_cores: float | None = None
    memory_mb: int | None = None
    pids_limit: int | None = None
    wall_clock_secs: int | None = None
    nofile: int | None = None

    def __post_init__(self) -> None:
        self.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """Return the limits that were given, by their JSON names, checked again since they may have been changed."""
        values = ((name, getattr(self, name)) for name in ResourceLimits.__dataclass_fields__)
        return {name: _checked_limit(name, value) for name, value in values if value is not None}


def _checked_limit(name: str, value: Any) -> float:
    is_whole = name != "cpu_cores"
    if isinstance(value, float) and value.is_integer() and is_whole:
        value = int(value)
    is_number = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value) and not is_whole)
    if isinstance(value, bool) or not is_number:
        raise BoxerValidationError(f"{name} must be a {'whole' if is_whole else 'finite'} number, not {value!r}")
    if not 0 <= value < 2**63:
        raise BoxerValidationError(f"{name} must be from 0 (the default) to 2**63 - 1")
    return value  # type: ignore[no-any-return]  # a number, as was just checked


@dataclass(frozen=True)
class RunRequest:
    """What a run is asked to do, to be kept, compared or shown, and done by `client.run(**vars(request))`.

    The parameters are those of `BoxerClient.run`. `env` may be given as a mapping or a list of `K=V`, `limits` as
    ResourceLimits or a mapping; they are kept as a tuple and as ResourceLimits. Raises BoxerValidationError for what
    cannot be right, TypeError for a wrong type. The repr shows the names in `env`, not the values.
    """

    image: str
    cmd: Sequence[str]
    env: Mapping[str, str] | Iterable[str] | None = None
    cwd: str | None = None
    limits: ResourceLimits | Mapping[str, Any] | None = None
    files: Sequence[str] | None = None
    persist: bool = False
    network: str | None = None

    def __post_init__(self) -> None:
        self.__dict__.update(  # a frozen dataclass lets nothing be set but so
            image=_image(self.image),
            cmd=_command(self.cmd),
            env=_environment(self.env) if self.env else (),
            cwd=None if self.cwd is None else _text("cwd", self.cwd) or None,
            limits=None if self.limits is None else _limits(self.limits),
            files=_files(self.files) if self.files else (),
            network=None if self.network is None else _text("network", self.network) or None,
        )

    def __repr__(self) -> str:
        names = [entry.partition("=")[0] for entry in self.env or ()]
        shown = {**self.__dict__, "env": names}
        return f"RunRequest({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be str, not {type(value).__name__}")
    return value


def _texts(name: str, values: Any) -> tuple[str, ...]:
    if type(values) not in (list, tuple):  # with what is usual, there is no need to look
        if isinstance(values, str):
            example = "['NAME=value']" if name == "env" else f"[{values!r}]"  # what is in env may be a secret
            raise BoxerValidationError(f"{name} must be a list of strings, not one string: write {example}")
        if isinstance(values, (bytes, Mapping)):
            raise TypeError(f"{name} must be a list of strings, not {type(values).__name__}")
    texts = tuple(values)
    try:
        "".join(texts)  # takes text only, and is faster than a loop
    except TypeError:
        kind = next(type(value).__name__ for value in texts if not isinstance(value, str))
        raise TypeError(f"each of {name} must be str, not {kind}") from None
    return texts


def _image(image: Any) -> str:
    if not _text("image", image).strip():
        raise BoxerValidationError("image is empty; name one, for instance 'python:3.12-slim'")
    return image  # type: ignore[no-any-return]  # text, as was just checked


def _command(cmd: Any) -> tuple[str, ...]:
    words = _texts("cmd", cmd)
    if not words or not words[0]:
        raise BoxerValidationError("cmd is empty; give the program and its arguments, for instance ['echo', 'hi']")
    return words


def _environment(env: Any) -> tuple[str, ...]:
    if isinstance(env, Mapping):
        for name, value in env.items():
            if "=" in _text("each name in env", name):
                raise BoxerValidationError("a name in env has an '=' in it")
            _text(f"the value of {name!r} in env", value)
        env = ["=".join(item) for item in env.items()]
    entries = _texts("env", env)
    for entry in entries:
        if entry.find("=") < 1:
            # The entry itself may be a secret whose name was forgotten, so it is not shown.
            raise BoxerValidationError("an entry of env is not of the form NAME=value")
    return entries


def _limits(limits: Any) -> ResourceLimits:
    if isinstance(limits, ResourceLimits):
        return limits
    if not isinstance(limits, Mapping):
        raise TypeError(f"limits must be ResourceLimits or a mapping, not {type(limits).__name__}")
    known = ResourceLimits.__dataclass_fields__
    for name in limits:
        if name not in known:
            raise BoxerValidationError(f"there is no limit {name!r}; the limits are {', '.join(known)}")
    return ResourceLimits(**limits)


def _files(files: Any) -> tuple[str, ...]:
    return tuple(map(_path, _texts("files", files)))


def _path(path: Any) -> str:
    if not _text("path", path):
        raise BoxerValidationError("a path is empty; give one below the store, for instance 'data/input.txt'")
    return str.__str__(path)  # and not what a subclass, such as an Enum's, calls itself


@dataclass
class RunResult:
    """What came of a run that ended by itself, whatever its exit code.

    exec_id: the name of the run, under which a run with `persist` keeps its outputs.
    exit_code: the program's; 128 + N after signal N; 128 if it could not be started (`stderr` says why).
    stdout, stderr: text; each byte that is not UTF-8 is U+FFFD. Binary results belong in /output.
    wall_ms: milliseconds from the start of the sandbox to its end.
    """

    exec_id: str
    exit_code: int
    stdout: str
    stderr: str
    wall_ms: int

    def __post_init__(self) -> None:
        are_text = type(self.exec_id) is type(self.stdout) is type(self.stderr) is str
        if are_text and type(self.exit_code) is type(self.wall_ms) is int:
            return  # as nearly always, in half of the steps that the loop takes
        for name, kind in _RESULT_TYPES.items():
            value = getattr(self, name)
            if type(value) is bool or not isinstance(value, kind):
                raise TypeError(f"RunResult.{name} must be {kind.__name__}, got {type(value).__name__}")

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
        """Return where `download_file` finds what the run wrote to /output/`path` (with `persist=True`)."""
        return f"output/{self.exec_id}/{_path(path)}"


_RESULT_TYPES = {"exec_id": str, "exit_code": int, "stdout": str, "stderr": str, "wall_ms": int}


# ---- Errors ----------------------------------------------------------------------------------------------------------
#
#     BoxerError
#     ├── BoxerValidationError (also a ValueError)        refused before anything was sent
#     ├── BoxerConnectionError (also a ConnectionError)   no complete, well-formed HTTP answer came
#     ├── BoxerExitError                                  run(check=True), and the exit code is not 0
#     └── BoxerAPIError                                   the server answered, and not with what was asked for
#         ├── BoxerTimeoutError                           408: the program's time was up; 0: the client's deadline
#         └── BoxerOutputLimitError                       507: too much on stdout or stderr
#
# Nothing else leaves a client for a fault of the network, the protocol or the server. A closed client and a wrong type
# are ordinary RuntimeError and TypeError, a local file that cannot be read an OSError.
# ----------------------------------------------------------------------------------------------------------------------


class BoxerError(Exception):
    """The base of all errors of this module."""


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
    """A run that was to be checked ended with an exit code other than 0.

    result: the RunResult.
    """

    def __init__(self, result: RunResult) -> None:
        lines = _printable(result.stderr[-_REASON_SIZE:], keep="\n").strip().split("\n")
        super().__init__(f"exit code {result.exit_code}" + (f": {lines[-1]}" if lines[-1] else ""))
        self.result = result

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.result,), self.__dict__


class BoxerAPIError(BoxerError):
    """The server answered, and not with what was asked for; the text is the server's own reason.

    status_code: the HTTP status code of the answer.
    """

    def __init__(self, message: str, status_code: int) -> None:
        super().__init__(message)
        self.status_code = status_code

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.status_code), self.__dict__


class BoxerTimeoutError(BoxerAPIError):
    """Time was up: the program's wall clock limit (status_code 408) or the client's own deadline (status_code 0).

    Deliberately no TimeoutError: what catches those tries again, and a program that ran out of its time must not be.
    """


class BoxerOutputLimitError(BoxerAPIError):
    """The program wrote more to stdout or stderr than the server allows (507)."""


_ERROR_OF_STATUS = {408: BoxerTimeoutError, 507: BoxerOutputLimitError}

_REASON_SIZE = 2_000  # characters of a server's reason that are worth showing

# Control characters, and those that reorder text: neither may reach a terminal out of a server's or program's text.
_UNPRINTABLE = "[\x00-\x1f\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"


def _printable(text: str, keep: str = "") -> str:
    return re.sub(_UNPRINTABLE, lambda match: match[0] if match[0] in keep else " ", text)


# ---- Requests --------------------------------------------------------------------------------------------------------

_PIECE = 1024 * 1024  # bytes of content that are sent from memory and received at a time
_FILE_PIECE = 4 * _PIECE  # of a file, which asyncio reads in a thread: to get there costs as much as to read 1 MiB
_QUICK = 0.05  # seconds to read a piece in, for the next one to be that large
_LONGEST_WAIT = 1_000_000.0  # seconds that every operating system can be asked to wait for; 11 days
_ENDLESS = 10**18  # as a number of bytes, and more than can be told: there is no limit, or it is not known
_ANSWER_LIMIT = 256 * 1024 * 1024  # of JSON; the server's own limit on output is 20 MiB before escapes


class _Request:
    """A request, short of what the client's settings add to it."""

    content_limit = _ANSWER_LIMIT  # bytes of a successful answer's content; _ENDLESS: it is a file
    allowance = 0.0  # seconds that the server is entitled to on top of the timeout
    is_run = has_network = False

    def __init__(self, method: str, target: str, lines: str = "", body: bytes | _Multipart = b"") -> None:
        self.method = method
        self.target = target  # below the base URL's path
        self.lines = lines  # of the head, those that are this request's own
        self.body = body


_HEALTH_REQUEST = _Request("GET", "/healthz")

_JSON_STRING = json.encoder.encode_basestring  # a run's body of such takes a third of the time of a JSONEncoder's


def _json_array(texts: Iterable[str]) -> str:
    return f"[{','.join([_JSON_STRING(text) for text in texts])}]"


def _run_request(
    image: Any, cmd: Any, env: Any, cwd: Any, limits: Any, files: Any, persist: Any, network: Any
) -> _Request:
    """Check and encode what makes up a RunRequest."""
    text = f'{{"image":{_JSON_STRING(_image(image))},"cmd":{_json_array(_command(cmd))}'
    given = {} if limits is None else _limits(limits).to_dict()
    if env:
        text += f',"env":{_json_array(_environment(env))}'
    if cwd is not None and _text("cwd", cwd):
        text += f',"cwd":{_JSON_STRING(cwd)}'
    if given:
        text += f',"limits":{json.dumps(given)}'
    if files:
        text += f',"files":{_json_array(_files(files))}'
    if persist:
        text += ',"persist":true'
    if network is not None and _text("network", network):
        text += f',"network":{_JSON_STRING(network)}'
    body = _utf8("run", text + "}")
    lines = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    request = _Request("POST", "/run", lines, body)
    request.is_run, request.has_network = True, network not in (None, "", "none")
    if given:
        request.allowance = min(given.get("wall_clock_secs", 0), _LONGEST_WAIT)
    return request


def _upload_request(remote_path: str, content: Content) -> _Request:
    body = _Multipart(_path(remote_path), content)
    framing = "Transfer-Encoding: chunked" if body.length is None else f"Content-Length: {body.length}"
    lines = f"Content-Type: multipart/form-data; boundary={body.boundary}\r\n{framing}\r\n"
    return _Request("POST", "/files", lines, body)


def _download_request(path: str) -> _Request:
    query = urllib.parse.quote(_utf8("path", _path(path)), safe="/")
    request = _Request("GET", f"/files?path={query}")
    request.content_limit = _ENDLESS
    return request


def _utf8(name: str, text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        problem = str(error)
    # Not while that error is at hand, since it holds the whole text, which may hold secrets.
    raise BoxerValidationError(f"the {name} has a lone surrogate in it, which is no character: {problem}")


class _Multipart:
    """A multipart/form-data body of one file and its path (RFC 7578), made as it is sent.

    The file's own name is left out: the server goes by the part `path`, whose value may be any text, since nothing but
    the delimiter ends it, and that is random. Content that can be sought is sent from its start, at every try.
    """

    def __init__(self, path: str, content: Content) -> None:
        self.boundary = os.urandom(16).hex()
        part = f'--{self.boundary}\r\nContent-Disposition: form-data; name="'
        kind = 'file"; filename="file"\r\nContent-Type: application/octet-stream\r\n\r\n'
        self._before = (part + kind).encode()
        self._after = (
            f'\r\n{part}path"\r\n\r\n'.encode() + _utf8("path", path) + f"\r\n--{self.boundary}--\r\n".encode()
        )
        self._content = _content(content)
        self._size = _size(self._content)
        # The length of the body in bytes; None if it cannot be known before it was sent.
        self.length = None if self._size is None else len(self._before) + self._size + len(self._after)
        self.can_be_sent = True  # False once content that cannot be rewound was read from
        self.is_given = False  # True once the last piece was given
        self.may_block = not isinstance(self._content, memoryview)  # making a piece reads from a file

    def pieces(self, largest: int) -> Iterator[bytes | memoryview]:
        """Yield the body; a file is first touched for the second piece, and read `largest` bytes at a time at most."""
        if not self.can_be_sent:
            raise BoxerError("the content has been read and cannot be rewound, so it cannot be sent again")
        self.is_given = False
        return self._parts(largest) if self._size is not None else map(self._chunk, self._parts(_PIECE))

    def _parts(self, largest: int) -> Iterator[bytes | memoryview]:
        if isinstance(self._content, memoryview):
            yield self._before + self._content[:_PIECE]
            yield from (self._content[at : at + _PIECE] for at in range(_PIECE, len(self._content), _PIECE))
        else:
            yield self._before
            self.can_be_sent = self._size is not None
            yield from self._read(self._content, largest)
        self.is_given = True
        yield self._after

    def _chunk(self, piece: bytes | memoryview) -> bytes:
        """Return a piece in the chunked transfer coding (RFC 9112, section 7.1)."""
        return b"".join((b"%x\r\n" % len(piece), piece, b"\r\n", b"0\r\n\r\n" if self.is_given else b""))

    def _read(self, file: IO[bytes], largest: int) -> Iterator[bytes | memoryview]:
        """Yield a file's content; fail, so that no complete body is ever sent, if it is not as long as was said."""
        left, size, room = self._size, _PIECE, None
        if left is not None:
            file.seek(0)
            if type(file) is io.BufferedReader:  # and not what reports its progress by a `read` of its own, say
                room = memoryview(bytearray(min(largest, left)))  # for all pieces: one is sent before the next
        while left is None or left > 0:
            began = time.monotonic()
            piece: bytes | memoryview
            if room is not None:
                piece = room[: file.readinto(room[:size]) or 0]  # type: ignore[attr-defined]  # None: it has none now
            else:
                piece = file.read(size if left is None else min(size, left))
                if not isinstance(piece, bytes):
                    raise TypeError(f"a binary file must give bytes, not {type(piece).__name__}")
            size = largest if time.monotonic() - began < _QUICK else _PIECE
            if not piece or (left is not None and len(piece) > left):
                break
            left = None if left is None else left - len(piece)
            yield piece
        if left is not None and (left != 0 or file.read(1)):
            raise BoxerError("the file changed its size while it was sent; the upload was broken off")


def _content(content: Any) -> memoryview | IO[bytes]:
    if isinstance(content, str):
        content = _utf8("content", content)
    if isinstance(content, (bytes, bytearray, memoryview)):
        return memoryview(content).cast("B")
    if not hasattr(content, "read"):
        raise TypeError(f"content must be bytes, str or a binary file, not {type(content).__name__}")
    if isinstance(content, io.TextIOBase) or isinstance(content.read(0), str):
        raise TypeError("content is a file in text mode; open it with mode 'rb'")
    return content  # type: ignore[no-any-return]  # something with read()


def _size(content: memoryview | IO[bytes]) -> int | None:
    if isinstance(content, memoryview):
        return len(content)
    try:
        content.seek(0, os.SEEK_END)
        return content.tell()
    except (AttributeError, OSError):  # io.UnsupportedOperation is an OSError
        return None


def _local_files(local_path: str | os.PathLike[str], remote_path: str | None) -> list[tuple[Path, str]]:
    """Return what `upload_path` is to send, in the order of the sorted paths."""
    local = Path(local_path)
    if not local.is_dir():
        _check_regular(local, local)
        return [(local.resolve(), _path(local.name if remote_path is None else remote_path))]
    root = local.resolve()
    name = root.name if local.name in ("", "..") else local.name
    prefix = name if remote_path is None else _text("remote_path", remote_path).rstrip("/")
    files = [(real, f"{prefix}/{path.relative_to(local).as_posix()}") for path, real in sorted(_walk(local, root))]
    for _, remote in files:
        _utf8("path", remote)
    return files


# Files and folders that may be reached through links, each of which counts for ten: a few of them can lead to millions.
_LINKED_LIMIT = 100_000


class _Folder(NamedTuple):
    """A folder that is walked through; `real` is its path without links."""

    path: Path
    real: Path
    parent: _Folder | None
    is_linked: bool

    def is_in(self, real: Path) -> bool:
        folder: _Folder | None = self
        while folder is not None and folder.real != real:
            folder = folder.parent
        return folder is not None


def _walk(local: Path, root: Path) -> Iterator[tuple[Path, Path]]:
    """Yield the files below a folder, each also without links, through links as long as these stay below it."""
    linked = 0
    folders = [_Folder(local, root, None, is_linked=False)]
    while folders:
        folder = folders.pop()
        for real in folder.real.iterdir():
            path, is_link = folder.path / real.name, real.is_symlink()
            linked += 10 if is_link else folder.is_linked
            if linked > _LINKED_LIMIT:
                raise BoxerValidationError(f"{_shown(path)}: too many files are reached through links")
            target = _link_target(path, real, root, folder) if is_link else real
            if target.is_dir():
                folders.append(_Folder(path, target, folder, is_link or folder.is_linked))
            else:
                _check_regular(path, target)
                yield path, target


def _link_target(path: Path, real: Path, root: Path, folder: _Folder) -> Path:
    try:
        target = real.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # a loop is a RuntimeError before Python 3.13
        raise BoxerValidationError(f"{_shown(path)} is a link that leads nowhere; remove it") from error
    if folder.is_in(target):
        raise BoxerValidationError(f"{_shown(path)} is a link to a folder that it is in; remove it")
    if root not in target.parents:
        what = "is a link that leaves the folder; put a copy of the file in its place"
        raise BoxerValidationError(f"{_shown(path)} {what}")
    return target


def _check_regular(path: Path, real: Path) -> None:
    if not stat.S_ISREG(real.stat().st_mode):
        raise BoxerValidationError(f"{_shown(path)} is neither a file nor a folder, and cannot be uploaded")


def _opened(path: Path) -> IO[bytes]:
    """Open a file that was seen to be one; something else may have been put in its place since."""
    # Where the system has them: follow no link, and do not wait for who writes to a pipe.
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    file = open(path, "rb", opener=lambda name, _: os.open(name, flags))  # noqa: SIM115 - for its caller to close
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise BoxerValidationError(f"{_shown(path)} is not a file any more")


def _shown(path: Path) -> str:
    return repr(str(path))  # a name may have control characters in it


# ---- Responses -------------------------------------------------------------------------------------------------------


class _Head(NamedTuple):
    """The decoded head of a response, and what it says of the content: RFC 9112, section 6.3."""

    code: int
    msg: str  # the reason phrase
    field_lines: Sequence[tuple[str, str]]  # names in lower case
    fields: Mapping[str, str]  # of several with one name, all: RFC 9110, section 5.3
    is_success: bool
    is_reusable: bool = False  # another exchange may follow on the connection
    is_chunked: bool = False
    length: int = 0  # of the content; 0 if it is chunked; _ENDLESS: it goes on to the end of the connection


class _Response:
    """A final response: its head, and as much of its content as was wanted.

    `code`, `msg` and `info()` are what urllib's handlers look for.
    """

    content = b""
    is_cut = False  # the content was longer than the limit

    def __init__(self, head: _Head) -> None:
        self.head = head
        self.is_success = head.is_success

    @property
    def code(self) -> int:
        return self.head.code

    @property
    def msg(self) -> str:
        return self.head.msg

    def info(self) -> email.message.Message:
        message = email.message.Message()
        for name, value in self.head.field_lines:
            message[name] = value
        return message


_RESULT_MEMBERS = operator.itemgetter(*_RESULT_TYPES)


def _run_result(response: _Response, check: bool) -> RunResult:
    members = _json_object(response)
    try:
        result = RunResult(*_RESULT_MEMBERS(members))
    except KeyError as error:
        raise BoxerAPIError(f"the answer to a run has no {error}", response.code) from error
    except TypeError as error:
        raise BoxerAPIError(f"the answer to a run is not right: {error}", response.code) from error
    return result.check() if check else result


def _check_uploaded(response: _Response) -> None:
    if not isinstance(_json_object(response).get("path"), str):
        raise BoxerAPIError("the answer to an upload does not say where the file went", response.code)


def _file_content(response: _Response) -> bytes:
    if 300 <= response.code < 400 and response.head.fields.get("location", "").startswith("files/?path="):
        raise BoxerAPIError("the path is a folder; name a file in it", response.code)
    if response.code != 200 and response.is_success:
        raise BoxerAPIError(f"{_status(response)} is no whole file", response.code)
    return _checked(response).content


def _checked(response: _Response) -> _Response:
    """Return a successful response; raise the right error for any other."""
    if not response.is_success:
        raise _ERROR_OF_STATUS.get(response.code, BoxerAPIError)(_reason(response), response.code)
    if response.is_cut:
        raise BoxerAPIError(f"the answer is longer than {_ANSWER_LIMIT >> 20} MiB", response.code)
    coding = response.head.fields.get("content-encoding")
    if coding and coding.lower() != "identity":
        message = f"the answer came with Content-Encoding {_printable(coding.lower())[:40]!r}, which was not asked for"
        raise BoxerAPIError(message, response.code)
    return response


def _json_object(response: _Response) -> dict[str, Any]:
    content = _checked(response).content
    try:
        return _decoded_json_object(content)
    except ValueError as error:
        shown = _printable(content[:80].decode("utf-8", "replace"))
        message = f"the answer is not the JSON object it should be ({error}): {shown!r}"
        raise BoxerAPIError(message, response.code) from error


_JSON_SHAPE_LIMIT = 1024 * 1024  # bytes outside of strings


def _decoded_json_object(content: bytes) -> dict[str, Any]:
    if len(content) > _JSON_SHAPE_LIMIT:
        _check_shape(content)
    try:
        text = content.decode("utf-8").strip(" \t\n\r")
        value, end = _JSON_DECODER.raw_decode(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if end < len(text):
        raise ValueError("there is more behind it")
    if not isinstance(value, dict):
        raise ValueError(f"it is a {type(value).__name__}")
    return value


def _check_shape(content: bytes) -> None:
    """Refuse much JSON outside of strings: empty lists, say, take thirty times their size in memory once decoded."""
    content = content.replace(b"\\\\", b"..").replace(b'\\"', b"..")  # what is escaped ends no string
    outside = at = 0
    while outside <= _JSON_SHAPE_LIMIT and at < len(content):
        begin = content.find(b'"', at)
        end = content.find(b'"', begin + 1) if begin >= 0 else -1
        outside += (begin if end >= 0 else len(content)) + 1 - at
        at = end + 1 or len(content)
    if outside > _JSON_SHAPE_LIMIT:
        raise ValueError("there is too much of it beside text")


def _json_integer(digits: str) -> int:  # pragma: no cover - as any Python of today does
    if len(digits) > 4300:  # the time to convert grows with the square of the length
        raise ValueError("it has a number of more than 4300 digits")
    return int(digits)


_JSON_DECODER = json.JSONDecoder(parse_int=None if hasattr(sys, "get_int_max_str_digits") else _json_integer)


# What is not ended goes to the end: to look for an end that is not there, from each beginning, would take for ever.
_MARKUP = r"(?si)<!--.*?(?:-->|\Z)|<(style|script|title)\b.*?(?:</\1\s*>|\Z)|<[^<>]*>|&#\w{8,}"


def _reason(response: _Response) -> str:
    """Return what the server says for itself in an error, however it was sent, as one line of a sane length."""
    text = _server_error(response)
    if text is None:
        media_type = response.head.fields.get("content-type", "")
        latin = re.search(r"(?i)charset=\"?(iso-8859-1|latin-?1)\b", media_type)
        text = response.content[: 8 * _REASON_SIZE].decode("latin-1" if latin else "utf-8-sig", "replace")
        if text.lstrip()[:1] == "<":
            text = html.unescape(re.sub(_MARKUP, " ", text))
        text = f"{_status(response)}: {text}" if text.strip() else _status(response)
    if 300 <= response.code < 400:
        text += f" (redirects are not followed; Location: {response.head.fields.get('location', '')})"
    text = " ".join(_printable(text).split())
    return text if len(text) <= _REASON_SIZE else text[:_REASON_SIZE] + " …"


def _server_error(response: _Response) -> str | None:
    """Return the text of the server's own `{"error": text}`; None if that is not what the content is."""
    try:
        error = _decoded_json_object(response.content).get("error")
    except ValueError:
        return None
    return error if isinstance(error, str) and error.strip() else None


def _status(response: _Response) -> str:
    return f"{response.code} {_printable(response.msg[:_REASON_SIZE])}".strip()


# ---- Policy ----------------------------------------------------------------------------------------------------------


_CLIENT_DEFAULT: Any = ...  # the default of a parameter for which None has a meaning: the client's setting


class _Origin(NamedTuple):
    """Where a client's requests go, and how, as read from its base URL and the environment."""

    url: str  # without credentials
    scheme: str
    authority: str  # host, and port where it is not the scheme's own
    next_hop: str  # the authority to connect to: the origin's own, or a proxy's
    tunnel: str | None  # the authority to ask that proxy for, with CONNECT
    prefix: str  # what a request target begins with: a path, or for a proxy a whole URL (RFC 9112, section 3.2.2)
    fields: dict[str, str]  # of every request, names written as urllib's handlers look for them


class _Route(NamedTuple):
    """A way to an origin; connections of one route can stand in for each other."""

    scheme: str
    next_hop: str
    tunnel: str | None
    authorization: str | None  # for the proxy at the entry of the tunnel


def _route(scheme: str, next_hop: str, tunnel: str | None, fields: dict[str, str]) -> tuple[_Route, dict[str, str]]:
    """Return a route, and the fields for the origin: credentials for the proxy of a tunnel are that proxy's alone."""
    if tunnel is None:
        return _Route(scheme, next_hop, None, None), fields
    fields = dict(fields)
    return _Route(scheme, next_hop, tunnel, fields.pop("Proxy-authorization", None)), fields


_DEFAULT_PORTS = {"http": 80, "https": 443}


def _origin(base_url: str | None, headers: Mapping[str, str]) -> _Origin:
    if base_url is None:
        base_url = os.environ.get("BOXER_URL") or "http://localhost:8080"
    parts = _split_url(_text("base_url", base_url), "base_url")
    if parts.scheme not in _DEFAULT_PORTS:
        raise BoxerValidationError("base_url must begin with http:// or https://")
    if parts.query or parts.fragment:
        raise BoxerValidationError("base_url must have no query and no fragment")
    authority = _authority(parts, "base_url")
    path = urllib.parse.quote(_utf8("base_url", parts.path), safe="/%:@!$&'()*+,;=~").rstrip("/")
    url = f"{parts.scheme}://{authority}{path}"
    fields = {"Host": re.sub("%[^]]*", "", authority), **_COMMON_FIELDS, **_basic("Authorization", parts)}
    proxy = _proxy(parts, authority)
    fields.update({} if proxy is None else _basic("Proxy-authorization", proxy), **_checked_fields(headers))
    if proxy is None:
        fields.pop("Proxy-authorization", None)
        return _Origin(url, parts.scheme, authority, authority, None, path, fields)
    tunnel, prefix = (None, url) if parts.scheme == "http" else (authority, path)
    return _Origin(url, parts.scheme, authority, _authority(proxy, "the proxy"), tunnel, prefix, fields)


def _split_url(url: str, name: str) -> urllib.parse.SplitResult:
    # The URL may hold a password, so no message shows it. urlsplit drops some controls silently: look first.
    if not url.isprintable() or " " in url or "\\" in url:
        raise BoxerValidationError(f"{name} has a space, a backslash or a control character in it")
    try:
        parts = urllib.parse.urlsplit(url)
        valid = bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise BoxerValidationError(f"{name} is not a URL with a host, such as http://localhost:8080")
    return parts


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
    port = parts.port or _DEFAULT_PORTS[parts.scheme]
    return host if port == _DEFAULT_PORTS[parts.scheme] else f"{host}:{port}"


def _basic(name: str, parts: urllib.parse.SplitResult) -> dict[str, str]:
    """Return the field for the credentials in a URL (RFC 7617), if there are any."""
    if parts.username is None:
        return {}
    user, password = map(urllib.parse.unquote_to_bytes, (parts.username, parts.password or ""))
    if b":" in user:
        raise BoxerValidationError("the user name in a URL must have no colon")
    pair = user + b":" + password
    return {name: "Basic " + binascii.b2a_base64(pair, newline=False).decode("ascii")}


def _proxy(parts: urllib.parse.SplitResult, authority: str) -> urllib.parse.SplitResult | None:
    """Return the proxy that the environment names for a URL, as urllib reads it; none for this machine itself."""
    host = parts.hostname or ""
    if host in ("localhost", "::1") or re.fullmatch(r"127(\.[0-9]+){3}", host):
        return None
    if sys.platform not in ("darwin", "win32") and not any(name.lower().endswith("_proxy") for name in os.environ):
        return None
    _load("urllib.request")
    url = urllib.request.getproxies().get(parts.scheme)
    if not url or urllib.request.proxy_bypass(authority):
        return None
    proxy = _split_url(url if "://" in url else f"http://{url}", "the proxy")
    if proxy.scheme != "http":
        raise BoxerValidationError(f"{parts.scheme}_proxy must begin with http://: a proxy is spoken to in plain HTTP")
    return proxy


def _host_and_port(authority: str, default: int) -> tuple[str, int]:
    host, colon, port = authority.rpartition(":")
    if not colon or port.endswith("]"):
        host, port = authority, str(default)
    return host.strip("[]"), int(port)


_COMMON_FIELDS = {"User-agent": f"boxer-sdk/{__version__}", "Accept-encoding": "identity"}
# Fields that the framing of a request, or what the client promises of itself, hangs on.
_OWN_FIELDS = {"accept-encoding", "connection", "content-length", "content-type", "expect", "host", "keep-alive", "te"}
_OWN_FIELDS |= {"trailer", "transfer-encoding", "upgrade"}
_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # RFC 9110, section 5.6.2  # noqa: S105


def _checked_fields(headers: Mapping[str, str]) -> dict[str, str]:
    fields = {}
    for name, value in headers.items():
        if not re.fullmatch(_TOKEN, _text("each name in headers", name)):  # and is not shown: it may be a whole line
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
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise BoxerValidationError(f"{name} must be a number of seconds above 0, or None for no limit, not {value!r}")
    return float(value) if value < 1e300 else math.inf


def _count(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise BoxerValidationError(f"{name} must be a whole number, {least} or more, not {value!r}")
    return int(value)


# The server's race: the output of a short program that did run is lost. Each try is lost with a chance of about one in
# three, so that one call in 10^7 uses up the allowance.
_RACE = r"read std(out|err): .*file already closed"
_RACE_TRIES = 15
# Reasons of the server for a 500 that another try will meet again.
_LASTING = ("image pull failed", "spec build failed", "network setup failed", "start runsc: context")


class _Call:
    """One call of a client's method: its deadline, and what may be tried again when a try has failed.

    `timeout` bounds the wait for an answer as a whole. While the content of a file is on its way, `is_sending` or
    `is_receiving`, the deadline is pushed back whenever some of it has moved.
    """

    is_sending = is_receiving = False
    was_sent = False  # by a try that is over
    abort: Callable[[_Call], Any] | None = None  # breaks off what is going on
    _tries = _race_tries = 0  # made after the first, and after one that the server's race has lost

    def __init__(self, request: _Request, timeout: float, retries: int) -> None:
        self.request = request
        self.timeout = timeout + request.allowance
        self._end = time.monotonic() + self.timeout
        self._retries = retries

    def cancel(self) -> None:
        """End the call from another thread."""
        self.timeout = self._end = -math.inf
        self.break_off()

    def break_off(self) -> None:
        """End what the call is at."""
        abort = self.abort  # another thread may be about to set another one, or None
        if abort is not None:
            abort(self)

    @property
    def left(self) -> float:
        """Seconds to the deadline, never more than an operating system can wait for; 0 or less: it has passed."""
        return min(self._end - time.monotonic(), _LONGEST_WAIT)

    def seconds_to_wait(self, peer: str) -> float:
        """Return how long to wait until it is time to look again, or to give up; raise the error if it is."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise self.timed_out(peer)
        if self.is_sending:
            left = max(0.0, min(left, self.timeout / 4))  # the call may be cancelled meanwhile
        return min(left, _LONGEST_WAIT)

    def moved(self) -> None:
        """Push the deadline back, since some content has moved."""
        self._end = time.monotonic() + self.timeout

    def waited(self, seconds: float) -> None:
        """Do not count the wait for a free connection."""
        self._end += seconds

    def timed_out(self, peer: str) -> BoxerTimeoutError:
        what = "no progress" if self.is_sending or self.is_receiving else "no complete answer"
        return BoxerTimeoutError(f"{peer}: {what} within {self.timeout:g} s; the client gave up", 0)

    def goes_once_more(self, error: BoxerConnectionError) -> bool:
        """Decide whether a request goes out again, silently, because the kept connection it was sent on was dead."""
        self.was_sent = self.was_sent or error.request_sent
        return self._can_be_sent and self._is_harmless(error)

    def pause_after(self, outcome: _Response | BoxerConnectionError) -> float | None:
        """Decide what follows a try that failed: another one after so many seconds, or (None) nothing."""
        if not self._can_be_sent:
            return None
        if self._race_tries < _RACE_TRIES and self._is_race(outcome):
            self._race_tries += 1
            return self._within_deadline(outcome, random.uniform(0.01, 0.05), logging.DEBUG)
        if self._tries >= self._retries or not self._may_be_tried_again(outcome):
            return None
        self._tries += 1
        pause = random.uniform(0.5, 1.0) * min(0.25 * 2 ** min(self._tries, 5), 8.0)
        if isinstance(outcome, _Response):
            pause = max(pause, _retry_after(outcome.head.fields.get("retry-after", "")))
        return self._within_deadline(outcome, pause, logging.WARNING)

    def _is_race(self, outcome: _Response | BoxerConnectionError) -> bool:
        """Tell whether the server's race has lost the output of a run that may be sent again."""
        if not self._retries or not self.request.is_run or self.request.has_network:
            return False
        error = _server_error(outcome) if isinstance(outcome, _Response) and outcome.code == 500 else None
        return bool(re.match(_RACE, error or ""))

    @property
    def _can_be_sent(self) -> bool:
        return not isinstance(self.request.body, _Multipart) or self.request.body.can_be_sent

    def _may_be_tried_again(self, outcome: _Response | BoxerConnectionError) -> bool:
        if isinstance(outcome, BoxerConnectionError):
            return self._is_harmless(outcome) and not hasattr(outcome.__cause__, "verify_code")  # of ssl
        if outcome.code == 500:
            error = _server_error(outcome)
            return error is not None and not error.startswith(_LASTING)
        return outcome.code in (429, 503)

    def _is_harmless(self, error: BoxerConnectionError) -> bool:
        """Tell whether a request can be sent again after an error: it was not sent, or it is a GET that was lost."""
        return not error.request_sent or (self.request.method == "GET" and isinstance(error.__cause__, OSError))

    def _within_deadline(self, outcome: _Response | BoxerConnectionError, pause: float, level: int) -> float | None:
        if pause >= self.left:
            return None
        path = self.request.target.partition("?")[0]
        reason = _reason(outcome) if isinstance(outcome, _Response) else str(outcome)
        _LOG.log(level, "%s %s: %s; trying again in %.2f s", self.request.method, path, reason[:200], pause)
        return pause


def _retry_after(value: str) -> float:
    """Return the seconds that a Retry-After field asks to wait for (RFC 9110, section 10.2.3); 0 if it is none."""
    if re.fullmatch("[0-9]+", value):
        return float(value)
    try:
        date: Any = email.utils.parsedate_tz(value)
        return email.utils.mktime_tz((*date[:9], date[9] or 0)) - time.time()
    except (IndexError, OverflowError, TypeError, ValueError):
        return 0.0


# ---- Wire ------------------------------------------------------------------------------------------------------------
#
# RFC 9112, strictly: what could be read in two ways is an error, since the two readers may be a proxy and this client.
# ----------------------------------------------------------------------------------------------------------------------

_HEAD_LIMIT = 64 * 1024  # bytes of a head, or of a trailer section
_FIELD_LIMIT = 100
_INTERIM_LIMIT = 20  # 1xx responses before the final one
_CHUNK_HEAD_LIMIT = 4 * 1024  # bytes of a chunk's size and extensions
_ERROR_LIMIT = 64 * 1024  # bytes of an error's content; what follows is of no use

_STATUS_LINE = re.compile(r"HTTP/1\.([0-9]) ([1-9][0-9]{2})(?: ([^\x00-\x08\x0a-\x1f\x7f]*))?")
_FIELD_LINE = re.compile(rf"({_TOKEN}):([^\x00-\x08\x0a-\x1f\x7f]*)")
_BARE_LF = re.compile(rb"(?<!\r)\n")
_CHUNK_HEAD = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[^\x00-\x08\x0a-\x1f\x7f]*)?")


class _ProtocolError(Exception):
    """What arrived is no response."""


class _LostError(_ProtocolError, ConnectionError):
    """The connection ended before the response did."""


class _TlsError(_ProtocolError):
    """TLS failed; `__cause__` is the ssl.SSLError."""


def _encoded_fields(fields: Mapping[str, str]) -> str:
    return "".join([f"{name}: {value}\r\n" for name, value in fields.items()])


def _encoded_head(method: str, target: str, fields: str) -> bytes:
    """Encode a head whose parts have been checked before."""
    return f"{method} {target} HTTP/1.1\r\n{fields}\r\n".encode("latin-1")


class _Decoder:
    """Decode the response to one request from bytes as they arrive.

    `response` is there once its head is, with its content once `is_complete`. Then `is_reusable` tells whether this
    allows another request on the connection, and `rest` is what came after the response.
    """

    response: _Response = None  # type: ignore[assignment]  # until its head is there
    is_complete = is_reusable = False
    size = 0  # of the content that was decoded so far, in bytes; 0 if all came at once
    rest = b""  # what has arrived and is not decoded
    _is_new = True  # nothing has arrived
    _searched = 0  # how far into what is not decoded a delimiter has been looked for
    _left = 0  # bytes of the content, or of a chunk, that are still to come
    _content: io.BytesIO | None = None  # its getvalue() shares the buffer: content is in memory once
    _interim = 0  # responses before the final one

    def __init__(self, content_limit: int, is_tunnel: bool = False) -> None:
        self._limit = content_limit
        self._is_tunnel = is_tunnel  # to be opened by a CONNECT
        # What comes next: it takes what it can of some bytes from a position on, and returns where that ends.
        self._step: Callable[[_Decoder, Any, int], int] = _Decoder._take_head

    @property
    def is_file(self) -> bool:
        """The content is that of a file, of which there may be any amount."""
        return self._limit == _ENDLESS

    def feed(self, data: bytes | memoryview) -> None:
        """Decode what arrived; a memoryview, which is not kept, can be only of content that is not chunked."""
        if self._is_new:
            self._is_new = False
            if self._take_all(data):
                return
        elif self.rest:
            data = b"".join((self.rest, data))
        at = 0
        while not self.is_complete:
            end = self._step(self, data, at)
            if end == at:
                break
            at = end
        self.rest = bytes(data[at:])

    def _take_all(self, data: Any) -> bool:
        """Take a successful response that has come as a whole, as nearly all do, in half of the time of the steps."""
        end = data.find(b"\r\n\r\n")
        if not (0 <= end <= _HEAD_LIMIT and data.startswith(b"HTTP/1.")):
            return False
        head, content = _decoded_head(data[:end], self._is_tunnel), data[end + 4 :]
        if not head.is_success or head.is_chunked or not head.length == len(content) <= self._limit:
            return False
        response = self.response = _Response(head)
        response.content = content
        self.is_reusable, self.is_complete = head.is_reusable, True
        return True

    def end(self, clean: bool) -> None:
        """Decode the end of the connection."""
        if self.response is None:
            raise _LostError("the connection ended within the head" if self.rest else "it closed before an answer came")
        if self.response.head.length != _ENDLESS or not clean:
            raise _LostError(f"the connection ended within the content, after {self.size} bytes of it")
        self._complete(b"")

    def _complete(self, last: bytes | memoryview) -> None:
        if self._content is None:
            self.response.content = bytes(last)  # most content comes at once
        else:
            self._content.write(last)
            self.response.content = self._content.getvalue()
        self.is_complete = True

    def _take_head(self, data: bytes, at: int) -> int:
        """Take the head of a final response, or of an interim one, of which nothing is of use."""
        begin = data[at : at + 16]
        if not b"HTTP/1.".startswith(begin[:7]):
            raise _ProtocolError(f"it does not speak HTTP/1.1 (is the URL right?); the head begins with {begin!r}")
        end = self._find(b"\r\n\r\n", data, at, _HEAD_LIMIT, "the head")
        if end < 0:
            return at
        head = _decoded_head(data[at:end], self._is_tunnel)
        if head.code >= 200:
            self.response, self.is_reusable, self._left = _Response(head), head.is_reusable, head.length
            if not head.is_success:
                self._limit = _ERROR_LIMIT
            self._step = _Decoder._take_chunk_head if head.is_chunked else _Decoder._take_content
        elif head.code == 101:
            raise _ProtocolError("it switched to another protocol, which was not asked for")
        else:
            self._interim += 1
            if self._interim > _INTERIM_LIMIT:
                raise _ProtocolError("there were too many interim answers")
        return end + 4

    def _take_content(self, data: bytes | memoryview, at: int) -> int:
        """Take what there is of content that has a length, or of a chunk; stop at the limit."""
        piece = data[at : at + self._left]
        size = len(piece)
        self._left -= size
        self.size += size
        if self.size > self._limit:
            piece, self.size = piece[: self._limit - self.size], self._limit  # without what is beyond it
            self.response.is_cut, self.is_reusable = True, False
            self._complete(piece)
        elif self._left == 0 and not self.response.head.is_chunked:
            self._complete(piece)
        elif size:
            self._content = self._content or io.BytesIO()
            self._content.write(piece)
            if self._left == 0:
                self._step = _Decoder._take_chunk_end
        return at + size

    def _take_chunk_head(self, data: bytes, at: int) -> int:
        end = self._find(b"\r\n", data, at, _CHUNK_HEAD_LIMIT, "a chunk's head")
        if end < 0:
            return at
        match = _CHUNK_HEAD.fullmatch(data, at, end)
        if not match:
            raise _ProtocolError(f"the size of a chunk is malformed: {data[at:end][:40]!r}")
        self._left = int(match[1], 16)
        self._step = _Decoder._take_content if self._left else _Decoder._take_trailer
        return end + 2

    def _take_chunk_end(self, data: bytes, at: int) -> int:
        if self._find(b"\r\n", data, at, 0, "the end of a chunk") < 0:
            return at
        self._step = _Decoder._take_chunk_head
        return at + 2

    def _take_trailer(self, data: bytes, at: int) -> int:
        """Take the trailer section, of which nothing is of use: it ends with an empty line."""
        begin = data[at : at + 2]
        if begin in (b"", b"\r"):
            return at
        if begin == b"\r\n":
            self._complete(b"")
            return at + 2
        end = self._find(b"\r\n\r\n", data, at, _HEAD_LIMIT, "the trailer section")
        if end < 0:
            return at
        _decoded_fields(data[at:end].decode("latin-1").split("\r\n"))
        self._complete(b"")
        return end + 4

    def _find(self, delimiter: bytes, data: bytes, at: int, limit: int, what: str) -> int:
        """Return where a delimiter is; -1 if it is still to come."""
        end = data.find(delimiter, at + self._searched, at + limit + len(delimiter))
        if end >= 0:
            self._searched = 0
            return end
        searched = max(0, len(data) - len(delimiter) + 1 - at)
        if searched > limit:
            raise _ProtocolError(f"{what} is longer than {limit} bytes")
        if _BARE_LF.search(data, at + self._searched):
            raise _ProtocolError(f"a line of {what} does not end with CRLF")
        self._searched = searched
        return -1


# A server's heads differ in little, and within a second often in nothing. With this cache a head that was seen before
# takes 0.1 µs; one in which a line is new takes 4, with the cache of lines below, and else 6.


@functools.lru_cache(maxsize=32)
def _decoded_head(data: bytes, is_tunnel: bool) -> _Head:
    line, *lines = data.decode("latin-1").split("\r\n")
    match = _STATUS_LINE.fullmatch(line)
    if not match:
        raise _ProtocolError(f"the status line is malformed: {line[:80]!r}")
    is_old, code, field_lines = match[1] == "0", int(match[2]), _decoded_fields(lines)
    fields = _combined(field_lines)
    has_content = code >= 200 and code not in (204, 304) and not (is_tunnel and code < 300)
    is_chunked, length = _framing(fields, is_old) if has_content else (False, 0)
    options = [option.strip() for option in fields.get("connection", "").lower().split(",")]
    is_reusable = length < _ENDLESS and not is_old and "close" not in options
    return _Head(code, match[3] or "", field_lines, fields, 200 <= code < 300, is_reusable, is_chunked, length)


def _framing(fields: Mapping[str, str], is_old: bool) -> tuple[bool, int]:
    """Return whether the content is chunked, and its length (see _Head): RFC 9112, section 6.3."""
    coding, length = fields.get("transfer-encoding"), fields.get("content-length")
    if coding is None:
        return False, _ENDLESS if length is None else _decoded_length(length)
    if is_old or length is not None or coding.lower() != "chunked":
        raise _ProtocolError(f"Transfer-Encoding {coding[:40]!r} cannot be decoded here")
    return True, 0


def _decoded_fields(lines: list[str]) -> list[tuple[str, str]]:
    if len(lines) > _FIELD_LIMIT:
        raise _ProtocolError(f"there are more than {_FIELD_LIMIT} fields")
    return [*map(_decoded_field, lines)]


@functools.lru_cache(maxsize=64)
def _decoded_field(line: str) -> tuple[str, str]:
    match = _FIELD_LINE.fullmatch(line)
    if not match:
        raise _ProtocolError(f"a field line is malformed: {line[:80]!r}")
    return match[1].lower(), match[2].strip(" \t")


def _combined(lines: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return fields by name."""
    fields = dict(lines)
    if len(fields) < len(lines):
        return {name: ", ".join([value for other, value in lines if other == name]) for name in fields}
    return fields


def _decoded_length(value: str) -> int:
    """Decode Content-Length; repeated, it is valid if it says the same each time (RFC 9112, section 6.3)."""
    length, *others = {length.strip(" \t") for length in value.split(",")} if "," in value else (value,)
    if others or not (length.isascii() and length.isdecimal() and len(length) <= 18):
        raise _ProtocolError(f"Content-Length {value[:40]!r} is not a length")
    return int(length)


_TLS_RECORD = 16 * 1024  # the most that one record can hold
_Move = Callable[[Union[bytes, memoryview], bool], Awaitable[Union[bytes, memoryview, None]]]  # see _Connection.move


@contextlib.contextmanager
def _tls_errors() -> Iterator[None]:
    try:
        yield
    except ssl.SSLError as error:
        raise _TlsError(f"TLS failed: {error}") from error


class _Tls:
    """TLS over the `move` of a connection, and as a `move` of its own."""

    def __init__(self, context: ssl.SSLContext, host: str, move: _Move) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        with _tls_errors():
            self._object = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        self._move = move
        self.partial = b""  # what arrived of a record that is not complete
        self._is_fresh = True  # what came with the end of the handshake may still be here, and not be decrypted
        self._has_ended = False  # with a close_notify
        self.lost: ssl.SSLError | None = None  # ended without, or broken

    async def handshake(self) -> None:
        is_done = False
        while not is_done:
            with _tls_errors(), contextlib.suppress(ssl.SSLWantReadError):
                self._object.do_handshake()
                is_done = True
            received = await self._move(self._outgoing.read(), not is_done)
            if received is not None:
                self._put(received)

    async def move(self, data: bytes | memoryview, waits: bool) -> bytes | memoryview | None:
        """Do as `_Connection.move` says, over TLS."""
        if data and self.is_open:
            with _tls_errors():
                self._object.write(data)
        while self.is_open:
            # What was written, or an answer of TLS's own: to new keys, say.
            received = await self._move(self._outgoing.read(), waits and not self._is_fresh)
            decrypted = self._decrypted(received) if received is not None or self._is_fresh else b""
            self._is_fresh = False
            if decrypted or not waits:
                return decrypted or None
        return b""

    @property
    def is_open(self) -> bool:
        return not self._has_ended and self.lost is None

    @property
    def is_at_rest(self) -> bool:
        """Nothing has begun to arrive."""
        return self.is_open and not self.partial

    def _decrypted(self, data: bytes | memoryview | None) -> bytes:
        """Decrypt what arrived (None: before); it may come to nothing, as session tickets do."""
        if data:
            self._put(data)
        pieces = []
        try:
            while not self._has_ended:
                pieces.append(self._object.read(_TLS_RECORD))
                self._has_ended = not pieces[-1]
        except ssl.SSLWantReadError:
            # Said here, since OpenSSL may have been told not to.
            if data == b"":
                self.lost = ssl.SSLEOFError(ssl.SSL_ERROR_EOF, "the connection ended without a close_notify")
        except ssl.SSLError as error:
            self.lost = error
        return b"".join(pieces)

    def _put(self, data: bytes | memoryview) -> None:
        if not data:
            self._incoming.write_eof()
            return
        self._incoming.write(data)
        data, at = self.partial + data, 0
        while len(data) >= at + 5:  # a record's header, with its length: RFC 8446, section 5.1
            end = at + 5 + int.from_bytes(data[at + 3 : at + 5], "big")
            if end > len(data):
                break
            at = end
        self.partial = data[at:]


# ---- Both clients ----------------------------------------------------------------------------------------------------


_READ, _WRITE = getattr(select, "POLLIN", 1), getattr(select, "POLLOUT", 4)

# Bytes to receive at a time, unless more are to come: then up to a _PIECE is received into room that is used again,
# since to get new memory from the system for each takes a fifth of the time of a large download.
_SMALL_PIECE = 16 * 1024


class _SelectPoll:
    """select.poll where there is none, as on Windows, whose select() can watch any socket."""

    def register(self, sock: socket.socket, events: int) -> None:
        self._sock, self._events = sock, events

    def poll(self, milliseconds: float) -> list[Any]:
        reading, writing = ([self._sock] if self._events & event else [] for event in (_READ, _WRITE))
        return [*itertools.chain(*select.select(reading, writing, writing, milliseconds / 1000))]


class _Connection:
    """A connection over a non-blocking socket: what is said over it, and what became of it.

    How to wait is for each client to say.
    """

    def __init__(self, route: _Route, peer: str) -> None:
        self.route = route
        self.peer = peer
        self.call: _Call = None  # type: ignore[assignment]  # whose request is being exchanged; None: it is idle
        self.is_reusable = False  # the last exchange left it fit for another one
        self.idle_since = 0.0
        self.has_sent = False  # some of the request that is being exchanged
        self.lost: Exception | None = None  # why the connection ended, if not by a proper close
        self._is_cut_short = False  # some of a request was never sent: the connection was lost, or the answer early
        self._socket: socket.socket = None  # type: ignore[assignment]
        self._process = os.getpid()
        self._poll: Any = getattr(select, "poll", _SelectPoll)()
        self._watched = 0  # the events that it looks for
        self._unsent: bytes | memoryview = b""  # what was to be sent and is not yet, since the peer does not take it
        self._room: memoryview | None = None  # to receive content into, of which a memoryview can be decoded
        self._given = 0  # bytes of an upload, so far
        self._moved = 0  # bytes of a file that the peer had taken, or sent, when progress was last seen
        self._tls: _Tls | None = None

    def _make_socket(self, address: Any) -> None:
        family, kind, protocol, _, _ = address
        self._socket = socket.socket(family, kind, protocol)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def open(self, context: ssl.SSLContext | None) -> _Response | None:
        """Make a way to the origin, through the proxy and TLS; return the proxy's refusal, if it refuses."""
        route = self.route
        try:
            if route.tunnel is not None:
                refusal = await self._tunnel(route)
                if refusal is not None:
                    return refusal
            if context is not None:
                host, _ = _host_and_port(route.tunnel or route.next_hop, 443)
                self._tls = _Tls(context, host.partition("%")[0], self.move)
                await self._tls.handshake()
        except _ProtocolError as error:
            cause = error.__cause__ or self.lost or error
            raise BoxerConnectionError(f"{self.peer}: {error}", request_sent=False) from cause
        return None

    async def _tunnel(self, route: _Route) -> _Response | None:
        host, port = _host_and_port(route.tunnel or "", 443)
        authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        fields = {"Host": authority, "User-agent": _COMMON_FIELDS["User-agent"]}
        if route.authorization:
            fields["Proxy-authorization"] = route.authorization
        data = _encoded_head("CONNECT", authority, _encoded_fields(fields))
        decoder = _Decoder(_ERROR_LIMIT, is_tunnel=True)
        while not decoder.is_complete:
            received = await self.move(data, True)
            data = b""
            decoder.feed(received) if received else decoder.end(clean=self.lost is None)
        response = decoder.response
        if not response.is_success:
            return response
        if decoder.rest:
            raise _ProtocolError("the proxy opened a tunnel, and said something of its own in it")
        return None

    async def exchange(self, head: bytes) -> _Response:
        """Send a request until it is sent or answered, and receive its response."""
        call, tls = self.call, self._tls
        request, move = call.request, tls.move if tls else self.move
        body, decoder = request.body, _Decoder(request.content_limit)
        self.has_sent = call.is_sending = call.is_receiving = False
        try:
            data = head + body if isinstance(body, bytes) else await self._upload(head, body, decoder, move)
            while not decoder.is_complete:
                if decoder.response is not None:
                    self._see_content(decoder)
                received = await move(data, True)
                data = b""
                decoder.feed(received) if received else decoder.end(clean=self._loss is None)
        except _ProtocolError as error:
            why = f" ({self._loss})" if self._loss else ""
            cause = self._loss or error.__cause__ or error
            raise BoxerConnectionError(f"{self.peer}: {error}{why}", self.has_sent) from cause
        self._room = None  # which an idle connection does not need
        was_sent = not (self._unsent or self._is_cut_short)
        if decoder.response.is_success and not was_sent:
            message = f"{self.peer}: it reported success before it had all of the request"
            raise BoxerConnectionError(message, self.has_sent)
        self.is_reusable = was_sent and decoder.is_reusable and not decoder.rest and (tls is None or tls.is_at_rest)
        return decoder.response

    @property
    def _loss(self) -> Exception | None:
        return self.lost or (self._tls.lost if self._tls else None)

    async def _upload(self, head: bytes, upload: _Multipart, decoder: _Decoder, move: _Move) -> bytes | memoryview:
        """Send a request up to its last piece, which is returned, or until its answer comes."""
        pieces = upload.pieces(_PIECE if self._tls else _FILE_PIECE)  # TLS keeps room for two
        data: bytes | memoryview = head + next(pieces)
        self._given, self._moved, self.call.is_sending = len(data), 0, True
        while decoder.response is None and not upload.is_given:
            received = await move(data, False)
            data = b""
            if received is not None:
                decoder.feed(received) if received else decoder.end(clean=self._loss is None)
            elif not self._unsent:
                data = await self.next_piece(upload, pieces)
                self._given += len(data)
        self._is_cut_short = self._is_cut_short or not upload.is_given
        return data

    def _see_content(self, decoder: _Decoder) -> None:
        """Get ready for the rest of a response; push the deadline back if more of a file has arrived."""
        call, response = self.call, decoder.response
        call.is_sending, length = False, response.head.length
        if self._room is None and response.is_success and decoder.size + _SMALL_PIECE < length < _ENDLESS:
            self._room = memoryview(bytearray(min(length - decoder.size, _PIECE)))
        if decoder.is_file and (not call.is_receiving or decoder.size > self._moved):
            call.is_receiving, self._moved = True, decoder.size
            call.moved()

    async def move(self, data: bytes | memoryview, waits: bool) -> bytes | memoryview | None:
        """Send bytes, and those that are still unsent; return what arrives. It is never empty but at the end: b"".

        If it `waits`, then until something arrives; else until all is sent, and None if nothing has arrived by then. At
        the end of the connection `lost` says whether it was lost. A memoryview is good until the next move.
        """
        if data:
            self._send(b"".join((self._unsent, data)) if self._unsent else data)
        call = self.call
        while True:
            if call.is_sending:
                self._see_progress()
            seconds = call.seconds_to_wait(self.peer)
            if self.lost:
                return self._receive() or b""  # nothing more arrives than has
            if waits or self._unsent:
                received = await self._arrival(seconds)
            else:  # while a file is sent, the server may have refused it already
                received = self._receive()
            if received is not None or not (waits or self._unsent):
                return received
            self._send(self._unsent)

    def _see_progress(self) -> None:
        """Push the deadline back if the peer has taken some more of an upload."""
        taken = self._given - len(self._unsent) - _in_transit(self._socket)
        if taken > self._moved:
            self._moved = taken
            self.call.moved()

    def _send(self, data: bytes | memoryview) -> None:
        """Send what the peer takes; what it does not is `_unsent`."""
        try:
            while data:
                sent = self._socket.send(data)
                self.has_sent = True
                data = memoryview(data)[sent:] if sent < len(data) else b""
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:  # what the server said before may still be there to be read
            self.lost, self._is_cut_short = self.lost or error, True
            data = b""
        self._unsent = data

    def _receive(self) -> bytes | memoryview | None:
        """Return what has arrived, or None if nothing has."""
        try:
            if self._room is None:
                return self._socket.recv(_SMALL_PIECE)
            return self._room[: self._socket.recv_into(self._room)]
        except (BlockingIOError, InterruptedError):
            return None
        except OSError as error:
            self.lost = self.lost or error
            return b""

    def _events(self, events: int, seconds: float) -> list[Any]:
        """Wait until the socket can be read, or written to, or has failed; return nothing if it did not come to it."""
        if events != self._watched:
            self._watched = events
            self._poll.register(self._socket, events)
        return self._poll.poll(1000 * seconds)  # type: ignore[no-any-return]

    def is_quiet(self) -> bool:
        """Tell whether the connection is open, and nothing has arrived on it."""
        return self._socket.fileno() >= 0 and not self._events(_READ, 0)

    def close(self) -> None:
        """Close the connection at once, if it is open; in a forked child, just its copy: its parent goes on with it."""
        if self._socket is not None:
            if self._process == os.getpid():
                self._shut_down()
            self._socket.close()

    def abort(self) -> None:
        """Break off what is going on over the connection, from another thread or task."""
        self.lost = self.lost or ConnectionAbortedError("broken off by this client")
        if self._socket is not None:
            self._shut_down()

    def _shut_down(self) -> None:
        """Tell the peer that it is over, even if a forked child has a copy of the socket."""
        with contextlib.suppress(OSError):  # it may be closed already
            self._socket.shutdown(socket.SHUT_RDWR)

    # What blocks in one client and awaits in the other.

    async def connect(self, address: Any, seconds: float) -> None:
        """Connect to one of the addresses that socket.getaddrinfo has returned; raise OSError if that fails."""
        raise NotImplementedError

    async def _arrival(self, seconds: float) -> bytes | memoryview | None:
        """Wait for what arrives; None: nothing has in so many seconds, or more can be sent of what is unsent."""
        raise NotImplementedError

    async def next_piece(self, upload: _Multipart, pieces: Iterator[bytes | memoryview]) -> bytes | memoryview:
        """Return the next piece of content, which may have to be read from a file."""
        raise NotImplementedError


def _in_transit(sock: socket.socket) -> int:
    """Return how many bytes the system has taken, and not got across, where it tells: it takes megabytes."""
    try:
        return int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    except (AttributeError, OSError, ValueError):
        return 0


# Seconds after which an idle connection is not used any more: servers and what stands before them close theirs after
# 5 s or more, and a request that meets the close on its way is lost.
_IDLE_LIMIT = 4.0


class _Pool(Generic[_C]):
    """The connections of a client: those that are idle, and those in use, each by one call.

    An interrupt may come between any two steps of what the blocking client does. So what a call has, or waits for,
    stands in these tables before it is had; `leave` and `pause` give it back, and if they were broken off, `mend` does.
    """

    def __init__(self, size: int) -> None:
        self.is_closed = False
        self._size = size
        self._lock = threading.RLock()  # a Lock but for `mend`
        self._idle: dict[_C, None] = {}  # a set, the one that was used last at the end
        self._busy: dict[_Call, _C | None] = {}  # the calls that may have a connection, with the one that they have
        self._waiting: collections.OrderedDict[_Call, Any] = collections.OrderedDict()  # the others, with their turns
        self._pausing: set[_Call] = set()  # between two tries

    async def exchange(self, route: _Route, context: ssl.SSLContext | None, head: bytes, call: _Call) -> _Response:
        """Send a request over an idle connection or a new one, and receive its response."""
        try:
            connection, turn = self._take(route, call)
            if turn is not None:
                await self._wait_for_turn(turn, call)
                connection, _ = self._take(route, call)
            if connection is not None:
                try:
                    return await connection.exchange(head)
                except BoxerConnectionError as error:
                    if not call.goes_once_more(error):
                        raise
                    connection.close()
            connection = await self._connect(route, call)
            return await connection.open(context) or await connection.exchange(head)
        finally:
            self.leave(call)

    async def _wait_for_turn(self, turn: Any, call: _Call) -> None:
        since = time.monotonic()
        await self._wait(turn, call)
        call.waited(time.monotonic() - since)
        if call not in self._busy:
            raise self._stopped(call, "while it waited for its turn")

    async def _wait(self, bell: Any, call: _Call, *seconds: float) -> None:
        """Wait for a bell, unless the call is broken off."""
        call.abort = lambda _: bell.set()
        if not self.is_closed and call.left > 0:
            await bell.wait(*seconds)

    def leave(self, call: _Call) -> None:
        """Take back what a call has: keep its connection if it may be used again, and let the next call have a turn."""
        with self._lock:
            connection = self._busy.get(call)
            if connection is not None and connection.call is call:
                self._keep(connection) if connection.is_reusable and not self.is_closed else connection.close()
                connection.call = None  # type: ignore[assignment]  # and with it what was sent
            self._busy.pop(call, None)
            if self._waiting:
                self._waiting.pop(call, None)
                self._let_go_on()

    def _let_go_on(self) -> None:
        """Let those who wait have their turns."""
        while self._waiting:
            following, turn = next(iter(self._waiting.items()))
            if len(self._busy) >= self._size and following not in self._busy:
                break
            self._busy.setdefault(following)  # before it wakes and looks for itself there
            turn.set()
            del self._waiting[following]

    def mend(self, call: _Call) -> None:
        """Take back what an interrupted call has."""
        self._pausing.discard(call)
        self.leave(call)
        self.unlock()

    def unlock(self) -> None:
        """Release the lock if an interrupt has kept this thread from doing so, as it can on Python 3.9."""
        with contextlib.suppress(RuntimeError):  # now it is not this thread's
            while True:
                self._lock.release()

    def _keep(self, connection: _C) -> None:
        """Keep an idle connection, and close one that has been idle for too long."""
        connection.idle_since = time.monotonic()
        self._idle[connection] = None
        if len(self._idle) > 1 and next(iter(self._idle)).idle_since < connection.idle_since - _IDLE_LIMIT:
            self._close_oldest()

    def _close_oldest(self) -> None:
        oldest = next(iter(self._idle))
        oldest.close()
        del self._idle[oldest]

    def _take(self, route: _Route, call: _Call) -> tuple[_C | None, Any]:
        """Return an idle connection that is fit for use, or a turn to wait for; if neither, the call may connect."""
        while True:
            with self._lock:
                if len(self._busy) >= self._size and call not in self._busy:
                    turn = self._waiting[call] = self._new_bell()  # first come, first served
                    return None, turn
                for connection in reversed(self._idle):
                    if connection.route == route:
                        break
                else:
                    self._busy[call] = None
                    if len(self._idle) + len(self._busy) > self._size:  # with connections of other routes
                        self._close_oldest()
                    return None, None
                connection.is_reusable = False
                self._hold(call, connection)
                del self._idle[connection]
            if time.monotonic() < connection.idle_since + _IDLE_LIMIT and connection.is_quiet():
                return connection, None
            connection.close()

    def _hold(self, call: _Call, connection: _C) -> None:
        connection.call = call
        self._busy[call] = connection
        call.abort = self._break_off

    def _break_off(self, call: _Call) -> None:
        """Abort a call's connection, if it still is the call's."""
        with self._lock:
            connection = self._busy.get(call)
            if connection is not None:  # pragma: no branch - the call may have none yet, or not any more
                connection.abort()

    def _stopped(self, call: _Call, peer: str) -> BoxerError:
        """Return the error for a call that cannot go on: this client has been closed, or its time is up."""
        if self.is_closed:
            return BoxerConnectionError(f"{peer}: the client was closed", call.was_sent)
        return call.timed_out(peer)

    async def _connect(self, route: _Route, call: _Call) -> _C:
        """Connect to the first of a name's addresses that lets it."""
        host, port = _host_and_port(route.next_hop, _DEFAULT_PORTS["http" if route.tunnel else route.scheme])
        peer, last = f"{host}:{port}", None
        call.is_sending = call.is_receiving = False
        addresses: Sequence[Any] = ()
        try:
            addresses = () if self.is_closed else await self._addresses(host, port, call)
        except OSError as error:
            last = error
        for position, address in enumerate(addresses):
            connection = self._new_connection(route, peer)
            self._hold(call, connection)
            if self.is_closed or call.left <= 0:  # looked at once it can be aborted, so that no `close` is missed
                break
            try:
                await connection.connect(address, call.left / (len(addresses) - position))  # they share what is left
                return connection
            except OSError as error:
                connection.close()
                last = error
        if self.is_closed or call.left <= 0:
            raise self._stopped(call, peer) from last
        raise BoxerConnectionError(f"{peer}: no connection could be made: {last}", request_sent=False) from last

    async def pause(self, call: _Call, seconds: float) -> None:
        """Wait before the next try of a call, unless it is broken off."""
        self._pausing.add(call)
        try:
            await self._pause(call, seconds)
        finally:
            self._pausing.discard(call)
        if self.is_closed or call.left <= 0:
            raise self._stopped(call, f"{call.request.method} {call.request.target.partition('?')[0]}")

    def close(self) -> None:
        """Close what is idle, and break off what is going on."""
        with self._lock:
            self.is_closed = True
            for connection in self._idle:
                connection.close()
            self._idle.clear()
            calls = [*self._busy, *self._waiting, *self._pausing]
        for call in calls:
            call.break_off()

    def leave_to_parent(self) -> None:
        """Close a forked child's copies of the connections; a thread that is not there may hold the lock."""
        for connection in filter(None, (*self._busy.values(), *self._idle)):
            connection.close()

    # What blocks in one client and awaits in the other.

    _new_bell: type[Any]
    _new_connection: type[_C]

    async def _pause(self, call: _Call, seconds: float) -> None:
        raise NotImplementedError

    async def _addresses(self, host: str, port: int, call: _Call) -> Sequence[Any]:
        raise NotImplementedError


class _Client:
    """What both clients have: their settings, and the tries of a call."""

    # Dates, names of hosts, and pages of errors need these.
    _modules: tuple[str, ...] = ("calendar", "email.utils", "encodings.idna", "encodings.utf_8_sig")
    _opener: Any = None  # a BoxerClient's that has handlers

    def __init__(
        self,
        base_url: str | None = None,
        timeout: float | None = 120.0,
        *,
        retries: int = 2,
        max_connections: int = 100,
        headers: Mapping[str, str] | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        _load(*self._modules)
        self._settings: dict[str, Any] = {
            "base_url": base_url,
            "timeout": _seconds("timeout", timeout),
            "retries": _count("retries", retries, 0),
            "max_connections": _count("max_connections", max_connections, 1),
            "headers": headers and dict(headers),
            "ssl_context": ssl_context,
        }
        self._timeout, self._retries = self._settings["timeout"], self._settings["retries"]
        origin = self._origin = _origin(base_url, headers or {})
        self._route, fields = _route(origin.scheme, origin.next_hop, origin.tunnel, origin.fields)
        self._lines = _encoded_fields(fields)
        self._context = _tls_context(origin.scheme, ssl_context)
        self._pools: dict[Any, Any] = {}  # by process, or by event loop
        self._is_closed = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._origin.url!r})"

    def __getstate__(self) -> dict[str, Any]:
        return self._settings

    def __setstate__(self, settings: dict[str, Any]) -> None:
        self.__init__(**settings)  # type: ignore[misc]  # a pickled client is made anew

    def __del__(self) -> None:
        if not getattr(self, "_is_closed", True):
            self._drop_connections()
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)

    def _drop_connections(self) -> None:
        raise NotImplementedError

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError(f"{self!r} is closed")

    def _call(self, request: _Request, timeout: float | None, retries: int | None) -> _Call:
        self._check_open()
        seconds = self._timeout if timeout is _CLIENT_DEFAULT else _seconds("timeout", timeout)
        if retries is None:
            retries = 0 if request.has_network else self._retries
        else:
            _count("retries", retries, 0)
        return _Call(request, seconds, retries)

    async def _exchange(self, call: _Call) -> _Response:
        pool, opener, request = self._current_pool(), self._opener, call.request
        head = _encoded_head(request.method, self._origin.prefix + request.target, self._lines + request.lines)
        while True:
            try:
                if opener is None:  # with one it would come to the same, in more steps
                    response = await pool.exchange(self._route, self._context, head, call)
                else:
                    response = _sent_through(opener, self._origin, call, pool)
                if response.is_success:
                    return response
                pause = call.pause_after(response)
                if pause is None:
                    return response
                call.was_sent = True
            except BoxerConnectionError as error:
                pause = None if pool.is_closed else call.pause_after(error)
                error.request_sent = call.was_sent = call.was_sent or error.request_sent
                if pause is None:
                    raise
            await pool.pause(call, pause)

    def _current_pool(self) -> _Pool[Any]:
        raise NotImplementedError


def _tls_context(scheme: str, context: ssl.SSLContext | None) -> ssl.SSLContext | None:
    if scheme == "http":
        return None
    _load("ssl")
    return context or ssl.create_default_context()


# ---- Sync client -----------------------------------------------------------------------------------------------------


def _now(function: Callable[..., Coroutine[Any, Any, _T]], *args: Any) -> _T:
    """Run a coroutine of the blocking client: what it awaits blocks, so that it ends at the first step."""
    try:
        function(*args).send(None)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]  # what the coroutine returns
    raise AssertionError("a coroutine of the blocking client has waited")  # pragma: no cover


class _SyncConnection(_Connection):
    async def connect(self, address: Any, seconds: float) -> None:
        self._make_socket(address)
        with contextlib.suppress(BlockingIOError):
            self._socket.connect(address[4])
        if self.lost is None and not self._events(_WRITE, max(0.001, seconds)):
            raise socket.timeout("timed out")
        if self.lost is not None:  # by an `abort` that was too early to shut anything down, say
            raise self.lost
        error = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, os.strerror(error))

    async def _arrival(self, seconds: float) -> bytes | memoryview | None:
        return self._receive() if self._events(_READ | _WRITE if self._unsent else _READ, seconds) else None

    async def next_piece(self, upload: _Multipart, pieces: Iterator[bytes | memoryview]) -> bytes | memoryview:
        return next(pieces)


class _Bell:
    """A threading.Event that an interrupt cannot break."""

    def __init__(self) -> None:
        self._rings: queue.SimpleQueue[None] = queue.SimpleQueue()

    def set(self) -> None:
        self._rings.put(None)

    async def wait(self, seconds: float | None = None) -> None:
        with contextlib.suppress(queue.Empty):
            self._rings.get(timeout=seconds)


class _SyncPool(_Pool[_SyncConnection]):
    """The connections of a BoxerClient within one process."""

    _new_bell = _Bell
    _new_connection = _SyncConnection

    async def _pause(self, call: _Call, seconds: float) -> None:
        await self._wait(_Bell(), call, seconds)

    async def _addresses(self, host: str, port: int, call: _Call) -> Sequence[Any]:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)


class _ConnectionHandler:
    """What an opener sends requests with, over the connections of a client: to it, a urllib.request.BaseHandler."""

    handler_order = 500  # by which others find their places before or behind it

    def __init__(self, context: ssl.SSLContext | None) -> None:
        self._context = context

    def add_parent(self, parent: Any) -> None:
        self.parent = parent

    def http_open(self, request: Any) -> _Response:
        """Send a request that other handlers may have changed; its `timeout` is the pool and the _Call."""
        pool, call = request.timeout
        fields = {**request.headers, **request.unredirected_hdrs}
        if not all(map(str.isprintable, (request.selector, *fields, *fields.values()))):
            raise BoxerValidationError("a part of the request's head has a control character in it")
        tunnel = request._tunnel_host  # noqa: SLF001 - urllib has no other name for it
        route, fields = _route(request.type, request.host, tunnel, fields)
        head = _encoded_head(request.get_method(), request.selector, _encoded_fields(fields))
        context = _tls_context(route.scheme, self._context)
        response: _Response = _now(pool.exchange, route, context, head, call)
        call.was_sent = True  # if a handler sends another request for this one
        return response

    https_open = http_open

    def http_response(self, request: Any, response: Any) -> Any:
        """Offer an error to the handlers that a user has added, such as one that answers a 401."""
        if 200 <= response.code < 300:
            return response
        try:
            return self.parent.error("http", request, response, response.code, response.msg, response.info())
        except ValueError:  # urllib's own raise it for a challenge that they cannot read
            return response

    https_response = http_response

    def http_error_default(self, _request: Any, response: Any, *_: Any) -> Any:
        return response


class BoxerClient(_Client):
    """A client of a Boxer server that blocks. Any number of threads may share it; use it with `with`, or close it.

    base_url: of the server, as http:// or https://. It may have credentials (sent as `Authorization: Basic`), a path
        prefix, an IPv6 address. Default: $BOXER_URL, then http://localhost:8080.
    timeout: seconds to wait for an answer as a whole; a run's `wall_clock_secs` is added. For the content of a file,
        up or down, it is the time without progress instead. None waits for ever.
    retries: how often to try again after the server has said that a request is over or never began (429, 503, its own
        500), or could not be reached. 0 also turns off what makes up for the server's race between short runs.
    max_connections: how many there may be at once; further calls wait, which does not count against their timeout.
    headers: header fields to add to each request.
    ssl_context: for https, in place of the default one: with a private CA, say, or a client certificate.
    handlers: of urllib.request, to send requests through: for digest authentication, or cookies.

    The proxy for the server, if any, is what the environment names (http_proxy, https_proxy, no_proxy).

    Every method raises BoxerValidationError before anything is sent, BoxerConnectionError if no answer came,
    BoxerTimeoutError when time is up, and BoxerAPIError for any other answer than the one asked for. Each takes its
    own `timeout` and `retries` in place of the client's.
    """

    def __init__(
        self,
        base_url: str | None = None,
        timeout: float | None = 120.0,
        *,
        retries: int = 2,
        max_connections: int = 100,
        headers: Mapping[str, str] | None = None,
        ssl_context: ssl.SSLContext | None = None,
        handlers: Iterable[urllib.request.BaseHandler] = (),
    ) -> None:
        handlers = _checked_handlers(handlers)
        super().__init__(
            base_url,
            timeout,
            retries=retries,
            max_connections=max_connections,
            headers=headers,
            ssl_context=ssl_context,
        )
        self._settings["handlers"] = handlers
        self._opener = _opener(handlers, self._context) if handlers else None

    def __enter__(self) -> BoxerClient:
        self._check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections; calls that are going on in other threads end with BoxerConnectionError."""
        try:
            self._drop_connections()
        except BaseException:
            self._current_pool().unlock()
            raise
        self._is_closed = True

    def _drop_connections(self) -> None:
        self._current_pool().close()

    def _current_pool(self) -> _SyncPool:
        """Return the pool of this process: in a forked child, its parent goes on with the connections."""
        process = os.getpid()
        pool: _SyncPool | None = self._pools.get(process)
        if pool is None:
            pool = self._pools.setdefault(process, _SyncPool(self._settings["max_connections"]))
            for other in set(self._pools) - {process}:
                with contextlib.suppress(KeyError):  # another thread has been here
                    self._pools.pop(other).leave_to_parent()
        return pool

    def health(self, *, timeout: float | None = _CLIENT_DEFAULT, retries: int = 0) -> bool:
        """Return True if the server says that it is well, False if it answers anything else."""
        return self._answer(self._call(_HEALTH_REQUEST, timeout, retries)).is_success

    def run(
        self,
        image: str,
        cmd: Sequence[str],
        *,
        env: Mapping[str, str] | Iterable[str] | None = None,
        cwd: str | None = None,
        limits: ResourceLimits | Mapping[str, Any] | None = None,
        files: Sequence[str] | None = None,
        persist: bool = False,
        network: str | None = None,
        check: bool = False,
        timeout: float | None = _CLIENT_DEFAULT,
        retries: int | None = None,
    ) -> RunResult:
        """Run a command in a new sandbox and return what came of it.

        image: a container image, such as "python:3.12-slim". It is pulled first if need be, outside of all limits.
        cmd: the program and its arguments.
        env: environment variables, as a mapping or a list of `NAME=value`.
        cwd: the working directory, made if it does not exist. Default: /.
        limits: ResourceLimits, or a mapping with the same keys.
        files: paths of uploaded files or folders, which the sandbox has read-only at /<path>.
        persist: keep `files` and what was written to /output; else both are deleted after a successful run.
        network: "none" (the default), "sandbox" or "host". With a network a run is sent only once, unless `retries`
            is given here, since it may have been seen from outside.
        check: raise BoxerExitError if the exit code is not 0.

        Raises BoxerTimeoutError with status_code 408 when `wall_clock_secs` is over, and BoxerOutputLimitError when
        stdout or stderr is too long. Closing the connection, as an interrupt does, makes the server kill the run.
        """
        request = _run_request(image, cmd, env, cwd, limits, files, persist, network)
        return _run_result(self._answer(self._call(request, timeout, retries)), check)

    def upload_file(
        self, remote_path: str, content: Content, *, timeout: float | None = _CLIENT_DEFAULT, retries: int | None = None
    ) -> None:
        """Upload content into the server's store.

        remote_path: below the store, with `/` between folders, which are made; what is there is replaced.
        content: bytes, text (sent as UTF-8), or a binary file, streamed from its start if it can be sought.

        Raises TypeError for a file in text mode, BoxerError if a file changes its size while it is sent.
        """
        _check_uploaded(self._answer(self._call(_upload_request(remote_path, content), timeout, retries)))

    def upload_path(
        self,
        local_path: str | os.PathLike[str],
        remote_path: str | None = None,
        *,
        timeout: float | None = _CLIENT_DEFAULT,
        retries: int | None = None,
    ) -> list[str]:
        """Upload a file, or a folder with everything in it, and return the remote paths in sorted order.

        remote_path: of the file, or of the folder. Default: the name of either.

        Raises BoxerValidationError, before anything is sent, for what is neither file nor folder, and for a link that
        leaves the folder, leads nowhere, or to a folder it is in. Several files are sent at a time; each has a
        deadline of its own.
        """
        self._check_open()
        files = _local_files(local_path, remote_path)

        def upload(file: tuple[Path, str], begin: Callable[[_Call], None]) -> None:
            with _opened(file[0]) as content:
                call = self._call(_upload_request(file[1], content), timeout, retries)
                begin(call)
                _check_uploaded(self._answer(call))

        _for_each(upload, files)
        return [remote for _, remote in files]

    def download_file(self, path: str, *, timeout: float | None = _CLIENT_DEFAULT, retries: int | None = None) -> bytes:
        """Return the content of a file in the server's store, for instance of `result.output_path("a.json")`."""
        return _file_content(self._answer(self._call(_download_request(path), timeout, retries)))

    def _answer(self, call: _Call) -> _Response:
        try:
            return _now(self._exchange, call)
        except BoxerError:
            raise
        except BaseException:
            self._current_pool().mend(call)
            raise


def _opener(handlers: Iterable[Any], context: ssl.SSLContext | None) -> Any:
    _load("email.message", "urllib.request")
    opener = urllib.request.OpenerDirector()
    for handler in (_ConnectionHandler(context), *map(copy.copy, handlers)):  # each belongs to one opener
        opener.add_handler(handler)
    return opener


def _checked_handlers(handlers: Iterable[Any]) -> tuple[Any, ...]:
    handlers = tuple(handlers)
    if not all(hasattr(handler, "add_parent") for handler in handlers):
        raise TypeError("each of handlers must be a urllib.request.BaseHandler")
    if any(hasattr(handler, "redirect_request") for handler in handlers):
        raise BoxerValidationError("redirects are not followed: leave out the HTTPRedirectHandler")
    return handlers


def _sent_through(opener: Any, origin: _Origin, call: _Call, pool: _Pool[Any]) -> _Response:
    """Send a request through an opener, to its handlers' liking."""
    body: Any = call.request.body or None
    own_fields = dict(line.split(": ") for line in call.request.lines.splitlines())
    fields = {**origin.fields, **own_fields}
    url, method = origin.url + call.request.target, call.request.method
    request: Any = urllib.request.Request(url, body, fields, method=method)  # noqa: S310 - its scheme was checked
    request.host, request.selector = origin.next_hop, origin.prefix + call.request.target
    request._tunnel_host = origin.tunnel  # noqa: SLF001 - urllib has no other name for it
    try:
        response = opener.open(request, timeout=(pool, call))  # which handlers pass on untouched
    except urllib.error.HTTPError as error:  # only from a handler that the user has added, as any other response
        response = error
    except urllib.error.URLError as error:
        raise BoxerConnectionError(f"{origin.authority}: {error.reason}") from error
    try:
        return response if isinstance(response, _Response) else _adopted(response)
    except OSError as error:
        raise BoxerConnectionError(f"{origin.authority}: {error}") from error


def _adopted(response: Any) -> _Response:
    """Return a response of one of urllib's own classes as one of ours."""
    lines = [(name.lower(), value) for name, value in response.headers.items()]
    is_success = 200 <= response.code < 300
    adopted = _Response(_Head(response.code, str(response.reason), lines, _combined(lines), is_success))
    if response.fp is not None:
        with response:
            adopted.content = response.read()
    return adopted


_AT_A_TIME = 8  # files, when a folder is sent


def _for_each(function: Callable[[_T, Callable[[_Call], None]], None], items: Sequence[_T]) -> None:
    """Call a function for each item, several at a time; when one fails, or the caller is interrupted, end them all.

    The function announces each of its calls with what it gets as its second argument.
    """
    remaining, is_over = iter(items), threading.Event()
    calls: dict[int, _Call] = {}  # by thread
    failures: list[BaseException] = []

    def begin(call: _Call) -> None:
        calls[threading.get_ident()] = call
        if is_over.is_set():
            call.cancel()

    def end() -> None:
        is_over.set()
        for call in list(calls.values()):
            call.cancel()

    def work() -> None:
        for item in itertools.takewhile(lambda _: not is_over.is_set(), remaining):
            try:
                function(item, begin)
            except BaseException as error:  # noqa: BLE001 - the first is raised in the caller's thread
                failures.append(error)
                end()

    _in_threads(work, min(_AT_A_TIME, len(items)), end)
    if failures:
        raise failures[0]


def _in_threads(work: Callable[[], None], count: int, end: Callable[[], None]) -> None:
    """Do a work in several threads; if this one is interrupted, end it, and wait for them all the same."""
    threads = [threading.Thread(target=work) for _ in range(count)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:
        end()
        for thread in threads:
            if thread.is_alive():  # one that has yet to begin will find nothing to do
                thread.join()
        raise


# ---- Async client ----------------------------------------------------------------------------------------------------


class _AsyncConnection(_Connection):
    """A connection whose socket an event loop watches.

    Without asyncio's streams and transports: they cannot say what came before a reset, nor tell a TLS connection that
    was cut off from one that was closed; and they add steps to each call.
    """

    def __init__(self, route: _Route, peer: str) -> None:
        super().__init__(route, peer)
        self._loop = asyncio.get_running_loop()
        self._is_read = False  # the loop looks for what arrives
        # uvloop tells of data that came with a reset, and then of nothing any more, if it is not asked anew each time.
        self._is_told_once = type(self._loop).__module__.startswith("uvloop")
        self._waiter: asyncio.Future[bytes | memoryview | None] | None = None
        self._alarm: asyncio.TimerHandle | None = None

    async def connect(self, address: Any, seconds: float) -> None:
        self._make_socket(address)
        await _within(seconds, self._loop.sock_connect(self._socket, address[4]), self.call)

    async def next_piece(self, upload: _Multipart, pieces: Iterator[bytes | memoryview]) -> bytes | memoryview:
        if not upload.may_block:
            await asyncio.sleep(0)  # for other tasks
            return next(pieces)
        reading = self._loop.run_in_executor(None, next, pieces)
        try:
            return await _within(self.call.left, reading, self.call)
        except _Late as error:
            if self.call.left <= 0:
                raise self.call.timed_out(self.peer) from error
            raise BoxerConnectionError(f"{self.peer}: broken off by this client", self.has_sent) from error

    async def _arrival(self, seconds: float) -> bytes | memoryview | None:
        try:
            if not self._is_read:
                self._loop.add_reader(self._socket, self._on_readable)
                self._is_read = True
            if self._unsent:
                self._loop.add_writer(self._socket, self._on_writable)
        except NotImplementedError:
            return await self._looked_for(seconds)
        self._set_alarm(seconds)
        self._waiter = self._loop.create_future()
        try:
            return await self._waiter
        finally:
            self._waiter = None

    async def _looked_for(self, seconds: float) -> bytes | memoryview | None:
        """Look again and again, where the loop cannot watch a socket, as on Windows by default."""
        end, pause = time.monotonic() + seconds, 0.0005
        while (received := self._receive()) is None and time.monotonic() < end:
            pause = min(1.5 * pause, 0.03)
            await asyncio.sleep(pause)
            if self._unsent:
                break
        return received

    def _on_readable(self) -> None:
        """Receive at once what somebody waits for, so that the loop does not find it again before that task runs."""
        waiter = self._waiter
        if waiter is None or self._is_told_once:
            self._is_read = False
            self._loop.remove_reader(self._socket)
        if waiter is None:
            if self.call is None:
                self.close()  # the peer has, or said what nobody asked for
        elif not waiter.done():
            waiter.set_result(self._receive())

    def _on_writable(self) -> None:
        self._loop.remove_writer(self._socket)
        self._wake(None)

    def _wake(self, received: bytes | None) -> None:
        if self._waiter is not None and not self._waiter.done() and not self._loop.is_closed():
            self._waiter.set_result(received)

    def _set_alarm(self, seconds: float) -> None:
        """See that there is an alarm in time: an earlier one may be left of another call."""
        deadline = self._loop.time() + seconds
        if self._alarm is None or self._alarm.when() > deadline:
            self._end_alarm()
            self._alarm = self._loop.call_at(deadline, self._ring)

    def _ring(self) -> None:
        self._alarm = None
        self._wake(None)

    def _end_alarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def _shut_down(self) -> None:
        self._end_alarm()
        if self._socket.fileno() >= 0 and not self._loop.is_closed():
            with contextlib.suppress(NotImplementedError):
                self._loop.remove_reader(self._socket)
                self._loop.remove_writer(self._socket)
        super()._shut_down()

    def abort(self) -> None:
        super().abort()
        self.close()
        self._wake(b"")


class _Late(socket.timeout):
    """It was not done in time, or was broken off."""


async def _within(seconds: float, awaitable: Awaitable[_T], call: _Call) -> _T:
    """Do what asyncio.wait_for does, which before Python 3.12 can lose a cancellation; let the call be broken off."""
    task = asyncio.ensure_future(awaitable)
    abort, is_broken_off = call.abort, False

    def break_off(_: _Call) -> None:
        nonlocal is_broken_off
        is_broken_off = True  # even if the task is done, and this one is yet to hear of it
        with contextlib.suppress(RuntimeError):  # the loop may be closed
            task.cancel()

    call.abort = break_off
    try:
        await asyncio.wait((task,), timeout=seconds)
    finally:
        call.abort = abort
        if not task.done() and not task.get_loop().is_closed():
            task.cancel()
            await asyncio.wait((task,))
        # Asking for it is what keeps the loop from reporting it.
        error = task.exception() if task.done() and not task.cancelled() else None
    if task.cancelled() or is_broken_off:
        raise _Late("timed out")
    if error is not None:
        raise error
    return task.result()


class _AsyncBell:
    """A bell that may ring when its event loop has been closed, and nobody waits for it any more."""

    def __init__(self) -> None:
        self._future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def set(self) -> None:
        if not self._future.done():
            with contextlib.suppress(RuntimeError):
                self._future.set_result(None)

    async def wait(self) -> None:
        await self._future


class _AsyncPool(_Pool[_AsyncConnection]):
    """The connections of an AsyncBoxerClient within one event loop."""

    _new_bell = _AsyncBell
    _new_connection = _AsyncConnection

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.process = os.getpid()
        self.loop = asyncio.get_running_loop()
        self._end_of_loop = self._close_with_loop()

    async def _pause(self, call: _Call, seconds: float) -> None:
        if not self.is_closed:
            with contextlib.suppress(_Late):
                await _within(_LONGEST_WAIT, asyncio.sleep(seconds), call)

    async def _close_with_loop(self) -> AsyncGenerator[None, None]:
        """Close the connections of a client that was not closed before the loop is.

        A loop that ends as asyncio.run ends it closes the asynchronous generators that have begun in it.
        """
        try:
            while True:
                yield
        finally:
            self.close()

    async def _addresses(self, host: str, port: int, call: _Call) -> Sequence[Any]:
        await self._end_of_loop.__anext__()  # begin
        with contextlib.suppress(socket.gaierror):  # an address, which needs no thread to look it up
            return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        return await _within(call.left, self.loop.getaddrinfo(host, port, type=socket.SOCK_STREAM), call)

    async def aclose(self) -> None:
        await self._end_of_loop.aclose()
        self.close()

    def abandon(self) -> None:
        """Close everything from another loop, or after the end of this one."""
        if self.process != os.getpid():
            self.leave_to_parent()  # and the loop too is the parent's
            return
        if self.loop.is_running():
            with contextlib.suppress(RuntimeError):  # it has been closed meanwhile
                self.loop.call_soon_threadsafe(self.close)
                return
        self.close()


class AsyncBoxerClient(_Client):
    """A client of a Boxer server for asyncio; its parameters are those of BoxerClient, less `handlers`.

    Use it with `async with`, or `await client.aclose()`. Any number of tasks may share it. Each event loop that it is
    used in has connections of its own, which are closed once it has stopped and the client is used in another. A
    cancelled call closes its connection at once, whereupon the server kills the run.
    """

    _modules = (*_Client._modules, "asyncio", "concurrent.futures.thread")  # noqa: SLF001 - of its base

    async def __aenter__(self) -> AsyncBoxerClient:
        self._check_open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections; calls that are going on in other tasks end with BoxerConnectionError."""
        self._is_closed = True
        pool = self._pools.pop(asyncio.get_running_loop(), None)
        self._drop_connections()
        if pool is not None:
            await pool.aclose()

    def _drop_connections(self) -> None:
        for pool in list(self._pools.values()):
            pool.abandon()

    async def health(self, *, timeout: float | None = _CLIENT_DEFAULT, retries: int = 0) -> bool:
        """See `BoxerClient.health`."""
        return (await self._exchange(self._call(_HEALTH_REQUEST, timeout, retries))).is_success

    async def run(
        self,
        image: str,
        cmd: Sequence[str],
        *,
        env: Mapping[str, str] | Iterable[str] | None = None,
        cwd: str | None = None,
        limits: ResourceLimits | Mapping[str, Any] | None = None,
        files: Sequence[str] | None = None,
        persist: bool = False,
        network: str | None = None,
        check: bool = False,
        timeout: float | None = _CLIENT_DEFAULT,
        retries: int | None = None,
    ) -> RunResult:
        """See `BoxerClient.run`."""
        request = _run_request(image, cmd, env, cwd, limits, files, persist, network)
        return _run_result(await self._exchange(self._call(request, timeout, retries)), check)

    async def upload_file(
        self, remote_path: str, content: Content, *, timeout: float | None = _CLIENT_DEFAULT, retries: int | None = None
    ) -> None:
        """See `BoxerClient.upload_file`; a file is read in a thread."""
        _check_uploaded(await self._exchange(self._call(_upload_request(remote_path, content), timeout, retries)))

    async def upload_path(
        self,
        local_path: str | os.PathLike[str],
        remote_path: str | None = None,
        *,
        timeout: float | None = _CLIENT_DEFAULT,
        retries: int | None = None,
    ) -> list[str]:
        """See `BoxerClient.upload_path`."""
        self._check_open()
        files = await asyncio.get_running_loop().run_in_executor(None, _local_files, local_path, remote_path)

        async def upload(file: tuple[Path, str]) -> None:
            with _opened(file[0]) as content:
                await self.upload_file(file[1], content, timeout=timeout, retries=retries)

        await _for_each_async(upload, files)
        return [remote for _, remote in files]

    async def download_file(
        self, path: str, *, timeout: float | None = _CLIENT_DEFAULT, retries: int | None = None
    ) -> bytes:
        """See `BoxerClient.download_file`."""
        return _file_content(await self._exchange(self._call(_download_request(path), timeout, retries)))

    def _current_pool(self) -> _AsyncPool:
        loop = asyncio.get_running_loop()
        pool: _AsyncPool | None = self._pools.get(loop)
        if pool is None or pool.is_closed or pool.process != os.getpid():
            for other, stale in list(self._pools.items()):
                if other is loop or not other.is_running() or stale.process != os.getpid():
                    self._pools.pop(other, None)  # another thread may have been here
                    stale.abandon()
            pool = self._pools[loop] = _AsyncPool(self._settings["max_connections"])
        return pool


async def _for_each_async(function: Callable[[_T], Awaitable[None]], items: Iterable[_T]) -> None:
    """Call a function for each item, several at a time; when one call fails, or this one is cancelled, end them all."""
    remaining = iter(items)

    async def work() -> None:
        for item in remaining:
            await function(item)

    tasks = [asyncio.ensure_future(work()) for _ in range(_AT_A_TIME)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
