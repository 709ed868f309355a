"""``offramp bench forms`` on the tiny model: what it reports, and when it does not."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from offramp.server.bench import forms
from offramp.server.bench.command import forms_parser
from offramp.server.bench.common import Refused
from offramp.server.engine.request import GenerationRequest
from offramp.server.text.grammars import Grammar

WORDS = ["--model", "tiny", "--concurrency", "1,2", "--rounds", "1", "--max-tokens", "1500"]


def test_forms_are_measured_beside_free_answers() -> None:
    report = forms.bench(forms_parser().parse_args(WORDS), "the command", lambda _: None)
    document = json.loads(report.output().splitlines()[-1])
    rows = document["rows"]
    assert [row["form"] for row in rows[:4]] == ["free", "any", "object", "unforced"]
    assert len(rows) == 2 * 2 * 4
    by_form = {(row["mode"], row["concurrency"], row["form"]): row for row in rows}
    for mode in ("off", "lossless"):
        for streams in (1, 2):
            assert by_form[mode, streams, "free"]["ratio"] == 1
            assert by_form[mode, streams, "unforced"]["forced"] == 0
            assert by_form[mode, streams, "object"]["forced"] > 0.05
            assert by_form[mode, streams, "object"]["passes"] < 1
            assert by_form[mode, streams, "object"]["per_s"] > 0
    assert by_form["off", 1, "unforced"]["passes"] == 1


def test_nothing_is_reported_where_drafts_change_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = forms._Load.run

    def run(load: forms._Load, grammar: Grammar | None, *rest: object) -> Sequence[object]:
        done = plain(load, grammar, *rest)  # type: ignore[arg-type]
        if isinstance(grammar, forms._Unforced):
            assert isinstance(done[0].request, GenerationRequest)
            done[0].token_ids[0] += 1
        return done

    monkeypatch.setattr(forms._Load, "run", run)
    with pytest.raises(Refused, match="forced text"):
        forms.bench(forms_parser().parse_args(WORDS), "the command", lambda _: None)


def test_nothing_is_reported_of_answers_that_are_cut_off() -> None:
    words = [*WORDS[:-1], "16"]
    with pytest.raises(Refused, match="more tokens than --max-tokens"):
        forms.bench(forms_parser().parse_args(words), "the command", lambda _: None)
