"""HTTP to an OpenAI-compatible endpoint: JSON in and out, retries, deadlines. No redirects, and the key never leaves the header.

Proxies of the environment are used as by any urllib program, but not for this machine itself, which no proxy can reach.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

RETRIED = (429, 502, 503, 504)
MAX_PAUSE = 30.0
_EXCERPT = 300


class EndpointError(ValueError):
    """The endpoint can not be used: unreachable, refuses the key, no JSON, or it died. The message says what came back."""


class Unreachable(EndpointError):
    """The endpoint gave no complete answer, or was too busy to, at every try."""


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
    if "@" in parts.netloc or parts.query or parts.fragment:
        # not quoted in the message: it may hold a secret
        raise ValueError(
            "--against: found a URL with user, password, query or fragment, expected http(s)://host[:port][/path]; "
            "give the key in an environment variable with --api-key-env VAR"
        )
    if not given.isascii() or not given.isprintable() or " " in given:
        raise ValueError(f"--against: found {given!r}, expected printable ASCII without spaces; write others as %XX or punycode")
    path = parts.path.rstrip("/").removesuffix("/completions").removesuffix("/chat") or "/v1"
    return f"{parts.scheme}://{parts.netloc}{path}"


def _is_this_machine(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


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
    """One endpoint. `url` is the base (.../v1); `retries` follow the first try.

    `timeout`: seconds in which an answer must be complete; one that still arrives then is given up at its next pause, at the latest
    after as long again.
    """

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
        direct = [urllib.request.ProxyHandler({})] if _is_this_machine(self.url) else []
        self._open = urllib.request.build_opener(_NoRedirect, *direct).open

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
                        raise Unreachable(f"{url}: HTTP {error.code} {self._tried()}: {self._body(error)}") from None
                    pause = _retry_after(error.headers.get("Retry-After"), pause)
            except TimeoutError:
                if last:
                    raise Unreachable(
                        f"{url}: no complete answer within {self.timeout:g} s {self._tried()}; raise --timeout"
                    ) from None
            except (OSError, http.client.HTTPException) as error:
                if isinstance(getattr(error, "reason", None), TimeoutError):
                    error = urllib.error.URLError(f"no connection within {self.timeout:g} s")
                if last:
                    reason = self.hide(str(getattr(error, "reason", None) or error) or type(error).__name__)
                    what = "not reachable" if isinstance(error, urllib.error.URLError) else "the connection broke"
                    raise Unreachable(f"{url}: {what} {self._tried()}: {reason}; is the server up?") from None
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
        except (ValueError, RecursionError) as error:
            text = self.hide(data.decode("utf-8", "replace"))[:_EXCERPT]
            raise EndpointError(f"{url}: the answer is not JSON ({error}): {text!r}; is this an OpenAI-compatible API?") from None

    def _status(self, url: str, error: urllib.error.HTTPError) -> ValueError:
        if error.code in (401, 403):
            hint = "check the key" if self.key else "give a key with --api-key-env VAR"
            return EndpointError(f"{url}: HTTP {error.code}, {hint}: {self._body(error)}")
        if 300 <= error.code < 400:
            target = self.hide(str(error.headers.get("Location")))
            return EndpointError(f"{url}: HTTP {error.code}, redirects to {target}; give the final URL with --against")
        return Refused(error.code, self._body(error))

    def _body(self, error: urllib.error.HTTPError) -> str:
        try:
            text = error.read(65536).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            return "(its body could not be read)"
        text = " ".join(self.hide(text).split())
        return text if len(text) <= _EXCERPT else text[:_EXCERPT] + "..."

    def hide(self, text: str) -> str:
        """The text without the key: servers like to quote the header that they refuse."""
        return text.replace(self.key, "***") if self.key else text


def _read(response: http.client.HTTPResponse, deadline: float) -> bytes:
    # the socket's timeout bounds one read of the socket, and read() makes as many as it takes to fill its buffer: a server that
    # trickles would never end. read1() makes one, and does not complain about a body that ends early
    parts: list[bytes] = []
    while part := response.read1(1 << 16):
        parts.append(part)
        if time.monotonic() > deadline:
            raise TimeoutError
    data, announced = b"".join(parts), response.headers.get("Content-Length", "")
    if announced.isdecimal() and len(data) < int(announced) and not response.chunked:
        raise http.client.IncompleteRead(data, int(announced) - len(data))
    return data


def _retry_after(header: str | None, otherwise: float) -> float:
    try:
        seconds = float(header or "")
    except ValueError:
        return otherwise
    return otherwise if math.isnan(seconds) else min(max(seconds, 0.0), MAX_PAUSE)
