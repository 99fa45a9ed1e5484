"""One candidate doing one kind of work, in a process of its own: `python work.py URL CANDIDATE WORK [ARGUMENT …]`.

Prints a line of JSON: `cpu` and `wall`, the seconds that the work took (user and system time of this process, and time
by the clock); `memory`, the bytes by which its memory grew at the most; `done`, how many calls succeeded. What is done
before the clock starts is left out: imports, making the client, and a first call.

All candidates send the same POST, and decode the JSON of its answer. The bare loops do not even that: they send bytes
made beforehand, and receive as many as the answer has.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import asyncio
import gc
import importlib
import importlib.util
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RUN = {"image": "python:3.12-slim", "cmd": ["python3", "-c", "print('hello world')"]}
THREADS = 16

URL = ""  # of the server


def boxer() -> Any:
    """Import this boxer.py by its path: boxer-sdk 0.1.0 is called boxer too."""
    spec = importlib.util.spec_from_file_location("boxer", ROOT / "boxer.py")
    assert spec and spec.loader
    module = sys.modules["boxer"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- Candidates: how each makes one call, downloads and uploads ------------------------------------------------------


class Boxer:
    """This project's client, and boxer-sdk 0.1.0, which has the same methods."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.client = module.BoxerClient(URL)

    def run(self) -> None:
        assert self.client.run(**RUN).exit_code == 0

    def download(self, path: str) -> bytes:
        return self.client.download_file(path)  # type: ignore[no-any-return]

    def upload(self, path: str) -> None:
        with open(path, "rb") as file:
            self.client.upload_file("large", file)

    def save(self, path: str) -> None:
        self.client.download_path("huge", path)

    def folder(self, path: str) -> None:
        self.client.upload_path(path)

    def close(self) -> None:
        self.client.close()


class Urllib3:
    def __init__(self, module: Any) -> None:
        self.pool = module.PoolManager(maxsize=THREADS)

    def run(self) -> None:
        answer = self.pool.request("POST", URL + "/run", json=RUN)
        assert answer.status == 200 and answer.json()["exit_code"] == 0

    def download(self, path: str) -> bytes:
        return self.pool.request("GET", f"{URL}/files?path={path}").data  # type: ignore[no-any-return]

    def close(self) -> None:
        self.pool.clear()


class Httpx:
    def __init__(self, module: Any) -> None:
        self.client = module.Client(base_url=URL, timeout=120)

    def run(self) -> None:
        answer = self.client.post("/run", json=RUN)
        assert answer.status_code == 200 and answer.json()["exit_code"] == 0

    def download(self, path: str) -> bytes:
        return self.client.get(f"/files?path={path}").content  # type: ignore[no-any-return]

    def upload(self, path: str) -> None:
        with open(path, "rb") as file:
            answer = self.client.post("/files", data={"path": "large"}, files={"file": file})
        assert answer.status_code == 200

    def close(self) -> None:
        self.client.close()


