"""Mapped vector files that a GPU reads in place: their pages registered with CUDA, once per process."""

from __future__ import annotations

import threading
import time
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from alaya_hf.kernels.cpu.checksum import BLOCK
from alaya_hf.storage.db.vector_file import VectorFile
from alaya_hf.storage.pinned import CAPTURING, clear_cuda_error, pinned_pool

_READ_ONLY = 8  # cudaHostRegisterReadOnly: what a mapping without write permission needs
_ALREADY = 712  # cudaErrorHostMemoryAlreadyRegistered
_PORTABLE = 1  # cudaHostRegisterPortable: for every device


class RegisteredFile:
    """A vector file's keys and values as kernels may read them.

    Made by :meth:`of`: sessions of one process on the same file share one. When the last one lets go, the pages are released
    in a thread of its own, after the devices have finished what they were given.

    Attributes
    ----------
    file : VectorFile
        Whose mapping it is; perhaps not the one that was asked with, but of the same bytes.
    kv : Tensor ``[kv_heads, tokens, 2, head_dim]``
        The mapped vectors; where CUDA refuses to register them, a pinned copy from :meth:`register` on.
    copied : bool
        Whether `kv` is that copy.

    Notes
    -----
    ``cudaHostRegister`` with the flag "read only" of a mapping that is shared and read-only (a writable one of a disk file is
    refused): about 0.03 s per GiB with the file in the page cache. It pins the pages: they stay in memory, whatever a buffer
    manager's budget, until the last session lets go. Records and vectors are registered one by one, unless they
    share a page: a copy that crosses from one registration to another is refused. Without CUDA nothing is registered.
    """

    def __init__(self, file: VectorFile, key: Any) -> None:
        self.file, self.key = file, key
        self.kv: Tensor = file.tensors["kv"]
        self.copied = False
        self._done = self._records_done = False
        self._code = 0
        self._devices: set[torch.device] = set()
        self._lock = threading.Lock()

    @classmethod
    def of(cls, file: VectorFile) -> RegisteredFile:
        """The one of a file, made if there is none. Registers nothing yet."""
        key = (*file.identity, file.digest)
        with _LOCK:
            known = _KNOWN.get(key)
            if known is None:
                known = _KNOWN[key] = cls(file, key)
            return known

    @property
    def registered(self) -> bool:
        """Whether :meth:`register` is done."""
        return self._done

    def register(self, device: torch.device) -> None:
        """Make the bytes readable for `device`; a second time, nothing. Verify what will be read before.

        Raises
        ------
        HostMemoryError
            If CUDA refuses the mapping and the host has no room for a copy either.
        """
        with self._lock:
            self._devices.add(device)
            if not self._done:
                refused = device.type == "cuda" and (
                    not self._register_records(device) or self._register(device, 0, self._split) is not None
                )
                if refused:
                    self._copy(device)
                self._done = True

    def register_records(self, device: torch.device) -> bool:
        """Make what lies behind the vectors readable for `device`: copies of it need no staging.

        Returns
        -------
        bool
            Whether it is; where CUDA refuses, copies work all the same, at the speed of ordinary memory.
        """
        with self._lock:
            self._devices.add(device)
            return device.type != "cuda" or self._register_records(device)

    @property
    def _split(self) -> int:
        """Bytes of the vectors, if they end with a page; otherwise 0: all is registered at once."""
        return 0 if self.kv.nbytes % BLOCK else self.kv.nbytes

    def _register_records(self, device: torch.device) -> bool:
        if not self._records_done:
            if (
                self._split < self.file.data_bytes
                and self._register(device, self._split, self.file.data_bytes) is not None
            ):
                return False
            self._records_done = True
        return True

    def _register(self, device: torch.device, begin: int, stop: int) -> int | None:
        """Register bytes of the tensors, whole pages; returns CUDA's error."""
        start, size = self.file.address + begin, stop - begin
        if not size:
            return None
        portable = _PORTABLE if torch.cuda.device_count() > 1 else 0
        for attempt in range(4):
            # The same mapping may still be about to be released.
            settle()
            time.sleep(0.01 * attempt)
            with CAPTURING, torch.cuda.device(device):
                torch.cuda.init()
                code = int(torch.cuda.cudart().cudaHostRegister(start, size, _READ_ONLY | portable))
                if code == 0:
                    # The mapping outlives its registration.
                    weakref.finalize(self, _retire, start, self.file, self._devices).atexit = False
                    return None
                clear_cuda_error()
            if code != _ALREADY:
                break
        self._code = code
        return code

    def _copy(self, device: torch.device) -> None:
        with torch.cuda.device(device):
            warnings.warn(
                f"{self.file.label}: CUDA refuses to register the mapped file (error {self._code}), so its vectors are copied to "
                "pinned memory: attaching takes longer and the host holds them twice. Expected a local disk and a device that "
                "reads registered read-only memory.",
                UserWarning,
                stacklevel=2,
            )
            pool = pinned_pool()
            pool.check_room(self.kv.nbytes, "the copy of a stored context")
            copy = pool.allocate(self.kv.shape, self.kv.dtype)
            copy.copy_(self.kv)
            self.kv, self.copied = copy, True


_KNOWN: weakref.WeakValueDictionary[Any, RegisteredFile] = weakref.WeakValueDictionary()
_LOCK = threading.Lock()


@lru_cache(maxsize=1)
def _janitor() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="alaya-unregister")


def _retire(start: int, file: VectorFile, devices: set[torch.device]) -> None:
    """Leave the work to a thread: finalizers run wherever the garbage collector does, also while a graph is captured."""
    try:
        _janitor().submit(_unregister, start, file, devices)
    except RuntimeError:
        pass  # the interpreter is going, and the registration with it


def _unregister(start: int, file: VectorFile, devices: set[torch.device]) -> None:
    with CAPTURING:
        for device in devices:
            torch.cuda.synchronize(device)
        torch.cuda.cudart().cudaHostUnregister(start)
    del file  # and perhaps the mapping with it


def settle() -> None:
    """Wait until files that nobody reads any more are released."""
    _janitor().submit(int).result()
