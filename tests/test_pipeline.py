"""The pipeline over tiny notebooks: order, parameters, the kernel, what a failure leaves, and the report."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from r3lib import cli, doctor, files, pipeline, provenance
from r3lib.errors import R3Error
from r3lib.files import claimed

DECLARED = 'profile = "nano"\ntask = "all"\noverrides = "{}"\nresults = "results"'
LOG = 'open("log.txt", "a").write(__NAME__ + "\\n")'


def write(folder, name, *cells, parameters=DECLARED):
    """A notebook: title, parameters cell, a line in log.txt, then `cells`."""
    folder.mkdir(exist_ok=True)
    tagged = new_code_cell(parameters, metadata={"tags": ["parameters"]})
    codes = [LOG.replace("__NAME__", repr(name)), *(textwrap.dedent(c) for c in cells)]
    notebook = new_notebook(cells=[new_markdown_cell(f"# {name}"), tagged, *map(new_code_cell, codes)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / f"{name}.ipynb")


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder with an empty notebooks folder, the tables of a report, and a writer that lists what it was given."""
    monkeypatch.setattr(pipeline, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.chdir(tmp_path)
    (tables := tmp_path / "results" / "smoke" / "tables").mkdir(parents=True)
    (tables / "comparisons.csv").touch()

    def write_report(results):
        (results / "report.html").write_text("report")
        return results / "report.html"

    monkeypatch.setitem(sys.modules, "r3lib.report", types.SimpleNamespace(write_report=write_report))
    monkeypatch.setattr(pipeline, "check_run", lambda run: None)
    monkeypatch.delenv("R3_FRESH", raising=False)
    return tmp_path


def ran(checkout):
    log = checkout / "log.txt"
    return [line[:2] for line in log.read_text().split()] if log.exists() else []


def test_notebooks_run_in_order_with_their_parameters_and_the_report_comes_last(checkout):
    dump = """
        import json, os, sys
        seen = dict(profile=profile, task=task, overrides=json.loads(overrides), results=results, cwd=os.getcwd())
        seen |= dict(python=sys.executable, env={k: os.environ.get(k) for k in ("HF_HUB_OFFLINE", "PYTHONHASHSEED",
                     "TOKENIZERS_PARALLELISM", "LD_PRELOAD", "MPLBACKEND")})
        open("seen.json", "w").write(json.dumps(seen))
    """
    write(checkout / "notebooks", "01_second", dump)
    write(checkout / "notebooks", "00_first", 'print("hello")')
    said = []
    report = pipeline.reproduce("smoke", "countdown", overrides={"seeds": "2"}, log=said.append)
    assert report == checkout / "results" / "smoke" / "report.html" and report.read_text() == "report"
    assert ran(checkout) == ["00", "01"]
    seen = json.loads((checkout / "seen.json").read_text())
    assert (seen["profile"], seen["task"], seen["results"]) == ("smoke", "countdown", "results")
    assert seen["overrides"] == {"seeds": "2"} and Path(seen["cwd"]) == Path.cwd()
    assert seen["python"] == sys.executable
    assert seen["env"]["HF_HUB_OFFLINE"] == "1" and seen["env"]["PYTHONHASHSEED"] == "0"
    assert provenance.TCMALLOC in (seen["env"]["LD_PRELOAD"] or "")
    assert said[0].startswith("time: about 90 seconds")
    assert said[1:3] == ["00_first (1 of 2)", "01_second (2 of 2)"]
    assert said[-1].startswith(f"report: {report}")
    copy = nbformat.read(report.parent / "executed" / "00_first.ipynb", 4)
    assert copy.cells[-1].outputs[0].text == "hello\n"
    page = (report.parent / "notebooks" / "00_first.md").read_text()
    assert "# 00_first" in page and "hello" in page and "profile =" not in page


def test_before_the_evaluation_has_run_there_is_no_report_and_no_error(checkout):
    (checkout / "results" / "smoke" / "tables" / "comparisons.csv").unlink()
    write(checkout / "notebooks", "00_first")
    said = []
    assert pipeline.reproduce("smoke", only="00", log=said.append) == checkout / "results" / "smoke"
    assert "no report yet, notebook 04 writes its tables" in said[-1]


def test_what_is_cached_and_why_anything_runs_is_said(checkout):
    write(checkout / "notebooks", "00_first", 'print("cached  a.parquet\\nrunning b: not there yet\\nsome chatter")')
    said = []
    pipeline.reproduce("smoke", log=said.append)
    assert said[0].startswith("time: about 90 seconds on two cores")
    assert said[2:4] == ["  cached  a.parquet", "  running b: not there yet"]
    assert not any("chatter" in line for line in said)


def test_failing_cell_is_one_line_and_its_copy_is_kept(checkout):
    write(checkout / "notebooks", "00_fine")
    write(checkout / "notebooks", "01_fails", "x = 1", "# the sum\nx / 0")
    write(checkout / "notebooks", "02_never")
    with pytest.raises(R3Error) as error:
        pipeline.reproduce("smoke", log=lambda line: None)
    message = str(error.value)
    assert message.startswith("01_fails.ipynb, cell 5 (`# the sum`): ZeroDivisionError: division by zero")
    copy = checkout / "results" / "smoke" / "executed" / "01_fails.ipynb"
    assert "\n" not in message and str(copy) in message and "ZeroDivisionError" in copy.read_text()
    assert ran(checkout) == ["00", "01"] and not (checkout / "results" / "smoke" / "report.html").exists()


def test_after_a_failure_from_goes_on_where_it_stopped(checkout):
    write(checkout / "notebooks", "00_fine")
    write(checkout / "notebooks", "01_fails", "assert open('mended')")
    write(checkout / "notebooks", "02_last")
    with pytest.raises(R3Error, match="01_fails.ipynb, cell 4 .*FileNotFoundError"):
        pipeline.reproduce("smoke", log=lambda line: None)
    (checkout / "mended").touch()
    (checkout / "log.txt").unlink()
    pipeline.reproduce("smoke", start="1", log=lambda line: None)
    assert ran(checkout) == ["01", "02"]


def test_choice_of_notebooks(checkout):
    for name in ("00_a", "02_c", "03_d", "06_own_task"):
        write(checkout / "notebooks", name)

    def chosen(start=None, only=None):
        return [path.name[:2] for path in pipeline.choose(start, only)]

    assert chosen() == ["00", "02", "03"] and chosen(start="02") == ["02", "03"] and chosen(only="2") == ["02"]
    assert chosen(only="06") == ["06"]  # a task of one's own is no part of the study
    with pytest.raises(R3Error, match="no notebook '01': known: 00, 02, 03, 06"):
        chosen(start="01")
    with pytest.raises(R3Error, match="--from 02 and --only 03: give one of them"):
        chosen("02", "03")


def test_no_notebooks_is_one_line(checkout):
    with pytest.raises(R3Error, match="no notebooks in .*source checkout"):
        pipeline.reproduce("smoke")


def test_parameters_that_a_notebook_does_not_know_stop_everything_before_it_starts(checkout):
    write(checkout / "notebooks", "00_fine")
    write(checkout / "notebooks", "01_odd", parameters=DECLARED.replace("task", "tasks"))
    with pytest.raises(R3Error, match="01_odd.ipynb: .*does not declare task"):
        pipeline.reproduce("smoke")
    assert ran(checkout) == []


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"profile": "smok"}, "unknown profile 'smok': did you mean 'smoke'"),
        ({"task": "countdwn"}, "unknown task 'countdwn': did you mean 'countdown'"),
        ({"overrides": {"num_generations": "1"}}, "num_generations=1 is out of range"),
        ({"overrides": {"failures_per_step": "3"}}, "= 12 rows do not divide into learning batches of 32"),
        ({"overrides": {"model": "/no/such/folder"}}, "model '/no/such/folder' has no config.json"),
        ({"overrides": {"task_options": {"countdown": {"larges": 9}}}}, "did you mean 'largest'"),
        ({"overrides": {"test_problems": "9999"}, "task": "countdown"}, "countdown test .*holds only about"),
    ],
)
def test_bad_arguments_stop_everything_before_it_starts(checkout, arguments, words, monkeypatch):
    monkeypatch.setattr(pipeline, "check_run", doctor.check_run)
    write(checkout / "notebooks", "00_fine")
    with pytest.raises(R3Error, match=words):
        pipeline.reproduce(**{"profile": "smoke", **arguments})
    assert ran(checkout) == []


