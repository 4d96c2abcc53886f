"""Which type each tensor gets when a model is quantised.

A target is one type for the matrices, and exceptions: the head gets more bits than the rest, the
mixes of K types (`_S`, `_M`, `_L`) give more to the matrices whose errors hurt most, and predictors
stay in blocks of 32. The names and mixes are llama.cpp's (as of 2026).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from .._gguf import GGUF
from .._types import known_types, tensor_type
from ..errors import ArgumentError

# Keeps every tensor as it is.
COPY = "COPY"

# What is neither a matrix nor known: norms, biases and tensors of other architectures.
_LAYER_MATRICES = (
    "attn_q|attn_k|attn_v|attn_qkv|attn_output|ffn_gate|ffn_up|ffn_down|ffn_down_t|fc1|fc2"
)
_MATRIX = re.compile(
    rf"(?:(?P<model>token_embd|position_embd|output)|blk\.(?P<layer>\d+)\.(?P<role>{_LAYER_MATRICES}))"
    r"\.weight"
)

# Instead of a K type, where a row is not whole blocks of 256: about as many bits in blocks of 32.
_IN_BLOCKS_OF_32 = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Target:
    """What TYPE stands for.

    Attributes:
        name: as it is typed.
        type: of the matrices without an exception; None keeps every tensor's.
        file_type: the number under `general.file_type`.
        summary: its exceptions, in words.
    """

    name: str
    type: str | None
    file_type: int | None
    summary: str = ""


TARGETS = {
    target.name: target
    for target in (
        Target("F32", "F32", 0, "no loss"),
        Target("F16", "F16", 1),
        Target("BF16", "BF16", 32),
        Target("Q8_0", "Q8_0", 7),
        Target("Q4_0", "Q4_0", 2, "head Q6_K"),
        Target("Q4_1", "Q4_1", 3, "head Q6_K"),
        Target("Q5_0", "Q5_0", 8, "head Q6_K"),
        Target("Q5_1", "Q5_1", 9, "head Q6_K"),
        Target("Q2_K", "Q2_K", 10, "v Q3_K or Q4_K; attn_output, down Q3_K"),
        Target("Q2_K_S", "Q2_K", 21, "v Q4_K if shared by 4 heads; down Q4_K in the first layers"),
        Target("Q3_K_S", "Q3_K", 11, "head Q6_K"),
        Target("Q3_K_M", "Q3_K", 12, "v, down Q4_K or Q5_K; attn_output Q4_K"),
        Target("Q3_K_L", "Q3_K", 13, "v, down, attn_output Q5_K"),
        Target("Q4_K_S", "Q4_K", 14, "v, down Q5_K in the first layers"),
        Target("Q4_K_M", "Q4_K", 15, "v, down Q6_K in half of the layers"),
        Target("Q5_K_S", "Q5_K", 16, "head Q6_K"),
        Target("Q5_K_M", "Q5_K", 17, "v, down Q6_K in half of the layers"),
        Target("Q6_K", "Q6_K", 18),
        Target(COPY, None, None, "every tensor as it is; parts become one file"),
    )
}
_SYNONYMS = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}


def find_target(text: str) -> Target | None:
    """The target of a name in any case, or of llama.cpp's number for it; None if there is none."""
    name = text.upper()
    if text.isdecimal():
        return next((t for t in TARGETS.values() if str(t.file_type) == text), None)
    return TARGETS.get(_SYNONYMS.get(name, name))


def computed_type(text: str, option: str) -> str:
    """The name of a type that tensors can be stored in; raises ArgumentError for others."""
    names = [kind.name for kind in known_types().values() if kind.can_encode]
    if text.upper() not in names:
        raise ArgumentError(f"{option}: {text!r} is not one of {', '.join(names)}")
    return text.upper()


@dataclass(frozen=True, slots=True)
class Facts:
    """What the rules look at besides a tensor: `n_sharing` query heads share a key and value."""

    architecture: str
    n_layer: int
    n_sharing: int
    tied_head: bool


def read_facts(file: GGUF) -> Facts:
    """The facts of a model; what its metadata leaves open counts as 1."""
    architecture = str(file.metadata.get("general.architecture", ""))

    def number(name: str, default: int) -> int:
        value = file.metadata.get(f"{architecture}.{name}")
        return value if isinstance(value, int) and value > 0 else default

    n_head = number("attention.head_count", 1)
    return Facts(
        architecture=architecture,
        n_layer=number("block_count", 1),
        n_sharing=n_head // number("attention.head_count_kv", n_head),
        tied_head=all(tensor.name != "output.weight" for tensor in file.tensors),
    )


def role_of(name: str) -> tuple[str, int] | None:
    """The role of a matrix that the runtime knows, and its layer or 0; None for other tensors."""
    match = _MATRIX.fullmatch(name)
    if match is None:
        return None
    return match["model"] or match["role"], int(match["layer"] or 0)


