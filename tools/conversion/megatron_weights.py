"""The Megatron side of a conversion: tensors of a ``torch_dist`` checkpoint.

Such a checkpoint is one of ``torch.distributed.checkpoint`` (dcp) with Megatron's keys. dcp alone
reads and writes it here, one region of a tensor at a time, without a model and without a process
group.
"""

import io
import itertools
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from tqdm import tqdm

from conversion import inert_pickles
from conversion.huggingface_weights import read_json
from conversion.mismatch import first_line, mismatch, summary
from conversion.weight_names import (
    EMBEDDING,
    LAYERS,
    ModelShape,
    Place,
    Weight,
    rows_of,
    stateful_modules,
)
from megatron_rmt.job.digests import damage, recorded_digests
from megatron_rmt.job.text_files import read_text_file

TRACKER = "latest_checkpointed_iteration.txt"
# Where Megatron keeps what is no tensor, among it the arguments of the training job: an object of
# the checkpoint, or a file of its own in older ones.
COMMON_STATE, COMMON_FILE = "common_state/shard_0_1", "common.pt"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def write_megatron_weights(
    directory: Path, read: Callable[[str], torch.Tensor], shape: ModelShape, dtype: torch.dtype
) -> None:
    """Write a model's weights as Megatron's ``dist_checkpointing.save`` would, and nothing else.

    Args:
        directory: Directory of one iteration, to be created.
        read: Gives the Hugging Face tensor of a name.
        dtype: What to store.

    Raises:
        OSError: The disk is full, or something else went wrong there.
    """
    with warnings.catch_warnings():
        # One process writes everything, and dcp warns that this must be meant.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.save(
                {},
                storage_writer=dcp.FileSystemWriter(
                    directory,
                    thread_count=1,
                    # Each tensor is written before the next is asked for, with a GPU as well.
                    per_thread_copy_ahead=0,
                ),
                planner=_StreamingPlanner(read, shape, dtype),
                no_dist=True,
            )
        except CheckpointException as error:
            raise _cause(error) from error
    (directory / "metadata.json").write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    )


def _cause(error: CheckpointException) -> BaseException:
    """What went wrong in the one process; torch's writer hides an ``OSError`` behind its own."""
    first, _ = error.failures[0]
    cause: BaseException | None = first
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return first if cause is None else cause


class _StreamingPlanner(dcp.DefaultSavePlanner):
    """Writes one chunk for each place of each table row, made when its turn to be written comes.

    The writer must have written one before it asks for the next, whose memory may be the same.
    """

    def __init__(
        self, read: Callable[[str], torch.Tensor], shape: ModelShape, dtype: torch.dtype
    ) -> None:
        super().__init__(flatten_state_dict=False)
        self.read, self.shape, self.dtype = read, shape, dtype
        # By key and offsets, the row and the place that are written there.
        self.places: dict[tuple[str, tuple[int, ...]], tuple[Weight, Place]] = {}
        self.objects = _objects(shape)
        self.written = torch.empty(0)
        self.progress = tqdm(desc="to Megatron", unit=" tensors", disable=None)

    def create_local_plan(self) -> SavePlan:
        items = [
            item for weight, place in rows_of(self.shape) for item in self._items(weight, place)
        ]
        items += [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self.objects]
        self.plan = SavePlan(items)
        self.progress.reset(len(items))
        return self.plan

    def _items(self, weight: Weight, place: Place) -> Iterator[WriteItem]:
        local = weight.megatron_shape(self.shape)
        for key, within, stack in weight.stored_at(place, self.shape):
            offsets = torch.Size([*within, *(0 for _ in local)])
            self.places[key, offsets] = weight, place
            yield WriteItem(
                MetadataIndex(key, offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    ChunkStorageMetadata(offsets, torch.Size([*(1 for _ in within), *local])),
                    TensorProperties(dtype=weight.dtype or self.dtype),
                    torch.Size([*stack, *local]),
                ),
            )

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """Read, pack and cast the Hugging Face parts of one chunk."""
        self.progress.update()
        if self.progress.n == self.progress.total:
            self.progress.close()
        key = write_item.index.fqn
        if write_item.type == WriteItemType.BYTE_IO:
            return self.objects[key]
        offsets = write_item.index.offset
        weight, place = self.places[key, offsets]
        # The writer keeps a tensor of each key until its file is complete, long after writing it.
        self.written.untyped_storage().resize_(0)
        self.written = weight.pack(self.read, place, self.shape, self.dtype)
        return self.written[(None,) * (len(offsets) - self.written.ndim)]


