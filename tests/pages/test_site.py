"""The site of a real run and of a notebook of one's own: its files, and a browser's view of it."""

from __future__ import annotations

import http.server
import io
import re
import shutil
import threading
import time
import warnings
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from bs4 import BeautifulSoup
from chromium import chromium_page
from nbformat import v4
from PIL import Image

import minigpt_lab as lab
from minigpt_lab.experiments.parameters import notebook_names
from minigpt_lab.experiments.records import blank_record, read_record, write_record

PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJ"
    "AAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
SVG = '<svg xmlns="http://www.w3.org/2000/svg"><g id="figure_1"><g id="axes_1"><!-- 0.1 --></g>'
SVG += '<g id="text_1"><!-- A title, --></g><g id="text_2"><!-- and "words" --></g></g></svg>'
WIDGET = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}}
WORDS = """\
# A token of my own

**Is a token a token?** Each `token` is a token, and so are tokens; perplexities are not.
[The grid](grids/x.yaml), [the words](README.md#glossary).

![A picture](../figures/explorer.png)

"""
WORDS += f"$$|a_j| = \\log p + {'x + ' * 80} 1$$"
SCRIPT = """<p id="made">static</p><script>
document.getElementById("made").textContent = "made by a script";
</script><script type="module">
document.getElementById("made").dataset.module = "ran";
</script>"""
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("sweep")]


def own_run(folder: Path, **changes) -> Path:
    """A run of a notebook of one's own, with every kind of output."""
    folder.mkdir(parents=True)
    out_dir = f"{folder}/"
    wide = "word" * 60
    row = f"<table><tr>{f'<td>{wide}</td>' * 9}</tr></table>"
    drawn = f'<p id="kept">kept</p><img src="data:image/png;base64,{PIXEL}">'

    def code(source: str, *outputs: dict, **metadata: object):
        shown = [v4.new_output("display_data", data) for data in outputs]
        return v4.new_code_cell(source, outputs=shown, metadata=metadata)

    def printed(stream: str, text: str):
        return v4.new_code_cell("f()", outputs=[v4.new_output("stream", name=stream, text=text)])

    given = f'out_dir = "{out_dir}"\ninteractive = False\nquantile = 0.25'
    cells = [
        v4.new_markdown_cell(WORDS),
        code(given, tags=["injected-parameters"]),
        code('figures.save_figure(figure, f"{out_dir}/drawn", table)', {"image/png": PIXEL}),
        code("progress", {**WIDGET, "text/plain": "0%|   |"}),
        code("explore", {**WIDGET, "text/html": drawn}),
        code("script", {"text/html": SCRIPT}),
        code("table", {"text/html": row}),
        printed("stderr", "hush"),
        printed("stdout", f"{out_dir}record.json {wide * 9}\n"),
    ]
    notebook = v4.new_notebook(cells=cells)
    notebook.metadata.papermill = {"parameters": {"out_dir": str(folder)}}
    notebook.metadata.widgets = {"state": {"1": "a kernel's"}}
    nbformat.write(notebook, folder / "my_own.ipynb")
    (folder / "drawn.svg").write_text(SVG)
    record = blank_record(Path("my_own.ipynb"), {"quantile": 0.25}, time.time())
    write_record(folder, {**record, **changes})
    return folder


@pytest.fixture(scope="session")
def site(tiny_sweep, tmp_path_factory) -> Path:
    """The site of the newest run of a sweep of notebook 03 and of a notebook of one's own."""
    home = tmp_path_factory.mktemp("site")
    own_run(home / "runs" / "mine")
    runs = [path.parent for path in tiny_sweep.folder.glob("*/record.json")]
    newest = max(runs, key=lambda folder: read_record(folder)["finished"])
    shutil.copytree(newest, home / "runs" / "03")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "on the site")  # a lost link, a broken docstring
        first = lab.pages.write_site(home / "runs", home / "site", progress=False)
    assert first == home / "site" / "index.html"
    return home / "site"


