"""Files of users as they come: of other encodings, endings and scripts."""

import json
import sys
import unicodedata
from types import SimpleNamespace

import pandas as pd
import pytest

from graftlens.configfile import ConfigError, settings_from
from graftlens.data import ArticlesSpec
from graftlens.data.articlefiles import read_articles
from graftlens.data.articleprompts import Index
from graftlens.data.counterfact import CounterFactSpec
from graftlens.data.sentences import occurrences, words
from graftlens.data.wikipedia import download
from graftlens.experiment.config import find_experiment
from graftlens.folder import parse_json
from graftlens.sweep.promptsets import PromptFile, prompt_sections

#: Where str.splitlines would cut, beside what ends a line.
SEPARATORS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"

PROMPT = {"template": f"{{x}} sat{SEPARATORS} on", "answer": " it", "fields": {"x": "Ann"}}
ARTICLE = {
    "id": "a",
    "text": f"Ann sings{SEPARATORS}. Ann is a friend of Bo. Ann met Bo in May.",
    "facts": [{"first_entity": "Ann", "second_entity": "Bo"}],
}


def row(prompt: str, subject: str, **changed: str) -> dict[str, str]:
    given = {
        "relation": "r", "relation_id": "P1", "prompt": prompt, "subject": subject,
        "target_true": "true", "target_false": "false",
    }  # fmt: skip
    return given | changed


# -- encodings, endings, separators ----------------------------------------------------------------


