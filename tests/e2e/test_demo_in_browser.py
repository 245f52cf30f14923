"""The demo's page in a real browser, headless."""

import importlib.util
import json
import re
import shlex
import shutil
import time
import urllib.error
import urllib.request
from threading import Thread

import numpy as np
import pytest
from PIL import Image
from support import REPO, begin, command, environment, free_port, model_of, run_command

PARTS = ("gradio", "selenium")
missing = [name for name in PARTS if importlib.util.find_spec(name) is None]
missing += [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)} (extra demo; selenium; a Chromium)"),
]
SECONDS = 60


@pytest.fixture(scope="module")
def address(module_folder):
    """The page of a tiny model, by the program itself."""
    folder = module_folder("demo")
    path = model_of(folder / "run")
    port = free_port()
    started = time.monotonic()
    flags = ["--model_path", path, "--device", "cpu", "--port", port]
    process = begin(command("scripts/demo.py", *flags), environment(folder))
    seen = [next((line for line in process.stdout if line.startswith("http://")), "")]
    assert f"http://127.0.0.1:{port} " in seen[0]
    print(f"started in {time.monotonic() - started:.1f} s")
    Thread(target=seen.extend, args=(process.stdout,), daemon=True).start()  # a full pipe would stop it
    yield seen[0].split()[0]
    process.terminate()
    assert process.wait(SECONDS) in (0, -15)


@pytest.fixture(scope="module")
def driver():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1600"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


class Page:
    """What a user does on the page."""

    def __init__(self, driver, address):
        self.driver = driver
        driver.get(address)
        self.find("#draw")

    def find(self, css):
        return self.until(lambda: self.driver.find_elements("css selector", css))[-1]

    def until(self, look):
        end = time.monotonic() + SECONDS
        while not (found := look()):
            assert time.monotonic() < end, self.driver.find_element("css selector", "body").text
            time.sleep(0.1)
        return found

    def text(self):
        return self.find("#text").text

    def click(self, css):
        self.driver.execute_script("arguments[0].click()", self.find(css))

    def enter(self, css, value):
        from selenium.webdriver import Keys

        field = self.find(css)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(str(value), Keys.TAB)

    def draw(self, steps=3):
        """Draw; returns the address of the picture."""
        self.enter("#steps input[type=number]", steps)
        before = self.shown()
        self.click("#draw")
        # The last state arrives with the word, but the page does not change both at once.
        self.until(lambda: self.text() == "Done." and self.shown() != before and self.shown() == self.shown(0.5))
        return self.shown()

    def shown(self, wait=0.0):
        time.sleep(wait)
        images = self.driver.find_elements("css selector", "#picture0 img")
        return images[0].get_attribute("src") if images else None

    def bytes_of(self, src):
        fetch = "const [src, done] = arguments; fetch(src).then(r => r.bytes()).then(b => done([...b]))"
        return bytes(self.driver.execute_async_script(fetch, src))

    def command(self):
        return self.find("#command0 textarea").get_attribute("value")

    def settled(self):
        """The editor's canvas; nothing on the page tells that the editor has taken the image."""
        canvas = self.find("#editor canvas")
        self.until(lambda: canvas.size["width"] > 100)
        time.sleep(2)
        return canvas

    def error(self):
        return self.until(lambda: self.find(".toast-body").text)

    def requested(self):
        """Addresses that the browser asked for since the last look."""
        events = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        sent = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith(("data:", "blob:", "chrome:", "about:"))]


@pytest.fixture
def page(driver, address):
    return Page(driver, address)


def test_a_drawn_picture_is_that_of_the_command_and_nothing_is_loaded_from_elsewhere(page, address, tmp_path):
    picture = page.bytes_of(page.draw())
    flags = shlex.split(page.command())[2:-1]
    run_command(command("infer_mdt.py", *flags, tmp_path / "again.png"), environment(tmp_path), cwd=REPO)
    assert (tmp_path / "again.png").read_bytes() == picture
    assert "--num_sampling_steps 3" in page.command() and "picture" in page.find("#kept").text
    asked = page.requested()
    assert asked and all(url.startswith(address) for url in asked)


def test_another_weight_draws_another_picture_and_a_second_setting_stands_beside(page):
    first = page.bytes_of(page.draw())
    page.enter("#weight input[type=number]", 8)
    assert page.bytes_of(page.draw()) != first and "--cfg_scale 8" in page.command()
    page.click("#second button")
    page.click("#compare input")
    page.enter("#steps_b input[type=number]", 2)
    page.draw()
    assert page.bytes_of(page.find("#picture1 img").get_attribute("src")) != first


def test_a_mask_drawn_on_a_picture_is_filled_and_the_rest_is_kept(page):
    from selenium.webdriver import ActionChains

    page.enter("#count input[type=number]", 1)
    page.draw()
    page.click("#inpainting button")
    page.click("#take")
    canvas = page.settled()
    page.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    (ActionChains(page.driver).move_to_element_with_offset(canvas, -40, -40).click_and_hold()
        .move_by_offset(40, 40).move_by_offset(20, 0).release().perform())  # fmt: skip
    time.sleep(1)
    page.draw()
    command_line = page.command()
    photo, mask = (re.search(rf"--{name} (\S+)", command_line)[1] for name in ("image", "mask"))
    with Image.open(photo) as image, Image.open(mask) as painted:
        assert image.size == painted.size == (256, 256)
        share = np.asarray(painted).mean() / 255
    assert 0.005 < share < 0.5 and "--inpaint_mode" in command_line


def test_a_sampling_is_cancelled_and_the_next_one_is_drawn(page):
    page.enter("#steps input[type=number]", 250)
    page.enter("#count input[type=number]", 20)
    page.click("#draw")
    page.until(lambda: page.text().startswith("Step"))
    page.click("#cancel")
    page.until(lambda: page.text() == "Cancelled.")
    assert page.draw()


def test_a_reloaded_page_draws_the_usual_picture_again(page, address):
    first = page.bytes_of(page.draw())
    page.enter("#seed input", 5)
    assert page.bytes_of(page.draw()) != first
    page.driver.refresh()
    page.find("#draw")
    assert page.find("#seed input").get_attribute("value") == "0"
    assert page.bytes_of(page.draw()) == first


def test_an_upload_that_is_no_image_is_refused_in_words_and_the_page_goes_on(page, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"this is no image" * 10)
    page.click("#inpainting button")
    page.find("#inpainting input[type=file]").send_keys(str(bad))
    assert "bad.png" in page.error()
    good = tmp_path / "good.png"
    Image.new("RGB", (40, 30), "red").save(good)
    page.driver.refresh()
    page.click("#inpainting button")
    page.find("#inpainting input[type=file]").send_keys(str(good))
    page.settled()
    page.click("#draw")
    assert "nothing is painted on the image" in page.error()


def test_pages_of_other_addresses_get_nothing_in(address):
    for headers in ({"Origin": "http://elsewhere.org"}, {"Origin": "http://localhost:3000"}):
        request = urllib.request.Request(f"{address}/gradio_api/upload", b"", headers)
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(request, timeout=SECONDS)