def test_a_folder_that_cannot_be_written_is_one_line_and_exit_2(checkout, capsys):
    write(checkout / "notebooks", "00_fine")
    folder = checkout / "results" / "smoke"
    (folder / files.LOCK).mkdir()
    assert cli.main(["reproduce", "--profile", "smoke", "--results", str(folder.parent)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"r3: error: cannot write {folder} (Is a directory): ") and error.count("\n") == 1
    assert ran(checkout) == []


def test_a_second_run_in_a_folder_is_one_line_and_leaves_the_first_alone(checkout, capsys):
    write(checkout / "notebooks", "00_fine")
    folder = checkout / "results" / "smoke"
    with claimed(folder):
        assert cli.main(["reproduce", "--profile", "smoke", "--results", str(folder.parent)]) == 2
    error = capsys.readouterr().err
    assert f"process {os.getpid()} is running in {folder}: " in error and "--set name=" in error
    assert error.count("\n") == 1 and ran(checkout) == []
    pipeline.reproduce("smoke", results=folder.parent, log=lambda line: None)
    assert ran(checkout) == ["00"]


def test_one_fresh_run_has_one_id_in_all_its_notebooks(checkout):
    cell = 'import os; open("fresh.txt", "a").write(os.environ.get("R3_FRESH", "") + "|")'
    for name in ("00_a", "01_b"):
        write(checkout / "notebooks", name, cell)
    for fresh in (True, False, True):
        pipeline.reproduce("smoke", fresh=fresh, log=lambda line: None)
    first, second, none, last, third, fourth = (checkout / "fresh.txt").read_text()[:-1].split("|")
    assert first == second and third == fourth and first != third and first and none == last == ""


def test_hub_stays_open_for_hub_models_and_hub_problems(checkout, monkeypatch):
    monkeypatch.setattr(pipeline, "reaches_hub", lambda: True)

    def env(**overrides):
        return pipeline.kernel_of(pipeline.load_profile("smoke", **overrides), False).kernel_spec.env

    assert env()["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in env(model="some/model")
    assert "HF_HUB_OFFLINE" not in env(task_options={"countdown": {"source": "hub"}})
    monkeypatch.setattr(pipeline, "reaches_hub", lambda: False)
    assert env(model="some/model")["HF_HUB_OFFLINE"] == "1"  # what is cached is taken without retries


def test_verbose_shows_what_the_kernel_prints(checkout, capsys):
    write(checkout / "notebooks", "00_talks", 'print("from the kernel")')
    pipeline.reproduce("smoke", log=lambda line: None, verbose=True)
    assert "from the kernel\n" in capsys.readouterr().out


def test_kernel_that_dies_is_one_line(checkout):
    write(checkout / "notebooks", "00_dies", "import os\nos._exit(9)")
    with pytest.raises(R3Error, match="00_dies.ipynb: the kernel died"):
        pipeline.reproduce("smoke", log=lambda line: None)


def test_interrupt_ends_the_kernel_and_keeps_the_copy(checkout):
    cell = 'import os, time\nopen("pid", "w").write(str(os.getpid()))\ntime.sleep(60)'
    write(checkout / "notebooks", "00_long", cell)
    code = f"""
import signal, sys
from pathlib import Path
from r3lib import cli, pipeline
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell in the background ignores
pipeline.NOTEBOOKS = Path({str(checkout / "notebooks")!r})
sys.exit(cli.main(["reproduce", "--profile", "smoke", "--results", {str(checkout / "results")!r}]))
"""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    run = subprocess.Popen([sys.executable, "-c", code], cwd=checkout, env=env, stderr=subprocess.PIPE, text=True)
    wait(lambda: (checkout / "pid").exists() and (checkout / "pid").read_text())
    kernel = int((checkout / "pid").read_text())
    run.send_signal(signal.SIGINT)
    _, stderr = run.communicate(timeout=90)
    assert run.returncode == 130 and stderr.strip().splitlines()[-1].startswith("r3: interrupted")
    assert (checkout / "results" / "smoke" / "executed" / "00_long.ipynb").exists()
    wait(lambda: not alive(kernel))


def wait(condition, seconds=90):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.1)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1][:3]
