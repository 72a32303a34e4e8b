"""The server's routes: three wire formats on one desk and one store, and what an operator looks at."""

from __future__ import annotations

import ipaddress
import json
import logging
import time
import uuid
from collections.abc import Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from kling_programs.sample.server import classic, newer, openai, own
from kling_programs.sample.server.desk import MIB, Desk
from kling_programs.sample.server.keys import Keys
from kling_programs.sample.server.pool import Pool
from kling_programs.sample.server.store import LIVE, Store, Task
from kling_programs.sample.server.wire import (
    BAD_FIELD,
    BAD_REQUEST,
    BROKEN,
    NO_METHOD,
    NO_PERMISSION,
    NO_THING,
    UNAVAILABLE,
    WireError,
    refusal,
)
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from kling import __version__
from kling.errors import UserError, unknown

log = logging.getLogger(__name__)

OPEN = ("/healthz", "/docs", "/openapi.json", "/files/")  # need no key
LARGEST = 32 * MIB  # bytes of a request: two pictures as base64
BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)  # seconds
KINDS = {".mp4": "video/mp4", ".png": "image/png", ".json": "application/json"}
LIST, LIST_MOST, PAGES = 30, 500, 1000


class Figures:
    """What `/metrics` tells, in Prometheus' format."""

    def __init__(self, store: Store) -> None:
        self.store, self.registry = store, CollectorRegistry()
        self.requests = Counter("kling_requests", "HTTP requests", ["route", "status"], registry=self.registry)
        self.tasks = Gauge("kling_tasks", "Tasks whose results are kept, by status", ["status"], registry=self.registry)
        self.workers = Gauge("kling_workers_ready", "Workers with a loaded model", registry=self.registry)
        self.waited = Histogram("kling_waited_seconds", "From a task's creation to its start", buckets=BUCKETS, registry=self.registry)
        self.made = Histogram("kling_made_seconds", "From a task's start to its result", buckets=BUCKETS, registry=self.registry)
        self.callbacks = Counter("kling_callbacks", "Callbacks sent", ["outcome"], registry=self.registry)

    def told(self, what: str, seconds: float) -> None:
        {"waited": self.waited, "made": self.made}[what].observe(seconds)

    def sent(self, outcome: str) -> None:
        self.callbacks.labels(outcome).inc()

    def write(self, pool: Pool) -> bytes:
        for status, count in self.store.counts().items():
            self.tasks.labels(status).set(count)
        self.workers.set(len(pool.ready))
        return generate_latest(self.registry)


class Watch:
    """ASGI layer: counts the answers, and makes one line of a fault of ours. A client that goes away is none."""

    def __init__(self, app: Any, figures: Figures) -> None:
        self.app, self.figures = app, figures

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status = 0

        async def sent(message: dict) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, sent)
        except ClientDisconnect:
            status = status or 499  # as nginx calls it
        except Exception:  # whatever it is: the client gets its line, the log the traceback
            log.exception("%s %s", scope["method"], scope["path"])
            if not status:
                broken = WireError(BROKEN, "the server failed: its log has the reason; try again")
                await answer(broken, scope["path"])(scope, receive, sent)
        self.figures.requests.labels(getattr(scope.get("route"), "path", "other"), str(status)).inc()


class Door:
    """ASGI layer: who is it, and is it too much? Before a body is read."""

    def __init__(self, app: Any, keys: Keys, hosts: set[str] | None) -> None:
        self.app, self.keys, self.hosts = app, keys, hosts

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        path = scope["path"]
        try:
            self._check_host(headers.get(b"host", ""), headers.get(b"origin"))
            if not path.startswith(OPEN):
                scope.setdefault("state", {})["key"] = self.keys.who(headers.get(b"authorization"))
            if int(headers.get(b"content-length") or 0) > LARGEST:  # a number: the server below has read it
                raise too_large()
        except WireError as error:
            return await answer(error, path)(scope, receive, send)
        left, refused = LARGEST, False

        async def counted() -> dict:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            return message if left >= 0 else {"type": "http.disconnect"}

        async def sent(message: dict) -> None:
            nonlocal refused
            if left >= 0:
                return await send(message)
            if not refused:  # whatever the app makes of half a body
                refused = True
                await answer(too_large(), path)(scope, receive, send)

        try:
            await self.app(scope, counted, sent)
        except ClientDisconnect:
            if left >= 0:
                raise
            await sent({})  # the app has nothing to say about half a body

    def _check_host(self, host: str, origin: str | None) -> None:
        """A page of another site must not use a server that needs no key, neither by its address nor by a name that leads here."""
        if self.hosts is None:
            return
        for url in (f"//{host}", *([origin] if origin is not None else [])):
            name = _host_of(url)
            if name not in self.hosts and not _loopback(name):
                raise WireError(NO_PERMISSION, f"host '{name[:60]}' is not this machine: a server without --keys answers to 127.0.0.1 only")


