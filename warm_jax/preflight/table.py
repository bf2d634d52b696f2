"""What a preflight found, for people: a table, what it assumes, and what to do where a program does not fit."""

import re
from collections.abc import Callable
from typing import Any

from warm_jax.accelerators.topology import GIB, Target


def memory(analysis: Any) -> dict[str, int]:
    """Bytes a chip, from `Compiled.memory_analysis()`; donated arguments, where results are written, count once."""
    parts = {
        "arguments": analysis.argument_size_in_bytes,
        "results": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "code": analysis.generated_code_size_in_bytes,
    }
    return parts | {"total": sum(parts.values())}


def out_of_memory(message: str, arguments: int) -> dict[str, int] | None:
    """Bytes wanted and there, from a compiler's refusal of a program that is too large; None for another message.

    A program that is far too large it refuses at its first count, which is of temporaries alone and comes before it
    tries to make do with less; `arguments` are the bytes that the program is handed.
    """
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None
    unit = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    size = r"([\d.]+)([KMGT]?)"
    used = re.search(rf"Used {size} of {size}", message)
    first = re.search(rf"temporaries \({size}\) exceeds available HBM \({size}\)", message)
    if not used and not first:
        return {}
    a, a_unit, b, b_unit = (used or first).groups()
    wanted, available = int(float(a) * unit[a_unit]), int(float(b) * unit[b_unit])
    if used:
        return {"total": wanted, "available": available}
    parts = {"arguments": arguments, "temporaries": wanted, "total": arguments + wanted}
    return parts | {"available": available, "first_count": True}


def needs(found: dict) -> str:
    """What a train step that does not fit would take, as a sentence's end; empty where the compiler did not say."""
    total = found["programs"]["train step"]["memory"].get("total")
    return f": {_gib(total)} of {_gib(found['chip']['memory'])} a chip" if total else ""


def may_fit(found: dict, target: Target) -> bool:
    """Whether the train step may fit `target`, if all but the state shrinks as the batch a chip does.

    `found` is of fewer chips, where it did not fit. Nothing shrinks faster, so what does not fit by this does not fit;
    but a compiler's first count tells nothing of what it could do with.
    """
    memory, state = found["programs"]["train step"]["memory"], found["state_bytes"]
    if memory.get("first_count"):
        return True
    total = memory.get("total", 0)
    expected = state + max(0, total - state) * found["devices"] / target.devices
    return expected <= target.chip.memory * target.chip.usable


