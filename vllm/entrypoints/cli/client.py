"""What ``vllm chat`` and ``vllm complete`` share: their options, and a streaming request."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import vllm.envs as envs
from vllm.errors import ConfigError, VLLMError
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.flags import Kind, arg, flags_of
from vllm.utils.sse import EventBuffer

if TYPE_CHECKING:
    import httpx

__all__ = ["ClientArgs", "ServerClient", "client_parser", "prompts"]

_GROUP = "options"


@dataclass(frozen=True, kw_only=True)
class ClientArgs:
    """Options of both commands."""

    url: str = arg(
        "http://localhost:8000/v1", _GROUP, Kind.STR, "Base URL of the server's API, /v1 included."
    )
    model_name: str | None = arg(
        None, _GROUP, Kind.STR, "Model to ask for; by default the server's first."
    )
    api_key: str | None = arg(None, _GROUP, Kind.STR, "Key of the server; by default VLLM_API_KEY.")
    max_tokens: int | None = arg(None, _GROUP, Kind.INT, "Tokens of an answer, at most.", minimum=1)
    temperature: float | None = arg(
        None, _GROUP, Kind.FLOAT, "Sampling temperature; by default the server's.", minimum=0.0
    )
    quick: str | None = arg(
        None, _GROUP, Kind.STR, "Send this one message, print the answer and leave.", short="-q"
    )


def client_parser(prog: str, description: str, table: type) -> FlexibleArgumentParser:
    """A parser of the options of ``table``."""
    parser = FlexibleArgumentParser(prog=prog, usage=f"{prog} [options]", description=description)
    for flag in flags_of(table).values():
        parser.add_flag(flag)
    return parser


class ServerClient:
    """A connection to an OpenAI-compatible server."""

    def __init__(self, args: argparse.Namespace) -> None:
        import httpx

        if not args.url.startswith(("http://", "https://")):
            raise ConfigError(
                f"--url must begin with http:// or https://, not {args.url!r}",
                parameter="url",
                value=args.url,
            )
        key = args.api_key or envs.VLLM_API_KEY
        self._http = httpx.Client(
            base_url=args.url.rstrip("/") + "/",
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(30.0, read=None),
        )
        self._options = {
            name: value
            for name in ("max_tokens", "temperature")
            if (value := getattr(args, name)) is not None
        }
        self.model = args.model_name or self._first_model()

    def _first_model(self) -> str:
        with _Opened(self._http, "GET", "models", None) as response:
            models = json.loads(response.read()).get("data", [])
        if not models:
            raise VLLMError(f"the server at {self._http.base_url} serves no model")
        return models[0]["id"]

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Send ``body`` with ``stream`` set and yield the first choice of each event.

        Raises:
            VLLMError: no connection, an error status, or an error inside the stream.
        """
        import httpx

        body = {"model": self.model, "stream": True, **self._options, **body}
        events = EventBuffer()
        with _Opened(self._http, "POST", path, body) as response:
            try:
                for piece in response.iter_bytes():
                    for payload in events.feed(piece):
                        event = json.loads(payload)
                        if "error" in event:
                            raise VLLMError(f"the server says: {event['error'].get('message')}")
                        if event.get("choices"):
                            yield event["choices"][0]
            except httpx.HTTPError as error:
                raise VLLMError(f"the connection broke: {error}") from error


class _Opened:
    """An answered request as a context manager; a failure is one clear error."""

    def __init__(
        self, http: httpx.Client, method: str, path: str, body: dict[str, Any] | None
    ) -> None:
        self._url = f"{http.base_url}{path}"
        self._stream = http.stream(method, path, json=body)

    def __enter__(self) -> httpx.Response:
        import httpx

        try:
            response = self._stream.__enter__()
        except httpx.HTTPError as error:
            raise VLLMError(
                f"no answer from {self._url}: {error}; is a server running there (--url)?"
            ) from error
        if response.status_code != 200:
            text = response.read().decode(errors="replace")
            self._stream.__exit__(None, None, None)
            raise VLLMError(f"{self._url} answered {response.status_code}: {_message(text)}")
        return response

    def __exit__(self, *exc_info: Any) -> None:
        self._stream.__exit__(*exc_info)


def _message(text: str) -> str:
    """The message of an error body in OpenAI's form, or the body itself."""
    try:
        error = json.loads(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return text.strip() or "(no body)"


def prompts(mark: str = "> ") -> Iterator[str]:
    """Lines that the user types, until end of file or Ctrl-C; empty ones are left out."""
    interactive = sys.stdin.isatty()
    if interactive:
        # Gives ``input`` line editing and history, where the system has it.
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
    while True:
        try:
            line = input(mark) if interactive else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            sys.stdout.write("\n")
            return
        if not interactive and not line:
            return
        if line.strip():
            yield line.rstrip("\n")
