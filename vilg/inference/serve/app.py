"""The HTTP side: paths, limits, errors as JSON, and progress as server-sent events, on aiohttp.

aiohttp is what `vilg data` reads URLs with already, so serving needs no package more.
"""

import asyncio
import base64
import ipaddress
import json
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from vilg.inference.load import Bundle
from vilg.inference.serve.errors import ApiError
from vilg.inference.serve.requests import AnswersRequest, CaptionsRequest, ImagesRequest, read_request
from vilg.inference.serve.work import Limits, Work, plan_answer, plan_caption, plan_images
from vilg.inference.serve.worker import Job, Progress, Stopped, Worker

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
PATHS: dict[str, tuple[type, Callable[..., Work]]] = {
    "/v1/images/generations": (ImagesRequest, plan_images),
    "/v1/captions": (CaptionsRequest, plan_caption),
    "/v1/answers": (AnswersRequest, plan_answer),
}
PAGE = {"/": ("page.html", "text/html"), "/page.css": ("page.css", "text/css"), "/page.js": ("page.js", "text/javascript")}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_EVENTS_A_SECOND = 15


@dataclass
class Server:
    """One model behind HTTP. local: answers only to names of this machine; log: called with one line a request."""

    bundle: Bundle
    limits: Limits
    local: bool
    log: Callable[[str], None]

    def __post_init__(self) -> None:
        self.worker = Worker()
        self._open = 0  # requests for work that are being read, wait, or are worked on

    def app(self) -> web.Application:
        """The application. When it is shut down its work stops first, so that open requests can still be told so."""

        async def close(app: web.Application) -> None:
            await asyncio.to_thread(self.worker.close)

        limit = int(self.limits.megabytes * 1e6)
        app = web.Application(middlewares=[self._errors, self._guard], client_max_size=limit)
        for path, (name, kind) in PAGE.items():
            app.router.add_get(path, partial(_file, name, kind))
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        for path in PATHS:
            app.router.add_post(path, partial(self._work, path))
        app.on_shutdown.append(close)
        return app

    async def _health(self, request: web.Request) -> web.Response:
        return _json({"status": "ok", "model": self.bundle.name, "idle": self.worker.idle})

    async def _models(self, request: web.Request) -> web.Response:
        """OpenAI's list of models, with what the page needs to know of this one."""
        height, width = self.bundle.image_size
        sampling, limits = self.bundle.sampling, self.limits
        about = {
            "id": self.bundle.name, "object": "model", "created": 0, "owned_by": "vilg", "size": f"{width}x{height}",
            "parameters": sum(parameter.numel() for parameter in self.bundle.model.parameters()),
            "device": self.bundle.device.type, "text_slots": self.bundle.spec.text_slots,
            "defaults": {"guidance": sampling.guidance, "temperature": sampling.temperature, "top_k": sampling.top_k,
                         "top_p": sampling.top_p},
            "limits": {"candidates": limits.candidates, "megabytes": limits.megabytes, "timeout": limits.timeout},
        }  # fmt: skip
        return _json({"object": "list", "data": [about]})

    async def _work(self, path: str, request: web.Request) -> web.StreamResponse:
        """Read, check, wait for the thread, answer; all within the time that a request has."""
        started, answer, outcome = time.monotonic(), _Answer(request), "left by the client"
        try:
            error = await self._in_time(self._answer(path, request, answer))
            if error is not None:
                await answer.fail(error)
            outcome = f"{error.status} {error.code}" if error else "done"
        except ConnectionError:  # while an event was written
            pass
        finally:
            self.log(f"{path}  {time.monotonic() - started:.2f} s  {outcome}")
        return answer.response

    async def _in_time(self, answering: Awaitable[None]) -> ApiError | None:
        """What went wrong with an answer; None if it was given."""
        try:
            await asyncio.wait_for(answering, self.limits.timeout)
        except ApiError as error:
            return error
        except asyncio.TimeoutError:
            limit = f"{self.limits.timeout:g} s"
            return ApiError(504, "timeout", f"not done after {limit}, the longest that a request may take here")
        except Stopped:
            return ApiError(503, "stopping", "the server is being stopped")
        except web.HTTPException as error:
            return _of_http(error)
        except ConnectionError:
            raise
        except Exception:
            traceback.print_exc(file=sys.stderr)
            return ApiError(500, "internal_error", "the server failed; its log says why")
        return None

    async def _answer(self, path: str, request: web.Request, answer: "_Answer") -> None:
        kind, plan = PATHS[path]
        with self._place():  # before the body is read, so that memory is bounded too
            asked = read_request(kind, await _fields(request))
            if asked.model not in (None, self.bundle.name):
                message = f"model={asked.model}: this server has {self.bundle.name}"
                raise ApiError(404, "model_not_found", message, param="model")
            # Beside the loop: unpacking a large picture takes a while.
            work = await asyncio.to_thread(plan, self.bundle, asked, self.limits)
            job = self.worker.submit(work)
            try:
                if asked.stream:
                    await answer.begin_stream()
                    await self._follow(job, answer)
                await answer.complete(await job.result())
            finally:
                self.worker.withdraw(job)

    async def _follow(self, job: Job, answer: "_Answer") -> None:
        shown: tuple[bytes, ...] = ()
        async for progress in job.progress():
            await answer.event("progress", _progress_json(progress, pictures=progress.previews is not shown))
            shown = progress.previews
            await asyncio.sleep(1 / _EVENTS_A_SECOND)

    @contextmanager
    def _place(self) -> Iterator[None]:
        """A place among the one request that is worked on and those that wait. Raises ApiError if there is none."""
        if self._open > self.limits.waiting:
            raise ApiError(503, "queue_full", f"{self.limits.waiting} requests are waiting already; try again later")
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1

    @web.middleware
    async def _errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """What the paths raise becomes the API's JSON, and every answer carries the headers that keep a browser safe."""
        try:
            response = await handler(request)
        except ApiError as error:
            response = _json(error.body(), error.status)
        except web.HTTPException as error:
            response = _json(_of_http(error).body(), error.status)
            response.headers.update({name: error.headers[name] for name in ("Allow",) if name in error.headers})
        if not response.prepared:
            response.headers.update(HEADERS)
        return response

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Keep other sites that a user's browser visits from driving this server.

        A page elsewhere may post here without asking, so a foreign Origin is refused; and it may let its own name point
        at 127.0.0.1, so a server of this machine answers to local names only.
        """
        host = request.host
        if self.local and not is_local(_name_in(host)):
            raise ApiError(403, "forbidden_host", f"Host {host}: this server answers to localhost only; see --host")
        origin = request.headers.get("Origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise ApiError(403, "forbidden_origin", f"Origin {origin}: pages of other sites may not use this server")
        return await handler(request)


class _Answer:
    """The answer to one request: one JSON object, or a stream of events that ends with it."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self.response: web.StreamResponse = web.Response()

    async def begin_stream(self) -> None:
        headers = {"Content-Type": "text/event-stream; charset=utf-8", "X-Accel-Buffering": "no", **HEADERS}
        self.response = web.StreamResponse(headers=headers)
        await self.response.prepare(self._request)

    async def event(self, kind: str, content: dict[str, Any]) -> None:
        data = json.dumps({"type": kind, **content}, ensure_ascii=False)
        await self.response.write(f"event: {kind}\ndata: {data}\n\n".encode())

    async def complete(self, result: dict[str, Any]) -> None:
        if self.response.prepared:
            await self.event("completed", result)
        else:
            self.response = _json(result)

    async def fail(self, error: ApiError) -> None:
        """As the status while there is none yet, else as the last event."""
        if not self.response.prepared:
            headers = {"Retry-After": "5"} if error.status == 503 else {}
            self.response = _json(error.body(), error.status, headers)
        else:
            await self.event("error", error.body())


