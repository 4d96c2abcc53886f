"""The command line: `qinfer run | chat | bench | perplexity | profile | tokenize | …`."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar

import click

from . import __version__
from ._option_names import spoken
from ._program import run as run_program
from ._progress import Bar
from .model import Model
from .sparsity import Prefill, SparsityMode

Command = TypeVar("Command", bound=Callable[..., Any])

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


# ---- options that several commands share ----


def _model_argument(command: Command) -> Command:
    """MODEL, also as -m MODEL; the command gets its name as `model`."""

    def choose(context: click.Context, _: click.Parameter, value: str | None) -> None:
        names = [name for name in (value, context.params.pop("model", None)) if name]
        if context.resilient_parsing:
            return
        if len(names) != 1:
            raise click.UsageError(
                "give one MODEL: a path, owner/repository or an alias", ctx=context
            )
        context.params["model"] = names[0]

    command = click.option(
        "-m", "--model", "model_option", metavar="MODEL", expose_value=False, callback=choose,
        help="MODEL, for those who type it so.",
    )(command)  # fmt: skip
    return click.argument("model", required=False, is_eager=True)(command)


def _refuse_gpu_layers(context: click.Context, _: click.Parameter, value: str | None) -> None:
    if value is not None:
        raise click.UsageError(
            "-ngl: layers are not placed one by one here; --vram-budget GIB says how much of a "
            "GPU's memory to use, and what fits is chosen by itself",
            ctx=context,
        )


def _keep_for_load(context: click.Context, option: click.Parameter, value: Any) -> None:
    context.meta[f"qinfer.{option.name}"] = value


_DEVICE_OPTIONS = [
    click.option("--device", default="auto", metavar="auto|cpu|cuda|cuda:N", expose_value=False,
                 callback=_keep_for_load,
                 help="What computes; auto, the default, is a GPU if one can be used."),
    click.option("--vram-budget", metavar="GIB", expose_value=False, callback=_keep_for_load,
                 help="GPU memory that weights, keys, values and working space may take together, "
                 "e.g. 6 or 900MiB; default: all that is free once the kernels are loaded."),
    click.option("--gpu-index", metavar="FILE", type=click.Path(path_type=Path),
                 expose_value=False, callback=_keep_for_load,
                 help="Which neurons the GPU keeps, as export_gpu_split writes it for this MODEL; "
                 "default: MODEL.generated.gpuidx, else by activation/ beside the model."),
    click.option("--reset-gpu-index", is_flag=True, expose_value=False, callback=_keep_for_load,
                 help="Choose by activation/ even if there is such a file."),
    click.option("--balance-gpu-index", is_flag=True, expose_value=False, callback=_keep_for_load,
                 help="Choose by activation/, but keep only as many neurons of a layer as let GPU "
                 "and processor need the same time for it, by speeds measured first; where down "
                 "is stored by neuron."),
    click.option("--disable-gpu-index", is_flag=True, expose_value=False, callback=_keep_for_load,
                 help="Keep no neurons on the GPU."),
    click.option("--neuron-cache", type=click.Choice(["static", "balance", "frequency"]),
                 default="static", show_default=True, expose_value=False, callback=_keep_for_load,
                 help="Neurons on the GPU stay, or change so that both sides need the same time, "
                 "or so that those used most of late are there."),
    click.option("--kv-mode", type=click.Choice(["auto", "device", "host", "split"]),
                 default="auto", expose_value=False, callback=_keep_for_load,
                 help="Where keys and values are kept beside a GPU: on it (device), in host memory "
                 "(host), in both (split), or split if they do not fit (auto, the default)."),
    click.option("--kv-ratio", type=click.FloatRange(0, 1), metavar="SHARE", expose_value=False,
                 callback=_keep_for_load,
                 help="With split, the processor's share of the positions at first; default: what "
                 "does not fit on the GPU."),
    click.option("--kv-step", type=click.FloatRange(0, 1), metavar="SHARE", expose_value=False,
                 callback=_keep_for_load,
                 help="With split, by how much a layer's share adapts after a token, e.g. 0.01; "
                 "default: 0, not at all."),
    click.option("--deterministic", is_flag=True, expose_value=False, callback=_keep_for_load,
                 help="Same logits however a prompt is cut into batches, on a GPU, too; slower "
                 "prompts there."),
]  # fmt: skip


def _device_arguments() -> dict[str, Any]:
    """What _DEVICE_OPTIONS of the running command say, as keyword arguments of `Model`."""
    meta = click.get_current_context().meta
    if "qinfer.device" not in meta:
        return {}
    splits = {
        "--gpu-index": meta["qinfer.gpu_index"],  # a Path: no word for `Model`
        "--reset-gpu-index": "counts" if meta["qinfer.reset_gpu_index"] else None,
        "--balance-gpu-index": "balance" if meta["qinfer.balance_gpu_index"] else None,
        "--disable-gpu-index": "none" if meta["qinfer.disable_gpu_index"] else None,
    }
    given = {name: value for name, value in splits.items() if value}
    if len(given) > 1:
        raise click.UsageError(f"{' and '.join(given)} exclude each other")
    return {
        "device": meta["qinfer.device"],
        "vram_budget": meta["qinfer.vram_budget"],
        "gpu_split": next(iter(given.values()), "auto"),
        "neuron_cache": meta["qinfer.neuron_cache"],
        "kv_mode": meta["qinfer.kv_mode"],
        "kv_ratio": meta["qinfer.kv_ratio"],
        "kv_step": meta["qinfer.kv_step"],
        "deterministic": meta["qinfer.deterministic"],
    }


_MACHINE_OPTIONS = [
    click.option("-t", "--threads", type=click.IntRange(1), help="Threads; default: all cores."),
    click.option("--no-mmap", is_flag=True, help="Read the file into memory, do not map it."),
    click.option(
        "-ngl", "--gpu-layers", "--n-gpu-layers", metavar="N", hidden=True, expose_value=False,
        callback=_refuse_gpu_layers,
    ),
]  # fmt: skip
_CONTEXT_OPTIONS = [
    click.option("-c", "--ctx-size", type=click.IntRange(1), help="Tokens of context."),
    click.option("--kv-type", type=click.Choice(["f16", "q8_0"]), default="f16",
                 help="How keys and values are kept."),
    click.option("--hidden-act", help="Override the activation, e.g. relu."),
]  # fmt: skip
_CROSS_LAYER_FROM = click.option(
    "--cross-layer-from", metavar="LAYER", type=click.IntRange(1), expose_value=False,
    callback=_keep_for_load,
    help="With predict: from this layer on, predict one layer early, at some cost of accuracy; "
    "Q-Infer: 5.",
)  # fmt: skip
_SPARSITY_OPTIONS = [
    click.option("--sparsity", type=click.Choice(["auto", "off", "exact", "predict"]),
                 default="auto", show_default=True,
                 help="Neurons that a generated token computes: all (off), those whose gate is not "
                 "zero (exact), those that predictors name, or what is fastest here."),
    click.option("--sparse-threshold", type=float,
                 help="Leave out neurons predicted below; default: what the file says."),
    _CROSS_LAYER_FROM,
    click.option("--prefill", type=click.Choice(["dense", "sparse"]), default="dense",
                 help="Compute all neurons of prompt tokens (default), or as of generated ones."),
]  # fmt: skip
_SAMPLING_OPTIONS = [
    click.option("-n", "--n-predict", "--max-tokens", type=click.IntRange(-1),
                 help="Tokens at most; -1 (default): to the end of the answer."),
    click.option("--temp", "--temperature", "temperature", type=float,
                 help="0 is greedy; default 0.8."),
    click.option("--top-k", type=int, help="Default 40; 0 keeps all."),
    click.option("--top-p", type=float, help="Default 0.95; 1 keeps all."),
    click.option("--min-p", type=float, help="Default 0.05; 0 keeps all."),
    click.option("--typical", "typical_p", type=float, help="Default 1, which keeps all."),
    click.option("-s", "--seed", type=click.IntRange(-1), help="Default -1: a fresh one."),
    click.option("--repeat-penalty", type=float, help="Default 1, which is off."),
    click.option("--presence-penalty", type=float, help="Default 0, which is off."),
    click.option("--frequency-penalty", type=float, help="Default 0, which is off."),
    click.option("--repeat-last-n", "penalty_window", type=int,
                 help="Tokens that penalties look at; default 64."),
    click.option("--dynatemp-range", type=float, help="Default 0, which is off."),
    click.option("--dynatemp-exp", "dynatemp_exponent", type=float, help="Default 1."),
    click.option("--mirostat", type=int, help="0 (default), 1 or 2."),
    click.option("--mirostat-ent", "mirostat_tau", type=float, help="Default 5."),
    click.option("--mirostat-lr", "mirostat_eta", type=float, help="Default 0.1."),
    click.option("--logit-bias", multiple=True, metavar="ID±BIAS",
                 help="E.g. 15043+1 or 15043-inf; may be repeated."),
    click.option("--stop", multiple=True, help="End the answer before this text; may be repeated."),
    click.option("--ignore-eos", is_flag=True, help="Never end the text."),
]  # fmt: skip


def _with(*groups: list[Callable[[Any], Any]]) -> Callable[[Command], Command]:
    """Adds groups of options to a command, in the order they are listed."""

    def decorate(command: Command) -> Command:
        for option in reversed([option for group in groups for option in group]):
            command = option(command)
        return command

    return decorate


def _generate_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options given on the command line, as keyword arguments of `Model.generate`."""
    given = {name: value for name, value in options.items() if value is not None}
    n_predict = given.pop("n_predict", -1)
    given["max_tokens"] = None if n_predict < 0 else n_predict
    if given.get("seed") == -1:
        del given["seed"]
    given["stop"] = list(given["stop"])
    given["logit_bias"] = dict(map(_bias, given["logit_bias"]))
    return given


