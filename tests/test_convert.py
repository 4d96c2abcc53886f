"""Checkpoints and predictors become PowerInfer files: names, orders, values, texts, options."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from checkpoints import (
    BAMBOO,
    CONFIGS,
    LLAMA,
    N_EMBD,
    N_FF,
    OPT,
    Config,
    Tensors,
    random_tensors,
    shapes,
    write_checkpoint,
    write_predictors,
    write_tokenizer,
)
from oracle import forward
from oracle.checkpoint import Checkpoint
from oracle.numerics import Numerics
from qinfer import Model, Tokenizer
from qinfer._gguf import GGUF
from qinfer._types import decode
from qinfer.errors import ArgumentError, UnsupportedError
from qinfer.tools.convert import convert

FORMS = ["safetensors", "safetensors-sharded", "bin", "bin-sharded"]


def with_dense_magic(path: Path) -> Path:
    """A copy that readers of ordinary files take."""
    copy = path.with_suffix(".dense")
    copy.write_bytes(b"GGUF" + path.read_bytes()[4:])
    return copy


def read(path: Path) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
    """Keys and tensors of a file, read by PyPI's gguf."""
    reader = gguf.GGUFReader(with_dense_magic(path))
    keys = {name: field.contents() for name, field in reader.fields.items()}
    return keys, {tensor.name: tensor for tensor in reader.tensors}


