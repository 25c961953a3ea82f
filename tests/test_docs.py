"""What the README and the guide show is run here, as it stands, with fewer rounds."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from p2pfl.experiment.experiment import Experiment

ROOT = Path(__file__).parents[1]


def blocks(page, language):
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


@pytest.fixture(scope="module")
def ring(tmp_path_factory):
    """The folder of a user who followed the README."""
    folder = tmp_path_factory.mktemp("user")
    toml = next(block for block in blocks("README.md", "toml") if "# ring.toml" in block)
    (folder / "ring.toml").write_text(toml.replace("rounds = 100", "rounds = 2"))
    return folder


@pytest.mark.processes
def test_the_first_experiment_of_the_readme(ring):
    commands = next(b for b in blocks("README.md", "console") if "ring.toml --on local" in b)
    lines = [line[2:] for line in commands.splitlines() if line.startswith("$ ")]
    assert len(lines) == 6
    for line in lines:
        words = shlex.split(line, comments=True)
        assert words[0] == "p2pfl"
        done = subprocess.run(
            [sys.executable, "-m", *words], cwd=ring, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, (line, done.stderr)
    (python,) = blocks("README.md", "python")
    code = python.replace("pace.rounds=50", "pace.rounds=3")
    done = subprocess.run([sys.executable, "-c", code], cwd=ring, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_model_of_the_guide(tmp_path):
    toml = next(block for block in blocks("docs/guide.md", "toml") if "factory" in block)
    python = next(block for block in blocks("docs/guide.md", "python") if "def make" in block)
    (tmp_path / "mymodel.py").write_text(python)
    (tmp_path / "mine.toml").write_text(toml)
    experiment = Experiment.load(tmp_path / "mine.toml")
    assert experiment.task(experiment.federation(only=0), None).d == 64 * 32 + 32 + 32 * 10 + 10


def test_the_stopping_rules_of_the_guide():
    (rules,) = (block for block in blocks("docs/guide.md", "toml") if "plateau" in block)
    for line in rules.splitlines():
        Experiment.from_dict({}, changes=[f"pace.{line.replace(' = ', '=', 1)}"])


def test_links_between_pages_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (page.name, target)