@pytest.fixture(scope="session")
def pages(site) -> dict[str, BeautifulSoup]:
    """Every page of the site, by its path."""
    return {
        path.relative_to(site).as_posix(): BeautifulSoup(path.read_text("utf-8"), "html.parser")
        for path in site.rglob("*.html")
    }


def test_every_link_leads_to_something(site, pages):
    ids = {name: {tag["id"] for tag in page.find_all(id=True)} for name, page in pages.items()}
    for name, page in pages.items():
        for tag, key in (("a", "href"), ("link", "href"), ("script", "src"), ("img", "src")):
            for element in page.find_all(tag, {key: True}):
                parts = urlsplit(element[key])
                if tag == "a" and parts.scheme in ("http", "https"):
                    continue
                assert parts.scheme in ("", "data") and not parts.netloc, (name, element[key])
                if parts.scheme or element[key] == "#":
                    continue
                target = (site / name).parent / unquote(parts.path) if parts.path else site / name
                assert target.is_file(), (name, element[key])
                linked = target.resolve().relative_to(site.resolve()).as_posix()
                if parts.fragment and linked in ids:
                    assert unquote(parts.fragment) in ids[linked], (name, element[key])


def test_no_style_or_script_is_loaded_from_elsewhere(site):
    for path in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", path.read_text("utf-8")), path
    assert not list(site.rglob("*mathjax*")) and not list(site.rglob("*require*"))


def test_every_page_has_a_title_of_its_own_and_words_for_its_pictures(pages):
    titles = [page.title.string for page in pages.values()]
    assert len(set(titles)) == len(titles)
    for name, page in pages.items():
        assert page.html["lang"] == "en", name
        assert len(page.find_all("h1")) == 1 or name == "search.html", name
        assert page.find("meta", {"name": "viewport"}), name
        assert all(image.get("alt") for image in page.find_all("img")), name


def test_each_notebook_has_a_page_and_a_download(site, pages):
    first = {link["href"] for link in pages["index.html"].article.find_all("a", href=True)}
    said = pages["index.html"].article.get_text()
    for name in [*notebook_names(), "my_own"]:
        page = pages[f"notebooks/{name}.html"]
        assert f"notebooks/{name}.html" in first
        facts = page.find(class_="facts").get_text()
        run = name in ("03_contextual_pruning", "my_own")
        assert ("Not run here" in facts) != run and bool(page.select(".cell_output")) == run
        (download,) = page.select("a.download")
        bare = nbformat.read(site / "notebooks" / download["href"], as_version=4)
        nbformat.validate(bare)
        assert not any(cell.get("outputs") for cell in bare.cells)
    assert "shown without outputs: notebooks 00, 01, 02, 04" in said
    shown = [image["src"] for image in pages["index.html"].article.find_all("img")]
    assert len({*shown}) == len(shown) == len(notebook_names())  # a picture each; my_own's is seen
    facts = pages["notebooks/03_contextual_pruning.html"].find(class_="facts").get_text()
    assert "tiny-llama" in facts and "commit" in facts


def test_a_page_keeps_what_works_without_a_kernel(site, pages):
    page = pages["notebooks/my_own.html"]
    words = page.article.get_text()
    assert 'A title, and "words"' in {image["alt"] for image in page.find_all("img")}
    assert "Picture of the section “A token of my own”" in {i["alt"] for i in page.find_all("img")}
    assert page.find(id="kept") and page.find(id="made")
    assert "0%|" not in words and "hush" not in words
    assert "# parameters of this run, in place of those above\nquantile = 0.25" in words
    assert "interactive = False" not in words
    assert page.find("a", href="../glossary.html#glossary")
    assert "The grid" in words and "grids/x" not in str(page)
    for path in [*site.rglob("*.html"), *site.rglob("*.ipynb"), *site.rglob("*.js")]:
        assert str(site.parent) not in path.read_text("utf-8"), path


