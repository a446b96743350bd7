"""Rows as a table and as a picture."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def _number(row: Row, key: str, scale: float = 1.0, digits: int = 3) -> str:
    return f"{row[key] * scale:.{digits}g}" if key in row else ""


def _microseconds(row: Row, key: str) -> str:
    value = row.get(key)
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def table(rows: list[Row]) -> str:
    """Medians, their spread from the 10th to the 90th percentile, and the best; rates are those of the median."""
    from tabulate import tabulate

    headers = ("op", "case", "dtype", "by", "us", "+-", "best", "GB/s", "GFLOP/s", "G updates/s", "floor us", "share", "error")
    lines, notes = [], []
    for row in rows:
        by = row["implementation"] + (f" ({row['kernel']})" if "kernel" in row else "")
        if row["status"] != "ok":
            what, _, why = row["status"].partition(": ")
            lines.append((row["op"], row["case"], row["dtype"], by, what))
            notes.append(f"{what}: {why}")
            continue
        lines.append((
            row["op"], row["case"], row["dtype"], by, _microseconds(row, "median_us"), _microseconds(row, "spread_us"),
            _microseconds(row, "best_us"), _number(row, "gbps"), _number(row, "gflops"), _number(row, "updates_per_s", 1e-9),
            _microseconds(row, "floor_us"), f"{row['share_of_floor']:.0%}", f"{row['error']:.1e}",
        ))  # fmt: skip
    return "\n".join([tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True), *dict.fromkeys(notes)])


def plot(rows: list[Row], title: str, path: str) -> None:
    """A bar a row, on a logarithmic axis of microseconds, with a tick at the floor. Needs matplotlib."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if row["status"] == "ok"][::-1]
    figure = Figure(figsize=(11, 1.5 + 0.28 * max(len(shown), 1)), layout="constrained")
    axes = figure.add_subplot()
    labels = [f"{row['op']}  {row['case']}  {row['dtype']}  {row['implementation']}" for row in shown]
    places = range(len(shown))
    colours = ["tab:blue" if row["implementation"] == "statescan" else "tab:gray" for row in shown]
    axes.barh(places, [row["median_us"] for row in shown], color=colours)
    axes.plot([row["floor_us"] for row in shown], places, "k|", markersize=12, label="floor: copy bandwidth or matmul rate")
    axes.set_yticks(places, labels, fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("microseconds a call, median")
    axes.set_title(title)
    axes.margins(y=0.01)
    if shown:
        axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=150)
