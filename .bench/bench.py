"""Measure boxer.py against what a person would use instead, side by side: `tox -e bench`.

    python .bench/bench.py             measures all, and writes results.json, calls.svg and memory.svg
    python .bench/bench.py --rounds 1  is quicker, and says less
    python .bench/bench.py --readme    writes the tables of results.json into .bench/README.md, and measures nothing

Each figure is the best of several rounds, in which the candidates take turns, each in a process of its own (work.py).
The server of runs and downloads is an nginx with one process that answers from memory, that of uploads takes what
comes and throws it away: it is the clients that are measured. Needs Linux, nginx and curl.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
MIB = 1 << 20
LARGE, HUGE = 256 * MIB, 2048 * MIB
SMALL_FILES = 2000
DELAY = 0.005  # seconds: a server on the same continent
SYNC = ("boxer.py", "boxer-sdk", "urllib3", "httpx", "bare sockets")
ASYNC = ("boxer.py", "boxer-sdk", "aiohttp", "httpx", "bare sockets", "bare streams")
COLUMNS = ("boxer.py", "boxer-sdk", "aiohttp", "urllib3", "httpx", "curl", "bare sockets", "bare streams")
WIDTHS = (1, 2, 5, 10, 20, 50, 100)
SIZES = (1, 4, 16, 64, 256)

ANSWER = {
    "exec_id": "boxer-6f3f2a1e-6ab6-4b60-a3a5-1a1f0f0f0f0f",
    "exit_code": 0,
    "stdout": "hello world\n",
    "stderr": "",
    "wall_ms": 123,
}


class Work(NamedTuple):
    """A row of the table."""

    title: str
    work: str
    arguments: tuple[Any, ...]
    candidates: tuple[str, ...]
    calls: int  # that one process makes
    unit: str = "µs"  # of the time for a call
    is_busy: bool = False  # other processes keep the machine's processors awake
    delay: float = 0.0  # seconds that the server takes for each request; if any, time by the clock is compared

    @property
    def measure(self) -> str:
        return "wall" if self.delay else "cpu"


def works(disk: str) -> list[Work]:
    """Return the rows; `disk` is the folder with what is uploaded, and to which is downloaded."""
    huge, small, saved = f"{disk}/huge", f"{disk}/small", f"{disk}/saved"
    asynchronous, both = ASYNC[:-2], ("boxer.py", "boxer-sdk")
    return [
        Work("runs in a row", "in_a_row", (4000,), SYNC, 4000),
        Work("runs in a row, busy machine", "in_a_row", (4000,), SYNC, 4000, is_busy=True),
        Work("runs from 16 threads", "in_threads", (4000,), SYNC, 4000),
        Work("runs in a row, asyncio", "in_flight", (3000, 1), ASYNC, 3000),
        Work("runs in a row, asyncio, busy machine", "in_flight", (3000, 1), ASYNC, 3000, is_busy=True),
        Work("runs, 50 in flight, asyncio", "in_flight", (4000, 50), ASYNC, 4000),
        Work("runs, 1,000 at once, asyncio", "burst", (1000,), asynchronous, 1000),
        Work("runs, 10,000 at once, asyncio", "burst", (10_000,), ("boxer.py", "aiohttp"), 10_000),
        Work("download of 256 MiB", "download", (LARGE,), SYNC, 1, "ms"),
        Work("download of 256 MiB, asyncio", "download_async", (LARGE,), asynchronous, 1, "ms"),
        Work("download of 2 GiB to disk", "save", (HUGE, saved), ("boxer.py", "curl"), 1, "ms"),
        Work("download of 2 GiB to disk, asyncio", "save_async", (HUGE, saved), ("boxer.py",), 1, "ms"),
        Work("upload of 2 GiB from disk", "upload", (huge,), ("boxer.py", "boxer-sdk", "httpx", "curl"), 1, "ms"),
        Work("upload of 2 GiB from disk, asyncio", "upload_async", (huge,), ("boxer.py", "aiohttp"), 1, "ms"),
        Work("folder of 2,000 small files", "folder", (small,), both, 1, "ms"),
        Work("folder of 2,000 small files, asyncio", "folder_async", (small,), both, 1, "ms"),
        Work("the same folder, by the clock", "folder", (small,), both, 1, "ms", delay=DELAY),
        Work("the same folder, asyncio, by the clock", "folder_async", (small,), both, 1, "ms", delay=DELAY),
        Work("import", "import", (), ("boxer.py", "boxer-sdk", "aiohttp", "urllib3", "httpx"), 1, "ms"),
    ]


# ---- Servers ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def nginx(folder: Path) -> Iterator[str]:
    """Serve runs and downloads; yield the base URL."""
    program = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin")
    if program is None:
        raise SystemExit("bench.py: nginx is missing; install it (Debian: nginx-light)")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    answer = json.dumps(ANSWER, separators=(",", ":")).replace("\\", "\\\\")
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(f"""
        daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log stderr crit;
        events {{ worker_connections 4096; }}
        http {{
            access_log off; sendfile on; tcp_nopush on; keepalive_requests 1000000000; {temporary}
            server {{
                listen 127.0.0.1:{port} backlog=4096;
                location = /run {{ default_type "application/json; charset=utf-8"; return 200 '{answer}'; }}
                location = /files {{ root {folder}; try_files /$arg_path =404; }}
            }}
        }}""")
    with subprocess.Popen([program, "-c", str(folder / "nginx.conf")]) as server:
        try:
            for _ in range(200):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.02)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


@contextlib.contextmanager
def sink(delay: float) -> Iterator[str]:
    """Take uploads and throw them away, in a process of its own; yield the base URL."""
    program = [sys.executable, __file__, "--sink", str(delay)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            yield server.stdout.readline().strip()
        finally:
            server.terminate()


def serve_sink(delay: float) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        while True:
            threading.Thread(target=take, args=(listener.accept()[0], delay), daemon=True).start()


def take(sock: socket.socket, delay: float) -> None:
    """Answer requests on a connection, each so many seconds after all of it has come."""
    room, rest = bytearray(4 * MIB), b""
    with sock:
        while True:
            while b"\r\n\r\n" not in rest:
                received = sock.recv(65536)
                if not received:
                    return
                rest += received
            head, _, rest = rest.partition(b"\r\n\r\n")
            if b"100-continue" in head:
                sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            if b"\r\ntransfer-encoding: chunked" in head.lower():
                while not rest.endswith(b"\r\n0\r\n\r\n"):
                    rest = rest[-16:] + sock.recv(MIB)
            else:
                length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
                assert length
                left = int(length[1]) - len(rest)
                while left > 0:
                    left -= sock.recv_into(room, min(left, len(room)), socket.MSG_TRUNC)
            rest, content = b"", b'{"path":"large"}' if b" /files " in head else json.dumps(ANSWER).encode()
            time.sleep(delay)
            fields = b"Content-Type: application/json\r\nContent-Length: %d" % len(content)
            sock.sendall(b"HTTP/1.1 200 OK\r\n%b\r\n\r\n%b" % (fields, content))


# ---- Measuring -------------------------------------------------------------------------------------------------------


# What a process does that only imports a candidate: none of the modules that work.py needs are there before.
IMPORT = """
import time
wall, cpu = time.perf_counter(), time.process_time()
import {}
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
print('{{"wall": %f, "cpu": %f, "memory": 0, "done": 1}}' % (wall, cpu))
"""


def once(url: str, candidate: str, work: str, *arguments: Any) -> dict[str, float]:
    """Let a candidate do its work once, in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    program = [sys.executable, str(HERE / "work.py"), url, candidate, work, *map(str, arguments)]
    if work == "import":
        program = [sys.executable, "-c", IMPORT.format("boxer" if "boxer" in candidate else candidate)]
        if candidate == "boxer.py":  # not boxer-sdk 0.1.0, which is called boxer too
            environment["PYTHONPATH"] = str(HERE.parent)
    done = subprocess.run(program, stdout=subprocess.PIPE, text=True, cwd=HERE, env=environment, check=True)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """Keep each processor at work that gives way to any other, so that none has to wake up."""
    code = "import os; os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))\nwhile True: pass"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def best(rounds: list[dict[str, float]], calls: int) -> dict[str, float]:
    """Return the least time for a call, and the least memory."""
    least = {name: min(told[name] for told in rounds) for name in ("cpu", "wall", "memory", "done")}
    return {
        "cpu": least["cpu"] / calls,
        "wall": least["wall"] / calls,
        "memory": least["memory"],
        "failed": calls - least["done"],
    }


