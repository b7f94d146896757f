"""JupyterLab in headless Chromium: all cells of a notebook run; its figures and tables show.

Screenshots of the whole notebooks, also of one that fails, are kept in `.lab/`.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
SCREENSHOTS = ROOT / ".lab"
SHOWN = {"00_tour": (0, 1), "03_train_r3": (1, 1)}  # at least so many figures and tables
SHOWN |= {path.stem: (1, 1) for path in NOTEBOOKS.glob("06_*.ipynb")}
CHANGED = {"profile": "smoke", "task": "countdown"}
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = [
    "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]  # fmt: skip
QUIET = {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false"}}
MINUTE = 60_000  # milliseconds
TALLEST = 16_000  # pixels that Chromium draws on one screenshot

SCROLL_UP = "() => document.querySelector('.jp-WindowedPanel-outer').scrollTo(0, 0)"
BOTTOM = "cells => cells.at(-1).getBoundingClientRect().bottom"
WIDTHS = "images => images.map(image => image.complete ? image.naturalWidth : 0)"
WORDS = "tables => tables.map(table => table.innerText.trim().length)"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium: on Debian, apt-get install chromium"),
]


def with_parameters(source, values):
    """The parameters cell as a user leaves it who changed these values."""
    for name, value in values.items():
        source, found = re.subn(
            rf'^{name} = ".*?"', f'{name} = "{value}"', source, flags=re.MULTILINE
        )
        assert found == 1, f"the parameters cell sets no {name}"
    return source


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """A folder of the notebooks, set to the profile `smoke` and to results in a folder beside."""
    folder = tmp_path_factory.mktemp("lab")
    values = CHANGED | {"results": folder / "results"}
    for name in SHOWN:
        notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
        [cell] = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
        cell.source = with_parameters(cell.source, values)
        nbformat.write(notebook, folder / f"{name}.ipynb")
    return folder


@pytest.fixture(scope="module")
def lab(copies, tmp_path_factory):
    """A JupyterLab on the copies, with nobody's own settings; yields its address and token."""
    home = tmp_path_factory.mktemp("home")
    (home / "overrides.json").write_text(json.dumps(QUIET))
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1",
        "--ServerApp.port=0", f"--ServerApp.root_dir={copies}", f"--LabApp.app_settings_dir={home}",
        f"--LabApp.user_settings_dir={home}", f"--LabApp.workspaces_dir={home}",
    ]  # fmt: skip
    env = {f"JUPYTER_{name}_DIR": str(home) for name in ("CONFIG", "DATA", "RUNTIME")}
    env |= {"PYTHONPATH": str(ROOT)}
    with (home / "server.log").open("w") as log:
        server = subprocess.Popen(command, env=os.environ | env, stdout=log, stderr=log)
    try:
        yield started(server, home, home / "server.log")
    finally:
        server.terminate()
        server.wait(timeout=60)


def started(server, runtime, log):
    """Wait for the file in which a server writes its address and token once it listens."""
    deadline = time.monotonic() + 120
    while True:
        for note in runtime.glob("jpserver-*.json"):
            if note.stat().st_size:
                return json.loads(note.read_text())
        assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.1)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("chromium"), executable_path=CHROMIUM, args=FLAGS,
            chromium_sandbox=False, viewport={"width": 1280, "height": 900},
        )  # fmt: skip
        yield context
        context.close()


def run_all_cells(page, lab, path):
    """Open a notebook, click Run > Run All Cells, save; return the notebook as it was saved."""
    page.goto(f"{lab['url']}lab/tree/{path.name}?reset&token={lab['token']}", timeout=MINUTE)
    idle = page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]')
    idle.wait_for(timeout=MINUTE)
    question = page.locator(".jp-Dialog .jp-mod-accept")  # which kernel; may come twice
    page.add_locator_handler(question, lambda: question.click(), no_wait_after=True)
    prompts = page.locator(".jp-CodeCell .jp-InputPrompt")
    deadline = time.monotonic() + 300
    while True:  # a click that comes before the kernel is there runs nothing, or not every cell: click again
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        page.wait_for_timeout(5000)
        expect(prompts.filter(has_text="*")).to_have_count(0, timeout=5 * MINUTE)
        idle.wait_for(timeout=MINUTE)
        page.keyboard.press("Control+s")
        expect(page.locator(".jp-mod-dirty")).to_have_count(0, timeout=MINUTE)
        saved = nbformat.read(path, as_version=4)
        if not (errors(saved) or not_run(saved)) or time.monotonic() > deadline:
            return saved



def errors(notebook):
    """What the cells of a notebook raised."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [f"{o.ename}: {o.evalue}" for o in outputs if o.output_type == "error"]


def not_run(notebook):
    """The code cells of a notebook that were not run."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [cell.source for cell in cells if not cell.execution_count]


def screenshot(page, name):
    """Make the window as tall as the notebook, and keep a picture of all of it."""
    SCREENSHOTS.mkdir(exist_ok=True)
    page.set_viewport_size({"width": 1280, "height": TALLEST})
    page.evaluate(SCROLL_UP)
    page.wait_for_timeout(1000)  # cells that were out of sight are drawn now
    height = int(page.locator(".jp-Notebook .jp-Cell").evaluate_all(BOTTOM)) + 50
    page.set_viewport_size({"width": 1280, "height": min(height, TALLEST)})
    page.screenshot(path=SCREENSHOTS / f"{name}.png", timeout=MINUTE)


@pytest.mark.parametrize("name", SHOWN)
def test_a_user_opens_a_notebook_runs_all_cells_and_sees_its_figures_and_tables(
    name, copies, lab, browser
):
    page = browser.new_page()
    try:
        notebook = run_all_cells(page, lab, copies / f"{name}.ipynb")
    finally:
        screenshot(page, name)
    assert not errors(notebook) and not not_run(notebook)
    output = page.locator(".jp-OutputArea-output")
    images, tables = output.locator("img"), output.locator("table")
    assert all(images.evaluate_all(WIDTHS)) and all(tables.evaluate_all(WORDS))
    figures_at_least, tables_at_least = SHOWN[name]
    assert images.count() >= figures_at_least and tables.count() >= tables_at_least


def test_a_cell_that_fails_and_those_after_it_are_found(copies, lab, browser):
    notebook = nbformat.v4.new_notebook()
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3 (ipykernel)"}
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in ("1", "1 / 0", "2")]
    path = copies / "fails.ipynb"
    nbformat.write(notebook, path)
    saved = run_all_cells(browser.new_page(), lab, path)
    assert errors(saved) == ["ZeroDivisionError: division by zero"]
    assert not_run(saved) == ["2"]
