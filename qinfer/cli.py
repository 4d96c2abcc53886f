"""The command line: `qinfer run | chat | bench | perplexity | profile | tokenize | …`."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from dataclasses import asdict
from itertools import chain
from typing import Any, NoReturn, TextIO

import click

from . import __version__, _options
from ._option_names import spoken
from ._program import run as run_program
from ._progress import Bar
from .model import Model
from .sparsity import Prefill, SparsityMode

_MODEL_HELP = (
    "MODEL is a path, owner/repository[:GLOB] on the Hugging Face hub, or an alias: stories, "
    "smollm2."
)


def main() -> NoReturn:
    """Runs the command line."""
    run_program(cli, "qinfer", spoken)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="qinfer", message="%(prog)s %(version)s")
@click.option("-v", "--verbose", is_flag=True, help="Show what is logged below warnings, too.")
def cli(verbose: bool) -> None:
    """Runs large language models from GGUF files on the machine you have."""
    if verbose:
        logging.getLogger("qinfer").setLevel(logging.DEBUG)


def _path(name: str) -> str:
    """The file of a MODEL, downloaded if need be."""
    from . import hub

    return str(hub.resolve(name))


def _load(name: str, **options: Any) -> Model:
    """The model of a MODEL."""
    path = _path(name)
    with Bar("loading", in_bytes=True) as bar:
        return Model(path, progress=bar, **_options.model_arguments(), **options)


def _text(prompt: str | None, file: TextIO | None) -> str:
    """The text of -p or -f."""
    if (prompt is None) == (file is None):
        raise click.UsageError("give the text by either -p TEXT or -f FILE (- is standard input)")
    return file.read() if file is not None else str(prompt)


_TEXT_OPTIONS = [
    click.option("-p", "--prompt", metavar="TEXT", help="The text."),
    click.option("-f", "--file", type=click.File(encoding="utf-8"),
                 help="A file with the text; - is standard input."),
]  # fmt: skip


# ---- commands ----


@cli.command()
@click.option("-p", "--prompt", metavar="TEXT", default="Once upon a time", show_default=True,
              help="How the story begins.")  # fmt: skip
@click.option("-n", "--n-predict", "--max-tokens", type=click.IntRange(1),
              help="Tokens at most; default: to the end of the story.")  # fmt: skip
@click.option("-s", "--seed", type=click.IntRange(0), default=1, show_default=True,
              help="Another one tells another story.")  # fmt: skip
@click.option("-t", "--threads", type=click.IntRange(1), help="Threads; default: all cores.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def demo(prompt: str, n_predict: int | None, seed: int, threads: int | None, as_json: bool) -> None:
    """Tell a story, and show what leaving neurons out does; needs no network.

    Example: qinfer demo -p "The little dragon"
    """
    from . import demo as show

    # One column less than there are: a space there would begin a line of its own.
    width = min(shutil.get_terminal_size().columns, 96) - 1 if sys.stdout.isatty() else None
    tell = show.WordWrap(lambda text: click.echo(text, nl=False), width)
    with Model.demo(threads=threads, sparsity="exact") as model:
        stream = show.story(model, prompt, seed=seed, max_tokens=n_predict)
        for text in chain([prompt], (piece.text for piece in stream)):
            if not as_json:
                tell(text)
        if not as_json:
            tell.close()
        completion = stream.completion
        assert completion is not None
        with Bar("measuring") as bar:
            result = show.measure(model, prompt, completion, progress=bar)
    if as_json:
        click.echo(json.dumps(asdict(result), ensure_ascii=False))
    else:
        click.echo(f"\n{show.render(result)}")


@cli.command(epilog=_MODEL_HELP)
@_options.model_argument
@_options.with_options(
    _TEXT_OPTIONS, _options.SAMPLING, _options.CONTEXT, _options.SPARSITY, _options.MACHINE,
    _options.DEVICE,
)  # fmt: skip
@click.option("--stats", is_flag=True, help="Show what each layer computed, when done.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object when done.")
def run(
    model: str,
    prompt: str | None,
    file: TextIO | None,
    ctx_size: int | None,
    kv_type: str,
    hidden_act: str | None,
    sparsity: SparsityMode,
    sparse_threshold: float | None,
    prefill: Prefill,
    threads: int | None,
    no_mmap: bool,
    stats: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Continue a text.

    Example: qinfer run smollm2 -p "Once upon a time" -n 64
    """
    # Editors end files with a line break that nobody means as part of a prompt.
    text = _text(prompt, file).removesuffix("\n") if file else _text(prompt, file)
    wanted = _options.generate_arguments(options)
    with (
        _load(
            model, n_ctx=ctx_size, kv_type=kv_type, hidden_act=hidden_act, threads=threads,
            mmap=not no_mmap, sparsity=sparsity, sparse_threshold=sparse_threshold,
            prefill=prefill,
        ) as loaded,
        Bar("reading") as bar,
        loaded.stream(text, progress=bar, **wanted) as stream,
    ):  # fmt: skip
        last = "\n"
        for piece in stream:
            bar.close()
            if piece.text and not as_json:
                last = piece.text
                click.echo(piece.text, nl=False)
        completion = stream.completion
        assert completion is not None
        info, mode = loaded.info, loaded.policy.mode
    if as_json:
        click.echo(json.dumps(completion.to_dict(), ensure_ascii=False))
    elif not last.endswith("\n"):
        click.echo()
    if stats:
        from ._stats_table import render

        click.echo(render(completion, info, mode), err=True)
    if sys.stderr.isatty() and not as_json:
        if completion.placement is not None and not stats:
            click.echo(f"(GPU {completion.placement})", err=True)
        timings, usage = completion.timings, completion.usage
        click.echo(
            f"({usage.prompt_tokens} tokens read at {timings.prompt_tokens_per_second:.1f}/s, "
            f"{usage.completion_tokens} written at {timings.tokens_per_second:.1f}/s, "
            f"seed {completion.seed})",
            err=True,
        )


