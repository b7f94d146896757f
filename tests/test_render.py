"""Pages of executed notebooks: what a reader on the web sees."""

from base64 import b64encode

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from r3lib.render import render

PNG = b"\x89PNG pixels"


def test_a_page_has_texts_outputs_and_images_but_nothing_of_the_machine(tmp_path):
    image = {"image/png": b64encode(PNG).decode()}
    outputs = [
        new_output("stream", name="stdout", text="rate 0.5\n"),
        new_output("stream", name="stderr", text="/home/me/lib.py: Warning 12it/s\n"),
        new_output("display_data", data=image),
        new_output("display_data", data={"text/html": "<style>b {}</style><table></table>"}),
    ]
    tagged = new_code_cell('results = "/home/me"', metadata={"tags": ["injected-parameters"]})
    cells = [new_markdown_cell("# Title"), tagged, new_code_cell("draw()", outputs=outputs)]
    nbformat.write(new_notebook(cells=cells), tmp_path / "00_a.ipynb")
    page = render(tmp_path / "00_a.ipynb", tmp_path / "pages")
    text = page.read_text()
    assert all(part in text for part in ("# Title", "draw()", "rate 0.5", "<table>"))
    assert "/home/me" not in text and "style" not in text
    [picture] = page.parent.glob("*.png")
    assert picture.read_bytes() == PNG and f"({picture.name})" in text
