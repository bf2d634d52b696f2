#!/usr/bin/env bash
# Trains on GKE, on a TPU slice or a pool of GPU nodes: fills in gke_jobset.yaml. See usage() below, or --help.
set -euo pipefail

usage() {
  cat <<'USAGE'
Usage: launch/gke.sh --accelerator=ACCELERATOR --image=IMAGE --config=FILE --workdir=gs://… [flags]
                     [-- flags of warm_jax]

A TPU slice
  --accelerator=tpu-v5-lite-podslice | tpu-v6e-slice | tpu-v5p-slice | tpu-v4-podslice
  --topology=4x4       of the slice; 2x2x2 for v4 and v5p
  --chips-per-host=8   for a 2x4 slice of v5e or v6e that is one machine (default: 4, or all where there are fewer)
A pool of GPU nodes
  --accelerator=nvidia-h100-80gb   any nvidia-…: the node label cloud.google.com/gke-accelerator
  --gpus=8             of each node
  --nodes=2            how many nodes (default 1)
Both
  --image=IMAGE        made of launch/Dockerfile
  --config=FILE        a config in the image, with an optional system: configs/cifar10.py:hot
  --workdir=gs://…     where the run lives; the bucket, and that of any other gs://… in the flags, is mounted at
                       /gcs/BUCKET by GKE's Cloud Storage FUSE CSI driver
  --service-account=NAME  Kubernetes service account that may use the bucket; needed for gs://
  --shared=CLAIM:/PATH instead of gs://: a PersistentVolumeClaim (ReadWriteMany), mounted there; --workdir lies in it
  --name=NAME          of the JobSet (default warm-jax)
  --namespace=NAME     (default: kubectl's own setting)
  --spot               nodes that are cheap, and taken away when somebody pays more
  --max-restarts=N     new starts after failures that are not preemptions (default 10)
  --grace=SECONDS      for the last save (default 120; spot nodes may give less)
  --dry-run            print the YAML and apply nothing

Example
  launch/gke.sh --accelerator=tpu-v5-lite-podslice --topology=4x4 --spot \
      --image=REGION-docker.pkg.dev/PROJECT/REPO/warm_jax --service-account=trainer \
      --config=configs/cifar10.py --workdir=gs://BUCKET/cifar10 -- --config.process.bnr=1
USAGE
}

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
accelerator='' topology='' chips_per_host='' gpus='' nodes=1 image='' config='' workdir='' service_account='' shared=''
name=warm-jax namespace='' max_restarts=10 grace=120 spot=false dry_run=false

while (($#)); do
  case $1 in
    --accelerator=* | --topology=* | --chips-per-host=* | --gpus=* | --nodes=* | --image=* | --config=* | \
      --workdir=* | --service-account=* | --shared=* | --name=* | --namespace=* | --max-restarts=* | --grace=*)
      flag=${1%%=*}
      flag=${flag#--}
      printf -v "${flag//-/_}" %s "${1#*=}"
      ;;
    --spot) spot=true ;;
    --dry-run) dry_run=true ;;
    -h | --help)
      usage
      exit 0
      ;;
    --)
      shift
      break
      ;;
    *) fail "unexpected '$1'; flags are given as --flag=VALUE, those of warm_jax after -- (--help lists all)" ;;
  esac
  shift
done

need() { [[ -n ${!1} ]] || fail "--${1//_/-} is missing, for example --${1//_/-}=$2"; }
whole() { [[ ${!1} =~ ^[0-9]+$ ]] || fail "--${1//_/-}=${!1} is not a whole number"; }

need accelerator tpu-v5-lite-podslice
need image REGION-docker.pkg.dev/PROJECT/REPO/warm_jax
need config configs/cifar10.py
need workdir gs://BUCKET/cifar10
whole max_restarts
whole grace
# The first pod is NAME-workers-0-0, and its host name has at most 63 characters.
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
  fail "--name=$name: lower case letters, digits and hyphens, at most 40, a letter first"
[[ -z $service_account || $service_account =~ ^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$ ]] ||
  fail "--service-account=$service_account is no name of a Kubernetes service account (it is not an e-mail address)"

