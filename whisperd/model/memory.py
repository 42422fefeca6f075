"""Memory of the device: how much there is, and whether it was what ran out."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """True when memory of the device or of the machine ran out, and nothing worse happened."""
    # The CPU's allocator says it in words only.
    return isinstance(error, torch.cuda.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
