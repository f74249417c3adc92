"""The page of `fastgan.demo`: in a headless Chromium, by forged requests over HTTP, and its parts."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlparse

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import fastgan
from fastgan import demo
from fastgan.checkpoint import Labels, choices, write_weights
from fastgan.data.images import DataError, read_images, write_image
from fastgan.models import SRCNN, ResnetGenerator, StarGANGenerator

NOISE = np.random.default_rng(0).integers(0, 256, (36, 40, 3), np.uint8)
LIMIT = 40_000  # pixels


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    for name in ("G_A", "G_B"):
        net = ResnetGenerator(3, 3, ngf=4, blocks=1)
        for value in net.parameters():
            nn.init.normal_(value, 0, 0.2)
        torch.save(net.state_dict(), folder / f"latest_net_{name}.pth")
    return folder


def given(run: Path, **settings: Any) -> demo.Arguments:
    return demo.Arguments(run=run, device="cpu", precision="fp32", **settings)


def load(run: Path, direction: Any, **settings: Any) -> fastgan.inference.Translator:
    return fastgan.load(run, direction, device="cpu", precision="fp32", **settings)


@pytest.fixture(scope="module")
def server(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address, and the folder in which the program was started; Ctrl-C ends it and leaves nothing."""
    pytest.importorskip("gradio")
    here, temporary = tmp_path_factory.mktemp("here"), tmp_path_factory.mktemp("temporary")
    root = Path(__file__).parents[1]
    env = os.environ | {
        "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "GRADIO_ALLOWED_PATHS": str(here),
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")]),
    }  # fmt: skip
    command = [sys.executable, "-m", "fastgan.demo", str(weights), "--port", "0", "--device", "cpu"]
    command += ["--precision", "fp32", "--max-upload-mb", "1", "--max-pixels", str(LIMIT)]
    with (here / "stderr").open("w") as said:
        program = subprocess.Popen(command, cwd=here, env=env, stdout=subprocess.PIPE, stderr=said, text=True)
        try:
            line = program.stdout.readline()
            assert "http://127.0.0.1:" in line, (here / "stderr").read_text()
            address = line.split(": ")[1].split()[0].rstrip("/")
            yield address, here
            # in the middle of a translation that takes many seconds
            np.save(here / "in.npy", np.zeros((1000, 6, 6, 3), np.uint8))
            own = upload(address, "in.npy", (here / "in.npy").read_bytes())[0]
            join(address, "last", "translate", own)
            until(lambda: any(path.is_dir() for path in temporary.glob("*/uploads/tmp*")))
            program.send_signal(signal.SIGINT)
            assert program.wait(20) == 0
            errors = (here / "stderr").read_text()
            assert not list(temporary.iterdir())
            # Gradio reports forged paths there
            assert errors.count("Traceback") == errors.count("\ngradio.exceptions.InvalidPathError: ")
        finally:
            program.kill()


# ---- in the browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    programs = shutil.which("chromium"), shutil.which("chromedriver")
    if not all(programs):
        pytest.skip("needs Debian's packages chromium and chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    for flag in [*flags.split(), "disable-component-update", "disable-sync", "window-size=1280,900"]:
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
    yield driver
    driver.quit()


def until(found: Callable[[], Any]) -> Any:
    for _ in range(300):
        if value := found():
            return value
        time.sleep(0.1)
    raise AssertionError("not within 30 s")


def drop(browser: Any, address: str, file: Path) -> None:
    browser.get(address)
    until(lambda: browser.find_elements("css selector", "#upload input[type=file]"))[0].send_keys(str(file))


def text(browser: Any, selector: str) -> str:
    return " ".join(element.text for element in browser.find_elements("css selector", selector))


def fetch(address: str, data: bytes | None = None, **headers: str) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(address, data, headers), timeout=30) as answer:
        return answer.read()


def pictures(browser: Any) -> list[np.ndarray]:
    """What the two sides of the slider show, once the browser has decoded it."""
    script = "return [...document.querySelectorAll('#slider img')].map(x => [x.src, x.naturalWidth])"
    shown = until(lambda: (found := browser.execute_script(script)) and all(w for _, w in found) and found)
    read = []
    for source, _ in shown:
        with urllib.request.urlopen(source, timeout=30) as answer:
            read.append(np.asarray(Image.open(answer)))
    return read


