"""The first hour on a real accelerator, in one command: is it right, how fast is it, does it fit as foretold.

    python benchmarks/accelerator.py                         # at most 8 minutes on one GPU
    python benchmarks/accelerator.py --minutes=4 --only=doctor,exactness,train
    python benchmarks/accelerator.py --smoke                 # all of it on a CPU, with small networks

    doctor         --mode=doctor
    tests          the suite's tests that are marked accelerator, on this device
    exactness      gradients and samples of a small network against the CPU's numbers
    train cifar10  the published networks' train steps at several batches: images/s, MFU, memory; and one trace
    train ffhq64
    sample         sampling loops, and what the whole --mode=sample reaches of them

Steps have no input pipeline: their batch stays on the devices. Beside each speed stands the bound that --mode=preflight
reckons, here of the program that ran, and beside the memory seen the memory that the compiler foretold. Each part is a
process of its own: one that fails is a row that says so, as is one that there was no time for, and the next begins.

Writes OUT/accelerator.md, a table to paste, OUT/accelerator.json, OUT/trace_NAME (for XProf), and prints the table. The
exit status is 1 where a check failed or a part did, else 0.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
PARTS = ("doctor", "exactness", "train cifar10", "train ffhq64", "sample", "tests")
# Seconds without which a part is not begun, and the share of the time that is left that it may take.
_LEAST, _SHARE = 15, {"doctor": 0.25, "exactness": 0.3, "train cifar10": 0.45, "train ffhq64": 0.5, "sample": 0.7}
_GRACE = 10  # seconds that a process has to end by itself


def run(command, seconds, environment=None):
    """(exit status, what it printed); None for the status where it was ended after `seconds`."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=subprocess.STDOUT, cwd=ROOT, env={**os.environ, **(environment or {})}
        )
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = None
        said.seek(0)
        return status, said.read()


def ended(name, status, said):
    """The row of a process that did not end well."""
    if status is None:
        return {"check": name, "failed": "cut off: its time was over"}
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(E  +)?[\w.]*(Error|Exception)\b|error:", line)]
    return {"check": name, "failed": f"status {status}: {' '.join((errors or lines)[-1:])[:200]}"}


def of_rows(name, seconds, out, smoke):
    """Rows of a part of accelerator_parts.py, those too that it found before it was cut off."""
    path = out / f"{name.replace(' ', '_')}.jsonl"
    path.unlink(missing_ok=True)
    script = pathlib.Path(__file__).with_name("accelerator_parts.py")
    asked = [sys.executable, str(script), name, str(path), f"{seconds - _GRACE}", *(["--smoke"] if smoke else [])]
    status, said = run(asked, seconds)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    path.unlink(missing_ok=True)
    whole = {"ended": name} in rows  # a process may take long to leave
    return [row for row in rows if "ended" not in row] + ([] if whole else [ended(name, status, said)])


def doctor(seconds, out):
    """The row of `--mode=doctor`."""
    report = out / "doctor.json"
    status, said = run([sys.executable, "-m", "warm_jax", "--mode=doctor", f"--out={report}"], seconds)
    if not report.exists():
        return [ended("doctor", status, said)]
    found = json.loads(report.read_text(encoding="utf-8"))["findings"]
    problems = [f"{one['subject']}: {one['said']}" for one in found if one["status"] == "problem"]
    return [{"check": "doctor", "measured": "; ".join(problems) or "all right", "expected": "no problem",
             "good": not problems}]  # fmt: skip


def tests(seconds, platform):
    """The row of the suite's tests that are marked `accelerator`, on the platform."""
    names = "cpu" if platform == "cpu" else f"{platform},cpu"
    files = [
        str(path)
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        if "mark.accelerator" in path.read_text("utf-8")
    ]
    asked = [sys.executable, "-m", "pytest", "-n", "0", "-m", "accelerator", "-p", "no:cacheprovider", *files]
    status, said = run(asked, seconds, {"JAX_PLATFORMS": names})
    summary = re.findall(r"^=*\s*(\d+ (?:passed|failed|skipped|error)[^=\n]*?)\s*=*$", said, re.MULTILINE)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)
    if not summary or status is None:
        return [ended("tests marked accelerator", status, said)]
    measured = ", ".join([summary[-1], *failed])
    return [{"check": "tests marked accelerator", "measured": measured, "expected": "none fails", "good": status == 0}]


def number(value, show="{:,.1f}"):
    return "–" if value is None else show.format(value)


