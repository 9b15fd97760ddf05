"""Draws before the capture, and again when it is asked to: a line in /tmp/NAME.ask has it write a number to /tmp/NAME.drawn."""
import os
import random
import ssl
import sys

name = sys.argv[1]
random.random()
ssl.RAND_bytes(16)
ask = f"/tmp/{name}.ask"
if not os.path.exists(ask):
    os.mkfifo(ask)
print("drawn", flush=True)
while True:
    with open(ask) as asked:
        asked.readline()
    with open(f"/tmp/{name}.drawn", "w") as drawn:
        drawn.write(f"{random.random()} {ssl.RAND_bytes(16).hex()}\n")
