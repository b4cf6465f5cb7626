"""
The board in the top-level README.md: its tables, and which pictures go with them.

leaderboard.py render writes both.
"""

import functools
import hashlib
import inspect
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from curves import curves_of, loss_range
from efficiency import compute_multiplier, data_efficiency, times
from pictures import COLORS, INK, draw_curve, draw_losses, draw_progress, figure, is_drawn, save_picture
from reading import (
    ROOT,
    Refused,
    all_records,
    mean_loss,
    read_json,
    read_order,
    read_tracks,
    record_folders,
    write_json,
)
from rerun import reproduction
from verify import Faults, verify_better, verify_record

BEGIN = "<!-- board: python records/leaderboard.py render -->"
END = "<!-- end of board -->"

# The columns of the tables: key of a row's cell, and heading.
RESULT = {
    "rank": "#",
    "loss": "val loss (nats per token)",
    "data": "data efficiency",
    "look_ups": "against the baseline with look-ups",
    "what": "description",
    "date": "date",
    "by": "contributors",
    "files": "files",
}
COST = {
    "rank": "#",
    "bpb": "bits per byte",
    "gap": "test gap",
    "compute": "compute multiplier",
    "params": "parameters",
    "use": "FLOPs per scored token",
    "seen": "tokens seen",
    "time": "training",
    "hardware": "hardware",
    "rerun": "reproduced",
}
PUBLISHED = {
    "track": "track",
    "limit": "limit",
    "loss": "val loss",
    "data": "data efficiency",
    "what": "description",
    "date": "date",
    "time": "time",
    "by": "contributors",
    "files": "files",
}
TOP = {
    "track": "track",
    "loss": "val loss",
    "data": "data efficiency",
    "look_ups": "against the baseline with look-ups",
    "what": "the best so far",
    "date": "date",
}
TOP_BEGIN = "<!-- top of the board: python records/leaderboard.py render -->"
TOP_END = "<!-- end of the top -->"
# Of a dataset, the curve of a baseline that was not trained on it.
NOT_MEASURED = {"points": []}

ELSEWHERE = "published elsewhere, not verified here"


def short(x):
    """1234567 -> 1.23M."""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= 0.9995 * size:
            return f"{x / size:.3g}{unit}"
    return f"{x:.3g}"


def duration(seconds):
    if seconds < 600:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def record_row(root, folder, record, curve, budget):
    """A record as cells of the tables; name, value and efficiency are for the pictures."""
    runs = record["runs"]

    def mean(what):
        return mean_loss(record, what)

    loss = mean("val_loss")
    loss_cell = f"{loss:.4f}"
    if len(runs) > 1:
        loss_cell += f" ({len(runs)} seeds)"
    # Adding zero keeps a gap that rounds to zero from being shown as -0.0000.
    gap = round(mean("test_loss") - loss, 4) + 0.0
    efficiency = data_efficiency(curve, loss, budget)
    link = folder.relative_to(root).as_posix()
    return {
        "loss": loss_cell,
        "bpb": f"{mean('val_bpb'):.4f}",
        "data": times(efficiency),
        "look_ups": times(data_efficiency(curve.get("with_look_ups", NOT_MEASURED), loss, budget)),
        "compute": times(compute_multiplier(curve, loss, mean("train_flops"))),
        "gap": f"{gap:+.4f}",
        "params": short(mean("parameters")),
        "use": short(mean("score_flops_per_token")),
        "seen": short(mean("tokens_seen")),
        "time": duration(mean("train_seconds")),
        "hardware": runs[0]["hardware"],
        "rerun": reproduction(folder),
        "what": record["description"],
        "date": record["date"],
        "by": ", ".join(record["contributors"]),
        "files": f"[note]({link}/README.md) [log]({link}/{runs[0]['log']})",
        "value": loss,
        "efficiency": efficiency,
        "name": folder.name,
    }


def reference_row(reference, curve, budget):
    """A result that was published elsewhere, as cells of the tables."""
    loss = reference["val_loss"]
    return {
        "loss": f"{loss:.3f}",
        "data": times(data_efficiency(curve, loss, budget)),
        "what": f"*{reference['what']}*",
        "date": reference["date"],
        "time": reference["time"],
        "by": reference["by"],
        "files": f"[source]({reference['url']})",
        "value": loss,
    }


