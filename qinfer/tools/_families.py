"""The model families of checkpoints: their tensors and sizes under GGUF's names.

A family is a function that says, in the order of the output, which tensor comes from where.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .._file_tensor import FileTensor
from ..errors import ArgumentError, FormatError, UnsupportedError
from ._checkpoint import Checkpoint, Config
from ._predictor_folder import Predictors
from ._rope_config import read_rope
from ._tensor_stream import Planned

logger = logging.getLogger("qinfer")

# `general.architecture` by the model_type of configurations.
ARCHITECTURES = {
    "llama": "llama",
    "sparsellama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "bamboo": "bamboo",
    "falcon": "falcon",
    "RefinedWeb": "falcon",
    "RefinedWebModel": "falcon",
    "opt": "opt",
}
# Model types that have a sparse form.
SPARSE_MODEL_TYPES = tuple(name for name, arch in ARCHITECTURES.items() if arch != "qwen2")

# Buffers that old versions of transformers saved along with the weights.
_BUFFERS = re.compile(
    r"(.*\.)?(rotary_emb\.inv_freq|rotary\.inv_freq|rope\.freqs|masked_bias|_float_tensor|version)"
)
_MOST_NAMED = 4
_HEAD = "lm_head.weight"
# torch's; OPT's configuration does not have it.
_OPT_EPSILON = 1e-5
_OPT_POSITION_OFFSET = 2

Value = int | float | str


@dataclass(frozen=True, slots=True)
class Plan:
    """What a file will hold, apart from vocabulary and activation.

    Attributes:
        architecture: of `general.architecture`.
        n_vocab: rows of the embedding.
        keys: values by key, without the architecture's prefix.
        tensors: in the order of the file.
    """

    architecture: str
    n_vocab: int
    keys: dict[str, Value]
    tensors: list[Planned]


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Sizes of a decoder; the head is `head_dim` wide, in queries, keys and values alike."""

    n_vocab: int
    n_embd: int
    n_layer: int
    n_ff: int
    n_head: int
    n_kv: int
    head_dim: int
    n_ctx: int

    def keys(self) -> dict[str, Value]:
        keys: dict[str, Value] = {
            "vocab_size": self.n_vocab,
            "context_length": self.n_ctx,
            "embedding_length": self.n_embd,
            "block_count": self.n_layer,
            "feed_forward_length": self.n_ff,
            "attention.head_count": self.n_head,
            "attention.head_count_kv": self.n_kv,
        }
        if self.head_dim * self.n_head != self.n_embd:
            keys |= {
                "attention.key_length": self.head_dim,
                "attention.value_length": self.head_dim,
            }
        return keys


def architecture_of(config: Config, supported: tuple[str, ...] = tuple(ARCHITECTURES)) -> str:
    """The architecture of a configuration; UnsupportedError lists the model types there are."""
    model_type = config.text("model_type")
    if model_type not in supported:
        raise config.unsupported("model_type", f"supported are {', '.join(supported)}")
    if "quantization_config" in config:
        raise UnsupportedError(
            f"{config.path}: the checkpoint is quantised (quantization_config); convert the one it "
            "was made from"
        )
    return ARCHITECTURES[model_type]


def keys_of(config: Config, n_ctx: int | None = None) -> tuple[str, int, dict[str, Value]]:
    """Architecture, size of the vocabulary and keys, for files without tensors."""
    architecture = architecture_of(config)
    sizes = _SIZES[architecture](config, n_ctx)
    return architecture, sizes.n_vocab, sizes.keys()


def plan(
    checkpoint: Checkpoint,
    *,
    sparse: bool,
    predictors: Callable[[int, int, int], Predictors] | None = None,
    n_ctx: int | None = None,
    tied_head: bool = False,
) -> tuple[Plan, Predictors | None]:
    """What becomes of a checkpoint.

    Args:
        checkpoint: to be converted.
        sparse: in PowerInfer's form: down by neuron, and a head of its own where that is looked
            for.
        predictors: gives those of (n_layer, n_embd, n_ff), which then join their layers.
        n_ctx: positions the model was trained for, in place of the configuration's.
        tied_head: no copy of the embedding for readers that do not look at it instead of a head.

    Raises:
        FormatError: the configuration or a tensor is not what it should be; one is missing, or one
            too many.
        UnsupportedError: the model does what files cannot say.
        ArgumentError: `tied_head` is asked for, and the head is not the embedding.
    """
    config = checkpoint.config
    architecture = architecture_of(config)
    sizes = _SIZES[architecture](config, n_ctx)
    found = predictors(sizes.n_layer, sizes.n_embd, sizes.n_ff) if predictors else None
    take = _Take(checkpoint, sparse, sizes, found.layers if found else [], tied_head)
    keys = sizes.keys() | _FAMILIES[architecture](config, sizes, take)
    take.finish()
    return Plan(architecture, sizes.n_vocab, keys, take.planned), found


