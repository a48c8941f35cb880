#!/usr/bin/python3
"""The receiving mail server of the demo: Debian's aiosmtpd. It keeps every message as it came, octet by octet.

    receiver.py HOST:PORT DIRECTORY [--delay SECONDS]

Each message becomes DIRECTORY/NNNNN.eml and one line in DIRECTORY/index.jsonl: number, time, reverse-path, forward-paths, EHLO name.
Addresses that start with "unknown" do not exist here. With --delay, messages are taken one at a time, and the answer to each comes
so many seconds after the message has been kept: a sender that dies in between cannot know that it has arrived.
SIGTERM ends it.
"""

import argparse
import asyncio
import json
import os
import signal
import time

from aiosmtpd.smtp import SMTP


class Keeper:
    def __init__(self, directory, delay):
        self.directory = directory
        self.delay = delay
        self.one = asyncio.Lock()
        index = os.path.join(directory, "index.jsonl")
        self.number = sum(1 for _ in open(index)) if os.path.exists(index) else 0
        self.index = open(index, "a", buffering=1)

    async def handle_EHLO(self, server, session, envelope, hostname, responses):
        session.host_name = hostname
        responses.insert(1, "250-PIPELINING")
        return responses

    async def handle_RCPT(self, server, session, envelope, address, options):
        if address.startswith("unknown"):
            return "550 5.1.1 no such mailbox here"
        envelope.rcpt_tos.append(address)
        return "250 2.1.5 ok"

    async def handle_DATA(self, server, session, envelope):
        if not self.delay:
            return self.keep(session, envelope)
        async with self.one:
            answer = self.keep(session, envelope)
            await asyncio.sleep(self.delay)
            return answer

    def keep(self, session, envelope):
        self.number += 1
        name = f"{self.number:05d}.eml"
        with open(os.path.join(self.directory, name), "wb") as f:
            f.write(envelope.original_content)
        entry = {"file": name, "at": time.time(), "helo": session.host_name, "from": envelope.mail_from, "to": envelope.rcpt_tos}
        self.index.write(json.dumps(entry) + "\n")
        return f"250 2.0.0 kept as {name}"


async def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("listen")
    parser.add_argument("directory")
    parser.add_argument("--delay", type=float, default=0)
    options = parser.parse_args()
    host, port = options.listen.rsplit(":", 1)
    keeper = Keeper(options.directory, options.delay)
    SMTP.line_length_limit = 1 << 20

    def session():
        return SMTP(keeper, hostname="receiver.test", data_size_limit=64 << 20, enable_SMTPUTF8=True, timeout=300)

    loop = asyncio.get_running_loop()
    server = await loop.create_server(session, host, int(port))
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    print(f"receiver listens on {options.listen}", flush=True)
    await stop.wait()
    server.close()


asyncio.run(main())