def remedies(found: dict) -> list[str]:
    """What makes the programs smaller, the cheapest first; numbers by the same rule as `may_fit`."""
    if found["programs"]["train step"]["fits"]:
        sampling = found["programs"]["sampling loop"]
        fewer = max(sampling["devices"], sampling["batch"] // 2)
        lines = [f"batch: --config.sample.batch_size={fewer}: the images are the same"]
        return [*(lines if fewer < sampling["batch"] else []), "chips with more memory"]
    needed, batch = found["programs"]["train step"]["memory"].get("total", 0), found["batch_size"]
    state, limit = found["state_bytes"], found["chip"]["memory"] * found["chip"]["usable"]
    parts, lines = found["devices"] * found["accumulation"], []
    if needed > state and limit > state:
        factor = (needed - state) / (limit - state)
        slices = [n for n in range(2, batch + 1) if batch % (n * found["devices"]) == 0]
        enough = next((n for n in slices if n >= found["accumulation"] * factor), None)
        if enough:
            lines.append(
                f"accumulation: --config.train.accumulation={enough}: the same batch in {enough} slices, about as fast"
            )
        smaller = int(batch / factor) // parts * parts
        if smaller:
            lines.append(f"batch: --config.train.batch_size={smaller}, which is another training")
    kept = [side // found["patch_size"] for side in found["sides"]]
    if left := [side for side in kept if side not in found["remat"]]:
        sides = ", ".join(map(str, sorted({*found["remat"], max(left)}, reverse=True)))
        lines.insert(0, f'remat: --config.model.remat="({sides},)": activations of that resolution computed again')
    if state > limit / 4:
        lines.append(f"fsdp: the state is {state / GIB:.2f} GiB on every chip; split it over chips (mesh.fsdp)")
    if 0 < needed <= found["chip"]["memory"]:
        lines.insert(0, "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95: JAX takes 75 % of a GPU's memory unless told otherwise")
    return [*lines, "more chips, or chips with more memory"]


def _si(value: float | int | None, unit: str) -> str:
    """Three digits and a prefix: 3.88 TFLOP, 120 kB, 1.04 ms."""
    if not value:
        return "–" if value is None else f"0 {unit}"
    steps = {1e15: "P", 1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k", 1: "", 1e-3: "m", 1e-6: "µ", 1e-9: "n"}
    step = next((step for step in steps if abs(value) >= step), 1)
    return f"{value / step:#.3g}".rstrip(".") + f" {steps[step]}{unit}"


def _gib(value: float | int | None) -> str:
    if value is None:
        return "–"
    return f"{value / GIB:,.2f} GiB" if value >= GIB / 10 else f"{value / 2**20:,.2f} MiB"


def _memory_rows(found: dict, rows: list[dict]) -> list[tuple]:
    chip = found["chip"]
    parts = ("arguments", "temporaries", "results", "code")
    limit = f" of {_gib(chip['memory'])}" if chip["memory"] else ""
    if chip["usable"] < 1:
        limit += f" ({_gib(chip['memory'] * chip['usable'])} by default)"
    verdict = {True: "yes", False: "NO", None: "no limit known"}
    return [
        *((f"memory a chip: {name}", *(_gib(row["memory"].get(name)) for row in rows)) for name in parts),
        (f"  total{limit}", *(_gib(row["memory"].get("total")) for row in rows)),
        ("  fits", *(verdict[row["fits"]] for row in rows)),
    ]


def _work_rows(found: dict, rows: list[dict]) -> list[tuple]:
    work = [sum(row["flops"].values()) for row in rows]
    # XLA counts the body of a loop once, so its count of the sampling loop or of accumulation says nothing.
    counted = [row.get("compiler", {}).get("flops") for row in rows]
    counted = [None if i or found["accumulation"] > 1 else flops for i, flops in enumerate(counted)]
    made = [
        ("FLOPs a chip: products, analytic", *(_si(flops, "FLOP") for flops in work)),
        (
            "  of these at full float32",
            *(f"{row['flops']['float32'] / f:.1%}" for row, f in zip(rows, work, strict=True)),
        ),
    ]
    if "recomputed" in rows[0]:
        made.append(("  of these computed again (remat)", _si(rows[0]["recomputed"], "FLOP"), *["–"] * (len(rows) - 1)))
    if any(counted):
        shown = [f"{_si(c, 'FLOP')} ({c / f:.2f} ×)" if c else "–" for c, f in zip(counted, work, strict=True)]
        made.append(("  of everything, by the compiler", *shown))
    made.append(("bytes moved a chip", *(_si(row.get("moved"), "B") for row in rows)))
    return made


def _collective_rows(rows: list[dict]) -> list[tuple]:
    every = [{one["kind"]: one for one in row.get("collectives", [])} for row in rows]
    kinds = sorted({kind for one in every for kind in one})
    return [
        (kind, *(f"{one[kind]['count']:,} ×, {_si(one[kind]['bytes'], 'B')}" if kind in one else "–" for one in every))
        for kind in kinds
    ] or [("collectives", *["none"] * len(rows))]


def _time_rows(found: dict, rows: list[dict]) -> list[tuple]:
    lines = [row.get("roofline") for row in rows]
    if not any(lines):
        return []

    def cells(show: Callable[[dict, dict], str]) -> list[str]:
        return [show(line, row) if line else "–" for line, row in zip(lines, rows, strict=True)]

    def hours(line: dict, row: dict) -> str:
        images = found["images_in_all"] if row is rows[0] else 50_000
        seconds = images / row["batch"] * line["seconds"] * row["devices"] / found["devices"]
        return f"{f'{seconds / 3600:,.2f} h' if seconds > 360 else _si(seconds, 's')} for {_si(images, '').strip()}"

    def rate(line: dict, row: dict) -> float:
        """Of all chips: where a program runs on a host's, each host has its own."""
        return row["batch"] / line["seconds"] * found["devices"] / row["devices"]

    ridge = next(line for line in lines if line)["ridge"]
    times = {"computing": "compute", "memory traffic": "memory", "collectives": "network"}
    return [
        (f"FLOP a byte (the chip's peaks: {ridge:.0f})", *cells(lambda line, _: f"{line['intensity']:.0f}")),
        *((f"time of {name}", *cells(lambda line, _, key=key: _si(line[key], "s"))) for name, key in times.items()),
        ("time of one run, AT LEAST", *cells(lambda line, _: _si(line["seconds"], "s"))),
        ("  limited by", *cells(lambda line, _: line["limit"])),
        ("images/s, AT MOST", *cells(lambda line, row: f"{rate(line, row):,.0f}")),
        ("time for all images, AT LEAST", *cells(hours)),
    ]


def text(found: dict) -> str:
    """The table and what goes with it, of what `preflight.examine` found."""
    names, rows = list(found["programs"]), list(found["programs"].values())
    table = [
        ("", *names),
        ("images, a chip", *(f"{row['batch']}, {row['batch'] / row['devices']:g}" for row in rows)),
        ("chips that share them", *(f"{row['devices']}" for row in rows)),
        ("compiled in", *(f"{row['seconds_to_compile']:.0f} s" for row in rows)),
        ("  on this machine's cores together", *(f"{row['cpu_seconds']:.0f} s" for row in rows)),
        *_memory_rows(found, rows),
        *_work_rows(found, rows),
        *_collective_rows(rows),
        *_time_rows(found, rows),
    ]
    widths = [max(len(row[i]) for row in table) for i in range(len(names) + 1)]
    lines = [
        f"{found['topology']}: {found['devices']} × {found['chip']['name']}; {found['parameters']:,} parameters, "
        f"{found['dtype']}, batch {found['batch_size']}",
        *("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in table),
    ]
    if "unfinished" in found:
        lines.append(f"UNFINISHED after the {names[-1]}: {found['unfinished']}")
    if found["fits"] is False:
        which = ", ".join(name for name, row in found["programs"].items() if row["fits"] is False)
        lines += [f"DOES NOT FIT: {which}. What helps:", *(f"  - {line}" for line in remedies(found))]
    if left := [one["topology"] for one in found.get("tried", []) if one["fits"] is False and not one["compiled"]]:
        lines.append(f"Not compiled, by what fewer chips need: {', '.join(left)}")
    return "\n".join([*lines, *_notes(found, rows)])


def _notes(found: dict, rows: list[dict]) -> list[str]:
    if not found["chip"]["bf16"]:
        return ["Pretended devices have no speed and no limit: no roofline."]
    notes = ["Bounds, not promises. Assumed:", *(f"  - {line}" for line in found["assumed"])]
    if found["chip"]["platform"] == "gpu":
        notes.append("  - cuDNN and cuBLAS choose kernels on the device: what these need for themselves is not counted")
    if found["dtype"] == "float32" and found["chip"]["platform"] == "tpu":
        notes.append("  - float32 products take six bfloat16 passes (model.dtype=bfloat16 takes one)")
    if rows[-1]["devices"] < found["devices"]:
        notes.append("  - each host samples by itself, one process a host, without a guide")
    if unknown := max(row.get("unknown_loops", 0) for row in rows):
        notes.append(f"  - {unknown} loop(s) of unknown length count once")
    return notes
