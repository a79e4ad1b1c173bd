"""An explainer at any endpoint that speaks OpenAI's protocol: a service, Ollama, vLLM, llama.cpp.

    OPENAI_BASE_URL=http://127.0.0.1:11434/v1 OPENAI_MODEL=qwen3 OPENAI_API_KEY=… python …
    endpoint = Endpoint("runs/demo/names/answers.jsonl")
    print(endpoint.estimate(collected))                   # requests and tokens, before any is sent
    endpoint.explain(examples)

Whatever was answered is kept in a file by what was asked, and never asked again. Where the server
asks to wait (Retry-After), all threads wait. The key is read from the environment alone and is in
no file, message or log.
"""

from __future__ import annotations

import email.utils
import hashlib
import importlib
import json
import os
import random
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mi_helpers.arguments import number, whole
from mi_helpers.errors import Refused, reading
from mi_helpers.files import RunError, why_not_written
from mi_helpers.saes.examples import Examples
from mi_helpers.saes.naming import score
from mi_helpers.saes.prompts import SYSTEM, NoAnswer, Prompted, Question

EXTRA = "pip install -c requirements.txt -e '.[naming]'"
URL, MODEL, KEY = "OPENAI_BASE_URL", "OPENAI_MODEL", "OPENAI_API_KEY"
NO_ADDRESS = f"{URL} is no address: expected such as http://127.0.0.1:11434/v1."
AGAIN = "What was answered is kept: run the same command again to go on."
FIRST, LONGEST = 1.0, 600.0  # seconds of the first wait, and of the longest that is obeyed
SAID = 200  # characters of what a server says
TRIES = 6  # of a request that fails
FORMS = 3  # answers in another form than was asked for, of which the last is given up on
CHARACTERS = 3.5  # of a token, for the estimate
RETRIED = (408, 409, 425, 429)  # and whatever is 500 or more
ONE_UNITS = (400, 413, 422)  # what is wrong with one question, not with all


class EndpointError(Refused):
    """Why the endpoint answers nothing more, and what to do about it."""

    exit_code = 1


