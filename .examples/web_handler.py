"""A web server that runs what is posted to it, and has the sandbox killed when its own client goes away.

    python3 web_handler.py

In a web framework it is the same: cancel the task of the run when the framework says that the client is gone.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import asyncio
import functools
import sys

from boxer import AsyncBoxerClient, BoxerError, RunResult


async def handle(client: AsyncBoxerClient, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer one request: `POST` of a Python program."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    code = await reader.readexactly(int(head.partition("content-length:")[2].split()[0]))
    run = asyncio.ensure_future(client.run("python:3.12-slim", ["python3", "-c", code.decode()]))
    gone = asyncio.ensure_future(reader.read())  # ends when the other side hangs up
    await asyncio.wait([run, gone], return_when=asyncio.FIRST_COMPLETED)
    print("the program has ended" if run.done() else "nobody waits: the sandbox is killed")
    for task in (run, gone):
        task.cancel()  # closes the connection of a run, whereupon the server kills it
    answer = (await asyncio.gather(run, return_exceptions=True))[0]
    if isinstance(answer, RunResult):
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + answer.stdout.encode())
    elif isinstance(answer, BoxerError):
        writer.write(f"HTTP/1.1 502 Bad Gateway\r\nConnection: close\r\n\r\n{answer}\n".encode())
    writer.close()


async def ask(port: int, code: str, patience: float) -> str:
    """Be such a client: post a program, and hang up if there is no answer in time."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(code)}\r\n\r\n{code}".encode())
    try:
        return (await asyncio.wait_for(reader.read(), patience)).decode().partition("\r\n\r\n")[2]
    except asyncio.TimeoutError:
        return "no answer"
    finally:
        writer.close()


async def main() -> None:
    """Serve, and ask twice: for a program that ends, and for one that does not."""
    async with AsyncBoxerClient() as client:
        server = await asyncio.start_server(functools.partial(handle, client), "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            print(await ask(port, "print('hello')", 30), end="")
            # prints: the program has ended
            # prints: hello
            print(await ask(port, "while True: pass", 1))
            # prints: no answer
            await asyncio.sleep(0.5)
            # prints: nobody waits: the sandbox is killed


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
