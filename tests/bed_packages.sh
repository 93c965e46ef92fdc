#!/usr/bin/env bash
# Installs what a bed of hosts needs (tests/bed.py), where this is root on Debian and it is missing.
# Never fails: tests that need what is still missing are skipped with the reason.
missing=""
[ -x /usr/sbin/sshd ] || missing="$missing openssh-server"
command -v ip > /dev/null || missing="$missing iproute2"
command -v csh > /dev/null || missing="$missing tcsh"
command -v nsenter > /dev/null || missing="$missing util-linux"
command -v ps > /dev/null || missing="$missing procps"
command -v slurmctld > /dev/null || [ -x /usr/sbin/slurmctld ] || missing="$missing slurmctld"
command -v slurmd > /dev/null || [ -x /usr/sbin/slurmd ] || missing="$missing slurmd"
command -v srun > /dev/null || missing="$missing slurm-client"
command -v munged > /dev/null || [ -x /usr/sbin/munged ] || missing="$missing munge"
command -v mpirun > /dev/null || missing="$missing openmpi-bin"
[ -z "$missing" ] && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
    echo "bed of hosts: not installed, for want of root or apt-get:$missing"
    exit 0
fi
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then # the packages' daemons are not wanted
    printf '#!/bin/sh\nexit 101\n' > "$policy"
    chmod +x "$policy"
    trap 'rm -f "$policy"' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
# shellcheck disable=SC2086
if ! { apt-get update -qq && apt-get install -qq -y --no-install-recommends $missing; } > /dev/null 2>&1; then
    echo "bed of hosts: apt-get could not install:$missing"
fi
exit 0
