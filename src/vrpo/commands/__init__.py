"""The commands of ``vrpo``: what each takes, and the one call it makes."""
