"""PickUps: places on a map, in the order of time, as a series of neighbourhoods."""

import csv
import gzip
import hashlib
import io
import json
import os
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np

from ptp_lightning.data.corpus import Split, split_of
from ptp_lightning.data.series.series import RecordedSeries
from ptp_lightning.utils.atomic_files import write_atomically

CACHE_FORMAT = 1  # part of the cache's key: raise it when the same settings would give other ids
RESTARTS = 4  # of k-means, of which the best is taken
LARGEST_LATITUDE, LARGEST_LONGITUDE = 90.0, 180.0


class Neighbourhoods(NamedTuple):
    """A clustered file.

    Attributes:
        token_ids: `[T]` int64, the neighbourhood of each event, in the order of the file.
        centres: `[num_clusters, 2]` float64, latitude and longitude of each neighbourhood, degrees.
    """

    token_ids: np.ndarray
    centres: np.ndarray


@dataclass(frozen=True)
class PickUps(RecordedSeries):
    """Events of a CSV file with coordinates, each replaced by the number of its neighbourhood.

    Neighbourhoods are clusters of k-means over latitude and longitude (longitude shrunk by the cosine of the mean
    latitude, so that both count distance alike). A few far-away events would draw most centres to themselves, so
    centres are fitted to the `fitted_share` of events that are nearest to the median place, and all others belong to
    the nearest centre. Neighbourhoods are numbered along a short path through their centres (see `tour`), so
    neighbouring numbers are neighbours on the map. Events stay in the order of the file, which should be that of time.
    Blocks of `block_length` events are assigned to the splits by a hash of their number, 90/5/5.

    Clusters are found when data are first asked for, and kept in a file named after the content of the CSV file and
    these settings.

    Args:
        path: the CSV file, with a header, which has to be given; `.gz` files are unpacked on the way.
        num_clusters: neighbourhoods, which is the vocabulary.
        seed: of k-means.
        fitted_share: share of the events that centres are fitted to; 1 for ordinary k-means.
        block_length: events per block.
        latitude_column: its name in the header; capitals do not matter.
        longitude_column: the same.
        skip_invalid: leave out rows without valid coordinates; they are an error otherwise.
        cache_dir: folder of the cache; by default `ptp_lightning` in the user's cache folder.
    """

    path: str = ""
    num_clusters: int = 25
    seed: int = 0
    fitted_share: float = 0.94
    block_length: int = 2048
    latitude_column: str = "latitude"
    longitude_column: str = "longitude"
    skip_invalid: bool = False
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        """Refuse a file that does not exist and sizes that make no series, before any work starts."""
        if not self.path:  # a default, so that this message is the one that is seen
            raise ValueError(
                "expected a CSV file with latitudes and longitudes, found no path: set data.series.path, on the "
                "command line --data.init_args.series.init_args.path FILE"
            )
        if not Path(self.path).is_file():
            raise FileNotFoundError(
                f"expected a CSV file with latitudes and longitudes at {self.path}, found none: set data.series.path"
            )
        if not 0 < self.fitted_share <= 1:
            raise ValueError(f"expected 0 < data.series.fitted_share <= 1, found {self.fitted_share}")
        for name, minimum in (("num_clusters", 2), ("block_length", 2)):
            if getattr(self, name) < minimum:
                raise ValueError(f"expected data.series.{name} >= {minimum}, found {getattr(self, name)}")

    @property
    def vocab_size(self) -> int:
        """Neighbourhoods."""
        return self.num_clusters

    def blocks(self, split: Split) -> list[np.ndarray]:
        """The blocks of a split, see `RecordedSeries.blocks`; raises as `neighbourhoods`."""
        token_ids = self.neighbourhoods.token_ids
        begins = range(0, len(token_ids), self.block_length)
        return [
            token_ids[begin : begin + self.block_length]
            for number, begin in enumerate(begins)
            if split_of(f"block {number}") == split
        ]

    @cached_property
    def neighbourhoods(self) -> Neighbourhoods:
        """The clustered file, from the cache if it is there.

        Raises:
            ValueError: a column is missing, coordinates are invalid, or there are fewer places than clusters.
        """
        path = self._cache_path()
        cached = self._read_cache(path)
        if cached is not None:
            return cached
        found = cluster(self._coordinates(), self.num_clusters, self.seed, self.fitted_share)
        _write(path, found)
        return found

    def _coordinates(self) -> np.ndarray:
        """`[T, 2]` float64, latitude and longitude in degrees."""
        coordinates: list[tuple[float, float]] = []
        invalid: list[int] = []
        with _open_text(Path(self.path)) as lines:
            rows = csv.reader(lines)
            header = [name.strip().lower() for name in next(rows, [])]
            latitude, longitude = (
                self._column(header, key, getattr(self, key)) for key in ("latitude_column", "longitude_column")
            )
            for row in rows:
                if not row:  # an empty line, such as the last one
                    continue
                try:
                    place = float(row[latitude]), float(row[longitude])
                except (ValueError, IndexError):
                    place = float("nan"), float("nan")
                if abs(place[0]) <= LARGEST_LATITUDE and abs(place[1]) <= LARGEST_LONGITUDE:  # false for NaN
                    coordinates.append(place)
                else:
                    invalid.append(rows.line_num)
        if invalid and not self.skip_invalid:
            raise ValueError(
                f"expected a latitude within +-{LARGEST_LATITUDE:g} and a longitude within +-{LARGEST_LONGITUDE:g} in "
                f"every row of {self.path}, found {len(invalid)} of {len(coordinates) + len(invalid)} rows without, "
                f"the first in line {invalid[0]}: set the file, or leave them out with data.series.skip_invalid: true"
            )
        return np.array(coordinates, dtype=np.float64).reshape(-1, 2)

    def _column(self, header: list[str], key: str, name: str) -> int:
        if name.lower() not in header:
            raise ValueError(
                f"expected a column {name!r} in {self.path}, found {header}: set data.series.{key} or the header"
            )
        return header.index(name.lower())

    def _cache_path(self) -> Path:
        with Path(self.path).open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        settings = (
            CACHE_FORMAT,
            content,
            self.num_clusters,
            self.seed,
            self.fitted_share,
            self.latitude_column.lower(),
            self.longitude_column.lower(),
            self.skip_invalid,
        )
        name = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]
        return (_user_cache() if self.cache_dir is None else Path(self.cache_dir)) / f"pickups-{name}.npz"

    def _read_cache(self, path: Path) -> Neighbourhoods | None:
        """The cached result; None if there is none, or none that can be read."""
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as arrays:
                found = Neighbourhoods(arrays["token_ids"], arrays["centres"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zipfile.error) as error:
            warnings.warn(f"{path} cannot be read ({error}), so the file is clustered anew", stacklevel=2)
            return None
        return found


def cluster(coordinates: np.ndarray, num_clusters: int, seed: int, fitted_share: float = 1.0) -> Neighbourhoods:
    """k-means on `[T, 2]` latitudes and longitudes, numbered along a short path; see `PickUps`.

    Raises:
        ValueError: there are fewer different places than clusters.
    """
    from sklearn.cluster import KMeans

    places = coordinates * _degrees_of_equal_length(coordinates)
    from_median = np.linalg.norm(places - np.median(places, axis=0), axis=1) if len(places) else np.zeros(0)
    fitted = places[from_median <= np.quantile(from_median, fitted_share)] if len(places) else places
    num_places = len(np.unique(fitted, axis=0))
    if num_places < num_clusters:
        raise ValueError(
            f"expected at least {num_clusters} different places, found {num_places}: lower data.series.num_clusters"
        )
    model = KMeans(num_clusters, random_state=seed, n_init=RESTARTS)  # pyright: ignore[reportArgumentType]
    model.fit(fitted)
    order = tour(model.cluster_centers_)
    number_of = np.argsort(order)  # its inverse: old number to new one
    centres = model.cluster_centers_[order] / _degrees_of_equal_length(coordinates)
    return Neighbourhoods(number_of[model.predict(places)].astype(np.int64), centres)


def _degrees_of_equal_length(coordinates: np.ndarray) -> np.ndarray:
    """`[2]`: factors for latitude and longitude that make a degree of both the same distance around `[T, 2]`."""
    return np.array([1.0, np.cos(np.radians(coordinates[:, 0].mean()))]) if len(coordinates) else np.ones(2)


def tour(points: np.ndarray) -> np.ndarray:
    """An order `[P]` in which consecutive points `[P, 2]` are close: a short open path through all of them.

    It starts as the order along the first principal axis; then pieces are turned round as long as that shortens the
    path (2-opt). The path runs from the end that lies first on the axis, and the axis points to where its larger
    component is positive, so the result does not depend on the points' own order (except among ties).
    """
    centred = points - points.mean(0)
    axis = np.linalg.svd(centred, full_matrices=False)[2][0]
    along = centred @ (axis * np.sign(axis[np.abs(axis).argmax()]))
    order = np.argsort(along, kind="stable")
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)

    def step(left: int, right: int) -> float:
        """Length of the step between two places of the path; nothing before its start and after its end."""
        return 0.0 if left < 0 or right >= len(order) else float(distance[order[left], order[right]])

    improved = True
    while improved:
        improved = False
        for begin in range(len(order)):
            for end in range(begin + 1, len(order)):
                before = step(begin - 1, begin) + step(end, end + 1)
                turned = order.copy()
                turned[begin : end + 1] = order[begin : end + 1][::-1]
                kept, order = order, turned
                if step(begin - 1, begin) + step(end, end + 1) < before - 1e-12:
                    improved = True
                else:
                    order = kept
    return order if along[order[0]] <= along[order[-1]] else order[::-1]


@contextmanager
def _open_text(path: Path) -> Iterator[TextIO]:
    """A text file that may be packed by gzip."""
    with (
        gzip.open(path, "rt", encoding="utf-8-sig", newline="")
        if path.suffix == ".gz"
        else path.open(encoding="utf-8-sig", newline="") as file
    ):
        yield file


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ptp_lightning"


def _write(path: Path, found: Neighbourhoods) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, token_ids=found.token_ids, centres=found.centres)
    write_atomically(path, buffer.getvalue())
