"""lm_eval's own command line, with the model ``alaya`` and our tasks known to it."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from alaya_hf.errors import ConfigError
from eval.harness.backends import require_prompt_logprobs

#: Our task files, which every command of lm_eval finds beside its own.
TASKS = Path(__file__).parents[1] / "tasks"


def main(args: list[str]) -> None:
    """Run lm_eval's command line.

    Parameters
    ----------
    args : list of str
        What would follow ``lm-eval`` on a command line: ``["--model", "alaya", "--model_args",
        "pretrained=smollm2,preset=alaya", "--tasks", "legal_needle_single"]``.

    Raises
    ------
    ConfigError
        If lm_eval is not installed, for settings that cannot be served, or if a likelihood task is asked of a backend that
        has no log-probabilities of prompts.
    """
    try:
        from lm_eval._cli import HarnessCLI
        from lm_eval.utils import setup_logging
    except ImportError as error:
        raise ConfigError(f"the harness needs lm_eval ({error}). Run: pip install 'lm_eval[hf,api]==0.4.13'") from error
    import eval.harness.model  # noqa: F401  (registers "alaya")

    setup_logging()
    cli = HarnessCLI()
    # lm_eval's parser reads the process's arguments.
    kept = sys.argv
    try:
        sys.argv = ["lm-eval", *args]
        namespace = cli.parse_args()
    finally:
        sys.argv = kept
    if TASKS.is_dir() and hasattr(namespace, "include_path"):
        namespace.include_path = [str(TASKS), *([namespace.include_path] if namespace.include_path else [])]
    if namespace.command == "run":
        _check(namespace)
    cli.execute(namespace)


def _check(namespace: Namespace) -> None:
    """Refuse what could only fail after hours: likelihood tasks on a server that cannot score."""
    from lm_eval.api.registry import get_model
    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    run = EvaluatorConfig.from_cli(namespace)
    if not issubclass(get_model(run.model), LocalCompletionsAPI):
        return
    tasks: dict[str, Any] = run.process_tasks(run.metadata).load(run.tasks)["tasks"]
    require_prompt_logprobs(run.model, {name: task.OUTPUT_TYPE for name, task in tasks.items()}, run.model_args)
