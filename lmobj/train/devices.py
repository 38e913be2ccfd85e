"""What the makers say of their devices: peak rate, memory, and how fast data moves in and between them.

One device is what jax calls one: a GPU, a TPU chip, or of a TPU v2 and v3 one of a chip's two cores.
"""

from __future__ import annotations

from dataclasses import dataclass

from lmobj.errors import UserError

__all__ = ["DEVICE_KINDS", "DeviceKind", "device_kind", "known_kind", "peak_flops"]

_GB = 10**9


@dataclass(frozen=True)
class DeviceKind:
    """A kind of device.

    Sources: NVIDIA's data sheets (T4, V100, A10, A100, L4, L40S, GeForce RTX 3090 and 4090, H100, H200, GH200, DGX
    B200), AWS's table of G5 instances (A10G), Google's pages of system architecture of each TPU version. A gigabyte of
    theirs is taken as 10^9 bytes, which leaves some room for the driver.
    """

    name: str
    """As `lmobj plan --device-kind` takes it."""
    words: tuple[str, ...]
    """Parts of jax's `device_kind` that tell it, each one or several words."""
    peak_flops: float
    """Dense 16-bit matrix operations per second; multiplies and adds count separately."""
    memory: int
    """Bytes."""
    bandwidth: float
    """Bytes per second between the device and its memory."""
    link: float
    """Bytes per second that a device sends to its neighbours, all links together: NVLink, PCIe, or a TPU's links."""
    domain: int | None = None
    """Devices that these links join; None: all of them, as in a TPU slice."""
    network: float | None = None
    """Bytes per second that a device sends beyond its domain: its share of a server's network (DGX, HGX)."""
    tpu: str | None = None
    """What libtpu calls it; None: not a TPU, or none that it compiles for without one."""
    torus: int = 0
    """Dimensions of a TPU slice."""
    aliases: tuple[str, ...] = ()
    """Other names that `--device-kind` takes."""


def _gpu(
    name: str, words: tuple[str, ...], tflops: float, gigabytes: int, bandwidth: float, link: float, network: float
) -> DeviceKind:
    """Bandwidths in GB/s; eight in a server."""
    return DeviceKind(name, words, tflops * 1e12, gigabytes * _GB, bandwidth * 1e9, link * 1e9, 8, network * 1e9)


def _tpu(
    name: str,
    words: tuple[str, ...],
    tflops: float,
    gigabytes: int,
    bandwidth: float,
    gigabits: float,
    torus: int,
    *aliases: str,
    compiles: str | None = None,
) -> DeviceKind:
    """Memory bandwidth in GB/s; the chip's links in Gb/s, as Google gives them, of one direction."""
    return DeviceKind(
        name, words, tflops * 1e12, gigabytes * _GB, bandwidth * 1e9, gigabits / 8 * 1e9,
        tpu=compiles, torus=torus, aliases=aliases,
    )  # fmt: skip


DEVICE_KINDS: tuple[DeviceKind, ...] = (
    # NVLink is given as both directions together, so half of it is sent: 900 GB/s for H100. Network: 400 Gb/s a GPU in
    # HGX H100, H200 and B200, 200 in DGX A100, 100 in DGX-1 V and in cloud servers with the smaller cards.
    _gpu("h100", ("H100",), 989, 80, 3350, 450, 50),
    _gpu("h100-pcie", ("H100 PCIe",), 756, 80, 2000, 64, 50),
    _gpu("h100-nvl", ("H100 NVL",), 835, 94, 3900, 300, 50),
    _gpu("h200", ("H200",), 989, 141, 4800, 450, 50),
    _gpu("gh200", ("GH200",), 989, 96, 4000, 450, 50),
    _gpu("b200", ("B200",), 2250, 180, 8000, 900, 50),
    _gpu("a100", ("A100",), 312, 80, 2039, 300, 25),
    _gpu("v100", ("V100",), 125, 32, 900, 150, 12.5),
    _gpu("a10", ("A10",), 125, 24, 600, 32, 12.5),
    _gpu("a10g", ("A10G",), 70, 24, 600, 32, 12.5),
    _gpu("t4", ("T4",), 65, 16, 320, 16, 12.5),
    _gpu("l4", ("L4",), 121, 24, 300, 32, 12.5),
    _gpu("l40s", ("L40S",), 362, 48, 864, 32, 12.5),
    _gpu("rtx3090", ("RTX 3090",), 71, 24, 936, 32, 12.5),
    _gpu("rtx4090", ("RTX 4090",), 165, 24, 1008, 32, 12.5),
    # Of v2 and v3 half a chip: 16 and 32 GB, 700 and 900 GB/s, 496 and 656 Gb/s on each of four links.
    _tpu("v2", ("TPU v2",), 22.5, 8, 350, 992, 2),
    _tpu("v3", ("TPU v3",), 61.5, 16, 450, 1312, 2),
    _tpu("v4", ("TPU v4",), 275, 32, 1200, 2400, 3),  # libtpu compiles for its cores apart
    _tpu("v5e", ("TPU v5e", "TPU v5 lite"), 197, 16, 819, 1600, 2, compiles="v5e"),
    _tpu("v5p", ("TPU v5p", "TPU v5"), 459, 95, 2765, 4800, 3, compiles="v5p"),
    _tpu("v6e", ("TPU v6e", "TPU v6 lite"), 918, 32, 1640, 3200, 2, "trillium", compiles="v6e"),
)
"""Every kind that is known."""


def known_kind(jax_name: str) -> DeviceKind | None:
    """The kind of a device by jax's `device_kind`: that with the longest part whose words it has; None if unknown."""
    words = jax_name.replace("-", " ").split()

    def fits(entry: str) -> bool:
        part = entry.split()
        return any(words[i : i + len(part)] == part for i in range(len(words)))

    found = [(len(entry), index) for index, kind in enumerate(DEVICE_KINDS) for entry in kind.words if fits(entry)]
    return DEVICE_KINDS[max(found)[1]] if found else None


def peak_flops(jax_name: str) -> float | None:
    """The peak 16-bit rate of a device by jax's `device_kind`; None if it is unknown."""
    kind = known_kind(jax_name)
    return None if kind is None else kind.peak_flops


def device_kind(name: str) -> DeviceKind:
    """The kind that a user calls `name`.

    Raises:
      UserError: no kind is called so.
    """
    for kind in DEVICE_KINDS:
        if name.lower() in (kind.name, *kind.aliases):
            return kind
    names = [name for kind in DEVICE_KINDS for name in (kind.name, *kind.aliases)]
    raise UserError(f"--device-kind is {name!r}; accepted: {', '.join(names)}.")
