#!/bin/sh
# Connections, made before the capture: with an address of the network card's; by loopback, and between two processes of another network namespace, which
# go on by themselves in each fork; and one in that namespace whose other end is nowhere.
set -e
wait_for() {
    until "$@" >/dev/null 2>&1; do sleep 0.05; done
}
# pair ADDRESS PORT: both ends here.
pair() {
    busybox nc -l -p "$2" -e busybox cat &
    wait_for sh -c "busybox netstat -ltn | grep -q ':$2 '"
    busybox mkfifo "/tmp/$2.in"
    busybox nc "$1" "$2" <>"/tmp/$2.in" >"/tmp/$2.out" &
    echo hello >"/tmp/$2.in"
    wait_for grep -q hello "/tmp/$2.out"
}
if [ "${1:-}" = elsewhere ]; then
    busybox ip link set lo up
    busybox ip addr add 203.0.113.1/32 dev lo
    busybox ip route add default dev lo
    pair 203.0.113.1 7003
    # A connection that was never made: as restored from a checkpoint (TCP_REPAIR).
    exec python3 -c '
import socket, time
s = socket.socket()
s.setsockopt(socket.IPPROTO_TCP, 19, 1)
s.bind(("203.0.113.1", 5000))
s.connect(("198.51.100.7", 443))
s.setsockopt(socket.IPPROTO_TCP, 19, -1)
print("all are connected", flush=True)
while True:
    time.sleep(3600)
'
fi
busybox ip link set lo up
busybox ip addr add 192.0.2.77/24 dev eth0
busybox ip link set eth0 up
pair 192.0.2.77 7001
pair 127.0.0.1 7002
exec busybox unshare -n sh /usr/bin/connections elsewhere
