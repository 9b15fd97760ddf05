#!/usr/bin/python3
"""Shows that warm browsers are each themselves: asks each for its identity and for a random id, and puts what they show on one sheet.

    scripts/browsers.py SHEET.png FORK…     forks of a template of the recipe `browser`; `offshoot` is taken from the PATH

Each is reached as any DevTools client would reach it: through `offshoot forward FORK 9222`. Needs Pillow (Debian: python3-pil).
"""

import base64
import io
import json
import os
import re
import socket
import struct
import subprocess
import sys
import time
import urllib.request

from PIL import Image

WIDTH, HEIGHT, COLUMNS, GAP = 530, 200, 3, 8
PATIENCE_S = 180  # for one answer: guests may be emulated, on a busy machine

PAGE = """
<style>body { font: 15px sans-serif; margin: 0; padding: 14px; background: hsl(%(hue)d 70%% 94%%) } h1 { font-size: 24px; margin: 0 0 8px }
td { padding: 3px 8px 3px 0; vertical-align: top } td + td { font-family: monospace; word-break: break-all }</style>
<h1>%(name)s</h1><table><tr><td>id<td>%(id)s<tr><td>host name<td>%(hostname)s<tr><td>template<td>%(template)s
<tr><td>crypto.randomUUID()<td>%(uuid)s<tr><td>DevTools after<td>%(ms)d ms</table>
"""


class Page:
    """The page that was open when the browser was captured, over its DevTools (a WebSocket; RFC 6455)."""

    def __init__(self, address):
        with urllib.request.urlopen(f"http://{address}/json/list", timeout=PATIENCE_S) as answer:
            pages = json.load(answer)
        path = next(page for page in pages if page["type"] == "page")["webSocketDebuggerUrl"].split(address, 1)[1]
        host, port = address.rsplit(":", 1)
        self.socket = socket.create_connection((host, int(port)), PATIENCE_S)
        self.input = self.socket.makefile("rb")
        key = base64.b64encode(os.urandom(16)).decode()
        self.socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: {address}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        if b" 101 " not in self.input.readline():
            raise RuntimeError(f"{address} is no WebSocket")
        while self.input.readline().strip():
            pass
        self.calls = 0

    def call(self, method, **params):
        self.calls += 1
        self.send(json.dumps({"id": self.calls, "method": method, "params": params}).encode())
        while True:
            answer = json.loads(self.message())
            if answer.get("id") == self.calls:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def evaluate(self, code):
        return self.call("Runtime.evaluate", expression=code, returnByValue=True)["result"].get("value")

    def send(self, data):
        mask = os.urandom(4)
        length = struct.pack("!B", 128 | len(data)) if len(data) < 126 else struct.pack("!BH", 254, len(data))
        self.socket.sendall(b"\x81" + length + mask + bytes(byte ^ mask[at % 4] for at, byte in enumerate(data)))

    def message(self):
        parts = b""
        while True:
            first, length = self.input.read(2)
            if length == 126:
                (length,) = struct.unpack("!H", self.input.read(2))
            elif length == 127:
                (length,) = struct.unpack("!Q", self.input.read(8))
            parts += self.input.read(length)
            if first & 128:
                return parts


def identity(page):
    """What the fork says of itself, as a page of it sees it."""
    page.call("Page.navigate", url="file:///run/offshoot/identity.json")
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        try:
            return json.loads(page.evaluate("document.body ? document.body.innerText : ''"))
        except (TypeError, ValueError):
            time.sleep(0.1)
    raise RuntimeError("the page does not show the identity")


def visit(name, hue):
    """(row of the table, picture) of one fork."""
    forwarding = subprocess.Popen(["offshoot", "forward", name, "0:9222"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        begun = time.monotonic()
        address = re.search(r"127\.0\.0\.1:\d+", forwarding.stdout.readline()).group()
        page = Page(address)
        page.evaluate("1")
        milliseconds = (time.monotonic() - begun) * 1000
        seen = identity(page)
        seen["uuid"] = page.evaluate("crypto.randomUUID()")
        shown = json.dumps(PAGE % {**seen, "hue": hue, "ms": milliseconds})
        page.evaluate(f"document.documentElement.innerHTML = {shown}; 1")
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": HEIGHT, "scale": 1}
        picture = page.call("Page.captureScreenshot", format="png", clip=clip)["data"]
        return (seen["name"], seen["id"], seen["uuid"], milliseconds), Image.open(io.BytesIO(base64.b64decode(picture)))
    finally:
        forwarding.terminate()
        forwarding.wait()


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sheet_file, names = sys.argv[1], sys.argv[2:]
    rows, pictures = [], []
    print(f"{'FORK':<14}{'ID':<22}{'crypto.randomUUID()':<38}DEVTOOLS ANSWERED AFTER", flush=True)
    for number, name in enumerate(names):
        row, picture = visit(name, 360 * number // len(names))
        rows.append(row)
        pictures.append(picture.convert("RGB"))
        print(f"{row[0]:<14}{row[1]:<22}{row[2]:<38}{row[3]:.0f} ms", flush=True)
    for field, what in ((0, "name"), (1, "id"), (2, "random id")):
        if len({row[field] for row in rows}) < len(rows):
            sys.exit(f"two browsers have the same {what}")
    lines = -(-len(pictures) // COLUMNS)
    size = (COLUMNS * (WIDTH + GAP) + GAP, lines * (HEIGHT + GAP) + GAP)
    sheet = Image.new("RGB", size, "white")
    for number, picture in enumerate(pictures):
        line, column = divmod(number, COLUMNS)
        sheet.paste(picture, (GAP + column * (WIDTH + GAP), GAP + line * (HEIGHT + GAP)))
    sheet.quantize(64).save(sheet_file, optimize=True)
    print(f"{sheet_file}: {len(rows)} browsers, each itself")


if __name__ == "__main__":
    main()
