"""Open every page of a built site as phones and desktops show it, light and dark, and look.

    mkdocs build --strict --site-dir site && python tools/look_at_site.py site --pictures looks

Each page is opened in a headless Chromium. It must fit, say no error on the console, and load each
of its pictures; text must have a contrast of 4.5 to 1, pictures a text in their place, and no
formula may be left as it was typed. `--pictures` keeps a PNG of each rendering, for people to see.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.server
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from distributions import ROOT

sys.path.append(str(ROOT / "packages" / "svg-models" / "tests"))

from browser import Browser, find_browser

SCREENS = ((390, 844), (1280, 900))
SCHEMES = {"light": "default", "dark": "slate"}  # of a system, and what the theme calls them
FOUND = Path(__file__).with_suffix(".js").read_text(encoding="utf-8")


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing of requests."""


@contextlib.contextmanager
def served(site: Path) -> Iterator[str]:
    """Serve a built site under the path that it will have, and yield its address."""
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    address = next(line for line in config.splitlines() if line.startswith("site_url:"))
    path = urlsplit(address.removeprefix("site_url:").strip()).path.strip("/")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / path).symlink_to(site.resolve())
        handler = functools.partial(_Quiet, directory=folder)
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            try:
                yield f"http://127.0.0.1:{server.server_port}/{path}/"
            finally:
                server.shutdown()


def addresses(site: Path) -> list[str]:
    """Return the address of each page, relative to the site."""
    pages = (path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    return sorted(page.removesuffix("index.html") for page in pages)


def look(site: Path, pages: list[str], pictures: Path | None = None) -> list[str]:
    """Return what is wrong with pages, a line each.

    Args:
        site: a built site.
        pages: addresses relative to it.
        pictures: the folder that gets a PNG of each rendering.
    """
    found = []
    with (
        served(site) as base,
        tempfile.TemporaryDirectory() as profile,
        Browser(Path(profile)) as browser,
    ):
        # The theme shows what it showed last, whatever the system asks for.
        browser.run_first("try { localStorage.clear() } catch {}")
        for page in pages:
            name = page.strip("/").removesuffix(".html") or "home"
            for width, height in SCREENS:
                for theme, scheme in SCHEMES.items():
                    for _ in range(3):  # a browser may tell a new page of the scheme too late
                        browser.open(base + page, width=width, height=height, theme=theme)
                        shown = browser.ask("document.body.dataset.mdColorScheme")
                        if shown == scheme:
                            break
                    wrong = [] if shown == scheme else [f"it is shown {shown}"]
                    wrong += [*browser.ask(FOUND), *browser.complaints]
                    found += [f"{name}, {width} pixels, {theme}: {what}" for what in wrong]
                    if pictures is not None:
                        picture = f"{name.replace('/', '_')}.{width}.{theme}.png"
                        browser.picture(pictures / picture)
    return found


def main() -> int:
    """Look at the pages named, or at all, and say what is wrong with them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("site", type=Path, help="a built site")
    parser.add_argument("pages", nargs="*", help="addresses relative to it; all by default")
    parser.add_argument("--pictures", type=Path, help="a folder for a PNG of each rendering")
    asked = parser.parse_args()
    if find_browser() is None:
        print("no Chromium on this machine, so no page was opened", file=sys.stderr)
        return 2
    if asked.pictures is not None:
        asked.pictures.mkdir(parents=True, exist_ok=True)
    pages = asked.pages or addresses(asked.site)
    found = look(asked.site, pages, asked.pictures)
    print("\n".join(found) or f"{len(pages)} pages in four renderings: nothing is wrong")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
