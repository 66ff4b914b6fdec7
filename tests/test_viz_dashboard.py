"""The dashboard and the attention view: numbers equal to what was given, in a browser offline."""

import base64
import dataclasses
import itertools
import json
import re
import struct
import subprocess
import sys
import zlib
from html import unescape

import numpy as np
import pandas as pd
import pytest
from browser import ask, chromium
from needs import needs
from test_report import Page

from graftlens.viz import attention, theme
from graftlens.viz.dashboard import Dashboard, dashboard_page
from graftlens.viz.dashboarddata import DashboardData, Run
from graftlens.viz.dashboardscript import FULL
from graftlens.viz.screenshot import screenshot
from graftlens.viz.spelling import visible

TOKENS = ("<bos>", "</script>", " <b>", "&amp;", "\n", " ", "🎬", " film")
SHOWN = ["<bos>", "</script>", "␣<b>", "&amp;", "↵", "␣", "🎬", "␣film"]
N, LAYERS, HEADS = len(TOKENS), 3, 4
COMPONENTS = ("embed", "q", "o", "unembed")
NAMES = ("PRE", "SFT", "FE+LT", "mine <x>")
RULES = ("none", "sft @ all", "sft @ first_entity + last", "sft @ [4] : q + o : upper_half")
#: Grafts without names go by their rules.
LONG = tuple(
    f"sft @ first_entity + last : q + k + v + o + mlp_in + mlp_out : {layers} : heads 0,2,4-8,11"
    for layers in ("15-29", "10-14", "0-9", "lower_half")
)
BACKWARDS = ("<bos>", " the", " של", "ום", " مر", " 77", "أ", " film")
HOSTILE = "</script><img src=x onerror=complaints.push('ran')>"

#: Keeps what the page writes to the console.
LISTEN = """<script>const logged = [];
for (const kind of ["error", "warn"]) console[kind] = (...said) => logged.push(said.join(" "));
</script>"""
SET = """const set = (id, value) => {
  const place = document.getElementById(id);
  place.value = value;
  place.dispatchEvent(new Event("change")); return new Promise(done => setTimeout(done, 300)); };
const rest = () => new Promise(done => setTimeout(done, 300));
const words = place => document.querySelector(place).textContent;
while (document.querySelector("[aria-busy=true]")) await rest();
"""


def patterns(seed):
    raw = np.tril(np.random.default_rng(seed).random((LAYERS, HEADS, N, N)))
    return (raw / raw.sum(-1, keepdims=True)).astype(np.float32)


def shares(sft):
    return {"pre": 1 - sft, "sft": sft}


def lens_table(answer):
    draw = np.random.default_rng(7)
    rows = []
    for name, layer, at in itertools.product(NAMES, range(LAYERS + 1), range(N)):
        probs = np.sort(draw.dirichlet(np.ones(9)))[::-1][:5]
        top = [*draw.permutation([*TOKENS, " Paris"])[:4].tolist(), HOSTILE]
        rank = int(draw.integers(1, 5000))
        row = {"prompt": 0, "graft": name, "rule": "", "layer": layer, "stream": f"{layer}_pre"}
        row |= {"position": at, "token": TOKENS[at], "target": " Paris", "target_id": 5}
        row |= {"rank": rank, "logprob": -np.log(rank + 1), "prob": 1 / (rank + 1), "entropy": 1.0}
        row |= {"kl_base": draw.random(), "kl_full": draw.random()}
        rows.append(row | {"top_tokens": top, "top_probs": probs.tolist()})
    table = pd.DataFrame(rows)
    if answer is None:
        table[["target", "target_id", "rank", "prob", "logprob"]] = pd.NA
    # Nothing may hang on the order of the rows.
    return table.sample(frac=1, random_state=0)


def make(answer=" Paris", **changed):
    some = np.zeros((len(COMPONENTS), N))
    ends = some.copy()
    # As a sum over layers comes out: a little less than 1.
    ends[:, [1, 7]] = sum([0.1] * 10)
    some[1:3, 4] = 0.5
    grafted = (some, np.ones_like(some), ends, some)
    wheres = (
        [""] * N,
        ["sft: all"] * N,
        ["sft: all" if i in (1, 7) else "" for i in range(N)],
        ["sft: q o in layers 2" if i == 4 else "" for i in range(N)],
    )
    draw = np.random.default_rng(3)
    runs = {}
    for seed, name in enumerate(NAMES):
        logprobs = np.r_[np.nan, -draw.random(N - 1)]
        # The greatest of all runs, on the token that would end the script.
        logprobs[1] = -8.0 if name == "SFT" else logprobs[1]
        sft = grafted[seed] if seed else np.zeros_like(some)
        moved = draw.normal(size=N) if name != "mine <x>" else None
        where = wheres[seed]
        runs[name] = Run(RULES[seed], patterns(seed), logprobs, moved, shares(sft), where)
    divergence = pd.DataFrame(
        {"prompt": 0, "position": at, "token": TOKENS[at], "graft": name}
        | {
            f"kl_{run}": 0.0 if name == end else draw.random()
            for run, end in (("base", "PRE"), ("full", "SFT"))
        }
        for name in NAMES
        for at in range(N)
    )
    values = {"title": "Films & <facts>", "text": "".join(TOKENS), "answer": answer}
    values |= {"tokens": TOKENS, "components": COMPONENTS, "runs": runs}
    values |= {"lens": lens_table(answer), "kl_divergence": divergence, "sources": ("pre", "sft")}
    return DashboardData(**(values | {"provenance": {"models": {"pre": "3f8a"}}} | changed))


