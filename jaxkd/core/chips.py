"""TPU generations as numbers, and the names by which people ask for slices of them.

Sources: Google's pages on each generation (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x). VMEM is what
`jax.experimental.pallas.tpu.get_tpu_info` says; HBM is what libtpu's compiler lets a program have, which is a quarter
to a whole GiB less than what is on the chip.
"""

from typing import NamedTuple

_GIB = 2**30


class Chip(NamedTuple):
    """One JAX device, at its peak. VMEM is of one core: where a device has two, a kernel's blocks go to both."""

    vmem: int  # bytes
    flops: float  # bfloat16 multiplications and additions per second
    bandwidth: float  # HBM bytes per second
    hbm: int = 0  # bytes that a program may have
    link: float = 0.0  # bytes per second over one link between chips, each way
    dcn: float | None = None  # bytes per second to other slices; None where the makers do not say

    @property
    def ridge(self) -> float:
        """FLOPs per byte above which products, not memory, take the time."""
        return self.flops / self.bandwidth


# A tpu7x chip is two devices: half of its HBM, of each link and of its network is each one's.
CHIPS = {
    "TPU v4": Chip(16 * 2**20, 275e12, 1228e9, int(30.75 * _GIB), 50e9),
    "TPU v5 lite": Chip(128 * 2**20, 197e12, 819e9, int(15.75 * _GIB), 50e9, 3.125e9),
    "TPU v5": Chip(64 * 2**20, 459e12, 2765e9, int(95.74 * _GIB), 100e9, 6.25e9),
    "TPU v6 lite": Chip(128 * 2**20, 918e12, 1640e9, int(31.25 * _GIB), 100e9, 12.5e9),
    "TPU7x": Chip(64 * 2**20, 1153e12, 3690e9, int(94.75 * _GIB), 50e9, 6.25e9),
}
"""By `device_kind`."""
CHIPS |= {"TPU v5e": CHIPS["TPU v5 lite"], "TPU v5p": CHIPS["TPU v5"], "TPU v6e": CHIPS["TPU v6 lite"]}
