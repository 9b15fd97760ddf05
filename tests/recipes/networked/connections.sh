#!/bin/sh
# Two connections, made before the capture: one with an address of the network card's, one by loopback. What is written to /tmp/NAME.in
# goes around through the connection to /tmp/NAME.out; /tmp/NAME.end is there once it has ended.
set -e
ip link set lo up
ip addr add 192.0.2.77/24 dev eth0
ip link set eth0 up

connect() {
    name=$1 address=$2 port=$3
    mkfifo "/tmp/$name.in"
    nc -l -p "$port" -e cat &
    until netstat -ltn | grep -q ":$port "; do sleep 0.05; done
    (nc "$address" "$port" <>"/tmp/$name.in" >"/tmp/$name.out"; echo "$?" >"/tmp/$name.end") &
    echo template >"/tmp/$name.in"
    until grep -q template "/tmp/$name.out"; do sleep 0.05; done
}

connect card 192.0.2.77 7001
connect loopback 127.0.0.1 7002
echo both are connected
wait
