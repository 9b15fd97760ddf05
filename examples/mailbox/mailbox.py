#!/usr/bin/env python3
"""A program that asks the agent to plant a mailbox, and writes what comes to /tmp/mailbox-NAME.json.

    python3 mailbox.py [NAME]

The agent plants, checks and wipes the pages, and signs the ack; the program only reads and writes lines of JSON.
"""

import json
import os
import socket
import sys


def main() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else "app:python"
    connection = socket.socket(socket.AF_UNIX)
    connection.connect("/run/offshoot/agent.sock")
    lines = connection.makefile("rw", encoding="utf-8", newline="\n")

    def send(message: dict) -> None:
        lines.write(json.dumps(message) + "\n")
        lines.flush()

    send({"op": "plant", "name": name, "capacity": 4096})
    reply = json.loads(lines.readline())
    if not reply["ok"]:
        print(f"refused: {reply['error']} ({reply['code']})", file=sys.stderr)
        return 1
    print("planted", flush=True)

    # The template is captured while this line waits. Each fork that is sent something goes on from here; one that is
    # not waits on.
    for line in lines:
        message = json.loads(line)
        if message.get("event") != "filled":
            continue  # the reply to an earlier ack
        try:
            path = f"/tmp/mailbox-{name}.json"
            with open(path + ".part", "w", encoding="utf-8") as out:
                json.dump(message["payload"], out)
            os.rename(path + ".part", path)
        except OSError as error:
            send({"op": "fail", "name": name, "reason": str(error)})
        else:
            send({"op": "ack", "name": name})
    return 0


if __name__ == "__main__":
    sys.exit(main())
