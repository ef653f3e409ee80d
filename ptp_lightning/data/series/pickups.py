"""PickUps: a time-ordered list of coordinates as a series of neighbourhoods (clusters)."""

import csv
import gzip
import hashlib
import io
import json
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
from ptp_lightning.utils.local_paths import local_path
from ptp_lightning.utils.packaged_models import user_cache

CACHE_FORMAT = 1  # part of the cache key; to be raised when the same settings give other ids
RESTARTS = 4  # of k-means; the best result is used
LARGEST_LATITUDE, LARGEST_LONGITUDE = 90.0, 180.0


class Neighbourhoods(NamedTuple):
    """The clusters of a file.

    Attributes:
        token_ids: `[T]` int64, the neighbourhood of each event, in the order of the file.
        centres: `[num_clusters, 2]` float64, latitude and longitude of each neighbourhood, degrees.
    """

    token_ids: np.ndarray
    centres: np.ndarray


@dataclass(frozen=True)
class PickUps(RecordedSeries):
    """Events of a CSV file with coordinates; the token of an event is the number of its neighbourhood.

    Neighbourhoods are k-means clusters of latitude and longitude; longitude is scaled by the cosine of the mean
    latitude. Centres are fitted to the `fit_fraction` of events nearest to the median location, because a few distant
    events would attract most centres. All events are assigned to the nearest centre. Neighbourhoods are numbered along
    a short path through their centres (see `tour`), so that consecutive numbers are near each other on the map. Events
    keep the order of the file, which should be the order of time. Blocks of `block_length` events are assigned to the
    splits by a hash of their number, in the ratio 90/5/5.

    Clusters are computed when they are first needed, and cached in a file whose name is a hash of the content of the
    CSV file and of these settings.

    Args:
        path: CSV file with a header, required; `.gz` files are decompressed.
        num_clusters: number of neighbourhoods, the vocabulary size.
        seed: of k-means.
        fit_fraction: fraction of the events that centres are fitted to; 1 for ordinary k-means.
        block_length: events per block.
        latitude_column: column name in the header, case-insensitive.
        longitude_column: column name in the header, case-insensitive.
        skip_invalid: skip rows without valid coordinates, instead of raising an error.
        cache_dir: folder of the cache; by default `ptp_lightning` in the user's cache folder.
    """

    path: str = ""
    num_clusters: int = 25
    seed: int = 0
    fit_fraction: float = 0.94
    block_length: int = 2048
    latitude_column: str = "latitude"
    longitude_column: str = "longitude"
    skip_invalid: bool = False
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        """Check the arguments before any work starts."""
        if not self.path:  # the field has a default, so that the user sees this message instead of a missing argument
            raise ValueError(
                "expected a CSV file with latitudes and longitudes, found no path: set data.series.path (on the "
                "command line --data.init_args.series.init_args.path FILE)"
            )
        if not local_path(self.path, "data.series.path").is_file():
            raise FileNotFoundError(
                f"expected a CSV file with latitudes and longitudes at {self.path}, found none: set data.series.path"
            )
        if not 0 < self.fit_fraction <= 1:
            raise ValueError(f"expected 0 < data.series.fit_fraction <= 1, found {self.fit_fraction}")
        for name, minimum in (("num_clusters", 2), ("block_length", 2)):
            if getattr(self, name) < minimum:
                raise ValueError(f"expected data.series.{name} >= {minimum}, found {getattr(self, name)}")

    @property
    def vocab_size(self) -> int:
        """V, the number of neighbourhoods."""
        return self.num_clusters

    def blocks(self, split: Split) -> list[np.ndarray]:
        """See `RecordedSeries.blocks`; raises as `neighbourhoods`."""
        token_ids = self.neighbourhoods.token_ids
        begins = range(0, len(token_ids), self.block_length)
        return [
            token_ids[begin : begin + self.block_length]
            for number, begin in enumerate(begins)
            if split_of(f"block {number}") == split
        ]

    @cached_property
    def neighbourhoods(self) -> Neighbourhoods:
        """The clusters of the file, from the cache if it exists.

        Raises:
            ValueError: a column is missing, coordinates are invalid, or there are fewer locations than clusters.
        """
        path = self._cache_path()
        cached = self._read_cache(path)
        if cached is not None:
            return cached
        found = cluster(self._coordinates(), self.num_clusters, self.seed, self.fit_fraction)
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
                if not row:  # an empty line, for example the last one
                    continue
                try:
                    location = float(row[latitude]), float(row[longitude])
                except (ValueError, IndexError):
                    location = float("nan"), float("nan")
                if abs(location[0]) <= LARGEST_LATITUDE and abs(location[1]) <= LARGEST_LONGITUDE:  # false for NaN
                    coordinates.append(location)
                else:
                    invalid.append(rows.line_num)
        if invalid and not self.skip_invalid:
            raise ValueError(
                f"expected a latitude within +-{LARGEST_LATITUDE:g} and a longitude within +-{LARGEST_LONGITUDE:g} in "
                f"every row of {self.path}, found {len(invalid)} of {len(coordinates) + len(invalid)} rows without, "
                f"the first in line {invalid[0]}: set data.series.path, or data.series.skip_invalid: true to skip them"
            )
        return np.array(coordinates, dtype=np.float64).reshape(-1, 2)

    def _column(self, header: list[str], key: str, name: str) -> int:
        if name.lower() not in header:
            raise ValueError(
                f"expected a column {name!r} in {self.path}, found {header}: set data.series.{key} or change the header"
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
            self.fit_fraction,
            self.latitude_column.lower(),
            self.longitude_column.lower(),
            self.skip_invalid,
        )
        name = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]
        return (user_cache() if self.cache_dir is None else Path(self.cache_dir)) / f"pickups-{name}.npz"

    def _read_cache(self, path: Path) -> Neighbourhoods | None:
        """The cached clusters; None if the file does not exist or cannot be read."""
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as arrays:
                found = Neighbourhoods(arrays["token_ids"], arrays["centres"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zipfile.error) as error:
            warnings.warn(f"{path} cannot be read ({error}); the clusters are computed again", stacklevel=2)
            return None
        return found


def cluster(coordinates: np.ndarray, num_clusters: int, seed: int, fit_fraction: float = 1.0) -> Neighbourhoods:
    """k-means of `[T, 2]` latitudes and longitudes, numbered along a short path; see `PickUps`.

    Raises:
        ValueError: there are fewer distinct locations than clusters.
    """
    from sklearn.cluster import KMeans

    points = coordinates * _degree_scale(coordinates)
    from_median = np.linalg.norm(points - np.median(points, axis=0), axis=1) if len(points) else np.zeros(0)
    fitted = points[from_median <= np.quantile(from_median, fit_fraction)] if len(points) else points
    num_points = len(np.unique(fitted, axis=0))
    if num_points < num_clusters:
        raise ValueError(
            f"expected at least {num_clusters} distinct locations, found {num_points}: lower data.series.num_clusters"
        )
    model = KMeans(num_clusters, random_state=seed, n_init=RESTARTS)  # pyright: ignore[reportArgumentType]
    model.fit(fitted)
    order = tour(model.cluster_centers_)
    number_of = np.argsort(order)  # the inverse permutation
    centres = model.cluster_centers_[order] / _degree_scale(coordinates)
    return Neighbourhoods(number_of[model.predict(points)].astype(np.int64), centres)


def _degree_scale(coordinates: np.ndarray) -> np.ndarray:
    """`[2]`: factors that make a degree of latitude and of longitude the same distance, around `[T, 2]`."""
    return np.array([1.0, np.cos(np.radians(coordinates[:, 0].mean()))]) if len(coordinates) else np.ones(2)


def tour(points: np.ndarray) -> np.ndarray:
    """A permutation `[P]` of points `[P, 2]` in which consecutive points are near: a short open path through all.

    The first path follows the first principal axis. Segments are reversed while that shortens the path (2-opt). The
    path starts at the end that comes first on the axis, and the larger component of the axis is positive, so that the
    result does not depend on the order of the points (except for ties).

    >>> tour(np.array([[0.0, 2.0], [0.0, 0.0], [0.0, 1.0]])).tolist()
    [1, 2, 0]
    """
    centred = points - points.mean(0)
    axis = np.linalg.svd(centred, full_matrices=False)[2][0]
    along = centred @ (axis * np.sign(axis[np.abs(axis).argmax()]))
    order = np.argsort(along, kind="stable")
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)

    def step(left: int, right: int) -> float:
        """Distance between two positions of the path; 0 before its start and after its end."""
        return 0.0 if left < 0 or right >= len(order) else float(distance[order[left], order[right]])

    improved = True
    while improved:
        improved = False
        for begin in range(len(order)):
            for end in range(begin + 1, len(order)):
                before = step(begin - 1, begin) + step(end, end + 1)
                flipped = order.copy()
                flipped[begin : end + 1] = order[begin : end + 1][::-1]
                previous, order = order, flipped
                if step(begin - 1, begin) + step(end, end + 1) < before - 1e-12:
                    improved = True
                else:
                    order = previous
    return order if along[order[0]] <= along[order[-1]] else order[::-1]


@contextmanager
def _open_text(path: Path) -> Iterator[TextIO]:
    """A text file, possibly compressed by gzip."""
    with (
        gzip.open(path, "rt", encoding="utf-8-sig", newline="")
        if path.suffix == ".gz"
        else path.open(encoding="utf-8-sig", newline="") as file
    ):
        yield file


def _write(path: Path, found: Neighbourhoods) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, token_ids=found.token_ids, centres=found.centres)
    write_atomically(path, buffer.getvalue())