class Endpoint(Prompted):
    """An explainer at an endpoint; threads may share it.

    Args:
        answers: the file that answers are kept in; None keeps them in memory.
        model, base_url: None means OPENAI_MODEL and OPENAI_BASE_URL. The key is OPENAI_API_KEY;
            a server of one's own may need none.
        per_minute: requests at most.
        timeout: seconds without a word from the server.
        temperature: None for models that allow none.
        budget: tokens, in and out, after which nothing more is asked; None: no end.
        room: tokens that an answer may have beyond its own, for a model that thinks aloud first.

    Raises:
        Refused: the package `openai` is not here, or a setting is missing.
    """

    def __init__(
        self,
        answers: Path | str | None = None,
        model: str | None = None,
        base_url: str | None = None,
        per_minute: float = 60.0,
        timeout: float = 120.0,
        temperature: float | None = 0.0,
        budget: int | None = None,
        room: int = 0,
    ):
        self.model = model or os.environ.get(MODEL, "")
        url = base_url or os.environ.get(URL, "")
        if not self.model or not url:
            raise Refused(
                f"No endpoint is named: set {URL}, such as http://127.0.0.1:11434/v1, and {MODEL}; "
                f"and {KEY} where it needs a key."
            )
        self.url = checked_url(url)
        self.temperature, self.room = temperature, whole("room", room, 0)
        self.budget = budget if budget is None else whole("budget", budget, 1)
        self.spent = Spent()
        self.stopped = threading.Event()
        self._key = Key(os.environ.get(KEY, "").strip())  # a line break is no part of it
        if not (self._key.value.isascii() and self._key.value.isprintable()):
            raise Refused(f"{KEY} has characters that no key has: copy it again, alone.")
        self._answers = Answers(None if answers is None else Path(answers))
        self._pace = Pace(number("per_minute", per_minute, above=0), self.stopped)
        self._one: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._openai = optional("openai")
        wait = number("timeout", timeout, above=0)
        try:
            self._client = self._openai.OpenAI(
                api_key=self._key.value or "none", base_url=self.url, timeout=wait, max_retries=0
            )
        except Exception:  # the client's own check of an address; its words would repeat it
            raise Refused(NO_ADDRESS) from None

    def __repr__(self) -> str:
        return f"Endpoint({self.model!r} at {self.url})"

    def __getstate__(self):
        raise TypeError("An Endpoint holds a key and is not copied: make another one.")

    # ---- asking

    def ask(self, question: Question) -> Any:
        """What is read in the answer to a question; it is asked once, and then kept.

        Raises:
            NoAnswer: no answer had the form that was asked for, or the question was refused.
            EndpointError: the endpoint cannot be reached, refuses the key, or the budget is spent.
        """
        key, prompt, why = self.key(question), question.prompt, ""
        with self._one[key]:
            if (kept := self._answers.get(key)) is not None:
                return question.read(kept)
            for _ in range(FORMS):
                text, tokens = self.answer(prompt, question.most + self.room)
                try:
                    found = question.read(text)
                except NoAnswer as error:
                    why = str(error)
                    prompt = f"{question.prompt}\n\nYour last answer could not be read: {why}."
                    continue
                self._answers.put(key, text, tokens)
                return found
        raise NoAnswer(f"{self.model} answered {FORMS} times in another form: {why}.")

    def kept(self, question: Question) -> Any:
        """What was answered before; None where nothing was."""
        text = self._answers.get(self.key(question))
        return None if text is None else question.read(text)

    def key(self, question: Question) -> str:
        """What an answer is kept under: a hash of all that it depends on."""
        most = question.most + self.room
        asked = [self.url, self.model, self.temperature, most, SYSTEM, question.prompt]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()

    def answer(self, prompt: str, most: int) -> tuple[str, list[int]]:
        """(answer, [tokens in, tokens out]), asked now: again where it fails and may not fail."""
        why, wait = "", 0.0
        for attempt in range(TRIES):
            if wait and self.stopped.wait(wait):
                break
            if self.budget is not None and self.spent.tokens >= self.budget:
                raise EndpointError(
                    f"{self.spent.tokens:,} tokens are spent, of a budget of {self.budget:,}. "
                    f"{AGAIN}"
                )
            self._pace.wait()
            if self.stopped.is_set():
                break
            try:
                return self._once(prompt, most)
            except self._openai.APIStatusError as error:
                why, wait = self._status(error, attempt)
            except self._openai.APITimeoutError:
                why, wait = "does not answer in time", backoff(attempt)
            except self._openai.APIConnectionError as error:
                why = f"cannot be reached ({type(error.__cause__ or error).__name__})"
                wait = backoff(attempt)
            except NoAnswer:
                raise
            except (self._openai.OpenAIError, ValueError, TypeError, AttributeError, LookupError):
                why, wait = "answers what is no answer of this protocol", backoff(attempt)
        stopped = "was stopped" if self.stopped.is_set() else why
        raise EndpointError(f"{self.url} {stopped}, after {attempt + 1} tries. {AGAIN}") from None

    def _once(self, prompt: str, most: int) -> tuple[str, list[int]]:
        """One request."""
        more = {} if self.temperature is None else {"temperature": self.temperature}
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]
        found = self._client.chat.completions.create(
            model=self.model, messages=messages, max_completion_tokens=most, **more
        )
        choice, usage = found.choices[0], found.usage
        text = choice.message.content
        if choice.finish_reason == "length":
            text = text or ""  # all of it was thinking
        if not isinstance(text, str):
            raise TypeError("no text")
        guess = [about(SYSTEM + prompt), about(text)]
        tokens = [usage.prompt_tokens, usage.completion_tokens] if usage else guess
        tokens = [n if isinstance(n, int) else g for n, g in zip(tokens, guess, strict=True)]
        self.spent.add(tokens)
        if choice.finish_reason == "length":
            raise NoAnswer(f"{self.model} was cut off after {most:,} tokens: give it more --room")
        return self.redacted(text), tokens

    def _status(self, error, attempt: int) -> tuple[str, float]:
        """(why, seconds to wait) after a refusal; raises where it is of no use to wait."""
        status = error.status_code
        said = "".join(c for c in self.redacted(str(error))[:SAID] if c.isprintable())
        if status in ONE_UNITS:
            raise NoAnswer(f"{self.url} refuses this question: {said}") from None
        if status not in RETRIED and status < 500:
            advice = f"is {KEY} right?" if status in (401, 403) else f"are {URL} and {MODEL} right?"
            raise EndpointError(f"{self.url} refuses: {said}; {advice}") from None
        told = retry_after(error.response.headers)
        if told is not None and told > LONGEST:
            raise EndpointError(
                f"{self.url} asks to wait {told:,.0f} seconds: do so. {AGAIN}"
            ) from None
        wait = backoff(attempt) if told is None else told
        if told is not None or status == 429:
            self._pace.hold(wait)
            wait = 0.0
        return f"refuses: {said}", wait

    def redacted(self, text: str) -> str:
        """A text of the server's without the key, should it be in it."""
        return text.replace(self._key.value, "[key]") if len(self._key.value) > 3 else text

    def stop(self) -> None:
        """Let nobody wait any longer, or ask for anything more."""
        self.stopped.set()

    # ---- what it will take

    def estimate(self, some: Sequence[Examples], units: int | None = None) -> Estimate:
        """What naming and scoring will take, from some units' prompts; what is kept costs nothing.

        Args:
            some: a fair sample of the units that are to be named.
            units: how many these are; None means all of `some`.
        """
        count = _Count(self)
        for examples in some:
            if examples.enough:
                score(count, count.explain(examples), examples)
        share = (len(some) if units is None else units) / max(len(some), 1)
        return Estimate(*(round(share * n) for n in (count.requests, count.read, count.written)))


