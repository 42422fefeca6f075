"""Every kind of model file becomes the same weights, and what a file is not is said in a sentence."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import whisper
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from whisper.model import Conv1d, Linear, ModelDimensions, Whisper

from tests import models
from tests.test_model_huggingface import write_folder as write_transformers_folder
from whisperd.model import loading
from whisperd.model.formats.checkpoint import read_checkpoint
from whisperd.model.formats.ctranslate2 import read_ctranslate2_folder
from whisperd.protocol.catalogue import CHECKPOINTS, HOME_URL
from whisperd.protocol.errors import WhisperdError

CPU = torch.device("cpu")


def load(setting: str | Path, cache_dir: Path, **options: str) -> loading.LoadedModel:
    chosen = {"device": "cpu", "dtype": "auto"} | options
    environ = {"HOME": str(cache_dir / "home")}
    return loading.load(str(setting), cache_dir=cache_dir, on_step=lambda: None, environ=environ, **chosen)


def refusal(setting: str | Path, cache_dir: Path, **options: str) -> str:
    with pytest.raises(WhisperdError) as raised:
        load(setting, cache_dir, **options)
    assert raised.value.code == "model_unavailable"
    return raised.value.message


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # teams of threads of tests beside each other wait for each other


def write_folder(folder: Path, model: Whisper, kind: str, heads: list[list[int]]) -> Path:
    """Write a model in CTranslate2's format, as its converter does: fused projections, zeros for the keys' bias."""
    state = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    named: dict[str, np.ndarray] = {
        "encoder/num_heads": np.int16(model.dims.n_audio_head),
        "decoder/num_heads": np.int16(model.dims.n_text_head),
        "encoder/position_encodings/encodings": state["encoder.positional_embedding"],
        "decoder/position_encodings/encodings": state["decoder.positional_embedding"],
        "decoder/embeddings/weight": state["decoder.token_embedding.weight"],
    }

    def linear(theirs: str, *ours: str) -> None:
        weights = [state[f"{name}.weight"] for name in ours]
        zeros = np.zeros(len(weights[0]), np.float32)
        named[f"{theirs}/weight"] = np.concatenate(weights)
        named[f"{theirs}/bias"] = np.concatenate([state.get(f"{name}.bias", zeros) for name in ours])

    def norm(theirs: str, ours: str) -> None:
        named[f"{theirs}/gamma"], named[f"{theirs}/beta"] = state[f"{ours}.weight"], state[f"{ours}.bias"]

    for number in (1, 2):
        linear(f"encoder/conv{number}", f"encoder.conv{number}")
    norm("encoder/layer_norm", "encoder.ln_post")
    norm("decoder/layer_norm", "decoder.ln")
    for part in ("encoder", "decoder"):
        theirs, ours = f"{part}/layer_0", f"{part}.blocks.0"
        linear(f"{theirs}/self_attention/linear_0", *(f"{ours}.attn.{name}" for name in ("query", "key", "value")))
        linear(f"{theirs}/self_attention/linear_1", f"{ours}.attn.out")
        norm(f"{theirs}/self_attention/layer_norm", f"{ours}.attn_ln")
        linear(f"{theirs}/ffn/linear_0", f"{ours}.mlp.0")
        linear(f"{theirs}/ffn/linear_1", f"{ours}.mlp.2")
        norm(f"{theirs}/ffn/layer_norm", f"{ours}.mlp_ln")
    linear("decoder/layer_0/attention/linear_0", "decoder.blocks.0.cross_attn.query")
    linear("decoder/layer_0/attention/linear_1", *(f"decoder.blocks.0.cross_attn.{name}" for name in ("key", "value")))
    linear("decoder/layer_0/attention/linear_2", "decoder.blocks.0.cross_attn.out")
    norm("decoder/layer_0/attention/layer_norm", "decoder.blocks.0.cross_attn_ln")

    numbers = {"float32": 0, "int8": 1, "int16": 2, "float16": 4}

    def string(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    parts = [struct.pack("<I", 6), string("WhisperSpec"), struct.pack("<II", 3, len(named))]
    for name, value in named.items():
        array = np.asarray(value if name.endswith("num_heads") else value.astype(kind))
        shape = struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        parts += [string(name), shape, struct.pack("<BI", numbers[array.dtype.name], array.nbytes), array.tobytes()]
    parts += [struct.pack("<I", 1), string("decoder/projection/weight"), string("decoder/embeddings/weight")]
    folder.mkdir()
    (folder / "model.bin").write_bytes(b"".join(parts))
    (folder / "config.json").write_text(json.dumps({"alignment_heads": heads}))
    return folder


@pytest.mark.parametrize("kind", ["float16", "float32"])
def test_a_ctranslate2_folder_and_a_checkpoint_give_the_same_weights(tmp_path: Path, micro: Path, kind: str) -> None:
    upstream = whisper.load_model(str(micro), device="cpu")
    folder = write_folder(tmp_path / "micro-ct2", upstream, kind, heads=[[0, 1]])
    from_folder, from_file = load(folder, tmp_path), load(micro, tmp_path)
    assert (from_folder.name, from_file.name) == ("micro-ct2", "micro")
    for loaded in (from_folder.whisper, from_file.whisper):
        assert loaded.dims == upstream.dims
        wanted, given = upstream.state_dict(), loaded.state_dict()
        assert wanted.keys() == given.keys()
        for name, value in wanted.items():
            assert given[name].dtype == torch.float32
            assert torch.equal(given[name], value), name
    assert from_folder.whisper.alignment_heads.to_dense().tolist() == [[False, True]]
    # openai-whisper's own default, where nothing names them: all heads of the later layers
    assert from_file.whisper.alignment_heads.to_dense().tolist() == [[True, True]]


def test_the_demo_is_tiny_en_with_its_alignment_heads(tmp_path: Path) -> None:
    demo = load("demo", tmp_path)
    assert (demo.name, str(demo.device), demo.dtype_name) == ("demo", "cpu", "float32")
    assert demo.traits() == {"multilingual": False, "languages": 1, "translates": False, "vocabulary": 51864}
    listed = Whisper(demo.whisper.dims)
    listed.set_alignment_heads(whisper._ALIGNMENT_HEADS["tiny.en"])
    assert torch.equal(demo.whisper.alignment_heads.to_dense(), listed.alignment_heads.to_dense())
    # What both sides know independently of the file: openai-whisper's sinusoids, here in half precision.
    sinusoids = listed.encoder.positional_embedding
    assert torch.allclose(demo.whisper.encoder.positional_embedding, sinusoids, atol=1e-3)


def test_no_weight_is_drawn_that_is_overwritten(micro: Path) -> None:
    weights, before = read_checkpoint(micro), torch.get_rng_state()
    loading.build(weights, "micro", device=CPU, dtype=torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, micro: Path) -> dict[str, Path]:
    """A small model as each kind of file; the weights of `float32` are no others' in half precision."""
    folder = tmp_path_factory.mktemp("files")
    upstream = whisper.load_model(str(micro), device="cpu")
    return {
        "checkpoint": micro,
        "float32": models.babbler_checkpoint(folder),
        "ctranslate2": write_folder(folder / "ctranslate2", upstream, "float16", heads=[[0, 1]]),
        "transformers": write_transformers_folder(folder / "transformers", upstream, dtype=torch.float16),
    }


