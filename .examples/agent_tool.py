"""A tool for a language model: run Python code beside files, and say what came of it.

    python3 agent_tool.py

Describe `run_python` to the model, and call it with what the model says.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import NamedTuple

from boxer import BoxerClient, BoxerError, BoxerOutputLimitError, BoxerTimeoutError

SECONDS = 20
SHOWN = 20_000  # characters of each stream, from its end


class Ran(NamedTuple):
    """What the model is told."""

    stdout: str
    stderr: str
    outputs: dict[str, bytes]  # what the code wrote to /output; it stays on the server, too


def run_python(client: BoxerClient, code: str, files: dict[str, bytes]) -> Ran:
    """Run code in a sandbox of its own, with the files in its working directory."""
    command = ["timeout", str(SECONDS), "python3", "-u", "main.py"]  # keeps what was printed until then
    try:
        result = client.run("python:3.12-slim", command, files={**files, "main.py": code}, outputs=True)
    except (BoxerTimeoutError, BoxerOutputLimitError) as error:
        return Ran("", f"{error}", {})
    except BoxerError as error:
        if error.result is None:
            raise
        result = error.result  # it ran, and its outputs are too many or too large
        return Ran(result.stdout[-SHOWN:], f"{result.stderr[-SHOWN:]}\n{error}", {})
    late = f"\nstopped after {SECONDS} seconds" if result.exit_code == 124 else ""
    return Ran(result.stdout[-SHOWN:], result.stderr[-SHOWN:] + late, result.outputs)


if __name__ == "__main__":
    with BoxerClient() as client:
        code = "print(open('a.txt').read()); open('/output/b.txt', 'w').write('b')"
        print(run_python(client, code, {"a.txt": b"a"}))
        # prints: Ran(stdout='a\n', stderr='', outputs={'b.txt': b'b'})
        print(run_python(client, "1 / 0", {}).stderr.splitlines()[-1])
        # prints: ZeroDivisionError: division by zero
