"""Wikipedia articles, as files to which facts can be added."""

import json
import re
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from graftlens.folder import LONGEST_NAME, at_home, inside, name_fault, write_whole

#: A Wikipedia's code, which is the beginning of its host name.
LANGUAGE = re.compile(r"[a-z]{2,3}(-[a-z]+)*|simple")

LICENCE = "CC BY-SA 4.0"

#: Sections that hold lists and notes instead of text, in English.
NO_PROSE = frozenset(
    {
        "bibliography",
        "citations",
        "external links",
        "filmography",
        "further reading",
        "notes",
        "notes and references",
        "references",
        "see also",
        "sources",
        "works cited",
    }
)


def download(
    titles: Iterable[str],
    folder: Path,
    language: str = "en",
    user_agent: str | None = None,
) -> tuple[Path, ...]:
    """Fetch articles as ``NAME.txt`` (their prose, without headings) with ``NAME.json`` beside it.

    The JSON holds id, title, address, revision and licence, and an empty list of facts: fill it in,
    and `ArticlesSpec` can read the folder. An existing article is left untouched, with the facts
    written into it. Needs the extra ``wikipedia``.

    Args:
        titles: of articles; redirects are followed.
        folder: where to put them.
        language: the Wikipedia's code, such as en, zh-yue or simple.
        user_agent: who is asking, with an address, as Wikipedia's terms require: "my-study/1.0
            (me@example.org)". Left out: graftlens.

    Returns:
        The texts' files, in the order of the titles.

    Raises:
        RuntimeError: the client is not installed.
        ValueError: no titles, a language that is not a code, an article that does not exist or has
            no text, two titles whose file names are the same, or an existing file with another
            text.
        OSError: Wikipedia cannot be reached, or refuses.
    """
    try:
        import wikipediaapi
    except ImportError:
        raise RuntimeError(
            'downloading needs the package wikipedia-api: pip install "graftlens[wikipedia]".'
        ) from None
    folder = at_home(folder)
    # It becomes part of the host name: anything else could name another host.
    if not LANGUAGE.fullmatch(language) or len(language) > 20:
        raise ValueError(
            f"language={language!r} is not the code of a Wikipedia. Write what comes before "
            ".wikipedia.org in its address: lower-case letters and hyphens, such as en or zh-yue."
        )
    if user_agent is not None and not (len(user_agent) >= 5 and user_agent.isprintable()):
        raise ValueError(
            f"user_agent={user_agent!r}: write who is asking in one line of 5 characters or more, "
            'such as "my-study/1.0 (me@example.org)".'
        )
    names = {title: _file_name(title) for title in dict.fromkeys(titles)}
    if not names:
        raise ValueError("titles is empty. Name one or more articles.")
    for name in dict.fromkeys(names.values()):
        # Some file systems do not distinguish upper and lower case.
        same = [title for title, n in names.items() if n.casefold() == name.casefold()]
        if len(same) > 1:
            raise ValueError(
                f"the titles {', '.join(map(repr, same))} would both be the file {name}.txt. "
                "Download one of them into another folder."
            )
    client = wikipediaapi.Wikipedia(
        user_agent=user_agent or f"graftlens/{version('graftlens')}", language=language
    )
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for title, name in tqdm(names.items(), desc="articles", disable=None):
        text, rest = inside(folder, f"{name}.txt"), inside(folder, f"{name}.json")
        # The text is written first, so that the article is complete if the JSON exists.
        if not rest.exists():
            try:
                content, about = _fetch(client, title, language)
            except (wikipediaapi.WikipediaException, OSError, LookupError, TypeError) as error:
                # The last ones are what the client raises on an unexpected answer.
                raise OSError(
                    f"the article {title!r} could not be downloaded from {language}.wikipedia.org "
                    f"({type(error).__name__}: {error}). Check the network, or copy the folder "
                    "from a machine that reaches it; existing articles are not downloaded again."
                ) from error
            content += "\n"
            # Without a JSON file it may be from an earlier call, or from anybody.
            if text.exists() and text.read_bytes() != content.encode():
                raise ValueError(
                    f"{text} exists without {rest.name} and differs from the article, so it is "
                    "left untouched. Rename or remove it, or download into another folder."
                )
            write_whole(text, content)
            said = json.dumps({"id": name, **about}, indent=1, ensure_ascii=False)
            write_whole(rest, said + "\n")
        written.append(text)
    return tuple(written)


def _fetch(client: Any, title: str, language: str) -> tuple[str, dict[str, Any]]:
    page = client.page(title)
    if not page.exists():
        raise ValueError(
            f"{language}.wikipedia.org has no article {title!r}. Copy the title from the page."
        )
    paragraphs = [page.summary.strip(), *_prose(page.sections)]
    text = "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
    if not text:
        raise ValueError(f"the article {title!r} has no text. Name another one.")
    return text, {
        "title": page.title,
        "url": page.fullurl,
        "revision": page.lastrevid,
        "licence": LICENCE,
        "facts": [],
    }


def _prose(sections: Iterable[Any]) -> list[str]:
    """The sections' texts, depth first."""
    texts: list[str] = []
    for section in sections:
        if section.title.strip().lower() not in NO_PROSE:
            texts += [section.text.strip(), *_prose(section.sections)]
    return texts


def _file_name(title: str) -> str:
    name = re.sub(r"[^\w.-]+", "_", title).strip("_.")
    if not name:
        raise ValueError(f"title={title!r} is not a title. Copy it from the article's page.")
    # A title may have up to 255 bytes, and may be a reserved Windows device name.
    name = name.encode()[: LONGEST_NAME - 1].decode(errors="ignore").rstrip("_.")
    return f"{name}_" if name_fault(name) else name
