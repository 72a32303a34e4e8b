"""Write the scores of a run of `kling-eval world`, and the model's vocabulary, into its model card.

kling-eval card out/eval                            # into kling/assets/README.md
kling-eval card out/eval --into runs/mine/README.md

The card keeps its text: only the parts between its marks `<!-- scores -->` and `<!-- vocabulary -->` and their ends are replaced.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kling_programs.eval.cases import TABLE
from kling_programs.eval.common import as_expected, found_only, read_scores, write_text
from kling_programs.eval.options import card as parse

from kling.data.world.captions import vocabulary_table
from kling.errors import UserError
from kling.metrics.report import Summary, markdown, summarise
from kling.runtime.files import read_text


def main(argv: list[str]) -> None:
    args = parse(argv)
    card, scores = Path(args.into), Path(args.run) / "scores.json"
    report = read_scores(scores)
    text = read_text(card)
    if report.get("suite") != "world":
        raise UserError(f"{scores} is of the suite {report.get('suite')}: a card takes the scores of kling-eval world")
    if lacks := [name for name in ("protocol", "n", "scores") if name not in report]:
        raise UserError(f"{scores} has no {lacks[0]}: write the run again")
    with as_expected(scores):
        text = between(text, "scores", score_lines(report), card)
    write_text(card, between(text, "vocabulary", vocabulary_table(), card))
    print(card)


def score_lines(report: dict[str, Any]) -> str:
    """The table without the controls' columns, which scores.md has, after a line about how it was measured."""
    facts = [f"protocol {report['protocol']}", f"n = {report['n']}", f"`{report.get('command', 'kling-eval world')}`"]
    return " · ".join(facts) + "; bold = reached\n\n" + markdown(TABLE, report["scores"] | cameras(report), {})


def cameras(report: dict[str, Any]) -> dict[str, Summary]:
    """The scores of the tasks that look at a camera, by task, over the clips in which it was found."""
    rows = report.get("rows", {}).get("model", {})
    return {task: summarise([found_only(row) for row in rows[task]]) for task in ("camera", "words", "words-read") if task in rows}


def between(text: str, mark: str, lines: str, card: Path) -> str:
    """The text with `lines` between two marks. Raises `UserError` if the marks are missing."""
    start, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    before, found, rest = text.partition(start)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise UserError(f"{card} has no marks for the {mark}: put {start} and {end} where it belongs")
    return f"{before}{start}\n{lines}\n{end}{after}"
