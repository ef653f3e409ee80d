"""PickUps: four streets in a row, and files that are not as they should be."""

from __future__ import annotations

import gzip
import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ptp_lightning.data.corpus import Split
from ptp_lightning.data.series import pickups
from ptp_lightning.data.series.pickups import PickUps, tour

# From west to east; the events visit them in this order.
STREETS = [(40.0, -74.0), (40.1, -73.9), (40.0, -73.8), (40.1, -73.7)]
VISITS = [2, 0, 3, 3, 1, 0, 2, 1] * 50


def write_csv(path: Path, visits: list[int] = VISITS, extra: str = "", header: str = "time,Latitude,longitude") -> Path:
    rng = np.random.default_rng(0)
    lines = [header]
    for number, street in enumerate(visits):
        latitude, longitude = np.array(STREETS[street]) + rng.normal(scale=0.001, size=2)
        lines.append(f"{number},{latitude:.6f},{longitude:.6f}")
    text = "\n".join(lines) + "\n" + extra
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def make_series(path: Path, **settings: Any) -> PickUps:
    defaults: dict[str, Any] = {"num_clusters": 4, "block_length": 8, "fit_fraction": 1.0}
    return PickUps(str(path), cache_dir=str(path.parent / "cache"), **(defaults | settings))


@pytest.mark.parametrize("name", ["events.csv", "events.csv.gz"])
def test_neighbourhoods_are_numbered_along_the_map(tmp_path: Path, name: str) -> None:
    series = make_series(write_csv(tmp_path / name))
    assert series.vocab_size == 4
    assert series.neighbourhoods.token_ids.tolist() == VISITS
    assert series.neighbourhoods.token_ids.dtype == np.int64
    np.testing.assert_allclose(series.neighbourhoods.centres, STREETS, atol=1e-3)


def test_far_away_events_draw_no_centre(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "events.csv", extra="".join(f"x,{45 + far},-60\n" for far in range(8)))
    assert make_series(path, fit_fraction=0.98).neighbourhoods.token_ids.tolist() == [*VISITS, *[3] * 8]
    assert make_series(path).neighbourhoods.token_ids.tolist() != [*VISITS, *[3] * 8]


def test_every_block_belongs_to_one_split(tmp_path: Path) -> None:
    series = make_series(write_csv(tmp_path / "events.csv", VISITS * 10))
    splits: list[Split] = ["train", "val", "test"]
    sizes = {split: len(series.blocks(split)) for split in splits}
    assert sum(sizes.values()) == 500 and sizes["train"] > 400 and sizes["val"] > 10 and sizes["test"] > 10
    assert all(block.tolist() == VISITS[:8] for split in splits for block in series.blocks(split))


def test_more_events_move_no_block_to_another_split(tmp_path: Path) -> None:
    few = make_series(write_csv(tmp_path / "few.csv", VISITS * 3)).blocks("val")
    many = make_series(write_csv(tmp_path / "many.csv", VISITS * 6)).blocks("val")
    assert few and len(many) > len(few)
    assert np.array_equal(np.stack(many[: len(few)]), np.stack(few))


class TestTour:
    def test_points_on_a_circle(self) -> None:
        # along any axis the two halves of a circle mix; the path goes round instead
        angles = np.random.default_rng(0).permutation(12) * np.pi / 6
        points = np.stack([np.cos(angles), 0.9 * np.sin(angles)], axis=1)
        path = points[tour(points)]
        steps = np.linalg.norm(np.diff(path, axis=0), axis=1)
        assert steps.max() < 0.6

    def test_no_shorter_path_by_brute_force(self) -> None:
        points = np.random.default_rng(1).normal(size=(6, 2))

        def length(order: Any) -> float:
            return float(np.linalg.norm(np.diff(points[list(order)], axis=0), axis=1).sum())

        assert length(tour(points)) <= 1.05 * min(map(length, itertools.permutations(range(6))))

    def test_does_not_depend_on_the_numbering(self) -> None:
        points = np.random.default_rng(2).normal(size=(9, 2))
        shuffled = points[np.random.default_rng(3).permutation(9)]
        np.testing.assert_array_equal(points[tour(points)], shuffled[tour(shuffled)])


