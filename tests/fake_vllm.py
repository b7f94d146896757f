"""Imitates the calls of a vLLM server that we use; in a test's process, or as the command that `Server` starts."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from threading import Lock, Thread

EOS = 7  # the model's own end token, which stops a sample unless the request says ignore_eos
LONGEST = 100


def sample(prompt, seed, model, most, stops, ignore_eos=True):
    """(ids, log-probs) that the fake model `model` samples: they end with a stop token or at `most` tokens."""
    random, ids = Random(f"{prompt}/{seed}/{model}"), []
    while len(ids) < most and not (ids and ids[-1] in stops):
        ids.append(random.choice([*range(10, 20), EOS, *stops]))
        if ids[-1] == EOS and not ignore_eos:
            break
    return ids, [-random.random() for _ in ids]


class FakeServer(ThreadingHTTPServer):
    """Listens on `port` from birth; `faults` are dealt to the next completion requests, one each."""

    daemon_threads, request_queue_size = True, 128

    def __init__(self, port=0, faults=(), delay=0.0):
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.faults, self.delay, self.adapters = list(faults), delay, {}
        self.asked, self.answered, self.busy, self.busiest, self.lock = [], [], 0, 0, Lock()
        Thread(target=self.serve_forever, args=[0.02], daemon=True).start()

    def handle_error(self, request, client_address):
        """Nothing: clients that hang up are part of the tests."""

    def close(self):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        """Nothing."""

    def do_GET(self):
        base = {"id": "base", "parent": None, "max_model_len": LONGEST}
        models = [base, *({"id": name, "parent": "base"} for name in self.server.adapters)]
        known = {"/health": (200, None), "/v1/models": (200, {"data": models})}
        self.reply(*known.get(self.path, (404, {"error": {"message": "Not Found"}})))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body))
        getattr(self, self.path.rsplit("/", 1)[1])(body)

    def load_lora_adapter(self, body):
        name, path = body["lora_name"], body["lora_path"]
        if name in self.server.adapters:
            return self.refuse(400, f"The lora adapter '{name}' has already been loaded.")
        if not Path(path, "adapter_config.json").exists():
            return self.refuse(404, f"No adapter found for {path}")
        self.server.adapters[name] = path
        self.reply(200, None)

    def completions(self, body):
        server = self.server
        with server.lock:
            server.busy, fault = server.busy + 1, server.faults.pop(0) if server.faults else None
            server.busiest = max(server.busy, server.busiest)
        time.sleep(server.delay)
        with server.lock:
            server.busy -= 1  # before the answer, after which the next request may come
        self.complete(body, fault)

    def complete(self, body, fault):
        server = self.server
        if fault == "hang":
            time.sleep(1.5)
        if fault in (400, 500):
            return self.refuse(fault, "told to fail\non two lines")
        if body["model"] != "base" and body["model"] not in server.adapters:
            return self.refuse(404, f"The model `{body['model']}` does not exist.")
        if body["temperature"] == 0 and body["n"] > 1:
            return self.refuse(400, "n must be 1 when using greedy sampling")
        choices = [self.choice(body, k) for k in range(body["n"])]
        if fault == "abort":
            choices[-1] |= {"finish_reason": "abort", "token_ids": choices[-1]["token_ids"][:1]}
        if fault is None:
            server.answered.append(body["prompt"])
        self.reply(200, {"choices": choices[::-1]}, cut=fault == "drop")

    def choice(self, body, k):
        seed = body["seed"] + k if body["temperature"] else 0
        model = self.server.adapters.get(body["model"], "base")
        ids, logprobs = sample(
            body["prompt"], seed, model, body["max_tokens"], body["stop_token_ids"], body["ignore_eos"]
        )
        reason = "stop" if ids[-1] in [EOS, *body["stop_token_ids"]] and len(ids) < body["max_tokens"] else "length"
        return {"index": k, "token_ids": ids, "logprobs": {"token_logprobs": logprobs}, "finish_reason": reason}

    def refuse(self, status, message):
        self.reply(status, {"error": {"message": message, "code": status}})

    def reply(self, status, data, cut=False):
        text = json.dumps(data).encode() if data is not None else b"Success"
        self.send_response(status)
        self.send_header("Content-Type", "application/json" if data is not None else "text/plain")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text[: len(text) // 2] if cut else text)


def main():
    """`fake_vllm.py -m vllm... --port N`: our own options come from `Server(options=...)`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("--pids", type=Path, help="file that gets our pid and that of a child, a line a start")
    parser.add_argument("--broken", action="store_true", help="end at once, as a server that cannot load its model")
    parser.add_argument("--silent", action="store_true", help="never answer")
    parser.add_argument("--stubborn", action="store_true", help="ignore SIGTERM")
    options, _ = parser.parse_known_args()
    if options.broken:
        sys.exit("ValueError: the model has no weights\nEngine core initialization failed")
    if options.stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if options.pids:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        with options.pids.open("a") as file:
            print(os.getpid(), child.pid, file=file)
    print("arguments", *sys.argv[1:], flush=True)
    print("runtime updating", os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING"), flush=True)
    print("multiprocessing", os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING"), flush=True)
    if not options.silent:
        FakeServer(options.port)
    time.sleep(60)


if __name__ == "__main__":
    main()
