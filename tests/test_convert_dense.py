"""Checkpoints become ordinary GGUF files: names, types, rotary embeddings, activations."""

from __future__ import annotations

import logging
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from checkpoints import (
    BAMBOO,
    FALCON,
    LLAMA,
    OPT,
    Config,
    Tensors,
    random_tensors,
    save_safetensors,
    write_checkpoint,
)
from qinfer import Model
from qinfer.errors import FormatError, UnsupportedError
from qinfer.tools.convert_dense import convert_dense

SILU = LLAMA | {"hidden_act": "silu"}


def read(path: Path) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    return keys, {tensor.name: tensor for tensor in reader.tensors}


def converted(
    folder: Path, config: Config, tensors: Tensors | None = None, **options: Any
) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
    checkpoint = write_checkpoint(folder / "model", config, tensors or random_tensors(config))
    return read(convert_dense(checkpoint, folder / "out.gguf", **options))


# ---- types ----


@pytest.mark.parametrize(
    ("dtype", "named", "type_name", "file_type"),
    [("f2", "f16", "F16", 1), ("f4", "f32", "F32", 0), ("u2", "bf16", "BF16", 32),
     ("f8", "f32", "F32", 0)],
)  # fmt: skip
def test_the_type_is_the_checkpoints(
    dtype: str, named: str, type_name: str, file_type: int, tmp_path: Path
) -> None:
    source = random_tensors(SILU, "f4" if dtype == "u2" else dtype)
    if dtype == "u2":
        source = {name: (data.view("<u4") >> 16).astype("<u2") for name, data in source.items()}
    form = "bin" if dtype == "f8" else "safetensors"
    out = convert_dense(write_checkpoint(tmp_path / "m", SILU, source, form=form))
    assert out == tmp_path / "m" / f"ggml-model-{named}.gguf"
    keys, tensors = read(out)
    assert keys["general.file_type"] == file_type
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    down = tensors["blk.1.ffn_down.weight"]
    assert down.tensor_type.name == type_name
    expected = source["model.layers.1.mlp.down_proj.weight"]
    stored = np.asarray(down.data).view("f4" if dtype == "f8" else expected.dtype)
    np.testing.assert_array_equal(stored.reshape(expected.shape), expected.astype(stored.dtype))


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0"])
def test_another_type_is_that_of_the_oracle(outtype: str, tmp_path: Path) -> None:
    source = random_tensors(SILU, "f4")
    _, tensors = converted(tmp_path, SILU, source, outtype=outtype)
    kind = gguf.GGMLQuantizationType[outtype.upper()]
    found = tensors["blk.0.ffn_up.weight"]
    assert found.tensor_type == kind
    expected = gguf.quants.quantize(source["model.layers.0.mlp.up_proj.weight"], kind)
    np.testing.assert_array_equal(np.asarray(found.data).view("u1"), expected.view("u1"))


# ---- what files say ----


def test_a_tied_head_is_left_out(tmp_path: Path) -> None:
    config = SILU | {"tie_word_embeddings": True}
    _, tensors = converted(tmp_path, config)
    assert "output.weight" not in tensors
    with Model(tmp_path / "out.gguf") as model:
        assert model.info.tied_head


