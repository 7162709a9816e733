"""The same items against a server with OpenAI's ``/v1/completions``: vLLM, SGLang, LMCache under vLLM.

``python -m eval.peers.openai_rows --help``. The server is somebody else's program, started by the user (README.md has the
commands); rows carry the name that the user gives it and nothing here imitates one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alaya_hf.errors import ConfigError
from eval.peers.openai_api import Completion, CompletionsServer, Prompt
from eval.peers.rows import as_task, compared, context_ids, continuation_ids, cut, result_row
from eval.running.store import Results

if TYPE_CHECKING:
    from eval.legal.items import Item, Output, Task

#: Names that rows may carry.
SYSTEMS = ("vllm", "sglang", "lmcache", "transformers_serve")


def run_openai(
    items: Sequence[Item],
    task: Task | str,
    model: str,
    length: int,
    system: str,
    server: CompletionsServer,
    results: Results,
    hardware: str,
    tokenizer: Any = None,
) -> list[dict[str, Any]]:
    """Answer items with a server and add the rows to the results.

    Parameters
    ----------
    items : sequence of Item
        Built with the model's tokenizer. Items of one document should stand together: servers that cache prefixes then prefill
        it once. Those that the results hold already are left out.
    task : Task or str
        What the items belong to; a name of ``eval.legal.TASKS``.
    model : str
        Name of the model in the rows.
    length : int
        The length that the items were built for.
    system : str
        What the server is, of :data:`SYSTEMS`.
    server : CompletionsServer
    results : Results
    hardware : str
        What the server runs on, its version included: nothing that can be asked over this interface.
    tokenizer, optional
        With it, prompts are sent as token ids, the very ones that other systems get. Without it they are sent as text, for
        servers that take no ids; generation tasks only.

    Returns
    -------
    list of dict
        The new rows. ``seconds_per_token`` is measured at the client, from the first to the last piece of the stream; there is no
        memory and no ``retrieval``, which the interface does not tell.

    Raises
    ------
    ConfigError
        For an unknown system, or a task that needs log-probabilities of prompts from a server that has none.
    ConnectionError
        If the server does not answer. Rows answered before then are kept.
    """
    if system not in SYSTEMS:
        raise ConfigError(
            f"unknown system {system!r}. Expected the name of what runs at {server.url}: {', '.join(SYSTEMS)}."
        )
    task = as_task(task)
    if task.kind != "generate":
        if tokenizer is None:
            raise ConfigError(
                f"the task {task.name} compares likelihoods, which needs token ids. Pass the model's tokenizer."
            )
        if not server.gives_prompt_logprobs():
            raise ConfigError(
                f"the task {task.name} needs log-probabilities of prompt tokens, which the server at {server.url} does not give "
                "(echo with logprobs). Run generation tasks on it."
            )
    done, rows = results.done(), []
    for item in items:
        if (model, task.name, length, system, item.id) in done:
            continue
        output, timed = _answer(server, task, item, tokenizer)
        spent = None if timed is None else timed.seconds_per_token
        row = result_row(model, task, length, system, item, output, hardware, seconds_per_token=spent)
        results.add(row)
        rows.append(row)
    return rows


def _answer(
    server: CompletionsServer, task: Task, item: Item, tokenizer: Any
) -> tuple[Output, Completion | None]:  # fmt: skip
    from eval.legal.items import Output

    prompt: Prompt = item.context + item.question
    if tokenizer is not None:
        prompt = [*context_ids(tokenizer, item), *continuation_ids(tokenizer, item.question)]
    if task.kind == "generate":
        completion = server.complete(prompt, task.max_new_tokens, task.stop)
        return Output(text=cut(completion.text, task.stop)), completion
    assert isinstance(prompt, list)
    texts = [continuation_ids(tokenizer, text) for text in compared(task, item)]
    likelihoods = tuple(_likelihood(server, prompt, ids) for ids in texts)
    return Output(logprobs=likelihoods, tokens=len(texts[0])), None


def _likelihood(server: CompletionsServer, prompt: list[int], continuation: list[int]) -> float:
    """Log-likelihood of a continuation in nats."""
    found = server.prompt_logprobs([*prompt, *continuation])
    given = len(prompt) + len(continuation)
    if found is None or len(found) != given:
        raise ConnectionError(
            f"{server.url} returned {'no' if found is None else len(found)} log-probabilities for a prompt of {given} tokens. "
            "Expected one per token; serve with room for one token more than the prompt."
        )
    return float(sum(value or 0.0 for value in found[len(prompt) :]))


def main(
    system: Annotated[str, typer.Option(help=f"What the server is: {', '.join(SYSTEMS)}.")],
    url: Annotated[str, typer.Option(help="The endpoint, http://HOST:PORT/v1/completions.")],
    model: Annotated[
        str, typer.Option(help="The model: what the server knows it by, and where its tokenizer comes from.")
    ],
    task: Annotated[str, typer.Option(help="A task of eval.legal.")],
    length: Annotated[int, typer.Option(help="Tokens of context.")],
    results: Annotated[Path, typer.Option(help="Folder for rows.jsonl.")],
    hardware: Annotated[str, typer.Option(help="What the server runs on, with its version.")],
    data_dir: Annotated[
        Path | None, typer.Option(help="Local copies of the data sets; else the Hugging Face hub.")
    ] = None,
    items: Annotated[int, typer.Option(help="How many items.")] = 60,
    seed: Annotated[int, typer.Option(help="Seed of the items.")] = 0,
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer, if not the model's name.")] = None,
    text: Annotated[bool, typer.Option(help="Send text instead of token ids.")] = False,
) -> None:
    """Answer a task's items with a running server."""
    from eval.legal import Source, load_tokenizer

    known = as_task(task)
    encoder = load_tokenizer(tokenizer or model)
    built = known.build(Source(data_dir), encoder, length, items=items, seed=seed)
    kept = Results(results)
    given = None if text else encoder
    run_openai(built, known, model, length, system, CompletionsServer(url, model), kept, hardware, given)
    wanted = (model, task, length, system)
    rows = [row for row in kept.rows() if tuple(row[key] for key in ("model", "task", "length", "system")) == wanted]
    scores = [row["metrics"][known.metric] for row in rows]
    typer.echo(
        f"{system}, {task}, {length} tokens: {known.metric} {sum(scores) / len(scores):.3f} over {len(scores)} items"
    )


if __name__ == "__main__":
    typer.run(main)
