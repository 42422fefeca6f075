"""What a model could run on here, as JSON, for `whisperd setup`: run as `python -m whisperd.model.device`.

A process of its own, so that whoever asks loads no torch, and a driver that hangs or crashes takes nobody with it.
"""

from __future__ import annotations

import json
import os

import torch


def look() -> dict[str, object]:
    """Return `name` and `memory_bytes` of the first GPU, or of the processor and the machine's memory (`cuda` false).

    `problem` says why torch sees no GPU, where it was built to see one.
    """
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return {"cuda": True, "name": properties.name, "memory_bytes": properties.total_memory, "problem": ""}
    cores = len(os.sched_getaffinity(0))
    problem = ""
    if torch.version.cuda is not None:
        try:
            torch.zeros(1, device="cuda")
        except (RuntimeError, AssertionError) as error:
            problem = str(error).splitlines()[0]
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cuda": False, "name": f"{cores} processor cores", "memory_bytes": memory_bytes, "problem": problem}


if __name__ == "__main__":
    print(json.dumps(look()))
