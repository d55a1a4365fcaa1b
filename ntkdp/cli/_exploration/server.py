"""The page on the loopback interface: nothing outside this machine reaches it."""

import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bokeh.application import Application
from bokeh.application.handlers import FunctionHandler
from bokeh.document import Document
from bokeh.server.auth_provider import AuthProvider
from bokeh.server.server import Server
from tornado.ioloop import IOLoop
from tornado.web import HTTPError, RequestHandler

from ntkdp.cli._exploration.explorer import Explorer
from ntkdp.cli._exploration.page import Page

ADDRESS = "127.0.0.1"


class _OnlyByThisName(AuthProvider):
    """Refuses requests to any other host name, which a foreign page may point to this machine."""

    def __init__(self, hosts: frozenset[str]) -> None:
        self.hosts = hosts
        super().__init__()

    @property
    def get_user(self) -> Any:
        """What is asked before any page or socket is given."""
        return self._user

    @property
    def login_url(self) -> str:
        """Required by the library; nobody is sent there."""
        return "/"

    def _user(self, request: RequestHandler) -> str:
        host = request.request.host
        if host not in self.hosts:
            raise HTTPError(403, f"this page has the names {', '.join(sorted(self.hosts))}")
        return "here"


def bound(port: int) -> int:
    """The port that will be listened on, a free one in place of 0.

    Raises
    ------
    ValueError
        If it is in use, or the system does not give it.
    """
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((ADDRESS, port))
        except OSError as error:
            raise ValueError(
                f"--port {port} cannot be listened on: {error.strerror}; give another port, or 0 "
                "for a free one"
            ) from error
        free: int = trial.getsockname()[1]
    return free


def serve(explorer: Explorer, port: int, begin: Callable[[str], None]) -> None:
    """Serve the page until the process ends; ``begin`` is called with its address."""
    hosts = frozenset({f"{ADDRESS}:{port}", f"localhost:{port}"})
    workers = {kind: ThreadPoolExecutor(1, kind) for kind in ("answer", "ahead")}

    def modify(document: Document) -> None:
        Page(document, explorer, workers)

    loop = IOLoop.current()
    server = Server(
        {"/": Application(FunctionHandler(modify))},
        io_loop=loop,
        address=ADDRESS,
        port=port,
        allow_websocket_origin=sorted(hosts),
        auth_provider=_OnlyByThisName(hosts),
    )
    server.start()
    loop.add_callback(begin, f"http://{ADDRESS}:{port}/")
    loop.start()