class Bare(threading.local):
    """The limit: a socket for each thread, and no HTTP."""

    def __init__(self, _module: Any) -> None:
        self.socket = socket.create_connection(address())
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.request = bare_request()
        self.socket.sendall(self.request)
        self.size = len(self.socket.recv(65536))

    def run(self) -> None:
        self.socket.sendall(self.request)
        left = self.size
        while left > 0:
            left -= len(self.socket.recv(65536))

    def download(self, path: str) -> bytearray:
        """Receive into memory that was allocated for as much as the answer says it has."""
        self.socket.sendall(f"GET /files?path={path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        head, _, start = self.socket.recv(4096).partition(b"\r\n\r\n")
        size = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        content = bytearray(size)
        content[: len(start)] = start
        with memoryview(content) as view:
            at = len(start)
            while at < size:
                at += self.socket.recv_into(view[at:])
        return content

    def close(self) -> None:
        self.socket.close()


def bare_request() -> bytes:
    body = json.dumps(RUN).encode()
    fields = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return f"POST /run HTTP/1.1\r\n{fields}\r\n\r\n".encode() + body


def address() -> tuple[str, int]:
    parts = urllib.parse.urlsplit(URL)
    return parts.hostname or "", parts.port or 80


class Curl:
    def __init__(self, _module: Any) -> None:
        pass

    def run(self) -> None:
        pass

    def upload(self, path: str) -> None:
        form = ["-F", f"file=@{path}", "-F", "path=large"]
        subprocess.run(["curl", "--fail", "--silent", "--output", os.devnull, *form, URL + "/files"], check=True)

    def save(self, path: str) -> None:
        subprocess.run(["curl", "--fail", "--silent", "--output", path, URL + "/files?path=huge"], check=True)

    def close(self) -> None:
        pass


class AsyncBoxer:
    def __init__(self, module: Any) -> None:
        self.client = module.AsyncBoxerClient(URL)

    async def run(self) -> None:
        assert (await self.client.run(**RUN)).exit_code == 0

    async def download(self, path: str) -> bytes:
        return await self.client.download_file(path)  # type: ignore[no-any-return]

    async def upload(self, path: str) -> None:
        with open(path, "rb") as file:
            await self.client.upload_file("large", file)

    async def save(self, path: str) -> None:
        await self.client.download_path("huge", path)

    async def folder(self, path: str) -> None:
        await self.client.upload_path(path)

    async def close(self) -> None:
        await (self.client.aclose if hasattr(self.client, "aclose") else self.client.close)()


class Aiohttp:
    def __init__(self, module: Any) -> None:
        self.form = module.FormData
        self.session = module.ClientSession(timeout=module.ClientTimeout(total=120))

    async def run(self) -> None:
        async with self.session.post(URL + "/run", json=RUN) as answer:
            assert answer.status == 200 and (await answer.json())["exit_code"] == 0

    async def download(self, path: str) -> bytes:
        async with self.session.get(f"{URL}/files?path={path}") as answer:
            return await answer.read()  # type: ignore[no-any-return]

    async def upload(self, path: str) -> None:
        with open(path, "rb") as file:
            form = self.form()
            form.add_field("file", file)
            form.add_field("path", "large")
            async with self.session.post(URL + "/files", data=form) as answer:
                assert answer.status == 200

    async def close(self) -> None:
        await self.session.close()


class AsyncHttpx:
    def __init__(self, module: Any) -> None:
        self.client = module.AsyncClient(base_url=URL, timeout=120)

    async def run(self) -> None:
        answer = await self.client.post("/run", json=RUN)
        assert answer.status_code == 200 and answer.json()["exit_code"] == 0

    async def download(self, path: str) -> bytes:
        return (await self.client.get(f"/files?path={path}")).content  # type: ignore[no-any-return]

    async def close(self) -> None:
        await self.client.aclose()


class AsyncBare(asyncio.Protocol):
    """The limit: a transport for each call in flight, and no HTTP."""

    answered: asyncio.Future[None]

    def __init__(self, _module: Any) -> None:
        self.request = bare_request()
        self.idle: list[AsyncBare] = []

    async def run(self) -> None:
        connection = self.idle.pop() if self.idle else await self.connected()
        connection.answered = asyncio.get_running_loop().create_future()
        connection.transport.write(self.request)
        await connection.answered
        self.idle.append(connection)

    async def connected(self) -> AsyncBare:
        return (await asyncio.get_running_loop().create_connection(lambda: AsyncBare(None), *address()))[1]

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if data.endswith(b"}"):
            self.answered.set_result(None)

    async def close(self) -> None:
        for connection in self.idle:
            connection.transport.close()


class BareStreams:
    """The limit of a client on asyncio's streams: a reader and a writer for each call in flight, and no HTTP."""

    def __init__(self, _module: Any) -> None:
        self.request = bare_request()
        self.idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def run(self) -> None:
        reader, writer = self.idle.pop() if self.idle else await asyncio.open_connection(*address())
        writer.write(self.request)
        while not (await reader.read(65536)).endswith(b"}"):
            pass
        self.idle.append((reader, writer))

    async def close(self) -> None:
        for _, writer in self.idle:
            writer.close()


CANDIDATES: dict[str, tuple[Callable[[], Any], Any, Any]] = {
    "boxer.py": (boxer, Boxer, AsyncBoxer),
    "boxer-sdk": (lambda: importlib.import_module("boxer"), Boxer, AsyncBoxer),
    "aiohttp": (lambda: importlib.import_module("aiohttp"), None, Aiohttp),
    "urllib3": (lambda: importlib.import_module("urllib3"), Urllib3, None),
    "httpx": (lambda: importlib.import_module("httpx"), Httpx, AsyncHttpx),
    "bare sockets": (lambda: None, Bare, AsyncBare),
    "bare streams": (lambda: None, None, BareStreams),
    "curl": (lambda: None, Curl, None),
}


# ---- Works: each returns how many calls succeeded --------------------------------------------------------------------


def in_a_row(candidate: Any, count: int) -> int:
    for _ in range(count):
        candidate.run()
    return count


def in_threads(candidate: Any, count: int) -> int:
    share = count // THREADS
    threads = [threading.Thread(target=in_a_row, args=(candidate, share)) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return share * THREADS


def download(candidate: Any, size: int, path: Any = "large") -> int:
    return int(len(candidate.download(str(path))) == size)


def upload(candidate: Any, path: str) -> int:
    candidate.upload(path)
    return 1


def save(candidate: Any, size: int, path: str) -> int:
    candidate.save(path)
    return is_saved(path, size)


def is_saved(path: str, size: int) -> int:
    """Look whether a file is there, and remove it."""
    found = Path(path).stat().st_size
    Path(path).unlink()
    return int(found == size)


def folder(candidate: Any, path: str) -> int:
    candidate.folder(path)
    return 1


async def in_flight(candidate: Any, count: int, width: int) -> int:
    left = iter(range(count))

    async def work() -> None:
        for _ in left:
            await candidate.run()

    await asyncio.gather(*(work() for _ in range(width)))
    return count


async def burst(candidate: Any, count: int) -> int:
    """Start so many calls at once."""
    results = await asyncio.gather(*(candidate.run() for _ in range(count)), return_exceptions=True)
    return sum(result is None for result in results)


async def download_async(candidate: Any, size: int) -> int:
    return int(len(await candidate.download("large")) == size)


async def upload_async(candidate: Any, path: str) -> int:
    await candidate.upload(path)
    return 1


async def save_async(candidate: Any, size: int, path: str) -> int:
    await candidate.save(path)
    return is_saved(path, size)


async def folder_async(candidate: Any, path: str) -> int:
    await candidate.folder(path)
    return 1


WORKS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        *(in_a_row, in_threads, download, upload, save, folder),
        *(in_flight, burst, download_async, upload_async, save_async, folder_async),
    )
}


