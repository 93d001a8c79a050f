"""TPU generations: peak rates, memory sizes, and device kinds.

Sources: Google's pages on each generation (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x). VMEM is that of
`jax.experimental.pallas.tpu.get_tpu_info`; HBM is libtpu's limit for a program, 0.25 to 1 GiB below the chip's.
"""

from typing import NamedTuple

_GIB = 2**30


class Chip(NamedTuple):
    """One JAX device at its peak. VMEM is per core: where a device has two, a kernel's blocks go to both."""

    vmem: int  # bytes
    flops: float  # bfloat16 multiplications and additions per second
    bandwidth: float  # HBM bytes per second
    hbm: int = 0  # bytes available to a program
    link: float = 0.0  # bytes per second over one link between chips, each way
    dcn: float | None = None  # bytes per second to other slices; None where it is not published

    @property
    def ridge(self) -> float:
        """FLOPs per byte above which a program is compute-bound."""
        return self.flops / self.bandwidth


# A tpu7x chip is two devices: each has half of its HBM, links and network.
CHIPS = {
    "TPU v4": Chip(16 * 2**20, 275e12, 1228e9, int(30.75 * _GIB), 50e9),
    "TPU v5 lite": Chip(128 * 2**20, 197e12, 819e9, int(15.75 * _GIB), 50e9, 3.125e9),
    "TPU v5": Chip(64 * 2**20, 459e12, 2765e9, int(95.74 * _GIB), 100e9, 6.25e9),
    "TPU v6 lite": Chip(128 * 2**20, 918e12, 1640e9, int(31.25 * _GIB), 100e9, 12.5e9),
    "TPU7x": Chip(64 * 2**20, 1153e12, 3690e9, int(94.75 * _GIB), 50e9, 6.25e9),
}
"""By `device_kind`."""
CHIPS |= {"TPU v5e": CHIPS["TPU v5 lite"], "TPU v5p": CHIPS["TPU v5"], "TPU v6e": CHIPS["TPU v6 lite"]}
