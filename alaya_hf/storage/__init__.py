"""Where keys and values live: the window on the device, the store on the host."""

from alaya_hf.storage.segment import Segment
from alaya_hf.storage.store import HostStore, Piece
from alaya_hf.storage.window import Window

__all__ = ["HostStore", "Piece", "Segment", "Window"]
