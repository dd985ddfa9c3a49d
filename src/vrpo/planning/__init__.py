"""What a run will need, before it is started: arithmetic, memory, disk, time."""
