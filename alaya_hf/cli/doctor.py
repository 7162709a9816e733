"""``alaya-hf doctor``: what this machine can do, on one screen."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from alaya_hf.cli.machine import NO_CUDA

GIB = 1 << 30


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


def print_report(report: dict[str, Any], console: Console) -> None:
    """Print what :func:`alaya_hf.cli.machine.examine` found.

    Parameters
    ----------
    report : dict
    console : Console
    """
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")

    def row(name: str, *parts: str | None) -> None:
        table.add_row(name, Text(", ".join(part for part in parts if part)))

    versions, host, pool = report["versions"], report["host"], report["pool"]
    row("versions", *(f"{name} {version}" for name, version in versions.items() if version))
    threads = f"threads: torch {host['torch_threads']}, numba {host['numba_threads']}"
    row("processor", host["processor"], f"{host['cores']} cores", threads)
    limit = host["container_limit"]
    row(
        "host memory",
        _gib(host["memory"]),
        f"{_gib(host['available'])} available",
        "no container limit" if limit is None else f"container limit {_gib(limit)}",
        f"huge pages: {host['huge_pages']}",
        f"read {host['read_gb_s']:.1f} GB/s",
    )
    registered = "pinned" if pool["pinned"] else "not pinned (no CUDA device)"
    row("pool for offloading", registered, f"{pool['seconds_per_gib']:.2f} s per GiB to set up")
    row("attention on the CPU", *report["attention"].values())
    if not report["devices"]:
        row("kernels", NO_CUDA)
    for device in report["devices"]:
        table.add_section()
        _device_rows(device, row)
    console.print(table)


def _device_rows(device: dict[str, Any], row: Any) -> None:
    room = f"{_gib(device['free'])} of {_gib(device['memory'])} free"
    row(f"cuda:{device['index']}", device["name"], f"compute capability {device['capability']}", room)
    row(
        "bandwidth",
        f"device copy {device['copy_gb_s']:.0f} GB/s",
        f"from pinned memory {device['to_device_gb_s']:.1f} GB/s",
        f"to it {device['to_host_gb_s']:.1f} GB/s",
    )
    row("attention chosen", *(f"{kind}: {name}" for kind, name in device["attention"].items()))
    checks = device["attention_checks"]
    row("attention checked", *(f"{name}: {result}" for name, result in checks.items() if not result.startswith("not ")))
    row("NVRTC", "found: low-bit pass in CUDA C++" if device["nvrtc"] else "not found: low-bit pass in Triton")
    results = device["kernels"]
    good = [name for name, result in results.items() if result.startswith("ok")]
    row(
        "kernels",
        f"agree with their references: {', '.join(good)}" if good else None,
        *(f"{name}: {result}" for name, result in results.items() if name not in good),
    )
