"""The report, its charts and its words: structure, escaping, and numbers equal to the summary's."""

import dataclasses
import itertools
import math
import os
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from graftlens import reports, stats
from graftlens.metrics import averaged
from graftlens.stats.chance import few_answers
from graftlens.viz import bars, examples, quantities, reading, report, text, theme

RULES = {"PRE": "", "SFT": "sft @ all", "FE+LT": "sft @ first_entity + last"}
RULES |= {"(FE+LT)^C": "sft @ not(first_entity + last)"}


def make_table(strength, *, templates=("headline", "award"), n=12, not_run=()):
    """Graft g has rank 1 for the first strength[g]·n prompts of a template, 100 for the others."""
    rows = []
    for number, template in enumerate(templates):
        for i, (graft, share) in itertools.product(range(n), strength.items()):
            rank = 1.0 if i < share * n else 100.0
            row = {"prompt": number * n + i, "graft": graft, "rule": RULES.get(graft, graft)}
            row |= {"template": template, "text": f"{i} <b>bold</b> & co", "answer": " Ann <i>"}
            row |= {"rank": rank, "prob": 0.5, "logprob": -rank / 10 - (i % 3) / 10}
            row |= {"answer_logprob": -rank / 5, "logit_diff": np.nan, "reason": None}
            if (graft, i) in not_run:
                row |= dict.fromkeys(averaged(), np.nan)
                row["reason"] = "span <first_entity> not found"
            rows.append(row)
    return pd.DataFrame(rows)


SUFFICIENT = {"PRE": 0.0, "SFT": 1.0, "FE+LT": 0.92, "(FE+LT)^C": 0.05}
NOT_SUFFICIENT = {"PRE": 0.0, "SFT": 1.0, "FE+LT": 0.1, "(FE+LT)^C": 0.9}
NEVER_LEARNT = dict.fromkeys(SUFFICIENT, 0.0)

TOKENS = ("<bos>", "Ann", " <b>", "\n", "is\r", "</script>", "")
EXAMPLE = examples.Example(
    title="prompt <1>",
    tokens=TOKENS,
    grafted={"PRE": (False,) * 7, "FE+LT": (False, True, True, False, False, True, False)},
    answer=" Lena <x>",
    target=" Lena",
    predictions={"FE+LT": ((" Lena", 0.875), ("</script><img src=x>", 0.0625))},
)