@pytest.mark.parametrize("ending", [".jsonl", ".JSONL", ".Jsonl"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("new_line", [b"\n", b"\r\n"])
def test_json_lines_are_read_as_a_person_sees_them(tmp_path, ending, mark, new_line):
    """A byte order mark was `Unexpected UTF-8 BOM`, .JSONL was read as YAML, and a line separator
    inside of a text cut its line."""

    def write(name: str, *rows: dict) -> str:
        said = (json.dumps(one, ensure_ascii=False).encode() + new_line for one in rows)
        (tmp_path / f"{name}{ending}").write_bytes(mark + b"".join(said))
        return str(tmp_path / f"{name}{ending}")

    prompts = PromptFile(file=write("p", PROMPT, PROMPT | {"answer": " him"})).prompts()
    assert [p.template for p in prompts] == [PROMPT["template"]] * 2
    assert [p.answer for p in prompts] == [" it", " him"]
    (article,) = ArticlesSpec(path=write("a", ARTICLE)).collect()
    assert (article.first_entity, article.second_entity) == ("Ann", "Bo")
    rows = [row(f"Ann{SEPARATORS}x lives in", "Ann"), row("Bo lives in", "Bo")]
    facts = CounterFactSpec(file=write("c", *rows)).collect()
    assert {fact.prompt for fact in facts} == {one["prompt"] for one in rows}


@pytest.mark.parametrize("kind", ["JSON", "CSV", "Parquet"])
def test_endings_of_counterfact_are_of_any_case(tmp_path, kind):
    rows = [row("Ann lives in", "Ann"), row("None lives in", "None", target_true="NA")]
    file = tmp_path / f"c.{kind}"
    if kind == "JSON":
        file.write_bytes(b"\xef\xbb\xbf" + json.dumps(rows).encode())
    elif kind == "CSV":
        file.write_bytes(b"\xef\xbb\xbf" + pd.DataFrame(rows).to_csv(index=False).encode())
    else:
        pd.DataFrame(rows).to_parquet(file)
    assert {(f.subject, f.other_target) for f in CounterFactSpec(file=file).collect()} == {
        ("Ann", "true"),
        ("None", "NA"),
    }


def test_a_json_list_of_prompts_is_json(tmp_path):
    """It was read as YAML, which folds line separators and knows no tab between the keys."""
    (tmp_path / "p.JSON").write_text("\ufeff[\n\t" + json.dumps(PROMPT, ensure_ascii=False) + "]")
    (prompt,) = PromptFile(file=str(tmp_path / "p.JSON")).prompts()
    assert prompt.template == PROMPT["template"]
    (tmp_path / "p.JSON").write_text(json.dumps(PROMPT))
    with pytest.raises(ValueError, match=r"p\.JSON holds a dict"):
        PromptFile(file=str(tmp_path / "p.JSON")).prompts()


LATIN = "Zoë".encode("latin-1")


def test_other_encodings_are_refused_by_name(tmp_path):
    """The user read Python's `'utf-8' codec can't decode byte 0xeb in position 2`."""
    for name in ("x.jsonl", "x.yaml", "x.csv", "x.json"):
        (tmp_path / name).write_bytes(b'"' + LATIN + b'"\n')
    folder = tmp_path / "articles"
    folder.mkdir()
    (folder / "a.txt").write_bytes(LATIN)
    (folder / "a.json").write_text("{}")

    def said(read, *names) -> None:
        for name in names:
            with pytest.raises(ValueError, match=rf"{name} is not UTF-8 text .*Save it as UTF-8"):
                read(tmp_path / name)

    said(lambda file: PromptFile(file=str(file)).prompts(), "x.jsonl", "x.yaml", "x.json")
    said(lambda file: CounterFactSpec(file=file).collect(), "x.jsonl", "x.json", "x.csv")
    said(lambda file: ArticlesSpec(path=file).collect(), "x.jsonl")
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 text"):
        read_articles(folder)
    # UTF-16, as Windows' Notepad writes it, is of another encoding, too.
    (tmp_path / "w.jsonl").write_bytes(json.dumps(PROMPT).encode("utf-16"))
    said(lambda file: PromptFile(file=str(file)).prompts(), "w.jsonl")


def test_a_key_that_appears_twice_is_refused(tmp_path):
    """Python keeps the last one without a word."""
    twice = '{"template": "a", "template": "b", "answer": " c"}\n'
    (tmp_path / "p.jsonl").write_text(json.dumps(PROMPT) + "\n" + twice)
    with pytest.raises(ConfigError, match=r"line 2: it: the key 'template' .*twice.*p\.jsonl"):
        PromptFile(file=str(tmp_path / "p.jsonl")).prompts()
    (tmp_path / "a.jsonl").write_text('{"id": "a", "id": "b"}')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: the key 'id' appears twice"):
        read_articles(tmp_path / "a.jsonl")
    (tmp_path / "c.jsonl").write_text('{"prompt": "a", "prompt": "b"}')
    with pytest.raises(ValueError, match=r"c\.jsonl, line 1: the key 'prompt' appears twice"):
        CounterFactSpec(file=tmp_path / "c.jsonl").collect()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": "\\ud83d"}', "half of a character"),
        ("1" * 5000, "a number of 5000 digits is too long"),
        ("[" * 100_000, "nested too deeply"),
        ("{", "is not JSON"),
    ],
)
def test_json_that_python_trips_over_is_refused_in_our_words(tmp_path, text, message):
    with pytest.raises(ValueError, match=f"file.*{message}"):
        parse_json(text, "file")
    for read in (read_articles, lambda file: CounterFactSpec(file=file).collect()):
        (tmp_path / "x.jsonl").write_text(text)
        with pytest.raises(ValueError, match=r"x\.jsonl"):
            read(tmp_path / "x.jsonl")
    assert parse_json('"\\ud83d\\ude00"', "file") == "😀"


def test_articles_endings_are_of_any_case(tmp_path):
    (tmp_path / "One.TXT").write_text("\ufeff" + ARTICLE["text"], encoding="utf-8")
    (tmp_path / "One.Json").write_text(json.dumps({"facts": ARTICLE["facts"]}))
    (article,) = read_articles(tmp_path)
    assert article.id == "One"
    assert article.text.startswith("Ann sings")
    (tmp_path / "One.txt").write_text("again")
    with pytest.raises(ValueError, match=r"has One\.TXT and One\.txt\. Keep one of them"):
        read_articles(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.csv", b""),
        ("x.csv", b'a,b\n"'),
        ("x.csv", b"a,b\n1,2\n1,2,3,4\n"),
        ("x.parquet", b"PAR1"),
        ("x.parquet", b""),
        ("x.json", b"[1, 2]"),
        ("x.json", b"null"),
        ("x.jsonl", b"\n"),
        ("x.jsonl", b"[3]"),
    ],
)
def test_rows_that_cannot_be_read_name_their_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} cannot be read as .*It should hold rows with"):
        CounterFactSpec(file=tmp_path / name).collect()


