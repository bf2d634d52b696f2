#!/usr/bin/env bash
# Trains on a Cloud TPU VM, one host or a whole pod slice. See usage() below, or run it with --help.
set -euo pipefail

usage() {
  cat <<'USAGE'
Usage: launch/tpu_vm.sh COMMAND --name=NAME --zone=ZONE [flags] [-- flags of warm_jax]

Commands
  create   make the TPU VM (with --queued: wait in the queue until it is there)
  install  copy this checkout to all workers and install it in ~/warm_jax/venv; mount the buckets
  run      start the training on all workers; it goes on when your connection ends
  watch    wait for the end of the training; --retry=N: begin again when it was cut off, on a new machine if need be
  logs     follow the output of worker 0 (or --worker=N)
  status   the machine's state, and what each worker is doing
  stop     SIGTERM to all workers: they save, and leave with status 75. A watch, wherever it runs, ends too; run
           goes on
  delete   delete the machine; until then it costs money
  all      create, install, run; with --retry=N also watch

Flags
  --name=NAME        name of the machine (and of its place in the queue)
  --zone=ZONE        zone that has the type, for example us-west4-a
  --type=TYPE        accelerator type (default v5litepod-16: 16 chips of v5e)
  --version=VERSION  runtime version (default: the one that belongs to the type)
  --project=PROJECT  Google Cloud project (default: gcloud's own setting)
  --service-account=EMAIL  identity of the machine; it must be allowed to use the bucket (default: the project's)
  --spot             cheap, and taken away when somebody pays more
  --queued           through a queued resource, which waits for capacity
  --config=FILE      config in this checkout, with an optional system: configs/cifar10.py:hot
  --workdir=gs://…   where the run lives: storage that all workers share and that outlives them. The bucket, and
                     that of any other gs://… in the flags, is mounted at /gcs/BUCKET by Cloud Storage FUSE
  --shared           --workdir is a path that is mounted on all workers (Filestore, NFS)
  --extras=LIST      what is installed with warm_jax (default tpu; for example tpu,arrayrecord)
  --retry=N          watch, all: begin again at most N times (default 0)
  --delete-after     watch, all: delete the machine when the training is done
  --poll=SECONDS     how often to look (default 60)
  --worker=N         logs: whose
  --yes              delete: do not ask
  --dry-run          print what would be done, and do nothing

Example
  launch/tpu_vm.sh all --name=warm --zone=us-west4-a --type=v5litepod-16 --spot --queued --retry=20 --delete-after \
      --config=configs/cifar10.py --workdir=gs://BUCKET/cifar10 -- --config.process.bnr=1
USAGE
}

say() { printf '%s\n' "$*" >&2; }
fail() {
  say "error: $*"
  exit 2
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
name='' zone='' type=v5litepod-16 version='' project='' service_account='' config='' workdir=''
extras=tpu retry=0 poll=60 worker=0
spot=false queued=false shared=false delete_after=false yes=false dry_run=false

command=${1:-}
case $command in
  create | install | run | watch | logs | status | stop | delete | all) shift ;;
  -h | --help | help)
    usage
    exit 0
    ;;
  '') fail "a command is missing: create, install, run, watch, logs, status, stop, delete or all (--help says more)" ;;
  *) fail "there is no command '$command'; choose create, install, run, watch, logs, status, stop, delete or all" ;;
esac

while (($#)); do
  case $1 in
    --name=* | --zone=* | --type=* | --version=* | --project=* | --config=* | --workdir=* | --extras=* | --retry=* | \
      --poll=* | --worker=* | --service-account=*)
      flag=${1%%=*}
      flag=${flag#--}
      printf -v "${flag//-/_}" %s "${1#*=}"
      ;;
    --spot) spot=true ;;
    --queued) queued=true ;;
    --shared) shared=true ;;
    --delete-after) delete_after=true ;;
    --yes) yes=true ;;
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

# ── What was given is checked before anything is made ──

need() { [[ -n ${!1} ]] || fail "--${1//_/-} is missing, for example --${1//_/-}=$2"; }
whole() { [[ ${!1} =~ ^[0-9]+$ ]] || fail "--$1=${!1} is not a whole number"; }

need name warm
need zone us-west4-a
[[ $name =~ ^[a-z]([-a-z0-9]{0,60}[a-z0-9])?$ ]] ||
  fail "--name=$name: lower case letters, digits and hyphens, at most 62, a letter first"
