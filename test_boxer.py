"""The tests of boxer.py, and the server they run against.

The server, `StandIn`, answers as a Boxer server does: `POST /run`, `POST` and `GET /files`, `GET /healthz`.
It runs programs in gVisor, else in bubblewrap, else in plain namespaces, and takes this machine's own system
folders, read-only, for every image. It is for one person on one machine: it listens on the loopback address
alone. On purpose it shares no code with boxer.py, or both would share their mistakes.

    python3 test_boxer.py serve     keeps a server up and prints the BOXER_URL to use
    python3 test_boxer.py demo      starts one, walks through the client, and prints what comes back
    python3 -m pytest               runs the tests (only this needs something installed: pytest)

From top to bottom: sandboxes, running a program, Go's ways with text, the store, requests, the server, the
command line; then the tests: what holds for all of them, helpers and how to add a test, the contract of the server,
the sections of boxer.py in their order, programs on the stand-in, real proxies, the work of a call, copies and the
package, the README.

BOXER_SANDBOX (gVisor, bubblewrap, namespaces, none) chooses the sandbox. BOXER_URL names a real server; then the tests
of the contract, and those that run programs, are run against that one.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import email.errors
import email.utils
import errno
import functools
import http
import http.server
import io
import ipaddress
import itertools
import json
import os
import posixpath
import random
import re
import selectors
import shlex
import shutil
import signal
import socket
import socketserver
import stat
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, Any

NOBODY = 65534
MIB = 1 << 20
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
MOUNTS_AT_MOST = 250  # paths of a run's `files`; gVisor, where it is used here, takes some fewer

# ------------------------------------------------------------------------------------------------------------
# Sandboxes
# ------------------------------------------------------------------------------------------------------------


def _python_prefix() -> str:
    """Return where this Python lives if that is outside /usr, but never a folder with people's data in it."""
    prefix = os.path.realpath(sys.base_prefix)
    whole = ("/", "/usr", "/root", "/home", "/opt", os.path.expanduser("~"))
    return "" if prefix in whole or prefix.startswith("/usr/") else prefix


PREFIX = _python_prefix()
SANDBOX_PATH = f"{PREFIX}/bin:{DEFAULT_PATH}" if PREFIX else DEFAULT_PATH
SYSTEM_FOLDERS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
SYSTEM = [*SYSTEM_FOLDERS, "/etc/alternatives", "/etc/ld.so.cache", *([PREFIX] if PREFIX else [])]


_STARTING = "starting container: starting root container: starting sandbox: "


def _is_below(path: str, folders: Iterable[str]) -> bool:
    return any(path == folder or path.startswith(folder + "/") for folder in folders)


@dataclasses.dataclass
class Job:
    """One program to run, and the folder in which its sandbox is put together."""

    args: list[str]
    env: list[str]
    folder: str
    cwd: str = "/"
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)  # where mounted -> where it is
    limits: Mapping[str, float] = dataclasses.field(default_factory=dict)
    exec_id: str = dataclasses.field(default_factory=lambda: f"boxer-{uuid.uuid4()}")

    def __post_init__(self) -> None:
        """Cut text off at NUL, as gVisor does; give the program a PATH, and make the two folders."""
        self.args, self.env = ([text.partition("\0")[0] for text in texts] for texts in (self.args, self.env))
        if not any(entry.startswith("PATH=") for entry in self.env):
            self.env = [f"PATH={SANDBOX_PATH}", *self.env]
        self.rootfs, self.output = f"{self.folder}/rootfs", f"{self.folder}/output"
        os.makedirs(self.rootfs)
        os.mkdir(self.output)
        os.chmod(self.output, 0o777)

    @property
    def nofile(self) -> int:
        """The number of files the program may have open."""
        return max(int(self.limits.get("nofile") or 0), 0) or 256

    def binds(self) -> Iterator[tuple[str, str]]:
        """List what is mounted read-only, as (destination, source), outer folders first."""
        yield from ((path, path) for path in SYSTEM if os.path.exists(path) and not os.path.islink(path))
        yield from sorted(self.files.items())

    def host_path(self, path: str) -> str:
        """Say where on this machine the file is that the program will see at `path`."""
        path = go_clean(posixpath.join(self.cwd, path))
        mounts = sorted([*self.binds(), ("/output", self.output)], key=lambda mount: -len(mount[0]))
        for destination, source in mounts:
            if _is_below(path, [destination]):
                return source + path[len(destination) :]
        return path if _is_below(path, SYSTEM_FOLDERS) else self.rootfs + path

    def build(self) -> None:
        """Make the root file system: mount points, the system's links, and the working directory.

        Nothing is made inside a system folder: gVisor, as root, would make it on the machine itself.
        """
        for name in ("proc", "dev", "sys", "tmp", "output", "etc"):
            os.mkdir(f"{self.rootfs}/{name}")
        for link in filter(os.path.islink, SYSTEM_FOLDERS):
            os.symlink(os.readlink(link), self.rootfs + link)
        entries = "root:x:0:0:root:/root:/bin/sh\n", f"nobody:x:{NOBODY}:{NOBODY}:nobody:/:/bin/sh\n"
        _write(f"{self.rootfs}/etc/passwd", "".join(entries))
        for destination, source in self.binds():
            _mount_point(self.rootfs + destination, os.path.isdir(source))
        if not _is_below(self.cwd, [*SYSTEM, "/proc", "/dev", "/sys", "/tmp"]):
            with contextlib.suppress(OSError):  # a file is in the way: the sandbox will say so
                os.makedirs(self.host_path(self.cwd), exist_ok=True)

    def unbuildable(self) -> str:
        """Say, in gVisor's words, that there can be no such sandbox. They do not tell why."""
        too_many = len(self.files) > MOUNTS_AT_MOST
        paths = "".join([*self.files, self.cwd])
        fits = not too_many and "\0" not in paths and all("=" in entry for entry in self.env)
        if fits and not os.path.isfile(self.host_path(self.cwd)):
            return ""
        problem = "cannot create sandbox: cannot read client sync file: waiting for sandbox to start: EOF"
        return f"creating container: {problem}"

    def misplaced(self) -> str:
        """Say what would have to be made in a system folder or below /tmp, in gVisor's words for a missing folder."""
        missing = [path for path in [*self.files, self.cwd] if _is_below(path, SYSTEM) and not os.path.exists(path)]
        if self.cwd.startswith("/tmp/") and not os.path.isdir(self.host_path(self.cwd)):
            missing += [] if any(_is_below(path, [self.cwd]) for path in self.files) else [self.cwd]
        if not missing:
            return ""
        problem = f'failed to find initial working directory "{missing[0]}"'
        return f"{_STARTING}creating process: {problem}: no such file or directory"

    def unstartable(self) -> str:
        """Say why the program cannot be started, as gVisor does by itself."""
        program = self.args[0]
        path = next(entry[5:] for entry in reversed(self.env) if entry.startswith("PATH="))
        if "/" in program:
            problem = f"creating process: failed to load {posixpath.join(self.cwd, program)}"
        else:
            problem = f'error finding executable "{program}" in PATH [{path.replace(":", " ")}]'
        places = [program] if "/" in program else [f"{folder}/{program}" for folder in path.split(":")]
        found = any(os.access(self.host_path(place), os.X_OK) for place in places)
        return "" if found else f"{_STARTING}{problem}: no such file or directory"


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def _mount_point(path: str, folder: bool) -> None:
    os.makedirs(path if folder else os.path.dirname(path), exist_ok=True)
    if not folder and not os.path.exists(path):
        _write(path, "")


class Sandbox:
    """A way to run a job: its command line, and what ends it for good."""

    name = ""
    isolates = True

    def command(self, job: Job) -> list[str]:
        """Return the command line that runs the job."""
        raise NotImplementedError

    def refusal(self, job: Job) -> str:
        """Say why the job cannot start, or nothing."""
        return job.unbuildable() or job.misplaced() or job.unstartable()

    def kill(self, job: Job, pid: int, ended: Callable[[float], object]) -> None:
        """End the job and all it has started: from within, so that it can reap its own; then for certain."""
        if self.isolates and self._killed_inside(job, pid):
            ended(2.0)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)

    def _killed_inside(self, _job: Job, pid: int) -> bool:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
            children = [int(child) for child in file.read().split()]
            for child in children:
                os.kill(child, signal.SIGKILL)
            return bool(children)
        return False

    @functools.cached_property
    def problem(self) -> str:
        """Run a program as a real run would; say why its output does not come back, or nothing if it does."""
        with _scratch() as folder:
            write = "open('/output/probe', 'w').write('kept'); print('printed')"
            job = Job(["python3", "-c", write], [], f"{folder}/job")
            try:
                outcome = execute(self, job, seconds=30, limit=MIB)
            except FileNotFoundError as error:
                return f"{error.filename} is not installed"
            except (OSError, ValueError) as error:
                return str(error)
            if outcome.stdout == b"printed\n" and os.path.exists(f"{job.output}/probe"):
                return ""
            said = outcome.stderr.decode("utf-8", "replace").strip() or f"{outcome.ending}, {outcome.exit_code}"
            return said.splitlines()[-1]


class GVisor(Sandbox):
    """gVisor's `runsc`, which Boxer itself uses, with an OCI bundle."""

    name = "gVisor"

    def command(self, job: Job) -> list[str]:
        """Write the bundle and return the command line."""
        job.build()
        _write(f"{job.folder}/config.json", json.dumps(self._specification(job)))
        return [*self._runsc(job), "run", "--bundle", job.folder, job.exec_id]

    def refusal(self, job: Job) -> str:
        """Leave it to gVisor to say what is wrong with the program."""
        return job.unbuildable() or job.misplaced()

    def _killed_inside(self, job: Job, _pid: int) -> bool:
        ask = [*self._runsc(job), "kill", job.exec_id, "KILL"]
        return subprocess.run(ask, stdin=subprocess.DEVNULL, capture_output=True, env=search_path()).returncode == 0

    def _runsc(self, job: Job) -> list[str]:
        flags = ["--platform=ptrace", "--ignore-cgroups", "--network=none"]
        return ["runsc", "--root", f"{job.folder}/state", *flags, *(["--rootless"] if os.getuid() else [])]

    def _specification(self, job: Job) -> dict[str, Any]:
        user = 0 if os.getuid() else NOBODY  # without root, the one user there is has number 0 inside
        nofile = {"type": "RLIMIT_NOFILE", "hard": job.nofile, "soft": job.nofile}
        return {
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": user, "gid": user},
                "args": job.args,
                "env": job.env,
                "cwd": job.cwd,
                "capabilities": {},
                "noNewPrivileges": True,
                "rlimits": [nofile],
            },
            "root": {"path": "rootfs", "readonly": True},
            "hostname": job.exec_id,
            "mounts": self._mounts(job),
            "linux": {
                "namespaces": [{"type": name} for name in ("pid", "network", "ipc", "uts", "mount")],
                "resources": self._resources(job),
            },
        }

    def _mounts(self, job: Job) -> list[dict[str, Any]]:
        size = "size=65536k"
        mounts = [
            ("/proc", "proc", "proc", []),
            ("/dev", "tmpfs", "tmpfs", ["nosuid", "strictatime", "mode=755", size]),
            ("/sys", "sysfs", "sysfs", ["nosuid", "noexec", "nodev", "ro"]),
            ("/tmp", "tmpfs", "tmpfs", ["nosuid", "nodev", "mode=1777", size]),
            *((destination, "bind", source, ["rbind", "ro"]) for destination, source in job.binds()),
            ("/output", "bind", job.output, ["rbind", "rw"]),
        ]
        return [dict(zip(("destination", "type", "source", "options"), mount)) for mount in mounts]

    def _resources(self, job: Job) -> dict[str, Any]:
        return {
            "memory": {"limit": int(job.limits.get("memory_mb") or 256) * MIB},
            "cpu": {"period": 100_000, "quota": int((job.limits.get("cpu_cores") or 1.0) * 100_000)},
            "pids": {"limit": int(job.limits.get("pids_limit") or 64)},
        }


def _as_nobody() -> list[str]:
    """Return the command that gives up root for good, for those who have it."""
    drop = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"] if os.getuid() == 0 else []
    return ["setpriv", *drop, "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"]


class Bubblewrap(Sandbox):
    """`bwrap`, which needs no root."""

    name = "bubblewrap"

    def command(self, job: Job) -> list[str]:
        """Build the root file system and return the command line."""
        job.build()
        user = ["--unshare-user", "--uid", str(NOBODY), "--gid", str(NOBODY)] if os.getuid() else []
        flags = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--die-with-parent"]
        binds = [text for mount in job.binds() for text in ("--ro-bind", mount[1], mount[0])]
        return [
            *("prlimit", f"--nofile={job.nofile}", "bwrap", *user, *flags, "--new-session"),
            *("--hostname", job.exec_id, "--ro-bind", job.rootfs, "/"),
            *("--size", str(64 * MIB), "--perms", "1777", "--tmpfs", "/tmp", *binds),
            *("--proc", "/proc", "--dev", "/dev", "--bind", job.output, "/output"),
            *("--chdir", job.cwd, "--", *([] if os.getuid() else _as_nobody())),
            *("env", "-i", "--", *job.env, *job.args),
        ]


class Namespaces(Sandbox):
    """`unshare`, and a script that mounts what the program may see."""

    name = "namespaces"

    def command(self, job: Job) -> list[str]:
        """Build the root file system and return the command line."""
        job.build()
        user = ["--user", "--map-root-user"] if os.getuid() else []
        flags = ["--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child"]
        return ["unshare", *user, *flags, "--", "sh", "-c", self._script(job), "sh", *job.env, *job.args]

    def _script(self, job: Job) -> str:
        """Return what the first process does. It stays: its own signals could not end a first process."""
        limit = ["prlimit", f"--nofile={job.nofile}"]
        program = shlex.join([*limit, *_as_nobody(), "env", "-i", "--"]) + ' "$@"'
        steps = [*self._steps(job), f"mkdir -p {shlex.quote(job.cwd)}", f"cd {shlex.quote(job.cwd)}"]
        # The shell is not to report on standard error that a signal ended the program.
        last = f"exec 3>&2 2>/dev/null\n(exec {program} 2>&3 3>&-)\nexit $?"
        return f"{' && '.join(steps)} || exit 128\n{last}"

    def _steps(self, job: Job) -> Iterator[str]:
        root = shlex.quote(job.rootfs)
        yield f"mount --bind {root} {root}"
        yield f"mount -t tmpfs -o nosuid,nodev,mode=1777,size=64m tmpfs {root}/tmp"
        for destination, source in job.binds():
            if _is_below(destination, ["/tmp"]):
                last = "mkdir" if os.path.isdir(source) else ": >"
                make = f'[ -e "$1" ] || {{ mkdir -p "${{1%/*}}" && {last} "$1"; }}'
                yield shlex.join(["sh", "-c", make, "sh", job.rootfs + destination])
            yield from self._bind(source, job.rootfs + destination, read_only=True)
        yield from self._bind(job.output, f"{job.rootfs}/output", read_only=False)
        yield f"mount -t proc proc {root}/proc && mount -t tmpfs -o mode=755 tmpfs {root}/dev"
        for name in ("null", "zero", "full", "random", "urandom"):
            yield f": > {root}/dev/{name} && mount --bind /dev/{name} {root}/dev/{name}"
        yield f"ln -s /proc/self/fd {root}/dev/fd && mount -o remount,bind,ro,nosuid {root}"
        yield f"{{ hostname {job.exec_id} || :; }}"
        yield f"cd {root} && pivot_root . . && umount -l ."

    def _bind(self, source: str, target: str, *, read_only: bool) -> Iterator[str]:
        yield shlex.join(["mount", "--bind", source, target])
        if read_only:
            yield shlex.join(["mount", "-o", "remount,bind,ro,nosuid,nodev", target])


class PlainProcesses(Sandbox):
    """No sandbox: a program runs as the user who started the server, and sees what that user sees."""

    name = "plain processes"
    isolates = False

    def command(self, job: Job) -> list[str]:
        """Return the command, with uploaded files where they really are. There is no /output."""
        start = ["sh", "-c", 'cd "$0" && exec env -i "$@"', self._cwd(job)]
        return [*start, *job.env, *(job.files.get(arg, arg) for arg in job.args)]

    def _cwd(self, job: Job) -> str:
        mounted = [(to, source) for to, source in job.files.items() if _is_below(to, [job.cwd])]
        places = [source[: len(source) - len(to) + len(job.cwd)] for to, source in mounted]
        return next(filter(os.path.isdir, [*places, job.cwd]), job.folder)


class NoSandbox(Sandbox):
    """What is left on a machine without a sandbox: no program runs at all."""

    name = "no sandbox"
    isolates = False

    def refusal(self, _job: Job) -> str:
        """Refuse more firmly: this is no matter of the program's."""
        raise OSError("no sandbox on this machine")


def search_path() -> dict[str, str]:
    """Return an environment that finds programs in the folders of servers, which a plain user's PATH often lacks."""
    return {**os.environ, "PATH": ":".join(filter(None, [os.environ.get("PATH"), DEFAULT_PATH]))}


@functools.cache
def wanted_sandboxes() -> tuple[Sandbox, ...]:
    """Return all sandboxes, the best first, or the one that BOXER_SANDBOX names."""
    wanted = os.environ.get("BOXER_SANDBOX", "").lower()
    boxes = GVisor(), Bubblewrap(), Namespaces()
    names = [box.name for box in boxes]
    if wanted not in ("", "none", *map(str.lower, names)):
        raise ValueError(f"BOXER_SANDBOX is {wanted!r}; it can be {', '.join(names)} or none")
    return tuple(box for box in boxes if wanted in ("", box.name.lower()) and sys.platform == "linux")


@functools.cache
def find_sandbox() -> Sandbox | None:
    """Return the best of the wanted sandboxes that works here, or None."""
    return next((box for box in wanted_sandboxes() if not box.problem), None)


def passed_over() -> list[str]:
    """Say of each sandbox that would have been better than the one that was found why it does not work."""
    boxes = itertools.takewhile(lambda box: box.problem, wanted_sandboxes())
    return [f"{box.name} does not work here: {box.problem}" for box in boxes]


# ------------------------------------------------------------------------------------------------------------
# Running a program
# ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Outcome:
    """What came of a job. `ending`: "ended", "late" (its time was up) or "unwanted" (its client left)."""

    ending: str
    exit_code: int
    stdout: bytes
    stderr: bytes
    wall_ms: int


def execute(sandbox: Sandbox, job: Job, seconds: float, limit: int, client: socket.socket | None = None) -> Outcome:
    """Run a job to its end, or to the end of its time, or until its client closes the connection."""
    start = time.monotonic()
    reason = sandbox.refusal(job)
    if reason:
        return Outcome("ended", 128, b"", f"running container: {reason}\n".encode("utf-8", "replace"), 0)
    # Standard input is a pipe, too: gVisor gives what it gets there to nobody, and would so with /dev/null.
    pipe, env = subprocess.PIPE, search_path()
    with subprocess.Popen(
        sandbox.command(job), stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, start_new_session=True, env=env
    ) as process:
        assert process.stdin
        process.stdin.close()
        watch = _Watch(process, limit, client)
        try:
            ending = watch.wait(start + seconds)
        finally:
            if watch.ending != "ended" or not sandbox.isolates:
                sandbox.kill(job, process.pid, watch.waiter.join)
            watch.close()
    code = process.returncode if process.returncode >= 0 else 128 - process.returncode
    stdout, stderr = (bytes(stream) for stream in watch.streams.values())
    return Outcome(ending, code, stdout, stderr, int((time.monotonic() - start) * 1000))


class _Watch:
    """Wait for a process and read its streams up to the limit; past that it blocks, as under Boxer."""

    def __init__(self, process: subprocess.Popen[bytes], limit: int, client: socket.socket | None) -> None:
        self.limit, self.client, self.ending = limit, client, ""
        assert process.stdout and process.stderr
        self.streams = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
        self.bell, self.rope = socket.socketpair()
        self.selector = selectors.DefaultSelector()
        for fd in self.streams:
            os.set_blocking(fd, False)
            self.selector.register(fd, selectors.EVENT_READ, functools.partial(self._read, fd))
        self.selector.register(self.bell, selectors.EVENT_READ, self._ended)
        if client:
            self.selector.register(client, selectors.EVENT_READ, self._client_spoke)
        self.waiter = threading.Thread(target=self._ring_at_end_of, args=[process], daemon=True)
        self.waiter.start()

    def wait(self, deadline: float) -> str:
        """Return why the waiting is over."""
        while not self.ending:
            left = deadline - time.monotonic()
            if left <= 0:
                self.ending = "late"
            for key, _ in self.selector.select(min(max(left, 0), 3600)):
                key.data()
        return self.ending

    def close(self) -> None:
        """Let go of everything. The process has ended."""
        self.waiter.join()
        self.selector.close()
        self.bell.close()
        self.rope.close()

    def _ring_at_end_of(self, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        self.rope.send(b"!")

    def _ended(self) -> None:
        for fd in self.streams:
            while self._read(fd):
                pass
        self.ending = self.ending or "ended"

    def _client_spoke(self) -> None:
        """See whether the client left. Once it has sent its next request, that can no longer be seen."""
        assert self.client
        self.selector.unregister(self.client)
        with contextlib.suppress(ConnectionError):
            if self.client.recv(1, socket.MSG_PEEK):
                return
        self.ending = "unwanted"

    def _read(self, fd: int) -> bool:
        content = self.streams[fd]
        with contextlib.suppress(BlockingIOError):
            data = os.read(fd, min(65536, self.limit - len(content)))
            content += data
            if data:
                return True
            with contextlib.suppress(KeyError):
                self.selector.unregister(fd)
        return False


@contextlib.contextmanager
def _scratch() -> Iterator[str]:
    """Make a folder for as long as it is needed, whatever a program leaves in it."""
    folder = tempfile.mkdtemp(prefix="boxer-standin-")
    try:
        yield folder
    finally:
        _keep_plain_files(folder)
        shutil.rmtree(folder)


def _keep_plain_files(folder: str) -> None:
    """Leave only files and folders, none of them locked: a link that a program made could lead anywhere."""
    for parent, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = os.path.join(parent, name)
            mode = os.lstat(path).st_mode
            if stat.S_ISDIR(mode):
                os.chmod(path, 0o755)
            elif not stat.S_ISREG(mode):
                os.unlink(path)


# ------------------------------------------------------------------------------------------------------------
# Go's ways with text
# ------------------------------------------------------------------------------------------------------------

# encoding/json escapes what could hurt in HTML, and marks each byte that is not UTF-8.
_JSON_ESCAPES = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}
_JSON_ESCAPES.update(dict.fromkeys(range(0xD800, 0xE000), "\\ufffd"))
# What Python's decoder complains of, in Go's words.
_SYNTAX_ERRORS = {
    "Expecting property name": "looking for beginning of object key string",
    "Expecting value": "looking for beginning of value",
    "Expecting ':'": "after object key",
    "Expecting ','": "after object key:value pair",
}
_GO_NAMES = {str: "string", bool: "bool", int: "int64", float: "float64", list: "[]string"}
_JSON_NAMES = {str: "string", bool: "bool", list: "array", dict: "object"}
_RUN_FIELDS = {
    "image": str,
    "cmd": list,
    "env": list,
    "cwd": str,
    "limits": dict,
    "files": list,
    "persist": bool,
    "network": str,
}
_LIMIT_FIELDS = {
    "cpu_cores": float,
    "memory_mb": int,
    "pids_limit": int,
    "wall_clock_secs": int,
    "nofile": int,
}


class Refusal(Exception):
    """An answer other than the one that was asked for: a status code, and the reason."""

    def __init__(self, status: int, reason: str) -> None:
        """Keep both."""
        super().__init__(status, reason)
        self.status, self.reason = status, reason


class _Real(float):
    """A number written with a point or an exponent, and how it was written."""

    literal = ""


def _real(literal: str) -> _Real:
    number = _Real(literal)
    number.literal = literal
    return number


def go_json(value: object) -> bytes:
    """Encode as encoding/json does."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return text.translate(_JSON_ESCAPES).encode()


def go_quote(text: str) -> str:
    """Quote as %q does, but for control characters."""
    return json.dumps(text, ensure_ascii=False)


def go_clean(path: str) -> str:
    """Clean a path as filepath.Clean does; unlike Python's normpath, two leading slashes become one."""
    return re.sub("^//+", "/", posixpath.normpath(path)) if path else "."


def _go_field(value: Any, kind: type, name: str) -> Any:
    """Return a field's value, which must be of its kind; null stands for the kind's zero."""
    if value is None:
        return kind()
    fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if kind is int and fits:
        fits = -(1 << 63) <= value < 1 << 63
    if not fits and not (kind is float and type(value) is int):
        found = _JSON_NAMES.get(type(value), "number")
        if kind is int and found == "number":
            found += " " + getattr(value, "literal", str(value))
        field = f"{name} of type {_GO_NAMES.get(kind, 'ResourceLimits')}"
        raise Refusal(400, f"json: cannot unmarshal {found} into Go struct field {field}")
    if kind is list:
        return [_go_field(item, str, name) for item in value]
    return go_struct(value, _LIMIT_FIELDS, "ResourceLimits.limits") if kind is dict else value


def go_struct(value: Mapping[str, Any], kinds: Mapping[str, type], name: str) -> dict[str, Any]:
    """Return the fields that are known, in the order in which they were sent; Go complains of the first."""
    return {key: _go_field(item, kinds[key], f"{name}.{key}") for key, item in value.items() if key in kinds}


def go_decode(content: bytes) -> Any:
    """Decode the first JSON value; what follows it is ignored."""
    text = content.decode("utf-8", "replace").lstrip(" \t\r\n")
    if not text:
        raise Refusal(400, "EOF")
    try:
        return json.JSONDecoder(parse_float=_real, parse_constant=_no_constant).raw_decode(text)[0]
    except json.JSONDecodeError as error:
        raise Refusal(400, _syntax_error(error)) from None


def _no_constant(name: str) -> None:
    raise Refusal(400, f"invalid character '{name[0]}' looking for beginning of value")


def _syntax_error(error: json.JSONDecodeError) -> str:
    if error.pos >= len(error.doc) or error.msg.startswith("Unterminated"):
        return "unexpected EOF"
    where = next((go for python, go in _SYNTAX_ERRORS.items() if error.msg.startswith(python)), "in JSON")
    return f"invalid character '{error.doc[error.pos]}' {where}"


def run_request(content: bytes) -> dict[str, Any]:
    """Bind the content of `POST /run`, as gin does, with its validator's messages."""
    value = go_decode(content)
    if not isinstance(value, dict):
        found = _JSON_NAMES.get(type(value), "number")
        raise Refusal(400, f"json: cannot unmarshal {found} into Go value of type RunRequest")
    request = go_struct(value, _RUN_FIELDS, "RunRequest")
    failed = [] if request.get("image") else [("Image", "required")]
    if not request.get("cmd"):
        failed.append(("Cmd", "min" if value.get("cmd") == [] else "required"))
    if failed:
        key = "Key: 'RunRequest.{0}' Error:Field validation for '{0}' failed on the '{1}' tag"
        raise Refusal(400, "\n".join(key.format(*which) for which in failed))
    if request.get("network", "") not in ("", "none", "sandbox", "host"):
        raise Refusal(400, "invalid network: must be none, sandbox, or host")
    return request


def check_image(reference: str) -> None:
    """Refuse an image that is none of those this machine stands in for."""
    if re.fullmatch(r"(docker\.io/)?(library/)?(python|node|perl)(:[\w.-]+)?", reference):
        return
    problem = f"image pull failed: resolve digest for {reference}: "
    if not re.fullmatch(r"[a-z0-9._/:-]+(:[\w.-]+)?(@sha256:[0-9a-f]{64})?", reference):
        raise Refusal(500, f"{problem}parse ref: could not parse reference: {reference}")
    missing = f"Error response from daemon: No such image: {reference}"
    raise Refusal(500, f"{problem}docker inspect {reference}: {missing}")


# ------------------------------------------------------------------------------------------------------------
# The store
# ------------------------------------------------------------------------------------------------------------


class Store:
    """The uploaded files and the outputs that were kept. One for the whole server, as under Boxer."""

    def __init__(self, folder: str) -> None:
        """Keep files in `folder`."""
        self.root, self.incoming = f"{folder}/files", f"{folder}/incoming"
        self._lock = threading.Lock()
        os.makedirs(f"{self.root}/output")
        os.mkdir(self.incoming)

    def locate(self, path: str, *, writing: bool = False) -> str:
        """Return where a path of the store is."""
        clean = go_clean(path)
        if clean == "." or clean.startswith(".."):
            raise Refusal(400, f"invalid path: {go_quote(path)}")
        if writing and _is_below(clean, ["output"]):
            raise Refusal(400, f"path uses reserved prefix 'output/': {go_quote(path)}")
        return f"{self.root}/{clean.lstrip('/')}".rstrip("/")

    def put(self, path: str, incoming: str) -> None:
        """Move an uploaded file into its place, over what was there."""
        target = self.locate(path, writing=True)
        try:
            with self._lock:
                if os.path.isdir(target):
                    raise IsADirectoryError(21, "is a directory")
                os.makedirs(os.path.dirname(target), exist_ok=True)
                os.chmod(incoming, 0o644)
                os.replace(incoming, target)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "invalid argument"
            raise Refusal(400, f"create file: open {target}: {reason.lower()}") from None

    def mounts(self, paths: Sequence[str]) -> dict[str, str]:
        """Return where each file is mounted and where it is; refuse what no sandbox could be built with."""
        return self._checked(self._found(paths))

    def _found(self, paths: Sequence[str]) -> list[tuple[str, str]]:
        found = []
        for path in paths:
            try:
                source = self.locate(path)
            except Refusal as refusal:
                raise Refusal(400, f"invalid file path: {refusal.reason}") from None
            if not os.path.exists(source) and "\0" not in path:  # that is found out by gVisor
                raise Refusal(400, f"file not found: {path}")
            found.append(("/" + go_clean(path).lstrip("/"), source))
        return found

    def _checked(self, found: Sequence[tuple[str, str]]) -> dict[str, str]:
        mounts: dict[str, str] = {}
        for destination, source in [*found, ("/output", "")]:
            if destination in ("/proc", "/dev", "/sys", "/tmp"):
                problem = "mount destination conflicts with reserved mount"
                raise Refusal(500, f"spec build failed: {problem}: {go_quote(destination)}")
            if destination in mounts:
                raise Refusal(500, f"spec build failed: duplicate mount destination: {go_quote(destination)}")
            mounts[destination] = source
        del mounts["/output"]
        return mounts

    def delete(self, paths: Iterable[str]) -> None:
        """Delete each in turn: a folder only if it is empty by then."""
        for path in paths:
            with contextlib.suppress(OSError, ValueError, Refusal), self._lock:
                target = self.locate(path, writing=True)
                (os.rmdir if os.path.isdir(target) else os.unlink)(target)

    def keep(self, exec_id: str, output: str) -> None:
        """Take over what a run has written."""
        _keep_plain_files(output)
        os.chmod(output, 0o755)
        shutil.move(output, f"{self.root}/output/{exec_id}")

    def uploads(self) -> list[str]:
        """List what was uploaded and is still there: files, and folders with a slash at their end."""
        return [path for path in _all_below(self.root) if not path.startswith("output/")]

    def outputs(self) -> list[str]:
        """List what runs have kept, likewise: `<exec_id>/` and all below it."""
        return _all_below(f"{self.root}/output")


def _all_below(folder: str) -> list[str]:
    found = []
    for parent, folders, files in os.walk(folder):
        paths = [*(f"{parent}/{name}/" for name in folders), *(f"{parent}/{name}" for name in files)]
        found += [path[len(folder) + 1 :] for path in paths]
    return sorted(found)


# ------------------------------------------------------------------------------------------------------------
# Requests
# ------------------------------------------------------------------------------------------------------------

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PARAMETER = re.compile(rf';\s*({_TOKEN})=("(?:[^"\\]|\\.)*"|{_TOKEN})')


def parameters(value: str) -> tuple[str, dict[str, str]]:
    """Split a field value such as `form-data; name="file"`."""
    kind, _, _ = value.partition(";")
    rest = value[len(kind) :]
    if not re.fullmatch(f"(?:{_PARAMETER.pattern})*", rest):
        return "", {}
    return kind.lower(), {name.lower(): _unquoted(text) for name, text in _PARAMETER.findall(rest)}


def _unquoted(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text[1:-1]) if text.startswith('"') else text


class Content:
    """The content of a request, read as it arrives; past `limit` bytes it is refused."""

    def __init__(self, source: io.BufferedIOBase, length: int | None) -> None:
        """Read `length` bytes, or chunks where that is None."""
        self.source, self.chunked = source, length is None
        self.left, self.total, self.limit = length or 0, 0, sys.maxsize
        self.ended = length == 0

    def read(self, size: int = 65536) -> bytes:
        """Return some bytes, at most `size`, or none at the end."""
        if self.chunked and not self.left and not self.ended:
            self._next_chunk()
        if self.ended:
            return b""
        data = self.source.read1(min(size, self.left))
        if not data:
            raise ConnectionAbortedError("the client left before its request was complete")
        self._count(len(data))
        return data

    def rest(self) -> bytes:
        """Return all that is left."""
        return b"".join(iter(self.read, b""))

    def skip(self, size: int) -> bool:
        """Pass over what the handler left unread, up to `size` bytes; say whether that was all."""
        self.limit = self.total + size
        with contextlib.suppress(Refusal):
            while self.read():
                pass
        return self.ended

    def _count(self, size: int) -> None:
        self.left -= size
        self.total += size
        if self.total > self.limit:
            raise Refusal(413, "upload exceeds limit")
        if not self.left and self.chunked:
            self._line(rb"\r\n")
        self.ended = not self.left and not self.chunked

    def _next_chunk(self) -> None:
        self.left = int(self._line(rb"([0-9a-fA-F]{1,15})(?:;[^\r\n]*)?\r\n")[1], 16)
        if not self.left:
            self.ended = True
            while not re.fullmatch(rb"\r?\n?", self.source.readline(65537)):
                pass  # the trailer section

    def _line(self, pattern: bytes) -> re.Match[bytes]:
        line = self.source.readline(4096)
        match = re.fullmatch(pattern, line)
        if not match:
            self.limit = -1  # there is no telling any more where this request ends
            raise Refusal(400, "invalid byte in chunk length")
        return match


class Multipart:
    """The parts of multipart/form-data (RFC 7578), streamed. Strict: a client has no excuse."""

    def __init__(self, content: Content, boundary: str) -> None:
        """Read from `content`. The first delimiter has no line before it, so one is put there."""
        self.content, self.buffer, self.delimiter = content, b"\r\n", b"\r\n--" + boundary.encode()

    def parts(self) -> Iterator[tuple[dict[str, str], Iterator[bytes]]]:
        """Yield each part's Content-Disposition parameters and its content, to be read before the next."""
        self._require(b"".join(self._until(self.delimiter)) == b"")
        while self._take(2) == b"\r\n":
            head = b"".join(self._until(b"\r\n\r\n")).decode("utf-8", "replace")
            yield self._disposition(head), self._until(self.delimiter)
        self._require(self.taken == b"--" and self.buffer + self.content.rest() in (b"", b"\r\n"))

    def _disposition(self, head: str) -> dict[str, str]:
        fields = [line.partition(": ") for line in head.split("\r\n")]
        self._require(all(re.fullmatch(_TOKEN, name) and colon for name, colon, _ in fields))
        values = [value for name, _, value in fields if name.lower() == "content-disposition"]
        self._require(len(values) == 1 and parameters(values[0])[0] == "form-data")
        return parameters(values[0])[1]

    def _until(self, mark: bytes) -> Iterator[bytes]:
        while mark not in self.buffer:
            safe = max(len(self.buffer) - len(mark) + 1, 0)
            yield self.buffer[:safe]
            self.buffer = self.buffer[safe:] + self._more()
        data, _, self.buffer = self.buffer.partition(mark)
        yield data

    def _take(self, size: int) -> bytes:
        while len(self.buffer) < size:
            self.buffer += self._more()
        self.taken, self.buffer = self.buffer[:size], self.buffer[size:]
        return self.taken

    def _more(self) -> bytes:
        data = self.content.read()
        self._require(bool(data))
        return data

    def _require(self, fulfilled: bool) -> None:
        if not fulfilled:
            raise Refusal(400, "form field 'file' is required: multipart: NextPart: EOF")


# ------------------------------------------------------------------------------------------------------------
# The server
# ------------------------------------------------------------------------------------------------------------

# Go's reason phrases, which newer Pythons have renamed.
_REASONS = {413: "Request Entity Too Large", 416: "Requested Range Not Satisfiable"}
_JSON = "application/json; charset=utf-8"
_TEXT = "text/plain; charset=utf-8"
_TYPES = {  # by extension; all others are judged by their first bytes
    ".py": "text/x-python; charset=utf-8",
    ".txt": _TEXT,
    ".html": "text/html; charset=utf-8",
    ".json": "application/json",
    ".bin": "application/octet-stream",
    ".png": "image/png",
}
_HEAD_DEFECTS = (  # the others are about multipart content, which this parser does not see
    email.errors.MissingHeaderBodySeparatorDefect,
    email.errors.FirstHeaderLineIsContinuationDefect,
    email.errors.MisplacedEnvelopeHeaderDefect,
)
_SKIPPED_AT_MOST = 256 << 10  # what Go reads of a request nobody wants, to keep the connection
_LINGER = 0.5  # seconds for which Go keeps the socket, so that the client can read an early answer


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection. Answers have the fields, in the order, that Go's net/http and gin give them."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: StandIn
    content: Content
    close_early = False

    def handle_one_request(self) -> None:
        """Read a request and answer it."""
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        self.server.saw(self.command, self.path)
        try:
            self._route()
        except Refusal as refusal:
            self._send(refusal.status, go_json({"error": refusal.reason}), {"Content-Type": _JSON})
        except _BadRange as problem:
            text, *sized = problem.args
            fields = {"Content-Range": sized[0]} if sized else {}
            fields.update({"Content-Type": _TEXT, "X-Content-Type-Options": "nosniff"})
            self._send(416, f"{text}\n".encode(), fields)
        if self.close_early:
            with contextlib.suppress(OSError):  # the client may have reset the connection
                self.connection.shutdown(socket.SHUT_WR)
            self.server.stopping.wait(_LINGER)

    def parse_request(self) -> bool:
        """Read the head; refuse what Go refuses."""
        if not super().parse_request():
            return False
        hosts, lengths = (self.headers.get_all(name, []) for name in ("Host", "Content-Length"))
        coding = self.headers.get("Transfer-Encoding")
        sound = all(re.fullmatch(_TOKEN, name) and "\n" not in value for name, value in self.headers.items())
        sound = sound and not any(isinstance(defect, _HEAD_DEFECTS) for defect in self.headers.defects)
        sound = sound and coding in (None, "chunked") and len(set(lengths)) < 2
        if not sound or not all(re.fullmatch("[0-9]{1,18}", length) for length in lengths):
            self.send_error(400)
        elif len(hosts) != 1 and self.request_version == "HTTP/1.1":
            self.send_error(400, "missing required Host header" if not hosts else "too many Host headers")
        else:
            self.content = Content(self.rfile, None if coding else int((lengths or ["0"])[0]))
            return True
        return False

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer to what is no HTTP, as net/http does."""
        known = code in (400, 431, 505)
        reason = f"{code} {http.HTTPStatus(code).phrase}" if known else "400 Bad Request"
        if message in ("missing required Host header", "too many Host headers"):
            reason += f": {message}"
        fields = "Content-Type: text/plain; charset=utf-8\r\nConnection: close"
        self.wfile.write(f"HTTP/1.1 {reason.partition(':')[0]}\r\n{fields}\r\n\r\n{reason}".encode())
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name that it has
        """Stay silent."""

    def _route(self) -> None:
        if not self.server.welcomes(self.headers.get("Host", ""), self.headers.get("Origin")):
            return self._text(403, "this server answers only to programs on its own machine")
        path = urllib.parse.urlsplit(self.path).path
        routes: dict[tuple[str, str], Callable[[], None]] = {
            ("GET", "/healthz"): lambda: self._json({"ok": True}),
            ("POST", "/run"): lambda: self._json(self.server.run(self.content.rest(), self.connection)),
            ("POST", "/files"): lambda: self._json({"path": self._upload()}),
            ("GET", "/files"): self._download,
        }
        if (self.command, path) in routes:
            return routes[self.command, path]()
        return self._text(404, "404 page not found")

    def _upload(self) -> str:
        kind, values = parameters(self.headers.get("Content-Type", ""))
        if kind != "multipart/form-data":
            problem = "request Content-Type isn't multipart/form-data"
        elif "boundary" not in values:
            problem = "no multipart boundary param in Content-Type"
        else:
            self.content.limit = self.server.upload_limit
            return self.server.upload(Multipart(self.content, values["boundary"]))
        raise Refusal(400, f"form field 'file' is required: {problem}")

    def _download(self) -> None:
        fields = urllib.parse.urlsplit(self.path).query
        query = urllib.parse.parse_qs(fields, keep_blank_values=True, errors="surrogateescape")
        path = query.get("path", [""])[0]
        if not path:
            raise Refusal(400, "query parameter 'path' is required")
        target = self.server.store.locate(path)
        if os.path.isdir(target):
            return self._send(301, b"", {"Location": f"files/?{fields}"})
        try:
            file = open(target, "rb")  # noqa: SIM115 - it is closed once it is sent
        except (OSError, ValueError):
            raise Refusal(404, "file not found") from None
        with file:
            return self._send_file(file, target)

    def _send_file(self, file: IO[bytes], path: str) -> None:
        status = os.fstat(file.fileno())
        part = self._range(status.st_size)
        extent = range(status.st_size) if part is None else part
        fields = {
            "Accept-Ranges": "bytes",
            "Content-Length": str(len(extent)),
            "Content-Type": _TYPES.get(os.path.splitext(path)[1]) or _sniffed(file.read(512)),
            "Last-Modified": email.utils.formatdate(status.st_mtime, usegmt=True),
        }
        if part is not None:
            fields["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{status.st_size}"
        file.seek(extent.start)
        first = file.read(min(len(extent), MIB))
        self._send(200 if part is None else 206, first, fields)
        if len(extent) > MIB:
            self.connection.sendfile(file, extent.start + MIB, len(extent) - MIB)

    def _range(self, size: int) -> range | None:
        """Return the one part that is asked for, or None for all of it."""
        value = self.headers.get("Range")
        if not value or not size or "," in value:
            return None
        match = re.fullmatch(r"bytes=(?:(\d+)-(\d*)|-(\d+))", value)
        if not match:
            raise _BadRange("invalid range")
        first, last, suffix = match.groups()
        start = int(first) if first else max(size - int(suffix), 0)
        stop = min(int(last) + 1, size) if last else size
        if start >= stop:
            raise _BadRange("invalid range: failed to overlap", f"bytes */{size}")
        return range(start, stop)

    def _json(self, value: object) -> None:
        self._send(200, go_json(value), {"Content-Type": _JSON})

    def _text(self, status: int, text: str) -> None:
        self._send(status, text.encode(), {"Content-Type": "text/plain"})

    def _send(self, status: int, content: bytes, fields: dict[str, str]) -> None:
        """Send an answer at once: the handler's fields in the order of their names, then net/http's own."""
        self.close_early = self.content.limit < self.content.total or not self.content.skip(_SKIPPED_AT_MOST)
        own = {"Date": email.utils.formatdate(usegmt=True)}
        chunked = len(content) > 2048 and "Content-Length" not in fields and self.request_version == "HTTP/1.1"
        if not chunked and "Content-Length" not in fields:
            own["Content-Length"] = str(len(content))
        if self.close_early or self.headers.get("Connection", "").lower() == "close":
            own["Connection"], self.close_connection = "close", True
        if chunked:
            own["Transfer-Encoding"] = "chunked"
            content = b"%x\r\n%b\r\n0\r\n\r\n" % (len(content), content)
        lines = [f"{name}: {value}\r\n" for name, value in [*sorted(fields.items()), *own.items()]]
        reason = _REASONS.get(status) or http.HTTPStatus(status).phrase
        head = f"HTTP/1.1 {status} {reason}\r\n{''.join(lines)}\r\n".encode("utf-8", "surrogateescape")
        self.wfile.write(head + (b"" if self.command == "HEAD" else content))


class _BadRange(Exception):
    """A 416, whose fields are its own."""


def _sniffed(start: bytes) -> str:
    binary = any(byte < 0x20 and byte not in b"\t\n\f\r\x1b" for byte in start)
    return "application/octet-stream" if binary else _TEXT


class StandIn(http.server.ThreadingHTTPServer):
    """A Boxer server for tests, on the loopback address; a context manager.

    sandbox -- where programs run; by default the best that works here; without one, a run gets a 500
    race -- the share of runs (0.0 to 1.0) whose output the server loses, as Boxer's does
    upload_limit, output_limit -- in bytes, for the content of an upload and for each of a run's streams
    allowed_hosts -- values of `Host` to be let in besides those of this machine

    For tests: `url`, `port`; `connections` (how many were accepted), `requests` (each one's method and
    target), `runs` (how many were started), `runs_live` (the ids of those going on), `runs_killed` (how many
    ended because their client had gone).
    """

    daemon_threads = True
    request_queue_size = 4096

    def __init__(
        self,
        *,
        sandbox: Sandbox | None = None,
        port: int = 0,
        race: float = 0.0,
        upload_limit: int = 10 * MIB,
        output_limit: int = 10 * MIB,
        allowed_hosts: Sequence[str] = (),
    ) -> None:
        """Listen; answer once entered."""
        self.sandbox = sandbox or find_sandbox() or NoSandbox()
        self.race, self.upload_limit, self.output_limit = race, upload_limit, output_limit
        self.allowed_hosts = frozenset(allowed_hosts)
        self.connections, self.runs, self.runs_killed, self.runs_lost = 0, 0, 0, 0
        self.requests: list[tuple[str, str]] = []
        self.runs_live: set[str] = set()
        self.stopping = threading.Event()
        self._condition = threading.Condition()
        self._random = random.Random(0)
        self._handlers: dict[threading.Thread, socket.socket] = {}
        super().__init__(("127.0.0.1", port), Handler)
        self.port: int = self.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> StandIn:
        """Start to answer."""
        self._exit = contextlib.ExitStack()
        self.folder = self._exit.enter_context(_scratch())
        self.store = Store(self.folder)
        self._bell, self._rope = socket.socketpair()
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Close every connection, which kills the runs, and leave nothing behind."""
        self.stopping.set()
        self._rope.send(b"!")
        self._acceptor.join()
        with self._condition:
            handlers = dict(self._handlers)
            for connection in handlers.values():
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for thread in handlers:
            thread.join()
        for end in (self._bell, self._rope):
            end.close()
        self.server_close()
        self._exit.close()

    def wait_for(self, predicate: Callable[[], object], seconds: float = 10.0) -> bool:
        """Wait until something is true of the attributes; say whether it came to be."""
        with self._condition:
            return bool(self._condition.wait_for(predicate, seconds))

    @contextlib.contextmanager
    def _change(self) -> Iterator[None]:
        with self._condition:
            yield
            self._condition.notify_all()

    # Connections

    def server_bind(self) -> None:
        """Bind, without the look-up of a name that HTTPServer makes."""
        socketserver.TCPServer.server_bind(self)

    def _accept(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self.socket, selectors.EVENT_READ)
            selector.register(self._bell, selectors.EVENT_READ)
            while not self.stopping.is_set():
                if self.socket in [key.fileobj for key, _ in selector.select()]:
                    self.handle_request()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread that is known."""
        thread = threading.Thread(target=self._serve, args=[request, client_address], daemon=True)
        with self._change():
            self.connections += 1
            self._handlers[thread] = request
        thread.start()

    def _serve(self, request: Any, client_address: Any) -> None:
        try:
            self.process_request_thread(request, client_address)
        finally:
            with self._change():
                del self._handlers[threading.current_thread()]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Be silent about a client that went away, and loud about anything else."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def saw(self, method: str, target: str) -> None:
        """Note a request."""
        with self._change():
            self.requests.append((method, target))

    def welcomes(self, host: str, origin: str | None) -> bool:
        """Say whether a request comes from this machine, and not by way of somebody's browser."""
        name = re.sub(r":\d*$", "", host).lower()
        if self.allowed_hosts & {host, name}:
            return True
        return origin is None and (name == "localhost" or _is_loopback(name.strip("[]")))

    # Uploads and runs

    def upload(self, multipart: Multipart) -> str:
        """Store the part `file` under the name in the part `path`, and return that name."""
        path, incoming = None, f"{self.store.incoming}/{uuid.uuid4()}"
        try:
            for names, content in multipart.parts():
                if names.get("name") == "file" and names.get("filename") and not os.path.exists(incoming):
                    with open(incoming, "wb") as file:
                        file.writelines(content)
                    continue
                value = b"".join(content).decode("utf-8", "surrogateescape")
                if names.get("name") == "path" and path is None:
                    path = value
            return self._stored(path, incoming)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(incoming)

    def _stored(self, path: str | None, incoming: str) -> str:
        if not os.path.exists(incoming):
            raise Refusal(400, "form field 'file' is required: http: no such file")
        if not path:
            raise Refusal(400, "form field 'path' is required")
        self.store.put(path, incoming)
        return path

    def run(self, content: bytes, client: socket.socket) -> dict[str, object]:
        """Run what `POST /run` asks for and return its answer."""
        request = run_request(content)
        check_image(request["image"])
        files, limits = request.get("files") or [], request.get("limits") or {}
        mounts = self.store.mounts(files)
        with _scratch() as folder:
            cwd = go_clean("/" + (request.get("cwd") or ""))
            job = Job(request["cmd"], request.get("env") or [], f"{folder}/job", cwd, mounts, limits)
            outcome = self._execute(job, client)
            if request.get("persist"):
                self.store.keep(job.exec_id, job.output)
            else:
                self.store.delete(files)
        streams = {"stdout": _text_of(outcome.stdout), "stderr": _text_of(outcome.stderr)}
        return {"exec_id": job.exec_id, "exit_code": outcome.exit_code, **streams, "wall_ms": outcome.wall_ms}

    def _execute(self, job: Job, client: socket.socket) -> Outcome:
        nanoseconds = int(job.limits.get("wall_clock_secs") or 30) * 10**9
        if (nanoseconds + 2**63) % 2**64 <= 2**63:  # negative, in Go's 64 bits
            raise Refusal(500, "start runsc: context deadline exceeded")
        with self._running(job):
            try:
                outcome = execute(self.sandbox, job, nanoseconds / 10**9, self.output_limit, client)
            except (OSError, ValueError) as error:
                raise Refusal(500, f"start runsc: {error}") from None
        if outcome.ending == "unwanted":
            self._give_up_on_client()
        if outcome.ending == "late":
            raise Refusal(408, f"execution timed out after {outcome.wall_ms}ms")
        if self.output_limit in (len(outcome.stdout), len(outcome.stderr)):
            raise Refusal(507, f"output limit exceeded: limit={self.output_limit} bytes")
        self._lose_the_race_at_times()
        return outcome

    @contextlib.contextmanager
    def _running(self, job: Job) -> Iterator[None]:
        with self._change():
            self.runs += 1
            self.runs_live.add(job.exec_id)
        try:
            yield
        finally:
            with self._change():
                self.runs_live.discard(job.exec_id)

    def _give_up_on_client(self) -> None:
        with self._change():
            self.runs_killed += 0 if self.stopping.is_set() else 1
        raise ConnectionAbortedError("the client has gone")

    def _lose_the_race_at_times(self) -> None:
        with self._condition:
            lost = self._random.random() < self.race
            self.runs_lost += lost
            stream = self._random.choice(["stdout", "stdout", "stderr"])
        if lost:
            raise Refusal(500, f"read {stream}: read |0: file already closed")


def _text_of(output: bytes) -> str:
    return output.decode("utf-8", "surrogateescape")


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


# ------------------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------------------

_NO_SANDBOX = "WARNING: this is no sandbox. Programs run as you, and can read, change and send whatever you can."
_INSTALL = "No sandbox works here: install gVisor (runsc), bubblewrap (bwrap) or util-linux (unshare)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve, or demonstrate."""
    parser = argparse.ArgumentParser(description="A stand-in for a Boxer server.")
    commands = parser.add_subparsers(dest="command", required=True)
    serve_parser = commands.add_parser("serve", help="keep a server up until Ctrl-C")
    serve_parser.add_argument("--port", type=int, default=0, metavar="N", help="default: any free one")
    serve_parser.add_argument("--unsafe", action="store_true", help="without a sandbox, run programs all the same")
    commands.add_parser("demo", help="start a server and walk through the client")
    options = parser.parse_args(arguments)
    try:
        for line in passed_over():
            print(line, file=sys.stderr, flush=True)
        return demo() if options.command == "demo" else serve(options.port, unsafe=options.unsafe)
    except (OSError, OverflowError, ValueError) as error:  # BOXER_SANDBOX names none; the port is taken, or is none
        hint = "; name another --port" if getattr(error, "errno", None) == errno.EADDRINUSE else ""
        parser.exit(2, f"{error}{hint}\n")


def serve(port: int, *, unsafe: bool) -> int:
    """Keep a server up until it is interrupted."""
    sandbox = find_sandbox() or (PlainProcesses() if unsafe else None)
    if sandbox is None:
        print(f"{_INSTALL}, or say --unsafe to go without.", file=sys.stderr)
        return 1
    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        with contextlib.suppress(AttributeError):
            signal.signal(getattr(signal, name), signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), StandIn(sandbox=sandbox, port=port) as server:
        print(f"export BOXER_URL={server.url}", flush=True)
        print(f"# programs run in: {sandbox.name}", flush=True)
        if not sandbox.isolates:
            print(_NO_SANDBOX, file=sys.stderr, flush=True)
        threading.Event().wait()
    return 0


def demo() -> int:
    """Walk through the client, and return 0 if everything came back as expected."""
    sandbox = find_sandbox() or PlainProcesses()
    print(f"Programs run in: {sandbox.name}")
    if not sandbox.isolates:
        print(f"{_INSTALL}.\n{_NO_SANDBOX}", file=sys.stderr)
    with StandIn(sandbox=sandbox) as server:
        return 0 if Demo(server).succeeds() else 1


class Demo:
    """What the README shows, done."""

    def __init__(self, server: StandIn) -> None:
        """Import the client from the file beside this one."""
        import boxer

        self.boxer: Any = boxer
        self.server = server

    def succeeds(self) -> bool:
        """Do every step; say of each whether what came back is what was expected."""
        steps = [
            self.python,
            self.node,
            self.perl,
            self.exit_code,
            self.files,
            self.time_limit,
            self.bad_request,
        ]
        with self.boxer.BoxerClient(self.server.url) as client:
            results = [self._step(step, client) for step in steps]
        return all([*results, self._step(self.five_at_once, None)])

    def _step(self, step: Callable[[Any], str], client: Any) -> bool:
        name = step.__name__.replace("_", " ")
        try:
            print(f"  {name}: {step(client)}")
        except Exception as error:  # noqa: BLE001 - whatever it is, it is reported
            print(f"! {name}: not as expected: {error!r}")
            return False
        return True

    def python(self, client: Any) -> str:
        """Say hello."""
        return self._hello(client, "python:3.12-slim", ["python3", "-c", "print('Hello from Python')"])

    def node(self, client: Any) -> str:
        """Say hello."""
        return self._hello(client, "node:20-slim", ["node", "-e", "console.log('Hello from Node')"])

    def perl(self, client: Any) -> str:
        """Say hello."""
        return self._hello(client, "perl:5.38-slim", ["perl", "-e", "print qq(Hello from Perl\\n)"])

    def _hello(self, client: Any, image: str, cmd: list[str]) -> str:
        if not shutil.which(cmd[0], path=SANDBOX_PATH):
            return f"skipped: {cmd[0]} is not installed on this machine"
        result = client.run(image=image, cmd=cmd)
        assert (result.exit_code, result.stdout[:11]) == (0, "Hello from "), result
        return f"{result.stdout!r} after {result.wall_ms} ms"

    def exit_code(self, client: Any) -> str:
        """Fail, and say so."""
        result = client.run(image="python:3.12-slim", cmd=["python3", "-c", "import sys; sys.exit('no luck')"])
        assert (result.exit_code, result.stderr) == (1, "no luck\n"), result
        return f"exit code {result.exit_code}, stderr {result.stderr!r}"

    def files(self, client: Any) -> str:
        """Send a program, run it, and fetch what it wrote."""
        if not self.server.sandbox.isolates:
            return "skipped: only a sandbox has an /output"
        client.upload_file("compute.py", _COMPUTE)
        cmd = ["python3", "/compute.py"]
        result = client.run(image="python:3.12-slim", cmd=cmd, files=["compute.py"], persist=True)
        assert result.exit_code == 0, result
        names = "result.json", "subdir/file.bin"
        contents = [client.download_file(f"output/{result.exec_id}/{name}") for name in names]
        assert contents == [b'{"value": 42}', bytes(range(256))], contents
        return f"{contents[0].decode()} and {len(contents[1])} bytes"

    def time_limit(self, client: Any) -> str:
        """Take too long."""
        limits = self.boxer.ResourceLimits(wall_clock_secs=1)
        cmd = ["python3", "-c", "while True: pass"]
        return self._error(408, self.boxer.BoxerTimeoutError, client, cmd=cmd, limits=limits)

    def bad_request(self, client: Any) -> str:
        """Name a file that is not there."""
        return self._error(400, self.boxer.BoxerAPIError, client, cmd=["true"], files=["never-uploaded.py"])

    def _error(self, status: int, kind: type[Exception], client: Any, **run: Any) -> str:
        try:
            result = client.run(image="python:3.12-slim", **run)
        except kind as error:
            assert getattr(error, "status_code", None) == status, error  # noqa: PT017 - this is no test
            return f"{kind.__name__}, status {status}: {error}"
        raise AssertionError(f"no error, but {result}")

    def five_at_once(self, _client: Any) -> str:
        """Run five programs at a time."""
        return asyncio.run(self._five())

    async def _five(self) -> str:
        async with self.boxer.AsyncBoxerClient(self.server.url) as client:
            cmds = [["python3", "-c", f"print({number} ** 2)"] for number in range(5)]
            results = await asyncio.gather(*(client.run(image="python:3.12-slim", cmd=cmd) for cmd in cmds))
        numbers = [int(result.stdout) for result in results]
        assert numbers == [0, 1, 4, 9, 16], numbers
        return f"{numbers}"


_COMPUTE = b"""
import os
os.mkdir("/output/subdir")
open("/output/result.json", "w").write('{"value": 42}')
open("/output/subdir/file.bin", "wb").write(bytes(range(256)))
"""


if __name__ == "__main__":
    raise SystemExit(main())


# ---------------------------------------------------------------------------------------------------------------------
# What the tests need on top: a program that serves does without
# ---------------------------------------------------------------------------------------------------------------------

import array
import ast
import base64
import collections
import concurrent.futures
import contextvars
import copy
import datetime as dt
import decimal
import email.message
import enum
import fractions
import gc
import hashlib
import http.client
import importlib
import inspect
import logging
import math
import mmap
import pickle
import queue
import select
import ssl
import struct
import sysconfig
import traceback
import tracemalloc
import types
import typing
import urllib.error
import urllib.request
import urllib.response
import warnings
import zipapp
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Union

import h11
import hypothesis
import hypothesis.strategies as st
import pytest
import trustme

import boxer
from boxer import (
    AsyncBoxerClient,
    BoxerAPIError,
    BoxerClient,
    BoxerConnectionError,
    BoxerError,
    BoxerExitError,
    BoxerOutputLimitError,
    BoxerTimeoutError,
    BoxerValidationError,
    ResourceLimits,
    RunRequest,
    RunResult,
)

# ---------------------------------------------------------------------------------------------------------------------
# What holds for every test: where its programs run, and that it leaves nothing behind
# ---------------------------------------------------------------------------------------------------------------------

REAL_URL = os.environ.get("BOXER_URL", "")
SANDBOX = None if REAL_URL else find_sandbox()
WHERE = REAL_URL or (SANDBOX.name if SANDBOX else "no sandbox")
in_a_sandbox = pytest.mark.skipif(WHERE == "no sandbox", reason="no sandbox works on this machine")
with_programs = pytest.mark.skipif(find_sandbox() is None, reason="no sandbox works on this machine")
in_gvisor = pytest.mark.skipif(WHERE not in ("gVisor", REAL_URL), reason="this machine's sandbox is not gVisor")
of_the_stand_in = pytest.mark.skipif(bool(REAL_URL), reason="BOXER_URL names a real server")


def open_descriptors() -> set[str]:
    """Return what this process has open, where the system tells."""
    found, folder = set(), "/proc/self/fd"
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        with contextlib.suppress(FileNotFoundError):  # the one that the folder was read with
            found.add(f"{name} -> {os.readlink(f'{folder}/{name}')}")
    return found


def has_children() -> bool:
    """Tell whether there is a process that was not waited for, living or dead."""
    with contextlib.suppress(ChildProcessError):
        return hasattr(os, "fork") and bool(os.waitpid(-1, os.WNOHANG))
    return False


def is_going_on(thing: Any) -> bool:
    kind = type(thing)  # and not isinstance(), which wakes up what only stands in for something
    return (issubclass(kind, asyncio.Future) and not thing.done()) or (
        issubclass(kind, asyncio.AbstractEventLoop) and not thing.is_closed()
    )


@pytest.fixture(autouse=True, scope="session")
def interrupts_arrive() -> None:
    """Let a SIGINT interrupt even if these tests run in a shell's background, whose jobs ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def nothing_left_behind(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail if a descriptor, a thread, a process, a loop or a task outlives its test, or if asyncio had to complain.

    That nothing complains as it is collected, as files do that nobody closed, pytest sees to.
    """
    gc.freeze()  # what is there already is not looked at again: that saves most of the time that this takes
    threads, descriptors = set(threading.enumerate()), open_descriptors()
    yield
    settles(lambda: set(threading.enumerate()) <= threads)  # a server's ends when it has seen that its client is gone
    gc.collect()
    left: list[Any] = [*(set(threading.enumerate()) - threads), *(open_descriptors() - descriptors)]
    left += filter(is_going_on, gc.get_objects())
    left += ["a process"] if has_children() else []
    for when in ("setup", "call", "teardown"):
        left += [record.getMessage() for record in caplog.get_records(when) if record.name == "asyncio"]
    assert left == [], "left behind"


# ---------------------------------------------------------------------------------------------------------------------
# Helpers, and how to add a test
#
# The name of a test is a claim about the client: a sentence that is true, and that fails if someone breaks it. Put the
# test into the section of what it is about. The sections have the names and the order of those in boxer.py; after them
# come the tests against a server that runs programs, against real proxies, of the work that a call takes, of copies of
# boxer.py and the package, and of the README. There are four kinds of tests. Begin with the simplest that can show the
# claim, and copy the example below:
#
# 1. Both clients, one connection: `client_of` makes a client of each kind, with the methods of a BoxerClient.
#    `Peer.answering` gives its answers in order. It fails the test if the client does anything else.
# 2. Both clients, any number of connections: `Host` calls a function for each request, and sends what that returns.
# 3. Asyncio alone, for what only tasks and event loops can do: `asyncio.run` and an AsyncBoxerClient.
# 4. A program that really runs: the fixture `server` is the stand-in, or the server that BOXER_URL names.
#
# A StandIn lets a test look into its store: `server.store.uploads()` lists files and folders (`w/`, `w/a`) that were
# uploaded and are still there, `server.store.outputs()` what runs have kept (`boxer-…/`, `boxer-…/a`). The fixture
# `server` is everybody's, so such a test makes a StandIn of its own: `with StandIn(sandbox=SANDBOX, race=1 / 3) as …`,
# which also loses the output of a third of all runs. The fixture `large_store` takes files of up to 4 GiB.
#
# Every server sends real bytes over a real socket. Only the time and the look-up of names are replaced, by the fixtures
# `clock` and `setenv`. A test that waits for another thread waits for an Event, not for a time. It leaves nothing open.
# ---------------------------------------------------------------------------------------------------------------------


def test_health_asks_for_healthz(client_of: Clients) -> None:
    """The first kind: both clients, one connection."""
    with Peer.answering(WELL) as peer:
        assert client_of(peer.url).health() is True
    assert peer.request.line == "GET /healthz HTTP/1.1"


def test_two_runs_at_once_get_their_own_answers(client_of: Clients) -> None:
    """The second kind: both clients, any number of connections."""

    def respond(request: Received) -> list[bytes]:
        return [answer({**RUN, "stdout": request.json["cmd"][0]})]

    with Host(respond) as host:
        results = gather(client_of(host.url), [run("one"), run("two")])
    assert [result.stdout for result in results] == ["one", "two"]


def test_a_task_can_give_up_a_run() -> None:
    """The third kind: asyncio alone. At the end of its script, the Peer waits until the client has closed."""

    async def main() -> None:
        async with AsyncBoxerClient(peer.url) as client:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(client.run("image", ["true"]), 0.1)

    with Peer([[Do.REQUEST]]) as peer:
        asyncio.run(main())


@in_a_sandbox
def test_a_program_says_what_it_is_told(client_of: Clients, server: Any) -> None:
    """The fourth kind: a program that really runs."""
    assert client_of(server.url).run("python:3.12-slim", ["echo", "hello"]).stdout == "hello\n"


# Servers that run programs


@pytest.fixture(scope="session")
def server() -> Iterator[Any]:
    """Give the server that the contract is checked against: the stand-in, or a real one's address."""
    if REAL_URL:
        yield argparse.Namespace(url=REAL_URL)
        return
    with StandIn(sandbox=SANDBOX) as stand_in:
        ask(stand_in, get("/healthz"))  # an answer shows that all is open that stays open: see nothing_left_behind
        yield stand_in


@pytest.fixture
def names(server: Any) -> dict[str, str]:
    """Give a name that no other test and nobody else on the server uses."""
    return {"u": f"contract-{uuid.uuid4().hex[:12]}"}


def found(program: str) -> str | None:
    """Return where a program is."""
    return shutil.which(program, path=search_path()["PATH"])


# Both clients, as plain calls


class PlainCalls:
    """An AsyncBoxerClient with the methods of a BoxerClient: each coroutine is carried out on the test's own loop."""

    def __init__(self, client: AsyncBoxerClient, loop: asyncio.AbstractEventLoop) -> None:
        self.client = client
        self.loop = loop

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.client, name)
        if not inspect.iscoroutinefunction(method):
            return method
        return lambda *args, **kwargs: self.loop.run_until_complete(method(*args, **kwargs))

    def __repr__(self) -> str:
        return repr(self.client)

    def __enter__(self) -> PlainCalls:
        assert self.loop.run_until_complete(self.client.__aenter__()) is self.client
        return self

    def __exit__(self, *error: object) -> None:
        self.loop.run_until_complete(self.client.__aexit__(*error))

    def close(self) -> None:
        self.loop.run_until_complete(self.client.aclose())


class Clients:
    """Makes clients of one kind, "sync" or "async", and closes them all; of "async" ones, on a loop of its own."""

    def __init__(self, kind: str, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self.kind = kind
        self.cls: Any = BoxerClient if kind == "sync" else AsyncBoxerClient
        self.loop = loop or asyncio.new_event_loop()
        self._made: list[Any] = []

    def __call__(self, base_url: str | None = None, **settings: Any) -> Any:
        return self.take(self.cls(base_url, **settings))

    def take(self, client: Any) -> Any:
        """Take in a client that was made elsewhere."""
        self._made.append(client if self.kind == "sync" else PlainCalls(client, self.loop))
        return self._made[-1]

    def close(self) -> None:
        try:
            for client in self._made:
                client.close()
            assert asyncio.all_tasks(self.loop) == set(), "a task is left"
        finally:
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.run_until_complete(self.loop.shutdown_default_executor())
            self.loop.close()


@pytest.fixture(params=["sync", "async"])
def client_of(request: pytest.FixtureRequest) -> Iterator[Clients]:
    """Make clients, `client_of(base_url, **settings)`: what holds for one kind holds for the other."""
    with contextlib.closing(Clients(request.param)) as clients:
        yield clients


def gather(client: Any, calls: Sequence[tuple[str, tuple[Any, ...], dict[str, Any]]]) -> list[Any]:
    """Make calls, each (method, arguments, keyword arguments), all at once; return results and errors in order."""

    async def together() -> list[Any]:
        coroutines = [getattr(client.client, method)(*args, **kwargs) for method, args, kwargs in calls]
        return await asyncio.gather(*coroutines, return_exceptions=True)

    if isinstance(client, PlainCalls):
        return client.loop.run_until_complete(together())
    with ThreadPoolExecutor(len(calls)) as executor:
        futures = [executor.submit(getattr(client, method), *args, **kwargs) for method, args, kwargs in calls]
        return [future.exception() or future.result() for future in futures]


# A server that follows a script: what it receives and says


class Do(enum.Enum):
    """Steps of a Peer's script. At its end the client has to close the connection, or the Peer does when it exits."""

    REQUEST = "read a whole request"
    HEAD = "read a request's head, and leave its body"
    GONE = "wait until the client has closed, having sent nothing more"
    DRAIN = "wait until the client has closed, whatever it sends"
    HALF_CLOSE = "close for sending"
    FIN = "close"
    RST = "reset"


# Bytes have to be taken by the client. An iterable of bytes, which may be endless, is sent for as long as they are
# taken. A function is called with the socket.
PeerStep = Union[Do, bytes, Iterable[bytes], Callable[[Any], Any]]


class Received(NamedTuple):
    """A request, byte for byte."""

    head: bytes
    body: bytes

    @property
    def line(self) -> str:
        return self.head.split(b"\r\n")[0].decode("ascii")

    @property
    def fields(self) -> dict[str, str]:
        """The header fields, names in lower case; each may be there once."""
        pairs = [line.split(": ", 1) for line in self.head.decode("latin-1").split("\r\n")[1:-2]]
        fields = {name.lower(): value for name, value in pairs}
        assert len(fields) == len(pairs), f"a field is there twice: {pairs}"
        return fields

    @property
    def content(self) -> bytes:
        """The body without its transfer coding."""
        if "transfer-encoding" not in self.fields:
            return self.body
        content, rest = b"", self.body
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            content, rest = content + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
        return content

    @property
    def json(self) -> Any:
        return json.loads(self.content)


class Peer:
    """A server on the loopback address that sends real bytes as its script says: a list of steps for each connection.

    url: its base URL. connections: how many there were. requests: for each connection, the requests that were read.
    Leaving it fails the test if anything happened that is not in the script, or anything in the script did not.
    """

    def __init__(self, script: Sequence[Sequence[PeerStep]], host: str = "127.0.0.1", context: Any = None) -> None:
        self.script = script
        self.requests: list[list[Received]] = []
        self.connections = 0
        self.surprises: list[str] = []
        self._context = context  # an ssl.SSLContext
        self._listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.host, self.port = host, self._listener.getsockname()[1]
        self.authority = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
        self.url = f"http{'s' if context else ''}://{self.authority}"
        self._last: Any = None  # the address of the connection that ends it
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]

    @classmethod
    def answering(cls, *answers: bytes, **settings: Any) -> Peer:
        """Return a peer that gives these answers to as many requests on one connection."""
        return cls([[step for answer in answers for step in (Do.REQUEST, answer)]], **settings)

    @property
    def request(self) -> Received:
        """The one request there was."""
        ((request,),) = self.requests
        return request

    def __enter__(self) -> Peer:
        self._threads[0].start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # Connections are accepted in the order in which they were made: when this one is, so were all others.
        with socket.socket(self._listener.family) as last:
            last.bind((self.host, 0))
            self._last = last.getsockname()
            last.connect((self.host, self.port))
            self._threads[0].join(30)
        self._listener.close()
        for sock in self._open:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RD)  # wakes a thread that reads, and lets others finish
        for thread in self._threads:
            thread.join(30)
        for sock in self._open:
            sock.close()
        for number in range(self.connections, len(self.script)):
            self.surprises.append(f"connection {number} never came")
        if self.surprises and kind is not None:
            print("the peer also saw:", *self.surprises, sep="\n  ")
        assert not self.surprises or kind is not None, "\n".join(self.surprises)

    def _accept(self) -> None:
        while True:
            sock, address = self._listener.accept()
            if address == self._last:
                sock.close()
                return
            self._open.append(sock)
            self.requests.append([])
            self.connections += 1
            self._threads.append(threading.Thread(target=self._follow, args=(sock, self.connections - 1)))
            self._threads[-1].start()

    def _follow(self, sock: Any, number: int) -> None:
        if number >= len(self.script):
            self.surprises.append(f"connection {number} is one too many")
            sock.close()
            return
        script = self.script[number]
        step: Any = "TLS"
        try:
            sock.settimeout(30)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._context is not None:
                self._open[number] = sock = self._context.wrap_socket(sock, server_side=True)
            reader = sock.makefile("rb")
            with contextlib.closing(reader):
                for step in script:
                    self._take(step, sock, reader, number)
                if not script or script[-1] not in (Do.DRAIN, Do.FIN, Do.RST):
                    step = Do.GONE
                    self._take(step, sock, reader, number)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is reported
            if script or not isinstance(error, OSError):  # an empty script is for a client that breaks off
                self.surprises.append(f"connection {number}, {str(step)[:80]}: {error!r}")
        finally:
            sock.close()

    def _take(self, step: Any, sock: Any, reader: Any, number: int) -> None:
        if step in (Do.REQUEST, Do.HEAD):
            self.requests[number].append(_received(reader, with_body=step is Do.REQUEST))
        elif step in (Do.GONE, Do.DRAIN):
            with contextlib.suppress(ConnectionError):
                while rest := reader.read1(65536):
                    assert step is Do.DRAIN, f"unexpected: {rest[:200]!r}"
        elif step is Do.HALF_CLOSE:
            sock.shutdown(socket.SHUT_WR)
        elif step in (Do.FIN, Do.RST):
            if step is Do.RST:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            reader.close()
            sock.close()
        elif isinstance(step, bytes):
            sock.sendall(step)
        elif callable(step):
            step(sock)
        else:
            with contextlib.suppress(ConnectionError):
                for piece in step:
                    sock.sendall(piece)


def _received(reader: Any, with_body: bool) -> Received:
    head = body = b""
    while not head.endswith(b"\r\n\r\n"):
        head += _line(reader)
    if with_body and b"\r\ntransfer-encoding: chunked\r\n" in head.lower():
        while not re.search(rb"(^|\r\n)0\r\n\r\n$", body):
            line = _line(reader)
            body += line + reader.read(int(line, 16) + 2)
    elif with_body and (match := re.search(rb"\r\ncontent-length: ([0-9]+)\r\n", head.lower())):
        body = reader.read(int(match[1]))
        assert len(body) == int(match[1]), "the connection ended within a request's body"
    return Received(head, body)


def _line(reader: Any) -> bytes:
    line: bytes = reader.readline()
    assert line.endswith(b"\r\n"), f"the connection ended within a request, or its line does: {line!r}"
    return line


# Servers that treat every connection alike


class Host(Peer):
    """A peer that treats any number of connections alike: it sends what `respond` returns for each request.

    That is bytes, followed by Do.FIN or Do.RST if the connection is to end there; a function in it is called.
    """

    def __init__(self, respond: Callable[[Received], Iterable[Any]], **settings: Any) -> None:
        super().__init__(_Alike(self), **settings)
        self.respond = respond
        self.seen: list[Received] = []

    def __enter__(self) -> Host:
        super().__enter__()
        return self

    def serve(self, sock: Any) -> None:
        with contextlib.suppress(ConnectionError), sock.makefile("rb") as reader:
            while reader.peek(1):
                request = _received(reader, with_body=True)
                self.seen.append(request)
                for step in self.respond(request):
                    if step is Do.RST:
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    if isinstance(step, Do):
                        return
                    step() if callable(step) else sock.sendall(step)


class _Alike(collections.abc.Sequence[Any]):
    """The script of a Host: the same for each connection, of which there are as many as there are."""

    def __init__(self, host: Host) -> None:
        self.host = host

    def __len__(self) -> int:
        return self.host.connections

    def __getitem__(self, number: Any) -> Any:
        return [self.host.serve, Do.FIN]


class Frail(Host):
    """A host whose clients may break off anywhere, even within a handshake.

    inside: the context of the TLS that it speaks, as a proxy (is_proxy) within each of the tunnels that it opens.
    """

    def __init__(
        self, respond: Callable[[Received], Any], inside: ssl.SSLContext | None = None, is_proxy: bool = False
    ) -> None:
        super().__init__(respond)
        self.inside = inside
        self.is_proxy = is_proxy

    def serve(self, sock: Any) -> None:
        with contextlib.suppress(AssertionError, OSError), contextlib.ExitStack() as stack:
            if self.is_proxy:
                _received(stack.enter_context(sock.makefile("rb")), with_body=False)
                sock.sendall(ESTABLISHED)
            if self.inside is not None:
                sock = stack.enter_context(self.inside.wrap_socket(sock, server_side=True))
                self._open.append(sock)
            super().serve(sock)


class Swift(StandIn):
    """A StandIn that answers to `echo` by itself, so that there can be many runs, and keeps no list of requests."""

    outlived = 0  # runs that went on without their client

    def saw(self, method: str, target: str) -> None:
        """Forget it."""

    def run(self, content: bytes, client: socket.socket) -> dict[str, object]:
        """Run what is not just `echo`."""
        request = run_request(content)
        if request["cmd"][0] != "echo":
            try:
                return super().run(content, client)
            except Refusal as refusal:
                self.outlived += refusal.status == 408
                raise
        self.store.mounts(request.get("files") or [])
        self._lose_the_race_at_times()
        self.store.delete(request.get("files") or [])
        streams = {"stdout": " ".join(request["cmd"][1:]) + "\n", "stderr": ""}
        return {"exec_id": f"boxer-{uuid.uuid4()}", "exit_code": 0, **streams, "wall_ms": 1}


def refused_url() -> str:
    with Peer([]) as peer:
        return peer.url


@contextlib.contextmanager
def never_accepting() -> Iterator[socket.socket]:
    """A listener whose queue is full."""
    with contextlib.ExitStack() as sockets:
        listener = sockets.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(8):
            sock = sockets.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        yield listener


@contextlib.contextmanager
def vanishing(*answers: bytes) -> Iterator[str]:
    """A server that takes one connection, answers as many requests on it, and is gone; yield its URL."""

    def serve() -> None:
        sock, _ = listener.accept()
        listener.close()
        with sock, sock.makefile("rb") as reader:
            for answer in answers:
                _received(reader, with_body=True)
                sock.sendall(answer)

    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=serve)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    thread.join(30)


@contextlib.contextmanager
def store(**settings: Any) -> Iterator[StandIn]:
    """A server for files alone."""
    with StandIn(sandbox=NoSandbox(), **settings) as stand_in:
        yield stand_in


@pytest.fixture
def large_store() -> Iterator[StandIn]:
    """A server for files alone, of up to 4 GiB each."""
    with store(upload_limit=4 << 30) as stand_in:
        yield stand_in


# What servers say


def answer(content: Any = b"", status: str = "200 OK", **fields: str) -> bytes:
    """Return a response with this content, what is neither bytes nor text as JSON, and these fields (`_` for `-`).

    Content None is none, and its length is not announced.
    """
    if content is not None and not isinstance(content, (bytes, str)):
        content = json.dumps(content)
    body = content.encode() if isinstance(content, str) else content or b""
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in fields.items())]
    if content is not None and not {"Content_Length", "Transfer_Encoding"} & set(fields):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def failing(status: str, error: Any = "no", **fields: str) -> bytes:
    return answer({"error": error} if isinstance(error, str) else error, status, **fields)


def raw(*fields: str, body: bytes = b"", status: str = "HTTP/1.1 200 OK") -> bytes:
    return "\r\n".join([status, *fields, "", ""]).encode("latin-1") + body


# The Boxer server's answers to what went well.
WELL = answer({"ok": True})
WELL_AND_BYE = answer({"ok": True}, Connection="close")
RUN = {"exec_id": "boxer-1", "exit_code": 0, "stdout": "hi\n", "stderr": "", "wall_ms": 7}
RAN = answer(RUN)
STORED = answer({"path": "a.txt"})
LIMITS = {"cpu_cores": 0.5, "memory_mb": 128, "pids_limit": 32, "wall_clock_secs": 5, "nofile": 64}
JSON_RUN = json.dumps(RUN).encode()
LENGTH = f"Content-Length: {len(JSON_RUN)}"
IN_CHUNKS = "Transfer-Encoding: chunked"


def chunks(*sizes: int, content: bytes = JSON_RUN, extension: bytes = b"", trailer: bytes = b"") -> bytes:
    """Return content in chunks of these sizes and one with the rest, and the last chunk."""
    source = io.BytesIO(content)
    pieces = [*(source.read(size) for size in sizes), source.read()]
    return b"".join(b"%x%b\r\n%b\r\n" % (len(piece), extension, piece) for piece in pieces if piece) + (
        b"0%b\r\n%b\r\n" % (extension, trailer)
    )


BROKEN = "500 Internal Server Error"
RACES = [f"read {name}: read |0: file already closed" for name in ("stdout", "stderr")]
ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"


# Calls, and what comes of them


Call = tuple[str, tuple[Any, ...], dict[str, Any]]


def run(cmd: str = "true", **more: Any) -> Call:
    return "run", ("image", [cmd]), more


def upload(content: Any) -> Call:
    return "upload_file", ("a.txt", content), {}


GET_HEALTH: Call = ("health", (), {})
RUN_IT = run()
PUT_FILE = upload(b"content")
LARGE = upload(bytes(64 * MIB))  # like the next, it does not fit into any buffer
BIG_RUN = run(env={"BIG": "x" * 8 * MIB})
DOWNLOAD: Call = ("download_file", ("a.txt",), {})
RESULT = RunResult("boxer-1", 0, "hi\n", "", 7)
EVERY_METHOD: list[tuple[str, tuple[Any, ...]]] = [
    ("run", ("i", ["c"])),
    ("upload_file", ("a", b"content")),
    ("upload_path", (__file__,)),
    ("download_file", ("a",)),
]


def do(client: Any, call: Call, **more: Any) -> Any:
    method, args, kwargs = call
    return getattr(client, method)(*args, **{**kwargs, **more})


def outcome(client: Any, call: Call, **more: Any) -> Any:
    """Make a call, and return what it returns or the error that it raises, if that is one a caller has to expect."""
    try:
        return do(client, call, **more)
    except BoxerError as error:
        return error


def is_expected(got: Any, expected: Any) -> bool:
    """Compare an outcome with a value; or with the class of an error, its status (None: it has none) and its text."""
    if not isinstance(expected, tuple):
        return bool(got == expected)
    kind, status, text = expected
    return type(got) is kind and getattr(got, "status_code", None) == status and text in str(got)


def lost(text: str = "") -> tuple[type, None, str]:
    return BoxerConnectionError, None, text


def refusal(status: int, text: str = "") -> tuple[type, int, str]:
    return BoxerAPIError, status, text


async def break_off(how: str, coroutine: Any, is_waiting: Callable[[], Any]) -> Any:
    """Make a call, wait in a thread until it is waiting for its answer, and break it off."""
    asyncio_: Any = asyncio  # all that Pythons of different age have
    call = asyncio.ensure_future(coroutine)
    await asyncio.get_running_loop().run_in_executor(None, is_waiting)
    if how == "wait_for":
        await asyncio.wait_for(call, 0.01)
    elif how == "timeout":
        async with asyncio_.timeout(0.01):
            await call
    elif how == "TaskGroup":

        async def wait() -> None:
            await call

        async with asyncio_.TaskGroup() as group:
            group.create_task(wait())
            await asyncio.sleep(0)
            raise LookupError
    call.cancel()
    await call


def all_text(error: BaseException) -> str:
    """Return everything that an error, and those it came of, could show to anyone."""
    shown = [*traceback.format_exception(type(error), error, error.__traceback__), repr(pickle.dumps(error))]
    cause: BaseException | None = error
    while cause is not None:
        shown += [str(cause), repr(cause), repr(vars(cause))]
        cause = cause.__cause__ or cause.__context__
    return "".join(shown)


# Files and folders


class Unseekable(io.RawIOBase):
    """Content that can be read once."""

    def __init__(self, content: bytes) -> None:
        self._content = io.BytesIO(content)

    def read(self, size: int = -1) -> bytes:
        return self._content.read(size)


class Waiting(Unseekable):
    """Content that cannot be read before something has happened."""

    def __init__(self, event: threading.Event) -> None:
        super().__init__(b"content")
        self.event = event

    def read(self, size: int = -1) -> bytes:
        assert size == 0 or self.event.wait(30)
        return super().read(size)


LONG = 24 * MIB  # a file that is not read to its end, nor taken in by the system, as long as the peer takes nothing


def all_of_it(sock: Any, into: list[bytes]) -> None:
    with contextlib.suppress(ConnectionError):
        while data := sock.recv(65536):
            into.append(data)


@pytest.fixture(scope="session")
def large_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "large.bin"
    with open(path, "wb") as file:
        file.truncate(64 * MIB)
    return path


def uploads(client: Any, path: Path) -> Iterator[Any]:
    for _ in range(20):
        yield outcome(client, LARGE)
        with open(path, "rb") as file:
            yield outcome(client, upload(file))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder whose files sort differently as paths and as text."""
    for name in ("a-b.txt", "a/b/deep.txt", "a/x.txt", "é 1%.txt", "a.txt"):
        (tmp_path / "proj" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "proj" / name).write_text(f"content of {name}\r\n")
    (tmp_path / "proj" / "empty" / "too").mkdir(parents=True)
    return tmp_path / "proj"


@pytest.fixture
def many(tmp_path: Path) -> Path:
    for number in range(40):
        (tmp_path / f"{number:02}.txt").write_text(str(number))
    return tmp_path


# Time and threads


class Clock:
    """What clients take for the time: it goes ahead by their pauses, which take none, and by `tick` at each look."""

    def __init__(self) -> None:
        self.ahead = self.tick = 0.0
        self.pauses: list[float] = []
        self._real_time, self._real_sleep = time.monotonic, asyncio.sleep

    def time(self) -> float:
        self.ahead += self.tick
        return self._real_time() + self.ahead

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.ahead += seconds

    async def async_sleep(self, seconds: float) -> None:
        if seconds:
            self.sleep(seconds)
        await self._real_sleep(0)

    def queue(self) -> queue.SimpleQueue[None]:
        """Return what the blocking client pauses with, and waits for its turn, which takes the time it takes."""
        clock = self

        class Queue(queue.SimpleQueue):  # type: ignore[type-arg]
            def get(self, block: bool = True, timeout: float | None = None) -> Any:
                if timeout is None:
                    return super().get()
                clock.sleep(timeout)
                raise queue.Empty

        return Queue()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock.time)
    monkeypatch.setattr(boxer, "queue", types.SimpleNamespace(SimpleQueue=clock.queue, Empty=queue.Empty))
    monkeypatch.setattr(asyncio, "sleep", clock.async_sleep)
    return clock


class Alarm(logging.Handler):
    """Rings when the log says that a request is tried again."""

    def __init__(self) -> None:
        super().__init__()
        self.has_rung = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if "trying again" in record.getMessage():
            self.has_rung.set()


@pytest.fixture
def is_pausing() -> Iterator[threading.Event]:
    """Tell when a call pauses before another try, which it says in the log."""
    alarm, log = Alarm(), logging.getLogger("boxer")
    log.addHandler(alarm)
    yield alarm.has_rung
    log.removeHandler(alarm)


Interrupts = Callable[[threading.Event], bool]


@pytest.fixture
def interrupts() -> Iterator[Interrupts]:
    """Interrupt the main thread, until an event says that it was; return False if that never comes.

    It is interrupted once, by as many signals as it takes: one that falls just before a wait begins is seen by Python
    when the wait ends, and one that falls within it ends it.
    """
    if not hasattr(signal, "pthread_kill"):
        pytest.skip("this system cannot interrupt a thread")
    is_new = True

    def interrupt_once(*_: object) -> None:
        nonlocal is_new
        if is_new:
            is_new = False
            raise KeyboardInterrupt

    def interrupt(is_over: threading.Event) -> bool:
        end = time.monotonic() + 5
        while not is_over.wait(0.01) and time.monotonic() < end:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return is_over.is_set()

    before = signal.signal(signal.SIGINT, interrupt_once)
    yield interrupt
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    """Let threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def in_time(function: Callable[[], Any]) -> Any:
    """Call a function in another thread; fail if it does not return."""
    returned: list[Any] = []
    thread = threading.Thread(target=lambda: returned.append(function()), daemon=True)
    thread.start()
    thread.join(10)
    assert returned, "it hangs" if thread.is_alive() else "it failed"
    return returned[0]


def settles(condition: Callable[[], bool]) -> bool:
    """Wait for something that other threads are about to make true."""
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        threading.Event().wait(0.001)
    return condition()


def drop(things: list[Any]) -> None:
    things.clear()
    gc.collect()


class Counting:
    """Counts the calls of Python functions in this thread."""

    def __enter__(self) -> Counting:
        self.calls = 0
        sys.setprofile(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _count(self, _frame: Any, event: str, _: Any) -> None:
        self.calls += event == "call"


# TLS and proxies


@pytest.fixture(scope="session")
def ca() -> trustme.CA:
    return trustme.CA()


def serving(ca: trustme.CA, *names: str, clients: trustme.CA | None = None, **issued: Any) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert(*(names or ("127.0.0.1",)), **issued).configure_cert(context)
    if clients is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        clients.configure_trust(context)
    return context


def trusting(ca: trustme.CA, certificate: trustme.LeafCert | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=ca.cert_pem.bytes().decode())  # without the system's, which take long
    if certificate is not None:
        certificate.configure_cert(context)
    return context


def close_notify(sock: Any) -> None:
    with contextlib.suppress(OSError):
        sock.unwrap()


# Names below .test and .localhost, with a final dot or without, "localhost." itself, and private addresses.
THIS_MACHINE = r"\.(test|localhost)\.?$|^localhost\.$|^1[01](\.[0-9]+){3}$|^(fd00|2001:db8):"


@pytest.fixture
def setenv(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Begin without a proxy in the environment, and let the names and addresses of tests be this machine's."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy") or name == "REQUEST_METHOD"]:
        monkeypatch.delenv(name)
    look_up = socket.getaddrinfo

    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        name = (host.decode() if isinstance(host, bytes) else host).lower()
        return look_up("127.0.0.1" if re.search(THIS_MACHINE, name) else host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return monkeypatch.setenv


# Programs beside the tests, and generated examples


def boxer_folder() -> str:
    """Return the folder in which `import boxer` finds what is tested: boxer.py, or a package of that name."""
    file = Path(boxer.__file__)
    return str(file.parent.parent if file.stem == "__init__" else file.parent)


def program_beside_boxer(folder: Path, code: str, *arguments: str, under: Sequence[str] = ()) -> str:
    """Run a program beside a copy of the client, without any installed package, and return what it prints."""
    shutil.copy(boxer.__file__, folder / "boxer.py")
    (folder / "program.py").write_text(code, "utf-8")
    line = [*under, sys.executable, "-E", "-S", "-W", "error", "program.py", *arguments]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


# More of them search for longer: BOXER_EXAMPLES=20000.
EXAMPLES = int(os.environ.get("BOXER_EXAMPLES", "200"))


def examples(share: float = 1) -> hypothesis.settings:
    """Return the settings of a test of generated examples, for a share of their usual number."""
    checks = [hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow]
    return hypothesis.settings(
        max_examples=max(1, int(EXAMPLES * share)),
        database=None,
        deadline=None,
        derandomize=False,
        print_blob=True,
        suppress_health_check=checks,
    )


def own_server(**settings: Any) -> StandIn:
    """A server whose store a test can look into."""
    return StandIn(sandbox=SANDBOX, **settings)


def iterate(client: Any, requests: Any, **settings: Any) -> Generator[tuple[RunRequest, Any], None, None]:
    """Iterate over `run_many` of either client as one does without asyncio; closing this one leaves the loop early."""
    if not isinstance(client, PlainCalls):
        yield from client.run_many(requests, **settings)
        return

    async def begin() -> Any:
        return client.client.run_many(requests, **settings)

    outcomes = client.loop.run_until_complete(begin())
    try:
        while True:
            try:
                outcome = client.loop.run_until_complete(outcomes.__anext__())
            except StopAsyncIteration:
                return
            yield outcome
    finally:
        client.loop.run_until_complete(outcomes.aclose())


SECRET = "s3" + "cret"  # not as it would stand in a traceback's line of source


def numbered(count: int) -> Iterator[RunRequest]:
    return (RunRequest("image", ["echo", str(number)], tag=number) for number in range(count))


class Kept:
    """Answers as a server would that keeps these outputs of a run, and this list of them; a function for a Host.

    listing, and each of `outputs`: bytes, or steps of a Host. Without a listing it has what `outputs` names.
    """

    def __init__(self, outputs: Mapping[str, Any], listing: Any = None) -> None:
        self.outputs = outputs
        self.listing = b"".join(b"./%b\0" % name.encode() for name in outputs) if listing is None else listing
        self.name = ""  # that the client has given to the list
        self.asked: list[str] = []  # the paths of outputs

    def __call__(self, request: Received) -> list[Any]:
        if request.line.startswith("POST /run"):
            match = re.search(r"! -name ([^ ]+) -print0 >\1;", " ".join(request.json["cmd"]))
            self.name = match[1] if match else self.name
            return [RAN]
        if request.line.startswith("POST"):
            return [STORED]
        target = urllib.parse.urlsplit(request.line.split()[1])
        path = urllib.parse.parse_qs(target.query, errors="surrogateescape")["path"][0]
        self.asked.append(path)
        prefix = f"output/{RUN['exec_id']}/"
        assert path.startswith(prefix), path
        content = self.listing if path == prefix + self.name else self.outputs.get(path[len(prefix) :])
        if content is None:
            return [failing("404 Not Found", "file not found")]
        return [answer(content)] if isinstance(content, bytes) else content


ALL_OUTPUTS = {"image": "image", "cmd": ["true"], "outputs": True}
NOT_A_FILE = [answer("", "301 Moved Permanently", Location="files/?path=x")]
GIB = 1 << 30


def endless(size: int) -> list[Any]:
    """Steps of a host: an answer with so many zeros, for as long as they are taken."""
    head = raw(f"Content-Length: {size}")
    return [head, *[bytes(MIB)] * (size // MIB)]


# ---------------------------------------------------------------------------------------------------------------------
# The contract of the server: what a Boxer server says, byte for byte
#
# These tests hold for the stand-in and, where BOXER_URL names one, for a real server.
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Answer:
    """One response as it came: the heads of interim ones, its own, and its content as sent."""

    interim: str
    status: str
    fields: list[str]
    content: bytes
    closed: bool


class Wire:
    """A connection that sends bytes and reads one answer."""

    def __init__(self, url: str) -> None:
        """Connect."""
        parts = urllib.parse.urlsplit(url)
        self.host = parts.netloc
        self.socket = socket.create_connection((parts.hostname, parts.port or 80), timeout=30)
        self.file = self.socket.makefile("rb")

    def __enter__(self) -> Wire:
        """Return itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close."""
        self.file.close()
        self.socket.close()

    def ask(self, request: bytes) -> Answer:
        """Send a request and read what comes back."""
        self.socket.sendall(request.replace(b"HOST", self.host.encode()))
        return self.answer(head_only=request.startswith(b"HEAD"))

    def answer(self, *, head_only: bool = False) -> Answer:
        """Read an answer."""
        status, *fields = self._head()
        interim = ""
        if status.startswith("HTTP/1.1 100"):
            interim, (status, *fields) = "\n".join([status, *fields]), self._head()
        sized = [int(field[16:]) for field in fields if field.startswith("Content-Length: ")]
        content = b"" if head_only else self._chunked() if not sized else self.file.read(sized[0])
        return Answer(interim, status, fields, content, "Connection: close" in fields and self.file.read() == b"")

    def _head(self) -> list[str]:
        lines = list(iter(self.file.readline, b"\r\n"))
        assert lines and all(line.endswith(b"\r\n") for line in lines), lines
        return [line[:-2].decode("utf-8", "surrogateescape") for line in lines]

    def _chunked(self) -> bytes:
        lines = [self.file.readline()]
        lines.append(self.file.read(int(lines[0], 16) + 2))
        lines.append(self.file.read(5))
        return b"".join(lines)


def get(target: str, *fields: str, method: str = "GET") -> bytes:
    return "\r\n".join([f"{method} {target} HTTP/1.1", "Host: HOST", *fields, "", ""]).encode()


def post(target: str, kind: str, content: bytes, *fields: str) -> bytes:
    head = get(target, *fields, f"Content-Type: {kind}", f"Content-Length: {len(content)}", method="POST")
    return head + content


def post_run(cmd: Any = ("true",), *fields: str, image: Any = "python:3.12-slim", **request: Any) -> bytes:
    content = {"image": image, "cmd": cmd, **request}
    sent = {name: value for name, value in content.items() if value is not ...}
    return post("/run", "application/json", json.dumps(sent).encode(), *fields)


def post_file(path: Any, content: bytes = b"x", name: str = "file") -> bytes:
    part = b"--BOUNDARY\r\nContent-Disposition: form-data; name="
    file = b'"%b"; filename="f"\r\nContent-Type: application/octet-stream\r\n\r\n%b\r\n' % (
        name.encode(),
        content,
    )
    ending = b"--BOUNDARY--\r\n" if path is ... else part + b'"path"\r\n\r\n%b\r\n--BOUNDARY--\r\n' % path.encode()
    return post("/files", "multipart/form-data; boundary=BOUNDARY", part + file + ending)


def chunked(request: bytes) -> bytes:
    head, content = request.split(b"\r\n\r\n", 1)
    head = re.sub(rb"Content-Length: \d+", b"Transfer-Encoding: chunked", head)
    return head + b"\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(content), content)


def python(code: str) -> list[str]:
    return ["python3", "-c", code]


def ran(stdout: str = "", stderr: str = "", code: int = 0) -> str:
    return f'{{"exec_id":"<id>","exit_code":{code},"stdout":"{stdout}","stderr":"{stderr}","wall_ms":<n>}}'


def failed(reason: str) -> str:
    escaped = reason.replace('"', '\\"')
    return f'{{"error":"{escaped}"}}'


def worded(reason: str, exact: str = "") -> str:
    """Return the content of a refusal whose text is Go's or the registry's.

    A real server may be built with other versions of these: of its text, only the beginning has to be exact.
    """
    return failed(f"{exact}<any>" if REAL_URL else exact + reason)


def pattern(text: str, replacements: Mapping[str, str]) -> re.Pattern[str]:
    """Make a pattern of a text that is exact but for what stands in angle brackets."""
    named = {
        "<id>": "boxer-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}",
        "<n>": r"\d+",
        "<hex>": "[0-9a-f]+",
        "<any>": ".*",
    }
    for name, value in replacements.items():
        text = text.replace(name, value)
    return re.compile("".join(named.get(piece, re.escape(piece)) for piece in re.split("(<[a-z]+>)", text)), re.DOTALL)


GMT = r"[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT"
IS_JSON = "Content-Type: application/json; charset=utf-8"
JSON = (IS_JSON, "Date", "Content-Length")
CHUNKED = (IS_JSON, "Date", "Transfer-Encoding: chunked")
TEXT = ("Content-Type: text/plain", "Date", "Content-Length")
BINARY = "application/octet-stream"


def file_of(kind: str) -> tuple[str, ...]:
    return ("Accept-Ranges: bytes", "Content-Length", f"Content-Type: {kind}", "Last-Modified", "Date")


def check(answer: Answer, status: str, fields: Sequence[str], content: str, **names: str) -> None:
    """Compare an answer with what it must be: every field, in order, and every byte."""
    names = {f"<{name}>": value for name, value in names.items()}
    assert answer.status == f"HTTP/1.1 {status}"
    expected = [field if ":" in field else f"{field}: <{field.lower().replace('-', '')}>" for field in fields]
    date = {"date": GMT, "lastmodified": GMT, "contentlength": r"\d+"}
    assert len(answer.fields) == len(expected), answer.fields
    for field, wanted in zip(answer.fields, expected):
        name = wanted.partition("<")[2].rstrip(">")
        rule = re.escape(wanted.partition("<")[0]) + date[name] if name in date else pattern(wanted, names)
        assert re.fullmatch(rule, field), (field, wanted)
    text = answer.content.decode("latin-1" if BINARY in "".join(fields) else "utf-8")
    assert pattern(content, names).fullmatch(text), text
    if not answer.content and content == "":
        return
    assert "Content-Length" not in fields or f"Content-Length: {len(answer.content)}" in answer.fields


def ask(server: Any, request: bytes) -> Answer:
    """Send a request on a connection of its own; again, when a real server has lost a program's output."""
    for _ in range(20):
        with Wire(server.url) as wire:
            answer = wire.ask(request)
        if b"file already closed" not in answer.content:
            break
    return answer


@pytest.fixture(scope="session")
def kept(server: Any) -> str:
    """Run a program that leaves outputs of every kind, and return its id."""
    code = (
        "import os; os.makedirs('/output/subdir'); os.symlink('/etc/passwd', '/output/link');"
        "files = {'result.json': b'{\"value\": 42}', 'subdir/file.bin': bytes(range(256)),"
        " 'empty': b'', 'na me+%41 \\xe9.txt': b'odd'};"
        "[open('/output/' + name, 'wb').write(data) for name, data in files.items()]"
    )
    result = json.loads(ask(server, post_run(python(code), persist=True, env=["PYTHONUTF8=1"])).content)
    assert result["exit_code"] == 0, result
    return str(result["exec_id"])


def fill(request: bytes, names: Mapping[str, str]) -> bytes:
    """Put names into a request, and the length right again."""
    for name, value in names.items():
        request = request.replace(f"<{name}>".encode(), value.encode())
    head, content = request.split(b"\r\n\r\n", 1)
    return re.sub(rb"Content-Length: \d+", b"Content-Length: %d" % len(content), head) + b"\r\n\r\n" + content


@pytest.mark.parametrize("where", [WHERE])
def test_the_contract_ran_in(where: str) -> None:
    print(f"programs run in: {where}")


# Each row: its name, the request, the status line, the fields, the content. <u> is a name of the row's own.
NO_SUCH_PATH = "404 page not found"
INT64 = "json: cannot unmarshal {} into Go struct field ResourceLimits.limits.{} of type int64"
TAG = "Key: 'RunRequest.{0}' Error:Field validation for '{0}' failed on the '{1}' tag"
PULL = "image pull failed: "
MOVED, LATE = "301 Moved Permanently", "408 Request Timeout"
OK, BAD, MISSING, FAILED = "200 OK", "400 Bad Request", "404 Not Found", "500 Internal Server Error"
PLAIN_ROWS = [
    ("healthz", get("/healthz"), OK, JSON, '{"ok":true}'),
    ("not_found", get("/nope"), MISSING, TEXT, NO_SUCH_PATH),
    ("method_not_allowed", get("/run"), MISSING, TEXT, NO_SUCH_PATH),
    ("download_head", get("/files?path=x", method="HEAD"), MISSING, TEXT, ""),
    ("download_missing", get("/files?path=<u>.txt"), MISSING, JSON, failed("file not found")),
    ("download_no_path", get("/files"), BAD, JSON, failed("query parameter 'path' is required")),
    ("download_empty_path", get("/files?path="), BAD, JSON, failed("query parameter 'path' is required")),
    ("download_traversal", get("/files?path=../../etc/passwd"), BAD, JSON,
     r'{"error":"invalid path: \"../../etc/passwd\""}'),
    ("upload", post_file("<u>"), OK, JSON, '{"path":"<u>"}'),
    ("upload_empty", post_file("<u>", b""), OK, JSON, '{"path":"<u>"}'),
    ("upload_nested", post_file("<u>/sub/data.bin", bytes(range(256))), OK, JSON,
     '{"path":"<u>/sub/data.bin"}'),
    ("upload_leading_slash", post_file("/<u>/x"), OK, JSON, '{"path":"/<u>/x"}'),
    ("upload_unicode", post_file("<u>/donn\u00e9es/\u4e16\u754c.txt"), OK, JSON,
     '{"path":"<u>/donn\u00e9es/\u4e16\u754c.txt"}'),
    ("upload_spaces", post_file('<u> b/"q" %41+c.txt'), OK, JSON, r'{"path":"<u> b/\"q\" %41+c.txt"}'),
    ("upload_dot", post_file("."), BAD, JSON, r'{"error":"invalid path: \".\""}'),
    ("upload_traversal", post_file("../../etc/x"), BAD, JSON, r'{"error":"invalid path: \"../../etc/x\""}'),
    ("upload_output_prefix", post_file("output/x"), BAD, JSON,
     r"""{"error":"path uses reserved prefix 'output/': \"output/x\""}"""),
    ("upload_empty_path", post_file(""), BAD, JSON, failed("form field 'path' is required")),
    ("upload_no_path", post_file(...), BAD, JSON, failed("form field 'path' is required")),
    ("upload_no_file", post_file("<u>", name="other"), BAD, JSON,
     worded("http: no such file", exact="form field 'file' is required: ")),
    ("upload_not_multipart", post("/files", "application/json", b"{}"), BAD, JSON,
     worded("request Content-Type isn't multipart/form-data", exact="form field 'file' is required: ")),
    ("run_bad_json", post("/run", "application/json", b"{nope"), BAD, JSON,
     worded("invalid character 'n' looking for beginning of object key string")),
    ("run_empty_cmd", post_run([]), BAD, JSON, worded(TAG.format("Cmd", "min"))),
    ("run_no_cmd", post_run(...), BAD, JSON, worded(TAG.format("Cmd", "required"))),
    ("run_empty_image", post_run(image=""), BAD, JSON, worded(TAG.format("Image", "required"))),
    ("run_no_image", post_run(image=...), BAD, JSON, worded(TAG.format("Image", "required"))),
    ("run_limits_float_int", post_run(limits={"wall_clock_secs": 1.5}), BAD, JSON,
     worded(INT64.format("number 1.5", "wall_clock_secs"))),
    ("run_limits_wrong_type", post_run(limits={"memory_mb": "128"}), BAD, JSON,
     worded(INT64.format("string", "memory_mb"))),
    ("run_network_invalid", post_run(network="wifi"), BAD, JSON,
     failed("invalid network: must be none, sandbox, or host")),
    ("run_bad_image_ref", post_run(image="UPPER CASE!!"), FAILED, JSON,
     worded("resolve digest for UPPER CASE!!: parse ref: could not parse reference: UPPER CASE!!", exact=PULL)),
    ("run_unknown_image", post_run(image="no-such-image:latest"), FAILED, JSON,
     worded("resolve digest for no-such-image:latest: docker inspect no-such-image:latest: "
            "Error response from daemon: No such image: no-such-image:latest", exact=PULL)),
    ("run_file_missing", post_run(files=["<u>.py"]), BAD, JSON, failed("file not found: <u>.py")),
    ("run_file_traversal", post_run(files=["../../etc/passwd"]), BAD, JSON,
     r'{"error":"invalid file path: invalid path: \"../../etc/passwd\""}'),
    ("run_wall_clock_huge", post_run(limits={"wall_clock_secs": 10**10}), FAILED, JSON,
     failed("start runsc: context deadline exceeded")),
]  # fmt: skip
EVERY_LIMIT = {"cpu_cores": 0.5, "memory_mb": 128, "pids_limit": 32, "wall_clock_secs": 10, "nofile": 64}
NO_LIMIT = {"cpu_cores": None, "memory_mb": 0, "wall_clock_secs": 0}
ON_BOTH = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
ODD_TEXT = r"print('h\u00e9llo \u4e16\u754c \U0001f600 <b>&amp;</b> \u2028')"
NO_PROGRAM = (
    r"<any>no-such-program<any>"  # in the words of some version of gVisor
    if REAL_URL
    else r"<any>error finding executable \"no-such-program\" in PATH [<any>]: no such file or directory\n"
)
NO_SANDBOX_MADE = (
    "<any>"
    if REAL_URL
    else "running container: creating container: cannot create sandbox: cannot read client sync file: "
    r"waiting for sandbox to start: EOF\n"
)
NO_CWD = (
    "<any>"
    if REAL_URL
    else "running container: starting container: starting root container: starting sandbox: creating process: "
    r"failed to find initial working directory \"/tmp/new\": no such file or directory\n"
)
RUN_ROWS = [
    ("run_hello", post_run(python("print('hello world')")), OK, JSON, ran(r"hello world\n")),
    ("run_exit_code", post_run(python(ON_BOTH)), OK, JSON, ran(r"out\n", r"err\n", 3)),
    ("run_env_cwd", post_run(python("import os; print(os.environ['A'], os.getcwd())"), env=["A=hi"],
                             cwd="/tmp"), OK, JSON, ran(r"hi /tmp\n")),
    ("run_bad_cwd", post_run(["pwd"], cwd="/no/such/dir"), OK, JSON, ran(r"/no/such/dir\n")),
    ("run_cwd_below_tmp", post_run(["pwd"], cwd="/tmp/new"), OK, JSON, ran("", NO_CWD, 128)),
    ("run_bad_env", post_run(env=["NOEQUALS"]), OK, JSON, ran("", NO_SANDBOX_MADE, 128)),
    ("run_nul", post_run(["printf", "%s", "a\0b"]), OK, JSON, ran("a")),
    ("run_nul_in_a_variable", post_run(["sh", "-c", "printf %s $A"], env=["A=a\0b"]), OK, JSON, ran("a")),
    ("run_nul_in_cwd", post_run(cwd="/a\0b"), OK, JSON, ran("", "<any>", 128)),
    ("run_nul_in_files", post_run(files=["<u>\0b"]), OK, JSON, ran("", "<any>", 128)),
    ("run_command_not_found", post_run(["no-such-program"]), OK, JSON, ran("", NO_PROGRAM, 128)),
    ("run_missing_program_under_sh", post_run(["sh", "-c", 'exec "$@"', "sh", "no-such-program"]), OK, JSON,
     ran("", "sh: <any>no-such-program: not found\\n", 127)),
    ("run_killed_by_signal", post_run(["sh", "-c", "kill -9 $$"]), OK, JSON, ran(code=137)),
    ("run_stdin", post_run(python("import sys; print(repr(sys.stdin.read()))")), OK, JSON, ran(r"''\n")),
    ("run_invalid_utf8", post_run(python(r"import sys; sys.stdout.buffer.write(b'a\xff\xfe\x00b')")), OK,
     JSON, ran(r"a\ufffd\ufffd\u0000b")),
    ("run_unicode", post_run(python(ODD_TEXT), env=["PYTHONUTF8=1"]), OK, JSON,
     ran("h\u00e9llo \u4e16\u754c \U0001f600 \\u003cb\\u003e\\u0026amp;\\u003c/b\\u003e \\u2028\\n")),
    ("run_limits", post_run(limits=EVERY_LIMIT), OK, JSON, ran()),
    ("run_limits_negative", post_run(limits={"memory_mb": -5}), OK, JSON, ran()),
    ("run_limits_null", post_run(limits=NO_LIMIT), OK, JSON, ran()),
    ("run_network_none", post_run(network="none"), OK, JSON, ran()),
    ("run_unknown_field", post_run(surprise=1), OK, JSON, ran()),
    ("run_chunked_request", chunked(post_run()), OK, JSON, ran()),
    ("run_expect_continue", post_run(("true",), "Expect: 100-continue"), OK, JSON, ran()),
    ("run_long_output", post_run(python("print('y' * 5000)")), OK, CHUNKED,
     "<hex>\r\n" + ran("y" * 5000 + r"\n") + "\r\n0\r\n\r\n"),
    ("run_timeout", post_run(python("while True: pass"), limits={"wall_clock_secs": 1}), LATE,
     JSON, failed("execution timed out after <n>ms")),
    ("run_output_limit", post_run(python("print('x' * 10485760)")), "507 Insufficient Storage", JSON,
     failed("output limit exceeded: limit=10485760 bytes")),
    ("run_output_far_over_limit", post_run(python("print('x' * 20000000)"), limits={"wall_clock_secs": 2}),
     LATE, JSON, failed("execution timed out after <n>ms")),
]  # fmt: skip
MAIN = b"print(open('data/x.txt').read(), __import__('os').getcwd(), __import__('sys').stdin.read().upper())"
FROM_STDIN = ["sh", "-c", 'exec "$@" < "$0"', "/<u>/stdin", "python3", "main.py"]
IN_ORDER = [f"<u>/{name}" for name in ("main.py", "data/x.txt", "stdin", "data")]
MAIN_ROWS = [
    (post_file("<u>/main.py", MAIN), OK, JSON, '{"path":"<u>/main.py"}'),
    (post_file("<u>/data/x.txt", b"DATA"), OK, JSON, '{"path":"<u>/data/x.txt"}'),
    (post_file("<u>/stdin", b"typed in"), OK, JSON, '{"path":"<u>/stdin"}'),
]
RUN_U = post_run(["python3", "/<u>.py"], files=["<u>.py"])
PUT_U = [(post_file("<u>.py", b"print('first')\n"), OK, JSON, '{"path":"<u>.py"}')]
GONE = (get("/files?path=<u>.py"), MISSING, JSON, failed("file not found"))
STAYED = (get("/files?path=<u>.py"), OK, file_of("text/x-python; charset=utf-8"), "print('first')\n")
PUT_A = [(post_file("<u>/a"), OK, JSON, '{"path":"<u>/a"}')]
A_GONE = (get("/files?path=<u>/a"), MISSING, JSON, failed("file not found"))
FOLDER_GONE = (get("/files?path=<u>"), MISSING, JSON, failed("file not found"))
# Each story: its name, and rows without names, in their order.
STORIES = [
    ("download_uploaded", [*PUT_U, STAYED]),
    ("upload_onto_dir", [
        (post_file("<u>/sub/x"), OK, JSON, '{"path":"<u>/sub/x"}'),
        (post_file("<u>/sub"), BAD, JSON, '{"error":"create file: open <any>/<u>/sub: is a directory"}'),
    ]),
    ("run_duplicate_files", [
        *PUT_U,
        (post_run(files=["<u>.py", "<u>.py"]), FAILED, JSON,
         r'{"error":"spec build failed: duplicate mount destination: \"/<u>.py\""}'),
        STAYED,
    ]),
    ("run_cleanup_missing_path", [
        *PUT_A,
        (post_run(files=["<u>/a", "<u>/missing", "<u>"]), BAD, JSON, failed("file not found: <u>/missing")),
        (get("/files?path=<u>/a"), OK, file_of("text/plain; charset=utf-8"), "x"),  # download_after_missing_path
    ]),
    ("run_reserved_mount", [
        (post_file("proc"), OK, JSON, '{"path":"proc"}'),
        (post_run(files=["proc"]), FAILED, JSON,
         r'{"error":"spec build failed: mount destination conflicts with reserved mount: \"/proc\""}'),
    ]),
]  # fmt: skip
RUN_STORIES = [
    ("run_with_file", [
        *PUT_U,
        (post_file("<u>.py", b"print('second')\n"), OK, JSON, '{"path":"<u>.py"}'),  # upload_replace
        (RUN_U, OK, JSON, ran(r"second\n")),
        (RUN_U, BAD, JSON, failed("file not found: <u>.py")),  # run_with_file_again
        GONE,  # download_after_delete
    ]),
    ("run_persist", [
        *PUT_U,
        (post_run(["python3", "/<u>.py"], files=["<u>.py"], persist=True), OK, JSON, ran(r"first\n")),
        STAYED,
        (RUN_U, OK, JSON, ran(r"first\n")),  # run_persist_again
    ]),
    ("run_cleanup", [*PUT_A, (post_run(files=["<u>/a", "<u>"]), OK, JSON, ran()), A_GONE, FOLDER_GONE]),
    ("run_exit_code_with_file", [
        *PUT_A,
        (post_run(["sh", "-c", "exit 3"], files=["<u>/a", "<u>"]), OK, JSON, ran(code=3)),
        A_GONE,  # download_after_exit_code
        FOLDER_GONE,
    ]),
    ("run_missing_program_with_file", [
        *PUT_A,
        (post_run(["no-such-program"], files=["<u>/a", "<u>"]), OK, JSON, ran("", NO_PROGRAM, 128)),
        A_GONE,  # download_after_missing_program
        FOLDER_GONE,
    ]),
    ("a_file_may_be_mounted_below_tmp_and_its_folder_be_the_working_directory", [
        (post_file("tmp/<u>/a"), OK, JSON, '{"path":"tmp/<u>/a"}'),
        (post_run(["sh", "-c", "pwd; cat a"], cwd="/tmp/<u>", files=["tmp/<u>/a", "tmp/<u>"]), OK, JSON,
         ran(r"/tmp/<u>\nx")),
    ]),
    ("run_folder_mounted", [*MAIN_ROWS, (post_run(FROM_STDIN, cwd="/<u>", files=["<u>"], persist=True), OK,
                                         JSON, ran(r"DATA /<u> TYPED IN\n"))]),
    ("run_files_then_folders", [
        *MAIN_ROWS,
        (post_run(["python3", "main.py"], cwd="/<u>", files=[*IN_ORDER, "<u>"]), OK, JSON,
         ran(r"DATA /<u> \n")),
        (get("/files?path=<u>"), MISSING, JSON, failed("file not found")),
    ]),
    ("a_folder_that_is_not_empty_when_its_turn_comes_stays", [
        *MAIN_ROWS,
        (post_run(files=["<u>/data", "<u>/data/x.txt"]), OK, JSON, ran()),
        (get("/files?path=<u>/data/x.txt"), MISSING, JSON, failed("file not found")),
        (get("/files?path=<u>/data"), MOVED, ("Location: files/?path=<u>/data", *JSON[1:]), ""),
    ]),
    ("a_run_that_was_late_leaves_its_files", [
        *PUT_U,
        (post_run(["sleep", "9"], files=["<u>.py"], limits={"wall_clock_secs": 1}), LATE, JSON,
         failed("execution timed out after <n>ms")),
        STAYED,
    ]),
    ("a_run_over_its_output_limit_leaves_its_files", [
        *PUT_U,
        (post_run(python("print('x' * 10485760)"), files=["<u>.py"]), "507 Insufficient Storage", JSON,
         failed("output limit exceeded: limit=10485760 bytes")),
        STAYED,
    ]),
]  # fmt: skip
BIN = "/files?path=output/<kept>/subdir/file.bin"
ALL_BYTES = bytes(range(256)).decode("latin-1")
PART = ("Accept-Ranges: bytes", "Content-Length", "Content-Range: bytes 250-255/256",
        f"Content-Type: {BINARY}", "Last-Modified", "Date")  # fmt: skip
NO_PART = ("Content-Range: bytes */256", "Content-Type: text/plain; charset=utf-8",
           "X-Content-Type-Options: nosniff", "Date", "Content-Length")  # fmt: skip
KEPT_ROWS = [
    ("download", get("/files?path=output/<kept>/result.json"), OK, file_of("application/json"),
     '{"value": 42}'),
    ("download_binary", get(BIN), OK, file_of(BINARY), ALL_BYTES),
    ("download_empty", get("/files?path=output/<kept>/empty"), OK, file_of("text/plain; charset=utf-8"), ""),
    ("download_odd_name", get("/files?path=output%2F<kept>%2Fna%20me%2B%2541%20%C3%A9.txt"), OK,
     file_of("text/plain; charset=utf-8"), "odd"),
    ("download_symlink", get("/files?path=output/<kept>/link"), MISSING, JSON, failed("file not found")),
    ("download_index_html_note", get("/files?path=output/<kept>/index.html"), MISSING, JSON,
     failed("file not found")),
    ("download_range", get(BIN, "Range: bytes=250-"), "206 Partial Content", PART, ALL_BYTES[250:]),
    ("download_range_bad", get(BIN, "Range: bytes=999-"), "416 Requested Range Not Satisfiable", NO_PART,
     "invalid range: failed to overlap\n"),
    ("download_directory", get("/files?path=output/<kept>/subdir"), MOVED,
     ("Location: files/?path=output/<kept>/subdir", *JSON[1:]), ""),
    ("download_directory_root", get("/files?path=output/<kept>"), MOVED,
     ("Location: files/?path=output/<kept>", *JSON[1:]), ""),
]  # fmt: skip


def by_name(rows: Sequence[Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row", [pytest.param(row[1:], id=row[0]) for row in rows])


@by_name(PLAIN_ROWS)
def test_an_answer_is_what_a_boxer_server_says(server: Any, names: dict[str, str], row: Any) -> None:
    check(ask(server, fill(row[0], names)), *row[1:], **names)


@in_a_sandbox
@by_name(RUN_ROWS)
def test_a_run_is_answered_as_by_a_boxer_server(server: Any, names: dict[str, str], row: Any) -> None:
    answer = ask(server, fill(row[0], names))
    check(answer, *row[1:], **names)
    assert answer.interim == ("HTTP/1.1 100 Continue" if b"Expect:" in row[0] else "")


@in_a_sandbox
@by_name(KEPT_ROWS)
def test_a_kept_output_is_served_as_by_a_boxer_server(server: Any, kept: str, row: Any) -> None:
    check(ask(server, fill(row[0], {"kept": kept})), *row[1:], kept=kept)


@by_name(STORIES)
def test_a_file_is_treated_as_by_a_boxer_server(server: Any, names: dict[str, str], row: Any) -> None:
    for request, *expected in row[0]:
        check(ask(server, fill(request, names)), *expected, **names)


@in_a_sandbox
@by_name(RUN_STORIES)
def test_a_run_treats_its_files_as_a_boxer_server_does(server: Any, names: dict[str, str], row: Any) -> None:
    test_a_file_is_treated_as_by_a_boxer_server(server, names, row)


def test_an_upload_over_the_limit_is_refused_while_it_is_still_being_sent(server: Any) -> None:
    head, content = post_file("too-large", b"x" * (32 << 20)).split(b"\r\n\r\n", 1)

    def send() -> None:
        with contextlib.suppress(ConnectionError):  # the end of it finds the connection closed
            wire.socket.sendall(head.replace(b"HOST", wire.host.encode()) + b"\r\n\r\n" + content)

    with Wire(server.url) as wire:
        sender = threading.Thread(target=send)
        sender.start()
        answer = wire.answer()
        sender.join()
    too_large = "413 Request Entity Too Large"
    check(answer, too_large, (*JSON, "Connection: close"), failed("upload exceeds limit"))
    assert answer.closed


def test_a_kept_connection_serves_one_request_after_another(server: Any) -> None:
    with Wire(server.url) as wire:
        for request in (get("/healthz"), get("/nope"), post_run([]), get("/healthz", "Connection: close")):
            answer = wire.ask(request)
        check(answer, OK, (*JSON, "Connection: close"), '{"ok":true}')
        assert answer.closed


def test_what_is_no_http_is_answered_with_400_and_the_end(server: Any) -> None:
    with Wire(server.url) as wire:
        wire.socket.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nbad name: x\r\n\r\n")
        head = b"Content-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n"
        said, _, reason = wire.file.read().partition(b"400 Bad Request\r\n" + head)
        assert said == b"HTTP/1.1 "
        assert reason == b"400 Bad Request" or (REAL_URL and reason.startswith(b"400 Bad Request: "))


@in_a_sandbox
@pytest.mark.parametrize(("count", "said"), [(199, ran()), (260, ran("", NO_SANDBOX_MADE, 128))])
def test_two_hundred_mounts_can_be_made_and_260_cannot_and_all_is_deleted(
    server: Any, names: dict[str, str], count: int, said: str
) -> None:
    paths = [f"{names['u']}/{number}" for number in range(count)]
    with Wire(server.url) as wire:
        for path in paths:
            assert wire.ask(post_file(path)).status.endswith("200 OK")
    check(ask(server, post_run(files=[*paths, names["u"]])), OK, JSON, said)
    check(ask(server, fill(A_GONE[0].replace(b"/a", b"/0"), names)), *A_GONE[1:])  # download_after_too_many_mounts
    check(ask(server, fill(FOLDER_GONE[0], names)), *FOLDER_GONE[1:])


@in_gvisor
def test_an_argument_may_have_three_megabytes(server: Any) -> None:
    """Elsewhere than in gVisor, the limit is Linux's: 128 KiB."""
    check(
        ask(server, post_run(["sh", "-c", 'printf %s "$1" | wc -c', "sh", "x" * 3_000_000])),
        OK,
        JSON,
        ran("3000000\\n"),
    )


@in_a_sandbox
@pytest.mark.parametrize("text", ["", "typed in\n", "'" * 64 * 1024])
def test_an_argument_can_become_standard_input_by_way_of_the_shell(server: Any, text: str) -> None:
    script = 'exec 3>&2 2>/dev/null; printf %s "$1" | { shift; exec "$@" 2>&3 3>&-; }'
    cmd = ["/bin/sh", "-c", script, "sh", text, *python("import sys; print(len(sys.stdin.read())); sys.exit('no')")]
    check(ask(server, post_run(cmd)), OK, JSON, ran(rf"{len(text)}\n", r"no\n", 1))


@in_a_sandbox
def test_the_shell_can_list_the_outputs_whatever_their_names(server: Any) -> None:
    code = (
        "import os; os.makedirs('/output/a'); os.symlink('/etc', '/output/link'); os.mkfifo('/output/fifo');"
        "[open(b'/output/' + name, 'w') for name in (b'a/b', b'new\\nline', b'\\xff')]; os.kill(os.getpid(), 9)"
    )
    script = (
        'exec 3>&2 2>/dev/null; (exec "$@" 2>&3 3>&-); c=$?;'
        "cd /output && command -v find >&2 && find . -type f ! -name LIST -print0 >LIST; exit $c"
    )
    answer = ask(server, post_run(["/bin/sh", "-c", script, "sh", *python(code)], persist=True))
    check(answer, OK, JSON, ran(code=137))
    target = f"/files?path=output/{json.loads(answer.content)['exec_id']}/"
    names = ask(server, get(f"{target}LIST")).content.split(b"\0")
    assert sorted(names) == [b"", b"./a/b", b"./new\nline", b"./\xff"]
    for name in ("a/b", "new%0Aline", "%FF"):
        assert ask(server, get(target + name)).status.endswith(OK)
    for name in ("link", "link/passwd", "fifo"):
        assert ask(server, get(target + name)).status.endswith(MISSING)


@in_a_sandbox
def test_without_persist_outputs_are_dropped(server: Any) -> None:
    answer = ask(server, post_run(["touch", "/output/x"]))
    check(answer, OK, JSON, ran())
    target = f"/files?path=output/{json.loads(answer.content)['exec_id']}"
    for path in (target, f"{target}/x"):
        assert ask(server, get(path)).status.endswith(MISSING)


@in_a_sandbox
def test_sixteen_runs_go_on_at_once(server: Any) -> None:
    answers: list[Answer] = []
    request = post_run(python("print(6 * 7)"))
    threads = [threading.Thread(target=lambda: answers.append(ask(server, request))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for answer in answers:
        check(answer, OK, JSON, ran(r"42\n"))


@in_a_sandbox
@of_the_stand_in
def test_a_run_is_killed_when_its_client_goes_away(server: StandIn) -> None:
    killed = server.runs_killed
    with Wire(server.url) as wire:
        wire.socket.sendall(post_run(["sleep", "60"]).replace(b"HOST", wire.host.encode()))
        assert server.wait_for(lambda: server.runs_live)
    assert server.wait_for(lambda: server.runs_killed == killed + 1 and not server.runs_live)


@in_a_sandbox
@of_the_stand_in
def test_a_lost_output_is_a_500_after_which_the_files_are_still_there(names: dict[str, str]) -> None:
    with StandIn(sandbox=SANDBOX, race=1.0) as server:
        ask(server, fill(post_file("<u>"), names))
        with Wire(server.url) as wire:
            answer = wire.ask(fill(post_run(files=["<u>"]), names))
        check(answer, FAILED, JSON, '{"error":"read std<any>: read |0: file already closed"}')
        assert ask(server, fill(get("/files?path=<u>"), names)).status.endswith("200 OK")


@in_a_sandbox
@of_the_stand_in
def test_a_third_of_runs_may_lose_their_output_and_leave_their_files() -> None:
    lost = []
    with StandIn(sandbox=SANDBOX, race=1 / 3) as server:
        for number in range(30):
            ask(server, post_file(f"{number}/a"))
            with Wire(server.url) as wire:
                if wire.ask(post_run(["false"], files=[f"{number}/a", f"{number}"])).status.endswith(FAILED):
                    lost.append(number)
        assert server.store.uploads() == sorted(path for number in lost for path in (f"{number}/", f"{number}/a"))
        assert server.runs_lost == len(lost) and 5 <= len(lost) <= 15


@in_a_sandbox
@of_the_stand_in
def test_the_store_can_be_looked_into() -> None:
    with StandIn(sandbox=SANDBOX) as server:
        assert (server.store.uploads(), server.store.outputs()) == ([], [])
        for path in ("w/a", "w/b/c"):
            ask(server, post_file(path))
        cmd = ["sh", "-c", "mkdir /output/d; touch /output/d/e"]
        exec_id = json.loads(ask(server, post_run(cmd, persist=True)).content)["exec_id"]
        assert server.store.uploads() == ["w/", "w/a", "w/b/", "w/b/c"]
        assert server.store.outputs() == [f"{exec_id}/", f"{exec_id}/d/", f"{exec_id}/d/e"]


@of_the_stand_in
def test_a_large_file_passes_through_the_stand_in_without_being_in_memory(large_store: StandIn) -> None:
    piece, size = b"x" * MIB, 256 * MIB
    head, _, ending = post_file("large", b"CONTENT").partition(b"CONTENT")
    head = re.sub(rb"(?<=Content-Length: )\d+", lambda match: b"%d" % (int(match[0]) - 7 + size), head)
    with Wire(large_store.url) as wire:
        tracemalloc.start()
        try:
            wire.socket.sendall(head.replace(b"HOST", wire.host.encode()))
            for _ in range(size // MIB):
                wire.socket.sendall(piece)
            check(wire.ask(ending), OK, JSON, '{"path":"large"}')
            wire.socket.sendall(get("/files?path=large").replace(b"HOST", wire.host.encode()))
            assert b"Content-Length: %d\r\n" % size in list(iter(wire.file.readline, b"\r\n"))
            received = array.array("B", bytes(MIB))
            for _ in range(size // MIB):
                assert wire.file.readinto(received) == MIB and received[-1] == ord("x")
            assert tracemalloc.get_traced_memory()[1] < 6 * MIB
        finally:
            tracemalloc.stop()


@of_the_stand_in
@pytest.mark.parametrize("field", ["Host: example.org", "Host: 127.0.0.1\r\nOrigin: http://localhost"])
def test_the_stand_in_refuses_what_a_browser_was_made_to_send(server: StandIn, field: str) -> None:
    assert ask(server, get("/healthz").replace(b"Host: HOST", field.encode())).status.endswith("403 Forbidden")


@of_the_stand_in
def test_the_stand_in_runs_nothing_without_a_sandbox() -> None:
    with StandIn(sandbox=NoSandbox()) as server:
        check(ask(server, post_run()), FAILED, JSON, failed("start runsc: no sandbox on this machine"))


@of_the_stand_in
def test_the_stand_in_leaves_nothing_behind() -> None:
    before = threading.active_count()
    with StandIn(sandbox=NoSandbox()) as server, Wire(server.url) as wire:
        wire.ask(get("/healthz"))
    assert threading.active_count() == before and not os.path.exists(server.folder)


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------

BAD_LIMITS = [
    *[(name, value, "number from 0 to 2**63 - 1, not") for name in LIMITS for value in (-1, -2.0, 2**63, 1e300)],
    *[
        (name, v, "number from 0 to 2**63 - 1, not")
        for name in LIMITS
        for v in (math.nan, math.inf, -math.inf, "1", True, [1], 1j)
    ],
    *[(name, 1.5, "must be a whole number") for name in LIMITS if name != "cpu_cores"],
]


@pytest.mark.parametrize(("name", "value", "text"), BAD_LIMITS)
def test_a_limit_that_cannot_be_right_is_refused_when_made_and_when_sent(
    client_of: Clients, name: str, value: Any, text: str
) -> None:
    limits = ResourceLimits()
    setattr(limits, name, value)
    with Peer([]) as peer:
        client = client_of(peer.url)
        for refuser in (
            lambda: ResourceLimits(**{name: value}),
            limits.to_dict,
            lambda: client.run("i", ["c"], limits=limits),
            lambda: client.run("i", ["c"], limits={name: value}),
        ):
            with pytest.raises(BoxerValidationError) as caught:
                refuser()
            assert str(caught.value).startswith(f"{name} must ") and text in str(caught.value)


def test_limits_can_be_changed_until_they_are_sent(client_of: Clients) -> None:
    limits = ResourceLimits(0.5, 128)
    assert limits == ResourceLimits(memory_mb=128, cpu_cores=0.5)
    assert limits.to_dict() == {"cpu_cores": 0.5, "memory_mb": 128}
    limits.memory_mb = 256
    with Peer.answering(RAN) as peer:
        client_of(peer.url).run("i", ["c"], limits=limits)
    assert peer.request.json["limits"] == {"cpu_cores": 0.5, "memory_mb": 256}


def test_a_run_request_is_a_value_that_hides_what_env_says() -> None:
    request = RunRequest("i", ["c"], env={"TOKEN": "s3cret", "B": ""}, limits={"nofile": 5}, files=["a"])
    assert request == RunRequest("i", ("c",), ["TOKEN=s3cret", "B="], None, ResourceLimits(nofile=5), ["a"])
    assert "s3cret" not in repr(request) and "env=['TOKEN', 'B']" in repr(request) and "image='i'" in repr(request)
    assert pickle.loads(pickle.dumps(request)) == copy.deepcopy(request) == request
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.image = "j"  # type: ignore[misc]


def test_a_run_request_is_done_by_its_parameters(client_of: Clients) -> None:
    given: dict[str, Any] = {
        "env": {"A": "1"}, "cwd": "/w", "limits": {"nofile": 5}, "files": ["a"], "persist": True, "network": "none"
    }  # fmt: skip
    with Peer.answering(RAN, RAN, RAN, RAN) as peer:
        client = client_of(peer.url)
        for parameters in ({}, given):
            client.run("i", ["c"], **parameters)
            client.run(**vars(RunRequest("i", ["c"], **parameters)))
    bodies = [json.loads(request.body) for request in peer.requests[0]]
    assert bodies[0] == bodies[1] == {"image": "i", "cmd": ["c"]}
    assert bodies[2] == bodies[3] == {**bodies[0], **given, "env": ["A=1"]}


def test_a_result_is_a_mutable_dataclass() -> None:
    result = RunResult("boxer-1", 0, "out", "err", 7)
    assert result == RunResult(exec_id="boxer-1", exit_code=0, stdout="out", stderr="err", wall_ms=7)
    assert dataclasses.is_dataclass(result) and result.ok and result.check() is result
    assert result.output_path("sub/x.json") == "output/boxer-1/sub/x.json"
    result.exit_code = 2
    assert not result.ok and result != RunResult("boxer-1", 0, "out", "err", 7)
    assert pickle.loads(pickle.dumps(result)) == copy.deepcopy(result) == result
    with pytest.raises(BoxerValidationError, match="path is empty"):
        result.output_path("")


@pytest.mark.parametrize("name", RUN)
def test_a_result_of_wrong_types_cannot_be_made(name: str) -> None:
    wanted = type(RUN[name])
    others: tuple[Any, ...] = (5,) if wanted is str else ("5", True)
    for value in (None, b"x", 1.0, *others):
        with pytest.raises(TypeError, match=f"RunResult.{name} must be {wanted.__name__}, got {type(value).__name__}"):
            RunResult(**dict(RUN, **{name: value}))


class Text(str):
    """A kind of str, as every str of an enumeration is."""

    __slots__ = ()


def test_a_result_may_hold_any_kind_of_text() -> None:
    assert RunResult(Text("boxer-1"), 0, Text(""), Text(""), 1).exec_id == "boxer-1"


WHOLE = [name for name in LIMITS if name != "cpu_cores"]


class Whole:
    """A whole number that is no int, as those of numpy are."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


def test_a_whole_number_may_be_of_any_type_that_is_one(client_of: Clients) -> None:
    given = {name: Whole(40 + number) for number, name in enumerate(WHOLE)}
    plain = {name: 40 + number for number, name in enumerate(WHOLE)}
    limits = ResourceLimits(**given)  # type: ignore[arg-type]
    assert json.dumps(limits.to_dict()) == json.dumps(plain)
    with Host(lambda _: [RAN]) as host:
        client = client_of(host.url, retries=Whole(1), max_connections=Whole(2))
        calls = [
            run(limits=one, retries=Whole(0)) for one in (limits, given, RunRequest("i", ["c"], limits=limits).limits)
        ]
        assert gather(client, calls) == [RESULT] * 3
    assert [json.dumps(request.json["limits"]) for request in host.seen] == [json.dumps(plain)] * 3
    assert host.connections <= 2


ODD_LIMITS: list[tuple[str, Any]] = [
    *[(name, decimal.Decimal(1)) for name in LIMITS],
    *[(name, value) for name in WHOLE for value in (fractions.Fraction(1, 2), Whole(-1), Whole(2**63))],
    *[("cpu_cores", fractions.Fraction(value)) for value in (-1, 10**400)],
]


@pytest.mark.parametrize(("name", "value"), ODD_LIMITS)
def test_a_limit_of_an_odd_type_is_refused_as_any_other(client_of: Clients, name: str, value: Any) -> None:
    with Peer([]) as peer:
        client = client_of(peer.url)
        for refuser in (lambda: ResourceLimits(**{name: value}), lambda: do(client, run(limits={name: value}))):
            with pytest.raises(BoxerValidationError, match=f"^{name} must "):
                refuser()


@pytest.mark.parametrize(("of_client", "of_call", "tries"), [(Whole(1), None, 2), (0, Whole(2), 3), (2, Whole(0), 1)])
def test_retries_may_be_a_whole_number_of_any_type(
    client_of: Clients, clock: Clock, of_client: Any, of_call: Any, tries: int
) -> None:
    with Host(lambda _: [failing(BROKEN)]) as host:
        assert is_expected(outcome(client_of(host.url, retries=of_client), run(retries=of_call)), refusal(500, "no"))
    assert len(host.seen) == tries


def test_seconds_and_cores_may_be_real_numbers_of_any_type(client_of: Clients) -> None:
    half, fifth, endless = fractions.Fraction(1, 2), fractions.Fraction(1, 5), fractions.Fraction(10**400)
    with Peer([[Do.REQUEST, RAN, Do.REQUEST]]) as peer:
        client = client_of(peer.url, timeout=endless)
        assert do(client, run(limits={"cpu_cores": half})) == RESULT
        assert is_expected(outcome(client, RUN_IT, timeout=fifth), (BoxerTimeoutError, 0, "0.2 s"))
    assert json.dumps(peer.requests[0][0].json["limits"]) == '{"cpu_cores": 0.5}'
    with Peer([[Do.REQUEST]]) as peer:
        assert is_expected(outcome(client_of(peer.url, timeout=fifth), RUN_IT), (BoxerTimeoutError, 0, "0.2 s"))


# Each row: what is given to a RunRequest, and the same in another spelling.
SAME_REQUESTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"env": {"A": "1", "B": ""}}, {"env": ["A=1", "B="]}),
    ({"limits": {"nofile": 5, "memory_mb": 64}}, {"limits": ResourceLimits(memory_mb=64, nofile=5)}),
    ({"limits": ResourceLimits(0.5)}, {"limits": ResourceLimits(cpu_cores=0.5)}),
    ({"limits": {"memory_mb": 64}}, {"limits": {"memory_mb": 64.0}}),
    ({"files": ["a", "b"], "cwd": "/w", "persist": True}, {"files": ("a", "b"), "cwd": "/w", "persist": True}),
]


@pytest.mark.parametrize(("given", "same"), SAME_REQUESTS)
def test_equal_run_requests_are_one_key(given: dict[str, Any], same: dict[str, Any]) -> None:
    one, two = RunRequest("i", ["c", "x"], **given), RunRequest("i", ("c", "x"), **same)
    assert one == two and hash(one) == hash(two)
    assert {one: "known"}[two] == "known" and {one, two, copy.deepcopy(one), pickle.loads(pickle.dumps(one))} == {one}
    assert RunRequest("i", ["c"], limits={"nofile": 6}) not in {one, two}


def test_a_run_request_stays_as_it_is_whatever_becomes_of_the_limits_it_was_made_from() -> None:
    limits = ResourceLimits(nofile=5)
    request = RunRequest("i", ["c"], limits=limits)
    known = {request}
    limits.nofile = 6
    assert request in known and request == RunRequest("i", ["c"], limits={"nofile": 5})


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("text", ["a", "\x1b", "é\n", "😀"], ids=ascii)
def test_the_repr_of_a_result_is_short_however_much_a_program_wrote(stream: str, text: str) -> None:
    streams = {"stdout": "out", "stderr": "err", stream: text * (10 * MIB // len(text))}
    result = RunResult("boxer-1", 3, streams["stdout"], streams["stderr"], 7)
    shown = repr(result)
    assert len(shown) < 5_000 and shown.isprintable() and repr([result] * 2).count("boxer-1") == 2
    assert shown.startswith("RunResult(exec_id='boxer-1', exit_code=3, stdout='") and shown.endswith("wall_ms=7)")
    assert f"{stream}={repr(text * 8)[:-1]}" in shown


def test_the_repr_of_a_result_shows_all_of_what_is_short() -> None:
    assert repr(RESULT) == "RunResult(exec_id='boxer-1', exit_code=0, stdout='hi\\n', stderr='', wall_ms=7)"


@pytest.mark.parametrize("path", ["x", "sub/x.json", "a..b/.c", "output/x"])
def test_an_output_has_one_path_whether_it_is_named_as_the_program_does_or_from_there(path: str) -> None:
    assert RESULT.output_path(f"/output/{path}") == RESULT.output_path(path) == f"output/boxer-1/{path}"


UPWARDS = ["..", ".", "../a", "a/..", "a/../b", "./a", "a/./b", "a/.", "/../a", "a/b/../../../c"]


@pytest.mark.parametrize("path", [*UPWARDS, "/output/..", "/output/../../other", "/output/./x", "/output/", "x\0y"])
def test_an_output_is_below_the_folder_of_its_run(path: str) -> None:
    with pytest.raises(BoxerValidationError):
        RESULT.output_path(path)


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


def test_the_errors_are_a_tree() -> None:
    tree = {
        BoxerError: (Exception,),
        BoxerValidationError: (BoxerError, ValueError),
        BoxerConnectionError: (BoxerError, ConnectionError),
        BoxerExitError: (BoxerError,),
        BoxerAPIError: (BoxerError,),
        BoxerTimeoutError: (BoxerAPIError,),
        BoxerOutputLimitError: (BoxerAPIError,),
    }
    for error, bases in tree.items():
        assert error.__bases__ == bases
    assert not issubclass(BoxerTimeoutError, (TimeoutError, OSError))


def errors_of_every_kind() -> list[BoxerError]:
    raised = BoxerConnectionError("h:1: lost")
    raised.__cause__ = ConnectionResetError(104, "reset")
    return [
        BoxerError("a"),
        BoxerValidationError("a sentence"),
        raised,
        BoxerConnectionError("h:1: no connection", request_sent=False),
        BoxerExitError(RunResult("boxer-1", 3, "out", "line\nlast", 7)),
        BoxerAPIError("é", 404),
        BoxerAPIError(message="", status_code=500),
        BoxerTimeoutError("late", 0),
        BoxerOutputLimitError("too much", 507),
    ]


@pytest.mark.parametrize("error", errors_of_every_kind(), ids=repr)
def test_every_error_pickles_and_copies(error: BoxerError) -> None:
    error.__dict__["__notes__"] = ["of the caller's"]  # as add_note() of newer Pythons does
    pickled = [pickle.loads(pickle.dumps(error, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for again in [*pickled, copy.copy(error), copy.deepcopy(error)]:
        assert type(again) is type(error) and again is not error
        assert (str(again), vars(again), again.args) == (str(error), vars(error), error.args)


@pytest.mark.parametrize(
    ("stderr", "text"),
    [
        ("", "exit code 3"),
        (" \n", "exit code 3"),
        ("ValueError: no\x1b[31m\n\n", "exit code 3: ValueError: no"),
    ],
)
def test_a_checked_run_that_failed_raises_its_result(client_of: Clients, stderr: str, text: str) -> None:
    failed = {**RUN, "exit_code": 3, "stdout": "", "stderr": stderr}
    with Peer.answering(RAN, answer(failed)) as peer:
        client = client_of(peer.url)
        assert client.run("i", ["c"], check=True).ok
        with pytest.raises(BoxerExitError) as caught:
            client.run("i", ["c"], check=True)
    assert (caught.value.result, str(caught.value)) == (RunResult(**failed), text)  # type: ignore[arg-type]


STATUSES = {408: BoxerTimeoutError, 507: BoxerOutputLimitError}


@pytest.mark.parametrize("status", [300, 302, 400, 401, 404, 408, 409, 413, 429, 500, 502, 503, 504, 507, 599, 999])
def test_a_status_decides_the_class_of_the_error(client_of: Clients, status: int) -> None:
    with Peer.answering(*[answer({"error": "because"}, f"{status} Reason")] * 4) as peer:
        client = client_of(peer.url, retries=0)
        for method, args in EVERY_METHOD:
            with pytest.raises(BoxerAPIError, match=r"^because") as caught:
                getattr(client, method)(*args)
            assert type(caught.value) is STATUSES.get(status, BoxerAPIError)
            assert caught.value.status_code == status


NODE = """/code/main.js:1
function f() { null.x } f()
                    ^

TypeError: Cannot read properties of null (reading 'x')
    at f (/code/main.js:1:21)
    at Object.<anonymous> (/code/main.js:1:25)
    at Module._compile (node:internal/modules/cjs/loader:1521:14)
    at Module._extensions..js (node:internal/modules/cjs/loader:1623:10)
    at Module.load (node:internal/modules/cjs/loader:1266:32)
    at Module._load (node:internal/modules/cjs/loader:1091:12)
    at Function.executeUserEntryPoint [as runMain] (node:internal/modules/run_main:164:12)
    at node:internal/main/run_main_module:28:49

Node.js v20.20.2
"""
NODE_EVAL = """node:fs:573
  return binding.open(
                 ^

Error: ENOENT: no such file or directory, open '/none'
    at Object.openSync (node:fs:573:18)
    at Object.readFileSync (node:fs:452:35)
    at [eval]:1:15
    at runScriptInThisContext (node:internal/vm:209:10)
    at node:internal/process/execution:118:14
    at [eval]-wrapper:6:24
    at runScript (node:internal/process/execution:101:62)
    at evalScript (node:internal/process/execution:133:3)
    at node:internal/main/eval_string:51:3 {
  errno: -2,
  code: 'ENOENT',
  syscall: 'open',
  path: '/none'
}

Node.js v20.20.2
"""
GROUP = """  + Exception Group Traceback (most recent call last):
  |   File "<string>", line 1, in <module>
  | ExceptionGroup: several (2 sub-exceptions)
  +-+---------------- 1 ----------------
    | ValueError: first
    +---------------- 2 ----------------
    | TypeError: second
    +------------------------------------
"""
TASK_GROUP = """  + Exception Group Traceback (most recent call last):
  |   File "/code/main.py", line 8, in <module>
  |     asyncio.run(main())
  |   File "/usr/local/lib/python3.12/asyncio/runners.py", line 194, in run
  |     return runner.run(main)
  |            ^^^^^^^^^^^^^^^^
  |   File "/usr/local/lib/python3.12/asyncio/base_events.py", line 684, in run_until_complete
  |     return future.result()
  |            ^^^^^^^^^^^^^^^
  |   File "/usr/local/lib/python3.12/asyncio/taskgroups.py", line 145, in __aexit__
  |     raise me from None
  | ExceptionGroup: unhandled errors in a TaskGroup (2 sub-exceptions)
  +-+---------------- 1 ----------------
    | Traceback (most recent call last):
    |   File "/code/main.py", line 3, in fail
    |     raise error
    | ValueError: first
    +---------------- 2 ----------------
    | Traceback (most recent call last):
    |   File "/code/main.py", line 3, in fail
    |     raise error
    | TypeError: second
    +------------------------------------
"""
PYTHON_TRACE = """Traceback (most recent call last):
  File "/main.py", line 5, in <module>
    raise ValueError("no luck")
ValueError: no luck
"""
JAVA = 'Exception in thread "main" java.lang.IllegalStateException: no luck\n' + "".join(
    f"\tat org.example.service.Handler.step{n}(Handler.java:{n})\n" for n in range(20)
)
GO = """panic: no luck

goroutine 1 [running]:
main.main()
\t/src/main.go:4 +0x2c
exit status 2
"""
RUST = """thread 'main' panicked at src/main.rs:2:5:
no luck
note: run with `RUST_BACKTRACE=1` environment variable to display a backtrace
"""
RUBY = "/x.rb:1:in 'f': no luck (RuntimeError)\n" + "".join(f"\tfrom /x.rb:{n}:in 'f'\n" for n in range(20))
GO_DEEP = GO.replace("main.main()", "".join(f"main.f{n}(...)\n\t/src/main.go:{n} +0x1d\n" for n in range(20)))
PHP = "PHP Fatal error:  Uncaught Exception: no luck in /x.php:3\nStack trace:\n"
PHP += "".join(f"#{n} /x.php({n}): f()\n" for n in range(20)) + "  thrown in /x.php on line 3\n"
DOTNET = "Unhandled exception. System.Exception: no luck\n"
DOTNET += "".join(f"   at P.F(String[] a) in /x/P.cs:line {n}\n" for n in range(20))
PYTEST = "".join(f"test_{n}.py ..\n" for n in range(500)) + (
    "=== short test summary info ===\nFAILED test_a.py::test_one - assert 1 == 2\n"
    "=== 1 failed, 999 passed in 0.12s ===\n"
)
# Each row: stdout, stderr, and what the error has to tell.
FAILURES: dict[str, tuple[str, str, list[str]]] = {
    "Python": ("fine so far\n", PYTHON_TRACE, ["ValueError: no luck"]),
    "Node": ("", NODE, ["TypeError: Cannot read properties of null (reading 'x')"]),
    "Node, evaluating": ("", NODE_EVAL, ["ENOENT: no such file or directory, open '/none'"]),
    "an exception group": ("", GROUP, ["several", "ValueError: first", "TypeError: second"]),
    "a task group": ("", TASK_GROUP, ["TypeError: second"]),
    "Java": ("", JAVA, ["IllegalStateException: no luck"]),
    "Go": ("", GO, ["panic: no luck"]),
    "Go, deep down": ("", GO_DEEP, ["panic: no luck", "exit status 2"]),
    "Ruby": ("", RUBY, ["no luck (RuntimeError)"]),
    "PHP": ("", PHP, ["Uncaught Exception: no luck"]),
    ".NET": ("", DOTNET, ["System.Exception: no luck"]),
    "Rust": ("", RUST, ["no luck"]),
    "a shell": ("", "sh: 1: nosuch: not found\n", ["sh: 1: nosuch: not found"]),
    "a test runner": (PYTEST, "", ["FAILED test_a.py::test_one - assert 1 == 2", "1 failed, 999 passed"]),
    "a test runner with an empty line": (PYTEST, " \n\n", ["FAILED test_a.py::test_one", "1 failed, 999 passed"]),
    "one that says nothing visible": (PYTEST, "\x1b[0m\n", ["1 failed, 999 passed"]),
    "one long line": ("", "x" * 10 * MIB, ["xxx"]),
    "a long link": ("", f"{'x' * 480}\x1b]8;;http://evil.test/{'y' * 600}\x1b\\\nno luck\n", ["xxx", "no luck"]),
    "many lines": ("", "".join(f"line {n}\n" for n in range(1_000_000)), ["line 999999"]),
}


def test_the_repr_of_a_result_with_many_outputs_is_short() -> None:
    result = RunResult("boxer-1", 0, "", "", 7, {f"{number}.txt": b"x" for number in range(10_000)})
    assert "'0.txt': 1 bytes" in repr(result) and "10,000 files" in repr(result) and len(repr(result)) < 1000


@pytest.mark.parametrize("name", FAILURES)
def test_the_error_of_an_exit_code_shows_what_the_program_said_of_it(name: str) -> None:
    stdout, stderr, told = FAILURES[name]
    with pytest.raises(BoxerExitError) as caught:
        RunResult("boxer-1", 3, stdout, stderr, 7).check()
    shown = str(caught.value)
    assert shown.startswith("exit code 3: ") and len(shown) < 1_100
    assert [text for text in told if text not in shown] == []
    assert re.sub("[\n\t]", "", shown).isprintable()


def test_a_checked_run_of_a_test_runner_shows_the_end_of_its_stdout(client_of: Clients) -> None:
    with Peer.answering(answer({**RUN, "exit_code": 1, "stdout": PYTEST})) as peer:
        error = outcome(client_of(peer.url), run(check=True))
    assert is_expected(error, (BoxerExitError, None, "1 failed, 999 passed"))
    assert str(error).startswith("exit code 1: ") and len(str(error)) < 1_100


ESCAPES = {
    "a colour": "\x1b[31m", "bright": "\x1b[1;91m", "true colour": "\x1b[38;2;1;2;3m", "with colons": "\x1b[38:5:1m",
    "a mode": "\x1b[?25l", "an erased line": "\x1b[2K", "with an intermediate": "\x1b[1 q",
}  # fmt: skip


@pytest.mark.parametrize("name", ESCAPES)
def test_terminal_escapes_are_removed_whole(client_of: Clients, name: str) -> None:
    said = f"{ESCAPES[name]}no{ESCAPES[name]} luck{ESCAPES[name]}"
    failed = answer({**RUN, "exit_code": 3, "stderr": f"{said}\n"})
    of_stdout = answer({**RUN, "exit_code": 3, "stdout": f"{said}\n"})
    with Peer.answering(failed, of_stdout, failing("400 Bad Request", said)) as peer:
        client = client_of(peer.url)
        assert [str(outcome(client, run(check=True))) for _ in range(2)] == ["exit code 3: no luck"] * 2
        assert str(outcome(client, RUN_IT)) == "no luck"


@pytest.mark.parametrize(
    "escape", ["\x1b", "\x1b[", "\x1b[1;", "\x1b]", "\x1b]0;", "\x1b]0;x\x1b", "\x1bP", "\x9b", "\x9d"], ids=ascii
)
def test_an_escape_without_an_end_hides_no_more_than_what_follows_it(escape: str) -> None:
    for much in (escape, escape * (MIB // len(escape))):
        result, start = RunResult("boxer-1", 3, "", f"no luck\n{much}", 7), time.process_time()
        with pytest.raises(BoxerExitError, match=r"^exit code 3") as caught:
            result.check()
        assert str(caught.value).replace("\n", "").isprintable() and len(str(caught.value)) < 1_100
        assert time.process_time() - start < 2
    with pytest.raises(BoxerExitError, match="no luck"):
        RunResult("boxer-1", 3, "", f"no luck\n{escape}", 7).check()


STATUS_ERRORS = [BoxerAPIError("because", 404), BoxerTimeoutError("late", 0), BoxerTimeoutError("late", 408)]
STATUS_ERRORS += [BoxerOutputLimitError("too much", 507), BoxerAPIError("", 500)]


@pytest.mark.parametrize("error", STATUS_ERRORS, ids=repr)
def test_the_repr_of_an_error_shows_its_status_code(error: BoxerAPIError) -> None:
    assert repr(error).startswith(f"{type(error).__name__}(") and repr(str(error)) in repr(error)
    assert re.search(rf"\b{error.status_code}\b", repr(error))
    assert repr(pickle.loads(pickle.dumps(error))) == repr(copy.copy(error)) == repr(error)


# ---------------------------------------------------------------------------------------------------------------------
# Files: files and folders of this machine
# ---------------------------------------------------------------------------------------------------------------------

IN_ORDER_OF_PATHS = ["a/b/deep.txt", "a/x.txt", "a-b.txt", "a.txt", "é 1%.txt"]
FOLDERS: list[tuple[str, Callable[[Path], Any], dict[str, Any], str]] = [
    ("a path", lambda folder: folder, {}, "proj"),
    ("text", str, {}, "proj"),
    ("text with a slash", lambda folder: f"{folder}/", {}, "proj"),
    ("the current folder", lambda _: ".", {}, "proj"),
    ("a remote path", lambda folder: folder, {"remote_path": "x/y"}, "x/y"),
    ("a remote path with a slash", lambda folder: folder, {"remote_path": "x/"}, "x"),
    ("a link", lambda folder: folder.parent / "link", {}, "link"),
]


@pytest.mark.parametrize(("local", "given", "prefix"), [row[1:] for row in FOLDERS], ids=[row[0] for row in FOLDERS])
def test_a_folder_is_uploaded_whole_and_in_order(
    client_of: Clients, monkeypatch: pytest.MonkeyPatch, folder: Path, local: Any, given: dict[str, Any], prefix: str
) -> None:
    monkeypatch.chdir(folder)
    (folder.parent / "link").symlink_to("proj")
    with store() as server:
        client = client_of(server.url)
        assert client.upload_path(local(folder), **given) == [f"{prefix}/{name}" for name in IN_ORDER_OF_PATHS]
        for name in IN_ORDER_OF_PATHS:
            assert client.download_file(f"{prefix}/{name}") == (folder / name).read_bytes()


def test_a_file_is_uploaded_under_its_name_or_the_one_given(client_of: Clients, folder: Path) -> None:
    with store() as server:
        client = client_of(server.url)
        assert client.upload_path(folder / "a.txt") == ["a.txt"]
        assert client.upload_path(str(folder / "a.txt"), "x/é") == ["x/é"]
        assert client.download_file("a.txt") == client.download_file("x/é") == b"content of a.txt\r\n"


def test_an_empty_folder_is_no_files(client_of: Clients, tmp_path: Path) -> None:
    with Peer([]) as peer:
        assert client_of(peer.url).upload_path(tmp_path) == []


def test_links_to_files_of_a_folder_are_followed(client_of: Clients, folder: Path) -> None:
    (folder / "file").symlink_to("a/x.txt")
    (folder / "z").symlink_to(folder / "a" / "b" / "deep.txt")
    with store() as server:
        client = client_of(server.url)
        remote = client.upload_path(folder, "r")
        assert remote[4:] == ["r/file", "r/z", "r/é 1%.txt"]
        assert client.download_file("r/file") == b"content of a/x.txt\r\n"
        assert client.download_file("r/z") == b"content of a/b/deep.txt\r\n"


# Each row: its name, what makes a thing in the folder `a` that cannot be uploaded, and what the error says of it.
NO_UPLOADS: list[tuple[str, Callable[[Path], Any], str]] = [
    ("a link to a file outside", lambda path: path.symlink_to(__file__), "leaves the folder"),
    ("a link to a folder outside", lambda path: path.symlink_to("/etc"), "is a link to a folder; exclude it"),
    ("a link by way of ..", lambda path: path.symlink_to("../../other/file"), "leaves the folder"),
    ("a link to the folder's own start", lambda path: path.symlink_to("../../project/file"), "leaves the folder"),
    ("a link to a folder within", lambda path: path.symlink_to("../empty"), "is a link to a folder; exclude it"),
    ("a link to nothing", lambda path: path.symlink_to("missing"), "leads nowhere"),
    ("a link to itself", lambda path: path.symlink_to(path.name), "leads nowhere"),
    ("a link to its folder", lambda path: path.symlink_to("."), "is a link to a folder; exclude it"),
    ("a link to the top", lambda path: path.symlink_to(path.parent.parent), "is a link to a folder"),
    ("a pipe", os.mkfifo, "neither a file nor a folder"),
    ("a socket", lambda path: os.mknod(path, stat.S_IFSOCK), "neither a file nor a folder"),
    ("a link to a device", lambda path: path.symlink_to("/dev/null"), "leaves the folder"),
]


@pytest.mark.parametrize(("make", "text"), [row[1:] for row in NO_UPLOADS], ids=[row[0] for row in NO_UPLOADS])
def test_what_is_not_a_file_of_the_folder_is_refused_by_name(
    client_of: Clients, folder: Path, make: Callable[[Path], Any], text: str
) -> None:
    for outside in ("other", "project"):
        (folder.parent / outside).mkdir()
        (folder.parent / outside / "file").touch()
    make(folder / "a" / "odd")
    with Peer([]) as peer, pytest.raises(BoxerValidationError, match=text) as caught:
        client_of(peer.url).upload_path(folder)
    assert repr(str(folder / "a" / "odd")) in str(caught.value)


def test_a_loop_of_links_is_an_error_of_the_system_and_of_one_run_alone(client_of: Clients, tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    runs = [RunRequest("i", ["c"]), RunRequest("i", ["c"], files={"a": loop}), RunRequest("i", ["c"])]
    with Host(lambda _: [RAN]) as host:
        client = client_of(host.url)
        with pytest.raises(OSError, match=re.escape(str(loop))) as caught:
            client.upload_path(loop)
        assert caught.value.errno == errno.ELOOP and not isinstance(caught.value, BoxerError)
        with pytest.raises(BoxerValidationError, match="no ordinary file; nothing is written over it"):
            client.download_path("a", loop)
        outcomes = [outcome for _, outcome in iterate(client, runs)]
    assert [type(outcome) for outcome in outcomes] == [RunResult, BoxerError, RunResult] and loop.is_symlink()


def test_an_output_whose_folder_is_a_loop_of_links_is_an_error_with_the_result(
    client_of: Clients, tmp_path: Path
) -> None:
    (tmp_path / "sub").symlink_to("sub")
    with Host(Kept({"sub/a": b"content"})) as host, pytest.raises(BoxerError, match="sub/a") as caught:
        client_of(host.url).run("image", ["true"], output_dir=tmp_path)
    assert caught.value.result is not None and list(tmp_path.iterdir()) == [tmp_path / "sub"]


def test_a_name_s_control_characters_do_not_reach_a_terminal(client_of: Clients, folder: Path) -> None:
    (folder / "a\x1b]0;x\x07").symlink_to("missing")
    with pytest.raises(BoxerValidationError, match="leads nowhere") as caught:
        client_of("http://h").upload_path(folder)
    assert str(caught.value).isprintable()


def test_a_folder_may_be_deeper_than_a_function_can_call_itself(client_of: Clients, folder: Path) -> None:
    depth = sys.getrecursionlimit() + 100
    folders = [folder / "/".join("d" * (number + 1)) for number in range(depth)]
    for deep in folders:
        deep.mkdir()
    (folders[-1] / "file").write_bytes(b"")
    with Host(lambda _: [STORED]) as host:
        assert f"x/{'d/' * depth}file" in client_of(host.url).upload_path(folder, "x")
    (folders[-1] / "file").unlink()
    for deep in reversed(folders):  # pytest could not
        deep.rmdir()


def test_two_links_that_lead_to_each_other_are_refused(client_of: Clients, folder: Path) -> None:
    (folder / "a" / "one").symlink_to("../empty")
    (folder / "empty" / "two").symlink_to("../a")
    with Peer([]) as peer, pytest.raises(BoxerValidationError, match="is a link to a folder"):
        client_of(peer.url).upload_path(folder)


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="names of files are text here")
def test_a_name_that_is_not_text_is_refused_before_anything_is_sent(client_of: Clients, folder: Path) -> None:
    (folder / os.fsdecode(b"z\xff")).write_bytes(b"")
    with Peer([]) as peer, pytest.raises(BoxerValidationError, match="lone surrogate"):
        client_of(peer.url).upload_path(folder)


@pytest.mark.parametrize("local", ["/dev/null", "pipe", "socket", "link"])
def test_a_single_thing_that_is_no_file_is_refused(client_of: Clients, tmp_path: Path, local: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    os.mknod(tmp_path / "socket", stat.S_IFSOCK)
    (tmp_path / "link").symlink_to("pipe")
    with Peer([]) as peer, pytest.raises(BoxerValidationError, match="neither a file nor a folder"):
        client_of(peer.url).upload_path(tmp_path / local)


def test_a_file_that_may_not_be_read_is_an_error_of_the_system(client_of: Clients, folder: Path) -> None:
    (folder / "a.txt").chmod(0)
    if os.access(folder / "a.txt", os.R_OK):
        pytest.skip("this user may read everything")
    with store() as server:
        client = client_of(server.url)
        for path in (folder, folder / "a.txt"):
            with pytest.raises(PermissionError):
                client.upload_path(path)
        assert client.health()


def change_on_the_way(change: Callable[[], Any]) -> Callable[[Received], list[bytes]]:
    """Return what answers uploads, once it has changed something as the first of them came."""
    lock, changes = threading.Lock(), [change]

    def respond(request: Received) -> list[bytes]:
        with lock:
            while changes:
                changes.pop()()
        return [STORED if "POST" in request.line else WELL]

    return respond


def test_a_file_that_vanishes_before_its_turn_is_an_error_of_the_system(client_of: Clients, many: Path) -> None:
    with Frail(change_on_the_way((many / "39.txt").unlink)) as host:
        client = client_of(host.url)
        with pytest.raises(FileNotFoundError, match="39"):
            client.upload_path(many)
        assert client.health()
    assert not [request for request in host.seen if b"39.txt" in request.body]


def replaced(path: Path, make: Callable[[], Any]) -> Callable[[], None]:
    def change() -> None:
        path.unlink()
        make()

    return change


def test_a_file_that_becomes_a_link_on_the_way_is_not_followed_out_of_the_folder(
    client_of: Clients, many: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside, last = tmp_path_factory.mktemp("outside") / "secret", many / "39.txt"
    outside.write_text("s3cret")
    follow = change_on_the_way(replaced(last, lambda: last.symlink_to(outside)))
    with Frail(follow) as host, contextlib.suppress(BoxerValidationError, OSError):
        client_of(host.url).upload_path(many)
    assert not [request for request in host.seen if b"s3cret" in request.body]


def test_a_file_that_becomes_a_pipe_on_the_way_blocks_nothing(client_of: Clients, many: Path) -> None:
    last, stuck = many / "39.txt", threading.Event()

    def free() -> None:  # a writer lets the reader go on, which only has to if it is stuck
        end = time.monotonic() + 5
        while not is_over.wait(0.05) and time.monotonic() < end:
            pass
        if not is_over.is_set():
            stuck.set()
            os.close(os.open(last, os.O_RDWR))

    is_over, thread = threading.Event(), threading.Thread(target=free)
    with Frail(change_on_the_way(replaced(last, lambda: os.mkfifo(last)))) as host:
        thread.start()
        with contextlib.suppress(BoxerError, OSError):
            client_of(host.url).upload_path(many)
        is_over.set()
        thread.join()
    assert not stuck.is_set()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder as people have them: with what no sandbox needs, and what no upload takes."""
    root = tmp_path / "proj"
    for name in (
        ".git/config", ".git/objects/aa/bb", "app/__pycache__/main.cpython-312.pyc", "app/main.py", "app/old.pyc",
        "app/data/x.csv", "data/keep.txt", "data/sub/deep.txt", "data/x.csv", "main.py", "proj/main.py", "[x].txt",
    ):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


EVERYTHING = [
    ".git/config", ".git/objects/aa/bb", "[x].txt", "app/__pycache__/main.cpython-312.pyc", "app/data/x.csv",
    "app/main.py", "app/old.pyc", "data/keep.txt", "data/sub/deep.txt", "data/x.csv", "main.py", "proj/main.py",
]  # fmt: skip
# Each row: what is excluded, and what of everything then is not sent.
EXCLUDED: list[tuple[Any, list[str]]] = [
    ((), []),
    ([], []),
    ([".git"], [".git/config", ".git/objects/aa/bb"]),
    ((".git", "*.pyc"), [".git/config", ".git/objects/aa/bb", "app/__pycache__/main.cpython-312.pyc", "app/old.pyc"]),
    (["__pycache__"], ["app/__pycache__/main.cpython-312.pyc"]),
    (["app/__pycache__"], ["app/__pycache__/main.cpython-312.pyc"]),
    (["data/*.csv"], ["data/x.csv"]),
    (["*.csv"], ["app/data/x.csv", "data/x.csv"]),
    (["data"], ["app/data/x.csv", "data/keep.txt", "data/sub/deep.txt", "data/x.csv"]),
    (["data/sub"], ["data/sub/deep.txt"]),
    (["sub"], ["data/sub/deep.txt"]),
    (["main.py"], ["app/main.py", "main.py", "proj/main.py"]),
    (["app/main.py"], ["app/main.py"]),
    (["proj/main.py"], ["proj/main.py"]),
    (["app/*.p[xy]"], ["app/main.py"]),
    (["?ain.py"], ["app/main.py", "main.py", "proj/main.py"]),
    (["[[]x].txt"], ["[x].txt"]),
    (["*.PYC", "Data", "mai", "ata/x.csv"], []),
    (["*"], EVERYTHING),
]


@pytest.mark.parametrize(("exclude", "left_out"), EXCLUDED, ids=str)
def test_what_is_excluded_is_not_sent(client_of: Clients, project: Path, exclude: Any, left_out: list[str]) -> None:
    expected = [f"x/{name}" for name in EVERYTHING if name not in left_out]
    with store() as server:
        assert client_of(server.url).upload_path(project, "x", exclude=exclude) == expected
        assert len(server.requests) == len(expected)


@pytest.mark.parametrize("pattern", ["./.env", "/.env", "**/.env", "sub/../.env", "a//b", "", ".", "..", "/", "**"])
def test_a_pattern_that_would_leave_nothing_out_is_refused(client_of: Clients, project: Path, pattern: str) -> None:
    with Peer([]) as peer, pytest.raises(BoxerValidationError, match=r"^exclude has .* a pattern is a name"):
        client_of(peer.url).upload_path(project, exclude=[".git", pattern])


def test_what_is_excluded_may_be_given_one_by_one(client_of: Clients, project: Path) -> None:
    with store() as server:
        remote = client_of(server.url).upload_path(project, exclude=(name for name in (".git", "app", "data", "[[]*")))
    assert remote == ["proj/main.py", "proj/proj/main.py"]


def test_a_folder_s_own_name_excludes_nothing(client_of: Clients, tmp_path: Path) -> None:
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "a.txt").write_bytes(b"")
    with store() as server:
        assert client_of(server.url).upload_path(tmp_path / "build", exclude=["build"]) == ["build/a.txt"]


@pytest.mark.parametrize(("make", "name"), [
    (lambda path: path.symlink_to("user@host.4711:1700000000"), ".#main.py"),
    (lambda path: path.symlink_to("/etc"), ".venv"),
    (lambda path: path.symlink_to("."), "app/self"),
    (lambda path: path.symlink_to("data"), "latest"),
    (lambda path: path.symlink_to(__file__), "app/outside"),
    (os.mkfifo, "pipe"),
], ids=["a lock", "a folder outside", "its own folder", "a folder within", "a file outside", "a pipe"])  # fmt: skip
def test_what_cannot_be_uploaded_stops_nothing_if_it_is_excluded(
    client_of: Clients, project: Path, make: Callable[[Path], Any], name: str
) -> None:
    make(project / name)
    with store() as server:
        client = client_of(server.url)
        assert client.upload_path(project, "x", exclude=[name]) == [f"x/{one}" for one in EVERYTHING]
        assert len(client.upload_path(project, "x", exclude=[name.rpartition("/")[2]])) == len(EVERYTHING)
        before = len(server.requests)
        with pytest.raises(BoxerValidationError, match=re.escape(name)):
            client.upload_path(project, "x", exclude=["*.pyc"])
        assert len(server.requests) == before


def test_an_excluded_folder_is_not_looked_into(client_of: Clients, project: Path) -> None:
    (project / ".venv" / "bin").mkdir(parents=True)
    (project / ".venv" / "bin" / "python").symlink_to("/usr/bin/python3")
    os.mkfifo(project / ".venv" / "pipe")
    (project / "secret").mkdir(mode=0)
    with store() as server:
        remote = client_of(server.url).upload_path(project, "x", exclude=[".venv", "secret"])
    assert remote == [f"x/{name}" for name in EVERYTHING]


# ---------------------------------------------------------------------------------------------------------------------
# Requests: what is sent, and what is refused before anything is sent
# ---------------------------------------------------------------------------------------------------------------------

ODD_PATH = "output/a b+%41&x=1#?é世\"'\\\r\n.txt"
ODD_TARGET = "/files?path=output/a%20b%2B%2541%26x%3D1%23%3F%C3%A9%E4%B8%96%22%27%5C%0D%0A.txt"
PERL = answer({**RUN, "exit_code": 3, "surprise": [1]})
# Each row: method, arguments, the server's answer, what is returned, the request line, the Content-Type.
CALLS: list[tuple[str, tuple[Any, ...], bytes, Any, str, str]] = [
    ("health", (), WELL, True, "GET /healthz", ""),
    ("run", ("perl", ["perl"]), PERL, RunResult("boxer-1", 3, "hi\n", "", 7), "POST /run", "application/json"),
    ("upload_file", ("a.txt", b"content"), STORED, None, "POST /files", "multipart/form-data; boundary="),
    ("upload_path", (__file__, "a.txt"), STORED, ["a.txt"], "POST /files", "multipart/form-data; boundary="),
    ("download_file", (ODD_PATH,), answer(b"\0\xff\r\n"), b"\0\xff\r\n", f"GET {ODD_TARGET}", ""),
    ("download_file", ("empty",), answer(b""), b"", "GET /files?path=empty", ""),
]


def test_every_method_sends_its_request_on_one_kept_connection_and_returns_its_type(client_of: Clients) -> None:
    with Peer.answering(*(row[2] for row in CALLS)) as peer:
        client = client_of(peer.url)
        for method, args, _, expected, _, _ in CALLS:
            result = getattr(client, method)(*args)
            assert result == expected and type(result) is type(expected)
    common = {"host": peer.authority, "user-agent": f"boxer-sdk/{boxer.__version__}", "accept-encoding": "identity"}
    for (*_, line, content_type), request in zip(CALLS, peer.requests[0]):
        fields, kind = dict(request.fields), request.fields.get("content-type", "")
        assert request.line == f"{line} HTTP/1.1"
        assert kind.startswith(content_type) and (fields.pop("content-type", None) is None) == (content_type == "")
        assert fields.pop("content-length", "0") == str(len(request.body))
        assert fields == common


class Word(str, enum.Enum):
    """Text that is not what it says of itself: "1", and "Word.ONE"."""

    ONE = "1"


# Each row: what is given to run(), and which members this adds to its JSON.
RUN_MEMBERS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    (dict.fromkeys(["env", "cwd", "limits", "files", "network"]), {}),
    ({"persist": False, "check": False, "timeout": 9, "retries": 1}, {}),
    ({"env": {}, "files": [], "cwd": "", "limits": {}}, {}),
    ({"env": [], "files": (), "limits": ResourceLimits()}, {}),
    ({"env": {"A": "1", "B": "", "C": "=\n"}}, {"env": ["A=1", "B=", "C==\n"]}),
    ({"env": ["A=1", "A=2"]}, {"env": ["A=1", "A=2"]}),
    ({"env": {"A": Word.ONE}, "files": [Word.ONE]}, {"env": ["A=1"], "files": ["1"]}),
    ({"env": dict.fromkeys(["A=1"]).keys()}, {"env": ["A=1"]}),
    ({"cwd": "/"}, {"cwd": "/"}),
    ({"cwd": "/work"}, {"cwd": "/work"}),
    ({"limits": LIMITS}, {"limits": LIMITS}),
    ({"limits": ResourceLimits(**LIMITS)}, {"limits": LIMITS}),  # type: ignore[arg-type]
    ({"limits": {"memory_mb": 64.0, "cpu_cores": 2.0}}, {"limits": {"cpu_cores": 2.0, "memory_mb": 64}}),
    ({"limits": {"memory_mb": None, "nofile": 0}}, {"limits": {"nofile": 0}}),
    ({"files": ["a.py", "b/c"]}, {"files": ["a.py", "b/c"]}),
    ({"persist": True}, {"persist": True}),
    ({"network": "none"}, {"network": "none"}),
    ({"network": "sandbox"}, {"network": "sandbox"}),
]


@pytest.mark.parametrize(("given", "sent"), RUN_MEMBERS, ids=str)
def test_a_run_sends_what_was_given_and_nothing_else(client_of: Clients, given: Any, sent: Any) -> None:
    with Peer.answering(RAN) as peer:
        client_of(peer.url).run("python", ["python3"], **given)
    # As text, since 64 == 64.0.
    assert json.dumps(peer.request.json) == json.dumps({"image": "python", "cmd": ["python3"], **sent})


def test_names_and_folders_may_be_members_of_an_enum_of_texts(client_of: Clients) -> None:
    with Host(lambda request: [STORED if "/files" in request.line else RAN]) as host:
        client_of(host.url).run("image", ["true"], files={Word.ONE: b""}, cwd=Word.ONE)
    sent = json.loads(host.seen[-1].content)
    assert sent["files"][0].endswith("/1") and sent["cwd"].endswith("/1")


def test_text_of_a_run_arrives_as_it_is(client_of: Clients) -> None:
    odd = ["p", "", " ", "\x01\x1f\x7f", "\"'\\/", "é世😀\u2028\ufeff", "<&>", "%41+", "a\r\nb: c"]
    with Peer.answering(RAN) as peer:
        client_of(peer.url).run("imagé", odd, env={"Ä": "ö"}, cwd="/ü", files=odd[2:], network="ß")
    expected = {"image": "imagé", "cmd": odd, "env": ["Ä=ö"], "cwd": "/ü", "files": odd[2:], "network": "ß"}
    assert peer.request.json == expected


def multipart(request: Received, path: str, content: bytes) -> bytes:
    """Return the body that an upload has to have, byte for byte."""
    kind = re.fullmatch("multipart/form-data; boundary=([0-9a-f]{32})", request.fields["content-type"])
    assert kind
    part = f"--{kind[1]}\r\nContent-Disposition: form-data; name="
    before = f'{part}"file"; filename="file"\r\nContent-Type: application/octet-stream\r\n\r\n'
    return before.encode() + content + f'\r\n{part}"path"\r\n\r\n{path}\r\n--{kind[1]}--\r\n'.encode()


@pytest.mark.parametrize("path", [ODD_PATH, 'q"u', "a\nb\r\n--x", "%22%", " x ", "é世😀", "..\\x", "..."])
def test_a_path_arrives_as_it_is(client_of: Clients, path: str) -> None:
    with Peer.answering(STORED, answer(b"")) as peer:
        client = client_of(peer.url)
        client.upload_file(path, b"x")
        client.download_file(path)
    upload, download = peer.requests[0]
    assert upload.content == multipart(upload, path, b"x")
    target = download.line.split(" ")[1]
    assert urllib.parse.parse_qs(target.partition("?")[2], strict_parsing=True) == {"path": [path]}


class OnlyReads:
    """The least that a file can be."""

    def __init__(self, read: Callable[[int], Any]) -> None:
        self.read = read


def file_at_three(make: Callable[..., Any], content: bytes, **settings: Any) -> Any:
    file = make(**settings)
    file.write(content)
    file.seek(3)
    return file


class NoTell:
    """A file that can be moved, and not asked where it stands."""

    def __init__(self, content: bytes) -> None:
        self._file = io.BytesIO(content)
        self.read, self.seek = self._file.read, self._file.seek


class NoEnd(io.BytesIO):
    """A file that fails after it has moved to its end."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        position = super().seek(offset, whence)
        if whence == os.SEEK_END:
            raise OSError("there is no end")
        return position


@pytest.mark.parametrize("kind", [NoTell, NoEnd])
@pytest.mark.parametrize("in_mapping", [False, True], ids=["upload_file", "files="])
def test_a_file_that_cannot_tell_its_size_is_uploaded_whole(client_of: Clients, kind: Any, in_mapping: bool) -> None:
    with Host(lambda request: [STORED] if "/files" in request.line else [RAN]) as host:
        client = client_of(host.url)
        if in_mapping:
            client.run("image", ["true"], files={"a": kind(b"all of it")})
        else:
            client.upload_file("a", kind(b"all of it"))
        assert b"\r\n\r\nall of it\r\n--" in host.seen[0].content


class Streaming(Unseekable):
    """Content that cannot be rewound and says so by a ValueError, as the files of fsspec do."""

    def __init__(self, content: bytes, can_seek: bool = False) -> None:
        super().__init__(content)
        self.can_seek = can_seek

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if not self.can_seek:
            raise ValueError("cannot seek a streaming HTTP file")
        return 0

    def tell(self) -> int:
        raise ValueError("cannot seek a streaming HTTP file")


class SeeksForward(Unseekable):
    """Content whose `seek` knows no end to count from."""

    def seek(self, offset: int) -> int:  # type: ignore[override]
        raise AssertionError


class SeeksNever(Unseekable):
    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        raise NotImplementedError


def pipe_of(content: bytes) -> Any:
    reader, writer = os.pipe()
    os.write(writer, content)
    os.close(writer)
    return open(reader, "rb")


def opened(content: bytes, kind: Any = io.BufferedReader) -> Any:
    """Return a file on disk, opened and not at its start."""
    number, path = tempfile.mkstemp()
    os.write(number, content)
    os.close(number)
    file = kind(io.FileIO(path))
    os.unlink(path)
    file.seek(3)
    return file


MUCH = b"0123456789" * 70_000
LARGE_CONTENT = b"".join(b"%06d\n" % number for number in range(1_300_000))  # no two pieces of it are the same
# Each row: what makes the content, the bytes that arrive, and whether their number is known beforehand.
CONTENTS: dict[str, tuple[Callable[[], Any], bytes, bool]] = {
    "bytes": (lambda: b"a\0\xff", b"a\0\xff", True),
    "no bytes": (lambda: b"", b"", True),
    "many bytes": (lambda: MUCH, MUCH, True),
    "bytearray": (lambda: bytearray(b"a"), b"a", True),
    "memoryview": (lambda: memoryview(array.array("H", [0x0101, 0x0202])), b"\1\1\2\2", True),
    "text": (lambda: "é世\n\0", "é世\n\0".encode(), True),
    "BytesIO": (lambda: file_at_three(io.BytesIO, MUCH), MUCH, True),
    "empty file": (tempfile.TemporaryFile, b"", True),
    "file": (lambda: file_at_three(tempfile.TemporaryFile, MUCH), MUCH, True),
    "opened file": (lambda: opened(LARGE_CONTENT), LARGE_CONTENT, True),
    "unbuffered file": (lambda: file_at_three(tempfile.TemporaryFile, MUCH, buffering=0), MUCH, True),
    "spooled file": (lambda: file_at_three(tempfile.SpooledTemporaryFile, b"spooled"), b"spooled", True),
    "pipe": (lambda: pipe_of(b"piped"), b"piped", False),
    "empty pipe": (lambda: pipe_of(b""), b"", False),
    "only read()": (lambda: OnlyReads(io.BytesIO(MUCH).read), MUCH, False),
    "seek() with a ValueError": (lambda: Streaming(MUCH), MUCH, False),
    "tell() with a ValueError": (lambda: Streaming(MUCH, can_seek=True), MUCH, False),
    "seek() of one argument": (lambda: SeeksForward(MUCH), MUCH, False),
    "seek() that is not there": (lambda: SeeksNever(MUCH), MUCH, False),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_content_arrives_whole_however_it_is_given(client_of: Clients, kind: str) -> None:
    make, expected, is_sized = CONTENTS[kind]
    content = make()
    with Peer.answering(STORED) as peer, contextlib.ExitStack() as stack:
        if hasattr(content, "close"):
            stack.callback(content.close)
        assert client_of(peer.url).upload_file("a.txt", content) is None
    assert peer.request.content == multipart(peer.request, "a.txt", expected)
    framing = {name for name in peer.request.fields if name in ("content-length", "transfer-encoding")}
    assert framing == {"content-length" if is_sized else "transfer-encoding"}


class Reporting(io.BufferedReader):
    """A file that tells how far it was read, as those of progress bars do."""

    reported = 0

    def read(self, size: int | None = -1) -> bytes:
        piece = super().read(size)
        self.reported += len(piece)
        return piece


def test_a_file_that_reports_what_is_read_is_read_by_its_own_read(client_of: Clients) -> None:
    with Peer.answering(STORED) as peer, opened(LARGE_CONTENT, Reporting) as file:
        client_of(peer.url).upload_file("a.txt", file)
    assert file.reported == len(LARGE_CONTENT)


class Fickle(io.BytesIO):
    """A file that is not as long as it was when its length was asked for."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return super().seek(offset, whence) and 5

    def tell(self) -> int:
        return 5


def reads(pieces: Iterable[Any]) -> Any:
    """Return a file that gives these pieces, or fails."""
    left = iter(pieces)
    return OnlyReads(lambda size: next(left) if size else b"")


class Blocked(io.RawIOBase):
    """A file that is said to have ten bytes, which are not there yet."""

    at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = 10 if whence == os.SEEK_END else offset
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, _: Any) -> None:
        return None


UNFIT: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "blocks": (lambda: io.BufferedReader(Blocked()), TypeError, " gave NoneType"),
    "shrinks": (lambda: Fickle(b"1234"), BoxerError, "changed its size while it was sent"),
    "grows": (lambda: Fickle(b"123456"), BoxerError, "changed its size while it was sent"),
    "becomes text": (lambda: reads([b"1", "2"]), TypeError, " gave str"),
    "becomes a memoryview": (
        lambda: reads([b"1", memoryview(array.array("I", [1, 2]))]),
        TypeError,
        " gave memoryview",
    ),
    "becomes nothing": (lambda: reads([b"1", None]), TypeError, " gave NoneType"),
    "cannot be read": (lambda: reads(map(os.read, [-1], [1])), OSError, "Bad file descriptor"),
}


@pytest.mark.parametrize("file", UNFIT)
def test_a_file_that_turns_out_unfit_is_never_sent_as_if_it_were_whole(client_of: Clients, file: str) -> None:
    make, kind, text = UNFIT[file]
    ended = pytest.raises(AssertionError, match=r"^connection 0, .*the connection ended within a request")
    with ended, Peer([[Do.REQUEST]]) as peer, pytest.raises(kind, match=text):
        client_of(peer.url).upload_file("a", make())


class Changing(io.FileIO):
    """A file that is given another size once a part of it was read."""

    def __init__(self, path: Path, new_size: int) -> None:
        super().__init__(path)
        self.new_size = new_size

    def read(self, size: int | None = -1) -> bytes:
        content: bytes = super().read(size) or b""
        if size:
            os.truncate(self.name, self.new_size)
        return content


@pytest.mark.parametrize("kind", ["the system's", "one with a read of its own"])
@pytest.mark.parametrize("size", [LONG + MIB, LONG + 1, LONG - 1, 0])
def test_a_file_that_changes_its_size_is_never_a_whole_upload(
    client_of: Clients, size: int, kind: str, tmp_path: Path
) -> None:
    path, received = tmp_path / "file", list[bytes]()
    path.touch()
    os.truncate(path, LONG)

    def take(sock: Any) -> None:
        if kind == "the system's":
            os.truncate(path, size)
        all_of_it(sock, received)

    with Peer([[take, Do.FIN], [Do.REQUEST, WELL]]) as peer:
        with open(path, "rb") if kind == "the system's" else Changing(path, size) as file:
            client = client_of(peer.url)
            got = outcome(client, upload(file))
        assert type(got) is BoxerError and "size" in str(got)
        assert client.health()
    head, _, body = b"".join(received).partition(b"\r\n\r\n")
    length = re.search(rb"content-length: ([0-9]+)", head.lower())
    assert length is not None and len(body) < int(length[1])


class Shared(io.BytesIO):
    """A file that something else reads from its start, each time a part of it was read."""

    def read(self, size: int | None = -1) -> bytes:
        content = super().read(size)
        if size:
            self.seek(0)
        return content


def test_a_file_that_something_else_reads_is_never_a_whole_upload(client_of: Clients) -> None:
    received = list[bytes]()
    with Peer([[lambda sock: all_of_it(sock, received), Do.FIN], [Do.REQUEST, WELL]]) as peer:
        client = client_of(peer.url)
        got = outcome(client, upload(Shared(os.urandom(5 * MIB))))
        assert type(got) is BoxerError and "was reading it" in str(got)
        assert client.health()
    assert len(b"".join(received)) < 5 * MIB


class Failing(io.BytesIO):
    """A file that cannot be read to its end."""

    def read(self, size: int | None = -1) -> bytes:
        if size and self.tell() > MIB:
            raise OSError(5, "the disk is broken")
        return super().read(size)


def test_the_error_of_a_file_that_cannot_be_read_comes_out(client_of: Clients) -> None:
    with Peer([[Do.HEAD, Do.DRAIN], [Do.REQUEST, WELL]]) as peer:
        client = client_of(peer.url)
        with pytest.raises(OSError, match="the disk is broken"):
            client.upload_file("a.txt", Failing(bytes(4 * MIB)))
        assert client.health()


def test_every_upload_has_a_boundary_of_its_own(client_of: Clients) -> None:
    with Peer.answering(*[STORED] * 9) as peer:
        client = client_of(peer.url)
        for _ in range(9):
            client.upload_file("a", b"")
    assert len({request.fields["content-type"] for request in peer.requests[0]}) == 9


def test_boundaries_cannot_be_foreseen(client_of: Clients) -> None:
    with Host(lambda _: [STORED]) as host:
        client = client_of(host.url)
        for _ in range(2000):
            random.seed(0)
            client.upload_file("a", b"")
    random.seed()
    matches = [re.search("boundary=([0-9a-f]{32})$", request.fields["content-type"]) for request in host.seen]
    numbers = [int(match[1], 16) for match in matches if match]
    assert len(set(numbers)) == 2000
    # No bit is always the same, or can be told from others: there are 128 that are linearly independent.
    independent: list[int] = []
    for number in numbers:
        rest = functools.reduce(lambda left, one: min(left, left ^ one), independent, number ^ numbers[0])
        independent += [rest] if rest else []
    assert len(independent) == 128


def asked(request: Received) -> dict[str, Any]:
    """Read a request by other means than the client's; in the result, only names of header fields have no space."""
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(request.head + request.body)
    event, content = connection.next_event(), b""
    assert isinstance(event, h11.Request)
    while isinstance(data := connection.next_event(), h11.Data):
        content += data.data
    assert isinstance(data, h11.EndOfMessage) and connection.trailing_data == (b"", False)
    said: dict[str, Any] = {name.decode(): value for name, value in event.headers}
    assert len(said) == len(event.headers)
    said.pop("content-length", None)
    path, _, query = event.target.decode().partition("?")
    said.update({"the method": event.method, "the path": urllib.parse.unquote_to_bytes(path)})
    said["the query"] = urllib.parse.parse_qs(query, strict_parsing=bool(query), errors="strict")
    if "authorization" in said:
        said["authorization"] = base64.b64decode(said["authorization"].partition(b"Basic ")[2], validate=True)
    kind, options = parameters(said.pop("content-type", b"").decode())
    if kind == "multipart/form-data":
        for disposition, pieces in Multipart(Content(io.BytesIO(content), len(content)), options["boundary"]).parts():
            name = f"the part {disposition.pop('name')}"
            assert name not in said
            said[name] = disposition, b"".join(pieces)
    elif content:
        assert (kind, options) == ("application/json", {})
        said.update({f"the member {name}": value for name, value in json.loads(content).items()})
    return said


def test_content_may_look_like_a_delimiter(client_of: Clients) -> None:
    content = b""
    with Host(lambda _: [STORED]) as host:
        client = client_of(host.url)
        for _ in range(5):
            client.upload_file("a", content)
            sent = host.seen[-1]
            assert asked(sent)["the part file"] == ({"filename": "file"}, content)
            boundary = sent.fields["content-type"].partition("=")[2].encode()
            delimiters = [b"\r\n--%b\r\n" % boundary, b"\r\n--%b--\r\n" % boundary, b"--%b" % boundary, b"\r\n--"]
            content = b"".join([*delimiters, sent.body, b"\r\n--" + boundary[:-1]])


# Each row: what is called ("" makes a client), the class of the error, what its text has in it, and an argument's name
# with values, each of which is refused. The other arguments are valid.
VALID: dict[str, dict[str, Any]] = {
    "run": {"image": "i", "cmd": ["c"]},
    "upload_file": {"remote_path": "a", "content": b""},
    "upload_path": {"local_path": __file__},
    "download_file": {"path": "a"},
    "download_path": {"path": "a", "local_path": "b"},
}
INVALID, LONE = BoxerValidationError, "a\ud800"


class Locating:
    """A path of a kind of its own."""

    def __fspath__(self) -> str:
        return "a"


TIME, COUNT = "must be a number of seconds above 0, or None", "must be a whole number from "
FIELD, TAKEN = "a name in headers is not the name of a field", "is there twice, or is set by the client itself"
VALUE = "has a character that a field cannot hold"
REFUSED: list[tuple[str, type[Exception], str, str, Sequence[Any]]] = [
    ("", INVALID, "such as http://localhost:8080", "base_url", ["", "http://", "http:///x", "http://:80"]),
    ("", INVALID, "not a name or address", "base_url", ["http://" + "a" * 64, "http://" + "a." * 127]),
    ("", INVALID, "such as http://localhost:8080", "base_url", ["http://[::1", "http://[x"]),
    (
        "",
        INVALID,
        "port",
        "base_url",
        ["http://h:0", "http://h:65536", "http://h:8o80", "http://h:-1", "http://[::1]:x"],
    ),
    ("", INVALID, "must begin with http:// or https://", "base_url", ["ftp://host"]),
    ("", INVALID, "http", "base_url", ["localhost:8080", "localhost", "//localhost"]),
    ("", INVALID, "space, a backslash or a control", "base_url", ["http://h ", "http://h\r\nX: y"]),
    ("", INVALID, "space, a backslash or a control", "base_url", ["http://h\t/", "http://h\\@x", "http://h/\x7f"]),
    ("", INVALID, "no query and no fragment", "base_url", ["http://h/?a=1", "http://h?a", "http://h#x"]),
    ("", INVALID, "not a name or address", "base_url", ["http://a*b", "http://a(b", f"http://{'x' * 64}.é"]),
    ("", INVALID, "not a name or address", "base_url", ["http://.", "http://dead..beef", f"http://{'a' * 64}"]),
    ("", INVALID, "not a name or address", "base_url", ["http://a%25b", "http://1.2%x"]),
    ("", INVALID, "no colon", "base_url", ["http://a%3Ab:password@h"]),
    ("", INVALID, "base_url", "base_url", [f"http://h/{LONE}", f"http://{LONE}"]),
    ("", TypeError, "base_url must be str", "base_url", [8080, b"http://h"]),
    ("", INVALID, TIME, "timeout", [0, -1, math.nan, True, "5"]),
    ("", INVALID, COUNT + "0 to", "retries", [-1, 1.5, None, "1", True]),
    ("", INVALID, COUNT + "1 to", "max_connections", [0, -1, 1.5, None]),
    ("", INVALID, FIELD, "headers", [{name: "x"} for name in ("", "a b", "a:", "a\r\nb", "é")]),
    ("", INVALID, TAKEN, "headers", [{name: "x"} for name in ("Host", "content-length", "Transfer-Encoding", "TE")]),
    ("", INVALID, TAKEN, "headers", [{"X-a": "1", "X-A": "2"}]),
    ("", INVALID, VALUE, "headers", [{"X-A": value} for value in ("a\r\nB: c", "a\n", "a\r", "\x7f", "\x85")]),
    ("", INVALID, VALUE, "headers", [{"X-A": "世"}]),
    ("", INVALID, "a NUL character", "headers", [{"a\0": "x"}, {"X-A": "a\0"}]),
    ("", INVALID, "a NUL character", "base_url", ["http://h\0"]),
    ("", INVALID, "lone surrogate", "headers", [{"X-A": LONE}]),
    ("", TypeError, "must be str", "headers", [{"X-A": 1}, {b"X-A": "a"}]),
    ("", TypeError, "headers must be a mapping, not", "headers", [[("a", "b")], "a: b", 5]),
    ("", TypeError, "ssl_context must be an ssl.SSLContext", "ssl_context", ["ca.pem", True, False, 0]),
    ("run", INVALID, "image is empty; name one", "image", ["", " \n"]),
    ("run", TypeError, "image must be str", "image", [None, 5, b"i"]),
    ("run", INVALID, "cmd is empty; give the program", "cmd", [[], (), [""], ["", "x"]]),
    ("run", INVALID, "cmd must be a list of strings, not one string: write ['sh', '-c',", "cmd", ["echo hi"]),
    ("run", TypeError, "cmd", "cmd", [None, 5, b"c", {"c": 1}, ["c", 5], [b"c"]]),
    ("run", INVALID, "env must be a list of strings, not one string: write ['NAME=value']", "env", ["A=b"]),
    ("run", INVALID, "is not of the form NAME=value", "env", [["A"], ["A=b", "=c"], {"": "x"}]),
    ("run", INVALID, "a name in env has an '='", "env", [{"A=B": "c"}]),
    ("run", TypeError, "", "env", [5, [5], {"A": 1}, {1: "A"}, b"A=b", [("A", "b")]]),
    ("run", INVALID, "files must be a list of strings, not one string: write ['a.py']", "files", ["a.py"]),
    ("run", INVALID, "is empty; write a path", "files", [["a", ""]]),
    ("run", TypeError, "files", "files", [5, [5], b"a", [Path("a")], Path("a"), 0, False]),
    ("run", INVALID, "files must be a list of strings, not one string", "files", [""]),
    ("run", TypeError, "env", "env", [0, False]),
    ("run", TypeError, "outputs", "outputs", [5, [5], b"a", [Path("a")]]),
    ("run", TypeError, "files['a'] must be bytes, str, a path or a binary file", "files", [{"a": 5}, {"a": None}]),
    ("run", INVALID, "each name in files is empty; write a path", "files", [{"": "x"}]),
    ("run", INVALID, "output_dir is empty; write '.'", "output_dir", [""]),
    ("run", INVALID, "no limit 'memory'; the limits are cpu_cores, memory_mb", "limits", [{"memory": 1}]),
    ("run", TypeError, "limits must be ResourceLimits or a mapping", "limits", [5, "5", []]),
    ("run", TypeError, "cwd must be str", "cwd", [5, b"/"]),
    ("run", TypeError, "network must be str", "network", [5, True]),
    *[("run", INVALID, "lone surrogate", name, [LONE]) for name in ("image", "cwd", "network")],
    *[("run", INVALID, "lone surrogate", name, [[f"A={LONE}"]]) for name in ("cmd", "env", "files")],
    ("upload_file", INVALID, "is empty; write a path", "remote_path", [""]),
    ("upload_file", TypeError, "path must be str", "remote_path", [5, None, b"a", Path("a")]),
    ("upload_file", TypeError, "must be bytes, str or a binary file", "content", [None, 5, ["a"]]),
    ("upload_file", TypeError, "upload_path", "content", [Path("a"), Path(__file__), Locating()]),
    ("upload_file", TypeError, "opened with mode 'rb'", "content", [io.StringIO("a"), sys.__stderr__]),
    *[("upload_file", INVALID, "lone surrogate", name, [LONE]) for name in ("remote_path", "content")],
    ("upload_path", INVALID, "is empty; write a path", "remote_path", [""]),
    ("upload_path", TypeError, "must be str", "remote_path", [5, b"a"]),
    ("upload_path", TypeError, "", "local_path", [5, None]),
    ("upload_path", INVALID, "local_path is empty; write '.'", "local_path", [""]),
    ("download_path", INVALID, "local_path is empty; write '.'", "local_path", [""]),
    ("upload_path", FileNotFoundError, ".py.missing", "local_path", [f"{__file__}.missing"]),
    ("download_file", INVALID, "is empty; write a path", "path", [""]),
    ("download_file", INVALID, "lone surrogate", "path", [LONE]),
    ("download_file", TypeError, "path must be str", "path", [5, b"a"]),
    *[(method, INVALID, TIME, "timeout", [0, -1, math.nan, "1", True]) for method in ("health", *VALID)],
    *[(method, INVALID, COUNT + "0 to", "retries", [-1, 0.5, "1", True]) for method in ("health", *VALID)],
]
REFUSED += [
    ("", INVALID, TIME, "timeout", [decimal.Decimal(5), fractions.Fraction(-1, 2)]),
    ("", INVALID, "retries must be a whole number", "retries", [Whole(-1), fractions.Fraction(1, 2)]),
    ("", INVALID, "max_connections must be a whole number", "max_connections", [Whole(0), decimal.Decimal(1)]),
    ("upload_path", INVALID, "exclude must be a list of strings, not one string", "exclude", [".git", ""]),
    ("upload_path", TypeError, "exclude", "exclude", [5, None, [5], [b".git"], [None], b".git", {".git": 1}]),
    ("wait_until_ready", INVALID, TIME, "timeout", [0, -1, math.nan, "1", True, decimal.Decimal(1)]),
]


@pytest.mark.parametrize(("method", "kind", "text", "name", "values"), REFUSED)
def test_what_cannot_be_right_is_refused_before_anything_is_sent(
    client_of: Clients, method: str, kind: type[Exception], text: str, name: str, values: Sequence[Any]
) -> None:
    with Peer([]) as peer:
        refuser = getattr(client_of(peer.url), method) if method else client_of
        for value in values:
            with pytest.raises(kind) as caught:
                refuser(**{**VALID.get(method, {}), name: value})
            assert text in str(caught.value) != ""
            assert isinstance(caught.value, BoxerError) == (kind is BoxerValidationError)
    assert peer.connections == 0


@pytest.mark.parametrize("given", [
    {"env": "TOKEN=hunter2"}, {"env": {"TOKEN=hunter2": "x"}}, {"env": ["hunter2"]},
    {"env": {"TOKEN": "hunter2\ud800"}}, {"cmd": ["x", "hunter2\ud800"]},
    {"env": {"TOKEN": "hunter2\0"}}, {"env": {"hunter2\0": "x"}}, {"env": ["TOKEN=hunter2\0"]},
    {"cmd": ["x", "hunter2\0"]}, {"image": "hunter2\0"}, {"cwd": "/hunter2\0"}, {"files": ["hunter2\0"]},
])  # fmt: skip
def test_a_secret_in_what_is_refused_shows_nowhere(client_of: Clients, given: dict[str, Any]) -> None:
    with pytest.raises(BoxerValidationError) as caught:
        client_of("http://h").run(**{"image": "i", "cmd": ["c"], **given})
    assert "hunter2" not in str(caught.value) + repr(vars(caught.value))
    assert caught.value.__context__ is None


PRINTABLE = "".join(map(chr, range(0x20, 0x7F)))
ODD_WORDS = [
    *"\r\n\t\0\x1f\x7f\"'\\ %+&=;,?#@:/<Aa",
    *"\x85\xa0\xad\xb2éİ世😀\u0301\u2028\u2029\u202e\ufeff\ud800\ud83d\ude00\udcff",
    *("%0d%0a", "%00", "%zz", "%E9", '"; filename="evil', '\\"', "\r\n--", "--", "..", "//", "{}"),
    *("\r\n", "\r\nX-Evil: 1", "\r\n\r\n", "\r\n\r\nGET /evil HTTP/1.1\r\nHost: evil\r\n\r\n"),
]
ALL_BUT_SURROGATES = "".join(ODD_WORDS).encode("utf-8", "ignore").decode()
odd_texts = st.lists(st.sampled_from(ODD_WORDS) | st.characters(exclude_categories=()), max_size=6).map("".join)


class Place(NamedTuple):
    """Where text may be given, and what of a request comes of it."""

    call: Callable[[str], Call]
    expected: Callable[[str], dict[str, Any]]
    settings: Callable[[str, str], dict[str, Any]] = lambda _, here: {"base_url": f"http://{here}"}


def arrived(client_of: Clients, place: Place, text: str) -> dict[str, Any] | None:
    """Return the one request that a server sees; None if it was refused and the server sees nothing."""
    is_refused = False
    with Host(lambda _: [answer({**RUN, "path": "stored"})]) as host:
        try:
            with client_of(**place.settings(text, host.authority), retries=0) as client:
                do(client, place.call(text))
        except (BoxerValidationError, TypeError):
            is_refused = True
    if is_refused:
        assert host.connections == 0
        return None
    (request,) = host.seen
    return {
        name: value.replace(host.authority.encode(), b"here") if isinstance(value, bytes) else value
        for name, value in asked(request).items()
    }


@functools.lru_cache(maxsize=1)
def arrived_plain(client_of: Clients, place: Place) -> dict[str, Any]:
    plain = arrived(client_of, place, "plain")
    assert plain is not None and place.expected("plain").items() <= plain.items()
    return plain


def check_place(client_of: Clients, place: Place, text: str) -> None:
    """Check that text arrives as it is, in a request that is otherwise one with plain text, or is refused."""
    request, plain = arrived(client_of, place, text), arrived_plain(client_of, place)
    if request is not None:
        others = {name: value for name, value in plain.items() if name not in place.expected("plain")}
        assert request == {**others, **place.expected(text)}


def quoted(text: str) -> str:
    return urllib.parse.quote(text, safe="", errors="surrogatepass")


def unquoted(text: str) -> bytes:
    return urllib.parse.unquote_to_bytes(text)


def of_run(name: str, make: Callable[[str], Any] = str, member: Any = None) -> Place:
    """Return a parameter of a run as a place; its member of the JSON is left out if it is empty."""
    arguments = {"image": "i", "cmd": ["c"]}

    def expected(text: str) -> dict[str, Any]:
        value = (member or make)(text)
        return {f"the member {name}": value} if value else {}

    return Place(lambda text: ("run", (), {**arguments, name: make(text)}), expected)


def path_part(text: str) -> dict[str, Any]:
    return {"the part path": ({}, text.encode())}


PLACES = {
    "path of an upload": Place(lambda text: ("upload_file", (text, b""), {}), path_part),
    "content of an upload": Place(
        lambda text: ("upload_file", ("a", text), {}),
        lambda text: {"the part file": ({"filename": "file"}, text.encode())}),
    "path of a download": Place(
        lambda text: ("download_file", (text,), {}), lambda text: {"the query": {"path": [text]}}),
    "image": of_run("image"),
    "program": of_run("cmd", lambda text: [text, "x"]),
    "argument": of_run("cmd", lambda text: ["c", text]),
    "folder": of_run("cwd"),
    "file": of_run("files", lambda text: ["x", text]),
    "network": of_run("network"),
    "name in env": of_run("env", lambda text: {text: "x"}, lambda text: "=" not in text and [f"{text}=x"]),
    "value in env": of_run("env", lambda text: {"A": text}, lambda text: [f"A={text}"]),
    "entry of env": of_run("env", lambda text: [f"A={text}", "B=x"]),
    "name of a header": Place(
        lambda _: GET_HEALTH, lambda text: {text.lower(): b"x"},
        lambda text, here: {"base_url": f"http://{here}", "headers": {text: "x"}}),
    "value of a header": Place(
        lambda _: GET_HEALTH, lambda text: {"x-a": text.strip(" ").encode("latin-1")},
        lambda text, here: {"base_url": f"http://{here}", "headers": {"X-A": text}}),
    "user in the URL": Place(
        lambda _: GET_HEALTH, lambda text: {"authorization": unquoted(quoted(text)) + b":x"},
        lambda text, here: {"base_url": f"http://{quoted(text)}:x@{here}"}),
    "password in the URL": Place(
        lambda _: GET_HEALTH, lambda text: {"authorization": b"x:" + unquoted(quoted(text))},
        lambda text, here: {"base_url": f"http://x:{quoted(text)}@{here}"}),
    "password in the URL as it is": Place(
        lambda _: GET_HEALTH, lambda text: {"authorization": b"x:" + unquoted(re.sub("[/?#]", "", text))},
        lambda text, here: {"base_url": f"http://x:{re.sub('[/?#]', '', text)}@{here}"}),
    # A question mark or number sign with nothing after it says nothing.
    "path in the URL": Place(
        lambda _: GET_HEALTH, lambda text: {"the path": unquoted(f"/{text.rstrip('?#')}".rstrip("/")) + b"/healthz"},
        lambda text, here: {"base_url": f"http://{here}/{text}"}),
}  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
@examples(1 / 8)
@hypothesis.example(text=PRINTABLE)
@hypothesis.example(text=ALL_BUT_SURROGATES)
@hypothesis.example(text="世")
@hypothesis.given(text=odd_texts)
def test_text_arrives_as_it_is_or_is_refused(client_of: Clients, name: str, text: str) -> None:
    check_place(client_of, PLACES[name], text)


@examples(1 / 8)
@hypothesis.example(text="Bücher.EXAMPLE")
@hypothesis.given(text=odd_texts)
def test_a_host_arrives_as_it_is_or_is_refused(client_of: Clients, setenv: Any, text: str) -> None:
    text = re.sub(r"[/?#@:[\]]", "", text)  # what has a meaning of its own there

    def settings(text: str, here: str) -> dict[str, Any]:
        setenv("http_proxy", f"http://{here}")  # so that no name is looked up
        return {"base_url": f"http://{text}"}

    def expected(text: str) -> dict[str, Any]:
        name = text.lower().encode("ascii" if text.isascii() else "idna")
        return {"host": name, "the path": b"http://%b/healthz" % name}

    check_place(client_of, Place(lambda _: GET_HEALTH, expected, settings), text)


@examples(1 / 8)
@hypothesis.example(name=PRINTABLE)
@hypothesis.given(name=odd_texts)
def test_a_local_file_s_name_arrives_as_it_is_or_is_refused(client_of: Clients, tmp_path: Path, name: str) -> None:
    def file(name: str) -> Path:
        path = Path(tempfile.mkdtemp(dir=tmp_path)) / name.replace("/", "")
        path.write_bytes(b"")
        return path

    try:
        file(name)
    except (OSError, ValueError):
        hypothesis.reject()  # this system has no such names
    alone = Place(lambda name: ("upload_path", (file(name),), {}), lambda name: path_part(name.replace("/", "")))
    in_folder = Place(
        lambda name: ("upload_path", (file(name).parent, "x"), {}), lambda name: path_part(f"x/{name.replace('/', '')}")
    )
    for place in (alone, in_folder):
        check_place(client_of, place, name)


# Each row: what is called, and an argument with NUL in it and, where it may be a secret, "hunter2".
NULS: list[tuple[str, str, Any]] = [
    ("run", "image", "python:3\0.12"),
    ("run", "cmd", ["python3", "-c", "print(1)\0hunter2"]),
    ("run", "cmd", ["\0"]),
    ("run", "cmd", ("hunter2\0", "x")),
    ("run", "env", {"KEY": "hunter2\0"}),
    ("run", "env", {"A": "b", "hunter2\0": "x"}),
    ("run", "env", ["A=b", "KEY=\0hunter2"]),
    ("run", "env", ["hunter2\0=x"]),
    ("run", "cwd", "/hunter2\0"),
    ("run", "files", ["a", "hunter2\0"]),
    ("run", "network", "none\0hunter2"),
    ("upload_file", "remote_path", "a\0hunter2"),
    ("upload_path", "remote_path", "a\0hunter2"),
    ("download_file", "path", "a\0hunter2"),
]


@pytest.mark.parametrize(("method", "name", "value"), NULS)
def test_nul_is_refused_in_all_text_of_a_run_and_in_every_path(
    client_of: Clients, method: str, name: str, value: Any
) -> None:
    given = {**VALID[method], name: value}
    with Peer([]) as peer:
        client = client_of(peer.url)
        refusers: list[Any] = [lambda: getattr(client, method)(**given)]
        refusers += [lambda: RunRequest(**given)] if method == "run" else []
        for refuser in refusers:
            with pytest.raises(BoxerValidationError) as caught:
                refuser()
            assert name.replace("remote_", "") in str(caught.value) and "NUL" in str(caught.value)
            assert "hunter2" not in str(caught.value) + repr(vars(caught.value)) and "\0" not in str(caught.value)
            assert caught.value.__context__ is None
    assert peer.connections == 0


def test_nul_is_refused_in_the_path_of_a_folder_that_is_uploaded(client_of: Clients, folder: Path) -> None:
    with Peer([]) as peer:
        client = client_of(peer.url)
        with pytest.raises(BoxerValidationError, match="NUL"):
            client.upload_path(folder, "a\0b")


def test_nul_is_refused_in_paths_of_this_machine_before_anything_is_sent(client_of: Clients, folder: Path) -> None:
    path = f"{folder}\0hunter2"
    with Peer([]) as peer:
        client = client_of(peer.url)
        refusers: list[tuple[str, Any]] = [
            ("local_path", lambda: client.upload_path(path)),
            ("local_path", lambda: client.download_path("a", path)),
            ("local_path", lambda: client.run("image", ["true"], files={"a": Path(path)})),
            ("output_dir", lambda: client.run("image", ["true"], output_dir=path)),
        ]
        for name, refuser in refusers:
            with pytest.raises(BoxerValidationError, match=f"{name} has a NUL character"):
                refuser()


def test_nul_in_content_arrives(client_of: Clients) -> None:
    with Peer.answering(STORED, STORED) as peer:
        client = client_of(peer.url)
        for content in ("a\0b", b"a\0b"):
            client.upload_file("a", content)
    assert all(b"a\0b" in request.body for request in peer.requests[0])


@pytest.mark.parametrize("path", UPWARDS)
def test_what_is_uploaded_stays_below_the_folder_that_is_named(client_of: Clients, folder: Path, path: str) -> None:
    with Peer([]) as peer:
        client = client_of(peer.url)
        for method, args in (
            ("upload_file", (path, b"x")),
            ("upload_path", (folder / "a.txt", path)),
            ("upload_path", (folder, path)),
            ("upload_path", (folder, f"{path}/")),
        ):
            with pytest.raises(BoxerValidationError) as caught:
                getattr(client, method)(*args)
            assert path in str(caught.value)
    assert peer.connections == 0


@pytest.mark.parametrize("path", [*UPWARDS, "...", "a..b/..c/d..", ".hidden", "a/.b"])
def test_a_download_may_name_what_it_likes(client_of: Clients, path: str) -> None:
    with Peer.answering(answer("abc")) as peer:
        assert client_of(peer.url).download_file(path) == b"abc"
    assert urllib.parse.parse_qs(peer.request.line.split(" ")[1].partition("?")[2]) == {"path": [path]}


@pytest.mark.parametrize("path", ["...", "a..b/..c/d..", ".hidden", "a/.b", "..\\a"])
def test_a_name_may_begin_and_end_with_dots(client_of: Clients, folder: Path, path: str) -> None:
    with Host(lambda _: [STORED]) as host:
        client = client_of(host.url)
        client.upload_file(path, b"x")
        assert client.upload_path(folder / "a.txt", path) == [path]
        assert client.upload_path(folder / "a" / "b", path) == [f"{path}/deep.txt"]
    assert all(f"\r\n\r\n{path}".encode() in request.body for request in host.seen)


@pytest.mark.parametrize("path", ["", "/", "//"])
def test_a_folder_is_never_uploaded_into_the_root_of_the_store(client_of: Clients, folder: Path, path: str) -> None:
    with Peer([]) as peer, pytest.raises(BoxerValidationError, match="empty"):
        client_of(peer.url).upload_path(folder, path)
    assert peer.connections == 0


@pytest.mark.parametrize("command", ["", " ", "ls -l", "ls | wc -l", "echo 'hi", 'echo "', "echo \\", "echo \0"])
def test_a_command_in_one_string_is_refused_with_what_to_write(client_of: Clients, command: str) -> None:
    with Peer([]) as peer:
        client = client_of(peer.url)
        for refuser in (lambda: client.run("i", command), lambda: RunRequest("i", command)):
            with pytest.raises(BoxerValidationError, match="cmd must be a list of strings") as caught:
                refuser()
            assert repr(["sh", "-c", command]) in str(caught.value)


def test_the_docstring_says_that_text_is_content_and_no_path(client_of: Clients) -> None:
    assert "upload_path" in (inspect.getdoc(client_of.cls.upload_file) or "")


def test_a_closed_file_is_an_error_of_its_own(client_of: Clients) -> None:
    for file in (io.BytesIO(b"x"), opened(b"content")):
        file.close()
        with Peer([]) as peer, pytest.raises(ValueError, match="closed") as caught:
            client_of(peer.url).upload_file("a", file)
        assert not isinstance(caught.value, BoxerError)


# ---------------------------------------------------------------------------------------------------------------------
# Responses: what a call makes of an answer
# ---------------------------------------------------------------------------------------------------------------------


def run_answer(**changed: Any) -> bytes:
    return json.dumps({**RUN, **changed}).encode()


# Each row: the content of an answer to a run, and what the error says.
BAD_RUN_ANSWERS: list[tuple[bytes, str]] = [
    *[(json.dumps({n: v for n, v in RUN.items() if n != name}).encode(), f"has no '{name}'") for name in RUN],
    *[(run_answer(**{name: None}), f"{name} must be") for name in RUN],
    *[(run_answer(**{name: 5}), f"{name} must be str, got int") for name in ("exec_id", "stdout", "stderr")],
    *[(run_answer(**{n: v}), f"{n} must be int") for n in ("exit_code", "wall_ms") for v in ("0", True, 0.0, [0])],
    *[(content, "JSON object") for content in (b"", b"[]", b'"x"', b"null", b"1", b"<html>", b"{", b"{}{}", b"{'a'}")],
    *[(content, "JSON object") for content in (b'{"a": "\xff"}', b"\xef\xbb\xbf{}", b"\xff\xfe{\0}\0", b'{"a": "\n"}')],
    *[(b'{"wall_ms": %b}' % value, "JSON object") for value in (b"9" * 5_000, b"0x1", b"01")],
    *[(run_answer().replace(b"7", number), "wall_ms must be int, got float") for number in (b"7.5", b"1e999", b"NaN")],
    *[(opening * 100_000, "JSON object") for opening in (b"[", b'{"a":')],
    (b'{"a": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "JSON object"),
]


@pytest.mark.parametrize(("content", "text"), BAD_RUN_ANSWERS, ids=lambda value: str(value)[:40])
def test_an_answer_that_is_no_result_is_an_error_with_its_status(client_of: Clients, content: bytes, text: str) -> None:
    with Peer.answering(answer(content), RAN) as peer:
        client = client_of(peer.url)
        with pytest.raises(BoxerAPIError) as caught:
            client.run("i", ["c"])
        assert client.run("i", ["c"]) == RunResult(**RUN)  # type: ignore[arg-type]
    assert type(caught.value) is BoxerAPIError and caught.value.status_code == 200
    assert caught.value.__cause__ is not None
    assert text in str(caught.value) and len(str(caught.value)) < 500 and str(caught.value).isprintable()


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"path": 1}', b"stored"])
def test_an_upload_that_is_not_confirmed_is_an_error(client_of: Clients, content: bytes) -> None:
    with Peer.answering(answer(content)) as peer, pytest.raises(BoxerAPIError) as caught:
        client_of(peer.url).upload_file("a", b"")
    assert caught.value.status_code == 200


# Each row: an answer to a download, and what the error says.
NO_FILES = [
    (answer("", "301 Moved Permanently", Location="files/?path=a"), 301, "the path is a folder; name a file in it"),
    (answer("", "301 Moved Permanently", Location="/login"), 301, "redirects are not followed; Location: /login"),
    (answer(None, "204 No Content"), 204, "204 No Content is no whole file"),
    (answer("abc", "206 Partial Content", Content_Range="bytes 0-2/9"), 206, "206 Partial Content is no whole file"),
    (answer(b"\x1f\x8b", Content_Encoding="GZip"), 200, "Content-Encoding 'gzip', which was not asked for"),
    (answer({"error": "file not found"}, "404 Not Found"), 404, "file not found"),
]


@pytest.mark.parametrize(("response", "status", "text"), NO_FILES)
def test_a_download_is_a_whole_file_or_an_error(client_of: Clients, response: bytes, status: int, text: str) -> None:
    with Peer.answering(response, answer("x", Content_Encoding="identity")) as peer:
        client = client_of(peer.url)
        with pytest.raises(BoxerAPIError) as caught:
            client.download_file("a")
        assert client.download_file("a") == b"x"
    assert text in str(caught.value) and caught.value.status_code == status


def test_a_download_is_bytes_and_no_file_wherever_the_server_would_have_it(
    client_of: Clients, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = answer("abc", Content_Disposition='attachment; filename="a.txt"', Content_Location="/tmp/a.txt")
    with Peer.answering(said) as peer:
        assert client_of(peer.url).download_file("a.txt") == b"abc"
    assert list(tmp_path.iterdir()) == []


def test_health_is_true_for_2xx_and_false_for_any_other_answer(client_of: Clients) -> None:
    statuses = ["200 OK", "204 No Content", "301 Moved", "404 Not Found", "429 Busy", "500 Oops", "503 Busy"]
    with Peer.answering(*(answer(None if "204" in status else "not JSON", status) for status in statuses)) as peer:
        client = client_of(peer.url)
        assert [client.health() for _ in statuses] == [True, True, False, False, False, False, False]


NGINX = """<html>\r\n<head><title>502 Bad Gateway</title><style>h1 {color: red}</style></head>\r\n<body>\r
<center><h1>502 Bad Gateway</h1></center>\r\n<hr><center>nginx/1.22.1</center>\r\n</body>\r\n</html>\r\n"""
# Each row: an answer, and the text of the error.
REASONS: list[tuple[bytes, str]] = [
    (answer({"error": "image pull failed: x"}, "500 Oops"), "image pull failed: x"),
    (answer({"error": " é \x1b[31m\0\n\u202eab\x07 "}, "500 Oops"), "é ab"),
    (answer("404 page not found", "404 Not Found"), "404 Not Found: 404 page not found"),
    (answer(NGINX, "502 Bad Gateway", Content_Type="text/html"), "502 Bad Gateway: 502 Bad Gateway nginx/1.22.1"),
    (answer("", "500 Internal Server Error"), "500 Internal Server Error"),
    (answer(f"<p>no &#{'9' * 5000}; luck &#x2014;", "500 Oops"), "500 Oops: no ; luck —"),
    (answer("<p>no<!-- luck", "500 Oops"), "500 Oops: no"),
    (answer("<p>no<script>luck()", "500 Oops"), "500 Oops: no"),
    (answer("", "418 \x9b" + "z" * 3000), "418 " + "z" * 1990),
    (answer(" \n", "500 Internal Server Error"), "500 Internal Server Error"),
    (answer("", "500 "), "500"),
    (answer("", "500"), "500"),
    (answer("a\r\nb\x00\x85 c", "400 Bad"), "400 Bad: a b c"),
    (answer(b"caf\xe9", "400 Bad", Content_Type="text/plain; charset=ISO-8859-1"), "400 Bad: caf\ufffd"),
    (answer({"error": 5}, "400 Bad"), '400 Bad: {"error": 5}'),
    (answer({"error": ""}, "400 Bad"), '400 Bad: {"error": ""}'),
    (answer(["x"], "400 Bad"), '400 Bad: ["x"]'),
    (answer(b"[" * 60_000, "400 Bad"), "400 Bad: " + "[" * 1991 + " …"),
    (answer({"error": "x" * 10_000}, "500 Oops"), "x" * 2000 + " …"),
    (answer("y" * 1_000_000, "500 Oops"), "500 Oops: " + "y" * 1990 + " …"),
    (answer(b"\x1f\x8b\x08gzip", "400 Bad", Content_Encoding="gzip"), "400 Bad: \ufffd gzip"),
    (
        answer("", "302 Found", Location="http://other.invalid/x"),
        "302 Found (redirects are not followed; Location: http://other.invalid/x)",
    ),
]


@pytest.mark.parametrize(("response", "text"), REASONS, ids=lambda value: str(value)[-40:])
def test_the_text_of_an_error_is_the_server_s_own_reason(client_of: Clients, response: bytes, text: str) -> None:
    with Peer([[Do.REQUEST, iter((response,)), Do.DRAIN]]) as peer, pytest.raises(BoxerAPIError) as caught:
        client_of(peer.url, retries=0).run("i", ["c"])
    # What is not in the server's own words may go on, with what to look at.
    assert str(caught.value).startswith(text) and str(caught.value).isprintable() and len(str(caught.value)) < 2_500
    assert str(caught.value) == text or not re.search(rb'\r\n\r\n{"error": "[^"]', response)
    assert len(peer.requests[0]) == peer.connections == 1


PATH_WITH_A_SPACE = "data/a b.txt"
FILE_CALLS: dict[str, Callable[[Path], Call]] = {
    "upload_file": lambda _: ("upload_file", (PATH_WITH_A_SPACE, b"content"), {}),
    "upload_file of a file": lambda _: ("upload_file", (PATH_WITH_A_SPACE, io.BytesIO(b"content")), {}),
    "upload_path of a file": lambda folder: ("upload_path", (folder / "a b.txt", PATH_WITH_A_SPACE), {}),
    "upload_path of a folder": lambda folder: ("upload_path", (folder, "data"), {}),
    "download_file": lambda _: ("download_file", (PATH_WITH_A_SPACE,), {}),
}
# What goes wrong with a file; and the class of the error.
FILE_FAULTS: dict[str, tuple[list[Any], type[BoxerError]]] = {
    "refused": ([Do.REQUEST, failing("413 Request Entity Too Large", "upload exceeds limit")], BoxerAPIError),
    "a status of its own": ([Do.REQUEST, failing("507 Insufficient Storage", "no")], BoxerOutputLimitError),
    "refused in HTML": ([Do.REQUEST, answer("<p>no</p>", "502 Bad Gateway", Content_Type="text/html")], BoxerAPIError),
    "redirected": ([Do.REQUEST, answer("", "302 Found", Location="/login")], BoxerAPIError),
    "encoded": ([Do.REQUEST, answer(b"\x1f\x8b", Content_Encoding="gzip")], BoxerAPIError),
    "closed": ([Do.REQUEST, Do.FIN], BoxerConnectionError),
    "reset": ([Do.REQUEST, Do.RST], BoxerConnectionError),
    "cut": ([Do.REQUEST, answer("abc")[:-1], Do.FIN], BoxerConnectionError),
    "malformed": ([Do.REQUEST, raw("A : b")], BoxerConnectionError),
    "not HTTP": ([Do.REQUEST, b"SSH-2.0-OpenSSH_9.6\r\n"], BoxerConnectionError),
    "not answered": ([Do.REQUEST], BoxerTimeoutError),
    "answered by half": ([Do.REQUEST, b"HTTP/1.1 200 OK\r\n"], BoxerTimeoutError),
}


@pytest.mark.parametrize("call", FILE_CALLS)
@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_every_error_of_a_file_names_it(client_of: Clients, tmp_path: Path, fault: str, call: str) -> None:
    script, kind = FILE_FAULTS[fault]
    (tmp_path / "a b.txt").write_bytes(b"content")
    with Peer([script]) as peer:
        client = client_of(peer.url, retries=0, timeout=0.3 if kind is BoxerTimeoutError else 30)
        error = outcome(client, FILE_CALLS[call](tmp_path))
    assert type(error) is kind and PATH_WITH_A_SPACE in str(error), error
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), vars(again)) == (str(error), vars(error)) and str(error).isprintable()


@pytest.mark.parametrize("call", FILE_CALLS)
def test_the_error_of_a_file_for_which_there_is_no_connection_names_it(
    client_of: Clients, tmp_path: Path, call: str
) -> None:
    (tmp_path / "a b.txt").write_bytes(b"content")
    error = outcome(client_of(refused_url(), retries=0), FILE_CALLS[call](tmp_path))
    assert type(error) is BoxerConnectionError and not error.request_sent and PATH_WITH_A_SPACE in str(error)


def test_the_error_of_a_file_that_is_refused_after_several_tries_names_it_once(
    client_of: Clients, clock: Clock
) -> None:
    with Host(lambda _: [failing("503 Service Unavailable", "busy")]) as host:
        error = outcome(client_of(host.url), ("upload_file", (PATH_WITH_A_SPACE, b"x"), {}))
    assert len(host.seen) == 3 and str(error).count(PATH_WITH_A_SPACE) == 1


def test_the_error_of_a_file_that_changes_its_size_names_it(client_of: Clients) -> None:
    with Frail(lambda _: [STORED]) as host:
        error = outcome(client_of(host.url), ("upload_file", (PATH_WITH_A_SPACE, Fickle(b"123456")), {}))
    assert type(error) is BoxerError and PATH_WITH_A_SPACE in str(error)


def test_the_error_of_a_file_in_the_middle_of_its_download_names_it(client_of: Clients) -> None:
    with Peer([[Do.REQUEST, answer("abcd")[:-1]]]) as peer:
        error = outcome(client_of(peer.url, timeout=0.3), ("download_file", (PATH_WITH_A_SPACE,), {}))
    assert is_expected(error, (BoxerTimeoutError, 0, PATH_WITH_A_SPACE))


@pytest.mark.parametrize("method", ["upload_file", "download_file"])
def test_the_path_of_a_file_in_an_error_cannot_hurt_a_terminal(client_of: Clients, method: str) -> None:
    path = "a\x1b]0;x\x07\r\n\u202etxt.b"
    with Peer.answering(failing("404 Not Found", "file not found")) as peer:
        error = outcome(client_of(peer.url), (method, (path, b"x")[: 2 if method == "upload_file" else 1], {}))
    assert is_expected(error, refusal(404, "file not found")) and str(error).isprintable()
    assert "txt.b" in str(error) and "\u202e" not in str(error)


@pytest.mark.parametrize("path", ["data/x.json", "x", "outputs/x", "data/output/x"])
def test_a_file_that_is_not_there_is_named(client_of: Clients, path: str) -> None:
    with store() as server:
        error = outcome(client_of(server.url), ("download_file", (path,), {}))
    assert is_expected(error, refusal(404, path)) and str(error).startswith("file not found")
    assert "persist" not in str(error)


@pytest.mark.parametrize(
    "path", ["output/boxer-1/result.json", "output/boxer-1/a/b", "output/x", "/output/result.json"]
)
def test_an_output_that_is_not_there_hints_at_persist(client_of: Clients, path: str) -> None:
    with store() as server:
        error = outcome(client_of(server.url), ("download_file", (path,), {}))
    assert is_expected(error, refusal(404, path)) and "persist=True" in str(error)


def test_an_output_that_is_refused_for_another_reason_hints_at_nothing(client_of: Clients) -> None:
    with Peer.answering(failing("400 Bad Request", "no")) as peer:
        error = outcome(client_of(peer.url), ("download_file", ("output/boxer-1/x",), {}))
    assert is_expected(error, refusal(400, "output/boxer-1/x")) and "persist" not in str(error)


LOGIN = "<!doctype html><html><head><title>Sign in</title></head><body><p>Sign in</p></body></html>"
# The method and the path of each call.
URLS = {
    "run": ("POST", "/run"),
    "health": ("GET", "/healthz"),
    "upload_file": ("POST", "/files"),
    "download_file": ("GET", "/files"),
}


def is_doubted(error: BoxerError) -> bool:
    """Tell whether an error says that the server may be another one, or its URL wrong."""
    return bool(re.search(r"Boxer|\bURL\b", str(error)))


# What servers that are no Boxer server say; and whether a file may say so, too.
OTHER_SERVERS: dict[str, tuple[bytes, bool]] = {
    "404 in text": (answer("404 page not found", "404 Not Found", Content_Type="text/plain"), False),
    "404 in HTML": (answer("<h1>Not Found</h1>", "404 Not Found", Content_Type="text/html"), False),
    "404 in other JSON": (answer({"detail": "Not Found"}, "404 Not Found"), False),
    "404 without a word": (answer("", "404 Not Found"), False),
    "405 in HTML": (answer("<h1>Not Allowed</h1>", "405 Not Allowed", Content_Type="text/html"), False),
    "200 in HTML": (answer(LOGIN, Content_Type="text/html; charset=utf-8"), True),
    "200 in text": (answer("It works!"), True),
    "200 without a word": (answer(""), True),
    "200 in spaces": (answer(" \r\n"), True),
    "200 in half of JSON": (answer('{"exec_id": "boxer'), True),
    "200 in a list": (answer([1]), True),
    "200 in other JSON": (answer({"message": "Welcome"}), True),
}  # fmt: skip


OTHER_ANSWERS = [(name, call) for name in OTHER_SERVERS for call in (RUN_IT, PUT_FILE)]
OTHER_ANSWERS += [(name, DOWNLOAD) for name, (_, may_be_a_file) in OTHER_SERVERS.items() if not may_be_a_file]


@pytest.mark.parametrize(("name", "call"), OTHER_ANSWERS, ids=str)
def test_what_is_no_boxer_server_is_doubted_by_its_url(client_of: Clients, call: Call, name: str) -> None:
    said, _ = OTHER_SERVERS[name]
    with Peer.answering(said) as peer:
        error = outcome(client_of(f"http://joe:hunter2@{peer.authority}/api", retries=0), call)
    method, path = URLS[call[0]]
    assert type(error) is BoxerAPIError and f" {error.status_code} " in said[:20].decode()
    assert method in str(error) and f"http://{peer.authority}/api{path}" in str(error) and is_doubted(error)
    assert "Expecting" not in str(error) and str(error).isprintable() and "hunter2" not in all_text(error)


# What peers that do not speak HTTP/1.1 say.
OTHER_PROTOCOLS = {
    "SSH": b"SSH-2.0-OpenSSH_9.6\r\n",
    "SMTP": b"220 mail.test ESMTP\r\n",
    "Redis": b"-ERR unknown command 'POST'\r\n",
    "TLS": b"\x15\x03\x01\x00\x02\x02\x46",
    "HTTP/2": b"\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x05\x00\x00\x40\x00",
    "HTTP/0.9": b"<html>",
}


@pytest.mark.parametrize("call", [RUN_IT, GET_HEALTH, DOWNLOAD], ids=["run", "health", "download"])
@pytest.mark.parametrize("name", OTHER_PROTOCOLS)
def test_what_does_not_speak_http_is_doubted_by_its_url(client_of: Clients, call: Call, name: str) -> None:
    with Peer.answering(OTHER_PROTOCOLS[name]) as peer:
        error = outcome(client_of(f"http://joe:hunter2@{peer.authority}/api", retries=0), call)
    method, path = URLS[call[0]]
    assert is_expected(error, lost("HTTP")) and is_doubted(error)
    assert method in str(error) and f"http://{peer.authority}/api{path}" in str(error)
    assert str(error).isprintable() and "hunter2" not in all_text(error)


@pytest.mark.parametrize("end", [Do.FIN, Do.RST])
@pytest.mark.parametrize("call", [RUN_IT, GET_HEALTH, PUT_FILE, DOWNLOAD], ids=["run", "health", "upload", "download"])
def test_a_connection_that_ends_without_an_answer_is_named_by_its_url(client_of: Clients, call: Call, end: Do) -> None:
    with Peer([[Do.REQUEST, end]]) as peer:
        error = outcome(client_of(f"http://joe:hunter2@{peer.authority}/api", retries=0), call)
    method, path = URLS[call[0]]
    assert is_expected(error, lost()) and "hunter2" not in all_text(error)
    assert method in str(error) and f"http://{peer.authority}/api{path}" in str(error)


# ---------------------------------------------------------------------------------------------------------------------
# Policy: the base URL, headers, which proxy is used, and what stays secret
# ---------------------------------------------------------------------------------------------------------------------

# Each row: a base URL, the request target, the value of Host, the credentials.
BASE_URLS = [
    ("http://{peer}", "/healthz", "{peer}", None),
    ("HTTP://{peer}/", "/healthz", "{peer}", None),
    ("http://{peer}/boxer", "/boxer/healthz", "{peer}", None),
    ("http://{peer}/a/b%20c/~é/", "/a/b%20c/~%C3%A9/healthz", "{peer}", None),
    ("http://localhost:{port}", "/healthz", "localhost:{port}", None),
    ("http://me:p%40s%3As%C3%A9@{peer}/x", "/x/healthz", "{peer}", "me:p@s:sé"),
    ("http://me@{peer}", "/healthz", "{peer}", "me:"),
]


@pytest.mark.parametrize("row", BASE_URLS, ids=lambda row: row[0])
@pytest.mark.parametrize("where", ["argument", "BOXER_URL"])
def test_a_base_url_says_where_requests_go(
    client_of: Clients, monkeypatch: pytest.MonkeyPatch, where: str, row: tuple[str, str, str, str | None]
) -> None:
    with Peer.answering(WELL) as peer:
        url, target, host = (text.format(peer=peer.authority, port=peer.port) for text in row[:3])
        monkeypatch.setenv("BOXER_URL", "http://other.invalid" if where == "argument" else url)
        assert client_of(url if where == "argument" else None).health()
    assert (peer.request.line, peer.request.fields["host"]) == (f"GET {target} HTTP/1.1", host)
    credentials = row[3] and f"Basic {base64.b64encode(row[3].encode()).decode()}"
    assert peer.request.fields.get("authorization") == credentials


def test_a_base_url_may_be_an_ipv6_address(client_of: Clients) -> None:
    try:
        peer = Peer.answering(WELL, host="::1")
    except OSError:
        pytest.skip("this machine has no IPv6")
    with peer:
        assert client_of(f"http://[::1]:{peer.port}").health()
    assert peer.request.fields["host"] == f"[::1]:{peer.port}"


def test_without_a_base_url_it_is_port_8080_of_this_machine(
    client_of: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BOXER_URL", "")
    assert "http://localhost:8080" in repr(client_of())
    monkeypatch.delenv("BOXER_URL")
    assert "http://localhost:8080" in repr(client_of())


def test_headers_are_sent_with_every_request(client_of: Clients) -> None:
    with Peer.answering(WELL, STORED) as peer:
        client = client_of(peer.url, headers={"x-Request-id": ' a;b="c" é ', "AUTHORIZATION": "Bearer t"})
        assert client.health() and client.upload_file("a", b"") is None
    for request in peer.requests[0]:
        assert (request.fields["x-request-id"], request.fields["authorization"]) == ('a;b="c" é', "Bearer t")


NO_PROXY = {  # whether a request for boxer.test goes straight there
    "": False, "boxer.test": True, "BOXER.test": True, "test": True, ".test": True, ".TEST": True, "*": True,
    "a, boxer.test": True, "a ,\t.test , b": True, "other.test": False, "xer.test": False, "*.test": False,
    ".boxer.test": True, "a.boxer.test": False, "<host and port>": True, "boxer.test:1": False,
}  # fmt: skip


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("value", NO_PROXY)
def test_no_proxy_names_what_goes_straight(
    client_of: Clients, setenv: Any, ca: trustme.CA, value: str, scheme: str
) -> None:
    inside = serving(ca, "boxer.test") if scheme == "https" else None
    with Frail(lambda _: [RAN], inside) as straight, Frail(lambda _: [RAN], inside, scheme == "https") as proxy:
        setenv(f"{scheme}_proxy", f"http://{proxy.authority}")
        setenv("no_proxy", value.replace("<host and port>", f"boxer.test:{straight.port}"))
        client = client_of(f"{scheme}://boxer.test:{straight.port}", ssl_context=trusting(ca))
        assert client.run("image", ["true"]) == RESULT
    assert (straight.connections, proxy.connections) == ((1, 0) if NO_PROXY[value] else (0, 1))


# Variables of the environment ({}: the proxy), and whether a request goes to the proxy.
VARIABLES: list[tuple[str, dict[str, str], bool]] = [
    ("http", {"http_proxy": "{}"}, True),
    ("http", {"HTTP_PROXY": "{}"}, True),
    ("http", {"http_proxy": "{}", "HTTP_PROXY": "http://nowhere.test:9"}, True),
    ("http", {"http_proxy": "", "HTTP_PROXY": "{}"}, False),
    ("http", {"https_proxy": "{}", "all_proxy": "{}", "ALL_PROXY": "{}", "proxy": "{}"}, False),
    ("http", {"HTTP_PROXY": "{}", "NO_PROXY": "boxer.test"}, False),
    ("http", {"HTTP_PROXY": "{}", "NO_PROXY": "boxer.test", "no_proxy": "other.test"}, True),
    # A CGI program has the fields of a request in its environment, and so may have a field `Proxy`.
    ("http", {"HTTP_PROXY": "{}", "REQUEST_METHOD": "GET"}, False),
    ("http", {"http_proxy": "{}", "REQUEST_METHOD": "GET"}, True),
    ("https", {"https_proxy": "{}"}, True),
    ("https", {"HTTPS_PROXY": "{}"}, True),
    ("https", {"HTTPS_PROXY": "{}", "REQUEST_METHOD": "GET"}, True),
    ("https", {"http_proxy": "{}", "all_proxy": "{}"}, False),
    ("https", {"HTTPS_PROXY": "{}", "NO_PROXY": "*"}, False),
]


@pytest.mark.parametrize(("scheme", "variables", "is_proxied"), VARIABLES)
def test_the_environment_says_which_proxy_there_is(
    client_of: Clients, setenv: Any, ca: trustme.CA, scheme: str, variables: dict[str, str], is_proxied: bool
) -> None:
    inside = serving(ca, "boxer.test") if scheme == "https" else None
    with Frail(lambda _: [RAN], inside) as straight, Frail(lambda _: [RAN], inside, scheme == "https") as proxy:
        for name, value in variables.items():
            setenv(name, value.format(f"http://{proxy.authority}"))
        client = client_of(f"{scheme}://boxer.test:{straight.port}", ssl_context=trusting(ca))
        assert client.run("image", ["true"]) == RESULT
    assert (straight.connections, proxy.connections) == ((0, 1) if is_proxied else (1, 0))


LOOPBACK = ["localhost", "LOCALHOST", "127.0.0.1", "[::1]"]
LOOPBACK += ["localhost.", "LocalHost.", "boxer.localhost", "a.b.LOCALHOST", "boxer.localhost."]


@pytest.mark.parametrize("host", LOOPBACK)
def test_loopback_never_goes_through_a_proxy(client_of: Clients, setenv: Any, host: str) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        setenv(name, refused_url())
    with Peer([[Do.REQUEST, RAN]], host="::1" if ":" in host else "127.0.0.1") as peer:
        assert client_of(f"http://{host}:{peer.port}").run("image", ["true"]) == RESULT


@pytest.mark.parametrize("proxy", ["http://proxy.invalid", "http://proxy.invalid:80"])
def test_a_proxy_without_a_port_is_at_port_80_whatever_the_origin_s_scheme(
    client_of: Clients, setenv: Any, proxy: str
) -> None:
    setenv("https_proxy", proxy)
    client = client_of("https://boxer.test", retries=0)
    assert is_expected(outcome(client, GET_HEALTH), lost("the proxy proxy.invalid:80 (for boxer.test): no connection"))


@pytest.mark.parametrize("proxy", ["https://proxy.test:3128", "socks5://proxy.test:1080", "http://", "http://a b"])
def test_a_proxy_that_is_not_spoken_to_in_plain_http_is_refused(client_of: Clients, setenv: Any, proxy: str) -> None:
    setenv("http_proxy", proxy)
    with pytest.raises(BoxerValidationError, match="proxy"):
        client_of("http://boxer.test")


def test_a_secret_in_a_header_that_is_refused_shows_nowhere(client_of: Clients) -> None:
    with pytest.raises(BoxerValidationError) as caught:
        client_of("http://h", headers={"Authorization: Bearer hunter2": ""})
    assert "hunter2" not in str(caught.value)


def test_credentials_show_nowhere(client_of: Clients, caplog: pytest.LogCaptureFixture) -> None:
    secret, token = "s3" + "cret", "t0" + "ken"
    caplog.set_level(0)
    with Peer.answering(answer("", "401 Unauthorized"), answer("", "503 Busy"), WELL) as peer:
        client = client_of(f"http://me:{secret}@{peer.authority}", headers={"X-Token": token})
        with pytest.raises(BoxerAPIError) as refused:
            client.run("i", ["c"])
        assert client.download_file("a", retries=1) == b'{"ok": true}' and "trying again" in caplog.text
    with pytest.raises(BoxerConnectionError) as unreachable:
        client.health()
    with pytest.raises(BoxerValidationError) as forgotten:
        client.run("i", ["c"], env=[secret])
    with pytest.raises(BoxerValidationError) as not_a_list:
        client.run("i", ["c"], env=f"KEY={secret}")
    shown = [all_text(error.value) for error in (refused, unreachable, forgotten, not_a_list)]
    for url in (f"http://me:{secret}@h:0", f"ftp://me:{secret}@h", f"http://me:{secret}@h/ x", f"http://{secret}@a*"):
        with pytest.raises(BoxerValidationError) as invalid:
            client_of(url)
        shown.append(all_text(invalid.value))
    everything = "".join([*shown, caplog.text, repr(client), str(client)])
    for hidden in (secret, token, base64.b64encode(f"me:{secret}".encode()).decode()):
        assert hidden not in everything


LEAKS: dict[str, list[Any]] = {
    "an error": [Do.REQUEST, failing(BROKEN), Do.REQUEST, failing(BROKEN)],
    "a redirect": [Do.REQUEST, failing("302 Found", Location="http://a/")],
    "a malformed answer": [Do.REQUEST, b"HTTP/1.1 200 OK\n\n", Do.DRAIN],
    "a lost connection": [Do.REQUEST, Do.RST],
    "no answer": [Do.REQUEST],
}


@pytest.mark.parametrize("name", LEAKS)
@pytest.mark.parametrize("is_proxied", [False, True], ids=["straight", "proxied"])
def test_secrets_are_never_shown(
    client_of: Clients, clock: Clock, setenv: Any, caplog: pytest.LogCaptureFixture, name: str, is_proxied: bool
) -> None:
    caplog.set_level(logging.DEBUG)
    with Peer([LEAKS[name]]) as peer:
        setenv("http_proxy", peer.url.replace("//", "//joe:hunter2@"))
        url = peer.url.replace("127.0.0.1", "boxer.test" if is_proxied else "127.0.0.1").replace("//", "//ann:hunter2@")
        client = client_of(url, headers={"X-Token": "hunter2"}, retries=1, timeout=0.5 if name == "no answer" else 30)
        error = outcome(client, run(env={"KEY": "hunter2"}))
        assert isinstance(error, BoxerError) and "hunter2" not in all_text(error)
        assert not [text for text in (repr(client), str(client), caplog.text) if "hunter2" in text]


# Each row: the host of a URL, the value of NO_PROXY, and whether a request goes straight there.
NETWORKS = [
    ("10.1.2.3", "10.0.0.0/8", True),
    ("11.1.2.3", "10.0.0.0/8", False),
    ("10.1.2.3", "192.168.0.0/16 , 10.1.0.0/16", True),
    ("10.1.2.3", "10.2.0.0/16,10.3.0.0/16", False),
    ("10.1.2.3", "10.1.2.3/32", True),
    ("10.1.2.3", "10.1.2.4/31", False),
    ("10.1.2.3", "10.9.9.9/8", True),
    ("10.1.2.3", "0.0.0.0/0", True),
    ("10.1.2.3", "10.1.2.3", True),
    ("10.1.2.3", "10.0.0.0/99,nonsense/8,/,/8,10.0.0.0/,10.1.2.3/x,1.2/3", False),
    ("10.1.2.3", "10.0.0.0/99,nonsense/8,10.0.0.0/8", True),
    ("10.1.2.3", "fd00::/8", False),
    ("10.1.2.3", "10.1.2", False),
    ("[fd00::1]", "fd00::/8", True),
    ("[2001:db8::1]", "fd00::/8", False),
    ("[fd00::1]", "::/0", True),
    ("[fd00::1]", "0.0.0.0/0", False),
    ("[fd00::1]", "fd00::1", True),
    ("[fd00::1]", "FD00:0:0::1", True),
    ("[FD00:0::1]", "fd00::1", True),
    ("[fd00::1]", "[fd00::1]", True),
    ("[fd00::1]", "a.test, fd00::1/128", True),
    ("[fd00::1]", "fd00::2", False),
    ("[fd00::1]", "[fd00::1]:<port>", True),
    ("boxer.test.", "boxer.test", True),
    ("boxer.test.", ".test", True),
    ("boxer.test.", "other.test", False),
    ("boxer.test", "10.0.0.0/8", False),
    ("boxer.test", "0.0.0.0/0, ::/0", False),
]


@pytest.mark.parametrize("variable", ["no_proxy", "NO_PROXY"])
@pytest.mark.parametrize(("host", "value", "is_straight"), NETWORKS)
def test_no_proxy_may_name_networks_and_addresses(
    client_of: Clients, setenv: Any, host: str, value: str, is_straight: bool, variable: str
) -> None:
    with Frail(lambda _: [RAN]) as straight, Frail(lambda _: [RAN]) as proxy:
        setenv("http_proxy", f"http://{proxy.authority}")
        setenv(variable, value.replace("<port>", str(straight.port)))
        assert client_of(f"http://{host}:{straight.port}").run("image", ["true"]) == RESULT
    assert (straight.connections, proxy.connections) == ((1, 0) if is_straight else (0, 1))


def test_no_proxy_may_name_networks_of_https(client_of: Clients, setenv: Any, ca: trustme.CA) -> None:
    setenv("https_proxy", refused_url())
    setenv("no_proxy", "10.0.0.0/8")
    with Host(lambda _: [RAN], context=serving(ca, "10.1.2.3")) as host:
        client = client_of(f"https://10.1.2.3:{host.port}", ssl_context=trusting(ca))
        assert client.run("image", ["true"]) == RESULT


@pytest.mark.parametrize("host", ["notlocalhost.test", "localhost.test", "localhost.boxer.test."])
def test_what_only_looks_like_this_machine_goes_through_a_proxy(client_of: Clients, setenv: Any, host: str) -> None:
    with Host(lambda _: [RAN]) as proxy:
        setenv("http_proxy", proxy.url)
        assert client_of(f"http://{host}:9").run("image", ["true"]) == RESULT


BAD_URLS = {
    "localhost:8080": "http://", "ftp://h": "http://", "h": "http", "http://": "host", "http://a*b": "host",
    "http://h:0": "port", "http://h:99999": "port", "http://h:8o80": "port", "http://h /": "space",
    " http://h": "space", "http://h/?a=b": "query", "http://h\ud800": "", "http://a%3Ab:p@h": "colon",
}  # fmt: skip


@pytest.mark.parametrize("url", BAD_URLS, ids=ascii)
def test_a_bad_url_says_where_it_comes_from(client_of: Clients, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    if "\ud800" in url and sys.platform == "win32":
        pytest.skip("no such value can be set here")
    monkeypatch.setenv("BOXER_URL", url.replace("\ud800", "\udcff"))
    with pytest.raises(BoxerValidationError, match="BOXER_URL") as of_variable:
        client_of()
    monkeypatch.setenv("BOXER_URL", "http://fine")
    with pytest.raises(BoxerValidationError) as of_argument:
        client_of(url)
    assert "BOXER_URL" not in str(of_argument.value)
    for error in (of_variable, of_argument):
        assert BAD_URLS[url] in str(error.value)


@pytest.mark.parametrize("url", ["http://me:{}@h:0", "http://me:{}/x@h", "http://me:{}#x@h", "http://me:{}?x@h:80"])
@pytest.mark.parametrize("where", ["argument", "BOXER_URL", "http_proxy"])
def test_a_bad_url_shows_no_password_even_if_it_is_where_the_port_should_be(
    client_of: Clients, setenv: Any, where: str, url: str
) -> None:
    secret = "hunter2"
    setenv("BOXER_URL", "http://boxer.test")
    if where != "argument":
        setenv(where, url.format(secret))
    with pytest.raises(BoxerValidationError) as caught:
        client_of(url.format(secret) if where == "argument" else None)
    assert secret not in str(caught.value) + repr(vars(caught.value)) and caught.value.__context__ is None


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_with_a_bad_port_is_said_to_be_the_proxy(client_of: Clients, setenv: Any, scheme: str) -> None:
    setenv(f"{scheme}_proxy", "http://proxy.test:99999")
    with pytest.raises(BoxerValidationError, match="proxy") as caught:
        client_of(f"{scheme}://boxer.test")
    assert "port" in str(caught.value) and "base_url" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Wire: whatever bytes a server sends
# ---------------------------------------------------------------------------------------------------------------------

# ENDED: dropped, and the server has closed it after what it sent. EXCESS: dropped, if the excess comes at once.
KEPT, DROPPED, ENDED, EXCESS = "kept", "dropped", "ended", "excess"
LONG_RUN: dict[str, Any] = {**RUN, "stdout": "y" * 5000}
# What a server says to a run, what comes of it, what becomes of the connection.
ANSWERS: list[tuple[bytes, Any, str]] = [
    (RAN, RESULT, KEPT),
    (raw(LENGTH.lower(), body=JSON_RUN), RESULT, KEPT),
    (raw(LENGTH, LENGTH, body=JSON_RUN), RESULT, KEPT),
    (raw(f"{LENGTH}, {len(JSON_RUN)}", body=JSON_RUN), RESULT, KEPT),
    (raw(f"Content-Length:\t{len(JSON_RUN)} \t", "X:", 'Y: \xe9\t"', body=JSON_RUN), RESULT, KEPT),
    (raw(LENGTH, status="HTTP/1.1 200 ", body=JSON_RUN), RESULT, KEPT),
    (raw("A: b\r\n c", f"Content-Length:\r\n\t {len(JSON_RUN)}", "D: e \r\n ", body=JSON_RUN), RESULT, KEPT),
    (raw(IN_CHUNKS, body=chunks(trailer=b"A: b\r\n c\r\n")), RESULT, KEPT),
    (raw(LENGTH, *("A: b" for _ in range(99)), body=JSON_RUN), RESULT, KEPT),
    (raw(status="HTTP/1.1 100 Continue") + raw("Link: x", status="HTTP/1.1 103 Early Hints") + RAN, RESULT, KEPT),
    (raw(status="HTTP/1.1 102 Processing") * 20 + RAN, RESULT, KEPT),
    (raw(IN_CHUNKS, body=chunks()), RESULT, KEPT),
    (raw("transfer-encoding: CHUNKED", body=chunks(*[1] * 40)), RESULT, KEPT),
    (raw(IN_CHUNKS, body=chunks(8, 30, extension=b';a=b;c="d"', trailer=b"A: b\r\nC: d\r\n")), RESULT, KEPT),
    (raw(IN_CHUNKS, body=chunks(trailer=b"Content-Length: 5\r\n")), RESULT, KEPT),
    (raw(IN_CHUNKS, body=b"000%X\r\n%b\r\n00000\r\n\r\n" % (len(JSON_RUN), JSON_RUN)), RESULT, KEPT),
    (raw(IN_CHUNKS, body=chunks(2048, content=json.dumps(LONG_RUN).encode())), RunResult(**LONG_RUN), KEPT),
    (raw("Connection: x, Close", LENGTH, body=JSON_RUN), RESULT, DROPPED),
    (raw("Connection: x", "connection: CLOSE", IN_CHUNKS, body=chunks(5)), RESULT, DROPPED),
    (raw(LENGTH, body=JSON_RUN, status="HTTP/1.0 200 OK"), RESULT, DROPPED),
    (raw(LENGTH, "Connection: keep-alive", body=JSON_RUN, status="HTTP/1.0 200 OK"), RESULT, DROPPED),
    (raw(body=JSON_RUN), RESULT, ENDED),
    (raw(body=JSON_RUN, status="HTTP/1.0 200 OK"), RESULT, ENDED),
    (RAN + b"\r\n", RESULT, EXCESS),
    (RAN + RAN, RESULT, EXCESS),
    (raw(IN_CHUNKS, body=chunks(5)) + b"HTTP/1.1 200 OK\r\n", RESULT, EXCESS),
    # Not what was asked for.
    (raw(status="HTTP/1.1 204 No Content"), refusal(204, "JSON"), KEPT),
    (raw(LENGTH, status="HTTP/1.1 204 No Content"), refusal(204, "JSON"), KEPT),
    (raw(LENGTH, status="HTTP/1.1 304 Not Modified"), refusal(304, "304 Not Modified"), KEPT),
    (raw("Location: /a", "Content-Length: 0", status="HTTP/1.1 302 Found"), refusal(302, "Location: /a"), KEPT),
    (raw(body=b"no", status="HTTP/1.1 999 \xe9"), refusal(999, "999 \xe9: no"), ENDED),
    # No well-formed answer.
    (b"", lost(), ENDED),
    (raw(status="HTTP/1.1 100 Continue"), lost(), ENDED),
    (b"garbage", lost("HTTP"), DROPPED),
    (b"\x15\x03\x03\x00\x02\x02\x28", lost("HTTP"), DROPPED),  # a TLS alert
    (b"\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x05\x00\x00\x40\x00", lost("HTTP"), DROPPED),  # HTTP/2's settings
    (b"\r\n" + RAN, lost("HTTP"), DROPPED),
    *((raw(LENGTH, status=status, body=JSON_RUN), lost(), DROPPED) for status in (
        "HTTP/2.0 200 OK", "HTTP/2 200", "http/1.1 200 OK", "HTTP/1.1 20 OK", "HTTP/1.1 2000 OK", "HTTP/1.1  200 OK",
        "HTTP/1.1 099 OK", "HTTP/1.1 +20 OK", "HTTP/1.1\t200 OK", "HTTP/1.10 200 OK", "HTTP/1.1 200 O\x00K", "ICY 200",
        "HTTP/1.1 101 Switching Protocols", "HTTP/1.1 \xb2\xb2\xb2 OK", " HTTP/1.1 200 OK", "HTTP/1.1 200 O\rK")),
    (RAN.replace(b"\r\n", b"\n"), lost("CRLF"), DROPPED),
    (WELL.replace(b"\r\n", b"\n") + b"<p>\r\n", lost("CRLF"), DROPPED),
    (RAN.replace(b" OK\r\n", b" OK\n"), lost(), DROPPED),
    *((raw(LENGTH, field, body=JSON_RUN), lost("field"), DROPPED) for field in (
        "A : b", "A B: c", ": b", "A", "A: \0", "A: b\rC: d", "A\xe9: b", "A: b\x7f", "A(: b")),
    (raw(" A: b", LENGTH, body=JSON_RUN), lost("field"), DROPPED),
    *((raw(f"Content-Length: {length}", body=JSON_RUN), lost("Content-Length"), DROPPED) for length in (
        "+5", "-5", "0x5", "5_0", "5 5", "5\r\n 5", "5;5", "5, 6", "5,", "5\xa0", "5, 5\xa0", "\xb2", "1e2", "9" * 20,
        "five", "5.0", "")),
    (raw("Content-Length: 5", "Content-Length: 6", body=JSON_RUN), lost("Content-Length"), DROPPED),
    (raw(LENGTH, IN_CHUNKS, body=chunks()), lost("Transfer-Encoding"), DROPPED),
    (raw(IN_CHUNKS, LENGTH, body=chunks()), lost("Transfer-Encoding"), DROPPED),
    (raw(IN_CHUNKS, body=chunks(), status="HTTP/1.0 200 OK"), lost("Transfer-Encoding"), DROPPED),
    *((raw(f"Transfer-Encoding: {coding}", body=chunks()), lost("Transfer-Encoding"), DROPPED) for coding in (
        "gzip", "gzip, chunked", "chunked, chunked", "identity", "chunked;q=1", "xchunked", "chunked,", "")),
    *((raw(IN_CHUNKS, body=size + b"\r\n" + JSON_RUN + b"\r\n0\r\n\r\n"), lost("chunk"), DROPPED) for size in (
        b"+5", b"-5", b"0x5", b"5_0", b" 5", b"5 5", b"g", b"", b"1" + b"0" * 16, b"5\n", b"5\r", b"\xb2", b"5;a\0b")),
    (raw(IN_CHUNKS, body=chunks().replace(b"}\r\n", b"}..")), lost("chunk"), DROPPED),
    (raw(IN_CHUNKS, body=chunks().replace(b"}\r\n", b"}\n")), lost("chunk"), DROPPED),
    (raw(IN_CHUNKS, body=b"%x\r\n%b\r\n0\r\n\r\n" % (len(JSON_RUN) - 1, JSON_RUN)), lost("chunk"), DROPPED),
    (raw(IN_CHUNKS, body=chunks(trailer=b"A : b\r\n")), lost("field"), DROPPED),
    (raw(IN_CHUNKS, body=chunks(trailer=b" A: b\r\n")), lost("field"), DROPPED),
    (raw(IN_CHUNKS, body=chunks(trailer=b"A: b\r\n" * 101)), lost("fields"), DROPPED),
    (raw(IN_CHUNKS, body=chunks()[:-5]), lost("content"), ENDED),
    (raw(LENGTH, body=JSON_RUN[:-1]), lost("content"), ENDED),
    (raw("A: " + "b" * 65536, LENGTH, body=JSON_RUN), lost("65536"), DROPPED),
    (raw(LENGTH, *("A: b" for _ in range(100)), body=JSON_RUN), lost("100 fields"), DROPPED),
    (raw(status="HTTP/1.1 100 Continue") * 21 + RAN, lost("interim"), DROPPED),
]  # fmt: skip
# The same for a download.
FILE_ANSWERS: list[tuple[bytes, Any, str]] = [
    (answer(b"\r\n\x00\xff" * 5000), b"\r\n\x00\xff" * 5000, KEPT),
    (answer(), b"", KEPT),
    (raw(IN_CHUNKS, body=chunks(1, 300, content=bytes(1000))), bytes(1000), KEPT),
    (raw(IN_CHUNKS, body=b"0\r\n\r\n"), b"", KEPT),
    (raw(body=b"abc"), b"abc", ENDED),
    (raw(), b"", ENDED),
    (raw("Content-Length: 999999999999999999", body=b"abc"), lost("content"), ENDED),
    (raw("Content-Length: 3", body=b"ab"), lost("content"), ENDED),
    (raw(IN_CHUNKS, body=b"FFFFFFFFFFFFFFF\r\nabc"), lost("content"), ENDED),
]  # fmt: skip


@pytest.mark.parametrize("drip", [False, True], ids=["whole", "dripped"])
@pytest.mark.parametrize(("call", "answers"), [(RUN_IT, ANSWERS), (DOWNLOAD, FILE_ANSWERS)], ids=["run", "download"])
def test_whatever_a_server_says_comes_to_what_it_should(
    client_of: Clients, call: Call, answers: list[tuple[bytes, Any, str]], drip: bool
) -> None:
    def respond(request: Received) -> list[Any]:
        if "/healthz" in request.line:
            return [WELL_AND_BYE]
        pieces = [said[at : at + 1] for at in range(len(said))] if drip else [said]
        return [*pieces, Do.FIN] if fate == ENDED else pieces

    with Host(respond) as host:
        client = client_of(host.url, timeout=20, retries=0)
        for said, expected, fate in answers:
            if drip and (len(said) > 8192 or fate == EXCESS):
                continue
            before = host.connections
            got = outcome(client, call)
            assert is_expected(got, expected), (said[:300], got)
            assert client.health(), said[:300]
            assert host.connections - before == (1 if fate == KEPT else 2), said[:300]


@pytest.mark.parametrize("end", [Do.FIN, Do.RST])
@pytest.mark.parametrize("said", [
    raw(LENGTH, body=JSON_RUN),
    raw(status="HTTP/1.1 103 Early Hints") + raw(IN_CHUNKS, body=chunks(7, extension=b";a=b", trailer=b"A: b\r\n")),
], ids=["sized", "chunked"])  # fmt: skip
def test_an_answer_cut_off_anywhere_is_no_answer(client_of: Clients, said: bytes, end: Do) -> None:
    pieces = iter([said[:cut] for cut in range(len(said) + 1)])
    with Host(lambda request: [WELL] if "/healthz" in request.line else [next(pieces), end]) as host:
        client = client_of(host.url, timeout=20)
        for cut in range(len(said)):
            assert is_expected(outcome(client, RUN_IT), lost(host.authority)), said[:cut]
        assert client.health()
        got = outcome(client, RUN_IT)
        assert got == RESULT or (end is Do.RST and is_expected(got, lost()))


def test_an_answer_may_come_in_any_two_pieces(client_of: Clients) -> None:
    said = raw(status="HTTP/1.1 103 Early Hints") + raw(IN_CHUNKS, body=chunks(7, 1, trailer=b"A: b\r\n"))
    pairs = iter([[said[:cut], said[cut:]] for cut in range(1, len(said))])
    with Host(lambda _: next(pairs)) as host:
        client = client_of(host.url, timeout=20)
        for _ in range(1, len(said)):
            assert client.run("image", ["true"]) == RESULT
    assert host.connections == 1


ENDLESS = {
    "status line": (raw()[:-4], b"x" * 1000, lost("65536")),
    "field": (raw() [:-2] + b"A: ", b"x" * 1000, lost("65536")),
    "head": (raw()[:-2], b"A: b\r\n", lost("65536")),
    "row of interim answers": (b"", raw(status="HTTP/1.1 103 Early Hints"), lost("interim")),
    "chunk extension": (raw(IN_CHUNKS) + b"5;", b"x" * 1000, lost("chunk")),
    "chunk size": (raw(IN_CHUNKS), b"0" * 1000, lost("chunk")),
    "trailer": (raw(IN_CHUNKS) + b"0\r\n", b"A: b\r\n", lost("65536")),
    "error page": (raw(status="HTTP/1.1 502 Bad Gateway"), b"oops" * 1000, refusal(502, "oops")),
    "error page in chunks": (raw(IN_CHUNKS, status="HTTP/1.1 502 Bad"), b"5\r\noops!\r\n", refusal(502, "oops")),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDLESS)
def test_an_endless_answer_comes_to_an_end(client_of: Clients, name: str) -> None:
    start, more, expected = ENDLESS[name]
    endless = itertools.chain([start], itertools.repeat(more))
    with Host(lambda request: [WELL] if "/healthz" in request.line else endless) as host:
        client = client_of(host.url, timeout=60)
        got = outcome(client, RUN_IT)
        assert is_expected(got, expected), got
        assert len(str(got)) < 3000
        assert client.health()


HARD_LINES = {"spaces": "A: b" + " " * 60_000 + "c\r\n d", "folds": "A: b" + "\r\n " * 15_000 + "c"}


@pytest.mark.parametrize("name", HARD_LINES)
def test_a_head_made_to_take_long_takes_little_time(client_of: Clients, name: str) -> None:
    said = raw(HARD_LINES[name], f"A: {client_of.kind}", LENGTH, body=JSON_RUN)  # no head that was decoded before
    with Peer.answering(said) as peer:
        client, start = client_of(peer.url), time.process_time()
        assert client.run("image", ["true"]) == RESULT
        assert time.process_time() - start < 1


def test_an_answer_to_a_run_is_not_taken_in_without_bounds(client_of: Clients) -> None:
    mebibyte = b"100000\r\n" + b" " * MIB + b"\r\n"
    endless: list[Any] = [answer(None, Transfer_Encoding="chunked"), (mebibyte for _ in iter(int, 1)), Do.DRAIN]
    with Peer([[Do.REQUEST, *endless], [Do.REQUEST, WELL]]) as peer:
        client = client_of(peer.url)
        assert is_expected(outcome(client, RUN_IT), (BoxerAPIError, 200, "256 MiB"))
        assert client.health()


# Folded lines


FOLDED = "Content-Length:\r\n 3", "Connection: keep-alive,\r\n\tclose", "X: a\r\n \t b\r\n  c: d"


def test_a_folded_field_line_is_one_line(client_of: Clients) -> None:
    with Peer([[Do.REQUEST, raw(*FOLDED, body=b"abc"), Do.DRAIN], [Do.REQUEST, WELL]]) as peer:
        client = client_of(peer.url)
        assert client.download_file("a.txt") == b"abc"
        assert client.health()  # on another connection, as the second line says


def test_a_fold_is_read_as_spaces(client_of: Clients) -> None:
    moved = raw("Location: one\r\n two\r\n\t three", "Content-Length: 0", status="HTTP/1.1 302 Found")
    with Peer.answering(moved) as peer:
        assert is_expected(outcome(client_of(peer.url), RUN_IT), refusal(302, "Location: one two three"))


def test_a_fold_within_a_number_makes_it_none(client_of: Clients) -> None:
    with Peer([[Do.REQUEST, raw("Content-Length: 1\r\n 1", body=b"abcdefghijk"), Do.DRAIN]]) as peer:
        assert is_expected(outcome(client_of(peer.url), DOWNLOAD), lost("Content-Length"))


@pytest.mark.parametrize("fold", [" ", "\t"], ids=["a space", "a tab"])
def test_a_status_line_cannot_be_folded(client_of: Clients, fold: str) -> None:
    said = f"HTTP/1.1 200 OK\r\n{fold}X: a\r\nContent-Length: 3\r\n\r\nabc".encode()
    with Peer([[Do.REQUEST, said, Do.DRAIN]]) as peer:
        assert is_expected(outcome(client_of(peer.url), DOWNLOAD), lost("malformed"))


@pytest.mark.parametrize("trailer", ["A: b\r\n c", "A: b\r\n\tc\r\nD: e"])
def test_a_trailer_may_be_folded(client_of: Clients, trailer: str) -> None:
    said = raw(IN_CHUNKS, body=b"3\r\nabc\r\n0\r\n" + trailer.encode() + b"\r\n\r\n")
    with Peer.answering(said, WELL) as peer:
        client = client_of(peer.url)
        assert client.download_file("a.txt") == b"abc" and client.health()


def test_a_trailer_does_not_begin_with_a_fold(client_of: Clients) -> None:
    said = raw(IN_CHUNKS, body=b"3\r\nabc\r\n0\r\n A: b\r\n\r\n")
    with Peer([[Do.REQUEST, said, Do.DRAIN]]) as peer:
        assert is_expected(outcome(client_of(peer.url), DOWNLOAD), lost("malformed"))


# ---------------------------------------------------------------------------------------------------------------------
# Wire: what other readers of HTTP make of the same bytes
# ---------------------------------------------------------------------------------------------------------------------

# What a reader makes of an answer: its status and, of a 200, its content. None: the reader refuses it.
Verdict = Union[tuple[int, Union[bytes, None]], None]


def verdict(status: int, content: bytes) -> Verdict:
    return status, content if status == 200 else None


def verdict_of(result: Any) -> Verdict:
    """Return the verdict of a client that returned or raised this."""
    if isinstance(result, BoxerAPIError):
        return result.status_code, None
    assert isinstance(result, (bytes, BoxerConnectionError)), result
    return verdict(200, result) if isinstance(result, bytes) else None


def heard_by_h11(said: bytes) -> Verdict:
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
    connection.send(h11.EndOfMessage())
    for data in (said, b""):
        connection.receive_data(data)
    status, content = 0, b""
    try:
        while not isinstance(event := connection.next_event(), h11.EndOfMessage):
            status = event.status_code if isinstance(event, h11.Response) else status
            content += event.data if isinstance(event, h11.Data) else b""
    except h11.RemoteProtocolError:
        return None
    return verdict(status, content)


def heard_by_http_client(said: bytes) -> Verdict:
    sock: Any = types.SimpleNamespace(makefile=lambda _: io.BytesIO(said))
    with contextlib.closing(http.client.HTTPResponse(sock)) as response:
        try:
            response.begin()
            return verdict(response.status, response.read())
        except (http.client.HTTPException, OverflowError):
            return None


ORACLES = {"h11": heard_by_h11, "http.client": heard_by_http_client}
STRICTER = "this client alone refuses it"  # and it has to, wherever the predicate holds
LAXER = "this client alone takes it"


def values(lines: Sequence[bytes], name: bytes) -> list[bytes]:
    """Return the values that a field has in these lines, with the whitespace around them."""
    pairs = [line.partition(b":") for line in lines]
    return [value for found, _, value in pairs if found.lower() == name]


def items(fields: Sequence[bytes]) -> list[bytes]:
    """Return the items of fields whose values are lists."""
    return [item.strip(b" \t") for value in fields for item in value.split(b",")]


def has_unfit_framing(lines: Sequence[bytes]) -> bool:
    """Tell whether the framing in these lines is none that is right, or none that h11 knows."""
    codings, lengths = values(lines, b"transfer-encoding"), values(lines, b"content-length")
    is_sized = len(set(items(lengths))) <= 1 and all(re.fullmatch(b"[0-9]{1,20}", item) for item in items(lengths))
    return not is_sized or [coding.strip(b" \t").lower() for coding in codings] not in ([], [b"chunked"])


def any_of(pattern: bytes, lines: Iterable[bytes]) -> bool:
    """Tell whether a pattern, in which a dot is any byte, is the whole of any line."""
    return any(re.fullmatch(pattern, line, re.DOTALL) for line in lines)


OTHER_END = "the oracle finds another end"  # whatever that then comes to


class Parts:
    """An answer taken apart at its line ends, whatever is wrong with it. It judges nothing: the table below does."""

    def __init__(self, said: bytes) -> None:
        self.heads: list[list[bytes]] = []  # status lines and fields; of the interim answers, and of the final one
        self.sizes: list[int] = []  # how many lines there are below each status line
        self.folded: list[bytes] = []  # the names of fields that go on in another line
        is_interim = True
        while is_interim:
            head, blank, said = said.partition(b"\r\n\r\n")
            self.heads.append(self._unfolded(head.split(b"\r\n")))
            self.sizes.append(head.count(b"\r\n"))
            is_interim = bool(blank and re.match(rb"HTTP/1\.[0-9] 1[0-9]{2}( |\Z)", self.heads[-1][0]))
        self.is_head_cut = not blank
        self.version, self.status = self.heads[-1][0][:8], self.heads[-1][0][9:12]
        self.has_content = self.status not in (b"204", b"304")
        self.codings = values(self.heads[-1], b"transfer-encoding") if self.has_content else []
        self.lengths = values(self.heads[-1], b"content-length") if self.has_content else []
        self.chunk_heads: list[bytes] = []
        self.chunk_ends: list[bytes] = []
        self.trailer: list[bytes] = []
        self.are_chunks_cut = bool(self.codings) and not self._are_chunks_whole(said)
        self.sections = [*(head[1:] for head in self.heads), self.trailer]
        self.fields = [line for section in self.sections for line in section]
        self.lines = [*(head[0] for head in self.heads), *self.fields]

    def _are_chunks_whole(self, body: bytes) -> bool:
        size = -1
        while size != 0:
            line, end, body = body.partition(b"\r\n")
            self.chunk_heads.append(line)
            digits = re.match(rb"[0-9A-Fa-f]+(?=[ \t;]|\Z)", line)
            if not end or not digits:
                return end != b""  # what follows a head that is none is anyone's guess
            size = int(digits[0], 16)
            if size > 0:
                self.chunk_ends.append(body[size : size + 2])
                body = body[size + 2 :]
        if body.startswith(b"\r\n"):
            return True
        section, blank, _ = body.partition(b"\r\n\r\n")
        self.trailer = self._unfolded([b"", *section.split(b"\r\n")])[1:] if section else []
        return bool(blank)

    def _unfolded(self, lines: list[bytes]) -> list[bytes]:
        """Join the lines of each field; the first line is none, and the second cannot continue it."""
        joined = lines[:2]
        for line in lines[2:]:
            if line[:1] in (b" ", b"\t"):
                self.folded.append(joined[-1].partition(b":")[0].lower())
                joined[-1] = joined[-1].rstrip(b" \t") + b" " + line.lstrip(b" \t")
            else:
                joined.append(line)
        return joined


class Difference(NamedTuple):
    """How this client may differ from an oracle: in what answers, as a predicate knows them, and why."""

    kind: str
    oracles: str
    is_in: Callable[[Parts], bool]
    example: bytes
    why: str


NAME = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
FIVE = "Content-Length: 5"
BOTH = "h11 http.client"
DIFFERENCES = {
    # Lines.
    "a bare LF in a head or trailer section": Difference(
        STRICTER, BOTH, lambda it: any(b"\n" in line for line in it.lines),
        raw("A: b\nC: d", FIVE, body=b"hello"),
        "RFC 9112, 2.2 allows to take it for a line's end; who does sees other lines than who does not"),
    "a bare CR in a head or trailer section": Difference(
        STRICTER, "http.client", lambda it: any(b"\r" in line for line in it.lines),
        raw("A: b\rC: d", FIVE, body=b"hello"),
        "RFC 9112, 2.2: it makes the element invalid, or is a space; http.client takes it for a line's end"),
    "a NUL in a head or trailer section": Difference(
        STRICTER, "http.client", lambda it: any(b"\0" in line for line in it.lines),
        raw("A: b\0", FIVE, body=b"hello"),
        "RFC 9110, 5.5: the message is to be rejected, or the NUL to be replaced"),
    "another control character in a head or trailer section": Difference(
        STRICTER, BOTH, lambda it: any_of(rb".*[\x01-\x08\x0b\x0c\x0e-\x1f\x7f].*", it.lines),
        raw("A: b\x01", FIVE, body=b"hello"),
        "RFC 9110, 5.5 and RFC 9112, 4: neither a value nor a reason has any; to retain those in values is optional"),
    "a line that has no field's name before a colon": Difference(
        STRICTER, "http.client", lambda it: any(not re.match(NAME + b":", line) for line in it.fields),
        raw("A : b", FIVE, body=b"hello"),
        "RFC 9112, 5.1 and 5: a name is a token, and no space follows it; http.client ends the section there"),
    "a folded Transfer-Encoding": Difference(
        OTHER_END, "http.client", lambda it: any(name == b"transfer-encoding" for name in it.folded),
        raw("Transfer-Encoding:\r\n chunked", body=chunks(content=b"hello")),
        "RFC 9112, 5.2: a fold is a space; http.client keeps it, and takes the chunks themselves for content"),
    "another version of HTTP": Difference(
        STRICTER, "h11", lambda it: any_of(rb"HTTP/[02-9]\.[0-9] [0-9]{3}( .*)?", [it.heads[-1][0]]),
        raw(FIVE, status="HTTP/2.0 200 OK", body=b"hello"),
        "RFC 9110, 2.5: another major version is another syntax"),
    "a status line that is none": Difference(
        STRICTER, "http.client", lambda it: not any_of(rb"HTTP/1\.[0-9] [1-9][0-9]{2}( .*)?", [it.heads[-1][0]]),
        raw(FIVE, status="HTTP/1.1  2_0_0 OK", body=b"hello"),
        "RFC 9112, 4: one space, three digits, one space; http.client takes what split() and int() do"),
    # How much there is.
    "more than 100 fields": Difference(
        STRICTER, BOTH, lambda it: any(len(section) > 100 for section in it.sections),
        raw(IN_CHUNKS, body=b"5\r\nhello\r\n0\r\n" + b"A: b\r\n" * 101 + b"\r\n"),
        "RFC 9110, 5.4 leaves the limit to each recipient; http.client has one for heads alone"),
    "100 fields": Difference(
        LAXER, "http.client", lambda it: any(size > 99 for size in it.sizes),
        raw(FIVE, *["A: b"] * 99, body=b"hello"),
        "RFC 9110, 5.4 leaves the limit to each recipient; http.client counts lines, and the empty one"),
    "more than 20 interim answers": Difference(
        STRICTER, BOTH, lambda it: len(it.heads) > 21,
        raw(status="HTTP/1.1 100 Continue") * 21 + raw(FIVE, body=b"hello"),
        "RFC 9110, 15.2 has no limit; without one an answer need never begin"),
    "a chunk's head of more than 4 KiB": Difference(
        STRICTER, BOTH, lambda it: any(len(line) > 4096 for line in it.chunk_heads),
        raw(IN_CHUNKS, body=chunks(content=b"hello", extension=b";" + b"x" * 4096)),
        "RFC 9112, 7.1.1 advises a limit for extensions, if to servers alone; without one a chunk need never begin"),
    # Interim answers, and others without content.
    "101": Difference(
        STRICTER, "http.client", lambda it: any_of(rb"HTTP/1\.[0-9] 101( .*)?", [head[0] for head in it.heads]),
        raw(status="HTTP/1.1 101 Switching Protocols") + raw(FIVE, body=b"hello"),
        "RFC 9110, 7.8: it answers an Upgrade, which was not sent; http.client leaves that to its caller"),
    "an interim answer other than 100": Difference(
        OTHER_END, "http.client", lambda it: any(head[0][9:12] not in (b"100", b"101") for head in it.heads[:-1]),
        raw(status="HTTP/1.1 103 Early Hints") + raw(FIVE, body=b"hello"),
        "RFC 9110, 15.2: a client has to go past any it did not ask for; http.client takes it for the final one"),
    "unfit framing of an answer without content": Difference(
        LAXER, "h11", lambda it: any(map(has_unfit_framing, it.heads[: -1 if it.has_content else None])),
        raw("Content-Length: five", status="HTTP/1.1 204 No Content"),
        "RFC 9112, 6.3: a 1xx, 204 or 304 ends with its head, whatever fields are there"),
    "unfit framing in a trailer section": Difference(
        LAXER, "h11", lambda it: has_unfit_framing(it.trailer),
        raw(IN_CHUNKS, body=chunks(content=b"hello", trailer=b"Content-Length: five\r\n")),
        "RFC 9110, 6.5.1: a trailer is not to be used for framing, so that what it says of it does not matter"),
    "chunks announced by an answer without content": Difference(
        LAXER, "http.client", lambda it: not it.has_content and values(it.heads[-1], b"transfer-encoding") != [],
        raw(IN_CHUNKS, status="HTTP/1.1 304 Not Modified"),
        "RFC 9112, 6.3: a 204 or 304 ends with its head, whatever fields are there; http.client waits for chunks"),
    # Which framing it is.
    "Transfer-Encoding beside Content-Length": Difference(
        STRICTER, BOTH, lambda it: it.codings != [] and it.lengths != [],
        raw(FIVE, IN_CHUNKS, body=chunks(content=b"hello")),
        "RFC 9112, 6.3: Transfer-Encoding overrides it, and it ought to be handled as an error: it may be smuggling"),
    "Transfer-Encoding in HTTP/1.0": Difference(
        STRICTER, BOTH, lambda it: it.codings != [] and it.version == b"HTTP/1.0",
        raw(IN_CHUNKS, status="HTTP/1.0 200 OK", body=chunks(content=b"hello")),
        "RFC 9112, 6.1: the framing is to be treated as faulty"),
    "a Transfer-Encoding that is not chunked alone": Difference(
        STRICTER, "http.client", lambda it: [item.lower() for item in items(it.codings)] not in ([], [b"chunked"]),
        raw("Transfer-Encoding: gzip, chunked", body=chunks(content=b"hello")),
        "RFC 9112, 7.4: no other coding was asked for; http.client takes what is coded for the content"),
    "whitespace after chunked": Difference(
        OTHER_END, "http.client", lambda it: any_of(rb"[ \t]*chunked[ \t]+", map(bytes.lower, it.codings)),
        raw(IN_CHUNKS + " ", body=chunks(content=b"hello")),
        "RFC 9110, 5.5: it is not part of the value; http.client takes the chunks themselves for content"),
    # Content-Length.
    "a Content-Length that is no number": Difference(
        STRICTER, "http.client", lambda it: any(not re.fullmatch(b"[0-9]+", item) for item in items(it.lengths)),
        raw("Content-Length: +5", body=b"hello"),
        "RFC 9110, 8.6: digits; else, RFC 9112, 6.3, an unrecoverable error; http.client takes what int() does"),
    "several values of Content-Length": Difference(
        STRICTER, "http.client", lambda it: len(set(items(it.lengths))) > 1,
        raw(FIVE, "Content-Length: 6", body=b"hello!"),
        "RFC 9112, 6.3: an unrecoverable error; http.client takes the first, or reads to the end"),
    "the same Content-Length several times in one field": Difference(
        OTHER_END, "http.client", lambda it: any(b"," in value for value in it.lengths),
        raw("Content-Length: 5, 5", body=b"hello, hello"),
        "RFC 9112, 6.3: it holds if all are the same; http.client reads to the end"),
    "a Content-Length of more than 18 digits": Difference(
        STRICTER, BOTH, lambda it: any_of(b"[0-9]{19,}", items(it.lengths)),
        raw(f"Content-Length: {5:019}", body=b"hello"),
        "RFC 9110, 8.6: a recipient has to prevent errors from overflow; a limit does, at the price of a few zeros"),
    # Chunks.
    "the size of a chunk is no number": Difference(
        STRICTER, "http.client", lambda it: any(
            not any_of(rb"[0-9A-Fa-f]+[ \t]*([;\n].*)?", [line]) for line in it.chunk_heads),
        raw(IN_CHUNKS, body=b"0x5\r\nhello\r\n0\r\n\r\n"),
        "RFC 9112, 7.1: hexadecimal digits; http.client takes what int() does"),
    "the size of a chunk of more than 15 digits": Difference(
        STRICTER, BOTH, lambda it: any_of(b"[0-9A-Fa-f]{16}.*", it.chunk_heads),
        raw(IN_CHUNKS, body=b"%016x\r\nhello\r\n0\r\n\r\n" % 5),
        "RFC 9112, 7.1: a recipient has to prevent errors from overflow; a limit does, at the price of a few zeros"),
    "whitespace after the size of a chunk": Difference(
        STRICTER, BOTH, lambda it: any_of(rb"[0-9A-Fa-f]+[ \t]+", it.chunk_heads),
        raw(IN_CHUNKS, body=b"5 \r\nhello\r\n0\r\n\r\n"),
        "RFC 9112, 7.1 has none"),
    "whitespace before the extension of a chunk": Difference(
        LAXER, "h11", lambda it: any_of(rb"[0-9A-Fa-f]+[ \t]+;.*", it.chunk_heads),
        raw(IN_CHUNKS, body=b"5 ;a=b\r\nhello\r\n0\r\n\r\n"),
        "RFC 9112, 7.1.1 has it, as bad whitespace, which recipients have to take: RFC 9110, 5.6.3"),
    "a bare LF in a chunk's head": Difference(
        STRICTER, "http.client", lambda it: any(b"\n" in line for line in it.chunk_heads),
        raw(IN_CHUNKS, body=b"5\nhello\r\n0\r\n\r\n"),
        "RFC 9112, 7.1: CRLF; the licence of 2.2 is for lines of heads; http.client takes it for a line's end"),
    "another control character in a chunk's head": Difference(
        STRICTER, BOTH, lambda it: any_of(rb".*[\x00-\x08\x0b-\x1f\x7f].*", it.chunk_heads),
        raw(IN_CHUNKS, body=b"5;a\x01\r\nhello\r\n0\r\n\r\n"),
        "RFC 9112, 7.1.1: an extension has none"),
    "a chunk that does not end with CRLF": Difference(
        STRICTER, "http.client", lambda it: any_of(rb"(?!\r\n)..", it.chunk_ends),
        raw(IN_CHUNKS, body=b"5\r\nhello--0\r\n\r\n"),
        "RFC 9112, 7.1: CRLF; http.client does not look at these two bytes"),
    # Cut off.
    "a head without an end": Difference(
        STRICTER, "http.client", lambda it: it.is_head_cut,
        raw("A: b")[:-4],
        "RFC 9112, 8: what is missing may be what gives it its meaning"),
    "a last chunk or a trailer section without an end": Difference(
        STRICTER, "http.client", lambda it: it.are_chunks_cut,
        raw(IN_CHUNKS, body=b"5\r\nhello\r\n0\r\n"),
        "RFC 9112, 8 would do with the chunk of size 0; but 7.1 has an empty line at the end of the message"),
}  # fmt: skip


def explanations(said: bytes, oracle: str, ours: Verdict, theirs: Verdict) -> list[str]:
    """Return the names of the differences in the table that allow these verdicts."""
    parts, kind = Parts(said), STRICTER if ours is None else LAXER if theirs is None else OTHER_END
    return [
        name
        for name, one in DIFFERENCES.items()
        if oracle in one.oracles and one.kind in (kind, OTHER_END) and one.is_in(parts)
    ]


Hear = Callable[..., list[Any]]


@pytest.fixture
def hear(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hear]:
    """Return what a download comes to, with each client, when a server sends these bytes and closes.

    They are received in pieces of the sizes that are given; what comes together is else for the system to say.
    """
    receive, receive_into = socket.socket.recv, socket.socket.recv_into
    left: Iterator[int] = iter(())

    def receive_less(sock: socket.socket, size: int, *flags: int) -> bytes:
        return receive(sock, min(size, next(left, size)) if sock.family == socket.AF_INET else size, *flags)

    def receive_less_into(sock: socket.socket, buffer: Any) -> int:
        return receive_into(sock, memoryview(buffer)[: next(left, None)] if sock.family == socket.AF_INET else buffer)

    def heard(said: bytes, sizes: Sequence[int] = ()) -> list[Any]:
        nonlocal left
        with Host(lambda _: [said, Do.FIN]) as host:
            settings: dict[str, Any] = {"base_url": host.url, "timeout": 30, "retries": 0}
            results = []
            for client in (BoxerClient(**settings), PlainCalls(AsyncBoxerClient(**settings), clients.loop)):
                left = iter(sizes)
                with client:
                    results.append(outcome(client, DOWNLOAD))
            return results

    monkeypatch.setattr(socket.socket, "recv", receive_less)
    monkeypatch.setattr(socket.socket, "recv_into", receive_less_into)
    with contextlib.closing(Clients("async")) as clients:
        yield heard


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_difference_from_other_readers_is_there(hear: Hear, name: str) -> None:
    difference = DIFFERENCES[name]
    said = difference.example
    for ours in map(verdict_of, hear(said)):
        for oracle in difference.oracles.split():
            theirs = ORACLES[oracle](said)
            assert ours != theirs
            assert (ours is None, theirs is None) == (difference.kind == STRICTER, difference.kind == LAXER)
            assert explanations(said, oracle, ours, theirs) == [name]  # so that the table needs it


# How answers are spoilt: what may be replaced, and what with, in which X is what was there.
WRONG_VALUES = ["", " 5", " 5, 5", " 6", " +5", " chunked", "chunked\t", " gzip", " chunked, chunked", " b\r\n c"]
WRONG_FIELDS = [" A: b", "Content-Length : 5", "Transfer-Encoding\n: chunked", ": b", "A", "A: b\rC: d"]
WRONG_FIELDS += [f"{name}:{value}" for name in ("Content-Length", "Transfer-Encoding") for value in WRONG_VALUES]
WRONG_LINES = [
    *(f"{field}\r\n".encode() for field in WRONG_FIELDS),
    *(b"A: b\r\n" * 99, b"A: b\r\n" * 101, b"5\r\nhello\r\n", b"0\r\n\r\n", b"0x5\r\nhello\r\n", b"\r\n"),
    *(raw(status=f"HTTP/{status}") for status in ("1.1 100 ", "1.1 101 ", "1.0 200", "2.0 200", "1.1 204")),
    raw(status="HTTP/1.1 100 Continue") * 21,
]
SPOILERS = [
    (rb"\r\n", [*b"\n|\r||\n\n|--|XX|X |X\t".split(b"|"), *(b"X" + line for line in WRONG_LINES)]),
    (rb"[0-9A-Fa-f]+", b"+X|-X|0xX|X_0|X.0|X,X|X,6|X, 6|00000000000000X|000000000000000000X|F|1|0".split(b"|")),
    (rb"[0-9A-Fa-f]+", [*b"X | X|X\xa0|X;a|X ;a|X;\x01|X\n".split(b"|"), b"X" * 20, b"X;" + b"x" * 4096]),
    (rb"HTTP|[12]|[a-z]+", b"|X | X|2|1.0|\0|GZIP, X|X\t|xX|X,X".split(b"|")),
    (rb".+", b'|XX| |\t|\0|\x01|\x0b|\x7f|\xb2|\xff|:|,|;|"|X\n|X\r'.split(b"|")),
]


@st.composite
def valid_answers(draw: st.DrawFn) -> bytes:
    """Make answers that are as they should be, and what follows them on the connection."""
    content = draw(st.sampled_from([b"hello", b"0\r\n\r\n", b""]) | st.binary(max_size=9))
    fields = draw(st.lists(st.sampled_from(["A: b", "X:", 'Y: \xe9\t"', "connection:close"]), max_size=3))
    lengths = [f"{len(content)}", f"{len(content)}, {len(content)}", f"{len(content):018}"]
    framings = [IN_CHUNKS, "transfer-encoding:CHUNKED", *(f"Content-Length: {length}" for length in lengths)]
    framing = draw(st.sampled_from(framings))
    statuses = ["1.1 200 OK", "1.1 200 ", "1.1 200", "1.9 200 OK", "1.1 204 No", "1.1 304 No", "1.1 404 \xe9"]
    body, status = content, "HTTP/" + draw(st.sampled_from(statuses[:1] * 4 + statuses))
    if "unked" in framing.lower():
        sizes = draw(st.lists(st.integers(1, 5), max_size=3))
        more = {"extension": st.sampled_from([b"", b";a", b' ;a="b"']), "trailer": st.sampled_from([b"", b"T: u\r\n"])}
        body = chunks(*sizes, content=content, **draw(st.fixed_dictionaries(more)))
    elif draw(st.booleans()):
        status = status.replace("1.1", "1.0")
    if draw(st.integers(0, 3)):
        fields.insert(draw(st.integers(0, len(fields))), framing)
    interim = [raw(status="HTTP/1.1 100 Continue"), raw("A: b", status="HTTP/1.1 103 Early Hints")]
    before = draw(st.sampled_from([[], [], [], [], interim[:1], interim[1:], interim]))
    after = draw(st.sampled_from([b"", b"\r\n", b"hello", RAN]))
    return b"".join([*before, raw(*fields, status=status, body=body), after])


@st.composite
def answers(draw: st.DrawFn) -> bytes:
    """Make answers with some things replaced, cut off or not."""
    tokens = re.findall(rb"\r\n|[0-9]+|[0-9A-Za-z]+|.", draw(valid_answers()), re.DOTALL)
    line_end = draw(st.sampled_from([b"\r\n"] * 9 + [b"\n"]))
    tokens = [line_end if token == b"\r\n" else token for token in tokens]
    for _ in range(draw(st.integers(0, 3))):
        what, replacements = draw(st.sampled_from(SPOILERS))
        replacement = draw(st.sampled_from(replacements) | st.binary(min_size=1, max_size=1))
        if places := [place for place, token in enumerate(tokens) if re.fullmatch(what, token, re.DOTALL)]:
            place = draw(st.sampled_from(places))
            tokens[place] = replacement.replace(b"X", tokens[place])
    is_cut = draw(st.integers(0, 9)) == 9
    return b"".join(tokens[: draw(st.integers(0, len(tokens)))] if is_cut else tokens)


@examples()
@hypothesis.given(said=answers(), sizes=st.lists(st.integers(1, 40), max_size=9) | st.just([1] * 200))
def test_an_answer_is_taken_for_what_other_readers_take_it_for(hear: Hear, said: bytes, sizes: list[int]) -> None:
    whole, in_pieces = hear(said), hear(said, sizes)
    ours = verdict_of(whole[0])
    for sync, asynchronous in (whole, in_pieces):
        assert repr(sync) == repr(asynchronous)
        assert verdict_of(sync) == ours
    parts = Parts(said)
    for name, difference in DIFFERENCES.items():
        assert ours is None or difference.kind != STRICTER or not difference.is_in(parts), name
    for oracle, heard_by in ORACLES.items():
        theirs = heard_by(said)
        assert theirs == ours or explanations(said, oracle, ours, theirs), oracle


# ---------------------------------------------------------------------------------------------------------------------
# Both clients: their methods, and what version 0.1.0 had
# ---------------------------------------------------------------------------------------------------------------------

# The signatures of version 0.1.0.
CLIENTS_0_1_0: dict[str, Any] = {
    "__init__": lambda self, base_url="http://localhost:8080", timeout=120.0: 0,
    "health": lambda self: 0,
    "run": lambda self, image, cmd, *, env=None, cwd="/", limits=None, files=None, persist=False, network=None: 0,
    "upload_file": lambda self, remote_path, content: 0,
    "upload_path": lambda self, local_path, remote_path=None: 0,
    "download_file": lambda self, path: 0,
}
OTHERS_0_1_0: dict[str, Any] = {
    "ResourceLimits": lambda cpu_cores=None, memory_mb=None, pids_limit=None, wall_clock_secs=None, nofile=None: 0,
    "RunResult": lambda exec_id, exit_code, stdout, stderr, wall_ms: 0,
    "BoxerAPIError": lambda message, status_code: 0,
    "BoxerTimeoutError": lambda message, status_code: 0,
    "BoxerOutputLimitError": lambda message, status_code: 0,
}
SIGNATURES = [
    *[(old, getattr(cls, name)) for cls in (BoxerClient, AsyncBoxerClient) for name, old in CLIENTS_0_1_0.items()],
    *[(old, getattr(boxer, name)) for name, old in OTHERS_0_1_0.items()],
]
# Defaults that are another value and mean the same, or (base_url) the same where BOXER_URL is not set.
SAME_DEFAULTS = {("base_url", "http://localhost:8080"): None, ("cwd", "/"): None}


@pytest.mark.parametrize(("old", "new"), SIGNATURES, ids=lambda one: one.__qualname__)
def test_every_call_of_version_0_1_0_still_means_the_same(old: Any, new: Any) -> None:
    parameters = list(inspect.signature(new).parameters.values())
    for position, parameter in enumerate(inspect.signature(old).parameters.values()):
        same = next(one for one in parameters if one.name == parameter.name)
        assert same.kind == parameter.kind
        assert parameters.index(same) == position or parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert same.default == SAME_DEFAULTS.get((parameter.name, parameter.default), parameter.default)
    for parameter in parameters:
        is_new = parameter.name not in inspect.signature(old).parameters
        is_optional = parameter.default is not parameter.empty
        assert not is_new or (is_optional and (parameter.kind is parameter.KEYWORD_ONLY or parameter.name == "outputs"))


METHODS = ("health", "wait_until_ready", "run", "send", "upload_file", "upload_path", "download_file", "download_path")


def test_every_name_of_version_0_1_0_is_still_there() -> None:
    names = "AsyncBoxerClient BoxerAPIError BoxerClient BoxerError BoxerOutputLimitError BoxerTimeoutError"
    assert {*names.split(), "ResourceLimits", "RunResult"} <= set(boxer.__all__) <= set(dir(boxer))
    for name in (*METHODS, "aclose"):
        assert inspect.iscoroutinefunction(getattr(AsyncBoxerClient, name))
    assert not inspect.iscoroutinefunction(BoxerClient.close)


def test_the_clients_have_the_same_methods_and_parameters() -> None:
    for name in METHODS:
        ours, theirs = (inspect.signature(getattr(cls, name)) for cls in (BoxerClient, AsyncBoxerClient))
        assert ours == theirs


def test_a_client_pickles_as_its_settings(client_of: Clients) -> None:
    with Peer([[Do.REQUEST, WELL], [Do.REQUEST, answer("", "503 Busy"), Do.REQUEST, WELL]]) as peer:
        url, settings = f"http://me:pw@{peer.authority}/x", {"retries": 0, "headers": {"X-A": "b"}}
        assert client_of(url, timeout=9, **settings).health()
        made = client_of.cls(url, timeout=9, **settings)
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
            again = pickle.loads(pickle.dumps(made, protocol))
            assert type(again) is client_of.cls and repr(again) == repr(made)
            client_of.take(again).close()
        client = client_of.take(pickle.loads(pickle.dumps(made)))
        client_of.take(made)
        with pytest.raises(BoxerAPIError):
            client.run("i", ["c"])
        assert client.health()
    first, _, last = (request for requests in peer.requests for request in requests)
    assert (last.line, last.fields) == (first.line, first.fields)


# Functions that are sent to a worker without the module, and the types that tools see

WORKER = """
import pickle, sys
sys.modules["boxer"] = None  # wherever it may be installed
try:
    import boxer
except ImportError:
    print(pickle.load(sys.stdin.buffer)(sys.argv[1]))
"""


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_function_that_uses_a_client_can_be_sent_to_a_worker_without_the_module(tmp_path: Path, kind: str) -> None:
    cloudpickle: Any = importlib.import_module("cloudpickle")

    def use(url: str) -> str:
        with BoxerClient(url) as client:
            result = client.run("image", ["true"], limits=ResourceLimits(wall_clock_secs=9), timeout=30)
            client.upload_file("a.txt", io.BytesIO(b"content"))
            try:
                client.download_file("a.txt")
            except BoxerError as error:
                return f"{result.stdout.strip()}, {str(error)[:2]}, {isinstance(error, BoxerAPIError)}"
        raise AssertionError

    async def use_async(url: str) -> str:
        async with AsyncBoxerClient(url) as client:
            result = await client.run("image", ["true"], limits=ResourceLimits(wall_clock_secs=9), timeout=30)
            await client.upload_file("a.txt", io.BytesIO(b"content"))
            try:
                await client.download_file("a.txt")
            except BoxerError as error:
                return f"{result.stdout.strip()}, {str(error)[:2]}, {isinstance(error, BoxerAPIError)}"
        raise AssertionError

    def use_in_a_loop(url: str) -> str:
        return asyncio.run(use_async(url))

    function = use if kind == "sync" else use_in_a_loop
    answers = {"POST /run": RAN, "POST /files": STORED}
    with Host(lambda request: [answers.get(request.line.rpartition(" ")[0], failing("404 Not Found"))]) as host:
        assert use(host.url) == use_in_a_loop(host.url) == "hi, no, True"
        with BoxerClient(host.url) as client:
            assert client.run("image", ["true"]) == RESULT
            cloudpickle.register_pickle_by_value(boxer)
            try:
                pickled = cloudpickle.dumps(function)  # with a connection of this process open
            finally:
                cloudpickle.unregister_pickle_by_value(boxer)
        line = [sys.executable, "-W", "error", "-c", WORKER, host.url]
        done = subprocess.run(line, cwd=tmp_path, input=pickled, capture_output=True, timeout=60)
    assert (done.stderr.decode(), done.stdout.decode().strip()) == ("", "hi, no, True")


@pytest.mark.parametrize("cls", [BoxerClient, AsyncBoxerClient])
def test_tools_can_read_the_types_of_every_method(cls: type) -> None:
    methods = [method for name, method in inspect.getmembers(cls, inspect.isfunction) if name[0] != "_"]
    assert len(methods) == len(METHODS) + 2
    for method in (cls.__init__, *methods):  # type: ignore[misc]
        parameters = set(inspect.signature(method).parameters)
        assert set(typing.get_type_hints(method)) == parameters - {"self"} | {"return"}


ERRORS = (BoxerError, BoxerAPIError, BoxerConnectionError, BoxerExitError, BoxerOutputLimitError, BoxerTimeoutError)
DATA = (ResourceLimits, RunRequest, RunResult)


@pytest.mark.parametrize("cls", [*DATA, *ERRORS, BoxerValidationError])
def test_tools_can_read_the_types_of_data_and_errors(cls: type) -> None:
    hints = typing.get_type_hints(cls)
    assert {field.name for field in dataclasses.fields(cls)} <= set(hints) if dataclasses.is_dataclass(cls) else True
    for name, method in inspect.getmembers(cls, inspect.isfunction):
        if name == "__init__" or name[0] != "_":
            assert set(typing.get_type_hints(method)) >= set(inspect.signature(method).parameters) - {"self"}
    for _, attribute in inspect.getmembers(cls, lambda it: isinstance(it, property)):
        assert "return" in typing.get_type_hints(attribute.fget)


@pytest.mark.parametrize("cls", [BoxerClient, AsyncBoxerClient])
def test_every_parameter_but_the_first_ones_is_optional_for_tools(cls: type) -> None:
    required = {"run": ["image", "cmd"], "upload_file": ["remote_path", "content"]}
    required.update(upload_path=["local_path"], download_file=["path"], download_path=["path", "local_path"])
    required.update(send=["request"], run_many=["requests"])
    for name, method in inspect.getmembers(cls, inspect.isfunction):
        if name == "__init__" or name[0] != "_":
            parameters = list(inspect.signature(method).parameters.values())[1:]
            without = [parameter.name for parameter in parameters if parameter.default is inspect.Parameter.empty]
            assert without == required.get(name, [])


@pytest.mark.parametrize("cls", [BoxerClient, AsyncBoxerClient])
@pytest.mark.parametrize("name", sorted({*METHODS, "run_many"} - {"wait_until_ready"}))
def test_the_default_of_a_call_s_timeout_says_whose_it_is(cls: type, name: str) -> None:
    default = inspect.signature(getattr(cls, name)).parameters["timeout"].default
    assert default is not ... and default is not None and "client's" in repr(default)
    assert pickle.loads(pickle.dumps(default)) is default is copy.deepcopy(default)


def test_the_default_of_a_call_s_timeout_can_be_given(client_of: Clients) -> None:
    default = inspect.signature(BoxerClient.run).parameters["timeout"].default
    with Peer([[Do.REQUEST, Do.DRAIN]]) as peer:
        client = client_of(peer.url, timeout=0.2)
        assert is_expected(outcome(client, RUN_IT, timeout=default), (BoxerTimeoutError, 0, "0.2 s"))


@pytest.mark.parametrize("owner", [BoxerClient.run, AsyncBoxerClient.run, RunRequest])
def test_tools_know_the_networks_and_take_any_other_text(owner: Any) -> None:
    hint = typing.get_type_hints(owner)["network"]
    kinds = typing.get_args(hint)
    literals = [value for kind in kinds for value in typing.get_args(kind)]
    assert {"none", "sandbox", "host"} <= set(literals) and {str, type(None)} <= set(kinds)


OLD_PYTHON = """
import sys

sys.version_info = (3, 8, 18, "final", 0)
try:
    import boxer
except ImportError as error:
    print(error)
"""


def test_a_python_that_is_too_old_is_told_so_in_one_line(tmp_path: Path) -> None:
    said = program_beside_boxer(tmp_path, OLD_PYTHON)
    assert "3.9" in said and said.count("\n") == 1


def test_a_python_that_is_too_old_can_read_what_tells_it_so() -> None:
    ast.parse(Path(inspect.getfile(boxer)).read_text("utf-8"), feature_version=(3, 8))


def python_3_8() -> str | None:
    """Return a Python 3.8 that works, if this machine has one: on the PATH, or of pyenv's."""
    installed = Path.home().glob(".pyenv/versions/3.8.*/bin/python3.8")
    for candidate in filter(None, [found("python3.8"), *map(str, installed)]):
        done = subprocess.run([candidate, "--version"], capture_output=True, text=True, timeout=60)
        if done.returncode == 0 and done.stdout.startswith("Python 3.8."):
            return candidate
    return None


def test_a_copied_file_says_under_python_3_8_that_it_needs_3_9(tmp_path: Path) -> None:
    program = python_3_8()
    if program is None:
        pytest.skip("this machine has no Python 3.8")
    shutil.copy(inspect.getfile(boxer), tmp_path / "boxer.py")
    line = [program, "-E", "-S", "-c", "import boxer"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    last = done.stderr.strip().split("\n")[-1]
    assert done.returncode == 1 and last.startswith("ImportError: ") and "3.9" in last and "boxer" in last


# ---------------------------------------------------------------------------------------------------------------------
# Both clients: connections
# ---------------------------------------------------------------------------------------------------------------------


def test_a_row_of_calls_uses_one_connection(client_of: Clients) -> None:
    with Peer.answering(*[WELL, RAN, STORED, answer("abc"), answer({"error": "no"}, "404 Not Found")] * 10) as peer:
        client = client_of(peer.url)
        for _ in range(10):
            got = [outcome(client, call) for call in (GET_HEALTH, RUN_IT, PUT_FILE, DOWNLOAD, DOWNLOAD)]
            assert got[:4] == [True, RESULT, None, b"abc"] and got[4].status_code == 404
    assert peer.connections == 1


def test_calls_at_once_use_no_more_connections_than_allowed(client_of: Clients) -> None:
    four = threading.Barrier(4)  # an answer comes once four requests wait for one: all four connections are in use

    def respond(request: Received) -> list[bytes]:
        four.wait(30)
        return [answer({**RUN, "stdout": request.json["cmd"][0]})]

    with Host(respond) as host:
        client = client_of(host.url, max_connections=4)
        results = gather(client, [run(str(n)) for n in range(40)])
        assert [result.stdout for result in results] == [str(n) for n in range(40)]
    assert host.connections == 4


def test_hundreds_of_calls_at_once_get_their_own_answers(client_of: Clients) -> None:
    with Host(lambda request: [answer({**RUN, "stdout": request.json["cmd"][0] * 500})]) as host:
        client = client_of(host.url, max_connections=16)
        results = gather(client, [run(f"{n} ") for n in range(800)])
        assert [result.stdout for result in results] == [f"{n} " * 500 for n in range(800)]
    assert host.connections <= 16


def in_rows(client: Any, rows: Sequence[Sequence[Call]]) -> list[list[Any]]:
    """Let as many callers as there are rows make their calls, each one after the other; return the results."""

    async def row(calls: Sequence[Call]) -> list[Any]:
        return [await getattr(client.client, method)(*args, **kwargs) for method, args, kwargs in calls]

    async def together() -> list[list[Any]]:
        return await asyncio.gather(*map(row, rows))

    if isinstance(client, PlainCalls):
        return client.loop.run_until_complete(together())
    with ThreadPoolExecutor(len(rows)) as executor:
        return list(executor.map(lambda calls: [do(client, call) for call in calls], rows))


@pytest.mark.parametrize(("connections", "calls"), [(32, 1_600), (5, 1_600)])
def test_callers_who_make_thousands_of_calls_get_their_own_answers(
    client_of: Clients, connections: int, calls: int
) -> None:
    names = [[f"{caller}:{n}" for n in range(calls // 32)] for caller in range(32)]
    with Host(lambda request: [answer({**RUN, "stdout": request.json["cmd"][0]})]) as host:
        rows = in_rows(client_of(host.url, max_connections=connections), [[run(name) for name in row] for row in names])
        assert [[result.stdout for result in row] for row in rows] == names
    assert host.connections <= 2 * connections  # on a busy machine, one may be idle for so long that it is replaced


def test_many_files_go_over_eight_connections_at_most(client_of: Clients, many: Path) -> None:
    with store() as server:
        client = client_of(server.url)
        remote = client.upload_path(many, "m")
        assert remote == [f"m/{number:02}.txt" for number in range(40)]
        assert [client.download_file(path) for path in remote] == [b"%d" % number for number in range(40)]
        assert server.connections <= 8


def test_eight_files_are_sent_at_a_time(client_of: Clients, many: Path) -> None:
    for path in sorted(many.iterdir())[8:]:
        path.unlink()
    all_are_there = threading.Barrier(8, timeout=20)
    script: list[PeerStep] = [Do.REQUEST, lambda _: all_are_there.wait(), STORED]
    with Peer([script] * 8) as peer:
        assert len(client_of(peer.url).upload_path(many)) == 8


def test_an_upload_that_fails_in_the_middle_ends_them_all(client_of: Clients, many: Path) -> None:
    all_are_there = threading.Barrier(8, timeout=20)

    def refuse(number: int) -> Callable[[Any], None]:
        def step(sock: Any) -> None:
            all_are_there.wait()
            if b"m/05.txt" in peer.requests[number][0].body:
                sock.sendall(answer({"error": "upload exceeds limit"}, "413 Too Large", Connection="close"))

        return step

    script: list[list[PeerStep]] = [[Do.REQUEST, refuse(number)] for number in range(8)]
    with Peer([*script, [Do.REQUEST, WELL]]) as peer:
        client = client_of(peer.url)
        with pytest.raises(BoxerAPIError, match=r"^upload exceeds limit.*m/05\.txt") as caught:
            client.upload_path(many, "m")
        assert caught.value.status_code == 413
        assert client.health()


# What happens on an idle connection, before the next call.
IDLE_EVENTS: dict[str, list[Any]] = {
    "it is closed": [Do.HALF_CLOSE],
    "it is reset": [Do.RST],
    "a second answer comes": [answer({**RUN, "stdout": "not yours"})],
    "a part of an answer comes": [b"HTTP/1.1 200 OK\r\n"],
    "a 408 comes and it is closed": [answer("Request Time-out", "408 Request Timeout"), Do.HALF_CLOSE],
}


@pytest.mark.parametrize("event", IDLE_EVENTS)
def test_an_idle_connection_that_anything_happened_to_is_not_used_again(client_of: Clients, event: str) -> None:
    is_idle, has_happened = threading.Event(), threading.Event()
    steps = [lambda _: is_idle.wait(30), *IDLE_EVENTS[event], lambda _: has_happened.set()]
    end = Do.FIN if Do.RST in steps else Do.DRAIN
    with Peer([[Do.REQUEST, WELL, *steps, end], [Do.REQUEST, RAN]]) as peer:
        client = client_of(peer.url)
        assert client.health()
        is_idle.set()
        assert has_happened.wait(30)
        assert client.run("image", ["true"]) == RESULT


def test_a_connection_that_was_idle_for_long_is_not_used_again(client_of: Clients, clock: Clock) -> None:
    with Peer([[Do.REQUEST, WELL, Do.REQUEST, WELL], [Do.REQUEST, WELL]]) as peer:
        client = client_of(peer.url)
        for _ in range(2):
            assert client.health()
        clock.ahead += 30
        assert client.health()


def test_a_connection_that_is_idle_behind_a_busy_one_is_closed(client_of: Clients, clock: Clock) -> None:
    both = threading.Barrier(2)

    def respond(request: Received) -> list[Any]:
        return [both.wait if "/run" in request.line else bytes, RAN if "/run" in request.line else WELL]

    with Host(respond) as host:
        client = client_of(host.url)
        assert gather(client, [RUN_IT, RUN_IT]) == [RESULT, RESULT]
        for _ in range(4):
            clock.ahead += 3
            assert client.health()
        assert gather(client, [RUN_IT, RUN_IT]) == [RESULT, RESULT]
    assert host.connections == 3


def test_a_connection_on_which_more_of_an_answer_is_to_come_is_not_used_again(client_of: Clients) -> None:
    head = b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 100000\r\n\r\n"
    with Peer([[Do.REQUEST, head + b"." * 70_000, Do.GONE], [Do.REQUEST, WELL]]) as peer:
        client = client_of(peer.url)
        assert is_expected(outcome(client, RUN_IT), refusal(502, "502 Bad Gateway: ..."))
        assert client.health()


def test_a_connection_is_not_used_again_when_more_came_than_large_content(client_of: Clients) -> None:
    """The rest comes with the content's last bytes, and is not received with them."""
    content = bytes(60_000)
    with Host(lambda request: [answer(content) + b"more"] if "files" in request.line else [WELL]) as host:
        client = client_of(host.url)
        assert client.download_file("large") == content
        assert client.health()
        assert client.download_file("large") == content
    assert host.connections == 2


def test_a_connection_that_ends_with_its_answer_is_closed_at_once(client_of: Clients) -> None:
    with Peer([[Do.REQUEST, b"HTTP/1.1 200 OK\r\n\r\nwell", Do.FIN]]) as peer:
        client = client_of(peer.url)
        before = open_descriptors()
        assert client.health()
        assert settles(lambda: open_descriptors() <= before)


def test_when_nobody_answers_the_error_names_host_and_port(client_of: Clients) -> None:
    with socket.socket() as bound:  # and does not listen
        bound.bind(("127.0.0.1", 0))
        authority = f"127.0.0.1:{bound.getsockname()[1]}"
        client = client_of(f"http://{authority}/x", retries=0)
        for method, args in [("health", ()), *EVERY_METHOD]:
            with pytest.raises(BoxerConnectionError, match=rf"^{re.escape(authority)}: ") as caught:
                getattr(client, method)(*args)
            assert isinstance(caught.value.__cause__, OSError) and not caught.value.request_sent


def test_an_address_that_cannot_be_reached_is_a_connection_error(client_of: Clients) -> None:
    got = outcome(client_of("http://[fe80::1]:9", retries=0), RUN_IT)  # link-local, and no link is named
    assert is_expected(got, lost("fe80::1:9: no connection could be made")) and not got.request_sent


def test_a_name_nobody_knows_is_a_connection_error(client_of: Clients, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any, **__: Any) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    got = outcome(client_of("http://boxer.test", retries=0), RUN_IT)
    assert is_expected(got, lost("boxer.test:80: no connection could be made")) and not got.request_sent


@contextlib.contextmanager
def no_more_descriptors() -> Any:
    """Leave this process without a descriptor to open."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.dup(0)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken[0] + 8, hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_running_out_of_descriptors_is_a_connection_error(client_of: Clients) -> None:
    client = client_of("http://127.0.0.1:9")
    with no_more_descriptors():
        got = outcome(client, GET_HEALTH)
    assert is_expected(got, lost("127.0.0.1:9: no connection could be made")) and not got.request_sent
    assert isinstance(got.__cause__, OSError) and got.__cause__.errno == errno.EMFILE


def test_an_upload_out_of_memory_that_has_gone_is_broken_off(client_of: Clients, tmp_path: Path) -> None:
    """A send fails, and the connection has not: as when the system has no room, or a firewall does not let it."""
    if client_of.kind == "async" and sys.version_info < (3, 12):
        pytest.skip("asyncio copies what could not be sent at once, which the memory that has gone is fatal for")
    path, received = tmp_path / "file", list[bytes]()
    path.touch()
    os.truncate(path, LONG)

    def take(sock: Any) -> None:
        os.truncate(path, 8 * MIB)
        all_of_it(sock, received)

    with path.open("rb") as file, mmap.mmap(file.fileno(), LONG, prot=mmap.PROT_READ) as content:
        with Peer([[take, Do.FIN], [Do.REQUEST, WELL]]) as peer:
            client = client_of(peer.url)
            error = outcome(client, upload(memoryview(content)))
            assert is_expected(error, lost("Bad address")) and error.request_sent
            assert client.health()
        del error  # and with its traceback the frames that have the content
        gc.collect()
    assert len(b"".join(received)) <= 8 * MIB + 1000


def test_what_was_sent_is_let_go_of(client_of: Clients) -> None:
    content = bytearray(b"content")
    with Host(lambda _: [STORED]) as host:
        client = client_of(host.url)
        client.upload_file("a.txt", content)
        content.extend(b"!")  # a BufferError if anything still looks at it


# ---------------------------------------------------------------------------------------------------------------------
# Both clients: TLS
# ---------------------------------------------------------------------------------------------------------------------


def test_every_call_works_over_tls(client_of: Clients, ca: trustme.CA) -> None:
    content, seen = os.urandom(8 * MIB), {}

    def respond(request: Received) -> list[bytes]:
        seen[request.line] = request
        return [answer(content) if "GET" in request.line else RAN if "/run" in request.line else STORED]

    with Host(respond, context=serving(ca)) as host:
        client = client_of(host.url, ssl_context=trusting(ca))
        for source in (content, io.BytesIO(content), Unseekable(content)):
            client.upload_file("a.txt", source)
            assert content in seen["POST /files HTTP/1.1"].content
        assert do(client, BIG_RUN) == RESULT
        assert seen["POST /run HTTP/1.1"].json["env"] == ["BIG=" + "x" * 8 * MIB]
        assert client.download_file("a.txt") == content
        assert gather(client, [DOWNLOAD] * 4) == [content] * 4
    assert host.connections <= 5


def test_an_answer_that_comes_with_the_end_of_the_handshake_is_not_left_lying(
    client_of: Clients, ca: trustme.CA
) -> None:
    """Before TLS 1.3, it is the server's to end it: nothing more comes that could tell of the answer."""
    context = serving(ca)
    context.maximum_version = ssl.TLSVersion.TLSv1_2

    def refuse(sock: Any) -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing, server_side=True)
        is_done = False
        while not is_done:
            try:
                tls.do_handshake()
                tls.write(failing("503 Service Unavailable", "too many"))
                is_done = True
            except ssl.SSLWantReadError:
                pass
            sock.sendall(outgoing.read())
            incoming.write(b"" if is_done else sock.recv(65536))

    with Peer([[refuse, Do.DRAIN]]) as peer:
        client = client_of(peer.url.replace("http:", "https:"), ssl_context=trusting(ca), retries=0)
        assert is_expected(outcome(client, RUN_IT), refusal(503, "too many"))


def test_a_request_that_was_lost_within_tls_was_sent(client_of: Clients, ca: trustme.CA) -> None:
    def read_some(sock: Any) -> None:
        size = 0
        while size < 300_000:
            size += len(sock.recv(65536))

    with Peer([[read_some, Do.RST]], context=serving(ca, "127.0.0.1")) as peer:
        got = outcome(client_of(peer.url, ssl_context=trusting(ca)), BIG_RUN)
    assert is_expected(got, lost()) and got.request_sent and peer.connections == 1


def test_a_server_that_ends_tls_as_soon_as_it_has_begun_leaves_no_warning(
    client_of: Clients, ca: trustme.CA, caplog: pytest.LogCaptureFixture
) -> None:
    context = serving(ca, "127.0.0.1")
    context.maximum_version = ssl.TLSVersion.TLSv1_2  # the server has the last word

    def end(sock: Any) -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls, is_begun = context.wrap_bio(incoming, outgoing, server_side=True), False
        while not is_begun:
            with contextlib.suppress(ssl.SSLWantReadError):
                tls.do_handshake()
                is_begun = True
            if not is_begun:
                sock.sendall(outgoing.read())
                incoming.write(sock.recv(65536))
        with contextlib.suppress(ssl.SSLWantReadError):
            tls.unwrap()
        sock.sendall(outgoing.read())

    with Peer([[end, Do.DRAIN]]) as peer:
        client = client_of(peer.url.replace("http", "https"), ssl_context=trusting(ca), retries=0)
        assert isinstance(outcome(client, RUN_IT), BoxerConnectionError)
    assert not caplog.records


def test_a_download_over_tls_whose_connection_ends_with_it_is_written(
    client_of: Clients, ca: trustme.CA, tmp_path: Path
) -> None:
    with Host(lambda _: [answer(b"content", Connection="close"), Do.FIN], context=serving(ca, "127.0.0.1")) as host:
        client = client_of(host.url, ssl_context=trusting(ca))
        for _ in range(5):
            client.download_path("a", tmp_path / "a")
            assert (tmp_path / "a").read_bytes() == b"content"


def test_a_client_may_have_a_certificate(client_of: Clients, ca: trustme.CA) -> None:
    private = trustme.CA()
    context = serving(ca, clients=private)
    with Host(lambda _: [RAN], context=context) as host:
        with_one = client_of(host.url, ssl_context=trusting(ca, private.issue_cert("client@boxer.test")))
        assert with_one.run("image", ["true"]) == RESULT
    with Peer([[]], context=context) as peer:
        without = client_of(peer.url, ssl_context=trusting(ca), retries=0)
        assert is_expected(outcome(without, RUN_IT), lost(peer.authority))


def self_signed(ca: trustme.CA, folder: Path) -> ssl.SSLContext:
    (folder / "pem").write_bytes(ca.private_key_pem.bytes() + ca.cert_pem.bytes())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "pem")
    return context


YEARS = dt.timedelta(days=1000)
NOW = dt.datetime.now(dt.timezone.utc)
# Certificates with which a server fails to be boxer.test; and whether the client trusts the tests' own CA.
CERTIFICATES: dict[str, tuple[Callable[[trustme.CA, Path], ssl.SSLContext], bool]] = {
    "expired": (lambda ca, _: serving(ca, "boxer.test", not_before=NOW - 2 * YEARS, not_after=NOW - YEARS), True),
    "not yet valid": (lambda ca, _: serving(ca, "boxer.test", not_before=NOW + YEARS, not_after=NOW + 2 * YEARS), True),
    "of another host": (lambda ca, _: serving(ca, "other.test"), True),
    "of the hosts below": (lambda ca, _: serving(ca, "*.boxer.test"), True),
    "of its address": (lambda ca, _: serving(ca, "127.0.0.1"), True),
    "of another CA": (lambda _, __: serving(trustme.CA(), "boxer.test"), True),
    "of no CA": (lambda _, folder: self_signed(trustme.CA(), folder), True),
    "of a CA nobody was told of": (lambda ca, _: serving(ca, "boxer.test"), False),
    "of no CA, by default": (lambda _, folder: self_signed(trustme.CA(), folder), False),
}


@pytest.mark.parametrize("is_proxied", [False, True], ids=["straight", "proxied"])
@pytest.mark.parametrize("name", CERTIFICATES)
def test_a_certificate_that_does_not_hold_is_refused_and_not_tried_again(
    client_of: Clients, clock: Clock, setenv: Any, ca: trustme.CA, tmp_path: Path, name: str, is_proxied: bool
) -> None:
    context, is_trusting = CERTIFICATES[name]
    with Frail(lambda _: [RAN], context(ca, tmp_path), is_proxied) as host:
        if is_proxied:
            setenv("https_proxy", f"http://{host.authority}")
        client = client_of(f"https://boxer.test:{host.port}", ssl_context=trusting(ca) if is_trusting else None)
        error = outcome(client, RUN_IT)
        assert is_expected(error, lost("TLS failed")) and not error.request_sent
        assert f"boxer.test:{host.port}" in str(error)
        assert isinstance(error.__cause__, ssl.SSLCertVerificationError)
    assert (host.connections, host.seen, clock.pauses) == (1, [], [])


ADDRESSES = [("127.0.0.1", "127.0.0.2"), ("127.0.0.1", "localhost"), ("::1", "127.0.0.1")]


@pytest.mark.parametrize(("address", "other"), ADDRESSES)
def test_a_certificate_has_to_be_of_the_address_that_is_in_the_url(
    client_of: Clients, ca: trustme.CA, address: str, other: str
) -> None:
    with Peer.answering(RAN, host=address, context=serving(ca, address)) as peer:
        assert client_of(peer.url, ssl_context=trusting(ca)).run("image", ["true"]) == RESULT
    with Peer([[]], host=address, context=serving(ca, other)) as peer:
        assert is_expected(outcome(client_of(peer.url, ssl_context=trusting(ca)), RUN_IT), lost("TLS failed"))


def test_a_client_that_is_closed_as_tls_begins_leaves_no_timer(ca: trustme.CA) -> None:
    async def close_after(turns: int) -> None:
        client = AsyncBoxerClient(host.url.replace("http", "https"), ssl_context=trusting(ca), retries=0)
        call = asyncio.ensure_future(client.health())
        for _ in range(turns):
            await asyncio.sleep(0)
        await client.aclose()
        await asyncio.gather(call, return_exceptions=True)

    async def main() -> list[Any]:
        for turns in range(20):
            await close_after(turns)
        gc.collect()
        in_an_hour = asyncio.get_running_loop().time() + 3600
        timers = [each for each in gc.get_objects() if isinstance(each, asyncio.TimerHandle) and not each.cancelled()]
        return [timer for timer in timers if timer.when() > in_an_hour]

    with Frail(lambda _: [WELL], inside=serving(ca, "127.0.0.1")) as host:
        assert asyncio.run(main()) == []


def test_a_context_of_a_server_is_a_connection_error(client_of: Clients, ca: trustme.CA) -> None:
    with Peer([[]], context=serving(ca)) as peer:
        client = client_of(peer.url, ssl_context=ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), retries=0)
        assert is_expected(outcome(client, RUN_IT), lost("TLS failed"))


def test_without_an_ssl_context_the_cas_of_the_system_are_trusted(
    client_of: Clients, ca: trustme.CA, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "pem").write_bytes(ca.cert_pem.bytes())
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "pem"))
    with Peer.answering(RAN, context=serving(ca)) as peer:
        assert client_of(peer.url).run("image", ["true"]) == RESULT


def test_an_ssl_context_makes_no_tls_of_http(client_of: Clients, ca: trustme.CA) -> None:
    with Peer.answering(RAN) as peer:
        assert client_of(peer.url, ssl_context=trusting(ca)).run("image", ["true"]) == RESULT


def half_close(sock: Any) -> None:
    with contextlib.suppress(OSError):  # the client may have closed it already
        sock.shutdown(socket.SHUT_WR)


def test_plaintext_where_tls_should_be_is_a_connection_error(client_of: Clients, ca: trustme.CA) -> None:
    for said in (failing("400 Bad Request"), b"", b"\x16\x03\x01"):
        with Peer([[said, half_close, Do.DRAIN]]) as peer:
            client = client_of(peer.url.replace("http:", "https:"), ssl_context=trusting(ca), retries=0)
            error = outcome(client, RUN_IT)
            assert is_expected(error, lost(peer.authority)) and not error.request_sent
    with Peer([[Do.DRAIN]]) as peer:
        client = client_of(peer.url.replace("http:", "https:"), ssl_context=trusting(ca), timeout=0.2)
        assert is_expected(outcome(client, RUN_IT), (BoxerTimeoutError, 0, "0.2 s"))
    with Peer([[]], context=serving(ca)) as peer:
        error = outcome(client_of(peer.url.replace("https:", "http:"), retries=0), RUN_IT)
        assert is_expected(error, lost(peer.authority))


# Where an answer is cut off, and what comes of it, however TLS ends. Content without a length or chunks is never taken
# for whole: asyncio cannot tell the end of TLS from a connection that was cut.
TLS_ENDS: dict[str, tuple[bytes, Any]] = {
    "nowhere": (answer("abc", Connection="close"), b"abc"),
    "content that ends with the connection": (raw(body=b"abc"), lost("after 3 bytes")),
    "content of a length": (answer("abcd")[:-1], lost("after 3 bytes")),
    "chunks": (raw(IN_CHUNKS, body=b"3\r\nabc\r\n"), lost("after 3 bytes")),
    "the last chunk": (raw(IN_CHUNKS, body=b"3\r\nabc\r\n0\r\n"), lost("after 3 bytes")),
    "the head": (raw()[:-2], lost("within the head")),
    "the beginning": (b"", lost("before an answer")),
}


def cut_off(inside: ssl.SSLContext, said: bytes, end: str) -> Callable[[Any], None]:
    """Return a step that says something over TLS in answer to a request, and then no more."""

    def serve(sock: Any) -> None:
        with inside.wrap_socket(sock, server_side=True) as tls, tls.makefile("rb") as reader:
            _received(reader, with_body=True)
            tls.sendall(said)
            if end == "close_notify":
                close_notify(tls)
            if end == "garbage":
                socket.socket.sendall(tls, b"not TLS")
            if end == "RST":
                tls.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return serve


@pytest.mark.parametrize("is_proxied", [False, True], ids=["straight", "proxied"])
@pytest.mark.parametrize("end", ["close_notify", "FIN", "RST", "garbage"])
@pytest.mark.parametrize("where", TLS_ENDS)
def test_an_answer_that_is_cut_off_within_tls_is_no_answer(
    client_of: Clients, ca: trustme.CA, setenv: Any, where: str, end: str, is_proxied: bool
) -> None:
    said, expected = TLS_ENDS[where]
    opened: list[Any] = [Do.HEAD, ESTABLISHED] if is_proxied else []
    with Peer([[*opened, cut_off(serving(ca, "boxer.test"), said, end), Do.FIN]]) as peer:
        if is_proxied:
            setenv("https_proxy", peer.url)
        client = client_of(f"https://boxer.test:{peer.port}", ssl_context=trusting(ca), retries=0)
        got = outcome(client, DOWNLOAD)
        # Asyncio may drop what came together with bytes that are not TLS.
        is_lost = client_of.kind == "async" and end == "garbage" and is_expected(got, lost())
        assert is_lost or is_expected(got, expected), got


@pytest.mark.parametrize("is_proxied", [False, True], ids=["straight", "proxied"])
@pytest.mark.parametrize("host", ["boxer.test.", "Boxer.TEST.", "boxer.test"])
def test_tls_is_told_a_name_without_its_final_dot(
    client_of: Clients, setenv: Any, ca: trustme.CA, host: str, is_proxied: bool
) -> None:
    names: list[str | None] = []
    inside = serving(ca, "boxer.test")
    inside.sni_callback = lambda _socket, name, _context: names.append(name)
    with Frail(lambda _: [RAN], inside, is_proxied) as server:
        if is_proxied:
            setenv("https_proxy", f"http://{server.authority}")
        client = client_of(f"https://{host}:{server.port}", ssl_context=trusting(ca), retries=0)
        assert outcome(client, RUN_IT) == RESULT
    assert names == ["boxer.test"]


def test_a_certificate_of_another_name_does_not_hold_for_a_name_with_a_final_dot(
    client_of: Clients, setenv: Any, ca: trustme.CA
) -> None:
    with Frail(lambda _: [RAN], serving(ca, "other.test")) as server:
        client = client_of(f"https://boxer.test.:{server.port}", ssl_context=trusting(ca), retries=0)
        assert is_expected(outcome(client, RUN_IT), lost("TLS failed"))
    assert server.seen == []


def hello(sock: Any) -> None:
    assert sock.recv(65536)[:1] == b"\x16", "this is no handshake"


# What servers that speak plain HTTP answer to a TLS handshake.
PLAIN_ANSWERS = {
    "Go": b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n"
    b"400 Bad Request",
    "nginx": answer("<html><head><title>400 Bad Request</title></head></html>", "400 Bad Request", Connection="close"),
    "HTTP/1.0": b"HTTP/1.0 400 Bad request version\r\n\r\n",
    "Python": b"HTTP/1.1 505 HTTP Version Not Supported\r\n\r\n",
}


@pytest.mark.parametrize("is_proxied", [False, True], ids=["straight", "proxied"])
@pytest.mark.parametrize("name", PLAIN_ANSWERS)
def test_https_to_a_port_of_plain_http_says_so_and_is_not_tried_again(
    client_of: Clients, clock: Clock, setenv: Any, ca: trustme.CA, name: str, is_proxied: bool
) -> None:
    opened: list[Any] = [Do.HEAD, ESTABLISHED] if is_proxied else []
    with Peer([[*opened, hello, PLAIN_ANSWERS[name], half_close, Do.DRAIN]]) as peer:
        if is_proxied:
            setenv("https_proxy", peer.url)
        client = client_of(f"https://boxer.test:{peer.port}", ssl_context=trusting(ca))
        error = outcome(client, RUN_IT)
    assert is_expected(error, lost(f":{peer.port}")) and not error.request_sent
    assert "plain HTTP" in str(error) and clock.pauses == [] and peer.connections == 1


def test_https_to_the_stand_in_says_that_it_speaks_plain_http(client_of: Clients, clock: Clock) -> None:
    with store() as server:
        error = outcome(client_of(server.url.replace("http:", "https:")), GET_HEALTH, retries=2)
        assert is_expected(error, lost("plain HTTP")) and server.connections == 1
    assert clock.pauses == []


# ---------------------------------------------------------------------------------------------------------------------
# Both clients: proxies
# ---------------------------------------------------------------------------------------------------------------------


def basic_credentials(pair: str) -> str:
    return f"Basic {base64.b64encode(pair.encode()).decode()}"


def test_http_goes_through_a_proxy(client_of: Clients, setenv: Any) -> None:
    with Peer.answering(RAN, answer("abc")) as proxy:
        setenv("http_proxy", f"http://joe:p%40ss@127.0.0.1:{proxy.port}")
        client = client_of("http://ann:secret@boxer.test:8080/api")
        assert (client.run("image", ["true"]), client.download_file("a b")) == (RESULT, b"abc")
    run, download = proxy.requests[0]
    assert run.line == "POST http://boxer.test:8080/api/run HTTP/1.1"
    assert download.line == "GET http://boxer.test:8080/api/files?path=a%20b HTTP/1.1"
    assert run.fields["host"] == "boxer.test:8080"
    assert run.fields["proxy-authorization"] == basic_credentials("joe:p@ss")
    assert run.fields["authorization"] == basic_credentials("ann:secret")


def tunnel(inside: ssl.SSLContext, seen: list[Received], *answers: bytes) -> Callable[[Any], None]:
    """Return a step that answers requests over TLS inside a tunnel."""

    def serve(sock: Any) -> None:
        with inside.wrap_socket(sock, server_side=True) as tls, tls.makefile("rb") as reader:
            for what in answers:
                seen.append(_received(reader, with_body=True))
                tls.sendall(what)
            with contextlib.suppress(ConnectionError):
                assert reader.read() == b""

    return serve


def test_https_goes_through_a_tunnel(client_of: Clients, setenv: Any, ca: trustme.CA) -> None:
    seen: list[Received] = []
    inside = tunnel(serving(ca, "boxer.test"), seen, RAN, answer("abc"))
    with Peer([[Do.HEAD, ESTABLISHED, inside, Do.FIN]]) as proxy:
        setenv("https_proxy", f"http://joe:p%40ss@127.0.0.1:{proxy.port}")
        with client_of("https://ann:secret@boxer.test/api", ssl_context=trusting(ca)) as client:
            assert (client.run("image", ["true"]), client.download_file("a b")) == (RESULT, b"abc")
    (connect,) = proxy.requests[0]
    assert connect.line == "CONNECT boxer.test:443 HTTP/1.1" and connect.fields["host"] == "boxer.test:443"
    assert (
        connect.fields["proxy-authorization"] == basic_credentials("joe:p@ss") and "authorization" not in connect.fields
    )
    assert [request.line for request in seen] == ["POST /api/run HTTP/1.1", "GET /api/files?path=a%20b HTTP/1.1"]
    for request in seen:
        assert (
            request.fields["authorization"] == basic_credentials("ann:secret")
            and "proxy-authorization" not in request.fields
        )


def test_a_tunnel_may_need_no_credentials(client_of: Clients, setenv: Any, ca: trustme.CA) -> None:
    seen: list[Received] = []
    opened = answer(None, "200 Connection established")
    with Peer([[Do.REQUEST, opened, tunnel(serving(ca, "boxer.test"), seen, RAN), Do.FIN]]) as proxy:
        setenv("https_proxy", proxy.url)
        client = client_of("https://boxer.test", ssl_context=trusting(ca))
        assert client.run("image", ["true"]) == RESULT
        client.close()
    assert "proxy-authorization" not in {**proxy.request.fields, **seen[0].fields}


DENIED = answer("Who are you?", "407 Proxy Authentication Required")
# What a proxy does when it is asked for a tunnel, and what comes of it.
TUNNELS: list[tuple[list[Any], Any]] = [
    ([Do.HEAD, DENIED], refusal(407, "Who are you?")),
    ([Do.HEAD, DENIED, Do.FIN], refusal(407, "Who are you?")),
    ([Do.HEAD, answer("x" * MIB, "502 Bad Gateway"), Do.DRAIN], refusal(502, "xxx")),
    ([Do.HEAD, Do.FIN], lost()),
    ([Do.HEAD, Do.RST], lost()),
    ([Do.HEAD, ESTABLISHED[:-1], Do.FIN], lost()),
    ([Do.HEAD, b"garbage"], lost("HTTP")),
    ([Do.HEAD, ESTABLISHED + RAN, Do.DRAIN], lost()),
    ([Do.HEAD, ESTABLISHED, Do.FIN], lost()),
    ([Do.HEAD], (BoxerTimeoutError, 0, "0.5 s")),
    ([Do.HEAD, ESTABLISHED, Do.DRAIN], (BoxerTimeoutError, 0, "0.5 s")),
]


@pytest.mark.parametrize(("steps", "expected"), TUNNELS)
def test_a_tunnel_that_cannot_be_had(
    client_of: Clients, setenv: Any, ca: trustme.CA, steps: list[Any], expected: Any
) -> None:
    with Peer([steps]) as proxy:
        setenv("https_proxy", f"http://joe:secret@127.0.0.1:{proxy.port}")
        timeout = 0.5 if expected[0] is BoxerTimeoutError else 30
        got = outcome(client_of("https://boxer.test", ssl_context=trusting(ca), retries=0, timeout=timeout), RUN_IT)
        assert is_expected(got, expected), got
        assert not getattr(got, "request_sent", False) and "secret" not in all_text(got)


def test_a_proxy_that_refuses_or_is_dead(client_of: Clients, setenv: Any) -> None:
    with Peer([[Do.REQUEST, DENIED], [Do.REQUEST, Do.FIN]]) as proxy:
        setenv("HTTP_PROXY", f"127.0.0.1:{proxy.port}")
        with client_of("http://boxer.test", retries=0) as client:
            assert is_expected(outcome(client, RUN_IT), refusal(407, "Who are you?"))
        assert is_expected(outcome(client_of("http://boxer.test", retries=0), RUN_IT), lost(proxy.authority))
    error = outcome(client_of("http://boxer.test", retries=0), RUN_IT)
    assert is_expected(error, lost(proxy.authority)) and not error.request_sent


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("call", [RUN_IT, GET_HEALTH, DOWNLOAD], ids=["run", "health", "download"])
def test_a_proxy_that_cannot_be_reached_is_named_with_the_host_that_it_was_for(
    client_of: Clients, setenv: Any, scheme: str, call: Call
) -> None:
    proxy = refused_url().partition("//")[2]
    for authority in (proxy, "proxy.invalid:3128"):
        setenv(f"{scheme}_proxy", f"http://joe:hunter2@{authority}")
        error = outcome(client_of(f"{scheme}://ann:hunter2@boxer.test:8443", retries=0), call)
        assert type(error) is BoxerConnectionError and not error.request_sent
        assert "proxy" in str(error).replace("proxy.invalid", "") and authority in str(error)
        assert "boxer.test:8443" in str(error) and "hunter2" not in all_text(error)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_does_not_accept_is_named_too(client_of: Clients, setenv: Any, scheme: str) -> None:
    with never_accepting() as listener:
        authority = f"127.0.0.1:{listener.getsockname()[1]}"
        setenv(f"{scheme}_proxy", f"http://joe:hunter2@{authority}")
        error = outcome(client_of(f"{scheme}://boxer.test:8443", timeout=0.2, retries=0), RUN_IT)
    assert is_expected(error, (BoxerTimeoutError, 0, authority)) and "hunter2" not in all_text(error)
    assert "proxy" in str(error) and "boxer.test:8443" in str(error)


def test_a_server_that_cannot_be_reached_is_not_taken_for_a_proxy(client_of: Clients, setenv: Any) -> None:
    error = outcome(client_of(refused_url(), retries=0), RUN_IT)
    assert type(error) is BoxerConnectionError and "proxy" not in str(error)


# ---------------------------------------------------------------------------------------------------------------------
# Both clients: tries
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [Do.FIN, Do.RST])
def test_a_download_goes_once_more_when_its_kept_connection_proves_dead(client_of: Clients, end: Do) -> None:
    with Peer([[Do.REQUEST, WELL, Do.REQUEST, end], [Do.REQUEST, answer("abc")]]) as peer:
        client = client_of(peer.url, retries=0)
        assert client.health()
        assert client.download_file("a.txt") == b"abc"


@pytest.mark.parametrize("end", [Do.FIN, Do.RST])
@pytest.mark.parametrize("call", [RUN_IT, PUT_FILE], ids=["run", "upload"])
def test_a_post_whose_bytes_have_left_is_never_sent_twice(client_of: Clients, call: Call, end: Do) -> None:
    with Peer([[Do.REQUEST, WELL, Do.REQUEST, end], [Do.REQUEST, end]]) as peer:
        client = client_of(peer.url, retries=5)
        assert client.health()
        for _ in ("on a kept connection", "on a fresh one"):
            error = outcome(client, call)
            assert type(error) is BoxerConnectionError and error.request_sent
            assert peer.authority in str(error) and error.__cause__ is not None
    assert [len(requests) for requests in peer.requests] == [2, 1]


ANEW: Call = upload(io.BytesIO(b"content"))
# Each row: an answer that never gets better, the client's retries (None: its default), the call, how often it is sent.
TRIES: list[tuple[bytes, int | None, Call, int]] = [
    *((failing(status), None, call, 3)
      for status in ("429 Slow Down", "503 Service Unavailable", BROKEN) for call in (RUN_IT, PUT_FILE, DOWNLOAD)),
    (answer("Busy", "503 Service Unavailable"), None, RUN_IT, 3),
    (failing(BROKEN, "read stdin: broken"), None, RUN_IT, 3),
    *((failing(BROKEN, f"{error}: x"), None, RUN_IT, 1)
      for error in ("image pull failed", "spec build failed", "network setup failed",
                    "start runsc: context deadline exceeded")),
    *((answer(text, BROKEN), None, RUN_IT, 1) for text in ("", "oops", "<p>oops</p>", [1], {"error": 5}, {"e": "x"})),
    *((failing(status), None, RUN_IT, 1)
      for status in ("400 Bad Request", "404 Not Found", "408 Request Timeout", "409 Conflict", "413 Too Large",
                     "501 Not Implemented", "502 Bad Gateway", "504 Gateway Timeout", "507 Insufficient Storage")),
    (failing(BROKEN), 0, RUN_IT, 1),
    (failing(BROKEN), 5, RUN_IT, 6),
    (failing(BROKEN), 5, run(retries=1), 2),
    (failing(BROKEN), 0, run(retries=1), 2),
    (failing(BROKEN), 5, run(network="sandbox"), 1),
    (failing(BROKEN), 5, run(network="host"), 1),
    (failing(BROKEN), 5, run(network="sandbox", retries=1), 2),
    (failing(BROKEN), 1, run(network="none"), 2),
    (failing(BROKEN), None, ANEW, 3),
    (failing(BROKEN), 5, upload(Unseekable(b"content")), 1),
    (failing(BROKEN), 5, upload(Streaming(b"content")), 1),
    (failing("503 Service Unavailable"), None, GET_HEALTH, 1),
    (failing("503 Service Unavailable"), None, ("health", (), {"retries": 4}), 5),
]  # fmt: skip


@pytest.mark.parametrize(("what", "retries", "call", "tries"), TRIES)
def test_a_request_is_sent_again_after_what_says_that_it_is_over_or_never_began(
    client_of: Clients, clock: Clock, what: bytes, retries: int | None, call: Call, tries: int
) -> None:
    with Host(lambda _: [what]) as host:
        got = outcome(client_of(host.url, **({} if retries is None else {"retries": retries})), call)
    assert got is False or f" {got.status_code} " in what.decode()
    assert (len(host.seen), len(clock.pauses)) == (tries, tries - 1)
    assert call is not ANEW or all(b"content" in request.body for request in host.seen)


def test_a_try_that_succeeds_is_the_last_and_the_last_error_is_raised(client_of: Clients, clock: Clock) -> None:
    busy = [failing("503 Service Unavailable", "first"), failing("429 Slow Down", "second"), failing(BROKEN, "third")]
    answers = iter([*busy[:2], RAN, *busy])
    with Host(lambda _: [next(answers)]) as host:
        client = client_of(host.url)
        assert client.run("image", ["true"]) == RESULT
        assert is_expected(outcome(client, RUN_IT), (BoxerAPIError, 500, "third"))


def test_what_could_not_be_connected_is_tried_again(client_of: Clients, clock: Clock) -> None:
    client = client_of(refused_url())
    for call, tries in ((RUN_IT, 2), (run(network="sandbox"), 0), (GET_HEALTH, 0)):
        clock.pauses.clear()
        error = outcome(client, call)
        assert type(error) is BoxerConnectionError and not error.request_sent and len(clock.pauses) == tries


def test_a_request_was_sent_even_if_it_could_not_be_sent_once_more(client_of: Clients) -> None:
    with vanishing(WELL, b"") as url:
        client = client_of(url)
        assert client.health()
        error = outcome(client, GET_HEALTH)
    assert is_expected(error, lost("no connection could be made")) and error.request_sent


@pytest.mark.parametrize("end", [Do.FIN, Do.RST])
def test_a_download_may_be_sent_again_after_a_lost_connection(client_of: Clients, clock: Clock, end: Do) -> None:
    with Peer([[Do.REQUEST, b"HTTP/1.1 200", end], [Do.REQUEST, end], [Do.REQUEST, answer("abc")]]) as peer:
        assert client_of(peer.url).download_file("a.txt") == b"abc"
    assert len(clock.pauses) == 2


@pytest.mark.parametrize("is_kept", [True, False], ids=["kept", "fresh"])
def test_a_malformed_answer_is_not_asked_for_again(client_of: Clients, clock: Clock, is_kept: bool) -> None:
    before: list[Any] = [Do.REQUEST, WELL] if is_kept else []
    with Peer([[*before, Do.REQUEST, b"garbage"]]) as peer:
        client = client_of(peer.url)
        assert not is_kept or client.health()
        assert is_expected(outcome(client, DOWNLOAD), lost("garbage"))
    assert clock.pauses == []


def test_pauses_grow_and_no_two_are_the_same(client_of: Clients, clock: Clock) -> None:
    with Host(lambda _: [failing(BROKEN)]) as host:
        client = client_of(host.url, retries=5)
        for _ in range(3):
            outcome(client, RUN_IT)
    rows = [clock.pauses[at : at + 5] for at in (0, 5, 10)]
    assert all(later > earlier for row in rows for earlier, later in zip(row, row[2:])), rows
    assert all(0.1 < pause < 10 for pause in clock.pauses) and len(set(clock.pauses)) == 15


RETRY_AFTER = {  # how long the pause is then; a date is nine seconds on, less what a busy machine takes to get there
    "7": (7, 7.5), "date": (3, 9.5), "asctime": (3, 9.5),
    **dict.fromkeys(["0", "-5", "1.5", "soon", "\xb2", "Wed, 21 Oct 2015 07:28:00 GMT", "Wed, 99 Foo 99999 07:28:00",
                     "Wed, 21 Oct 99999 07:28:00 GMT"], (0.01, 2)),
}  # fmt: skip


@pytest.mark.parametrize("value", RETRY_AFTER)
def test_retry_after_is_honoured_in_seconds_and_as_a_date(client_of: Clients, clock: Clock, value: str) -> None:
    date = email.utils.formatdate(time.time() + 9, usegmt=True)
    sent = {"date": date, "asctime": time.asctime(time.gmtime(time.time() + 9))}.get(value, value)
    answers = iter([failing("503 Service Unavailable", Retry_After=sent), RAN])
    with Host(lambda _: [next(answers)]) as host:
        assert client_of(host.url).run("image", ["true"]) == RESULT
    (pause,) = clock.pauses
    assert RETRY_AFTER[value][0] <= pause <= RETRY_AFTER[value][1]


@pytest.mark.parametrize("value", ["60", "99999999999", "date"])
def test_a_retry_after_past_the_deadline_ends_the_call_at_once(client_of: Clients, clock: Clock, value: str) -> None:
    sent = email.utils.formatdate(time.time() + 999, usegmt=True) if value == "date" else value
    with Host(lambda _: [failing("503 Service Unavailable", "busy", Retry_After=sent)]) as host:
        got = outcome(client_of(host.url, timeout=30), RUN_IT)
        assert is_expected(got, (BoxerAPIError, 503, "busy"))
    assert (len(host.seen), clock.pauses) == (1, [])


def test_one_deadline_covers_all_tries_and_pauses(client_of: Clients, clock: Clock) -> None:
    with Host(lambda _: [failing(BROKEN)]) as host:
        got = outcome(client_of(host.url, timeout=20, retries=1000), RUN_IT)
        assert is_expected(got, (BoxerAPIError, 500, "no"))
    assert 5 < sum(clock.pauses) < 20


def test_tries_are_logged_without_secrets(client_of: Clients, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "boxer")
    answers = iter([failing(BROKEN, RACES[0]), failing("503 Service Unavailable", "busy"), RAN])
    with Host(lambda _: [next(answers)]) as host:
        client = client_of(host.url.replace("//", "//user:s3cret@"), headers={"X-Token": "s3cret"})
        assert client.run("s3cret", ["s3cret"], env={"KEY": "s3cret"}) == RESULT
    records = [record for record in caplog.records if "trying again" in record.getMessage()]
    assert [record.levelno for record in records] == [logging.DEBUG, logging.WARNING]
    assert "busy" in records[1].getMessage() and "s3cret" not in caplog.text


# How often a call may be sent that always meets the race: if this counts as another failure in the end, too, or not.
RACE_TRIES: list[tuple[Call, tuple[int, ...]]] = [
    (run(retries=1), (16, 17)), (run(network="none"), (16, 18)), (run(retries=0), (1,)), (run(network="sandbox"), (1,)),
    (run(network="sandbox", retries=1), (2,)), (PUT_FILE, (3,)),
]  # fmt: skip


@pytest.mark.parametrize("race", RACES)
@pytest.mark.parametrize(("call", "tries"), RACE_TRIES)
def test_the_race_has_tries_of_its_own(
    client_of: Clients, clock: Clock, race: str, call: Call, tries: tuple[int, ...]
) -> None:
    with Host(lambda _: [failing(BROKEN, race)]) as host:
        assert is_expected(outcome(client_of(host.url), call), (BoxerAPIError, 500, race))
    assert len(host.seen) in tries and len(clock.pauses) == len(host.seen) - 1
    assert len(host.seen) < 16 or all(0 < pause < 0.25 for pause in clock.pauses[:15])


def test_a_third_of_runs_lost_to_the_race_is_no_failure(client_of: Clients) -> None:
    tokens = [str(number) for number in range(300)]
    with Swift(sandbox=NoSandbox(), race=1 / 3) as server:
        client = client_of(server.url, max_connections=8)
        results = gather(client, [("run", ("image", ["echo", token]), {}) for token in tokens])
        assert [result.stdout for result in results] == [f"{token}\n" for token in tokens]
        assert server.runs_lost > 75 and server.connections <= 8


def exchanges(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Return what the log has of exchanges, without what it says of further tries."""
    records = [record for record in caplog.records if record.name == "boxer"]
    return [record for record in records if "trying again" not in record.getMessage()]


def numbers_in(record: logging.LogRecord) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", record.getMessage())]


TRY = r"(?i)\b(?:try|attempt)\D{0,3}"
LOGGED: list[tuple[Call, bytes, str, int]] = [
    (GET_HEALTH, WELL, r"\bGET\b.*/healthz\b", 200),
    (RUN_IT, RAN, r"\bPOST\b.*/run\b", 200),
    (PUT_FILE, STORED, r"\bPOST\b.*/files\b", 200),
    (DOWNLOAD, answer("abc"), r"\bGET\b.*/files\b", 200),
    (DOWNLOAD, failing("404 Not Found"), r"\bGET\b.*/files\b", 404),
    (RUN_IT, failing("507 Insufficient Storage"), r"\bPOST\b.*/run\b", 507),
]


@pytest.mark.parametrize(("call", "said", "line", "status"), LOGGED)
def test_an_exchange_is_one_line_of_the_log(
    client_of: Clients, caplog: pytest.LogCaptureFixture, call: Call, said: bytes, line: str, status: int
) -> None:
    caplog.set_level(logging.DEBUG, "boxer")
    with Peer.answering(said) as peer:
        outcome(client_of(f"{peer.url}/api"), call)
    (record,) = exchanges(caplog)
    text = record.getMessage()
    assert record.levelno == logging.DEBUG and text.isprintable()
    assert re.search(line, text) and status in numbers_in(record)
    assert re.search(r"\d ?(ms|s)\b", text) and re.search(TRY + r"1\b", text)


def test_the_log_tells_how_many_bytes_went_each_way(client_of: Clients, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "boxer")
    with Peer.answering(STORED, answer(bytes(43_210)), answer({**RUN, "stdout": "x" * 54_321})) as peer:
        client = client_of(peer.url)
        for call in (upload(bytes(65_432)), DOWNLOAD, RUN_IT):
            do(client, call)
    for record, size in zip(exchanges(caplog), (65_432, 43_210, 54_321)):
        assert [number for number in numbers_in(record) if size <= number < size + 1000], record.getMessage()
    assert len(exchanges(caplog)) == 3


def test_each_try_is_a_line_of_the_log(client_of: Clients, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "boxer")
    answers = iter([failing("503 Service Unavailable"), failing(BROKEN, RACES[0]), RAN])
    with Host(lambda _: [next(answers)]) as host:
        client_of(host.url).run("image", ["true"])
    texts = [record.getMessage() for record in exchanges(caplog)]
    assert len(texts) == 3
    for number, (text, status) in enumerate(zip(texts, ("503", "500", "200")), 1):
        assert status in text and re.search(rf"{TRY}{number}\b", text), text


def test_an_exchange_that_fails_is_a_line_of_the_log_too(client_of: Clients, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "boxer")
    with Peer([[Do.REQUEST, Do.FIN]]) as peer:
        outcome(client_of(peer.url, retries=0), RUN_IT)
    (record,) = exchanges(caplog)
    assert record.levelno == logging.DEBUG and re.search(r"\bPOST\b.*/run\b", record.getMessage())


@pytest.mark.parametrize("is_proxied", [False, True], ids=["straight", "proxied"])
def test_an_exchange_is_logged_without_secrets(
    client_of: Clients, setenv: Any, caplog: pytest.LogCaptureFixture, is_proxied: bool
) -> None:
    caplog.set_level(logging.DEBUG, "boxer")
    result = {**RUN, "stdout": "hunter2", "stderr": "hunter2"}
    with Peer.answering(answer(result), STORED, answer("hunter2"), failing("404 Not Found", "hunter2")) as peer:
        setenv("http_proxy", f"http://joe:hunter2@{peer.authority}")
        host = f"boxer.test:{peer.port}" if is_proxied else peer.authority
        client = client_of(f"http://ann:hunter2@{host}", headers={"X-Token": "hunter2"})
        client.run("image", ["hunter2"], env={"KEY": "hunter2"})
        client.upload_file("a.txt", "hunter2")
        assert client.download_file("a.txt") == b"hunter2"
        outcome(client, DOWNLOAD)
    assert len(exchanges(caplog)) == 4
    for record in caplog.records:
        assert "hunter2" not in record.getMessage() + repr(vars(record))
    encoded = [base64.b64encode(f"{name}:hunter2".encode()).decode() for name in ("ann", "joe")]
    assert not [pair for pair in encoded if pair in caplog.text]


def test_nobody_is_told_of_exchanges_who_does_not_ask(client_of: Clients, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "boxer")
    with Peer.answering(RAN) as peer:
        client_of(peer.url).run("image", ["true"])
    assert caplog.records == []


WAIT: Call = ("wait_until_ready", (), {})


def test_a_server_that_is_ready_is_not_waited_for(client_of: Clients, clock: Clock) -> None:
    with Peer.answering(WELL) as peer:
        assert client_of(peer.url).wait_until_ready() is None
    assert peer.request.line == "GET /healthz HTTP/1.1" and clock.pauses == []


def test_a_server_that_is_not_well_yet_is_waited_for(client_of: Clients, clock: Clock) -> None:
    answers = iter(
        [failing("503 Service Unavailable"), answer("", "502 Bad Gateway"), answer("no", "404 Not Found"), WELL]
    )
    with Host(lambda _: [next(answers)]) as host:
        assert client_of(host.url).wait_until_ready(timeout=60) is None
    assert len(host.seen) == 4 and len(clock.pauses) == 3


def test_a_server_that_does_not_listen_yet_is_waited_for(
    client_of: Clients, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, pause = refused_url(), clock.sleep
    with contextlib.ExitStack() as stack:

        def start_in_time(seconds: float) -> None:
            pause(seconds)
            if len(clock.pauses) == 3:
                stack.enter_context(StandIn(sandbox=NoSandbox(), port=int(url.rpartition(":")[2])))

        monkeypatch.setattr(clock, "sleep", start_in_time)
        assert client_of(url).wait_until_ready() is None
    assert len(clock.pauses) == 3 and sum(clock.pauses) < 10


def test_a_server_that_drops_connections_at_first_is_waited_for(client_of: Clients, clock: Clock) -> None:
    with Peer([[Do.REQUEST, Do.FIN], [Do.REQUEST, Do.RST], [Do.REQUEST, WELL]]) as peer:
        assert client_of(peer.url).wait_until_ready() is None
    assert len(clock.pauses) == 2


def test_a_server_that_never_gets_well_is_given_up_with_the_last_reason(client_of: Clients, clock: Clock) -> None:
    answers = itertools.chain(
        [failing("503 Service Unavailable", "first")], itertools.repeat(answer("", "502 Bad Gateway"))
    )
    with Host(lambda _: [next(answers)]) as host:
        error = outcome(client_of(host.url), WAIT, timeout=20)
    assert is_expected(error, (BoxerTimeoutError, 0, "502")) and host.authority in str(error)
    assert 10 < sum(clock.pauses) <= 20, "it sleeps past its end, or gives up early"
    assert len(host.seen) >= len(clock.pauses) >= 4
    assert clock.pauses[0] <= 1 and max(clock.pauses) > 2 * clock.pauses[0], "pauses grow"


def test_the_last_reason_is_told_even_if_the_last_pause_takes_too_long(client_of: Clients, clock: Clock) -> None:
    clock.tick = 0.01  # each look at the clock takes a while
    with Host(lambda _: [failing("503 Service Unavailable", "not yet")]) as host:
        for timeout in (0.5, 0.55, 0.6, 0.65, 0.7, 0.75):
            assert is_expected(outcome(client_of(host.url), WAIT, timeout=timeout), (BoxerTimeoutError, 0, "not yet"))


def test_a_server_that_never_listens_is_given_up_with_the_last_reason(client_of: Clients, clock: Clock) -> None:
    url = refused_url()
    error = outcome(client_of(url), WAIT, timeout=20)
    assert is_expected(error, (BoxerTimeoutError, 0, url.partition("//")[2])) and re.search(
        "(?i)refused|failed", str(error)
    )
    assert 10 < sum(clock.pauses) <= 20
    assert isinstance(error.__cause__, BoxerConnectionError)


def test_a_last_try_that_had_no_time_hides_no_reason(client_of: Clients) -> None:
    answers: Iterator[list[Any]] = itertools.chain(
        [[failing("503 Service Unavailable", "warming up")]], itertools.repeat([])
    )
    with Host(lambda _: next(answers)) as host:
        error = outcome(client_of(host.url), WAIT, timeout=0.5)
    assert is_expected(error, (BoxerTimeoutError, 0, "warming up")) and isinstance(error.__cause__, BoxerAPIError)


@pytest.mark.parametrize("timeout", [0.3, fractions.Fraction(3, 10)])
def test_a_server_that_never_answers_is_given_up_in_time(client_of: Clients, timeout: Any) -> None:
    start = time.monotonic()
    with Host(lambda _: []) as host:
        error = outcome(client_of(host.url, timeout=None), WAIT, timeout=timeout)
    assert is_expected(error, (BoxerTimeoutError, 0, host.authority)) and 0.25 < time.monotonic() - start < 10


@pytest.mark.parametrize("timeout", [None, 1e9])
def test_a_server_may_be_waited_for_without_an_end(client_of: Clients, clock: Clock, timeout: Any) -> None:
    answers = itertools.chain([failing("503 Service Unavailable")] * 50, [WELL])
    with Host(lambda _: [next(answers)]) as host:
        assert client_of(host.url).wait_until_ready(timeout=timeout) is None
    assert len(clock.pauses) == 50 and max(clock.pauses) <= 15, "a pause has a bound"


def test_a_server_is_waited_for_a_minute_unless_told_otherwise(client_of: Clients, clock: Clock) -> None:
    assert inspect.signature(client_of.cls.wait_until_ready).parameters["timeout"].default == 60
    with Host(lambda _: [failing("503 Service Unavailable", "warming up")]) as host:
        assert is_expected(outcome(client_of(host.url), WAIT), (BoxerTimeoutError, 0, "warming up"))
    assert 30 < sum(clock.pauses) <= 60


def test_a_closed_client_waits_for_nothing(client_of: Clients) -> None:
    client = client_of("http://127.0.0.1:9")
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.wait_until_ready()


def test_closing_a_client_ends_its_wait_for_a_server(client_of: Clients) -> None:
    has_begun = threading.Event()

    def respond(_: Received) -> list[bytes]:
        has_begun.set()
        return [failing("503 Service Unavailable")]

    with Host(respond) as host:
        client = client_of(host.url)
        (ended,) = closed_meanwhile(client, [("wait_until_ready", (), {"timeout": None})], has_begun)
    assert type(ended) is BoxerConnectionError, ended


def test_a_task_can_give_up_its_wait_for_a_server() -> None:
    async def main() -> None:
        async with AsyncBoxerClient(host.url) as client:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(client.wait_until_ready(), 0.3)
            assert not await client.health()

    with Host(lambda _: [failing("503 Service Unavailable")]) as host:
        asyncio.run(main())


# ---------------------------------------------------------------------------------------------------------------------
# Both clients: deadlines
# ---------------------------------------------------------------------------------------------------------------------


def slowly(start: bytes, more: bytes) -> Iterator[bytes]:
    """Yield bytes one at a time, without end."""
    pace = threading.Event()
    for byte in itertools.chain(start, itertools.cycle(more)):
        yield bytes([byte])
        pace.wait(0.01)


TOO_SLOW: dict[str, tuple[Call, Any]] = {
    "never answers": (RUN_IT, b""),
    "never answers a download": (DOWNLOAD, b""),
    "never answers an upload": (PUT_FILE, b""),
    "drips a head": (RUN_IT, (b"HTTP/1.1 200 OK\r\n", b"A: b\r\n")),
    "drips an answer": (RUN_IT, (raw("Content-Length: 999999"), b" ")),
    "drips chunks": (RUN_IT, (raw(IN_CHUNKS), b"1\r\n \r\n")),
    "drips a trailer": (RUN_IT, (raw(IN_CHUNKS, body=chunks()[:-2]), b"A: b\r\n")),
    "drips an error page": (DOWNLOAD, (raw(status="HTTP/1.1 502 Bad Gateway"), b"oops")),
    "stalls within an answer": (RUN_IT, RAN[:-5]),
    "stalls within a file": (DOWNLOAD, answer("abc")[:-1]),
    "stalls after an interim answer": (RUN_IT, raw(status="HTTP/1.1 100 Continue")),
}


@pytest.mark.parametrize("name", TOO_SLOW)
def test_a_server_that_is_too_slow_is_given_up(client_of: Clients, name: str) -> None:
    call, said = TOO_SLOW[name]
    step: Any = slowly(*said) if isinstance(said, tuple) else said
    with Peer([[Do.REQUEST, step], [Do.REQUEST, WELL]]) as peer:
        client = client_of(peer.url)
        assert is_expected(outcome(client, call, timeout=0.2), (BoxerTimeoutError, 0, "0.2 s"))
        assert client.health()


@pytest.mark.parametrize("is_tls", [False, True], ids=["plain", "TLS"])
@pytest.mark.parametrize("call", [LARGE, BIG_RUN], ids=["upload", "run"])
def test_a_server_that_does_not_read_is_given_up(client_of: Clients, ca: trustme.CA, call: Call, is_tls: bool) -> None:
    is_over, context = threading.Event(), serving(ca) if is_tls else None
    with Peer([[lambda _: is_over.wait(30), Do.DRAIN], [Do.REQUEST, WELL]], context=context) as peer:
        client = client_of(peer.url, ssl_context=trusting(ca) if is_tls else None)
        assert is_expected(outcome(client, call, timeout=0.2), (BoxerTimeoutError, 0, "0.2 s"))
        is_over.set()
        assert client.health()


def test_a_connection_that_is_never_accepted_is_given_up(client_of: Clients) -> None:
    with never_accepting() as listener:
        client = client_of(f"http://127.0.0.1:{listener.getsockname()[1]}")
        assert is_expected(outcome(client, RUN_IT, timeout=0.2), (BoxerTimeoutError, 0, "0.2 s"))


def test_a_handshake_that_does_not_come_is_waited_for_idly(client_of: Clients) -> None:
    with Peer([[Do.DRAIN]]) as peer:
        client = client_of(f"https://{peer.authority}", timeout=0.2)
        with Counting() as counting:
            error = outcome(client, GET_HEALTH)
    assert is_expected(error, (BoxerTimeoutError, 0, "no complete answer within 0.2 s"))
    assert counting.calls < 1000


def test_nothing_is_sent_once_the_look_up_of_a_name_took_all_the_time(
    client_of: Clients, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_up = socket.getaddrinfo

    def getaddrinfo(*args: Any, **kwargs: Any) -> Any:
        clock.ahead += 1000
        return look_up(*args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with Peer([]) as peer:
        assert is_expected(outcome(client_of(peer.url, timeout=60), RUN_IT), (BoxerTimeoutError, 0, "60 s"))


def test_nothing_is_sent_once_connecting_took_all_the_time(
    client_of: Clients, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(socket.socket):
        def connect(self, address: Any) -> None:
            clock.ahead += 1000
            super().connect(address)

        def connect_ex(self, address: Any) -> int:
            clock.ahead += 1000
            return super().connect_ex(address)

    with Peer([[Do.GONE]]) as peer:
        client = client_of(peer.url, timeout=60)
        with monkeypatch.context() as patch:
            patch.setattr(socket, "socket", Slow)
            assert is_expected(outcome(client, RUN_IT), (BoxerTimeoutError, 0, "60 s"))


def test_an_upload_that_nobody_takes_is_given_up_whatever_the_server_says(client_of: Clients) -> None:
    with Peer([[slowly(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), Do.DRAIN]]) as peer:
        client = client_of(peer.url)
        got = outcome(client, LARGE, timeout=0.2)
        assert is_expected(got, (BoxerTimeoutError, 0, "0.2 s")) or is_expected(got, lost("interim")), got


ENOUGH = {  # the client's timeout, the call: it may wait for an answer that takes its time
    "a run has its wall clock on top": (0.1, run(limits={"wall_clock_secs": 60})),
    "None waits for ever": (None, RUN_IT),
    "a call has a longer one": (0.1, run(timeout=60)),
    "a call has none": (0.1, run(timeout=None)),
}


@pytest.mark.parametrize("name", ENOUGH)
def test_a_timeout_that_is_long_enough_is_kept_to(client_of: Clients, name: str) -> None:
    timeout, call = ENOUGH[name]
    with Peer([[Do.REQUEST, lambda _: threading.Event().wait(0.3), RAN]]) as peer:
        assert do(client_of(peer.url, timeout=timeout), call) == RESULT


def test_the_wait_for_a_free_connection_does_not_count(client_of: Clients, clock: Clock) -> None:
    def respond(request: Received) -> list[Any]:
        if "first" in request.json["cmd"]:
            threading.Event().wait(0.3)  # the second call waits by now, or else this shows nothing
            clock.ahead += 1000
        return [RAN]

    calls: list[Call] = [run("first", timeout=None), run("second", timeout=60)]
    with Host(respond) as host:
        assert gather(client_of(host.url, max_connections=1), calls) == [RESULT, RESULT]


def test_a_call_whose_time_is_up_does_not_wait_for_its_turn() -> None:
    has_come, is_over = threading.Event(), threading.Event()
    script: list[list[Any]] = [[Do.REQUEST, lambda _: has_come.set(), lambda _: is_over.wait(30), RAN]]
    with Peer(script) as peer, BoxerClient(peer.url, max_connections=1) as client, ThreadPoolExecutor(1) as executor:
        first = executor.submit(do, client, RUN_IT)
        assert has_come.wait(30)
        assert is_expected(outcome(client, RUN_IT, timeout=1e-9), (BoxerTimeoutError, 0, "1e-09"))
        is_over.set()
        assert first.result() == RESULT


@pytest.mark.parametrize("max_connections", [1, 3])
def test_a_deadline_that_passes_hurts_no_other_call(client_of: Clients, max_connections: int) -> None:
    is_over = threading.Event()

    def respond(request: Received) -> list[Any]:
        return [lambda: is_over.wait(30), Do.FIN] if "slow" in request.json["cmd"] else [RAN]

    with Host(respond) as host:
        client = client_of(host.url, max_connections=max_connections)
        slow, *others = gather(client, [run("slow", timeout=0.2), *[run(timeout=30)] * 4])
        is_over.set()
        assert is_expected(slow, (BoxerTimeoutError, 0, "0.2 s"))
        assert others == [RESULT] * 4


@pytest.mark.parametrize("call", [LARGE, DOWNLOAD], ids=["upload", "download"])
def test_what_keeps_moving_outlives_its_timeout(client_of: Clients, clock: Clock, call: Call) -> None:
    with Host(lambda request: [answer(bytes(64 * MIB)) if call is DOWNLOAD else STORED]) as host:
        client, start = client_of(host.url, timeout=5), clock.ahead
        clock.tick = 0.1
        assert do(client, call) == (bytes(64 * MIB) if call is DOWNLOAD else None)
        clock.tick = 0
    assert clock.ahead - start > 5


class Narrow(socket.socket):
    """A socket with next to no buffer."""

    size = 16 * 1024

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            self.setsockopt(socket.SOL_SOCKET, option, self.size)


def test_an_upload_that_is_taken_slowly_but_steadily_outlives_its_timeout(
    client_of: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "socket", Narrow)

    def take(sock: Any) -> None:
        end = piece = b" "
        while piece and not end.endswith(b"--\r\n"):
            piece = sock.recv(16 * 1024)
            end = end[-3:] + piece
            threading.Event().wait(0.04)  # a MiB takes longer than the timeout, and a quarter of it a third

    with Peer([[take, STORED]]) as peer:
        client_of(peer.url, timeout=2).upload_file("a", bytes(MIB + MIB // 4))


@pytest.mark.parametrize("size", [30_000, 60_000, 120_000])
def test_success_is_not_taken_for_granted_while_some_of_a_run_is_unsent(
    client_of: Clients, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    class Narrowest(Narrow):
        size = 2048

    monkeypatch.setattr(socket, "socket", Narrowest)
    with Peer([[Do.HEAD, RAN, Do.RST]]) as peer:
        got = outcome(client_of(peer.url), run(env={"BIG": "x" * size}))
    assert isinstance(got, BoxerConnectionError), got


# What has arrived by the deadline, and what has not


def sockets_to(port: int) -> Iterator[socket.socket]:
    """Yield copies of this process's sockets that are connected to a port, as the system shows them."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # other threads close theirs, and so does what lists them
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(name))) as sock:
                    if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.getpeername()[1] == port:
                        yield sock


def is_all_delivered(sock: socket.socket) -> bool:
    """Tell whether the peer's system has acknowledged all that was sent."""
    unsent = array.array("i", [-1])
    fcntl = importlib.import_module("fcntl")
    fcntl.ioctl(sock.fileno(), importlib.import_module("termios").TIOCOUTQ, unsent)
    return unsent[0] == 0


has_sockets_to_see = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="the system does not show sockets")


@has_sockets_to_see
def test_content_that_was_taken_by_the_deadline_counts(client_of: Clients, clock: Clock, ringing: Ringing) -> None:
    """It is taken while the program does something else, until past the deadline."""
    is_full, is_busy, is_taken = threading.Event(), threading.Event(), threading.Event()

    def be_busy() -> None:
        is_busy.set()
        assert is_taken.wait(30)
        clock.ahead += 1000

    def take(sock: Any) -> None:
        for own in sockets_to(peer.port):
            assert settles(lambda: not select.select([], [own], [], 0)[1])  # noqa: B023 - there is one
            if client_of.kind == "sync":
                ringing.action = be_busy
                ringing.start()
            is_full.set()
            assert is_busy.wait(30)
            while select.select([sock], [], [], 0)[0] or not is_all_delivered(own):
                sock.recv(MIB)
            is_taken.set()
            assert sock.recv(MIB), "the client did not go on"

    async def main(client: AsyncBoxerClient) -> None:
        call = asyncio.ensure_future(client.upload_file("a.txt", bytes(64 * MIB)))
        await asyncio.get_running_loop().run_in_executor(None, is_full.wait, 30)
        be_busy()
        await call

    with Peer([[take, failing("400 Bad Request"), Do.DRAIN]]) as peer:
        client = client_of(peer.url)
        if client_of.kind == "sync":
            got = outcome(client, LARGE)
        else:
            with pytest.raises(BoxerError) as caught:
                client.loop.run_until_complete(main(client.client))
            got = caught.value
    assert is_expected(got, refusal(400))  # and no word of time


@has_sockets_to_see
@pytest.mark.parametrize("is_tls", [False, True], ids=["plain", "TLS"])
@pytest.mark.parametrize("size", [1024, 100 * 1024, 3 * MIB], ids=["1 KiB", "100 KiB", "3 MiB"])
def test_an_answer_that_has_arrived_by_the_deadline_counts(
    client_of: Clients, clock: Clock, ringing: Ringing, ca: trustme.CA, size: int, is_tls: bool
) -> None:
    """It comes while the program does something else: in a signal handler, or in a step of its event loop."""
    has_come, is_busy, has_arrived = threading.Event(), threading.Event(), threading.Event()

    def be_busy() -> None:
        for sock in sockets_to(peer.port):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 * MIB)
        is_busy.set()
        assert has_arrived.wait(30)
        clock.ahead += 1000

    def send(sock: Any) -> None:
        if client_of.kind == "sync":
            ringing.action = be_busy
            ringing.start()
        has_come.set()
        assert is_busy.wait(30)
        sock.sendall(answer({**RUN, "stdout": "x" * size}))
        assert settles(lambda: is_all_delivered(sock))
        has_arrived.set()

    async def main(client: AsyncBoxerClient) -> RunResult:
        call = asyncio.ensure_future(client.run("image", ["true"]))
        await asyncio.get_running_loop().run_in_executor(None, has_come.wait, 30)
        be_busy()
        return await call

    with Peer([[Do.REQUEST, send]], context=serving(ca) if is_tls else None) as peer:
        client = client_of(peer.url, timeout=60, ssl_context=trusting(ca) if is_tls else None)
        is_sync = client_of.kind == "sync"
        result = do(client, RUN_IT) if is_sync else client.loop.run_until_complete(main(client.client))
        assert result.stdout == "x" * size


FLOODS: dict[str, tuple[bytes, bytes]] = {
    "white space before JSON": (raw("Content-Length: 999999999999"), b" " * 1000),
    "white space in chunks": (raw(IN_CHUNKS), b"3e8\r\n" + b" " * 1000 + b"\r\n"),
    "chunks of a byte": (raw(IN_CHUNKS), b"1\r\n \r\n" * 200),
    "chunks with extensions": (raw(IN_CHUNKS), b"1;" + b"x" * 1000 + b"\r\n \r\n"),
    "an error page in chunks": (raw(IN_CHUNKS, status="HTTP/1.1 502 Bad Gateway"), b"1\r\n \r\n"),
}


@pytest.mark.parametrize("flood", FLOODS)
def test_a_flood_does_not_outlast_the_deadline(client_of: Clients, clock: Clock, flood: str) -> None:
    def flooding() -> Iterator[bytes]:
        start, more = FLOODS[flood]
        yield from [start, *[more * 100] * 10]  # so much that there is always more to read
        clock.tick = 0.5  # and from now on, each look takes time
        yield from itertools.repeat(more * 100, 500)

    with Peer([[Do.REQUEST, flooding(), Do.DRAIN], [Do.REQUEST, WELL]]) as peer:
        client = client_of(peer.url)
        got = outcome(client, RUN_IT, timeout=2)
        clock.tick = 0
        if "error page" in flood and not is_expected(got, (BoxerTimeoutError, 0, "2 s")):
            assert is_expected(got, refusal(502))  # an error's content is cut where there is enough of it
        else:
            is_too_long = is_expected(got, (BoxerAPIError, 200, "longer than"))  # on a fast machine
            assert is_too_long or is_expected(got, (BoxerTimeoutError, 0, "2 s")), got
        assert clock.ahead < 40  # without an end, it is 250
        assert client.health()


# Connections that are long silent, and names with several addresses


@has_sockets_to_see
@pytest.mark.parametrize("is_tls", [False, True], ids=["plain", "TLS"])
def test_tcp_looks_whether_the_peer_is_still_there(client_of: Clients, ca: trustme.CA, is_tls: bool) -> None:
    found: list[tuple[int, ...]] = []

    def look(_: Any) -> None:
        for sock in sockets_to(peer.port):
            is_on = sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            names = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")
            found.append((is_on, *(sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in names)))

    with Peer([[Do.REQUEST, look, WELL]], context=serving(ca) if is_tls else None) as peer:
        assert client_of(peer.url, ssl_context=trusting(ca) if is_tls else None).health()
    ((is_on, idle, interval, count),) = found
    assert is_on and 30 <= idle <= 90 and interval * count <= 60


def test_a_silent_address_costs_some_seconds_if_the_name_has_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both clients, and both names: all at once, since nothing but time makes a connection late."""
    look_up = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("flags"):
            return look_up(host, port, *args, **kwargs)
        ports = [silent] if "lone" in str(host) else [silent, port]
        return [address for each in ports for address in look_up("127.0.0.1", each, *args, **kwargs)]

    def ask(kind: str, name: str, timeout: float) -> tuple[Any, float]:
        with contextlib.closing(Clients(kind)) as client_of:
            client, began = client_of(f"http://{name}.test:{host.port}", retries=0), time.monotonic()
            return outcome(client, GET_HEALTH, timeout=timeout), time.monotonic() - began

    with never_accepting() as listener, Host(lambda _: [WELL]) as host, ThreadPoolExecutor(4) as executor:
        silent = listener.getsockname()[1]
        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        first = [executor.submit(ask, kind, "boxer", 60) for kind in ("sync", "async")]
        only = [executor.submit(ask, kind, "lone", 7) for kind in ("sync", "async")]
        for got, took in (future.result() for future in first):
            assert got is True and took < 20, got
        for got, _ in (future.result() for future in only):
            assert is_expected(got, (BoxerTimeoutError, 0, "7 s")), got


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "[::1]", "[::1%251]"])  # the last one has a zone
def test_this_machine_is_reached_without_a_thread(name: str) -> None:
    is_over = threading.Event()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        busy = loop.run_in_executor(None, is_over.wait, 30)
        try:
            async with AsyncBoxerClient(f"http://{name}:{peer.port}", timeout=10) as client:
                assert await client.health()
                await client.upload_file("a.txt", b"content")
                assert not busy.done()
        finally:
            is_over.set()
            await busy

    with Peer.answering(WELL, STORED, host="::1" if name.startswith("[") else "127.0.0.1") as peer:
        asyncio.run(main())


# ---------------------------------------------------------------------------------------------------------------------
# Both clients: early answers
# ---------------------------------------------------------------------------------------------------------------------

# Calls whose answer comes before all of the request is sent, though it would let the connection be kept; and what comes
# of each.
EARLY: dict[str, tuple[Call, bytes, Any]] = {
    "an upload": (LARGE, answer({"error": "no"}, "400 Bad Request"), refusal(400, "no")),
    "a stored upload": (LARGE, STORED, lost("before it had all of the request")),
    "a run": (BIG_RUN, answer({"error": "no"}, "400 Bad Request"), refusal(400, "no")),
    "a run that went well": (BIG_RUN, RAN, lost("before it had all of the request")),
}


@pytest.mark.parametrize("early", EARLY)
def test_a_connection_that_answered_early_is_not_used_again(client_of: Clients, early: str) -> None:
    (call, what, expected), has_answer = EARLY[early], threading.Event()
    with Peer([[Do.HEAD, what, lambda _: has_answer.wait(30), Do.DRAIN], [Do.REQUEST, WELL]]) as peer:
        client = client_of(peer.url, timeout=20)
        got = outcome(client, call)
        has_answer.set()
        assert is_expected(got, expected), got
        assert client.health()


@pytest.mark.parametrize("end", [Do.FIN, Do.RST])
def test_a_run_that_was_not_wholly_sent_did_not_succeed(client_of: Clients, end: Do) -> None:
    with Peer([[Do.HEAD, RAN, end]] * 10) as peer:
        client = client_of(peer.url)
        for _ in range(10):
            assert is_expected(outcome(client, BIG_RUN), lost(peer.authority))


def refuse_after_100_kib(sock: Any) -> None:
    left = 100 * 1024
    while left > 0:
        left -= len(sock.recv(min(left, 65536)))
    sock.sendall(failing("413 Request Entity Too Large", "too much", Connection="close"))


@pytest.mark.parametrize("end", [Do.RST, Do.FIN, Do.DRAIN])
@pytest.mark.parametrize("is_tls", [False, True], ids=["plain", "TLS"])
def test_a_413_in_the_middle_of_an_upload_arrives(
    client_of: Clients, ca: trustme.CA, is_tls: bool, end: Do, large_file: Path
) -> None:
    steps: list[Any] = [refuse_after_100_kib, *([close_notify] if is_tls and end is not Do.DRAIN else []), end]
    with Peer([steps] * 40 + [[Do.REQUEST, WELL]], context=serving(ca) if is_tls else None) as peer:
        client = client_of(peer.url, ssl_context=trusting(ca) if is_tls else None)
        for got in uploads(client, large_file):
            # Over TLS, asyncio may learn of a reset before it has read what came before that.
            is_lost = client_of.kind == "async" and is_tls and end is not Do.DRAIN and is_expected(got, lost())
            assert is_lost or is_expected(got, refusal(413, "too much")), got
        assert client.health()


def test_a_413_of_the_stand_in_arrives(client_of: Clients, large_file: Path) -> None:
    with StandIn(upload_limit=MIB) as server:
        client = client_of(server.url)
        for got in uploads(client, large_file):
            assert is_expected(got, refusal(413)), got
        assert client.health()


def test_the_rest_of_an_early_answer_is_waited_for_idly(client_of: Clients) -> None:
    begun = b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 9\r\n\r\n"
    with Peer([[Do.HEAD, begun, Do.DRAIN]]) as peer:
        client = client_of(peer.url, timeout=0.3)
        with Counting() as counting:
            error = outcome(client, upload(bytes(LONG)))
    assert is_expected(error, (BoxerTimeoutError, 0, "no complete answer within 0.3 s"))
    assert counting.calls < 2000


def test_a_flood_does_not_pile_up_while_a_file_is_read(client_of: Clients) -> None:
    is_blocked = threading.Event()

    def flood(sock: Any) -> None:
        sock.setblocking(False)
        sent = 0
        with contextlib.suppress(ConnectionError):  # the blocking client may see the answer before it reads the file
            while select.select([], [sock], [], 1)[1]:
                sent += sock.send(bytes(MIB))
                assert sent < 64 * MIB, "the client takes whatever comes"
        is_blocked.set()

    said = answer(None, "413 Too Large", Content_Length=str(1 << 40))
    with Peer([[Do.HEAD, said, flood, Do.DRAIN], [Do.REQUEST, WELL]]) as peer:
        client = client_of(peer.url)
        assert is_expected(outcome(client, ("upload_file", ("a.txt", Waiting(is_blocked)), {})), refusal(413))
        assert client.health()


# ---------------------------------------------------------------------------------------------------------------------
# Both clients: cancellation
# ---------------------------------------------------------------------------------------------------------------------

# Ways to break off a call, and the exception that whoever does so sees.
HOWS: dict[str, type[BaseException]] = {"cancel": asyncio.CancelledError, "wait_for": asyncio.TimeoutError}
if sys.version_info >= (3, 11):
    HOWS.update({"timeout": TimeoutError, "TaskGroup": Exception})


@pytest.mark.parametrize("how", HOWS)
def test_a_cancelled_call_closes_its_connection(how: str) -> None:
    waiting, gone = threading.Event(), threading.Event()

    async def main() -> None:
        async with AsyncBoxerClient(peer.url, max_connections=1) as client:
            with pytest.raises(HOWS[how]):
                await break_off(how, client.run("image", ["true"]), lambda: waiting.wait(30))
            await asyncio.get_running_loop().run_in_executor(None, gone.wait, 30)
            assert gone.is_set()
            assert await client.health()

    first: list[Any] = [Do.REQUEST, lambda _: waiting.set(), Do.GONE, lambda _: gone.set(), Do.FIN]
    with Peer([first, [Do.REQUEST, WELL]]) as peer:
        asyncio.run(main())


def test_a_call_cancelled_while_it_waits_for_a_connection_takes_none() -> None:
    waiting, cancelled = threading.Event(), threading.Event()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with AsyncBoxerClient(host.url, max_connections=1) as client:
            first = asyncio.ensure_future(client.run("image", ["true"]))
            others = [asyncio.ensure_future(client.health()) for _ in range(5)]
            await loop.run_in_executor(None, waiting.wait, 30)
            for other in others[:3]:
                other.cancel()
            first.cancel()
            loop.call_soon(others[3].cancel)  # when its turn has come, and before it knows
            assert await asyncio.wait_for(others[4], 30)
            assert all(await asyncio.wait_for(asyncio.gather(*[client.health() for _ in range(3)]), 30))
            assert [call.cancelled() for call in (first, *others)] == [True] * 5 + [False]
            cancelled.set()

    def respond(request: Received) -> list[Any]:
        return [waiting.set, lambda: cancelled.wait(30), Do.FIN] if "/run" in request.line else [WELL]

    with Host(respond) as host:
        asyncio.run(main())


@pytest.mark.parametrize("is_kept", [True, False], ids=["kept", "fresh"])
@pytest.mark.parametrize("is_folder", [False, True], ids=["run", "folder"])
def test_a_call_can_be_cancelled_at_every_step_of_its_loop(is_kept: bool, is_folder: bool, folder: Path) -> None:
    async def main() -> int:
        async with AsyncBoxerClient(host.url, max_connections=1, retries=0) as client:
            for steps in itertools.count():
                call = asyncio.ensure_future(client.upload_path(folder) if is_folder else client.run("image", ["true"]))
                for _ in range(steps):
                    await asyncio.sleep(0)
                if call.done():
                    assert call.result()
                    return steps
                call.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    assert await asyncio.wait_for(call, 30)
                assert await asyncio.wait_for(client.health(), 30)
        raise AssertionError

    last = WELL if is_kept else WELL_AND_BYE
    answers = {"POST /run": RAN, "POST /files": STORED, "GET /healthz": last}
    with Frail(lambda request: [answers[request.line.rpartition(" ")[0]]]) as host:
        assert asyncio.run(main()) > 3


@types.coroutine
def cancelling(coroutine: Any, number: int, late: bool) -> Generator[Any, Any, None]:
    """Carry out a coroutine; cancel its task when that waits for the n-th time, or (late) when this wait is over."""
    step = functools.partial(coroutine.send, None)
    for waits in itertools.count():
        try:
            awaited = step()
        except StopIteration:
            assert waits <= number, "the cancellation was lost"
            return
        if waits == number:
            task: Any = asyncio.current_task()
            awaited.add_done_callback(lambda _, task=task: task.cancel()) if late and awaited else task.cancel()
        try:
            step = functools.partial(coroutine.send, (yield awaited))
        except BaseException as error:  # noqa: BLE001 - it is for the coroutine to see
            step = functools.partial(coroutine.throw, error)


async def was_cancelled(coroutine: Any, number: int, late: bool) -> bool:
    """Cancel a call when it waits for the n-th time, or as this wait is over; return False if it ends before."""

    async def call() -> None:
        await cancelling(coroutine, number, late)

    try:
        await asyncio.wait_for(asyncio.ensure_future(call()), 30)
    except asyncio.CancelledError:
        return True
    return False


async def upload_of_a_file(client: AsyncBoxerClient, path: Path) -> None:
    with path.open("rb") as file:
        await client.upload_file("a.txt", file)


# What a call waits for, and a call that does so.
WAITS: dict[str, Callable[[AsyncBoxerClient, Path, str], Any]] = {
    "TLS": lambda client, _, name: client.run("image", [name]),
    "a tunnel": lambda client, _, name: client.run("image", [name]),
    "another try": lambda client, _, name: client.run("image", [name]),
    "a file": lambda client, folder, _: upload_of_a_file(client, folder / "a.txt"),
    "files": lambda client, folder, _: client.upload_path(folder),
    "pieces of an answer": lambda client, _, name: client.download_file(name),
}


# The server's own: ssl leaves a socket unclosed that was reset before it could be wrapped.
@pytest.mark.filterwarnings(r"ignore:unclosed <ssl.SSLSocket [^>]*laddr=\('127.0.0.1', [0-9]+\)>:ResourceWarning")
@pytest.mark.parametrize("late", [False, True], ids=["when it waits", "when it goes on"])
@pytest.mark.parametrize("what", WAITS)
def test_a_call_can_be_cancelled_whenever_it_waits(
    ca: trustme.CA, setenv: Any, folder: Path, what: str, late: bool
) -> None:
    lost_once: set[bytes] = set()

    def respond(request: Received) -> list[bytes]:
        if "/healthz" in request.line:
            return [WELL_AND_BYE]  # so that each call begins with a connection
        if what == "another try" and request.body not in lost_once:
            lost_once.add(request.body)
            return [failing(BROKEN, RACES[0])]
        if "GET" in request.line:
            said = raw(IN_CHUNKS, body=chunks(1, 2, 3))
            return [said[at : at + 40] for at in range(0, len(said), 40)]
        return [RAN if "/run" in request.line else STORED]

    async def main() -> int:
        async with AsyncBoxerClient(url, max_connections=1, ssl_context=trusting(ca)) as client:
            for number in itertools.count():
                goes_on = await was_cancelled(WAITS[what](client, folder, str(number)), number, late)
                assert await asyncio.wait_for(client.health(), 30)
                if not goes_on:
                    return number
        raise AssertionError

    is_tls = what in ("TLS", "a tunnel")
    with Frail(respond, serving(ca, "127.0.0.1", "boxer.test") if is_tls else None, what == "a tunnel") as host:
        setenv("https_proxy", host.url)
        url = "https://boxer.test" if what == "a tunnel" else f"http{'s' if is_tls else ''}://{host.authority}"
        assert asyncio.run(main()) > 1


def test_a_call_that_is_cancelled_as_its_answer_comes_is_cancelled() -> None:
    """The loop finds the answer, and before that a task that cancels the call."""
    arrived, is_blocked, answered = threading.Event(), threading.Event(), threading.Event()

    async def main() -> None:
        async with AsyncBoxerClient(host.url, max_connections=1) as client:
            call = asyncio.ensure_future(client.run("image", ["true"]))
            await asyncio.get_running_loop().run_in_executor(None, arrived.wait, 30)
            is_blocked.set()
            answered.wait(30)
            await asyncio.sleep(0)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert await client.health()

    def respond(request: Received) -> list[Any]:
        return [WELL] if "/healthz" in request.line else [arrived.set, lambda: is_blocked.wait(30), RAN, answered.set]

    with Host(respond) as host:
        asyncio.run(main())


def test_a_turn_that_comes_as_its_call_is_cancelled_goes_to_the_next() -> None:
    async def main() -> None:
        async with AsyncBoxerClient(host.url, max_connections=1) as client:

            async def first() -> None:
                assert await client.health()
                second.cancel()  # it has its turn now, and has not run yet

            third: Any
            leading = asyncio.ensure_future(first())
            await asyncio.sleep(0)
            second, third = (asyncio.ensure_future(client.health()) for _ in range(2))
            await leading
            with pytest.raises(asyncio.CancelledError):
                await second
            assert await third
            assert await client.health()

    with Host(lambda _: [WELL]) as host:
        asyncio.run(main())


@pytest.mark.skipif(find_sandbox() is None, reason="no sandbox works on this machine")
@pytest.mark.parametrize("how", HOWS)
def test_a_cancelled_run_is_killed(how: str) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with AsyncBoxerClient(standin.url) as client:
            other = asyncio.ensure_future(client.run("python:3.12-slim", ["sleep", "29"]))
            with pytest.raises(HOWS[how]):
                await break_off(
                    how,
                    client.run("python:3.12-slim", ["sleep", "29"]),
                    lambda: standin.wait_for(lambda: len(standin.runs_live) == 2, 60),
                )
            assert await loop.run_in_executor(None, standin.wait_for, lambda: standin.runs_killed == 1, 60)
            assert await client.health() and not other.done()
        with pytest.raises(BoxerConnectionError):
            await other
        assert await loop.run_in_executor(None, standin.wait_for, lambda: standin.runs_killed == 2, 60)

    with StandIn() as standin:
        asyncio.run(main())


@pytest.mark.parametrize("connection", ["fresh", "kept", "TLS"])
@pytest.mark.parametrize("call", [RUN_IT, DOWNLOAD, LARGE], ids=["run", "download", "upload"])
def test_an_interrupted_call_closes_its_connection(
    call: Call, connection: str, ca: trustme.CA, interrupts: Interrupts
) -> None:
    is_over, context = threading.Event(), serving(ca) if connection == "TLS" else None
    before: list[Any] = [Do.REQUEST, WELL] if connection == "kept" else []
    half: list[Any] = [answer("abc")[:-1]] if call is DOWNLOAD else []
    script = [[*before, Do.HEAD, *half, lambda _: interrupts(is_over), Do.DRAIN], [Do.REQUEST, WELL]]
    trusted = trusting(ca) if connection == "TLS" else None
    with Peer(script, context=context) as peer, BoxerClient(peer.url, max_connections=1, ssl_context=trusted) as client:
        assert not before or client.health()
        with pytest.raises(KeyboardInterrupt):
            do(client, call)
        is_over.set()
        assert in_time(client.health)


def test_a_call_can_be_interrupted_while_it_waits_for_its_turn(interrupts: Interrupts) -> None:
    has_come, is_over, may_end = threading.Event(), threading.Event(), threading.Event()

    def interrupt() -> None:
        threading.Event().wait(0.2)  # by then the call waits
        interrupts(is_over)

    def wait_for_turn() -> None:
        executor.submit(interrupt)
        client.run("image", ["true"])

    script: list[list[Any]] = [
        [Do.REQUEST, lambda _: has_come.set(), lambda _: may_end.wait(30), RAN, Do.REQUEST, WELL]
    ]
    with Peer(script) as peer, BoxerClient(peer.url, max_connections=1) as client, ThreadPoolExecutor(2) as executor:
        first = executor.submit(do, client, RUN_IT)
        assert has_come.wait(30)
        with pytest.raises(KeyboardInterrupt):
            wait_for_turn()
        is_over.set()
        may_end.set()
        assert first.result() == RESULT
        assert in_time(client.health)


def test_a_call_can_be_broken_off_while_it_pauses(
    client_of: Clients, is_pausing: threading.Event, interrupts: Interrupts
) -> None:
    def interrupt() -> None:
        is_pausing.wait(30)
        interrupts(is_over)

    is_over = threading.Event()
    with Peer.answering(failing("429 Slow Down", Retry_After="60"), WELL) as peer:
        client = client_of(peer.url, max_connections=1)
        if client_of.kind == "sync":
            interrupting = threading.Thread(target=interrupt)
            interrupting.start()
            with pytest.raises(KeyboardInterrupt):
                client.run("image", ["true"])
            is_over.set()
            interrupting.join()
            assert in_time(client.health)
        else:
            run = client.client.run("image", ["true"])
            with pytest.raises(asyncio.CancelledError):
                client.loop.run_until_complete(break_off("cancel", run, lambda: is_pausing.wait(30)))
            assert client.health()


# Calls that end in the middle of something of the user's


class Ending(Unseekable):
    """Content whose read ends the call in some way, once some of it was read."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(bytes(2 * MIB))
        self.error = error

    def read(self, size: int = -1) -> bytes:
        if size and self._content.tell() >= MIB:
            raise self.error
        return super().read(size)


@pytest.mark.parametrize("error", [KeyError("k"), OSError(5, "o"), ConnectionResetError("c"), GeneratorExit()])
def test_a_file_that_fails_gives_back_its_turn_and_its_connection_is_closed(
    client_of: Clients, error: BaseException
) -> None:
    is_gone = threading.Event()
    with Peer([[Do.HEAD, Do.DRAIN, lambda _: is_gone.set()], [Do.REQUEST, WELL]]) as peer:
        client = client_of(peer.url, max_connections=1)
        with pytest.raises(type(error)) as caught:
            client.upload_file("a.txt", Ending(error))
        assert caught.value is error
        assert is_gone.wait(30)
        assert client.health()


def test_a_file_that_is_a_socket_s_fails_with_its_own_error(client_of: Clients) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, ours.makefile("rb") as file, Peer([[Do.HEAD, Do.DRAIN], [Do.REQUEST, WELL]]) as peer:
        ours.settimeout(0.2)
        client = client_of(peer.url, max_connections=1)
        with pytest.raises(OSError, match="timed out") as caught:
            client.upload_file("a.txt", file)
        assert not isinstance(caught.value, BoxerError)
        assert client.health()


@types.coroutine
def abandoning(coroutine: Any, number: int) -> Generator[Any, Any, bool]:
    """Carry out a coroutine, and close it when it waits for the n-th time; return False if it ends before."""
    step = functools.partial(coroutine.send, None)
    for waits in itertools.count():
        try:
            awaited = step()
        except StopIteration:
            return False
        if waits == number:
            coroutine.close()
            return True
        try:
            step = functools.partial(coroutine.send, (yield awaited))
        except BaseException as error:  # noqa: BLE001 - it is for the coroutine to see
            step = functools.partial(coroutine.throw, error)
    raise AssertionError


ABANDONED: dict[str, Callable[[AsyncBoxerClient], Any]] = {
    "a run": lambda client: client.run("image", ["true"]),
    "a file": lambda client: client.upload_file("a.txt", io.BytesIO(b"content")),
}


@pytest.mark.parametrize("what", ABANDONED)
@pytest.mark.parametrize("is_tls", [False, True], ids=["plain", "TLS"])
def test_a_call_can_be_abandoned_whenever_it_waits(ca: trustme.CA, is_tls: bool, what: str) -> None:
    """As a coroutine is that nobody awaits any more: it is closed, and cannot wait for anything then."""

    async def main() -> int:
        async with AsyncBoxerClient(url, max_connections=1, ssl_context=trusting(ca)) as client:
            for number in itertools.count():

                async def call() -> bool:
                    return await abandoning(ABANDONED[what](client), number)  # noqa: B023 - it is awaited at once

                is_abandoned = await asyncio.wait_for(call(), 30)
                assert await asyncio.wait_for(client.health(), 30)
                if not is_abandoned:
                    return number
        raise AssertionError

    def respond(request: Received) -> list[bytes]:
        return [WELL_AND_BYE if "/healthz" in request.line else RAN if "/run" in request.line else STORED]

    with Frail(respond, serving(ca) if is_tls else None) as host:
        url = f"http{'s' if is_tls else ''}://{host.authority}"
        assert asyncio.run(main()) > 1


# ---------------------------------------------------------------------------------------------------------------------
# Both clients: closing
# ---------------------------------------------------------------------------------------------------------------------


def test_a_client_is_closed_by_with_and_can_be_closed_twice(client_of: Clients, tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with Peer.answering(WELL) as peer, client_of(peer.url) as client:
        assert client.health()
    client.close()
    for method, args in [("health", ()), *EVERY_METHOD, ("upload_path", (tmp_path,))]:
        with pytest.raises(RuntimeError, match=r"BoxerClient\('http://127.0.0.1:[0-9]+'\) is closed"):
            getattr(client, method)(*args)
    with pytest.raises(RuntimeError, match="is closed"), client:
        pass


@pytest.mark.parametrize("is_in_a_cycle", [False, True], ids=["", "in a cycle"])
def test_a_client_that_was_never_closed_warns_and_leaves_nothing(client_of: Clients, is_in_a_cycle: bool) -> None:
    with Peer.answering(WELL) as peer:
        made = [client_of.cls(peer.url)]
        made[0].itself = made[0] if is_in_a_cycle else None
        health = made[0].health()
        assert (health if client_of.kind == "sync" else client_of.loop.run_until_complete(health)) is True
        with pytest.warns(ResourceWarning, match=rf"^unclosed {client_of.cls.__name__}\('{peer.url}'\)$"):
            drop(made)


def test_a_client_that_is_dropped_with_a_call_that_ends_with_its_loop_warns_and_leaves_nothing() -> None:
    waiting = threading.Event()

    async def main() -> None:
        client = AsyncBoxerClient(peer.url)
        calls.append(asyncio.ensure_future(client.run("image", ["true"])))
        await asyncio.get_running_loop().run_in_executor(None, waiting.wait, 30)

    def begin_and_drop() -> None:
        asyncio.run(main())
        assert calls[0].cancelled()
        drop(calls)

    calls: list[Any] = []
    unclosed = pytest.warns(ResourceWarning, match=r"^unclosed AsyncBoxerClient\('http://127.0.0.1:[0-9]+'\)$")
    with Peer([[Do.REQUEST, lambda _: waiting.set(), Do.GONE]]) as peer, unclosed:
        begin_and_drop()


def test_a_client_that_could_not_be_made_does_not_warn(client_of: Clients) -> None:
    with pytest.raises(BoxerValidationError):
        client_of.cls("nowhere")


# Calls that go on when their client is closed. GET_HEALTH comes before them, and leaves a kept connection.
IN_FLIGHT: dict[str, list[Call]] = {
    "a run": [RUN_IT],
    "a download on a kept connection": [GET_HEALTH, DOWNLOAD],
    "an upload": [LARGE],
    "calls that wait for a connection": [RUN_IT, RUN_IT, DOWNLOAD],
}


@pytest.mark.parametrize("name", IN_FLIGHT)
def test_closing_a_client_ends_its_calls_with_a_connection_error(client_of: Clients, name: str) -> None:
    calls, waiting, is_over = IN_FLIGHT[name], threading.Event(), threading.Event()

    def respond(request: Received) -> list[Any]:
        return [WELL] if "/healthz" in request.line else [waiting.set, lambda: is_over.wait(30), Do.FIN]

    def wait(_: Any) -> None:
        waiting.set()
        is_over.wait(30)

    peer = Peer([[Do.HEAD, wait, Do.DRAIN]]) if LARGE in calls else Host(respond)
    with peer:
        client = client_of(peer.url, max_connections=1)
        if calls[0] is GET_HEALTH:
            assert client.health()
            calls = calls[1:]
        ended = closed_meanwhile(client, calls, waiting)
        is_over.set()
        assert all(is_expected(error, lost("client")) for error in ended), ended


def closed_meanwhile(client: Any, calls: list[Call], waiting: threading.Event) -> list[Any]:
    """Make calls at once, close the client once the first request has arrived, and return what the calls raise."""

    async def main() -> list[Any]:
        tasks = [
            asyncio.ensure_future(getattr(client.client, method)(*args, **kwargs)) for method, args, kwargs in calls
        ]
        await asyncio.get_running_loop().run_in_executor(None, waiting.wait, 30)
        await client.client.aclose()
        return await asyncio.gather(*tasks, return_exceptions=True)

    if not isinstance(client, BoxerClient):
        return client.loop.run_until_complete(main())  # type: ignore[no-any-return]
    with ThreadPoolExecutor(len(calls)) as executor:
        futures = [executor.submit(do, client, call) for call in calls]
        waiting.wait(30)
        client.close()
        return [future.exception() for future in futures]


def test_an_upload_whose_end_could_not_be_sent_did_not_succeed(client_of: Clients) -> None:
    """The server reports success and resets the connection while the file's last piece is read."""
    is_reset = threading.Event()

    class Last(Unseekable):
        def read(self, size: int = -1) -> bytes:
            piece = super().read(size)
            assert piece or not size or is_reset.wait(30)
            return piece

    def reset(sock: Any) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(sock.detach())
        is_reset.set()

    with Peer([[Do.HEAD, STORED, reset, Do.FIN]]) as peer:
        got = outcome(client_of(peer.url, retries=0), upload(Last(b"content")))
    assert type(got) is BoxerConnectionError, got


def test_closing_a_client_ends_the_calls_that_pause(client_of: Clients, is_pausing: threading.Event) -> None:
    is_over, faults = threading.Event(), list[str]()

    def watch() -> None:
        if not is_over.wait(4):
            faults.append("it waits")

    def tell() -> None:
        is_pausing.wait(30)
        waiting.set()
        watching.start()

    with Host(lambda _: [failing("429 Slow Down", Retry_After="6")]) as host:
        client, waiting, watching = client_of(host.url), threading.Event(), threading.Thread(target=watch)
        telling = threading.Thread(target=tell)
        telling.start()
        ended = closed_meanwhile(client, [RUN_IT], waiting)
        is_over.set()
        telling.join()
        watching.join()
        assert [type(error) for error in ended] == [BoxerConnectionError]
    assert not faults


def test_closing_a_client_ends_the_pause_of_its_call_at_once(client_of: Clients, is_pausing: threading.Event) -> None:
    """As the log tells, the pause has begun, or is about to."""
    with Host(lambda _: [failing("503 Service Unavailable", Retry_After="3600")]) as host:
        client = client_of(host.url, timeout=None)
        (ended,) = closed_meanwhile(client, [RUN_IT], is_pausing)
        assert is_expected(ended, lost("the client was closed"))
        assert ended.request_sent, "the try before the pause has been"
    assert host.connections == 1


def test_closing_a_client_ends_an_attempt_to_connect_at_once(client_of: Clients) -> None:
    with never_accepting() as listener:
        client = client_of(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=None)
        connecting = threading.Event()
        connecting.set()
        (ended,) = closed_meanwhile(client, [RUN_IT], connecting)
        assert is_expected(ended, lost("closed"))


def test_closing_a_client_ends_an_upload_whose_file_is_being_read() -> None:
    can_be_read, is_read = threading.Event(), threading.Event()

    class Telling(Waiting):
        def read(self, size: int = -1) -> bytes:
            if size:
                is_read.set()
            return super().read(size)

    async def main() -> None:
        client: Any = AsyncBoxerClient(peer.url)
        call = asyncio.ensure_future(client.upload_file("a.txt", Telling(can_be_read)))
        await asyncio.get_running_loop().run_in_executor(None, is_read.wait, 30)
        await client.aclose()
        with pytest.raises(BoxerConnectionError, match="client"):
            await call
        can_be_read.set()

    with Peer([[Do.HEAD, Do.DRAIN]]) as peer:
        asyncio.run(main())


def test_a_close_does_not_wait_so_that_it_cannot_be_cancelled_half_way() -> None:
    is_over, waiting = threading.Event(), threading.Semaphore(0)

    def respond(request: Received) -> list[Any]:
        return [waiting.release, lambda: is_over.wait(30), Do.FIN] if "/run" in request.line else [WELL]

    async def main() -> None:
        client = AsyncBoxerClient(host.url)
        run = asyncio.ensure_future(client.run("image", ["true"]))
        assert await client.health()
        await asyncio.get_running_loop().run_in_executor(None, waiting.acquire)
        with pytest.raises(StopIteration):
            client.aclose().send(None)  # as a task does, for each of its steps
        with pytest.raises(RuntimeError, match="closed"):
            await client.health()
        await client.aclose()
        with pytest.raises(BoxerConnectionError):
            await asyncio.wait_for(run, 30)

    with Host(respond) as host:
        asyncio.run(main())
        is_over.set()


SILENT: dict[str, Call] = {"run": RUN_IT, "download": DOWNLOAD, "upload": upload(io.BytesIO(b"content"))}


@pytest.mark.parametrize("name", SILENT)
def test_a_call_of_a_task_ends_at_once_whenever_the_client_is_closed(name: str) -> None:
    """After each number of rounds of the loop, until the server, which never answers, has all of the request."""

    async def main(rounds: int) -> None:
        client = AsyncBoxerClient(host.url, timeout=None)
        method, args, _ = SILENT[name]
        call = asyncio.ensure_future(getattr(client, method)(*args))
        for _ in range(rounds):
            await asyncio.sleep(0)
        await client.aclose()
        with pytest.raises((BoxerConnectionError, RuntimeError), match=r"closed|broken off"):
            await asyncio.wait_for(call, 10)

    with Frail(lambda _: [lambda: is_over.wait(30)]) as host:
        is_over = threading.Event()
        for rounds in range(20):
            asyncio.run(main(rounds))
        is_over.set()


ABOUT_TO_WAIT = {
    "for another try": [failing("503 Service Unavailable", Retry_After="3600")],
    "for the rest": [RAN[:20]],
}


@pytest.mark.parametrize("what", ABOUT_TO_WAIT)
def test_a_task_that_is_about_to_wait_ends_at_once_when_the_client_is_closed(what: str) -> None:
    async def main(rounds: int) -> None:
        client, answered = AsyncBoxerClient(host.url, timeout=None), asyncio.Event()
        loop = asyncio.get_running_loop()
        tell.append(lambda: loop.call_soon_threadsafe(answered.set))
        call = asyncio.ensure_future(client.run("image", ["true"]))
        await answered.wait()
        for _ in range(rounds):
            await asyncio.sleep(0)
        await client.aclose()
        with pytest.raises(BoxerConnectionError, match=r"closed|broken off"):
            await asyncio.wait_for(call, 10)

    tell: list[Any] = []
    with Host(lambda _: [*ABOUT_TO_WAIT[what], tell.pop()]) as host:
        for rounds in range(6):
            asyncio.run(main(rounds))


@pytest.mark.parametrize("name", SILENT)
def test_a_call_of_a_thread_ends_at_once_wherever_it_is_when_the_client_is_closed(name: str) -> None:
    """Another thread closes the client as the call calls its n-th function, or as soon after as it can."""

    def begins(client: BoxerClient, left: int) -> bool:
        def look(frame: Any, event: str, _: Any) -> None:
            nonlocal left
            left -= event == "call" and frame.f_code.co_filename == boxer.__file__
            if left < 0 and not may_close.is_set():
                sys.setprofile(None)
                may_close.set()
                closer.join(0.02)  # it waits for this one if that has a lock

        def work() -> None:
            sys.setprofile(look)
            try:
                results.append(outcome(client, SILENT[name]))
            except RuntimeError as error:  # it was closed before the call had begun
                results.append(error)
            finally:
                sys.setprofile(None)

        def close() -> None:
            may_close.wait(30)
            client.close()

        may_close, results = threading.Event(), list[Any]()
        closer = threading.Thread(target=close)
        worker = threading.Thread(target=work)
        closer.start()
        worker.start()
        if not settles(lambda: may_close.is_set() or len(host.seen) > seen):
            may_close.set()
        worker.join(0.2 if not may_close.is_set() else 10)
        is_beyond = not may_close.is_set()  # the call waits for its answer
        may_close.set()
        worker.join(10)
        closer.join(10)
        assert re.search("closed|broken off", str(results[0]))
        return not is_beyond

    with Frail(lambda _: [lambda: is_over.wait(30)]) as host:
        is_over = threading.Event()
        for number in itertools.count():
            seen = len(host.seen)
            if not begins(BoxerClient(host.url, timeout=None), number):
                break
        is_over.set()
    assert number > 10


def test_closing_a_client_ends_its_calls_in_the_loops_of_other_threads() -> None:
    arrived, is_over = threading.Event(), threading.Event()
    with Frail(lambda _: [arrived.set, lambda: is_over.wait(30)]) as host, ThreadPoolExecutor(1) as executor:
        client = AsyncBoxerClient(host.url, timeout=None)
        call = executor.submit(lambda: asyncio.run(client.run("image", ["true"])))
        arrived.wait(30)
        asyncio.run(client.aclose())
        with pytest.raises(BoxerConnectionError, match="closed"):
            call.result(30)
        is_over.set()


# ---------------------------------------------------------------------------------------------------------------------
# Both clients: threads
# ---------------------------------------------------------------------------------------------------------------------


def test_threads_that_take_turns_at_few_connections_all_get_theirs(hasty_threads: None) -> None:
    with (
        Host(lambda _: [RAN]) as host,
        BoxerClient(host.url, max_connections=2) as client,
        ThreadPoolExecutor(16) as some,
    ):
        assert {*some.map(lambda _: type(outcome(client, RUN_IT)), range(2_000))} == {RunResult}


def test_threads_with_loops_of_their_own_do_not_disturb_each_other_when_they_leave_loops_behind(
    hasty_threads: None,
) -> None:
    async def call() -> bool:
        barrier.wait(30)
        is_well = await client.health()
        barrier.wait(30)  # so that all of these loops end together, and the next ones find them all
        return is_well

    # Before Python 3.12, whatever makes an object may collect garbage, which may let another thread go on.
    barrier, thresholds = threading.Barrier(16), gc.get_threshold()
    with Host(lambda _: [WELL]) as host, ThreadPoolExecutor(16) as executor:
        client = AsyncBoxerClient(host.url)
        assert asyncio.run(client.health())
        gc.callbacks.append(let_others_go_on)
        gc.set_threshold(20)
        try:
            for _ in range(20):
                futures = [executor.submit(asyncio.run, call()) for _ in range(16)]
                errors = {type(future.exception()) for future in futures} - {threading.BrokenBarrierError, type(None)}
                assert errors == set()
                assert [future.result() for future in futures] == [True] * 16
        finally:
            gc.set_threshold(*thresholds)
            gc.callbacks.remove(let_others_go_on)
        asyncio.run(client.aclose())


def let_others_go_on(*_: Any) -> None:
    time.sleep(0)


# ---------------------------------------------------------------------------------------------------------------------
# Both clients: forks
# ---------------------------------------------------------------------------------------------------------------------

FORKING = """
import asyncio, multiprocessing, os, sys, threading, traceback
from boxer import AsyncBoxerClient, BoxerClient

def check(client, name):
    assert client.download_file(name) == name.encode()

async def check_async(client, name):
    assert await client.download_file(name) == name.encode()

async def check_and_close(client, name):
    async with client:
        await check_async(client, name)

def in_child(function, *args):
    child = os.fork()
    if not child:
        try:
            function(*args)
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.waitpid(child, 0)
"""
# What a program does about a fork, and how many connections that takes.
FORKS: dict[str, tuple[str, int]] = {
    "both use the client": ("""
with BoxerClient() as client:
    check(client, "parent")
    in_child(check, client, "child")
    check(client, "parent")
""", 2),
    "the child closes the client": ("""
with BoxerClient() as client:
    check(client, "parent")
    in_child(client.close)
    check(client, "parent")
""", 1),
    "the child goes on as the parent does": ("""
with BoxerClient() as client:
    check(client, "parent")
    child = os.fork()
    if child:
        os.waitpid(child, 0)
    check(client, "parent or child")
""", 2),
    "the parent closes the client": ("""
is_closed, closed = os.pipe()
client = BoxerClient()
check(client, "parent")
child = os.fork()
if child:
    client.close()
    os.write(closed, b"!")
    os.waitpid(child, 0)
else:
    os.read(is_closed, 1)
    check(client, "child")
    client.close()
""", 2),
    "the child of a child uses the client": ("""
with BoxerClient() as client:
    check(client, "parent")
    in_child(lambda: (check(client, "child"), in_child(check, client, "grandchild"), check(client, "child")))
    check(client, "parent")
""", 3),
    "there are calls in other threads": ("""
with BoxerClient() as client:
    threads = [threading.Thread(target=check, args=(client, f"slow {n}")) for n in range(4)]
    for thread in threads:
        thread.start()
    client.download_file("once 4 wait")
    in_child(lambda: (check(client, "child"), client.close()))
    check(client, "go on")
    for thread in threads:
        thread.join()
""", 6),
    "there are processes of multiprocessing's": ("""
context = multiprocessing.get_context("fork")
with BoxerClient() as client:
    check(client, "parent")
    processes = [context.Process(target=check, args=(client, f"child {n}")) for n in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
        process.close()
    check(client, "parent")
""", 4),
    "there is a loop": ("""
client, loop = AsyncBoxerClient(), asyncio.new_event_loop()
loop.run_until_complete(check_async(client, "parent"))
in_child(lambda: asyncio.run(check_and_close(client, "child")))
loop.run_until_complete(check_and_close(client, "parent"))
loop.close()
""", 2),
    "there is a loop that runs": ("""
async def main():
    async with AsyncBoxerClient() as client:
        await check_async(client, "parent")
        in_child(lambda: asyncio.run(check_and_close(client, "child")))
        await check_async(client, "parent")
asyncio.run(main())
""", 2),
    "there is a loop with calls": ("""
async def main():
    async with AsyncBoxerClient() as client:
        calls = [asyncio.ensure_future(check_async(client, f"slow {n}")) for n in range(4)]
        await client.download_file("once 4 wait")
        in_child(lambda: asyncio.run(check_and_close(client, "child")))
        await check_async(client, "go on")
        await asyncio.gather(*calls)
asyncio.run(main())
""", 6),
}  # fmt: skip


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.parametrize("name", FORKS)
def test_after_a_fork_neither_process_touches_the_connections_of_the_other(tmp_path: Path, name: str) -> None:
    code, connections = FORKS[name]
    are_waiting, go_on = threading.Semaphore(0), threading.Event()

    def respond(request: Received) -> list[Any]:
        path = urllib.parse.unquote(request.line.split("path=")[1].rpartition(" ")[0])
        if path.startswith("once "):
            for _ in range(int(path.split()[1])):
                are_waiting.acquire()
        if "slow" in path:
            are_waiting.release()
            go_on.wait(30)
        if path == "go on":
            go_on.set()
        return [answer(path)]

    with Host(respond) as host:
        environment = {**os.environ, "BOXER_URL": host.url, "PYTHONPATH": boxer_folder()}
        # That a fork and threads go ill together, as newer Pythons say, is known.
        program = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", FORKING + code]
        done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert host.connections == connections


FORKING_INSIDE = """
import atexit, os, signal, sys
from boxer import BoxerClient

def fork(*_):
    if os.fork() == 0:
        atexit.register(lambda: open("gone", "x").close())
        raise SystemExit  # out of the call, as if it were the parent

signal.signal(signal.SIGUSR1, fork)
with BoxerClient(sys.argv[1]) as client:
    print(client.run("image", [str(os.getpid())]).stdout, end="")
    os.wait()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_child_that_is_forked_inside_a_call_leaves_its_connection_to_the_parent(tmp_path: Path) -> None:
    def respond(request: Received) -> list[Any]:
        os.kill(int(request.json["cmd"][0]), signal.SIGUSR1)
        return [RAN] if settles((tmp_path / "gone").exists) else [Do.FIN]

    with Host(respond) as host:
        assert program_beside_boxer(tmp_path, FORKING_INSIDE, host.url) == RUN["stdout"]


FORKING_WHILE_CONNECTING = """
import asyncio, os, sys, threading, warnings
from boxer import AsyncBoxerClient, BoxerClient, BoxerError

warnings.simplefilter("ignore", DeprecationWarning)  # that a fork and threads go ill together is known

def sockets():
    links = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            links.add(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:
            pass  # that of the listing
    return {link for link in links if link.startswith("socket:")}

def fork(before):
    while not (connecting := sockets() - before):
        yield
    pid = os.fork()
    if pid == 0:
        os._exit(len(sockets() & connecting))
    print("in the child:", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

def refused(client):
    try:
        client.health()
    except BoxerError as error:
        print(error)

async def main():
    async with AsyncBoxerClient(sys.argv[2]) as client:
        before = sockets()
        call = asyncio.ensure_future(client.health())
        for _ in fork(before):
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait([call])

if sys.argv[1] == "async":
    asyncio.run(main())
else:
    with BoxerClient(sys.argv[2]) as client:
        before = sockets()
        thread = threading.Thread(target=refused, args=[client])
        thread.start()
        for _ in fork(before):
            pass
        client.close()
        thread.join()
"""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="this system does not list the open files of a process")
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_child_that_is_forked_while_a_call_connects_does_not_keep_the_socket(tmp_path: Path, kind: str) -> None:
    with never_accepting() as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        said = program_beside_boxer(tmp_path, FORKING_WHILE_CONNECTING, kind, url)
    assert said.splitlines()[0] == "in the child: 0"


FORKING_AFTER_CANCELLING = """
import asyncio, os, sys
from boxer import AsyncBoxerClient

async def main():
    async with AsyncBoxerClient(sys.argv[1]) as client:
        call = asyncio.ensure_future(client.run("image", ["sleep", "60"]))
        await client.download_file("has begun")
        call.cancel()
        await asyncio.sleep(0)
        reader, writer = os.pipe()
        if os.fork() == 0:  # before the loop has closed the socket
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
        await asyncio.wait([call])
        print(await client.download_file("has ended"))
        os.close(writer)
        os.wait()

asyncio.run(main())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_child_that_is_forked_after_a_cancellation_does_not_keep_the_run_alive(tmp_path: Path) -> None:
    has_begun, has_ended, runs = threading.Event(), threading.Event(), set[int]()

    class Watching(Host):
        def serve(self, sock: Any) -> None:
            super().serve(sock)
            if threading.get_ident() in runs:
                has_ended.set()

    def respond(request: Received) -> list[Any]:
        if request.line.startswith("POST /run"):
            runs.add(threading.get_ident())
            has_begun.set()
            return []
        if "begun" in request.line:
            return [answer(b"")] if has_begun.wait(30) else [Do.FIN]
        return [answer(b"in time" if has_ended.wait(10) else b"too late")]

    with Watching(respond) as host:
        assert program_beside_boxer(tmp_path, FORKING_AFTER_CANCELLING, host.url) == "b'in time'\n"


CALLS_OF_EVERY_KIND = """
import asyncio, io, logging, os, sys
from boxer import AsyncBoxerClient, BoxerClient, BoxerError

def calls(client):
    yield lambda: client.run("image", ["true"])
    yield lambda: client.run("image", ["true"])
    yield lambda: client.upload_file("a.txt", io.BytesIO(b"content"))
    yield lambda: client.upload_path("folder")
    yield lambda: client.download_file("a.txt")
    yield client.health

def call_all(url):
    with BoxerClient(url) as client:
        before = set(sys.modules)
        for call in calls(client):
            try:
                call()
            except BoxerError as error:
                str(error)
    return set(sys.modules) - before

async def call_all_async(url):
    async with AsyncBoxerClient(url) as client:
        before = set(sys.modules)
        for call in calls(client):
            try:
                await call()
            except BoxerError as error:
                str(error)
    return set(sys.modules) - before

logging.getLogger("boxer").addHandler(logging.NullHandler())
kind, url = sys.argv[1:]
print(*(call_all(url) if kind == "sync" else asyncio.run(call_all_async(url))))
"""


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_calls_import_nothing_so_that_a_fork_can_come_at_any_time(tmp_path: Path, kind: str) -> None:
    """A child that is forked while another thread imports what it needs too would wait for ever."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("content")
    page = answer(b"<h1>&eacute;</h1>", status="502 Bad Gateway", Content_Type="text/html")
    answers = [failing("503 Wait", Retry_After="Wed, 25 Nov 2020 14:04:20 GMT"), RAN, page]

    def respond(request: Received) -> list[Any]:
        if "/run" in request.line:
            return [answers.pop(0)]
        return [STORED if "POST" in request.line else WELL]

    with Host(respond) as host:
        assert program_beside_boxer(tmp_path, CALLS_OF_EVERY_KIND, kind, host.url) == "\n"
    assert not answers


SPAWNING = """
import asyncio, multiprocessing
from boxer import AsyncBoxerClient, BoxerAPIError, BoxerClient

def health(client):
    with client:
        return client.health()

async def health_async(client):
    async with client:
        return await client.health()

def in_a_loop(client):
    return asyncio.run(health_async(client))

def fail():
    with BoxerClient() as client:
        client.run("image", ["true"])

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for client, function in (BoxerClient(), health), (AsyncBoxerClient(), in_a_loop):
            copy = pool.apply(function, (client,))
            assert copy is True and function(client)  # which uses the client, and closes it
            assert pool.apply(function, (client,))  # and its copy is open again
        try:
            pool.apply(fail)
        except BoxerAPIError as error:
            assert (str(error), error.status_code) == ("no", 400)
        pool.close()
        pool.join()
"""


def test_a_client_and_an_error_can_be_sent_to_a_process_that_was_spawned(tmp_path: Path) -> None:
    (tmp_path / "spawning.py").write_text(SPAWNING)
    with Host(lambda request: [failing("400 Bad Request") if "/run" in request.line else WELL]) as host:
        environment = {**os.environ, "BOXER_URL": host.url, "PYTHONPATH": boxer_folder()}
        program = [sys.executable, "-W", "error", "spawning.py"]
        done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


# Forks: who holds a connection, and who is who

KILLED = """
import asyncio, os, sys, threading
from boxer import AsyncBoxerClient, BoxerClient

def fork_and_wait():
    if os.fork() == 0:
        os.write(1, b"c")  # the child lives
        os.read(0, 1)  # until its standard input is closed
        os._exit(0)
    threading.Event().wait()

def main(url):
    client = BoxerClient(url)
    threading.Thread(target=client.run, args=("image", ["true"]), daemon=True).start()
    os.read(0, 1)  # the run has begun
    client.health()
    fork_and_wait()

async def main_async(url):
    client = AsyncBoxerClient(url)
    run = asyncio.ensure_future(client.run("image", ["true"]))
    await asyncio.get_running_loop().run_in_executor(None, os.read, 0, 1)
    await client.health()
    fork_and_wait()

kind, url = sys.argv[1:]
main(url) if kind == "sync" else asyncio.run(main_async(url))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_killed_parent_s_connections_end_even_if_a_child_of_its_lives(tmp_path: Path, kind: str) -> None:
    are_gone = threading.Semaphore(0)

    def tell_the_program(_: Any) -> None:
        program.stdin.write(b"!")
        program.stdin.flush()

    gone: list[Any] = [Do.GONE, lambda _: are_gone.release(), Do.FIN]
    with Peer([[Do.REQUEST, tell_the_program, *gone], [Do.REQUEST, WELL, *gone]]) as peer:
        shutil.copy(boxer.__file__, tmp_path / "boxer.py")
        line = [sys.executable, "-E", "-S", "-W", "ignore", "-c", KILLED, kind, peer.url]
        program: Any = subprocess.Popen(line, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        with program:
            assert program.stdout.read(1) == b"c"
            program.kill()
            assert are_gone.acquire(timeout=10) and are_gone.acquire(timeout=10)
            program.stdin.close()
            assert program.stdout.read() == b""  # the child has ended


NAMESAKES: dict[str, str] = {
    "a process id that never changes": """
import os
os.getpid = lambda: 1
def part():
    pass
""",
    "a namespace of process ids for each": """
import ctypes
def part():
    assert os.getpid() == 1
    assert ctypes.CDLL(None).unshare(0x20000000) == 0  # CLONE_NEWPID: the next child is the first in it
""",
}
FORKING_NAMESAKES: dict[str, str] = {
    "sync": """
with BoxerClient(sys.argv[1]) as client:
    check(client, "parent")
    part()
    in_child(lambda: (check(client, "child"), check(client, "child again"), print(os.getpid(), flush=True)))
    check(client, "parent again")
    print(os.getpid())
""",
    "async": """
async def child(client):
    async with client:
        await check_async(client, "child")
        await check_async(client, "child again")
    print(os.getpid(), flush=True)

client, loop = AsyncBoxerClient(sys.argv[1]), asyncio.new_event_loop()
loop.run_until_complete(check_async(client, "parent"))
part()
in_child(lambda: asyncio.run(child(client)))
loop.run_until_complete(check_async(client, "parent again"))
loop.run_until_complete(client.aclose())
loop.close()
print(os.getpid())
""",
}


@functools.cache
def can_make_namespaces() -> bool:
    program = ["unshare", "--fork", "--pid", "unshare", "--fork", "--pid", "true"]
    return bool(shutil.which("unshare")) and subprocess.run(program, capture_output=True).returncode == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.parametrize("kind", FORKING_NAMESAKES)
@pytest.mark.parametrize("how", NAMESAKES)
def test_a_parent_and_a_child_of_one_process_id_have_their_own_connections_and_answers(
    tmp_path: Path, how: str, kind: str
) -> None:
    def respond(request: Received) -> list[Any]:
        return [answer(urllib.parse.unquote(request.line.split("path=")[1].rpartition(" ")[0]))]

    is_real = "namespace" in how
    if is_real and not can_make_namespaces():
        pytest.skip("this user cannot make a namespace of process ids")
    with Host(respond) as host:
        code = NAMESAKES[how] + FORKING + FORKING_NAMESAKES[kind]
        under = ["unshare", "--fork", "--pid"] if is_real else []
        printed = program_beside_boxer(tmp_path, code, host.url, under=under)
    assert printed == "1\n1\n"
    assert host.connections == 2 and len(host.seen) == 4


# ---------------------------------------------------------------------------------------------------------------------
# Both clients: loops
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2], ids=["one row of calls", "two rows of calls"])
@pytest.mark.parametrize("at_once", [1, 4])
def test_a_client_may_be_used_in_one_event_loop_after_another(at_once: int, rows: int) -> None:
    async def main() -> None:
        for _ in range(rows):
            assert all(await asyncio.gather(*[client.health() for _ in range(at_once)]))
            with contextlib.suppress(BoxerAPIError):
                await client.run("image", ["true"])  # which costs the connection

    refused = failing("400 Bad Request", Connection="close")
    with Host(lambda request: [refused if "/run" in request.line else WELL]) as host:
        client = AsyncBoxerClient(host.url)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                asyncio.run(main())
                gc.collect()
            asyncio.run(client.aclose())
            gc.collect()
        assert [str(warning.message) for warning in caught] == []


def test_two_event_loops_at_once_get_their_own_answers_or_are_told_that_they_cannot() -> None:
    both = threading.Barrier(2)

    async def main(name: str) -> list[Any]:
        both.wait()
        rows = []
        for row in range(50):
            calls = [client.run("image", [f"{name} {row} {n}"]) for n in range(4)]
            rows.append(await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 30))
        return rows

    with Host(lambda request: [answer({**RUN, "stdout": request.json["cmd"][0]})]) as host:
        client = AsyncBoxerClient(host.url, retries=0)
        with ThreadPoolExecutor(2) as executor:
            for name, rows in zip("ab", executor.map(lambda name: asyncio.run(main(name)), "ab")):
                for row, results in enumerate(rows):
                    for n, result in enumerate(results):
                        assert isinstance(result, RuntimeError) or result.stdout == f"{name} {row} {n}"
        asyncio.run(client.aclose())


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_a_loop_that_was_closed_under_a_client_is_left_behind(caplog: pytest.LogCaptureFixture, calls: int) -> None:
    waiting, is_over = threading.Semaphore(0), threading.Event()

    def respond(request: Received) -> list[Any]:
        return [WELL] if "/healthz" in request.line else [waiting.release, lambda: is_over.wait(30), Do.FIN]

    async def begin() -> None:
        loop = asyncio.get_running_loop()
        assert await client.health()
        tasks.extend(asyncio.ensure_future(client.run("image", ["true"])) for _ in range(calls))
        for _ in range(min(calls, 1)):
            await loop.run_in_executor(None, waiting.acquire)
        await loop.shutdown_default_executor()

    async def go_on() -> None:
        assert await client.health()
        await client.aclose()

    tasks: list[Any] = []
    with Host(respond) as host, warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # asyncio's own, since nothing closed the connection in time
        client = AsyncBoxerClient(host.url, max_connections=1)
        loop = asyncio.new_event_loop()
        loop.run_until_complete(begin())
        loop.close()
        asyncio.run(go_on())
        drop(tasks)
        is_over.set()
    assert host.connections == 2
    assert [record.getMessage()[:18] for record in caplog.records] == ["Task was destroyed"] * calls
    caplog.clear()


@pytest.mark.parametrize("call_that", ["pauses", "connects"])
def test_a_loop_that_was_closed_under_a_call_hurts_no_other(
    caplog: pytest.LogCaptureFixture, call_that: str, is_pausing: threading.Event
) -> None:
    async def begin() -> None:
        things.append(asyncio.ensure_future(things[0].run("image", ["true"])))
        for _ in range(5):
            await asyncio.sleep(0)
        if call_that == "pauses":
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(None, is_pausing.wait, 30)
            await loop.shutdown_default_executor()

    async def go_on() -> None:
        if call_that == "pauses":
            assert await things[0].health()
        await things[0].aclose()

    def respond(request: Received) -> list[Any]:
        return [WELL] if "/healthz" in request.line else [failing("503 Service Unavailable", Retry_After="3600")]

    with Host(respond) as host, never_accepting() as full, warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # asyncio's own, since nothing closed the connection in time
        url = host.url if call_that == "pauses" else f"http://127.0.0.1:{full.getsockname()[1]}"
        things: list[Any] = [AsyncBoxerClient(url, timeout=None)]
        loop = asyncio.new_event_loop()
        loop.run_until_complete(begin())
        loop.close()
        asyncio.run(go_on())
        del loop
        drop(things)
    assert {record.getMessage()[:18] for record in caplog.records if record.name == "asyncio"} <= {"Task was destroyed"}
    caplog.clear()


def test_the_connections_of_a_loop_that_has_stopped_are_closed() -> None:
    async def use_and_close() -> None:
        assert await client.health()
        await client.aclose()

    ended = threading.Event()
    with Peer([[Do.REQUEST, WELL, Do.GONE, lambda _: ended.set(), Do.FIN], [Do.REQUEST, WELL]]) as peer:
        client = AsyncBoxerClient(peer.url)
        loop = asyncio.new_event_loop()
        assert loop.run_until_complete(client.health())
        asyncio.run(use_and_close())
        assert ended.wait(30)
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def test_a_loop_that_is_merely_closed_leaves_no_socket_once_the_client_is_used_again() -> None:
    """Without the shutdown of generators that asyncio.run does: asyncio itself then warns of its transport."""

    def are_open(most: int) -> bool:
        return len(os.listdir("/dev/fd")) <= most

    with warnings.catch_warnings(), Host(lambda _: [WELL]) as host:
        warnings.simplefilter("ignore", ResourceWarning)
        client, at_first = AsyncBoxerClient(host.url), 0
        gc.disable()  # which would close them, too
        try:
            for _ in range(5):
                loop = asyncio.new_event_loop()
                assert loop.run_until_complete(client.health())
                at_first = at_first or len(os.listdir("/dev/fd"))
                assert settles(functools.partial(are_open, at_first))  # once the host has closed its side, too
                loop.close()
        finally:
            gc.enable()
        asyncio.run(client.aclose())
        gc.collect()


# At the exit of the interpreter, when no thread starts any more

AT_EXIT = """
import asyncio, atexit, io, socket, sys
from boxer import AsyncBoxerClient, BoxerClient, RunRequest

look_up = socket.getaddrinfo
socket.getaddrinfo = lambda host, *args, **more: look_up(host.replace("boxer.test", "127.0.0.1"), *args, **more)

runs = [RunRequest("image", ["true"])] * 3

async def use_async(url):
    async with AsyncBoxerClient(url) as client:
        print((await client.run("image", ["true"])).stdout, end="")
        await client.upload_file("a.txt", b"content")
        await client.upload_file("a.txt", io.BytesIO(b"content"))
        with open("a.txt", "rb") as file:
            await client.upload_file("a.txt", file)
        print(await client.upload_path("a.txt"), await client.download_file("a.txt"))
        await client.run("image", ["true"], files={"a": b"", "b": b""}, input=b"\\0")
        print(len([result.stdout async for _, result in client.run_many(runs)]))

def use(url):
    with BoxerClient(url) as client:
        print(client.run("image", ["true"]).stdout, end="")
        print(client.upload_path("a.txt"), client.download_file("a.txt"))
        client.run("image", ["true"], files={"a": b"", "b": b""}, input=b"\\0")
        print(len([result.stdout for _, result in client.run_many(runs)]))

kind, url = sys.argv[1:]
atexit.register(lambda: use(url) if kind == "sync" else asyncio.run(use_async(url)))
"""


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "boxer.test"])
def test_a_client_works_at_the_exit_of_the_interpreter(tmp_path: Path, kind: str, host: str) -> None:
    (tmp_path / "a.txt").write_text("content", "utf-8")
    answers = {"POST /run": RAN, "POST /files": STORED}
    with Host(lambda request: [answers.get(request.line.rpartition(" ")[0], answer("abc"))]) as server:
        printed = program_beside_boxer(tmp_path, AT_EXIT, kind, f"http://{host}:{server.port}")
    assert printed == "hi\n['a.txt'] b'abc'\n3\n"
    uploads = [request for request in server.seen if "POST /files" in request.line and b"boxer-" not in request.body]
    assert [b"content" in request.body for request in uploads] == [True] * (1 if kind == "sync" else 4)


# ---------------------------------------------------------------------------------------------------------------------
# Both clients: runs with files of their own
# ---------------------------------------------------------------------------------------------------------------------

SHOW = b"""
import os
for folder, _, names in sorted(os.walk(".")):
    for name in sorted(names):
        if name != "main.py":
            print(os.path.join(folder, name)[2:], open(os.path.join(folder, name), "rb").read())
print(os.getcwd().startswith("/boxer-"))
"""


@in_a_sandbox
@of_the_stand_in
def test_a_mapping_of_files_is_the_working_directory_of_a_run_and_gone_afterwards(
    client_of: Clients, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "b.bin").write_bytes(b"\0\xff")
    with own_server() as server, open(tmp_path / "b.bin", "rb") as file:
        files = {
            "main.py": SHOW,
            "text.txt": "é",
            "deep/er/data": memoryview(b"abc"),
            "file.bin": file,
            "copy": tmp_path / "b.bin",
            "proj": folder,
            "unseekable": Unseekable(b"once"),
        }
        result = client_of(server.url).run(PYTHON, ["python3", "main.py"], files=files, check=True)
        assert (server.store.uploads(), server.store.outputs(), server.runs) == ([], [], 1)
    tree = {f"proj/{name}": (folder / name).read_bytes() for name in IN_ORDER_OF_PATHS}
    tree.update({"text.txt": "é".encode(), "deep/er/data": b"abc", "file.bin": b"\0\xff", "copy": b"\0\xff"})
    tree["unseekable"] = b"once"
    assert sorted(result.stdout.splitlines()) == sorted(["True", *(f"{name} {tree[name]!r}" for name in tree)])


@in_a_sandbox
def test_a_run_with_files_keeps_the_working_directory_that_is_given(client_of: Clients, server: Any) -> None:
    result = client_of(server.url).run(PYTHON, ["pwd"], files={"a": b""}, cwd="/elsewhere")
    assert result.stdout == "/elsewhere\n"


@in_a_sandbox
@of_the_stand_in
def test_runs_at_once_with_the_same_names_never_mix(client_of: Clients) -> None:
    calls: list[Any] = [
        ("run", (PYTHON, ["cat", "a/b", "-"]), {"files": {"a/b": f"{number} "}, "input": f"{number}"})
        for number in range(8)
    ]
    with own_server(race=1 / 3) as server:
        results = gather(client_of(server.url), calls)
        assert [getattr(result, "stdout", result) for result in results] == [f"{n} {n}" for n in range(8)]
        assert server.store.uploads() == []


# Each row: names in `files`, none of which can be.
BAD_NAMES: list[list[Any]] = [
    [""], ["/a"], ["a/"], ["a//b"], ["."], [".."], ["./a"], ["a/../b"], ["a/.."], ["a\0b"], ["a\ud800"],
    ["a", "a/b"], ["a/b/c", "a/b"],
]  # fmt: skip


@pytest.mark.parametrize("names", BAD_NAMES, ids=ascii)
def test_a_name_in_files_that_cannot_be_is_refused_before_anything_is_sent(
    client_of: Clients, names: list[str]
) -> None:
    with Peer([]) as peer, pytest.raises(BoxerValidationError):
        client_of(peer.url).run("image", ["true"], files=dict.fromkeys(names, b"s3cret"))


@pytest.mark.parametrize("content", [1, None, io.StringIO("text"), ["list"]], ids=repr)
def test_content_in_files_of_a_wrong_type_is_a_type_error_before_anything_is_sent(
    client_of: Clients, content: Any
) -> None:
    with Peer([]) as peer, pytest.raises(TypeError):
        client_of(peer.url).run("image", ["true"], files={"fine": b"", "a": content})


def test_what_is_not_a_file_of_a_folder_in_files_is_refused_before_anything_is_sent(
    client_of: Clients, folder: Path
) -> None:
    (folder / "a" / "link").symlink_to("/etc/passwd")
    with Peer([]) as peer:
        client = client_of(peer.url)
        with pytest.raises(BoxerValidationError, match="leaves the folder"):
            client.run("image", ["true"], files={"fine": b"", "p": folder})
        with pytest.raises(FileNotFoundError):
            client.run("image", ["true"], files={"fine": b"", "p": folder / "missing"})


def test_a_name_that_a_folder_in_files_has_too_is_refused_before_anything_is_sent(
    client_of: Clients, folder: Path
) -> None:
    for name in ("p/a.txt", "p/a", "p/a.txt/below"):
        with Peer([]) as peer, pytest.raises(BoxerValidationError):
            client_of(peer.url).run("image", ["true"], files={"p": folder, name: b""})


@pytest.mark.parametrize("nothing", [{}, (), None], ids=repr)
def test_no_files_no_input_and_no_outputs_are_a_run_as_ever(client_of: Clients, nothing: Any) -> None:
    with Peer.answering(RAN, RAN) as peer:
        client = client_of(peer.url)
        assert client.run("image", ["true"], files=nothing, input=None, outputs=nothing or None) == RESULT
        assert client.run("image", ["true"]) == RESULT
    assert peer.requests[0][0] == peer.requests[0][1]


def runs_of(host: Host) -> list[dict[str, Any]]:
    return [request.json for request in host.seen if request.line.startswith("POST /run")]


def uploaded_to(host: Host) -> set[str]:
    parts = [request.content for request in host.seen if request.line.startswith("POST /files")]
    return {re.search(rb'name="path"\r\n\r\n(.*?)\r\n', part)[1].decode() for part in parts}  # type: ignore[index]


def test_a_run_names_its_files_then_their_folders_deepest_first(client_of: Clients) -> None:
    with Host(Kept({})) as host:
        files = {"main.py": b"", "a/b/c": b"", "a/d": b"", "e": "x"}
        client_of(host.url).run("image", ["true"], files=files)
    [run] = runs_of(host)
    top = run["cwd"][1:]
    assert re.fullmatch("boxer-[0-9a-f-]{12,}", top)
    assert set(run["files"][:4]) == uploaded_to(host) == {f"{top}/{name}" for name in files}
    assert run["files"][4:] == [f"{top}/a/b", f"{top}/a", top]


@pytest.mark.parametrize(("count", "is_alone"), [(199, False), (200, True)])
def test_more_than_200_paths_are_named_by_their_folder_alone_and_then_removed(
    client_of: Clients, count: int, is_alone: bool
) -> None:
    with Host(Kept({})) as host:
        client_of(host.url).run("image", ["prog"], files={str(number): b"" for number in range(count)})
    run, *removals = runs_of(host)
    top = run["cwd"][1:]
    assert (run["files"] == [top], len(run["files"]) <= 200) == (is_alone, True)
    assert len(removals) == is_alone
    for removal in removals:
        assert (removal["image"], removal["cmd"], removal.get("persist", False)) == ("image", ["true"], False)
        assert (set(removal["files"][:-1]), removal["files"][-1]) == (uploaded_to(host), top)


# Each row: its name, the arguments of a run, and the error that it comes to.
LEAVINGS: list[tuple[str, dict[str, Any], Any]] = [
    ("a result", {"cmd": ["true"]}, None),
    ("an exit code", {"cmd": ["sh", "-c", "exit 3"]}, None),
    ("a missing program", {"cmd": ["no-such-program"]}, None),
    ("a signal", {"cmd": ["sh", "-c", "kill -9 $$"]}, None),
    ("a time limit", {"cmd": ["sleep", "20"], "limits": {"wall_clock_secs": 1}}, BoxerTimeoutError),
    ("an output limit", {"cmd": ["python3", "-c", "print('x' * 65536)"]}, BoxerOutputLimitError),
    ("too many files", {"cmd": ["true"], "files": {f"a/{number}": b"" for number in range(300)}}, None),
    ("a checked exit code", {"cmd": ["false"], "check": True}, BoxerExitError),
    ("persist", {"cmd": ["true"], "persist": True}, None),
    ("outputs", {"cmd": ["touch", "/output/x"], "outputs": ["x"]}, None),
    ("all outputs", {"cmd": ["touch", "/output/x"], "outputs": True}, None),
    ("outputs and a time limit",
     {"cmd": ["sleep", "20"], "outputs": True, "limits": {"wall_clock_secs": 1}}, BoxerTimeoutError),
    ("a folder as output", {"cmd": ["mkdir", "/output/x"], "outputs": ["x"]}, BoxerAPIError),
    ("short input", {"cmd": ["cat"], "input": "x"}, None),
    ("long input", {"cmd": ["wc"], "input": "x\n" * 50_000}, None),
    ("binary input", {"cmd": ["wc"], "input": b"\0", "files": {}}, None),
    ("long input and a time limit",
     {"cmd": ["sleep", "20"], "input": b"\0", "files": {}, "limits": {"wall_clock_secs": 1}}, BoxerTimeoutError),
    ("a name that the server cannot take",
     {"cmd": ["true"], "files": {"a/" + 300 * "b": b"", "c": b""}}, BoxerAPIError),
    ("a folder that cannot be made",
     {"cmd": ["true"], "files": {"a": b""}, "cwd": "/tmp/new"}, None),
]  # fmt: skip


@in_a_sandbox
@of_the_stand_in
@pytest.mark.parametrize(("arguments", "error"), [row[1:] for row in LEAVINGS], ids=[row[0] for row in LEAVINGS])
def test_nothing_of_a_run_s_own_files_is_left_after(client_of: Clients, arguments: dict[str, Any], error: Any) -> None:
    arguments = {"files": {"main.py": b"", "a/b/c": "text"}, **arguments}
    with own_server(race=1 / 3, output_limit=65536) as server:
        with pytest.raises(error) if error else contextlib.nullcontext():
            client_of(server.url).run(PYTHON, **arguments)
        assert server.store.uploads() == []


@in_a_sandbox
@of_the_stand_in
def test_files_that_were_uploaded_before_stay_where_outputs_are_wanted(client_of: Clients) -> None:
    with own_server() as server:
        client = client_of(server.url)
        client.upload_file("w/a", b"")
        client.run(PYTHON, ["true"], files=["w/a"], outputs=True)
        client.run(PYTHON, ["true"], files=["w/a"], input=b"\0", persist=True)
        assert server.store.uploads() == ["w/", "w/a"]
        client.run(PYTHON, ["true"], files=["w/a", "w"], input="short")
        assert server.store.uploads() == []


# What becomes of the run that removes: none of it changes the result.
REMOVALS: dict[str, list[Any]] = {
    "fails": [failing("500 Internal Server Error", "start runsc: no")],
    "finds nothing": [failing("400 Bad Request", "file not found: x")],
    "is lost": [Do.FIN],
    "is reset": [Do.RST],
    "is nonsense": [answer("<html>", "502 Bad Gateway")],
}


@pytest.mark.parametrize("removal", REMOVALS.values(), ids=REMOVALS)
@pytest.mark.parametrize("first", [RAN, failing("408 Request Timeout", "execution timed out after 1000ms")])
def test_what_becomes_of_the_removal_does_not_change_what_becomes_of_the_call(
    client_of: Clients, first: bytes, removal: list[Any], clock: Clock
) -> None:
    def respond(request: Received) -> list[Any]:
        if "/files" in request.line:
            return [STORED]
        return removal if request.json["cmd"] == ["true"] else [first]

    with Host(respond) as host:
        got = outcome(client_of(host.url), ("run", ("image", ["prog"]), {"files": {"a": b""}, "persist": True}))
    assert got == RESULT or (type(got) is BoxerTimeoutError and got.status_code == 408 and first is not RAN)
    assert [run["cmd"] for run in runs_of(host)][:2] == [["prog"], ["true"]]


# Each row: the first answer to a removal, and how often that is sent.
REMOVAL_TRIES: list[tuple[bytes, int]] = [
    (failing(BROKEN, RACES[0]), 2),
    (failing("503 Service Unavailable", "busy", Retry_After="7"), 2),
    (failing("503 Service Unavailable", "busy", Retry_After="11"), 1),
]


@pytest.mark.parametrize(("first", "tries"), REMOVAL_TRIES, ids=["the race", "7 s", "11 s"])
def test_a_removal_is_tried_again_within_ten_seconds_whatever_the_client_does_otherwise(
    client_of: Clients, clock: Clock, first: bytes, tries: int
) -> None:
    answers = iter([RAN, first, RAN])
    with Host(lambda request: [STORED if "/files" in request.line else next(answers)]) as host:
        client = client_of(host.url, timeout=999, retries=0)
        assert client.run("image", ["prog"], files={"a": b""}, persist=True) == RESULT
    assert [run["cmd"] for run in runs_of(host)] == [["prog"], *[["true"]] * tries]


def test_a_removal_has_no_network_nor_anything_else_of_the_run_s_but_its_image(client_of: Clients) -> None:
    with Host(Kept({})) as host:
        more = {"env": {"A": "1"}, "limits": LIMITS, "network": "host", "input": "x"}
        client_of(host.url).run("image", ["prog"], files={"a": b""}, persist=True, **more)
    run, removal = runs_of(host)
    assert run["network"] == "host"
    assert removal == {"image": "image", "cmd": ["true"], "files": run["files"]}


def test_after_a_lost_connection_nothing_is_removed(client_of: Clients) -> None:
    with Host(lambda request: [STORED] if "/files" in request.line else [Do.FIN]) as host:
        got = outcome(client_of(host.url), ("run", ("image", ["prog"]), {"files": {"a": b""}}))
    assert is_expected(got, lost()) and len(runs_of(host)) == 1


def test_after_the_client_s_own_deadline_nothing_is_removed(client_of: Clients) -> None:
    is_over = threading.Event()
    with Host(lambda request: [STORED] if "/files" in request.line else [lambda: is_over.wait(30), RAN]) as host:
        got = outcome(client_of(host.url, timeout=0.5), ("run", ("image", ["prog"]), {"files": {"a": b""}}))
        is_over.set()
    assert is_expected(got, (BoxerTimeoutError, 0, "0.5 s")) and len(runs_of(host)) == 1


@in_a_sandbox
@of_the_stand_in
def test_after_a_run_that_was_broken_off_nothing_more_is_sent(client_of: Clients) -> None:
    with own_server() as server:
        call: Call = ("run", (PYTHON, ["sleep", "29"]), {"files": {"a": b""}})
        broken_off(client_of(server.url), call, lambda: server.wait_for(lambda: server.runs_live, 60))
        assert server.wait_for(lambda: server.runs_killed, 60) and server.runs == 1
        assert [path[-1] for path in server.store.uploads()] == ["/", "a"]


@pytest.mark.parametrize("status", ["413 Request Entity Too Large", BROKEN])
def test_where_an_upload_fails_the_run_is_not_sent_and_what_may_be_stored_is_removed_each_by_itself(
    client_of: Clients, status: str
) -> None:
    def respond(request: Received) -> list[Any]:
        if "/run" in request.line:
            return [RAN]
        both.wait(30)
        return [failing(status) if b"LARGE" in request.body else STORED]

    both = threading.Barrier(2)
    with Host(respond) as host:
        client, files = client_of(host.url, retries=0), {"a": b"", "b": b"LARGE"}
        got = outcome(client, ("run", ("image", ["prog"]), {"files": files}))
        assert is_expected(got, refusal(int(status[:3])))
    named = [[path, path[:-2]] for path in uploaded_to(host)]
    named.append(named[0][1:])  # the server may have made the folder, and not the file
    assert sorted((run["cmd"], run["files"]) for run in runs_of(host)) == [(["true"], paths) for paths in sorted(named)]


def test_where_a_file_cannot_be_read_the_uploads_under_way_end_first_and_are_removed(client_of: Clients) -> None:
    has_come, has_failed = threading.Event(), threading.Event()

    def fail(size: int) -> bytes:
        if size:
            assert has_come.wait(30)
            has_failed.set()
            raise OSError("cannot be read")
        return b""

    def respond(request: Received) -> list[Any]:
        if "/run" in request.line:
            return [RAN]
        has_come.set()
        return [lambda: has_failed.wait(30) and threading.Event().wait(0.2), STORED]  # long enough for a wrong removal

    with Frail(respond) as host:
        files = {"a": b"", "b": OnlyReads(fail), **{str(number): b"" for number in range(20)}}
        with pytest.raises(OSError, match="cannot be read"):
            client_of(host.url).run("image", ["prog"], files=files)
    paths = set(uploaded_to(host))
    assert 1 <= len(paths) < 8 and paths <= {name for run in runs_of(host) for name in run["files"]}
    assert {run["cmd"][0] for run in runs_of(host)} == {"true"}


# As threading's own: an error out of it has no frame of another module.
STARTING = """
def start(*args, **kwargs):
    if get_ident() == main:
        started.append(args)
        if len(started) > 1:
            raise RuntimeError("can't start new thread")
    return really_start(*args, **kwargs)
"""


def test_where_no_thread_can_be_started_what_was_uploaded_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "_start_joinable_thread" if sys.version_info >= (3, 13) else "_start_new_thread"
    known = {"main": threading.get_ident(), "get_ident": threading.get_ident, "started": []}
    threads: dict[str, Any] = {"__name__": "threading", "really_start": getattr(threading, name), **known}
    exec(STARTING, threads)
    with Frail(lambda request: [STORED] if "/files" in request.line else [RAN]) as host:
        client = BoxerClient(host.url)
        monkeypatch.setattr(threading, name, threads["start"])
        with contextlib.closing(client), pytest.raises(RuntimeError, match="can't start new thread"):
            client.run("image", ["prog"], files={"a": b"", "b": b"", "c": b""})
        monkeypatch.undo()
    assert uploaded_to(host) <= {name for run in runs_of(host) for name in run["files"]}
    assert {run["cmd"][0] for run in runs_of(host)} == {"true"}


def test_what_was_sent_is_not_kept_in_memory(client_of: Clients) -> None:
    with Host(lambda request: [STORED] if "/files" in request.line else [RAN]) as host:
        client = client_of(host.url)
        gc.disable()
        tracemalloc.start()
        try:
            for _ in range(8):
                client.run("image", ["true"], files={"a": bytes(4 * MIB), "b": ""})
                host.seen.clear()
            assert tracemalloc.get_traced_memory()[1] < 24 * MIB
        finally:
            tracemalloc.stop()
            gc.enable()


@pytest.mark.parametrize("how", ["upload_file", "run", "run_many"])
@pytest.mark.parametrize("end", ["refused", "reset", "413", "400"])
def test_what_a_failed_call_was_given_is_not_kept_for_the_garbage_collector(
    client_of: Clients, clock: Clock, how: str, end: str
) -> None:
    content = bytearray(MIB)

    def respond(request: Received) -> list[Any]:
        if "/files" in request.line and end == "400":
            return [STORED]
        return [Do.RST] if end == "reset" else [failing(f"{end} No")]

    def call_blocking(client: BoxerClient) -> None:
        with contextlib.suppress(BoxerError):
            if how == "run_many":
                list(client.run_many([RunRequest("image", ["prog"], files={"a": content})]))
            else:
                do(client, calls[how])

    async def call_async(client: AsyncBoxerClient) -> None:
        with contextlib.suppress(BoxerError):
            if how == "run_many":
                assert [each async for each in client.run_many([RunRequest("image", ["prog"], files={"a": content})])]
            else:
                await do(client, calls[how])
        for _ in range(5):
            await asyncio.sleep(0)  # the loop closes what is closing

    calls: dict[str, Call] = {"upload_file": upload(content), "run": run(files={"a": content})}
    gc.disable()
    try:
        with Frail(respond) as host:
            client = client_of(refused_url() if end == "refused" else host.url, retries=0)
            if client_of.kind == "sync":
                call_blocking(client)
            else:
                client_of.loop.run_until_complete(call_async(client.client))
            content.append(0)  # which fails while a view of it is kept
    finally:
        gc.enable()


def test_a_local_path_may_be_text_that_is_not_what_it_says_of_itself(
    client_of: Clients, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("1").mkdir()
    Path("1", "a").write_bytes(b"content")
    with Host(Kept({"b": b"content"})) as host:
        client = client_of(host.url)
        assert client.upload_path(Word.ONE) == ["1/a"]
        client.run("image", ["prog"], output_dir=Word.ONE)
        Path("1", "a").unlink()
        client.download_path("output/boxer-1/b", Word.ONE)
    assert [str(path) for path in sorted(Path().rglob("*"))] == ["1", "1/b"]


def test_what_a_download_cannot_be_written_to_is_named(client_of: Clients, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with Peer([]) as peer, pytest.raises(NotADirectoryError) as caught:
        client_of(peer.url).download_path("a", tmp_path / "file" / "a")
    assert caught.value.filename == str(tmp_path / "file" / "a")


class Short(RunRequest):
    """A request of the user's own kind."""

    def __init__(self, code: str, **more: Any) -> None:
        super().__init__("image", ["python3", "-c", code], **more)


def test_a_request_may_be_of_a_class_that_is_made_otherwise(client_of: Clients) -> None:
    with Host(lambda request: [STORED] if "/files" in request.line else [RAN]) as host:
        for request in (Short("1"), Short("1", input="x"), Short("1", files={"a": "1"})):
            assert client_of(host.url).send(request) == RESULT


def test_each_upload_of_a_mapping_has_a_deadline_of_its_own(client_of: Clients) -> None:
    def respond(request: Received) -> list[Any]:
        if "/files" in request.line:
            threading.Event().wait(0.25)
        return [STORED if "/files" in request.line else RAN]

    files = {str(number): b"" for number in range(40)}  # in five turns of eight
    with Host(respond) as host:
        assert client_of(host.url, timeout=1).run("image", ["true"], files=files) == RESULT


# ---------------------------------------------------------------------------------------------------------------------
# Both clients: runs with an input
# ---------------------------------------------------------------------------------------------------------------------

DIGEST = "import hashlib, sys; d = sys.stdin.buffer.read(); print(len(d), hashlib.sha256(d).hexdigest())"
INPUTS: dict[str, str | bytes] = {
    "nothing": "", "a line": "1 2 3\n", "no newline": "x", "not ASCII": "é\u2028\U0001f600", "quotes": "'\"$(id)`id`\\",
    "a flag": "-n", "a format": "%s%d\\n\\0101", "newlines": "\n\n\n", "CRLF": "a\r\nb", "64 KiB": "x" * 65536,
    "64 KiB of quotes": "'" * 65536, "64 KiB and one": "x" * 65537, "bytes": b"text\n", "NUL": "a\0b",
    "not UTF-8": b"\xff\xfe\0", "surrogates as bytes": b"\xed\xa0\x80", "three megabytes": "\u00e9" * 1_500_000,
}  # fmt: skip


def as_bytes(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


@in_a_sandbox
@pytest.mark.parametrize("text", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("more", [{}, {"outputs": True}, {"files": {"a": b""}}], ids=["alone", "outputs", "files"])
def test_an_input_arrives_byte_for_byte(client_of: Clients, server: Any, text: str | bytes, more: Any) -> None:
    result = client_of(server.url).run(PYTHON, ["python3", "-c", DIGEST], input=text, **more)
    content = as_bytes(text)
    assert (result.stdout, result.stderr) == (f"{len(content)} {hashlib.sha256(content).hexdigest()}\n", "")
    assert result.exit_code == 0


@pytest.mark.parametrize(
    ("text", "uploads"), [("x" * 65536, 0), ("\u00e9" * 32769, 1), ("a\0b", 1), (b"\xff", 1), ("", 0)]
)
def test_a_short_text_travels_with_the_command_and_anything_else_in_a_file(
    client_of: Clients, text: str | bytes, uploads: int
) -> None:
    with Host(Kept({})) as host:
        assert client_of(host.url).run("image", ["prog"], input=text) == RESULT
    assert (len(uploaded_to(host)), len(host.seen)) == (uploads, 1 + uploads)
    [run] = runs_of(host)
    assert run.get("files", []) == sorted(uploaded_to(host))


# What a shell would do by itself, were it asked, or might leave open; compared with what is done without an input.
SHELLS_OWN = [["echo", "a\\nb"], ["echo", "-e", "a"], ["printf", "%s\\n", "a"], ["test", "a", "=", "b"], ["true"]]
SHELLS_OWN += [["pwd"], ["env", "printf", "x"], ["sh", "-c", "exit 9"], ["sh", "-c", "echo $0 $1", "a", "b c"]]
SHELLS_OWN += [["ls", "/proc/self/fd"]]


@in_a_sandbox
@pytest.mark.parametrize("cmd", SHELLS_OWN, ids=" ".join)
@pytest.mark.parametrize("more", [{"input": "x"}, {"input": b"\0"}, {"outputs": True}, {"input": "x", "outputs": True}])
def test_what_runs_with_an_input_or_outputs_is_what_was_asked_for(
    client_of: Clients, server: Any, cmd: list[str], more: Any
) -> None:
    client = client_of(server.url)
    plain, other = client.run(PYTHON, cmd), client.run(PYTHON, cmd, **more)
    assert (other.exit_code, other.stdout, other.stderr) == (plain.exit_code, plain.stdout, plain.stderr)


@in_a_sandbox
@pytest.mark.parametrize("cmd", ["exit 9", "cd /", "no-such", "set -x", ":", "exec", "eval id"])
@pytest.mark.parametrize("more", [{"input": "s3cret"}, {"input": b"\0"}, {"outputs": True}], ids=repr)
def test_what_only_a_shell_has_is_no_program(client_of: Clients, server: Any, cmd: str, more: Any) -> None:
    result = client_of(server.url).run(PYTHON, cmd.split(), **more)
    assert (result.exit_code, result.stdout) == (127, "") and "s3cret" not in result.stderr


@in_a_sandbox
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("more", [{"input": "x"}, {"input": b"\0"}, {"outputs": True}], ids=repr)
def test_a_program_that_is_killed_leaves_nothing_of_a_shell_s_on_stderr(
    client_of: Clients, server: Any, number: int, more: Any
) -> None:
    code = f"import os, signal, time; signal.signal({number}, signal.SIG_DFL) if {number} != 9 else 0; "
    cmd = ["python3", "-c", f"{code} os.kill(os.getpid(), {number}); time.sleep(9)"]
    result = client_of(server.url).run(PYTHON, cmd, **more)
    assert (result.exit_code, result.stdout, result.stderr) == (128 + number, "", "")


@in_a_sandbox
@pytest.mark.parametrize("size", [10, 65536, 3_000_000])
@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_a_program_ends_with_its_own_exit_code_whatever_it_reads_of_its_input(
    client_of: Clients, server: Any, size: int, share: float
) -> None:
    code = f"import os, sys; n = {int(size * share)}\nwhile n > 0: n -= len(os.read(0, n))\nsys.exit('done')"
    result = client_of(server.url).run(PYTHON, ["python3", "-c", code], input="x" * size)
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "done\n")


@in_a_sandbox
def test_an_input_in_a_file_is_not_among_the_run_s_own_files(client_of: Clients, server: Any) -> None:
    result = client_of(server.url).run(PYTHON, ["ls", "-A"], files={"a": b""}, input=b"\0")
    assert result.stdout == "a\n"


def test_a_name_in_env_that_is_no_shell_s_is_refused_where_a_shell_starts_the_program(
    client_of: Clients, tmp_path: Path
) -> None:
    needs_shell: list[dict[str, Any]] = [{"input": "x"}, {"input": b"\0"}, {"outputs": True}, {"output_dir": tmp_path}]
    for name in ("a.b", "1a", "a-b", "é"):
        for more in needs_shell:
            with Peer([]) as peer, pytest.raises(BoxerValidationError) as caught:
                client_of(peer.url).run("image", ["true"], env={name: SECRET}, **more)
            assert SECRET not in all_text(caught.value)
        with Peer.answering(RAN) as peer:
            assert client_of(peer.url).run("image", ["true"], env={name: "b"}) == RESULT


@pytest.mark.parametrize("text", [1, ["x"], io.BytesIO(b"x")], ids=repr)
def test_an_input_of_a_wrong_type_is_a_type_error(client_of: Clients, text: Any) -> None:
    with Peer([]) as peer, pytest.raises(TypeError):
        client_of(peer.url).run("image", ["true"], input=text)


def test_an_input_with_a_lone_surrogate_is_refused_and_not_shown(client_of: Clients) -> None:
    with Peer([]) as peer, pytest.raises(BoxerValidationError) as caught:
        client_of(peer.url).run("image", ["true"], input=f"{SECRET}\ud800")
    assert SECRET not in all_text(caught.value)


@pytest.mark.parametrize("text", ["s3cret", b"s3cret\0"], ids=repr)
@pytest.mark.parametrize("said", [failing("500 Internal Server Error", "start runsc: no"), b"nonsense\r\n\r\n"])
def test_an_input_shows_up_in_no_error(client_of: Clients, text: Any, said: bytes) -> None:
    with Frail(lambda request: [STORED] if "/files" in request.line else [said, Do.FIN]) as host:
        got = outcome(client_of(host.url), ("run", ("image", ["prog"]), {"input": text}), retries=0)
    assert isinstance(got, BoxerError) and "s3cret" not in all_text(got)
    assert "s3cret" not in repr(RunRequest("image", ["prog"], input=text, files={"a": text}, env={"A": "s3cret"}))


# ---------------------------------------------------------------------------------------------------------------------
# Both clients: runs with outputs
# ---------------------------------------------------------------------------------------------------------------------

WRITE = """
import os, sys
os.makedirs("/output/a/b"); os.makedirs("/output/empty")
for name in (b"result.json", b"a/b/deep", "na me+%41 \\u00e9\\n.txt".encode(), b".hidden", b"-rf"):
    open(b"/output/" + name, "wb").write(name)
open(b"/output/not \\xff UTF-8", "w"); os.symlink("/etc/passwd", "/output/link"); os.symlink("a", "/output/c")
os.mkfifo("/output/fifo")
print("out"); print("err", file=sys.stderr); sys.exit(3)
"""
WRITTEN = {name: name.encode() for name in ("result.json", "a/b/deep", "na me+%41 é\n.txt", ".hidden", "-rf")}


@in_a_sandbox
def test_outputs_are_those_that_were_asked_for_and_written(client_of: Clients, server: Any) -> None:
    names = ["a/b/deep", "missing", "result.json", "na me+%41 é\n.txt"]
    result = client_of(server.url).run(PYTHON, ["python3", "-c", WRITE], outputs=names)
    assert list(result.outputs.items()) == [(name, WRITTEN[name]) for name in names if name != "missing"]
    assert (result.exit_code, result.stdout, result.stderr) == (3, "out\n", "err\n")


@in_a_sandbox
def test_all_outputs_are_all_files_that_were_written(
    client_of: Clients, server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    result = client_of(server.url).run(PYTHON, ["python3", "-c", WRITE], outputs=True)
    assert result.outputs == WRITTEN
    assert (result.exit_code, result.stdout, result.stderr) == (3, "out\n", "err\n")
    assert [record.levelname for record in caplog.records if "UTF-8" in record.getMessage()] == ["WARNING"]


@in_a_sandbox
def test_all_outputs_go_into_a_local_folder(client_of: Clients, server: Any, tmp_path: Path) -> None:
    targets: list[Any] = [tmp_path / "made" / "anew", str(tmp_path / "made")]
    for number, target in enumerate(targets):
        cmd = ["python3", "-c", WRITE]
        result = client_of(server.url).run(PYTHON, cmd, output_dir=target, input="typed in")
        assert result.exit_code == 3
        assert {str(path.relative_to(target)): path.read_bytes() for path in sorted(Path(target).rglob("*"))
                if path.is_file() and (number == 0 or "anew" not in path.parts)} == WRITTEN  # fmt: skip


@in_a_sandbox
def test_a_program_that_writes_nothing_has_no_outputs(client_of: Clients, server: Any, tmp_path: Path) -> None:
    client = client_of(server.url)
    assert client.run(PYTHON, ["true"], outputs=True).outputs == {}
    assert client.run(PYTHON, ["true"], outputs=["a"]).outputs == {}
    assert client.run(PYTHON, ["true"], output_dir=tmp_path / "x").ok
    assert client.run(PYTHON, ["true"]).outputs == {}


@pytest.mark.parametrize("what", ["../x", "/etc/x", "", ".", "a/../b", "x\0", "a\ud800", "/output/../x"], ids=ascii)
def test_the_name_of_an_output_that_cannot_be_is_refused_before_anything_is_sent(client_of: Clients, what: str) -> None:
    with Peer([]) as peer, pytest.raises(BoxerValidationError):
        client_of(peer.url).run("image", ["true"], outputs=["fine", what])


@pytest.mark.parametrize("what", ["x", b"x", 1, [1], [b"x"]], ids=repr)
def test_outputs_of_a_wrong_kind_are_refused(client_of: Clients, what: Any) -> None:
    with Peer([]) as peer, pytest.raises((TypeError, BoxerValidationError)):
        client_of(peer.url).run("image", ["true"], outputs=what)


def test_a_folder_that_is_named_as_an_output_is_an_error_with_the_result(client_of: Clients) -> None:
    with Host(Kept({"a": NOT_A_FILE})) as host:
        got = outcome(client_of(host.url), ("run", ("image", ["true"]), {"outputs": ["a"]}))
    assert isinstance(got, BoxerAPIError) and "is a folder" in str(got)
    assert got.result == RESULT and pickle.loads(pickle.dumps(got)).result == RESULT


# Hostile lists: each row is an entry, and whether it is a name.
LISTED: list[tuple[bytes, bool]] = [
    (b"./fine", True), (b"./a/b", True), (b"./\xc3\xa9 \n\x1b[31m", True), (b"./...", True), (b"./..a/b..", True),
    (b"./~", True), (b"./C:x", sys.platform != "win32"), (b"./a\\b", sys.platform != "win32"),
    (b"./../x", False), (b"./a/../../x", False), (b"./..", False), (b"./.", False), (b"./", False), (b".", False),
    (b".//etc/passwd", False), (b"./a//b", False), (b"./a/./b", False), (b"./a/", False), (b"/etc/passwd", False),
    (b"./\xff", False), (b"./\xed\xa0\x80", False), (b"../boxer-2/x", False), (b"../../up", False),
]  # fmt: skip


@pytest.mark.parametrize(("entry", "is_name"), LISTED, ids=ascii)
@pytest.mark.parametrize("where", ["memory", "folder"])
def test_of_a_hostile_list_only_names_below_output_count(
    client_of: Clients, tmp_path: Path, caplog: pytest.LogCaptureFixture, entry: bytes, is_name: bool, where: str
) -> None:
    name = entry[2:].decode("utf-8", "surrogateescape")
    kept = Kept({name: b"content", "last": b""} if is_name else {"last": b""}, b"%b\0./last\0" % entry)
    target = tmp_path / "deep" / "down" / "target"
    with Host(kept) as host:
        wanted: Any = {"outputs": True} if where == "memory" else {"output_dir": target}
        result = client_of(host.url).run("image", ["true"], **wanted)
    found = {"last": b"", **({name: b"content"} if is_name else {})}
    assert kept.asked[1:] == [f"output/boxer-1/{path}" for path in ([name] if is_name else []) + ["last"]]
    if where == "memory":
        assert result.outputs == found
    else:
        files = {path for path in tmp_path.rglob("*") if not path.is_dir()}
        assert {str(path.relative_to(target)): path.read_bytes() for path in files} == found
    messages = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(messages) == (not is_name) and all(map(str.isprintable, messages))


# Each row: the list of outputs, as a server gives it.
BAD_LISTS: dict[str, Any] = {
    "missing": [failing("404 Not Found", "file not found")],
    "a folder": NOT_A_FILE,
    "too many names": b"".join(b"./%d\0" % number for number in range(10_001)),
    "200,000 names": b"".join(b"./%d\0" % number for number in range(200_000)),
    "a server's failure": [failing("500 Internal Server Error", "no")],
    "cut": [answer(b"./a\0./b\0")[:-2], Do.FIN],
    "3 GiB": endless(3 * GIB),
}


@pytest.mark.parametrize("listing", BAD_LISTS.values(), ids=BAD_LISTS)
@pytest.mark.parametrize("where", ["memory", "folder"])
def test_a_list_that_is_forged_or_missing_is_an_error_with_the_result(
    client_of: Clients, tmp_path: Path, listing: Any, where: str
) -> None:
    kept = Kept({}, listing)
    wanted: Any = {"outputs": True} if where == "memory" else {"output_dir": tmp_path / "target"}
    with Frail(kept) as host:
        tracemalloc.start()
        try:
            got = outcome(client_of(host.url), ("run", ("image", ["true"]), wanted), retries=0)
            assert tracemalloc.get_traced_memory()[1] < 64 * MIB
        finally:
            tracemalloc.stop()
    assert isinstance(got, BoxerError) and got.result == RESULT, got
    assert set(kept.asked) == {f"output/boxer-1/{kept.name}"}
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("where", ["memory", "folder"])
def test_an_output_that_is_listed_and_not_there_is_an_error_with_the_result(
    client_of: Clients, tmp_path: Path, where: str
) -> None:
    wanted: Any = {"outputs": True} if where == "memory" else {"output_dir": tmp_path / "target"}
    with Host(Kept({}, b"./missing\0")) as host:
        got = outcome(client_of(host.url), ("run", ("image", ["true"]), wanted))
    assert is_expected(got, refusal(404, "/missing'")) and got.result == RESULT


FOREIGN_404 = answer("<html><h1>Not Found</h1></html>", "404 Not Found", Content_Type="text/html")


@pytest.mark.parametrize("outputs", [["a"], True], ids=["named", "all"])
def test_an_output_is_not_left_out_because_something_on_the_way_says_404(client_of: Clients, outputs: Any) -> None:
    with Host(Kept({"a": [FOREIGN_404]}, None if outputs is True else b"")) as host:
        got = outcome(client_of(host.url), ("run", ("image", ["true"]), {"outputs": outputs}))
    assert is_expected(got, refusal(404, "is not a Boxer server's")) and got.result == RESULT


def test_a_404_that_is_not_the_servers_own_says_nothing_of_persist(client_of: Clients) -> None:
    with Peer.answering(FOREIGN_404) as peer:
        got = outcome(client_of(peer.url), ("download_file", ("output/boxer-1/a",), {}))
    assert is_expected(got, refusal(404, "is not a Boxer server's")) and "persist" not in str(got)


@pytest.mark.parametrize("where", ["memory", "folder"])
def test_one_name_of_many_mib_does_not_fill_the_memory(client_of: Clients, tmp_path: Path, where: str) -> None:
    wanted: Any = {"outputs": True} if where == "memory" else {"output_dir": tmp_path}
    with Host(Kept({"a": b"x"}, b"./%b\0./a\0" % (b"\xc3\xa9" * 20 * MIB))) as host:
        client = client_of(host.url)
        tracemalloc.start()
        try:
            client.run("image", ["true"], **wanted)
            assert tracemalloc.get_traced_memory()[1] < 200 * MIB
        finally:
            tracemalloc.stop()
    assert len(host.seen) == 3  # the run, the list, and `a`


@in_a_sandbox
def test_all_outputs_need_find_in_the_sandbox_or_are_an_error_with_the_result(client_of: Clients, server: Any) -> None:
    code = "open('/output/a', 'w')"
    call: Call = ("run", (PYTHON, ["/usr/bin/env", "python3", "-c", code]), {"outputs": True})
    got = outcome(client_of(server.url), call, env={"PATH": "/nowhere"})
    assert is_expected(got, refusal(404, "without /bin/sh or find")) and got.result.outputs == {}


def test_a_folder_for_outputs_is_made_before_the_run(client_of: Clients, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with Host(Kept({})) as host:
        client = client_of(host.url)
        with pytest.raises(OSError, match="file"):
            client.run("image", ["true"], output_dir=tmp_path / "file")
        assert host.seen == []
        client.run("image", ["true"], output_dir=tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_ten_thousand_outputs_are_fetched(client_of: Clients) -> None:
    with Host(Kept({str(number): b"" for number in range(10_000)})) as host:
        assert len(client_of(host.url).run("image", ["true"], outputs=True).outputs) == 10_000


def test_more_than_256_mib_of_outputs_are_an_error_with_the_result(client_of: Clients) -> None:
    large = answer(bytes(100 * MIB))
    with Frail(Kept({"a": [large], "b": [large], "c": [large]})) as host:
        got = outcome(client_of(host.url), ("run", ("image", ["true"]), {"outputs": True}))
    assert isinstance(got, BoxerError) and got.result.exec_id == "boxer-1"


def test_a_single_endless_output_takes_no_endless_memory(client_of: Clients) -> None:
    with Frail(Kept({"a": endless(3 * GIB)})) as host:
        tracemalloc.start()
        try:
            got = outcome(client_of(host.url), ("run", ("image", ["true"]), {"outputs": True}))
            assert tracemalloc.get_traced_memory()[1] < 300 * MIB
        finally:
            tracemalloc.stop()
    assert isinstance(got, BoxerError) and got.result == RESULT


def test_the_list_of_outputs_has_a_random_name_and_is_no_output(client_of: Clients) -> None:
    kept = Kept({"a": b"x"})
    names = set()
    with Host(kept) as host:
        client = client_of(host.url)
        for _ in range(3):
            assert client.run("image", ["true"], outputs=True).outputs == {"a": b"x"}
            names.add(kept.name)
    assert len(names) == 3 and all(len(name) >= 16 for name in names)
    assert all(run["persist"] is True for run in runs_of(host))


# A program that knows the name of the list, as /proc tells it, and what it does there.
SPY = """
import os, re, sys
line = open(f"/proc/{os.getppid()}/cmdline").read()
name = "/output/" + re.search("! -name ([^ ]+)", line)[1]
open("/output/honest", "w").write("x")
"""
SPIES = {
    "a folder in its place": "os.mkdir(name)",
    "a link in its place": "os.symlink('/etc/passwd', name)",
    "a link to another output": "os.symlink('honest', name)",
    "a list that cannot be written": (
        "open(name, 'w').write('./../../x\\\\0./honest\\\\0/etc/passwd\\\\0'); os.chmod(name, 0o400)"
    ),
    "no shell": "os.kill(os.getppid(), 9)",
    "no way to list": "os.chmod('/output', 0o300)",
    "many names": "[open(f'/output/{n}', 'w').close() for n in range(300)]",
}


@in_a_sandbox
@of_the_stand_in
@pytest.mark.parametrize("act", SPIES.values(), ids=SPIES)
def test_a_program_that_meddles_with_the_list_gains_nothing(client_of: Clients, tmp_path: Path, act: str) -> None:
    with own_server() as server:
        client, cmd = client_of(server.url), ["python3", "-c", SPY + act.replace("\\\\", "\\")]
        for wanted in ({"outputs": True}, {"output_dir": tmp_path / "a" / "b"}):
            got = outcome(client, ("run", (PYTHON, cmd), {**wanted, "files": {"f": b""}}))
            if isinstance(got, BoxerError):
                assert got.result.exec_id.startswith("boxer-")
            else:
                assert set(got.outputs) <= {"honest", *map(str, range(2000))}
        assert server.store.uploads() == []
    files = [path for path in tmp_path.rglob("*") if not path.is_dir()]
    assert all(path.parent == tmp_path / "a" / "b" and not path.is_symlink() for path in files)


@in_a_sandbox
@of_the_stand_in
def test_a_sparse_file_is_streamed_into_a_folder_and_too_much_for_memory(client_of: Clients, tmp_path: Path) -> None:
    grow = "open('/output/sparse', 'w').truncate({} << 20)"
    with own_server() as server:
        client = client_of(server.url)
        tracemalloc.start()
        try:
            got = outcome(client, ("run", (PYTHON, ["python3", "-c", grow.format(3 << 10)]), {"outputs": True}))
            assert isinstance(got, BoxerError) and got.result.ok
            del got
            gc.collect()  # what was received hangs on the error's traceback
            tracemalloc.reset_peak() if hasattr(tracemalloc, "reset_peak") else None
            assert client.run(PYTHON, ["python3", "-c", grow.format(300)], output_dir=tmp_path / "x").ok
            assert tracemalloc.get_traced_memory()[1] < (16 if hasattr(tracemalloc, "reset_peak") else 300) * MIB
        finally:
            tracemalloc.stop()
        assert (tmp_path / "x" / "sparse").stat().st_size == 300 * MIB
        (tmp_path / "x" / "sparse").unlink()


# Output folders


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder with one file that nobody is to write to; beside it is the folder for outputs."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x").write_bytes(b"untouched")
    (tmp_path / "target").mkdir()
    return tmp_path / "outside"


@pytest.mark.parametrize("name", ["link/x", "link/new", "link/deep/new", "d/link/x"])
def test_nothing_is_written_through_a_link_below_the_folder_of_outputs(
    client_of: Clients, outside: Path, name: str
) -> None:
    target = outside.parent / "target"
    link = target / name[: name.index("link") + 4]
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(outside)
    with Host(Kept({name: b"evil"})) as host:
        got = outcome(client_of(host.url), ("run", ("image", ["true"]), {"output_dir": target}))
    assert isinstance(got, BoxerError) and got.result == RESULT
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == {"x": b"untouched"}


def test_an_output_takes_the_place_of_a_link_and_does_not_follow_it(client_of: Clients, outside: Path) -> None:
    target = outside.parent / "target"
    (target / "a").symlink_to(outside / "x")
    (target / "b").write_bytes(b"old")
    with Host(Kept({"a": b"new", "b": b"new"})) as host:
        got = outcome(client_of(host.url), ("run", ("image", ["true"]), {"output_dir": target}))
    assert (outside / "x").read_bytes() == b"untouched"
    if not isinstance(got, BoxerError):  # to refuse is as good
        assert {name: (target / name).read_bytes() for name in "ab"} == {"a": b"new", "b": b"new"}
        assert not (target / "a").is_symlink()


@pytest.mark.skipif(os.name == "nt", reason="there are no such pipes here")
def test_no_output_goes_into_a_pipe_or_through_a_link_to_one(client_of: Clients, outside: Path) -> None:
    os.mkfifo(outside / "pipe")
    os.mkfifo(outside.parent / "target" / "b")
    (outside.parent / "target" / "a").symlink_to(outside / "pipe")
    pipe = os.open(outside / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with Host(Kept({"a": b"evil", "b": b"evil"})) as host:
        client_of(host.url).run("image", ["true"], output_dir=outside.parent / "target")
    assert os.read(pipe, 100) == b"" and (outside / "pipe").is_fifo()
    assert all((outside.parent / "target" / name).read_bytes() == b"evil" for name in "ab")
    os.close(pipe)


@pytest.mark.skipif(os.name == "nt", reason="there is no such limit here")
@pytest.mark.parametrize("is_json", [None, False, True], ids=["client", "command", "command with JSON"])
def test_a_disk_that_fills_up_is_an_error_with_the_result(
    client_of: Clients, call_main: Any, tmp_path: Path, is_json: bool | None
) -> None:
    import resource

    limits, (name, *_) = resource.getrlimit(resource.RLIMIT_FSIZE), ["large"]
    with Host(Kept({name: bytes(4 * MIB)})) as host:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MIB, limits[1]))
        try:
            if is_json is None:
                got = outcome(client_of(host.url), ("run", ("image", ["true"]), {"output_dir": tmp_path / "x"}))
            else:
                said = call_main("run", "--url", host.url, *["--json"] * is_json, "-o", "x", "image", "x")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if is_json is None:
        assert (
            is_expected(got, (BoxerError, None, f"the output {name!r} could not be written")) and got.result == RESULT
        )
    else:
        assert said.code == 125 and (json.loads(said.stdout)["stdout"] if is_json else said.stdout.decode()) == "hi\n"
    assert list((tmp_path / "x").iterdir()) == []


def test_the_folder_of_outputs_may_itself_be_a_link(client_of: Clients, outside: Path) -> None:
    (outside.parent / "link").symlink_to("target")
    with Host(Kept({"a/b": b"new"})) as host:
        client_of(host.url).run("image", ["true"], output_dir=outside.parent / "link")
    assert (outside.parent / "target" / "a" / "b").read_bytes() == b"new"


# Outputs that cannot be had as files: each row has their names, in the order of the list.
CLASHES = {
    "a file and a folder": {"a": b"", "a/b": b""},
    "a folder and a file": {"a/b": b"", "a": b""},
    "a name too long": {"x" * 300: b""},
    "a path too long": {"/".join(["x" * 200] * 40): b""},
}


@pytest.mark.parametrize("outputs", CLASHES.values(), ids=CLASHES)
def test_an_output_that_cannot_be_a_file_here_is_an_error_with_the_result(
    client_of: Clients, tmp_path: Path, outputs: dict[str, bytes]
) -> None:
    with Host(Kept(outputs)) as host:
        got = outcome(client_of(host.url), ("run", ("image", ["true"]), {"output_dir": tmp_path / "target"}))
    assert isinstance(got, BoxerError) and got.result == RESULT


def test_each_output_is_whole_or_not_there(client_of: Clients, tmp_path: Path) -> None:
    cut = [answer(bytes(MIB))[:-1], Do.FIN]
    with Host(Kept({"a": b"whole", "b": cut})) as host:
        got = outcome(client_of(host.url), ("run", ("image", ["true"]), {"output_dir": tmp_path / "x"}), retries=0)
    assert isinstance(got, BoxerConnectionError) and got.result == RESULT
    assert {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()} == {"a": b"whole"}


def test_outputs_are_named_or_go_into_a_folder(client_of: Clients, tmp_path: Path) -> None:
    with Peer([]) as peer, pytest.raises(BoxerValidationError, match="exclude each other"):
        client_of(peer.url).run("image", ["true"], outputs=["a"], output_dir=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_local_folder_that_cannot_be_made_is_an_error_of_the_system(client_of: Clients, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with Host(Kept({"a": b""})) as host, pytest.raises((OSError, BoxerError)):
        client_of(host.url).run("image", ["true"], output_dir=tmp_path / "file" / "x")


# ---------------------------------------------------------------------------------------------------------------------
# Both clients: downloads to disk
# ---------------------------------------------------------------------------------------------------------------------


def test_a_download_goes_to_a_path_or_into_a_folder_under_its_name(client_of: Clients, tmp_path: Path) -> None:
    content = os.urandom(3 * MIB)
    (tmp_path / "folder").mkdir()
    with store() as server:
        client = client_of(server.url)
        client.upload_file("d/é.bin", content)
        for local in (tmp_path / "new", str(tmp_path / "new"), tmp_path / "folder", f"{tmp_path}/folder/"):
            client.download_path("d/é.bin", local)
        client.download_path("/d/é.bin", tmp_path / "slash")
    found = {
        str(path.relative_to(tmp_path)): path.read_bytes() == content for path in tmp_path.rglob("*") if path.is_file()
    }
    assert found == {"new": True, "folder/é.bin": True, "slash": True}


def test_a_download_refuses_to_write_over_a_folder(client_of: Clients, tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    with Peer([]) as peer, pytest.raises(BoxerValidationError, match="folder"):
        client_of(peer.url).download_path("x/a.txt", tmp_path)


def test_a_download_into_a_folder_that_is_not_there_makes_no_file_of_its_name(
    client_of: Clients, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with Peer([]) as peer:
        for local in (f"{tmp_path}/new/", f"{tmp_path}/file/"):
            with pytest.raises(BoxerValidationError, match="there is no folder"):
                client_of(peer.url).download_path("x/a.txt", local)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.parametrize("remote", ["a/..", "..", ".", "/", "a/"])
def test_a_download_into_a_folder_needs_a_name(client_of: Clients, tmp_path: Path, remote: str) -> None:
    (tmp_path / "inner").mkdir()
    with Host(lambda _: [answer(b"evil")]) as host, pytest.raises(BoxerError):
        client_of(host.url).download_path(remote, tmp_path / "inner")
    assert list(tmp_path.rglob("*")) == [tmp_path / "inner"]


def test_a_download_goes_to_where_a_binary_file_stands(client_of: Clients, tmp_path: Path) -> None:
    with open(tmp_path / "a", "w+b") as file, Host(lambda _: [answer(b"content")]) as host:
        client = client_of(host.url)
        file.write(b"before ")
        client.download_path("a", file)
        client.download_path("a", file)
        file.seek(0)
        assert file.read() == b"before contentcontent"
        with pytest.raises(TypeError), open(tmp_path / "b", "w") as text:
            client.download_path("a", text)


class Pipe:
    """What can only be written to; after `room` bytes, that fails."""

    def __init__(self, room: float = math.inf) -> None:
        self.content, self.room = b"", room

    def write(self, data: Any) -> int:
        if len(self.content) >= self.room:
            raise LookupError("enough")
        self.content += bytes(data)
        return len(data)


BULKY_CONTENT = bytes(range(256)) * 4096 * 3  # more than is written at a time


def cut_then_whole(content: bytes) -> Peer:
    return Peer([[Do.REQUEST, answer(BULKY_CONTENT)[:-1000], Do.FIN], [Do.REQUEST, answer(content)]])


@pytest.mark.parametrize("content", [BULKY_CONTENT, b"shorter", b""], ids=["the same", "shorter", "empty"])
def test_a_download_is_started_over_after_a_lost_connection(client_of: Clients, tmp_path: Path, content: bytes) -> None:
    with cut_then_whole(content) as peer:
        client_of(peer.url).download_path("a", tmp_path / "a")
    with cut_then_whole(content) as peer, open(tmp_path / "b", "w+b") as file:
        file.write(b"before ")
        client_of(peer.url).download_path("a", file)
    assert (tmp_path / "a").read_bytes() == content
    assert (tmp_path / "b").read_bytes() == b"before " + content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


class TakesText:
    """Takes whole pieces of text as bytes, as a writer may that looks at no more than what it gets."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, content: bytes) -> None:
        self.text += content.decode()


def test_a_writer_gets_bytes(client_of: Clients) -> None:
    with Peer.answering(answer(b"content")) as peer:
        client_of(peer.url).download_path("a", text := TakesText())
    assert text.text == "content"


class PathThatWrites(type(Path())):  # type: ignore[misc]
    """A path with a method `write`, as py.path has them."""

    def write(self, content: Any) -> None:
        raise AssertionError(content)


def test_a_path_that_can_write_is_a_path(client_of: Clients, tmp_path: Path) -> None:
    with Peer.answering(answer(b"content")) as peer:
        client_of(peer.url).download_path("a", PathThatWrites(tmp_path / "a"))
    assert (tmp_path / "a").read_bytes() == b"content"


def test_what_cannot_be_rewound_gets_a_download_once(client_of: Clients) -> None:
    whole, part, content = Pipe(), Pipe(), BULKY_CONTENT * 8
    with Peer.answering(answer(content)) as peer:
        client_of(peer.url).download_path("a", whole)
    with Peer([[Do.REQUEST, answer(content)[:-1000], Do.FIN]]) as peer:
        assert is_expected(outcome(client_of(peer.url), ("download_path", ("a", part), {})), lost())
    assert whole.content == content and part.content and content.startswith(part.content)


# Each row: what a server says, and what comes of it.
NO_DOWNLOADS: dict[str, tuple[list[Any], Any]] = {
    "not found": ([failing("404 Not Found", "file not found")], refusal(404, "file not found")),
    "a folder": (NOT_A_FILE, refusal(301, "folder")),
    "cut": ([answer(BULKY_CONTENT)[:-1], Do.FIN], lost()),
    "a part": ([answer(b"x", "206 Partial Content")], refusal(206)),
}


@pytest.mark.parametrize(("said", "expected"), NO_DOWNLOADS.values(), ids=NO_DOWNLOADS)
@pytest.mark.parametrize("is_there", [False, True], ids=["new", "there"])
def test_a_download_that_fails_leaves_everything_as_it_was(
    client_of: Clients, tmp_path: Path, said: list[Any], expected: Any, is_there: bool
) -> None:
    if is_there:
        (tmp_path / "a").write_bytes(b"old")
    file = io.BytesIO(b"old")
    with Host(lambda _: said) as host:
        client = client_of(host.url, retries=0)
        assert is_expected(outcome(client, ("download_path", ("a", tmp_path / "a"), {})), expected)
        if expected != lost():
            assert is_expected(outcome(client, ("download_path", ("a", file), {})), expected)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == ({"a": b"old"} if is_there else {})
    assert file.getvalue() == b"old"


def test_a_download_into_a_folder_that_is_not_there_is_an_error_of_the_system(
    client_of: Clients, tmp_path: Path
) -> None:
    with Host(lambda _: [answer(b"x")]) as host, pytest.raises(FileNotFoundError) as caught:
        client_of(host.url).download_path("a", tmp_path / "missing" / "a")
    assert caught.value.filename == str(tmp_path / "missing" / "a")


def test_a_file_uploaded_to_a_path_that_ends_in_a_slash_goes_into_that_folder(
    client_of: Clients, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("x")
    with store() as server:
        assert client_of(server.url).upload_path(tmp_path / "a.txt", "b/") == ["b/a.txt"]


# Each row: a working directory beside files of the run's own, and what is sent for it below the run's folder.
BELOW = [(None, ""), ("", ""), (".", ""), ("a", "/a"), ("a/b/", "/a/b"), ("/tmp", None), ("/", None)]


@pytest.mark.parametrize(("cwd", "below"), BELOW)
def test_a_relative_working_directory_is_below_the_run_s_own_folder(
    client_of: Clients, cwd: str | None, below: str | None
) -> None:
    with Host(lambda _: [answer({**RUN, "path": "stored"})]) as host:
        client_of(host.url).run("image", ["true"], files={"a/b/c": b""}, cwd=cwd)
    sent = next(request.json["cwd"] for request in host.seen if "/run" in request.line)
    assert sent == cwd if below is None else re.fullmatch(f"/boxer-[0-9a-f]{{32}}{below}", sent)


@pytest.mark.parametrize("exec_id", ["a\0b", LONE], ids=ascii)
def test_a_result_that_no_output_can_be_fetched_for_is_the_server_s_fault(client_of: Clients, exec_id: str) -> None:
    with Host(lambda _: [answer({**RUN, "exec_id": exec_id})]) as host:
        error = outcome(client_of(host.url), ("run", ("image", ["true"]), {"outputs": ["a"]}))
    assert is_expected(error, (BoxerAPIError, 200, "the result is malformed: exec_id has"))


@pytest.mark.parametrize("can_be_rewound", [False, True])
def test_a_file_that_ends_as_an_iterator_does_is_an_error(client_of: Clients, can_be_rewound: bool) -> None:
    class Iterating(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if size:
                raise StopIteration
            return b""

        def seek(self, *args: Any) -> int:
            if not can_be_rewound:
                raise io.UnsupportedOperation
            return super().seek(*args)

    with Frail(lambda _: [STORED]) as host, pytest.raises(RuntimeError, match="StopIteration"):
        client_of(host.url).upload_file("a.txt", Iterating(b"content"))


def test_what_ends_iterations_is_no_end_of_a_file(client_of: Clients) -> None:
    class Iterating(io.BytesIO):
        def read(self, _: int | None = -1) -> bytes:
            raise StopIteration

        def write(self, _: Any) -> int:
            raise StopIteration

    with Host(lambda _: [answer(b"content")]) as host:
        client = client_of(host.url)
        with pytest.raises(RuntimeError, match="StopIteration"):
            client.run("image", ["true"], files={"a": Iterating()})
        with pytest.raises(RuntimeError, match="StopIteration"):
            client.download_path("a", Iterating())


def test_a_file_that_does_not_heed_the_size_is_refused(client_of: Clients) -> None:
    class Whole(io.BytesIO):
        def read(self, _: int | None = -1) -> bytes:
            return super().read()

    with Peer([]) as peer, pytest.raises(TypeError, match="takes a size"):
        client_of(peer.url).run("image", ["true"], files={"a": Whole(b"content")})


def test_text_needs_no_thread_of_a_loop_whose_threads_are_busy() -> None:
    async def main() -> list[Any]:
        loop, is_over = asyncio.get_running_loop(), threading.Event()
        loop.set_default_executor(ThreadPoolExecutor(1))
        busy = loop.run_in_executor(None, is_over.wait, 30)
        async with AsyncBoxerClient(host.url, timeout=0.5) as client:
            text = await client.run("image", ["true"], files={"a": "1", "b": b"2"}, input="x", outputs=["a"])
            try:
                await client.run("image", ["true"], files={"a": io.BytesIO(b"1")})
            except BoxerTimeoutError as error:
                return [text.ok, error.status_code, str(error)]
            finally:
                is_over.set()
                await busy
        return []

    with Host(Kept({"a": b"x"})) as host:
        assert asyncio.run(main()) == [True, 0, "local files: no end of reading within 0.5 s; the client gave up"]


def test_a_local_path_in_a_list_of_files_is_told_apart_from_one_on_the_server(client_of: Clients) -> None:
    with Host(lambda _: [failing("400 Bad Request", "file not found: main.py")]) as host:
        error = outcome(client_of(host.url), ("run", ("image", ["true"]), {"files": ["main.py"]}))
    assert is_expected(error, (BoxerAPIError, 400, "file not found: main.py; a list in files names what was uploaded"))


def test_what_a_file_object_raises_cancels_its_download(client_of: Clients) -> None:
    content = [raw(f"Content-Length: {64 * MIB}"), *[bytes(MIB)] * 64]
    with Peer([[Do.REQUEST, content, Do.DRAIN]]) as peer, pytest.raises(LookupError, match="enough"):
        client_of(peer.url).download_path("a", Pipe(room=100_000))


@pytest.mark.skipif(os.name == "nt", reason="there are no such pipes here")
def test_a_download_to_a_pipe_or_a_device_is_refused(client_of: Clients, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(os.devnull)
    for name in ("pipe", "link"):
        with Peer([]) as peer, pytest.raises(BoxerValidationError, match="is no ordinary file; nothing is written"):
            client_of(peer.url).download_path("a", tmp_path / name)
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_symlink()


def test_a_download_to_disk_has_the_permissions_of_any_new_file(client_of: Clients, tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    with Host(lambda _: [answer(b"x")]) as host:
        client_of(host.url).download_path("a", tmp_path / "a")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "usual").stat().st_mode


class CountingFile:
    """A file object that counts, as tqdm.wrapattr makes it."""

    def __init__(self, file: Any) -> None:
        self.file, self.count = file, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def read(self, size: int = -1) -> Any:
        data = self.file.read(size)
        self.count += len(data)
        return data

    def write(self, data: Any) -> Any:
        self.count += len(data)
        return self.file.write(data)


def test_a_file_object_that_counts_shows_the_progress_of_either_direction(client_of: Clients) -> None:
    with store() as server:
        client, up, down = client_of(server.url), CountingFile(io.BytesIO(BULKY_CONTENT)), CountingFile(io.BytesIO())
        client.upload_file("a", up)
        client.download_path("a", down)
    assert up.count == down.count == len(BULKY_CONTENT) and down.getvalue() == BULKY_CONTENT


LARGE_TRANSFER = """
import asyncio, hashlib, resource, sys
from pathlib import Path
from boxer import AsyncBoxerClient, BoxerClient

def transfer(url):
    with BoxerClient(url) as client:
        client.upload_path("large", "a")
        client.download_path("a", "copy")

async def transfer_async(url):
    async with AsyncBoxerClient(url) as client:
        await client.upload_path("large", "a")
        await client.download_path("a", "copy")

kind, url = sys.argv[1:]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
transfer(url) if kind == "sync" else asyncio.run(transfer_async(url))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@of_the_stand_in
@pytest.mark.skipif(sys.platform != "linux", reason="what a process has used is counted in another unit here")
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_large_file_goes_up_and_down_in_64_mib_of_memory(large_store: StandIn, tmp_path: Path, kind: str) -> None:
    with open(tmp_path / "large", "wb") as file:
        file.truncate(300 * MIB - 6)
        file.seek(0, os.SEEK_END)
        file.write(b"ending")
    taken = int(program_beside_boxer(tmp_path, LARGE_TRANSFER, kind, large_store.url)) * 1024
    with open(tmp_path / "copy", "rb") as copied:
        assert os.fstat(copied.fileno()).st_size == 300 * MIB
        copied.seek(-8, os.SEEK_END)
        assert copied.read() == b"\0\0ending"
    for name in ("large", "copy"):
        (tmp_path / name).unlink()
    assert taken < 64 * MIB


# What an answer says of itself, what files take, and when a call is over


@pytest.mark.parametrize("coding", ["identity", "", "Identity"])
def test_content_that_is_not_coded_is_written_whatever_names_it_so(
    client_of: Clients, tmp_path: Path, coding: str
) -> None:
    with Host(lambda _: [answer(b"content", Content_Encoding=coding)]) as host:
        client_of(host.url).download_path("a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"content"


@pytest.mark.parametrize("head", [raw("Content-Encoding: gzip"), raw(status="HTTP/1.1 206 Partial Content")])
def test_an_answer_that_is_refused_is_not_taken_in_first(client_of: Clients, tmp_path: Path, head: bytes) -> None:
    flood = itertools.chain([head], itertools.repeat(BULKY_CONTENT))
    with Peer([[Do.REQUEST, flood, Do.DRAIN]]) as peer, pytest.raises(BoxerAPIError):
        client_of(peer.url, retries=0).download_path("a", tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [200, 404])
def test_what_a_handler_answers_with_is_written(tmp_path: Path, code: int) -> None:
    def respond(_: str) -> urllib.response.addinfourl:
        return addinfourl(b"content", code)

    with Peer([]) as peer, BoxerClient(peer.url, handlers=[Fake(respond)]) as client:
        got = outcome(client, ("download_path", ("a", tmp_path / "a"), {}))
    assert (got is None) == (tmp_path / "a").exists() == (code == 200)
    assert code != 200 or (tmp_path / "a").read_bytes() == b"content"


@pytest.mark.skipif(os.name == "nt", reason="there are no such permissions here")
def test_a_download_leaves_private_what_was(client_of: Clients, tmp_path: Path) -> None:
    (tmp_path / "a").touch(0o600)
    (tmp_path / "link").symlink_to("a")
    with Host(lambda _: [answer(b"content")]) as host:
        client_of(host.url).download_path("a", tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "a").read_bytes() == b"content"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600


class Full(io.RawIOBase):
    """A file that takes nothing, and says so in one of two ways."""

    def __init__(self, says: Any) -> None:
        self.says = says

    def writable(self) -> bool:
        return True

    def write(self, _: Any) -> Any:
        return self.says


@pytest.mark.parametrize("says", [0, None])
def test_a_file_that_takes_nothing_ends_a_download(client_of: Clients, says: Any) -> None:
    with Host(lambda _: [answer(b"content")]) as host, pytest.raises(BlockingIOError):
        client_of(host.url).download_path("a", Full(says))


def test_nothing_is_written_once_the_call_is_over() -> None:
    class Slow:
        """Takes a byte at a time, and then waits."""

        def __init__(self) -> None:
            self.count, self.writes, self.go_on = 0, threading.Event(), threading.Event()

        def write(self, _: Any) -> int:
            self.count += 1
            self.writes.set()
            assert self.go_on.wait(30)
            return 1

    async def main() -> None:
        async with AsyncBoxerClient(host.url) as client:
            call = asyncio.ensure_future(client.download_path("a", slow))
            await asyncio.get_running_loop().run_in_executor(None, slow.writes.wait, 30)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            slow.go_on.set()

    slow: Any = Slow()
    with Host(lambda _: [answer(b"content")]) as host:
        asyncio.run(main())  # it waits for the threads of its executor
    assert slow.count == 1


def test_a_file_that_takes_its_time_does_not_outlast_the_deadline() -> None:
    class Stuck:
        def write(self, content: Any) -> int:
            assert go_on.wait(30)
            return len(content)

    async def main(target: Any) -> None:
        async with AsyncBoxerClient(host.url) as client:
            with contextlib.ExitStack() as stack:
                stack.callback(go_on.set)
                stack.enter_context(pytest.raises(BoxerTimeoutError, match=r"within 0\.3 s; the client gave up"))
                await client.download_path("a", target, timeout=0.3)

    go_on = threading.Event()
    with Host(lambda _: [answer(b"content")]) as host:
        asyncio.run(main(Stuck()))


def test_an_output_that_lies_too_deep_is_an_error_with_the_result(client_of: Clients, tmp_path: Path) -> None:
    with Host(Kept({"/".join("x" * 70): b""})) as host:
        got = outcome(client_of(host.url), ("run", ("image", ["true"]), {"output_dir": tmp_path / "x"}))
    assert is_expected(got, (BoxerError, None, "folders deep")) and got.result == RESULT


def test_what_a_signal_handler_raises_leaves_a_download_of_outputs_as_it_is(tmp_path: Path) -> None:
    class Raising(urllib.request.BaseHandler):
        """Raises what a signal handler might, while a file is fetched."""

        def http_request(self, request: urllib.request.Request) -> urllib.request.Request:
            if "/files" in request.selector and "list" not in request.selector:
                raise TimeoutError("my own")
            return request

    kept, error = Kept({"a": b""}), pytest.raises(TimeoutError, match="my own")
    with Host(kept) as host, BoxerClient(host.url, handlers=[Raising()]) as client, error:
        client.run("image", ["true"], output_dir=tmp_path / "x")


@pytest.mark.parametrize("what", ["outputs", "removal"])
def test_a_result_is_not_lost_if_the_client_is_closed_before_its_outputs_come(what: str) -> None:
    class Closing(urllib.request.BaseHandler):
        """Closes the client once the run has been answered."""

        def http_response(self, request: urllib.request.Request, response: Any) -> Any:
            if request.selector.endswith("/run"):
                client.close()
            return response

    more: dict[str, Any] = {"outputs": ["a"]} if what == "outputs" else {"files": {"a": b""}, "persist": True}
    with Host(lambda _: [answer({**RUN, "path": "x"})]) as host:
        client = BoxerClient(host.url, handlers=[Closing()])
        got = outcome(client, ("run", ("image", ["true"]), more))
    if what == "outputs":
        assert is_expected(got, lost("the client was closed")) and got.result == RESULT
    else:
        assert got == RESULT


def test_what_goes_wrong_with_an_output_is_no_fault_of_the_client_s(tmp_path: Path) -> None:
    class Broken(urllib.request.BaseHandler):
        """Has a fault of its own."""

        def http_request(self, request: urllib.request.Request) -> urllib.request.Request:
            if "/files" in request.selector:
                raise RuntimeError("a fault of mine")
            return request

    kept, error = Kept({"a": b""}), pytest.raises(RuntimeError, match="a fault of mine")
    with Host(kept) as host, BoxerClient(host.url, handlers=[Broken()]) as client, error:
        client.run("image", ["true"], outputs=["a"])


def test_a_file_object_stands_for_one_file(client_of: Clients) -> None:
    file = io.BytesIO(b"content")
    with Peer([]) as peer, pytest.raises(BoxerValidationError, match="under two names"):
        client_of(peer.url).run("image", ["true"], files={"a": file, "b": file})


def test_a_run_that_was_given_up_before_its_uploads_sends_none_of_them() -> None:
    class Slow(io.BytesIO):
        """Is asked for nothing first, and then takes its time."""

        def read(self, size: int | None = -1) -> bytes:
            if size == 0:
                begun.set()
                assert go_on.wait(30)
            return super().read(size)

    begun, go_on = threading.Event(), threading.Event()
    requests = [RunRequest("i", ["c"]), RunRequest("i", ["c"], files={"a": Slow(b"a"), "b": b"b"})]
    # The first run ends once the second one has begun.
    with Host(lambda _: [lambda: begun.wait(30), RAN]) as host, BoxerClient(host.url) as client:
        outcomes = client.run_many(requests, concurrency=2)
        assert next(outcomes)[1] == RESULT and begun.is_set()
        threading.Timer(0.3, go_on.set).start()  # once closing has begun, which waits for the run
        outcomes.close()
    assert [request.line for request in host.seen] == ["POST /run HTTP/1.1"]


def test_uploads_that_begin_after_their_run_was_given_up_are_not_sent(tmp_path: Path) -> None:
    (tmp_path / "many").mkdir()
    for number in range(50):
        (tmp_path / "many" / str(number)).touch()
    begun = threading.Event()

    def respond(request: Received) -> list[Any]:
        if request.line.startswith("POST /files"):
            begun.set()
            return [Do.DRAIN]
        return [RAN]

    requests = [RunRequest("i", ["c"]), RunRequest("i", ["c"], files={"many": tmp_path / "many"})]
    with Host(respond) as host, BoxerClient(host.url, retries=0) as client:
        outcomes = client.run_many(requests, concurrency=2)
        assert next(outcomes)[1] == RESULT
        assert begun.wait(30)
        outcomes.close()
    assert len([request for request in host.seen if request.line.startswith("POST /files")]) <= 8


# ---------------------------------------------------------------------------------------------------------------------
# Both clients: many runs
# ---------------------------------------------------------------------------------------------------------------------


class Echo:
    """Answers runs of `echo` as they are let: a function for a Host. `most` is how many there were at once."""

    def __init__(self, hold: Callable[[int], object] = lambda number: None) -> None:
        self.hold = hold
        self.lock, self.live, self.most, self.begun = threading.Lock(), 0, 0, 0

    def __call__(self, request: Received) -> list[Any]:
        number = int(request.json["cmd"][1])
        with self.lock:
            self.live += 1
            self.begun += 1
            self.most = max(self.most, self.live)
        self.hold(number)
        with self.lock:
            self.live -= 1
        return [answer({**RUN, "stdout": f"{number}\n"})]


def printed(outcomes: Iterable[tuple[RunRequest, Any]]) -> list[tuple[int, str]]:
    return [(request.tag, getattr(outcome, "stdout", outcome)) for request, outcome in outcomes]


def test_many_runs_come_in_order_with_the_requests_that_were_given(client_of: Clients) -> None:
    later = threading.Event()

    def hold(number: int) -> None:
        assert later.wait(30) if number == 0 else True
        if number == 5:
            later.set()

    requests = list(numbered(30))
    with Host(Echo(hold)) as host:
        outcomes = list(iterate(client_of(host.url), requests, concurrency=4))
    assert [request is given for (request, _), given in zip(outcomes, requests)] == [True] * 30
    assert printed(outcomes) == [(number, f"{number}\n") for number in range(30)]


def test_many_runs_come_as_they_end_where_the_order_does_not_matter(client_of: Clients) -> None:
    later = threading.Event()
    with Host(Echo(lambda number: later.wait(30) if number == 0 else None)) as host:
        outcomes = iterate(client_of(host.url), numbered(20), concurrency=4, ordered=False)
        first = printed(itertools.islice(outcomes, 19))
        later.set()
        assert printed(outcomes) == [(0, "0\n")]
    assert sorted(first) == [(number, f"{number}\n") for number in range(1, 20)]


@pytest.mark.parametrize("ordered", [False, True], ids=["as they come", "in order"])
@pytest.mark.parametrize("concurrency", [1, 3, 8])
def test_no_more_than_so_many_runs_are_in_flight(client_of: Clients, concurrency: int, ordered: bool) -> None:
    echo = Echo(lambda number: threading.Event().wait(0.005))
    with Host(echo) as host:
        outcomes = printed(iterate(client_of(host.url), numbered(60), concurrency=concurrency, ordered=ordered))
    assert sorted(outcomes) == [(number, f"{number}\n") for number in range(60)]
    assert echo.most <= concurrency and (echo.most > 1) == (concurrency > 1)


def test_eight_runs_are_in_flight_by_default(client_of: Clients) -> None:
    eight = threading.Barrier(8)
    with Host(Echo(lambda number: eight.wait(30))) as host:
        assert len(printed(iterate(client_of(host.url), numbered(16)))) == 16


def test_more_runs_at_once_than_connections_wait_for_their_turn(client_of: Clients) -> None:
    echo = Echo(lambda number: threading.Event().wait(0.01))
    with Host(echo) as host:
        client = client_of(host.url, max_connections=2, timeout=2)
        assert len(printed(iterate(client, numbered(40), concurrency=16))) == 40
    assert echo.most == 2


def test_the_source_is_asked_only_for_what_there_is_room_for(client_of: Clients) -> None:
    taken = 0

    def source() -> Iterator[RunRequest]:
        nonlocal taken
        for request in numbered(10_000):
            taken += 1
            yield request

    with Host(Echo()) as host:
        outcomes = iterate(client_of(host.url), source(), concurrency=4)
        assert taken == 0
        for count in range(1, 30):
            next(outcomes)
            threading.Event().wait(0.01)  # what goes on meanwhile may not go far
            assert taken <= count + 5 * 4 + 1
        outcomes.close()
        assert taken <= 60


def test_in_order_what_has_finished_waits_but_not_without_end(client_of: Clients) -> None:
    never, echo = threading.Event(), Echo(lambda number: never.wait(30) if number == 0 else None)
    with Host(echo) as host:
        outcomes = iterate(client_of(host.url), numbered(1_000), concurrency=4)
        with ThreadPoolExecutor(1) as executor:
            if isinstance(client_of.kind, str) and client_of.kind == "sync":
                first = executor.submit(next, outcomes)
                settles(lambda: echo.begun >= 4 * 4)
                threading.Event().wait(0.2)
                assert 4 <= echo.begun <= 5 * 4 + 1
                never.set()
                assert printed([first.result()]) == [(0, "0\n")]
            else:
                threading.Timer(0.5, never.set).start()
                assert printed([next(outcomes)]) == [(0, "0\n")]
                assert echo.begun <= 6 * 4 + 1
        outcomes.close()


def test_one_failure_does_not_stop_the_rest(client_of: Clients, clock: Clock) -> None:
    ends: dict[int, list[Any]] = {
        3: [failing("500 Internal Server Error", "start runsc: no")],
        5: [Do.FIN],
        7: [failing("408 Request Timeout", "execution timed out after 1ms")],
        9: [answer("<html>")],
        11: [Do.RST],
    }
    with Host(lambda request: ends.get(int(request.json["cmd"][1]), [RAN])) as host:
        outcomes = {request.tag: got for request, got in iterate(client_of(host.url), numbered(30), concurrency=3)}
    kinds = {
        3: BoxerAPIError,
        5: BoxerConnectionError,
        7: BoxerTimeoutError,
        9: BoxerAPIError,
        11: BoxerConnectionError,
    }
    assert {number: type(got) for number, got in outcomes.items() if got != RESULT} == kinds
    assert list(outcomes) == list(range(30))


def test_a_local_file_that_cannot_be_read_is_the_error_of_its_run_alone(client_of: Clients, tmp_path: Path) -> None:
    files: list[Any] = [{}, {"a": tmp_path / "missing"}, {}]
    requests = [RunRequest("i", ["a"], files=each) for each in files]
    with Host(lambda _: [RAN]) as host:
        first, second, third = (got for _, got in iterate(client_of(host.url), requests, concurrency=1))
    assert (first, third) == (RESULT, RESULT)
    assert type(second) is BoxerError and "missing" in str(second)
    assert isinstance(second.__cause__, FileNotFoundError)


def test_it_is_its_run_s_alone_where_threads_are_instrumented(
    client_of: Clients, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = ThreadPoolExecutor.submit

    def submit_and_trace(self: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return submit(self, lambda: function(*args, **kwargs))

    monkeypatch.setattr(ThreadPoolExecutor, "submit", submit_and_trace)
    requests = [RunRequest("i", ["a"], files={"a": tmp_path / "missing"}), RunRequest("i", ["a"])]
    with Host(lambda _: [RAN]) as host:
        first, second = (got for _, got in iterate(client_of(host.url), requests))
    assert isinstance(first.__cause__, FileNotFoundError) and second == RESULT


@pytest.mark.parametrize(
    "error", [TimeoutError("mine"), concurrent.futures.TimeoutError("mine"), concurrent.futures.CancelledError("mine")]
)
@pytest.mark.parametrize("is_upload", [True, False], ids=["upload", "download"])
def test_what_a_file_raises_leaves_a_thread_as_it_is(client_of: Clients, error: Exception, is_upload: bool) -> None:
    def fail(given: Any) -> bytes:
        if given:
            raise error
        return b""

    file: Any = OnlyReads(fail)
    file.write = fail
    with Frail(lambda request: [STORED] if request.line.startswith("POST") else [answer(b"content")]) as host:
        client = client_of(host.url, timeout=60)
        with pytest.raises(type(error)) as caught:
            client.upload_file("a", file) if is_upload else client.download_path("a", file)
    assert caught.value is error


def test_a_file_may_raise_asyncio_s_cancelled_error(client_of: Clients) -> None:
    def fail(size: int) -> bytes:
        if size:
            raise asyncio.CancelledError
        return b""

    with Frail(lambda _: [STORED]) as host, pytest.raises(asyncio.CancelledError):
        client_of(host.url, timeout=60).upload_file("a", OnlyReads(fail))


def test_what_a_file_of_the_caller_raises_is_raised_by_many_runs(client_of: Clients) -> None:
    class Odd(io.BytesIO):
        def read(self, _: int | None = -1) -> bytes:
            raise OSError("the caller's own")

    requests = [RunRequest("i", ["a"]), RunRequest("i", ["a"], files={"a": Odd()})]
    with Host(lambda _: [RAN]) as host, pytest.raises(OSError, match="the caller's own"):
        list(iterate(client_of(host.url), requests, concurrency=1))


class NoError(BaseException):
    """What some libraries raise where nothing is wrong, as pytest does to skip a test."""


@pytest.mark.parametrize("kind", [NoError, GeneratorExit])
@pytest.mark.parametrize("where", ["the source", "a file of a run", "one of several files"])
def test_what_is_no_exception_of_the_caller_s_is_raised_too(
    client_of: Clients, where: str, kind: type[BaseException]
) -> None:
    def fail(size: int) -> bytes:
        if size:
            raise kind
        return b""

    def source() -> Iterator[RunRequest]:
        yield RunRequest("i", ["a"])
        raise kind

    def make_call(client: Any) -> None:
        files: Any = {"a": OnlyReads(fail)}
        if where == "one of several files":
            client.run("i", ["a"], files={**files, "b": b"", "c": b""})
        else:
            list(iterate(client, source() if where == "the source" else [RunRequest("i", ["a"], files=files)]))

    with Frail(lambda request: [STORED] if "/files" in request.line else [RAN]) as host, pytest.raises(kind):
        make_call(client_of(host.url))


WHAT_ENDS = """
import asyncio, sys
from boxer import AsyncBoxerClient, RunRequest

async def main():
    async def source():
        yield RunRequest("i", ["a"])
        await is_in_the_loop.wait()
        sys.exit(3)

    is_in_the_loop = asyncio.Event()
    async with AsyncBoxerClient(sys.argv[1]) as client:
        async for _ in client.run_many(source()):
            is_in_the_loop.set()
            await asyncio.Event().wait()

asyncio.run(main())
"""


def test_what_ends_a_program_ends_it_within_the_loop_over_many_runs() -> None:
    with Frail(lambda _: [RAN]) as host:
        program = [sys.executable, "-c", WHAT_ENDS, host.url]
        assert subprocess.run(program, check=False, timeout=60, capture_output=True).returncode == 3


def test_a_source_may_be_of_both_kinds(client_of: Clients) -> None:
    class Both:
        def __iter__(self) -> Iterator[RunRequest]:
            return numbered(3)

        async def __aiter__(self) -> Any:
            for request in numbered(3):
                yield request

    with Host(Echo()) as host:
        assert [request.tag for request, _ in iterate(client_of(host.url), Both())] == [0, 1, 2]


@pytest.mark.parametrize("ordered", [False, True], ids=["as they come", "in order"])
def test_what_the_source_raises_is_raised_after_what_had_finished(client_of: Clients, ordered: bool) -> None:
    def source() -> Iterator[RunRequest]:
        yield from numbered(5)
        settles(lambda: echo.begun == 5 and not echo.live)
        threading.Event().wait(0.2)
        raise LookupError("the end")

    echo, came = Echo(), []
    with Host(echo) as host:
        client = client_of(host.url)
        with pytest.raises(LookupError, match="the end"):  # noqa: PT012 - what came before it counts
            for request, _ in iterate(client, source(), concurrency=2, ordered=ordered):
                came.append(request.tag)
        assert client.run("i", ["echo", "9"]).stdout == "9\n"
    assert sorted(came) == [0, 1, 2, 3, 4] or client_of.kind == "async"  # there, a source that blocks blocks the loop


@pytest.mark.parametrize("ordered", [False, True], ids=["as they come", "in order"])
def test_what_had_finished_comes_before_an_error_even_if_an_earlier_run_goes_on(
    client_of: Clients, ordered: bool
) -> None:
    def source() -> Iterator[RunRequest]:
        yield from numbered(4)
        raise LookupError("the end")  # it is asked for another one when all but the first have ended

    is_over, came = threading.Event(), []
    with Host(Echo(lambda number: is_over.wait(30) if number == 0 else None)) as host:
        with pytest.raises(LookupError, match="the end"):  # noqa: PT012 - what came before it counts
            for request, _ in iterate(client_of(host.url), source(), concurrency=2, ordered=ordered):
                came.append(request.tag)
        is_over.set()
    assert came == [1, 2, 3]


def test_an_interrupt_while_the_source_of_many_runs_is_asked_is_raised_at_once() -> None:
    def source() -> Iterator[RunRequest]:
        yield from numbered(2)
        raise KeyboardInterrupt

    with Host(Echo()) as host, BoxerClient(host.url) as client:
        outcomes = client.run_many(source(), concurrency=4)
        with pytest.raises(KeyboardInterrupt):
            list(outcomes)


@pytest.mark.parametrize("source", [[1], ["true"], [None], [RunRequest], 5, None], ids=repr)
def test_a_source_of_something_else_is_a_type_error(client_of: Clients, source: Any) -> None:
    with Peer([]) as peer, pytest.raises(TypeError):
        list(iterate(client_of(peer.url), source))


@pytest.mark.parametrize("concurrency", [0, -1, 1.5, "8", None, True], ids=repr)
def test_a_concurrency_that_is_none_is_refused(client_of: Clients, concurrency: Any) -> None:
    with Peer([]) as peer, pytest.raises((BoxerValidationError, TypeError)):
        list(iterate(client_of(peer.url), numbered(1), concurrency=concurrency))


def test_no_requests_are_no_outcomes(client_of: Clients) -> None:
    with Peer([]) as peer:
        assert list(iterate(client_of(peer.url), [])) == []


def test_a_closed_client_runs_nothing(client_of: Clients) -> None:
    with Peer([]) as peer:
        client = client_of(peer.url)
        client.close()
        with pytest.raises(RuntimeError):
            list(iterate(client, numbered(3)))


def test_where_no_connection_can_be_made_that_is_raised_once(client_of: Clients, clock: Clock) -> None:
    taken = 0

    def source() -> Iterator[RunRequest]:
        nonlocal taken
        for request in numbered(100_000):
            taken += 1
            yield request

    with pytest.raises(BoxerConnectionError) as caught:
        list(iterate(client_of(refused_url()), source(), concurrency=4))
    assert not caught.value.request_sent and taken <= 6 * 4


@pytest.mark.parametrize("ordered", [False, True], ids=["as they come", "in order"])
def test_where_a_server_goes_away_what_had_finished_comes_first(
    client_of: Clients, clock: Clock, ordered: bool
) -> None:
    came = []
    with vanishing(RAN, RAN, RAN) as url, pytest.raises(BoxerConnectionError):  # noqa: PT012 - what came before it counts
        for request, got in iterate(client_of(url), numbered(1_000), concurrency=1, ordered=ordered):
            came.append((request.tag, got == RESULT or is_expected(got, lost())))
    assert came[:3] == [(0, True), (1, True), (2, True)] and len(came) <= 4


@in_a_sandbox
@of_the_stand_in
@pytest.mark.parametrize("ordered", [False, True], ids=["as they come", "in order"])
def test_leaving_the_loop_early_kills_the_runs_that_are_under_way(client_of: Clients, ordered: bool) -> None:
    requests = [RunRequest(PYTHON, ["sleep", "0" if number == 0 else "60"]) for number in range(100)]
    with own_server() as server:
        client = client_of(server.url)
        outcomes = iterate(client, requests, concurrency=4, ordered=ordered)
        assert next(outcomes)[1].ok
        assert server.wait_for(lambda: len(server.runs_live) >= 3)
        outcomes.close()
        assert server.wait_for(lambda: not server.runs_live) and server.runs_killed >= 3
        assert server.runs <= 6 and client.health()


@in_a_sandbox
@of_the_stand_in
@pytest.mark.parametrize("wrong", [{"timeout": -1}, {"retries": -1}, {"concurrency": 0}], ids=str)
def test_what_many_runs_cannot_be_told_is_refused_at_once(client_of: Clients, wrong: Any) -> None:
    with Peer([]) as peer, pytest.raises(BoxerValidationError, match=next(iter(wrong))):
        list(iterate(client_of(peer.url), numbered(3), **wrong))


def test_leaving_an_asynchronous_loop_early_kills_the_runs_that_are_under_way() -> None:
    async def main() -> None:
        async with AsyncBoxerClient(stand_in.url) as client:
            requests = (RunRequest(PYTHON, ["sleep", "0" if number == 0 else "60"]) for number in range(100))
            async for _, result in client.run_many(requests, concurrency=4):
                assert isinstance(result, RunResult)
                await asyncio.get_running_loop().run_in_executor(
                    None, stand_in.wait_for, lambda: len(stand_in.runs_live) >= 3
                )
                break
            await asyncio.get_running_loop().run_in_executor(None, stand_in.wait_for, lambda: not stand_in.runs_live)
            assert not stand_in.runs_live and stand_in.runs_killed >= 3

    with own_server() as stand_in:
        asyncio.run(main())


@in_a_sandbox
@of_the_stand_in
def test_a_task_that_is_cancelled_in_many_runs_kills_them() -> None:
    async def consume(client: AsyncBoxerClient) -> None:
        async for _ in client.run_many(RunRequest(PYTHON, ["sleep", "60"]) for _ in range(100)):
            pass

    async def main() -> None:
        async with AsyncBoxerClient(stand_in.url) as client:
            with pytest.raises(asyncio.CancelledError):
                await break_off(
                    "cancel", consume(client), lambda: stand_in.wait_for(lambda: len(stand_in.runs_live) == 8)
                )
            await asyncio.get_running_loop().run_in_executor(None, stand_in.wait_for, lambda: not stand_in.runs_live)
            assert (len(stand_in.runs_live), stand_in.runs) == (0, 8) and await client.health()

    with own_server() as stand_in:
        asyncio.run(main())


@pytest.mark.parametrize("when", ["call", "return"])
@pytest.mark.parametrize("number", range(4))
def test_an_interrupt_as_a_thread_starts_leaves_none_waiting(number: int, when: str) -> None:
    left = number

    def interrupt(frame: Any, event: str, _: Any) -> None:
        nonlocal left
        if event == when and frame.f_code is threading.Thread.start.__code__:
            left -= 1
            if left < 0:
                sys.setprofile(None)
                raise KeyboardInterrupt

    def call() -> str:
        sys.setprofile(interrupt)
        try:
            return str(len(list(client.run_many(numbered(20), concurrency=4))))
        except KeyboardInterrupt:
            return "interrupted"
        finally:
            sys.setprofile(None)

    with Frail(lambda _: [RAN]) as host, BoxerClient(host.url) as client:
        assert in_time(call) in ("interrupted", "20")  # one thread may be so quick that there is no second


@pytest.mark.parametrize("what", ["many runs", "files of a run"])
def test_many_calls_at_once_take_no_lock_that_an_interrupt_would_leave_taken(what: str) -> None:
    """`Condition.__enter__` is written in Python: an interrupt as it returns leaves its lock taken for ever."""

    def interrupt(frame: Any, event: str, _: Any) -> None:
        if event == "return" and frame.f_code is threading.Condition.__enter__.__code__:
            names = []
            while frame is not None:
                names.append(frame.f_code.co_name)
                frame = frame.f_back
            if "start" not in names[:4]:  # to start a thread takes such a lock, in any program
                raise KeyboardInterrupt

    def call() -> int:
        sys.setprofile(interrupt)
        try:
            if what == "many runs":
                return len(list(client.run_many(numbered(20), concurrency=4)))
            return client.run("image", ["true"], files={str(number): b"" for number in range(20)}).exit_code + 20
        finally:
            sys.setprofile(None)

    answers = {"POST /run": RAN, "POST /files": STORED}
    with Host(lambda request: [answers[request.line.rpartition(" ")[0]]]) as host, BoxerClient(host.url) as client:
        assert in_time(call) == 20


@in_a_sandbox
@of_the_stand_in
def test_an_interrupt_in_many_runs_kills_them(interrupts: Interrupts) -> None:
    with own_server() as server, BoxerClient(server.url) as client:
        is_over = threading.Event()
        with ThreadPoolExecutor(1) as executor:

            def interrupt() -> bool:
                return server.wait_for(lambda: len(server.runs_live) == 8) and interrupts(is_over)

            interrupted = executor.submit(interrupt)
            with pytest.raises(KeyboardInterrupt):
                list(client.run_many(RunRequest(PYTHON, ["sleep", "60"]) for _ in range(100)))
            is_over.set()
            assert interrupted.result()
        assert server.wait_for(lambda: not server.runs_live) and server.runs == 8
        assert client.health()


def test_an_asynchronous_source_is_taken_from_lazily_and_while_runs_go_on() -> None:
    async def source() -> Any:
        for request in numbered(50):
            await asyncio.sleep(0.001)
            yield request

    async def main() -> list[tuple[int, str]]:
        async with AsyncBoxerClient(host.url) as client:
            return printed([pair async for pair in client.run_many(source(), concurrency=4)])

    with Host(Echo()) as host:
        assert asyncio.run(main()) == [(number, f"{number}\n") for number in range(50)]


def test_an_asynchronous_source_that_waits_for_results_gets_them() -> None:
    async def main() -> list[int]:
        seen, came = asyncio.Event(), []

        async def source() -> Any:
            first, *rest = numbered(5)
            yield first
            await asyncio.wait_for(seen.wait(), 10)
            for request in rest:
                yield request

        async with AsyncBoxerClient(host.url) as client:
            async for request, _ in client.run_many(source()):
                came.append(request.tag)
                seen.set()
        return came

    with Host(Echo()) as host:
        assert asyncio.run(main()) == [0, 1, 2, 3, 4]


def test_requests_and_results_that_are_done_with_are_let_go(client_of: Clients) -> None:
    import weakref

    alive: Any = weakref.WeakSet()

    def source() -> Iterator[RunRequest]:
        for request in numbered(400):
            alive.add(request)
            yield request

    most = 0
    with Host(Echo()) as host:
        for request, result in iterate(client_of(host.url), source(), concurrency=4):
            most = max(most, len(alive))
            del request, result
    assert most <= 8 * 4


@in_a_sandbox
@of_the_stand_in
def test_many_runs_may_have_inputs_files_and_outputs_and_leave_nothing(client_of: Clients) -> None:
    code = "import sys; open('/output/r', 'w').write(open('n').read() + sys.stdin.read())"
    requests = [
        RunRequest(
            PYTHON, ["python3", "-c", code], files={"n": str(number), "m": b""}, input=f" {number}", outputs=["r"]
        )
        for number in range(12)
    ]
    with own_server(race=1 / 3) as server:
        outcomes = list(iterate(client_of(server.url), requests, concurrency=4))
        assert [getattr(got, "outputs", got) for _, got in outcomes] == [{"r": f"{n} {n}".encode()} for n in range(12)]
        assert server.store.uploads() == []


def test_ten_thousand_runs_at_once_are_first_come_first_served() -> None:
    async def main() -> None:
        async with AsyncBoxerClient(host.url, max_connections=1) as client:
            results = await asyncio.gather(*(client.run("i", ["echo", str(number)]) for number in range(10_000)))
        assert [result.stdout for result in results] == [f"{number}\n" for number in range(10_000)]

    with Host(Echo()) as host:
        asyncio.run(main())
    assert [int(request.json["cmd"][1]) for request in host.seen] == list(range(10_000))


# ---------------------------------------------------------------------------------------------------------------------
# Both clients: requests and results as things: send, tag, pickles
# ---------------------------------------------------------------------------------------------------------------------

ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"env": {"A": "b", "C": "é"}, "cwd": "/x", "network": "none", "persist": True},
    {"env": ["A=b"], "limits": {"wall_clock_secs": 5}, "files": ["a", "b"]},
    {"limits": ResourceLimits(memory_mb=64), "input": "typed in"},
    {"outputs": ["a"], "files": {"x": b"y", "d/e": "f"}},
    {"input": b"\0", "outputs": True},
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=repr)
def test_what_send_sends_is_what_run_sends(client_of: Clients, arguments: dict[str, Any]) -> None:
    sent = []
    for method in ("run", "send"):
        with Host(Kept({"a": b"x"})) as host:
            client = client_of(host.url)
            if method == "run":
                result = client.run("image", ["prog", "arg"], **arguments)
            else:
                result = client.send(RunRequest("image", ["prog", "arg"], tag=object(), **arguments))
        random = r"boxer-[0-9a-f-]{8,}|BOUNDARY|boundary=[^\r\n]+|--[0-9a-zA-Z]{16,}|Host: [^\r]*"
        bodies = [  # the files of a removal are in the order in which their uploads came to an end
            repr({**request.json, "files": sorted(request.json.get("files", []))}) if "/run" in request.line
            else request.body.decode("latin-1") for request in host.seen
        ]  # fmt: skip
        requests = [request.head.decode() + body for request, body in zip(host.seen, bodies)]
        sent.append((sorted(re.sub(random, "<random>", request) for request in requests), result))
    assert sent[0] == sent[1]


def test_send_takes_a_request_alone(client_of: Clients) -> None:
    with Peer([]) as peer:
        for wrong in (None, "image", {"image": "i", "cmd": ["c"]}):
            with pytest.raises(TypeError):
                client_of(peer.url).send(wrong)


def test_send_takes_a_timeout_and_retries(client_of: Clients, clock: Clock) -> None:
    busy = answer("", "503 Service Unavailable")
    with Host(lambda _: [busy]) as host:
        got = outcome(client_of(host.url), ("send", (RunRequest("i", ["c"]),), {}), retries=1, timeout=30)
        assert is_expected(got, refusal(503)) and len(host.seen) == 2


def test_a_tag_takes_part_in_nothing(client_of: Clients) -> None:
    one, other = (RunRequest("i", ["c"], tag=tag) for tag in (["unhashable"], "s3cret"))
    assert one == other and hash(one) == hash(other) and "s3cret" not in repr(other)
    assert other.tag == "s3cret" and one != RunRequest("i", ["d"])
    with Peer.answering(RAN) as peer:
        assert client_of(peer.url).send(other) == RESULT
    assert b"s3cret" not in peer.request.head + peer.request.body


def test_requests_are_frozen_hashable_and_say_what_is_wrong_when_made() -> None:
    request = RunRequest("i", ["c"], files={"a": b""}, input="x", outputs=["a"], limits={"nofile": 5}, env={"A": "b"})
    assert hash(request) == hash(dataclasses.replace(request))
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.image = "other"  # type: ignore[misc]
    for wrong in (
        {"files": {"..": b""}},
        {"outputs": ["../x"]},
        {"input": "x", "env": {"a.b": "c"}},
        {"input": "\ud800"},
    ):
        with pytest.raises(BoxerValidationError):
            RunRequest("i", ["c"], **wrong)


def test_a_request_keeps_its_own_copy_of_what_it_was_given() -> None:
    files, outputs, cmd = {"a": b""}, ["a"], ["c"]
    request = RunRequest("i", cmd, files=files, outputs=outputs)
    files["b"], outputs[:], cmd[:] = b"", ["z"], ["z"]
    assert (list(request.files or ()), list(request.outputs), list(request.cmd)) == (["a"], ["a"], ["c"])  # type: ignore[arg-type]


def test_a_result_has_its_outputs_last_and_is_made_as_before() -> None:
    result = RunResult("boxer-1", 0, "", "", 7)
    assert (result.outputs, RunResult("boxer-1", 0, "", "", 7, {"a": b"x"}).outputs) == ({}, {"a": b"x"})
    assert [field.name for field in dataclasses.fields(RunResult)][-1] == "outputs"
    assert result.outputs is not RunResult("boxer-1", 0, "", "", 7).outputs
    assert result.output_path("/output/a/b") == result.output_path("a/b") == "output/boxer-1/a/b"


def test_requests_results_and_errors_pickle_small() -> None:
    result = RunResult("boxer-1", 3, "", "", 7, {"a": b"x"})
    request = RunRequest("i", ["c"], files={"a": b"b", "p": Path("p")}, input="x", outputs=True, tag={"n": 1})
    error = BoxerAPIError("no", 404)
    error.result = result
    for thing in (result, request, error, BoxerExitError(result)):
        for copied in (pickle.loads(pickle.dumps(thing)), copy.copy(thing), copy.deepcopy(thing)):
            assert type(copied) is type(thing) and vars(copied) == vars(thing) and str(copied) == str(thing)
        assert len(pickle.dumps(thing)) < 700
    assert pickle.loads(pickle.dumps(request)).tag == {"n": 1}


def test_copies_of_a_client_in_one_process_share_its_connections_and_need_no_closing(client_of: Clients) -> None:
    with Host(lambda _: [RAN]) as host:
        client = client_of(host.url)
        real = client.client if isinstance(client, PlainCalls) else client
        assert client.run("i", ["c"]) == RESULT
        for _ in range(5):
            method = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(real.send))))
            assert len(pickle.dumps(real.send)) < 700
            sent = method(RunRequest("i", ["c"]))
            assert (client.loop.run_until_complete(sent) if isinstance(client, PlainCalls) else sent) == RESULT
            del method, sent
            gc.collect()  # a ResourceWarning would be an error
        assert client.run("i", ["c"]) == RESULT
        client_of.take(pickle.loads(pickle.dumps(real)))  # which closes the connection of them all
    assert host.connections <= 2  # one of the client's own, perhaps


def test_a_copy_of_a_client_that_was_closed_is_closed(client_of: Clients) -> None:
    with Host(lambda _: [WELL]) as host:
        client = client_of(host.url)
        real = client.client if isinstance(client, PlainCalls) else client
        copied = client_of.take(pickle.loads(pickle.dumps(real)))
        assert copied.health()
        client.close()
        with pytest.raises(RuntimeError, match="closed"):
            copied.health()


def test_few_clients_that_came_as_pickles_are_kept(client_of: Clients) -> None:
    def ask(pickled: bytes) -> bool:
        """Use a client without closing it, as a worker does."""
        client = pickle.loads(pickled)
        asked = client.health()
        return bool(asked) if client_of.kind == "sync" else client_of.loop.run_until_complete(asked)

    with Host(lambda _: [WELL]) as host:
        pickles = []
        for _ in range(20):
            client = client_of.cls(host.url)
            pickles.append(pickle.dumps(client))
            client_of.take(client).close()
        del client
        gc.collect()
        assert all(ask(pickled) for pickled in [*pickles, *pickles[-8:]])
        gc.collect()
        assert host.connections == 20
        for pickled in pickles[-8:]:
            client_of.take(pickle.loads(pickled)).close()  # a copy that is closed closes what is idle


PROCESSES = """
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from boxer import BoxerClient, RunRequest

if __name__ == "__main__":
    requests = [RunRequest("image", ["echo", str(number)], tag=number) for number in range(40)]
    with BoxerClient(sys.argv[1]) as client, ProcessPoolExecutor(2, mp_context=get_context("spawn")) as executor:
        print(sum(int(result.stdout) for result in executor.map(client.send, requests)))
"""


def test_a_pool_of_processes_can_send_requests(tmp_path: Path) -> None:
    with Host(Echo()) as host:
        assert program_beside_boxer(tmp_path, PROCESSES, host.url) == f"{sum(range(40))}\n"
    assert host.connections <= 2 + 1  # each process keeps its connection


# ---------------------------------------------------------------------------------------------------------------------
# Sync client: urllib's handlers, and the threads of a folder's upload
# ---------------------------------------------------------------------------------------------------------------------


def md5(*parts: str) -> str:
    return hashlib.md5(":".join(parts).encode()).hexdigest()  # as RFC 7616 has it


def challenge(request: Received) -> list[bytes]:
    """Answer a request that shows by a digest that it knows the password, and challenge any other."""
    told = dict(re.findall(r'(\w+)="?([^",]*)', request.fields.get("authorization", "")))
    if told:
        method, target, _ = request.line.split(" ")
        ours = (told["nonce"], told["nc"], told["cnonce"], "auth", md5(method, target))
        if told["response"] == md5(md5("joe", "boxer", "secret"), *ours):
            return [RAN if target == "/run" else answer("abc") if method == "GET" else STORED]
    fields = {"WWW_Authenticate": 'Digest realm="boxer", nonce="n0", qop="auth", algorithm=MD5'}
    return [failing("401 Unauthorized", "who are you?", **fields)]


def digest(url: str, password: str = "secret") -> urllib.request.BaseHandler:
    passwords = urllib.request.HTTPPasswordMgrWithDefaultRealm()
    passwords.add_password(None, url, "joe", password)
    return urllib.request.HTTPDigestAuthHandler(passwords)


def test_a_handler_answers_a_challenge() -> None:
    with Host(challenge) as host, BoxerClient(host.url, handlers=[digest(host.url)]) as client:
        assert client.run("image", ["true"]) == RESULT
        assert client.download_file("a.txt") == b"abc"
        client.upload_file("a.txt", b"content")
        client.upload_file("b.txt", io.BytesIO(b"content"))
        assert [b"content" in request.body for request in host.seen if "/files HTTP" in request.line] == [True] * 4
    assert host.connections == 1


@pytest.mark.parametrize(
    "value", ["Foo x", "Digest", "Digest realm", "Digest realm=", 'Digest realm="r", nonce="n", algorithm=FOO']
)
def test_a_challenge_that_cannot_be_read_is_an_error(value: str) -> None:
    said = answer("who are you?", "401 Unauthorized", WWW_Authenticate=value)
    with Host(lambda _: [said]) as host, BoxerClient(host.url, handlers=[digest(host.url)]) as client:
        assert is_expected(outcome(client, RUN_IT), refusal(401, "who are you?"))


@pytest.mark.parametrize("wrong", [False, True])
def test_a_challenge_that_is_not_answered_is_an_error(wrong: bool) -> None:
    with Host(challenge) as host, BoxerClient(host.url, handlers=[digest(host.url, "no")] if wrong else []) as client:
        for _ in range(2):
            got = outcome(client, RUN_IT)
            assert type(got) is BoxerAPIError and got.status_code == 401


def test_content_that_cannot_be_rewound_is_not_sent_again_after_a_challenge() -> None:
    with Host(challenge) as host, BoxerClient(host.url, handlers=[digest(host.url)]) as client:
        got = outcome(client, upload(Unseekable(b"content")))
        assert isinstance(got, BoxerError)
    assert [b"content" in request.content for request in host.seen] == [True]


def test_a_request_was_sent_even_if_a_handler_could_not_send_another() -> None:
    said = challenge(Received(b"", b""))[0].replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
    with vanishing(said) as url, BoxerClient(url, handlers=[digest(url)]) as client:
        error = outcome(client, run("true", retries=0))
    assert is_expected(error, lost("no connection could be made")) and error.request_sent


@pytest.mark.parametrize("handlers", [[], [urllib.request.HTTPCookieProcessor]], ids=["without", "with"])
def test_cookies_are_kept_by_a_handler_alone(client_of: Clients, handlers: list[Any]) -> None:
    with Host(lambda _: [answer({"ok": True}, Set_Cookie="a=b")]) as host:
        settings = {"handlers": [kind() for kind in handlers]} if handlers and client_of.kind == "sync" else {}
        client = client_of(host.url, **settings)
        assert client.health() and client.health()
    cookies = [request.fields.get("cookie") for request in host.seen]
    assert cookies == [None, "a=b" if settings else None]


class Raising(urllib.request.BaseHandler):
    handler_order = 1  # before the one that sends

    def __init__(self, error: Callable[[str], Exception]) -> None:
        self.error = error

    def http_open(self, request: urllib.request.Request) -> Any:
        raise self.error(request.full_url)


class Torn(io.BytesIO):
    def read(self, size: int | None = -1) -> bytes:
        raise OSError("torn")


def teapot(content: bytes | None) -> Callable[[str], Exception]:
    body = None if content is None else io.BytesIO(content)
    return lambda url: urllib.error.HTTPError(url, 418, "Teapot", email.message.Message(), body)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (lambda _: urllib.error.URLError("out of reach"), lost("out of reach")),
        (teapot(b"short and stout"), refusal(418, "418 Teapot: short and stout")),
        (teapot(b'{"error": "no tea"}'), refusal(418, "no tea")),
        (teapot(b""), refusal(418, "418 Teapot")),
        (teapot(None), refusal(418, "418 Teapot")),
        (lambda url: urllib.error.HTTPError(url, 418, "Teapot", email.message.Message(), Torn()), lost("torn")),
    ],
)
def test_what_a_handler_raises_is_one_of_our_errors(error: Any, expected: Any) -> None:
    with BoxerClient("http://127.0.0.1:9", handlers=[Raising(error)], retries=0) as client:
        got = outcome(client, RUN_IT)
        assert is_expected(got, expected), got


class Adding(urllib.request.BaseHandler):
    """A user's handler that adds a field to each request."""

    def __init__(self, value: str) -> None:
        self.value = value

    def http_request(self, request: urllib.request.Request) -> urllib.request.Request:
        request.add_unredirected_header("X-Added", self.value)
        return request


def test_an_error_that_no_handler_wants_is_an_error() -> None:
    said = failing("404 Not Found")
    with Peer.answering(said) as peer, BoxerClient(peer.url, handlers=[Adding("yes")]) as client:
        assert is_expected(outcome(client, DOWNLOAD), refusal(404, "no"))


def test_a_handler_may_add_a_field_but_not_a_line() -> None:
    with Peer.answering(WELL) as peer, BoxerClient(peer.url, handlers=[Adding("yes")]) as client:
        assert client.health()
        assert peer.request.fields["x-added"] == "yes"
    wrong = Adding("yes\r\nX-Other: no")
    with Peer([]) as peer, BoxerClient(peer.url, handlers=[wrong]) as client, pytest.raises(BoxerValidationError):
        client.health()


def test_a_handler_may_not_change_the_scheme(ca: trustme.CA) -> None:
    class Changing(urllib.request.BaseHandler):
        def http_request(self, request: urllib.request.Request) -> urllib.request.Request:
            request.type = "https" if request.type == "http" else "http"
            return request

        https_request = http_request

    for scheme in ("http", "https"):
        client = BoxerClient(refused_url().replace("http", scheme), handlers=[Changing()])
        with contextlib.closing(client), pytest.raises(BoxerValidationError, match="scheme"):
            client.health()


class Rewriting(urllib.request.BaseHandler):
    """A user's handler that sends other content than was asked for."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def http_request(self, request: urllib.request.Request) -> urllib.request.Request:
        request.data = self.content
        return request


@pytest.mark.parametrize("size", [0, 10, 100_000])
def test_a_handler_may_change_the_content(size: int) -> None:
    rewriting = Rewriting(b"a" * size)
    with Peer.answering(RAN, STORED) as peer, BoxerClient(peer.url, handlers=[rewriting]) as client:
        assert client.run("image", ["true"]) == RESULT
        client.upload_file("a.txt", io.BytesIO(bytes(200_000)))
    assert [request.content for request in peer.requests[0]] == 2 * [rewriting.content]


def test_a_handler_may_send_no_request_of_its_own() -> None:
    class Asking(urllib.request.BaseHandler):
        def http_request(self, request: urllib.request.Request) -> urllib.request.Request:
            director: Any = self.parent
            if request.selector != "/token":
                director.open(f"{request.type}://{request.host}/token")
            return request

    client = BoxerClient(refused_url(), handlers=[Asking()])
    with contextlib.closing(client), pytest.raises(TypeError, match="one of its own"):
        client.health()


class Elsewhere(urllib.request.BaseHandler):
    """Sends each request to another server, as if it were a proxy of its own."""

    def __init__(self, *authorities: str) -> None:
        self.authorities = iter(authorities)

    def http_request(self, request: urllib.request.Request) -> urllib.request.Request:
        request.host = next(self.authorities)
        return request


def test_idle_connections_to_several_servers_are_no_more_than_there_may_be() -> None:
    is_closed = threading.Event()
    first = Peer([[Do.REQUEST, WELL, Do.DRAIN, lambda _: is_closed.set()]])
    with first, Peer.answering(WELL, WELL, WELL) as second:
        elsewhere = Elsewhere(first.authority, *[second.authority] * 3)
        with BoxerClient(first.url, handlers=[elsewhere], max_connections=1) as client:
            assert client.health() and client.health()
            assert is_closed.wait(30)
            assert client.health() and client.health()
    assert second.connections == 1


def test_a_handler_that_is_none_is_refused() -> None:
    with pytest.raises(TypeError, match=r"urllib\.request\.BaseHandler"):
        BoxerClient(handlers=[object()])  # type: ignore[list-item]


def test_a_handler_that_follows_redirects_is_refused() -> None:
    with pytest.raises(BoxerValidationError, match="redirects are not followed"):
        BoxerClient(handlers=[urllib.request.HTTPRedirectHandler()])


def test_an_interrupt_of_a_folder_does_not_wait_for_pauses(
    many: Path, is_pausing: threading.Event, interrupts: Interrupts
) -> None:
    def interrupt() -> None:
        is_pausing.wait(30)
        if not interrupts(is_over):
            faults.append("it waits")
            client.close()

    is_over, faults = threading.Event(), list[str]()
    with Frail(lambda _: [failing("429 Slow Down", Retry_After="60")]) as host, BoxerClient(host.url) as client:
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            client.upload_path(many)
        is_over.set()
        thread.join()
    assert not faults


def test_a_folder_whose_threads_cannot_be_had_is_an_error_and_leaves_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start
    started: list[threading.Thread] = []

    def start_one(thread: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    with Frail(lambda _: [STORED]) as host, BoxerClient(host.url) as client:
        client.upload_path(folder / "a.txt")
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start_one)
            with pytest.raises(RuntimeError, match="can't start"):
                client.upload_path(folder)
        assert not started[0].is_alive()


# Every request goes through a urllib opener


@pytest.mark.parametrize("handlers", [[], ["yes"]], ids=["no handlers", "a handler"])
def test_every_request_of_the_blocking_client_goes_through_an_opener(
    monkeypatch: pytest.MonkeyPatch, folder: Path, handlers: list[str]
) -> None:
    open_, opened = urllib.request.OpenerDirector.open, list[str]()

    def open_and_tell(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        opened.append(f"{request.get_method()} {request.full_url}")
        return open_(self, request, *args, **kwargs)

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", open_and_tell)
    contents = {"POST /run": RAN, "POST /files": STORED}
    with Host(lambda request: [contents.get(request.line.rpartition(" ")[0], WELL)]) as host:
        with BoxerClient(host.url, handlers=[Adding(value) for value in handlers]) as client:
            for call in (GET_HEALTH, RUN_IT, PUT_FILE, upload(io.BytesIO(b"content")), DOWNLOAD):
                do(client, call)
            client.upload_path(folder)
        sent = [request.line.rpartition(" ")[0].replace(" ", f" {host.url}") for request in host.seen]
    assert sorted(opened) == sorted(sent) and len(sent) > 5


def test_what_instruments_urllib_changes_nothing(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """OpenTelemetry and its like wrap every opener, and ask for what urllib's requests and responses have."""
    open_, spans = urllib.request.OpenerDirector.open, list[Any]()

    def open_and_trace(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        size = 0 if request.data is None else len(request.data)
        response = open_(self, request, *args, **kwargs)
        spans.append((size, response.getcode(), response.headers["Content-Length"]))
        return response

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", open_and_trace)
    with Peer.answering(RAN, STORED, STORED, WELL) as peer, BoxerClient(peer.url) as client:
        assert client.run("image", ["true"]) == RESULT
        for content in (bytes(MIB), Unseekable(b"content")):
            do(client, upload(content))
        assert client.health()
    bodies = [len(request.body) for request in peer.requests[0]]
    assert [size for size, _, _ in spans] == [*bodies[:2], 0, 0]
    assert {(code, length.isdecimal()) for _, code, length in spans} == {(200, True)}
    url = refused_url()
    with BoxerClient(url) as client:
        assert is_expected(outcome(client, RUN_IT), lost(f"(POST {url}/run)"))
    assert len(clock.pauses) == 2  # before two more tries


def addinfourl(content: bytes, code: int = 200, **fields: str) -> urllib.response.addinfourl:
    headers = email.message.Message()
    for name, value in fields.items():
        headers[name.replace("_", "-")] = value
    return urllib.response.addinfourl(io.BytesIO(content), headers, "http://boxer.test", code)


def http_error(content: bytes, code: int) -> urllib.error.HTTPError:
    headers = email.message.Message()
    return urllib.error.HTTPError("http://boxer.test", code, "as urllib has it", headers, io.BytesIO(content))


class Fake(urllib.request.BaseHandler):
    """A user's handler that answers in place of the network; its place among the others is urllib's default."""

    def __init__(self, respond: Callable[[str], Any]) -> None:
        self.respond = respond

    def http_open(self, request: urllib.request.Request) -> Any:
        return self.respond(f"{request.get_method()} {request.selector}")

    https_open = http_open


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_handler_can_stand_in_for_the_server(scheme: str) -> None:
    contents = {"GET /healthz": WELL, "POST /run": RAN, "POST /files": STORED, "GET /files?path=a.txt": answer("abc")}

    def respond(asked: str) -> urllib.response.addinfourl:
        return addinfourl(contents[asked].partition(b"\r\n\r\n")[2], Content_Type="application/json")

    with Peer([]) as peer, BoxerClient(f"{scheme}://{peer.authority}", handlers=[Fake(respond)]) as client:
        assert client.health()
        assert client.run("image", ["true"]) == RESULT
        client.upload_file("a.txt", b"content")
        client.upload_file("a.txt", io.BytesIO(b"content"))
        assert client.download_file("a.txt") == b"abc"


@pytest.mark.parametrize("make", [addinfourl, http_error])
def test_an_error_that_a_handler_answers_with_is_one_of_the_server_s(make: Callable[[bytes, int], Any]) -> None:
    with Peer([]) as peer, BoxerClient(peer.url, handlers=[Fake(lambda _: make(b'{"error": "no"}', 404))]) as client:
        assert is_expected(outcome(client, DOWNLOAD), refusal(404, "no"))
        assert is_expected(outcome(client, RUN_IT), refusal(404, "no"))
        assert not client.health()


def test_what_a_handler_answers_with_decides_about_another_try(clock: Clock) -> None:
    kinds: list[Any] = [addinfourl, http_error]
    with Peer([]) as peer, BoxerClient(peer.url, handlers=[Fake(lambda _: kinds.pop()(b"wait", 503))]) as client:
        assert is_expected(outcome(client, RUN_IT, retries=1), refusal(503, "wait"))
    assert not kinds and len(clock.pauses) == 1


def test_an_answer_that_another_handler_of_urllib_s_finds_cut_short_is_a_connection_error() -> None:
    said = answer(b"content", Content_Length="100")
    with Host(lambda _: [said, Do.FIN]) as host:
        client = BoxerClient(host.url, handlers=[urllib.request.HTTPHandler()], retries=0)
        with client:
            assert is_expected(outcome(client, DOWNLOAD), lost("IncompleteRead"))


class Breaking(urllib.request.BaseHandler):
    """A user's handler that raises an error of its own."""

    def __init__(self, where: str, error: BaseException) -> None:
        setattr(self, where, self.fail)
        self.error = error
        self.is_broken = True

    def fail(self, first: Any, *others: Any) -> Any:
        if not self.is_broken:
            return others[-1] if others else first
        raise self.error


@pytest.mark.parametrize("where", ["http_request", "http_open", "http_response", "http_error_404"])
@pytest.mark.parametrize("kind", [OSError, FileNotFoundError, TimeoutError, KeyError, IndexError, ValueError])
def test_what_a_handler_raises_leaves_as_it_is(where: str, kind: type[Exception]) -> None:
    error = kind("the handler's own")
    said = failing("404 Not Found")
    with Host(lambda _: [said]) as host, BoxerClient(host.url, handlers=[Breaking(where, error)]) as client:
        with pytest.raises(kind) as caught:
            client.download_file("a.txt")
        assert caught.value is error
    assert len(host.seen) == (where in ("http_response", "http_error_404"))


@pytest.mark.parametrize("where", ["http_request", "http_open", "http_response", "http_error_404"])
def test_an_error_of_urllib_s_from_a_handler_is_a_connection_error(where: str) -> None:
    handler = Breaking(where, urllib.error.URLError("out of reach"))
    said = failing("404 Not Found")
    with Host(lambda _: [said]) as host, BoxerClient(host.url, handlers=[handler], retries=0) as client:
        assert is_expected(outcome(client, DOWNLOAD), lost("out of reach"))


# What a signal handler of the program does


class Ringing:
    """A SIGALRM whose handler does something in the main thread: once, at some time after `start`.

    The signal comes again and again until the handler has run: one that falls just before a wait begins is seen by
    Python when the wait ends.
    """

    def __init__(self) -> None:
        self.has_rung = threading.Event()
        self.action: Callable[[], Any] = self.fail
        self.error: BaseException = TimeoutError("the program's own alarm")

    def fail(self) -> None:
        raise self.error

    def start(self, _: Any = None, seconds: float = 0.05) -> None:
        signal.setitimer(signal.ITIMER_REAL, seconds, 0.01)

    def ring(self, *_: Any) -> None:
        if not self.has_rung.is_set():
            self.has_rung.set()
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.action()


@pytest.fixture
def ringing() -> Iterator[Ringing]:
    if not hasattr(signal, "setitimer"):
        pytest.skip("this system has no alarm")
    ringing = Ringing()
    before = signal.signal(signal.SIGALRM, ringing.ring)
    yield ringing
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def connect_in_vain() -> None:
    """Fail as a program's handler may that itself uses the network: the error comes from within `socket`."""
    socket.create_connection(("127.0.0.1", 9), timeout=30).close()


@contextlib.contextmanager
def raises_the_alarm(ringing: Ringing, kind: str) -> Iterator[None]:
    """Expect what the handler of a SIGALRM raises to come out as it is."""
    if kind == "socket":
        ringing.action = connect_in_vain
        with pytest.raises(ConnectionRefusedError) as caught:
            yield
        assert type(caught.value) is ConnectionRefusedError
    else:
        ringing.error = KeyboardInterrupt() if kind == "interrupt" else TimeoutError("the program's own alarm")
        with pytest.raises(type(ringing.error)) as raised:
            yield
        assert raised.value is ringing.error


# What a handler raises: an error of the system's, such an error out of the library's own code, and no error at all.
ALARMS = pytest.mark.parametrize("kind", ["timeout", "socket", "interrupt"])


@ALARMS
def test_what_a_signal_handler_raises_leaves_a_connect_as_it_is(
    ringing: Ringing, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    look_up, looked_up = socket.getaddrinfo, list[Any]()

    def getaddrinfo(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        looked_up.append(port)
        return look_up(host, silent if len(looked_up) == 1 else port, *args, **kwargs)

    with never_accepting() as listener, Peer.answering(WELL) as peer, BoxerClient(peer.url) as client:
        silent = listener.getsockname()[1]
        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        with raises_the_alarm(ringing, kind):
            ringing.start()
            client.run("image", ["true"])
        assert looked_up.count(peer.port) == 1  # no other try; the handler may have looked up something of its own
        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        assert client.health()


@ALARMS
def test_what_a_signal_handler_raises_leaves_a_look_up_as_it_is(
    ringing: Ringing, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    look_up = socket.getaddrinfo

    def getaddrinfo(*args: Any, **kwargs: Any) -> Any:
        if not ringing.has_rung.is_set() and args[:1] != ("127.0.0.1",):
            ringing.start()
            assert ringing.has_rung.wait(30)
        return look_up("127.0.0.1", *args[1:], **kwargs)

    with Peer.answering(WELL) as peer, BoxerClient(f"http://boxer.test:{peer.port}", max_connections=1) as client:
        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        with raises_the_alarm(ringing, kind):
            client.run("image", ["true"])
        assert client.health()


@ALARMS
@pytest.mark.parametrize("is_kept", [False, True], ids=["fresh", "kept"])
def test_what_a_signal_handler_raises_leaves_the_wait_for_an_answer_as_it_is(
    ringing: Ringing, is_kept: bool, kind: str
) -> None:
    first: list[Any] = [Do.REQUEST, WELL] if is_kept else []
    script = [[*first, Do.REQUEST, ringing.start, Do.GONE], [Do.REQUEST, WELL]]
    with Peer(script) as peer, BoxerClient(peer.url, max_connections=1) as client:
        assert not is_kept or client.health()
        with raises_the_alarm(ringing, kind):
            client.download_file("a.txt")  # which would be sent again after a lost connection
        assert client.health()


@pytest.mark.parametrize("is_kept", [False, True], ids=["fresh", "kept"])
@pytest.mark.parametrize("call", [RUN_IT, GET_HEALTH, DOWNLOAD, ("wait_until_ready", (), {})], ids=str)
def test_what_another_client_raises_in_a_signal_handler_is_not_taken_for_the_call_s_own(
    ringing: Ringing, call: Call, is_kept: bool
) -> None:
    first: list[Any] = [Do.REQUEST, WELL] if is_kept else []
    script = [[*first, Do.REQUEST, ringing.start, Do.GONE], [Do.REQUEST, WELL]]
    elsewhere = refused_url()
    with Peer(script) as peer, BoxerClient(peer.url) as client, BoxerClient(elsewhere, retries=0) as other:
        ringing.action = lambda: other.run("image", ["true"])
        assert not is_kept or client.health()
        with pytest.raises(BoxerConnectionError) as caught:
            do(client, call)
        assert elsewhere.partition("//")[2] in str(caught.value) and peer.authority not in str(caught.value)
        assert not caught.value.request_sent
        assert client.health() and peer.connections == 2


def test_what_another_client_raises_in_a_signal_handler_is_raised_while_a_run_s_files_are_removed(
    ringing: Ringing,
) -> None:
    def respond(request: Received) -> list[Any]:
        is_removal = "/run" in request.line and request.json["cmd"] == ["true"]
        return [ringing.start] if is_removal else [answer({**RUN, "path": "stored"})]

    elsewhere = refused_url()
    with Frail(respond) as host, BoxerClient(host.url) as client, BoxerClient(elsewhere, retries=0) as other:
        ringing.action = lambda: other.run("image", ["true"])
        with pytest.raises(BoxerConnectionError, match=re.escape(elsewhere.partition("//")[2])):
            client.run("image", ["date"], files={"a": b""}, outputs=["b"])


@ALARMS
@pytest.mark.parametrize(("names", "when"), [("ab", "/run"), ("ab", "/files"), ("a", "/files")])
def test_what_a_signal_handler_raises_cancels_a_run_with_files(
    ringing: Ringing, kind: str, names: str, when: str
) -> None:
    is_over = threading.Event()

    def respond(request: Received) -> list[Any]:
        return [ringing.start, lambda: is_over.wait(30)] if when in request.line else [STORED]

    with Frail(respond) as host, BoxerClient(host.url) as client:
        with raises_the_alarm(ringing, kind):
            client.run("image", ["prog"], files=dict.fromkeys(names, b""))
        is_over.set()
    assert [run["cmd"] for run in runs_of(host)] == [["prog"]] * (when == "/run")


@pytest.mark.parametrize("error", [BoxerConnectionError("mine", request_sent=False), BoxerAPIError("mine", 503)])
def test_an_error_of_this_module_that_a_file_raises_is_the_file_s(client_of: Clients, error: BoxerError) -> None:
    class Odd(io.BytesIO):
        count = 0

        def read(self, size: int | None = -1) -> bytes:
            if size:
                self.count += 1
                raise error
            return b""

    file = Odd(b"content")
    with Frail(lambda _: [STORED]) as host, pytest.raises(type(error)) as caught:
        client_of(host.url).upload_file("a.txt", file)
    assert caught.value is error and str(error) == "mine" and file.count == 1
    assert getattr(error, "request_sent", False) is False


@ALARMS
def test_what_a_signal_handler_raises_leaves_a_pause_as_it_is(
    ringing: Ringing, is_pausing: threading.Event, kind: str
) -> None:
    def start() -> None:
        is_pausing.wait(30)
        ringing.start()

    starting = threading.Thread(target=start)
    with Peer.answering(failing("429 Slow Down", Retry_After="60"), WELL) as peer, BoxerClient(peer.url) as client:
        starting.start()
        with raises_the_alarm(ringing, kind):
            client.run("image", ["true"])
        starting.join()
        assert client.health()


@ALARMS
@pytest.mark.parametrize("is_tls", [False, True], ids=["plain", "TLS"])
def test_what_a_signal_handler_raises_leaves_an_upload_as_it_is(
    ringing: Ringing, ca: trustme.CA, is_tls: bool, kind: str
) -> None:
    rest = list[bytes]()

    def take_the_rest(sock: Any) -> None:
        assert ringing.has_rung.wait(30)
        all_of_it(sock, rest)

    script: list[list[Any]] = [[Do.HEAD, ringing.start, take_the_rest, Do.FIN], [Do.REQUEST, WELL]]
    with Peer(script, context=serving(ca) if is_tls else None) as peer:
        client = BoxerClient(peer.url, ssl_context=trusting(ca) if is_tls else None, max_connections=1)
        with client:
            with raises_the_alarm(ringing, kind):
                do(client, LARGE)
            assert client.health()
    assert sum(map(len, rest)) < 64 * MIB


@ALARMS
def test_what_a_signal_handler_raises_leaves_a_handshake_as_it_is(ringing: Ringing, ca: trustme.CA, kind: str) -> None:
    silent: list[Any] = [lambda sock: sock.recv(1), ringing.start, Do.DRAIN]
    with Peer([silent, [cut_off(serving(ca), WELL, "FIN"), Do.FIN]]) as peer:
        client = BoxerClient(f"https://{peer.authority}", ssl_context=trusting(ca), max_connections=1)
        with client:
            with raises_the_alarm(ringing, kind):
                client.run("image", ["true"])
            assert client.health()


@ALARMS
def test_what_a_signal_handler_raises_leaves_the_wait_for_a_connection_as_it_is(ringing: Ringing, kind: str) -> None:
    has_come, is_over = threading.Event(), threading.Event()
    first: list[Any] = [Do.REQUEST, lambda _: has_come.set(), lambda _: is_over.wait(30), RAN]
    script = [[*first, Do.REQUEST, WELL]]
    with Peer(script) as peer, BoxerClient(peer.url, max_connections=1) as client, ThreadPoolExecutor(1) as executor:
        one = executor.submit(do, client, RUN_IT)
        assert has_come.wait(30)
        with raises_the_alarm(ringing, kind):
            ringing.start()
            do(client, RUN_IT)
        is_over.set()
        assert one.result() == RESULT
        assert client.health()


def test_a_signal_handler_may_use_the_client_that_it_interrupts() -> None:
    if not hasattr(signal, "setitimer"):
        pytest.skip("this system has no alarm")
    got: dict[str, str] = {}
    is_within = False

    def run_within(*_: object) -> None:
        nonlocal is_within
        if not is_within:
            is_within = True
            run_it(f"within {len(got)}")
            is_within = False

    def echo(request: Received) -> list[bytes]:
        return [answer({**RUN, "stdout": request.json["cmd"][0]})]

    def run_it(name: str) -> None:
        got[name] = client.run("image", [name]).stdout

    with Host(echo) as host, BoxerClient(host.url, max_connections=2) as client:
        before = signal.signal(signal.SIGALRM, run_within)
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        try:
            while sum(name.startswith("within") for name in list(got)) < 100:
                run_it(f"outside {len(got)}")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    assert all(name == stdout for name, stdout in got.items())
    assert len(host.seen) == len(got)


def test_a_call_within_a_call_that_has_the_only_connection_fails_at_once(ringing: Ringing) -> None:
    got: list[Any] = []
    ringing.action = lambda: got.append(outcome(client, GET_HEALTH, timeout=20, retries=5))

    def wait(_: Any) -> None:
        settles(lambda: bool(got))

    script: list[list[Any]] = [[Do.REQUEST, ringing.start, wait, RAN, Do.REQUEST, WELL]]
    with Peer(script) as peer, BoxerClient(peer.url, max_connections=1) as client:
        assert client.run("image", ["true"]) == RESULT
        assert is_expected(got[0], lost("connection")) and "thread" in str(got[0]) and not got[0].request_sent
        assert client.health()


@pytest.mark.parametrize("max_connections", [1, 2])
def test_a_call_within_a_call_of_the_same_thread_has_what_connections_there_are(
    ringing: Ringing, max_connections: int
) -> None:
    got: list[Any] = []
    ringing.action = lambda: got.append(outcome(client, GET_HEALTH, timeout=20))

    def respond(request: Received) -> list[Any]:
        return [WELL] if "/healthz" in request.line else [ringing.start, lambda: settles(lambda: bool(got)), RAN]

    with Host(respond) as host, BoxerClient(host.url, max_connections=max_connections) as client:
        assert client.run("image", ["true"]) == RESULT
        assert got[0] is True if max_connections == 2 else is_expected(got[0], lost("connection"))
        assert client.health()


def test_a_call_within_a_call_waits_for_others_no_longer_than_its_deadline(ringing: Ringing) -> None:
    """One connection is the outer call's, which cannot go on, and the other one is in use for as long as it takes."""
    waiting, is_over = threading.Semaphore(0), threading.Event()
    inner: list[Any] = []

    def respond(request: Received) -> list[Any]:
        if request.json["cmd"] == ["outer"]:
            return [ringing.start, lambda: ringing.has_rung.wait(30), RAN]
        return [waiting.release, lambda: is_over.wait(30), RAN]

    with Host(respond) as host, BoxerClient(host.url, max_connections=2) as client, ThreadPoolExecutor(1) as executor:
        ringing.action = lambda: inner.append(outcome(client, run("inner"), timeout=0.2))
        other = executor.submit(do, client, run("other"))
        assert waiting.acquire(timeout=30)
        assert do(client, run("outer")) == RESULT
        is_over.set()
        assert other.result() == RESULT
    assert is_expected(inner[0], (BoxerTimeoutError, 0, "0.2 s")), inner


@contextlib.contextmanager
def after(name: str, react: Callable[[], None]) -> Iterator[None]:
    """Do something in this thread right after a built-in function has returned, as a signal handler would; once."""

    def look(_: Any, event: str, function: Any) -> None:
        if event == "c_return" and function.__name__ == name:
            sys.setprofile(None)
            react()

    sys.setprofile(look)
    try:
        yield
    finally:
        sys.setprofile(None)


THEIR_ERRORS: list[Exception] = [
    TimeoutError("the alarm"),
    BlockingIOError("of a pipe"),
    BoxerConnectionError("of another client"),
]


@pytest.mark.parametrize("error", THEIR_ERRORS, ids=repr)
@pytest.mark.parametrize("name", ["send", "recv", "connect_ex", "setsockopt", "shutdown"])
def test_what_a_signal_handler_raises_right_after_a_system_call_leaves_as_it_is(name: str, error: Exception) -> None:
    def ring() -> None:
        raise error

    with Host(lambda _: [WELL_AND_BYE]) as host, BoxerClient(host.url, max_connections=1, retries=0) as client:
        with pytest.raises(type(error), match=re.escape(str(error))) as raised, after(name, ring):
            client.download_file("a.txt")
        assert raised.value is error
        assert client.health()
        assert [request.line for request in host.seen].count("GET /files?path=a.txt HTTP/1.1") <= 1


def test_a_client_that_is_closed_as_tls_begins_ends_its_call(ca: trustme.CA) -> None:
    with Peer([[Do.DRAIN]]) as peer:
        client = BoxerClient(f"https://{peer.authority}", ssl_context=trusting(ca))
        with after("detach", client.close):  # ssl has taken the plain socket away
            got = outcome(client, RUN_IT)
    assert is_expected(got, lost("the client was closed")), got


class Asking(io.BytesIO):
    """A file whose reader makes a call."""

    def __init__(self, content: bytes, ask: Callable[[], Any]) -> None:
        super().__init__(content)
        self.ask = ask

    def read(self, size: int | None = -1) -> bytes:
        if size != 0 and self.tell() == 0:
            self.ask()
        return super().read(size)


@pytest.mark.parametrize("max_connections", [1, 2])
@pytest.mark.parametrize("is_seekable", [True, False])
def test_a_file_s_read_may_use_the_client_that_uploads_it(max_connections: int, is_seekable: bool) -> None:
    got: list[Any] = []
    with Host(lambda request: [WELL if "/healthz" in request.line else STORED]) as host:
        with BoxerClient(host.url, max_connections=max_connections) as client:
            asking = Asking(b"content", lambda: got.append(outcome(client, GET_HEALTH, timeout=20)))
            content: Any = asking if is_seekable else OnlyReads(asking.read)
            client.upload_file("a.txt", content)
            assert got[0] is True if max_connections == 2 else is_expected(got[0], lost("connection"))
            assert client.health()
        sent = [request for request in host.seen if "/files" in request.line]
    assert len(got) == 1 and [b"content" in request.content for request in sent] == [True]


# The context and the threads of uploads

TRACE: contextvars.ContextVar[str] = contextvars.ContextVar("TRACE", default="none")


class Tracing(urllib.request.BaseHandler):
    """Marks requests as tracing does, and notes in which threads they are made."""

    def __init__(self, threads: set[int]) -> None:
        self.threads = threads

    def http_request(self, request: urllib.request.Request) -> urllib.request.Request:
        self.threads.add(threading.get_ident())
        request.add_unredirected_header("X-Trace", TRACE.get())
        TRACE.set("of a thread")
        return request


def test_a_folder_is_sent_in_the_context_of_its_caller(many: Path) -> None:
    threads: set[int] = set()
    with Host(lambda _: [STORED]) as host, BoxerClient(host.url, handlers=[Tracing(threads)]) as client:
        for name in ("one", "two"):
            context = contextvars.copy_context()
            context.run(TRACE.set, name)
            assert len(context.run(client.upload_path, many)) == 40
            assert context[TRACE] == name
    traces = [request.fields["x-trace"] for request in host.seen]
    # Each thread has a context of its own, a copy of the caller's.
    assert {"one", "two"} <= set(traces) <= {"one", "two", "of a thread"} and len(threads) > 1


@pytest.mark.parametrize("what", ["a file", "a folder with one file"])
def test_a_single_file_is_sent_without_a_thread(tmp_path: Path, what: str) -> None:
    (tmp_path / "a.txt").write_bytes(b"content")
    threads: set[int] = set()
    with Host(lambda _: [STORED]) as host, BoxerClient(host.url, handlers=[Tracing(threads)]) as client:
        path = tmp_path / "a.txt" if what == "a file" else tmp_path
        assert len(contextvars.copy_context().run(client.upload_path, path)) == 1
    assert threads == {threading.get_ident()}


class Traced(Unseekable):
    """Content that notes in which context it is read."""

    def __init__(self) -> None:
        super().__init__(b"content")
        self.traces: set[str] = set()

    def read(self, size: int = -1) -> bytes:
        self.traces.add(TRACE.get())
        return super().read(size)


def test_a_file_is_read_in_the_context_of_its_caller(client_of: Clients) -> None:
    content, context = Traced(), contextvars.copy_context()
    context.run(TRACE.set, "mine")
    with Peer.answering(STORED) as peer:
        client = client_of(peer.url)
        context.run(client.upload_file, "a.txt", content)
    assert content.traces == {"mine"}


# ---------------------------------------------------------------------------------------------------------------------
# Async client, and other ways to wait: without poll(), and on other event loops
# ---------------------------------------------------------------------------------------------------------------------


def test_the_deadline_holds_while_a_file_is_read() -> None:
    """With asyncio, where a thread reads it; the blocking client reads it itself."""
    can_be_read = threading.Event()

    async def main() -> None:
        async with AsyncBoxerClient(peer.url) as client:
            with pytest.raises(BoxerTimeoutError, match="no progress"):
                await client.upload_file("a.txt", Waiting(can_be_read), timeout=0.2)  # type: ignore[arg-type]
            can_be_read.set()
            assert await client.health()

    with Peer([[Do.HEAD, Do.DRAIN], [Do.REQUEST, WELL]]) as peer:
        asyncio.run(main())


def test_an_idle_connection_whose_end_the_loop_has_seen_is_not_used() -> None:
    both, ended = threading.Barrier(2), threading.Barrier(3)

    async def main() -> None:
        async with AsyncBoxerClient(peer.url) as client:
            await asyncio.gather(*[client.run("image", ["true"]) for _ in range(2)])
            await asyncio.get_running_loop().run_in_executor(None, ended.wait, 30)  # meanwhile the loop goes round
            for _ in range(2):
                assert await client.health()

    ending: list[Any] = [Do.REQUEST, lambda _: both.wait(30), RAN, Do.HALF_CLOSE, lambda _: ended.wait(30)]
    with Peer([ending, ending, [Do.REQUEST, WELL, Do.REQUEST, WELL]]) as peer:
        asyncio.run(main())


def test_asyncio_in_debug_mode_shows_no_secrets_and_finds_no_fault(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)

    async def main() -> None:
        asyncio.get_running_loop().slow_callback_duration = 0  # so that it tells of whatever it does
        url = host.url.replace("//", "//ann:hunter2@")
        async with AsyncBoxerClient(url, headers={"X-Token": "hunter2"}, max_connections=2) as client:
            secret_run = client.run("image", ["true"], env={"KEY": "hunter2"})
            await asyncio.gather(secret_run, client.upload_path(folder), client.download_file("a.txt"))
            with pytest.raises(asyncio.CancelledError):
                await break_off("cancel", client.run("image", ["hunter2"]), bool)

    def respond(request: Received) -> list[Any]:
        if "/run" in request.line and request.json["cmd"] == ["hunter2"]:
            return [lambda: is_over.wait(30), Do.FIN]
        return [STORED if "POST /files" in request.line else RAN]

    is_over = threading.Event()
    with Host(respond) as host:
        asyncio.run(main(), debug=True)
        is_over.set()
    gc.collect()
    assert "Executing" in caplog.text and "hunter2" not in caplog.text
    faults = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert [fault for fault in faults if not re.match("Executing .* took", fault)] == []
    caplog.clear()


class Unwatching(asyncio.SelectorEventLoop):
    """An event loop that cannot watch a socket, as the default one of Windows."""

    def add_reader(self, *_: Any) -> None:  # type: ignore[override]
        raise NotImplementedError

    def remove_reader(self, *_: Any) -> bool:
        raise NotImplementedError


@pytest.fixture(scope="session")
def uvloop() -> Any:
    """Import uvloop, which opens a pipe for its first loop, and keeps it."""
    module = importlib.import_module("uvloop")
    module.new_event_loop().close()
    return module


@pytest.fixture(params=["sync, select", "async, select", "async, a loop that cannot watch", "async, uvloop"])
def client_otherwise(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, uvloop: Any) -> Iterator[Clients]:
    """Make clients that wait otherwise than usual."""
    kind, way = request.param.split(", ")
    if way == "select":
        monkeypatch.delattr(select, "poll")  # as on Windows
    loops = {"a loop that cannot watch": Unwatching, "uvloop": uvloop.new_event_loop}
    with contextlib.closing(Clients(kind, loops.get(way, asyncio.new_event_loop)())) as clients:
        yield clients


def test_half_an_answer_and_a_reset_at_once_are_a_lost_connection_however_the_client_waits(
    client_otherwise: Clients,
) -> None:
    """Both come while the loop is blocked."""
    has_arrived, is_blocked, ended = threading.Event(), threading.Event(), threading.Event()

    def end(sock: Any) -> None:
        has_arrived.set()
        is_blocked.wait(30)
        sock.sendall(RAN[:-3])
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(sock.detach())
        ended.set()

    async def call(client: AsyncBoxerClient) -> Any:
        task = asyncio.ensure_future(client.run("image", ["true"]))
        await asyncio.get_running_loop().run_in_executor(None, has_arrived.wait, 30)
        is_blocked.set()
        ended.wait(30)
        with pytest.raises(BoxerConnectionError):
            await task

    with Peer([[Do.REQUEST, end, Do.FIN]]) as peer:
        client = client_otherwise(peer.url, timeout=10)
        if client_otherwise.kind == "sync":
            is_blocked.set()
            assert is_expected(outcome(client, RUN_IT), lost())
        else:
            client_otherwise.loop.run_until_complete(call(client.client))


def test_calls_work_however_the_client_waits(client_otherwise: Clients) -> None:
    content = os.urandom(MIB) * 5

    def respond(request: Received) -> list[Any]:
        if "/run" in request.line:
            return [RAN]
        return [STORED] if "POST" in request.line else [answer(content)[:-1], lambda: time.sleep(0), content[-1:]]

    with Host(respond) as host:
        client = client_otherwise(host.url)
        for _ in range(3):
            assert client.run("image", ["true"]).exit_code == 0
            assert client.upload_file("a", content) is None
            assert client.upload_file("a", io.BytesIO(content)) is None
            assert client.download_file("a") == content
        runs = gather(client, [("run", ("image", ["true"]), {})] * 20)
        assert [run.exit_code for run in runs] == [0] * 20
    assert host.seen[1].body.count(content) == host.seen[2].body.count(content) == 1


def test_faults_are_the_same_however_the_client_waits(client_otherwise: Clients) -> None:
    """A refused upload, a connection that ends while it is idle, a peer that is silent, and one that stops reading."""
    ended, over = threading.Event(), threading.Event()

    def end(sock: Any) -> None:
        sock.shutdown(socket.SHUT_RDWR)
        ended.set()

    script: list[list[Any]] = [
        [Do.HEAD, lambda sock: sock.recv(1000), failing("413 Too Large"), Do.DRAIN],
        [Do.REQUEST, WELL, end, Do.FIN],
        [Do.REQUEST, Do.DRAIN],
        [Do.HEAD, lambda _: over.wait(30), Do.FIN],
    ]
    with Peer(script) as peer:
        client = client_otherwise(peer.url)
        assert is_expected(outcome(client, LARGE), refusal(413))
        assert client.health() and ended.wait(30)
        assert is_expected(outcome(client, RUN_IT, timeout=0.3), (BoxerTimeoutError, 0, "0.3 s"))
        assert is_expected(outcome(client, LARGE, timeout=0.3), (BoxerTimeoutError, 0, "no progress"))
        over.set()
    assert is_expected(outcome(client_otherwise(refused_url(), retries=0), RUN_IT), lost("no connection"))


# Event loops of other kinds


class Unregistering(asyncio.SelectorEventLoop):
    """An event loop that offers nobody to watch a socket, as the default one of Windows."""

    def add_reader(self, *_: Any) -> None:  # type: ignore[override]
        raise NotImplementedError

    def add_writer(self, *_: Any) -> None:  # type: ignore[override]
        raise NotImplementedError


async def passed_on(coroutine: Any) -> Any:
    return await coroutine


def test_a_loop_may_wrap_what_its_tasks_do() -> None:
    """As Sentry's integration with asyncio does it."""
    loop = asyncio.new_event_loop()
    loop.set_task_factory(lambda loop, coroutine, **more: asyncio.Task(passed_on(coroutine), loop=loop, **more))
    with contextlib.closing(Clients("async", loop)) as clients:
        got = outcome(clients(refused_url(), retries=0), RUN_IT)
        assert is_expected(got, lost("no connection could be made")) and got.request_sent is False
        with Host(lambda request: [STORED if "/files" in request.line else RAN]) as host:
            client = clients(host.url)
            client.upload_file("a", io.BytesIO(b"content"))
            assert client.run("image", ["true"], files={"a": "1", "b": "2"}) == RESULT


class Reluctant(asyncio.SelectorEventLoop):
    """An event loop whose new connections wait for an event."""

    is_making: asyncio.Event
    go_on: asyncio.Event
    was_cancelled = False

    async def create_connection(self, *args: Any, **kwargs: Any) -> Any:
        self.is_making.set()
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise
        return await super().create_connection(*args, **kwargs)


@pytest.mark.parametrize("times", [1, 2])
def test_a_connection_whose_socket_the_loop_has_taken_is_made_and_closed_if_the_call_is_cancelled(times: int) -> None:
    """uvloop before 0.23 closes the descriptor twice if this is cancelled, be it somebody else's by then."""

    async def main() -> None:
        loop.is_making, loop.go_on = asyncio.Event(), asyncio.Event()
        async with AsyncBoxerClient(peer.url) as client:
            call = asyncio.ensure_future(client.run("image", ["true"]))
            await loop.is_making.wait()
            for _ in range(times):
                call.cancel()
                await asyncio.sleep(0)
            loop.go_on.set()
            await asyncio.wait([call])
            assert call.cancelled() and not loop.was_cancelled
            await loop.run_in_executor(None, has_gone.wait, 30)
        assert has_gone.is_set()

    has_gone, loop = threading.Event(), Reluctant()
    with Peer([[Do.GONE, lambda _: has_gone.set()]]) as peer:
        try:
            loop.run_until_complete(main())
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()


@contextlib.contextmanager
def resetting() -> Iterator[int]:
    """A listener that resets each connection as it comes, or up to half a millisecond later; yield its port."""

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                with sock:
                    threading.Event().wait(max(0, random.uniform(-0.0005, 0.0005)))
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("kind", ["asyncio's", "uvloop"])
def test_a_reset_at_any_moment_ends_a_call_with_an_error_of_this_module(kind: str, scheme: str, uvloop: Any) -> None:
    async def ask(client: AsyncBoxerClient) -> Any:
        try:
            return await client.health()
        except BoxerError as error:
            return error

    async def main() -> list[Any]:
        outcomes: list[Any] = []
        async with AsyncBoxerClient(f"{scheme}://127.0.0.1:{port}", timeout=60) as client:
            for _ in range(20):
                done, waiting = await asyncio.wait([asyncio.ensure_future(ask(client)) for _ in range(20)], timeout=30)
                assert not waiting
                outcomes += [call.result() for call in done]
        return outcomes

    loop = uvloop.new_event_loop() if kind == "uvloop" else asyncio.new_event_loop()
    if kind == "uvloop":
        loop.set_exception_handler(lambda *_: None)  # uvloop's own TLS complains of a connection that has gone
    with resetting() as port:
        try:
            outcomes = loop.run_until_complete(main())
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()
    assert {type(outcome) for outcome in outcomes} == {BoxerConnectionError}


@pytest.fixture(params=["a loop that cannot watch", "uvloop"])
def other_loop(request: pytest.FixtureRequest, uvloop: Any) -> Iterator[Clients]:
    """Make clients on an event loop that is not asyncio's usual one."""
    loop = uvloop.new_event_loop() if request.param == "uvloop" else Unregistering()
    with contextlib.closing(Clients("async", loop)) as clients:
        yield clients


@pytest.mark.parametrize("is_tls", [False, True], ids=["plain", "TLS"])
def test_every_call_works_on_another_loop(other_loop: Clients, ca: trustme.CA, folder: Path, is_tls: bool) -> None:
    content, seen = os.urandom(5 * MIB), list[bytes]()

    def respond(request: Received) -> list[bytes]:
        if "POST /files" in request.line:
            seen.append(request.content)
        return [answer(content) if "GET" in request.line else RAN if "/run" in request.line else STORED]

    with Host(respond, context=serving(ca) if is_tls else None) as host:
        client = other_loop(host.url, ssl_context=trusting(ca) if is_tls else None)
        for source in (content, io.BytesIO(content), Unseekable(content)):
            assert client.run("image", ["true"]) == RESULT
            client.upload_file("a.txt", source)
        assert [content in body for body in seen] == [True] * 3
        assert len(client.upload_path(folder)) == len(seen) - 3
        assert gather(client, [DOWNLOAD, RUN_IT] * 5) == [content, RESULT] * 5


@pytest.mark.parametrize("what", ["an answer", "the rest of an answer", "an upload", "TLS", "a connection"])
def test_a_deadline_ends_a_call_on_another_loop(other_loop: Clients, ca: trustme.CA, what: str) -> None:
    is_over = threading.Event()

    def wait(_: Any) -> None:
        is_over.wait(30)

    scripts: dict[str, list[Any]] = {
        "an answer": [Do.REQUEST, Do.DRAIN],
        "the rest of an answer": [Do.REQUEST, RAN[:-1], Do.DRAIN],
        "an upload": [Do.HEAD, wait, Do.DRAIN],
        "TLS": [Do.DRAIN],
    }
    call = upload(io.BytesIO(bytes(LONG))) if what == "an upload" else RUN_IT
    with contextlib.ExitStack() as stack:
        if what == "a connection":
            url = f"http://127.0.0.1:{stack.enter_context(never_accepting()).getsockname()[1]}"
        else:
            peer = stack.enter_context(Peer([scripts[what]]))
            url = peer.url.replace("http:", "https:") if what == "TLS" else peer.url
        client = other_loop(url, ssl_context=trusting(ca), retries=0)
        assert is_expected(outcome(client, call, timeout=0.3), (BoxerTimeoutError, 0, "0.3 s"))
        is_over.set()


def test_handshakes_that_do_not_come_are_all_given_up_on_another_loop(other_loop: Clients) -> None:
    """The deadline's timers ring at about the same time, and any of them may be the first."""

    async def main(client: AsyncBoxerClient) -> list[Any]:
        got: list[Any] = []
        for number in range(20):
            call = asyncio.ensure_future(client.health(timeout=0.03 + number / 1e5))
            await asyncio.wait((call,), timeout=10)
            assert call.done(), f"call {number} hangs"
            got.append(call.exception())
        return got

    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:  # which accepts nothing
        client = other_loop(f"https://127.0.0.1:{listener.getsockname()[1]}")
        got = client.loop.run_until_complete(main(client.client))
    assert [error for error in got if not is_expected(error, (BoxerTimeoutError, 0, "0.03"))] == []


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("what", ["a run", "an upload", "TLS"])
def test_a_cancelled_call_closes_its_connection_on_another_loop(
    other_loop: Clients, ca: trustme.CA, what: str, how: str
) -> None:
    waiting, is_over = threading.Event(), threading.Event()

    def wait(_: Any) -> None:
        waiting.set()
        if what == "an upload":
            is_over.wait(30)

    steps: dict[str, list[Any]] = {
        "a run": [Do.REQUEST, wait, Do.GONE],
        "an upload": [Do.HEAD, wait, Do.DRAIN],
        "TLS": [lambda sock: sock.recv(1), wait, Do.DRAIN],
    }
    then: list[Any] = [cut_off(serving(ca), WELL, "FIN"), Do.FIN] if what == "TLS" else [Do.REQUEST, WELL]
    with Peer([steps[what], then]) as peer:
        url = peer.url.replace("http:", "https:") if what == "TLS" else peer.url
        client = other_loop(url, ssl_context=trusting(ca), max_connections=1)
        method, args, kwargs = upload(io.BytesIO(bytes(LONG))) if what == "an upload" else RUN_IT
        call = getattr(client.client, method)(*args, **kwargs)
        with pytest.raises(HOWS[how]):
            client.loop.run_until_complete(break_off(how, call, lambda: waiting.wait(30)))
        is_over.set()
        assert client.health()


# ---------------------------------------------------------------------------------------------------------------------
# Command line: `boxer`, `python -m boxer` and `python boxer.py`
#
# Most tests call `main` in this process. Where a terminal, a signal or a broken stream matters, the program is started.
# ---------------------------------------------------------------------------------------------------------------------


class Said(NamedTuple):
    """What a program has said, and its exit code."""

    code: int
    stdout: bytes
    stderr: str


@pytest.fixture
def call_main(capsysbinary: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Said]:
    """Call `main` with a command line, in an empty folder and without any standard input unless it is given."""
    monkeypatch.delenv("BOXER_URL", raising=False)
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str, stdin: bytes | None = None) -> Said:
        monkeypatch.setattr(sys, "stdin", None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin)))
        code = boxer.main(arguments)
        stdout, stderr = capsysbinary.readouterr()
        return Said(code, stdout, stderr.decode())

    return call


def command_line(*arguments: str, module: bool = False) -> list[str]:
    """Give the command line that starts the program."""
    return [sys.executable, "-W", "error", *(["-m", "boxer"] if module else [boxer.__file__]), *arguments]


def start(*arguments: str, **settings: Any) -> Said:
    """Start the program, and wait for its end; what it says goes where the settings say, or is returned."""
    done = subprocess.run(
        command_line(*arguments), **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **settings}
    )
    return Said(done.returncode, done.stdout or b"", (done.stderr or b"").decode())


def respond_well(request: Received) -> list[bytes]:
    return [{"POST /run": RAN, "POST /files": STORED, "GET /healthz": WELL}.get(request.line[:-9], answer(b"content"))]


def uploaded(host: Host) -> list[str]:
    """Return the remote paths of what was uploaded, sorted, without the random folder of a run."""
    paths = [re.search(rb'name="path"\r\n\r\n(.*)\r\n--', request.body) for request in host.seen]
    return sorted(re.sub("^boxer-[0-9a-f]{32}/", "", path[1].decode()) for path in paths if path)


def test_main_may_be_called_with_streams_of_the_caller_s_own() -> None:
    stdout = io.StringIO()
    streams = contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(io.StringIO())
    with Peer.answering(answer({**RUN, "stdout": "é\n"})) as peer, streams[0], streams[1]:
        assert boxer.main(["run", "--url", peer.url, "image", "x"]) == 0
    assert stdout.getvalue() == "é\n"


def test_a_pipe_that_does_not_block_gets_all_of_an_output() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    with Peer.answering(answer({**RUN, "stdout": "x" * MIB})) as peer, open(read, "rb") as reading:
        line = command_line("run", "--url", peer.url, "image", "x")
        with subprocess.Popen(line, stdout=write) as process:
            os.close(write)
            assert reading.read() == b"x" * MIB
            assert process.wait(30) == 0


def test_what_ends_the_program_from_outside_ends_it_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(*_: Any, **__: Any) -> None:
        raise SystemExit(143)

    monkeypatch.setattr(BoxerClient, "run", end)
    with pytest.raises(SystemExit, match="143"):
        boxer.main(["run", "image", "x"])


# What a run is asked to do, and what becomes of what it said


@pytest.mark.parametrize("stdout", ["é\r\n\0\x1b[1m no newline", f"é{LONE}"], ids=ascii)
@pytest.mark.parametrize("stderr", ["\ufffdé\n", f"{LONE}é\n"], ids=ascii)
def test_a_run_says_what_the_program_said_and_ends_with_its_exit_code(call_main: Any, stdout: str, stderr: str) -> None:
    with Peer.answering(answer({**RUN, "stdout": stdout, "stderr": stderr, "exit_code": 3})) as peer:
        said = call_main("run", "--url", peer.url, "image", "echo", "-n")
    assert said == (3, stdout.replace("\ud800", "?").encode(), stderr.replace("\ud800", "?"))
    assert peer.request.json == {"image": "image", "cmd": ["echo", "-n"]}


@pytest.mark.parametrize(("given", "code"), [(0, 0), (1, 1), (255, 255), (256, 255), (-1, 255)])
def test_no_exit_code_but_0_becomes_0(call_main: Any, given: int, code: int) -> None:
    with Peer.answering(answer({**RUN, "exit_code": given})) as peer:
        assert call_main("run", "--url", peer.url, "image", "x").code == code


# Each row: options of a run, and the members of its request that they come to.
RUN_OPTIONS: list[tuple[list[str], dict[str, Any]]] = [
    (["-e", "A=1", "-eB=x=y", "-e", "C=", "-e", "A=2"], {"env": ["A=2", "B=x=y", "C="]}),
    (["-w", "/w"], {"cwd": "/w"}),
    (
        ["--time-limit", "5", "--memory=64", "--cpus", "0.5", "--pids", "9", "--nofile", "33"],
        {"limits": {**LIMITS, "memory_mb": 64, "pids_limit": 9, "nofile": 33}},
    ),
    (["--network", "sandbox"], {"network": "sandbox"}),
    (["--"], {}),
    (["-q", "--"], {}),
]


@pytest.mark.parametrize(("options", "members"), RUN_OPTIONS)
def test_an_option_of_a_run_becomes_a_part_of_its_request(call_main: Any, options: Any, members: Any) -> None:
    with Peer.answering(RAN) as peer:
        assert call_main("--url", peer.url, "run", *options, "image", "x") == (0, b"hi\n", "")
    assert peer.request.json == {"image": "image", "cmd": ["x"], **members}


@pytest.mark.parametrize("words", ["x -i -e A --json -h", "-- x --", "-o --bogus", "--version", "- -1 -e=", "run -f ."])
def test_whatever_stands_behind_the_image_is_the_program_s(call_main: Any, words: str) -> None:
    with Peer.answering(RAN) as peer:
        assert call_main("run", "--url", peer.url, "-q", "image", *words.split()) == (0, b"hi\n", "")
    assert peer.request.json == {"image": "image", "cmd": words.split()}


def test_options_for_all_commands_stand_before_the_command_or_behind_it(call_main: Any, setenv: Any) -> None:
    with Host(respond_well) as host:
        setenv("BOXER_URL", host.url)
        fields = "--header", "X-A: 1", "--header", "X-B:2:3"
        for line in (["--url", "http://nowhere.test", *fields, "health", "--url", host.url, "--header", "X-C: 3"],):
            assert call_main(*line) == (0, b"ok\n", "")
        assert call_main("--timeout", "5", "health", *fields, "--retries", "0") == (0, b"ok\n", "")
    one, other = ({name: value for name, value in seen.fields.items() if name[:2] == "x-"} for seen in host.seen)
    assert (one, other) == ({"x-a": "1", "x-b": "2:3", "x-c": "3"}, {"x-a": "1", "x-b": "2:3"})


def test_a_certificate_that_is_not_trusted_is_one_line_that_names_the_option(call_main: Any, ca: trustme.CA) -> None:
    with Frail(lambda _: [WELL], serving(ca)) as host:
        code, _, stderr = call_main("health", "--url", f"https://{host.authority}")
    assert code == 125 and stderr.endswith("; --ca FILE trusts the certificates in FILE\n") and stderr.count("\n") == 1


WRONG_USAGES = [
    ("", "name a command: run, upload, download or health; see `boxer --help`"),
    ("rum x", "invalid choice: 'rum'"),
    ("run", "too few arguments; see `boxer run --help`"),
    ("run image", "too few arguments; see `boxer run --help`"),
    ("run --bogus image x", "there is no option --bogus; see `boxer run --help`"),
    ("run --time 5 image x", "there is no option --time; see `boxer run --help`"),
    ("run --memory 1.5 image x", "argument --memory: invalid int value: '1.5'; see `boxer run --help`"),
    ("run -e SECRET image x", "-e takes K=V; see `boxer run --help`"),
    ("run -e =SECRET image x", "-e takes K=V; see `boxer run --help`"),
    ("--header SECRET health", "--header takes 'NAME: VALUE'; see `boxer health --help`"),
    ("upload", "too few arguments; see `boxer upload --help`"),
    ("upload a b c", "too many arguments; see `boxer upload --help`"),
    ("upload a --excl b", "there is no option --excl; see `boxer upload --help`"),
    ("download a --json b", "there is no option --json; see `boxer download --help`"),
    ("upload -x -- -x", "there is no option -x; see `boxer upload --help`"),
    ("health now", "too many arguments; see `boxer health --help`"),
    ("health --wait soon", "argument --wait: invalid float value: 'soon'; see `boxer health --help`"),
    ("health --timeout 0", "timeout must be a number of seconds above 0"),
    ("health --haeder=SECRET", "there is no option --haeder; see `boxer health --help`"),
    ("health --ca=", "--ca is empty"),
    ("--url localhost:8080 health", "--url is not a URL with a host, such as http://localhost:8080"),
]


@pytest.mark.parametrize(("line", "text"), WRONG_USAGES)
def test_a_wrong_usage_is_one_line_and_125(call_main: Any, line: str, text: str) -> None:
    code, stdout, stderr = call_main(*line.split())
    assert (code, stdout, stderr.count("\n")) == (125, b"", 1)
    assert stderr.startswith("boxer: ") and text in stderr and "SECRET" not in stderr


# Each row: what the server says to a run, the exit code, and what the line says.
RUN_FAILURES: list[tuple[bytes, int, str]] = [
    (
        failing("408 Request Timeout", "execution timed out"),
        124,
        "execution timed out; --time-limit gives it more time; if it printed a lot, have it write to /output",
    ),
    (failing("507 Insufficient Storage", "output limit exceeded"), 125, "output limit exceeded; what a program writes"),
    (failing("400 Bad Request", "no\x1b[2J\nsuch"), 125, "no such\n"),
    (answer(b"<h1>Hello</h1>", "200 OK"), 125, "look at the URL"),
]


@pytest.mark.parametrize(("said", "code", "text"), RUN_FAILURES)
@pytest.mark.parametrize("is_json", [False, True], ids=["a line", "JSON"])
def test_an_error_of_a_run_is_one_line_or_one_object(
    call_main: Any, said: bytes, code: int, text: str, is_json: bool
) -> None:
    with Host(lambda _: [said]) as host:
        got = call_main("run", "--url", host.url, *["--json"] * is_json, "image", "x")
    assert got.code == code
    if is_json:
        error = json.loads(got.stdout)["error"]
        assert (sorted(error), got.stderr) == (["message", "status_code", "type"], "")
        assert text.strip() in error["message"] and error["status_code"] in (200, 400, 408, 507)
    else:
        assert got.stdout == b"" and re.fullmatch(rf"boxer: .*{re.escape(text)}.*\n?", got.stderr)


def test_a_server_that_cannot_be_reached_is_one_line_that_says_what_to_do(call_main: Any, clock: Clock) -> None:
    url = refused_url()
    code, stdout, stderr = call_main("run", "--url", url, "-q", "image", "x")
    assert (code, stdout, stderr.count("\n")) == (125, b"", 1)
    assert f"{url}/run" in stderr and stderr.endswith("; is a server there? --url or BOXER_URL says where\n")


def test_a_deadline_of_our_own_is_125_and_says_what_to_do(call_main: Any) -> None:
    with Peer([[Do.REQUEST]]) as peer:
        code, _, stderr = call_main("run", "--timeout", "0.05", "--url", peer.url, "image", "x")
    assert code == 125 and stderr.endswith("; --timeout (or --wait) waits longer\n")


def test_json_is_one_object_with_the_result(call_main: Any) -> None:
    with Peer.answering(answer({**RUN, "stdout": "é\n", "exit_code": 7})) as peer:
        code, stdout, stderr = call_main("run", "--json", "--url", peer.url, "image", "x")
    assert (code, stderr) == (7, "") and stdout.isascii() and stdout.count(b"\n") == 1
    assert json.loads(stdout) == {**RUN, "stdout": "é\n", "exit_code": 7}


@pytest.mark.parametrize(
    ("options", "kind"),
    [("--url nowhere", "BoxerValidationError"), ("-f absent", "FileNotFoundError"), ("-i", "BoxerValidationError")],
)
def test_json_is_one_object_even_if_nothing_was_sent(call_main: Any, options: str, kind: str) -> None:
    code, stdout, stderr = call_main("run", "--json", *options.split(), "image", "x")
    assert (code, stderr, json.loads(stdout)["error"]["type"]) == (125, "", kind)


# Files, outputs and input of a run


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ("-f proj/a.txt", ["a.txt"]),
        ("-f proj/a.txt:b/c.txt", ["b/c.txt"]),
        ("-f proj/a.txt:.", ["a.txt"]),
        ("-f proj/a", ["a/b/deep.txt", "a/x.txt"]),
        ("-f proj/a/", ["a/b/deep.txt", "a/x.txt"]),
        ("-f proj/a:lib", ["lib/b/deep.txt", "lib/x.txt"]),
        ("-f proj/a:.", ["b/deep.txt", "x.txt"]),
        ("-f proj/a:. -f proj/a.txt", ["a.txt", "b/deep.txt", "x.txt"]),
        ("-f with:colon", ["with:colon"]),
        ("-f with:colon:without", ["without"]),
        ("-f proj --exclude b --exclude *.txt", []),
        ("-f proj/a --exclude b/*.txt -f proj/a:.", ["a/x.txt", "x.txt"]),
    ],
)
def test_files_go_into_the_run_s_own_folder(
    call_main: Any, folder: Path, tmp_path: Path, options: str, names: list[str]
) -> None:
    (tmp_path / "with:colon").write_text("content")
    with Host(respond_well) as host:
        assert call_main("run", "--url", host.url, *options.split(), "image", "x") == (0, b"hi\n", "")
    assert uploaded(host) == names
    asked = next(request.json for request in host.seen if "/run" in request.line)
    assert re.fullmatch("/boxer-[0-9a-f]{32}" if names else "", asked.get("cwd", ""))


@pytest.mark.parametrize("here", [".", ".."])
def test_dot_stands_for_what_is_in_a_folder(call_main: Any, folder: Path, monkeypatch: Any, here: str) -> None:
    monkeypatch.chdir(folder / "a" if here == ".." else folder)
    with Host(respond_well) as host:
        assert call_main("run", "--url", host.url, "-f", here, "image", "x").code == 0
    assert uploaded(host) == ["a-b.txt", "a.txt", "a/b/deep.txt", "a/x.txt", "é 1%.txt"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("-f absent", "absent: No such file or directory"),
        ("-f absent:here", "absent: No such file or directory"),
        ("-f loop", "loop"),
        ("-f proj/a.txt -f proj/b.txt:a.txt", "-f gives two files the name 'a.txt'; rename one, as LOCAL:NAME"),
        ("-f proj/a.txt:../b", "'../b'"),
        ("-o proj/a.txt", "proj/a.txt: File exists"),
        ("--memory -1", "--memory must be a whole number"),
        ("--cpus -1", "--cpus must be a finite number"),
        ("--pids -1", "--pids must be a whole number"),
        ("--time-limit -1", "--time-limit must be a whole number"),
        ("-f proj/a.txt:", "the remote name is empty"),
        ("-f :b", "LOCAL is empty"),
        ("-i", "there is no standard input for -i"),
        ("--ca absent", "--ca absent: No such file or directory"),
        ("--ca proj/a.txt", "--ca proj/a.txt: "),
    ],
)
def test_what_cannot_be_sent_is_one_line_and_nothing_is_sent(
    call_main: Any, tmp_path: Path, options: str, text: str
) -> None:
    (tmp_path / "proj").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "proj" / name).write_text("content")
    (tmp_path / "loop").symlink_to("loop")
    with Peer([]) as peer:
        code, stdout, stderr = call_main("run", "--url", peer.url, *options.split(), "image", "x")
    assert (code, stdout, stderr.count("\n")) == (125, b"", 1) and text in stderr


def output_list(names: bytes, files: Mapping[str, bytes] | None = None) -> Callable[[Received], list[bytes]]:
    """Respond to runs, to the request for the list of outputs, and to those for the outputs themselves."""

    def respond(request: Received) -> list[bytes]:
        if "-list" in request.line:
            return [answer(names)]
        name = request.line.split()[1].rpartition("boxer-1/")[2]
        return [answer((files or {})[name])] if "GET" in request.line else [RAN]

    return respond


def test_outputs_go_into_a_folder_and_what_is_left_out_is_a_line(call_main: Any, tmp_path: Path) -> None:
    with Host(output_list(b"./a.txt\0./b/c.txt\0./../evil\0", {"a.txt": b"A", "b/c.txt": b"C"})) as host:
        code, stdout, stderr = call_main("run", "--url", host.url, "-o", "new/out", "image", "x")
    assert (code, stdout) == (0, b"hi\n")
    assert re.fullmatch(r"boxer: .* left out.*\n", stderr) and "'../evil'" in stderr
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")) == [
        *("new/out/a.txt", "new/out/b/c.txt")
    ]


def test_the_folder_of_outputs_is_made_even_if_there_are_none(call_main: Any, tmp_path: Path) -> None:
    with Host(output_list(b"")) as host:
        assert call_main("run", "--url", host.url, "-o", "new/out", "image", "x") == (0, b"hi\n", "")
    assert (tmp_path / "new" / "out").is_dir()


@pytest.mark.parametrize("is_json", [False, True], ids=["text", "JSON"])
def test_what_the_program_said_is_not_lost_with_its_outputs(call_main: Any, tmp_path: Path, is_json: bool) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "b").symlink_to(tmp_path)
    with Host(output_list(b"./b/c.txt\0", {"b/c.txt": b"C"})) as host:
        got = call_main("run", "--url", host.url, *["--json"] * is_json, "-o", "out", "image", "x")
    assert got.code == 125 and not (tmp_path / "c.txt").exists()
    if is_json:
        object_ = json.loads(got.stdout)
        assert "is a link" in object_.pop("error")["message"] and object_ == RUN
    else:
        assert got.stdout == b"hi\n" and re.fullmatch(r"boxer: .*is a link.*\n", got.stderr)


def test_standard_input_is_given_to_the_program(call_main: Any) -> None:
    with Peer.answering(RAN) as peer:
        assert call_main("run", "--url", peer.url, "-i", "image", "x", stdin=b"1 2\r\n3").code == 0
    assert "1 2\r\n3" in peer.request.json["cmd"]


@pytest.mark.skipif(os.name == "nt", reason="there is no such input here")
def test_standard_input_that_does_not_block_is_read_to_its_end() -> None:
    read, write = os.pipe()
    os.set_blocking(read, False)
    with Peer.answering(RAN) as peer:
        line = command_line("run", "--url", peer.url, "-i", "image", "x")
        with subprocess.Popen(line, stdin=read, stdout=subprocess.DEVNULL) as process:
            os.close(read)
            for text in (b"first ", b"second"):
                threading.Event().wait(0.3)  # it finds nothing, or the end of what had come
                os.write(write, text)
            os.close(write)
            assert process.wait(30) == 0
    assert "first second" in peer.request.json["cmd"]


def test_standard_input_is_not_read_unless_asked_for(call_main: Any) -> None:
    with Peer.answering(RAN) as peer:
        assert call_main("run", "--url", peer.url, "image", "x", stdin=b"content").code == 0
    assert sys.stdin.read() == "content"


# The other commands


def test_upload_prints_the_remote_paths(call_main: Any, folder: Path) -> None:
    with Host(respond_well) as host:
        said = call_main("upload", "proj", "--exclude", "a.txt", "lib", "--url", host.url, "--exclude", "deep.*")
        assert said == (0, "lib/a/x.txt\nlib/a-b.txt\nlib/é 1%.txt\n".encode(), "")
        assert call_main("upload", "--url", host.url, "proj/a.txt") == (0, b"a.txt\n", "")
        assert call_main("upload", "--url", host.url, "--", "proj/a/x.txt") == (0, b"x.txt\n", "")
    assert uploaded(host) == sorted(["lib/a/x.txt", "lib/a-b.txt", "lib/é 1%.txt", "a.txt", "x.txt"])


@pytest.mark.parametrize(
    ("words", "place"), [("", "c.txt"), ("d.txt", "d.txt"), ("folder", "folder/c.txt"), ("folder/x", "folder/x")]
)
def test_a_download_goes_where_it_is_told_to(call_main: Any, tmp_path: Path, words: str, place: str) -> None:
    (tmp_path / "folder").mkdir()
    with Peer.answering(answer(b"content")) as peer:
        assert call_main("download", "b/c.txt", "--url", peer.url, *words.split()) == (0, b"", "")
    assert (tmp_path / place).read_bytes() == b"content"
    assert sum(path.is_file() for path in tmp_path.rglob("*")) == 1


def test_a_download_goes_to_standard_output(call_main: Any) -> None:
    content = bytes(range(256)) * 4096 * 3
    with Peer.answering(answer(content)) as peer:
        assert call_main("download", "b/c.txt", "-", "--url", peer.url) == (0, content, "")


def test_a_download_that_fails_is_one_line_that_names_the_file(call_main: Any) -> None:
    with Peer.answering(failing("404 Not Found", "file not found")) as peer:
        code, stdout, stderr = call_main("download", "b/c.txt", "--url", peer.url)
    assert (code, stdout, stderr) == (125, b"", "boxer: file not found (file 'b/c.txt')\n")
    with Peer([]) as peer:
        assert call_main("download", "b", "no/where", "--url", peer.url)[1:] == (
            *(b"", "boxer: no/where: No such file or directory\n"),
        )
    with Peer([[Do.REQUEST, raw("Content-Length: 9", body=b"content"), Do.FIN]]) as peer:
        code, _, stderr = call_main("download", "b", "c", "--url", peer.url, "--retries", "0")
    assert (code, stderr.count("\n")) == (125, 1) and "within the content" in stderr and "file 'b'" in stderr


def test_health_says_ok_or_the_server_s_reason(call_main: Any, clock: Clock) -> None:
    unwell = failing("503 Service Unavailable", "starting")
    with Peer.answering(unwell, WELL_AND_BYE) as peer:
        assert call_main("health", "--url", peer.url, "--wait", "60") == (0, b"ok\n", "")
    with Peer.answering(unwell) as peer:
        assert call_main("health", "--url", peer.url) == (125, b"", "boxer: starting\n")
    with Peer.answering(unwell, WELL) as peer:
        assert call_main("health", "-q", "--url", peer.url, "--retries", "1") == (0, b"ok\n", "")
    with Host(lambda _: [unwell]) as host:
        code, _, stderr = call_main("health", "--url", host.url, "--wait", "5")
    assert code == 125 and "the server was not ready in time: starting" in stderr


def test_another_try_is_a_line_unless_it_is_to_be_quiet(call_main: Any, clock: Clock) -> None:
    logger, busy = logging.getLogger("boxer"), failing("503 Service Unavailable", "busy")
    before = logger.level, list(logger.handlers)
    for options, lines in (([], 1), (["-q"], 0), (["-v"], 3), (["--retries", "0"], 1)):
        answers = [busy] if "0" in options else [busy, RAN]
        with Peer.answering(*answers) as peer:
            stderr = call_main("run", *options, "--url", peer.url, "image", "x").stderr
        assert len(stderr.splitlines()) == lines and stderr.startswith("boxer: " * bool(lines))
        assert ("trying again" in stderr) == (lines != 0 and "0" not in options)
    assert (logger.level, logger.handlers) == before


def test_a_certificate_of_one_s_own_is_trusted(call_main: Any, ca: trustme.CA, tmp_path: Path) -> None:
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    with Peer.answering(WELL, context=serving(ca)) as peer:
        assert call_main("health", "--url", peer.url, "--ca", "ca.pem") == (0, b"ok\n", "")


# Help


def test_the_help_has_an_example_for_each_command_that_works(call_main: Any, setenv: Any, tmp_path: Path) -> None:
    main_help = call_main("--help")
    assert (main_help.code, main_help.stderr, main_help.stdout.isascii()) == (0, "", True)
    examples = re.findall(r"^  boxer (\w+ .*)$", main_help.stdout.decode(), re.MULTILINE)
    assert [example.split()[0] for example in examples] == ["run", "upload", "download", "health"]
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "main.py").write_text("print('hi')")
    with Host(respond_well) as host:
        setenv("BOXER_URL", host.url)
        for example in examples:
            help_ = call_main(example.split()[0], "--help").stdout
            assert f"example:\n  boxer {example}\n".encode() in help_ and help_.isascii()
            said = call_main(*shlex.split(example))
            assert (said.code, said.stderr) == (0, "")


def test_the_program_is_the_same_however_it_is_started(call_main: Any, tmp_path: Path) -> None:
    places = [boxer_folder()]
    if (HERE / ".package").is_dir():  # the package that is published, whose __init__.py is boxer.py
        places.append(str(HERE / ".package"))
    lines = [
        (command_line("--version"), {}),
        *((command_line("--version", module=True), {"PYTHONPATH": it}) for it in places),
    ]
    for line, environment in lines:
        done = subprocess.run(line, cwd=tmp_path, env={**os.environ, **environment}, capture_output=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"boxer {boxer.__version__}\n".encode(), b"")
    assert call_main("--version") == (0, f"boxer {boxer.__version__}\n".encode(), "")


# Streams as they are in the wild


@pytest.mark.parametrize("arguments", [("run", "image", "x"), ("run", "--json", "image", "x"), ("download", "a", "-")])
def test_a_closed_pipe_is_no_error_of_a_program_that_has_run(arguments: Sequence[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    content = answer(bytes(4 * MIB)) if "download" in arguments else answer({**RUN, "exit_code": 3, "stderr": "no\n"})
    with Host(lambda _: [content]) as host, open(writer, "wb") as pipe:
        said = start(*arguments, stdout=pipe, env={**os.environ, "BOXER_URL": host.url})
    assert said.code == (125 if "download" in arguments else 3)
    assert said.stderr == ("no\n" if len(arguments) == 3 and arguments[0] == "run" else "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
@pytest.mark.parametrize("line", ["run image x", "run --json image x", "--help", "download a -"])
def test_a_full_disk_is_one_line(line: str) -> None:
    with Host(respond_well) as host, open("/dev/full", "wb") as full:
        environment = {**os.environ, "BOXER_URL": host.url}
        said = start(*line.split(), stdout=full, env=environment)
        assert said == (125, b"", "boxer: standard output: No space left on device\n")
        if line == "run image x":
            assert start("run", "image", "x", "--", stderr=full, env=environment).code == 0
            assert start("rum", stderr=full, env=environment) == (125, b"", "")


def test_a_terminal_that_is_not_utf_8_gets_the_program_s_own_bytes(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    (tmp_path / "é").write_text("content")
    with Host(lambda request: [answer({**RUN, "stdout": "é\n"}) if "/run" in request.line else STORED]) as host:
        environment["BOXER_URL"] = host.url
        assert start("run", "image", "x", env=environment) == (0, "é\n".encode(), "")
        assert start("upload", ".", "x", env=environment, cwd=tmp_path) == (0, "x/é\n".encode(), "")
        assert start("upload", "ö", env=environment, cwd=tmp_path)[::2] == (
            *(125, f"boxer: {tmp_path}/\\xf6: No such file or directory\n"),
        )


def test_closed_streams_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with Host(lambda _: [answer({**RUN, "stderr": "no\n", "exit_code": 3})]) as host:
        line = ["/bin/sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command_line("run", "--url", host.url, "image", "x")]
        assert subprocess.run(line).returncode == 3
        assert subprocess.run([*line[:-2], "-i", "image", "x"]).returncode == 125


# Terminals and signals


class Terminal:
    """A program whose streams are a terminal, but for those that are given; a context manager.

    Its terminal is the controlling one: what is typed there may be Ctrl-C. `shown` is all that came out of it.
    """

    def __init__(self, *arguments: str, url: str, **streams: Any) -> None:
        self.arguments, self.streams = arguments, streams
        self.environment = {**os.environ, "BOXER_URL": url}
        self.shown = ""
        self._news = threading.Condition()

    def __enter__(self) -> Terminal:
        self.master, self.slave = os.openpty()
        # The shell opens the terminal, which makes it that of its session. Streams that are given stay what they are.
        script = 'exec <"$0"; [ -t 1 ] && exec >"$0"; [ -t 2 ] && exec 2>"$0"; exec "$@"'
        line = ["/bin/sh", "-c", script, os.ttyname(self.slave), *command_line(*self.arguments)]
        streams = {"stdin": self.slave, "stdout": self.slave, "stderr": self.slave, **self.streams}
        self.process = subprocess.Popen(line, env=self.environment, start_new_session=True, **streams)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.wait()
        os.close(self.master)

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # the last of those who write to the terminal has closed it
            while data := os.read(self.master, 65536):
                with self._news:
                    self.shown += data.decode()
                    self._news.notify()

    def shows(self, pattern: str) -> bool:
        """Wait until the terminal has shown something."""
        with self._news:
            return self._news.wait_for(lambda: re.search(pattern, self.shown) is not None, 30)

    def type(self, text: bytes) -> None:
        os.write(self.master, text)

    def wait(self) -> int:
        """Wait until the program has ended and everything that it said is shown; return its exit code."""
        code = self.process.wait(30)
        if self.slave >= 0:
            os.close(self.slave)
            self.slave = -1
        self._reader.join(30)
        return code

    @property
    def screen(self) -> str:
        """What remains to be seen of what was shown."""
        return re.sub(r"[^\n]*\r\x1b\[K", "", self.shown.replace("\r\n", "\n"))


on_terminals = pytest.mark.skipif(not hasattr(os, "openpty"), reason="this system has no pseudo-terminals")
UPLOADING = r"\r\x1b\[Kuploading: [0-9.]+ of 24\.[01] MiB, [0-9.]+ MiB/s, [0-9]+ s"


@on_terminals
def test_the_line_on_a_terminal_is_no_longer_than_the_terminal_is_wide() -> None:
    fcntl, termios = (importlib.import_module(name) for name in ("fcntl", "termios"))
    shown = threading.Event()
    with Host(lambda _: [lambda: shown.wait(30), RAN]) as host, Terminal("run", "image", "x", url=host.url) as terminal:
        fcntl.ioctl(terminal.master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 8, 0, 0))
        assert terminal.shows("running")
        shown.set()
        assert terminal.wait() == 0
    assert set(re.findall(r"\r\x1b\[K(r[^\r]*)", terminal.shown)) == {"running"}


@on_terminals
def test_an_upload_shows_on_a_terminal_how_far_it_is(tmp_path: Path) -> None:
    (tmp_path / "small.txt").write_text("content")
    with open(tmp_path / "large.bin", "wb") as file:
        file.truncate(LONG)
    shown = threading.Event()
    script: list[Any] = [[lambda sock: shown.wait(30), Do.REQUEST, STORED]] * 2
    with Peer(script) as peer, Terminal("upload", str(tmp_path), "x", url=peer.url) as terminal:
        assert terminal.shows(UPLOADING)
        shown.set()
        assert terminal.wait() == 0
    assert terminal.screen == "x/large.bin\nx/small.txt\n"


@on_terminals
def test_an_upload_shows_on_a_terminal_how_far_it_is_after_its_first_file_too(tmp_path: Path) -> None:
    for name in ("one", "other"):
        with open(tmp_path / name, "wb") as file:
            file.truncate(LONG)
    both, shown = threading.Barrier(2), threading.Event()
    begin: Any = lambda sock: both.wait(30)  # noqa: E731
    script: list[Any] = [[begin, Do.REQUEST, STORED], [begin, lambda sock: shown.wait(30), Do.REQUEST, STORED]]
    with Peer(script) as peer, Terminal("upload", str(tmp_path), "x", url=peer.url) as terminal:
        more_than_one = r"uploading: (2[4-9]|3[0-9]|4[0-7])\.[0-9] of 48\.0 MiB[^u]+"
        assert terminal.shows(f"({more_than_one}){{5}}")  # one or two may come before the first file is closed
        shown.set()
        assert terminal.wait() == 0
    assert terminal.screen == "x/one\nx/other\n"


@on_terminals
def test_a_run_shows_on_a_terminal_for_how_long_it_goes_on_and_nothing_of_that_remains() -> None:
    shown = threading.Event()
    busy = failing("503 Service Unavailable", "busy", Retry_After="0")
    script: list[Any] = [[Do.REQUEST, lambda sock: shown.wait(30), busy, Do.REQUEST, answer({**RUN, "stderr": "no"})]]
    with Peer(script) as peer, Terminal("run", "image", "x", url=peer.url) as terminal:
        assert terminal.shows(r"\r\x1b\[Krunning: [0-9]+ s")
        shown.set()
        assert terminal.wait() == 0
    assert re.fullmatch(r"boxer: POST /run: busy; trying again in 0\.\d\d s\nhi\nno", terminal.screen)


@on_terminals
@pytest.mark.parametrize("framing", ["sized", "chunked"])
def test_a_download_shows_on_a_terminal_how_far_it_is(tmp_path: Path, framing: str) -> None:
    shown, content = threading.Event(), bytes(4 * MIB)
    said = answer(content) if framing == "sized" else raw(IN_CHUNKS, body=chunks(3 * MIB, content=content))
    half = len(said) - MIB
    script: list[Any] = [[Do.REQUEST, said[:half], lambda sock: shown.wait(30), said[half:]]] * 2
    of = " of 4.0" if framing == "sized" else ""
    for local in ("here", "-"):
        shown.clear()
        with Peer(script[:1]) as peer, open(tmp_path / "out", "wb") as out:
            place = str(tmp_path / "here") if local == "here" else local
            with Terminal("download", "a", place, url=peer.url, stdout=out) as terminal:
                assert terminal.shows(rf"\r\x1b\[Kdownloading: [123]\.[0-9]{of} MiB, [0-9.]+ MiB/s, [0-9]+ s")
                shown.set()
                assert terminal.wait() == 0
        assert terminal.screen == ""
        assert (tmp_path / ("here" if local == "here" else "out")).read_bytes() == content


@on_terminals
def test_waiting_for_a_server_shows_on_a_terminal_for_how_long() -> None:
    shown = threading.Event()
    health: Any = lambda _: [WELL if shown.is_set() else failing("503 Service Unavailable")]  # noqa: E731
    with Host(health) as host, Terminal("health", "--wait", "60", url=host.url) as terminal:
        assert terminal.shows(r"\r\x1b\[Kwaiting: [0-9]+ s")
        shown.set()
        assert terminal.wait() == 0
    assert terminal.screen == "ok\n"


@on_terminals
def test_nothing_is_shown_that_is_not_wanted_or_would_be_mixed_with_a_file(tmp_path: Path) -> None:
    shown = threading.Event()
    with (
        Host(lambda request: [lambda: shown.wait(30), *respond_well(request)]) as host,
        contextlib.ExitStack() as stack,
    ):
        file = stack.enter_context(open(tmp_path / "stderr", "wb"))
        lines: list[Any] = [(("run", "-q", "image", "x"), {}), (("download", "a", "-"), {})]
        lines.append((("run", "image", "x"), {"stderr": file}))
        terminals = [stack.enter_context(Terminal(*line, url=host.url, **streams)) for line, streams in lines]
        loud = stack.enter_context(Terminal("run", "image", "x", url=host.url))
        assert loud.shows("running: 2 s")
        shown.set()
        assert [terminal.wait() for terminal in [*terminals, loud]] == [0, 0, 0, 0]
    assert [terminal.shown for terminal in terminals] == ["hi\r\n", "content", "hi\r\n"]
    assert (tmp_path / "stderr").read_bytes() == b""


@on_terminals
@with_programs
@pytest.mark.parametrize("is_json", [False, True], ids=["text", "JSON"])
def test_ctrl_c_kills_the_sandbox_and_is_130(is_json: bool) -> None:
    options = ["--json"] * is_json
    with StandIn() as server, Terminal("run", *options, "python:3.12-slim", "sleep", "29", url=server.url) as terminal:
        assert server.wait_for(lambda: server.runs_live, 60)
        assert terminal.shows("running: ")
        terminal.type(b"\x03")
        if not is_json:  # the program is on its way out when another one comes
            terminal.type(b"\x03")
        assert terminal.wait() == 130
        assert server.wait_for(lambda: server.runs_killed, 60) and server.runs == 1
    screen = terminal.screen.replace("^C", "")
    if is_json:
        error = {"type": "KeyboardInterrupt", "message": "interrupted", "status_code": None}
        assert json.loads(screen) == {"error": error}
    else:
        assert screen == ""


def test_an_interrupt_of_any_command_is_130(call_main: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert call_main("health", "--url", "http://boxer.test") == (130, b"", "")


def test_too_little_memory_is_one_line(call_main: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(BoxerClient, "run", run)
    assert call_main("run", "image", "x") == (125, b"", "boxer: not enough memory\n")


def test_the_name_of_a_file_is_shown_as_it_is(call_main: Any, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "base_url").symlink_to("nowhere")
    code, _, stderr = call_main("upload", "folder")
    assert code == 125 and "folder/base_url' is a link that leads nowhere" in stderr.replace(os.sep, "/")


# With programs that run


@in_a_sandbox
def test_a_program_runs_with_files_input_and_outputs(call_main: Any, server: Any, tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text("import sys; open('/output/n', 'w').write(input() * 2); sys.exit('done')")
    line = "--url", server.url, "run", "-i", "-f", ".", "-o", "results", PYTHON, "python3", "main.py"
    assert call_main(*line, stdin="é\n".encode()) == (1, b"", "done\n")
    assert (tmp_path / "results" / "n").read_text("utf-8") == "éé"


@in_a_sandbox
def test_a_time_limit_is_124(call_main: Any, server: Any) -> None:
    line = "run", "--url", server.url, "--time-limit", "1", PYTHON, "python3", "-c", "while True: pass"
    code, stdout, stderr = call_main(*line)
    assert (code, stdout, stderr.count("\n")) == (124, b"", 1) and stderr.startswith("boxer: execution timed out")


# ---------------------------------------------------------------------------------------------------------------------
# On the stand-in: programs run in a sandbox, from end to end
# ---------------------------------------------------------------------------------------------------------------------


def test_this_machine_has_what_its_owner_says_it_has() -> None:
    """Where BOXER_TEST_REQUIRE names a sandbox and programs, they are here: an automated run must not pass without."""
    required = os.environ.get("BOXER_TEST_REQUIRE", "").split()
    assert [name for name in required if name != WHERE and not found(name)] == []


PYTHON = "python:3.12-slim"
HELLO = [
    (PYTHON, ["python3", "-c", "print('hello world')"]),
    ("node:20-slim", ["node", "-e", "console.log('hello world')"]),
    ("perl:5.38-slim", ["perl", "-e", "print 'hello world\n'"]),
]


@in_a_sandbox
@pytest.mark.parametrize(("image", "cmd"), HELLO, ids=["Python", "Node", "Perl"])
def test_hello_world(client_of: Clients, server: Any, image: str, cmd: list[str]) -> None:
    if not REAL_URL and not shutil.which(cmd[0], path=SANDBOX_PATH):
        pytest.skip(f"{cmd[0]} is not installed on this machine")
    result = client_of(server.url).run(image=image, cmd=cmd)
    assert (result.stdout, result.stderr, result.exit_code) == ("hello world\n", "", 0)
    assert result.wall_ms > 0 and re.fullmatch("boxer-[0-9a-f-]{36}", result.exec_id)


COMPUTE = b"""import json, os
os.makedirs("/output/subdir")
json.dump({"value": 42}, open("/output/result.json", "w"))
open("/output/subdir/file.bin", "wb").write(bytes(range(256)))
"""


@in_a_sandbox
def test_files_make_the_round_trip_byte_for_byte(client_of: Clients, server: Any, names: Mapping[str, str]) -> None:
    client, script = client_of(server.url), f"{names['u']}-compute.py"
    client.upload_file(script, COMPUTE)
    result = client.run(PYTHON, ["python3", f"/{script}"], files=[script], persist=True, check=True)
    assert json.loads(client.download_file(result.output_path("result.json"))) == {"value": 42}
    assert client.download_file(f"output/{result.exec_id}/subdir/file.bin") == bytes(range(256))
    assert client.download_file(script) == COMPUTE
    with pytest.raises(BoxerAPIError, match="the path is a folder"):
        client.download_file(result.output_path("subdir"))


@in_a_sandbox
def test_a_folder_goes_into_a_run(client_of: Clients, server: Any, names: Mapping[str, str], folder: Path) -> None:
    client, remote = client_of(server.url), names["u"]
    client.upload_path(folder, remote)
    script = "import os; print(os.environ['A'], os.getcwd(), open('a/x.txt').read(), end='')"
    result = client.run(PYTHON, ["python3", "-c", script], env={"A": "é"}, cwd=f"/{remote}", files=[remote])
    assert (result.stdout, result.stderr) == (f"é /{remote} content of a/x.txt\n", "")


# Each row: a Python program, its limits, and the error it comes to.
ENDINGS: list[tuple[str, dict[str, int], type[BoxerAPIError], int, str]] = [
    ("while True: pass", {"wall_clock_secs": 1}, BoxerTimeoutError, 408, "execution timed out"),
    ("print('x' * 10485760)", {}, BoxerOutputLimitError, 507, "output limit exceeded"),
]


@in_a_sandbox
@pytest.mark.parametrize(("script", "limits", "kind", "status", "text"), ENDINGS)
def test_a_run_over_its_limit_is_an_error(
    client_of: Clients, server: Any, script: str, limits: Any, kind: type[BoxerAPIError], status: int, text: str
) -> None:
    with pytest.raises(kind, match=text) as caught:
        client_of(server.url).run(PYTHON, ["python3", "-c", script], limits=ResourceLimits(**limits))
    assert caught.value.status_code == status


@in_a_sandbox
def test_an_exit_code_is_a_result_and_an_error_where_it_is_checked(client_of: Clients, server: Any) -> None:
    client = client_of(server.url)
    cmd = ["python3", "-c", "import sys; print('out'); sys.exit('no luck')"]
    result = client.run(PYTHON, cmd)
    assert (result.exit_code, result.stdout, result.stderr, result.ok) == (1, "out\n", "no luck\n", False)
    with pytest.raises(BoxerExitError, match=r"^exit code 1: no luck$"):
        client.run(PYTHON, cmd, check=True)


@in_a_sandbox
def test_runs_go_on_at_once_on_one_client(client_of: Clients, server: Any) -> None:
    calls: list[Any] = [("run", (PYTHON, ["python3", "-c", f"print({number} ** 2)"]), {}) for number in range(6)]
    results = gather(client_of(server.url), calls)
    assert [getattr(result, "stdout", result) for result in results] == [f"{number**2}\n" for number in range(6)]


# ---------------------------------------------------------------------------------------------------------------------
# Behind nginx and HAProxy
# ---------------------------------------------------------------------------------------------------------------------


def nginx_settings(proxy: Proxy) -> str:
    """Return what a Boxer server needs of nginx: bodies of more than 1 MiB, and HTTP/1.1, to tell a whole answer.

    Runs of more than 60 s need a longer `proxy_read_timeout`, too. One whose client has gone is killed, unless
    `proxy_ignore_client_abort` is on.
    """
    tls = f"ssl_certificate {proxy.pem}; ssl_certificate_key {proxy.pem};" if proxy.pem else ""
    return nginx_main(f"""
        client_max_body_size 0; proxy_http_version 1.1;
        gzip on; gzip_proxied any; gzip_types *; gzip_min_length 1;
        server {{
            listen 127.0.0.1:{proxy.port} {"ssl" if tls else ""}; {tls}
            {proxy.settings}
            location / {{ proxy_pass {proxy.server_url}; }}
        }}""")


def nginx_main(http: str) -> str:
    """Return what stands around the settings within `http`, so that nginx stays in its folder."""
    folders = " ".join(f"{name}_temp_path {name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    return f"""
        daemon off; pid nginx.pid; error_log stderr; {"user root;" if os.getuid() == 0 else ""}
        events {{}}
        http {{
            access_log off; {folders}
            {http}
        }}"""


def haproxy_settings(proxy: Proxy) -> str:
    """Return what a Boxer server needs of HAProxy: `abortonclose`, or a run whose client has gone is not killed.

    Runs that take longer need a longer `timeout server`; `timeout client` does not count while they go on.
    """
    # One thread, so that things happen in the order in which they are due.
    return f"""
global
    nbthread 1
    maxconn 200
defaults
    mode http
    option abortonclose
    timeout connect 30s
    timeout client 30s
    timeout server 30s
    compression algo gzip
listen boxer
    bind fd@{proxy.listener.fileno()} {f"ssl crt {proxy.pem}" if proxy.pem else ""}
    {proxy.settings}
    server boxer {urllib.parse.urlsplit(proxy.server_url).netloc}
"""


SETTINGS = {"nginx": nginx_settings, "haproxy": haproxy_settings}


class Proxy:
    """nginx or HAProxy, in front of a server; a context manager.

    It is handed a socket that listens already: nobody else can take its port, and nobody comes too early.
    `settings` are those of nginx's `server` and of HAProxy's `listen`; each takes its own.
    """

    def __init__(self, name: str, folder: Path, server_url: str, pem: str = "", **settings: str) -> None:
        self.name, self.folder, self.server_url, self.pem = name, folder, server_url, pem
        self.settings = settings.get(name, "")
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)  # as nginx expects of a socket that it inherits
        self.port = self.listener.getsockname()[1]
        self.url = f"http{'s' if pem else ''}://127.0.0.1:{self.port}"
        self.log = folder / "log"
        self.processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Proxy:
        (self.folder / "settings").write_text(self.all_settings())
        self.start("-t" if self.name == "nginx" else "-c")  # says what is wrong with the settings, and ends
        assert self.processes.pop().wait() == 0, self.log.read_text()
        self.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        is_up = self.processes[-1].poll() is None
        for process in self.processes:
            self.end(process)
        self.listener.close()
        if kind is not None or not is_up:
            print(self.name, self.log.read_text())
        assert is_up or kind is not None, f"{self.name} has ended by itself"

    def all_settings(self) -> str:
        return SETTINGS[self.name](self)

    def start(self, *options: str) -> None:
        number = self.listener.fileno()
        arguments = {"nginx": ["-p", str(self.folder), "-c", "settings"], "haproxy": ["-db", "-f", "settings"]}
        environment = {**os.environ, "NGINX": f"{number};"}  # as nginx hands its sockets on to the next nginx
        with open(self.log, "ab") as log:
            process = subprocess.Popen(
                [found(self.name) or self.name, *arguments[self.name], *options],
                cwd=self.folder,
                env=environment,
                pass_fds=[number],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.processes.append(process)

    def end(self, process: subprocess.Popen[bytes]) -> None:
        while process.poll() is None:  # again and again: nginx can miss a signal while it starts
            process.terminate()
            threading.Event().wait(0.01)

    def restart(self) -> None:
        """Close all connections."""
        self.end(self.processes[-1])
        self.start()

    def reload(self) -> None:
        """Begin anew, and let the old process answer what it was asked before."""
        self.start()
        self.processes[-2].send_signal(signal.SIGQUIT if self.name == "nginx" else signal.SIGUSR1)


@pytest.fixture(params=SETTINGS)
def proxy_of(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Proxy]:
    """Put a proxy in front of a server, `proxy_of(server_url, nginx="its settings;", haproxy="its settings")`."""
    if not found(request.param):
        pytest.skip(f"{request.param} is not installed on this machine")
    return lambda *args, **settings: Proxy(request.param, Path(tempfile.mkdtemp(dir=tmp_path)), *args, **settings)


@pytest.fixture(scope="session")
def pem(ca: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Make a file of a certificate and its key, as both proxies read it."""
    path = tmp_path_factory.mktemp("certificate") / "proxy.pem"
    ca.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(path))
    return str(path)


TWICE = ["sh", "-c", "cat /in.bin /in.bin > /output/out.bin; echo hello; seq 5000 >&2"]


@with_programs
@pytest.mark.parametrize("is_tls", [False, True], ids=["plain", "TLS"])
def test_every_call_works_through_a_proxy(
    client_of: Clients, proxy_of: Any, ca: trustme.CA, pem: str, is_tls: bool
) -> None:
    content = os.urandom(4 * MIB)
    with StandIn() as server, proxy_of(server.url, pem if is_tls else "") as proxy:
        client = client_of(proxy.url, ssl_context=trusting(ca) if is_tls else None)
        assert client.health()
        client.upload_file("in.bin", content)
        result = client.run("python:3.12-slim", TWICE, files=["in.bin"], persist=True, check=True)
        assert (result.stdout, result.stderr) == ("hello\n", "".join(f"{n}\n" for n in range(1, 5001)))
        assert client.download_file(result.output_path("out.bin")) == content * 2
        client.upload_file("anew.bin", Unseekable(content))
        assert client.download_file("anew.bin") == content
        assert server.runs == 1


SLEEP: Call = ("run", ("python:3.12-slim", ["sleep", "29"]), {})


@with_programs
def test_a_run_that_outlasts_a_proxys_patience_is_a_504_and_is_not_sent_again(
    client_of: Clients, proxy_of: Any
) -> None:
    short = {"nginx": "proxy_read_timeout 200ms;", "haproxy": "timeout server 200ms"}
    with StandIn() as server, proxy_of(server.url, **short) as hasty, proxy_of(server.url) as patient:
        assert is_own_page(outcome(client_of(hasty.url), SLEEP), 504, "Gateway Time-out")
        assert server.wait_for(lambda: server.runs_killed, 60) and server.runs == 1
        assert client_of(patient.url).run("python:3.12-slim", ["sleep", "0.4"]).ok


def is_own_page(got: Any, status: int, phrase: str) -> bool:
    """Say whether this is the error for a proxy's own page: it begins with what that says, as one line without tags."""
    page = rf"{status} {phrase}: {status} {phrase} (nginx/[0-9.]+|[A-Z][^<>\n]+\.)"
    return is_expected(got, refusal(status)) and re.match(page, str(got)) is not None and str(got).isprintable()


@with_programs
@pytest.mark.parametrize("is_tls", [False, True], ids=["plain", "TLS"])
def test_a_run_that_is_broken_off_is_killed_behind_a_proxy(
    client_of: Clients, proxy_of: Any, ca: trustme.CA, pem: str, is_tls: bool
) -> None:
    with StandIn() as server, proxy_of(server.url, pem if is_tls else "") as proxy:
        client = client_of(proxy.url, ssl_context=trusting(ca) if is_tls else None)
        error = broken_off(client, SLEEP, lambda: server.wait_for(lambda: server.runs_live, 60))
        assert isinstance(error, (asyncio.CancelledError, BoxerConnectionError))
        assert server.wait_for(lambda: server.runs_killed, 60) and server.runs == 1


def broken_off(client: Any, call: Call, wait_until_it_goes_on: Callable[[], object]) -> Any:
    """Make a call and break it off: cancel its task, or close the client from another thread; return its error."""

    async def main() -> Any:
        task = asyncio.ensure_future(do(client.client, call))
        await asyncio.get_running_loop().run_in_executor(None, wait_until_it_goes_on)
        task.cancel()
        return (await asyncio.gather(task, return_exceptions=True))[0]

    if isinstance(client, PlainCalls):
        return client.loop.run_until_complete(main())
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(do, client, call)
        wait_until_it_goes_on()
        client.close()
        return future.exception()


def wait_out_keepalive(proxy: Proxy) -> None:
    """Have two connections of our own closed for idleness, one after the other; older ones are closed by then."""
    for _ in range(2):
        with Wire(proxy.url) as wire:
            wire.socket.sendall(get("/healthz"))
            assert wire.file.read().endswith(b"}")


# Ways in which a proxy closes a connection between two calls: settings for both, and what makes it happen.
CLOSES: dict[str, tuple[dict[str, str], Callable[[Proxy], None]]] = {
    "it was idle": (
        {"nginx": "keepalive_timeout 100ms;", "haproxy": "timeout http-keep-alive 100ms"},
        wait_out_keepalive,
    ),
    "one call was all": ({"nginx": "keepalive_requests 1;", "haproxy": "option httpclose"}, lambda proxy: None),
    "restart": ({}, Proxy.restart),
}


@pytest.mark.parametrize("why", CLOSES)
def test_a_connection_that_a_proxy_has_closed_disturbs_no_run(client_of: Clients, proxy_of: Any, why: str) -> None:
    settings, close = CLOSES[why]
    with Host(lambda request: [RAN if "/run" in request.line else WELL]) as host:
        with proxy_of(host.url, **settings) as proxy:
            client = client_of(proxy.url, retries=0)
            assert client.run("image", ["true"]) == RESULT
            close(proxy)
            assert client.run("image", ["true"]) == RESULT
        assert sum("/run" in request.line for request in host.seen) == 2


def test_a_reload_of_a_proxy_during_a_run_disturbs_none(client_of: Clients, proxy_of: Any) -> None:
    with Host(lambda request: [proxy.reload, RAN]) as host:
        with proxy_of(host.url) as proxy:
            client = client_of(proxy.url, retries=0)
            for _ in range(2):
                assert client.run("image", ["true"]) == RESULT
                proxy.processes[-2].wait()
        assert len(host.seen) == 2


@pytest.mark.parametrize("call", [RUN_IT, PUT_FILE, DOWNLOAD], ids=["run", "upload", "download"])
def test_a_post_that_a_server_dies_of_behind_a_proxy_is_sent_once(
    client_of: Clients, proxy_of: Any, call: Call
) -> None:
    with Host(lambda request: [WELL] if "/healthz" in request.line else [Do.FIN]) as host:
        with proxy_of(host.url) as proxy:
            fresh, used = client_of(proxy.url), client_of(proxy.url)
            assert is_own_page(outcome(fresh, call), 502, "Bad Gateway")
            assert used.health()
            got = outcome(used, call)
        # HAProxy says 502 to the first request of a connection alone. At a later one it closes the connection without
        # a word, for the client to send the request once more; which is done with a download, over a new connection.
        is_silent = proxy.name == "haproxy" and call is not DOWNLOAD and is_expected(got, lost())
        assert is_silent or is_own_page(got, 502, "Bad Gateway")
        assert len(host.seen) == 3 or call is DOWNLOAD


def test_a_proxy_without_a_server_says_502_or_503_and_the_latter_is_tried_again(
    client_of: Clients, proxy_of: Any, clock: Clock
) -> None:
    with proxy_of(refused_url(), haproxy="retries 0") as proxy:
        got, is_nginx = outcome(client_of(proxy.url), RUN_IT), proxy.name == "nginx"
        assert len(clock.pauses) == (0 if is_nginx else 2)
    assert is_own_page(got, *((502, "Bad Gateway") if is_nginx else (503, "Service Unavailable")))


# Who refuses uploads of 64 MiB, and how: the proxies' settings, the server's own limit, and how many there are.
DENIAL = "http-request deny deny_status 413 if { req.body_size gt 1048576 }"
TOO_LARGE: dict[str, tuple[str, str, int | None, int]] = {
    "the proxy": ("client_max_body_size 1m;", DENIAL, None, 10),
    "the proxy, and resets": ("client_max_body_size 1m; lingering_close off;", DENIAL, None, 10),
    "the server": ("proxy_request_buffering off;", "", MIB, 10),
    "the server, once nginx has it all": ("", "", MIB, 2),
}


@pytest.mark.parametrize("who", TOO_LARGE)
def test_a_413_behind_a_proxy_arrives(client_of: Clients, proxy_of: Any, who: str, large_file: Path) -> None:
    nginx, haproxy, limit, times = TOO_LARGE[who]
    settings = {"nginx": nginx, "haproxy": haproxy}
    with StandIn(upload_limit=limit or 100 * MIB) as server, proxy_of(server.url, **settings) as proxy:
        client = client_of(proxy.url)
        for got in itertools.islice(uploads(client, large_file), times):
            if limit:
                assert is_expected(got, refusal(413, "upload exceeds limit")), got
            else:
                assert is_own_page(got, 413, "(Request Entity|Payload) Too Large"), got
        assert client.health()


@pytest.mark.parametrize("cut", [raw(IN_CHUNKS, body=chunks(80)[:-5]), answer(RUN)[:-1]], ids=["chunked", "sized"])
def test_an_answer_cut_off_behind_a_proxy_is_no_answer(client_of: Clients, proxy_of: Any, cut: bytes) -> None:
    with Host(lambda request: [WELL] if "/healthz" in request.line else [cut, Do.FIN]) as host:
        with proxy_of(host.url) as proxy:
            client = client_of(proxy.url, retries=0)
            for call in (RUN_IT, DOWNLOAD):
                assert is_expected(outcome(client, call), lost("within the content"))
                assert client.health()
        assert sum("/run" in request.line for request in host.seen) == 1


# Several servers, behind what the README configures


class Balancer(Proxy):
    """nginx or HAProxy as the README has it, in front of two servers. Runs may be `longest`, instead of ten minutes."""

    def __init__(self, name: str, folder: Path, servers: tuple[StandIn, StandIn], longest: str) -> None:
        super().__init__(name, folder, "")
        self.servers, self.longest = servers, longest

    def all_settings(self) -> str:
        is_nginx, [block] = self.name == "nginx", blocks(self.name)
        settings = str(block.values[0])
        changes = {"listen 80": f"listen 127.0.0.1:{self.port}"} if is_nginx else {}
        changes = changes or {"bind :80": f"bind fd@{self.listener.fileno()}"}
        changes.update({f"10.0.0.{n}:8080": f"127.0.0.1:{server.port}" for n, server in enumerate(self.servers, 1)})
        changes["600s"] = self.longest
        for example, own in changes.items():
            assert settings.count(example) == 1, example
            settings = settings.replace(example, own)
        return nginx_main(settings) if is_nginx else settings


@pytest.fixture(params=SETTINGS)
def balancer(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Callable[..., contextlib.AbstractContextManager[Balancer]]:
    """Put a proxy in front of two servers: `with balancer() as proxy`; it has a `url`, and the `servers`."""
    if not found(request.param):
        pytest.skip(f"{request.param} is not installed on this machine")

    @contextlib.contextmanager
    def balanced(longest: str = "600s") -> Iterator[Balancer]:
        with contextlib.ExitStack() as stack:
            # nginx says `Host: boxer` to both.
            one, two = (stack.enter_context(StandIn(allowed_hosts=["boxer"])) for _ in range(2))
            balancer = Balancer(request.param, tmp_path, (one, two), longest)
            stack.enter_context(balancer)
            yield balancer

    return balanced


def test_calls_with_one_value_of_the_header_reach_one_server_and_all_values_both(
    client_of: Clients, balancer: Any
) -> None:
    values = [f"task-{number}" for number in range(20)]
    with balancer() as proxy:
        for value in values:
            client = client_of(proxy.url, headers={"X-Boxer-Store": value})
            for name in "abc":
                client.upload_file(f"{value}/{name}", b"")
        stored = [server.store.uploads() for server in proxy.servers]
    assert sorted(stored[0] + stored[1]) == sorted(f"{value}/{name}" for value in values for name in ["", *"abc"])
    assert all(len(paths) % 4 == 0 and len(paths) >= 3 * 4 for paths in stored)


def test_calls_without_the_header_reach_both_servers(client_of: Clients, balancer: Any) -> None:
    with balancer() as proxy:
        client = client_of(proxy.url)
        assert all(client.health() for _ in range(20))
        assert all(len(server.requests) >= 3 for server in proxy.servers)


@with_programs
def test_of_several_servers_a_run_reaches_the_one_that_has_its_file_and_a_download_that_of_the_run(
    client_of: Clients, balancer: Any
) -> None:
    content = os.urandom(4 * MIB)
    with balancer() as proxy:
        for value in "abcdefgh":
            client = client_of(proxy.url, headers={"X-Boxer-Store": value})
            client.upload_file("in.bin", content)
            result = client.run("python:3.12-slim", TWICE, files=["in.bin"], persist=True, check=True)
            assert client.download_file(result.output_path("out.bin")) == content * 2
        assert sum(server.runs for server in proxy.servers) == 8


def the_server_of(client: Any, servers: Iterable[StandIn]) -> StandIn:
    client.upload_file("a", b"")
    [server] = [server for server in servers if server.store.uploads()]
    return server


@with_programs
def test_of_several_servers_the_one_that_runs_what_is_broken_off_kills_it(client_of: Clients, balancer: Any) -> None:
    with balancer() as proxy:
        client = client_of(proxy.url, headers={"X-Boxer-Store": "mine"})
        server = the_server_of(client, proxy.servers)
        error = broken_off(client, SLEEP, lambda: server.wait_for(lambda: server.runs_live, 60))
        assert isinstance(error, (asyncio.CancelledError, BoxerConnectionError))
        assert server.wait_for(lambda: server.runs_killed, 60) and server.runs == 1


@with_programs
def test_of_several_servers_one_whose_run_took_too_long_still_gets_its_calls(client_of: Clients, balancer: Any) -> None:
    with balancer(longest="200ms") as proxy:
        client = client_of(proxy.url, headers={"X-Boxer-Store": "mine"})
        server = the_server_of(client, proxy.servers)
        assert is_own_page(outcome(client, SLEEP), 504, "Gateway Time-out")
        client.upload_file("b", b"")
        assert server.store.uploads() == ["a", "b"]


# ---------------------------------------------------------------------------------------------------------------------
# Work that a call takes, counted in what does not vary between machines
# ---------------------------------------------------------------------------------------------------------------------

RUNS = """
import asyncio, os, sys
from boxer import AsyncBoxerClient, BoxerClient

def run(url):
    with BoxerClient(url) as client:
        for number in range(13):
            if number == 3:
                os.write(1, b"begin")
            client.run("image", ["true"])
        os.write(1, b"end")

async def run_async(url):
    async with AsyncBoxerClient(url) as client:
        for number in range(13):
            if number == 3:
                os.write(1, b"begin")
            await client.run("image", ["true"])
        os.write(1, b"end")

kind, url = sys.argv[1:]
run(url) if kind == "sync" else asyncio.run(run_async(url))
"""


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed on this machine")
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # whether the connection is still good, the request, the wait, the answer
        ("sync", {"poll": 2, "sendto": 1, "recvfrom": 1}),
        # the same, but that the wait is the loop's, which goes round a second time to let the task go on
        ("async", {"poll": 1, "sendto": 1, "epoll_wait": 2, "recvfrom": 1}),
    ],
)
def test_a_run_on_a_kept_connection_takes_so_many_system_calls(
    tmp_path: Path, kind: str, expected: dict[str, int]
) -> None:
    trace = tmp_path / "trace"
    calls = "trace=%network,poll,ppoll,select,pselect6,epoll_wait,epoll_pwait,epoll_ctl,ioctl,fcntl,futex,write"
    with Host(lambda _: [RAN]) as host:
        under = [shutil.which("strace") or "", "-f", "-qq", "-e", "signal=none", "-e", calls, "-o", str(trace)]
        program_beside_boxer(tmp_path, RUNS, kind, host.url, under=under)
    lines = trace.read_text().partition('"begin"')[2].partition('"end"')[0].splitlines()[1:-1]
    names = collections.Counter(
        re.findall(r"^\d+ +(?:\w*?p)??(poll|epoll_p?wait|\w+)\(", "\n".join(lines), re.MULTILINE)
    )
    names = collections.Counter({name.replace("pwait", "wait"): count for name, count in names.items()})
    assert names == {name: 10 * count for name, count in expected.items()}
    assert host.connections == 1


def test_a_run_on_a_kept_connection_waits_once() -> None:
    async def main() -> None:
        async with AsyncBoxerClient(host.url) as client:
            await client.run("image", ["true"])
            call = client.run("image", ["true"])
            await asyncio.wait([call.send(None)])  # what it waits for, as a task does
            with pytest.raises(StopIteration):
                call.send(None)

    with Host(lambda _: [RAN]) as host:
        asyncio.run(main())


def test_a_call_of_many_at_once_takes_no_more_than_one_of_few() -> None:
    async def calls_of(count: int) -> float:
        async with AsyncBoxerClient(host.url, max_connections=5) as client:
            await client.health()
            with Counting() as counting:
                await asyncio.gather(*[client.run("image", ["true"]) for _ in range(count)])
        return counting.calls / count

    with Host(lambda request: [RAN if "/run" in request.line else WELL]) as host:
        few, many = asyncio.run(calls_of(100)), asyncio.run(calls_of(2_000))
    assert host.connections == 2 * 5
    assert many <= 1.1 * few


TRANSFERS = """
import asyncio, sys, tracemalloc
from boxer import AsyncBoxerClient, BoxerClient

def transfer(url):
    with BoxerClient(url) as client, open("large", "rb") as file:
        client.health()
        tracemalloc.start()
        client.upload_file("large", file)
        up = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak() if hasattr(tracemalloc, "reset_peak") else None
        content = client.download_file("large")
        return up, tracemalloc.get_traced_memory()[1] - len(content)

async def transfer_async(url):
    async with AsyncBoxerClient(url) as client:
        with open("large", "rb") as file:
            await client.health()
            tracemalloc.start()
            await client.upload_file("large", file)
        up = tracemalloc.get_traced_memory()[1]
        content = await client.download_file("large")
        return up, tracemalloc.get_traced_memory()[1] - len(content)

kind, url = sys.argv[1:]
print(*(transfer(url) if kind == "sync" else asyncio.run(transfer_async(url))))
"""


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_file_is_in_memory_once_when_it_is_received_and_not_at_all_when_it_is_sent(tmp_path: Path, kind: str) -> None:
    content = os.urandom(MIB) * 64
    (tmp_path / "large").write_bytes(content)
    said = {"GET /healthz": [WELL], "POST /files": [STORED], "GET /files?path=large": [answer(content)]}
    with Host(lambda request: said[request.line.rpartition(" ")[0]]) as host:
        up, down = map(int, program_beside_boxer(tmp_path, TRANSFERS, kind, host.url).split())
    assert up < 10 * MIB  # a few times the 2 MiB that are read at a time
    # Of what is received, an eighth of room to grow is asked for, most of which the system never gives.
    assert down < (64 / 8 + 3) * MIB


# ---------------------------------------------------------------------------------------------------------------------
# Copies of boxer.py, and the installed package
# ---------------------------------------------------------------------------------------------------------------------

HERE = Path(__file__).parent


def test_what_is_tested_is_boxer_py_and_in_tox_what_its_wheel_installed() -> None:
    assert Path(boxer.__file__).read_bytes() == (HERE / "boxer.py").read_bytes()
    assert [name for name, it in sys.modules.items() if {"BoxerClient", "__version__"} <= set(dir(it))] == ["boxer"]
    if "TOX_ENV_DIR" in os.environ:
        assert Path(boxer.__file__) == Path(sysconfig.get_path("purelib"), "boxer", "__init__.py")


def test_nothing_happens_when_the_module_is_imported(tmp_path: Path) -> None:
    code = """
import logging, os, sys, threading, boxer
del sys.modules["boxer"]
os.environ = os.environb = os.getenv = None  # an attempt to read the environment fails
import boxer
print(logging.root.handlers, *(type(it).__name__ for it in logging.getLogger("boxer").handlers))
print(logging.root.level, logging.getLogger("boxer").level, threading.active_count())
"""
    assert program_beside_boxer(tmp_path, code) == "[] NullHandler NullHandler\n30 0 1\n"


def test_what_is_logged_is_not_shown_unless_the_program_asks_for_it(tmp_path: Path) -> None:
    code = """
import sys, boxer
with boxer.BoxerClient(sys.argv[1]) as client:
    print(client.health(retries=1))
"""
    with Host(lambda _: [failing("503 Service Unavailable")]) as host:
        assert program_beside_boxer(tmp_path, code, host.url) == "False\n"
        assert len(host.seen) == 2


USING = """
import asyncio, sys
from {module} import AsyncBoxerClient, BoxerClient

async def main():
    async with AsyncBoxerClient(sys.argv[1]) as client:
        return await client.run("image", ["true"])

with BoxerClient(sys.argv[1]) as client:
    assert client.run("image", ["true"]) == asyncio.run(main())
print(sys.modules["{module}"].__file__, end="")
"""


def app_with_a_copy(app: Path, module: str, code: str) -> None:
    """Make a folder that Python runs, with a copy of the client as a module of it."""
    copy = app.joinpath(*module.split(".")).with_suffix(".py")
    copy.parent.mkdir(parents=True)
    for package in list(copy.parents)[: module.count(".")]:
        (package / "__init__.py").touch()
    shutil.copy(boxer.__file__, copy)
    (app / "__main__.py").write_text(code, "utf-8")


@pytest.mark.parametrize("how", ["-O", "-I -S", "in a package", "in a zipapp", "in a read-only folder"])
def test_a_copy_works_wherever_it_lies_and_however_python_starts(tmp_path: Path, how: str) -> None:
    app, under = tmp_path / "app", list[str]()
    module = "mypkg._vendor.boxer" if how == "in a package" else "boxer"
    app_with_a_copy(app, module, USING.format(module=module))
    if how == "in a zipapp":
        zipapp.create_archive(app, tmp_path / "app.pyz")
        app = tmp_path / "app.pyz"
    if how == "in a read-only folder":
        app.chmod(0o500)
        if os.access(app, os.W_OK):  # root may write to any folder, unless it gives that up
            under = ["setpriv", "--bounding-set=-dac_override"]
    options = how.split() if how.startswith("-") else ["-E"]
    with Host(lambda _: [RAN]) as host:
        line = [*under, sys.executable, "-W", "error", *options, str(app), host.url]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert app in Path(done.stdout).parents
    assert how != "in a read-only folder" or not (app / "__pycache__").exists()


def test_what_the_package_around_a_copy_raises_leaves_as_it_is(tmp_path: Path) -> None:
    """As where a signal handler of it interrupts a look-up: see the tests of signal handlers."""
    code = """
import socket
from mypkg._vendor.boxer import BoxerClient

def look_up(*_, **__):
    raise TimeoutError("the package's own alarm")

socket.getaddrinfo = look_up
with BoxerClient("http://boxer.test", retries=0) as client:
    try:
        client.health()
    except TimeoutError as error:
        print(error)
"""
    app_with_a_copy(tmp_path / "app", "mypkg._vendor.boxer", "import mypkg.program")
    (tmp_path / "app/mypkg/program.py").write_text(code, "utf-8")
    line = [sys.executable, "-W", "error", str(tmp_path / "app")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert (done.stderr, done.stdout) == ("", "the package's own alarm\n")


def test_the_file_names_its_version_licence_and_source() -> None:
    text = Path(boxer.__file__).read_text("utf-8")
    for line in (f'__version__ = "{boxer.__version__}"', "# SPDX-License-Identifier: Apache-2.0", "# Source: https://"):
        assert f"\n{line}" in text


# ---------------------------------------------------------------------------------------------------------------------
# README: its examples are run, and its lists are compared with what there is
# ---------------------------------------------------------------------------------------------------------------------

README = (HERE / "README.md").read_text("utf-8")
EXAMPLES_FOLDER = HERE / ".examples"
of_a_checkout = pytest.mark.skipif(not EXAMPLES_FOLDER.is_dir(), reason="the folder of examples is not here")


def blocks(language: str) -> list[Any]:
    """Give the README's code blocks of a language, each by the title it stands under."""
    pattern = rf"^#+ (?P<title>[^\n]+)|^```{language}\n(?P<block>.*?)^```$|^```.*?^```$"
    title, found = "", []
    for match in re.finditer(pattern, README, re.DOTALL | re.MULTILINE):
        title = match["title"] or title
        if match["block"] is not None:
            found.append(pytest.param(match["block"], id=title))
    return found


def python_beside_boxer(folder: Path, url: str, *line: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder with copies of the client and the examples, where BOXER_URL names a server."""
    shutil.copy(boxer.__file__, folder / "boxer.py")
    for example in EXAMPLES_FOLDER.glob("*.py"):
        shutil.copy(example, folder)
    program = [sys.executable, "-E", "-W", "error", *line]
    environment = {**os.environ, "BOXER_URL": url}
    return subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def assert_prints_what_it_says(printed: str, code: str) -> None:
    """Compare what a program printed with its comments; … in them stands for anything."""
    expected = "".join(f"{line}\n" for line in re.findall(r"# prints: (.*)$", code, re.MULTILINE))
    assert re.fullmatch(re.escape(expected).replace("…", ".+"), printed), printed


def skip_without_languages(code: str) -> None:
    for name in ("node", "perl"):
        if f'"{name}"' in code and not REAL_URL and not shutil.which(name, path=SANDBOX_PATH):
            pytest.skip(f"{name} is not installed on this machine")


@in_a_sandbox
@pytest.mark.parametrize("code", blocks("python"))
def test_an_example_of_the_readme_prints_what_it_says(server: Any, code: str, tmp_path: Path) -> None:
    skip_without_languages(code)
    (tmp_path / "example.py").write_text(code.replace("http://localhost:8080", server.url), "utf-8")
    if "tqdm" in code:
        pytest.importorskip("tqdm")
        done = python_beside_boxer(tmp_path, server.url, "example.py")
        assert re.search(r"\bup: 100%.*\bdown: [1-9]", done.stderr, re.DOTALL), done.stderr
        done.stderr = ""
    else:  # without any installed package, as the README promises
        done = python_beside_boxer(tmp_path, server.url, "-S", "example.py")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert_prints_what_it_says(done.stdout, code)


@of_a_checkout
@in_a_sandbox
@pytest.mark.parametrize("name", ["agent_tool.py", "web_handler.py"])
def test_an_example_prints_what_it_says(server: Any, name: str, tmp_path: Path) -> None:
    done = python_beside_boxer(tmp_path, server.url, "-S", name)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert_prints_what_it_says(done.stdout, (EXAMPLES_FOLDER / name).read_text("utf-8"))


@of_a_checkout
def test_the_example_of_tests_needs_no_server(tmp_path: Path) -> None:
    done = python_beside_boxer(tmp_path, "http://192.0.2.1", "-S", "-m", "unittest", "test_my_code.py")
    assert done.returncode == 0 and re.search(r"^Ran 4 tests .*^OK$", done.stderr, re.DOTALL | re.MULTILINE)


# Each row: a program that adds two numbers, or not, and the line that the example of a judge says of it.
SUBMISSIONS = {
    "adds": ("print(sum(map(int, input().split())))", "adds.py              accepted"),
    "divides": ("print(1 // 0)", "divides.py           runtime error  1      exit code 1: ZeroDivisionError: …"),
    "floods": ("while True: print('x' * 999)", "floods.py            output limit   1      begins with 'xxx…'"),
    "five": ("print(5)", "five.py              wrong answer   2      printed '5\\n'"),
    "loops": (
        "print('begun')\nwhile 1: pass",
        "loops.py             time limit     1      printed until then: 'begun\\n'",
    ),
}


@of_a_checkout
@in_a_sandbox
def test_the_example_of_a_judge_prints_a_table_of_verdicts(server: Any, tmp_path: Path) -> None:
    for folder in ("problem", "submissions"):
        (tmp_path / folder).mkdir()
    for name, (asked, answered) in {"1": ("2 3\n", "5\n"), "2": ("-4 4\n", "0\n")}.items():
        (tmp_path / f"problem/{name}.in").write_text(asked)
        (tmp_path / f"problem/{name}.out").write_text(answered)
    for name, (code, _) in SUBMISSIONS.items():
        (tmp_path / f"submissions/{name}.py").write_text(code)
    done = python_beside_boxer(tmp_path, server.url, "-S", "judge.py", "problem", "submissions")
    assert (done.returncode, done.stderr) == (0, "")
    assert_prints_what_it_says(
        done.stdout, "\n".join(f"# prints: {SUBMISSIONS[name][1]}" for name in sorted(SUBMISSIONS))
    )


@of_a_checkout
@pytest.mark.parametrize("words", [["judge.py"], ["judge.py", "none", "none"], ["batch.py", "one"]], ids=" ".join)
def test_an_example_says_what_it_lacks(tmp_path: Path, words: list[str]) -> None:
    done = python_beside_boxer(tmp_path, refused_url(), "-S", *words)
    assert (done.returncode, done.stdout) == (1, "") and re.fullmatch("(usage: |there is no ).+\n", done.stderr)


def test_a_file_that_is_written_as_the_readme_says_hides_no_module_of_python() -> None:
    """What lies beside a program comes before the standard library, and may have come from a sandbox."""
    names = set(re.findall(r"\b(\w+)\.py\b", README)) | {path.stem for path in (HERE / ".examples").glob("*.py")}
    known: Iterable[str] = getattr(sys, "stdlib_module_names", ())  # from Python 3.10 on
    assert not names.intersection(known), names.intersection(known)


@of_a_checkout
@in_a_sandbox
def test_the_example_of_a_batch_goes_on_where_it_stopped(server: Any, tmp_path: Path) -> None:
    def start() -> bytes:
        done = python_beside_boxer(tmp_path, server.url, "-S", "batch.py", "tasks.jsonl", "results.jsonl")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        return results.read_bytes()

    results, tasks = tmp_path / "results.jsonl", tmp_path / "tasks.jsonl"
    # What a program prints tells its run from any other.
    code = "import os, sys; print(os.urandom(8).hex()); sys.exit({})"
    tasks.write_text("".join(json.dumps({"id": f"n{n}", "code": code.format(n)}) + "\n" for n in range(6)))
    whole = start()
    first = whole.splitlines(keepends=True)
    results.write_bytes(b"".join(first[:3]) + first[3][:-9])  # stopped in the middle of a line
    again = start()
    assert again.startswith(b"".join(first[:3])) and not set(again.splitlines()[3:]) & set(whole.splitlines())
    assert start() == again
    said = [json.loads(line) for line in again.splitlines()]
    assert sorted((it["id"], it["exit_code"], len(it["stdout"])) for it in said) == [(f"n{n}", n, 17) for n in range(6)]


@in_a_sandbox
def test_the_command_lines_of_the_readme_print_what_they_say(server: Any, tmp_path: Path) -> None:
    lines = [block.values[0] for block in blocks("sh") if block.id == "Command line"]
    (tmp_path / "boxer").write_text(f'#!/bin/sh\nexec {shlex.join(command_line())} "$@"\n')
    (tmp_path / "boxer").chmod(0o700)
    environment = {**os.environ, "BOXER_URL": server.url, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    shell = ["/bin/sh", "-e", "-c", "".join(lines)]
    done = subprocess.run(shell, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    expected = "".join(f"{line}\n" for line in re.findall(r"# prints: (.*)$", "".join(lines), re.MULTILINE))
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert lines and re.fullmatch(re.escape(expected).replace("…", ".+"), done.stdout), done.stdout


def command(subcommand: str) -> list[str]:
    """Give the README's command line of test_boxer.py, for this Python without installed packages, at a free port."""
    lines = [line for block in blocks("sh") for line in block.values[0].splitlines()]
    [line] = [line for line in lines if f"test_boxer.py {subcommand}" in line]
    program, *arguments = line.replace("8080", "0").split()
    assert program == "python3"
    return [sys.executable, "-E", "-S", "-W", "error", *arguments]


def test_the_demo_of_the_readme_needs_no_package() -> None:
    done = subprocess.run(command("demo"), cwd=HERE, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Programs run in: " in done.stdout and "Hello from Python" in done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.skipif(not (HERE / ".bench").is_dir(), reason="the soak is not here")
def test_a_short_soak_finds_nothing() -> None:
    program = [sys.executable, "-W", "error", ".bench/soak.py", "--minutes", "0.02"]
    # What it covers is not counted, since counting slows it down.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    environment["BOXER_URL"] = ""
    done = subprocess.run(program, cwd=HERE, env=environment, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    end = r"\n\d+ s, [\d,]+ calls, [\d,]+ faults in \d+ kinds: 0 wrong, 0 lost, 0 leaked\n"
    assert re.search(end + r"\Z", done.stdout), done.stdout


@in_a_sandbox
@of_the_stand_in
def test_the_stand_in_of_the_readme_says_where_it_is_and_serves_until_it_is_interrupted() -> None:
    with subprocess.Popen(command("serve"), cwd=HERE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            url = re.fullmatch(r"export BOXER_URL=(.+)\n", process.stdout.readline())
            assert url
            with boxer.BoxerClient(url[1]) as client:
                assert client.health()
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) == 0
        finally:
            process.kill()


@pytest.mark.skipif(os.name == "nt", reason="these are commands of Unix")
@pytest.mark.parametrize("start", ["cp boxer.py", "sha256sum --check"])
def test_a_command_of_the_readme_works(start: str, tmp_path: Path) -> None:
    """What needs a network, hatchling or tox is not among them; `.ci/run` runs the command of the tests."""
    [line] = [block.values[0] for block in blocks("sh") if block.values[0].startswith(start)]
    if not shutil.which(line.split()[0]):
        pytest.skip(f"{line.split()[0]} is not installed on this machine")
    content = Path(boxer.__file__).read_bytes()
    (tmp_path / "boxer.py").write_bytes(content)
    (tmp_path / "my-project").mkdir()
    sums = [f"{hashlib.sha256(content).hexdigest()}  boxer.py", f"{'0' * 64}  boxer_sdk-1.0.0.tar.gz"]
    (tmp_path / "SHA256SUMS").write_text("".join(f"{line}\n" for line in sums))
    environment = {**os.environ, "HOME": str(tmp_path)}
    subprocess.run(line, shell=True, cwd=tmp_path, env=environment, check=True, timeout=60)
    assert "cp" not in start or (tmp_path / "my-project/boxer.py").read_bytes() == content


@pytest.mark.skipif(sys.platform != "linux", reason="there are no sandboxes here")
def test_the_stand_in_says_why_it_passed_each_sandbox_over_and_refuses_an_unknown_one(tmp_path: Path) -> None:
    for name in ("runsc", "bwrap", "unshare"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho {name} is out of luck >&2\nexit 1\n")
        (tmp_path / name).chmod(0o700)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    said = {}
    for name in ("", "gVisor", "docker"):
        environment["BOXER_SANDBOX"] = name
        done = subprocess.run(command("serve"), cwd=HERE, env=environment, capture_output=True, text=True, timeout=60)
        said[name] = done.returncode, done.stdout, done.stderr
    reasons = {"gVisor": "runsc", "bubblewrap": "bwrap", "namespaces": "unshare"}
    lines = [f"{name} does not work here: {program} is out of luck\n" for name, program in reasons.items()]
    for name, passed_over in (("", "".join(lines)), ("gVisor", lines[0])):
        assert said[name][:2] == (1, "") and said[name][2].startswith(f"{passed_over}No sandbox works here")
    unknown = "BOXER_SANDBOX is 'docker'; it can be gVisor, bubblewrap, namespaces or none\n"
    assert said["docker"] == (2, "", unknown)


@of_the_stand_in
@pytest.mark.skipif(not os.path.exists("/usr/sbin/pivot_root"), reason="what namespaces need is elsewhere here")
def test_the_stand_in_finds_what_a_sandbox_needs_where_the_path_of_a_plain_user_does_not_lead() -> None:
    if Namespaces().problem:
        pytest.skip("there are no namespaces on this machine")
    environment = {**os.environ, "PATH": "/usr/local/bin:/usr/bin:/bin", "BOXER_SANDBOX": "namespaces"}
    with subprocess.Popen(command("serve"), cwd=HERE, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        said = process.stdout.readline() + process.stdout.readline()
        process.terminate()
    assert re.fullmatch("export BOXER_URL=.+\n# programs run in: namespaces\n", said)


@in_a_sandbox
@of_the_stand_in
def test_the_stand_in_serves_at_the_port_that_is_named_unless_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        line = [*command("serve"), "--port", str(taken.getsockname()[1])]
        done = subprocess.run(line, cwd=HERE, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "") and "Address already in use" in done.stderr
    assert done.stderr.endswith("; name another --port\n")
    with subprocess.Popen(line, cwd=HERE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == f"export BOXER_URL=http://127.0.0.1:{line[-1]}\n"
        process.terminate()
        assert process.wait(timeout=30) == 0


@of_the_stand_in
@pytest.mark.parametrize("port", ["-1", "65536", "x", "1.5"])
def test_a_port_that_is_none_is_refused(port: str) -> None:
    line = [*command("serve"), "--port", port]
    done = subprocess.run(line, cwd=HERE, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "") and "Traceback" not in done.stderr and "port" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGHUP here")
@in_a_sandbox
@of_the_stand_in
def test_the_stand_in_leaves_nothing_when_its_terminal_is_closed(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command("serve"), cwd=HERE, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() and list(tmp_path.iterdir())
        process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=30) == 0
    assert list(tmp_path.iterdir()) == []


def section(title: str) -> str:
    """Give what stands under a heading of the README, up to the next one."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", README, re.DOTALL | re.MULTILINE)
    assert found, title
    return found[1]


def test_the_readme_is_short_enough_to_be_read() -> None:
    lines = README.splitlines()
    assert len(lines) <= 550 and max(len(line) for line in lines if line[:1] != "|") <= 120


@of_a_checkout
def test_every_link_of_the_readme_leads_somewhere() -> None:
    titles = re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    anchors = {"#" + re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)]+)\)", prose):
        assert target.startswith("https://") or target in anchors or (HERE / target).is_file(), target


# What the README promises, by its first words, and the tests that show it.
PROMISES = {
    "Every call ends": """
        a_server_that_is_too_slow_is_given_up
        a_server_that_does_not_read_is_given_up
        a_connection_that_is_never_accepted_is_given_up
        an_endless_answer_comes_to_an_end
        one_deadline_covers_all_tries_and_pauses
        an_answer_that_has_arrived_by_the_deadline_counts
        a_flood_does_not_outlast_the_deadline
        the_wait_for_a_free_connection_does_not_count
    """,
    "Large files may take their time:": """
        what_keeps_moving_outlives_its_timeout
        the_deadline_holds_while_a_file_is_read
        each_upload_of_a_mapping_has_a_deadline_of_its_own
    """,
    "No answer is made up.": """
        whatever_a_server_says_comes_to_what_it_should
        an_answer_cut_off_anywhere_is_no_answer
        an_answer_may_come_in_any_two_pieces
        an_answer_is_taken_for_what_other_readers_take_it_for
        an_answer_that_is_cut_off_within_tls_is_no_answer
        an_idle_connection_that_anything_happened_to_is_not_used_again
        a_connection_that_answered_early_is_not_used_again
        callers_who_make_thousands_of_calls_get_their_own_answers
    """,
    "Files arrive whole,": """
        a_download_is_a_whole_file_or_an_error
        a_download_that_fails_leaves_everything_as_it_was
        each_output_is_whole_or_not_there
        a_run_that_was_not_wholly_sent_did_not_succeed
        a_file_that_changes_its_size_is_never_a_whole_upload
        a_file_that_something_else_reads_is_never_a_whole_upload
        content_arrives_whole_however_it_is_given
        a_413_in_the_middle_of_an_upload_arrives
        a_413_of_the_stand_in_arrives
    """,
    "One family of errors.": """
        whatever_a_server_says_comes_to_what_it_should
        running_out_of_descriptors_is_a_connection_error
        a_name_nobody_knows_is_a_connection_error
        an_output_that_cannot_be_a_file_here_is_an_error_with_the_result
        every_error_of_a_file_names_it
        what_is_no_boxer_server_is_doubted_by_its_url
        what_does_not_speak_http_is_doubted_by_its_url
        a_proxy_that_cannot_be_reached_is_named_with_the_host_that_it_was_for
        a_bad_url_says_where_it_comes_from
        the_error_of_an_exit_code_shows_what_the_program_said_of_it
        the_text_of_an_error_is_the_server_s_own_reason
    """,
    "A run is never sent twice": """
        a_post_whose_bytes_have_left_is_never_sent_twice
        a_request_is_sent_again_after_what_says_that_it_is_over_or_never_began
    """,
    "Retries": """
        a_third_of_runs_lost_to_the_race_is_no_failure
        the_race_has_tries_of_its_own
        retry_after_is_honoured_in_seconds_and_as_a_date
        a_retry_after_past_the_deadline_ends_the_call_at_once
    """,
    "Cancelled means killed.": """
        a_call_can_be_cancelled_at_every_step_of_its_loop
        a_call_can_be_cancelled_whenever_it_waits
        a_cancelled_run_is_killed
        an_interrupted_call_closes_its_connection
        a_call_can_be_broken_off_while_it_pauses
        closing_a_client_ends_its_calls_with_a_connection_error
        closing_a_client_ends_the_pause_of_its_call_at_once
        closing_a_client_ends_an_attempt_to_connect_at_once
        leaving_the_loop_early_kills_the_runs_that_are_under_way
        an_interrupt_in_many_runs_kills_them
    """,
    "Runs never mix,": """
        runs_at_once_with_the_same_names_never_mix
        a_mapping_of_files_is_the_working_directory_of_a_run_and_gone_afterwards
        nothing_of_a_run_s_own_files_is_left_after
        more_than_200_paths_are_named_by_their_folder_alone_and_then_removed
        what_becomes_of_the_removal_does_not_change_what_becomes_of_the_call
        after_a_lost_connection_nothing_is_removed
        after_the_client_s_own_deadline_nothing_is_removed
    """,
    "The command is the command.": """
        an_input_arrives_byte_for_byte
        what_runs_with_an_input_or_outputs_is_what_was_asked_for
        what_only_a_shell_has_is_no_program
        a_program_that_is_killed_leaves_nothing_of_a_shell_s_on_stderr
        a_program_ends_with_its_own_exit_code_whatever_it_reads_of_its_input
    """,
    "Outputs stay in their place.": """
        of_a_hostile_list_only_names_below_output_count
        a_list_that_is_forged_or_missing_is_an_error_with_the_result
        a_program_that_meddles_with_the_list_gains_nothing
        a_sparse_file_is_streamed_into_a_folder_and_too_much_for_memory
        a_single_endless_output_takes_no_endless_memory
        nothing_is_written_through_a_link_below_the_folder_of_outputs
        an_output_takes_the_place_of_a_link_and_does_not_follow_it
    """,
    "Many runs": """
        no_more_than_so_many_runs_are_in_flight
        the_source_is_asked_only_for_what_there_is_room_for
        in_order_what_has_finished_waits_but_not_without_end
        requests_and_results_that_are_done_with_are_let_go
    """,
    "Memory is bounded.": """
        a_large_file_goes_up_and_down_in_64_mib_of_memory
        a_file_is_in_memory_once_when_it_is_received_and_not_at_all_when_it_is_sent
        an_answer_to_a_run_is_not_taken_in_without_bounds
        a_flood_does_not_pile_up_while_a_file_is_read
    """,
    "Nothing leaks:": """
        a_client_that_was_never_closed_warns_and_leaves_nothing
        a_call_that_is_cancelled_as_its_answer_comes_is_cancelled
    """,  # and every other test, since each is looked over when it ends: see nothing_left_behind
    "A client can be shared": """
        callers_who_make_thousands_of_calls_get_their_own_answers
        after_a_fork_neither_process_touches_the_connections_of_the_other
        a_child_that_is_forked_while_a_call_connects_does_not_keep_the_socket
        a_killed_parent_s_connections_end_even_if_a_child_of_its_lives
        two_event_loops_at_once_get_their_own_answers_or_are_told_that_they_cannot
        every_call_works_on_another_loop
        a_deadline_ends_a_call_on_another_loop
        copies_of_a_client_in_one_process_share_its_connections_and_need_no_closing
        a_pool_of_processes_can_send_requests
        a_function_that_uses_a_client_can_be_sent_to_a_worker_without_the_module
    """,
    "Your exceptions are yours.": """
        what_a_signal_handler_raises_leaves_a_connect_as_it_is
        what_a_signal_handler_raises_leaves_a_look_up_as_it_is
        what_a_handler_raises_leaves_as_it_is
        what_a_file_object_raises_cancels_its_download
        what_the_source_raises_is_raised_after_what_had_finished
        the_error_of_a_file_that_cannot_be_read_comes_out
        a_signal_handler_may_use_the_client_that_it_interrupts
        a_call_within_a_call_that_has_the_only_connection_fails_at_once
    """,
    "TLS is verified": """
        a_certificate_that_does_not_hold_is_refused_and_not_tried_again
        plaintext_where_tls_should_be_is_a_connection_error
        http_goes_through_a_proxy
        https_goes_through_a_tunnel
        no_proxy_names_what_goes_straight
        the_environment_says_which_proxy_there_is
        every_call_works_through_a_proxy
    """,
    "Text is text.": """
        text_arrives_as_it_is_or_is_refused
        what_cannot_be_right_is_refused_before_anything_is_sent
        nul_is_refused_in_all_text_of_a_run_and_in_every_path
    """,
    "Uploads stay in their place.": """
        what_is_uploaded_stays_below_the_folder_that_is_named
        a_folder_is_never_uploaded_into_the_root_of_the_store
        a_name_in_files_that_cannot_be_is_refused_before_anything_is_sent
        what_is_excluded_is_not_sent
        what_is_not_a_file_of_the_folder_is_refused_by_name
        a_file_that_becomes_a_link_on_the_way_is_not_followed_out_of_the_folder
    """,
    "Secrets do not show": """
        secrets_are_never_shown
        a_secret_in_what_is_refused_shows_nowhere
        credentials_show_nowhere
        tries_are_logged_without_secrets
        an_exchange_is_logged_without_secrets
        an_input_shows_up_in_no_error
    """,
}


def test_every_promise_of_the_readme_has_tests_that_there_are() -> None:
    assert re.findall(r"^- \*\*(.+?)\*\*", section("What you can rely on"), re.MULTILINE) == list(PROMISES)
    for promise, names in PROMISES.items():
        assert names.split() and {f"test_{name}" for name in names.split()} <= set(globals()), promise


@pytest.mark.skipif(not (HERE / ".bench").is_dir(), reason="the benchmark is not here")
@pytest.mark.parametrize("mark", ["time", "memory"])
def test_the_figures_of_the_benchmark_are_those_that_were_measured_last(mark: str) -> None:
    program = [sys.executable, ".bench/bench.py", "--print", mark]
    measured = subprocess.run(program, cwd=HERE, capture_output=True, text=True, check=True, timeout=60).stdout
    assert f"<!-- bench {mark} -->\n{measured}<!-- end -->\n" in (HERE / ".bench/README.md").read_text("utf-8")


def first_column(text: str) -> list[str]:
    """Give what stands in backquotes at the start of each row of a table."""
    return re.findall(r"^\| `(.+?)`", text, re.MULTILINE)


def test_the_readme_lists_every_error_and_what_it_carries() -> None:
    errors = [name for name in boxer.__all__ if name.endswith("Error")]
    assert sorted(first_column(section("Errors"))) == errors
    carried = {"result", "request_sent", "status_code"}
    assert carried <= set(re.findall(r"`(\w+)`", section("Errors")))
    made = [
        BoxerError(),
        BoxerValidationError(),
        BoxerConnectionError(""),
        BoxerExitError(RESULT),
        BoxerAPIError("", 0),
    ]
    assert {name for error in made for name in [*vars(error), *vars(BoxerError)] if name[0] != "_"} == carried


def test_the_readme_lists_every_setting_and_its_default() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \|", section("Settings"), re.MULTILINE)
    settings = inspect.signature(boxer.BoxerClient).parameters.values()
    assert rows == [(setting.name, repr(setting.default)) for setting in settings]


def call_of(name: str) -> str:
    """Give a method's call with the names of its parameters, less those that all of them have."""
    parameters = list(inspect.signature(getattr(BoxerClient, name)).parameters.values())[1:]
    if {"timeout", "retries"} <= {parameter.name for parameter in parameters}:
        parameters = [parameter for parameter in parameters if parameter.name not in ("timeout", "retries")]
    names = [parameter.name for parameter in parameters]
    by_name = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    if by_name:
        names.insert(names.index(by_name[0]), "*")
    return f"{name}({', '.join(names)})"


def test_the_readme_lists_every_method_with_its_parameters() -> None:
    methods = {name for name, _ in inspect.getmembers(BoxerClient, inspect.isfunction) if name[0] != "_"}
    assert sorted(first_column(section("Methods"))) == sorted(map(call_of, methods))


def test_the_readme_names_every_field_of_a_result_and_every_limit() -> None:
    result = {name for name in dir(RESULT) if name[0] != "_"}
    assert {it.partition("(")[0] for it in re.findall(r"`(\w+(?:\(\w*\))?)`", section("Methods"))} >= result
    limits = {it.name for it in dataclasses.fields(ResourceLimits)}
    assert set(re.findall(r"`(\w+)`", section("Limits, exit codes and errors"))) >= limits
    request = {it.name for it in dataclasses.fields(RunRequest)}
    of_a_run = set(inspect.signature(BoxerClient.run).parameters) - {"self", "timeout", "retries"}
    assert of_a_run - request == {"output_dir", "check"} and request <= of_a_run  # as the README says
