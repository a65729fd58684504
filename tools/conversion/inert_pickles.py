"""Pickles of a checkpoint, read without running anything and without importing what they name.

A Megatron checkpoint pickles its index and the arguments of the training job, among which may be
objects of the job's own script or of a package that is not installed here. Tensors, containers and
the records of ``torch.distributed.checkpoint`` are made as they are; for every other class or
function that a pickle names a ``StandIn`` is made, whatever the name.
"""

import contextlib
import io
import os
import pickle
import resource
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import filesystem, metadata

# Classes and functions that do nothing but make a container, a tensor or a record.
KNOWN = {
    ("_io", "BytesIO"): io.BytesIO,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "set"): set,
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    **{
        (record.__module__, record.__name__): record
        for record in (
            filesystem._StorageInfo,
            metadata._MEM_FORMAT_ENCODING,
            metadata.BytesStorageMetadata,
            metadata.ChunkStorageMetadata,
            metadata.Metadata,
            metadata.MetadataIndex,
            metadata.StorageMeta,
            metadata.TensorProperties,
            metadata.TensorStorageMetadata,
        )
    },
}
# Bytes of memory that one byte of a pickle may need, and what any may.
GROWTH, SPARE_BYTES = 200, 2**30
# What pickle protocol 2, torch.save's, calls the module of the built-in classes.
OLD_BUILTINS = "__builtin__"


class StandIn:
    """An object whose class was not imported: its attributes, and what its class was called with.

    A class of its own stands in for each class, which it names; ``vars`` gives the attributes.
    """

    __slots__ = ("__dict__", "called_with")
    stands_for = ""

    def __new__(cls, *arguments: Any, **keywords: Any) -> "StandIn":
        self = super().__new__(cls)
        self.called_with = arguments
        return self

    def __init__(self, *arguments: Any, **keywords: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        """Keep the attributes, given as pickle gives them: a dict, or (dict, dict of slots)."""
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.__dict__.update(part)

    def __repr__(self) -> str:
        return f"{self.stands_for}({', '.join(map(repr, self.called_with))})"

    def __call__(self, *arguments: Any, **keywords: Any) -> "StandIn":
        """What a function that stands in gives."""
        return self

    def append(self, item: Any) -> None:
        """Items of a list, a set or a dict are dropped."""

    extend = add = update = append

    def __setitem__(self, key: Any, value: Any) -> None: ...


class Unpickler(pickle.Unpickler):
    """Makes what ``KNOWN`` and torch's dtypes name, and stand-ins for everything else."""

    def find_class(self, module: str, name: str) -> Any:
        """What a pickle means by ``module`` and ``name``; nothing is imported."""
        module = "builtins" if module == OLD_BUILTINS else module
        if (module, name) in KNOWN:
            return KNOWN[module, name]
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        return type(name, (StandIn,), {"stands_for": f"{module}.{name}"})


def load(file: IO[bytes], **keywords: Any) -> Any:
    """The object of a plain pickle.

    Raises:
        Exception: Whatever damaged bytes lead to.
    """
    with _memory_for(file):
        return Unpickler(file, **keywords).load()


@contextlib.contextmanager
def _memory_for(file: IO[bytes]) -> Iterator[None]:
    """Bound this process's memory by what a file of this size may need.

    A pickle may number an object by 2**32 - 1, at which ``pickle`` makes room for all before it:
    one wrong bit takes all memory of the machine, instead of raising ``MemoryError`` as here.
    """
    position = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(position)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    bound = in_use + GROWTH * size + SPARE_BYTES
    limits = [limit for limit in (before, hard, bound) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))


class _Pickle:
    """This module in place of ``pickle``, for ``torch.load``."""

    Unpickler, load = Unpickler, staticmethod(load)
    UnpicklingError = pickle.UnpicklingError


def load_saved(file: IO[bytes], map_location: Any = "cpu") -> Any:
    """The object of a ``torch.save`` file.

    Raises:
        Exception: Whatever damaged bytes lead to.
    """
    with zipfile.ZipFile(file) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise pickle.UnpicklingError("it is a TorchScript program, not saved data")
    file.seek(0)
    with _memory_for(file):
        return _torch_load(file, map_location, _Pickle, weights_only=False)


_torch_load = torch.load


def _load_in_place_of_torch(
    file: Any, map_location: Any = "cpu", *more: Any, weights_only: bool | None = None, **kw: Any
) -> Any:
    if weights_only:
        return _torch_load(file, map_location, *more, weights_only=True, **kw)
    with contextlib.ExitStack() as stack:
        opened = file if hasattr(file, "read") else stack.enter_context(open(file, "rb"))
        return load_saved(opened, map_location)


@contextlib.contextmanager
def pickles_run_nothing() -> Iterator[None]:
    """Let torch's and Megatron's own readers of checkpoints unpickle by this module, in here."""
    filesystem.pickle, torch.load = _Pickle, _load_in_place_of_torch
    try:
        yield
    finally:
        filesystem.pickle, torch.load = pickle, _torch_load
