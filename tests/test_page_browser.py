"""The pages in a headless Chromium: the slider moves, the choices work, nobody is asked for anything."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastgan.gallery import Run, save_grid, write_comparison, write_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if not CHROMIUM or not shutil.which("chromedriver"):
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    driver.execute_cdp_cmd("Network.enable", {})
    yield driver
    driver.quit()


def open_page(browser, path: Path, width: int = 1280) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(path.as_uri())


def asked(browser) -> tuple[list[str], list[str]]:
    """Console lines, and addresses that the page wanted, less the data in itself."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert urls, "the log of requests is empty"
    lines = [entry["message"] for entry in browser.get_log("browser")]
    return lines, [url for url in urls if not url.startswith("data:")]


def run(folder: Path, steps=(10, 20), size=(32, 32)) -> Path:
    """Test images 0 and 1 of A are black and grey; translations of step s have the grey s, those of B 255."""

    def flat(*greys: int) -> torch.Tensor:
        return torch.tensor(greys)[:, None, None, None].expand(-1, 3, *size) / 127.5 - 1

    for step in steps:
        columns = {"A": flat(0, 99), "G_A(A)": flat(step, step + 1), "B": flat(200), "G_B(B)": flat(255)}
        save_grid(folder / f"samples/step_{step:08d}.png", columns, title=folder.name)
    lines = [
        {"step": s, "time": float(s), "G_A": 1 / s, **({"fid": 9.0 - s} if s % 5 == 0 else {})}
        for s in range(1, 21)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    return folder


def colours(browser, frame) -> list[tuple[int, int]]:
    """Grey at 10 % and at 90 % of the frame's width, as they stand on the screen."""
    with Image.open(io.BytesIO(frame.screenshot_as_png)) as picture:
        shot = picture.convert("L")
        return [shot.getpixel((shot.width * at // 100, shot.height // 4)) for at in (10, 90)]


def clip(browser) -> str:
    return browser.execute_script("return getComputedStyle(document.querySelector('.over')).clipPath")


def choose(browser, label: str, value: str) -> None:
    from selenium.webdriver.support.ui import Select

    Select(browser.find_element("css selector", f"select[aria-label='{label}']")).select_by_visible_text(
        value
    )


def test_slider_of_a_run(browser, tmp_path):
    from selenium.webdriver import ActionChains, Keys

    page = write_page(run(tmp_path / "run"), title="run", settings={"lr": 1})
    open_page(browser, page)
    frame = browser.find_element("css selector", ".frame")
    assert frame.is_displayed() and clip(browser) == "inset(0px 0px 0px 50%)"
    # 32 pixels are 96 in the grid, and five times that here: whole pixels
    assert frame.size == {"width": 480, "height": 480}
    sharp = "return getComputedStyle(document.querySelector('.pane img')).imageRendering"
    assert browser.execute_script(sharp) == "pixelated"
    assert colours(browser, frame) == [0, 20]
    # pointer: from the middle to 5 % of the width, where the right picture is nearly everywhere
    ActionChains(browser).move_to_element(frame).click_and_hold().move_by_offset(-216, 0).release().perform()
    assert clip(browser) == "inset(0px 0px 0px 5%)" and colours(browser, frame) == [20, 20]
    # keyboard: the pointer has left the focus on the slider
    slider = browser.switch_to.active_element
    assert slider.get_attribute("aria-valuetext") == "5 % A, then G_A(A)"
    slider.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert clip(browser) == "inset(0px 0px 0px 7%)"
    slider.send_keys(Keys.END)
    assert clip(browser) == "inset(0px 0px 0px 100%)" and colours(browser, frame) == [0, 0]
    slider.send_keys(Keys.HOME, *[Keys.PAGE_UP] * 5)
    # another image; an earlier step against a later one; the other direction
    browser.find_elements("css selector", ".tests button")[1].click()
    assert colours(browser, frame) == [99, 21]
    choose(browser, "left: picture", "G_A(A)")
    choose(browser, "left: step", "step 10")
    assert colours(browser, frame) == [11, 21]
    choose(browser, "left: picture", "B")
    assert colours(browser, frame) == [200, 255]
    assert not browser.find_elements("css selector", ".tests button"), "B has one test image"
    assert asked(browser) == ([], [page.as_uri()])


@pytest.mark.parametrize("size", [(32, 32), (256, 128)])
def test_slider_on_a_phone(browser, tmp_path, size):
    page = write_page(run(tmp_path / "run", size=size), title="run", settings={})
    open_page(browser, page, width=400)
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    frame = browser.find_element("css selector", ".frame")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", frame)
    box = browser.execute_script("return arguments[0].getBoundingClientRect().toJSON()", frame)
    assert box["left"] >= 0 and box["right"] <= 400 and box["width"] / box["height"] == size[1] / size[0]
    assert not browser.execute_script(
        "const page = document.documentElement; return page.scrollWidth > page.clientWidth"
    )
    for kind, at in (("touchStart", 0.5), ("touchMove", 0.6), ("touchMove", 0.75), ("touchEnd", None)):
        points = [] if at is None else [{"x": box["left"] + at * box["width"], "y": box["top"] + 20}]
        browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
    assert clip(browser) == "inset(0px 0px 0px 75%)"
    assert asked(browser) == ([], [page.as_uri()])


def test_runs_against_each_other(browser, tmp_path):
    a, b = run(tmp_path / "a"), run(tmp_path / "b", steps=(10, 30))
    evil = "</script><script>alert(1)</script><b>"
    page = write_comparison(tmp_path / "c.html", [Run(evil, a, {"lr": 1}), Run("b", b, {"lr": 2})])
    open_page(browser, page)
    frame = browser.find_element("css selector", ".frame")
    # the newest step that both have
    assert colours(browser, frame) == [10, 10]
    choose(browser, "right: step", "step 30")
    choose(browser, "left: step", "step 20")
    assert colours(browser, frame) == [20, 30]
    choose(browser, "right: run", evil)
    assert colours(browser, frame) == [20, 20]
    browser.find_elements("css selector", ".tests button")[1].click()
    assert colours(browser, frame) == [21, 21]
    assert len(browser.find_elements("css selector", ".plot svg")) == 2
    texts = "[...document.querySelectorAll('.plot text')]"
    label = f"return {texts}.filter(text => text.textContent === 'training time').length"
    assert browser.execute_script(label) == 0
    browser.find_element("css selector", "input[value='training time']").click()
    assert browser.execute_script(label) == 2
    assert asked(browser) == ([], [page.as_uri()])
