"""The command line as a program: what goes where, statuses, errors, a real terminal."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

import qinfer
from qinfer import Model
from qinfer._gguf import GGUF, Writer
from qinfer.perplexity import perplexity
from qinfer.profile import profile
from qinfer.sparsity import Shares
from terminal import Terminal

PROMPT = "Once upon a time"
TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'bad' %}{{ raise_exception('not that') }}{% endif %}"
    "{{ m.content }}{% endfor %}"
)


def qinfer_command(*arguments: str | Path) -> list[str]:
    # -P, or a checkout that is the working directory would come before the installed package.
    return [sys.executable, "-P", "-m", "qinfer", *map(str, arguments)]


def run(*arguments: str | Path, given: str = "") -> subprocess.CompletedProcess[str]:
    """A run of the program."""
    return subprocess.run(
        qinfer_command(*arguments),
        input=given,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        timeout=120,
    )


def output_of(*arguments: str | Path, given: str = "") -> str:
    """Standard output of a run that goes well and says nothing else."""
    done = run(*arguments, given=given)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def error_of(*arguments: str | Path, status: int) -> str:
    """The one line of a run that fails."""
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.fixture(scope="module")
def greedy(stories260k: Path) -> str:
    with Model(stories260k) as model:
        return model.generate(PROMPT, max_tokens=20, temperature=0).text


# ---- run ----


def test_run_writes_the_completion_alone_to_standard_output(stories260k: Path, greedy: str) -> None:
    options = ("-p", PROMPT, "-n", "20", "--temp", "0")
    assert output_of("run", stories260k, *options) == greedy + "\n"
    assert output_of("run", "-m", stories260k, *options) == greedy + "\n"


def test_run_takes_its_prompt_from_a_file(stories260k: Path, greedy: str, tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text(PROMPT + "\n")
    options = ("-n", "20", "--temp", "0")
    assert output_of("run", stories260k, "-f", path, *options) == greedy + "\n"
    assert output_of("run", stories260k, "-f", "-", *options, given=PROMPT) == greedy + "\n"


def test_run_json_is_one_object(stories260k: Path, greedy: str) -> None:
    options = ("-p", PROMPT, "-n", "20", "--temp", "0", "--seed", "5", "--json")
    found = json.loads(output_of("run", stories260k, *options))
    assert found["text"] == greedy
    assert len(found["tokens"]) == 20
    assert found["finish_reason"] == "length"
    assert found["usage"]["completion_tokens"] == 20
    assert found["usage"]["total_tokens"] == found["usage"]["prompt_tokens"] + 20
    assert found["timings"]["tokens_per_second"] > 0
    assert found["seed"] == 5


def test_run_takes_all_that_sampling_takes(stories260k: Path) -> None:
    options = {
        "temperature": 1.1,
        "top_k": 50,
        "top_p": 0.9,
        "min_p": 0.01,
        "typical_p": 0.95,
        "repeat_penalty": 1.2,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.1,
        "penalty_window": 30,
        "dynatemp_range": 0.1,
        "dynatemp_exponent": 1.5,
        "mirostat": 2,
        "mirostat_tau": 4.0,
        "mirostat_eta": 0.2,
        "seed": 12,
        "max_tokens": 30,
    }
    names = {
        "typical_p": "typical",
        "penalty_window": "repeat-last-n",
        "dynatemp_exponent": "dynatemp-exp",
        "mirostat_tau": "mirostat-ent",
        "mirostat_eta": "mirostat-lr",
    }
    flags = [
        f"--{names.get(name, name.replace('_', '-'))}={value}" for name, value in options.items()
    ]
    with Model(stories260k, n_ctx=64, threads=1) as model:
        expected = model.generate(
            PROMPT, stop=["zebra"], ignore_eos=True, logit_bias={400: -1.5, 300: 0.5}, **options
        )
    found = output_of(
        *("run", stories260k, "-p", PROMPT, *flags, "--stop", "zebra", "--ignore-eos"),
        *("--logit-bias", "400-1.5", "--logit-bias", "300+0.5", "-c", "64", "-t", "1", "--json"),
        *("--no-mmap", "--hidden-act", "silu", "--kv-type", "f16", "--deterministic"),
    )
    assert json.loads(found)["tokens"] == expected.tokens


def test_ngl_is_answered_with_its_replacement(stories260k: Path) -> None:
    for flag in ("-ngl", "--n-gpu-layers"):
        line = error_of("run", stories260k, "-p", "a", flag, "99", status=2)
        assert "--vram-budget" in line


# ---- errors ----


def test_errors_are_one_line_and_a_status(stories260k: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(stories260k.read_bytes()[:5000])
    cases: list[tuple[tuple[str | Path, ...], int, str]] = [
        (("run", tmp_path / "none.gguf", "-p", "a"), 1, "none.gguf"),
        (("run", broken, "-p", "a"), 1, "broken.gguf"),
        (("run", tmp_path, "-p", "a", "-c", "9"), 1, str(tmp_path)),
        (("run", stories260k, "-p", "a b c d e f g h", "-c", "4"), 1, "4"),
        (("run", stories260k, "-p", "a", "--top-p", "3"), 1, "--top-p 3"),
        (("run", stories260k), 2, "-p TEXT or -f FILE"),
        (("run", stories260k, "-p", "a", "-f", stories260k), 2, "-p TEXT or -f FILE"),
        (("run", "-p", "a"), 2, "one MODEL"),
        (("run", stories260k, "-m", stories260k, "-p", "a"), 2, "one MODEL"),
        (("run", stories260k, "-p", "a", "--frob"), 2, "--frob"),
        (("run", stories260k, "-p", "a", "-n", "x"), 2, "x"),
        (("run", stories260k, "-p", "a", "--logit-bias", "5"), 2, "--logit-bias 5"),
        (("perplexity", stories260k, "-f", tmp_path / "none.txt"), 2, "none.txt"),
        (("frob",), 2, "frob"),
    ]
    with ThreadPoolExecutor() as pool:
        lines = pool.map(lambda case: error_of(*case[0], status=case[1]), cases)
        for (_, _, words), line in zip(cases, lines, strict=True):
            assert words in line


def test_text_that_is_not_utf8_is_an_error(stories260k: Path, tmp_path: Path) -> None:
    path = tmp_path / "latin1.txt"
    path.write_bytes(b"caf\xe9")
    assert "utf-8" in error_of("run", stories260k, "-f", path, status=1)


def test_a_reader_that_has_seen_enough_is_no_error(stories260k: Path) -> None:
    command = qinfer_command("run", stories260k, "-p", PROMPT, "--ignore-eos", "-c", "500")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(5)
        process.stdout.close()
        assert process.stderr.read() == b""


def test_ctrl_c_ends_a_run_quietly(stories260k: Path) -> None:
    command = qinfer_command("run", stories260k, "-p", PROMPT, "--ignore-eos", "-c", "100000")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(5)
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait(timeout=60) == 130
        # A warning that n_ctx is more than was trained, and an end to the line that shows ^C.
        assert [line[:8] for line in process.stderr.read().splitlines()] == [b"warning:", b""]


def test_warnings_are_lines_on_standard_error(stories260k: Path) -> None:
    done = run("run", stories260k, "-p", PROMPT, "-n", "1", "-c", "600")
    assert done.returncode == 0
    assert done.stderr == "warning: --ctx-size 600 is more than the 512 the model was trained for\n"


def test_help_and_version() -> None:
    assert output_of("--version") == f"qinfer {qinfer.__version__}\n"
    commands = ("run", "chat", "bench", "perplexity", "tokenize", "inspect", "doctor")
    overview = output_of("--help")
    assert output_of() == overview
    with ThreadPoolExecutor() as pool:
        texts = pool.map(lambda command: output_of(command, "--help"), commands)
        for command, text in zip(commands, texts, strict=True):
            assert f"\n  {command} " in overview
            assert text.startswith(f"Usage: qinfer {command}")


# ---- the other commands ----


def test_bench_tells_speed_beside_bandwidth(stories260k: Path) -> None:
    options = ("-p", "16", "-n", "4", "-r", "2", "-t", "1")
    found = json.loads(output_of("bench", stories260k, *options, "--json"))
    assert (found["n_prompt"], found["n_generate"], found["threads"]) == (16, 4, 1)
    assert found["prompt_rate"]["low"] <= found["prompt_rate"]["median"]
    assert found["generation_rate"]["median"] > 0
    assert found["read_bandwidth"]["median"] > 1e8
    with Model(stories260k) as model:
        assert found["bytes_per_token"] == model.info.n_bytes_per_token
    rate = found["bytes_per_second"]
    assert rate == pytest.approx(found["bytes_per_token"] * found["generation_rate"]["median"])
    assert found["share"] == pytest.approx(rate / found["read_bandwidth"]["median"])
    text = output_of("bench", stories260k, *options)
    assert re.search(r"^prompt 16 +[\d.]+ tokens/s", text, re.MULTILINE)
    assert re.search(r"^generate 4 +[\d.]+ tokens/s", text, re.MULTILINE)
    assert "GB/s this machine reads" in text


def test_perplexity_shows_values_as_they_come_and_the_last(
    stories260k: Path, tmp_path: Path
) -> None:
    text = " ".join(f"{PROMPT} there was a dog number {i}." for i in range(40))
    path = tmp_path / "text.txt"
    path.write_text(text)
    values: list[float] = []
    with Model(stories260k) as model:
        n_chunks = len(model.tokenizer.encode(text)) // 64
        result = perplexity(model, text, n_ctx=64, on_chunk=lambda _, value: values.append(value))
    assert len(values) == n_chunks > 5
    assert result.n_scored == n_chunks * 31
    shown = "".join(f"[{i}]{value:.4f}," for i, value in enumerate(values, 1))
    assert (
        output_of("perplexity", stories260k, "-f", path, "-c", "64")
        == f"{shown}\nFinal: PPL = {result.value:.4f} +/- {result.error:.5f}\n"
    )
    two = output_of("perplexity", stories260k, "-f", path, "-c", "64", "--chunks", "2")
    assert two.splitlines()[0] == f"[1]{values[0]:.4f},[2]{values[1]:.4f},"


def test_perplexity_says_which_share_of_neurons_it_took(tmp_path: Path) -> None:
    text = "Once upon a time there was a little girl who loved to play in the park. " * 8
    (tmp_path / "text.txt").write_text(text)
    with Model.demo() as model:
        off, exact = (perplexity(model, text, n_ctx=64, sparsity=mode) for mode in ("off", "exact"))
        counted = profile(model, text, n_ctx=64, n_chunks=2).active.mean()
        all_named = perplexity(model, text, n_ctx=64, sparsity="predict", sparse_threshold=-1e9)
        none_named = perplexity(model, text, n_ctx=64, sparsity="predict", sparse_threshold=1e9)
        own, early = (
            perplexity(model, text, n_ctx=64, sparsity="predict", cross_layer_from=layer)
            for layer in (None, 1)
        )
    assert off.n_scored == 2 * 31 and off.neurons is None
    assert exact == replace(off, neurons=Shares(exact.neurons.active))
    assert exact.neurons.active == pytest.approx(counted)
    assert all_named.value == exact.value
    assert all_named.neurons == Shares(exact.neurons.active, predicted=1.0, missed=0.0)
    assert none_named.neurons == Shares(active=0.0, predicted=0.0, missed=1.0)
    # Predictors were trained on the layer's own input.
    assert own.neurons.missed < early.neurons.missed < 1.0
    assert own.value != early.value

    command = ("perplexity", "stories", "-f", tmp_path / "text.txt", "-c", "64")
    assert "Neurons" not in output_of(*command)
    line = f"Neurons: {exact.neurons.active:.1%} active"
    assert output_of(*command, "--sparsity", "exact").splitlines()[1] == line
    early_line = output_of(*command, "--sparsity", "predict", "--cross-layer-from", "1")
    assert f"{early.neurons.missed:.1%} of those due missed" in early_line
    *_, line, last = output_of(*command, "--sparsity", "predict").splitlines()
    found = re.fullmatch(r"Neurons: (.+)% active, (.+)% predicted, (.+)% of those due missed", line)
    active, predicted, missed = map(float, found.groups())
    assert 0 < active < predicted < 50 and 0 < missed < 50
    assert last.startswith("Final: PPL = ")


def test_perplexity_is_llama_cpps(stories260k: Path, test_data: Path) -> None:
    text = test_data / "texts" / "children-stories-en.txt"
    expected = re.search(
        r"## stories260K.*\n((?:\[\d+\][\d.]+,)+)\nFinal: PPL = ([\d.]+) \+/- ([\d.]+)",
        (test_data / "expected" / "perplexity.txt").read_text(),
    )
    assert expected is not None
    running, final, error = expected.groups()
    lines = output_of("perplexity", stories260k, "-f", text, "--chunks", "20").splitlines()
    found = [float(value) for value in re.findall(r"\]([\d.]+),", lines[0])]
    wanted = [float(value) for value in re.findall(r"\]([\d.]+),", running)]
    assert found == pytest.approx(wanted, rel=0.001)
    last = re.fullmatch(r"Final: PPL = ([\d.]+) \+/- ([\d.]+)", lines[1])
    assert last is not None
    assert float(last[1]) == pytest.approx(float(final), rel=0.001)
    assert float(last[2]) == pytest.approx(float(error), rel=0.001)


def test_a_text_too_short_for_perplexity_is_an_error(stories260k: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Too short.")
    line = error_of("perplexity", stories260k, "-f", tmp_path / "text.txt", status=1)
    assert "a chunk takes 512" in line


def test_tokenize_shows_ids_and_pieces(stories260k: Path) -> None:
    with Model(stories260k) as model:
        ids = model.tokenizer.encode(PROMPT)
    assert json.loads(output_of("tokenize", stories260k, "-p", PROMPT, "--ids")) == ids
    lines = output_of("tokenize", stories260k, "-p", PROMPT).splitlines()
    assert [int(line.split(" -> ")[0]) for line in lines] == ids
    assert lines[1].split(" -> ")[1] == "' Once'"
    plain = output_of("tokenize", stories260k, "-p", "</s>", "--ids", "--no-special")
    special = output_of(
        "tokenize", stories260k, "-p", "</s>", "--ids", "--no-special", "--parse-special"
    )
    assert json.loads(special) == [2]
    assert len(json.loads(plain)) > 1


def test_inspect_shows_metadata_and_tensors(stories260k: Path) -> None:
    text = output_of("inspect", stories260k)
    assert "general.architecture" in text
    assert re.search(r"token_embd\.weight +F32 +131,072  512 x 64", text)
    found = json.loads(output_of("inspect", stories260k, "--json"))
    assert found["metadata"]["llama.block_count"] == 5
    assert len(found["metadata"]["tokenizer.ggml.tokens"]) == 512
    assert sum(tensor["n_bytes"] for tensor in found["tensors"]) == 1_040_128


def test_doctor_says_what_was_found_and_what_is_not_used() -> None:
    text = output_of("doctor")
    for subject in ("qinfer", "processor", "level", "cores", "memory", "bandwidth", "numpy"):
        assert re.search(rf"^{subject} +\S", text, re.MULTILINE)
    assert re.search(r"^CUDA +not used: ", text, re.MULTILINE)
    assert re.search(r"^CANN +not used: ", text, re.MULTILINE)


# ---- chat in a terminal ----


@pytest.fixture(scope="module")
def chat_model(stories260k: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K with a chat template."""
    path = tmp_path_factory.mktemp("chat") / "talk.gguf"
    with GGUF(stories260k) as file, Writer(path) as writer:
        for key in file.keys:
            writer.add(key, file.metadata[key], file.value_type(key).removeprefix("array of "))
        writer.add("tokenizer.chat_template", TEMPLATE)
        for tensor in file.tensors:
            writer.add_tensor(tensor.name, tensor.shape, tensor.type)
        for tensor in file.tensors:
            writer.write(tensor.data)
    return path


