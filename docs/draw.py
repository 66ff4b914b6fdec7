"""The pictures of docs/ and README, in a light and a dark version.

    .venv/bin/python docs/draw.py
    .venv/bin/python docs/draw.py --demo graftlens-runs/demo/facts-40-epochs-6-seed-0

The second reads again what the demo found, which `pictures/sentences.json` keeps.
"""

import argparse
import json
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, SubElement, indent, tostring

import pandas as pd

from graftlens.viz.theme import BLUE, DARK, GREEN, GREY, LIGHT, VERMILION, Theme

FOLDER = Path(__file__).parent / "pictures"

#: Versions, by the ends of their files' names.
THEMES = {"light": LIGHT, "dark": DARK}


class Drawing:
    """An SVG picture in one theme, whose text says what it shows to those who do not see it."""

    def __init__(self, width: int, height: int, theme: Theme, says: str) -> None:
        self.theme = theme
        size = {"viewBox": f"0 0 {width} {height}", "width": str(width), "height": str(height)}
        self.root = Element(
            "svg",
            xmlns="http://www.w3.org/2000/svg",
            role="img",
            **size,
            **{"font-family": "system-ui, sans-serif", "font-size": "14", "fill": theme.text},
        )
        SubElement(self.root, "title").text = says
        head = SubElement(
            SubElement(self.root, "defs"),
            "marker",
            id="head",
            viewBox="0 0 8 8",
            refX="7",
            refY="4",
            markerWidth="7",
            markerHeight="7",
            orient="auto",
        )
        SubElement(head, "path", d="M0 0 8 4 0 8z", fill=theme.muted)
        self.shape("rect", width=width, height=height, rx=8, fill=theme.surface)

    def shape(self, tag: str, **attributes: float | str) -> Element:
        named = {key.replace("_", "-"): str(value) for key, value in attributes.items()}
        return SubElement(self.root, tag, named)

    def text(self, x: float, y: float, said: str, **attributes: float | str) -> None:
        self.shape("text", x=x, y=y, **attributes).text = said

    def note(self, x: float, y: float, said: str, **attributes: float | str) -> None:
        self.text(x, y, said, font_size=12.5, fill=self.theme.muted, **attributes)

    def box(self, x: float, y: float, w: float, h: float, color: str, said: str = "") -> None:
        """A box in a source's colour, with a word in the middle."""
        self.shape(
            "rect", x=x, y=y, width=w, height=h, rx=4, fill=color, fill_opacity=0.22, stroke=color
        )
        if said:
            self.text(x + w / 2, y + h / 2 + 5, said, text_anchor="middle")

    def line(self, x1: float, y1: float, x2: float, y2: float, **attributes: float | str) -> None:
        """A curve from left to right, or a straight line where the ends are on one height."""
        half = (x2 - x1) / 2
        way = f"M{x1} {y1} C{x1 + half} {y1} {x2 - half} {y2} {x2} {y2}"
        look = {"fill": "none", "stroke": self.theme.muted, "stroke_width": 1.3}
        self.shape("path", d=way, **(look | attributes))

    def svg(self) -> str:
        indent(self.root)
        return tostring(self.root, encoding="unicode") + "\n"


#: The prompt of the drawings: its tokens (some are several in truth), and where SFT's weights run.
TOKENS = ("News:", "Chelsea", "Mcintosh", "to appear", "alongside")
SFT_AT = (1, 2, 4)