@pytest.mark.parametrize(
    ("name", "image", "direction"),
    [
        ("photo.png", NOISE, "AtoB"),
        ("deep.tif", NOISE.astype(np.uint16) * 257, "BtoA"),
        ("real.npy", NOISE.astype(np.float32) / 255, "AtoB"),
    ],
)
def test_drop_translate_see_download(
    name: str, image: np.ndarray, direction: str, server: Any, browser: Any, weights: Path, tmp_path: Path
) -> None:
    write_image(tmp_path / name, image)
    drop(browser, server[0], tmp_path / name)
    until(lambda: "40 x 36 pixels, RGB" in text(browser, "#line"))
    assert all(np.array_equal(side, NOISE) for side in pictures(browser))
    browser.find_element("css selector", f"#direction input[value={direction}]").click()
    browser.find_element("xpath", "//button[contains(., 'Advanced')]").click()
    until(lambda: text(browser, "#tile"))
    browser.find_element("id", "translate").click()
    until(lambda: f"Translated {direction[0]} to {direction[-1]} in" in text(browser, "#line"))
    expected = load(weights, direction)(image)
    eight = np.rint(expected / np.float32({"u1": 1, "u2": 257, "f4": 1 / 255}[expected.dtype.str[1:]]))
    before, after = pictures(browser)
    assert np.array_equal(before, NOISE) and np.array_equal(after, eight.astype(np.uint8))
    behaviour = {"behavior": "allow", "downloadPath": str(tmp_path / "down")}
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)
    until(lambda: browser.find_elements("css selector", "#result a[download]"))[0].click()
    got = tmp_path / "down" / name.replace(".", f"_{direction}.")
    until(got.is_file)
    result = read_images(got)[0]
    assert result.dtype == image.dtype and np.array_equal(result, expected)
    # the page has asked nothing of any other machine
    log = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in log if m["method"] == "Network.requestWillBeSent"]
    assert any("/queue/join" in url for url in asked)
    assert {urlparse(url).netloc for url in asked if url.startswith("http")} == {urlparse(server[0]).netloc}


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("note.png", b"no image", "note.png: not an image this program reads"),
        ("many.png", np.zeros((201, 201, 3), np.uint8), "40,401 pixels are more than the limit of 40,000"),
        (
            "deep.npy",
            np.zeros((9, 9, 5), np.uint8),
            "deep.npy: has 5 channels, the generator was trained on 3",
        ),
        ("large.png", bytes(2**20 + 1), "exceed the maximum allowed size"),
    ],
)
def test_a_bad_file_gets_a_message(
    name: str, data: bytes | np.ndarray, said: str, server: Any, browser: Any, tmp_path: Path
) -> None:
    if isinstance(data, bytes):
        (tmp_path / name).write_bytes(data)
    else:
        write_image(tmp_path / name, data)
    drop(browser, server[0], tmp_path / name)
    message = until(lambda: text(browser, "[data-testid=toast-body]"))
    assert said in message and str(tmp_path.root) + "tmp" not in message and "uploads" not in message
    assert not browser.find_elements("css selector", "#slider img")


# ---- over HTTP, without the page


def upload(address: str, name: str, data: bytes) -> Any:
    head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    body = head.encode() + data + b"\r\n--x--\r\n"
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    return json.loads(fetch(f"{address}/gradio_api/upload", body, **kind))


def join(address: str, session: str, element: str, path: str) -> None:
    config = json.loads(fetch(f"{address}/config"))
    numbers = {c["props"].get("elem_id"): c["id"] for c in config["components"]}
    which = next(d for d in config["dependencies"] if d["targets"][0][0] == numbers[element])
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    data = [file, "AtoB", [], 0][: len(which["inputs"])]
    body = {"data": data, "fn_index": which["id"], "session_hash": session}
    sent = json.dumps(body).encode()
    fetch(f"{address}/gradio_api/queue/join", sent, **{"Content-Type": "application/json"})


