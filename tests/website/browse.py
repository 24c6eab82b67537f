"""What a reader meets on the built site, in a real browser: `make test-site`.

    .venv-site/bin/python tests/website/browse.py build/site [SCREENSHOTS]

Opens every page in headless Chromium, the system's, at two widths. Fails on an error in the
console, a request that fails or leaves the machine, a page wider than its window, a picture that is
not loaded, TeX that is not typeset, and a search that does not answer. Writes a picture of each
page to the folder SCREENSHOTS, where one is given.
"""

import shutil
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from playwright.sync_api import Page, TimeoutError, sync_playwright

WIDTHS = (1280, 390)
SEARCH = ("goodness of fit", "notebooks/04_power_law_or_not.html")
"""What is looked for, and a page that the answer names."""

WIDER = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
UNLOADED = "[...document.images].filter(i => !(i.complete && i.naturalWidth)).map(i => i.src)"
EAGER = "[...document.images].forEach(i => i.loading = 'eager')"
UNTYPESET = "document.querySelectorAll('.math:not(:has(mjx-container))').length"


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, *_args: object) -> None:
        """Nothing."""


def problems(page: Page, root: str, path: str, heard: list[str]) -> Iterator[str]:
    """What is wrong with one page at the width that the browser has."""
    heard.clear()
    page.goto(root + path)
    page.evaluate(EAGER)
    page.wait_for_load_state("networkidle")
    if (wider := page.evaluate(WIDER)) > 0:
        yield f"{wider} pixels wider than the window"
    yield from (f"not loaded: {picture}" for picture in page.evaluate(UNLOADED))
    if page.locator(".math").count():
        page.wait_for_timeout(2000)
        if count := page.evaluate(UNTYPESET):
            yield f"{count} formulas are not typeset"
    yield from heard


def search(page: Page, root: str) -> Iterator[str]:
    """What is wrong with the search."""
    words, expected = SEARCH
    page.goto(f"{root}search.html?q={words.replace(' ', '+')}")
    try:
        page.wait_for_selector("#search-results li a", timeout=20_000)
        page.wait_for_timeout(1500)
    except TimeoutError:
        yield f"search for {words!r} finds nothing"
        return
    found = page.eval_on_selector_all("#search-results li a", "links => links.map(a => a.href)")
    if not any(expected in link for link in found):
        yield f"search for {words!r} does not find {expected}"


def main() -> None:
    """Every page at both widths, then the search."""
    site = Path(sys.argv[1])
    pictures = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("test-site needs Chromium: install the system's (Debian: chromium)")
    names = sorted(
        str(p.relative_to(site)) for p in site.rglob("*.html") if "_static" not in p.parts
    )
    names = [name for name in names if name not in ("index.html", "search.html", "genindex.html")]
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    root, found, heard = f"http://127.0.0.1:{server.server_port}/", [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for width in WIDTHS:
            page = browser.new_page(viewport={"width": width, "height": 900})
            page.on("console", lambda m: heard.append(m.text) if m.type == "error" else None)
            page.on("pageerror", lambda error: heard.append(str(error)))
            page.on("requestfailed", lambda request: heard.append(f"failed: {request.url}"))
            page.on(
                "request", lambda r: heard.append(f"asks {r.url}") if root not in r.url else None
            )
            for name in names:
                found += [f"{name} at {width}: {p}" for p in problems(page, root, name, heard)]
                if pictures:
                    shot = pictures / f"{name.replace('/', '-').removesuffix('.html')}-{width}.png"
                    page.screenshot(path=shot)
            found += [f"at {width}: {p}" for p in search(page, root)]
        browser.close()
    widths = " and ".join(map(str, WIDTHS))
    sys.stdout.write(f"{len(names)} pages at {widths} pixels: {len(found)} problems\n")
    if found:
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