class Measure:
    """What is spent between `begin` and `end`, by this process, and by those that it started."""

    def begin(self) -> None:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # begin anew to look for the peak of this process's memory
        self.memory, self.cpu, self.clock = _peak(), _cpu(), time.perf_counter()

    def end(self, done: int) -> dict[str, float]:
        wall, cpu = time.perf_counter() - self.clock, _cpu() - self.cpu
        return {"wall": wall, "cpu": cpu, "memory": _peak() - self.memory, "done": done}


def _cpu() -> float:
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _peak() -> int:
    """Return the most memory that this process has had, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def measure(load: Callable[[], Any], make: Any, work: Callable[..., Any], *arguments: Any) -> dict[str, float]:
    candidate, spent = make(load()), Measure()
    candidate.run()
    spent.begin()
    told = spent.end(work(candidate, *arguments))
    candidate.close()
    return told


async def measure_async(
    load: Callable[[], Any], make: Any, work: Callable[..., Any], *arguments: Any
) -> dict[str, float]:
    candidate, spent = make(load()), Measure()
    await candidate.run()
    spent.begin()
    told = spent.end(await work(candidate, *arguments))
    await candidate.close()
    return told


def main(url: str, name: str, work: str, *arguments: str) -> dict[str, float]:
    global URL  # noqa: PLW0603 - it is the same for all that this process does
    URL = url
    load, make, make_async = CANDIDATES[name]
    values = [int(argument) if argument.isdecimal() else argument for argument in arguments]
    if asyncio.iscoroutinefunction(WORKS[work]):
        return asyncio.run(measure_async(load, make_async, WORKS[work], *values))
    return measure(load, make, WORKS[work], *values)


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
