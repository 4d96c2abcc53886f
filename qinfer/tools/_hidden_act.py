"""Activations of feed-forward networks: what checkpoints call them, and what files do."""

from __future__ import annotations

import math

from ..errors import ArgumentError
from ._checkpoint import Config

# The names of checkpoints, and those of `qinfer.hidden_act`.
_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "relu_relu": "relu_relu",
}
# What each architecture is run with when a file does not say: an ordinary one, and PowerInfer's.
_DENSE = {
    "llama": "silu",
    "qwen2": "silu",
    "falcon": "gelu",
    "opt": "relu",
    "bamboo": "relu_relu",
}
_SPARSE = {"llama": "relu", "bamboo": "relu_relu", "falcon": "relu", "opt": "relu"}

_FATRELU = "fatrelu:"


def hidden_act(config: Config, architecture: str, override: str | None) -> str:
    """The activation as `qinfer.hidden_act` names it.

    `override` is such a name and goes before the configuration. Raises FormatError when the
    configuration lacks what it needs, UnsupportedError for an activation that the runtime does not
    have, ArgumentError for such an override.
    """
    if override is not None:
        return _checked(override)
    key, default = {
        "falcon": ("activation", "gelu"),
        "opt": ("activation_function", "relu"),
        "bamboo": ("hidden_act", "relu"),
    }.get(architecture, ("hidden_act", "silu"))
    if key not in config and "hidden_act" in config:
        key = "hidden_act"
    name = config.text(key, default=default)
    if name == "fatrelu":
        threshold = config.number("hidden_act_param")
        if threshold < 0:
            raise config.unsupported("hidden_act_param", "the threshold of fatrelu is 0 or more")
        return f"{_FATRELU}{threshold!r}"
    act = _NAMES.get(name)
    if act is None:
        raise config.unsupported(key, f"known are fatrelu, {', '.join(_NAMES)}")
    if architecture == "bamboo":
        # Bamboo applies it to gate and up alike.
        if act not in ("relu", "relu_relu"):
            raise config.unsupported(key, "Bamboo's activation is relu")
        return "relu_relu"
    return act


def _checked(act: str) -> str:
    if act in _NAMES.values():
        return act
    try:
        threshold = float(act.removeprefix(_FATRELU))
    except ValueError:
        threshold = math.nan
    if act.startswith(_FATRELU) and 0 <= threshold < math.inf:
        return f"{_FATRELU}{threshold!r}"
    names = ", ".join(dict.fromkeys(_NAMES.values()))
    raise ArgumentError(
        f"hidden_act {act!r} is not one of {names}, fatrelu:<threshold of 0 or more>"
    )


def is_sparse(act: str) -> bool:
    """Whether an activation is exactly zero for many inputs."""
    return act in ("relu", "relu_relu") or act.startswith(_FATRELU)


def default_act(architecture: str, *, sparse: bool) -> str:
    """The activation an architecture has in files that do not say."""
    return (_SPARSE if sparse else _DENSE)[architecture]
