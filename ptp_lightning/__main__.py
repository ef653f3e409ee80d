"""python -m ptp_lightning."""

from ptp_lightning.cli import main

if __name__ == "__main__":
    main()