def test_an_experiments_file_is_read_as_a_person_sees_it(tmp_path):
    said = (
        "title: T\nquestion: Zoë?\ndatasets: {films: {n_facts: 3}}\nmodels: {sft: {data: films}}\n"
        "parts: {one: {title: P, prompts: {dataset: films}, grafts: {LT: sft @ last}}}\n"
    )
    (tmp_path / "E.YAML").write_text(said, encoding="utf-8")
    found = find_experiment(str(tmp_path / "E.YAML"))
    assert (found.name, found.config.question, found.text) == ("E", "Zoë?", said)


def test_home_is_found_in_prompts_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.jsonl").write_text(json.dumps(PROMPT))
    assert len(PromptFile(file="~/p.jsonl").prompts()) == 1
    with pytest.raises(ValueError, match="home folder of a user who does not exist"):
        PromptFile(file="~nobody-of-that-name/p.jsonl").prompts()
    assert len(prompt_sections({"file": "~/p.jsonl"}, None)) == 1


# -- names in every script -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "count"),
    [
        # Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan: no space between words.
        ("北京是哪个国家的首都", "北京", 1),
        ("中国的首都是北京，北京在", "北京", 2),
        ("東京タワーは東京の", "東京", 2),
        ("ドイツ語で", "ドイツ", 1),
        ("iPhoneはアップルの", "iPhone", 1),
        ("わたしはさくらです", "さくら", 1),
        ("กรุงเทพมหานครตั้งอยู่ใน", "กรุงเทพมหานคร", 1),
        ("ວຽງຈັນຢູ່", "ວຽງຈັນ", 1),
        ("ភ្នំពេញស្ថិតនៅ", "ភ្នំពេញ", 1),
        ("ရန်ကုန်သည်", "ရန်ကုန်", 1),
        # A word in katakana is one, and a vowel sign belongs to its letter.
        ("イギリスは", "リス", 0),
        ("ロンドンブーツ", "ロンドン", 0),
        ("ภาษี", "ภาษ", 0),
        # Korean: particles, and nothing else, may follow.
        ("서울은", "서울", 1),
        ("서울에서는", "서울", 1),
        ("세종대왕이", "세종대왕", 1),
        ("파리에", "파리", 1),
        ("김연아입니다", "김연아", 1),
        ("NASA는 BTS의", "NASA", 1),
        ("서울대학교의", "서울", 0),
        ("남서울은", "서울", 0),
        # Arabic and Hebrew: prefixes.
        ("عاصمة مصر هي القاهرة", "القاهرة", 1),
        ("وباريس في", "باريس", 1),
        ("بالقاهرة", "القاهرة", 1),
        ("للقاهرة", "قاهرة", 1),
        ("سباريس", "باريس", 1),
        ("صباريس", "باريس", 0),
        ("باريسي", "باريس", 0),
        ("ובפריז", "פריז", 1),
        ("גפריז", "פריז", 0),
        # Marks belong to the letter before them, in every form.
        ("हिन्दी भाषा", "हिन्द", 0),
        ("हिन्दी भाषा", "हिन्दी", 1),
        ("अंग्रेज़ी", "ग्रेज़ी", 0),
        ("Rene\u0301 sang", "Rene", 0),
        ("Rene\u0301 sang", "Rene\u0301", 1),
        ("xe\u0301Ann", "Ann", 0),
        # What was so before.
        ("Pineapple", "apple", 0),
        ("Mary-Ann Ann-Lee Ann2 _Ann", "Ann", 0),
        ("Ann's (Ann)", "Ann", 2),
        ("K. T.x K. T. y", "K. T.", 1),
        ("aX Y X Y X", "X Y X", 1),
        ("Ann", " ", 0),
    ],
)  # fmt: skip
def test_a_name_is_a_whole_in_its_script(text, name, count):
    """Where no space is between words, no name was found: `\\w` was on both sides of its end."""
    found = occurrences(text, name)
    assert len(found) == count
    assert all(text[a:b] == name for a, b in found)


def test_rows_in_every_script_are_kept(tmp_path):
    """Rows in Chinese, Japanese, Thai, Korean and Arabic were dropped as "does not contain the full
    name of the subject"."""
    rows = [
        row("北京是哪个国家的首都？答案是", "北京", target_true="中国", target_false="日本"),
        row("東京の国は", "東京"),
        row("กรุงเทพเป็นเมืองหลวงของ", "กรุงเทพ"),
        row("서울은 어느 나라의", "서울"),
        row("تقع القاهرة في", "القاهرة"),
        row("وباريس في", "باريس"),
        row("हिन्दी की लिपि", "हिन्दी"),
    ]
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows))
    facts = {fact.subject: fact for fact in CounterFactSpec(file=tmp_path / "c.jsonl").collect()}
    assert set(facts) == {r["subject"] for r in rows}
    assert facts["北京"].template == "{first_entity}是哪个国家的首都？答案是"
    assert facts["北京"].target == "日本"
    assert facts["باريس"].template == "و{first_entity} في"


