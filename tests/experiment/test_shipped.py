"""Every experiment that ships with the package runs, two rounds, in the runtimes it is for."""

import gzip

import numpy as np
import pytest

import p2pfl
from p2pfl.experiment.files import shipped

HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Files shaped like the data sets which users bring."""
    folder, rand = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    (folder / "heart").mkdir()
    for hospital in HOSPITALS:
        lines = []
        for _ in range(40):
            sick = rand.integers(0, 2)
            age, chol = 50 + 10 * sick + rand.normal(), 200 + rand.normal()
            values = [age, 1, 1 + rand.integers(4), 120, chol, 0, rand.integers(3)]
            values += [150, 0, 1.5, "?", "?", "?", sick * rand.integers(1, 5)]
            lines.append(",".join(map(str, values)))
        (folder / "heart" / f"processed.{hospital}.data").write_text("\n".join(lines) + "\n")
    labels = rand.integers(0, 10, 4000, dtype=np.uint8)
    images = rand.integers(0, 256, (4000, 28, 28), dtype=np.uint8)
    for name, header, array in (
        ("t10k-images-idx3-ubyte.gz", (2051, 4000, 28, 28), images),
        ("t10k-labels-idx1-ubyte.gz", (2049, 4000), labels),
    ):
        raw = np.array(header, dtype=">u4").tobytes() + array.tobytes()
        (folder / name).write_bytes(gzip.compress(raw, 1))
    return folder


CASES = [(name, on) for name in sorted(shipped()) for on in ("simulate", "emulate")]
for name in ("digits-gossip", "digits-stragglers"):  # these go by the clock
    CASES.remove((name, "simulate"))


@pytest.mark.parametrize(("name", "on"), CASES)
def test_it_runs(name, on, data, tmp_path):
    short = "pace.ticks=2" if name == "digits-gossip" else "pace.rounds=2"
    result = p2pfl.run(name, on=on, changes=[short], data=data, out=tmp_path / "run")
    assert result.summary["status"] == "finished"
    assert result.summary["rounds"] == 2
    assert np.isfinite(result.summary["eval_loss_mean"])
    assert len(result.metrics["round"]) == 2 * result.summary["nodes"]


def test_everything_ships():
    assert "digits" in shipped()
    assert len(shipped()) >= 8
