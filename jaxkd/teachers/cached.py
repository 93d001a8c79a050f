"""A teacher read from a cache of `jaxkd cache`: no forward pass, and for most signals no weights."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxkd.core.types import Batch, Hidden, Output, PyTree, Signal
from jaxkd.teachers import codec
from jaxkd.teachers.base import HostRows, Teacher, untouched
from jaxkd.teachers.store import Store


def cached(
    store: Store, split: str, domains: Sequence[str], state: PyTree = None, head: Callable[..., Output] | None = None
) -> Teacher:
    """A teacher whose signal is read from a store on the host.

    Args:
        store: of this teacher and these rows.
        split: "train" or "valid".
        domains: names, in the batch's numbering.
        state: arrays for `head`: the teacher's unembedding for stored hidden states.
        head: `head(state, hidden) -> Output` for stored hidden states; None for the other signals.
    """
    layout = store.layout(split)
    padding = codec.encode(layout, codec.empty(layout), np.zeros(layout.length, bool))

    def host_features(rows: HostRows) -> HostRows:
        domain, row = np.asarray(rows["domain"]), np.asarray(rows["row"])
        payloads = [padding] * len(row)  # for domains of other teachers
        for d in sorted({d for d in domain.tolist() if domains[d] in store.manifest["sizes"]}):
            indices = np.flatnonzero(domain == d)
            for i, payload in zip(indices, store.read(domains[d], split, row[indices]), strict=True):
                payloads[i] = payload
        stored = codec.decode_rows(layout, payloads)
        if isinstance(stored, codec.Text):  # the teacher's own text replaces the data's
            return {**rows, **stored._asdict()}
        return {**rows, "teacher": stored}

    return recorded(state, head)._replace(host_features=host_features)


def recorded(state: PyTree = None, head: Callable[..., Output] | None = None) -> Teacher:
    """The device side of `cached`, with its arguments: the signal is already in `batch.teacher`."""

    def signal(state: PyTree, batch: Batch, **options: Any) -> Signal | None:
        if not isinstance(batch.teacher, Hidden):
            return batch.teacher
        assert head is not None, "hidden states need the teacher's head"
        return head(state, jnp.asarray(batch.teacher.hidden))

    return Teacher({} if state is None else state, untouched, signal)
