"""What tells models, and files of one model, apart without reading all of them."""

from __future__ import annotations

import hashlib

from ._gguf import GGUF

# Bytes looked at where a tensor begins and where its middle is.
_SAMPLE = 1024


def of_file(file: GGUF) -> bytes:
    """32 bytes that tell files apart: of the header, and of samples of every tensor's data.

    A copy under another name has the same; the same model in other types has others.
    """
    digest = hashlib.sha256(file.header)
    for tensor in file.tensors:
        middle = tensor.n_bytes // 2
        digest.update(tensor.data[:_SAMPLE].data)
        digest.update(tensor.data[middle : middle + _SAMPLE].data)
    return digest.digest()


def of_model(file: GGUF) -> bytes:
    """32 bytes that tell models apart, the same for a model's files in all types.

    They are of the weights of normalisations, which no quantiser changes.
    """
    norms = {tensor.name: tensor for tensor in file.tensors if "norm" in tensor.name}
    digest = hashlib.sha256()
    for name, tensor in sorted(norms.items()):
        digest.update(f"{name} {tensor.type} {tensor.shape}\n".encode())
        digest.update(tensor.data[:_SAMPLE].data)
    return digest.digest()
