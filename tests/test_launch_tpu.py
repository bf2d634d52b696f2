"""launch/tpu_vm.sh: what it would call, and whole runs on pretended machines."""

import concurrent.futures
import platform
import re
import shlex
import shutil
import subprocess
import time

import pytest
from pretended import AWKWARD, LAUNCH, TPU, TRAIN, bash, calls, commands, environment

# ── What would be called


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
    (stop,) = dry("stop", *TPU)
    assert stop[:-1] == [*ssh, "--worker=all"]
    assert 0 < stop[-1].index('>"$HOME/warm_jax/stopped"') < stop[-1].index("kill -TERM")  # a watch may look between
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
    assert shlex.split(install)[:2] == ["sh", "-c"] and shlex.split(install)[3:] == ["sh", "tpu", "bucket"]
    assert "./src[$1]" in install and "uv venv" in install
    assert shlex.split(run)[3:] == ["sh", "asked", "bucket", *TRAIN, *AWKWARD] and "nohup setsid" in run
    assert "# stopped: nothing more." in bash("tpu_vm.sh", "watch", "--dry-run", *TPU, *TRAIN).stdout


# ── Pretended machines


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
    env = environment(tmp_path)

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
    return [" ".join(call[3:5]) for call in of("gcloud", tmp_path) if call[4] not in ("ssh", "describe")]


def of(program, tmp_path):
    return [call for call in calls(tmp_path) if call[0] == program]


def test_a_training_from_create_to_stop(tpu, tmp_path):
    done = tpu("all", plans=["wait"], extra=AWKWARD)
    assert done.returncode == 0, done.stderr
    assert "costs money until you delete it" in done.stderr
    for worker in (0, 1):  # detached: the call has ended, the training goes on
        wait_for(tmp_path / f"vm{worker}" / "warm_jax" / "train.log", f"training {worker}")
        told = (tmp_path / f"argv{worker}").read_text().splitlines()
        assert told == ["-m", "warm_jax.main", "--config=configs/new one.py:hot", TRAIN[1], *AWKWARD]
    tokens = {(tmp_path / f"token{worker}").read_text() for worker in (0, 1)}
    assert len(tokens) == 1 and re.fullmatch("[0-9a-f]{64}", *tokens)
    assert tokens.pop() not in (tmp_path / "calls").read_text()  # in no command line
    assert (tmp_path / "vm0" / "warm_jax" / "token").stat().st_mode & 0o077 == 0
    assert not list((tmp_path / "vm0").rglob("warm_jax.t*"))  # neither the archive nor the file that it came in
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
    assert tpu("status").stdout.count(": ended 75, stopped\n") == 2
    assert tpu("delete", "--yes").returncode == 0 and (tmp_path / "gone").exists()


def test_it_begins_again_on_what_there_is(tpu, tmp_path):
    """Saved after a signal: again on the same machine. Taken away: on a new one. Done: deleted."""
    flags = ["--queued", "--spot", "--retry=2", "--delete-after"]
    done = tpu("all", *flags, plans=["75", "taken", "0"])
    assert done.returncode == 0, done.stderr
    again = ["queued-resources create", "tpu-vm scp"]
    assert verbs(tmp_path) == [*again, "queued-resources delete", *again, "queued-resources delete"]
    created = [call for call in of("gcloud", tmp_path) if call[4] == "create"]
    assert created[0] == created[1] and "--spot" in created[0]
    assert "start 1 of 2" in done.stderr and "start 2 of 2" in done.stderr
    assert (tmp_path / "plan0").read_text() == ""


def test_what_was_stopped_is_not_begun_again(tpu, tmp_path):
    """By a watch that runs all the while, or one that comes later; until it is asked for."""
    assert tpu("all", plans=["wait", "0"]).returncode == 0
    for worker in (0, 1):
        wait_for(tmp_path / f"vm{worker}" / "warm_jax" / "train.log", "training")
    flags = ["--retry=9", "--delete-after", "--queued"]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        watching = pool.submit(tpu, "watch", *flags)
        seen = len(calls(tmp_path))
        while len(calls(tmp_path)) < seen + 3:
            time.sleep(0.01)
        assert tpu("stop").stdout.count("told to save") == 2
        watched = watching.result(timeout=60)
    later = tpu("watch", *flags)
    for done in (watched, later):
        assert done.returncode == 75 and "ended 75, stopped; " in done.stderr and "run' goes on" in done.stderr
        assert "start 1" not in done.stderr
    assert (tmp_path / "plan0").read_text() == "0\n"
    assert verbs(tmp_path) == ["tpu-vm create", "tpu-vm scp"]  # it is not deleted either: nobody is done

    assert tpu("run").returncode == 0
    for worker in (0, 1):
        wait_for(tmp_path / f"vm{worker}" / "warm_jax" / "exit", "0\n")
    assert tpu("stop").stdout.count(": ended 0\n") == 2  # too late: it is done
    assert tpu("watch", *flags).returncode == 0 and verbs(tmp_path)[-1] == "queued-resources delete"


