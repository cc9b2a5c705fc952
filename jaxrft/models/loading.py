"""Parameters from weight files to where they lie on the devices.

A tensor travels in blocks of rows of the file. Threads read the blocks ahead; the device turns each around where files
keep it transposed, casts it, and puts it in its place. The host holds what is in flight and nothing more, a device its
parameters and a few blocks, and a process reads what its own devices hold and no other byte.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxrft.models.names import Path, Tensor
from jaxrft.models.read_ahead import read_ahead
from jaxrft.models.weight_files import FLOAT_TYPES, WeightFiles
from jaxrft.parallel import Layout

# Large enough for a disk, small enough for the columns of a block to stay in a CPU's caches while it is turned around.
BLOCK_BYTES = 2**24


class _Form(NamedTuple):
    """What is done with a tensor's blocks, and how they lie: one program for all tensors of a form and a shape.

    Attributes:
        transposed: the file has the parameter's axes in reverse.
        on_host: whether that is undone before the device has it. JAX copies numpy's turned arrays tile by tile; loops
            of XLA's CPU compiler, where host and device are one, go through memory in strides and take several times
            as long.
        dtype: that the parameter is kept in.
        file_spec, spec: of the tensor in the file, and of the parameter.
    """

    transposed: bool
    on_host: bool
    dtype: jnp.dtype
    mesh: Mesh | None
    file_spec: PartitionSpec
    spec: PartitionSpec

    @property
    def carried(self) -> jnp.dtype:
        """Of a parameter whose blocks are still being put together."""
        # XLA's CPU compiler casts a whole bfloat16 array to float32 and back for each block that is put into it.
        narrow = self.dtype.itemsize == 2 and jax.default_backend() == "cpu"
        return jnp.dtype("uint16") if narrow else self.dtype

    @property
    def block_spec(self) -> PartitionSpec:
        """Of a block as the device gets it."""
        return self.spec if self.on_host else self.file_spec


class _Source(NamedTuple):
    """A tensor, as this process reads it.

    Attributes:
        part: shape of one device's part of the tensor, as it lies in the file.
        places: for each device of this process, the row and the column of the file where its part begins.
        rows: of each part, in a block.
    """

    name: str
    form: _Form
    shape: tuple[int, ...]
    part: tuple[int, ...]
    places: dict[jax.Device | None, tuple[int, int]]
    rows: int

    @property
    def columns(self) -> int:
        return math.prod(self.part[1:])


class _Block(NamedTuple):
    """Some rows of every device's part of a tensor."""

    source: _Source
    start: int
    rows: int


def fill(
    model: nnx.Module, tensors: dict[Path, Tensor], files: WeightFiles, layout: Layout | None, dtype: jnp.dtype
) -> None:
    """Gives an abstract model the parameters that the files hold.

    Args:
        model: abstract.
        tensors: the name of each parameter; the files have them all, with its shape.
        layout: where parameters are placed; None takes the default device.
        dtype: type that they are kept in.

    Raises:
        ConfigError: a file cannot be read.
    """
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    sources = [_source(files, tensors[path], value, layout, dtype) for path, value in state]
    # As the tensors lie on the disk.
    sources.sort(key=lambda source: (files.stored(source.name).path, files.stored(source.name).start))
    blocks = [block for source in sources for block in _blocks(source)]
    filled: dict[str, jax.Array] = {}

    def take(block: _Block, parts: list[np.ndarray]) -> jax.Array:
        source = block.source
        value = _on_devices(block, parts)
        filled[source.name], taken = _put(filled.get(source.name), value, block.start, source.part, source.form)
        return taken

    size = max((_block_bytes(files, block) for block in blocks), default=0)
    read_ahead(blocks, size, functools.partial(_read, files), take)
    found = {source.name: _viewed(filled.pop(source.name), source.form.dtype) for source in sources}
    values = [(path, value.replace(found[tensors[path].name])) for path, value in state]
    nnx.update(model, nnx.from_flat_state(values))