def is_head(role: str, facts: Facts) -> bool:
    """Whether a matrix makes the logits."""
    return role == "output" or (facts.tied_head and role == "token_embd")


def wanted_type(
    target: Target, role: str, layer: int, n_cols: int, facts: Facts, *, pure: bool
) -> str | None:
    """The type of a matrix by the rules, which `n_cols` may not fit; None keeps it as it is."""
    base = target.type
    if base is None or base in FLOATS:
        return base
    if role == "position_embd":
        # Added to every token's values as they are, and too small to save anything.
        return None
    if pure:
        return base
    if is_head(role, facts):
        # Errors of logits are not averaged away by anything after them.
        if base == "Q8_0" or facts.architecture == "falcon":
            return "Q8_0"
        return fitting_type("Q6_K", n_cols, "F16")
    if role in ("fc1", "fc2"):
        return _predictor_type(base)
    role = _SAME_RULE.get(role, role)
    rules = _MIXES.get(target.name, {})
    if facts.architecture == "falcon":
        rules = rules | _FALCON_MIXES.get(target.name, {})
    return (role in rules and rules[role](layer, facts)) or base


def fitting_type(wanted: str, n_cols: int, current: str) -> str:
    """`wanted`, or the nearest type whose blocks a row of `n_cols` is made of.

    Where not even blocks of 32 do: F16, or BF16 if that is the `current` one.
    """
    if n_cols % tensor_type(wanted).block_size == 0:
        return wanted
    smaller = _IN_BLOCKS_OF_32.get(wanted, wanted)
    if n_cols % tensor_type(smaller).block_size == 0:
        return smaller
    return "BF16" if current == "BF16" else "F16"


def _predictor_type(base: str) -> str:
    """A wrong score loses a neuron, and ranks are multiples of 32 rather than of 256.

    Q4_0 stays, so that PowerInfer runs its own type's files.
    """
    if not base.endswith("_K"):
        return base
    return "Q8_0" if base == "Q6_K" else "Q5_0"


def _more_bits(layer: int, facts: Facts) -> bool:
    """The first and the last eighth of the layers, and every third between."""
    eighth = facts.n_layer // 8
    return layer < eighth or layer >= 7 * facts.n_layer // 8 or (layer - eighth) % 3 == 2


Rule = Callable[[int, Facts], str | None]


def _always(type: str | None) -> Rule:
    return lambda layer, facts: type


def _first_eighth(type: str) -> Rule:
    return lambda layer, facts: type if layer < facts.n_layer // 8 else None


def _half(type: str) -> Rule:
    return lambda layer, facts: type if _more_bits(layer, facts) else None


def _first_and_half(first: str, half: str) -> Rule:
    return lambda layer, facts: (
        first if layer < facts.n_layer // 16 else half if _more_bits(layer, facts) else None
    )


# By target and role; None is the target's own type.
_MIXES: dict[str, dict[str, Rule]] = {
    "Q2_K": {
        "attn_v": lambda layer, facts: "Q4_K" if facts.n_sharing >= 4 else "Q3_K",
        "attn_output": _always("Q3_K"),
        "ffn_down": _always("Q3_K"),
    },
    "Q2_K_S": {
        "attn_v": lambda layer, facts: "Q4_K" if facts.n_sharing >= 4 else None,
        "ffn_down": _first_eighth("Q4_K"),
    },
    "Q3_K_M": {
        "attn_v": lambda layer, facts: "Q5_K" if layer < 2 else "Q4_K",
        "attn_output": _always("Q4_K"),
        "ffn_down": lambda layer, facts: "Q5_K" if layer < facts.n_layer // 16 else "Q4_K",
    },
    "Q3_K_L": {
        "attn_v": _always("Q5_K"),
        "attn_output": _always("Q5_K"),
        "ffn_down": _always("Q5_K"),
    },
    "Q4_K_S": {
        "attn_v": lambda layer, facts: "Q5_K" if layer < 4 else None,
        "ffn_down": _first_eighth("Q5_K"),
    },
    "Q4_K_M": {
        "attn_v": _half("Q6_K"),
        "ffn_down": _half("Q6_K"),
    },
    "Q5_K_M": {
        "attn_v": _half("Q6_K"),
        "ffn_down": _half("Q6_K"),
    },
}
# What differs for Falcon, whose residual is parallel and whose MLP has no gate.
_FALCON_MIXES: dict[str, dict[str, Rule]] = {
    "Q2_K": {"attn_output": _always(None)},
    "Q3_K_M": {"attn_output": _always(None), "ffn_down": _first_and_half("Q5_K", "Q4_K")},
    "Q3_K_L": {"attn_output": _always("Q4_K"), "ffn_down": _always("Q4_K")},
    "Q4_K_S": {"ffn_down": _always(None)},
    "Q4_K_M": {"ffn_down": _first_and_half("Q6_K", "Q5_K")},
}
# A fused projection has the values in it.
_SAME_RULE = {"attn_qkv": "attn_v", "ffn_down_t": "ffn_down"}