def test_a_subject_in_another_unicode_form_is_found(tmp_path):
    """A Mac's "é" of two characters was not that of the prompt."""
    texts = ("René Descartes", "한국", "ヴォルガ", "Đà Nẵng")
    for one, other in (("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")):
        rows = [
            row(unicodedata.normalize(one, f"{t} is in"), unicodedata.normalize(other, t))
            for t in texts
        ]
        (tmp_path / "c.jsonl").write_text(
            "\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
        )
        facts = CounterFactSpec(file=tmp_path / "c.jsonl").collect()
        assert {fact.prompt for fact in facts} == {f"{text} is in" for text in texts}


def test_articles_in_such_scripts_are_held_apart(tmp_path):
    """The index of words has runs of letters: `東京` is in none of them, and an article that tells
    another one's fact must be found all the same."""
    assert words("BTS는 東京Tower l'été") == ["BTS", "Tower", "l", "été"]
    first = {"first_entity": "東京", "second_entity": "佐藤"}
    given = [
        {"id": "a", "text": "東京 は 佐藤 です。 東京 は 佐藤 でした。", "facts": [first]},
        {"id": "b", "text": "東京では佐藤が。 Ann met Bo. Ann met Bo.",
         "facts": [{"first_entity": "Ann", "second_entity": "Bo"}]},
        {"id": "c", "text": "Cy met Di. Cy met Di again.",
         "facts": [{"first_entity": "Cy", "second_entity": "Di"}]},
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(g, ensure_ascii=False) for g in given))
    index = Index([one["text"] for one in given])
    assert index.naming(("東京", "佐藤")) == {0, 1}
    assert index.naming(("Ann", "Bo")) == {1}


# -- Wikipedia ---------------------------------------------------------------------------------


@pytest.fixture
def wikipedia(monkeypatch):
    """A client whose every article has the same text."""

    def page(title):
        if title == "Broken":
            raise KeyError("pages")
        return SimpleNamespace(
            exists=lambda: True, title=title, summary="Text.", sections=[], fullurl="u", lastrevid=1
        )

    client = SimpleNamespace(
        WikipediaException=RuntimeError,
        Wikipedia=lambda user_agent, language: SimpleNamespace(page=page),
    )
    monkeypatch.setitem(sys.modules, "wikipediaapi", client)


def test_a_download_overwrites_no_text_of_somebody_else(wikipedia, tmp_path):
    """NAME.txt without NAME.json was written over."""
    (tmp_path / "Ann.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"Ann\.txt exists without Ann\.json"):
        download(["Ann"], tmp_path)
    assert (tmp_path / "Ann.txt").read_text() == "mine"
    # What an interrupted call left is taken up.
    (tmp_path / "Ann.txt").write_text("Text.\n")
    assert download(["Ann"], tmp_path) == (tmp_path / "Ann.txt",)
    assert (tmp_path / "Ann.json").is_file()


def test_titles_are_names_of_files_everywhere(wikipedia, tmp_path):
    long = "東" * 85
    files = download(["Con", "../../x", "/etc/passwd", long], tmp_path)
    assert [f.name for f in files[:3]] == ["Con_.txt", "x.txt", "etc_passwd.txt"]
    assert len(files[3].name.encode()) < 130
    assert all(f.parent == tmp_path for f in files)
    with pytest.raises(ValueError, match=r"'US', 'Us' would both be the file US\.txt"):
        download(["US", "Us"], tmp_path)
    with pytest.raises(OSError, match=r"'Broken' could not be downloaded from en\..*KeyError"):
        download(["Broken"], tmp_path)
    with pytest.raises(ValueError, match="in one line of 5 characters or more"):
        download(["A"], tmp_path, user_agent="me\r\nX-Header: 1")


def test_numbers_of_rewrites_are_bounded():
    with pytest.raises(ConfigError, match="n: 1000000000 should be less than or equal to 1000"):
        settings_from(ArticlesSpec, {"rewrites": {"model": "m", "n": 10**9}})
