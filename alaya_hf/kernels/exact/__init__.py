"""Dense attention with its log-sum-exp: one implementation per file, the fastest that fits is chosen.

`choose` holds the order; `alaya_hf.kernels.attention.exact_attention` is what the rest of the package calls.
"""

from alaya_hf.kernels.exact.base import Backend, Request
from alaya_hf.kernels.exact.choose import BACKENDS, attend, choose

__all__ = ["BACKENDS", "Backend", "Request", "attend", "choose"]
