"""What a measurement becomes: a text table, a JSON file, the README's Markdown table. And what it was measured on."""

import json
import os
import platform
import subprocess
import tempfile
from datetime import datetime, timezone
from pathlib import Path

import torch

import facenet_ext

REPOSITORY = Path(__file__).resolve().parent.parent


def environment(device: str, threads: int) -> dict:
    """Everything that a reader needs to judge or repeat a number."""
    build = facenet_ext.build_info()
    found = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "facenet_ext": build["version"],
        "isa": os.environ.get("FACENET_EXT_ISA") or build["cpu_isa"][0],
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
        "device": device,
    }
    if device != "cpu":
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
    return found


def commit() -> str:
    """The checkout's commit, with "-dirty" where tracked files differ from it. FACENET_EXT_COMMIT, where set, is what
    whoever copied the sources without their history says of them."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    if "FACENET_EXT_COMMIT" in os.environ:
        return os.environ["FACENET_EXT_COMMIT"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cpu_model() -> str:
    """The name, and with it family and model: cloud machines often name no more than the maker."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in path.read_text().split("\n\n")[0].splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else name


def headline(found: dict) -> str:
    where = found.get("gpu") or f"{found['cpu']}, {found['threads']} threads, {found['isa']}"
    what = f"torch {found['torch']}, facenet_ext {found['facenet_ext']} at {found['commit']}"
    return f"{where}; {what}, {found['date'][:10]}"


# --- numbers ---------------------------------------------------------------------------------------------------------