class _Take:
    """Takes tensors from a checkpoint one by one, and knows in the end which were left."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        sparse: bool,
        sizes: _Sizes,
        predictors: list[tuple[FileTensor, FileTensor]],
        tied_head: bool,
    ) -> None:
        self.sparse = sparse
        self.planned: list[Planned] = []
        self._checkpoint = checkpoint
        self._sizes = sizes
        self._predictors = predictors
        self._tied_head = tied_head
        self._left = {
            name: tensor
            for name, tensor in checkpoint.tensors.items()
            if not _BUFFERS.fullmatch(name)
        }
        self._missing: list[str] = []
        self._prefix = ""

    def has(self, name: str) -> bool:
        return self._prefix + name in self._left

    def find_prefix(self, *prefixes: str, of: str) -> None:
        """Chooses the prefix of all names: the first that a tensor called `of` has."""
        self._prefix = next((p for p in prefixes if p + of in self._left), prefixes[0])

    def tensor(
        self,
        name: str,
        target: str,
        shape: tuple[int, ...],
        *,
        rows: tuple[tuple[int, int], ...] | None = None,
        head_dim: int = 0,
        transposed: bool = False,
        is_full_name: bool = False,
    ) -> None:
        """Takes a tensor of a shape, which is that in the checkpoint."""
        full = name if is_full_name else self._prefix + name
        source = self._left.pop(full, None)
        if source is None:
            self._missing.append(full)
            return
        if source.shape != shape:
            raise FormatError(
                f"{source.path}: tensor {full} has shape {source.shape}, expected {shape} by "
                f"{self._checkpoint.config.path.name}"
            )
        shape = shape[::-1] if transposed else shape
        self.planned.append(Planned(target, shape, source, full, rows, head_dim, transposed))

    def linear(
        self,
        name: str,
        target: str,
        shape: tuple[int, int],
        *,
        bias: bool | None = None,
        head_dim: int = 0,
    ) -> None:
        """Takes a weight and its bias; None takes a bias where there is one."""
        self.tensor(f"{name}.weight", f"{target}.weight", shape, head_dim=head_dim)
        if bias or (bias is None and self.has(f"{name}.bias")):
            self.tensor(f"{name}.bias", f"{target}.bias", shape[:1], head_dim=head_dim)

    def norm(self, name: str, target: str, *, bias: bool = False) -> None:
        shape = (self._sizes.n_embd,)
        self.tensor(f"{name}.weight", f"{target}.weight", shape)
        if bias:
            self.tensor(f"{name}.bias", f"{target}.bias", shape)

    def down(self, name: str, layer: int, *, bias: bool | None = None) -> None:
        """The down projection, by neuron in sparse files, and there the layer's predictor."""
        sizes = self._sizes
        target = f"blk.{layer}.ffn_down" + ("_t" if self.sparse else "")
        shape = (sizes.n_embd, sizes.n_ff)
        self.tensor(f"{name}.weight", f"{target}.weight", shape, transposed=self.sparse)
        if bias or (bias is None and self.has(f"{name}.bias")):
            self.tensor(f"{name}.bias", f"{target}.bias", shape[:1])
        if self._predictors:
            for kind, source in zip(("fc1", "fc2"), self._predictors[layer], strict=True):
                target = f"blk.{layer}.{kind}.weight"
                self.planned.append(Planned(target, source.shape, source, f"{kind}.weight"))

    def constant(self, target: str, values: NDArray[np.float32]) -> None:
        """Adds a tensor that the checkpoint does not have."""
        self.planned.append(Planned(target, values.shape, values, target))

    def head(self, embedding: str, *, tied_by_default: bool, written: bool) -> None:
        """The output matrix, where it is not the embedding.

        Which of the two is what transformers would do: a head that lies beside a tied embedding is
        not looked at. `written` is for files whose readers do not look at the embedding instead:
        they get a copy of it.
        """
        config = self._checkpoint.config
        shape = (self._sizes.n_vocab, self._sizes.n_embd)
        is_tied = config.flag("tie_word_embeddings", tied_by_default)
        if not is_tied and ("tie_word_embeddings" in config or _HEAD in self._left):
            if self._tied_head:
                raise ArgumentError(
                    f"tied_head: {self._checkpoint.folder} has a head of its own, {_HEAD}, which "
                    "cannot be left out"
                )
            self.tensor(_HEAD, "output.weight", shape, is_full_name=True)
            return
        if not is_tied:
            logger.warning(
                "%s: there is no %s; the embedding serves as the head",
                self._checkpoint.folder, _HEAD,
            )  # fmt: skip
        self._left.pop(_HEAD, None)
        source = self._checkpoint.tensors.get(self._prefix + embedding)
        if written and not self._tied_head and source is not None:
            self.planned.append(Planned("output.weight", shape, source, self._prefix + embedding))

    def finish(self) -> None:
        """Raises FormatError when tensors are missing or left over."""
        folder = self._checkpoint.folder
        if self._missing:
            raise FormatError(f"{folder}: lacks {_counted(self._missing)}")
        if self._left:
            name = next(iter(self._left))
            raise FormatError(
                f"{self._left[name].path}: holds {_counted(list(self._left))}, which a model of "
                f"type {self._checkpoint.config.text('model_type')} does not have"
            )


