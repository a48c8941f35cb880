"""What the demo is made of: a shell that shows what is typed, nodes, the receiving server, checks and an orderly end."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

TOP = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


class Failed(Exception):
    """A step did not hold."""


def check(holds, text):
    """Says that something holds, or ends the demo."""
    if not holds:
        raise Failed(text)
    say(f"  ok: {text}")


def say(text=""):
    print(text, flush=True)


def wait_for(condition, text, seconds=30):
    """Polls until condition() gives something true, and gives that; Failed when the time is over."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise Failed(f"{text}: not within {seconds} s")
        time.sleep(0.05)


def alive(pid):
    """Whether a process runs; one that is dead and not yet waited for does not."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def end_process(pid, seconds, *signals):
    """Sends one signal after the other, each with some time to act, until the process is gone."""
    for sig in signals:
        try:
            os.kill(pid, sig)
        except ProcessLookupError:
            return
        end = time.monotonic() + seconds
        while alive(pid) and time.monotonic() < end:
            time.sleep(0.02)
        if not alive(pid):
            return


class Shell:
    """Types commands at a prompt: shows each one, then its real output."""

    def __init__(self, prompt, work, env=None):
        self.prompt = prompt
        self.env = {
            "PATH": os.path.join(TOP, "bin") + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "W": work,
            **(env or {}),
        }

    def run(self, command, status=0, seconds=60, quiet=False):
        """Runs a command; status is the exit code that it must have (None: any). Gives (exit code, output)."""
        if not quiet:
            say(f"{self.prompt} {command}")
        p = subprocess.Popen(["bash", "-c", command], cwd=TOP, env=self.env, stdin=subprocess.DEVNULL,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        late = threading.Timer(seconds, p.kill)
        late.start()
        lines = []
        for line in p.stdout:
            lines.append(line)
            if not quiet:
                say(line.rstrip("\n"))
        code = p.wait()
        hung = not late.is_alive()
        late.cancel()
        if hung:
            raise Failed(f"{self.prompt} {command}: not done within {seconds} s")
        if status is not None and code != status:
            if quiet:
                say("".join(lines))
            raise Failed(f"{self.prompt} {command}: exit code {code}, want {status}")
        return code, "".join(lines)

    def start(self, command, log):
        """Starts a command in the background, its output going to log. It does not get the terminal's Ctrl-C."""
        say(f"{self.prompt} {command} 2>>{log} &")
        with open(log, "ab") as f:
            p = subprocess.Popen(["bash", "-c", f"exec {command}"], cwd=TOP, env=self.env, stdin=subprocess.DEVNULL, stdout=f, stderr=f,
                                 start_new_session=True)
        say(f"[1] {p.pid}")
        return p


class Node:
    """One node of the cluster: 127.0.0.1N."""

    SMTP, WEB, TUNNEL = 2525, 8025, 7025

    def __init__(self, number, work):
        self.name = f"mx{number}"
        self.ip = f"127.0.0.1{number}"
        self.dir = os.path.join(work, self.name)
        self.config = os.path.join(self.dir, "node.toml")
        self.log = os.path.join(self.dir, "log")
        self.state = os.path.join(self.dir, "state")
        self.run_dir = os.path.join(self.dir, "run")
        self.process = None
        os.mkdir(self.dir)
        os.chmod(self.dir, 0o755)
        self.shell = Shell(f"{self.name}#", work, {"MAILPROXY_CONFIG": self.config})

    def run(self, command, **options):
        return self.shell.run(command, **options)

    def serve(self):
        self.process = self.shell.start("mailproxy serve", self.log)

    def greeting(self):
        """The code of SMTP's greeting, or None; a daemon that has ended is a failure."""
        if self.process.poll() is not None:
            raise Failed(f"{self.name}: mailproxy serve ended with exit code {self.process.returncode}")
        try:
            with socket.create_connection((self.ip, self.SMTP), 1) as s:
                return s.recv(3)
        except OSError:
            return None

    def takes_mail(self):
        return self.greeting() == b"220"

    def healthy(self):
        """Whether every check of /health is fine, that of the database too, which does not turn it to 503."""
        code, text = self.run(f"curl -sS -m 2 http://{self.ip}:{self.WEB}/health", status=None, quiet=True)
        try:
            return code == 0 and all(c["ok"] for c in json.loads(text)["checks"])
        except ValueError:
            return False

    def queued(self):
        """The queue's items, as `mailproxy queue list --json` gives them."""
        return json.loads(self.run("mailproxy queue list --json", quiet=True)[1])["items"]

    def postmaster(self):
        """The pid of this node's PostgreSQL, or None."""
        data = os.path.join(self.state, "pg")
        try:
            with open(os.path.join(data, "postmaster.pid")) as f:
                pid = int(f.readline())
            if os.path.realpath(f"/proc/{pid}/cwd") == os.path.realpath(data) and alive(pid):
                return pid
        except (OSError, ValueError):
            pass
        return None

    def kill(self):
        """kill -9 for the daemon."""
        self.run(f"kill -9 {self.process.pid}")
        self.process.wait()

    def events(self, name):
        """The log's events of one name."""
        found = []
        with open(self.log, errors="replace") as f:
            for line in f:
                try:
                    event = json.loads(line)
                except ValueError:
                    continue
                if name in (event.get("message"), event.get("event")):
                    found.append(event)
        return found

    def stop(self):
        if self.process is not None and self.process.poll() is None:
            end_process(self.process.pid, 15, signal.SIGTERM, signal.SIGKILL)
            self.process.wait()
        pid = self.postmaster()
        if pid is not None:  # the daemon could not stop it: fast, then immediate shutdown, then by force
            end_process(pid, 5, signal.SIGINT, signal.SIGQUIT, signal.SIGKILL)


