"""Call a stand-in server through faults for long, and check every result: `python .bench/soak.py [--minutes 10]`.

The calls of both clients go to the server through an injector of faults. What is done to a call is drawn beforehand,
so the call can end only in one of a few known ways. Anything else is an offence:

    wrong     a value that is not the one asked for, an error of a foreign class, a connection used again that
              must not be, a POST sent again although the first may have been carried out
    lost      a call that hangs, or fails although nothing was done to it that explains this
    leaked    what outlives the clients: descriptors, threads, tasks, connections, runs, memory

The server is the stand-in of test_boxer.py, which lies one folder above, or the one that BOXER_URL names.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import gc
import http
import io
import itertools
import logging
import math
import os
import pickle
import random
import re
import select
import signal
import socket
import struct
import sys
import threading
import time
import types
import urllib.parse
import warnings
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import boxer
from test_boxer import MIB, Content, NoSandbox, PlainProcesses, Swift, find_sandbox, go_json

FIN, RST, HOLD = "FIN", "RST", "HOLD"  # how a script ends the connection; HOLD leaves that to the client
_PATIENCE = 20.0  # seconds, for calls that nothing holds up
_GROWTH = 64  # MiB that this process may gain after its first minute
_IMAGE = "python:3.12-slim"
_METHODS = {"POST run": "run", "POST files": "upload_file", "GET files": "download_file", "GET healthz": "health"}


def _told(answer: bytes, *fields: bytes, line: bytes = b"", content: bytes | None = None) -> bytes:
    """Return an answer whose length is told by these fields alone, perhaps with another status line or content."""
    head, _, own = answer.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    if _CHUNKED in lines:
        own = Content(io.BytesIO(own), None).rest()
    others = [other for other in lines[1:] if not re.match(rb"(?i)content-length|transfer-encoding", other)]
    sized = [field.replace(b"<size>", b"%d" % len(own)) for field in fields]
    return b"\r\n".join([line or lines[0], *others, *sized, b"", own if content is None else content])


def _pieces(data: bytes, pick: random.Random) -> list[bytes]:
    cuts = sorted(pick.randrange(len(data) + 1) for _ in range(pick.randrange(1, 20)))
    return [data[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(data)])]


def _chunks(answer: bytes, pick: random.Random) -> bytes:
    pieces = filter(None, _pieces(_told(answer).partition(b"\r\n\r\n")[2], pick))
    chunks = [b"%x;a=b\r\n%b\r\n" % (len(piece), piece) for piece in pieces]
    return _told(answer, _CHUNKED, content=b"".join([*chunks, pick.choice([b"0\r\n\r\n", b"00\r\nA: b\r\n\r\n"])]))


def _mutated(answer: bytes, pick: random.Random) -> bytes:
    """Change bytes of the head, but neither the status nor one length into another, which nobody could notice."""
    end, length = answer.index(b"\r\n\r\n") + 4, re.compile(rb"(?i)\r\ncontent-length:[ \t]*([0-9, \t]*)\r\n")
    while True:
        data = bytearray(answer)
        for _ in range(pick.randrange(1, 4)):
            data[pick.choice([*range(8), *range(13, end)])] = pick.randrange(256)
        was, now = length.search(answer), length.search(data)
        if not now or (was and now[1] == was[1]):
            return bytes(data)


def _page(status: int, pick: random.Random, *fields: bytes) -> bytes:
    later = pick.choice([[b"Retry-After: 0"], [b"Retry-After: 1"], []])
    line = f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}".encode()
    return _told(b"\r\n\r\n<h1>Said by a proxy</h1>", b"Content-Type: text/html", _SIZED, *later, *fields, line=line)


def _cut(answer: bytes, pick: random.Random) -> bytes:
    return answer[: pick.choice([0, pick.randrange(min(len(answer), 200)), pick.randrange(len(answer)), -1])]


def _noise(pick: random.Random) -> bytes:
    return bytes([pick.randrange(ord("H"))]) + pick.randbytes(pick.randrange(40))


_SIZED, _CHUNKED = b"Content-Length: <size>", b"Transfer-Encoding: chunked"
_CLOSE, _INTERIM = b"Connection: close", b"HTTP/1.1 103 Early Hints\r\nA: b\r\n\r\n"
# An answer that nobody has asked for. A client that takes it for its own will be found out.
_POISON = {"exec_id": "poison", "exit_code": 0, "stdout": "poison", "stderr": "", "wall_ms": 1}
_SECOND = _told(b"\r\n\r\n" + go_json(_POISON), _SIZED, line=b"HTTP/1.1 200 OK")
_NO_SIZES = [b"", b"-1", b"+5", b"0x10", b"1e3", b"1 1", b"9" * 30]
_NO_CHUNKS = [b"x\r\n", b"-1\r\n", b"0x5\r\nabcde\r\n", b"1\r\nabc", b"\r\n", b"1" * 20 + b"\r\n", b"0\r\nno\r\n\r\n"]
_SMALL = 9000  # bytes: what follows an answer of this size arrives with it, so that no client can overlook it

# A fault is a kind, and a script that makes of an answer what is sent: bytes, pauses (of seconds), the end. The kinds:
# "valid", other forms of the same answer; "idle", something follows a whole one; "broken"; "malformed"; "stalled";
# "mutated", of which anything may come but a wrong value; else the status of a page that takes the answer's place.
_Script = Callable[[bytes, random.Random], Iterable[Any]]
FAULTS: dict[str, tuple[str, _Script]] = {
    "whole": ("valid", lambda a, _: [a]),
    "in pieces": ("valid", _pieces),
    "byte by byte": ("valid", lambda a, _: [*(a[at : at + 1] for at in range(300)), a[300:]]),
    "late": ("valid", lambda a, pick: [pick.random() / 20, a[:50], pick.random() / 20, a[50:]]),
    "in chunks": ("valid", lambda a, pick: [_chunks(a, pick)]),
    "up to the end": ("valid", lambda a, _: [_told(a), FIN]),
    "HTTP/1.0": ("valid", lambda a, _: [_told(a, _SIZED).replace(b"1.1", b"1.0", 1), HOLD]),
    "to be closed": ("valid", lambda a, _: [_told(a, _SIZED, _CLOSE), HOLD]),
    "after interim ones": ("valid", lambda a, _: [_INTERIM, _INTERIM, a]),
    "folded field": ("valid", lambda a, _: [_told(a, b"A: b\r\n c", _SIZED)]),
    "length told twice": ("valid", lambda a, _: [_told(a, _SIZED, _SIZED)]),
    "second answer": ("valid", lambda a, _: [a + _SECOND, HOLD] if len(a) < _SMALL else [a]),
    "noise at the end": ("valid", lambda a, pick: [a + _noise(pick), HOLD] if len(a) < _SMALL else [a]),
    "idle: closed": ("idle", lambda a, pick: [a, pick.random() / 50, FIN]),
    "idle: reset": ("idle", lambda a, pick: [a, pick.random() / 50, RST]),
    "idle: noise": ("idle", lambda a, pick: [a, pick.random() / 50, _noise(pick), HOLD]),
    "idle: 408": ("idle", lambda a, pick: [a, pick.random() / 50, _page(408, pick, _CLOSE), FIN]),
    "idle: half a head": ("idle", lambda a, pick: [a, pick.random() / 50, _INTERIM[:20], FIN]),
    "idle: second answer": (
        "idle",
        lambda a, pick: [a, *([pick.random() / 50, _SECOND, HOLD] if a[9:12] == b"200" else [])],
    ),
    "cut": ("broken", lambda a, pick: [_cut(a, pick), FIN]),
    "reset": ("broken", lambda a, pick: [_cut(a, pick), RST]),
    "early: cut": ("broken", lambda *_: [FIN]),
    "early: reset": ("broken", lambda *_: [RST]),
    "no HTTP": ("malformed", lambda _, pick: [_noise(pick), HOLD]),
    "HTTP/2": ("malformed", lambda a, _: [_told(a, _SIZED, line=b"HTTP/2 200"), HOLD]),
    "status of two digits": ("malformed", lambda a, _: [_told(a, _SIZED, line=b"HTTP/1.1 20 OK"), HOLD]),
    "lines without CR": ("malformed", lambda a, _: [_told(a, _SIZED).replace(b"\r\n", b"\n"), HOLD]),
    "NUL in a field": ("malformed", lambda a, _: [_told(a, _SIZED, b"A: \0"), HOLD]),
    "field without colon": ("malformed", lambda a, _: [_told(a, _SIZED, b"A"), HOLD]),
    "space before colon": ("malformed", lambda a, _: [_told(a, _SIZED, b"A : b"), HOLD]),
    "two lengths": ("malformed", lambda a, _: [_told(a, _SIZED, b"Content-Length: 99999999"), HOLD]),
    "no length": ("malformed", lambda a, pick: [_told(a, b"Content-Length: " + pick.choice(_NO_SIZES)), HOLD]),
    "length and chunks": ("malformed", lambda a, _: [_told(a, _SIZED, _CHUNKED), HOLD]),
    "unknown coding": ("malformed", lambda a, _: [_told(a, b"Transfer-Encoding: gzip, chunked"), HOLD]),
    "chunks in HTTP/1.0": ("malformed", lambda a, pick: [_chunks(a, pick).replace(b"1.1", b"1.0", 1), HOLD]),
    "no chunk": ("malformed", lambda a, pick: [_told(a, _CHUNKED, content=pick.choice(_NO_CHUNKS)), HOLD]),
    "long head": ("malformed", lambda a, _: [_told(a, _SIZED, b"A: " + b"b" * 70_000), HOLD]),
    "many fields": ("malformed", lambda a, _: [_told(a, _SIZED, *[b"A: b"] * 200), HOLD]),
    "another protocol": ("malformed", lambda a, _: [_told(a, _SIZED, line=b"HTTP/1.1 101 Switching Protocols"), HOLD]),
    "endless interim ones": ("malformed", lambda a, _: [_INTERIM * 30 + a, HOLD]),
    "stalled": ("stalled", lambda a, pick: [_cut(a, pick), HOLD]),
    "mutated": ("mutated", lambda a, pick: [_mutated(a, pick)]),
}
for _status in ("413", "429", "500", "502", "503", "504"):
    FAULTS[f"page {_status}"] = _status, lambda _, pick, n=int(_status): [_page(n, pick)]  # type: ignore[misc]
    FAULTS[f"early: {_status}"] = _status, lambda _, pick, n=int(_status): [_page(n, pick, _CLOSE), HOLD]  # type: ignore[misc]
_DRAWN = [name for name in FAULTS if name != "idle: second answer"]  # whose next request would have to believe it


class Trial:
    """One call: what is done to it, and what it may come to. Its token is in its request.

    The first request that arrives meets the fault; each does if that is `lasting`.
    """

    def __init__(self, soak: Soak, route: str, fault: str = "", may: Iterable[str] = (), number: int = 0) -> None:
        """Draw what was not said."""
        self.route, self.token = route, f"soak-{number or next(soak.numbers)}."
        self.key = f"{route} {self.token}"
        self.pick = pick = random.Random(f"{soak.seed} {self.key}")
        self.name = fault or pick.choice(["whole"] * len(_DRAWN) + _DRAWN)
        self.kind, self.script = FAULTS[self.name]
        self.is_noticed = bool(fault) and self.kind == "idle"  # the client has the time to
        self.lasting = self.is_noticed or self.kind == "stalled" or pick.random() < 0.3
        outcomes = {
            "valid": "ok",
            "idle": "ok",
            "mutated": "ok",
            "broken": "connection",
            "malformed": "connection",
            "stalled": "deadline",
        }
        page = "refused" if route == "GET healthz" else f"status {self.kind}"
        self.at_once = outcomes.get(self.kind, page)  # what it comes to if it is sent once
        self.may = {*may, *(["connection", "deadline", "status 500"] if self.kind == "mutated" else [])}
        self.timeout = pick.uniform(0.3, 1) if self.kind in ("stalled", "mutated") else _PATIENCE
        if not fault and pick.random() < 0.05:
            self.timeout = pick.uniform(0.001, 0.3)
            self.may |= {"deadline", "status 500", self.at_once}
        self.wanted: Any = True
        self.can_repeat = route != "GET healthz"
        self.began, self.ended, self.arrivals, self.was_hurt = 0.0, math.inf, 0, False
        self.is_over = True  # whatever was sent is, as the client must know: it may be sent again
        self.settled = threading.Event()  # what follows the answer to its last arrival has been sent

    def allowed(self) -> set[str]:
        """Return what it may come to, if it was hurt also by what was meant for the call before."""
        is_repeated = self.kind in ("429", "503") or (self.kind == "broken" and self.route == "GET files")
        end = "ok" if is_repeated and self.can_repeat and not self.lasting else self.at_once
        hurt = {"ok", "connection", "status 408", "refused"} if self.was_hurt else set()
        return {end, "not started", *self.may, *hurt}

    def arrives(self) -> bool:
        """Note that a request has arrived; say whether it may."""
        fits = self.is_over or self.route[:3] == "GET"
        self.arrivals, self.is_over = self.arrivals + 1, False
        self.settled = threading.Event()
        return fits

    def meets(self) -> tuple[str, str, _Script]:
        """Return what is done to the request that has arrived: name, kind, and script."""
        name = self.name if self.lasting or self.arrivals == 1 else "whole"
        return (name, *FAULTS[name])


class Injector:
    """A proxy on the loopback address that does to each call what its trial says."""

    def __init__(self, soak: Soak, upstream: str) -> None:
        """Listen; answer once entered."""
        self.soak, self.pick = soak, random.Random(f"{soak.seed} connections")
        parts = urllib.parse.urlsplit(upstream)
        self.server, self.host = (parts.hostname, parts.port or 80), parts.netloc.encode()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.address = self.listener.getsockname()
        self.url = f"http://127.0.0.1:{self.address[1]}{parts.path}"
        self.links: set[Link] = set()
        self.still = threading.Lock()  # held while a forked child has copies of the sockets, so that none can be reset
        self.stopping = threading.Event()
        self.acceptor = threading.Thread(target=self._accept)

    def __enter__(self) -> Injector:
        """Start to answer."""
        self.acceptor.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Close every connection."""
        self.stopping.set()
        self.acceptor.join()
        self.listener.close()
        for link in list(self.links):
            with contextlib.suppress(OSError):
                link.client.shutdown(socket.SHUT_RDWR)
            link.thread.join()

    def let_go(self) -> None:
        """Close a forked child's copies."""
        for sock in (self.listener, *(link.client for link in self.links)):
            sock.close()

    def _accept(self) -> None:
        while not self.stopping.is_set():
            self.listener.settimeout(0.1)
            with contextlib.suppress(socket.timeout):
                Link(self, self.listener.accept()[0])
                if self.pick.random() < 0.002:
                    self._refuse()

    def _refuse(self) -> None:
        """Let nobody connect for a moment."""
        blow = self.soak.blow("connections refused", sys.maxsize, math.inf)
        with self.still:
            self.listener.close()
        while self.listener.fileno() < 0:
            self.stopping.wait(0.03)
            with contextlib.suppress(OSError):
                self.listener = socket.create_server(self.address, backlog=512)
        blow[1] = time.monotonic()


