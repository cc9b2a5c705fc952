"""Which transport a trainer and its servers can use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax

from jaxrft.config import ConfigError
from jaxrft.rollout.transfer.shared_memory import SharedMemory
from jaxrft.rollout.transfer.transport import Transport

Kind = Literal["cuda_ipc", "shared_memory", "nccl"]


def choose(
    wanted: Literal["auto", "cuda_ipc", "shared_memory", "nccl"],
    servers: Sequence[Sequence[dict[str, Any]]],
    host: str,
    own_gpus: Sequence[str],
) -> Kind:
    """The transport wanted, or the fastest that reaches every worker.

    Args:
        wanted: as the config says.
        servers: what the workers of each server said of themselves: ``host`` and ``device`` (a GPU's UUID, or cpu).
        host: the trainer's.
        own_gpus: UUIDs of the trainer's GPUs; none on a CPU.

    Raises:
        ConfigError: the one wanted cannot reach them all, or none can.
    """
    workers = [worker for server in servers for worker in server]
    here = all(worker["host"] == host for worker in workers)
    on_gpus = bool(own_gpus) and all(worker["device"] != "cpu" for worker in workers)
    possible: dict[Kind, bool] = {
        "cuda_ipc": here and on_gpus and all(worker["device"] in own_gpus for worker in workers),
        # A GPU that trains cannot be a second member of the group.
        "nccl": on_gpus and not any(worker["device"] == own_gpus[0] for worker in workers),
        "shared_memory": here,
    }
    if wanted == "auto":
        found = next((kind for kind, fits in possible.items() if fits), None)
        if found is None:
            raise ConfigError(
                "rollout.vllm.transport: no transport reaches servers on another machine from a trainer on "
                f"{'GPUs' if own_gpus else 'a CPU'}; start them on this one"
            )
        return found
    if not possible[wanted]:
        raise ConfigError(f"rollout.vllm.transport: {wanted} {_NEEDS[wanted]}; leave transport at auto")
    return wanted


_NEEDS: dict[Kind, str] = {
    "cuda_ipc": "needs every worker of the servers on a GPU that the trainer uses too",
    "nccl": "needs trainer and servers on GPUs, the servers on others than the trainer's first",
    "shared_memory": "needs the servers on the trainer's machine",
}


def gpus_of(devices: Sequence[jax.Device]) -> dict[str, jax.Device]:
    """JAX's GPUs by UUID; none on a CPU."""
    if devices[0].platform != "gpu":
        return {}
    from jaxrft.rollout.server_side.jaxrft_cuda import Cuda

    cuda = Cuda()
    return {cuda.uuid(device.local_hardware_id): device for device in devices}


def make_transport(
    kind: Kind, servers: Sequence[Sequence[dict[str, Any]]], gpus: dict[str, jax.Device], slot_bytes: int
) -> Transport:
    """A transport of a kind, with slots of ``slot_bytes``.

    Args:
        kind: as :func:`choose` says.
        servers: what the workers of each server said of themselves.
        gpus: as :func:`gpus_of` says.
        slot_bytes: the largest bucket.
    """
    if kind == "cuda_ipc":
        from jaxrft.rollout.transfer.cuda_ipc import CudaIpc

        used = {worker["device"] for server in servers for worker in server}
        return CudaIpc([gpus[uuid] for uuid in sorted(used)], slot_bytes)
    if kind == "nccl":
        from jaxrft.rollout.transfer.nccl import NcclBroadcast

        return NcclBroadcast(next(iter(gpus.values())), slot_bytes, [len(server) for server in servers])
    return SharedMemory(slot_bytes)
