"""Trained models: published text, llama.cpp's greedy continuations and its perplexities."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from oracle import errors, forward, read_gguf
from qinfer import Model

# A greedy text may part from llama.cpp's where its token trails our best by less than this: both
# round activations to int8, which moves logits of a spread of about 4 by some hundredths.
NEAR_TIE = 0.1
N_GREEDY = 48


def test_stories_text_is_the_published_one(stories260k: Path) -> None:
    expected = stories260k.with_name("stories260K.temp0.n200.txt").read_text(encoding="utf-8")
    with Model(stories260k) as model:
        completion = model.generate("", max_tokens=200, temperature=0)
    # llama2.c drops the space that begins a text.
    assert completion.text.removeprefix(" ") == expected.removesuffix("\n")
    assert len(completion.tokens) == 200


def greedy_texts(path: Path) -> list[tuple[str, str]]:
    """Prompts and their continuations in the file of llama.cpp's greedy texts."""
    sections = re.split(r"^### prompt: ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    texts = []
    for section in sections:
        prompt, _, text = section.partition("\n")
        assert text.startswith(prompt)
        texts.append((prompt, text.removeprefix(prompt).rstrip("\n")))
    return texts


@pytest.mark.parametrize("number", range(3))
def test_smollm2_greedy_text(number: int, smollm2: Path, test_data: Path) -> None:
    prompt, expected = greedy_texts(test_data / "expected" / "SmolLM2.greedy.txt")[number]
    with Model(smollm2) as model:
        tokenizer = model.tokenizer
        history = tokenizer.encode(prompt)
        n_prompt = len(history)
        with model.context(n_ctx=256) as context:
            context.feed(history)
            while len(history) < n_prompt + N_GREEDY:
                best = int(context.logits.argmax())
                found = tokenizer.decode([*history[n_prompt:], best])
                if not expected.startswith(found.rstrip("\n\ufffd")):
                    break
                history.append(best)
                context.feed([best])
            else:
                return
            # What llama.cpp wrote instead, among our best candidates.
            logits = context.logits
            for candidate in np.argsort(-logits)[1:5]:
                found = tokenizer.decode([*history[n_prompt:], int(candidate)])
                if expected.startswith(found.rstrip("\n\ufffd")):
                    gap = logits[best] - logits[candidate]
                    assert gap < NEAR_TIE, f"parts after {found!r}, by {gap:.3f}"
                    return
    pytest.fail(f"parts from the expected text after {tokenizer.decode(history[n_prompt:])!r}")


def test_smollm2_logits(smollm2: Path, test_data: Path) -> None:
    """Thirty layers of int8 activations against none: the median of llama.cpp's tokens is 0.020."""
    text = (test_data / "texts" / "wikitext-2-raw.wiki.test.raw").read_text(encoding="utf-8")
    with Model(smollm2) as model, model.context() as context:
        tokens = model.tokenizer.encode(text[:1000])[:96]
        context.feed(tokens, logits="all")
        difference = errors(context.all_logits, forward(read_gguf(smollm2), tokens))
    assert np.median(difference) < 0.03
    assert difference.max() < 0.2


def chunked_perplexity(path: Path, text: str, n_chunks: int, n_ctx: int = 512) -> float:
    """Perplexity as llama-perplexity computes it: of the second half of each chunk."""
    with Model(path) as model, model.context(n_ctx=n_ctx) as context:
        tokens = model.tokenizer.encode(text)
        begins_with_bos = tokens[0] == model.tokenizer.bos_id
        total = 0.0
        for chunk in range(n_chunks):
            part = tokens[chunk * n_ctx : (chunk + 1) * n_ctx]
            assert len(part) == n_ctx
            if begins_with_bos:
                part[0] = tokens[0]
            context.truncate(0)
            total += context.score(part)[n_ctx // 2 : -1].sum(dtype=np.float64)
    return float(np.exp(-total / (n_chunks * (n_ctx - 1 - n_ctx // 2))))


def expected_perplexity(data: Path, model: str) -> float:
    """llama.cpp's result for a model."""
    text = (data / "expected" / "perplexity.txt").read_text(encoding="utf-8")
    section = text[text.index(f"## {model}") :]
    match = re.search(r"Final: PPL = ([0-9.]+)", section)
    assert match
    return float(match[1])


def test_stories_perplexity(stories260k: Path, test_data: Path) -> None:
    text = (test_data / "texts" / "children-stories-en.txt").read_text(encoding="utf-8")
    found = chunked_perplexity(stories260k, text[:60_000], 20)
    expected = expected_perplexity(test_data, "stories260K.F32.gguf")
    assert found == pytest.approx(expected, rel=0.005)


def test_smollm2_perplexity(smollm2: Path, test_data: Path) -> None:
    text = (test_data / "texts" / "wikitext-2-raw.wiki.test.raw").read_text(encoding="utf-8")
    found = chunked_perplexity(smollm2, text[:100_000], 20)
    expected = expected_perplexity(test_data, "SmolLM2-135M-Instruct.Q4_1.gguf")
    assert found == pytest.approx(expected, rel=0.005)
