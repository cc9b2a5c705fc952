"""Meshes, what lies where on them, and the types and the memory that numbers live in."""

from jaxrft.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "Layout": "jaxrft.parallel.layout",
        "STRATEGIES": "jaxrft.parallel.layout",
        "apart": "jaxrft.parallel.layout",
        "as_cast": "jaxrft.parallel.layout",
        "constrain": "jaxrft.parallel.layout",
        "constrain_gradient": "jaxrft.parallel.layout",
        "current": "jaxrft.parallel.layout",
        "describe": "jaxrft.parallel.description",
        "gather": "jaxrft.parallel.layout",
        "logical_axes": "jaxrft.parallel.layout",
        "make_mesh": "jaxrft.parallel.mesh",
        "mesh_axes": "jaxrft.parallel.rules",
        "replicated": "jaxrft.parallel.mesh",
        "sum_over": "jaxrft.parallel.layout",
    },
)