@pytest.fixture(scope="module")
def data():
    return make()


@pytest.fixture(scope="module")
def written(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("dashboard") / "deeper" / "page.html"
    made = Dashboard(data)
    assert made.save(path) == path
    assert path.read_text(encoding="utf-8") == made.html
    return path


@pytest.fixture(scope="module")
def answered(written, tmp_path_factory):
    """Asks the page a script's question; what it complains of or logs is a failure."""
    folder = tmp_path_factory.mktemp("probe")
    heard = folder / "heard.html"
    heard.write_text(
        written.read_text(encoding="utf-8").replace("<title>", LISTEN + "<title>", 1), "utf-8"
    )

    def put(script):
        asked = f"{SET} const found = await (async () => {{ {script} }})(); return [found, logged];"
        (found, logged), complaints = ask(heard, asked, folder, width=1400)
        assert complaints == []
        assert logged == []
        return found

    return put


@pytest.fixture(scope="module")
def named_by_rules(data, tmp_path_factory):
    """A page of six runs, four of which go by their rules, and of tokens from right to left."""
    runs = {name: data.runs[name] for name in NAMES[:2]}
    runs |= {rule: dataclasses.replace(data.runs["FE+LT"], rule=rule) for rule in LONG}

    def copied(table, column):
        one = table[table[column] == "FE+LT"]
        ends = table[table[column].isin(NAMES[:2])]
        return pd.concat([ends, *(one.assign(**{column: rule}) for rule in LONG)])

    lens = copied(data.lens, "graft")
    lens["top_tokens"] = [[*BACKWARDS[2:5], "a", "b"]] * len(lens)
    divergence = copied(data.kl_divergence, "graft")
    made = make(runs=runs, lens=lens, kl_divergence=divergence, tokens=BACKWARDS)
    return Dashboard(made).save(tmp_path_factory.mktemp("rules") / "page.html")


def cell(data, run, layer, at):
    table = data.lens
    mine = (table["graft"] == run) & (table["layer"] == layer) & (table["position"] == at)
    return table[mine].iloc[0]


# --- the page as it is written ---------------------------------------------------------------


def test_the_page_is_whole_and_says_what_came_out(written, data):
    found = Page(written)
    assert found.stack == []
    assert [words for tag, words in found.headings if tag == "h2"] == [
        "Which tokens are grafted",
        "Tokens",
        "Logit lens",
        "Where does the answer come up",
        "Attention",
        "What was run and how",
    ]
    html = written.read_text(encoding="utf-8")
    for run in NAMES:
        last = cell(data, run, LAYERS, N - 1)
        name = run.replace("<", "&lt;").replace(">", "&gt;")
        for what, said in (
            ("rank", f"{last['rank']}"),
            ("prob", f"{last['prob']:.4f}"),
            ("logprob", f"−{-last['logprob']:.3f}"),
        ):
            assert f"<td data-run='{name}' data-value='{what}'>{said}</td>" in html
    words = "".join(found.words)
    assert "Films & <facts>" in words
    assert "sft @ [4] : q + o : upper_half" in words


def test_a_notebook_shows_the_same_page(data):
    made = Dashboard(data)
    inside = re.search(r'srcdoc="([^"]*)" title="Films &amp; &lt;facts&gt;"', made._repr_html_())[1]
    assert unescape(inside) == made.html


def test_what_is_grafted_is_marked_and_in_words(written):
    html = written.read_text(encoding="utf-8")
    strips = dict(re.findall(r"data-strip='([^']+)'>(.*?)</p>", html))
    assert re.findall(r"<span class='(\w+)", strips["PRE"]) == ["token"] * N
    marks = re.findall(r"<span class='(token|from whole|from part)'", strips["FE+LT"])
    assert [i for i, mark in enumerate(marks) if mark == "from whole"] == [1, 7]
    partly = re.findall(r"<span class='(token|from whole|from part)'", strips["mine &lt;x&gt;"])
    assert [i for i, mark in enumerate(partly) if mark != "token"] == [4]
    assert partly[4] == "from part"
    assert "title='position 4: sft: q o in layers 2'" in strips["mine &lt;x&gt;"]
    assert f"--c: {theme.source_color('sft')}" in strips["FE+LT"]
    words = "".join(Page(written).words)
    assert "positions 1, 7: sft: all" in words
    assert "positions 0–7: sft: all" in words
    assert "pre everywhere" in words


def test_the_answer_has_a_line_for_each_run_in_their_order(written, data):
    html = written.read_text(encoding="utf-8")
    for chart, value in enumerate(("rank", "logprob")):
        held = re.search(rf"id='chart-{chart}-figure'>(.*?)</script>", html)[1]
        lines = json.loads(held)["data"]
        assert [unescape(line["name"]) for line in lines] == list(NAMES)
        for run, line in zip(NAMES, lines, strict=True):
            assert line["x"] == list(range(LAYERS + 1))
            assert line["y"] == [cell(data, run, layer, N - 1)[value] for layer in line["x"]]


def test_patterns_are_packed_and_come_back(written, data):
    html = written.read_text(encoding="utf-8")
    rows, columns = np.tril_indices(N)
    for i, run in enumerate(data.runs.values()):
        packed = re.search(rf"id='pattern-{i}'>([^<]*)<", html)[1]
        back = np.frombuffer(base64.b64decode(packed), dtype="<u2") / FULL
        back = back.reshape(LAYERS, HEADS, -1)
        assert np.abs(back - run.pattern[:, :, rows, columns]).max() <= 0.5 / FULL + 1e-7


def test_scales_are_those_of_all_runs(written, data):
    html = written.read_text(encoding="utf-8")
    facts = json.loads(re.search(r"id='dashboard-data'>(.*?)</script>", html)[1])
    assert facts["measures"]["logprob"]["low"] == -8.0
    assert facts["measures"]["logprob"]["high"] == 0.0
    most = max(
        abs(r.direct_logit_attribution).max()
        for r in data.runs.values()
        if r.direct_logit_attribution is not None
    )
    drawn = facts["measures"]["direct_logit_attribution"]
    assert (drawn["low"], drawn["high"]) == (-most, most)
    ranks = data.lens["rank"].astype(float)
    assert facts["lens"]["kinds"]["rank"]["high"] == pytest.approx(np.log10(ranks.max()))
    assert facts["lens"]["kinds"]["kl_base"]["high"] == pytest.approx(
        data.lens[["kl_base", "kl_full"]].to_numpy().max()
    )
    apart = [
        abs(cell(data, a, layer, at)["logprob"] - cell(data, b, layer, at)["logprob"])
        for a, b in itertools.product(NAMES, ("PRE", "SFT"))
        for layer, at in itertools.product(range(LAYERS + 1), range(N))
    ]
    kinds = facts["lens"]["kinds"]
    assert kinds["diff_base"]["high"] == kinds["diff_full"]["high"] == pytest.approx(max(apart))
    assert kinds["diff_base"]["low"] == -kinds["diff_base"]["high"]


def test_circuitsvis_is_inside_once_and_harmless(written):
    html = written.read_text(encoding="utf-8")
    assert html.count("createRoot(") == attention.circuitsvis_script().count("createRoot(") > 0
    assert html.count("const CircuitsVis =") == 1
    assert "sourceMappingURL=iife" not in html
    assert "</script" not in attention.circuitsvis_script()


def test_circuitsvis_itself_is_not_imported():
    """Importing it would import torch; its own HTML would ask google.com whether there is a net."""
    program = (
        "import sys, numpy as np; from graftlens.viz.attention import attention_view; "
        "attention_view(np.eye(2)[None], ['a', 'b'])._repr_html_(); "
        "print(*sorted({'circuitsvis', 'torch', 'urllib.request'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("", "urllib.request")


# --- in a browser, without a network ---------------------------------------------------------


def test_in_a_browser_everything_is_drawn_and_tokens_are_as_they_are(answered, data):
    found = answered("""return {
      busy: document.querySelectorAll("[aria-busy=true]").length,
      tokens: [...document.querySelectorAll(".colored-tokens > span > span")].map(s => [
        s.textContent, getComputedStyle(s).backgroundColor]),
      foreign: document.querySelectorAll(".colored-tokens b, img").length,
      low: words("#tokens-legend .ends span"),
      table: [...document.querySelectorAll("#tokens-table tbody tr")].map(row =>
        [...row.children].map(part => part.textContent)),
      strip: [...document.querySelectorAll("[data-strip=PRE] > span")].map(s => s.textContent),
      axis: [...document.querySelectorAll("#lens-shown .xtick text")].map(t => t.textContent),
      layers: [...document.querySelectorAll("#lens-shown .ytick text")].map(t => t.textContent),
      lines: document.querySelectorAll("#chart-0 .scatterlayer .trace").length,
      ranks: Array.from(document.getElementById("chart-0").data[2].y),
      shown: document.getElementById("tokens-run").selectedOptions[0].textContent,
    };""")
    assert found["busy"] == 0
    assert [text.replace("\u2060", "") for text, _ in found["tokens"]] == SHOWN
    assert found["foreign"] == 0
    assert found["shown"] == "FE+LT"
    assert found["low"] == "−8"
    assert found["table"][0] == ["0", "<bos>", "–"]
    logprob = data.runs["FE+LT"].token_logprobs[7]
    assert float(found["table"][7][2].replace("−", "-")) == pytest.approx(logprob, rel=1e-3)
    assert found["strip"] == SHOWN
    assert found["axis"] == SHOWN
    assert found["layers"] == ["0 embeddings", "1", "2", "3 output"]
    assert found["lines"] == len(NAMES)
    assert found["ranks"] == [
        cell(data, "FE+LT", layer, N - 1)["rank"] for layer in range(LAYERS + 1)
    ]


@pytest.mark.slow
def test_another_run_and_measure_colour_the_tokens_anew(answered, data):
    found = answered("""const seen = [];
    const look = () => seen.push({
      colors: [...document.querySelectorAll(".colored-tokens > span > span")].map(s =>
        getComputedStyle(s).backgroundColor),
      ends: [...document.querySelectorAll("#tokens-legend .ends span")].map(s => s.textContent),
      last: words("#tokens-table tr:last-child td:last-child"), note: words("#tokens-note")});
    await set("tokens-run", "1"); look();
    await set("tokens-measure", "kl_full"); look();
    await set("tokens-run", "0"); look();
    await set("tokens-measure", "direct_logit_attribution"); await set("tokens-run", "3"); look();
    return seen;""")
    sft, kl_self, kl, none = found
    red, green, blue = (int(attention.NEGATIVE[i : i + 2], 16) for i in (1, 3, 5))
    assert sft["colors"][1] == f"rgb({red}, {green}, {blue})"
    assert sft["colors"][0] == "rgb(255, 255, 255)"
    assert kl_self["last"] == "0"
    table = data.kl_divergence.query("graft == 'PRE' and position == 7")
    assert float(kl["last"]) == pytest.approx(table["kl_full"].iloc[0], rel=1e-3)
    assert kl["ends"][0] == "0"
    assert none["note"].startswith("This was not computed for mine <x>")
    assert none["last"] == "–"


def test_the_lens_shows_the_top_five_on_hover(answered, data):
    found = answered("""const place = document.getElementById("lens-shown"), seen = [];
    const hover = async (layer, position) => {
      Plotly.Fx.hover(place, {xval: position, yval: layer}); await rest();
      return [...document.querySelectorAll("#lens-shown .hoverlayer .nums tspan")].map(
        s => s.textContent).join("").replace(/\u200b/g, "");
    };
    seen.push(await hover(2, 7));
    const zs = {};
    for (const kind of ["rank", "top_prob", "kl_full", "diff_base", "diff_full"]) {
      await set("lens-value", kind); zs[kind] = place.data[0].z[1][3];
    }
    await set("lens-run", "1"); await set("lens-value", "logprob");
    return {seen, zs, other: place.data[0].z[1][3], images: document.querySelectorAll("img").length,
      range: [place.data[0].zmin, place.data[0].zmax]};""")
    here = cell(data, "FE+LT", 2, 7)
    said = found["seen"][0]
    assert "position 7 ␣film, 2 layers have run (2_pre)" in said
    assert f"answer: rank {here['rank']}, " in said
    for k, (token, prob) in enumerate(zip(here["top_tokens"], here["top_probs"], strict=True), 1):
        start = said.index(f"{k}. {visible(token)} ") + len(f"{k}. {visible(token)} ")
        number = re.match(r"[\d.e−]+", said[start:])[0].rstrip(".").replace("−", "-")
        # The next line's number follows without a break.
        assert number.startswith(f"{prob:.3g}"[:4])
    row = cell(data, "FE+LT", 1, 3)
    assert found["zs"]["rank"] == pytest.approx(np.log10(row["rank"]))
    assert found["zs"]["top_prob"] == pytest.approx(row["top_probs"][0], rel=1e-4)
    assert found["zs"]["kl_full"] == pytest.approx(row["kl_full"], rel=1e-4)
    base = cell(data, "PRE", 1, 3)["logprob"]
    assert found["zs"]["diff_base"] == pytest.approx(row["logprob"] - base, abs=1e-3)
    full = cell(data, "SFT", 1, 3)["logprob"]
    assert found["zs"]["diff_full"] == pytest.approx(row["logprob"] - full, abs=1e-3)
    assert found["other"] == pytest.approx(full, rel=1e-4)
    lowest = data.lens["logprob"].astype(float).min()
    assert found["range"] == [pytest.approx(lowest), 0]
    assert found["images"] == 0


@pytest.mark.slow
def test_a_view_that_is_asked_again_before_it_is_there(answered):
    """Regression: React mounts after a while on a long page; a click before that was an error."""
    found = answered("""const place = document.createElement("div");
    place.id = "late"; place.setAttribute("aria-busy", "true"); document.body.append(place);
    circuits(place, CircuitsVis.ColoredTokens, {tokens: ["one"], values: [0]});
    circuits(place, CircuitsVis.ColoredTokens, {tokens: ["two"], values: [0]});
    const before = place.getAttribute("aria-busy"); await rest();
    return {before, text: place.textContent, after: place.getAttribute("aria-busy")};""")
    assert found["before"] == "true", "nothing is drawn yet"
    assert (found["text"], found["after"]) == ("two", None)


@pytest.mark.slow
def test_heads_layers_and_differences(answered, data):
    found = answered("""const seen = [], left = document.getElementById("left");
    const look = () => seen.push({
      titles: [words("#left .shown-name"), words("#right .shown-name")],
      names: [...left.querySelectorAll(".head")].map(h => h.textContent),
      pressed: [...document.querySelectorAll("#right .head")].findIndex(
        h => h.ariaPressed === "true"),
      picture: document.querySelector("#left-pattern canvas").toDataURL(),
      given: ["left", "right"].map(s =>
        document.getElementById(s + "-pattern").asked.props.attention),
      ends: [...document.querySelectorAll("#right-legend .ends span")].map(s => s.textContent),
      most: words("#right .most")});
    look();
    await set("layer", "2"); look();
    left.querySelectorAll(".head")[3].click(); await rest(); look();
    document.getElementById("layer-back").click(); await rest(); look();
    await set("left-a", "1"); await set("right-a", "3"); await set("right-b", "1"); look();
    return seen;""")
    start, second, clicked, back, other = found
    pre, sft, graft, mine = (data.runs[name].pattern for name in NAMES)
    apart = np.abs(sft[:, :, -1] - pre[:, :, -1]).sum(-1)
    layer, head = np.argwhere(apart == apart.max())[0]
    assert start["titles"] == [f"L{layer}H{head}: FE+LT", f"L{layer}H{head}: FE+LT − PRE"]
    assert second["names"] == ["L2H0", "L2H1", "L2H2", "L2H3"]
    assert second["picture"] != start["picture"]
    assert clicked["titles"] == ["L2H3: FE+LT", "L2H3: FE+LT − PRE"]
    assert clicked["pressed"] == 3
    assert clicked["picture"] != second["picture"]
    assert back["titles"][0] == "L1H3: FE+LT"
    for shot, at, right in ((clicked, (2, 3), graft - pre), (back, (1, 3), graft - pre)):
        for query, row in enumerate(shot["given"][1]):
            assert row == pytest.approx(right[at][query, : query + 1], abs=1e-4)
        for query, row in enumerate(shot["given"][0]):
            assert row == pytest.approx(graft[at][query, : query + 1], abs=1e-4)
    # One scale for all layers of a difference.
    limit = np.abs(np.tril(graft - pre)).max()
    assert clicked["ends"] == back["ends"]
    assert float(back["ends"][2]) == pytest.approx(limit, rel=5e-3)
    assert other["titles"] == ["L1H3: SFT", "L1H3: mine <x> − SFT"]
    last = (mine - sft)[1, 3, -1]
    key = int(np.abs(last).argmax())
    value = f"{last[key]:.4f}".replace("-", "−")
    assert other["most"].startswith(f"Largest at the last token: {SHOWN[key]} ({key}) {value}")


def test_the_overview_has_the_heads_differences_and_a_click_opens_one(answered, data):
    found = answered("""const seen = [], place = document.getElementById("apart-shown");
    const look = () => seen.push(place.data[0].z.map(row => [...row]));
    look();
    await set("apart-of", "last"); look();
    await set("apart-a", "3"); await set("apart-b", "1"); look();
    place.emit("plotly_click", {points: [{x: 3, y: 1}]}); await rest();
    const opened = [words("#left .shown-name"), words("#right .shown-name"),
      document.getElementById("layer").value];
    place.focus();
    for (const key of ["ArrowRight", "ArrowUp", "ArrowUp", "ArrowUp", "Enter"])
      place.dispatchEvent(new KeyboardEvent("keydown", {key}));
    await rest();
    const keyed = [words("#left .shown-name"), document.activeElement.id, place.tabIndex];
    await set("apart-b", "3"); look();
    return {seen, opened, keyed, hover: place.data[0].hovertext[0][0]};""")
    pre, sft, graft, mine = (np.tril(data.runs[name].pattern) for name in NAMES)

    def moved(one, other):
        return np.abs(one - other).sum(-1) / 2

    mean, last, others, same = found["seen"]
    np.testing.assert_allclose(mean, moved(graft, pre).mean(-1), rtol=1e-4)
    np.testing.assert_allclose(last, moved(graft, pre)[:, :, -1], rtol=1e-4)
    np.testing.assert_allclose(others, moved(mine, sft)[:, :, -1], rtol=1e-4)
    assert not np.any(same)
    assert found["opened"] == ["L1H3: mine <x>", "L1H3: mine <x> − SFT", "1"]
    assert found["keyed"] == [f"L{LAYERS - 1}H1: mine <x>", "heads", 0]
    assert found["hover"] == "L0H0: 0%"


@pytest.mark.slow
def test_labels_of_the_lens_can_be_read_on_every_colour(answered):
    found = answered("""const place = document.getElementById("lens-shown"), seen = [];
    for (const kind of ["logprob", "rank", "diff_base"]) {
      await set("lens-value", kind);
      const [cells, ...labels] = place.data;
      for (const {x, y, text, textfont} of labels) x.forEach((i, k) => seen.push({
        share: (cells.z[y[k]][i] - cells.zmin) / (cells.zmax - cells.zmin),
        stops: cells.colorscale.map(([, color]) => color), ink: textfont.color, text: text[k]}));
    }
    await set("lens-value", "logprob");
    return seen;""")
    assert len(found) >= N * (LAYERS + 1)
    assert {label["ink"] for label in found} == {"#000000", "#ffffff"}
    for label in found:
        assert label["ink"] == theme.ink(theme.mixed(label["stops"], label["share"]))


def test_the_grid_opens_at_its_grafted_end(named_by_rules, tmp_path):
    found, complaints = ask(
        named_by_rules,
        SET
        + """const frame = document.getElementById("grid").parentElement;
        frame.style.width = "160px";
        const shown = () => {
          const last = document.querySelector("#grid tbody tr").cells[8].getBoundingClientRect();
          const box = frame.getBoundingClientRect();
          return [frame.scrollWidth > frame.clientWidth, last.left >= box.left,
            last.right <= box.right + 1];
        };
        frame.scrollLeft = 0;
        await set("grid-run", "1");
        const whole = shown();
        await set("grid-run", "0");
        return {whole, base: frame.scrollLeft};""",
        tmp_path,
    )
    assert complaints == []
    assert found["whole"] == [True, True, True]
    assert found["base"] == 0


@pytest.fixture(scope="module")
def long(data, tmp_path_factory):
    """A page that has room for a few heads only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("graftlens.viz.dashboardscript.ROOM", 900)
        made = Dashboard(data)
    return made.save(tmp_path_factory.mktemp("long") / "page.html")


def test_a_long_prompts_page_keeps_the_heads_that_differ_most(long, data):
    html = long.read_text(encoding="utf-8")
    facts = json.loads(re.search(r"id='dashboard-data'>(.*?)</script>", html)[1])["attention"]
    places = np.array(facts["places"])
    count = int((places >= 0).sum())
    assert 0 < count < LAYERS * HEADS
    assert sorted(places[places >= 0].tolist()) == list(range(count))
    patterns = [np.tril(run.pattern) for run in data.runs.values()]
    moved = [np.abs(a - b).sum(-1) / 2 for a, b in itertools.combinations(patterns, 2)]
    far = np.max([np.maximum(m.mean(-1), m[:, :, -1]) for m in moved], axis=0)
    start = np.unravel_index(moved[0][:, :, -1].argmax(), far.shape)
    others = [at for at in np.argwhere(places >= 0).tolist() if tuple(at) != start]
    assert places[start] == 0
    left = far[places < 0].max()
    assert all(far[tuple(at)] >= left for at in others)
    rows, columns = np.tril_indices(N)
    total = 0
    for i, pattern in enumerate(patterns):
        text = re.search(rf"id='pattern-{i}'>([^<]*)<", html)[1]
        total += len(text)
        back = np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=np.uint8) / 255
        for layer, head in np.argwhere(places >= 0).tolist():
            shown = back.reshape(count, -1)[places[layer, head]]
            assert np.abs(shown - pattern[layer, head][rows, columns]).max() <= 0.5 / 255 + 1e-7
    assert total <= 900
    said = unescape(re.search(r"id='left-out'>(.*?)</p>", html)[1])
    assert f"{LAYERS * HEADS - count} of {LAYERS * HEADS} heads" in said
    assert f"by more than {left:.1%} on average" in said
    assert "--complete (in Python complete=True)" in said
    assert "left-out" not in dashboard_page(dataclasses.replace(data, complete=True))


def test_heads_that_were_left_out_say_so(long, data, tmp_path):
    html = long.read_text(encoding="utf-8")
    facts = json.loads(re.search(r"id='dashboard-data'>(.*?)</script>", html)[1])
    places = np.array(facts["attention"]["places"])
    (layer, head), *_ = np.argwhere(places < 0).tolist()
    found, complaints = ask(
        long,
        SET
        + f"""const start = document.getElementById("left-pattern").asked.props.attention;
        const opened = words("#left .shown-name");
        await set("layer", "{layer}");
        const button = document.querySelectorAll("#left .head")[{head}];
        button.click(); await rest();
        const place = document.getElementById("apart-shown");
        return {{start, opened, out: button.classList.contains("out"),
          name: words("#left .shown-name"),
          hidden: document.getElementById("left-pattern").hidden,
          hover: place.data[0].hovertext[{layer}][{head}],
          busy: document.querySelectorAll("[aria-busy=true]").length}};""",
        tmp_path,
    )
    assert complaints == []
    at = tuple(facts["start"])
    pattern = data.runs["FE+LT"].pattern[at]
    for query, row in enumerate(found["start"]):
        assert row == pytest.approx(pattern[query, : query + 1], abs=0.5 / 255 + 1e-4)
    assert found["opened"] == f"L{at[0]}H{at[1]}: FE+LT"
    assert found["out"] is True
    assert found["name"] == f"L{layer}H{head}: FE+LT (left out)"
    assert found["hidden"] is True
    assert found["hover"].endswith("% (its patterns were left out)")
    assert found["busy"] == 0


def test_the_grid_has_the_shares(answered):
    found = answered("""await set("grid-run", "3");
    return [...document.querySelectorAll("#grid tbody tr")].map(row =>
      [...row.children].map(part => part.textContent || ""));""")
    assert found[0] == ["embed"] + [""] * N
    assert found[1] == ["q", "", "", "", "", "50", "", "", ""]
    assert found[2] == ["o", "", "", "", "", "50", "", "", ""]


def test_a_prompt_without_an_answer(tmp_path):
    made = Dashboard(make(answer=None))
    path = made.save(tmp_path / "page.html")
    found, complaints = ask(
        path,
        SET
        + """return {off: [...document.querySelectorAll("#lens-value option:disabled")].map(
          o => o.value), value: document.getElementById("lens-value").value,
          z: document.getElementById("lens-shown").data[0].z.length}""",
        tmp_path,
    )
    assert complaints == []
    assert found["off"] == ["logprob", "rank", "diff_base", "diff_full"]
    assert found["value"] == "kl_base"
    assert found["z"] == LAYERS + 1
    assert "The prompt has no answer" in made.html
    head = re.search(r"<table id='outputs'>.*?</thead>", made.html)[0]
    assert re.findall(r"<th [^>]*>([^<]*)", head) == ["run", "graft", "most likely tokens"]
    assert "data-value=" not in made.html


def test_a_rule_that_is_the_name_is_said_once(named_by_rules, written):
    html = named_by_rules.read_text(encoding="utf-8")
    for rule in LONG:
        assert f"<code>{rule}</code>" not in html
        assert f"<h4>{rule}</h4>" in html
    assert html.count("as named") == len(LONG)
    assert "<h4>SFT <small><code>sft @ all</code></small></h4>" in html
    assert "as named" not in written.read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [800, 1400])
@pytest.mark.slow
def test_long_names_leave_the_table_and_the_charts_room(named_by_rules, width, tmp_path):
    found, complaints = ask(
        named_by_rules,
        """const box = place => document.querySelector(place).getBoundingClientRect();
        const chart = name => {
          const legend = box(`${name} .legend .scrollbox`), title = box(`${name} .ytitle`);
          const texts = [...document.querySelectorAll(`${name} .legendtext`)];
          return {plot: document.querySelector(name)._fullLayout._size.h,
            beside: Math.max(...texts.map(t => t.getBoundingClientRect().right)),
            right: box(name).right, below: title.top - legend.bottom,
            named: texts.map(t => t.textContent)};
        };
        const rem = parseFloat(getComputedStyle(document.documentElement).fontSize);
        return {run: Math.max(...[...document.querySelectorAll("#outputs th[scope=row]")].map(
            th => th.getBoundingClientRect().width)) / rem,
          charts: ["#chart-0", "#chart-1"].map(chart)};""",
        tmp_path,
        width=width,
    )
    assert complaints == []
    # 14rem and the padding of a cell.
    assert 10 < found["run"] <= 15.5
    for chart in found["charts"]:
        assert chart["plot"] > 240
        assert chart["beside"] <= chart["right"]
        assert chart["below"] > -8, "the axis title begins below the legend"
        assert len(set(chart["named"])) == 6
        assert max(map(len, chart["named"])) <= 44


@pytest.mark.slow
def test_tokens_from_right_to_left_stand_in_the_order_of_the_prompt(named_by_rules, tmp_path):
    found, complaints = ask(
        named_by_rules,
        """const lefts = places => [...document.querySelectorAll(places)].map(
          place => Math.round(place.getBoundingClientRect().left));
        return {tokens: lefts(".colored-tokens > span"), strip: lefts("[data-strip=SFT] > span"),
          given: document.getElementById("left-pattern").asked.props.tokens,
          axis: [...document.querySelectorAll("#lens-shown .xtick text")].map(t => t.textContent),
          hover: document.getElementById("lens-shown").data[0].hovertext[0][2],
        };""",
        tmp_path,
        width=1400,
    )
    assert complaints == []
    for row in (found["tokens"], found["strip"]):
        assert len(row) == N
        assert row == sorted(row)
    shown = [visible(token) for token in BACKWARDS]
    right = {2, 3, 4, 6}
    isolated = [f"\u2066{t}\u2069" if i in right else t for i, t in enumerate(shown)]
    # CircuitsVis writes a token's position behind it.
    assert found["given"] == isolated
    assert found["axis"] == shown
    assert found["hover"].startswith("position 2 <b>\u2066␣של\u2069</b>, embeddings (0_pre)<br>")
    assert "<br>2. <b>\u2066ום\u2069</b> 0." in found["hover"]


@pytest.mark.slow
def test_several_sources_have_numbers_besides_colours(data, tmp_path):
    task = np.zeros((len(COMPONENTS), N))
    task[:, 2] = 1
    sft = np.zeros_like(task)
    sft[1, 4], task[1, 4] = 0.5, 0.25
    mixed = Run("x", patterns(9), np.zeros(N), None, {"sft": sft, "task": task}, ["x"] * N)
    made = make(runs=dict(data.runs) | {"FE+LT": mixed}, sources=("pre", "sft", "task"))
    path = Dashboard(made).save(tmp_path / "page.html")
    strip = re.search(r"data-strip='FE\+LT'>(.*?)</p>", path.read_text(encoding="utf-8"))[1]
    assert "␣&lt;b&gt;<sup>2</sup></span>" in strip
    assert "↵<sup>1</sup><sup>2</sup></span>" in strip
    found, complaints = ask(
        path,
        SET
        + """const cell = document.querySelectorAll("#grid tbody tr")[1].children[5];
        return [cell.textContent, cell.title];""",
        tmp_path,
    )
    assert complaints == []
    assert found[0] == "501252"
    of_all = "of its layers and heads"
    assert found[1] == f"q at position 4: sft in 50% {of_all}, task in 25% {of_all}"


# --- attention in a notebook -----------------------------------------------------------------


def test_the_attention_view_runs_in_a_notebooks_frame(tmp_path):
    pattern = patterns(1)[0]
    view = attention.attention_view(pattern, TOKENS, [f"L0H{h}" for h in range(HEADS)])
    outer = tmp_path / "notebook.html"
    outer.write_text(
        f"<!DOCTYPE html><title>n</title><body>{view._repr_html_()}</body>",
        "utf-8",
    )
    found, complaints = ask(
        outer,
        """const inside = document.querySelector("iframe").contentDocument;
        const rest = () => new Promise(done => setTimeout(done, 300));
        const large = () => [...inside.querySelectorAll("canvas")].at(-1).toDataURL();
        const names = () => [...inside.querySelectorAll("h2, h3")].map(h => h.textContent);
        const before = [names(), large()];
        [...inside.querySelectorAll("h4")][2].closest("div[style*=padding]").click();
        await rest();
        const after = [names(), large()], small = [...inside.querySelectorAll("[role=button]")];
        small[1].focus();
        small[1].dispatchEvent(new KeyboardEvent("keydown", {key: "Enter", bubbles: true}));
        await rest();
        return {before, after, keyed: names(), reached: small.map(head => head.tabIndex),
          heads: [...inside.querySelectorAll("h4")].map(h => h.textContent)};""",
        tmp_path,
    )
    assert complaints == []
    assert found["heads"] == ["L0H0", "L0H1", "L0H2", "L0H3"]
    assert found["before"][0][1:] == ["L0H0 Zoomed", "L0H0"]
    assert found["after"][0][1:] == ["L0H2 Zoomed", "L0H2"]
    assert found["after"][1] != found["before"][1]
    assert found["keyed"][1:] == ["L0H1 Zoomed", "L0H1"]
    assert found["reached"] == [0] * HEADS


def test_the_attention_view_has_the_numbers_and_a_fitting_scale():
    def props(pattern):
        html = attention.attention_view(pattern, TOKENS).html
        start = html.index("CircuitsVis.AttentionHeads, {") + len("CircuitsVis.AttentionHeads, ")
        return json.JSONDecoder().raw_decode(html[start:])[0], html

    one, two = patterns(1)[0], patterns(2)[0]
    given, html = props(one)
    assert given["attention"][2][3] == pytest.approx(one[2, 3, :4], abs=1e-4)
    assert given["tokens"] == SHOWN
    assert given["attentionHeadNames"] == ["head 0", "head 1", "head 2", "head 3"]
    assert (given["minValue"], given["maxValue"]) == (-1.0, 1.0)
    assert "from 0 to 1" in html
    given, html = props(one - two)
    limit = np.abs(np.tril(one - two)).max()
    assert (-given["minValue"], given["maxValue"]) == pytest.approx((limit, limit))
    assert given["positiveColor"] == attention.POSITIVE
    assert f"from −{limit:.2g} (blue) to {limit:.2g} (red)" in html


def test_a_view_of_the_wrong_shape_names_the_fix():
    with pytest.raises(ValueError, match=r"shape \(3, 4, 8, 8\).*\[head, 8, 8\] for 8 tokens"):
        attention.attention_view(patterns(0), TOKENS)
    with pytest.raises(ValueError, match="2 names for 4 heads; give one name per head"):
        attention.attention_view(patterns(0)[0], TOKENS, ["a", "b"])
    with pytest.raises(ValueError, match="not finite"):
        attention.attention_view(np.full((1, 2, 2), np.nan), ["a", "b"])


def test_without_circuitsvis_the_fix_is_named(monkeypatch, data):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install circuitsvis"):
        dashboard_page(data)


# --- what cannot be shown --------------------------------------------------------------------


def test_data_that_do_not_go_together_name_the_value(data):
    runs = dict(data.runs)
    with pytest.raises(ValueError, match=r"runs are 'SFT', 'PRE'; the first two must be 'PRE'"):
        make(runs={"SFT": runs["SFT"], "PRE": runs["PRE"]})
    with pytest.raises(ValueError, match=r"'PRE': pattern has shape .*the prompt has 7 tokens"):
        make(tokens=TOKENS[:-1])
    with pytest.raises(
        ValueError, match=r"'PRE': shares\['pre'\] has shape \(4, 8\).*1 components"
    ):
        make(components=("q",))
    with pytest.raises(ValueError, match=r"'PRE': shares of source 'pre'; the sources are 'x'"):
        make(sources=("x",))
    short = Run("x", runs["PRE"].pattern, np.zeros(3), None, {}, [""] * N)
    with pytest.raises(ValueError, match=r"'a': token_logprobs has shape \(3,\).*\(8,\)"):
        make(runs=runs | {"a": short})
    logits = Run("x", runs["PRE"].pattern * 5, np.zeros(N), None, {}, [""] * N)
    with pytest.raises(ValueError, match=r"'a': pattern goes from 0 to 5.*softmax"):
        make(runs=runs | {"a": logits})


def test_tables_that_lack_rows_name_the_run(data):
    part = data.lens[(data.lens["graft"] != "SFT") | (data.lens["position"] != 2)]
    with pytest.raises(ValueError, match=r"28 rows of run 'SFT'.*4 layers and 8 positions.*'all'"):
        dashboard_page(make(lens=part))
    two = data.lens.assign(prompt=np.arange(len(data.lens)) % 2)
    with pytest.raises(ValueError, match="2 prompts; give the rows of one"):
        dashboard_page(make(lens=two))
    gone = data.kl_divergence.query("graft != 'FE+LT'")
    with pytest.raises(ValueError, match=r"KL divergences has 0 rows of run 'FE\+LT'"):
        dashboard_page(make(kl_divergence=gone))


# --- pictures --------------------------------------------------------------------------------


def picture(path):
    """Width, height and the first pixel of a PNG."""
    content = path.read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    packed, at = b"", 8
    while at < len(content):
        (size,) = struct.unpack(">I", content[at : at + 4])
        if content[at + 4 : at + 8] == b"IDAT":
            packed += content[at + 8 : at + 8 + size]
        at += size + 12
    # After the first row's filter byte; every filter leaves the first pixel as it is.
    return width, height, tuple(zlib.decompress(packed)[1:4])


def rgb(color):
    return tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))


@pytest.mark.slow
def test_a_picture_of_the_page(written, data, tmp_path, monkeypatch):
    needs("choreographer")
    monkeypatch.setenv("BROWSER_PATH", chromium())
    one = screenshot(written, tmp_path / "one.png", width=500, height=300, scale=2)
    assert picture(one) == (1000, 600, rgb(theme.LIGHT.surface))
    whole = Dashboard(data).save_image(tmp_path / "two.png", width=900, scale=1, dark=True)
    width, height, ground = picture(whole)
    assert width == 900
    assert height > 2000
    assert ground == rgb(theme.DARK.surface)
    with pytest.raises(ValueError, match=r"up to 16384 per side: give height= or a smaller scale="):
        screenshot(written, tmp_path / "three.png", width=900, scale=20)
    assert not (tmp_path / "three.png").exists()


def test_a_picture_that_cannot_be_taken_names_the_fix(written, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"there is no page '.*none\.html'; save it first"):
        screenshot(tmp_path / "none.html", tmp_path / "a.png")
    with pytest.raises(ValueError, match="width=0; it must be greater than 0"):
        screenshot(written, tmp_path / "a.png", width=0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"pip install 'graftlens\[plots\]'"):
        screenshot(written, tmp_path / "a.png")
