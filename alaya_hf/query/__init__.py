"""What is asked for: the rules that say which tokens are critical."""

from alaya_hf.query.base import Query
from alaya_hf.query.dipr import DIPR
from alaya_hf.query.full import Full
from alaya_hf.query.recovery import Recovery
from alaya_hf.query.topk import TopK

__all__ = ["DIPR", "Full", "Query", "Recovery", "TopK"]
