"""Folders of the transformers library: the same weights as a checkpoint's, and a sentence for what is not one."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import whisper
from safetensors.torch import save_file
from whisper.model import Whisper

from bench.recordings import RATE
from tests import models
from tests.model_bench import Bench
from whisperd.model import loading
from whisperd.model.formats import huggingface
from whisperd.protocol.errors import WhisperdError


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Whisper:
    return whisper.load_model(str(models.micro_checkpoint(tmp_path_factory.mktemp("micro"))), device="cpu")


def tensors_of(model: Whisper) -> dict[str, torch.Tensor]:
    """Return the state under the names that the transformers library gives it (written down here once more)."""
    renamed = {
        "token_embedding.weight": "embed_tokens.weight",
        "positional_embedding": "embed_positions.weight",
        "ln_post": "layer_norm",
        "decoder.ln.": "decoder.layer_norm.",
        "blocks": "layers",
        "cross_attn_ln": "encoder_attn_layer_norm",
        "mlp_ln": "final_layer_norm",
        "attn_ln": "self_attn_layer_norm",
        "cross_attn.": "encoder_attn.",
        ".attn.": ".self_attn.",
        "query": "q_proj",
        "key.": "k_proj.",
        "value": "v_proj",
        "attn.out": "attn.out_proj",
        "mlp.0": "fc1",
        "mlp.2": "fc2",
    }
    tensors = {}
    for name, value in model.state_dict().items():
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs)
        tensors[f"model.{name}"] = value.clone()
    return tensors


def write_folder(
    folder: Path,
    model: Whisper,
    *,
    pieces: int = 1,
    config: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write what `save_pretrained` of a Whisper leaves, in one file or in several with an index."""
    dims = model.dims
    folder.mkdir()
    whole = {
        "model_type": "whisper",
        "num_mel_bins": dims.n_mels,
        "max_source_positions": dims.n_audio_ctx,
        "d_model": dims.n_audio_state,
        "encoder_attention_heads": dims.n_audio_head,
        "encoder_layers": dims.n_audio_layer,
        "vocab_size": dims.n_vocab,
        "max_target_positions": dims.n_text_ctx,
        "decoder_attention_heads": dims.n_text_head,
        "decoder_layers": dims.n_text_layer,
    }
    (folder / "config.json").write_text(json.dumps(whole | dict(config or {})))
    (folder / "generation_config.json").write_text(json.dumps({"alignment_heads": [[0, 1]]}))
    tensors = {name: tensor.to(dtype) for name, tensor in tensors_of(model).items()}
    if pieces == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    places = {name: f"model-{number % pieces}.safetensors" for number, name in enumerate(sorted(tensors))}
    for place in set(places.values()):
        save_file({name: tensors[name] for name in tensors if places[name] == place}, folder / place)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def load(folder: Path, cache_dir: Path) -> loading.LoadedModel:
    return loading.load(
        str(folder), cache_dir=cache_dir, device="cpu", dtype="auto", on_step=lambda: None, environ={"HOME": "/"}
    )


def refusal(folder: Path, cache_dir: Path) -> str:
    with pytest.raises(WhisperdError) as raised:
        load(folder, cache_dir)
    assert raised.value.code == "model_unavailable"
    return raised.value.message


@pytest.mark.parametrize("pieces", [1, 3])
def test_the_weights_are_those_of_the_checkpoint(tmp_path: Path, upstream: Whisper, pieces: int) -> None:
    loaded = load(write_folder(tmp_path / "finetuned", upstream, pieces=pieces), tmp_path)
    assert (loaded.name, loaded.whisper.dims) == ("finetuned", upstream.dims)
    wanted, given = upstream.state_dict(), loaded.whisper.state_dict()
    assert wanted.keys() == given.keys()
    assert all(torch.equal(given[name], value) for name, value in wanted.items())
    assert loaded.whisper.alignment_heads.to_dense().tolist() == [[False, True]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_in_two_bytes_are_those_numbers_in_float32(
    tmp_path: Path, upstream: Whisper, dtype: torch.dtype
) -> None:
    """As most folders are published; what they transcribe is what openai-whisper says with weights rounded so."""
    torch.set_num_threads(1)
    rounded = copy.deepcopy(upstream)
    rounded.load_state_dict({name: value.to(dtype).float() for name, value in upstream.state_dict().items()})
    config = {"torch_dtype": str(dtype).removeprefix("torch.")}
    loaded = load(write_folder(tmp_path / "published", upstream, config=config, dtype=dtype), tmp_path)
    given = loaded.whisper.state_dict()
    assert all(torch.equal(given[name], value) for name, value in rounded.state_dict().items())
    bench = Bench(loaded, tmp_path, release=True)
    bench.record("sound", (torch.randn(4 * RATE, generator=torch.Generator().manual_seed(1)) * 3000).short().numpy())
    transcript = bench.begin("sound", language="en", temperature=0)[0].transcribe()
    wanted = whisper.transcribe(rounded, bench.samples("sound"), language="en", temperature=0, fp16=False)
    assert [segment.tokens for segment in transcript.segments] == [segment["tokens"] for segment in wanted["segments"]]
    assert transcript.text


def test_a_last_layer_that_is_the_embedding_is_accepted_and_another_refused(tmp_path: Path, upstream: Whisper) -> None:
    folder = write_folder(tmp_path / "tied", upstream)
    tensors = tensors_of(upstream)
    embedding = tensors["model.decoder.embed_tokens.weight"]
    save_file(tensors | {"proj_out.weight": embedding.clone()}, folder / "model.safetensors")
    load(folder, tmp_path)
    save_file(tensors | {"proj_out.weight": embedding + 1}, folder / "model.safetensors")
    assert "proj_out differs" in refusal(folder, tmp_path)


def test_an_index_leads_nowhere_outside_its_folder(tmp_path: Path, upstream: Whisper) -> None:
    folder = write_folder(tmp_path / "pieces", upstream, pieces=2)
    (folder / "model-1.safetensors").rename(tmp_path / "model-1.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-1", "../model-1"))
    assert "model-1.safetensors is missing" in refusal(folder, tmp_path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "wav2vec2"}, "model_type 'wav2vec2'"),
        ({"vocab_size": 51900}, "51900 tokens"),
        ({"d_model": None}, "config.json"),
        ({"decoder_layers": 2}, "lacks"),
        ({"num_mel_bins": 128}, "does not fit its own dimensions"),
    ],
)
def test_a_config_that_does_not_fit(tmp_path: Path, upstream: Whisper, config: dict[str, Any], words: str) -> None:
    assert words in refusal(write_folder(tmp_path / "odd", upstream, config=config), tmp_path)


def test_folders_that_lack_something(tmp_path: Path, upstream: Whisper) -> None:
    folder = write_folder(tmp_path / "cut", upstream)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "damaged or cut short" in refusal(folder, tmp_path)
    weights.rename(folder / "pytorch_model.bin")
    assert "pickled weights only" in refusal(folder, tmp_path)
    (folder / "pytorch_model.bin").rename(folder / "adapter_model.safetensors")
    assert "an adapter" in refusal(folder, tmp_path)
    (folder / "config.json").unlink()
    weights.write_bytes(whole)
    assert "no config.json" in refusal(folder, tmp_path)
    assert huggingface.is_folder_of_transformers(folder)
