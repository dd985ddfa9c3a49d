"""Accelerators that are not here: their memory and peak rates, as their makers state them."""

from __future__ import annotations

from dataclasses import dataclass

from vrpo.errors import ConfigError, nearest

# Share of the peak that training is taken to reach. Well-tuned diffusion transformers reach 0.3 to 0.5 in bfloat16.
UTILISATION = 0.35
# How many of them a machine usually has.
PER_MACHINE = 8


@dataclass(frozen=True)
class Machine:
    """One accelerator: memory in GB, and dense peak rates in TFLOP/s of bfloat16 and float32."""

    name: str
    memory_gb: float
    bf16: float
    fp32: float

    def rate(self, precision: str) -> float:
        """Return the peak in FLOP/s at a training precision."""
        return (self.fp32 if precision == "fp32" else self.bf16) * 1e12


# Dense rates with float32 accumulation, from the makers' data sheets; float32 without TF32.
MACHINES = {
    "a100": Machine("A100 SXM 80 GB", 80, 312, 19.5),
    "a100-40": Machine("A100 SXM 40 GB", 40, 312, 19.5),
    "h100": Machine("H100 SXM", 80, 989, 67),
    "h100-pcie": Machine("H100 PCIe", 80, 756, 51),
    "h200": Machine("H200 SXM", 141, 989, 67),
    "b200": Machine("B200", 180, 2250, 75),
    "l4": Machine("L4", 24, 121, 30.3),
    "l40s": Machine("L40S", 48, 362, 91.6),
    "a10": Machine("A10", 24, 125, 31.2),
    "rtx3090": Machine("RTX 3090", 24, 71, 35.6),
    "rtx4090": Machine("RTX 4090", 24, 165, 82.6),
    "rtx5090": Machine("RTX 5090", 32, 209, 104.8),
}


def find_machine(name: str) -> Machine:
    """Return the machine of that name; letter case, spaces and dashes are free.

    Raises:
        ConfigError: it is not in the table.
    """
    plain = {key.replace("-", ""): machine for key, machine in MACHINES.items()}
    found = plain.get(name.lower().replace(" ", "").replace("-", "").replace("_", ""))
    if found is None:
        raise ConfigError(f"--gpu '{name}' is not in the table of machines: {nearest(name.lower(), MACHINES)}")
    return found
