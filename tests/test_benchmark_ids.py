"""The stream of ids: drawn as it says, and a small run of its benchmark with a kill on the way."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from torchx_apps.benchmark import main
from torchx_apps.benchmarks._stream import Stream


@pytest.mark.parametrize(("lifetime", "steps"), [(50, 20), (50, 200), (7, 100)])
def test_stream_has_as_many_distinct_ids_as_it_says(lifetime: int, steps: int) -> None:
    stream = Stream(batch=4_096, lifetime=lifetime)
    found = len(torch.unique(torch.cat([stream.step(step)[1] for step in range(steps)])))
    assert found == pytest.approx(stream.expected_distinct(steps), rel=0.01)


def test_stream_stops_at_the_step_that_has_the_ids_asked_for() -> None:
    stream = Stream(batch=4_096, lifetime=50)
    steps = stream.steps_for(300_000)
    assert stream.expected_distinct(steps - 1) < 300_000 <= stream.expected_distinct(steps)


def test_expected_counts_of_a_window_are_the_counts() -> None:
    """Over the five hundred most frequent ranks the counts' distance from what is expected is that of chance."""
    stream, window, step = Stream(batch=5_000, lifetime=37), (100, 130), 131
    counts = Counter(torch.cat([stream.step(one)[1] for one in range(*window)]).tolist())
    ranks, ids = stream.step(step)
    seen = {rank: id_ for rank, id_ in zip(ranks.tolist(), ids.tolist()) if rank <= 500}
    expected = stream.expected_counts(torch.tensor(list(seen)), step, window)
    found = torch.tensor([counts[id_] for id_ in seen.values()], dtype=torch.float64)
    assert len(seen) > 200
    assert float(found.sum()) == pytest.approx(float(expected.sum()), rel=0.03)
    often = expected >= 10
    chi_square = ((found - expected) ** 2 / expected)[often].mean()
    assert 0.6 < float(chi_square) < 1.5


def test_killed_stream_goes_on_with_the_same_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    main(["ids", "--small", "--folder", str(tmp_path), "--json", str(file)])
    rows = {row["case"]: row for row in json.loads(file.read_text())}
    told = capsys.readouterr().out
    assert all(case in told for case in rows)
    assert rows["table after kill and resume equal to that before"]["median"] == 1
    assert rows["distinct ids so far, expected"]["median"] >= 6e4
    (frequent,) = (row for case, row in rows.items() if case.startswith("hits among frequent ids"))
    (every,) = (row for case, row in rows.items() if case == "hits among all events")
    assert frequent["p10"] > 0.95 > every["median"]
    assert rows["evicted per event"]["median"] > 0
    assert rows["rows that are taken at the end"]["median"] > 0.9
    assert [name for name in tmp_path.iterdir() if name != file] == []  # what it saved is gone


@pytest.mark.parametrize(
    ("told", "message"),
    [(["--rows", "0"], "--rows 0.0: choose 1 or more"), (["--processes", "3"], "choose a multiple of the 3 processes")],
)
def test_what_cannot_be_is_refused(told: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["ids", *told])
