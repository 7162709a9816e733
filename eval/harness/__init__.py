"""lm-evaluation-harness with our cache: ``python -m eval harness [lm_eval arguments]``."""

from __future__ import annotations

from eval.harness.backends import require_prompt_logprobs
from eval.harness.main import main

__all__ = ["main", "require_prompt_logprobs"]
