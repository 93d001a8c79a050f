"""What the launchers hand to others as files: JobSets, SkyPilot's task, the container."""

import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
COMMON = "--name kd --image repository/jaxkd:1"
CASES = {
    "one host": f"{COMMON} --accelerator v6e-8",
    "one slice": f"{COMMON} --accelerator v5p-128 --grace 900 --restarts 3",
    "everything": f"{COMMON} --accelerator v5e-16 --slices 3 --spot --queue q --service-account sa --namespace n",
}
SHAPES = {
    # accelerator, topology, hosts, chips a host, slices
    "one host": ("tpu-v6e-slice", "2x4", 1, 8, 1),
    "one slice": ("tpu-v5p-slice", "4x4x4", 16, 4, 1),
    "everything": ("tpu-v5-lite-podslice", "4x4", 4, 4, 3),
}
# jobset.x-k8s.io/v1alpha2 as of JobSet 0.10: a type, a list of what it holds, or fields with `!` where one must be.
NAME = r"[a-z]([a-z0-9-]*[a-z0-9])?"
JOBSET: dict[str, Any] = {
    "apiVersion!": r"jobset\.x-k8s\.io/v1alpha2",
    "kind!": "JobSet",
    "metadata!": {"name!": NAME, "namespace": NAME, "labels": dict, "annotations": dict},
    "spec!": {
        "coordinator": {"replicatedJob!": NAME, "jobIndex": int, "podIndex": int},
        "failurePolicy": {
            "maxRestarts": int,
            "restartStrategy": "Recreate|BlockingRecreate",
            "rules": [
                {
                    "name!": r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?",
                    "action!": "FailJobSet|RestartJobSet|RestartJobSetAndIgnoreMaxRestarts",
                    "onJobFailureReasons": ["BackoffLimitExceeded|DeadlineExceeded|FailedIndexes|PodFailurePolicy"],
                    "onJobFailureMessagePatterns": [str],
                    "targetReplicatedJobs": [NAME],
                }
            ],
        },
        "network": dict,
        "successPolicy": dict,
        "startupPolicy": dict,
        "suspend": bool,
        "ttlSecondsAfterFinished": int,
        "replicatedJobs!": [{"name!": NAME, "replicas": int, "dependsOn": list, "template!": dict}],
    },
}