def _host_of(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:  # half an IPv6 address, for one
        return ""


def _loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def too_large() -> WireError:
    return WireError(BAD_REQUEST, f"the request is larger than {LARGEST // MIB} MiB: give smaller pictures, or their URLs", status=413)


def answer(error: WireError, path: str) -> JSONResponse:
    """A refusal in the format of the wire that was spoken."""
    headers = {"Retry-After": str(max(1, round(error.wait)))} if error.wait is not None else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    body: dict[str, Any] = {"code": error.code, "message": error.line, "request_id": uuid.uuid4().hex}
    parts = path.strip("/").split("/")
    if parts[:2] == ["v1", "videos"] and (len(parts) < 3 or parts[2] not in classic.KINDS):  # OpenAI's
        kind = "invalid_request_error" if error.status < 500 else "server_error"
        body["error"] = {"message": error.line, "type": kind, "code": str(error.code), "param": None}
    return JSONResponse(body, error.status, headers)


def envelope(data: Any, message: str = "SUCCEED") -> dict[str, Any]:
    return {"code": 0, "message": message, "request_id": uuid.uuid4().hex, "data": data}


class Server:
    """Everything that the routes need. url: the server's address as clients know it; by default the one that a request names."""

    def __init__(self, store: Store, desk: Desk, keys: Keys, pool: Pool, figures: Figures, url: str | None = None) -> None:
        self.store, self.desk, self.keys, self.pool, self.figures, self.url = store, desk, keys, pool, figures, url

    def base(self, request: Request) -> str:
        return self.url or str(request.base_url).rstrip("/")

    def found(self, request: Request, name: str, kinds: tuple[str, ...] = ()) -> Task:
        """A task of the caller. Raises `WireError` if there is none, or if its result is gone."""
        task = self.store.get(request.state.key, name, kinds)
        if task is None:
            raise WireError(NO_THING, f"task '{name[:64]}' is unknown: give the task_id or external_task_id of one of your tasks")
        if task.gone is not None:
            raise WireError(NO_THING, f"task '{name[:64]}' has no result any more: {task.gone}")
        return task

    def told(self, task: Task, url: str, status: str | None = None) -> dict[str, Any]:
        """A task in the classic format."""
        parent = self.store.by_video(task.key, task.parent) if task.parent else None
        return classic.task_data(task, url, parent, status)

    def callback(self, task: Task, status: str) -> str:
        return json.dumps(self.told(task, task.base, status), ensure_ascii=False)

    def end(self, task: Task) -> Task:
        """Cancel an unfinished task, or delete a finished one's result."""
        if task.status in LIVE and self.store.cancel(task, "cancelled by the client"):
            return self.store.get(task.key, task.id)
        self.store.remove(task, f"deleted by the client on {time.strftime('%Y-%m-%d')}")
        return task


def build(server: Server, hosts: set[str] | None, lifespan: Callable[[], Any]) -> FastAPI:
    """The app. hosts: names of this machine, checked if it needs no key. lifespan: an async context in which it answers."""

    @asynccontextmanager
    async def life(app: FastAPI) -> Any:
        async with lifespan():
            yield

    about = "Kling's HTTP interface, classic and newer, and OpenAI's /v1/videos, on one open model. See docs/serving.md."
    app = FastAPI(title="kling-serve", version=__version__, description=about, lifespan=life, redoc_url=None)
    app.add_middleware(Door, keys=server.keys, hosts=hosts)
    app.add_middleware(Watch, figures=server.figures)  # around the door
    add_errors(app)
    for routes in (classic_routes(server), newer_routes(server)):
        app.include_router(routes)
        app.include_router(routes, prefix="/kling", include_in_schema=False)
    app.include_router(own_routes(server))
    app.include_router(operator_routes(server))
    app.include_router(openai_routes(server))
    return app


def add_errors(app: FastAPI) -> None:
    """Every refusal is one line in the format of its wire."""

    @app.exception_handler(WireError)
    async def wire(request: Request, error: WireError) -> Response:
        return answer(error, request.scope["path"])

    @app.exception_handler(UserError)
    async def user(request: Request, error: UserError) -> Response:
        return answer(refusal(error, classic.NAMES), request.scope["path"])

    @app.exception_handler(OverflowError)
    async def endless(request: Request, error: OverflowError) -> Response:
        line = "a number in the request has hundreds of digits: give one that a computer can use"
        return answer(WireError(BAD_FIELD, line), request.scope["path"])

    @app.exception_handler(RequestValidationError)
    async def shape(request: Request, error: RequestValidationError) -> Response:
        return answer(WireError(BAD_FIELD, first_mistake(error, request.scope["path"])), request.scope["path"])

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        if error.status_code not in (404, 405):
            return answer(WireError(BAD_REQUEST, str(error.detail), error.status_code), request.scope["path"])
        line = f"{request.method} {request.scope['path']} is no method of this server: /docs lists them"
        return answer(WireError(NO_METHOD, line, error.status_code), request.scope["path"])


def first_mistake(error: RequestValidationError, path: str) -> str:
    """The first mistake in a body: the field, the value and the remedy."""
    found = error.errors()[0]
    place = [str(part) for part in found["loc"] if part not in ("body", "query", "path", "str", "int", "float")]
    name = ".".join(place) or "the body"
    if found["type"] == "json_invalid":
        return f"the body is no JSON ({found['ctx']['error']}): send an object as application/json"
    if found["type"] == "extra_forbidden":
        body = classic.BODIES.get(path.rsplit("/", 1)[-1]) or (own.Body if "requests" in path else newer.Body)
        for part in place[:-1]:  # of an object in the body
            body = {"settings": newer.Settings, "options": newer.Options, "contents": newer.Content}.get(part, body)
        return str(unknown("field", place[-1], body.model_fields))
    if found["type"] == "missing":
        return f"{name} is missing: give it"
    shown = repr(found.get("input"))
    return f"{name} {shown if len(shown) <= 60 else shown[:57] + '…'}: {found['msg'][0].lower()}{found['msg'][1:]}"


def classic_routes(server: Server) -> APIRouter:
    router = APIRouter(prefix="/v1/videos", tags=["Kling, classic"])

    def add(kind: str, shape: type[classic.Body]) -> None:
        def create(body: classic.Body, request: Request) -> dict[str, Any]:
            ask = classic.read(server.desk, kind, body, server.base(request))
            task, new = server.desk.take(request.state.key, ask)
            told = "SUCCEED" if new else "SUCCEED: this external_task_id was there already"
            return envelope(server.told(task, server.base(request)), told)

        create.__annotations__["body"] = shape  # what FastAPI checks and shows
        router.post(f"/{kind}", name=kind)(create)

        @router.get(f"/{kind}", name=f"list {kind}")
        def listed(request: Request, pageNum: int = 1, pageSize: int = LIST) -> dict[str, Any]:  # noqa: N803 - Kling's names
            for name, value, most in (("pageNum", pageNum, PAGES), ("pageSize", pageSize, LIST_MOST)):
                if not 1 <= value <= most:
                    raise WireError(BAD_FIELD, f"{name} {value}: give 1 to {most}")
            tasks = server.store.list(request.state.key, (kind,), (pageNum - 1) * pageSize, pageSize)
            return envelope([server.told(task, server.base(request)) for task in tasks])

        @router.get(f"/{kind}/{{name}}", name=f"query {kind}")
        def query(name: str, request: Request) -> dict[str, Any]:
            return envelope(server.told(server.found(request, name, (kind,)), server.base(request)))

        @router.delete(f"/{kind}/{{name}}", name=f"cancel or delete {kind}")
        def end(name: str, request: Request) -> dict[str, Any]:
            return envelope(server.told(server.end(server.found(request, name, (kind,))), server.base(request)))

    for kind, shape in classic.BODIES.items():
        add(kind, shape)
    return router


def newer_routes(server: Server) -> APIRouter:
    router = APIRouter(tags=["Kling, newer"])

    def add(path: str) -> None:
        @router.post(f"/{path}/{{model}}", name=path)
        def create(model: str, body: newer.Body, request: Request) -> dict[str, Any]:
            ask = newer.read(server.desk, path, model, body, server.base(request))
            return envelope(newer.task_data(server.desk.take(request.state.key, ask)[0], server.base(request)))

    for path in newer.KINDS:
        add(path)

    @router.get("/tasks")
    def tasks(request: Request, task_ids: str | None = None, external_task_ids: str | None = None) -> dict[str, Any]:
        """Up to 100 tasks by their ids, with commas between them."""
        names = [name for text in (task_ids, external_task_ids) if text for name in text.split(",") if name]
        if not 0 < len(names) <= 100:
            raise WireError(BAD_FIELD, f"{len(names)} ids were given: give 1 to 100 as task_ids or external_task_ids")
        return envelope([newer.task_data(server.found(request, name), server.base(request)) for name in names])

    return router


def own_routes(server: Server) -> APIRouter:
    router = APIRouter(prefix="/v1/requests", tags=["Own"])

    @router.post("")
    def create(body: own.Body, request: Request) -> dict[str, Any]:
        """A task from every field of a request, pictures and videos included; `kling-demo --server` uses it."""
        task, _ = server.desk.take(request.state.key, own.read(body, server.base(request)))
        return envelope(own.task_data(task, server.base(request)))

    @router.get("/{name}")
    def query(name: str, request: Request) -> dict[str, Any]:
        return envelope(own.task_data(server.found(request, name), server.base(request)))

    @router.delete("/{name}")
    def end(name: str, request: Request) -> dict[str, Any]:
        return envelope(own.task_data(server.end(server.found(request, name)), server.base(request)))

    return router


def openai_routes(server: Server) -> APIRouter:
    router = APIRouter(prefix="/v1/videos", tags=["OpenAI"])
    kinds = ("application/json", "multipart/form-data")
    schema = {"requestBody": {"content": {kind: {"schema": openai.Body.model_json_schema()} for kind in kinds}}}

    def told(task: Task) -> dict[str, Any]:
        return openai.task_data(task, server.desk)

    @router.post("", openapi_extra=schema)
    async def create(request: Request) -> dict[str, Any]:
        form = await body_of(request)

        def take() -> Task:
            return server.desk.take(request.state.key, openai.read(server.desk, form, server.base(request)))[0]

        return told(await run_in_threadpool(take))

    @router.get("")
    def listed(request: Request, limit: int = 20, after: str | None = None, order: str = "desc") -> dict[str, Any]:
        if not 1 <= limit <= 100:
            raise WireError(BAD_FIELD, f"limit {limit}: give 1 to 100")
        if order != "desc":
            raise WireError(BAD_FIELD, f"order '{order[:20]}': only desc, the newest first")
        last = None if after is None else server.store.get(request.state.key, after, classic.KINDS)
        if after is not None and last is None:
            raise WireError(NO_THING, f"after '{after[:64]}' is none of your videos")
        tasks = server.store.list(request.state.key, classic.KINDS, 0, limit + 1, before=last and last.seq)
        data = [told(task) for task in tasks[:limit]]
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
        return {"object": "list", "data": data, "has_more": len(tasks) > limit, **ends}

    @router.get("/{name}")
    def retrieve(name: str, request: Request) -> dict[str, Any]:
        return told(server.found(request, name))

    @router.delete("/{name}")
    def delete(name: str, request: Request) -> dict[str, Any]:
        task = server.found(request, name)
        server.end(task)
        return {"id": task.id, "object": "video.deleted", "deleted": True}

    @router.get("/{name}/content", response_class=FileResponse)
    def content(name: str, request: Request, variant: str = "video") -> Response:
        task = server.found(request, name)
        if variant != "video":
            raise WireError(BAD_FIELD, f"variant '{variant[:20]}': only video")
        if task.file is None:
            raise WireError(NO_THING, f"video '{name[:64]}' is {openai.STATUS[task.status]}: there is nothing to download")
        return send(server.store.folder / task.file)

    return router


async def body_of(request: Request) -> dict[str, Any]:
    """The fields of a form or of a JSON object; files as bytes."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    if kind == "multipart/form-data":
        async with request.form(max_files=1, max_fields=50) as form:
            return {name: value if isinstance(value, str) else await value.read() for name, value in form.items()}
    try:
        found = json.loads(await request.body())
    except (ValueError, RecursionError):
        found = None
    if kind != "application/json" or not isinstance(found, dict):
        raise WireError(BAD_REQUEST, "the body is no JSON object and no form: send application/json or multipart/form-data")
    return found


def operator_routes(server: Server) -> APIRouter:
    router = APIRouter(tags=["Server"])

    @router.get("/healthz")
    def healthz() -> dict[str, Any]:
        """200 once a worker has loaded the model."""
        if not server.pool.ready:
            raise WireError(UNAVAILABLE, "no worker is ready: the model is being loaded, or the server's log says why not")
        return {"status": "ok", "workers": len(server.pool.ready)}

    @router.get("/metrics")
    def metrics() -> Response:
        return Response(server.figures.write(server.pool), media_type=CONTENT_TYPE_LATEST)

    @router.get("/v1/capabilities")
    def capabilities() -> dict[str, Any]:
        return envelope(server.desk.capabilities())

    @router.head("/files/{name}", include_in_schema=False)
    @router.get("/files/{name}", response_class=FileResponse)
    def files(name: str) -> Response:
        """A result, or its record, by its unguessable name."""
        token, _, kind = name.partition(".")
        task = server.store.by_token(token) if kind in ("mp4", "png", "json") else None
        if task is None:
            raise WireError(NO_THING, "there is no such file: take the url of a task's result")
        if task.gone is not None:
            raise WireError(NO_THING, f"this file is gone: {task.gone}")
        path = server.store.folder / task.file
        return send(path.with_name(f"{path.name}.json") if kind == "json" else path)

    return router


def send(path: Path) -> FileResponse:
    if not path.is_file():
        raise WireError(NO_THING, "this file was deleted on the server: make the video again, with its seed")
    return FileResponse(path, media_type=KINDS[path.suffix], headers={"X-Content-Type-Options": "nosniff", "Cache-Control": "private"})
