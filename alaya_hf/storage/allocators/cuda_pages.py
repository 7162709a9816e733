"""Pages of device memory: CUDA's virtual memory management through cuda-python."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from alaya_hf.errors import PoolFullError, UnavailableError
from alaya_hf.storage.allocators.pages import Pages, check_page


def _driver() -> Any:
    """The driver's bindings.

    Raises
    ------
    UnavailableError
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise UnavailableError(
            "mapping device memory on demand needs cuda-python, which is not installed: pip install cuda-bindings, of the "
            f"major version of torch's CUDA ({torch.version.cuda or 'this torch has none'}). Or use another allocator, for "
            "example 'segment'."
        ) from error
    return driver


def _call(driver: Any, name: str, *arguments: Any) -> Any:
    """Call a function of the driver; its results without the status.

    Raises
    ------
    PoolFullError
        Out of memory or addresses.
    UnavailableError
        Anything else.
    """
    status, *results = getattr(driver, name)(*arguments)
    if status != driver.CUresult.CUDA_SUCCESS:
        if status == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise PoolFullError(
                f"{name}: the device has no memory left for the pool. Free sequences, call torch.cuda.empty_cache() or open "
                "a smaller pool."
            )
        raise UnavailableError(f"{name} failed with {status}. Use another allocator, for example 'segment'.")
    return results[0] if results else None


@contextmanager
def _current(device: torch.device) -> Iterator[None]:
    """The device's primary context is current in this thread, as the driver's functions need it."""
    with torch.cuda.device(device):
        torch.cuda.current_stream().query()  # any call of the runtime does
        yield


def _close(driver: Any, device: torch.device, mapped: dict[int, int], reserved: dict[int, int], handles: dict) -> None:
    torch.cuda.synchronize(device)
    for address, size in mapped.items():
        driver.cuMemUnmap(address, size)
    for handle in handles.values():
        driver.cuMemRelease(handle)
    for address, size in reserved.items():
        driver.cuMemAddressFree(address, size)


class _Span:
    """Bytes at an address, as torch takes them in; keeps the pages' owner alive."""

    def __init__(self, pages: CudaPages, address: int, size: int) -> None:
        self.pages = pages
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
            "strides": None,
        }


class CudaPages(Pages):
    """See :class:`Pages`. ``cuMemCreate`` makes pages, ``cuMemAddressReserve`` addresses, ``cuMemMap`` joins them (CUDA driver
    API, virtual memory management). Memory is outside torch's caching allocator.

    Parameters
    ----------
    capacity, page : int
        ``page`` is a multiple of the device's granularity, 2 MiB so far.
    device : torch.device

    Raises
    ------
    UnavailableError
        Without cuda-python, without a CUDA device, or if the device lacks virtual memory management.
    """

    def __init__(self, capacity: int, page: int, device: torch.device) -> None:
        self._driver = driver = _driver()
        if not torch.cuda.is_available():
            raise UnavailableError(
                "mapping device memory on demand needs a CUDA device, but torch finds none. Open the pool with device='cpu'."
            )
        torch.cuda.init()
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        with _current(self.device):
            number = _call(driver, "cuDeviceGet", self.device.index)
            attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
            if not _call(driver, "cuDeviceGetAttribute", attribute, number):
                raise UnavailableError(f"{self.device} has no virtual memory management. Use another allocator.")
        self._properties = driver.CUmemAllocationProp()
        self._properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._properties.location.id = self.device.index
        self._access = driver.CUmemAccessDesc()
        self._access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._access.location.id = self.device.index
        self._access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        minimum = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        check_page(page, int(_call(driver, "cuMemGetAllocationGranularity", self._properties, minimum)))
        super().__init__(capacity, page)
        self._handles: dict[int, Any] = {}
        self._reserved: dict[int, int] = {}
        self._mapped: dict[int, int] = {}  # address of each mapped page -> its bytes
        finalizer = weakref.finalize(self, _close, driver, self.device, self._mapped, self._reserved, self._handles)
        finalizer.atexit = False

    def view(self, offset: int, size: int) -> Tensor:
        """See :meth:`Arena.view`."""
        if size == 0:
            return torch.empty(0, dtype=torch.uint8, device=self.device)
        return torch.as_tensor(_Span(self, offset, size), device=self.device)

    def reserve(self, size: int) -> int:
        """See :meth:`Pages.reserve`."""
        with _current(self.device):
            address = int(_call(self._driver, "cuMemAddressReserve", size, 0, 0, 0))
        self._reserved[address] = size
        return address

    def release(self, address: int, size: int) -> None:
        """See :meth:`Pages.release`."""
        with _current(self.device):
            _call(self._driver, "cuMemAddressFree", address, size)
        del self._reserved[address]

    def map(self, address: int, pages: Sequence[int]) -> None:
        """See :meth:`Pages.map`. One call per page and one for the access rights of all."""
        if not pages:
            return
        done = 0
        with _current(self.device):
            try:
                for place, page in enumerate(pages):
                    at = address + place * self.page
                    _call(self._driver, "cuMemMap", at, self.page, 0, self._handles[page], 0)
                    self._mapped[at] = self.page
                    done += 1
                _call(self._driver, "cuMemSetAccess", address, done * self.page, [self._access], 1)
            except Exception:
                self.unmap(address, done)
                raise

    def unmap(self, address: int, count: int) -> None:
        """See :meth:`Pages.unmap`. Waits for the device: unmapping is in no stream's order."""
        if not count:
            return
        with _current(self.device):
            torch.cuda.synchronize(self.device)
            # The range has to consist of whole mappings, which it does.
            _call(self._driver, "cuMemUnmap", address, count * self.page)
        for place in range(count):
            del self._mapped[address + place * self.page]

    def _make(self, page: int) -> None:
        with _current(self.device):
            self._handles[page] = _call(self._driver, "cuMemCreate", self.page, self._properties, 0)

    def _drop(self, page: int) -> None:
        with _current(self.device):
            _call(self._driver, "cuMemRelease", self._handles.pop(page))
