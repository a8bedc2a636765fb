"""Does a report hold up in a browser: does anything overflow, ask the network, complain, or get too small to read?

Every page is opened from its file at the width of a phone and of a desktop, light and dark, and printed. It fails if
it scrolls sideways, if anything that no box scrolls is drawn outside of the window, if it requests anything but
itself, if the console has a word of complaint, if text in a figure is below 8 pixels or has too little contrast, if an
id stands twice or a link leads nowhere, or if a box that scrolls on the screen hides text on paper. Screenshots and a
PDF are for people to look at.

    make report-check PAGES=runs/demo-001/report.html
    python -m bench.trust.report_screens runs/demo-001/report.html [--out FOLDER] [--browser PATH]
"""

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from playwright.sync_api import Browser, Page, sync_playwright

WIDTHS = {"phone": 375, "desktop": 1280}
LEAST_PIXELS, LEAST_CONTRAST = 8.0, 3.0
SLICE = 2400
"""CSS pixels of a page in one picture: no browser draws one of thirty thousand lines."""
PROBE = """() => {
  const wide = document.documentElement.clientWidth;
  const named = e => e.tagName + ' ' + e.textContent.trim().slice(0, 40);
  const boxed = e => { for (let p = e.parentElement; p; p = p.parentElement) {
    if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(p).overflowX)) return true; } return false; };
  const outside = [...document.body.querySelectorAll('*')].filter(e => {
    const box = e.getBoundingClientRect();
    return box.width > 0 && (box.right > wide + 1 || box.left < -1) && !boxed(e); });
  const rgb = c => (c.match(/[\\d.]+/g) || []).map(Number);
  const lum = c => { const [r, g, b] = rgb(c).slice(0, 3).map(x => x / 255)
    .map(x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (rgb(c).length === 3 || rgb(c)[3] > 0) return c; } return 'rgb(255, 255, 255)'; };
  const contrast = (a, b) => { const [x, y] = [lum(a), lum(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05); };
  const texts = [...document.querySelectorAll('svg text')].filter(e => e.textContent.trim()).map(e => {
    const svg = e.ownerSVGElement, scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
    return {text: e.textContent.trim(), pixels: parseFloat(getComputedStyle(e).fontSize) * scale,
            contrast: contrast(getComputedStyle(e).fill, ground(svg))}; });
  const ids = [...document.querySelectorAll('[id]')].map(e => e.id);
  return {
    scroll: document.documentElement.scrollWidth - wide,
    outside: outside.slice(0, 5).map(named),
    texts, twice: ids.filter((id, i) => ids.indexOf(id) !== i).slice(0, 5),
    dangling: [...document.querySelectorAll('[href^="#"]')].map(e => e.getAttribute('href').slice(1))
      .filter(id => id && !document.getElementById(decodeURIComponent(id))).slice(0, 5),
    links: [...document.querySelectorAll('a[href]')].map(e => e.getAttribute('href')).filter(h => !h.startsWith('#')),
    clipped: [...document.querySelectorAll('body *')].filter(e => e.scrollHeight > e.clientHeight + 2 &&
      ['auto', 'scroll', 'hidden'].includes(getComputedStyle(e).overflowY) && e.clientHeight > 0 &&
      getComputedStyle(e).maxHeight !== 'none').slice(0, 5).map(named),
  };
}"""


def watched(browser: Browser, path: Path, width: int, scheme: str) -> tuple[Page, list[str]]:
    """The page, opened from its file, and what it did wrong while it loaded."""
    wrong: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
    address = path.resolve().as_uri()
    page.on("console", lambda m: wrong.append(f"console: {m.text}") if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("request", lambda r: wrong.append(f"requests {r.url[:80]}") if r.url != address else None)
    page.goto(address, wait_until="load")
    return page, wrong


def faults(found: dict[str, Any], path: Path) -> list[str]:
    """What is wrong with the page as laid out."""
    wrong = []
    if found["scroll"] > 0:
        wrong.append(f"scrolls sideways by {found['scroll']} pixels")
    wrong += [f"outside of the window: {what}" for what in found["outside"]]
    wrong += [f"id twice: {name}" for name in found["twice"]]
    wrong += [f"link to nothing: #{name}" for name in found["dangling"]]
    for what, bad in (
        ("below 8 pixels", [text for text in found["texts"] if text["pixels"] < LEAST_PIXELS]),
        ("with little contrast", [text for text in found["texts"] if text["contrast"] < LEAST_CONTRAST]),
    ):
        if bad:
            example = min(bad, key=lambda text: text["pixels"])
            wrong.append(
                f"{len(bad)} texts in figures {what}, such as {example['text'][:40]!r}: "
                f"{example['pixels']:.1f} pixels, contrast {example['contrast']:.1f}"
            )
    for link in found["links"]:
        parts = urlsplit(link)
        if not parts.scheme and not parts.netloc and not (path.parent / unquote(parts.path)).is_file():
            wrong.append(f"link to a file that is not there: {link}")
    return wrong


def found() -> str | None:
    """A Chromium that is installed already."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def shoot(page: Page, width: int, stem: Path) -> None:
    """Pictures of the whole page, a few screens each."""
    height = page.evaluate("document.documentElement.scrollHeight")
    for part, top in enumerate(range(0, height, SLICE)):
        clip = {"x": 0, "y": top, "width": width, "height": min(SLICE, height - top)}
        page.screenshot(path=stem.with_name(f"{stem.name}-{part:02d}.png"), full_page=True, clip=clip)  # type: ignore[arg-type]


def check(browser: Browser, path: Path, out: Path, stem: str) -> list[str]:
    """All views of one page. Returns what is wrong with them."""
    wrong = []
    for name, width in WIDTHS.items():
        for scheme in ("light", "dark"):
            page, seen = watched(browser, path, width, scheme)
            seen += faults(page.evaluate(PROBE), path)
            shoot(page, width, out / f"{stem}-{name}-{scheme}")
            page.close()
            wrong += [f"{path}, {name}, {scheme}: {what}" for what in dict.fromkeys(seen)]
    page, _ = watched(browser, path, 794, "dark")  # A4 at 96 dots an inch; paper is white whatever the screen is
    page.emulate_media(media="print")
    laid_out = page.evaluate(PROBE)
    wrong += [f"{path}, print: {what}" for what in dict.fromkeys(faults(laid_out, path))]
    wrong += [f"{path}, print: text is hidden in a box: {what}" for what in laid_out["clipped"]]
    shoot(page, 794, out / f"{stem}-paper")
    page.pdf(path=out / f"{stem}.pdf", format="A4")
    page.close()
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="+", type=Path, metavar="PAGE")
    parser.add_argument("--out", type=Path, default=Path("runs/report-screens"))
    parser.add_argument("--browser", help="A Chromium to use; else one on the PATH, else playwright's own.")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    wrong = []
    with sync_playwright() as driver:
        # As root, Chromium's sandbox does not start; the pages run no scripts.
        browser = driver.chromium.launch(executable_path=args.browser or found(), args=["--no-sandbox"])
        for number, path in enumerate(args.pages):
            wrong += check(browser, path, args.out, f"{number}-{path.stem}" if len(args.pages) > 1 else path.stem)
        browser.close()
    print("\n".join(wrong) if wrong else "nothing is wrong")
    print(f"{len(args.pages)} pages, {2 * len(WIDTHS) + 1} views each, and a PDF, in {args.out}", file=sys.stderr)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
