"""Tokens to logits for llama, qwen2, falcon, opt and bamboo."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from . import rope
from .checkpoint import Array, Checkpoint
from .numerics import Numerics

DEFAULT_ACT = {
    "llama": "silu",
    "qwen2": "silu",
    "falcon": "gelu",
    "opt": "relu",
    "bamboo": "relu_relu",
}
NEOX = {"qwen2", "falcon"}


def forward(
    model: Checkpoint,
    tokens: Sequence[int],
    numerics: Numerics | None = None,
    *,
    threshold: float | None = None,
    cross_layer_from: int | None = None,
) -> Array:
    """Logits [n_tokens, n_vocab] of a text that starts at position 0.

    With a threshold, neurons whose prediction is below it are left out. Layers from
    `cross_layer_from` on predict from what the predictor of the layer before looks at.
    """
    one = Pass(model, numerics or Numerics(), threshold, cross_layer_from)
    return one.run(np.asarray(tokens))


def activation(name: str) -> Callable[[Array], Array]:
    """The function called `name` in `qinfer.hidden_act`; relu_relu is relu on both branches."""
    if name.startswith("fatrelu:"):
        threshold = float(name.removeprefix("fatrelu:"))
        return lambda x: np.where(x > threshold, x, 0.0)
    erf = np.vectorize(math.erf)
    return {
        "silu": lambda x: x / (1.0 + np.exp(-x)),
        "relu": lambda x: np.maximum(x, 0.0),
        "relu_relu": lambda x: np.maximum(x, 0.0),
        "gelu": lambda x: 0.5 * x * (1.0 + erf(x / math.sqrt(2.0))),
        "gelu_tanh": lambda x: (
            0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
        ),
    }[name]


def softmax(scores: Array) -> Array:
    """Along the last axis."""
    powers: Array = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


class Pass:
    """One forward pass over a whole text."""

    def __init__(
        self,
        model: Checkpoint,
        numerics: Numerics,
        threshold: float | None = None,
        cross_layer_from: int | None = None,
    ) -> None:
        self.model = model
        self.threshold = threshold
        self.cross_layer_from = cross_layer_from
        self.looked_at: Array | None = None  # by the predictor of the layer before
        self.numerics = numerics
        self.tensors = model.tensors
        self.arch = model.architecture
        self.n_head: int = model["attention.head_count"]
        self.n_head_kv: int = model.get("attention.head_count_kv", self.n_head)
        self.head_dim: int = model.get(
            "attention.key_length", model["embedding_length"] // self.n_head
        )
        act = model.metadata.get("qinfer.hidden_act", DEFAULT_ACT[self.arch])
        self.act = activation(act)
        self.act_both = act == "relu_relu"

    def run(self, tokens: np.ndarray) -> Array:
        """Logits [n_tokens, n_vocab]."""
        x = self.tensors["token_embd.weight"][tokens]
        if self.arch == "opt":
            x = x + self.tensors["position_embd.weight"][np.arange(len(tokens)) + 2]
        for layer in range(self.model["block_count"]):
            x = self.layer(f"blk.{layer}.", x)
        x = self.norm("output_norm", x)
        head = "output" if "output.weight" in self.tensors else "token_embd"
        return self.linear(head, x)

    def layer(self, prefix: str, x: Array) -> Array:
        if self.arch == "falcon":
            normed = self.norm(prefix + "attn_norm", x)
            has_two = prefix + "attn_norm_2.weight" in self.tensors
            into_attention = self.norm(prefix + "attn_norm_2", x) if has_two else normed
            ffn = self.feed_forward(prefix, normed, x)
            return x + self.attention(prefix, into_attention) + ffn
        x = x + self.attention(prefix, self.norm(prefix + "attn_norm", x))
        return x + self.feed_forward(prefix, self.norm(prefix + "ffn_norm", x), x)

    def norm(self, name: str, x: Array) -> Array:
        """RMS norm, or layer norm for the architectures that have a bias."""
        if self.arch in ("falcon", "opt"):
            x = x - x.mean(-1, keepdims=True)
            epsilon = self.model["attention.layer_norm_epsilon"]
        else:
            epsilon = self.model["attention.layer_norm_rms_epsilon"]
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon)
        return x * self.tensors[name + ".weight"] + self.tensors.get(name + ".bias", 0.0)

    def linear(self, name: str, x: Array) -> Array:
        x = self.numerics.activation(name + ".weight", x)
        return x @ self.tensors[name + ".weight"].T + self.tensors.get(name + ".bias", 0.0)

    def attention(self, prefix: str, x: Array) -> Array:
        n_tokens = len(x)
        q, k, v = (
            part.reshape(n_tokens, -1, self.head_dim) for part in self.project_qkv(prefix, x)
        )
        if self.arch != "opt":
            q, k = self.rotate(q), self.rotate(k)
        k, v = self.numerics.store(k), self.numerics.store(v)
        mask = self.visible(n_tokens)
        heads = []
        for head in range(self.n_head):
            head_kv = head * self.n_head_kv // self.n_head
            scores = q[:, head] @ k[:, head_kv].T / math.sqrt(self.head_dim)
            heads.append(softmax(np.where(mask, scores, -np.inf)) @ v[:, head_kv])
        return self.linear(prefix + "attn_output", np.concatenate(heads, axis=-1))

    def project_qkv(self, prefix: str, x: Array) -> list[Array]:
        if self.arch == "falcon":
            qkv = self.linear(prefix + "attn_qkv", x)
            width = self.n_head * self.head_dim
            return np.split(qkv, [width, width + self.n_head_kv * self.head_dim], axis=-1)
        return [self.linear(prefix + name, x) for name in ("attn_q", "attn_k", "attn_v")]

    def rotate(self, heads: Array) -> Array:
        n_rot = self.model.get("rope.dimension_count", self.head_dim)
        positions = np.arange(len(heads), dtype=np.float64)
        angle, magnitude = rope.angles(self.model, n_rot, positions)
        return rope.rotate(heads, angle, magnitude, self.arch in NEOX)

    def visible(self, n_tokens: int) -> np.ndarray:
        """[query, key]: a token sees itself and those before it, `sliding_window` in all."""
        distance = np.arange(n_tokens)[:, None] - np.arange(n_tokens)[None, :]
        window = self.model.get("attention.sliding_window", 0) or n_tokens
        return (distance >= 0) & (distance < window)

    def feed_forward(self, prefix: str, x: Array, residual: Array) -> Array:
        hidden = self.linear(prefix + "ffn_up", x)
        if prefix + "ffn_gate.weight" in self.tensors:
            gate = self.act(self.linear(prefix + "ffn_gate", x))
            hidden = gate * (self.act(hidden) if self.act_both else hidden)
        else:
            hidden = self.act(hidden)
        if self.threshold is not None:
            early = self.cross_layer_from is not None and (
                int(prefix.split(".")[1]) >= self.cross_layer_from
            )
            seen = self.looked_at if early else residual
            self.looked_at = residual
            assert seen is not None
            low = np.maximum(self.linear(prefix + "fc1", seen), 0.0)
            hidden = np.where(self.linear(prefix + "fc2", low) < self.threshold, 0.0, hidden)
        by_neuron = self.tensors.get(prefix + "ffn_down_t.weight")
        if by_neuron is None:
            return self.linear(prefix + "ffn_down", hidden)
        return hidden @ by_neuron + self.tensors.get(prefix + "ffn_down_t.bias", 0.0)
