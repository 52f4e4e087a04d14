"""Reports in a headless Chromium: no error, nothing loaded, light and dark, a phone's width.

``FEDKERN_SCREENSHOTS=DIR`` keeps the screenshots.
"""

import base64
import json
import os
import shutil
from pathlib import Path

import pytest

from fedkern.run import main

pytestmark = pytest.mark.browser

WIDE, PHONE = 1280, 390
GROUNDS = {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}
TEXTS = {"light": "rgb(26, 29, 33)", "dark": "rgb(232, 234, 237)"}
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--force-device-scale-factor=1")  # fmt: skip


def find_program(*names: str) -> str | None:
    return next((path for name in names if (path := shutil.which(name))), None)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    pytest.importorskip("selenium", reason="needs selenium: pip install '.[browser-test]'")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    chromium, driver = find_program("chromium", "chromium-browser", "google-chrome"), find_program("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs Chromium and its driver (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}", f"--window-size={WIDE},900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(driver))
    yield started
    started.quit()


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, Path]:
    """Return the reports of a short FedGID run, a comparison, image-text pairs and an unfinished run."""
    folder = tmp_path_factory.mktemp("reports")
    small = ["--train-samples", "300", "--clients", "4", "--threads", "1", "--workers", "1", "--quiet", "--report"]
    gid = ["fedgid", *small, "--rounds", "4", "--client-test", "0.2", "--grad-cam", "0", "--out", str(folder / "run")]
    compared = ["compare", "fedgid", "fedavg", *small, "--rounds", "3", "--seeds", "2", "--grad-cam", "0",
                "--out", str(folder / "comparison")]  # fmt: skip
    pairs = ["feddra", *small, "--rounds", "2", "--local-steps", "2", "--width", "4", "--method-option",
             "alignment_steps=1", "--out", str(folder / "pairs")]  # fmt: skip
    for words in (gid, compared, pairs):
        assert main(words) == 0
    begun = shutil.copytree(folder / "run", folder / "begun")
    (begun / "summary.json").unlink()
    shutil.rmtree(begun / "checkpoints")  # which say that the run is finished
    assert main(["report", str(begun)]) == 0
    return {name: folder / name / "report.html" for name in ("run", "comparison", "pairs", "begun")}


def open_page(browser, path: Path, *, width: int = WIDE, ground: str = "light") -> None:
    """Open a file at a width, in light or dark."""
    phone = width < 600
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 844 if phone else 900, "deviceScaleFactor": 1, "mobile": phone},
    )
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": phone})
    emulate(browser, ground)
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(path.as_uri())


def emulate(browser, ground: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": ground}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def screenshot(browser, name: str) -> None:
    folder = os.environ.get("FEDKERN_SCREENSHOTS")
    if folder is None:
        return
    picture = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "format": "png"})
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / f"{name}.png").write_bytes(base64.b64decode(picture["data"]))


@pytest.mark.parametrize("ground", ["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, PHONE])
@pytest.mark.parametrize("name", ["run", "comparison", "pairs", "begun"])
def test_a_report_opens_without_an_error_and_loads_nothing(browser, reports, name, width, ground):
    open_page(browser, reports[name], width=width, ground=ground)
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "DEBUG"] == []
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in asked if event["method"] == "Network.requestWillBeSent"]
    assert [url for url in urls if not url.startswith(("data:", reports[name].as_uri()))] == []
    assert browser.execute_script("return document.querySelectorAll('[role=img] > svg').length") >= 4
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    curves = "return [...document.querySelectorAll('#chart-main, #chart-loss, #chart-bytes')].map((e) => e.scrollWidth)"
    assert all(shown <= width for shown in browser.execute_script(curves))
    colour = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert colour == GROUNDS[ground]
    text = "return getComputedStyle(document.querySelector('svg text')).fill"
    assert browser.execute_script(text) == TEXTS[ground]
    broken = "return [...document.images].filter((image) => !image.complete || !image.naturalWidth).length"
    assert browser.execute_script(broken) == 0
    screenshot(browser, f"{name}-{width}-{ground}")


def test_charts_follow_the_system_s_ground(browser, reports):
    open_page(browser, reports["run"])
    lines = "return [...document.querySelectorAll('#chart-main path')].map((line) => getComputedStyle(line).stroke)"
    light = browser.execute_script(lines)
    emulate(browser, "dark")
    dark = browser.execute_script(lines)
    assert {"rgb(0, 114, 178)", TEXTS["light"], "rgb(213, 218, 224)"} <= set(light)
    assert {"rgb(61, 148, 214)", TEXTS["dark"], "rgb(57, 65, 75)"} <= set(dark)
    assert not set(dark) & {"rgb(0, 114, 178)", TEXTS["light"], "rgb(213, 218, 224)"}
    assert browser.get_log("browser") == []


def test_figures_of_a_chart_open_and_a_name_runs_no_code(browser, reports, tmp_path):
    from selenium.webdriver.common.by import By

    text = reports["run"].read_text()
    page = tmp_path / "evil.html"
    page.write_text(text.replace("<h1>", "<script>window.ran = 1</script><h1 onclick='window.ran = 1'>", 1))
    open_page(browser, page)
    browser.find_element(By.TAG_NAME, "h1").click()
    assert browser.execute_script("return window.ran === undefined")
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))
    summary = browser.find_element(By.CSS_SELECTOR, "figure summary")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", summary)
    summary.click()
    assert browser.find_element(By.CSS_SELECTOR, "figure details[open] table").is_displayed()
