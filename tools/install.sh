#!/bin/sh
# install, uninstall and purge; the Makefile calls it and documents the variables.
#
#   $PREFIX/lib/whisperd/VERSION   an environment of its own for each version: a running daemon keeps its helpers
#   $PREFIX/lib/whisperd/current   the version in use; units and commands lead through it
#   $PREFIX/bin                    whisperd, whisperctl
#   $UNITS/systemd, $UNITS/sysusers.d, $UNITS/tmpfiles.d
set -eu
cd "$(dirname "$0")/.."

DESTDIR=${DESTDIR:-}
PREFIX=${PREFIX:-/usr/local}
# systemd looks into these two and into no other prefix.
case $PREFIX in /usr) UNITS=/usr/lib ;; *) UNITS=/usr/local/lib ;; esac
LIB=$PREFIX/lib/whisperd
DOC=$PREFIX/share/doc/whisperd
VERSION=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' whisperd/__init__.py)

fail() { echo "$*" >&2; exit 1; }
# With DESTDIR a package is being made: the running system is left alone.
live() { [ -z "$DESTDIR" ] && [ -d /run/systemd/system ]; }

case $PREFIX in /?*) ;; *) fail "PREFIX must be an absolute path, not '$PREFIX'" ;; esac
[ -n "$VERSION" ] || fail "whisperd/__init__.py names no version"
[ -n "$DESTDIR" ] || [ "$(id -u)" = 0 ] || fail "this needs root: sudo make $1 (or DESTDIR=... to make a package)"

find_python() {
    for python in $PYTHON; do
        if "$python" -c 'import ensurepip, venv, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then return; fi
    done
    fail "whisperd needs Python 3.11 or newer with venv (Debian: apt-get install python3-venv); tried: $PYTHON. \
Name one: make install PYTHON=/path/to/python3.11"
}

# An environment that works is kept, so that a second install of the same version takes seconds.
make_environment() {
    env=$DESTDIR$LIB/$VERSION
    if ! "$env/bin/python" -c 'import pip' 2>/dev/null; then
        find_python
        mkdir -p "$DESTDIR$LIB"
        "$python" -m venv --clear "$env"
    fi
    rm -rf build # what an older build left in it would be installed too
    # shellcheck disable=SC2086 # several flags, on purpose
    "$env/bin/python" -m pip install --disable-pip-version-check --quiet ${PIP_FLAGS:-} '.[server]'
    # The same version with other contents (a working copy) would count as installed already.
    # shellcheck disable=SC2086
    "$env/bin/python" -m pip install --disable-pip-version-check --quiet ${PIP_FLAGS:-} --no-deps --force-reinstall .
    # What was built below DESTDIR must find itself without it.
    [ -z "$DESTDIR" ] || grep -rlIZ "$DESTDIR$LIB" "$env/bin" | xargs -0r sed -i "s|$DESTDIR$LIB|$LIB|g"
    [ -z "$DESTDIR" ] || sed -i "s|$DESTDIR$LIB|$LIB|g" "$env/pyvenv.cfg"
}

# The version in use until now stays, for the daemon that still runs from it; older ones go.
switch() {
    old=$(readlink "$DESTDIR$LIB/current" || true)
    ln -sfn "$VERSION" "$DESTDIR$LIB/current.new"
    mv -T "$DESTDIR$LIB/current.new" "$DESTDIR$LIB/current"
    for folder in "$DESTDIR$LIB"/*; do
        case ${folder##*/} in "$VERSION" | "$old" | current) ;; *) rm -rf "$folder" ;; esac
    done
    mkdir -p "$DESTDIR$PREFIX/bin"
    for command in whisperd whisperctl; do
        ln -sfn "../lib/whisperd/current/bin/$command" "$DESTDIR$PREFIX/bin/$command"
    done
}

# units MANAGER: its units. Those of users are data of the package, because `whisperd setup` writes them too.
units() {
    case $1 in system) echo systemd/system/* ;; user) echo whisperd/assets/user-units/* ;; esac
}

# put SOURCE TARGET: a file in which our default prefix is replaced by the real one.
put() {
    mkdir -p "$(dirname "$DESTDIR$2")"
    sed "s|/usr/local/|$PREFIX/|g" "$1" >"$DESTDIR$2.new"
    chmod 644 "$DESTDIR$2.new"
    mv "$DESTDIR$2.new" "$DESTDIR$2"
}

install() {
    umask 022
    make_environment
    switch
    for manager in system user; do
        for unit in $(units "$manager"); do put "$unit" "$UNITS/systemd/$manager/${unit##*/}"; done
    done
    put systemd/sysusers.conf "$UNITS/sysusers.d/whisperd.conf"
    put systemd/tmpfiles.conf "$UNITS/tmpfiles.d/whisperd.conf"
    for page in docs/*.md README.md CHANGELOG.md LICENSE; do put "$page" "$DOC/${page##*/}"; done
    echo "whisperd $VERSION is in $DESTDIR$LIB/$VERSION"
    live || return 0
    systemd-sysusers "$UNITS/sysusers.d/whisperd.conf"
    systemd-tmpfiles --create "$UNITS/tmpfiles.d/whisperd.conf"
    systemctl daemon-reload
    if systemctl --quiet is-active whisperd.service; then
        echo "The version before it still runs; when it suits: systemctl restart whisperd (nobody is refused meanwhile)"
    else
        echo "Next: systemctl enable --now whisperd; usermod --append --groups whisperd NAME, for whoever may use it"
    fi
}

uninstall() {
    if live; then
        systemctl --quiet disable --now whisperd.socket whisperd.service whisperd-fetch.socket 2>/dev/null || true
    fi
    for manager in system user; do
        for unit in $(units "$manager"); do rm -f "$DESTDIR$UNITS/systemd/$manager/${unit##*/}"; done
    done
    rm -f "$DESTDIR$UNITS/sysusers.d/whisperd.conf" "$DESTDIR$UNITS/tmpfiles.d/whisperd.conf"
    rm -f "$DESTDIR$PREFIX/bin/whisperd" "$DESTDIR$PREFIX/bin/whisperctl"
    rm -rf "$DESTDIR$LIB" "$DESTDIR$DOC"
    if live; then
        systemctl daemon-reload
        systemctl reset-failed whisperd.service whisperd.socket whisperd-fetch.socket 2>/dev/null || true
        rmdir /run/whisperd 2>/dev/null || true
    fi
}

# Configuration, queue, transcripts, models, the users: what uninstall leaves.
purge() {
    uninstall
    rm -rf "$DESTDIR/etc/whisperd" "$DESTDIR/var/lib/whisperd" "$DESTDIR/var/cache/whisperd"
    for unit in systemd/system/*; do rm -rf "$DESTDIR/etc/systemd/system/${unit##*/}.d"; done
    if [ -z "$DESTDIR" ]; then
        for user in whisperd whisperd-fetch; do
            if getent passwd "$user" >/dev/null; then userdel "$user"; fi
        done
    fi
}

case $1 in
    install) install ;;
    uninstall)
        uninstall
        echo "whisperd is gone; /etc/whisperd, /var/lib/whisperd, /var/cache/whisperd and its user stay (make purge)"
        ;;
    purge)
        purge
        echo "whisperd is gone, with its configuration, queue, transcripts and models"
        ;;
    *) fail "usage: install.sh install|uninstall|purge" ;;
esac
