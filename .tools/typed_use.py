# SPDX-License-Identifier: Apache-2.0
# pyright: strict
"""A user's program in which type checkers must find nothing: check_package.py has them look."""

import io
import pickle
import ssl
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Optional, Union

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


def run(url: Optional[str]) -> str:
    limits = ResourceLimits(cpu_cores=0.5, memory_mb=256, wall_clock_secs=10)
    settings = {"X-Team": "a"}
    handlers = [urllib.request.HTTPCookieProcessor()]
    with BoxerClient(url, 30, headers=settings, ssl_context=ssl.create_default_context(), handlers=handlers) as client:
        is_well: bool = client.health(timeout=5)
        client.upload_file("a.txt", "text", timeout=None)
        client.upload_file("b.bin", bytearray(b"bytes"))
        with Path("c.bin").open("rb") as content:
            client.upload_file("c.bin", content, retries=0)
        names: list[str] = client.upload_path(Path("src"), "lib")
        result = client.run("image", ["cat", *names], env={"A": "b"}, limits=limits, files=names, persist=True)
        again: RunResult = client.run("image", ("true",), env=["A=b"], limits={"nofile": 64}, check=True)
        content_of: bytes = client.download_file(result.output_path("a.json"))
    return f"{is_well} {result.check().stdout} {again.wall_ms + 1} {content_of.decode()} {boxer.__version__}"


async def run_async(request: RunRequest) -> Optional[RunResult]:
    try:
        async with AsyncBoxerClient(timeout=None, retries=3, max_connections=10) as client:
            if not await client.health():
                return None
            await client.upload_file("a.txt", b"bytes")
            remote = await client.upload_path("src")
            await client.download_file(remote[0])
            return await client.run(request.image, request.cmd, cwd=request.cwd, network="none")
    except BoxerExitError as error:
        return error.result
    except (BoxerTimeoutError, BoxerOutputLimitError) as error:
        code: int = error.status_code
        print(code)
    except BoxerAPIError as error:
        print(error.status_code + 1)
    except (BoxerConnectionError, BoxerValidationError) as error:
        either: Union[OSError, ValueError] = error
        print(either)
    except BoxerError as error:
        print(error)
    return None


def requests() -> Iterator[RunRequest]:
    yield RunRequest("image", ["true"], env={"A": "b"}, limits={"wall_clock_secs": 5}, tag=1)
    yield RunRequest("image", ["true"], files={"a": b"bytes", "b": "text", "c": Path("src")}, input="1", outputs=["r"])


async def requests_async() -> AsyncIterator[RunRequest]:
    for request in requests():
        yield request


def run_many(client: BoxerClient) -> dict[str, bytes]:
    client.wait_until_ready(5)
    outputs: dict[str, bytes] = {}
    for request, outcome in client.run_many(requests(), concurrency=4, ordered=False, retries=1):
        if isinstance(outcome, RunResult):
            outputs.update(outcome.outputs)
        else:
            print(request.tag, outcome.args)
    with Path("model.bin").open("rb") as file:
        client.run("image", ["cat"], files={"main.py": "print(1)", "model.bin": file}, input=b"1", outputs=True)
    client.run("image", ["true"], output_dir=Path("results"), tag=("any", "thing"))
    client.upload_path("src", exclude=[".git", "*.pyc"])
    client.download_path("a", "b")
    client.download_path("a", io.BytesIO(), timeout=None)
    return {**outputs, **client.send(next(requests()), check=True).outputs}


async def run_many_async(client: AsyncBoxerClient) -> int:
    await client.wait_until_ready(timeout=None)
    exit_codes = [(await client.send(request)).exit_code for request in requests()]
    async for _, outcome in client.run_many(requests_async()):
        exit_codes.append(outcome.exit_code if isinstance(outcome, RunResult) else -1)
    async for request, _ in client.run_many(requests()):
        print(request.image, request.cmd[0])
    await client.download_path("a", io.BytesIO())
    return sum(exit_codes)


def survives(client: BoxerClient) -> BoxerClient:
    copied: BoxerClient = pickle.loads(pickle.dumps(client))
    copied.close()
    return copied
