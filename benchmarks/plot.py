"""Time and memory against the size of the batch, both axes logarithmic."""

from pathlib import Path

import matplotlib
from report import headline, listed, replace_file

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import FuncFormatter, NullLocator  # noqa: E402

COLOURS = {"X @ X.T": "#6b6b6b", "facenet_ext": "#c1272d"}  # the rest take their turn from a colour-blind safe cycle
CYCLE = ("#0072b2", "#009e73", "#e69f00", "#56b4e9", "#cc79a7", "#8c6d31")
MARKERS = "osD^vP"


def unit(steps: tuple[tuple[float, str], ...]):
    """Axis labels such as 100 ms: the largest unit that leaves a whole number."""

    def show(value, _):
        for scale, name in steps:
            if value >= scale * 0.999:
                return f"{value / scale:.0f} {name}"
        return ""

    return FuncFormatter(show)


def plot(path: Path, rows: list[dict], environment: dict) -> None:
    names = [name for name in listed(rows, "name") if any("seconds" in row and row["name"] == name for row in rows)]
    mode = listed(rows, "mode")[0]
    _, k, d = rows[0]["size"]
    colour = dict(zip((n for n in names if n not in COLOURS), CYCLE, strict=False)) | COLOURS
    marker = dict(zip((n for n in names if n not in COLOURS), MARKERS, strict=False))
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.9), layout="constrained")
    for panel, title, value, formatter in (
        (
            panels[0],
            "Time of forward and backward",
            lambda row: row["seconds"]["median"],
            unit(((1, "s"), (1e-3, "ms"), (1e-6, "µs"))),
        ),
        (
            panels[1],
            "Peak memory above input and gradient",
            lambda row: max(row["peak_bytes"], 1e6),  # below 1 MB the resident set's resolution ends
            unit(((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))),
        ),
    ):
        for name in names:
            points = [(row["size"][0], value(row)) for row in rows if row["name"] == name and row.get("mode") == mode]
            own = {"linewidth": 3, "zorder": 5, "marker": "o", "markersize": 6}
            yardstick = {"linewidth": 1.8, "linestyle": (0, (4, 2)), "zorder": 4}
            other = {"linewidth": 1.5, "marker": marker.get(name), "markersize": 4.5}
            style = own if name == "facenet_ext" else yardstick if name == "X @ X.T" else other
            panel.plot(*zip(*points, strict=True), color=colour.get(name, "black"), label=name, **style)
        sizes = sorted({row["size"][0] for row in rows})
        panel.set(xscale="log", yscale="log", title=title, xlabel="embeddings in the batch (N)", xticks=sizes)
        panel.set_xticklabels([f"{n:,}" for n in sizes], rotation=0 if len(sizes) < 8 else 30)
        panel.xaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter(formatter)
        panel.grid(True, which="major", color="#dddddd", linewidth=0.7)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(names), 8), frameon=False)
    figure.suptitle(
        f"Semi-hard triplet loss, K = {k} per class, D = {d}, {rows[0]['regime']} batch", fontsize=13, fontweight="bold"
    )
    figure.text(0.995, 0.005, headline(environment), fontsize=6, color="#888888", ha="right", va="bottom")
    try:
        replace_file(path, lambda temporary: figure.savefig(temporary, dpi=160))
    finally:
        plt.close(figure)
