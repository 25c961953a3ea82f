"""The files in docs/deploy, as far as they can be checked without the engines they are for."""

import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

from p2pfl.cli import app
from p2pfl.security.roster import read_roster

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "docs" / "deploy"
BIN = Path(sys.executable).parent
NODES = 4

RECORD = f"""#!{sys.executable}
import json, os, pathlib, sys
if sys.argv[1] == "keys":
    print("k" * 39 + os.environ["SLURM_PROCID"])
    sys.exit("FAIL" in os.environ)
folder = pathlib.Path(__file__).with_name("told")
folder.mkdir(exist_ok=True)
(folder / str(os.getpid())).write_text(json.dumps(sys.argv[1:]))
"""
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for ((k = 0; k < SLURM_NTASKS; k++)); do
  SLURM_PROCID=$k SLURM_LOCALID=$((k % PER_NODE)) "$@" &
done
for job in $(jobs -p); do wait "$job" || code=$?; done
exit "${code:-0}"
"""
EXPERIMENT = """
nodes = 3
data = {name = "breast_cancer"}
model = "logistic"
topology = "ring"
pace = {rounds = 2}
"""


def parsed(words):
    """Return the options of a ``p2pfl`` command, as p2pfl itself understands them."""
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        name, *words = words
        command = command.commands[name]
    return command.make_context(name, list(words)).params


def script(path, text):
    path.write_text(text)
    path.chmod(0o755)


def document(name):
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


@pytest.fixture
def told(tmp_path, monkeypatch):
    """Put a p2pfl first on the PATH that only notes how it was called; return the notes."""
    script(tmp_path / "p2pfl", RECORD)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def notes():
        found = [json.loads(path.read_text()) for path in tmp_path.glob("told/*")]
        return sorted((parsed(words) for words in found), key=lambda options: options["id"])

    return notes


# systemd


@pytest.fixture
def unit(tmp_path):
    """The unit of peer 3, for the p2pfl that is installed here."""
    text = (DEPLOY / "p2pfl@.service").read_text().replace("/opt/p2pfl/bin", str(BIN))
    path = tmp_path / "p2pfl@3.service"
    path.write_text(text)
    return path


def test_the_commands_of_the_unit(unit):
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str
    parser.read_string(unit.read_text().replace("\\\n", " "))
    service = parser["Service"]
    peer, keys = (
        parsed(shlex.split(service[key].replace("%i", "3"))[1:])
        for key in ("ExecStart", "ExecStartPre")
    )
    assert peer["id"] == 3
    assert peer["keys"] == keys["keys"]
    assert keys["if_missing"]
    assert service["RestartPreventExitStatus"] == "2"
    assert service["SuccessExitStatus"] == "143"


def test_systemd_accepts_the_unit_and_finds_it_confined(unit):
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd is not installed")
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    if "Failed to initialize manager" in done.stderr:
        pytest.skip(f"systemd cannot check units here: {done.stderr.strip()}")
    assert (done.returncode, done.stderr) == (0, "")
    words = ["systemd-analyze", "security", "--offline=true", "--threshold=20", "--no-pager", unit]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr


# Slurm


def slurm(folder, job, **changes):
    """Run the script as a job of three tasks."""
    about = {"NTASKS": "3", "JOB_ID": str(job), "CPUS_PER_TASK": "1"}
    environment = {**os.environ, **{f"SLURM_{key}": value for key, value in about.items()}}
    script(folder / "srun", SRUN)
    path = f"{folder}:{environment['PATH']}"
    return subprocess.run(
        [DEPLOY / "slurm.sh", "experiment.toml"],
        cwd=folder,
        env={**environment, "PATH": path, **changes},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_slurm_tells_every_task_who_it_is_and_where_the_others_are(tmp_path, told):
    script(tmp_path / "hostname", '#!/bin/bash\necho "node$((SLURM_PROCID / 2))"\n')
    done = slurm(tmp_path, job=1234, PER_NODE="2")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "slurm-1234"
    peers = tomllib.loads((run / "peers.toml").read_text())["peers"]
    places = ["node0:13400", "node0:13401", "node1:13400"]
    assert peers == [
        {"id": node, "address": f"tcp://{place}", "key": "k" * 39 + str(node)}
        for node, place in enumerate(places)
    ]
    calls = told()
    assert [call["id"] for call in calls] == [0, 1, 2]
    assert [call["bind"].rpartition(":")[2] for call in calls] == ["13400", "13401", "13400"]
    assert {call["set_"][0] for call in calls} == {"nodes=3"}
    assert len({call["out"] for call in calls}) == len({call["keys"] for call in calls}) == 3
    assert {call["peers"] for call in calls} == {run / "peers.toml"}


def test_slurm_starts_nobody_when_keys_cannot_be_made(tmp_path, told):
    done = slurm(tmp_path, job=1, PER_NODE="1", FAIL="1")
    assert done.returncode == 1
    assert not told()


@pytest.mark.processes
@pytest.mark.slow
def test_peers_of_a_slurm_job_train_together(tmp_path):
    script(tmp_path / "hostname", "#!/bin/bash\necho 127.0.0.1\n")
    (tmp_path / "experiment.toml").write_text(EXPERIMENT)
    path = f"{tmp_path}:{BIN}:{os.environ['PATH']}"
    done = slurm(tmp_path, job=os.getpid(), PER_NODE="3", PATH=path)
    assert done.returncode == 0, done.stderr
    summaries = sorted(tmp_path.glob("runs/*/peers/00?/summary.json"))
    states = [json.loads(summary.read_text())["status"] for summary in summaries]
    assert states == ["finished"] * 3
    roster = next(tmp_path.glob("runs/*/peers.toml"))
    before = roster.read_text()
    done = slurm(tmp_path, job=os.getpid(), PER_NODE="3", PATH=path)  # it is queued again
    assert (done.returncode, roster.read_text()) == (0, before)


# Containers


def test_the_readme_makes_the_keys(tmp_path):
    (line,) = re.findall(r"^\$ (for k in .*)$", (DEPLOY / "README.md").read_text(), flags=re.M)
    assert "0 1 2 3;" in line
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    two = ["bash", "-euc", line.replace("0 1 2 3", "0 1")]
    subprocess.run(two, cwd=tmp_path, env=environment, capture_output=True, check=True)
    roster = read_roster(tmp_path / "peers.toml")
    assert roster.addresses == {k: f"tcp://peer-{k}:7000" for k in range(2)}
    assert len(set(roster.keys.values())) == 2
    (compose,) = document("compose.yaml")
    for k in range(2):
        assert (tmp_path / compose["secrets"][f"key-{k}"]["file"]).is_file()


def test_each_service_of_the_compose_file_is_another_peer_with_its_own_key():
    (compose,) = document("compose.yaml")
    assert len(compose["services"]) == NODES
    outs = set()
    for node, (name, service) in enumerate(compose["services"].items()):
        program, *words = service["entrypoint"] + service["command"]
        options = parsed(words)
        assert (program, name, options["id"]) == ("p2pfl", f"peer-{node}", node)
        assert service["secrets"] == [{"source": f"key-{node}", "target": "keys.toml"}]
        assert compose["secrets"][f"key-{node}"] == {"file": f"keys/{node}.toml"}
        assert options["keys"] == Path("/run/secrets/keys.toml")
        outs.add(options["out"])
        assert options["resume"]
        inside = {volume.split(":")[1] for volume in service["volumes"]}
        assert inside == {"/config", "/runs"}  # no single file, which would never be a new one
        assert Path(options["experiment"]).parent == options["peers"].parent == Path("/config")
    assert len(outs) == NODES


def test_the_dockerfile_copies_what_is_there_and_what_the_build_needs():
    lines = re.findall(r"^COPY (.+) \S+$", (DEPLOY / "Dockerfile").read_text(), flags=re.M)
    copied = {name for line in lines for name in line.split()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {project["readme"], *project["license-files"], "p2pfl"} <= copied
    assert all((ROOT / name).exists() for name in copied)


@pytest.fixture
def pods():
    """The service, and what a pod is."""
    service, peers = document("kubernetes.yaml")
    assert (service["kind"], peers["kind"]) == ("Service", "StatefulSet")
    return service, peers["spec"]


def test_the_parts_of_the_kubernetes_file_belong_together(pods):
    service, spec = pods
    labels = spec["template"]["metadata"]["labels"]
    assert spec["serviceName"] == service["metadata"]["name"] == "p2pfl"
    assert service["spec"]["selector"] == spec["selector"]["matchLabels"] == labels
    pod = spec["template"]["spec"]
    volumes = {one["name"]: one for one in pod["volumes"]}
    claims = {claim["metadata"]["name"] for claim in spec["volumeClaimTemplates"]}
    (first,), (peer,) = pod["initContainers"], pod["containers"]
    mounted = [{mount["name"] for mount in one["volumeMounts"]} for one in (first, peer)]
    assert mounted[0] | mounted[1] == volumes.keys() | claims
    assert "keys" not in mounted[1]  # there are the keys of all
    assert volumes["keys"]["secret"]["defaultMode"] == 0o400


def test_a_pod_takes_its_own_key_and_its_own_number(pods, tmp_path, told, monkeypatch):
    for folder in ("keys", "private", "runs"):
        (tmp_path / folder).mkdir()
    for node in range(NODES):
        (tmp_path / "keys" / f"{node}.toml").write_text(f"key {node}")
        (tmp_path / "keys" / f"{node}.toml").chmod(0o440)
    monkeypatch.setenv("POD_NAME", "p2pfl-2")
    pod = pods[1]["template"]["spec"]

    def run(container):
        words = [
            re.sub(r"/(keys|private|runs)/", rf"{tmp_path}/\1/", word)
            for word in container["command"]
        ]
        return subprocess.run(words, capture_output=True, text=True, timeout=30, check=True)

    run(pod["initContainers"][0])
    private = tmp_path / "private" / "keys.toml"
    assert (private.read_text(), private.stat().st_mode & 0o777) == ("key 2", 0o600)
    run(pod["containers"][0])
    (call,) = told()
    assert (call["id"], call["keys"], call["bind"]) == (2, private, "tcp://0.0.0.0:7000")
    assert (call["out"], call["resume"]) == (tmp_path / "runs" / "run", True)
    script(tmp_path / "sleep", "#!/bin/sh\necho sleeps\n")
    earlier = tmp_path / "runs" / "run"
    earlier.mkdir()
    (earlier / "summary.json").write_text('{\n  "status": "finished"\n}')
    assert run(pod["containers"][0]).stdout == "sleeps\n"
    assert len(told()) == 1


def test_links_of_the_readme_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", (DEPLOY / "README.md").read_text()):
        assert (DEPLOY / target).exists(), target
