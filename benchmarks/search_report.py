"""The table and the picture of search_speed.py.

    python benchmarks/search_report.py RESULTS.json...

writes those of a run again, or of several runs on the same machine as one, search.md.
"""

from __future__ import annotations

import json
import math
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

WANTED = 0.99
TICKS = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
PERFECT = 0.9999  # Where the picture puts what is at least as good.
COLOURS = {
    "embedkit": "#d62728", "faiss": "#1f77b4", "hnswlib": "#2ca02c", "usearch": "#9467bd", "autofaiss": "#ff7f0e",
    "scikit-learn": "#7f7f7f",
}  # fmt: skip
STYLES = (("-", "o"), ("--", "s"), (":", "^"))


def write_report(report: dict[str, Any], folder: Path, name: str) -> None:
    """Write all points as JSON, a table as Markdown, and where matplotlib is installed a picture."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1, default=str) + "\n")
    picture = draw(report, folder / f"{name}.png")
    lines = [
        "# Search speed", "", f"{report['processor']}, {counted(report['threads'])}; the best of {report['rounds']} "
        "rounds, in which the peers took turns, each in a process of its own.", "",
        *([f"![queries a second against recall]({name}.png)", ""] if picture else ["No picture: no matplotlib.", ""]),
    ]  # fmt: skip
    for gallery in report["galleries"]:
        lines += [f"## {gallery['title']}, {gallery['dim']} wide", "", *table(gallery), ""]
        lines += [*[f"Left out: {line}" for line in gallery["skipped"]], "", *products(gallery), ""]
    lines += [
        "Recall@10 counts rows that are as near as the tenth nearest, over queries that are not in the gallery. Each "
        f"line shows the fastest setting that reached {WANTED}, or the one of the highest recall; 'at {WANTED}' reads "
        "the curve between two settings. Memory is what the process held of its own beyond the imported libraries, at "
        "most while it built and searched, and after building; files that it maps, such as the gallery, count only in "
        "brackets. embedkit searches a store that is there anyway, and its index comes on top of that; the others' "
        "indexes hold the vectors.", "",
    ]  # fmt: skip
    text = "\n".join(lines).replace("\n\n\n", "\n\n")
    (folder / f"{name}.md").write_text(text)
    print(f"\n{text}\nwritten to {folder}/{name}.md, .json{', .png' if picture else ''}")


def counted(threads: int) -> str:
    return f"{threads} thread{'s' if threads > 1 else ''}"


def rate(point: dict[str, Any]) -> float:
    return max(point["rates"])


def fastest(peer: dict[str, Any]) -> dict[str, Any]:
    """Return the fastest point that is good enough, or the best."""
    good = [point for point in peer["points"] if point["recall"] >= WANTED]
    return max(good, key=rate) if good else max(peer["points"], key=lambda point: point["recall"])


def front(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the points that no other one beats in both recall and speed, by rising recall."""
    best: list[dict[str, Any]] = []
    for point in sorted(points, key=lambda point: (-point["recall"], -rate(point))):
        if not best or rate(point) > rate(best[-1]):
            best.append(point)
    return best[::-1]


def between(points: list[dict[str, Any]]) -> float | None:
    """Return the queries a second at the recall wanted, on the straight line of log(rate) over log(1 - recall)."""
    curve = front(points)
    for low, high in pairwise(curve):
        if low["recall"] < WANTED <= high["recall"]:
            left, right = place(low["recall"]), place(high["recall"])
            share = (place(WANTED) - left) / (right - left)
            return math.exp((1 - share) * math.log(rate(low)) + share * math.log(rate(high)))
    return None


def place(recall: float) -> float:
    """Return where a recall lies on an axis that spreads what is nearly 1."""
    return -math.log10(1 - min(recall, PERFECT))


