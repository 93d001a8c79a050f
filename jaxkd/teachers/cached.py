"""A teacher read from a cache that `jaxkd cache` wrote: no forward pass, and for most signals no weights."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxkd.core.types import Batch, Hidden, Output, PyTree, Signal
from jaxkd.teachers import codec
from jaxkd.teachers.base import HostRows, Teacher, row_keys, untouched
from jaxkd.teachers.store import Store


def cached(
    store: Store, split: str, domains: Sequence[str], state: PyTree = None, head: Callable[..., Output] | None = None
) -> Teacher:
    """A teacher whose signal is read from a store on the host.

    Args:
        store: an open one, of this teacher and these rows.
        split: "train" or "valid".
        domains: names, in the batch's numbering.
        state: arrays for `head`: the teacher's unembedding for stored hidden states.
        head: `head(state, hidden) -> Output` for stored hidden states; None for the other signals.
    """
    layout = store.layout(split)
    filler = codec.encode(layout, codec.empty(layout), np.zeros(layout.length, bool))
    stored_domains = store.manifest["sizes"]

    def host_features(rows: HostRows) -> HostRows:
        domain, row = row_keys(rows)
        payloads = [filler] * len(row)  # stays for domains that another teacher serves
        for d in sorted({d for d in domain.tolist() if domains[d] in stored_domains}):
            indices = [i for i in range(len(row)) if domain[i] == d]
            for i, payload in zip(indices, store.read(domains[d], split, [int(row[i]) for i in indices]), strict=True):
                payloads[i] = payload
        stored = codec.decode_rows(layout, payloads)
        if isinstance(stored, codec.Text):  # the teacher's own text replaces the data's
            return {**rows, **{name: getattr(stored, name) for name in stored._fields}}
        return {**rows, "teacher": stored}

    return recorded(state, head)._replace(host_features=host_features)


def recorded(state: PyTree = None, head: Callable[..., Output] | None = None) -> Teacher:
    """A teacher whose signal is already in `batch.teacher`: the device side of `cached`, with its arguments."""

    def signal(state: PyTree, batch: Batch, **options: Any) -> Signal | None:
        if not isinstance(batch.teacher, Hidden):
            return batch.teacher
        assert head is not None, "hidden states need the teacher's head"
        return head(state, jnp.asarray(batch.teacher.hidden))

    return Teacher({} if state is None else state, untouched, signal)
