"""Keyword arguments that nobody knows, answered with what was probably meant."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

# What other libraries call things, mostly llama-cpp-python and transformers.
_ELSEWHERE = {
    "model_path": "the path is the first argument: Model(path)",
    "n_threads": "threads= says how many compute",
    "n_threads_batch": "threads= says how many compute, for prompts as well",
    "n_gpu_layers": "vram_budget= says how much of a GPU to use; what fits is chosen by itself",
    "verbose": "messages go to logging.getLogger('qinfer'), whose level is yours to set",
    "use_mmap": "mmap=False reads the file into memory",
    "use_mlock": "nothing is locked; mmap=False reads the file into memory",
    "type_k": "kv_type= is that of keys and values",
    "type_v": "kv_type= is that of keys and values",
    "n_batch": "Model.context(n_batch=) has it",
    "chat_format": "chat_template= takes a Jinja template instead of the file's own",
    "stream": "Model.stream and Model.stream_chat give the answer piece by piece",
    "streamer": "Model.stream and Model.stream_chat give the answer piece by piece",
    "max_new_tokens": "max_tokens= is the most that an answer has",
    "max_length": "max_tokens= is the most that an answer has, without the prompt",
    "n_predict": "max_tokens= is the most that an answer has; None goes to its end",
    "repetition_penalty": "it is repeat_penalty= here",
    "repeat_last_n": "it is penalty_window= here",
    "mirostat_mode": "it is mirostat= here",
    "do_sample": "temperature=0 always takes the most likely token",
    "logits_processor": "logits_processors= is a list of callables",
    "stop_token_ids": "stop= takes token ids, too",
    "stopping_criteria": "stop= takes texts and token ids; a stream can be closed at any piece",
    "top_logprobs": "logprobs= is how many of the best tokens to tell",
    "num_return_sequences": "generate takes a list of prompts, which may repeat",
    "echo": "the answer's text never has the prompt in it",
    "grammar": "this version has no grammars",
    "response_format": "this version has no grammars",
}


def unknown_keyword(name: str, known: Sequence[str]) -> str:
    """The message for an unknown keyword: its counterpart here, or else the nearest known one."""
    if name in _ELSEWHERE:
        return f"unexpected keyword argument {name!r}: {_ELSEWHERE[name]}"
    from difflib import get_close_matches

    # At 0.5, "temp" is near to "temperature".
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"
    return f"unexpected keyword argument {name!r}{hint}"


def check_keywords(names: Iterable[str], function: Callable[..., Any]) -> None:
    """Raises TypeError, with a hint, at the first name that is not a parameter of a function."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return  # the function knows best
    known = [parameter.name for parameter in parameters if parameter.name != "self"]
    for name in names:
        if name not in known:
            raise TypeError(unknown_keyword(name, known))


def hinting(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """A function that answers unknown keywords with a hint, before it does anything."""

    @wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        check_keywords(kwargs, function)
        return function(*args, **kwargs)

    return call