def interleaved(rows: NDArray[Any], n_heads: int) -> NDArray[Any]:
    """Row 2i of a head is its row i, row 2i + 1 its row i + head_dim / 2."""
    out = np.empty_like(rows)
    head_dim = len(rows) // n_heads
    for head in range(n_heads):
        for i in range(head_dim // 2):
            out[head * head_dim + 2 * i] = rows[head * head_dim + i]
            out[head * head_dim + 2 * i + 1] = rows[head * head_dim + i + head_dim // 2]
    return out


def ungrouped(rows: NDArray[Any], n_head: int, n_kv: int) -> NDArray[Any]:
    """All q, all k, all v of groups of (q heads, one k head, one v head)."""
    head_dim = len(rows) // (n_head + 2 * n_kv)
    heads = rows.reshape(-1, head_dim, rows.shape[1])
    per_group = n_head // n_kv + 2
    q = [h for h in range(len(heads)) if h % per_group < per_group - 2]
    k = [h for h in range(len(heads)) if h % per_group == per_group - 2]
    v = [h for h in range(len(heads)) if h % per_group == per_group - 1]
    return heads[q + k + v].reshape(rows.shape)


def expected_tensors(config: Config, source: Tensors, predictors: list[Tensors]) -> Tensors:
    """What the file is to hold, in the checkpoint's type, by the description of the format."""
    if config["model_type"] == "opt":
        outer = {"model.decoder.embed_tokens.weight": "token_embd.weight",
                 "model.decoder.embed_positions.weight": "position_embd.weight",
                 "model.decoder.final_layer_norm.weight": "output_norm.weight",
                 "model.decoder.final_layer_norm.bias": "output_norm.bias"}  # fmt: skip
        layers = "model.decoder.layers."
        inner = {"self_attn_layer_norm": "attn_norm", "self_attn.q_proj": "attn_q",
                 "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
                 "self_attn.out_proj": "attn_output", "final_layer_norm": "ffn_norm",
                 "fc1": "ffn_up", "fc2": "ffn_down_t"}  # fmt: skip
    elif config["model_type"] == "falcon":
        outer = {"transformer.word_embeddings.weight": "token_embd.weight",
                 "transformer.ln_f.weight": "output_norm.weight",
                 "transformer.ln_f.bias": "output_norm.bias"}  # fmt: skip
        layers = "transformer.h."
        inner = {"input_layernorm": "attn_norm", "ln_mlp": "attn_norm", "ln_attn": "attn_norm_2",
                 "self_attention.query_key_value": "attn_qkv",
                 "self_attention.dense": "attn_output", "mlp.dense_h_to_4h": "ffn_up",
                 "mlp.dense_4h_to_h": "ffn_down_t"}  # fmt: skip
    else:
        outer = {"model.embed_tokens.weight": "token_embd.weight",
                 "model.norm.weight": "output_norm.weight",
                 "lm_head.weight": "output.weight"}  # fmt: skip
        layers = "model.layers."
        inner = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q",
                 "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
                 "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
                 "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
                 "mlp.down_proj": "ffn_down_t"}  # fmt: skip
    found: Tensors = {}
    n_head = config["num_attention_heads"]
    for name, data in source.items():
        if name in outer:
            found[outer[name]] = data
            continue
        layer, rest = name.removeprefix(layers).split(".", 1)
        module, kind = rest.rsplit(".", 1)
        target = inner[module]
        if target == "ffn_down_t" and kind == "weight":
            data = data.T
        if config["model_type"] in ("llama", "bamboo") and target in ("attn_q", "attn_k"):
            data = interleaved(
                data, n_head if target == "attn_q" else config["num_key_value_heads"]
            )
        if target == "attn_qkv":
            data = ungrouped(data, n_head, config.get("num_kv_heads", 1))
        found[f"blk.{layer}.{target}.{kind}"] = data
    if config["model_type"] != "opt":
        found.setdefault("output.weight", found["token_embd.weight"])
    for i, layer_tensors in enumerate(predictors):
        found |= {f"blk.{i}.{name}": data for name, data in layer_tensors.items()}
    return found


def assert_holds(path: Path, expected: Tensors, type_name: str = "F16") -> None:
    """The file has exactly these tensors: vectors in F32, matrices in a type, values unchanged."""
    _, tensors = read(path)
    assert sorted(tensors) == sorted(expected)
    for name, data in expected.items():
        tensor = tensors[name]
        wanted = "F32" if data.ndim == 1 else type_name
        assert tensor.tensor_type.name == wanted, name
        assert tuple(reversed(tensor.shape.tolist())) == data.shape, name
        dtype = {"F32": np.float32, "F16": np.float16}[wanted]
        np.testing.assert_array_equal(
            np.asarray(tensor.data).view(dtype).reshape(data.shape), data.astype(dtype), name
        )


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[Path, Path]:
    """A llama's folder and that of its predictors."""
    write_predictors(tmp_path / "predictor", LLAMA)
    return write_checkpoint(tmp_path / "m", LLAMA, random_tensors(LLAMA)), tmp_path / "predictor"


# ---- the trained model ----


@pytest.fixture(scope="module")
def stories(test_data: Path) -> Path:
    return test_data / "models" / "relu-stories-15M"


@pytest.fixture(scope="module")
def converted(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "stories.gguf"
    assert convert(stories, stories / "predictor", out) == out
    return out


def test_the_trained_models_tensors(stories: Path, converted: Path) -> None:
    config = json.loads((stories / "config.json").read_text())
    predictors = []
    for layer in range(6):
        with zipfile.ZipFile(stories / "predictor" / f"model_{layer}.pt") as archive:
            by_size = {
                entry.file_size: np.frombuffer(archive.read(entry), np.float16)
                for entry in archive.infolist()
                if entry.filename.rpartition("/")[0].endswith("/data")
            }
        fc1, fc2 = by_size[2 * 64 * 288].reshape(64, 288), by_size[2 * 768 * 64].reshape(768, 64)
        predictors.append({"fc1.weight": fc1, "fc2.weight": fc2})
    source = load_file(stories / "model.safetensors")
    assert_holds(converted, expected_tensors(config, source, predictors))


def test_the_trained_models_keys(stories: Path, converted: Path) -> None:
    assert converted.read_bytes()[:8] == b"PWRI\3\0\0\0"
    keys, _ = read(converted)
    with GGUF(converted) as file:
        types = {key: file.value_type(key) for key in file.keys}
    expected = {
        "general.architecture": ("llama", "string"),
        "general.name": ("relu-stories-15M", "string"),
        "general.file_type": (1, "u32"),
        "llama.context_length": (256, "u32"),
        "llama.embedding_length": (288, "u32"),
        "llama.block_count": (6, "u32"),
        "llama.feed_forward_length": (768, "u32"),
        "llama.attention.head_count": (6, "u32"),
        "llama.attention.head_count_kv": (6, "u32"),
        "llama.attention.layer_norm_rms_epsilon": (float(np.float32(1e-5)), "f32"),
        "llama.rope.dimension_count": (48, "u32"),
        "llama.rope.freq_base": (10000.0, "f32"),
        "llama.vocab_size": (32000, "u32"),
        "powerinfer.sparse_threshold": (0.0, "f32"),
    }
    found = {
        key: (value, types[key])
        for key, value in keys.items()
        if not key.startswith(("GGUF.", "tokenizer."))
    }
    assert found == expected
    # What PowerInfer refuses a file without.
    assert keys["tokenizer.ggml.model"] == "llama"
    assert len(keys["tokenizer.ggml.tokens"]) == 32000
    assert "<0x0A>" in keys["tokenizer.ggml.tokens"]
    assert types["tokenizer.ggml.token_type"] == "array of i32"
    assert types["tokenizer.ggml.scores"] == "array of f32"


def values_of(path: Path) -> dict[str, NDArray[np.float64]]:
    """The tensors' values, read by this package, which takes a fraction of the time."""
    with GGUF(path) as file:
        return {t.name: decode(t.data, t.type, t.shape).astype(np.float64) for t in file.tensors}


def oracle_of(path: Path) -> Checkpoint:
    """The model in NumPy; a sparse llama means ReLU."""
    with GGUF(path) as file:
        keys = {key: file.metadata[key] for key in file.keys if not key.startswith("tokenizer")}
    return Checkpoint(keys | {"qinfer.hidden_act": "relu"}, values_of(path))


@pytest.mark.parametrize("sparsity", ["exact", "predict"])
def test_the_trained_models_texts(stories: Path, converted: Path, sparsity: str) -> None:
    """Each text but one, token for token.

    The texts were made with keys and values in float32; here they are kept in F16. That moves
    predictions too, and one that crosses the threshold moves a logit by up to one. Where a text
    parts for that, NumPy with keys and values in F16 parts there as well, to the same token.
    """
    expected = json.loads((stories / "expected_greedy.json").read_text())
    cases = {name: case for name, case in expected.items() if name.endswith(sparsity)}
    assert len(cases) == 4
    parted = 0
    with Model(converted, sparsity=sparsity, prefill="sparse") as model:
        for case in cases.values():
            ids = case["ids"]
            n_prompt = len(model.tokenizer.encode(case["prompt"]))
            done = model.generate(case["prompt"], max_tokens=len(ids) - n_prompt, temperature=0)
            found = ids[:n_prompt] + done.tokens
            if found == ids:
                continue
            assert sparsity == "predict"
            parted += 1
            at = next(i for i, pair in enumerate(zip(found, ids, strict=True)) if len({*pair}) > 1)
            oracle = oracle_of(converted)
            logits = forward(oracle, ids[:at], Numerics(kv_type="f16"), threshold=0.0)[-1]
            assert logits.argmax() == found[at] != ids[at]
            assert forward(oracle, ids[:at], threshold=0.0)[-1].argmax() == ids[at]
    assert parted <= 1


def test_f32_and_f16_hold_the_same(stories: Path, converted: Path, tmp_path: Path) -> None:
    out = convert(stories, stories / "predictor", tmp_path / "f32.gguf", outtype="f32")
    narrow, wide = values_of(converted), values_of(out)
    assert narrow.keys() == wide.keys()
    for name, data in narrow.items():
        np.testing.assert_array_equal(wide[name], data, name)


# ---- every architecture, every form of checkpoint ----


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("arch", CONFIGS)
def test_tensors_of_each_architecture(arch: str, form: str, tmp_path: Path) -> None:
    config = CONFIGS[arch]
    source = random_tensors(config)
    folder = write_checkpoint(tmp_path / "model", config, source, form=form)
    predictors = write_predictors(tmp_path / "predictor", config, threshold=0.25)
    out = convert(folder, tmp_path / "predictor")
    assert out == folder / "ggml-model-f16.gguf"
    assert_holds(out, expected_tensors(config, source, predictors))
    with Model(out, sparsity="predict") as model:
        assert model.info.is_powerinfer and model.info.down_by_neuron
        assert model.info.architecture == config["model_type"]
        assert model.info.hidden_act == ("relu_relu" if arch == "bamboo" else "relu")
        assert model.info.sparse_threshold == 0.25
        assert model.info.predictor_rank == 40
        assert len(model.generate("a", max_tokens=4, temperature=0).tokens) <= 4


def test_large_tensors_go_in_pieces(tmp_path: Path) -> None:
    """Of which the last are smaller, in rows, heads and columns."""
    config = LLAMA | {
        "hidden_size": 400, "intermediate_size": 1700, "num_attention_heads": 8,
        "num_hidden_layers": 1, "num_key_value_heads": 8, "vocab_size": 3001,
    }  # fmt: skip
    source = random_tensors(config)
    folder = write_checkpoint(tmp_path / "model", config, source)
    predictors = write_predictors(tmp_path / "predictor", config)
    out = convert(folder, tmp_path / "predictor")
    assert_holds(out, expected_tensors(config, source, predictors))


@pytest.mark.parametrize("stored", ["f4", "f8", "bf16"])
@pytest.mark.parametrize("outtype", ["f32", "f16"])
def test_other_types_are_rounded(stored: str, outtype: str, tmp_path: Path) -> None:
    form = "bin" if stored == "f8" else "safetensors"
    source = random_tensors(LLAMA, "f8" if stored == "f8" else "f4")
    if stored == "bf16":
        bits = {name: (data.view("<u4") >> 16).astype("<u2") for name, data in source.items()}
        folder = write_checkpoint(tmp_path / "model", LLAMA, bits, form=form)
        source = {name: (data.astype("<u4") << 16).view("<f4") for name, data in bits.items()}
    else:
        folder = write_checkpoint(tmp_path / "model", LLAMA, source, form=form)
    predictors = write_predictors(tmp_path / "predictor", LLAMA)
    out = convert(folder, tmp_path / "predictor", outtype=outtype)
    rounded = {name: data.astype("f4") for name, data in source.items()}
    assert_holds(out, expected_tensors(LLAMA, rounded, predictors), outtype.upper())


def test_q8_0_blocks_and_rows_that_make_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = random_tensors(LLAMA)
    folder = write_checkpoint(tmp_path / "model", LLAMA, source)
    predictors = write_predictors(tmp_path / "predictor", LLAMA, rank=56)  # and 64 in layer 1
    with caplog.at_level(logging.WARNING, "qinfer"):
        out = convert(folder, tmp_path / "predictor", outtype="q8_0")
    assert out.name == "ggml-model-q8_0.gguf"
    assert "1 tensors are written as F16" in caplog.text and "blk.0.fc2.weight" in caplog.text
    assert "PowerInfer computes q8_0 wrongly" in caplog.text
    keys, tensors = read(out)
    assert keys["general.file_type"] == 7 and keys["general.quantization_version"] == 2
    for name, data in expected_tensors(LLAMA, source, predictors).items():
        if data.ndim == 1 or name == "blk.0.fc2.weight":
            continue
        blocks = gguf.quants.quantize(data.astype("f4"), gguf.GGMLQuantizationType.Q8_0)
        np.testing.assert_array_equal(tensors[name].data, blocks, name)
    assert tensors["blk.0.fc2.weight"].tensor_type.name == "F16"


def test_threads_do_not_change_the_file(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    files = [convert(*tiny, tmp_path / f"{n}.gguf", threads=n).read_bytes() for n in (1, 2, 5)]
    assert files[0] == files[1] == files[2]


def test_memory_is_that_of_about_one_tensor(tmp_path: Path) -> None:
    config = LLAMA | {"hidden_size": 512, "intermediate_size": 6144, "num_hidden_layers": 4}
    folder = write_checkpoint(tmp_path / "model", config, random_tensors(config))
    write_predictors(tmp_path / "predictor", config)
    largest = 2 * 512 * 6144
    total = (folder / "model.safetensors").stat().st_size
    assert total > 12 * largest
    convert(folder, tmp_path / "predictor", threads=1)  # what is imported and cached
    tracemalloc.start()
    convert(folder, tmp_path / "predictor", threads=1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5 * largest


# ---- heads, names, activations ----


@pytest.mark.parametrize("said", ["said", "absent"])
def test_a_tied_head_is_written(said: str, tmp_path: Path) -> None:
    config = LLAMA | ({"tie_word_embeddings": True} if said == "said" else {})
    source = random_tensors(config)
    source.pop("lm_head.weight", None)
    folder = write_checkpoint(tmp_path / "model", config, source)
    predictors = write_predictors(tmp_path / "predictor", config)
    out = convert(folder, tmp_path / "predictor")
    assert_holds(out, expected_tensors(config, source, predictors))


@pytest.mark.parametrize("arch", ["llama", "falcon-7b"])
def test_a_tied_head_is_left_out_on_request(
    arch: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = CONFIGS[arch] | {"tie_word_embeddings": True}
    source = random_tensors(config)
    source.pop("lm_head.weight", None)
    folder = write_checkpoint(tmp_path / "model", config, source)
    predictors = write_predictors(tmp_path / "predictor", config)
    expected = expected_tensors(config, source, predictors)
    del expected["output.weight"]
    out = convert(folder, tmp_path / "predictor", tied_head=True)
    assert_holds(out, expected)
    assert "PowerInfer will refuse the file for want of output.weight" in caplog.text
    with Model(out, sparsity="predict") as model:
        assert model.info.tied_head


def test_a_head_of_its_own_cannot_be_left_out(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", LLAMA, random_tensors(LLAMA))
    write_predictors(tmp_path / "predictor", LLAMA)
    with pytest.raises(ArgumentError, match=r"tied_head: .*has a head of its own, lm_head\.weight"):
        convert(folder, tmp_path / "predictor", tied_head=True)
    assert list(folder.glob("*.gguf")) == []


def test_a_head_beside_a_tied_embedding_is_not_looked_at(tmp_path: Path) -> None:
    config = LLAMA | {"tie_word_embeddings": True}
    source = random_tensors(config)
    stale = {"lm_head.weight": np.ones_like(source["model.embed_tokens.weight"])}
    folder = write_checkpoint(tmp_path / "model", config, source | stale)
    predictors = write_predictors(tmp_path / "predictor", config)
    out = convert(folder, tmp_path / "predictor")
    assert_holds(out, expected_tensors(config, source, predictors))


@pytest.mark.parametrize(
    ("arch", "prefix", "other"),
    [("opt", "model.decoder.", "decoder."), ("llama", "model.", ""),
     ("falcon-7b", "transformer.", "")],
)  # fmt: skip
def test_names_with_and_without_prefix(arch: str, prefix: str, other: str, tmp_path: Path) -> None:
    config = CONFIGS[arch]
    source = random_tensors(config)
    renamed = {
        name.replace(prefix, other, 1) if name.startswith(prefix) else name: data
        for name, data in source.items()
    }
    assert renamed.keys() != source.keys()
    predictors = write_predictors(tmp_path / "predictor", config)
    out = convert(write_checkpoint(tmp_path / "m", config, renamed), tmp_path / "predictor")
    assert_holds(out, expected_tensors(config, source, predictors))


def test_buffers_of_old_checkpoints_are_left_out(tmp_path: Path) -> None:
    source = random_tensors(LLAMA)
    buffers = {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(8, "f4") for i in range(2)
    }
    folder = write_checkpoint(tmp_path / "model", LLAMA, source | buffers)
    predictors = write_predictors(tmp_path / "predictor", LLAMA)
    out = convert(folder, tmp_path / "predictor")
    assert_holds(out, expected_tensors(LLAMA, source, predictors))


def test_the_first_falcons_keys(tmp_path: Path) -> None:
    """RefinedWeb, before it was called falcon: n_layer, n_head, n_head_kv."""
    source = random_tensors(CONFIGS["falcon-40b"])
    config = {
        "model_type": "RefinedWeb", "hidden_act": "relu", "vocab_size": 301, "hidden_size": 64,
        "n_layer": 2, "n_head": 4, "n_head_kv": 2, "layer_norm_epsilon": 1e-5, "alibi": False,
        "num_hidden_layers": 2,
    }  # fmt: skip
    predictors = write_predictors(tmp_path / "predictor", CONFIGS["falcon-40b"])
    del config["num_hidden_layers"]
    out = convert(write_checkpoint(tmp_path / "m", config, source), tmp_path / "predictor")
    assert_holds(out, expected_tensors(CONFIGS["falcon-40b"], source, predictors))
    keys, _ = read(out)
    assert keys["general.architecture"] == "falcon"
    assert keys["falcon.attention.head_count_kv"] == 2
    assert keys["falcon.context_length"] == 2048
    assert keys["falcon.feed_forward_length"] == 256


@pytest.mark.parametrize("model_type", ["llama", "sparsellama"])
def test_fatrelu_and_its_threshold(
    model_type: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = LLAMA | {
        "model_type": model_type, "hidden_act": "fatrelu", "hidden_act_param": 0.01,
    }  # fmt: skip
    folder = write_checkpoint(tmp_path / "model", config, random_tensors(LLAMA))
    write_predictors(tmp_path / "predictor", LLAMA)
    out = convert(folder, tmp_path / "predictor")
    keys, _ = read(out)
    assert keys["general.architecture"] == "llama"
    assert keys["qinfer.hidden_act"] == "fatrelu:0.01"
    assert "PowerInfer will apply relu instead of fatrelu:0.01" in caplog.text
    with Model(out) as model:
        assert model.info.hidden_act == "fatrelu:0.01"


def test_the_activation_may_be_given(tmp_path: Path) -> None:
    config = CONFIGS["falcon-40b"].copy()
    del config["activation"]  # then it is gelu
    folder = write_checkpoint(tmp_path / "model", config, random_tensors(config))
    write_predictors(tmp_path / "predictor", config)
    with pytest.raises(UnsupportedError, match=r"config\.json: the activation is gelu.*hidden-act"):
        convert(folder, tmp_path / "predictor")
    out = convert(folder, tmp_path / "predictor", hidden_act="relu")
    assert "qinfer.hidden_act" not in read(out)[0]
    with pytest.raises(ArgumentError, match="hidden_act 'rely' is not one of silu, relu"):
        convert(folder, tmp_path / "predictor", hidden_act="rely")
    with pytest.raises(UnsupportedError, match="relu_relu needs a gate"):
        convert(folder, tmp_path / "predictor", hidden_act="relu_relu")


@pytest.mark.parametrize(
    ("config", "extra", "said"),
    [
        (LLAMA | {"head_dim": 32}, {}, "refuse attn_q.weight"),
        (LLAMA, {"model.layers.0.self_attn.q_proj.bias": 64}, "refuse the file for blk.0.attn_q.b"),
        (LLAMA | {"sliding_window": 7}, {}, "not apply the sliding window"),
        (LLAMA | {"rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32}}, {}, "for rope_freqs.weight"),
        (OPT, {}, "refuse position_embd.weight, of 130 rows instead of 2050"),
    ],
    ids=["head_dim", "bias", "window", "llama3", "positions"],
)  # fmt: skip
def test_what_only_this_runtime_does_is_said(
    config: Config, extra: dict[str, int], said: str, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    tensors = random_tensors(config) | {name: np.ones(n, "f2") for name, n in extra.items()}
    folder = write_checkpoint(tmp_path / "model", config, tensors)
    write_predictors(tmp_path / "predictor", config)
    out = convert(folder, tmp_path / "predictor")
    assert said in caplog.text
    with Model(out, sparsity="predict") as model:
        model.generate("a", max_tokens=2, temperature=0)


# ---- the command line ----


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qinfer.tools.convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_the_originals_arguments(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    folder, predictor = tiny
    out = tmp_path / "named.gguf"
    write_tokenizer(tmp_path, 301)
    (folder / "tokenizer.model").unlink()
    done = run(
        "--outtype", "f32", "--vocab-dir", tmp_path, "--outfile", out, "--ctx", "77",
        "--concurrency", "2", "--vocabtype", "spm", folder, predictor,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}: {out.stat().st_size / 2**20:.1f} MiB\n"
    keys, tensors = read(out)
    assert keys["llama.context_length"] == 77
    assert tensors["output.weight"].tensor_type.name == "F32"


def test_a_file_of_the_checkpoint_names_it(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    by_folder = convert(*tiny, tmp_path / "a.gguf").read_bytes()
    by_file = convert(tiny[0] / "model.safetensors", tiny[1], tmp_path / "b.gguf").read_bytes()
    assert by_folder == by_file


def test_the_vocabulary_alone(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "vocabulary.gguf"
    assert run("--vocab-only", "--outfile", out, *tiny).returncode == 0
    assert out.read_bytes()[:4] == b"GGUF"
    assert Tokenizer.from_gguf(out).decode(Tokenizer.from_gguf(out).encode("abc")) == "abc"
    keys, tensors = read(out)
    assert keys["llama.embedding_length"] == N_EMBD and not tensors
    assert "needs --outfile" in run("--vocab-only", tiny[0]).stderr


def test_tensors_are_listed(tiny: tuple[Path, Path]) -> None:
    folder, predictor = tiny
    whole = run("--dump", folder)
    single = run("--dump-single", folder / "model.safetensors", predictor)
    assert whole.returncode == single.returncode == 0
    assert whole.stdout == single.stdout
    lines = whole.stdout.splitlines()
    assert len(lines) == len(shapes(LLAMA))
    assert lines[0].split() == ["lm_head.weight", "F16", "[301,", "64]"]
    pickled = run("--dump-single", predictor / "model_1.pt").stdout
    assert pickled == f"fc1.weight  F16   [40, {N_EMBD}]\nfc2.weight  F16   [{N_FF}, 40]\n"
    assert not list(folder.glob("*.gguf"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--bigendian"], "gguf-convert-endian"),
        (["--outtype", "bf16"], "'bf16' is not one of 'f32', 'f16', 'q8_0'"),
        (["--ctx", "0"], "0 is not in the range x>=1"),
        (["--vocabtype", "wordpiece"], "'wordpiece' is not one of"),
    ],
)
def test_what_is_refused(arguments: list[str], said: str, tiny: tuple[Path, Path]) -> None:
    done = run(*arguments, *tiny)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert said in done.stderr


def test_predictors_are_asked_for(tiny: tuple[Path, Path]) -> None:
    assert "use python -m qinfer.tools.convert_dense" in run(tiny[0]).stderr


def test_help_has_an_example() -> None:
    assert "Example: python -m qinfer.tools.convert ReluLLaMA-7B" in run("--help").stdout


def test_bamboo_is_sparse_in_gate_and_up(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", BAMBOO, random_tensors(BAMBOO))
    write_predictors(tmp_path / "predictor", BAMBOO)
    keys, _ = read(convert(folder, tmp_path / "predictor"))
    assert keys["general.architecture"] == "bamboo"
    assert "qinfer.hidden_act" not in keys  # the architecture says it
