"""Sparse prefill behind the cache: chunks, padding, thresholds and their files, retrieval."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from alaya_hf import AlayaCache, AlayaConfig, AlayaLayer
from alaya_hf.cache_argument import cache_argument
from alaya_hf.engine.prefill import BLASST, BSFA, Exact, Retrieval
from alaya_hf.engine.prefill.thresholds import Thresholds, load_thresholds, model_shape
from alaya_hf.errors import ConfigError, UnsupportedModelError
from alaya_hf.kernels.sparse_prefill import K_TILE, Q_TILE, TileRule, sparse_attention
from alaya_hf.layer import ForwardState
from alaya_hf.probes import Probe

KV_HEADS, GROUP, DIM = 2, 3, 32
SCALING = DIM**-0.5
SETTINGS = AlayaConfig(window=(16, 64), min_context=0, prefill_block=128, max_sparse_queries=1)
SHAPE = {"layers": 1, "heads": KV_HEADS * GROUP, "kv_heads": KV_HEADS, "head_dim": DIM}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=96, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.15, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tensors(tokens: int, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys loud in some stretches, so that there is something to skip."""
    q = 2 * torch.randn(batch, KV_HEADS * GROUP, tokens, DIM)
    k, v = torch.randn(2, batch, KV_HEADS, tokens, DIM).unbind(0)
    loud = (torch.rand(batch, KV_HEADS, -(-tokens // K_TILE)) < 0.3).float() * 1.8 + 0.2
    return q, k * loud.repeat_interleave(K_TILE, 2)[:, :, :tokens, None], v


def run(settings, q, k, v, chunks, valid=None, layer_idx=0, copies=False):
    """Outputs of a layer ``[batch, tokens, heads, head_dim]`` that gets its tokens in chunks, and its probe.

    With copies, every chunk goes to a copy, whose row then consists of a piece per chunk.
    """
    forward = ForwardState()
    layer = AlayaLayer(settings, layer_idx, forward, Probe())
    outs, start = [], 0
    for size in chunks:
        part = slice(start, start + size)
        layer = copy.deepcopy(layer) if copies else layer
        forward = layer.forward
        forward.past, forward.valid = start, None if valid is None or valid[:, part].all() else valid[:, part]
        layer.update(k[:, :, part], v[:, :, part])
        outs.append(layer.attend(q[:, :, part], SCALING))
        start += size
    return torch.cat(outs, 1), layer.probe


def thresholds_file(folder, value: float, blocks: int = 16, **changes):
    path = folder / f"{value}-{len(changes)}.safetensors"
    shape = {**SHAPE, **changes}
    Thresholds(torch.full((shape["layers"], shape["heads"], blocks), value), shape, {"model": "one", "k": 3}).save(path)
    return str(path)


@pytest.mark.parametrize("chunks", [[600], [256, 256, 88], [100, 1, 300, 199]], ids=str)
def test_nothing_skipped_is_exact(tmp_path, chunks):
    q, k, v = tensors(600)
    wanted, _ = run(SETTINGS, q, k, v, chunks)
    for prefill in (BLASST(lam=0), BSFA(thresholds_file(tmp_path, -math.inf)), Retrieval(tokens=600, block=32)):
        found, probe = run(SETTINGS.replace(prefill=prefill, max_sparse_queries=1), q, k, v, chunks)
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)
        assert not probe.summary()["skipped_tiles"]


@pytest.mark.parametrize("chunks", [[640], [256, 256, 128], [128, 200, 312]], ids=str)
def test_blasst_leaves_out_only_what_is_small(chunks):
    """What is skipped has less than lam of a row's largest weight per token: bounds the change, however the prompt comes."""
    q, k, v = tensors(640)
    wanted, _ = run(SETTINGS, q, k, v, chunks)
    lam = 1e-2
    found, probe = run(SETTINGS.replace(prefill=BLASST(lam=lam)), q, k, v, chunks)
    assert 0.02 < probe.summary()["skipped_tiles"] < 1
    scores = (q @ k.repeat_interleave(GROUP, 1).transpose(2, 3)) * SCALING
    scores = scores.masked_fill(~torch.ones(640, 640).tril().bool(), -math.inf)
    weights = scores.softmax(-1)
    small = weights.masked_fill(weights >= lam * weights.amax(-1, keepdim=True), 0).sum(-1)
    # Leaving out a mass of at most s changes a mean of values by at most s times their range.
    allowed = (small * 2 * v.norm(dim=-1).max()).transpose(1, 2) + 1e-5
    assert bool(((found - wanted).norm(dim=-1) <= allowed).all())


def test_bsfa_is_dense_attention_to_the_tiles_above_the_threshold(tmp_path):
    """Chunks and windows on tile boundaries: the same tiles as in one pass."""
    q, k, v = tensors(640)
    settings = AlayaConfig(
        window=(64, 128), min_context=0, prefill_block=192, prefill=BSFA(thresholds_file(tmp_path, 5.0))
    )
    scores = (q @ k.repeat_interleave(GROUP, 1).transpose(2, 3)) * SCALING
    tiles = scores.view(1, KV_HEADS * GROUP, 5, Q_TILE, 10, K_TILE).amax(dim=(3, 5))
    off = torch.arange(10)[None, :] < 2 * torch.arange(5)[:, None]
    gone = (tiles < 5.0) & off
    visible = torch.ones(640, 640).tril().bool() & ~gone.repeat_interleave(Q_TILE, 2).repeat_interleave(K_TILE, 3)
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    wanted = (weights @ v.repeat_interleave(GROUP, 1)).transpose(1, 2)
    for chunks in ([640], [256, 384], [128] * 5):
        found, probe = run(settings, q, k, v, chunks)
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)
        expected = gone.sum() / (off.sum() * KV_HEADS * GROUP)
        assert 0.1 < expected < 0.9 and probe.summary()["skipped_tiles"] == pytest.approx(float(expected))


@pytest.mark.parametrize("kind", ["blasst", "bsfa"])
@pytest.mark.parametrize("chunks", [[420], [130, 160, 130]], ids=str)
def test_padding_is_as_if_it_were_not_there(tmp_path, kind, chunks):
    q, k, v = tensors(420, batch=2)
    left = 150  # more than the first chunk
    prefill = BLASST(lam=1e-2) if kind == "blasst" else BSFA(thresholds_file(tmp_path, 4.0))
    settings = SETTINGS.replace(prefill=prefill)
    valid = torch.ones(2, 420, dtype=torch.bool)
    valid[1, :left] = False
    found, _ = run(settings, q, k, v, chunks, valid)
    sizes, taken = [], 0
    for size in chunks:  # what the short row gets of each chunk
        taken += size
        sizes.append(max(0, taken - left) - sum(sizes))
    alone, probe = run(settings, *(x[1:, :, left:] for x in (q, k, v)), [size for size in sizes if size])
    torch.testing.assert_close(found[1:, left:], alone, atol=2e-5, rtol=1e-5)
    full, _ = run(settings, q[:1], k[:1], v[:1], chunks)
    torch.testing.assert_close(found[:1], full, atol=2e-5, rtol=1e-5)
    assert probe.summary()["skipped_tiles"] > 0


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("chunks", [[200, 320], [200, 64, 256]], ids=str)
def test_retrieval_attends_to_the_blocks_that_matter(chunks, copies):
    """Keys that all later queries look for, in two blocks of the prefix, are found among the others."""
    q, k, v = tensors(520)
    place = torch.zeros(520, dtype=torch.bool)
    place[48:64] = place[112:128] = True  # blocks 2 and 6 after a window of 16 first tokens
    direction = torch.randn(DIM)
    k = 0.3 * k
    k[:, :, place] = direction
    q[:, :, 200:] = 0.2 * q[:, :, 200:] + 4 * direction
    settings = SETTINGS.replace(prefill=Retrieval(tokens=32, block=16, queries=128))
    wanted, _ = run(SETTINGS, q, k, v, chunks)
    found, _ = run(settings, q, k, v, chunks, copies=copies)
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=1e-3)
    other, _ = run(SETTINGS.replace(prefill=Retrieval(tokens=16, block=16, queries=128)), q, k, v, chunks)
    assert (other - wanted).abs().max() > 0.05