class Made(TorchFunctionMode):
    """Keeps the shape and type of each tensor that gets memory, beside those that lie in a file."""

    def __init__(self, file: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._in_file = {value.untyped_storage().data_ptr() for value in file.values()}
        self.tensors: set[tuple[torch.Size, torch.dtype]] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        has_memory = isinstance(made, Tensor) and made.device == CPU and made.layout is torch.strided
        if has_memory and made.untyped_storage().data_ptr() not in self._in_file:
            self.tensors.add((made.shape, made.dtype))
        return made


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["checkpoint", "float32", "ctranslate2", "transformers"])
def test_weights_are_cast_once_and_the_model_is_never_there_in_float32(
    tmp_path: Path, files: dict[str, Path], kind: str, dtype: torch.dtype
) -> None:
    _, weights = loading.read_weights(str(files[kind]), cache_dir=tmp_path, on_step=lambda: None, environ={})
    wanted = Whisper(ModelDimensions(**weights.dims))  # the long way: all of it in float32 first
    wanted.load_state_dict(weights.state)
    matrices = set()
    for module in wanted.modules():
        if isinstance(module, Linear | Conv1d | nn.Embedding):
            matrices.add(module.to(dtype).weight.shape)
    with Made(weights.state) as made:
        model = loading.build(weights, kind, device=CPU, dtype=dtype)
    assert {(shape, each) for shape, each in made.tensors if shape in matrices} == {
        (shape, dtype) for shape in matrices
    }
    given = dict([*model.named_parameters(), *model.named_buffers()])
    for name, value in [*wanted.named_parameters(), *wanted.named_buffers()]:
        if name == "alignment_heads":
            assert given[name].to_dense().tolist() == [[weights.alignment_heads is None, True]]
        else:
            assert given[name].dtype == value.dtype, name
            assert torch.equal(given[name], value), name


