"""The few places where upstream has no seam; each patch restores what it touched.

Attributes
----------
routing : Routing
    Lets unmodified ``sdpa`` and ``flash_attention_2`` models use an AlayaCache.
prompt_guard : PromptGuard
    Refuses prompts that do not continue what an AlayaCache holds.
reservation : Reservation
    Tells an AlayaCache the length of a prompt that comes in chunks.
decode_graphs : DecodeGraphsPatch
    Lets a cache with ``engine="device"`` replay a model's decode step as a CUDA graph; on once there is such a cache.
extend_rope : function
    Scales the rotary embedding of one model, for texts longer than it was trained on (8K Llama-3-70B).
"""

from alaya_hf.patches.base import Patch
from alaya_hf.patches.decode_graphs import decode_graphs
from alaya_hf.patches.prompt_guard import prompt_guard
from alaya_hf.patches.reservation import reservation
from alaya_hf.patches.rope_scaling import extend_rope
from alaya_hf.patches.routing import routing

__all__ = ["Patch", "decode_graphs", "enable_once", "extend_rope", "prompt_guard", "reservation", "routing"]

_enabled = False


def enable_once() -> None:
    """Switch on routing, prompt guard and reservation the first time this is called; after that the user decides."""
    global _enabled
    if not _enabled:
        _enabled = True
        routing.enable()
        prompt_guard.enable()
        reservation.enable()
