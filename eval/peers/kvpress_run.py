"""Answer questions over a KV cache compressed by kvpress. Runs in kvpress's own environment, started by ``kvpress.py``.

Reads a JSON object ``{"model", "device", "dtype", "max_new_tokens", "stop", "presses"}`` from the first argument and JSON
lines from the second, one document a line: ``{"document", "context_ids", "kept", "items": [{"id", "question_ids",
"continuations"}]}``. Writes one JSON line per press and item to the third argument: ``{"press", "item", "answer", "logprobs",
"tokens", "seconds_per_token", "device_bytes", "full_bytes", "attended", "context"}``.

The context is compressed before any question is seen, as in kvpress's own pipeline: the press is active while the context is
prefilled, and the question reads what it kept, at the positions that follow the whole context. (The pipeline itself is not used
because it puts a chat template of its own around the text.)
"""

import json
import sys
import time

import torch
from kvpress import ExpectedAttentionPress, SnapKVPress
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

PRESSES = {"snapkv": SnapKVPress, "expected_attention": ExpectedAttentionPress}


def ratio(kept, context):
    """Share of tokens to remove so that kvpress, which rounds down, keeps ``min(kept, context)``."""
    return 0.0 if kept >= context else 1.0 - (kept + 0.5) / context


def cache_bytes(cache):
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


class Compressed:
    """A context, compressed, and the means to ask about it."""

    def __init__(self, model, tokenizer, press, context_ids, device):
        self.model, self.tokenizer, self.device = model, tokenizer, device
        self.context = len(context_ids)
        self.cache = DynamicCache()
        with press(model):
            tokens = torch.tensor([context_ids], device=device)
            out = model(input_ids=tokens, past_key_values=self.cache, logits_to_keep=1)
        # What follows the context itself, for items without a question.
        self.after = out.logits[0].float().log_softmax(dim=-1)
        self.kept = self.cache.get_seq_length()

    def feed(self, ids, start):
        """Log-probabilities after each of ``ids`` (at least one), the first of which is at position ``start`` of the text."""
        positions = torch.arange(start, start + len(ids), device=self.device)[None]
        tokens = torch.tensor([ids], device=self.device)
        out = self.model(input_ids=tokens, past_key_values=self.cache, position_ids=positions)
        return out.logits[0].float().log_softmax(dim=-1)

    def forget(self):
        """Drop everything after the context."""
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[:, :, : self.kept], layer.values[:, :, : self.kept]

    def generate(self, question_ids, max_new_tokens, stop):
        """A greedy answer: text, tokens, seconds per decoding step."""
        position = self.context + len(question_ids)
        begun = self.feed(question_ids, self.context) if question_ids else self.after
        ids = [int(begun[-1].argmax())]
        times = []
        ends = self.model.generation_config.eos_token_id
        ends = set(ends) if isinstance(ends, list) else {ends, self.tokenizer.eos_token_id}
        while len(ids) < max_new_tokens and ids[-1] not in ends:
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            if any(text.find(one, len(text) - len(text.lstrip())) >= 0 for one in stop):
                break
            began = time.perf_counter()
            ids.append(int(self.feed(ids[-1:], position)[-1].argmax()))
            times.append(time.perf_counter() - began)
            position += 1
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        self.forget()
        return text, len(ids), sum(times) / len(times) if times else None

    def likelihood(self, question_ids, continuation):
        """Log-likelihood of a continuation in nats. One pass: attention to a compressed cache is dense."""
        fed = [*question_ids, *continuation[:-1]]
        logprobs = torch.cat([self.after, self.feed(fed, self.context)]) if fed else self.after
        logprobs = logprobs[-len(continuation) :]
        self.forget()
        return float(logprobs.gather(1, torch.tensor(continuation, device=self.device)[:, None]).sum())


def answers(name, model, tokenizer, document, settings):
    """Result lines of one press and document."""
    context = len(document["context_ids"])
    press = PRESSES[name](compression_ratio=ratio(document["kept"], context))
    compressed = Compressed(model, tokenizer, press, document["context_ids"], settings["device"])
    held = cache_bytes(compressed.cache)
    for item in document["items"]:
        row = {"press": name, "item": item["id"], "answer": "", "logprobs": [], "seconds_per_token": None}
        if item["continuations"]:
            row["logprobs"] = [compressed.likelihood(item["question_ids"], ids) for ids in item["continuations"]]
            row["tokens"] = len(item["continuations"][0])
        else:
            row["answer"], row["tokens"], row["seconds_per_token"] = compressed.generate(
                item["question_ids"], settings["max_new_tokens"], settings["stop"]
            )
        row["device_bytes"], row["full_bytes"] = held, held * context // compressed.kept
        question = len(item["question_ids"])
        row["attended"], row["context"] = compressed.kept + question, context + question
        yield row


@torch.no_grad()
def main(settings_path, documents_path, rows_path):
    with open(settings_path, encoding="utf-8") as file:
        settings = json.load(file)
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    model = AutoModelForCausalLM.from_pretrained(
        settings["model"], dtype=getattr(torch, settings["dtype"]), attn_implementation="sdpa"
    )
    model = model.to(settings["device"]).eval()
    with open(documents_path, encoding="utf-8") as documents, open(rows_path, "w", encoding="utf-8") as rows:
        for line in documents:
            document = json.loads(line)
            for name in settings["presses"]:
                for row in answers(name, model, tokenizer, document, settings):
                    rows.write(json.dumps(row, ensure_ascii=False) + "\n")
                    rows.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
