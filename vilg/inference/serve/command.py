"""`vilg serve`: options, sockets and signals around the application."""

import argparse
import asyncio
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from aiohttp import web

from vilg.errors import UserError
from vilg.inference.load import load_model
from vilg.inference.options import check_device
from vilg.inference.serve.app import Server, is_local
from vilg.inference.serve.work import Limits

_PATIENCE = 2.0  # seconds that open answers get when the server stops


def main(argv: Sequence[str]) -> int:
    """A page and an HTTP API for one export folder: pictures from text, captions, answers."""
    defaults = Limits()
    parser = argparse.ArgumentParser(prog="vilg serve", description=main.__doc__)
    parser.add_argument("--model", type=Path, required=True, help="export folder")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; the default is this machine alone")
    parser.add_argument("--port", type=int, default=8000, help="port; 0 takes a free one")
    parser.add_argument("--batch", type=int, default=defaults.batch, help="rows decoded together")
    parser.add_argument("--max-candidates", type=int, default=defaults.candidates, help="pictures drawn for one request")
    parser.add_argument("--queue", type=int, default=defaults.waiting, help="requests that may wait for the model")
    parser.add_argument("--timeout", type=float, default=defaults.timeout, help="seconds a request may take, waiting included")
    parser.add_argument("--max-megabytes", type=float, default=defaults.megabytes, help="largest request")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    args = parser.parse_args(argv)
    for name in ("batch", "max_candidates", "queue", "timeout", "max_megabytes"):
        if not 0 < getattr(args, name) < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be above 0")
    if not 0 <= args.port < 65536:
        raise UserError(f"--port {args.port}: must be from 0 to 65535; 0 takes a free one")
    check_device(args.device)
    limits = Limits(args.batch, args.max_candidates, args.max_megabytes, args.timeout, args.queue)
    sock = _listen(args.host, args.port)
    with sock:
        server = Server(load_model(args.model, device=args.device), limits, local=is_local(args.host), log=_log)
        asyncio.run(_until_told_to_stop(server, sock, args.host))
    return 0


async def serve(server: Server, sock: socket.socket, stop: asyncio.Event, ready: Callable[[], None]) -> None:
    """Answer at a listening socket until `stop`; `ready` is called once requests are answered."""
    # Without handler_cancellation a client that leaves would go unnoticed until its work is done.
    runner = web.AppRunner(server.app(), handler_cancellation=True, access_log=None, shutdown_timeout=_PATIENCE)
    await runner.setup()
    try:
        await web.SockSite(runner, sock).start()
        ready()
        await stop.wait()
    finally:
        await runner.cleanup()


async def _until_told_to_stop(server: Server, sock: socket.socket, host: str) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    port = sock.getsockname()[1]
    shown = f"[{host}]" if ":" in host else host

    def ready() -> None:
        print(f"{server.bundle.name} on {server.bundle.device} at http://{shown}:{port}  (Ctrl-C stops it)", flush=True)
        if not server.local:
            print("anyone who reaches this address may use it: there is no password", flush=True)

    await serve(server, sock, stop, ready)


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, before the model is loaded: a port that is taken is said at once. Raises UserError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(128)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: cannot listen there ({error.strerror}); --port 0 takes a free one") from None
    return sock


def _log(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)