def _objects(shape: ModelShape) -> dict[str, io.BytesIO]:
    """What Megatron expects in a checkpoint beside tensors, by key.

    ``_extra_state`` belongs to linears and norms (it holds FP8 scales with Transformer Engine) and
    is empty here; ``common_state`` is what ``load_common_state_dict`` reads.
    """
    common = {
        "checkpoint_version": 3.0,
        "iteration": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }
    objects: dict[str, Any] = {COMMON_STATE: common}
    objects["decoder.final_layernorm._extra_state/shard_0_1"] = None
    for module, layer in stateful_modules(shape):
        experts = (shape.experts,) if ".experts." in module else ()
        for expert in np.ndindex(experts):
            name, place, stack = f"{LAYERS}{module}", (layer, *expert), (shape.layers, *experts)
            if shape.dense_layers:
                name = f"{LAYERS}{layer}.{module}"
                place, stack = (place[1:], stack[1:]) if experts else ((0,), (1,))
            offsets, sizes = (".".join(map(str, numbers)) for numbers in (place, stack))
            objects[f"{name}._extra_state/shard_{offsets}_{sizes}"] = None
    serialised = {}
    for key, value in objects.items():
        serialised[key] = io.BytesIO()
        torch.save([value], serialised[key])
    return serialised


class MegatronWeights:
    """Model tensors of one saved iteration, read one region at a time.

    Its index is a pickle, as all of ``torch.distributed.checkpoint`` has it, and is read as
    ``inert_pickles`` does.

    Raises:
        ValueError: The directory is not a complete torch_dist checkpoint.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.reader = dcp.FileSystemReader(directory)
        self.digests = _recorded_digests(directory)
        self._check_digests({".metadata"})
        index = _read_index(directory)
        self.reader.set_up_storage_reader(index, is_coordinator=True)
        self.stored: dict[str, TensorStorageMetadata] = {
            key: value
            for key, value in index.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }
        self.objects = index.state_dict_metadata.keys() - self.stored.keys()
        self.chunks: dict[tuple[str, int], dict[Place, list[ChunkStorageMetadata]]] = {}

    def arguments(self) -> dict[str, Any]:
        """The arguments of the training job that saved this; empty if none did.

        Raises:
            ValueError: They cannot be read.
        """
        self._check_files({COMMON_STATE})
        try:
            if (self.directory / COMMON_FILE).exists():
                with (self.directory / COMMON_FILE).open("rb") as file:
                    common = inert_pickles.load_saved(file)
            elif COMMON_STATE in self.objects:
                planner = _ObjectPlanner()
                self.reader.read_data(LoadPlan([_OBJECT]), planner).wait()
                (common,) = planner.found
            else:
                return {}
            arguments = common.get("args")
            return {} if arguments is None else dict(vars(arguments))
        except Exception as error:
            # A damaged pickle raises whatever the bytes happen to lead to.
            raise ValueError(
                f"The arguments of the training job in {self.directory} cannot be read "
                f"({first_line(error)}); copy it again, or choose another --iteration."
            ) from error

    def keys(self) -> set[str]:
        """Keys of all tensors and objects."""
        return {*self.stored, *self.objects}

    def check(self, shape: ModelShape) -> None:
        """Compare keys, shapes, dtypes and files with the table; a padded vocabulary may be larger.

        Raises:
            ValueError: Tensors are missing, of another shape or dtype, unknown to the family's
                table, or in files that are cut.
        """
        missing, unexpected, others = [], [], []
        expected: set[str] = set()
        stacked: dict[str, tuple[int, ...]] = {}
        for weight, place in rows_of(shape):
            key, depth, found = self._find(weight, place)
            expected |= {key, *weight.keys, *(own for own, _, _ in weight.stored_at(place, shape))}
            wanted = weight.megatron_shape(shape)
            stack = weight.stack(shape)[len(place) - depth :]
            if found is not None and tuple(self.stored[key].size)[:depth] != stack:
                stacked.setdefault(key, stack)
            if found is None:
                missing.append(key)
            elif found[1:] != wanted[1:] or not (
                found[0] == wanted[0] or (weight.per_vocabulary and found[0] > wanted[0])
            ):
                others.append(f"{key} has shape {list(found)}, not {list(wanted)}")
            elif self.stored[key].properties.dtype not in DTYPES:
                dtype = self.stored[key].properties.dtype
                others.append(f"{key} is stored as {dtype}, not as a floating-point weight")
        for key, stored in self.stored.items():
            if not key.startswith(("decoder.", "embedding.", "output_layer.")):
                continue
            if key not in expected:
                unexpected.append(key)
            if key in stacked:
                found, stack = list(stored.size)[: len(stacked[key])], list(stacked[key])
                others.append(f"{key} stacks {found} tensors, not {stack}")
        problems = mismatch(missing, unexpected, others)
        if problems:
            raise ValueError(
                f"The weights in {self.directory} do not match config.json: {problems}."
            )
        self._check_files(expected)

    def _check_files(self, keys: set[str]) -> None:
        """Every chunk lies within its file, which is as it was written."""
        problems = []
        sizes: dict[str, int] = {}
        for index, chunk in self.reader.storage_data.items():
            if index.fqn not in keys:
                continue
            name = chunk.relative_path
            if name not in sizes:
                path = self.directory / name
                sizes[name] = path.stat().st_size if path.is_file() else -1
            if sizes[name] < 0:
                problems.append(f"{name} is missing")
            elif sizes[name] < chunk.offset + chunk.length:
                problems.append(f"{name} is cut")
        if problems:
            raise ValueError(f"{self.directory} is incomplete: {summary(problems)}; copy it again.")
        self._check_digests(sizes.keys())

    def _check_digests(self, names: Set[str]) -> None:
        """Reads each file that has a digest once, whichever of its tensors are asked for."""
        own = self.digests.keys() & names
        problems = damage(self.directory, sorted(own), self.digests)
        self.digests = {name: crc for name, crc in self.digests.items() if name not in own}
        if problems:
            raise ValueError(
                f"{self.directory} is damaged: {summary(problems)}; copy it again, choose another "
                "--iteration, or delete rmt_digest_*.json in it to read it as it is."
            )

    def _find(self, weight: Weight, place: Place) -> tuple[str, int, tuple[int, ...] | None]:
        """Key, how many axes of it number places, and shape of one place (None: not there).

        Megatron stacks layers under one key, unless they differ from one another.
        """
        for key in weight.keys:
            if place:
                numbered = key.replace(LAYERS, f"{LAYERS}{place[0]}.")
                if numbered in self.stored:
                    size = tuple(self.stored[numbered].size)
                    if any(n >= count for n, count in zip(place[1:], size, strict=False)):
                        return f"{numbered} at {place[1:]}", len(place) - 1, None
                    return numbered, len(place) - 1, size[len(place) - 1 :]
            if key in self.stored:
                size = tuple(self.stored[key].size)
                if any(number >= count for number, count in zip(place, size, strict=False)):
                    return f"{key} at {place}", len(place), None
                return key, len(place), size[len(place) :]
        return weight.megatron, len(place), None

    def read(self, weight: Weight, place: Place, shape: ModelShape) -> torch.Tensor:
        """The tensor of one place, without the rows that pad the vocabulary."""
        key, depth, _ = self._find(weight, place)
        place = place[len(place) - depth :]
        local = weight.megatron_shape(shape)
        offsets, lengths = (*place, *(0 for _ in local)), (*(1 for _ in place), *local)
        region = ChunkStorageMetadata(torch.Size(offsets), torch.Size(lengths))
        stored = self.stored[key]
        near = TensorStorageMetadata(stored.properties, stored.size, self._chunks_at(key, place))
        items = create_read_items_for_chunk_list(key, near, [region])
        if sum(math.prod(item.lengths) for item in items) != math.prod(local):
            raise ValueError(
                f"{self.directory / '.metadata'} is damaged (no chunk, or two, for a part of "
                f"{key}); choose another --iteration."
            )
        target = torch.empty(lengths, dtype=stored.properties.dtype)
        try:
            self.reader.read_data(LoadPlan(items), _RegionPlanner(target)).wait()
        except Exception as error:
            # Bytes at the wrong place raise whatever they happen to lead to.
            raise ValueError(
                f"{key} cannot be read from {self.directory} ({first_line(error)}); copy it again, "
                "or choose another --iteration."
            ) from error
        return target.reshape(local)

    def _chunks_at(self, key: str, place: Place) -> list[ChunkStorageMetadata]:
        """The chunks that may hold a place: comparing with all is slow where experts are many."""
        depth = len(place)
        if (key, depth) not in self.chunks:
            by_place: dict[Place, list[ChunkStorageMetadata]] = {}
            for chunk in self.stored[key].chunks:
                ranges = zip(chunk.offsets[:depth], chunk.sizes[:depth], strict=True)
                for covered in itertools.product(*(range(o, o + size) for o, size in ranges)):
                    by_place.setdefault(covered, []).append(chunk)
            self.chunks[key, depth] = by_place
        return self.chunks[key, depth].get(place, [])

    def dtype(self) -> torch.dtype:
        """The dtype that the embedding, and so the model, is stored in."""
        return self.stored[EMBEDDING.megatron].properties.dtype


class _RegionPlanner(DefaultLoadPlanner):
    """Lets ``FileSystemReader.read_data`` copy into one tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        region = self.target
        for axis, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            region = region.narrow(axis, start, length)
        return region


