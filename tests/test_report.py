"""The report: what the page shows is what the files say; nothing a model wrote can act on it."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pandas as pd
import pytest

from r3lib import report
from r3lib.errors import R3Error
from r3lib.evaluate import ACCURACY, COMPARISONS, TRAINING

HOSTILE = "</script><b onload=alert(1)>\"quoted\" & 'single' \u2028 <!-- \\u003c https://a.org \x00 é"
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000a49444154789c63000100000500010d0a2db40000000049454e44ae426082"
)


class Page(HTMLParser):
    """Table rows by section, resources, scripts and tags of a page."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.rows, self.resources, self.scripts, self.tags = {}, [], {}, []
        self.section, self.cell, self.script = "", None, None
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.resources += [
            attributes[k] for k in ("src", "href", "srcset", "data", "action") if k in attributes
        ]
        if tag == "section":
            self.section = attributes["id"]
        if tag == "tr":
            self.rows.setdefault(self.section, []).append([])
        if tag in ("td", "th"):
            self.rows[self.section][-1].append("")
            self.cell = True
        if tag == "script":
            self.script = attributes.get("id", "code")

    def handle_endtag(self, tag):
        self.cell = None if tag in ("td", "th") else self.cell
        self.script = None if tag == "script" else self.script

    def handle_data(self, data):
        if self.script:
            self.scripts[self.script] = self.scripts.get(self.script, "") + data
        elif self.cell:
            self.rows[self.section][-1][-1] += data


def accuracy_rows(problems):
    """Two policies, three seeds, first try and reflect_retry, with a pooled row each."""
    policies = [("vanilla", "", 0.54, 0.13), ("r3", "countdown", 0.53, 0.37)]
    for policy, trained_on, first, second in policies:
        failures = round(problems * (1 - first))
        tries = [("first_try", problems, first), ("reflect_retry", failures, second)]
        for condition, n, rate in tries:
            cell = ["countdown", policy, trained_on, condition, "test"]
            k = round(rate * n)
            for seed in (0, 1, 2):
                yield [*cell, seed, n, k, k / n, k / n - 0.02, k / n + 0.03]
            yield [*cell, "all", 3 * n, 3 * k, k / n, k / n - 0.01, k / n + 0.02]


def episode_rows(n):
    for i in range(n):
        for policy in ("vanilla", "r3"):
            cell, problem = ["countdown", policy], [0, f"p{i}", "Reach 7."]
            yield [*cell, "first_try", *problem, HOSTILE, "missed_target", None, None, None]
            yield [*cell, "reflect_retry", *problem, "no", "no_answer", HOSTILE, "yes", "ok"]


@pytest.fixture
def results(tmp_path):
    """A finished run of a profile called `demo`."""
    root = tmp_path / "results" / "demo"
    for folder in ("tables", "figures", "episodes"):
        (root / folder).mkdir(parents=True)
    write_accuracy(root, problems=1000)
    effect = [TRAINING["reflect_retry"], "countdown", "r3/reflect_retry", "vanilla/reflect_retry"]
    control = ["Does <it> help?", "countdown", "r3/reflect_retry", "r3/retry"]
    rows = [[*effect, 930, 3, 0.2377, 0.201, 0.27, 0.00012, 0.0006]]
    rows.append([*control, 930, 3, 0.1, -0.01, 0.2, 0.07, 0.07])
    compared = pd.DataFrame(rows, columns=[*COMPARISONS, "p_holm"])
    compared.to_csv(root / "tables" / "comparisons.csv", index=False)
    pd.DataFrame({"style": ["<search>", None], "share": [0.891, None]}).to_csv(
        root / "tables" / "styles.csv", index=False
    )
    for name in ("own", "countdown_errors", "countdown_training"):
        (root / "figures" / f"{name}.png").write_bytes(PIXEL)
    made = {"notebook": "03_train_r3.ipynb", "cell": "reward", "commit": "abc123", "dirty": True}
    made |= {"hardware": {"cpus": 2, "gpu": None}, "packages": {"torch": "2.13.0", "vllm": None}}
    artefacts = {
        "figures/countdown_training.png": made | {"seconds": 512},
        "tables/styles.csv": made | {"seconds": 9},
    }
    manifest = {"schema_version": 1, "artefacts": artefacts}
    (root / "manifest.json").write_text(json.dumps(manifest))
    rows = pd.DataFrame(episode_rows(4), columns=report.EPISODE)
    rows.to_parquet(root / "episodes" / "shard-0.parquet")
    return root