def show_seconds(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def show_ratio(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 9.95 else f"{ratio:.0f}"


def show_spread(quartiles: dict) -> str:
    median, q1, q3 = (show_ratio(quartiles[key]) for key in ("median", "q1", "q3"))
    return f"{median} [{q1}, {q3}]"


def show_bytes(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB" if count >= 9.95e5 else "< 1 MB"


def cell(row: dict) -> str:
    return f"{show_seconds(row['seconds']['median'])} ({show_ratio(row['ratio'])})" if "seconds" in row else "-"


def listed(rows: list[dict], key: str) -> list:
    """The values of a key in order of appearance."""
    return list(
        dict.fromkeys(tuple(row[key]) if isinstance(row[key], list) else row[key] for row in rows if key in row)
    )


def left_out(rows: list[dict]) -> list[tuple[str, str]]:
    """("cubic", "(1800,40,128): needs ...") for what was not measured; regimes with one reason share a line."""
    grouped: dict[tuple, list[str]] = {}
    for row in rows:
        if "left_out" in row:
            grouped.setdefault((row["name"], tuple(row["size"]), row["left_out"]), []).append(row["regime"])
    return [
        (name, f"({','.join(map(str, size))}) {', '.join(dict.fromkeys(regimes))}: {reason}")
        for (name, size, reason), regimes in grouped.items()
    ]


# --- text ------------------------------------------------------------------------------------------------------------


def text_table(rows: list[dict]) -> str:
    """One block for a size and mode: contenders down, regimes across."""
    lines, regimes = [], listed(rows, "regime")
    for size in listed(rows, "size"):
        of_size = [row for row in rows if tuple(row["size"]) == size]
        for mode in listed(of_size, "mode"):
            shown = [row for row in of_size if row.get("mode", mode) == mode]
            title = f"({','.join(map(str, size))}) {mode}"
            lines.append(f"{title:24s}" + "".join(f"{regime:>20s}" for regime in regimes) + f"{'peak extra':>13s}")
            for name in listed(shown, "name"):
                mine = {row["regime"]: row for row in shown if row["name"] == name}
                peaks = [row["peak_bytes"] for row in mine.values() if "peak_bytes" in row]
                line = f"  {name:22s}" + "".join(f"{cell(mine[regime]):>20s}" for regime in regimes)
                lines.append(line + f"{show_bytes(max(peaks)) if peaks else '-':>13s}")
                if name == "facenet_ext":
                    rounds = [mine[regime] for regime in regimes]
                    spread = "".join(
                        f"{show_spread(row['ratio_in_round']) if 'calls' in row else '-':>20s}" for row in rounds
                    )
                    lines.append(f"    {'ratio within a round':20s}" + spread)
                    calls = "".join(f"{row.get('calls', 0):>20d}" for row in rounds)
                    lines.append(f"    {'rounds':20s}" + calls)
        lines += [f"  {name} left out at {reason}" for name, reason in left_out(of_size)] + [""]
    return "\n".join(lines)


def cliff_table(rows: list[dict], limit: float) -> str:
    lines = [f"{'(N,K,D)':18s}" + "".join(f"{regime:>28s}" for regime in listed(rows, "regime"))]
    for size in listed(rows, "size"):
        line = f"({','.join(map(str, size))})".ljust(18)
        for row in (row for row in rows if tuple(row["size"]) == size):
            mark = "" if row["over_base"] <= limit else " !"
            line += f"{show_spread(row['ratio_in_round'])}  x{row['over_base']:.2f}{mark}".rjust(28)
        lines.append(line)
    worst = max(rows, key=lambda row: row["over_base"])
    verdict = "holds" if worst["over_base"] <= limit else "does NOT hold"
    lines.append(
        f"ratio to X @ X.T of its own size within a round, median [quartiles], x: over that of the first line. Worst "
        f"{worst['over_base']:.2f} at {tuple(worst['size'])} {worst['regime']}: the limit of {limit} {verdict}."
    )
    return "\n".join(lines)


def references_table(rows: list[dict]) -> str:
    """Time of forward and backward, in brackets over the yardstick's in the same round."""
    regimes = listed(rows, "regime")
    lines = [f"{'(N,M,D)':18s}{'references':12s}" + "".join(f"{regime:>18s}" for regime in regimes)]
    for size in listed(rows, "size"):
        for name in listed(rows, "name"):
            line = f"({','.join(map(str, size))})".ljust(18) + name.ljust(12)
            for row in (row for row in rows if tuple(row["size"]) == size and row["name"] == name):
                ratio = show_ratio(row["ratio_in_round"]["median"])
                line += f"{show_seconds(row['seconds']['median'])} ({ratio})".rjust(18)
            lines.append(line)
    return "\n".join(lines)


def rules_table(data: dict, limits: dict, memory_limit: float, library_limit: float) -> str:
    """Time over that of semi-hard in the same round, in brackets over the yardstick; limits and whether they hold."""
    rows, regimes = data["rules"], listed(data["rules"], "regime")
    size = rows[0]["size"]
    lines = [f"({','.join(map(str, size))})".ljust(26) + "".join(f"{regime:>24s}" for regime in regimes)]
    for name in listed(rows, "name"):
        line = name.ljust(26)
        for row in (row for row in rows if row["name"] == name):
            over = row["over_semi_hard"]["median"]
            mark = " !" if over > limits.get(name, over) else ""
            shown = f"x{show_ratio(over)} ({show_ratio(row['ratio_in_round']['median'])})"
            line += f"{show_seconds(row['seconds']['median'])} {shown}{mark}".rjust(24)
        lines.append(line + (f"   limit x{limits[name]:.0f}" if name in limits else ""))
    for row in data["rules_memory"]:
        held = "holds" if row.get("peak_bytes", memory_limit) < memory_limit else "EXCEEDED"
        found = row.get("error") or f"{show_seconds(row['seconds'])}, peak {show_bytes(row['peak_bytes'])}"
        lines.append(f"N = {row['size'][0]}, {row['name']}: {found}; limit {show_bytes(memory_limit)}: {held}")
    mine = {row["name"]: row["seconds"]["median"] for row in data["library"] if "seconds" in row}
    if "metric-learning" in mine:
        times = mine["metric-learning"] / mine["facenet_ext"]
        held = "holds" if times >= library_limit else "does NOT hold"
        lines.append(f"pytorch-metric-learning at N = {data['library'][0]['size'][0]} takes {times:.0f} times as long; "
                     f"at least {library_limit:.0f}: {held}")
    else:
        lines += [f"{name} left out at {reason}" for name, reason in left_out(data["library"])]
    return "\n".join(lines)


def markdown(data: dict) -> str:
    """The README's table from a JSON file of this benchmark."""
    rows = data["rows"]
    if not rows:
        raise ValueError("the file holds no table: measure without --cliff or --memory")
    modes = listed(rows, "mode")
    rows = [row for row in rows if row.get("mode", modes[0]) == modes[0]]
    names = [name for name in listed(rows, "name") if any(row["name"] == name and "seconds" in row for row in rows)]
    head = ["N, K, D", "batch", *(f"`{name}`" if name == "X @ X.T" else name for name in names)]
    head.append("peak memory, facenet_ext / sorted")
    out = [f"| {' | '.join(head)} |", f"|{'---|' * 2}{'---:|' * (len(head) - 2)}"]
    for size in listed(rows, "size"):
        for regime in listed(rows, "regime"):
            mine = {row["name"]: row for row in rows if tuple(row["size"]) == size and row["regime"] == regime}
            if "facenet_ext" not in mine:
                continue
            cells = []
            for name in names:
                row = mine.get(name, {})
                shown = show_seconds(row["seconds"]["median"]) if name == "X @ X.T" and "seconds" in row else cell(row)
                cells.append(f"**{shown}**" if name == "facenet_ext" else "–" if shown == "-" else shown)
            pair = [mine.get(name, {}) for name in ("facenet_ext", "sorted")]
            peaks = [show_bytes(row["peak_bytes"]) if "peak_bytes" in row else "–" for row in pair]
            out.append(f"| {', '.join(map(str, size))} | {regime} | {' | '.join(cells)} | {' / '.join(peaks)} |")
    notes = [f"{name}: {note}" for name, note in data["notes"].items() if name in names and note]
    out += [
        "",
        "Forward and backward, interleaved medians; in brackets the time over that of `X @ X.T`. Peak memory is above",
    ]
    out += [f"the input and its gradient. {'; '.join(notes)}. –: not measured (too slow or too large).", ""]
    out.append(f"Measured on {headline(data['environment'])}.")
    return "\n".join(out)


# --- files -----------------------------------------------------------------------------------------------------------


def replace_file(path: Path, write) -> None:
    """`write(temporary path)`, then the file takes its place in one step: no reader sees half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(handle)
    try:
        write(Path(temporary))
        os.chmod(temporary, 0o644)  # mkstemp lets only the owner read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, data: dict) -> None:
    replace_file(path, lambda temporary: temporary.write_text(json.dumps(data, indent=1) + "\n"))


def read_json(path: Path) -> dict:
    try:
        data = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; expected one written by --json") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a JSON file ({error}); expected one written by --json") from None
    if not isinstance(data, dict) or data.get("benchmark") != "mining_bench":
        raise ValueError(f"{path}: not a result of this benchmark; expected one written by --json")
    return data
