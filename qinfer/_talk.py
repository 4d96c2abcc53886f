"""The conversation of `qinfer chat`: lines in, answers streamed, Ctrl-C ends the answer only."""

from __future__ import annotations

import sys
from typing import Any

from ._option_names import spoken
from ._progress import Bar
from .errors import ArgumentError, ContextFull
from .model import Model

_HELP = """\
/help            this list
/reset           forget the conversation
/system TEXT     start over with another system message
/exit            leave (also Ctrl-D)
Ctrl-C ends an answer; what there is of it stays in the conversation."""


class Talk:
    """A conversation with a model on standard input and output."""

    def __init__(self, model: Model, system: str | None, options: dict[str, Any]) -> None:
        self._model = model
        self._options = options
        self._system = system
        self._messages: list[dict[str, str]] = []
        self._interactive = sys.stdin.isatty()
        self._reset()

    def run(self) -> None:
        """Talks until the input ends or /exit."""
        if self._interactive:
            # Gives `input` line editing and history; imported only for that.
            import readline  # noqa: F401

            _say(f"{self._model.path}: {self._model.n_ctx} tokens of context; /help lists commands")
        while True:
            try:
                line = input("> " if self._interactive else "").strip()
            except EOFError:
                break
            except KeyboardInterrupt:
                _say("\n/exit or Ctrl-D leaves")
                continue
            if line == "/exit":
                break
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._answer(line)
        if self._interactive:
            _say("")

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name == "/help":
            _say(_HELP)
        elif name == "/reset":
            self._reset()
        elif name == "/system":
            self._system = rest.strip() or None
            self._reset()
        else:
            _say(f"error: unknown command {name}; /help lists what there is")

    def _reset(self) -> None:
        self._messages = []
        if self._system:
            self._messages.append({"role": "system", "content": self._system})

    def _answer(self, line: str) -> None:
        """Streams the answer to a line; both join the conversation."""
        self._messages.append({"role": "user", "content": line})
        text = ""
        try:
            with (
                Bar("reading") as bar,
                self._model.stream_chat(self._messages, progress=bar, **self._options) as stream,
            ):
                for piece in stream:
                    bar.close()
                    text += piece.text
                    print(piece.text, end="", flush=True)
        except KeyboardInterrupt:
            _say("\n(stopped)")
        except (ContextFull, ArgumentError) as error:  # too long, or not to the template's taste
            del self._messages[-1]
            _say(f"error: {spoken(str(error))}; /reset starts over")
            return
        else:
            print(flush=True)
        self._messages.append({"role": "assistant", "content": text})


def _say(text: str) -> None:
    """What is not the model's goes to standard error."""
    print(text, file=sys.stderr, flush=True)