def board_rows(root, tracks, baselines, track):
    """The track's records, which have a rank, and the published results, best first; each a dict of cells."""
    rules = tracks["tracks"][track]
    budget = tracks["datasets"][rules["dataset"]]["train_tokens"]
    curve = baselines[rules["dataset"]]
    rows = [record_row(root, folder, record, curve, budget) for folder, record in all_records(root, track)]
    rows += [reference_row(reference, curve, budget) for reference in rules.get("references", [])]
    rows.sort(key=lambda row: row["value"])
    records = [row for row in rows if "name" in row]
    for rank, row in enumerate(records, 1):
        row["rank"] = str(rank)
    return rows


def table(columns, rows):
    """Lines of Markdown, one for each row, and an empty one.

    The comparison with the second baseline has a column where that is measured.
    """
    shown = {}
    for name, heading in columns.items():
        if name != "look_ups" or any(row.get(name) for row in rows):
            shown[name] = heading
    lines = ["| " + " | ".join(shown.values()) + " |", "|" + " --- |" * len(shown)]
    for row in rows:
        cells = [row.get(name, "") for name in shown]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


# The columns of a track's own page.
NOTES = {"rank": "#", "loss": "val loss", "note": "note", "date": "date", "by": "contributors"}


def picture(track, kind, words, at=""):
    """A line of Markdown that shows a track's picture. at: the way from the page to the repository's root."""
    light = f"{at}records/pictures/{track}_{kind}_light.svg"
    dark = f"{at}records/pictures/{track}_{kind}_dark.svg"
    source = f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
    return f'<picture>{source}<img alt="{track}: {words}" src="{light}"></picture>'


def track_section(track, title, rows, overtaken):
    """Lines about a track that has records."""
    records = [row for row in rows if "name" in row]
    for row in rows:
        if "name" not in row:
            row["what"] += f" ({ELSEWHERE})"
    lines = [f"### {track}", "", f"{title}.", "", *table(RESULT, rows)]
    if overtaken:
        names = ", ".join(f"[{name}](records/{name}/README.md)" for name in overtaken)
        lines += [f"Overtaken, for a better record was merged first: {names}.", ""]
    lines += ["Cost of each record:", "", *table(COST, records)]
    lines += [picture(track, "progress", "loss and data efficiency, record by record"), ""]
    baseline = "the baseline's loss on more tokens, and the records at the budget"
    lines += [picture(track, "curve", baseline), ""]
    return [*lines, f"[Notes and training curves of these records](records/{track}/README.md)", ""]


def track_page(track, title, rows):
    """The page of a track's records: their training curves, and the way to their notes."""
    records = []
    for row in rows:
        if "name" in row:
            records.append(row | {"note": f"[{row['what']}]({row['name']}/README.md)"})
    words = "training and validation loss over the epochs of the best records"
    lines = [f"# {track}", "", f"{title}. [The board](../../README.md#records) has all figures.", ""]
    lines += [picture(track, "losses", words, at="../../"), "", *table(NOTES, records)]
    return "\n".join(lines)


def board_and_pages(root):
    """The text between the markers of README.md, the pictures to draw, {path: (function, data, theme)}, and
    the pages of the tracks with records, {path: text}.

    A track with records has a section. Those for which there are only results published elsewhere share a
    table, one for each kind of data. A track with neither is a line.
    """
    tracks = read_tracks(root)
    baselines = read_json(root / "records" / "baselines.json")
    sections = []
    pictures = {}
    pages = {}
    published = {}
    empty = []
    for track, rules in tracks["tracks"].items():
        rows = board_rows(root, tracks, baselines, track)
        records = [row for row in rows if "name" in row]
        if records:
            by_loss = sorted(records, key=lambda row: -row["value"])
            drawn = {
                "records": [(row["name"], row["value"], row["efficiency"]) for row in by_loss],
                "track": track,
                "budget": tracks["datasets"][rules["dataset"]]["train_tokens"],
                "points": baselines[rules["dataset"]]["points"],
                "look_ups": baselines[rules["dataset"]].get("with_look_ups", NOT_MEASURED)["points"],
            }
            # As many as there are colors: the best.
            best = [row["name"] for row in records[: len(COLORS["light"])]]
            curves = [curves_of(root / "records" / track / name) for name in best]
            losses = {"curves": curves, "range": loss_range(curves)}
            overtaken = [name for name in read_order(root)["overtaken"] if name.startswith(f"{track}/")]
            sections += track_section(track, rules["title"], rows, overtaken)
            pages[f"records/{track}/README.md"] = track_page(track, rules["title"], rows)
            for kind, draw, shown in (
                ("progress", draw_progress, drawn),
                ("curve", draw_curve, drawn),
                ("losses", draw_losses, losses),
            ):
                for theme in INK:
                    pictures[f"records/pictures/{track}_{kind}_{theme}.svg"] = (draw, shown, theme)
        elif rows:
            data, _, limit = rules["title"].partition(", ")
            for row in rows:
                row |= {"track": track, "limit": limit}
            published.setdefault(data, {})[track] = rows
        else:
            empty += [f"**{track}**: {rules['title']}. No record yet.", ""]
    for data, by_track in published.items():
        rows = [row for rows in by_track.values() for row in rows]
        sections += [f"### {', '.join(by_track)}", ""]
        sections += [f"{data}. No record here yet; these results are {ELSEWHERE}.", ""]
        sections += table(PUBLISHED, rows)
    return "\n".join([*sections, *empty]), pictures, pages


