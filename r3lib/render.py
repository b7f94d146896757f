"""Executed notebooks as Markdown pages, which are read on the web without running anything."""

import re
from pathlib import Path

from nbconvert import MarkdownExporter
from nbformat import read

from .files import write_atomic

STYLE = re.compile(r"<style.*?</style>\s*", re.DOTALL)  # which code hosts show as text
LEFT_OUT = {"parameters", "parameters-note", "injected-parameters", "colab"}  # cells, by their tags


def render(notebook: Path, folder: Path) -> Path:
    """Write the executed `notebook` as a page of `folder`, its images beside it; return the page.

    Left out: parameters, and what went to stderr (progress, warnings of the machine).
    """
    shown = read(notebook, 4)
    shown.cells = [c for c in shown.cells if not LEFT_OUT & set(c.metadata.get("tags", ()))]
    for cell in shown.cells:
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
    text, resources = MarkdownExporter().from_notebook_node(shown)
    text = STYLE.sub("", text)
    for name, image in resources["outputs"].items():
        own = f"{notebook.stem}_{Path(name).name}"
        text = text.replace(f"({name})", f"({own})")
        write_atomic(folder / own, image)
    page = folder / f"{notebook.stem}.md"
    write_atomic(page, text)
    return page