class Page(HTMLParser):
    """Collects what the tests ask about a page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.cells, self.stack, self.words = [], [], [], []
        self.scripts, self.marks, self.headings = [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "img", "link", "input"):
            self.stack.append(tag)
        if tag == "script":
            self.scripts.append("")
        if tag == "mark":
            self.marks.append("")
        if tag in ("h1", "h2", "h3", "h4"):
            self.headings.append((tag, ""))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        inside = self.stack[-1] if self.stack else ""
        if inside == "script":
            self.scripts[-1] += data
        elif inside != "style":
            self.words.append(data)
        if "mark" in self.stack:
            self.marks[-1] += data
        if inside in ("h1", "h2", "h3", "h4"):
            self.headings[-1] = (inside, self.headings[-1][1] + data)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    table = make_table(SUFFICIENT, not_run={("FE+LT", 3)})
    summary = stats.summarise(table, resamples=500)
    path = tmp_path_factory.mktemp("report") / "deeper" / "report.html"
    returned = report.write_report(
        path,
        title="Films & <facts>",
        summary=summary,
        table=table,
        examples=[EXAMPLE],
        provenance={
            "command": "graftlens sweep <x>",
            "seed": 0,
            "models": {"pre": {"fingerprint": "3f8a"}, "sft": None},
            "config": {"resume": False, "ks": [1, 5], "grafts": [{"name": "FE"}], "none": []},
        },
        max_prompts=20,
    )
    assert returned == path
    return path, summary, Page(path)


def test_a_report_of_several_strengths_has_their_dose_response(tmp_path):
    dosed = {f"{s:g}*sft @ last : mlp": s / 3 for s in (0.5, 2)}
    table = make_table({"PRE": 0, "SFT": 1} | dosed)
    path = report.write_report(
        tmp_path / "report.html",
        title="Doses",
        summary=stats.summarise(table, resamples=50),
        table=table,
        provenance={},
    )
    page = " ".join(Page(path).words)
    for template in ("headline", "award"):
        assert (
            page.count(f"{template}: Recovery of log-probability (0 = PRE, 1 = SFT) against") == 1
        )


# --- the page --------------------------------------------------------------------------------


def test_the_page_is_whole_and_alone_in_its_folder(written):
    path, _, page = written
    assert page.stack == []
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    assert [text for tag, text in page.headings if tag == "h1"] == ["Films & <facts>"]
    assert [text for tag, text in page.headings if tag == "h2"] == [
        "Charts",
        "What the names and numbers mean",
        "What the numbers say",
        "Numbers",
        "Example prompts",
        "Prompt by prompt",
        "The grafts",
        "What was run and how",
    ]
    labels = {attrs["aria-labelledby"] for tag, attrs in page.tags if tag == "section"}
    assert labels == {attrs["id"] for tag, attrs in page.tags if tag == "h2"}


def test_the_page_loads_nothing(written):
    path, _, page = written
    for tag, attrs in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base"), tag
        assert not {"src", "srcset", "action", "data"} & attrs.keys(), (tag, attrs)
        assert attrs.get("href", "#").startswith("#"), (tag, attrs)
    source = path.read_text(encoding="utf-8")
    styles = "".join(re.findall(r"<style>(.*?)</style>", source, flags=re.DOTALL))
    assert "url(" not in styles
    assert "@import" not in styles
    policy = next(a["content"] for t, a in page.tags if "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy


def test_plotly_is_inlined_once_without_its_cloud_button(written):
    _, _, page = written
    big = [script for script in page.scripts if len(script) > 1_000_000]
    assert len(big) == 1
    own = page.scripts[-1]
    assert "showSendToCloud: false" in own
    assert 'plotlyServerURL: ""' in own
    assert '"sendChartToCloud"' in own


def test_numbers_on_the_page_are_those_of_the_summary(written):
    _, summary, page = written
    cells = [attrs for tag, attrs in page.tags if tag == "td" and "data-metric" in attrs]
    names = quantities.measured(summary)
    assert len(cells) == len(summary) * len(names)
    for number, (_, row) in enumerate(summary.iterrows()):
        chunk = cells[number * len(names) : (number + 1) * len(names)]
        for name, cell in zip(names, chunk, strict=True):
            assert cell["data-metric"] == name
            for end, column in (("value", name), ("low", f"{name}_low"), ("high", f"{name}_high")):
                shown, wanted = float(cell[f"data-{end}"]), float(row[column])
                assert shown == wanted or (math.isnan(shown) and math.isnan(wanted))
    words = " ".join("".join(page.words).split())
    row = summary[(summary["template"] == "award") & (summary["graft"] == "FE+LT")].iloc[0]
    shown = text.written(quantities.of_summary(summary, "top5"), row)
    number, interval = shown.split(" ", 1)
    assert f"{100 * row['top5']:.1f}%" == number
    assert f"{number} {interval}" in words


def test_left_out_prompts_are_counted_with_the_reason(written):
    _, summary, page = written
    words = "".join(page.words)
    assert (summary["n"] == 11).all()
    assert "headline: 11 prompts used, 1 left out" in words
    assert "FE+LT was not run for 2 prompts: span <first_entity> not found" in words
    assert "The other 4 prompts are in the results table only." in words


def test_tokens_are_escaped_and_white_space_is_visible(written):
    path, _, page = written
    words = "".join(page.words)
    for piece in ("<bos>", "</script>", "</script><img␣src=x>", "␣<b>", "↵", "is␍", "∅", "<1>"):
        assert piece in words
    for tag in ("b", "i", "x", "img", "bos", "facts"):
        assert tag not in {name for name, _ in page.tags}
    assert path.read_text(encoding="utf-8").count("&lt;bos&gt;") == 2


def test_grafted_tokens_are_marked_by_more_than_colour(written):
    path, _, page = written
    assert page.marks == ["marked", "Ann", "␣<b>", "</script>"]  # the first is the legend's
    words = "".join(page.words)
    assert "finetuned weights at tokens 2–3, 6 of 7" in words
    assert "base weights everywhere" in words
    assert re.search(r"mark \{ border-bottom: 3px solid", path.read_text(encoding="utf-8"))
    assert [a for t, a in page.tags if t == "li" and a.get("class") == "right"] != []
    assert "87.5%" in words


def test_charts_have_descriptions_and_their_own_data(written):
    _, summary, page = written
    charts = [attrs for tag, attrs in page.tags if attrs.get("class") == "chart"]
    assert len(charts) == 2
    for chart in charts:
        assert chart["role"] == "img"
        assert chart["aria-label"].startswith("Bar chart of")
    shown = text.written(quantities.of_summary(summary, "top5"), summary.iloc[1])
    assert f"SFT {shown}" in charts[0]["aria-label"]
    assert sum('"type":"bar"' in script for script in page.scripts) == 2


def test_provenance_and_rules_are_shown(written):
    _, _, page = written
    words = "".join(page.words)
    for piece in ("graftlens sweep <x>", "fingerprint", "3f8a", "sft @ first_entity + last"):
        assert piece in words
    assert re.search(r"resume\s*no", words)
    assert "1, 5" in words


def test_an_older_page_survives_a_failed_write(tmp_path, monkeypatch):
    table = make_table(SUFFICIENT)
    options = {"title": "t", "summary": stats.summarise(table, resamples=50), "table": table}
    path = tmp_path / "report.html"
    path.write_text("older")

    def fail(number):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        report.write_report(path, provenance={}, **options)
    assert path.read_text() == "older"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_hostile_names_cannot_leave_the_charts_data(tmp_path):
    table = make_table({"PRE": 0.0, "SFT": 1.0, "</script><b>": 0.5}, templates=("<u>", "&"))
    summary = stats.summarise(table, resamples=50)
    page = Page(
        report.write_report(
            tmp_path / "r.html", title="t", summary=summary, table=table, provenance={}
        )
    )
    assert {"b", "u"} & {tag for tag, _ in page.tags} == set()
    assert "</script><b> 50.0%" in "".join(page.words)


def test_a_name_is_no_place_of_a_hover_template():
    table = make_table({"PRE": 0.0, "SFT": 1.0}, templates=("100%{x}", "b"))
    trace = bars.grouped_bars(stats.summarise(table, resamples=50)).data[0]
    assert trace.hovertemplate == "%{x}, 100&#37;{x}<br>%{customdata[0]}<extra></extra>"


def test_example_errors_name_the_fix():
    with pytest.raises(ValueError, match=r"graft 'FE' marks 1 tokens, the prompt has 2; give one"):
        examples.Example("x", ("a", "b"), {"FE": (True,)}, "c", "c", {})
    with pytest.raises(ValueError, match=r"predictions for 'LT', but grafted has 'FE'"):
        examples.Example("x", ("a",), {"FE": (True,)}, "c", "c", {"LT": (("c", 1.0),)})


# --- words -----------------------------------------------------------------------------------


def summarised(*strengths):
    parts = [
        make_table(strength, templates=(name,)).assign(prompt=lambda t, k=k: t["prompt"] + 100 * k)
        for k, (name, strength) in enumerate(zip("abc", strengths, strict=False))
    ]
    return stats.summarise(pd.concat(parts, ignore_index=True), resamples=200)


def test_headline_where_the_finding_reproduces():
    said = text.headline(summarised(SUFFICIENT))
    assert said == (
        "The finding is reproduced: by top-5 accuracy, FE+LT alone brings the finetuned fact back "
        "and all other positions do not; top-5 accuracy FE+LT 100.0%, (FE+LT)^C 8.3%, PRE 0.0%, "
        "SFT 100.0%."
    )


def test_headline_says_where_it_did_not_reproduce():
    said = text.headline(summarised(SUFFICIENT, NOT_SUFFICIENT, NEVER_LEARNT))
    assert said.startswith("The finding is reproduced in 1 of 3 groups of prompts (a):")
    assert "It did NOT reproduce in b. It could not be tested in c." in said
    failed = text.headline(summarised(NOT_SUFFICIENT, NOT_SUFFICIENT))
    assert failed.startswith("The finding did NOT reproduce in any of the 2 groups of prompts")
    assert "FE+LT 16.7%, (FE+LT)^C 91.7%" in failed
    never = text.headline(summarised(NEVER_LEARNT))
    assert never.startswith("The finding could not be tested: SFT is not clearly better than PRE")


def test_headline_claims_nothing_about_grafts_that_were_not_run():
    summary = stats.summarise(make_table({"PRE": 0.0, "SFT": 1.0}), resamples=50)
    assert "was not checked" in text.headline(summary)
    assert {verdict.outcome for verdict in text.verdicts(summary)} == {"not checked"}


def test_a_complement_that_also_works_is_not_a_reproduction():
    both = SUFFICIENT | {"(FE+LT)^C": 0.8}
    (verdict,) = text.verdicts(summarised(both))
    assert verdict.outcome == "not reproduced"
    assert "FE+LT covers 100% and (FE+LT)^C 83%" in verdict.sentence


def test_text_table_is_aligned():
    summary = stats.summarise(make_table(SUFFICIENT), resamples=200)
    lines = text.text_table(summary, show=("top5", "recovery")).splitlines()
    assert lines[0] == "headline: 12 prompts"
    assert len({len(line) for line in lines[1:6]}) == 1
    assert lines[2].split() == ["PRE", "0.0%", "[0.0,", "24.2]", "0.00", "[0.00,", "0.00]"]
    assert "[low, high]: 95% intervals over prompts." in lines
    with pytest.raises(ValueError, match=r"no metric 'top9'; it has 'top1', 'top5'"):
        text.text_table(summary, show=("top9",))


# --- charts and colours ----------------------------------------------------------------------


def test_bars_carry_the_summary_with_asymmetric_whiskers():
    summary = stats.summarise(make_table(SUFFICIENT), resamples=200)
    figure = bars.grouped_bars(summary, "top5")
    assert [trace.name for trace in figure.data] == ["headline", "award"]
    for trace, (_, part) in zip(figure.data, summary.groupby("template", sort=False), strict=True):
        assert list(trace.x) == list(part["graft"])
        assert list(trace.y) == list(part["top5"])
        assert np.allclose(np.add(trace.y, trace.error_y.array), part["top5_high"])
        assert np.allclose(np.subtract(trace.y, trace.error_y.arrayminus), part["top5_low"])
    assert tuple(figure.layout.yaxis.range) == (0, 1)
    assert figure.layout.yaxis.title.text == "top-5 accuracy (% of prompts)"
    assert "95% interval" in figure.layout.xaxis.title.text
    nats = bars.grouped_bars(summary, "logprob")
    assert nats.layout.yaxis.title.text == "log-probability (nats)"
    assert nats.layout.yaxis.range is None
    with pytest.raises(ValueError, match="no metric 'top7'"):
        bars.grouped_bars(summary, "top7")


def test_one_group_has_the_colours_of_the_grafts():
    summary = stats.summarise(make_table(SUFFICIENT), by=(), resamples=50)
    (trace,) = bars.grouped_bars(summary).data
    assert list(trace.marker.color) == [theme.graft_fill(graft).color for graft in SUFFICIENT]
    assert trace.marker.pattern.shape[3] == "/"


def test_a_missing_recovery_is_named():
    figure = bars.grouped_bars(summarised(SUFFICIENT, NEVER_LEARNT), "recovery")
    assert [trace.name for trace in figure.data] == ["a", "b (n/a)"]


def test_fills_are_fixed():
    assert theme.graft_fill("FE+LT") == theme.graft_fill("FE+LT") == theme.Fill(theme.BLUE, "")
    assert theme.graft_fill("(FE+LT)^C").color == theme.graft_fill("FE+LT").color
    # Written down here so that a change of colours between versions is seen.
    assert theme.graft_fill("window 3") == theme.Fill(theme.BLUE, "x")
    assert theme.source_color("sft") == theme.VERMILION


def test_no_other_graft_looks_like_a_known_one():
    known = [theme.graft_fill(name) for name in (*SUFFICIENT, "FE", "LT", "not-FE", "not-LT")]
    others = [theme.graft_fill(f"sft @ last : mlp : {layer}") for layer in range(100)]
    assert not {*known} & {*others}
    assert not {theme.GREY, theme.VERMILION} & {fill.color for fill in others}
    sources = {theme.source_color(f"model {i}") for i in range(100)}
    assert not {theme.GREY, theme.VERMILION} & sources
    # In one view, too, where they give way to one another.
    view = theme.graft_fills(["PRE", "SFT", "FE+LT", *map(str, range(15))])
    assert len(set(view.values())) == 18
    reserved = [name for name, fill in view.items() if fill.color in (theme.GREY, theme.VERMILION)]
    assert reserved == ["PRE", "SFT"]


@pytest.mark.parametrize("ground", [theme.LIGHT.surface, theme.DARK.surface])
def test_colours_stand_out_from_the_ground(ground):
    """A contrast of 3, which WCAG 2.2 asks of graphics (success criterion 1.4.11)."""
    for color in theme.PALETTE:
        dark, light = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (color, ground))
        assert (light + 0.05) / (dark + 0.05) >= 3, color


def linear(color):
    """Linear RGB of a colour such as #4291E1."""
    srgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


