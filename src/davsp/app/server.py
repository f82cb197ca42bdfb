"""Serving the page: on loopback unless there is a password, without files, without a request to anywhere else."""

import hmac
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from davsp.errors import DavspError, words_of
from davsp.runtime.loopback import is_loopback, names_loopback

MAX_BODY = 24 * 2**20  # bytes of a request: a picture of 16 MiB in base64, and some words
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; frame-ancestors 'none'; form-action 'self'"
)


def check(host: str, token: str | None) -> None:
    """Raises DavspError where others could reach the page without a password."""
    if token is None and not is_loopback(host):
        raise DavspError(
            f"--host {host} can be reached from elsewhere; give --token-env, the environment variable with the password, "
            "or stay at 127.0.0.1."
        )


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        DavspError: the port is taken or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise DavspError(
            f"cannot listen at {host}, port {port} ({why}); choose another with --port or --host."
        ) from error


def serve(page: Callable[[], Any], sock: socket.socket, token: str | None, ready: Callable[[], None]) -> None:
    """Serve until Ctrl-C.

    Args:
        page: makes the Blocks; called when Gradio may be imported.
        sock: of `listen`.
        token: the password; None: none, and only requests for this machine by its own names are answered.
        ready: called before the first request is taken.
    """
    with tempfile.TemporaryDirectory(prefix="davsp-app-") as folder:  # stays empty; Gradio asks for one
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}  # read when it is imported
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else the folder would be left behind
        gr = _gradio()
        import uvicorn
        from fastapi import FastAPI

        from davsp.app.page import CSS, THEME

        app = gr.mount_gradio_app(
            FastAPI(docs_url=None, redoc_url=None, openapi_url=None), page(), "/", theme=THEME, css=CSS, footer_links=[],
            run_history=False, ssr_mode=False, show_error=False, pwa=False,
            auth=None if token is None else lambda _, password: hmac.compare_digest(password.encode(), token.encode()),
            auth_message="Type the password that was given to davsp app; the name may be left out.",
        )  # fmt: skip
        name_is_optional(app)
        ready()
        config = uvicorn.Config(
            Guard(app, loopback_only=token is None), log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=2
        )  # fmt: skip
        uvicorn.Server(config).run(sockets=[sock])


def _gradio() -> Any:
    """Gradio builds HTTP clients while it is imported, and fails at a proxy of the environment that those cannot use."""
    from davsp.runtime.http import named

    try:
        import gradio
    except Exception:
        try:
            import httpx  # Gradio's

            httpx.Client().close()
        except Exception as error:  # ValueError, ImportError, InvalidURL: what Gradio met
            if not named():
                raise
            raise DavspError(
                f"Gradio cannot use the proxy that {' or '.join(named())} names ({words_of(error)}); unset it."
            ) from error
        raise
    return gradio


def name_is_optional(app: Any) -> None:
    """Let the password alone log in.

    Gradio's page empties both fields after a wrong password. Whoever then types the password alone would get a 422, and the page would
    go on to say that the credentials are incorrect.

    Args:
        app: what `mount_gradio_app` gave; Gradio's own app is its last route.
    """
    from fastapi import Form
    from fastapi.security import OAuth2PasswordRequestForm

    def login(username: str = Form(""), password: str = Form("")) -> OAuth2PasswordRequestForm:
        return OAuth2PasswordRequestForm(username=username.strip() or "anyone", password=password)

    app.routes[-1].app.dependency_overrides[OAuth2PasswordRequestForm] = login


class Guard:
    """Before Gradio: no uploads to disk, no huge bodies, no other site's page asking by another name; and a policy for the browser."""

    def __init__(self, app: Any, loopback_only: bool) -> None:
        self.app, self.loopback_only = app, loopback_only

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if refusal := self._refusal(scope, headers):
            await send({"type": "http.response.start", "status": refusal, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return

        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                policy = {
                    "content-security-policy": POLICY,
                    "referrer-policy": "no-referrer",
                    "x-content-type-options": "nosniff",
                }
                message = message | {
                    "headers": [*message["headers"], *((k.encode(), v.encode()) for k, v in policy.items())]
                }
            await send(message)

        await self.app(scope, receive, send_with_policy)

    def _refusal(self, scope: Any, headers: dict[str, str]) -> int | None:
        if self.loopback_only and not names_loopback(headers.get("host", "")):
            return 403
        if scope["method"] != "POST":
            return None
        if scope["path"].rstrip("/").endswith("/upload"):  # Gradio would keep the file
            return 404
        length = headers.get("content-length", "")  # without one, nobody knows how much will come
        return None if length.isdecimal() and int(length) <= MAX_BODY else 413
