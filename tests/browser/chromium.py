"""Chromium without a window, and what a person does with the page of a server."""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

_FLAGS = (
    *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"),
    *("disable-component-update", "disable-sync"),
)


@contextlib.contextmanager
def chromium(directory: Path) -> Iterator[webdriver.Chrome]:
    """A browser with a new profile, which downloads to a directory. Fails where none is installed."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert browser and driver, "these tests need chromium and chromedriver on PATH"
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*_FLAGS, f"user-data-dir={directory / 'profile'}"):
        options.add_argument(f"--{flag}")
    options.add_experimental_option("prefs", {"download.default_directory": str(directory)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    window = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield window
    finally:
        window.quit()


class Page:
    """The page at `/`, as a person sees and uses it."""

    def __init__(self, window: webdriver.Chrome, url: str):
        self.window = window
        self.size(1100, 760)
        self.media("light")
        window.get(url)
        self.wait(lambda: self.text("#model") or self.visible("#said"))

    def find(self, selector: str) -> Any:
        """The last element of a kind: the newest."""
        return self.window.find_elements(By.CSS_SELECTOR, selector)[-1]

    def count(self, selector: str) -> int:
        return len(self.window.find_elements(By.CSS_SELECTOR, selector))

    def text(self, selector: str) -> str:
        """What an element holds, hidden or not, with all its spaces."""
        return self.find(selector).get_property("textContent")

    def visible(self, selector: str) -> bool:
        return self.find(selector).is_displayed()

    def style(self, selector: str, name: str) -> str:
        return self.find(selector).value_of_css_property(name)

    def fill(self, field: str, value: str) -> None:
        self.find(field).clear()
        self.find(field).send_keys(value)

    def send(self, message: str) -> str:
        """Write a message, press Enter, and wait for the answer."""
        before = self.count(".note")
        self.find("#ask").send_keys(message + Keys.ENTER)
        return self.answered(before)

    def press(self, selector: str) -> str:
        """Press one of the buttons that ask again."""
        before = self.count(".note")
        self.find(selector).click()
        return self.answered(before)

    def answered(self, before: int) -> str:
        self.wait(lambda: self.count(".note") > before)
        self.wait(lambda: self.find("#turns").get_attribute("aria-busy") == "false")
        return self.text(".text")

    def wait(self, until: Callable[[], Any], seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < deadline, self.text("body")
            time.sleep(0.02)

    def media(self, scheme: str, motion: str = "no-preference") -> None:
        features = [
            {"name": f"prefers-{name}", "value": value}
            for name, value in {"color-scheme": scheme, "reduced-motion": motion}.items()
        ]
        self.window.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def size(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def online(self, online: bool) -> None:
        """Pull the plug, or put it back."""
        self.window.execute_cdp_cmd("Network.enable", {})
        conditions = {"offline": not online, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        self.window.execute_cdp_cmd("Network.emulateNetworkConditions", conditions)

    def script(self, code: str) -> Any:
        return self.window.execute_script(code)