def _gib(value):
    return None if value is None else value / 2**30


def speed(row):
    """A line of the table of speeds."""
    named = f"| {row['program']} | {row['images_per_device']} | "
    if "failed" in row or "skipped" in row:
        return named + ("failed: " + row["failed"] if "failed" in row else "skipped: " + row["skipped"]) + " |" * 9
    limit = f" ({row['limit']})" if "limit" in row else ""
    cells = [
        number(row["compile_seconds"], "{:.0f}"),
        number(row["milliseconds"], "{:,.2f}"),
        number(row["images_per_second"]),
        number(row["mfu"], "{:.1%}"),
        number(row.get("bound"), "{:,.2f}") + limit,
        number(row.get("of_bound"), "{:.0%}"),
        number(_gib(row["seen"]), "{:.2f}"),
        number(_gib(row["foretold"]), "{:.2f}"),
    ]
    return named + " | ".join(cells) + " |"


def check(row):
    """A line of the table of checks."""
    if "failed" in row or "skipped" in row:
        said = "failed: " + row["failed"] if "failed" in row else "skipped: " + row["skipped"]
        return f"| {row['check']} | {said} | | {'NO' if 'failed' in row else '–'} |"
    verdict = {True: "yes", False: "NO", None: "–"}[row["good"]]
    return f"| {row['check']} | {row['measured']} | {row['expected']} | {verdict} |"


def markdown(about, rows, minutes):
    """What is to be pasted."""
    kind = about.get("kind", "no device was found")
    lines = [f"{about.get('count', 0)} × {kind}, JAX {about.get('jax', '?')}, {minutes:.1f} minutes.", ""]
    if about and not about["known"]:
        from warm_jax.accelerators import topology

        known = ", ".join(topology.names())
        lines += [
            f"Not known to the roofline: {kind}; so no MFU and no bounds. Known are {known}. A row in "
            "`warm_jax/accelerators/topology.py`, of the maker's data sheet, makes it known.",
            "",
        ]
    lines += ["| check | measured | expected | good |", "|---|---|---|---|"]
    lines += [check(row) for row in rows if "check" in row]
    speeds = [speed(row) for row in rows if "program" in row]
    heads = (
        *("program", "images a device", "compile, s", "ms", "images/s", "MFU", "bound, ms", "of the bound"),
        *("memory seen, GiB", "foretold, GiB"),
    )
    if speeds:
        lines += ["", f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1), *speeds]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="what does not fit is left out, and named")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, or beginnings of their names")
    parser.add_argument("--out", default="runs/accelerator")
    parser.add_argument("--smoke", action="store_true", help="small networks, on a CPU")
    asked = parser.parse_args()
    wanted = [name for name in PARTS if any(name.startswith(one) for one in asked.only.split(",") if one)]
    if not wanted or not asked.minutes > 0:
        print(f"error: --only={asked.only} --minutes={asked.minutes:g}: give parts of {', '.join(PARTS)}, and minutes "
              "above 0", file=sys.stderr)  # fmt: skip
        return 2
    if asked.smoke:
        os.environ["JAX_PLATFORMS"] = "cpu"
    out, started = pathlib.Path(asked.out).resolve(), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    rows, about = [], {}

    def left():
        return 60 * asked.minutes - (time.monotonic() - started)

    def tell(found):
        rows.extend(found)
        for row in found:
            print(check(row) if "check" in row else speed(row), flush=True)
        whole = markdown(about, rows, (time.monotonic() - started) / 60)
        (out / "accelerator.md").write_text(whole, encoding="utf-8")
        content = {"about": about, "minutes": asked.minutes, "smoke": asked.smoke, "rows": rows}
        (out / "accelerator.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return whole

    for row in of_rows("devices", min(120, left()), out, asked.smoke):
        about.update(row) if "kind" in row else rows.append(row)
    for name in wanted:
        seconds = left() * _SHARE.get(name, 1.0)
        if seconds < _LEAST or not about:
            why = f"{left():.0f} s left" if about else "no device was found"
            tell([{"check": name, "skipped": why}])
        elif name == "doctor":
            tell(doctor(seconds, out))
        elif name == "tests":
            tell(tests(seconds, about["platform"]))
        else:
            tell(of_rows(name, seconds, out, asked.smoke))
    print(f"\n{tell([])}\nwritten to {out}/accelerator.md and accelerator.json")
    return int(any("failed" in row or row.get("good") is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
