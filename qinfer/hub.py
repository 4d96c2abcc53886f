"""Where a model comes from: a path, a repository on the Hugging Face hub, or an alias."""

from __future__ import annotations

import logging
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from ._alias import ALIASES, EMBEDDED, Progress, embedded, fetch, is_here
from ._files import StrPath
from .errors import ArgumentError, FileError, FormatError, QInferError

logger = logging.getLogger("qinfer")

_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_REPOSITORY = re.compile(rf"({_NAME}/{_NAME})(?::(.+))?")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_CHECKPOINT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
_MOST_LISTED = 20


def resolve(model: StrPath, *, progress: Progress | None = None) -> Path:
    """The local file of a model; of a split model, its first part.

    Args:
        model: a path; "owner/repository" or "owner/repository:GLOB" on the Hugging Face hub, as in
            `download`; or an alias. "stories" comes with this package; others are fetched once
            with pip and then kept in $QINFER_CACHE_DIR, else $XDG_CACHE_HOME/qinfer, else
            ~/.cache/qinfer.
        progress: called as `progress(done, total)`, in bytes, while an alias is fetched; without it
            a bar is shown on a terminal.

    Raises:
        FileError: there is no such file, or it cannot be fetched or kept.
        FormatError: the folder or repository holds a checkpoint, not a GGUF file.
        ArgumentError: a folder or repository with no model, or with several that match.
    """
    path = Path(model)
    if path.is_dir():
        return _in_folder(path)
    if path.exists() or not isinstance(model, str):
        return path
    if model in EMBEDDED:
        return embedded(model)
    if model in ALIASES:
        return fetch(model, progress)
    match = _REPOSITORY.fullmatch(model)
    if match is None or (match[2] is None and model.endswith(".gguf")):
        raise FileError(
            f"{model}: there is no such file, and it is neither owner/repository[:GLOB] nor an "
            f"alias ({', '.join([*EMBEDDED, *ALIASES])})"
        )
    return download(match[1], match[2])


def call_that_gets(name: str) -> str | None:
    """The Python call for a name of `resolve` that is no path: an alias, or one on the hub."""
    match = _REPOSITORY.fullmatch(name)
    if name in EMBEDDED:
        return "Model.demo()"
    if name in ALIASES or (match is not None and match[2] is None and not name.endswith(".gguf")):
        return f"Model.from_pretrained({name!r})"
    return f"Model.from_pretrained{match.groups()!r}" if match is not None and match[2] else None


# ---- folders and repositories ----


def _in_folder(folder: Path) -> Path:
    names = [item.name for item in folder.iterdir() if item.is_file()]
    if any(name.endswith(".gguf") for name in names):
        return folder / _choose(names, None, str(folder))[0]
    if any(name.endswith(_CHECKPOINT_SUFFIXES) for name in names):
        source = shlex.quote(str(folder))
        target = shlex.quote(f"{folder.resolve().name}.gguf")
        raise FormatError(
            f"{folder} is a checkpoint; make a GGUF file of it first: "
            f"python -m qinfer.tools.convert_dense {source} --outfile {target}"
        )
    raise ArgumentError(f"{folder} is a folder without a .gguf file")


def _choose(names: Iterable[str], pattern: str | None, where: str) -> list[str]:
    """The one model that a pattern matches: its file, or all its parts in order."""
    models: dict[str, list[str]] = {}
    for name in sorted(names):
        if name.endswith(".gguf"):
            part = _SHARD.fullmatch(name)
            models.setdefault(f"{part[1]}-*-of-{part[3]}.gguf" if part else name, []).append(name)
    found = {
        model: parts
        for model, parts in models.items()
        if pattern is None or pattern == model or any(_matches(part, pattern) for part in parts)
    }
    if pattern in found:
        found = {pattern: found[pattern]}
    if len(found) != 1:
        asked = "" if pattern is None else f" matching {pattern!r}"
        kind = f"several models{asked}" if found else f"no model{asked}"
        listed = list(found or models)
        more = f" and {len(listed) - _MOST_LISTED} more" if len(listed) > _MOST_LISTED else ""
        candidates = ", ".join(listed[:_MOST_LISTED]) + more
        raise ArgumentError(f"{where} holds {kind}; it has {candidates or 'no .gguf file'}")
    (parts,) = found.values()
    return _complete(parts, where)


def _matches(name: str, pattern: str) -> bool:
    """Whether a glob fits a path or its last component, in any case."""
    path, pattern = name.lower(), pattern.lower()
    return fnmatchcase(path, pattern) or fnmatchcase(PurePosixPath(path).name, pattern)


def _complete(parts: list[str], where: str) -> list[str]:
    match = _SHARD.fullmatch(parts[0])
    if match is not None:
        wanted = [f"{match[1]}-{i:05}-of-{match[3]}.gguf" for i in range(1, int(match[3]) + 1)]
        missing = [name for name in wanted if name not in parts]
        if missing:
            raise FileError(
                f"{where} lacks {len(missing)} of the {len(wanted)} parts of a model, {missing[0]} "
                "for one"
            )
    return parts


# ---- the hub ----