class Link:
    """A client's connection to the injector, and the one that goes on to the server."""

    def __init__(self, injector: Injector, client: socket.socket) -> None:
        """Serve it, in a thread of its own."""
        self.injector, self.soak, self.client = injector, injector.soak, client
        self.server: socket.socket | None = None
        self.settled = threading.Event()
        self.trial: Trial | None = None  # with whose end this has to end
        self.thread = threading.Thread(target=self._serve, args=injector.pick.choices(["", FIN, RST], [80, 1, 1]))
        with self.soak.condition:
            injector.links.add(self)
        self.thread.start()

    def _serve(self, at_once: str) -> None:
        with contextlib.suppress(OSError):  # the client has gone
            self.client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if at_once:
                self.soak.count("faults", f"connection: {at_once}")
                self._end(at_once, None, "idle: at once")
            while not at_once and self._exchange():
                pass
        for sock in filter(None, (self.client, self.server)):
            sock.close()
        with self.soak.condition:
            self.injector.links.discard(self)
            self.soak.condition.notify_all()

    def _exchange(self) -> bool:
        """Do to a call what its trial says; say whether the connection goes on."""
        trial, request = self._receive()
        name, kind, script = trial.meets() if trial else ("whole", *FAULTS["whole"])
        self.trial = None if name[:4] == "idle" else trial
        answer = self._answer_to(request) if request and name[:5] not in ("early", "page ") else b""
        if not request or answer is None:
            return False
        if trial:
            self.settled = trial.settled
            self.soak.count("faults", name)
            is_answered = kind in ("valid", "idle", "mutated") and answer[9:12] in (b"429", b"500", b"503")
            trial.is_over = is_answered or kind in ("429", "503")
        for step in script(answer, trial.pick if trial else self.injector.pick):
            if isinstance(step, bytes):
                self.client.sendall(step)
                self.soak.count("besides", "bytes received", len(step))
            elif isinstance(step, float):
                self.injector.stopping.wait(step)
            else:
                self._end(step, trial, name)
                return False
        self.trial = None
        return True

    def _receive(self) -> tuple[Trial | None, bytes]:
        """Receive a request, or the part of it that is to be; it is empty if the client leaves instead."""
        data, trial = bytearray(), None
        while piece := self.client.recv(65536):
            data += piece
            self.soak.count("besides", "bytes sent", len(piece))
            token = None if trial else re.match(rb"(?s)(GET|POST) [^ ?]*/(\w+).*?(soak-[0-9]+\.)", data)
            trial = self.soak.arrived(b"%b %b %b" % token.groups()) if token else trial
            if len(data) > _size_of(data):
                self.soak.offend("wrong", f"{trial and trial.key}: more was sent than a request")
            if len(data) >= _size_of(data) or (trial and trial.meets()[0][:5] == "early"):
                return trial, bytes(data)
        if data and not trial:
            self.soak.blow("left without a name", 1, time.monotonic())
        return trial, b""

    def _answer_to(self, request: bytes) -> bytes | None:
        """Return the server's answer, or None if the client leaves instead of waiting for it."""
        self.server = self.server or socket.create_connection(self.injector.server)
        self.server.sendall(re.sub(rb"(?i)(?<=\r\nhost: )[^\r]*", self.injector.host, request, count=1))
        answer = bytearray()
        while len(answer) < _size_of(answer):
            if self.client in select.select([self.client, self.server], [], [])[0]:
                if self.client.recv(1):
                    self.soak.offend("wrong", f"more was sent than {request[:200]!r}")
                return None
            piece = self.server.recv(65536)
            answer += piece
            if not piece:
                return None
        if b"\r\nConnection: close\r\n" in answer:
            self.server.close()
            self.server = None
        return bytes(answer)

    def _end(self, how: str, trial: Trial | None, name: str) -> None:
        """End the connection, or let the client do so; see that it is not used again."""
        if how == RST:
            if name[:4] == "idle":
                self.soak.blow("connection reset", 1, time.monotonic())
            with self.injector.still:
                self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.client.close()
        elif how == FIN:
            self.client.shutdown(socket.SHUT_WR)
        self.settled.set()
        while name[:5] == "early" and self.client.recv(65536):
            pass  # the rest of the request
        late, request = self._receive()
        is_noticed = trial and trial.is_noticed and late not in (None, trial)
        if is_noticed or ((late or request) and name[:4] != "idle"):
            self.soak.offend("wrong", f"{late and late.key}: sent after {trial and (trial.key, trial.name)}")
        elif late:
            with self.soak.condition:
                late.was_hurt = True
                self.soak.condition.notify_all()
        elif request:
            self.soak.blow("connection ended", 1, time.monotonic())


