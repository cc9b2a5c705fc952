"""Where parameters, gradients and moments lie: the bytes of each device are those that theory gives."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxrft.parallel import Layout, describe, make_mesh
from jaxrft.parallel.mesh import MESH_AXES
from jaxrft.parallel.rules import partition
from tests.conftest import QUICK_TO_COMPILE, ROOT

# Which of parameters, gradients and moments each strategy shards (ZeRO's table 1).
SHARDED = {"ddp": "", "zero1": "m", "zero2": "mg", "zero3": "mgp", "hsdp": "mgp"}


@pytest.fixture(scope="module")
def records():
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": QUICK_TO_COMPILE,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel.placement"],
        capture_output=True, text=True, timeout=400, env=environment, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {(r["strategy"], r["tensor"]): r for r in found}


def theory(record, kind):
    """Bytes of a float32 copy of all parameters on each device: matrices and the biases of cut axes in shares."""
    shares = record["tensor"] * (record["shards"] if kind in SHARDED[record["strategy"]] else 1)
    total = 0
    for name, size in record["sizes"].items():
        matrix = name.endswith(("kernel", "embedding"))
        total += 4 * size // (shares if matrix else record["tensor"] if name.endswith("bias") else 1)
    return total


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("strategy", SHARDED)
def test_each_device_holds_what_theory_says(records, strategy, tensor):
    record = records[strategy, tensor]
    assert record["shards"] * tensor * (2 if strategy == "hsdp" else 1) == (
        8 if strategy != "ddp" else record["shards"] * tensor
    )
    assert record["params"] == [theory(record, "p")] * 8
    # Both moments, and the step's counter.
    assert record["moments"] == [2 * theory(record, "m") + 4] * 8
    assert record["same"], "a step must leave everything where it was"
    assert record["described"] == [theory(record, "p"), theory(record, "g"), 2 * theory(record, "m")]
    assert record["whole"] == []


@pytest.mark.parametrize("tensor", [1, 2])
def test_gradients_are_kept_in_shares(records, tensor):
    """zero1 and zero2 differ in gradients alone: the programs hold that much less, in the sum over micro-batches."""
    whole, cut = records["zero1", tensor], records["zero2", tensor]
    saved = theory(whole, "g") - theory(cut, "g")
    assert whole["temp"] - cut["temp"] > 0.8 * saved


@pytest.mark.parametrize("strategy", SHARDED)
def test_the_backward_pass_gathers_for_itself(records, strategy):
    """A barrier before each of a layer's seven products and the projection; else what is gathered would be kept.

    And three behind the casts of the embedding, for looking it up and for the projection forward and back: else it
    would be gathered in float32.
    """
    assert records[strategy, 1]["barriers"] == (8 + 3 if "p" in SHARDED[strategy] else 0)


def test_the_description_is_readable(records):
    text = records["zero2", 2]["text"]
    assert text.startswith("zero2 on 8 devices: replica 1 x fsdp 2 x sequence 2 x tensor 2")
    (line,) = [line for line in text.splitlines() if "mlp.down.kernel" in line]
    assert "mlp, embed" in line
    assert "tensor, -" in line
    assert line.count("tensor, fsdp+sequence") == 2
    assert text.splitlines()[-1].startswith("each device holds ")


def mesh_of(**sizes):
    """A mesh of shapes alone."""
    return jax.sharding.AbstractMesh(tuple(sizes.get(name, 1) for name in MESH_AXES), MESH_AXES)


def test_rules():
    mesh = mesh_of(fsdp=4, tensor=2, replica=2)
    assert partition(mesh, ("embed", "mlp"), (8, 6), sharded=True) == P("fsdp", "tensor")
    assert partition(mesh, ("embed", "mlp"), (8, 6)) == P(None, "tensor")
    # Heads are not cut: 3 of them stay together, though their channels would divide.
    assert partition(mesh, ("embed", "heads"), (8, 24), units=(8, 3)) == P(None, None)
    # A width that does not divide leaves the shards to another axis.
    assert partition(mesh, ("vocab", "embed"), (16, 6), sharded=True) == P(("tensor", "fsdp"), None)
    assert partition(mesh, ("vocab", "embed"), (7, 6), sharded=True) == P(None, None)
    assert partition(mesh, ("norm",), (8,), sharded=True) == P(None)
    assert partition(mesh, ("batch", "time", None), (16, 4, 8)) == P(("replica", "fsdp"), None, None)
    assert partition(mesh, ("batch", "time", None), (4, 4, 8)) == P(None, None, None)
    assert partition(mesh_of(fsdp=2, sequence=2), ("embed", "vocab"), (8, 8), sharded=True) == P(
        ("fsdp", "sequence"), None
    )
    with pytest.raises(ValueError, match=r"^axes: got 'width', takes batch, "):
        partition(mesh, ("width",), (8,))


def test_matrices_that_no_axis_divides_are_named():
    class Odd(nnx.Module):
        def __init__(self):
            self.kernel = nnx.Param(jnp.zeros((7, 5)), axes=("embed", "mlp"))
            self.scale = nnx.Param(jnp.zeros((7,)), axes=("norm",))

    # A mesh of shapes alone: a cluster can be described from a laptop.
    mesh = mesh_of(fsdp=4)
    found = describe(Odd(), Layout(mesh, "zero3"))
    assert found.whole == ["kernel"]
    assert "whole on every device, since no axis divides: kernel" in str(found)
    assert describe(Odd(), Layout(mesh, "zero2")).whole == []
    assert describe(Odd(), Layout(make_mesh(), "zero3")).whole == []
    with pytest.raises(ValueError, match=r"^strategy: got 'zero4', takes ddp, zero1, zero2, zero3, fsdp, hsdp$"):
        Layout(make_mesh(), "zero4")


def test_meshes():
    assert dict(make_mesh().shape) == {"replica": 1, "fsdp": 1, "sequence": 1, "tensor": 1}
    with pytest.raises(ValueError, match=r"^parallel.tensor: fsdp 2 x tensor 2 takes 4 devices, but JAX sees 1 cpu"):
        make_mesh(fsdp=2, tensor=2)
