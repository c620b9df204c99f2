"""The tables of the report, and what follows from them."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from perf.machine import QUIET_CORES
from perf.results import Figure, Result, Row, figure, least_samples, meaning, percentile_text, ratios

PUBLISHED = Path(__file__).parent / "peers" / "published.toml"
COMPARED = ("weights", "target", "instances", "transport")  # settings whose first value is the base
CHOSEN = ("queue_delay_us", "instances")
FIXED = ("size", "batch", "concurrency", "transport")
SETTINGS = (*COMPARED, "queue_delay_us", "size", "batch", "concurrency", "rate_fps")
WORDS = {"queue_delay_us": "queue delay", "rate_fps": "frames/s sent", "concurrency": "in flight"}
TRANSPORTS = {"grpc": "gRPC", "system": "shared memory", "cuda": "CUDA shared memory"}
STREAM_FPS = 24
IN_TIME = 0.98  # answers per second over frames sent per second, below which a queue grows
LEAST_ROUNDS = 3  # of a headline
NOTHING = "-"

Cells = dict[str, str]
Part = dict[str, Any]
"""What the template shows of one result."""


def bars(rows: Mapping[str, Row]) -> dict[str, Figure]:
    """Frames/s of the rows that have them."""
    return {name: fps for name, row in rows.items() if (fps := figure(row, "fps"))}


def size_name(size: Sequence[int]) -> str:
    """(height, width) as everybody writes it."""
    return f"{size[1]}x{size[0]}"


def machine_of(result: Result) -> str:
    """Processor with what tells it from its namesakes, memory, GPU."""
    machine = result["machine"]
    units = ", ".join(unit.replace("_", "-").upper() for unit in machine["vector_units"][-2:])
    processor = f"{machine['cpu']}, {machine['cores']} cores ({units}), {machine['memory_gb']:g} GB"
    return f"{processor}; {machine['gpu'] or 'no GPU'}"


def shown(row: Row, key: str, digits: int = 0) -> str:
    """A quantity of a row, or a dash; frames/s with the marks that the introduction explains."""
    found, others = figure(row, key), figure(row, "others_cores")
    if found is None or key != "fps":
        return found.text(digits) if found else NOTHING
    unstable = any(not one.get("stable", True) for one in row["rounds"])
    return "!" * bool(others and others.high > QUIET_CORES) + "~" * unstable + found.text(digits)


def number(row: Row, key: str, digits: int, unit: float = 1) -> str:
    """A figure that a row has once, or a dash."""
    return f"{row[key] / unit:.{digits}f}" if key in row else NOTHING


def setting(key: str, value: Any) -> str:
    """A setting as a reader says it."""
    if value is None:
        return "default"
    if key == "size":
        return size_name(value)
    if key == "queue_delay_us":
        return f"{value / 1000:g} ms"
    return TRANSPORTS.get(value, f"{value:g}" if isinstance(value, float) else str(value))


def words(row: Row, keys: Iterable[str]) -> str:
    """Settings of a row in one line."""
    return ", ".join(f"{WORDS.get(key, key)} {setting(key, row[key])}" for key in keys)


def varying(rows: Sequence[Row]) -> list[str]:
    """The settings in which rows differ; the size where they do not."""
    return [key for key in SETTINGS if len({str(row.get(key)) for row in rows}) > 1] or ["size"]


def groups(rows: Sequence[Row], keys: Sequence[str]) -> dict[str, list[Row]]:
    """Rows by these settings in words, in their order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(words(row, keys) or words(row, ["size"]), []).append(row)
    return found


def gains(rows: Sequence[Row]) -> dict[str, list[str]]:
    """What every value of a setting gives over the first, all else equal, round by round."""
    said: dict[str, list[str]] = {}
    for key in (key for key in COMPARED if key in varying(rows) and figure(rows[0], "fps")):
        for place, (base, *others) in groups(rows, [one for one in varying(rows) if one != key]).items():
            for other in others:
                ratio = ratios(*([one["fps"] for one in row["rounds"]] for row in (other, base)))
                title = f"Frames/s of {words(other, [key])} over {words(base, [key])}"
                said.setdefault(title, []).append(f"{ratio.text(2)}x, {meaning(ratio)} ({place})")
    return said


