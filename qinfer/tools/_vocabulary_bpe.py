"""Byte-level BPE vocabularies: tokenizer.json, or vocab.json with merges.txt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .._tokenize.pretokenize import PRE_TOKENIZERS, PreTokenizer
from ._vocabulary_files import Folder, Pieces, Section, logger

# Families of pre-tokenizers by one of their names, of equal ones the first.
_NAMES = (
    *("gpt-2", "olmo", "falcon", "starcoder", "llama-bpe", "dbrx", "qwen2", "deepseek-r1-qwen"),
    *("tekken", "gpt-4o", "deepseek-llm", "deepseek-coder", "deepseek-v3", "bloom"),
)
# Of two names for the same cuts, the second tells llama.cpp to leave spaces before punctuation.
_WITHOUT_CLEAN_UP = {"starcoder": "smollm"}
_PUNCTUATION, _GPT2, _DIGIT_TRIPLE = PRE_TOKENIZERS["falcon"].patterns
# Falcon's own steps cut digits once more, and only after bytes became characters, where they cut
# some letters, too: of "м" (D0 BC) the second byte is "¼". llama.cpp's "falcon" leaves that out:
# Falcon's merges, learned from such pieces, never cross the cuts.
_FALCON_STEPS = (_PUNCTUATION, _GPT2, r"\p{N}+", _DIGIT_TRIPLE)
# Without tokenizer.json, the program that reads vocab.json decides: by model, else by its class.
_PRE_OF_MODEL = {
    "gpt2": "gpt-2",
    "opt": "gpt-2",
    "codegen": "gpt-2",
    "phi": "gpt-2",
    "qwen2": "qwen2",
    "falcon": "falcon",
    "gpt_bigcode": "starcoder",
    "starcoder2": "starcoder",
}
_PRE_OF_CLASS = {"GPT2Tokenizer": "gpt-2", "CodeGenTokenizer": "gpt-2", "Qwen2Tokenizer": "qwen2"}


def is_byte_level(tokenizer: Section) -> bool:
    """Whether a tokenizer.json turns each byte into a character of GPT-2's alphabet."""
    return any(step.string("type") == "ByteLevel" for step in _pre_steps(tokenizer))


def read_bpe_json(files: Folder) -> Pieces:
    """The byte-level vocabulary in tokenizer.json; raises FormatError or UnsupportedError."""
    tokenizer = files.json("tokenizer.json")
    model, texts, pairs = read_model(tokenizer)
    merges = []
    for index, (left, right) in enumerate(pairs):
        if " " in left + right:
            raise model.error(f"merges[{index}]", "has a space in a token, which GGUF cannot hold")
        merges.append(f"{left} {right}")
    pre = _pre_of_steps(files, tokenizer, bool(model.flag("ignore_merges")))
    return Pieces(tokenizer.source, "gpt2", texts, merges=merges, pre=pre)


def read_bpe_files(files: Folder) -> Pieces:
    """The vocabulary in vocab.json and merges.txt; raises FormatError."""
    vocab = files.json("vocab.json")
    texts = vocab.texts_by_id()
    source = str(files.path / "merges.txt")
    lines = files.text("merges.txt").removesuffix("\n").split("\n")
    numbered = [
        (f"line {number}", tuple(line.removesuffix("\r").split(" ")))
        for number, line in enumerate(lines, 1)
        if line.strip("\r") and not (number == 1 and line.startswith("#version"))
    ]
    known = set(texts.values())
    merges = [" ".join(pair) for pair in _checked(Section({}, source), numbered, known)]
    return Pieces(vocab.source, "gpt2", texts, merges=merges, pre=_pre_of_model(files))


def read_model(tokenizer: Section) -> tuple[Section, dict[int, str], list[tuple[str, str]]]:
    """The model in a tokenizer.json, its tokens by id, and its merges in order.

    Raises UnsupportedError, naming it, when it is none of byte pairs, and FormatError when a merge
    is not of two tokens into a third.
    """
    model = tokenizer.section("model")
    if model is None:
        raise tokenizer.error("model", "is missing")
    kind = model.string("type")
    if kind is None and "merges" in model.content:
        kind = "BPE"  # files older than the key
    if kind != "BPE":
        raise model.unsupported("type", f"is {kind!r:.80}; supported is 'BPE'")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if affix := model.string(key):
            raise model.unsupported(key, f"is {affix!r:.80}; GGUF has no such mark of words")
    vocab = model.section("vocab")
    if vocab is None:
        raise model.error("vocab", "is missing")
    merges = []
    for index, merge in enumerate(model.values("merges")):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
            raise model.error(f"merges[{index}]", f"is {merge!r:.80}, not two tokens")
        merges.append((f"merges[{index}]", tuple(parts)))
    return model, vocab.texts_by_id(), list(_checked(model, merges, vocab.content.keys()))


