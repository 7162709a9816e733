"""How the critical tokens are found: one file, one class each."""

from alaya_hf.index.base import Hits, Index, Searcher
from alaya_hf.index.coarse import Coarse
from alaya_hf.index.flat import Flat
from alaya_hf.index.graph import Graph
from alaya_hf.index.quantized import Quantized
from alaya_hf.index.sign import Sign

__all__ = ["Coarse", "Flat", "Graph", "Hits", "Index", "Quantized", "Searcher", "Sign"]