def test_a_stop_before_the_start_counts(tpu, tmp_path):
    """While buckets are mounted, which may take minutes; and on a machine where nothing is installed yet."""
    assert tpu("create").returncode == 0
    assert tpu("stop").stdout.count(": not started, stopped\n") == 2
    assert "not started, stopped" in tpu("watch", "--retry=9").stderr
    assert tpu("install", plans=["0"]).returncode == 0
    for worker in (0, 1):
        (tmp_path / f"vm{worker}" / "mounted_gcs_bucket").unlink()
    (tmp_path / "stop_while_mounting").touch()
    done = tpu("run")
    assert done.returncode == 1 and done.stderr.count("it was stopped") == 2
    assert not (tmp_path / "argv0").exists()


@pytest.mark.parametrize(
    ("plans", "status", "words"),
    [(["75", "75"], 75, "after 1 new starts"), (["2"], 1, "ended 2"), (["75", "1"], 75, "ended 1")],
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


# "gcsfuse CLI" and "Install Cloud Storage FUSE" of the Cloud Storage documentation.
GCSFUSE = ["--implicit-dirs", "--rename-dir-limit=200000", "--metadata-cache-ttl-secs=0"]
APT = "https://packages.cloud.google.com/apt"


def mounts(tmp_path):
    """(flags, bucket, where) of each call of gcsfuse."""
    return [(flags, bucket, where) for _, *flags, bucket, where in of("apt_gcsfuse", tmp_path)]


def test_buckets_are_mounted_on_all_workers_and_again_after_a_reboot(tpu, tmp_path):
    images = ["--config.data.source=zip:gs://images-1/a.zip", "--config.x=tfds:gs://of_tfds/y", "gs://bucket/again"]
    assert tpu("all", plans=["wait", "0"], extra=images).returncode == 0
    both = [(GCSFUSE, "bucket", "/gcs/bucket"), (GCSFUSE, "images-1", "/gcs/images-1")]
    assert mounts(tmp_path) == both * 2  # by install; run finds them there
    owned = [call[-1] for call in of("sudo", tmp_path) if call[1:4] == ["install", "-d", "-o"]]
    assert owned == ["/gcs/bucket", "/gcs/images-1"] * 2
    code = platform.freedesktop_os_release()["VERSION_CODENAME"]
    key = "/usr/share/keyrings/cloud.google.asc"
    for worker in (tmp_path / "vm0", tmp_path / "vm1"):
        listed = (worker / "tee_etc_apt_sources.list.d_gcsfuse.list").read_text()
        assert listed == f"deb [signed-by={key}] {APT} gcsfuse-{code} main\n"
        assert (worker / f"tee{key.replace('/', '_')}").read_text() == "KEY\n"
        wait_for(worker / "warm_jax" / "train.log", "training")
    tpu("stop")
    for worker in (tmp_path / "vm0", tmp_path / "vm1"):
        wait_for(worker / "warm_jax" / "exit", "75\n")
    (tmp_path / "vm1" / "mounted_gcs_bucket").unlink()
    assert tpu("run", extra=images).returncode == 0
    assert mounts(tmp_path)[4:] == both[:1]
    assert len([call for call in of("sudo", tmp_path) if call[1] == "apt-get"]) == 4  # update and install, on each


def test_nothing_is_trained_where_the_bucket_cannot_be_mounted(tpu, tmp_path):
    (tmp_path / "forbidden").touch()
    done = tpu("all", plans=["0"])
    assert done.returncode == 1 and done.stderr.count("gs://bucket cannot be mounted at /gcs/bucket") == 2
    assert "service account" in done.stderr and not (tmp_path / "argv0").exists()


def test_a_path_that_is_shared_mounts_nothing(tpu, tmp_path):
    assert tpu("all", "--workdir=/shared/run", "--shared", plans=["0"]).returncode == 0
    assert not of("apt_gcsfuse", tmp_path) and not of("sudo", tmp_path)
