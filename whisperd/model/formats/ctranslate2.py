"""Reads a model folder in CTranslate2's format (what faster-whisper uses) into openai-whisper's weights.

The file `model.bin`, all numbers little-endian: u32 version, string spec, u32 revision, u32 count; then each variable:
string name, u8 rank, u32 per dimension, u8 type, u32 bytes, data; then u32 count of aliases, two strings each.
A string is a u16 length, then its bytes with a final NUL.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

import torch

from whisperd.model.formats.weights import Weights, cannot_load

_SPEC = "WhisperSpec"
_TYPES = {0: torch.float32, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.float16, 5: torch.bfloat16}
_FLOATS = (torch.float32, torch.float16)


def read_ctranslate2_folder(folder: Path) -> Weights:
    """Return the weights of a CTranslate2 folder.

    Raises `WhisperdError` (`model_unavailable`), saying what the folder lacks or is instead.
    """
    path = folder / "model.bin"
    if not path.is_file():
        raise cannot_load(
            folder,
            "there is no model.bin in it, so it is no folder in CTranslate2's format, "
            "and no model.safetensors, so it is none of the transformers library",
        )
    try:
        variables = _read_variables(path)
    except (struct.error, UnicodeDecodeError, ValueError, IndexError) as error:
        raise cannot_load(folder, f"its model.bin is damaged or cut short ({error}); copy the folder again") from None
    kinds = {value.dtype for name, value in variables.items() if name.endswith("/weight")}
    if not kinds <= set(_FLOATS):
        other = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds - set(_FLOATS)))
        raise cannot_load(
            folder,
            f"its weights are {other}, and whisperd computes with OpenAI's own weights: "
            "take the float16 or float32 conversion of the same model",
        )
    try:
        return Weights(
            dims=_dims(variables), state=_state(variables), alignment_heads=_alignment_heads(folder), mapped=True
        )
    except KeyError as missing:
        raise cannot_load(
            folder, f"its model.bin has no {missing.args[0]!r}, so it holds no whole Whisper model"
        ) from None


def _read_variables(path: Path) -> dict[str, torch.Tensor]:
    with path.open("rb") as file:
        # Copy on write: torch wants memory it may write to. Tensors keep the mapping alive.
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    offset = 0

    def take(layout: str) -> int:
        nonlocal offset
        (value,) = struct.unpack_from(layout, data, offset)
        offset += struct.calcsize(layout)
        return int(value)

    def take_string() -> str:
        nonlocal offset
        size = take("<H")
        offset += size
        return data[offset - size : offset - 1].decode()

    take("<I")  # the version says how numbers are stored in types whisperd refuses anyway
    spec = take_string()
    if spec != _SPEC:
        raise ValueError(f"it holds {spec[:40]!r} where {_SPEC!r} was expected")
    take("<I")
    variables: dict[str, torch.Tensor] = {}
    for _ in range(take("<I")):
        name = take_string()
        shape = [take("<I") for _ in range(take("<B"))]
        kind, size = _TYPES.get(take("<B")), take("<I")
        if kind is None:
            raise ValueError(f"unknown type of {name!r}")
        if offset + size > len(data):
            raise ValueError("it ends too early")
        variables[name] = torch.frombuffer(data, dtype=kind, count=size // kind.itemsize, offset=offset).reshape(shape)
        offset += size
    return variables


def _dims(variables: dict[str, torch.Tensor]) -> dict[str, int]:
    def layers(part: str) -> int:
        return sum(name.startswith(f"{part}/layer_") and name.endswith("/ffn/linear_0/weight") for name in variables)

    conv, audio_positions = variables["encoder/conv1/weight"], variables["encoder/position_encodings/encodings"]
    embeddings, text_positions = (
        variables["decoder/embeddings/weight"],
        variables["decoder/position_encodings/encodings"],
    )
    return {
        "n_mels": conv.shape[1],
        "n_audio_ctx": audio_positions.shape[0],
        "n_audio_state": conv.shape[0],
        "n_audio_head": int(variables["encoder/num_heads"]),
        "n_audio_layer": layers("encoder"),
        "n_vocab": embeddings.shape[0],
        "n_text_ctx": text_positions.shape[0],
        "n_text_state": embeddings.shape[1],
        "n_text_head": int(variables["decoder/num_heads"]),
        "n_text_layer": layers("decoder"),
    }


def _state(variables: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    state = {
        "encoder.conv1.weight": variables["encoder/conv1/weight"],
        "encoder.conv1.bias": variables["encoder/conv1/bias"],
        "encoder.conv2.weight": variables["encoder/conv2/weight"],
        "encoder.conv2.bias": variables["encoder/conv2/bias"],
        "encoder.positional_embedding": variables["encoder/position_encodings/encodings"],
        "decoder.positional_embedding": variables["decoder/position_encodings/encodings"],
        "decoder.token_embedding.weight": variables["decoder/embeddings/weight"],
        **_norm(variables, "encoder/layer_norm", "encoder.ln_post"),
        **_norm(variables, "decoder/layer_norm", "decoder.ln"),
    }
    dims = _dims(variables)
    for part, count in (("encoder", dims["n_audio_layer"]), ("decoder", dims["n_text_layer"])):
        for layer in range(count):
            state |= dict(_block(variables, f"{part}/layer_{layer}", f"{part}.blocks.{layer}", cross=part == "decoder"))
    return state


def _norm(variables: dict[str, torch.Tensor], theirs: str, ours: str) -> dict[str, torch.Tensor]:
    return {f"{ours}.weight": variables[f"{theirs}/gamma"], f"{ours}.bias": variables[f"{theirs}/beta"]}


def _block(
    variables: dict[str, torch.Tensor], theirs: str, ours: str, *, cross: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    def linear(place: str, names: tuple[str, ...]) -> Iterator[tuple[str, torch.Tensor]]:
        """Split a fused layer into its parts, in their order."""
        weights = variables[f"{theirs}/{place}/weight"].chunk(len(names))
        biases = variables[f"{theirs}/{place}/bias"].chunk(len(names))
        for name, weight, bias in zip(names, weights, biases, strict=True):
            yield f"{ours}.{name}.weight", weight
            if not name.endswith(".key"):  # openai-whisper's keys have no bias; the fused one is zeros there
                yield f"{ours}.{name}.bias", bias

    yield from linear("self_attention/linear_0", ("attn.query", "attn.key", "attn.value"))
    yield from linear("self_attention/linear_1", ("attn.out",))
    yield from _norm(variables, f"{theirs}/self_attention/layer_norm", f"{ours}.attn_ln").items()
    if cross:
        yield from linear("attention/linear_0", ("cross_attn.query",))
        yield from linear("attention/linear_1", ("cross_attn.key", "cross_attn.value"))
        yield from linear("attention/linear_2", ("cross_attn.out",))
        yield from _norm(variables, f"{theirs}/attention/layer_norm", f"{ours}.cross_attn_ln").items()
    yield from linear("ffn/linear_0", ("mlp.0",))
    yield from linear("ffn/linear_1", ("mlp.2",))
    yield from _norm(variables, f"{theirs}/ffn/layer_norm", f"{ours}.mlp_ln").items()


def _alignment_heads(folder: Path) -> list[tuple[int, int]] | None:
    """Return the heads that config.json names, or None where there is no such file or entry."""
    try:
        heads = json.loads((folder / "config.json").read_bytes()).get("alignment_heads")
        return None if not heads else [(int(layer), int(head)) for layer, head in heads]
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError):
        raise cannot_load(folder, "its config.json is not the one that belongs to CTranslate2's format") from None
