"""Small random checkpoints as transformers saves them, written without it and without torch."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from numpy.typing import NDArray
from safetensors.numpy import save_file

Tensors = dict[str, NDArray[Any]]
Config = dict[str, Any]

STORAGES = {"<f2": "HalfStorage", "<f4": "FloatStorage", "<f8": "DoubleStorage",
            "<i8": "LongStorage", "<u2": "BFloat16Storage"}  # fmt: skip

N_VOCAB, N_EMBD, N_FF, N_LAYER, RANK = 301, 64, 96, 2, 32
LLAMA: Config = {
    "model_type": "llama",
    "hidden_act": "relu",
    "vocab_size": N_VOCAB,
    "hidden_size": N_EMBD,
    "intermediate_size": N_FF,
    "num_hidden_layers": N_LAYER,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
FALCON: Config = {
    "model_type": "falcon",
    "activation": "relu",
    "vocab_size": N_VOCAB,
    "hidden_size": N_EMBD,
    "num_hidden_layers": N_LAYER,
    "num_attention_heads": 4,
    "layer_norm_epsilon": 1e-5,
    "multi_query": True,
    "new_decoder_architecture": False,
}
FALCON_40B: Config = FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}
OPT: Config = {
    "model_type": "opt",
    "activation_function": "relu",
    "vocab_size": N_VOCAB,
    "hidden_size": N_EMBD,
    "word_embed_proj_dim": N_EMBD,
    "ffn_dim": N_FF,
    "num_hidden_layers": N_LAYER,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "do_layer_norm_before": True,
}
BAMBOO: Config = LLAMA | {"model_type": "bamboo"}
CONFIGS = {"llama": LLAMA, "bamboo": BAMBOO, "falcon-7b": FALCON, "falcon-40b": FALCON_40B,
           "opt": OPT}  # fmt: skip


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a configuration."""
    n_embd, n_vocab = config["hidden_size"], config["vocab_size"]
    found: dict[str, tuple[int, ...]] = {}
    if config["model_type"] == "falcon":
        n_kv = config.get("num_kv_heads", 1)
        n_qkv = n_embd + 2 * n_kv * n_embd // config["num_attention_heads"]
        found["transformer.word_embeddings.weight"] = (n_vocab, n_embd)
        for i in range(config["num_hidden_layers"]):
            layer = f"transformer.h.{i}."
            for name in ("ln_mlp", "ln_attn") if n_kv > 1 else ("input_layernorm",):
                found |= {f"{layer}{name}.{kind}": (n_embd,) for kind in ("weight", "bias")}
            found[f"{layer}self_attention.query_key_value.weight"] = (n_qkv, n_embd)
            found[f"{layer}self_attention.dense.weight"] = (n_embd, n_embd)
            found[f"{layer}mlp.dense_h_to_4h.weight"] = (4 * n_embd, n_embd)
            found[f"{layer}mlp.dense_4h_to_h.weight"] = (n_embd, 4 * n_embd)
        found |= {f"transformer.ln_f.{kind}": (n_embd,) for kind in ("weight", "bias")}
        return found
    if config["model_type"] == "opt":
        n_ff = config["ffn_dim"]
        found["model.decoder.embed_tokens.weight"] = (n_vocab, n_embd)
        found["model.decoder.embed_positions.weight"] = (
            config["max_position_embeddings"] + 2, n_embd,
        )  # fmt: skip
        for i in range(config["num_hidden_layers"]):
            layer = f"model.decoder.layers.{i}."
            for name in ("self_attn_layer_norm", "final_layer_norm"):
                found |= {f"{layer}{name}.{kind}": (n_embd,) for kind in ("weight", "bias")}
            for name, n_out, n_in in (
                *((f"self_attn.{x}", n_embd, n_embd) for x in ("q_proj", "k_proj", "v_proj",
                                                              "out_proj")),
                ("fc1", n_ff, n_embd),
                ("fc2", n_embd, n_ff),
            ):  # fmt: skip
                found[f"{layer}{name}.weight"] = (n_out, n_in)
                found[f"{layer}{name}.bias"] = (n_out,)
        for kind in ("weight", "bias"):
            found[f"model.decoder.final_layer_norm.{kind}"] = (n_embd,)
        return found
    n_ff = config["intermediate_size"]
    head_dim = config.get("head_dim", n_embd // config["num_attention_heads"])
    n_q = config["num_attention_heads"] * head_dim
    n_kv = config["num_key_value_heads"] * head_dim
    found["model.embed_tokens.weight"] = (n_vocab, n_embd)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        found |= {
            f"{layer}input_layernorm.weight": (n_embd,),
            f"{layer}self_attn.q_proj.weight": (n_q, n_embd),
            f"{layer}self_attn.k_proj.weight": (n_kv, n_embd),
            f"{layer}self_attn.v_proj.weight": (n_kv, n_embd),
            f"{layer}self_attn.o_proj.weight": (n_embd, n_q),
            f"{layer}post_attention_layernorm.weight": (n_embd,),
            f"{layer}mlp.gate_proj.weight": (n_ff, n_embd),
            f"{layer}mlp.up_proj.weight": (n_ff, n_embd),
            f"{layer}mlp.down_proj.weight": (n_embd, n_ff),
        }
    found["model.norm.weight"] = (n_embd,)
    if not config.get("tie_word_embeddings", False):
        found["lm_head.weight"] = (n_vocab, n_embd)
    return found


def random_tensors(config: Config, dtype: str = "f2", seed: int = 0) -> Tensors:
    """A tensor of every name; norms are near 1."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal(shape) / np.sqrt(shape[-1])
               + (1.0 if "norm" in name or "ln_" in name else 0.0)).astype(dtype)
        for name, shape in shapes(config).items()
    }  # fmt: skip


def n_ff(config: Config) -> int:
    """Neurons of a layer."""
    return int(
        config.get("intermediate_size") or config.get("ffn_dim") or 4 * config["hidden_size"]
    )


def write_checkpoint(
    folder: Path, config: Config, tensors: Tensors, *, form: str = "safetensors"
) -> Path:
    """Writes a folder with a tokenizer; `form` is safetensors, bin, or one of them with -sharded.

    Tensors of uint16 are bits of BF16.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    kind, _, is_sharded = form.partition("-")
    stem, suffix = ("model", ".safetensors") if kind == "safetensors" else ("pytorch_model", ".bin")
    save = save_safetensors if kind == "safetensors" else save_state_dict
    if not is_sharded:
        save(folder / f"{stem}{suffix}", tensors)
    else:
        names = sorted(tensors)
        places = {}
        for part in range(3):
            shard = f"{stem}-{part + 1:05}-of-00003{suffix}"
            save(folder / shard, {name: tensors[name] for name in names[part::3]})
            places |= dict.fromkeys(names[part::3], shard)
        index = {"metadata": {}, "weight_map": places}
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    write_tokenizer(folder, config["vocab_size"])
    return folder


def save_safetensors(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """As the library does, but that uint16 is BF16, which NumPy has not."""
    if not any(array.dtype == np.uint16 for array in tensors.values()):
        save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, path)
        return
    header, data = {}, b""
    for name, array in tensors.items():
        dtype = {"<u2": "BF16", "<f2": "F16", "<f4": "F32"}[array.dtype.str]
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + array.nbytes],
        }
        data += array.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def save_state_dict(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """A state dict as `torch.save` writes it: a pickle, and an entry for each storage."""

    def plain(value: object) -> bytes:
        return pickle.dumps(value, 2)[2:-1]

    program = b"\x80\x02}("
    with zipfile.ZipFile(path, "w") as archive:
        for number, (name, array) in enumerate(tensors.items()):
            key = str(number)
            storage = b"ctorch\n" + STORAGES[array.dtype.str].encode() + b"\n"
            reference = b"(" + plain("storage") + storage + plain(key) + plain("cpu")
            reference += plain(array.size) + b"tQ"
            strides = [int(np.prod(array.shape[axis + 1 :])) for axis in range(array.ndim)]
            program += plain(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + reference
            program += plain(0) + plain(array.shape) + plain(tuple(strides)) + plain(False) + b"}tR"
            archive.writestr(f"archive/data/{key}", array.tobytes())
        archive.writestr("archive/data.pkl", program + b"u.")
        archive.writestr("archive/version", "3\n")


def write_predictors(
    folder: Path, config: Config, *, rank: int = RANK, threshold: float | None = None
) -> list[Tensors]:
    """A folder of random predictors, each layer with another rank; returns what they hold."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(7)
    layers = []
    for i in range(config["num_hidden_layers"]):
        dims = {"fc1.weight": (rank + 8 * i, config["hidden_size"]),
                "fc2.weight": (n_ff(config), rank + 8 * i)}  # fmt: skip
        layers.append({name: rng.standard_normal(shape).astype("f2") for name, shape in
                       dims.items()})  # fmt: skip
        save_state_dict(folder / f"model_{i}.pt", layers[-1])
    if threshold is not None:
        (folder / "config.json").write_text(json.dumps({"sparse_threshold": threshold}))
    return layers


def write_tokenizer(folder: Path, n_vocab: int) -> None:
    """A SentencePiece model of so many pieces, all bytes among them."""
    letters = [chr(ord("a") + i) for i in range(26)]
    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3)]
    pieces += [(f"<0x{byte:02X}>", 6) for byte in range(256)]
    pieces += [(text, 1) for text in ("▁", *letters, *(f"▁{letter}" for letter in letters))]
    pieces += [(f"▁w{number}", 1) for number in range(len(pieces), n_vocab)]
    model = b""
    for number, (text, kind) in enumerate(pieces[:n_vocab]):
        name = text.encode()
        score = np.float32(-max(0, number - 258)).tobytes()
        piece = b"\x0a" + bytes([len(name)]) + name + b"\x15" + score + b"\x18" + bytes([kind])
        model += b"\x0a" + bytes([len(piece)]) + piece
    # Of the trainer's settings: BPE, with bytes for characters it does not know.
    settings = b"\x18\x02" + b"\x98\x02\x01"
    model += b"\x12" + bytes([len(settings)]) + settings
    assert sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size() == n_vocab
    (folder / "tokenizer.model").write_bytes(model)