def forward(theme: Theme) -> Drawing:
    """Rows sorted by source, multiplied, put back; then attention."""
    draw = Drawing(
        860,
        330,
        theme,
        "The blocked forward. At a linear map, the rows of the prompt's tokens are sorted by their "
        "source: those of SFT are multiplied by SFT's weight, those of PRE by PRE's, and all go "
        "back to their places. In attention, each row reads the keys and values of earlier rows, "
        "whichever weights made them.",
    )
    color = [VERMILION if at in SFT_AT else GREY for at in range(len(TOKENS))]
    rows = [92 + 40 * at for at in range(len(TOKENS))]
    order = [*SFT_AT, *(at for at in range(len(TOKENS)) if at not in SFT_AT)]
    gap = [0 if at < len(SFT_AT) else 22 for at in range(len(TOKENS))]
    blocks = [81 + 40 * at + gap[at] for at in range(len(TOKENS))]
    for x, said in ((20, "1. rows in order"), (205, "2. by source"), (360, "3. one product"),
                    (520, "4. put back"), (690, "attention")):  # fmt: skip
        draw.text(x, 40, said, font_weight=600)
    draw.note(360, 58, "per source")
    draw.note(690, 58, "the only place")
    draw.note(690, 74, "where rows meet")
    for at, token in enumerate(TOKENS):
        draw.box(20, rows[at] - 13, 120, 30, color[at], token)
        draw.box(520, rows[at] - 13, 100, 30, color[at])
        to = blocks[order.index(at)]
        draw.line(142, rows[at] + 2, 203, to + 2)
        draw.box(205, to - 13, 100, 30, color[at], token)
        draw.line(454, to + 2, 518, rows[at] + 2)
    for first, last, source in ((0, 2, "SFT"), (3, 4, "PRE")):
        top, bottom = blocks[first] - 13, blocks[last] + 17
        middle = (top + bottom) / 2
        draw.text(330, middle + 5, "×", text_anchor="middle", font_size=18)
        hue = VERMILION if source == "SFT" else GREY
        draw.box(350, middle - 34, 100, 68, hue, f"W of {source}")
    last = len(TOKENS) - 1
    for at in range(len(TOKENS)):
        draw.box(690, rows[at] - 9, 50, 22, color[at], "k, v")
        draw.line(622, rows[at] + 2, 688, rows[at] + 2)
        draw.line(742, rows[at] + 2, 792, rows[last] + 2, stroke=color[at])
    draw.box(794, rows[last] - 13, 46, 30, color[last], "q")
    said = "Nothing is overwritten, and no difference of weights is added: "
    draw.note(20, 312, f"{said}a row of SFT is computed with SFT's own numbers.")
    return draw


def tree(theme: Theme) -> Drawing:
    """Three grafts of one prompt as a tree of rows."""
    draw = Drawing(
        860,
        400,
        theme,
        "The token tree of three grafts on a prompt of five tokens, in a model of four layers. All "
        "three share the rows of the first four tokens. At the last token, the graft of all layers "
        "has rows of its own from the first layer on; the graft of layer 3 shares PRE's rows of "
        "layers 1 and 2 and has its own in layers 3 and 4. So 26 rows are computed instead of 60.",
    )
    layers, left, step = 4, 130, 110
    height = [316 - 70 * layer for layer in range(layers)]
    for layer, y in enumerate(height, start=1):
        draw.note(24, y + 5, f"layer {layer}")
        draw.shape("line", x1=84, x2=650, y1=y, y2=y, stroke=theme.grid)
    last = left + step * 4
    for at, token in enumerate(TOKENS):
        draw.text(left + step * at, 368, token, text_anchor="middle")
        if at < 4:
            for y in height:
                draw.shape("circle", cx=left + step * at, cy=y, r=11, fill=GREY)
    ways = (  # (the layers of its own rows, where these are drawn, their colour)
        ("PRE; the others read it", "where nothing differs", range(layers), last - 34, GREY),
        ("SFT at the last token", "in layer 3", range(2, layers), last, BLUE),
        ("SFT at the last token", "in all layers", range(layers), last + 34, GREEN),
    )
    for *_, own, x, color in ways:
        for layer in own:
            if layer:
                below = x if layer - 1 in own else last - 34
                ends = {"y1": height[layer - 1] - 11, "y2": height[layer] + 11}
                draw.shape("line", x1=below, x2=x, stroke=color, stroke_width=2, **ends)
            draw.shape("circle", cx=x, cy=height[layer], r=11, fill=color)
    for y in height:
        draw.line(left + step * 3 + 12, y, last - 48, y, marker_end="url(#head)")
    key = 672
    draw.text(key, 40, "rows", font_weight=600)
    for number, (name, where, own, _, color) in enumerate(ways):
        y = 68 + 62 * number
        draw.shape("circle", cx=key + 9, cy=y - 5, r=8, fill=color)
        draw.text(key + 26, y, name, font_size=12.5)
        draw.text(key + 26, y + 17, where, font_size=12.5)
        draw.note(key + 26, y + 34, f"{len(TOKENS) * layers if color == GREY else len(own)} rows")
    draw.text(key, 290, "26 rows", font_weight=600)
    draw.note(key, 308, "instead of 3 × 20 = 60")
    said = "In each layer, the last token's rows read "
    draw.note(20, 392, f"{said}the shared keys and values of the tokens before it.")
    return draw


#: What the demo's model says under two grafts, as `seen` found it.
SEEN = FOLDER / "sentences.json"

#: In words, which tokens the two grafts are of.
WHERE = {
    "FE+LT": "finetuned weights at the name and at the last token",
    "(FE+LT)^C": "finetuned weights at all other tokens",
}

