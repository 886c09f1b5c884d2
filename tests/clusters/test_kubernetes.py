"""The manifests of docs/clusters: their form, their variables, and their own commands run as the pods of two nodes.

No cluster takes part. What the operators set is written here from their sources: training-operator 1.9
(pkg/controller.v1/pytorch/envvar.go) and trainer 2 (pkg/runtime/framework/plugins/torch/torch.go).
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs import load_run
from engine import distributed, launch
from tests.engine.small_runs import ROOT, WAIT_SECONDS, arguments, reported, wait_until, write_shards
from tests.harness import free_port

CLUSTERS = ROOT / "docs" / "clusters"
NUM_NODES, STEPS = 2, 24
OPERATORS = ("pytorchjob", "trainjob")
RESERVED = re.compile(r"PET_|MASTER_|RANK$|WORLD_SIZE$")  # the operators' and torchrun's own


def manifest(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTERS / f"{name}.yaml").read_text()))


def pod_specs(name: str) -> list[dict[str, Any]]:
    """The pods a manifest asks for, one of each kind, as `spec` of a Pod."""
    if name == "pytorchjob":
        [job] = manifest(name)
        return [replica["template"]["spec"] for replica in job["spec"]["pytorchReplicaSpecs"].values()]
    runtime, job = manifest(name)
    [node] = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    trainer, [container] = job["spec"]["trainer"], pod["containers"]
    whole = container | {"command": trainer["command"], "args": trainer["args"]}
    whole |= {"env": container["env"] + trainer["env"], "resources": trainer["resourcesPerNode"]}
    return [pod | {"containers": [whole]}]


def given_by_operator(name: str, node: int, port: int) -> dict[str, str]:
    """The variables of a pod of NUM_NODES with one rank each, which all meet on this machine."""
    own = {"PET_NNODES": str(NUM_NODES), "PET_NPROC_PER_NODE": "1", "PET_NODE_RANK": str(node)}
    if name == "pytorchjob":
        meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        return own | meeting | {"WORLD_SIZE": str(NUM_NODES), "RANK": str(node), "PYTHONUNBUFFERED": "0"}
    return own | {"PET_MASTER_ADDR": "localhost", "PET_MASTER_PORT": str(port)}


@pytest.mark.L0
@pytest.mark.parametrize("name", OPERATORS)
def test_pods_have_what_they_mount_and_time_to_save(name: str) -> None:
    for pod in pod_specs(name):
        [container] = pod["containers"]
        assert container["name"] == {"pytorchjob": "pytorch", "trainjob": "node"}[name], "the operator looks for it"
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        given = {variable["name"]: variable["value"] for variable in container["env"]}
        assert not [variable for variable in given if RESERVED.match(variable)]
        assert all(isinstance(value, str) for value in given.values()), "Kubernetes takes strings alone"
        assert int(given["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
        assert any(given["RUN_DIR"].startswith(mount["mountPath"]) for mount in container["volumeMounts"])


@pytest.mark.L0
def test_the_manifests_ask_the_operators_for_a_rank_on_every_gpu() -> None:
    [job] = manifest("pytorchjob")
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert job["spec"]["pytorchReplicaSpecs"].keys() == {"Master", "Worker"}
    assert job["spec"]["pytorchReplicaSpecs"]["Master"]["replicas"] == 1
    [gpus] = {pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] for pod in pod_specs("pytorchjob")}
    assert job["spec"]["nprocPerNode"] == str(gpus), "a string in this API"

    runtime, job = manifest("trainjob")
    versions = {(part["apiVersion"], part["kind"]) for part in (runtime, job)}
    assert versions == {("trainer.kubeflow.org/v1alpha1", kind) for kind in ("TrainingRuntime", "TrainJob")}
    assert job["spec"]["runtimeRef"] == {"kind": runtime["kind"], "name": runtime["metadata"]["name"]}
    trainer = job["spec"]["trainer"]
    assert trainer["numProcPerNode"] == trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    assert runtime["spec"]["mlPolicy"]["torch"] == {}, "its numProcPerNode is gone since trainer 2.3"
    [node] = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert node["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}


@pytest.mark.L0
@pytest.mark.parametrize("name", OPERATORS)
def test_the_command_of_a_manifest_is_one_that_launch_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for pod in pod_specs(name):
        [script] = pod["containers"][0]["args"]
        words = shlex.split(script.split("exec torchrun")[1].replace("\\\n", " "))
        options = launch.parse(words[words.index("engine/launch.py") + 1 :])
        assert options.resume == "auto"
        assert Path(options.ds_config).is_file()
        load_run(options.config, options.overrides)


@contextmanager
def pods(name: str, here: Path, shards: Path, run_dir: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The manifest's own command on each node, with tests/tiny.yaml for the preset and directories of this machine."""
    script = pod_specs(name)[0]["containers"][0]["args"][0]
    config, *rest = [word for word in arguments(shards, run_dir) if not word.startswith("system.run_dir=")]
    for there, ours in (("--config configs/vtp_l.yaml", config), ("=/cache", f"={here}/cache")):
        assert there in script
        script = script.replace(there, ours)
    script = f"{script.rstrip()} {shlex.join(rest)} optim.steps={STEPS} optim.warmup=0.0"
    environment = {key: value for key, value in os.environ.items() if key not in distributed.LAUNCHER_VARIABLES}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "RUN_DIR": str(run_dir)}
    environment |= {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "60"}
    port, started = free_port(), []
    for node in range(NUM_NODES):
        with (here / f"{node}.log").open("ab") as log:
            given = environment | given_by_operator(name, node, port)
            started.append(subprocess.Popen(["bash", "-c", script], cwd=ROOT, env=given, stdout=log, stderr=log))
    try:
        yield started
    finally:
        for pod in started:
            pod.terminate()  # torchrun ends its ranks, which a kill would leave behind
            try:
                pod.wait(WAIT_SECONDS)
            finally:
                pod.kill()


@pytest.mark.L2
def test_an_evicted_pod_saves_and_the_run_goes_on_even_under_the_other_operator(tmp_path: Path) -> None:
    shards, run_dir = write_shards(tmp_path / "shards"), tmp_path / "run"

    def said() -> str:
        return "".join((tmp_path / f"{node}.log").read_text()[-4000:] for node in range(NUM_NODES))

    with pods("pytorchjob", tmp_path, shards, run_dir) as nodes:
        wait_until(lambda: reported(run_dir) or nodes[0].poll() is not None, "the first report", said)
        nodes[1].send_signal(signal.SIGTERM)
        assert [node.wait(WAIT_SECONDS) for node in nodes] == [1, 1], said()
    saved_at = reported(run_dir)[-1]
    assert saved_at < STEPS
    assert (run_dir / "checkpoints" / "latest").read_text() == f"step-{saved_at:08d}"

    with pods("trainjob", tmp_path, shards, run_dir) as nodes:
        assert [node.wait(WAIT_SECONDS) for node in nodes] == [0, 0], said()
    assert reported(run_dir) == list(range(2, STEPS + 1, 2))
