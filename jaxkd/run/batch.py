"""Shapes of the rows of a global batch."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxkd.config.schema import DataBlock
from jaxkd.core.types import Batch


def rows_batch(data: DataBlock, sharding: NamedSharding | None = None) -> Batch:
    """Shapes of a global batch, with the sharding of its rows."""

    def leaf(name: str) -> Any:
        shape = (data.batch,) if name in ("row", "domain") else (data.batch, data.length)
        return jax.ShapeDtypeStruct(shape, jnp.float32 if name == "weights" else jnp.int32, sharding=sharding)

    aux = {}
    if data.context:
        shapes = {"context": (data.batch, data.context), "context_length": (data.batch,)}
        aux = {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding) for name, shape in shapes.items()}
    return Batch(aux=aux, **{name: leaf(name) for name in Batch._fields if name not in ("teacher", "aux", "view")})