def choices(rows: Sequence[Row]) -> dict[str, str]:
    """Setting -> the value to choose, of those that have one."""
    found = {key: smallest_as_good(rows, key) for key in CHOSEN if key in varying(rows)}
    return {key: setting(key, value) for key, value in found.items() if value is not None}


def smallest_as_good(rows: Sequence[Row], key: str) -> int | None:
    """The least value of a setting that none beats beyond the spread, at any place of the others.

    Under the heaviest load; None where a point has one round, and so no spread.
    """
    rows = [row for row in rows if row["concurrency"] == max(one["concurrency"] for one in rows)]
    if any(len(row["rounds"]) < 2 for row in rows):
        return None
    choices = []
    for members in groups(rows, [one for one in varying(rows) if one != key]).values():
        fps = {row[key]: Figure(tuple(one["fps"] for one in row["rounds"])) for row in members}
        best = max(fps.values(), key=lambda one: one.median)
        choices.append(min(value for value, one in fps.items() if one.high >= best.low))
    return max(choices)


def streams(rows: Sequence[Row], budget_ms: float) -> dict[str, int]:
    """Streams of 24 frames/s that are in time, by the other settings.

    In time: the median round's p95 is within the budget, from enough requests, and no queue grows.
    """
    found = {}
    for place, members in groups(rows, [one for one in varying(rows) if one != "rate_fps"]).items():
        in_time = [0.0]
        for row in members:
            fps, p95 = figure(row, "fps"), figure(row, "p95_ms")
            enough = min((one["requests"] for one in row["rounds"]), default=0) >= least_samples(95)
            if fps and p95 and enough and fps.median >= IN_TIME * row["rate_fps"] and p95.median <= budget_ms:
                in_time.append(row["rate_fps"])
        found[place] = int(max(in_time) // STREAM_FPS)
    return found


def sweep_part(result: Result) -> Part:
    """A sweep's table and choices, and where the time of a request goes."""
    rows = [row for row in result["rows"] if row["rounds"]]
    keys, table, stages = varying(rows), [], []
    for row in rows:
        counted = [stage for one in row["rounds"] for stage in one["stages"].items()]
        batches = tuple(one["batch"] for name, one in counted if name == "generator")
        table.append({
            **{WORDS.get(key, key): setting(key, row[key]) for key in keys}, "frames/s": shown(row, "fps", 2),
            **{f"p{n} ms": percentile_text(row, n) for n in (50, 95, 99)},
            "batch achieved": Figure(batches).text(2) if batches else NOTHING,
            "peak MB": shown(row, "memory_mb"), "GPU MB": shown(row, "gpu_memory_mb"),
        })  # fmt: skip
        for stage, times in row["rounds"][-1]["stages"].items() if row["batch"] == rows[0]["batch"] else ():
            phases = {
                f"{one} ms": f"{times[f'{one}_ms']:.1f}" for one in ("queue", "input", "infer", "output")
            }
            stages.append({"in flight": str(row["concurrency"]), "stage": stage, **phases})
    is_complete = bool(rows) and not result["stopped"]
    return {
        "result": result, "rows": table, "bars": bars({words(row, keys): row for row in rows}),
        "fixed": words(rows[0], [key for key in FIXED if key not in keys]) if rows else NOTHING,
        "gains": gains(rows), "choices": choices(rows) if is_complete else {},
        "served": {key: setting(key, result["committed"][key]) for key in CHOSEN},
        "streams": streams(rows, result["budget_ms"]) if result["budget_ms"] else {},
        "headlines": {
            words(row, keys): shown(row, "fps", 1) for row in rows if len(row["rounds"]) >= LEAST_ROUNDS
        },
        "stages": stages if set(keys) <= {"batch", "concurrency"} else [],
    }  # fmt: skip


def end_to_end_part(result: Result) -> Part:
    """What serving costs, file to file."""
    rows = {row["name"]: row for row in result["rows"]}
    sides = ([one["fps"] for one in rows[name]["rounds"]] for name in ("file to file", "perf_analyzer"))
    stages = rows["file to file"]["rounds"][-1]["client_stages_s"]
    return {
        "result": result, "share": ratios(*sides).text(2), "bars": bars(rows),
        "busy": ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in stages.items()),
        "rows": [{"what": name, "frames/s": shown(row, "fps", 1)} for name, row in rows.items()],
    }  # fmt: skip


