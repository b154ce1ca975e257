"""HTTP to an OpenAI-compatible endpoint: JSON in and out, retries, deadlines. No redirects, and the key never leaves the header."""

from __future__ import annotations

import http.client
import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any
from urllib.parse import urlsplit

RETRIED = (429, 502, 503, 504)
MAX_PAUSE = 30.0
_EXCERPT = 300


class EndpointError(ValueError):
    """The endpoint can not be used: unreachable, refuses the key, no JSON, or it died. The message says what came back."""


class Refused(ValueError):
    """The endpoint answered this one request with an error status; another form of the request may be accepted."""

    def __init__(self, status: int, excerpt: str) -> None:
        self.status = status
        super().__init__(f"HTTP {status}{': ' + excerpt if excerpt else ''}")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Not followed: urllib would carry the key to wherever the answer points."""


def base_url(given: str) -> str:
    """The URL below which `/completions` lies: a bare host gets `/v1`, and a trailing `/completions` is dropped.

    ValueError for anything that is not plain http(s)://host[:port][/path].
    """
    try:
        parts = urlsplit(given)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        sound = False
    if not sound:
        raise ValueError("--against: found no http(s) URL, expected one such as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        # not quoted in the message: it may hold a secret
        raise ValueError(
            "--against: found a URL with user, password, query or fragment, expected http(s)://host[:port][/path]; "
            "give the key in an environment variable with --api-key-env VAR"
        )
    path = parts.path.rstrip("/").removesuffix("/completions").removesuffix("/chat") or "/v1"
    return f"{parts.scheme}://{parts.netloc}{path}"


def key_from(variable: str | None) -> str | None:
    """The API key in the environment variable, None when no variable is named. ValueError when it is not set or not usable."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(f"--api-key-env: the environment variable {variable} is not set; export it, or leave the option out")
    if not key.isascii() or not key.isprintable():
        raise ValueError(f"--api-key-env: {variable} holds characters that can not stand in an HTTP header")
    return key


@dataclass
class Client:
    """One endpoint. `url` is the base (.../v1); `timeout` seconds bound a whole request; `retries` follow the first try."""

    url: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 120.0
    retries: int = 2
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        if not (math.isfinite(self.timeout) and self.timeout > 0):
            raise ValueError(f"--timeout: found {self.timeout}, expected seconds above 0")
        if self.retries < 0:
            raise ValueError(f"--retries: found {self.retries}, expected 0 or more")
        self._open = urllib.request.build_opener(_NoRedirect).open

    @property
    def root(self) -> str:
        """The server's own address without the `/v1`, where SGLang has its native paths."""
        return self.url.removesuffix("/v1")

    def get(self, url: str) -> Any:
        """The JSON at `url`. Errors as `post`."""
        return self._retried(url, None, patient=True)

    def post(self, url: str, body: Mapping[str, Any], *, patient: bool = True) -> Any:
        """The JSON answer to `body`. `patient`: HTTP 500 is retried too, as a passing fault.

        Refused for an error status of this request; EndpointError when the endpoint as a whole does not work.
        """
        return self._retried(url, json.dumps(body).encode(), patient=patient)

    def _retried(self, url: str, data: bytes | None, *, patient: bool) -> Any:
        retried = (*RETRIED, 500) if patient else RETRIED
        for attempt in range(self.retries + 1):
            last = attempt == self.retries
            pause = min(2.0**attempt, MAX_PAUSE)
            try:
                return self._parse(url, self._once(url, data))
            except urllib.error.HTTPError as error:
                with error:
                    if error.code not in retried:
                        raise self._status(url, error) from None
                    if last:
                        if error.code == 500:
                            raise self._status(url, error) from None
                        raise EndpointError(f"{url}: HTTP {error.code} {self._tried()}: {self._body(error)}") from None
                    pause = _retry_after(error.headers.get("Retry-After"), pause)
            except TimeoutError:
                if last:
                    raise EndpointError(
                        f"{url}: no complete answer within {self.timeout:g} s {self._tried()}; raise --timeout"
                    ) from None
            except (OSError, http.client.HTTPException) as error:
                if isinstance(getattr(error, "reason", None), TimeoutError):
                    error = OSError(f"no connection within {self.timeout:g} s")
                if last:
                    reason = self._hide(str(getattr(error, "reason", None) or error) or type(error).__name__)
                    raise EndpointError(f"{url}: not reachable {self._tried()}: {reason}; is the server up?") from None
            self.sleep(pause)
        raise AssertionError("unreachable")

    def _tried(self) -> str:
        return f"({self.retries + 1} tries)" if self.retries else "(1 try)"

    def _once(self, url: str, data: bytes | None) -> bytes:
        request = urllib.request.Request(url, data, {"Accept": "application/json", "User-Agent": "v4-compare"})
        if data is not None:
            request.add_header("Content-Type", "application/json")
        if self.key is not None:
            request.add_unredirected_header("Authorization", f"Bearer {self.key}")
        deadline = time.monotonic() + self.timeout
        with self._open(request, timeout=self.timeout) as response:
            return _read(response, deadline)

    def _parse(self, url: str, data: bytes) -> Any:
        try:
            return json.loads(data)
        except ValueError as error:
            text = self._hide(data[:_EXCERPT].decode("utf-8", "replace"))
            raise EndpointError(f"{url}: the answer is not JSON ({error}): {text!r}; is this an OpenAI-compatible API?") from None

    def _status(self, url: str, error: urllib.error.HTTPError) -> ValueError:
        if error.code in (401, 403):
            hint = "check the key" if self.key else "give a key with --api-key-env VAR"
            return EndpointError(f"{url}: HTTP {error.code}, {hint}: {self._body(error)}")
        if 300 <= error.code < 400:
            target = self._hide(str(error.headers.get("Location")))
            return EndpointError(f"{url}: HTTP {error.code}, redirects to {target}; give the final URL with --against")
        return Refused(error.code, self._body(error))

    def _body(self, error: urllib.error.HTTPError) -> str:
        try:
            text = error.read(65536).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            return "(its body could not be read)"
        text = " ".join(self._hide(text).split())
        return text if len(text) <= _EXCERPT else text[:_EXCERPT] + "..."

    def _hide(self, text: str) -> str:
        # servers like to quote the header that they refuse
        return text.replace(self.key, "***") if self.key else text


def _read(response: IO[bytes], deadline: float) -> bytes:
    # the socket's timeout bounds one read only: a server that trickles would never end
    parts: list[bytes] = []
    while part := response.read(1 << 16):
        parts.append(part)
        if time.monotonic() > deadline:
            raise TimeoutError
    return b"".join(parts)


def _retry_after(header: str | None, otherwise: float) -> float:
    try:
        return min(max(float(header or ""), 0.0), MAX_PAUSE)
    except ValueError:
        return otherwise