def test_retrieval_with_padding():
    q, k, v = tensors(300, batch=2)
    valid = torch.ones(2, 300, dtype=torch.bool)
    valid[1, :210] = False
    settings = SETTINGS.replace(prefill=Retrieval(tokens=48, block=16, queries=64))
    found, _ = run(settings, q, k, v, [200, 100], valid)
    full, _ = run(settings, q[:1], k[:1], v[:1], [200, 100])
    torch.testing.assert_close(found[:1], full, atol=2e-5, rtol=1e-5)
    short, _ = run(settings, *(x[1:, :, 210:] for x in (q, k, v)), [90])
    torch.testing.assert_close(found[1:, 210:], short, atol=2e-5, rtol=1e-5)


def test_dense_layers_are_exact():
    q, k, v = tensors(300)
    wanted, _ = run(SETTINGS, q, k, v, [300])
    settings = SETTINGS.replace(prefill=BLASST(lam=0.5))
    assert not torch.allclose(run(settings, q, k, v, [300])[0], wanted, atol=1e-3)
    torch.testing.assert_close(run(settings.replace(dense_layers=(0,)), q, k, v, [300])[0], wanted)


def test_a_model_with_nothing_skipped(model):
    ids = torch.randint(1, 64, (2, 300))
    mask = torch.ones_like(ids)
    mask[0, :70] = 0
    model.set_attn_implementation("alaya")
    with torch.no_grad():
        dense = model.generate(
            ids, attention_mask=mask, **cache_argument(DynamicCache(config=model.config)), max_new_tokens=4
        )
        for prefill in ({"kind": "blasst", "scale": 0}, {"kind": "retrieval", "tokens": 512}):
            cache = AlayaCache(AlayaConfig(prefill=prefill, query="full", window=(16, 64), min_context=0))
            found = model.generate(
                ids, attention_mask=mask, **cache_argument(cache), max_new_tokens=4, prefill_chunk_size=128
            )
            assert torch.equal(found, dense)