def _size_of(message: bytearray) -> int:
    """Return how long a request or an answer is, if that can be told yet."""
    if b"\r\n\r\n" not in message:
        return sys.maxsize
    end, size = message.index(b"\r\n\r\n") + 4, -1
    head = bytes(message[:end]).lower()
    while b"\r\ntransfer-encoding: chunked\r\n" in head and size:
        match = re.compile(rb"(?i)([0-9a-f]+)[^\n]*\n").match(message, end)
        if not match:
            return sys.maxsize
        size = int(match[1], 16)
        end = match.end() + size + 2
    length = re.search(rb"\r\ncontent-length: ([0-9]+)", head)
    return end + int(length[1] if length else 0)


class Awaited:
    """A BoxerClient to be awaited, which has blocked by then."""

    def __init__(self, client: Any) -> None:
        """Take the client."""
        self.client = client

    def __getattr__(self, name: str) -> Any:
        """Give a method as a coroutine function."""

        async def call(*args: Any, **settings: Any) -> Any:
            return getattr(self.client, name.replace("aclose", "close"))(*args, **settings)

        return call


class Forking:
    """A BoxerClient whose runs are made by forked children."""

    def __init__(self, client: Any, injector: Injector) -> None:
        """Take the client."""
        self.client, self.injector = client, injector

    def run(self, *args: Any, **settings: Any) -> Any:
        """Let a child run, and take over what it returns or raises."""
        reader, writer = os.pipe()
        with self.injector.still:
            child = os.fork()
            if child:
                os.close(writer)
                os.read(reader, 1)
            else:
                self.injector.let_go()
                os.write(writer, b".")
        if not child:
            self._end_as_child(writer, *args, **settings)
        with os.fdopen(reader, "rb") as file:
            result = pickle.loads(file.read())
        os.waitpid(child, 0)
        if isinstance(result, Exception):
            raise result
        return result

    def _end_as_child(self, writer: int, *args: Any, **settings: Any) -> None:
        signal.alarm(int(2 * _PATIENCE))
        try:
            os.write(writer, pickle.dumps(self.client.run(*args, **settings)))
        except Exception as error:  # noqa: BLE001 - it is for the parent
            os.write(writer, pickle.dumps(error))
        finally:
            os._exit(0)