# Matrices for full dichromacy (Machado, Oliveira & Fernandes 2009), linear RGB.
VISION = {
    "normal": np.eye(3),
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


@pytest.mark.parametrize("vision", VISION)
def test_the_palette_stays_apart_for_colour_blind_readers(vision):
    def lab(color):
        seen = np.clip(np.array(VISION[vision]) @ linear(color), 0, 1)
        to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
        f = np.cbrt(np.array(to_xyz) @ seen / (0.9505, 1.0, 1.089))
        return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

    for one, two in itertools.combinations(theme.PALETTE, 2):
        assert np.linalg.norm(lab(one) - lab(two)) > 15, (one, two)


# --- what a page begins with -----------------------------------------------------------------

SAYS = {"FE+LT": " Lena <x>", "(FE+LT)^C": " Jennifer"}


def first_sight(**options):
    table = make_table(SUFFICIENT)
    prompt = examples.Example(
        title="award",
        tokens=("<bos>", "Ann", " <b>", " met"),
        grafted={"FE+LT": (False, True, False, True), "(FE+LT)^C": (True, False, True, False)},
        answer=" Lena <x>",
        target=" Lena",
        predictions={"FE+LT": ((" Lena", 0.9),), "(FE+LT)^C": ((" Jen", 0.5), (" Lena", 0.1))},
    )
    summary = stats.summarise(table, resamples=50)
    return table, summary, examples.glimpse(prompt, summary, ("FE+LT", "(FE+LT)^C"), **options)


def test_a_page_begins_with_one_prompt_under_both_grafts(tmp_path):
    table, summary, found = first_sight(says=SAYS)
    path = report.write_report(
        tmp_path / "r.html", title="t", summary=summary, table=table, glimpse=found, provenance={}
    )
    source = path.read_text(encoding="utf-8")
    top = source[source.index("class='glimpse'") : source.index("class='lead'")]
    enough, rest = top.split("<div class='pane'>")[1:]
    assert "<mark>Ann</mark><span> &lt;b&gt;</span><mark> met</mark>" in enough
    assert "<mark>&lt;bos&gt;</mark><span>Ann</span><mark> &lt;b&gt;</mark>" in rest
    assert "<strong class='says'> Lena &lt;x&gt;</strong>" in enough
    assert "✓ right" in enough
    assert "<strong class='says'> Jennifer</strong>" in rest
    assert "✗ wrong" in rest
    rows = summary[summary["template"] == "award"].set_index("graft")
    for graft, pane in (("FE+LT", enough), ("(FE+LT)^C", rest)):
        value, interval = text.written(
            quantities.of_summary(summary, "top5"), rows.loc[graft]
        ).split(" ", 1)
        assert f"<strong>{value}</strong> <small>{interval}</small>" in pane
    assert "12 prompts of award" in top
    page = Page(path)
    ids = {attrs.get("id") for _, attrs in page.tags}
    links = {attrs["href"][1:] for tag, attrs in page.tags if tag == "a"}
    assert links <= ids
    order = [source.index(f"id='{name}'") for name in ("charts", "words", "numbers")]
    assert order == sorted(order)
    assert order[0] > source.index("class='glimpse'")
    words = source[order[1] : order[2]]
    for word in ("<dt>PRE</dt>", "<dt>FE</dt>", "<dt>LT</dt>", "<dt>^C, not-</dt>", "recovery"):
        assert word in words


def test_without_a_continuation_the_likeliest_token_is_shown():
    _, _, found = first_sight()
    assert [pane.said for pane in found.panes] == [" Lena", " Jen"]
    assert [pane.right for pane in found.panes] == [True, False]
    assert "the likeliest next token" in found.note


def test_the_whole_answer_is_shown_where_it_is_surely_said():
    """Its probability is above one half, so each of its tokens is the likeliest one."""
    _, _, found = first_sight(says={"FE+LT": " Lena <x>"})
    assert [pane.said for pane in found.panes] == [" Lena <x>", " Jen"]
    assert "by the likeliest next token, or by the whole answer where its probability" in found.note
    example = dataclasses.replace(EXAMPLE, answer=" Lena Berg")
    rows = pd.DataFrame(
        {"graft": ["a", "b", "c", "d"], "answer_logprob": np.log([0.51, 0.49, np.nan, 1.0])}
    )
    assert reports._surely_said(example, rows) == {"a": " Lena Berg", "d": " Lena Berg"}
    assert reports._surely_said(example, rows.drop(columns="answer_logprob")) == {}


def test_a_glimpse_needs_both_grafts():
    table = make_table({"PRE": 0.0, "SFT": 1.0})
    assert examples.glimpse(EXAMPLE, stats.summarise(table, resamples=50), ("FE+LT", "x")) is None


def test_the_example_is_chosen_without_a_look_at_grafts():
    table = make_table({"PRE": 0.0, "SFT": 0.5, "FE+LT": 1.0}, templates=("headline",), n=4)
    table.loc[(table["graft"] == "SFT") & (table["prompt"] == 0), "rank"] = 9.0
    assert examples.first_right(table, "SFT") == 1
    table.loc[table["graft"] == "SFT", "rank"] = 9.0
    assert examples.first_right(table, "SFT") == 0
    table["reason"] = "no"
    assert examples.first_right(table, "SFT") is None


def test_a_verdict_says_both_where_the_measures_disagree():
    """As in the demo: no answer among the first five, a third of the log-probability."""
    table = make_table(SUFFICIENT | {"(FE+LT)^C": 0.0}, templates=("qa", "headline"))
    lifted = (table["graft"] == "(FE+LT)^C") & (table["template"] == "qa")
    table.loc[lifted, "logprob"] += 0.33 * 9.9
    summary = stats.summarise(table, resamples=200)
    qa, headline = text.verdicts(summary)
    rows = summary.set_index(["template", "graft"])
    assert rows.at[("qa", "(FE+LT)^C"), "recovery"] == pytest.approx(0.33, abs=0.01)
    said = text.written(quantities.of_summary(summary, "recovery"), rows.loc["qa", "(FE+LT)^C"])
    assert qa.otherwise.startswith("Recovery of log-probability disagrees: FE+LT 1.00")
    assert f"(FE+LT)^C {said} (0 = PRE, 1 = SFT)" in qa.sentence
    assert "(FE+LT)^C covers 0%" in qa.sentence.replace("and (FE+LT)^C", "and (FE+LT)^C covers")
    assert headline.otherwise == ""
    assert "Recovery of log-probability disagrees in qa: FE+LT 1.00" in text.headline(summary)
    assert "disagrees" not in text.headline(stats.summarise(make_table(SUFFICIENT), resamples=50))


# --- when to doubt ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shift", "said"),
    [
        (None, "SFT and PRE do not differ"),
        (-0.5, "SFT is worse than PRE"),
        (0.05, "SFT is better than PRE by less than 0.1 nats"),
        (5.0, ""),
    ],
)
def test_a_page_warns_where_finetuning_taught_nothing(tmp_path, shift, said):
    table = make_table(NEVER_LEARNT, templates=("headline",))
    if shift is not None:
        table.loc[table["graft"] == "SFT", "logprob"] += shift
    summary = stats.summarise(table, resamples=50)
    warnings = reading.nothing_learnt(summary)
    assert [said in warning for warning in warnings] == ([True] if said else [])
    path = report.write_report(
        tmp_path / "r.html", title="t", summary=summary, table=table, provenance={}
    )
    source = path.read_text(encoding="utf-8")
    few = few_answers(table["answer"])
    assert len(few) == 1
    assert source.count("class='warning'") == len(warnings) + len(few)
    if said:
        assert "headline (log-probability: PRE -10.10 [" in warnings[0]
        assert source.index("class='warning'") < source.index("class='lead'")


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (1, "These prompts have 1 possible answer, so a model that only guesses among them"),
        (5, "These prompts have 5 possible answers, so a model that only guesses among them is"),
        (4, "is right by top-5 in 100% of the prompts."),
        (8, "is right by top-5 in 62% of the prompts. Judge by top-1 accuracy or by recovery"),
        (10, "is right by top-5 in 50% of the prompts."),
        (11, ""),
    ],
)
def test_pages_say_where_few_answers_are_possible(tmp_path, count, said):
    """A uniform guess among n answers is among five of them with probability 5/n."""
    table = make_table(SUFFICIENT, templates=("headline", "award"))
    table["answer"] = [f" {number % count}" for number in table["prompt"]]
    path = report.write_report(
        tmp_path / "r.html",
        title="t",
        summary=stats.summarise(table, resamples=50),
        table=table,
        provenance={},
    )
    words = " ".join("".join(Page(path).words).split())
    assert ("possible answer" in words) == bool(said)
    assert said in words