def test_calibration(model, tmp_path):
    """Thresholds in between the k-th and the next tile keep k tiles of the text they were made from; twice the same."""
    pytest.importorskip("eval.calibrate_bsfa", reason="needs a checkout")
    from eval.calibrate_bsfa import calibrate

    ids = torch.randint(1, 64, (640,))
    before = model.config._attn_implementation
    found = calibrate(model, [ids.tolist()], [2, 4], "tiny")
    assert model.config._attn_implementation == before
    again = calibrate(model, [ids.tolist()], [4], "tiny")[4]
    assert torch.equal(again.table, found[4].table) and again.about["k"] == 4
    # Two tiles before the second block of queries, four before the third.
    assert torch.isneginf(found[2].table[:, :, :2]).all() and torch.isfinite(found[2].table[:, :, 2:]).all()
    assert torch.isneginf(found[4].table[:, :, :3]).all() and (found[4].table <= found[2].table).all()
    path = tmp_path / "tiny.safetensors"
    found[2].save(path)
    model.set_attn_implementation("alaya")
    cache = AlayaCache(AlayaConfig(prefill={"kind": "bsfa", "thresholds": str(path)}), config=model.config, probe=True)
    with torch.no_grad():
        model(ids[None], **cache_argument(cache), logits_to_keep=1)
    # Layer 0 sees what calibration saw: of 0, 2, 4, 6 and 8 tiles, two are kept.
    assert cache.stats()["layers"][0]["skipped_tiles"] == pytest.approx((2 + 4 + 6) / 20)
    shorter = calibrate(model, [ids[:256].tolist()], [2], "tiny")[2]
    assert torch.equal(shorter.table, found[2].table[:, :, :2])


class TestFiles:
    def test_round_trip(self, tmp_path):
        path = thresholds_file(tmp_path, 1.5)
        found = load_thresholds(path)
        assert found.shape == SHAPE and found.about["k"] == 3 and (found.table == 1.5).all()

    def test_missing_and_malformed(self, tmp_path):
        settings = SETTINGS.replace(prefill=BSFA(str(tmp_path / "none.safetensors")))
        with pytest.raises(ConfigError, match="(?s)none.safetensors.*calibrate-bsfa"):
            run(settings, *tensors(5), [5])
        (tmp_path / "bad.safetensors").write_bytes(b"nothing of the kind")
        with pytest.raises(ConfigError, match="(?s)bad.safetensors is no file of BSFA thresholds.*calibrate-bsfa"):
            load_thresholds(str(tmp_path / "bad.safetensors"))

    @pytest.mark.parametrize("changes", [{"heads": 4}, {"head_dim": 64}, {"kv_heads": 1}])
    def test_another_shape(self, tmp_path, changes):
        settings = SETTINGS.replace(prefill=BSFA(thresholds_file(tmp_path, 0.0, **changes)))
        ((key, value),) = changes.items()
        with pytest.raises(ConfigError, match=f"(?s)calibrated for one.*{key}={value}.*calibrate-bsfa"):
            run(settings, *tensors(5), [5])

    def test_another_layer(self, tmp_path):
        settings = SETTINGS.replace(prefill=BSFA(thresholds_file(tmp_path, 0.0)))
        with pytest.raises(ConfigError, match="layer 1 of this model"):
            run(settings, *tensors(5), [5], layer_idx=1)

    def test_another_model(self, tmp_path, model):
        shape = {**model_shape(model.config), "vocab_size": 99}
        path = tmp_path / "other.safetensors"
        Thresholds(torch.zeros(2, 6, 4), shape, {"model": "other"}).save(path)
        settings = AlayaConfig(prefill={"kind": "bsfa", "thresholds": str(path)})
        with pytest.raises(ConfigError, match="(?s)other with vocab_size=99, but the model has vocab_size=64"):
            AlayaCache(settings, config=model.config)

    def test_longer_than_calibrated(self, tmp_path):
        settings = SETTINGS.replace(prefill=BSFA(thresholds_file(tmp_path, 0.0, blocks=2)))
        run(settings, *tensors(256), [128, 128])
        with pytest.raises(ConfigError, match="calibrated for contexts of 256 tokens"):
            run(settings, *tensors(300), [256, 44])