#: Advance of a character of the sentences, which are in a monospaced font, in its size.
ADVANCE = 0.602


def seen(run: Path) -> dict[str, Any]:
    """What the demo's results in a folder say of its first headline under FE+LT and its complement.

    Its tokens, which of them are grafted, the likeliest next token, and the share of all headlines
    of which that is right, with its interval.
    """
    from transformers import AutoTokenizer

    from graftlens import position_grafts, summarise
    from graftlens.data import evaluation_prompts, make_facts
    from graftlens.prompts import tokenize
    from graftlens.reports import example

    table = pd.read_parquet(run / "results.parquet")
    asked = table[table["template"] == "headline"]
    rows = asked[asked["prompt"] == asked["prompt"].min()]
    prompt = evaluation_prompts(make_facts(40, seed=0), templates=["headline"])[0]
    tokenizer = AutoTokenizer.from_pretrained(run / "finetune/model")
    tokens = tokenize(prompt, tokenizer)
    texts = [tokenizer.decode([token]) for token in tokens.ids]
    grafts = {name: position_grafts()[name] for name in ("FE+LT", "(FE+LT)^C")}
    shown = example("headline", prompt, tokens, texts, grafts, rows)
    summary = summarise(asked, seed=0, recovery="logprob").set_index("graft")
    found = {
        name: {
            "grafted": shown.grafted[name],
            "says": shown.predictions[name][0][0],
            "right": [float(summary.at[name, key]) for key in ("top1", "top1_low", "top1_high")],
        }
        for name in grafts
    }
    prompts = asked["prompt"].nunique()
    return {"tokens": texts, "answer": prompt.answer, "prompts": prompts, "grafts": found}


def sentences(theme: Theme) -> Drawing:
    """One prompt twice, coloured by where SFT's weights run, with what the model says."""
    facts = json.loads(SEEN.read_text(encoding="utf-8"))
    draw = Drawing(
        860,
        250,
        theme,
        "One prompt under two grafts. " + " ".join(
            f"{name}: the model goes on with{graft['says']!r}, and is right on "
            f"{graft['right'][0]:.0%} of {facts['prompts']} prompts."
            for name, graft in facts["grafts"].items()
        ),
    )  # fmt: skip
    size = 15.5
    for number, (name, graft) in enumerate(facts["grafts"].items()):
        y = 78 + 108 * number
        x = 24.0
        right, low, high = (100 * value for value in graft["right"])
        draw.text(x, y - 34, name, font_weight=600)
        draw.note(x + 100, y - 34, WHERE[name])
        for token, on in zip(facts["tokens"], graft["grafted"], strict=True):
            wide = ADVANCE * size * len(token)
            color = VERMILION if on else GREY
            draw.shape("rect", x=x, y=y - 18, width=wide, height=25, fill=color,
                       fill_opacity=0.35 if on else 0.14)  # fmt: skip
            if on:  # not by colour alone
                draw.shape("rect", x=x, y=y + 7, width=wide, height=2.5, fill=color)
            look = {"font_family": "monospace", "font_size": size, "xml:space": "preserve"}
            draw.text(x, y, token, textLength=f"{wide:.1f}", **look)
            x += wide
        says, answer = graft["says"].strip(), facts["answer"].strip()
        draw.text(x + 12, y, f"→ {says}", font_size=size, font_weight=700)
        if not answer.startswith(says):
            draw.note(x + 118, y, f"(right: {answer})")
        draw.text(24, y + 34, f"{right:.1f} %", font_weight=600)
        draw.note(88, y + 34, f"of {facts['prompts']} films right  [{low:.0f}, {high:.0f}]")
    return draw


DRAWINGS = {"forward": forward, "sentences": sentences, "tree": tree}


def write(folder: Path = FOLDER) -> None:
    """Write every drawing, in both themes."""
    folder.mkdir(exist_ok=True)
    for name, drawn in DRAWINGS.items():
        for end, theme in THEMES.items():
            (folder / f"{name}-{end}.svg").write_text(drawn(theme).svg(), encoding="utf-8")


if __name__ == "__main__":
    asked = argparse.ArgumentParser(description="Draw the pictures of docs/ and README.")
    asked.add_argument("--demo", type=Path, help="the demo's folder, whose results to draw")
    if run := asked.parse_args().demo:
        found = json.dumps(seen(run), indent=1, ensure_ascii=False)
        SEEN.write_text(f"{found}\n", encoding="utf-8")
    write()