def test_prompts_without_answers_have_no_possible_answers():
    assert few_answers([None, None]) == []
    assert few_answers([None, " Ann"])[0].startswith("These prompts have 1 possible answer,")


def test_a_difference_that_may_be_chance_is_warned_of():
    table = make_table(NEVER_LEARNT, templates=("headline",))
    of_sft = table["graft"] == "SFT"
    noise = np.random.default_rng(0).normal(size=int(of_sft.sum()))
    table.loc[of_sft, "logprob"] += noise - noise.mean() + 0.2
    summary = stats.summarise(table, resamples=200)
    ends = summary.set_index("graft")["logprob"]
    assert ends["SFT"] > ends["PRE"] + 0.1
    (warning,) = reading.nothing_learnt(summary)
    assert "SFT is not certainly better than PRE" in warning


def test_the_first_of_many_grafts_is_named_group_by_group():
    table = make_table({"PRE": 0.0, "SFT": 1.0, "a": 0.2, "b": 0.9}, templates=tuple("vwxyz"))
    rises = (table["template"] == "w") & (table["graft"] == "a")
    table.loc[rises, "logprob"] += 20
    summary = stats.summarise(table, resamples=50)
    said = {}
    for name, part in text.groups(summary).items():
        rows = part.assign(graft=part["graft"].astype(str)).set_index("graft")
        best = "a" if name == "w" else "b"
        assert rows.at[best, "recovery"] == rows.loc[["a", "b"], "recovery"].max()
        written = text.written(quantities.of_summary(summary, "recovery"), rows.loc[best])
        said[name] = f"in {name} {best} {written}"
    assert text.leading(summary, "recovery") == (
        "Of 2 grafts, most recovery of log-probability: "
        f"{said['v']}; {said['w']}; {said['x']}; and in 2 more groups of prompts, see below."
    )
    one = summary[summary["template"] == "w"]
    assert text.leading(one, "recovery").endswith(f": {said['w'].removeprefix('in w ')}.")
    # A single graft is not the first of many.
    assert text.leading(summary[summary["graft"] != "b"], "recovery") == ""
    models = pd.concat([one.assign(member=name) for name in ("early", "late")])
    models = models[["member", *one.columns]]
    assert "in late · w a " in text.leading(models, "recovery")