def table(gallery: dict[str, Any]) -> list[str]:
    peers = gallery["peers"]
    ranked = sorted(peers, key=lambda name: (fastest(peers[name])["recall"] < WANTED, -rate(fastest(peers[name]))))
    lines = [
        f"| peer | setting | recall@10 | queries/s | at {WANTED} | one query, ms | build, s | peak memory, MB | "
        "held, MB | index, MB | |", "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|---|",
    ]  # fmt: skip
    for name in ranked:
        peer, point = peers[name], fastest(peers[name])
        read = between(peer["points"])
        setting = f"{peer['parameter']} {point['value']}" if point["value"] else "its own"
        lines.append(
            f"| {name} | {setting} | {point['recall']:.4f} | {rate(point):,.0f} | {f'{read:,.0f}' if read else ''} | "
            f"{min(point['latencies']) * 1e3:.2f} | {peer['build_seconds']:.0f} | {peer['peak'] / 1e6:,.0f} "
            f"({peer['peak_with_files'] / 1e6:,.0f}) | {peer['held'] / 1e6:,.0f} | {peer['bytes'] / 1e6:,.0f} | "
            f"{peer['note']} |"
        )
    ours = peers.get("embedkit recall")
    others = {name: peer for name, peer in peers.items() if not name.startswith("embedkit")}
    good = [name for name in others if fastest(others[name])["recall"] >= WANTED]
    if ours and good:
        best = max(good, key=lambda name: between(others[name]["points"]) or rate(fastest(others[name])))
        theirs = between(others[best]["points"]) or rate(fastest(others[best]))
        chosen = fastest(ours)
        lines += ["", f"What embedkit chose has recall {chosen['recall']:.4f} and is {rate(chosen) / theirs:.2f} times "
                  f"as fast as the fastest peer at {WANTED}, {best}."]  # fmt: skip
    return lines


def products(gallery: dict[str, Any]) -> list[str]:
    """Tell exact search beside the matrix product that it cannot do without."""
    if not gallery["products"]:
        return []
    return [
        "| exact search, queries | embedkit, ms | matrix product alone, ms | ratio |", "|--:|--:|--:|--:|",
        *[f"| {row['queries']:,} | {row['embedkit'] * 1e3:,.1f} | {row['product'] * 1e3:,.1f} | "
          f"{row['embedkit'] / row['product']:.2f} |" for row in gallery["products"]],
    ]  # fmt: skip


def draw(report: dict[str, Any], path: Path) -> bool:
    """Draw a panel for each gallery; return whether there is something to draw with."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    galleries = report["galleries"]
    figure, panels = pyplot.subplots(1, len(galleries), figsize=(8 * len(galleries), 6.8), squeeze=False)
    for axes, gallery in zip(panels[0], galleries, strict=True):
        seen: dict[str, int] = {}
        for name, peer in gallery["peers"].items():
            draw_peer(axes, name, peer, seen)
        axes.axvline(place(WANTED), color="#888888", linewidth=1, zorder=0)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlim(place(0.4), place(PERFECT) + 0.15)
        axes.set_xticks([*map(place, TICKS), place(PERFECT)], [*(f"{tick:g}" for tick in TICKS), "≥0.9999"])
        axes.grid(color="#e4e4e4", which="major")
        axes.set(xlabel="recall@10", ylabel="queries a second, one batch", title=gallery["title"])
    figure.suptitle(f"Search speed, {report['processor']}, {counted(report['threads'])}: up and to the right is better")
    entries = dict(entry[::-1] for axes in panels[0] for entry in zip(*axes.get_legend_handles_labels(), strict=True))
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.legend(entries.values(), entries.keys(), ncols=4 * len(galleries) - 1, loc="lower center", fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def draw_peer(axes: Any, name: str, peer: dict[str, Any], seen: dict[str, int]) -> None:
    """Draw the curve of a peer, or the point of one without a parameter; `seen` counts the curves of a library."""
    library = name.split()[0]
    line, marker = STYLES[seen.get(library, 0) % len(STYLES)]
    seen[library] = seen.get(library, 0) + 1
    points = [point for point in front(peer["points"]) if point["recall"] >= 0.4]
    xs, ys = [place(point["recall"]) for point in points], [rate(point) for point in points]
    ours = library == "embedkit"
    if len(peer["points"]) == 1:
        line, marker = "", "*" if ours else "D"
    label = {"embedkit recall": "embedkit, recall=0.99", "embedkit exact": "embedkit, exact"}.get(name, name)
    axes.plot(
        xs, ys, linestyle=line or "none", marker=marker, color=COLOURS.get(library, "#000000"), label=label,
        linewidth=1.6, markersize=17 if ours else 5, markerfacecolor="white" if name == "embedkit exact" else None,
        zorder=5 if ours else 2,
    )  # fmt: skip


if __name__ == "__main__":
    paths = [Path(name) for name in sys.argv[1:]]
    reports = [json.loads(path.read_text()) for path in paths]
    galleries = [gallery for report in reports for gallery in report["galleries"]]
    write_report(reports[0] | {"galleries": galleries}, paths[0].parent, paths[0].stem if len(paths) == 1 else "search")