def test_chat_from_a_pipe(chat_model: Path, stories260k: Path) -> None:
    with Model(chat_model) as model:
        messages = [{"role": "system", "content": "Lily"}, {"role": "user", "content": PROMPT}]
        first = model.chat(messages, max_tokens=12, temperature=0).text
        messages.append({"role": "assistant", "content": first})
        messages.append({"role": "user", "content": "The dog"})
        second = model.chat(messages, max_tokens=12, temperature=0).text
    options = ("--system", "Lily", "-n", "12", "--temp", "0")
    given = f"{PROMPT}\nThe dog\n/reset\n{PROMPT}\n/exit\nnever\n"
    expected = f"{first}\n{second}\n{first}\n"
    assert output_of("chat", chat_model, *options, given=given) == expected
    done = run("chat", stories260k, given="Hello\n")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch("error: .*no chat template.*\n", done.stderr)


def test_a_conversation_that_outgrows_the_context_says_so(chat_model: Path) -> None:
    done = run("chat", chat_model, "-c", "10", "-n", "1", given=f"{PROMPT} {PROMPT}\nHi\n")
    assert done.returncode == 0
    assert re.match(r"error: .* 10.*; /reset starts over\n$", done.stderr)
    assert done.stdout.count("\n") == 1


def test_a_message_that_the_template_refuses_is_taken_back(chat_model: Path) -> None:
    options = ("-n", "12", "--temp", "0")
    expected = output_of("chat", chat_model, *options, given=f"{PROMPT}\n")
    done = run("chat", chat_model, *options, given=f"bad\n{PROMPT}\n")
    assert (done.returncode, done.stdout) == (0, expected)
    assert re.fullmatch(
        "error: .* refuses the messages: not that; /reset starts over\n", done.stderr
    )


