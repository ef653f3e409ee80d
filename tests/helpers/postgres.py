"""A PostgreSQL server on loopback, for the time of a test module."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

USER, PASSWORD = "tester", "Open-sesame_7"
UNPRIVILEGED = ("postgres", "nobody")  # a server of root refuses to start
START_SECONDS = 30
SETTINGS = {"fsync": "off", "full_page_writes": "off", "synchronous_commit": "off", "max_connections": "60"}


def find_programs() -> Path | None:
    """The folder of `initdb` and `postgres`; None if there is no PostgreSQL."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).parent
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    return versions[-1].parent if versions else None


@dataclass
class Postgres:
    """A running server.

    Args:
        port: on 127.0.0.1.
    """

    port: int
    num_databases: int = 0

    def address(self, database: str, password: str = PASSWORD) -> str:
        """What `--storage` takes."""
        return f"postgresql://{USER}:{password}@127.0.0.1:{self.port}/{database}"

    def empty_database(self) -> str:
        """The address of a new database."""
        import psycopg

        self.num_databases += 1
        name = f"studies_{self.num_databases}"
        with psycopg.connect(self.address("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return self.address(name)


@contextmanager
def running_postgres(programs: Path) -> Iterator[Postgres]:
    """Initialise a cluster, and run its server."""
    identity = {} if os.geteuid() else _unprivileged_user()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = Path(tempfile.mkdtemp(prefix="ptp_postgres_"))  # pytest's folders are closed to other users
    try:
        if identity:
            os.chown(folder, identity["user"], identity["group"])
        (folder / "password").write_text(PASSWORD)
        (folder / "password").chmod(0o644)
        run = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **identity}
        initialise = ["--pgdata=data", f"--username={USER}", "--pwfile=password", "--auth=scram-sha-256", "--no-sync"]
        subprocess.run([programs / "initdb", *initialise, "--encoding=UTF8", "--locale=C"], check=True, **run)
        settings = SETTINGS | {"listen_addresses": "127.0.0.1", "port": str(port), "unix_socket_directories": ""}
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        server = subprocess.Popen([programs / "postgres", "-D", "data", *options], **run)
        try:
            _wait_for(port, server)
            yield Postgres(port)
        finally:
            server.send_signal(signal.SIGINT)  # after SIGTERM it would wait for its clients
            server.wait(timeout=30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unprivileged_user() -> dict[str, int]:
    for name in UNPRIVILEGED:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": entry.pw_uid, "group": entry.pw_gid}
    raise RuntimeError(f"expected one of the users {', '.join(UNPRIVILEGED)}, found none")


def _wait_for(port: int, server: subprocess.Popen) -> None:
    import psycopg

    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        assert server.poll() is None, "the server has ended"
        try:
            psycopg.connect(Postgres(port).address("postgres"), connect_timeout=2).close()
            return
        except psycopg.OperationalError:
            time.sleep(0.05)
    raise TimeoutError(f"no PostgreSQL at port {port}")