@cli.command(epilog=_MODEL_HELP)
@_options.model_argument
@click.option("--system", help="A system message.")
@_options.with_options(
    _options.SAMPLING, _options.CONTEXT, _options.SPARSITY, _options.MACHINE, _options.DEVICE
)
def chat(
    model: str,
    system: str | None,
    ctx_size: int | None,
    kv_type: str,
    hidden_act: str | None,
    sparsity: SparsityMode,
    sparse_threshold: float | None,
    prefill: Prefill,
    threads: int | None,
    no_mmap: bool,
    **options: Any,
) -> None:
    """Talk with a model that was trained to.

    Example: qinfer chat smollm2
    """
    from ._talk import Talk

    wanted = _options.generate_arguments(options)
    with _load(
        model, n_ctx=ctx_size, kv_type=kv_type, hidden_act=hidden_act, threads=threads,
        mmap=not no_mmap, sparsity=sparsity, sparse_threshold=sparse_threshold, prefill=prefill,
    ) as loaded:  # fmt: skip
        Talk(loaded, system, wanted).run()


@cli.command(epilog=_MODEL_HELP)
@_options.model_argument
@click.option(
    "-p",
    "--n-prompt",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="Tokens of the prompt.",
)
@click.option(
    "-n",
    "--n-gen",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    help="Tokens to generate.",
)
@click.option("-r", "--repetitions", type=click.IntRange(1), default=5, show_default=True,
              help="Rounds to take the median of.")  # fmt: skip
@_options.with_options(_options.CONTEXT, _options.SPARSITY, _options.MACHINE, _options.DEVICE)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def bench(
    model: str,
    n_prompt: int,
    n_gen: int,
    repetitions: int,
    ctx_size: int | None,
    kv_type: str,
    hidden_act: str | None,
    sparsity: SparsityMode,
    sparse_threshold: float | None,
    prefill: Prefill,
    threads: int | None,
    no_mmap: bool,
    as_json: bool,
) -> None:
    """Measure speed, beside the machine's read bandwidth.

    Example: qinfer bench model.gguf -p 512 -n 32
    """
    from . import bench as benchmark

    with (
        _load(
            model, n_ctx=ctx_size, kv_type=kv_type, hidden_act=hidden_act, threads=threads,
            mmap=not no_mmap, sparsity=sparsity, sparse_threshold=sparse_threshold,
            prefill=prefill,
        ) as loaded,
        Bar("measuring") as bar,
    ):  # fmt: skip
        result = benchmark.bench(
            loaded, n_prompt=n_prompt, n_generate=n_gen, repeats=repetitions, n_ctx=ctx_size,
            progress=bar,
        )  # fmt: skip
        facts = asdict(loaded.info)
        text = benchmark.render(loaded, result)
    if as_json:
        click.echo(json.dumps({"model": facts, **asdict(result)}))
    else:
        click.echo(text)


@cli.command(epilog=_MODEL_HELP)
@_options.model_argument
@click.option("-f", "--file", required=True, type=click.File(encoding="utf-8"), help="The text.")
@click.option("-c", "--ctx-size", type=click.IntRange(4), default=512, show_default=True,
              help="Tokens per chunk.")  # fmt: skip
