"""Attention of many new tokens to themselves and to everything before them."""

from alaya_hf.engine.prefill.base import Prefill, PrefillPass
from alaya_hf.engine.prefill.blasst import BLASST
from alaya_hf.engine.prefill.bsfa import BSFA
from alaya_hf.engine.prefill.exact import Exact, attend_new
from alaya_hf.engine.prefill.retrieval import Retrieval

__all__ = ["BLASST", "BSFA", "Exact", "Prefill", "PrefillPass", "Retrieval", "attend_new"]