def _checked(
    section: Section, merges: Iterable[tuple[str, tuple[str, ...]]], known: Iterable[str]
) -> Iterator[tuple[str, str]]:
    """Merges that came with the name of their place, each checked to be of tokens."""
    known = frozenset(known)
    for place, parts in merges:
        if len(parts) != 2 or not all(parts):
            raise section.error(place, f"is {' '.join(parts)!r:.80}, not two tokens")
        left, right = parts
        for text in (left, right, left + right):
            if text not in known:
                raise section.error(
                    place, f"is {' '.join(parts)!r:.80}, but {text!r:.80} is not in the vocabulary"
                )
        yield left, right


def _pre_steps(tokenizer: Section) -> list[Section]:
    return tokenizer.steps("pre_tokenizer", "pretokenizers")


def _pre_of_steps(files: Folder, tokenizer: Section, whole_words: bool) -> str:
    """The name of the pre-tokenizer; "default", with a warning, when it has none."""
    nfc = False
    for step in tokenizer.steps("normalizer", "normalizers"):
        if step.string("type") == "NFC":
            nfc = True
        else:
            logger.warning(
                "%s: GGUF cannot express the normalizer %s; texts that it changes get other tokens",
                *(tokenizer.source, step.string("type")),
            )
    steps = _pre_steps(tokenizer)
    for step in steps:
        if step.string("type") == "ByteLevel" and step.flag("add_prefix_space"):
            logger.warning(
                "%s: puts a space before each text, which GGUF cannot express for BPE; "
                "the first word of a text gets another token",
                tokenizer.source,
            )
    name = _name(tokenizer, steps, whole_words, nfc)
    if name is None:
        logger.warning(
            "%s: pre_tokenizer is of no known family; 'default' is written, which may cut words "
            "differently from the model's own",
            tokenizer.source,
        )
        return "default"
    if files.json("tokenizer_config.json").flag("clean_up_tokenization_spaces") is False:
        return _WITHOUT_CLEAN_UP.get(name, name)
    return name


def _name(tokenizer: Section, steps: list[Section], whole_words: bool, nfc: bool) -> str | None:
    """The family that cuts as the steps do."""
    patterns = tuple(_canonical(_pattern(step)) for step in steps)
    if patterns == tuple(map(_canonical, _FALCON_STEPS)):
        return "falcon"
    if "ByteLevel" in [step.string("type") for step in steps[:-1]]:
        return None  # what comes after it sees bytes, not characters
    patterns = tuple(pattern for pattern in patterns if pattern)
    alike = [
        name for name in _NAMES if tuple(map(_canonical, PRE_TOKENIZERS[name].patterns)) == patterns
    ]
    wanted = PreTokenizer(PRE_TOKENIZERS[alike[0]].patterns, whole_words, nfc) if alike else None
    exact = next((name for name in alike if PRE_TOKENIZERS[name] == wanted), None)
    if alike and exact is None:
        logger.warning(
            "%s: %r is written as the pre-tokenizer, which cuts words alike, but differs in that "
            "words that are tokens stay whole, or in Unicode's composed form (NFC)",
            *(tokenizer.source, alike[0]),
        )
    return exact or next(iter(alike), None)


def _pattern(step: Section) -> str:
    """The regular expression that cuts as a step does; a name that is none of them for others."""
    kind = step.string("type")
    if kind == "ByteLevel":
        return "" if step.flag("use_regex") is False else _GPT2
    if kind == "Digits":
        return r"\p{N}" if step.flag("individual_digits") else r"\p{N}+"
    behavior = step.string("behavior")
    if kind == "Punctuation" and behavior == "Contiguous":
        return _PUNCTUATION
    if kind == "Split":
        section = step.section("pattern")
        pattern = (section and section.string("Regex")) or ""
        if (behavior, step.flag("invert") or False) == ("Isolated", False):
            return pattern or "Split by a string"
        # To keep the matches alone is the same where everything matches.
        if (behavior, step.flag("invert")) == ("Removed", True) and pattern.endswith(r"|\s+"):
            return pattern
    return f"unknown {kind}"


def _canonical(pattern: str) -> str:
    """A pattern with all but ASCII as escapes: some files have characters there, some escapes."""
    return "".join(map(_escape, pattern.replace(r"\"", '"')))


def _escape(char: str) -> str:
    if " " <= char <= "~":
        return char
    if char in "\r\n":
        return r"\r" if char == "\r" else r"\n"
    return rf"\u{ord(char):04X}" if char < "\U00010000" else rf"\x{{{ord(char):X}}}"


def _pre_of_model(files: Folder) -> str:
    """The name of the pre-tokenizer, by the program that the model's vocab.json is for."""
    model = files.json("config.json").string("model_type")
    kind = files.json("tokenizer_config.json").string("tokenizer_class")
    name = _PRE_OF_MODEL.get(model or "") or _PRE_OF_CLASS.get((kind or "").removesuffix("Fast"))
    if name is None:
        logger.warning(
            "%s: neither model_type %r nor tokenizer_class %r tells how texts are cut into words; "
            "'default' is written, which may differ from the model's own (tokenizer.json tells it)",
            *(files.path, model, kind),
        )
    return name or "default"