def _of_http(error: web.HTTPException) -> ApiError:
    """aiohttp's own refusals: no such path, another method, a body that is too large."""
    return ApiError(error.status, error.reason.lower().replace(" ", "_"), error.text or error.reason)


async def _file(name: str, kind: str, request: web.Request) -> web.Response:
    text = (files("vilg.inference.serve") / "assets" / name).read_text(encoding="utf-8")
    return web.Response(text=text, content_type=kind, charset="utf-8")


async def _fields(request: web.Request) -> Any:
    """The fields of a JSON body or a form. Raises ApiError."""
    if request.content_type == "multipart/form-data":
        try:
            form = await request.post()
        except ValueError as error:
            raise ApiError(400, "invalid_form", f"the body is no multipart form: {error}") from None
        return {name: await _value(name, value) for name, value in form.items()}
    if request.content_type != "application/json":
        message = f"Content-Type {request.content_type}: send application/json, or multipart/form-data with the image as a file"
        raise ApiError(415, "unsupported_media_type", message)
    try:
        return json.loads(await request.read())
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "invalid_json", f"the body is not JSON: {error}") from None


async def _value(name: str, value: str | bytes | bytearray | web.FileField) -> str | bytes:
    if isinstance(value, web.FileField):
        return await asyncio.to_thread(value.file.read)
    return value if isinstance(value, str) else bytes(value)


def _progress_json(progress: Progress, *, pictures: bool) -> dict[str, Any]:
    content: dict[str, Any] = {"ahead": progress.ahead, "done": progress.done, "total": progress.total}
    if pictures and progress.previews:
        content["partial_images"] = [base64.b64encode(png).decode() for png in progress.previews]
        content["first"] = progress.first
    return content


def _json(content: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    text = json.dumps(content, ensure_ascii=False)
    return web.Response(text=text, status=status, content_type="application/json", headers=headers)


def _name_in(netloc: str) -> str:
    """`[::1]:80` -> `::1`; nothing for what is no host."""
    try:
        return urlsplit(f"//{netloc}").hostname or ""
    except ValueError:
        return ""


def is_local(host: str) -> bool:
    """Whether a name or address means this machine alone."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
