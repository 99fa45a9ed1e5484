"""Judge programs: run each against all inputs of a problem, and print a table of verdicts.

    python3 judge.py problem submissions

The folder `problem` has pairs of files such as 1.in and 1.out, `submissions` has Python programs that read standard
input. However many there are, CONCURRENCY of them are run at a time, and as few are in memory.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from boxer import (
    BoxerClient,
    BoxerError,
    BoxerOutputLimitError,
    BoxerTimeoutError,
    ResourceLimits,
    RunRequest,
    RunResult,
)

CONCURRENCY = 8
SECONDS = 2
OUTPUT = 64 * 1024  # bytes
# `timeout` keeps what was printed until then, and `head` ends a flood, which the server would end by its time limit.
# The exit code is the program's own, and comes by a descriptor that the program does not have. -u keeps nothing in a
# buffer.
SCRIPT = """
exec 3>&1
exit $({ { timeout -s KILL "$1" python3 -u main.py 3>&- 4>&-; echo $? >&4; } | head -c "$2" >&3; } 4>&1)
"""
COMMAND = ["sh", "-c", SCRIPT, "sh", str(SECONDS), str(OUTPUT + 1)]
ACCEPTED = "accepted"
ERRORS: dict[type[BoxerError], str] = {BoxerTimeoutError: "time limit", BoxerOutputLimitError: "output limit"}


def requests(problem: Path, submissions: Path) -> Iterator[RunRequest]:
    """Yield a request for each program and each input, as they are asked for."""
    for program in sorted(submissions.glob("*.py")):
        for case in sorted(problem.glob("*.in")):
            yield RunRequest(
                "python:3.12-slim",
                COMMAND,
                files={"main.py": program.read_bytes()},
                input=case.read_bytes(),
                limits=ResourceLimits(wall_clock_secs=SECONDS + 8, memory_mb=256),  # for what `timeout` does not reach
                tag=(program.name, case),
            )


def verdict(case: Path, outcome: RunResult | BoxerError) -> tuple[str, str]:
    """Return a verdict, and what to show with it."""
    if isinstance(outcome, BoxerError):
        return ERRORS.get(type(outcome), "not judged"), str(outcome)
    if len(outcome.stdout.encode()) > OUTPUT:
        return "output limit", f"begins with {outcome.stdout[:40]!r}"
    if outcome.exit_code == 128 + 9 and outcome.wall_ms >= SECONDS * 1000:
        return "time limit", f"printed until then: {outcome.stdout[:40]!r}"
    if outcome.exit_code != 0:
        return "runtime error", f"exit code {outcome.exit_code}: {outcome.stderr.strip().rpartition(chr(10))[2]}"
    if outcome.stdout.split() != case.with_suffix(".out").read_text("utf-8").split():
        return "wrong answer", f"printed {outcome.stdout[:40]!r}"
    return ACCEPTED, ""


def main() -> None:
    """Judge, and print a line for each program: its verdict is that of the first input that it fails at."""
    if len(sys.argv) != 3:
        raise SystemExit("usage: python3 judge.py PROBLEM SUBMISSIONS")
    problem, submissions = map(Path, sys.argv[1:])
    for folder, pattern in ((problem, "*.in"), (submissions, "*.py")):
        if not any(folder.glob(pattern)):
            raise SystemExit(f"there is no {pattern} in {folder}")
    verdicts: dict[str, tuple[str, str, str]] = {}
    with BoxerClient() as client:
        for request, outcome in client.run_many(requests(problem, submissions), concurrency=CONCURRENCY):
            name, case = request.tag
            word, told = verdict(case, outcome)
            if verdicts.get(name, (ACCEPTED,))[0] == ACCEPTED:
                verdicts[name] = (word, "" if word == ACCEPTED else case.stem, told)
    for name, (word, stem, told) in verdicts.items():
        print(f"{name:20} {word:14} {stem:6} {told}".rstrip())


if __name__ == "__main__":
    main()