def write_accuracy(root, problems):
    table = pd.DataFrame(accuracy_rows(problems), columns=ACCURACY)
    table.to_csv(root / "tables" / "accuracy.csv", index=False)


def page_of(results):
    return Page(report.write_report(results).read_text(encoding="utf-8"))


def test_the_headline_shows_the_tables_numbers_and_the_papers(results):
    rows = {row[0]: row[1:] for row in page_of(results).rows["headline"]}
    assert rows["Qwen2.5-1.5B-Instruct"] == ["6.0%", "10.2%", "34.9%", "45.0%"]
    ours = rows["this run (demo)"]
    assert ours[0] == "54.0% [53.0, 56.0], n=3,000, 3 seeds"
    assert ours[2] == "53.0% [52.0, 55.0], n=3,000, 3 seeds"
    assert ours[1].startswith("60.0% [") and ours[3].startswith("70.4% [")


def test_the_papers_unconfirmed_numbers_never_appear_and_recalled_ones_carry_a_dagger(results):
    paper = pd.read_csv(report.PAPER)
    rows = {row[0]: row[1:] for row in page_of(results).rows["headline"]}
    hidden = paper[(paper.confidence == "C") & (paper.task == "countdown")]
    assert len(hidden) and "Qwen2.5-3B-Instruct" not in rows
    assert rows["Qwen2.5-7B-Instruct"] == ["31.7%", "", "41.6%", ""]
    recalled = paper[paper.confidence == "B"].iloc[0]
    assert report.paper_number(recalled) == f"{recalled.value:.1f}%†"


def test_the_summary_says_what_training_changed(results):
    [head, effect] = page_of(results).rows["summary"]
    assert effect[0] == TRAINING["reflect_retry"]
    assert effect[1:4] == ["13.0%", "37.0%", "+23.8 [+20.1, +27.0]"]
    assert effect[4:] == ["930", "3", "0.0006"]
    assert head[1:3] == ["untrained", "trained (R3)"]


def test_a_run_on_few_problems_says_so_and_a_real_one_does_not(results):
    assert "A trial run" not in report.write_report(results).read_text()
    write_accuracy(results, problems=99)
    html = report.write_report(results).read_text()
    assert "A trial run, with n=99 test problems" in html and "not what R3 does" in html


def test_every_condition_is_listed_with_interval_n_and_seeds(results):
    head, *shown = page_of(results).rows["conditions"]
    assert head == ["condition", "untrained", "trained (R3)"]
    first = ["54.0% [53.0, 56.0], n=3,000, 3 seeds", "53.0% [52.0, 55.0], n=3,000, 3 seeds"]
    assert shown[0] == ["first_try", *first] and shown[1][0] == "reflect_retry"


def test_comparisons_and_other_tables_are_shown_escaped(results):
    rows = page_of(results).rows
    assert rows["comparisons"][2][0] == "Does <it> help?"
    assert rows["comparisons"][1][2:5] == [
        "trained (R3): reflect_retry", "untrained: reflect_retry", "+23.8 [+20.1, +27.0]",
    ]  # fmt: skip
    assert ["<search>", "0.891"] in rows["tables"] and ["", ""] in rows["tables"]


def test_hostile_model_text_round_trips_and_adds_no_tag(results):
    page = page_of(results)
    data = json.loads(page.scripts["episodes"])
    episodes = [dict(zip(data["columns"], row, strict=True)) for row in data["rows"]]
    assert len(episodes) == data["total"] == 16
    assert {e["attempt"] for e in episodes if e["condition"] == "first_try"} == {HOSTILE}
    assert {e["reflection"] for e in episodes if e["condition"] == "reflect_retry"} == {HOSTILE}
    assert all(e["retry"] is None for e in episodes if e["condition"] == "first_try")
    assert page.tags.count("script") == 2 and "b" not in page.tags


def test_the_page_stands_alone(results):
    page = page_of(results)
    assert page.resources
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.resources)
    assert "import" not in page.scripts["code"] and "fetch" not in page.scripts["code"]
    assert "innerHTML" not in page.scripts["code"]


def test_figures_come_in_the_notebooks_order_with_caption_and_source(results):
    html = report.write_report(results).read_text(encoding="utf-8")
    captions = [report.CAPTIONS["training"], report.CAPTIONS["errors"], "own"]
    places = [html.index(f"<figcaption>{caption}") for caption in captions]
    assert places == sorted(places)
    assert "(03_train_r3.ipynb: reward)" in html


