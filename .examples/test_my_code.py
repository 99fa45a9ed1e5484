"""Two ways to test code that uses boxer, without a server: a mock, and a handler of urllib that answers.

    python3 -m unittest test_my_code.py

They work as well under pytest.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import email.message
import io
import json
import unittest
import urllib.request
import urllib.response
from unittest.mock import create_autospec

from boxer import BoxerAPIError, BoxerClient, RunResult


def greeting(client: BoxerClient) -> str:
    """Be your code."""
    return client.run("python:3.12-slim", ["echo", "hello"]).stdout.strip()


class Fake(urllib.request.BaseHandler):
    """A handler that answers in place of the network; the client around it is a real one."""

    def __init__(self, status: int, **answer: object) -> None:
        self.status, self.answer = status, json.dumps(answer).encode()

    def http_open(self, request: urllib.request.Request) -> urllib.response.addinfourl:
        """Answer a request."""
        head = email.message.Message()
        return urllib.response.addinfourl(io.BytesIO(self.answer), head, request.full_url, self.status)


class TestGreeting(unittest.TestCase):
    """The tests."""

    def test_with_a_mock(self) -> None:
        """A mock has the methods of a client, and refuses arguments that these do not have."""
        client = create_autospec(BoxerClient, instance=True)
        client.run.return_value = RunResult("boxer-1", 0, "hello\n", "", 5)
        self.assertEqual(greeting(client), "hello")
        client.run.assert_called_once_with("python:3.12-slim", ["echo", "hello"])
        with self.assertRaises(TypeError):
            client.run("python:3.12-slim", ["echo", "hello"], working_directory="/")

    def test_with_a_mock_that_fails(self) -> None:
        """A mock can raise what a client raises."""
        client = create_autospec(BoxerClient, instance=True)
        client.run.side_effect = BoxerAPIError("image pull failed", 500)
        with self.assertRaises(BoxerAPIError):
            greeting(client)

    def test_with_a_handler(self) -> None:
        """A real client sends its requests through an opener of urllib, and so through its handlers."""
        fake = Fake(200, exec_id="boxer-1", exit_code=0, stdout="hello\n", stderr="", wall_ms=5)
        with BoxerClient(handlers=[fake]) as client:
            self.assertEqual(greeting(client), "hello")

    def test_with_a_handler_that_refuses(self) -> None:
        """An answer that is no success is the error that it would be."""
        fake = Fake(400, error="no such image")
        with BoxerClient(handlers=[fake]) as client, self.assertRaisesRegex(BoxerAPIError, "no such image"):
            greeting(client)


if __name__ == "__main__":
    unittest.main()
