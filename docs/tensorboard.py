"""Draw docs/tensorboard.png: what TensorBoard shows of a run first, as a browser shows it.

Needs Chromium. Run from the root of the repository: python docs/tensorboard.py [FOLDER OF RUNS]
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

OUTPUT = Path(__file__).with_suffix(".png")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT = 1400, 800  # pixels
PAGE_MILLISECONDS = 20_000  # of the page's own clock, which runs faster than ours
START_SECONDS = 90
BROWSER_SECONDS = 120


def find_browser() -> str | None:
    """The path of Chromium; None without it."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """The address of TensorBoard on a folder of runs, until the end of the block.

    Raises:
        TimeoutError: it does not answer.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--logdir", str(folder), "--host", "127.0.0.1", "--port", str(port), "--load_fast", "false"]
    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                if urlopen(f"{address}/data/runs").read() != b"[]":
                    break
            except URLError:
                pass
            if server.poll() is not None or time.monotonic() > deadline:
                raise TimeoutError(f"TensorBoard does not show {folder}")
            time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        server.wait()


def browse(browser: str, address: str, *options: str) -> str:
    """What Chromium prints for a page that is complete."""
    words = [
        "--headless",
        "--no-sandbox",
        "--hide-scrollbars",
        "--disable-dev-shm-usage",
        f"--window-size={WIDTH},{HEIGHT}",
        *options,
    ]
    words += ["--disable-gpu", "--disable-3d-apis", f"--virtual-time-budget={PAGE_MILLISECONDS}", address]
    done = subprocess.run([browser, *words], capture_output=True, text=True, check=True, timeout=BROWSER_SECONDS)
    return done.stdout


def main() -> None:
    """Take the screenshot."""
    browser = find_browser()
    if browser is None:
        raise FileNotFoundError(f"expected one of {', '.join(BROWSERS)} on the path, found none")
    with tensorboard(Path(sys.argv[1] if len(sys.argv) > 1 else "runs")) as address:
        browse(browser, f"{address}/#timeseries", f"--screenshot={OUTPUT}")


if __name__ == "__main__":
    main()
