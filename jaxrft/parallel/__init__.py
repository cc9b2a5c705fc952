"""Meshes and the placement of arrays on them."""

from jaxrft.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "batch_sharding": "jaxrft.parallel.mesh",
        "make_mesh": "jaxrft.parallel.mesh",
        "replicated": "jaxrft.parallel.mesh",
    },
)