class TestConfiguration:
    @pytest.mark.parametrize(
        "prefill",
        [Exact(), BLASST(), BLASST(scale=300.0), BSFA("a.safetensors"), Retrieval(tokens=64, block=16)],
        ids=str,
    )
    def test_round_trip(self, tmp_path, prefill):
        config = AlayaConfig(prefill=prefill, layers={3: {"prefill": "exact"}})
        config.to_yaml(tmp_path / "c.yaml")
        read = AlayaConfig.from_yaml(tmp_path / "c.yaml")
        assert read.prefill == prefill and read.for_layer(3).prefill == Exact()
        assert AlayaConfig().prefill == Exact()

    def test_override(self):
        config = AlayaConfig(prefill=BLASST(lam=0.1)).override({"prefill.scale": 50.0})
        assert config.prefill == BLASST(scale=50.0)

    @pytest.mark.parametrize(
        "spec, message",
        [
            ("sparse", "(?s)unknown prefill 'sparse'.*blasst"),
            ("bsfa", "needs thresholds"),
            ({"kind": "blasst", "lam": 2}, r"prefill.lam must be a number in \[0, 1\], but got 2"),
            ({"kind": "blasst", "lam": math.nan}, "prefill.lam"),
            ({"kind": "blasst", "lam": 0.1, "scale": 1}, "lam or scale"),
            ({"kind": "retrieval", "tokens": 0}, "prefill.tokens must be an integer of at least 1"),
        ],
    )
    def test_errors(self, spec, message):
        with pytest.raises(ConfigError, match=message):
            AlayaConfig(prefill=spec)

    def test_retrieval_needs_the_host_engine(self):
        with pytest.raises(ConfigError, match="needs engine='host', but got engine='device'"):
            AlayaConfig(prefill="retrieval", engine="device")

    def test_margins(self):
        assert BLASST().margin(10) == math.log(1e-3) and BLASST(lam=0).margin(10) == -math.inf
        assert BLASST(scale=5).margin(500) == pytest.approx(math.log(0.01)) and BLASST(scale=5).margin(2) == 0

    def test_capped_logits_are_refused(self):
        layer = AlayaLayer(SETTINGS.replace(prefill="blasst"))
        q, k, v = tensors(5)
        layer.update(k, v)
        with pytest.raises(UnsupportedModelError, match="softcap=30"):
            layer.attend(q, SCALING, softcap=30.0)


def test_systems_that_share_an_exact_prefill_refuse_another():
    systems = pytest.importorskip("eval.systems", reason="needs a checkout")
    with pytest.raises(ConfigError, match="'mine' asks for prefill blasst"):
        systems.System("mine", AlayaConfig(layers={3: {"prefill": "blasst"}}))


def test_wrong_shapes_are_refused():
    q, k, v = tensors(130)
    rule = TileRule(torch.zeros(KV_HEADS * GROUP, 2))
    with pytest.raises(ValueError, match="limits"):
        sparse_attention(q, k, v, TileRule(torch.zeros(1, 2)), SCALING)
    with pytest.raises(ValueError, match="needs top"):
        sparse_attention(q, k, v, TileRule(rule.limits, True), SCALING)
    with pytest.raises(ValueError, match="expected q"):
        sparse_attention(q, k[..., :8], v, rule, SCALING)