def _counted(names: list[str]) -> str:
    if len(names) == 1:
        return f"tensor {names[0]}"
    more = ", …" if len(names) > _MOST_NAMED else ""
    return f"{len(names)} tensors, {', '.join(names[:_MOST_NAMED])}{more}"


# ---- llama, mistral, qwen2, bamboo ----


def _llama_sizes(config: Config, n_ctx: int | None) -> _Sizes:
    n_embd = config.integer("hidden_size")
    n_head = config.integer("num_attention_heads")
    n_kv = config.integer("num_key_value_heads", default=n_head)
    if n_head % n_kv:
        raise config.unsupported("num_key_value_heads", f"it must divide the {n_head} heads")
    return _Sizes(
        n_vocab=config.integer("vocab_size"),
        n_embd=n_embd,
        n_layer=config.integer("num_hidden_layers"),
        n_ff=config.integer("intermediate_size"),
        n_head=n_head,
        n_kv=n_kv,
        head_dim=_head_dim(config, n_embd, n_head),
        n_ctx=n_ctx or config.integer("max_sequence_length", "max_position_embeddings"),
    )


def _head_dim(config: Config, n_embd: int, n_head: int) -> int:
    if "head_dim" not in config and n_embd % n_head:
        raise config.unsupported("hidden_size", f"it must be a multiple of the {n_head} heads")
    head_dim = config.integer("head_dim", default=max(1, n_embd // n_head))
    if head_dim % 2:
        raise config.unsupported("head_dim", "heads have an even number of dimensions")
    return head_dim


def _llama(config: Config, sizes: _Sizes, take: _Take) -> dict[str, Value]:
    architecture = ARCHITECTURES[config.text("model_type")]
    # The runtimes turn pairs that lie side by side, but for qwen2.
    rotated = 0 if architecture == "qwen2" else sizes.head_dim
    q_rows, kv_rows = sizes.n_head * sizes.head_dim, sizes.n_kv * sizes.head_dim
    n_embd, n_ff = sizes.n_embd, sizes.n_ff
    rope = read_rope(config, n_rot=sizes.head_dim, n_ctx=sizes.n_ctx)

    take.find_prefix("model.", "", of="embed_tokens.weight")
    take.tensor("embed_tokens.weight", "token_embd.weight", (sizes.n_vocab, n_embd))
    if rope.divisors is not None:
        take.constant("rope_freqs.weight", rope.divisors)
    for i in range(sizes.n_layer):
        layer, block = f"layers.{i}", f"blk.{i}"
        take.norm(f"{layer}.input_layernorm", f"{block}.attn_norm")
        attention = f"{layer}.self_attn"
        take.linear(f"{attention}.q_proj", f"{block}.attn_q", (q_rows, n_embd), head_dim=rotated)
        take.linear(f"{attention}.k_proj", f"{block}.attn_k", (kv_rows, n_embd), head_dim=rotated)
        take.linear(f"{attention}.v_proj", f"{block}.attn_v", (kv_rows, n_embd))
        take.linear(f"{attention}.o_proj", f"{block}.attn_output", (n_embd, q_rows))
        take.norm(f"{layer}.post_attention_layernorm", f"{block}.ffn_norm")
        take.linear(f"{layer}.mlp.gate_proj", f"{block}.ffn_gate", (n_ff, n_embd))
        take.linear(f"{layer}.mlp.up_proj", f"{block}.ffn_up", (n_ff, n_embd))
        take.down(f"{layer}.mlp.down_proj", i)
    take.norm("norm", "output_norm")
    take.head("embed_tokens.weight", tied_by_default=False, written=take.sparse)

    keys: dict[str, Value] = {
        "attention.layer_norm_rms_epsilon": config.number("rms_norm_eps"),
    }
    window = _sliding_window(config, sizes)
    if window:
        keys["attention.sliding_window"] = window
    return keys | rope.keys


def _sliding_window(config: Config, sizes: _Sizes) -> int:
    """Positions a token attends to; 0 means all."""
    if not config.flag("use_sliding_window", config.text("model_type") != "qwen2"):
        return 0
    if "sliding_window" not in config:
        return 0
    window = config.integer("sliding_window")
    # Qwen2 lets its first layers see everything; a file has one window for all.
    n_full = config.integer("max_window_layers", default=0, least=0) if _is_qwen2(config) else 0
    if n_full >= sizes.n_layer:
        return 0
    if n_full and window < sizes.n_ctx:
        raise config.unsupported("max_window_layers", "all layers or none must have the window")
    return window


def _is_qwen2(config: Config) -> bool:
    return config.text("model_type") == "qwen2"


# ---- falcon ----


def _falcon_sizes(config: Config, n_ctx: int | None) -> _Sizes:
    n_embd = config.integer("hidden_size")
    n_head = config.integer("num_attention_heads", "n_head")
    if n_embd % n_head:
        raise config.unsupported("hidden_size", f"it must be a multiple of the {n_head} heads")
    # The first 40b checkpoints say so by their type alone.
    is_new = config.flag("new_decoder_architecture", config.text("model_type") == "RefinedWeb")
    if is_new:
        n_kv = config.integer("num_kv_heads", "n_head_kv", default=n_head)
    else:
        n_kv = 1 if config.flag("multi_query", True) else n_head
    if n_head % n_kv:
        raise config.unsupported("num_kv_heads", f"it must divide the {n_head} heads")
    return _Sizes(
        n_vocab=config.integer("vocab_size"),
        n_embd=n_embd,
        n_layer=config.integer("num_hidden_layers", "n_layer"),
        n_ff=config.integer("ffn_hidden_size", default=4 * n_embd),
        n_head=n_head,
        n_kv=n_kv,
        head_dim=n_embd // n_head,
        n_ctx=n_ctx or config.integer("max_position_embeddings", default=2048),
    )


def _falcon(config: Config, sizes: _Sizes, take: _Take) -> dict[str, Value]:
    for key, wanted in (("alibi", False), ("bias", False), ("parallel_attn", True)):
        if config.flag(key, wanted) is not wanted:
            raise config.unsupported(key, f"of falcon models those with {str(wanted).lower()} run")
    n_embd, head_dim = sizes.n_embd, sizes.head_dim
    rope = read_rope(config, n_rot=head_dim, n_ctx=sizes.n_ctx)
    if rope.divisors is not None:
        take.constant("rope_freqs.weight", rope.divisors)

    take.find_prefix("transformer.", "", of="word_embeddings.weight")
    take.tensor("word_embeddings.weight", "token_embd.weight", (sizes.n_vocab, n_embd))
    for i in range(sizes.n_layer):
        layer, block = f"h.{i}", f"blk.{i}"
        if take.has(f"{layer}.ln_mlp.weight"):
            take.norm(f"{layer}.ln_mlp", f"{block}.attn_norm", bias=True)
            take.norm(f"{layer}.ln_attn", f"{block}.attn_norm_2", bias=True)
        else:
            take.norm(f"{layer}.input_layernorm", f"{block}.attn_norm", bias=True)
        take.tensor(
            f"{layer}.self_attention.query_key_value.weight",
            f"{block}.attn_qkv.weight",
            ((sizes.n_head + 2 * sizes.n_kv) * head_dim, n_embd),
            rows=_ungrouped_rows(sizes),
        )
        output = f"{layer}.self_attention.dense"
        take.linear(output, f"{block}.attn_output", (n_embd, n_embd), bias=False)
        up = f"{layer}.mlp.dense_h_to_4h"
        take.linear(up, f"{block}.ffn_up", (sizes.n_ff, n_embd), bias=False)
        take.down(f"{layer}.mlp.dense_4h_to_h", i, bias=False)
    take.norm("ln_f", "output_norm", bias=True)
    take.head("word_embeddings.weight", tied_by_default=True, written=take.sparse)
    keys: dict[str, Value] = {
        "attention.layer_norm_epsilon": config.number("layer_norm_epsilon"),
        "tensor_data_layout": "jploski",
    }
    return keys | rope.keys


def _ungrouped_rows(sizes: _Sizes) -> tuple[tuple[int, int], ...]:
    """All q, all k, all v, from groups of (q heads, one k head, one v head)."""
    n_q = sizes.n_head // sizes.n_kv * sizes.head_dim
    group = n_q + 2 * sizes.head_dim
    starts = range(0, sizes.n_kv * group, group)
    parts = ((0, n_q), (n_q, n_q + sizes.head_dim), (n_q + sizes.head_dim, group))
    return tuple((start + begin, start + end) for begin, end in parts for start in starts)


# ---- opt ----


def _opt_sizes(config: Config, n_ctx: int | None) -> _Sizes:
    n_embd = config.integer("hidden_size")
    n_head = config.integer("num_attention_heads")
    if n_embd % n_head:
        raise config.unsupported("hidden_size", f"it must be a multiple of the {n_head} heads")
    return _Sizes(
        n_vocab=config.integer("vocab_size"),
        n_embd=n_embd,
        n_layer=config.integer("num_hidden_layers"),
        n_ff=config.integer("ffn_dim"),
        n_head=n_head,
        n_kv=n_head,
        head_dim=n_embd // n_head,
        n_ctx=n_ctx or config.integer("max_position_embeddings"),
    )


def _opt(config: Config, sizes: _Sizes, take: _Take) -> dict[str, Value]:
    n_embd, n_ff = sizes.n_embd, sizes.n_ff
    for key, wanted in (
        ("do_layer_norm_before", True),
        ("_remove_final_layer_norm", False),
        ("enable_bias", True),
        ("layer_norm_elementwise_affine", True),
    ):
        if config.flag(key, wanted) is not wanted:
            raise config.unsupported(key, f"of opt models those with {str(wanted).lower()} run")
    if config.integer("word_embed_proj_dim", default=n_embd) != n_embd:
        raise config.unsupported("word_embed_proj_dim", f"expected hidden_size, {n_embd}")
    n_positions = config.integer("max_position_embeddings") + _OPT_POSITION_OFFSET

    take.find_prefix("model.decoder.", "decoder.", "", of="embed_tokens.weight")
    take.tensor("embed_tokens.weight", "token_embd.weight", (sizes.n_vocab, n_embd))
    take.tensor("embed_positions.weight", "position_embd.weight", (n_positions, n_embd))
    for i in range(sizes.n_layer):
        layer, block = f"layers.{i}", f"blk.{i}"
        take.norm(f"{layer}.self_attn_layer_norm", f"{block}.attn_norm", bias=True)
        for source, target in (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"),
                               ("out_proj", "output")):  # fmt: skip
            name = f"{layer}.self_attn.{source}"
            take.linear(name, f"{block}.attn_{target}", (n_embd, n_embd), bias=True)
        take.norm(f"{layer}.final_layer_norm", f"{block}.ffn_norm", bias=True)
        take.linear(f"{layer}.fc1", f"{block}.ffn_up", (n_ff, n_embd), bias=True)
        take.down(f"{layer}.fc2", i, bias=True)
    take.norm("final_layer_norm", "output_norm", bias=True)
    # PowerInfer's OPT has no output.weight, tied or not.
    take.head("embed_tokens.weight", tied_by_default=True, written=False)
    return {"attention.layer_norm_epsilon": _OPT_EPSILON}


_SIZES: dict[str, Callable[[Config, int | None], _Sizes]] = {
    "llama": _llama_sizes,
    "qwen2": _llama_sizes,
    "bamboo": _llama_sizes,
    "falcon": _falcon_sizes,
    "opt": _opt_sizes,
}
_FAMILIES: dict[str, Callable[[Config, _Sizes, _Take], dict[str, Value]]] = {
    "llama": _llama,
    "qwen2": _llama,
    "bamboo": _llama,
    "falcon": _falcon,
    "opt": _opt,
}
