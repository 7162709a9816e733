"""Flash attention of many new tokens that skips tiles of the logits: BSFA, BLASST."""

from alaya_hf.kernels.sparse_prefill.attend import sparse_attention
from alaya_hf.kernels.sparse_prefill.tiles import K_TILE, Q_TILE, SparsePartial, TileRule, tile_maxima

__all__ = ["K_TILE", "Q_TILE", "SparsePartial", "TileRule", "sparse_attention", "tile_maxima"]