def test_turbo_is_known_by_its_shape() -> None:
    dims = {"n_audio_state": 64, "n_audio_head": 1, "n_text_state": 64, "n_text_head": 1, "n_vocab": 51866}
    sizes = dims | {"n_mels": 128, "n_audio_ctx": 1500, "n_text_ctx": 448, "n_audio_layer": 32, "n_text_layer": 4}
    turbo = Whisper(whisper.model.ModelDimensions(**sizes))
    loaded = loading.LoadedModel(whisper=turbo, name="turbo", device=CPU, dtype=torch.float32)
    assert loaded.traits() == {"multilingual": True, "languages": 100, "translates": False, "vocabulary": 51866}


@pytest.mark.parametrize("kind", ["checkpoint", "ctranslate2", "transformers"])
def test_what_was_read_of_a_file_is_not_kept_in_memory(tmp_path: Path, files: dict[str, Path], kind: str) -> None:
    _, weights = loading.read_weights(str(files[kind]), cache_dir=tmp_path, on_step=lambda: None, environ={})
    whole = {name: value.clone() for name, value in weights.state.items()}
    size = sum(value.nbytes for value in whole.values())
    assert resident_bytes(files[kind]) > 0.9 * size
    loading.build(weights, kind, device=CPU, dtype=torch.float32)
    assert resident_bytes(files[kind]) < 0.2 * size
    assert all(torch.equal(weights.state[name], value) for name, value in whole.items())


def resident_bytes(place: Path) -> int:
    """Return how much of a mapped file, or of those in a folder, lies in this process's memory."""
    found, mapped = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if not name.endswith(":"):
            mapped = str(place) in line
        elif mapped and name == "Rss:":
            found += int(values[0]) * 1024
    return found


# --- names of openai-whisper's list ---


def test_our_copy_of_the_list_is_openai_whispers() -> None:
    assert {name: checkpoint.url(HOME_URL) for name, checkpoint in CHECKPOINTS.items()} == whisper._MODELS
    assert list(CHECKPOINTS) == whisper.available_models()


@pytest.mark.parametrize(("name", "file"), [("tiny.en", "tiny.en.pt"), ("turbo", "large-v3-turbo.pt")])
def test_a_missing_model_says_which_file_goes_where(tmp_path: Path, name: str, file: str) -> None:
    message = refusal(name, tmp_path)
    assert str(tmp_path / "models" / file) in message
    assert whisper._MODELS[name] in message
    assert "whisperctl model load" in message


@pytest.mark.parametrize("place", ["models", "", "home/.cache/whisper"])
def test_a_file_that_is_not_openais_is_not_loaded(tmp_path: Path, place: str) -> None:
    path = tmp_path / place / "tiny.en.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"half a download")
    message = refusal("tiny.en", tmp_path)
    assert str(path) in message
    assert "sha256" in message


