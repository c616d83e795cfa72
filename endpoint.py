"""Replies of an OpenAI-compatible endpoint: bounded in time, number and cost, cached on disk.

    endpoint = Endpoint("https://host/v1", "model", cache=folder / "replies.jsonl", limit=1000)
    future = endpoint.ask([{"role": "user", "content": "Hello"}], max_tokens=64)
    future.result()   # the text of the reply; or Unavailable, which says why there is none

1. The openai package sends, retries and times out. Requests are tasks of an event loop in a thread
   of its own: a task can be cancelled wherever it waits, so `total_s` and `close` hold even where a
   server never answers, sends a byte a second or asks for a long pause.
2. The cache is a JSONL file that only grows: {"requests": 1} before a request is sent, {"key",
   "text"} for a reply. Torn lines are skipped. `limit` counts the requests in the whole file.
3. The API key is read from the environment when a request is sent, and goes into one header of it;
   it is in no log, file, error or object, and does not follow a redirect.
"""

import asyncio
import hashlib
import importlib.util
import json
import os
import threading
import urllib.parse
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import disk
import terminal

READINGS = 3  # how many replies are asked for until one can be read
# Parameters that some servers refuse: (name, the word that their error then contains). The refusal
# of a schema has many wordings, so a schema is suspected last and on any error.
REFUSABLE = (("max_tokens", "max_completion_tokens"), ("temperature", "temperature"),
             ("response_format", ""))


def is_address(name: str) -> bool:
    """Whether a flag names an endpoint; user:key@host without a scheme is taken for one too."""
    return "://" in name or "@" in name and not Path(name).exists()


def read_address(address: str, flag: str, key_variable: str) -> urllib.parse.SplitResult:
    """The parts of an endpoint's address; the error does not repeat it, as it may hold a key."""
    if importlib.util.find_spec("openai") is None:
        raise ValueError(f"{flag}: an address needs one more package: pip install openai")
    with suppress(ValueError):  # a port that is no number
        parts = urllib.parse.urlsplit(address)
        extra = "@" in parts.netloc or ";" in parts.path or parts.query or parts.fragment
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not extra:
            return parts
    raise ValueError(f"{flag}: expected http(s)://host[:port]/v1, without a user, a query or a "
                     f"fragment; the address must hold no key, ${key_variable} does")


class Unavailable(RuntimeError):
    """A reply that could not be had; the text says why and never holds the key."""


