"""How large the page of a sweep is and how long Chromium takes to open it; and the screenshot of the documentation.

    python -m benchmarks.report_page                                       # 50 arms x 3 seeds, five times
    python -m benchmarks.report_page --screenshot docs/images/report.png   # of a sweep of six arms

The sweep is made up (benchmarks/synthetic_sweep.py): nobody trained it. Open means: read from the disk, laid out, the
first picture drawn and a frame painted.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.arguments import count, parser_of
from benchmarks.synthetic_sweep import write_sweep
from sweeps.report.page import page
from sweeps.report.subject import of_sweep

CHROMIUM = Path("/usr/bin/chromium")
_EXAMPLE = {"geglu": 0.0, "swiglu": 0.0, "gelu": 0.016, "rmsnorm": -0.0006, "parallel": 0.009, "muon": -0.021}


def write_page(folder: Path, effects: dict[str, float], seeds: int, lines: int) -> Path:
    file = folder / "report.html"
    file.write_text(page(of_sweep(write_sweep(folder / "runs", effects, range(seeds), lines))))
    return file


def open_page(browser: Any, file: Path) -> float:
    """Seconds."""
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    start = time.perf_counter()
    tab.goto(file.as_uri())
    tab.wait_for_selector("figure[data-drawn]", state="attached")
    tab.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    seconds = time.perf_counter() - start
    tab.close()
    return seconds


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--arms", type=count, default=50, help="default: 50")
    parser.add_argument("--seeds", type=count, default=3, help="default: 3")
    parser.add_argument("--rounds", type=count, default=5, help="default: 5")
    parser.add_argument("--screenshot", type=Path, metavar="FILE", help="take a picture of an example, measure nothing")
    arguments = parser.parse_args()
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        parser.error("playwright is not installed: make setup-dev")
    if not CHROMIUM.exists():
        parser.error(f"{CHROMIUM}: is not there: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        if arguments.screenshot:
            _screenshot(browser, Path(folder), arguments.screenshot)
            return
        effects = {f"arm-{place:02}": 0.0004 * place for place in range(arguments.arms)}
        start = time.perf_counter()
        file = write_page(Path(folder), effects, arguments.seeds, 1000)
        wrote = time.perf_counter() - start
        size = file.stat().st_size / 1e6
        took = [open_page(browser, file) for _ in range(arguments.rounds + 1)][1:]  # the first warms the disk's cache
        browser.close()
    line: dict[str, Any] = {"benchmark": "report_page", "arms": arguments.arms, "seeds": arguments.seeds}
    line |= {"megabytes": round(size, 2), "write_seconds": round(wrote, 1)}
    line |= {"open_seconds": round(statistics.median(took), 2), "rounds": [round(each, 2) for each in took]}
    print(json.dumps(line))


def _screenshot(browser: Any, folder: Path, output: Path) -> None:
    tab = browser.new_page(viewport={"width": 1180, "height": 1020}, device_scale_factor=1.5, color_scheme="light")
    tab.goto(write_page(folder, _EXAMPLE, 5, 400).as_uri())
    tab.wait_for_selector("figure[data-drawn]", state="attached")
    tab.wait_for_timeout(500)
    output.parent.mkdir(parents=True, exist_ok=True)
    tab.screenshot(path=str(output))


if __name__ == "__main__":
    main()
