"""Graph index: search against its plain Python definition, recall against exact search."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from alaya_hf.index.roargraph import RoarGraph
from alaya_hf.kernels.cpu.graph_search import dipr_search_reference
from alaya_hf.kernels.knn import knn

H, G, D = 2, 3, 32
BETA = 12.0


def layer(n: int, seed: int = 0, dtype: torch.dtype = torch.float32, m: int | None = None):
    """Keys in clusters around what queries ask for, and a background; queries are distributed differently."""
    rng = torch.Generator().manual_seed(seed)
    topics = torch.nn.functional.normalize(torch.randn(H, 12, D, generator=rng), dim=-1)
    mean = torch.randn(H, 1, D, generator=rng) * 0.3
    keys = torch.randn(H, n, D, generator=rng) * 0.6 + mean
    mark = torch.rand(H, n, generator=rng) < 0.2
    which = torch.randint(12, (H, n), generator=rng)
    lift = 4 + torch.rand(H, n, 1, generator=rng) * 2
    picked = topics.gather(1, which[..., None].expand(-1, -1, D))
    keys = torch.where(mark[..., None], keys + picked * lift, keys)
    kv = torch.stack([keys, torch.randn(H, n, D, generator=rng)], 2).to(dtype)

    def ask(count):
        topic = torch.randint(12, (H, count), generator=rng)
        base = topics.gather(1, topic[..., None].expand(-1, -1, D))
        return 5 * base + 0.5 * torch.randn(H, count, D, generator=rng)

    return kv, ask(m or round(0.4 * n)), ask(G)


def exact(q, kv, beta=BETA, window_best=None, limit=None):
    scores = torch.einsum("hgd,hnd->hgn", q, kv[:, :limit, 0].float())
    best = scores.amax(-1, keepdim=True)
    if window_best is not None:
        best = torch.maximum(best, window_best[..., None])
    return scores >= best - beta


def answers(hits):
    return [hits.ids[a:b].tolist() for a, b in zip(hits.offsets[:-1], hits.offsets[1:], strict=True)]


def recall(hits, wanted):
    wanted = wanted.flatten(0, 1)
    found = [len(set(ids) & set(w.nonzero()[:, 0].tolist())) for ids, w in zip(answers(hits), wanted, strict=True)]
    return sum(found) / int(wanted.sum())


@pytest.fixture(scope="module")
def built():
    kv, queries, q = layer(3000)
    graph = RoarGraph(degree=16)
    graph.build(kv, queries)
    return graph, kv, queries, q


def test_knn_is_exact():
    rng = torch.Generator().manual_seed(3)
    queries, keys = torch.randn(40, D, generator=rng), torch.randn(1003, D, generator=rng)
    assert torch.equal(knn(queries, keys, 7).long(), (queries @ keys.T).topk(7).indices)
    assert knn(queries, keys[:5], 7).shape == (40, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"route": 0, "l0": 40}, {"limit": 300}, {"max_candidates": 25, "l0": 10}, {"window": True, "route": 3}],
)
def test_search_follows_its_definition(dtype, shared, options):
    kv, queries, q = layer(600, dtype=dtype)
    graph = RoarGraph(degree=8, knn=12, entry_points=4)
    graph.build(kv, queries)
    options = dict(options)
    best = torch.einsum("hgd,hnd->hgn", q, kv[:, :20, 0].float()).amax(-1) if options.pop("window", False) else None
    hits = graph.search(q, kv, BETA, best, shared=shared, **options)
    keys, adjacency, entries = (
        kv[:, :, 0].float().numpy(),
        graph.adjacency.numpy(),
        graph.state_dict()["entries"].numpy(),
    )
    bests = np.full((H, G), -np.inf) if best is None else best.numpy()
    parameters = {"route": graph.route, "l0": graph.l0, "max_candidates": 600, "limit": 600} | options
    expected, touched = [], []
    for h in range(H):
        touched.append(0)
        for queries_of_row in [list(range(G))] if shared else [[g] for g in range(G)]:
            ids, count = dipr_search_reference(
                keys[h], adjacency[h], entries[h], q[h, queries_of_row].numpy(), bests[h, queries_of_row],
                np.full(len(queries_of_row), BETA), **parameters
            )  # fmt: skip
            expected += ids
            touched[h] += count
    assert answers(hits) == expected
    assert hits.touched.tolist() == touched
    heads = torch.repeat_interleave(torch.arange(H * G), hits.offsets.diff())
    scores = (q.flatten(0, 1)[heads] * kv[heads // G, hits.ids.long(), 0].float()).sum(-1)
    torch.testing.assert_close(hits.scores, scores, rtol=1e-4, atol=1e-4)


def test_recall_with_few_keys_touched(built):
    graph, kv, _, q = built
    wanted = exact(q, kv)
    hits = graph.search(q, kv, BETA)
    assert recall(hits, wanted) >= 0.95
    assert hits.touched.max() < 0.5 * kv.shape[1]
    ids, scores, _ = graph.search_topk(q, kv, 10, ef=64)
    top = torch.einsum("hgd,hnd->hgn", q, kv[:, :, 0]).topk(10)
    same = (ids.long()[..., None] == top.indices[..., None, :]).any(-1).float().mean()
    assert same >= 0.95
    assert (scores[..., :-1] >= scores[..., 1:]).all()


def test_infinite_range_reaches_every_key(built):
    graph, kv, _, q = built
    for ids in answers(graph.search(q, kv, float("inf"))):
        assert sorted(ids) == list(range(kv.shape[1]))


def test_reads_a_view_of_a_larger_buffer(built):
    graph, kv, _, q = built
    buffer = torch.full((H, kv.shape[1] + 77, 2, D), float("nan"))
    buffer[:, : kv.shape[1]] = kv
    assert answers(graph.search(q, buffer[:, : kv.shape[1]], BETA)) == answers(graph.search(q, kv, BETA))


@pytest.mark.parametrize("later_queries", [True, False])
def test_extend_is_as_good_as_rebuilding(built, later_queries):
    rebuilt, kv, queries, q = built
    grown = RoarGraph(degree=16)
    grown.build(kv[:, :2000].contiguous(), queries)
    for stop in (2001, 2300, 3000):
        more = queries[:, :300] if later_queries and stop == 3000 else None
        grown.extend(kv[:, :stop], stop - grown.num_tokens, more)
    assert grown.num_tokens == 3000
    wanted = exact(q, kv)
    assert recall(grown.search(q, kv, BETA), wanted) >= recall(rebuilt.search(q, kv, BETA), wanted) - 0.02
    with pytest.raises(ValueError, match="3000 indexed and 5 new"):
        grown.extend(kv, 5)


@pytest.mark.parametrize("limit", [0, 1, 200, 1500])
def test_prefix_filter(built, limit):
    graph, kv, _, q = built
    hits = graph.search(q, kv, BETA, limit=limit)
    assert all(k < limit for k in hits.ids.tolist())
    if limit:
        assert recall(hits, exact(q, kv, limit=limit)) >= 0.95
    ids, _, _ = graph.search_topk(q, kv, 5, limit=limit)
    assert (ids < limit).all() and ((ids >= 0).sum(-1) == min(5, limit)).all()


def test_best_of_the_window_raises_the_threshold(built):
    graph, kv, _, q = built
    best = torch.einsum("hgd,hnd->hgn", q, kv[:, :, 0]).amax(-1)
    assert graph.search(q, kv, BETA, best + 2 * BETA).ids.numel() == 0
    assert recall(graph.search(q, kv, BETA, best + BETA / 2), exact(q, kv, window_best=best + BETA / 2)) >= 0.95


def test_empty_one_token_and_duplicates():
    kv, queries, q = layer(200)
    graph = RoarGraph()
    assert graph.search(q, kv[:, :0], BETA).offsets.tolist() == [0] * (H * G + 1)
    graph.build(kv[:, :0], queries[:, :0])
    assert graph.search(q, kv[:, :0], BETA).ids.numel() == 0
    graph.extend(kv[:, :1], 1)
    assert answers(graph.search(q, kv[:, :1], BETA)) == [[0]] * (H * G)
    graph.extend(kv[:, :2], 1, queries)
    assert sorted(answers(graph.search(q, kv[:, :2], float("inf")))[0]) == [0, 1]
    same = kv[:, :1].expand(-1, 200, -1, -1).contiguous()
    graph.build(same, queries)
    assert all(sorted(ids) == list(range(200)) for ids in answers(graph.search(q, same, BETA)))


def test_state_dict_round_trip(built):
    graph, kv, queries, q = built
    again = RoarGraph.from_state_dict(graph.state_dict())
    a, b = graph.search(q, kv, BETA), again.search(q, kv, BETA)
    assert torch.equal(a.ids, b.ids) and torch.equal(a.offsets, b.offsets) and torch.equal(a.scores, b.scores)
    assert again.nbytes == graph.nbytes >= H * 3000 * 16 * 4
    state = graph.state_dict()
    state["adjacency"] = state["adjacency"].clone()
    state["adjacency"][0, 0, 0] = 3000
    with pytest.raises(ValueError, match="damaged"):
        RoarGraph.from_state_dict(state)


def test_bad_input():
    kv, queries, q = layer(50)
    broken = kv.clone()
    broken[1, 7, 0, 3] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        RoarGraph().build(broken, queries)
    with pytest.raises(ValueError, match="sampled queries"):
        RoarGraph().build(kv, queries[:1])
    with pytest.raises(ValueError, match="degree"):
        RoarGraph(degree=1)
    graph = RoarGraph()
    graph.build(kv, queries)
    with pytest.raises(ValueError, match="beta"):
        graph.search(q, kv, -1.0)
    with pytest.raises(ValueError, match="needs their keys"):
        graph.search(q, kv[:, :40], BETA)
