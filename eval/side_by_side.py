"""A blind test: a page that shows people pairs of videos with the same name, in random order, and the win rate of their choices.

    kling-eval side-by-side made-a/ made-b/ --votes out/votes.sqlite            # opens a page (Gradio); --port N, --share
    kling-eval side-by-side made-a/ made-b/ --votes out/votes.sqlite --result   # prints the win rate, opens nothing

Only names that exist in both folders are shown. Each voter sees every pair once, in an order of their own, and nothing on the page reveals
the folder (videos are copied to meaningless names). Ties count half for each. Votes are stored in SQLite as they come.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import sqlite3
import tempfile
import time
import uuid
from contextlib import closing
from pathlib import Path
from typing import Any

from kling_programs.eval.common import VIDEOS, files
from kling_programs.eval.options import side_by_side as parse

from kling.data.video import VideoWriter, probe, stream_video
from kling.errors import UserError
from kling.metrics.stats import wilson
from kling.runtime.files import head, writing

CHOICES = {"left": "The left one", "tie": "No difference", "right": "The right one"}


class Votes:
    """The votes on one pair of folders in a SQLite file: who, when, which name, and which side was chosen."""

    def __init__(self, path: Path, a: str, b: str) -> None:
        self.path, self.a, self.b = path, a, b
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with closing(self._open()) as base, base:
                base.execute("create table if not exists votes (voter text, time real, a text, b text, name text, winner text, left text)")
        except sqlite3.DatabaseError as error:
            raise UserError(f"{path} cannot hold votes ({error}): give another file with --votes") from None

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=30)

    def add(self, voter: str, name: str, winner: str, left: str) -> None:
        """winner and left are "a", "b" or, for the winner, "tie"."""
        with closing(self._open()) as base, base:
            base.execute("insert into votes values (?, ?, ?, ?, ?, ?, ?)", (voter, time.time(), self.a, self.b, name, winner, left))

    def seen(self, voter: str) -> set[str]:
        with closing(self._open()) as base:
            return {name for (name,) in base.execute("select name from votes where voter = ? and a = ? and b = ?", (voter, self.a, self.b))}

    def pairs(self) -> list[tuple[str, str]]:
        """The folders that there are votes on, as they were given."""
        with closing(self._open()) as base:
            return base.execute("select distinct a, b from votes").fetchall()

    def counts(self) -> dict[str, int]:
        with closing(self._open()) as base:
            rows = dict(base.execute("select winner, count(*) from votes where a = ? and b = ? group by winner", (self.a, self.b)))
        return {winner: rows.get(winner, 0) for winner in ("a", "b", "tie")}


def win_rate(counts: dict[str, int]) -> tuple[float, float, float]:
    """(rate, low, high) of A with a 95 % Wilson interval; a tie is half a win."""
    n = sum(counts.values())
    wins = counts["a"] + counts["tie"] / 2
    return (wins / n if n else float("nan"), *wilson(wins, n))


def pairs(a: str, b: str) -> dict[str, dict[str, Path]]:
    """Names that exist in both folders, with the two files."""
    left, right = files(a, VIDEOS, "videos"), files(b, VIDEOS, "videos")
    both = {name: {"a": left[name], "b": right[name]} for name in left if name in right}
    if not both:
        raise UserError(f"{a} and {b} share no file name: give videos of one prompt the same name")
    return both


def arrangement(voter: str, names: list[str]) -> list[tuple[str, str]]:
    """The order in which a voter sees the pairs, and which folder is on the left: fixed by the voter, balanced over voters."""
    rng = random.Random(hashlib.sha256(voter.encode()).digest())
    return [(name, rng.choice("ab")) for name in rng.sample(sorted(names), len(names))]


def page(both: dict[str, dict[str, Path]], votes: Votes) -> Any:
    """The Gradio page. Raises `UserError` if gradio is missing."""
    try:
        import gradio as gr
    except ImportError:
        raise UserError("the page needs gradio: pip install 'kling[demo]'") from None
    blind = Path(tempfile.mkdtemp(prefix="kling-blind-"))
    copies = {}
    for name, sides in both.items():
        for side, path in sides.items():
            copies[name, side] = str(playable(path, blind))

    def show(voter: str) -> list[Any]:
        seen = votes.seen(voter)
        left = [(name, side) for name, side in arrangement(voter, list(both)) if name not in seen]
        done = f"{len(seen)} of {len(both)}"
        if not left:
            return [None, None, f"{done}: that was all, thank you."]
        name, side = left[0]
        return [copies[name, side], copies[name, "b" if side == "a" else "a"], done]

    def vote(voter: str, choice: str) -> list[Any]:
        left = [(name, side) for name, side in arrangement(voter, list(both)) if name not in votes.seen(voter)]
        if left:
            name, side = left[0]
            votes.add(voter, name, chosen(choice, side), side)
        return show(voter)

    with gr.Blocks(title="Which is better?") as blocks:
        voter = gr.State(lambda: uuid.uuid4().hex)
        gr.Markdown("### Which video is better?")
        with gr.Row():
            left, right = gr.Video(label="left", autoplay=True, loop=True), gr.Video(label="right", autoplay=True, loop=True)
        with gr.Row():
            buttons = {choice: gr.Button(text) for choice, text in CHOICES.items()}
        done = gr.Markdown()
        blocks.load(show, voter, [left, right, done])
        for choice, button in buttons.items():
            button.click(lambda who, choice=choice: vote(who, choice), voter, [left, right, done])
    return blocks


def playable(path: Path, folder: Path) -> Path:
    """A copy of a video without its name, as an mp4 where browsers would not play it (GIF, AVI, …)."""
    target = folder / uuid.uuid4().hex
    if probe(path).plays_in_browsers:
        return Path(shutil.copy(path, target.with_suffix(path.suffix)))
    with VideoWriter(target.with_suffix(".mp4"), probe(path).fps) as out:
        for frame in stream_video(path):
            H, W = frame.shape[:2]
            out.write(frame[: H - H % 2, : W - W % 2])
    return target.with_suffix(".mp4")


def chosen(choice: str, left: str) -> str:
    """The folder of the chosen side."""
    if choice == "tie":
        return "tie"
    return left if choice == "left" else ("b" if left == "a" else "a")


def main(argv: list[str]) -> None:
    args = parse(argv)
    both = pairs(args.a, args.b)
    if args.result:
        head(Path(args.votes))
    votes = Votes(Path(args.votes), args.a, args.b)
    if not args.result:
        shown = page(both, votes)
        try:
            shown.launch(server_port=args.port, share=args.share)
        except OSError as error:
            raise UserError(f"the page cannot be opened ({error}): choose another --port") from None
    counts = votes.counts()
    rate, low, high = win_rate(counts)
    if not sum(counts.values()):
        others = "".join(f"; there are votes on {a} against {b}" for a, b in votes.pairs())
        print(f"no votes yet on {args.a} against {args.b}{others}")
        return
    print(f"{args.a} wins {100 * rate:.1f} % ({100 * low:.1f} to {100 * high:.1f}): {counts['a']} to {counts['b']}, {counts['tie']} ties")
