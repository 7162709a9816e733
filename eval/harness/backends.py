"""Which lm_eval models can score a given text, and which tasks ask for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alaya_hf.errors import ConfigError

#: Request types of lm_eval's tasks that need the probabilities of a text that is given.
LIKELIHOOD = ("loglikelihood", "loglikelihood_rolling", "multiple_choice")


def _refusal(backend: str, model_args: Mapping[str, Any]) -> str | None:
    """Why a backend cannot give log-probabilities of a prompt; None if it can, or computes them itself."""
    from lm_eval.api.registry import get_model
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    from eval.peers.openai_api import CompletionsServer

    model = get_model(backend)
    if not issubclass(model, LocalCompletionsAPI):
        return None
    if issubclass(model, LocalChatCompletion):
        return "a chat endpoint gives log-probabilities of its own answer only"
    url = model_args.get("base_url")
    if url is None:
        return None
    name = str(model_args.get("model") or model_args.get("pretrained"))
    if CompletionsServer(str(url), name).gives_prompt_logprobs():
        return None
    return f"the server at {url} returned none for a request with echo and logprobs"


def require_prompt_logprobs(
    backend: str, tasks: Mapping[str, str], model_args: Mapping[str, Any] | None = None
) -> None:
    """Refuse likelihood tasks on a backend that cannot score a prompt, before anything runs.

    Parameters
    ----------
    backend : str
        Name of an lm_eval model: ``"alaya"``, ``"hf"``, ``"local-completions"``.
    tasks : mapping
        Task names to their ``output_type``: ``"generate_until"``, ``"loglikelihood"``, ``"loglikelihood_rolling"`` or
        ``"multiple_choice"``.
    model_args : mapping, optional
        The backend's arguments. With ``base_url``, a completions server is asked for the log-probabilities of a short prompt
        (one request of one new token).

    Raises
    ------
    ConfigError
        If a task needs them and the backend has none; the message names the tasks.
    ConnectionError
        If the server has to be asked and does not answer.
    """
    asking = sorted(name for name, kind in tasks.items() if kind in LIKELIHOOD)
    if not asking:
        return
    why = _refusal(backend, model_args or {})
    if why is not None:
        raise ConfigError(
            f"the tasks {', '.join(asking)} need log-probabilities of prompt tokens, which the backend {backend} does not give: "
            f"{why}. Run generation tasks on it, or these tasks with --model alaya, --model hf, or local-completions on a server "
            "that supports echo with logprobs (vLLM, SGLang)."
        )
