# SPDX-License-Identifier: Apache-2.0
# pyright: strict
"""A user's program in which type checkers must find each mistake and nothing else: check_package.py has them look."""

import boxer
from boxer import AsyncBoxerClient, BoxerAPIError, BoxerClient, ResourceLimits, RunRequest, RunResult

boxer.no_such_name()  # mistake
client = BoxerClient(8080)  # mistake
client = BoxerClient(retry=3)  # mistake
client = BoxerClient()
client.run("image")  # mistake
client.run("image", 5)  # mistake
client.run("image", ["true"], {"A": "b"})  # mistake
client.run("image", ["true"], env=[("A", "b")])  # mistake
client.run("image", ["true"], limits=10)  # mistake
client.run("image", ["true"], timeout="10")  # mistake
client.run("image", ["true"], wall_clock_secs=10)  # mistake
client.upload_file("a.txt", 5)  # mistake
client.rum("image", ["true"])  # mistake
client.aclose()  # mistake
ResourceLimits(memory_mb="256")  # mistake
text: str = client.download_file("a.txt")  # mistake
code: str = client.run("image", ["true"]).exit_code  # mistake
result: RunResult = client.health()  # mistake
BoxerAPIError("no status code")  # mistake
client.run("image", ["true"], files={"a": 5})  # mistake
client.run("image", ["true"], input=5)  # mistake
client.run("image", ["true"], outputs={"a": "b"}).outputs["a"].encode()  # mistake
client.send("image")  # mistake
client.run_many([5])  # mistake
client.run_many([], concurrency="8")  # mistake
client.download_path("a", 5)  # mistake
client.upload_path("a", excluding=[".git"])  # mistake
RunRequest("image", ["true"], inputs="1")  # mistake
RunRequest("image", ["true"]).image = "other"  # mistake
for _, outcome in client.run_many([]):
    print(outcome.exit_code)  # mistake


async def without_await(asynchronous: AsyncBoxerClient) -> str:
    paths: list[str] = asynchronous.upload_path("src")  # mistake
    with asynchronous:  # mistake
        for _, _ in asynchronous.run_many([]):  # mistake
            pass
        return (await asynchronous.run("image", ["true"])).stdoot + paths[0]  # mistake