def ladder_cells(row: Row) -> Cells:
    """Figures of a row of the ladder; the ratio is of rounds next to each other."""
    pairs = [(one["fps"], one["baseline_fps"]) for one in row["rounds"] if "baseline_fps" in one]
    return {
        "row": row["name"], "frames/s": shown(row, "fps", 1),
        "times the baseline": ratios(*zip(*pairs, strict=True)).text() if pairs else NOTHING,
        "peak MB": shown(row, "memory_mb"),
        "PSNR-Y dB": number(row, "psnr_db", 2), "loss dB": number(row, "loss_db", 2),
        "SSIM-Y": number(row, "ssim", 4), "tOF px": number(row, "tof_px", 3),
    }  # fmt: skip


def ladder_part(result: Result) -> Part:
    """The precision ladder."""
    table = []
    for row in result["rows"]:
        network = result["networks"].get(row["weights"], {})
        table.append({
            **ladder_cells(row), "test clips": "; ".join(result["clips"]) if "psnr_db" in row else NOTHING,
            "parameters M": number(network, "parameters", 2, 1e6), "GFLOPs": number(network, "flops", 1, 1e9),
        })  # fmt: skip
    return {"result": result, "rows": table, "bars": bars({row["name"]: row for row in result["rows"]})}


def peers_part(result: Result) -> Part:
    """All networks on one device, and how far each is from its roofline."""
    table = []
    for row in result["rows"]:
        fps, bound = figure(row, "fps"), row.get("bound_fps")
        table.append({
            "network": row["name"], "runtime": row["runtime"],
            "measured at": size_name(row["size"]) + " (smaller)" * (row["size"] != result["size"]),
            "parameters M": number(result["networks"][row["name"]], "parameters", 2, 1e6),
            "GFLOPs a frame": number(row, "flops", 0, 1e9), "MB a frame": number(row, "bytes", 0, 1e6),
            "ms a frame": f"{1000 / fps.median:.1f}" if fps else NOTHING, "frames/s": shown(row, "fps", 2),
            "roofline": number(row, "bound_fps", 0),
            "reached": f"{fps.median / bound:.0%}" if fps and bound else NOTHING,
            "peak MB": number(row, "memory_mb", 0),
        })  # fmt: skip
    ceilings = [
        f"{name} {value / 1e12:.2f} {'TB/s' if name == 'copy' else 'TFLOP/s'}"
        for name, value in result["ceilings"].items()
    ]
    drawn = bars({f"{row['name']}, {row['runtime']}": row for row in result["rows"]})
    return {"result": result, "rows": table, "bars": drawn, "ceilings": ", ".join(ceilings)}


def papers(peers: Sequence[Result], ladders: Sequence[Result]) -> list[Cells]:
    """The papers' table, line by line, beside what was counted and measured here."""
    networks = {name: one for result in peers for name, one in result["networks"].items()}
    table = []
    for line in tomllib.loads(PUBLISHED.read_text())["line"]:
        name = line.get("counted", "")
        table.append({
            "line": line["name"], "parameters": line["parameters"],
            "counted M": number(networks.get(name, {}), "parameters", 2, 1e6), "GFLOPs": str(line["gflops"]),
            "counted 2 x MAC": number(networks.get(name, {}), "flops_at_papers_size", 0, 1e9),
            "the papers' FLOPs are": line["reading"], "ms": line["ms"], "frames/s": line["fps"],
            "memory": line["memory"],
            "frames/s here, CPU": _fps(ladders, key=line["ladder"]) if "ladder" in line
            else _fps(peers, name=name, runtime="PyTorch FP32", gpu=False),
            "frames/s here, GPU": _fps(peers, name=name, runtime=line.get("gpu", "PyTorch FP32"), gpu=True),
        })  # fmt: skip
    return table


def _fps(found: Sequence[Result], *, gpu: bool = False, **wanted: str) -> str:
    """Frames/s of the first row that has them, and its size."""
    for result in (one for one in found if gpu == bool(one["machine"]["gpu"])):
        for row in result["rows"]:
            fps = figure(row, "fps")
            if fps and all(row[key] == value for key, value in wanted.items()):
                return f"{fps.text(2)} at {size_name(row['size'] if 'size' in row else result['size'])}"
    return NOTHING
