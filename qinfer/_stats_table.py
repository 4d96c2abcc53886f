"""The table of `qinfer run --stats`: what each layer's feed-forward network computed."""

from __future__ import annotations

from ._weights import ModelInfo
from .completion import Completion
from .sparsity import LayerStats, Mode


def render(completion: Completion, info: ModelInfo, mode: Mode) -> str:
    """Means per token as text, a line a layer; shares are of all neurons.

    "KV CPU" is the share of the positions that the processor attended to last.
    """
    stats = completion.stats
    kv_shares = completion.kv_host_shares or []
    if not any(kv_shares):
        kv_shares = []
    n_tokens = stats.n_generated_tokens
    is_shared = any(layer.host_seconds > 0 for layer in stats.layers)
    lines = [
        f"sparsity {mode}, {n_tokens} tokens generated, "
        f"{stats.weight_bytes_read / max(n_tokens, 1) / 1e6:.1f} MB of weights read for each",
        f"{'layer':>5}{'active':>16}{'predicted':>16}{'missed':>9}{'ms FFN':>9}{'predict':>9}"
        + (f"{'GPU':>9}{'CPU':>9}{'wait':>9}" if is_shared else "")
        + (f"{'KV CPU':>9}" if kv_shares else ""),
    ]
    if completion.placement is not None:
        lines.insert(1, f"GPU {completion.placement}")
    n_computed = n_tokens + stats.n_prompt_tokens
    for index, layer in enumerate(stats.layers):
        of_layer = f"{kv_shares[index]:>9.1%}" if kv_shares else ""
        lines.append(f"{index:>5}{_line(layer, info.n_ff, n_computed, is_shared)}{of_layer}")
    total = LayerStats()
    for layer in stats.layers:
        total = total + layer
    if stats.layers:
        means = _line(total, info.n_ff, n_computed * len(stats.layers), is_shared)
        mean_share = f"{sum(kv_shares) / len(kv_shares):>9.1%}" if kv_shares else ""
        lines.append(f"{'mean':>5}{means}{mean_share}")
    return "\n".join(lines)


def _line(layer: LayerStats, n_ff: int, n_computed: int, is_shared: bool) -> str:
    active = _share(layer.n_active, layer.n_tokens, n_ff)
    predicted = _share(layer.n_predicted, layer.n_tokens, n_ff) if layer.n_predicted else "-"
    missed = f"{layer.n_missed / layer.n_due:.1%}" if layer.n_due else "-"
    times = [layer.seconds, layer.predict_seconds]
    if is_shared:
        times += [layer.device_seconds, layer.host_seconds, layer.wait_seconds]
    # Nobody times a layer that a GPU computes as a part of a recorded whole.
    milliseconds = "".join(
        f"{t / max(n_computed, 1) * 1e3:>9.3f}" if t > 0 else f"{'-':>9}" for t in times
    )
    return f"{active:>16}{predicted:>16}{missed:>9}{milliseconds}"


def _share(n: int, n_tokens: int, n_ff: int) -> str:
    """A mean count of neurons, and its share."""
    if n_tokens == 0:
        return "all"
    return f"{n / n_tokens:.0f} ({n / n_tokens / n_ff:.1%})"
