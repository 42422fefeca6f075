"""Reads a folder of the transformers library (fine-tuned Whispers live in such) into openai-whisper's weights.

The folder has `config.json`, `model.safetensors` (or `model.safetensors.index.json` and the pieces it names), and may
have `generation_config.json`, which names the alignment heads. Pickled weights (`pytorch_model.bin`) are not read:
safetensors holds numbers and nothing that runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from whisperd.model.formats.weights import Weights, cannot_load

# Theirs, below `encoder.layers.N.` and `decoder.layers.N.`, to openai-whisper's below `….blocks.N.`.
_IN_BLOCK = {
    "self_attn.q_proj": "attn.query",
    "self_attn.k_proj": "attn.key",
    "self_attn.v_proj": "attn.value",
    "self_attn.out_proj": "attn.out",
    "self_attn_layer_norm": "attn_ln",
    "encoder_attn.q_proj": "cross_attn.query",
    "encoder_attn.k_proj": "cross_attn.key",
    "encoder_attn.v_proj": "cross_attn.value",
    "encoder_attn.out_proj": "cross_attn.out",
    "encoder_attn_layer_norm": "cross_attn_ln",
    "fc1": "mlp.0",
    "fc2": "mlp.2",
    "final_layer_norm": "mlp_ln",
}
_OUTSIDE = {
    "encoder.conv1": "encoder.conv1",
    "encoder.conv2": "encoder.conv2",
    "encoder.layer_norm": "encoder.ln_post",
    "decoder.embed_tokens": "decoder.token_embedding",
    "decoder.layer_norm": "decoder.ln",
}
_POSITIONS = {
    "encoder.embed_positions.weight": "encoder.positional_embedding",
    "decoder.embed_positions.weight": "decoder.positional_embedding",
}
# openai-whisper derives the languages from the size of the vocabulary: with others, tokens would mean other things.
_VOCABULARIES = (51864, 51865, 51866)


def is_folder_of_transformers(folder: Path) -> bool:
    """Return whether `folder` looks like one of the transformers library, whole or not."""
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "adapter_model.safetensors")
    return not (folder / "model.bin").exists() and any((folder / name).exists() for name in names)


def read_transformers_folder(folder: Path) -> Weights:
    """Return the weights of a Whisper in the transformers library's format.

    Raises `WhisperdError` (`model_unavailable`), saying what the folder lacks or is instead.
    """
    if (folder / "adapter_model.safetensors").exists() and not (folder / "model.safetensors").exists():
        raise cannot_load(folder, "it holds an adapter, not a whole model; merge it into its base model first")
    config = _read_json(folder / "config.json")
    if config.get("model_type") != "whisper":
        raise cannot_load(folder, f"its config.json says model_type {config.get('model_type')!r}, not 'whisper'")
    dims = _dims(folder, config)
    state: dict[str, torch.Tensor] = {}
    for path in _pieces(folder):
        try:
            with safe_open(path, framework="pt") as file:
                state |= {_our_name(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise cannot_load(folder, f"{path.name} is damaged or cut short ({error}); copy the folder again") from None
    # The last layer is the token embedding once more. One of its own would be another model than openai-whisper has.
    last = state.pop("proj_out.weight", None)
    embedding = state.get("decoder.token_embedding.weight")
    if last is not None and embedding is not None and not torch.equal(last, embedding):
        raise cannot_load(
            folder, "its proj_out differs from its token embedding, which openai-whisper has no place for"
        )
    return Weights(dims=dims, state=state, alignment_heads=_alignment_heads(folder, config), mapped=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise cannot_load(path.parent, f"there is no {path.name} in it; copy the whole folder") from None
    except ValueError as error:
        raise cannot_load(path.parent, f"its {path.name} is no JSON ({error})") from None
    if not isinstance(content, dict):
        raise cannot_load(path.parent, f"its {path.name} is no map")
    return content


def _dims(folder: Path, config: Mapping[str, Any]) -> dict[str, int]:
    theirs = {
        "n_mels": "num_mel_bins",
        "n_audio_ctx": "max_source_positions",
        "n_audio_state": "d_model",
        "n_audio_head": "encoder_attention_heads",
        "n_audio_layer": "encoder_layers",
        "n_vocab": "vocab_size",
        "n_text_ctx": "max_target_positions",
        "n_text_state": "d_model",
        "n_text_head": "decoder_attention_heads",
        "n_text_layer": "decoder_layers",
    }
    try:
        dims = {ours: int(config[name]) for ours, name in theirs.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise cannot_load(folder, f"its config.json lacks a number or has none that is one ({error})") from None
    if dims["n_vocab"] not in _VOCABULARIES:
        raise cannot_load(
            folder,
            f"its vocabulary has {dims['n_vocab']} tokens, and openai-whisper's have "
            f"{', '.join(map(str, _VOCABULARIES))}: a model with tokens of its own cannot be used",
        )
    return dims


def _pieces(folder: Path) -> list[Path]:
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():
        return [whole]
    if not index.exists():
        raise cannot_load(
            folder,
            "it has pickled weights only (pytorch_model.bin), which are not read because they could run code; "
            "save the model once with the transformers library of today: it writes model.safetensors",
        )
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise cannot_load(folder, f"its {index.name} has no weight_map")
    # Only the names' last parts count: an index leads nowhere outside its folder.
    pieces = [folder / Path(name).name for name in sorted(set(names.values()))]
    for piece in pieces:
        if not piece.is_file():
            raise cannot_load(folder, f"{piece.name} is missing; copy the whole folder")
    return pieces


def _our_name(theirs: str) -> str:
    """Return openai-whisper's name; one that has none there comes back as it is, and `build` will name it."""
    name = theirs.removeprefix("model.")
    if name in _POSITIONS:
        return _POSITIONS[name]
    place, _, kind = name.rpartition(".")
    if place in _OUTSIDE:
        return f"{_OUTSIDE[place]}.{kind}"
    match place.split(".", 3):
        case [part, "layers", number, rest] if rest in _IN_BLOCK:
            return f"{part}.blocks.{number}.{_IN_BLOCK[rest]}.{kind}"
    return name


def _alignment_heads(folder: Path, config: Mapping[str, Any]) -> list[tuple[int, int]] | None:
    generation = folder / "generation_config.json"
    heads = (_read_json(generation) if generation.exists() else config).get("alignment_heads")
    try:
        return [(int(layer), int(head)) for layer, head in heads] if heads else None
    except (TypeError, ValueError):
        raise cannot_load(folder, "its alignment_heads are no pairs of a layer and a head") from None
