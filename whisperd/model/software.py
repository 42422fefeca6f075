"""What the model runs on: versions, and what torch sees of CUDA or why it sees nothing. Told in `stats`."""

from __future__ import annotations

from typing import Any

import torch
import whisper


def describe() -> dict[str, Any]:
    """Return `torch`, `whisper`, `cuda` (what this torch is built for), `cuda_devices` and `cuda_problem` for `stats`.

    Makes no CUDA context: a daemon that is told to use the CPU leaves the GPU's memory alone.
    """
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "torch": str(torch.__version__),
        "whisper": str(whisper.__version__),
        "cuda": torch.version.cuda,
        "cuda_devices": devices,
        "cuda_problem": None if devices else _problem(),
    }


def _problem() -> str:
    if torch.version.cuda is None:
        return "this torch is built without CUDA: for a GPU install the build that pytorch.org's selector names"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (AssertionError, RuntimeError) as error:  # torch's own words: no driver, one that is too old, no device
        return str(error).partition("\n")[0]
    return "torch sees no CUDA device: does nvidia-smi see one, and may this user open /dev/nvidia*?"
