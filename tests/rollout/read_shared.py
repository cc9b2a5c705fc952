"""Stands for a server's worker: opens what a transport describes and tells what it finds there.

``python read_shared.py DESCRIPTION RANK``, with the modules of a server's side on the path and no JAX. For every line
``SLOT BYTES`` of its input it prints the SHA-256 of what lies in the slot. It reads through torch where torch can use
the GPU, else by CUDA alone.
"""

import ctypes
import hashlib
import json
import sys

import jaxrft_cuda


class Bare:
    """Shared memory, read without torch."""

    def __init__(self, description):
        self._cuda, self._slot_bytes = jaxrft_cuda.Cuda(), description["slot_bytes"]
        ordinal = 0
        while self._cuda.uuid(ordinal) not in description["handles"]:
            ordinal += 1
        self._cuda.set_device(ordinal)
        self._pointer = self._cuda.open_handle(bytes.fromhex(description["handles"][self._cuda.uuid(ordinal)]))
        self._copy = self._cuda._runtime.cudaMemcpy
        self._copy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def read(self, slot, size):
        found = ctypes.create_string_buffer(size)
        assert self._copy(found, self._pointer + slot * self._slot_bytes, size, 2) == 0
        return found.raw

    def close(self):
        self._cuda.close_handle(self._pointer)


class WithTorch:
    """What a worker does, on the first GPU that fits."""

    def __init__(self, description, rank):
        import torch
        from jaxrft_memory import open_memory

        count = torch.cuda.device_count()
        uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(count)]
        # NCCL: any but the trainer's, which is the first.
        mine = next((i for i in range(count) if uuids[i] in description.get("handles", ())), count - 1)
        self._memory = open_memory(description, torch.device("cuda", mine), rank)

    def read(self, slot, size):
        return self._memory.read(slot, size).cpu().numpy().tobytes()

    def close(self):
        self._memory.close()


def torch_works():
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


if __name__ == "__main__":
    description, rank = json.loads(sys.argv[1]), int(sys.argv[2])
    memory = WithTorch(description, rank) if torch_works() else Bare(description)
    print("open", flush=True)
    for line in sys.stdin:
        print(hashlib.sha256(memory.read(*map(int, line.split()))).hexdigest(), flush=True)
    memory.close()
    print("closed", flush=True)