class Soak:
    """Makes calls until it is over, and judges what comes of them."""

    def __init__(self, url: str, seed: int, *, has_programs: bool, at_once: int) -> None:
        """Begin to count; `run_for` makes the calls."""
        self.seed, self.has_programs, self.at_once = seed, has_programs, at_once
        self.pick, self.numbers, self.start = random.Random(seed), itertools.count(1), time.monotonic()
        self.condition, self.over = threading.Condition(), threading.Event()
        self.counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.offences: list[str] = []
        self.trials: dict[str, Trial] = {}
        self.blows: collections.deque[list[float]] = collections.deque(maxlen=1000)
        self.injector = Injector(self, url)

    def count(self, table: str, name: str, number: int = 1) -> None:
        """Count something."""
        with self.condition:
            self.counts[table][name] += number

    def offend(self, kind: str, what: str) -> None:
        """Note an offence. Ten are enough."""
        self.count("offences", kind)
        self.offences.append(f"{kind}, after {time.monotonic() - self.start:.1f} s: {what[:1000]}")
        if len(self.offences) >= 10:
            self.over.set()

    def blow(self, name: str, hits: int, until: float) -> list[float]:
        """Note what may end so many calls that go on until then, whichever they are: no request of them is read."""
        self.count("faults", name)
        with self.condition:
            self.blows.append([hits, until])
            self.condition.notify_all()
            return self.blows[-1]

    def _was_blown(self, trial: Trial) -> bool:
        for blow in self.blows:
            if blow[0] and blow[1] > trial.began:
                blow[0] -= 1
                return True
        return False

    def arrived(self, key: bytes) -> Trial | None:
        """Return the trial whose request arrives."""
        with self.condition:
            trial = self.trials.get(key.decode())
            fits = not trial or trial.arrives()
        if trial and not fits:
            self.offend("wrong", f"{trial.key}, {trial.name}: sent again")
        return trial

    # Calls

    async def call(self, client: Any, trial: Trial, *args: Any, **settings: Any) -> str:
        """Make a call, and judge what comes of it."""
        method = _METHODS[trial.route]
        kind = "sync" if isinstance(client, Awaited) else "async"
        trial.began = time.monotonic()
        with self.condition:
            self.counts["calls"][f"{method}, {kind}"] += 1
            self.trials[trial.key] = trial
        name = await self._outcome(trial, getattr(client, method)(*args, timeout=trial.timeout, **settings))
        is_end = name in ("connection", "refused", "status 408", trial.at_once)
        with self.condition:
            # What has ended its connection may have yet to notice whose that was.
            fits = self.condition.wait_for(
                lambda: name in trial.allowed() or (is_end and self._was_blown(trial)), 10 if is_end else 0
            )
            self.counts["outcomes"][name if fits else "offences"] += 1
            del self.trials[trial.key]
            trial.ended = time.monotonic()
        if not fits:
            fault = f"{trial.name}{' at each try' if trial.lasting else ''}, timeout {trial.timeout:.3f}"
            kind = "wrong" if name.startswith("wrong") else "lost"
            self.offend(kind, f"{trial.key}, {fault}: {name}, not {sorted(trial.allowed())}")
        return name

    async def _outcome(self, trial: Trial, call: Any) -> str:
        """Wait for what comes of a call, and name it."""
        try:
            value = await call
        except boxer.BoxerAPIError as error:
            return f"status {error.status_code}" if error.status_code else "deadline"
        except boxer.BoxerConnectionError:
            return "connection"
        except asyncio.CancelledError:
            return "cancelled"
        except Exception as error:  # noqa: BLE001 - whatever it is, it is judged
            return "closed" if isinstance(error, RuntimeError) and "is closed" in str(error) else f"wrong: {error!r}"
        if trial.route == "POST run":
            value = value.exit_code, value.stdout, value.stderr
        if value == trial.wanted:
            return "ok"
        if trial.route == "POST run" and value[2].startswith("running container: "):
            value = None  # the server could not start the program, and said so
        return {False: "refused", None: "not started"}.get(value, f"wrong: {str(value)[:200]}")

    async def echo(self, client: Any, trial: Trial, **settings: Any) -> str:
        """Run what says what it is told."""
        text = trial.token + "x" * trial.pick.choice([0, 1, 100, 3000, 60_000])
        trial.wanted = (0, f"{text}\n", "")
        return await self.call(client, trial, _IMAGE, ["echo", text], **settings)

    async def run(self, client: Any, *may: str) -> None:
        """Run something."""
        await self.echo(client, Trial(self, "POST run", may=may))

    async def file(self, client: Any, *may: str) -> None:
        """Upload a file, download it, and have it deleted by a run."""
        number = next(self.numbers)
        up, down = (Trial(self, route, may=may, number=number) for route in ("POST files", "GET files"))
        size = up.pick.randrange(up.pick.choice([1, 200, 5000, 100_000, 3 * MIB]))
        content = (up.token.encode() + up.pick.randbytes(size))[:size]
        stream = types.SimpleNamespace(read=io.BytesIO(content).read)  # which cannot be sought
        given = up.pick.choice([content, bytearray(content), io.BytesIO(content), stream])
        up.wanted, up.can_repeat, down.wanted = None, given is not stream, content
        path = f"soak/{self.seed}/{up.token}bin"
        if await self.call(client, up, path, given) != "ok":
            down.may.add("status 404")
        await self.call(client, down, path)
        for fault in ("", "whole"):
            if await self.echo(client, Trial(self, "POST run", fault, {*may, "status 400"}), files=[path]) == "ok":
                break

    async def health(self, client: Any) -> None:
        """Ask whether the server is there; also by a new client, whose requests say which trial this is."""
        await self.call(client, Trial(self, "GET healthz", "whole"))
        trial = Trial(self, "GET healthz")
        async with self._another(client, headers={"Soak": trial.token}) as own:
            await self.call(own, trial)

    async def idle(self, client: Any) -> None:
        """Let something happen on an idle connection. The next call has to do without it."""
        async with self._another(client) as own:
            trial = Trial(self, "POST run", self.pick.choice([name for name in FAULTS if name[:4] == "idle"]))
            if await self.echo(own, trial) == "ok":
                await asyncio.get_running_loop().run_in_executor(None, trial.settled.wait, _PATIENCE)
                await self.echo(own, Trial(self, "POST run", "whole"))

    async def cancel(self, client: Any, *acts: Any) -> None:
        """Cancel calls."""
        task = asyncio.ensure_future(self.pick.choice(acts or (self.run, self.file))(client, "cancelled"))
        for _ in range(self.pick.choice([1, 5, 20, 60])):
            await asyncio.sleep(0)
        await asyncio.wait([task], timeout=self.pick.choice([0, self.pick.random() / 20, self.pick.random()]))
        task.cancel()
        await asyncio.wait([task])

    async def close(self, client: Any) -> None:
        """Close a client that is in use, from another thread or task."""

        async def later() -> None:
            await asyncio.sleep(self.pick.random() / 20)
            await own.aclose()

        async with self._another(client) as own:
            is_sync = isinstance(client, Awaited)
            run_in_thread = asyncio.get_running_loop().run_in_executor
            closing = run_in_thread(None, asyncio.run, later()) if is_sync else asyncio.ensure_future(later())
            await self.pick.choice([self.run, self.file])(own, "connection", "closed")
            await closing

    async def fork(self, client: Any) -> None:
        """Let a forked child use the client."""
        self.count("besides", "forks")
        await self.run(client)
        await asyncio.sleep(self.pick.random())

    async def program(self, client: Any) -> None:
        """Run a program."""
        trial = Trial(self, "POST run")
        code = trial.pick.randrange(4)
        trial.wanted = (code, f"{trial.token}\n", "oops\n")
        await self.call(client, trial, _IMAGE, ["sh", "-c", f"echo {trial.token}; echo oops >&2; exit {code}"])

    async def leave(self, client: Any, *may: str) -> None:
        """Run a program that does not end before the client's patience does."""
        trial = Trial(self, "POST run", "whole", {*may, "deadline"})
        trial.wanted, trial.timeout = None, trial.pick.uniform(0.05, 2)
        await self.call(client, trial, _IMAGE, ["sleep", "600"], env=[f"A={trial.token}"])

    @contextlib.asynccontextmanager
    async def _another(self, client: Any, **settings: Any) -> AsyncIterator[Any]:
        """Make a client like this one."""
        url, is_sync = self.injector.url, isinstance(client, Awaited)
        own: Any = boxer.BoxerClient(url, **settings) if is_sync else boxer.AsyncBoxerClient(url, **settings)
        own = Awaited(own) if is_sync else own
        try:
            yield own
        finally:
            await own.aclose()

    # From the start to the end

    def run_for(self, seconds: float) -> None:
        """Make calls for so long, from many threads and tasks."""
        with self.injector:
            with contextlib.ExitStack() as clients:
                # These import what a child forked meanwhile would wait for in vain, or what takes part in a fork.
                socket.getaddrinfo("127.0.0.1", 0)
                ThreadPoolExecutor(1).shutdown()
                jobs = list(self._jobs(clients))
                threads = [threading.Thread(target=job, args=args, daemon=True) for job, *args in jobs]
                for thread in threads:
                    thread.start()
                with contextlib.suppress(KeyboardInterrupt):
                    self._watch(self.start + seconds)
                self.over.set()
                end = time.monotonic() + 4 * _PATIENCE
                for thread in threads:
                    thread.join(max(0, end - time.monotonic()))
                    if thread.is_alive():
                        self.offend("lost", f"{thread} hangs: {[trial.key for trial in self.trials.values()]}")
            with self.condition:
                self.condition.wait_for(lambda: not self.injector.links, 10)
                left = [str(link.client) for link in self.injector.links]
        if left:
            self.offend("leaked", f"{len(left)} connections: {left}")

    def _jobs(self, clients: contextlib.ExitStack) -> Iterator[tuple[Any, ...]]:
        acts = [*[self.run] * 8, self.file, self.file, self.health, self.idle, self.close]
        every_settings: list[dict[str, Any]] = [{}, {"max_connections": 3}]
        for settings in every_settings:
            client = Awaited(clients.enter_context(boxer.BoxerClient(self.injector.url, **settings)))
            yield from [(self._drive, self._work, client, acts)] * self.at_once
            yield (self._drive, self._crowd, settings, [*acts, self.cancel], 5 * self.at_once)
        yield (self._drive, self._work, Awaited(Forking(client.client, self.injector)), [self.fork])
        if self.has_programs:
            yield from [(self._drive, self._work, client, [self.program, self.leave])] * 2
            yield (
                self._drive,
                self._crowd,
                {},
                [self.program, self.leave, lambda own: self.cancel(own, self.leave)],
                2,
            )
        moving = boxer.AsyncBoxerClient(self.injector.url)
        clients.callback(lambda: asyncio.run(moving.aclose()))
        yield (self._move, moving, [self.run, self.file, self.cancel])

    def _drive(self, work: Callable[..., Any], *args: Any) -> None:
        try:
            asyncio.run(self._watched(work(*args)))
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is reported
            self.offend("wrong", f"{threading.current_thread()}: {error!r}")

    async def _watched(self, work: Any) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, what: self.offend("wrong", str(what)))
        await work
        left = asyncio.all_tasks() - {asyncio.current_task()}
        if left:
            self.offend("leaked", f"tasks: {left}")

    async def _work(self, client: Any, acts: Sequence[Callable[..., Any]]) -> None:
        while not self.over.is_set():
            await self.pick.choice(acts)(client)

    async def _crowd(self, settings: dict[str, Any], acts: Sequence[Callable[..., Any]], size: int) -> None:
        async with boxer.AsyncBoxerClient(self.injector.url, **settings) as client:
            await asyncio.gather(*[self._work(client, acts) for _ in range(size)])

    def _move(self, client: Any, acts: Sequence[Callable[..., Any]]) -> None:
        """Use a client in one event loop after another."""

        async def some() -> None:
            await asyncio.gather(*[self.pick.choice(acts)(client) for _ in range(5)])

        while not self.over.is_set():
            self.count("besides", "event loops")
            self._drive(some)

    def _watch(self, end: float) -> None:
        """Wait for the end, and watch for calls that hang."""
        memory, next_line = 0, self.start
        while not self.over.wait(0.5) and time.monotonic() < end:
            now = time.monotonic()
            with self.condition:
                late = [trial for trial in self.trials.values() if now > trial.began + trial.timeout + 2 * _PATIENCE]
                left = {link.trial for link in self.injector.links if link.trial}
            for trial in late:
                trial.began = math.inf
                self.offend("lost", f"{trial.key}, {trial.name}: hangs")
            for trial in left:
                if now > trial.ended + _PATIENCE:
                    trial.ended = math.inf
                    self.offend("leaked", f"{trial.key}, {trial.name}: its connection is still there")
            memory = memory or (_memory() if now > self.start + 60 else 0)
            if now > next_line:
                print(f"{self.summary()}; {_memory()} MiB", flush=True)
                next_line += 10
        if memory and _memory() > memory + _GROWTH:
            self.offend("leaked", f"memory: {_memory()} MiB, {memory} after the first minute")

    def summary(self) -> str:
        """Say in one line how it goes."""
        with self.condition:
            calls, faults, offences = (self.counts[name].copy() for name in ("calls", "faults", "offences"))
        del faults["whole"]
        took = f"{time.monotonic() - self.start:.0f} s, {sum(calls.values()):,} calls"
        found = ", ".join(f"{offences[name]} {name}" for name in ("wrong", "lost", "leaked"))
        return f"{took}, {sum(faults.values()):,} faults in {len(faults)} kinds: {found}"

    def table(self) -> Iterator[str]:
        """Say what was counted."""
        for title in ("calls", "outcomes", "faults", "besides"):
            cells = [f"  {name:<24}{number:>14,}" for name, number in sorted(self.counts[title].items())]
            yield f"\n{title}"
            yield from ("  ".join(cells[at : at + 2]) for at in range(0, len(cells), 2))