class _ObjectPlanner(DefaultLoadPlanner):
    """Lets ``FileSystemReader.read_data`` leave one object here."""

    found: Any = None

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.found = inert_pickles.load_saved(value)


# What reads the common state.
_OBJECT = ReadItem(
    type=LoadItemType.BYTE_IO,
    dest_index=MetadataIndex(COMMON_STATE),
    dest_offsets=torch.Size([0]),
    storage_index=MetadataIndex(COMMON_STATE),
    storage_offsets=torch.Size([0]),
    lengths=torch.Size([0]),
)


def _recorded_digests(directory: Path) -> dict[str, str]:
    try:
        return recorded_digests(directory)
    except ValueError as error:
        raise ValueError(f"{directory} is damaged: {error}.") from None


def _read_index(directory: Path) -> Metadata:
    """The index of a torch_dist checkpoint.

    Raises:
        ValueError: It is missing, of another format, or damaged.
    """
    if not (directory / "metadata.json").exists() or not (directory / ".metadata").exists():
        raise ValueError(
            f"{directory} is not a complete torch_dist checkpoint (metadata.json, .metadata); "
            "train with --ckpt-format torch_dist, or choose another --iteration."
        )
    format_name = read_json(directory / "metadata.json").get("sharded_backend")
    if format_name != "torch_dist":
        raise ValueError(
            f"{directory / 'metadata.json'} says sharded_backend={format_name!r}; only torch_dist "
            "checkpoints are read: train with --ckpt-format torch_dist, or copy the file again."
        )
    try:
        with (directory / ".metadata").open("rb") as file:
            index = inert_pickles.load(file)
        _check_index(index)
    except Exception as error:
        # A damaged pickle raises whatever the bytes happen to lead to.
        raise ValueError(
            f"{directory / '.metadata'} is damaged ({first_line(error)}); choose another "
            "--iteration."
        ) from error
    return index


