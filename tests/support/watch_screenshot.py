"""Makes docs/images/watch.png: the page of ``outrider watch --html`` over a fleet that is made up.

From the folder ``tests``: ``python -m support.watch_screenshot [FILE] [--dark]``.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from outrider.watch import Watch
from outrider.watch.server import Server
from support.broker import Mosquitto, wait_until
from support.fleet import a_story
from support.listener import Listener

IMAGE = Path(__file__).resolve().parents[2] / "docs" / "images" / "watch.png"
MAX_BYTES = 200_000
WIDTH, HEIGHT = 1360, 1120


def take(path: Path, *, dark: bool = False, width: int = WIDTH, height: int = HEIGHT) -> None:
    """Write one screenshot."""
    with tempfile.TemporaryDirectory() as folder, Mosquitto(Path(folder)) as broker, Watch(broker.url) as watch:
        wait_until(lambda: watch.connected, what="the watch is connected")
        story = list(a_story(until_s=time.time() - 20.0))
        with Listener(broker.port, "nothing") as device:
            for message in story:
                device.say(message.topic, message.payload, retain=message.retain)
        gone = "gate-south"
        wait_until(lambda: any(row.device == gone and row.state == "offline" for row in watch.rows()), what="the story")
        with Server(watch) as server, sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(
                viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
            )
            page.goto(server.url)
            page.wait_for_function("document.querySelectorAll('#rows tr').length === 8")
            page.wait_for_function("document.querySelectorAll('#charts path').length >= 12")
            page.screenshot(path=path)
            browser.close()


def shrink(path: Path) -> None:
    """The image with a palette: its colours are few."""
    with Image.open(path) as image:
        image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, default=IMAGE)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--width", type=int, default=WIDTH)
    arguments = parser.parse_args()
    take(arguments.file, dark=arguments.dark, width=arguments.width)
    shrink(arguments.file)
    size = arguments.file.stat().st_size
    if size >= MAX_BYTES:
        raise SystemExit(f"{arguments.file} has {size} bytes, {MAX_BYTES} are allowed")
    print(f"{arguments.file}: {size} bytes")
