"""Options that several commands of the command line share, and the arguments they stand for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


def model_argument(command: Command) -> Command:
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


DEVICE = [
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


def model_arguments() -> dict[str, Any]:
    """What options of the running command say that wait for the model, as arguments of `Model`."""
    meta = click.get_current_context().meta
    return {"cross_layer_from": meta.get("qinfer.cross_layer_from")} | _device_arguments(meta)


def _device_arguments(meta: dict[str, Any]) -> dict[str, Any]:
    """What DEVICE says."""
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


MACHINE = [
    click.option("-t", "--threads", type=click.IntRange(1), help="Threads; default: all cores."),
    click.option("--no-mmap", is_flag=True, help="Read the file into memory, do not map it."),
    click.option(
        "-ngl", "--gpu-layers", "--n-gpu-layers", metavar="N", hidden=True, expose_value=False,
        callback=_refuse_gpu_layers,
    ),
]  # fmt: skip
CONTEXT = [
    click.option("-c", "--ctx-size", type=click.IntRange(1), help="Tokens of context."),
    click.option("--kv-type", type=click.Choice(["f16", "q8_0"]), default="f16",
                 help="How keys and values are kept."),
    click.option("--hidden-act", help="Override the activation, e.g. relu."),
]  # fmt: skip
CROSS_LAYER_FROM = click.option(
    "--cross-layer-from", metavar="LAYER", type=click.IntRange(1), expose_value=False,
    callback=_keep_for_load,
    help="With predict: from this layer on, predict one layer early, at some cost of accuracy; "
    "Q-Infer: 5.",
)  # fmt: skip
SPARSITY = [
    click.option("--sparsity", type=click.Choice(["auto", "off", "exact", "predict"]),
                 default="auto", show_default=True,
                 help="Neurons that a generated token computes: all (off), those whose gate is not "
                 "zero (exact), those that predictors name, or what is fastest here."),
    click.option("--sparse-threshold", type=float,
                 help="Leave out neurons predicted below; default: what the file says."),
    CROSS_LAYER_FROM,
    click.option("--prefill", type=click.Choice(["dense", "sparse"]), default="dense",
                 help="Compute all neurons of prompt tokens (default), or as of generated ones."),
]  # fmt: skip
SAMPLING = [
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


def with_options(*groups: list[Callable[[Any], Any]]) -> Callable[[Command], Command]:
    """Adds groups of options to a command, in the order they are listed."""

    def decorate(command: Command) -> Command:
        for option in reversed([option for group in groups for option in group]):
            command = option(command)
        return command

    return decorate


def generate_arguments(options: dict[str, Any]) -> dict[str, Any]:
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