def _viewed(parameter: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return parameter if parameter.dtype == dtype else _bitcast(parameter, dtype)


@functools.partial(jax.jit, static_argnums=1, donate_argnums=0)
def _bitcast(parameter: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jax.lax.bitcast_convert_type(parameter, dtype)


def _source(
    files: WeightFiles, tensor: Tensor, value: nnx.Variable, layout: Layout | None, dtype: jnp.dtype
) -> _Source:
    stored = files.stored(tensor.name)
    shape, on_host = stored.shape, tensor.transposed and jax.default_backend() == "cpu"
    if layout is None:
        form = _Form(tensor.transposed, on_host, dtype, None, PartitionSpec(), PartitionSpec())
        part, parts, places = shape, 1, {None: (0, 0)}
    else:
        spec = layout.shardings("params", value).spec
        axes = (*spec, *[None] * (len(shape) - len(spec)))[:: -1 if tensor.transposed else 1]
        form = _Form(tensor.transposed, on_host, dtype, layout.mesh, PartitionSpec(*axes), spec)
        sharding = layout.named(form.file_spec)
        part = sharding.shard_shape(shape)
        if part[2:] != shape[2:]:
            raise NotImplementedError(f"{tensor.name}: cut along {axes}, takes cuts of the file's first two axes")
        corners = {device: _corner(index, shape) for device, index in sharding.devices_indices_map(shape).items()}
        parts = _most_parts(corners)
        places = {device: corner for device, corner in corners.items() if device in sharding.addressable_devices}
    row_bytes = math.prod(part[1:]) * FLOAT_TYPES[stored.type].itemsize
    rows = max(1, min(part[0], BLOCK_BYTES // (parts * row_bytes)))
    return _Source(tensor.name, form, shape, part, places, rows)


def _corner(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[int, int]:
    """Row and column of the file where a part begins."""
    row, *columns = [axis.start or 0 for axis in index]
    return row, columns[0] * math.prod(shape[2:]) if columns else 0


def _most_parts(corners: dict[jax.Device, tuple[int, int]]) -> int:
    """Different parts that one process reads, at most: all processes take the same rows at a time."""
    different = {(device.process_index, corner) for device, corner in corners.items()}
    return max(Counter(process for process, _ in different).values())


def _blocks(source: _Source) -> Iterator[_Block]:
    for start in range(0, source.part[0], source.rows):
        yield _Block(source, start, min(source.rows, source.part[0] - start))


def _block_bytes(files: WeightFiles, block: _Block) -> int:
    corners = len(set(block.source.places.values()))
    return corners * block.rows * block.source.columns * FLOAT_TYPES[files.stored(block.source.name).type].itemsize


def _read(files: WeightFiles, block: _Block, buffer: np.ndarray) -> list[np.ndarray]:
    """Each device's part of a block, over the buffer."""
    source = block.source
    dtype, width, found = FLOAT_TYPES[files.stored(source.name).type], math.prod(source.shape[1:]), {}
    corners = sorted(set(source.places.values()))
    for row in dict.fromkeys(row for row, _ in corners):
        columns = [column for other, column in corners if other == row]
        # Rows that are needed whole come in one piece, and devices get their columns of it.
        whole = len(columns) * source.columns == width
        for first, size in [(0, width)] if whole else [(column, source.columns) for column in columns]:
            count = block.rows * size * dtype.itemsize
            piece, buffer = buffer[:count], buffer[count:]
            files.read(source.name, piece, row + block.start, first, size)
            matrix = piece.view(dtype).reshape(block.rows, size)
            for column in columns if whole else [first]:
                found[row, column] = matrix[:, column - first : column - first + source.columns]
    return [found[corner].reshape(block.rows, *source.part[1:]) for corner in source.places.values()]


def _on_devices(block: _Block, parts: list[np.ndarray]) -> jax.Array:
    """The block as one array. On a CPU it may alias the buffer."""
    source, form = block.source, block.source.form
    parts = [part.T for part in parts] if form.on_host else parts
    arrays = [jax.device_put(part, device, may_alias=True) for part, device in zip(parts, source.places)]
    if form.mesh is None:
        return arrays[0]
    shape = (block.rows * (source.shape[0] // source.part[0]), *source.shape[1:])
    sharding = NamedSharding(form.mesh, form.block_spec)
    return jax.make_array_from_single_device_arrays(shape[::-1] if form.on_host else shape, sharding, arrays)


@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
def _put(
    parameter: Float[Array, "..."] | None,
    block: Float[Array, "..."],
    start: Int[Array, ""],
    part: tuple[int, ...],
    form: _Form,
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """A parameter with a block of rows in its place; and an array that is ready when the block is no longer read."""

    whole = part[::-1] if form.transposed else part

    def local(parameter, block, start):
        read = jnp.copy(block[(slice(0, 1),) * block.ndim])
        # A copy, for the block's memory is read into again: what is changed in no way would be the block itself.
        turned = block.T if form.transposed and not form.on_host else jnp.copy(block)
        turned = turned.astype(form.dtype)
        if turned.shape == whole:
            return turned, read
        if parameter is None:
            parameter = jax.lax.empty(whole, form.carried)
        axis = parameter.ndim - 1 if form.transposed else 0
        turned = jax.lax.bitcast_convert_type(turned, form.carried)
        return jax.lax.dynamic_update_slice_in_dim(parameter, turned, start, axis), read

    if form.mesh is None:
        return local(parameter, block, start)
    specs = (None if parameter is None else form.spec, form.block_spec, PartitionSpec())
    run = jax.shard_map(local, mesh=form.mesh, in_specs=specs, out_specs=(form.spec, form.block_spec), check_vma=False)
    return run(parameter, block, start)