def _memory() -> int:
    """Return the MiB of this process that are in memory; 0 where that cannot be told."""
    with contextlib.suppress(OSError), open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // MIB
    return 0


def _open_descriptors() -> int:
    """Return how many descriptors this process has open."""
    return len(list(Path("/dev/fd").iterdir()))


def soak(minutes: float, seed: int, *, unsafe: bool) -> int:
    """Make calls through faults for so long, and return 0 if none came to harm."""
    seed, url = seed or random.randrange(1, 10**6), os.environ.get("BOXER_URL", "")
    sandbox = find_sandbox() or (PlainProcesses() if unsafe else NoSandbox())
    print(f"Seed {seed}, Python {sys.version.split()[0]}, programs run in: {url or sandbox.name}", flush=True)
    logging.getLogger("boxer").addHandler(logging.NullHandler())
    threads, descriptors = threading.active_count(), _open_descriptors()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        with contextlib.ExitStack() as stack:
            server = None if url else Swift(sandbox=sandbox, race=1 / 3)
            stack.enter_context(server or contextlib.nullcontext())
            has_programs = bool(url) or not isinstance(sandbox, NoSandbox)
            soaking = Soak(server.url if server else url, seed, has_programs=has_programs, at_once=4 if server else 1)
            report: Any = lambda what: soaking.offend("wrong", str(what))  # noqa: E731
            threading.excepthook = sys.unraisablehook = report
            soaking.run_for(60 * minutes)
            if server and (not server.wait_for(lambda: not server.runs_live) or server.outlived):
                soaking.offend("leaked", f"runs: {server.outlived} outlived their clients, {server.runs_live} still do")
        gc.collect()
    told = [str(each.message) for each in caught]
    ends = [("threads", threading.active_count(), threads), ("descriptors", _open_descriptors(), descriptors)]
    for what, now, then in [*ends, ("warnings", len(told), 0)]:
        if now > then:
            soaking.offend("leaked", f"{what}: {now}, not {then} {told[:3] if what == 'warnings' else ''}")
    print(*soaking.table(), "", *soaking.offences[:10], soaking.summary(), sep="\n")
    return 1 if soaking.offences else 0


def main() -> int:
    """Read the command line, and soak."""
    parser = argparse.ArgumentParser(description="Call a stand-in server through faults, and check what comes back.")
    parser.add_argument("--minutes", type=float, default=10, help="default: 10")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn; default: any")
    parser.add_argument("--unsafe", action="store_true", help="without a sandbox, run programs all the same")
    options = parser.parse_args()
    return soak(options.minutes, options.seed, unsafe=options.unsafe)


if __name__ == "__main__":
    raise SystemExit(main())
