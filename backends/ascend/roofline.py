"""What a chip could do at most, by the vendor's public performance model: a model, not a measurement, and labelled so."""

from __future__ import annotations

from dataclasses import dataclass

LABEL = "model, not measurement"
# FLOP per byte below which exchange of experts hides behind computing: twice the experts' width (2,048 and 3,072)
BALANCE: dict[str, int] = {"Flash": 4096, "Pro": 6144}


@dataclass(frozen=True)
class Profile:
    """Peaks of one device; on 910C that is one die of two in a package.

    Attributes:
        name: of the row in the source. chips: SoC names it is for, matched to it by their number of cores.
        bf16, int8, fp8: 10**12 operations per second, None where the chip has no such product.
        memory_gb, bandwidth_tb_s: of the device. link_gb_s: to another device of its group, one way.
        compute_share, memory_share: of the peaks, that the source assumes to be reachable.

    Source: Ascend/msmodeling at 84fec85 (2026-08-21), tensor_cast/device.py.
    """

    name: str
    chips: tuple[str, ...]
    bf16: float
    int8: float
    fp8: float | None
    memory_gb: int
    bandwidth_tb_s: float
    link_gb_s: int
    compute_share: float = 0.7
    memory_share: float = 0.6

    @property
    def widest(self) -> tuple[str, float]:
        """The product that most of a model's work takes here, and its peak."""
        return ("FP8", self.fp8) if self.fp8 is not None else ("INT8", self.int8)


PROFILES: tuple[Profile, ...] = (
    Profile(
        "ATLAS_800_A2_376T_64G", ("Ascend910B1", "Ascend910B2", "Ascend910B2C"), 353.9, 752, None, 64, 1.6, 196
    ),
    Profile("ATLAS_800_A2_313T_64G", ("Ascend910B3",), 294.9, 626, None, 64, 1.6, 196),
    Profile("ATLAS_800_A2_280T_64G", ("Ascend910B4-1",), 245.8, 560, None, 64, 1.6, 196),
    Profile("ATLAS_800_A2_280T_32G_PCIE", ("Ascend910B4",), 245.8, 560, None, 32, 0.8, 64),
    Profile(
        "ATLAS_800_A3_752T_128G_DIE",
        ("Ascend910_9391", "Ascend910_9392", "Ascend910_9381", "Ascend910_9382"), 353.9, 752, None, 64, 1.6, 196,
    ),
    Profile(
        "ATLAS_800_A3_560T_128G_DIE", ("Ascend910_9372", "Ascend910_9362"), 245.8, 560, None, 64, 1.6, 196
    ),
    Profile("ATLAS_350_425T_112G", ("Ascend950PR",), 378, 756, 756, 112, 1.4, 159, 0.9, 0.8),
)  # fmt: skip


def profile_of(chip: str) -> Profile | None:
    """The row for a SoC name; None for one that the source does not describe."""
    return next((p for p in PROFILES if chip in p.chips), None)


def lines(profile: Profile) -> tuple[str, ...]:
    """What the model says of a device, in words: peaks, the time to read weights, and whether exchange hides."""
    kind, peak = profile.widest
    reach_tb_s = profile.bandwidth_tb_s * profile.memory_share
    # a link's GB/s against 10**12 operations per second
    ratio = peak * 1e3 / profile.link_gb_s
    hides = ", ".join(
        f"{name} {'hides' if ratio <= bound else 'does not'}" for name, bound in BALANCE.items()
    )
    return (
        f"{profile.name}: {profile.bf16:g} T BF16, {peak:g} T {kind}, {profile.memory_gb} GB at {profile.bandwidth_tb_s:g} TB/s",
        f"reading 1 GB of weights takes {1 / reach_tb_s:.2f} ms at {profile.memory_share:.0%} of the peak bandwidth",
        f"expert exchange behind {kind} computing over {profile.link_gb_s} GB/s: {ratio:.0f} FLOP per byte: {hides}",
    )
