"""CPU kernels: numba beside plain torch references with the same signatures.

Importing this package compiles nothing; each kernel is compiled at its first call and cached on disk.
"""

from alaya_hf.kernels.cpu.blocks import BlockMeans, block_mean_attention, block_mean_attention_reference
from alaya_hf.kernels.cpu.dense import (
    dense_attention,
    dense_attention_reference,
    scan_scores,
    scan_scores_reference,
)
from alaya_hf.kernels.cpu.gather import (
    gather_attention,
    gather_attention_reference,
    gather_scores,
    gather_scores_reference,
)
from alaya_hf.kernels.cpu.lowbit import LowBitKV
from alaya_hf.kernels.cpu.lowbit_attend import lowbit_attention, lowbit_attention_reference
from alaya_hf.kernels.cpu.lowbit_scan import lowbit_scores, lowbit_scores_reference
from alaya_hf.kernels.cpu.select import (
    kth_largest,
    kth_largest_reference,
    recovery_threshold,
    recovery_threshold_reference,
    row_max,
    row_max_reference,
    select_threshold,
    select_threshold_reference,
)

__all__ = [
    "BlockMeans",
    "LowBitKV",
    "block_mean_attention",
    "block_mean_attention_reference",
    "dense_attention",
    "dense_attention_reference",
    "gather_attention",
    "gather_attention_reference",
    "gather_scores",
    "gather_scores_reference",
    "kth_largest",
    "kth_largest_reference",
    "lowbit_attention",
    "lowbit_attention_reference",
    "lowbit_scores",
    "lowbit_scores_reference",
    "recovery_threshold",
    "recovery_threshold_reference",
    "row_max",
    "row_max_reference",
    "scan_scores",
    "scan_scores_reference",
    "select_threshold",
    "select_threshold_reference",
]
