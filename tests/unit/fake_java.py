"""A Java runtime that plays TorchServe's frontend: the real launcher starts it, and no test waits for a real one."""

from __future__ import annotations

import sys
from pathlib import Path

# What it does is said by FAKE_JAVA; it writes its process ids into FAKE_JAVA_PIDS, and what it was given into
# FAKE_JAVA_SEEN.
SCRIPT = """\
import http.server, json, os, signal, subprocess, sys, threading, time

if "-version" in sys.argv:
    print('openjdk version "21.0.1" 2023-10-17', file=sys.stderr)
    sys.exit()
mode = os.environ.get("FAKE_JAVA", "ready")
with open(sys.argv[sys.argv.index("-f") + 1]) as file:
    config = dict(line.strip().split("=", 1) for line in file)
with open(os.environ["FAKE_JAVA_SEEN"], "w") as file:
    json.dump({"arguments": sys.argv[1:], "config": config, "environment": dict(os.environ)}, file)

def note(pid):
    with open(os.environ["FAKE_JAVA_PIDS"], "a") as file:
        print(pid, file=file)

note(os.getpid())
if mode == "dies":
    print("Could not reserve enough space for object heap")
    sys.exit(1)
if mode == "refuses":
    print("WARN MODEL_LOG digits is not served: golden sample 2 differs", flush=True)
if mode == "cannot bind":
    print("Address already in use", flush=True)
if mode in ("stubborn", "leaves a worker"):
    ignore = "signal.signal(signal.SIGTERM, signal.SIG_IGN); " if mode == "stubborn" else ""
    worker = "import signal, time; " + ignore + "print('worker', flush=True); time.sleep(600)"
    note(subprocess.Popen([sys.executable, "-c", worker]).pid)
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if mode in ("refuses", "silent", "cannot bind"):
    time.sleep(600)

future = "2999-01-01T00:00:00.123456789Z"
keys = {kind: {"key": kind + "-token", "expiration time": future} for kind in ("management", "inference")}
text = json.dumps({**keys, "API": {"key": "api-token"}})
os.umask(0o077)
with open("key_file.json", "w") as file:  # in two halves, as TorchServe does in smaller ones
    for half in (text[:40], text[40:]):
        file.write(half)
        file.flush()
        time.sleep({"writes slowly": 0.6, "never writes on": 600}.get(mode, 0))

workers, asked = ["READY"], []

class Management(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        asked.append(self.path)
        status = 200 if self.headers["Authorization"] == "Bearer management-token" else 400
        shown = ["UNLOADING" if mode == "never ready" else state for state in workers]
        self.answer(status, json.dumps([{"workers": [{"status": state} for state in shown]}]))
        workers[:] = ["READY"] * len(workers)

    def do_PUT(self):
        if mode == "refuses to scale":
            self.answer(403, "no memory for so many")
            return
        wanted = int(self.path.split("max_worker=")[1])
        self.answer(202, "{}")
        # The new workers appear a little later, and load for a while.
        threading.Timer(0.3, lambda: workers.extend(["LOADING"] * (wanted - len(workers)))).start()

    def answer(self, status, text):
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments):
        pass

if mode == "ends when ready":
    threading.Timer(1, lambda: os._exit(3)).start()
print("serving", flush=True)
address, port = config["management_address"].removeprefix("http://").split(":")
http.server.ThreadingHTTPServer((address, int(port)), Management).serve_forever()
"""


def make_java(home: Path) -> Path:
    """Put the runtime into a folder that can be JAVA_HOME."""
    java = home / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.write_text(f"#!{sys.executable} -S\n{SCRIPT}", encoding="utf-8")
    java.chmod(0o755)
    return home
