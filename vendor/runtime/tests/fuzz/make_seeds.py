"""Writes the files a GGUF fuzzer starts from, whole and broken: `make_seeds.py FOLDER`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[4] / "tests"))

import gguf_corpus


def main(folder: Path) -> None:
    """One file per kind of file and per defect the reader knows; the largest has 66 KB."""
    folder.mkdir(parents=True, exist_ok=True)
    seeds = {name: layout.bytes for name, layout in gguf_corpus.whole_files().items()}
    seeds |= {f"broken {case.name}": case.bytes for case in gguf_corpus.broken_files()}
    for name, data in seeds.items():
        plain = "".join(letter if letter.isalnum() else "_" for letter in name)
        (folder / plain).write_bytes(data)
    print(f"{len(seeds)} seeds in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
