"""What a cache with ``engine="device"`` and the index ``coarse`` must do, on any device."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import DynamicCache

from alaya_hf import DIPR, AlayaCache, AlayaConfig, AlayaLayer, TopK
from alaya_hf.config import WindowConfig
from alaya_hf.device_layer import DeviceLayer
from alaya_hf.probes import Probe
from tests.gpu.layer_cases import ALL, attend, generate, lows, prompt

#: InfLLM's blocks, all of them selected in these tests.
COARSE = ALL.replace(
    index={"kind": "coarse", "block": 128, "strategy": "representatives"}, residual="none", query=TopK(512)
)
MEANS = COARSE.replace(
    index={"kind": "coarse", "block": 32, "strategy": "mean"}, residual={"kind": "block_means", "block": 32}
)
QUEST = COARSE.replace(index={"kind": "coarse", "block": 16, "strategy": "bounds"})
SETTINGS = {"infllm": COARSE, "means": MEANS, "quest": QUEST}


def check_records(layer: DeviceLayer) -> None:
    """What stands for blocks is what the keys and values that are held make."""
    tokens = layer.tokens
    for row, low in enumerate(tokens.lows):
        held = slice(tokens.init, tokens.init + low)
        made = tokens.layout.summarise(*(x[:, held] for x in tokens.row(row)))
        torch.testing.assert_close(tokens.records[row, :, : made.shape[1]], made, atol=2e-3, rtol=2e-3)


def check_generation(model: Any, settings: AlayaConfig, length: int, new: int, **kwargs: Any) -> None:
    """Tokens equal dense attention's while blocks grow, in chunks and one by one; nothing else is kept on the device."""
    ids, cache = prompt(model, length), AlayaCache(settings)
    assert generate(model, cache, ids, new, **kwargs) == generate(model, DynamicCache(), ids, new, **kwargs)
    total = length + new - 1
    assert lows(cache) == [64 * ((total - 24) // 64)]
    for layer in cache.layers:
        check_records(layer)
    stats = cache.stats()
    assert stats["lowbit_bytes"] == 0 < stats["index_bytes"]
    assert stats["device_bytes"] == stats["window_bytes"] + stats["index_bytes"] + stats["workspace_bytes"]


def check_crops(device: str, settings: AlayaConfig) -> None:
    """Blocks that become short, and grow again from the window or from a chunk, are what their tokens make."""
    torch.manual_seed(0)
    k, v = torch.randn(2, 1, 2, 480, 32).to(device, torch.float16)
    q = torch.randn(1, 4, 480, 32).to(device, torch.float16)
    layer = DeviceLayer(settings)
    attend(layer, q[:, :, :250], k[:, :, :250], v[:, :, :250])
    assert layer.tokens.lows == [192]
    for back, then, one_by_one in ((70, 1, 37), (140, 60, 16), (33, 200, 1)):
        layer.crop(-back)
        check_records(layer)
        for new in [then] + one_by_one * [1]:
            at = layer.token_counts()[0]
            span = slice(at, at + new)
            found = attend(layer, q[:, :, span], k[:, :, span], v[:, :, span])
        check_records(layer)
        stop = layer.token_counts()[0]
        truth = torch.nn.functional.scaled_dot_product_attention(
            q[:, :, stop - 1 : stop].float(), k[:, :, :stop].float(), v[:, :, :stop].float(), enable_gqa=True
        )
        torch.testing.assert_close(found[:, :, -1:].float(), truth, atol=4e-3, rtol=4e-3)
    assert torch.equal(layer.contents()[0], k[:, :, : layer.token_counts()[0]])
    twin = copy.deepcopy(layer)
    twin.batch_select_indices(torch.tensor([0, 0]))
    check_records(twin)
    for index in (settings.index, {"kind": "coarse", "block": 64, "strategy": "bounds"}):
        other = layer.with_config(settings.replace(index=index, residual="none"))
        assert other.tokens.layout == other.plan.layout(32)
        check_records(other)


def check_selection_of_the_host(device: str, dtype: torch.dtype = torch.float16) -> None:
    """The same tokens per query head as the host engine's index, and the same answer."""
    torch.manual_seed(1)
    count = 4 + 20 + 320
    k, v = (torch.randn(1, 2, count + 2, 64).to(device, dtype) for _ in "kv")
    q = (3 * torch.randn(1, 6, count + 2, 64)).to(device, dtype)
    # Blocks that differ: one by one, keys of random direction make means that all look alike.
    k += 2 * torch.randn(1, 2, count // 16 + 1, 64).to(device, dtype).repeat_interleave(16, 2)[:, :, : count + 2]
    mean = {"kind": "coarse", "block": 64, "strategy": "mean"}
    for changes in (
        {"index": COARSE.index, "query": TopK(128)},
        {"index": COARSE.index, "query": TopK(130), "group_mode": "per_head"},
        {"index": QUEST.index, "query": TopK(48), "group_mode": "per_head"},
        {"index": QUEST.index, "query": DIPR(beta=30.0)},
        {"index": mean, "query": DIPR(beta=25.0, cap=100)},
        {"index": mean, "query": TopK(64), "residual": {"kind": "block_means", "block": 64}},
        {"index": mean, "query": TopK(0), "residual": {"kind": "block_means", "block": 64}},
        {"index": COARSE.index, "query": TopK(0)},
    ):
        outs, probes = [], []
        for engine in ("host", "device"):
            probe, config = Probe(recovery=True), COARSE.replace(**changes, engine=engine)
            layer = DeviceLayer(config, probe=probe) if engine == "device" else AlayaLayer(config, probe=probe)
            for span in (slice(0, 150), slice(150, count), *(slice(i, i + 1) for i in range(count, count + 2))):
                found = attend(layer, q[:, :, span], k[:, :, span], v[:, :, span])
            outs.append(found.float())
            probes.append(probe)
        mine, wanted = (probe.summary() for probe in probes[::-1])
        for name in ("retrieved", "fetched", "attended", "recovery"):
            assert abs(mine[name] - wanted[name]) <= 2e-3 * max(1.0, wanted[name]), (changes, name, mine, wanted)
        per_step = [sorted(int(x) for ids in probe.ids for x in ids) for probe in probes]
        assert per_step[0] == per_step[1] and bool(per_step[0]) == (changes["query"] != TopK(0))
        torch.testing.assert_close(outs[1], outs[0], atol=6e-3, rtol=6e-3)


def check_share(device: str) -> None:
    """At 128K tokens of a Llama-3-8B, all that lies on the device is at most 4 % of the keys and values."""
    from alaya_hf.engine.device.plan import device_plan
    from alaya_hf.engine.device.shared import DeviceShared
    from alaya_hf.engine.device.tokens import DeviceTokens

    config = AlayaConfig(query=TopK(2048), index="coarse", residual="none", engine="device")
    plan, count, layers = device_plan(config, 0), 131072, 32
    layout = plan.layout(128)
    tokens = DeviceTokens(1, 8, layout, WindowConfig(), 0, torch.bfloat16, torch.device(device))
    tokens.reserve(0, count)
    shared = DeviceShared()
    slots = tokens.init + tokens.ring
    shared.workspace(1, 8, 4, layout, tokens.room, slots, plan.cap, torch.device(device), torch.bfloat16)
    held = layers * (tokens.window_bytes + tokens.index_bytes) + shared.nbytes
    assert layout.tokens == 128 and tokens.lowbit_bytes == 0
    assert held <= 0.04 * layers * count * 2 * 8 * 128 * 2
