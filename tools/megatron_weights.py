"""The Megatron side of a conversion: tensors of a ``torch_dist`` checkpoint.

Such a checkpoint is one of ``torch.distributed.checkpoint`` (dcp) with Megatron's keys. dcp alone
reads and writes it here, one region of a tensor at a time, without a model and without a process
group.
"""

import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from tqdm import tqdm
from weight_names import FAMILIES, ModelShape, Weight, rows_of, summary, weights_of

TRACKER = "latest_checkpointed_iteration.txt"


def write_megatron_weights(
    directory: Path, read: Callable[[str], torch.Tensor], shape: ModelShape, dtype: torch.dtype
) -> None:
    """Write a model's weights as Megatron's ``dist_checkpointing.save`` would, and nothing else.

    Args:
        directory: Directory of one iteration, to be created.
        read: Gives the Hugging Face tensor of a name.
        dtype: What to store.
    """
    with warnings.catch_warnings():
        # One process writes everything, and dcp warns that this must be meant.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(
            {},
            storage_writer=dcp.FileSystemWriter(directory, thread_count=1),
            planner=_StreamingPlanner(read, shape, dtype),
            no_dist=True,
        )
    (directory / "metadata.json").write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    )


class _StreamingPlanner(dcp.DefaultSavePlanner):
    """Writes one chunk for each layer of each table row, made when its turn to be written comes."""

    def __init__(
        self, read: Callable[[str], torch.Tensor], shape: ModelShape, dtype: torch.dtype
    ) -> None:
        super().__init__(flatten_state_dict=False)
        self.read, self.shape, self.dtype = read, shape, dtype
        self.rows: dict[str, Weight] = {weight.megatron: weight for weight in weights_of(shape)}
        self.objects = _objects(shape)
        self.progress = tqdm(desc="to Megatron", unit=" tensors", disable=None)

    def create_local_plan(self) -> SavePlan:
        items = [self._item(weight, layer) for weight, layer in rows_of(self.shape)]
        items += [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self.objects]
        self.plan = SavePlan(items)
        self.progress.reset(len(items))
        return self.plan

    def _item(self, weight: Weight, layer: int) -> WriteItem:
        local = weight.megatron_shape(self.shape)
        offsets = torch.Size([0] * len(local))
        whole = local
        if weight.per_layer:
            offsets = torch.Size([layer, *offsets])
            whole, local = (self.shape.layers, *local), (1, *local)
        return WriteItem(
            MetadataIndex(weight.megatron, offsets),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                ChunkStorageMetadata(offsets, torch.Size(local)),
                TensorProperties(dtype=self.dtype),
                torch.Size(whole),
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
        weight = self.rows[key]
        layer = write_item.index.offset[0] if weight.per_layer else 0
        parts = [self.read(name) for name in weight.names(layer)]
        packed = weight.pack(parts, self.shape).to(self.dtype)
        return packed.unsqueeze(0) if weight.per_layer else packed


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
    objects: dict[str, Any] = {"common_state/shard_0_1": common}
    for layer in range(shape.layers):
        for module in FAMILIES[shape.family].stateful:
            key = f"decoder.layers.{module}._extra_state/shard_{layer}_{shape.layers}"
            objects[key] = None
    serialised = {}
    for key, value in objects.items():
        serialised[key] = io.BytesIO()
        torch.save([value], serialised[key])
    return serialised


class MegatronWeights:
    """Model tensors of one saved iteration, read one region at a time."""

    def __init__(self, directory: Path) -> None:
        if not (directory / "metadata.json").exists() or not (directory / ".metadata").exists():
            raise ValueError(
                f"{directory} is not a complete torch_dist checkpoint (metadata.json, .metadata); "
                "train with --ckpt-format torch_dist, or choose another --iteration."
            )
        self.directory = directory
        self.reader = dcp.FileSystemReader(directory)
        metadata = self.reader.read_metadata()
        self.reader.set_up_storage_reader(metadata, is_coordinator=True)
        self.stored: dict[str, TensorStorageMetadata] = {
            key: value
            for key, value in metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }

    def check(self, shape: ModelShape) -> None:
        """Compare keys and shapes with the table; a padded vocabulary may be larger.

        Raises:
            ValueError: Tensors are missing, of another shape, or unknown to the family's table.
        """
        problems, expected = [], set()
        for weight, layer in rows_of(shape):
            key, _, found = self._find(weight, layer)
            expected.add(key)
            wanted = weight.megatron_shape(shape)
            if found is None:
                problems.append(f"{key} is missing")
            elif found[1:] != wanted[1:] or not (
                found[0] == wanted[0] or (weight.per_vocabulary and found[0] > wanted[0])
            ):
                problems.append(f"{key} has shape {list(found)}, not {list(wanted)}")
        problems += [
            f"{key} is unexpected"
            for key in self.stored
            if key.startswith(("decoder.", "embedding.", "output_layer.")) and key not in expected
        ]
        if problems:
            raise ValueError(
                f"The weights in {self.directory} do not match config.json: {summary(problems)}."
            )

    def _find(self, weight: Weight, layer: int) -> tuple[str, bool, tuple[int, ...] | None]:
        """Key, whether layers are stacked under it, and shape of one layer (None: not there).

        Megatron stacks layers under one key, unless they differ from one another.
        """
        numbered = weight.megatron.replace("decoder.layers.", f"decoder.layers.{layer}.")
        if numbered in self.stored:
            return numbered, False, tuple(self.stored[numbered].size)
        if weight.megatron not in self.stored:
            return weight.megatron, weight.per_layer, None
        size = tuple(self.stored[weight.megatron].size)
        if weight.per_layer and not layer < size[0]:
            return f"{weight.megatron} of layer {layer}", True, None
        return weight.megatron, weight.per_layer, size[1:] if weight.per_layer else size

    def read(self, weight: Weight, layer: int, shape: ModelShape) -> torch.Tensor:
        """The tensor of one layer, without the rows that pad the vocabulary."""
        key, stacked, _ = self._find(weight, layer)
        lengths = weight.megatron_shape(shape)
        offsets = (0,) * len(lengths)
        if stacked:
            offsets, lengths = (layer, *offsets), (1, *lengths)
        region = ChunkStorageMetadata(torch.Size(offsets), torch.Size(lengths))
        stored = self.stored[key]
        items = create_read_items_for_chunk_list(key, stored, [region])
        target = torch.empty(lengths, dtype=stored.properties.dtype)
        self.reader.read_data(LoadPlan(items), _RegionPlanner(target)).wait()
        return target.squeeze(0) if stacked else target

    def dtype(self, shape: ModelShape) -> torch.dtype:
        """The dtype that the embedding, and so the model, is stored in."""
        return self.stored[weights_of(shape)[0].megatron].properties.dtype


class _RegionPlanner(LoadPlanner):
    """Lets ``FileSystemReader.read_data`` copy into one tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        region = self.target
        for axis, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            region = region.narrow(axis, start, length)
        return region

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None: ...
    def set_up_planner(self, *args: Any, **kwargs: Any) -> None: ...
    def create_local_plan(self) -> LoadPlan:
        raise NotImplementedError

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        raise NotImplementedError

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        raise NotImplementedError

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise NotImplementedError


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
        word = (source / TRACKER).read_text().strip()
    except FileNotFoundError as error:
        raise ValueError(f"{source} is not a Megatron checkpoint: {TRACKER} is missing.") from error
    directory = source / ("release" if word == "release" else f"iter_{int(word):07d}")
    if not directory.is_dir():
        raise ValueError(f"{source / TRACKER} says {word}, but {directory} is missing.")
    return directory


def training_arguments(directory: Path) -> Any:
    """The arguments of the training job that saved this iteration, or None."""
    from megatron.core.dist_checkpointing import load_common_state_dict

    return load_common_state_dict(directory).get("args")
