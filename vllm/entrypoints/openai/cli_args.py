"""The options of the HTTP server: one table, from which the command line is built.

Owns the Frontend group and the server's part of the top-level options. Must not know of the
engine; what one option alone can decide is checked by its ``Flag``, combinations by
``FrontendArgs.check``. Imports nothing heavy: ``vllm --help`` reads this.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm import envs
from vllm.errors import ConfigError
from vllm.utils.flags import Kind, arg, flags_of

__all__ = ["DEFAULT_HOST", "FrontendArgs"]

DEFAULT_HOST = "127.0.0.1"

_GROUP = "Frontend"
_TOP = "top level"


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontendArgs:
    """Everything ``run_server`` needs besides the engine's arguments."""

    host: str | None = arg(
        None,
        _GROUP,
        Kind.STR,
        "Address to listen on. Unset means 127.0.0.1, reachable from this machine only; "
        "0.0.0.0 or :: opens the server to the network (then set --api-key, too).",
    )
    port: int = arg(
        8000,
        _GROUP,
        Kind.INT,
        "Port to listen on; 0 takes a free one and logs it.",
        minimum=0,
        maximum=65535,
    )
    uds: str | None = arg(
        None, _GROUP, Kind.STR, "Listen on this Unix domain socket instead of --host and --port."
    )
    api_key: list[str] | None = arg(
        None,
        _GROUP,
        Kind.LIST,
        "Keys, one of which a request must carry as 'Authorization: Bearer KEY'. /health, /ping, "
        "/version, /load and /metrics stay open. Unset: VLLM_API_KEY.",
    )
    root_path: str | None = arg(
        None, _GROUP, Kind.STR, "Path prefix that a proxy in front of the server strips."
    )
    uvicorn_log_level: str = arg(
        "info",
        _GROUP,
        Kind.STR,
        "Level of the HTTP server's own log.",
        choices=("critical", "error", "warning", "info", "debug", "trace"),
    )
    disable_uvicorn_access_log: bool = arg(
        False, _GROUP, Kind.SWITCH, "Don't log a line for each HTTP request."
    )
    disable_access_log_for_endpoints: str | None = arg(
        None,
        _GROUP,
        Kind.STR,
        "Paths, separated by commas, whose requests are not logged, such as /health,/metrics.",
    )
    disable_fastapi_docs: bool = arg(
        False, _GROUP, Kind.SWITCH, "Don't serve /docs, /redoc and /openapi.json."
    )
    allow_credentials: bool = arg(False, _GROUP, Kind.SWITCH, "CORS: allow credentials.")
    allowed_origins: list[str] = arg(
        ["*"], _GROUP, Kind.JSON_LIST, "CORS: allowed origins, as a JSON list."
    )
    allowed_methods: list[str] = arg(
        ["*"], _GROUP, Kind.JSON_LIST, "CORS: allowed methods, as a JSON list."
    )
    allowed_headers: list[str] = arg(
        ["*"], _GROUP, Kind.JSON_LIST, "CORS: allowed headers, as a JSON list."
    )
    middleware: list[str] = arg(
        [],
        _GROUP,
        Kind.APPEND,
        "Import path of an ASGI middleware (a class, or an async function of request and "
        "call_next) to put round the application.",
    )
    ssl_keyfile: str | None = arg(None, _GROUP, Kind.STR, "Private key file; turns TLS on.")
    ssl_certfile: str | None = arg(None, _GROUP, Kind.STR, "Certificate file; turns TLS on.")
    ssl_ca_certs: str | None = arg(None, _GROUP, Kind.STR, "CA certificates to check clients with.")
    ssl_cert_reqs: int = arg(
        0,
        _GROUP,
        Kind.INT,
        "Whether clients must show a certificate: 0 no, 1 may, 2 must.",
        minimum=0,
        maximum=2,
    )
    ssl_ciphers: str | None = arg(None, _GROUP, Kind.STR, "OpenSSL's list of allowed ciphers.")
    h11_max_incomplete_event_size: int | None = arg(
        None,
        _GROUP,
        Kind.INT,
        "Bytes of an incomplete HTTP event that are kept; setting it selects the h11 parser.",
        minimum=1,
    )
    h11_max_header_count: int | None = arg(
        None, _GROUP, Kind.INT, "Headers that a request may have (256 where unset).", minimum=1
    )
    enable_request_id_headers: bool = arg(
        False, _GROUP, Kind.SWITCH, "Answer with an X-Request-Id header."
    )
    enable_server_load_tracking: bool = arg(
        False, _GROUP, Kind.SWITCH, "Count the requests in flight for /load."
    )
    log_error_stack: bool = arg(
        False, _GROUP, Kind.SWITCH, "Log the stack of every error answered, not of ours only."
    )
    chat_template: str | None = arg(
        None,
        _GROUP,
        Kind.STR,
        "Chat template: a file, or the template itself. Unset: the tokenizer's.",
    )
    chat_template_content_format: str = arg(
        "auto",
        _GROUP,
        Kind.STR,
        "How a message's content reaches the template: one string, or OpenAI's list of parts.",
        choices=("auto", "string", "openai"),
    )
    trust_request_chat_template: bool = arg(
        False, _GROUP, Kind.SWITCH, "Let requests bring a chat_template of their own."
    )
    default_chat_template_kwargs: dict[str, Any] | None = arg(
        None,
        _GROUP,
        Kind.JSON,
        "Variables for the chat template, where a request's chat_template_kwargs lack them.",
    )
    response_role: str = arg(
        "assistant", _GROUP, Kind.STR, "Role of the answer where a generation prompt is added."
    )
    enable_auto_tool_choice: bool = arg(
        False,
        _GROUP,
        Kind.SWITCH,
        "Let the model choose tools (tool_choice auto); needs --tool-call-parser.",
    )
    tool_call_parser: str | None = arg(
        None, _GROUP, Kind.STR, "Parser of the model's tool calls, such as hermes or llama3_json."
    )
    tool_parser_plugin: str | None = arg(
        None, _GROUP, Kind.STR, "Python file that registers further tool parsers."
    )
    exclude_tools_when_tool_choice_none: bool = arg(
        False, _GROUP, Kind.SWITCH, "Leave the tools out of the prompt with tool_choice none."
    )
    return_tokens_as_token_ids: bool = arg(
        False, _GROUP, Kind.SWITCH, "Name tokens in log-probabilities as token_id:ID."
    )
    enable_force_include_usage: bool = arg(
        False, _GROUP, Kind.SWITCH, "End every stream with its usage, asked for or not."
    )
    enable_prompt_tokens_details: bool = arg(
        False, _GROUP, Kind.SWITCH, "Report cached prompt tokens in the usage."
    )
    enable_tokenizer_info_endpoint: bool = arg(
        False, _GROUP, Kind.SWITCH, "Serve /tokenizer_info, chat template included."
    )
    enable_log_outputs: bool = arg(
        False, _GROUP, Kind.SWITCH, "Log the answers, too; needs --enable-log-requests."
    )
    enable_log_deltas: bool = arg(
        True, _GROUP, Kind.SWITCH, "With --enable-log-outputs, log every piece of a stream."
    )
    max_log_len: int | None = arg(
        None,
        _GROUP,
        Kind.INT,
        "Characters (or token ids) of a prompt or answer that are logged, at most.",
        minimum=0,
    )
    enable_log_requests: bool = arg(
        False, _TOP, Kind.SWITCH, "Log each request with its prompt and parameters."
    )
    reasoning_parser: str = arg(
        "",
        "StructuredOutputsConfig",
        Kind.STR,
        "Parser that tells a model's reasoning from its answer, such as qwen3 or deepseek_r1; "
        "gpt-oss has openai_gptoss without being asked.",
    )
    reasoning_parser_plugin: str = arg(
        "",
        "StructuredOutputsConfig",
        Kind.STR,
        "Python file that registers further reasoning parsers.",
    )
    shutdown_timeout: int = arg(
        0,
        _TOP,
        Kind.INT,
        "Seconds that running requests get to end after SIGTERM; 0 aborts them at once.",
        minimum=0,
    )

    @classmethod
    def from_namespace(cls, args: object) -> FrontendArgs:
        """Take the fields from parsed arguments; absent ones keep their defaults."""
        names = [field.name for field in dataclasses.fields(cls)]
        given: Mapping[str, Any] = {
            name: getattr(args, name) for name in names if hasattr(args, name)
        }
        return cls(**given)

    @property
    def api_keys(self) -> tuple[str, ...]:
        """The accepted keys: --api-key, else VLLM_API_KEY; empty where none is asked for."""
        if self.api_key:
            return tuple(self.api_key)
        return (envs.VLLM_API_KEY,) if envs.VLLM_API_KEY else ()

    @property
    def uses_tls(self) -> bool:
        return bool(self.ssl_keyfile or self.ssl_certfile)

    def _check_tls_files(self) -> None:
        """Load what the server will load, while its option can still be named."""
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        option = "--ssl-certfile" if self.ssl_keyfile is None else "--ssl-certfile, --ssl-keyfile"
        try:
            # The password keeps OpenSSL from asking for that of an encrypted key.
            context.load_cert_chain(str(self.ssl_certfile), self.ssl_keyfile, password="")
            option = "--ssl-ca-certs"
            if self.ssl_ca_certs:
                context.load_verify_locations(self.ssl_ca_certs)
            option = "--ssl-ciphers"
            if self.ssl_ciphers:
                context.set_ciphers(self.ssl_ciphers)
        except OSError as error:
            raise ConfigError(
                f"{option} cannot be used: {error}; PEM files are needed, the key without a "
                "password",
                parameter=option,
            ) from None

    def check(self) -> None:
        """Refuse combinations that cannot work.

        Raises:
            ConfigError: naming the option and what would work.
        """
        if self.enable_auto_tool_choice and not self.tool_call_parser:
            raise ConfigError(
                "--enable-auto-tool-choice needs --tool-call-parser, such as hermes",
                parameter="--enable-auto-tool-choice",
            )
        if self.tool_parser_plugin and not self.tool_call_parser:
            raise ConfigError(
                "--tool-parser-plugin needs --tool-call-parser with the name it registers",
                parameter="--tool-parser-plugin",
            )
        if self.reasoning_parser_plugin and not self.reasoning_parser:
            raise ConfigError(
                "--reasoning-parser-plugin needs --reasoning-parser with the name it registers",
                parameter="--reasoning-parser-plugin",
            )
        if self.enable_log_outputs and not self.enable_log_requests:
            raise ConfigError(
                "--enable-log-outputs needs --enable-log-requests", parameter="--enable-log-outputs"
            )
        if self.uses_tls and not self.ssl_certfile:
            raise ConfigError("--ssl-keyfile needs --ssl-certfile", parameter="--ssl-keyfile")
        for name in (
            "ssl_keyfile",
            "ssl_certfile",
            "ssl_ca_certs",
            "tool_parser_plugin",
            "reasoning_parser_plugin",
        ):
            path = getattr(self, name)
            if path and not os.path.isfile(path):
                raise ConfigError(
                    f"{flags_of(FrontendArgs)[name].option}: no such file: {path}",
                    parameter=flags_of(FrontendArgs)[name].option,
                    value=path,
                )
        if self.uses_tls:
            self._check_tls_files()
        if self.api_key is not None and not all(self.api_key):
            raise ConfigError("--api-key must not be empty", parameter="--api-key")
        if self.root_path and not self.root_path.startswith("/"):
            raise ConfigError(
                f"--root-path must begin with '/', not {self.root_path!r}",
                parameter="--root-path",
            )
