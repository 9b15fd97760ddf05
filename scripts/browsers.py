#!/usr/bin/python3
"""Forks a warm browser and shows that each fork is itself: asks each for its identity and for a random id, and puts what they show on one sheet.

    scripts/browsers.py SHEET.png TEMPLATE NAME COUNT     a template of the recipe `browser`; `offshoot` is taken from the PATH

The forks are called NAME-1, NAME-2… and stay. Each is reached as any DevTools client would reach it: by its name, through `offshoot route`. Needs
Pillow (Debian: python3-pil).
"""

import base64
import concurrent.futures
import io
import json
import os
import socket
import struct
import subprocess
import sys
import time
import urllib.request

from PIL import Image

WIDTH, HEIGHT, COLUMNS, GAP = 530, 200, 3, 8
PATIENCE_S = 180  # for one answer: guests may be emulated, on a busy machine
IDENTITY = "http://127.0.0.1:9511/internal/fork-identity/config"  # in each fork; see the recipe

PAGE = """
<style>body { font: 15px sans-serif; margin: 0; padding: 14px; background: hsl(%(hue)d 70%% 94%%) } h1 { font-size: 24px; margin: 0 0 8px }
td { padding: 3px 8px 3px 0; vertical-align: top } td + td { font-family: monospace; word-break: break-all }</style>
<h1>%(name)s</h1><table><tr><td>id<td>%(id)s<tr><td>host name<td>%(hostname)s<tr><td>template<td>%(template)s
<tr><td>crypto.randomUUID()<td>%(uuid)s<tr><td>DevTools answered<td>%(ms)d ms after the request for %(count)d forks</table>
"""


class Page:
    """The page that was open when the browser was captured, over its DevTools (a WebSocket; RFC 6455)."""

    def __init__(self, router, name):
        host, port = router.rsplit(":", 1)
        called = f"{name}.localhost:{port}"
        request = urllib.request.Request(f"http://{router}/json/list", headers={"Host": called})
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            pages = json.load(answer)
        path = next(page for page in pages if page["type"] == "page")["webSocketDebuggerUrl"].split(called, 1)[1]
        self.socket = socket.create_connection((host, int(port)), PATIENCE_S)
        self.input = self.socket.makefile("rb")
        key = base64.b64encode(os.urandom(16)).decode()
        self.socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: {called}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        if b" 101 " not in self.input.readline():
            raise RuntimeError(f"{called} is no WebSocket")
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
    """What the fork says of itself, to a page of it that asks."""
    page.call("Page.navigate", url=IDENTITY)
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        try:
            return json.loads(page.evaluate("document.body ? document.body.innerText : ''"))
        except (TypeError, ValueError):
            time.sleep(0.1)
    raise RuntimeError("the page does not show the identity")


def arrive(router, fork):
    """(page, milliseconds) of one fork: from the request for it to the first answer of its page."""
    page = Page(router, fork["name"])
    page.evaluate("1")
    # Its acknowledgement is what both clocks have in common.
    return page, time.time() * 1000 - fork["created_ms"] + fork["acked_micros"] / 1000


def visit(page, milliseconds, number, count):
    """(row of the table, picture) of one fork."""
    seen = identity(page)
    seen["uuid"] = page.evaluate("crypto.randomUUID()")
    shown = json.dumps(PAGE % {**seen, "hue": 360 * number // count, "ms": milliseconds, "count": count})
    page.evaluate(f"document.documentElement.innerHTML = {shown}; 1")
    clip = {"x": 0, "y": 0, "width": WIDTH, "height": HEIGHT, "scale": 1}
    picture = page.call("Page.captureScreenshot", format="png", clip=clip)["data"]
    return (seen["name"], seen["id"], seen["uuid"], milliseconds), Image.open(io.BytesIO(base64.b64decode(picture)))


def main():
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    sheet_file, template, prefix, count = *sys.argv[1:4], int(sys.argv[4])
    route = ["offshoot", "route", "--listen", "127.0.0.1:0", "--port", "9222", "--json"]
    routing = subprocess.Popen(route, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        show(json.loads(routing.stdout.readline())["listening"], sheet_file, template, prefix, count)
    finally:
        routing.terminate()
        routing.wait()


def show(router, sheet_file, template, prefix, count):
    fork = ["offshoot", "fork", template, "-n", str(count), "--name", prefix, "--label", "purpose=demo", "--network", "none", "--json"]
    forks = json.loads(subprocess.run(fork, check=True, stdout=subprocess.PIPE).stdout)["forks"]
    # All at once, as soon as they are there.
    with concurrent.futures.ThreadPoolExecutor(count) as threads:
        pages = list(threads.map(lambda fork: arrive(router, fork), forks))
    rows, pictures = [], []
    print(f"{'FORK':<14}{'ID':<22}{'crypto.randomUUID()':<38}FROM FORK TO DEVTOOLS", flush=True)
    for number, (page, milliseconds) in enumerate(pages):
        row, picture = visit(page, milliseconds, number, count)
        rows.append(row)
        pictures.append(picture.convert("RGB"))
        print(f"{row[0]:<14}{row[1]:<22}{row[2]:<38}{row[3]:.0f} ms", flush=True)
    if [row[:2] for row in rows] != [(fork["name"], fork["id"]) for fork in forks]:
        sys.exit("a browser shows another fork")
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