def test_the_first_use_of_a_term_leads_to_the_glossary(pages):
    page = pages["notebooks/my_own.html"]
    terms = {link["href"].split("#")[1]: link for link in page.select("a.term")}
    assert terms.keys() == {"term-token", "term-perplexity"}  # each once
    assert len(page.select("a.term")) == 2
    assert terms["term-token"].find_parent("strong") and terms["term-token"]["title"]
    assert terms["term-perplexity"].string == "perplexities"
    assert len(pages["notebooks/03_contextual_pruning.html"].select("a.term")) > 10
    assert not pages["glossary.html"].select("a.term")


def test_the_reference_has_every_public_name(pages):
    reference = {name: page for name, page in pages.items() if name.startswith("api")}
    documented = {tag["id"] for page in reference.values() for tag in page.find_all(id=True)}
    listed = pages["api.html"].article.get_text()
    whole = [name for name in lab.__all__ if f"api/{name}.html" in reference]
    assert {*whole} == {"experiments", "figures", "pages", "studies", "widgets"}
    assert {f"minigpt_lab.{name}" for name in lab.__all__ if name not in whole} <= documented
    assert "minigpt_lab.studies.knee" in documented and "studies.knee:" in listed
    missing = [n for n in lab.__all__ if n not in whole and not re.search(rf"\n{n}[:\n]", listed)]
    assert missing == []


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module", params=["file system", "file server"])
def address(site, request):
    """Address of the site's folder, as a browser asks for it."""
    if request.param == "file system":
        yield site.as_uri()
        return
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_the_site_in_a_browser(site, pages, address):
    asked, failed = [], []
    with chromium_page(f"site-{address[:4]}", width=390, color_scheme="dark") as page:
        page.on("requestfailed", lambda r: "ABORTED" in r.failure or failed.append(r.url))
        page.on("request", lambda request: asked.append(request.url))
        some = ["index.html", "api.html", "notebooks/03_contextual_pruning.html"]
        for name in pages if address.startswith("file") else some:
            page.goto(f"{address}/{name}")
            width = page.evaluate("document.documentElement.scrollWidth")
            assert width <= 390, f"{name} is {width} wide"
        page.goto(f"{address}/search.html?q=perplexity")
        page.wait_for_selector("#search-results li", timeout=60_000)
        page.goto(f"{address}/notebooks/my_own.html")
        read_own_page(page)
    assert failed == []
    assert [url for url in asked if not url.startswith((address, "data:"))] == []


@pytest.mark.parametrize("system", ["light", "dark"])
def test_diagrams_follow_the_theme_button(site, system):
    with chromium_page(f"site-theme-{system}", color_scheme=system) as page:
        page.goto(f"{site.as_uri()}/notebooks/00_start_here.html")
        diagram = page.locator("article img[src$='.svg']").first
        seen = {}
        for _ in range(3):  # auto, and the two of the button
            theme = page.evaluate("document.body.dataset.theme")
            picture = Image.open(io.BytesIO(diagram.screenshot())).convert("L")
            middle = picture.getpixel((picture.width // 2, 6))
            seen[theme] = "dark" if middle < 60 else "light" if middle > 200 else middle
            page.locator(".theme-toggle").locator("visible=true").first.click()
        assert seen == {"auto": system, "light": "light", "dark": "dark"}


def read_own_page(page) -> None:
    made = page.locator("#made")
    assert made.inner_text() == "made by a script" and made.get_attribute("data-module") == "ran"
    formula, box = page.locator("math").first, page.locator(".formula")
    assert formula.bounding_box()["height"] > 10
    assert box.evaluate("box => box.scrollWidth > box.clientWidth")  # it scrolls by itself
    dark = "getComputedStyle(document.body).backgroundColor"
    assert max(map(int, re.findall(r"\d+", page.evaluate(dark))[:3])) < 60
    page.keyboard.press("Tab")  # first of all: past the menus
    assert page.evaluate("document.activeElement.textContent") == "Skip to content"
    page.set_viewport_size({"width": 1280, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    assert page.locator(".sidebar-tree").is_visible()