class Receiver:
    """The receiving SMTP server, and what has arrived there."""

    def __init__(self, work, port):
        self.address = f"127.0.0.1:{port}"
        self.port = port
        self.directory = os.path.join(work, "received")
        self.log = os.path.join(work, "receiver.log")
        self.process = None
        self.shell = Shell("receiver#", work)
        os.mkdir(self.directory)

    def start(self, options=""):
        self.process = self.shell.start(f"scripts/demo.d/receiver.py {self.address} {self.directory}{options}", self.log)
        wait_for(self.listens, "the receiving server listens")

    def listens(self):
        if self.process.poll() is not None:
            raise Failed("the receiving server ended")
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1) as s:
                return s.recv(4).startswith(b"220")
        except OSError:
            return False

    def stop(self, shown=False):
        if self.process is None or self.process.poll() is not None:
            return
        if shown:
            self.shell.run(f"kill {self.process.pid}")
        end_process(self.process.pid, 5, signal.SIGTERM, signal.SIGKILL)
        self.process.wait()

    def arrived(self):
        """One entry a message, in the order of arrival; see receiver.py."""
        try:
            with open(os.path.join(self.directory, "index.jsonl")) as f:
                return [json.loads(line) for line in f if line.endswith("\n")]
        except FileNotFoundError:
            return []

    def content(self, entry):
        with open(os.path.join(self.directory, entry["file"]), "rb") as f:
            return f.read()


class Watch(threading.Thread):
    """Asks a node by SMTP, every 2 ms, whether it takes mail for an address, and notes when it first did."""

    def __init__(self, node, address):
        super().__init__(daemon=True)
        self.node = node
        self.address = address
        self.refused = threading.Event()
        self.accepted_at = None
        self.over = False
        self.start()

    def run(self):
        while not self.over and self.accepted_at is None:
            try:
                self.session()
            except OSError:
                time.sleep(0.01)

    def session(self):
        with socket.create_connection((self.node.ip, Node.SMTP), 2) as s:
            s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.lines = s.makefile("rb")
            self.reply()
            self.ask(s, "EHLO watch.test")
            for _ in range(10):  # a session that is refused too often is ended
                self.ask(s, "MAIL FROM:<watch@client.test>")
                code = self.ask(s, f"RCPT TO:<{self.address}>")
                if code.startswith("2"):
                    self.accepted_at = time.time()
                    break
                self.refused.set()
                self.ask(s, "RSET")
                time.sleep(0.002)
                if self.over:
                    break
            self.ask(s, "QUIT")

    def ask(self, s, line):
        s.sendall(line.encode() + b"\r\n")
        return self.reply()

    def reply(self):
        while True:
            line = self.lines.readline()
            if not line:
                raise OSError("connection closed")
            if line[3:4] != b"-":
                return line.decode(errors="replace")


def new_work_dir():
    """A short path: socket paths below it must fit into 107 octets."""
    work = tempfile.mkdtemp(prefix="mpdemo.", dir="/tmp")
    os.chmod(work, 0o755)  # the daemons become nobody
    return work


def show_logs(work):
    """The last lines of every log, for one who must find out what went wrong."""
    for directory, _, files in sorted(os.walk(work)):
        for name in files:
            path = os.path.join(directory, name)
            if name != "log" and not name.endswith(".log"):
                continue
            with open(path, errors="replace") as f:
                tail = f.readlines()[-25:]
            print(f"--- the end of {path}", file=sys.stderr)
            print("".join(line[:600].rstrip("\n") + "\n" for line in tail), file=sys.stderr)


def remove(work):
    shutil.rmtree(work, ignore_errors=True)
