"""Whether a kernel works on this device: it is tried before it is taken.

That depends on the GPU and on the versions of compilers and libraries, which no table keeps up with; and a kernel that
is wrong would train a model wrongly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

Results = Callable[[], Sequence[np.ndarray]]


def fault(kernel: Results, plain: Results, names: Sequence[str], tolerance: float) -> str | None:
    """What is wrong with a kernel's results; None: nothing is.

    Args:
        kernel, plain: give the results, by the kernel and by what it is held to.
        names: of the results.
        tolerance: of the difference, as a share of the largest number.
    """
    try:
        # In a thread of its own: what is being traced here, and the mesh it is for, are this thread's alone. To have
        # JAX evaluate at once, inside a trace, is no way: it then evaluates the kernels' own operations too.
        with ThreadPoolExecutor(1, thread_name_prefix="trial") as pool:
            got, expected = (future.result() for future in [pool.submit(kernel), pool.submit(plain)])
    except Exception as error:
        return f"fails here ({type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''})"
    for name, a, b in zip(names, got, expected):
        gap = float(np.abs(a - b).max() / np.abs(b).max())
        if not gap <= tolerance:
            return f"gives wrong {name} here (off by {gap:.2g} of the largest)"
    return None