class TestCache:
    def test_written_once_and_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write_csv(tmp_path / "events.csv")
        expected = make_series(path).neighbourhoods
        monkeypatch.setattr(pickups, "cluster", lambda *_: pytest.fail("clustered again"))
        found = make_series(path).neighbourhoods
        assert all(np.array_equal(*arrays) for arrays in zip(found, expected, strict=True))
        assert [name for name in os.listdir(tmp_path / "cache") if not name.endswith(".npz")] == []

    @pytest.mark.parametrize("settings", [{"seed": 1}, {"num_clusters": 3}, {"fit_fraction": 0.9}])
    def test_other_settings_are_another_file(self, tmp_path: Path, settings: dict[str, Any]) -> None:
        path = write_csv(tmp_path / "events.csv")
        assert make_series(path)._cache_path() != make_series(path, **settings)._cache_path()

    def test_other_content_is_another_file(self, tmp_path: Path) -> None:
        before = make_series(write_csv(tmp_path / "events.csv"))._cache_path()
        assert make_series(write_csv(tmp_path / "events.csv", VISITS[1:]))._cache_path() != before

    @pytest.mark.parametrize("broken", [b"", b"no archive", None], ids=["empty", "garbage", "cut"])
    def test_what_cannot_be_read_is_made_anew(self, tmp_path: Path, broken: bytes | None) -> None:
        path = write_csv(tmp_path / "events.csv")
        expected = make_series(path).neighbourhoods.token_ids
        cache = make_series(path)._cache_path()
        whole = cache.read_bytes()
        cache.write_bytes(whole[: len(whole) // 2] if broken is None else broken)
        with pytest.warns(UserWarning, match="cannot be read.*computed again"):
            assert np.array_equal(make_series(path).neighbourhoods.token_ids, expected)
        assert cache.read_bytes() == whole


class TestBadFiles:
    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="events.csv, found none: set data.series.path"):
            make_series(tmp_path / "events.csv")

    @pytest.mark.parametrize("bad", ["9,,\n", "9,40.0\n", "9,north,-74\n", "9,nan,-74\n", "9,90.5,-74\n", "9,40,181\n"])
    def test_rows_without_coordinates(self, tmp_path: Path, bad: str) -> None:
        path = write_csv(tmp_path / "events.csv", extra=bad + "10,40.0,-74.0\n\n" + bad)
        with pytest.raises(ValueError, match="found 2 of 403 rows without, the first in line 402.*skip_invalid"):
            make_series(path).tokens("train")
        assert len(make_series(path, skip_invalid=True).neighbourhoods.token_ids) == 401

    def test_missing_column(self, tmp_path: Path) -> None:
        path = write_csv(tmp_path / "events.csv", header="time,lat,lon")
        with pytest.raises(ValueError, match="column 'latitude'.*'lat', 'lon'.*data.series.latitude_column"):
            make_series(path).tokens("train")
        found = make_series(path, latitude_column="Lat", longitude_column="lon").neighbourhoods
        assert found.token_ids.tolist() == VISITS

    @pytest.mark.parametrize("text", ["", "latitude,longitude\n", "latitude,longitude\n1,2\n1,2\n"])
    def test_too_few_places(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "events.csv"
        path.write_text(text)
        with pytest.raises(ValueError, match="column 'latitude'" if not text else "at least 4 distinct locations"):
            make_series(path).tokens("train")

    @pytest.mark.parametrize(("key", "value"), [("num_clusters", 1), ("block_length", 0), ("fit_fraction", 0.0)])
    def test_settings(self, tmp_path: Path, key: str, value: float) -> None:
        with pytest.raises(ValueError, match=f"data.series.{key}.*{value}"):
            make_series(write_csv(tmp_path / "events.csv"), **{key: value})