def _check_index(index: Any) -> None:
    """Check that an index consists of what dcp takes for granted.

    Raises:
        TypeError: A part is of another kind.
        ValueError: A chunk is outside its tensor.
    """
    _expect(index, Metadata)
    for key, stored in _expect(index.state_dict_metadata, dict).items():
        _expect(key, str)
        if isinstance(stored, BytesStorageMetadata):
            continue
        _expect(_expect(stored, TensorStorageMetadata).properties, TensorProperties)
        size = _expect(stored.size, torch.Size)
        for chunk in _expect(stored.chunks, list):
            offsets = _expect(_expect(chunk, ChunkStorageMetadata).offsets, torch.Size)
            lengths = _expect(chunk.sizes, torch.Size)
            for offset, length, whole in zip(offsets, lengths, size, strict=True):
                if not 0 <= offset <= offset + length <= whole:
                    raise ValueError(f"a chunk of {key} is outside of it")
    for place, piece in _expect(index.storage_data, dict).items():
        _expect(_expect(place, MetadataIndex).fqn, str)
        _expect(_expect(piece, _StorageInfo).relative_path, str)
        if min(_expect(piece.offset, int), _expect(piece.length, int)) < 0:
            raise ValueError(f"{place.fqn} is before its file")


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{type(value).__name__} for {kind.__name__}")
    return value


def iteration_directory(source: Path, iteration: int | None) -> Path:
    """Directory of one saved iteration; None stands for the one that Megatron would load.

    Raises:
        ValueError: There is no such iteration.
    """
    saved = sorted(path.name for path in source.glob("iter_*") if path.is_dir())
    if iteration is not None:
        directory = source / f"iter_{iteration:07d}"
        if not directory.is_dir():
            raise ValueError(f"--iteration {iteration} is not in {source}; found: {saved or None}.")
        return directory
    try:
        word = read_text_file(source / TRACKER).strip()
    except FileNotFoundError as error:
        raise ValueError(f"{source} is not a Megatron checkpoint: {TRACKER} is missing.") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ValueError(f"{source / TRACKER} cannot be read ({reason}).") from error
    if word != "release" and not re.fullmatch("[0-9]{1,12}", word):
        held = repr(word[:40]) if word else "nothing"
        raise ValueError(
            f"{source / TRACKER} holds {held} instead of an iteration; write one of those saved "
            f"into it ({saved or None}), or choose it with --iteration."
        )
    directory = source / ("release" if word == "release" else f"iter_{int(word):07d}")
    if not directory.is_dir():
        raise ValueError(
            f"{source / TRACKER} says {word}, but {directory} is missing; write one of those saved "
            f"into it ({saved or None}), or choose it with --iteration."
        )
    return directory
