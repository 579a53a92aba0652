"""A teacher behind an address: a server that speaks OpenAI's chat completions, asked several times at once.

mlx_lm.server, Ollama, LM Studio, llama.cpp and vLLM speak it, and so do paid services. Nothing is sent but to
the address that was given: redirects are not followed, and the key goes into no file.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from email.message import Message
from email.utils import parsedate_to_datetime
from itertools import count
from queue import SimpleQueue
from typing import Any

from mlx_posttrain import __version__
from mlx_posttrain.console import log
from mlx_posttrain.convert.files import parse_json
from mlx_posttrain.data.thoughts import with_thought
from mlx_posttrain.errors import UserError

KEY = "MLX_POSTTRAIN_TEACHER_KEY"  # the environment variable with the server's API key
TRIES = 8
FIRST_WAIT = 1.0  # seconds before the second try; doubled for each further one
LONGEST_WAIT = 60.0
PATIENCE = 600.0  # the longest wait that a server may ask for, in seconds
MAX_BYTES = 1 << 26  # of one response
ON_THIS_MACHINE = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Answer:
    """One answer of a teacher.

    ``stopped``: it ended by itself. ``refusal``: what the server said instead of answering, for a question
    that it does not take.
    """

    text: str
    stopped: bool
    refusal: str | None = None


class _Again(Exception):
    """A failure that may pass; ``after`` is how many seconds the server asks to wait, if it does."""

    def __init__(self, what: str, after: float | None = None):
        super().__init__(what)
        self.after = after


class _Refused(Exception):
    """The server does not take this question; the message is what it said."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class Server:
    """The model ``model`` at ``url``, with at most ``in_flight`` requests at a time.

    ``timeout``: seconds without a byte after which a request is repeated. Raises UserError for an address
    that is none.
    """

    def __init__(self, url: str, model: str, in_flight: int = 4, timeout: float = 600):
        self.url = _checked(url)
        self.model, self.in_flight, self.timeout = model, in_flight, timeout
        here = urllib.parse.urlsplit(self.url).hostname in ON_THIS_MACHINE
        handlers = [_NoRedirects(), *([urllib.request.ProxyHandler({})] if here else [])]
        self._opener = urllib.request.build_opener(*handlers)
        self._reached = False
        self._paused_until = 0.0  # by time.monotonic, for all requests
        self._lock = threading.Lock()

    def ask(self, requests: Iterable[Mapping[str, Any]]) -> Iterator[Answer]:
        """Yield the answers to chat completions, in their order, while the next requests are under way.

        requests: bodies without the model. No more than four times ``in_flight`` are begun before the first
        of them is answered. Raises UserError where the server cannot be reached or used, and where it does
        not answer in ``TRIES`` tries.
        """
        tasks: SimpleQueue[tuple[bytes, Future[Answer]] | None] = SimpleQueue()
        pending: deque[Future[Answer]] = deque()
        failures: list[BaseException] = []
        over = threading.Event()

        def work() -> None:
            while (task := tasks.get()) is not None and not over.is_set():
                body, future = task
                try:
                    if failures:  # this request would fail as well
                        raise failures[0]
                    future.set_result(self._answer(body, over))
                except BaseException as error:
                    failures.append(error)
                    future.set_exception(error)

        for _ in range(self.in_flight):
            threading.Thread(target=work, daemon=True).start()  # Ctrl-C does not wait for answers
        try:
            for request in requests:
                body = json.dumps({"model": self.model, **request, "stream": False}).encode()
                pending.append(Future())
                tasks.put((body, pending[-1]))
                if len(pending) >= 4 * self.in_flight:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            over.set()
            for _ in range(self.in_flight):
                tasks.put(None)

    def _answer(self, body: bytes, over: threading.Event) -> Answer:
        """The answer to one request, which is repeated while a failure may pass."""
        for attempt in count(1):
            while (left := self._paused_until - time.monotonic()) > 0 and not over.is_set():
                over.wait(left)
            if over.is_set():  # nobody waits for the answer any more
                raise CancelledError
            try:
                return _read_answer(self._post("/chat/completions", body), self.url)
            except _Refused as refusal:
                return Answer("", False, str(refusal))
            except _Again as failure:
                if failure.after is not None and failure.after > PATIENCE:
                    raise UserError(
                        f"{self.url}: {failure}, and asks to wait {failure.after:.0f} seconds: give the same "
                        "command again then; what is done is kept"
                    ) from None
                if attempt == TRIES:
                    raise UserError(
                        f"{self.url}: {failure}, {TRIES} times in a row: see what the server prints, then "
                        "give the same command again; what is done is kept"
                    ) from None
                wait = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1)) * random.uniform(0.75, 1.25)
                self._pause(str(failure), wait if failure.after is None else failure.after)
        raise AssertionError("unreachable: counting does not end")

    def _pause(self, why: str, seconds: float) -> None:
        """Let no request begin for some seconds, and say so unless they wait already."""
        with self._lock:
            now = time.monotonic()
            if self._paused_until <= now:
                log(f"{self.url}: {why}; waiting {seconds:.0f} s")
            self._paused_until = max(self._paused_until, now + seconds)

    def _post(self, path: str, body: bytes | None) -> bytes:
        """The bytes of a response. Raises _Again for a failure that may pass, UserError for any other."""
        headers = {"Content-Type": "application/json", "User-Agent": f"mlx-posttrain/{__version__}"}
        if key := os.environ.get(KEY, "").strip():
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url + path, body, headers)
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                self._reached = True
                return response.read(MAX_BYTES)
        except urllib.error.HTTPError as error:
            self._reached = True
            with error:
                raise self._failure(error) from None
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(reason, TimeoutError):
                raise _Again(f"no answer within {self.timeout:.0f} s") from None
            if isinstance(reason, ConnectionError | http.client.HTTPException) and self._reached:
                raise _Again("the connection broke off") from None
            if isinstance(reason, ConnectionRefusedError):
                raise UserError(
                    f"nothing answers at {self.url}: start the server, or correct --teacher-url"
                ) from None
            raise UserError(f"{self.url} cannot be reached: {reason}; correct --teacher-url") from None
        except ValueError:  # of a key with a line break or a letter that no header takes
            raise UserError(f"the key in {KEY} cannot be sent: it has characters that no key has") from None

    def _failure(self, error: urllib.error.HTTPError) -> Exception:
        """What an HTTP status means."""
        status, said = error.code, ""
        with suppress(OSError, http.client.HTTPException):
            said = _message(error.read(MAX_BYTES))
        told = f"HTTP {status}" + (f" ({said})" if said else "")
        if status in (408, 425, 429) or (status >= 500 and status != 501):
            return _Again(told, _retry_after(error.headers))
        if status in (400, 413, 422):
            return _Refused(told)
        if status in (401, 403):
            advice = (
                f"it does not take the key in {KEY}" if os.environ.get(KEY) else f"put its key into {KEY}"
            )
            return UserError(f"{self.url} refuses access, {told}: {advice}")
        if status == 404 and error.url.endswith("/chat/completions"):
            return UserError(
                f"{self.url} has no model {self.model!r}, {told}: correct --teacher{self._models()}, or "
                "--teacher-url, which ends in /v1 at most servers"
            )
        if 300 <= status < 400:
            return UserError(
                f"{self.url} sends us to {error.headers.get('Location')}: give the address itself, "
                "redirects are not followed"
            )
        return UserError(f"{self.url} answered {told}")

    def _models(self) -> str:
        """The models that the server lists, as part of an error; "" if it lists none."""
        with suppress(Exception):  # of a server that just failed; its own error is what matters
            names = [str(one["id"]) for one in json.loads(self._post("/models", None))["data"]]
            return f" (there are {', '.join(sorted(names)[:10])})" if names else ""
        return ""


