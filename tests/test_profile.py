"""Profiles: counts against the reference's own activations, files, plots, and the command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from oracle import Numerics, read_gguf
from oracle.checkpoint import Array, Checkpoint
from oracle.forward import Pass
from oracle.tiny import as_powerinfer, tiny_shape, write_tiny
from qinfer import ArgumentError, Model
from qinfer.activation import read_activations
from qinfer.errors import FileError, UnsupportedError
from qinfer.profile import Profile, profile, render, write
from qinfer.tools.export_gpu_split import export_gpu_split

TEXT = " ".join(["a story about the cat that", "ran up the hill", "and saw 7 dogs", "Zoë!"] * 6)


class Counting(Pass):
    """A reference pass that notes what goes into the down projections: `hidden`, by layer."""

    def __init__(self, model: Checkpoint) -> None:
        super().__init__(model, Numerics("f16"))
        self.counts: list[npt.NDArray[np.int64]] = []

    def feed_forward(self, prefix: str, x: Array, residual: Array) -> Array:
        names = (
            ("ffn_gate", "ffn_up") if prefix + "ffn_gate.weight" in self.tensors else ("ffn_up",)
        )
        first = self.act(self.linear(prefix + names[0], x))
        if len(names) == 2:
            up = self.linear(prefix + "ffn_up", x)
            first = first * (self.act(up) if self.act_both else up)
        self.counts.append(np.count_nonzero(first, axis=0))
        return super().feed_forward(prefix, x, residual)


def counted(path: Path, chunks: list[list[int]]) -> npt.NDArray[np.int64]:
    """For how many tokens each neuron is active, by the reference: (n_layer, n_ff)."""
    checkpoint = read_gguf(path)
    total: Any = 0
    for chunk in chunks:
        one = Counting(checkpoint)
        one.run(np.asarray(chunk))
        total = total + np.stack(one.counts)
    return np.asarray(total)


def tiny(folder: Path, arch: str, act: str, *, by_neuron: bool = True) -> Path:
    sizes = {"n_head_kv": 6} if arch == "opt" else {}
    return write_tiny(
        folder / f"{arch}.gguf",
        tiny_shape(arch, **sizes),
        by_neuron=by_neuron,
        rank=21 if by_neuron else 0,
        extra={"qinfer.hidden_act": act},
    )


@pytest.mark.parametrize(
    ("arch", "act", "by_neuron"),
    [
        ("llama", "relu", True),
        ("llama", "relu", False),
        ("llama", "fatrelu:0.3", True),
        ("bamboo", "relu_relu", True),
        ("falcon", "relu", True),
        ("opt", "relu", True),
        ("opt", "relu", False),
    ],
)
def test_counts_are_the_references(arch: str, act: str, by_neuron: bool, tmp_path: Path) -> None:
    path = tiny(tmp_path, arch, act, by_neuron=by_neuron)
    with Model(path, sparsity="off") as model:
        result = profile(model, TEXT, n_ctx=23)
        tokens = model.tokenizer.encode(TEXT)
        bos = model.tokenizer.bos_id if model.tokenizer.add_bos else None
    chunks = [tokens[i : i + 23] for i in range(0, len(tokens), 23)]
    if bos is not None:
        chunks = [[bos, *chunk[1:]] for chunk in chunks]
    assert len(chunks) > 3
    assert 0 < len(chunks[-1]) < 23  # the last part counts, too
    expected = counted(path, chunks)
    assert result.counts.shape == expected.shape == (3, 101)
    assert result.counts.dtype == np.uint64
    assert result.n_tokens == len(tokens) >= result.counts.max()
    # Of tens of thousands, a gate that is zero but for rounding may fall on its other side.
    assert np.abs(result.counts.astype(np.int64) - expected).sum() <= 3
    assert 0.1 < result.active.mean() < 0.6


def test_predictors_and_prompts_change_no_counts(tmp_path: Path) -> None:
    """A model that would predict, with random predictors, has the counts of all its neurons."""
    path = as_powerinfer(tiny(tmp_path, "llama", "relu"))
    counts = []
    for options in ({"sparsity": "off"}, {"sparsity": "predict"}, {"sparsity": "exact"}):
        with Model(path, threads=1 + len(counts), **options) as model:
            counts.append(profile(model, TEXT, n_ctx=50).counts)
    np.testing.assert_array_equal(counts[0], counts[1])
    np.testing.assert_array_equal(counts[0], counts[2])


def test_chunks_at_most(tmp_path: Path) -> None:
    with Model(tiny(tmp_path, "llama", "relu"), sparsity="off") as model:
        seen: list[tuple[int, int]] = []
        result = profile(model, TEXT, n_ctx=20, n_chunks=2, progress=lambda *now: seen.append(now))
        assert result.n_tokens == 40
        assert seen[-1] == (40, 40)
        assert seen == sorted(seen)
        short = profile(model, TEXT, n_ctx=20, n_chunks=1)
        assert short.n_tokens == 20
        assert short.counts.sum() < result.counts.sum()
        assert (short.counts <= result.counts).all()
        # The context of training is 256 here.
        long = profile(model, TEXT * 8)
        assert long.n_tokens == len(model.tokenizer.encode(TEXT * 8)) > 512
        in_chunks = profile(model, TEXT * 8, n_ctx=256)
        np.testing.assert_array_equal(long.counts, in_chunks.counts)


def test_what_has_no_profile_is_refused(tmp_path: Path, stories260k: Path) -> None:
    silu = pytest.raises(UnsupportedError, match=r"stories260K.*: its activation is silu")
    with Model(stories260k) as model, silu:
        profile(model, TEXT)
    with Model(tiny(tmp_path, "llama", "relu"), sparsity="off") as model:
        with pytest.raises(ArgumentError, match="the text is empty"):
            profile(model, "")
        with pytest.raises(ArgumentError, match="n_ctx=0"):
            profile(model, TEXT, n_ctx=0)
        with pytest.raises(ArgumentError, match="n_chunks=0"):
            profile(model, TEXT, n_chunks=0)


# ---- what is made of counts ----

# Layer 0: 8 of 16 activations by the first, 12 by two. Layer 1 is never active.
HAND = Profile("hand.gguf", np.array([[4, 0, 8, 4], [0, 0, 0, 0]], np.uint64), 10)


def test_shares_by_hand() -> None:
    assert HAND.active.tolist() == [0.4, 0.0]
    assert HAND.frequencies.tolist() == [[0.8, 0.4, 0.4, 0.0], [0.0] * 4]
    assert HAND.curves.tolist() == [pytest.approx([0, 0.5, 0.75, 1, 1]), [0.0] * 5]
    assert HAND.covering(0.5).tolist()[0] == 0.25
    assert HAND.covering(0.51).tolist()[0] == 0.5
    assert HAND.covering(0.8).tolist()[0] == 0.75
    assert HAND.covering(1.0).tolist()[0] == 0.75


def test_a_layer_never_active_takes_no_neurons() -> None:
    assert HAND.covering(0.8).tolist()[1] == 0.0


def test_the_table() -> None:
    lines = render(HAND).splitlines()
    assert lines[0] == "hand.gguf: 10 tokens, 4 neurons a layer"
    assert lines[2].split() == ["0", "40.0%", "75.0%", "of", "neurons", "25.0%"]
    assert lines[3].split() == ["1", "0.0%", "0.0%", "of", "neurons", "100.0%"]
    assert lines[4].split() == ["mean", "20.0%", "37.5%", "of", "neurons", "62.5%"]
    assert len({len(line) for line in lines[1:]}) == 1


def test_files_are_read_back(tmp_path: Path) -> None:
    counts = np.random.default_rng(0).integers(0, 90, (11, 16)).astype(np.uint64)
    result = Profile("x.gguf", counts, 90)
    assert write(result, tmp_path / "new" / "x", plot=False) == [tmp_path / "new/x/activation"]
    folder = tmp_path / "new" / "x" / "activation"
    assert np.array_equal(read_activations(folder, n_layers=11, n_ff=16), counts)
    assert len(list(folder.iterdir())) == 11
    split = export_gpu_split(folder, tmp_path / "split", neurons=20, batch=1)
    assert split.total_coverage == np.sort(counts.ravel())[-20:].sum() / counts.sum()


# ---- plots ----


@pytest.fixture
def matplotlib() -> Any:
    return pytest.importorskip("matplotlib", reason="plots need matplotlib")


def power_law(n_layers: int, n_ff: int) -> Profile:
    rank = np.arange(1, n_ff + 1) / n_ff
    rng = np.random.default_rng(0)
    counts = [rng.permutation(1000 * np.minimum(1, 0.03 / rank)) for _ in range(n_layers)]
    return Profile(f"{'a-long-name-' * 9}.gguf", np.array(counts).astype(np.uint64), 1000)


@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (9, 101), (48, 3000)])
def test_plots_of_any_size(shape: tuple[int, int], matplotlib: Any, tmp_path: Path) -> None:
    from matplotlib.image import imread

    written = write(power_law(*shape), tmp_path)
    assert [path.name for path in written] == ["activation", "power_law.png", "heat_map.png"]
    assert len(list(tmp_path.iterdir())) == 3
    for path in written[1:]:
        assert path.read_bytes().startswith(b"\x89PNG\r\n")
        pixels = imread(path)
        height, width = pixels.shape[:2]
        assert 300 < height < 1500
        assert 900 < width < 1500
        # Something is drawn, and nothing runs over the edges.
        assert len(np.unique(pixels[..., 0])) > 20
        edges = (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])
        assert all((edge[..., :3] == 1.0).all() for edge in edges)


def test_the_curves_are_the_profiles(matplotlib: Any) -> None:
    from qinfer._profile_plots import curves

    result = power_law(3, 40)
    axes = curves(result).axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    for layer in range(3):
        np.testing.assert_allclose(lines[f"layer {layer}"].get_ydata(), result.curves[layer])
        np.testing.assert_allclose(lines[f"layer {layer}"].get_xdata(), np.arange(41) / 40)
    np.testing.assert_allclose(lines["mean of layers"].get_ydata(), result.curves.mean(axis=0))
    assert "%" in axes.get_xlabel()
    assert "%" in axes.get_ylabel()
    assert "1,000 tokens" in axes.get_title()
    assert "a-long-name" in axes.get_title()
    shown = [text.get_text() for text in axes.texts]
    assert any(f"by\n{result.covering()[0]:.1%} of the neurons" in text for text in shown)


def test_many_layers_have_a_colour_bar_and_no_legend_each(matplotlib: Any) -> None:
    from qinfer._profile_plots import curves

    figure = curves(power_law(30, 40))
    axes, bar = figure.axes
    assert bar.get_ylabel() == "layer"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["mean of layers"]


def test_the_heat_map_is_the_profile(matplotlib: Any) -> None:
    from qinfer._profile_plots import heat_map

    result = power_law(4, 40)
    axes, _ = heat_map(result).axes
    np.testing.assert_allclose(axes.images[0].get_array(), result.frequencies)
    # Columns of large layers are means of neurons beside each other.
    wide = power_law(2, 5000)
    image = heat_map(wide).axes[0].images[0].get_array()
    assert image.shape == (2, 1200)
    assert (np.diff(image, axis=1) <= 1e-12).all()
    np.testing.assert_allclose(image.mean(axis=1), wide.active, rtol=0.01)


def test_plots_leave_pyplot_alone(matplotlib: Any, tmp_path: Path) -> None:
    """No window system is asked for, and figures are freed."""
    code = (
        "import sys, pathlib, numpy as np; from qinfer.profile import Profile, write;"
        "assert 'matplotlib' not in sys.modules;"
        f"write(Profile('x', np.ones((2, 3), np.uint64), 1), {str(tmp_path)!r});"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ArgumentError, match=r'pip install "\.\[plot\]"'):
        write(HAND, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    write(HAND, tmp_path / "x", plot=False)
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["activation"]


def test_folders_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="file/activation: cannot write"):
        write(HAND, tmp_path / "file", plot=False)


# ---- the command ----


def command(*arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "qinfer", "profile", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == status, done.stderr
    return done


def test_the_command(matplotlib: Any, tmp_path: Path) -> None:
    path = as_powerinfer(tiny(tmp_path, "llama", "relu"))
    (tmp_path / "text.txt").write_text(TEXT)
    out = tmp_path / "out"
    done = command(path, "-f", tmp_path / "text.txt", "-o", out, "-c", 32, "--chunks", 2)
    assert done.stderr == ""
    with Model(path, sparsity="off") as model:
        result = profile(model, TEXT, n_ctx=32, n_chunks=2)
    files = [str(out / name) for name in ("activation", "power_law.png", "heat_map.png")]
    assert done.stdout.splitlines() == [*render(result).splitlines(), *files]
    assert np.array_equal(read_activations(out / "activation"), result.counts)
    plain = command(path, "-f", tmp_path / "text.txt", "-o", tmp_path / "plain", "--no-plot")
    assert plain.stdout.splitlines()[-1] == str(tmp_path / "plain" / "activation")
    assert [each.name for each in (tmp_path / "plain").iterdir()] == ["activation"]


def test_the_command_refuses_what_is_not_sparse(stories260k: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    options = ("-f", tmp_path / "text.txt", "-o", tmp_path / "out", "--no-plot")
    done = command(stories260k, *options, status=1)
    assert done.stdout == ""
    assert done.stderr.startswith("error: stories260K.F32.gguf: its activation is silu")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
    # The same weights as another model that this option makes of them.
    assert "48 tokens" in command(
        stories260k, *options, "--hidden-act", "relu", "-c", 48, "--chunks", 1
    ).stdout  # fmt: skip


def test_help_has_an_example() -> None:
    assert "Example: qinfer profile" in command("--help").stdout
