"""What the converters refuse, by name, and that nothing is left behind then."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import (
    CONFIGS,
    FALCON,
    LLAMA,
    N_EMBD,
    N_FF,
    OPT,
    RANK,
    Config,
    Tensors,
    random_tensors,
    save_safetensors,
    save_state_dict,
    write_checkpoint,
    write_predictors,
)
from qinfer.errors import ArgumentError, FileError, FormatError, QInferError, UnsupportedError
from qinfer.tools.convert import convert
from qinfer.tools.convert_dense import convert_dense

Folders = tuple[Path, Path]


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    """A llama's folder and that of its predictors."""
    write_predictors(tmp_path / "predictor", LLAMA)
    return write_checkpoint(tmp_path / "m", LLAMA, random_tensors(LLAMA)), tmp_path / "predictor"


def refusal(kind: type[QInferError], folders: Folders, **options: Any) -> str:
    """The message of a conversion that fails, and leaves the folder as it was."""
    before = sorted(path.name for path in folders[0].iterdir()) if folders[0].is_dir() else []
    with pytest.raises(kind) as failure:
        convert(*folders, **options)
    assert failure.type is kind
    if before:
        assert sorted(path.name for path in folders[0].iterdir()) == before
    return str(failure.value)


def changed_config(folders: Folders, **changes: Any) -> None:
    path = folders[0] / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def changed_tensors(folders: Folders, changes: Tensors, without: tuple[str, ...] = ()) -> None:
    tensors = random_tensors(LLAMA) | changes
    save_safetensors(
        folders[0] / "model.safetensors",
        {name: data for name, data in tensors.items() if name not in without},
    )


# ---- predictors ----


def predictor(**changes: Any) -> Tensors:
    tensors = {"fc1.weight": np.ones((RANK, N_EMBD), "f2"),
               "fc2.weight": np.ones((N_FF, RANK), "f2")} | changes  # fmt: skip
    return {name: data for name, data in tensors.items() if data is not None}


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (predictor(**{"fc1.weight": np.ones((RANK, 63), "f2")}),
         "tensor fc1.weight has shape (32, 63), expected (rank, 64)"),
        (predictor(**{"fc1.weight": np.ones((RANK * N_EMBD,), "f2")}),
         "tensor fc1.weight has shape (2048,), expected (rank, 64)"),
        (predictor(**{"fc1.weight": np.ones((0, N_EMBD), "f2"),
                      "fc2.weight": np.ones((N_FF, 0), "f2")}),
         "tensor fc1.weight has shape (0, 64), expected (rank, 64)"),
        (predictor(**{"fc2.weight": np.ones((N_FF, RANK - 1), "f2")}),
         "tensor fc2.weight has shape (96, 31), expected (96, 32)"),
        (predictor(**{"fc2.weight": np.ones((N_FF - 1, RANK), "f2")}),
         "tensor fc2.weight has shape (95, 32), expected (96, 32)"),
        (predictor(**{"fc2.weight": np.ones((RANK, N_FF), "f2")}),
         "tensor fc2.weight has shape (32, 96), expected (96, 32)"),
        (predictor(**{"fc1.weight": np.ones((RANK, N_EMBD), "i8")}),
         "tensor fc1.weight is of type I64, expected one of F64, F32, F16, BF16"),
        (predictor(**{"fc2.weight": None}), "holds fc1.weight, expected exactly fc1.weight and"),
        (predictor(**{"fc1.bias": np.ones(RANK, "f2")}), "holds fc1.bias, fc1.weight, fc2.weight"),
    ],
)  # fmt: skip
def test_predictors_of_another_shape(tensors: Tensors, said: str, folders: Folders) -> None:
    path = folders[1] / "model_1.pt"
    save_state_dict(path, tensors)
    message = refusal(FormatError, folders)
    assert message.startswith(f"{path}: ") and said in message


def test_predictors_of_other_layers(folders: Folders) -> None:
    (folders[1] / "model_0.pt").rename(folders[1] / "model_2.pt")
    assert "lacks model_0.pt; the model has 2 layers" in refusal(FileError, folders)
    save_state_dict(folders[1] / "model_0.pt", predictor())
    assert "has model_2.pt, but the model has 2 layers" in refusal(FormatError, folders)


