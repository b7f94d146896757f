"""The report: what the page shows is what the files say; nothing a model wrote can act on it."""

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import pandas as pd
import pytest

from r3lib import report
from r3lib.episodes import Episode, frame
from r3lib.errors import R3Error, Stale
from r3lib.evaluate import ACCURACY, COMPARISONS
from r3lib.files import sha256

HOSTILE = "</script><b onload=alert(1)>\"quoted\" & 'single' \u2028 <!-- \\u003c a.org \x00 é"
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000a49444154789c63000100000500010d0a2db40000000049454e44ae426082"
)


class Page(HTMLParser):
    """Table rows by section, texts of episodes, resources and tags of a page."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.rows, self.texts, self.resources, self.tags = {}, [], [], []
        self.section, self.tag = "", ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.tag = tag
        links = ("src", "href", "srcset", "data", "action")
        self.resources += [attributes[name] for name in links if name in attributes]
        if tag == "section":
            self.section = attributes["id"]
        if tag == "tr":
            self.rows.setdefault(self.section, []).append([])
        if tag in ("td", "th"):
            self.rows[self.section][-1].append("")
        if tag == "pre":
            self.texts.append("")

    def handle_endtag(self, tag):
        self.tag = ""

    def handle_data(self, data):
        if self.tag in ("td", "th"):
            self.rows[self.section][-1][-1] += data
        if self.tag == "pre":
            self.texts[-1] += data


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


def episodes(n):
    """First tries and second tries of two policies, which fail all of `n` problems."""
    rows = []
    for i in range(n):
        for policy in ("vanilla", "r3"):
            first = Episode(
                task="countdown",
                split="test",
                problem_id=f"p{i}",
                policy=policy,
                seed=0,
                condition="first_try",
                sample=0,
                prompt="Reach 7.",
                attempt=HOSTILE,
                attempt_reason="missed_target",
                reflection=None,
                retry=None,
                retry_reason=None,
                attempt_tokens=5,
                reflection_tokens=None,
                retry_tokens=None,
                model="nano",
                adapter="",
            )
            told = dict(reflection=HOSTILE, retry="yes", retry_reason="ok")
            rows += [first, replace(first, condition="reflect_retry", **told)]
    return frame(rows)


@pytest.fixture
def results(tmp_path):
    """A finished run of a profile called `demo`."""
    root = tmp_path / "results" / "demo"
    for folder in ("tables", "figures", "episodes"):
        (root / folder).mkdir(parents=True)
    write_accuracy(root, problems=1000)
    effect = ["Does training help?", "countdown", "r3/reflect_retry", "vanilla/reflect_retry"]
    control = ["Does <it> help?", "countdown", "r3/reflect_retry", "r3/retry"]
    rows = [[*effect, 930, 3, 0.2377, 0.201, 0.27, 0.00012, 0.0006]]
    rows.append([*control, 930, 3, 0.1, -0.01, 0.2, 0.07, 0.07])
    compared = pd.DataFrame(rows, columns=[*COMPARISONS, "p_holm"])
    compared.to_csv(root / "tables" / "comparisons.csv", index=False)
    pd.DataFrame({"style": ["<search>", None], "share": [0.891, None]}).to_csv(
        root / "tables" / "styles.csv", index=False
    )
    made = {"notebook": "03_train_r3", "cell": "reward", "commit": "abc123", "dirty": True}
    made |= {"hardware": {"cpus": 2, "gpu": None}, "packages": {"torch": "2.13.0", "vllm": None}}
    episodes(4).to_parquet(root / "episodes" / "shard-0.parquet")
    made["inputs"] = {"episodes/shard-0.parquet": sha256(root / "episodes" / "shard-0.parquet")}
    artefacts = {"tables/styles.csv": made | {"seconds": 9}}
    for name, notebook in (("errors", "05_failures"), ("training", "03_train_r3")):
        (root / "figures" / f"{name}.png").write_bytes(PIXEL)
        artefacts[f"figures/{name}.png"] = made | {"seconds": 512, "notebook": notebook}
    artefacts = {name: entry | {"sha256": sha256(root / name)} for name, entry in artefacts.items()}
    manifest = {"schema_version": 1, "artefacts": artefacts}
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root


def write_accuracy(root, problems):
    table = pd.DataFrame(accuracy_rows(problems), columns=ACCURACY)
    table.to_csv(root / "tables" / "accuracy.csv", index=False)


def page_of(results):
    return Page(report.write_report(results).read_text(encoding="utf-8"))


def test_the_papers_numbers_stand_above_our_own(results):
    _, head, *rows = page_of(results).rows["paper"]
    rows = {row[-5]: row[-4:] for row in rows}
    assert rows["Qwen2.5-1.5B-Instruct"] == ["6.0%", "10.2%", "34.9%", "45.0%"]
    ours = rows["this run (demo)"]
    assert ours[0] == "54.0% [53.0, 56.0], n=3,000, 3 seeds"
    assert ours[2] == "53.0% [52.0, 55.0], n=3,000, 3 seeds"
    assert ours[1].startswith("60.0% [") and ours[3].startswith("70.4% [")


def test_our_row_comes_last_where_two_tasks_share_a_model():
    view = report.paper_view(pd.DataFrame(accuracy_rows(100), columns=ACCURACY))
    both = pd.concat([view, view.assign(task="function_calling")])
    models = report.beside_the_paper(both, "demo").reset_index().groupby("task").model.last()
    assert set(models) == {"this run (demo)"} and len(models) == 2


def test_the_papers_unconfirmed_numbers_never_appear_and_recalled_ones_carry_a_dagger(results):
    paper = pd.read_csv(report.PAPER)
    rows = {row[-5]: row[-4:] for row in page_of(results).rows["paper"][2:]}
    hidden = paper[(paper.confidence == "C") & (paper.task == "countdown")]
    assert len(hidden) and "Qwen2.5-3B-Instruct" not in rows
    assert rows["Qwen2.5-7B-Instruct"] == ["31.7%", "", "41.6%", ""]
    recalled = paper[paper.confidence == "B"].iloc[0]
    assert report.paper_number(recalled) == f"{recalled.value:.1f}%†"


def test_a_run_on_few_problems_says_so_and_a_real_one_does_not(results):
    assert "A trial run" not in report.write_report(results).read_text()
    write_accuracy(results, problems=99)
    html = report.write_report(results).read_text()
    assert "A trial run, with n=99 test problems" in html and "not what R3 does" in html


def test_every_condition_is_listed_with_interval_n_and_seeds(results):
    head, _, *shown = page_of(results).rows["conditions"]
    assert head[-2:] == ["untrained", "trained (R3)"]
    first = ["54.0% [53.0, 56.0], n=3,000, 3 seeds", "53.0% [52.0, 55.0], n=3,000, 3 seeds"]
    assert shown[0] == ["countdown", "test", "first_try", *first]
    assert shown[1][0] == "reflect_retry" and shown[1][1].startswith("13.0%")


def test_comparisons_and_other_tables_are_shown_escaped(results):
    rows = page_of(results).rows
    assert rows["comparisons"][1] == [
        "Does training help?", "countdown", "r3/reflect_retry", "vanilla/reflect_retry",
        "+23.8 [+20.1, +27.0]", "930", "3", "0.00012", "0.0006",
    ]  # fmt: skip
    assert rows["comparisons"][2][0] == "Does <it> help?"
    assert ["<search>", "0.891"] in rows["tables"] and ["", ""] in rows["tables"]


def test_hostile_model_text_is_shown_as_it_is_and_adds_no_tag(results):
    page = page_of(results)
    assert page.tags.count("article") == 16 and page.texts.count("yes") == 8
    assert page.texts.count(HOSTILE) == 16 + 8
    assert page.tags.count("script") == 1 and "b" not in page.tags
    assert len(page.texts) == 8 * 2 + 8 * 4


def test_the_page_stands_alone(results):
    page = page_of(results)
    assert page.resources
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.resources)


def test_figures_come_in_the_notebooks_order_with_their_source(results):
    html = report.write_report(results).read_text(encoding="utf-8")
    captions = ["03_train_r3: reward", "05_failures: reward"]
    places = [html.index(f"<figcaption>{caption}") for caption in captions]
    assert places == sorted(places)


def test_every_link_of_the_contents_leads_somewhere(results):
    html = report.write_report(results).read_text(encoding="utf-8")
    links = re.findall(r'href="#([^"]+)"', html)
    assert len(links) == 7 and all(f'<section id="{name}">' in html for name in links)


def test_provenance_comes_from_the_manifest(results):
    rows = page_of(results).rows["provenance"][1:]
    assert rows[0] == ["03_train_r3", "512", "abc123", "True", "cpus 2", "torch 2.13.0"]
    assert len(rows) == 2


def test_episodes_are_a_few_of_each_cell_and_none_of_another_run(monkeypatch):
    monkeypatch.setattr(report, "PER_CELL", 10)
    accuracy = pd.DataFrame(accuracy_rows(50), columns=ACCURACY)
    left = episodes(50).assign(task="sums")
    shown = report.sample(pd.concat([left, episodes(50)]), accuracy)
    assert len(shown) == 40 and {row["task"] for row in shown} == {"countdown"}
    assert {row["verdict"] for row in shown} == {"ok", "missed_target"}


PARTS = ["tables/comparisons.csv", "manifest.json", "figures", "episodes"]


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_named_with_its_remedy(results, part):
    lost = results / part
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    with pytest.raises(R3Error, match=f"{part}.*r3 reproduce") as error:
        report.write_report(results)
    assert "\n" not in str(error.value)
    assert not (results / "report.html").exists()


def test_tables_of_other_episodes_than_are_there_are_no_report(results):
    episodes(5).to_parquet(results / "episodes" / "shard-0.parquet")
    with pytest.raises(Stale, match="shard-0.parquet has changed since notebook 03 drew .*--from 03"):
        report.write_report(results)


def test_a_table_that_was_cut_off_is_named(results):
    (results / "tables" / "styles.csv").write_text("style\n")
    with pytest.raises(Stale, match="styles.csv is not as notebook 03 wrote it: run .*--from 03"):
        report.write_report(results)


def test_a_damaged_manifest_is_named_with_its_remedy(results):
    (results / "manifest.json").write_text('{"artefacts": {"tables')
    with pytest.raises(R3Error, match="manifest.json is damaged: delete it and run again"):
        report.write_report(results)