def ask(address: str, *questions: tuple[str, str]) -> list[dict[str, Any]]:
    """Send requests as the page does, (element, path) each, and give all that the server says of them."""
    session = f"s{time.monotonic_ns()}"
    for element, path in questions:
        join(address, session, element, path)
    stream = fetch(f"{address}/gradio_api/queue/data?session_hash={session}").decode()
    return [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: ")]


def test_no_path_from_outside_the_uploads_is_read(server: Any, weights: Path, tmp_path: Path) -> None:
    address, here = server
    for secret in (here / "secret.png", tmp_path / "secret.png"):
        write_image(secret, NOISE)
    own = upload(address, "../../../in.png", (tmp_path / "secret.png").read_bytes())[0]
    uploads = Path(own).parents[1]
    assert uploads.name == "uploads" and Path(own).is_file()
    assert ask(address, ("upload", own))[-1]["msg"] in ("process_completed", "close_stream")
    assert any(m.get("success") for m in ask(address, ("upload", own)))
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.settimeout(0)
        there = f"http://127.0.0.1:{elsewhere.getsockname()[1]}/in.png"
        outside = ["/etc/passwd", str(here / "secret.png"), str(tmp_path / "secret.png"), "secret.png"]
        outside += [os.path.relpath(here / "secret.png", here), f"{uploads}/../../../{here.name}/secret.png"]
        outside += [str(weights / "latest_net_G_A.pth"), there, "https://huggingface.co/in.png"]
        for path in outside:
            for element in ("upload", "translate"):
                done = [m for m in ask(address, (element, path)) if m["msg"] == "process_completed"]
                assert len(done) == 1 and not done[0]["success"], path
                if "://" in path:
                    assert done[0]["output"]["error"] == "only uploaded files are read"
            for way in ("file=", "file/", "proxy="):
                with pytest.raises(urllib.error.HTTPError) as error:
                    fetch(f"{address}/gradio_api/{way}{quote(path, safe='/:')}")
                assert error.value.code in (400, 403, 404), (way, path)
        with pytest.raises(BlockingIOError):
            elsewhere.accept()


def test_limits_hold_without_the_page(server: Any) -> None:
    with pytest.raises(urllib.error.HTTPError) as error:
        upload(server[0], "large.png", bytes(2**20 + 1))
    assert error.value.code == 413


def test_one_request_at_a_time(server: Any, tmp_path: Path) -> None:
    write_image(tmp_path / "in.png", np.zeros((200, 200, 3), np.uint8))
    own = upload(server[0], "in.png", (tmp_path / "in.png").read_bytes())[0]
    said = [m["msg"] for m in ask(server[0], ("translate", own), ("upload", own)) if "process_" in m["msg"]]
    assert said == ["process_starts", "process_completed"] * 2


# ---- the command line


@pytest.mark.parametrize(
    ("fault", "said"),
    [("weights", "gone does not exist"), ("port", "cannot be used (Address already in use)"),
     ("port of another kind", "--port 99999 cannot be used"),
     ("gradio", "the demo needs gradio: run `pip install fastgan[demo]`")],
)  # fmt: skip
def test_what_cannot_be_served_is_one_line(
    fault: str, said: str, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    if fault == "gradio":
        monkeypatch.setitem(sys.modules, "gradio", None)
    else:
        pytest.importorskip("gradio")
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as stop:
        port = 99999 if "kind" in fault else taken.getsockname()[1]
        demo.main([str(weights / "gone" if fault == "weights" else weights), "--port", str(port)])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and said in err and err.count("\n") == 1 and not out


# ---- the parts


def test_previews_are_8_bit() -> None:
    grey = np.arange(4096, dtype=np.uint16).reshape(64, 64, 1)
    shown = np.asarray(demo.preview(grey, (0, 4095)))
    assert shown.shape == (64, 64) and shown[0, 0] == 0 and shown[-1, -1] == 255 and shown[32, 0] == 128
    assert np.array_equal(np.asarray(demo.preview(np.repeat(grey, 5, 2), (0, 4095))), shown)
    outside = np.array([[[-5.0], [10], [20], [99]]], np.float32)
    assert np.asarray(demo.preview(outside, (10, 20))).tolist() == [[0, 0, 255, 255]]
    assert demo.preview(np.zeros((300, 3000, 3), np.uint8), (0, 255)).size == (2048, 205)


def test_choices(weights: Path, tmp_path: Path) -> None:
    assert choices(weights) == (("AtoB", "BtoA"), Labels())
    assert choices(weights / "latest_net_G_A.pth") == ((), Labels())
    run = tmp_path / "run/checkpoints/step_00000001"
    about = {"settings": {"direction": "BtoA", "output": "tanh"}}
    state = ResnetGenerator(3, 3, ngf=2, blocks=1).state_dict()
    for name in ("G", "state"):
        write_weights(run / f"{name}.safetensors", state, about)
    assert choices(tmp_path / "run") == (("BtoA",), Labels())
    for name in ("G_A", "G_B"):
        (run / "G.safetensors").exists() and (run / "G.safetensors").unlink()
        write_weights(run / f"{name}.safetensors", state, about)
    assert choices(tmp_path / "run") == (("BtoA", "AtoB"), Labels())
    torch.save(state, tmp_path / "latest_net_G.pth")
    assert choices(tmp_path) == ((), Labels())


def test_labels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = StarGANGenerator(3, 4, ngf=4, blocks=1)
    torch.save(net.state_dict(), tmp_path / "9-G.ckpt")
    write_image(tmp_path / "in.png", NOISE)
    desk = demo.Desk(given(tmp_path / "9-G.ckpt"), tmp_path)
    assert desk.labels == Labels(("1", "2", "3", "4")) and desk.directions == () and not desk.tiles
    for chosen, label in (([0, 2], [1, 0, 1, 0]), ([], [0] * 4)):
        files = desk.translate(str(tmp_path / "in.png"), None, chosen, 0)[1]
        expected = load(tmp_path / "9-G.ckpt", None, label=label)(NOISE)
        assert np.array_equal(read_images(files[0])[0], expected)


def test_an_enlarged_image_lies_over_its_source(tmp_path: Path) -> None:
    about = {"channels": [3, 0], "settings": {"output": "tanh", "direction": "AtoB", "scale": 2}}
    write_weights(tmp_path / "G.safetensors", SRCNN().state_dict(), about)
    write_image(tmp_path / "in.png", NOISE)
    desk = demo.Desk(given(tmp_path / "G.safetensors"), tmp_path)
    (before, after), files, _ = desk.translate(str(tmp_path / "in.png"), None, [], 32)
    assert desk.tiles and before.size == after.size == (80, 72)
    assert read_images(files[0])[0].shape == (72, 80, 3)


def test_formats_pages_and_tiles(weights: Path, tmp_path: Path) -> None:
    import tifffile

    tifffile.imwrite(tmp_path / "two.tif", np.stack([NOISE, 255 - NOISE]), photometric="rgb")
    Image.fromarray(NOISE).save(tmp_path / "in.ppm")
    desk, translate = demo.Desk(given(weights), tmp_path), load(weights, "BtoA")
    assert desk.tiles
    (before, _), files, line = desk.translate(str(tmp_path / "two.tif"), "BtoA", [], 0)
    assert np.array_equal(np.asarray(before), NOISE) and "2 pages of which the first is shown" in line
    assert [f.name for f in files] == ["two_BtoA.tif"]
    assert np.array_equal(read_images(files[0])[1], translate(255 - NOISE))
    _, files, _ = desk.translate(str(tmp_path / "in.ppm"), "BtoA", [], 32)
    assert [f.name for f in files] == ["in_BtoA.ppm"]
    # in tiles sums are in another order
    difference = read_images(files[0])[0].astype(int) - translate(NOISE)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize(
    ("name", "channels", "dtype", "suffix"),
    [("a.v2.jpg", 1, "uint16", ".png"), ("a.png", 4, "uint8", ".tif"), ("a", 3, "uint8", ".png"),
     ("a.npy", 2, "float32", ".npy"), ("a.webp", 1, "float32", ".tif")],
)  # fmt: skip
def test_a_result_that_the_format_cannot_hold_gets_another(
    name: str, channels: int, dtype: str, suffix: str, tmp_path: Path
) -> None:
    """A generator from 8-bit RGB to the channels and type of another domain."""
    about = {"ranges": [[0, 255], [0, 100]], "dtypes": ["uint8", dtype], "settings": {"output": "tanh"}}
    net = ResnetGenerator(3, channels, ngf=2, blocks=1)
    write_weights(tmp_path / "G.safetensors", net.state_dict(), about)
    source = tmp_path / name
    write_image(tmp_path / "in.npy" if name.endswith("npy") else tmp_path / "in.png", NOISE)
    (tmp_path / ("in.npy" if name.endswith("npy") else "in.png")).rename(source)
    desk = demo.Desk(given(tmp_path / "G.safetensors"), tmp_path)
    (_, after), files, _ = desk.translate(str(source), None, [], 0)
    assert [f.name for f in files] == [f"{source.stem}_translated{suffix}"]
    result = read_images(files[0])[0]
    assert result.dtype == dtype and result.shape == (36, 40, channels)
    assert np.asarray(after).max() > result.max(), "shown from 0 to 100"


def test_only_its_folder_is_read(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "uploads").mkdir()
    write_image(tmp_path / "in.png", NOISE)
    (tmp_path / "uploads/link.png").symlink_to(tmp_path / "in.png")
    desk = demo.Desk(given(weights), tmp_path / "uploads")
    for path in (tmp_path / "in.png", tmp_path / "uploads/../in.png", tmp_path / "uploads/link.png"):
        for call in (desk.before, lambda *a: desk.translate(*a, [], 0)):
            with pytest.raises(DataError, match="only uploaded files are read"):
                call(str(path), "AtoB")
    with pytest.raises(DataError, match="no image yet"):
        desk.before(None, "AtoB")