def test_no_predictors(folders: Folders) -> None:
    for path in folders[1].iterdir():
        path.unlink()
    assert "lacks model_0.pt, model_1.pt" in refusal(FileError, folders)
    folders[1].rmdir()
    assert refusal(FileError, folders) == f"{folders[1]}: there is no such folder"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("[0.1]", "holds a list, expected an object"),
        ('{"sparse_threshold": "0"}', "key sparse_threshold is '0', expected a number"),
        ('{"sparse_threshold": NaN}', "key sparse_threshold is nan, expected a finite number"),
    ],
)
def test_a_predictors_configuration(text: str, said: str, folders: Folders) -> None:
    (folders[1] / "config.json").write_text(text)
    message = refusal(FormatError, folders)
    assert message.startswith(str(folders[1] / "config.json")) and said in message


class Mischief:
    """A pickle that would run a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("where", ["predictor", "checkpoint"])
def test_a_pickle_that_calls_something(where: str, folders: Folders, tmp_path: Path) -> None:
    victim = tmp_path / "ran"
    path = folders[1] / "model_1.pt"
    if where == "checkpoint":
        (folders[0] / "model.safetensors").unlink()
        path = folders[0] / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        program = pickle.dumps({"fc1.weight": Mischief(f"touch {victim}")}, 2)
        archive.writestr("archive/data.pkl", program)
    message = refusal(FormatError, folders)
    assert str(path) in message and "system" in message
    assert not victim.exists()


# ---- checkpoints ----


def test_missing_and_surplus_tensors(folders: Folders) -> None:
    gate = "model.layers.1.mlp.gate_proj.weight"
    changed_tensors(folders, {}, without=(gate,))
    assert refusal(FormatError, folders) == f"{folders[0]}: lacks tensor {gate}"
    extra = {"model.layers.0.mlp.router.weight": np.ones((4, 4), "f2")}
    changed_tensors(folders, extra)
    message = refusal(FormatError, folders)
    assert message == (
        f"{folders[0] / 'model.safetensors'}: holds tensor model.layers.0.mlp.router.weight, which "
        "a model of type llama does not have"
    )
    changed_config(folders, num_hidden_layers=3)
    write_predictors(folders[1], LLAMA | {"num_hidden_layers": 3})
    assert "lacks 9 tensors, model.layers.2.input_layernorm.weight" in refusal(FormatError, folders)


def test_a_layer_too_many(folders: Folders) -> None:
    changed_config(folders, num_hidden_layers=1)
    (folders[1] / "model_1.pt").unlink()
    message = refusal(FormatError, folders)
    assert "holds 9 tensors, model.layers.1." in message


def test_a_missing_head(folders: Folders) -> None:
    changed_config(folders, tie_word_embeddings=False)
    changed_tensors(folders, {}, without=("lm_head.weight",))
    assert refusal(FormatError, folders).endswith("lacks tensor lm_head.weight")


def test_a_tensor_of_another_shape(folders: Folders) -> None:
    changed_tensors(folders, {"model.layers.0.mlp.up_proj.weight": np.ones((N_EMBD, N_FF), "f2")})
    assert refusal(FormatError, folders) == (
        f"{folders[0] / 'model.safetensors'}: tensor model.layers.0.mlp.up_proj.weight has shape "
        "(64, 96), expected (96, 64) by config.json"
    )


def test_a_tensor_of_integers(folders: Folders) -> None:
    changed_tensors(folders, {"model.norm.weight": np.ones(N_EMBD, "i4")})
    message = refusal(UnsupportedError, folders)
    assert "tensor model.norm.weight is of type I32, which is no floating point" in message


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight",
     "model.layers.1.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"],
)  # fmt: skip
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["f2", "f4", "bf16"])
def test_weights_that_are_not_finite(name: str, value: float, dtype: str, folders: Folders) -> None:
    tensors = random_tensors(LLAMA, "f2" if dtype == "f2" else "f4")
    tensors[name][9, 5] = value
    if dtype == "bf16":
        tensors = {key: (data.view("<u4") >> 16).astype("<u2") for key, data in tensors.items()}
    save_safetensors(folders[0] / "model.safetensors", tensors)
    assert refusal(FormatError, folders, outtype="f32") == (
        f"{folders[0] / 'model.safetensors'}: tensor {name} holds {value:g} at row 9, column 5; "
        "weights are finite numbers"
    )


def test_vectors_and_predictors_that_are_not_finite(folders: Folders) -> None:
    norm = np.ones(N_EMBD, "f2")
    norm[63] = np.nan
    changed_tensors(folders, {"model.norm.weight": norm})
    assert "model.norm.weight holds nan at element 63" in refusal(FormatError, folders)
    changed_tensors(folders, {})
    fc1 = np.ones((RANK, N_EMBD), "f2")
    fc1[31, 2] = np.inf
    save_state_dict(folders[1] / "model_1.pt", predictor(**{"fc1.weight": fc1}))
    message = refusal(FormatError, folders)
    assert f"{folders[1] / 'model_1.pt'}: tensor fc1.weight holds inf at row 31" in message


@pytest.mark.parametrize(
    ("outtype", "fits", "beyond"),
    [("f16", 65519.0, 65520.0), ("q8_0", 8319000.0, 8319020.0), ("f32", 3.4e38, 3.5e38)],
)
def test_values_that_a_type_does_not_reach(
    outtype: Any, fits: float, beyond: float, folders: Folders
) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    (folders[0] / "model.safetensors").unlink()

    def write(value: float) -> None:
        tensors = random_tensors(LLAMA, "f8")
        tensors[name][2, 3] = -value
        save_state_dict(folders[0] / "pytorch_model.bin", tensors)

    write(fits)
    convert(*folders, folders[1] / "out.gguf", outtype=outtype)
    write(beyond)
    message = refusal(ArgumentError, folders, outtype=outtype)
    assert f"tensor {name} holds {-beyond:g} at row 2, column 3, which " in message
    assert f"{outtype.upper()} does not reach" in message


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"model_type": ...}, FormatError, "key model_type is missing, expected a string"),
        ({"model_type": "gpt_neox"}, UnsupportedError,
         "model_type is 'gpt_neox'; supported are llama, sparsellama, mistral, bamboo, falcon, "
         "RefinedWeb, RefinedWebModel, opt"),
        ({"model_type": "qwen2"}, UnsupportedError, "model_type is 'qwen2'; supported are llama"),
        ({"hidden_act": "silu"}, UnsupportedError, "the activation is silu, which is hardly ever"),
        ({"hidden_act": ...}, UnsupportedError, "the activation is silu"),
        ({"hidden_act": "relu2"}, UnsupportedError, "hidden_act is 'relu2'; known are fatrelu"),
        ({"hidden_act": "fatrelu"}, FormatError, "key hidden_act_param is missing"),
        ({"hidden_act": "fatrelu", "hidden_act_param": -1}, UnsupportedError, "is 0 or more"),
        ({"model_type": "bamboo", "hidden_act": "silu"}, UnsupportedError, "activation is relu"),
        ({"hidden_size": ...}, FormatError, "key hidden_size is missing, expected an integer"),
        ({"hidden_size": "64"}, FormatError, "key hidden_size is '64', expected an integer of 1"),
        ({"hidden_size": 64.5}, FormatError, "key hidden_size is 64.5, expected an integer"),
        ({"num_hidden_layers": 0}, FormatError, "key num_hidden_layers is 0, expected"),
        ({"num_hidden_layers": True}, FormatError, "key num_hidden_layers is True, expected"),
        ({"rms_norm_eps": None}, FormatError, "key rms_norm_eps is missing, expected a number"),
        ({"max_position_embeddings": ...}, FormatError,
         "key max_sequence_length or max_position_embeddings is missing"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, UnsupportedError,
         "hidden_size is 64; it must be a multiple of the 5 heads"),
        ({"num_key_value_heads": 3}, UnsupportedError, "it must divide the 4 heads"),
        ({"head_dim": 15}, UnsupportedError, "even number"),
        ({"rope_scaling": "linear"}, FormatError, "key rope_scaling is 'linear', expected an obj"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, UnsupportedError,
         "rope_scaling.type is 'dynamic'; supported are default, linear, yarn and llama3"),
        ({"rope_scaling": {"type": "linear"}}, FormatError, "key rope_scaling.factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, UnsupportedError, "must be above 0"),
        ({"rope_parameters": {"rope_type": "longrope"}}, UnsupportedError, "'longrope'"),
        ({"partial_rotary_factor": 0.5}, UnsupportedError, "partial_rotary_factor is 0.5"),
        ({"quantization_config": {"bits": 4}}, UnsupportedError, "the checkpoint is quantised"),
    ],
    ids=str,
)  # fmt: skip
def test_configurations(
    changes: dict[str, Any], kind: type[QInferError], said: str, folders: Folders
) -> None:
    changed_config(folders, **changes)
    message = refusal(kind, folders)
    assert message.startswith(str(folders[0] / "config.json")) and said in message


@pytest.mark.parametrize(
    ("config", "changes", "said"),
    [
        (FALCON, {"alibi": True}, "alibi is True; of falcon models those with false run"),
        (FALCON, {"parallel_attn": False}, "parallel_attn is False"),
        (FALCON, {"bias": True}, "bias is True"),
        (FALCON, {"new_decoder_architecture": True, "num_kv_heads": 3}, "num_kv_heads is 3"),
        (OPT, {"do_layer_norm_before": False}, "do_layer_norm_before is False"),
        (OPT, {"word_embed_proj_dim": 32}, "word_embed_proj_dim is 32; expected hidden_size, 64"),
        (OPT, {"_remove_final_layer_norm": True}, "_remove_final_layer_norm is True"),
        (OPT, {"activation_function": "gelu"}, "the activation is gelu"),
    ],
)
def test_other_families(config: Config, changes: Config, said: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", config, random_tensors(config))
    write_predictors(tmp_path / "predictor", config)
    folders = folder, tmp_path / "predictor"
    changed_config(folders, **changes)
    assert said in refusal(UnsupportedError, folders)


# ---- files ----


def test_folders_that_are_no_checkpoints(folders: Folders, tmp_path: Path) -> None:
    elsewhere = tmp_path / "nowhere"
    assert refusal(FileError, (elsewhere, folders[1])) == f"{elsewhere}: there is no such folder"
    elsewhere.mkdir()
    assert "config.json: cannot be read" in refusal(FileError, (elsewhere, folders[1]))
    (elsewhere / "params.json").write_text("{}")
    assert "is in Meta's layout" in refusal(UnsupportedError, (elsewhere, folders[1]))
    (elsewhere / "config.json").write_text(json.dumps(LLAMA))
    message = refusal(FileError, (elsewhere, folders[1]))
    assert message.endswith("holds no model.safetensors or pytorch_model.bin, whole or in numbered "
                            "parts")  # fmt: skip
    (elsewhere / "config.json").write_text('{"hidden_act":')
    assert "config.json: is not JSON" in refusal(FormatError, (elsewhere, folders[1]))
    (elsewhere / "config.json").write_bytes(b"\xff")
    assert "its bytes are not UTF-8" in refusal(FormatError, (elsewhere, folders[1]))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_parts(kind: str, tmp_path: Path) -> None:
    write_predictors(tmp_path / "predictor", LLAMA)
    tensors = random_tensors(LLAMA)
    folders = (
        write_checkpoint(tmp_path / "m", LLAMA, tensors, form=f"{kind}-sharded"),
        tmp_path / "predictor",
    )
    stem, suffix = ("model", ".safetensors") if kind == "safetensors" else ("pytorch_model", ".bin")
    index = folders[0] / f"{stem}{suffix}.index.json"
    second = folders[0] / f"{stem}-00002-of-00003{suffix}"
    content = second.read_bytes()
    second.unlink()
    assert f"{index}: names {second.name}, which " in refusal(FileError, folders)
    kept = index.read_text()
    index.unlink()
    assert refusal(FileError, folders) == f"{folders[0]}: lacks {second.name}"
    second.write_bytes(content)
    convert(*folders, tmp_path / "without_index.gguf")
    places = json.loads(kept)
    places["weight_map"]["model.norm.weight"] = f"{stem}-00001-of-00003{suffix}"
    if "model.norm.weight" in sorted(tensors)[0::3]:
        places["weight_map"]["model.norm.weight"] = second.name
    index.write_text(json.dumps(places))
    assert "tensor model.norm.weight is missing" in refusal(FormatError, folders)
    places["weight_map"]["model.norm.weight"] = "../elsewhere"
    index.write_text(json.dumps(places))
    assert "is not an object of file names" in refusal(FormatError, folders)
    index.write_text("[]")
    assert "holds a list" in refusal(FormatError, folders)


def test_a_tensor_that_is_there_twice(folders: Folders) -> None:
    tensors = random_tensors(LLAMA)
    (folders[0] / "model.safetensors").unlink()
    save_safetensors(folders[0] / "model-00001-of-00002.safetensors", tensors)
    again = {"model.norm.weight": tensors["model.norm.weight"]}
    save_safetensors(folders[0] / "model-00002-of-00002.safetensors", again)
    assert "tensor model.norm.weight is also in " in refusal(FormatError, folders)


@pytest.mark.parametrize("n_bytes", [0, 7, 100, -100])
def test_safetensors_cut_short(n_bytes: int, folders: Folders) -> None:
    path = folders[0] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:n_bytes])
    assert refusal(FormatError, folders).startswith(f"{path}: is not a whole file of safetensors")


def test_types_without_a_reader(folders: Folders) -> None:
    path = folders[0] / "model.safetensors"
    header = json.dumps({"x": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert "tensor x is of type F8_E4M3" in refusal(UnsupportedError, folders)


def test_the_checkpoint_is_not_written_over(folders: Folders) -> None:
    path = folders[0] / "model.safetensors"
    content = path.read_bytes()
    message = refusal(ArgumentError, folders, outfile=path)
    assert message == f"{path}: is a file of the checkpoint; write to another"
    assert path.read_bytes() == content


def test_an_existing_file_stays_when_a_conversion_fails(folders: Folders) -> None:
    out = folders[0] / "ggml-model-f16.gguf"
    out.write_bytes(b"older")
    changed_tensors(folders, {"model.norm.weight": np.full(N_EMBD, np.nan, "f2")})
    refusal(FormatError, folders)
    assert out.read_bytes() == b"older"


def test_threads_are_at_least_one(folders: Folders) -> None:
    assert refusal(ArgumentError, folders, threads=0) == "threads is 0, expected 1 or more"


def test_an_interrupted_conversion_leaves_nothing(folders: Folders) -> None:
    def progress(done: int, total: int) -> None:
        assert done <= total
        raise KeyboardInterrupt

    before = sorted(folders[0].iterdir())
    with pytest.raises(KeyboardInterrupt):
        convert(*folders, progress=progress)
    assert sorted(folders[0].iterdir()) == before


@pytest.mark.parametrize("tool", ["convert", "convert_dense"])
def test_a_full_disk(tool: str, folders: Folders, tmp_path: Path) -> None:
    """Files of this process may have 100 kB; the converted one has more."""
    out = tmp_path / "out"
    out.mkdir()
    arguments = [*map(str, folders[: 2 if tool == "convert" else 1]), "--outfile", f"{out}/x.gguf"]
    program = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000)); "
        f"sys.argv = ['x', *{arguments!r}]; "
        f"runpy.run_module('qinfer.tools.{tool}', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ") and "x.gguf" in done.stderr
    assert list(out.iterdir()) == []


def test_an_output_that_cannot_be(folders: Folders, tmp_path: Path) -> None:
    assert "no/such/x.gguf" in refusal(FileError, folders, outfile=tmp_path / "no/such/x.gguf")


def test_a_missing_vocabulary(folders: Folders) -> None:
    (folders[0] / "tokenizer.model").unlink()
    assert str(folders[0]) in refusal(FileError, folders)


@pytest.mark.parametrize("arch", CONFIGS)
def test_each_tensor_is_needed(arch: str, tmp_path: Path) -> None:
    """But for a head, which may be tied; one of falcon's two norms tells the layouts apart."""
    config = CONFIGS[arch]
    tensors = random_tensors(config)
    for name in tensors:
        if name == "lm_head.weight":
            continue
        rest = {key: data for key, data in tensors.items() if key != name}
        folder = write_checkpoint(tmp_path / "m", config, rest)
        with pytest.raises(FormatError) as failure:
            convert_dense(folder)
        missing = name.replace("ln_mlp.weight", "input_layernorm.weight")
        assert missing in str(failure.value)