def download(
    repo_id: str,
    filename: str | None = None,
    *,
    revision: str | None = None,
    cache_dir: StrPath | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """A model from the Hugging Face hub, downloaded once; of a split model, its first part.

    The statistics and GPU indices of a PowerInfer repository come along, in the same folder. When
    the hub cannot be reached, what was downloaded before is used, which is logged.

    Args:
        repo_id: "owner/name", or an alias.
        filename: a file's name or a glob such as "*q4*.gguf", in any case; it must match one model.
            None is for repositories that hold just one.
        revision: a branch, tag or commit.
        cache_dir: where downloads are kept, instead of the hub's own cache.
        token: for private repositories; True takes the one that is logged in, False none.
        local_files_only: never goes to the network.

    Raises:
        ArgumentError: there is no such repository or revision, it needs a token, or the number of
            models that match is not one; the message lists them.
        FormatError: the repository holds a checkpoint, not a GGUF file.
        FileError: the hub cannot be reached and the model is not there yet, or cannot be written.
    """
    if repo_id in ALIASES or repo_id in EMBEDDED:
        return _alias(repo_id, filename, revision, local_files_only)
    if not _REPOSITORY.fullmatch(repo_id) or ":" in repo_id:
        raise ArgumentError(f"repository {repo_id!r} is not of the form owner/name")
    if local_files_only:
        return _cached(repo_id, filename, revision, cache_dir)
    # The hub's library reads the variable once, when it is imported.
    endpoint = os.environ.get("HF_ENDPOINT") or None
    with _hub_errors(repo_id, revision):
        from huggingface_hub import HfApi, hf_hub_download

        try:
            info = HfApi(endpoint=endpoint).model_info(repo_id, revision=revision, token=token)
        except Exception as error:
            if _is_refusal(error):
                raise
            return _without_hub(repo_id, filename, revision, cache_dir, error)
        names = _wanted([file.rfilename for file in info.siblings or ()], filename, repo_id)
        paths = [
            Path(
                hf_hub_download(
                    repo_id,
                    name,
                    revision=revision,
                    cache_dir=None if cache_dir is None else Path(cache_dir),
                    token=token,
                    endpoint=endpoint,
                )
            )
            for name in names
        ]
    if len({path.parents[name.count("/")] for path, name in zip(paths, names, strict=True)}) > 1:
        raise FileError(f"{repo_id} changed while it was downloaded; try again")
    return paths[0]


def _alias(name: str, filename: str | None, revision: str | None, local_files_only: bool) -> Path:
    if filename is not None or revision is not None:
        raise ArgumentError(f"{name} is an alias, of one file in one version")
    if name in EMBEDDED:
        return embedded(name)
    if local_files_only and not is_here(name):
        raise FileError(f"{name} has not been fetched yet")
    return fetch(name, None)


def _wanted(names: list[str], pattern: str | None, repo_id: str) -> list[str]:
    """The files to download: the parts of the model, then what belongs to it."""
    if not any(name.endswith(".gguf") for name in names) and any(
        name.endswith(_CHECKPOINT_SUFFIXES) for name in names
    ):
        raise FormatError(
            f"{repo_id} holds a checkpoint, not a GGUF file; download it to a folder and run "
            "python -m qinfer.tools.convert_dense FOLDER --outfile NAME.gguf"
        )
    parts = _choose(names, pattern, repo_id)
    folder = PurePosixPath(parts[0]).parent
    companions = [
        name
        for name in names
        if (path := PurePosixPath(name)).parent == folder / "activation"
        or (path.parent == folder and path.suffix == ".gpuidx")
    ]
    return parts + companions


def _without_hub(
    repo_id: str,
    filename: str | None,
    revision: str | None,
    cache_dir: StrPath | None,
    problem: Exception,
) -> Path:
    try:
        path = _cached(repo_id, filename, revision, cache_dir)
    except QInferError as error:
        raise FileError(f"the hub cannot be reached ({problem}), and {error}") from None
    logger.warning("the hub cannot be reached (%s); using %s", problem, path)
    return path


def _cached(
    repo_id: str, filename: str | None, revision: str | None, cache_dir: StrPath | None
) -> Path:
    """A model that was downloaded before, in the folders of the hub's cache."""
    from huggingface_hub import constants

    cache = Path(cache_dir if cache_dir is not None else constants.HF_HUB_CACHE)
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    revision = revision or constants.DEFAULT_REVISION
    reference = repository / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    snapshot = repository / "snapshots" / commit
    if not snapshot.is_dir():
        raise FileError(f"{repo_id} at revision {revision} is not in {cache}")
    # A link whose target is gone, or not yet there, is not a file.
    names = [
        item.relative_to(snapshot).as_posix() for item in snapshot.rglob("*") if item.is_file()
    ]
    return snapshot / _wanted(names, filename, str(snapshot))[0]


def _is_refusal(error: Exception) -> bool:
    """Whether the hub answered, and said no."""
    from huggingface_hub import errors

    refusals = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)
    return isinstance(error, (*refusals, errors.HFValidationError))


@contextmanager
def _hub_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turns the exceptions of the hub's library into ours."""
    from huggingface_hub import errors

    try:
        yield
    except QInferError:
        raise
    except errors.GatedRepoError:
        raise ArgumentError(
            f"{repo_id} is gated: accept its conditions on its page on the hub, then give token="
        ) from None
    except errors.RepositoryNotFoundError:
        raise ArgumentError(
            f"there is no repository {repo_id} on the hub, or it is private and needs token="
        ) from None
    except errors.RevisionNotFoundError:
        raise ArgumentError(f"{repo_id} has no revision {revision!r}") from None
    except errors.HFValidationError as error:
        raise ArgumentError(str(error)) from None
    except Exception as error:
        raise FileError(f"{repo_id} cannot be downloaded: {error}") from error
