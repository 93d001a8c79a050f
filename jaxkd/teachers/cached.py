"""A teacher read back from what `jaxkd cache` stored: no forward pass, and for most signals no weights."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxkd.core.types import Batch, Hidden, Output, PyTree, Signal
from jaxkd.teachers import codec
from jaxkd.teachers.base import HostRows, Teacher, place, untouched
from jaxkd.teachers.store import Store


def cached(
    store: Store, split: str, domains: Sequence[str], state: PyTree = None, head: Callable[..., Output] | None = None
) -> Teacher:
    """What a store holds of each row, as the signal of a teacher.

    Args:
        store: opened, and found to be of this teacher and these rows.
        split: "train" or "valid".
        domains: names, in the batch's numbering.
        state: what `head` needs; for hidden states the teacher's unembedding.
        head: `head(state, hidden) -> Output` of stored hidden states; None for the other signals.
    """
    told = recorded(state, head)
    layout = store.layout(split)
    nothing = codec.encode(layout, codec.empty(layout), np.zeros(layout.length, bool))
    held = store.manifest["sizes"]

    def host_features(rows: HostRows) -> HostRows:
        domain, row = place(rows)
        payloads = [nothing] * len(row)  # of a domain that is another teacher's
        for d in sorted({d for d in domain.tolist() if domains[d] in held}):
            here = [i for i in range(len(row)) if domain[i] == d]
            for i, payload in zip(here, store.read(domains[d], split, [int(row[i]) for i in here]), strict=True):
                payloads[i] = payload
        found = codec.decode_rows(layout, payloads)
        if isinstance(found, codec.Text):  # the teacher's own text takes the place of the data's
            return {**rows, **{name: getattr(found, name) for name in found._fields}}
        return {**rows, "teacher": found}

    return told._replace(host_features=host_features)


def recorded(state: PyTree = None, head: Callable[..., Output] | None = None) -> Teacher:
    """What a batch already brings with it, as the signal of a teacher: the part of `cached` inside the step.

    Args:
        state: as for `cached`.
        head: as for `cached`.
    """

    def signal(state: PyTree, batch: Batch, **options: Any) -> Signal | None:
        if not isinstance(batch.teacher, Hidden):
            return batch.teacher
        assert head is not None, "hidden states need the teacher's head"
        return head(state, jnp.asarray(batch.teacher.hidden))

    return Teacher({} if state is None else state, untouched, signal)