whole retry
whole poll
[[ $extras =~ ^[a-z0-9,-]+$ ]] || fail "--extras=$extras: names of extras of setup.cfg, as in tpu,arrayrecord"
[[ $worker =~ ^([0-9]+|all)$ ]] || fail "--worker=$worker is neither a number nor 'all'"
if [[ $command == all || $command == create || $command == watch ]] && [[ -z $version ]]; then
  case $type in
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    v2-* | v3-* | v4-*) version=tpu-ubuntu2204-base ;;
    *) fail "--version is missing, and --type=$type is not known here, for example --version=tpu-ubuntu2204-base" ;;
  esac
fi
if [[ $command == all || $command == run || $command == watch ]]; then
  need config configs/cifar10.py
  need workdir gs://BUCKET/cifar10
  [[ $config == /* || -f $root/${config%%:*} ]] || fail "--config=$config: no such file in $root"
  [[ $workdir == gs://?* ]] || $shared || fail "--workdir=$workdir is on one worker's own disk, which goes with the" \
    "machine; give gs://BUCKET/PATH, or add --shared where the path is mounted on all workers"
fi
arguments=(--config="$config" --workdir="$workdir" "$@")
buckets=() # of every gs://… in the arguments, except what tfds reads by itself
for word in "${arguments[@]}"; do
  word=${word//tfds:gs:/}
  while [[ $word =~ gs://([A-Za-z0-9][A-Za-z0-9._-]*[A-Za-z0-9])(.*) ]]; do
    [[ " ${buckets[*]-} " == *" ${BASH_REMATCH[1]} "* ]] || buckets+=("${BASH_REMATCH[1]}")
    word=${BASH_REMATCH[2]}
  done
done
where=(--zone="$zone")
[[ -z $project ]] || where+=(--project="$project")

# ── gcloud ──

quote() { # the arguments as one line that a POSIX shell reads back as the same words
  local word escaped="'\\''" line=''
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:,@%+=-]+$ ]] || word="'${word//\'/$escaped}'"
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

cloud() { # gcloud compute tpus …, or with --dry-run the command
  if $dry_run; then quote gcloud compute tpus "$@"; else gcloud compute tpus "$@"; fi
}

on() { # on WORKER SCRIPT [ARGUMENT …]: the script with these arguments, run by sh on that worker, or on all
  local target=$1
  shift
  cloud tpu-vm ssh "$name" "${where[@]}" --worker="$target" --command="$(quote sh -c "$1" sh "${@:2}")"
}

ask() { # ask tpu-vm|queued-resources FIELD: that field of its description; gone; or unknown, where nobody answers
  local text
  if text=$(gcloud compute tpus "$1" describe "$name" "${where[@]}" --format="value($2)" 2>&1); then
    tail -n 1 <<<"$text"
  elif grep -qi 'not.found' <<<"$text"; then
    echo gone
  else
    echo unknown
  fi
}

# ── What runs on the workers: plain sh, in the home directory ──
# A process id alone says little after a reboot: the process must also be ours.

# shellcheck disable=SC2016  # these are for the workers' shell
{
  # state: running | ended STATUS | cut off | not started; told by a file of stop that it shall stay so: …, stopped
  state='d=$HOME/warm_jax; p=$(cat "$d/pid" 2>/dev/null || echo none)
if tr "\0" " " 2>/dev/null <"/proc/$p/cmdline" | grep -q warm_jax.main; then s=running
elif [ -s "$d/exit" ] || { [ -f "$d/pid" ] && sleep 1 && [ -s "$d/exit" ]; }; then s="ended $(cat "$d/exit")"
elif [ -f "$d/pid" ]; then s="cut off"
else s="not started"; fi
if [ -e "$d/stopped" ]; then case $s in running | "ended 0" | "ended 2") ;; *) s="$s, stopped" ;; esac; fi'
  idle=$state'
if [ "$s" = running ]; then echo "error: $(hostname): it is running already; stop it first" >&2; exit 1; fi
set -eu'
  # Mounted anew after a reboot too, and where gcsfuse has died. The flags are those of warm_jax/data/buckets.py.
  mount='
mount_buckets() {
  for b in $1; do
    m=/gcs/$b
    mountpoint -q "$m" && continue
    command -v gcsfuse >/dev/null || install_gcsfuse
    fusermount -uz "$m" 2>/dev/null || true
    sudo install -d -o "$(id -u)" "$m"
    setsid -w gcsfuse --implicit-dirs --rename-dir-limit=200000 --metadata-cache-ttl-secs=0 "$b" "$m" </dev/null || {
      echo "error: $(hostname): gs://$b cannot be mounted at $m; may the service account of this machine use it?" >&2
      exit 1
    }
  done
}
install_gcsfuse() {
  apt=https://packages.cloud.google.com/apt key=/usr/share/keyrings/cloud.google.asc
  curl -fsSL "$apt/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] $apt gcsfuse-$(. /etc/os-release && echo "$VERSION_CODENAME") main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  tries=0 # a new machine updates itself first, and locks apt meanwhile
  until sudo apt-get -qq update && sudo apt-get -qq install -y gcsfuse; do
    tries=$((tries + 1))
    [ "$tries" -lt 20 ] || { echo "error: $(hostname): gcsfuse cannot be installed" >&2; exit 1; }
    sleep 15
  done >&2
}'
  install_script=$idle$mount'
mount_buckets "$2"
mkdir -p "$d"; rm -rf "$d/src"; mkdir "$d/src"; tar -xzf "$HOME/warm_jax.tar.gz" -C "$d/src"; cd "$d"
mv src/warm_jax.token token; rm "$HOME/warm_jax.tar.gz"
export PATH="$HOME/.local/bin:$PATH"
# The images have Python 3.10, which is too old; uv brings its own.
command -v uv >/dev/null || PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
[ -x venv/bin/python ] || uv venv --quiet --python 3.12 venv
uv pip install --quiet --python venv/bin/python -e "./src[$1]"
venv/bin/python -c "import socket, jax, warm_jax; print(socket.gethostname(), \"has jax\", jax.__version__)"'
  # setsid and nohup: the training belongs to no terminal. Without a TPU it must fail, not train on the CPU.
  # A run that was asked for takes an earlier stop back; a watch that begins again does not, nor what comes meanwhile.
  run_script=$idle$mount'
[ "$1" = again ] || rm -f "$d/stopped"
mount_buckets "$2"; shift 2
if [ -e "$d/stopped" ]; then echo "error: $(hostname): it was stopped" >&2; exit 1; fi
cd "$d/src"; rm -f ../exit ../pid
export JAX_PLATFORMS=tpu,cpu PYTHONUNBUFFERED=1
# By this the workers know one another; in a file and in the environment, since command lines can be seen by others.
if [ -s ../token ]; then WARM_JAX_TOKEN=$(cat ../token); export WARM_JAX_TOKEN; fi
nohup setsid sh -c "\"\$@\" & echo \$! >../pid; wait \$!; echo \$? >../exit" sh \
  "$d/venv/bin/python" -m warm_jax.main "$@" >>../train.log 2>&1 </dev/null &
for i in 1 2 3 4 5 6 7 8 9 10; do [ -s ../pid ] && break; sleep 0.3; done
[ ! -e "$d/stopped" ] || kill -TERM "$(cat ../pid)"
echo "$(hostname): started"'
  status_script=$state'
echo "$(hostname): $s"; tail -n 1 "$d/train.log" 2>/dev/null || true'
  state_script=$state'
echo "$s"'
  # First the file: a watch may look at any time.
  stop_script='mkdir -p "$HOME/warm_jax"
: >"$HOME/warm_jax/stopped" || echo "error: $(hostname): a watch will begin it again" >&2
'$state'
if [ "$s" = running ]; then kill -TERM "$p"; echo "$(hostname): told to save"; else echo "$(hostname): $s"; fi'
  logs_script='exec tail -n 200 -F "$HOME/warm_jax/train.log"'
}

# ── The commands ──

create() {
  local call
  if $queued; then
    call=(queued-resources create "$name" --node-id="$name" --runtime-version="$version")
  else
    call=(tpu-vm create "$name" --version="$version")
  fi
  call+=("${where[@]}" --accelerator-type="$type")
  ! $spot || call+=(--spot)
  [[ -z $service_account ]] || call+=(--service-account="$service_account")
  cloud "${call[@]}" || return
  ! $queued || await
}

await() { # until the queue has given the machine
  local state
  if $dry_run; then
    echo "# every $poll s, until it says ACTIVE:"
    cloud queued-resources describe "$name" "${where[@]}" --format='value(state.state)'
    return
  fi
  while :; do
    state=$(ask queued-resources state.state)
    say "$name: $state"
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPEND* | DELETING)
        say "error: the queue will not give $name; delete it, and try another zone or type"
        return 1
        ;;
    esac
    sleep "$poll"
  done
}

pack() { # this checkout, uncommitted changes and new files too, and a token for the workers, as the archive $1
  if $dry_run; then
    echo "# this checkout, without what git ignores, as warm_jax.tar.gz"
  elif git -C "$root" rev-parse --is-inside-work-tree >/dev/null 2>&1; then
    git -C "$root" ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
      if [[ -e $root/$file ]]; then printf '%s\0' "$file"; fi
    done | tar -C "$root" --null -T - -czf "$1" -C "$(dirname "$1")" warm_jax.token
  else
    tar -C "$root" --exclude='./.venv*' --exclude=./runs --exclude=__pycache__ -czf "$1" . -C "$(dirname "$1")" warm_jax.token
  fi
}

install() {
  local folder status=0
  folder=$(mktemp -d)
  # By this the workers know one another. It is read by nobody else: neither from a file nor from a command line.
  (umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$folder/warm_jax.token" && : >"$folder/warm_jax.tar.gz")
  pack "$folder/warm_jax.tar.gz" &&
    if $dry_run; then
      cloud tpu-vm scp warm_jax.tar.gz "$name:warm_jax.tar.gz" "${where[@]}" --worker=all
    else
      cloud tpu-vm scp "$folder/warm_jax.tar.gz" "$name:warm_jax.tar.gz" "${where[@]}" --worker=all
    fi && on all "$install_script" "$extras" "${buckets[*]-}" || status=$?
  rm -rf "$folder"
  return "$status"
}

run() { on all "$run_script" "${1:-asked}" "${buckets[*]-}" "${arguments[@]}"; } # run again: not if it was stopped

remove() {
  if $queued; then
    cloud queued-resources delete "$name" "${where[@]}" --force --quiet # --force: the machine too
  else
    cloud tpu-vm delete "$name" "${where[@]}" --quiet
  fi
}

watch() {
  local state machine again=0
  if $dry_run; then
    echo "# every $poll s, until the training has ended:"
    on 0 "$state_script"
    echo "# stopped: nothing more. Cut off, or ended with anything but 0 and 2: again, at most $retry times, where the machine is gone on a new one"
    ! $delete_after || remove
    return
  fi
  while :; do
    state=$(on 0 "$state_script" 2>/dev/null | tail -n 1) || state=''
    case $state in
      'ended 0') break ;;
      'ended 2') # its own fault: again would end the same
        say "error: the training $state; see '$0 logs', and do not forget '$0 delete'"
        return 1
        ;;
      *', stopped')
        say "$name: $state; '$0 run' goes on from there. It costs money until '$0 delete'"
        return 75
        ;;
      *) ;; # a host that dies makes the others fail too, before it is known why
    esac
    machine=READY
    [[ $state == running ]] || machine=$(ask tpu-vm state)
    case $state,$machine in
      running,* | ,READY | *,unknown) ;; # without an answer only the line may have failed
      *)
        if ((again >= retry)); then
          say "error: the training is not running (${state:-no answer}, machine $machine) after $again new starts;" \
            "give a greater --retry, or '$0 delete'"
          return 75
        fi
        again=$((again + 1))
        say "$name: ${state:-no answer}, machine $machine; start $again of $retry"
        renew || say "$name: that failed; trying again in $poll s"
        ;;
    esac
    sleep "$poll"
  done
  say "$name: done"
  ! $delete_after || remove
}

renew() { # the training again, with what there still is
  if [[ $machine != READY ]]; then
    remove || say "$name: nothing to delete"
    create && install && run again
  elif [[ $state == 'not started' ]]; then
    install && run again
  else
    run again
  fi
}

status() {
  ! $queued || cloud queued-resources describe "$name" "${where[@]}" --format='value(state.state)' || return
  cloud tpu-vm describe "$name" "${where[@]}" --format='value(state,health)' && on all "$status_script"
}

confirm() {
  $yes || $dry_run || {
    [[ -t 0 ]] || fail "delete asks first, and here is nobody to answer; add --yes"
    read -r -p "Delete $name in $zone and all that is on its disks? [y/N] " answer
    [[ $answer == [yY]* ]] || fail "$name was not deleted"
  }
}

$dry_run || command -v gcloud >/dev/null || fail "gcloud is not installed: https://cloud.google.com/sdk/docs/install"
case $command in
  logs) on "$worker" "$logs_script" ;;
  stop) on all "$stop_script" ;;
  delete)
    confirm
    remove
    ;;
  all)
    create
    install
    run
    if ((retry)) || $delete_after; then
      watch
    else
      if $queued; then where+=(--queued); fi
      say "it costs money until you delete it: $0 delete --name=$name ${where[*]}"
    fi
    ;;
  *) "$command" ;;
esac
