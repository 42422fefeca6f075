#!/bin/bash
# Makes a machine of its own out of the namespaces it is started in, and becomes its PID 1: a real systemd.
# tests/machine.py starts it; nothing outside these namespaces is changed.
#
#   machine_init.sh FOLDER [SOURCE:TARGET...]     FOLDER is an empty one; each SOURCE is bound to TARGET inside
set -eu
folder=$1
shift
read -r pid _ </proc/self/stat # /proc is still the outer one, and so is this number

# A copy of the whole file system that costs nothing: what is written goes to memory, and away with the machine.
mount -n -t tmpfs -o mode=755 machine "$folder"
mkdir "$folder/upper" "$folder/work" "$folder/root"
mount -n -t overlay -o "lowerdir=/,upperdir=$folder/upper,workdir=$folder/work" machine "$folder/root"
cd "$folder/root"

mount -n -t proc -o nosuid,nodev,noexec proc proc
mount -n -t sysfs -o ro,nosuid,nodev,noexec sysfs sys
mount -n -t cgroup2 -o nosuid,nodev,noexec cgroup2 sys/fs/cgroup
# systemd moves all processes of what it takes for the root group. Only the real root group lacks this file.
[ -e sys/fs/cgroup/cgroup.events ] || { echo "this would run on the root control group" >&2; exit 1; }
mount -n --bind proc/sys proc/sys
mount -n -o remount,bind,ro proc/sys

mount -n -t tmpfs -o mode=755,nosuid dev dev
for device in null zero full random urandom tty; do cp -a "/dev/$device" dev/; done
mkdir dev/pts dev/shm
ln -s /proc/self/fd dev/fd
ln -s pts/ptmx dev/ptmx
mount -n -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts dev/pts
mount -n -t tmpfs -o mode=1777,nosuid,nodev shm dev/shm
mount -n -t tmpfs -o mode=755,nosuid,nodev run run
mount -n -t tmpfs -o mode=1777,nosuid,nodev tmp tmp
for bind; do
    mkdir -p ".${bind#*:}"
    mount -n --bind "${bind%%:*}" ".${bind#*:}"
done

# The same small system every time, whatever the outer one starts at boot.
: >etc/fstab
hostname machine
rm -rf etc/systemd/system/*.wants etc/systemd/system/*.requires etc/systemd/system/*whisperd* var/log/journal
mkdir -p run/systemd/system run/systemd/journald.conf.d
printf '[Journal]\nStorage=volatile\nReadKMsg=no\nAudit=no\nRateLimitBurst=0\n' >run/systemd/journald.conf.d/machine.conf
for unit in systemd-logind.service getty.target console-getty.service dev-hugepages.mount \
    sys-fs-fuse-connections.mount systemd-tmpfiles-clean.timer; do
    ln -s /dev/null "run/systemd/system/$unit"
done

echo "$pid" >"$folder.pid"
mkdir -p old
pivot_root . old
cd /
umount -n -l /old
mount -n --make-rshared /
exec env -i container=tests PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    /lib/systemd/systemd systemd.unit=multi-user.target systemd.unified_cgroup_hierarchy=1 \
    systemd.log_target=journal systemd.show_status=0
