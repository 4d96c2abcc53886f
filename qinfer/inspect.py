"""What is in a GGUF file: facts, metadata, tensors; or in a GPU split: where neurons are."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from ._files import StrPath
from ._gguf import GGUF
from .gpu_index import GpuIndex, is_gpu_index

# Of a list or text, as much as is shown.
_MOST_ITEMS = 8
_MOST_CHARACTERS = 120


def describe(path: StrPath) -> dict[str, Any]:
    """A file's facts, metadata and tensors as plain values, for JSON.

    Tensor data need not be there. Of a GPU split, `gpu_split` says how many neurons of each layer
    it places. Raises what `GGUF` and `GpuIndex.read` raise.
    """
    if is_gpu_index(path):
        return _describe_split(GpuIndex.read(path))
    with GGUF(path, tensors=False) as file:
        return {
            "path": file.path,
            "file": asdict(file.info),
            "metadata": dict(file.metadata),
            "tensors": [
                {
                    "name": tensor.name,
                    "shape": list(tensor.shape),
                    "type": tensor.type,
                    "n_bytes": tensor.n_bytes,
                }
                for tensor in file.tensors
            ],
        }


def render(path: StrPath) -> str:
    """The same as text, long values cut short."""
    if is_gpu_index(path):
        return _render_split(GpuIndex.read(path))
    with GGUF(path, tensors=False) as file:
        info = file.info
        kind = "PowerInfer" if info.is_powerinfer else "GGUF"
        parts = f" in {info.n_files} files" if info.n_files > 1 else ""
        lines = [
            f"{file.path}: {kind} version {info.version}, {info.n_bytes:,} bytes{parts}, "
            f"alignment {info.alignment}",
            "",
            f"{info.n_kv} keys",
        ]
        width = max(map(len, file.keys), default=0)
        for key in file.keys:
            kind = file.value_type(key)
            lines.append(f"  {key:<{width}}  {kind:<15}  {_short(file.metadata[key])}")
        lines += ["", f"{info.n_tensors} tensors"]
        tensors = file.tensors
        width = max((len(tensor.name) for tensor in tensors), default=0)
        for tensor in tensors:
            shape = " x ".join(map(str, tensor.shape))
            size = f"{tensor.n_bytes:>14,}"
            lines.append(f"  {tensor.name:<{width}}  {tensor.type:<8}{size}  {shape}")
        sizes: Counter[str] = Counter()
        counts = Counter(tensor.type for tensor in tensors)
        for tensor in tensors:
            sizes[tensor.type] += tensor.n_bytes
        lines += ["", "by type"]
        for name, total in sizes.most_common():
            lines.append(f"  {name:<8}{counts[name]:>5} tensors{total:>17,} bytes")
        return "\n".join(lines)


def _describe_split(index: GpuIndex) -> dict[str, Any]:
    return {
        "path": index.path,
        "gpu_split": {
            "n_layers": index.n_layers,
            "n_ff": index.n_ff,
            "vram_capacity": index.vram_capacity,
            "model_fingerprint": index.fingerprint.hex() or None,
            "n_gate_up": [len(ids) for ids in index.gate_up],
            "n_down": None if index.down is None else [len(ids) for ids in index.down],
            "n_whole": [len(index.neurons(layer)) for layer in range(index.n_layers)],
        },
    }


def _render_split(index: GpuIndex) -> str:
    form = "PowerInfer's" if index.down is None else "Q-Infer's"
    total = sum(len(index.neurons(layer)) for layer in range(index.n_layers))
    lines = [
        f"{index.path}: GPU split in {form} form, {index.n_layers} layers of {index.n_ff:,} "
        f"neurons, made for {index.vram_capacity:,} bytes of GPU memory",
        "it says for which model file" if index.fingerprint else "it does not say for which model",
        "",
    ]
    for layer in range(index.n_layers):
        parts = ""
        if index.down is not None:
            n_up, n_down = len(index.gate_up[layer]), len(index.down[layer])
            parts = f" ({n_up:,} gate and up, {n_down:,} down)"
        lines.append(f"  layer {layer:3}  {len(index.neurons(layer)):>8,} on the GPU{parts}")
    lines += ["", f"{total:,} of {index.n_layers * index.n_ff:,} neurons on the GPU"]
    return "\n".join(lines)


def _short(value: object) -> str:
    """A value on one line."""
    if isinstance(value, list):
        shown = ", ".join(_short(item) for item in value[:_MOST_ITEMS])
        more = f", … {len(value):,} items" if len(value) > _MOST_ITEMS else ""
        return f"[{shown}{more}]"
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS] + "…"