def test_the_hash_is_remembered_until_the_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"before")
    steps: list[None] = []

    def sha256() -> str:
        return loading._checked_sha256(path, tmp_path, lambda: steps.append(None))

    first = sha256()
    assert sha256() == first
    assert len(steps) == 1, "the second time nothing was read"
    path.write_bytes(b"after!")
    os.utime(path, ns=(1, 1))
    assert sha256() != first


# --- what files are not ---


def test_what_is_no_name_and_no_file(tmp_path: Path) -> None:
    assert "none of the names tiny.en" in refusal("smal", tmp_path)
    assert "no such file" in refusal(tmp_path / "gone.pt", tmp_path)
    assert "neither a file nor a folder" in refusal("/dev/null", tmp_path)


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    for content in (b"", b"RIFF....WAVE", b"PK\x03\x04 not really", bytes(100)):
        path.write_bytes(content)
        assert str(path) in refusal(path, tmp_path)
    torch.save({"encoder.conv1.weight": torch.zeros(1)}, path)
    assert "'model_state_dict'" in refusal(path, tmp_path)


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"dims": Evil(), "model_state_dict": {}}, tmp_path / "evil.pt")
    assert "tensors alone" in refusal(tmp_path / "evil.pt", tmp_path)
    assert not (tmp_path / "ran").exists()


def test_checkpoints_with_the_wrong_weights(tmp_path: Path, micro: Path) -> None:
    whole = torch.load(micro, weights_only=True)
    state = whole["model_state_dict"]
    path = tmp_path / "model.pt"

    def message(dims: dict[str, int], weights: dict[str, torch.Tensor]) -> str:
        torch.save({"dims": dims, "model_state_dict": weights}, path)
        return refusal(path, tmp_path)

    less = {name: value for name, value in state.items() if name != "decoder.ln.bias"}
    assert "lacks 'decoder.ln.bias'" in message(whole["dims"], less)
    assert "has 'lora', which Whisper has not" in message(whole["dims"], state | {"lora": torch.zeros(1)})
    assert "does not fit its own dimensions" in message(whole["dims"], state | {"decoder.ln.bias": torch.zeros(7)})
    assert "dimensions that are not a Whisper model's" in message({"n_mels": 80}, state)


def test_folders_that_are_not_ctranslate2s(tmp_path: Path, micro: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "no model.bin" in refusal(folder, tmp_path)
    for content in (b"", b"garbage", struct.pack("<IH", 6, 16) + b"TransformerSpec\0"):
        (folder / "model.bin").write_bytes(content)
        assert "model.bin is damaged or cut short" in refusal(folder, tmp_path)
    upstream = whisper.load_model(str(micro), device="cpu")
    whole = write_folder(tmp_path / "whole", upstream, "float16", heads=[])
    data = (whole / "model.bin").read_bytes()
    (folder / "model.bin").write_bytes(data[: len(data) // 2])
    assert "model.bin is damaged or cut short" in refusal(folder, tmp_path)
    (folder / "model.bin").write_bytes(data.replace(b"encoder/conv1/bias\0", b"encoder/conv1/bibs\0"))
    assert "has no 'encoder/conv1/bias'" in refusal(folder, tmp_path)
    (whole / "config.json").write_text("[]")
    assert "config.json" in refusal(whole, tmp_path)
    (whole / "config.json").write_text('{"alignment_heads": [[5, 0]]}')
    assert "alignment heads that it does not have" in refusal(whole, tmp_path)


def test_quantised_weights_are_refused_with_a_way_out(tmp_path: Path, micro: Path) -> None:
    folder = write_folder(tmp_path / "int8", whisper.load_model(str(micro), device="cpu"), "int8", heads=[])
    with pytest.raises(WhisperdError, match=r"int8.*float16 or float32 conversion"):
        read_ctranslate2_folder(folder)


# --- devices ---


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    assert "sees no CUDA device" in refusal("demo", tmp_path, device="cuda:1")
    assert loading.choose_device("auto") == CPU


def test_half_precision_needs_a_gpu(tmp_path: Path) -> None:
    assert "needs a CUDA device" in refusal("demo", tmp_path, dtype="float16")
