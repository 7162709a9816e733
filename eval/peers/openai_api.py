"""A server with OpenAI's ``/v1/completions``, asked over HTTP."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import requests

Prompt = str | list[int]


@dataclass
class Completion:
    """One generated answer.

    Attributes
    ----------
    text : str
    tokens : int
        Generated tokens, as the server counts them; pieces of the stream where it does not say.
    seconds_per_token : float or None
        Time from the first to the last piece of the stream, divided by the tokens after the first; None for a single piece.
    """

    text: str
    tokens: int
    seconds_per_token: float | None


@dataclass(frozen=True)
class CompletionsServer:
    """A server that completes prompts.

    Parameters
    ----------
    url : str
        The endpoint itself, as lm_eval's ``base_url``: ``http://localhost:8000/v1/completions``.
    model : str
        The name that the server knows the model by.
    timeout : float
        Seconds to wait for a response to begin.
    headers : mapping, optional
        Default: ``Authorization`` with ``OPENAI_API_KEY`` if that is set.
    """

    url: str
    model: str
    timeout: float = 600.0
    headers: dict[str, str] = field(default_factory=lambda: _authorization())

    def _post(self, payload: dict[str, Any], stream: bool = False) -> requests.Response:
        try:
            response = requests.post(
                self.url,
                json={"model": self.model, "temperature": 0, **payload},
                headers=self.headers,
                timeout=self.timeout,
                stream=stream,
            )
        except requests.RequestException as error:
            raise ConnectionError(
                f"no answer from {self.url}: {error}. Start the server first, and give the whole endpoint "
                "(http://HOST:PORT/v1/completions)."
            ) from error
        return response

    def complete(self, prompt: Prompt, max_tokens: int, stop: Sequence[str] = ()) -> Completion:
        """A greedy completion, streamed.

        Parameters
        ----------
        prompt : str or list of int
            Text, or token ids.
        stop : sequence of str
            At most four, as OpenAI's interface allows.

        Raises
        ------
        ConnectionError
            If nobody answers, or the answer is an error.
        """
        payload: dict[str, Any] = {"prompt": prompt, "max_tokens": max_tokens, "stream": True}
        payload["stream_options"] = {"include_usage": True}
        if stop:
            payload["stop"] = list(stop)[:4]
        with self._post(payload, stream=True) as response:
            _check(response)
            pieces: list[str] = []
            times: list[float] = []
            counted = None
            for event in _events(response):
                text = "".join(choice.get("text") or "" for choice in event.get("choices") or ())
                if text:
                    pieces.append(text)
                    times.append(time.perf_counter())
                counted = (event.get("usage") or {}).get("completion_tokens", counted)
        tokens = len(pieces) if counted is None else int(counted)
        # The end-of-text token counts, but no piece of text comes with it: the last piece may be earlier by one token.
        spent = (times[-1] - times[0]) / (tokens - 1) if len(times) > 1 and tokens > 1 else None
        return Completion("".join(pieces), tokens, spent)

    def prompt_logprobs(self, prompt: Prompt) -> list[float | None] | None:
        """Log-probability of every token of the prompt given those before it.

        Returns
        -------
        list of float or None
            In nats; None in place of the first token's. None as a whole if the server does not give them.

        Raises
        ------
        ConnectionError
            If nobody answers.
        """
        response = self._post({"prompt": prompt, "max_tokens": 1, "echo": True, "logprobs": 1})
        if not response.ok:
            return None
        choices = response.json().get("choices") or [{}]
        found = (choices[0].get("logprobs") or {}).get("token_logprobs")
        # Without echo: the generated token's alone.
        if not found or len(found) < 2:
            return None
        return list(found[:-1])

    def gives_prompt_logprobs(self) -> bool:
        """Whether the server supports ``echo`` with ``logprobs``: one request of one new token."""
        return self.prompt_logprobs("This agreement shall be governed by") is not None


def _authorization() -> dict[str, str]:
    key = os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _check(response: requests.Response) -> None:
    if not response.ok:
        raise ConnectionError(f"{response.url} answered {response.status_code}: {response.text[:500]}")


def _events(response: requests.Response) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events."""
    for line in response.iter_lines():
        if not line.startswith(b"data:"):
            continue
        data = line[len(b"data:") :].strip()
        if data == b"[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise ConnectionError(f"{response.url} broke off: {event['error']}")
        yield event
