"""The launch files of docs/launch: what they start is parsed by torchrun's own parser, and its config composes and passes every check."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml
from torch.distributed.run import get_args_parser

from bcr import train
from bcr.runtime.config import compose
from bcr.runtime.schema import TrainConfig

LAUNCH = Path(__file__).parents[2] / "docs" / "launch"
SBATCH, MANIFESTS = LAUNCH / "slurm.sbatch", sorted(LAUNCH.glob("*.yaml"))
TORCHRUN = 'printf "%s\\n" "$@" > "$SEEN"\n'
SRUN = """
"$@" &
echo $! > "$SEEN.task"
trap 'kill -KILL $!' TERM
wait $!
code=$?
while kill -0 $! 2> /dev/null; do wait $!; code=$?; done
exit $code
"""
COMMANDS = {  # stand-ins on the PATH
    "srun": SRUN,  # which kills its tasks when it is told to end ("forcing job termination")
    "scancel": 'if [ "$*" = "--signal=TERM 17" ]; then kill -TERM "$(cat "$SEEN.task")"; fi\n',  # the steps, not the batch script
    "scontrol": 'if [ "$1" = show ]; then echo node3; sleep 0.1; echo node4; else echo "$@" >> "$SEEN.scontrol"; fi\n',
    "readlink": "echo step-000200\n",
}
WAITING = TORCHRUN + "trap 'echo told >> \"$SEEN.told\"; exit 1' TERM\nwhile true; do sleep 0.05; done\n"


@pytest.fixture
def machine(tmp_path):
    """An environment with stand-ins; `seen` is where torchrun writes what it was given."""

    def build(torchrun=TORCHRUN, **variables):
        for name, body in {**COMMANDS, "torchrun": torchrun}.items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{body}")
            (tmp_path / name).chmod(0o755)
        return {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SEEN": str(tmp_path / "seen"), **variables}

    return build


def slurm(nodes):
    return {"SLURM_JOB_NODELIST": "node[3-4]", "SLURM_JOB_NUM_NODES": str(nodes), "SLURM_JOB_ID": "17", "SLURM_GPUS_ON_NODE": "8"}


def started(folder):
    """(torchrun's options, the config it starts), from what the stand-in was given."""
    words = (folder / "seen").read_text().splitlines()
    options = get_args_parser().parse_args(words)
    assert options.module
    assert options.training_script == "bcr.train"
    config = compose("train", options.training_script_args, TrainConfig)
    assert (config.resume, config.device) == ("auto", "cuda")
    assert config.checkpoint_every
    config.output = str(folder / "output")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch finds no GPU"):  # the last check before the model
            train.prepare(config)
    return options, config


@pytest.mark.parametrize("nodes", [1, 2])
def test_the_batch_script_starts_a_run_that_composes(nodes, machine, tmp_path):
    assert subprocess.run(["bash", "-n", SBATCH]).returncode == 0
    subprocess.run(["bash", SBATCH, "seed=3"], env=machine(**slurm(nodes)), check=True, timeout=20)
    options, config = started(tmp_path)
    assert (options.nnodes, options.nproc_per_node, options.rdzv_backend) == (str(nodes), "8", "c10d")
    assert options.rdzv_endpoint == "node3:29500"
    assert config.seed == 3
    assert not (tmp_path / "seen.scontrol").exists()


def test_the_batch_script_asks_for_what_it_starts():
    asked = dict(
        line.split()[1].removeprefix("--").partition("=")[::2] for line in SBATCH.read_text().splitlines() if line[:7] == "#SBATCH"
    )
    assert (asked["ntasks-per-node"], asked["gpus-per-node"]) == ("1", "8")
    assert asked["signal"] == "B:TERM@600"
    assert {"requeue", "open-mode"} <= set(asked)


def test_a_stopped_job_waits_for_its_step_and_goes_back_into_the_queue(machine, tmp_path):
    job = subprocess.Popen(["bash", SBATCH], env=machine(WAITING, **slurm(2)))
    wait_for(tmp_path / "seen")
    time.sleep(0.2)  # for torchrun to set its trap
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=20) == 0
    assert (tmp_path / "seen.told").read_text() == "told\n"
    assert (tmp_path / "seen.scontrol").read_text() == "requeue 17\n"


def test_a_job_that_fails_says_so(machine):
    assert subprocess.run(["bash", SBATCH], env=machine("exit 3\n", **slurm(1)), timeout=20).returncode == 3


def parts(manifest):
    documents = {document["kind"]: document for document in yaml.safe_load_all(manifest.read_text())}
    pod = documents["Job"]["spec"]["template"]["spec"]
    return documents, documents["Job"]["spec"], pod, pod["containers"][0]


def pod_run(container, environment):
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    return [*container["command"], *container["args"]], environment | variables


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.stem)
def test_a_manifest_starts_a_run_that_composes(manifest, machine, tmp_path):
    documents, job, pod, container = parts(manifest)
    command, environment = pod_run(container, machine(JOB_COMPLETION_INDEX="1"))
    subprocess.run(command, env=environment, check=True, timeout=20)
    options, config = started(tmp_path)
    nodes = job.get("completions", 1)
    assert (options.nnodes, options.nproc_per_node) == (str(nodes), str(container["resources"]["limits"]["nvidia.com/gpu"]))
    assert f"step-{config.steps:06d}" == "step-000200"
    assert f"{compose('train', options.training_script_args, TrainConfig).output}/checkpoints/latest" in command[-1]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    if nodes > 1:
        name, service = documents["Job"]["metadata"]["name"], documents["Service"]
        assert job["parallelism"] == nodes
        assert job["completionMode"] == "Indexed"
        assert service["spec"]["selector"] == {"job-name": name}
        assert pod["subdomain"] == service["metadata"]["name"]
        assert (options.node_rank, options.master_addr) == (1, f"{name}-0.{pod['subdomain']}")


def test_both_manifests_train_the_same(machine, tmp_path):
    found = []
    for manifest in MANIFESTS:
        command, environment = pod_run(parts(manifest)[3], machine(JOB_COMPLETION_INDEX="0"))
        subprocess.run(command, env=environment, check=True, timeout=20)
        found.append(started(tmp_path)[1])
    assert len(found) == 2
    assert found[0] == found[1]


def test_a_pod_that_was_stopped_has_failed(machine, tmp_path):
    """Until the last step's checkpoint is there, or Kubernetes would take the run to be done."""
    command, environment = pod_run(parts(MANIFESTS[0])[3], machine(WAITING.replace("exit 1", "exit 0")))
    (tmp_path / "readlink").write_text("#!/bin/bash\necho step-000120\n")
    pod = subprocess.Popen(command, env=environment)
    wait_for(tmp_path / "seen")
    time.sleep(0.2)
    pod.send_signal(signal.SIGTERM)
    assert pod.wait(timeout=20) == 1
    assert (tmp_path / "seen.told").read_text() == "told\n"


def wait_for(file):
    deadline = time.monotonic() + 20
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
