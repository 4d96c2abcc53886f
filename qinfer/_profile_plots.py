"""The plots of a profile: power-law curves, and a heat map of neurons by layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ._files import whole_file
from .errors import FileError

if TYPE_CHECKING:
    from .profile import Profile

_DPI = 150
# More points or columns than this cannot be told apart in a plot.
_MAX_POINTS = 1200
# More layers than this get a colour bar instead of a line each in the legend.
_MAX_IN_LEGEND = 8
_TICKS = [0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0]


def draw(profile: Profile, folder: Path) -> list[Path]:
    """Writes both plots as PNG and returns their paths."""
    plots = {"power_law.png": curves(profile), "heat_map.png": heat_map(profile)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{folder}: cannot make the folder: {error.strerror}") from error
    for name, figure in plots.items():
        with whole_file(folder / name) as file:
            figure.savefig(file, format="png", dpi=_DPI)
    return [folder / name for name in plots]


def curves(profile: Profile) -> Any:
    """Per layer and on average, the share of activations by the share of most active neurons."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.figure import Figure

    from .profile import COVERED

    shares = profile.curves
    n_layers, n_points = shares.shape
    # Every point of small layers, and as many as can be seen of large ones.
    at = np.unique(np.linspace(0, n_points - 1, _MAX_POINTS).round().astype(int))
    x = at / (n_points - 1)
    mean = shares.mean(axis=0)
    colours = colormaps["viridis"](np.linspace(0.0, 0.92, n_layers))

    figure = Figure(figsize=(7.4, 5.6), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        "all equally active", (0.5, 0.5), xytext=(4, -4), textcoords="offset points", color="0.45",
        va="top", fontsize=9,
    )  # fmt: skip
    in_legend = n_layers <= _MAX_IN_LEGEND
    # A few lines lie on the mean's, so that they show where all run together; many would hide it.
    axes.plot(x, mean[at], color="black", linewidth=3, zorder=2 if in_legend else 3,
              label="mean of layers")  # fmt: skip
    for layer, colour in enumerate(colours):
        label = f"layer {layer}" if in_legend else None
        axes.plot(x, shares[layer, at], color=colour, linewidth=1.1, label=label)
    # Where the mean reaches the covered share.
    reached = int(np.argmax(mean >= COVERED - 1e-12)) / (n_points - 1)
    room_at_right = reached < 0.7
    if mean[-1] >= COVERED:
        axes.plot([0, reached, reached], [COVERED, COVERED, 0], color="black", linewidth=0.9,
                  linestyle=":")  # fmt: skip
        axes.plot([reached], [COVERED], "o", color="black", markersize=5)
        axes.annotate(
            f"{COVERED:.0%} of activations by\n{reached:.1%} of the neurons", (reached, COVERED),
            xytext=(10, -7) if room_at_right else (-10, 7), textcoords="offset points",
            va="top" if room_at_right else "bottom", ha="left" if room_at_right else "right",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 2},
        )  # fmt: skip
    if not in_legend:
        bounds = np.arange(n_layers + 1) - 0.5
        scale = ScalarMappable(BoundaryNorm(bounds, n_layers), ListedColormap(colours))
        ticks = np.unique(np.linspace(0, n_layers - 1, min(n_layers, 9)).round().astype(int))
        bar = figure.colorbar(scale, ax=axes, label="layer", ticks=ticks, pad=0.02)
        bar.minorticks_off()
    axes.legend(loc="lower right", frameon=False)
    axes.set_title(
        f"Activations covered by the most active neurons\n{_subject(profile)}", fontsize=11
    )
    axes.set_xlabel("most active neurons, share of a layer (%)")
    axes.set_ylabel("activations covered, share of the layer's (%)")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.01)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(_percent)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def heat_map(profile: Profile) -> Any:
    """Each layer's neurons, most active first, coloured by how often they are active."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    frequencies = profile.frequencies
    n_layers, n_ff = frequencies.shape
    if n_ff > _MAX_POINTS:
        at = np.linspace(0, n_ff, _MAX_POINTS + 1).round().astype(int)
        frequencies = np.add.reduceat(frequencies, at[:-1], axis=1) / np.diff(at)

    figure = Figure(figsize=(8.2, min(9.0, 2.4 + 0.22 * n_layers)), layout="constrained")
    axes = figure.add_subplot()
    # Most neurons are seldom active: the root spreads the low frequencies over more colours.
    image = axes.imshow(
        frequencies, aspect="auto", interpolation="nearest", cmap="inferno",
        norm=PowerNorm(0.5, 0.0, 1.0), extent=(0.0, 1.0, n_layers - 0.5, -0.5),
    )  # fmt: skip
    bar = figure.colorbar(image, ax=axes, ticks=_TICKS, pad=0.02, format=_percent)
    bar.set_label("tokens it is active for (%)")
    bar.minorticks_off()
    axes.set_title(f"How often each neuron is active\n{_subject(profile)}", fontsize=11)
    axes.set_xlabel("neurons of a layer, most active first (%)")
    axes.set_ylabel("layer")
    axes.xaxis.set_major_formatter(_percent)
    step = -(-n_layers // 16)
    axes.set_yticks(range(0, n_layers, step))
    return figure


def _percent(value: float, _: float) -> str:
    return f"{100 * value:g}"


def _subject(profile: Profile) -> str:
    # Some names are hashes or lists of everything that was done to a model.
    name = profile.model if len(profile.model) <= 60 else f"{profile.model[:57]}…"
    return f"{name}, {profile.n_tokens:,} tokens"
