"""Run the programs in a file of JSON lines, and go on where it stopped when started again.

    python3 batch.py tasks.jsonl results.jsonl

Each task is a line {"id": …, "code": …}, each result one {"id": …, "exit_code": …, "stdout": …, "stderr": …}.
A task that could not be run is told on stderr, and is tried again at the next start.
"""

# SPDX-License-Identifier: Apache-2.0
import json
import sys

from boxer import BoxerClient, BoxerError, RunRequest

if len(sys.argv) != 3:
    raise SystemExit("usage: python3 batch.py TASKS RESULTS")

with open(sys.argv[1], "rb") as tasks, open(sys.argv[2], "ab+") as results, BoxerClient() as client:
    results.seek(0)
    end, done = 0, set()
    for line in results:
        if line.endswith(b"\n"):  # else it was torn off when the program was stopped
            end += len(line)
            done.add(json.loads(line)["id"])
    results.truncate(end)

    todo = (task for task in map(json.loads, filter(bytes.strip, tasks)) if task["id"] not in done)
    command = ["timeout", "20", "python3", "-c"]
    requests = (RunRequest("python:3.12-slim", [*command, task["code"]], tag=task["id"]) for task in todo)
    for request, outcome in client.run_many(requests, concurrency=8, ordered=False):
        if isinstance(outcome, BoxerError):
            print(f"{request.tag}: {outcome}", file=sys.stderr)
            continue
        names = ("exit_code", "stdout", "stderr")
        result = {"id": request.tag, **{name: getattr(outcome, name) for name in names}}
        results.write(json.dumps(result).encode() + b"\n")
        results.flush()
