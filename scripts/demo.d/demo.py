#!/usr/bin/python3
"""A cluster of three nodes passes real mail: six steps, each shown as it is typed and checked. See `make demo`.

With a terminal it stays up in the end until Ctrl-C; without one it tears all down and exits 0. A step that does not hold ends it with
exit code 1, the logs shown, everything torn down. MAILPROXY_DEMO_KEEP=1 keeps the directory.
"""

import glob
import hashlib
import os
import random
import signal
import sys
import time

import shell
from shell import Failed, Node, Receiver, Shell, Watch, check, say, wait_for

RECEIVER_PORT = 2526
EACH = 40  # messages queued at each node in step 5
DELAY = 0.02  # seconds that the receiver then needs for each


class Demo:
    def __init__(self, work):
        self.work = work
        self.began = time.monotonic()
        self.here = Shell("$", work)
        self.receiver = Receiver(work, RECEIVER_PORT)
        self.nodes = []
        self.title = "start"
        self.accepted = set()  # the forward-path of every message that was answered with 250; each has its own

    def step(self, number, title):
        self.title = f"step {number}: {title}"
        say(f"\n=== {self.title}  [{time.monotonic() - self.began:.1f} s]\n")

    def run(self):
        self.come_up()
        self.make_cluster()
        self.add_domain()
        self.pass_mail()
        self.queue_and_kill()
        self.lose_master()
        self.nothing_lost()
        say(f"\n=== all six steps hold; {time.monotonic() - self.began:.1f} s\n")

    def nothing_lost(self):
        """What was accepted with 250 in all steps is what has arrived, but for the duplicates of step 5."""
        arrived = self.receiver.arrived()
        addresses = {to for e in arrived for to in e["to"]}
        check(addresses == self.accepted, f"{len(self.accepted)} messages were answered with 250 and have arrived, {len(arrived) - len(addresses)} of them twice")

    # Step 1

    def come_up(self):
        self.step(1, "three nodes, each with its own node file, PostgreSQL, spool and tunnel port")
        say(f"A prompt like mx1# is a shell with MAILPROXY_CONFIG={self.work}/mx1/node.toml; W={self.work}\n")
        self.nodes = [Node(n, self.work) for n in (1, 2, 3)]
        self.mx1, self.mx2, self.mx3 = self.nodes
        for node in self.nodes:
            node.run(f"mailproxy init --name {node.name}.demo.test --address {node.ip} --user nobody"
                     f" --state-dir {node.state} --run-dir {node.run_dir}"
                     f" --smtp-listen {node.ip}:{Node.SMTP} --web-listen {node.ip}:{Node.WEB} --tunnel-listen {node.ip}:{Node.TUNNEL}")
        started = time.monotonic()
        for node in self.nodes:
            node.serve()
        for node in self.nodes:
            wait_for(node.greeting, f"{node.name} answers on port {Node.SMTP}")  # 421 until it has a configuration
        say(f"  all three answer after {time.monotonic() - started:.2f} s")
        for node in self.nodes:
            wait_for(node.healthy, f"{node.name} is healthy, its PostgreSQL initialised")
            wait_for(node.takes_mail, f"{node.name} takes mail")
        check(True, f"three daemons healthy, PostgreSQL initialised and migrated, after {time.monotonic() - started:.1f} s")
        self.mx1.run(f"curl -sS http://{self.mx1.ip}:{Node.WEB}/health")
        say()

    # Step 2

    def make_cluster(self):
        self.step(2, "pmgcm create, join-cmd, join")
        self.mx1.run("pmgcm create")
        for node in (self.mx2, self.mx3):
            _, text = self.mx1.run("pmgcm join-cmd")
            lines = [line.strip() for line in text.splitlines() if line.strip().startswith("pmgcm join ")]
            if len(lines) != 1:
                raise Failed("join-cmd prints one line to paste")
            started = time.monotonic()
            _, text = node.run(lines[0])
            check("joined" in text, f"{node.name} joined, {time.monotonic() - started:.1f} s")
        self.all_in_sync(self.mx1)

    def all_in_sync(self, node, seconds=30):
        """Waits until `pmgcm status` exits 0 at node, then shows it."""
        wait_for(lambda: node.run("pmgcm status", status=None, quiet=True)[0] == 0, f"pmgcm status at {node.name}: all in sync", seconds)
        _, text = node.run("pmgcm status")
        rows = [line for line in text.splitlines() if "127.0.0.1" in line and "ERROR" not in line]
        check(len(rows) == 3, "pmgcm status shows all three in sync, exit code 0")
        return text

    # Step 3

    def add_domain(self):
        self.step(3, "a receiving server, a domain added on the master")
        self.receiver.start()
        self.domain_reaches("example.test", self.mx1, [self.mx2, self.mx3])
        self.mx2.run("mailproxy domain list")

    def domain_reaches(self, domain, master, slaves):
        """Adds a domain on the master and measures, by SMTP, when each slave takes mail for it."""
        watches = [Watch(node, f"watch@{domain}") for node in slaves]
        try:
            for w in watches:
                wait_for(w.refused.is_set, f"{w.node.name} refuses mail for {domain} before it is added")
            entered = time.time()
            master.run(f"mailproxy domain add {domain} --to {self.receiver.address}")
            done = time.time()
            for w in watches:
                wait_for(lambda w=w: w.accepted_at, f"{w.node.name} takes mail for {domain}", 10)
        finally:
            for w in watches:
                w.over = True
        say(f"  the command took {(done - entered) * 1000:.0f} ms")
        for w in watches:
            after = (w.accepted_at - done) * 1000
            when = f"{after:.0f} ms after it ended" if after >= 0 else f"{-after:.0f} ms before it ended"
            check(True, f"{w.node.name} takes mail for {domain} {(w.accepted_at - entered) * 1000:.0f} ms after the command was entered, {when}")

    # Step 4

    def pass_mail(self):
        self.step(4, "real messages through all three nodes, byte for byte")
        mx = self.mx1
        self.here.run(f"swaks --server {mx.ip}:{Node.SMTP} --helo client.test --from anna@client.test --to bert@example.test"
                      " --header 'Subject: hello' --body 'one message, shown in full'")
        self.here.run(f"swaks --server {mx.ip}:{Node.SMTP} --helo client.test --from anna@client.test --to unknown@example.test"
                      " --quit-after RCPT | grep -A1 'RCPT TO'")
        self.accepted.add("bert@example.test")
        check(len(self.receiver.arrived()) == 1, "what the client was told had arrived is there; an unknown address was refused at once")
        self.write_big(os.path.join(self.work, "5mb.eml"))
        files = sorted(glob.glob(os.path.join(shell.TOP, "test/messages/*.eml"))) + [os.path.join(self.work, "5mb.eml")]
        started = time.monotonic()
        self.here.run("for f in test/messages/*.eml $W/5mb.eml; do for n in 1 2 3; do\n"
                      f"    curl -sS --url smtp://127.0.0.1$n:{Node.SMTP}/client.test --mail-from anna@client.test"
                      " --mail-rcpt $(basename $f .eml).mx$n@example.test --upload-file $f || exit 1\n"
                      "  done; done")
        took = time.monotonic() - started
        self.same_bytes(files)
        say(f"  {3 * len(files)} messages in {took:.1f} s, a connection and a client process for each")

    def write_big(self, path):
        """A message of 5 MB: an attachment, as a mail program would send it."""
        rnd = random.Random(5)
        line = "".join(rnd.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/", k=76 * 64))
        with open(path, "w", newline="\r\n") as f:
            f.write("From: anna@client.test\nTo: bert@example.test\nSubject: 5 MB\nMIME-Version: 1.0\n"
                    "Content-Type: application/octet-stream\nContent-Transfer-Encoding: base64\n\n")
            while f.tell() < 5 << 20:
                start = rnd.randrange(64) * 76
                f.write(line[start:start + 76] + "\n")

    def same_bytes(self, files):
        """Each file arrived once from each node, and is the same once the first Received field is taken off."""
        by_address = {}
        for entry in self.receiver.arrived():
            for to in entry["to"]:
                by_address.setdefault(to, []).append(entry)
        say(f"  {'message':20} {'octets':>8}  SHA-256 as sent   arrived through mx1, mx2, mx3")
        for path in files:
            name = os.path.basename(path).removesuffix(".eml")
            with open(path, "rb") as f:
                sent = f.read()
            digest = hashlib.sha256(sent).hexdigest()
            marks = []
            for node in self.nodes:
                entries = by_address.get(f"{name}.{node.name}@example.test", [])
                if len(entries) != 1:
                    raise Failed(f"{name} through {node.name} arrived {len(entries)} times")
                field, rest = split_received(self.receiver.content(entries[0]))
                if hashlib.sha256(rest).hexdigest() != digest:
                    raise Failed(f"{name} through {node.name} arrived changed: {self.receiver.directory}/{entries[0]['file']}")
                if f"{node.name}.demo.test".encode() not in field:
                    raise Failed(f"{name} through {node.name}: its Received field does not name the node: {field!r}")
                self.accepted.add(f"{name}.{node.name}@example.test")
                marks.append("same")
            say(f"  {name:20} {len(sent):8}  {digest[:16]}  {', '.join(marks)}")
        check(True, f"{len(files)} messages, each through three nodes, arrived once and byte for byte")

    # Step 5

    def queue_and_kill(self):
        self.step(5, "the receiving server is away; a node is killed while the queue drains")
        self.receiver.stop(shown=True)
        wanted = self.fill_queues()
        self.accepted |= wanted
        before = len(self.receiver.arrived())
        self.receiver.start(f" --delay {DELAY}")
        for node in self.nodes:
            node.run("mailproxy queue flush")
        victim = self.mx2

        def of_victim():
            return {to for e in self.receiver.arrived()[before:] for to in e["to"] if f".{victim.name}@" in to}

        wait_for(lambda: len(of_victim()) >= 5, f"{victim.name} drains its queue")
        victim.kill()
        open_then = EACH - len(of_victim())
        check(0 < open_then < EACH, f"{victim.name} killed while it drained: {open_then} of its {EACH} messages had not arrived")
        victim.serve()
        wait_for(victim.takes_mail, f"{victim.name} is back")
        victim.run("mailproxy queue flush")

        def missing():
            return wanted - {to for e in self.receiver.arrived()[before:] for to in e["to"]}

        wait_for(lambda: not missing(), "everything queued arrives", 30)
        for node in self.nodes:
            wait_for(lambda node=node: not node.queued(), f"the queue of {node.name} is empty", 20)
        with open(os.path.join(shell.TOP, "test/messages/plain.eml"), "rb") as f:
            sent = f.read()
        changed = [e["file"] for e in self.receiver.arrived()[before:] if split_received(self.receiver.content(e))[1] != sent]
        check(not changed, f"all {len(wanted)} queued messages arrived, byte for byte, and all three queues are empty")
        self.name_duplicates(before, victim)
        self.receiver.stop(shown=True)
        self.receiver.start()

    def fill_queues(self):
        """Has mail accepted by all nodes while the receiver is away; gives the addresses."""
        started = time.monotonic()
        self.here.run("for n in 1 2 3; do\n"
                      f"    (for i in $(seq {EACH}); do curl -sS --url smtp://127.0.0.1$n:{Node.SMTP}/client.test"
                      " --mail-from anna@client.test --mail-rcpt queued$i.mx$n@example.test --upload-file test/messages/plain.eml || exit 1; done) &\n"
                      "  done; wait -n && wait -n && wait -n")
        say(f"  {3 * EACH} messages accepted in {time.monotonic() - started:.1f} s")
        self.mx1.run("mailproxy queue list | head -n 5")
        for node in self.nodes:
            check(len(node.queued()) == EACH, f"{node.name} has {EACH} messages in its queue, each synced to disk before it was answered")
        return {f"queued{i}.{node.name}@example.test" for node in self.nodes for i in range(1, EACH + 1)}

    def name_duplicates(self, before, victim):
        """A message that came twice must be one whose attempt was cut, and the node that was killed says so in its log."""
        copies = {}
        for e in self.receiver.arrived()[before:]:
            for to in e["to"]:
                copies.setdefault(to, []).append(e)
        twice = {to: entries for to, entries in copies.items() if len(entries) > 1}
        cut = {e["item"] for e in victim.events("attempt.cut")}
        named = {}
        for e in victim.events("attempt.start"):
            if e["item"] in cut:
                named.update((to, e["item"]) for to in e["forward_path"])
        say(f"  {len(cut)} attempts were cut by the kill, {len(twice)} messages came twice")
        for to, entries in sorted(twice.items()):
            if to not in named:
                raise Failed(f"{to} came {len(entries)} times, and no attempt.cut in {victim.log} names it")
            say(f"    {to} came {len(entries)} times: the attempt of item {named[to]} was cut")
        check(True, "no duplicate but those that a cut attempt names")

    # Step 6

    def lose_master(self):
        self.step(6, "the master is lost, another takes over, the old one returns")
        old, new, third = self.nodes
        database = old.postmaster()
        if database is None:
            raise Failed("the master's PostgreSQL runs")
        old.run(f"kill -9 {old.process.pid} {database}")
        old.process.wait()
        wait_for(lambda: not shell.alive(database), "the master's PostgreSQL is dead")
        for node in (new, third):
            self.send_one(node, "master-lost")
        code, _ = new.run("pmgcm status", status=None)
        check(code == 3, "pmgcm status says that one does not answer, exit code 3")
        started = time.monotonic()
        new.run("pmgcm promote")
        say(f"  promoted in {time.monotonic() - started:.2f} s")

        def follows():
            return self.master_of(third) == new.name

        wait_for(follows, f"{third.name} follows {new.name} by itself")
        check(True, f"{third.name} follows {new.name} by itself, {time.monotonic() - started:.2f} s after promote was entered")
        self.domain_reaches("second.test", new, [third])
        old.serve()
        started = time.monotonic()
        wait_for(old.takes_mail, f"{old.name} is back")
        self.send_one(old, "old-master-is-back")
        self.all_in_sync(new)
        say(f"  {time.monotonic() - started:.1f} s after the old master was started")
        check(self.master_of(old) == new.name, f"{old.name} has stepped down: its own status says that {new.name} is master")
        _, domains = old.run("mailproxy domain list")
        check("second.test" in domains, f"{old.name} was pushed to: it has the domain that was added while it was away")
        old.run(f"mailproxy domain add third.test --to {self.receiver.address}")
        _, domains = old.run("mailproxy domain list")
        check("third.test" in domains, f"a change that is entered on {old.name} is made on the master, and {old.name} has it when the command ends")
        for node in (old, third):
            self.all_in_sync(node)

    def master_of(self, node):
        """The node that has the role master in node's eyes, or None."""
        _, text = node.run("pmgcm status", status=None, quiet=True)
        names = [line.split("(")[0].strip() for line in text.splitlines() if " master " in line and "ERROR" not in line]
        return names[0].removesuffix(".demo.test") if len(names) == 1 else None

    def send_one(self, node, name):
        to = f"{name}.{node.name}@example.test"
        self.here.run(f"curl -sS --url smtp://{node.ip}:{Node.SMTP}/client.test --mail-from anna@client.test --mail-rcpt {to}"
                      " --upload-file test/messages/plain.eml")
        self.accepted.add(to)
        wait_for(lambda: any(to in e["to"] for e in self.receiver.arrived()), f"mail through {node.name} arrives", 10)
        check(True, f"mail through {node.name} arrived")

    # The end

    def how_to_poke(self):
        new = self.mx2
        say(f"""It stays up until Ctrl-C. In another terminal, as root:

  export PATH={shell.TOP}/bin:$PATH
  swaks --server {self.mx1.ip}:{Node.SMTP} --to you@example.test      # .11, .12, .13; what arrives is in {self.receiver.directory}
  pmgcm --config {new.config} status --long               # mx1, mx2, mx3; {new.name} is the master
  mailproxy --config {new.config} config show
  mailproxy --config {new.config} queue list
  psql -h {new.run_dir}/peer/3 -xc 'select * from node.position()'   # node 3's PostgreSQL, from {new.name}, through the tunnel
  curl http://{new.ip}:{Node.WEB}/health ; curl http://{new.ip}:{Node.WEB}/metrics
  tail -f {new.log}
""")

    def tear_down(self):
        self.receiver.stop()
        for node in self.nodes:
            if node.process is not None and node.process.poll() is None:
                os.kill(node.process.pid, signal.SIGTERM)  # side by side
        for node in self.nodes:
            node.stop()


def split_received(content):
    """Takes the first header field, which must be Received, off a message."""
    if not content.startswith(b"Received:"):
        raise Failed(f"a message does not start with a Received field: {content[:60]!r}")
    end = content.index(b"\r\n") + 2
    while content[end:end + 1] in (b" ", b"\t"):
        end = content.index(b"\r\n", end) + 2
    return content[:end], content[end:]


def stay():
    """Waits for Ctrl-C or SIGTERM."""
    try:
        while True:
            signal.pause()
    except KeyboardInterrupt:
        say("\ndemo: ending")


def main():
    if os.geteuid() != 0:
        sys.exit("demo: run it as root or with sudo")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.default_int_handler)
    work = shell.new_work_dir()
    demo = Demo(work)
    code = 1
    try:
        demo.run()
        code = 0
        if sys.stdin.isatty() and sys.stdout.isatty():
            demo.how_to_poke()
            stay()
    except Failed as e:
        print(f"\ndemo: {demo.title}: does not hold: {e}", file=sys.stderr)
        shell.show_logs(work)
        print(f"\ndemo: {demo.title}: does not hold: {e}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\ndemo: interrupted", file=sys.stderr)
        code = 130
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        demo.tear_down()
        if os.environ.get("MAILPROXY_DEMO_KEEP"):
            say(f"demo: kept {work}")
        else:
            shell.remove(work)
    if code == 0:
        say("demo: torn down")
    sys.exit(code)


main()
