"""Messages in the words of the command line: `kv_ratio=0.5` of Python is `--kv-ratio 0.5` there."""

from __future__ import annotations

import re

# Where a dash for each underscore would not do.
_NAMES = {
    "n_ctx": "--ctx-size",
    "mmap": "--no-mmap",
    "gpu_split": "--gpu-index",
    "temperature": "--temp",
    "max_tokens": "--n-predict",
    "typical_p": "--typical",
    "penalty_window": "--repeat-last-n",
    "dynatemp_exponent": "--dynatemp-exp",
    "mirostat_tau": "--mirostat-ent",
    "mirostat_eta": "--mirostat-lr",
    "n_chunks": "--chunks",
    "n_generate": "--n-gen",
    "repeats": "--repetitions",
} | {
    name: f"--{name.replace('_', '-')}"
    for name in (
        "device", "vram_budget", "neuron_cache", "kv_type", "kv_mode", "kv_ratio", "kv_step",
        "deterministic", "threads", "hidden_act", "sparsity", "sparse_threshold", "prefill",
        "cross_layer_from", "seed", "top_k", "top_p", "min_p", "repeat_penalty",
        "presence_penalty", "frequency_penalty", "dynatemp_range", "mirostat", "logit_bias", "stop",
        "n_prompt",
    )
}  # fmt: skip
# Values that are options of their own.
_SPLITS = {
    "'counts'": "--reset-gpu-index",
    "'balance'": "--balance-gpu-index",
    "'none'": "--disable-gpu-index",
}
_QUOTED = r"'[^']*'|\"[^\"]*\""
_VALUE = rf"PosixPath\((?:{_QUOTED})\)|{_QUOTED}|[\w.+-]*[\w]|(?=[\[{{(])"
_ARGUMENT = re.compile(
    rf"(?<![\w/.-])({'|'.join(_NAMES)})=({_VALUE})?"
    # Without a value a name is a word of English, if it is one word.
    rf"|(?<![\w/.'-])({'|'.join(name for name in _NAMES if '_' in name)})(?![\w/.'-])"
)


def spoken(message: str) -> str:
    """A message of the package as the command line would word it."""
    return _ARGUMENT.sub(_option, message)


def _option(match: re.Match[str]) -> str:
    name, value = match[1] or match[3], match[2]
    option = _NAMES[name]
    if name == "gpu_split" and value in _SPLITS:
        return _SPLITS[value]
    if value is None or value in ("True", "False"):
        return option
    if value.startswith("PosixPath("):
        value = value[len("PosixPath(") : -1]
    return f"{option} {value.strip(chr(39) + chr(34))}"