def _checked(url: str) -> str:
    """The address without what is added to it later. Raises UserError for one that is none."""
    cut = url.strip().rstrip("/").removesuffix("/chat/completions").rstrip("/")
    try:
        parts = urllib.parse.urlsplit(cut)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host, parts = None, urllib.parse.urlsplit("")
    if parts.scheme not in ("http", "https") or not host or not cut.isprintable() or " " in cut:
        raise UserError(f"--teacher-url {url}: no address of a server, such as http://localhost:8080/v1")
    if parts.username is not None or parts.query or parts.fragment:
        raise UserError(
            "--teacher-url: give the address alone, without a user, a key or a query; the server's key "
            f"belongs into the environment variable {KEY}"
        )
    return cut


def _read_answer(data: bytes, url: str) -> Answer:
    """The answer of a chat completion. Raises UserError for what is none."""
    try:
        reply = parse_json(data.decode("utf-8"))
    except ValueError:
        shown = data[:60].decode("utf-8", "replace")
        raise UserError(
            f"{url} answered with no JSON ({shown!r}): is it an OpenAI-compatible server?"
        ) from None
    try:
        choice = reply["choices"][0]
        message = choice["message"]
        text, ended = message.get("content") or "", choice.get("finish_reason")
        thought = message.get("reasoning_content") or message.get("reasoning") or ""
    except (KeyError, IndexError, TypeError, AttributeError):
        raise UserError(
            f"{url} answered with JSON that has no choices[0].message: is it an OpenAI-compatible server?"
        ) from None
    if not isinstance(text, str) or not isinstance(thought, str):
        raise UserError(f"{url} answered with a message whose content is no text")
    # Servers that know a model's marks send its thought apart.
    return Answer(with_thought(thought, text) if thought.strip() else text.strip(), ended == "stop")


def _message(data: bytes) -> str:
    """What a server says about an error, in the forms that are in use; cut short, as it may be a page."""
    text = data.decode("utf-8", "replace")
    with suppress(ValueError, AttributeError):
        error = parse_json(text).get("error", text)
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    return " ".join(text.split())[:200]


def _retry_after(headers: Message) -> float | None:
    """Seconds of a Retry-After header, which has a number or a date."""
    value = (headers.get("Retry-After") or "").strip()
    with suppress(ValueError, TypeError, OverflowError):
        return max(0.0, float(value))
    with suppress(ValueError, TypeError, OverflowError):
        then = parsedate_to_datetime(value)
        then = then if then.tzinfo else then.replace(tzinfo=timezone.utc)
        return max(0.0, (then - datetime.now(timezone.utc)).total_seconds())
    return None
