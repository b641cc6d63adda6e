"""A running `vilg serve` in this process, and requests to it over real sockets."""

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vilg.inference.load import load_model
from vilg.inference.serve.app import Server
from vilg.inference.serve.command import serve
from vilg.inference.serve.work import Limits

IMAGES, CAPTIONS, ANSWERS = "/v1/images/generations", "/v1/captions", "/v1/answers"


@dataclass
class Running:
    """A server, its port, and the lines it logged."""

    server: Server
    port: int
    log: list[str] = field(default_factory=list)

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """(status, body, headers); a body that is no bytes goes as JSON, and JSON comes back as objects."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = dict(headers or {})
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers.setdefault("Content-Type", "application/json")
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            content = response.read()
            found = dict(response.getheaders())
            if found["Content-Type"].startswith("application/json"):
                content = json.loads(content)
            return response.status, content, found
        finally:
            connection.close()

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        return self.request("POST", path, body, headers)[:2]

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a streamed answer, as they come."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("POST", path, json.dumps(body | {"stream": True}), {"Content-Type": "application/json"})
            response = connection.getresponse()
            assert response.status == 200 and response.headers["Content-Type"].startswith("text/event-stream")
            while kind := response.readline().decode().strip():
                event = json.loads(response.readline().decode().removeprefix("data: "))
                assert kind == f"event: {event['type']}" and response.readline() == b"\n"
                yield event
        finally:
            connection.close()

    def leave_after_sending(self, path: str, body: dict[str, Any]) -> None:
        """A client that asks and goes away without waiting for the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("POST", path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        connection.close()


@contextmanager
def running_server(folder: Path, **limits: Any) -> Iterator[Running]:
    """Serve an export folder on a free port; afterwards everything has stopped."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        running = Running(Server(load_model(folder), Limits(**limits), local=True, log=lambda line: None), sock.getsockname()[1])
        running.server.log = running.log.append
        ready, loop, stop = threading.Event(), asyncio.new_event_loop(), asyncio.Event()
        thread = threading.Thread(target=loop.run_until_complete, args=(serve(running.server, sock, stop, ready.set),))
        thread.start()
        assert ready.wait(30)
        try:
            yield running
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join(30)
            loop.close()
        assert not thread.is_alive()


@contextmanager
def occupied(running: Running) -> Iterator[None]:
    """The model is busy with something that ends when the block does."""
    gate, begun = threading.Event(), threading.Event()

    def work(job):
        begun.set()
        gate.wait(30)

    async def submit():
        running.server.worker.submit(work)

    thread = threading.Thread(target=asyncio.run, args=(submit(),))
    thread.start()
    thread.join()
    assert begun.wait(10)
    try:
        yield
    finally:
        gate.set()
        until(lambda: running.server.worker.idle)


def until(condition: Callable[[], Any]) -> None:
    """Wait for what has to become true."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
