"""A JupyterLab server on this machine alone, and a page of a real browser that is watched."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@dataclass(frozen=True)
class Lab:
    """A running server: its folder of notebooks, and where it answers."""

    folder: Path
    address: str
    token: str

    def page_of(self, name: str) -> str:
        return f"{self.address}/lab/tree/{name}?token={self.token}&reset"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(address: str, server: subprocess.Popen, log: Path, seconds: float = 60) -> None:
    """Return when the server answers; RuntimeError with its log when it ends or is too slow."""
    stop = time.monotonic() + seconds
    while time.monotonic() < stop and server.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text('utf-8')[-3000:]}")


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """JupyterLab as `make lab` starts it, over a copy of the notebooks, in an empty home."""
    folder = tmp_path_factory.mktemp("notebooks")
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        shutil.copy(path, folder)
    home, port, token = tmp_path_factory.mktemp("home"), free_port(), secrets.token_hex(16)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += ["--ip=127.0.0.1", f"--port={port}", f"--IdentityProvider.token={token}"]
    command += [f"--ServerApp.root_dir={folder}", "--LabApp.expose_app_in_browser=True"]
    command += [f"--LabApp.app_settings_dir={ROOT / 'config' / 'lab'}"]
    own = {"HOME": str(home), "MI_PROGRESS": str(home / "progress.json"), "HF_HUB_OFFLINE": "1"}
    log = home / "lab.log"
    with log.open("wb") as stream:
        server = subprocess.Popen(command, env=os.environ | own, stdout=stream, stderr=stream)
        try:
            wait_for(f"http://127.0.0.1:{port}/api?token={token}", server, log)
            yield Lab(folder, f"http://127.0.0.1:{port}", token)
        finally:
            server.terminate()
            server.wait(timeout=30)


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def page(browser):
    """A new page; the test fails if the page asks anything of another machine."""
    outside = []

    def note(request):
        address = urlsplit(request.url)
        if address.scheme not in ("data", "blob", "file") and address.hostname != "127.0.0.1":
            outside.append(request.url)

    made = browser.new_page(viewport={"width": 1400, "height": 1000})
    made.on("request", note)
    yield made
    made.close()
    assert outside == [], "the page made requests that leave this machine"
