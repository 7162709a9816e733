"""How the critical tokens are found: one file, one class each."""

from alaya_hf.index.base import Hits, Index, Searcher
from alaya_hf.index.flat import Flat

__all__ = ["Flat", "Hits", "Index", "Searcher"]
