"""Items as chat prompts, for models that were trained on a chat template."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from eval.legal.items import Item


def with_chat(item: Item, tokenizer: Any) -> Item:
    """The item with context and question as one user turn, followed by the template's generation prompt.

    What precedes the context in the template joins the context and what follows the question joins the question, so that
    items of one document still share their context; spans are shifted, and choices lose their leading space, as they now
    stand at the start of the assistant's turn. The template's tokens come on top of the item's length. Not meant for
    perplexity items: their continuation belongs to the context's text.

    Parameters
    ----------
    item : Item
    tokenizer : PreTrainedTokenizerBase
        If it puts a first token before every text by itself, that token is left out here.

    Raises
    ------
    ValueError
        If the tokenizer has no chat template, or the template changes the text of a turn.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"the tokenizer {getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__} has no chat template. "
            "Ask without chat, or use an instruction-tuned model."
        )
    content = item.context + item.question
    turns = [{"role": "user", "content": content}]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    bos = getattr(tokenizer, "bos_token", None)
    if bos and rendered.startswith(bos) and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]:
        rendered = rendered[len(bos) :]
    # Templates commonly trim a turn; a longest match tells whether they did anything else.
    text, cut = content, 0
    start = rendered.find(text)
    if start < 0:
        cut = len(content) - len(content.lstrip())
        text = content.strip()
        start = rendered.find(text)
    if start < 0 or any(begin < cut for begin, _ in item.spans):
        raise ValueError(f"the chat template changes the text of item {item.id}. Ask without chat.")
    split = start + len(item.context) - cut
    shift = start - cut
    return replace(
        item,
        context=rendered[:split],
        question=rendered[split:],
        answers=tuple(text.lstrip() for text in item.answers) if item.choices else item.answers,
        choices=tuple(text.lstrip() for text in item.choices),
        spans=tuple((begin + shift, end + shift) for begin, end in item.spans),
    )
