"""From a run to a published checkpoint and back: what the code of DiT, SiT, REPA and REG reads, and runs made of it."""
