"""The selector's choice against every plan it could have made, over a grid of conditions, and how well it predicts.

    python benchmarks/selector.py [--data FOLDER] [--prompts 24] [--runs 6] [--profile wifi lte …] [--pace 0 20 50 100]
    python benchmarks/selector.py --real [--keep FILE] …          over netem, as root; see selector_real.py

The grid runs in virtual time (virtual_*.py): links by profile with jitter, loss and slow start, passes drawn from what
was measured on this machine, drafts that the real pair accepted or not. A paced full model stands for a larger one: a
pass takes so long, for up to 64 positions; the phone's layers take their share of it, times four where the phone has a
quarter of the speed. The agent sees smoothed measurements only. "Loaded" is a batch with 8 other answers in it. All
plans but those of the second table give the same text.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import selector_real
import torch
from netlab import PROFILES, TINY, add_flags, at, kept
from rich.console import Console
from rich.table import Table
from selector_grid import POLICIES, Row, cells, rows_of
from speeds import measured
from tqdm import tqdm
from traces import recorded
from virtual_view import HELD, Lessons

from edge_agent.cost import Pair
from split_model.runner import Runner
from split_model.source import find_model

FULL = "assistant-20m"
OTHERS = 8
EARLIER = 12  # answers in a cell before those that are measured
LONGEST = 64  # tokens of an answer
KINDS = ("cloud", "cloud, drafts there", "split", "speculative", "speculative over a split")
COLOURS = ("#4477aa", "#66ccee", "#ccbb44", "#ee6677", "#aa3377")


def simulated(given: argparse.Namespace) -> Iterator[Row]:
    tiny, full = Runner(TINY), Runner(FULL)
    traces = recorded(tiny, full, given.data, 2 * given.prompts, LONGEST)
    today, yesterday = traces[: given.prompts], traces[given.prompts :]
    lessons = Lessons.of(find_model(TINY), yesterday or traces)
    speeds = measured(tiny.model, full.model, (0, OTHERS))
    pair = Pair(tiny.model.config, full.model.config, HELD)
    every = list(cells(given.profile, [pace / 1e3 for pace in given.pace], (1.0, 4.0), (0, OTHERS)))
    rows = partial(rows_of, speeds=speeds, pair=pair, lessons=lessons, traces=today,
                   earlier=yesterday[:EARLIER], runs=given.runs, seed=given.seed)  # fmt: skip
    with ProcessPoolExecutor(given.jobs, get_context("spawn")) as pool:
        for found in tqdm(pool.map(rows, every), total=len(every), disable=None):
            yield from found


def regrets(rows: Sequence[Row]) -> Table:
    made = Table(title="Seconds an answer over those of the oracle, -1; equal text")
    made.add_column("cloud, full model")
    for column in ("cells", "oracle's own", *POLICIES, "auto worse than cloud by"):
        made.add_column(column, justify="right")
    for drafts in (False, True):
        for pace in (*sorted({row.pace_s for row in rows}), None):
            some = [row for row in rows if row.drafts_in_cloud == drafts and pace in (None, row.pace_s)]
            own = statistics.fmean(row.oracle_s / row.hindsight_s - 1 for row in some)
            means = [statistics.fmean(row.policies[name] / row.oracle_s - 1 for row in some) for name in POLICIES]
            worst = max(row.policies["auto"] / row.policies["always cloud"] - 1 for row in some)
            name = "all" if pace is None else f"{1e3 * pace:g} ms" if pace else "as it is"
            made.add_row(f"{'with' if drafts else 'without'} a tiny model, {name}", str(len(some)), f"{own:.1%}",
                         *(f"{mean:.1%}" for mean in means), f"{worst:+.1%}")  # fmt: skip
        made.add_section()
    return made


def any_text(rows: Sequence[Row]) -> Table:
    made = Table(
        title="Where predicted agreement of 0.8 will do: mean seconds an answer, and tokens that are the full's"
    )
    names = list(rows[0].any_s)
    for column in ("phone", *names):
        made.add_column(column, justify="right")
    for slower in sorted({row.slower for row in rows}):
        some = [row for row in rows if row.slower == slower]
        cells = [(statistics.fmean(row.any_s[name] for row in some), statistics.fmean(row.agreed[name] for row in some))
                 for name in names]  # fmt: skip
        made.add_row("full" if slower == 1 else f"1/{slower:g}", *(f"{s:.2f} s, {share:.2f}" for s, share in cells))
    return made


def errors(rows: Sequence[Row]) -> Table:
    made = Table(title="Prediction against simulation, at the answer's true length")
    for column in ("plan", "answers", "median of |error|", "p90 of it", "median error"):
        made.add_column(column, justify="right")
    pools: dict[str, list[float]] = {}
    for row in rows:
        for name, found in row.errors.items():
            pools.setdefault(name, []).extend(found)
    for name, pool in sorted(pools.items()):
        sizes = [abs(one) for one in pool]
        made.add_row(name, str(len(pool)), f"{at(sizes, 0.5):.1%}", f"{at(sizes, 0.9):.1%}", f"{at(pool, 0.5):+.1%}")
    return made


def gains(rows: Sequence[Row]) -> str:
    """Where another plan is much better than the cloud, what auto makes of it."""
    much = [row for row in rows if row.policies["always cloud"] / row.hindsight_s >= 1.2]
    made = [row.policies["always cloud"] / row.policies["auto"] for row in much]
    enough = sum(one >= 1.1 for one in made)
    return (f"in {len(much)} of {len(rows)} cells a plan is 1.2x as fast as the cloud or more; auto is 1.1x or more "
            f"in {enough} of them (least {min(made, default=1):.2f}x)")  # fmt: skip


def plot(rows: Sequence[Row], file: Path) -> None:
    """Who wins where: the oracle's most frequent plan and its gain over the cloud; a ring where auto chose another."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    profiles = [name for name in PROFILES if any(row.profile == name for row in rows)]
    lines = list(dict.fromkeys((row.pace_s, row.slower, row.others) for row in rows))
    figure = Figure(figsize=(14, 2 + 0.42 * len(lines)), layout="constrained")
    for axis, drafts in zip(figure.subplots(1, 2, sharey=True), (False, True), strict=True):
        for row in (one for one in rows if one.drafts_in_cloud == drafts):
            x, y = profiles.index(row.profile), lines.index((row.pace_s, row.slower, row.others))
            best, auto = (max(counts, key=counts.__getitem__) for counts in (row.wins, row.chosen))
            gain, made = (row.policies["always cloud"] / one for one in (row.hindsight_s, row.policies["auto"]))
            axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=COLOURS[KINDS.index(best)], edgecolor="white"))
            axis.text(x, y, f"{gain:.2f}\n{made:.2f}", ha="center", va="center", fontsize=7, color="black")
            if auto != best:
                axis.plot(x + 0.36, y - 0.26, "o", markersize=6, color=COLOURS[KINDS.index(auto)], markeredgecolor="k")
        axis.set(xlim=(-0.5, len(profiles) - 0.5), ylim=(len(lines) - 0.5, -0.5), xticks=range(len(profiles)))
        axis.set_xticklabels(profiles, rotation=30)
        axis.set_title(f"a cloud {'with' if drafts else 'without'} a tiny model")
        axis.set_yticks(range(len(lines)))
        axis.set_yticklabels(
            [
                f"{f'{1e3 * pace:g} ms' if pace else 'as it is'}, phone {'full' if slower == 1 else f'1/{slower:g}'}, "
                f"{'loaded' if others else 'idle'}"
                for pace, slower, others in lines
            ]
        )
    handles = [Patch(color=colour, label=kind) for colour, kind in zip(COLOURS, KINDS, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(KINDS),
                  title="simulated: the best plan of most answers; numbers: times as fast as the cloud alone, the best "
                        "plan and below it auto; a dot where auto chose another plan in most")  # fmt: skip
    figure.savefig(file, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description="The selector against every plan it could have made.")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="of dialogues, whose dev split is asked")
    parser.add_argument("--profile", nargs="+", choices=PROFILES, default=list(PROFILES))
    parser.add_argument("--pace", nargs="+", type=float, default=[0, 20, 50, 100], metavar="MS",
                        help="of a pass of the full model; 0: as it is")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that simulate")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--runs", type=int, help="of each plan for each prompt (6; with --real 5 of each plan)")
    add_flags(parser)
    selector_real.add_flags(parser)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.real:
        selector_real.main(given)
        return
    given.runs = given.runs or 6
    began = time.monotonic()
    rows = [Row(**one) for one in kept(given.keep, list(simulated(given)))]
    console = Console(width=150)
    for table in (regrets(rows), any_text(rows), errors(rows)):
        console.print(table)
    print(gains(rows))
    print(f"simulated from passes measured on {platform.machine()}, one thread, torch {torch.__version__}; "
          f"{given.prompts} prompts, {given.runs} runs of each plan, {time.monotonic() - began:.0f} s")  # fmt: skip
    if given.plot:
        plot(rows, given.plot)


if __name__ == "__main__":
    main()