@click.option("--chunks", type=click.IntRange(1), help="Chunks at most.")
@click.option(
    "--sparsity",
    type=click.Choice(["off", "exact", "predict"]),
    default="off",
    show_default=True,
    help="The mode to measure: every token is computed with neurons of its own.",
)
@click.option(
    "--sparse-threshold",
    type=float,
    help="Leave out neurons predicted below; default: what the file says.",
)
@_options.CROSS_LAYER_FROM
@_options.with_options(_options.MACHINE, _options.DEVICE)
def perplexity(
    model: str,
    file: TextIO,
    ctx_size: int,
    chunks: int | None,
    sparsity: SparsityMode,
    sparse_threshold: float | None,
    threads: int | None,
    no_mmap: bool,
) -> None:
    """Measure how well a model predicts a text, as llama.cpp does.

    Example: qinfer perplexity model.gguf -f wiki.test.raw --chunks 20
    """
    from . import perplexity as measure

    def show(number: int, value: float) -> None:
        click.echo(f"[{number}]{value:.4f},", nl=False)

    with _load(
        model, threads=threads, mmap=not no_mmap, sparsity=sparsity,
        sparse_threshold=sparse_threshold,
    ) as loaded:  # fmt: skip
        result = measure.perplexity(
            loaded, file.read(), n_ctx=ctx_size, n_chunks=chunks, on_chunk=show
        )
    click.echo()
    if result.placement is not None:
        click.echo(f"GPU {result.placement}")
    if result.neurons is not None:
        click.echo(measure.render(result.neurons))
    click.echo(f"Final: PPL = {result.value:.4f} +/- {result.error:.5f}")


@cli.command(epilog=_MODEL_HELP)
@_options.model_argument
@click.option("-f", "--file", required=True, type=click.File(encoding="utf-8"), help="The text.")
@click.option("-o", "--output", required=True, metavar="DIR", help="Where the files go.")
@click.option("-c", "--ctx-size", type=click.IntRange(1),
              help="Tokens per chunk; default: 512, or those of training if fewer.")  # fmt: skip
@click.option("--chunks", type=click.IntRange(1), help="Chunks at most.")
@click.option("--plot/--no-plot", default=True, help="Draw the plots, too (default).")
@click.option("--hidden-act", help="Override the activation, e.g. relu.")
@_options.with_options(_options.MACHINE, _options.DEVICE)
def profile(
    model: str,
    file: TextIO,
    output: str,
    ctx_size: int | None,
    chunks: int | None,
    plot: bool,
    hidden_act: str | None,
    threads: int | None,
    no_mmap: bool,
) -> None:
    """Count how often each neuron of a model is active over a text.

    Writes DIR/activation/activation_{i}.pt, from which PowerInfer's solver and our
    qinfer.tools.export_gpu_split decide what goes to a GPU, and two plots.

    Example: qinfer profile model.gguf -f text.txt -o profile --chunks 20
    """
    from . import profile as measure

    if plot:
        measure.check_plots()
    with (
        _load(
            model, threads=threads, mmap=not no_mmap, hidden_act=hidden_act, sparsity="off"
        ) as loaded,
        Bar("counting") as bar,
    ):  # fmt: skip
        result = measure.profile(loaded, file.read(), n_ctx=ctx_size, n_chunks=chunks, progress=bar)
    written = measure.write(result, output, plot=plot)
    click.echo(measure.render(result))
    for path in written:
        click.echo(path)


@cli.command(epilog=_MODEL_HELP)
@_options.model_argument
@_options.with_options(_TEXT_OPTIONS)
@click.option("--ids", is_flag=True, help="Print the ids only, as a list.")
@click.option("--no-special", is_flag=True, help="Do not add BOS or EOS.")
@click.option("--parse-special", is_flag=True, help="Read control tokens spelled in the text.")
def tokenize(
    model: str,
    prompt: str | None,
    file: TextIO | None,
    ids: bool,
    no_special: bool,
    parse_special: bool,
) -> None:
    """Show the tokens of a text; MODEL may be a vocabulary alone.

    Example: qinfer tokenize smollm2 -p "Hello world"
    """
    from .tokenizer import Tokenizer

    text = _text(prompt, file)
    tokenizer = Tokenizer.from_gguf(_path(model))
    tokens = tokenizer.encode(text, add_special=not no_special, parse_special=parse_special)
    if ids:
        click.echo(json.dumps(tokens))
        return
    for token in tokens:
        click.echo(f"{token:6d} -> {tokenizer.token_bytes(token).decode('utf-8', 'replace')!r}")


@cli.command(epilog=_MODEL_HELP)
@_options.model_argument
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, nothing cut short.")
def inspect(model: str, as_json: bool) -> None:
    """Show what is in a file: metadata, tensors, sizes, types.

    Example: qinfer inspect model.gguf
    """
    from . import inspect as look

    path = _path(model)
    click.echo(json.dumps(look.describe(path)) if as_json else look.render(path))


@cli.command()
def doctor() -> None:
    """Show what was found on this machine, and why something is not used."""
    from . import doctor as examine

    click.echo(examine.render())
