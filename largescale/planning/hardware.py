"""The GPUs that a plan is made for: one table of what data sheets say, what was measured, and what
is assumed."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """What a compiler asks a GPU."""

    name: str
    capability: tuple[int, int]
    processors: int
    shared_kib: int
    """Shared memory of a block of threads, at most."""
    l2_mib: int


@dataclass(frozen=True)
class Rates:
    """What kernels reach at best."""

    products: float
    """FLOP/s of a (8192, 8192) product in half precision."""
    copies: float
    """Bytes/s of a large copy, read and written."""
    fp32: float
    """FLOP/s in float32 without TF32, by the data sheet."""
    measured: bool
    """Whether products and copies were measured on such a card; else assumed."""


# Assumed: the share of `Rates.products` that products of a DiT's sizes reach, those with GELU in a
# kernel of ours (Triton's are slower than cuBLAS's), and attention; and the time between the end of a
# kernel and the start of the next.
PRODUCT_SHARE = 0.85
GELU_PRODUCT_SHARE = 0.75
ATTENTION_SHARE = 0.55
GAP_S = 2e-6


@dataclass(frozen=True)
class Hardware:
    """A node of GPUs with its network and storage. Bandwidths in bytes/s; links per direction. From
    data sheets, but for what is marked as assumed."""

    name: str
    peak_flops: float
    """FLOP/s of one GPU, dense, in half precision."""
    memory_bytes: float
    memory_bandwidth: float
    intra_bandwidth: float
    """Bandwidth from a GPU to the others of its node."""
    inter_bandwidth: float
    """Bandwidth of a GPU's own share of the network between nodes."""
    gpus_per_node: int = 8
    rates: Rates | None = None
    chip: Chip | None = None
    mfu: float | None = None
    """The share of the peak that forward and backward reach. None: as predicted from the rates."""
    launch_s: float = 5e-6
    """Assumed: the host's time per kernel."""
    data_bandwidth: float = 1e9
    """Assumed: a node's bandwidth when it reads the data set."""
    host_bandwidth: float = 5e9
    """Assumed: bandwidth from a GPU to ordinary host memory, by way of a pinned block."""
    write_bandwidth: float = 0.5e9
    """Bandwidth of a rank's thread, which writes and then hashes, as measured on the 2-core machine
    of docs/benchmarks.md."""
    storage_bandwidth: float = 10e9
    """Assumed: bandwidth of the file system, for all nodes together."""
    node_mtbf_hours: float = 6300.0
    """Hours between failures of a node: 419 in 54 days of 2,048 nodes (Llama 3, arXiv:2407.21783,
    section 3.3.4). Preemption that is announced costs no work, since the trainer saves."""
    restart_s: float = 300.0
    """Assumed: seconds from a failure to the first step: queueing, starting, loading, compiling."""

    @property
    def usable_bytes(self) -> float:
        """A GPU's memory without the part that is left to fragmentation."""
        return 0.95 * self.memory_bytes

    def nodes(self, gpus: int) -> int:
        """Nodes that so many GPUs need."""
        return math.ceil(gpus / self.gpus_per_node)

    def link(self, gpus: int) -> float:
        """Bandwidth of a ring over so many GPUs."""
        if gpus <= self.gpus_per_node:
            return self.intra_bandwidth
        # A ring leaves a node once, over the cards of all its GPUs: 8 of 50 GB/s are 400 GB/s.
        return min(self.intra_bandwidth, self.inter_bandwidth * self.gpus_per_node)


HARDWARE = {
    # SXM, NVLink 4, a 400 Gb/s card for each GPU
    "h100": Hardware(
        "H100",
        peak_flops=989e12,
        memory_bytes=79.1 * 2**30,
        memory_bandwidth=3.35e12,
        intra_bandwidth=450e9,
        inter_bandwidth=50e9,
        rates=Rates(products=798e12, copies=3.0e12, fp32=67e12, measured=True),
        chip=Chip("NVIDIA H100 80GB HBM3", (9, 0), processors=132, shared_kib=227, l2_mib=50),
    ),
    # The same with more and faster memory
    "h200": Hardware(
        "H200",
        peak_flops=989e12,
        memory_bytes=139.8 * 2**30,
        memory_bandwidth=4.8e12,
        intra_bandwidth=450e9,
        inter_bandwidth=50e9,
        rates=Rates(products=798e12, copies=4.3e12, fp32=67e12, measured=False),
        chip=Chip("NVIDIA H200", (9, 0), processors=132, shared_kib=227, l2_mib=50),
    ),
    # SXM 80 GB, NVLink 3, 200 Gb/s
    "a100": Hardware(
        "A100",
        peak_flops=312e12,
        memory_bytes=79.1 * 2**30,
        memory_bandwidth=2.04e12,
        intra_bandwidth=300e9,
        inter_bandwidth=25e9,
        rates=Rates(products=270e12, copies=1.75e12, fp32=19.5e12, measured=False),
        chip=Chip("NVIDIA A100-SXM4-80GB", (8, 0), processors=108, shared_kib=163, l2_mib=40),
    ),
    # SXM 192 GB, of which 180 can be used, NVLink 5, 400 Gb/s
    "b200": Hardware(
        "B200",
        peak_flops=2250e12,
        memory_bytes=180e9,
        memory_bandwidth=8e12,
        intra_bandwidth=900e9,
        inter_bandwidth=50e9,
        rates=Rates(products=1_750e12, copies=7.0e12, fp32=75e12, measured=False),
        chip=Chip("NVIDIA B200", (10, 0), processors=148, shared_kib=227, l2_mib=126),
    ),
}
