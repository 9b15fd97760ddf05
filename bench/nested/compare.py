"""Runs in the rig: times forks of ours and Firecracker's snapshot load. Only what python3-minimal has is used."""

import json
import os
import select
import socket
import subprocess
import sys
import time

PLACE = "/compare"
WORK = "/tmp"
MEMORY_MIB = 128
LIMIT = 120.0
AT_ONCE = (1, 8)


def milliseconds(begun):
    return (time.monotonic() - begun) * 1000


def quantile(values, part):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))]


def row(name, values, note=""):
    print(f"| {name} | {len(values)} | {quantile(values, 0.5):.0f} | {quantile(values, 0.9):.0f} | {max(values):.0f} | {note} |")


class Firecracker:
    """One process of it. Its guest's serial port is its standard input and output."""

    def __init__(self, name):
        self.path = f"{WORK}/{name}.sock"
        self.seen = b""
        if os.path.exists(self.path):
            os.unlink(self.path)
        self.process = subprocess.Popen(
            [f"{PLACE}/firecracker", "--api-sock", self.path, "--id", name, "--level", "Error"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def call(self, method, path, body):
        """One request of its API; waits until it listens."""
        end = time.monotonic() + LIMIT
        while True:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(self.path)
                break
            except OSError:
                connection.close()
                if time.monotonic() > end or self.process.poll() is not None:
                    raise
                time.sleep(0.001)
        text = json.dumps(body)
        connection.sendall(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                           f"Content-Length: {len(text)}\r\n\r\n{text}".encode())
        answer = connection.recv(65536).decode()
        connection.close()
        if " 204 " not in answer.split("\n")[0]:
            sys.exit(f"{path}: {answer}")

    def say(self, line):
        self.process.stdin.write(line + b"\n")
        self.process.stdin.flush()

    def wait_for(self, word):
        end = time.monotonic() + LIMIT
        output = self.process.stdout.fileno()
        while word not in self.seen:
            ready = select.select([output], [], [], max(0, end - time.monotonic()))[0]
            chunk = os.read(output, 65536) if ready else b""
            if not chunk:
                sys.exit(f"no {word!r} from Firecracker's guest; it said: {self.seen[-2000:].decode(errors='replace')}")
            self.seen += chunk

    def end(self):
        self.process.kill()
        self.process.wait()


def firecracker_snapshot():
    machine = Firecracker("template")
    begun = time.monotonic()
    machine.call("PUT", "/boot-source", {
        "kernel_image_path": f"{PLACE}/vmlinux", "initrd_path": f"{PLACE}/initramfs.cpio",
        "boot_args": "console=ttyS0 quiet reboot=k panic=-1 mitigations=off cryptomgr.notests 8250.nr_uarts=1"})
    machine.call("PUT", "/drives/root", {
        "drive_id": "root", "path_on_host": f"{PLACE}/root.ext4", "is_root_device": False, "is_read_only": True})
    machine.call("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": MEMORY_MIB})
    machine.call("PUT", "/actions", {"action_type": "InstanceStart"})
    machine.wait_for(b"ready")
    row("Firecracker: boot", [milliseconds(begun)])
    machine.say(b"warm")
    machine.wait_for(b"reply warm")
    machine.call("PATCH", "/vm", {"state": "Paused"})
    machine.call("PUT", "/snapshot/create", {
        "snapshot_type": "Full", "snapshot_path": f"{WORK}/state", "mem_file_path": f"{WORK}/memory"})
    machine.end()


def firecracker_forks(at_once, rounds):
    """The time of each from the start of its process, and of all; and of the load alone."""
    loads, replies, alls = [], [], []
    for number in range(rounds):
        begun = time.monotonic()
        machines = [Firecracker(f"fork-{number}-{index}") for index in range(at_once)]
        for machine in machines:
            load = time.monotonic()
            machine.call("PUT", "/snapshot/load", {
                "snapshot_path": f"{WORK}/state", "resume_vm": True,
                "mem_backend": {"backend_path": f"{WORK}/memory", "backend_type": "File"}})
            loads.append(milliseconds(load))
            machine.say(b"hello")
        for machine in machines:
            machine.wait_for(b"reply hello")
            replies.append(milliseconds(begun))
        alls.append(milliseconds(begun))
        for machine in machines:
            machine.end()
    name = f"Firecracker, {at_once} at once"
    row(f"{name}: load call", loads)
    row(f"{name}: process start → first reply", replies, "no identity")
    if at_once > 1:
        row(f"{name}: until all replied", alls, "no identity")


def offshoot_forks(offshoot, engine, rounds):
    """Our own measurement: `offshoot bench`, from the request to the acknowledged identity."""
    def run(*args):
        done = subprocess.run([offshoot, "--json", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if done.returncode != 0:
            print(f"offshoot {' '.join(args)}: {done.stderr.decode()}", file=sys.stderr)
            return None
        return json.loads(done.stdout or b"null")

    tag = f"bench-{engine}"
    selected = ["--engine", engine] if engine != "default" else []
    if run("build", "busybox", "--tag", tag, "--memory", f"{MEMORY_MIB}M", *selected) is None:
        return
    for pool in (0, max(AT_ONCE)):
        run("pool", tag, str(pool))
        for at_once in AT_ONCE:
            result = run("bench", tag, "-n", str(at_once), "--rounds", str(rounds))
            for figures in (result or {}).get("rows", []):
                with_pool = "with" if pool else "without"
                label = f"offshoot ({engine}), {with_pool} pool, {at_once} at once"
                for field, what in (("acked_ms", "each"), ("all_acked_ms", "all")):
                    one = figures[field]
                    if what == "each" or at_once > 1:
                        print(f"| {label}: {what} acknowledged | {one['count']} | {one['p50']:.0f} | {one['p90']:.0f} "
                              f"| {one['max']:.0f} | identity |")
    run("pool", tag, "0")


def main():
    offshoot, rounds = sys.argv[1], int(sys.argv[2])
    with open("/proc/loadavg") as load:
        print(f"Load inside before: {load.read().strip()}\n")
    print("| what | times | p50 ms | p90 ms | max ms | |\n|---|---|---|---|---|---|")
    engines = os.environ.get("ENGINES", "default").split(",")
    for engine in engines:
        offshoot_forks(offshoot, engine, rounds)
    firecracker_snapshot()
    for at_once in AT_ONCE:
        firecracker_forks(at_once, rounds)


main()