def measure(rounds: int) -> dict[str, Any]:
    results: dict[str, Any] = {"python": platform.python_version(), "versions": versions(), "works": {}}
    in_memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with (
        tempfile.TemporaryDirectory(dir=in_memory) as name,
        tempfile.TemporaryDirectory() as disk,
        nginx(Path(name)) as url,
        sink(0.0) as sink_url,
        sink(DELAY) as far_sink_url,
    ):
        folder = Path(name)
        folder.chmod(0o755)  # nginx's worker is another user
        (folder / "large").write_bytes(os.urandom(MIB) * (LARGE // MIB))
        for path, size in [*((folder / f"{size}", size * MIB) for size in SIZES), (folder / "huge", HUGE)]:
            with path.open("wb") as file:
                file.truncate(size)
        with (Path(disk) / "huge").open("wb") as file:
            for _ in range(HUGE // MIB):
                file.write(bytes(MIB))
        (Path(disk) / "small").mkdir()
        for number in range(SMALL_FILES):
            (Path(disk) / "small" / f"{number:04}").write_bytes(b"x" * 100)
        for work in works(disk):
            where = url
            if work.work.startswith(("upload", "folder")):
                where = far_sink_url if work.delay else sink_url
            told: dict[str, list[dict[str, float]]] = {candidate: [] for candidate in work.candidates}
            with busy() if work.is_busy else contextlib.nullcontext():
                for _ in range(rounds):
                    for candidate in work.candidates:
                        told[candidate].append(once(where, candidate, work.work, *work.arguments))
            results["works"][work.title] = {each: best(told[each], work.calls) for each in work.candidates}
            print(*line(work, results["works"][work.title]), sep="\n", flush=True)
        results["in flight"] = {
            candidate: [500 / once(url, candidate, "in_flight", 500, width)["wall"] for width in WIDTHS]
            for candidate in ASYNC[:-2]
        }
        results["memory"] = {
            candidate: [once(url, candidate, "download", size * MIB, str(size))["memory"] / MIB for size in SIZES]
            for candidate in SYNC[:-1]
        }
    return results


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("boxer-sdk", "aiohttp", "urllib3", "httpx")}


# ---- Reporting -------------------------------------------------------------------------------------------------------


def line(work: Work, figures: dict[str, dict[str, float]]) -> list[str]:
    """Return what to print of one work: a line for each candidate."""
    ours, scale = figures["boxer.py"], {"µs": 1e6, "ms": 1e3}[work.unit]
    lines = [f"\n{work.title} ({work.unit} of CPU time, and of time by the clock, for each)"]
    for candidate, told in figures.items():
        ratio = f"{told[work.measure] / ours[work.measure]:6.2f} ×"
        memory = f"{told['memory'] / MIB:8.1f} MiB" if work.calls == 1 and candidate != "curl" else ""
        failed = f"{told['failed']:.0f} failed" if told["failed"] else ""
        times = f"{told['cpu'] * scale:10.1f}{told['wall'] * scale:10.1f}"
        lines.append(f"  {candidate:13}{times}{ratio}{memory}  {failed}")
    return lines


def table(results: dict[str, Any]) -> str:
    """Return the table of .bench/README.md: our own CPU time, and how many times as much the others take."""
    rows = [["", *COLUMNS], ["---", *["---:"] * len(COLUMNS)]]
    for work in works(""):
        figures, scale = results["works"][work.title], {"µs": 1e6, "ms": 1e3}[work.unit]
        ours = figures["boxer.py"][work.measure]
        others = (f"{figures[each][work.measure] / ours:.2f} ×" if each in figures else "" for each in COLUMNS[1:])
        rows.append([work.title, f"{ours * scale:.1f} {work.unit}", *others])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def memory_table(results: dict[str, Any]) -> str:
    """Return the table of .bench/README.md that says how much memory a file takes."""
    rows = [["", *COLUMNS[:-3]], ["---", *["---:"] * (len(COLUMNS) - 3)]]
    for work in works(""):
        if work.work.startswith(("download", "save", "upload")):
            figures = results["works"][work.title]
            memory = (f"{figures[each]['memory'] / MIB:.0f} MiB" if each in figures else "" for each in COLUMNS[:-3])
            rows.append([work.title, *memory])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw(results: dict[str, Any]) -> None:
    """Draw the charts."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "boxer"  # the same figures, the same file
    from matplotlib import pyplot as plt

    charts = {
        "calls.svg": (WIDTHS, results["in flight"], "calls in flight", "calls per second"),
        "memory.svg": (SIZES, results["memory"], "MiB that are downloaded", "MiB of memory that it takes"),
    }
    for name, (across, lines, below, beside) in charts.items():
        figure, axes = plt.subplots(figsize=(7, 4))
        for candidate, values in lines.items():
            is_ours = candidate == "boxer.py"
            axes.plot(across, values, label=candidate, marker="o", markersize=4, linewidth=3 if is_ours else 1.5)
        axes.set(xlabel=below, ylabel=beside, xscale="log", xticks=across, xticklabels=across)
        if name == "memory.svg":
            axes.set(yscale="log", yticks=across, yticklabels=across)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(HERE / name, bbox_inches="tight", metadata={"Date": None}, facecolor="white")


TABLES = {"time": table, "memory": memory_table}


def write_readme(results: dict[str, Any]) -> None:
    """Put the tables between their marks in .bench/README.md."""
    readme = HERE / "README.md"
    text = readme.read_text("utf-8")
    for mark, make in TABLES.items():
        begin, end = f"<!-- bench {mark} -->\n", "\n<!-- end -->"
        before, _, after = text.partition(begin)
        text = before + begin + make(results) + end + after.partition(end)[2]
    readme.write_text(text, "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--print", choices=("time", "memory"), help="print a table of results.json, and measure nothing"
    )
    parser.add_argument("--readme", action="store_true", help="write the tables of results.json into .bench/README.md")
    parser.add_argument("--sink", type=float, metavar="DELAY", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.sink is not None:
        serve_sink(arguments.sink)
    file = HERE / "results.json"
    if arguments.print:
        print(TABLES[arguments.print](json.loads(file.read_text("utf-8"))))
    elif arguments.readme:
        write_readme(json.loads(file.read_text("utf-8")))
    else:
        results = measure(arguments.rounds)
        file.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
        draw(results)
        print("", table(results), "", memory_table(results), sep="\n")


if __name__ == "__main__":
    main()
