"""Draw docs/results/crossing_losses.png: correct tokens of four losses by the number of steps.

Run from anywhere: python docs/results/crossing_losses.py
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

TABLE = Path(__file__).with_suffix(".csv")
OUTPUT = Path(__file__).with_suffix(".png")


def main() -> None:
    """Write the report of the study, and keep its curves."""
    with TemporaryDirectory() as folder:
        words = ["sweep", "report", "crossing_losses", "--full", "--from_csv", str(TABLE), "--output", folder]
        subprocess.run([sys.executable, "-m", "ptp_lightning", *words], check=True)
        shutil.copyfile(Path(folder) / "curves.png", OUTPUT)


if __name__ == "__main__":
    main()
