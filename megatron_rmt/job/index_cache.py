"""Megatron's cache of how documents are cut into samples: built anew where it cannot be right.

``GPTDataset`` keeps, under a name made of the path of the token files and the settings, the order
of documents, the first token of each sample and the order of samples. A job that is killed while
they are written leaves a part of them; token files that are replaced under the same path leave
those of the earlier corpus. Megatron loads both: the first ends in numpy's traceback, the second
trains on other text than the files hold, or reads beyond their end.
"""

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

# Entries of each of the three that are compared with the token files, the first ones.
CHECKED_ENTRIES = 10_000_000


def whole_indices(original: Callable[..., Any], dataset: Any) -> Any:
    """What ``GPTDataset`` loads or builds (``original``), from its cache only if that is right.

    Only the rank that builds the cache looks at it, which is the first one to come here.

    Raises:
        SystemExit: a wrong cache cannot be removed.
    """
    builds = not dist.is_initialized() or dist.get_rank() == 0
    if not builds or dataset.config.mock or dataset.config.defer_npy_index_mmap:
        return original(dataset)
    folder, files = _files(dataset)
    if not all(file.is_file() for file in files):
        return original(dataset)
    try:
        indices = original(dataset)
        problem = index_problem(dataset, *indices)
    except Exception as error:  # damaged bytes raise whatever they happen to lead to
        problem = " ".join(str(error).split())
    if problem is None:
        return indices
    try:
        for file in files:
            # Another job may have mapped it: it keeps what it maps, unless it is written to.
            with contextlib.suppress(FileNotFoundError):
                file.unlink()
    except OSError as error:
        raise SystemExit(
            f"RMT cannot train on this data: the cache of --data-path "
            f"{dataset.dataset.path_prefix} in {folder} is not of these token files ({problem}) "
            f"and cannot be removed ({error.strerror}); delete {files[0].name[:32]}* there."
        ) from None
    print(
        f"RMT: the cache of --data-path {dataset.dataset.path_prefix} in {folder} is not of these "
        f"token files ({problem}); it is built anew.",
        file=sys.stderr,
        flush=True,
    )
    return original(dataset)


def index_problem(
    dataset: Any, documents: np.ndarray, samples: np.ndarray, shuffled: np.ndarray
) -> str | None:
    """Why three indices cannot be those of a ``GPTDataset``; None if nothing is wrong with the
    first ``CHECKED_ENTRIES`` of each.

    documents: int32 ``[epochs x documents]``, in the order in which they are read. samples: int
    ``[samples + 1, 2]``, where each begins: its place in ``documents``, and a token there.
    shuffled: int ``[samples]``, the order in which samples are trained.
    """
    if (documents.ndim, samples.ndim, shuffled.ndim) != (1, 2, 1) or samples.shape[1] != 2:
        return "the shapes are wrong"
    own, lengths = dataset.indices, dataset.dataset.sequence_lengths
    if len(documents) == 0 or len(documents) % len(own):
        return f"it orders {len(documents)} documents, and there are {len(own)}"
    read = np.asarray(documents[:CHECKED_ENTRIES])
    if read.min() < own.min() or read.max() > own.max():
        return f"it reads document {max(read.max(), -read.min())}, and there are {len(own)}"
    # Each sample begins where the one before it ends, but for the last, which may be shorter.
    begins = np.asarray(samples[: min(CHECKED_ENTRIES, len(samples) - 1)]).astype(np.int64)
    begins = begins[np.cumprod(begins[:, 0] < len(read)).astype(bool)]
    if (len(begins) == 0 and len(samples) > 1) or begins.min(initial=0) < 0:
        return "it begins samples outside of the documents"
    ends = np.cumsum(lengths[read], dtype=np.int64)
    tokens = ends[begins[:, 0]] - lengths[read[begins[:, 0]]] + begins[:, 1]
    if (np.diff(tokens) != dataset.config.sequence_length).any():
        return "it cuts samples of other lengths"
    order = np.asarray(shuffled[:CHECKED_ENTRIES])
    if len(order) and not 0 <= order.min() <= order.max() < len(samples) - 1:
        return "it orders samples that there are none of"
    if len(np.unique(order)) != len(order):
        return "it trains a sample twice"
    return None


def _files(dataset: Any) -> tuple[Path, list[Path]]:
    kind = type(dataset).__name__
    folder = dataset.config.path_to_cache or os.path.join(
        dataset.dataset.path_prefix, "cache", f"{kind}_indices"
    )
    base = f"{dataset.unique_description_hash}-{kind}-{dataset.index_split.name}"
    names = ("description.txt", "document_index.npy", "sample_index.npy", "shuffle_index.npy")
    return Path(folder), [Path(folder, f"{base}-{name}") for name in names]
