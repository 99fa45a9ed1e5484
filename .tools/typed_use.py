# SPDX-License-Identifier: Apache-2.0
# pyright: strict
"""A user's program in which type checkers must find nothing: check_package.py has them look."""

import pickle
import ssl
import urllib.request
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


def survives(client: BoxerClient) -> BoxerClient:
    copied: BoxerClient = pickle.loads(pickle.dumps(client))
    copied.close()
    return copied
