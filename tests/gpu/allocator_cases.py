"""What an engine's store in an allocator's pool must do, on any device: answer as the layer's own tensor does."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch

from alaya_hf import AlayaCache, AlayaConfig, TopK
from alaya_hf.device_layer import DeviceLayer
from tests.gpu import layer_cases as cases

#: Blocks that no boundary of the tests falls on, and more tokens than they reach.
ALLOCATORS: dict[str, Any] = {
    "contiguous": {"kind": "contiguous", "max_tokens": 2048},
    "dynamic": "dynamic",
    "paged": {"kind": "paged", "block": 12},
    "segment": {"kind": "segment", "block": 12},
}
SMALL = cases.DEFAULT.replace(query=TopK(9), prefill_block=40)


def with_allocator(name: str, settings: AlayaConfig = SMALL) -> AlayaConfig:
    return settings.replace(allocator=ALLOCATORS[name])


def check_generation(model: Any, name: str, new: int, settings: AlayaConfig = SMALL) -> AlayaCache:
    """Prompt in chunks, decoding, a crop, a question of a few tokens, decoding: the very tokens and scores of the default."""
    outs, cache = [], AlayaCache()
    ids, more = cases.prompt(model, 150), cases.prompt(model, 9, 1)
    for each in (settings, with_allocator(name, settings)):
        cache = AlayaCache(each, config=model.config)
        found: list[Any] = [cases.generate(model, cache, ids, new, prefill_chunk_size=70)]
        cache.crop(-50)
        found.append(cases.logits(model, cache, more))
        found += [cases.logits(model, cache, more[:, :1]) for _ in range(3)]
        outs.append((found, [layer.contents() for layer in cache.layers]))
    assert outs[0][0][0] == outs[1][0][0]
    for x, y in zip(outs[0][0][1:], outs[1][0][1:], strict=True):
        assert torch.equal(x, y)
    for mine, wanted in zip(outs[0][1], outs[1][1], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(mine, wanted, strict=True))
    groups = {id(layer.tokens.exact.group) for layer in cache.layers}
    assert len(groups) == 1  # one pool of all layers
    return cache


def check_beams(model: Any, name: str) -> None:
    ids, call = cases.prompt(model, 95), {"num_beams": 2, "num_return_sequences": 2}
    found, wanted = (
        cases.generate(model, AlayaCache(each, config=model.config), ids, 4, **call)
        for each in (with_allocator(name, cases.ALL), cases.ALL)
    )
    assert found == wanted


def check_passes(
    device: str, store_dtype: str = "auto", names: Iterable[str] = ALLOCATORS, rows: int = 1, heads: int = 2
) -> None:
    """Prefill, a step, a question, a crop, a prefill over what is offloaded, a step: the very numbers of the default."""
    torch.manual_seed(0)
    k, v = (torch.randn(rows, 2, 170, 16).to(device, torch.float16) for _ in "kv")
    q = (3 * torch.randn(rows, heads, 170, 16)).to(device, torch.float16)
    base, wanted = SMALL.replace(store_dtype=store_dtype, query=TopK(5)), []
    for each in (base, *(with_allocator(name, base) for name in names)):
        layer, found = DeviceLayer(each), []
        for begin, end in ((0, 92), (92, 93), (93, 96)):
            found.append(cases.attend(layer, *(x[:, :, begin:end] for x in (q, k, v))))
        layer.crop(-3)
        layer.batch_select_indices(torch.tensor([rows - 1] * rows))
        for begin, end in ((96, 162), (162, 163)):
            found.append(cases.attend(layer, *(x[:, :, begin:end] for x in (q, k, v))))
        found += layer.contents()
        assert layer.tokens.lows == [128] * rows
        wanted = wanted or found
        assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True)), each.allocator


def check_layer(device: str, name: str, seed: int, operations: int = 6, store_dtype: str = "auto") -> None:
    """Random passes, crops, choices of rows and copies of two layers of a cache: contents are those of plain tensors."""
    generator = torch.Generator().manual_seed(seed)

    def number(most: int) -> int:
        return int(torch.randint(1, most + 1, (), generator=generator))

    settings = with_allocator(name, cases.ALL.replace(store_dtype=store_dtype))
    shared = None
    layers: list[DeviceLayer] = []
    for idx in range(2):
        layers.append(DeviceLayer(settings, idx, shared=shared))
        layers[idx].forward.layers = 2
        shared = layers[0].shared
    held = [torch.zeros(2, 2, 0, 2, 16, dtype=torch.float16)] * 2
    others: list[Any] = []

    def run(new: int) -> None:
        for idx, layer in enumerate(layers):
            kv = torch.randn(held[idx].shape[0], 2, new, 2, 16, generator=generator).half()
            q = torch.randn(kv.shape[0], 4, new, 16, generator=generator).half().to(device)
            held[idx] = torch.cat([held[idx], kv], 2)
            cases.attend(layer, q, *(x.contiguous().to(device) for x in kv.unbind(3)))

    def check(these: list[DeviceLayer], wanted: list[torch.Tensor]) -> None:
        for layer, kv in zip(these, wanted, strict=True):
            for found, truth in zip(layer.contents(), kv.unbind(3), strict=True):
                if store_dtype == "auto":
                    assert torch.equal(found.cpu(), truth)
                else:
                    torch.testing.assert_close(found.cpu(), truth, atol=0.03, rtol=0.03)

    run(100)
    for _ in range(operations):
        kind = ("pass", "step", "crop", "select", "copy")[number(5) - 1]
        if kind == "pass":
            run(number(70))
        elif kind == "step":
            run(1)
        elif kind == "crop" and held[0].shape[2] > 40:
            back = number(30)
            held = [kv[:, :, :-back] for kv in held]
            for layer in layers:
                layer.crop(-back)
        elif kind == "select":
            rows = torch.tensor([number(held[0].shape[0]) - 1 for _ in range(number(3))])
            held = [kv[rows] for kv in held]
            for layer in layers:
                layer.batch_select_indices(rows)
        elif kind == "copy":
            others.append((layers, held))
            layers = copy.deepcopy(layers)
            held = list(held)
        check(layers, held)
    run(1)
    for these, wanted in [*others, (layers, held)]:
        check(these, wanted)