def wrong(value: Any, schema: Any, place: str = "") -> list[str]:
    """What of a value a schema does not allow."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{place} is no mapping"]
        fields = {name.rstrip("!"): inner for name, inner in schema.items()}
        missing = [f"{place}.{n[:-1]} is missing" for n in schema if n.endswith("!") and n[:-1] not in value]
        known = [w for n, v in value.items() if n in fields for w in wrong(v, fields[n], f"{place}.{n}")]
        return missing + [f"{place}.{n} is unknown" for n in value if n not in fields] + known
    if isinstance(schema, list):
        if not isinstance(value, list) or not value:
            return [f"{place} is no list, or empty"]
        return [w for i, item in enumerate(value) for w in wrong(item, schema[0], f"{place}[{i}]")]
    if isinstance(schema, str):
        return [] if isinstance(value, str) and re.fullmatch(schema, value) else [f"{place}: {value!r} is not {schema}"]
    return [] if isinstance(value, schema) else [f"{place}: {value!r} is no {schema.__name__}"]


@pytest.fixture(scope="module")
def rendered() -> dict[str, dict]:
    found = {}
    for name, options in CASES.items():
        command = f"bash launch/gke.sh render {options} -- train --config 'configs/a \"b\" \\c.py' --x=@name@"
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "#if" not in done.stdout.split("\n", 1)[1]
        found[name] = yaml.safe_load(done.stdout)
    return found


@pytest.mark.parametrize("case", CASES)
def test_jobset_field_by_field(case, rendered):
    assert wrong(rendered[case], JOBSET) == []


def test_the_check_sees_what_is_wrong(rendered):
    broken = rendered["one host"] | {"kind": "Jobset", "specs": {}, "metadata": {"labels": []}}
    assert sorted(wrong(broken, JOBSET)) == [
        ".kind: 'Jobset' is not JobSet",
        ".metadata.labels: [] is no dict",
        ".metadata.name is missing",
        ".specs is unknown",
    ]


@pytest.mark.parametrize("case", CASES)
def test_its_jobs_are_jobs_of_kubernetes(case, rendered):
    validate = pytest.importorskip("kubernetes_validate", reason="bash launch/setup.sh test brings it")
    template = rendered[case]["spec"]["replicatedJobs"][0]["template"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, **template}
    validate.validate(job, "1.33", strict=True)
    job["spec"]["template"]["spec"]["gracePeriod"] = 1
    with pytest.raises(validate.ValidationError):
        validate.validate(job, "1.33", strict=True)
    del job["spec"]["template"]["spec"]["gracePeriod"]


@pytest.mark.parametrize("case", CASES)
def test_sizes_of_a_jobset(case, rendered):
    spec = rendered[case]["spec"]
    [slices] = spec["replicatedJobs"]
    job, pod = slices["template"]["spec"], slices["template"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    selector = pod["nodeSelector"]
    accelerator, grid = (selector[f"cloud.google.com/gke-tpu-{name}"] for name in ("accelerator", "topology"))
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert (accelerator, grid, job["parallelism"], chips, slices["replicas"]) == SHAPES[case]
    assert job["completions"] == job["parallelism"]
    assert container["args"] == ["--", "train", "--config", 'configs/a "b" \\c.py', "--x=@name@"]
    names = [entry["name"] for entry in container["env"]]
    megascale = ["MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID", "MEGASCALE_COORDINATOR_ADDRESS"]
    assert names == ["JAXKD_CHIP", *(megascale if slices["replicas"] > 1 else [])]
    assert ("coordinator" in spec) == (slices["replicas"] > 1)
    assert ("cloud.google.com/gke-spot" in selector) == ("tolerations" in pod) == ("--spot" in CASES[case])


def test_which_ends_of_a_job_start_it_again(rendered):
    """Rules in the order in which Kubernetes and JobSet go through them."""
    spec = rendered["one slice"]["spec"]
    template = spec["replicatedJobs"][0]["template"]["spec"]

    def end(code: int, disrupted: bool = False) -> str:
        for number, rule in enumerate(template["podFailurePolicy"]["rules"]):
            codes = rule.get("onExitCodes", {}).get("values", ())
            if code in codes or (disrupted and "onPodConditions" in rule):
                message = (
                    f"Container jaxkd for pod n/x failed with exit code {code} matching FailJob rule at index {number}"
                )
                for found in spec["failurePolicy"]["rules"]:
                    patterns = found.get("onJobFailureMessagePatterns", [""])
                    if any(re.search(pattern, message) for pattern in patterns):
                        return found["action"]
        return "RestartJobSet"  # JobSet's own, within maxRestarts

    assert spec["failurePolicy"]["maxRestarts"] == 3
    assert (end(1), end(2)) == ("FailJobSet", "FailJobSet")
    assert (end(75), end(137, True), end(1, True)) == ("RestartJobSetAndIgnoreMaxRestarts",) * 3
    assert (end(69), end(70), end(134), end(137)) == ("RestartJobSet",) * 4
    assert template["backoffLimit"] == 0
    assert template["template"]["spec"]["terminationGracePeriodSeconds"] == 900
    assert rendered["one host"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "terminationGracePeriodSeconds"
    ] >= 600  # fmt: skip


def test_skypilot_task(tmp_path):
    task = yaml.safe_load((ROOT / "launch/sky.yaml").read_text())
    recovery = task["resources"]["job_recovery"]
    assert set(task) <= {"name", "workdir", "num_nodes", "resources", "envs", "file_mounts", "setup", "run"}
    assert recovery["recover_on_exit_codes"] == [69, 70, 75]
    assert all(subprocess.run(["bash", "-n", "-c", task[part]]).returncode == 0 for part in ("setup", "run"))
    variables = {name: str(value) for name, value in task["envs"].items()}
    shown = task["run"].replace("launch/host.sh", "launch/host.sh --dry-run")
    environment = {"PATH": os.environ["PATH"]} | variables
    run = lambda **more: subprocess.run(
        ["bash", "-c", shown], cwd=ROOT, env=environment | more, capture_output=True, text=True
    )
    assert run().returncode == 2
    assert run(JAXKD_RUN="train --config 'a b.py'").stdout.endswith(".venv/bin/jaxkd train --config 'a b.py'\n")


def test_container():
    text = (ROOT / "launch/Dockerfile").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert re.findall(r"^FROM \S+ AS (\w+)", text, re.M) == ["base", "tpu", "gpu"]
    for line in re.findall(r"^COPY (.*)", text, re.M):
        assert all((ROOT / source).exists() for source in line.split()[:-1]), line
    for names in re.findall(r"launch/setup\.sh (.*)", text):
        assert set(names.split()) <= set(extras)