def between(page, begin, end, text):
    """The page with `text` between two of its marker lines."""
    head = page.split(begin)[0]
    tail = page.split(end)[1]
    return f"{head}{begin}\n{text}\n{end}{tail}"


def top_of_board(root):
    """Lines of a short table: each track's standing record, and the best published result of `limited`."""
    tracks = read_tracks(root)
    baselines = read_json(root / "records" / "baselines.json")
    rows = []
    for track in tracks["tracks"]:
        for row in board_rows(root, tracks, baselines, track)[:1]:
            if "name" in row or track == "limited":
                rows.append(row | {"track": track})
    return table(TOP, rows)[:-1]


def settled_order(root):
    """records/order.json with the records that are new on main, in the order in which they were submitted.

    A new one that does not beat the standing record, for another was merged first, is overtaken: main repairs
    itself. Refused where a record has any other fault."""
    order = read_order(root)
    tracks = read_tracks(root)
    new = []
    for folder in record_folders(root):
        listed = folder.name in order["merged"].get(folder.parent.name, [])
        name = f"{folder.parent.name}/{folder.name}"
        is_new = not listed and name not in order["overtaken"]
        for fault in verify_record(folder, root, better=not is_new):
            raise Refused(f"the board holds only what verifies: {fault}")
        if is_new:
            new.append((read_json(folder / "record.json")["submitted"], folder))
    for _, folder in sorted(new):
        faults = Faults(folder, root)
        verify_better(faults, folder, tracks, root)
        if faults:
            order["overtaken"].append(f"{folder.parent.name}/{folder.name}")
        else:
            order["merged"].setdefault(folder.parent.name, []).append(folder.name)
    return order


def stale(root):
    """What render would change once the order is settled: {path: function that writes or removes it}."""
    changes = {}
    text, pictures, pages = board_and_pages(root)

    readme = root / "README.md"
    before = readme.read_text()
    if before.count(BEGIN) != 1 or before.count(END) != 1:
        raise Refused(f"{readme}: lacks the lines {BEGIN} and {END}, or has them twice")
    after = between(before, BEGIN, END, text)
    if TOP_BEGIN in before:
        after = between(after, TOP_BEGIN, TOP_END, "\n".join(top_of_board(root)))
    if after != before:
        changes[readme] = functools.partial(readme.write_text, after)

    for name, page in pages.items():
        path = root / name
        if not path.exists() or path.read_text() != page:
            changes[path] = functools.partial(path.write_text, page)

    for name, (draw, data, theme) in pictures.items():
        # matplotlib's output differs between versions, so a picture is known by what it was drawn from, not
        # by its bytes.
        source = inspect.getsource(draw) + inspect.getsource(figure)
        content = json.dumps([data, theme, INK]) + source
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        path = root / name
        if not path.exists() or digest not in path.read_text()[:2000]:
            changes[path] = functools.partial(draw_into, path, draw, data, theme, digest)
    for path in (root / "records" / "pictures").glob("*.svg"):
        if path.relative_to(root).as_posix() not in pictures and is_drawn(path):
            changes[path] = path.unlink
    return changes


def draw_into(path, draw, data, theme, digest):
    save_picture(path, draw(data, theme), digest)


def render(root, check=False):
    """Write what is stale, or only find it. Returns the paths. Refused where a record does not verify."""
    order = settled_order(root)
    found = []
    if order != read_order(root):
        # The board shows the order, so this is written before the rest is drawn.
        path = root / "records" / "order.json"
        found.append(path)
        if check:
            return found
        write_json(path, order)
    for path, write in stale(root).items():
        found.append(path)
        if not check:
            write()
    return found


def render_command(args):
    found = render(ROOT, args.check)
    what = "stale; run python records/leaderboard.py render" if args.check else "written"
    for path in found:
        print(f"{os.path.relpath(path)}: {what}")
    if not found:
        print("the board is up to date")
    return bool(found) and args.check