@pytest.fixture
def talk(chat_model: Path) -> Iterator[Terminal]:
    """`qinfer chat` with a model that answers until its context ends."""
    # So long an answer takes seconds; no end of text ends it.
    options = ("-c", "100000", "--ignore-eos", "--temp", "0", "-t", "1")
    terminal = Terminal(qinfer_command("chat", chat_model, *options))
    yield terminal
    terminal.kill()


def test_ctrl_c_ends_the_answer_and_not_the_program(talk: Terminal) -> None:
    talk.wait_for("/help lists commands")
    talk.wait_for("> ")
    talk.type(f"{PROMPT}\n")
    talk.wait_for("Lily")
    talk.type("\x03")
    talk.wait_for("(stopped)")
    talk.wait_for("> ")
    talk.type("/help\n")
    assert "/reset" in talk.wait_for("Ctrl-C ends an answer")
    talk.wait_for("> ")
    talk.type("The dog\n")
    talk.wait_for(". ")
    talk.type("\x03")
    talk.wait_for("(stopped)")
    talk.wait_for("> ")
    # Python shows the prompt a moment before Ctrl-C can end its wait for a line.
    time.sleep(0.5)
    talk.type("\x03")
    talk.wait_for("/exit or Ctrl-D leaves")
    talk.wait_for("> ")
    talk.type("/frob\n")
    talk.wait_for("unknown command /frob")
    talk.wait_for("> ")
    talk.type("/exit\n")
    assert talk.end() == 0


def test_ctrl_d_leaves(talk: Terminal) -> None:
    talk.wait_for("> ")
    talk.type("\x04")
    assert talk.end() == 0