def _bias(text: str) -> tuple[int, float]:
    """ "15043-inf" as (15043, -inf)."""
    sign = max(text.find("+"), text.find("-"))
    try:
        return int(text[:sign]), float(text[sign:])
    except ValueError:
        raise click.UsageError(
            f"--logit-bias {text}: expected an id, + or -, and a number"
        ) from None


def _path(name: str) -> str:
    """The file of a MODEL, downloaded if need be."""
    from . import hub

    return str(hub.resolve(name))


def _load(name: str, **options: Any) -> Model:
    """The model of a MODEL."""
    path = _path(name)
    early = click.get_current_context().meta.get("qinfer.cross_layer_from")
    with Bar("loading", in_bytes=True) as bar:
        return Model(path, progress=bar, cross_layer_from=early, **_device_arguments(), **options)


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
@_model_argument
@_with(
    _TEXT_OPTIONS, _SAMPLING_OPTIONS, _CONTEXT_OPTIONS, _SPARSITY_OPTIONS, _MACHINE_OPTIONS,
    _DEVICE_OPTIONS,
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
    wanted = _generate_options(options)
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
@_model_argument
@click.option("--system", help="A system message.")
@_with(_SAMPLING_OPTIONS, _CONTEXT_OPTIONS, _SPARSITY_OPTIONS, _MACHINE_OPTIONS, _DEVICE_OPTIONS)
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

    wanted = _generate_options(options)
    with _load(
        model, n_ctx=ctx_size, kv_type=kv_type, hidden_act=hidden_act, threads=threads,
        mmap=not no_mmap, sparsity=sparsity, sparse_threshold=sparse_threshold, prefill=prefill,
    ) as loaded:  # fmt: skip
        Talk(loaded, system, wanted).run()


@cli.command(epilog=_MODEL_HELP)
@_model_argument
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
@_with(_CONTEXT_OPTIONS, _SPARSITY_OPTIONS, _MACHINE_OPTIONS, _DEVICE_OPTIONS)
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
@_model_argument
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
@_CROSS_LAYER_FROM
@_with(_MACHINE_OPTIONS, _DEVICE_OPTIONS)
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
@_model_argument
@click.option("-f", "--file", required=True, type=click.File(encoding="utf-8"), help="The text.")
@click.option("-o", "--output", required=True, metavar="DIR", help="Where the files go.")
@click.option("-c", "--ctx-size", type=click.IntRange(1),
              help="Tokens per chunk; default: 512, or those of training if fewer.")  # fmt: skip
@click.option("--chunks", type=click.IntRange(1), help="Chunks at most.")
@click.option("--plot/--no-plot", default=True, help="Draw the plots, too (default).")
@click.option("--hidden-act", help="Override the activation, e.g. relu.")
@_with(_MACHINE_OPTIONS, _DEVICE_OPTIONS)
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
@_model_argument
@_with(_TEXT_OPTIONS)
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
@_model_argument
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