arguments=(--config="$config" --workdir="$workdir" "$@")
buckets=() # of every gs://… in the arguments, except what tfds reads by itself
for word in "${arguments[@]}"; do
  word=${word//tfds:gs:/}
  while [[ $word =~ gs://([A-Za-z0-9][A-Za-z0-9._-]*[A-Za-z0-9])(.*) ]]; do
    [[ " ${buckets[*]-} " == *" ${BASH_REMATCH[1]} "* ]] || buckets+=("${BASH_REMATCH[1]}")
    word=${BASH_REMATCH[2]}
  done
done
claim='' mount=''
if [[ -n $shared ]]; then
  claim=${shared%%:*} mount=${shared#*:}
  [[ $claim =~ ^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$ && $mount == /?* ]] ||
    fail "--shared=$shared; give the claim and where it is mounted, for example --shared=runs:/runs"
fi
[[ -n $service_account ]] || ((${#buckets[@]} == 0)) ||
  fail "--service-account is missing, for example --service-account=trainer: the pods need one that is bound to an" \
    "identity with access to gs://${buckets[0]} (Workload Identity; launch/README.md says how)"
if [[ $workdir != gs://?* ]]; then
  [[ -n $shared ]] || fail "--workdir=$workdir is on one pod's own disk, which goes with the pod; give" \
    "gs://BUCKET/PATH, or --shared=CLAIM:/PATH, a claim that all pods mount"
  [[ $workdir == "${mount%/}"/?* ]] || fail "--workdir=$workdir is not in $mount, where --shared=$shared is mounted"
fi

# ── Hosts, from the shape of the slice or the size of the pool ──

slice() { # sets hosts and chips (of a host); which shapes there are: GKE's documentation, "Plan TPUs in GKE"
  local shapes product=1 side sides more=''
  [[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*)+$ ]] || fail "--topology=$topology; it is written as 4x4 or 2x2x2"
  IFS=x read -r -a sides <<<"$topology"
  for side in "${sides[@]}"; do product=$((product * side)); done
  case $accelerator in
    tpu-v5-lite-podslice | tpu-v6e-slice) shapes='1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16' ;;
    tpu-v5p-slice | tpu-v4-podslice)
      shapes='2x2x1 2x2x2 2x2x4 2x4x4' more=', or multiples of 4 in order, as 4x4x8'
      if ((${#sides[@]} == 3 && sides[0] % 4 == 0 && sides[1] % 4 == 0 && sides[2] % 4 == 0)) &&
        ((sides[0] <= sides[1] && sides[1] <= sides[2])); then
        shapes+=" $topology"
      fi
      ;;
  esac
  [[ " $shapes " == *" $topology "* ]] || fail "$accelerator has no slice of --topology=$topology; choose one" \
    "of $shapes$more"
  chips=${chips_per_host:-$((product < 4 ? product : 4))}
  case $topology,$chips in
    1x1,1 | 2x4,8 | *,4) ;;
    *) fail "--chips-per-host=$chips_per_host does not fit $topology; hosts have 4 chips, and 8 where 2x4 is one host" ;;
  esac
  hosts=$((product / chips))
}

case $accelerator in
  tpu-v5-lite-podslice | tpu-v6e-slice | tpu-v5p-slice | tpu-v4-podslice)
    variant=tpu
    case $accelerator in *v4* | *v5p*) need topology 2x2x2 ;; *) need topology 4x4 ;; esac
    [[ -z $gpus && $nodes == 1 ]] || fail "--gpus and --nodes are for GPUs; hosts follow from --topology"
    slice
    ;;
  nvidia-*)
    variant=gpu
    [[ -z $topology$chips_per_host ]] || fail "--topology and --chips-per-host are for TPUs; give --gpus and --nodes"
    need gpus 8
    whole gpus
    whole nodes
    ((gpus > 0 && nodes > 0)) || fail "--gpus=$gpus and --nodes=$nodes must be at least 1"
    chips=$gpus hosts=$nodes
    ;;
  *) fail "--accelerator=$accelerator is not known; choose tpu-v5-lite-podslice, tpu-v6e-slice, tpu-v5p-slice," \
    "tpu-v4-podslice, or a GPU as nvidia-h100-80gb" ;;
esac

render() {
  python3 - "$here/gke_jobset.yaml" "$variant" "$spot" "$@" <<'PYTHON'
import json, re, secrets, string, sys

path, variant, spot, *pairs = sys.argv[1 : sys.argv.index("--")]
values = dict(pair.split("=", 1) for pair in pairs)
# What is checked above stands between quotes in the template; free text is written as JSON, which is YAML. The kubelet
# reads $(NAME) in arguments, and two dollars as one.
arguments = [argument.replace("$", "$$") for argument in sys.argv[sys.argv.index("--") + 1 :]]
values["token"] = secrets.token_hex(32)  # not an argument, which others on this machine could see
values |= {"args": json.dumps(arguments), "image": json.dumps(values["image"]), "mount": json.dumps(values["mount"])}
holds = {
    "spot": spot == "true",
    "multihost": int(values["hosts"]) > 1,
    "service_account": values["service_account"],
    "shared": values["claim"],
    "bucket": values["buckets"],
}
head, documents = open(path, encoding="utf-8").read().split("\n\n", 1)
secret, *jobs = documents.split("\n---\n")
chosen = [secret] * (int(values["hosts"]) > 1) + [jobs[("tpu", "gpu").index(variant)]]
lines = "\n---\n".join(chosen).splitlines()
marked = [(line, re.search(r"  # only: (\w+)$", line)) for line in lines]
kept = [line[: mark.start()] if mark else line for line, mark in marked if not mark or holds[mark[1]]]
filled = []
for line in kept:
    once, each, _ = line.partition("  # each: bucket")
    numbered = enumerate(values["buckets"].split() if each else [""])
    filled += [string.Template(once).substitute(values, number=number, bucket=bucket) for number, bucket in numbered]
print("\n".join(filled))
PYTHON
}

yaml=$(render name="$name" accelerator="$accelerator" topology="$topology" hosts="$hosts" chips="$chips" \
  image="$image" service_account="$service_account" claim="$claim" mount="$mount" \
  buckets="${buckets[*]-}" max_restarts="$max_restarts" grace="$grace" -- "${arguments[@]}")

if $dry_run; then
  printf '%s\n' "$yaml"
  exit
fi
command -v kubectl >/dev/null || fail "kubectl is not installed: https://kubernetes.io/docs/tasks/tools"
in_namespace=()
[[ -z $namespace ]] || in_namespace=(--namespace="$namespace")
kubectl apply ${in_namespace[@]+"${in_namespace[@]}"} -f - <<<"$yaml"
token=''
((hosts == 1)) || token="; kubectl delete secret $name-token"
cat >&2 <<MESSAGE
It costs money until it has ended and its nodes are gone.
  kubectl get jobset $name
  kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0
  kubectl delete jobset $name$token
MESSAGE
