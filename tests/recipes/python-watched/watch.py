"""The adversary in Python: the entries of watch.c, by two processes and three threads."""

import mmap
import os
import socket
import struct
import threading
import time

ENTRIES, ENOUGH = 2048, 200
ENTRY = struct.Struct("<QQQ8s24s64sQ")


def watch(number):
    path = f"/dev/shm/watch/{number}.log"
    with open(path, "wb") as file:
        file.truncate(ENTRIES * ENTRY.size)
    with open(path, "r+b") as file:
        ring = mmap.mmap(file.fileno(), ENTRIES * ENTRY.size)
    seen = counter = 0
    while seen < ENOUGH:
        counter += 1
        # The clock first, so that an entry later than the freeze was written after it as a whole.
        monotonic, realtime = time.monotonic_ns(), time.time_ns()
        try:
            with open("/run/offshoot/id", "rb") as file:
                identity = file.read()
        except FileNotFoundError:
            identity = b""
        entry = (counter, monotonic, realtime, os.getrandom(8), identity, socket.gethostname().encode(), counter)
        ENTRY.pack_into(ring, counter % ENTRIES * ENTRY.size, *entry)
        seen += len(identity) > 0
    open(f"/dev/shm/watch/{number}.done", "wb").close()


os.makedirs("/dev/shm/watch", exist_ok=True)
if os.fork() == 0:
    watch(0)
    while True:
        time.sleep(3600)
threads = [threading.Thread(target=watch, args=(number,)) for number in (1, 2, 3)]
for thread in threads:
    thread.start()
time.sleep(1)
print("watching", flush=True)
for thread in threads:
    thread.join()
while True:
    time.sleep(3600)