def test_keys_of_a_llama(tmp_path: Path) -> None:
    keys, tensors = converted(tmp_path, SILU | {"rope_theta": 5e5, "head_dim": 32}, n_ctx=99)
    found = {
        key: value
        for key, value in keys.items()
        if not key.startswith(("GGUF.", "tokenizer.", "general."))
    }
    assert found == {
        "llama.vocab_size": 301,
        "llama.context_length": 99,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 32,
        "llama.attention.value_length": 32,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 5e5,
    }
    assert keys["general.architecture"] == "llama" and keys["general.name"] == "model"
    assert sorted({name.rpartition("blk.0.")[2] for name in tensors if "blk.1" not in name}) == [
        "attn_k.weight", "attn_norm.weight", "attn_output.weight", "attn_q.weight",
        "attn_v.weight", "ffn_down.weight", "ffn_gate.weight", "ffn_norm.weight", "ffn_up.weight",
        "output.weight", "output_norm.weight", "token_embd.weight",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 4.0}},
         {"scaling.type": "linear", "scaling.factor": 4.0}),
        ({"rope_scaling": None}, {}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}},
         {"freq_base": 123.0}),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
         {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 128}),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16, "beta_slow": 2,
                           "original_max_position_embeddings": 32, "attention_factor": 1.0}},
         {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 32,
          "scaling.yarn_beta_fast": 16.0, "scaling.yarn_beta_slow": 2.0,
          "scaling.attn_factor": pytest.approx(1 / (1 + 0.1 * np.log(4.0)))}),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0,
                           "mscale_all_dim": 1.0}},
         {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 128,
          "scaling.attn_factor": pytest.approx(1 / (1 + 0.1 * np.log(4.0)))}),
    ],
)  # fmt: skip
def test_rotary_embeddings(rope: Config, expected: dict[str, Any], tmp_path: Path) -> None:
    keys, tensors = converted(tmp_path, SILU | rope)
    found = {key.removeprefix("llama.rope."): value for key, value in keys.items()
             if key.startswith("llama.rope.")}  # fmt: skip
    assert found == {"dimension_count": 16, "freq_base": 10000.0} | expected
    assert "rope_freqs.weight" not in tensors
    with Model(tmp_path / "out.gguf") as model:
        model.generate("a", max_tokens=2, temperature=0)


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"model_type": "mistral", "sliding_window": 7}, 7),
        ({"model_type": "mistral", "sliding_window": None}, 0),
        ({"model_type": "qwen2", "sliding_window": 7}, 0),
        ({"model_type": "qwen2", "sliding_window": 7, "use_sliding_window": True}, 7),
        ({"model_type": "qwen2", "sliding_window": 7, "use_sliding_window": True,
          "max_window_layers": 2}, 0),
        ({"model_type": "qwen2", "sliding_window": 128, "use_sliding_window": True,
          "max_window_layers": 1}, 128),
    ],
)  # fmt: skip
def test_sliding_windows(
    changes: Config, window: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = random_tensors(SILU)
    converted(tmp_path, SILU | changes, tensors)
    with Model(tmp_path / "out.gguf") as model:
        assert model.info.sliding_window == window
    assert ("attend beyond their sliding window" in caplog.text) == (window > 0)


def test_a_window_of_some_layers_is_refused(tmp_path: Path) -> None:
    config = SILU | {"model_type": "qwen2", "sliding_window": 7, "use_sliding_window": True,
                     "max_window_layers": 1}  # fmt: skip
    with pytest.raises(UnsupportedError, match="max_window_layers is 1; all layers or none"):
        converted(tmp_path, config, random_tensors(SILU))


def test_biases_are_rows_too(tmp_path: Path) -> None:
    source = random_tensors(SILU)
    biases = {f"model.layers.0.self_attn.{name}_proj.bias": np.arange(n, dtype="f2")
              for name, n in (("q", 64), ("k", 32), ("v", 32), ("o", 64))}  # fmt: skip
    biases |= {"model.layers.1.mlp.down_proj.bias": np.arange(64, dtype="f2")}
    _, tensors = converted(tmp_path, SILU, source | biases)
    k = tensors["blk.0.attn_k.bias"].data
    assert k.dtype == np.float32
    assert k[:6].tolist() == [0, 8, 1, 9, 2, 10] and k[16:18].tolist() == [16, 24]
    assert tensors["blk.0.attn_v.bias"].data.tolist() == list(range(32))
    assert tensors["blk.1.ffn_down.bias"].data.tolist() == list(range(64))
    with Model(tmp_path / "out.gguf") as model:
        model.generate("a", max_tokens=2, temperature=0)


# ---- activations ----


@pytest.mark.parametrize(
    ("config", "named", "warned"),
    [
        (SILU, None, None),
        (LLAMA | {"hidden_act": "relu"}, "relu", "llama.cpp would apply silu"),
        (LLAMA | {"hidden_act": "gelu_pytorch_tanh"}, "gelu_tanh", "llama.cpp would apply silu"),
        (LLAMA | {"hidden_act": "fatrelu", "hidden_act_param": 0.01}, "fatrelu:0.01",
         "llama.cpp would apply silu"),
        (FALCON | {"activation": "gelu"}, None, None),
        (FALCON, "relu", "llama.cpp would apply gelu"),
        (OPT, None, None),
        (OPT | {"activation_function": "gelu"}, "gelu", None),  # which llama.cpp does not know
        (BAMBOO, None, None),
    ],
)  # fmt: skip
def test_activations(
    config: Config,
    named: str | None,
    warned: str | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "qinfer"):
        keys, _ = converted(tmp_path, config)
    assert keys.get("qinfer.hidden_act") == named
    assert ("llama.cpp would apply" in caplog.text) == (warned is not None)
    assert warned is None or warned in caplog.text
    with Model(tmp_path / "out.gguf") as model:
        usual = {"llama": "silu", "falcon": "gelu", "opt": "relu", "bamboo": "relu_relu"}
        assert model.info.hidden_act == (named or usual[model.info.architecture])
        model.generate("a", max_tokens=2, temperature=0)


def test_the_activation_may_be_given(tmp_path: Path) -> None:
    keys, _ = converted(tmp_path, SILU, hidden_act="fatrelu:0.5")
    assert keys["qinfer.hidden_act"] == "fatrelu:0.5"


def test_unknown_models_are_listed(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"'mamba'; supported are llama, .*qwen2.*, opt"):
        converted(tmp_path, SILU | {"model_type": "mamba"}, random_tensors(SILU))


def test_a_weight_that_is_not_finite(tmp_path: Path) -> None:
    tensors = random_tensors(SILU)
    tensors["model.layers.0.mlp.down_proj.weight"][63, 95] = np.nan
    with pytest.raises(FormatError, match=r"layers\.0\.mlp\.down_proj\.weight holds nan at row 63"):
        converted(tmp_path, SILU, tensors)
    assert not (tmp_path / "out.gguf").exists()


# ---- the command line ----


def test_the_command_that_a_checkpoint_is_answered_with(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "a model", SILU, random_tensors(SILU))
    with pytest.raises(FormatError) as failure:
        Model(folder)
    _, _, command = str(failure.value).partition("first: python ")
    arguments = shlex.split(command)
    assert arguments[:2] == ["-m", "qinfer.tools.convert_dense"]
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with Model(tmp_path / "a model.gguf") as model:
        assert model.info.n_vocab == 301


def test_help_and_refusals(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "qinfer.tools.convert_dense", *arguments],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip

    assert "Example: python -m qinfer.tools.convert_dense SmolLM2" in run("--help").stdout
    done = run(str(tmp_path / "nothing"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {tmp_path / 'nothing'}: there is no such folder\n"


def test_one_thread_or_many(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", SILU, random_tensors(SILU, "f4"))
    files = [
        convert_dense(folder, tmp_path / f"{n}.gguf", outtype="q8_0", threads=n) for n in (1, 4)
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_bf16_bits_pass_through(tmp_path: Path) -> None:
    """Subnormals and the largest number included."""
    source = {name: np.zeros(data.shape, "<u2") for name, data in random_tensors(SILU).items()}
    bits = np.array([0x0001, 0x807F, 0x7F7F, 0xFF7F, 0x3F80, 0x8000], "<u2")
    source["model.layers.0.mlp.up_proj.weight"][3, :6] = bits
    folder = write_checkpoint(tmp_path / "m", SILU, source)
    save_safetensors(folder / "model.safetensors", source)
    _, tensors = read(convert_dense(folder))
    found = np.asarray(tensors["blk.0.ffn_up.weight"].data).view("<u2").reshape(96, 64)
    assert found[3, :6].tolist() == bits.tolist()
