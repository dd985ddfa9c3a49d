"""``python -m vrpo`` is the command ``vrpo``."""

from vrpo.cli import main

if __name__ == "__main__":
    main()