def test_every_link_of_the_contents_leads_somewhere(results):
    html = report.write_report(results).read_text(encoding="utf-8")
    links = re.findall(r'href="#([^"]+)"', html)
    assert len(links) == 8 and all(f'<section id="{name}">' in html for name in links)


def test_provenance_comes_from_the_manifest(results):
    rows = page_of(results).rows["provenance"][1:]
    assert rows == [
        ["03_train_r3.ipynb", "512", "abc123, with uncommitted changes", "cpus 2", "torch 2.13.0"]
    ]


def test_a_long_run_is_sampled_to_the_same_problems_in_every_cell(results, monkeypatch):
    monkeypatch.setattr(report, "PER_CELL", 10)
    frame = pd.DataFrame(episode_rows(50), columns=report.EPISODE)
    shown = report.sample(frame)
    again = report.sample(frame.sample(frac=1, random_state=3))
    assert shown == again and (len(shown["rows"]), shown["total"]) == (40, 200)
    problems = {}
    for row in shown["rows"]:
        problems.setdefault(tuple(row[:3]), set()).add(row[4])
    assert len(problems) == 4 and len({frozenset(p) for p in problems.values()}) == 1


def test_long_texts_lower_the_sample_so_the_page_stays_small(monkeypatch):
    monkeypatch.setattr(report, "VIEWER_BYTES", 20_000)
    shown = report.sample(pd.DataFrame(episode_rows(100), columns=report.EPISODE))
    assert shown["rows"] and len(json.dumps(shown["rows"])) <= 20_000 and shown["total"] == 400


@pytest.mark.parametrize("part", ["tables/comparisons.csv", "manifest.json", "figures", "episodes"])
def test_a_missing_part_is_named_with_its_remedy(results, part):
    lost = results / part
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    with pytest.raises(R3Error, match=f"{part}.*r3 reproduce --profile demo") as error:
        report.write_report(results)
    assert "\n" not in str(error.value)
    assert not (results / "report.html").exists()


PARTS = ["tables/accuracy.csv", "manifest.json", "episodes/shard-0.parquet"]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kept", [0, 20])
def test_a_truncated_part_is_named(results, part, kept):
    whole = (results / part).read_bytes()
    (results / part).write_bytes(whole[:kept])
    with pytest.raises(R3Error, match=part):
        report.write_report(results)


VIEWER = """
class Element {
  constructor(tag) {
    Object.assign(this, { tag, children: [], heard: {}, value: "", textContent: "" });
  }
  append(child) { this.children.push(child); }
  replaceChildren() { this.children = []; }
  addEventListener(name, act) { this.heard[name] = act; }
}
const parts = {};
for (const id of ["filters", "list", "count", "back", "next"]) parts[id] = new Element(id);
const names = ["task", "policy", "condition", "reason", "text"];
for (const name of names) parts.filters[name] = new Element(name);
const fs = require("fs"), given = JSON.parse(fs.readFileSync(0, "utf8"));
parts.episodes = { textContent: given.episodes };
globalThis.document = { getElementById: id => parts[id], createElement: tag => new Element(tag) };
require("vm").runInThisContext(given.code);
const out = [];
const look = () => out.push([parts.list.children.length, parts.count.textContent]);
const set = (name, value) => {
  parts.filters[name].value = value; parts.filters.heard.input(); look();
};
look(); parts.next.heard.click(); look(); parts.next.heard.click(); look();
set("policy", "r3"); set("condition", "reflect_retry"); set("reason", "ok"); set("text", "QUOTED");
set("reason", "missed_target");
console.log(JSON.stringify(out));
"""


@pytest.mark.skipif(not shutil.which("node"), reason="runs the viewer's script with node")
def test_the_viewer_filters_and_pages(results):
    frame = pd.DataFrame(episode_rows(8), columns=report.EPISODE)
    frame.to_parquet(results / "episodes" / "shard-0.parquet")
    scripts = json.dumps(page_of(results).scripts)
    command = ["node", "-e", VIEWER]
    done = subprocess.run(command, input=scripts, capture_output=True, text=True, check=True)
    seen = json.loads(done.stdout)
    assert [n for n, _ in seen] == [10, 10, 10, 10, 8, 8, 8, 0]
    assert seen[1][1].startswith("11 to 20 of 32 matching")
    assert seen[-1][1] == "No episode matches."
