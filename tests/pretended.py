"""For the tests of the launch scripts: how they are called, what they print, and pretended machines.

`gcloud`, `kubectl`, `srun` and `scontrol` are small programs of this file, put first in PATH. That of gcloud keeps two
"workers", folders under tmp_path, and really runs there what it is told to run by ssh; what needs root there, as apt,
or a bucket, as gcsfuse, only takes notes.
"""

import os
import pathlib
import re
import shlex
import subprocess

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = ("tpu_vm.sh", "gke.sh", "slurm.sbatch")
AWKWARD = [
    "--config.data.source=zip:/a b.zip",
    "--config.x=it's",
    '--config.y="$(z)" $HOME `q` $$',
    "--config.z=",
    "ü*",
]

TPU = ["--name=warm", "--zone=us-west4-a"]
TRAIN = ["--config=configs/cifar10.py:hot", "--workdir=gs://bucket/a b"]


def bash(script, *arguments, env=None, cwd=ROOT, stdin=subprocess.DEVNULL, timeout=90):
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
    for w in $workers; do
      (cd "$FAKE/vm$w" && HOME=$PWD WORKER=$w PATH=$PWD/bin:$PATH bash -c "${last#--command=}") || status=$?
    done
    exit $status ;;
esac""",
    # The program that is trained: says what it was told, then does what the next line of $FAKE/plan says.
    "uv": r"""
if [[ $1 == venv ]]; then mkdir -p venv/bin; cp "$FAKE/bin/trained" venv/bin/python; fi""",
    "trained": r"""
if [[ $1 == -c ]]; then echo "has jax"; exit; fi
[[ $PWD == */warm_jax/src && -f warm_jax/main.py && $JAX_PLATFORMS == tpu,cpu ]] || exit 9
printf '%s\n' "$@" >"$FAKE/argv$WORKER"; printf %s "$WARM_JAX_TOKEN" >"$FAKE/token$WORKER"; echo "training $WORKER"
plan=$(head -n 1 "$FAKE/plan$WORKER"); sed -i 1d "$FAKE/plan$WORKER"
case $plan in
  wait) trap 'exit 75' TERM; for i in {1..200}; do sleep 0.05; done ;;
  taken) [[ $WORKER == 0 ]] || exit 75; touch "$FAKE/gone"; rm -rf "$FAKE/vm0" "$FAKE/vm1" ;;
  *) exit "$plan" ;;
esac""",
    # A worker has gcsfuse once apt has installed it; what it has mounted are files "mounted_gcs_…" in its folder.
    "sudo": r"""
case "$*" in
  'apt-get -qq install -y gcsfuse') mkdir -p "$HOME/bin"; cp "$FAKE/bin/apt_gcsfuse" "$HOME/bin/gcsfuse" ;;
  tee*) cat >"$HOME/tee${2//\//_}" ;;
esac""",
    "curl": "echo KEY",
    "apt_gcsfuse": r"""
[[ ! -e $FAKE/forbidden ]] || { echo "googleapi: Error 403: Forbidden" >&2; exit 1; }
for last; do :; done
[[ ! -e $FAKE/stop_while_mounting ]] || : >"$HOME/warm_jax/stopped"
touch "$HOME/mounted${last//\//_}" """,
    "mountpoint": "[[ -e $HOME/mounted${2//\\//_} ]]",
    "fusermount": "exit 1",
    "kubectl": 'cat >"$FAKE/applied"',
    "srun": 'printf %s "$WARM_JAX_TOKEN" >"$FAKE/token"; exit "$STATUS"',
    "scontrol": '[[ $1 != show ]] || echo "JobId=$3 JobState=$STATE Reason=None"',
}


def environment(tmp_path):
    """What to add to the environment so that the pretended programs are found.

    Each writes how it was called into a line of $FAKE/calls; $FAKE is tmp_path.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in PRETENDED.items():
        note = r"""printf '%s\037' """ + name + r""" "$@" >>"$FAKE/calls"; echo >>"$FAKE/calls" """
        note = "" if name in ("trained", "uv", "mountpoint", "fusermount") else note
        (folder / name).write_text(f"#!/usr/bin/env bash\n{note}\n{body}\n")
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "FAKE": str(tmp_path)}


def calls(tmp_path):
    if not (tmp_path / "calls").exists():
        return []
    return [line.split("\037")[:-1] for line in re.split(r"(?<=\037)\n", (tmp_path / "calls").read_text()) if line]
