"""CUDA C++ compiled at run time, and launched on torch's current stream (so that CUDA graphs capture it)."""

from __future__ import annotations

import ctypes
import glob
import os
import sys
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


@lru_cache(maxsize=1)
def _nvrtc() -> ctypes.CDLL:
    major = (torch.version.cuda or "").split(".")[0]
    names = [f"libnvrtc.so.{major}", "libnvrtc.so"]
    for folder in sys.path:
        names += sorted(glob.glob(os.path.join(folder, "nvidia", "*", "lib", f"libnvrtc.so.{major}*")))
    names.append(f"/usr/local/cuda/lib64/libnvrtc.so.{major}")
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise OSError(f"found no NVRTC for CUDA {major or '(torch has none)'}; CUDA builds of torch bring it along")


@lru_cache(maxsize=1)
def driver() -> ctypes.CDLL:
    """CUDA's driver.

    Raises
    ------
    OSError
        If there is none.
    """
    return ctypes.CDLL("libcuda.so.1")


@lru_cache(maxsize=8)
def available(device: int) -> bool:
    """Whether kernels can be compiled for, and run on, this device."""
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        _nvrtc(), driver()
    except OSError:
        return False
    return True


def check_driver(code: int, what: str) -> None:
    """Refuse to go on after a call of the driver that failed.

    Raises
    ------
    RuntimeError
    """
    if code:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"{what} failed: {(text.value or b'').decode()} ({code})")


class Kernel:
    """A loaded function."""

    def __init__(self, image: bytes, name: str, device: int, shared: int) -> None:
        torch.cuda.init()
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # makes the device's primary context current
            self.module, self.function = ctypes.c_void_p(), ctypes.c_void_p()
            check_driver(driver().cuModuleLoadData(ctypes.byref(self.module), image), "cuModuleLoadData")
            check_driver(
                driver().cuModuleGetFunction(ctypes.byref(self.function), self.module, name.encode()),
                "cuModuleGetFunction",
            )
            # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            check_driver(driver().cuFuncSetAttribute(self.function, 8, shared), "cuFuncSetAttribute")

    def __call__(self, grid: tuple[int, int, int], threads: int, shared: int, arguments: list[Any]) -> None:
        """Launch. Tensors go as pointers, ints as 32-bit ints, floats as 32-bit floats."""
        held: list[Any] = []
        for value in arguments:
            if isinstance(value, Tensor):
                held.append(ctypes.c_void_p(value.data_ptr()))
            elif isinstance(value, int):
                held.append(ctypes.c_int(value))
            else:
                held.append(ctypes.c_float(value))
        pointers = (ctypes.c_void_p * len(held))(*(ctypes.cast(ctypes.pointer(x), ctypes.c_void_p) for x in held))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        check_driver(
            driver().cuLaunchKernel(self.function, *grid, threads, 1, 1, shared, stream, pointers, None),
            "cuLaunchKernel",
        )


def compile_kernel(source: str, name: str, macros: dict[str, int], device: int, shared: int) -> Kernel:
    """Compile `source` for `device`.

    Parameters
    ----------
    source : str
        CUDA C++ without includes; `name` is declared ``extern "C"``.
    macros : dict
        ``-D`` options.
    shared : int
        Bytes of dynamic shared memory.

    Raises
    ------
    RuntimeError
        With the compiler's log.
    """
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    major, minor = torch.cuda.get_device_capability(device)
    options = [f"-arch=sm_{major}{minor}", "-std=c++17", *(f"-D{key}={value}" for key, value in macros.items())]
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None):
        raise RuntimeError("nvrtcCreateProgram failed")
    texts = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    failed = nvrtc.nvrtcCompileProgram(program, len(options), texts)
    size = ctypes.c_size_t()
    if failed:
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"NVRTC could not compile {name} with {options}:\n{log.value.decode()}")
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    image = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, image)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return Kernel(image.raw, name, device, shared)