def tokens_of(reply: str, messages: list[dict]) -> tuple[int, int]:
    """(prompt, completion) tokens as a reply reports them; 4 characters each where it does not.

    Hidden reasoning is paid for too, and some servers count it in the total only.
    """
    try:
        usage = dict(json.loads(reply)["usage"])
    except (ValueError, LookupError, TypeError, RecursionError):
        usage = {}
    usage = {k: n for k, n in usage.items() if type(n) is int and 0 <= n <= 10**9}
    n_prompt = usage.get("prompt_tokens", len(json.dumps(messages)) // 4)
    n_completion = usage.get("completion_tokens", len(reply) // 4)
    return n_prompt, max(n_completion, usage.get("total_tokens", 0) - n_prompt)


class Endpoint:
    """Chat completions of one server; `ask` may be called from any thread.

    limit: requests in the whole cache, 0 for no limit. retries: of a failed request, with growing
    pauses. request_s: until the next byte. total_s: for a reply, retries and pauses included.
    """

    flag, limit_flag, key_variable = "--judge", "--judge-limit", "JUDGE_API_KEY"

    def __init__(self, url: str, model: str | None = None, *, threads: int = 16, limit: int = 0,
                 cache: Path | None = None, retries: int = 5, request_s: float = 120.0,
                 total_s: float = 600.0):
        address = read_address(url, self.flag, self.key_variable)
        self.key()  # an unusable key is an error now, not at the first request
        if address.scheme == "http" and address.hostname not in ("localhost", "127.0.0.1", "::1"):
            terminal.say(f"{self.flag} {url}: plain http sends prompts and the key unencrypted")
        import openai

        self.openai, self.client = openai, openai.AsyncOpenAI(
            api_key="EMPTY",  # each request gets the real one when it is sent
            base_url=url, max_retries=retries, timeout=request_s,
            http_client=openai.DefaultAsyncHttpxClient(
                follow_redirects=False, event_hooks={"request": [self._before_request]}))
        self.url, self.model, self.limit, self.cache = url, model, limit, cache
        self.total_s, self.n_sent, self.counts = total_s, 0, Counter(cached=0, tokens=0)
        self.stopped = ""  # why no more requests are sent
        self.refused: set[str] = set()  # parameters that the server does not take
        self.replies: dict[str, str] = {}  # by digest of the question; the latest counts
        self.under_way: dict[str, asyncio.Task] = {}  # by digest
        if cache is not None:
            self.n_sent = sum(row["requests"] for row in disk.good_rows(cache, requests=int))
            rows = disk.good_rows(cache, key=str, text=str)
            self.replies = {row["key"]: row["text"] for row in rows}
        self.runner, self.slots = asyncio.Runner(), asyncio.Semaphore(threads)
        self.loop = self.runner.get_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def append(self, entry: dict) -> None:
        """Adds a line to the cache, by one write; the newline before it ends a torn line."""
        if self.cache is not None:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            with self.cache.open("ab", buffering=0) as file:
                file.write(f"\n{json.dumps(entry)}\n".encode())

    def ask(self, messages: list[dict], *, max_tokens: int, temperature: float = 0.0,
            schema: dict | None = None, key: str = "",
            read: Callable[[str], Any] = str) -> Future:
        """The future of what `read` makes of the reply; where `read` raises, another is asked for.

        schema: of a reply in JSON. key: tells apart the samples of one prompt.
        """
        asked = {"messages": messages, "max_tokens": max_tokens, "temperature": temperature}
        asked |= {"model": self.model} if self.model else {}
        identity = json.dumps([self.model or self.url, asked, schema, key], sort_keys=True)
        digest = hashlib.sha256(identity.encode()).hexdigest()
        if schema is not None:
            wrapped = {"name": "reply", "strict": True, "schema": schema}
            asked["response_format"] = {"type": "json_schema", "json_schema": wrapped}
        return asyncio.run_coroutine_threadsafe(self._ask(digest, asked, read), self.loop)

    async def _ask(self, digest: str, asked: dict, read: Callable) -> Any:
        with suppress(Exception):  # not in the cache, or of no use any more
            value = read(self.replies[digest])
            self.counts["cached"] += 1
            return value
        if digest not in self.under_way:
            task = self.under_way[digest] = asyncio.create_task(self._fetch(digest, asked, read))
            task.add_done_callback(lambda _: self.under_way.pop(digest))
        return read(await self.under_way[digest])

    async def _fetch(self, digest: str, asked: dict, read: Callable) -> str:
        """The first reply that can be read, kept in the cache."""
        try:
            async with self.slots, asyncio.timeout(self.total_s):
                text = await self._readable(asked, read)
        except TimeoutError:
            raise Unavailable(f"{self.url}: no reply within {self.total_s:g} s") from None
        except self.openai.APIError as e:
            cause = e
            while deeper := cause.__cause__ or cause.__context__:
                cause = deeper
            is_reply = isinstance(e, self.openai.APIStatusError)
            why = f"HTTP {e.status_code} {e.response.text}" if is_reply else f"{e} ({cause!r})"
            why = " ".join(self._clean(why).split())[:300]  # a page of HTML has many lines
            raise Unavailable(f"{self.url}: {why}") from None
        self.replies[digest] = text
        self.append({"key": digest, "model": self.model, "text": text})
        return text

    async def _readable(self, asked: dict, read: Callable) -> str:
        for _ in range(READINGS):
            self.admit()
            reply = await self._post(asked)
            self.paid(*tokens_of(reply, asked["messages"]))
            try:
                text = json.loads(reply)["choices"][0]["message"]["content"]
                if not isinstance(text, str):
                    raise ValueError(f"expected a text as content, found {text!r:.40}")
                read(text := self._clean(text))
                return text
            except Exception as e:
                error = f"{type(e).__name__}: {self._clean(str(e))[:200]}"
        raise Unavailable(f"{self.url}: {READINGS} unusable replies, the last: {error}")

    async def _post(self, asked: dict, refused: frozenset = frozenset()) -> str:
        """The body of the reply to a request without the parameters that the server refuses."""
        refused |= self.refused
        body = {name: value for name, value in asked.items() if name not in refused}
        if "max_tokens" in refused:
            body["max_completion_tokens"] = asked["max_tokens"]
        try:
            text = await self.client.post("/chat/completions", body=body, cast_to=str)
        except self.openai.APIStatusError as e:
            named = [k for k, word in REFUSABLE if k in body and word in e.response.text]
            if e.status_code not in (400, 422) or not named:
                raise
            return await self._post(asked, refused | {named[0]})
        if "temperature" in refused - self.refused:
            terminal.say(f"{self.flag} {self.url} takes no temperature: its own default is used")
        self.refused |= refused  # not before: the error may have had another cause
        return text

    async def _before_request(self, request) -> None:
        """Runs before every request, also before those that the openai package repeats."""
        self.admit()  # again: a limit may have been reached meanwhile
        request.headers.pop("Authorization", None)
        if key := self.key():
            request.headers["Authorization"] = f"Bearer {key}"
        self.n_sent += 1
        self.append({"requests": 1})

    def admit(self) -> None:
        """Raises Unavailable where no more requests may be sent."""
        if self.stopped:
            raise Unavailable(self.stopped)
        if self.limit and self.n_sent >= self.limit:
            raise Unavailable(f"all {self.limit} requests of {self.limit_flag} are spent")

    def paid(self, n_prompt: int, n_completion: int) -> None:
        """Counts the tokens of a reply, whether it can be read or not."""
        self.counts["tokens"] += n_prompt + n_completion

    def key(self) -> str:
        """The API key, read from the environment at each request and kept nowhere."""
        key = os.environ.get(self.key_variable, "").strip()
        if not (key.isascii() and key.isprintable()):  # a later error would print it
            raise ValueError(f"${self.key_variable} holds characters that no header can")
        return key

    def _clean(self, text: str) -> str:
        """A server's text without the key, in case the server repeats it."""
        key = self.key()  # a short one is no secret ("EMPTY") but may well be a word
        return text.replace(key, "***") if len(key) > 11 else text

    def close(self) -> None:
        """Cancels what waits or is under way."""
        self.stopped = "closed"
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join()
            self.runner.close()
