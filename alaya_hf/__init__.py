"""Retrieval-based sparse attention over an offloaded, persistent KV store for Hugging Face Transformers."""

from alaya_hf import attention as _attention
from alaya_hf.cache import AlayaCache
from alaya_hf.config import AlayaConfig, WindowConfig
from alaya_hf.db import AlayaDB
from alaya_hf.engine.prefill import BLASST, BSFA, Retrieval
from alaya_hf.engine.residual import BlockMean, LowBit, NoResidual
from alaya_hf.errors import AlayaError
from alaya_hf.index import Coarse, Flat, Graph, Quantized, Sign
from alaya_hf.layer import AlayaLayer
from alaya_hf.query import DIPR, Full, Recovery, TopK
from alaya_hf.session import Session

__version__ = "0.1.0"

__all__ = [
    "BLASST",
    "BSFA",
    "DIPR",
    "AlayaCache",
    "AlayaConfig",
    "AlayaDB",
    "AlayaError",
    "AlayaLayer",
    "BlockMean",
    "Coarse",
    "Flat",
    "Full",
    "Graph",
    "LowBit",
    "NoResidual",
    "Quantized",
    "Recovery",
    "Retrieval",
    "Session",
    "Sign",
    "TopK",
    "WindowConfig",
]

_attention.register()