@dataclass(frozen=True)
class Estimate:
    """What is still to be asked.

    Args:
        requests: how many; read, written: their tokens in and out, about (3.5 characters each).
    """

    requests: int
    read: int
    written: int

    @property
    def tokens(self) -> int:
        """In and out."""
        return self.read + self.written

    def cost(self, price_in: float, price_out: float) -> float:
        """In the currency of the prices, which are for a million tokens."""
        return (self.read * price_in + self.written * price_out) / 1e6

    def __str__(self) -> str:
        return (
            f"about {self.requests:,} requests, {self.read:,} tokens in and at most "
            f"{self.written:,} out"
        )


class _Count(Prompted):
    """Counts what would be asked; answers with what is kept, else with nothing in particular."""

    def __init__(self, endpoint: Endpoint):
        self.endpoint, self.requests, self.read, self.written = endpoint, 0, 0, 0

    def ask(self, question: Question) -> Any:
        if (found := self.endpoint.kept(question)) is not None:
            return found
        self.requests += 1
        self.read += about(SYSTEM + question.prompt)
        self.written += question.most + self.endpoint.room
        return question.blank


# --------------------------------------------------------------------------------- the pieces


@dataclass(frozen=True)
class Key:
    """A key that nothing shows."""

    value: str = field(repr=False)


@dataclass
class Spent:
    """Tokens that were paid for here and now, and requests that were answered."""

    read: int = 0
    written: int = 0
    requests: int = 0

    @property
    def tokens(self) -> int:
        """In and out."""
        return self.read + self.written

    def add(self, tokens: Sequence[int]) -> None:
        """One answer's."""
        self.read, self.written = self.read + tokens[0], self.written + tokens[1]
        self.requests += 1


class Answers:
    """Answers by their keys, in a file to which each is appended as it comes.

    A line that a kill has torn is cut off when the file is opened.
    """

    def __init__(self, path: Path | None):
        self.path, self.lock, self.found = path, threading.Lock(), {}
        if path is None or not path.exists():
            return
        with reading(path, RunError, "Move it away: what is in it will be asked again."):
            data = path.read_bytes()
            whole_lines = data[: data.rfind(b"\n") + 1]
            for line in whole_lines.decode().splitlines():
                said = json.loads(line)
                self.found[str(said["key"])] = str(said["answer"])
            if len(whole_lines) < len(data):
                os.truncate(path, len(whole_lines))

    def get(self, key: str) -> str | None:
        """The answer that is kept under a key; None where there is none."""
        return self.found.get(key)

    def put(self, key: str, answer: str, tokens: Sequence[int]) -> None:
        """Keep an answer: on the disk before this returns.

        Raises:
            RunError: the disk is full, or the file cannot be written.
        """
        with self.lock:
            self.found[key] = answer
            if self.path is None:
                return
            line = json.dumps({"key": key, "answer": answer, "tokens": list(tokens)})
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(line + "\n")
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise RunError(why_not_written(self.path, error)) from error


class Pace:
    """Lets requests go at equal distances, and none before all may go again."""

    def __init__(self, per_minute: float, stopped: threading.Event):
        self.gap, self.next = 60 / per_minute, 0.0
        self.stopped, self.lock = stopped, threading.Lock()

    def wait(self) -> None:
        """Until it is this thread's turn."""
        while not self.stopped.is_set():
            with self.lock:
                now = time.monotonic()
                if now >= self.next:
                    self.next = now + self.gap
                    return
                left = self.next - now
            self.stopped.wait(left)

    def hold(self, seconds: float) -> None:
        """Nobody goes for so long."""
        with self.lock:
            self.next = max(self.next, time.monotonic() + seconds)


def backoff(attempt: int) -> float:
    """Seconds to wait after a failed try: 1, 2, 4, … up to 30, less a random quarter at most."""
    return min(FIRST * 2.0**attempt, 30 * FIRST) * (1 - random.random() / 4)


def retry_after(headers) -> float | None:
    """The seconds that a server asks to wait, in whichever of its forms; None where it does not."""
    given = headers.get("retry-after-ms"), headers.get("retry-after")
    for value, unit in zip(given, (1_000, 1), strict=True):
        with suppress(TypeError, ValueError):
            seconds = float(value) / unit
            return seconds if 0 <= seconds < float("inf") else None
    with suppress(TypeError, ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(given[1]).timestamp() - time.time())
    return None


def checked_url(url: str) -> str:
    """An address without anything secret in it.

    Raises:
        Refused: it is none, or has a name, a password or a query.
    """
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname)
        fits = fits and url.isprintable() and " " not in url
        fits = fits and parts.port != 0 and bool(parts.hostname.encode("idna"))
        secret = "@" in parts.netloc or bool(parts.query) or bool(parts.fragment)
    except ValueError:
        fits, secret = False, False
    if secret:
        raise Refused(f"{URL} has more than an address in it: give a key in {KEY} alone.")
    if not fits:
        raise Refused(NO_ADDRESS)
    return url.rstrip("/")


def about(text: str) -> int:
    """About how many tokens a text has."""
    return round(len(text) / CHARACTERS)


def optional(module: str):
    """A module of the extra [naming], or one sentence that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise Refused(f"An endpoint needs the package {module}: {EXTRA} installs it.") from None
