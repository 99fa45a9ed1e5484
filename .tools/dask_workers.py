"""Send runs from the workers of a Dask cluster: `tox -e dask`.

Once the workers have boxer.py, and once they are shown not to have it: then the module travels by value (cloudpickle).
Needs a checkout, and dask and distributed; the runs go to the stand-in of test_boxer.py.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import cloudpickle
from distributed import Client, LocalCluster

ROOT = Path(__file__).parent.parent
COUNT = 40


def load_boxer() -> Any:
    """Import boxer.py by its path, so that it does not lie on the path of the workers, too."""
    spec = importlib.util.spec_from_file_location("boxer", ROOT / "boxer.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["boxer"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def has_boxer() -> bool:
    import importlib.util
    import sys

    sys.modules.pop("boxer", None)
    return importlib.util.find_spec("boxer") is not None


def send(boxer: Any, url: str, workers_have_it: bool) -> None:
    sys.path[:] = [path for path in sys.path if Path(path) != ROOT]  # workers get this process's path
    if workers_have_it:
        sys.path.append(str(ROOT))
    else:
        cloudpickle.register_pickle_by_value(boxer)
        cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with LocalCluster(n_workers=2, threads_per_worker=4, dashboard_address=None) as cluster, Client(cluster) as dask:
        assert set(dask.run(has_boxer).values()) == {workers_have_it}
        with boxer.BoxerClient(url) as client:

            def echo(number: int) -> Any:
                """Dask sends a function of the main program by value, and with it what that needs of boxer.py."""
                return client.send(boxer.RunRequest("python:3.12-slim", ["echo", str(number)])).stdout

            requests = [boxer.RunRequest("python:3.12-slim", ["echo", str(number)]) for number in range(COUNT)]
            executor = dask.get_executor(pure=False)  # equal requests are runs of their own
            if workers_have_it:
                outputs = [result.stdout for result in executor.map(client.send, requests)]
            else:
                outputs = list(executor.map(echo, range(COUNT)))
    assert outputs == [f"{number}\n" for number in range(COUNT)]
    print(f"{COUNT} runs from 2 workers {'with' if workers_have_it else 'without'} boxer.py")


def main() -> None:
    boxer = load_boxer()
    line = [sys.executable, str(ROOT / "test_boxer.py"), "serve"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            url = next(word for said in server.stdout for word in said.split() if "http://" in word).partition("=")[2]
            for workers_have_it in (True, False):
                send(boxer, url, workers_have_it)
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
